//! Merging in the small core that the updates of one layer share: KnOTS, Core Space, TSV, Iso-C and the mean.

use std::time::Instant;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::driver::{self, Done, Job, Method, Run, Spec};
use super::loss::times;
use super::rule::{self, Iso, Rule, Scope, Ties, Tsv, Voter};
use super::trim::{FileWide, Ranking, Survey};
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

/// The bases U and V in which [`CoreMerge::core`] applies a rule on entries; other rules do not see them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bases {
    /// The singular vectors of the stacked updates: the default. They depend neither on how an adapter splits ΔW into B
    /// and A nor on the device, but for signs. The share that is kept is of R × R entries.
    #[default]
    Updates,
    /// The singular vectors of the stacked factors, U the left ones of `[s_1·B_1 … s_K·B_K]`, V the right ones of
    /// `[A_1; …; A_K]`: those of the paper and of its code, into which scales s come with B, as strengths do that count
    /// before an election. The share that is kept is of min(R, out) × min(R, in) entries.
    Factors,
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
/// Any bases of the stacked factors serve the rules that do not look at entries; for TIES and DARE they count, and
/// [`bases`](Self::bases) offers the paper's. KnOTS works on the columns of the updates as they are, so with TIES or DARE it
/// also leaves the span of the rows of A, in which all else here stays. Signs of singular vectors are arbitrary, but no rule sees them unless
/// entries cancel exactly. Thin QR of the stacked factors gives all of it, ΔW is never formed. Small matrices are f64 or
/// double-single, the result is rounded once to f32; its rank is at most R. Layers of one adapter pass through unchanged,
/// unless [`Ties::alone`](super::Ties::alone) or [`Dare::alone`](super::Dare::alone) say otherwise.
///
/// As their authors define them: KnOTS with [`Ties::paper`](super::Ties::paper), which ranks the entries of `Uᵀ·ΔW_k` of
/// all layers together, without directions that are negligible (with a rule by layer their rows count, as zeros); Core
/// Space with [`Bases::Factors`] and that rule layer by layer ([`core_paper`](Self::core_paper)); TSV and Iso-C with
/// [`Tsv::paper`] and [`Iso::paper`]. PEFT has none of these methods.
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
    bases: Bases,
}

impl CoreMerge {
    /// Core Space with a rule.
    pub fn core(rule: Rule) -> Self {
        Self { name: "core", space: Space::Core, rule, bases: Bases::default() }
    }

    /// KnOTS with a rule.
    pub fn knots(rule: Rule) -> Self {
        Self { name: "knots", space: Space::Left, rule, bases: Bases::default() }
    }

    /// Core Space with TIES as its authors define it: in their bases, layer by layer, one entry more than the share.
    pub fn core_paper() -> Self {
        let ties = Ties { scope: Scope::Layer, ..Ties::paper() };
        Self::core(Rule::Ties(ties)).bases(Bases::Factors)
    }

    /// TSV-Merge.
    pub fn tsv(options: Tsv) -> Self {
        Self { name: "tsv", ..Self::core(Rule::Tsv(options)) }
    }

    /// Iso-C.
    pub fn iso_c(options: Iso) -> Self {
        Self { name: "iso-c", ..Self::core(Rule::Iso(options)) }
    }

