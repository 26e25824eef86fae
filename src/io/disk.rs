//! Every call to the file system that a result depends on. Tests let the n-th of them fail (`faults`).

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::Mmap;

pub(crate) mod mapped;

use self::mapped::Mapped;

#[cfg(test)]
pub(crate) mod faults;
#[cfg(all(test, feature = "cli"))]
mod tests;

/// What is asked of the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "tests tell calls apart"))]
pub(crate) enum Call {
    Open,
    State,
    Map,
    Read,
    Create,
    Write,
    Size,
    Sync,
    Rename,
    Remove,
    List,
}

/// Where a test may let a call fail, or read and write less than was asked for.
#[cfg(not(test))]
#[inline]
fn asked(_: Call, _: &Path) -> io::Result<bool> {
    Ok(true)
}
#[cfg(test)]
use faults::asked;

/// An open file, and by what name it was opened.
pub(crate) struct File {
    file: fs::File,
    path: PathBuf,
}

impl File {
    /// Opens it for reading.
    pub fn open(path: &Path) -> io::Result<Self> {
        asked(Call::Open, path)?;
        Ok(Self { file: fs::File::open(path)?, path: path.to_owned() })
    }

    /// Opens what is there for writing.
    pub fn open_to_write(path: &Path) -> io::Result<Self> {
        asked(Call::Open, path)?;
        Ok(Self { file: fs::OpenOptions::new().write(true).open(path)?, path: path.to_owned() })
    }

