use super::MAX_ITERATIONS;
use crate::Result;
use crate::compute::gpu::Commands;
use crate::compute::shaders::{Declared, Kernel, job};

job! {
    /// `x −= clamp(rate·g / rms(g), ±limit)` of each sample, g the sum of the terms' gradients; see
    /// `shaders/gradient_norm.wgsl` and `shaders/gradient_step.wgsl`.
    pub(crate) struct GradientJob {
        pub samples: u32,
        /// Elements of a sample.
        pub len: u32,
        pub terms: u32,
        parts: u32,
        part_len: u32,
        normalise: u32,
        pub rate: f32,
        pub limit: f32,
    }
}

/// Elements that a workgroup of the norm sums, at least.
const PART: usize = 4096;
/// Most parts of a sample, which each workgroup of the step adds up, unless one would be longer than `LONGEST_PART`.
const MAX_PARTS: usize = 64;
/// Elements that a workgroup of the norm sums, at most: its 256 threads read them twice.
const LONGEST_PART: usize = MAX_ITERATIONS / 2 * 256;
/// Elements that a workgroup of the step changes.
const CHUNK: usize = 1024;

fn norm_kernel() -> Kernel {
    Kernel::new("gradient_norm")
}

fn step_kernel() -> Kernel {
    Kernel::new("gradient_step")
}

pub(super) fn declared() -> [Declared; 2] {
    [
        Declared::new::<GradientJob>([norm_kernel()]),
        Declared::new::<GradientJob>([step_kernel()]).constant("CHUNK", CHUNK),
    ]
}

impl GradientJob {
    pub fn new(samples: usize, len: usize, terms: usize, normalise: bool, rate: f32, limit: f32) -> Self {
        let parts = Self::parts(len);
        Self {
            samples: samples as u32,
            len: len as u32,
            terms: terms as u32,
            parts: parts as u32,
            part_len: len.div_ceil(parts) as u32,
            normalise: u32::from(normalise),
            rate,
            limit,
        }
    }

    /// Partial norms of a sample, of 8 bytes each.
    pub fn parts(len: usize) -> usize {
        len.div_ceil(PART).clamp(1, MAX_PARTS).max(len.div_ceil(LONGEST_PART))
    }

    /// `buffers`: gradients, norms, x, rms.
    pub fn encode(&self, commands: &mut Commands<'_>, buffers: [wgpu::BufferBinding<'_>; 4]) -> Result<()> {
        let [norm, step] = self.workgroups();
        commands.launch_line(norm_kernel(), self, norm, &buffers[..2])?;
        commands.launch_line(step_kernel(), self, step, &buffers)
    }

    /// How many workgroups the norm takes, and the step.
    fn workgroups(&self) -> [usize; 2] {
        [self.parts as usize, (self.len as usize).div_ceil(CHUNK)].map(|parts| parts * self.samples as usize)
    }
}

/// The CPU twin for one sample: the gradient's root mean square, or −1 if it is not finite; changes x.
pub(crate) fn gradient_step_cpu(
    terms: &[&[f32]],
    normalise: bool,
    rate: f64,
    limit: f64,
    x: &mut [f32],
) -> f64 {
    let gradient = |i: usize| terms.iter().map(|term| f64::from(term[i])).sum::<f64>();
    let rms = ((0..x.len()).map(|i| gradient(i).powi(2)).sum::<f64>() / x.len() as f64).sqrt();
    if !rms.is_finite() {
        return -1.0;
    }
    if rms > 0.0 {
        for (i, x) in x.iter_mut().enumerate() {
            let g = gradient(i);
            let step = rate * if normalise { g / rms } else { g };
            *x = (f64::from(*x) - step.clamp(-limit, limit)) as f32;
        }
    }
    rms
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::gpu::GRID_WIDTH;

    /// All that a buffer may hold, in samples of one size and another: the norm reads every element, and both take no more
    /// workgroups than a grid has, each of so few iterations that no driver cuts them off.
    #[test]
    fn the_largest_latents_fit_a_grid() {
        let most = u32::MAX as usize / 4;
        for len in [1, 2, PART, CHUNK + 1, 67_108_864, 67_108_865, most / 3, most] {
            let samples = most / len;
            let job = GradientJob::new(samples, len, 1, true, 0.1, 1.0);
            assert!(job.parts as usize * job.part_len as usize >= len, "{len}");
            assert!(u64::from(job.parts) * u64::from(job.part_len) < 1 << 32, "{len}");
            let grid = u64::from(GRID_WIDTH).pow(2);
            assert!(job.workgroups().iter().all(|n| *n as u64 <= grid), "{samples} x {len}");
            assert!(2 * (job.part_len as usize).div_ceil(256) <= MAX_ITERATIONS, "{len}");
        }
        let workgroups = |len| GradientJob::new(1, len, 1, true, 0.1, 1.0).workgroups();
        assert_eq!(workgroups(65_535 * CHUNK), [MAX_PARTS, 65_535]);
        assert_eq!(workgroups(65_535 * CHUNK + 1), [MAX_PARTS, 65_536]);
    }
}
