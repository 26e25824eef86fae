//! Safetensors files: a memory-mapped reader that checks everything before it hands out a slice, and a
//! streaming writer whose bytes depend on nothing but its arguments.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
pub use safetensors::Dtype as FileDtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::{Error, Result};

/// The limit of the reference implementation; a longer header means that this is another kind of file.
const MAX_HEADER: u64 = 100_000_000;

/// An open safetensors file. Cloning shares it.
#[derive(Clone)]
pub struct SafetensorsFile(Arc<Inner>);

struct Inner {
    path: PathBuf,
    on_disk: bool,
    data: Bytes,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    dtype: FileDtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

enum Bytes {
    Mapped(Mmap),
    Memory(Cow<'static, [u8]>),
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Memory(bytes) => bytes,
        }
    }
}

/// A tensor of a [`SafetensorsFile`].
#[derive(Clone, Copy)]
pub struct TensorRef<'a> {
    /// Its key.
    pub name: &'a str,
    /// Element type.
    pub dtype: FileDtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: &'a [usize],
    /// Little-endian elements, row-major, at any alignment.
    pub bytes: &'a [u8],
}

impl SafetensorsFile {
    /// Maps a file and checks its header. Pages of tensors are not touched.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "open", e))?;
        // Opening a pipe would block, and only a regular file can be mapped.
        if !meta.is_file() {
            return Err(Error::file(path, "is not a regular file; a .safetensors file is needed"));
        }
        if meta.len() == 0 {
            return Err(Error::file(path, "the file is empty; a .safetensors file is needed"));
        }
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        // SAFETY: the map is only read. If another process cuts the file short meanwhile, reading faults; that
        // is the price of every mapping, and this crate itself replaces files by renaming, never in place.
        let data = match unsafe { Mmap::map(&file) } {
            Ok(map) => Bytes::Mapped(map),
            // Some file systems cannot map.
            Err(_) => Bytes::Memory(std::fs::read(path).map_err(|e| Error::io(path, "read", e))?.into()),
        };
        Self::parse(path.to_owned(), true, data)
    }

    /// Reads a file that is in memory; `name` stands for its path in errors.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        Self::parse(name.into(), false, Bytes::Memory(bytes.into()))
    }

    /// Where the file is, or its name if it was never on disk.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether [`path`](Self::path) names a real file.
    pub fn is_on_disk(&self) -> bool {
        self.0.on_disk
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.0.data
    }

    /// The `__metadata__` of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.0.metadata
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorRef<'_>> {
        self.0.tensors.iter().map(|(name, entry)| self.tensor_ref(name, entry))
    }

    /// One tensor.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        self.0.tensors.get_key_value(name).map(|(name, entry)| self.tensor_ref(name, entry))
    }

    /// A header of the same tensors at the same places with other metadata, and after how many bytes of this file the
    /// tensors start.
    pub fn header_with(&self, metadata: &BTreeMap<String, String>) -> io::Result<(Vec<u8>, usize)> {
        let mut entries: Vec<_> = self.0.tensors.iter().collect();
        entries.sort_by_key(|(_, entry)| (entry.range.start, entry.range.end));
        let start = entries.first().map_or(self.0.data.len(), |(_, entry)| entry.range.start);
        let mut json = format!("{{\"__metadata__\":{}", serde_json::to_string(metadata)?);
        for (name, Entry { dtype, shape, range }) in entries {
            let data_offsets = (range.start - start, range.end - start);
            let info = TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets };
            json += &format!(",{}:{}", serde_json::to_string(name)?, serde_json::to_string(&info)?);
        }
        Ok((framed(json), start))
    }

    /// Where a tensor of this file is in it.
    pub fn place(&self, name: &str) -> Option<Range<usize>> {
        self.0.tensors.get(name).map(|entry| entry.range.clone())
    }

    fn tensor_ref<'a>(&'a self, name: &'a str, entry: &'a Entry) -> TensorRef<'a> {
        let bytes = &self.0.data[entry.range.clone()];
        TensorRef { name, dtype: entry.dtype, shape: &entry.shape, bytes }
    }

    fn parse(path: PathBuf, on_disk: bool, data: Bytes) -> Result<Self> {
        let fail = |reason: String| Err(Error::file(&path, reason));
        if data.is_empty() {
            return fail("the file is empty; a .safetensors file is needed".into());
        }
        // The length of a header may begin with these bytes as well.
        let pickle = data.starts_with(b"PK\x03\x04") || data.starts_with(b"\x80\x02");
        if pickle && data.get(8) != Some(&b'{') {
            return fail("is a PyTorch checkpoint (pickle); convert it to .safetensors first".into());
        }
        if data.starts_with(b"GGUF") {
            return fail(
                "is a GGUF file, whose quantised weights are not supported; a .safetensors file is needed"
                    .into(),
            );
        }
        let Some((head, body)) = data.split_first_chunk::<8>() else {
            return fail(
                "is not a safetensors file: it is shorter than the 8 bytes that every one starts with".into(),
            );
        };
        let length = u64::from_le_bytes(*head);
        if body.first().is_some_and(|&b| b != b'{') {
            return fail("is not a safetensors file: it does not start with a JSON header".into());
        }
        if length > MAX_HEADER {
            return fail(format!(
                "is not a safetensors file, or is damaged: its header would be {length} bytes long, and at most \
                 {MAX_HEADER} are allowed"
            ));
        }
        let length = length as usize;
        let Some((json, tensor_data)) = body.split_at_checked(length) else {
            return fail(format!(
                "the file is cut short: its header should be {length} bytes long, but only {} follow",
                body.len()
            ));
        };
        let header: Header = match serde_json::from_slice(json) {
            Ok(header) => header,
            Err(e) => return fail(format!("is not a safetensors file, or is damaged: in its header, {e}")),
        };

        let mut infos = header.tensors;
        infos.sort_by(|x, y| x.1.data_offsets.cmp(&y.1.data_offsets).then_with(|| x.0.cmp(&y.0)));
        let mut tensors = BTreeMap::new();
        let mut end = 0;
        for (name, info) in infos {
            let (start, stop) = info.data_offsets;
            let damaged = |reason: String| Err(Error::tensor(&path, &name, reason));
            let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, &d| n.checked_mul(d));
            let Some(size) = bits.filter(|b| b % 8 == 0).map(|b| b / 8) else {
                return damaged(format!("the shape {:?} makes no sense; the file is damaged", info.shape));
            };
            if stop.checked_sub(start) != Some(size) {
                return damaged(format!(
                    "{} {:?} takes {size} bytes, but its place is byte {start} to {stop}; the file is damaged",
                    info.dtype, info.shape
                ));
            }
            if start != end {
                return damaged(format!(
                    "starts at byte {start} of the data, but should start at byte {end}; the file is damaged"
                ));
            }
            if stop > tensor_data.len() {
                return fail(format!(
                    "the file is cut short: `{name}` ends at byte {stop} of the data, but only {} are there",
                    tensor_data.len()
                ));
            }
            end = stop;
            let offset = 8 + length;
            let entry = Entry { dtype: info.dtype, shape: info.shape, range: offset + start..offset + stop };
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::tensor(&path, &name, "is in the header twice; the file is damaged"));
            }
        }
        if end != tensor_data.len() {
            return fail(format!(
                "the header describes {end} bytes of data, but {} are there; the file is damaged",
                tensor_data.len()
            ));
        }
        Ok(Self(Arc::new(Inner { path, on_disk, data, metadata: header.metadata, tensors })))
    }
}

