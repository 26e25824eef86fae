use crate::Result;
use crate::compute::gpu::{Commands, Work, whole};
use crate::compute::shaders::{Declared, Kernel, job};

job! {
    /// Rows between those of two merges: `out = strength·(a + t·(b − a))`; places are elements of their buffers.
    pub(crate) struct BlendJob {
        pub a: u32,
        pub b: u32,
        pub out: u32,
        pub len: u32,
        pub adapter: u32,
    }
}

/// The buffers of blends.
#[derive(Debug)]
pub(crate) struct Blend<'a> {
    pub ends: &'a wgpu::Buffer,
    pub out: &'a wgpu::Buffer,
    /// (t, strength) of each adapter.
    pub controls: &'a wgpu::Buffer,
}

/// Elements that a workgroup handles.
const CHUNK: usize = 4096;

fn kernel() -> Kernel {
    Kernel::new("blend")
}

pub(super) fn declared() -> Declared {
    Declared::new::<BlendJob>([kernel()]).constant("CHUNK", CHUNK)
}

impl Blend<'_> {
    pub fn encode(&self, commands: &mut Commands<'_>, jobs: &[BlendJob]) -> Result<()> {
        let work: Vec<Work> = (0..)
            .zip(jobs)
            .flat_map(|(i, job)| (0..job.len).step_by(CHUNK).map(move |first| [i, first, 0, 0]))
            .collect();
        let buffers = [whole(self.ends), whole(self.out), whole(self.controls)];
        commands.launch(kernel(), jobs, &work, &buffers)
    }
}

/// The CPU twin for one element.
pub(crate) fn blend_cpu(t: f64, strength: f64, a: f32, b: f32) -> f32 {
    let (a, b) = (f64::from(a), f64::from(b));
    (strength * (a + t * (b - a))) as f32
}
