//! What the benches share: devices, numbers, activations, adapters.
#![allow(dead_code, reason = "each bench uses its own part")]

use std::path::Path;

use loraweld::compute::ops::Activations;
use loraweld::compute::{DeviceOptions, Select};
use loraweld::{Adapter, Device, Dtype, Format, Layer, Matrix, RawMatrix, SaveOptions};

/// Every hardware GPU, or else the software adapter, and the CPU.
pub fn devices() -> Vec<(String, Device, bool)> {
    let mut all = Vec::new();
    for (i, adapter) in Device::adapters().iter().enumerate() {
        let options = DeviceOptions { select: Select::Index(i), ..Default::default() };
        match Device::open(&options) {
            Ok(device) => all.push((adapter.name.clone(), device, adapter.kind != "software")),
            Err(error) => eprintln!("skipped {}: {error}", adapter.name),
        }
    }
    all.push(("CPU".to_owned(), Device::cpu(), false));
    all
}

pub fn values(len: usize, seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed;
    (0..len).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    })
}

/// Activations in the device's memory, or on the host for the CPU.
pub enum Input {
    Host(Vec<u8>),
    Buffer(wgpu::Buffer),
}

impl Input {
    pub fn new(device: &Device, dtype: Dtype, tokens: usize, width: usize) -> Self {
        let bytes: Vec<u8> = values(tokens * width, 1)
            .flat_map(|v| match dtype {
                Dtype::F32 => v.to_le_bytes().to_vec(),
                Dtype::F16 => half::f16::from_f32(v).to_le_bytes().to_vec(),
                Dtype::Bf16 => half::bf16::from_f32(v).to_le_bytes().to_vec(),
            })
            .collect();
        let Some((gpu, queue)) = device.wgpu() else { return Self::Host(bytes) };
        let buffer = gpu.create_buffer(&wgpu::BufferDescriptor {
            label: Some("activations"),
            size: bytes.len() as u64,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        queue.write_buffer(&buffer, 0, &bytes);
        Self::Buffer(buffer)
    }

    pub fn view(&self, dtype: Dtype, tokens: usize, width: usize) -> Activations<'_> {
        match self {
            Self::Host(bytes) => {
                Activations::Host(RawMatrix::new(dtype, tokens, width, bytes).expect("a whole matrix"))
            }
            Self::Buffer(buffer) => Activations::Buffer { buffer, offset: 0, dtype, tokens, width },
        }
    }
}

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

/// An adapter of FLUX.1's shapes, in bf16 in a file, of a share of the blocks. Names are those of no model, so that no layer
/// is taken apart.
pub fn flux(path: &Path, rank: usize, share: f64, seed: u64) -> Adapter {
    let blocks = |count: f64, kind: &str, modules: &[(&str, usize, usize)]| -> Vec<(String, usize, usize)> {
        let count = (count * share).ceil() as usize;
        let of =
            |i: usize| modules.iter().map(move |(m, a, b)| (format!("{i}.{m}"), *a, *b)).collect::<Vec<_>>();
        (0..count).flat_map(of).map(|(name, a, b)| (format!("bench_{kind}.{name}"), a, b)).collect()
    };
    let mut layers = blocks(19.0, "double", &DOUBLE);
    layers.extend(blocks(38.0, "single", &SINGLE));
    let matrix = |rows: usize, cols: usize, seed: u64| Matrix {
        rows,
        cols,
        data: values(rows * cols, seed).map(|v| v / (cols as f32).sqrt()).collect(),
    };
    let layers = layers.iter().enumerate().map(|(i, (name, input, output))| {
        let seed = seed * 10_000 + 2 * i as u64;
        Layer::new(name, matrix(rank, *input, seed), matrix(*output, rank, seed + 1)).expect("a layer")
    });
    let adapter = Adapter::new("flux", Format::Peft, layers.collect()).expect("an adapter");
    let options = SaveOptions { dtype: Some(Dtype::Bf16), ..Default::default() };
    adapter.save(path, &options).expect("a file");
    Adapter::open(path).expect("the file")
}
