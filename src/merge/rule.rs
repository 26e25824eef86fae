//! Rules that merge matrices of one shape: the mean, TIES, DARE, TSV, Iso.

use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::core::{NEGLIGIBLE, significant, svds};
use super::driver::Job;
use super::loss::times;
use crate::compute::ops::{EntryMember, EntryRule};
use crate::{Device, Error, LayerKey, Matrix, Result};

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
    Tsv,
    /// Iso: `σ̄·U·Vᵀ` of `Σ M_k = U·Σ·Vᵀ`, with σ̄ the mean of the singular values that are not negligible.
    Iso,
}

/// TIES (arXiv 2306.01708): of each matrix keep the share `density` of largest magnitude, elect for each entry the sign
/// of the sum, and average the kept values of that sign, times λ.
///
/// `⌊density·n⌋` of n entries are kept, at least one, and what is as large as the smallest of them; magnitudes are
/// compared as f32. A sum of zero elects plus, as in peft.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ties {
    /// Share of the entries that is kept, in (0, 1]; 0.2 by default, as in the paper.
    pub density: f64,
    /// λ; 1 by default.
    pub lambda: f64,
}

impl Default for Ties {
    fn default() -> Self {
        Self { density: 0.2, lambda: 1.0 }
    }
}

/// DARE (arXiv 2311.03099): drop entries at random, scale the rest by 1/density, then sum them, or merge them by the
/// sign election of TIES.
///
/// Which entries are dropped follows from the seed, the layer's name, the adapter's place and the entry's, by a
/// counter-based hash: the same on every device and in every run.
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
}

impl Default for Dare {
    fn default() -> Self {
        Self { density: 0.5, ties: false, lambda: 1.0, seed: 0 }
    }
}

impl Rule {
    /// Whether the rule looks at entries one by one, so that the basis they are in counts.
    pub(super) fn is_entrywise(&self) -> bool {
        matches!(self, Self::Ties(_) | Self::Dare(_))
    }

