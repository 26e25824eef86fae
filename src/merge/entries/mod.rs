//! TIES and DARE on the entries of ΔW, made panel by panel and never held whole.

mod rule;
mod sketch;
mod survey;

use rayon::prelude::*;

pub use self::rule::{Alone, Elect, Scope, ZeroSum};
pub(super) use self::rule::{EntryOptions, Trim, Voter};
use self::sketch::{Sketch, panel_rows, sized};
pub(super) use self::survey::{FileWide, Ranking, Survey};
use super::algebra::svds;
use super::engine::driver::{self, Done, Job, Method, Run, Spec};
use super::members::rounded;
use super::{Action, LayerReport, Merged, Plan, PlannedLayer, Truncation};
use crate::compute::Batch;
use crate::compute::ops::{self, ScaledRows};
use crate::power::{exponent_of, pow2};
use crate::{Control, Device, Matrix, Result, Weighted};

/// TIES or DARE on the entries of the updates ΔW_k.
///
/// The merged update `rule(ΔW_1, …, ΔW_K)` has no low rank, so the result is its best approximation of rank N, by
/// default Σ r_k: a randomised range finder (Halko, Martinsson and Tropp 2011) of N + 8 directions with two steps of
/// subspace iteration, `W ← orth(W·Mᵀ·M)` on the input side, and the SVD of `M·Wᵀ`. Where N + 8 reaches the smaller
/// dimension of the layer, it is exact. Entries come from the factors in panels of rows, again in each pass; the
/// threshold of TIES is exact, by counting magnitudes (as f32) twice, in each layer or in all of them beforehand.
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
        let rows = panel_rows(run.device, *input).min(*output);
        let panel = 4 * rows * input;
        // W·panelᵀ: its partial sums, and itself.
        let products = ops::product_bytes(directions, rows) + 8 * directions * rows;
        let largest = (4 * rank.max(directions) * input.max(output)).max(panel).max(products);
        // A and B; W, and what is made orthonormal beside it, twice; its small matrices; a panel, the same in halves, and its
        // tables; histograms of magnitudes.
        let all = 4 * rank * (input + output)
            + 4 * directions * (input + 3 * input.max(output))
            + 64 * directions * directions
            + panel * (16 + members.len()) / 8
            + products
            + 4 * ops::BUCKETS * members.len();
        (largest as u64, all as u64)
    }

    /// The sketch of a layer, as soon as it is known what counts.
    fn sketch<'a>(
        &self,
        device: &'a Device,
        layer: &'a PlannedLayer,
        run: &'a Run<'_>,
        file: &FileWide,
    ) -> Result<Sketch<'a>> {
        let voters = self.rule.weighed(layer, run.adapters);
        let mut sketch = Sketch::new(device, layer, &voters, &self.rule, None, &run.control)?;
        match (&file.thresholds, self.rule.trim) {
            (Some(thresholds), _) => {
                let size = pow2(file.exponent - sketch.exponent);
                for (member, voter) in sketch.rule.members.iter_mut().zip(&voters) {
                    member.threshold = (f64::from(thresholds[voter.adapter]) * size) as f32;
                }
            }
            (None, Some(_)) => sketch.trim(self.rule.kept(layer.input * layer.output))?,
            (None, None) => {}
        }
        sketch.rule.zero_is_minus = match self.rule.majority == Some(Scope::Layer) {
            true => sketch.signs()? <= 0,
            false => file.zero_is_minus.unwrap_or(false),
        };
        Ok(sketch)
    }

    fn layer(&self, device: &Device, job: &Job<'_>, run: &Run<'_>, file: &FileWide) -> Result<Done> {
        let PlannedLayer { output, .. } = job.planned;
        let (rank, directions) = self.directions(job.planned);
        let sketch = self.sketch(device, job.planned, run, file)?;
        let (y, core, w, square) = match directions == *output {
            // All rows are wanted: M = L·Q itself.
            true => {
                let (rows, square) = sketch.whole()?;
                let w = ops::qr(device, &ScaledRows::from_matrices(device, vec![rows])?)?;
                let y = Batch::upload(device, device.factor(), &[identity(*output)])?;
                (y, w.l[0].clone(), w.q, square)
            }
            false => {
                let w = self.directions_of(&sketch, directions)?;
                let (y, square) = sketch.applied(&w)?;
                // M ≈ (W·Mᵀ)ᵀ·W, and W·Mᵀ = L·Q.
                let y = ops::qr(device, &ScaledRows::from_matrices(device, vec![y])?)?;
                (y.q, y.l[0].transposed(), w, square)
            }
        };
        let svd = svds(device, &[core], |_| job.planned.name.clone())?.remove(0);
        let count = Truncation::rank(rank).kept(&svd.values);
        let size = pow2(sketch.exponent);
        let half = |vectors: &Matrix| {
            Matrix::from_fn(count, vectors.cols, |k, i| (svd.values[k] * size).sqrt() * vectors[(k, i)])
        };
        let lift = |vectors: &Matrix, q: &Batch| -> Result<Matrix> {
            let rows = ops::rank_update(device, None, &ops::small(device, &[half(vectors)])?, q)?;
            Ok(rows.download(device)?.remove(0))
        };
        let layer = rounded(job.template(), &lift(&svd.right, &w)?, &lift(&svd.left, &y)?)?;
        let held: f64 = svd.values[..count].iter().map(|v| v * v).sum();
        let captured = if square > 0.0 { (held / square).min(1.0) } else { 1.0 };
        let action = Action::Combined { captured: Some(captured) };
        Ok(Done::new(layer, LayerReport { rank: count, ..LayerReport::new(job.planned, action) }))
    }
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
                // One layer fills a GPU.
                merge: &|on, jobs| jobs.iter().map(|job| self.layer(on, job, run, &file)).collect(),
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
    fn count(&self, on: &Device, layer: &PlannedLayer, exponent: i32, ranking: &mut Ranking) -> Result<u64> {
        let Run { adapters, control, .. } = self.run;
        let rule = &self.merge.rule;
        let voters = rule.weighed(layer, adapters);
        Sketch::new(on, layer, &voters, rule, Some(exponent), control)?.rank(ranking)?;
        Ok((layer.input * layer.output) as u64)
    }

    fn signs(&self, on: &Device, layer: &PlannedLayer, file: &FileWide) -> Result<i64> {
        self.merge.sketch(on, layer, self.run, file)?.signs()
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

    /// W, directions × in: orthonormal rows that hold most of M.
    fn directions_of(&self, sketch: &Sketch<'_>, directions: usize) -> Result<Batch> {
        let (device, input) = (sketch.device, sketch.shape.cols);
        if directions == input {
            return Batch::upload(device, device.factor(), &[identity(input)]);
        }
        let mut w = Batch::upload(device, device.factor(), &[random(directions, input)])?;
        for _ in 0..STEPS {
            let rows = ScaledRows::from_matrices(device, vec![sketch.squared(&w)?])?;
            w = ops::qr(device, &rows)?.q;
        }
        Ok(w)
    }
}

fn identity(order: usize) -> Matrix {
    Matrix::from_fn(order, order, |i, j| f64::from(u8::from(i == j)))
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
