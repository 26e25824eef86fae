//! Kinds of adapters that are no LoRA, made into one: exactly where that takes no high rank, or truncated.

mod dora;
mod loha;
mod lokr;
mod low_rank;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::families::{self, Family};
use super::keys::{Hada, LayerKey, Lokr, Part};
use super::read::{Factors, Group, Source, factor, lora, shards, wide};
use super::{Kernel, OpenOptions, Tensor};
use crate::safetensors_file::SafetensorsFile;
use crate::{Error, Matrix, Result};

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
        if has(|part| matches!(part, Part::Hada(_))) {
            Some(Self::LoHa)
        } else if has(|part| matches!(part, Part::Lokr(_))) {
            Some(Self::LoKr)
        } else if has(|part| matches!(part, Part::Magnitude | Part::DoraScale)) {
            Some(Self::DoRA)
        } else if has(|part| *part == Part::Diff) {
            Some(Self::Full)
        } else {
            None
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::LoHa => "LoHa",
            Self::LoKr => "LoKr",
            Self::DoRA => "DoRA",
            Self::Full => "a full weight difference",
        }
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
        let layers = format!("{} of {} became LoRAs of rank {rank} at most", count(lost.len()), kind.name());
        let cut: Vec<_> = lost.iter().filter(|(_, l)| l.cut > 0.0).collect();
        let Some((key, most)) = cut.iter().max_by(|x, y| of(&x.1).total_cmp(&of(&y.1))) else {
            return format!("{layers}, exactly");
        };
        let (all, whole) = cut.iter().fold((0.0, 0.0), |(all, whole), (_, l)| (all + l.cut, whole + l.whole));
        format!(
            "{layers}; of the updates of {} {:.2}% was cut off (relative Frobenius norm), at most {:.2}% (`{key}`)",
            count(cut.len()),
            100.0 * error(all, whole),
            100.0 * of(most)
        )
    };
    kinds.into_iter().map(note).collect()
}

fn count(layers: usize) -> String {
    format!("{layers} layer{}", if layers == 1 { "" } else { "s" })
}

/// The rank that an update is truncated to, if it is of a higher one. The error says how to allow it.
fn bound(source: &Source, key: &LayerKey, kind: Other, exact: usize) -> Result<Option<usize>> {
    match source.options.truncate {
        Some(rank) => Ok((exact > rank).then_some(rank)),
        None if exact <= OpenOptions::EXACT_RANK => Ok(None),
        None => Err(Error::layer(
            key.as_str(),
            format!(
                "{}: this is {}, as a LoRA of rank {exact}, and without a loss at most {} is read; \
                 `--allow-truncate RANK` reads it as a LoRA of that rank, and says what is lost",
                source.file.path().display(),
                kind.name(),
                OpenOptions::EXACT_RANK
            ),
        )),
    }
}

