//! Merge LoRA adapters of diffusion models without training, on any GPU.

mod control;
mod error;
mod matrix;
mod power;
pub(crate) mod safetensors_file;

pub mod adapter;
pub mod calibration;
pub mod compute;
pub mod merge;

pub use adapter::{Adapter, Format, Layer, LayerKey, SaveOptions, Scale, ScaleRule, Weighted};
pub use calibration::{Activations, Calibration, FileSummary, Source, Task};
pub use compute::{Device, DeviceOptions, Disable, Precision, Select};
pub use control::{Control, Progress};
pub use error::{Error, Result};
pub use matrix::{Dtype, Matrix, RawMatrix};
pub use merge::{
    Action, InputReport, LayerReport, Losses, Merged, Plan, PlannedLayer, Prior, Report, Ridge, Ssr,
    SsrOptions,
};
pub use wgpu;
