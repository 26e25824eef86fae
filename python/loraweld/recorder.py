#!/usr/bin/env python3
"""Record what the layers of a model read while each LoRA is active: what SSR-Merge calibrates with.

`Recorder` hooks any model of torch, and fills a `loraweld.Calibration` while it runs. The rest is for pipelines of
diffusers, as a function (`record`) and as a program:

The base model runs once for every prompt of every adapter, with that adapter alone active; one prompt and one step
are enough to begin with. Hooks on the layers that any of the adapters changes see every input and keep either

- the inputs themselves (default): OUT is a folder with a folder of safetensors shards for each adapter, which
  `loraweld calibrate` reads. A tensor that several layers read, as q, k and v do, is written once. At full size this
  takes gigabytes; `--tokens 256` keeps some rows of each.
- or, with `--gram`, each layer's Gram matrix of the inputs seen through all adapters' A, summed in f64 on the device:
  OUT is the calibration file that `loraweld calibrate` would write of all inputs, in a few megabytes.

With `--with MERGED`, the merged adapter is active in place of each task's own: the second round of RegMean++, which sees
what layers read once the others before them are merged. `loraweld calibration add` mixes both rounds.

Either way no more than one layer's input is held at a time. The program needs torch, diffusers, peft, transformers and
safetensors, and not loraweld itself.

  python -m loraweld.recorder black-forest-labs/FLUX.1-dev --gram -o pets.calibration.safetensors \\
      --task cat.safetensors "a photo of sks cat" --task dog.safetensors "a photo of abc dog"
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import struct
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REWRITE = "rewrite it in diffusers' spelling: `loraweld convert FILE --format peft -o NEW`"

EXTRA = "`pip install 'loraweld[recorder]'` installs what recording takes"


def _import_torch():
    """torch takes seconds to import, and most uses of loraweld go without."""
    global torch
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{error}; {EXTRA}") from error


def _import_diffusers():
    global DiffusionPipeline, LoraLayer, safe_open, save_file, logging
    _import_torch()
    try:
        from diffusers import DiffusionPipeline
        from peft.tuners.lora import LoraLayer
        from safetensors import safe_open
        from safetensors.torch import save_file
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError(f"{error}; {EXTRA}") from error


# ---- Any model


class Recorder:
    """Fills a calibration with what the layers of a model read.

    `model` is a `torch.nn.Module`, a pipeline of diffusers, or a dict of modules by the names of a pipeline's components
    (`{"transformer": ..., "text_encoder": ...}`) or of layers, for a model that calls them otherwise. `adapters` are those that are to be merged: paths, open adapters or
    tensors by their keys; or a calibration of them, to which this adds. `task` is the one that is active meanwhile, by its
    name or its place; `None` is for the base model on unrelated prompts, where a merge should change nothing. Activating it
    is up to the caller.

        with loraweld.Recorder(pipe.transformer, ["cat.safetensors", "dog.safetensors"], task="cat") as cat:
            pipe("a photo of sks cat", num_inference_steps=1)
        with loraweld.Recorder(pipe.transformer, cat.calibration, task="dog"):
            pipe("a photo of abc dog", num_inference_steps=1)
        loraweld.merge("ssr", ["cat.safetensors", "dog.safetensors"], calibration=cat.calibration, output="pets.safetensors")

    A layer's input goes into the sums while the layer runs, on `device` (as of `Calibration`), and is let go: no more than
    one is held, however long the model runs.
    """

    def __init__(self, model: Any, adapters: Any, task: str | int | None = None, *, device: str = "auto") -> None:
        from . import _commands

        _import_torch()
        if isinstance(adapters, _commands.Calibration):
            self.calibration = adapters
        else:
            self.calibration = _commands.Calibration([_commands.opened(a) for a in adapters], device=device)
        self.model, self.task = model, task
        self.layers: list[str] = []
        """The names of the layers that are hooked, while they are."""
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        for name, known, layer in self._found():
            self.layers.append(name)
            self._handles.append(layer.register_forward_pre_hook(self._hook(known), with_kwargs=True))
        if not self.layers:
            from ._errors import InvalidError

            tasks, some = ", ".join(self.calibration.tasks), ", ".join(self.calibration.layers[:3])
            raise InvalidError(f"the model has no layer that two or more of {tasks} change, such as {some}")
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _found(self):
        """Names, the names by which the calibration knows them, and layers."""
        for component, model in _components(self.model):
            inside = None
            for path, layer in model.named_modules():
                # What PEFT puts in a layer's place has the layer, and its factors, in it.
                if inside is not None and path.startswith(inside):
                    continue
                names = [".".join(filter(None, (component, path)))]
                if not names[0] or not hasattr(layer, "weight"):
                    continue
                if component.startswith("text_encoder"):  # transformers 5.6 took this out of CLIP's names.
                    names.append(f"{component}.text_model.{path}")
                if known := next((name for name in names if self.calibration.takes(name)), None):
                    inside = f"{path}." if path else ""
                    yield names[0], known, layer

    def _hook(self, name):
        def see(layer, args, kwargs):
            x = args[0] if args else next(x for x in kwargs.values() if isinstance(x, torch.Tensor))
            with torch.no_grad():
                for part in _parts(layer, x.detach()):
                    if part.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                        part = part.float()
                    self.calibration.accumulate(self.task, name, part.cpu().contiguous())

        return see


def _components(model):
    """The modules of a model, with the names of their components where there are several."""
    if isinstance(model, torch.nn.Module):
        return [("", model)]
    parts = model if isinstance(model, dict) else model.components
    return [(name, part) for name, part in parts.items() if isinstance(part, torch.nn.Module)]


def _parts(layer, x):
    """Rows that a layer's A is multiplied with; of a convolution, whose patches take many times its input, an image's."""
    if window(layer) is None:
        yield tokens(layer, x)
    else:
        for image in x:
            yield tokens(layer, image[None])


# ---- The pipeline


def load_adapters(pipe, files):
    """Loads every adapter as `task<i>`, by its place. What diffusers cannot read it may drop without an error: count its layers."""
    for i, file in enumerate(files):
        try:
            pipe.load_lora_weights(str(file.path.parent), weight_name=file.path.name, adapter_name=f"task{i}")
        except (AssertionError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            raise not_loaded(file, " ".join(str(error).split())[:200]) from error
        loaded = [layer_key(name) for name, layer in lora_layers(pipe) if f"task{i}" in layer.lora_A]
        if not loaded or all(map(is_encoder, loaded)) and not all(map(is_encoder, file.modules)):
            raise not_loaded(file, f"it finds no layer of {type(pipe).__name__} in it")
        if len(loaded) < len(file.modules):  # There may be more: fused layers are split.
            count = f"{len(loaded)} of its {len(file.modules)} layers"
            print(f"warning: {file.path}: diffusers loads only {count}", file=sys.stderr)


def not_loaded(file, reason):
    return SystemExit(f"{file.path}: diffusers does not load this adapter: {reason}\n{REWRITE}")


def lora_layers(pipe):
    """Every layer that any adapter changes, by a name such as `transformer.transformer_blocks.0.attn.to_q`."""
    for component, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            for name, layer in model.named_modules():
                if isinstance(layer, LoraLayer) and layer.lora_A:
                    yield f"{component}.{name}", layer


def activate(pipe, task):
    """Makes one adapter the only active one, or none. Layers that it lacks are left with the base model."""
    for _, layer in lora_layers(pipe):
        layer.set_adapter([] if task is None else [f"task{task}"])


@contextmanager
def recording(pipe, see):
    """Calls `see(name, layer, x)` for each input x of each layer."""

    def hook(name):
        return lambda layer, args: see(name, layer, args[0])

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in lora_layers(pipe)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def run_prompts(pipe, task, prompts, sink, active, steps=1, seed=42, **call):
    """Runs the prompts with one adapter active (None: the base model), and shows the sink what its layers read."""
    activate(pipe, active)
    sink.start(task)
    with recording(pipe, sink.see), torch.no_grad():
        for prompt in prompts:
            generator = torch.Generator("cpu").manual_seed(seed)
            pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **call)
    sink.finish()


# ---- Inputs of layers


def window(layer):
    """What a convolution unfolds its input by; None for a linear layer."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if not isinstance(base, torch.nn.Conv2d):
        return None
    return dict(kernel_size=base.kernel_size, dilation=base.dilation, padding=base.padding, stride=base.stride)


