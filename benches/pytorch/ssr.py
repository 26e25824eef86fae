"""SSR of a whole FLUX.1 (benches/ssr.rs) by the authors' formula: f32 statistics layer by layer, the solve in f64.

Per hook call, on the device: Z = X·A_catᵀ, G += ZᵀZ, Q[block k] += Z[:, block k]ᵀ·Z. Per layer:
R = (Q/N)·(G/N + 1e-4·I)⁻¹, B = B_cat·R. Activations are bf16, as a model in bf16 has them, and take turns in a few buffers
of each width, more than caches hold. The published code also moves G and Q to the host at every call, which is timed
apart.

`whole` does what loraweld's does: from adapters in files to merged factors on the host, in f32; values are checked for NaN
and infinity on the way, and each file gets its SHA-256. It is timed without the hashes too.
"""

import hashlib
import mmap
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from common import DEVICE, LAYERS, many, measure, sized, tf32
from safetensors.torch import load_file, save_file

K, RANK, TOKENS = 4, 32, sized(4608, 64)
R = K * RANK
SHAPE = f"{len(LAYERS)} layers k{K} r{RANK} n{TOKENS}"


def key(layer, factor):
    return f"bench.{layer}.lora_{factor}.weight"


def adapter(path):
    """Writes an adapter of rank 32 in bf16, and gives its path."""

    def normal(rows, columns, scale):
        return torch.randn(rows, columns, device=DEVICE).mul(scale).bfloat16().cpu()

    tensors = {}
    for layer, (i, o) in enumerate(LAYERS):
        tensors[key(layer, "A")] = normal(RANK, i, i**-0.5)
        tensors[key(layer, "B")] = normal(o, RANK, RANK**-0.5)
    save_file(tensors, path)
    return path


def stacked(paths):
    """A_cat and B_cat of each layer, on the device in f32."""
    files = [load_file(path, device=DEVICE) for path in paths]
    a_cats = [torch.cat([file[key(layer, "A")] for file in files]).float() for layer in range(len(LAYERS))]
    b_cats = [torch.cat([file[key(layer, "B")] for file in files], dim=1).float() for layer in range(len(LAYERS))]
    return a_cats, b_cats


def check_finite(tensors):
    """One wait for the answer to all."""
    if not torch.stack([torch.isfinite(t).all() for t in tensors]).all():
        raise ValueError("a value is NaN or infinite")


def sha256(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha256(data).hexdigest()


def hook(x, a, g, q, task):
    z = x.float() @ a.T
    block = slice(task * RANK, (task + 1) * RANK)
    g += z.T @ z
    q[block] += z[:, block].T @ z


def hook_to_host(x, a, g, q, task):
    z = x.float() @ a.T
    block = slice(task * RANK, (task + 1) * RANK)
    g += (z.T @ z).cpu()
    q[block] += (z[:, block].T @ z).cpu()


def accumulate(hook, inputs, a_cats, statistics):
    for task in range(K):
        for i, (a, (g, q)) in enumerate(zip(a_cats, statistics)):
            xs = inputs[a.shape[1]]
            hook(xs[i % len(xs)], a, g, q, task)


def router(g, q, tokens):
    ridge = 1e-4 * torch.eye(R, device=DEVICE, dtype=torch.float64)
    return torch.linalg.solve(g.double() / tokens + ridge, q.double() / tokens, left=False)


def zeros(device=DEVICE):
    return [(torch.zeros(R, R, device=device), torch.zeros(R, R, device=device)) for _ in LAYERS]


def merge(b_cats, statistics):
    return [b @ router(g, q, K * TOKENS).float() for b, (g, q) in zip(b_cats, statistics)]


def whole(paths, inputs, hashed):
    """From files to factors on the host, in f32. Hashes are taken beside the rest, a thread for each file."""
    with ThreadPoolExecutor(len(paths)) as threads:
        hashes = threads.map(sha256, paths if hashed else [])
        a_cats, b_cats = stacked(paths)
        check_finite(a_cats + b_cats)
        statistics = zeros()
        accumulate(hook, inputs, a_cats, statistics)
        products = merge(b_cats, statistics)
        check_finite(products)
        merged = [(a.cpu(), b.cpu()) for a, b in zip(a_cats, products)]
        return merged, list(hashes)


tf32(False)
inputs = {width: many(TOKENS, width, torch.bfloat16) for width in {i for i, _ in LAYERS}}
with tempfile.TemporaryDirectory() as folder:
    paths = [adapter(Path(folder, f"{task}.safetensors")) for task in range(K)]
    a_cats, b_cats = stacked(paths)
    statistics = zeros()
    measure("ssr", SHAPE, "accumulate", lambda: accumulate(hook, inputs, a_cats, statistics))
    statistics_host = zeros("cpu")
    measure(
        "ssr",
        SHAPE,
        "accumulate, statistics on the host",
        lambda: accumulate(hook_to_host, inputs, a_cats, statistics_host),
        samples=3,
    )
    measure("ssr", SHAPE, "solve and product", lambda: merge(b_cats, statistics))
    del a_cats, b_cats, statistics, statistics_host
    for variant, hashed in (("whole", True), ("whole, without hashes", False)):
        measure("ssr", SHAPE, variant, lambda: whole(paths, inputs, hashed), samples=5)
