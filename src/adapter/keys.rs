//! The grammar of tensor keys: prefix, module path, suffix.
//!
//! Trainers spell the same module in many ways: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`,
//! `lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight`, ... Dots can always become underscores but not
//! the reverse, so layers are matched by the flat path ([`LayerKey`]), and [`unflatten`] is left for writing.

use std::borrow::Borrow;
use std::fmt;

/// Prefixes in files, and the text encoder that each stands for (empty: the main model). Where one starts
/// another, the longer is first. They may be nested: `base_model.model.transformer.`.
const PREFIXES: &[(&str, &str)] = &[
    ("base_model.model.", ""),
    ("transformer.", ""),
    ("unet.", ""),
    ("model.diffusion_model.", ""),
    ("diffusion_model.", ""),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.", "text_encoders"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_unet__", ""),
    ("lora_unet_", ""),
    ("lora_transformer_", ""),
    ("lora_", ""),
    ("lycoris_", ""),
];

/// Splits a module path into the component (a text encoder, or empty) and the length of the prefix.
pub(super) fn prefix(name: &str) -> (&'static str, usize) {
    let (mut component, mut len) = ("", 0);
    while let Some((p, c)) = PREFIXES.iter().find(|(p, _)| {
        name[len..].strip_prefix(p).is_some_and(|rest| {
            // `lora_transformer_blocks_0` is `lora_` before `transformer_blocks.0`.
            let other = *p == "lora_transformer_" && rest.starts_with("blocks_");
            !rest.is_empty() && !other
        })
    }) {
        len += p.len();
        if component.is_empty() {
            component = c;
        }
    }
    (component, len)
}

/// The name by which layers of different files are matched: the module path without its prefix, dots written
/// as underscores. Layers of a text encoder are kept apart by its name and a dot in front.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerKey(String);

impl LayerKey {
    /// The key of a module in any spelling: `transformer.transformer_blocks.0.attn.to_q`,
    /// `lora_unet_transformer_blocks_0_attn_to_q` and `transformer_blocks.0.attn.to_q` give the same one.
    pub fn parse(name: &str) -> Self {
        let (mut component, mut rest) = ("", name.to_owned());
        loop {
            let (found, len) = prefix(&rest);
            if component.is_empty() {
                component = found;
            }
            let flat = rest[len..].replace('.', "_");
            if flat == rest {
                break;
            }
            rest = flat;
        }
        Self(if component.is_empty() { rest } else { format!("{component}.{rest}") })
    }

    /// The key as text; [`parse`](Self::parse) gives it back.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text encoder that the layer belongs to; empty for the main model.
    pub fn component(&self) -> &str {
        self.0.split_once('.').map_or("", |(component, _)| component)
    }
}

impl fmt::Display for LayerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for LayerKey {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// What a tensor is to its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    A,
    B,
    Alpha,
}

/// What a tensor's key says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Split<'a> {
    /// Part of a LoRA of this module.
    Lora(&'a str, Part),
    /// Part of another kind of adapter.
    Foreign(&'static str),
    /// No adapter at all.
    Unknown,
}

const SUFFIXES: &[(&str, Part)] = &[
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_down.weight", Part::A),
    (".lora_up.weight", Part::B),
    (".lora.down.weight", Part::A),
    (".lora.up.weight", Part::B),
    (".lora_linear_layer.down.weight", Part::A),
    (".lora_linear_layer.up.weight", Part::B),
    (".lora_A", Part::A),
    (".lora_B", Part::B),
    (".lora_A.alpha", Part::Alpha),
    (".alpha", Part::Alpha),
];

/// Splits a tensor's key at its suffix. Only the last dotted parts count: module paths contain words such as
/// `down_blocks` and `mlp.up` themselves.
pub(super) fn split(key: &str) -> Split<'_> {
    for &(suffix, part) in SUFFIXES {
        if let Some(module) = key.strip_suffix(suffix).filter(|m| !m.is_empty()) {
            return Split::Lora(module, part);
        }
    }
    let mut parts = key.rsplitn(4, '.');
    let last = parts.next().unwrap_or_default();
    let second = parts.next().unwrap_or_default();
    let third = parts.next().unwrap_or_default();
    // `.lora_A.<name of the adapter>.weight`
    if let (Some(module), "weight", "lora_A" | "lora_B") = (parts.next(), last, third) {
        return Split::Lora(module, if third == "lora_A" { Part::A } else { Part::B });
    }
    let factors = ["lora_A", "lora_B", "lora_down", "lora_up"];
    if last == "bias" && (factors.contains(&second) || factors.contains(&third)) {
        return Split::Foreign("a LoRA with a bias (`lora_bias`)");
    }
    if last == "weight"
        && matches!(second, "down" | "up")
        && third.trim_end_matches(['1', '2']).ends_with("_lora")
    {
        return Split::Foreign("a LoRA on attention processors (XLabs, or diffusers of 2023)");
    }
    if last == "weight" && matches!(second, "a1" | "a2" | "b1" | "b2") {
        return Split::Foreign("GLoRA");
    }
    [last, second, third].into_iter().find_map(foreign).map_or(Split::Unknown, Split::Foreign)
}

