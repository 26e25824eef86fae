#!/usr/bin/env python3
"""Merged files load into diffusers in every spelling that it reads, and do what its own two adapters do together.

For a tiny FLUX and a tiny Stable Diffusion XL, two LoRAs of different ranks, scales and sets of layers, written by
diffusers, are merged by `loraweld merge linear` (which is exact) and loaded by `load_lora_weights`. The denoiser's
output must be that of `set_adapters` with both. A spelling that diffusers does not read for a family is rewritten to
PEFT's and then loaded, so that it is shown to keep every value. FLUX in kohya's spelling is read at FLUX's own width
alone: `--pipelines flux-wide` (3 GB of memory).
"""

from common import Checks, load, parse_args, pipeline, run, scratch
from tiny import PIPELINES, adapters, denoise, difference

STRENGTHS = [1.0, -0.7]
READ_BY_DIFFUSERS = {
    "flux": {"same", "peft"},
    "flux-wide": {"same", "peft", "kohya"},
    "sdxl": {"same", "peft", "kohya"},
}


def main():
    args = parse_args(
        __doc__,
        pipelines=dict(nargs="+", default=["flux", "sdxl"], choices=PIPELINES, help="which models [flux sdxl]"),
        formats=dict(nargs="+", default=["same", "peft", "kohya", "comfyui"], help="spellings of `--format` to write"),
    )
    checks = Checks()
    for name in args.pipelines:
        with scratch() as folder:
            check(checks, args, name, folder)
    checks.finish()


def check(checks, args, name, folder):
    pipe = pipeline(name, args.device)
    base = denoise(pipe)
    paths = adapters(pipe, folder)
    for adapter, path in paths.items():
        load(pipe, path, adapter)
    pipe.set_adapters(list(paths), STRENGTHS)
    both = denoise(pipe)
    pipe.unload_lora_weights()
    # A GPU may choose other kernels for the same numbers.
    checks.at_most(f"{name}: the base model after unloading", difference(denoise(pipe), base), 1e-5)
    checks.at_least(f"{name}: what the adapters change", difference(both, base), 0.1)

    inputs = [f"{path}:{strength}" for path, strength in zip(paths.values(), STRENGTHS)]
    for spelling in args.formats:
        merged = folder / f"{spelling}.safetensors"
        run(args.loraweld, "merge", "linear", *inputs, "--format", spelling, "-o", merged)
        what = f"{name}: {spelling}"
        if spelling not in READ_BY_DIFFUSERS[name]:
            again, what = folder / f"{spelling}-peft.safetensors", f"{what}, rewritten to peft"
            run(args.loraweld, "merge", "linear", merged, "--format", "peft", "-o", again)
            merged = again
        try:
            load(pipe, merged, "merged")
        except Exception as error:  # Whatever diffusers says of a file that it does not understand.
            checks.fails(what, f"diffusers does not load it: {' '.join(str(error).split())[:120]}")
            continue
        checks.at_most(f"{what}, against set_adapters", difference(denoise(pipe), both), 1e-5)
        pipe.unload_lora_weights()


if __name__ == "__main__":
    main()
