//! Devices.

use std::ffi::{CString, c_char};

use loraweld::{Device, DeviceOptions};

use crate::ffi::{self, Out};
use crate::status::{LoraweldStatus, guard};

/// Where merges are computed: a GPU or the CPU.
pub struct LoraweldDevice {
    pub(crate) device: Device,
    description: CString,
}

/// Opens a device.
///
/// `select`: `auto` (a hardware GPU, else the CPU; NULL is the same), `cpu`, `gpu` (a software one if there is no other), a
/// number, or a part of the adapter's name. `precision`: `auto` (NULL is the same), `fast`, `f64` or `double-single`. `memory`:
/// bytes of device memory to stay within; 0 for 2 GiB. Free `device` with `loraweld_device_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_device_open(
    select: *const c_char,
    precision: *const c_char,
    memory: u64,
    device: *mut *mut LoraweldDevice,
) -> LoraweldStatus {
    guard(|| {
        // SAFETY: the caller keeps what the header asks for.
        let (out, select, name) = unsafe {
            (
                Out::new(device, "device")?,
                ffi::optional_text(select, "select")?,
                ffi::optional_text(precision, "precision")?,
            )
        };
        let device = Device::open(&DeviceOptions {
            select: select.unwrap_or("auto").parse()?,
            precision: name.unwrap_or("auto").parse()?,
            memory: (memory > 0).then_some(memory),
            ..DeviceOptions::default()
        })?;
        let description = ffi::c_string(&device.describe());
        out.put(LoraweldDevice { device, description });
        Ok(())
    })
}

/// What the device is, and in which arithmetic it computes. Owned by the device; NULL for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_device_describe(device: *const LoraweldDevice) -> *const c_char {
    // SAFETY: the caller keeps what the header asks for.
    unsafe { ffi::field(device, |device| &device.description) }
}

/// Frees a device; NULL does nothing. What was made on it stays valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn loraweld_device_free(device: *mut LoraweldDevice) {
    // SAFETY: the caller keeps what the header asks for.
    unsafe { ffi::free(device) }
}