/// A module of another kind as a LoRA.
pub(super) fn factors(source: &Source, key: &LayerKey, group: &Group, kind: Other) -> Result<Factors> {
    let file = source.file;
    let mut alpha_rank = None;
    let kernel;
    let expanded = match kind {
        Other::LoHa => {
            let w = |part| tensors(source, group, Part::Hada(part));
            let parts =
                [w(Hada::W1A)?, w(Hada::W1B)?, w(Hada::W2A)?, w(Hada::W2B)?, w(Hada::T1)?, w(Hada::T2)?];
            let loha = loha::LoHa::read(parts).map_err(|reason| unfit(source, group, reason))?;
            alpha_rank = Some(loha.rank);
            kernel = loha.kernel.clone();
            match bound(source, key, kind, loha.exact_rank())? {
                None => loha.exact(),
                Some(rank) => low_rank::truncate(&loha.dense(), rank),
            }
        }
        Other::LoKr => {
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
            let lokr = lokr::LoKr::read(parts).map_err(|reason| unfit(source, group, reason))?;
            alpha_rank = lokr.alpha_rank;
            kernel = lokr.kernel.clone();
            match bound(source, key, kind, lokr.exact_rank())? {
                None => lokr.exact(),
                Some(rank) => lokr.truncated(rank),
            }
        }
        Other::DoRA => {
            let (Some(base), Some(rank)) = (&source.base, source.options.truncate) else {
                let reason = "belongs to DoRA, whose update depends on the base model's weights and has full rank: \
                              `--base FILE` gives them, and `--allow-truncate RANK` the rank to cut to";
                let norms = group.parts.get(&Part::Magnitude).or(group.parts.get(&Part::DoraScale));
                return Err(Error::tensor(file.path(), norms.unwrap_or(&group.module), reason));
            };
            let (update, shape) = dora::update(source, base, key, group)?;
            kernel = shape;
            low_rank::truncate(&update, rank)
        }
        Other::Full => {
            let Some(diff) = group.tensor(file, Part::Diff) else {
                return Err(Error::layer(key.as_str(), "its difference is missing"));
            };
            let Some(rank) = source.options.truncate else {
                let reason = "belongs to a full weight difference; `--allow-truncate RANK` reads it as a LoRA of that \
                              rank, and says what is lost";
                return Err(Error::tensor(file.path(), diff.name, reason));
            };
            kernel = diff.shape.get(2..).filter(|dims| !dims.is_empty()).map(<[usize]>::to_vec);
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
    Matrix { rows: m.rows, cols: m.cols, data: m.data.iter().map(|&v| v as f32).collect() }
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
    places: BTreeMap<LayerKey, (usize, String)>,
    path: PathBuf,
}

impl Base {
    pub fn open(path: &Path) -> Result<Self> {
        let files: Vec<_> =
            shards(path)?.iter().map(|file| SafetensorsFile::open(file)).collect::<Result<_>>()?;
        let mut places = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for tensor in file.tensors() {
                if let Some(module) = tensor.name.strip_suffix(".weight") {
                    places.insert(LayerKey::parse(module), (i, tensor.name.to_owned()));
                }
            }
        }
        Ok(Self { files, places, path: path.to_owned() })
    }

    /// The weights of a module as a matrix, whether the base and the adapter fuse it or not.
    fn weight(&self, family: Family, key: &LayerKey, input: usize) -> Result<Matrix> {
        if let Some(weight) = self.stored(key)? {
            return Ok(weight);
        }
        if let Some((_, parts)) = families::fused(family, key.flat()) {
            let parts = parts.iter().map(|part| self.stored(&LayerKey::of_flat(part.replace('.', "_"))));
            if let Some(parts) = parts.collect::<Result<Option<Vec<_>>>>()? {
                let (rows, cols) = (parts.iter().map(|p| p.rows).sum(), parts.first().map_or(0, |p| p.cols));
                return Ok(Matrix { rows, cols, data: parts.into_iter().flat_map(|p| p.data).collect() });
            }
        }
        if let Some((whole, index, fused)) = family.whole(key.flat())
            && let Some(weight) = self.stored(&LayerKey::of_flat(whole))?
            && let Some(rows) = fused.rows(input, weight.rows)
        {
            let start: usize = rows[..index].iter().sum();
            let data = weight.data[start * weight.cols..(start + rows[index]) * weight.cols].to_vec();
            return Ok(Matrix { rows: rows[index], cols: weight.cols, data });
        }
        let reason = format!("{} does not hold its weights; is it the base model?", self.path.display());
        Err(Error::layer(key.as_str(), reason))
    }

    fn stored(&self, key: &LayerKey) -> Result<Option<Matrix>> {
        let Some((file, name)) = self.places.get(key).and_then(|(i, name)| Some((self.files.get(*i)?, name)))
        else {
            return Ok(None);
        };
        file.tensor(name).map(|t| wide(file, &t)).transpose()
    }
}
