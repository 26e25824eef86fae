//! What the benches share: devices, numbers, activations.

use loraweld::compute::ops::Activations;
use loraweld::compute::{DeviceOptions, Select};
use loraweld::{Device, Dtype, RawMatrix};

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
