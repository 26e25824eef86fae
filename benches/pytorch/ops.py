"""The work of benches/ops.rs in PyTorch: accumulation and batched solves."""

import torch
from common import DEVICE, many, measure, relative, sized, tf32


def accumulate(width, rank, tokens):
    """G += ZᵀZ, Z = X·Aᵀ; eight layers in turn, each with its own X."""
    a = 2 * torch.rand(rank, width, device=DEVICE) - 1
    inputs = {dtype: many(tokens, width, dtype) for dtype in (torch.float32, torch.bfloat16)}
    shape = f"d{width} r{rank} n{tokens}"
    variants = [
        ("f32", torch.float32, False, lambda x: x @ a.T),
        ("TF32", torch.float32, True, lambda x: x @ a.T),
        ("f32 from bf16", torch.bfloat16, False, lambda x: x.float() @ a.T),
        ("bf16", torch.bfloat16, False, lambda x, a=a.bfloat16(): x @ a.T),
    ]
    for variant, dtype, fast, project in variants:
        tf32(fast)
        xs = inputs[dtype]
        g = torch.zeros(rank, rank, device=DEVICE)

        def layer(x, g):
            z = project(x)
            g.add_(z.T @ z)

        layer(xs[0], g)
        exact = xs[0].double() @ a.double().T
        error = relative(g, exact.T @ exact)
        eight = [xs[i % len(xs)] for i in range(8)]
        measure("accumulate", shape, variant, lambda: [layer(x, g) for x in eight], calls=8, error=error)
    tf32(False)


def solve(count, order):
    """R·G = Q, positive definite, in f64."""
    m = 2 * torch.rand(count, order, order, device=DEVICE, dtype=torch.float64) - 1
    g = m.triu() + m.triu(1).mT + order * torch.eye(order, device=DEVICE, dtype=torch.float64)
    q = 2 * torch.rand(count, order, order, device=DEVICE, dtype=torch.float64) - 1

    def residual(r):
        norm = torch.linalg.matrix_norm
        return (norm(r @ g - q) / (norm(r) * norm(g) + norm(q))).max().item()

    ways = [
        ("f64, solve", lambda: torch.linalg.solve(g, q, left=False)),
        ("f64, cholesky_solve", lambda: torch.cholesky_solve(q.mT, torch.linalg.cholesky(g)).mT),
    ]
    for variant, way in ways:
        measure("solve", f"{count}x{order}", variant, way, error=residual(way()))


for width, rank in sized([(3072, 32), (3072, 64), (3072, 128), (3072, 256), (3072, 512), (12288, 128)], [(384, 32)]):
    accumulate(width, rank, sized(4608, 256))
for order in sized([32, 64, 128, 256], [32]):
    solve(sized(304, 4), order)
