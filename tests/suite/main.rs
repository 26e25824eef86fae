//! What loraweld promises, held against definitions in f64, real files and the command line; on the CPU and in all tiers of
//! a GPU. One program, so that it is linked once and its devices are opened once.

mod common;

mod adapter;
mod algebra;
mod baselines;
mod batch;
mod calibration;
mod checkpoint;
mod cli;
mod convert;
mod definitions;
mod entries;
mod families;
mod field;
mod fusion;
mod hostile;
mod known_issues;
mod load;
mod memory;
mod np_lora;
mod ops;
mod portability;
mod report;
mod soak;
mod soundness;
mod sources;
mod ssr;
mod streaming;
mod truncating;
mod weights;
