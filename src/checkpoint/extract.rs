//! The difference of two checkpoints as an adapter.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use rayon::prelude::*;
use serde::Serialize;
use web_time::Instant;

use super::low_rank::{LowRank, error, low_rank};
use super::quantised::{CHUNK, Values};
use super::read::{Checkpoint, Found, Place};
use crate::adapter::{Part, layers_of_weight};
use crate::io::resting_on;
use crate::words::count;
use crate::{Adapter, Control, Dtype, Error, Family, Format, Matrix, Result, Spectrum, Truncation};

/// How a difference becomes an adapter.
#[derive(Clone, Copy, Debug)]
pub struct ExtractOptions {
    /// How much of each difference to keep; by default all that rounding did not leave of zero.
    pub truncation: Truncation,
    /// The type of the adapter's factors, which errors are measured with.
    pub dtype: Dtype,
}

impl Default for ExtractOptions {
    fn default() -> Self {
        Self { truncation: Truncation::default(), dtype: Dtype::F32 }
    }
}

/// Two checkpoints of a model, whose difference `ΔW = W_tuned − W_base` is to become an adapter.
///
/// They may be spelled and stored differently: modules are matched by layer, as adapters are. A module that the tuned
/// checkpoint fuses is decomposed as a whole, and its layers share A.
pub struct Extract<'a> {
    tuned: &'a Checkpoint,
    base: &'a Checkpoint,
    family: Family,
    found: Vec<Found<'a>>,
    of_base: Vec<Found<'a>>,
    /// The weights that both have, and where the base has their rows.
    pairs: Vec<(usize, Vec<(Part, Place)>)>,
    /// What only one of them has, or what cannot be compared.
    left_out: Vec<String>,
}

/// An adapter and what it holds of the difference.
pub struct Extracted {
    /// The adapter, in memory.
    pub adapter: Adapter,
    /// What was extracted, and what was not.
    pub report: ExtractReport,
}

/// What became of a module.
#[derive(Clone, Debug, Serialize)]
pub struct ExtractedLayer {
    /// The module's name in the tuned checkpoint.
    pub layer: String,
    /// The rank that was kept.
    pub rank: usize,
    /// ‖ΔW‖, the Frobenius norm of the difference.
    pub norm: f64,
    /// ‖ΔW − B·A‖ / ‖ΔW‖, measured with the factors as they are written.
    pub error: f64,
}

/// What an extraction did.
#[derive(Clone, Debug, Serialize)]
pub struct ExtractReport {
    /// The model, as far as is known.
    pub family: String,
    /// Modules that are the same in both.
    pub unchanged: usize,
    /// The norm of the difference of all modules that were extracted.
    pub norm: f64,
    /// The share of it that the adapter lacks.
    pub error: f64,
    /// Each module that differs.
    pub layers: Vec<ExtractedLayer>,
    /// Tensors that differ, but are no matrix of a module: biases, norms, embeddings. No adapter holds them.
    pub changed: Vec<String>,
    /// Modules and tensors that only one of the checkpoints has.
    pub left_out: Vec<String>,
    /// Wall time.
    pub seconds: f64,
}

impl<'a> Extract<'a> {
    /// Matches the modules of two checkpoints. Nothing is computed yet.
    ///
    /// # Errors
    /// [`Error::File`] for checkpoints of different models, or that have no module in common; [`Error::Tensor`] for weights
    /// of different shapes, or in a quantisation that is not supported.
    pub fn new(tuned: &'a Checkpoint, base: &'a Checkpoint) -> Result<Self> {
        let (of, other) = (tuned.family(), base.family());
        let family = match of.and(other) {
            Family::UNKNOWN if of != Family::UNKNOWN && other != Family::UNKNOWN => {
                let reason = format!(
                    "is {of}, but {} is {other}; both have to be of one model",
                    base.path().display()
                );
                return Err(Error::file(tuned.path(), reason));
            }
            Family::UNKNOWN if of == Family::UNKNOWN => other,
            Family::UNKNOWN => of,
            both => both,
        };
        let (found, of_base) = (tuned.found(family), base.found(family));
        let mut extract =
            Self { tuned, base, family, found, of_base, pairs: Vec::new(), left_out: Vec::new() };
        extract.pair()?;
        Ok(extract)
    }

