//! Any bytes for a file: the header of safetensors, shapes, and whatever kind of adapter its tensors make.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loraweld::Adapter;

fuzz_target!(|data: &[u8]| {
    if let Ok(adapter) = Adapter::from_bytes("fuzz", data.to_vec()) {
        let _ = adapter.check_finite();
        let _ = adapter.a_sha256();
        for layer in adapter.layers() {
            assert_eq!(layer.a().bytes().len(), layer.rank() * layer.input() * layer.a().dtype().size());
            assert_eq!(layer.b().bytes().len(), layer.rank() * layer.output() * layer.b().dtype().size());
        }
    }
});
