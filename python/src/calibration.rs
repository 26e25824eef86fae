//! Calibrations.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loraweld::cli::{cache_folder, kept};
use loraweld::compute::{DeviceOptions, Precision, Select};
use loraweld::{Device, LayerKey, RawMatrix, Source};
use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::adapter::Adapter;
use crate::array::Array;
use crate::error::{Raised, raised};
use crate::run::interruptible;

/// Sums of what the layers of a pool of adapters read, for SSR-Merge and for measuring what merges lose.
///
/// A calibration is made of adapters, whose inputs it then takes in any order (`accumulate`), or opened from a file
/// (`Calibration.open`), which takes no more of them. It keeps a small matrix for each layer and adapter, and never the
/// inputs.
///
/// `device` is where sums are made: "auto", "cpu", "gpu", an index or a part of a name. The inputs themselves are in the
/// CPU's memory.
#[pyclass(module = "loraweld", frozen)]
pub struct Calibration {
    inner: Mutex<Arc<loraweld::Calibration>>,
    device: Device,
}

impl Calibration {
    fn lock(&self) -> MutexGuard<'_, Arc<loraweld::Calibration>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What merges read.
    pub fn shared(&self) -> PyResult<Arc<loraweld::Calibration>> {
        Ok(self.lock().clone())
    }

    fn change<T: Send>(
        &self,
        py: Python<'_>,
        change: impl FnOnce(&mut loraweld::Calibration) -> loraweld::Result<T> + Send,
    ) -> PyResult<T> {
        let done = py.detach(|| {
            let mut inner = self.lock();
            let calibration = Arc::get_mut(&mut *inner).ok_or_else(Self::in_use)?;
            change(calibration).map_err(Raised::from)
        });
        Ok(done?)
    }

    fn in_use() -> Raised {
        Raised::invalid("a merge on another thread reads the calibration; nothing can be added meanwhile")
    }

    /// A task's place in the pool, or `None` for the neutral inputs.
    fn task(&self, task: Option<&Bound<'_, PyAny>>) -> PyResult<Source> {
        let Some(task) = task else { return Ok(Source::Neutral) };
        let calibration = self.lock().clone();
        let Ok(name) = task.cast::<PyString>() else {
            return Ok(Source::Task(task.extract()?));
        };
        let name = name.to_str()?;
        let names: Vec<&str> = calibration.pool().iter().map(|task| task.name.as_str()).collect();
        match names.iter().position(|known| *known == name) {
            Some(task) => Ok(Source::Task(task)),
            None if name == "neutral" => Ok(Source::Neutral),
            None => Err(Raised::invalid(format!(
                "there is no task `{name}`; expected one of {}, or `neutral`",
                names.join(", ")
            ))
            .into()),
        }
    }
}

/// A layer of a calibration by its name in any spelling.
fn key(calibration: &loraweld::Calibration, layer: &str) -> PyResult<LayerKey> {
    let parsed = LayerKey::parse(layer);
    let mut known = calibration.layers();
    known.find(|key| **key == parsed || key.as_str() == layer).cloned().ok_or_else(|| {
        Raised::new("LayerError", format!("layer `{layer}`: the calibration does not have it")).into()
    })
}

#[pymethods]
impl Calibration {
    #[new]
    #[pyo3(signature = (adapters, *, device = "auto", precision = "auto", memory = None))]
    fn new(
        py: Python<'_>,
        adapters: Vec<Py<Adapter>>,
        device: &str,
        precision: &str,
        memory: Option<u64>,
    ) -> PyResult<Self> {
        let options = DeviceOptions {
            select: device.parse::<Select>().map_err(raised)?,
            precision: precision.parse::<Precision>().map_err(raised)?,
            memory: memory.map(|mib| mib << 20),
            // As for a command, which then finds the device open.
            pipeline_cache: cache_folder(),
            ..DeviceOptions::default()
        };
        let adapters: Vec<_> = adapters.iter().map(|adapter| adapter.get().adapter.clone()).collect();
        let made = py.detach(|| Ok((loraweld::Calibration::new(&adapters)?, kept::open(&options)?)));
        let (calibration, device) = made.map_err(raised)?;
        Ok(Self { inner: Mutex::new(Arc::new(calibration)), device })
    }

