//! What a LoRA file is: key grammar, scales and layers; reading, writing, converting.
//!
//! An [`Adapter`] is a sorted list of [`Layer`]s, each a low-rank update `ΔW = scale · B · A` of one module, linear or a
//! convolution. Tensors stay in the mapped file until they are asked for. Modules that one spelling fuses (q, k and v)
//! are read as several layers, and so different spellings of a [`Family`] match layer by layer. LoHa and LoKr become
//! LoRAs, DoRA with the base model's weights; every other kind of adapter is refused by name.

mod blocks;
mod draft;
mod families;
mod follower;
mod fuse;
mod hash;
mod keys;
mod loaders;
mod metadata;
mod norm;
mod other;
mod read;
mod scale;
mod spelling;
mod weights;
mod write;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;

pub use self::blocks::{BlockPreset, Strengths};
pub(crate) use self::draft::{Draft, Output, save_while};
pub use self::families::Family;
use self::families::{Fused, Names};
pub(crate) use self::fuse::{stack, stacked_rank, unstack};
pub use self::keys::LayerKey;
pub use self::loaders::{Loader, NotTaken};
pub use self::read::OpenOptions;
pub(crate) use self::read::f8;
pub use self::scale::{Scale, ScaleRule};
use self::spelling::{Spelling, Usual};
pub(crate) use self::weights::{Inventory, Part, Weight, layers_of_weight};
pub use self::write::{SaveOptions, Unnamed};
pub use crate::io::atomic::{check_target, remove_temporary_files, same_file};
use crate::io::safetensors_file::SafetensorsFile;
use crate::io::spill::Values;
pub use crate::io::write_atomic;
use crate::io::{disk, resting_on};
use crate::{Control, Dtype, Error, Matrix, RawMatrix, ReadAt, Result, WriteAt};

/// The name of the tensors' file in a PEFT folder.
const PEFT_MODEL: &str = "adapter_model.safetensors";
/// The name of the configuration in a PEFT folder.
const PEFT_CONFIG: &str = "adapter_config.json";

