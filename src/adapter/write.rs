//! From layers to a file.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;

use rayon::prelude::*;

use super::families::{Family, Fused, Place};
use super::loaders::{self, Loader};
use super::scale::ScaleRule;
use super::spelling::{Spelling, Usual};
use super::{Adapter, Format, Kernel, Layer, LayerKey, Tensor, families};
use crate::io::safetensors_file::{FileDtype, TensorOut};
use crate::words::count;
use crate::{Dtype, Error, RawMatrix, Result};

/// How an adapter is written.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// Type of the tensors; by default the adapter's own ([`Adapter::dtype`]).
    pub dtype: Option<Dtype>,
    /// Spelling of the keys; by default the adapter's own ([`Adapter::format`]), with everything that is its file's.
    pub format: Option<Format>,
    /// What becomes of layers that have no known name in that spelling.
    pub unnamed: Unnamed,
    /// Whether an existing file is replaced.
    pub overwrite: bool,
    /// Files (inputs) that are not overwritten even so, nor through another name for them.
    pub protect: Vec<PathBuf>,
    /// The header's metadata, beside what [`Adapter::with_metadata`] set. What says ranks, alphas or hashes is left
    /// out or set to what is right.
    pub metadata: BTreeMap<String, String>,
}

/// What becomes of layers that have no name in the format that is asked for, as far as is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unnamed {
    /// Nothing is written, and the error lists them.
    #[default]
    Refuse,
    /// They keep the name that their file has, with the format's prefix where only that differs. XLabs' format has suffixes
    /// for its own names alone, and so they are refused there.
    Keep,
    /// They are left out.
    LeaveOut,
}

/// Elements converted at a time.
const CHUNK: usize = 1 << 16;

/// How everything is to be spelled.
pub(super) struct Target {
    pub spelling: Arc<Spelling>,
    /// How the adapter's own file spells, if nothing else is asked for.
    own: Option<Usual>,
    family: Family,
    unnamed: Unnamed,
}

/// What a layer is called.
struct Written {
    prefix: String,
    path: String,
    part: Option<(usize, &'static Fused)>,
    swap: bool,
    spelling: Arc<Spelling>,
}

impl Written {
    /// By the name that its file has.
    fn as_read(layer: &Layer, spelling: &Arc<Spelling>) -> Self {
        Self {
            prefix: layer.prefix.clone(),
            path: layer.path_in_file().to_owned(),
            part: layer.part.as_ref().map(|part| (part.index, part.fused)),
            swap: layer.swapped,
            spelling: spelling.clone(),
        }
    }
}

/// A module as it is written: a layer, or several that are fused.
pub(super) struct Module<'a> {
    /// Key of the module, with the prefix of this length.
    pub name: String,
    pub prefix: usize,
    /// How its tensors are called.
    spelling: Arc<Spelling>,
    /// The first of its layers.
    pub layer: &'a Layer,
    /// All of them, with their places in what fuses them.
    pub parts: Vec<(usize, &'a Layer)>,
    fused: Option<&'static Fused>,
    pub rank: usize,
    output: usize,
    /// One above the other.
    a: Vec<&'a Tensor>,
    pieces: Vec<Piece<'a>>,
    /// Whether the halves of the rows of B change places.
    swap: bool,
    b_dtype: Dtype,
    /// What is left for alpha; the rank if everything is folded.
    pub alpha: f64,
    has_alpha: bool,
    /// Whether there is to be no alpha although the spelling has them.
    folded: bool,
}

/// A layer's place in the B of its module.
struct Piece<'a> {
    layer: &'a Layer,
    row: usize,
    col: usize,
    /// What it is multiplied by.
    fold: f64,
}

impl Target {
    pub fn new(adapter: &Adapter, options: &SaveOptions) -> Self {
        let family = adapter.family();
        let unnamed = options.unnamed;
        if let (None, Some(own)) = (options.format, &adapter.0.usual) {
            return Self { spelling: own.spelling.clone(), own: Some(own.clone()), family, unnamed };
        }
        let format = options.format.unwrap_or(adapter.format());
        let names = family.writable(format).all_agree(|record| families::names(record, format));
        Self { spelling: Arc::new(Spelling::standard(format, names)), own: None, family, unnamed }
    }

