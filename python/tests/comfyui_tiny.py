"""Nodes for tests, as a custom node of ComfyUI: models of its own classes with a few blocks and random weights, and prompts
for them that need no text encoder."""

import functools

import comfy.ldm.flux.model
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import torch

FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=40, context_in_dim=48, hidden_size=32,
    mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 4, 8], theta=10000, patch_size=2,
    qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
SDXL = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[2, 2, 2], channel_mult=(1, 2, 4),
    transformer_depth=[0, 0, 2, 2, 3, 3], transformer_depth_output=[0, 0, 0, 2, 2, 2, 3, 3, 3],
    transformer_depth_middle=3, use_linear_in_transformer=True, use_spatial_transformer=True, legacy=False,
    num_classes="sequential", adm_in_channels=2816, context_dim=64, num_heads=2, num_head_channels=-1,
)  # fmt: skip

if "txt_ids_dims" not in comfy.ldm.flux.model.FluxParams.__annotations__:
    del FLUX["txt_ids_dims"]  # Versions of 2025 have it as a constant.

# The class of comfy.supported_models, its configuration, and the widths of a prompt and of what is pooled of it.
MODELS = {"flux": ("Flux", FLUX, 48, 40), "sdxl": ("SDXL", SDXL, 64, 1280)}


def model(name):
    kind, config, _, _ = MODELS[name]
    settings = getattr(comfy.supported_models, kind)(dict(config))
    settings.unet_config.update(config, dtype=torch.float32)
    settings.manual_cast_dtype = None
    made = settings.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(0)
    for key, weight in made.diffusion_model.state_dict().items():
        if weight.is_floating_point():
            values = torch.randn(weight.shape, generator=generator)
            weight.copy_(values / (weight[0].numel() or 1) ** 0.5 if weight.ndim > 1 else 0.05 * values + ("norm" in key))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(made.eval().requires_grad_(False), cpu, cpu)


def prompt(name, seed):
    _, _, width, pooled = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 9, width, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, pooled, generator=generator), "guidance": 3.5}]]


CLIP_L = dict(
    hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, max_position_embeddings=77,
    vocab_size=49408, hidden_act="quick_gelu", eos_token_id=49407, projection_dim=32,
)  # fmt: skip


def clip():
    """Text encoders without a tokenizer."""

    class Target:
        params = {}
        encoder = functools.partial(comfy.sd1_clip.SDClipModel, textmodel_json_config=dict(CLIP_L))
        clip = functools.partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder)

        def tokenizer(**_):
            return None

    made = comfy.sd.CLIP(Target)
    generator = torch.Generator().manual_seed(0)
    for weight in made.cond_stage_model.state_dict().values():
        if weight.is_floating_point() and weight.ndim:
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return made


def encoded(clip):
    tokens = [49406, 320, 1125, 539, 49407]
    return clip.encode_from_tokens({"l": [[(token, 1.0) for token in tokens + [49407] * (77 - len(tokens))]]})


class TinyModel:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (list(MODELS),)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "tiny"

    def make(self, name):
        return (model(name),)


class TinyPrompt:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (list(MODELS),), "seed": ("INT", {"default": 0})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "tiny"

    def make(self, name, seed):
        return (prompt(name, seed),)


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel, "TinyPrompt": TinyPrompt}