impl fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SafetensorsFile({}, {} tensors)", self.0.path.display(), self.0.tensors.len())
    }
}

/// The JSON header, with duplicate keys kept so that they can be refused.
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object that names tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header { metadata: BTreeMap::new(), tensors: Vec::new() };
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                    } else {
                        header.tensors.push((key, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Writes a tensor's bytes, as many as its shape asks for, and the same every time.
pub type WriteTensor<'a> = Box<dyn Fn(&mut dyn Write) -> io::Result<()> + Send + Sync + 'a>;

/// A tensor to be written.
pub struct TensorOut<'a> {
    /// Its key.
    pub name: String,
    /// Element type.
    pub dtype: FileDtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Writes its elements, little-endian.
    pub write: WriteTensor<'a>,
}

/// A file before its tensors are written.
pub struct Layout {
    /// What the file starts with: the header's length, and the header.
    pub header: Vec<u8>,
    /// Where each tensor is.
    pub places: Vec<Range<u64>>,
}

impl Layout {
    /// Lays tensors out widest element first (which keeps every one aligned) and then by name, as the reference
    /// implementation does, and puts them in that order.
    pub fn new(metadata: &BTreeMap<String, String>, tensors: &mut [TensorOut<'_>]) -> io::Result<Self> {
        TensorOut::sort(tensors);
        let mut names = BTreeSet::new();
        let mut json = format!("{{\"__metadata__\":{}", serde_json::to_string(metadata)?);
        let mut places = Vec::with_capacity(tensors.len());
        let mut offset = 0;
        for t in &*tensors {
            if !names.insert(&t.name) {
                return Err(io::Error::other(format!("two tensors would be named `{}`", t.name)));
            }
            let size = t.size();
            let data_offsets = (offset, offset + size);
            let info = TensorInfo { dtype: t.dtype, shape: t.shape.clone(), data_offsets };
            json += &format!(",{}:{}", serde_json::to_string(&t.name)?, serde_json::to_string(&info)?);
            places.push(offset as u64..(offset + size) as u64);
            offset += size;
        }
        let header = framed(json);
        let start = header.len() as u64;
        for place in &mut places {
            *place = place.start + start..place.end + start;
        }
        Ok(Self { header, places })
    }

    /// Bytes of the whole file.
    pub fn len(&self) -> u64 {
        self.places.last().map_or(self.header.len() as u64, |place| place.end)
    }
}

/// What a file starts with: the length of the header, which is all but closed, and the header, filled up so that what
/// follows is aligned.
fn framed(mut json: String) -> Vec<u8> {
    json.push('}');
    while !json.len().is_multiple_of(8) {
        json.push(' ');
    }
    [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat()
}

/// Streams a safetensors file.
pub fn write_safetensors(
    out: &mut dyn Write,
    metadata: &BTreeMap<String, String>,
    mut tensors: Vec<TensorOut<'_>>,
) -> io::Result<()> {
    let Layout { header, .. } = Layout::new(metadata, &mut tensors)?;
    out.write_all(&header)?;
    for t in &tensors {
        let mut counted = Counted { out, bytes: 0 };
        (t.write)(&mut counted)?;
        t.check(counted.bytes as u64)?;
    }
    Ok(())
}

impl TensorOut<'_> {
    /// Puts tensors in the order of a file.
    pub fn sort(tensors: &mut [Self]) {
        tensors.sort_by(|x, y| {
            (Reverse(x.dtype.bitsize()), &x.name).cmp(&(Reverse(y.dtype.bitsize()), &y.name))
        });
    }

    /// Bytes that it takes.
    pub fn size(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }

    /// Fails if this is not how many bytes were written.
    pub fn check(&self, bytes: u64) -> io::Result<()> {
        match (bytes, self.size()) {
            (bytes, size) if bytes == size as u64 => Ok(()),
            (bytes, size) => {
                Err(io::Error::other(format!("`{}` takes {size} bytes, got {bytes}", self.name)))
            }
        }
    }
}

struct Counted<'a> {
    out: &'a mut dyn Write,
    bytes: usize,
}

impl Write for Counted<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buf)?;
        self.bytes += n;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
