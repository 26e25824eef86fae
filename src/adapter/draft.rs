//! Files of adapters that are written while their layers are computed.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::follower::Follower;
use super::write::{Module, Target, modules};
use super::{Adapter, Layer, LayerKey, SaveOptions, TensorData, metadata};
use crate::io::atomic::{AtomicFile, Flusher, write_error};
use crate::io::blamed;
use crate::io::safetensors_file::{FileDtype, Layout, SafetensorsFile, TensorOut};
use crate::{Control, Dtype, Error, Result, WriteAt};

/// Bytes that are gathered before they are written. In a browser each write asks another process, which takes as long as
/// some hundred KiB.
const BUFFER: usize = if cfg!(target_arch = "wasm32") { 1 << 20 } else { 1 << 17 };

/// A file that is laid out, and filled as factors become known, in any order and from any thread.
pub(crate) struct Draft<'a> {
    path: &'a Path,
    file: &'a dyn WriteAt,
    dtype: Dtype,
    options: &'a SaveOptions,
    control: &'a Control<'a>,
    modules: &'a [Module<'a>],
    /// The module of each layer that is not there yet.
    planned: BTreeMap<&'a LayerKey, usize>,
    /// Of every tensor.
    places: HashMap<String, Range<u64>>,
    /// Where there is room for what has no place.
    end: AtomicU64,
    /// Layers of modules that lack others.
    waiting: Mutex<HashMap<usize, Vec<Layer>>>,
    flusher: Option<&'a Flusher>,
    follower: Option<&'a Follower<'a>>,
    written: Mutex<HashMap<usize, Written>>,
}

/// Where a file goes.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    /// What errors name, and what is written if there is no sink.
    pub path: &'a Path,
    /// What a host has for it.
    pub sink: Option<&'a dyn WriteAt>,
}

/// What a host has, or a file that is not there until it is whole.
enum Sink<'a> {
    Host(&'a dyn WriteAt),
    File(AtomicFile),
}

impl Sink<'_> {
    fn get(&self) -> &dyn WriteAt {
        match self {
            Self::Host(sink) => *sink,
            Self::File(file) => file.file(),
        }
    }

    fn commit(self, path: &Path) -> Result<()> {
        match self {
            Self::Host(_) => Ok(()),
            Self::File(file) => file.commit(path),
        }
    }
}

/// What became of a module.
#[derive(Default)]
struct Written {
    rank: usize,
    alpha: f64,
    tensors: Vec<Place>,
}

/// Where a tensor is in the draft.
struct Place {
    name: String,
    dtype: FileDtype,
    shape: Vec<usize>,
    start: u64,
}

