//! Z-Image: trainers have the names of diffusers; some files for ComfyUI have its fused ones.

use super::{Fused, Table};

pub(super) const TABLE: Table = Table {
    names: &[
        ("layers.{}.attention.qkv", "layers.{}.attention.to_qkv"),
        ("layers.{}.attention.out", "layers.{}.attention.to_out.0"),
        ("noise_refiner.{}.attention.qkv", "noise_refiner.{}.attention.to_qkv"),
        ("noise_refiner.{}.attention.out", "noise_refiner.{}.attention.to_out.0"),
        ("context_refiner.{}.attention.qkv", "context_refiner.{}.attention.to_qkv"),
        ("context_refiner.{}.attention.out", "context_refiner.{}.attention.to_out.0"),
        // The same in both.
        ("layers.{}.feed_forward.w1", "layers.{}.feed_forward.w1"),
        ("layers.{}.feed_forward.w2", "layers.{}.feed_forward.w2"),
        ("layers.{}.feed_forward.w3", "layers.{}.feed_forward.w3"),
        ("layers.{}.adaLN_modulation.0", "layers.{}.adaLN_modulation.0"),
    ],
    aliases: &[],
    fused: &[
        Fused {
            whole: "layers.{}.attention.to_qkv",
            parts: &["layers.{}.attention.to_q", "layers.{}.attention.to_k", "layers.{}.attention.to_v"],
            mlp: 0,
        },
        Fused {
            whole: "noise_refiner.{}.attention.to_qkv",
            parts: &[
                "noise_refiner.{}.attention.to_q",
                "noise_refiner.{}.attention.to_k",
                "noise_refiner.{}.attention.to_v",
            ],
            mlp: 0,
        },
        Fused {
            whole: "context_refiner.{}.attention.to_qkv",
            parts: &[
                "context_refiner.{}.attention.to_q",
                "context_refiner.{}.attention.to_k",
                "context_refiner.{}.attention.to_v",
            ],
            mlp: 0,
        },
    ],
    own: &[],
};
