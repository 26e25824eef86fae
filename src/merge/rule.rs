//! Rules that merge matrices of one shape: the mean, TIES, DARE, TSV, Iso.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::PlannedLayer;
use super::core::{NEGLIGIBLE, significant, svds};
use super::loss::times;
use super::trim::FileWide;
use crate::compute::ops::{EntryMember, EntryRule, Svd};
use crate::{Device, Error, Layer, LayerKey, Matrix, Result, Weighted};

/// How matrices M_1 … M_K of one shape become one.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(tag = "rule", rename_all = "kebab-case")]
pub enum Rule {
    /// `Σ M_k`.
    Sum,
    /// `1/K · Σ M_k`.
    Mean,
    /// TIES, entry by entry.
    Ties(Ties),
    /// DARE, entry by entry.
    Dare(Dare),
    /// TSV: with `M_k = U_k·Σ_k·V_kᵀ`, `P(U)·diag(Σ_1, …, Σ_K)·P(V)ᵀ`, where P(U) is the polar factor of
    /// `[U_1 … U_K]`, the nearest matrix with orthonormal columns. Directions that several share count once.
    Tsv(Tsv),
    /// Iso: `σ̄·U·Vᵀ` of `Σ M_k = U·Σ·Vᵀ`, with σ̄ a mean of its singular values.
    Iso(Iso),
}

/// TIES (arXiv 2306.01708): of each matrix keep the share `density` of largest magnitude, elect for each entry the sign
/// of the sum, and average the kept values of that sign, times λ.
///
/// `⌊density·n⌋` of n entries are kept, at least one, and what is as large as the smallest of them; magnitudes are
/// compared as f32. What the authors' code and PEFT do otherwise are options:
///
/// | | here | [`paper`](Self::paper) | [`peft`](Self::peft) |
/// |---|---|---|---|
/// | [`scope`](Self::scope): entries are ranked | in each layer | in all layers together | in each layer |
/// | [`one_more`](Self::one_more): entries kept | ⌊density·n⌋ | ⌊density·n⌋ + 1 | ⌊density·n⌋ |
/// | [`elect`](Self::elect): strengths count | before signs are elected | before (there are none) | after |
/// | [`zero`](Self::zero): a sum of zero elects | plus | the majority's sign | plus |
/// | [`alone`](Self::alone): layers of one adapter | pass through | are trimmed | are trimmed |
///
/// The defaults let a strength say how much an adapter counts in an election, need no pass over the file beforehand, and
/// leave alone what no other adapter touches. The authors' code is that of `ties-merging`, and of KnOTS; PEFT's is
/// `add_weighted_adapter` with `ties_svd` (its `ties` works on A and B apart, which is something else).
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ties {
    /// Share of the entries that is kept, in (0, 1]; 0.2 by default, as in the paper.
    pub density: f64,
    /// λ; 1 by default.
    pub lambda: f64,
    /// Among which entries the share is kept.
    pub scope: Scope,
    /// Keep one entry more than `⌊density·n⌋`, as the authors' code does.
    pub one_more: bool,
    /// When strengths count.
    pub elect: Elect,
    /// What a sum of zero elects.
    pub zero: ZeroSum,
    /// What becomes of layers of one adapter.
    pub alone: Alone,
}

impl Default for Ties {
    fn default() -> Self {
        Self {
            density: 0.2,
            lambda: 1.0,
            scope: Scope::default(),
            one_more: false,
            elect: Elect::default(),
            zero: ZeroSum::default(),
            alone: Alone::default(),
        }
    }
}

impl Ties {
    /// As the authors' code defines it.
    pub fn paper() -> Self {
        Self {
            scope: Scope::File,
            one_more: true,
            zero: ZeroSum::Majority,
            alone: Alone::Merge,
            ..Self::default()
        }
    }

    /// As PEFT defines it.
    pub fn peft() -> Self {
        Self { elect: Elect::Unweighted, alone: Alone::Merge, ..Self::default() }
    }
}

/// Among which entries TIES keeps a share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// Those of each layer: the default, and PEFT's.
    #[default]
    Layer,
    /// Those of all layers of the merge together, where an adapter has zeros on layers that it lacks: the paper's. The
    /// factors are read three times more, to rank entries and count signs; no update is held. Entries are compared down to
    /// 2^-126 of an update's size.
    File,
}

