//! Calibration: per-task Gram statistics of what the adapters of a pool see.
//!
//! For each layer that at least two adapters of the pool have (every layer of a pool of one), with `A_cat = [A_1; …; A_K]` (R × in), and for
//! each task k: `G_k = Σ (X·A_catᵀ)ᵀ(X·A_catᵀ)` (R × R, f64) over all batches of inputs X (tokens × in) that the
//! layer got while adapter k was active, and the number of tokens. Nothing else is kept: SSR's cross
//! statistics are rows of G_k (`Q[block k, :] = G_k[block k, :]`), so calibrations can be added up, and any
//! subset of the pool can be sliced out, exactly.

mod file;
mod resident;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use self::resident::Resident;
pub(crate) use self::resident::arena;
use crate::adapter::dotted;
pub use crate::compute::ops::Activations;
use crate::io::safetensors_file::{FileDtype, SafetensorsFile, TensorRef};
use crate::io::{disk, resting_on};
use crate::words::count;
use crate::{Adapter, Control, Device, Dtype, Error, Layer, LayerKey, Matrix, RawMatrix, Result};

/// Which inputs activations are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Recorded while the adapter at this place of the pool was active.
    Task(usize),
    /// Of the base model on unrelated prompts, where the merge should do nothing.
    Neutral,
}

/// An adapter of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// [`Adapter::name`], made unique.
    pub name: String,
    /// [`Adapter::a_sha256`].
    pub a_sha256: String,
}

/// What was read from activation files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileSummary {
    /// Layers that the activations served, those named by an alias among them.
    pub layers: BTreeSet<LayerKey>,
    /// Rows of all tensors that were used.
    pub tokens: u64,
    /// Layers in the files that no adapter of the pool has.
    pub unknown: Vec<String>,
}

/// Per-task Gram statistics of a pool of adapters.
///
/// Sums stay on the device while they fit in two fifths of [`Device::memory`]; methods that read them fetch them.
/// The order of batches matters only to rounding.
#[derive(Debug)]
pub struct Calibration {
    tasks: Vec<Task>,
    layers: BTreeMap<LayerKey, Blocks>,
    /// What accumulating takes; a calibration that was read from a file lacks it.
    pool: Option<Pool>,
    /// The file that it was read from.
    path: Option<PathBuf>,
    state: Mutex<State>,
}

/// Ranks of the tasks on a layer, 0 for those that lack it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Blocks {
    ranks: Vec<usize>,
}

impl Blocks {
    fn order(&self) -> usize {
        self.ranks.iter().sum()
    }
    /// Rows and columns of a task.
    fn range(&self, task: usize) -> Range<usize> {
        let start = self.ranks[..task].iter().sum();
        start..start + self.ranks[task]
    }
    /// Whether there is something to calibrate: between two adapters, or for one that is to be resized.
    fn are_shared(&self) -> bool {
        self.ranks.iter().filter(|&&rank| rank > 0).count() >= self.ranks.len().min(2)
    }
}

#[derive(Debug)]
struct Pool {
    adapters: Vec<Adapter>,
    /// Input width of every layer that any adapter has.
    widths: BTreeMap<LayerKey, usize>,
}

impl Pool {
    /// The layers that inputs of this name are of, and their widths: those that a fused module stands for, if it is one.
    fn targets(&self, key: &LayerKey) -> Vec<(LayerKey, usize)> {
        let found = |key: LayerKey| self.widths.get(&key).map(|width| (key, *width));
        match found(key.clone()) {
            Some(own) => vec![own],
            None => key.parts().filter_map(found).collect(),
        }
    }

