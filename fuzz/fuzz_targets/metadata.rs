//! Any text for the fields of the metadata that are read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loraweld::Adapter;

const FIELDS: [&str; 8] = [
    "lora_adapter_metadata",
    "lora_alpha",
    "ss_network_alpha",
    "ss_network_args",
    "ss_tag_frequency",
    "ss_base_model_version",
    "modelspec.architecture",
    "modelspec.trigger_phrase",
];

fuzz_target!(|text: &str| {
    for field in FIELDS {
        let header = serde_json::json!({
            "__metadata__": { field: text },
            "transformer.a.0.q.lora_A.weight": { "dtype": "F16", "shape": [1, 2], "data_offsets": [0, 4] },
            "transformer.a.0.q.lora_B.weight": { "dtype": "F16", "shape": [2, 1], "data_offsets": [4, 8] },
        });
        let header = serde_json::to_vec(&header).expect("a header");
        let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &[0x3c; 8]].concat();
        if let Ok(adapter) = Adapter::from_bytes("fuzz", bytes) {
            assert!(adapter.layers()[0].scale().value.is_finite());
            let _ = Adapter::common_metadata([&adapter, &adapter]);
        }
    }
});
