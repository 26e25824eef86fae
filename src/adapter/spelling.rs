//! How files spell their layers, and how an adapter is to be spelled.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::families::Names;
use super::{Format, Layer};

/// How a file spells a layer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Spelling {
    pub format: Format,
    /// Whose names modules have; none where that is not known.
    pub names: Option<Names>,
    /// What follows the module's name in the keys of A and B.
    pub a: Cow<'static, str>,
    pub b: Cow<'static, str>,
    /// Whether there are alpha tensors.
    pub alpha: bool,
}

impl Spelling {
    /// As files of this format are usually written.
    pub fn standard(format: Format, names: Option<Names>) -> Self {
        let (a, b) = match format {
            Format::Kohya => (".lora_down.weight", ".lora_up.weight"),
            Format::Xlabs => (".down.weight", ".up.weight"),
            Format::Peft | Format::Comfyui | Format::Bfl => (".lora_A.weight", ".lora_B.weight"),
        };
        // ComfyUI takes an alpha, but diffusers, which reads such files too, refuses it for some models.
        Self { format, names, a: a.into(), b: b.into(), alpha: format == Format::Kohya }
    }

    /// Whether module names have no dots.
    pub fn is_flat(&self) -> bool {
        self.format == Format::Kohya
    }
}

/// How an adapter is spelled: most of its layers, and the prefixes of each component.
///
/// Layers of a merge come from several files, and readers drop those that are spelled unlike the rest.
#[derive(Clone, Debug)]
pub(super) struct Usual {
    pub spelling: Arc<Spelling>,
    /// The most frequent prefix of each component.
    pub prefixes: BTreeMap<String, String>,
    /// Every way in which a layer of the adapter is spelled: component, prefix, and whose names.
    ways: BTreeSet<Way>,
}

type Way = (String, String, Option<Names>);

fn way(layer: &Layer) -> Option<Way> {
    let names = layer.spelling.as_ref()?.names;
    Some((layer.key.component().to_owned(), layer.prefix.clone(), names))
}

impl Usual {
    /// Of the layers, whose main ones are of this format, if there are any.
    pub fn of(layers: &[Layer], format: Format) -> Option<Self> {
        let spelled = || layers.iter().filter_map(|l| Some((l, l.spelling.as_ref()?)));
        let of_format = || spelled().filter(|(_, spelling)| spelling.format == format);
        // Text encoders come in fewer spellings; the main model's layers tell more.
        let main = of_format().any(|(l, _)| l.key.component().is_empty());
        let telling = of_format().filter(|(l, _)| !main || l.key.component().is_empty());
        let spelling = most(telling.map(|(_, spelling)| spelling))?.clone();
        let mut prefixes: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (layer, own) in of_format() {
            // A prefix goes with the names: `base_model.model.` with native ones is no PEFT of diffusers.
            if own.names == spelling.names || !layer.key.component().is_empty() {
                prefixes.entry(layer.key.component()).or_default().push(&layer.prefix);
            }
        }
        let prefixes =
            prefixes.into_iter().filter_map(|(c, p)| Some((c.to_owned(), (*most(p.iter())?).to_owned())));
        let prefixes = prefixes.collect();
        Some(Self { spelling, prefixes, ways: layers.iter().filter_map(way).collect() })
    }

    /// Whether layers of the adapter are spelled like this one.
    pub fn has(&self, layer: &Layer) -> bool {
        way(layer).is_some_and(|way| self.ways.contains(&way))
    }
}

/// The most frequent item; of several, the last.
fn most<T: Ord>(items: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: BTreeMap<T, usize> = BTreeMap::new();
    items.for_each(|item| *counts.entry(item).or_default() += 1);
    counts.into_iter().max_by_key(|(_, n)| *n).map(|(item, _)| item)
}
