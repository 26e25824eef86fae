//! Kinds of adapters that are no LoRA, made into one: exactly where that takes no high rank, or truncated.

mod dora;
mod loha;
mod lokr;
mod low_rank;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::families::Family;
use super::keys::{Bare, Hada, LayerKey, Lokr, Part, prefix};
use super::read::{AlphaRank, Factors, Group, Source, factor, lora, number, shards, wide};
use super::{Kernel, OpenOptions, Tensor};
use crate::io::safetensors_file::SafetensorsFile;
use crate::words::count;
use crate::{Error, Matrix, Remedy, Result};

/// A kind of adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Other {
    LoHa,
    LoKr,
    DoRA,
    Full,
}

impl Other {
    /// The kind that the tensors of a module are of; `None` for a LoRA.
    pub fn of(group: &Group) -> Option<Self> {
        let has = |of: fn(&Part) -> bool| group.parts.keys().any(of);
        if has(|part| matches!(part, Part::Magnitude | Part::DoraScale)) {
            Some(Self::DoRA)
        } else if has(|part| matches!(part, Part::Hada(_))) {
            Some(Self::LoHa)
        } else if has(|part| matches!(part, Part::Lokr(_))) {
            Some(Self::LoKr)
        } else if has(|part| *part == Part::Diff) && !has(|part| matches!(part, Part::A | Part::B)) {
            Some(Self::Full)
        } else {
            None
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::LoHa => "LoHa",
            Self::LoKr => "LoKr",
            Self::DoRA => "DoRA",
            Self::Full => "a full weight difference",
        }
    }
}

/// Whether a tensor of a module is of its kind. What is not may not be dropped, for it changes the update.
pub(super) fn belongs(kind: Option<Other>, part: Part) -> bool {
    let factor = matches!(part, Part::A | Part::B | Part::Mid);
    match (kind, part) {
        (_, Part::Alpha) => true,
        (Some(Other::Full), _) => part == Part::Diff,
        (_, Part::Scalar) => true,
        (None, _) => factor,
        (Some(Other::LoHa), _) => matches!(part, Part::Hada(_)),
        (Some(Other::LoKr), _) => matches!(part, Part::Lokr(_)),
        (Some(Other::DoRA), _) => part != Part::Diff,
    }
}

/// What a LoRA of another kind's update lost: squares of Frobenius norms.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lost {
    pub kind: Other,
    pub rank: usize,
    pub cut: f64,
    pub whole: f64,
}

/// An update as a LoRA, in f64.
pub(super) struct Expanded {
    pub b: Matrix,
    pub a: Matrix,
    /// Squared norm of what was cut off, and of the whole; zero if nothing was.
    pub cut: f64,
    pub whole: f64,
}

/// What the user should know about what was made into LoRAs.
pub(super) fn notes(lost: impl Iterator<Item = (LayerKey, Lost)>) -> Vec<String> {
    let mut kinds: BTreeMap<Other, Vec<(LayerKey, Lost)>> = BTreeMap::new();
    for (key, lost) in lost {
        kinds.entry(lost.kind).or_default().push((key, lost));
    }
    let error = |cut: f64, whole: f64| if whole > 0.0 { (cut / whole).max(0.0).sqrt() } else { 0.0 };
    let note = |(kind, lost): (Other, Vec<(LayerKey, Lost)>)| {
        let of = |lost: &Lost| error(lost.cut, lost.whole);
        let rank = lost.iter().map(|(_, l)| l.rank).max().unwrap_or(0);
        let layers =
            format!("{} of {} became LoRAs of rank {rank} at most", count(lost.len(), "layer"), kind.name());
        let cut: Vec<_> = lost.iter().filter(|(_, l)| l.cut > 0.0).collect();
        let Some((key, most)) = cut.iter().max_by(|x, y| of(&x.1).total_cmp(&of(&y.1))) else {
            return format!("{layers}, exactly");
        };
        let (all, whole) = cut.iter().fold((0.0, 0.0), |(all, whole), (_, l)| (all + l.cut, whole + l.whole));
        format!(
            "{layers}; of the updates of {} {:.2}% was cut off (relative Frobenius norm), at most {:.2}% (`{key}`)",
            count(cut.len(), "layer"),
            100.0 * error(all, whole),
            100.0 * of(most)
        )
    };
    kinds.into_iter().map(note).collect()
}

/// The rank that an update is truncated to, if it is of a higher one. The error says how to allow it.
fn bound(source: &Source, key: &LayerKey, kind: Other, exact: usize) -> Result<Option<usize>> {
    match source.options.truncate {
        Some(rank) => Ok((exact > rank).then_some(rank)),
        None if exact <= OpenOptions::EXACT_RANK => Ok(None),
        None => {
            let (key, kind, most) = (key.as_str(), kind.name(), OpenOptions::EXACT_RANK);
            let what = format!(
                "layer `{key}`: this is {kind}, as a LoRA of rank {exact}, and without a loss at most {most} is read; a \
                 rank to cut to is needed"
            );
            Err(Error::not_mergeable(source.file.path(), what, Remedy::Rank))
        }
    }
}

