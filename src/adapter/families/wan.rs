//! Wan 2.x: native names are of Alibaba, musubi-tuner and ComfyUI.

use super::Table;

pub(super) const TABLE: Table = Table {
    names: &[
        ("blocks.{}.self_attn.q", "blocks.{}.attn1.to_q"),
        ("blocks.{}.self_attn.k", "blocks.{}.attn1.to_k"),
        ("blocks.{}.self_attn.v", "blocks.{}.attn1.to_v"),
        ("blocks.{}.self_attn.o", "blocks.{}.attn1.to_out.0"),
        ("blocks.{}.cross_attn.q", "blocks.{}.attn2.to_q"),
        ("blocks.{}.cross_attn.k", "blocks.{}.attn2.to_k"),
        ("blocks.{}.cross_attn.v", "blocks.{}.attn2.to_v"),
        ("blocks.{}.cross_attn.o", "blocks.{}.attn2.to_out.0"),
        ("blocks.{}.cross_attn.k_img", "blocks.{}.attn2.add_k_proj"),
        ("blocks.{}.cross_attn.v_img", "blocks.{}.attn2.add_v_proj"),
        ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
        ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
        ("head.head", "proj_out"),
    ],
    aliases: &[],
    fused: &[],
    own: &[],
};
