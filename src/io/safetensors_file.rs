//! Safetensors files: a reader that checks everything before it hands out a slice, and a streaming writer whose bytes
//! depend on nothing but its arguments.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

pub use safetensors::Dtype as FileDtype;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::source::ReadAt;
#[cfg(not(target_arch = "wasm32"))]
use super::{disk, source::FileSource};
use crate::{Error, Result};

/// The limit of the reference implementation; a longer header means that this is another kind of file.
const MAX_HEADER: u64 = 100_000_000;
// What follows bounds the memory and time that a header may ask for; real files are far below.
/// Tensors in a file.
pub(crate) const MAX_TENSORS: usize = 1 << 18;
/// Bytes in the name of a tensor.
pub(crate) const MAX_NAME: usize = 1024;
/// Dimensions of a tensor.
const MAX_DIMENSIONS: usize = 64;
/// Bytes of names and texts in the metadata, and how many there are.
const MAX_METADATA: (usize, usize) = (64 << 20, 1 << 16);

/// An open safetensors file. Cloning shares it.
#[derive(Clone)]
pub struct SafetensorsFile(Arc<Inner>);

struct Inner {
    path: PathBuf,
    on_disk: bool,
    source: Arc<dyn ReadAt>,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
    /// All of it, if it was asked for and the source does not have it in memory.
    whole: OnceLock<Vec<u8>>,
    /// What the first read failed with of which nobody could be told at once.
    failed: OnceLock<(io::ErrorKind, String)>,
}

struct Entry {
    dtype: FileDtype,
    shape: Vec<usize>,
    range: Range<u64>,
}

/// A tensor as the header has it. Offsets may be larger than what a machine of 32 bits can address.
#[derive(Serialize, Deserialize)]
struct TensorInfo {
    dtype: FileDtype,
    #[serde(deserialize_with = "shape")]
    shape: Vec<usize>,
    data_offsets: (u64, u64),
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
    file: &'a SafetensorsFile,
    range: (u64, u64),
}

impl<'a> TensorRef<'a> {
    /// The same elements in another shape.
    pub fn reshaped<'b>(self, shape: &'b [usize]) -> TensorRef<'b>
    where
        'a: 'b,
    {
        TensorRef { shape, ..self }
    }

    /// Little-endian elements, row-major, at any alignment; read, where they are not in memory or mapped.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be read.
    pub fn bytes(&self) -> Result<Cow<'a, [u8]>> {
        self.file.read(self.range.0..self.range.1)
    }
}

impl SafetensorsFile {
    /// Opens a file that the page has lent, and checks its header.
    #[cfg(target_arch = "wasm32")]
    pub fn open(path: &Path) -> Result<Self> {
        let source = super::atomic::find(path).map_err(|e| Error::io(path, "open", e))?;
        Self::parse(path.to_owned(), true, source)
    }

