//! What TIES and DARE do to the entries of the matrices of one layer, and what they choose between.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::survey::FileWide;
use crate::compute::ops::{EntryMember, EntryRule};
use crate::merge::PlannedLayer;
use crate::{Error, Layer, LayerKey, Matrix, Result, Weighted};

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

/// A rule on entries, TIES or DARE: what counts of each matrix, and how that becomes one.
#[derive(Clone, Debug)]
pub(crate) struct EntryOptions {
    /// Share of the entries that is kept, in (0, 1].
    pub density: f64,
    /// Factor on what is elected.
    pub lambda: f64,
    /// How the largest entries are chosen, if they are.
    pub trim: Option<Trim>,
    /// An entry is kept if its hash, of 32 bits, is at most this; and where that begins.
    pub chance: u32,
    pub seed: u64,
    /// Whether signs are elected and what agrees is averaged; else entries are summed.
    pub elects: bool,
    /// Factor on the result.
    pub scale: f64,
    /// Strengths count after signs are elected.
    pub unweighted: bool,
    /// Where the majority is sought that a sum of zero follows; such sums elect plus without.
    pub majority: Option<Scope>,
    /// Layers of one adapter are merged, too.
    pub alone: bool,
}

/// Which entries are the largest ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trim {
    /// Among which entries the share is kept.
    pub scope: Scope,
    /// Keep one more than the share.
    pub one_more: bool,
}

/// One of the adapters whose entries are merged on a layer.
#[derive(Clone, Copy)]
pub(crate) struct Voter<'a> {
    /// Its place in the merge.
    pub adapter: usize,
    pub layer: &'a Layer,
    /// The factor on its update when signs are elected.
    pub scale: f64,
    /// The factor on what is averaged then.
    pub weight: f64,
}

impl EntryOptions {
    pub fn check(&self) -> Result<()> {
        let Self { density, lambda, .. } = self;
        if !(*density > 0.0 && *density <= 1.0) {
            return Err(Error::Invalid(format!("density: {density}, but it must be above 0 and at most 1")));
        }
        match lambda.is_finite() {
            true => Ok(()),
            false => Err(Error::Invalid(format!("lambda: {lambda}, but it must be finite"))),
        }
    }

    /// Whether all layers of the file are ranked together.
    pub fn ranks_file(&self) -> bool {
        self.trim.is_some_and(|trim| trim.scope == Scope::File)
    }

    /// The adapters that take part on a layer.
    pub fn voters(&self, layer: &PlannedLayer) -> Vec<usize> {
        let mut voters = layer.members.clone();
        if self.unweighted {
            voters.extend(&layer.silent);
            voters.sort_unstable();
        }
        voters
    }

