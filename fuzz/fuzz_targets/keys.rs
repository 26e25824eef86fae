//! Lines for the keys of tensors: prefixes, names of families, suffixes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loraweld::{Adapter, Format, LayerKey};

fuzz_target!(|text: &str| {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for line in text.lines().take(16) {
        let key = LayerKey::parse(line);
        assert_eq!(LayerKey::parse(key.as_str()), key, "{line}");
        // A matrix that is A or B of whatever it is: 2 x 2 of f16.
        let info = serde_json::json!({ "dtype": "F16", "shape": [2, 2], "data_offsets": [end, end + 8] });
        if header.insert(line.to_owned(), info).is_none() {
            end += 8;
        }
    }
    let header = serde_json::to_vec(&header).expect("a header");
    let bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &vec![0x3c; end]].concat();
    if let Ok(adapter) = Adapter::from_bytes("fuzz", bytes) {
        for layer in adapter.layers() {
            assert!(Format::ALL.contains(&layer.format().unwrap_or(Format::Peft)));
            assert!(layer.matches("*") && !layer.block().is_empty());
            assert!(layer.key().as_str() == LayerKey::parse(&layer.name()).as_str(), "{}", layer.name());
        }
    }
});
