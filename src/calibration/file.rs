//! Calibration files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::{Blocks, Calibration, State, Sum, Task};
use crate::io::resting_on;
use crate::io::safetensors_file::{FileDtype, SafetensorsFile, TensorOut, TensorRef, write_safetensors};
use crate::io::write_atomic;
use crate::{Error, LayerKey, Matrix, ReadAt, Result};

const KIND: &str = "loraweld.kind";
const VERSION: &str = "loraweld.version";
const POOL: &str = "loraweld.pool";
const NEUTRAL: &str = "loraweld.neutral";
/// Layers times tasks. It bounds what a file may ask for; pools are far below.
const MAX_SUMS: usize = 1 << 20;

/// A task as the metadata has it.
#[derive(Serialize, Deserialize)]
struct TaskRecord {
    name: String,
    a_sha256: String,
    layers: BTreeMap<String, LayerRecord>,
}

#[derive(Serialize, Deserialize)]
struct LayerRecord {
    /// First row of the task's block and the row after its last; equal if its adapter lacks the layer.
    rows: [usize; 2],
    tokens: u64,
}

impl Calibration {
    /// Writes the calibration as a safetensors file, whole or not at all: `<layer>.gram.<task>` and
    /// `<layer>.gram.neutral`, [R, R] in f64, for what has tokens, and the pool as JSON in the metadata. The same
    /// statistics give the same bytes. An existing file is refused unless `overwrite` is set; adapters of the pool
    /// are never overwritten.
    ///
    /// # Errors
    /// As [`flush`](Self::flush), and if the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>, overwrite: bool) -> Result<()> {
        let mut state = self.lock();
        state.flush(&self.tasks)?;
        let neutral_slot = self.tasks.len();
        let mut tasks: Vec<TaskRecord> = Vec::new();
        for task in &self.tasks {
            let (name, a_sha256) = (task.name.clone(), task.a_sha256.clone());
            tasks.push(TaskRecord { name, a_sha256, layers: BTreeMap::new() });
        }
        let mut neutral: BTreeMap<&str, u64> = BTreeMap::new();
        let mut tensors = Vec::new();
        for (key, blocks) in &self.layers {
            let sums = state.sums.get(key).map(Vec::as_slice).unwrap_or_default();
            for (i, task) in tasks.iter_mut().enumerate() {
                let tokens = sums.get(i).map_or(0, |sum| sum.tokens);
                let rows = blocks.range(i);
                if tokens > 0 || !rows.is_empty() {
                    let record = LayerRecord { rows: [rows.start, rows.end], tokens };
                    task.layers.insert(key.as_str().to_owned(), record);
                }
            }
            for (slot, sum) in sums.iter().enumerate() {
                let Some(gram) = &sum.gram else { continue };
                if slot == neutral_slot {
                    neutral.insert(key.as_str(), sum.tokens);
                }
                tensors.push(TensorOut {
                    name: tensor_name(key, slot, neutral_slot),
                    dtype: FileDtype::F64,
                    shape: vec![gram.rows, gram.cols],
                    write: Box::new(|out| gram.data.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()))),
                });
            }
        }
        let json = |value: serde_json::Result<String>| value.map_err(|e| Error::Invalid(e.to_string()));
        let metadata = BTreeMap::from([
            (KIND.to_owned(), "calibration".to_owned()),
            (VERSION.to_owned(), "1".to_owned()),
            (POOL.to_owned(), json(serde_json::to_string(&tasks))?),
            (NEUTRAL.to_owned(), json(serde_json::to_string(&neutral))?),
        ]);
        let protect: Vec<PathBuf> = self.pool_adapters().iter().map(|a| a.path().to_owned()).collect();
        write_atomic(path.as_ref(), overwrite, &protect, |out| write_safetensors(out, &metadata, tensors))
    }

    /// Reads a calibration file. It can be added to, sliced and merged with, but takes no more activations.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Tensor`], naming file and key, if it is no calibration, is of another version,
    /// or anything in it is missing, of the wrong shape, not symmetric or not finite.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(&SafetensorsFile::open(path.as_ref())?)
    }

    /// As [`open`](Self::open), of what a host has. `name` stands for the file in errors.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    pub fn from_source(name: &str, source: Arc<dyn ReadAt>) -> Result<Self> {
        Self::read(&SafetensorsFile::from_source(name, source)?)
    }

    fn read(file: &SafetensorsFile) -> Result<Self> {
        resting_on(Self::parsed(file), || file.check())
    }

    fn parsed(file: &SafetensorsFile) -> Result<Self> {
        let path = file.path();
        let get = |key: &str| file.metadata().get(key).map(String::as_str);
        if get(KIND) != Some("calibration") {
            let reason = format!(
                "is not a calibration: its metadata `{KIND}` is {:?}; make one with `loraweld calibrate`",
                get(KIND)
            );
            return Err(Error::file(path, reason));
        }
        if get(VERSION) != Some("1") {
            return Err(Error::file(
                path,
                format!("is a calibration of version {:?}; this program reads version 1", get(VERSION)),
            ));
        }
        let bad = |key: &str, e: &dyn std::fmt::Display| {
            Error::file(path, format!("its metadata `{key}` is missing or damaged: {e}"))
        };
        let records: Vec<TaskRecord> =
            serde_json::from_str(get(POOL).unwrap_or_default()).map_err(|e| bad(POOL, &e))?;
        let neutral: BTreeMap<String, u64> =
            serde_json::from_str(get(NEUTRAL).unwrap_or("{}")).map_err(|e| bad(NEUTRAL, &e))?;
        if records.is_empty() {
            return Err(bad(POOL, &"the pool is empty"));
        }
        for record in &records {
            let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
            if record.a_sha256.len() != 64 || !record.a_sha256.bytes().all(hex) {
                let text = format!("task `{}` has no SHA-256 of its adapter's A", record.name);
                return Err(bad(POOL, &text));
            }
        }

        let names: BTreeSet<&String> = records.iter().flat_map(|r| r.layers.keys()).collect();
        if names.len().saturating_mul(records.len()) > MAX_SUMS {
            let text = format!(
                "{} layers of {} tasks are more than the {MAX_SUMS} sums that are allowed",
                names.len(),
                records.len()
            );
            return Err(bad(POOL, &text));
        }
        let mut layers = BTreeMap::new();
        let mut sums = BTreeMap::new();
        let mut known = 0;
        for name in names {
            let key = LayerKey::stored(name).ok_or_else(|| {
                bad(POOL, &format!("layer `{name}` should be spelled `{}`", LayerKey::parse(name)))
            })?;
            let mut ranks = Vec::new();
            let mut end = 0;
            for record in &records {
                let [start, stop] = record.layers.get(name).map_or([end, end], |layer| layer.rows);
                if start != end || stop < start {
                    let text = format!(
                        "on layer `{name}`, the rows {start} to {stop} of task `{}` do not follow row {end}",
                        record.name
                    );
                    return Err(bad(POOL, &text));
                }
                ranks.push(stop - start);
                end = stop;
            }
            let tokens = records
                .iter()
                .map(|r| r.layers.get(name).map_or(0, |layer| layer.tokens))
                .chain([neutral.get(name).copied().unwrap_or(0)]);
            let mut slots = Vec::new();
            for (slot, tokens) in tokens.enumerate() {
                let tensor = tensor_name(&key, slot, records.len());
                let gram = match (file.tensor(&tensor), tokens) {
                    (None, 0) => None,
                    (Some(tensor), 1..) => Some(read_gram(path, &tensor, end)?),
                    (None, _) => {
                        let reason = format!("is missing, though the metadata counts {tokens} tokens for it");
                        return Err(Error::tensor(path, &tensor, reason));
                    }
                    (Some(_), 0) => {
                        return Err(Error::tensor(
                            path,
                            &tensor,
                            "is there, but the metadata counts no tokens for it",
                        ));
                    }
                };
                known += usize::from(gram.is_some());
                slots.push(Sum { gram, tokens });
            }
            sums.insert(key.clone(), slots);
            layers.insert(key, Blocks { ranks });
        }
        if known != file.tensors().count() {
            let slots = 0..=records.len();
            let expected: BTreeSet<String> = layers
                .keys()
                .flat_map(|key| slots.clone().map(move |slot| (key, slot)))
                .map(|(key, slot)| tensor_name(key, slot, records.len()))
                .collect();
            let extra = file.tensors().map(|t| t.name).find(|name| !expected.contains(*name));
            let extra = extra.unwrap_or_default();
            return Err(Error::tensor(
                path,
                extra,
                "belongs to no task and layer of the pool in the metadata",
            ));
        }
        let tasks = records.into_iter().map(|r| Task { name: r.name, a_sha256: r.a_sha256 }).collect();
        tracing::info!(file = %path.display(), layers = layers.len(), "read a calibration");
        let path = Some(path.to_owned());
        Ok(Self { tasks, layers, pool: None, path, state: Mutex::new(State { sums, resident: None }) })
    }
}

