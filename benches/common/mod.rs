//! What the benches share: devices and their limits, timing and results, numbers, activations, adapters.
#![allow(dead_code, unused_imports, reason = "each bench uses its own part")]

mod operations;
mod results;
mod roofline;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use loraweld::compute::ops::Activations;
use loraweld::compute::{DeviceOptions, Select};
use loraweld::{Adapter, Device, Dtype, Format, Layer, Matrix, RawMatrix, SaveOptions};
pub use operations::{Accumulation, Systems};
use rayon::prelude::*;
pub use results::{Rate, Work, bench, bench_recorded, criterion, median, write};
pub use roofline::Roofline;

/// A device under measurement.
pub struct Target {
    pub name: String,
    pub device: Device,
    /// Whether it takes shapes of real size: hardware, and anything if `LORAWELD_BENCH_FULL` is set.
    pub fast: bool,
    /// What it can do at most; the CPU has none.
    pub roofline: Option<Arc<Roofline>>,
    options: DeviceOptions,
}

/// Device memory that a bench of real size may take.
const MEMORY: u64 = 8 << 30;

/// Every hardware GPU; where there is none, the software adapter and the CPU. `LORAWELD_BENCH_DEVICE`, an index, a
/// part of a name or `cpu`, picks one.
pub fn targets() -> Vec<Target> {
    let (hardware, software): (Vec<_>, Vec<_>) =
        (0..).zip(Device::adapters()).partition(|(_, adapter)| adapter.kind != "software");
    let index = |(i, _)| Select::Index(i);
    let selected: Vec<Select> = match std::env::var("LORAWELD_BENCH_DEVICE") {
        Ok(text) if !text.is_empty() => vec![text.parse().expect("LORAWELD_BENCH_DEVICE: a device")],
        _ if !hardware.is_empty() => hardware.into_iter().map(index).collect(),
        _ => software.into_iter().map(index).chain([Select::Cpu]).collect(),
    };
    let open = |select: Select| Target::open(DeviceOptions { select, ..Default::default() });
    selected.into_iter().filter_map(open).collect()
}

impl Target {
    fn open(mut options: DeviceOptions) -> Option<Self> {
        let index = match Device::choice(&options.select) {
            Ok(index) => index,
            Err(error) => panic!("no such device: {error}"),
        };
        let adapter = index.map(|i| Device::adapters().swap_remove(i));
        let name = adapter.as_ref().map_or("CPU".to_owned(), |adapter| adapter.name.clone());
        let fast = adapter.as_ref().is_some_and(|adapter| adapter.kind != "software")
            || std::env::var_os("LORAWELD_BENCH_FULL").is_some();
        options.select = index.map_or(Select::Cpu, Select::Index);
        options.memory = fast.then_some(MEMORY);
        let device = match Device::open(&options) {
            Ok(device) => device,
            Err(error) => {
                eprintln!("skipped {name}: {error}");
                return None;
            }
        };
        // Once in a run, at full capabilities.
        static MEASURED: Mutex<BTreeMap<String, Option<Arc<Roofline>>>> = Mutex::new(BTreeMap::new());
        let mut measured = MEASURED.lock().expect("no panic while measuring");
        let roofline = measured.entry(name.clone()).or_insert_with(|| {
            let roofline = Roofline::measure(&device, fast);
            if let Some(roofline) = &roofline {
                eprintln!("{name}: {roofline:?}");
            }
            let made = adapter.as_ref();
            write(serde_json::json!({
                "side": "loraweld", "device": name, "work": "machine", "backend": made.map(|a| &a.backend),
                "driver": made.map(|a| &a.driver), "version": env!("CARGO_PKG_VERSION"),
                "checked": cfg!(debug_assertions), "limits": roofline,
            }));
            roofline.map(Arc::new)
        });
        Some(Self { name, fast, roofline: roofline.clone(), options, device })
    }

    /// The same adapter with other capabilities.
    pub fn with(&self, change: impl FnOnce(&mut DeviceOptions)) -> Option<Self> {
        let mut options = self.options.clone();
        change(&mut options);
        Self::open(options)
    }

