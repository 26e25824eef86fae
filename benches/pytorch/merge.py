"""NP-LoRA's projectors and whole merges of benches/merge.rs in PyTorch on CUDA: two adapters of FLUX.1's shapes, 304 layers,
rank 32, bf16 on the host, layer by layer as scripts do it. Medians of 5 runs, in milliseconds."""

import statistics
import time

import torch

DOUBLE = [(3072, 9216), (3072, 3072), (3072, 12288), (12288, 3072), (3072, 18432)] * 2
SINGLE = [(3072, 21504), (15360, 3072), (3072, 9216)]
LAYERS = DOUBLE * 19 + SINGLE * 38
RANK = 32


def adapter():
    return [
        (torch.randn(RANK, i).div(i**0.5).to(torch.bfloat16), torch.randn(o, RANK).div(RANK**0.5).to(torch.bfloat16))
        for i, o in LAYERS
    ]


def to_device(m):
    return m.to("cuda").float()


def directions(a, b):
    """Right singular vectors of B·A as columns, by two thin QRs and the SVD of the core."""
    q, r = torch.linalg.qr(a.T)
    _, s = torch.linalg.qr(b)
    _, _, vh = torch.linalg.svd(s @ r.T)
    return q @ vh.T


def projectors(style):
    return [directions(to_device(a), to_device(b)) for a, b in style]


def np_lora(style, subject):
    merged = []
    for (a_s, b_s), (a_c, b_c) in zip(style, subject):
        a_s, b_s, a_c, b_c = map(to_device, (a_s, b_s, a_c, b_c))
        v = directions(a_s, b_s)
        a = torch.cat([a_s, a_c - (a_c @ v) @ v.T])
        merged.append((a.cpu(), torch.cat([b_s, b_c], dim=1).cpu()))
    return merged


def median_ms(work, repeats=5):
    work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


print(torch.__version__, torch.cuda.get_device_name(), len(LAYERS), "layers")
style, subject = adapter(), adapter()
print(f"projectors, QR in a loop, with upload: {median_ms(lambda: projectors(style)):.1f} ms", flush=True)
on_device = [(to_device(a), to_device(b)) for a, b in style]
print(f"projectors, factors on the device: {median_ms(lambda: [directions(a, b) for a, b in on_device]):.1f} ms", flush=True)
print(f"np-lora, upload to download: {median_ms(lambda: np_lora(style, subject)):.1f} ms", flush=True)
a, b = on_device[1]
dense = median_ms(lambda: torch.linalg.svd(b @ a, full_matrices=False), repeats=3)
print(f"dense SVD of one 3072 x 3072 update: {dense:.1f} ms; 304 such: {dense * 304 / 1e3:.1f} s", flush=True)
