//! Merge LoRA adapters of diffusion models without training, on any GPU.
//!
//! loraweld reads LoRA files as diffusers, PEFT, kohya and ComfyUI write them, sums up what their layers read while a
//! model runs ([`Calibration`]), and solves for one LoRA that does on each adapter's inputs what that adapter does
//! ([`Ssr`]); or it keeps a style whole and projects a subject off it ([`NpLora`]). The result is an ordinary LoRA, with
//! a [`Report`] of what each layer lost. It computes in WGSL shaders through wgpu, on its own device or on the host
//! program's, or on the CPU.
//!
//! ```
//! use loraweld::{Adapter, Calibration, Device, RawMatrix, SaveOptions, Ssr};
//! # fn main() -> loraweld::Result<()> {
//! # let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/loras");
//! # let folder = std::env::temp_dir().join(format!("loraweld-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&folder).unwrap();
//! # for (from, to) in [("concept_c3_mirror", "cat"), ("concept_c7_rot90", "dog")] {
//! #     let to = folder.join(format!("{to}.safetensors"));
//! #     std::fs::copy(format!("{data}/{from}.safetensors"), to).unwrap();
//! # }
//! # let values = vec![0.5; 64 * 128];
//! # let inputs_of_cat = RawMatrix::from_f32(64, 128, &values)?;
//! # let inputs_of_dog = RawMatrix::from_f32(32, 128, &values[..32 * 128])?;
//! let device = Device::auto()?; // or Device::cpu(), or Device::from_wgpu(&adapter, device, queue)
//! let cat = Adapter::open(folder.join("cat.safetensors"))?;
//! let dog = Adapter::open(folder.join("dog.safetensors"))?;
//!
//! // What a layer reads, tokens x width: a host slice or a wgpu buffer, in any batches, in any order.
//! let mut calibration = Calibration::new([&cat, &dog])?;
//! calibration.accumulate(&device, 0, "transformer_blocks.0.attn.to_q", inputs_of_cat)?;
//! calibration.accumulate(&device, 1, "transformer_blocks.0.attn.to_q", inputs_of_dog)?;
//! // ... and so for every layer; the report names those that got nothing.
//!
//! let merged = Ssr::new(&calibration).merge(&device, &[cat.at(1.0), dog.at(0.8)])?;
//! merged.adapter.save(folder.join("merged.safetensors"), &SaveOptions::default())?;
//! println!("{}", merged.report); // what each layer lost
//! # std::fs::remove_dir_all(&folder).unwrap();
//! # Ok(())
//! # }
//! ```
//!
//! Nothing here prints, exits, or panics on bad input: an [`Error`] names the file, the key or the layer, and what
//! would be right. Long calls take a [`Control`]: a progress callback and a cancellation token.
//!
//! # The modules
//!
//! | | |
//! |---|---|
//! | [`adapter`] | what a LoRA file is: keys, scales, layers; reading and writing |
//! | [`calibration`] | statistics of what the layers read: accumulating, adding, slicing, files |
//! | [`checkpoint`] | whole models: adding adapters to one, getting an adapter out of two |
//! | [`fusion`] | fusing while a model generates: selection by features, schedules, latent refinement, live factors |
//! | [`merge`] | the methods, one file each; the plan (which layers, which adapters); the report |
//! | [`compute`] | the device, what it can do, and the operations that methods are written in, each with a GPU and a CPU side |
//!
//! `adapter` and `compute` know nothing of each other; `calibration`, `merge` and `fusion` use both. `checkpoint` uses
//! `adapter` alone. With the default feature
//! `cli` the crate is also the command `loraweld`; `default-features = false` leaves the library alone.
//! [`wgpu`] is exported, so that a host uses the same version.

#[cfg(feature = "cli")]
extern crate self as loraweld;

mod error;
mod io;
mod matrix;
mod names;
mod power;
mod words;

pub mod adapter;
/// Files that a page lends and takes.
#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod browser {
    pub use crate::io::atomic::{Room, Rooms, lend, set_rooms, take};
}
pub mod calibration;
pub mod checkpoint;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
pub mod compute;
pub mod fusion;
pub mod merge;

pub use adapter::{
    Adapter, Family, Format, Layer, LayerKey, Loader, NotTaken, OpenOptions, SaveOptions, Scale, ScaleRule,
    Strengths, Unnamed, Weighted,
};
pub use calibration::{Activations, Calibration, FileSummary, Source, Task};
pub use checkpoint::{
    Bake, BakeOptions, BakeReport, Checkpoint, Extract, ExtractOptions, ExtractReport, Round,
};
pub use compute::{Device, DeviceOptions, Disable, Precision, Select};
pub use error::{Error, Remedy, Result};
pub use io::{Control, Progress, ReadAt, WriteAt};
pub use matrix::{Dtype, Matrix, RawMatrix};
pub use merge::{
    Absent, Action, Alone, Bases, Budget, Coordinates, CoreMerge, Dare, Destination, DeviceMemory,
    Directions, Elect, EntryMerge, InputReport, Iso, IsoMean, Keep, LayerReport, Linear, Losses, METHODS,
    Merged, Method, MethodEntry, NpLora, NpLoraOptions, Plan, PlannedLayer, Prior, Projection,
    ProjectionReport, Report, Ridge, Rule, Scope, Spectrum, Ssr, SsrOptions, SvdMerge, TaskBalance, Ties,
    Truncating, Truncation, Tsv, ZeroSum,
};
pub use wgpu;

// The README's example has to compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
// And the guide's.
#[cfg(doctest)]
#[doc = include_str!("../docs/embedding.md")]
struct Embedding;
