use super::DTYPES;
use crate::compute::gpu::Commands;
use crate::compute::shaders::{Declared, Kernel, job};
use crate::{Dtype, Result};

job! {
    /// `c += ω·(c − u)`: classifier-free guidance in place; see `shaders/extrapolate.wgsl`.
    pub(crate) struct ExtrapolateJob {
        /// First word of c in its binding.
        pub c: u32,
        /// First word of u in its binding.
        pub u: u32,
        /// Elements.
        pub len: u32,
        /// ω.
        pub scale: f32,
    }
}

/// Words that a workgroup changes.
const CHUNK: usize = 256;

fn kernel(dtype: Dtype) -> Kernel {
    Kernel::new("extrapolate").dtype(dtype)
}

pub(super) fn declared() -> Declared {
    Declared::new::<ExtrapolateJob>(DTYPES.map(kernel)).constant("CHUNK", CHUNK)
}

impl ExtrapolateJob {
    /// `buffers`: c and u.
    pub fn encode(
        self,
        commands: &mut Commands<'_>,
        dtype: Dtype,
        buffers: [wgpu::BufferBinding<'_>; 2],
    ) -> Result<()> {
        let words = (self.len as usize * dtype.size()).div_ceil(4);
        commands.launch_line(kernel(dtype), &self, words.div_ceil(CHUNK), &buffers)
    }
}

/// The CPU twin.
pub(crate) fn extrapolate_cpu(scale: f64, conditional: &mut [f64], unconditional: &[f64]) {
    for (c, u) in conditional.iter_mut().zip(unconditional) {
        *c += scale * (*c - u);
    }
}
