//! From the tensors of a file to layers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::families::{self, Clue, Family, Names, Widths};
use super::keys::{self, Bare, LayerKey, Part, Split};
use super::other::{self, Base, Lost, Other};
use super::scale::{Scale, Scales};
use super::spelling::Spelling;
use super::{Format, Kernel, Layer, PartOf, Tensor, TensorData, fuse};
use crate::io::disk;
use crate::io::safetensors_file::{FileDtype, SafetensorsFile, TensorRef};
use crate::words::count;
use crate::{Dtype, Error, Matrix, Remedy, Result};

/// What opening an adapter takes beyond its file.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Alpha of every layer, whatever the file says.
    pub alpha: Option<f64>,
    /// Truncate to this rank what is no LoRA, or none of that rank: LoHa, LoKr, DoRA, whole differences. What it loses
    /// is in [`Adapter::notes`](super::Adapter::notes). Without it, they have to be LoRAs of rank
    /// [`EXACT_RANK`](Self::EXACT_RANK) or less exactly.
    pub truncate: Option<usize>,
    /// Weights of the base model, a file or a folder of shards, which DoRA depends on.
    pub base: Option<PathBuf>,
    /// Leave out what cannot be merged (biases, norms, other kinds of adapters) instead of refusing the file.
    pub skip_unsupported: bool,
    /// The model that the adapter is for, where its file does not tell, or tells something wrong.
    pub family: Option<Family>,
}

impl OpenOptions {
    /// The rank up to which LoHa and LoKr are expanded.
    pub const EXACT_RANK: usize = 256;
}

/// What was read.
pub(super) struct Read {
    pub layers: Vec<Layer>,
    pub notes: Vec<String>,
}

/// The tensors of one module, by what they are to it.
pub(super) struct Group<'a> {
    pub module: &'a str,
    pub bare: Bare,
    pub parts: BTreeMap<Part, &'a str>,
}

/// A module's update, whatever kind of adapter it was.
pub(super) struct Factors {
    pub a: Tensor,
    pub b: Tensor,
    pub kernel: Option<Kernel>,
    /// The factor on `B · A` that is not alpha's.
    pub factor: f64,
    pub alpha_rank: AlphaRank,
    pub lost: Option<Lost>,
}

/// What alpha is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AlphaRank {
    /// This rank.
    Of(usize),
    /// What a configuration of PEFT says; without one, there is no scale.
    OfConfig,
    /// It is in the factors already.
    Folded,
}

/// What the functions here read from.
pub(super) struct Source<'a> {
    pub file: &'a SafetensorsFile,
    pub options: &'a OpenOptions,
    pub base: Option<Base>,
    pub family: Family,
    pub scales: Scales,
}