fn tensor_name(key: &LayerKey, slot: usize, neutral: usize) -> String {
    match slot == neutral {
        true => format!("{key}.gram.neutral"),
        false => format!("{key}.gram.{slot}"),
    }
}

fn read_gram(path: &Path, tensor: &TensorRef<'_>, order: usize) -> Result<Matrix> {
    let fail = |reason: String| Err(Error::tensor(path, tensor.name, reason));
    if tensor.dtype != FileDtype::F64 || tensor.shape != [order, order] {
        return fail(format!(
            "is {} {:?}; by the ranks of the pool it should be F64 [{order}, {order}]",
            tensor.dtype, tensor.shape
        ));
    }
    let gram =
        Matrix { rows: order, cols: order, data: bytemuck::pod_collect_to_vec::<u8, f64>(&tensor.bytes()?) };
    for i in 0..order {
        for j in 0..=i {
            let (x, y) = (gram[(i, j)], gram[(j, i)]);
            if !x.is_finite() || !y.is_finite() {
                return fail(format!("holds NaN or infinity at [{i}, {j}]"));
            }
            // Other writers may round the two apart.
            let size = (gram[(i, i)] * gram[(j, j)]).abs().sqrt();
            if (x - y).abs() > 1e-9 * size {
                return fail(format!("is not symmetric: [{i}, {j}] is {x}, but [{j}, {i}] is {y}"));
            }
        }
        if gram[(i, i)] < 0.0 {
            return fail(format!("is no Gram matrix: [{i}, {i}] is negative"));
        }
    }
    Ok(gram)
}
