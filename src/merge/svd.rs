//! The weighted sum, truncated.

use super::{Linear, Merged, Method, Run, Truncation};
use crate::{Control, Device, Result, Weighted};

/// The sum of adapters at their strengths, as well as fewer ranks can hold it: [`Linear`] and [`Merged::truncated`] in one,
/// without rounding in between.
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
    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        let method = if run.adapters.len() == 1 { "resize" } else { "svd" };
        // What is asked for beside it can only be more.
        let truncation = if run.truncation.is_none() { self.truncation } else { run.truncation };
        let mut merged = Linear.run_as(method, &Run { truncation, ..*run })?;
        merged.report.device = run.device.describe();
        Ok(merged)
    }
}
