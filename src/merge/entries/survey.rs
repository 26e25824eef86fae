//! What TIES finds out before it merges entries: how large they must be, and what a sum of zero elects; in one layer or in
//! all.

use super::rule::{EntryOptions, Scope};
use crate::compute::ops::BUCKETS;
use crate::merge::engine::chunks::{chunks, in_turn};
use crate::merge::engine::driver::Run;
use crate::merge::{Plan, PlannedLayer};
use crate::{Device, Result};

/// Finds the n-th largest magnitude of each of several sets, exactly, by counting bits of f32 twice: first the upper 16,
/// then, of what shares them with the one that is looked for, the lower 15.
#[derive(Clone, Debug)]
pub(crate) struct Ranking {
    counts: Vec<Vec<u64>>,
    /// Of the second pass: the upper bits of each set, and how many of those are wanted.
    found: Option<(Vec<u32>, Vec<u64>)>,
}

impl Ranking {
    /// Of so many sets, before the first pass.
    pub fn new(sets: usize) -> Self {
        Self { counts: vec![vec![0; BUCKETS]; sets], found: None }
    }

    /// The upper bits that the second pass looks at.
    pub fn prefixes(&self) -> Option<&[u32]> {
        self.found.as_ref().map(|(prefixes, _)| prefixes.as_slice())
    }

    /// The histograms, for a kernel to count into.
    pub fn counts(&mut self) -> &mut [Vec<u64>] {
        &mut self.counts
    }

    /// The same pass of these sets alone, with nothing counted.
    pub fn only(&self, sets: &[usize]) -> Self {
        let found = self.found.as_ref().map(|(prefixes, wanted)| {
            (sets.iter().map(|&k| prefixes[k]).collect(), sets.iter().map(|&k| wanted[k]).collect())
        });
        Self { found, ..Self::new(sets.len()) }
    }

    /// Adds what [`only`](Self::only) of these sets has counted.
    pub fn add(&mut self, sets: &[usize], other: &Self) {
        for (&k, more) in sets.iter().zip(&other.counts) {
            self.counts[k].iter_mut().zip(more).for_each(|(c, m)| *c += m);
        }
    }

    /// Counts the magnitudes of one set.
    pub fn count(&mut self, set: usize, values: &[f64]) {
        let counts = &mut self.counts[set];
        for &v in values {
            let bits = (v as f32).to_bits() & 0x7fff_ffff;
            match &self.found {
                None => counts[(bits >> 15) as usize] += 1,
                Some((prefixes, _)) if bits >> 15 == prefixes[set] => counts[(bits & 0x7fff) as usize] += 1,
                Some(_) => {}
            }
        }
    }

    /// Ends the first pass: which of the `wanted` largest is the last one shows the upper bits.
    pub fn narrow(&mut self, wanted: u64) {
        let found = self.counts.iter().map(|counts| last(counts, wanted)).unzip();
        self.counts.iter_mut().for_each(|counts| counts.fill(0));
        self.found = Some(found);
    }

    /// Ends the second pass: the magnitude of the last one wanted.
    pub fn thresholds(&self) -> Vec<f32> {
        let Some((prefixes, wanted)) = &self.found else { return Vec::new() };
        let of = |((counts, prefix), wanted): ((&Vec<u64>, &u32), &u64)| {
            f32::from_bits(prefix << 15 | last(counts, *wanted).0)
        };
        self.counts.iter().zip(prefixes).zip(wanted).map(of).collect()
    }
}

/// From the largest down, the bucket in which the last wanted one lies, and how many of it are wanted; if there are not so
/// many, the smallest, of which no number would do.
fn last(counts: &[u64], mut wanted: u64) -> (u32, u64) {
    for (bucket, &n) in counts.iter().enumerate().rev() {
        if n >= wanted {
            return (bucket as u32, wanted);
        }
        wanted -= n;
    }
    (0, u64::MAX)
}

/// What a rule must know of all layers of a file together.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileWide {
    /// Of each adapter, how large an entry must be, divided by `2^exponent`; `None` if that is no matter of the file.
    pub thresholds: Option<Vec<f32>>,
    pub exponent: i32,
    /// A sum of zero elects minus; `None` if that is no matter of the file.
    pub zero_is_minus: Option<bool>,
}

/// What a method does for [`FileWide`] with one layer, on a device that has room for it.
pub(crate) trait Survey: Sync {
    /// Counts the entries of the layer's [voters](EntryOptions::voters), which are the sets, divided by `2^exponent`; gives how
    /// many entries each of them has.
    fn count(&self, on: &Device, layer: &PlannedLayer, exponent: i32, ranking: &mut Ranking) -> Result<u64>;

