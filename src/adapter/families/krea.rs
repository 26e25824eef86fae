//! Krea 2: every trainer has the native names, and LyCORIS may fuse q, k and v.

use super::{Fused, Table};

pub(super) const TABLE: Table = Table {
    names: &[],
    aliases: &[],
    fused: &[Fused {
        whole: "blocks.{}.attn.to_qkv",
        parts: &["blocks.{}.attn.wq", "blocks.{}.attn.wk", "blocks.{}.attn.wv"],
        mlp: 0,
    }],
    own: &[],
};
