//! Truncating a merge to a rank.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::chunks::chunks;
use super::driver::TOO_LARGE;
use crate::compute::ops::{Root, Side, Stacks, Svd};
use crate::merge::algebra::{directions, gram_first, significant, sum, svds, times};
use crate::merge::factored::{Factored, Lifted, cores, size};
use crate::merge::members::finite;
use crate::merge::{DeviceMemory, Merged};
use crate::words;
use crate::{Adapter, Control, Device, Error, Layer, LayerKey, Matrix, RawMatrix, Result, SaveOptions};

/// How many singular values of an update to keep: the fewest that a limit asks for, and at least one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Truncation {
    /// At most this many.
    pub rank: Option<usize>,
    /// As many as this asks for.
    pub spectrum: Option<Spectrum>,
}

/// How many singular values `σ_1 ≥ σ_2 ≥ …` to keep, by their size; as the dynamic methods of kohya's resize script, which
/// keeps one more than each asks for. What rounding left of zero is never kept.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spectrum {
    /// Those above `σ_1 / X`, X ≥ 1, and the next.
    Ratio(f64),
    /// As few as hold `Σ σ² ≥ X²·‖ΔW‖²`, X in (0, 1], and the next.
    Frobenius(f64),
    /// As few as hold `Σ σ ≥ X·Σ_all σ`, X in (0, 1], and the next.
    Cumulative(f64),
}

impl Truncation {
    /// To at most a rank.
    pub fn rank(rank: usize) -> Self {
        Self { rank: Some(rank), spectrum: None }
    }

    /// By the size of singular values.
    pub fn spectrum(spectrum: Spectrum) -> Self {
        Self { rank: None, spectrum: Some(spectrum) }
    }

    /// Whether everything is kept.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn check(&self) -> Result<()> {
        let share = |name: &str, x: f64| match x > 0.0 && x <= 1.0 {
            true => Ok(()),
            false => Err(Error::Invalid(format!("sv-{name}: {x}, but it must be above 0 and at most 1"))),
        };
        if self.rank == Some(0) {
            return Err(Error::Invalid("rank: 0, but it must be 1 or more".into()));
        }
        match self.spectrum {
            None => Ok(()),
            Some(Spectrum::Ratio(x)) if x >= 1.0 => Ok(()),
            Some(Spectrum::Ratio(x)) => {
                Err(Error::Invalid(format!("sv-ratio: {x}, but it must be 1 or more")))
            }
            Some(Spectrum::Frobenius(x)) => share("fro", x),
            Some(Spectrum::Cumulative(x)) => share("cumulative", x),
        }
    }

    /// How many of the descending values are kept; those that rounding left of zero are not.
    pub(crate) fn kept(&self, values: &[f64]) -> usize {
        let largest = values.first().copied().unwrap_or(0.0);
        let all = directions(values);
        // Relative to the largest, so that squares stay in range.
        let enough = |power: i32, share: f64| {
            let of = |v: &f64| (v / largest).powi(power);
            let total: f64 = values[..all].iter().map(of).sum();
            let mut held = 0.0;
            let short = |v: &&f64| {
                let short = held < share * total;
                held += of(v);
                short
            };
            values[..all].iter().take_while(short).count()
        };
        let enough = match self.spectrum {
            None => all,
            Some(Spectrum::Ratio(x)) => significant(values, largest / x),
            Some(Spectrum::Frobenius(x)) => enough(2, x * x),
            Some(Spectrum::Cumulative(x)) => enough(1, x),
        };
        let asked = if self.spectrum.is_some() { (enough.max(1) + 1).min(all) } else { all };
        asked.min(self.rank.unwrap_or(usize::MAX)).max(1)
    }
}

/// The key that a truncation is recorded under in a file's metadata.
const RECORD: &str = "loraweld.truncation";

/// What a method truncates to of itself, and then what is asked for: each counts what the one before has left, as if a
/// merge were truncated twice.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Truncations {
    pub own: Truncation,
    pub asked: Truncation,
}

impl From<Truncation> for Truncations {
    fn from(asked: Truncation) -> Self {
        Self { asked, ..Self::default() }
    }
}

