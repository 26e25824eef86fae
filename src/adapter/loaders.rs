//! What programs that load LoRAs take: of which model, by which prefix, whose names and which suffix.

use std::collections::BTreeSet;
use std::fmt;

use super::families::record::{Taken, Which};
use super::families::{self, Family, Names, Place};
use super::{Adapter, Format, Layer};

/// A program that loads LoRAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Loader {
    /// diffusers: `pipeline.load_lora_weights`.
    Diffusers,
    /// ComfyUI: its `Load LoRA` nodes.
    Comfyui,
    /// kohya's sd-scripts and musubi-tuner, which go on training with a file.
    Kohya,
}

/// A layer that a loader is not known to take, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotTaken {
    /// The key of the module in the file, without the suffix.
    pub module: String,
    /// Why, as a clause.
    pub reason: String,
}

impl Loader {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Diffusers, Self::Comfyui, Self::Kohya];

    /// The name used on the command line: `diffusers`, `comfyui`, `kohya`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Diffusers => "diffusers",
            Self::Comfyui => "comfyui",
            Self::Kohya => "kohya",
        }
    }

    /// The format that is written for it.
    pub const fn format(self) -> Format {
        match self {
            Self::Diffusers => Format::Peft,
            Self::Comfyui => Format::Comfyui,
            Self::Kohya => Format::Kohya,
        }
    }
}

impl fmt::Display for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Adapter {
    /// The layers that a loader is not known to take by the names that this file has; none if it takes the file whole.
    ///
    /// This compares keys with what the loaders were seen to take whole, and says nothing of widths. A loader may take
    /// some layers all the same.
    pub fn not_taken(&self, loader: Loader) -> Vec<NotTaken> {
        let (family, only_blocks) = (self.family(), self.only_blocks());
        let not_taken = |layer: &Layer| {
            let reason = refused(layer, family, loader, only_blocks)?;
            Some(NotTaken { module: layer.key_in_file(), reason })
        };
        // Parts of a fused module are one key.
        let mut seen = BTreeSet::new();
        let all = self.layers().iter().filter_map(not_taken);
        all.filter(|left| seen.insert(left.module.clone())).collect()
    }

    /// Whether every layer of the main model is in one of several blocks.
    fn only_blocks(&self) -> bool {
        let mut main = self.layers().iter().filter(|layer| !families::is_encoder(layer.key.component()));
        main.all(|layer| layer.family.is_in_block(layer.key.component(), layer.key.flat()))
    }
}

/// Why a loader is not known to take a layer; `None` if it takes it.
fn refused(layer: &Layer, family: Family, loader: Loader, only_blocks: bool) -> Option<String> {
    let family = if layer.family == Family::UNKNOWN { family } else { layer.family };
    let Some(own) = &layer.spelling else { return Some("it is of no file".to_owned()) };
    let ends = (Suffix::of(&own.a), own.alpha);
    if takes(layer, family, loader, Some(ends), only_blocks) {
        return None;
    }
    if family == Family::UNKNOWN {
        return Some("the model is not known".to_owned());
    }
    let format = loader.format();
    if family.writable(format) == Family::UNKNOWN {
        return Some(format!("{loader} has no class for {family}"));
    }
    let place = family.place(layer.key.component(), layer.key.flat(), format, None, layer.widths());
    let prefix = family.prefix(layer.key.component(), format);
    Some(match (place, prefix) {
        (Ok(place), Some(prefix)) => {
            let path = if format == Format::Kohya { place.path.replace('.', "_") } else { place.path };
            let name = format!("{prefix}{path}");
            if name == layer.key_in_file() {
                let alpha = if own.alpha { " and alphas" } else { "" };
                format!("with `{}`{alpha}, by which it is not known to take it", own.a)
            } else {
                format!("it would be `{name}`")
            }
        }
        (Err(reason), _) => format!("it {reason}"),
        (Ok(_), None) => format!("no name of its component is known in {format}"),
    })
}

/// What follows a module's name, as the tables of loaders call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Suffix {
    /// `.lora_A.weight`
    Peft,
    /// `.lora_A.default.weight`
    PeftDefault,
    /// `.lora_down.weight`
    Kohya,
    /// `.lora.down.weight`
    Old,
}

impl Suffix {
    fn of(a: &str) -> Self {
        if a.starts_with(".lora_down") {
            Self::Kohya
        } else if a == ".lora_A.weight" || a == ".lora_A" {
            Self::Peft
        } else if a.starts_with(".lora_A.") {
            Self::PeftDefault
        } else {
            Self::Old
        }
    }

