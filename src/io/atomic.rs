//! Files that are written whole or not at all.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::disk;
pub(crate) use super::disk::File;
use super::overwrites;
pub(crate) use super::write_error;
use crate::{Error, Result};

/// A file that takes its target's place when it is whole. Dropped before, it leaves nothing.
pub(crate) struct AtomicFile {
    file: File,
    place: Place,
}

enum Place {
    /// Beside the target, which it is to replace.
    Beside { target: Target, temp: tempfile::TempPath, listed: Listed, overwrite: bool },
    /// In a file without a name, to be copied into what is no regular file.
    Elsewhere,
}

impl AtomicFile {
    /// Creates it; see [`write_atomic`](super::write_atomic).
    pub fn create(path: &Path, overwrite: bool, protect: &[PathBuf]) -> Result<Self> {
        let Some(target) = resolve(path, overwrite, protect)? else {
            let file = File::unnamed().map_err(|e| Error::io(path, "create a temporary file for it", e))?;
            return Ok(Self { file, place: Place::Elsewhere });
        };
        // The end of a very long name is left out, so that the temporary one is not too long.
        let name: String =
            target.file.file_name().unwrap_or_default().to_string_lossy().chars().take(50).collect();
        let prefix = format!(".{name}.loraweld-");
        remove_stale(&target.folder, &prefix);
        let ((file, temp), listed) =
            Listed::make(|| create_locked(&target.folder, &prefix), |(_, temp)| temp)
                .map_err(|e| Error::io(path, "create a temporary file in its folder", e))?;
        Ok(Self { file, place: Place::Beside { target, temp, listed, overwrite } })
    }

    /// What is written to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Puts it in the target's place, on disk. `path`: the target, as errors name it.
    pub fn commit(self, path: &Path) -> Result<()> {
        let Place::Beside { target, temp, listed: _listed, overwrite } = self.place else {
            let out = File::open_to_write(path).map_err(|e| Error::io(path, "open", e))?;
            return copy_all(&self.file, &out).map_err(|e| write_error(path, e));
        };
        let Target { file: target, folder, permissions } = target;
        if let Some(permissions) = permissions {
            self.file.set_permissions(permissions).map_err(|e| write_error(path, e))?;
        }
        let start = web_time::Instant::now();
        self.file.sync_all().map_err(|e| write_error(path, e))?;
        tracing::debug!(seconds = start.elapsed().as_secs_f64(), "brought the file to disk");
        disk::persist(temp, &target, overwrite).map_err(|e| match e.kind() {
            // Another process was faster.
            io::ErrorKind::AlreadyExists => exists(path),
            _ => write_error(path, e),
        })?;
        // The rename itself lasts only when the folder is on disk too.
        disk::sync_folder(&folder);
        tracing::info!(file = %target.display(), "wrote");
        Ok(())
    }
}

/// Writes the whole of a file to another, which need not be a regular one.
fn copy_all(file: &File, mut out: &File) -> io::Result<()> {
    let (size, _) = file.state()?;
    let mut buffer = vec![0; size.min(1 << 20) as usize];
    for start in (0..size).step_by(1 << 20) {
        let piece = &mut buffer[..(size - start).min(1 << 20) as usize];
        file.read_at(piece, start)?;
        out.write_all(piece)?;
    }
    Ok(())
}

/// A folder that takes its target's place when all of its files are there. Dropped before, it leaves nothing.
///
/// An existing target is always refused: a folder cannot be replaced at once, and may hold what nobody wants to lose.
pub(crate) struct AtomicFolder {
    target: PathBuf,
    temp: tempfile::TempDir,
    listed: Listed,
    /// Held, it says that the folder is not stale.
    _lock: Option<fs::File>,
}

impl AtomicFolder {
    /// Creates it beside its target.
    pub fn create(path: &Path) -> Result<Self> {
        let (target, folder) = free_folder(path)?;
        let name: String =
            target.file_name().unwrap_or_default().to_string_lossy().chars().take(50).collect();
        let prefix = format!(".{name}.loraweld-");
        remove_stale(&folder, &prefix);
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".tmp");
        // Temporary folders are private by default, but this one is to become an ordinary one.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let make = || disk::temporary_folder(&folder, &builder);
        let (temp, listed) = Listed::make(make, |temp| temp.path())
            .map_err(|e| Error::io(path, "create a temporary folder beside it", e))?;
        // Where folders cannot be locked, none is ever taken for stale either.
        let lock = fs::File::open(temp.path()).ok().filter(|file| file.lock().is_ok());
        Ok(Self { target, temp, listed, _lock: lock })
    }

    /// Where to write for now.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Puts it in the target's place. Its files have to be on disk. `path`: the target, as errors name it.
    pub fn commit(self, path: &Path) -> Result<()> {
        let Self { target, temp, listed: _listed, .. } = self;
        free_folder(path)?;
        // What the folders say of their files has to last before the name does.
        disk::sync_folders(temp.path());
        disk::rename(temp.path(), &target).map_err(|e| write_error(path, e))?;
        // It is not there any more, and so there is nothing to be removed.
        let _ = temp.keep();
        if let Some(folder) = target.parent() {
            disk::sync_folder(folder);
        }
        tracing::info!(folder = %target.display(), "wrote");
        Ok(())
    }
}

