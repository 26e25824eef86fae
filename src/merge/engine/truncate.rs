//! Truncating a merge to a rank.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use web_time::Instant;

use super::budget::{self, Budget};
use super::chunks::chunks;
use super::driver::TOO_LARGE;
use super::metric::{Data, Metric};
use crate::compute::ops::{self, Root, ScaledRows, Side, Stacks, Svd};
use crate::merge::algebra::{directions, gram_first, significant, sum, svds, times};
use crate::merge::factored::{Factored, Lifted, cores, size};
use crate::merge::members::finite;
use crate::merge::{DeviceMemory, Merged, SingularValues};
use crate::words;
use crate::{
    Adapter, Calibration, Control, Device, Dtype, Error, Layer, LayerKey, Matrix, RawMatrix, Result,
    SaveOptions, Weighted,
};

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

/// How a merge is truncated that lies in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Truncating<'a> {
    /// The most that each layer keeps.
    pub truncation: Truncation,
    /// What all layers may cost together.
    pub budget: Option<Budget>,
    /// What judges what is cut off: a calibration, and the adapters of the merge at its strengths. Without it, the norm does.
    pub data: Option<(&'a Calibration, &'a [Weighted<'a>])>,
}

impl From<Truncation> for Truncating<'_> {
    fn from(truncation: Truncation) -> Self {
        Self { truncation, ..Self::default() }
    }
}