fn foreign(part: &str) -> Option<&'static str> {
    Some(match part {
        "scalar" => "LyCORIS with a trained scalar",
        "dora_scale" | "lora_magnitude_vector" | "magnitude" => {
            "DoRA, which depends on the base model's weights"
        }
        "lora_mid" => "a LoRA of a convolution with a Tucker core",
        "lora_embedding_A" | "lora_embedding_B" => "a LoRA of an embedding",
        "diff" | "diff_b" | "set_weight" | "reshape_weight" => "a full weight difference",
        "w_norm" | "b_norm" => "a difference of a norm",
        "ia3_l" => "IA3",
        "oft_blocks" | "oft_diag" | "oft_r" | "oft_R" => "OFT",
        _ if part.starts_with("hada_") => "LoHa",
        _ if part.starts_with("lokr_") => "LoKr",
        _ if part.starts_with("boft_") => "BOFT",
        _ if part.starts_with("glora_") => "GLoRA",
        _ => return None,
    })
}

/// Names of modules that contain underscores.
const NAMES: &[&str] = &[
    // diffusers: transformers
    "transformer_blocks",
    "single_transformer_blocks",
    "to_q",
    "to_k",
    "to_v",
    "to_qkv",
    "to_out",
    "to_gate",
    "to_kv",
    "to_add_out",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "norm_q",
    "norm_k",
    "norm_added_q",
    "norm_added_k",
    "norm_out",
    "norm1_context",
    "norm2_context",
    "ff_context",
    "proj_in",
    "proj_out",
    "proj_mlp",
    "linear_in",
    "linear_out",
    "to_qkv_mlp_proj",
    "context_embedder",
    "x_embedder",
    "t_embedder",
    "y_embedder",
    "time_text_embed",
    "timestep_embedder",
    "guidance_embedder",
    "text_embedder",
    "caption_projection",
    "adaln_single",
    "patch_embed",
    "pos_embed",
    "condition_embedder",
    "time_embedder",
    "image_embedder",
    "time_proj",
    "linear_1",
    "linear_2",
    "token_refiner",
    "refiner_blocks",
    // diffusers: UNet
    "down_blocks",
    "up_blocks",
    "mid_block",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "time_emb_proj",
    "time_embedding",
    "add_embedding",
    // the UNet of Stability AI
    "input_blocks",
    "middle_block",
    "output_blocks",
    "in_layers",
    "out_layers",
    "emb_layers",
    "skip_connection",
    "time_embed",
    "label_emb",
    // FLUX, HunyuanVideo
    "double_blocks",
    "single_blocks",
    "img_attn",
    "txt_attn",
    "img_mlp",
    "txt_mlp",
    "img_mod",
    "txt_mod",
    "img_in",
    "txt_in",
    "time_in",
    "vector_in",
    "guidance_in",
    "in_layer",
    "out_layer",
    "final_layer",
    "individual_token_refiner",
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
    // Wan, Z-Image, Lumina
    "self_attn",
    "cross_attn",
    "k_img",
    "v_img",
    "img_emb",
    "text_embedding",
    "time_projection",
    "patch_embedding",
    "feed_forward",
    "adaLN_modulation",
    "noise_refiner",
    "context_refiner",
    "cap_embedder",
    "all_x_embedder",
    "all_final_layer",
    // text encoders
    "text_model",
    "text_projection",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "token_embedding",
    "position_embedding",
    "wi_0",
    "wi_1",
];

