"""Adapters on their way through a graph, and how they get into a MODEL."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import loraweld

from . import files


@dataclass(frozen=True)
class Lora:
    """A file, and what the graph says of it."""

    path: Path
    strength: float = 1.0
    strength_for: tuple[str, ...] = ()
    """Factors on layers, `PATTERN=W` each."""
    blocks: str = ""
    """Factors on blocks."""
    model: str = ""
    """The model that it is for, where the file does not tell."""
    prompt: object = None
    """The CONDITIONING that it is calibrated with."""

    @property
    def name(self):
        """What the wheel calls it."""
        return self.path.stem

    @property
    def source(self):
        return (self.path, self.strength)


def arguments(loras):
    """What is said of adapters and their layers, as arguments of the wheel's functions."""
    special = [lora for lora in loras if lora.strength_for or lora.blocks]
    names = [lora.name for lora in loras]
    if several := next((lora.name for lora in special if names.count(lora.name) > 1), None):
        raise ValueError(f"two files are called `{several}`: strengths of one's layers would be the other's too; rename one")
    models = {lora.model for lora in loras if lora.model}
    if len(models) > 1:
        raise ValueError(f"adapters are said to be for {' and for '.join(sorted(models))}; they must be for one model")
    found = {
        "model": next(iter(models), None),
        "strength_for": [f"{lora.name}:{line}" for lora in special for line in lora.strength_for],
        "blocks": [f"{lora.name}:{lora.blocks}" for lora in special if lora.blocks],
    }
    return {name: values for name, values in found.items() if values}


class Bar:
    """ComfyUI's bar, which also ends a call when its user cancels."""

    def __init__(self):
        self.bar = None

    def __call__(self, progress):
        comfy.model_management.throw_exception_if_processing_interrupted()
        total = max(progress.total, 1)
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(total)
        self.bar.update_absolute(progress.done, total)


def plain(lora):
    """The adapter's file as any loader understands it: a plain LoRA, with its scale and the strengths of its layers in
    the factors."""
    path = files.lora("")
    loraweld.convert(lora.path, "same", output=path, progress=Bar(), **arguments([lora]))
    return path


def apply(path, model, clip, strength=1.0):
    """The MODEL and CLIP with a file loaded by ComfyUI itself, and a warning if it did not take all of it."""
    if model is None and clip is None:
        return None, None, []
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    changed = comfy.sd.load_lora_for_models(model, clip, tensors, strength, strength)
    taken = _patches(changed[0]) - _patches(model) + _patches(changed[1]) - _patches(clip)
    layers = sum(key.endswith(DOWN) for key in tensors)
    if taken == 0:
        what = model.model.__class__.__name__ if model is not None else "the CLIP"
        raise ValueError(f"{path}: ComfyUI's loader finds none of its {layers} layers in {what}; is it for another model?")
    if taken == layers:
        return *changed, []
    missing = "" if clip is not None else "; those of text encoders need a CLIP"
    warning = f"ComfyUI's loader took {taken} of {layers} layers of {path.name}, and its log names the others{missing}"
    logging.warning(warning)
    return *changed, [warning]


DOWN = ("lora_A.weight", "down.weight")
"""How a key ends that a file has once for each of its layers, in any spelling that the wheel writes."""


def _patches(patched):
    """Counts the patches of a MODEL or CLIP."""
    patcher = getattr(patched, "patcher", patched)
    return 0 if patcher is None else sum(map(len, patcher.patches.values()))


def applied(loras, model, clip):
    """The MODEL and CLIP with several adapters, at their strengths."""
    warnings = []
    for lora in loras:
        model, clip, more = apply(plain(lora), model, clip, lora.strength)
        warnings += more
    return model, clip, warnings


def said(result, *more):
    """What a command said, with its warnings."""
    lines = [str(result), *(f"warning: {warning}" for warning in [*result.warnings, *more])]
    return "\n".join(line for line in lines if line)


def with_strengths(loras, blocks):
    """Adapters at the strengths that `loraweld strengths` found for them; where it found none, at their own."""
    is_whole = len(blocks) == 1
    if special := next((lora.name for lora in loras if not is_whole and (lora.strength_for or lora.blocks)), None):
        raise ValueError(f"{special} has strengths of layers already, which those of blocks would replace; take them away")
    found = []
    for at, lora in enumerate(loras):
        strengths = [(block["pattern"], block["strengths"][at]) for block in blocks]
        strengths = [(pattern, strength) for pattern, strength in strengths if strength is not None]
        if is_whole:
            found.append(replace(lora, strength=strengths[0][1] if strengths else lora.strength))
        else:
            lines = tuple(f"{pattern}={strength!r}" for pattern, strength in strengths)
            found.append(replace(lora, strength=1.0, strength_for=lines))
    return found
