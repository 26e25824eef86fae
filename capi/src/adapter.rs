//! Adapters.

use std::ffi::{CString, c_char};
use std::path::PathBuf;

use loraweld::{Adapter, SaveOptions, Unnamed};

use crate::ffi::{self, Out};
use crate::status::{Failure, LoraweldStatus, Result, guard};

/// A LoRA adapter.
pub struct LoraweldAdapter {
    pub(crate) adapter: Adapter,
    name: CString,
    layers: Vec<CString>,
    /// What it was made from, and so never overwrites.
    protect: Vec<PathBuf>,
}

/// A layer of an adapter: `ΔW = scale · B · A`, A of rank x input, B of output x rank.
#[repr(C)]
pub struct LoraweldLayer {
    /// Its name, with dots where they are known. Owned by the adapter.
    pub name: *const c_char,
    /// Columns of B, rows of A.
    pub rank: usize,
    /// The width that it reads.
    pub input: usize,
    /// The width that it writes.
    pub output: usize,
    /// The factor on B · A.
    pub scale: f64,
}

/// How an adapter is written. All zero is the default.
#[repr(C)]
pub struct LoraweldSaveOptions {
    /// `f32`, `f16` or `bf16`; NULL for the adapter's own.
    pub dtype: *const c_char,
    /// Spelling of the keys: `peft`, `kohya`, `comfyui`, `bfl` or `xlabs`; NULL for the adapter's own.
    pub format: *const c_char,
    /// Whether an existing file is replaced. What the adapter was made from never is.
    pub overwrite: bool,
}

impl LoraweldAdapter {
    pub(crate) fn new(adapter: Adapter, protect: Vec<PathBuf>) -> Self {
        let name = ffi::c_string(adapter.name());
        let layers = adapter.layers().iter().map(|layer| ffi::c_string(&layer.name())).collect();
        Self { adapter, name, layers, protect }
    }

    /// What these handles hold.
    ///
    /// # Safety
    /// As [`ffi::slice`], and for each of its pointers as [`ffi::get`].
    pub(crate) unsafe fn all<'a>(adapters: *const *const Self, count: usize) -> Result<Vec<&'a Self>> {
        // SAFETY: as above.
        let adapters = unsafe { ffi::slice(adapters, count, "adapters") }?;
        // SAFETY: as above.
        let get = |(i, &pointer)| unsafe { ffi::get(pointer, &format!("adapters[{i}]")) };
        adapters.iter().enumerate().map(get).collect()
    }
}

/// Opens a `.safetensors` file or a PEFT folder. Free `adapter` with `loraweld_adapter_free`; the file stays mapped until
/// then, and must not be changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_adapter_open(
    path: *const c_char,
    adapter: *mut *mut LoraweldAdapter,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let (out, path) = unsafe { (Out::new(adapter, "adapter")?, ffi::text(path, "path")?) };
        out.put(LoraweldAdapter::new(Adapter::open(path)?, Vec::new()));
        Ok(())
    })
}

/// The name of the file without its extension, or of the folder. Owned by the adapter; NULL for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_adapter_name(adapter: *const LoraweldAdapter) -> *const c_char {
    // SAFETY: the caller keeps what the header asks for.
    unsafe { ffi::field(adapter, |adapter| &adapter.name) }
}

/// How many layers an adapter has; 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_adapter_layer_count(adapter: *const LoraweldAdapter) -> usize {
    // SAFETY: the caller keeps what the header asks for.
    unsafe { adapter.as_ref() }.map_or(0, |adapter| adapter.layers.len())
}

/// Writes what the layer at `index` is to `layer`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_adapter_layer(
    adapter: *const LoraweldAdapter,
    index: usize,
    layer: *mut LoraweldLayer,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let adapter = unsafe { ffi::get(adapter, "adapter") }?;
        let (Some(of), Some(name)) = (adapter.adapter.layers().get(index), adapter.layers.get(index)) else {
            let count = adapter.layers.len();
            return Err(Failure::invalid(format!("`index` is {index}, but the adapter has {count} layers")));
        };
        // SAFETY: the caller keeps what the header asks for; there may be anything at all so far.
        let Some(layer) = (unsafe { layer.cast::<std::mem::MaybeUninit<LoraweldLayer>>().as_mut() }) else {
            return Err(Failure::invalid("`layer` is NULL"));
        };
        layer.write(LoraweldLayer {
            name: name.as_ptr(),
            rank: of.rank(),
            input: of.input(),
            output: of.output(),
            scale: of.scale().value,
        });
        Ok(())
    })
}

/// Writes a `.safetensors` file, whole or not at all. `options` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_adapter_save(
    adapter: *const LoraweldAdapter,
    path: *const c_char,
    options: *const LoraweldSaveOptions,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let (adapter, path) = unsafe { (ffi::get(adapter, "adapter")?, ffi::text(path, "path")?) };
        // SAFETY: the caller keeps what the header asks for.
        let options = match unsafe { options.as_ref() } {
            None => SaveOptions::default(),
            Some(options) => {
                // SAFETY: as above.
                let (dtype, format) = unsafe {
                    (
                        ffi::optional_text(options.dtype, "options.dtype")?,
                        ffi::optional_text(options.format, "options.format")?,
                    )
                };
                SaveOptions {
                    dtype: dtype.map(str::parse).transpose()?,
                    format: format.map(str::parse).transpose()?,
                    // A host can say no more of them; the names of its files are the best there are.
                    unnamed: Unnamed::Keep,
                    overwrite: options.overwrite,
                    ..SaveOptions::default()
                }
            }
        };
        Ok(adapter.adapter.save(path, &SaveOptions { protect: adapter.protect.clone(), ..options })?)
    })
}

/// Frees an adapter; NULL does nothing. What was made from it stays valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_adapter_free(adapter: *mut LoraweldAdapter) {
    // SAFETY: the caller keeps what the header asks for.
    unsafe { ffi::free(adapter) }
}