    /// The adapters that take part on a layer, with their factors.
    pub fn weighed<'a>(&self, layer: &PlannedLayer, adapters: &[Weighted<'a>]) -> Vec<Voter<'a>> {
        let voter = |adapter: usize| {
            let Weighted { adapter: of, strength } = adapters[adapter];
            let layer = of.layer(&layer.key)?;
            let (scale, weight) = match self.unweighted {
                true => (layer.scale.value, strength),
                false => (layer.scale.value * strength, 1.0),
            };
            Some(Voter { adapter, layer, scale, weight })
        };
        self.voters(layer).into_iter().filter_map(voter).collect()
    }

    /// The ranks together of those that take part.
    pub fn rank(&self, layer: &PlannedLayer, adapters: &[Weighted<'_>]) -> usize {
        self.weighed(layer, adapters).iter().map(|voter| voter.layer.rank).sum()
    }

    /// How many of n entries are kept by their size.
    pub fn kept(&self, n: usize) -> usize {
        match self.trim {
            Some(trim) => (kept(self.density, n) + usize::from(trim.one_more)).min(n),
            None => n,
        }
    }

    /// What this does to the entries of a layer's voters, but for thresholds. `scales`: what is left of their factors.
    pub fn entries(&self, layer: &LayerKey, voters: &[Voter<'_>], scales: &[f64]) -> EntryRule {
        let layer = name_hash(layer.as_str()) ^ self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut end = 0;
        let member = |(k, (voter, scale)): (usize, (&Voter<'_>, &f64))| {
            let start = end;
            end += voter.layer.rank;
            EntryMember {
                a: start,
                b: start,
                rank: voter.layer.rank,
                scale: *scale,
                threshold: 0.0,
                key: [layer as u32 ^ k as u32, (layer >> 32) as u32],
                weight: voter.weight,
            }
        };
        let members = voters.iter().zip(scales).enumerate().map(member).collect();
        let Self { chance, elects, scale, .. } = *self;
        EntryRule { members, chance, elect: elects, zero_is_minus: false, scale }
    }

    /// Merges matrices of one layer, of its voters, entry by entry. `entries`: how many a matrix has, of which what lies
    /// beyond it is zero.
    pub fn merged(
        &self,
        layer: &LayerKey,
        voters: &[Voter<'_>],
        matrices: &[Matrix],
        entries: usize,
        file: &FileWide,
    ) -> Matrix {
        let mut rule = self.decided(layer, voters, matrices, entries, file);
        if self.majority == Some(Scope::Layer) {
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
    pub fn signs(
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
            member.threshold = match (&file.thresholds, self.trim) {
                (Some(thresholds), _) => thresholds[voter.adapter],
                (None, Some(_)) => threshold(&matrix.data, count),
                (None, None) => 0.0,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dare, Ties};

    fn row(values: &[f64]) -> Matrix {
        Matrix { rows: 1, cols: values.len(), data: values.to_vec() }
    }

    /// Matrices of adapters at these strengths, none of which is 0, merged in one layer.
    fn merged(rule: impl Into<EntryOptions>, strengths: &[f64], matrices: &[Matrix], key: &str) -> Matrix {
        let layer = Layer::new(key, Matrix::zeros(1, 1), Matrix::zeros(1, 1)).unwrap();
        let rule: EntryOptions = rule.into();
        let unweighted = rule.unweighted;
        let voter = |(adapter, &strength): (usize, &f64)| Voter {
            adapter,
            layer: &layer,
            scale: 1.0,
            weight: if unweighted { strength } else { 1.0 },
        };
        let voters: Vec<_> = strengths.iter().enumerate().map(voter).collect();
        let scaled = |(m, &s): (&Matrix, &f64)| m.map(|v| s * v);
        let matrices: Vec<_> = match unweighted {
            true => matrices.to_vec(),
            false => matrices.iter().zip(strengths).map(scaled).collect(),
        };
        let entries = matrices[0].data.len();
        rule.merged(&layer.key, &voters, &matrices, entries, &FileWide::default())
    }

    #[test]
    fn ties_trims_elects_and_averages() {
        let members =
            [row(&[4.0, -3.0, 1.0, 2.0]), row(&[-1.0, 3.0, 4.0, 2.0]), row(&[3.0, -4.0, -5.0, 1.0])];
        let of = |density, lambda| {
            let ties = Ties { density, lambda, ..Ties::default() };
            merged(ties, &[1.0; 3], &members, "a").data
        };
        assert_eq!(of(1.0, 1.0), [3.5, -3.5, 2.5, 5.0 / 3.0]);
        // Kept: 4 -3 . . | . 3 4 . | . -4 -5 .
        assert_eq!(of(0.5, 2.0), [8.0, -7.0, -10.0, 0.0]);
    }

    #[test]
    fn ties_has_the_definitions_of_others() {
        let pair = [row(&[4.0, -3.0, 1.0, 2.0, -9.0]), row(&[-3.0, 3.0, 4.0, -2.0, -9.0])];
        let of =
            |ties: Ties, strengths: &[f64]| merged(Ties { density: 1.0, ..ties }, strengths, &pair, "a").data;
        let one_more = Ties { density: 0.4, one_more: true, ..Ties::default() };
        // Kept: 4 -3 . . -9 | -3 3 4 . -9, for what is as large as the last one stays.
        assert_eq!(merged(one_more, &[1.0; 2], &pair, "a").data, [4.0, 3.0, 4.0, 0.0, -9.0]);
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
        let of =
            |seed, key: &str| merged(Dare { density: 0.3, seed, ..Dare::default() }, &[1.0; 2], &pair, key);
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
