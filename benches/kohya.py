#!/usr/bin/env python3
"""Times `resize`, `merge svd` and `merge linear` beside kohya's own scripts, on two CPU cores.

    SD_SCRIPTS=DIR python3 benches/kohya.py [--loraweld target/release/loraweld] [--runs 3]

DIR is a checkout of kohya-ss/sd-scripts. The work is two LoRAs of 18 layers of SDXL's widths, rank 32, in f16: a
transformer block of 1280 channels (12 layers) and six layers of one of 640, random but of decaying singular values.
`resize` goes from rank 32 to 16, `svd` merges both into rank 32, `linear` into rank 64 (kohya's `--concat`).

Both sides run as processes of their own, in turn, held to two cores, and read and write the same files. What is told of
each is the median of the runs' seconds and its peak of resident memory. Of loraweld that is the whole command. Of kohya it is
only its own function, with reading and writing, once everything is imported: its scripts also import the training code,
which takes seconds and needs packages that merging does not, so small stand-ins take that code's place. Where kohya hashes its
output, they do nothing. So the comparison leans towards kohya. The updates of both results are compared, too: those of
`svd` differ, since kohya's script clamps the largest hundredth of the entries of its factors, and ours does not.

It needs PyTorch, safetensors and tqdm. PyTorch should have a fast LAPACK (its own packages do; a distribution's may come
with the reference one, which takes many times as long).
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import types

CORES = sorted(os.sched_getaffinity(0))[:2]
RANK = 32
BLOCK = "lora_unet_input_blocks_{}_1_transformer_blocks_0_{}"


def layers():
    """Names and widths (in, out) of the 18 layers."""
    block = [(f"attn1_to_{n}", 1280, 1280) for n in ("q", "k", "v", "out_0")]
    block += [("attn2_to_q", 1280, 1280), ("attn2_to_k", 2048, 1280), ("attn2_to_v", 2048, 1280)]
    block += [("attn2_to_out_0", 1280, 1280), ("ff_net_0_proj", 1280, 10240), ("ff_net_2", 5120, 1280)]
    small = [(f"attn1_to_{n}", 640, 640) for n in ("q", "k", "v", "out_0")]
    small += [("ff_net_0_proj", 640, 5120), ("ff_net_2", 2560, 640)]
    outer = [(f"lora_unet_input_blocks_7_1_proj_{n}", 1280, 1280) for n in ("in", "out")]
    named = [(BLOCK.format(7, n), i, o) for n, i, o in block] + [(BLOCK.format(4, n), i, o) for n, i, o in small]
    return outer + named


def make(path, seed):
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, width_in, width_out in layers():
        # Singular values that fall off, as those of trained adapters do.
        values = torch.exp(-torch.arange(RANK) / 8.0)
        down = torch.randn(RANK, width_in, generator=generator) / width_in**0.5
        up = torch.randn(width_out, RANK, generator=generator) / width_out**0.5 * values
        tensors[f"{name}.lora_down.weight"] = down.half()
        tensors[f"{name}.lora_up.weight"] = up.half()
        tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path, {"ss_network_module": "networks.lora", "ss_network_dim": str(RANK)})


def metadata(path):
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get("__metadata__", {})


def stand_ins():
    """What the scripts import and the timed functions hardly use."""

    def module(name, **members):
        made = types.ModuleType(name)
        made.__dict__.update(members)
        sys.modules[name] = made
        return made

    train = module(
        "library.train_util",
        SS_METADATA_KEY_V2="ss_v2",
        SS_METADATA_KEY_BASE_MODEL_VERSION="ss_base_model_version",
        build_minimum_network_metadata=lambda *_: {},
        load_metadata_from_safetensors=metadata,
        precalculate_safetensors_hashes=lambda *_: ("", ""),
    )
    model = module("library.model_util", is_safetensors=lambda path: str(path).endswith(".safetensors"))
    utils = module("library.utils", setup_logging=lambda *_, **__: None)
    parts = {"train_util": train, "model_util": model, "utils": utils}
    parts |= {name: module(f"library.{name}") for name in ("sai_model_spec", "sdxl_model_util")}
    module("library", **parts)
    module("lora")
    module("oft")


def script(folder, name):
    path = pathlib.Path(folder, "networks", f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def kohya(work, folder, inputs, output):
    """Runs in a process of its own, and prints what it took."""
    import torch

    torch.set_num_threads(len(CORES))
    stand_ins()
    if work == "resize":
        module = script(folder, "resize_lora")
        call = lambda: module.resize(
            module.setup_parser().parse_args(
                ["--model", inputs[0], "--save_to", output, "--new_rank", "16", "--save_precision", "fp16"]
            )
        )
    else:
        # The other script takes its blocks' names from this one.
        module = script(folder, "svd_merge_lora")
        if work == "linear":
            module = script(folder, "sdxl_merge_lora")
        more = ["--new_rank", str(RANK)] if work == "svd" else ["--concat"]
        arguments = ["--models", *inputs, "--ratios", "1", "1", "--save_to", output, "--save_precision", "fp16"]
        call = lambda: module.merge(module.setup_parser().parse_args([*arguments, "--no_metadata", *more]))
    logging.disable()
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        call()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": resident("self")}))


def resident(process):
    """The most bytes that a process had resident so far; 0 if it is gone."""
    try:
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def measured(command):
    """Seconds, peak of resident memory in bytes, and what a command printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=out, stderr=err)
        # What the system tells at the end counts this process in, so it is asked for meanwhile.
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        for file in (out, err):
            file.seek(0)
        if process.returncode != 0:
            sys.exit(f"{' '.join(command)}\nfailed:\n{err.read().decode()[-2000:]}")
        return seconds, peak, out.read().decode()


