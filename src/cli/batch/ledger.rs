//! What was done before: a folder with a file of JSON lines for each shard.

use std::collections::HashMap;
use std::fs::TryLockError;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use loraweld::Error;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::job::Job;
use super::shard::Shard;
use crate::io::disk::{self, File};
use crate::words::hex;

/// What became of a job.
#[derive(Serialize, Deserialize, Debug)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Entry {
    /// It began.
    Started {
        /// The hash of its words and of what it reads.
        job: String,
        line: usize,
        run: Vec<String>,
        /// Outputs that nothing stood in the place of: what is there later was written by this job.
        fresh: Vec<PathBuf>,
    },
    /// It is done.
    Done {
        job: String,
        line: usize,
        run: Vec<String>,
        seconds: f64,
        outputs: Vec<Written>,
        warnings: Vec<String>,
        /// What it would have printed with `--json`, but for progress and warnings.
        events: Vec<Value>,
    },
    /// It failed.
    Failed { job: String, line: usize, run: Vec<String>, error: String },
}

/// A file that was written.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub struct Written {
    pub path: PathBuf,
    pub sha256: String,
}

/// What is known of a job.
#[derive(Default, Debug)]
struct Known {
    /// What it wrote, if it is done.
    outputs: Option<Vec<Written>>,
    /// What is its own if it is there.
    fresh: Vec<PathBuf>,
}

/// What all shards have written down, and the file of this one.
pub struct Ledger {
    path: PathBuf,
    file: Option<File>,
    known: HashMap<String, Known>,
}

impl Ledger {
    /// Reads the folder, if there is one, and writes nothing.
    pub fn read(folder: &Path) -> loraweld::Result<Self> {
        let mut known = HashMap::new();
        let mut files = match disk::list(folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            other => other.map_err(|e| Error::io(folder, "read", e))?,
        };
        files.retain(|path| path.extension().is_some_and(|e| e == "jsonl"));
        files.sort();
        for path in &files {
            let mut bytes = disk::read(path).map_err(|e| Error::io(path, "read", e))?;
            // Without the part of a line that another process is writing, or was killed in.
            bytes.truncate(whole_lines(&bytes));
            for (number, line) in (1..).zip(bytes.split_inclusive(|&b| b == b'\n')) {
                let entry = serde_json::from_slice(line).map_err(|e| {
                    let what = format!(
                        "line {number} is no record of a batch ({e}); `--results` names another folder"
                    );
                    Error::file(path, what)
                })?;
                note(&mut known, entry);
            }
        }
        Ok(Self { path: folder.to_owned(), file: None, known })
    }

    /// Reads the folder, and opens the file of this shard, which is then no other process's.
    pub fn open(folder: &Path, shard: Shard) -> loraweld::Result<Self> {
        disk::create_folder(folder).map_err(|e| Error::io(folder, "create", e))?;
        let path = folder.join(format!("shard-{}-of-{}.jsonl", shard.number, shard.of));
        let mut file = File::open_to_append(&path).map_err(|e| Error::io(&path, "open", e))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(Error::file(&path, format!("another process is at work on shard {shard}")));
            }
            // Some network file systems cannot lock.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        // A process that was killed may have left half a line.
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(|e| Error::io(&path, "read", e))?;
        let whole = whole_lines(&text);
        if whole < text.len() {
            file.set_size(whole as u64).map_err(|e| Error::io(&path, "write", e))?;
        }
        Ok(Self { path, file: Some(file), ..Self::read(folder)? })
    }

    /// Whether a job is done, and its outputs are there as they were written.
    pub fn is_done(&self, job: &str, hashes: &mut Hashes) -> bool {
        let outputs = self.known.get(job).and_then(|known| known.outputs.as_ref());
        let mut is_there =
            |w: &Written| hashes.content(&w.path).is_ok_and(|hash| hash.as_ref() == Some(&w.sha256));
        outputs.is_some_and(|outputs| outputs.iter().all(&mut is_there))
    }

    /// The outputs of a job that began that are its own if they are there.
    pub fn began(&self, job: &str) -> &[PathBuf] {
        self.known.get(job).map_or(&[], |known| &known.fresh)
    }

    /// Writes an entry down, on disk.
    pub fn add(&mut self, entry: Entry) -> loraweld::Result<()> {
        if let Some(mut file) = self.file.as_ref() {
            let line =
                serde_json::to_string(&entry).map_err(|e| Error::file(&self.path, e.to_string()))? + "\n";
            let wrote = file.write_all(line.as_bytes()).and_then(|()| file.sync_data());
            wrote.map_err(|e| Error::io(&self.path, "write", e))?;
        }
        note(&mut self.known, entry);
        Ok(())
    }
}

/// Where the last whole line ends.
fn whole_lines(text: &[u8]) -> usize {
    text.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1)
}

fn note(known: &mut HashMap<String, Known>, entry: Entry) {
    match entry {
        Entry::Started { job, fresh, .. } => known.entry(job).or_default().fresh.extend(fresh),
        // From now on its outputs are told by their content, and what differs is somebody else's.
        Entry::Done { job, outputs, .. } => {
            drop(known.insert(job, Known { outputs: Some(outputs), fresh: Vec::new() }))
        }
        Entry::Failed { .. } => {}
    }
}

/// Hashes of files, each read once as long as it does not change.
#[derive(Default)]
pub struct Hashes {
    files: HashMap<PathBuf, (u64, Option<std::time::SystemTime>, String)>,
}

impl Hashes {
    /// The job's name in the ledger: this version, its words, and the content of all that it reads.
    pub fn job(&mut self, job: &Job) -> loraweld::Result<String> {
        let mut all = Sha256::new();
        let mut part = |bytes: &[u8]| {
            all.update((bytes.len() as u64).to_le_bytes());
            all.update(bytes);
        };
        part(env!("CARGO_PKG_VERSION").as_bytes());
        job.words.iter().for_each(|word| part(word.as_bytes()));
        part(b"");
        for path in &job.inputs {
            part(self.content(path)?.unwrap_or_default().as_bytes());
        }
        Ok(hex(&all.finalize()))
    }

    /// The hash of a file, or of all files of a folder with their names; `None` if there is nothing.
    pub fn content(&mut self, path: &Path) -> loraweld::Result<Option<String>> {
        let meta = match disk::metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| Error::io(path, "read", e))?,
        };
        if meta.is_dir() {
            let mut files = disk::list(path).map_err(|e| Error::io(path, "read", e))?;
            files.sort();
            let mut all = Sha256::new();
            for file in files {
                let content = self.content(&file)?.unwrap_or_default();
                let name = file.file_name().unwrap_or_default();
                all.update(format!("{}\0{content}\0", name.to_string_lossy()));
            }
            return Ok(Some(hex(&all.finalize())));
        }
        let (bytes, changed) = (meta.len(), meta.modified().ok());
        if let Some((b, c, hash)) = self.files.get(path)
            && (*b, *c) == (bytes, changed)
        {
            return Ok(Some(hash.clone()));
        }
        let mut sha = Sha256::new();
        let mut file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => sha.update(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(path, "read", e)),
            }
        }
        let hash = hex(&sha.finalize());
        self.files.insert(path.to_owned(), (bytes, changed, hash.clone()));
        Ok(Some(hash))
    }
}
