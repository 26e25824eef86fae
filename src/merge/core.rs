//! Merging in the small core that the updates of one layer share: KnOTS, Core Space, TSV, Iso-C and the mean.

use rayon::prelude::*;

use super::driver::{self, Done, Job, Method, Run, Spec};
use super::loss::times;
use super::rule::{self, Rule};
use super::truncate::Truncation;
use super::{Action, LayerReport, Merged, PlannedLayer};
use crate::compute::ops::{self, Qr, ScaledRows, Side, Svd};
use crate::{Control, Device, Error, Layer, Matrix, RawMatrix, Result, Weighted};

/// Singular values below this share of the largest are what rounding to f32 leaves of zero: they are no directions.
pub(super) const NEGLIGIBLE: f64 = 2.5e-7;

/// Where a [`CoreMerge`] applies its rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Space {
    /// On `M_k = Uᵀ·ΔW_k·V`.
    Core,
    /// On `Uᵀ·ΔW_k`.
    Left,
}

/// Merges in the core: the updates in a common basis, where a rule meets matrices of order R = Σ r_k.
///
/// Let U and V hold the left singular vectors of `[ΔW_1 … ΔW_K]` and the right ones of `[ΔW_1; …; ΔW_K]`, ΔW_k with scale
/// and strength. Then `ΔW_k = U·M_k·Vᵀ` exactly, with M_k of R × R, and
///
/// | | formula |
/// |---|---|
/// | [`core`](Self::core) (Core Space, arXiv 2509.17786) | `U·rule(M_1, …, M_K)·Vᵀ` |
/// | [`knots`](Self::knots) (KnOTS, arXiv 2410.19735) | `U·rule(Uᵀ·ΔW_1, …, Uᵀ·ΔW_K)` |
/// | [`tsv`](Self::tsv) (TSV-Merge, arXiv 2412.00081) | `core` with [`Rule::Tsv`] |
/// | [`iso_c`](Self::iso_c) (Iso-C, arXiv 2502.04959) | `core` with [`Rule::Iso`] |
///
/// Any bases of the stacked factors serve Core Space; singular vectors of the updates depend neither on how an adapter
/// splits ΔW into B and A nor on the device, but for signs, which no rule sees. Thin QR of the stacked factors gives
/// all of it, ΔW is never formed. Small matrices are f64 or double-single, the result is rounded once to f32; its rank is
/// at most R. Layers of one adapter pass through unchanged.
///
/// # Example
/// ```no_run
/// use loraweld::{Adapter, CoreMerge, Device, Rule, Ties};
/// # fn main() -> loraweld::Result<()> {
/// let (cat, dog) = (Adapter::open("cat.safetensors")?, Adapter::open("dog.safetensors")?);
/// let merged = CoreMerge::knots(Rule::Ties(Ties::default())).merge(&Device::auto()?, &[cat.at(1.0), dog.at(1.0)])?;
/// # let _ = merged;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct CoreMerge {
    name: &'static str,
    space: Space,
    rule: Rule,
}

impl CoreMerge {
    /// Core Space with a rule.
    pub fn core(rule: Rule) -> Self {
        Self { name: "core", space: Space::Core, rule }
    }

    /// KnOTS with a rule.
    pub fn knots(rule: Rule) -> Self {
        Self { name: "knots", space: Space::Left, rule }
    }

    /// TSV-Merge.
    pub fn tsv() -> Self {
        Self { name: "tsv", ..Self::core(Rule::Tsv) }
    }

