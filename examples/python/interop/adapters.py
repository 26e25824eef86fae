"""LoRAs that PEFT makes for a model, and a plain reader of LoRA files, which shares nothing with the libraries."""

import json
import math
import re

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

STRENGTHS = {"first": 1.0, "second": -0.7}


def layers(model):
    """The names of what a LoRA can change, in the model's order."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear or (type(module) is torch.nn.Conv2d and module.groups == 1)
    ]


def configs(model):
    """Two that differ in rank, scale and layers: one of all layers, one of the blocks' with rsLoRA."""
    every = layers(model)
    blocks = [name for name in every if re.search(r"\.\d+\.", name)]
    return {
        "first": LoraConfig(
            r=4, lora_alpha=8, target_modules=every,
            rank_pattern={every[0]: 3, blocks[1]: 6, blocks[-1]: 5}, alpha_pattern={blocks[1]: 3.0, blocks[2]: 5.0},
        ),
        "second": LoraConfig(
            r=6, lora_alpha=3, target_modules=blocks, use_rslora=True,
            rank_pattern={blocks[0]: 2, blocks[3]: 8}, alpha_pattern={blocks[3]: 16.0},
        ),
    }  # fmt: skip


def randomise(model, adapter, seed):
    """Fills both factors of an adapter, so that it changes a layer about half as much as the layer does itself."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            strength = 0.3 / module.scaling[adapter]
            a.data.copy_(torch.randn(a.shape, generator=generator) * a[0].numel() ** -0.5)
            b.data.copy_(torch.randn(b.shape, generator=generator) * b.shape[1] ** -0.5 * strength)


def updates(model, adapter):
    """What an adapter adds to each weight, as PEFT has it: {layer: out × in}."""
    return {
        name: flat(module.get_delta_weight(adapter))
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }


def flat(weight):
    return weight.detach().double().flatten(1)


FACTORS = re.compile(r"^(.*)\.(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha))$")


def read(path):
    """What a LoRA file adds to each weight, and the keys that are not understood: ({layer: out × in}, [key])."""
    with safe_open(path, "pt") as file:
        found, others = {}, []
        for key in file.keys():
            match = FACTORS.match(key)
            if match is None:
                others.append(key)
                continue
            part = {"A": "down", "B": "up"}.get(match[2], match[2]) or "alpha"
            found.setdefault(match[1], {})[part] = file.get_tensor(key).double()
        settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return {layer: update(layer, parts, settings) for layer, parts in found.items()}, others


def update(layer, parts, settings):
    down, up = parts["down"].flatten(1), parts["up"].flatten(1)
    rank = down.shape[0]
    scale = parts["alpha"].item() / rank if "alpha" in parts else scale_of(layer, rank, settings)
    return up @ down * scale


def scale_of(layer, rank, settings):
    """By the settings that PEFT's libraries keep in the header; without any, 1."""
    component = next((c for c in ("transformer.", "unet.") if f"{c}lora_alpha" in settings), "")
    if f"{component}lora_alpha" not in settings:
        return 1.0
    layer = layer.removeprefix(component)
    alpha = settings[f"{component}lora_alpha"]
    for pattern, value in (settings.get(f"{component}alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
            break
    return alpha / (rank**0.5 if settings.get(f"{component}use_rslora") else rank)


def strip(updates, prefix):
    """Without the prefix of each layer that has it."""
    return {layer.removeprefix(prefix): delta for layer, delta in updates.items()}


def total(parts, strengths=STRENGTHS):
    """The sum of adapters at their strengths."""
    return {
        layer: sum(strengths[name] * delta[layer] for name, delta in parts.items() if layer in delta)
        for layer in {layer: None for delta in parts.values() for layer in delta}
    }


def give_way(style, subject, mu=0.5):
    """NP-LoRA: a subject keeps 1 / (1 + mu) of what it has in the directions that the style reads."""
    merged = total({"first": style, "second": subject}, {"first": 1.0, "second": 1.0})
    for layer in style.keys() & subject.keys():
        _, values, directions = torch.linalg.svd(style[layer], full_matrices=False)
        directions = directions[values > values[0] * 1e-5]
        merged[layer] = merged[layer] - mu / (1 + mu) * subject[layer] @ directions.T @ directions
    return merged


def cut(updates, rank):
    """Each update at a lower rank, by its singular values."""
    result = {}
    for layer, delta in updates.items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        result[layer] = u[:, :rank] * s[:rank] @ v[:rank]
    return result


def difference(x, y):
    """The largest difference, relative to the largest value; infinite where shapes differ."""
    if x.shape != y.shape:
        return float("inf")
    scale = y.abs().max().item()
    return (x - y).abs().max().item() / (scale or 1.0)


def apart(got, expected):
    """The worst difference of two sets of updates, and the layers that only one of them has."""
    worst = max((difference(got[layer], expected[layer]) for layer in got.keys() & expected.keys()), default=0.0)
    return worst, sorted(got.keys() ^ expected.keys())


def rows(updates):
    """All rows of all updates that are not zero, in one order: {width: rows × width}."""
    by_width = {}
    for delta in updates:
        delta = delta.double().flatten(1)
        by_width.setdefault(delta.shape[1], []).append(delta[delta.abs().amax(1) > 0])
    ordered = {}
    for width, parts in by_width.items():
        table = torch.cat(parts)
        ordered[width] = table[table.sum(1).argsort()]
    return ordered


def rows_apart(got, expected):
    """The worst difference of rows that are most alike; infinite where one side has more rows."""
    got, expected, none = rows(got), rows(expected), torch.zeros(0)
    return max((difference(*paired(got.get(w, none), expected.get(w, none))) for w in got | expected), default=math.inf)


def paired(got, expected):
    """With the rows of `got` that stand elsewhere, since their sums are nearly those of others, put in order."""
    if got.shape == expected.shape:
        far = (got - expected).abs().amax(1) > 1e-6 * expected.abs().max()
        if 0 < far.sum() <= 4096:
            nearest = torch.cdist(expected[far], got[far]).argmin(1)
            if len(nearest.unique()) == len(nearest):
                got[far] = got[far][nearest]
    return got, expected
