#!/usr/bin/env python3
"""Calibrate over many prompts on many machines with Ray: workers record shards side by side, which add up in a tree.

JOBS is a file of JSON lines, one for each piece of work, and says whose inputs it gives:

  {"task": "cat", "prompts": ["a photo of sks cat", "sks cat asleep"], "seed": 1}
  {"task": "dog", "recorded": "inputs/dog-17.safetensors"}

`prompts` are run through the pipeline that `--model` names, with that adapter alone active; `recorded` is a file or a
folder of inputs that were recorded before, and needs no model. A task is called as its adapter's file is. Statistics are
sums in f64 over tokens, so shards of any size, in any order, add up to what one pass over all of them gives.

A shard that was written is not recorded again: a job that was stopped goes on where it was.

  python calibrate.py jobs.jsonl cat.safetensors dog.safetensors -o pets.calibration.safetensors \\
      --shards /shared/pets --model black-forest-labs/FLUX.1-dev --gpus 1

It needs `pip install ray loraweld`, and `loraweld[recorder]` for prompts. Without a cluster, Ray starts one on this
machine; `--address auto` joins the one that is there. SHARDS is a folder that all machines see.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import loraweld
import ray


def shard_path(folder: Path, adapters: list[str], job: dict, model: str | None) -> Path:
    """Where a job's statistics go: by what they are made of."""
    files = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in adapters]
    text = json.dumps([loraweld.__version__, files, job, model], sort_keys=True)
    return folder / f"{job['task']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.calibration.safetensors"


def write(calibration: loraweld.Calibration, path: Path) -> None:
    """Writes a file that is whole if it is there, also if two workers write it."""
    part = path.with_suffix(f".{os.getpid()}.tmp")
    calibration.save(part, force=True)
    os.replace(part, path)


class Worker:
    """Records jobs, with a model that it loads once."""

    def __init__(self, adapters: list[str], model: str | None):
        self.adapters = [loraweld.open(path) for path in adapters]
        self.files, self.model, self.pipe = adapters, model, None

    def run(self, job: dict, path: str) -> str:
        """Writes the statistics of a job, and gives their path."""
        path = Path(path)
        if path.exists():
            return str(path)
        calibration = loraweld.Calibration(self.adapters)
        if "recorded" in job:
            calibration.accumulate_file(job["task"], job["recorded"])
        else:
            self._record(job, calibration)
        write(calibration, path)
        return str(path)

    def _record(self, job: dict, calibration: loraweld.Calibration) -> None:
        import torch

        pipe = self._pipeline()
        pipe.set_adapters([job["task"]], [1.0])
        model = getattr(pipe, "transformer", None) or pipe.unet
        with loraweld.Recorder(model, calibration, task=job["task"]):
            for prompt in job["prompts"]:
                generator = torch.Generator("cpu").manual_seed(job.get("seed", 42))
                pipe(prompt, num_inference_steps=job.get("steps", 1), generator=generator, output_type="latent")

    def _pipeline(self):
        if self.pipe is None:
            import torch
            from diffusers import DiffusionPipeline

            self.pipe = DiffusionPipeline.from_pretrained(self.model, torch_dtype=torch.bfloat16)
            self.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
            for file, adapter in zip(self.files, self.adapters):
                self.pipe.load_lora_weights(file, adapter_name=adapter.name)
        return self.pipe


# Workers and sums ask for no CPU of their own: on a small machine, sums would wait for workers that never end.
@ray.remote(num_cpus=0)
def add(left: str, right: str, path: str) -> str:
    """Adds two shards into a third."""
    total = loraweld.Calibration.open(left)
    total.add(loraweld.Calibration.open(right))
    write(total, Path(path))
    return path


def tree(shards: list, folder: Path) -> str:
    """Adds shards pair by pair, each pair as soon as both are there; half of them are left after each round."""
    level = 0
    while len(shards) > 1:
        sums = [
            add.remote(left, right, str(folder / f"sum-{level}-{i}.calibration.safetensors"))
            for i, (left, right) in enumerate(zip(shards[::2], shards[1::2]))
        ]
        shards = sums + ([shards[-1]] if len(shards) % 2 else [])
        level += 1
    return ray.get(shards[0])


def calibrate(jobs: list[dict], adapters: list[str], output: Path, folder: Path, model=None, workers=2, gpus=0.0) -> None:
    """Records all jobs and writes the calibration of them together."""
    if not jobs:
        raise SystemExit("there are no jobs")
    names = [loraweld.open(path).name for path in adapters]
    for number, job in enumerate(jobs, 1):
        if job.get("task") not in names:
            raise SystemExit(f"job {number}: its task is {job.get('task')!r}, but the adapters are {', '.join(names)}")
        if "recorded" not in job and not model:
            raise SystemExit(f"job {number}: it has prompts, which take a model: --model")
    folder.mkdir(parents=True, exist_ok=True)
    workers = min(workers, len(jobs))
    worker = ray.remote(num_cpus=0, num_gpus=gpus, scheduling_strategy="SPREAD")(Worker)
    pool = [worker.remote(adapters, model) for _ in range(workers)]
    shards = [
        pool[i % workers].run.remote(job, str(shard_path(folder, adapters, job, model))) for i, job in enumerate(jobs)
    ]
    total = loraweld.Calibration.open(tree(shards, folder))
    total.save(output, force=True)
    for task, layer in total.missing():
        print(f"warning: nothing was recorded of {layer} while {task} was active")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path, metavar="JOBS")
    parser.add_argument("adapters", nargs="+", metavar="LORA")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--shards", type=Path, required=True, help="a folder for shards that all machines see")
    parser.add_argument("--model", help="a model of diffusers, for jobs with prompts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of each worker")
    parser.add_argument("--address", help="a Ray cluster, such as `auto`")
    args = parser.parse_args()
    jobs = [json.loads(line) for line in args.jobs.read_text().splitlines() if line.strip()]
    ray.init(address=args.address, log_to_driver=False)
    folder, output = args.shards.absolute(), args.output.absolute()
    adapters = [os.path.abspath(path) for path in args.adapters]
    calibrate(jobs, adapters, output, folder, args.model, args.workers, args.gpus)
    print(f"wrote {output}, of {len(jobs)} jobs")


if __name__ == "__main__":
    main()