impl Truncating<'_> {
    /// Whether everything is kept.
    pub fn is_none(&self) -> bool {
        self.truncation.is_none() && self.budget.is_none()
    }

    /// Refuses what is out of range.
    fn check(&self) -> Result<()> {
        self.truncation.check()?;
        self.budget.as_ref().map_or(Ok(()), Budget::check)?;
        match (self.budget, self.data) {
            (Some(Budget::Loss(_)), None) => {
                Err(Error::Invalid("a budget of loss needs a calibration, which measures it".into()))
            }
            _ => Ok(()),
        }
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
        self.truncated_by(&(*truncation).into(), &SaveOptions::default(), device, control)
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
        self.truncated_by(&(*truncation).into(), options, device, control)
    }

    /// As [`truncated_for`](Self::truncated_for), judged by recorded inputs and by what all layers cost together, where that
    /// is asked for.
    ///
    /// By data, what is kept of a layer `W·A` is what does most on its inputs. With their second moment Σ and
    /// `A·Σ·Aᵀ = L·Lᵀ`, the SVD `W·L = U·S·Vᵀ` gives `B' = U`, `A' = Uᵀ·W·A` of the largest values, but for a factor on each
    /// rank that balances the two; the mean of `‖(ΔW' − ΔW)·x‖²` is the sum of the S² that are left out. No update of that
    /// rank comes nearer (reduced-rank regression, Izenman 1975). Σ is that of the calibration's tokens, and with a weight of
    /// 0.03 that of inputs from anywhere. A layer without tokens of one of its adapters, and a module that is kept fused
    /// and whose parts do not share A, is truncated by the norm; the report says so.
    ///
    /// A [`Budget`] is spent rank by rank where it takes most off the loss, each layer's counted as a share of what merging
    /// nothing loses there (by the norm: of the update's).
    ///
    /// # Errors
    /// As of [`truncated`](Self::truncated); [`Error::Invalid`] for a budget of less than a rank for each layer, or of loss
    /// without a calibration; as [`Calibration::select`].
    pub fn truncated_by(
        self,
        by: &Truncating<'_>,
        options: &SaveOptions,
        device: &Device,
        control: &Control<'_>,
    ) -> Result<Self> {
        let start = Instant::now();
        device.reset_memory_peak();
        by.check()?;
        let truncation = Truncations::from(by.truncation);
        let data = by.data.map(|(calibration, adapters)| Data::new(calibration, adapters)).transpose()?;
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
            Unit { parts: updates, metric: None }.rank()
        };
        units.retain(|unit| by.budget.is_some() || truncation.may_cut(|| rank(unit)));
        units.sort();
        let places: Vec<(usize, &[usize])> = units.iter().map(Vec::as_slice).enumerate().collect();
        // Calls are cancelled between chunks. Two layers a thread keep all of them busy all the same.
        let at_once = 2 * rayon::current_num_threads();
        let room = |(_, unit): (usize, &[usize])| {
            let sum = |of: fn(&Layer) -> usize| unit.iter().map(|&i| of(&layers[i])).sum();
            // By data, the adapters' own factors are looked at beside those of the merge.
            let looked_at = if data.is_some() { 2 } else { 1 };
            size(device, looked_at * sum(|l| l.rank), layers[unit[0]].input, sum(|l| l.output))
        };
        let chunks = chunks(device, &places, room, |_| 0, at_once);
        let truncate = |stage: &'static str, to: &dyn Fn(usize) -> Truncations, layers: &[Layer]| {
            let mut all = Vec::with_capacity(places.len());
            for (chunk, on) in &chunks {
                control.step(stage, &layers[chunk[0].1[0]].name(), all.len(), places.len())?;
                let merged: Vec<&Layer> = chunk.iter().map(|(_, unit)| &layers[unit[0]]).collect();
                let metrics = match &data {
                    Some(data) => data.metrics(on, &merged)?,
                    None => merged.iter().map(|_| None).collect(),
                };
                let unit = |((_, unit), metric): (&(usize, &[usize]), Option<Metric>)| Unit {
                    parts: unit.iter().map(|&i| Update::of(&layers[i])).collect(),
                    metric,
                };
                let to: Vec<Truncations> = chunk.iter().map(|(k, _)| to(*k)).collect();
                let units: Vec<Unit<'_>> = chunk.iter().zip(metrics).map(unit).collect();
                all.extend(truncated_units(on, &units, &to)?);
            }
            control.finish(stage, places.len());
            Ok::<_, Error>(all)
        };
        let mut ranks = None;
        if let Some(budget) = &by.budget {
            // What each layer may keep shows in a cut to the least.
            let least = Truncations::from(Truncation::rank(1));
            let spectra = truncate("survey", &|_| least, &layers)?;
            let element = options.dtype.unwrap_or(Dtype::F32).size();
            let shared = |(unit, whole): (&Vec<usize>, &Truncated)| {
                let kept = truncation.kept(&whole.values);
                let width = layers[unit[0]].input + unit.iter().map(|&i| layers[i].output).sum::<usize>();
                let most = whole.values.len().min(kept);
                let share = |v: &f64| if whole.cut.of > 0.0 { v * v / whole.cut.of } else { 0.0 };
                budget::Layer {
                    shares: whole.values[..most].iter().map(share).collect(),
                    bytes: (width * element) as u64,
                }
            };
            let shared: Vec<budget::Layer> = units.iter().zip(&spectra).map(shared).collect();
            let kept = budget.spent(&shared)?;
            report.notes.push(spent(budget, &shared, &kept, data.is_some()));
            ranks = Some(kept);
        }
        let to = |k: usize| match &ranks {
            None => truncation,
            Some(ranks) => Truncation::rank(ranks[k].max(1)).into(),
        };
        let (mut cuts, mut by_norm) = (Cuts::default(), 0);
        let results = truncate("truncate", &to, &layers)?;
        let on_cpu: BTreeSet<usize> = chunks
            .iter()
            .filter(|(_, on)| on.is_gpu() != device.is_gpu())
            .flat_map(|(chunk, _)| chunk.iter().map(|(k, _)| *k))
            .collect();
        for (k, (unit, Truncated { layers: parts, values, kept, cut })) in
            units.iter().zip(results).enumerate()
        {
            let spectrum = SingularValues { values, kept };
            by_norm += usize::from(data.is_some() && !cut.by_data && !parts.is_empty());
            for (n, (&i, layer)) in unit.iter().zip(parts).enumerate() {
                // Reports and layers are both sorted by key.
                let Some(report) = report.layers.get_mut(i) else { continue };
                report.rank = layer.rank;
                if on_cpu.contains(&k) {
                    report.notes.push(TOO_LARGE.into());
                }
                report.cut = Some(cut.share());
                report.added = cut.added();
                report.spectrum = Some(spectrum.clone());
                if n == 0 {
                    cuts.add(&report.layer, &cut);
                }
                layers[i] = layer;
            }
        }
        if by_norm > 0 {
            report.notes.push(format!(
                "{} truncated by the norm: the calibration says too little about its inputs",
                words::count(by_norm, "layer")
            ));
        }
        if let Some(note) = cuts.note(layers.len()) {
            report.notes.push(note);
            report.losses = None;
            report.layers.iter_mut().for_each(|layer| layer.losses = None);
        }
        let mut metadata = adapter.metadata().clone();
        truncation.record(&mut metadata)?;
        if let Some(budget) = &by.budget {
            let text =
                serde_json::to_string(budget).map_err(|e| Error::Invalid(format!("the budget: {e}")))?;
            metadata.insert("loraweld.budget".to_owned(), text);
        }
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

