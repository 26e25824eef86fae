//! What every method does around its own arithmetic: match, check, pass through, cut into chunks, write, report.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use web_time::Instant;

use super::chunks::{IN_FLIGHT, chunks, in_turn, room};
use super::measure::{Answers, Squares};
use super::truncate::{self, Cut, Cuts, Truncations};
use crate::adapter::{Draft, Output, save_while, stacked_rank};
use crate::io::blamed;
use crate::merge::members::{joined, members, passed_through, template};
use crate::merge::{
    Action, DeviceMemory, InputReport, LayerReport, Merged, Plan, PlannedLayer, Report, SingularValues,
    Truncation, VERIFIED, factored,
};
use crate::{Adapter, Control, Device, Layer, LayerKey, Result, SaveOptions, Weighted, WriteAt};

/// Where a merge goes while it is computed.
#[derive(Clone, Copy)]
pub struct Destination<'a> {
    /// The file to write, or the name of what is written to `sink`.
    pub path: &'a Path,
    /// What a host has instead of a file.
    pub sink: Option<&'a dyn WriteAt>,
    /// How it is written.
    pub options: &'a SaveOptions,
    /// What every layer is truncated to, as by [`Merged::truncated_for`] these options.
    pub truncation: Truncation,
}

/// A method of merging.
pub trait Method: Sync {
    /// Checks its options for a merge of so many adapters, which a merge does as well.
    ///
    /// # Errors
    /// As a merge: [`Error::Invalid`](crate::Error::Invalid) for values out of range.
    fn check(&self, adapters: usize) -> Result<()> {
        let _ = adapters;
        Ok(())
    }

    /// How far its updates may be off what the CPU finds in f64, relative, on any device in `auto` arithmetic.
    fn bound(&self) -> f64 {
        VERIFIED
    }

    /// Merges, into memory or into a file.
    #[doc(hidden)]
    fn run(&self, run: &Run<'_>) -> Result<Merged>;

    /// Merges, as the method's `merge_with` does.
    ///
    /// # Errors
    /// As of the method's `merge_with`.
    fn merge_any(&self, device: &Device, adapters: &[Weighted<'_>], control: Control<'_>) -> Result<Merged> {
        self.run(&Run::new(device, adapters, control))
    }

    /// Merges into a file, while it computes: the same file as of [`Merged::adapter`], truncated and saved, but with only
    /// a few layers at a time in memory. It is there when it is whole, or not at all.
    ///
    /// # Errors
    /// As of the method's `merge_with`, [`Merged::truncated`] and [`Adapter::save`](crate::Adapter::save).
    fn merge_into(
        &self,
        device: &Device,
        adapters: &[Weighted<'_>],
        to: &Destination<'_>,
        control: Control<'_>,
    ) -> Result<Report> {
        let run =
            Run { output: Some(to), truncation: to.truncation.into(), ..Run::new(device, adapters, control) };
        Ok(self.run(&run)?.report)
    }
}

/// A merge that is asked for.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub(crate) device: &'a Device,
    pub(crate) adapters: &'a [Weighted<'a>],
    pub(crate) control: Control<'a>,
    pub(crate) truncation: Truncations,
    pub(crate) output: Option<&'a Destination<'a>>,
    pub(crate) only: Option<Only<'a>>,
    pub(crate) start: Instant,
}

/// Some layers of a merge.
#[derive(Clone, Copy)]
pub(crate) struct Only<'a> {
    /// Which.
    pub layers: &'a BTreeSet<&'a LayerKey>,
    /// How the merge is written, on which depends what is truncated as one.
    pub options: &'a SaveOptions,
}

impl<'a> Run<'a> {
    /// Into memory. Time and device memory count from here on, so that what a method looks at first is in its report.
    pub(crate) fn new(device: &'a Device, adapters: &'a [Weighted<'a>], control: Control<'a>) -> Self {
        device.reset_memory_peak();
        Self {
            device,
            adapters,
            control,
            truncation: Truncations::default(),
            output: None,
            only: None,
            start: Instant::now(),
        }
    }
}

/// Merges layers on a device that has room for them.
pub(crate) type MergeJobs<'a> = dyn Fn(&Device, &[Job<'_>]) -> Result<Vec<Done>> + Sync + 'a;