def tokens(layer, x):
    """The rows that the layer's A is multiplied with: tokens, or the patches that a convolution reads."""
    if unfold := window(layer):
        x = torch.nn.functional.unfold(x, **unfold).transpose(1, 2)
    return x.reshape(-1, x.shape[-1])


# ---- Sinks


class Shards:
    """Writes activations: a file for each tensor that layers read, in a folder for each task."""

    def __init__(self, folder, names, files, limit=None):
        self.folder, self.names, self.limit = folder, names, limit
        self.spellings = spellings(files)
        self.random = torch.Generator().manual_seed(0)
        for name in [*names, "neutral"]:
            if (self.folder / name).exists():
                raise SystemExit(f"{self.folder / name} exists already; its shards would be counted again")

    def start(self, task):
        self.target = self.folder / ("neutral" if task is None else self.names[task])
        self.target.mkdir(parents=True)
        self.count, self.source, self.readers = 0, None, []

    def see(self, name, layer, x):
        # Layers that read one tensor do so one after the other, unless something changes it in between.
        source = (x, None if x.is_inference() else x._version, window(layer))
        if name in self.readers or not self.readers or self.source[0] is not x or self.source[1:] != source[1:]:
            self.finish()
            self.source, self.rows = source, self.some(tokens(layer, x)).to("cpu", copy=True).contiguous()
        self.readers += [name, *self.spellings.get(plain_key(name), set()) - {layer_key(name)}]

    def some(self, rows):
        """The rows that are kept: all, or a random choice of so many."""
        if self.limit is None or len(rows) <= self.limit:
            return rows
        return rows[torch.randperm(len(rows), generator=self.random)[: self.limit].to(rows.device)]

    def finish(self):
        """Writes the tensor at hand, under its first reader's name; `alias` leads the others to that."""
        if self.readers:
            first, *others = self.readers
            alias = json.dumps({other: first for other in others})
            save_file({first: self.rows}, self.target / f"{self.count:06}.safetensors", {"alias": alias})
            self.count += 1
        self.source, self.readers, self.rows = None, [], None