/// The layers of a file, sorted. `config` is the `adapter_config.json` that belongs to it.
pub(super) fn read(
    file: &SafetensorsFile,
    config: Option<(&Path, &str)>,
    options: &OpenOptions,
) -> Result<Read> {
    let path = file.path();
    if options.alpha.is_some_and(|alpha| !alpha.is_finite()) || options.truncate == Some(0) {
        return Err(Error::Invalid("alpha has to be finite, and a rank to truncate to at least 1".into()));
    }
    let scales = Scales::new(path, file.metadata(), config, options.alpha)?;
    let (groups, mut notes) = groups(file, options)?;
    scales.check_work(path, groups.len())?;
    if let Some((path, key)) = &scales.dora
        && !groups.values().any(|g| g.has(Part::Magnitude) || g.has(Part::DoraScale))
    {
        return Err(Error::file(
            path,
            format!(
                "`{key}` is set, but it holds no norms: DoRA needs `lora_magnitude_vector` beside its factors"
            ),
        ));
    }
    let clues: Vec<Clue> = groups.values().map(|group| group.clue(file)).collect();
    let family = match options.family {
        Some(family) => family,
        None => {
            let families::Recognised { family, note } = families::recognise(&clues, file.metadata());
            notes.extend(note.map(|note| format!("`{}`: {note}", file_name(path))));
            family
        }
    };
    let needs_base = groups.values().any(|g| g.has(Part::Magnitude) || g.has(Part::DoraScale));
    let base =
        options.base.as_ref().filter(|_| needs_base).map(|path| Base::open(path, family)).transpose()?;
    let usual = usual_names(family, &clues);
    let alpha = groups.values().any(|g| g.has(Part::Alpha));
    let source = Source { file, options, base, family, scales };

    let read: Vec<Module> = groups
        .into_par_iter()
        .map(|(_, group)| layers(&source, &group, usual, alpha))
        .collect::<Result<_>>()?;
    let (layers, lost): (Vec<_>, Vec<_>) = read.into_iter().unzip();
    let mut layers: Vec<Layer> = layers.into_iter().flatten().collect();
    layers.sort_by(|x, y| (&x.key, x.part.is_some()).cmp(&(&y.key, y.part.is_some())));
    let before = layers.len();
    let mut twice = None;
    layers.dedup_by(|y, x| {
        let same = x.key == y.key;
        let equal = same && x.scale.value == y.scale.value && x.a.same(&y.a) && x.b.same(&y.b);
        if same && !equal && twice.is_none() {
            twice = Some(named_twice(path, y, x));
        }
        equal
    });
    if let Some(error) = twice {
        return Err(error);
    }
    if layers.len() < before {
        notes.push(format!(
            "`{}` holds {} under two names each, with equal values; each counts once",
            file_name(path),
            count(before - layers.len(), "layer")
        ));
    }
    notes.extend(other::notes(lost.into_iter().flatten()));
    Ok(Read { layers, notes })
}

fn named_twice(path: &Path, layer: &Layer, other: &Layer) -> Error {
    let reason = format!(
        "names the same layer as `{}`, with other values; a file may hold one adapter, with each layer once",
        other.b.key
    );
    Error::tensor(path, &layer.b.key, reason)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// By the module's name as the file has it.
type Groups<'a> = BTreeMap<&'a str, Group<'a>>;

/// Sorts the tensors by module.
fn groups<'a>(file: &'a SafetensorsFile, options: &OpenOptions) -> Result<(Groups<'a>, Vec<String>)> {
    let path = file.path();
    let mut groups = Groups::new();
    let (mut unknown, mut skipped) = (Vec::new(), BTreeMap::<&str, Vec<&str>>::new());
    for tensor in file.tensors() {
        let key = tensor.name;
        let (module, part) = match keys::split(key) {
            // The weight of a norm, or a bias under another name.
            Split::Part(_, Part::Diff) if tensor.shape.len() < 2 => {
                foreign(path, key, "a difference of a norm", options, &mut skipped)?;
                continue;
            }
            Split::Part(module, part) => (module, part),
            Split::Foreign(_, kind) => {
                foreign(path, key, kind, options, &mut skipped)?;
                continue;
            }
            Split::Unknown => {
                unknown.push(key);
                continue;
            }
        };
        let new = || Group { module, bare: Bare::parse(module), parts: BTreeMap::new() };
        if let Some(other) = groups.entry(module).or_insert_with(new).parts.insert(part, key) {
            let reason = format!(
                "names the same factor as `{other}`; a file may hold one adapter, with each layer once"
            );
            return Err(Error::tensor(path, key, reason));
        }
    }
    // Alpha and norms of what was left out.
    if !skipped.is_empty() {
        groups.retain(|_, g| !g.parts.keys().all(|part| matches!(part, Part::Alpha | Part::Scalar)));
    }
    let holds = groups.values().any(|g| g.parts.keys().any(|part| *part != Part::Alpha));
    let skip = options.skip_unsupported && holds;
    if !skip && !unknown.is_empty() {
        let what = if holds {
            "besides LoRA layers it holds tensors that are none"
        } else {
            "it holds no LoRA layers; is it a checkpoint of a whole model?"
        };
        let what = format!(
            "{what}: {}; expected are keys that end in `.lora_A.weight` and `.lora_B.weight`, or `.lora_down.weight` and \
             `.lora_up.weight`",
            some(&unknown)
        );
        return Err(match holds {
            true => Error::not_mergeable(path, format!("{what}; others can be left out"), Remedy::Skip),
            false => Error::file(path, what),
        });
    }
    if !unknown.is_empty() {
        skipped.insert("no known kind", unknown);
    }
    if groups.is_empty() {
        let what =
            if skipped.is_empty() { "there is no tensor in it" } else { "nothing in it can be merged" };
        return Err(Error::file(path, format!("it holds no LoRA layers: {what}")));
    }
    let name = file_name(path);
    let note = |(kind, keys): (&str, Vec<&str>)| format!("`{name}`: left out, of {kind}: {}", some(&keys));
    Ok((groups, skipped.into_iter().map(note).collect()))
}

