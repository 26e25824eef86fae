//! Model families: which models an adapter may be for, and what their modules are called.
//!
//! Everything that is known of a family stands in one file, `<family>.names` ([`record`] tells how); a file more is a
//! family more. Layers are matched by the flat name that diffusers gives a module, or that the model's own code does where
//! diffusers has none, and so `lora_unet_double_blocks_0_img_mlp_0` and `transformer.transformer_blocks.0.ff.net.0.proj` are
//! one layer of FLUX.1.
//!
//! A [`Family`] is the set of all models that the evidence allows. What they agree on is known; on the rest, nothing is
//! guessed.

mod recognise;
pub(super) mod record;

use std::fmt;

pub(super) use self::recognise::{Clue, Recognised, recognise};
pub(super) use self::record::{Fused, Names};
use self::record::{Hit, Record, encoders, fill, flat, having, pattern, records};
use super::{Format, LayerKey};

/// The model that an adapter is for, as far as its file tells: one family, several that it may be for, or none that is
/// known.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Family(u128);

/// What a module's name says.
#[derive(Clone, Debug)]
pub(super) struct Module {
    /// The flat name that its layer is matched by.
    pub key: String,
    /// Whose name it is; none where families that it may be of disagree.
    pub names: Option<Names>,
    /// Whether the halves of its rows are the other way round than those of the key's module.
    pub swap: bool,
    /// What it fuses, and the dotted names that its parts are matched by.
    pub fused: Option<(&'static Fused, Vec<String>)>,
}

/// Where a layer is written: a dotted path, and which part of it.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub path: String,
    pub part: Option<(usize, &'static Fused)>,
    /// Whether the halves of its rows are to change places.
    pub swap: bool,
}

/// Inputs and outputs of a module; zero where they are not known.
pub(super) type Widths = (usize, usize);

impl Family {
    /// None that is known.
    pub const UNKNOWN: Self = Self(0);

    /// Every family that has a record, sorted by its id.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..records().len()).map(|i| Self(1 << i))
    }

    /// The family of this id, such as `flux1` or `z_image`.
    pub fn named(id: &str) -> Option<Self> {
        records().iter().position(|record| record.id == id).map(|i| Self(1 << i))
    }

    /// Whether it is exactly one.
    pub fn is_known(self) -> bool {
        self.0.count_ones() == 1
    }

