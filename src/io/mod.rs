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

use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

pub use self::control::{Control, Progress};
pub use self::source::{ReadAt, WriteAt};
pub(crate) use self::source::{blamed, resting_on};
use crate::{Error, Result};

/// Writes a file beside the target and renames it when it is whole.
///
/// An existing target is refused unless `overwrite` is set, and one that is the same file as one of `protect`
/// (through any name) always. What is no regular file, such as a pipe or `/dev/stdout`, is written into, never
/// replaced. `write` may wrap an [`Error`] in its `io::Error` to have it come out unchanged.
pub fn write_atomic(
    path: &Path,
    overwrite: bool,
    protect: &[PathBuf],
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    // Dropped before it is committed, it leaves nothing.
    let file = atomic::AtomicFile::create(path, overwrite, protect)?;
    let mut out = BufWriter::with_capacity(1 << 20, file.file());
    write(&mut out).and_then(|()| out.flush()).map_err(|e| write_error(path, e))?;
    drop(out);
    file.commit(path)
}

/// The error of a target that is an input.
fn overwrites(path: &Path, input: &Path) -> Error {
    let reason = format!("is the input {}, which is never overwritten; choose another name", input.display());
    Error::file(path, reason)
}

/// An error of writing; an [`Error`] that it wraps comes out unchanged.
pub(crate) fn write_error(path: &Path, error: io::Error) -> Error {
    error.downcast::<Error>().unwrap_or_else(|e| Error::io(path, "write", e))
}
