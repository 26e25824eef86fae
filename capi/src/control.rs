//! Progress and cancellation.

use std::ffi::{c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use loraweld::{Control, Progress};

use crate::ffi::{self, Out};
use crate::status::{LoraweldStatus, Result, guard};

/// A cancellation token.
pub struct LoraweldCancel(AtomicBool);

/// How far a long call is.
#[repr(C)]
pub struct LoraweldProgress {
    /// What is being done: `calibrate`, `survey`, `merge`, `truncate`, `measure`. Valid during the callback.
    pub stage: *const c_char,
    /// The layer or the file that comes next; empty at the end of a stage. Valid during the callback.
    pub item: *const c_char,
    /// Items that are done.
    pub done: u64,
    /// Items in all.
    pub total: u64,
}

/// Called with `user` before each item and at the end of each stage, from the thread that made the call. It must not
/// throw or jump out.
pub type LoraweldProgressFn =
    Option<unsafe extern "C" fn(user: *mut c_void, progress: *const LoraweldProgress)>;

/// Progress and cancellation of a long call. NULL in any place is for none.
#[repr(C)]
pub struct LoraweldControl {
    /// Called as the work goes on.
    pub progress: LoraweldProgressFn,
    /// What `progress` gets first.
    pub user: *mut c_void,
    /// Ends the call with `LORAWELD_STATUS_CANCELLED` when it is set.
    pub cancel: *const LoraweldCancel,
}

/// Makes a cancellation token. Free it with `loraweld_cancel_free`, after the calls that it was given to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_cancel_new(cancel: *mut *mut LoraweldCancel) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        unsafe { Out::new(cancel, "cancel") }?.put(LoraweldCancel(AtomicBool::new(false)));
        Ok(())
    })
}

/// Sets the token: calls that have it return soon, and so does every later one. Any thread may do so, and a signal
/// handler. NULL does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_cancel_set(cancel: *const LoraweldCancel) {
    // SAFETY: the caller keeps what the header asks for.
    if let Some(cancel) = unsafe { cancel.as_ref() } {
        cancel.0.store(true, Ordering::Relaxed);
    }
}

/// Clears the token, so that it can be used again. NULL does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_cancel_reset(cancel: *const LoraweldCancel) {
    // SAFETY: the caller keeps what the header asks for.
    if let Some(cancel) = unsafe { cancel.as_ref() } {
        cancel.0.store(false, Ordering::Relaxed);
    }
}

/// Frees a token; NULL does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_cancel_free(cancel: *mut LoraweldCancel) {
    // SAFETY: the caller keeps what the header asks for.
    unsafe { ffi::free(cancel) }
}

/// The host's callback.
struct Callback(unsafe extern "C" fn(*mut c_void, *const LoraweldProgress), *mut c_void);

// SAFETY: `Control::progress` is called only from the thread that made the call, as the header says.
unsafe impl Sync for Callback {}

impl Callback {
    fn call(&self, progress: Progress<'_>) {
        let (stage, item) = (ffi::c_string(progress.stage), ffi::c_string(progress.item));
        let Progress { done, total, .. } = progress;
        let progress = LoraweldProgress { stage: stage.as_ptr(), item: item.as_ptr(), done, total };
        // SAFETY: a function of this type came from the host; what it gets is valid while it runs.
        unsafe { (self.0)(self.1, &progress) }
    }
}

/// Makes a long call with what the host wants to know and to be able to stop.
///
/// # Safety
/// `control` and the token in it are NULL or valid for as long as the call lasts.
pub(crate) unsafe fn controlled<T>(
    control: *const LoraweldControl,
    call: impl FnOnce(Control<'_>) -> Result<T>,
) -> Result<T> {
    // SAFETY: as above.
    let Some(control) = (unsafe { control.as_ref() }) else { return call(Control::default()) };
    let callback = control.progress.map(|function| Callback(function, control.user));
    let show = callback.as_ref().map(|callback| move |progress: Progress<'_>| callback.call(progress));
    call(Control {
        progress: show.as_ref().map(|show| show as &(dyn Fn(Progress<'_>) + Sync)),
        // SAFETY: as above.
        cancel: unsafe { control.cancel.as_ref() }.map(|cancel| &cancel.0),
    })
}
