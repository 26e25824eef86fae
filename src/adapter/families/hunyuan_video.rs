//! HunyuanVideo: native names are of Tencent, musubi-tuner and ComfyUI; diffusers has those of FLUX.1.

use super::flux::{IMAGE, SINGLE, TEXT};
use super::{Fused, Table};

pub(super) const TABLE: Table = Table {
    names: &[
        ("double_blocks.{}.img_attn_qkv", "transformer_blocks.{}.attn.to_qkv"),
        ("double_blocks.{}.txt_attn_qkv", "transformer_blocks.{}.attn.to_added_qkv"),
        ("double_blocks.{}.img_attn_proj", "transformer_blocks.{}.attn.to_out.0"),
        ("double_blocks.{}.txt_attn_proj", "transformer_blocks.{}.attn.to_add_out"),
        ("double_blocks.{}.img_mlp.fc1", "transformer_blocks.{}.ff.net.0.proj"),
        ("double_blocks.{}.img_mlp.fc2", "transformer_blocks.{}.ff.net.2"),
        ("double_blocks.{}.txt_mlp.fc1", "transformer_blocks.{}.ff_context.net.0.proj"),
        ("double_blocks.{}.txt_mlp.fc2", "transformer_blocks.{}.ff_context.net.2"),
        ("double_blocks.{}.img_mod.linear", "transformer_blocks.{}.norm1.linear"),
        ("double_blocks.{}.txt_mod.linear", "transformer_blocks.{}.norm1_context.linear"),
        ("single_blocks.{}.linear1", "single_transformer_blocks.{}.attn.to_qkv_mlp_proj"),
        ("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
        ("single_blocks.{}.modulation.linear", "single_transformer_blocks.{}.norm.linear"),
        (
            "txt_in.individual_token_refiner.blocks.{}.self_attn_qkv",
            "context_embedder.token_refiner.refiner_blocks.{}.attn.to_qkv",
        ),
        (
            "txt_in.individual_token_refiner.blocks.{}.self_attn_proj",
            "context_embedder.token_refiner.refiner_blocks.{}.attn.to_out.0",
        ),
        (
            "txt_in.individual_token_refiner.blocks.{}.mlp.fc1",
            "context_embedder.token_refiner.refiner_blocks.{}.ff.net.0.proj",
        ),
        (
            "txt_in.individual_token_refiner.blocks.{}.mlp.fc2",
            "context_embedder.token_refiner.refiner_blocks.{}.ff.net.2",
        ),
        (
            "txt_in.individual_token_refiner.blocks.{}.adaLN_modulation.1",
            "context_embedder.token_refiner.refiner_blocks.{}.norm_out.linear",
        ),
        ("txt_in.input_embedder", "context_embedder.proj_in"),
        ("txt_in.t_embedder.mlp.0", "context_embedder.time_text_embed.timestep_embedder.linear_1"),
        ("txt_in.t_embedder.mlp.2", "context_embedder.time_text_embed.timestep_embedder.linear_2"),
        ("txt_in.c_embedder.linear_1", "context_embedder.time_text_embed.text_embedder.linear_1"),
        ("txt_in.c_embedder.linear_2", "context_embedder.time_text_embed.text_embedder.linear_2"),
        ("img_in.proj", "x_embedder.proj"),
        ("time_in.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        ("time_in.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        ("guidance_in.mlp.0", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.mlp.2", "time_text_embed.guidance_embedder.linear_2"),
        ("final_layer.linear", "proj_out"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ],
    aliases: &[],
    fused: &[IMAGE, TEXT, SINGLE, REFINER],
    own: &[],
};

const REFINER: Fused = Fused {
    whole: "context_embedder.token_refiner.refiner_blocks.{}.attn.to_qkv",
    parts: &[
        "context_embedder.token_refiner.refiner_blocks.{}.attn.to_q",
        "context_embedder.token_refiner.refiner_blocks.{}.attn.to_k",
        "context_embedder.token_refiner.refiner_blocks.{}.attn.to_v",
    ],
    mlp: 0,
};