    /// What an error calls a layer, and an adapter that has it: its dotted name, if one of them spells it so.
    fn describe(&self, key: &LayerKey) -> (String, String) {
        let found = || self.adapters.iter().filter_map(|adapter| Some((adapter, adapter.layer(key)?)));
        let dotted = found().find(|(_, layer)| layer.module.contains('.'));
        match dotted.or(found().next()) {
            Some((adapter, layer)) => (layer.name(), adapter.path().display().to_string()),
            None => (key.to_string(), "the pool".into()),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// A sum for each task and then the neutral inputs; layers that got nothing are absent.
    sums: BTreeMap<LayerKey, Vec<Sum>>,
    resident: Option<Resident>,
}

#[derive(Clone, Debug, Default)]
struct Sum {
    /// What has been fetched; more may be on the device.
    gram: Option<Matrix>,
    tokens: u64,
}

impl Sum {
    fn add(&mut self, gram: Matrix) {
        match &mut self.gram {
            None => self.gram = Some(gram),
            Some(sum) => sum.data.iter_mut().zip(&gram.data).for_each(|(s, g)| *s += g),
        }
    }
}

/// Statistics of one layer, sliced to the adapters of a merge.
pub(crate) struct LayerStatistics {
    /// For each adapter: its Gram matrix, if it has tokens there, and their number.
    pub tasks: Vec<(Option<Matrix>, u64)>,
    pub neutral: Option<Matrix>,
}

impl Calibration {
    /// An empty calibration of a pool of adapters, numbered in their order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an empty pool; [`Error::Layer`], naming both files, if adapters disagree on the
    /// width that a layer reads.
    pub fn new<'a>(adapters: impl IntoIterator<Item = &'a Adapter>) -> Result<Self> {
        let adapters: Vec<Adapter> = adapters.into_iter().cloned().collect();
        if adapters.is_empty() {
            return Err(Error::Invalid("a calibration needs at least one adapter".into()));
        }
        let mut first: BTreeMap<LayerKey, (&Layer, &Adapter)> = BTreeMap::new();
        for adapter in &adapters {
            for layer in adapter.layers() {
                let (known, other) = *first.entry(layer.key.clone()).or_insert((layer, adapter));
                if known.input != layer.input {
                    let (x, y) = (other.path().display(), adapter.path().display());
                    return Err(Error::layer(
                        dotted([known, layer].into_iter()).unwrap_or(layer).name(),
                        format!(
                            "{x} reads inputs of width {}, but {y} of width {}; are they for one base model?",
                            known.input, layer.input
                        ),
                    ));
                }
            }
        }
        let widths = first.into_iter().map(|(key, (layer, _))| (key, layer.input)).collect();
        // They are kept, and long to find.
        adapters.par_iter().for_each(|adapter| drop(adapter.a_sha256()));
        let mut tasks: Vec<Task> = Vec::new();
        for adapter in &adapters {
            let mut name = adapter.name().to_owned();
            let mut n = 2;
            while tasks.iter().any(|task| task.name == name) {
                name = format!("{} ({n})", adapter.name());
                n += 1;
            }
            tasks.push(Task { name, a_sha256: adapter.a_sha256() });
        }
        Ok(Self::of_pool(tasks, Pool { adapters, widths }, State::default()))
    }

    fn of_pool(tasks: Vec<Task>, pool: Pool, state: State) -> Self {
        let layers = pool
            .widths
            .keys()
            .map(|key| {
                let rank = |adapter: &Adapter| adapter.layer(key).map_or(0, |layer| layer.rank);
                (key.clone(), Blocks { ranks: pool.adapters.iter().map(rank).collect() })
            })
            .filter(|(_, blocks)| blocks.are_shared())
            .collect();
        Self { tasks, layers, pool: Some(pool), path: None, state: Mutex::new(state) }
    }

    /// Adds one batch of inputs (tokens × width) of `layer`, in any spelling, recorded while the adapter `task`
    /// of the pool was active. A layer that only one adapter has needs none; its inputs are checked and dropped.
    ///
    /// # Errors
    /// [`Error::Layer`] for a layer that no adapter has (with the nearest names), another width, no tokens, or
    /// NaN or infinity in a host slice; [`Error::Invalid`] for a task that there is not, or if the calibration was
    /// read from a file. After [`Error::Device`], part of the batch may have been added.
    pub fn accumulate<'x>(
        &mut self,
        device: &Device,
        task: usize,
        layer: &str,
        x: impl Into<Activations<'x>>,
    ) -> Result<()> {
        self.accumulate_all(device, Source::Task(task), &[(layer, x.into())])
    }

