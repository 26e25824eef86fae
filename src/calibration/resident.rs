//! Running sums on the device.

use std::collections::BTreeMap;

use super::{Blocks, Pool, Sum, Task};
use crate::compute::ops::{self, Activations, Axis, Factor};
use crate::compute::{Batch, Element, Shape};
use crate::power::{self, pow2};
use crate::{Adapter, Device, Error, LayerKey, Matrix, RawMatrix, Result};

/// A_cat and the running sums of groups of layers, as many as [have room](held_limit).
#[derive(Debug)]
pub(super) struct Resident {
    device: Device,
    groups: Vec<Group>,
    /// Group of each layer, and its place in it.
    places: BTreeMap<LayerKey, (usize, usize)>,
    clock: u64,
}

/// Layers whose matrices share arenas.
#[derive(Debug)]
struct Group {
    layers: Vec<(LayerKey, usize)>,
    /// The CPU, if the layer is too large for the device.
    device: Device,
    a_bytes: u64,
    /// Bytes of the sums of one task.
    sum_bytes: u64,
    a: Option<Loaded>,
    /// Sums by task; the neutral inputs come last.
    sums: BTreeMap<usize, Batch>,
    used: u64,
}

#[derive(Debug)]
struct Loaded {
    batch: Batch,
    /// For each layer, e of each row: the row is held as 2^-e times itself, so that f32 neither overflows nor
    /// underflows on tiny or huge factors.
    exponents: Vec<Vec<i32>>,
}

/// Bytes of A_cat and sums: buffers are up to a quarter larger, and as much is left for calls and for staging.
fn held_limit(device: &Device) -> u64 {
    device.memory() / 5 * 2
}

/// Bytes that one call of [`ops::accumulate`] should keep to.
pub(super) fn call_limit(device: &Device) -> u64 {
    arena(device).min(device.memory() / 8)
}

/// Bytes that inputs take in a call: themselves, what A sees of them, and partial Gram matrices.
pub(super) fn call_cost(x: RawMatrix<'_>, order: usize) -> u64 {
    (x.bytes().len() + 8 * x.rows() * order + ops::gram_bytes(x.rows(), order)) as u64
}

/// Bytes that one arena may have.
pub(crate) fn arena(device: &Device) -> u64 {
    device.capabilities().map_or(u64::MAX, |c| c.max_binding.min(c.max_buffer).min(u64::from(u32::MAX)))
}

impl Resident {
    pub fn new(device: &Device, layers: &BTreeMap<LayerKey, Blocks>, pool: &Pool) -> Self {
        let limit = call_limit(device);
        let mut groups: Vec<Group> = Vec::new();
        let mut places = BTreeMap::new();
        for (key, blocks) in layers {
            let order = blocks.order();
            let width = pool.widths.get(key).copied().unwrap_or_default();
            let a_bytes = (order * width).next_multiple_of(4) as u64 * bytes(device.factor());
            let sum_bytes = (order * order).next_multiple_of(4) as u64 * 8;
            let fits = a_bytes.max(sum_bytes) <= arena(device) && a_bytes + sum_bytes <= held_limit(device);
            let joins = |group: &&mut Group| {
                (group.a_bytes + a_bytes).max(group.sum_bytes + sum_bytes) <= limit
                    && fits
                    && group.device.is_gpu() == device.is_gpu()
            };
            match groups.last_mut().filter(joins) {
                Some(group) => {
                    group.a_bytes += a_bytes;
                    group.sum_bytes += sum_bytes;
                    group.layers.push((key.clone(), order));
                }
                _ => {
                    if !fits && device.is_gpu() {
                        tracing::warn!(layer = key.as_str(), "too large for the device; summed on the CPU");
                    }
                    groups.push(Group {
                        layers: vec![(key.clone(), order)],
                        device: if fits { device.clone() } else { Device::cpu() },
                        a_bytes,
                        sum_bytes,
                        a: None,
                        sums: BTreeMap::new(),
                        used: 0,
                    })
                }
            }
            places.insert(key.clone(), (groups.len() - 1, groups[groups.len() - 1].layers.len() - 1));
        }
        Self { device: device.clone(), groups, places, clock: 0 }
    }

    pub fn is_on(&self, device: &Device) -> bool {
        let same = match (self.device.gpu(), device.gpu()) {
            (Ok(x), Ok(y)) => std::sync::Arc::ptr_eq(x, y),
            (x, y) => x.is_err() && y.is_err(),
        };
        same && self.device.precision() == device.precision() && self.device.memory() == device.memory()
    }

