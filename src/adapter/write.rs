//! From layers to a file.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;

use rayon::prelude::*;

use super::families::{self, Family, Fused, Names, Place};
use super::scale::ScaleRule;
use super::spelling::{Spelling, Usual};
use super::{Adapter, Format, Kernel, Layer, Tensor, keys};
use crate::safetensors_file::{FileDtype, TensorOut};
use crate::{Dtype, Error, RawMatrix, Result};

/// How an adapter is written.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// Type of the tensors; by default the adapter's own ([`Adapter::dtype`]).
    pub dtype: Option<Dtype>,
    /// Spelling of the keys; by default the adapter's own ([`Adapter::format`]), with everything that is its file's.
    pub format: Option<Format>,
    /// Whether an existing file is replaced.
    pub overwrite: bool,
    /// Files (inputs) that are not overwritten even so, nor through another name for them.
    pub protect: Vec<PathBuf>,
    /// The header's metadata, beside what [`Adapter::with_metadata`] set. What says ranks, alphas or hashes is left
    /// out or set to what is right.
    pub metadata: BTreeMap<String, String>,
}

/// Elements converted at a time.
const CHUNK: usize = 1 << 16;

/// How everything is to be spelled.
pub(super) struct Target {
    pub spelling: Spelling,
    /// Of the main model and each text encoder, where it is not the usual one.
    prefixes: BTreeMap<String, String>,
    /// Whether it is the spelling of the adapter's own file.
    own: bool,
    /// Stable Diffusion 1 has one text encoder, and so kohya does not number it.
    one_encoder: bool,
}

/// A module as it is written: a layer, or several that are fused.
pub(super) struct Module<'a> {
    /// Key of the module, with the prefix of this length.
    pub name: String,
    pub prefix: usize,
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
    pub fn new(adapter: &Adapter, format: Option<Format>) -> Self {
        let has = |of: &dyn Fn(&Layer) -> bool| adapter.layers().iter().any(of);
        let one_encoder = has(&is_unet) && !has(&|layer| layer.key.component() == "text_encoder_2");
        let own = adapter.0.usual.as_ref().filter(|own| own.spelling.names != Names::Processor);
        if let (None, Some(Usual { spelling, prefixes })) = (format, own) {
            return Self {
                spelling: (**spelling).clone(),
                prefixes: prefixes.clone(),
                own: true,
                one_encoder,
            };
        }
        let format = format.unwrap_or(adapter.format());
        let spelling = Spelling::standard(format, adapter.family());
        let usual =
            Usual::of(adapter.layers(), format).filter(|usual| usual.spelling.names == spelling.names);
        let prefixes = usual.map_or_else(BTreeMap::new, |usual| usual.prefixes);
        Self { spelling, prefixes, own: false, one_encoder }
    }

    fn prefix(&self, layer: &Layer) -> Result<String> {
        match self.prefixes.get(layer.key.component()) {
            Some(prefix) => Ok(prefix.clone()),
            None => default_prefix(layer, self.spelling.format, self.one_encoder),
        }
    }

    /// The module that a layer is written to, without the prefix.
    fn place(&self, layer: &Layer) -> Result<Place> {
        let Spelling { names, .. } = self.spelling;
        let own = layer.spelling.as_ref().map_or(Names::Diffusers, |spelling| spelling.names);
        let respelled = |path: &str| {
            let was_flat = layer.spelling.as_ref().is_none_or(|spelling| spelling.is_flat());
            match (self.spelling.is_flat(), was_flat && !path.contains('.')) {
                (true, _) => path.replace('.', "_"),
                (false, true) => keys::unflatten(path),
                (false, false) => path.to_owned(),
            }
        };
        let whole = |path: &str| Place { path: respelled(path), part: None };
        if !layer.key.component().is_empty() {
            // Attention processors of 2023.
            let module = if own == Names::Processor { layer.key.flat() } else { &layer.module };
            return Ok(match own == Names::Processor && !self.spelling.is_flat() {
                true => Place { path: keys::unflatten(module), part: None },
                false => whole(module),
            });
        }
        if own == names {
            match &layer.part {
                Some(part) if self.own => {
                    return Ok(Place { part: Some((part.index, part.fused)), ..whole(&part.module) });
                }
                None if self.spelling.is_flat() || layer.module.contains('.') => {
                    return Ok(whole(&layer.module));
                }
                None if layer.family == Family::Generic => return Ok(whole(&layer.module)),
                _ => {}
            }
        }
        let key = layer.key.flat();
        // What has no known name in one spelling has none in another.
        let known = own == names
            || names != Names::Diffusers
            || !layer.family.has_native()
            || families::canonical("", key).1 == Some(Names::Diffusers);
        let place = layer.family.place(key, names).filter(|_| known);
        let place = match place {
            Some(place) => place,
            None if own == names => return Ok(whole(&layer.module)),
            None => {
                let (format, family) = (self.spelling.format, layer.family);
                let reason = match family {
                    Family::Generic => format!(
                        "the model that it is for is not known, and so not what it is called in {format}; choose \
                         another format"
                    ),
                    _ => {
                        format!("it has no name of {family} in {format} that is known; choose another format")
                    }
                };
                return Err(Error::layer(layer.name(), reason));
            }
        };
        let path = if self.spelling.is_flat() { place.path.replace('.', "_") } else { place.path };
        Ok(Place { path, ..place })
    }
}

