//! From the tensors of a file to layers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::families::{self, Clue, Family, Names};
use super::keys::{self, LayerKey, Part, Split};
use super::other::{self, Base, Lost, Other};
use super::scale::{Scale, ScaleRule, Scales};
use super::spelling::Spelling;
use super::{Format, Kernel, Layer, PartOf, Tensor, TensorData, fuse};
use crate::safetensors_file::{FileDtype, SafetensorsFile, TensorRef};
use crate::{Dtype, Error, Matrix, RawMatrix, Result};

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
    pub flat: String,
    pub names: Option<Names>,
    pub parts: BTreeMap<Part, &'a str>,
}

/// A module's update, whatever kind of adapter it was.
pub(super) struct Factors {
    pub a: Tensor,
    pub b: Tensor,
    pub kernel: Option<Kernel>,
    /// The factor on `B · A` that is not alpha's.
    pub factor: f64,
    /// Whether alpha is for this rank; `None`: it is in the factors already.
    pub alpha_rank: Option<usize>,
    pub lost: Option<Lost>,
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
    let clues: Vec<Clue> = groups.iter().map(|(key, group)| group.clue(file, key)).collect();
    let family = families::recognise(&clues, file.metadata());
    let needs_base = groups.values().any(|g| g.has(Part::Magnitude) || g.has(Part::DoraScale));
    let base = options.base.as_ref().filter(|_| needs_base).map(|path| Base::open(path)).transpose()?;
    let usual = usual_names(&groups, family);
    let alpha = groups.values().any(|g| g.has(Part::Alpha));
    let source = Source { file, options, base, family, scales };

    let read: Vec<Module> = groups
        .into_par_iter()
        .map(|(key, group)| {
            let names = if family.has_native() { group.names.unwrap_or(usual) } else { Names::Diffusers };
            layers(&source, key, &group, names, alpha)
        })
        .collect::<Result<_>>()?;
    let (layers, lost): (Vec<_>, Vec<_>) = read.into_iter().unzip();
    let mut layers: Vec<Layer> = layers.into_iter().flatten().collect();
    layers.sort_by(|x, y| x.key.cmp(&y.key));
    if let Some([x, y]) = layers.windows(2).find(|pair| pair[0].key == pair[1].key) {
        return Err(twice(path, &y.a.key, &x.a.key));
    }
    notes.extend(other::notes(lost.into_iter().flatten()));
    Ok(Read { layers, notes })
}

fn twice(path: &Path, key: &str, other: &str) -> Error {
    let reason =
        format!("names the same layer as `{other}`; a file may hold one adapter, with each layer once");
    Error::tensor(path, key, reason)
}

type Groups<'a> = BTreeMap<LayerKey, Group<'a>>;

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
        let (layer, flat, names) = LayerKey::recognise(module);
        let group = groups.entry(layer).or_insert(Group { module, flat, names, parts: BTreeMap::new() });
        if part == Part::A {
            group.module = module;
        }
        if let Some(other) = group.parts.insert(part, key) {
            return Err(twice(path, key, other));
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
        return Err(Error::file(
            path,
            format!(
                "{what}: {}; expected are keys that end in `.lora_A.weight` and `.lora_B.weight`, or \
                 `.lora_down.weight` and `.lora_up.weight`",
                some(&unknown)
            ),
        ));
    }
    if !unknown.is_empty() {
        skipped.insert("no known kind", unknown);
    }
    if groups.is_empty() {
        let what =
            if skipped.is_empty() { "there is no tensor in it" } else { "nothing in it can be merged" };
        return Err(Error::file(path, format!("it holds no LoRA layers: {what}")));
    }
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
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
    Err(Error::tensor(
        path,
        key,
        format!("belongs to {kind}, which cannot be merged; `--skip-unsupported` leaves such tensors out"),
    ))
}

/// Whose names most modules have.
fn usual_names(groups: &Groups, family: Family) -> Names {
    let count = |names| groups.values().filter(|g| g.names == Some(names)).count();
    let of = [Names::Diffusers, Names::Processor, Names::Xlabs, Names::Native];
    let usual = of.into_iter().max_by_key(|names| count(*names)).filter(|names| count(*names) > 0);
    usual.filter(|_| family.has_native()).unwrap_or(Names::Diffusers)
}

impl<'a> Group<'a> {
    pub fn has(&self, part: Part) -> bool {
        self.parts.contains_key(&part)
    }