def updates(path):
    from safetensors.torch import load_file

    tensors = load_file(path)
    made = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            up, alpha = tensors[f"{name}.lora_up.weight"], tensors.get(f"{name}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
            made[name] = scale * (up.double() @ down.double())
    return made


def apart(ours, theirs, work):
    """The largest relative difference of an update."""
    ours, theirs = updates(ours), updates(theirs)
    assert ours.keys() == theirs.keys() and len(ours) == 18, f"{work}: other layers"
    # kohya's script leaves alpha at the single rank where it joins ranks.
    if work == "linear":
        theirs = {name: 2 * update for name, update in theirs.items()}
    return max(float((ours[n] - theirs[n]).norm() / ours[n].norm()) for n in ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loraweld", default="target/release/loraweld")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = os.environ.get("SD_SCRIPTS")
    if not folder or not pathlib.Path(folder, "networks", "resize_lora.py").is_file():
        sys.exit("SD_SCRIPTS must name a checkout of kohya-ss/sd-scripts")
    if arguments.inside:
        work, output, *inputs = arguments.inside
        return kohya(work, folder, inputs, output)
    # Processes that are started from here are held to the same cores.
    os.sched_setaffinity(0, CORES)
    with tempfile.TemporaryDirectory() as scratch:
        at = lambda name: str(pathlib.Path(scratch, f"{name}.safetensors"))
        inputs = [at("first"), at("second")]
        for seed, path in enumerate(inputs):
            make(path, seed)
        print("| work | loraweld | kohya | memory, loraweld | memory, kohya | updates apart |")
        print("|---|---|---|---|---|---|")
        for work, words, count in [
            ("resize", ["resize", "--rank", "16"], 1),
            ("svd", ["merge", "svd", "--rank", str(RANK)], 2),
            ("linear", ["merge", "linear"], 2),
        ]:
            ours, theirs = at(f"{work}-ours"), at(f"{work}-theirs")
            command = [arguments.loraweld, *words, *inputs[:count], "--dtype", "f16", "--force", "-o", ours]
            taken = {"loraweld": [], "kohya": []}
            for _ in range(arguments.runs):
                seconds, peak, _ = measured([*command, "--device", "cpu", "-q"])
                taken["loraweld"].append((seconds, peak))
                again = [sys.executable, __file__, "--inside", work, theirs, *inputs[:count]]
                _, _, said = measured(again)
                inner = json.loads(said.splitlines()[-1])
                taken["kohya"].append((inner["seconds"], inner["peak"]))
            median = {side: statistics.median(s for s, _ in runs) for side, runs in taken.items()}
            memory = {side: max(p for _, p in runs) / 2**20 for side, runs in taken.items()}
            print(
                f"| {work} | {median['loraweld']:.2f} s | {median['kohya']:.2f} s | {memory['loraweld']:.0f} MiB "
                f"| {memory['kohya']:.0f} MiB | {apart(ours, theirs, work):.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
