"""What the layers of a MODEL read in the first step of a sampler, with each adapter active in turn."""

from contextlib import contextmanager
from dataclasses import replace

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.utils
import loraweld

from .loras import apply, plain

SAMPLER = "euler"
"""It runs the model once a step; how it would go on makes no difference to what the first step reads."""


def calibrate(model, loras, latent, seed, steps, scheduler, neutral=None):
    """A calibration of adapters on a MODEL, and what is to be said of it."""
    if unprompted := next((lora.name for lora in loras if lora.prompt is None), None):
        raise ValueError(f"{unprompted} has no prompt; connect the conditioning that it is meant for to its Adapter node")
    calibration = loraweld.Calibration([loraweld.open(lora.path, model=lora.model or None) for lora in loras])
    layers = layers_of(model, calibration)
    runs = [(at, lora.prompt, lora) for at, lora in enumerate(loras)]
    if neutral is not None:
        runs.append((None, neutral, None))
    bar, warnings = comfy.utils.ProgressBar(len(runs)), []
    for done, (task, prompt, lora) in enumerate(runs):
        active = model
        if lora is not None:
            # At full strength in all layers, as an adapter is recorded everywhere else.
            active, _, more = apply(plain(replace(lora, strength_for=(), blocks="")), model, None)
            warnings += more
        with interruptible(layers.values()), loraweld.Recorder(layers, calibration, task=task):
            first_step(active, prompt, latent, seed, steps, scheduler)
        bar.update_absolute(done + 1)
    return calibration, [f"calibrated {len(layers)} layers of {', '.join(calibration.tasks)}"] + [
        f"warning: {warning}" for warning in [*warnings, *left(calibration, layers)]
    ]


def layers_of(model, calibration):
    """The layers of a MODEL by names that the calibration knows: several, where ComfyUI has them as one."""
    found, seen = {}, set()
    for name, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        if target in seen or not calibration.takes(name):
            continue
        seen.add(target)
        weight, (axis, *_) = (target[0], target[1]) if isinstance(target, tuple) else (target, (0,))
        if axis != 0:
            raise ValueError(f"{weight}: adapters change some of its columns, which Calibrate cannot record")
        found[name] = comfy.utils.get_attr(model.model, weight.removesuffix(".weight"))
    return found


def left(calibration, layers):
    """Warnings of layers without recordings."""
    if missing := {layer for layer, _ in calibration.missing()}:
        some = ", ".join(sorted(missing)[:3])
        yield (
            f"{len(missing)} of {len(calibration.layers)} layers have no recordings, as those of text encoders never do: "
            f"{some}{' …' if len(missing) > 3 else ''}; SSR-Merge adds them up"
        )


@contextmanager
def interruptible(layers):
    """Ends a step between two layers when ComfyUI's user cancels."""

    def check(*_):
        comfy.model_management.throw_exception_if_processing_interrupted()

    handles = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_step(model, prompt, latent, seed, steps, scheduler):
    """Runs the first step, on noise. Without guidance: the prompt alone is what an adapter is calibrated with."""
    image = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    comfy.sample.sample(
        model, noise, steps, 1.0, SAMPLER, scheduler, prompt, prompt, image, start_step=0, last_step=1,
        noise_mask=latent.get("noise_mask"), disable_pbar=True, seed=seed,
    )  # fmt: skip
