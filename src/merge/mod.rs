//! Merging: the plan (which layers, which adapters), one file a method, the loss, the report.
//!
//! A method takes adapters at strengths ([`Adapter::at`]) and gives a [`Merged`]: an ordinary LoRA and a
//! [`Report`] on what each layer lost.

mod core;
mod driver;
mod entrywise;
mod linear;
mod loss;
mod np_lora;
mod plan;
mod report;
mod rule;
mod ssr;
mod svd;
mod trim;
mod truncate;

use std::collections::BTreeMap;

pub use core::{Bases, CoreMerge};
pub use driver::{Destination, Method, Run};
pub use entrywise::EntryMerge;
pub use linear::Linear;
pub use np_lora::{Directions, NpLora, NpLoraOptions, Projection};
pub use plan::{Plan, PlannedLayer};
pub use report::{Action, DeviceMemory, InputReport, LayerReport, Losses, ProjectionReport, Report};
pub use rule::{Alone, Dare, Elect, Iso, IsoMean, Keep, Rule, Scope, Ties, Tsv, ZeroSum};
pub use ssr::{Prior, Ridge, Ssr, SsrOptions};
pub use svd::SvdMerge;
pub use truncate::{Spectrum, Truncation};

use crate::adapter::dotted;
use crate::calibration::arena;
use crate::{Adapter, Device, Layer, Matrix, Result, Weighted};

/// What a merge gives.
#[derive(Clone, Debug)]
pub struct Merged {
    /// The merged adapter. Its metadata is what is common to the inputs, and how it was made
    /// (`loraweld.method`, `loraweld.options`, `loraweld.inputs`, `loraweld.version`).
    pub adapter: Adapter,
    /// What was done, and what it lost.
    pub report: Report,
}

impl InputReport {
    /// Before its hash is known.
    fn new(Weighted { adapter, strength }: &Weighted<'_>) -> Self {
        Self {
            name: adapter.name().to_owned(),
            path: adapter.path().to_owned(),
            sha256: None,
            strength: *strength,
            layers: adapter.layers().len(),
        }
    }
}

/// The adapter of merged layers, spelled as the first input is.
fn finish(
    method: &str,
    options: &serde_json::Value,
    truncation: &Truncation,
    inputs: &[InputReport],
    adapters: &[Weighted<'_>],
    layers: Vec<Layer>,
) -> Result<Adapter> {
    let first = adapters[0].adapter;
    let metadata = metadata(method, options, truncation, inputs, adapters)?;
    Ok(Adapter::new("merged", first.format(), layers)?.spelled_like(first).with_metadata(metadata))
}

/// What all inputs agree on, and how the merge was made; nothing in it differs between two runs.
fn metadata(
    method: &str,
    options: &serde_json::Value,
    truncation: &Truncation,
    inputs: &[InputReport],
    adapters: &[Weighted<'_>],
) -> Result<BTreeMap<String, String>> {
    let mut metadata = Adapter::common_metadata(adapters.iter().map(|weighted| weighted.adapter));
    let inputs: Vec<_> = inputs
        .iter()
        .map(|i| serde_json::json!({ "name": i.name, "sha256": i.sha256, "strength": i.strength }))
        .collect();
    metadata.extend([
        ("loraweld.method".to_owned(), method.to_owned()),
        ("loraweld.options".to_owned(), options.to_string()),
        ("loraweld.inputs".to_owned(), serde_json::Value::from(inputs).to_string()),
        ("loraweld.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    if !truncation.is_none() {
        metadata.insert("loraweld.truncation".to_owned(), truncation.json()?);
    }
    Ok(metadata)
}

/// The members' layers, in order, with the factor on each: scale times strength.
fn members<'a>(planned: &PlannedLayer, adapters: &[Weighted<'a>]) -> Vec<(&'a Layer, f64)> {
    let of = |&i: &usize| {
        let layer = adapters[i].adapter.layer(&planned.key)?;
        Some((layer, layer.scale.value * adapters[i].strength))
    };
    planned.members.iter().filter_map(of).collect()
}

/// The only member, at its strength, its tensors unchanged.
fn passed_through(planned: &PlannedLayer, adapters: &[Weighted<'_>]) -> Option<Layer> {
    let [(layer, scale)] = members(planned, adapters)[..] else { return None };
    // At strength 1 the layer's own alpha is kept.
    Some(if scale == layer.scale.value { layer.clone() } else { layer.with_scale(scale) })
}

/// The members' rows of A_cat.
fn blocks(members: &[(&Layer, f64)]) -> Vec<std::ops::Range<usize>> {
    let mut end = 0;
    let block = |(layer, _): &(&Layer, f64)| {
        end += layer.rank;
        end - layer.rank..end
    };
    members.iter().map(block).collect()
}

/// `A_cat = [A_1; …; A_K]`, exactly.
fn joined_a(members: &[(&Layer, f64)]) -> Matrix<f32> {
    let rows = members.iter().map(|(layer, _)| layer.rank).sum();
    let cols = members.first().map_or(0, |(layer, _)| layer.input);
    let mut data = Vec::with_capacity(rows * cols);
    members.iter().for_each(|(layer, _)| layer.a().append_to(&mut data));
    Matrix { rows, cols, data }
}

/// `B_cat = [s_1·B_1 … s_K·B_K]`, rounded once to f32.
fn joined_b(members: &[(&Layer, f64)]) -> Matrix<f32> {
    let rows = members.first().map_or(0, |(layer, _)| layer.output);
    let cols = members.iter().map(|(layer, _)| layer.rank).sum();
    let parts: Vec<_> = members.iter().map(|(layer, scale)| (layer.b(), *scale)).collect();
    let mut data = Vec::with_capacity(rows * cols);
    for i in 0..rows {
        for (part, scale) in &parts {
            let start = data.len();
            part.row_range(i, i + 1).append_to(&mut data);
            if *scale != 1.0 {
                data[start..].iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
            }
        }
    }
    Matrix { rows, cols, data }
}

/// Looks at many values at a time, without an early way out.
fn all_finite(values: &[f32]) -> bool {
    values.chunks(1 << 12).all(|block| block.iter().fold(true, |good, v| good & v.is_finite()))
}

/// The member whose spelling the merged layer takes: the first with dots, if one has.
fn template<'a>(members: &[(&'a Layer, f64)]) -> &'a Layer {
    // Where no inventory has the name, only a file tells where its dots are.
    let first = members[0].0;
    if first.is_known() { first } else { dotted(members.iter().map(|(layer, _)| *layer)).unwrap_or(first) }
}