    /// `large` for shapes of real size, else `small`.
    pub fn sized<T>(&self, large: T, small: T) -> T {
        if self.fast { large } else { small }
    }

    /// The rate that limits products of inputs of this type.
    pub fn products(&self) -> Rate {
        match self.device.capabilities() {
            Some(caps) if caps.matrix_units() => Rate::Matrix,
            _ => Rate::F32,
        }
    }
}

/// Submits work without waiting, so many times, and then waits once: a device that is kept busy.
pub fn kept_busy(device: &Device, times: u64, mut work: impl FnMut()) -> Duration {
    device.wait().expect("a working device");
    let start = Instant::now();
    (0..times).for_each(|_| work());
    device.wait().expect("a working device");
    start.elapsed()
}

/// [`kept_busy`] with submissions of recorded work.
pub fn submitted(device: &Device, times: u64, mut encode: impl FnMut(&mut wgpu::CommandEncoder)) -> Duration {
    let (gpu, queue) = device.wgpu().expect("a GPU");
    kept_busy(device, times, || {
        let mut encoder = gpu.create_command_encoder(&Default::default());
        encode(&mut encoder);
        queue.submit([encoder.finish()]);
    })
}

/// The plain time of work that waits for its own results.
pub fn timed(times: u64, mut work: impl FnMut()) -> Duration {
    let start = Instant::now();
    (0..times).for_each(|_| work());
    start.elapsed()
}

pub fn values(len: usize, seed: u64) -> impl Iterator<Item = f32> {
    // Seeds that follow one another make sequences that have nothing in common.
    let mut state = (seed ^ (seed >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    state = (state ^ (state >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (0..len).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    })
}

pub fn matrix<T: From<f32>>(rows: usize, cols: usize, seed: u64, scale: f32) -> Matrix<T> {
    Matrix::new(rows, cols, values(rows * cols, seed).map(|v| T::from(v * scale)).collect()).unwrap()
}

/// Activations of a layer, and where they are: in the device's memory, or on the host for the CPU.
pub struct Input {
    pub dtype: Dtype,
    pub tokens: usize,
    pub width: usize,
    seed: u64,
    place: Place,
}

enum Place {
    Host(Vec<u8>),
    Buffer(wgpu::Buffer),
}

impl Input {
    pub fn new(device: &Device, dtype: Dtype, tokens: usize, width: usize, seed: u64) -> Self {
        let bytes = Self::bytes(dtype, tokens, width, seed);
        let place = match device.wgpu() {
            None => Place::Host(bytes),
            Some((gpu, queue)) => {
                let buffer = gpu.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("activations"),
                    size: bytes.len() as u64,
                    usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                });
                queue.write_buffer(&buffer, 0, &bytes);
                // What was staged is freed.
                device.wait().expect("a working device");
                Place::Buffer(buffer)
            }
        };
        Self { dtype, tokens, width, seed, place }
    }

    /// As many as it takes for the caches to hold none of it when its turn comes again.
    pub fn many(target: &Target, dtype: Dtype, tokens: usize, width: usize) -> Vec<Self> {
        let one = tokens * width * dtype.size();
        let count = target.sized((256usize << 20).div_ceil(one).max(2), 1);
        (0..count as u64).map(|i| Self::new(&target.device, dtype, tokens, width, 1 + i)).collect()
    }

    fn bytes(dtype: Dtype, tokens: usize, width: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; tokens * width * dtype.size()];
        bytes.par_chunks_mut(width * dtype.size()).enumerate().for_each(|(row, out)| {
            let values = values(width, seed * 1_000_003 + row as u64);
            match dtype {
                Dtype::F32 => fill(out, values.map(f32::to_le_bytes)),
                Dtype::F16 => fill(out, values.map(|v| half::f16::from_f32(v).to_le_bytes())),
                Dtype::Bf16 => fill(out, values.map(|v| half::bf16::from_f32(v).to_le_bytes())),
            }
        });
        bytes
    }

    pub fn view(&self) -> Activations<'_> {
        let &Self { dtype, tokens, width, .. } = self;
        match &self.place {
            Place::Host(bytes) => {
                Activations::Host(RawMatrix::new(dtype, tokens, width, bytes).expect("a whole matrix"))
            }
            Place::Buffer(buffer) => Activations::Buffer { buffer, offset: 0, dtype, tokens, width },
        }
    }

    /// The same numbers on the host.
    pub fn on_host(&self) -> Self {
        let &Self { dtype, tokens, width, seed, .. } = self;
        Self { place: Place::Host(Self::bytes(dtype, tokens, width, seed)), ..*self }
    }

    pub fn byte_len(&self) -> usize {
        self.tokens * self.width * self.dtype.size()
    }
}

