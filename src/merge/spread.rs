//! Singular value calibration (arXiv 2602.05536): what several adapters say together, a sum says too loudly.

use rayon::prelude::*;
use web_time::Instant;

use super::algebra::{outer, svds};
use super::engine::chunks::chunks;
use super::factored::{Factored, size};
use super::members::members;
use super::{Merged, Plan};
use crate::words::count;
use crate::{Adapter, Control, Device, Layer, Matrix, Result, Weighted};

impl Merged {
    /// Divides each singular value of each layer by how much louder the merge speaks there than the adapters do.
    ///
    /// Of a merge `W = Σ σ_r·u_r·v_rᵀ` of updates ΔW_k,
    ///
    /// ```text
    /// σ_r ← σ_r / mean_k max(1, ⟨u_rᵀ·W, u_rᵀ·ΔW_k⟩ / ‖u_rᵀ·ΔW_k‖²)
    /// ```
    ///
    /// where an adapter that says nothing along u_r counts as 1. It needs no data. It helps sums, in which adapters that
    /// agree add up; what was solved for the inputs (SSR) it makes worse. Updates are compared in orthonormal bases of
    /// their factors, and never formed. Layers of one adapter stay as they are.
    ///
    /// `adapters`: those of the merge, at the same strengths. The report's losses are dropped, since they were those of the
    /// merge before.
    ///
    /// # Errors
    /// As [`Plan::new`]; [`Error::Layer`](crate::Error::Layer) if singular values cannot be found or a factor overflows f32;
    /// [`Error::Device`](crate::Error::Device); [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn singular_values_calibrated(
        mut self,
        device: &Device,
        adapters: &[Weighted<'_>],
        control: &Control<'_>,
    ) -> Result<Self> {
        let start = Instant::now();
        let plan = Plan::new(adapters)?;
        let mut layers = self.adapter.layers().to_vec();
        let place = |key| layers.binary_search_by(|layer: &Layer| layer.key.cmp(key)).ok();
        let shared: Vec<(usize, usize)> = (0..plan.layers().len())
            .filter(|&i| plan.layers()[i].members.len() > 1)
            .filter_map(|i| Some((i, place(&plan.layers()[i].key)?)))
            .collect();
        let room = |(i, at): (usize, usize)| {
            let planned = &plan.layers()[i];
            size(device, planned.rank + layers[at].rank, planned.input, planned.output)
        };
        let (mut done, mut quietest) = (0, 1.0f64);
        let mut changed: Vec<(usize, Layer)> = Vec::new();
        for (chunk, on) in chunks(device, &shared, room, |_| 0, 2 * rayon::current_num_threads()) {
            control.step("calibrate-singular-values", &layers[chunk[0].1].name(), done, shared.len())?;
            done += chunk.len();
            // The merge first, and then what it is made of.
            let parts: Vec<Vec<(&Layer, f64)>> = chunk
                .iter()
                .map(|&(i, at)| {
                    let merged = std::iter::once((&layers[at], layers[at].scale.value));
                    merged.chain(members(&plan.layers()[i], adapters)).collect()
                })
                .collect();
            let slices: Vec<&[(&Layer, f64)]> = parts.iter().map(Vec::as_slice).collect();
            let factored = Factored::new(&on, &slices)?;
            let merged: Vec<Matrix> = factored.cores.iter().map(|cores| cores[0].clone()).collect();
            let svds = svds(&on, &merged, |k| layers[chunk[k].1].name())?;
            let calibrated: Vec<(Matrix, f64)> = svds
                .par_iter()
                .zip(&factored.cores)
                .map(|(svd, cores)| {
                    let factors: Vec<f64> = (0..svd.values.len())
                        .map(|r| loudness(svd.left.row(r), svd.right.row(r), svd.values[r], &cores[1..]))
                        .collect();
                    let values: Vec<f64> = svd.values.iter().zip(&factors).map(|(v, f)| v / f).collect();
                    let least = factors.iter().fold(1.0, |least, f| f64::min(least, 1.0 / f));
                    (outer(&svd.left, &svd.right, &values), least)
                })
                .collect();
            let templates: Vec<&Layer> = chunk.iter().map(|(_, at)| &layers[*at]).collect();
            let cores: Vec<Matrix> = calibrated.iter().map(|(core, _)| core.clone()).collect();
            // A lower value may fall behind another, but none is added.
            let ranks: Vec<usize> = templates.iter().map(|layer| layer.rank).collect();
            let kept = |k: usize, values: &[f64]| super::algebra::directions(values).clamp(1, ranks[k]);
            let lifted = factored.lifted(&on, &templates, &cores, kept)?;
            quietest = calibrated.iter().fold(quietest, |least, (_, f)| least.min(*f));
            changed.extend(chunk.iter().zip(lifted).map(|((_, at), lifted)| (*at, lifted.layer)));
        }
        control.finish("calibrate-singular-values", shared.len());
        for (at, layer) in changed {
            self.report.layers[at].rank = layer.rank;
            self.report.layers[at].losses = None;
            layers[at] = layer;
        }
        self.report.losses = None;
        self.report.notes.push(format!(
            "singular values of {} were calibrated, the loudest to {:.0} % of what it was; this helps sums, and makes what \
             was solved for (ssr) worse",
            count(shared.len(), "layer"),
            100.0 * quietest
        ));
        let mut metadata = self.adapter.metadata().clone();
        metadata.insert("loraweld.singular_values".to_owned(), "calibrated".to_owned());
        self.adapter = Adapter::new(self.adapter.name(), self.adapter.format(), layers)?
            .spelled_like(&self.adapter)
            .with_metadata(metadata);
        self.report.seconds += start.elapsed().as_secs_f64();
        Ok(self)
    }
}

/// How much louder the merge speaks along u_r, of its right vector and its value, than the adapters of these cores do.
fn loudness(left: &[f64], right: &[f64], value: f64, cores: &[Matrix]) -> f64 {
    let of = |core: &Matrix| {
        let said: Vec<f64> =
            (0..core.cols).map(|j| left.iter().enumerate().map(|(i, u)| u * core[(i, j)]).sum()).collect();
        let own: f64 = said.iter().map(|v| v * v).sum();
        let both: f64 = said.iter().zip(right).map(|(s, v)| s * v * value).sum();
        if own > 0.0 { f64::max(1.0, both / own) } else { 1.0 }
    };
    cores.iter().map(of).sum::<f64>() / cores.len().max(1) as f64
}
