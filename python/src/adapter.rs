//! Adapters and their layers.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::path::PathBuf;

use loraweld::adapter::write_atomic;
use loraweld::cli::Lent;
use loraweld::{Dtype, Family, OpenOptions, RawMatrix};
use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::array::{self, Array};
use crate::error::{Raised, raised};

/// A LoRA: of a file (`loraweld.open`), or of tensors in memory, by the keys that a file would have.
///
/// >>> import numpy, loraweld
/// >>> a, b = numpy.ones((4, 64), "float16"), numpy.zeros((32, 4), "float16")
/// >>> loraweld.Adapter({"blocks.0.to_q.lora_A.weight": a, "blocks.0.to_q.lora_B.weight": b}, name="cat")
/// <loraweld.Adapter cat: 1 layer, rank 4, peft, f16>
///
/// The arrays are numpy's, torch's on the CPU, or any with DLPack or a buffer, of float32, float16 or bfloat16; they are
/// copied once. `metadata` is that of the file's header, where some programs keep alphas. The other options say how files
/// are read that do not say everything, as they do for `loraweld.open`.
#[pyclass(module = "loraweld", frozen)]
pub struct Adapter {
    pub adapter: loraweld::Adapter,
    /// The path that was opened; `None` in memory.
    path: Option<PathBuf>,
    options: OpenOptions,
}

impl Adapter {
    /// As commands take it.
    pub fn lent(&self) -> Lent {
        let (adapter, path, own) = (self.adapter.clone(), self.path.clone(), self.options.clone());
        Box::new(move |options| {
            // All others of a merge may be for one model, where this one's file leaves several open.
            if own.family.is_some() || options.family.is_none() {
                return Ok(adapter.clone());
            }
            let options = OpenOptions { family: options.family, ..own.clone() };
            match &path {
                Some(path) => loraweld::Adapter::open_with(path, &options),
                None => adapter.read_with(&options),
            }
        })
    }
}

fn options(
    alpha: Option<f64>,
    allow_truncate: Option<usize>,
    base: Option<PathBuf>,
    skip_unsupported: bool,
    model: Option<&str>,
) -> PyResult<OpenOptions> {
    let invalid = |message: &str| -> PyErr { Raised::invalid(message).into() };
    if allow_truncate == Some(0) {
        return Err(invalid("allow_truncate is 0; a rank is 1 or more"));
    }
    if alpha.is_some_and(|alpha| !alpha.is_finite()) {
        return Err(invalid("alpha is not finite"));
    }
    let family = |id: &str| {
        Family::named(id).ok_or_else(|| {
            let ids: Vec<&str> = Family::all().filter_map(Family::id).collect();
            invalid(&format!("model: there is no model `{id}`; known are {}", ids.join(", ")))
        })
    };
    let family = model.map(family).transpose()?;
    Ok(OpenOptions { alpha, truncate: allow_truncate, base, skip_unsupported, family })
}

/// Opens a LoRA: a .safetensors file, or a folder that PEFT saved.
///
/// The file stays mapped, and must not be changed while the adapter is in use. `alpha` is that of every layer, whatever the
/// file says; `allow_truncate` reads LoHa, LoKr, DoRA and whole differences as LoRAs of that rank at most; `base` is the
/// base model's weights, on which DoRA depends; `skip_unsupported` leaves out what cannot be merged; `model` is the id of
/// the model that it is for, such as "flux1", where the file does not tell.
#[pyfunction]
#[pyo3(signature = (path, *, alpha = None, allow_truncate = None, base = None, skip_unsupported = false, model = None))]
pub fn open(
    py: Python<'_>,
    path: PathBuf,
    alpha: Option<f64>,
    allow_truncate: Option<usize>,
    base: Option<PathBuf>,
    skip_unsupported: bool,
    model: Option<&str>,
) -> PyResult<Adapter> {
    let options = options(alpha, allow_truncate, base, skip_unsupported, model)?;
    let adapter = py.detach(|| loraweld::Adapter::open_with(&path, &options)).map_err(raised)?;
    Ok(Adapter { adapter, path: Some(path), options })
}