    /// Iso-C.
    pub fn iso_c() -> Self {
        Self { name: "iso-c", ..Self::core(Rule::Iso) }
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
    /// [`Error::Invalid`] for options of the rule out of range; as [`Plan::new`](super::Plan::new); [`Error::Tensor`] for NaN
    /// or infinity in an adapter; [`Error::Layer`] if singular values cannot be found or a result overflows f32;
    /// [`Error::Device`]; [`Error::Cancelled`].
    pub fn merge_with(
        &self,
        device: &Device,
        adapters: &[Weighted<'_>],
        control: Control<'_>,
    ) -> Result<Merged> {
        self.run(&Run::new(device, adapters, control))
    }

    fn chunk(&self, device: &Device, jobs: &[Job<'_>]) -> Result<Vec<Done>> {
        let members: Vec<&[(&Layer, f64)]> = jobs.iter().map(|job| job.members.as_slice()).collect();
        let factored = Factored::new(device, &members)?;
        let merged = match (self.space, self.rule.is_entrywise()) {
            (Space::Left, true) => return self.knots_entrywise(device, jobs, factored),
            // These rules do not see a rotation, so any basis is as good.
            (_, false) => rule::merged(&self.rule, device, jobs, &factored.cores)?,
            (Space::Core, true) => {
                let (left, right) = (factored.left(device, jobs)?, factored.right(device, jobs)?);
                (0..jobs.len())
                    .into_par_iter()
                    .map(|i| {
                        let (u, v) = (&left[i], &right[i]);
                        let cores: Vec<Matrix> = factored.cores[i]
                            .iter()
                            .map(|core| times(&times(u, core), &v.transposed()))
                            .collect();
                        let merged = self.rule.entrywise(&cores, &jobs[i].planned.key);
                        times(&times(&u.transposed(), &merged), v)
                    })
                    .collect()
            }
        };
        let templates: Vec<&Layer> = jobs.iter().map(Job::template).collect();
        let lifted = factored.lifted(device, &templates, &merged, &Truncation::default())?;
        Ok(lifted
            .into_iter()
            .zip(jobs)
            .map(|(lifted, job)| {
                let report = LayerReport {
                    rank: lifted.layer.rank,
                    ..LayerReport::new(job.planned, Action::Combined)
                };
                Done { layer: lifted.layer, report }
            })
            .collect())
    }

    fn size(&self, device: &Device, layer: &PlannedLayer) -> (u64, u64) {
        let PlannedLayer { rank, input, output, members, .. } = layer;
        let (largest, all) = size(device, *rank, *input, *output);
        // `Uᵀ·ΔW_k` of one layer.
        let rows = match self.space == Space::Left && self.rule.is_entrywise() {
            true => 4 * (members.len() * rank * input) as u64,
            false => 0,
        };
        (largest.max(rows), all + rows)
    }

    /// The rule on the entries of `Uᵀ·ΔW_k`, R × in, which becomes A; B is U.
    fn knots_entrywise(&self, device: &Device, jobs: &[Job<'_>], factored: Factored) -> Result<Vec<Done>> {
        let left = factored.left(device, jobs)?;
        let mut merged: Vec<Matrix> = Vec::new();
        // One layer at a time: each has K matrices of A's size.
        for (i, job) in jobs.iter().enumerate() {
            let rows: Vec<Matrix> = factored.cores[i].iter().map(|core| times(&left[i], core)).collect();
            let q = factored.a.q.select(&vec![i; rows.len()]);
            let rows = ops::rank_update(device, None, &ops::small(device, &rows)?, &q)?.download(device)?;
            merged.push(self.rule.entrywise(&rows, &job.planned.key));
        }
        let b = ops::rank_update(device, None, &ops::small(device, &left)?, &factored.b.q)?;
        b.download(device)?
            .into_iter()
            .zip(merged)
            .zip(jobs)
            .map(|((b, a), job)| {
                let layer = rounded(job.template(), &a, &b)?;
                Ok(Done { layer, report: LayerReport::new(job.planned, Action::Combined) })
            })
            .collect()
    }
}

impl Method for CoreMerge {
    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        self.rule.check()?;
        driver::run(
            run,
            &Spec {
                method: self.name,
                options: self.rule.json(),
                size: &|layer| self.size(run.device, layer),
                rank: &|layer| layer.rank,
                merge: &|on, jobs| self.chunk(on, jobs),
                is_sum: false,
            },
        )
    }
}

/// The updates of layers in orthonormal bases: `ΔW_k = Q_bᵀ·M_k·Q_a`.
pub(super) struct Factored {
    /// Of the stacked A: `[A_1; …; A_K] = L_a·Q_a`.
    a: Qr,
    /// Of the stacked B: `[B_1 … B_K]ᵀ = L_b·Q_b`.
    b: Qr,
    /// M_k of each member of each layer, R × R, with its factor.
    pub cores: Vec<Vec<Matrix>>,
}

/// A layer made from a core.
pub(super) struct Lifted {
    pub layer: Layer,
    /// All singular values, descending.
    pub values: Vec<f64>,
}

impl Factored {
    /// Of layers that are given as their members.
    pub fn new(device: &Device, layers: &[&[(&Layer, f64)]]) -> Result<Self> {
        let rows = |side: Side, factor: fn(&Layer) -> RawMatrix<'_>| {
            let stacks: Vec<Vec<RawMatrix<'_>>> = layers
                .iter()
                .map(|members| members.iter().map(|(layer, _)| factor(layer)).collect())
                .collect();
            ops::qr(device, &ScaledRows::new(device, side, &stacks)?)
        };
        let (a, b) = (rows(Side::Input, Layer::a)?, rows(Side::Output, Layer::b)?);
        let cores =
            layers.par_iter().zip(&a.l).zip(&b.l).map(|((members, a), b)| cores(members, a, b)).collect();
        Ok(Self { a, b, cores })
    }

    /// Uᵀ of each layer: the left singular vectors of `[M_1 … M_K]`.
    fn left(&self, device: &Device, jobs: &[Job<'_>]) -> Result<Vec<Matrix>> {
        let stacks: Vec<Matrix> = self
            .cores
            .par_iter()
            .map(|cores| triangle(cores.iter().map(Matrix::transposed)).transposed())
            .collect();
        Ok(svds(device, jobs, &stacks)?.into_iter().map(|svd| directions(svd.left, &svd.values)).collect())
    }

    /// Vᵀ of each layer: the right singular vectors of `[M_1; …; M_K]`.
    fn right(&self, device: &Device, jobs: &[Job<'_>]) -> Result<Vec<Matrix>> {
        let stacks: Vec<Matrix> =
            self.cores.par_iter().map(|cores| triangle(cores.iter().cloned())).collect();
        Ok(svds(device, jobs, &stacks)?.into_iter().map(|svd| directions(svd.right, &svd.values)).collect())
    }

    /// The layers whose cores these are, their singular values shared by both factors: `A = Σ^½·Vᵀ·Q_a`,
    /// `B = Q_bᵀ·U·Σ^½`, of as many singular values as `truncation` keeps.
    pub fn lifted(
        &self,
        device: &Device,
        templates: &[&Layer],
        cores: &[Matrix],
        truncation: &Truncation,
    ) -> Result<Vec<Lifted>> {
        let svds = ops::jacobi_svd(device, cores)?;
        if let Some(k) = svds.iter().position(|svd| !svd.converged) {
            return Err(unconverged(&templates[k].name()));
        }
        let half = |of: fn(&Svd) -> &Matrix| -> Vec<Matrix> {
            svds.par_iter()
                .map(|svd| {
                    let (vectors, kept) = (of(svd), truncation.kept(&svd.values));
                    Matrix::from_fn(kept, vectors.cols, |k, i| svd.values[k].sqrt() * vectors[(k, i)])
                })
                .collect()
        };
        let a = ops::rank_update(device, None, &ops::small(device, &half(|svd| &svd.right))?, &self.a.q)?
            .download_f32(device)?;
        let b = ops::rank_update(device, None, &ops::small(device, &half(|svd| &svd.left))?, &self.b.q)?
            .download_f32(device)?;
        templates
            .par_iter()
            .zip(svds)
            .zip(a.into_par_iter().zip(b))
            .map(|((template, svd), (a, b))| {
                Ok(Lifted { layer: finite(template, a, b.transposed())?, values: svd.values })
            })
            .collect()
    }
}

/// `M_k = s_k·L_b,kᵀ·L_a,k` of each member, whose rows of the roots of the stacked factors these are.
pub(super) fn cores(members: &[(&Layer, f64)], a: &Matrix, b: &Matrix) -> Vec<Matrix> {
    let mut end = 0;
    let core = |&(layer, scale): &(&Layer, f64)| {
        let rows = end..end + layer.rank;
        end = rows.end;
        let block = |l: &Matrix, scale: f64| {
            Matrix::from_fn(rows.len(), l.cols, |r, c| scale * l[(rows.start + r, c)])
        };
        times(&block(b, scale).transposed(), &block(a, 1.0))
    };
    members.iter().map(core).collect()
}

impl Job<'_> {
    /// The layer whose spelling the result takes.
    pub fn template(&self) -> &Layer {
        super::template(&self.members)
    }
}

/// The layer of `A` and `Bᵀ`, rounded to f32.
pub(super) fn rounded(template: &Layer, a: &Matrix, b: &Matrix) -> Result<Layer> {
    let narrow = |m: &Matrix| Matrix::from_fn(m.rows, m.cols, |i, j| m[(i, j)] as f32);
    finite(template, narrow(a), narrow(&b.transposed()))
}

pub(super) fn finite(template: &Layer, a: Matrix<f32>, b: Matrix<f32>) -> Result<Layer> {
    if !super::all_finite(&a.data) || !super::all_finite(&b.data) {
        let reason = "the merged factors overflow f32; are scales and strengths right?";
        return Err(Error::layer(template.name(), reason));
    }
    template.replaced(a, b)
}

pub(super) fn wide(m: crate::RawMatrix<'_>) -> Matrix {
    Matrix { rows: m.rows, cols: m.cols, data: m.to_vec() }
}

/// SVDs of one matrix of each job.
pub(super) fn svds(device: &Device, jobs: &[Job<'_>], matrices: &[Matrix]) -> Result<Vec<Svd>> {
    let svds = ops::jacobi_svd(device, matrices)?;
    match svds.iter().position(|svd| !svd.converged) {
        None => Ok(svds),
        Some(k) => Err(unconverged(&jobs[k].planned.name)),
    }
}

pub(super) fn unconverged(layer: &str) -> Error {
    Error::layer(layer, "its singular values could not be found; are its scale and strength right?")
}

/// How many of the descending values are above `least` and not zero.
pub(super) fn significant(values: &[f64], least: f64) -> usize {
    values.iter().take_while(|v| **v > least && **v > 0.0).count()
}

/// Rows of singular vectors; zero where the value is negligible.
fn directions(mut rows: Matrix, values: &[f64]) -> Matrix {
    let kept = significant(values, NEGLIGIBLE * values.first().unwrap_or(&0.0));
    rows.data[kept * rows.cols..].fill(0.0);
    rows
}

/// R of the QR decomposition of stacked square matrices: as many rows as columns, and the same Gram matrix.
fn triangle(blocks: impl Iterator<Item = Matrix>) -> Matrix {
    let mut data = Vec::new();
    let mut order = 0;
    for block in blocks {
        order = block.cols;
        data.extend(block.data);
    }
    let rows = data.len() / order.max(1);
    let stack = faer::MatRef::from_row_major_slice(&data, rows, order);
    let qr = stack.qr();
    let r = qr.thin_R();
    Matrix::from_fn(order, order, |i, j| if i <= j { r[(i, j)] } else { 0.0 })
}

/// (Bytes of the largest buffer, bytes in all) that a layer takes on the device.
pub(super) fn size(device: &Device, rank: usize, input: usize, output: usize) -> (u64, u64) {
    let element = if device.is_gpu() { 4 } else { 8 };
    // A, its two Q, V, the result and a spare; B, its two Q, and B as it comes.
    let all = element * rank * (6 * input + 4 * output) + 8 * 8 * rank * rank;
    ((element * rank * rank.max(input).max(output)) as u64, all as u64)
}