    /// Opens it for reading and for writing at its end, and creates it if it is not there.
    #[cfg(feature = "cli")]
    pub fn open_to_append(path: &Path) -> io::Result<Self> {
        asked(Call::Open, path)?;
        let file = fs::OpenOptions::new().create(true).append(true).read(true).open(path)?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Creates a file that must not be there yet.
    pub fn create_new(path: &Path) -> io::Result<Self> {
        asked(Call::Create, path)?;
        Ok(Self { file: fs::File::create_new(path)?, path: path.to_owned() })
    }

    /// Creates a file with a random part in its name; it is removed when the path is dropped.
    pub fn temporary(
        folder: &Path,
        builder: &tempfile::Builder<'_, '_>,
    ) -> io::Result<(Self, tempfile::TempPath)> {
        asked(Call::Create, folder)?;
        let (file, path) = builder.tempfile_in(folder)?.into_parts();
        Ok((Self { file, path: path.to_path_buf() }, path))
    }

    /// Creates a file without a name, in the folder for temporary ones.
    pub fn unnamed() -> io::Result<Self> {
        Self::unnamed_in(&std::env::temp_dir())
    }

    /// Creates a file without a name.
    pub fn unnamed_in(folder: &Path) -> io::Result<Self> {
        asked(Call::Create, folder)?;
        Ok(Self { file: tempfile::tempfile_in(folder)?, path: folder.to_owned() })
    }

    /// Its length, and when it was changed last, if the system tells.
    pub fn state(&self) -> io::Result<(u64, Option<SystemTime>)> {
        asked(Call::State, &self.path)?;
        let meta = self.file.metadata()?;
        Ok((meta.len(), meta.modified().ok()))
    }

    /// Whether its bytes are on a disk of this machine, as far as is known.
    pub fn is_local(&self) -> bool {
        #[cfg(target_os = "linux")]
        return rustix::fs::fstatfs(&self.file).is_ok_and(|of| is_local(of.f_type as u32));
        #[cfg(not(target_os = "linux"))]
        true
    }

    /// Maps it.
    pub fn map(&self) -> io::Result<Mapped> {
        asked(Call::Map, &self.path)?;
        // SAFETY: the map is only read, and this crate replaces files by renaming, never in place. Another process may
        // write to the file all the same: then bytes change between two looks at them, which is sound for what reads
        // them here, for all of it is valid for any bytes, and no reference to them is kept as anything but bytes. If
        // another process cuts the file, touching what is gone ends the process by a signal; no memory is read that is
        // not the map's. `FileSource` maps only what is local, `FileSource::check` finds both out before a result is
        // kept, and the command line says which file it was.
        let map = unsafe { Mmap::map(&self.file) }?;
        Ok(Mapped::new(map, &self.path))
    }

    /// Fills a buffer from a place, from any thread.
    pub fn read_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            let step = |whole: bool| {
                let most = if whole { buffer.len() } else { buffer.len().div_ceil(2) };
                self.read_some(&mut buffer[..most], offset)
            };
            match asked(Call::Read, &self.path).and_then(step) {
                Ok(0) => {
                    let reason = format!("it ends at byte {offset}, before what should be there");
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
                }
                Ok(n) => {
                    buffer = &mut buffer[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes all bytes at a place, from any thread.
    pub fn write_at(&self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let step = |whole: bool| {
                let most = if whole { bytes.len() } else { bytes.len().div_ceil(2) };
                self.write_some(&bytes[..most], offset)
            };
            match asked(Call::Write, &self.path).and_then(step) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    bytes = &bytes[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    #[cfg(unix)]
    fn read_some(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(&self.file, buffer, offset)
    }

    #[cfg(unix)]
    fn write_some(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        std::os::unix::fs::FileExt::write_at(&self.file, bytes, offset)
    }

    #[cfg(not(unix))]
    fn read_some(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        alone(&self.file, offset, |mut file| io::Read::read(&mut file, buffer))
    }

    #[cfg(not(unix))]
    fn write_some(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        alone(&self.file, offset, |mut file| file.write(bytes))
    }

    /// Makes it so long.
    pub fn set_size(&self, bytes: u64) -> io::Result<()> {
        asked(Call::Size, &self.path)?;
        self.file.set_len(bytes)
    }

    /// Brings it to disk, and what the folder does not need to know with it.
    pub fn sync_all(&self) -> io::Result<()> {
        asked(Call::Sync, &self.path)?;
        self.file.sync_all()
    }

    /// Brings its bytes to disk.
    pub fn sync_data(&self) -> io::Result<()> {
        asked(Call::Sync, &self.path)?;
        self.file.sync_data()
    }

    /// Who may do what with it.
    pub fn set_permissions(&self, permissions: fs::Permissions) -> io::Result<()> {
        asked(Call::State, &self.path)?;
        self.file.set_permissions(permissions)
    }

    /// Waits for it to be this process's alone.
    pub fn lock(&self) -> io::Result<()> {
        self.file.lock()
    }

    /// Makes it this process's alone, unless it is another's.
    #[cfg(feature = "cli")]
    pub fn try_lock(&self) -> Result<(), fs::TryLockError> {
        self.file.try_lock()
    }

    /// The same file once more.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, path: self.path.clone() })
    }
}

impl Read for File {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = if asked(Call::Read, &self.path)? { buffer.len() } else { buffer.len().div_ceil(2) };
        self.file.read(&mut buffer[..most])
    }
}

impl Write for &File {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let whole = asked(Call::Write, &self.path)?;
        (&self.file).write(if whole { bytes } else { &bytes[..bytes.len().div_ceil(2)] })
    }

    fn flush(&mut self) -> io::Result<()> {
        (&self.file).flush()
    }
}

impl super::WriteAt for File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_at(bytes, offset)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_at(buffer, offset)
    }

    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.set_size(bytes)
    }
}

impl super::ReadAt for File {
    fn size(&self) -> u64 {
        self.state().map_or(0, |(size, _)| size)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_at(buffer, offset)
    }
}

/// Where reading and writing move the file's own place, one thread at a time.
#[cfg(not(unix))]
fn alone<T>(file: &fs::File, offset: u64, call: impl FnOnce(&fs::File) -> io::Result<T>) -> io::Result<T> {
    static PLACE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _alone = PLACE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    io::Seek::seek(&mut &*file, io::SeekFrom::Start(offset))?;
    call(file)
}

/// Whether a file system of Linux, by its magic number, keeps its bytes on this machine.
#[cfg(target_os = "linux")]
fn is_local(magic: u32) -> bool {
    const REMOTE: [u32; 13] = [
        0x0000_6969, // NFS
        0x0000_517b, // SMB
        0xff53_4d42, // CIFS
        0xfe53_4d42, // SMB 2
        0x6573_5546, // FUSE: sshfs, s3fs and others
        0x0102_1997, // 9P
        0x00c3_6400, // Ceph
        0x0bd0_0bd0, // Lustre
        0x4750_4653, // GPFS
        0x5346_414f, // AFS
        0x6b41_4653, // AFS of the kernel
        0x7375_7245, // Coda
        0x7461_636f, // OCFS2
    ];
    !REMOTE.contains(&magic)
}