    /// Sets the bases in which [`core`](Self::core) applies a rule on entries. KnOTS has its own.
    pub fn bases(self, bases: Bases) -> Self {
        Self { bases, ..self }
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

    fn chunk(&self, device: &Device, jobs: &[Job<'_>], run: &Run<'_>, file: &FileWide) -> Result<Vec<Done>> {
        let planned: Vec<&PlannedLayer> = jobs.iter().map(|job| job.planned).collect();
        if !self.rule.is_entrywise() {
            let members: Vec<&[(&Layer, f64)]> = jobs.iter().map(|job| job.members.as_slice()).collect();
            let factored = Factored::new(device, &members)?;
            // These rules do not see a rotation, so any basis is as good.
            let merged = rule::merged(&self.rule, device, &planned, &factored.cores)?;
            return self.lifted(device, jobs, &factored, &merged);
        }
        let entries = Entries::new(self, device, &planned, run)?;
        let merged = |i: usize| -> Result<Matrix> {
            let (matrices, count) = entries.of(device, i)?;
            Ok(self.rule.entrywise(&planned[i].key, &entries.voters[i], &matrices, count, file))
        };
        if self.space == Space::Core {
            let core = |i: usize| {
                let (u, v) = (&entries.left[i], &entries.right[i]);
                Ok(times(&times(&u.transposed(), &merged(i)?), v))
            };
            let cores: Vec<Matrix> = (0..jobs.len()).into_par_iter().map(core).collect::<Result<_>>()?;
            return self.lifted(device, jobs, &entries.factored, &cores);
        }
        // `Uᵀ·M`, R × in, becomes A; B is U. One layer at a time: each has K matrices of A's size.
        let merged: Vec<Matrix> = (0..jobs.len()).map(merged).collect::<Result<_>>()?;
        let b = ops::rank_update(device, None, &ops::small(device, &entries.left)?, &entries.factored.b.q)?;
        b.download(device)?
            .into_iter()
            .zip(merged)
            .zip(jobs)
            .map(|((b, a), job)| {
                let layer = rounded(job.template(), &a, &b)?;
                let report =
                    LayerReport { rank: layer.rank, ..LayerReport::new(job.planned, Action::Combined) };
                Ok(Done { layer, report })
            })
            .collect()
    }

    fn lifted(
        &self,
        device: &Device,
        jobs: &[Job<'_>],
        factored: &Factored,
        cores: &[Matrix],
    ) -> Result<Vec<Done>> {
        let templates: Vec<&Layer> = jobs.iter().map(Job::template).collect();
        let lifted = factored.lifted(device, &templates, cores, &Truncation::default())?;
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

    /// The ranks of a layer together.
    fn rank(&self, layer: &PlannedLayer, run: &Run<'_>) -> usize {
        self.rule.weighed(layer, run.adapters).iter().map(|voter| voter.layer.rank).sum()
    }

    fn size(&self, layer: &PlannedLayer, run: &Run<'_>) -> (u64, u64) {
        let PlannedLayer { input, output, .. } = layer;
        let rank = self.rank(layer, run);
        let (largest, all) = size(run.device, rank, *input, *output);
        // `Uᵀ·ΔW_k` of one layer.
        let rows = match self.space == Space::Left && self.rule.is_entrywise() {
            true => 4 * (self.rule.voters(layer).len() * rank * input) as u64,
            false => 0,
        };
        (largest.max(rows), all + rows)
    }
}

/// What a rule on entries is applied to.
struct Entries<'a> {
    merge: &'a CoreMerge,
    planned: &'a [&'a PlannedLayer],
    voters: Vec<Vec<Voter<'a>>>,
    factored: Factored,
    /// Uᵀ and Vᵀ of each layer, in its core; KnOTS has no V.
    left: Vec<Matrix>,
    right: Vec<Matrix>,
}

impl<'a> Entries<'a> {
    fn new(
        merge: &'a CoreMerge,
        device: &Device,
        planned: &'a [&'a PlannedLayer],
        run: &Run<'a>,
    ) -> Result<Self> {
        let voters: Vec<Vec<Voter<'_>>> =
            planned.iter().map(|layer| merge.rule.weighed(layer, run.adapters)).collect();
        let members = |voters: &Vec<Voter<'a>>| voters.iter().map(|v| (v.layer, v.scale)).collect();
        let members: Vec<Vec<(&Layer, f64)>> = voters.iter().map(members).collect();
        let members: Vec<&[(&Layer, f64)]> = members.iter().map(Vec::as_slice).collect();
        let factored = Factored::new(device, &members)?;
        let left = match (merge.space, merge.bases) {
            (Space::Core, Bases::Factors) => factored.left_of_factors(device, planned, &members)?,
            _ => factored.left(device, planned)?,
        };
        let right = match (merge.space, merge.bases) {
            (Space::Left, _) => Vec::new(),
            (Space::Core, Bases::Factors) => factored.right_of_factors(device, planned)?,
            (Space::Core, Bases::Updates) => factored.right(device, planned)?,
        };
        Ok(Self { merge, planned, voters, factored, left, right })
    }

    /// The matrices of one layer, and of how many entries of each a share is kept.
    fn of(&self, device: &Device, i: usize) -> Result<(Vec<Matrix>, usize)> {
        let Self { merge, factored, left, right, .. } = self;
        let (cores, PlannedLayer { input, output, .. }) = (&factored.cores[i], self.planned[i]);
        let rank = left[i].rows;
        let rows: Vec<Matrix> = cores.iter().map(|core| times(&left[i], core)).collect();
        if merge.space == Space::Left {
            let q = factored.a.q.select(&vec![i; rows.len()]);
            let rows = ops::rank_update(device, None, &ops::small(device, &rows)?, &q)?.download(device)?;
            let is_direction = |row: &&[f64]| row.iter().any(|v| *v != 0.0);
            let directions = match merge.rule.ranks_file() {
                true => left[i].data.chunks(rank.max(1)).filter(is_direction).count(),
                false => rank,
            };
            return Ok((rows, directions * input));
        }
        let count = match merge.bases {
            Bases::Updates => rank * rank,
            Bases::Factors => rank.min(*output) * rank.min(*input),
        };
        Ok((rows.iter().map(|m| times(m, &right[i].transposed())).collect(), count))
    }
}

/// What [`FileWide`] asks for, from the entries in a common basis.
struct Surveyed<'a> {
    merge: &'a CoreMerge,
    run: &'a Run<'a>,
}

