//! Opening checkpoints: files, shards, pipelines.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::quantised::{Values, foreign};
use crate::adapter::{Inventory, Part, Weight};
use crate::io::disk;
use crate::io::safetensors_file::{SafetensorsFile, TensorRef};
use crate::{Error, Family, LayerKey, ReadAt, Result};

/// How the name of an index ends.
const INDEX: &str = ".safetensors.index.json";
/// What makes a folder a pipeline of diffusers.
const PIPELINE: &str = "model_index.json";
/// Folders of a pipeline whose weights adapters adapt, and the folder itself of a model alone.
const COMPONENTS: [&str; 9] = [
    "transformer",
    "transformer_2",
    "unet",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_encoder_4",
    "connectors",
    "text_conditioner",
];
/// Files of weights.
const WEIGHTS: [&str; 7] = ["safetensors", "bin", "ckpt", "pt", "pth", "gguf", "msgpack"];
/// Folders in folders are followed no deeper.
const DEPTH: usize = 6;

/// A checkpoint of a model.
///
/// ```no_run
/// use loraweld::{Adapter, Bake, BakeOptions, Checkpoint, Control, OpenOptions};
/// # fn main() -> loraweld::Result<()> {
/// let checkpoint = Checkpoint::open("flux1-dev.safetensors")?;
/// // What the adapter leaves open, the checkpoint may tell.
/// let options = OpenOptions { family: Some(checkpoint.family()), ..Default::default() };
/// let cat = Adapter::open_with("cat.safetensors", &options)?;
/// let bake = Bake::new(&checkpoint, &[cat.at(0.8)], &BakeOptions::default())?;
/// let report = bake.save("flux1-cat.safetensors", &Control::default())?;
/// println!("{report}"); // how much of the update the rounding lets through
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// The folder, if it is one.
    pub(super) root: Option<PathBuf>,
    pub(super) shards: Vec<Shard>,
    /// Other files of the folder that belong to it, relative to it.
    pub(super) beside: Vec<PathBuf>,
    family: Family,
    notes: Vec<String>,
}

/// A file of a checkpoint.
#[derive(Debug)]
pub(super) struct Shard {
    pub file: SafetensorsFile,
    /// Its place in the folder.
    pub relative: PathBuf,
    /// What stands before the names of its modules: the name of a pipeline's component, and a dot.
    pub prefix: String,
}

/// A module of a checkpoint that has a weight.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its name in the checkpoint, with the component of a pipeline in front.
    pub name: String,
    /// The layers whose weights it holds: several if it fuses them; none if its rows cannot be told apart.
    pub layers: Vec<LayerKey>,
    /// Whether an inventory knows it.
    pub known: bool,
    /// Rows and columns of its matrix.
    pub shape: (usize, usize),
    /// The type of its weight, as the file has it, or the name of its quantisation.
    pub dtype: String,
}

/// A weight, and what its rows are.
pub(super) struct Found<'a> {
    pub shard: usize,
    pub file: &'a SafetensorsFile,
    pub tensor: TensorRef<'a>,
    pub weight: Weight,
    /// The name of the module without the component, for tensors beside it.
    pub module: &'a str,
    /// Whether columns are outputs.
    pub transposed: bool,
    pub parts: Result<Vec<Part>, String>,
}

impl Found<'_> {
    pub fn kernel(&self) -> &[usize] {
        self.tensor.shape.get(2..).unwrap_or_default()
    }
}