class Grams:
    """Sums G = (X·Aᵀ)ᵀ(X·Aᵀ) for each layer and task, with A the rows of all adapters, as a calibration file."""

    def __init__(self, names, files):
        self.names, self.files, self.spellings = names, files, spellings(files)
        self.grams, self.counts = {}, {}

    def check(self, layers):
        """Refuses adapters whose layers are not named after the pipeline's, such as fused ones."""
        known = {plain_key(name) for name in layers}
        for file in self.files:
            if strange := [key for key in sorted(file.modules) if plain_key(key) not in known]:
                what = f"this pipeline has no layer `{strange[0]}`, nor {len(strange) - 1} others of it"
                raise SystemExit(f"{file.path}: {what}; record without --gram, or\n{REWRITE}")

    def start(self, task):
        self.task = "neutral" if task is None else task

    def see(self, name, layer, x):
        for key in self.spellings.get(plain_key(name), ()):
            a = [file.a(key) for file in self.files if key in file.modules]
            if len(a) >= min(2, len(self.files)):  # One of several alone is passed through.
                self.add(key, torch.cat(a), tokens(layer, x))

    def add(self, key, a, x):
        at, device = (key, self.task), "cpu" if x.device.type == "mps" else x.device  # Metal has no f64.
        a = a.to(device, torch.float64)
        gram = self.grams.setdefault(at, torch.zeros(len(a), len(a), dtype=a.dtype, device=device))
        for part in x.split(1024):
            z = part.to(device, torch.float64) @ a.T
            gram += z.T @ z
        self.counts[at] = self.counts.get(at, 0) + len(x)

    def finish(self):
        """Takes the task's sums off the device."""
        self.grams = {at: gram.cpu() for at, gram in self.grams.items()}

    def save(self, path):
        """Writes the calibration, whole or not at all."""
        tensors = {f"{key}.gram.{task}": gram for (key, task), gram in self.grams.items()}
        neutral = {key: count for (key, task), count in self.counts.items() if task == "neutral"}
        metadata = {
            "loraweld.kind": "calibration",
            "loraweld.version": "1",
            "loraweld.pool": compact(self.pool()),
            "loraweld.neutral": compact(dict(sorted(neutral.items()))),
        }
        part = path.with_name(f".{path.name}.part")
        save_file(tensors, part, metadata)
        part.replace(path)

    def pool(self):
        """For each task its name, the hash of its adapter's A, and its rows of A and tokens on each shared layer."""
        keys = [key for file in self.files for key in file.modules]
        shared = sorted({key for key in keys if keys.count(key) >= min(2, len(self.files))})
        ends = dict.fromkeys(shared, 0)
        tasks = []
        for task, (name, file) in enumerate(zip(self.names, self.files)):
            layers = {}
            for key in shared:
                start, count = ends[key], self.counts.get((key, task), 0)
                ends[key] += file.rank(key)
                if count or ends[key] > start:
                    layers[key] = {"rows": [start, ends[key]], "tokens": count}
            tasks.append({"name": name, "a_sha256": file.a_sha256(), "layers": layers})
        return tasks


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# ---- Adapter files, as loraweld reads them

