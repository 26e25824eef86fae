//! See `tests/suite/hostile/bodies.rs`.
#![no_main]

#[path = "../../tests/suite/hostile/bodies.rs"]
#[allow(dead_code, reason = "each target takes one of them")]
mod bodies;

libfuzzer_sys::fuzz_target!(|text: &str| bodies::keys(text));
