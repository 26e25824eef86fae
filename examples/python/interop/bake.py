"""`loraweld bake` against what diffusers' fuse_lora and ComfyUI's own patching make of the same checkpoint and LoRAs.

A tiny pipeline with random weights is baked with two LoRAs at different strengths, in float32 and in bfloat16, and each
weight is compared with

- diffusers' `fuse_lora`. In float32 both are the same but for the order of sums. In bfloat16 it rounds each update before
  it adds it, and rounds again for each adapter; loraweld rounds once, so that its weights must be nearer to those of
  float64, and within the few roundings of diffusers'.
- with COMFYUI, the checkout, ComfyUI's `calculate_weight` and rounding, which also rounds once: the same to the bit but
  where the order of a sum in float32 decides a tie.
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from common import Checks, load, parse_args, pipeline, run, scratch
from safetensors.torch import load_file
from ssr import Lora
from tiny import ALPHAS, PIPELINES, adapters

STRENGTHS = {"first": 0.8, "second": -0.5}


def main():
    choice = dict(nargs="+", default=["flux", "sdxl"], choices=PIPELINES, help="which models [flux sdxl]")
    args = parse_args(__doc__, pipelines=choice)
    checks = Checks()
    for name in args.pipelines:
        for dtype in (torch.float32, torch.bfloat16):
            with scratch() as folder:
                check(checks, args, name, dtype, folder)
    checks.finish()


def check(checks, args, name, dtype, folder):
    files = adapters(pipeline(name, "cpu"), folder)
    pipe = pipeline(name, "cpu").to(dtype)
    pipe.save_pretrained(folder / "base")
    words = [f"{path}:{STRENGTHS[task]}" for task, path in files.items()]
    run(args.loraweld, "bake", folder / "base", *words, "-o", folder / "baked")
    before, after = weights(folder / "base"), weights(folder / "baked")
    what = f"{name}, {str(dtype).removeprefix('torch.')}"
    checks.true(f"{what}: {len(after)} tensors as before, of the same types", shapes(before) == shapes(after))

    updates = {}
    for task, path in files.items():
        lora = Lora(task, path)
        for layer in lora.a:
            update = STRENGTHS[task] * lora.update(layer)
            updates[layer] = updates.get(layer, 0) + update
    truth = {key: weight.double() for key, weight in before.items()}
    for layer, update in updates.items():
        truth[f"{layer}.weight"] = truth[f"{layer}.weight"] + update.reshape(truth[f"{layer}.weight"].shape)
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    checks.true(f"{what}: {len(changed)} weights changed, those of the LoRAs", changed == {f"{k}.weight" for k in updates})

    for task, path in files.items():
        load(pipe, path, task)
    pipe.set_adapters(list(files), [STRENGTHS[task] for task in files])
    # By default, FLUX's leaves text encoders out.
    pipe.fuse_lora(components=sorted({layer.split(".")[0] for layer in updates}))
    pipe.unload_lora_weights()
    pipe.save_pretrained(folder / "fused")
    fused = weights(folder / "fused")
    off = {key: (fused[key].double() - after[key].double()).norm() / truth[key].norm() for key in changed}
    ours, theirs = (
        max(((w[key].double() - truth[key]).norm() / truth[key].norm()).item() for key in changed) for w in (after, fused)
    )
    if dtype == torch.float32:
        checks.at_most(f"{what}: against fuse_lora", max(off.values()).item(), 1e-6)
    else:
        checks.at_most(f"{what}: against fuse_lora, which rounds three times", max(off.values()).item(), 6e-3)
        checks.true(f"{what}: {ours:.1e} off the sum in float64, fuse_lora {theirs:.1e}", ours <= theirs)
    if os.environ.get("COMFYUI"):
        patched = comfyui(before, files, changed)
        same = sum((patched[key] == after[key]).sum().item() for key in changed)
        count = sum(after[key].numel() for key in changed)
        if dtype == torch.float32:
            off = max(((patched[k] - after[k]).norm() / after[k].norm()).item() for k in changed)
            checks.at_most(f"{what}: against ComfyUI's patching", off, 1e-6)
        else:
            checks.at_least(f"{what}: share of weights the same to the bit as ComfyUI's", same / count, 0.999)


def weights(folder):
    """All tensors of a folder of diffusers, by names such as `transformer.proj_out.weight`."""
    found = {}
    for path in sorted(Path(folder).glob("*/*.safetensors")):
        if path.parent.name.startswith(("transformer", "unet", "text_encoder")):
            found |= {f"{path.parent.name}.{key}": tensor for key, tensor in load_file(path).items()}
    return found


def shapes(tensors):
    return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


def comfyui(before, files, changed):
    """The weights as ComfyUI patches them: in float32, and then rounded by its own function."""
    sys.path.insert(0, os.environ["COMFYUI"])
    if importlib.util.find_spec("comfy") is None:
        raise SystemExit(f"{os.environ['COMFYUI']}: no checkout of ComfyUI")
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.float
    import comfy.lora
    import comfy.weight_adapter

    patches = {}
    for task, path in files.items():
        file = load_file(path)
        for layer in Lora(task, path).a:
            a, b = (file[f"{layer}.lora_{side}.weight"].float() for side in "AB")
            adapter = comfy.weight_adapter.LoRAAdapter(set(), (b, a, ALPHAS[task], None, None, None))
            patches.setdefault(f"{layer}.weight", []).append((STRENGTHS[task], adapter, 1.0, None, None))
    done = {}
    for key in changed:
        weight = before[key].to(torch.float32, copy=True)
        out = comfy.lora.calculate_weight(patches[key], weight, key)
        done[key] = comfy.float.stochastic_rounding(out, before[key].dtype, seed=0)
    return done


if __name__ == "__main__":
    main()
