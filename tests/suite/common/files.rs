//! Safetensors files made by hand.

use std::collections::BTreeMap;

/// A tensor for a file made by hand: key, type, shape, bytes.
pub type Raw<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

pub fn file_of(metadata: &[(&str, &str)], tensors: &[Raw]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert(
        "__metadata__".into(),
        metadata.iter().copied().collect::<BTreeMap<_, _>>().into_iter().collect(),
    );
    let mut data = Vec::new();
    for (key, dtype, shape, bytes) in tensors {
        let end = data.len() + bytes.len();
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), end]});
        header.insert((*key).into(), info);
        data.extend(bytes);
    }
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

pub fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A file's tensors: key, type, shape, bytes.
pub type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

/// Takes a file apart.
pub fn tensors(bytes: &[u8]) -> Tensors {
    let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
    let parts =
        |t: &safetensors::tensor::TensorView| (t.dtype().to_string(), t.shape().to_vec(), t.data().to_vec());
    file.iter().map(|(name, t)| (name.to_owned(), parts(&t))).collect()
}
