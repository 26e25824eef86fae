"""What diffusers and PEFT make of merged, resized and converted files, for a tiny model of one family.

Two adapters that PEFT makes and diffusers saves are merged, resized and converted by loraweld; the files are loaded
back by the pipeline's own loader. The denoiser's output must be that of both adapters under `set_adapters`, or for
methods without a twin in PEFT that of the update that the file holds by a plain reader; every layer must be loaded.
"""

import copy
import logging
import subprocess
from collections import Counter

import diffusers
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from adapters import (
    STRENGTHS,
    apart,
    configs,
    cut,
    difference,
    give_way,
    randomise,
    read,
    strip,
    total,
    updates,
)  # fmt: skip
from families import FAMILIES, IDS, NOT_IN_COMFYUI
import tally
from tally import LIMIT, Tally, first_line, run

PEFT_FILE = "adapter_model.safetensors"


class Heard(logging.Handler):
    """What diffusers warns of when it loads a file and leaves keys over."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        text = record.getMessage()
        if ("unexpected" in text or "No LoRA keys" in text) and "NoneType" not in text:
            self.lines.append(text)


class Pipeline:
    """Saves and loads as a diffusers pipeline does, by its class's own code, without its other models."""

    def __init__(self, family):
        named = getattr(diffusers, family.pipeline, None) or getattr(diffusers.loaders.lora_pipeline, family.pipeline)
        self.mixin = next(c for c in named.__mro__ if c.__name__.endswith("LoraLoaderMixin"))
        self.saves = "save_lora_weights" in vars(self.mixin)  # Anima's class has none.
        self.prefix = family.component
        self.stub = type(
            "Stub", (self.mixin,), dict(hf_device_map=None, components={}, text_encoder=None, text_encoder_2=None)
        )

    def save(self, model, adapter, config, path):
        state = {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items()}
        if self.saves:
            layers = {f"{self.prefix}_lora_layers": state, f"{self.prefix}_lora_adapter_metadata": config.to_dict()}
            self.mixin.save_lora_weights(path.parent, weight_name=path.name, **layers)
        else:
            self.mixin._save_lora_weights(
                path.parent, {self.prefix: state}, {self.prefix: config.to_dict()}, weight_name=path.name
            )
        return path

    def load(self, model, path):
        pipe = self.stub()
        setattr(pipe, self.prefix, model)
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="loaded")


class Model(Pipeline):
    """Saves and loads by the model itself, where the pipeline has no loader of LoRAs."""

    def __init__(self, family):
        self.mixin, self.saves = diffusers.loaders.lora_base.LoraBaseMixin, False
        self.prefix = family.component

    def load(self, model, path):
        # With a path alone, diffusers would not read the header, where PEFT's settings are.
        model.load_lora_adapter(
            str(path.parent), weight_name=path.name, prefix=self.prefix or None, adapter_name="loaded"
        )


class Bare(Model):
    """By the model itself, without a prefix, as `save_lora_adapter` writes."""

    prefix = ""

    def __init__(self):
        pass

    def save(self, model, adapter, config, path):
        model.save_lora_adapter(path.parent, adapter_name=adapter, weight_name=path.name)
        return path


class Peft:
    """By PEFT, where diffusers' model class loads no LoRAs."""

    prefix = "base_model.model"

    def save(self, model, adapter, config, path):
        folder = path.with_suffix("")
        folder.mkdir()
        state = get_peft_model_state_dict(model, adapter_name=adapter)
        save_file({f"{self.prefix}.{key}": value.contiguous() for key, value in state.items()}, folder / PEFT_FILE)
        config.save_pretrained(str(folder))
        return folder

    def load(self, model, path):
        """Alpha is the rank everywhere, as in files without a configuration. Files from other spellings have the
        prefix `transformer.`, since nothing in those tells PEFT's own."""
        folder = path.with_suffix("")
        folder.mkdir()
        state = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
        state = {key.removeprefix(f"{self.prefix}."): value for key, value in state.items()}
        save_file({f"{self.prefix}.{key}": value for key, value in state.items()}, folder / PEFT_FILE)
        a = {key: value.shape[0] for key, value in state.items() if key.endswith(".lora_A.weight")}
        ranks = {key.removesuffix(".lora_A.weight"): rank for key, rank in a.items()}
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {module: rank for module, rank in ranks.items() if rank != usual}
        config = LoraConfig(
            r=usual, lora_alpha=usual, rank_pattern=others, alpha_pattern=others, target_modules=list(ranks)
        )
        config.save_pretrained(str(folder))
        PeftModel.from_pretrained(model, str(folder), adapter_name="loaded")


def loader(family, model):
    if family.pipeline:
        return Pipeline(family)
    return Model(family) if hasattr(model, "load_lora_adapter") else Peft()


def make(model, family, way, folder, plans):
    """Saves adapters: {name: path}, {name: {layer: update}}, and the model with them."""
    made = copy.deepcopy(model)
    paths, deltas = {}, {}
    for seed, (name, config) in enumerate(plans.items()):
        inject_adapter_in_model(config, made, name)
        if hasattr(made, "_hf_peft_config_loaded"):
            made._hf_peft_config_loaded = True
        randomise(made, name, seed)
        paths[name] = way.save(made, name, config, folder / f"{name}.safetensors")
        deltas[name] = updates(made, name)
    return paths, deltas, made


def both(made, family):
    """What a model makes with both adapters at their strengths."""
    set_weights_and_activate_adapters(made, list(STRENGTHS), list(STRENGTHS.values()))
    return family.forward(made)


def added(model, deltas):
    """The model with updates added to its weights."""
    model = copy.deepcopy(model)
    for layer, delta in deltas.items():
        weight = model.get_submodule(layer).weight
        weight.data.add_(delta.reshape(weight.shape).to(weight.dtype))
    return model


