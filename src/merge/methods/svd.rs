//! The weighted sum, truncated.

use super::Linear;
use super::entry::{MethodEntry, Needs, Options, over};
use crate::merge::engine::driver::{Method, Run};
use crate::merge::engine::truncate::Truncations;
use crate::merge::{Merged, Truncation};
use crate::{Calibration, Control, Device, Result, Weighted};

pub(super) const ENTRY: MethodEntry = MethodEntry {
    name: "svd",
    summary: "The sum of adapters at their strengths, as well as an adapter of lower rank can hold it",
    notes: "\
Examples:
  loraweld merge svd cat.safetensors dog.safetensors:0.8 --rank 16 -o both.safetensors
  loraweld merge svd cat.safetensors dog.safetensors --sv-fro 0.95 -o both.safetensors",
    needs: Needs::Truncation,
    own_rank: false,
    options: &[],
    build,
    variants: &[],
};

fn build<'a>(options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(SvdMerge::new(over(&Truncation::default(), options)?)))
}

/// The sum of adapters at their strengths, as well as fewer ranks can hold it: [`Linear`] and [`Merged::truncated`] in one,
/// without rounding in between. What is truncated further, in memory or into a file, counts what this leaves.
/// Of one adapter, it resizes that.
///
/// # Example
/// ```no_run
/// use loraweld::{Adapter, Device, SvdMerge, Truncation};
/// # fn main() -> loraweld::Result<()> {
/// let cat = Adapter::open("cat.safetensors")?;
/// let smaller = SvdMerge::new(Truncation::rank(16)).merge(&Device::auto()?, &[cat.at(1.0)])?;
/// # let _ = smaller;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SvdMerge {
    truncation: Truncation,
}

impl SvdMerge {
    /// With what every layer is truncated to.
    pub fn new(truncation: Truncation) -> Self {
        Self { truncation }
    }

    /// Merges.
    ///
    /// # Errors
    /// As [`merge_with`](Self::merge_with).
    pub fn merge(&self, device: &Device, adapters: &[Weighted<'_>]) -> Result<Merged> {
        self.merge_with(device, adapters, Control::default())
    }

    /// Merges, with progress and cancellation.
    ///
    /// # Errors
    /// As [`Linear::merge_with`] and [`Merged::truncated`].
    pub fn merge_with(
        &self,
        device: &Device,
        adapters: &[Weighted<'_>],
        control: Control<'_>,
    ) -> Result<Merged> {
        self.run(&Run::new(device, adapters, control))
    }
}

impl Method for SvdMerge {
    fn check(&self, _: usize) -> Result<()> {
        self.truncation.check()
    }

    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        let method = if run.adapters.len() == 1 { "resize" } else { "svd" };
        let truncation = Truncations { own: self.truncation, ..run.truncation };
        let mut merged = Linear.run_as(method, &Run { truncation, ..*run })?;
        merged.report.device = run.device.describe();
        Ok(merged)
    }
}