/// An update that is no LoRA of its own, or that DoRA is made of.
enum Update {
    Lora(Factors),
    LoHa(loha::LoHa),
    LoKr(lokr::LoKr),
}

impl Update {
    fn read(source: &Source, group: &Group) -> Result<Self> {
        let has = |of: fn(&Part) -> bool| group.parts.keys().any(of);
        let loha = has(|part| matches!(part, Part::Hada(_)));
        let lokr = has(|part| matches!(part, Part::Lokr(_)));
        let pair = has(|part| matches!(part, Part::A | Part::B));
        if [loha, lokr, pair].iter().filter(|of| **of).count() > 1 {
            return Err(unfit(source, group, "is of a module that holds adapters of two kinds".to_owned()));
        }
        if loha {
            let w = |part| tensors(source, group, Part::Hada(part));
            let parts =
                [w(Hada::W1A)?, w(Hada::W1B)?, w(Hada::W2A)?, w(Hada::W2B)?, w(Hada::T1)?, w(Hada::T2)?];
            return loha::LoHa::read(parts).map(Self::LoHa).map_err(|reason| unfit(source, group, reason));
        }
        if lokr {
            let w = |part| tensors(source, group, Part::Lokr(part));
            let parts = [
                w(Lokr::W1)?,
                w(Lokr::W1A)?,
                w(Lokr::W1B)?,
                w(Lokr::W2)?,
                w(Lokr::W2A)?,
                w(Lokr::W2B)?,
                w(Lokr::T2)?,
            ];
            return lokr::LoKr::read(parts).map(Self::LoKr).map_err(|reason| unfit(source, group, reason));
        }
        let find = |part| group.tensor(source.file, part);
        match (find(Part::A), find(Part::B)) {
            (Some(a), Some(b)) => lora(source.file, &a, &b, find(Part::Mid)).map(Self::Lora),
            _ => Err(unfit(source, group, "belongs to DoRA whose factors are missing".to_owned())),
        }
    }

    /// What alpha is divided by.
    fn alpha_rank(&self) -> AlphaRank {
        match self {
            Self::Lora(factors) => AlphaRank::Of(factors.a.rows),
            Self::LoHa(loha) => AlphaRank::Of(loha.rank),
            Self::LoKr(lokr) => lokr.alpha_rank.map_or(AlphaRank::OfConfig, AlphaRank::Of),
        }
    }

    fn kernel(&self) -> Option<Vec<usize>> {
        match self {
            Self::Lora(factors) => factors.kernel.as_ref().map(|kernel| kernel.dims.clone()),
            Self::LoHa(loha) => loha.kernel.clone(),
            Self::LoKr(lokr) => lokr.kernel.clone(),
        }
    }

    /// The whole update, without alpha.
    fn dense(&self) -> Matrix {
        let matrix = |t: &Tensor| Matrix { rows: t.rows, cols: t.cols, data: t.raw().to_vec::<f64>() };
        match self {
            Self::Lora(factors) => product(&matrix(&factors.b), &matrix(&factors.a)),
            Self::LoHa(loha) => loha.dense(),
            Self::LoKr(lokr) => {
                let Expanded { b, a, .. } = lokr.exact();
                product(&b, &a)
            }
        }
    }

    /// The update of a LoHa or LoKr as a LoRA; a matrix has no higher rank than it has rows or columns.
    fn expanded(&self, source: &Source, key: &LayerKey, kind: Other) -> Result<Expanded> {
        let (ranks, (rows, cols)) = match self {
            Self::Lora(factors) => (factors.a.rows, (factors.b.rows, factors.a.cols)),
            Self::LoHa(loha) => (loha.exact_rank(), loha.size()),
            Self::LoKr(lokr) => (lokr.exact_rank(), lokr.size()),
        };
        let exact = ranks.min(rows).min(cols);
        Ok(match (self, bound(source, key, kind, exact)?) {
            (Self::LoKr(lokr), Some(rank)) => lokr.truncated(rank),
            (_, Some(rank)) => low_rank::truncate(&self.dense(), rank),
            (_, None) if exact < ranks => of_full_rank(&self.dense()),
            (Self::LoHa(loha), None) => loha.exact(),
            (Self::LoKr(lokr), None) => lokr.exact(),
            (Self::Lora(_), None) => of_full_rank(&self.dense()),
        })
    }

