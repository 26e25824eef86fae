//! The grammar of tensor keys: prefix, module path, suffix.
//!
//! Trainers spell the same module in many ways: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`,
//! `lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight`, ... Dots can always become underscores but not
//! the reverse, so layers are matched by the flat path ([`LayerKey`]); only [`families`] know where dots were.

use std::borrow::{Borrow, Cow};
use std::collections::BTreeMap;
use std::fmt;

use super::families::{self, Family};

/// Prefixes in files, and the component that each stands for (empty: the main model). Where one starts
/// another, the longer is first. They may be nested: `base_model.model.transformer.`.
const PREFIXES: &[(&str, &str)] = &[
    ("base_model.model.", ""),
    ("transformer.", ""),
    ("transformer_1.", ""),
    ("transformer_2.", "transformer_2"),
    ("unet.", ""),
    ("model.diffusion_model.", ""),
    ("diffusion_model.", ""),
    ("connectors.", "connectors"),
    ("text_conditioner.", "text_conditioner"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_h.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3"),
    ("text_encoders.llama.transformer.", "text_encoder_4"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    // OpenCLIP's names follow: of SD 2's encoder, and of the second of SDXL, which is the only one of its refiner.
    ("cond_stage_model.model.", "text_encoder"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder_4.", "text_encoder_4"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te4_", "text_encoder_4"),
    ("lora_unet__", ""),
    ("lora_unet_", ""),
    ("lora_transformer_", ""),
    ("lora_", ""),
    ("lycoris_", ""),
];

/// Prefixes only where what follows them is a known name: wrappers of a model that was saved whole.
const WRAPPERS: &[&str] = &["_orig_mod.", "module.", "pipe.dit.", "pipe.", "dit.", "net.", "model."];

/// Splits a module path into the component (empty: the main model) and the length of the prefix.
pub(super) fn prefix(name: &str) -> (Cow<'static, str>, usize) {
    let (mut component, mut len) = (Cow::Borrowed(""), 0);
    loop {
        let rest = &name[len..];
        let listed = PREFIXES.iter().find(|(p, _)| {
            rest.strip_prefix(p).is_some_and(|rest| {
                // `lora_transformer_blocks_0` is `lora_` before `transformer_blocks.0`.
                let other = *p == "lora_transformer_" && rest.starts_with("blocks_");
                !rest.is_empty() && !other
            })
        });
        if let Some((p, of)) = listed {
            len += p.len();
            if component.is_empty() {
                component = Cow::Borrowed(of);
            }
        } else if let Some(encoder) = language_model(rest).filter(|_| component.is_empty()) {
            len += "text_encoders.".len() + encoder.len() + ".transformer.".len();
            component = Cow::Borrowed("text_encoder");
        } else if let Some(p) = WRAPPERS.iter().find(|p| component.is_empty() && wraps(rest, p)) {
            len += p.len();
        } else {
            return (component, len);
        }
    }
}

/// The name of the language model in `text_encoders.<name>.transformer.`, of a model that has no other encoder.
fn language_model(name: &str) -> Option<&str> {
    let (encoder, rest) = name.strip_prefix("text_encoders.")?.split_once(".transformer.")?;
    (!rest.is_empty() && !encoder.is_empty() && !encoder.contains('.')).then_some(encoder)
}

/// Whether a wrapper's prefix is there, before a known name or another wrapper.
fn wraps(name: &str, prefix: &str) -> bool {
    let Some(rest) = name.strip_prefix(prefix) else { return false };
    let flat = rest.replace('.', "_");
    families::is_known("", &flat) || WRAPPERS.iter().any(|other| wraps(rest, other))
}

/// The name by which layers of different files are matched: the module path without its prefix, as diffusers has it,
/// dots written as underscores. Layers of another component than the main model, such as a text encoder, are kept apart
/// by its name and a dot in front.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerKey(String);

/// A module's name without its prefix.
#[derive(Clone, Debug)]
pub(super) struct Bare {
    pub component: Cow<'static, str>,
    /// With underscores for dots.
    pub flat: String,
}

impl Bare {
    pub fn parse(name: &str) -> Self {
        let (mut component, mut rest) = (Cow::Borrowed(""), name.to_owned());
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
        // The T5 of FLUX is the second encoder for some and the third for others.
        if families::is_encoder(&component) && rest.starts_with("encoder_block_") {
            component = Cow::Borrowed("text_encoder_3");
        }
        Self { component, flat: rest }
    }

    /// The key of the module that has this flat name in its component.
    pub fn key(&self, flat: &str) -> LayerKey {
        LayerKey(if self.component.is_empty() {
            flat.to_owned()
        } else {
            format!("{}.{flat}", self.component)
        })
    }
}

impl LayerKey {
    /// The key of a module in any spelling: `transformer.transformer_blocks.0.ff.net.2`,
    /// `lora_unet_double_blocks_0_img_mlp_2` and `transformer_blocks.0.ff.net.2` give the same one, as long as all model
    /// families that have such a name mean one module by it; [`Family::key`] asks one family alone.
    pub fn parse(name: &str) -> Self {
        Self::of(Family::UNKNOWN, name)
    }

    /// The key of a module of a family.
    pub(super) fn of(family: Family, name: &str) -> Self {
        let bare = Bare::parse(name);
        let module = family.module(&bare.component, &bare.flat, None, None);
        bare.key(module.as_ref().map_or(&bare.flat, |module| &module.key))
    }

    /// Every key that some family gives to a module's name, and the flat name itself. [`parse`](Self::parse)'s is first.
    pub(crate) fn meant(name: &str) -> Vec<Self> {
        let bare = Bare::parse(name);
        let mut keys = vec![Self::parse(name)];
        let others = Family::keys(&bare.component, &bare.flat);
        for key in others.iter().chain([&bare.flat]).map(|flat| bare.key(flat)) {
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        keys
    }

    /// The entry of the layer of a name, in any spelling.
    pub(crate) fn find<'a, V>(name: &str, all: &'a BTreeMap<Self, V>) -> Option<(&'a Self, &'a V)> {
        let found = all.get_key_value(&Self::parse(name));
        found.or_else(|| Self::meant(name).iter().find_map(|key| all.get_key_value(key)))
    }

    /// A key as [`as_str`](Self::as_str) gave it; `None` for text that is no key.
    pub(crate) fn stored(text: &str) -> Option<Self> {
        Self::meant(text).into_iter().find(|key| key.as_str() == text)
    }

    /// Keys of the layers that adapters have in place of this one, if it fuses them: of `to_qkv`, those of q, k and v.
    /// Families may cut one name in more than one way; these are the parts of all of them.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Self> {
        let bare = Bare { component: self.component().to_owned().into(), flat: self.flat().to_owned() };
        Family::parts(&bare.component, &bare.flat).into_iter().map(move |part| bare.key(&part))
    }

    /// The key as text; [`parse`](Self::parse) gives it back.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The component that the layer belongs to, such as a text encoder; empty for the main model.
    pub fn component(&self) -> &str {
        self.0.split_once('.').map_or("", |(component, _)| component)
    }

    /// The key without the component.
    pub(super) fn flat(&self) -> &str {
        self.0.split_once('.').map_or(self.as_str(), |(_, flat)| flat)
    }
}

/// Whether a component of this name is the main model: `transformer`, `unet`, `prior`, or none.
pub(super) fn is_main_model(name: &str) -> bool {
    let is_other = |(prefix, of): &(&str, &str)| prefix.strip_suffix('.') == Some(name) && !of.is_empty();
    !name.starts_with("text_encoder") && !PREFIXES.iter().any(is_other)
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    A,
    B,
    /// The core of a Tucker decomposition.
    Mid,
    Alpha,
    /// A factor that LyCORIS trains on the whole update.
    Scalar,
    /// DoRA's norms, of each output.
    Magnitude,
    /// DoRA's norms, whose shape says of what.
    DoraScale,
    Hada(Hada),
    Lokr(Lokr),
    /// The whole update.
    Diff,
}

/// Factors of a LoHa.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hada {
    W1A,
    W1B,
    W2A,
    W2B,
    T1,
    T2,
}