/// The modules of a file, in order of their first layers.
pub(super) fn modules<'a>(
    adapter: &'a Adapter,
    target: &Target,
    dtype: Dtype,
    options: &SaveOptions,
) -> Result<Vec<Module<'a>>> {
    type Parts<'a> = (usize, usize, Option<&'static Fused>, Vec<(usize, &'a Layer)>);
    let mut places: BTreeMap<String, Parts> = BTreeMap::new();
    for (i, layer) in adapter.layers().iter().enumerate() {
        let prefix = target.prefix(layer)?;
        let Place { path, part } = target.place(layer)?;
        let (index, fused) = part.map_or((0, None), |(index, fused)| (index, Some(fused)));
        let name = format!("{prefix}{path}");
        let entry = places.entry(name).or_insert_with(|| (i, prefix.len(), fused, Vec::new()));
        entry.3.push((index, layer));
    }
    let mut places: Vec<_> = places.into_iter().collect();
    places.sort_by_key(|(_, (i, ..))| *i);
    let module = |(name, (_, prefix, fused, mut parts)): (String, Parts<'a>)| {
        parts.sort_by_key(|(index, _)| *index);
        if let Some(pair) = parts.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let reason = format!("`{name}` would be written twice, for it and for `{}`", pair[1].1.name());
            return Err(Error::layer(pair[0].1.name(), reason));
        }
        Module::new(name, prefix, fused, parts, target, dtype, options)
    };
    places.into_par_iter().map(module).collect()
}

/// Puts layers together: over one A if they share it, else as blocks.
fn joined<'a>(
    name: String,
    prefix: usize,
    fused: Option<&'static Fused>,
    parts: Vec<(usize, &'a Layer)>,
) -> Result<Module<'a>> {
    let Some(&(_, layer)) = parts.first() else {
        return Err(Error::Invalid(format!("`{name}` has no layer")));
    };
    let shared = parts.iter().all(|(_, other)| other.a.same(&layer.a));
    let known: BTreeMap<usize, usize> = parts.iter().map(|(index, layer)| (*index, layer.output)).collect();
    let (mut row, mut col, mut next) = (0, 0, parts.iter().peekable());
    let mut pieces = Vec::with_capacity(parts.len());
    for index in 0..fused.map_or(1, |fused| fused.parts.len()) {
        let Some((_, part)) = next.next_if(|(i, _)| *i == index) else {
            row += fused.map_or(0, |fused| fused.missing(index, layer.input, &known));
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
        row += part.output;
        col += if shared { 0 } else { part.rank };
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
        rank,
        output: row,
        a,
        pieces,
        swap: false,
        b_dtype: Dtype::F32,
        alpha: rank as f64,
        has_alpha: false,
    })
}