    /// The factor that alpha makes.
    fn scale(&self, source: &Source, key: &LayerKey, group: &Group) -> Result<f64> {
        let of = |part, what| {
            group.tensor(source.file, part).map(|t| number(source.file.path(), &t, what)).transpose()
        };
        let (alpha, scalar) = (of(Part::Alpha, "an alpha")?, of(Part::Scalar, "a scalar")?);
        let path = &group.module[prefix(group.module).1..];
        let scale = match self.alpha_rank() {
            AlphaRank::Of(rank) => source.scales.of(key, path, rank, alpha).value,
            AlphaRank::OfConfig => source.scales.of_config(key, path).value,
            AlphaRank::Folded => 1.0,
        };
        Ok(scale * scalar.unwrap_or(1.0))
    }
}

/// A matrix as a LoRA of its full rank: the smaller side's identity and itself.
fn of_full_rank(w: &Matrix) -> Expanded {
    let identity = |n: usize| Matrix::from_fn(n, n, |i, j| f64::from(u8::from(i == j)));
    let (b, a) = if w.rows <= w.cols { (identity(w.rows), w.clone()) } else { (w.clone(), identity(w.cols)) };
    Expanded { b, a, cut: 0.0, whole: 0.0 }
}

/// A module of another kind as a LoRA.
pub(super) fn factors(source: &Source, key: &LayerKey, group: &Group, kind: Other) -> Result<Factors> {
    let file = source.file;
    let mut alpha_rank = AlphaRank::Folded;
    let kernel;
    // A matrix of full rank, cut to what is allowed.
    let cut = |w: &Matrix| -> Result<Expanded> {
        let rank = bound(source, key, kind, w.rows.min(w.cols))?;
        Ok(rank.map_or_else(|| of_full_rank(w), |rank| low_rank::truncate(w, rank)))
    };
    let expanded = match kind {
        Other::LoHa | Other::LoKr => {
            let update = Update::read(source, group)?;
            alpha_rank = update.alpha_rank();
            kernel = update.kernel();
            update.expanded(source, key, kind)?
        }
        Other::DoRA => {
            let Some(base) = &source.base else {
                let norms = group.parts.get(&Part::Magnitude).or(group.parts.get(&Part::DoraScale));
                let what = format!(
                    "`{}`: belongs to DoRA, whose update depends on the base model's weights and has full rank: these and a \
                     rank to cut to are needed",
                    norms.unwrap_or(&group.module)
                );
                return Err(Error::not_mergeable(file.path(), what, Remedy::Base));
            };
            let update = Update::read(source, group)?;
            kernel = update.kernel();
            cut(&dora::update(source, base, key, group, &update)?)?
        }
        Other::Full => {
            let Some(diff) = group.tensor(file, Part::Diff) else {
                return Err(Error::layer(key.as_str(), "its difference is missing"));
            };
            kernel = diff.shape.get(2..).filter(|dims| !dims.is_empty()).map(<[usize]>::to_vec);
            let Some(rank) = source.options.truncate else {
                let what = format!(
                    "`{}`: belongs to a full weight difference; a rank to cut to is needed",
                    diff.name
                );
                return Err(Error::not_mergeable(file.path(), what, Remedy::Rank));
            };
            low_rank::truncate(&wide(file, &diff)?, rank)
        }
    };
    let input = expanded.a.cols;
    let dims =
        kernel.or_else(|| source.family.kernel(key.flat(), input).filter(|_| key.component().is_empty()));
    let lost = Lost { kind, rank: expanded.a.rows, cut: expanded.cut, whole: expanded.whole };
    let name = |part: &str| format!("{}.{part}", group.module);
    Ok(Factors {
        a: Tensor::of(narrow(&expanded.a), name("lora_A.weight")),
        b: Tensor::of(narrow(&expanded.b), name("lora_B.weight")),
        kernel: dims.map(|dims| Kernel { ones: dims.len(), dims }),
        factor: 1.0,
        alpha_rank,
        lost: Some(lost),
    })
}

/// A tensor in f64, with its shape.
type Found = Option<(Vec<usize>, Matrix)>;

fn tensors(source: &Source, group: &Group, part: Part) -> Result<Found> {
    let tensor = group.tensor(source.file, part);
    tensor.map(|t| Ok((t.shape.to_vec(), wide(source.file, &t)?))).transpose()
}

fn unfit(source: &Source, group: &Group, reason: String) -> Error {
    // Those of other kinds come after those of a LoRA.
    let key = group.parts.values().next_back().copied().unwrap_or(group.module);
    Error::tensor(source.file.path(), key, reason)
}

fn narrow(m: &Matrix) -> Matrix<f32> {
    m.map(|v| v as f32)
}

