//! What everything is read, written and stopped with: safetensors files, what they are read from and written to, files that
//! are written whole or not at all, factors that no file holds yet, and the [`Control`] of long calls.

#[cfg(not(target_arch = "wasm32"))]
pub(crate) mod atomic;
#[cfg(target_arch = "wasm32")]
#[path = "browser.rs"]
pub(crate) mod atomic;
mod control;
#[cfg_attr(target_arch = "wasm32", allow(dead_code, reason = "there is no file system"))]
pub(crate) mod disk;
pub(crate) mod safetensors_file;
#[cfg_attr(target_arch = "wasm32", allow(dead_code, reason = "there is no file system"))]
mod source;
pub(crate) mod spill;

pub use self::control::{Control, Progress};
pub use self::source::{ReadAt, WriteAt};
pub(crate) use self::source::{blamed, resting_on};
use crate::Error;

/// An error of writing; an [`Error`] that it wraps comes out unchanged.
pub(crate) fn write_error(path: &std::path::Path, error: std::io::Error) -> Error {
    error.downcast::<Error>().unwrap_or_else(|e| Error::io(path, "write", e))
}
