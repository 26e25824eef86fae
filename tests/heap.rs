//! How much memory baking takes. A program of its own: it counts what is on the heap of the whole process.

#[path = "suite/common/files.rs"]
#[allow(dead_code, reason = "it needs less of them than the suite")]
mod files;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use files::{f32s, file_of};
use loraweld::{Adapter, Bake, BakeOptions, Checkpoint, Control, OpenOptions};

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

#[test]
fn memory_does_not_grow_with_the_checkpoint() {
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