    /// Opens a calibration file, for merges.
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let calibration = py.detach(|| loraweld::Calibration::open(path)).map_err(raised)?;
        Ok(Self { inner: Mutex::new(Arc::new(calibration)), device: Device::cpu() })
    }

    /// Adds what a layer read while one adapter was active.
    ///
    /// `task` is the adapter's place in the pool or its name; `None` or "neutral" is for the base model's inputs on
    /// unrelated prompts. `layer` is a name in any spelling. `x` is of shape [tokens, width], with any dimensions in
    /// front, of float32, float16 or bfloat16: numpy's, torch's on the CPU, or any with DLPack or a buffer. It is
    /// not copied if its elements are in C order, and must not be changed during the call.
    fn accumulate(
        &self,
        py: Python<'_>,
        task: Option<&Bound<'_, PyAny>>,
        layer: &str,
        x: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let source = self.task(task)?;
        let what = format!("layer `{layer}`: x");
        let array = Array::new(x, &what)?;
        let (rows, cols) = array.matrix(&what)?;
        let (dtype, bytes) = (array.dtype, array.bytes());
        let x = RawMatrix::new(dtype, rows, cols, bytes).map_err(raised)?;
        self.change(py, |calibration| calibration.accumulate_all(&self.device, source, &[(layer, x.into())]))
    }

    /// Adds recorded inputs: a file or a folder of shards, as `loraweld calibrate` reads them.
    fn accumulate_file(
        &self,
        py: Python<'_>,
        task: Option<&Bound<'_, PyAny>>,
        path: PathBuf,
    ) -> PyResult<()> {
        let source = self.task(task)?;
        let done = interruptible(py, |control| {
            let mut inner = self.lock();
            let calibration = Arc::get_mut(&mut *inner).ok_or_else(Self::in_use)?;
            calibration.accumulate_path(&self.device, source, &path, &control).map(drop).map_err(Raised::from)
        })?;
        Ok(done?)
    }

    /// Adds another calibration of the same adapters, in any order of them.
    fn add(&self, py: Python<'_>, other: &Bound<'_, Self>) -> PyResult<()> {
        let other = other.get().shared()?;
        self.change(py, |calibration| calibration.add(&other))
    }

    /// Writes the calibration, whole or not at all.
    #[pyo3(signature = (path, *, force = false))]
    fn save(&self, py: Python<'_>, path: PathBuf, force: bool) -> PyResult<()> {
        let calibration = self.lock().clone();
        py.detach(|| calibration.save(path, force)).map_err(raised)
    }

    /// Whether inputs of a layer of this name, in any spelling, are of use: several adapters of the pool have it.
    fn takes(&self, layer: &str) -> bool {
        self.lock().takes(layer)
    }

    /// The names of the adapters, in order.
    #[getter]
    fn tasks(&self) -> Vec<String> {
        self.lock().pool().iter().map(|task| task.name.clone()).collect()
    }

    /// The layers that at least two adapters have, by the keys that they are matched by.
    #[getter]
    fn layers(&self) -> Vec<String> {
        self.lock().layers().map(|key| key.as_str().to_owned()).collect()
    }

    /// Layers, and the adapters of which no inputs came there.
    fn missing(&self) -> Vec<(String, String)> {
        let calibration = self.lock().clone();
        let name = |task: usize| calibration.pool()[task].name.clone();
        calibration.missing().into_iter().map(|(key, task)| (key.as_str().to_owned(), name(task))).collect()
    }

    /// Tokens that went by on a layer while an adapter was active.
    fn tokens(&self, task: Option<&Bound<'_, PyAny>>, layer: &str) -> PyResult<u64> {
        let source = self.task(task)?;
        let calibration = self.lock().clone();
        let key = key(&calibration, layer)?;
        Ok(match source {
            Source::Task(task) => calibration.tokens(&key, task),
            Source::Neutral => calibration.neutral_tokens(&key),
        })
    }

    /// The sum of a task on a layer, an array of float64; `None` without tokens.
    fn gram<'py>(
        &self,
        py: Python<'py>,
        task: Option<&Bound<'py, PyAny>>,
        layer: &str,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let source = self.task(task)?;
        let calibration = self.lock().clone();
        let key = key(&calibration, layer)?;
        let gram = py.detach(|| match source {
            Source::Task(task) => calibration.gram(&key, task),
            Source::Neutral => calibration.neutral_gram(&key),
        });
        let Some(gram) = gram.map_err(raised)? else { return Ok(None) };
        let shape = [gram.rows(), gram.cols()];
        Ok(Some(PyArray1::from_vec(py, gram.into_data()).reshape(shape)?.into_any()))
    }

    fn __repr__(&self) -> String {
        let calibration = self.lock().clone();
        format!(
            "<loraweld.Calibration of {}: {} layers>",
            self.tasks().join(", "),
            calibration.layers().count()
        )
    }
}