    /// The id by which [`named`](Self::named) finds it, if it is exactly one.
    pub fn id(self) -> Option<&'static str> {
        self.record().map(|record| record.id)
    }

    /// The families that an adapter may be for: one, several, or none.
    pub fn candidates(self) -> impl Iterator<Item = Self> {
        Self::all().filter(move |family| self.0 & family.0 != 0)
    }

    /// Families that are in both.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The key of a module of this family, in any spelling.
    pub fn key(self, name: &str) -> LayerKey {
        LayerKey::of(self, name)
    }

    pub(super) fn record(self) -> Option<&'static Record> {
        self.is_known().then(|| records().get(self.0.trailing_zeros() as usize)).flatten()
    }

    fn members(self) -> impl Iterator<Item = (Self, &'static Record)> {
        records().iter().enumerate().map(|(i, r)| (Self(1 << i), r)).filter(move |(f, _)| self.0 & f.0 != 0)
    }

    /// Its members, or all families if there are none.
    fn scope(self) -> Self {
        if self == Self::UNKNOWN { Self(u128::MAX) } else { self }
    }

    /// What the members say, if all that say something say the same.
    fn agreed<T>(
        self,
        of: impl Fn(&'static Record) -> Option<T>,
        same: impl Fn(&T, &T) -> bool,
    ) -> Option<T> {
        let mut all = self.members().filter_map(|(_, record)| of(record));
        let first = all.next()?;
        all.all(|other| same(&first, &other)).then_some(first)
    }

    /// Whether a layer is in one of several blocks.
    pub(super) fn is_in_block(self, component: &str, key: &str) -> bool {
        self.all_agree(|record| Some(record.row_of(component, key)?.path().contains("{}"))) == Some(true)
    }

    /// Every key that a family gives to a name.
    pub(super) fn keys(component: &str, name: &str) -> Vec<String> {
        let (key, _) = pattern(name);
        let of = |(family, _): (Self, &Record)| Some(family.module(component, name, None, None)?.key);
        Self(having(&key)).members().filter_map(of).collect()
    }

    /// The flat keys of the parts that some family cuts a module into.
    pub(super) fn parts(component: &str, name: &str) -> Vec<String> {
        let (key, _) = pattern(name);
        let mut all: Vec<String> = Vec::new();
        for (family, _) in Self(having(&key)).members() {
            let fused = family.module(component, name, None, None).and_then(|module| module.fused);
            all.extend(fused.into_iter().flat_map(|(_, parts)| parts).map(|part| flat(&part)));
        }
        all.sort();
        all.dedup();
        all
    }

    /// A property of all members.
    pub(super) fn all_agree<T: PartialEq>(self, of: impl Fn(&'static Record) -> Option<T>) -> Option<T> {
        self.agreed(|record| Some(of(record)), |x, y| x == y).flatten()
    }

    /// What a flat name means. `usual`: whose names the file's other modules have, where a name may be of two.
    pub(super) fn module(
        self,
        component: &str,
        name: &str,
        widths: Option<Widths>,
        usual: Option<Names>,
    ) -> Option<Module> {
        let found = self.named_module(component, name, widths, usual);
        // Attention processors of diffusers of 2023.
        found.or_else(|| {
            let module = self.named_module(component, &processor(name)?, widths, usual)?;
            Some(Module { names: Some(Names::Other), ..module })
        })
    }

    fn named_module(
        self,
        component: &str,
        name: &str,
        widths: Option<Widths>,
        usual: Option<Names>,
    ) -> Option<Module> {
        let (key, numbers) = pattern(name);
        let in_record = |record: &'static Record| {
            let hits = record.find(inventory(component), &key, &numbers);
            best(record, hits, widths, usual).map(|hit| meaning(record, &hit))
        };
        if is_encoder(component) {
            return in_record(encoders());
        }
        let rows = |m: &Module| widths.map(|(i, o)| m.fused.as_ref().map(|(fused, _)| fused.rows(i, o)));
        let parts = |m: &Module| m.fused.as_ref().map(|(_, parts)| parts.clone());
        let same = |x: &Module, y: &Module| {
            (&x.key, x.swap, parts(x), rows(x)) == (&y.key, y.swap, parts(y), rows(y))
        };
        let scope = self.scope().and(Self(having(&key)));
        let agreed = scope.agreed(in_record, same)?;
        let names = scope.agreed(in_record, |x, y| x.names == y.names).and_then(|m| m.names);
        Some(Module { names, ..agreed })
    }

    /// What the layer of a key is called in a format, or there by these names.
    ///
    /// # Errors
    /// Why it has no name there, as a clause that follows the layer's name.
    pub(super) fn place(
        self,
        component: &str,
        key: &str,
        format: Format,
        whose: Option<Names>,
        widths: Widths,
    ) -> Result<Place, String> {
        let writable = self.writable(format);
        let (pattern, numbers) = pattern(key);
        let of_record = |record: &'static Record, names: Names| {
            let mut hits = record.find(inventory(component), &pattern, &numbers);
            hits.retain(|hit| std::ptr::eq(hit.name, &raw const hit.row.names[0]));
            let hit = best(record, hits, Some(widths), None)?;
            let find = |names: Names| hit.row.names.iter().find(|name| name.of == names);
            // Trainers of kohya's also have what only diffusers' code has.
            let spare = format == Format::Kohya && record.kohya_takes.contains(&Names::Diffusers);
            let name = find(names).or_else(|| find(Names::Diffusers).filter(|_| spare))?;
            let part = name.part.map(|(index, fused)| (index, &record.fused[fused]));
            Some(Place { path: fill(name.path, &hit.blocks), part, swap: name.swap })
        };
        if is_encoder(component) {
            let mut place = of_record(encoders(), Names::Diffusers)
                .ok_or("is of a text encoder whose names are not known; choose another format")?;
            // Language models lose their first word in kohya's spelling.
            if format == Format::Kohya
                && let Some(rest) = place.path.strip_prefix("model.layers.")
            {
                place.path = format!("layers.{rest}");
            }
            return Ok(place);
        }
        let place = |record: &'static Record| of_record(record, whose.or_else(|| names(record, format))?);
        let same = |x: &Place, y: &Place| {
            let part = |place: &Place| place.part.map(|(i, fused)| (i, fused.path));
            (&x.path, x.swap, part(x)) == (&y.path, y.swap, part(y))
        };
        let scope = if writable == Self::UNKNOWN { self } else { writable };
        if let Some(place) = scope.agreed(place, same) {
            return Ok(place);
        }
        Err(match self.0.count_ones() {
            0 => format!("is of a model that is not known, and so is what it is called in {format}"),
            _ if writable == Self::UNKNOWN => {
                format!("is of {self}, which has no names in {format}; choose another format")
            }
            1 => format!("is no module of {self} that is known to have a name in {format}"),
            _ => format!("may be of {self}, which do not all have one name for it in {format}"),
        })
    }

    /// The members that can be written in a format; of those, the ones that a program is known to load, if there are any.
    pub(super) fn writable(self, format: Format) -> Self {
        let of = |can: &dyn Fn(&Record) -> bool| {
            Self(self.members().filter(|(_, record)| can(record)).fold(0, |set, (family, _)| set | family.0))
        };
        let all = of(&|record| names(record, format).is_some_and(|names| record.has(names)));
        let loaded = of(&|record| {
            format != Format::Kohya || record.comfyui_takes.iter().any(|taken| taken.prefix == "lora_unet_")
        });
        if all.and(loaded) == Self::UNKNOWN { all } else { all.and(loaded) }
    }

    /// What stands before a module's name, for the loader of a format; `None` if it is not known.
    pub(super) fn prefix(self, component: &str, format: Format) -> Option<String> {
        let writable = self.writable(format);
        let own = |record: &'static Record| {
            let encoder = record.encoders.iter().find(|encoder| encoder.component == component);
            match (format, component) {
                (Format::Peft, "") => record.diffusers_prefix().map(str::to_owned),
                (Format::Kohya, "") => Some("lora_unet_".to_owned()),
                (Format::Comfyui, "") => Some("diffusion_model.".to_owned()),
                (Format::Bfl | Format::Xlabs, "") => Some(String::new()),
                (Format::Peft, "transformer_2") => Some("transformer_2.".to_owned()),
                (Format::Peft, _) if !is_encoder(component) => Some(format!("{component}.")),
                (Format::Peft, _) => encoder.map(|e| format!("{}.", e.diffusers)),
                (Format::Kohya, _) => encoder.and_then(|e| e.kohya.first()).map(|p| (*p).to_owned()),
                (Format::Comfyui, _) => encoder.map(|e| format!("text_encoders.{}.transformer.", e.comfyui)),
                (Format::Bfl | Format::Xlabs, _) => None,
            }
        };
        let scope = if writable == Self::UNKNOWN { self } else { writable };
        match scope.all_agree(own) {
            // Encoders of which no record tells are called as diffusers calls them.
            None if format == Format::Peft && ["text_encoder", "text_encoder_2"].contains(&component) => {
                Some(format!("{component}."))
            }
            prefix => prefix,
        }
    }

    /// The kernel of a convolution whose file stores its inputs flat.
    pub(super) fn kernel(self, key: &str, input: usize) -> Option<Vec<usize>> {
        let (key, numbers) = pattern(key);
        let kernel = |record: &'static Record| {
            let hits = record.find("", &key, &numbers);
            hits.first().and_then(|hit| hit.row.kernel()).map(<[usize]>::to_vec)
        };
        let kernel = self.agreed(kernel, |x, y| x == y)?;
        input.is_multiple_of(kernel.iter().product()).then_some(kernel)
    }

    /// The flat key of the module that fuses a layer in some spelling, which part of it it is, and the module.
    pub(super) fn wholes(self, key: &str) -> Vec<(String, usize, &'static Fused)> {
        let (pattern, numbers) = pattern(key);
        let of = |(_, record): (Self, &'static Record)| {
            let hits = record.find("", &pattern, &numbers);
            let wholes = hits.into_iter().flat_map(move |hit| {
                hit.row.names.iter().filter_map(move |name| {
                    let (index, fused) = name.part?;
                    Some((flat(&fill(name.path, &hit.blocks)), index, &record.fused[fused]))
                })
            });
            wholes.collect::<Vec<_>>()
        };
        self.scope().and(Self(having(&pattern))).members().flat_map(of).collect()
    }
}