    pub fn tensor(&self, file: &'a SafetensorsFile, part: Part) -> Option<TensorRef<'a>> {
        self.parts.get(&part).and_then(|key| file.tensor(key))
    }

    /// What the module tells of the family. Shapes are not checked yet.
    fn clue<'b>(&'b self, file: &SafetensorsFile, key: &'b LayerKey) -> Clue<'b> {
        let shape = |part| self.parts.get(&part).and_then(|key| file.tensor(key)).map(|t| t.shape);
        let input = shape(Part::A).or(shape(Part::Hada(keys::Hada::W1B)));
        let input = input.and_then(|s| s.get(1..)).map_or(0, |s| s.iter().product());
        let output = shape(Part::B).or(shape(Part::Hada(keys::Hada::W1A)));
        let output = output.and_then(|s| s.first().copied()).unwrap_or(0);
        Clue { component: key.component(), key: key.flat(), flat: &self.flat, input, output }
    }
}

/// The layers of a module, and what making LoRAs of them lost.
type Module = (Vec<Layer>, Option<(LayerKey, Lost)>);

/// The layers of a module: one, or the parts that it fuses.
fn layers(source: &Source, key: LayerKey, group: &Group, names: Names, alphas: bool) -> Result<Module> {
    let file = source.file;
    let factors = factors(source, &key, group)?;
    let (_, len) = keys::prefix(group.module);
    let (prefix, module) = group.module.split_at(len);
    let format = Format::of(prefix, module, Some(names).filter(|_| source.family.has_native()));
    let standard = Spelling::standard(format, source.family);
    // Of what was no LoRA, and of keys that nobody writes any more, the usual ones are written.
    let suffix = |part, usual| match group.parts.get(&part).map(|key| (key, keys::split(key))) {
        Some((key, Split::Part(module, _))) if names != Names::Processor => {
            key.strip_prefix(module).unwrap_or_default().to_owned().into()
        }
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
        Some(rank) => source.scales.of(&key, module, rank, alpha),
        None => Scale { value: 1.0, alpha: None, rule: ScaleRule::Given, rank_stabilized: false },
    };
    scale.value *= factors.factor * scalar.unwrap_or(1.0);
    let mut layer = Layer {
        module: module.to_owned(),
        prefix: prefix.to_owned(),
        rank,
        input: factors.a.cols,
        output: factors.b.rows,
        scale,
        family: source.family,
        spelling: Some(Arc::new(spelling)),
        part: None,
        kernel: factors.kernel,
        a: factors.a,
        b: factors.b,
        key: key.clone(),
    };
    if names == Names::Native
        && key.component().is_empty()
        && source.family.swaps(key.flat(), layer.input, layer.output)
    {
        layer.b = fuse::swap_halves(&layer.b);
    }
    let lost = factors.lost.map(|lost| (key, lost));
    let fused = families::fused(source.family, layer.key.flat()).filter(|_| layer.key.component().is_empty());
    let Some((fused, parts)) = fused else { return Ok((vec![layer], lost)) };
    let Some(rows) = fused.rows(layer.input, layer.output).filter(|_| layer.kernel.is_none()) else {
        let reason = format!(
            "fuses {} modules of {}, but {} rows cannot be cut so for {} inputs",
            parts.len(),
            source.family,
            layer.output,
            layer.input
        );
        return Err(Error::tensor(file.path(), &layer.b.key, reason));
    };
    let part = |index| PartOf { module: module.into(), index, fused };
    Ok((fuse::split(&layer, &rows, &parts, part), lost))
}

fn factors(source: &Source, key: &LayerKey, group: &Group) -> Result<Factors> {
    let (file, path) = (source.file, source.file.path());
    let find = |part| group.tensor(file, part);
    if let Some(kind) = Other::of(group) {
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
    Ok(Factors { a: a_out, b: bt, kernel, factor: 1.0, alpha_rank: Some(rank), lost: None })
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
            let bytes = t.bytes.iter().flat_map(|&b| f8(b, t.dtype).to_le_bytes()).collect::<Vec<u8>>();
            let data = TensorData::Bytes(bytes.into());
            return Ok(Tensor { dtype: Dtype::F16, rows, cols, key, data });
        }
        other => {
            let supported = "supported are F32, F16, BF16, F8_E4M3 and F8_E5M2";
            return fail(format!("is of type {other}; {supported}"));
        }
    };
    Ok(Tensor { dtype, rows, cols, key, data: TensorData::File(file.clone(), 0) })
}

/// A number of 8 bits, exactly.
fn f8(bits: u8, dtype: FileDtype) -> half::f16 {
    if dtype == FileDtype::F8_E5M2 {
        // The upper half of an f16.
        return half::f16::from_bits(u16::from(bits) << 8);
    }
    let (sign, exponent, mantissa) = (bits >> 7, i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    half::f16::from_f32(if sign == 1 { -magnitude } else { magnitude })
}

/// One number of any type, in any shape.
pub(super) fn number(path: &Path, t: &TensorRef, what: &str) -> Result<f64> {
    let fail = |reason: String| Err(Error::tensor(path, t.name, reason));
    if t.shape.iter().product::<usize>() != 1 {
        return fail(format!("has the shape {:?}, but {what} is one number", t.shape));
    }
    macro_rules! number {
        ($type:ty) => {
            t.bytes.try_into().map(<$type>::from_le_bytes).ok().map(|x| x as f64)
        };
    }
    let value = match t.dtype {
        FileDtype::F64 => number!(f64),
        FileDtype::F32 => number!(f32),
        FileDtype::F16 => t.bytes.try_into().map(|b| half::f16::from_le_bytes(b).to_f64()).ok(),
        FileDtype::BF16 => t.bytes.try_into().map(|b| half::bf16::from_le_bytes(b).to_f64()).ok(),
        FileDtype::F8_E4M3 | FileDtype::F8_E5M2 => t.bytes.first().map(|b| f8(*b, t.dtype).to_f64()),
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
    let RawMatrix { rows, cols, .. } = tensor.raw();
    Ok(Matrix { rows, cols, data: tensor.raw().to_vec() })
}

/// Names of the shards of a folder, or the file itself.
pub(super) fn shards(path: &Path) -> Result<BTreeSet<PathBuf>> {
    if !path.is_dir() {
        return Ok([path.to_owned()].into());
    }
    let entries = std::fs::read_dir(path).map_err(|e| Error::io(path, "list", e))?;
    let mut files = BTreeSet::new();
    for entry in entries {
        let file = entry.map_err(|e| Error::io(path, "list", e))?.path();
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
        assert!(f8(0x7f, FileDtype::F8_E4M3).is_nan());
        assert_eq!(f8(0x7b, FileDtype::F8_E5M2).to_f32(), 57344.0);
        assert_eq!(f8(0x01, FileDtype::F8_E5M2).to_f32(), 2f32.powi(-16));
        assert!(f8(0x7c, FileDtype::F8_E5M2).is_infinite());
    }
}
