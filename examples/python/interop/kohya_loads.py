"""What sd-scripts' own network modules make of a file in kohya's spelling, for a tiny model of one family.

The model is of sd-scripts' own class; SD_SCRIPTS names the checkout. The adapter is of the layers that sd-scripts
trains. Its network must take every key, and its layers' updates must be the adapter's, row by row.
"""

import importlib
import os
import re
import sys
from dataclasses import dataclass
from typing import Callable

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from adapters import layers, rows_apart
from diffusers_loads import make
from tally import Tally, first_line, run

FLUX = dict(
    in_channels=16, context_in_dim=48, hidden_size=32, mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2,
    axes_dim=[4, 4, 8], theta=10000, qkv_bias=True, guidance_embed=True,
)  # fmt: skip
UNET = r"attentions\.|resnets\.|samplers\."


@dataclass
class Network:
    """`trained`: a pattern of the names that diffusers gives the layers that sd-scripts trains."""

    module: str
    trained: str
    build: Callable


def sd(**config):
    def build():
        unet = library("original_unet")
        unet.BLOCK_OUT_CHANNELS, unet.TIMESTEP_INPUT_DIM, unet.TIME_EMBED_DIM = (32, 64, 128, 128), 32, 128
        return unet.UNet2DConditionModel(sample_size=16, cross_attention_dim=24, **config)

    return build


def sdxl():
    unet = library("sdxl_original_unet")
    unet.MODEL_CHANNELS, unet.TIME_EMBED_DIM, unet.ADM_IN_CHANNELS = 32, 128, 80
    return unet.SdxlUNet2DConditionModel()


def flux():
    models = library("flux_models")
    return models.Flux(models.FluxParams(**FLUX, vec_in_dim=40))


def chroma():
    models = library("chroma_models")
    approximator = dict(approximator_in_dim=16, approximator_depth=2, approximator_hidden_size=24)
    return models.Chroma(models.ChromaParams(**FLUX, **approximator, _use_compiled=False))


def sd3(**config):
    def build():
        model = library("sd3_models").MMDiT(
            input_size=None, patch_size=2, in_channels=4, depth=24, adm_in_channels=40, pos_embed_max_size=16,
            context_embedder_in_features=48, context_embedder_out_features=1536, num_patches=256, **config,
        )  # fmt: skip
        for module in model.modules():  # The class counts on 64 channels for each of its blocks.
            if isinstance(module, torch.nn.Linear):
                module.in_features, module.out_features = narrowed(module.in_features), narrowed(module.out_features)
        return model

    return build


def lumina():
    return library("lumina_models").NextDiT(
        patch_size=2, in_channels=4, dim=48, n_layers=2, n_refiner_layers=2, n_heads=3, n_kv_heads=1, multiple_of=2,
        ffn_dim_multiplier=1.0, qk_norm=True, cap_feat_dim=32, axes_dims=[8, 4, 4], axes_lens=[128, 128, 128],
    )  # fmt: skip


def anima():
    return library("anima_models").Anima(
        max_img_h=32, max_img_w=32, max_frames=4, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
        model_channels=48, num_blocks=2, num_heads=2, mlp_ratio=2.0, crossattn_emb_channels=40, pos_emb_cls="rope3d",
        use_adaln_lora=True, adaln_lora_dim=16,
    )  # fmt: skip


NETWORKS = {
    "sd15": Network("lora", UNET, sd(attention_head_dim=2)),
    "sd21": Network("lora", UNET, sd(attention_head_dim=2, use_linear_projection=True)),
    "sdxl": Network("lora", UNET, sdxl),
    "flux1": Network("lora_flux", r"transformer_blocks\.", flux),
    "chroma": Network("lora_flux", r"transformer_blocks\.", chroma),
    "sd3": Network("lora_sd3", r"transformer_blocks\.", sd3()),
    "sd35": Network("lora_sd3", r"transformer_blocks\.", sd3(qk_norm="rms", x_block_self_attn_layers=[0, 1])),
    "lumina2": Network("lora_lumina", r"^(layers|noise_refiner|context_refiner)\.", lumina),
    "anima": Network("lora_anima", r"", anima),
}


def narrowed(width):
    return width // 8 if width % 1536 == 0 else width


def scripts(module):
    if os.environ["SD_SCRIPTS"] not in sys.path:
        sys.path.insert(0, os.environ["SD_SCRIPTS"])
    return importlib.import_module(module)


def library(module):
    return scripts(f"library.{module}")


def plan(model, pattern):
    """An adapter of the trained layers, with a rank and an alpha of its own here and there."""
    names = [name for name in layers(model) if re.search(pattern, name)]
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=names, rank_pattern={names[1]: 6, names[-1]: 3}, alpha_pattern={names[2]: 5.0}
    )


def check(case):
    if case.name not in NETWORKS:
        return None
    network, tally = NETWORKS[case.name], Tally()
    folder = case.folder / "kohya"
    folder.mkdir()
    plans = {"trained": plan(case.model, network.trained)}
    paths, deltas, _ = make(case.model, case.family, case.way, folder, plans)
    path = folder / "there.safetensors"
    try:
        run(case.loraweld, "convert", paths["trained"], "--format", "kohya", "-o", path)
    except Exception as error:
        tally.fails("network", first_line(error))
        return tally
    with torch.device("meta"):
        model = network.build()
    encoders = [torch.nn.Module()] * 3  # They have no layers, so that only the denoiser is looked at.
    made, state = scripts(f"networks.{network.module}").create_network_from_weights(
        1.0, str(path), None, encoders, model, weights_sd=load_file(path), for_inference=True
    )
    made.apply_to(encoders, model, False, True)
    left = made.load_state_dict(state, strict=False).unexpected_keys
    tally.left("network", left)
    tally.agrees("network", case.said(path, "kohya"), not left)
    got = [lora.get_weight() for lora in made.unet_loras]
    tally.update("network", rows_apart(got, deltas["trained"].values()))
    return tally
