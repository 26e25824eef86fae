//! A device that is kept between commands of one process: opening a GPU takes longer than many merges.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use loraweld::Result;
use loraweld::compute::{Device, DeviceOptions, Precision, Select};

#[derive(Clone, Debug, PartialEq)]
struct Asked {
    select: Select,
    precision: Precision,
    memory: Option<u64>,
    cache: Option<PathBuf>,
    environment: [Option<std::ffi::OsString>; 3],
}

static LAST: Mutex<Option<(Asked, Device)>> = Mutex::new(None);

/// Opens a device, or gives the last one again if it was opened in the same way.
pub fn open(options: &DeviceOptions) -> Result<Device> {
    let asked = Asked {
        select: options.select.clone(),
        precision: options.precision,
        memory: options.memory,
        cache: options.pipeline_cache.clone(),
        environment: ["WGPU_BACKEND", "WGPU_ADAPTER_NAME", "VK_DRIVER_FILES"].map(std::env::var_os),
    };
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((known, device)) = &*last
        && *known == asked
    {
        return Ok(device.clone());
    }
    // Two at once would take the memory of both.
    *last = None;
    let device = Device::open(options)?;
    *last = Some((asked, device.clone()));
    Ok(device)
}

/// Lets the device go.
pub fn close() {
    *LAST.lock().unwrap_or_else(PoisonError::into_inner) = None;
}