    /// What the records of families call it.
    fn name(self, alphas: bool) -> &'static str {
        match (self, alphas) {
            (Self::Peft, false) => "peft",
            (Self::Peft, true) => "peft+alpha",
            (Self::PeftDefault, _) => "peft_default",
            (Self::Kohya, false) => "kohya",
            (Self::Kohya, true) => "kohya+alpha",
            (Self::Old, _) => "old",
        }
    }
}

/// Whether a loader takes a layer by the name that its file has, among others that are of blocks alone or not. Without
/// suffix and alphas, those of the loader's format.
pub(super) fn takes(
    layer: &Layer,
    family: Family,
    loader: Loader,
    ends: Option<(Suffix, bool)>,
    only_blocks: bool,
) -> bool {
    let Some(names) = layer.spelling.as_ref().and_then(|own| own.names) else { return false };
    let (component, prefix) = (layer.key.component(), layer.prefix.as_str());
    let own_prefix = family.prefix(component, loader.format()).is_some_and(|own| own == prefix);
    if families::is_encoder(component) {
        let flat = layer.key.flat();
        let (clip, language) = (flat.starts_with("text_model_"), flat.starts_with("model_layers_"));
        let whole = names == Names::Diffusers;
        let is = |format| family.prefix(component, format).is_some_and(|own| own == prefix);
        return match loader {
            // CLIP has lost `text_model.` in transformers 5.6, and diffusers reads both.
            Loader::Diffusers => own_prefix && (whole || !layer.module.ends_with("_lora")),
            Loader::Kohya => own_prefix && (whole != language),
            // ComfyUI also knows kohya's prefixes, and CLIP by the names of diffusers.
            Loader::Comfyui => {
                let of = |record: &families::record::Record| {
                    let encoders = record.encoders.iter().filter(|encoder| encoder.component == component);
                    encoders.flat_map(|encoder| &encoder.kohya).any(|own| *own == prefix)
                };
                let kohya = family.all_agree(|record| Some(of(record))) == Some(true);
                (own_prefix && whole) || (kohya && whole != language) || (clip && whole && is(Format::Peft))
            }
        };
    }
    let scope = family.writable(loader.format());
    let family = if scope == Family::UNKNOWN { family } else { scope };
    // The dots have to be where the loader has them.
    let (path, flat) = (layer.path_in_file(), !layer.path_in_file().contains('.'));
    let named = family.place(component, layer.key.flat(), loader.format(), Some(names), layer.widths());
    let is_this = |place: Place| place.path == path || (flat && place.path.replace('.', "_") == path);
    let exact = named.is_ok_and(is_this);
    let (suffix, alphas) = ends.unwrap_or(match loader {
        Loader::Kohya => (Suffix::Kohya, true),
        _ => (Suffix::Peft, false),
    });
    // The name that would be written for it.
    let written = family.place(component, layer.key.flat(), loader.format(), None, layer.widths());
    let usual = match loader {
        Loader::Diffusers => suffix == Suffix::Peft && !alphas,
        Loader::Comfyui => true,
        Loader::Kohya => suffix == Suffix::Kohya,
    };
    if own_prefix && usual && written.is_ok_and(is_this) {
        return true;
    }
    let taken = family.all_agree(|record| {
        let row = record.row_of(component, layer.key.flat());
        // Names that are the same in both spellings are of either.
        let same = row.is_some_and(|row| {
            row.names.iter().filter(|n| n.of != Names::Other).all(|n| n.path == row.path())
        });
        let takes = |taken: &Taken| {
            let marked = row.is_some_and(|row| row.marked);
            let which = match taken.which {
                Which::All => true,
                Which::Blocks => only_blocks,
                Which::MarkedBlocks => only_blocks && marked,
                Which::Marked => marked || (loader == Loader::Comfyui && same),
            };
            let named = taken.names == names || same;
            let ends = taken.suffix.is_none_or(|own| own == suffix.name(alphas));
            named && taken.prefix == prefix && ends && which
        };
        Some(match loader {
            Loader::Diffusers => record.diffusers_takes.iter().any(takes),
            Loader::Comfyui => record.comfyui_takes.iter().any(takes),
            Loader::Kohya => {
                prefix == "lora_unet_" && record.kohya_takes.contains(&names) && suffix == Suffix::Kohya
            }
        })
    });
    exact && taken == Some(true)
}
