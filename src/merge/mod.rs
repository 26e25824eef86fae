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
mod truncate;

pub use core::CoreMerge;
pub use entrywise::EntryMerge;
pub use linear::Linear;
pub use np_lora::{Directions, NpLora, NpLoraOptions, Projection};
pub use plan::{Plan, PlannedLayer};
pub use report::{Action, InputReport, LayerReport, Losses, ProjectionReport, Report};
pub use rule::{Dare, Rule, Ties};
pub use ssr::{Prior, Ridge, Ssr, SsrOptions};
pub use svd::SvdMerge;
pub use truncate::{Spectrum, Truncation};

use crate::adapter::dotted;
use crate::calibration::arena;
use crate::{Adapter, Control, Device, Layer, Matrix, Result, Weighted};

/// What a merge gives.
#[derive(Clone, Debug)]
pub struct Merged {
    /// The merged adapter. Its metadata is what is common to the inputs, and how it was made
    /// (`loraweld.method`, `loraweld.options`, `loraweld.inputs`, `loraweld.version`).
    pub adapter: Adapter,
    /// What was done, and what it lost.
    pub report: Report,
}

/// Reads all values of the inputs once, and refuses NaN and infinity. [`hash_inputs`] adds the hashes.
fn check_inputs(adapters: &[Weighted<'_>], control: &Control<'_>) -> Result<Vec<InputReport>> {
    let mut inputs = Vec::new();
    for (i, Weighted { adapter, strength }) in adapters.iter().enumerate() {
        control.step("check", adapter.name(), i, adapters.len())?;
        adapter.check_finite_with(control)?;
        inputs.push(InputReport {
            name: adapter.name().to_owned(),
            path: adapter.path().to_owned(),
            sha256: None,
            strength: *strength,
            layers: adapter.layers().len(),
        });
    }
    control.finish("check", adapters.len());
    Ok(inputs)
}

/// Hashes the inputs' files while `merge` runs.
fn hash_inputs(
    inputs: &mut [InputReport],
    adapters: &[Weighted<'_>],
    control: &Control<'_>,
    merge: impl FnOnce() -> Result<()>,
) -> Result<()> {
    rayon::in_place_scope(|scope| {
        for (input, weighted) in inputs.iter_mut().zip(adapters) {
            scope.spawn(|_| input.sha256 = weighted.adapter.file_sha256_with(control).ok());
        }
        merge()
    })?;
    // A hash that was interrupted is missing, as that of an adapter in memory is.
    control.check()
}

/// The adapter of merged layers, spelled as the first input is. Its metadata: what all inputs agree on, and how
/// it was made; nothing in it differs between two runs.
fn finish(
    method: &str,
    options: &serde_json::Value,
    inputs: &[InputReport],
    adapters: &[Weighted<'_>],
    layers: Vec<Layer>,
) -> Result<Adapter> {
    let first = adapters[0].adapter;
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
    Ok(Adapter::new("merged", first.format(), layers)?.spelled_like(first).with_metadata(metadata))
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
    let data: Vec<f32> = members.iter().flat_map(|(layer, _)| layer.a().to_vec::<f32>()).collect();
    Matrix { rows, cols: data.len() / rows, data }
}

/// `B_cat = [s_1·B_1 … s_K·B_K]`, rounded once to f32.
fn joined_b(members: &[(&Layer, f64)]) -> Matrix<f32> {
    let cols: usize = members.iter().map(|(layer, _)| layer.rank).sum();
    let mut b = Matrix::zeros(members.first().map_or(0, |(layer, _)| layer.output), cols);
    let mut start = 0;
    for (layer, scale) in members {
        let values: Vec<f64> = layer.b().to_vec();
        for (i, row) in values.chunks_exact(layer.rank).enumerate() {
            let place = i * cols + start;
            for (out, v) in b.data[place..place + layer.rank].iter_mut().zip(row) {
                *out = (v * scale) as f32;
            }
        }
        start += layer.rank;
    }
    b
}

/// The member whose spelling the merged layer takes: the first with dots, if one has.
fn template<'a>(members: &[(&'a Layer, f64)]) -> &'a Layer {
    dotted(members.iter().map(|(layer, _)| *layer)).unwrap_or(members[0].0)
}

/// A layer of the merge, at scale 1.
fn joined_layer(members: &[(&Layer, f64)], a: Matrix<f32>, b: Matrix<f32>) -> Result<Layer> {
    let template = template(members);
    if b.data.iter().any(|v| !v.is_finite()) {
        let reason = "the merged B overflows f32; are scales and strengths right?";
        return Err(crate::Error::layer(template.name(), reason));
    }
    template.replaced(a, b)
}

/// Host memory that a chunk may take on the CPU.
const HOST_CHUNK: u64 = 128 << 20;

/// Layers in groups that the device has room for, and where each group is computed: on the CPU, what is too large for the
/// device. `size`: bytes of a layer's largest buffer, and in all.
fn chunks<L: Copy>(device: &Device, layers: &[L], size: impl Fn(L) -> (u64, u64)) -> Vec<(Vec<L>, Device)> {
    let arena = arena(device);
    let limit = if device.is_gpu() { (device.memory() / 4).min(arena) } else { HOST_CHUNK };
    // Calls are cancelled between chunks. Two layers a thread keep all of them busy all the same.
    let most = if device.is_gpu() { usize::MAX } else { 2 * rayon::current_num_threads() };
    let mut chunks: Vec<(Vec<L>, Device)> = Vec::new();
    let mut used = 0;
    for &layer in layers {
        let (largest, size) = size(layer);
        let fits = !device.is_gpu() || (largest <= arena && size <= device.memory());
        match chunks.last_mut() {
            Some((chunk, on))
                if used + size <= limit && chunk.len() < most && fits && on.is_gpu() == device.is_gpu() =>
            {
                chunk.push(layer);
                used += size;
            }
            _ => {
                chunks.push((vec![layer], if fits { device.clone() } else { Device::cpu() }));
                used = size;
            }
        }
    }
    chunks
}
