//! Strengths by layer: by name, or by block as users of A1111's `lora-block-weight` list them.

use std::fmt;

use super::families::{Family, Names};
use super::{Adapter, Layer};
use crate::{Error, Result};

/// Factors on the scales of an adapter's layers. The last one that a layer matches counts, after those of blocks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Strengths {
    /// Factors on the layers whose name matches: `*` stands for anything, dots and underscores are one.
    pub by_name: Vec<(String, f64)>,
    /// Factors on blocks, in the order of [`BlockPreset::names`]: 17 or 26 for Stable Diffusion 1 and 2, 12 or 20 for XL,
    /// 61 for FLUX.1.
    pub by_block: Option<Vec<f64>>,
}

/// The blocks of a list of strengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPreset {
    families: &'static [Family],
    names: &'static [&'static str],
}

const SD: &[Family] = &[Family::Sd1, Family::Sd2];
const XL: &[Family] = &[Family::Sdxl];
const FLUX: &[Family] = &[Family::Flux1];

/// The lists: of files without convolutions, and with them. BASE is what is in no block, text encoders among it.
const PRESETS: &[BlockPreset] = &[
    BlockPreset {
        families: SD,
        names: &[
            "BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", "OUT03", "OUT04", "OUT05",
            "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11",
        ],
    },
    BlockPreset {
        families: SD,
        names: &[
            "BASE", "IN00", "IN01", "IN02", "IN03", "IN04", "IN05", "IN06", "IN07", "IN08", "IN09", "IN10",
            "IN11", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08",
            "OUT09", "OUT10", "OUT11",
        ],
    },
    BlockPreset {
        families: XL,
        names: &[
            "BASE", "IN04", "IN05", "IN07", "IN08", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04",
            "OUT05",
        ],
    },
    BlockPreset {
        families: XL,
        names: &[
            "BASE", "IN00", "IN01", "IN02", "IN03", "IN04", "IN05", "IN06", "IN07", "IN08", "M00", "OUT00",
            "OUT01", "OUT02", "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08",
        ],
    },
    BlockPreset {
        families: FLUX,
        names: &[
            "CLIP", "T5", "IN", "D00", "D01", "D02", "D03", "D04", "D05", "D06", "D07", "D08", "D09", "D10",
            "D11", "D12", "D13", "D14", "D15", "D16", "D17", "D18", "S00", "S01", "S02", "S03", "S04", "S05",
            "S06", "S07", "S08", "S09", "S10", "S11", "S12", "S13", "S14", "S15", "S16", "S17", "S18", "S19",
            "S20", "S21", "S22", "S23", "S24", "S25", "S26", "S27", "S28", "S29", "S30", "S31", "S32", "S33",
            "S34", "S35", "S36", "S37", "OUT",
        ],
    },
];

/// Named lists: the blocks that are on, beside BASE and the text encoders.
const NAMED: &[(&str, &[&str])] = &[
    ("INS", &["IN01", "IN02"]),
    ("IND", &["IN05", "IN07", "IN08"]),
    ("INALL", &["IN*"]),
    ("MIDD", &["IN05", "IN07", "IN08", "M00", "OUT03", "OUT04", "OUT05", "OUT06"]),
    ("OUTD", &["OUT03", "OUT04", "OUT05", "OUT06"]),
    ("OUTS", &["OUT07", "OUT08", "OUT09", "OUT10", "OUT11"]),
    ("OUTALL", &["OUT*"]),
    ("DOUBLE", &["D*"]),
    ("SINGLE", &["S*"]),
];

impl BlockPreset {
    /// The list of this length for a family. Without a length, the shortest.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the lengths that there are.
    pub fn of(family: Family, blocks: Option<usize>) -> Result<Self> {
        let lists = || PRESETS.iter().filter(|preset| preset.families.contains(&family));
        if let Some(preset) = lists().find(|p| blocks.is_none_or(|n| p.names.len() == n)) {
            return Ok(*preset);
        }
        let lengths: Vec<_> = lists().map(|p| p.names.len().to_string()).collect();
        let n = blocks.unwrap_or(0);
        Err(Error::Invalid(match lengths[..] {
            [] => format!("there are no block strengths for this model ({family}); give strengths by name"),
            _ => format!("{n} block strengths, but for {family} a list has {} of them", lengths.join(" or ")),
        }))
    }