fn fill<const N: usize>(out: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
    out.chunks_exact_mut(N).zip(values).for_each(|(out, value)| out.copy_from_slice(&value));
}

/// ‖got − want‖ / ‖want‖ in the Frobenius norm.
pub fn relative(got: &Matrix, want: &Matrix) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut got.data().iter().zip(want.data()).map(|(g, w)| g - w));
    error / norm(&mut want.data().iter().copied())
}

/// A layer's name, and its widths: in, out.
pub type LayerShape = (String, usize, usize);

/// Widths (in, out) of the 304 layers of a LoRA for FLUX.1, by module of a block.
const DOUBLE: [(&str, usize, usize); 10] = [
    ("img_attn.qkv", 3072, 9216),
    ("img_attn.proj", 3072, 3072),
    ("img_mlp.0", 3072, 12288),
    ("img_mlp.2", 12288, 3072),
    ("img_mod.lin", 3072, 18432),
    ("txt_attn.qkv", 3072, 9216),
    ("txt_attn.proj", 3072, 3072),
    ("txt_mlp.0", 3072, 12288),
    ("txt_mlp.2", 12288, 3072),
    ("txt_mod.lin", 3072, 18432),
];
const SINGLE: [(&str, usize, usize); 3] =
    [("linear1", 3072, 21504), ("linear2", 15360, 3072), ("modulation.lin", 3072, 9216)];

/// The layers of FLUX.1 on hardware, else those of two small blocks. Names are those of no model, so that no layer is
/// taken apart.
pub fn flux_layers(target: &Target) -> Vec<LayerShape> {
    let (double, single, narrower) = target.sized((19, 38, 1), (1, 1, 24));
    let of = |kind: &'static str, count: usize, modules: &'static [(&str, usize, usize)]| {
        (0..count).flat_map(move |i| {
            let name = move |module| format!("bench_{kind}.{i}.{module}");
            modules.iter().map(move |(module, a, b)| (name(module), a / narrower, b / narrower))
        })
    };
    of("double", double, &DOUBLE).chain(of("single", single, &SINGLE)).collect()
}

/// An adapter in memory, in f32.
pub fn adapter(name: &str, layers: &[LayerShape], rank: usize, seed: u64) -> Adapter {
    let layer = |(i, (name, input, output)): (usize, &LayerShape)| {
        let seed = seed * 10_000 + 2 * i as u64;
        let a = matrix(rank, *input, seed, 1.0 / (*input as f32).sqrt());
        let b = matrix(*output, rank, seed + 1, 1.0 / (rank as f32).sqrt());
        Layer::new(name, a, b).expect("a layer")
    };
    let layers = layers.par_iter().enumerate().map(layer).collect();
    Adapter::new(name, Format::Peft, layers).expect("an adapter")
}

/// The same in bf16 in a file of this folder, as adapters come.
pub fn adapter_file(folder: &Path, layers: &[LayerShape], rank: usize, seed: u64) -> Adapter {
    let path = folder.join(format!("{seed}.safetensors"));
    let options = SaveOptions { dtype: Some(Dtype::Bf16), ..Default::default() };
    adapter(&format!("adapter {seed}"), layers, rank, seed).save(&path, &options).expect("a file");
    Adapter::open(path).expect("the file")
}

/// Values of A and of B in an adapter of one rank 1.
pub fn widths(layers: &[LayerShape]) -> (f64, f64) {
    let sum = |of: fn(&LayerShape) -> usize| layers.iter().map(of).sum::<usize>() as f64;
    (sum(|layer| layer.1), sum(|layer| layer.2))
}
