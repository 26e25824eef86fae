//! Merge LoRA adapters of diffusion models without training, on any GPU.

mod error;
mod matrix;
mod safetensors_file;

pub mod adapter;
pub mod compute;

pub use adapter::{Adapter, Format, Layer, LayerKey, SaveOptions, Weighted};
pub use compute::Device;
pub use error::{Error, Result};
pub use matrix::{Dtype, Matrix, RawMatrix};
pub use wgpu;
