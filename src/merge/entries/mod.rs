//! TIES and DARE on the entries of ΔW, made tile by tile and never held whole.

mod rule;
mod sketch;
mod survey;

use rayon::prelude::*;
use web_time::Instant;

pub use self::rule::{Alone, Elect, Scope, ZeroSum};
pub(super) use self::rule::{EntryOptions, Trim, Voter};
use self::sketch::{Sketches, sized};
pub(super) use self::survey::{FileWide, Ranking, Survey, Unsettled};
use super::algebra::svds;
use super::engine::driver::{self, Done, Job, Method, Run, Spec};
use super::members::finite;
use super::{Action, LayerReport, Merged, Plan, PlannedLayer, Truncation};
use crate::compute::Batch;
use crate::compute::ops::{self, Check, EntryMerger, ScaledRows, Svd, Tally, identity};
use crate::power::{exponent_of, pow2};
use crate::{Control, Device, Matrix, Result, Weighted};

/// TIES or DARE on the entries of the updates ΔW_k.
///
/// The merged update `rule(ΔW_1, …, ΔW_K)` has no low rank, so the result is its best approximation of rank N, by
/// default Σ r_k: a randomised range finder (Halko, Martinsson and Tropp 2011) of N + 8 directions with two steps of
/// subspace iteration, `W ← orth(W·Mᵀ·M)` on the input side, and the SVD of `M·Wᵀ`. Where N + 8 reaches the smaller
/// dimension of the layer, it is exact. Entries come from the factors, tile by tile, again in each pass; the
/// threshold of TIES is exact, by counting magnitudes (as f32) twice, in each layer or in all of them beforehand.
/// A GPU works on many layers at once.
///
/// Products of entries are of [`Device::product`]. The report tells how much of ‖M‖² the result captures
/// ([`Action::Combined`]). Layers of one adapter pass through unchanged, unless [`Ties::alone`](super::Ties::alone) or
/// [`Dare::alone`](super::Dare::alone) say otherwise.
///
/// # Example
/// ```no_run
/// use loraweld::{Adapter, Device, EntryMerge, Ties};
/// # fn main() -> loraweld::Result<()> {
/// let (cat, dog) = (Adapter::open("cat.safetensors")?, Adapter::open("dog.safetensors")?);
/// let ties = EntryMerge::ties(Ties { density: 0.5, ..Ties::default() });
/// let merged = ties.merge(&Device::auto()?, &[cat.at(1.0), dog.at(1.0)])?;
/// # let _ = merged;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct EntryMerge {
    name: &'static str,
    options: serde_json::Value,
    rule: EntryOptions,
    rank: Option<usize>,
}

/// Directions that the range finder looks for beyond the rank.
const OVERSAMPLED: usize = 8;
/// Steps of subspace iteration.
const STEPS: usize = 2;

impl EntryMerge {
    /// By a rule on entries, whose options are these in a report.
    pub(super) fn new(name: &'static str, options: serde_json::Value, rule: EntryOptions) -> Self {
        Self { name, options, rule, rank: None }
    }

    /// Sets the rank of the result.
    pub fn rank(self, rank: usize) -> Self {
        Self { rank: Some(rank), ..self }
    }

    /// Merges.
    ///
    /// # Errors
    /// As [`merge_with`](Self::merge_with).
    pub fn merge(&self, device: &Device, adapters: &[Weighted<'_>]) -> Result<Merged> {
        self.merge_with(device, adapters, Control::default())
    }

    /// Merges, with progress and cancellation.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for options out of range; as [`Plan::new`](super::Plan::new);
    /// [`Error::Tensor`](crate::Error::Tensor) for NaN or infinity in an adapter; [`Error::Layer`](crate::Error::Layer) if
    /// singular values cannot be found or a result overflows f32; [`Error::Device`](crate::Error::Device);
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn merge_with(
        &self,
        device: &Device,
        adapters: &[Weighted<'_>],
        control: Control<'_>,
    ) -> Result<Merged> {
        self.run(&Run::new(device, adapters, control))
    }

    fn directions(&self, layer: &PlannedLayer) -> (usize, usize) {
        let full = layer.input.min(layer.output);
        let rank = self.rank.unwrap_or(layer.rank).min(full);
        (rank, (rank + OVERSAMPLED).min(full))
    }

    fn size(&self, run: &Run<'_>, layer: &PlannedLayer) -> (u64, u64) {
        let PlannedLayer { input, output, .. } = layer;
        let members = self.rule.weighed(layer, run.adapters);
        let rank: usize = members.iter().map(|voter| voter.layer.rank).sum();
        let (_, directions) = self.directions(layer);
        let counts = 4 * (ops::BUCKETS + 1) * members.len();
        let largest = (4 * rank.max(directions) * input.max(output)).max(counts);
        // A and B; W, and what is made orthonormal beside it, twice; its small matrices; counts of magnitudes.
        let all = 4 * rank * (input + output)
            + 4 * directions * (input + 3 * input.max(output))
            + 64 * directions * directions
            + counts;
        (largest as u64, all as u64)
    }

    /// How W is found for a layer.
    fn way(&self, layer: &PlannedLayer) -> Way {
        match self.directions(layer).1 {
            all if all == layer.output => Way::Whole,
            all if all == layer.input => Way::Inputs,
            _ => Way::Sought,
        }
    }

    /// What is known of layers, as soon as it is known what counts.
    fn sketches(
        &self,
        device: &Device,
        layers: &[&PlannedLayer],
        run: &Run<'_>,
        file: &FileWide,
    ) -> Result<Sketches> {
        let voters = self.voters(layers, run);
        let mut sketches = Sketches::new(device, layers, &voters, &self.rule, None)?;
        let Sketches { merger, exponents } = &mut sketches;
        let unsettled = |((layer, voters), exponent): ((&&PlannedLayer, _), &i32)| {
            let voters: &Vec<Voter<'_>> = voters;
            Unsettled { voters, entries: layer.input * layer.output, exponent: *exponent }
        };
        let layers: Vec<_> = layers.iter().zip(&voters).zip(&*exponents).map(unsettled).collect();
        self.rule.settle(device, merger, &layers, file, &|| run.control.check())?;
        Ok(sketches)
    }

    fn voters<'a>(&self, layers: &[&PlannedLayer], run: &Run<'a>) -> Vec<Vec<Voter<'a>>> {
        layers.iter().map(|layer| self.rule.weighed(layer, run.adapters)).collect()
    }