impl Survey for Surveyed<'_> {
    fn count(&self, on: &Device, layer: &PlannedLayer, _: i32, ranking: &mut Ranking) -> Result<u64> {
        let (matrices, count) = Entries::new(self.merge, on, &[layer], self.run)?.of(on, 0)?;
        matrices.iter().enumerate().for_each(|(k, matrix)| ranking.count(k, &matrix.data));
        Ok(count as u64)
    }

    fn signs(&self, on: &Device, layer: &PlannedLayer, file: &FileWide) -> Result<i64> {
        let planned = [layer];
        let entries = Entries::new(self.merge, on, &planned, self.run)?;
        let (matrices, count) = entries.of(on, 0)?;
        Ok(self.merge.rule.signs(&layer.key, &entries.voters[0], &matrices, count, file))
    }
}

impl Method for CoreMerge {
    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        self.rule.check()?;
        let mut options = self.rule.json();
        if self.bases == Bases::Factors {
            options["bases"] = "factors".into();
        }
        let start = Instant::now();
        let size = |layer: &PlannedLayer| self.size(layer, run);
        let file = FileWide::find(&self.rule, run, &Surveyed { merge: self, run }, size, |_| 0)?;
        let mut merged = driver::run(
            run,
            &Spec {
                method: self.name,
                options,
                size: &size,
                rank: &|layer| self.rank(layer, run),
                merge: &|on, jobs| self.chunk(on, jobs, run, &file),
                alone: self.rule.merges_alone(),
                is_sum: false,
            },
        )?;
        merged.report.seconds = start.elapsed().as_secs_f64();
        Ok(merged)
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
    fn left(&self, device: &Device, planned: &[&PlannedLayer]) -> Result<Vec<Matrix>> {
        let stacks: Vec<Matrix> = self
            .cores
            .par_iter()
            .map(|cores| triangle(cores.iter().map(Matrix::transposed)).transposed())
            .collect();
        Ok(svds(device, planned, &stacks)?.into_iter().map(|svd| directions(svd.left, &svd.values)).collect())
    }

    /// Vᵀ of each layer: the right singular vectors of `[M_1; …; M_K]`.
    fn right(&self, device: &Device, planned: &[&PlannedLayer]) -> Result<Vec<Matrix>> {
        let stacks: Vec<Matrix> =
            self.cores.par_iter().map(|cores| triangle(cores.iter().cloned())).collect();
        Ok(svds(device, planned, &stacks)?
            .into_iter()
            .map(|svd| directions(svd.right, &svd.values))
            .collect())
    }

    /// Uᵀ of each layer: the left singular vectors of `[s_1·B_1 … s_K·B_K]`, whose transpose is `diag(s)·L_b·Q_b`.
    fn left_of_factors(
        &self,
        device: &Device,
        planned: &[&PlannedLayer],
        members: &[&[(&Layer, f64)]],
    ) -> Result<Vec<Matrix>> {
        let scaled = |(l, members): (&Matrix, &&[(&Layer, f64)])| {
            let scales: Vec<f64> =
                members.iter().flat_map(|(layer, scale)| vec![*scale; layer.rank]).collect();
            Matrix::from_fn(l.rows, l.cols, |i, j| scales[i] * l[(i, j)])
        };
        let stacks: Vec<Matrix> = self.b.l.iter().zip(members).map(scaled).collect();
        Ok(svds(device, planned, &stacks)?
            .into_iter()
            .map(|svd| directions(svd.right, &svd.values))
            .collect())
    }

    /// Vᵀ of each layer: the right singular vectors of `[A_1; …; A_K] = L_a·Q_a`.
    fn right_of_factors(&self, device: &Device, planned: &[&PlannedLayer]) -> Result<Vec<Matrix>> {
        let svds = svds(device, planned, &self.a.l)?;
        Ok(svds.into_iter().map(|svd| directions(svd.right, &svd.values)).collect())
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
    Matrix { rows: m.rows(), cols: m.cols(), data: m.to_vec() }
}

/// SVDs of one matrix of each layer.
pub(super) fn svds(device: &Device, planned: &[&PlannedLayer], matrices: &[Matrix]) -> Result<Vec<Svd>> {
    let svds = ops::jacobi_svd(device, matrices)?;
    match svds.iter().position(|svd| !svd.converged) {
        None => Ok(svds),
        Some(k) => Err(unconverged(&planned[k].name)),
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