fn some(keys: &[&str]) -> String {
    let some = keys.iter().take(3).map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
    match keys.len().saturating_sub(3) {
        0 => some,
        more => format!("{some} and {more} more"),
    }
}

fn foreign<'a>(
    path: &Path,
    key: &'a str,
    kind: &'static str,
    options: &OpenOptions,
    skipped: &mut BTreeMap<&'static str, Vec<&'a str>>,
) -> Result<()> {
    if options.skip_unsupported {
        skipped.entry(kind).or_default().push(key);
        return Ok(());
    }
    let what = format!("`{key}`: belongs to {kind}, which cannot be merged but left out");
    Err(Error::not_mergeable(path, what, Remedy::Skip))
}

/// Whose names most modules of the main model have.
pub(super) fn usual_names(family: Family, clues: &[Clue]) -> Option<Names> {
    let main = clues.iter().filter(|clue| !families::is_encoder(clue.component));
    let names = |clue: &Clue| family.module(clue.component, clue.flat, Some(clue.widths), None)?.names;
    let mut counts: BTreeMap<Names, usize> = BTreeMap::new();
    main.filter_map(names).for_each(|names| *counts.entry(names).or_default() += 1);
    // Of several, the last.
    counts.into_iter().rev().max_by_key(|(_, n)| *n).map(|(names, _)| names)
}

impl<'a> Group<'a> {
    pub fn has(&self, part: Part) -> bool {
        self.parts.contains_key(&part)
    }

    pub fn tensor(&self, file: &'a SafetensorsFile, part: Part) -> Option<TensorRef<'a>> {
        self.parts.get(&part).and_then(|key| file.tensor(key))
    }

    /// What the module tells of the family. Shapes are not checked yet.
    fn clue<'b>(&'b self, file: &SafetensorsFile) -> Clue<'b> {
        let prefix = &self.module[..keys::prefix(self.module).1];
        Clue { component: &self.bare.component, prefix, flat: &self.bare.flat, widths: self.widths(file) }
    }

    /// Columns and rows of the update; zero where its shapes do not tell.
    pub fn widths(&self, file: &SafetensorsFile) -> Widths {
        let shape = |part| self.parts.get(&part).and_then(|key| file.tensor(key)).map(|t| t.shape);
        let rows = |part| shape(part).and_then(|s| s.first().copied());
        let columns = |part| shape(part).and_then(|s| s.get(1..)).map(|rest| rest.iter().product::<usize>());
        // A factor of a LoKr is whole, or a product.
        let factor = |whole, a, b| {
            let (whole, a, b) = (Part::Lokr(whole), Part::Lokr(a), Part::Lokr(b));
            Some((columns(whole).or_else(|| columns(b))?, rows(whole).or_else(|| rows(a))?))
        };
        if let Some((input, output)) = factor(keys::Lokr::W1, keys::Lokr::W1A, keys::Lokr::W1B) {
            if self.has(Part::Lokr(keys::Lokr::T2)) {
                return (0, 0);
            }
            let second = factor(keys::Lokr::W2, keys::Lokr::W2A, keys::Lokr::W2B).unwrap_or_default();
            return (input.saturating_mul(second.0), output.saturating_mul(second.1));
        }
        let tucker = self.has(Part::Mid) || self.has(Part::Hada(keys::Hada::T1));
        let input = columns(Part::A).or_else(|| columns(Part::Hada(keys::Hada::W1B)));
        let input = input.or_else(|| columns(Part::Diff)).filter(|_| !tucker).unwrap_or(0);
        let output = rows(Part::B).or_else(|| rows(Part::Hada(keys::Hada::W1A))).or_else(|| rows(Part::Diff));
        (input, output.filter(|_| !tucker).unwrap_or(0))
    }
}