impl Truncations {
    /// Whether everything is kept.
    pub fn is_none(&self) -> bool {
        self.own.is_none() && self.asked.is_none()
    }

    pub fn check(&self) -> Result<()> {
        self.own.check()?;
        self.asked.check()
    }

    /// The highest rank that may be left.
    pub fn rank(&self) -> usize {
        [self.own, self.asked].iter().filter_map(|truncation| truncation.rank).min().unwrap_or(usize::MAX)
    }

    /// Whether something of this rank may be cut off. Whether a rank is low enough shows without singular values; what a
    /// spectrum asks for does not.
    pub fn may_cut(&self, rank: impl FnOnce() -> usize) -> bool {
        let by_spectrum = self.own.spectrum.is_some() || self.asked.spectrum.is_some();
        let most = self.rank();
        by_spectrum || (most < usize::MAX && most < rank())
    }

    fn kept(&self, values: &[f64]) -> usize {
        let left = if self.own.is_none() { values.len() } else { self.own.kept(values).min(values.len()) };
        self.asked.kept(&values[..left])
    }

    /// Writes down what a file is truncated to, beside what it was truncated to before.
    pub fn record(&self, metadata: &mut BTreeMap<String, String>) -> Result<()> {
        let before = metadata.get(RECORD).and_then(|text| serde_json::from_str::<Truncation>(text).ok());
        let steps = [before.unwrap_or_default(), self.own, self.asked];
        let rank = steps.iter().filter_map(|step| step.rank).min();
        let spectrum = steps.iter().rev().find_map(|step| step.spectrum);
        if !self.is_none() {
            let text = serde_json::to_string(&Truncation { rank, spectrum });
            let text = text.map_err(|e| Error::Invalid(format!("the truncation: {e}")))?;
            metadata.insert(RECORD.to_owned(), text);
        }
        Ok(())
    }
}

impl Merged {
    /// Truncates every layer of a higher rank to what `truncation` keeps, by the singular value decomposition of its
    /// update: nothing of that rank is nearer to it (Eckart and Young).
    ///
    /// With thin QR `A = L_a·Q_a`, `Bᵀ = L_b·Q_b` and the SVD of the core `s·L_bᵀ·L_a = U·Σ·Vᵀ`, the result is
    /// `A' = Σ^½·Vᵀ·Q_a`, `B' = Q_bᵀ·U·Σ^½` of the largest values. Sums are f64 or double-single, the result is rounded once
    /// to f32. Layers that keep their rank stay as they are.
    ///
    /// The report tells what is cut off ([`LayerReport::cut`](crate::LayerReport::cut)); its losses are dropped, since
    /// they were those of the merge before: [`measured`](Self::measured) finds the new ones.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a truncation out of range; [`Error::Layer`] if singular values cannot be found or a factor
    /// overflows f32; [`Error::Device`]; [`Error::Cancelled`].
    pub fn truncated(self, device: &Device, truncation: &Truncation, control: &Control<'_>) -> Result<Self> {
        self.truncated_for(&SaveOptions::default(), device, truncation, control)
    }