    /// What a layer is called.
    ///
    /// # Errors
    /// Why no name of it is known, as a clause that follows the layer's name.
    fn written(&self, layer: &Layer) -> Result<Written, String> {
        if let Some(kept) = self.kept(layer) {
            return Ok(kept);
        }
        let (component, format) = (layer.key.component(), self.spelling.format);
        let family = self.family_of(layer);
        let own = self.own.as_ref().and_then(|own| own.spelling.names);
        let place = family.place(component, layer.key.flat(), format, own, layer.widths());
        let usual = self.own.as_ref().and_then(|own| own.prefixes.get(component).cloned());
        let prefix = usual.or_else(|| family.prefix(component, format));
        match (place, prefix) {
            (Ok(Place { path, part, swap }), Some(prefix)) => {
                let path = if self.spelling.is_flat() { path.replace('.', "_") } else { path };
                Ok(Written { prefix, path, part, swap, spelling: self.spelling.clone() })
            }
            (Ok(_), None) => {
                let component = if component.is_empty() { "the main model" } else { component };
                Err(format!("is of {component}, which has no prefix in {format} that is known"))
            }
            (Err(reason), prefix) => {
                // What a program calls a layer of its own is its name; and text encoders have the names of their own
                // code everywhere.
                let free = layer.spelling.is_none() || families::is_encoder(component);
                self.renamed(layer, prefix).filter(|_| free).ok_or(reason)
            }
        }
    }

    /// The family whose names a layer gets.
    fn family_of(&self, layer: &Layer) -> Family {
        match layer.family.and(self.family) {
            Family::UNKNOWN if layer.family == Family::UNKNOWN => self.family,
            Family::UNKNOWN => layer.family,
            both => both,
        }
    }

    /// The name that the layer's file has, if the output takes it.
    fn kept(&self, layer: &Layer) -> Option<Written> {
        let own = layer.spelling.as_ref()?;
        let keeps = match &self.own {
            Some(usual) => usual.has(layer),
            None => own.format == self.spelling.format && self.takes(layer),
        };
        keeps.then(|| Written::as_read(layer, if self.own.is_some() { own } else { &self.spelling }))
    }

    /// Whether the loader of the format takes a layer by the name that its file has.
    fn takes(&self, layer: &Layer) -> bool {
        let (format, family) = (self.spelling.format, self.family_of(layer));
        let usual = family.prefix(layer.key.component(), format);
        if !layer.known {
            // There is nothing to rename it to.
            return usual
                .map_or(family == Family::UNKNOWN && !layer.prefix.is_empty(), |p| p == layer.prefix);
        }
        match format {
            Format::Peft => loaders::takes(layer, family, Loader::Diffusers, None, false),
            Format::Comfyui => loaders::takes(layer, family, Loader::Comfyui, None, false),
            // kohya's own tools have other names of their own for some models.
            Format::Kohya => usual.is_some_and(|prefix| prefix == layer.prefix),
            Format::Bfl | Format::Xlabs => {
                layer.spelling.as_ref().map(|s| s.names) == Some(self.spelling.names)
            }
        }
    }

    /// The file's name of a layer after the output's prefix, if only dots and prefixes tell spellings apart.
    fn renamed(&self, layer: &Layer, prefix: Option<String>) -> Option<Written> {
        let main = layer.key.component().is_empty();
        let usual = match self.spelling.format {
            Format::Kohya => "lora_unet_",
            Format::Peft => "transformer.",
            Format::Comfyui => "diffusion_model.",
            Format::Bfl | Format::Xlabs => "",
        };
        let prefix = prefix.or_else(|| main.then(|| usual.to_owned()))?;
        let dotted = layer.module.contains('.') || layer.spelling.is_none();
        let path = match self.spelling.is_flat() {
            true => layer.module.replace('.', "_"),
            false if dotted => layer.module.clone(),
            // Where the dots are, all models that it may be of may agree on all the same.
            false => {
                let (component, key) = (layer.key.component(), layer.key.flat());
                let place = self.family_of(layer).place(component, key, Format::Peft, None, layer.widths());
                place.ok().map(|place| place.path).filter(|p| p.replace('.', "_") == layer.module)?
            }
        };
        Some(Written { prefix, path, part: None, swap: false, spelling: self.spelling.clone() })
    }

