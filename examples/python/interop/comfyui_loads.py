"""What ComfyUI's own loader makes of files in its spelling and in kohya's, for a tiny model of one family.

The model is of ComfyUI's own class, with the widths of the family's tiny model in diffusers; COMFYUI names the
checkout. Its loader must take every key. The updates that its patches come to must be those of the adapter: the rows of
all weights are compared, and where diffusers converts whole models of the family, each layer's update is.
"""

import importlib
import logging
import os
import re
import sys
import types

import diffusers
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file

from adapters import apart, flat, layers, rows_apart
from families import FAMILIES
from tally import Tally, first_line

PREFIX = "diffusion_model."

SD = dict(
    image_size=32, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=[2, 2, 2, 2],
    channel_mult=(1, 2, 4, 4), transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_middle=1,
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], use_linear_in_transformer=False, context_dim=24,
    use_spatial_transformer=True, legacy=False, adm_in_channels=None, num_heads=2, num_head_channels=-1,
)  # fmt: skip
FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=40, context_in_dim=48, hidden_size=32,
    mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 4, 8], theta=10000, patch_size=1,
    qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
WAN = dict(
    image_model="wan2.1", dim=24, ffn_dim=40, freq_dim=32, text_dim=32, in_dim=16, out_dim=16, num_heads=2,
    num_layers=2, patch_size=(1, 2, 2), window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
)  # fmt: skip
HUNYUAN = dict(
    image_model="hunyuan_video", in_channels=4, out_channels=4, vec_in_dim=20, context_in_dim=24, hidden_size=32,
    mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=256, patch_size=[1, 1, 1],
    qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False, use_cond_type_embedding=False, vision_in_dim=None,
    meanflow_sum=False,
)  # fmt: skip
SD3 = dict(
    in_channels=4, patch_size=2, out_channels=4, depth=24, input_size=None, adm_in_channels=40, num_patches=256,
    pos_embed_max_size=16, pos_embed_scaling_factor=None,
    context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=48, out_features=1536)),
)  # fmt: skip
COSMOS = dict(
    max_img_h=32, max_img_w=32, max_frames=4, in_channels=4, out_channels=4, concat_padding_mask=True,
    model_channels=48, num_blocks=2, num_heads=2, mlp_ratio=2.0, crossattn_emb_channels=40, pos_emb_cls="rope3d",
    pos_emb_interpolation="crop", use_adaln_lora=True, adaln_lora_dim=16, extra_per_block_abs_pos_emb=False,
)  # fmt: skip

