//! A native host on a framework that is not ours: a diffusion model on [burn](https://burn.dev) whose adapters are
//! fused by loraweld, on one wgpu device and in the same buffers. See the README.

pub mod adapters;
pub mod bench;
#[cfg(feature = "window")]
pub mod canvas;
pub mod classifier;
pub mod data;
pub mod model;
pub mod picture;
pub mod run;
pub mod shared;
pub mod table;
#[cfg(feature = "window")]
pub mod window;
