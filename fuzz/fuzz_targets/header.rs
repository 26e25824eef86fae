//! See `tests/suite/hostile/bodies.rs`.
#![no_main]

#[path = "../../tests/suite/hostile/bodies.rs"]
#[allow(dead_code, reason = "each target takes one of them")]
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::header(data));