# The class of comfy.supported_models, and the configuration that its detection would have found.
MODELS = {
    "flux1": ("Flux", FLUX),
    "flux2": (
        "Flux2",
        dict(
            FLUX, image_model="flux2", vec_in_dim=None, mlp_ratio=3.0, axes_dim=[4, 4, 4, 4], theta=2000,
            qkv_bias=False, global_modulation=True, mlp_silu_act=True, ops_bias=False, txt_ids_dims=[3],
        ),
    ),
    "chroma": (
        "Chroma",
        dict(
            {key: value for key, value in FLUX.items() if key != "guidance_embed"}, image_model="chroma",
            vec_in_dim=None, in_dim=16, out_dim=32, hidden_dim=24, n_layers=2,
        ),
    ),
    "longcat_image": ("LongCatImage", dict(FLUX, vec_in_dim=None, guidance_embed=False, txt_ids_dims=[1, 2])),
    "ovis_image": (
        "Flux",
        dict(FLUX, vec_in_dim=None, guidance_embed=False, yak_mlp=True, txt_norm=True, txt_ids_dims=[1, 2]),
    ),
    "sd15": ("SD15", SD),
    "sd21": ("SD20", dict(SD, use_linear_in_transformer=True)),
    "sdxl": (
        "SDXL",
        dict(
            SD, num_res_blocks=[2, 2, 2], channel_mult=(1, 2, 4), transformer_depth=[0, 0, 2, 2, 3, 3],
            transformer_depth_output=[0, 0, 0, 2, 2, 2, 3, 3, 3], transformer_depth_middle=3,
            use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=80, context_dim=2048,
        ),
    ),
    "sd3": ("SD3", SD3),
    "sd35": ("SD3", dict(SD3, qk_norm="rms", x_block_self_attn_layers=[0, 1])),
    "qwen_image": (
        "QwenImage",
        dict(
            image_model="qwen_image", patch_size=2, in_channels=16, out_channels=4, num_layers=2,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(8, 4, 4),
        ),
    ),
    "z_image": (
        "ZImage",
        dict(
            image_model="lumina2", patch_size=2, in_channels=16, dim=32, n_layers=2, n_refiner_layers=2, n_heads=2,
            n_kv_heads=2, multiple_of=1, ffn_dim_multiplier=8 / 3, qk_norm=True, cap_feat_dim=24, axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32], rope_theta=256.0, z_image_modulation=True, time_scale=1000.0,
            pad_tokens_multiple=32,
        ),
    ),
    "lumina2": (
        "Lumina2",
        dict(
            image_model="lumina2", patch_size=2, in_channels=4, dim=48, n_layers=2, n_refiner_layers=2, n_heads=3,
            n_kv_heads=1, multiple_of=2, ffn_dim_multiplier=4.0, qk_norm=True, cap_feat_dim=32, axes_dims=[8, 4, 4],
            axes_lens=[128, 128, 128],
        ),
    ),
    "wan": ("WAN21_T2V", dict(WAN, model_type="t2v")),
    "wan_i2v": ("WAN21_I2V", dict(WAN, model_type="i2v", in_dim=36)),
    "wan_vace": ("WAN21_Vace", dict(WAN, model_type="vace", num_layers=4, vace_layers=2, vace_in_dim=48)),
    "wan_animate": ("WAN22_Animate", dict(WAN, model_type="animate", num_layers=10, in_dim=36, motion_encoder_dim=16)),
    "hunyuan_video": ("HunyuanVideo", HUNYUAN),
    "hunyuan_video_i2v": ("HunyuanVideoI2V", dict(HUNYUAN, in_channels=9, guidance_embed=False)),
    "hunyuan_video15": (
        "HunyuanVideo15",
        dict(
            HUNYUAN, in_channels=9, vec_in_dim=None, guidance_embed=False, byt5=True, depth_single_blocks=0,
            use_cond_type_embedding=True, vision_in_dim=12, meanflow_sum=True,
        ),
    ),
    "hunyuan_image21": (
        "HunyuanImage21",
        dict(HUNYUAN, patch_size=[1, 1], axes_dim=[8, 8], vec_in_dim=None, guidance_embed=False, byt5=True),
    ),
    "ltx": (
        "LTXV",
        dict(
            image_model="ltxv", in_channels=16, cross_attention_dim=32, attention_head_dim=16, num_attention_heads=2,
            caption_channels=24, num_layers=2,
        ),
    ),
    "ltx2": (
        "LTXAV",
        dict(
            image_model="ltxav", in_channels=16, audio_in_channels=16, cross_attention_dim=32,
            audio_cross_attention_dim=16, attention_head_dim=16, audio_attention_head_dim=8, num_attention_heads=2,
            audio_num_attention_heads=2, caption_channels=24, num_layers=2, connector_attention_head_dim=8,
            connector_num_attention_heads=2,
        ),
    ),
    "hidream": (
        "HiDream",
        dict(
            image_model="hidream", patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
            attention_head_dim=16, num_attention_heads=2, caption_channels=[24, 20], text_emb_dim=28,
            num_routed_experts=2, num_activated_experts=2, axes_dims_rope=[8, 4, 4], max_resolution=[32, 32],
            llama_layers=[0, 1, 0, 1],
        ),
    ),
    "auraflow": (
        "AuraFlow",
        dict(
            in_channels=4, out_channels=4, patch_size=2, dim=32, n_layers=4, n_double_layers=2, n_heads=2,
            global_conddim=32, cond_seq_dim=24, max_seq=64,
        ),
    ),
    "pixart": (
        "PixArtSigma",
        dict(
            image_model="pixart_sigma", input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=2,
            num_heads=2, caption_channels=24, micro_condition=False,
        ),
    ),
    "cogvideox": (
        "CogVideoX_T2V",
        dict(
            image_model="cogvideox", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            time_embed_dim=24, text_embed_dim=20, num_layers=2, sample_width=8, sample_height=8, sample_frames=8,
            patch_size=2, max_text_seq_length=8, use_rotary_positional_embeddings=True,
        ),
    ),
    "mochi": (
        "GenmoMochi",
        dict(
            image_model="mochi_preview", depth=3, patch_size=2, num_heads=2, hidden_size_x=32, hidden_size_y=24,
            mlp_ratio_x=384.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=4, qk_norm=True, qkv_bias=False,
            out_bias=True, attn_drop=0.0, patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True,
            attend_to_padding=False, timestep_scale=1000.0, use_t5=True, t5_feat_dim=40, t5_token_length=16,
        ),
    ),
    "cosmos1": (
        "CosmosT2V",
        dict(
            COSMOS, image_model="cosmos", patch_spatial=2, patch_temporal=1, block_config="FA-CA-MLP",
            block_x_format="THWBD", affline_emb_norm=True, extra_per_block_abs_pos_emb=True,
            extra_per_block_abs_pos_emb_type="learnable",
        ),
    ),
    "cosmos2": (
        "CosmosT2IPredict2",
        dict(COSMOS, image_model="cosmos_predict2", in_channels=5, patch_spatial=2, patch_temporal=1),
    ),
    "anima": (
        "Anima",
        dict(COSMOS, image_model="anima", in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1),
    ),
    "krea2": (
        "Krea2",
        dict(
            image_model="krea2", features=64, tdim=24, txtdim=16, heads=4, kvheads=2, layers=2, patch=2, channels=4,
            txtlayers=3, txtheads=2, txtkvheads=1,
        ),
    ),
    "ernie_image": (
        "ErnieImage",
        dict(
            image_model="ernie", hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=40,
            in_channels=16, out_channels=16, patch_size=1, text_in_dim=24, rope_axes_dim=(8, 4, 4),
        ),
    ),
    "ace_step15": (
        "ACEStep15",
        dict(
            audio_model="ace1.5", in_channels=24, hidden_size=32, num_dit_layers=2, num_lyric_layers=1,
            num_timbre_layers=1, num_tokenizer_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
            intermediate_size=48, audio_acoustic_hidden_dim=8, encoder_hidden_size=32, encoder_intermediate_size=48,
            encoder_num_heads=4,
        ),
    ),
    "ideogram4": (
        "Ideogram4",
        dict(
            image_model="ideogram4", in_channels=16, num_layers=2, num_attention_heads=4, attention_head_dim=8,
            intermediate_size=40, adaln_dim=16, llm_features_dim=24,
        ),
    ),
    "kandinsky5": (
        "Kandinsky5",
        dict(
            image_model="kandinsky5", in_visual_dim=4, out_visual_dim=4, in_text_dim=20, in_text_dim2=24, time_dim=16,
            model_dim=32, ff_dim=48, visual_embed_dim=16, num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 6, 6),
        ),
    ),
    "joyimage_edit": (
        "JoyImage",
        dict(
            image_model="joyimage", patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2,
            text_dim=24, num_layers=2, rope_dim_list=[4, 6, 6],
        ),
    ),
}  # fmt: skip