/// Writes an adapter as [`Adapter::save`] does, while `compute` finds the factors of its planned layers and at last its
/// metadata.
///
/// A planned rank is the highest that a layer may have. If all have it, and the metadata takes as much room as that of
/// `adapter`, the file is whole once the last factor is there; else it is written a second time, from the first. In both
/// cases it is, byte for byte, what saving the computed adapter writes.
pub(crate) fn save_while<T>(
    adapter: &Adapter,
    to: Output<'_>,
    options: &SaveOptions,
    control: &Control<'_>,
    compute: impl FnOnce(&Draft<'_>) -> Result<(T, BTreeMap<String, String>)>,
) -> Result<T> {
    let files = files_of(adapter);
    let unchanged = || files.iter().try_for_each(|file| file.check());
    blamed(written(adapter, to, options, control, compute, &unchanged), unchanged)
}

fn written<T>(
    adapter: &Adapter,
    Output { path, sink }: Output<'_>,
    options: &SaveOptions,
    control: &Control<'_>,
    compute: impl FnOnce(&Draft<'_>) -> Result<(T, BTreeMap<String, String>)>,
    unchanged: &dyn Fn() -> Result<()>,
) -> Result<T> {
    let failed = |e| write_error(path, e);
    let dtype = options.dtype.unwrap_or(adapter.dtype());
    let target = Target::new(adapter, options);
    let mut modules = modules(adapter, &target, dtype, options)?;
    let metadata = |modules: &[Module<'_>], own: &BTreeMap<String, String>, hash: &dyn Fn() -> _| {
        // What a file says may be wrong of what became of it; what was given in memory is meant to be written.
        let mut given = if adapter.0.file.is_none() { own.clone() } else { BTreeMap::new() };
        given.extend(options.metadata.clone());
        metadata::written(modules, target.spelling.format, adapter.family(), &given, hash)
    };
    let protect = protected(adapter, options);
    let first = match sink {
        Some(sink) => Sink::Host(sink),
        None => Sink::File(AtomicFile::create(path, options.overwrite, &protect)?),
    };
    let (planned, end, result, after, written, hashed) = {
        let mut tensors: Vec<_> = modules.iter().flat_map(|m| m.tensors(dtype)).collect();
        // Hashes are not known yet, but how long they are.
        let has_hash = Cell::new(false);
        let no_hash = || {
            has_hash.set(true);
            Ok("0".repeat(64))
        };
        let before = metadata(&modules, adapter.metadata(), &no_hash).map_err(failed)?;
        let layout = Layout::new(&before, &mut tensors).map_err(failed)?;
        first.get().set_size(layout.len()).map_err(failed)?;
        let flusher = match &first {
            Sink::File(file) => Some(Flusher::new(file, layout.len())),
            Sink::Host(_) => None,
        };
        let follower = match &first {
            Sink::File(file) if has_hash.get() => Follower::new(file.file(), &layout.places),
            _ => None,
        };
        let places = tensors.iter().map(|t| t.name.clone()).zip(layout.places.iter().cloned());
        let draft = Draft {
            path,
            file: first.get(),
            dtype,
            options,
            control,
            modules: &modules,
            planned: planned(&modules),
            places: places.collect(),
            end: layout.len().into(),
            waiting: Mutex::default(),
            flusher: flusher.as_ref(),
            follower: follower.as_ref(),
            written: Mutex::default(),
        };
        let (work, hash) = Follower::beside(follower.as_ref(), control, || {
            let (result, after) = compute(&draft)?;
            draft.finish().map(|(written, end)| (result, after, written, end))
        });
        let (result, after, written, end) = work?;
        flusher.map_or(Ok(()), Flusher::finish).map_err(failed)?;
        (layout, end, result, after, written, hash.map_err(failed)?)
    };

    for (module, written) in modules.iter_mut().zip(&written) {
        (module.rank, module.alpha) = (written.rank, written.alpha);
    }
    let mut tensors: Vec<_> =
        written.iter().flat_map(|w| &w.tensors).map(|place| place.tensor(first.get())).collect();
    TensorOut::sort(&mut tensors);
    // What was not planned is not in it.
    let hashed = hashed.filter(|_| tensors.len() == planned.places.len());
    let hash = || {
        let mut sha = hashed.clone().unwrap_or_default();
        if hashed.is_none() {
            tensors.iter().try_for_each(|t| (t.write)(&mut Hashing(&mut sha, control)))?;
        }
        Ok(crate::words::hex(sha.finalize().as_slice()))
    };
    let metadata = metadata(&modules, &after, &hash).map_err(failed)?;
    let layout = Layout::new(&metadata, &mut tensors).map_err(failed)?;
    if layout.places == planned.places {
        // What was written beyond the plan is not needed.
        let write =
            || first.get().set_size(layout.len()).and_then(|()| first.get().write_at(&layout.header, 0));
        write().map_err(failed)?;
        drop(tensors);
        control.check()?;
        unchanged()?;
        return first.commit(path).map(|()| result);
    }
    tracing::debug!("not all layers have the rank that was planned; writing the file again");
    let write = |file: &dyn WriteAt, start: u64| {
        file.set_size(start + layout.len())?;
        file.write_at(&layout.header, start)?;
        let all = tensors.par_iter().zip(&layout.places);
        all.try_for_each(|(t, place)| write_tensor(t, file, start + place.start, control))
    };
    match &first {
        Sink::Host(sink) => {
            // Behind the first, and then from there to the front.
            write(*sink, end).and_then(|()| moved_down(*sink, end, layout.len(), control)).map_err(failed)?;
            unchanged()
        }
        Sink::File(_) => {
            let second = AtomicFile::create(path, options.overwrite, &protect)?;
            write(second.file(), 0).map_err(failed)?;
            drop(tensors);
            drop(first);
            unchanged()?;
            second.commit(path)
        }
    }
    .map(|()| result)
}

/// Moves so many bytes from a place to the front, and ends there.
fn moved_down(sink: &dyn WriteAt, from: u64, bytes: u64, control: &Control<'_>) -> io::Result<()> {
    let mut buffer = vec![0; bytes.min(COPY as u64) as usize];
    for at in (0..bytes).step_by(COPY) {
        control.check().map_err(io::Error::other)?;
        let piece = &mut buffer[..(bytes - at).min(COPY as u64) as usize];
        sink.read_at(piece, from + at)?;
        sink.write_at(piece, at)?;
    }
    sink.set_size(bytes)
}

/// The files that its tensors come from.
fn files_of(adapter: &Adapter) -> Vec<&SafetensorsFile> {
    let tensors = adapter.layers().iter().flat_map(|layer| [&layer.a, &layer.b]);
    let files = tensors.filter_map(|tensor| match &tensor.data {
        TensorData::File(file, ..) => Some(file),
        _ => None,
    });
    let by_path: BTreeMap<_, _> = files.chain(&adapter.0.file).map(|file| (file.path(), file)).collect();
    by_path.into_values().collect()
}

/// Files that are not to be overwritten.
fn protected(adapter: &Adapter, options: &SaveOptions) -> Vec<PathBuf> {
    let files = files_of(adapter).into_iter().filter(|file| file.is_on_disk());
    let all: BTreeSet<_> =
        options.protect.iter().map(PathBuf::as_path).chain(files.map(|file| file.path())).collect();
    all.into_iter().map(Path::to_owned).collect()
}

/// The modules of layers that are not there yet.
fn planned<'a>(modules: &'a [Module<'a>]) -> BTreeMap<&'a LayerKey, usize> {
    let parts = modules.iter().enumerate().flat_map(|(i, module)| module.parts.iter().map(move |p| (i, p.1)));
    parts.filter(|(_, layer)| layer.a.is_planned()).map(|(i, layer)| (&layer.key, i)).collect()
}

impl Draft<'_> {
    /// The first byte of what is planned for a layer.
    pub fn start(&self, layer: &LayerKey) -> Option<u64> {
        let tensors = self.modules[*self.planned.get(layer)?].tensors(self.dtype);
        tensors.iter().filter_map(|t| self.places.get(&t.name)).map(|place| place.start).min()
    }

    /// Writes a layer that was planned. One that shares a module with others waits for them.
    ///
    /// # Errors
    /// [`Error::Layer`] for a layer that was not planned, or if a value is too large for the file's type; [`Error::Io`];
    /// [`Error::Cancelled`].
    pub fn put(&self, layer: Layer) -> Result<()> {
        let Some(&i) = self.planned.get(&layer.key) else {
            return Err(Error::layer(layer.name(), "was not planned"));
        };
        let lacking = self.modules[i].parts.iter().filter(|(_, layer)| layer.a.is_planned()).count();
        let layers = {
            let mut waiting = lock(&self.waiting);
            let layers = waiting.entry(i).or_default();
            layers.push(layer);
            if layers.len() < lacking {
                return Ok(());
            }
            waiting.remove(&i).unwrap_or_default()
        };
        let module = self.modules[i].with(&layers, self.dtype, self.options)?;
        self.write(i, &module)
    }

    /// Writes layers side by side; those that were not planned are there already.
    ///
    /// # Errors
    /// As of [`put`](Self::put).
    pub fn put_all(&self, layers: impl Iterator<Item = Layer>) -> Result<()> {
        let layers: Vec<Layer> = layers.filter(|layer| self.planned.contains_key(&layer.key)).collect();
        layers.into_par_iter().try_for_each(|layer| self.put(layer))
    }

    /// Writes what was there from the start; gives what became of every module, and where the last of them ends.
    fn finish(self) -> Result<(Vec<Written>, u64)> {
        let lacking: BTreeSet<usize> = self.planned.values().copied().collect();
        let rest = self.modules.par_iter().enumerate().filter(|(i, _)| !lacking.contains(i));
        rest.try_for_each(|(i, module)| self.write(i, module))?;
        let mut written = std::mem::take(&mut *lock(&self.written));
        let all = self.modules.iter().enumerate().map(|(i, module)| {
            written.remove(&i).ok_or_else(|| Error::layer(module.layer.name(), "was not computed"))
        });
        Ok((all.collect::<Result<_>>()?, self.end.into_inner()))
    }

    fn write(&self, i: usize, module: &Module<'_>) -> Result<()> {
        let mut tensors = Vec::new();
        for t in module.tensors(self.dtype) {
            let size = t.size() as u64;
            let start = match self.places.get(&t.name) {
                Some(place) if size <= place.end - place.start => place.start,
                _ => self.end.fetch_add(size, Ordering::Relaxed),
            };
            write_tensor(&t, self.file, start, self.control).map_err(|e| write_error(self.path, e))?;
            self.flusher.inspect(|flusher| flusher.wrote(size));
            self.follower.inspect(|follower| follower.wrote(start..start + size));
            let TensorOut { name, dtype, shape, .. } = t;
            tensors.push(Place { name, dtype, shape, start });
        }
        lock(&self.written).insert(i, Written { rank: module.rank, alpha: module.alpha, tensors });
        Ok(())
    }
}

impl Place {
    /// The tensor, read from the draft.
    fn tensor<'a>(&self, draft: &'a dyn WriteAt) -> TensorOut<'a> {
        let Self { name, dtype, shape, start } = self;
        let (start, size) = (*start, shape.iter().product::<usize>() * dtype.bitsize() / 8);
        let write = move |out: &mut dyn Write| {
            let mut buffer = vec![0; COPY.min(size)];
            (0..size).step_by(COPY).try_for_each(|at| {
                let piece = &mut buffer[..COPY.min(size - at)];
                draft.read_at(piece, start + at as u64)?;
                out.write_all(piece)
            })
        };
        TensorOut { name: name.clone(), dtype: *dtype, shape: shape.clone(), write: Box::new(write) }
    }
}

/// Bytes that are copied at a time.
pub(super) const COPY: usize = 1 << 20;

/// Writes a tensor to its place.
fn write_tensor(t: &TensorOut<'_>, file: &dyn WriteAt, start: u64, control: &Control<'_>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(BUFFER, At { file, next: start, control });
    (t.write)(&mut out)?;
    let At { next, .. } = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    t.check(next - start)
}

/// Writes to a place of a file, and ends with [`Error::Cancelled`] if it has to.
struct At<'a> {
    file: &'a dyn WriteAt,
    next: u64,
    control: &'a Control<'a>,
}

impl Write for At<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.control.check().map_err(io::Error::other)?;
        // In pieces, between which the call may be cancelled.
        let bytes = &bytes[..bytes.len().min(COPY)];
        self.file.write_at(bytes, self.next)?;
        self.next += bytes.len() as u64;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Hashing<'a>(&'a mut Sha256, &'a Control<'a>);

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.check().map_err(io::Error::other)?;
        self.0.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each guarded value is valid after every statement, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