/// `X · Y`.
fn product(x: &Matrix, y: &Matrix) -> Matrix {
    let mut out = Matrix::zeros(x.rows, y.cols);
    for (i, row) in out.data.chunks_exact_mut(y.cols.max(1)).enumerate() {
        for (k, &v) in x.row(i).iter().enumerate() {
            row.iter_mut().zip(y.row(k)).for_each(|(out, w)| *out += v * w);
        }
    }
    out
}

fn squared(m: &Matrix) -> f64 {
    m.data.iter().map(|v| v * v).sum()
}

/// A core and its factors: `up = waᵀ`, and `A[m, (i, k)] = Σ_n core[m, n, k] · wb[n, i]`.
fn tucker(core: &(Vec<usize>, Matrix), wa: &Matrix, wb: &Matrix) -> Option<(Matrix, Matrix, Vec<usize>)> {
    let (shape, t) = core;
    let dims = shape.get(2..)?.to_vec();
    let kernel: usize = dims.iter().product();
    let fits = t.rows == wa.rows && shape.get(1) == Some(&wb.rows) && !dims.is_empty();
    fits.then(|| {
        let a = Matrix::from_fn(t.rows, wb.cols * kernel, |m, j| {
            let (i, k) = (j / kernel, j % kernel);
            (0..wb.rows).map(|n| t[(m, n * kernel + k)] * wb[(n, i)]).sum()
        });
        (wa.transposed(), a, dims)
    })
}

/// Weights of the base model.
pub(super) struct Base {
    files: Vec<SafetensorsFile>,
    places: BTreeMap<LayerKey, Stored>,
    path: PathBuf,
}

/// Where a module's weights are, and whether the halves of their rows are the other way round.
struct Stored {
    file: usize,
    name: String,
    swapped: bool,
}

impl Base {
    pub fn open(path: &Path, family: Family) -> Result<Self> {
        let files: Vec<_> =
            shards(path)?.iter().map(|file| SafetensorsFile::open(file)).collect::<Result<_>>()?;
        let mut places = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for tensor in file.tensors() {
                let Some(name) = tensor.name.strip_suffix(".weight") else { continue };
                let bare = Bare::parse(name);
                let widths = match tensor.shape {
                    [rows, rest @ ..] if !rest.is_empty() => Some((rest.iter().product(), *rows)),
                    _ => None,
                };
                let module = family.module(&bare.component, &bare.flat, widths, None);
                let key = bare.key(module.as_ref().map_or(&bare.flat, |module| &module.key));
                let swapped = module.is_some_and(|module| module.swap);
                places.insert(key, Stored { file: i, name: tensor.name.to_owned(), swapped });
            }
        }
        Ok(Self { files, places, path: path.to_owned() })
    }

    /// The weights of a module as a matrix, whether the base and the adapter fuse it or not.
    fn weight(&self, family: Family, key: &LayerKey, input: usize) -> Result<Matrix> {
        if let Some(weight) = self.stored(key)? {
            return Ok(weight);
        }
        let bare = Bare { component: key.component().to_owned().into(), flat: key.flat().to_owned() };
        let module = family.module(&bare.component, &bare.flat, None, None);
        if let Some((_, parts)) = module.and_then(|module| module.fused) {
            let parts = parts.iter().map(|part| self.stored(&bare.key(&part.replace('.', "_"))));
            if let Some(parts) = parts.collect::<Result<Option<Vec<_>>>>()? {
                let (rows, cols) = (parts.iter().map(|p| p.rows).sum(), parts.first().map_or(0, |p| p.cols));
                return Ok(Matrix { rows, cols, data: parts.into_iter().flat_map(|p| p.data).collect() });
            }
        }
        for (whole, index, fused) in family.wholes(&bare.flat) {
            if let Some(weight) = self.stored(&bare.key(&whole))?
                && let Some(rows) = fused.rows(input, weight.rows)
            {
                let start: usize = rows[..index].iter().sum();
                let data = weight.data[start * weight.cols..(start + rows[index]) * weight.cols].to_vec();
                return Ok(Matrix { rows: rows[index], cols: weight.cols, data });
            }
        }
        let reason = format!("{} does not hold its weights; is it the base model?", self.path.display());
        Err(Error::layer(key.as_str(), reason))
    }

    fn stored(&self, key: &LayerKey) -> Result<Option<Matrix>> {
        let Some(stored) = self.places.get(key) else { return Ok(None) };
        let Some(tensor) = self.files.get(stored.file).and_then(|file| file.tensor(&stored.name)) else {
            return Ok(None);
        };
        let mut weight = wide(&self.files[stored.file], &tensor)?;
        self.files[stored.file].check()?;
        if stored.swapped {
            let half = weight.data.len() / 2;
            weight.data.rotate_left(half);
        }
        Ok(Some(weight))
    }
}
