//! What TIES finds out before it merges entries: how large they must be, and what a sum of zero elects; in one layer or in
//! all.

use super::rule::{EntryOptions, Scope, Voter};
use crate::compute::ops::{BUCKETS, Check, Counted, EntryMerger, EntryRule, Window};
use crate::merge::engine::chunks::{chunks, in_turn};
use crate::merge::engine::driver::Run;
use crate::merge::{Plan, PlannedLayer};
use crate::power::pow2;
use crate::{Device, Result};

/// Looks for the n-th largest magnitude of a set, exactly: window after window, by what of the set lies in each bucket and
/// above, until a bucket is one magnitude.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search {
    /// n.
    wanted: u64,
    window: Window,
    found: Option<f32>,
}

/// How many bits of a magnitude the window of a guess leaves out, so that what it misses by may be an eighth.
const GUESSED: u32 = 5;

impl Search {
    /// For the largest so many of a set of this size.
    pub fn new(wanted: u64, size: u64) -> Self {
        // Whatever there is reaches 0, and nothing infinity.
        let found = if wanted == 0 { Some(f32::INFINITY) } else { (wanted >= size).then_some(0.0) };
        Self { wanted, window: Window::ALL, found }
    }

    /// What is to be counted next; `None` once it is found.
    pub fn window(&self) -> Option<Window> {
        self.found.is_none().then_some(self.window)
    }

    /// The magnitude that was found.
    pub fn found(&self) -> Option<f32> {
        self.found
    }

    /// Looks next at where the magnitude should be by what was counted in a window of [all](Window::ALL), of a sample.
    pub fn guess(&mut self, sample: &Counted, size: u64) {
        let counted: u64 = sample.buckets.iter().sum();
        if counted == 0 {
            return;
        }
        let wanted = (self.wanted as f64 * counted as f64 / size as f64).round() as u64;
        if let Some(bucket) = last(sample, wanted.clamp(1, counted)) {
            let middle = (bucket as u32) << Window::ALL.shift;
            let half = ((BUCKETS / 2) as u32) << GUESSED;
            self.window = Window { base: middle.saturating_sub(half), shift: GUESSED };
        }
    }

    /// Goes on with what the window has of the whole set.
    pub fn narrow(&mut self, counted: &Counted) {
        let Window { base, shift } = self.window;
        let inside = self.wanted.checked_sub(counted.above).filter(|wanted| *wanted > 0);
        match inside.and_then(|_| last(counted, self.wanted)) {
            Some(bucket) if shift == 0 => self.found = Some(f32::from_bits(base + bucket as u32)),
            Some(bucket) => self.window = Window { base: base + ((bucket as u32) << shift), shift: 0 },
            // There are fewer.
            None if self.window == Window::ALL => self.found = Some(0.0),
            // The guess was wrong.
            None => self.window = Window::ALL,
        }
    }
}

/// From the largest down, the bucket in which the last wanted one lies.
fn last(counted: &Counted, wanted: u64) -> Option<usize> {
    let mut passed = counted.above;
    counted.buckets.iter().rposition(|&n| {
        passed += n;
        passed >= wanted
    })
}

/// Sets the thresholds of layers so that each member of one keeps its so many largest entries, and what is as large as the last.
fn trim(device: &Device, merger: &mut EntryMerger, wanted: &[usize], check: Check<'_>) -> Result<()> {
    let size = |merger: &EntryMerger, i: usize| merger.shape(i).len() as u64;
    let of = |(i, rule): (usize, &EntryRule)| {
        vec![Search::new(wanted[i] as u64, size(merger, i)); rule.members.len()]
    };
    let mut searches: Vec<Vec<Search>> = merger.rules().iter().enumerate().map(of).collect();
    // Of large layers a few tiles show where to look: counting everything everywhere is what costs a GPU most.
    let is_sampled = |i: usize| device.is_gpu() && size(merger, i) >= SAMPLED;
    let windows = |searches: &[Vec<Search>], wanted: &dyn Fn(usize) -> bool| -> Vec<Vec<Option<Window>>> {
        let of = |(i, searches): (usize, &Vec<Search>)| {
            searches.iter().map(|search| search.window().filter(|_| wanted(i))).collect()
        };
        searches.iter().enumerate().map(of).collect()
    };
    let sampled = windows(&searches, &is_sampled);
    if sampled.iter().flatten().any(Option::is_some) {
        let counted = merger.magnitudes_of(device, &sampled, ONE_OF, check)?;
        for (i, (searches, counted)) in searches.iter_mut().zip(counted).enumerate() {
            for (search, counted) in searches.iter_mut().zip(counted) {
                counted.into_iter().for_each(|counted| search.guess(&counted, size(merger, i)));
            }
        }
    }
    while searches.iter().flatten().any(|search| search.window().is_some()) {
        let counted = merger.magnitudes(device, &windows(&searches, &|_| true), check)?;
        for (search, counted) in searches.iter_mut().flatten().zip(counted.into_iter().flatten()) {
            counted.into_iter().for_each(|counted| search.narrow(&counted));
        }
    }
    for (rule, searches) in merger.rules_mut().zip(searches) {
        for (member, search) in rule.members.iter_mut().zip(searches) {
            member.threshold = search.found().unwrap_or(0.0);
        }
    }
    Ok(())
}

