//! How much memory baking takes, and that merging keeps none. A program of its own: it counts what is on the heap of the
//! whole process.

#[path = "suite/common/files.rs"]
#[allow(dead_code, reason = "it needs less of them than the suite")]
mod files;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use files::{f32s, file_of};
use loraweld::merge::{Needs, Options, method};
use loraweld::{
    Adapter, Bake, BakeOptions, Calibration, Checkpoint, Control, Destination, Device, DeviceOptions,
    METHODS, OpenOptions, RawMatrix, SaveOptions, Select, Truncation, Unnamed,
};

const MIB: usize = 1 << 20;

/// Bytes on the heap, and the most there were.
struct Counting;
static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// One test at a time, or they count each other's.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn memory_does_not_grow_with_the_checkpoint() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // 64 MiB of a weight that is adapted and 128 MiB of one that is not, all zero, and so without a place on the disk.
    let header = serde_json::json!({
        "blocks.0.ffn.0.weight": { "dtype": "BF16", "shape": [8192, 4096], "data_offsets": [0, 64 * MIB] },
        "blocks.0.ffn.2.weight": { "dtype": "BF16", "shape": [4096, 16384], "data_offsets": [64 * MIB, 192 * MIB] },
    });
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = fs::File::create(path("base.safetensors")).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&header)).unwrap();
    file.set_len((8 + header.len() + 192 * MIB) as u64).unwrap();
    let values = |n: usize| f32s(&(0..n).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>());
    let name = |factor: &str| format!("diffusion_model.blocks.0.ffn.0.{factor}.weight");
    let (a, b) = (name("lora_A"), name("lora_B"));
    let lora = [(&a[..], "F32", &[4, 4096][..], values(4 * 4096)), (&b, "F32", &[8192, 4], values(8192 * 4))];
    fs::write(path("lora.safetensors"), file_of(&[], &lora)).unwrap();

    let base = Checkpoint::open(path("base.safetensors")).unwrap();
    let options = OpenOptions { family: Some(base.family()), ..Default::default() };
    let adapter = Adapter::open_with(path("lora.safetensors"), &options).unwrap();
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let bake = Bake::new(&base, &[adapter.at(1.0)], &BakeOptions::default()).unwrap();
    let report = bake.save(path("out.safetensors"), &Control::default()).unwrap();
    let peak = PEAK.load(Ordering::Relaxed) - before;
    assert_eq!(report.layers.len(), 1);
    assert!(report.survival.correlation > 0.9999, "{report}");
    // Each thread has a few MiB for the piece that it is at.
    let most = 16 * MIB + rayon::current_num_threads() * 4 * MIB;
    assert!(peak < most, "{} MiB on the heap for a file of 192 MiB", peak / MIB);
}

/// Bytes of the process that are resident, where the system tells.
fn resident() -> Option<usize> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    Some(4096 * text.split(' ').nth(1)?.parse::<usize>().ok()?)
}

/// Opening, calibrating, merging and writing, again and again: what is on the heap afterwards does not grow. The soak script
/// asks for 1,000 merges (`LORAWELD_SOAK_MERGES`), and then the resident size must not grow by more than 1 % either.
#[test]
fn merges_keep_no_memory() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let asked = std::env::var("LORAWELD_SOAK_MERGES").ok().map(|text| text.parse().expect("a number"));
    let merges: usize = asked.unwrap_or(90);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let values =
        |n: usize, seed: usize| f32s(&(0..n).map(|i| ((i + seed) as f32 * 0.7).sin()).collect::<Vec<_>>());
    for (seed, name) in ["a", "b"].iter().enumerate() {
        let module = |i: usize| format!("transformer.transformer_blocks.{i}.attn.to_q");
        let names: Vec<[String; 2]> =
            (0..3).map(|i| ["lora_A", "lora_B"].map(|f| format!("{}.{f}.weight", module(i)))).collect();
        let tensors: Vec<_> = names
            .iter()
            .flat_map(|[a, b]| {
                [
                    (&a[..], "F32", &[4, 64][..], values(256, seed)),
                    (&b[..], "F32", &[96, 4], values(384, seed + 9)),
                ]
            })
            .collect();
        fs::write(path(name), file_of(&[], &tensors)).unwrap();
    }
    let tokens: Vec<f32> = (0..16 * 64).map(|i| (i as f32 * 1.3).cos()).collect();
    let mut devices = vec![Device::cpu()];
    devices.extend(Device::open(&DeviceOptions { select: Select::Gpu, ..Default::default() }).ok());
    let merge = |i: usize| {
        let entry = &METHODS[i % METHODS.len()];
        let device = &devices[i / METHODS.len() % devices.len()];
        let adapters = ["a", "b"].map(|name| Adapter::open(path(name)).unwrap());
        let mut calibration = Calibration::new(&adapters).unwrap();
        for (task, adapter) in adapters.iter().enumerate() {
            for layer in adapter.layers() {
                let x = RawMatrix::from_f32(16, 64, &tokens).unwrap();
                calibration.accumulate(device, task, layer.key().as_str(), x).unwrap();
            }
        }
        let mut options = Options::new();
        if entry.needs == Needs::Truncation {
            options.insert("rank".into(), 4.into());
        }
        let calibration = matches!(entry.needs, Needs::Calibration { .. }).then_some(&calibration);
        let method = method(entry.name, options, calibration).unwrap();
        let options = SaveOptions { unnamed: Unnamed::Keep, overwrite: true, ..Default::default() };
        let out = path("out");
        let to = Destination { path: &out, sink: None, options: &options, truncation: Truncation::default() };
        let weighted = [adapters[0].at(1.0), adapters[1].at(0.5)];
        method.merge_into(device, &weighted, &to, Control::default()).unwrap();
    };
    // Pools, pipelines and threads are made by the first ones.
    let first = (2 * METHODS.len() * devices.len()).max(merges / 4);
    (0..first).for_each(merge);
    let wait = || devices.iter().for_each(|device| device.wait().unwrap());
    wait();
    let (heap, before) = (NOW.load(Ordering::Relaxed), resident());
    (first..first + merges).for_each(merge);
    wait();
    let (grown, after) = (NOW.load(Ordering::Relaxed).saturating_sub(heap), resident());
    eprintln!(
        "{merges} merges after {first}: {grown} bytes more on the heap; resident {before:?}, then {after:?}"
    );
    assert!(grown * 100 <= heap, "{grown} bytes of {heap} more after {merges} merges");
    if let (Some(before), Some(after), Some(_)) = (before, after, asked) {
        assert!(after <= before + before / 100, "resident: {before}, then {after}");
    }
}