/// How keys are spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Format {
    /// diffusers and PEFT: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`.
    Peft,
    /// kohya: `lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight`; names are those that kohya's trainers use
    /// for the family, such as `lora_unet_double_blocks_0_img_attn_qkv` for FLUX.
    Kohya,
    /// ComfyUI: `diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight`; names are those of the model's own code.
    Comfyui,
    /// The model's own names without a prefix: `double_blocks.0.img_attn.qkv.lora_A.weight`.
    Bfl,
    /// XLabs' attention processors of FLUX.1: `double_blocks.0.processor.qkv_lora1.down.weight`.
    Xlabs,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Peft, Self::Kohya, Self::Comfyui, Self::Bfl, Self::Xlabs];

    /// The name used on the command line: `peft`, `kohya`, `comfyui`, `bfl`, `xlabs`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Peft => "peft",
            Self::Kohya => "kohya",
            Self::Comfyui => "comfyui",
            Self::Bfl => "bfl",
            Self::Xlabs => "xlabs",
        }
    }

    fn of(prefix: &str, module: &str, names: Option<Names>) -> Self {
        if !module.contains('.') && (prefix.starts_with("lora_") || prefix.starts_with("lycoris_")) {
            Self::Kohya
        } else if prefix.contains("diffusion_model.") || prefix.starts_with("text_encoders.") {
            Self::Comfyui
        } else if names == Some(Names::Xlabs) {
            Self::Xlabs
        } else if prefix.is_empty() && names == Some(Names::Native) {
            Self::Bfl
        } else {
            Self::Peft
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A LoRA adapter. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Adapter(Arc<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    name: String,
    path: PathBuf,
    format: Format,
    usual: Option<Usual>,
    metadata: BTreeMap<String, String>,
    layers: Vec<Layer>,
    /// What the user should know about how it was read.
    notes: Vec<String>,
    file: Option<SafetensorsFile>,
    /// Reading all of A takes time, and calibrations and merges ask for it.
    a_sha256: OnceLock<String>,
}

/// An adapter and how strongly it takes part in a merge.
#[derive(Clone, Copy, Debug)]
pub struct Weighted<'a> {
    /// The adapter.
    pub adapter: &'a Adapter,
    /// The factor on its whole update; may be negative.
    pub strength: f64,
}

impl Adapter {
    /// Opens a `.safetensors` file or a PEFT folder (`adapter_model.safetensors` and `adapter_config.json`).
    ///
    /// Checks the header and reads alphas; the other tensors stay untouched in the mapped file. A file called
    /// `adapter_model.safetensors` is read with the `adapter_config.json` beside it, if there is one.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, &OpenOptions::default())
    }

    /// As [`open`](Self::open), with what other kinds of adapters take.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::Layer`] for LoHa or LoKr of too high a rank, or if the base model lacks a module's
    /// weights; [`Error::Tensor`] for what cannot be merged.
    pub fn open_with(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let folder = path.is_dir();
        let model = if folder { path.join(PEFT_MODEL) } else { path.to_owned() };
        if folder && !model.exists() {
            return Err(Error::file(
                path,
                format!(
                    "the folder holds no `{PEFT_MODEL}`; name a .safetensors file or a folder that PEFT saved"
                ),
            ));
        }
        let file = SafetensorsFile::open(&model)?;
        let config = model.with_file_name(PEFT_CONFIG);
        let text = if !folder && model.file_name() != Some(PEFT_MODEL.as_ref()) {
            None
        } else {
            match disk::read_to_string(&config) {
                Ok(text) => Some(text),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && !folder => None,
                // Guessing alpha would scale every layer wrongly without a word.
                Err(e) => return Err(Error::io(&config, "read the adapter's alpha from it", e)),
            }
        };
        let stem = if folder { path.canonicalize().ok() } else { None };
        let stem = stem.as_deref().unwrap_or(path);
        let stem = if folder { stem.file_name() } else { stem.file_stem() };
        let name = stem.unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Self::from_file(name, file, text.as_deref().map(|text| (config.as_path(), text)), options)
    }

    /// Reads a `.safetensors` file that is in memory, without copying it: `include_bytes!(..)` or a `Vec<u8>`.
    /// `name` stands for the file in errors.
    pub fn from_bytes(name: impl Into<String>, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        Self::from_bytes_with(name, bytes, &OpenOptions::default())
    }

    /// As [`from_bytes`](Self::from_bytes), with what other kinds of adapters take.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with).
    pub fn from_bytes_with(
        name: impl Into<String>,
        bytes: impl Into<Cow<'static, [u8]>>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let name = name.into();
        let file = SafetensorsFile::from_bytes(&name, bytes)?;
        Self::from_file(name, file, None, options)
    }

    /// Opens a `.safetensors` file that a host has, in an archive of its own or in a browser. Its header is read at once,
    /// factors when they are needed; merges, norms and hashes keep few of them at a time. `name` stands for the file in
    /// errors.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with). If a factor cannot be read later, what was asked for fails with [`Error::Io`].
    pub fn from_source(
        name: impl Into<String>,
        source: Arc<dyn ReadAt>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let name = name.into();
        let file = SafetensorsFile::from_source(&name, source)?;
        Self::from_file(name, file, None, options)
    }

    /// The same file, read with these options; one that is in memory has no `adapter_config.json`. An adapter that was made
    /// of layers stays as it is.
    ///
    /// # Errors
    /// As [`open_with`](Self::open_with).
    pub fn read_with(&self, options: &OpenOptions) -> Result<Self> {
        match &self.0.file {
            Some(file) => Self::from_file(self.0.name.clone(), file.clone(), None, options),
            None => Ok(self.clone()),
        }
    }

    /// The bytes of the file that it was read from; `None` if it was made of layers. Where the file is neither in memory nor
    /// mapped, they are read at the first call, and kept.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be read.
    pub fn file_bytes(&self) -> Result<Option<&[u8]>> {
        self.0.file.as_ref().map(SafetensorsFile::bytes).transpose()
    }

    /// Fails if its file could not be read, or has changed since it was opened. What was computed of it is to be thrown
    /// away then.
    pub(crate) fn check_file(&self) -> Result<()> {
        self.0.file.as_ref().map_or(Ok(()), SafetensorsFile::check)
    }

    fn from_file(
        name: String,
        file: SafetensorsFile,
        config: Option<(&Path, &str)>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let read::Read { layers, notes } = resting_on(read::read(&file, config, options), || file.check())?;
        tracing::info!(file = %file.path().display(), layers = layers.len(), "read an adapter");
        // Text encoders come in fewer spellings; the main model's layers tell more.
        let main = layers.iter().find(|l| l.key.component().is_empty()).or(layers.first());
        let format = main.and_then(Layer::format).unwrap_or(Format::Peft);
        Ok(Self(Arc::new(Inner {
            name,
            path: file.path().to_owned(),
            format,
            usual: Usual::of(&layers, format),
            metadata: file.metadata().clone(),
            layers,
            notes,
            file: Some(file),
            a_sha256: OnceLock::new(),
        })))
    }

    /// An adapter of layers in memory, such as the result of a merge. Sorts them, and refuses two of one name.
    pub fn new(name: impl Into<String>, format: Format, mut layers: Vec<Layer>) -> Result<Self> {
        let name = name.into();
        if layers.is_empty() {
            return Err(Error::Invalid(format!("adapter `{name}`: an adapter needs at least one layer")));
        }
        layers.sort_by(|x, y| x.key.cmp(&y.key));
        if let Some(pair) = layers.windows(2).find(|pair| pair[0].key == pair[1].key) {
            let others = format!(
                "adapter `{name}` holds it twice, as `{}{}` and `{}{}`",
                pair[0].prefix, pair[0].module, pair[1].prefix, pair[1].module
            );
            return Err(Error::layer(pair[0].name(), others));
        }
        let path = PathBuf::from(&name);
        Ok(Self(Arc::new(Inner {
            name,
            path,
            format,
            usual: Usual::of(&layers, format),
            metadata: BTreeMap::new(),
            layers,
            notes: Vec::new(),
            file: None,
            a_sha256: OnceLock::new(),
        })))
    }

    /// The name of the file without its extension, or of the PEFT folder.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The file that holds the tensors (in a PEFT folder, the one in it), or the name if there is none.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// How the file spells its keys.
    pub fn format(&self) -> Format {
        self.0.format
    }

    /// The type that holds every tensor's values: the one that they share, else f32.
    pub fn dtype(&self) -> Dtype {
        let layers = self.layers().iter().map(Layer::dtype);
        layers.reduce(Dtype::common).unwrap_or(Dtype::F32)
    }

    /// The metadata of the file's header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.0.metadata
    }

    /// The same layers, as an adapter in memory with this metadata, which [`save`](Self::save) writes.
    pub fn with_metadata(&self, metadata: BTreeMap<String, String>) -> Self {
        Self(Arc::new(Inner { metadata, file: None, a_sha256: OnceLock::new(), ..(*self.0).clone() }))
    }

    /// The same layers, to be spelled as another adapter is.
    pub fn spelled_like(&self, other: &Self) -> Self {
        let Inner { format, usual, .. } = &*other.0;
        Self(Arc::new(Inner { format: *format, usual: usual.clone(), ..(*self.0).clone() }))
    }

    /// The same adapter with the scale of each layer multiplied by its strength.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a strength that is not finite, a pattern that no layer's name matches, or a list of blocks
    /// that the family does not have.
    pub fn with_strengths(&self, strengths: &Strengths) -> Result<Self> {
        let (layers, note) = strengths.apply(self)?;
        let notes = self.0.notes.iter().cloned().chain(note).collect();
        Ok(Self(Arc::new(Inner { layers, notes, ..(*self.0).clone() })))
    }

    /// What the user should know about how the file was read: what was truncated, and what it lost.
    pub fn notes(&self) -> &[String] {
        &self.0.notes
    }

    /// The model that it is for, as far as its layers tell.
    pub fn family(&self) -> Family {
        let known = self.layers().iter().map(|layer| layer.family).filter(|f| *f != Family::UNKNOWN);
        known.reduce(Family::and).unwrap_or_default()
    }

    /// The layers, sorted by key.
    pub fn layers(&self) -> &[Layer] {
        &self.0.layers
    }

    /// The layer of this key.
    pub fn layer(&self, key: &LayerKey) -> Option<&Layer> {
        let i = self.layers().binary_search_by(|layer| layer.key.cmp(key)).ok()?;
        self.layers().get(i)
    }

    /// The layer of this module, in any spelling.
    pub fn find(&self, name: &str) -> Option<&Layer> {
        self.layer(&self.family().key(name)).or_else(|| self.layer(&LayerKey::parse(name)))
    }

    /// The adapter at a strength, for a merge.
    pub fn at(&self, strength: f64) -> Weighted<'_> {
        Weighted { adapter: self, strength }
    }

    /// Reads every value and refuses NaN and infinity.
    pub fn check_finite(&self) -> Result<()> {
        self.check_finite_with(&Control::default())
    }

    pub(crate) fn check_finite_with(&self, control: &Control<'_>) -> Result<()> {
        let check = |layer: &Layer| control.check().and_then(|()| self.check_layer(&layer.unread())).err();
        let first = self.layers().par_iter().filter_map(check).find_first(|_| true);
        resting_on(first.map_or(Ok(()), Err), || self.check_file())
    }

    /// Refuses NaN and infinity in one of the layers, which keeps what is read of it.
    pub(crate) fn check_layer(&self, layer: &Layer) -> Result<()> {
        let first = |tensor| Some((tensor, Tensor::raw(tensor).first_non_finite()?));
        let Some((tensor, i)) = [&layer.a, &layer.b].into_iter().find_map(first) else { return Ok(()) };
        let raw = tensor.raw();
        let size = raw.dtype().size();
        let element = RawMatrix::within(raw.dtype(), 1, 1, &raw.bytes()[i * size..]);
        let value = element.to_vec::<f32>()[0];
        let (row, col) = (i / raw.cols() + tensor.first_row(), i % raw.cols());
        let i = row * raw.cols() + col;
        let reason = format!("element {i} (row {row}, column {col}) is {value}; every value must be finite");
        Err(Error::tensor(tensor.path().unwrap_or(self.path()), &tensor.key, reason))
    }

    /// SHA-256 (hex) of what a calibration depends on: for each layer in order of its key, the key (its length
    /// as u64 in front), the rank and the width (u64), and then, again for each layer, the values of A widened
    /// to f32; all little-endian. So the same A gives the same hash in every spelling of the keys and in every
    /// dtype that holds its values, and scales and B do not matter.
    pub fn a_sha256(&self) -> String {
        self.0.a_sha256.get_or_init(|| hash::of_a(self)).clone()
    }

    /// Whether it is a file's, and so has a [hash](Self::file_sha256).
    pub(crate) fn has_file(&self) -> bool {
        self.0.file.is_some()
    }

    /// SHA-256 (hex) of the whole file. An adapter that was made in memory has none.
    pub fn file_sha256(&self) -> Result<String> {
        self.file_sha256_with(&Control::default())
    }

    pub(crate) fn file_sha256_with(&self, control: &Control<'_>) -> Result<String> {
        match &self.0.file {
            Some(file) => hash::of_file(file, control),
            None => Err(Error::Invalid(format!("adapter `{}` does not come from a file", self.name()))),
        }
    }

    /// Writes the adapter as a `.safetensors` file, whole or not at all. An existing file is refused unless
    /// [`SaveOptions::overwrite`] is set; files that this adapter's tensors come from are never overwritten.
    ///
    /// A scale is folded into B where that rounds nothing. Elsewhere kohya's and ComfyUI's spelling write it as
    /// alpha, and PEFT's, which has no place for it, writes B in f32 (or rounds, if a dtype is asked for).
    pub fn save(&self, path: impl AsRef<Path>, options: &SaveOptions) -> Result<()> {
        self.save_with(path, options, Control::default())
    }

    /// As [`save`](Self::save), with cancellation.
    pub fn save_with(
        &self,
        path: impl AsRef<Path>,
        options: &SaveOptions,
        control: Control<'_>,
    ) -> Result<()> {
        let to = Output { path: path.as_ref(), sink: None };
        save_while(self, to, options, &control, |_| Ok(((), self.0.metadata.clone())))
    }

    /// As [`save_with`](Self::save_with), to what a host has. `name` stands for it in errors.
    /// [`SaveOptions::overwrite`] and [`SaveOptions::protect`] are of no account.
    ///
    /// # Errors
    /// As of [`save`](Self::save). What was written is to be thrown away then.
    pub fn save_to(
        &self,
        name: &str,
        sink: &dyn WriteAt,
        options: &SaveOptions,
        control: Control<'_>,
    ) -> Result<()> {
        let to = Output { path: Path::new(name), sink: Some(sink) };
        save_while(self, to, options, &control, |_| Ok(((), self.0.metadata.clone())))
    }
}

