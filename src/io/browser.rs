//! Files in a browser, where there is no file system: the page lends those that are read, by the names that errors and
//! reports know them by, and gives room for those that are written. It stands for `atomic.rs` there.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) use super::write_error;
use super::{ReadAt, WriteAt, overwrites};
use crate::{Error, Result};

/// Room for a file that is written, and then read by its name.
pub trait Room: ReadAt + WriteAt {}
impl<T: ReadAt + WriteAt> Room for T {}

/// Makes room for the next file that is to be written.
pub type Rooms = Box<dyn FnMut() -> io::Result<Arc<dyn Room>>>;

#[derive(Default)]
struct Table {
    files: BTreeMap<PathBuf, Arc<dyn ReadAt>>,
    rooms: Option<Rooms>,
}

thread_local! {
    // A browser's worker is one thread.
    static TABLE: RefCell<Table> = RefCell::default();
}

/// Lends a file by a name.
pub fn lend(path: impl Into<PathBuf>, file: Arc<dyn ReadAt>) {
    TABLE.with_borrow_mut(|table| table.files.insert(path.into(), file));
}

/// Takes a file back: one that was lent, or one that was written, whole.
pub fn take(path: impl AsRef<Path>) -> Option<Arc<dyn ReadAt>> {
    TABLE.with_borrow_mut(|table| table.files.remove(path.as_ref()))
}

/// Says where files that are written go.
pub fn set_rooms(rooms: Rooms) {
    TABLE.with_borrow_mut(|table| table.rooms = Some(rooms));
}

/// A file that was lent or written.
pub(crate) fn find(path: &Path) -> io::Result<Arc<dyn ReadAt>> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "the page has no file of this name");
    TABLE.with_borrow(|table| table.files.get(path).cloned()).ok_or_else(missing)
}

/// Bytes of a file; 0 if there is none of this name.
#[cfg(feature = "cli")]
pub(crate) fn len(path: &Path) -> u64 {
    find(path).map(|file| file.size()).unwrap_or_default()
}

/// The whole of a small file.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = find(path)?;
    let mut bytes = Vec::new();
    let size = usize::try_from(file.size()).map_err(|_| io::ErrorKind::OutOfMemory)?;
    bytes.try_reserve_exact(size)?;
    bytes.resize(size, 0);
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// A file that is written.
pub(crate) struct File {
    room: Arc<dyn Room>,
    /// Where the next bytes go that are written in a row.
    next: AtomicU64,
}

impl File {
    fn create() -> io::Result<Self> {
        let rooms = TABLE.with_borrow_mut(|table| table.rooms.take());
        let mut rooms = rooms.ok_or_else(|| io::Error::other("the page gave no room for files"))?;
        let room = rooms();
        set_rooms(rooms);
        let room = room?;
        room.set_size(0)?;
        Ok(Self { room, next: 0.into() })
    }

    /// For the files of folders, of which there are none.
    pub fn create_new(_path: impl AsRef<Path>) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Another handle of it, for the command line.
    #[cfg(feature = "cli")]
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { room: self.room.clone(), next: self.next.load(Ordering::Relaxed).into() })
    }

    /// The page brings files to disk.
    pub fn sync_all(&self) -> io::Result<()> {
        Ok(())
    }

    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.room.write_at(bytes, offset)
    }

    pub fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.room.set_size(bytes)
    }
}

impl WriteAt for File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.room.write_at(bytes, offset)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        WriteAt::read_at(&*self.room, buffer, offset)
    }

    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.room.set_size(bytes)
    }
}

impl ReadAt for File {
    fn size(&self) -> u64 {
        self.room.size()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        ReadAt::read_at(&*self.room, buffer, offset)
    }
}

impl Write for &File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let start = self.next.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.room.write_at(bytes, start).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that gets its name when it is whole.
pub(crate) struct AtomicFile {
    file: File,
    overwrite: bool,
}

impl AtomicFile {
    pub fn create(path: &Path, overwrite: bool, protect: &[PathBuf]) -> Result<Self> {
        check_target(path, overwrite, protect)?;
        let file = File::create().map_err(|e| Error::io(path, "create a temporary file for it", e))?;
        Ok(Self { file, overwrite })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn commit(self, path: &Path) -> Result<()> {
        check_target(path, self.overwrite, &[])?;
        lend(path, self.file.room);
        tracing::info!(file = %path.display(), "wrote");
        Ok(())
    }
}

/// See `atomic.rs`.
pub fn check_target(path: &Path, overwrite: bool, protect: &[PathBuf]) -> Result<()> {
    if let Some(input) = protect.iter().find(|input| same_file(path, input)) {
        return Err(overwrites(path, input));
    }
    match find(path).is_ok() && !overwrite {
        true => Err(Error::Exists { path: path.to_owned() }),
        false => Ok(()),
    }
}

/// Whether two names are one file's.
pub fn same_file(x: &Path, y: &Path) -> bool {
    x == y
}

/// There are none that would outlast the page.
pub fn remove_temporary_files() {}

/// A browser writes files as it likes.
pub(crate) struct Flusher;

impl Flusher {
    pub fn new(_file: &AtomicFile, _bytes: u64) -> Self {
        Self
    }
    pub fn wrote(&self, _bytes: u64) {}
    pub fn finish(self) -> io::Result<()> {
        Ok(())
    }
}

/// No folder can be written.
pub(crate) enum AtomicFolder {}

impl AtomicFolder {
    pub fn create(path: &Path) -> Result<Self> {
        Err(no_folder(path))
    }
    pub fn path(&self) -> &Path {
        match *self {}
    }
    pub fn commit(self, _path: &Path) -> Result<()> {
        match self {}
    }
}

pub(crate) fn free_folder(path: &Path) -> Result<(PathBuf, PathBuf)> {
    Err(no_folder(path))
}

fn no_folder(path: &Path) -> Error {
    Error::file(path, "would be a folder, and a browser writes files alone; the command line writes it")
}
