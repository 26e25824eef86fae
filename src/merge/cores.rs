//! Merging in the small core that the updates of one layer share: KnOTS, Core Space, TSV, Iso-C and the mean.

use std::fmt;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::algebra::{self, times};
use super::engine::driver::{self, Done, Job, Method, Run, Spec};
use super::entries::{EntryOptions, FileWide, Ranking, Survey, Unsettled, Voter};
use super::factored::{self, Factored};
use super::members::{finite, rounded};
use super::{Action, LayerReport, Merged, PlannedLayer};
use crate::compute::Batch;
use crate::compute::ops::{self, EntryMerger};
use crate::{Control, Device, Layer, Matrix, Result, Weighted};

/// Where a [`CoreMerge`] applies its rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
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
/// | [`tsv`](Self::tsv) (TSV-Merge, arXiv 2412.00081) | `core` with [`Rule::Tsv`](super::Rule::Tsv) |
/// | [`iso_c`](Self::iso_c) (Iso-C, arXiv 2502.04959) | `core` with [`Rule::Iso`](super::Rule::Iso) |
///
/// Any bases of the stacked factors serve the rules that do not look at entries; for TIES and DARE they count, and
/// [`bases`](Self::bases) offers the paper's. KnOTS works on the columns of the updates as they are, so with TIES or DARE it
/// also leaves the span of the rows of A, in which all else here stays. Signs of singular vectors are arbitrary, but no
/// rule sees them unless entries cancel exactly. Thin QR of the stacked factors gives all of it, ΔW is never formed. Small matrices are f64 or
/// double-single, the result is rounded once to f32; its rank is at most R. Layers of one adapter pass through unchanged,
/// unless [`Ties::alone`](super::Ties::alone) or [`Dare::alone`](super::Dare::alone) say otherwise.
///
/// As their authors define them: KnOTS with [`Ties::paper`](super::Ties::paper), which ranks the entries of `Uᵀ·ΔW_k` of
/// all layers together, without directions that are negligible (with a rule by layer their rows count, as zeros); Core
/// Space with [`Bases::Factors`] and that rule layer by layer ([`core_paper`](Self::core_paper)); TSV and Iso-C with
/// [`Tsv::paper`](super::Tsv::paper) and [`Iso::paper`](super::Iso::paper). PEFT has none of these methods.
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
    options: serde_json::Value,
    rule: CoreRule,
    bases: Bases,
}

/// How the updates of a layer become one.
#[derive(Clone, Debug)]
pub(super) enum CoreRule {
    /// Entry by entry, so that bases count.
    Entries(EntryOptions),
    /// By what a rotation does not change, so that any bases do.
    Cores(Arc<dyn MergeCores>),
}

/// A rule that does not see the bases of cores.
pub(super) trait MergeCores: fmt::Debug + Send + Sync {
    /// Makes one of the square cores of each layer.
    fn merged(
        &self,
        device: &Device,
        planned: &[&PlannedLayer],
        cores: &[Vec<Matrix>],
    ) -> Result<Vec<Matrix>>;
}

