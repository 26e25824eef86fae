//! Checkpoints of whole models: adding adapters to one ([`Bake`]), and getting an adapter out of two ([`Extract`]).
//!
//! A [`Checkpoint`] is a safetensors file, a folder of shards with their index, or a pipeline that diffusers saved. Its
//! tensors stay in the mapped files. Which of them a layer adapts, all of it or some of its rows, is known from the same
//! inventories of names that adapters are matched by, whatever spelling either has.

mod bake;
mod extract;
mod low_rank;
mod quantised;
mod read;

pub use self::bake::{Bake, BakeOptions, BakeReport, BakedLayer, Survival};
pub use self::extract::{Extract, ExtractOptions, ExtractReport, Extracted, ExtractedLayer};
pub use self::quantised::Round;
pub use self::read::{Checkpoint, Module};