# Widths that ComfyUI's classes have as constants, or by a rule that holds for the released widths alone.
SHAPES = {
    "z_image": {r"t_embedder\.mlp\.0\.weight": (1024, 256), r"t_embedder\.mlp\.2\.weight": (32, 1024)},
    "mochi": {
        r"blocks\.\d\.mlp_x\.w1\.weight": (170, 32),
        r"blocks\.\d\.mlp_x\.w2\.weight": (32, 85),
        r"blocks\.\d\.mlp_y\.w1\.weight": (128, 24),
        r"blocks\.\d\.mlp_y\.w2\.weight": (24, 64),
    },
}

# The same in diffusers' converters of whole models: {released: tiny}.
WIDTHS = {"flux1": {3072: 32}, "chroma": {3072: 32}, "hunyuan_video": {3072: 32}, "hunyuan_video_i2v": {3072: 32},
          "lumina2": {2304: 48, 768: 16}, "mochi": {48: 3}}  # fmt: skip


class Kept(dict):
    """Keeps what is popped: diffusers 0.42 tells Cosmos 1 from 2 by a key of the dictionary that it has emptied."""

    def pop(self, key, *default):
        return self[key] if key in self else default[0]


# ComfyUI's names of HunyuanVideo's weights as the released files have them, which is what diffusers converts.
ORIGINAL = [
    (r"((?:time|guidance)_in|t_embedder)\.in_layer\.", r"\1.mlp.0."),
    (r"((?:time|guidance)_in|t_embedder)\.out_layer\.", r"\1.mlp.2."),
    (r"c_embedder\.in_layer\.", "c_embedder.linear_1."),
    (r"c_embedder\.out_layer\.", "c_embedder.linear_2."),
    (r"(blocks\.\d+\.(?:\w+_)?mlp)\.0\.", r"\1.fc1."),
    (r"(blocks\.\d+\.(?:\w+_)?mlp)\.2\.", r"\1.fc2."),
    (r"(_mod|modulation)\.lin\.", r"\1.linear."),
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"_attn\.norm\.(query|key)_norm\.", lambda match: f"_attn_{match[1][0]}_norm."),
    (r"\.norm\.(query|key)_norm\.", lambda match: f".{match[1][0]}_norm."),
]