/// The low-rank update of one module: `ΔW = scale · B · A`. Cloning shares the tensors.
///
/// A convolution is the matrix of its outputs and of its inputs at every place of the kernel: A is
/// rank x (inputs · kernel), and its shape comes back when it is written.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The name that it is matched by.
    pub(crate) key: LayerKey,
    /// The module's path as the file spells it, without the prefix; of a part of a fused module, as diffusers does.
    pub(crate) module: String,
    /// What stands before the module's path in the file: `transformer.`, `lora_unet_`, ...
    pub(crate) prefix: String,
    /// Rows of A and columns of B.
    pub(crate) rank: usize,
    /// Columns of A: the width that the module reads.
    pub(crate) input: usize,
    /// Rows of B: the width that the module writes.
    pub(crate) output: usize,
    /// The factor on `B · A`.
    pub(crate) scale: Scale,
    family: Family,
    spelling: Option<Arc<Spelling>>,
    /// Whether an inventory knows the module.
    known: bool,
    /// Whether the file has the halves of B's rows the other way round.
    swapped: bool,
    part: Option<PartOf>,
    kernel: Option<Kernel>,
    a: Tensor,
    b: Tensor,
}

/// Which part of a fused module a layer is in its file.
#[derive(Clone, Debug)]
struct PartOf {
    /// Path of the fused module as the file spells it, without the prefix.
    module: Arc<str>,
    index: usize,
    fused: &'static Fused,
}

