//! Text encoders.

use std::borrow::Cow;

use super::Names;

/// What diffusers of 2023 called the projections of CLIP's attention.
const PROCESSOR: &[(&str, &str)] = &[
    ("_self_attn_to_q_lora", "_self_attn_q_proj"),
    ("_self_attn_to_k_lora", "_self_attn_k_proj"),
    ("_self_attn_to_v_lora", "_self_attn_v_proj"),
    ("_self_attn_to_out_lora", "_self_attn_out_proj"),
];

pub(super) fn canonical(flat: &str) -> (Cow<'_, str>, Option<Names>) {
    let old = PROCESSOR.iter().find_map(|(old, new)| Some(flat.strip_suffix(old)?.to_owned() + new));
    match old {
        Some(name) => (name.into(), Some(Names::Processor)),
        None => (flat.into(), None),
    }
}
