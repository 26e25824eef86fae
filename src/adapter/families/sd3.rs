//! Stable Diffusion 3 and 3.5: native names are of Stability AI, kohya and ComfyUI.

use super::flux::{IMAGE, TEXT};
use super::{Fused, Table};

pub(super) const TABLE: Table = Table {
    names: &[
        ("joint_blocks.{}.x_block.attn.qkv", "transformer_blocks.{}.attn.to_qkv"),
        ("joint_blocks.{}.context_block.attn.qkv", "transformer_blocks.{}.attn.to_added_qkv"),
        ("joint_blocks.{}.x_block.attn2.qkv", "transformer_blocks.{}.attn2.to_qkv"),
        ("joint_blocks.{}.x_block.attn.proj", "transformer_blocks.{}.attn.to_out.0"),
        ("joint_blocks.{}.context_block.attn.proj", "transformer_blocks.{}.attn.to_add_out"),
        ("joint_blocks.{}.x_block.attn2.proj", "transformer_blocks.{}.attn2.to_out.0"),
        ("joint_blocks.{}.x_block.mlp.fc1", "transformer_blocks.{}.ff.net.0.proj"),
        ("joint_blocks.{}.x_block.mlp.fc2", "transformer_blocks.{}.ff.net.2"),
        ("joint_blocks.{}.context_block.mlp.fc1", "transformer_blocks.{}.ff_context.net.0.proj"),
        ("joint_blocks.{}.context_block.mlp.fc2", "transformer_blocks.{}.ff_context.net.2"),
        ("joint_blocks.{}.x_block.adaLN_modulation.1", "transformer_blocks.{}.norm1.linear"),
        ("joint_blocks.{}.context_block.adaLN_modulation.1", "transformer_blocks.{}.norm1_context.linear"),
        ("final_layer.linear", "proj_out"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ],
    aliases: &[],
    fused: &[IMAGE, TEXT, SECOND],
    own: &[],
};

const SECOND: Fused = Fused {
    whole: "transformer_blocks.{}.attn2.to_qkv",
    parts: &[
        "transformer_blocks.{}.attn2.to_q",
        "transformer_blocks.{}.attn2.to_k",
        "transformer_blocks.{}.attn2.to_v",
    ],
    mlp: 0,
};