/// The shapes of a convolution's factors beyond that of matrices.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kernel {
    /// The kernel: A is [rank, inputs, kernel...].
    dims: Vec<usize>,
    /// How many ones follow in the shape of B.
    ones: usize,
}

impl Layer {
    /// A layer at scale 1 of the module of this name, in any spelling.
    pub fn new(module: &str, a: Matrix<f32>, b: Matrix<f32>) -> Result<Self> {
        let (_, len) = keys::prefix(module);
        let (prefix, path) = module.split_at(len);
        let (rank, input, output) = (a.rows, a.cols, b.rows);
        if rank != b.cols {
            let b_shape = format!("B is {} x {}", b.rows, b.cols);
            return Err(Error::layer(
                module,
                format!("A is {rank} x {input} but {b_shape}; the ranks differ"),
            ));
        }
        if rank == 0 || input == 0 || output == 0 {
            let shapes = format!("A is {rank} x {input} and B is {output} x {rank}");
            return Err(Error::layer(module, format!("{shapes}; no dimension may be zero")));
        }
        for (m, name) in [(&a, "A"), (&b, "B")] {
            if m.rows.checked_mul(m.cols) != Some(m.data.len()) {
                return Err(Error::layer(module, format!("{name} does not hold rows x columns values")));
            }
        }
        let bare = keys::Bare::parse(module);
        let widths = (input, output);
        let clue = families::Clue { component: &bare.component, prefix, flat: &bare.flat, widths };
        let family = families::recognise(&[clue], &BTreeMap::new()).family;
        let found = family.module(&bare.component, &bare.flat, Some(widths), None);
        let key = bare.key(found.as_ref().map_or(&bare.flat, |found| &found.key));
        let names = found.as_ref().and_then(|found| found.names);
        // A bare name is of no file, but for those that only the model's own code has.
        let native = matches!(names, Some(Names::Native | Names::Xlabs));
        let spelling =
            (len > 0 || native).then(|| Arc::new(Spelling::standard(Format::of(prefix, path, names), names)));
        let (a, b) = (
            Tensor::of(a, format!("{module}.lora_A.weight")),
            Tensor::of(b, format!("{module}.lora_B.weight")),
        );
        Ok(Self {
            key,
            module: path.to_owned(),
            prefix: prefix.to_owned(),
            rank,
            input,
            output,
            scale: Scale::given(1.0),
            family,
            spelling,
            known: found.is_some(),
            swapped: false,
            part: None,
            kernel: None,
            a,
            b,
        })
    }