#[pymethods]
impl Adapter {
    #[new]
    #[pyo3(signature = (
        tensors, name = "adapter", metadata = None, *,
        alpha = None, allow_truncate = None, base = None, skip_unsupported = false, model = None
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are Python's, and have names there")]
    fn new(
        py: Python<'_>,
        tensors: &Bound<'_, PyDict>,
        name: &str,
        metadata: Option<BTreeMap<String, String>>,
        alpha: Option<f64>,
        allow_truncate: Option<usize>,
        base: Option<PathBuf>,
        skip_unsupported: bool,
        model: Option<&str>,
    ) -> PyResult<Self> {
        let options = options(alpha, allow_truncate, base, skip_unsupported, model)?;
        let mut arrays = BTreeMap::new();
        for (key, x) in tensors.iter() {
            let key: String = key.extract()?;
            let array = Array::new(&x, &format!("{name}: `{key}`"))?;
            arrays.insert(key, array);
        }
        let metadata = metadata.unwrap_or_default();
        let mut tensors: Vec<(&str, Tensor<'_>)> =
            arrays.iter().map(|(key, array)| (key.as_str(), Tensor::of(array))).collect();
        // As the crate lays files out: widest element first, then by name.
        tensors.sort_by_key(|(_, tensor)| Reverse(tensor.dtype.size()));
        let adapter = py.detach(|| {
            let file = file_of(&tensors, &metadata);
            loraweld::Adapter::from_bytes_with(name, file, &options)
        });
        Ok(Self { adapter: adapter.map_err(raised)?, path: None, options })
    }

    /// Takes a result over: the file is mapped, and may be deleted then.
    #[staticmethod]
    fn _taken(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let adapter = py.detach(|| loraweld::Adapter::open(path)).map_err(raised)?;
        Ok(Self { adapter, path: None, options: OpenOptions::default() })
    }

    /// The name of the file without its extension, or of the folder.
    #[getter]
    fn name(&self) -> &str {
        self.adapter.name()
    }

    /// The file or folder that was opened, or `None` if the adapter is in memory.
    #[getter]
    fn path(&self) -> Option<PathBuf> {
        self.path.clone()
    }

    /// How the keys are spelled: "peft", "kohya", "comfyui", "bfl" or "xlabs".
    #[getter]
    fn format(&self) -> &str {
        self.adapter.format().name()
    }

    /// The type that holds the values of every tensor: "f32", "f16" or "bf16".
    #[getter]
    fn dtype(&self) -> &str {
        self.adapter.dtype().name()
    }

    /// The model that it is for, in words.
    #[getter]
    fn family(&self) -> String {
        self.adapter.family().to_string()
    }

    /// The metadata of the file's header.
    #[getter]
    fn metadata(&self) -> BTreeMap<String, String> {
        self.adapter.metadata().clone()
    }

    /// What one should know about how the file was read: what was truncated, and what that lost.
    #[getter]
    fn notes(&self) -> Vec<String> {
        self.adapter.notes().to_vec()
    }

    /// The layers, sorted by key.
    #[getter]
    fn layers(&self) -> Vec<Layer> {
        self.adapter.layers().iter().map(|layer| Layer(layer.clone())).collect()
    }

    /// The layer of this name, in any spelling.
    fn __getitem__(&self, name: &str) -> PyResult<Layer> {
        let found = self.adapter.find(name).cloned().map(Layer);
        found.ok_or_else(|| PyKeyError::new_err(format!("{} has no layer `{name}`", self.adapter.name())))
    }

    /// Whether there is a layer of this name, in any spelling.
    fn __contains__(&self, name: &str) -> bool {
        self.adapter.find(name).is_some()
    }

    /// How many layers there are.
    fn __len__(&self) -> usize {
        self.adapter.layers().len()
    }

    /// The tensors of the file as numpy arrays, by their keys.
    ///
    /// They are views, not copies: they cannot be written to, and keep the adapter. numpy has no bf16; such tensors are
    /// widened to float32, or, with `bits`, seen as uint16, of which `torch.from_numpy(x).view(torch.bfloat16)` makes what
    /// they are.
    #[pyo3(signature = (*, bits = false))]
    fn tensors<'py>(slf: &Bound<'py, Self>, bits: bool) -> PyResult<Bound<'py, PyDict>> {
        let adapter = &slf.get().adapter;
        let bytes = adapter.file_bytes().map_err(raised)?.unwrap_or_default();
        let file = SafeTensors::deserialize(bytes)
            .map_err(|e| Raised::new("FileError", format!("{}: {e}", adapter.path().display())))?;
        let all = PyDict::new(slf.py());
        let mut tensors = file.tensors();
        tensors.sort_by(|x, y| x.0.cmp(&y.0));
        for (key, tensor) in tensors {
            // SAFETY: the adapter, which the array keeps, keeps its file.
            let array =
                unsafe { array::view(slf.as_any(), tensor.data(), tensor.dtype(), tensor.shape(), bits) }?;
            all.set_item(key, array)?;
        }
        Ok(all)
    }

    /// Writes the file as it is, whole or not at all. `loraweld.convert` writes other types and spellings.
    #[pyo3(signature = (path, *, force = false))]
    fn save(&self, py: Python<'_>, path: PathBuf, force: bool) -> PyResult<()> {
        let saved = py.detach(|| {
            let bytes = self.adapter.file_bytes()?.unwrap_or_default();
            let protect: Vec<PathBuf> =
                self.path.iter().cloned().chain([self.adapter.path().into()]).collect();
            write_atomic(&path, force, &protect, |file| file.write_all(bytes))
        });
        saved.map_err(raised)
    }

    fn __repr__(&self) -> String {
        let ranks = self.adapter.layers().iter().map(loraweld::Layer::rank);
        let (min, max) = (ranks.clone().min().unwrap_or(0), ranks.max().unwrap_or(0));
        let rank = if min == max { max.to_string() } else { format!("{min} to {max}") };
        let layers = match self.adapter.layers().len() {
            1 => "1 layer".to_owned(),
            n => format!("{n} layers"),
        };
        let (name, format, dtype) = (self.name(), self.format(), self.dtype());
        format!("<loraweld.Adapter {name}: {layers}, rank {rank}, {format}, {dtype}>")
    }
}

