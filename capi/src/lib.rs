//! The C interface of loraweld: `include/loraweld.h`, for hosts in C, C++, Swift and whatever else calls C.
//!
//! One file for each kind of handle. `ffi` turns pointers into references and back and holds almost all of what is
//! unsafe; `status` turns errors and panics into codes and messages. The header is made from these sources by cbindgen;
//! the conventions that it opens with (`cbindgen.toml`) are the contract that every `unsafe` here relies on.

#![allow(clippy::missing_safety_doc, reason = "the header opens with what holds for every function")]

mod adapter;
mod calibration;
mod control;
mod device;
mod ffi;
mod merge;
mod method;
mod status;

pub use adapter::*;
pub use calibration::*;
pub use control::*;
pub use device::*;
pub use merge::*;
pub use status::*;

use std::ffi::c_char;

/// The version of the library, such as `0.1.0`. Never freed.
#[unsafe(no_mangle)]
pub extern "C" fn loraweld_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}
