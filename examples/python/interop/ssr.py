#!/usr/bin/env python3
"""From a pipeline to an SSR merge: `record.py`, `calibrate` and `merge ssr` against the published formula in float64.

A tiny pipeline is saved to disk and recorded with two LoRAs by `record.py`, as activations and as Gram statistics. The
same inputs are caught by hooks here, and the authors' router is solved from them in float64:

    R = (Q / N) (G / N + 1e-4 I)^-1,    A = [A_1; A_2],    B = [s_1 B_1 | s_2 B_2] R

By either way, loraweld's merge with `--ridge 1e-4 --prior zero --coordinates files` must be that on every layer. For SDXL,
one of the adapters is given to loraweld in kohya's spelling, and to record.py in diffusers'.
"""

import json
import os
import sys

# Convolutions in TF32, CUDA's default, differ by 1e-3 from process to process; record.py runs in one of its own.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

import torch
from common import ROOT, Checks, load, parse_args, pipeline, run, scratch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import ALPHAS, PIPELINES, RANKS, adapters, call, difference

PROMPTS = {"first": "a sks cat", "second": "a abc dog"}
RIDGE = 1e-4
SEED = 42


def main():
    choice = dict(nargs="+", default=["flux", "sdxl"], choices=PIPELINES, help="which models [flux sdxl]")
    args = parse_args(__doc__, pipelines=choice)
    checks = Checks()
    for name in args.pipelines:
        with scratch() as folder:
            check(checks, args, name, folder)
    checks.finish()


def check(checks, args, name, folder):
    base = folder / "base"
    pipe = pipeline(name, "cpu")
    pipe.save_pretrained(base)
    loras = {task: Lora(task, path) for task, path in adapters(pipe, folder).items()}
    layers = sorted(set().union(*(lora.a for lora in loras.values())))
    inputs = {task: caught(args, base, loras[task].path, layers, prompt) for task, prompt in PROMPTS.items()}
    expected = {layer: router_merge(layer, loras, inputs) for layer in layers}
    recorded_with = [loras["first"].path, loras["second"].path]
    files = list(recorded_with)
    if name == "sdxl":
        files[1] = folder / "kohya" / files[1].name
        files[1].parent.mkdir()
        run(args.loraweld, "merge", "linear", loras["second"].path, "--format", "kohya", "-o", files[1])

    recorded, by_shards, by_gram = folder / "recorded", folder / "shards.calibration", folder / "gram.calibration"
    record(args, base, recorded_with, "-o", recorded)
    record(args, base, recorded_with, "--gram", "-o", by_gram)
    folders = [recorded / task for task in PROMPTS]
    run(args.loraweld, "calibrate", *files, "--activations", *folders, "--precision", "f64", "-o", by_shards)
    run(args.loraweld, "calibration", "show", by_gram)

    def same(what, value, limit):
        checks.at_most(f"{name}: {what}", value, limit)

    exact = 0 if args.device == "cpu" else 1e-5  # A GPU may choose other kernels in another process.
    same("recorded activations, against hooks of our own", activations_differ(recorded, inputs), exact)
    stored = sum(len(list(folder.iterdir())) for folder in folders) / sum(map(len, inputs.values()))
    same("tensors stored for each layer that was read", stored, 0.75)
    checks.true(f"{name}: both calibrations have one pool", metadata(by_gram) == metadata(by_shards))
    same("their Gram matrices", grams_differ(load_file(by_gram), load_file(by_shards)), 1e-12)

    for calibration in (by_shards, by_gram):
        merged = calibration.with_suffix(".safetensors")
        options = ["--ridge", RIDGE, "--prior", "zero", "--coordinates", "files", "--precision", "f64"]
        options += ["--format", "peft", "-o", merged]
        run(args.loraweld, "merge", "ssr", *files, "--calibration", calibration, *options)
        ours = Lora(None, merged)
        checks.true(f"{name}: merged by {calibration.stem} has {len(layers)} layers", sorted(ours.a) == layers)
        worst = max(relative(ours.update(layer), expected[layer]) for layer in layers)
        same(f"merge ssr by {calibration.stem}, on the worst layer", worst, 1e-4)
    apart = max(relative(sum(lora.update(layer) for lora in loras.values()), expected[layer]) for layer in layers)
    checks.at_least(f"{name}: the plain sum is something else", apart, 0.1)