    /// Opens a file and checks its header. Tensors are not touched.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(path: &Path) -> Result<Self> {
        let meta = disk::metadata(path).map_err(|e| Error::io(path, "open", e))?;
        // Opening a pipe would block, and has no offsets.
        if !meta.is_file() {
            return Err(Error::file(path, "is not a regular file; a .safetensors file is needed"));
        }
        let source = FileSource::open(path).map_err(|e| Error::io(path, "open", e))?;
        Self::parse(path.to_owned(), true, Arc::new(source))
    }

    /// Reads a file that is in memory; `name` stands for its path in errors.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        Self::from_source(name, Arc::new(bytes.into()))
    }

    /// Opens what a host has; `name` stands for its path in errors.
    pub fn from_source(name: &str, source: Arc<dyn ReadAt>) -> Result<Self> {
        Self::parse(name.into(), false, source)
    }

    /// Where the file is, or its name if it was never on disk.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether [`path`](Self::path) names a real file.
    pub fn is_on_disk(&self) -> bool {
        self.0.on_disk
    }

    /// Bytes of the whole file.
    pub fn size(&self) -> u64 {
        self.0.source.size()
    }

    /// The whole file. Where it is not in memory or mapped, it is read at the first call, and kept.
    pub fn bytes(&self) -> Result<&[u8]> {
        if let Some(bytes) = self.0.source.bytes() {
            return Ok(bytes);
        }
        if self.0.whole.get().is_none() {
            let whole = self.read(0..self.size())?.into_owned();
            let _ = self.0.whole.set(whole);
        }
        Ok(self.0.whole.get().map_or(&[], Vec::as_slice))
    }

    /// Some of its bytes.
    pub fn read(&self, range: Range<u64>) -> Result<Cow<'_, [u8]>> {
        let read = match self.held(&range) {
            Some(bytes) => return Ok(Cow::Borrowed(bytes)),
            None => read(&*self.0.source, range),
        };
        read.map(Cow::Owned).map_err(|e| Error::io(self.path(), "read", e))
    }

    /// Some of its bytes, where they are in memory or mapped.
    fn held(&self, range: &Range<u64>) -> Option<&[u8]> {
        // What is mapped is addressed by a usize.
        self.0.source.bytes()?.get(range.start as usize..range.end as usize)
    }

    /// Bytes of a tensor, from its `start`th on, where they are in memory or mapped.
    pub fn held_of(&self, tensor: &str, start: usize, len: usize) -> Option<&[u8]> {
        self.held(&self.range_of(tensor, start, len)?)
    }

    /// Bytes of a tensor, from its `start`th on. If they cannot be read, they are those of NaN, and [`check`](Self::check)
    /// says why.
    pub fn read_of(&self, tensor: &str, start: usize, len: usize) -> Vec<u8> {
        let range = self.range_of(tensor, start, len).ok_or(io::ErrorKind::UnexpectedEof.into());
        range.and_then(|range| read(&*self.0.source, range)).unwrap_or_else(|e| {
            tracing::warn!(file = %self.path().display(), tensor, error = %e, "cannot read");
            let _ = self.0.failed.set((e.kind(), e.to_string()));
            vec![0xff; len]
        })
    }

    fn range_of(&self, tensor: &str, start: usize, len: usize) -> Option<Range<u64>> {
        let whole = &self.0.tensors.get(tensor)?.range;
        let start = whole.start + start as u64;
        (start + len as u64 <= whole.end).then(|| start..start + len as u64)
    }

    /// Fails if something of it could not be read, or if it has changed since it was opened. What was computed from it is
    /// worth nothing then.
    pub fn check(&self) -> Result<()> {
        let failed = self.0.failed.get().map(|(kind, text)| io::Error::new(*kind, text.clone()));
        failed.map_or_else(|| self.0.source.check(), Err).map_err(|e| Error::io(self.path(), "read", e))
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
    pub fn header_with(&self, metadata: &BTreeMap<String, String>) -> io::Result<(Vec<u8>, u64)> {
        let mut entries: Vec<_> = self.0.tensors.iter().collect();
        entries.sort_by_key(|(_, entry)| (entry.range.start, entry.range.end));
        let start = entries.first().map_or(self.size(), |(_, entry)| entry.range.start);
        let mut json = format!("{{\"__metadata__\":{}", serde_json::to_string(metadata)?);
        for (name, Entry { dtype, shape, range }) in entries {
            let data_offsets = (range.start - start, range.end - start);
            let info = TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets };
            json += &format!(",{}:{}", serde_json::to_string(name)?, serde_json::to_string(&info)?);
        }
        Ok((framed(json)?, start))
    }

    /// Where a tensor of this file is in it.
    pub fn place(&self, name: &str) -> Option<Range<u64>> {
        self.0.tensors.get(name).map(|entry| entry.range.clone())
    }

    fn tensor_ref<'a>(&'a self, name: &'a str, entry: &'a Entry) -> TensorRef<'a> {
        let range = (entry.range.start, entry.range.end);
        TensorRef { name, dtype: entry.dtype, shape: &entry.shape, file: self, range }
    }

    fn parse(path: PathBuf, on_disk: bool, source: Arc<dyn ReadAt>) -> Result<Self> {
        let fail = |reason: String| Err(Error::file(&path, reason));
        let size = source.size();
        if size == 0 {
            return fail("the file is empty; a .safetensors file is needed".into());
        }
        let get = |range: Range<u64>| match source.bytes() {
            Some(bytes) => Ok(Cow::Borrowed(&bytes[range.start as usize..range.end as usize])),
            None => read(&*source, range).map(Cow::Owned).map_err(|e| Error::io(&path, "read", e)),
        };
        let data = get(0..size.min(9))?;
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
        let Some(data) = (size - 8).checked_sub(length) else {
            return fail(format!(
                "the file is cut short: its header should be {length} bytes long, but only {} follow",
                size - 8
            ));
        };
        let json = get(8..8 + length)?;
        let header: Header = match serde_json::from_slice(&json) {
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
            let bits =
                info.shape.iter().try_fold(info.dtype.bitsize() as u64, |n, &d| n.checked_mul(d as u64));
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
            if stop > data {
                return fail(format!(
                    "the file is cut short: `{name}` ends at byte {stop} of the data, but only {data} are there"
                ));
            }
            end = stop;
            let offset = 8 + length;
            let entry = Entry { dtype: info.dtype, shape: info.shape, range: offset + start..offset + stop };
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::tensor(&path, &name, "is in the header twice; the file is damaged"));
            }
        }
        if end != data {
            return fail(format!(
                "the header describes {end} bytes of data, but {data} are there; the file is damaged"
            ));
        }
        drop(json);
        let (metadata, whole, failed) = (header.metadata, OnceLock::new(), OnceLock::new());
        Ok(Self(Arc::new(Inner { path, on_disk, source, metadata, tensors, whole, failed })))
    }
}