class Case:
    """One family's model and adapters, with the first adapter in other spellings, which all readers are given."""

    def __init__(self, name, loraweld, folder):
        self.name, self.family, self.loraweld, self.folder = name, FAMILIES[name], loraweld, folder
        tally.MODEL = IDS.get(name, name)
        self.model = self.family.build()
        self.way = loader(self.family, self.model)
        self.paths, self.deltas, made = make(self.model, self.family, self.way, folder, configs(self.model))
        self.both = both(made, self.family)
        # Of the first, in which all layers are, and of the second, in which only blocks' are, as in most files.
        self.converted, self.unwritten = {}, {}
        for adapter in STRENGTHS:
            for spelling in ("kohya", "comfyui"):
                what = spelling if adapter == "first" else f"{spelling} of blocks"
                path = folder / f"{what.replace(' ', '-')}.safetensors"
                try:
                    run(loraweld, "convert", self.paths[adapter], "--format", spelling, "-o", path)
                    self.converted[what] = path, self.deltas[adapter]
                except Exception as error:
                    refused = spelling == "comfyui" and name in NOT_IN_COMFYUI and "in comfyui" in str(error)
                    if not refused:
                        self.unwritten[what] = first_line(error)

    def said(self, path, reader):
        """Whether `loraweld check` says that a reader takes every key of a file; None if the program has no `check`."""
        if subprocess.run([self.loraweld, "check", "--help"], capture_output=True).returncode:
            return None
        command = [self.loraweld, "check", path, "--loader", reader, "--model", tally.MODEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode > 1:
            raise RuntimeError(done.stderr)
        return done.returncode == 0


class Loads:
    """What is checked of each file that loraweld writes."""

    def __init__(self, case):
        self.case, self.family, self.model, self.tally = case, case.family, case.model, Tally()

    def check(self, what, way, command, expected, forward=None):
        """Runs `command`, loads what it wrote, and compares; `expected` is the update of each layer."""
        path = self.case.folder / f"{what.replace(' ', '-')}.safetensors"
        try:
            run(self.case.loraweld, *command, "-o", path)
            self.loaded(what, way, path, expected, forward)
        except Exception as error:
            self.tally.fails(what, first_line(error))
        return path

    def loaded(self, what, way, path, expected=None, forward=None):
        held, unread = read(path)
        for prefix in {way.prefix, self.family.component} if isinstance(way, Peft) else {way.prefix}:
            held = strip(held, f"{prefix}.")
        self.tally.left(f"{what}: not understood", unread)
        if expected is not None:
            worst, names = apart(held, expected)
            self.tally.update(f"{what}: in the file", worst)
            self.tally.left(f"{what}: other names in the file", names)
        model, got, heard = self.load(way, path)
        worst, names = apart(got, held if expected is None else expected)
        self.tally.update(f"{what}: loaded", worst)
        self.tally.left(f"{what}: not loaded", names or heard)
        if type(way) is Pipeline:
            self.tally.agrees(what, self.case.said(path, "diffusers"), not (names or heard))
        if forward is None:
            forward = self.family.forward(added(self.model, held if expected is None else expected))
        self.tally.forward(what, difference(self.family.forward(model), forward))

    def load(self, way, path):
        """The model with a file loaded, the update of each layer, and what diffusers warned of."""
        model, heard = copy.deepcopy(self.model), Heard()
        logger = logging.getLogger("diffusers")
        logger.addHandler(heard)
        try:
            way.load(model, path)
        finally:
            logger.removeHandler(heard)
        return model, updates(model, "loaded"), heard.lines

    def agrees(self, what, way, path, expected):
        """Whether `loraweld check` knows what becomes of a file in a spelling that may not be diffusers' own."""
        try:
            _, got, heard = self.load(way, path)
            worst, names = apart(got, expected)
            taken = worst <= LIMIT and not names and not heard
        except Exception:  # Whatever diffusers says of a file that it does not understand.
            taken = False
        self.tally.agrees(what, self.case.said(path, "diffusers"), taken)


def check(case):
    loads, way, paths, deltas = Loads(case), case.way, case.paths, case.deltas
    if difference(case.both, case.family.forward(case.model)) < 0.1:
        loads.tally.fails("the adapters", "they hardly change the output")
    inputs = [f"{path}:{STRENGTHS[adapter]}" for adapter, path in paths.items()]
    first, second = paths.values()
    summed = total(deltas)

    loads.check("merge linear", way, ["merge", "linear", *inputs], summed, case.both)
    loads.check("merge svd", way, ["merge", "svd", *inputs, "--rank", "64"], summed, case.both)
    loads.check(
        "merge np-lora", way, ["merge", "np-lora", "--style", first, "--subject", second], give_way(*deltas.values())
    )
    loads.check("merge ties", way, ["merge", "ties", *inputs], None)
    loads.check("resize", way, ["resize", first, "--rank", "3"], cut(deltas["first"], 3))
    loads.check("convert", way, ["convert", first, "--format", "peft"], deltas["first"])
    for what, (path, expected) in case.converted.items():
        loads.check(f"{what} and back", way, ["convert", path, "--format", "peft"], expected)
        if case.family.pipeline:
            loads.agrees(what, way, path, expected)
    for what, reason in case.unwritten.items():
        loads.tally.fails(f"{what} and back", reason)
    if hasattr(case.model, "save_lora_adapter"):
        bare = case.folder / "bare"
        bare.mkdir()
        paths, _, _ = make(case.model, case.family, Bare(), bare, configs(case.model))
        inputs = [f"{path}:{STRENGTHS[adapter]}" for adapter, path in paths.items()]
        loads.check("save_lora_adapter", Bare(), ["merge", "linear", *inputs], summed, case.both)
    return loads.tally
