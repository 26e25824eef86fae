//! TIES and DARE on the entries of ΔW, made panel by panel and never held whole.

use std::time::Instant;

use rayon::prelude::*;

use super::core::{rounded, unconverged};
use super::driver::{self, Done, Job, Method, Run, Spec};
use super::rule::{Dare, Rule, Ties, Voter};
use super::trim::{FileWide, Ranking, Survey};
use super::truncate::Truncation;
use super::{Action, LayerReport, Merged, Plan, PlannedLayer};
use crate::compute::ops::{self, Axis, EntryRule, Factor, ScaledRows};
use crate::compute::{Batch, Shape};
use crate::power::{exponent, exponent_of, pow2};
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
/// ([`LayerReport::captured`]). Layers of one adapter pass through unchanged, unless [`Ties::alone`] or [`Dare::alone`] say
/// otherwise.
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
    rule: Rule,
    rank: Option<usize>,
}

/// Directions that the range finder looks for beyond the rank.
const OVERSAMPLED: usize = 8;
/// Steps of subspace iteration.
const STEPS: usize = 2;
/// Bytes of a panel on a GPU, at most, and its part of the budget; and on the CPU, where each thread has one.
const PANEL: u64 = 64 << 20;
const PANEL_PART: u64 = 16;
const CPU_PANEL: usize = 4 << 20;
/// A kernel's loops run through the rows of a panel.
const PANEL_ROWS: usize = 8192;

impl EntryMerge {
    /// TIES.
    pub fn ties(options: Ties) -> Self {
        Self { name: "ties", rule: Rule::Ties(options), rank: None }
    }