/// The folder that a path names, which is not there yet, and the one that it is to be in.
pub(crate) fn free_folder(path: &Path) -> Result<(PathBuf, PathBuf)> {
    let Some(name) = path.file_name() else {
        return Err(Error::file(path, "has no name that a folder could have"));
    };
    if fs::symlink_metadata(path).is_ok() {
        return Err(Error::file(
            path,
            "exists already, and a folder is never replaced; remove it or choose another name",
        ));
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    if !folder.is_dir() {
        let what = if folder.exists() { "is not a folder" } else { "does not exist; create it first" };
        return Err(Error::file(path, format!("the folder `{}` {what}", folder.display())));
    }
    Ok((folder.join(name), folder))
}

/// Temporary files and folders that are being written.
static TEMPORARY: Mutex<Temporary> = Mutex::new(Temporary { paths: BTreeSet::new(), ended: false });

struct Temporary {
    paths: BTreeSet<PathBuf>,
    /// No more are made.
    ended: bool,
}

fn temporary() -> MutexGuard<'static, Temporary> {
    TEMPORARY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of them, until it is dropped.
struct Listed(PathBuf);

impl Listed {
    /// Makes one and lists it; the end of the program comes before or after both.
    fn make<T>(
        make: impl FnOnce() -> io::Result<T>,
        path: impl FnOnce(&T) -> &Path,
    ) -> io::Result<(T, Self)> {
        let mut temporary = temporary();
        if temporary.ended {
            return Err(io::Error::other("the program ends"));
        }
        let made = make()?;
        let path = path(&made).to_owned();
        temporary.paths.insert(path.clone());
        Ok((made, Self(path)))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        temporary().paths.remove(&self.0);
    }
}

/// Removes the temporary files of all writes that are under way, for a program that ends without waiting for them. Whatever
/// would be written after it is refused.
pub fn remove_temporary_files() {
    let mut temporary = temporary();
    temporary.ended = true;
    // Nothing is left to be done about one that does not go.
    temporary.paths.iter().for_each(|path| drop(disk::remove(path)));
}

/// Sends a file to the disk while it is written, so that little is left to wait for when it is whole.
pub(crate) struct Flusher {
    written: Arc<AtomicU64>,
    /// Dropped, it ends the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// Bytes that are worth sending.
const FLUSH: u64 = 32 << 20;

impl Flusher {
    /// For a file of so many bytes.
    pub fn new(file: &AtomicFile, bytes: u64) -> Self {
        let written = Arc::new(AtomicU64::new(0));
        let idle = Self { written: written.clone(), stop: None, thread: None };
        let (Place::Beside { .. }, 4.., Ok(file)) = (&file.place, bytes / FLUSH, file.file.try_clone())
        else {
            return idle;
        };
        let (stop, stopped) = channel::<()>();
        let flush = move || {
            let mut sent = 0;
            while stopped.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout) {
                let now = written.load(Ordering::Relaxed);
                if now - sent >= FLUSH {
                    sent = now;
                    file.sync_data()?;
                }
            }
            Ok(())
        };
        // Without a thread for it, all is left for the end.
        let thread = std::thread::Builder::new().name("loraweld flush".into()).spawn(flush).ok();
        Self { stop: Some(stop), thread, ..idle }
    }

    /// Tells that more was written.
    pub fn wrote(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Ends; fails if the disk did, which it tells only once.
    pub fn finish(self) -> io::Result<()> {
        let Self { stop, thread, .. } = self;
        drop(stop);
        match thread.map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the thread that brings the file to disk panicked")),
            None => Ok(()),
        }
    }
}

/// Bytes of a file; 0 if there is none.
#[cfg(feature = "cli")]
pub(crate) fn len(path: &Path) -> u64 {
    disk::metadata(path).map(|meta| meta.len()).unwrap_or_default()
}

/// Checks before long work what [`write_atomic`](super::write_atomic) will check again, and that a file can be created in the folder.
pub fn check_target(path: &Path, overwrite: bool, protect: &[PathBuf]) -> Result<()> {
    if let Some(Target { folder, .. }) = resolve(path, overwrite, protect)? {
        File::unnamed_in(&folder).map_err(|e| Error::io(path, "create a file in its folder", e))?;
    }
    Ok(())
}

/// What is replaced, after links.
struct Target {
    file: PathBuf,
    folder: PathBuf,
    permissions: Option<fs::Permissions>,
}

/// `None` for what is no regular file, and so is written into.
fn resolve(path: &Path, overwrite: bool, protect: &[PathBuf]) -> Result<Option<Target>> {
    let ends_in_name = path.as_os_str().to_string_lossy().ends_with(|c| !std::path::is_separator(c));
    if !ends_in_name || path.file_name().is_none() || path.is_dir() {
        return Err(Error::file(path, "names a folder; give the name of a file to write"));
    }
    if let Some(input) = protect.iter().find(|input| is_input(path, input)) {
        return Err(overwrites(path, input));
    }
    let (mut file, mut permissions) = (path.to_owned(), None);
    if fs::symlink_metadata(path).is_ok() {
        if !overwrite {
            return Err(exists(path));
        }
        // Fails for a link that leads nowhere, which is replaced like a file.
        if let Ok(meta) = fs::metadata(path) {
            if !meta.is_file() {
                return Ok(None);
            }
            // A link to a file stays, and the file that it leads to is replaced.
            file = fs::canonicalize(path).map_err(|e| Error::io(path, "open", e))?;
            permissions = Some(meta.permissions());
        }
    }
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    if !folder.is_dir() {
        let what = if folder.exists() { "is not a folder" } else { "does not exist; create it first" };
        return Err(Error::file(path, format!("the folder `{}` {what}", folder.display())));
    }
    Ok(Some(Target { file, folder, permissions }))
}

fn exists(path: &Path) -> Error {
    Error::Exists { path: path.to_owned() }
}

/// Creates a temporary file and locks it while it is written, so that others can tell it from a stale one.
fn create_locked(folder: &Path, prefix: &str) -> io::Result<(File, tempfile::TempPath)> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).suffix(".tmp");
    // Temporary files are private by default, but this one is to become an ordinary file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    loop {
        let (file, temp) = File::temporary(folder, &builder)?;
        // Where files cannot be locked, none is ever taken for stale either.
        if file.lock().is_err() || temp.exists() {
            return Ok((file, temp));
        }
        // Between creation and lock, another process took it for stale.
    }
}

