//! What everything is read, written and stopped with: mapped safetensors files, files that are written whole or not at all,
//! factors that no file holds yet, and the [`Control`] of long calls.

pub(crate) mod atomic;
mod control;
pub(crate) mod safetensors_file;
pub(crate) mod spill;

pub use self::control::{Control, Progress};