    pub fn accumulate(
        &mut self,
        slot: usize,
        inputs: &[(LayerKey, Activations<'_>)],
        adapters: &[Adapter],
        tasks: &[Task],
        host: &mut BTreeMap<LayerKey, Vec<Sum>>,
    ) -> Result<()> {
        let mut calls: BTreeMap<usize, Vec<(usize, Activations<'_>)>> = BTreeMap::new();
        for (key, x) in inputs {
            let Some(&(group, place)) = self.places.get(key) else { continue };
            calls.entry(group).or_default().push((place, *x));
        }
        // Before anything is added.
        for (index, call) in &calls {
            let group = &self.groups[*index];
            let in_buffer = call.iter().find(|(_, x)| matches!(x, Activations::Buffer { .. }));
            if let Some((place, _)) = in_buffer.filter(|_| !group.device.is_gpu() && self.device.is_gpu()) {
                let reason = format!(
                    "its statistics take {} MiB of device memory, of which {} may be kept; allow more, or give its inputs \
                     on the host, where the CPU can sum them",
                    (group.a_bytes + group.sum_bytes).div_ceil(1 << 20),
                    held_limit(&self.device) >> 20
                );
                return Err(Error::layer(group.layers[*place].0.as_str(), reason));
            }
        }
        for (index, call) in calls {
            self.make_room(index, slot, tasks, host)?;
            self.clock += 1;
            let group = &mut self.groups[index];
            group.used = self.clock;
            let Group { layers, device, a, sums, .. } = group;
            let a = match a {
                Some(a) => a,
                None => a.insert(load(device, layers, adapters)?),
            };
            let sum = match sums.entry(slot) {
                std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::btree_map::Entry::Vacant(entry) => {
                    let shapes: Vec<_> = layers.iter().map(|(_, order)| Shape::new(*order, *order)).collect();
                    entry.insert(Batch::zeros(device, device.sum(), &shapes)?)
                }
            };
            ops::accumulate(device, &call, &a.batch, sum)?;
            for (place, x) in call {
                let sums = host.entry(layers[place].0.clone());
                sums.or_insert_with(|| vec![Sum::default(); tasks.len() + 1])[slot].tokens +=
                    x.shape().rows as u64;
            }
        }
        Ok(())
    }

    /// Evicts what was used longest ago until the sums of a task fit beside the rest.
    fn make_room(
        &mut self,
        index: usize,
        slot: usize,
        tasks: &[Task],
        host: &mut BTreeMap<LayerKey, Vec<Sum>>,
    ) -> Result<()> {
        loop {
            let held: u64 = self.groups.iter().map(Group::held).sum();
            let group = &self.groups[index];
            let more = if group.a.is_none() { group.a_bytes } else { 0 }
                + if group.sums.contains_key(&slot) { 0 } else { group.sum_bytes };
            if held + more <= held_limit(&self.device) {
                return Ok(());
            }
            let others = (0..self.groups.len()).filter(|&i| i != index && self.groups[i].held() > 0);
            if let Some(oldest) = others.min_by_key(|&i| self.groups[i].used) {
                self.groups[oldest].flush(None, tasks, host)?;
                self.groups[oldest].a = None;
            } else if self.groups[index].sums.keys().any(|&s| s != slot) {
                self.groups[index].flush(Some(slot), tasks, host)?;
            } else {
                return Ok(());
            }
        }
    }

    /// Adds everything to the sums on the host.
    pub fn flush(&mut self, tasks: &[Task], host: &mut BTreeMap<LayerKey, Vec<Sum>>) -> Result<()> {
        self.groups.iter_mut().try_for_each(|group| group.flush(None, tasks, host))
    }
}

impl Group {
    fn held(&self) -> u64 {
        let a = if self.a.is_some() { self.a_bytes } else { 0 };
        a + self.sum_bytes * self.sums.len() as u64
    }

    /// Adds sums to those on the host and drops them here, except those of one task.
    fn flush(
        &mut self,
        keep: Option<usize>,
        tasks: &[Task],
        host: &mut BTreeMap<LayerKey, Vec<Sum>>,
    ) -> Result<()> {
        let Some(a) = &self.a else { return Ok(()) };
        let slots: Vec<usize> = self.sums.keys().copied().filter(|&slot| Some(slot) != keep).collect();
        for slot in slots {
            let Some(batch) = self.sums.get(&slot) else { continue };
            // The calibration is locked.
            let grams = batch.download_alone(&self.device)?;
            // Checked before anything is taken over, so that every later reader fails as well.
            for ((key, _), gram) in self.layers.iter().zip(&grams) {
                if gram.data.iter().any(|v| !v.is_finite()) {
                    let task = tasks.get(slot).map_or("the neutral inputs", |task| &task.name);
                    return Err(Error::layer(
                        key.as_str(),
                        format!(
                            "the sums of `{task}` are not finite: its activations overflow {}; are they right? \
                             (precision `f64` or the CPU have more range)",
                            if self.device.is_gpu() { "f32" } else { "f64" }
                        ),
                    ));
                }
            }
            for (((key, _), mut gram), exponents) in self.layers.iter().zip(grams).zip(&a.exponents) {
                // Other layers of the group may have got no inputs of this task.
                let Some(sums) = host.get_mut(key).filter(|sums| sums[slot].tokens > 0) else { continue };
                unscale(&mut gram, exponents);
                sums[slot].add(gram);
            }
            self.sums.remove(&slot);
        }
        Ok(())
    }
}

/// `G_ij · 2^(e_i + e_j)`, exactly.
fn unscale(gram: &mut Matrix, exponents: &[i32]) {
    for i in 0..gram.rows {
        for j in 0..gram.cols {
            gram[(i, j)] *= pow2(exponents[i] + exponents[j]);
        }
    }
}

fn load(device: &Device, layers: &[(LayerKey, usize)], adapters: &[Adapter]) -> Result<Loaded> {
    let mut exponents = Vec::new();
    let mut jobs: Vec<Vec<Factor<'_>>> = Vec::new();
    for (key, _) in layers {
        let (mut rows, mut factors) = (Vec::new(), Vec::new());
        for adapter in adapters {
            let Some(layer) = adapter.layer(key) else { continue };
            let e = power::exponent(layer.a()).ok_or_else(|| {
                let path = adapter.path().display();
                Error::layer(key.as_str(), format!("A of {path} holds NaN or infinity"))
            })?;
            rows.extend(std::iter::repeat_n(e, layer.rank));
            factors.push(Factor { matrix: layer.a(), scale: pow2(-e) as f32 });
        }
        exponents.push(rows);
        jobs.push(factors);
    }
    let jobs: Vec<&[Factor<'_>]> = jobs.iter().map(Vec::as_slice).collect();
    Ok(Loaded { batch: ops::rank_concat(device, Axis::Rows, &jobs)?, exponents })
}

fn bytes(element: Element) -> u64 {
    if element == Element::F32 { 4 } else { 8 }
}