    /// What a layer is called that has no known name: what its file calls it.
    fn unknown(&self, layer: &Layer) -> Written {
        let family = self.family_of(layer);
        let prefix = family.prefix(layer.key.component(), self.spelling.format);
        // What stands beside the model, without a prefix that says what it is, keeps its name whole.
        let beside = layer.prefix.is_empty() && layer.spelling.is_some() && !layer.known;
        let same = beside || layer.format() == Some(self.spelling.format);
        self.renamed(layer, prefix)
            .filter(|_| !same)
            .unwrap_or_else(|| Written::as_read(layer, &self.spelling))
    }

    /// What each layer is called; none of those that are left out.
    fn all<'a>(&self, layers: &'a [Layer]) -> Result<Vec<(&'a Layer, Written)>> {
        let mut all = Vec::with_capacity(layers.len());
        let mut refused = Vec::new();
        for layer in layers {
            match (self.written(layer), self.unnamed) {
                (Ok(written), _) => all.push((layer, written)),
                // XLabs' suffixes belong to its own names: what has another could be read by nobody.
                (Err(reason), Unnamed::Keep)
                    if self.own.is_none() && self.spelling.format == Format::Xlabs =>
                {
                    refused.push((layer, reason));
                }
                (Err(_), Unnamed::Keep) => all.push((layer, self.unknown(layer))),
                (Err(_), _) if self.own.is_some() => all.push((layer, self.unknown(layer))),
                (Err(_), Unnamed::LeaveOut) => {}
                (Err(reason), Unnamed::Refuse) => refused.push((layer, reason)),
            }
        }
        match &refused[..] {
            [] if all.is_empty() => {
                let format = self.spelling.format;
                Err(Error::Invalid(format!("no layer has a name in {format} that is known; nothing is left")))
            }
            [] => Ok(all),
            refused => Err(unnamed(refused, layers.len(), self.spelling.format)),
        }
    }
}

/// Lists layers that have no known name.
fn unnamed(refused: &[(&Layer, String)], layers: usize, format: Format) -> Error {
    const SHOWN: usize = 8;
    let (first, reason) = &refused[0];
    let mut names: Vec<String> =
        refused.iter().take(SHOWN).map(|(layer, _)| format!("`{}`", layer.key_in_file())).collect();
    names.dedup();
    let more = match refused.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Error::Unnamed {
        layer: first.name(),
        reason: format!(
            "it {reason}. No name in {format} is known for {} of {}: {}{more}. They can be left out, keep the \
             names that the file has, or have others if it is known which model they are of",
            refused.len(),
            count(layers, "layer"),
            names.join(", ")
        ),
    }
}

impl Adapter {
    /// The layers that have no known name in the spelling that is asked for, by the names that their files have, and
    /// why. Where [`SaveOptions::unnamed`] says so, or the spelling is a file's own, they are written by those names.
    pub fn unnamed(&self, options: &SaveOptions) -> Vec<(String, String)> {
        let target = Target::new(self, options);
        let layers = self.layers().iter();
        layers.filter_map(|layer| Some((layer.key_in_file(), target.written(layer).err()?))).collect()
    }
}

impl Adapter {
    /// The layers that are written as one module each: what a truncation has to take together. Those that a loader also
    /// takes apart are not among them.
    pub(crate) fn fused(&self, options: &SaveOptions) -> Vec<Vec<LayerKey>> {
        let target = Target::new(self, options);
        let mut groups: BTreeMap<String, Vec<(usize, LayerKey)>> = BTreeMap::new();
        for layer in self.layers() {
            let Ok(Written { prefix, path, part: Some((index, _)), .. }) = target.written(layer) else {
                continue;
            };
            groups.entry(prefix + &path).or_default().push((index, layer.key.clone()));
        }
        let mut all: Vec<Vec<LayerKey>> = Vec::new();
        for mut group in groups.into_values().filter(|group| group.len() > 1) {
            group.sort();
            all.push(group.into_iter().map(|(_, key)| key).collect());
        }
        all
    }
}

/// What is written to one place: the first layer, the length of the prefix, the module that fuses, and the parts.
struct Gathered<'a> {
    first: usize,
    prefix: usize,
    fused: Option<&'static Fused>,
    swap: bool,
    spelling: Arc<Spelling>,
    parts: Vec<(usize, &'a Layer)>,
}

