//! The weighted sum, truncated to a rank.

use super::{Linear, Merged};
use crate::{Control, Result, Weighted};

/// The sum of adapters at their strengths, as well as rank N can hold it: [`Linear`], then [`Merged::truncated`].
#[derive(Clone, Copy, Debug)]
pub struct SvdMerge {
    rank: usize,
}

impl SvdMerge {
    /// To at most this rank in every layer.
    pub fn new(rank: usize) -> Self {
        Self { rank }
    }

    /// Merges.
    ///
    /// # Errors
    /// As [`merge_with`](Self::merge_with).
    pub fn merge(&self, adapters: &[Weighted<'_>]) -> Result<Merged> {
        self.merge_with(adapters, Control::default())
    }

    /// Merges, with progress and cancellation.
    ///
    /// # Errors
    /// As [`Linear::merge_with`] and [`Merged::truncated`].
    pub fn merge_with(&self, adapters: &[Weighted<'_>], control: Control<'_>) -> Result<Merged> {
        let mut merged = Linear.merge_with(adapters, control)?.truncated(self.rank, &control)?;
        merged.report.method = "svd".to_owned();
        merged.report.options = serde_json::json!({ "rank": self.rank });
        let mut metadata = merged.adapter.metadata().clone();
        metadata.insert("loraweld.method".to_owned(), "svd".to_owned());
        metadata.insert("loraweld.options".to_owned(), merged.report.options.to_string());
        merged.adapter = merged.adapter.with_metadata(metadata);
        Ok(merged)
    }
}
