//! `Z = X·A_catᵀ` for X of 16 bits, in one product of halves: `shaders/branch/project_halves.wgsl`.
//!
//! Its twin is that of [`project`](super::project::project), whose accuracy it does not keep.

use std::sync::Arc;

use half::f16;
use rayon::prelude::*;

use super::{OF_16_BITS, Window, aligned};
use crate::compute::Shape;
use crate::compute::gpu::{Commands, Gpu, Phase, Pooled, whole};
use crate::compute::shaders::{Declared, Kernel, job};
use crate::power::{exponent_of, pow2};
use crate::{Dtype, Result};

job! {
    struct HalvesJob {
        x: u32,
        z: u32,
        tokens: u32,
        rank: u32,
        width: u32,
        columns: u32,
    }
}

/// Tokens of a workgroup, its subgroups, and the channels that each takes at a time.
const TOKENS: usize = 32;
const SUBGROUPS: usize = 4;
const DEPTH: usize = 32;
/// The exponent that a row's largest value gets.
const TOP: i32 = 13;

fn kernel(dtype: Dtype, columns: u32, software: bool) -> Kernel {
    let products = match software {
        true => "branch/shared/products_software",
        false => "branch/shared/products_units",
    };
    Kernel::new("branch/project_halves").dtype(dtype).number("COLUMNS", columns).import("products", products)
}

pub(super) fn declared() -> Declared {
    let each = |columns| {
        OF_16_BITS.into_iter().flat_map(move |dtype| [false, true].map(|software| (dtype, columns, software)))
    };
    let kernels = [32, 64].into_iter().flat_map(each);
    Declared::new::<HalvesJob>(kernels.map(|(dtype, columns, software)| kernel(dtype, columns, software)))
        .constant("TOKENS", TOKENS)
        .constant("SUBGROUPS", SUBGROUPS)
        .constant("DEPTH", DEPTH)
        .dtypes()
}

/// A_cat as the fragments that matrix units read, each row brought into f16's range by a power of two.
#[derive(Debug)]
pub(super) struct FragmentsA {
    shape: Shape,
    software: bool,
    fragments: Arc<Pooled>,
    scales: Arc<Pooled>,
}

/// Columns of a workgroup's product: rows of A_cat.
fn tile(rank: usize) -> usize {
    if rank <= 32 { 32 } else { 64 }
}

/// Columns and channels of the fragments of an A_cat of this shape: whole tiles.
fn padded(a: Shape) -> Shape {
    Shape::new(a.rows.next_multiple_of(tile(a.rows)), a.cols.next_multiple_of(SUBGROUPS * DEPTH))
}

impl FragmentsA {
    /// `a`: rank × in. `None` if the kernel cannot read such activations.
    pub fn new(gpu: &Arc<Gpu>, a: &[f32], shape: Shape, software: bool) -> Result<Option<Self>> {
        if Self::bytes_for(shape) == 0 {
            return Ok(None);
        }
        let scales: Vec<f32> = a.par_chunks_exact(shape.cols).map(scale_of_row).collect();
        let columns = padded(shape).rows;
        let mut halves = vec![f16::ZERO; padded(shape).len()];
        halves.par_chunks_mut(16 * columns).enumerate().for_each(|(block, halves)| {
            let channels = 16 * block..shape.cols.min(16 * block + 16);
            for (k, (row, scale)) in a.chunks_exact(shape.cols).zip(&scales).enumerate() {
                let place = k / 16 * 256 + k % 16 * 16;
                let values = row.get(channels.clone()).unwrap_or_default();
                for (half, value) in halves[place..].iter_mut().zip(values) {
                    *half = f16::from_f32(value * scale);
                }
            }
        });
        let upload = |bytes: &[u8]| {
            let buffer = gpu.scratch(bytes.len() as u64)?;
            gpu.write(&buffer, 0, bytes)?;
            Ok::<_, crate::Error>(Arc::new(buffer))
        };
        let (fragments, scales) =
            (upload(bytemuck::cast_slice(&halves))?, upload(bytemuck::cast_slice(&scales))?);
        Ok(Some(Self { shape, software, fragments, scales }))
    }

    /// Bytes that this takes for an A_cat of this shape; 0 if there is none for it.
    pub fn bytes_for(a: Shape) -> u64 {
        if a.is_empty() || !a.cols.is_multiple_of(8) {
            return 0;
        }
        (2 * padded(a).len() + 4 * a.rows) as u64
    }

    pub fn bytes(&self) -> u64 {
        self.fragments.size() + self.scales.size()
    }

    /// Whether the kernel can read these activations: 8 values at a time.
    pub fn reads(&self, dtype: Dtype, windows: &[Window<'_>]) -> bool {
        dtype != Dtype::F32 && aligned(windows, 4)
    }

    /// Records the product of all windows of X.
    pub fn encode(
        &self,
        commands: &mut Commands<'_>,
        dtype: Dtype,
        windows: &[Window<'_>],
        z: &wgpu::BufferBinding<'_>,
    ) -> Result<()> {
        commands.keep(self.fragments.clone());
        commands.keep(self.scales.clone());
        commands.phase(Phase::Project);
        let (rank, columns) = (self.shape.rows, padded(self.shape).rows);
        for window in windows {
            let job = HalvesJob {
                x: (window.bound.word / 4) as u32,
                z: (window.first * rank) as u32,
                tokens: window.count as u32,
                rank: rank as u32,
                width: self.shape.cols as u32,
                columns: columns as u32,
            };
            let kernel = kernel(dtype, tile(rank) as u32, self.software);
            let grid = [window.count.div_ceil(TOKENS), columns / tile(rank), 1];
            let x = window.bound.binding.clone();
            let bindings = [x, whole(&self.fragments), whole(&self.scales), z.clone()];
            commands.launch_grid(kernel, &job, grid, &bindings)?;
        }
        Ok(())
    }
}

/// The power of two that brings the largest value to [2^TOP, 2^(TOP + 1)).
fn scale_of_row(row: &[f32]) -> f32 {
    let most = row.iter().fold(0f32, |most, v| most.max(v.abs()));
    if most == 0.0 {
        return 1.0;
    }
    pow2((TOP - exponent_of(f64::from(most))).clamp(-126, 126)) as f32
}