/// The modules of a file, in order of their first layers.
pub(super) fn modules<'a>(
    adapter: &'a Adapter,
    target: &Target,
    dtype: Dtype,
    options: &SaveOptions,
) -> Result<Vec<Module<'a>>> {
    let mut places: BTreeMap<String, Gathered<'a>> = BTreeMap::new();
    let mut add = |i: usize, layer: &'a Layer, written: Written| {
        let Written { prefix, path, part, swap, spelling } = written;
        let (index, fused) = part.map_or((0, None), |(index, fused)| (index, Some(fused)));
        let prefix_len = prefix.len();
        let new = || Gathered { first: i, prefix: prefix_len, fused, swap, spelling, parts: Vec::new() };
        places.entry(prefix + &path).or_insert_with(new).parts.push((index, layer));
    };
    let (mut fused, mut whole) = (BTreeMap::<String, Vec<(usize, &'a Layer, Written)>>::new(), Vec::new());
    for (i, (layer, written)) in target.all(adapter.layers())?.into_iter().enumerate() {
        match written.part {
            Some(_) => {
                let name = format!("{}{}", written.prefix, written.path);
                fused.entry(name).or_default().push((i, layer, written));
            }
            None => whole.push((i, layer, written)),
        }
    }
    whole.into_iter().for_each(|(i, layer, written)| add(i, layer, written));
    for parts in fused.into_values() {
        for (i, layer, written) in target.split(parts) {
            add(i, layer, written);
        }
    }
    let mut places: Vec<_> = places.into_iter().collect();
    places.sort_by_key(|(_, gathered)| gathered.first);
    let folded = target.without_alphas(adapter, &places);
    let module = |(name, mut gathered): (String, Gathered<'a>)| {
        gathered.parts.sort_by_key(|(index, _)| *index);
        if let Some(pair) = gathered.parts.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let reason = format!("`{name}` would be written twice, for it and for `{}`", pair[1].1.name());
            return Err(Error::layer(pair[0].1.name(), reason));
        }
        Module::new(name, gathered, folded, dtype, options)
    };
    places.into_par_iter().map(module).collect()
}

impl Target {
    /// Whether scales have to be folded where the format has alphas: diffusers looks for those of a UNet in vain where
    /// ranks differ, and kohya's own loader does without.
    fn without_alphas(&self, adapter: &Adapter, places: &[(String, Gathered<'_>)]) -> bool {
        let unet = || adapter.family().all_agree(|record| Some(record.is_unet())) == Some(true);
        let rank =
            |(_, gathered): &(String, Gathered<'_>)| gathered.parts.first().map(|(_, layer)| layer.rank);
        let mixed = || places.iter().any(|place| rank(place) != places.first().and_then(rank));
        self.own.is_none() && self.spelling.format == Format::Kohya && unet() && mixed()
    }

    /// Parts of a fused module, apart from each other where that is smaller and the loader takes it.
    fn split<'a>(&self, parts: Vec<(usize, &'a Layer, Written)>) -> Vec<(usize, &'a Layer, Written)> {
        let Some((_, first, written)) = parts.first() else { return parts };
        let whole = written.part.is_none_or(|(_, fused)| fused.parts.len() == parts.len());
        let shared = parts.iter().all(|(_, layer, _)| layer.a.same(&first.a));
        let format = self.spelling.format;
        let splits = || {
            format == Format::Comfyui
                && self.own.is_none()
                && self.family_of(first).all_agree(|record| Some(record.split)) == Some(true)
        };
        if (whole && shared) || !splits() {
            return parts;
        }
        let apart = |(i, layer, written): (usize, &'a Layer, Written)| {
            let family = self.family_of(layer);
            let names = Some(families::Names::Diffusers);
            let place = family.place(layer.key.component(), layer.key.flat(), format, names, layer.widths());
            match place {
                Ok(Place { path, part, swap }) => (i, layer, Written { path, part, swap, ..written }),
                Err(_) => (i, layer, written),
            }
        };
        parts.into_iter().map(apart).collect()
    }
}

/// Puts the parts of a module together. Parts that have the same A keep it once, with their B below each other; others
/// keep an A each, with their B as blocks on the diagonal.
fn joined<'a>(name: String, gathered: Gathered<'a>) -> Result<Module<'a>> {
    let Gathered { prefix, fused, swap, spelling, parts, .. } = gathered;
    let Some(&(_, layer)) = parts.first() else {
        return Err(Error::Invalid(format!("`{name}` has no layer")));
    };
    let shared = parts.iter().all(|(_, other)| other.a.same(&layer.a));
    let known: Vec<(usize, usize)> = parts.iter().map(|(index, layer)| (*index, layer.output)).collect();
    let (mut row, mut col, mut next) = (0, 0, parts.iter().peekable());
    let (mut pieces, mut rows) = (Vec::with_capacity(parts.len()), Vec::new());
    for index in 0..fused.map_or(1, |fused| fused.parts.len()) {
        let Some((_, part)) = next.next_if(|(i, _)| *i == index) else {
            let missing = fused.and_then(|fused| fused.missing(index, layer.input, &known));
            let missing = missing.ok_or_else(|| {
                let reason = format!(
                    "`{name}` fuses it with others, of which part {} is missing, and how many rows that has is not known",
                    index + 1
                );
                Error::layer(layer.name(), reason)
            })?;
            rows.push(missing);
            row += missing;
            continue;
        };
        if part.input != layer.input {
            let reason = format!(
                "reads {} inputs, but `{}`, with which `{name}` fuses it, {}",
                part.input,
                layer.name(),
                layer.input
            );
            return Err(Error::layer(part.name(), reason));
        }
        pieces.push(Piece { layer: part, row, col, fold: 1.0 });
        rows.push(part.output);
        row += part.output;
        col += if shared { 0 } else { part.rank };
    }
    if fused.is_some_and(|fused| fused.rows(layer.input, row).as_ref() != Some(&rows)) {
        let reason = format!(
            "`{name}` fuses it with others, and whoever reads the file would not cut {rows:?} rows for {} inputs apart like \
             that; choose a format that keeps them apart",
            layer.input
        );
        return Err(Error::layer(layer.name(), reason));
    }
    let a: Vec<&Tensor> =
        if shared { vec![&layer.a] } else { parts.iter().map(|(_, part)| &part.a).collect() };
    let rank = a.iter().map(|a| a.rows).sum();
    Ok(Module {
        name,
        prefix,
        layer,
        parts,
        fused,
        spelling,
        rank,
        output: row,
        a,
        pieces,
        swap,
        b_dtype: Dtype::F32,
        alpha: rank as f64,
        has_alpha: false,
        folded: false,
    })
}