/// Where the values of a layer's weight are: some rows of a weight.
#[derive(Clone)]
pub(super) struct Place {
    /// Which weight.
    pub found: usize,
    pub part: Part,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, an index (`*.safetensors.index.json`) with the shards beside it, the folder of either, or
    /// a pipeline of diffusers (a folder with `model_index.json`, or with `transformer/` or `unet/`).
    ///
    /// Checks headers and indices; tensors stay untouched in the mapped files.
    ///
    /// # Errors
    /// [`Error::File`] for what is no checkpoint, for a shard that is missing or not as the index says, and for a folder
    /// that holds several checkpoints; [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (root, parts, beside, notes) = match path.is_dir() {
            true => folder(path)?,
            false if is_index(path) => {
                let root = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
                let parts = shards_of(path)?.into_iter().map(|shard| (shard, String::new())).collect();
                let own = path.file_name().map(PathBuf::from);
                (Some(root.to_owned()), parts, own.into_iter().collect(), Vec::new())
            }
            false => {
                refuse_shard(path)?;
                (None, vec![(path.to_owned(), String::new())], Vec::new(), Vec::new())
            }
        };
        let mut shards = Vec::with_capacity(parts.len());
        for (path, prefix) in parts {
            let file = SafetensorsFile::open(&path)?;
            let relative = root.as_deref().and_then(|root| path.strip_prefix(root).ok());
            let relative =
                relative.map_or_else(|| PathBuf::from(path.file_name().unwrap_or_default()), Path::to_owned);
            shards.push(Shard { file, relative, prefix });
        }
        Ok(Self::recognised(path, root, shards, beside, notes))
    }

    /// Opens a `.safetensors` file that a host has. Its header is read at once, tensors when they are needed. `name` stands
    /// for the file in errors.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    pub fn from_source(name: &str, source: Arc<dyn ReadAt>) -> Result<Self> {
        let file = SafetensorsFile::from_source(name, source)?;
        let shard = Shard { file, relative: PathBuf::from(name), prefix: String::new() };
        Ok(Self::recognised(Path::new(name), None, vec![shard], Vec::new(), Vec::new()))
    }

    fn recognised(
        path: &Path,
        root: Option<PathBuf>,
        shards: Vec<Shard>,
        beside: Vec<PathBuf>,
        mut notes: Vec<String>,
    ) -> Self {
        let mut checkpoint =
            Self { path: path.to_owned(), root, shards, beside, family: Family::UNKNOWN, notes: Vec::new() };
        let (inventory, note) = checkpoint.inventory(None);
        checkpoint.family = inventory.family();
        notes.extend(note.map(|note| format!("`{}`: {note}", path.display())));
        checkpoint.notes = notes;
        tracing::info!(path = %path.display(), shards = checkpoint.shards.len(), "read a checkpoint");
        checkpoint
    }

    /// Whether a path looks like a checkpoint and not like an adapter: a folder that PEFT did not save, an index, or a file
    /// with weights and without a tensor that is named like a factor.
    pub fn is_at(path: &Path) -> bool {
        if path.is_dir() {
            let is_weights = |path: PathBuf| {
                is_index(&path) || path.extension().is_some_and(|e| e == "safetensors") && path.is_file()
            };
            let holds = || disk::list(path).into_iter().flatten().any(is_weights);
            let is_component = |name: &&str| path.join(name).is_dir();
            return !path.join("adapter_model.safetensors").exists()
                && (path.join(PIPELINE).is_file() || COMPONENTS.iter().any(is_component) || holds());
        }
        let is_factor = |tensor: TensorRef<'_>| {
            ["lora", "hada_", "lokr_"].iter().any(|part| tensor.name.contains(part))
                || [".diff", ".alpha"].iter().any(|part| tensor.name.ends_with(part))
        };
        let has_weights = |file: SafetensorsFile| {
            !file.tensors().any(is_factor) && file.tensors().any(|t| module_of(&t).is_some())
        };
        is_index(path) || SafetensorsFile::open(path).is_ok_and(has_weights)
    }

    /// The same, of this model, whatever its tensors tell.
    pub fn with_family(self, family: Family) -> Self {
        Self { family, ..self }
    }

    /// Fails if one of its files has changed since it was opened.
    pub(super) fn check_files(&self) -> Result<()> {
        self.shards.iter().try_for_each(|shard| shard.file.check())
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a folder, and what is baked into it will be one.
    pub fn is_folder(&self) -> bool {
        self.root.is_some()
    }

    /// The files that hold its tensors.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.file.path())
    }

    /// The model that it is, as far as its tensors tell.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The metadata of its first file's header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        self.shards.first().map_or(&NONE, |shard| shard.file.metadata())
    }

    /// What the user should know about how it was read.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Its modules that have a weight, in the order of its files.
    pub fn modules(&self) -> Vec<Module> {
        let module = |found: Found<'_>| {
            let parts = found.parts.unwrap_or_default();
            let (cols, rows) = found.weight.widths;
            let quantised = foreign(found.file, found.module, &found.tensor);
            Module {
                name: found.weight.module,
                known: parts.iter().any(|part| part.known),
                layers: parts.into_iter().map(|part| part.key).collect(),
                shape: (rows, cols),
                dtype: quantised.unwrap_or_else(|| found.tensor.dtype.to_string()),
            }
        };
        self.found(self.family).into_iter().map(module).collect()
    }

    fn inventory(&self, told: Option<Family>) -> (Inventory, Option<String>) {
        let weights: Vec<Weight> = self.weights().map(|found| found.weight).collect();
        Inventory::new(&weights, self.metadata(), told)
    }

    /// Its weights, by the names of a family.
    pub(super) fn found(&self, family: Family) -> Vec<Found<'_>> {
        let (inventory, _) = self.inventory(Some(family));
        let mut all: Vec<Found<'_>> = self.weights().collect();
        for found in &mut all {
            found.parts = inventory.parts(&found.weight);
            // Shapes of packed numbers are not those of a matrix; errors find the layers by their names all the same.
            if foreign(found.file, found.module, &found.tensor).is_some() {
                let keys = inventory.keys(&found.weight.module).into_iter();
                let part = |key: LayerKey| {
                    let path = key.to_string();
                    Part { key, path, rows: 0..0, swapped: false, known: true }
                };
                found.parts = Ok(keys.map(part).collect());
            }
        }
        all
    }

    /// Where the weight of each layer is; several places where it cannot be known which is meant.
    pub(super) fn places(found: &[Found<'_>]) -> BTreeMap<LayerKey, Vec<Place>> {
        let mut places: BTreeMap<LayerKey, Vec<Place>> = BTreeMap::new();
        for (i, of) in found.iter().enumerate() {
            for part in of.parts.iter().flatten() {
                places.entry(part.key.clone()).or_default().push(Place { found: i, part: part.clone() });
            }
        }
        places
    }

    /// Tensors that are the weight of a module.
    fn weights(&self) -> impl Iterator<Item = Found<'_>> {
        self.shards.iter().enumerate().flat_map(|(i, shard)| {
            shard.file.tensors().filter_map(move |tensor| {
                let (module, transposed) = module_of(&tensor)?;
                let rows = tensor.shape.first().copied().unwrap_or(0);
                let cols = tensor.shape.iter().skip(1).product();
                let widths = if transposed { (rows, cols) } else { (cols, rows) };
                let weight = Weight { module: format!("{}{module}", shard.prefix), widths };
                let file = &shard.file;
                Some(Found { shard: i, file, tensor, weight, module, transposed, parts: Ok(Vec::new()) })
            })
        })
    }
}