    /// The model, as far as both tell.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The spelling of adapters for the tuned checkpoint: [`Format::Peft`] for one that diffusers names, and else
    /// [`Format::Comfyui`].
    pub fn format(&self) -> Format {
        let own = |found: &&Found<'_>| {
            let parts = found.parts.as_deref().unwrap_or_default();
            parts.len() == 1 && parts[0].known && found.weight.module.ends_with(&parts[0].path)
        };
        let known = self.pairs.iter().filter(|(_, parts)| parts.iter().any(|(part, _)| part.known)).count();
        let diffusers = self.pairs.iter().map(|(i, _)| &self.found[*i]).filter(own).count();
        if 2 * diffusers >= known { Format::Peft } else { Format::Comfyui }
    }

    fn pair(&mut self) -> Result<()> {
        let places = Checkpoint::places(&self.of_base);
        let mut matched = BTreeSet::new();
        for (i, found) in self.found.iter().enumerate() {
            let module = &found.weight.module;
            let parts = match &found.parts {
                Ok(parts) => parts,
                Err(why) => {
                    self.left_out.push(format!("{module} ({why})"));
                    continue;
                }
            };
            let is_module = match self.family {
                Family::UNKNOWN => !is_embedding(module),
                _ => parts.iter().all(|part| part.known),
            };
            if !is_module {
                continue;
            }
            let of = |part: &Part| match places.get(&part.key).map(Vec::as_slice) {
                Some([place]) => Some((part.clone(), place.clone())),
                _ => None,
            };
            let Some(pair) = parts.iter().map(of).collect::<Option<Vec<_>>>() else {
                self.left_out.push(module.clone());
                continue;
            };
            found.checked()?;
            for (part, place) in &pair {
                let other = &self.of_base[place.found];
                other.checked()?;
                matched.insert(place.found);
                let shape = |found: &Found<'_>, part: &Part| (part.rows.len(), found.weight.widths.0);
                let (own, theirs) = (shape(found, part), shape(other, &place.part));
                if own != theirs {
                    let reason = format!(
                        "is {} x {} for `{}`, but `{}` of {} is {} x {}; are they the same model?",
                        own.0,
                        own.1,
                        part.key,
                        other.tensor.name,
                        self.base.path().display(),
                        theirs.0,
                        theirs.1
                    );
                    return Err(Error::tensor(found.file.path(), found.tensor.name, reason));
                }
            }
            self.pairs.push((i, pair));
        }
        let lacking = self
            .of_base
            .iter()
            .enumerate()
            .filter(|(i, of)| !matched.contains(i) && of.parts.iter().flatten().any(|part| part.known));
        self.left_out.extend(lacking.map(|(_, of)| format!("{} (of the base)", of.weight.module)));
        if self.pairs.is_empty() {
            let reason = format!("has no module in common with {}", self.base.path().display());
            return Err(Error::file(self.tuned.path(), reason));
        }
        Ok(())
    }

    /// Decomposes the difference of every module, one at a time.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a truncation out of range, or if no module differs; [`Error::Tensor`] for values that are not
    /// finite; [`Error::Cancelled`].
    pub fn run(&self, options: &ExtractOptions, control: &Control<'_>) -> Result<Extracted> {
        let unchanged = || self.tuned.check_files().and_then(|()| self.base.check_files());
        resting_on(self.extracted(options, control), unchanged)
    }

    fn extracted(&self, options: &ExtractOptions, control: &Control<'_>) -> Result<Extracted> {
        let start = Instant::now();
        check(&options.truncation)?;
        let (mut layers, mut reports, mut unchanged) = (Vec::new(), Vec::new(), 0);
        let (mut norm2, mut error2) = (0.0, 0.0);
        for (done, (i, pair)) in self.pairs.iter().enumerate() {
            let found = &self.found[*i];
            control.step("extract", &found.weight.module, done, self.pairs.len())?;
            let d = self.difference(found, pair)?;
            let failed = |_| {
                Error::layer(&found.weight.module, "the singular values of its difference cannot be found")
            };
            let Some(mut factors) = low_rank(&d, &options.truncation).map_err(failed)? else {
                unchanged += 1;
                continue;
            };
            round(&mut factors, options.dtype, &found.weight.module)?;
            let (norm, error) = (norm(&d), error(&d, &factors));
            norm2 += norm * norm;
            error2 += (error * norm).powi(2);
            let LowRank { a, b } = factors;
            reports.push(ExtractedLayer { layer: found.weight.module.clone(), rank: a.rows, norm, error });
            let parts: Vec<Part> = rows_of(pair.iter().map(|(part, _)| part));
            let kernel = if found.transposed { &[][..] } else { found.kernel() };
            layers.extend(layers_of_weight(self.family, &parts, kernel, a, b));
        }
        control.finish("extract", self.pairs.len());
        let changed = self.changed(control)?;
        if layers.is_empty() {
            let what = match changed.len() {
                0 => "the two checkpoints are the same".to_owned(),
                n => format!("{n} other tensors differ, which no adapter holds, such as `{}`", changed[0]),
            };
            return Err(Error::Invalid(format!("no module differs: {what}")));
        }
        let name = self.tuned.path().file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let report = ExtractReport {
            family: self.family.to_string(),
            unchanged,
            norm: norm2.sqrt(),
            error: if norm2 > 0.0 { (error2 / norm2).sqrt() } else { 0.0 },
            layers: reports,
            changed,
            left_out: self.left_out.clone(),
            seconds: start.elapsed().as_secs_f64(),
        };
        let metadata = BTreeMap::from([
            ("loraweld.extracted".to_owned(), format!("{name} from {}", self.base.path().display())),
            ("loraweld.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ]);
        let adapter = Adapter::new(name, self.format(), layers)?.with_metadata(metadata);
        Ok(Extracted { adapter, report })
    }

    /// The difference of a weight, with the rows of its layers one below the other.
    fn difference(&self, found: &Found<'_>, pair: &[(Part, Place)]) -> Result<Matrix<f32>> {
        let rows = pair.iter().map(|(part, _)| part.rows.len()).sum();
        let mut d =
            Matrix { rows, cols: found.weight.widths.0, data: vec![0.0; rows * found.weight.widths.0] };
        let (own, mut rest) = (found.values()?, &mut d.data[..]);
        for (part, place) in pair {
            let other = &self.of_base[place.found];
            let (head, tail) = rest.split_at_mut(part.rows.len() * d.cols);
            rest = tail;
            add(&own, found.transposed, part, 1.0, head, d.cols)?;
            add(&other.values()?, other.transposed, &place.part, -1.0, head, d.cols)?;
        }
        Ok(d)
    }

    /// Tensors of the same name that differ and are no weights of modules that were compared.
    fn changed(&self, control: &Control<'_>) -> Result<Vec<String>> {
        let compared: BTreeSet<(usize, &str)> =
            self.pairs.iter().map(|(i, _)| (self.found[*i].shard, self.found[*i].tensor.name)).collect();
        let mut others: BTreeMap<String, _> = BTreeMap::new();
        for shard in &self.base.shards {
            others.extend(shard.file.tensors().map(|t| (format!("{}{}", shard.prefix, t.name), t)));
        }
        let mut changed = Vec::new();
        for (i, shard) in self.tuned.shards.iter().enumerate() {
            for tensor in shard.file.tensors().filter(|t| !compared.contains(&(i, t.name))) {
                control.check()?;
                let name = format!("{}{}", shard.prefix, tensor.name);
                // Scales belong to weights that were compared with them.
                if ["scale_weight", "weight_scale"].iter().any(|s| name.ends_with(s)) {
                    continue;
                }
                let Some(other) = others.get(&name) else { continue };
                let (own, theirs) = (tensor.bytes()?, other.bytes()?);
                let same = other.dtype == tensor.dtype && other.shape == tensor.shape && own == theirs;
                // Types may differ and values be the same.
                let equal = || match (Values::plain(tensor, &own), Values::plain(*other, &theirs)) {
                    (Some(x), Some(y)) => x == y,
                    _ => false,
                };
                if !same && !equal() {
                    changed.push(name);
                }
            }
        }
        Ok(changed)
    }
}

/// Parts with their rows counted from the first on.
fn rows_of<'p>(parts: impl Iterator<Item = &'p Part>) -> Vec<Part> {
    let mut next = 0;
    parts
        .map(|part| {
            next += part.rows.len();
            Part { rows: next - part.rows.len()..next, ..part.clone() }
        })
        .collect()
}

/// Names of what models look up, which no adapter of a matrix is for.
fn is_embedding(module: &str) -> bool {
    let last = module.rsplit('.').next().unwrap_or(module);
    ["embed", "shared", "relative_attention_bias", "wte", "wpe"].iter().any(|word| last.contains(word))
}

/// Adds `factor` times the rows of a layer to `out`.
fn add(
    values: &Values<'_>,
    transposed: bool,
    part: &Part,
    factor: f32,
    out: &mut [f32],
    cols: usize,
) -> Result<()> {
    if transposed {
        let mut line = vec![0f32; values.cols];
        for row in 0..cols {
            values.read(row, 0, &mut line);
            line.iter().enumerate().for_each(|(i, v)| out[i * cols + row] += factor * v);
        }
    } else {
        let (n, first) = (part.rows.len(), part.rows.start);
        let add = |(i, line): (usize, &mut [f32])| {
            // The halves of the file's rows may be the other way round.
            let row = if part.swapped { (i + n / 2) % n } else { i };
            let mut piece = [0f32; CHUNK];
            for (k, line) in line.chunks_mut(CHUNK).enumerate() {
                let piece = &mut piece[..line.len()];
                values.read(first + row, k * CHUNK, piece);
                line.iter_mut().zip(piece).for_each(|(to, v)| *to += factor * *v);
            }
        };
        out.par_chunks_mut(cols.max(1)).enumerate().for_each(add);
    }
    match out.par_iter().position_any(|v| !v.is_finite()) {
        Some(i) => {
            let reason = format!("row {}, column {} is not finite; every weight must be", i / cols, i % cols);
            Err(Error::tensor(values.path, values.tensor.name, reason))
        }
        None => Ok(()),
    }
}

/// Rounds factors to the type in which they will be written.
fn round(LowRank { a, b }: &mut LowRank, dtype: Dtype, layer: &str) -> Result<()> {
    for v in a.data.iter_mut().chain(&mut b.data) {
        *v = match dtype {
            Dtype::F32 => *v,
            Dtype::F16 => half::f16::from_f32(*v).to_f32(),
            Dtype::Bf16 => half::bf16::from_f32(*v).to_f32(),
        };
        if !v.is_finite() {
            return Err(Error::layer(layer, format!("a factor is too large for {dtype}; use f32")));
        }
    }
    Ok(())
}

fn norm(d: &Matrix<f32>) -> f64 {
    d.data.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// Refuses truncations that make no sense.
fn check(truncation: &Truncation) -> Result<()> {
    let fail = |what: String| Err(Error::Invalid(what));
    match (truncation.rank, truncation.spectrum) {
        (Some(0), _) => fail("rank: 0, but it must be 1 or more".into()),
        (_, Some(Spectrum::Ratio(x))) if x.is_nan() || x < 1.0 => {
            fail(format!("sv-ratio: {x}, but it must be 1 or more"))
        }
        (_, Some(Spectrum::Frobenius(x) | Spectrum::Cumulative(x))) if x.is_nan() || x <= 0.0 || x > 1.0 => {
            fail(format!("a share of singular values: {x}, but it must be above 0 and at most 1"))
        }
        _ => Ok(()),
    }
}

impl fmt::Display for ExtractReport {
    /// What was extracted, and what could not be.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranks = || self.layers.iter().map(|layer| layer.rank);
        let (least, most) = (ranks().min().unwrap_or(0), ranks().max().unwrap_or(0));
        let rank = if least == most { least.to_string() } else { format!("{least} to {most}") };
        write!(
            f,
            "{} of {}, rank {rank}: {:.2} % of the difference is not in it (relative Frobenius norm)",
            count(self.layers.len(), "module"),
            self.family,
            100.0 * self.error
        )?;
        if let Some(worst) = self.layers.iter().max_by(|x, y| x.error.total_cmp(&y.error))
            && worst.error > self.error
        {
            write!(f, ", at most {:.2} % (`{}`)", 100.0 * worst.error, worst.layer)?;
        }
        if self.unchanged > 0 {
            write!(f, "\n{} the same in both", count(self.unchanged, "module"))?;
        }
        Ok(())
    }
}
