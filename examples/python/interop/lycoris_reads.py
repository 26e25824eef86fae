"""What loraweld reads of adapters that LyCORIS makes for a tiny model: LoCon, LoHa, LoKr and DoRA on each of them.

The update of a layer is what LyCORIS's layer makes of impulses, less the layer's own weight. (Its
`get_diff_weight` is no measure: that of LyCORIS 4.1 multiplies LoHa and LoKr by alpha / rank twice.) loraweld converts,
merges and resizes the files that it saves.
"""

import copy
import logging

import torch
from safetensors.torch import save_file

from adapters import apart as updates_apart
from adapters import cut, flat, read, strip
from tally import Tally, first_line, run

# The classes whose layers are changed, and the prefix of the keys: that of kohya's trainers, and SimpleTuner's.
TARGETS = {
    "sd15": (["Transformer2DModel", "Downsample2D", "Upsample2D"], "lora_unet"),
    "flux1": (["FluxTransformerBlock", "FluxSingleTransformerBlock"], "lycoris"),
}
KINDS = {
    "LoCon": dict(algo="locon"),
    "LoCon, rsLoRA": dict(algo="locon", rs_lora=True),
    "LoCon, Tucker": dict(algo="locon", use_tucker=True),
    "LoHa": dict(algo="loha"),
    "LoHa, Tucker": dict(algo="loha", use_tucker=True),
    "LoKr": dict(algo="lokr", factor=4),
    "LoKr, both cut": dict(algo="lokr", factor=8, decompose_both=True),
    "LoKr, whole": dict(algo="lokr", factor=4, full_matrix=True),
    "DoRA": dict(algo="locon", dora_wd=True),
    "DoRA over inputs": dict(algo="locon", dora_wd=True, wd_on_output=False),
    "DoRA on LoHa": dict(algo="loha", dora_wd=True),
    "DoRA on LoKr": dict(algo="lokr", factor=4, dora_wd=True),
}
RANK, ALPHA, LOWER = 4, 2.0, 2
# DoRA's updates have full rank; at this one nothing is cut.
WHOLE = ["--allow-truncate", "4096"]


def check(case):
    if case.name not in TARGETS:
        return None
    tally = Tally()
    base = case.folder / "base.safetensors"
    save_file({key: value.contiguous() for key, value in case.model.state_dict().items()}, base)
    for seed, (kind, options) in enumerate(KINDS.items()):
        try:
            expected, path = make(case, kind, options, seed)
            compare(case, tally, kind, path, expected, WHOLE + ["--base", base] if "dora_wd" in options else [])
        except Exception as error:
            tally.fails(kind, first_line(error))
    return tally


def make(case, kind, options, seed):
    """A file of LyCORIS, and the update of each layer by its flat name."""
    from lycoris import LycorisNetwork, create_lycoris
    from lycoris.config import PRESET
    from lycoris.logging import logger

    logger.setLevel(logging.ERROR)  # It reports each module.
    classes, prefix = TARGETS[case.name]
    PRESET["interop"] = {"target_module": classes, "target_name": []}
    LycorisNetwork.LORA_PREFIX = prefix
    model = copy.deepcopy(case.model)
    network = create_lycoris(model, 1.0, linear_dim=RANK, linear_alpha=ALPHA, preset="interop", **options)
    network.apply_to()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("dora_scale"):
            parameter.data.mul_(1 + 0.1 * noise)
        else:
            parameter.data.copy_(noise * 0.3)
    path = case.folder / f"lycoris-{seed}.safetensors"
    network.save_weights(str(path), torch.float32, {})
    return {
        lora.lora_name.removeprefix(f"{prefix}_"): weight(lora.org_module[0]) - flat(lora.org_module[0].weight)
        for lora in network.loras
    }, path


@torch.no_grad()
def weight(layer):
    """The weight that a layer has by what it makes of impulses: out × in, without its bias."""
    if isinstance(layer, torch.nn.Linear):
        x, zero = torch.eye(layer.in_features), torch.zeros(1, layer.in_features)
        return (layer(x) - layer(zero)).double().T
    (size, _), channels = layer.kernel_size, layer.in_channels
    # The window of the output at (1, 1) begins here; an impulse at each of its places shows one entry of the weight.
    start = layer.stride[0] - layer.padding[0]
    x = torch.zeros(channels, size, size, channels, start + size + 1, start + size + 1)
    for row in range(size):
        for column in range(size):
            x[:, row, column, :, start + row, start + column] = torch.eye(channels)
    x = x.flatten(0, 2)
    return (layer(x) - layer(torch.zeros_like(x[:1])))[:, :, 1, 1].double().T


def compare(case, tally, kind, path, expected, reading):
    """By flat names, since a file of LyCORIS has no others."""
    expected = {name.replace(".", "_"): delta for name, delta in expected.items()}
    commands = {
        "convert": ["convert", path, "--format", "peft"],
        "merge linear": ["merge", "linear", path, "--format", "peft"],
        "resize": ["resize", path, "--rank", str(LOWER), "--format", "peft"],
    }
    for what, command in commands.items():
        out = path.with_name(f"{path.stem}-{what.replace(' ', '-')}.safetensors")
        try:
            run(case.loraweld, *command, *reading, "-o", out)
            held, unread = read(out)
            for prefix in (f"{case.family.component}.", "base_model.model."):
                held = strip(held, prefix)
            held = {name.replace(".", "_"): delta for name, delta in held.items()}
            worst, names = updates_apart(held, expected)
            tally.update(f"{kind}: {what}", excess(held, expected) if what == "resize" else worst)
            tally.left(f"{kind}: {what}, names", [*unread, *names])
        except Exception as error:
            tally.fails(f"{kind}: {what}", first_line(error))


def excess(held, expected):
    """How much more is lost than the best of that rank loses, relative to the update. (Of a Kronecker product, singular
    values are often alike, so that the best itself is not unique.)"""
    best = cut(expected, LOWER)
    return max(
        ((held[name] - delta).norm() - (best[name] - delta).norm()).item() / delta.norm().item()
        for name, delta in expected.items()
        if name in held
    )