impl<'a> Found<'a> {
    /// Its numbers.
    pub fn values(&self) -> Result<Values<'a>> {
        let bytes = self.tensor.bytes()?;
        Ok(Values { bytes, ..self.checked()? })
    }

    /// What is known of its numbers before they are read.
    pub fn checked(&self) -> Result<Values<'a>> {
        Values::open(self.file, self.module, self.tensor)
    }
}

/// The module whose weight a tensor is, and whether it is stored transposed.
fn module_of<'a>(tensor: &TensorRef<'a>) -> Option<(&'a str, bool)> {
    let name = tensor.name;
    // Packed weights have a shape of their own.
    if let Some(module) = name.strip_suffix(".qweight") {
        return Some((module, false));
    }
    if tensor.shape.len() < 2 || tensor.shape.contains(&0) {
        return None;
    }
    if let Some(module) = name.strip_suffix(".weight") {
        return Some((module, false));
    }
    // OpenCLIP's attention, and its projection, which multiplies from the other side.
    if name.ends_with(".in_proj_weight") {
        return Some((&name[..name.len() - "_weight".len()], false));
    }
    (name.ends_with(".text_projection") && tensor.shape.len() == 2).then_some((name, true))
}

fn is_index(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(INDEX))
}

/// `model-00001-of-00003.safetensors` is not a checkpoint of its own.
fn refuse_shard(path: &Path) -> Result<()> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let is_shard = stem.rsplit_once("-of-").is_some_and(|(head, of)| {
        number(of) && head.rsplit_once('-').is_some_and(|(_, n)| number(n)) && of != "00001"
    });
    if is_shard && path.is_file() {
        return Err(Error::file(
            path,
            format!("is one shard of several; name the index (`*{INDEX}`) or the folder that holds them all"),
        ));
    }
    Ok(())
}