/// Factors of a LoKr.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lokr {
    W1,
    W1A,
    W1B,
    W2,
    W2A,
    W2B,
    T2,
}

/// What a tensor's key says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Split<'a> {
    /// Part of an adapter of this module.
    Part(&'a str, Part),
    /// Part of something that cannot be merged, of this module.
    Foreign(&'a str, &'static str),
    /// No adapter at all.
    Unknown,
}

const SUFFIXES: &[(&str, Part)] = &[
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_down.weight", Part::A),
    (".lora_up.weight", Part::B),
    (".lora_mid.weight", Part::Mid),
    (".lora.down.weight", Part::A),
    (".lora.up.weight", Part::B),
    (".lora_linear_layer.down.weight", Part::A),
    (".lora_linear_layer.up.weight", Part::B),
    (".lora_A", Part::A),
    (".lora_B", Part::B),
    (".lora_A.alpha", Part::Alpha),
    (".alpha", Part::Alpha),
    (".scalar", Part::Scalar),
    (".dora_scale", Part::DoraScale),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_magnitude_vector.weight", Part::Magnitude),
    (".magnitude", Part::Magnitude),
    (".hada_w1_a", Part::Hada(Hada::W1A)),
    (".hada_w1_b", Part::Hada(Hada::W1B)),
    (".hada_w2_a", Part::Hada(Hada::W2A)),
    (".hada_w2_b", Part::Hada(Hada::W2B)),
    (".hada_t1", Part::Hada(Hada::T1)),
    (".hada_t2", Part::Hada(Hada::T2)),
    (".lokr_w1", Part::Lokr(Lokr::W1)),
    (".lokr_w1_a", Part::Lokr(Lokr::W1A)),
    (".lokr_w1_b", Part::Lokr(Lokr::W1B)),
    (".lokr_w2", Part::Lokr(Lokr::W2)),
    (".lokr_w2_a", Part::Lokr(Lokr::W2A)),
    (".lokr_w2_b", Part::Lokr(Lokr::W2B)),
    (".lokr_t2", Part::Lokr(Lokr::T2)),
    (".diff", Part::Diff),
    (".down", Part::A),
    (".up", Part::B),
];