impl<'a> Module<'a> {
    fn new(
        name: String,
        gathered: Gathered<'a>,
        folded: bool,
        dtype: Dtype,
        options: &SaveOptions,
    ) -> Result<Self> {
        let mut module = joined(name, gathered)?;
        module.folded = folded;
        module.scale(dtype, options)?;
        Ok(module)
    }

    /// The same module with `layers` in the places of those of their names.
    pub fn with<'b>(&self, layers: &'b [Layer], dtype: Dtype, options: &SaveOptions) -> Result<Module<'b>>
    where
        'a: 'b,
    {
        let new = |old: &'a Layer| layers.iter().find(|layer| layer.key == old.key).unwrap_or(old);
        let parts = self.parts.iter().map(|&(index, old)| (index, new(old))).collect();
        let Self { prefix, fused, swap, .. } = *self;
        let gathered = Gathered { first: 0, prefix, fused, swap, spelling: self.spelling.clone(), parts };
        Module::new(self.name.clone(), gathered, self.folded, dtype, options)
    }

    /// Decides how scales are written: as alpha, or folded into B.
    fn scale(&mut self, dtype: Dtype, options: &SaveOptions) -> Result<()> {
        let spelling = self.spelling.clone();
        let rank = self.rank as f64;
        let scale = self.layer.scale;
        for Piece { layer, .. } in &self.pieces {
            if !layer.scale.value.is_finite() {
                let reason = format!("its scale is {}; it should be finite", layer.scale.value);
                return Err(Error::layer(layer.name(), reason));
            }
        }
        let all = |of: &dyn Fn(&Layer) -> bool| self.pieces.iter().all(|piece| of(piece.layer));
        let one = all(&|layer| layer.scale.value == scale.value);
        let folds = all(&|l| l.scale.value == 1.0 || folds_exactly(l.b(), l.scale.value, dtype));
        // An alpha of the file's stays what it is.
        let kept = spelling.alpha && all(&|layer| layer.scale.rule == ScaleRule::AlphaTensor);
        let alphas = matches!(spelling.format, Format::Kohya | Format::Comfyui);
        let place = !self.folded && (spelling.alpha || alphas);
        self.b_dtype = dtype;
        self.has_alpha = spelling.alpha && !self.folded;
        if one && place && (kept || !folds) {
            // scale · rank may be off by a rounding.
            self.alpha =
                scale.alpha.filter(|alpha| alpha / rank == scale.value).unwrap_or(scale.value * rank);
            self.has_alpha = true;
            return Ok(());
        }
        for piece in &mut self.pieces {
            piece.fold = piece.layer.scale.value;
        }
        // There is no place for an alpha: readers of this spelling take it to be the rank.
        if !folds && options.dtype.is_none() && !(one && scale.value == 0.0) {
            self.b_dtype = Dtype::F32;
        }
        Ok(())
    }

    /// Whether it is spelled as diffusers has it.
    pub fn is_diffusers(&self) -> bool {
        let own = |names: Option<families::Names>| names.is_none_or(|n| n == families::Names::Diffusers);
        let encoder = families::is_encoder(self.layer.key.component());
        self.spelling.format == Format::Peft && (encoder || own(self.spelling.names))
    }

    /// What is written of it.
    pub fn tensors<'b>(&'b self, dtype: Dtype) -> Vec<TensorOut<'b>> {
        let Self { name, layer, rank, output, b_dtype, alpha, spelling, .. } = self;
        let (a, b) = (&spelling.a, &spelling.b);
        let Kernel { dims, ones } = layer.kernel.clone().unwrap_or(Kernel { dims: Vec::new(), ones: 0 });
        let inputs = layer.input / dims.iter().product::<usize>().max(1);
        let mut tensors = vec![
            TensorOut {
                name: format!("{name}{a}"),
                dtype: file_dtype(dtype),
                shape: [&[*rank, inputs][..], &dims].concat(),
                write: Box::new(move |out| {
                    self.a.iter().try_for_each(|a| convert(a.raw(), 1.0, dtype, layer, out))
                }),
            },
            TensorOut {
                name: format!("{name}{b}"),
                dtype: file_dtype(*b_dtype),
                shape: [&[*output, *rank][..], &vec![1; ones]].concat(),
                write: Box::new(move |out| self.write_b(out)),
            },
        ];
        if self.has_alpha {
            let dtype = if round(*alpha, dtype) == *alpha { dtype } else { Dtype::F32 };
            tensors.push(TensorOut {
                name: format!("{name}.alpha"),
                dtype: file_dtype(dtype),
                shape: Vec::new(),
                write: Box::new(move |out| put(&[*alpha], dtype, layer, &mut Vec::new(), out)),
            });
        }
        tensors
    }

    fn write_b(&self, out: &mut dyn Write) -> io::Result<()> {
        let dtype = self.b_dtype;
        let zeros = |n: usize, out: &mut dyn Write| out.write_all(&vec![0; n * dtype.size()]);
        if self.swap
            && let [Piece { layer, fold, .. }] = &self.pieces[..]
        {
            let (b, half) = (layer.b(), self.output / 2);
            convert(b.row_range(half, self.output), *fold, dtype, layer, out)?;
            return convert(b.row_range(0, half), *fold, dtype, layer, out);
        }
        let mut row = 0;
        for Piece { layer, row: start, col, fold } in &self.pieces {
            // What no layer adapts.
            (row..*start).try_for_each(|_| zeros(self.rank, out))?;
            row = start + layer.output;
            let b = layer.b();
            if layer.rank == self.rank {
                convert(b, *fold, dtype, layer, out)?;
                continue;
            }
            for i in 0..layer.output {
                zeros(*col, out)?;
                convert(b.row_range(i, i + 1), *fold, dtype, layer, out)?;
                zeros(self.rank - col - layer.rank, out)?;
            }
        }
        (row..self.output).try_for_each(|_| zeros(self.rank, out))
    }
}