    /// A layer at scale 1 with new factors, in place of this one: of the same module, spelled the same way.
    pub fn replaced(&self, a: Matrix<f32>, b: Matrix<f32>) -> Result<Self> {
        let new = Self::new(&format!("{}{}", self.prefix, self.module), a, b)?;
        let Self { rank, input, output, scale, a, b, .. } = new;
        // Widths are the module's own, but for callers that know better.
        let kernel = self.kernel.clone().filter(|_| input == self.input);
        Ok(Self { rank, input, output, scale, a, b, kernel, ..self.clone() })
    }

    /// The layer that [`replaced`](Self::replaced) will give, without its factors: a place in a [`Draft`]. Layers of one
    /// `group` that is not zero will share their A.
    pub(crate) fn planned(&self, rank: usize, group: usize) -> Self {
        let tensor = |old: &Tensor, rows, cols, group| Tensor {
            dtype: Dtype::F32,
            rows,
            cols,
            key: old.key.clone(),
            data: TensorData::Planned(group),
        };
        let (a, b) = (tensor(&self.a, rank, self.input, group), tensor(&self.b, self.output, rank, 0));
        Self { rank, scale: Scale::given(1.0), a, b, ..self.clone() }
    }

    /// The same layer, which keeps nothing of what it reads for longer than it lives itself.
    pub(crate) fn unread(&self) -> Self {
        Self { a: self.a.unread(), b: self.b.unread(), ..self.clone() }
    }