/// Splits a tensor's key at its suffix. Only the last dotted parts count: module paths contain words such as
/// `down_blocks` and `mlp.up` themselves.
pub(super) fn split(key: &str) -> Split<'_> {
    for &(suffix, part) in SUFFIXES {
        if let Some(module) = key.strip_suffix(suffix).filter(|m| !m.is_empty()) {
            return Split::Part(module, part);
        }
    }
    let mut parts = key.rsplitn(4, '.');
    let last = parts.next().unwrap_or_default();
    let second = parts.next().unwrap_or_default();
    let third = parts.next().unwrap_or_default();
    let path = parts.next().filter(|path| !path.is_empty());
    // `.lora_A.<name of the adapter>.weight`
    match (path, third, last) {
        (Some(module), "lora_A", "weight") => return Split::Part(module, Part::A),
        (Some(module), "lora_B", "weight") => return Split::Part(module, Part::B),
        (Some(module), "lora_magnitude_vector", "weight") => return Split::Part(module, Part::Magnitude),
        _ => {}
    }
    let before = |n: usize| key.rsplitn(n + 1, '.').last().unwrap_or_default();
    if let (Some(module), "lora_magnitude_vector") =
        (Some(before(2)).filter(|module| !module.is_empty()), second)
    {
        return Split::Part(module, Part::Magnitude);
    }
    // Attention processors: XLabs', and those of diffusers of 2023.
    if let ("weight", "down" | "up") = (last, second)
        && third.trim_end_matches(['1', '2']).ends_with("_lora")
    {
        return Split::Part(before(2), if second == "down" { Part::A } else { Part::B });
    }
    let factors = ["lora_A", "lora_B", "lora_down", "lora_up"];
    if last == "bias" && factors.contains(&second) {
        return Split::Foreign(before(2), "a LoRA with a bias (`lora_bias`)");
    }
    if last == "bias" && factors.contains(&third) {
        return Split::Foreign(before(3), "a LoRA with a bias (`lora_bias`)");
    }
    if last == "weight" && matches!(second, "a1" | "a2" | "b1" | "b2") {
        return Split::Foreign(before(2), "GLoRA");
    }
    let names = [last, second, third].into_iter().enumerate();
    names
        .filter_map(|(i, part)| Some((i, foreign(part)?)))
        .next()
        .map_or(Split::Unknown, |(i, kind)| Split::Foreign(before(i + 1), kind))
}