    /// How many sums of what counts are above zero, less how many are below.
    fn signs(&self, on: &Device, layer: &PlannedLayer, file: &FileWide) -> Result<i64>;
}

impl FileWide {
    /// Goes through all layers as often as the rule asks for: twice to rank entries, once to count signs. What an adapter
    /// lacks are entries of zero.
    ///
    /// On the CPU many layers are looked at side by side, on a GPU, which one fills, one after the other; what is summed are
    /// whole numbers, so that their order does not count. `size`: bytes of a layer's largest buffer, and in all;
    /// `exponent`: of the largest update.
    pub fn find(
        rule: &EntryOptions,
        run: &Run<'_>,
        survey: &impl Survey,
        size: impl Fn(&PlannedLayer) -> (u64, u64),
        exponent: impl FnOnce(&Plan) -> i32,
    ) -> Result<Self> {
        let (ranks, votes) = (rule.ranks_file(), rule.majority == Some(Scope::File));
        if !ranks && !votes {
            return Ok(Self::default());
        }
        let Run { device, adapters, control, .. } = run;
        let plan = Plan::new(adapters)?;
        let all: Vec<&PlannedLayer> = plan.layers().iter().collect();
        // Where the merge will compute them, so that entries are rounded alike.
        let layers: Vec<(&PlannedLayer, Device)> = chunks(device, &all, size, |_| 0, 1)
            .into_iter()
            .flat_map(|(layers, on)| layers.into_iter().map(move |layer| (layer, on.clone())))
            .collect();
        let exponent = exponent(&plan);
        let mut file = Self { exponent, ..Self::default() };
        let total = (2 * usize::from(ranks) + usize::from(votes)) * layers.len();
        let at_once = match layers.iter().any(|(_, on)| on.is_gpu()) {
            true => 1,
            false => rayon::current_num_threads(),
        };
        let mut done = 0;
        let mut step = |i: usize| {
            done += 1;
            control.step("survey", layers.get(i).map_or("", |(layer, _)| &layer.name), done - 1, total)
        };
        if ranks {
            let sets: Vec<usize> = (0..adapters.len()).collect();
            let mut ranking = Ranking::new(adapters.len());
            for pass in 0..2 {
                let mut entries = 0;
                let begun = ranking.only(&sets);
                let task = |i: usize| {
                    let (layer, on) = &layers[i];
                    let mut part = begun.only(&rule.voters(layer));
                    Ok((survey.count(on, layer, exponent, &mut part)?, part))
                };
                in_turn(layers.len(), at_once, control, &task, |i, (count, part): (u64, Ranking)| {
                    entries += count;
                    ranking.add(&rule.voters(layers[i].0), &part);
                    step(i)
                })?;
                if pass == 0 {
                    ranking.narrow(rule.kept(entries as usize) as u64);
                }
            }
            file.thresholds = Some(ranking.thresholds());
        }
        if votes {
            let mut signs = 0;
            let task = |i: usize| survey.signs(&layers[i].1, layers[i].0, &file);
            in_turn(layers.len(), at_once, control, &task, |i, more: i64| {
                signs += more;
                step(i)
            })?;
            // Where neither has the majority, the authors' code takes what is not above zero.
            file.zero_is_minus = Some(signs <= 0);
        }
        control.finish("survey", total);
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rankings_find_the_nth_largest_of_each_set() {
        let sets = [vec![3.0, -5.0, 4.0, 0.5], vec![1e-30, -1e30, 1.0, 1.0000001]];
        let nth = |wanted: u64| {
            let mut ranking = Ranking::new(2);
            for pass in 0..2 {
                for (k, set) in sets.iter().enumerate() {
                    // In two parts, as of two layers.
                    for half in set.chunks(2) {
                        let mut part = ranking.only(&[k]);
                        part.count(0, half);
                        ranking.add(&[k], &part);
                    }
                }
                if pass == 0 {
                    ranking.narrow(wanted);
                }
            }
            ranking.thresholds()
        };
        assert_eq!(nth(1), [5.0, 1e30]);
        assert_eq!(nth(2), [4.0, 1.0000001]);
        assert_eq!(nth(4), [0.5, 1e-30]);
        // More than there are: all.
        assert_eq!(nth(5), [0.0, 0.0]);
    }
}
