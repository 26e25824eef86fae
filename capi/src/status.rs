//! Codes, messages, and the border that no panic crosses.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use loraweld::Error;

/// How a call ended. `loraweld_last_error` tells more.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraweldStatus {
    /// Done.
    Ok = 0,
    /// An argument or option makes no sense, is not UTF-8, or is NULL where it must not be.
    Invalid = 1,
    /// The operating system refused a file operation: a file is missing, a disk is full.
    Io = 2,
    /// A file or one of its tensors is not what it should be, or an output exists and is not to be overwritten.
    File = 3,
    /// A layer cannot be computed.
    Layer = 4,
    /// No device fits, or it failed.
    Device = 5,
    /// The cancellation token was set.
    Cancelled = 6,
    /// A bug of the library. The handles that were passed stay valid; please report it.
    Internal = 7,
}

/// What a call that failed has to say.
#[derive(Debug)]
pub(crate) struct Failure {
    status: LoraweldStatus,
    message: String,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self { status: LoraweldStatus::Invalid, message: message.into() }
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self { status: LoraweldStatus::Internal, message: message.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Invalid(_) => LoraweldStatus::Invalid,
            Error::Io { .. } => LoraweldStatus::Io,
            Error::File { .. } | Error::Tensor { .. } | Error::NotMergeable { .. } | Error::Exists { .. } => {
                LoraweldStatus::File
            }
            Error::Layer { .. } | Error::Unnamed { .. } => LoraweldStatus::Layer,
            Error::Device(_) => LoraweldStatus::Device,
            Error::Cancelled => LoraweldStatus::Cancelled,
            _ => LoraweldStatus::Internal,
        };
        Self { status, message: error.to_string() }
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// What went wrong in the last call of this thread that failed: one line that names the file, key or layer and says
/// what would be right. Empty if none has failed. Owned by the library; valid until another call of this thread fails.
#[unsafe(no_mangle)]
pub extern "C" fn loraweld_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs what is behind the border, and keeps what a failure has to say.
pub(crate) fn guard(call: impl FnOnce() -> Result<()>) -> LoraweldStatus {
    // What a panic may leave half done is behind locks, which it poisons.
    let result = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic");
        Err(Failure::internal(format!("internal error: {text}")))
    });
    let Err(Failure { status, message }) = result else { return LoraweldStatus::Ok };
    // A thread that is ending has nowhere to keep it.
    let _ = LAST.try_with(|last| *last.borrow_mut() = crate::ffi::c_string(&message));
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_code_and_a_message() {
        let status = guard(|| {
            let empty: [u8; 0] = [];
            let i = std::hint::black_box(3);
            Err(Failure::invalid(format!("{}", empty[i])))
        });
        assert_eq!(status, LoraweldStatus::Internal);
        let message = LAST.with(|last| last.borrow().to_str().unwrap().to_owned());
        assert!(message.starts_with("internal error: index out of bounds"), "{message}");
        // One that worked leaves it as it is.
        assert_eq!(guard(|| Ok(())), LoraweldStatus::Ok);
        assert_eq!(LAST.with(|last| last.borrow().to_str().unwrap().to_owned()), message);
    }
}
