use std::collections::BTreeMap;
use std::sync::Arc;

use bytemuck::NoUninit;
use rayon::prelude::*;

use super::{ENOUGH_WORKGROUPS, dtype_code, mismatch, view, view_mut};
use crate::compute::gpu::{Commands, Gpu, Work, whole};
use crate::compute::shaders::Kernel;
use crate::compute::{Batch, Device, Element, Shape};
use crate::{Dtype, Error, RawMatrix, Result};

/// `Z = X·Aᵀ`: what the rank-concatenated A sees of activations.
///
/// `x[i]`: tokens × width of any dtype, `a[i]`: rank × width, result `i`: tokens × rank.
/// Sums are f32 or, at a forced precision, of the device's tier; on the CPU f64.
///
/// # Errors
/// [`Error::Invalid`] if widths differ; [`Error::Device`] if a matrix is larger than the device can bind.
pub fn project(device: &Device, x: &[RawMatrix], a: &Batch) -> Result<Batch> {
    if x.len() != a.len() {
        return Err(Error::Invalid(format!("project: {} inputs do not go with {} A", x.len(), a.len())));
    }
    for (x, a) in x.iter().zip(a.shapes()) {
        if x.cols != a.cols {
            return Err(mismatch("project", Shape::new(x.rows, x.cols), *a));
        }
    }
    let shapes: Vec<_> = x.iter().zip(a.shapes()).map(|(x, a)| Shape::new(x.rows, a.rows)).collect();
    let mut z = Batch::zeros(device, device.product(), &shapes)?;
    if let Some(outputs) = z.host_mut() {
        x.par_iter().zip(outputs).enumerate().for_each(|(i, (x, z))| {
            project_cpu(*x, a.host(i).unwrap_or_default(), z);
        });
        return Ok(z);
    }
    let gpu = device.gpu()?;
    let mut words = Vec::new();
    let mut jobs = Vec::new();
    for (i, x) in x.iter().enumerate() {
        jobs.push(ProjectJob {
            x_word: words.len() / 4,
            tokens: x.rows,
            dtype: x.dtype,
            a: i,
            z: z.offset(i),
            parts: 1,
        });
        words.extend_from_slice(x.bytes);
        words.resize(words.len().next_multiple_of(4), 0);
    }
    let source = gpu.scratch(words.len() as u64)?;
    gpu.write(&source, 0, &words)?;
    let mut commands = gpu.commands();
    encode(&mut commands, gpu, whole(&source), &jobs, a, whole(z.buffer()?), z.element())?;
    commands.submit()?;
    Ok(z)
}

/// The CPU twin for one matrix. `z`: tokens × rank, overwritten.
pub(super) fn project_cpu(x: RawMatrix, a: &[f64], z: &mut [f64]) {
    if z.is_empty() {
        return;
    }
    let rank = z.len() / x.rows;
    let wide: Vec<f64> = x.to_vec();
    faer::linalg::matmul::matmul(
        view_mut(z, Shape::new(x.rows, rank)),
        faer::Accum::Replace,
        view(&wide, Shape::new(x.rows, x.cols)),
        view(a, Shape::new(rank, x.cols)).transpose(),
        1.0,
        faer::Par::Seq,
    );
}

/// One product of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProjectJob {
    /// First word of X in the bound buffer.
    pub x_word: usize,
    pub tokens: usize,
    pub dtype: Dtype,
    /// Which matrix of the batch of A.
    pub a: usize,
    /// First element of Z in its buffer.
    pub z: usize,
    /// Parts that the width is split into, from [`parts`], with room for as many Z; 1 in the wide tiers.
    pub parts: usize,
}

/// Into how many parts the width is split so that the GPU is full: `tiles` as there are without splitting.
pub(super) fn parts(gpu: &Gpu, element: Element, tokens: usize, a: Shape, jobs: usize) -> usize {
    if element != Element::F32 {
        return 1;
    }
    let (_, tile_n) = select(gpu, a.rows, Dtype::F32);
    let tiles = tokens.div_ceil(TILE_M) * a.rows.div_ceil(tile_n as usize) * jobs;
    (ENOUGH_WORKGROUPS / tiles.max(1)).clamp(1, MAX_PARTS).min((a.cols / 256).max(1))
}

/// Most summands that Z is stored as.
pub(super) const MAX_PARTS: usize = 16;

const TILE_M: usize = 128;
/// The shaders step along k by this much, or half of it.
const DEPTH: usize = 32;

/// The kernel of f32 products, and the columns of its tile.
fn select(gpu: &Gpu, rank: usize, dtype: Dtype) -> (Kernel, u32) {
    let tile = match rank {
        0..=32 => 32,
        // For less, finding the scales of X costs more than matrix units save; X in f16 needs none.
        33..=64 if dtype != Dtype::F16 => 64,
        _ if gpu.capabilities.matrix_units() => return (Kernel::ProjectMatrix(dtype), 64),
        33..=64 => 64,
        _ => 128,
    };
    (Kernel::Project(tile, dtype), tile)
}

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Job {
    x: u32,
    a: u32,
    z: u32,
    tokens: u32,
    rank: u32,
    width: u32,
    dtype: u32,
    part_width: u32,
    /// Only the kernel for matrix units reads these two.
    x_scales: u32,
    a_scales: u32,
}

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct ScaleJob {
    matrix: u32,
    scales: u32,
    cols: u32,
    dtype: u32,
}

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct SumJob {
    z: u32,
    len: u32,
    parts: u32,
}

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct RealJob {
    x: u32,
    a: u32,
    z: u32,
    tokens: u32,
    rank: u32,
    width: u32,
    dtype: u32,
}