/// The layers of a module, and what making LoRAs of them lost.
type Module = (Vec<Layer>, Option<(LayerKey, Lost)>);

/// The layers of a module: one, or the parts that it fuses.
fn layers(source: &Source, group: &Group, usual: Option<Names>, alphas: bool) -> Result<Module> {
    let (file, family) = (source.file, source.family);
    let Bare { component, flat } = &group.bare;
    let widths = Some(group.widths(file)).filter(|(input, output)| *input > 0 && *output > 0);
    let module = family.module(component, flat, widths, usual);
    let key = group.bare.key(module.as_ref().map_or(flat, |module| &module.key));
    let factors = factors(source, &key, group)?;
    let (_, len) = keys::prefix(group.module);
    let (prefix, path) = group.module.split_at(len);
    let names = module.as_ref().and_then(|module| module.names);
    let format = Format::of(prefix, path, names);
    let standard = Spelling::standard(format, names);
    // Of what was no LoRA, the usual ones are written.
    let suffix = |part, usual| match group.parts.get(&part).map(|key| (key, keys::split(key))) {
        Some((key, Split::Part(module, _))) => key.strip_prefix(module).unwrap_or_default().to_owned().into(),
        _ => usual,
    };
    let spelling = Spelling {
        format,
        names,
        a: suffix(Part::A, standard.a),
        b: suffix(Part::B, standard.b),
        alpha: alphas,
    };
    let alpha = group.tensor(file, Part::Alpha).map(|t| number(file.path(), &t, "an alpha")).transpose()?;
    let scalar = group.tensor(file, Part::Scalar).map(|t| number(file.path(), &t, "a scalar")).transpose()?;
    let rank = factors.a.rows;
    let mut scale = match factors.alpha_rank {
        AlphaRank::Of(rank) => source.scales.of(&key, path, rank, alpha),
        AlphaRank::OfConfig => source.scales.of_config(&key, path),
        AlphaRank::Folded => Scale::given(1.0),
    };
    scale.value *= factors.factor * scalar.unwrap_or(1.0);
    let mut layer = Layer {
        module: path.to_owned(),
        prefix: prefix.to_owned(),
        rank,
        input: factors.a.cols,
        output: factors.b.rows,
        scale,
        family,
        spelling: Some(Arc::new(spelling)),
        known: module.is_some(),
        swapped: module.as_ref().is_some_and(|module| module.swap),
        part: None,
        kernel: factors.kernel,
        a: factors.a,
        b: factors.b,
        key: key.clone(),
    };
    if layer.swapped {
        layer.b = fuse::swap_halves(&layer.b);
    }
    let lost = factors.lost.map(|lost| (key, lost));
    let Some((fused, parts)) = module.and_then(|module| module.fused) else { return Ok((vec![layer], lost)) };
    if interleaved(family, prefix, layer.spelling.as_deref()) {
        let reason = "has the rows of q, k and v interleaved by head, as DiffSynth writes it for MiniMax-H3; every \
                      other loader has them one below the other, and so this file cannot be read; the trainer's own \
                      converter writes one that can";
        return Err(Error::tensor(file.path(), &layer.b.key, reason));
    }
    let Some(rows) = fused.rows(layer.input, layer.output).filter(|_| layer.kernel.is_none()) else {
        let reason = format!(
            "fuses {} modules of {family}, but {} rows cannot be cut so for {} inputs",
            parts.len(),
            layer.output,
            layer.input
        );
        return Err(Error::tensor(file.path(), &layer.b.key, reason));
    };
    let part = |index| PartOf { module: path.into(), index, fused };
    let key = |part: &str| group.bare.key(&part.replace('.', "_"));
    Ok((fuse::split(&layer, &rows, &parts, key, part), lost))
}

