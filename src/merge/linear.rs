//! The weighted sum (task arithmetic), exact by rank concatenation.

use std::time::Instant;

use super::{Action, LayerReport, Merged, Plan, Report};
use crate::{Control, Result, Weighted};

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
    /// As [`Plan::new`]; [`Error::Tensor`](crate::Error::Tensor) for NaN or infinity in an adapter;
    /// [`Error::Layer`](crate::Error::Layer) if a result overflows f32;
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn merge_with(&self, adapters: &[Weighted<'_>], control: Control<'_>) -> Result<Merged> {
        let start = Instant::now();
        let plan = Plan::new(adapters)?;
        let inputs = super::check_inputs(adapters, &control)?;
        let (mut layers, mut reports) = (Vec::new(), Vec::new());
        for (i, planned) in plan.layers().iter().enumerate() {
            control.step("merge", &planned.name, i, plan.layers().len())?;
            let (layer, action) = match super::passed_through(planned, adapters) {
                Some(layer) => (layer, Action::PassedThrough),
                None => {
                    let members = super::members(planned, adapters);
                    let (a, b) = (super::joined_a(&members), super::joined_b(&members));
                    (super::joined_layer(&members, a, b)?, Action::Concatenated)
                }
            };
            layers.push(layer);
            reports.push(LayerReport::new(planned, action));
        }
        control.finish("merge", plan.layers().len());
        let options = serde_json::json!({});
        let adapter = super::finish("linear", &options, &inputs, adapters, layers)?;
        Ok(Merged {
            adapter,
            report: Report {
                method: "linear".to_owned(),
                device: "host, exact".to_owned(),
                inputs,
                options,
                layers: reports,
                losses: None,
                notes: plan.notes().to_vec(),
                seconds: start.elapsed().as_secs_f64(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
        })
    }
}