PREFIXES = {
    "": r"base_model\.model\.|transformer\.|unet\.|(model\.)?diffusion_model\."
    r"|lora_unet__?|lora_transformer_(?!blocks_)|lora_(?!te[123]?_)|lycoris_",
    "text_encoder": r"text_encoder\.|text_encoders\.clip_l\.transformer\.|lora_te1?_",
    "text_encoder_2": r"text_encoder_2\.|text_encoders\.clip_g\.transformer\.|lora_te2_",
    "text_encoder_3": r"text_encoder_3\.|lora_te3_",
}
A_SUFFIX = re.compile(r"\.(lora_A(\.[^.]+)?\.weight|lora_A|lora_down\.weight|lora(_linear_layer)?\.down\.weight)$")


def layer_key(module):
    """The name by which layers match: without prefixes, dots as underscores; a text encoder's are kept apart.

    transformers 5.6 took `text_model.` out of CLIP's names; loraweld matches by the older ones.
    """
    component = ""
    while found := next(((c, m) for c, p in PREFIXES.items() if (m := re.match(p, module)) and m[0] != module), None):
        component, module = component or found[0], module[found[1].end() :]
    module = module.replace(".", "_")
    if component and module.startswith("encoder_layers_"):
        module = f"text_model_{module}"
    return (component and f"{component}.") + module


def is_encoder(key):
    """Whether a layer is of a text encoder."""
    return "." in key


def plain_key(name):
    """The key without what transformers 5.6 took out of CLIP's names: files of before and after name one layer."""
    return layer_key(name).replace(".text_model_", ".")


def spellings(files):
    """The keys that files have for a layer, by its plain key."""
    found = {}
    for key in (key for file in files for key in file.modules):
        found.setdefault(plain_key(key), set()).add(key)
    return found


class LoraFile:
    """The factors A of an adapter file. Tensors are read when they are asked for."""

    def __init__(self, path):
        self.path, self.file = path, safe_open(path, "pt")
        names = [name for name in self.file.keys() if A_SUFFIX.search(name)]
        self.modules = {layer_key(A_SUFFIX.sub("", name)): name for name in sorted(names)}

    def a(self, key):
        """A [rank, inputs] of a layer; a convolution's is flattened."""
        return self.file.get_tensor(self.modules[key]).float().flatten(1)

    def rank(self, key):
        return self.file.get_slice(self.modules[key]).get_shape()[0] if key in self.modules else 0

    def a_sha256(self):
        """SHA-256 of each layer's key and shape, and then of each A in f32: what ties a calibration to adapters."""
        sha = hashlib.sha256()
        for key in sorted(self.modules):
            rank, *inputs = self.file.get_slice(self.modules[key]).get_shape()
            sha.update(struct.pack("<Q", len(key)) + key.encode())
            sha.update(struct.pack("<QQ", rank, torch.Size(inputs).numel()))
        for key in sorted(self.modules):
            sha.update(self.a(key).contiguous().numpy())
        return sha.hexdigest()


# ---- Command line


def weights_file(path):
    """The file itself, or that in a folder which PEFT saved."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise SystemExit(f"{file}: there is no such file; name a .safetensors file or a folder that PEFT saved")
    return file


def task_name(path):
    return path.resolve().name if path.is_dir() else path.stem


def unique(names):
    """Names of tasks; a second `cat` becomes `cat (2)`."""
    taken = []
    for name in names:
        rest = (f"{name} ({n})" for n in range(2, len(names) + 2))
        taken.append(name if name not in taken else next(other for other in rest if other not in taken))
    return taken


def setting(text):
    """`KEY=VALUE`, the value as JSON if it is that: height=512, negative_prompt=blurry."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} should be KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def default_device():
    return next((d for d in ("cuda", "xpu", "mps") if getattr(torch, d).is_available()), "cpu")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="the base model: a folder, or a name on the Hub")
    add("--task", action="append", nargs="+", required=True, metavar=("LORA", "PROMPT"), help="an adapter, and prompts")
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="a folder for shards, or a file with --gram")
    add("--gram", action="store_true", help="write a calibration instead of activations")
    add("--neutral", nargs="+", default=[], metavar="PROMPT", help="prompts on which a merge should do nothing")
    add("--with", dest="merged", type=Path, metavar="MERGED", help="a merge of the tasks, active in their place")
    add("--steps", type=int, default=1, help="denoising steps [1]")
    add("--seed", type=int, default=42, help="of the noise, the same for all [42]")
    add("--tokens", type=int, metavar="N", help="write at most N random rows of each input [all]; not with --gram")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the base model [bfloat16]")
    add("--device", default=default_device(), help="where the model runs [%(default)s]")
    add("--offload", action="store_true", help="keep only the part of the model on the device that is running")
    example = "more arguments of the pipeline's call: height=512 guidance_scale=1"
    add("--call", nargs="+", default=[], type=setting, metavar="KEY=VALUE", help=example)
    args = parser.parse_args(argv)
    if missing := [task[0] for task in args.task if len(task) < 2]:
        parser.error(f"--task {missing[0]}: give a prompt after the adapter")
    if args.gram and args.tokens:
        parser.error("--tokens is for activations; --gram takes all and stays small")
    if args.gram and args.output.exists():
        parser.error(f"{args.output} exists already")
    return args