impl Record {
    /// What diffusers wants before the names of the main model.
    fn diffusers_prefix(&self) -> Option<&'static str> {
        let mut takes = self.diffusers_takes.iter();
        let is_own = |prefix: &str| prefix == "transformer." || prefix == "unet.";
        let own = takes.find(|t| t.names == Names::Diffusers && t.suffix == Some("peft") && is_own(t.prefix));
        own.map(|taken| taken.prefix)
    }

    /// The row of a layer's key.
    pub(super) fn row_of(&'static self, component: &str, key: &str) -> Option<&'static record::Row> {
        let (pattern, numbers) = pattern(key);
        self.find(inventory(component), &pattern, &numbers).first().map(|hit| hit.row)
    }

    /// Whether it is a UNet, which diffusers calls `unet`, and not a transformer.
    pub(super) fn is_unet(&self) -> bool {
        self.diffusers_prefix() == Some("unet.")
    }
}

/// Whose names files of a format have; `None` if there are no such files of the family.
pub(super) fn names(record: &Record, format: Format) -> Option<Names> {
    match format {
        Format::Peft => Some(Names::Diffusers),
        Format::Kohya => Some(record.kohya),
        Format::Comfyui => Some(Names::Native),
        Format::Bfl => record.bfl.then_some(Names::Native),
        Format::Xlabs => record.xlabs.then_some(Names::Xlabs),
    }
}

