"""A tiny model of every family that diffusers has a class for: its class, configuration, inputs and pipeline.

The widths are small, but what names depend on is whole: every kind of block, embedder, refiner and projection is there,
the UNets have all their levels, and blocks come in twos, so that a mix-up of numbers shows.
"""

from dataclasses import dataclass
from typing import Callable

import diffusers
import torch

r = torch.randn


def steps(*values):
    return torch.tensor(values)


@dataclass
class Family:
    """`pipeline`: the class whose loader reads LoRAs; without one, the model's own loader does, or PEFT."""

    model: str
    pipeline: str | None
    config: dict
    inputs: Callable[[], dict]

    @property
    def component(self):
        return "unet" if self.model == "UNet2DConditionModel" else "transformer"

    def build(self):
        """The model with random weights, the same every time, none of them zero as training begins with."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.model)(**self.config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=(parameter[0].numel() or 1) ** -0.5)
            elif parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        return model.requires_grad_(False)

    @torch.no_grad()
    def forward(self, model):
        """What the model makes of fixed inputs, as one vector."""
        torch.manual_seed(1)
        return torch.cat([x.flatten() for x in tensors(model(**self.inputs(), return_dict=False))]).double()


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [x for part in output or () for x in tensors(part)] if isinstance(output, (tuple, list)) else []


FLUX = dict(
    patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=48, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
    freq_dim=32, ffn_dim=40, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
)  # fmt: skip
HUNYUAN_VIDEO = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
    num_refiner_layers=2, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=24,
    pooled_projection_dim=20, rope_axes_dim=(4, 6, 6),
)  # fmt: skip
UNET = dict(
    block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=32, cross_attention_dim=24,
    sample_size=16, attention_head_dim=2,
)  # fmt: skip
# Its double blocks have names that other families have too, but not in this number.
SD3 = dict(
    sample_size=16, patch_size=2, in_channels=4, num_layers=24, attention_head_dim=64, num_attention_heads=3,
    caption_projection_dim=192, joint_attention_dim=48, pooled_projection_dim=40, out_channels=4, pos_embed_max_size=16,
)  # fmt: skip
COSMOS = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=2, mlp_ratio=2.0,
    text_embed_dim=40, adaln_lora_dim=16, max_size=(4, 32, 32), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
    concat_padding_mask=True, extra_pos_embed_type=None,
)  # fmt: skip
COGVIDEOX = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=24, text_embed_dim=20,
    num_layers=2, sample_width=8, sample_height=8, sample_frames=8, patch_size=2, temporal_compression_ratio=4,
    max_text_seq_length=8,
)  # fmt: skip
KANDINSKY5 = dict(
    in_visual_dim=4, in_text_dim=20, in_text_dim2=24, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
    model_dim=32, ff_dim=48, num_text_blocks=2, num_visual_blocks=2, axes_dims=(4, 6, 6),
)  # fmt: skip
QWEN = dict(
    patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, axes_dims_rope=(8, 4, 4),
)  # fmt: skip
PIXART = dict(
    sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16, num_attention_heads=2, in_channels=4,
    cross_attention_dim=32, out_channels=8, caption_channels=24, use_additional_conditions=False,
)  # fmt: skip


def flux(**more):
    return lambda: dict(
        hidden_states=r(1, 16, 16), encoder_hidden_states=r(1, 8, 48), img_ids=r(16, 3), txt_ids=r(8, 3),
        timestep=steps(0.5), **{name: make() for name, make in more.items()},
    )  # fmt: skip


def flux2():
    ids = torch.cartesian_prod(*(torch.arange(n) for n in (1, 4, 4, 1)))
    text = torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, 8)))
    return dict(
        hidden_states=r(1, 16, 16), encoder_hidden_states=r(1, 8, 48), img_ids=ids[None], txt_ids=text[None],
        timestep=steps(0.5), guidance=steps(1.0),
    )  # fmt: skip


def unet(width, **added):
    return lambda: dict(
        sample=r(1, 4, 16, 16), timestep=7, encoder_hidden_states=r(1, 8, width),
        **(dict(added_cond_kwargs={key: make() for key, make in added.items()}) if added else {}),
    )  # fmt: skip


def wan(channels=16, **more):
    return lambda: dict(
        hidden_states=r(1, channels, 2, 8, 8), timestep=steps(300), encoder_hidden_states=r(1, 12, 32),
        **{name: make() for name, make in more.items()},
    )  # fmt: skip


def hunyuan_video(channels=4, **more):
    return lambda: dict(
        hidden_states=r(1, channels, 1, 8, 8), timestep=steps(300), encoder_hidden_states=r(1, 12, 24),
        pooled_projections=r(1, 20), encoder_attention_mask=torch.ones(1, 12), guidance=steps(600.0),
        **{name: make() for name, make in more.items()},
    )  # fmt: skip


def framepack():
    return dict(
        hidden_states=r(1, 4, 3, 4, 4), timestep=steps(300), encoder_hidden_states=r(1, 12, 24),
        pooled_projections=r(1, 20), encoder_attention_mask=torch.ones(1, 12), guidance=steps(600),
        image_embeds=r(1, 12, 16), indices_latents=torch.ones(3), latents_clean=r(1, 4, 2, 4, 4),
        indices_latents_clean=torch.ones(2), latents_history_2x=r(1, 4, 2, 4, 4),
        indices_latents_history_2x=torch.ones(2), latents_history_4x=r(1, 4, 8, 4, 4),
        indices_latents_history_4x=torch.ones(8),
    )  # fmt: skip


def helios():
    return dict(
        hidden_states=r(1, 4, 2, 16, 16), timestep=steps(300), encoder_hidden_states=r(1, 12, 16),
        indices_hidden_states=torch.ones(1, 2), indices_latents_history_short=torch.ones(1, 1),
        indices_latents_history_mid=torch.ones(1, 1), indices_latents_history_long=torch.ones(1, 4),
        latents_history_short=r(1, 4, 1, 16, 16), latents_history_mid=r(1, 4, 1, 16, 16),
        latents_history_long=r(1, 4, 4, 16, 16),
    )  # fmt: skip


def bria_fibo():
    text = r(1, 8, 64)
    return dict(
        hidden_states=r(1, 16, 48), encoder_hidden_states=text, img_ids=r(16, 3), txt_ids=r(8, 3), timestep=steps(1.0),
        text_encoder_layers=[text[..., :32]] * 4,
    )  # fmt: skip


def ideogram4():
    text, image = 4, 4
    positions = torch.zeros(1, text + image, 3, dtype=torch.long)
    positions[0, :text] = torch.arange(text)[:, None]
    positions[0, text:, 1:] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    positions[0, text:] += 65536
    latents, features = torch.zeros(1, 8, 16), torch.zeros(1, 8, 24)
    latents[:, text:], features[:, :text] = r(1, image, 16), r(1, text, 24)
    return dict(
        hidden_states=latents, encoder_hidden_states=features, timestep=steps(0.5), position_ids=positions,
        segment_ids=torch.ones(1, 8, dtype=torch.long), indicator=torch.tensor([[3] * text + [2] * image]),
    )  # fmt: skip


def krea2():
    positions = torch.zeros(8, 3)
    positions[4:, 1:] = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    return dict(
        hidden_states=r(1, 4, 16), encoder_hidden_states=r(1, 4, 3, 16), timestep=steps(0.5), position_ids=positions,
        encoder_attention_mask=torch.ones(1, 4, dtype=torch.bool),
    )  # fmt: skip


def cogview4():
    size = torch.tensor([[64.0, 64.0]])
    return dict(
        hidden_states=r(1, 4, 8, 8), encoder_hidden_states=r(1, 8, 24), timestep=steps(300), original_size=size,
        target_size=size, crop_coords=torch.zeros(1, 2),
    )  # fmt: skip


def kandinsky5():
    return dict(
        hidden_states=r(1, 1, 4, 4, 4), encoder_hidden_states=r(1, 6, 20), timestep=steps(0.5),
        pooled_projections=r(1, 24), visual_rope_pos=[torch.arange(1), torch.arange(2), torch.arange(2)],
        text_rope_pos=torch.arange(6),
    )  # fmt: skip


def cosmos(channels=4, width=40):
    return lambda: dict(
        hidden_states=r(1, channels, 1, 16, 16), timestep=steps(0.5), encoder_hidden_states=r(1, 12, width),
        attention_mask=torch.ones(1, 12), fps=30, padding_mask=torch.zeros(1, 1, 16, 16),
    )  # fmt: skip


FAMILIES = {
    "flux1": Family(
        "FluxTransformer2DModel", "FluxPipeline", dict(**FLUX, pooled_projection_dim=40, guidance_embeds=True),
        flux(pooled_projections=lambda: r(1, 40), guidance=lambda: steps(3.5)),
    ),
    "flux2": Family(
        "Flux2Transformer2DModel", "Flux2Pipeline",
        dict(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=256, axes_dims_rope=(4, 4, 4, 4),
        ),
        flux2,
    ),
    "chroma": Family(
        "ChromaTransformer2DModel", "ChromaPipeline",
        dict(**FLUX, approximator_num_channels=16, approximator_hidden_dim=24, approximator_layers=2), flux(),
    ),
    "sd15": Family("UNet2DConditionModel", "StableDiffusionPipeline", UNET, unet(24)),
    "sd21": Family(
        "UNet2DConditionModel", "StableDiffusionPipeline",
        dict(UNET, attention_head_dim=(1, 2, 4, 4), use_linear_projection=True), unet(24),
    ),
    "sdxl": Family(
        "UNet2DConditionModel", "StableDiffusionXLPipeline",
        dict(
            block_out_channels=(32, 64, 128), layers_per_block=2, norm_num_groups=32, cross_attention_dim=2048,
            sample_size=16, attention_head_dim=(1, 2, 4), use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3), addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        unet(2048, text_embeds=lambda: r(1, 32), time_ids=lambda: r(1, 6)),
    ),
    "sd3": Family(
        "SD3Transformer2DModel", "StableDiffusion3Pipeline", SD3,
        lambda: dict(
            hidden_states=r(1, 4, 16, 16), encoder_hidden_states=r(1, 8, 48), pooled_projections=r(1, 40),
            timestep=steps(300),
        ),
    ),
    "sd35": Family(
        "SD3Transformer2DModel", "StableDiffusion3Pipeline",
        dict(SD3, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
        lambda: dict(
            hidden_states=r(1, 4, 16, 16), encoder_hidden_states=r(1, 8, 48), pooled_projections=r(1, 40),
            timestep=steps(300),
        ),
    ),
    "qwen_image": Family(
        "QwenImageTransformer2DModel", "QwenImagePipeline", QWEN,
        lambda: dict(
            hidden_states=r(1, 16, 16), encoder_hidden_states=r(1, 8, 24),
            encoder_hidden_states_mask=torch.ones(1, 8, dtype=torch.long), timestep=steps(0.5), img_shapes=[(1, 4, 4)],
        ),
    ),
    "z_image": Family(
        "ZImageTransformer2DModel", "ZImagePipeline",
        dict(
            all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=2,
            n_heads=2, n_kv_heads=2, qk_norm=True, cap_feat_dim=24, rope_theta=256.0, t_scale=1000.0,
            axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        ),
        lambda: dict(x=[r(16, 1, 8, 8)], cap_feats=[r(16, 24)], t=steps(0.5)),
    ),
    "lumina2": Family(
        "Lumina2Transformer2DModel", "Lumina2Pipeline",
        dict(
            sample_size=16, patch_size=2, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=2,
            num_attention_heads=3, num_kv_heads=1, multiple_of=2, norm_eps=1e-5, axes_dim_rope=(8, 4, 4),
            axes_lens=(128, 128, 128), cap_feat_dim=32,
        ),
        lambda: dict(
            hidden_states=r(1, 4, 16, 16), encoder_hidden_states=r(1, 16, 32), timestep=steps(0.5),
            encoder_attention_mask=torch.ones(1, 16, dtype=torch.bool),
        ),
    ),
    "wan": Family("WanTransformer3DModel", "WanPipeline", WAN, wan()),
    "wan_i2v": Family(
        "WanTransformer3DModel", "WanImageToVideoPipeline",
        dict(WAN, in_channels=36, image_dim=1280, added_kv_proj_dim=24),
        wan(36, encoder_hidden_states_image=lambda: r(1, 6, 1280)),
    ),
    "wan_vace": Family(
        "WanVACETransformer3DModel", "WanVACEPipeline",
        dict(WAN, num_layers=4, vace_layers=[0, 2], vace_in_channels=48),
        wan(control_hidden_states=lambda: r(1, 48, 2, 8, 8)),
    ),
    "wan_animate": Family(
        "WanAnimateTransformer3DModel", "WanAnimatePipeline",
        dict(
            WAN, num_layers=10, in_channels=36, latent_channels=16, image_dim=1280, added_kv_proj_dim=24,
            motion_encoder_size=16, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_style_dim=8,
            motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=1024, face_encoder_num_heads=2,
            inject_face_latents_blocks=5,
        ),
        lambda: dict(
            hidden_states=r(1, 36, 21, 8, 8), timestep=steps(300), encoder_hidden_states=r(1, 12, 32),
            encoder_hidden_states_image=r(1, 12, 1280), pose_hidden_states=r(1, 16, 20, 8, 8),
            face_pixel_values=r(1, 3, 77, 16, 16),
        ),
    ),
    "skyreels_v2": Family("SkyReelsV2Transformer3DModel", "SkyReelsV2Pipeline", WAN, wan()),
    "chronoedit": Family(
        "ChronoEditTransformer3DModel", "ChronoEditPipeline",
        dict(WAN, in_channels=36, image_dim=1280, added_kv_proj_dim=24, rope_temporal_skip_len=8),
        wan(36, encoder_hidden_states_image=lambda: r(1, 6, 1280)),
    ),
    "hunyuan_video": Family(
        "HunyuanVideoTransformer3DModel", "HunyuanVideoPipeline", HUNYUAN_VIDEO, hunyuan_video(),
    ),
    "hunyuan_video_i2v": Family(
        "HunyuanVideoTransformer3DModel", "HunyuanVideoImageToVideoPipeline",
        dict(HUNYUAN_VIDEO, in_channels=9, guidance_embeds=False, image_condition_type="latent_concat"),
        lambda: {k: v for k, v in hunyuan_video(9)().items() if k != "guidance"},
    ),
    "hunyuan_video15": Family(
        "HunyuanVideo15Transformer3DModel", None,
        dict(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_refiner_layers=2, mlp_ratio=4.0, patch_size=1, patch_size_t=1, text_embed_dim=24, text_embed_2_dim=1472,
            image_embed_dim=12, rope_axes_dim=(4, 6, 6), target_size=16, task_type="i2v",
        ),
        lambda: dict(
            hidden_states=r(1, 9, 1, 8, 8), timestep=steps(300.0), encoder_hidden_states=r(1, 6, 24),
            encoder_hidden_states_2=r(1, 4, 1472), encoder_attention_mask=torch.ones(1, 6),
            encoder_attention_mask_2=torch.ones(1, 4), image_embeds=r(1, 3, 12),
        ),
    ),
    "framepack": Family(
        "HunyuanVideoFramepackTransformer3DModel", "HunyuanVideoFramepackPipeline",
        dict(HUNYUAN_VIDEO, patch_size=2, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True), framepack,
    ),
    "hunyuan_image21": Family(
        "HunyuanImageTransformer2DModel", None,
        dict(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_single_layers=2, num_refiner_layers=2, patch_size=(1, 1), guidance_embeds=False, text_embed_dim=24,
            text_embed_2_dim=1472, rope_axes_dim=(8, 8),
        ),
        lambda: dict(
            hidden_states=r(1, 4, 8, 8), timestep=steps(300.0), encoder_hidden_states=r(1, 6, 24),
            encoder_attention_mask=torch.ones(1, 6), encoder_hidden_states_2=r(1, 4, 1472),
            encoder_attention_mask_2=torch.ones(1, 4),
        ),
    ),
    "ltx": Family(
        "LTXVideoTransformer3DModel", "LTXPipeline",
        dict(
            in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=2, qk_norm="rms_norm_across_heads", caption_channels=24,
        ),
        lambda: dict(
            hidden_states=r(1, 32, 16), encoder_hidden_states=r(1, 16, 24), timestep=steps(300),
            encoder_attention_mask=torch.ones(1, 16, dtype=torch.bool), num_frames=2, height=4, width=4,
        ),
    ),
    "ltx2": Family(
        "LTX2VideoTransformer3DModel", "LTX2Pipeline",
        dict(
            in_channels=16, out_channels=16, patch_size=1, patch_size_t=1, num_attention_heads=2,
            attention_head_dim=16, cross_attention_dim=32, audio_in_channels=16, audio_out_channels=16,
            audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=2,
            qk_norm="rms_norm_across_heads", caption_channels=24, rope_double_precision=False,
        ),
        lambda: dict(
            hidden_states=r(1, 32, 16), audio_hidden_states=r(1, 9, 16), encoder_hidden_states=r(1, 16, 24),
            audio_encoder_hidden_states=r(1, 16, 24), timestep=steps(300.0),
            encoder_attention_mask=torch.ones(1, 16, dtype=torch.bool), num_frames=2, height=4, width=4,
            audio_num_frames=9, fps=25.0,
        ),
    ),
    "hidream": Family(
        "HiDreamImageTransformer2DModel", "HiDreamImagePipeline",
        dict(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, caption_channels=[24, 20], text_emb_dim=28, num_routed_experts=2,
            num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(32, 32), llama_layers=(0, 1, 0, 1),
            force_inference_output=True,
        ),
        lambda: dict(
            hidden_states=r(1, 4, 16, 16), encoder_hidden_states_t5=r(1, 8, 24),
            encoder_hidden_states_llama3=r(2, 1, 8, 20), pooled_embeds=r(1, 28), timesteps=steps(300),
        ),
    ),
    "auraflow": Family(
        "AuraFlowTransformer2DModel", "AuraFlowPipeline",
        dict(
            sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
            attention_head_dim=16, num_attention_heads=2, caption_projection_dim=32, joint_attention_dim=24,
            out_channels=4, pos_embed_max_size=64,
        ),
        lambda: dict(hidden_states=r(1, 4, 16, 16), encoder_hidden_states=r(1, 8, 24), timestep=steps(300)),
    ),
    "pixart": Family(
        "PixArtTransformer2DModel", None, PIXART,
        lambda: dict(
            hidden_states=r(1, 4, 8, 8), timestep=steps(300), encoder_hidden_states=r(1, 8, 24),
            added_cond_kwargs=dict(aspect_ratio=None, resolution=None),
        ),
    ),
    "sana": Family(
        "SanaTransformer2DModel", "SanaPipeline",
        dict(
            patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
            sample_size=8,
        ),
        lambda: dict(hidden_states=r(1, 4, 8, 8), encoder_hidden_states=r(1, 8, 24), timestep=steps(300)),
    ),
    "sana_video": Family(
        "SanaVideoTransformer3DModel", "SanaVideoPipeline",
        dict(
            in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=20,
            mlp_ratio=2.5, sample_size=8, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ),
        lambda: dict(hidden_states=r(1, 16, 2, 8, 8), encoder_hidden_states=r(1, 12, 20), timestep=steps(300)),
    ),
    "cogvideox": Family(
        "CogVideoXTransformer3DModel", "CogVideoXPipeline", COGVIDEOX,
        lambda: dict(hidden_states=r(1, 1, 4, 8, 8), encoder_hidden_states=r(1, 8, 20), timestep=steps(300)),
    ),
    "cogview4": Family(
        "CogView4Transformer2DModel", "CogView4Pipeline",
        dict(
            patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, out_channels=4,
            text_embed_dim=24, time_embed_dim=20, condition_dim=16,
        ),
        cogview4,
    ),
    "glm_image": Family(
        "GlmImageTransformer2DModel", None,
        dict(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            text_embed_dim=24, time_embed_dim=20, condition_dim=16, prior_vq_quantizer_codebook_size=64,
        ),
        lambda: dict(
            hidden_states=r(1, 4, 8, 8), encoder_hidden_states=r(1, 12, 24), prior_token_id=torch.tensor([5]),
            prior_token_drop=torch.zeros(1, dtype=torch.bool), timestep=steps(300),
            target_size=torch.tensor([[8.0, 8.0]]), crop_coords=torch.zeros(1, 2),
        ),
    ),
    "mochi": Family(
        "MochiTransformer3DModel", "MochiPipeline",
        dict(
            patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=3, pooled_projection_dim=24,
            in_channels=4, qk_norm="rms_norm", text_embed_dim=40, time_embed_dim=256, activation_fn="swiglu",
            max_sequence_length=16,
        ),
        lambda: dict(
            hidden_states=r(1, 4, 2, 8, 8), encoder_hidden_states=r(1, 16, 40), timestep=steps(300),
            encoder_attention_mask=torch.ones(1, 16, dtype=torch.bool),
        ),
    ),
    "cosmos1": Family(
        "CosmosTransformer3DModel", None, dict(COSMOS, extra_pos_embed_type="learnable"), cosmos(),
    ),
    "cosmos2": Family(
        "CosmosTransformer3DModel", "Cosmos2_5_PredictBasePipeline", dict(COSMOS, in_channels=5), cosmos(5),
    ),
    "anima": Family(
        "CosmosTransformer3DModel", "AnimaLoraLoaderMixin", dict(COSMOS, in_channels=16, out_channels=16), cosmos(16),
    ),
    "krea2": Family(
        "Krea2Transformer2DModel", "Krea2Pipeline",
        dict(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=256, timestep_embed_dim=24, text_hidden_dim=16, num_text_layers=3,
            text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=128,
            num_layerwise_text_blocks=2, num_refiner_text_blocks=2, axes_dims_rope=(8, 4, 4), rope_theta=1000.0,
        ),
        krea2,
    ),
    "ernie_image": Family(
        "ErnieImageTransformer2DModel", "ErnieImagePipeline",
        dict(
            hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=40, in_channels=16, out_channels=16,
            patch_size=1, text_in_dim=24, rope_theta=256, rope_axes_dim=(8, 4, 4), qk_layernorm=True,
        ),
        lambda: dict(
            hidden_states=r(1, 16, 4, 4), timestep=steps(1.0), text_bth=r(1, 8, 24), text_lens=torch.tensor([8]),
        ),
    ),
    "helios": Family(
        "HeliosTransformer3DModel", "HeliosPipeline",
        dict(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
            rope_dim=(4, 4, 4), has_multi_term_memory_patch=True, guidance_cross_attn=True,
            zero_history_timestep=True, is_amplify_history=False,
        ),
        helios,
    ),
    "ace_step15": Family(
        "AceStepTransformer1DModel", "AceStepPipeline",
        dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, rope_theta=10000.0,
            sliding_window=16,
        ),
        lambda: dict(
            hidden_states=r(1, 8, 8), timestep=steps(0.5), timestep_r=steps(0.4), encoder_hidden_states=r(1, 10, 32),
            context_latents=r(1, 8, 16),
        ),
    ),
    "bria": Family(
        "BriaTransformer2DModel", None, dict(FLUX, pooled_projection_dim=None, axes_dims_rope=[0, 8, 8]),
        flux(),
    ),
    "bria_fibo": Family(
        "BriaFiboTransformer2DModel", "BriaFiboPipeline",
        dict(
            patch_size=1, in_channels=48, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=64, text_encoder_dim=32, pooled_projection_dim=None,
            axes_dims_rope=[0, 8, 8],
        ),
        bria_fibo,
    ),
    "ideogram4": Family(
        "Ideogram4Transformer2DModel", "Ideogram4Pipeline",
        dict(
            in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, intermediate_size=40,
            adaln_dim=16, llm_features_dim=24, rope_theta=10000, mrope_section=(2, 1, 1),
        ),
        ideogram4,
    ),
    "longcat_image": Family(
        "LongCatImageTransformer2DModel", None, dict(**FLUX, pooled_projection_dim=40),
        flux(guidance=lambda: steps(3.5)),
    ),
    "ovis_image": Family(
        "OvisImageTransformer2DModel", None, dict(**FLUX, out_channels=16), flux(),
    ),
    "kandinsky5": Family("Kandinsky5Transformer3DModel", "Kandinsky5T2VPipeline", KANDINSKY5, kandinsky5),
    "joyimage_edit": Family(
        "JoyImageEditTransformer3DModel", None,
        dict(
            patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=24, num_layers=2,
            rope_dim_list=[4, 6, 6], theta=256,
        ),
        lambda: dict(hidden_states=r(1, 16, 1, 4, 4), encoder_hidden_states=r(1, 12, 24), timestep=steps(1.0)),
    ),
    "minimax_music3": Family(
        "MiniMaxMusic3Transformer1DModel", None,
        dict(
            in_channels=8, condition_dim=16, num_layers=2, num_attention_heads=2, attention_head_dim=16,
            ff_inner_dim=40, rotary_dim=4, fourier_embedding_dim=16,
        ),
        lambda: dict(hidden_states=r(1, 8, 24), encoder_hidden_states=r(1, 24, 16), timestep=steps(0.5)),
    ),
    "prx": Family(
        "PRXTransformer2DModel", None,
        dict(in_channels=16, patch_size=2, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
             axes_dim=[8, 8], theta=10000),
        lambda: dict(hidden_states=r(1, 16, 8, 8), encoder_hidden_states=r(1, 8, 24), timestep=steps(0.5)),
    ),
}  # fmt: skip


# The ids of `loraweld --model`, where they are not the names here: tiny models have widths of no real one, and so the
# files of some of them may be for several.
IDS = {
    "sd15": "sd1",
    "sd21": "sd2",
    "sd35": "sd3",
    "wan_i2v": "wan",
    "wan_vace": "wan",
    "wan_animate": "wan",
    "skyreels_v2": "wan",
    "chronoedit": "wan",
    "hunyuan_video_i2v": "hunyuan_video",
    "framepack": "hunyuan_video",
    "ltx": "ltx_video",
    "hidream": "hidream_i1",
    "longcat_image": "longcat",
    "ovis_image": "ovis",
    "joyimage_edit": "joyimage",
}

# Of these, ComfyUI has no class, and so loraweld should refuse to write a file for it.
NOT_IN_COMFYUI = {
    "framepack", "sana", "sana_video", "cogview4", "glm_image", "helios", "bria", "bria_fibo", "prx",
}
