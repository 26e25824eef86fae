//! What files are read from and written to: files of the system, memory, or what a host has of its own.

use std::borrow::Cow;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use super::disk::{self, mapped::Mapped};
use crate::{Error, Result};

/// What gives bytes at an offset: a file in a host's archive, an object in a store, a `File` of a browser.
/// [`Adapter::from_source`](crate::Adapter::from_source) reads an adapter from one, a factor at a time, when it is needed.
///
/// ```
/// use std::io;
/// struct Entry(Vec<u8>);
/// impl loraweld::ReadAt for Entry {
///     fn size(&self) -> u64 {
///         self.0.len() as u64
///     }
///     fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
///         let start = offset as usize;
///         let bytes = self.0.get(start..start + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
///         buffer.copy_from_slice(bytes);
///         Ok(())
///     }
/// }
/// ```
pub trait ReadAt: Send + Sync {
    /// Bytes in all, the same at every call.
    fn size(&self) -> u64;

    /// Fills the buffer with what starts at this byte, from any thread.
    ///
    /// # Errors
    /// If not all of it can be read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// All of it, where it is in memory or mapped. It is read through [`read_at`](Self::read_at) where this is `None`.
    fn bytes(&self) -> Option<&[u8]> {
        None
    }

    /// Fails if it is not any more what it was at first: nothing is written of what has changed on the way.
    ///
    /// # Errors
    /// What has changed, as a clause that follows "cannot read: ".
    fn check(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What takes bytes at an offset. [`Adapter::save_to`](crate::Adapter::save_to) and
/// [`Destination::sink`](crate::Destination::sink) write to one.
///
/// What a merge writes it reads again, for the hash in its metadata. If the call that writes fails, what was written is
/// to be thrown away; if it succeeds, it is whole.
pub trait WriteAt: Send + Sync {
    /// Writes all of the bytes from this one on, from any thread, in any order.
    ///
    /// # Errors
    /// If not all of it can be written.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Fills the buffer with what was written, or zeros, from this byte on.
    ///
    /// # Errors
    /// If not all of it can be read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Makes it this long. Called first of all, and perhaps again at the end.
    ///
    /// # Errors
    /// If there is no room.
    fn set_size(&self, bytes: u64) -> io::Result<()>;
}

/// A result, unless what it rests on has changed or could not be read: then that is the error, whatever came of it.
pub(crate) fn resting_on<T>(result: Result<T>, check: impl Fn() -> Result<()>) -> Result<T> {
    let value = blamed(result, &check)?;
    check().map(|()| value)
}

/// A result. If it is an error, and something that it rests on has changed or could not be read, then that is the error.
pub(crate) fn blamed<T>(result: Result<T>, check: impl Fn() -> Result<()>) -> Result<T> {
    match result {
        Err(error) if !matches!(error, Error::Cancelled) => check().and(Err(error)),
        result => result,
    }
}

impl ReadAt for Cow<'static, [u8]> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.get(start..).and_then(|bytes| bytes.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(self)
    }
}

/// A file of the system, mapped where that is safe.
pub(crate) struct FileSource {
    file: disk::File,
    size: u64,
    modified: Option<SystemTime>,
    map: Option<Mapped>,
}

impl FileSource {
    /// Opens a regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = disk::File::open(path)?;
        let (size, modified) = file.state()?;
        // A file on another machine may be cut short there, and then touching its map would end the program. Miri maps
        // no files.
        let map = if size > 0 && !cfg!(miri) && file.is_local() { file.map().ok() } else { None };
        tracing::debug!(file = %path.display(), mapped = map.is_some(), "opened");
        Ok(Self { file, size, modified, map })
    }
}

impl ReadAt for FileSource {
    fn size(&self) -> u64 {
        self.map.as_ref().map_or(self.size, |map| map.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buffer, offset)
    }

    fn bytes(&self) -> Option<&[u8]> {
        self.map.as_deref()
    }

    fn check(&self) -> io::Result<()> {
        let (size, modified) = self.file.state()?;
        if size < self.size {
            let reason = format!("it was cut from {} to {size} bytes since it was opened", self.size);
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
        }
        if (size, modified) != (self.size, self.modified) {
            return Err(io::Error::other("it was changed since it was opened"));
        }
        Ok(())
    }
}