/// The module that an attention processor of diffusers of 2023 adapts: `attn1_processor_to_q_lora` is of `attn1_to_q`.
fn processor(name: &str) -> Option<String> {
    let (path, projection) = name.strip_suffix("_lora")?.rsplit_once("_processor_")?;
    match projection {
        "to_q" | "to_k" | "to_v" => Some(format!("{path}_{projection}")),
        "to_out" => Some(format!("{path}_to_out_0")),
        _ => None,
    }
}

/// Whether a component is a text encoder.
pub(super) fn is_encoder(component: &str) -> bool {
    component.starts_with("text_encoder")
}

/// The component whose inventory a component has: there may be two transformers, and all text encoders have one.
fn inventory(component: &str) -> &str {
    if component == "transformer_2" || is_encoder(component) { "" } else { component }
}

/// Whether any family knows the name.
pub(super) fn is_known(component: &str, name: &str) -> bool {
    let (key, numbers) = pattern(name);
    if is_encoder(component) {
        return !encoders().find("", &key, &numbers).is_empty();
    }
    Family(having(&key))
        .members()
        .any(|(_, record)| !record.find(inventory(component), &key, &numbers).is_empty())
}

/// The hit that fits best: by the proportion of its widths, a block that there is, the file's usual names.
fn best<'a>(
    record: &'static Record,
    hits: Vec<Hit<'a>>,
    widths: Option<Widths>,
    usual: Option<Names>,
) -> Option<Hit<'a>> {
    let apart = |hit: &Hit| widths.map_or(0.0, |widths| recognise::apart(record, hit, widths));
    let key = |hit: &Hit| (!hit.models.is_empty(), usual.is_some_and(|usual| hit.name.of == usual));
    // Of several, `max_by` takes the last.
    hits.into_iter().rev().max_by(|x, y| apart(y).total_cmp(&apart(x)).then(key(x).cmp(&key(y))))
}

fn meaning(record: &'static Record, hit: &Hit) -> Module {
    let path = fill(hit.row.path(), &hit.blocks);
    let Some((_, place)) = hit.name.part else {
        let names = Some(hit.name.of);
        return Module { key: flat(&path), names, swap: hit.name.swap, fused: None };
    };
    let fused = &record.fused[place];
    let parts = fused.parts.iter().map(|part| fill(part, &hit.blocks)).collect();
    Module {
        key: flat(&fill(fused.path, &hit.blocks)),
        names: Some(hit.name.of),
        swap: false,
        fused: Some((fused, parts)),
    }
}

impl fmt::Display for Family {
    /// `FLUX.1`, `FLUX.1 or Chroma`, `unknown`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 4;
        let names: Vec<&str> = self.members().map(|(_, record)| record.name).collect();
        match &names[..] {
            [] => f.write_str("unknown"),
            [name] => f.write_str(name),
            [first @ .., last] if names.len() <= SHOWN + 1 => write!(f, "{} or {last}", first.join(", ")),
            _ => write!(f, "{} or one of {} more", names[..SHOWN].join(", "), names.len() - SHOWN),
        }
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Family({self})")
    }
}

#[cfg(test)]
mod tests;