    fn layers(&self, device: &Device, jobs: &[Job<'_>], run: &Run<'_>, file: &FileWide) -> Result<Vec<Done>> {
        let mut done: Vec<Option<Done>> = jobs.iter().map(|_| None).collect();
        for way in [Way::Whole, Way::Inputs, Way::Sought] {
            let places: Vec<usize> = (0..jobs.len()).filter(|&i| self.way(jobs[i].planned) == way).collect();
            let alike: Vec<&Job<'_>> = places.iter().map(|&i| &jobs[i]).collect();
            if !alike.is_empty() {
                let made = self.alike(device, way, &alike, run, file)?;
                places.into_iter().zip(made).for_each(|(i, one)| done[i] = Some(one));
            }
        }
        Ok(done.into_iter().flatten().collect())
    }

    /// Merges layers whose W is found in one way.
    fn alike(
        &self,
        device: &Device,
        way: Way,
        jobs: &[&Job<'_>],
        run: &Run<'_>,
        file: &FileWide,
    ) -> Result<Vec<Done>> {
        let planned: Vec<&PlannedLayer> = jobs.iter().map(|job| job.planned).collect();
        let mut clock = Clock::new();
        let Sketches { merger, exponents } = self.sketches(device, &planned, run, file)?;
        let settled = clock.lap();
        let check = || run.control.check();
        let (y, cores, w, tallies) = match way {
            // M = L·Q itself.
            Way::Whole => {
                let (rows, tallies) = merger.whole(device, &check)?;
                let w = ops::qr(device, &ScaledRows::of(device, rows)?)?;
                let y = shared(device, &planned, |layer| layer.output, identity)?;
                (y, w.l, w.q, tallies)
            }
            Way::Inputs | Way::Sought => {
                let w = match way {
                    Way::Inputs => shared(device, &planned, |layer| layer.input, identity)?,
                    _ => self.found(device, &planned, &merger, &check)?,
                };
                let (y, tallies) = merger.applied(device, &w, &check)?;
                // M ≈ (W·Mᵀ)ᵀ·W, and W·Mᵀ = L·Q.
                let y = ops::qr(device, &ScaledRows::of(device, y)?)?;
                (y.q, y.l.iter().map(Matrix::transposed).collect(), w, tallies)
            }
        };
        drop(merger);
        let multiplied = clock.lap();
        let svds = svds(device, &cores, |k| planned[k].name.clone())?;
        let counts: Vec<usize> = (planned.iter().zip(&svds))
            .map(|(layer, svd)| Truncation::rank(self.directions(layer).0).kept(&svd.values))
            .collect();
        let lifted = |of: fn(&Svd) -> &Matrix, q: &Batch| -> Result<Vec<Matrix<f32>>> {
            let half = |k: usize| {
                let (svd, size) = (&svds[k], pow2(exponents[k]));
                let vectors = of(svd);
                Matrix::from_fn(counts[k], vectors.cols, |k, i| {
                    (svd.values[k] * size).sqrt() * vectors[(k, i)]
                })
            };
            let halves: Vec<Matrix> = (0..svds.len()).into_par_iter().map(half).collect();
            ops::rank_update(device, None, &ops::small(device, &halves)?, q)?.download_f32(device)
        };
        let (a, b) = (lifted(|svd| &svd.right, &w)?, lifted(|svd| &svd.left, &y)?);
        let lifted = clock.lap();
        tracing::debug!(layers = jobs.len(), settled, multiplied, lifted, "seconds that a chunk took");
        (jobs, a, b, svds, counts, tallies)
            .into_par_iter()
            .map(|(job, a, b, svd, count, Tally { square, .. })| {
                let layer = finite(job.template(), a, b.transposed())?;
                let held: f64 = svd.values[..count].iter().map(|v| v * v).sum();
                let captured = if square > 0.0 { (held / square).min(1.0) } else { 1.0 };
                let action = Action::Combined { captured: Some(captured) };
                Ok(Done::new(layer, LayerReport { rank: count, ..LayerReport::new(job.planned, action) }))
            })
            .collect()
    }

    /// W, directions × in of each layer: orthonormal rows that hold most of M.
    fn found(
        &self,
        device: &Device,
        layers: &[&PlannedLayer],
        merger: &EntryMerger,
        check: Check<'_>,
    ) -> Result<Batch> {
        let mut w = shared(
            device,
            layers,
            |layer| (self.directions(layer).1, layer.input),
            |(n, input)| random(n, input),
        )?;
        for _ in 0..STEPS {
            let rows = merger.squared(device, &w, check)?;
            w = ops::qr(device, &ScaledRows::of(device, rows)?)?.q;
        }
        Ok(w)
    }
}

/// Tells seconds since it was last asked.
struct Clock(Instant);

impl Clock {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self) -> f64 {
        std::mem::replace(&mut self.0, Instant::now()).elapsed().as_secs_f64()
    }
}

/// How W is found, whose rows hold most of M.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// All of the few rows of M are wanted.
    Whole,
    /// All of its few columns are.
    Inputs,
    /// By subspace iteration.
    Sought,
}

