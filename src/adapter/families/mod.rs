//! Model families: what their modules are called, natively and in diffusers, and which are fused.
//!
//! Every layer is matched by the flat name that diffusers gives its module, and so `lora_unet_double_blocks_0_img_mlp_0`
//! and `transformer.transformer_blocks.0.ff.net.0.proj` are one layer. The tables need no family to be read backwards,
//! since no name means two things; a family is only recognised in order to write one.

mod flux;
mod hunyuan_video;
mod krea;
mod qwen;
mod sd3;
mod text;
mod unet;
mod wan;
mod z_image;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use super::Format;
use super::keys::unflatten;

/// The model that an adapter is for, as far as its layers tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Family {
    /// None that is known: names are kept as they are.
    #[default]
    Generic,
    /// Stable Diffusion 1.
    Sd1,
    /// Stable Diffusion 2.
    Sd2,
    /// Stable Diffusion XL.
    Sdxl,
    /// Stable Diffusion 3 and 3.5.
    Sd3,
    /// FLUX.1.
    Flux1,
    /// FLUX.2, and Klein.
    Flux2,
    /// HunyuanVideo.
    HunyuanVideo,
    /// Qwen-Image.
    QwenImage,
    /// Z-Image.
    ZImage,
    /// Wan 2.x.
    Wan,
    /// Krea 2.
    Krea2,
}

/// Whose names a module has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Names {
    Diffusers,
    /// Of the model's own code; `qkv` is one module.
    Native,
    /// XLabs' attention processors.
    Xlabs,
    /// diffusers' attention processors of 2023; read only.
    Processor,
}

/// A module that holds several of another spelling, one above the other: their A is one, and B is cut into rows.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fused {
    pub whole: &'static str,
    /// q, k and v, and in some single blocks the first layer of the MLP.
    pub parts: &'static [&'static str],
    /// Rows of the MLP for each column, where that is known.
    pub mlp: usize,
}

impl Fused {
    /// Rows of each part. Query heads may outnumber the heads of keys and values.
    pub fn rows(&self, input: usize, output: usize) -> Option<Vec<usize>> {
        match self.parts.len() {
            3 => {
                let rest = output.checked_sub(input).filter(|rest| *rest > 0 && rest % 2 == 0)?;
                Some(vec![input, rest / 2, rest / 2])
            }
            _ => {
                let mlp = output.checked_sub(3 * input).filter(|mlp| *mlp > 0)?;
                Some(vec![input, input, input, mlp])
            }
        }
    }

    /// Rows of a part that no layer adapts, by those that are.
    pub fn missing(&self, i: usize, input: usize, known: &BTreeMap<usize, usize>) -> usize {
        match i {
            0 => input,
            1 | 2 => *known.get(&(3 - i)).unwrap_or(&input),
            _ => self.mlp * input,
        }
    }
}

/// The names of one family. `{}` stands for the number of a block.
pub(super) struct Table {
    /// Native, and as diffusers has it.
    names: &'static [(&'static str, &'static str)],
    /// Further names that are read, and what they stand for.
    aliases: &'static [(&'static str, &'static str)],
    fused: &'static [Fused],
    /// What diffusers calls modules in this family alone.
    own: &'static [(&'static str, &'static str)],
}

const TABLES: &[&Table] = &[
    &flux::TABLE,
    &hunyuan_video::TABLE,
    &sd3::TABLE,
    &wan::TABLE,
    &z_image::TABLE,
    &krea::TABLE,
    &flux::TABLE_2,
    &qwen::TABLE,
];

/// Where a layer is written: a dotted path, and which part of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub path: String,
    pub part: Option<(usize, &'static Fused)>,
}

