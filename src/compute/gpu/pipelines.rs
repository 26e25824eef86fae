//! Kernels as the device's driver compiled them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use rayon::prelude::*;

use super::{Gpu, lock};
use crate::compute::pipeline_cache::PipelineCache;
use crate::compute::shaders::Kernel;

/// Each is made by the first who needs it, while others are made beside it.
pub(super) type Pipelines = Mutex<HashMap<Kernel, Arc<OnceLock<Pipeline>>>>;

/// A pipeline with the layout of its bind group, since asking for that each time makes a new one.
#[derive(Clone)]
pub(super) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

impl Gpu {
    /// Makes the pipelines that will be needed, on all threads.
    pub fn prepare(&self, kernels: &[Kernel]) {
        kernels.par_iter().for_each(|&kernel| drop(self.pipeline(kernel)));
    }

    pub(super) fn pipeline(&self, kernel: Kernel) -> Pipeline {
        let pipeline = lock(&self.pipelines).entry(kernel).or_default().clone();
        pipeline.get_or_init(|| self.make_pipeline(kernel)).clone()
    }

    fn make_pipeline(&self, kernel: Kernel) -> Pipeline {
        let start = web_time::Instant::now();
        let module = shader_module(&self.device, &kernel);
        let layout = kernel.moves().map(|binding| self.layout_with_offset(&kernel, binding));
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&kernel.label()),
            layout: layout.as_ref(),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                // Kernels write workgroup memory before they read it.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: self.cache.as_ref().map(PipelineCache::cache),
        });
        tracing::debug!(kernel = kernel.label(), seconds = start.elapsed().as_secs_f64(), "made a pipeline");
        Pipeline { layout: pipeline.get_bind_group_layout(0), pipeline }
    }

    /// What wgpu would find for a kernel, but that one binding has its offset when it is recorded.
    fn layout_with_offset(&self, kernel: &Kernel, moving: u32) -> wgpu::PipelineLayout {
        let entry = |(binding, read_only)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only },
                has_dynamic_offset: binding == moving,
                min_binding_size: None,
            },
            count: None,
        };
        let entries: Vec<_> = kernel.storage().into_iter().map(entry).collect();
        let label = kernel.label();
        let descriptor = wgpu::BindGroupLayoutDescriptor { label: Some(&label), entries: &entries };
        let group = self.device.create_bind_group_layout(&descriptor);
        self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(&label),
            bind_group_layouts: &[Some(&group)],
            ..Default::default()
        })
    }
}

/// The one place where shader modules are made: checked in debug builds and tests, unchecked in release.
fn shader_module(device: &wgpu::Device, kernel: &Kernel) -> wgpu::ShaderModule {
    let (label, source) = (kernel.label(), kernel.source());
    let descriptor =
        wgpu::ShaderModuleDescriptor { label: Some(&label), source: wgpu::ShaderSource::Wgsl(source.into()) };
    if cfg!(debug_assertions) {
        device.create_shader_module(descriptor)
    } else {
        // SAFETY: without checks a shader must not read or write past a binding, loop for ever, or divide an integer by
        // zero, whatever safe code asks for. Only sources of this crate come here, so it is for their launchers to see to:
        // - An index comes from a job, a work table and the place of the thread, none of which a host can write, and never
        //   from what a buffer holds. It is checked against the shape in the job, or within a tile that was.
        // - Shapes in jobs are those of what is bound: `Batch` sizes its arena by them, and refuses more elements than one
        //   binding or a u32 holds; `Operands` refuses batches of another device or element; `RawMatrix` and `Matrix` hold
        //   as many values as they say; `Activations` refuses what its buffer does not hold; scratch is sized from the same
        //   shapes beside the kernel that takes it, and `Gpu::allocate` refuses what would not fit a u32. Sizes that hosts
        //   give are multiplied with checks or saturate.
        // - Loops count to a bound that they do not change.
        // - Integers are divided by constants other than zero and by fields of jobs that launchers set to 1 or more.
        // The parity tests run the same sources with all checks on.
        unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
    }
}