/// What a method is, to the driver.
pub(crate) struct Spec<'a> {
    pub method: &'a str,
    pub options: serde_json::Value,
    /// Bytes of a layer's largest buffer, and in all.
    pub size: &'a (dyn Fn(&PlannedLayer) -> (u64, u64) + Sync),
    /// The highest rank that the result may have.
    pub rank: &'a (dyn Fn(&PlannedLayer) -> usize + Sync),
    /// Merges layers that several adapters have, and those of one with `alone`.
    pub merge: &'a MergeJobs<'a>,
    /// Whether layers of one adapter are merged, too; else they pass through.
    pub alone: bool,
    /// Whether the result is the plain sum, which is truncated without being formed.
    pub is_sum: bool,
    /// What the user should know about the whole merge, beside what the driver says.
    pub notes: &'a (dyn Fn(&Report) -> Vec<String> + Sync),
}

/// A layer, and what it is made of.
pub(crate) struct Job<'a> {
    pub planned: &'a PlannedLayer,
    /// The members' layers, in order, with the factor on each: scale times strength.
    pub members: Vec<(&'a Layer, f64)>,
}

impl Job<'_> {
    /// The layer whose spelling the result takes.
    pub fn template(&self) -> &Layer {
        template(&self.members)
    }
}

/// What a [`Job`] became.
pub(crate) struct Done {
    pub layer: Layer,
    pub report: LayerReport,
    /// What it loses, of a method that has measured that.
    pub squares: Option<Squares>,
    /// Who feeds whom, where it was routed by a calibration.
    pub answers: Option<Answers>,
}

impl Done {
    /// Of a layer whose losses are not known.
    pub fn new(layer: Layer, report: LayerReport) -> Self {
        Self { layer, report, squares: None, answers: None }
    }
}

/// What is left of a [`Done`] once it is written, or all of it.
struct Kept {
    layer: Option<Layer>,
    report: LayerReport,
    squares: Option<Squares>,
    answers: Option<Answers>,
    cut: Option<Cut>,
}

impl From<Done> for Kept {
    fn from(Done { layer, report, squares, answers }: Done) -> Self {
        Self { layer: Some(layer), report, squares, answers, cut: None }
    }
}

/// Merges the layers that several adapters have, in chunks that the device has room for, and passes the others through.
pub(crate) fn run(run: &Run<'_>, spec: &Spec<'_>) -> Result<Merged> {
    blamed(merged(run, spec), || run.adapters.iter().try_for_each(|of| of.adapter.check_file()))
}