/// Whether multiplying by `scale` and rounding to `dtype` can be undone.
fn folds_exactly(b: RawMatrix<'_>, scale: f64, dtype: Dtype) -> bool {
    const MANTISSA: u64 = (1 << 52) - 1;
    let power_of_two = scale.is_normal() && scale.to_bits() & MANTISSA == 0;
    power_of_two && {
        let mut values = vec![0f32; CHUNK];
        b.bytes().chunks(CHUNK * b.dtype().size()).all(|chunk| {
            widen(b.dtype(), chunk, &mut values).iter().all(|&v| {
                !v.is_finite() || round(f64::from(v) * scale, dtype) == round(v.into(), dtype) * scale
            })
        })
    }
}

/// Writes `values · scale`, rounded once, to `dtype`; unchanged bytes where nothing is to be done.
fn convert(
    values: RawMatrix<'_>,
    scale: f64,
    dtype: Dtype,
    layer: &Layer,
    out: &mut dyn Write,
) -> io::Result<()> {
    if values.dtype() == dtype && scale == 1.0 {
        return out.write_all(values.bytes());
    }
    let (mut wide, mut bytes) = (vec![0f32; CHUNK], Vec::with_capacity(4 * CHUNK));
    let mut halves = vec![0u16; CHUNK];
    for chunk in values.bytes().chunks(CHUNK * values.dtype().size()) {
        let wide = widen(values.dtype(), chunk, &mut wide);
        let halves = &mut halves[..wide.len()];
        if scale == 1.0 && narrow(wide, dtype, halves) {
            out.write_all(bytemuck::cast_slice(halves))?;
            continue;
        }
        let scaled: Vec<f64> = wide.iter().map(|&v| f64::from(v) * scale).collect();
        put(&scaled, dtype, layer, &mut bytes, out)?;
    }
    Ok(())
}

