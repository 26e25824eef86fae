"""What benches/fusion.rs adds to: the base model's own products in bf16; and the selection itself, written plainly."""

import torch
from common import DEVICE, many, measure, sized

TOKENS, RANK = sized(4608, 64), 32


def base(width_in, width_out):
    w = torch.randn(width_out, width_in, device=DEVICE, dtype=torch.bfloat16)
    xs = many(TOKENS, width_in, torch.bfloat16)
    measure("base layer", f"{width_in} to {width_out} n{TOKENS}", "bf16", lambda: [x @ w.T for x in xs], calls=len(xs))


def selection(width_in, width_out, dtype):
    """f0 plus the branch of the larger KL(f0 ‖ f0 + u), token by token; and f0 plus both branches."""
    x = many(TOKENS, width_in, dtype)[0]
    f0 = many(TOKENS, width_out, dtype)[0]
    factors = [
        (
            (0.02 * torch.randn(RANK, width_in, device=DEVICE)).to(dtype),
            (0.02 * torch.randn(width_out, RANK, device=DEVICE)).to(dtype),
        )
        for _ in range(2)
    ]

    def select():
        features = [f0 + (x @ a.T) @ b.T for a, b in factors]
        p = torch.log_softmax(f0.float(), dim=-1)
        scores = [(p.exp() * (p - torch.log_softmax(f.float(), dim=-1))).sum(-1) for f in features]
        return torch.where((scores[0] >= scores[1]).unsqueeze(-1), *features)

    # Branches that are not chosen among are one of twice the rank.
    a_cat, b_cat = torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1)

    def add_both():
        return torch.addmm(f0, x @ a_cat.T, b_cat.T)

    shape, name = f"{width_in} to {width_out} n{TOKENS} r{RANK}", {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    measure("selection", shape, f"{name}, kl", select)
    measure("selection", shape, f"{name}, fixed", add_both)


for shape in sized([(3072, 3072), (3072, 12288), (12288, 3072)], [(256, 256)]):
    base(*shape)
    for dtype in (torch.float16, torch.bfloat16):
        selection(*shape, dtype)
