//! Adapters, calibrations and results in what a host has instead of files.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use loraweld::fusion::{KLoraOptions, k_lora};
use loraweld::{
    Adapter, Calibration, Checkpoint, Control, Destination, Device, Dtype, Error, Linear, Method, NpLora,
    OpenOptions, ReadAt, SaveOptions, Ssr, SvdMerge, Truncation, WriteAt,
};

use crate::common::fixtures::{activations, calibrated, data};

/// An entry of a host's archive, read in pieces; it can be made to fail.
struct Entry {
    bytes: Vec<u8>,
    read: AtomicU64,
    fails: AtomicBool,
    changed: AtomicBool,
}

impl Entry {
    fn of(path: &Path) -> Arc<Self> {
        let bytes = std::fs::read(path).unwrap();
        let (read, fails, changed) = (AtomicU64::new(0), false.into(), false.into());
        Arc::new(Self { bytes, read, fails, changed })
    }
}

impl ReadAt for Entry {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(io::Error::other("the archive is gone"));
        }
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        buffer.copy_from_slice(&self.bytes[offset as usize..][..buffer.len()]);
        Ok(())
    }
    fn check(&self) -> io::Result<()> {
        match self.changed.load(Ordering::Relaxed) {
            true => Err(io::Error::other("the archive was written to")),
            false => Ok(()),
        }
    }
}

/// What a host writes to; it can be made to have room for so many bytes only.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    room: Option<usize>,
}

impl WriteAt for Memory {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut all = self.bytes.lock().unwrap();
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        if self.room.is_some_and(|room| end > room) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if all.len() < end {
            all.resize(end, 0);
        }
        all[start..end].copy_from_slice(bytes);
        Ok(())
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let all = self.bytes.lock().unwrap();
        buffer.copy_from_slice(&all[offset as usize..][..buffer.len()]);
        Ok(())
    }
    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.bytes.lock().unwrap().resize(bytes as usize, 0);
        Ok(())
    }
}

fn lora(name: &str) -> std::path::PathBuf {
    data(&format!("loras/{name}.safetensors"))
}

fn from(entry: &Arc<Entry>, name: &str) -> Adapter {
    Adapter::from_source(name, entry.clone(), &OpenOptions::default()).unwrap()
}

/// Merges that the planned file holds, and those that need another.
fn merges() -> Vec<(Box<dyn Method>, Truncation)> {
    let spectrum = Truncation::spectrum(loraweld::Spectrum::Frobenius(0.9));
    vec![
        (Box::new(Linear), Truncation::default()),
        (Box::new(SvdMerge::new(Truncation::rank(7))), Truncation::default()),
        (Box::new(NpLora::soft(0.5)), spectrum),
        (Box::new(Ssr::data_free()), spectrum),
    ]
}