    /// The layer's name for people: the module as the file spells it, without the prefix; of a text encoder,
    /// with the encoder's name in front. [`LayerKey::parse`] gives the key back.
    pub fn name(&self) -> String {
        match self.key.component() {
            "" => self.module.clone(),
            component => format!("{component}.{}", self.module),
        }
    }

    /// The name that it is matched by.
    pub fn key(&self) -> &LayerKey {
        &self.key
    }

    /// The module's path as the file spells it, without the prefix; of a part of a fused module, as diffusers does.
    pub fn module(&self) -> &str {
        &self.module
    }

    /// What stands before the module's path in the file: `transformer.`, `lora_unet_`, ...
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Rows of A and columns of B.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Columns of A: the width that the module reads.
    pub fn input(&self) -> usize {
        self.input
    }

    /// Rows of B: the width that the module writes.
    pub fn output(&self) -> usize {
        self.output
    }

    /// The factor on `B · A`.
    pub fn scale(&self) -> Scale {
        self.scale
    }

    /// Whether the module is one that some model family is known to have.
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// Inputs and outputs.
    fn widths(&self) -> families::Widths {
        (self.input, self.output)
    }

    /// The path of its module in the file, without the prefix; of a part of a fused module, of the whole.
    fn path_in_file(&self) -> &str {
        self.part.as_ref().map_or(&self.module, |part| &part.module)
    }

    /// The name of its module in the file, prefix included.
    fn key_in_file(&self) -> String {
        format!("{}{}", self.prefix, self.path_in_file())
    }

    /// The same tensors, untouched, at another scale.
    pub fn with_scale(&self, scale: f64) -> Self {
        Self { scale: Scale::given(scale), ..self.clone() }
    }

    /// The factor that reads the module's input: rank x input.
    pub fn a(&self) -> RawMatrix<'_> {
        self.a.raw()
    }

    /// The factor that writes the module's output: output x rank.
    pub fn b(&self) -> RawMatrix<'_> {
        self.b.raw()
    }

    /// The type that holds the values of both factors.
    pub fn dtype(&self) -> Dtype {
        self.a.dtype.common(self.b.dtype)
    }

    /// How the file that the layer comes from spells it, if it comes from one.
    pub fn format(&self) -> Option<Format> {
        self.spelling.as_ref().map(|spelling| spelling.format)
    }

    /// The model that it is for, as far as its file tells.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The kernel of a convolution, empty for a linear module.
    pub fn kernel(&self) -> &[usize] {
        self.kernel.as_ref().map_or(&[], |kernel| &kernel.dims)
    }

    /// The module that fuses this one with others in the file, as the file spells it.
    pub fn fused_in(&self) -> Option<&str> {
        self.part.as_ref().map(|part| &*part.module)
    }

    /// Whether the layer's name, in diffusers' spelling, its file's or the model's own, is of this pattern: `*` stands for
    /// anything, dots and underscores are one.
    pub fn matches(&self, pattern: &str) -> bool {
        let (component, key) = (self.key.component(), self.key.flat());
        let native = self.family.place(component, key, Format::Comfyui, None, self.widths());
        let native = native.ok().map(|place| place.path);
        let fused = self.fused_in().map(str::to_owned);
        let names = [Some(self.key.as_str().to_owned()), Some(self.name()), fused, native];
        names.iter().flatten().any(|name| keys::matches(pattern, name))
    }
}