    /// The strengths of a named list for a family: `ALL`, `NONE`, `INS`, `IND`, `INALL`, `MIDD`, `OUTD`, `OUTS`,
    /// `OUTALL`, and for FLUX `DOUBLE` and `SINGLE`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the family has no blocks, or none of that name.
    pub fn named(family: Family, name: &str) -> Result<Vec<f64>> {
        let Self { names, .. } = Self::of(family, None)?;
        if let Some(all) = [("ALL", 1.0), ("NONE", 0.0)].iter().find(|(all, _)| *all == name) {
            return Ok(vec![all.1; names.len()]);
        }
        let on = NAMED.iter().find(|(named, _)| *named == name).map_or(&[][..], |(_, on)| on);
        let has = |block: &str, on: &&str| match on.strip_suffix('*') {
            Some(start) => block.strip_prefix(start).is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit())),
            None => block == *on,
        };
        let strengths: Vec<f64> = names
            .iter()
            .map(|block| {
                let base = ["BASE", "CLIP", "T5"].contains(block);
                f64::from(u8::from(base || on.iter().any(|on| has(block, on))))
            })
            .collect();
        if on.iter().all(|on| !names.iter().any(|block| has(block, on))) {
            return Err(Error::Invalid(format!("there is no list of block strengths `{name}` for {family}")));
        }
        Ok(strengths)
    }

    /// Names of the blocks, in the order of the strengths.
    pub fn names(&self) -> &'static [&'static str] {
        self.names
    }

    /// The place of a layer's block; `None` if the list has none for it.
    fn place(&self, layer: &Layer) -> Option<usize> {
        let block = block(layer);
        self.names.iter().position(|name| *name == block)
    }
}

/// The block that a layer is in.
pub(super) fn block(layer: &Layer) -> String {
    let (key, component) = (layer.key.flat(), layer.key.component());
    let number = |start: &str, path: &str| -> Option<usize> {
        path.strip_prefix(start)?.split(['.', '_']).next()?.parse().ok()
    };
    let named = |kind: &str, n: usize| format!("{kind}{n:02}");
    if layer.family.is_unet() {
        let path =
            layer.family.place(key, Names::Native).filter(|_| component.is_empty()).map(|place| place.path);
        let path = path.unwrap_or_default();
        if path.starts_with("middle_block.") {
            return named("M", 0);
        }
        let input = number("input_blocks.", &path).map(|n| named("IN", n));
        return input
            .or(number("output_blocks.", &path).map(|n| named("OUT", n)))
            .unwrap_or("BASE".to_owned());
    }
    match component {
        "" => {
            let double = number("transformer_blocks_", key).map(|n| named("D", n));
            let single = || number("single_transformer_blocks_", key).map(|n| named("S", n));
            let out = ["proj_out", "norm_out_linear"].contains(&key);
            double.or_else(single).unwrap_or(if out { "OUT" } else { "IN" }.to_owned())
        }
        "text_encoder_3" => "T5".to_owned(),
        _ => "CLIP".to_owned(),
    }
}

impl Strengths {
    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty() && self.by_block.is_none()
    }

    /// The layers at their strengths, and what the user should know.
    pub(super) fn apply(&self, adapter: &Adapter) -> Result<(Vec<Layer>, Option<String>)> {
        let invalid = |reason: String| Error::Invalid(format!("`{}`: {reason}", adapter.name()));
        let given = self.by_name.iter().map(|(_, s)| *s).chain(self.by_block.iter().flatten().copied());
        if let Some(bad) = given.into_iter().find(|s| !s.is_finite()) {
            return Err(invalid(format!("a strength is {bad}; it must be a finite number")));
        }
        for (pattern, _) in &self.by_name {
            if !adapter.layers().iter().any(|layer| layer.matches(pattern)) {
                let some = adapter.layers().first().map_or_else(String::new, Layer::name);
                return Err(invalid(format!("no layer is of `{pattern}`; they are named like `{some}`")));
            }
        }
        let preset = match &self.by_block {
            Some(blocks) => Some((BlockPreset::of(adapter.family(), Some(blocks.len()))?, blocks)),
            None => None,
        };
        let mut outside = 0;
        let layers = adapter.layers().iter().map(|layer| {
            let by_block = preset.and_then(|(preset, blocks)| {
                let place = preset.place(layer);
                outside += usize::from(place.is_none());
                blocks.get(place?).copied()
            });
            let named = self.by_name.iter().rev().find(|(pattern, _)| layer.matches(pattern));
            let factor = named.map(|(_, s)| *s).or(by_block).unwrap_or(1.0);
            let mut layer = layer.clone();
            layer.scale.value *= factor;
            layer
        });
        let layers: Vec<Layer> = layers.collect();
        let note = (outside > 0).then(|| {
            format!(
                "`{}`: {outside} layers are in no block of the list, and are at strength 1",
                adapter.name()
            )
        });
        Ok((layers, note))
    }
}

impl fmt::Display for Strengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(blocks) = &self.by_block {
            write!(f, "{}", blocks.iter().map(f64::to_string).collect::<Vec<_>>().join(","))?;
        }
        for (i, (pattern, strength)) in self.by_name.iter().enumerate() {
            let comma = if i > 0 || self.by_block.is_some() { " " } else { "" };
            write!(f, "{comma}{pattern}={strength}")?;
        }
        Ok(())
    }
}