/// When strengths count in an election of signs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Elect {
    /// Before: an adapter's vote is as strong as it is. The default.
    #[default]
    Weighted,
    /// After: signs are elected as at strength 1, then values are multiplied by strengths and averaged; an adapter at
    /// strength 0 still votes and is counted. PEFT's.
    Unweighted,
}

/// The sign that a sum of zero elects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZeroSum {
    /// Plus: the default, and PEFT's.
    #[default]
    Plus,
    /// That of most other sums: of the layer for TIES by layer, else of the file; minus if neither has the majority. The
    /// paper's, and that of Core Space.
    Majority,
}

/// What a rule on entries makes of layers that one adapter alone has, or one alone at a strength that is not zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Alone {
    /// They pass through unchanged, as with every method: the default.
    #[default]
    Keep,
    /// Their entries are trimmed or dropped as everywhere: the papers' and PEFT's.
    Merge,
}

/// DARE (arXiv 2311.03099): drop entries at random, scale the rest by 1/density, then sum them, or merge them by the
/// sign election of TIES.
///
/// Which entries are dropped follows from the seed, the layer's name, the adapter's place and the entry's, by a
/// counter-based hash: the same on every device and in every run. The authors' code and PEFT differ in what is not chance:
///
/// | | here | [`paper`](Self::paper) | [`peft`](Self::peft) |
/// |---|---|---|---|
/// | [`alone`](Self::alone): layers of one adapter | pass through | drop entries | drop entries |
/// | [`elect`](Self::elect), with `ties`: strengths count | before signs are elected | before (there are none) | after |
/// | [`zero`](Self::zero), with `ties`: a sum of zero elects | plus | the file's majority | plus |
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dare {
    /// Share of the entries that is kept, 1 − p of the paper, in (0, 1]; 0.5 by default.
    pub density: f64,
    /// Elect signs as TIES does, without trimming; else sum.
    pub ties: bool,
    /// λ of the election; 1 by default.
    pub lambda: f64,
    /// Where chance begins; 0 by default.
    pub seed: u64,
    /// When strengths count in an election.
    pub elect: Elect,
    /// What a sum of zero elects.
    pub zero: ZeroSum,
    /// What becomes of layers of one adapter.
    pub alone: Alone,
}

impl Default for Dare {
    fn default() -> Self {
        Self {
            density: 0.5,
            ties: false,
            lambda: 1.0,
            seed: 0,
            elect: Elect::default(),
            zero: ZeroSum::default(),
            alone: Alone::default(),
        }
    }
}

impl Dare {
    /// As the authors' code defines it.
    pub fn paper() -> Self {
        Self { zero: ZeroSum::Majority, alone: Alone::Merge, ..Self::default() }
    }

    /// As PEFT defines it.
    pub fn peft() -> Self {
        Self { elect: Elect::Unweighted, alone: Alone::Merge, ..Self::default() }
    }
}

/// Options of TSV.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tsv {
    /// How many singular values of each adapter are kept.
    pub keep: Keep,
}

/// How many singular values of each adapter TSV keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// All: the default, since LoRAs leave room for all of them.
    #[default]
    All,
    /// The ⌊R/K⌋ largest, where R is the sum of the K ranks, or the layer's smaller side: the paper's, in the core of
    /// LoRAs. It is all of equal ranks; of others it cuts the higher. The authors' code fills up the lower, and all in the
    /// full space, with directions of value zero. Those are what rounding makes of them, and they move the others: noise of
    /// 1e-15 in its input moves its result by as much as the result itself. Here they are left out.
    Share,
}

impl Tsv {
    /// As the authors' code defines it.
    pub fn paper() -> Self {
        Self { keep: Keep::Share }
    }
}

/// Options of Iso.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Iso {
    /// Over what singular values are averaged.
    pub mean: IsoMean,
}

/// Over what Iso averages singular values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IsoMean {
    /// Those that are not negligible: the default, and that of Core Space. It keeps the strength of the sum.
    #[default]
    Directions,
    /// All that a layer has room for, min(in, out), most of them zero for LoRAs: the paper's. The result is the default's
    /// times the share of directions that are not zero, much weaker. The authors spread it over all of the others as well,
    /// which are arbitrary for a LoRA and left out.
    Width,
}

impl Iso {
    /// As the authors' code defines it.
    pub fn paper() -> Self {
        Self { mean: IsoMean::Width }
    }
}