    /// As [`truncated`](Self::truncated), for a file of these options: modules that it keeps fused are truncated as one.
    ///
    /// # Errors
    /// As of [`truncated`](Self::truncated).
    pub fn truncated_for(
        self,
        options: &SaveOptions,
        device: &Device,
        truncation: &Truncation,
        control: &Control<'_>,
    ) -> Result<Self> {
        let start = Instant::now();
        device.reset_memory_peak();
        let truncation = Truncations::from(*truncation);
        truncation.check()?;
        let Self { adapter, mut report } = self;
        let mut layers = adapter.layers().to_vec();
        // What is written as one module is truncated as one.
        let groups = adapter.fused(options);
        let place = |key: &LayerKey| layers.binary_search_by(|layer| layer.key.cmp(key)).ok();
        let mut units: Vec<Vec<usize>> =
            groups.iter().map(|group| group.iter().filter_map(place).collect()).collect();
        let grouped: BTreeSet<usize> = units.iter().flatten().copied().collect();
        units.extend((0..layers.len()).filter(|i| !grouped.contains(i)).map(|i| vec![i]));
        let rank = |unit: &[usize]| {
            let updates: Vec<Update<'_>> = unit.iter().map(|&i| Update::of(&layers[i])).collect();
            Unit { parts: updates }.rank()
        };
        units.retain(|unit| truncation.may_cut(|| rank(unit)));
        units.sort();
        let places: Vec<&[usize]> = units.iter().map(Vec::as_slice).collect();
        let (mut cuts, mut done) = (Cuts::default(), 0);
        // Calls are cancelled between chunks. Two layers a thread keep all of them busy all the same.
        let at_once = 2 * rayon::current_num_threads();
        let room = |unit: &[usize]| {
            let sum = |of: fn(&Layer) -> usize| unit.iter().map(|&i| of(&layers[i])).sum();
            size(device, sum(|l| l.rank), layers[unit[0]].input, sum(|l| l.output))
        };
        for (chunk, on) in chunks(device, &places, room, |_| 0, at_once) {
            control.step("truncate", &layers[chunk[0][0]].name(), done, places.len())?;
            done += chunk.len();
            let unit =
                |unit: &&[usize]| Unit { parts: unit.iter().map(|&i| Update::of(&layers[i])).collect() };
            let results = truncated_units(&on, &chunk.iter().map(unit).collect::<Vec<_>>(), &truncation)?;
            for (unit, Truncated { layers: parts, cut }) in chunk.into_iter().zip(results) {
                for (n, (&i, layer)) in unit.iter().zip(parts).enumerate() {
                    // Reports and layers are both sorted by key.
                    let Some(report) = report.layers.get_mut(i) else { continue };
                    report.rank = layer.rank;
                    if on.is_gpu() != device.is_gpu() {
                        report.notes.push(TOO_LARGE.into());
                    }
                    report.cut = Some(cut.share());
                    if n == 0 {
                        cuts.add(&report.layer, &cut);
                    }
                    layers[i] = layer;
                }
            }
        }
        control.finish("truncate", places.len());
        if let Some(note) = cuts.note(layers.len()) {
            report.notes.push(note);
            report.losses = None;
            report.layers.iter_mut().for_each(|layer| layer.losses = None);
        }
        let mut metadata = adapter.metadata().clone();
        truncation.record(&mut metadata)?;
        let adapter = Adapter::new(adapter.name(), adapter.format(), layers)?
            .spelled_like(&adapter)
            .with_metadata(metadata);
        report.seconds += start.elapsed().as_secs_f64();
        let memory = DeviceMemory::of(device);
        report.notes.extend(memory.and_then(DeviceMemory::note));
        report.memory = report.memory.into_iter().chain(memory).max_by_key(|m| m.peak);
        Ok(Self { adapter, report })
    }
}

/// What truncation cuts off one layer: squared norms.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    off: f64,
    whole: f64,
}

impl Cut {
    /// As a share of the update's norm.
    pub fn share(&self) -> f64 {
        if self.whole > 0.0 { (self.off / self.whole).sqrt() } else { 0.0 }
    }
}

/// What truncation cuts off all layers.
#[derive(Default)]
pub(crate) struct Cuts {
    off: f64,
    whole: f64,
    count: usize,
    worst: (f64, String),
}

impl Cuts {
    /// Adds a layer that was truncated.
    pub fn add(&mut self, layer: &str, cut: &Cut) {
        self.off += cut.off;
        self.whole += cut.whole;
        self.count += 1;
        if cut.share() >= self.worst.0 {
            self.worst = (cut.share(), layer.to_owned());
        }
    }

    /// What the user should know, if there is anything.
    pub fn note(&self, layers: usize) -> Option<String> {
        let Self { off, whole, count, worst: (share, layer) } = self;
        let all = if *whole > 0.0 { 100.0 * (off / whole).sqrt() } else { 0.0 };
        (*count > 0).then(|| {
            format!(
                "truncated {count} of {}, which cuts off {all:.1} % of the update there, and {:.1} % of that of `{layer}`",
                words::count(layers, "layer"),
                100.0 * share
            )
        })
    }
}