#[test]
fn a_host_merges_what_it_has_into_what_it_has() {
    let names = ["concept_c3_mirror", "style_shade"];
    let entries = names.map(|name| Entry::of(&lora(name)));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("merged");
    for (method, truncation) in merges() {
        let options = SaveOptions { dtype: Some(Dtype::F16), overwrite: true, ..Default::default() };
        let files = names.map(|name| Adapter::open(lora(name)).unwrap());
        let weighted = [files[0].at(1.0), files[1].at(0.8)];
        let to = Destination { path: &path, sink: None, options: &options, truncation };
        method.merge_into(&Device::cpu(), &weighted, &to, Control::default()).unwrap();

        let own = [0, 1].map(|i| from(&entries[i], names[i]));
        let weighted = [own[0].at(1.0), own[1].at(0.8)];
        let sink = Memory::default();
        let to = Destination { sink: Some(&sink), ..to };
        method.merge_into(&Device::cpu(), &weighted, &to, Control::default()).unwrap();
        assert!(std::fs::read(&path).unwrap() == *sink.bytes.lock().unwrap(), "the results differ");
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
}

#[test]
fn an_adapter_reads_no_more_than_it_needs() {
    let entry = Entry::of(&lora("style_shade"));
    let adapter = from(&entry, "shade");
    let (file, size) = (Adapter::open(lora("style_shade")).unwrap(), entry.size());
    assert!(entry.read.load(Ordering::Relaxed) < size / 4, "opening reads tensors");
    assert_eq!(adapter.file_sha256().unwrap(), file.file_sha256().unwrap());
    assert_eq!(adapter.a_sha256(), file.a_sha256());
    assert_eq!(adapter.layers()[0].norm().to_bits(), file.layers()[0].norm().to_bits());
    let sink = Memory::default();
    adapter.save_to("copy", &sink, &SaveOptions::default(), Control::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    file.save(folder.path().join("copy"), &SaveOptions::default()).unwrap();
    assert!(std::fs::read(folder.path().join("copy")).unwrap() == *sink.bytes.lock().unwrap());
    // Whole, when it is asked for whole.
    assert!(adapter.file_bytes().unwrap() == file.file_bytes().unwrap());
}

#[test]
fn what_a_host_cannot_read_is_an_error_that_names_it() {
    let is_named = |error: Error, why: &str| {
        let text = error.to_string();
        assert!(text.starts_with("shade: cannot read: ") && text.ends_with(why), "{text}");
    };
    let options = SaveOptions::default();
    for changed in [false, true] {
        let entry = Entry::of(&lora("style_shade"));
        let why = if changed { "the archive was written to" } else { "the archive is gone" };
        let adapter = from(&entry, "shade");
        let broken = || if changed { &entry.changed } else { &entry.fails };
        let (sink, none) = (Memory::default(), Control::default());
        for (method, truncation) in merges() {
            broken().store(true, Ordering::Relaxed);
            let weighted = [adapter.at(1.0), adapter.at(0.5)];
            let to = Destination { path: "out".as_ref(), sink: Some(&sink), options: &options, truncation };
            is_named(method.merge_into(&Device::cpu(), &weighted, &to, none).unwrap_err(), why);
            is_named(method.merge_any(&Device::cpu(), &weighted, none).unwrap_err(), why);
        }
        is_named(adapter.save_to("out", &sink, &options, none).unwrap_err(), why);
        is_named(adapter.check_finite().unwrap_err(), why);
        let schedule = k_lora(adapter.at(1.0), adapter.at(1.0), &KLoraOptions::default(), none);
        is_named(schedule.unwrap_err(), why);
        // A failure is not forgotten: some of what was computed may rest on it.
        entry.fails.store(false, Ordering::Relaxed);
        is_named(adapter.save_to("out", &sink, &options, none).unwrap_err(), why);
        assert!(from(&Entry::of(&lora("style_shade")), "shade").check_finite().is_ok());
    }
}

#[test]
fn a_sink_without_room_is_an_error_that_names_it() {
    let adapter = Adapter::open(lora("style_shade")).unwrap();
    for (method, truncation) in merges() {
        for room in [0, 1000, 100_000] {
            let sink = Memory { room: Some(room), ..Default::default() };
            let options = SaveOptions::default();
            let to = Destination { path: "out".as_ref(), sink: Some(&sink), options: &options, truncation };
            let weighted = [adapter.at(1.0), adapter.at(0.5)];
            let result = method.merge_into(&Device::cpu(), &weighted, &to, Control::default());
            let text = result.unwrap_err().to_string();
            assert!(text.starts_with("out: cannot write: "), "{text}");
        }
    }
}

#[test]
fn calibrations_and_checkpoints_of_a_host() {
    let adapters = [Adapter::open(lora("concept_c3_mirror")).unwrap()];
    let calibration = calibrated(&Device::cpu(), &adapters, "step1", &["concept_c3_mirror"]);
    let folder = tempfile::tempdir().unwrap();
    let (path, again) = (folder.path().join("file"), folder.path().join("again"));
    calibration.save(&path, false).unwrap();
    Calibration::from_source("calibration", Entry::of(&path)).unwrap().save(&again, false).unwrap();
    assert!(std::fs::read(&path).unwrap() == std::fs::read(&again).unwrap());

    let file = activations("step1", "concept_c3_mirror");
    let entry = Entry::of(&file);
    let checkpoint = Checkpoint::from_source("model", entry.clone()).unwrap();
    assert_eq!(checkpoint.modules().len(), Checkpoint::open(&file).unwrap().modules().len());
    assert!(entry.read.load(Ordering::Relaxed) < entry.size() / 4);
}
