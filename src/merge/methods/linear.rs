//! The weighted sum (task arithmetic), exact by rank concatenation.

use rayon::prelude::*;

use super::entry::{MethodEntry, Needs, Options, Variant, no_more};
use crate::merge::engine::driver::{self, Done, Job, Method, Run, Spec};
use crate::merge::members::joined;
use crate::merge::{Action, LayerReport, Merged};
use crate::{Calibration, Control, Device, Result, Weighted};

pub(super) const ENTRY: MethodEntry = MethodEntry {
    name: "linear",
    summary: "The sum of adapters at their strengths (task arithmetic), exactly, by joining ranks",
    notes: "\
Examples:
  loraweld merge linear cat.safetensors:0.5 dog.safetensors:0.5 -o average.safetensors",
    needs: Needs::Nothing,
    own_rank: false,
    options: &[],
    build,
    variants: &[Variant { name: "average", aliases: &[], whose: None, build: average }],
};

fn build<'a>(options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    no_more(&options)?;
    Ok(Box::new(Linear))
}

fn average<'a>(options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    no_more(&options)?;
    Ok(Box::new(Average))
}

/// The sum of adapters, `ΔW = Σ w_k·ΔW_k`, w: strengths.
///
/// `A = [A_1; …; A_K]`, `B = [w_1·s_1·B_1 | … | w_K·s_K·B_K]`, of rank Σ r_k; exact but for rounding B once to f32.
/// Layers of one adapter pass through unchanged. Also known as task arithmetic and, of averages, `w_k = 1/K`.
///
/// # Example
/// ```no_run
/// use loraweld::{Adapter, Linear};
/// # fn main() -> loraweld::Result<()> {
/// let (cat, dog) = (Adapter::open("cat.safetensors")?, Adapter::open("dog.safetensors")?);
/// let merged = Linear.merge(&[cat.at(0.5), dog.at(0.5)])?;
/// # let _ = merged;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Linear;

impl Linear {
    /// Merges.
    ///
    /// # Errors
    /// As [`merge_with`](Self::merge_with).
    pub fn merge(&self, adapters: &[Weighted<'_>]) -> Result<Merged> {
        self.merge_with(adapters, Control::default())
    }

    /// Merges, with progress and cancellation. Nothing is computed on a device.
    ///
    /// # Errors
    /// As [`Plan::new`](crate::Plan::new); [`Error::Tensor`](crate::Error::Tensor) for NaN or infinity in an adapter;
    /// [`Error::Layer`](crate::Error::Layer) if a result overflows f32;
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn merge_with(&self, adapters: &[Weighted<'_>], control: Control<'_>) -> Result<Merged> {
        self.run(&Run::new(&Device::cpu(), adapters, control))
    }

    /// Under another name, of a method that is the sum as well.
    pub(super) fn run_as(&self, method: &str, run: &Run<'_>) -> Result<Merged> {
        let exact = run.truncation.is_none();
        let cpu = Device::cpu();
        let run = Run { device: if exact { &cpu } else { run.device }, ..*run };
        let merge = |_: &Device, jobs: &[Job<'_>]| {
            let sum = |Job { planned, members }: &Job<'_>| {
                let report = LayerReport::new(planned, Action::Concatenated);
                Ok(Done::new(joined(members)?, report))
            };
            jobs.par_iter().map(sum).collect()
        };
        let mut merged = driver::run(
            &run,
            &Spec {
                method,
                options: serde_json::json!({}),
                size: &|_| (0, 0),
                rank: &|layer| layer.rank,
                merge: &merge,
                alone: false,
                is_sum: true,
                notes: &|_| Vec::new(),
            },
        )?;
        if exact {
            merged.report.device = "host, exact".to_owned();
        }
        Ok(merged)
    }
}

impl Method for Linear {
    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        self.run_as("linear", run)
    }
}

/// The sum of adapters at their strengths divided by their number.
struct Average;

impl Method for Average {
    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        let share = 1.0 / run.adapters.len() as f64;
        let adapters: Vec<Weighted<'_>> =
            run.adapters.iter().map(|weighted| weighted.adapter.at(weighted.strength * share)).collect();
        Linear.run(&Run { adapters: &adapters, ..*run })
    }
}
