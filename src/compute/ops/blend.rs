use bytemuck::NoUninit;

use crate::compute::gpu::{Commands, Work, whole};
use crate::compute::shaders::Kernel;

/// Rows between those of two merges: `out = strength·(a + t·(b − a))`; places are elements of their buffers.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub(crate) struct BlendJob {
    pub a: u32,
    pub b: u32,
    pub out: u32,
    pub len: u32,
    pub adapter: u32,
}

/// The buffers of blends.
#[derive(Debug)]
pub(crate) struct Blend<'a> {
    pub ends: &'a wgpu::Buffer,
    pub out: &'a wgpu::Buffer,
    /// (t, strength) of each adapter.
    pub controls: &'a wgpu::Buffer,
}

/// Elements that a workgroup handles, as in the shader.
const CHUNK: usize = 4096;

impl Blend<'_> {
    pub fn encode(&self, commands: &mut Commands<'_>, jobs: &[BlendJob]) {
        let work: Vec<Work> = (0..)
            .zip(jobs)
            .flat_map(|(i, job)| (0..job.len).step_by(CHUNK).map(move |first| [i, first, 0, 0]))
            .collect();
        let buffers = [whole(self.ends), whole(self.out), whole(self.controls)];
        commands.launch(Kernel::Blend, jobs, &work, &buffers);
    }
}

/// The CPU twin for one element.
pub(crate) fn blend_cpu(t: f64, strength: f64, a: f32, b: f32) -> f32 {
    let (a, b) = (f64::from(a), f64::from(b));
    (strength * (a + t * (b - a))) as f32
}