/// What a budget bought, beside an even cut of the same cost.
fn spent(budget: &Budget, layers: &[budget::Layer], kept: &[usize], by_data: bool) -> String {
    let even = budget.even(layers, kept);
    let what = if by_data { "loss" } else { "norm" };
    format!(
        "the budget leaves ranks {} to {}, {} in all, which costs {:.3} of the {what}; an even cut to rank {even} would \
         cost {:.3}",
        kept.iter().min().unwrap_or(&0),
        kept.iter().max().unwrap_or(&0),
        kept.iter().sum::<usize>(),
        Budget::lost(layers, |i| kept[i]),
        Budget::lost(layers, |_| even),
    )
}

/// What truncation cuts off one layer: squared norms, or by data the mean of what the update does on its inputs, squared.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    off: f64,
    whole: f64,
    /// What a budget counts it as a share of: by data, what merging nothing loses; else the whole.
    of: f64,
    by_data: bool,
}

impl Cut {
    /// As a share of the update's norm.
    pub fn share(&self) -> f64 {
        if self.whole > 0.0 { (self.off / self.whole).sqrt() } else { 0.0 }
    }

    /// By data, relative to what merging nothing loses.
    fn added(&self) -> Option<f64> {
        (self.by_data && self.of > 0.0).then(|| (self.off / self.of).sqrt())
    }
}

/// What truncation cuts off all layers.
#[derive(Default)]
pub(crate) struct Cuts {
    off: f64,
    whole: f64,
    count: usize,
    by_data: usize,
    worst: (f64, String),
}

impl Cuts {
    /// Adds a layer that was truncated.
    pub fn add(&mut self, layer: &str, cut: &Cut) {
        self.off += cut.off;
        self.whole += cut.whole;
        self.count += 1;
        self.by_data += usize::from(cut.by_data);
        if cut.share() >= self.worst.0 {
            self.worst = (cut.share(), layer.to_owned());
        }
    }