/// The sum of the members, exact but for rounding B once to f32.
fn joined(members: &[(&Layer, f64)]) -> Result<Layer> {
    joined_layer(members, joined_a(members), joined_b(members))
}

/// A layer of the merge, at scale 1.
fn joined_layer(members: &[(&Layer, f64)], a: Matrix<f32>, b: Matrix<f32>) -> Result<Layer> {
    let template = template(members);
    if !all_finite(&b.data) {
        let reason = "the merged B overflows f32; are scales and strengths right?";
        return Err(crate::Error::layer(template.name(), reason));
    }
    template.replaced(a, b)
}

/// Bytes of the factors, as f32, that one chunk leaves on the host before they are written; as many stay in memory as are in flight.
const HOST_CHUNK: u64 = 112 << 20;

/// Device memory for a layer that has the device to itself: a quarter is left for what uploads and downloads are staged in,
/// and buffers from the pool are up to a quarter larger than was asked for.
fn whole_room(device: &Device) -> u64 {
    device.memory() / 5 * 3
}

/// Device memory for one chunk of those [in flight](driver::IN_FLIGHT).
fn room(device: &Device) -> u64 {
    whole_room(device) / driver::IN_FLIGHT as u64
}

/// Layers in groups of which the device has room for [those in flight](driver), and where each group is computed: on the CPU, what is
/// too large for the device. There, a group is of `at_once` layers.
///
/// `size`: bytes of a layer's largest buffer, and in all; `host`: bytes of its factors.
fn chunks<L: Copy>(
    device: &Device,
    layers: &[L],
    size: impl Fn(L) -> (u64, u64),
    host: impl Fn(L) -> u64,
    at_once: usize,
) -> Vec<(Vec<L>, Device)> {
    let arena = arena(device);
    let limit = room(device).min(arena);
    let most = if device.is_gpu() { usize::MAX } else { at_once };
    let mut chunks: Vec<(Vec<L>, Device)> = Vec::new();
    let (mut used, mut held) = (0, 0);
    for &layer in layers {
        let ((largest, size), host) = (size(layer), host(layer));
        let fits = !device.is_gpu() || (largest <= arena && size <= whole_room(device));
        match chunks.last_mut() {
            Some((chunk, on))
                if used + size <= limit
                    && held + host <= HOST_CHUNK
                    && chunk.len() < most
                    && fits
                    && on.is_gpu() == device.is_gpu() =>
            {
                chunk.push(layer);
                used += size;
                held += host;
            }
            _ => {
                chunks.push((vec![layer], if fits { device.clone() } else { Device::cpu() }));
                (used, held) = (size, host);
            }
        }
    }
    chunks
}