/// The flat name in diffusers' spelling of a flat name in any, and whose names it is in, if that can be seen.
pub(super) fn canonical<'a>(component: &str, flat: &'a str) -> (Cow<'a, str>, Option<Names>) {
    if !component.is_empty() {
        return text::canonical(flat);
    }
    if let Some(name) = unet::from_sgm(flat) {
        return (name.into(), Some(Names::Native));
    }
    if let Some(name) = unet::from_processor(flat) {
        return (name.into(), Some(Names::Processor));
    }
    for (native, diffusers) in flux::XLABS {
        if let Some(blocks) = capture(native, flat) {
            return (flat_of(&fill(diffusers, &blocks)).into(), Some(Names::Xlabs));
        }
    }
    for table in TABLES {
        let rows =
            [(table.names, Some(Names::Native)), (table.aliases, None), (table.own, Some(Names::Diffusers))];
        for (rows, names) in rows {
            for (other, diffusers) in rows {
                if let Some(blocks) = capture(other, flat) {
                    let key = flat_of(&fill(diffusers, &blocks));
                    let names = if key == flat { None } else { names };
                    return (key.into(), names);
                }
            }
        }
    }
    let known = |name: &str| capture(name, flat).is_some();
    let is_diffusers = unet::is_diffusers(flat)
        || TABLES.iter().any(|t| {
            t.names.iter().any(|(_, d)| known(d)) || t.fused.iter().any(|f| f.parts.iter().any(|p| known(p)))
        });
    (flat.into(), is_diffusers.then_some(Names::Diffusers))
}

/// Whether a flat name in diffusers' spelling is of a UNet's block.
pub(super) fn is_unet_block(flat: &str) -> bool {
    unet::is_diffusers(flat)
}

/// The parts of a fused module, by its flat name in diffusers' spelling, and their names.
pub(super) fn fused(family: Family, key: &str) -> Option<(&'static Fused, Vec<String>)> {
    family.table()?.fused.iter().find_map(|fused| {
        let blocks = capture(fused.whole, key)?;
        Some((fused, fused.parts.iter().map(|part| fill(part, &blocks)).collect()))
    })
}

/// Flat names, in diffusers' spelling, of what a module fuses, whatever the family; none if it does not.
pub(super) fn fused_in(key: &str) -> Vec<String> {
    let mut fused = TABLES.iter().flat_map(|table| table.fused);
    let parts = fused.find_map(|fused| Some((fused, capture(fused.whole, key)?)));
    parts.map_or_else(Vec::new, |(fused, blocks)| {
        fused.parts.iter().map(|part| flat_of(&fill(part, &blocks))).collect()
    })
}