/// Guesses where the dots of a flat path were: between all words but those of a known name.
pub(super) fn unflatten(flat: &str) -> String {
    let mut path = String::with_capacity(flat.len());
    let mut rest = flat;
    loop {
        let known = NAMES
            .iter()
            .filter(|n| rest.strip_prefix(**n).is_some_and(|tail| tail.is_empty() || tail.starts_with('_')));
        let len = known.map(|n| n.len()).max().or_else(|| rest.find('_')).unwrap_or(rest.len());
        path += &rest[..len];
        match rest[len..].strip_prefix('_') {
            Some(tail) => rest = tail,
            None => return path,
        }
        path.push('.');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_layer_share_a_key() {
        for name in [
            "transformer_blocks.0.attn.to_q",
            "transformer.transformer_blocks.0.attn.to_q",
            "base_model.model.transformer_blocks.0.attn.to_q",
            "base_model.model.transformer.transformer_blocks.0.attn.to_q",
            "transformer.base_model.model.transformer_blocks.0.attn.to_q",
            "diffusion_model.transformer_blocks.0.attn.to_q",
            "model.diffusion_model.transformer_blocks.0.attn.to_q",
            "unet.transformer_blocks.0.attn.to_q",
            "lora_transformer_blocks_0_attn_to_q",
            "lora_transformer_transformer_blocks_0_attn_to_q",
            "lora_unet_transformer_blocks_0_attn_to_q",
            "lora_unet__transformer_blocks_0_attn_to_q",
            "lycoris_transformer_blocks_0_attn_to_q",
        ] {
            assert_eq!(LayerKey::parse(name).as_str(), "transformer_blocks_0_attn_to_q", "{name}");
        }
        assert_eq!(
            LayerKey::parse("lora_transformer_single_transformer_blocks_7_proj_mlp").as_str(),
            "single_transformer_blocks_7_proj_mlp"
        );
        for name in ["text_encoder.text_model.encoder.layers.0", "lora_te_text_model_encoder_layers_0"] {
            assert_eq!(LayerKey::parse(name).as_str(), "text_encoder.text_model_encoder_layers_0");
        }
        let te2 = LayerKey::parse("lora_te2_text_projection");
        assert_eq!((te2.as_str(), te2.component()), ("text_encoder_2.text_projection", "text_encoder_2"));
        assert_eq!(LayerKey::parse("lora_").as_str(), "lora_");
    }

    #[test]
    fn suffixes() {
        assert_eq!(split("m.0.lora_A.default.weight"), Split::Lora("m.0", Part::A));
        assert_eq!(split("m.0.lora_B"), Split::Lora("m.0", Part::B));
        assert_eq!(split("m.0.lora_A.alpha"), Split::Lora("m.0", Part::Alpha));
        assert_eq!(split("down_blocks.up.weight"), Split::Unknown);
        assert_eq!(split(".alpha"), Split::Unknown);
        for (key, kind) in [
            ("m.dora_scale", "DoRA"),
            ("m.lora_magnitude_vector.default.weight", "DoRA"),
            ("m.lora_magnitude_vector", "DoRA"),
            ("m.hada_w1_a", "LoHa"),
            ("m.lokr_w2", "LoKr"),
            ("m.oft_blocks", "OFT"),
            ("m.diff", "difference"),
            ("m.diff_b", "difference"),
            ("m.w_norm", "norm"),
            ("m.lora_mid.weight", "Tucker"),
            ("m.lora_B.bias", "lora_bias"),
            ("m.lora_B.default.bias", "lora_bias"),
            ("m.a1.weight", "GLoRA"),
            ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ] {
            assert!(matches!(split(key), Split::Foreign(k) if k.contains(kind)), "{key}: {:?}", split(key));
        }
    }

    #[test]
    fn dots_come_back() {
        for path in [
            "transformer_blocks.0.attn.to_out.0",
            "transformer_blocks.11.ff_context.net.0.proj",
            "single_transformer_blocks.37.proj_mlp",
            "transformer_blocks.3.norm1_context.linear",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "double_blocks.18.img_attn.qkv",
            "layers.29.feed_forward.w1",
            "layers.0.adaLN_modulation.0",
            "blocks.39.cross_attn.k_img",
            "text_model.encoder.layers.0.self_attn.q_proj",
            "mid_block.attentions.0.proj_in",
        ] {
            assert_eq!(unflatten(&path.replace('.', "_")), path);
        }
        assert_eq!(unflatten(""), "");
        assert_eq!(unflatten("a__b_"), "a..b.");
    }
}
