//! The weighted sum, truncated.

use super::{Linear, Merged, Truncation};
use crate::{Control, Device, Result, Weighted};

/// The sum of adapters at their strengths, as well as fewer ranks can hold it: [`Linear`], then [`Merged::truncated`].
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
        let merged = Linear.merge_with(adapters, control)?;
        let mut merged = merged.truncated(device, &self.truncation, &control)?;
        let method = if adapters.len() == 1 { "resize" } else { "svd" };
        merged.report.method = method.to_owned();
        merged.report.device = device.describe();
        let mut metadata = merged.adapter.metadata().clone();
        metadata.insert("loraweld.method".to_owned(), method.to_owned());
        merged.adapter = merged.adapter.with_metadata(metadata);
        Ok(merged)
    }
}