impl Family {
    /// The name that people use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Generic => "unknown",
            Self::Sd1 => "Stable Diffusion 1",
            Self::Sd2 => "Stable Diffusion 2",
            Self::Sdxl => "SDXL",
            Self::Sd3 => "Stable Diffusion 3",
            Self::Flux1 => "FLUX.1",
            Self::Flux2 => "FLUX.2",
            Self::HunyuanVideo => "HunyuanVideo",
            Self::QwenImage => "Qwen-Image",
            Self::ZImage => "Z-Image",
            Self::Wan => "Wan",
            Self::Krea2 => "Krea 2",
        }
    }

    /// Whether it is a UNet, which diffusers calls `unet`, and not a transformer.
    pub(super) fn is_unet(self) -> bool {
        matches!(self, Self::Sd1 | Self::Sd2 | Self::Sdxl)
    }

    fn table(self) -> Option<&'static Table> {
        Some(match self {
            Self::Flux1 => &flux::TABLE,
            Self::Flux2 => &flux::TABLE_2,
            Self::HunyuanVideo => &hunyuan_video::TABLE,
            Self::Sd3 => &sd3::TABLE,
            Self::Wan => &wan::TABLE,
            Self::ZImage => &z_image::TABLE,
            Self::Krea2 => &krea::TABLE,
            Self::QwenImage => &qwen::TABLE,
            Self::Generic | Self::Sd1 | Self::Sd2 | Self::Sdxl => return None,
        })
    }

    /// Whether its modules have native names besides those of diffusers.
    pub(super) fn has_native(self) -> bool {
        self.is_unet() || self.table().is_some_and(|table| !table.names.is_empty())
    }

    /// Whose names files of a format have.
    pub(super) fn names(self, format: Format) -> Names {
        match (format, self) {
            (Format::Xlabs, _) => Names::Xlabs,
            (Format::Peft, _) | (Format::Kohya, Self::Sd1 | Self::Sd2) => Names::Diffusers,
            // Of Z-Image, tools have those of diffusers rather than its fused ones.
            (_, family) if family == Self::ZImage || !family.has_native() => Names::Diffusers,
            (Format::Kohya | Format::Comfyui | Format::Bfl, _) => Names::Native,
        }
    }

    /// What a layer of the main model is called, by its key; `None` if there is no such name.
    pub(super) fn place(self, key: &str, names: Names) -> Option<Place> {
        let whole = |path| Some(Place { path, part: None });
        match names {
            Names::Diffusers => {
                let own = self.table().into_iter().flat_map(|table| table.own);
                let renamed = find(own.map(|(name, key)| (*key, *name)), key);
                whole(renamed.unwrap_or_else(|| unflatten(key)))
            }
            Names::Native if self.is_unet() => whole(unet::to_sgm(key, self == Self::Sdxl)?),
            Names::Native => self.placed(key, self.table()?.names),
            Names::Xlabs if self == Self::Flux1 => self.placed(key, flux::XLABS),
            Names::Xlabs | Names::Processor => None,
        }
    }

    fn placed(self, key: &str, names: &[(&'static str, &'static str)]) -> Option<Place> {
        let named = |key: &str| find(names.iter().map(|(name, key)| (*key, *name)), key);
        if let Some(path) = named(key) {
            return Some(Place { path, part: None });
        }
        let (whole, i, fused) = self.whole(key)?;
        Some(Place { path: named(&whole)?, part: Some((i, fused)) })
    }

    /// The flat name of the module that a layer is fused in, in diffusers' spelling, and which part of it it is.
    pub(super) fn whole(self, key: &str) -> Option<(String, usize, &'static Fused)> {
        let fused = self.table()?.fused.iter();
        let mut parts = fused.flat_map(|f| f.parts.iter().enumerate().map(move |(i, part)| (f, i, *part)));
        parts.find_map(|(fused, i, part)| Some((flat_of(&fill(fused.whole, &capture(part, key)?)), i, fused)))
    }

    /// Whether native B has the two halves of its rows the other way round: scale and shift.
    pub(super) fn swaps(self, key: &str, input: usize, output: usize) -> bool {
        match self {
            Self::Flux1 | Self::Flux2 | Self::HunyuanVideo => key == "norm_out_linear",
            Self::Sd3 => {
                key == "norm_out_linear" || (key.ends_with("_norm1_context_linear") && output == 2 * input)
            }
            _ => false,
        }
    }

    /// The kernel of a convolution whose file stores its inputs flat.
    pub(super) fn kernel(self, key: &str, input: usize) -> Option<Vec<usize>> {
        if self.is_unet() { unet::kernel(key, input, self != Self::Sdxl) } else { None }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What recognising a family takes of a layer: its key, its name as the file has it, and its widths.
pub(super) struct Clue<'a> {
    pub component: &'a str,
    pub key: &'a str,
    pub flat: &'a str,
    pub input: usize,
    pub output: usize,
}