/// Removes what killed processes left of the same target. Failing is no reason not to write.
fn remove_stale(folder: &Path, prefix: &str) {
    let is_ours = |name: &OsString| {
        name.to_str().is_some_and(|name| {
            let random = name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(".tmp"));
            random.is_some_and(|r| r.len() == 6 && r.bytes().all(|b| b.is_ascii_alphanumeric()))
        })
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if is_ours(&entry.file_name())
            && let Ok(kind) = entry.file_type()
            && !kind.is_symlink()
            && let Ok(file) = fs::File::open(entry.path())
            && file.try_lock().is_ok()
        {
            drop(disk::remove(&entry.path()));
        }
    }
}

/// Whether the target is an input, or a file of an input folder.
fn is_input(target: &Path, input: &Path) -> bool {
    if input.is_dir() {
        let files = fs::read_dir(input).into_iter().flatten().flatten();
        return files.map(|f| f.path()).any(|f| f.is_file() && same_file(target, &f));
    }
    same_file(target, input)
}

/// Whether two paths lead to one file, be it there or only to be written.
pub fn same_file(x: &Path, y: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let id = |path| fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
        if id(x).is_some() && id(x) == id(y) {
            return true;
        }
    }
    let real = |path: &Path| {
        fs::canonicalize(path).ok().or_else(|| {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            Some(fs::canonicalize(folder.unwrap_or(Path::new("."))).ok()?.join(path.file_name()?))
        })
    };
    real(x).is_some_and(|x| Some(x) == real(y))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_program_does_not_come_between_a_file_and_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let make = || {
            assert!(TEMPORARY.try_lock().is_err(), "who removes temporary files waits");
            fs::write(&path, "x").map(|()| path.clone())
        };
        let (made, listed) = Listed::make(make, |path| path).unwrap();
        assert!(temporary().paths.contains(&made));
        drop(listed);
        assert!(!temporary().paths.contains(&made));
    }
}