def record(pipe, tasks, output, *, gram=False, neutral=(), tokens=None, merged=None, steps=1, seed=42, **call):
    """Records what the layers of a pipeline of diffusers read, and gives the paths that it wrote.

    `tasks` are pairs of an adapter's path and its prompts: `[("cat.safetensors", ["a photo of sks cat"])]`. The other
    arguments are the program's, `merged` its `--with`; `call` goes to the pipeline. The adapters stay loaded, as `task0`, `task1` and so on.
    """
    _import_diffusers()
    if gram and tokens:
        raise ValueError("tokens is for activations; gram takes all and stays small")
    tasks = [(path, [p] if isinstance(p, str) else p) for path, p in tasks]
    recorded = Recording(tasks, Path(output), gram, tokens, merged)
    load_adapters(pipe, recorded.loaded)
    recorded.run(pipe, neutral, lambda _: None, steps=steps, seed=seed, **call)
    return recorded.paths(neutral)


class Recording:
    """Adapters and their prompts, and where what is recorded goes."""

    def __init__(self, tasks, output, gram, tokens, merged=None):
        self.files = [LoraFile(weights_file(Path(path))) for path, _ in tasks]
        # What is loaded, and which of it is active in place of each task's own.
        self.loaded = self.files + ([LoraFile(weights_file(Path(merged)))] if merged else [])
        self.active = len(self.files) if merged else None
        self.names = unique([task_name(Path(path)) for path, _ in tasks])
        self.prompts = [prompts for _, prompts in tasks]
        self.output, self.gram = output, gram
        self.sink = Grams(self.names, self.files) if gram else Shards(output, self.names, self.files, tokens)

    def run(self, pipe, neutral, say, **call):
        """Runs every adapter's prompts on a pipeline that has the adapters."""
        if self.gram:
            self.sink.check(name for name, _ in lora_layers(pipe))
        runs = list(enumerate(self.prompts)) + ([(None, neutral)] if neutral else [])
        for task, prompts in runs:
            active = task if task is None or self.active is None else self.active
            run_prompts(pipe, task, prompts, self.sink, active=active, **call)
            say(f"recorded {'the base model' if task is None else self.names[task]}")
        if self.gram:
            self.sink.save(self.output)

    def paths(self, neutral):
        """What was written."""
        return [self.output] if self.gram else [self.output / n for n in [*self.names, *["neutral"] * bool(neutral)]]


def main(argv=None):
    _import_diffusers()
    args = parse_args(argv)
    tasks = [(path, prompts) for path, *prompts in args.task]
    recorded = Recording(tasks, args.output, args.gram, args.tokens, args.merged)
    logging.set_verbosity_error()  # It calls the adapters that are not in the file at hand missing.
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    load_adapters(pipe, recorded.loaded)
    pipe.enable_model_cpu_offload(device=args.device) if args.offload else pipe.to(args.device)
    recorded.run(pipe, args.neutral, print, steps=args.steps, seed=args.seed, **dict(args.call))
    if args.gram:
        print(f"wrote {args.output}; `loraweld merge ssr ... --calibration` takes it")
    else:
        folders = " ".join(f"'{args.output / name}'" for name in recorded.names)
        neutral = f" --neutral '{args.output / 'neutral'}'" if args.neutral else ""
        print(f"next: loraweld calibrate {' '.join(t[0] for t in args.task)} --activations {folders}{neutral} -o ...")


if __name__ == "__main__":
    main()
