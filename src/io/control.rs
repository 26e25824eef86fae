//! Progress and cancellation of long calls.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

/// Progress and cancellation of a long call. By default there is neither.
///
/// ```
/// use std::sync::atomic::AtomicBool;
/// let stop = AtomicBool::new(false);
/// let show = |p: loraweld::Progress| println!("{} {}/{} {}", p.stage, p.done, p.total, p.item);
/// let control = loraweld::Control { progress: Some(&show), cancel: Some(&stop) };
/// # let _ = control;
/// ```
#[derive(Clone, Copy, Default)]
pub struct Control<'a> {
    /// Called before each item (of a merge, whose layers are done side by side, after each), and at the end of each stage
    /// with `done` = `total`, from the thread that made the call.
    pub progress: Option<&'a (dyn Fn(Progress<'_>) + Sync)>,
    /// Set to true, by any thread, it makes the call return [`Error::Cancelled`] before its next item.
    pub cancel: Option<&'a AtomicBool>,
}

/// How far a long call is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// What is being done: `calibrate`, `survey` (what a merge must know of all layers first), `merge`, `truncate`, `measure`,
    /// `schedule`, `bake`, `extract`.
    pub stage: &'static str,
    /// The layer or the file that comes next; empty at the end.
    pub item: &'a str,
    /// Items that are done.
    pub done: u64,
    /// Items in all.
    pub total: u64,
}

impl std::fmt::Debug for Control<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("progress", &self.progress.is_some())
            .field("cancel", &self.cancel)
            .finish()
    }
}

impl Control<'_> {
    /// Reports that `item` comes next, unless the call was cancelled before or is by the callback.
    pub(crate) fn step(&self, stage: &'static str, item: &str, done: usize, total: usize) -> Result<()> {
        self.check()?;
        self.report(stage, item, done, total);
        self.check()
    }

    /// Fails if the call was cancelled.
    pub(crate) fn check(&self) -> Result<()> {
        match self.cancel.is_some_and(|cancel| cancel.load(Ordering::Relaxed)) {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }

    /// Reports that the last item is done.
    pub(crate) fn finish(&self, stage: &'static str, total: usize) {
        self.report(stage, "", total, total);
    }

    fn report(&self, stage: &'static str, item: &str, done: usize, total: usize) {
        if let Some(progress) = self.progress {
            progress(Progress { stage, item, done: done as u64, total: total as u64 });
        }
    }
}