/// Whether a file's fused rows are in an order of their own: DiffSynth keeps those of MiniMax-H3 by head.
fn interleaved(family: Family, prefix: &str, spelling: Option<&Spelling>) -> bool {
    let diffsynth = prefix.is_empty() && spelling.is_some_and(|s| s.a.contains(".default."));
    family.id() == Some("minimax_h3") && diffsynth
}

fn factors(source: &Source, key: &LayerKey, group: &Group) -> Result<Factors> {
    let (file, path) = (source.file, source.file.path());
    let find = |part| group.tensor(file, part);
    let kind = Other::of(group);
    if let Some((_, extra)) = group.parts.iter().find(|(part, _)| !other::belongs(kind, **part)) {
        let reason = format!(
            "is beside {}, to which it does not belong, and what the two mean together is not known",
            kind.map_or("the A and B of a LoRA", Other::name)
        );
        return Err(Error::tensor(path, extra, reason));
    }
    if let Some(kind) = kind {
        return other::factors(source, key, group, kind);
    }
    let (a, b) = match (find(Part::A), find(Part::B)) {
        (Some(a), Some(b)) => (a, b),
        (Some(a), None) => {
            return Err(alone(path, &a, "A (`lora_A`, `lora_down`)", "B (`lora_B`, `lora_up`)"));
        }
        (None, Some(b)) => {
            return Err(alone(path, &b, "B (`lora_B`, `lora_up`)", "A (`lora_A`, `lora_down`)"));
        }
        (None, None) => {
            let only = group.parts.iter().next().map_or(group.module, |(_, key)| key);
            return Err(Error::tensor(path, only, "is there without the A and B of its layer"));
        }
    };
    lora(file, &a, &b, find(Part::Mid))
}

/// Factors as they are in the file; of a Tucker decomposition, the core goes into A.
pub(super) fn lora(
    file: &SafetensorsFile,
    a: &TensorRef,
    b: &TensorRef,
    mid: Option<TensorRef>,
) -> Result<Factors> {
    let path = file.path();
    let (a_dims, b_dims) = (a.shape.get(2..).unwrap_or_default(), b.shape.get(2..).unwrap_or_default());
    if b_dims.iter().any(|&d| d != 1) {
        let reason = format!("has the shape {:?}, but only A of a convolution may have a kernel", b.shape);
        return Err(Error::tensor(path, b.name, reason));
    }
    let (at, bt) = (factor(file, a, "[rank, inputs]")?, factor(file, b, "[outputs, rank]")?);
    let (mut a_out, mut dims) = (at, a_dims.to_vec());
    if let Some(mid) = mid {
        let core = factor(file, &mid, "[rank, rank, kernel...]")?;
        dims = mid.shape.get(2..).unwrap_or_default().to_vec();
        if a_dims.iter().any(|&d| d != 1) || mid.shape.get(1) != Some(&a_out.rows) {
            let reason =
                format!("has the shape {:?}, which does not fit `{}` of {:?}", mid.shape, a.name, a.shape);
            return Err(Error::tensor(path, mid.name, reason));
        }
        a_out = contracted(&core, &a_out, dims.iter().product());
    }
    if a_out.rows != bt.cols {
        return Err(Error::tensor(
            path,
            &bt.key,
            format!(
                "has rank {} by its shape {:?}, but `{}` has rank {} by its shape {:?}; they should agree",
                bt.cols, b.shape, a_out.key, a_out.rows, a.shape
            ),
        ));
    }
    let ones = if mid.is_some() { dims.len() } else { b_dims.len() };
    let kernel = (!dims.is_empty() || ones > 0).then_some(Kernel { dims, ones });
    let rank = a_out.rows;
    Ok(Factors { a: a_out, b: bt, kernel, factor: 1.0, alpha_rank: AlphaRank::Of(rank), lost: None })
}