/// A sum of layers, with the factor on each, that is to be truncated.
pub(crate) struct Update<'a> {
    /// The layer whose spelling the result takes.
    pub template: &'a Layer,
    pub members: Vec<(&'a Layer, f64)>,
}

impl<'a> Update<'a> {
    /// One layer.
    pub fn of(layer: &'a Layer) -> Self {
        Self { template: layer, members: vec![(layer, layer.scale.value)] }
    }
}

/// What is truncated as one: a layer, or the parts of a module that the output keeps fused, whose rank is that of the
/// whole.
pub(crate) struct Unit<'a> {
    pub parts: Vec<Update<'a>>,
}

impl Unit<'_> {
    /// The rank of the whole: parts that share A count once.
    pub fn rank(&self) -> usize {
        let members: Vec<&[(&Layer, f64)]> = self.parts.iter().map(|part| &part.members[..]).collect();
        match &members[..] {
            [members] => members.iter().map(|(layer, _)| layer.rank).sum(),
            members => crate::adapter::stacked_rank(members),
        }
    }
}

/// What became of a unit.
pub(crate) struct Truncated {
    /// Its parts; none if it keeps its rank.
    pub layers: Vec<Layer>,
    pub cut: Cut,
}

/// Truncates units, each as a whole.
pub(crate) fn truncated_units(
    device: &Device,
    units: &[Unit<'_>],
    truncation: &Truncations,
) -> Result<Vec<Truncated>> {
    let stack = |unit: &Unit<'_>| match &unit.parts[..] {
        [_] => Vec::new(),
        parts => crate::adapter::stack(&parts.iter().map(|part| &part.members[..]).collect::<Vec<_>>()),
    };
    let stacks: Vec<Vec<(Layer, f64)>> = units.par_iter().map(stack).collect();
    let updates: Vec<Update<'_>> = units
        .iter()
        .zip(&stacks)
        .map(|(unit, stack)| match (&unit.parts[..], &stack[..]) {
            ([part], _) => Update { template: part.template, members: part.members.clone() },
            (_, stack) => Update {
                template: &stack[0].0,
                members: stack.iter().map(|(layer, factor)| (layer, *factor)).collect(),
            },
        })
        .collect();
    let whole = truncated(device, &updates, truncation)?;
    let parts = |(unit, One { layer, cut }): (&Unit<'_>, One)| {
        let layers = match (layer, &unit.parts[..]) {
            (None, _) => Vec::new(),
            (Some(layer), [_]) => vec![layer],
            (Some(layer), parts) => {
                let templates: Vec<&Layer> = parts.iter().map(|part| part.template).collect();
                crate::adapter::unstack(&layer, &templates)
            }
        };
        Truncated { layers, cut }
    };
    Ok(units.iter().zip(whole).map(parts).collect())
}

/// What became of an update.
struct One {
    /// `None` if it keeps its rank.
    layer: Option<Layer>,
    cut: Cut,
}

