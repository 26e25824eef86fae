"""NP-LoRA's projectors and whole merges of benches/merge.rs: two adapters of FLUX.1's shapes, 304 layers, rank 32, bf16 on
the host, layer by layer as scripts do it."""

import time

import torch
from common import DEVICE, LAYERS, measure, record, sized, tf32, wait

RANK = 32
SHAPE = f"{len(LAYERS)} layers r{RANK}"


def adapter():
    def factors(i, o):
        a = torch.randn(RANK, i, device=DEVICE).div(i**0.5)
        b = torch.randn(o, RANK, device=DEVICE).div(RANK**0.5)
        return a.bfloat16().cpu(), b.bfloat16().cpu()

    return [factors(i, o) for i, o in LAYERS]


def to_device(m):
    return m.to(DEVICE).float()


def directions(a, b):
    """Right singular vectors of B·A as columns, by two thin QRs and the SVD of the core."""
    q, r = torch.linalg.qr(a.T)
    _, s = torch.linalg.qr(b)
    _, _, vh = torch.linalg.svd(s @ r.T)
    return q @ vh.T


def np_lora(style, subject):
    merged = []
    for (a_s, b_s), (a_c, b_c) in zip(style, subject):
        a_s, b_s, a_c, b_c = map(to_device, (a_s, b_s, a_c, b_c))
        v = directions(a_s, b_s)
        a = torch.cat([a_s, a_c - (a_c @ v) @ v.T])
        merged.append((a.cpu(), torch.cat([b_s, b_c], dim=1).cpu()))
    return merged


def dense(style):
    """One SVD of a whole update, of a few layers; the other layers by m·n·min(m, n) from the largest one timed."""

    def once(a, b):
        update = b @ a
        torch.linalg.svd(update[:256, :256])
        wait()
        start = time.perf_counter()
        torch.linalg.svd(update, full_matrices=False)
        wait()
        return time.perf_counter() - start

    def work(shape):
        return shape[0] * shape[1] * min(shape)

    wanted = sized([(3072, 3072), (3072, 9216), (3072, 12288)], [LAYERS[1], LAYERS[0], LAYERS[2]])
    timed = {}
    for shape in wanted:
        a, b = style[LAYERS.index(shape)]
        timed[shape] = once(a, b)
        record("projectors", f"{shape[0]} to {shape[1]}", "dense SVD of one layer", timed[shape])
    largest = max(timed, key=work)
    rate = timed[largest] / work(largest)
    return sum(timed.get(shape, rate * work(shape)) for shape in LAYERS), largest


tf32(False)
style, subject = adapter(), adapter()
few = {"samples": 5}
measure(
    "projectors",
    SHAPE,
    "QR, factors on the host",
    lambda: [directions(to_device(a), to_device(b)) for a, b in style],
    **few,
)
resident = [(to_device(a), to_device(b)) for a, b in style]
measure("projectors", SHAPE, "QR, factors on the device", lambda: [directions(a, b) for a, b in resident], **few)
measure("merge", SHAPE, "np-lora", lambda: np_lora(style, subject), **few)
total, largest = dense(resident)
note = f"extrapolated from three layers; other shapes by m·n·min(m, n) from {largest[0]} to {largest[1]}"
record("projectors", SHAPE, "dense SVD", total, note=note)