fn merged(run: &Run<'_>, spec: &Spec<'_>) -> Result<Merged> {
    run.truncation.check()?;
    let plan = Plan::new(run.adapters)?;
    let inputs: Vec<_> = run.adapters.iter().map(InputReport::new).collect();
    let finish = |inputs: &[InputReport], layers| {
        let first = run.adapters[0].adapter;
        let metadata = metadata(run, spec, inputs)?;
        Ok(Adapter::new("merged", first.format(), layers)?.spelled_like(first).with_metadata(metadata))
    };
    let mut merging = Merging { run, spec, plan: &plan, groups: HashMap::new(), spent: Spent::default() };
    let options = run.output.map(|to| to.options).or(run.only.map(|only| only.options));
    let options = options.cloned().unwrap_or_default();
    let mut notes = plan.notes().to_vec();
    {
        let skeleton = finish(&inputs, plan.layers().iter().map(|l| merging.planned(l)).collect())?;
        notes.extend(kept_names(&skeleton, &options));
        if !run.truncation.is_none() {
            let whole = |group: &Vec<LayerKey>| truncates(group, run);
            let groups = skeleton.fused(&options).into_iter().filter(whole).enumerate();
            let members = groups
                .flat_map(|(i, group)| group.into_iter().enumerate().map(move |(n, k)| (k, (i + 1, n))));
            merging.groups = members.collect();
        }
    }
    let (adapter, inputs, kept) = match run.output {
        None => {
            let (inputs, mut kept) = merging.all(inputs, None)?;
            let layers = kept.iter_mut().filter_map(|kept| kept.layer.take()).collect();
            (finish(&inputs, layers)?, inputs, kept)
        }
        Some(&Destination { path, sink, options, .. }) => {
            // Hashes are as long as what stands for them.
            let mut before = inputs.clone();
            for (input, weighted) in before.iter_mut().zip(run.adapters) {
                input.sha256 = weighted.adapter.has_file().then(|| "0".repeat(64));
            }
            let skeleton = finish(&before, plan.layers().iter().map(|l| merging.planned(l)).collect())?;
            let (inputs, kept) =
                save_while(&skeleton, Output { path, sink }, options, &run.control, |draft| {
                    let (inputs, kept) = merging.all(inputs, Some(draft))?;
                    let metadata = metadata(run, spec, &inputs)?;
                    Ok(((inputs, kept), metadata))
                })?;
            (skeleton, inputs, kept)
        }
    };

    notes.extend(run.device.note().map(str::to_owned));
    let (mut cuts, mut losses, mut answers) = (Cuts::default(), Squares::default(), Answers::default());
    // In order of the plan, whichever layer was done first: sums do not depend on that.
    let mut layers = Vec::with_capacity(kept.len());
    for Kept { mut report, squares, answers: of_layer, cut, .. } in kept {
        answers.extend(of_layer);
        if let Some(cut) = cut {
            cuts.add(&report.layer, &cut);
        }
        if let Some(squares) = squares {
            losses.add(&squares);
            report.losses = squares.relative();
        }
        layers.push(report);
    }
    let mut losses = losses.relative();
    // Of a truncated merge, other losses would have to be found.
    if let Some(note) = cuts.note(layers.len()) {
        notes.push(note);
        losses = None;
        layers.iter_mut().for_each(|layer| layer.losses = None);
    }
    let memory = DeviceMemory::of(run.device);
    notes.extend(memory.and_then(DeviceMemory::note));
    let mut report = Report {
        method: spec.method.to_owned(),
        device: run.device.describe(),
        inputs,
        options: spec.options.clone(),
        layers,
        losses,
        tasks: Vec::new(),
        routing: answers.routing(),
        notes,
        memory,
        seconds: run.start.elapsed().as_secs_f64(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let notes = (spec.notes)(&report);
    report.notes.extend(notes);
    let readbacks = run.device.readbacks();
    tracing::info!(
        method = spec.method,
        layers = report.layers.len(),
        seconds = report.seconds,
        readbacks,
        "merged"
    );
    merging.spent.log();
    Ok(Merged { adapter, report })
}

/// The same layers, which keep nothing of what they read for longer than they live themselves.
fn unread(members: Vec<(&Layer, f64)>) -> Vec<(Layer, f64)> {
    members.into_iter().map(|(layer, scale)| (layer.unread(), scale)).collect()
}

/// Whether a truncation may take something of a fused module: not, if one adapter alone has it and its rank is low enough.
fn truncates(group: &[LayerKey], run: &Run<'_>) -> bool {
    let mut having = run.adapters.iter().filter(|w| group.iter().any(|key| w.adapter.layer(key).is_some()));
    let (Some(one), None) = (having.next(), having.next()) else { return true };
    let layers: Vec<[(&Layer, f64); 1]> = group
        .iter()
        .filter_map(|key| one.adapter.layer(key))
        .map(|layer| [(layer, layer.scale.value)])
        .collect();
    let parts: Vec<&[(&Layer, f64)]> = layers.iter().map(|part| &part[..]).collect();
    run.truncation.may_cut(|| stacked_rank(&parts))
}

/// What is said of layers that have no known name in the output's spelling.
fn kept_names(merged: &Adapter, options: &SaveOptions) -> Option<String> {
    let unnamed = merged.unnamed(options);
    let (first, reason) = unnamed.first()?;
    let format = options.format.unwrap_or(merged.format());
    Some(match unnamed.len() {
        1 => format!("`{first}` keeps its name: no other is known in {format}, since it {reason}"),
        n => format!(
            "{n} layers keep their names, since no others are known in {format}: `{first}`, which {reason}"
        ),
    })
}

/// What is said of a layer that the device has no room for.
pub(crate) const TOO_LARGE: &str = "too large for the device; computed on the CPU";

struct Merging<'a> {
    run: &'a Run<'a>,
    spec: &'a Spec<'a>,
    plan: &'a Plan,
    /// The modules that the output fuses and a truncation takes as one: of each of their layers the module's number,
    /// from 1, and which part it is.
    groups: HashMap<LayerKey, (usize, usize)>,
    spent: Spent,
}

impl Merging<'_> {
    /// Hashes the inputs and merges every layer, which goes to `draft` or is kept. In order of the plan.
    fn all(
        &self,
        mut inputs: Vec<InputReport>,
        draft: Option<&Draft<'_>>,
    ) -> Result<(Vec<InputReport>, Vec<Kept>)> {
        let Run { device, adapters, control, .. } = self.run;
        let mut units = self.units();
        if let Some(only) = self.run.only {
            units.retain(|unit| unit.iter().any(|(_, planned)| only.layers.contains(&planned.key)));
        }
        // What comes first in the file is computed first: the file's hash, which is found meanwhile, need not wait for it.
        if let Some(draft) = draft {
            units.sort_by_cached_key(|unit| unit.iter().filter_map(|(_, l)| draft.start(&l.key)).min());
        }
        let units: Vec<&[(usize, &PlannedLayer)]> = units.iter().map(Vec::as_slice).collect();
        let host = |unit: &[(usize, &PlannedLayer)]| {
            let rank = |l| self.rank(l).min(self.run.truncation.rank());
            unit.iter().map(|(_, l)| 4 * (rank(l) * (l.input + l.output)) as u64).sum()
        };
        let unit_size = |unit: &[(usize, &PlannedLayer)]| self.unit_size(unit);
        let chunks: Vec<(Vec<(usize, &PlannedLayer)>, Device)> = chunks(device, &units, unit_size, host, 1)
            .into_iter()
            .map(|(units, on)| (units.concat(), on))
            .collect();
        let mut results = BTreeMap::new();
        let total = self.plan.layers().len();
        let at_once = match device.is_gpu() {
            false => rayon::current_num_threads(),
            // A layer that takes more than a chunk's room has the device to itself.
            true if units.iter().any(|unit| self.unit_size(unit).1 > room(device)) => 1,
            true => IN_FLIGHT,
        };
        let task = |i: usize| {
            let (layers, on) = &chunks[i];
            let planned: Vec<&PlannedLayer> = layers.iter().map(|(_, planned)| *planned).collect();
            self.chunk(on, &planned, draft)
        };
        let name = |i: usize| chunks[i].0.first().map_or("", |(_, planned)| planned.name.as_str());
        rayon::in_place_scope(|scope| {
            scope.spawn(|_| device.prepare_algebra());
            let hashed = if self.run.only.is_none() { *adapters } else { &[] };
            for (input, weighted) in inputs.iter_mut().zip(hashed) {
                scope.spawn(|_| {
                    let hash = || weighted.adapter.file_sha256_with(control).ok();
                    input.sha256 = self.spent.time(&self.spent.hash, hash);
                });
            }
            in_turn(chunks.len(), at_once, control, &task, |i, kept: Vec<Kept>| {
                control.step("merge", name(i), results.len(), total)?;
                results.extend(chunks[i].0.iter().map(|(place, _)| *place).zip(kept));
                Ok(())
            })
        })?;
        // A hash that was interrupted is missing, as that of an adapter in memory is.
        control.check()?;
        adapters.iter().try_for_each(|weighted| weighted.adapter.check_file())?;
        control.finish("merge", total);
        Ok((inputs, results.into_values().collect()))
    }

    /// The layers of the plan, those that are truncated as one together.
    fn units(&self) -> Vec<Vec<(usize, &PlannedLayer)>> {
        self.grouped(self.plan.layers().iter().enumerate(), |(_, planned)| &planned.key)
    }

    /// Puts together what belongs to layers that are truncated as one, in the order in which they begin.
    fn grouped<'k, T>(&self, all: impl Iterator<Item = T>, key: impl Fn(&T) -> &'k LayerKey) -> Vec<Vec<T>> {
        let mut units: Vec<Vec<T>> = Vec::new();
        let mut places: HashMap<usize, usize> = HashMap::new();
        for one in all {
            let place = match self.groups.get(key(&one)) {
                None => units.len(),
                Some((group, _)) => *places.entry(*group).or_insert(units.len()),
            };
            if place == units.len() {
                units.push(Vec::new());
            }
            units[place].push(one);
        }
        units
    }

    /// Bytes of the largest buffer of layers that are computed together, and in all.
    fn unit_size(&self, unit: &[(usize, &PlannedLayer)]) -> (u64, u64) {
        let sizes = unit.iter().map(|(_, planned)| self.size(planned));
        let (mut largest, mut all) = sizes.fold((0, 0), |(l, a), (largest, size)| (l.max(largest), a + size));
        if let [(_, first), _, ..] = unit {
            let sum = |of: &dyn Fn(&PlannedLayer) -> usize| unit.iter().map(|(_, l)| of(l)).sum::<usize>();
            let (rank, output) = (sum(&|l| self.rank(l)), sum(&|l| l.output));
            let stacked = factored::size(self.run.device, rank, first.input, output);
            (largest, all) = (largest.max(stacked.0), all.max(stacked.1));
        }
        (largest, all)
    }

    /// Bytes of a layer's largest buffer, and in all.
    fn size(&self, planned: &PlannedLayer) -> (u64, u64) {
        let (truncated, merged) = (self.is_truncated(planned), self.is_merged(planned));
        let mut size =
            if merged && !(truncated && self.spec.is_sum) { (self.spec.size)(planned) } else { (0, 0) };
        if truncated {
            let PlannedLayer { rank, input, output, .. } = *planned;
            let (largest, all) = factored::size(self.run.device, rank, input, output);
            size = (size.0.max(largest), size.1.max(all));
        }
        size
    }

    /// The rank before truncation.
    fn rank(&self, planned: &PlannedLayer) -> usize {
        if self.is_merged(planned) { (self.spec.rank)(planned) } else { planned.rank }
    }

    /// Whether the method has anything to do. An update of zero has nothing to merge.
    fn is_merged(&self, planned: &PlannedLayer) -> bool {
        let is_zero = || members(planned, self.run.adapters).iter().all(|(_, scale)| *scale == 0.0);
        planned.members.len() > 1 || (self.spec.alone && !is_zero())
    }

    /// Whether a rank is low enough shows without its singular values; what a spectrum asks for does not.
    fn is_truncated(&self, planned: &PlannedLayer) -> bool {
        // What is fused may have a higher rank than each of its parts.
        let fused = self.groups.contains_key(&planned.key);
        self.run.truncation.may_cut(|| if fused { usize::MAX } else { self.rank(planned) })
    }

    /// The layer that is to be written, or a place for it.
    fn planned(&self, planned: &PlannedLayer) -> Layer {
        let passed = passed_through(planned, self.run.adapters);
        match passed.filter(|_| !self.is_merged(planned) && !self.is_truncated(planned)) {
            Some(layer) => layer,
            None => {
                let members = members(planned, self.run.adapters);
                let most = self.run.truncation.rank();
                let group = self.groups.get(&planned.key).map_or(0, |(group, _)| *group);
                template(&members).planned(self.rank(planned).min(most), group)
            }
        }
    }

    /// Checks, merges, truncates and writes layers.
    fn chunk(&self, on: &Device, planned: &[&PlannedLayer], draft: Option<&Draft<'_>>) -> Result<Vec<Kept>> {
        let Self { run, spec, spent, .. } = self;
        run.control.check()?;
        // What is read of these layers goes with them.
        let own: Vec<_> = planned.iter().map(|planned| unread(members(planned, run.adapters))).collect();
        spent.time(&spent.check, || self.check(planned, &own))?;
        let job = |i: usize| Job {
            planned: planned[i],
            members: own[i].iter().map(|(layer, scale)| (layer, *scale)).collect(),
        };
        let jobs: Vec<Job<'_>> = (0..planned.len()).map(job).collect();
        tracing::trace!(layers = jobs.len(), gpu = on.is_gpu(), "merging a chunk");
        let mut kept: Vec<Option<Kept>> = jobs.iter().map(|_| None).collect();
        let (sums, merged): (Vec<usize>, Vec<usize>) = (0..jobs.len())
            .partition(|&i| !self.is_merged(planned[i]) || (spec.is_sum && self.is_truncated(planned[i])));
        let chosen: Vec<Job<'_>> = merged.iter().map(|&i| job(i)).collect();
        if !chosen.is_empty() {
            let done = spent.time(&spent.merge, || (spec.merge)(on, &chosen))?;
            for (i, done) in merged.into_iter().zip(done) {
                kept[i] = Some(done.into());
            }
        }
        let places: Vec<usize> = (0..jobs.len()).filter(|&i| self.is_truncated(planned[i])).collect();
        if !places.is_empty() {
            let update = |i: usize| match kept[i].as_ref().and_then(|kept| kept.layer.as_ref()) {
                Some(layer) => truncate::Update::of(layer),
                None => truncate::Update { template: jobs[i].template(), members: jobs[i].members.clone() },
            };
            let mut together = self.grouped(places.into_iter(), |&i| &planned[i].key);
            let part = |i: &usize| self.groups.get(&planned[*i].key).map(|(_, part)| *part);
            together.iter_mut().for_each(|unit| unit.sort_by_key(part));
            let units: Vec<truncate::Unit<'_>> = together
                .iter()
                .map(|unit| truncate::Unit { parts: unit.iter().map(|&i| update(i)).collect(), metric: None })
                .collect();
            let all = spent.time(&spent.truncate, || {
                truncate::truncated_units(on, &units, &vec![run.truncation; units.len()])
            })?;
            for (unit, truncated) in together.iter().zip(all) {
                let spectrum = SingularValues { values: truncated.values, kept: truncated.kept };
                for (n, (&i, layer)) in unit.iter().zip(truncated.layers).enumerate() {
                    let action =
                        if jobs[i].members.len() > 1 { Action::Concatenated } else { Action::PassedThrough };
                    let kept = kept[i].get_or_insert_with(|| {
                        Done::new(layer.clone(), LayerReport::new(planned[i], action)).into()
                    });
                    kept.report.rank = layer.rank;
                    kept.report.cut = Some(truncated.cut.share());
                    kept.report.spectrum = Some(spectrum.clone());
                    kept.layer = Some(layer);
                    // A module is counted once.
                    kept.cut = (n == 0).then_some(truncated.cut);
                }
            }
        }
        // What keeps its rank stays as it is.
        for i in sums.into_iter() {
            if kept[i].is_some() {
                continue;
            }
            let (layer, action) = match passed_through(planned[i], run.adapters) {
                Some(layer) => (layer, Action::PassedThrough),
                None => (joined(&jobs[i].members)?, Action::Concatenated),
            };
            kept[i] = Some(Done::new(layer, LayerReport::new(planned[i], action)).into());
        }
        let mut kept: Vec<Kept> = kept.into_iter().flatten().collect();
        if on.is_gpu() != run.device.is_gpu() {
            kept.iter_mut().for_each(|kept| kept.report.notes.push(TOO_LARGE.into()));
        }
        if let Some(draft) = draft {
            spent.time(&spent.write, || draft.put_all(kept.iter_mut().filter_map(|k| k.layer.take())))?;
        }
        Ok(kept)
    }

    /// Refuses NaN and infinity in what any adapter has of these layers. `own`: the members', which keep what is read.
    fn check(&self, planned: &[&PlannedLayer], own: &[Vec<(Layer, f64)>]) -> Result<()> {
        use rayon::prelude::*;
        let adapter = |i: usize| self.run.adapters[i].adapter;
        planned.par_iter().zip(own).try_for_each(|(planned, own)| {
            let mut members = planned.members.iter().zip(own);
            members.try_for_each(|(&i, (layer, _))| adapter(i).check_layer(layer))?;
            planned.silent.iter().try_for_each(|&i| match adapter(i).layer(&planned.key) {
                Some(layer) => adapter(i).check_layer(&layer.unread()),
                None => Ok(()),
            })
        })
    }
}