impl CoreMerge {
    /// By a rule whose options are these in a report.
    pub(super) fn new(name: &'static str, space: Space, options: serde_json::Value, rule: CoreRule) -> Self {
        Self { name, space, options, rule, bases: Bases::default() }
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
    /// [`Error::Invalid`](crate::Error::Invalid) for options of the rule out of range; as [`Plan::new`](super::Plan::new);
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

    fn chunk(&self, device: &Device, jobs: &[Job<'_>], run: &Run<'_>, file: &FileWide) -> Result<Vec<Done>> {
        let planned: Vec<&PlannedLayer> = jobs.iter().map(|job| job.planned).collect();
        let rule = match &self.rule {
            CoreRule::Entries(rule) => rule,
            CoreRule::Cores(rule) => {
                let members: Vec<&[(&Layer, f64)]> = jobs.iter().map(|job| job.members.as_slice()).collect();
                let factored = Factored::new(device, &members)?;
                let merged = rule.merged(device, &planned, &factored.cores)?;
                return self.lifted(device, jobs, &factored, &merged);
            }
        };
        let entries = Entries::new(self, rule, device, &planned, run)?;
        if let Some(mut merger) = entries.on_gpu(device)? {
            entries.settle(&mut merger, device, run, file)?;
            let (a, _) = merger.whole(device, &|| run.control.check())?;
            let b =
                ops::rank_update(device, None, &ops::small(device, &entries.left)?, &entries.factored.b.q)?;
            return (jobs, a.download_f32(device)?, b.download_f32(device)?)
                .into_par_iter()
                .map(|(job, a, b)| Ok(combined(job, finite(job.template(), a, b.transposed())?)))
                .collect();
        }
        let merged = |i: usize| -> Result<Matrix> {
            let (matrices, count) = entries.of(device, i)?;
            Ok(rule.merged(&planned[i].key, &entries.voters[i], &matrices, count, file))
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
                Ok(combined(job, layer))
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
        let lifted =
            factored.lifted(device, &templates, cores, |_, values| algebra::directions(values).max(1))?;
        Ok(lifted.into_iter().zip(jobs).map(|(lifted, job)| combined(job, lifted.layer)).collect())
    }

    /// The ranks of a layer together.
    fn rank(&self, layer: &PlannedLayer, run: &Run<'_>) -> usize {
        match &self.rule {
            CoreRule::Entries(rule) => rule.rank(layer, run.adapters),
            CoreRule::Cores(_) => layer.rank,
        }
    }

    fn size(&self, layer: &PlannedLayer, run: &Run<'_>) -> (u64, u64) {
        let PlannedLayer { input, output, .. } = layer;
        let rank = self.rank(layer, run);
        let (largest, all) = factored::size(run.device, rank, *input, *output);
        match (self.space, &self.rule) {
            // Uᵀ in f32 of each update, what becomes of them, and counts of magnitudes.
            (Space::Left, CoreRule::Entries(rule)) => {
                let members = rule.voters(layer).len();
                let (counts, cores) = (4 * members * (ops::BUCKETS + 1), 4 * rank * (members + 1) * rank);
                (largest.max(counts.max(cores) as u64), all + (counts + cores + 4 * rank * input) as u64)
            }
            _ => (largest, all),
        }
    }
}

/// What became of a layer whose factors are these.
fn combined(job: &Job<'_>, layer: Layer) -> Done {
    let action = Action::Combined { captured: None };
    let report = LayerReport { rank: layer.rank, ..LayerReport::new(job.planned, action) };
    Done::new(layer, report)
}

/// What a rule on entries is applied to.
struct Entries<'a> {
    merge: &'a CoreMerge,
    rule: &'a EntryOptions,
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
        rule: &'a EntryOptions,
        device: &Device,
        planned: &'a [&'a PlannedLayer],
        run: &Run<'a>,
    ) -> Result<Self> {
        let voters: Vec<Vec<Voter<'_>>> =
            planned.iter().map(|layer| rule.weighed(layer, run.adapters)).collect();
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
        Ok(Self { merge, rule, planned, voters, factored, left, right })
    }

    /// The updates of KnOTS, `Uᵀ·ΔW_k = (Uᵀ·M_k)·Q_a`, as products whose entries a GPU makes and merges without a matrix of
    /// theirs; `None` elsewhere.
    fn on_gpu(&self, device: &Device) -> Result<Option<EntryMerger>> {
        if !device.is_gpu() || self.merge.space != Space::Left {
            return Ok(None);
        }
        let side_by_side = |(left, cores): (&Matrix, &Vec<Matrix>)| {
            let rows: Vec<Matrix> = cores.iter().map(|core| times(left, core)).collect();
            let rank = left.cols;
            Matrix::from_fn(left.rows, rows.len() * rank, |i, j| rows[j / rank][(i, j % rank)])
        };
        let b: Vec<Matrix> = (&self.left, &self.factored.cores).into_par_iter().map(side_by_side).collect();
        let rule = |(k, layer): (usize, &&PlannedLayer)| {
            let (voters, rank) = (&self.voters[k], self.left[k].rows);
            let mut rule = self.rule.entries(&layer.key, voters, &vec![1.0; voters.len()]);
            for (k, member) in rule.members.iter_mut().enumerate() {
                (member.a, member.b, member.rank) = (0, k * rank, rank);
            }
            rule
        };
        let rules = self.planned.iter().enumerate().map(rule).collect();
        let a = self.factored.a.q.select(&(0..self.planned.len()).collect::<Vec<_>>());
        EntryMerger::new(a, Batch::upload(device, device.factor(), &b)?, rules).map(Some)
    }

