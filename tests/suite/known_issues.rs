//! Faults of drivers that kernels go round, each as small as it gets: what a comment says of a driver is shown here, and
//! whoever meets a newer driver sees whether it still holds.

use std::sync::mpsc::channel;

use loraweld::wgpu;

use crate::common::gpus;

/// What a shader of one workgroup, which reads `limit`, answers; or why wgpu does not run it.
fn answer(device: &wgpu::Device, queue: &wgpu::Queue, source: &str, limit: u32) -> Result<u32, wgpu::Error> {
    let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: None,
        source: wgpu::ShaderSource::Wgsl(source.into()),
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    });
    if let Some(error) = pollster::block_on(scope.pop()) {
        return Err(error);
    }
    let buffer = |usage| {
        let descriptor = wgpu::BufferDescriptor { label: None, size: 4, usage, mapped_at_creation: false };
        device.create_buffer(&descriptor)
    };
    use wgpu::BufferUsages as Usage;
    let (input, output) =
        (buffer(Usage::STORAGE | Usage::COPY_DST), buffer(Usage::STORAGE | Usage::COPY_SRC));
    let read = buffer(Usage::MAP_READ | Usage::COPY_DST);
    queue.write_buffer(&input, 0, &limit.to_le_bytes());
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &pipeline.get_bind_group_layout(0),
        entries: &[
            wgpu::BindGroupEntry { binding: 0, resource: input.as_entire_binding() },
            wgpu::BindGroupEntry { binding: 1, resource: output.as_entire_binding() },
        ],
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(1, 1, 1);
    }
    encoder.copy_buffer_to_buffer(&output, 0, &read, 0, 4);
    queue.submit([encoder.finish()]);
    let (send, mapped) = channel();
    read.map_async(wgpu::MapMode::Read, .., move |result| drop(send.send(result)));
    device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    mapped.recv().unwrap().unwrap();
    let view = read.get_mapped_range(..).unwrap();
    Ok(u32::from_le_bytes(view[..4].try_into().unwrap()))
}

/// lavapipe leaves every loop, without a word, after 65,535 iterations (Mesa 22.3 and 25.0): kernels cut long loops into
/// several launches.
#[test]
fn lavapipe_ends_loops_early() {
    const SOURCE: &str = "
@group(0) @binding(0) var<storage, read> limit: u32;
@group(0) @binding(1) var<storage, read_write> count: u32;
@compute @workgroup_size(1)
fn main() {
    var n = 0u;
    for (var i = 0u; i < limit; i++) {
        // What a compiler cannot sum for itself.
        n += 1u + (n & (i ^ i));
    }
    count = n;
}";
    let Some(case) = gpus().into_iter().next() else { return };
    let (device, queue) = case.device.wgpu().unwrap();
    assert_eq!(answer(device, queue, SOURCE, 65_535).unwrap(), 65_535);
    let count = answer(device, queue, SOURCE, 70_000).unwrap();
    let software = case.device.describe().contains("llvmpipe");
    println!("a loop of 70,000 makes {count} iterations on {}", case.device.describe());
    assert!(count == 70_000 || software && count == 65_535, "{count} iterations");
}

/// NVIDIA's driver hangs when workgroup memory exceeds the 48 KB that it offers: tiles of the kernels for matrix units stay
/// below.
#[test]
#[ignore = "it may hang NVIDIA's driver, which is what it shows"]
fn nvidia_hangs_beyond_48_kb_of_workgroup_memory() {
    const SOURCE: &str = "
@group(0) @binding(0) var<storage, read> limit: u32;
@group(0) @binding(1) var<storage, read_write> sum: u32;
var<workgroup> tile: array<u32, 16384>;
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) i: u32) {
    for (var j = i; j < 16384u; j += 256u) {
        tile[j] = j % limit;
    }
    workgroupBarrier();
    if i == 0u {
        sum = tile[0] + tile[16383];
    }
}";
    let Some(case) = gpus().into_iter().next() else { return };
    let (device, queue) = case.device.wgpu().unwrap();
    match answer(device, queue, SOURCE, 1000) {
        Ok(sum) => assert_eq!(sum, 383),
        Err(error) => println!("{}: {error}", case.device.describe()),
    }
}
