//! loraweld in the model: adapters after its linear layers, and its activations into a calibration.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use burn::prelude::*;
use loraweld::fusion::{Choice, LiveNpLora, Schedule, Selection, Selector, SelectorOptions};
use loraweld::{Adapter, Calibration, Projection, Weighted, wgpu};

use crate::model::Fuse;
use crate::shared::Shared;

/// Who acts after a layer at a step.
#[derive(Clone, Debug)]
pub enum Rule {
    /// The same everywhere.
    Always(Selection),
    /// By a schedule, at step … of ….
    Scheduled(Arc<Schedule>),
}

impl Rule {
    /// Fixed weights.
    pub fn fixed(weights: &[f32]) -> Self {
        Self::Always(Selection { choice: Choice::Fixed(weights.to_vec()), ..Default::default() })
    }
}

/// Fuses in place: loraweld changes what a layer gave, in burn's own buffer.
pub struct Fused {
    shared: Shared,
    /// The adapters' factors on the device.
    pub selector: Selector,
    /// Who acts.
    pub rule: Rule,
    /// Step of the run, and how many there are.
    step: (usize, usize),
    /// Where activations go, and the task that they are of.
    pub calibration: Option<(Calibration, usize)>,
}

impl Fused {
    /// Room for calls of so many tokens.
    pub fn new(shared: &Shared, adapters: &[Weighted<'_>], tokens: usize, rule: Rule) -> Result<Self> {
        let options = SelectorOptions { tokens, ..Default::default() };
        let selector = Selector::new(&shared.loraweld, adapters, options)?;
        Ok(Self { shared: shared.clone(), selector, rule, step: (0, 1), calibration: None })
    }

    fn selection(&self, layer: &str) -> Option<Selection> {
        match &self.rule {
            Rule::Always(selection) => Some(selection.clone()),
            Rule::Scheduled(schedule) => schedule.selection(layer, self.step.0, self.step.1),
        }
    }
}

impl Fuse for Fused {
    fn at(&mut self, step: usize, steps: usize) {
        self.step = (step, steps);
    }

    fn fuse(&mut self, x: &Tensor<2>, outputs: &mut [(&str, Tensor<2>)]) -> Result<()> {
        let shared = self.shared.clone();
        let (device, queue) = shared.wgpu();
        let x = shared.view(x)?;
        let views = outputs
            .iter()
            .map(|(name, output)| Ok((*name, shared.view(output)?)))
            .collect::<Result<Vec<_>>>()?;
        // Everything that burn has computed so far comes before what loraweld does with it.
        shared.flush()?;
        let mut encoder = device.create_command_encoder(&Default::default());
        for (layer, output) in &views {
            if let Some((calibration, task)) = &mut self.calibration {
                calibration.accumulate(&shared.loraweld, *task, layer, x.activations())?;
            }
            if let Some(selection) = self.selection(layer).filter(|_| self.selector.has(layer)) {
                self.selector.encode(
                    &mut encoder,
                    layer,
                    x.activations(),
                    output.activations(),
                    &selection,
                )?;
            }
        }
        queue.submit([encoder.finish()]);
        Ok(())
    }
}

/// A merge on sliders: loraweld keeps A and B up to date on the device, burn multiplies with them.
pub struct Live {
    shared: Shared,
    np: LiveNpLora,
    /// Aᵀ and Bᵀ of the layers that were met since the sliders moved.
    factors: BTreeMap<String, [Tensor<2>; 2]>,
}

impl Live {
    /// NP-LoRA of a style and a subject.
    pub fn new(shared: &Shared, style: Weighted<'_>, subject: Weighted<'_>) -> Result<Self> {
        let np = LiveNpLora::new(&shared.loraweld, style, subject)?;
        Ok(Self { shared: shared.clone(), np, factors: BTreeMap::new() })
    }

    /// Moves the sliders.
    pub fn set(&mut self, projection: Projection, style: f64, subject: f64) -> Result<()> {
        self.factors.clear();
        Ok(self.np.set(projection, style, subject)?)
    }

    /// Copies a layer's factors into tensors, on the device: burn has no way to take over a buffer.
    fn fetch(&self, layer: &str) -> Result<Option<[Tensor<2>; 2]>> {
        let Some(f) = self.np.factors(layer) else { return Ok(None) };
        let part = |buffer: &wgpu::Buffer, offset: u64, rows: usize, columns: usize| {
            let bytes = (rows * columns * 4) as u64;
            self.shared.import(buffer.slice(offset..offset + bytes), [rows, columns])
        };
        let a = part(f.a, f.a_offset, f.rank, f.input)?;
        let b = part(f.b, f.b_offset, f.output, f.rank)?;
        Ok(Some([a.transpose(), b.transpose()]))
    }
}

impl Fuse for Live {
    fn fuse(&mut self, x: &Tensor<2>, outputs: &mut [(&str, Tensor<2>)]) -> Result<()> {
        for (layer, output) in outputs {
            if !self.factors.contains_key(*layer) {
                let Some(factors) = self.fetch(layer)? else { continue };
                self.factors.insert((*layer).to_owned(), factors);
            }
            let [a, b] = self.factors[*layer].clone();
            *output = output.clone() + x.clone().matmul(a).matmul(b);
        }
        Ok(())
    }
}

/// The SSR-Merge calibration of a pool, from the running model: while adapter k acts, on its class, the inputs of
/// every layer go from burn's buffers into loraweld's sums. `run(task, fused)` runs the model.
pub fn calibrate(
    fused: &mut Fused,
    pool: &[&Adapter],
    mut run: impl FnMut(usize, &mut Fused) -> Result<()>,
) -> Result<Calibration> {
    let mut calibration = Calibration::new(pool.iter().copied())?;
    for task in 0..pool.len() {
        let weights: Vec<f32> = (0..pool.len()).map(|k| f32::from(u8::from(k == task))).collect();
        fused.rule = Rule::fixed(&weights);
        fused.calibration = Some((calibration, task));
        let outcome = run(task, fused);
        let Some((back, _)) = fused.calibration.take() else { anyhow::bail!("the calibration went astray") };
        outcome?;
        calibration = back;
    }
    Ok(calibration)
}