    /// DARE.
    pub fn dare(options: Dare) -> Self {
        Self { name: "dare", rule: Rule::Dare(options), rank: None }
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
        match (&file.thresholds, &self.rule) {
            (Some(thresholds), _) => {
                let size = pow2(file.exponent - sketch.exponent);
                for (member, voter) in sketch.rule.members.iter_mut().zip(&voters) {
                    member.threshold = (f64::from(thresholds[voter.adapter]) * size) as f32;
                }
            }
            (None, Rule::Ties(_)) => sketch.trim(self.rule.kept(layer.input * layer.output))?,
            _ => {}
        }
        sketch.rule.zero_is_minus = match self.rule.votes_in_layer() {
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
        let svd = ops::jacobi_svd(device, &[core])?.remove(0);
        if !svd.converged {
            return Err(unconverged(&job.planned.name));
        }
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
        let report = LayerReport {
            rank: count,
            captured: Some(captured),
            ..LayerReport::new(job.planned, Action::Combined)
        };
        Ok(Done { layer, report })
    }
}

impl Method for EntryMerge {
    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        self.rule.check()?;
        let mut options = self.rule.json();
        if let Some(rank) = self.rank {
            Truncation::rank(rank).check()?;
            options["rank"] = rank.into();
        }
        let start = Instant::now();
        let size = |layer: &PlannedLayer| self.size(run, layer);
        let survey = Surveyed { merge: self, run };
        let file = FileWide::find(&self.rule, run, &survey, size, |plan| self.exponent(plan, run))?;
        let mut merged = driver::run(
            run,
            &Spec {
                method: self.name,
                options,
                size: &size,
                rank: &|layer| self.directions(layer).0,
                // One layer fills a GPU.
                merge: &|on, jobs| jobs.iter().map(|job| self.layer(on, job, run, &file)).collect(),
                alone: self.rule.merges_alone(),
                is_sum: false,
            },
        )?;
        merged.report.seconds = start.elapsed().as_secs_f64();
        Ok(merged)
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

/// Rows of a panel.
fn panel_rows(device: &Device, width: usize) -> usize {
    let elements = match device.is_gpu() {
        true => PANEL.min(device.memory() / PANEL_PART) as usize / 4,
        false => CPU_PANEL / 8,
    };
    (elements / width.max(1)).clamp(1, PANEL_ROWS)
}

fn identity(order: usize) -> Matrix {
    Matrix::from_fn(order, order, |i, j| f64::from(u8::from(i == j)))
}

/// The merged update M of one layer, divided by `2^exponent`, as far as products with it show.
struct Sketch<'a> {
    device: &'a Device,
    control: &'a Control<'a>,
    name: &'a str,
    a: Batch,
    b: Batch,
    rule: EntryRule,
    exponent: i32,
    shape: Shape,
}

/// The exponents of a voter's factors, and its factor on the update of factors of size 1.
fn sized(voter: &Voter<'_>) -> (i32, i32, f64) {
    let [a, b] = [voter.layer.a(), voter.layer.b()].map(|m| exponent(m).unwrap_or(0));
    (a, b, voter.scale * pow2(a) * pow2(b))
}

impl<'a> Sketch<'a> {
    /// With everything kept. `exponent`: that of the largest factor, by default of this layer's.
    fn new(
        device: &'a Device,
        layer: &'a PlannedLayer,
        voters: &[Voter<'a>],
        rule: &Rule,
        exponent: Option<i32>,
        control: &'a Control<'a>,
    ) -> Result<Self> {
        // Factors are brought to size 1 by powers of two, and all updates by a common one.
        let (mut a, mut b, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        for voter in voters {
            let (a_size, b_size, scale) = sized(voter);
            a.push(Factor { matrix: voter.layer.a(), scale: pow2(-a_size) as f32 });
            b.push(Factor { matrix: voter.layer.b(), scale: pow2(-b_size) as f32 });
            scales.push(scale);
        }
        let own = || exponent_of(scales.iter().fold(0.0, |max, s| s.abs().max(max)));
        let exponent = exponent.unwrap_or_else(own);
        scales.iter_mut().for_each(|s| *s *= pow2(-exponent));
        Ok(Self {
            device,
            control,
            name: &layer.name,
            a: ops::rank_concat(device, Axis::Rows, &[&a])?,
            b: ops::rank_concat(device, Axis::Columns, &[&b])?,
            rule: rule.entries(&layer.key, voters, &scales),
            exponent,
            shape: Shape::new(layer.output, layer.input),
        })
    }

    /// Calls `each` with panels of rows, one after the other.
    fn panels(&self, mut each: impl FnMut(std::ops::Range<usize>) -> Result<()>) -> Result<()> {
        let rows = panel_rows(self.device, self.shape.cols);
        for first in (0..self.shape.rows).step_by(rows) {
            self.control.check()?;
            each(first..(first + rows).min(self.shape.rows))?;
        }
        Ok(())
    }

    /// Counts the magnitudes of each member, as far as the pass of the ranking asks for.
    fn rank(&self, ranking: &mut Ranking) -> Result<()> {
        let prefixes = ranking.prefixes().map(<[u32]>::to_vec);
        self.panels(|rows| {
            let (members, counts) = (&self.rule.members, ranking.counts());
            ops::magnitudes(self.device, &self.a, &self.b, members, prefixes.as_deref(), rows, counts)
        })
    }

    /// Sets the thresholds so that each member keeps its `count` largest entries, and what is as large as the last.
    fn trim(&mut self, count: usize) -> Result<()> {
        let mut ranking = Ranking::new(self.rule.members.len());
        self.rank(&mut ranking)?;
        ranking.narrow(count as u64);
        self.rank(&mut ranking)?;
        for (member, threshold) in self.rule.members.iter_mut().zip(ranking.thresholds()) {
            member.threshold = threshold;
        }
        Ok(())
    }

    /// How many sums of what counts are above zero, less how many are below.
    fn signs(&self) -> Result<i64> {
        let mut signs = 0;
        self.panels(|rows| {
            signs += ops::entries(self.device, &self.a, &self.b, &self.rule, rows)?.signs;
            Ok(())
        })?;
        Ok(signs)
    }

    /// `W·Mᵀ·M`, of W's shape.
    fn squared(&self, w: &Batch) -> Result<Matrix> {
        let mut sum: Option<Batch> = None;
        self.panels(|rows| {
            let panel = ops::entries(self.device, &self.a, &self.b, &self.rule, rows)?.values;
            let part = ops::inner_as(self.device, w, &panel, self.device.product())?;
            sum = Some(ops::rank_update(self.device, sum.as_ref(), &part, &panel)?);
            Ok(())
        })?;
        self.one(sum)
    }

    /// `W·Mᵀ`, directions × out, and ‖M‖².
    fn applied(&self, w: &Batch) -> Result<(Matrix, f64)> {
        let mut product = Matrix::zeros(w.shapes()[0].rows, self.shape.rows);
        let mut square = 0.0;
        self.panels(|rows| {
            let panel = ops::entries(self.device, &self.a, &self.b, &self.rule, rows.clone())?;
            square += panel.square;
            let part = ops::inner_as(self.device, w, &panel.values, self.device.product())?;
            let part = self.one(Some(part))?;
            for k in 0..product.rows {
                let to = k * product.cols + rows.start;
                product.data[to..to + rows.len()].copy_from_slice(part.row(k));
            }
            Ok(())
        })?;
        Ok((product, square))
    }

    /// M itself, and ‖M‖².
    fn whole(&self) -> Result<(Matrix, f64)> {
        let mut whole = Matrix { rows: self.shape.rows, cols: self.shape.cols, data: Vec::new() };
        let mut square = 0.0;
        self.panels(|rows| {
            let panel = ops::entries(self.device, &self.a, &self.b, &self.rule, rows)?;
            square += panel.square;
            whole.data.extend(self.one(Some(panel.values))?.data);
            Ok(())
        })?;
        Ok((whole, square))
    }

    fn one(&self, batch: Option<Batch>) -> Result<Matrix> {
        let matrix = batch.map(|batch| batch.download(self.device)).transpose()?;
        let empty = || crate::Error::layer(self.name, "it has no rows");
        matrix.and_then(|mut all| all.pop()).ok_or_else(empty)
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
