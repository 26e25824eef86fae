//! Files that are written whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

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
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    let write_error = |e: io::Error| match e.downcast::<Error>() {
        Ok(error) => error,
        Err(e) => Error::io(path, "write", e),
    };
    let Target { file: target, folder, permissions } = match resolve(path, overwrite, protect)? {
        Some(target) => target,
        None => {
            let file = OpenOptions::new().write(true).open(path).map_err(|e| Error::io(path, "open", e))?;
            let mut out = buffered(file);
            return write(&mut out).and_then(|()| out.flush()).map_err(write_error);
        }
    };

    // The end of a very long name is left out, so that the temporary one is not too long.
    let name: String = target.file_name().unwrap_or_default().to_string_lossy().chars().take(50).collect();
    let prefix = format!(".{name}.loraweld-");
    remove_stale(&folder, &prefix);
    let (file, temp) = create_locked(&folder, &prefix)
        .map_err(|e| Error::io(path, "create a temporary file in its folder", e))?;

    // From here on, dropping `temp` removes the file.
    let mut out = buffered(file);
    write(&mut out).map_err(write_error)?;
    let file = out.into_inner().map_err(|e| write_error(e.into_error()))?;
    if let Some(permissions) = permissions {
        file.set_permissions(permissions).map_err(write_error)?;
    }
    file.sync_all().map_err(write_error)?;
    let renamed = if overwrite { temp.persist(&target) } else { temp.persist_noclobber(&target) };
    renamed.map_err(|e| match e.error.kind() {
        // Another process was faster.
        io::ErrorKind::AlreadyExists => exists(path),
        _ => write_error(e.error),
    })?;
    // The rename itself lasts only when the folder is on disk too; not every system can do that.
    if let Ok(folder) = File::open(&folder) {
        let _ = folder.sync_all();
    }
    tracing::info!(file = %target.display(), "wrote");
    Ok(())
}

/// Checks before long work what [`write_atomic`] will check again, and that a file can be created in the folder.
pub fn check_target(path: &Path, overwrite: bool, protect: &[PathBuf]) -> Result<()> {
    if let Some(Target { folder, .. }) = resolve(path, overwrite, protect)? {
        tempfile::tempfile_in(folder).map_err(|e| Error::io(path, "create a file in its folder", e))?;
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
        let input = input.display();
        return Err(Error::file(
            path,
            format!("is the input {input}, which is never overwritten; choose another name"),
        ));
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
    Error::file(path, "exists already; ask for overwriting (--force) or choose another name")
}

fn buffered(file: File) -> BufWriter<File> {
    BufWriter::with_capacity(1 << 20, file)
}

/// Creates a temporary file and locks it while it is written, so that others can tell it from a stale one.
fn create_locked(folder: &Path, prefix: &str) -> io::Result<(File, tempfile::TempPath)> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).suffix(".tmp");
    // Temporary files are private by default, but this one is to become an ordinary file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    loop {
        let (file, temp) = builder.tempfile_in(folder)?.into_parts();
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
            && entry.file_type().is_ok_and(|kind| kind.is_file())
            && let Ok(file) = File::open(entry.path())
            && file.try_lock().is_ok()
        {
            let _ = fs::remove_file(entry.path());
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
