"""What loraweld reads of adapters that PEFT makes and saves itself: LoHa, LoKr and DoRA, with their configuration.

PEFT computes the update of every layer; loraweld converts, merges and resizes the folders that it saves.
"""

import copy

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from adapters import flat, layers
from lycoris_reads import TARGETS, WHOLE, compare
from tally import Tally, first_line

KINDS = {
    "LoRA": (LoraConfig, dict(r=4, lora_alpha=8, use_rslora=True)),
    "LoHa": (LoHaConfig, dict(r=4, alpha=8)),
    "LoHa, whole convolutions": (LoHaConfig, dict(r=4, alpha=8, use_effective_conv2d=True)),
    "LoKr": (LoKrConfig, dict(r=3, alpha=6)),
    "LoKr, both cut": (LoKrConfig, dict(r=2, alpha=6, decompose_both=True)),
    "LoKr, whole": (LoKrConfig, dict(r=40, alpha=10)),
    "DoRA": (LoraConfig, dict(r=4, lora_alpha=8, use_dora=True)),
}


def check(case):
    if case.name not in TARGETS:
        return None
    tally = Tally()
    base = case.folder / "peft-base.safetensors"
    save_file({key: value.contiguous() for key, value in case.model.state_dict().items()}, base)
    for seed, (kind, (config, options)) in enumerate(KINDS.items()):
        try:
            expected, path = make(case, kind, config, options, seed)
            compare(case, tally, kind, path, expected, [*WHOLE, "--base", base] if kind == "DoRA" else [])
        except Exception as error:
            tally.fails(kind, first_line(error))
    return tally


def make(case, kind, config, options, seed):
    """The folder that PEFT saves, with one rank and one alpha of its own, and the update of each layer."""
    names = [name for name in layers(case.model) if "blocks." in name]
    other = dict(rank_pattern={names[1]: 2}, alpha_pattern={names[2]: 3.0})
    made = get_peft_model(copy.deepcopy(case.model), config(target_modules=names, **options, **other))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "hada_", "lokr_")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        elif "magnitude" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    folder = case.folder / f"peft-{seed}"
    made.save_pretrained(str(folder))
    tuned = [
        (name, module) for name, module in made.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    expected = {}
    for name, module in tuned:
        weight = flat(module.get_base_layer().weight).clone()
        module.merge()
        expected[name] = flat(module.get_base_layer().weight) - weight
    return expected, folder