fn foreign(part: &str) -> Option<&'static str> {
    Some(match part {
        "lora_embedding_A" | "lora_embedding_B" => "a LoRA of an embedding",
        "diff_b" => "a difference of a bias",
        "set_weight" | "reshape_weight" => "a replaced weight",
        "w_norm" | "b_norm" => "a difference of a norm",
        "ia3_l" => "IA3",
        "oft_blocks" | "oft_diag" | "oft_r" | "oft_R" => "OFT",
        _ if part.starts_with("boft_") => "BOFT",
        _ if part.starts_with("glora_") => "GLoRA",
        _ => return None,
    })
}

/// Whether a name is of a pattern: `*` stands for anything, and dots and underscores are one.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.replace('.', "_"), name.replace('.', "_"));
    let mut parts = pattern.split('*');
    let Some(mut rest) = name.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
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
        use Part::{A, Alpha, B, Diff, DoraScale, Magnitude, Mid};
        for (key, module, part) in [
            ("m.0.lora_A.default.weight", "m.0", A),
            ("m.0.lora_A.cat.weight", "m.0", A),
            ("m.0.lora_B", "m.0", B),
            ("m.0.lora_A.alpha", "m.0", Alpha),
            ("mlp.down.lora_A.weight", "mlp.down", A),
            ("mlp.up.lora_up.weight", "mlp.up", B),
            ("q_proj.lora_linear_layer.up.weight", "q_proj", B),
            ("attn1.processor.to_q_lora.down.weight", "attn1.processor.to_q_lora", A),
            ("double_blocks.0.processor.qkv_lora1.up.weight", "double_blocks.0.processor.qkv_lora1", B),
            ("proj_in.down", "proj_in", A),
            ("m.lora_mid.weight", "m", Mid),
            ("m.dora_scale", "m", DoraScale),
            ("m.lora_magnitude_vector.default.weight", "m", Magnitude),
            ("m.lora_magnitude_vector.default", "m", Magnitude),
            ("m.lora_magnitude_vector", "m", Magnitude),
            ("m.magnitude", "m", Magnitude),
            ("m.hada_w1_a", "m", Part::Hada(Hada::W1A)),
            ("m.lokr_w2", "m", Part::Lokr(Lokr::W2)),
            ("m.diff", "m", Diff),
        ] {
            assert_eq!(split(key), Split::Part(module, part), "{key}");
        }
        for key in ["down_blocks.up.weight", "mlp.down.weight", ".alpha", "lora_A.weight", ""] {
            assert_eq!(split(key), Split::Unknown, "{key}");
        }
        for (key, kind) in [
            ("m.oft_blocks", "OFT"),
            ("m.diff_b", "bias"),
            ("m.w_norm", "norm"),
            ("m.lora_B.bias", "lora_bias"),
            ("m.lora_B.default.bias", "lora_bias"),
            ("m.a1.weight", "GLoRA"),
            ("m.ia3_l.default", "IA3"),
        ] {
            assert!(
                matches!(split(key), Split::Foreign("m", k) if k.contains(kind)),
                "{key}: {:?}",
                split(key)
            );
        }
    }

    #[test]
    fn patterns() {
        for (pattern, name, expected) in [
            ("*", "transformer.transformer_blocks.0.attn.to_q", true),
            ("transformer_blocks.*", "transformer.transformer_blocks.0.attn.to_q", true),
            ("transformer_blocks.*.to_q", "lora_unet_transformer_blocks_0_attn_to_q", true),
            ("transformer_blocks.*.to_q", "transformer_blocks.0.attn.to_k", false),
            ("single_blocks.*", "transformer_blocks.0.attn.to_q", false),
            ("*.attn.*", "transformer_blocks.0.attn.to_q", true),
            ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q", true),
            ("transformer_blocks.0.attn", "transformer_blocks.0.attn.to_q", false),
            ("*a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, LayerKey::parse(name).as_str()), expected, "{pattern} {name}");
        }
    }
}
