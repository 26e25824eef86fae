//! Calls to the file system that fail when a test says so.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Call;

/// What becomes of a call.
pub(crate) enum Outcome {
    /// It is made.
    Made,
    /// Half of the bytes are read or written; all else is made.
    Short,
    /// It fails.
    Fails(io::Error),
}

/// What becomes of a call, by its number from 0 on.
type Choose = dyn Fn(usize, Call, &Path) -> Outcome + Send + Sync;

/// What becomes of the calls on paths in a folder, by their number from 0 on.
pub(crate) struct Plan {
    folder: PathBuf,
    calls: AtomicUsize,
    outcome: Box<Choose>,
}

static PLANS: Mutex<Vec<Arc<Plan>>> = Mutex::new(Vec::new());

fn plans() -> std::sync::MutexGuard<'static, Vec<Arc<Plan>>> {
    PLANS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs with the calls in a folder as planned; other tests, in other folders, do not notice. Gives how many calls there were.
pub(crate) fn with<T>(
    folder: &Path,
    outcome: impl Fn(usize, Call, &Path) -> Outcome + Send + Sync + 'static,
    run: impl FnOnce() -> T,
) -> (T, usize) {
    struct Remove(Arc<Plan>);
    impl Drop for Remove {
        fn drop(&mut self) {
            plans().retain(|plan| !Arc::ptr_eq(plan, &self.0));
        }
    }
    let plan = Plan { folder: folder.to_owned(), calls: AtomicUsize::new(0), outcome: Box::new(outcome) };
    let plan = Arc::new(plan);
    plans().push(plan.clone());
    let remove = Remove(plan.clone());
    let result = run();
    drop(remove);
    (result, plan.calls.load(Ordering::SeqCst))
}

/// Whether all bytes are to be read or written, unless the call fails.
pub(super) fn asked(call: Call, path: &Path) -> io::Result<bool> {
    let plan = plans().iter().find(|plan| path.starts_with(&plan.folder)).cloned();
    let Some(plan) = plan else { return Ok(true) };
    match (plan.outcome)(plan.calls.fetch_add(1, Ordering::SeqCst), call, path) {
        Outcome::Made => Ok(true),
        Outcome::Short => Ok(false),
        Outcome::Fails(error) => Err(error),
    }
}