/// The first of the layers that is spelled with dots.
pub(crate) fn dotted<'a>(mut layers: impl Iterator<Item = &'a Layer>) -> Option<&'a Layer> {
    layers.find(|layer| layer.module.contains('.'))
}

/// A factor, in a mapped file or in memory.
#[derive(Clone)]
struct Tensor {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    /// In the file, or made up.
    key: Arc<str>,
    data: TensorData,
}

#[derive(Clone)]
enum TensorData {
    /// From a row of the file's tensor, and what was read of it if the file is neither mapped nor in memory.
    File(SafetensorsFile, usize, Arc<OnceLock<Vec<u8>>>),
    Memory(Arc<Values>),
    /// Of any type, little-endian.
    Bytes(Arc<Vec<u8>>),
    /// Not there yet. Those of one number that is not zero will be one.
    Planned(usize),
}

impl Tensor {
    fn of(m: Matrix<f32>, key: String) -> Self {
        let data = TensorData::Memory(Values::new(m.data).into());
        Self { dtype: Dtype::F32, rows: m.rows, cols: m.cols, key: key.into(), data }
    }

    fn raw(&self) -> RawMatrix<'_> {
        let len = self.rows * self.cols * self.dtype.size();
        let bytes = match &self.data {
            TensorData::File(file, row, read) => {
                let start = row * self.cols * self.dtype.size();
                let read = || read.get_or_init(|| file.read_of(&self.key, start, len)).as_slice();
                file.held_of(&self.key, start, len).unwrap_or_else(read)
            }
            TensorData::Memory(values) => values,
            TensorData::Bytes(bytes) => bytes.as_slice(),
            TensorData::Planned(_) => &[],
        };
        RawMatrix::within(self.dtype, self.rows, self.cols, bytes)
    }

    /// Some of the rows.
    fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        let data = match &self.data {
            TensorData::File(file, first, _) => {
                TensorData::File(file.clone(), first + rows.start, Arc::default())
            }
            _ => TensorData::Bytes(Arc::new(self.raw().row_range(rows.start, rows.end).bytes().to_vec())),
        };
        Self { rows: rows.len(), data, ..self.clone() }
    }

    /// The same values, not read yet.
    fn unread(&self) -> Self {
        let data = match &self.data {
            TensorData::File(file, row, _) => TensorData::File(file.clone(), *row, Arc::default()),
            data => data.clone(),
        };
        Self { data, ..self.clone() }
    }

    /// Rows of a file's tensor before this one.
    fn first_row(&self) -> usize {
        if let TensorData::File(_, row, _) = self.data { row } else { 0 }
    }

    /// Whether both hold the same bytes.
    fn same(&self, other: &Self) -> bool {
        match (&self.data, &other.data) {
            (TensorData::Planned(x), TensorData::Planned(y)) => return x == y && *x != 0,
            (TensorData::Planned(_), _) | (_, TensorData::Planned(_)) => return false,
            _ => {}
        }
        let (x, y) = (self.raw(), other.raw());
        let shape = |m: RawMatrix<'_>| (m.dtype(), m.rows(), m.cols(), m.bytes().as_ptr());
        shape(x) == shape(y)
            || ((x.dtype(), x.rows(), x.cols()) == (y.dtype(), y.rows(), y.cols()) && x.bytes() == y.bytes())
    }

    fn is_planned(&self) -> bool {
        matches!(self.data, TensorData::Planned(_))
    }

    fn path(&self) -> Option<&Path> {
        match &self.data {
            TensorData::File(file, ..) => Some(file.path()),
            TensorData::Memory(_) | TensorData::Bytes(_) | TensorData::Planned(_) => None,
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{} x {}] {}", self.key, self.rows, self.cols, self.dtype)
    }
}