/// One of the adapters whose entries are merged on a layer.
#[derive(Clone, Copy)]
pub(super) struct Voter<'a> {
    /// Its place in the merge.
    pub adapter: usize,
    pub layer: &'a Layer,
    /// The factor on its update when signs are elected.
    pub scale: f64,
    /// The factor on what is averaged then.
    pub weight: f64,
}

impl Rule {
    /// Whether the rule looks at entries one by one, so that the basis they are in counts.
    pub(super) fn is_entrywise(&self) -> bool {
        matches!(self, Self::Ties(_) | Self::Dare(_))
    }

    fn is_unweighted(&self) -> bool {
        match self {
            Self::Ties(ties) => ties.elect == Elect::Unweighted,
            Self::Dare(dare) => dare.ties && dare.elect == Elect::Unweighted,
            _ => false,
        }
    }

    /// Whether layers of one adapter are merged, too.
    pub(super) fn merges_alone(&self) -> bool {
        match self {
            Self::Ties(Ties { alone, .. }) | Self::Dare(Dare { alone, .. }) => *alone == Alone::Merge,
            _ => false,
        }
    }

    /// Whether all layers of the file are ranked together.
    pub(super) fn ranks_file(&self) -> bool {
        matches!(self, Self::Ties(Ties { scope: Scope::File, .. }))
    }

    /// Whether the majority of the file is asked for.
    pub(super) fn votes_in_file(&self) -> bool {
        match self {
            Self::Ties(ties) => ties.zero == ZeroSum::Majority && ties.scope == Scope::File,
            Self::Dare(dare) => dare.zero == ZeroSum::Majority && dare.ties,
            _ => false,
        }
    }

    /// Whether the majority of each layer is asked for.
    pub(super) fn votes_in_layer(&self) -> bool {
        matches!(self, Self::Ties(Ties { zero: ZeroSum::Majority, scope: Scope::Layer, .. }))
    }

    /// The adapters that take part on a layer.
    pub(super) fn voters(&self, layer: &PlannedLayer) -> Vec<usize> {
        let mut voters = layer.members.clone();
        if self.is_unweighted() {
            voters.extend(&layer.silent);
            voters.sort_unstable();
        }
        voters
    }