/// Bytes of a text that is read as a whole: a configuration, an index, a schedule, a list of jobs.
const MAX_TEXT: u64 = 100_000_000;

/// The whole of a file that is the program's own.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_up_to(path, u64::MAX)
}

#[cfg(target_arch = "wasm32")]
pub(crate) use super::atomic::read;

/// The whole of a file of text, which may be anything.
pub(crate) fn read_to_string(path: &Path) -> io::Result<String> {
    String::from_utf8(read_up_to(path, MAX_TEXT)?).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(not(target_arch = "wasm32"))]
fn read_up_to(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    // What is no regular file has no length to be relied on.
    if !file.file.metadata()?.is_file() {
        io::Read::read_to_end(&mut io::Read::take(&file.file, most.saturating_add(1)), &mut bytes)?;
        return if bytes.len() as u64 > most { Err(too_long(most)) } else { Ok(bytes) };
    }
    let (size, _) = file.state()?;
    if size > most {
        return Err(too_long(most));
    }
    let size = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
    bytes.try_reserve_exact(size)?;
    bytes.resize(size, 0);
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(target_arch = "wasm32")]
fn read_up_to(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let bytes = read(path)?;
    if bytes.len() as u64 > most { Err(too_long(most)) } else { Ok(bytes) }
}

fn too_long(most: u64) -> io::Error {
    let reason = format!("it is longer than the {most} bytes that are allowed");
    io::Error::new(io::ErrorKind::FileTooLarge, reason)
}

/// What is in a folder.
pub(crate) fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    asked(Call::List, folder)?;
    fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect()
}

/// What a path leads to.
pub(crate) fn metadata(path: &Path) -> io::Result<fs::Metadata> {
    asked(Call::State, path)?;
    fs::metadata(path)
}

/// Creates a folder, and those that it is in.
pub(crate) fn create_folder(path: &Path) -> io::Result<()> {
    asked(Call::Create, path)?;
    fs::create_dir_all(path)
}

/// Creates a folder with a random part in its name; it is removed when it is dropped.
pub(crate) fn temporary_folder(
    folder: &Path,
    builder: &tempfile::Builder<'_, '_>,
) -> io::Result<tempfile::TempDir> {
    asked(Call::Create, folder)?;
    builder.tempdir_in(folder)
}

/// Copies a file to where none is, and brings it to disk; gives how many bytes.
pub(crate) fn copy(from: &Path, to: &Path) -> io::Result<u64> {
    asked(Call::Open, from)?;
    asked(Call::Create, to)?;
    let bytes = fs::copy(from, to)?;
    asked(Call::Sync, to)?;
    // Elsewhere, that takes a file that is open for writing, which a copy of a protected one cannot be.
    #[cfg(unix)]
    fs::File::open(to)?.sync_all()?;
    Ok(bytes)
}

/// Gives a file or folder another name.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    asked(Call::Rename, to)?;
    fs::rename(from, to)
}

/// Gives a temporary file its name, in place of what has it, or not.
pub(crate) fn persist(temp: tempfile::TempPath, to: &Path, overwrite: bool) -> io::Result<()> {
    asked(Call::Rename, to)?;
    let renamed = if overwrite { temp.persist(to) } else { temp.persist_noclobber(to) };
    renamed.map_err(|e| e.error)
}

/// Brings to disk what a folder says of its files; not every system can do that.
pub(crate) fn sync_folder(path: &Path) {
    if asked(Call::Sync, path).is_ok()
        && let Ok(folder) = fs::File::open(path)
    {
        let _ = folder.sync_all();
    }
}

/// The same of a folder and all folders in it, the innermost first.
pub(crate) fn sync_folders(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            sync_folders(&entry.path());
        }
    }
    sync_folder(path);
}

/// Removes a file, or a folder with all that is in it.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    asked(Call::Remove, path)?;
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}