class NotLoaded(logging.Handler):
    """The keys that ComfyUI says it has not loaded."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.keys = []

    def emit(self, record):
        text = record.getMessage()
        if text.startswith("lora key not loaded"):
            self.keys.append(text.split(": ", 1)[1])


def comfy(module):
    """A module of ComfyUI, which must not look for a GPU."""
    if os.environ["COMFYUI"] not in sys.path:
        sys.path.insert(0, os.environ["COMFYUI"])
        importlib.import_module("comfy.cli_args").args.cpu = True
    return importlib.import_module(f"comfy.{module}")


def build(name):
    """The model without memory for its weights: a loader needs names and shapes."""
    kind, config = MODELS[name]
    settings = getattr(comfy("supported_models"), kind)(dict(config))
    settings.unet_config.update(config, dtype=torch.float32)
    settings.manual_cast_dtype = None
    # ACE-Step computes with a weight while it is made.
    return settings.get_model({}, "", device="cpu" if name == "ace_step15" else "meta")


def shapes(name, model):
    """{weight of the denoiser: shape}"""
    found = {key.removeprefix(PREFIX): value.shape for key, value in model.state_dict().items()}
    if name in ("sd3", "sd35"):  # The class counts on 64 channels for each of its blocks.
        found = {key: [narrowed(n) for n in shape] for key, shape in found.items()}
    for pattern, shape in SHAPES.get(name, {}).items():
        found.update({key: shape for key in found if re.fullmatch(pattern, key)})
    return found


def narrowed(width):
    return width // 8 if width % 1536 == 0 else width


def load_lora(path, keys):
    """ComfyUI's patches of a file, given its map of keys to weights, and the keys that it has not loaded."""
    heard, logger = NotLoaded(), logging.getLogger()
    others, logger.handlers = logger.handlers, [heard]
    try:
        return comfy("lora").load_lora(comfy("lora_convert").convert_lora(load_file(path)), keys), heard.keys
    finally:
        logger.handlers = others


def patched(model, shape_of, path):
    """What a file's patches add to each weight that they change, and the keys that were not loaded."""
    lora = comfy("lora")
    patches, left = load_lora(path, lora.model_lora_keys_unet(model, {}))
    patcher = comfy("model_patcher").ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    patcher.add_patches(patches)
    return {
        key.removeprefix(PREFIX): lora.calculate_weight(ways, torch.zeros(shape_of[key.removeprefix(PREFIX)]), key)
        for key, ways in patcher.patches.items()
    }, left


def renamed(name, got, shape_of):
    """Updates of ComfyUI's weights as updates of diffusers' layers, by diffusers' own converter of whole models; None
    if it has none and the names are not the same."""
    family = FAMILIES[name]
    state = {key: got[key].clone() if key in got else torch.zeros(shape) for key, shape in shape_of.items()}
    if family.model == "HunyuanVideoTransformer3DModel":
        state = {original(key): value for key, value in state.items()}
    # ComfyUI has renamed these norms since files of FLUX.1 and Chroma were made, which diffusers' converter reads.
    norms = [key for key in state if re.search(r"(y_norm|norms\.\d+)\.weight$", key)]
    state.update({key.removesuffix("weight") + "scale": state[key] for key in norms})
    entry = SINGLE_FILE_LOADABLE_CLASSES.get(family.model)
    if entry is not None:
        convert = with_widths(entry["checkpoint_mapping_fn"], WIDTHS.get(name, {}))
        if family.component == "unet":
            state = {f"model.{PREFIX}{key}": value for key, value in state.items()}
        if name == "cosmos1":
            state = Kept({f"net.{key}": value for key, value in state.items()})
        state = convert(checkpoint=state, config=dict(getattr(diffusers, family.model)(**family.config).config))
    elif not all(f"{layer}.weight" in state for layer in layers(family.build())):
        return None
    return {
        key.removesuffix(".weight"): flat(value)
        for key, value in state.items()
        if key.endswith(".weight") and value.ndim > 1 and value.abs().max() > 0
    }


def original(key):
    for pattern, name in ORIGINAL:
        key = re.sub(pattern, name, key)
    return key


def with_widths(function, widths):
    """The function with other numbers for the constants in it and in the functions that it defines."""

    def replaced(constant):
        if isinstance(constant, types.CodeType):
            return constant.replace(co_consts=tuple(map(replaced, constant.co_consts)))
        return widths.get(constant, constant) if type(constant) is int else constant

    return types.FunctionType(replaced(function.__code__), function.__globals__) if widths else function


def check(case):
    name = case.name
    if name not in MODELS:
        return None
    tally, model = Tally(), build(name)
    shape_of = shapes(name, model)
    for what, reason in case.unwritten.items():
        tally.fails(what, reason)
    for what, (path, expected) in case.converted.items():
        try:
            got, left = patched(model, shape_of, path)
            tally.left(what, left)
            tally.agrees(what, case.said(path, "comfyui"), not left)
            tally.update(f"{what}: rows", rows_apart(got.values(), expected.values()))
            layers_got = renamed(name, got, shape_of)
            if layers_got is not None:
                worst, names = apart(layers_got, expected)
                tally.update(f"{what}: layers", worst)
                tally.left(f"{what}: other layers", names)
        except Exception as error:
            tally.fails(what, first_line(error))
    return tally