/// A matrix for each layer, of which layers with the same key share one.
fn shared<K: Copy + PartialEq>(
    device: &Device,
    layers: &[&PlannedLayer],
    key: impl Fn(&PlannedLayer) -> K,
    matrix: impl Fn(K) -> Matrix,
) -> Result<Batch> {
    let mut keys: Vec<K> = Vec::new();
    let place = |layer: &&PlannedLayer| {
        let key = key(layer);
        keys.iter().position(|other| *other == key).unwrap_or_else(|| {
            keys.push(key);
            keys.len() - 1
        })
    };
    let places: Vec<usize> = layers.iter().map(place).collect();
    let matrices: Vec<Matrix> = keys.iter().map(|&key| matrix(key)).collect();
    Ok(Batch::upload(device, device.factor(), &matrices)?.select(&places))
}

impl Method for EntryMerge {
    fn check(&self, _: usize) -> Result<()> {
        self.rule.check()?;
        self.rank.map_or(Ok(()), |rank| Truncation::rank(rank).check())
    }

    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        self.check(run.adapters.len())?;
        let mut options = self.options.clone();
        if let Some(rank) = self.rank {
            options["rank"] = rank.into();
        }
        let size = |layer: &PlannedLayer| self.size(run, layer);
        let survey = Surveyed { merge: self, run };
        let file = FileWide::find(&self.rule, run, &survey, size, |plan| self.exponent(plan, run))?;
        driver::run(
            run,
            &Spec {
                method: self.name,
                options,
                size: &size,
                rank: &|layer| self.directions(layer).0,
                merge: &|on, jobs| self.layers(on, jobs, run, &file),
                alone: self.rule.alone,
                is_sum: false,
                notes: &|_| Vec::new(),
            },
        )
    }
}

/// What [`FileWide`] asks for, from the entries of updates.
struct Surveyed<'a> {
    merge: &'a EntryMerge,
    run: &'a Run<'a>,
}

impl Survey for Surveyed<'_> {
    fn count(
        &self,
        on: &Device,
        layers: &[&PlannedLayer],
        exponent: i32,
        ranking: &mut Ranking,
    ) -> Result<u64> {
        let Self { merge, run } = self;
        let voters = merge.voters(layers, run);
        let sketches = Sketches::new(on, layers, &voters, &merge.rule, Some(exponent))?;
        ranking.count_layers(on, &sketches.merger, &voters, &|| run.control.check())?;
        Ok(layers.iter().map(|layer| (layer.input * layer.output) as u64).sum())
    }

    fn signs(&self, on: &Device, layers: &[&PlannedLayer], file: &FileWide) -> Result<i64> {
        let sketches = self.merge.sketches(on, layers, self.run, file)?;
        let tallies = sketches.merger.tallies(on, &|| self.run.control.check())?;
        Ok(tallies.iter().map(|tally| tally.signs).sum())
    }
}

impl EntryMerge {
    /// That of the largest factor on an update of size 1.
    fn exponent(&self, plan: &Plan, run: &Run<'_>) -> i32 {
        let of = |layer: &PlannedLayer| {
            let scales = self.rule.weighed(layer, run.adapters).into_iter().map(|voter| sized(&voter).2);
            exponent_of(scales.fold(0.0, |max, s| s.abs().max(max)))
        };
        plan.layers().par_iter().map(of).max().unwrap_or(0)
    }
}

/// Signs at random, the same for ever: they meet every direction about as well as normal numbers.
fn random(rows: usize, cols: usize) -> Matrix {
    let mut state = 0u64;
    Matrix::from_fn(rows, cols, |_, _| {
        // SplitMix64 (Steele, Lea and Flood 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        if (z ^ (z >> 31)) >> 63 == 0 { 1.0 } else { -1.0 }
    })
}
