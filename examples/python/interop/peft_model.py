#!/usr/bin/env python3
"""Merged files load as a PEFT checkpoint, and equal PEFT's own exact merge.

Two adapters of a tiny FLUX transformer and a tiny SDXL UNet, saved by PEFT as folders, are merged by `loraweld merge
linear`. `PeftModel` loads the result, and the denoiser's output must be that of
`add_weighted_adapter(combination_type="cat")`. That adapter, saved by PEFT, is also read by loraweld and written again.
"""

from collections import Counter

from common import Checks, parse_args, pipeline, run, scratch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny import ATTENTION, FLUX, PIPELINES, SDXL, denoise, denoiser, difference, randomise

STRENGTHS = [1.0, -0.7]
MODEL = "adapter_model.safetensors"


def main():
    choice = dict(nargs="+", default=["flux", "sdxl"], choices=PIPELINES, help="which models [flux sdxl]")
    args = parse_args(__doc__, pipelines=choice)
    checks = Checks()
    for name in args.pipelines:
        with scratch() as folder:
            check(checks, args, name, folder)
    checks.finish()


def check(checks, args, name, folder):
    pipe = pipeline(name, args.device)
    base = denoise(pipe)
    kind, model = denoiser(pipe)
    first = LoraConfig(r=4, lora_alpha=8, target_modules=FLUX if kind == "transformer" else SDXL)
    second = LoraConfig(r=6, lora_alpha=3, use_rslora=True, target_modules=ATTENTION)
    peft = get_peft_model(model, first, "first")
    peft.add_adapter("second", second)
    randomise(peft, 1)
    peft.save_pretrained(str(folder))

    peft.add_weighted_adapter(["first", "second"], STRENGTHS, "cat", combination_type="cat")
    peft.set_adapter("cat")
    exact = denoise(pipe)
    peft.save_pretrained(str(folder), selected_adapters=["cat"])
    checks.at_least(f"{name}: what the adapters change", difference(exact, base), 0.1)

    inputs = [f"{folder / adapter}:{strength}" for adapter, strength in zip(["first", "second"], STRENGTHS)]
    merge = [args.loraweld, "merge", "linear"]
    for what, command in {"merged": [*merge, *inputs], "cat read again": [*merge, folder / "cat"]}.items():
        target = folder / what.replace(" ", "-")
        target.mkdir()
        run(*command, "-o", target / MODEL)
        config(target / MODEL).save_pretrained(str(target))
        fresh = pipeline(name, args.device)
        PeftModel.from_pretrained(denoiser(fresh)[1], str(target))
        checks.at_most(f"{name}: {what}, against add_weighted_adapter", difference(denoise(fresh), exact), 1e-5)


def config(path):
    """The configuration of a merged file: alpha is the rank everywhere."""
    with safe_open(path, "pt") as file:
        a = [key for key in file.keys() if key.endswith(".lora_A.weight")]
        ranks = {
            key[len("base_model.model.") : -len(".lora_A.weight")]: file.get_slice(key).get_shape()[0] for key in a
        }
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return LoraConfig(r=usual, lora_alpha=usual, rank_pattern=others, alpha_pattern=others, target_modules=list(ranks))


if __name__ == "__main__":
    main()
