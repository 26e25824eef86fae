//! Merges on a wgpu device that belongs to the host program, with activations that lie in its buffers.
//!
//! ```text
//! cargo run --release --example shared_device
//! ```
//!
//! A host that runs a model with wgpu has the inputs of each layer on the GPU already. Here they come from a file of
//! the tests.

use std::error::Error;
use std::path::{Path, PathBuf};

use loraweld::compute::{required_features, required_limits, wanted_features};
use loraweld::{Activations, Adapter, Calibration, Device, Dtype, Ssr, wgpu};
use safetensors::SafeTensors;
use wgpu::util::DeviceExt;

const CONCEPTS: [&str; 2] = ["concept_c3_mirror", "concept_c7_rot90"];

fn main() -> Result<(), Box<dyn Error>> {
    // The host's own device. What loraweld wants is added as far as the adapter has it.
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

    // loraweld's view of it. Both go on using the device and the queue.
    let device = Device::from_wgpu(&adapter, gpu.clone(), queue.clone())?;
    println!("on {}", device.describe());

    let mirror = Adapter::open(data("loras", CONCEPTS[0]))?;
    let rotated = Adapter::open(data("loras", CONCEPTS[1]))?;
    let mut calibration = Calibration::new([&mirror, &rotated])?;
    for (task, name) in CONCEPTS.iter().enumerate() {
        let file = std::fs::read(data("activations/traj4", name))?;
        let tensors = SafeTensors::deserialize(&file)?;
        for (layer, tensor) in tensors.iter() {
            let &[tokens, width] = tensor.shape() else { return Err("not [tokens, width]".into()) };
            let buffer = gpu.create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: Some("inputs of a layer"),
                contents: tensor.data(),
                usage: wgpu::BufferUsages::STORAGE,
            });
            let x = Activations::Buffer { buffer: &buffer, offset: 0, dtype: Dtype::Bf16, tokens, width };
            // q, k and v read the same inputs, which the file holds once.
            let layers = match layer.strip_suffix("to_q") {
                Some(attn) => ["to_q", "to_k", "to_v"].map(|module| format!("{attn}{module}")).to_vec(),
                None => vec![layer.to_owned()],
            };
            for layer in layers {
                calibration.accumulate(&device, task, &layer, x)?;
            }
        }
    }
    let merged = Ssr::new(&calibration).merge(&device, &[mirror.at(1.0), rotated.at(0.8)])?;
    println!("{}", merged.report);
    Ok(())
}

fn data(folder: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(folder).join(format!("{name}.safetensors"))
}
