use bytemuck::NoUninit;

use crate::Dtype;
use crate::compute::gpu::Commands;
use crate::compute::shaders::Kernel;

/// `c += ω·(c − u)`: classifier-free guidance in place; see `shaders/extrapolate.wgsl`.
#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
pub(crate) struct ExtrapolateJob {
    /// First word of c in its binding.
    pub c: u32,
    /// First word of u in its binding.
    pub u: u32,
    /// Elements.
    pub len: u32,
    /// ω.
    pub scale: f32,
    /// Set by [`encode`](Self::encode).
    pub grid_width: u32,
}

impl ExtrapolateJob {
    /// `buffers`: c and u.
    pub fn encode(
        mut self,
        commands: &mut Commands<'_>,
        dtype: Dtype,
        buffers: [wgpu::BufferBinding<'_>; 2],
    ) {
        let words = (self.len as usize * dtype.size()).div_ceil(4);
        let workgroups = words.div_ceil(256) as u32;
        self.grid_width = workgroups.clamp(1, 32768);
        let grid = [self.grid_width, workgroups.div_ceil(self.grid_width), 1];
        commands.launch_grid(Kernel::Extrapolate(dtype), &self, grid, &buffers);
    }
}

/// The CPU twin.
pub(crate) fn extrapolate_cpu(scale: f64, conditional: &mut [f64], unconditional: &[f64]) {
    for (c, u) in conditional.iter_mut().zip(unconditional) {
        *c += scale * (*c - u);
    }
}