    /// The adapters that take part on a layer, with their factors.
    pub(super) fn weighed<'a>(&self, layer: &PlannedLayer, adapters: &[Weighted<'a>]) -> Vec<Voter<'a>> {
        let unweighted = self.is_unweighted();
        let voter = |adapter: usize| {
            let Weighted { adapter: of, strength } = adapters[adapter];
            let layer = of.layer(&layer.key)?;
            let (scale, weight) = match unweighted {
                true => (layer.scale.value, strength),
                false => (layer.scale.value * strength, 1.0),
            };
            Some(Voter { adapter, layer, scale, weight })
        };
        self.voters(layer).into_iter().filter_map(voter).collect()
    }

    /// How many of n entries are kept.
    pub(super) fn kept(&self, n: usize) -> usize {
        match self {
            Self::Ties(ties) => (kept(ties.density, n) + usize::from(ties.one_more)).min(n),
            _ => n,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        let (density, lambda) = match self {
            Self::Ties(Ties { density, lambda, .. }) | Self::Dare(Dare { density, lambda, .. }) => {
                (*density, *lambda)
            }
            _ => return Ok(()),
        };
        if !(density > 0.0 && density <= 1.0) {
            return Err(Error::Invalid(format!("density: {density}, but it must be above 0 and at most 1")));
        }
        match lambda.is_finite() {
            true => Ok(()),
            false => Err(Error::Invalid(format!("lambda: {lambda}, but it must be finite"))),
        }
    }

    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// What this does to the entries of a layer's voters, but for the thresholds of TIES. `scales`: what is left of their
    /// factors.
    pub(super) fn entries(&self, layer: &LayerKey, voters: &[Voter<'_>], scales: &[f64]) -> EntryRule {
        let (seed, chance, elect, scale) = match self {
            Self::Dare(dare) => {
                let (chance, lambda) = ((dare.density * 2f64.powi(32) - 1.0).round() as u32, dare.lambda);
                (
                    dare.seed,
                    chance,
                    dare.ties,
                    if dare.ties { lambda / dare.density } else { 1.0 / dare.density },
                )
            }
            Self::Ties(ties) => (0, u32::MAX, true, ties.lambda),
            _ => (0, u32::MAX, false, 1.0),
        };
        let layer = name_hash(layer.as_str()) ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut end = 0;
        let member = |(k, (voter, scale)): (usize, (&Voter<'_>, &f64))| {
            let start = end;
            end += voter.layer.rank;
            EntryMember {
                ranks: start..end,
                scale: *scale,
                threshold: 0.0,
                key: [layer as u32 ^ k as u32, (layer >> 32) as u32],
                weight: voter.weight,
            }
        };
        let members = voters.iter().zip(scales).enumerate().map(member).collect();
        EntryRule { members, chance, elect, zero_is_minus: false, scale }
    }

    /// Merges matrices of one layer, of its voters, entry by entry. `entries`: how many a matrix has, of which what lies
    /// beyond it is zero.
    pub(super) fn entrywise(
        &self,
        layer: &LayerKey,
        voters: &[Voter<'_>],
        matrices: &[Matrix],
        entries: usize,
        file: &FileWide,
    ) -> Matrix {
        let mut rule = self.decided(layer, voters, matrices, entries, file);
        if self.votes_in_layer() {
            rule.zero_is_minus = signs(&rule, matrices) <= 0;
        }
        let (rows, cols) = (matrices[0].rows, matrices[0].cols);
        let mut merged = Matrix::zeros(rows, cols);
        merged.data.par_chunks_exact_mut(cols.max(1)).enumerate().for_each(|(i, row)| {
            for (j, out) in row.iter_mut().enumerate() {
                *out = rule.merged(i, j, matrices.iter().map(|m| m[(i, j)]));
            }
        });
        merged
    }

    /// How many sums of the entries that count are above zero, less how many are below.
    pub(super) fn signs(
        &self,
        layer: &LayerKey,
        voters: &[Voter<'_>],
        matrices: &[Matrix],
        entries: usize,
        file: &FileWide,
    ) -> i64 {
        signs(&self.decided(layer, voters, matrices, entries, file), matrices)
    }

    /// The rule with its thresholds.
    fn decided(
        &self,
        layer: &LayerKey,
        voters: &[Voter<'_>],
        matrices: &[Matrix],
        entries: usize,
        file: &FileWide,
    ) -> EntryRule {
        let mut rule = self.entries(layer, voters, &vec![1.0; voters.len()]);
        rule.zero_is_minus = file.zero_is_minus.unwrap_or(false);
        let count = self.kept(entries);
        rule.members.par_iter_mut().zip(voters).zip(matrices).for_each(|((member, voter), matrix)| {
            member.threshold = match (&file.thresholds, self) {
                (Some(thresholds), _) => thresholds[voter.adapter],
                (None, Self::Ties(_)) => threshold(&matrix.data, count),
                _ => 0.0,
            };
        });
        rule
    }
}

fn signs(rule: &EntryRule, matrices: &[Matrix]) -> i64 {
    let (rows, cols) = (matrices[0].rows, matrices[0].cols);
    let of_row = |i: usize| -> i64 {
        (0..cols).map(|j| rule.decided(i, j, matrices.iter().map(|m| m[(i, j)])).1).sum()
    };
    (0..rows).into_par_iter().map(of_row).sum()
}

/// How many of n entries a density keeps.
fn kept(density: f64, n: usize) -> usize {
    ((density * n as f64) as usize).clamp(usize::from(n > 0), n)
}

/// The `count`-th largest magnitude, as f32.
fn threshold(values: &[f64], count: usize) -> f32 {
    let mut magnitudes: Vec<f32> = values.iter().map(|v| v.abs() as f32).collect();
    let Some(last) = count.checked_sub(1) else { return f32::INFINITY };
    // What lies beyond the matrix is zero, and so is the last one kept, if it lies there.
    if last >= magnitudes.len() {
        return 0.0;
    }
    *magnitudes.select_nth_unstable_by(last, |x, y| y.total_cmp(x)).1
}

/// FNV-1a: a name's place in chance, the same for ever.
fn name_hash(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Merges square cores of each layer by a rule that does not look at entries.
pub(super) fn merged(
    rule: &Rule,
    device: &Device,
    planned: &[&PlannedLayer],
    cores: &[Vec<Matrix>],
) -> Result<Vec<Matrix>> {
    let sums = |mean: bool| -> Vec<Matrix> {
        let sum = |cores: &Vec<Matrix>| {
            let scale = if mean { 1.0 / cores.len() as f64 } else { 1.0 };
            Matrix::from_fn(cores[0].rows, cores[0].cols, |i, j| {
                scale * cores.iter().map(|core| core[(i, j)]).sum::<f64>()
            })
        };
        cores.par_iter().map(sum).collect()
    };
    match rule {
        Rule::Mean => Ok(sums(true)),
        Rule::Tsv(options) => tsv(options, device, planned, cores),
        Rule::Iso(options) => {
            let svds = svds(device, planned, &sums(false))?;
            let iso = |(svd, layer): (&Svd, &&PlannedLayer)| {
                let kept = significant(&svd.values, NEGLIGIBLE * svd.values.first().unwrap_or(&0.0));
                let over = match options.mean {
                    IsoMean::Directions => kept,
                    IsoMean::Width => layer.input.min(layer.output),
                };
                let mean = svd.values[..kept].iter().sum::<f64>() / over.max(1) as f64;
                outer(&svd.left, &svd.right, &vec![mean; kept])
            };
            Ok(svds.par_iter().zip(planned).map(iso).collect())
        }
        _ => Ok(sums(false)),
    }
}

fn tsv(
    options: &Tsv,
    device: &Device,
    planned: &[&PlannedLayer],
    cores: &[Vec<Matrix>],
) -> Result<Vec<Matrix>> {
    let owners: Vec<usize> = cores.iter().enumerate().flat_map(|(i, cores)| vec![i; cores.len()]).collect();
    let owned: Vec<&PlannedLayer> = owners.iter().map(|&i| planned[i]).collect();
    let flat: Vec<Matrix> = cores.iter().flatten().cloned().collect();
    let own = svds(device, &owned, &flat)?;
    // Rows of both stacks are the singular vectors of all members; there are at most as many as the order.
    let (mut left, mut right, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for (i, cores) in cores.iter().enumerate() {
        let order = cores[0].rows;
        let most = match options.keep {
            Keep::All => order,
            // The core is as large as the ranks together, or as the layer's smaller side.
            Keep::Share => order.min(planned[i].input).min(planned[i].output) / cores.len(),
        };
        let (mut u, mut v, mut s) = (Matrix::zeros(order, order), Matrix::zeros(order, order), Vec::new());
        for svd in owners.iter().zip(&own).filter(|(owner, _)| **owner == i).map(|(_, svd)| svd) {
            let kept = significant(&svd.values, NEGLIGIBLE * svd.values.first().unwrap_or(&0.0));
            for k in 0..kept.min(most).min(order - s.len()) {
                let at = s.len() * order..(s.len() + 1) * order;
                u.data[at.clone()].copy_from_slice(svd.left.row(k));
                v.data[at].copy_from_slice(svd.right.row(k));
                s.push(svd.values[k]);
            }
        }
        left.push(u);
        right.push(v);
        values.push(s);
    }
    let polar = |stacks: &[Matrix]| -> Result<Vec<Matrix>> {
        let svds = svds(device, planned, stacks)?;
        Ok(svds
            .par_iter()
            .map(|svd| {
                outer(&svd.left, &svd.right, &vec![1.0; significant(&svd.values, 1e-6 * svd.values[0])])
            })
            .collect())
    };
    let (left, right) = (polar(&left)?, polar(&right)?);
    Ok((0..cores.len()).into_par_iter().map(|i| outer(&left[i], &right[i], &values[i])).collect())
}

/// `Σ_k values[k]·left[k, :]ᵀ·right[k, :]` over as many rows as there are values.
fn outer(left: &Matrix, right: &Matrix, values: &[f64]) -> Matrix {
    let scaled = Matrix::from_fn(values.len(), right.cols, |k, j| values[k] * right[(k, j)]);
    let left = Matrix::from_fn(left.cols, values.len(), |i, k| left[(k, i)]);
    times(&left, &scaled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[f64]) -> Matrix {
        Matrix { rows: 1, cols: values.len(), data: values.to_vec() }
    }

    /// Matrices of adapters at these strengths, none of which is 0, merged in one layer.
    fn merged(rule: Rule, strengths: &[f64], matrices: &[Matrix], key: &str) -> Matrix {
        let layer = Layer::new(key, Matrix::zeros(1, 1), Matrix::zeros(1, 1)).unwrap();
        let unweighted = rule.is_unweighted();
        let voter = |(adapter, &strength): (usize, &f64)| Voter {
            adapter,
            layer: &layer,
            scale: 1.0,
            weight: if unweighted { strength } else { 1.0 },
        };
        let voters: Vec<_> = strengths.iter().enumerate().map(voter).collect();
        let scaled = |(m, &s): (&Matrix, &f64)| Matrix::from_fn(m.rows, m.cols, |i, j| s * m[(i, j)]);
        let matrices: Vec<_> = match unweighted {
            true => matrices.to_vec(),
            false => matrices.iter().zip(strengths).map(scaled).collect(),
        };
        let entries = matrices[0].data.len();
        rule.entrywise(&layer.key, &voters, &matrices, entries, &FileWide::default())
    }

    #[test]
    fn ties_trims_elects_and_averages() {
        let members =
            [row(&[4.0, -3.0, 1.0, 2.0]), row(&[-1.0, 3.0, 4.0, 2.0]), row(&[3.0, -4.0, -5.0, 1.0])];
        let of = |density, lambda| {
            let ties = Ties { density, lambda, ..Ties::default() };
            merged(Rule::Ties(ties), &[1.0; 3], &members, "a").data
        };
        assert_eq!(of(1.0, 1.0), [3.5, -3.5, 2.5, 5.0 / 3.0]);
        // Kept: 4 -3 . . | . 3 4 . | . -4 -5 .
        assert_eq!(of(0.5, 2.0), [8.0, -7.0, -10.0, 0.0]);
    }

    #[test]
    fn ties_has_the_definitions_of_others() {
        let pair = [row(&[4.0, -3.0, 1.0, 2.0, -9.0]), row(&[-3.0, 3.0, 4.0, -2.0, -9.0])];
        let of = |ties: Ties, strengths: &[f64]| {
            merged(Rule::Ties(Ties { density: 1.0, ..ties }), strengths, &pair, "a").data
        };
        let one_more = Ties { density: 0.4, one_more: true, ..Ties::default() };
        // Kept: 4 -3 . . -9 | -3 3 4 . -9, for what is as large as the last one stays.
        assert_eq!(merged(Rule::Ties(one_more), &[1.0; 2], &pair, "a").data, [4.0, 3.0, 4.0, 0.0, -9.0]);
        // At twice the strength the second wins the first entry, unless strengths count after the election.
        assert_eq!(of(Ties::default(), &[1.0, 2.0]), [-6.0, 6.0, 4.5, -4.0, -13.5]);
        assert_eq!(of(Ties::peft(), &[1.0, 2.0]), [4.0, 6.0, 4.5, 2.0, -13.5]);
        // Sums: + 0 + 0 -, so that zeros elect plus either way; and minus with the signs turned.
        let layer = Ties { zero: ZeroSum::Majority, ..Ties::default() };
        assert_eq!(of(layer, &[1.0, 1.0]), [4.0, 3.0, 2.5, 2.0, -9.0]);
        assert_eq!(of(layer, &[-1.0, -1.0]), [-4.0, -3.0, -2.5, -2.0, 9.0]);
        assert_eq!(of(Ties::default(), &[-1.0, -1.0]), [-4.0, 3.0, -2.5, 2.0, 9.0]);
    }

    #[test]
    fn dare_drops_about_the_share_it_says_and_keeps_the_mean() {
        let n = 200 * 200;
        let ones = Matrix::from_fn(200, 200, |_, _| 1.0);
        let pair = [ones.clone(), ones];
        let of = |seed, key: &str| {
            merged(Rule::Dare(Dare { density: 0.3, seed, ..Dare::default() }), &[1.0; 2], &pair, key)
        };
        let found = of(1, "a");
        let share_of =
            |value: f64| found.data.iter().filter(|v| (**v - value).abs() < 1e-12).count() as f64 / n as f64;
        // Shares of a product of two independent choices; four standard deviations.
        for (value, share) in [(0.0, 0.49), (1.0 / 0.3, 0.42), (2.0 / 0.3, 0.09)] {
            let slack = 4.0 * (share * (1.0 - share) / f64::from(n)).sqrt();
            assert!((share_of(value) - share).abs() < slack, "{value}: {}", share_of(value));
        }
        assert_eq!(found, of(1, "a"));
        assert_ne!(found, of(2, "a"));
        assert_ne!(found, of(1, "b"));
    }

    #[test]
    fn the_density_counts() {
        assert_eq!((kept(0.5, 4), kept(0.2, 4096), kept(1e-9, 10), kept(1.0, 7)), (2, 819, 1, 7));
        assert_eq!(threshold(&[3.0, -5.0, 4.0], 2), 4.0);
    }
}