/// Some bytes of a source.
fn read(source: &dyn ReadAt, range: Range<u64>) -> io::Result<Vec<u8>> {
    let len = usize::try_from(range.end - range.start).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len)?;
    bytes.resize(len, 0);
    source.read_at(&mut bytes, range.start)?;
    Ok(bytes)
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
                        header.metadata = map.next_value::<Option<Metadata>>()?.unwrap_or_default().0;
                        continue;
                    }
                    if let Some(reason) = too_many(header.tensors.len() + 1).or_else(|| too_long(&key)) {
                        return Err(A::Error::custom(reason));
                    }
                    header.tensors.push((key, map.next_value()?));
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// The `__metadata__` of a header.
#[derive(Default)]
struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MetadataVisitor;
        impl<'de> Visitor<'de> for MetadataVisitor {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let (mut all, mut before) = (BTreeMap::new(), (0, 0));
                while let Some(key) = map.next_key_seed(Text { before })? {
                    before = (before.0 + 1, before.1 + key.len());
                    let text = map.next_value_seed(Text { before })?;
                    before.1 += text.len();
                    all.insert(key, text);
                }
                Ok(Metadata(all))
            }
        }
        deserializer.deserialize_map(MetadataVisitor)
    }
}

/// A name or a text of metadata, which is not copied if it is too much with what came before it: texts, and bytes.
struct Text {
    before: (usize, usize),
}

impl<'de> DeserializeSeed<'de> for Text {
    type Value = String;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Text {
    type Value = String;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }
    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<String, E> {
        match too_much(self.before.0, self.before.1 + text.len()) {
            Some(reason) => Err(E::custom(reason)),
            None => Ok(text.to_owned()),
        }
    }
}

/// Dimensions of a tensor.
fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    struct ShapeVisitor;
    impl<'de> Visitor<'de> for ShapeVisitor {
        type Value = Vec<usize>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array of dimensions")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut all: A) -> Result<Vec<usize>, A::Error> {
            let mut shape = Vec::new();
            while let Some(dimension) = all.next_element()? {
                if shape.len() == MAX_DIMENSIONS {
                    return Err(A::Error::custom(format!(
                        "a shape of more than {MAX_DIMENSIONS} dimensions"
                    )));
                }
                shape.push(dimension);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(ShapeVisitor)
}

/// Why a file may not hold so many tensors.
fn too_many(tensors: usize) -> Option<String> {
    (tensors > MAX_TENSORS)
        .then(|| format!("more than {MAX_TENSORS} tensors, which is the most that is allowed"))
}

/// Why metadata may not hold so many texts, of so many bytes.
fn too_much(texts: usize, bytes: usize) -> Option<String> {
    let (most_bytes, most) = MAX_METADATA;
    (bytes > most_bytes || texts > most)
        .then(|| format!("`__metadata__` holds more than {most} texts, or more than {most_bytes} bytes"))
}

/// Why a tensor may not have a name.
fn too_long(name: &str) -> Option<String> {
    (name.len() > MAX_NAME).then(|| {
        let start: String = name.chars().take(60).collect();
        format!(
            "the name of a tensor, `{start}...`, is {} bytes long, and at most {MAX_NAME} are allowed",
            name.len()
        )
    })
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
        // What is written can be read again.
        let texts = metadata.iter().map(|(key, text)| key.len() + text.len()).sum();
        let refused = too_many(tensors.len())
            .or_else(|| tensors.iter().find_map(|t| too_long(&t.name)))
            .or_else(|| too_much(metadata.len(), texts));
        if let Some(reason) = refused {
            return Err(io::Error::other(reason));
        }
        let mut names = BTreeSet::new();
        let mut json = format!("{{\"__metadata__\":{}", serde_json::to_string(metadata)?);
        let mut places = Vec::with_capacity(tensors.len());
        let mut offset = 0;
        for t in &*tensors {
            if !names.insert(&t.name) {
                return Err(io::Error::other(format!("two tensors would be named `{}`", t.name)));
            }
            let size = t.size();
            let data_offsets = (offset, offset + size as u64);
            let info = TensorInfo { dtype: t.dtype, shape: t.shape.clone(), data_offsets };
            json += &format!(",{}:{}", serde_json::to_string(&t.name)?, serde_json::to_string(&info)?);
            places.push(offset..offset + size as u64);
            offset += size as u64;
        }
        let header = framed(json)?;
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
fn framed(mut json: String) -> io::Result<Vec<u8>> {
    json.push('}');
    while !json.len().is_multiple_of(8) {
        json.push(' ');
    }
    let length = json.len() as u64;
    if length > MAX_HEADER {
        let reason = format!("its header would be {length} bytes long, and at most {MAX_HEADER} are allowed");
        return Err(io::Error::other(reason));
    }
    Ok([&length.to_le_bytes()[..], json.as_bytes()].concat())
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