/// f32 values as halves; false for other types, and where one is or would become infinity or NaN.
fn narrow(wide: &[f32], dtype: Dtype, halves: &mut [u16]) -> bool {
    use half::slice::HalfFloatSliceExt;
    let infinity = match dtype {
        Dtype::F32 => return false,
        Dtype::F16 => {
            bytemuck::cast_slice_mut::<u16, half::f16>(halves).convert_from_f32_slice(wide);
            0x7c00
        }
        Dtype::Bf16 => {
            for (half, v) in halves.iter_mut().zip(wide) {
                // To nearest, ties to even.
                let bits = v.to_bits();
                *half = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
            }
            // NaN may have become anything, but not without having been NaN.
            if wide.iter().fold(false, |bad, v| bad | (v.to_bits() & 0x7f80_0000 == 0x7f80_0000)) {
                return false;
            }
            0x7f80
        }
    };
    halves.iter().fold(true, |good, half| good & (half & infinity != infinity))
}

/// Writes numbers, and refuses to make infinity of a finite one.
fn put(
    values: &[f64],
    dtype: Dtype,
    layer: &Layer,
    bytes: &mut Vec<u8>,
    out: &mut dyn Write,
) -> io::Result<()> {
    bytes.clear();
    for &value in values {
        let rounded = round_to_f32(value, dtype);
        if value.is_finite() && !rounded.is_finite() {
            let wider = if dtype == Dtype::F16 { "bf16 or f32" } else { "a smaller strength" };
            let reason = format!("the value {value:e} is too large for {dtype}; use {wider}");
            return Err(io::Error::other(Error::layer(layer.name(), reason)));
        }
        match dtype {
            Dtype::F32 => bytes.extend(rounded.to_le_bytes()),
            Dtype::F16 => bytes.extend(half::f16::from_f32(rounded).to_le_bytes()),
            Dtype::Bf16 => bytes.extend(half::bf16::from_f32(rounded).to_le_bytes()),
        }
    }
    out.write_all(bytes)
}

fn widen<'a>(dtype: Dtype, bytes: &[u8], out: &'a mut [f32]) -> &'a [f32] {
    let cols = bytes.len() / dtype.size();
    RawMatrix::within(dtype, 1, cols, bytes).widen_into(&mut out[..cols]);
    &out[..cols]
}

fn round(value: f64, dtype: Dtype) -> f64 {
    round_to_f32(value, dtype).into()
}

/// The number of type `dtype` that is nearest.
fn round_to_f32(value: f64, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => value as f32,
        Dtype::F16 => half::f16::from_f32(odd(value)).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(odd(value)).to_f32(),
    }
}

/// Rounds to odd, after which rounding on to a half type is as if it had been done at once.
fn odd(value: f64) -> f32 {
    let near = value as f32;
    let back = f64::from(near);
    if back == value || !value.is_finite() {
        return near;
    }
    let bits = near.to_bits();
    // The neighbour towards zero, if this one is beyond, and then the odd one of the two.
    f32::from_bits(if back.abs() > value.abs() { bits - 1 } else { bits } | 1)
}

fn file_dtype(dtype: Dtype) -> FileDtype {
    match dtype {
        Dtype::F32 => FileDtype::F32,
        Dtype::F16 => FileDtype::F16,
        Dtype::Bf16 => FileDtype::BF16,
    }
}