class Lora:
    """A file in PEFT's spelling, in float64: A and B of each layer, with its scale in B."""

    def __init__(self, task, path):
        file, scale = load_file(path), ALPHAS[task] / RANKS[task] if task else 1
        names = [key.removesuffix(".lora_A.weight") for key in file if key.endswith(".lora_A.weight")]
        self.path = path
        self.a = {name: file[f"{name}.lora_A.weight"].double() for name in names}
        self.b = {name: file[f"{name}.lora_B.weight"].double() * scale for name in names}

    def update(self, layer):
        return self.b[layer] @ self.a[layer] if layer in self.a else 0


# ---- Recording by record.py, and by hooks of our own


def record(args, base, files, *options):
    tasks = [word for file, prompt in zip(files, PROMPTS.values()) for word in ("--task", file, prompt)]
    settings = call(pipeline_of(base, "cpu"))
    sizes = [f"{key}={settings[key]}" for key in settings if key not in ("num_inference_steps", "output_type")]
    script = [sys.executable, ROOT / "examples/python/record.py", base]
    run(*script, *tasks, "--dtype", "float32", "--device", args.device, "--seed", SEED, "--call", *sizes, *options)


def pipeline_of(base, device):
    pipe = DiffusionPipeline.from_pretrained(base).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def caught(args, base, path, layers, prompt):
    """Every layer's inputs while one adapter is active, in float64: {layer: [tokens, in]}."""
    pipe, seen = pipeline_of(base, args.device), {layer: [] for layer in layers}

    def catch(layer):
        return lambda module, args: seen[layer].append(args[0].flatten(0, -2).double().cpu())

    load(pipe, path, "active")
    for layer in layers:
        component, name = layer.split(".", 1)
        getattr(pipe, component).get_submodule(name).register_forward_pre_hook(catch(layer))
    pipe(prompt, generator=torch.Generator().manual_seed(SEED), **call(pipe))
    return {layer: torch.cat(calls) for layer, calls in seen.items()}


def activations_differ(recorded, inputs):
    """The largest difference on any layer. By `alias`, a layer may be stored under another's name."""
    worst = 0
    for task, expected in inputs.items():
        found = {layer: [] for layer in expected}
        for path in sorted((recorded / task).iterdir()):
            for layer, x in load_file(path).items():
                for reader in [layer, *json.loads(metadata(path)["alias"])]:
                    found[reader].append(x.double())
        worst = max(worst, *(difference(torch.cat(found[layer]), x) for layer, x in expected.items()))
    return worst


# ---- The formula


def router_merge(layer, loras, inputs):
    """The update that SSR-Merge makes of a layer, out × in, in float64."""
    owners = [task for task in loras if layer in loras[task].a]
    if len(owners) == 1:
        return loras[owners[0]].update(layer)
    a = torch.cat([loras[task].a[layer] for task in owners])
    b = torch.cat([loras[task].b[layer] for task in owners], dim=1)
    z = {task: inputs[task][layer] @ a.T for task in inputs}
    n = sum(len(rows) for rows in z.values())
    g = sum(rows.T @ rows for rows in z.values())
    own = zip(owners, torch.arange(len(a)).split([len(loras[task].a[layer]) for task in owners]))
    q = torch.cat([z[task][:, block].T @ z[task] for task, block in own])
    ridge = RIDGE * torch.eye(len(a), dtype=torch.float64)
    return b @ torch.linalg.solve(g / n + ridge, q / n, left=False) @ a


# ---- Files


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def grams_differ(x, y):
    assert x.keys() == y.keys(), f"only one calibration has {sorted(x.keys() ^ y.keys())}"
    return max(relative(x[name], y[name]) for name in y)


def relative(x, y):
    return (torch.linalg.norm(x - y) / torch.linalg.norm(y)).item()


if __name__ == "__main__":
    main()
