//! The device, and the operations that methods are written in.
//!
//! Nothing here knows what a LoRA is. A [`Device`] is a GPU, shared with a host or our own, or the CPU.
//! Operations work on a [`Batch`]: matrices of mixed shapes in one arena. Each is one file of
//! `ops` that holds the launcher of the shader of the same name and its f64 CPU twin.

mod batch;
mod capabilities;
mod device;
pub(crate) mod gpu;
pub(crate) mod memory;
#[doc(hidden)]
pub mod ops;
mod pipeline_cache;
mod self_test;
#[doc(hidden)]
pub mod shaders;
mod staging;
mod wait;

pub use batch::{Batch, Element, Shape};
pub use capabilities::{
    Capabilities, Disable, Precision, Tier, required_features, required_limits, wanted_features,
};
pub use device::{AdapterSummary, Device, DeviceOptions, Select};