/// The family of a file's layers.
pub(super) fn recognise(clues: &[Clue], metadata: &BTreeMap<String, String>) -> Family {
    let any = |of: &dyn Fn(&Clue) -> bool| clues.iter().any(of);
    let main = |of: &dyn Fn(&Clue) -> bool| any(&|c| c.component.is_empty() && of(c));
    let starts = |start: &str| main(&|c| c.key.starts_with(start));
    let has = |pattern: &str| main(&|c| capture(pattern, c.key).is_some());
    let said = said(metadata);
    if main(&|c| unet::is_diffusers(c.key)) {
        let second = any(&|c| c.component == "text_encoder_2");
        return unet::recognise(clues, second, said);
    }
    if has("blocks.{}.attn.wq")
        || has("blocks.{}.attn.wo")
        || has("blocks.{}.attn.gate")
        || starts("txtfusion")
    {
        return Family::Krea2;
    }
    if ["blocks.{}.attn1.to_q", "blocks.{}.attn1.to_v", "blocks.{}.attn2.to_q", "blocks.{}.ffn.net.0.proj"]
        .iter()
        .any(|pattern| has(pattern))
    {
        return Family::Wan;
    }
    if has("layers.{}.attention.to_qkv")
        || has("layers.{}.attention.to_q")
        || has("layers.{}.attention.to_v")
        || has("layers.{}.feed_forward.w1")
    {
        return Family::ZImage;
    }
    let qwen = ["img_mlp", "txt_mlp", "img_mod", "txt_mod"];
    if main(&|c| c.key.starts_with("transformer_blocks_") && qwen.iter().any(|part| c.flat.contains(part)))
        && !main(&|c| c.flat.starts_with("double_blocks_"))
    {
        return Family::QwenImage;
    }
    if main(&|c| c.flat.starts_with("joint_blocks_")) {
        return Family::Sd3;
    }
    let native = main(&|c| c.flat.starts_with("double_blocks_") || c.flat.starts_with("single_blocks_"));
    let blocks = |start: &str| {
        let number = |c: &Clue| c.key.strip_prefix(start)?.split('_').next()?.parse::<usize>().ok();
        let numbers = clues.iter().filter(|c| c.component.is_empty()).filter_map(number);
        numbers.max().map_or(0, |n| n.saturating_add(1))
    };
    if native || starts("single_transformer_blocks_") {
        let fused = |c: &Clue| c.flat.ends_with("_attn_to_qkv_mlp_proj");
        // Kinds of adapters that do not store them have no widths.
        let wide = |c: &Clue| {
            c.input > 0
                && (c.key.ends_with("_attn_to_qkv_mlp_proj") && c.output == 9 * c.input
                    || c.key.ends_with("_ff_net_0_proj") && c.output == 6 * c.input)
        };
        let modulation = |c: &Clue| c.key.contains("_stream_modulation");
        if said == Some(Family::Flux2)
            || main(&|c| fused(c) || wide(c) || modulation(c) || c.flat.ends_with("_ff_linear_in"))
            || blocks("single_transformer_blocks_") > 40
        {
            return Family::Flux2;
        }
        let refiner = starts("context_embedder_token_refiner") || starts("context_embedder_proj_in");
        let video = |c: &Clue| c.flat.contains("_mlp_fc1") || c.flat.contains("_mod_linear");
        if said == Some(Family::HunyuanVideo)
            || refiner
            || main(&video)
            || blocks("transformer_blocks_") > 19
            || blocks("single_transformer_blocks_") > 38
        {
            return Family::HunyuanVideo;
        }
        return Family::Flux1;
    }
    // Double blocks alone have the same names in several families, but not the same number.
    let joint = main(&|c| c.key.ends_with("_attn_add_q_proj") || c.key.ends_with("_attn_to_add_out"));
    let counted = match blocks("transformer_blocks_") {
        19 => Some(Family::Flux1),
        20 => Some(Family::HunyuanVideo),
        24 | 38 => Some(Family::Sd3),
        60 => Some(Family::QwenImage),
        _ => None,
    };
    match said.or(counted.filter(|_| joint)) {
        Some(family) => family,
        None => {
            let clip_g = any(&|c| c.component == "text_encoder_2" && c.key.starts_with("text_model"));
            let t5 = any(&|c| c.key.starts_with("encoder_block_"));
            match (main(&|_| true), clip_g, t5) {
                (false, true, false) => Family::Sdxl,
                (false, true, true) => Family::Sd3,
                (false, false, true) => Family::Flux1,
                _ => Family::Generic,
            }
        }
    }
}

/// The family that the metadata names.
fn said(metadata: &BTreeMap<String, String>) -> Option<Family> {
    let keys = ["modelspec.architecture", "ss_base_model_version"];
    keys.iter().filter_map(|key| metadata.get(*key)).find_map(|text| {
        let text = text.to_ascii_lowercase();
        let families = [
            ("stable-diffusion-xl", Family::Sdxl),
            ("sdxl", Family::Sdxl),
            ("stable-diffusion-v1", Family::Sd1),
            ("sd_v1", Family::Sd1),
            ("stable-diffusion-v2", Family::Sd2),
            ("sd_v2", Family::Sd2),
            ("stable-diffusion-3", Family::Sd3),
            ("stable-diffusion-v3", Family::Sd3),
            ("sd3", Family::Sd3),
            ("flux-2", Family::Flux2),
            ("flux.2", Family::Flux2),
            ("flux2", Family::Flux2),
            ("flux", Family::Flux1),
            ("hunyuan-video", Family::HunyuanVideo),
            ("hunyuanvideo", Family::HunyuanVideo),
            ("qwen-image", Family::QwenImage),
            ("qwen_image", Family::QwenImage),
            ("z-image", Family::ZImage),
            ("z_image", Family::ZImage),
            ("zimage", Family::ZImage),
            ("wan2", Family::Wan),
            ("wan-", Family::Wan),
            ("krea2", Family::Krea2),
            ("krea-2", Family::Krea2),
        ];
        families.iter().find(|(name, _)| text.contains(name)).map(|(_, family)| *family)
    })
}

