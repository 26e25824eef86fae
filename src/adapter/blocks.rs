//! Strengths by layer: by name, or by block as users of A1111's `lora-block-weight` list them.

use std::fmt;

use super::families::{self, Family, Names};
use super::{Adapter, Format, Layer};
use crate::words::count;
use crate::{Error, Result};

/// Factors on the scales of an adapter's layers. The last one that a layer matches counts, after those of blocks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Strengths {
    /// Factors on the layers whose name matches: `*` stands for anything, dots and underscores are one.
    pub by_name: Vec<(String, f64)>,
    /// Factors on blocks, in the order of [`BlockPreset::names`]: 17 or 26 for Stable Diffusion 1 and 2, 12 or 20 for XL,
    /// 61 for FLUX.1, one for each block and one for the rest for others.
    pub by_block: Option<Vec<f64>>,
}

/// The blocks of a list of strengths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockPreset {
    names: Vec<String>,
}

/// The blocks of a list, for the families of these ids.
struct Listed {
    families: &'static [&'static str],
    names: &'static [&'static str],
}

const SD: &[&str] = &["sd1", "sd2"];
const XL: &[&str] = &["sdxl"];
const FLUX: &[&str] = &["flux1"];

/// The lists that users of A1111 know: of files without convolutions, and with them. BASE is what is in no block, text
/// encoders among it.
const PRESETS: &[Listed] = &[
    Listed {
        families: SD,
        names: &[
            "BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", "OUT03", "OUT04", "OUT05",
            "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11",
        ],
    },
    Listed {
        families: SD,
        names: &[
            "BASE", "IN00", "IN01", "IN02", "IN03", "IN04", "IN05", "IN06", "IN07", "IN08", "IN09", "IN10",
            "IN11", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08",
            "OUT09", "OUT10", "OUT11",
        ],
    },
    Listed {
        families: XL,
        names: &[
            "BASE", "IN04", "IN05", "IN07", "IN08", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04",
            "OUT05",
        ],
    },
    Listed {
        families: XL,
        names: &[
            "BASE", "IN00", "IN01", "IN02", "IN03", "IN04", "IN05", "IN06", "IN07", "IN08", "M00", "OUT00",
            "OUT01", "OUT02", "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08",
        ],
    },
    Listed {
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
        let mut lists = Self::all(family);
        if let Some(i) = lists.iter().position(|preset| blocks.is_none_or(|n| preset.names.len() == n)) {
            return Ok(lists.swap_remove(i));
        }
        let lengths: Vec<_> = lists.iter().map(|p| p.names.len().to_string()).collect();
        let n = blocks.unwrap_or(0);
        Err(Error::Invalid(match lengths[..] {
            [] => format!("there are no block strengths for this model ({family}); give strengths by name"),
            _ => format!(
                "{}, but for {family} a list has {} of them",
                count(n, "block strength"),
                lengths.join(" or ")
            ),
        }))
    }

    /// The lists of a family, which its models may have of different lengths.
    fn all(family: Family) -> Vec<Self> {
        let Some(record) = family.record() else { return Vec::new() };
        let listed = PRESETS.iter().filter(|preset| preset.families.contains(&record.id));
        let listed = listed.map(|preset| preset.names.iter().map(|name| (*name).to_owned()).collect());
        let mut lists: Vec<Vec<String>> = listed.collect();
        if lists.is_empty() {
            let of_model = |model: usize| {
                let blocks = record.stacks.iter().flat_map(|(letter, stack)| {
                    let start = format!("{stack}.{{}}.");
                    let rows = record.rows.iter().filter(|row| row.path().starts_with(&start));
                    let count = rows.map(|row| row.count(model)).max().unwrap_or(0);
                    (0..count).map(move |n| named(letter, n))
                });
                std::iter::once("BASE".to_owned()).chain(blocks).collect::<Vec<_>>()
            };
            lists = (0..record.models.len()).map(of_model).filter(|list| list.len() > 1).collect();
            lists.sort_by_key(Vec::len);
            lists.dedup();
        }
        lists.into_iter().map(|names| Self { names }).collect()
    }

    /// The strengths of a named list for a family: `ALL`, `NONE`, `INS`, `IND`, `INALL`, `MIDD`, `OUTD`, `OUTS`,
    /// `OUTALL`, and for families of double and single blocks `DOUBLE` and `SINGLE`.
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
                let base = ["BASE", "CLIP", "T5"].contains(&block.as_str());
                f64::from(u8::from(base || on.iter().any(|on| has(block, on))))
            })
            .collect();
        if on.iter().all(|on| !names.iter().any(|block| has(block, on))) {
            return Err(Error::Invalid(format!("there is no list of block strengths `{name}` for {family}")));
        }
        Ok(strengths)
    }

    /// Names of the blocks, in the order of the strengths.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The place of a layer's block; `None` if the list has none for it.
    fn place(&self, layer: &Layer) -> Option<usize> {
        let block = block(layer);
        self.names.iter().position(|name| *name == block)
    }
}

fn named(kind: &str, n: usize) -> String {
    format!("{kind}{n:02}")
}

/// The block that a layer is in.
pub(super) fn block(layer: &Layer) -> String {
    let (key, component, family) = (layer.key.flat(), layer.key.component(), layer.family);
    let number = |start: &str, path: &str| -> Option<usize> {
        path.strip_prefix(start)?.split(['.', '_']).next()?.parse().ok()
    };
    if family.all_agree(|record| Some(record.is_unet())) == Some(true) {
        let path = family.place(component, key, Format::Comfyui, Some(Names::Native), layer.widths());
        let path = path.ok().filter(|_| component.is_empty()).map(|place| place.path).unwrap_or_default();
        if path.starts_with("middle_block.") {
            return named("M", 0);
        }
        let input = number("input_blocks.", &path).map(|n| named("IN", n));
        return input
            .or(number("output_blocks.", &path).map(|n| named("OUT", n)))
            .unwrap_or("BASE".to_owned());
    }
    if families::is_encoder(component) {
        let listed = family.record().is_some_and(|record| FLUX.contains(&record.id));
        return match component {
            "text_encoder_3" if listed => "T5",
            _ if listed => "CLIP",
            _ => "BASE",
        }
        .to_owned();
    }
    if family.record().is_none_or(|record| FLUX.contains(&record.id)) {
        let double = number("transformer_blocks_", key).map(|n| named("D", n));
        let single = || number("single_transformer_blocks_", key).map(|n| named("S", n));
        let out = ["proj_out", "norm_out_linear"].contains(&key);
        return double.or_else(single).unwrap_or(if out { "OUT" } else { "IN" }.to_owned());
    }
    let stacks = family.record().map_or(&[][..], |record| &record.stacks);
    let in_stack = |(letter, stack): &(&str, &str)| {
        number(&format!("{}_", stack.replace('.', "_")), key).map(|n| named(letter, n))
    };
    stacks.iter().find_map(in_stack).unwrap_or("BASE".to_owned())
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
        let preset: Option<(BlockPreset, &Vec<f64>)> = match &self.by_block {
            Some(blocks) => Some((BlockPreset::of(adapter.family(), Some(blocks.len()))?, blocks)),
            None => None,
        };
        let mut outside = 0;
        let layers = adapter.layers().iter().map(|layer| {
            let by_block = preset.as_ref().and_then(|(preset, blocks)| {
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
                "`{}`: {} in no block of the list, at strength 1",
                adapter.name(),
                count(outside, "layer")
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