/// What is read of an index. Texts stay what they are until they are looked at: they may be anything.
#[derive(Deserialize)]
struct Index<'a> {
    #[serde(borrow)]
    weight_map: Option<BTreeMap<String, &'a RawValue>>,
}

/// The files that an index names.
fn shards_of(index: &Path) -> Result<Vec<PathBuf>> {
    let text = disk::read_to_string(index).map_err(|e| Error::io(index, "read", e))?;
    let fail = |reason: String| Error::file(index, reason);
    let Index { weight_map } =
        serde_json::from_str(&text).map_err(|e| fail(format!("is not the JSON of an index: {e}")))?;
    let map = weight_map
        .filter(|map| !map.is_empty())
        .ok_or_else(|| fail("holds no `weight_map`, which says where each tensor is".to_owned()))?;
    let folder = index.parent().unwrap_or(Path::new(""));
    let mut files: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, said) in &map {
        let file = serde_json::from_str::<String>(said.get()).ok();
        let file = file.filter(|file| !file.is_empty() && !file.contains(['/', '\\'])).ok_or_else(|| {
            let said: String = said.get().chars().take(80).collect();
            fail(format!("says that `{tensor}` is in {said}; the name of a file beside it is needed"))
        })?;
        files.entry(file).or_default().insert(tensor);
    }
    let mut paths = Vec::with_capacity(files.len());
    for (name, tensors) in files {
        let path = folder.join(&name);
        if !path.exists() {
            return Err(fail(format!(
                "names the shard `{name}`, which is missing; download it as well, there are {} tensors in it",
                tensors.len()
            )));
        }
        let file = SafetensorsFile::open(&path)?;
        if let Some(missing) = tensors.iter().find(|tensor| file.tensor(tensor).is_none()) {
            let reason = format!("is not in this file, but {} says so", index.display());
            return Err(Error::tensor(&path, missing, reason));
        }
        if let Some(extra) = file.tensors().find(|tensor| !tensors.contains(tensor.name)) {
            let reason = format!(
                "is in this file, but {} does not say so; the two do not belong together",
                index.display()
            );
            return Err(Error::tensor(&path, extra.name, reason));
        }
        paths.push(path);
    }
    Ok(paths)
}

/// A folder: itself, files of tensors with what stands before their names, other files, and notes.
type Folder = (Option<PathBuf>, Vec<(PathBuf, String)>, Vec<PathBuf>, Vec<String>);

