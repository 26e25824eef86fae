//! Calibrations.

use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use loraweld::{Calibration, Dtype, RawMatrix, Source};

use crate::adapter::LoraweldAdapter;
use crate::control::{LoraweldControl, controlled};
use crate::device::LoraweldDevice;
use crate::ffi::{self, Out};
use crate::status::{Failure, LoraweldStatus, Result, guard};

/// Statistics of what the layers of some adapters read.
pub struct LoraweldCalibration(RwLock<Calibration>);

/// In place of a task; the header (`cbindgen.toml`) has it, too.
const LORAWELD_NEUTRAL: usize = usize::MAX;

/// A matrix in host memory, row by row without gaps, in any alignment.
#[repr(C)]
pub struct LoraweldMatrix {
    /// `f32`, `f16` or `bf16`.
    pub dtype: *const c_char,
    /// Rows: tokens.
    pub rows: usize,
    /// Columns: the width that the layer reads.
    pub cols: usize,
    /// `rows * cols` elements of `dtype`.
    pub values: *const c_void,
}

impl LoraweldCalibration {
    pub(crate) fn read(&self) -> Result<RwLockReadGuard<'_, Calibration>> {
        self.0.read().map_err(|_| broken())
    }

    fn write(&self) -> Result<RwLockWriteGuard<'_, Calibration>> {
        self.0.write().map_err(|_| broken())
    }
}

fn broken() -> Failure {
    Failure::internal("an internal error interrupted an earlier call on this calibration; make it anew")
}

fn source(task: usize) -> Source {
    if task == LORAWELD_NEUTRAL { Source::Neutral } else { Source::Task(task) }
}

/// Makes an empty calibration for a pool of adapters. It serves merges of any of them. Free `calibration` with
/// `loraweld_calibration_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_calibration_new(
    adapters: *const *const LoraweldAdapter,
    count: usize,
    calibration: *mut *mut LoraweldCalibration,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let (out, adapters) =
            unsafe { (Out::new(calibration, "calibration")?, LoraweldAdapter::all(adapters, count)?) };
        let calibration = Calibration::new(adapters.into_iter().map(|handle| &handle.adapter))?;
        out.put(LoraweldCalibration(RwLock::new(calibration)));
        Ok(())
    })
}

/// Adds one batch of what `layer`, in any spelling, read while the adapter at `task` of the pool was active; or, for
/// `LORAWELD_NEUTRAL`, of what it reads of the base model. Batches of any size, in any order; `inputs` is not kept.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_calibration_accumulate(
    calibration: *const LoraweldCalibration,
    device: *const LoraweldDevice,
    task: usize,
    layer: *const c_char,
    inputs: *const LoraweldMatrix,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let (calibration, device, layer, inputs) = unsafe {
            (
                ffi::get(calibration, "calibration")?,
                ffi::get(device, "device")?,
                ffi::text(layer, "layer")?,
                ffi::get(inputs, "inputs")?,
            )
        };
        // SAFETY: as above.
        let dtype: Dtype = unsafe { ffi::text(inputs.dtype, "inputs.dtype") }?.parse()?;
        let LoraweldMatrix { rows, cols, values, .. } = *inputs;
        let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size())).ok_or_else(|| {
            Failure::invalid(format!("`inputs` of {rows} x {cols} elements is larger than memory"))
        })?;
        // SAFETY: as above.
        let bytes = unsafe { ffi::slice(values.cast::<u8>(), bytes, "inputs.values") }?;
        let matrix = RawMatrix::new(dtype, rows, cols, bytes)?;
        let mut calibration = calibration.write()?;
        match source(task) {
            Source::Task(task) => calibration.accumulate(&device.device, task, layer, matrix)?,
            Source::Neutral => calibration.accumulate_neutral(&device.device, layer, matrix)?,
        }
        Ok(())
    })
}

/// Adds the tensors of a `.safetensors` file of recorded activations, or of all such files of a folder: each named as the
/// layer that read it, tokens x width. `task` as for `loraweld_calibration_accumulate`; `control` may be NULL. What came
/// before a failure has been added.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_calibration_accumulate_file(
    calibration: *const LoraweldCalibration,
    device: *const LoraweldDevice,
    task: usize,
    path: *const c_char,
    control: *const LoraweldControl,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let (calibration, device, path) = unsafe {
            (ffi::get(calibration, "calibration")?, ffi::get(device, "device")?, ffi::text(path, "path")?)
        };
        let mut calibration = calibration.write()?;
        // SAFETY: as above.
        unsafe {
            controlled(control, |control| {
                calibration.accumulate_path(&device.device, source(task), Path::new(path), &control)?;
                Ok(())
            })
        }
    })
}

/// Writes a calibration, whole or not at all; an existing file is replaced only if `overwrite` says so.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_calibration_save(
    calibration: *const LoraweldCalibration,
    path: *const c_char,
    overwrite: bool,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let (calibration, path) =
            unsafe { (ffi::get(calibration, "calibration")?, ffi::text(path, "path")?) };
        Ok(calibration.read()?.save(path, overwrite)?)
    })
}

/// Opens a calibration, for merges; nothing can be added to it. Free `calibration` with `loraweld_calibration_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_calibration_open(
    path: *const c_char,
    calibration: *mut *mut LoraweldCalibration,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let (out, path) = unsafe { (Out::new(calibration, "calibration")?, ffi::text(path, "path")?) };
        out.put(LoraweldCalibration(RwLock::new(Calibration::open(path)?)));
        Ok(())
    })
}

/// Frees a calibration; NULL does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_calibration_free(calibration: *mut LoraweldCalibration) {
    // SAFETY: the caller keeps what the header asks for.
    unsafe { ffi::free(calibration) }
}