/// `A[m, (i, k)] = Σ_n core[m, n, k] · down[n, i]`, in f64, rounded once.
fn contracted(core: &Tensor, down: &Tensor, kernel: usize) -> Tensor {
    let (mid, low): (Vec<f64>, Vec<f64>) = (core.raw().to_vec(), down.raw().to_vec());
    let (inner, input) = (down.rows, down.cols);
    let a = Matrix::from_fn(core.rows, input * kernel, |m, j| {
        let (i, k) = (j / kernel, j % kernel);
        let sum: f64 = (0..inner).map(|n| mid[(m * inner + n) * kernel + k] * low[n * input + i]).sum();
        sum as f32
    });
    Tensor::of(a, core.key.to_string())
}

fn alone(path: &Path, found: &TensorRef, part: &str, missing: &str) -> Error {
    Error::tensor(path, found.name, format!("is the factor {part} of a layer whose {missing} is missing"))
}

/// A tensor as a matrix: its first dimension, and all others as one.
pub(super) fn factor(file: &SafetensorsFile, t: &TensorRef, wanted: &str) -> Result<Tensor> {
    let fail = |reason: String| Err(Error::tensor(file.path(), t.name, reason));
    let [rows, rest @ ..] = t.shape else {
        return fail(format!("has the shape {:?}, but {wanted} is needed", t.shape));
    };
    if !(1..=4).contains(&rest.len()) {
        return fail(format!("has the shape {:?}, but {wanted} is needed", t.shape));
    }
    if t.shape.contains(&0) {
        return fail(format!("has the shape {:?}, but no dimension of {wanted} may be zero", t.shape));
    }
    let (rows, cols) = (*rows, rest.iter().product());
    let key: Arc<str> = t.name.into();
    let dtype = match t.dtype {
        FileDtype::F32 => Dtype::F32,
        FileDtype::F16 => Dtype::F16,
        FileDtype::BF16 => Dtype::Bf16,
        // Every value of theirs is one of f16.
        FileDtype::F8_E4M3 | FileDtype::F8_E5M2 => {
            let bytes = t.bytes()?.iter().flat_map(|&b| f8(b, t.dtype).to_le_bytes()).collect::<Vec<u8>>();
            let data = TensorData::Bytes(bytes.into());
            return Ok(Tensor { dtype: Dtype::F16, rows, cols, key, data });
        }
        other => {
            let supported = "supported are F32, F16, BF16, F8_E4M3 and F8_E5M2";
            return fail(format!("is of type {other}; {supported}"));
        }
    };
    Ok(Tensor { dtype, rows, cols, key, data: TensorData::File(file.clone(), 0, Arc::default()) })
}

/// A number of 8 bits, exactly.
pub(crate) fn f8(bits: u8, dtype: FileDtype) -> half::f16 {
    if dtype == FileDtype::F8_E5M2 {
        // The upper half of an f16.
        return half::f16::from_bits(u16::from(bits) << 8);
    }
    let (sign, rest) = (u16::from(bits & 0x80) << 8, u16::from(bits & 0x7f));
    let magnitude = match rest {
        0x7f => half::f16::NAN.to_bits(),
        // Eighths of the smallest normal number.
        0..8 => half::f16::from_f32(f32::from(rest) / 512.0).to_bits(),
        // The exponent of these 8 bits counts from 7, that of an f16 from 15.
        _ => (rest << 7) + (8 << 10),
    };
    half::f16::from_bits(sign | magnitude)
}

