//! Two adapters fused while a host's model runs, inside the host's own command encoder.
//!
//! ```text
//! cargo run --release --example fuse_live
//! ```
//!
//! The host is a stack of linear layers, each with a compute shader of its own; it stands for a model that runs on wgpu.
//! After each layer it lets loraweld change the output in place: each token takes what the heart or the shade adapter
//! does, whichever changes it more. Layer after layer goes into one encoder, one submission is one step, and nothing
//! comes back to the host until it asks for the log.

use std::error::Error;
use std::path::{Path, PathBuf};

use loraweld::compute::{required_features, required_limits, wanted_features};
use loraweld::fusion::{Selection, Selector, SelectorOptions};
use loraweld::{Activations, Adapter, Device, Dtype, wgpu};
use wgpu::util::DeviceExt;

const TOKENS: usize = 64;
const WIDTH: usize = 128;
const STEPS: usize = 4;

/// y = tanh(W·x) for each token, in f32: the host's business.
const HOST_LAYER: &str = "
@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> w: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let width = 128u;
    let token = id.x / width;
    let channel = id.x % width;
    var sum = 0.0;
    for (var k = 0u; k < width; k++) { sum += w[channel * width + k] * x[token * width + k]; }
    y[id.x] = tanh(sum);
}";

fn main() -> Result<(), Box<dyn Error>> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let Ok(adapter) = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))
    else {
        println!("no GPU, nor a software adapter: there is nothing to share");
        return Ok(());
    };
    let (gpu, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        label: Some("host"),
        required_features: required_features() | (adapter.features() & wanted_features()),
        required_limits: required_limits(),
        ..Default::default()
    }))?;
    let device = Device::from_wgpu(&adapter, gpu.clone(), queue.clone())?;
    println!("on {}", device.describe());

    let heart = Adapter::open(data("content_heart"))?;
    let shade = Adapter::open(data("style_shade"))?;
    let options = SelectorOptions { tokens: TOKENS, ..Default::default() };
    let mut selector = Selector::new(&device, &[heart.at(1.0), shade.at(1.0)], options)?;

    let host = Host::new(&gpu);
    for step in 0..STEPS {
        // A slider moved: 48 bytes go to the device, no factor changes.
        selector.set_strength(1, 0.5 + 0.5 * step as f64)?;
        let mut encoder = gpu.create_command_encoder(&Default::default());
        for (i, layer) in host.layers.iter().enumerate() {
            host.encode(&gpu, &mut encoder, i);
            let rows = |buffer| Activations::Buffer {
                buffer,
                offset: 0,
                dtype: Dtype::F32,
                tokens: TOKENS,
                width: WIDTH,
            };
            let (x, f0) = (&host.features[i], &host.features[i + 1]);
            selector.encode(&mut encoder, layer, rows(x), rows(f0), &Selection::default())?;
        }
        queue.submit([encoder.finish()]);
    }
    println!("{:<32} {:>6} {:>6}", "tokens that each adapter won", "heart", "shade");
    for decision in selector.decisions()? {
        let step = decision.call as usize / host.layers.len();
        println!("step {step}  {:<24} {:>6} {:>6}", decision.layer, decision.wins[0], decision.wins[1]);
    }
    Ok(())
}

struct Host {
    pipeline: wgpu::ComputePipeline,
    layers: Vec<String>,
    weights: Vec<wgpu::Buffer>,
    /// What goes into each layer, and comes out of the last.
    features: Vec<wgpu::Buffer>,
}

impl Host {
    fn new(gpu: &wgpu::Device) -> Self {
        let module = gpu.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(HOST_LAYER.into()),
        });
        let pipeline = gpu.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some("host's layer"),
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: Default::default(),
            cache: None,
        });
        let mut state = 1u32;
        let mut buffer = |len: usize, scale: f32| {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
            };
            let values: Vec<f32> = (0..len).map(|_| next()).collect();
            gpu.create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: None,
                contents: bytemuck::cast_slice(&values),
                usage: wgpu::BufferUsages::STORAGE,
            })
        };
        let layers: Vec<String> = (0..4).map(|i| format!("transformer_blocks.{i}.attn.to_q")).collect();
        Self {
            pipeline,
            weights: layers.iter().map(|_| buffer(WIDTH * WIDTH, 0.2)).collect(),
            features: (0..=layers.len()).map(|_| buffer(TOKENS * WIDTH, 1.0)).collect(),
            layers,
        }
    }

    fn encode(&self, gpu: &wgpu::Device, encoder: &mut wgpu::CommandEncoder, layer: usize) {
        let buffers = [&self.features[layer], &self.weights[layer], &self.features[layer + 1]];
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, b)| wgpu::BindGroupEntry { binding, resource: b.as_entire_binding() })
            .collect();
        let group = gpu.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &self.pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups((TOKENS * WIDTH / 64) as u32, 1, 1);
    }
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/loras").join(format!("{name}.safetensors"))
}