fn folder(root: &Path) -> Result<Folder> {
    let components: Vec<&str> = COMPONENTS.into_iter().filter(|name| root.join(name).is_dir()).collect();
    let is_pipeline = root.join(PIPELINE).is_file() || !components.is_empty();
    let mut parts = Vec::new();
    if is_pipeline {
        for name in components {
            parts.extend(model(&root.join(name))?.into_iter().map(|path| (path, format!("{name}."))));
        }
        if parts.is_empty() {
            return Err(Error::file(
                root,
                format!(
                    "is a pipeline without any of the folders {}, so there is nothing to adapt",
                    COMPONENTS.join(", ")
                ),
            ));
        }
    } else {
        parts.extend(model(root)?.into_iter().map(|path| (path, String::new())));
        if parts.is_empty() {
            return Err(Error::file(
                root,
                format!(
                    "holds no checkpoint: neither a `*.safetensors` file, nor a `*{INDEX}`, nor a `{PIPELINE}` or one of \
                     the folders {}",
                    COMPONENTS.join(", ")
                ),
            ));
        }
    }
    let (mut beside, mut left_out) = (Vec::new(), Vec::new());
    let read: BTreeSet<&Path> = parts.iter().map(|(path, _)| path.as_path()).collect();
    let mut all = Vec::new();
    files(root, DEPTH, &mut all)?;
    for file in all {
        if read.contains(file.as_path()) {
            continue;
        }
        let Ok(relative) = file.strip_prefix(root) else { continue };
        let first = relative.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned());
        // Weights of other components belong to it; those in other formats of what is changed would be stale.
        let changes = relative.components().count() == 1
            || first.is_some_and(|first| COMPONENTS.contains(&first.as_str()));
        let is_weights = file.extension().is_some_and(|e| WEIGHTS.iter().any(|w| e == *w));
        if changes && is_weights {
            left_out.push(format!("`{}`", relative.display()));
        } else {
            beside.push(relative.to_owned());
        }
    }
    let notes = (!left_out.is_empty()).then(|| {
        format!(
            "{}: not read, and left out of what is written: {}; the same weights in another format?",
            root.display(),
            left_out.join(", ")
        )
    });
    Ok((Some(root.to_owned()), parts, beside, notes.into_iter().collect()))
}

/// The files of the one model in a folder; none if there is none.
fn model(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = disk::list(folder).map_err(|e| Error::io(folder, "list", e))?;
    let (mut indices, mut singles) = (BTreeSet::new(), BTreeSet::new());
    for path in entries {
        if !path.is_file() {
            continue;
        }
        if is_index(&path) {
            indices.insert(path);
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            singles.insert(path);
        }
    }
    let mut models: Vec<(PathBuf, Vec<PathBuf>)> = Vec::new();
    for index in indices {
        let shards = shards_of(&index)?;
        singles.retain(|single| !shards.contains(single));
        models.push((index, shards));
    }
    for single in singles {
        refuse_shard(&single)?;
        models.push((single.clone(), vec![single]));
    }
    if models.len() > 1 {
        let names = models
            .iter()
            .map(|(path, _)| format!("`{}`", path.file_name().unwrap_or_default().to_string_lossy()));
        return Err(Error::file(
            folder,
            format!(
                "holds several checkpoints: {}; name one of them, or move the others out of the folder",
                names.collect::<Vec<_>>().join(", ")
            ),
        ));
    }
    Ok(models.pop().map(|(_, shards)| shards).unwrap_or_default())
}

/// All files of a folder and of those in it, but for hidden ones.
fn files(folder: &Path, depth: usize, all: &mut Vec<PathBuf>) -> Result<()> {
    let mut paths = disk::list(folder).map_err(|e| Error::io(folder, "list", e))?;
    paths.sort();
    for path in paths {
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')) {
            continue;
        }
        if path.is_dir() {
            if depth == 0 {
                return Err(Error::file(
                    &path,
                    "lies too deep in the checkpoint's folder; is it the right one?",
                ));
            }
            files(&path, depth - 1, all)?;
        } else {
            all.push(path);
        }
    }
    Ok(())
}
