//! See `capi/tests/calls/body.rs`.
#![no_main]

#[path = "../../capi/tests/calls/body.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = body::calls(&mut arbitrary::Unstructured::new(data));
});