/// Records the products of activations that lie in one buffer.
pub(super) fn encode(
    commands: &mut Commands<'_>,
    gpu: &Arc<Gpu>,
    x: wgpu::BufferBinding<'_>,
    jobs: &[ProjectJob],
    a: &Batch,
    z: wgpu::BufferBinding<'_>,
    element: Element,
) -> Result<()> {
    if element != Element::F32 {
        return encode_real(commands, x, jobs, a, z, element);
    }
    encode_f32(commands, gpu, x, jobs, a, z.clone())?;
    let table: Vec<_> = jobs
        .iter()
        .filter(|job| job.parts > 1)
        .map(|job| SumJob {
            z: job.z as u32,
            len: (job.tokens * a.shapes()[job.a].rows) as u32,
            parts: job.parts as u32,
        })
        .collect();
    let work: Vec<Work> = (0..)
        .zip(&table)
        .flat_map(|(i, job)| (0..job.len).step_by(1024).map(move |first| [i, first, 0, 0]))
        .collect();
    commands.phase(2);
    commands.launch(Kernel::SumParts, &table, &work, &[z]);
    Ok(())
}

fn encode_f32(
    commands: &mut Commands<'_>,
    gpu: &Arc<Gpu>,
    x: wgpu::BufferBinding<'_>,
    jobs: &[ProjectJob],
    a: &Batch,
    z: wgpu::BufferBinding<'_>,
) -> Result<()> {
    // One launch for each permutation that occurs.
    let mut launches: BTreeMap<Kernel, (Vec<Job>, Vec<Work>)> = BTreeMap::new();
    let (mut scales_of_x, mut scales_of_a) = (Vec::new(), Vec::new());
    let (mut x_rows, mut a_rows): (Vec<Work>, Vec<Work>) = (Vec::new(), Vec::new());
    let mut scales = 0;
    for job in jobs {
        let shape = a.shapes()[job.a];
        let (kernel, tile) = select(gpu, shape.rows, job.dtype);
        let (table, work) = launches.entry(kernel).or_default();
        let (x_scales, a_scales) = (scales, scales + job.tokens as u32);
        if matches!(kernel, Kernel::ProjectMatrix(_)) {
            scales += (job.tokens + shape.rows) as u32;
            let (i, cols, dtype) = (scales_of_x.len() as u32, shape.cols as u32, dtype_code(job.dtype));
            scales_of_x.push(ScaleJob { matrix: job.x_word as u32, scales: x_scales, cols, dtype });
            if job.dtype != Dtype::F16 {
                x_rows.extend((0..job.tokens as u32).map(|row| [i, row, 0, 0]));
            }
            let dtype = dtype_code(Dtype::F32);
            scales_of_a.push(ScaleJob { matrix: a.offset(job.a) as u32, scales: a_scales, cols, dtype });
            a_rows.extend((0..shape.rows as u32).map(|row| [i, row, 0, 0]));
        }
        for part in 0..job.parts as u32 {
            for row in 0..job.tokens.div_ceil(TILE_M) as u32 {
                for column in 0..(shape.rows as u32).div_ceil(tile) {
                    work.push([table.len() as u32, row, column, part]);
                }
            }
        }
        table.push(Job {
            x: job.x_word as u32,
            a: a.offset(job.a) as u32,
            z: job.z as u32,
            tokens: job.tokens as u32,
            rank: shape.rows as u32,
            width: shape.cols as u32,
            dtype: dtype_code(job.dtype),
            part_width: shape.cols.div_ceil(job.parts).next_multiple_of(DEPTH).max(DEPTH) as u32,
            x_scales,
            a_scales,
        });
    }
    let factor = whole(a.buffer()?);
    let scales = gpu.scratch(u64::from(scales) * 4)?;
    commands.phase(0);
    commands.launch(Kernel::RowScale, &scales_of_x, &x_rows, &[x.clone(), whole(&scales)]);
    commands.launch(Kernel::RowScale, &scales_of_a, &a_rows, &[factor.clone(), whole(&scales)]);
    commands.phase(1);
    for (kernel, (table, work)) in launches {
        let mut buffers = vec![x.clone(), factor.clone(), z.clone()];
        if matches!(kernel, Kernel::ProjectMatrix(_)) {
            buffers.push(whole(&scales));
        }
        commands.launch(kernel, &table, &work, &buffers);
    }
    commands.keep(scales);
    Ok(())
}

fn encode_real(
    commands: &mut Commands<'_>,
    x: wgpu::BufferBinding<'_>,
    jobs: &[ProjectJob],
    a: &Batch,
    z: wgpu::BufferBinding<'_>,
    element: Element,
) -> Result<()> {
    let table: Vec<_> = jobs
        .iter()
        .map(|job| {
            let shape = a.shapes()[job.a];
            RealJob {
                x: job.x_word as u32,
                a: a.offset(job.a) as u32,
                z: job.z as u32,
                tokens: job.tokens as u32,
                rank: shape.rows as u32,
                width: shape.cols as u32,
                dtype: dtype_code(job.dtype),
            }
        })
        .collect();
    let work: Vec<Work> = table
        .iter()
        .enumerate()
        .flat_map(|(i, job)| {
            (0..job.tokens.div_ceil(16))
                .flat_map(move |row| (0..job.rank.div_ceil(16)).map(move |c| [i as u32, row, c, 0]))
        })
        .collect();
    let buffers = [x, whole(a.buffer()?), z];
    commands.phase(1);
    commands.launch(Kernel::ProjectReal(element), &table, &work, &buffers);
    Ok(())
}