impl<'a> Module<'a> {
    fn new(
        name: String,
        prefix: usize,
        fused: Option<&'static Fused>,
        parts: Vec<(usize, &'a Layer)>,
        target: &Target,
        dtype: Dtype,
        options: &SaveOptions,
    ) -> Result<Self> {
        let mut module = joined(name, prefix, fused, parts)?;
        module.scale(&target.spelling, dtype, options)?;
        let layer = module.layer;
        module.swap = target.spelling.names == Names::Native
            && layer.key.component().is_empty()
            && layer.family.swaps(layer.key.flat(), layer.input, layer.output);
        Ok(module)
    }

    /// The same module with `layers` in the places of those of their names.
    pub fn with<'b>(
        &self,
        layers: &'b [Layer],
        target: &Target,
        dtype: Dtype,
        options: &SaveOptions,
    ) -> Result<Module<'b>>
    where
        'a: 'b,
    {
        let new = |old: &'a Layer| layers.iter().find(|layer| layer.key == old.key).unwrap_or(old);
        let parts = self.parts.iter().map(|&(index, old)| (index, new(old))).collect();
        Module::new(self.name.clone(), self.prefix, self.fused, parts, target, dtype, options)
    }

    /// Decides how scales are written: as alpha, or folded into B.
    fn scale(&mut self, spelling: &Spelling, dtype: Dtype, options: &SaveOptions) -> Result<()> {
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
        let place = spelling.alpha || matches!(spelling.format, Format::Kohya | Format::Comfyui);
        self.b_dtype = dtype;
        self.has_alpha = spelling.alpha;
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

    /// What is written of it.
    pub fn tensors<'b>(&'b self, spelling: &Spelling, dtype: Dtype) -> Vec<TensorOut<'b>> {
        let Self { name, layer, rank, output, b_dtype, alpha, .. } = self;
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
            convert(b.rows(half, self.output), *fold, dtype, layer, out)?;
            return convert(b.rows(0, half), *fold, dtype, layer, out);
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
                convert(b.rows(i, i + 1), *fold, dtype, layer, out)?;
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
        b.bytes.chunks(CHUNK * b.dtype.size()).all(|chunk| {
            widen(b.dtype, chunk, &mut values).iter().all(|&v| {
                !v.is_finite() || round(f64::from(v) * scale, dtype) == round(v.into(), dtype) * scale
            })
        })
    }
}

fn default_prefix(layer: &Layer, format: Format, one_encoder: bool) -> Result<String> {
    Ok(match (format, layer.key.component()) {
        (Format::Kohya, "") => "lora_unet_".to_owned(),
        (Format::Kohya, "text_encoder") if one_encoder => "lora_te_".to_owned(),
        (Format::Kohya, "text_encoder") => "lora_te1_".to_owned(),
        (Format::Kohya, "text_encoder_2") => "lora_te2_".to_owned(),
        (Format::Kohya, "text_encoder_3") => "lora_te3_".to_owned(),
        (Format::Kohya, component) => {
            let reason = format!("kohya's spelling has no prefix for `{component}`; choose another format");
            return Err(Error::layer(layer.name(), reason));
        }
        (Format::Peft, "") if is_unet(layer) => "unet.".to_owned(),
        (Format::Peft, "") => "transformer.".to_owned(),
        (Format::Comfyui, "") => "diffusion_model.".to_owned(),
        (Format::Bfl | Format::Xlabs, "") => String::new(),
        // FLUX has CLIP and T5, Stable Diffusion 3 another CLIP between them.
        (_, "text_encoder_3") if layer.family == Family::Flux1 => "text_encoder_2.".to_owned(),
        // ComfyUI knows the encoders by the names that diffusers gives them, too.
        (_, component) => format!("{component}."),
    })
}

/// Whether the layer is of a UNet.
pub(super) fn is_unet(layer: &Layer) -> bool {
    layer.key.component().is_empty() && (layer.family.is_unet() || families::is_unet_block(layer.key.flat()))
}

/// Writes `values · scale`, rounded once, to `dtype`; unchanged bytes where nothing is to be done.
fn convert(
    values: RawMatrix<'_>,
    scale: f64,
    dtype: Dtype,
    layer: &Layer,
    out: &mut dyn Write,
) -> io::Result<()> {
    if values.dtype == dtype && scale == 1.0 {
        return out.write_all(values.bytes);
    }
    let (mut wide, mut bytes) = (vec![0f32; CHUNK], Vec::with_capacity(4 * CHUNK));
    let mut halves = vec![0u16; CHUNK];
    for chunk in values.bytes.chunks(CHUNK * values.dtype.size()) {
        let wide = widen(values.dtype, chunk, &mut wide);
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
    RawMatrix { dtype, rows: 1, cols, bytes }.widen_into(&mut out[..cols]);
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