    /// Finds out what counts of them, and what a sum of zero elects.
    fn settle(
        &self,
        merger: &mut EntryMerger,
        device: &Device,
        run: &Run<'_>,
        file: &FileWide,
    ) -> Result<()> {
        let layer = |(i, voters)| {
            let voters: &Vec<Voter<'_>> = voters;
            Unsettled { voters, entries: self.rows_count(i), exponent: 0 }
        };
        let layers: Vec<_> = self.voters.iter().enumerate().map(layer).collect();
        self.rule.settle(device, merger, &layers, file, &|| run.control.check())
    }

    /// Of how many entries of each matrix of KnOTS a share is kept.
    fn rows_count(&self, i: usize) -> usize {
        let left = &self.left[i];
        let is_direction = |row: &&[f64]| row.iter().any(|v| *v != 0.0);
        let directions = match self.rule.ranks_file() {
            true => left.data.chunks(left.cols.max(1)).filter(is_direction).count(),
            false => left.rows,
        };
        directions * self.planned[i].input
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
            return Ok((rows, self.rows_count(i)));
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
    rule: &'a EntryOptions,
    run: &'a Run<'a>,
}

impl Survey for Surveyed<'_> {
    fn count(&self, on: &Device, layers: &[&PlannedLayer], _: i32, ranking: &mut Ranking) -> Result<u64> {
        let entries = Entries::new(self.merge, self.rule, on, layers, self.run)?;
        if let Some(merger) = entries.on_gpu(on)? {
            ranking.count_layers(on, &merger, &entries.voters, &|| self.run.control.check())?;
            return Ok((0..layers.len()).map(|i| entries.rows_count(i) as u64).sum());
        }
        let mut all = 0;
        for (i, voters) in entries.voters.iter().enumerate() {
            let (matrices, count) = entries.of(on, i)?;
            voters
                .iter()
                .zip(&matrices)
                .for_each(|(voter, matrix)| ranking.count(voter.adapter, &matrix.data));
            all += count as u64;
        }
        Ok(all)
    }

    fn signs(&self, on: &Device, layers: &[&PlannedLayer], file: &FileWide) -> Result<i64> {
        let entries = Entries::new(self.merge, self.rule, on, layers, self.run)?;
        if let Some(mut merger) = entries.on_gpu(on)? {
            entries.settle(&mut merger, on, self.run, file)?;
            let tallies = merger.tallies(on, &|| self.run.control.check())?;
            return Ok(tallies.iter().map(|tally| tally.signs).sum());
        }
        let of = |i: usize| -> Result<i64> {
            let (matrices, count) = entries.of(on, i)?;
            Ok(self.rule.signs(&layers[i].key, &entries.voters[i], &matrices, count, file))
        };
        (0..layers.len()).map(of).sum()
    }
}

impl Method for CoreMerge {
    fn check(&self, _: usize) -> Result<()> {
        match &self.rule {
            CoreRule::Entries(rule) => rule.check(),
            CoreRule::Cores(_) => Ok(()),
        }
    }

    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        self.check(run.adapters.len())?;
        let mut options = self.options.clone();
        if self.bases == Bases::Factors {
            options["bases"] = "factors".into();
        }
        let size = |layer: &PlannedLayer| self.size(layer, run);
        let (file, alone) = match &self.rule {
            CoreRule::Entries(rule) => {
                (FileWide::find(rule, run, &Surveyed { merge: self, rule, run }, size, |_| 0)?, rule.alone)
            }
            CoreRule::Cores(_) => (FileWide::default(), false),
        };
        driver::run(
            run,
            &Spec {
                method: self.name,
                options,
                size: &size,
                rank: &|layer| self.rank(layer, run),
                merge: &|on, jobs| self.chunk(on, jobs, run, &file),
                alone,
                is_sum: false,
                notes: &|_| Vec::new(),
            },
        )
    }
}
