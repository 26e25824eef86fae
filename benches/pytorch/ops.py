"""The work of benches/ops.rs, and the layers that benches/fusion.rs adds to, in PyTorch on CUDA: medians of 50 timings of 20 calls each, in milliseconds."""

import statistics
import time

import torch


def median_ms(work, calls=20, repeats=50):
    for _ in range(10):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def accumulate(tokens, width, rank, dtype, tf32):
    torch.backends.cuda.matmul.allow_tf32 = tf32
    x = torch.randn(tokens, width, device="cuda", dtype=dtype)
    a = torch.randn(rank, width, device="cuda")
    g = torch.zeros(rank, rank, device="cuda")

    def work():
        z = x.float() @ a.T
        g.add_(z.T @ z)

    return median_ms(work)


def solve(count, order, factor):
    m = torch.rand(order, order, device="cuda", dtype=torch.float64)
    m = m + m.T + order * torch.eye(order, device="cuda", dtype=torch.float64)
    g = m.expand(count, order, order).contiguous()
    q = g.clone()
    if factor == "lu":
        return median_ms(lambda: torch.linalg.solve(g, q), calls=5, repeats=20)
    return median_ms(lambda: torch.cholesky_solve(q, torch.linalg.cholesky(g)), calls=5, repeats=20)


print(torch.__version__, torch.cuda.get_device_name())
for width, rank in [(3072, 32), (3072, 64), (3072, 128), (3072, 256), (3072, 512), (12288, 128)]:
    f32 = accumulate(4608, width, rank, torch.float32, False)
    tf32 = accumulate(4608, width, rank, torch.float32, True)
    bf16_in = accumulate(4608, width, rank, torch.bfloat16, False)
    print(f"accumulate d{width} r{rank}: f32 {f32:.4f}  tf32 {tf32:.4f}  f32 from bf16 input {bf16_in:.4f}", flush=True)
for order in [32, 64, 128, 256]:
    print(f"solve 64x{order} f64: lu {solve(64, order, 'lu'):.4f}  cholesky {solve(64, order, 'cholesky'):.4f}", flush=True)


def layer(tokens, width_in, width_out):
    """The base model's own product, to which fusing adds."""
    x = torch.randn(tokens, width_in, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(width_out, width_in, device="cuda", dtype=torch.bfloat16)
    return median_ms(lambda: x @ w.T)


for width_in, width_out in [(3072, 3072), (3072, 12288), (12288, 3072)]:
    print(f"base layer {width_in} to {width_out}, bf16: {layer(4608, width_in, width_out):.4f}", flush=True)