/// Entries from which on a layer is sampled first, and of how many tiles one is looked at.
const SAMPLED: u64 = 1 << 22;
const ONE_OF: u32 = 16;

/// A layer before it is known what counts of its updates.
pub(crate) struct Unsettled<'a> {
    pub voters: &'a [Voter<'a>],
    /// Of how many entries of each update a share is kept.
    pub entries: usize,
    /// Updates are divided by `2^exponent`.
    pub exponent: i32,
}

impl EntryOptions {
    /// Settles thresholds and what a sum of zero elects.
    pub fn settle(
        &self,
        device: &Device,
        merger: &mut EntryMerger,
        layers: &[Unsettled<'_>],
        file: &FileWide,
        check: Check<'_>,
    ) -> Result<()> {
        match (&file.thresholds, self.trim) {
            (Some(thresholds), _) => {
                for (rule, layer) in merger.rules_mut().zip(layers) {
                    let size = pow2(file.exponent - layer.exponent);
                    for (member, voter) in rule.members.iter_mut().zip(layer.voters) {
                        member.threshold = (f64::from(thresholds[voter.adapter]) * size) as f32;
                    }
                }
            }
            (None, Some(_)) => {
                let wanted: Vec<usize> = layers.iter().map(|layer| self.kept(layer.entries)).collect();
                trim(device, merger, &wanted, check)?;
            }
            (None, None) => {}
        }
        if self.majority == Some(Scope::Layer) {
            let tallies = merger.tallies(device, check)?;
            merger.rules_mut().zip(tallies).for_each(|(rule, tally)| rule.zero_is_minus = tally.signs <= 0);
        } else {
            merger.rules_mut().for_each(|rule| rule.zero_is_minus = file.zero_is_minus.unwrap_or(false));
        }
        Ok(())
    }
}

/// The magnitudes of several sets, whose parts are counted one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Ranking {
    windows: Vec<Option<Window>>,
    counted: Vec<Counted>,
}

impl Ranking {
    /// With nothing counted in these windows.
    pub fn new(windows: Vec<Option<Window>>) -> Self {
        let counted = vec![Counted::new(); windows.len()];
        Self { windows, counted }
    }

    /// The same windows of these sets alone, with nothing counted.
    pub fn only(&self, sets: &[usize]) -> Self {
        Self::new(sets.iter().map(|&k| self.windows[k]).collect())
    }

    /// Adds what was counted of a set elsewhere.
    fn add(&mut self, set: usize, counted: &Counted) {
        self.counted[set].add(counted);
    }

    /// Adds what [`only`](Self::only) of these sets has counted.
    pub fn add_all(&mut self, sets: &[usize], other: &Self) {
        sets.iter().zip(&other.counted).for_each(|(&k, counted)| self.add(k, counted));
    }