/// Where time goes, in nanoseconds of all threads that wait for it.
#[derive(Default)]
struct Spent {
    hash: AtomicU64,
    check: AtomicU64,
    merge: AtomicU64,
    truncate: AtomicU64,
    write: AtomicU64,
}

impl Spent {
    fn time<T>(&self, on: &AtomicU64, call: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = call();
        on.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    fn log(&self) {
        let seconds = |of: &AtomicU64| of.load(Ordering::Relaxed) as f64 * 1e-9;
        tracing::debug!(
            hash = seconds(&self.hash),
            check = seconds(&self.check),
            merge = seconds(&self.merge),
            truncate = seconds(&self.truncate),
            write = seconds(&self.write),
            "seconds, of all threads together"
        );
    }
}

/// What all inputs agree on, and how the merge was made; nothing in it differs between two runs.
fn metadata(run: &Run<'_>, spec: &Spec<'_>, inputs: &[InputReport]) -> Result<BTreeMap<String, String>> {
    let mut metadata = Adapter::common_metadata(run.adapters.iter().map(|weighted| weighted.adapter));
    let inputs: Vec<_> = inputs
        .iter()
        .map(|i| serde_json::json!({ "name": i.name, "sha256": i.sha256, "strength": i.strength }))
        .collect();
    metadata.extend([
        ("loraweld.method".to_owned(), spec.method.to_owned()),
        ("loraweld.options".to_owned(), spec.options.to_string()),
        ("loraweld.inputs".to_owned(), serde_json::Value::from(inputs).to_string()),
        ("loraweld.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    run.truncation.record(&mut metadata)?;
    Ok(metadata)
}
