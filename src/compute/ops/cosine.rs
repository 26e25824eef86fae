use crate::Result;
use crate::compute::gpu::Commands;
use crate::compute::shaders::{Declared, Kernel, job};

job! {
    /// `L = weight·(1 − f̂·r)` of each sample and `∂L/∂f`; see `shaders/cosine.wgsl`.
    pub(crate) struct CosineJob {
        pub samples: u32,
        pub width: u32,
        /// Elements from one sample's reference to the next; 0: one for all.
        pub reference_stride: u32,
        pub weight: f32,
        /// First loss, that of the first sample.
        pub losses: u32,
    }
}

fn kernel() -> Kernel {
    Kernel::new("cosine")
}

pub(super) fn declared() -> Declared {
    Declared::new::<CosineJob>([kernel()])
}

impl CosineJob {
    /// `buffers`: features, reference, gradient, losses.
    pub fn encode(&self, commands: &mut Commands<'_>, buffers: [wgpu::BufferBinding<'_>; 4]) -> Result<()> {
        commands.launch_line(kernel(), self, self.samples as usize, &buffers)
    }
}

/// The CPU twin for one sample: the loss; writes the gradient.
pub(crate) fn cosine_cpu(weight: f64, features: &[f32], reference: &[f32], gradient: &mut [f32]) -> f64 {
    let wide = || features.iter().map(|f| f64::from(*f));
    let norm = wide().map(|f| f * f).sum::<f64>().sqrt();
    if norm == 0.0 {
        gradient.fill(0.0);
        return weight;
    }
    let cosine = wide().zip(reference).map(|(f, r)| f * f64::from(*r)).sum::<f64>() / norm;
    for ((g, f), r) in gradient.iter_mut().zip(wide()).zip(reference) {
        *g = (-weight * (f64::from(*r) - cosine * f / norm) / norm) as f32;
    }
    weight * (1.0 - cosine)
}