    /// Adds one batch of inputs that `layer` of the base model gets on unrelated prompts, where a merge should
    /// change nothing (see [`SsrOptions::neutral_weight`](crate::SsrOptions::neutral_weight)).
    ///
    /// # Errors
    /// As [`accumulate`](Self::accumulate).
    pub fn accumulate_neutral<'x>(
        &mut self,
        device: &Device,
        layer: &str,
        x: impl Into<Activations<'x>>,
    ) -> Result<()> {
        self.accumulate_all(device, Source::Neutral, &[(layer, x.into())])
    }

    /// [`accumulate`](Self::accumulate) of several layers in one call, all of one task or neutral: as many as a model keeps
    /// at once, those of a block for example. A GPU works on them side by side, which a layer alone does not fill. A layer
    /// may occur more than once.
    ///
    /// # Errors
    /// As [`accumulate`](Self::accumulate); nothing is added if any of the inputs is refused.
    pub fn accumulate_all(
        &mut self,
        device: &Device,
        source: Source,
        inputs: &[(&str, Activations<'_>)],
    ) -> Result<()> {
        let slot = self.slot(source)?;
        let mut checked = Vec::with_capacity(inputs.len());
        for (layer, x) in inputs {
            for key in self.checked(layer, x)? {
                checked.push((key, *x));
            }
        }
        match checked.is_empty() {
            false => self.add_inputs(device, slot, &checked),
            true => Ok(()),
        }
    }

    /// The key of the layer of this name, as the pool's adapters have it.
    fn key(&self, name: &str) -> LayerKey {
        let parsed = LayerKey::parse(name);
        let Ok(pool) = self.source() else { return parsed };
        let has = |key: &LayerKey| !pool.targets(key).is_empty();
        if has(&parsed) { parsed } else { LayerKey::meant(name).into_iter().find(has).unwrap_or(parsed) }
    }

    /// Whether [`accumulate`](Self::accumulate) keeps inputs of a layer of this name: several adapters of the pool have it,
    /// and the calibration was not read from a file.
    pub fn takes(&self, layer: &str) -> bool {
        let pool = self.source().ok();
        let targets = pool.map(|pool| pool.targets(&self.key(layer))).unwrap_or_default();
        targets.iter().any(|(key, _)| self.layers.contains_key(key))
    }

    /// The layers that several adapters share and that read these inputs.
    fn checked(&self, layer: &str, x: &Activations<'_>) -> Result<Vec<LayerKey>> {
        let key = self.key(layer);
        let targets = self.source()?.targets(&key);
        if targets.is_empty() {
            return Err(Error::layer(
                layer,
                format!("no adapter of the pool has it; the nearest are {}", self.nearest(&key)),
            ));
        }
        let shape = x.shape();
        if let Some((key, width)) = targets.iter().find(|(_, width)| *width != shape.cols) {
            let (name, file) = self.source()?.describe(key);
            let reason = format!("the inputs have width {}, but {file} reads {width} there", shape.cols);
            return Err(Error::layer(name, reason));
        }
        if shape.rows == 0 {
            return Err(Error::layer(layer, "a batch without tokens; at least one is needed"));
        }
        x.check("its input").map_err(|e| Error::layer(layer, e.to_string()))?;
        if let Activations::Host(matrix) = x
            && let Some(i) = matrix.first_non_finite()
        {
            let reason =
                format!("element [{}, {}] of its inputs is NaN or infinite", i / shape.cols, i % shape.cols);
            return Err(Error::layer(layer, reason));
        }
        Ok(targets.into_iter().map(|(key, _)| key).filter(|key| self.layers.contains_key(key)).collect())
    }

    /// Adds the tensors of a safetensors file: `<layer>` [tokens, width] in f32, f16 or bf16. Metadata `alias`
    /// (JSON, layer → layer) names layers that read the same inputs as a stored one. The file is mapped, and a few
    /// tensors at a time go through.
    ///
    /// # Errors
    /// [`Error::Tensor`] or [`Error::File`], naming file and key, for another shape, width or type, no tokens,
    /// NaN or infinity, or if no adapter has any of the layers; what came before it has been added then.
    /// [`Error::Cancelled`].
    pub fn accumulate_file(
        &mut self,
        device: &Device,
        source: Source,
        path: &Path,
        control: &Control<'_>,
    ) -> Result<FileSummary> {
        let mut summary = FileSummary::default();
        self.add_file(device, source, path, control, &mut summary)?;
        self.check_used(path, summary)
    }

    /// As [`accumulate_file`](Self::accumulate_file), for a file or for all `*.safetensors` of a folder, in the
    /// order of their names.
    ///
    /// # Errors
    /// As [`accumulate_file`](Self::accumulate_file), and for a folder without such files.
    pub fn accumulate_path(
        &mut self,
        device: &Device,
        source: Source,
        path: &Path,
        control: &Control<'_>,
    ) -> Result<FileSummary> {
        if !path.is_dir() {
            return self.accumulate_file(device, source, path, control);
        }
        let mut files = Vec::<PathBuf>::new();
        for file in disk::list(path).map_err(|e| Error::io(path, "list", e))? {
            if file.extension().is_some_and(|e| e == "safetensors") && file.is_file() {
                files.push(file);
            }
        }
        if files.is_empty() {
            return Err(Error::file(path, "the folder holds no `*.safetensors` file with activations"));
        }
        files.sort();
        let mut summary = FileSummary::default();
        for file in files {
            self.add_file(device, source, &file, control, &mut summary)?;
        }
        self.check_used(path, summary)
    }

    fn check_used(&self, path: &Path, summary: FileSummary) -> Result<FileSummary> {
        if !summary.layers.is_empty() {
            return Ok(summary);
        }
        Err(Error::file(
            path,
            match summary.unknown.first() {
                None => "it holds no activations".to_owned(),
                Some(name) => format!(
                    "no adapter has any of its layers, such as `{name}`; the nearest are {}",
                    self.nearest(&self.key(name))
                ),
            },
        ))
    }

    fn add_file(
        &mut self,
        device: &Device,
        source: Source,
        path: &Path,
        control: &Control<'_>,
        summary: &mut FileSummary,
    ) -> Result<()> {
        let file = SafetensorsFile::open(path)?;
        resting_on(self.add_open(device, source, &file, control, summary), || file.check())
    }

    fn add_open(
        &mut self,
        device: &Device,
        source: Source,
        file: &SafetensorsFile,
        control: &Control<'_>,
        summary: &mut FileSummary,
    ) -> Result<()> {
        let (path, slot) = (file.path(), self.slot(source)?);
        let alias = read_alias(file, |name| self.key(name))?;
        let total = file.tensors().count();
        let limit = resident::call_limit(device);
        let mut pending = Vec::new();
        let mut cost = 0;
        let mut seen = BTreeMap::new();
        for (i, tensor) in file.tensors().enumerate() {
            control.step("calibrate", tensor.name, i, total)?;
            let own = self.key(tensor.name);
            if let Some(other) = seen.insert(own.clone(), tensor.name) {
                let reason = format!("names the same layer as `{other}`; a file may hold each layer once");
                return Err(Error::tensor(path, tensor.name, reason));
            }
            if let Some(target) = alias.get(&own) {
                let reason = format!("is stored, and by the metadata `alias` also the same as `{target}`");
                return Err(Error::tensor(path, tensor.name, reason));
            }
            let others = alias.iter().filter(|(_, target)| **target == own).map(|(key, _)| key);
            let pool = self.source()?;
            let targets: BTreeMap<_, _> =
                std::iter::once(&own).chain(others).flat_map(|key| pool.targets(key)).collect();
            if targets.is_empty() {
                summary.unknown.push(tensor.name.to_owned());
                continue;
            }
            let x = Arc::new(Inputs::read(path, &tensor)?);
            for (key, width) in targets {
                if x.cols != width {
                    let (name, file) = self.source()?.describe(&key);
                    let reason = format!("has width {}, but {file} reads {width} on layer `{name}`", x.cols);
                    return Err(Error::tensor(path, tensor.name, reason));
                }
                if let Some(blocks) = self.layers.get(&key) {
                    cost += resident::call_cost(x.matrix(), blocks.order());
                    pending.push((key.clone(), x.clone()));
                }
                summary.layers.insert(key);
                if cost > limit {
                    self.add_inputs(device, slot, &host(&pending))?;
                    pending.clear();
                    cost = 0;
                }
            }
            summary.tokens += x.rows as u64;
        }
        self.add_inputs(device, slot, &host(&pending))?;
        control.finish("calibrate", total);
        tracing::info!(file = %path.display(), tensors = total, "read activations");
        Ok(())
    }

    /// Adds inputs of layers of the pool, already checked.
    fn add_inputs(
        &mut self,
        device: &Device,
        slot: usize,
        inputs: &[(LayerKey, Activations<'_>)],
    ) -> Result<()> {
        let Self { tasks, layers, pool: Some(pool), state, .. } = self else { return Ok(()) };
        let state = state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.resident.as_ref().is_some_and(|resident| !resident.is_on(device)) {
            state.flush(tasks)?;
            state.resident = None;
        }
        let State { sums, resident } = state;
        let resident = resident.get_or_insert_with(|| Resident::new(device, layers, pool));
        let added = resident.accumulate(slot, inputs, &pool.adapters, tasks, sums);
        resting_on(added, || pool.adapters.iter().try_for_each(Adapter::check_file))
    }

    /// Fetches sums that are on the device. Methods that read them do it themselves.
    ///
    /// # Errors
    /// [`Error::Layer`] if a sum is not finite, for activations overflow; [`Error::Device`].
    pub fn flush(&self) -> Result<()> {
        self.lock().flush(&self.tasks)
    }

    /// [`flush`](Self::flush), and leaves a device to others who want its memory.
    pub(crate) fn leave(&self, device: &Device) -> Result<()> {
        let mut state = self.lock();
        state.flush(&self.tasks)?;
        state.resident.take_if(|resident| device.is_gpu() && resident.is_on(device));
        Ok(())
    }

    /// Adds what another calibration of the same pool counted. Tasks are matched by the hash of their A; their
    /// order may differ.
    ///
    /// # Errors
    /// [`Error::File`] for one that was read from a file, else [`Error::Invalid`], naming the task, if the pools
    /// differ; as [`flush`](Self::flush).
    pub fn add(&mut self, other: &Self) -> Result<()> {
        if other.tasks.len() != self.tasks.len() {
            return Err(other.error(format!(
                "is a calibration of {} and cannot be added to one of {}; they must be of the same pool",
                count(other.tasks.len(), "adapter"),
                self.tasks.len()
            )));
        }
        let mut order: Vec<usize> = Vec::new();
        for task in &self.tasks {
            let found = other
                .tasks
                .iter()
                .enumerate()
                .position(|(i, t)| t.a_sha256 == task.a_sha256 && !order.contains(&i));
            let Some(found) = found else {
                return Err(other.error(format!(
                    "is of a different pool: adapter `{}` is not in it (by the hash of its A), but in the others",
                    task.name
                )));
            };
            order.push(found);
        }
        let other = other.subset(&order)?;
        if other.layers != self.layers {
            return Err(other.error("differs from the others in the layers or ranks of its pool"));
        }
        self.flush()?;
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (key, sums) in other.lock().sums.iter() {
            let mine = state.sums.entry(key.clone()).or_insert_with(|| vec![Sum::default(); sums.len()]);
            for (mine, sum) in mine.iter_mut().zip(sums) {
                mine.tokens += sum.tokens;
                if let Some(gram) = &sum.gram {
                    mine.add(gram.clone());
                }
            }
        }
        Ok(())
    }

    /// The calibration of some tasks of the pool, as if the others had never been in it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a task that there is not, or for none; as [`flush`](Self::flush).
    pub fn subset(&self, tasks: &[usize]) -> Result<Self> {
        if tasks.is_empty() {
            return Err(Error::Invalid("a subset needs at least one task".into()));
        }
        for &task in tasks {
            self.slot(Source::Task(task))?;
        }
        let layers: BTreeMap<LayerKey, Blocks> = self
            .layers
            .iter()
            .map(|(key, blocks)| {
                (key.clone(), Blocks { ranks: tasks.iter().map(|&t| blocks.ranks[t]).collect() })
            })
            .filter(|(_, blocks)| blocks.are_shared())
            .collect();
        let mut state = self.lock();
        state.flush(&self.tasks)?;
        let mut sums = BTreeMap::new();
        for key in layers.keys() {
            let Some(all) = state.sums.get(key) else { continue };
            let rows = self.layers.get(key).map(|blocks| rows(blocks, tasks)).unwrap_or_default();
            let slots = tasks.iter().copied().chain([self.tasks.len()]);
            let slice =
                |sum: &Sum| Sum { gram: sum.gram.as_ref().map(|g| sliced(g, &rows)), tokens: sum.tokens };
            sums.insert(key.clone(), slots.map(|slot| slice(&all[slot])).collect());
        }
        let state = State { sums, resident: None };
        let names: Vec<Task> = tasks.iter().map(|&task| self.tasks[task].clone()).collect();
        let Some(pool) = &self.pool else {
            return Ok(Self {
                tasks: names,
                layers,
                pool: None,
                path: self.path.clone(),
                state: Mutex::new(state),
            });
        };
        let adapters: Vec<Adapter> = tasks.iter().map(|&task| pool.adapters[task].clone()).collect();
        let widths = adapters
            .iter()
            .flat_map(|adapter| adapter.layers().iter().map(|layer| (layer.key.clone(), layer.input)))
            .collect();
        Ok(Self::of_pool(names, Pool { adapters, widths }, state))
    }

    /// The place in the pool of each of these adapters, found by the hash of its A.
    ///
    /// # Errors
    /// [`Error::File`] for a calibration that was read from a file, else [`Error::Invalid`], naming the adapter and
    /// the pool, if one is not in it.
    pub fn select(&self, adapters: &[&Adapter]) -> Result<Vec<usize>> {
        use rayon::prelude::*;
        let hashes: Vec<String> = adapters.par_iter().map(|adapter| adapter.a_sha256()).collect();
        let mut found = Vec::new();
        for (adapter, hash) in adapters.iter().zip(hashes) {
            let same = |i: &usize| self.tasks[*i].a_sha256 == hash;
            let fresh = (0..self.tasks.len()).filter(same).find(|i| !found.contains(i));
            let Some(i) = fresh.or_else(|| (0..self.tasks.len()).find(same)) else {
                let pool: Vec<_> = self
                    .tasks
                    .iter()
                    .map(|t| format!("`{}` ({})", t.name, t.a_sha256.get(..12).unwrap_or(&t.a_sha256)))
                    .collect();
                return Err(self.error(format!(
                    "was made for other adapters: `{}` ({}, by the hash of its A) is not among {}; calibrate again \
                     with it",
                    adapter.path().display(),
                    &hash[..12],
                    pool.join(", ")
                )));
            };
            found.push(i);
        }
        Ok(found)
    }

    /// The tasks, in order.
    pub fn pool(&self) -> &[Task] {
        &self.tasks
    }

    /// The layers that at least two adapters have, or those of the only one, sorted.
    pub fn layers(&self) -> impl Iterator<Item = &LayerKey> {
        self.layers.keys()
    }

    /// Tokens of a task that went by on a layer.
    pub fn tokens(&self, layer: &LayerKey, task: usize) -> u64 {
        match task < self.tasks.len() {
            true => self.slot_tokens(layer, task),
            false => 0,
        }
    }

    /// Neutral tokens that went by on a layer.
    pub fn neutral_tokens(&self, layer: &LayerKey) -> u64 {
        self.slot_tokens(layer, self.tasks.len())
    }

    /// The ranks of all tasks on a layer, 0 where one lacks it; empty if the layer is not calibrated.
    pub fn ranks(&self, layer: &LayerKey) -> &[usize] {
        self.layers.get(layer).map_or(&[], |blocks| &blocks.ranks)
    }

    /// G_k (R × R) of a task on a layer; `None` without tokens.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub fn gram(&self, layer: &LayerKey, task: usize) -> Result<Option<Matrix>> {
        match task < self.tasks.len() {
            true => self.slot_gram(layer, task),
            false => Ok(None),
        }
    }

    /// G_0 (R × R) of the neutral inputs on a layer; `None` without tokens.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub fn neutral_gram(&self, layer: &LayerKey) -> Result<Option<Matrix>> {
        self.slot_gram(layer, self.tasks.len())
    }

    /// Layers and the tasks whose adapter has them but of which no activations came: a merge can only sum there.
    pub fn missing(&self) -> Vec<(LayerKey, usize)> {
        let mut missing = Vec::new();
        for (key, blocks) in &self.layers {
            for task in (0..self.tasks.len()).filter(|&t| blocks.ranks[t] > 0) {
                if self.tokens(key, task) == 0 {
                    missing.push((key.clone(), task));
                }
            }
        }
        missing
    }

    /// Statistics of a layer for a merge of `tasks` whose result consists of the blocks of `members`, in order.
    pub(crate) fn statistics(
        &self,
        layer: &LayerKey,
        tasks: &[usize],
        members: &[usize],
    ) -> Result<LayerStatistics> {
        let mut state = self.lock();
        state.flush(&self.tasks)?;
        let nothing = || LayerStatistics { tasks: vec![(None, 0); tasks.len()], neutral: None };
        let (Some(blocks), Some(sums)) = (self.layers.get(layer), state.sums.get(layer)) else {
            return Ok(nothing());
        };
        let rows = rows(blocks, members);
        let slice = |slot: usize| sums[slot].gram.as_ref().map(|gram| sliced(gram, &rows));
        Ok(LayerStatistics {
            tasks: tasks.iter().map(|&task| (slice(task), sums[task].tokens)).collect(),
            neutral: slice(self.tasks.len()),
        })
    }

    /// The tasks' sums and then that of the neutral inputs.
    fn slot(&self, source: Source) -> Result<usize> {
        match source {
            Source::Neutral => Ok(self.tasks.len()),
            Source::Task(task) if task < self.tasks.len() => Ok(task),
            Source::Task(task) => Err(Error::Invalid(format!(
                "there is no task {task}; the pool has {}, counted from 0",
                count(self.tasks.len(), "adapter")
            ))),
        }
    }

    fn slot_tokens(&self, layer: &LayerKey, slot: usize) -> u64 {
        self.lock().sums.get(layer).map_or(0, |sums| sums[slot].tokens)
    }

    fn slot_gram(&self, layer: &LayerKey, slot: usize) -> Result<Option<Matrix>> {
        let mut state = self.lock();
        state.flush(&self.tasks)?;
        Ok(state.sums.get(layer).and_then(|sums| sums[slot].gram.clone()))
    }

    fn pool_adapters(&self) -> &[Adapter] {
        self.pool.as_ref().map_or(&[], |pool| &pool.adapters)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves sums that are whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nearest(&self, key: &LayerKey) -> String {
        // A hint is worth no more than this.
        let names = self.pool.iter().flat_map(|pool| pool.widths.keys()).take(10_000);
        let mut names: Vec<_> = names.map(|name| (distance(key.as_str(), name.as_str()), name)).collect();
        names.sort();
        names.iter().take(3).map(|(_, name)| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    }
}

impl Calibration {
    fn source(&self) -> Result<&Pool> {
        self.pool.as_ref().ok_or_else(|| {
            Error::Invalid(
                "a calibration that was read from a file takes no activations; make one of the adapters and add \
                 the two"
                    .into(),
            )
        })
    }

    /// An error about this calibration, by the name of its file.
    pub(crate) fn error(&self, reason: impl std::fmt::Display) -> Error {
        match &self.path {
            Some(path) => Error::file(path, format!("{reason}")),
            None => Error::Invalid(format!("the calibration {reason}")),
        }
    }
}

impl State {
    fn flush(&mut self, tasks: &[Task]) -> Result<()> {
        match &mut self.resident {
            Some(resident) => resident.flush(tasks, &mut self.sums),
            None => Ok(()),
        }
    }
}

/// Rows of a Gram matrix that belong to these tasks.
fn rows(blocks: &Blocks, tasks: &[usize]) -> Vec<usize> {
    tasks.iter().flat_map(|&task| blocks.range(task)).collect()
}

fn sliced(gram: &Matrix, rows: &[usize]) -> Matrix {
    Matrix::from_fn(rows.len(), rows.len(), |i, j| gram[(rows[i], rows[j])])
}

/// Layers that read what another one reads, and which.
fn read_alias(
    file: &SafetensorsFile,
    key: impl Fn(&str) -> LayerKey,
) -> Result<BTreeMap<LayerKey, LayerKey>> {
    let Some(text) = file.metadata().get("alias") else { return Ok(BTreeMap::new()) };
    let names: BTreeMap<String, String> = serde_json::from_str(text).map_err(|e| {
        Error::file(file.path(), format!("its metadata `alias` should be JSON of layer names: {e}"))
    })?;
    let names: BTreeMap<_, _> = names.iter().map(|(from, to)| (key(from), key(to))).collect();
    if let Some((from, to)) = names.iter().find(|(_, to)| names.contains_key(*to)) {
        return Err(Error::file(
            file.path(),
            format!(
                "its metadata `alias` leads `{from}` to `{to}`, which is an alias itself; name a stored layer"
            ),
        ));
    }
    Ok(names)
}

/// What a layer reads, of a file.
struct Inputs<'a> {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    bytes: Cow<'a, [u8]>,
}

/// The same as matrices.
fn host<'a>(inputs: &'a [(LayerKey, Arc<Inputs<'_>>)]) -> Vec<(LayerKey, Activations<'a>)> {
    inputs.iter().map(|(key, x)| (key.clone(), Activations::Host(x.matrix()))).collect()
}

impl<'a> Inputs<'a> {
    fn matrix(&self) -> RawMatrix<'_> {
        RawMatrix::within(self.dtype, self.rows, self.cols, &self.bytes)
    }

    /// A tensor as activations, checked.
    fn read(path: &Path, tensor: &TensorRef<'a>) -> Result<Self> {
        let fail = |reason: String| Err(Error::tensor(path, tensor.name, reason));
        let dtype = match tensor.dtype {
            FileDtype::F32 => Dtype::F32,
            FileDtype::F16 => Dtype::F16,
            FileDtype::BF16 => Dtype::Bf16,
            other => return fail(format!("is of type {other}; activations are F32, F16 or BF16")),
        };
        let &[rows, cols] = tensor.shape else {
            return fail(format!("has the shape {:?}; activations are [tokens, width]", tensor.shape));
        };
        if rows == 0 || cols == 0 {
            return fail(format!("has the shape [{rows}, {cols}]: it holds no tokens"));
        }
        let x = Self { dtype, rows, cols, bytes: tensor.bytes()? };
        match x.matrix().first_non_finite() {
            None => Ok(x),
            Some(i) => {
                let (row, col) = (i / cols, i % cols);
                fail(format!(
                    "element {i} (row {row}, column {col}) is NaN or infinite; every value must be finite"
                ))
            }
        }
    }
}

/// Levenshtein's distance of two names, as far as they are of the usual length.
fn distance(x: &str, y: &str) -> usize {
    let [x, y] = [x, y].map(|name| &name.as_bytes()[..name.len().min(128)]);
    let mut row: Vec<usize> = (0..=y.len()).collect();
    for (i, a) in x.iter().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in y.iter().enumerate() {
            let change = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[y.len()]
}