    /// Counts the magnitudes of layers with these voters, each in the set of its adapter.
    pub fn count_layers(
        &mut self,
        device: &Device,
        merger: &EntryMerger,
        voters: &[Vec<Voter<'_>>],
        check: Check<'_>,
    ) -> Result<()> {
        let windows =
            |voters: &Vec<Voter<'_>>| voters.iter().map(|voter| self.windows[voter.adapter]).collect();
        let windows: Vec<Vec<Option<Window>>> = voters.iter().map(windows).collect();
        let counted = merger.magnitudes(device, &windows, check)?;
        for (voter, counted) in voters.iter().flatten().zip(counted.into_iter().flatten()) {
            counted.into_iter().for_each(|counted| self.add(voter.adapter, &counted));
        }
        Ok(())
    }

    /// Counts the magnitudes of one set.
    pub fn count(&mut self, set: usize, values: &[f64]) {
        if let Some(window) = self.windows[set] {
            values.iter().for_each(|&v| self.counted[set].count(window, v));
        }
    }
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

/// What a method does for [`FileWide`] with some layers, on a device that has room for them.
pub(crate) trait Survey: Sync {
    /// Counts the entries of the layers, divided by `2^exponent`: those of the [voters](EntryOptions::voters) of each are in the
    /// sets of these adapters. Gives how many entries each of them has.
    fn count(
        &self,
        on: &Device,
        layers: &[&PlannedLayer],
        exponent: i32,
        ranking: &mut Ranking,
    ) -> Result<u64>;

    /// How many sums of what counts are above zero, less how many are below.
    fn signs(&self, on: &Device, layers: &[&PlannedLayer], file: &FileWide) -> Result<i64>;
}

impl FileWide {
    /// Goes through all layers as often as the rule asks for: twice to rank entries, once to count signs. What an adapter
    /// lacks are entries of zero.
    ///
    /// On the CPU many layers are looked at side by side, on a GPU, which a chunk fills, chunk after chunk; what is summed are
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
        let chunks = chunks(device, &all, size, |_| 0, 1);
        let exponent = exponent(&plan);
        let mut file = Self { exponent, ..Self::default() };
        let total = (2 * usize::from(ranks) + usize::from(votes)) * all.len();
        let at_once = match chunks.iter().any(|(_, on)| on.is_gpu()) {
            true => 1,
            false => rayon::current_num_threads(),
        };
        let mut done = 0;
        let mut step = |i: usize| {
            let layers = &chunks[i].0;
            let before = done;
            done += layers.len();
            control.step("survey", layers.first().map_or("", |layer| &layer.name), before, total)
        };
        if ranks {
            // How many there are shows at the end of the first pass.
            let mut searches = vec![Search::new(1, u64::MAX); adapters.len()];
            for pass in 0..2 {
                let mut ranking = Ranking::new(searches.iter().map(Search::window).collect());
                let (mut entries, begun) = (0, ranking.clone());
                let sets: Vec<usize> = (0..adapters.len()).collect();
                let task = |i: usize| {
                    let (layers, on) = &chunks[i];
                    let mut part = begun.only(&sets);
                    Ok((survey.count(on, layers, exponent, &mut part)?, part))
                };
                in_turn(chunks.len(), at_once, control, &task, |i, (count, part): (u64, Ranking)| {
                    entries += count;
                    ranking.add_all(&sets, &part);
                    step(i)
                })?;
                if pass == 0 {
                    searches.fill(Search::new(rule.kept(entries as usize) as u64, u64::MAX));
                }
                searches
                    .iter_mut()
                    .zip(&ranking.counted)
                    .for_each(|(search, counted)| search.narrow(counted));
            }
            // What an adapter lacks is zero, and so is the last one of too few.
            file.thresholds = Some(searches.iter().map(|search| search.found().unwrap_or(0.0)).collect());
        }
        if votes {
            let mut signs = 0;
            let task = |i: usize| survey.signs(&chunks[i].1, &chunks[i].0, &file);
            in_turn(chunks.len(), at_once, control, &task, |i, more: i64| {
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
    use crate::Matrix;
    use crate::compute::ops::EntryMember;
    use crate::compute::{Batch, DeviceOptions, Select};

    /// The n-th largest of the values, each pass in two parts, as of two layers.
    fn nth(values: &[f64], wanted: u64, sample: Option<&[f64]>) -> f32 {
        let size = values.len() as u64;
        let mut search = Search::new(wanted, size);
        if let Some(sample) = sample {
            let mut ranking = Ranking::new(vec![Some(Window::ALL)]);
            ranking.count(0, sample);
            search.guess(&ranking.counted[0], size);
        }
        while let Some(window) = search.window() {
            let mut ranking = Ranking::new(vec![None, Some(window)]);
            for half in values.chunks(values.len().div_ceil(2)) {
                let mut part = ranking.only(&[1]);
                part.count(0, half);
                ranking.add_all(&[1], &part);
            }
            search.narrow(&ranking.counted[1]);
        }
        search.found().unwrap()
    }

    #[test]
    fn searches_find_the_nth_largest() {
        let sets = [[3.0, -5.0, 4.0, 0.5], [1e-30, -1e30, 1.0, 1.0000001]];
        let of = |wanted| sets.map(|set| nth(&set, wanted, None));
        assert_eq!(of(1), [5.0, 1e30]);
        assert_eq!(of(2), [4.0, 1.0000001]);
        // All of them, and more than there are.
        assert_eq!((of(4), of(5)), ([0.0; 2], [0.0; 2]));
        assert_eq!(of(0), [f32::INFINITY; 2]);
    }

    #[test]
    fn a_guess_changes_nothing_that_is_found() {
        // Many are equal, many zero, and one is far away; a sample that is right, one that is wrong, and one of nothing.
        let mut values: Vec<f64> = (0..500).map(|i| f64::from(i % 37) * 1e-3 - 0.012).collect();
        values.extend([0.0; 300]);
        values.push(1e9);
        let mut sorted: Vec<f32> = values.iter().map(|v| v.abs() as f32).collect();
        sorted.sort_by(|x, y| y.total_cmp(x));
        let samples: [&[f64]; 4] = [&values, &values[..100], &[7.0, 8.0, 1e-20], &[]];
        for wanted in [1, 2, 17, 400, 500, 501, 502, 800] {
            for sample in samples {
                assert_eq!(nth(&values, wanted as u64, Some(sample)), sorted[wanted - 1], "{wanted}");
            }
        }
    }

    /// Of a layer so large that it is sampled first, and of a small one beside it.
    #[test]
    fn thresholds_are_those_of_the_entries_that_the_device_makes() {
        let gpu = DeviceOptions { select: Select::Gpu, ..Default::default() };
        for device in [Ok(Device::cpu()), Device::open(&gpu)].into_iter().flatten() {
            // Some rows are far larger than others, some are zero, and many entries are equal.
            let row = |i: usize| if i.is_multiple_of(5) { 0.0 } else { f64::from(1 << (i % 11)) * 1e-3 };
            let b = Matrix::from_fn(33, 4, |i, k| row(i) * ((i * 7 + k * 3) % 11) as f64);
            let a = |cols| Matrix::from_fn(4, cols, |k, j| ((j * 31 + k * 17) % 101) as f64 - 50.0);
            let [a, small] = [a(1 << 17), a(70)];
            let member = |k: usize| EntryMember {
                a: 2 * k,
                b: 2 * k,
                rank: 2,
                scale: 1.1,
                threshold: 0.0,
                key: [0; 2],
                weight: 1.0,
            };
            let rule = |members| EntryRule {
                members,
                chance: u32::MAX,
                elect: false,
                zero_is_minus: false,
                scale: 1.0,
            };
            let upload = |matrices: &[Matrix]| Batch::upload(&device, device.factor(), matrices).unwrap();
            let merger = |members: Vec<EntryMember>| {
                let b = [b.clone(), b.clone()];
                EntryMerger::new(upload(&[a.clone(), small.clone()]), upload(&b), vec![rule(members); 2])
                    .unwrap()
            };
            let go_on: Check<'_> = &|| Ok(());
            let sorted: Vec<Vec<Vec<f32>>> = (0..2)
                .map(|k| {
                    let (whole, _) = merger(vec![member(k)]).whole(&device, go_on).unwrap();
                    let sorted = |m: Matrix| {
                        let mut sorted: Vec<f32> = m.data.iter().map(|v| v.abs() as f32).collect();
                        sorted.sort_by(|x, y| y.total_cmp(x));
                        sorted
                    };
                    whole.download(&device).unwrap().into_iter().map(sorted).collect()
                })
                .collect();
            let sizes = [0, 1].map(|i: usize| sorted[0][i].len());
            assert!(sizes[0] as u64 >= SAMPLED && (sizes[1] as u64) < SAMPLED);
            // Few, a common share, what only reaches zeros, all.
            for share in [1e-9, 1e-5, 0.01, 0.2, 0.5, 0.79, 0.85, 1.0] {
                let wanted = sizes.map(|n| ((n as f64 * share) as usize).max(1));
                let mut merger = merger(vec![member(0), member(1)]);
                trim(&device, &mut merger, &wanted, go_on).unwrap();
                for (i, rule) in merger.rules().iter().enumerate() {
                    for (k, member) in rule.members.iter().enumerate() {
                        // Whatever is kept counts: 0 stands for all.
                        let all = wanted[i] == sizes[i];
                        let want = if all { 0.0 } else { sorted[k][i][wanted[i] - 1] };
                        assert_eq!(member.threshold, want, "{}: {share}, {i}, {k}", device.describe());
                    }
                }
            }
        }
    }
}
