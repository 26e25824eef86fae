//! FLUX.1 and FLUX.2: native names are of Black Forest Labs, kohya and ComfyUI.

use super::{Fused, Table};

pub(super) const TABLE: Table = Table {
    names: &[
        ("double_blocks.{}.img_attn.qkv", "transformer_blocks.{}.attn.to_qkv"),
        ("double_blocks.{}.txt_attn.qkv", "transformer_blocks.{}.attn.to_added_qkv"),
        ("double_blocks.{}.img_attn.proj", "transformer_blocks.{}.attn.to_out.0"),
        ("double_blocks.{}.txt_attn.proj", "transformer_blocks.{}.attn.to_add_out"),
        ("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.net.0.proj"),
        ("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.net.2"),
        ("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.net.0.proj"),
        ("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.net.2"),
        ("double_blocks.{}.img_mod.lin", "transformer_blocks.{}.norm1.linear"),
        ("double_blocks.{}.txt_mod.lin", "transformer_blocks.{}.norm1_context.linear"),
        ("single_blocks.{}.linear1", "single_transformer_blocks.{}.attn.to_qkv_mlp_proj"),
        ("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
        ("single_blocks.{}.modulation.lin", "single_transformer_blocks.{}.norm.linear"),
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
        ("final_layer.linear", "proj_out"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ],
    // OneTrainer keeps the native names, but splits.
    aliases: &[
        ("double_blocks.{}.img_attn.qkv.0", "transformer_blocks.{}.attn.to_q"),
        ("double_blocks.{}.img_attn.qkv.1", "transformer_blocks.{}.attn.to_k"),
        ("double_blocks.{}.img_attn.qkv.2", "transformer_blocks.{}.attn.to_v"),
        ("double_blocks.{}.txt_attn.qkv.0", "transformer_blocks.{}.attn.add_q_proj"),
        ("double_blocks.{}.txt_attn.qkv.1", "transformer_blocks.{}.attn.add_k_proj"),
        ("double_blocks.{}.txt_attn.qkv.2", "transformer_blocks.{}.attn.add_v_proj"),
        ("single_blocks.{}.linear1.0", "single_transformer_blocks.{}.attn.to_q"),
        ("single_blocks.{}.linear1.1", "single_transformer_blocks.{}.attn.to_k"),
        ("single_blocks.{}.linear1.2", "single_transformer_blocks.{}.attn.to_v"),
        ("single_blocks.{}.linear1.3", "single_transformer_blocks.{}.proj_mlp"),
    ],
    fused: &[IMAGE, TEXT, SINGLE],
    own: &[],
};

pub(super) const IMAGE: Fused = Fused {
    whole: "transformer_blocks.{}.attn.to_qkv",
    parts: &[
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
    ],
    mlp: 0,
};

pub(super) const TEXT: Fused = Fused {
    whole: "transformer_blocks.{}.attn.to_added_qkv",
    parts: &[
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
    ],
    mlp: 0,
};

pub(super) const SINGLE: Fused = Fused {
    whole: "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
    parts: &[
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "single_transformer_blocks.{}.proj_mlp",
    ],
    mlp: 4,
};

/// Modules of XLabs' attention processors.
pub(super) const XLABS: &[(&str, &str)] = &[
    ("double_blocks.{}.processor.qkv_lora1", "transformer_blocks.{}.attn.to_qkv"),
    ("double_blocks.{}.processor.qkv_lora2", "transformer_blocks.{}.attn.to_added_qkv"),
    ("double_blocks.{}.processor.proj_lora1", "transformer_blocks.{}.attn.to_out.0"),
    ("double_blocks.{}.processor.proj_lora2", "transformer_blocks.{}.attn.to_add_out"),
    ("single_blocks.{}.processor.qkv_lora", "single_transformer_blocks.{}.attn.to_qkv"),
    ("single_blocks.{}.processor.proj_lora", "single_transformer_blocks.{}.proj_out"),
];

/// FLUX.2 has the native names of FLUX.1 for its blocks, shares modulations between them, and does not split the first
/// layer of single blocks in diffusers either.
pub(super) const TABLE_2: Table = Table {
    names: &[
        ("double_blocks.{}.img_attn.qkv", "transformer_blocks.{}.attn.to_qkv"),
        ("double_blocks.{}.txt_attn.qkv", "transformer_blocks.{}.attn.to_added_qkv"),
        ("double_blocks.{}.img_attn.proj", "transformer_blocks.{}.attn.to_out.0"),
        ("double_blocks.{}.txt_attn.proj", "transformer_blocks.{}.attn.to_add_out"),
        ("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.net.0.proj"),
        ("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.net.2"),
        ("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.net.0.proj"),
        ("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.net.2"),
        ("single_blocks.{}.linear1", "single_transformer_blocks.{}.attn.to_qkv_mlp_proj"),
        ("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
        ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
        ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
        ("single_stream_modulation.lin", "single_stream_modulation.linear"),
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
        ("final_layer.linear", "proj_out"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ],
    aliases: &[],
    fused: &[IMAGE, TEXT],
    own: &[
        ("transformer_blocks.{}.ff.linear_in", "transformer_blocks.{}.ff.net.0.proj"),
        ("transformer_blocks.{}.ff.linear_out", "transformer_blocks.{}.ff.net.2"),
        ("transformer_blocks.{}.ff_context.linear_in", "transformer_blocks.{}.ff_context.net.0.proj"),
        ("transformer_blocks.{}.ff_context.linear_out", "transformer_blocks.{}.ff_context.net.2"),
        ("single_transformer_blocks.{}.attn.to_out", "single_transformer_blocks.{}.proj_out"),
        ("time_guidance_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_1"),
        ("time_guidance_embed.timestep_embedder.linear_2", "time_text_embed.timestep_embedder.linear_2"),
        ("time_guidance_embed.guidance_embedder.linear_1", "time_text_embed.guidance_embedder.linear_1"),
        ("time_guidance_embed.guidance_embedder.linear_2", "time_text_embed.guidance_embedder.linear_2"),
    ],
};