    /// What the user should know, if there is anything.
    pub fn note(&self, layers: usize) -> Option<String> {
        let Self { off, whole, count, by_data, worst: (share, layer) } = self;
        let what =
            if by_data == count { "what the update does on the recorded inputs" } else { "the update" };
        let all = if *whole > 0.0 { 100.0 * (off / whole).sqrt() } else { 0.0 };
        (*count > 0).then(|| {
            format!(
                "truncated {count} of {}, which cuts off {all:.1} % of {what} there, and {:.1} % of that of `{layer}`",
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
    /// What recordings say of the first part's inputs.
    pub metric: Option<Metric>,
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
    /// All singular values, descending.
    pub values: Vec<f64>,
    /// How many of them are kept.
    pub kept: usize,
    pub cut: Cut,
}

/// Truncates units, each as a whole and to what stands for it in `to`.
pub(crate) fn truncated_units(
    device: &Device,
    units: &[Unit<'_>],
    to: &[Truncations],
) -> Result<Vec<Truncated>> {
    let stack = |unit: &Unit<'_>| match &unit.parts[..] {
        [_] => Vec::new(),
        parts => crate::adapter::stack(&parts.iter().map(|part| &part.members[..]).collect::<Vec<_>>()),
    };
    let stacks: Vec<Vec<(Layer, f64)>> = units.par_iter().map(stack).collect();
    let wholes: Vec<Whole<'_>> = units
        .iter()
        .zip(&stacks)
        .zip(to)
        .map(|((unit, stack), &to)| {
            let update = match (&unit.parts[..], &stack[..]) {
                ([part], _) => Update { template: part.template, members: part.members.clone() },
                (_, stack) => Update {
                    template: &stack[0].0,
                    members: stack.iter().map(|(layer, factor)| (layer, *factor)).collect(),
                },
            };
            // Of several parts, inputs are known together only where all of them have the first one's A.
            let metric = unit.metric.as_ref().filter(|metric| metric.gram.rows == update.rank());
            Whole { update, metric, to }
        })
        .collect();
    let (by_data, by_norm): (Vec<usize>, Vec<usize>) =
        (0..wholes.len()).partition(|&i| wholes[i].metric.is_some());
    let mut done: Vec<Option<One>> = wholes.iter().map(|_| None).collect();
    let of = |places: &[usize]| places.iter().map(|&i| &wholes[i]).collect::<Vec<_>>();
    for (i, one) in by_data.iter().zip(truncated_by_data(device, &of(&by_data))?) {
        done[*i] = Some(one);
    }
    for (i, one) in by_norm.iter().zip(truncated(device, &of(&by_norm))?) {
        done[*i] = Some(one);
    }
    let parts = |(unit, One { layer, values, kept, cut }): (&Unit<'_>, One)| {
        let layers = match (layer, &unit.parts[..]) {
            (None, _) => Vec::new(),
            (Some(layer), [_]) => vec![layer],
            (Some(layer), parts) => {
                let templates: Vec<&Layer> = parts.iter().map(|part| part.template).collect();
                crate::adapter::unstack(&layer, &templates)
            }
        };
        Truncated { layers, values, kept, cut }
    };
    Ok(units.iter().zip(done.into_iter().flatten()).map(parts).collect())
}

/// An update that is to be truncated, by what, and to what.
struct Whole<'a> {
    update: Update<'a>,
    metric: Option<&'a Metric>,
    to: Truncations,
}

/// What became of an update.
struct One {
    /// `None` if it keeps its rank.
    layer: Option<Layer>,
    values: Vec<f64>,
    kept: usize,
    cut: Cut,
}

fn truncated(device: &Device, wholes: &[&Whole<'_>]) -> Result<Vec<One>> {
    let by_qr = |wholes: &[&&Whole<'_>]| {
        let members: Vec<&[(&Layer, f64)]> = wholes.iter().map(|whole| &whole.update.members[..]).collect();
        let factored = Factored::new(device, &members)?;
        let cores: Vec<Matrix> = factored.cores.iter().map(|cores| sum(cores)).collect();
        let templates: Vec<&Layer> = wholes.iter().map(|whole| whole.update.template).collect();
        let lifted = factored.lifted(device, &templates, &cores, |k, values| wholes[k].to.kept(values))?;
        let one = |(whole, Lifted { layer, values }): (&&&Whole<'_>, Lifted)| whole.truncated(values, layer);
        Ok(wholes.iter().zip(lifted).map(one).collect())
    };
    let by_grams = |wholes: &[&Whole<'_>]| {
        // Rows of a stack that is taller than wide depend on each other: its Gram matrix is singular for sure.
        let is_tall = |whole: &&&Whole<'_>| {
            let Layer { input, output, .. } = whole.update.template;
            whole.update.rank() > *input.min(output)
        };
        let wide: Vec<&Whole<'_>> = wholes.iter().filter(|whole| !is_tall(whole)).copied().collect();
        let mut found = truncated_by_grams(device, &wide)?.into_iter();
        Ok(wholes.iter().map(|whole| if is_tall(&whole) { None } else { found.next().flatten() }).collect())
    };
    gram_first(wholes, by_grams, by_qr)
}

/// How far singular vectors may be off for [`truncated_by_grams`]: less than f32 rounds them by.
const MAX_ERROR: f64 = 1e-8;

/// Where factors are far enough from singular, their Gram matrices tell all: `A' = Σ^½·Vᵀ·L_a⁻¹·A` and
/// `B' = B·L_b⁻ᵀ·U·Σ^½`, so that factors are read twice and nothing of their size is written but the result. `None` of the
/// others.
fn truncated_by_grams(device: &Device, wholes: &[&Whole<'_>]) -> Result<Vec<Option<One>>> {
    let (a, b) =
        (stacks(device, wholes, Side::Input, Layer::a)?, stacks(device, wholes, Side::Output, Layer::b)?);
    let root = |gram: &Matrix| Root::new(device, gram).filter(|root| root.error <= MAX_ERROR);
    let roots: Vec<Option<[Root; 2]>> = (a.grams(device)?, b.grams(device)?)
        .into_par_iter()
        .map(|(a, b)| Some([root(&a)?, root(&b)?]))
        .collect();
    let core = |(whole, roots): (&&Whole<'_>, &Option<[Root; 2]>)| match roots {
        Some([a, b]) => sum(&cores(&whole.update.members, &a.left, &b.left)),
        None => Matrix::default(),
    };
    let all: Vec<Matrix> = (wholes, &roots).into_par_iter().map(core).collect();
    let svds = svds(device, &all, |k| wholes[k].update.template.name())?;
    let halves = |of: fn(&Svd) -> &Matrix, side: usize| -> Vec<Matrix> {
        let half = |(whole, (svd, roots)): (&&Whole<'_>, (&Svd, &Option<[Root; 2]>))| match roots {
            Some(roots) => {
                let (vectors, kept) = (of(svd), whole.to.kept(&svd.values));
                let half = Matrix::from_fn(kept, vectors.cols, |k, i| svd.values[k].sqrt() * vectors[(k, i)]);
                times(&half, &roots[side].inverse)
            }
            None => Matrix::zeros(0, whole.update.rank()),
        };
        (wholes, (&svds, &roots)).into_par_iter().map(half).collect()
    };
    let a = a.combined(device, &halves(|svd| &svd.right, 0))?;
    let b = b.combined(device, &halves(|svd| &svd.left, 1))?;
    (wholes, roots, svds, a, b)
        .into_par_iter()
        .map(|(whole, roots, svd, a, b)| match roots {
            Some(_) => Ok(Some(whole.truncated(svd.values, finite(whole.update.template, a, b)?))),
            None => Ok(None),
        })
        .collect()
}

/// The factors of the members of each update, stacked.
fn stacks<'a>(
    device: &Device,
    wholes: &[&Whole<'a>],
    side: Side,
    factor: fn(&'a Layer) -> RawMatrix<'a>,
) -> Result<Stacks<'a>> {
    let parts =
        wholes.iter().map(|whole| whole.update.members.iter().map(|(layer, _)| factor(layer)).collect());
    Stacks::new(device, side, parts.collect())
}

/// By what recordings say of inputs.
fn truncated_by_data(device: &Device, wholes: &[&Whole<'_>]) -> Result<Vec<One>> {
    let by_grams = |wholes: &[&Whole<'_>]| {
        let b = stacks(device, wholes, Side::Output, Layer::b)?;
        let roots: Vec<Option<Root>> = b
            .grams(device)?
            .par_iter()
            .map(|gram| Root::new(device, gram).filter(|root| root.error <= MAX_ERROR))
            .collect();
        let lefts: Vec<Option<&Matrix>> = roots.iter().map(|root| Some(&root.as_ref()?.left)).collect();
        let Judged { a, b: halves, values } = Judged::new(device, wholes, &lefts)?;
        let halves: Vec<Matrix> = halves
            .into_par_iter()
            .zip(&roots)
            .map(|(half, root)| root.as_ref().map_or(half.clone(), |root| times(&half, &root.inverse)))
            .collect();
        let b = b.combined(device, &halves)?;
        (wholes, roots, values, a, b)
            .into_par_iter()
            .map(|(whole, root, values, a, b)| {
                let made = || Ok(whole.truncated(values, finite(whole.update.template, a, b)?));
                root.map(|_| made()).transpose()
            })
            .collect()
    };
    let by_qr = |wholes: &[&&Whole<'_>]| {
        let wholes: Vec<&Whole<'_>> = wholes.iter().map(|whole| **whole).collect();
        let parts: Vec<Vec<RawMatrix<'_>>> =
            wholes.iter().map(|w| w.update.members.iter().map(|(layer, _)| layer.b()).collect()).collect();
        let b = ops::qr(device, &ScaledRows::new(device, Side::Output, &parts)?)?;
        let lefts: Vec<Option<&Matrix>> = b.l.iter().map(Some).collect();
        let Judged { a, b: halves, values } = Judged::new(device, &wholes, &lefts)?;
        let b = ops::rank_update(device, None, &ops::small(device, &halves)?, &b.q)?.download_f32(device)?;
        (wholes, values, a, b)
            .into_par_iter()
            .map(|(whole, values, a, b)| {
                Ok(whole.truncated(values, finite(whole.update.template, a, b.transposed())?))
            })
            .collect()
    };
    gram_first(wholes, by_grams, by_qr)
}

/// Updates by what they do on recorded inputs.
struct Judged {
    /// A'.
    a: Vec<Matrix<f32>>,
    /// `B'ᵀ` in the rows of Q_b, of `Bᵀ = L_b·Q_b`.
    b: Vec<Matrix>,
    /// All singular values, descending.
    values: Vec<Vec<f64>>,
}

impl Judged {
    /// `lefts`: L_b of each; nothing is kept of those without.
    fn new(device: &Device, wholes: &[&Whole<'_>], lefts: &[Option<&Matrix>]) -> Result<Self> {
        // L_bᵀ with the factor on each rank, so that W = Q_bᵀ·this.
        let outputs: Vec<Matrix> = (wholes, lefts)
            .into_par_iter()
            .map(|(whole, left)| {
                let Some(left) = left else { return Matrix::default() };
                let scales: Vec<f64> =
                    whole.update.members.iter().flat_map(|(layer, s)| vec![*s; layer.rank]).collect();
                Matrix::from_fn(left.cols, left.rows, |i, j| left[(j, i)] * scales[j])
            })
            .collect();
        let core = |(whole, output): (&&Whole<'_>, &Matrix)| match whole.metric {
            Some(metric) if output.rows > 0 => times(output, &metric.root(device)),
            _ => Matrix::default(),
        };
        let cores: Vec<Matrix> = (wholes, &outputs).into_par_iter().map(core).collect();
        let svds = svds(device, &cores, |k| wholes[k].update.template.name())?;
        let half = |(whole, output, svd): (&&Whole<'_>, &Matrix, &Svd)| {
            let (Some(metric), true) = (whole.metric, output.rows > 0) else {
                let nothing = Matrix::zeros(0, whole.update.rank());
                return (nothing.clone(), nothing);
            };
            let kept = whole.to.kept(&svd.values);
            let left = Matrix::from_fn(kept, svd.left.cols, |k, i| svd.left[(k, i)]);
            let right = times(&left, output);
            // Each rank's A and B at one size.
            let reach = times(&right, &metric.gram);
            let size = |k: usize| -> f64 {
                let square: f64 = (0..right.cols).map(|j| right[(k, j)] * reach[(k, j)]).sum();
                if square > 0.0 { square.sqrt().sqrt() } else { 1.0 }
            };
            let sizes: Vec<f64> = (0..kept).map(size).collect();
            (
                Matrix::from_fn(kept, right.cols, |k, j| right[(k, j)] / sizes[k]),
                Matrix::from_fn(kept, left.cols, |k, j| left[(k, j)] * sizes[k]),
            )
        };
        let (a, b): (Vec<Matrix>, Vec<Matrix>) = (wholes, &outputs, &svds).into_par_iter().map(half).unzip();
        let a = stacks(device, wholes, Side::Input, Layer::a)?.combined(device, &a)?;
        Ok(Self { a, b, values: svds.into_iter().map(|svd| svd.values).collect() })
    }
}

impl Whole<'_> {
    /// What became of it, `layer`, by its singular values.
    fn truncated(&self, values: Vec<f64>, layer: Layer) -> One {
        let squares = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
        let kept = self.to.kept(&values);
        let whole = squares(&values);
        let of = self.metric.map_or(whole, |metric| metric.nothing);
        let cut = Cut { off: squares(&values[kept..]), whole, of, by_data: self.metric.is_some() };
        One { layer: (kept < self.update.rank()).then_some(layer), values, kept, cut }
    }
}

impl Update<'_> {
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