fn truncated(device: &Device, updates: &[Update<'_>], truncation: &Truncations) -> Result<Vec<One>> {
    let by_qr = |updates: &[&Update<'_>]| {
        let members: Vec<&[(&Layer, f64)]> = updates.iter().map(|update| &update.members[..]).collect();
        let factored = Factored::new(device, &members)?;
        let cores: Vec<Matrix> = factored.cores.iter().map(|cores| sum(cores)).collect();
        let templates: Vec<&Layer> = updates.iter().map(|update| update.template).collect();
        let lifted = factored.lifted(device, &templates, &cores, |values| truncation.kept(values))?;
        let one = |(update, Lifted { layer, values }): (&&Update<'_>, Lifted)| {
            update.truncated(truncation, &values, layer)
        };
        Ok(updates.iter().zip(lifted).map(one).collect())
    };
    gram_first(updates, |updates| truncated_by_grams(device, updates, truncation), by_qr)
}

/// How far singular vectors may be off for [`truncated_by_grams`]: less than f32 rounds them by.
const MAX_ERROR: f64 = 1e-8;

/// Where factors are far enough from singular, their Gram matrices tell all: `A' = Σ^½·Vᵀ·L_a⁻¹·A` and
/// `B' = B·L_b⁻ᵀ·U·Σ^½`, so that factors are read twice and nothing of their size is written but the result. `None` of the
/// others.
fn truncated_by_grams(
    device: &Device,
    updates: &[Update<'_>],
    truncation: &Truncations,
) -> Result<Vec<Option<One>>> {
    let stacks = |side: Side, factor: for<'l> fn(&'l Layer) -> RawMatrix<'l>| {
        let parts =
            updates.iter().map(|update| update.members.iter().map(|(layer, _)| factor(layer)).collect());
        Stacks::new(device, side, parts.collect())
    };
    let (a, b) = (stacks(Side::Input, Layer::a)?, stacks(Side::Output, Layer::b)?);
    let root = |gram: &Matrix| Root::new(device, gram).filter(|root| root.error <= MAX_ERROR);
    let roots: Vec<Option<[Root; 2]>> = (a.grams(device)?, b.grams(device)?)
        .into_par_iter()
        .map(|(a, b)| Some([root(&a)?, root(&b)?]))
        .collect();
    let core = |(update, roots): (&Update<'_>, &Option<[Root; 2]>)| match roots {
        Some([a, b]) => sum(&cores(&update.members, &a.left, &b.left)),
        None => Matrix::default(),
    };
    let all: Vec<Matrix> = (updates, &roots).into_par_iter().map(core).collect();
    let svds = svds(device, &all, |k| updates[k].template.name())?;
    let halves = |of: fn(&Svd) -> &Matrix, side: usize| -> Vec<Matrix> {
        let half = |(update, (svd, roots)): (&Update<'_>, (&Svd, &Option<[Root; 2]>))| match roots {
            Some(roots) => {
                let (vectors, kept) = (of(svd), truncation.kept(&svd.values));
                let half = Matrix::from_fn(kept, vectors.cols, |k, i| svd.values[k].sqrt() * vectors[(k, i)]);
                times(&half, &roots[side].inverse)
            }
            None => Matrix::zeros(0, update.rank()),
        };
        (updates, (&svds, &roots)).into_par_iter().map(half).collect()
    };
    let a = a.combined(device, &halves(|svd| &svd.right, 0))?;
    let b = b.combined(device, &halves(|svd| &svd.left, 1))?;
    (updates, roots, svds, a, b)
        .into_par_iter()
        .map(|(update, roots, svd, a, b)| match roots {
            Some(_) => Ok(Some(update.truncated(truncation, &svd.values, finite(update.template, a, b)?))),
            None => Ok(None),
        })
        .collect()
}

impl Update<'_> {
    /// What became of it, `layer`, by its singular values.
    fn truncated(&self, truncation: &Truncations, values: &[f64], layer: Layer) -> One {
        let squares = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
        let kept = truncation.kept(values);
        let cut = Cut { off: squares(&values[kept..]), whole: squares(values) };
        One { layer: (kept < self.rank()).then_some(layer), cut }
    }

    fn rank(&self) -> usize {
        self.members.iter().map(|(layer, _)| layer.rank).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spectra_keep_the_fewest_that_do_and_one_more() {
        let values = [4.0, 2.0, 1.0, 1.0, 1e-9];
        let by = |spectrum| Truncation::spectrum(spectrum).kept(&values);
        assert_eq!(Truncation::default().kept(&values), 4);
        assert_eq!(Truncation::rank(2).kept(&values), 2);
        assert_eq!(
            (by(Spectrum::Ratio(1.0)), by(Spectrum::Ratio(2.5)), by(Spectrum::Ratio(1e12))),
            (2, 3, 4)
        );
        assert_eq!((by(Spectrum::Cumulative(0.5)), by(Spectrum::Cumulative(0.7))), (2, 3));
        assert_eq!((by(Spectrum::Frobenius(0.85)), by(Spectrum::Frobenius(0.95))), (2, 3));
        assert_eq!((by(Spectrum::Frobenius(1.0)), by(Spectrum::Cumulative(1.0))), (4, 4));
        let both = Truncation { rank: Some(1), spectrum: Some(Spectrum::Cumulative(1.0)) };
        assert_eq!((both.kept(&values), both.kept(&[0.0; 3]), both.kept(&[])), (1, 1, 1));
    }
}
