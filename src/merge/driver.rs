//! What every method does around its own arithmetic: match, check, pass through, cut into chunks, report.

use std::collections::BTreeMap;
use std::time::Instant;

use super::{Action, LayerReport, Merged, Plan, PlannedLayer, Report};
use crate::{Control, Device, Layer, LayerKey, Result, Weighted};

/// A layer that several adapters have.
pub(super) struct Job<'a> {
    pub planned: &'a PlannedLayer,
    /// The members' layers, in order, with the factor on each: scale times strength.
    pub members: Vec<(&'a Layer, f64)>,
}

/// What a [`Job`] became.
pub(super) struct Done {
    pub layer: Layer,
    pub report: LayerReport,
}

/// Merges the layers that several adapters have with `merge`, in chunks that the device has room for, and passes the
/// others through.
///
/// `size`: bytes of a layer's largest buffer, and in all.
pub(super) fn run<'a>(
    method: &str,
    options: serde_json::Value,
    device: &Device,
    adapters: &[Weighted<'a>],
    control: &Control<'_>,
    size: impl Fn(&PlannedLayer) -> (u64, u64),
    mut merge: impl FnMut(&Device, &[Job<'_>]) -> Result<Vec<Done>>,
) -> Result<Merged> {
    let start = Instant::now();
    let plan = Plan::new(adapters)?;
    let mut inputs = super::check_inputs(adapters, control)?;
    let mut results: BTreeMap<&LayerKey, Done> = BTreeMap::new();
    let mut shared = Vec::new();
    for planned in plan.layers() {
        match super::passed_through(planned, adapters) {
            Some(layer) => {
                let report = LayerReport::new(planned, Action::PassedThrough);
                results.insert(&planned.key, Done { layer, report });
            }
            None => shared.push(planned),
        }
    }
    let (total, mut done) = (shared.len(), 0);
    let chunks = || -> Result<()> {
        for (chunk, on) in super::chunks(device, &shared, &size) {
            control.step("merge", &chunk[0].name, done, total)?;
            let jobs: Vec<Job<'_>> = chunk
                .iter()
                .map(|planned| Job { planned, members: super::members(planned, adapters) })
                .collect();
            tracing::debug!(layers = jobs.len(), gpu = on.is_gpu(), "merging a chunk");
            for (planned, mut merged) in chunk.iter().zip(merge(&on, &jobs)?) {
                if on.is_gpu() != device.is_gpu() {
                    merged.report.notes.push(TOO_LARGE.into());
                }
                results.insert(&planned.key, merged);
            }
            done += chunk.len();
        }
        Ok(())
    };
    super::hash_inputs(&mut inputs, adapters, control, chunks)?;
    control.finish("merge", total);

    let mut notes = plan.notes().to_vec();
    notes.extend(device.note().map(str::to_owned));
    let (layers, reports) = plan
        .layers()
        .iter()
        .filter_map(|planned| results.remove(&planned.key))
        .map(|done| (done.layer, done.report))
        .unzip();
    tracing::info!(method, shared = total, "merged");
    let adapter = super::finish(method, &options, &inputs, adapters, layers)?;
    Ok(Merged {
        adapter,
        report: Report {
            method: method.to_owned(),
            device: device.describe(),
            inputs,
            options,
            layers: reports,
            losses: None,
            notes,
            seconds: start.elapsed().as_secs_f64(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
    })
}

/// What is said of a layer that the device has no room for.
pub(super) const TOO_LARGE: &str = "too large for the device; computed on the CPU";
