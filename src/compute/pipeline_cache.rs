//! Compiled pipelines, kept on disk: drivers take up to seconds to make them anew in every process.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest, Sha256};

use super::wait;
use crate::Error;
use crate::io::{disk, write_atomic};
use crate::words::hex;

/// A driver's cache, and the file that it comes from and goes to.
pub(super) struct PipelineCache {
    cache: wgpu::PipelineCache,
    file: PathBuf,
    /// Whether it holds more than the file.
    grown: AtomicBool,
}

impl PipelineCache {
    /// Reads the cache of this adapter and driver from a folder, where the device can have one. A file that is missing or
    /// damaged counts as an empty one.
    pub fn open(adapter: &wgpu::Adapter, device: &wgpu::Device, folder: &Path) -> Option<Self> {
        let info = adapter.get_info();
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let key = format!(
            "{} {} {} {}",
            wgpu::util::pipeline_cache_key(&info)?,
            info.name,
            info.driver,
            info.driver_info
        );
        let file = folder.join(format!("pipelines-{}", &hex(&Sha256::digest(key))[..16]));
        let data = match disk::read(&file) {
            Ok(bytes) => unsealed(&bytes).map(<[u8]>::to_vec),
            Err(_) => None,
        };
        tracing::debug!(file = %file.display(), found = data.is_some(), "pipeline cache");
        // SAFETY: the data must be what `get_data` of wgpu gave for this adapter and driver. `save` writes nothing else, the
        // file's name depends on both, and its hash shows that it is whole. That nobody else wrote it, hash and all, is for
        // those to see to who may write to the folder: they are trusted as the one is who named it, and
        // `DeviceOptions::pipeline_cache` says so. wgpu and the driver check the data again.
        let create = |data: Option<&[u8]>| unsafe {
            device.create_pipeline_cache(&wgpu::PipelineCacheDescriptor {
                label: Some("loraweld"),
                data,
                fallback: true,
            })
        };
        // A driver may refuse what wgpu lets pass, and then no pipeline could be made with the cache.
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let mut cache = create(data.as_deref());
        if let Some(error) = wait::block_on(scope.pop()) {
            tracing::debug!(%error, "the pipeline cache is of no use");
            cache = create(None);
        }
        Some(Self { cache, file, grown: false.into() })
    }

    /// What pipelines are made with.
    pub fn cache(&self) -> &wgpu::PipelineCache {
        self.grown.store(true, Ordering::Relaxed);
        &self.cache
    }

    /// Writes the cache, if a pipeline was made and it has changed. That it cannot is no reason to fail.
    pub fn save(&self) {
        if !self.grown.swap(false, Ordering::Relaxed) {
            return;
        }
        let Some(data) = self.cache.get_data() else { return };
        let bytes = sealed(&data);
        let write = || -> crate::Result<()> {
            if disk::read(&self.file).is_ok_and(|old| old == bytes) {
                return Ok(());
            }
            let folder = self.file.parent().unwrap_or(Path::new("."));
            disk::create_folder(folder).map_err(|e| Error::io(folder, "create the folder", e))?;
            // Another process sees the old file or the new one.
            write_atomic(&self.file, true, &[], |out| out.write_all(&bytes))
        };
        match write() {
            Ok(()) => {
                tracing::debug!(file = %self.file.display(), bytes = bytes.len(), "saved the pipeline cache")
            }
            Err(error) => {
                tracing::debug!(file = %self.file.display(), %error, "cannot save the pipeline cache")
            }
        }
    }
}

/// The data after its hash.
fn sealed(data: &[u8]) -> Vec<u8> {
    [Sha256::digest(data).as_slice(), data].concat()
}

/// The data, if it is whole.
fn unsealed(bytes: &[u8]) -> Option<&[u8]> {
    let (hash, data) = bytes.split_at_checked(32)?;
    (Sha256::digest(data).as_slice() == hash).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files that are whole by their hash, and yet not of this driver: wgpu and the driver look at what is in them.
    #[test]
    fn caches_of_others_are_left_alone() {
        use crate::{Device, DeviceOptions, Matrix, Select};
        let folder = tempfile::tempdir().unwrap();
        let options = || DeviceOptions {
            select: Select::Gpu,
            pipeline_cache: Some(folder.path().to_owned()),
            ..Default::default()
        };
        let product = |options: &DeviceOptions| {
            let device = Device::open(options)?;
            let ones = [Matrix::from_fn(5, 5, |i, j| (i + 2 * j) as f64)];
            let a = crate::compute::Batch::upload(&device, device.factor(), &ones)?;
            crate::compute::ops::matmul(&device, &a, &a)?.download(&device)
        };
        let Ok(want) = product(&DeviceOptions { pipeline_cache: None, ..options() }) else {
            assert!(std::env::var_os("LORAWELD_ALLOW_NO_GPU").is_some(), "there is no GPU to test");
            return;
        };
        assert!(product(&options()).unwrap() == want);
        let files = || std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let Some(file) = files().next() else { return };
        let whole = std::fs::read(&file).unwrap();
        let data = unsealed(&whole).unwrap().to_vec();
        let mut others: Vec<Vec<u8>> =
            vec![Vec::new(), vec![0; 40], vec![0xff; 4096], data[..data.len() / 2].to_vec()];
        for at in [0, 4, 8, 16, 31, 40, 60] {
            let mut other = data.clone();
            if let Some(byte) = other.get_mut(at) {
                *byte ^= 0xff;
            }
            others.push(other);
        }
        for (i, other) in others.iter().enumerate() {
            std::fs::write(&file, sealed(other)).unwrap();
            assert!(product(&options()).unwrap() == want, "cache {i}");
        }
        // And those that are torn by what writes in place.
        for cut in [1, 31, 32, 33, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&file, &whole[..cut]).unwrap();
            assert!(product(&options()).unwrap() == want, "cut at {cut}");
        }
        // Nor is a folder that cannot be written to a reason to fail.
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert!(product(&options()).unwrap() == want, "a folder in the file's place");
    }

    #[test]
    fn what_is_damaged_is_not_given_to_a_driver() {
        let whole = sealed(b"pipelines");
        assert_eq!(unsealed(&whole), Some(&b"pipelines"[..]));
        assert_eq!(unsealed(&sealed(b"")), Some(&b""[..]));
        for cut in 0..whole.len() {
            assert_eq!(unsealed(&whole[..cut]), None, "{cut}");
        }
        for i in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[i] ^= 1;
            assert_eq!(unsealed(&bytes), None, "{i}");
        }
    }
}