/// An array as a tensor of a file.
struct Tensor<'a> {
    dtype: Dtype,
    shape: &'a [usize],
    bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    fn of(array: &'a Array) -> Self {
        Self { dtype: array.dtype, shape: &array.shape, bytes: array.bytes() }
    }
}

/// A safetensors file of tensors by their keys, in this order.
fn file_of(tensors: &[(&str, Tensor<'_>)], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut end = 0;
    for (key, tensor) in tensors {
        let start = end;
        end += tensor.bytes.len();
        let dtype = tensor.dtype.name().to_ascii_uppercase();
        let info = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end] });
        header.insert((*key).to_owned(), info);
    }
    let mut text = Value::from(header).to_string();
    // Tensors are aligned then.
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut file = Vec::with_capacity(8 + text.len() + end);
    file.extend_from_slice(&(text.len() as u64).to_le_bytes());
    file.extend_from_slice(text.as_bytes());
    tensors.iter().for_each(|(_, tensor)| file.extend_from_slice(tensor.bytes));
    file
}

fn of_file(dtype: Dtype) -> safetensors::Dtype {
    match dtype {
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::Bf16 => safetensors::Dtype::BF16,
    }
}

/// A layer of an adapter: its update is scale · B · A.
#[pyclass(module = "loraweld", frozen)]
pub struct Layer(loraweld::Layer);

#[pymethods]
impl Layer {
    /// Its name, with dots where they are known.
    #[getter]
    fn name(&self) -> String {
        self.0.name()
    }

    /// The key that it is matched by.
    #[getter]
    fn key(&self) -> &str {
        self.0.key().as_str()
    }

    /// Rows of A, columns of B.
    #[getter]
    fn rank(&self) -> usize {
        self.0.rank()
    }

    /// The width that it reads: columns of A.
    #[getter]
    fn input(&self) -> usize {
        self.0.input()
    }

    /// The width that it writes: rows of B.
    #[getter]
    fn output(&self) -> usize {
        self.0.output()
    }

    /// The factor on B · A.
    #[getter]
    fn scale(&self) -> f64 {
        self.0.scale().value
    }

    /// The kernel of a convolution, of whose inputs at every place A is the matrix; empty for a linear layer.
    #[getter]
    fn kernel(&self) -> Vec<usize> {
        self.0.kernel().to_vec()
    }

    /// The type of its factors.
    #[getter]
    fn dtype(&self) -> &str {
        self.0.dtype().name()
    }

    /// A, of shape [rank, input]: a view that cannot be written to. bf16 is widened to float32.
    #[getter]
    fn a<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        factor(slf, slf.get().0.a())
    }

    /// B, of shape [output, rank]: a view that cannot be written to. bf16 is widened to float32.
    #[getter]
    fn b<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        factor(slf, slf.get().0.b())
    }

    fn __repr__(&self) -> String {
        let layer = &self.0;
        format!(
            "<loraweld.Layer {}: {} -> {}, rank {}>",
            layer.name(),
            layer.input(),
            layer.output(),
            layer.rank()
        )
    }
}

fn factor<'py>(owner: &Bound<'py, Layer>, factor: RawMatrix<'_>) -> PyResult<Bound<'py, PyAny>> {
    let shape = [factor.rows(), factor.cols()];
    // SAFETY: the layer, which the array keeps, keeps its factors.
    unsafe { array::view(owner.as_any(), factor.bytes(), of_file(factor.dtype()), &shape, false) }
}
