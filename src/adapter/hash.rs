//! SHA-256 of adapters.

use sha2::{Digest, Sha256};

use super::{Adapter, Layer};
use crate::io::safetensors_file::SafetensorsFile;
use crate::words::hex;
use crate::{Control, RawMatrix, Result};

/// Elements widened at a time.
const CHUNK: usize = 1 << 14;

/// Bytes hashed between looks at the cancellation token.
const BLOCK: usize = 4 << 20;

pub(super) fn of_file(file: &SafetensorsFile, control: &Control<'_>) -> Result<String> {
    let mut sha = Sha256::new();
    for start in (0..file.size()).step_by(BLOCK) {
        control.check()?;
        sha.update(file.read(start..file.size().min(start + BLOCK as u64))?);
    }
    Ok(hex(sha.finalize().as_slice()))
}

/// See [`Adapter::a_sha256`].
pub(super) fn of_a(adapter: &Adapter) -> String {
    let mut sha = Sha256::new();
    for Layer { key, rank, input, .. } in adapter.layers() {
        sha.update((key.as_str().len() as u64).to_le_bytes());
        sha.update(key.as_str());
        sha.update((*rank as u64).to_le_bytes());
        sha.update((*input as u64).to_le_bytes());
    }
    let (mut values, mut bytes) = (vec![0f32; CHUNK], Vec::with_capacity(4 * CHUNK));
    for layer in adapter.layers() {
        let layer = layer.unread();
        let a = layer.a();
        for chunk in a.bytes().chunks(CHUNK * a.dtype().size()) {
            let n = chunk.len() / a.dtype().size();
            RawMatrix::within(a.dtype(), 1, n, chunk).widen_into(&mut values[..n]);
            bytes.clear();
            bytes.extend(values[..n].iter().flat_map(|v| v.to_le_bytes()));
            sha.update(&bytes);
        }
    }
    hex(sha.finalize().as_slice())
}
