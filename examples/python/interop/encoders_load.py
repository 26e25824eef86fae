"""What ComfyUI's own loader makes of text encoders' layers, of the families whose pipelines in diffusers save them.

A file has the denoiser's blocks and each CLIP; it is converted to ComfyUI's and kohya's spelling. ComfyUI must take
every key, and each layer's update must be the adapter's.
"""

import torch
from adapters import apart, configs, flat, layers, randomise, updates
from comfyui_loads import build, comfy, load_lora
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from tally import Tally, first_line, run
from tiny import clip
from transformers import CLIPTextModel, CLIPTextModelWithProjection

ENCODERS = {
    "sd15": ("sd1_clip", "SD1ClipModel", {"text_encoder": "clip_l"}),
    "sdxl": ("sdxl_clip", "SDXLClipModel", {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}),
    "sd3": ("text_encoders.sd3_clip", "SD3ClipModel", {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}),
    "flux1": ("text_encoders.flux", "FluxClipModel", {"text_encoder": "clip_l"}),
}
# As in tiny.py, but with one layer more, since ComfyUI takes what the last but one makes.
TINY = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=3)


def check(case):
    if case.name not in ENCODERS:
        return None
    tally = Tally()
    path, expected = make(case)
    model, encoder = build(case.name), encoders(case.name)
    for spelling in ("comfyui", "kohya"):
        there = case.folder / f"encoders-{spelling}.safetensors"
        try:
            run(case.loraweld, "convert", path, "--format", spelling, "-o", there)
            lora = comfy("lora")
            keys = lora.model_lora_keys_clip(encoder, lora.model_lora_keys_unet(model, {}))
            patches, left = load_lora(there, keys)
            tally.left(spelling, left)
            state, got = encoder.state_dict(), {}
            patcher = comfy("model_patcher").ModelPatcher(encoder, torch.device("cpu"), torch.device("cpu"))
            patcher.add_patches({key: patch for key, patch in patches.items() if key in state})
            for key, ways in patcher.patches.items():
                got[key.removesuffix(".weight")] = flat(lora.calculate_weight(ways, torch.zeros(state[key].shape), key))
            worst, names = apart(got, expected)
            tally.update(spelling, worst)
            tally.left(f"{spelling}: other layers", names)
        except Exception as error:
            tally.fails(spelling, first_line(error))
    return tally


def make(case):
    """A file of the pipeline's class, and the update of each of the encoders' layers by ComfyUI's name."""
    prefix, saved, expected = case.family.component, {}, {}
    state = load_file(case.paths["second"])
    saved[f"{prefix}_lora_layers"] = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
    saved[f"{prefix}_lora_adapter_metadata"] = configs(case.model)["second"].to_dict()
    torch.manual_seed(0)
    for seed, (component, name) in enumerate(ENCODERS[case.name][2].items()):
        model = clip(CLIPTextModel if name == "clip_l" else CLIPTextModelWithProjection)
        names = [layer for layer in layers(model) if "encoder.layers." in layer]
        config = LoraConfig(r=4, lora_alpha=6, target_modules=names, rank_pattern={names[0]: 2})
        inject_adapter_in_model(config, model, "made")
        randomise(model, "made", seed)
        saved[f"{component}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="made")
        saved[f"{component}_lora_adapter_metadata"] = config.to_dict()
        for layer, delta in updates(model, "made").items():
            # transformers 5.6 has left `text_model.` out.
            expected[f"{name}.transformer.text_model.{layer.removeprefix('text_model.')}"] = delta
    path = case.folder / "encoders.safetensors"
    case.way.mixin.save_lora_weights(path.parent, weight_name=path.name, **saved)
    return path, expected


def encoders(name):
    """ComfyUI's text encoders of a family, without memory for their weights."""
    module, kind, names = ENCODERS[name]
    options = {f"{encoder}_model_config": TINY for encoder in names.values()}
    with torch.device("meta"):
        return getattr(comfy(module), kind)(device="meta", dtype=torch.float32, model_options=options)
