//! Qwen-Image: everybody has the names of diffusers. The embedders are called as those of FLUX are natively.

use super::Table;

pub(super) const TABLE: Table = Table {
    names: &[],
    aliases: &[],
    fused: &[],
    own: &[("img_in", "x_embedder"), ("txt_in", "context_embedder")],
};
