//! Merge LoRA adapters of diffusion models without training, on any GPU.

mod error;
mod matrix;

pub mod compute;

pub use compute::Device;
pub use error::{Error, Result};
pub use matrix::{Dtype, Matrix, RawMatrix};
pub use wgpu;