/// The numbers that stand for `{}` if the name is of this pattern; dots and underscores are one.
pub(super) fn capture<'a>(pattern: &str, name: &'a str) -> Option<Vec<&'a str>> {
    let mut numbers = Vec::new();
    let mut rest = name;
    for (i, text) in pattern.split("{}").enumerate() {
        if i > 0 {
            let len = rest.bytes().take_while(u8::is_ascii_digit).count();
            if len == 0 {
                return None;
            }
            numbers.push(&rest[..len]);
            rest = &rest[len..];
        }
        let same = |(x, y): (u8, u8)| x == y || (x == b'.' && y == b'_') || (x == b'_' && y == b'.');
        if rest.len() < text.len() || !text.bytes().zip(rest.bytes()).all(same) {
            return None;
        }
        // What was compared is ASCII.
        rest = &rest[text.len()..];
    }
    rest.is_empty().then_some(numbers)
}

fn fill(pattern: &str, numbers: &[&str]) -> String {
    let mut parts = pattern.split("{}");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.zip(numbers).fold(first, |path, (part, number)| path + number + part)
}

fn flat_of(path: &str) -> String {
    path.replace('.', "_")
}

/// The second name of the pair whose first one is the key.
fn find<'a>(mut pairs: impl Iterator<Item = (&'a str, &'a str)>, key: &str) -> Option<String> {
    pairs.find_map(|(from, to)| Some(fill(to, &capture(from, key)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> impl Iterator<Item = (&'static str, &'static str)> {
        let tables = TABLES.iter().flat_map(|t| t.names.iter().chain(t.aliases).chain(t.own));
        tables.chain(flux::XLABS).copied()
    }

    #[test]
    fn no_name_means_two_things() {
        for (name, diffusers) in rows() {
            let (name, key) = (flat_of(&fill(name, &["7", "3"])), flat_of(&fill(diffusers, &["7", "3"])));
            assert_eq!(canonical("", &name).0, key, "{name}");
            assert_eq!(canonical("", &key).0, key, "{key} is another name as well");
        }
    }

    #[test]
    fn native_names_come_back() {
        for family in
            [Family::Flux1, Family::Flux2, Family::HunyuanVideo, Family::Sd3, Family::Wan, Family::ZImage]
        {
            let table = family.table().unwrap();
            for (native, diffusers) in table.names {
                let (path, key) = (fill(native, &["7"]), flat_of(&fill(diffusers, &["7"])));
                let place = family.place(&key, Names::Native).unwrap();
                assert_eq!(place, Place { path, part: None }, "{family}: {key}");
            }
            for fused in table.fused {
                for (i, part) in fused.parts.iter().enumerate() {
                    let key = flat_of(&fill(part, &["7"]));
                    let place = family.place(&key, Names::Native).unwrap();
                    assert_eq!(place.part, Some((i, fused)), "{family}: {key}");
                    assert_eq!(family.place(&key, Names::Diffusers).unwrap().path, fill(part, &["7"]));
                }
            }
        }
    }

    #[test]
    fn dots_come_back_in_every_table() {
        for (_, diffusers) in TABLES.iter().flat_map(|t| t.names) {
            let path = fill(diffusers, &["12"]);
            assert_eq!(unflatten(&flat_of(&path)), path);
        }
    }

    #[test]
    fn rows_of_fused_modules() {
        let qkv = Fused { whole: "", parts: &["q", "k", "v"], mlp: 0 };
        assert_eq!(qkv.rows(4, 12), Some(vec![4, 4, 4]));
        assert_eq!(qkv.rows(8, 12), Some(vec![8, 2, 2]));
        assert_eq!((qkv.rows(8, 8), qkv.rows(8, 11)), (None, None));
        let linear1 = Fused { whole: "", parts: &["q", "k", "v", "mlp"], mlp: 4 };
        assert_eq!(linear1.rows(3072, 21504), Some(vec![3072, 3072, 3072, 12288]));
        assert_eq!(linear1.rows(4, 12), None);
    }

    #[test]
    fn patterns_capture_numbers() {
        assert_eq!(capture("a.{}.b", "a_12_b"), Some(vec!["12"]));
        assert_eq!(capture("a.{}.b", "a_12_c"), None);
        assert_eq!(capture("a.{}.b", "a_x_b"), None);
        assert_eq!(capture("a.{}.{}", "a_1_2"), Some(vec!["1", "2"]));
        assert_eq!(capture("a.{}", "a_1é"), None);
    }
}