    pub(super) fn check(&self) -> Result<()> {
        let (density, lambda) = match self {
            Self::Ties(Ties { density, lambda }) | Self::Dare(Dare { density, lambda, .. }) => {
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

    /// What this does to the entries of a layer's members, but for the thresholds of TIES. `blocks`: their ranks.
    pub(super) fn entries(&self, layer: &LayerKey, blocks: &[Range<usize>], scales: &[f64]) -> EntryRule {
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
        let member = |(k, (ranks, scale)): (usize, (&Range<usize>, &f64))| EntryMember {
            ranks: ranks.clone(),
            scale: *scale,
            threshold: 0.0,
            key: [layer as u32 ^ k as u32, (layer >> 32) as u32],
        };
        let members = blocks.iter().zip(scales).enumerate().map(member).collect();
        EntryRule { members, chance, elect, scale }
    }

    /// Merges matrices of one layer entry by entry.
    pub(super) fn entrywise(&self, members: &[Matrix], layer: &LayerKey) -> Matrix {
        let mut rule = self.entries(layer, &vec![0..0; members.len()], &vec![1.0; members.len()]);
        if let Self::Ties(ties) = self {
            rule.members.par_iter_mut().zip(members).for_each(|(entry, member)| {
                entry.threshold = threshold(&member.data, kept(ties.density, member.data.len()));
            });
        }
        let (rows, cols) = (members[0].rows, members[0].cols);
        let mut merged = Matrix::zeros(rows, cols);
        merged.data.par_chunks_exact_mut(cols.max(1)).enumerate().for_each(|(i, row)| {
            for (j, out) in row.iter_mut().enumerate() {
                *out = rule.merged(i, j, members.iter().map(|member| member[(i, j)]));
            }
        });
        merged
    }
}

/// How many of n entries a density keeps.
pub(super) fn kept(density: f64, n: usize) -> usize {
    ((density * n as f64) as usize).clamp(usize::from(n > 0), n)
}

/// The `count`-th largest magnitude, as f32.
fn threshold(values: &[f64], count: usize) -> f32 {
    let mut magnitudes: Vec<f32> = values.iter().map(|v| v.abs() as f32).collect();
    let Some(last) = count.checked_sub(1) else { return f32::INFINITY };
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
    jobs: &[Job<'_>],
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
        Rule::Tsv => tsv(device, jobs, cores),
        Rule::Iso => {
            let svds = svds(device, jobs, &sums(false))?;
            let iso = |svd: &crate::compute::ops::Svd| {
                let kept = significant(&svd.values, NEGLIGIBLE * svd.values.first().unwrap_or(&0.0));
                let mean = svd.values[..kept].iter().sum::<f64>() / kept.max(1) as f64;
                outer(&svd.left, &svd.right, &vec![mean; kept])
            };
            Ok(svds.par_iter().map(iso).collect())
        }
        _ => Ok(sums(false)),
    }
}

fn tsv(device: &Device, jobs: &[Job<'_>], cores: &[Vec<Matrix>]) -> Result<Vec<Matrix>> {
    let owners: Vec<usize> = cores.iter().enumerate().flat_map(|(i, cores)| vec![i; cores.len()]).collect();
    let owned: Vec<Job<'_>> =
        owners.iter().map(|&i| Job { planned: jobs[i].planned, members: Vec::new() }).collect();
    let flat: Vec<Matrix> = cores.iter().flatten().cloned().collect();
    let own = svds(device, &owned, &flat)?;
    // Rows of both stacks are the singular vectors of all members; there are at most as many as the order.
    let (mut left, mut right, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for (i, cores) in cores.iter().enumerate() {
        let order = cores[0].rows;
        let (mut u, mut v, mut s) = (Matrix::zeros(order, order), Matrix::zeros(order, order), Vec::new());
        for svd in owners.iter().zip(&own).filter(|(owner, _)| **owner == i).map(|(_, svd)| svd) {
            let kept = significant(&svd.values, NEGLIGIBLE * svd.values.first().unwrap_or(&0.0));
            for k in 0..kept.min(order - s.len()) {
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
        let svds = svds(device, jobs, stacks)?;
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

    #[test]
    fn ties_trims_elects_and_averages() {
        let key = LayerKey::parse("a");
        let members =
            [row(&[4.0, -3.0, 1.0, 2.0]), row(&[-1.0, 3.0, 4.0, 2.0]), row(&[3.0, -4.0, -5.0, 1.0])];
        let of = |density, lambda| Rule::Ties(Ties { density, lambda }).entrywise(&members, &key).data;
        assert_eq!(of(1.0, 1.0), [3.5, -3.5, 2.5, 5.0 / 3.0]);
        // Kept: 4 -3 . . | . 3 4 . | . -4 -5 .
        assert_eq!(of(0.5, 2.0), [8.0, -7.0, -10.0, 0.0]);
    }

    #[test]
    fn dare_drops_about_the_share_it_says_and_keeps_the_mean() {
        let key = LayerKey::parse("a");
        let n = 200 * 200;
        let ones = Matrix::from_fn(200, 200, |_, _| 1.0);
        let rule = |seed| Rule::Dare(Dare { density: 0.3, seed, ..Dare::default() });
        let merged = rule(1).entrywise(&[ones.clone(), ones.clone()], &key);
        let of =
            |value: f64| merged.data.iter().filter(|v| (**v - value).abs() < 1e-12).count() as f64 / n as f64;
        // Shares of a product of two independent choices; four standard deviations.
        for (value, share) in [(0.0, 0.49), (1.0 / 0.3, 0.42), (2.0 / 0.3, 0.09)] {
            let slack = 4.0 * (share * (1.0 - share) / f64::from(n)).sqrt();
            assert!((of(value) - share).abs() < slack, "{value}: {}", of(value));
        }
        assert_eq!(merged, rule(1).entrywise(&[ones.clone(), ones.clone()], &key));
        assert_ne!(merged, rule(2).entrywise(&[ones.clone(), ones.clone()], &key));
        assert_ne!(merged, rule(1).entrywise(&[ones.clone(), ones], &LayerKey::parse("b")));
    }

    #[test]
    fn the_density_counts() {
        assert_eq!((kept(0.5, 4), kept(0.2, 4096), kept(1e-9, 10), kept(1.0, 7)), (2, 819, 1, 7));
        assert_eq!(threshold(&[3.0, -5.0, 4.0], 2), 4.0);
    }
}