/// One number of any type, in any shape.
pub(super) fn number(path: &Path, t: &TensorRef, what: &str) -> Result<f64> {
    let fail = |reason: String| Err(Error::tensor(path, t.name, reason));
    if t.shape.iter().product::<usize>() != 1 {
        return fail(format!("has the shape {:?}, but {what} is one number", t.shape));
    }
    let bytes = t.bytes()?;
    let bytes = &*bytes;
    macro_rules! number {
        ($type:ty) => {
            bytes.try_into().map(<$type>::from_le_bytes).ok().map(|x| x as f64)
        };
    }
    let value = match t.dtype {
        FileDtype::F64 => number!(f64),
        FileDtype::F32 => number!(f32),
        FileDtype::F16 => bytes.try_into().map(|b| half::f16::from_le_bytes(b).to_f64()).ok(),
        FileDtype::BF16 => bytes.try_into().map(|b| half::bf16::from_le_bytes(b).to_f64()).ok(),
        FileDtype::F8_E4M3 | FileDtype::F8_E5M2 => bytes.first().map(|b| f8(*b, t.dtype).to_f64()),
        FileDtype::I64 => number!(i64),
        FileDtype::U64 => number!(u64),
        FileDtype::I32 => number!(i32),
        FileDtype::U32 => number!(u32),
        FileDtype::I16 => number!(i16),
        FileDtype::U16 => number!(u16),
        FileDtype::I8 => number!(i8),
        FileDtype::U8 => number!(u8),
        _ => None,
    };
    match value {
        Some(value) if value.is_finite() => Ok(value),
        Some(value) => fail(format!("is {value}, but {what} is a finite number")),
        None => fail(format!("is of type {}; {what} is a float or an integer", t.dtype)),
    }
}

/// Elements of a tensor as a matrix, in f64.
pub(super) fn wide(file: &SafetensorsFile, t: &TensorRef) -> Result<Matrix> {
    let tensor = factor(file, t, "a matrix")?;
    let (rows, cols) = (tensor.raw().rows(), tensor.raw().cols());
    Ok(Matrix { rows, cols, data: tensor.raw().to_vec() })
}

/// Names of the shards of a folder, or the file itself.
pub(super) fn shards(path: &Path) -> Result<BTreeSet<PathBuf>> {
    if !path.is_dir() {
        return Ok([path.to_owned()].into());
    }
    let mut files = BTreeSet::new();
    for file in disk::list(path).map_err(|e| Error::io(path, "list", e))? {
        if file.extension().is_some_and(|e| e == "safetensors") && file.is_file() {
            files.insert(file);
        }
    }
    if files.is_empty() {
        return Err(Error::file(path, "the folder holds no `*.safetensors` file"));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_8_bits() {
        for (bits, value) in
            [(0x00, 0.0), (0x01, 0.001_953_125), (0x38, 1.0), (0xb8, -1.0), (0x7e, 448.0), (0x08, 0.015_625)]
        {
            assert_eq!(f8(bits, FileDtype::F8_E4M3).to_f32(), value);
        }
        assert!(f8(0x7f, FileDtype::F8_E4M3).is_nan() && f8(0xff, FileDtype::F8_E4M3).is_nan());
        // Numbers of one exponent are equally far apart, and twice as far as those of the one before.
        let all: Vec<f32> = (0..0x7f).map(|bits| f8(bits, FileDtype::F8_E4M3).to_f32()).collect();
        for bits in 8..0x7e {
            let distance = |bits: usize| all[bits + 1] - all[bits];
            let factor = if bits % 8 == 0 && bits > 8 { 2.0 } else { 1.0 };
            assert_eq!(distance(bits), factor * distance(bits - 1), "{bits:#x}");
        }
        assert_eq!(f8(0x7b, FileDtype::F8_E5M2).to_f32(), 57344.0);
        assert_eq!(f8(0x01, FileDtype::F8_E5M2).to_f32(), 1.0 / 65536.0);
        assert!(f8(0x7c, FileDtype::F8_E5M2).is_infinite());
    }
}
