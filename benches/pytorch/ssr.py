"""SSR of a whole FLUX.1 (benches/ssr.rs) by the authors' formula: f32 statistics layer by layer, the solve in f64.

Per hook call, on the device: Z = X·A_catᵀ, G += ZᵀZ, Q[block k] += Z[:, block k]ᵀ·Z. Per layer:
R = (Q/N)·(G/N + 1e-4·I)⁻¹, B = B_cat·R. Activations are bf16, as a model in bf16 has them, and take turns in a few buffers
of each width, more than caches hold. The published code also moves G and Q to the host at every call, which is timed
apart.
"""

import torch
from common import DEVICE, LAYERS, many, measure, sized, tf32

K, RANK, TOKENS = 4, 32, sized(4608, 64)
R = K * RANK
SHAPE = f"{len(LAYERS)} layers k{K} r{RANK} n{TOKENS}"


def factors(width_in, width_out):
    """The adapters' factors on the host: A_cat, B_cat."""
    a = torch.randn(R, width_in, device=DEVICE).div(width_in**0.5)
    b = torch.randn(width_out, R, device=DEVICE).div(RANK**0.5)
    return a.bfloat16().cpu(), b.bfloat16().cpu()


def on_device(m):
    return m.to(DEVICE).float()


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


def whole(host, inputs):
    """From factors on the host to factors on the host, in bf16."""
    statistics = zeros()
    accumulate(hook, inputs, [on_device(a) for a, _ in host], statistics)
    merged = []
    for (a, b), (g, q) in zip(host, statistics):
        b = on_device(b) @ router(g, q, K * TOKENS).float()
        merged.append((a, b.bfloat16().cpu()))
    return merged


tf32(False)
inputs = {width: many(TOKENS, width, torch.bfloat16) for width in {i for i, _ in LAYERS}}
host = [factors(i, o) for i, o in LAYERS]
a_cats = [on_device(a) for a, _ in host]
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
del statistics_host, a_cats
b_cats = [on_device(b) for _, b in host]
measure("ssr", SHAPE, "solve and product", lambda: merge(b_cats, statistics))
del b_cats
measure("ssr", SHAPE, "whole", lambda: whole(host, inputs), samples=5)
