use std::collections::BTreeMap;

use bytemuck::NoUninit;

use super::{ENOUGH_WORKGROUPS, dtype_code, mismatch, view, view_mut};
use crate::compute::gpu::{Commands, Work, whole};
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
        for (i, (x, z)) in x.iter().zip(outputs).enumerate() {
            project_cpu(*x, a.host(i).unwrap_or_default(), z, faer::get_global_parallelism());
        }
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
    encode(&mut commands, whole(&source), &jobs, a, whole(z.buffer()?), z.element())?;
    commands.submit()?;
    Ok(z)
}

/// The CPU twin for one matrix. `z`: tokens × rank, overwritten.
pub(super) fn project_cpu(x: RawMatrix, a: &[f64], z: &mut [f64], par: faer::Par) {
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
        par,
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
    /// Summands that Z is stored as, from [`parts`]; 1 in the wide tiers.
    pub parts: usize,
}

/// Into how many parts the width is split so that the GPU is full: `tiles` as there are without splitting.
pub(super) fn parts(element: Element, tokens: usize, a: Shape, jobs: usize) -> usize {
    if element != Element::F32 {
        return 1;
    }
    let tile_n = tile_n(a.rows) as usize;
    let tiles = tokens.div_ceil(TILE_M) * a.rows.div_ceil(tile_n) * jobs;
    (ENOUGH_WORKGROUPS / tiles.max(1)).clamp(1, MAX_PARTS).min((a.cols / 256).max(1))
}

/// Most summands that Z is stored as.
pub(super) const MAX_PARTS: usize = 16;

const TILE_M: usize = 128;
/// The shader steps along k by this much.
const DEPTH: usize = 16;

/// Columns of a tile.
fn tile_n(rank: usize) -> u32 {
    match rank {
        0..=32 => 32,
        33..=64 => 64,
        _ => 128,
    }
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
    x: wgpu::BufferBinding<'_>,
    jobs: &[ProjectJob],
    a: &Batch,
    z: wgpu::BufferBinding<'_>,
    element: Element,
) -> Result<()> {
    match element == Element::F32 {
        true => encode_f32(commands, x, jobs, a, z),
        false => encode_real(commands, x, jobs, a, z, element),
    }
}

fn encode_f32(
    commands: &mut Commands<'_>,
    x: wgpu::BufferBinding<'_>,
    jobs: &[ProjectJob],
    a: &Batch,
    z: wgpu::BufferBinding<'_>,
) -> Result<()> {
    // One launch for each tile that occurs.
    let mut launches: BTreeMap<u32, (Vec<Job>, Vec<Work>)> = BTreeMap::new();
    for job in jobs {
        let shape = a.shapes()[job.a];
        let tile = tile_n(shape.rows);
        let (table, work) = launches.entry(tile).or_default();
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
        });
    }
    let buffers = [x, whole(a.buffer()?), z];
    for (tile, (table, work)) in launches {
        commands.launch(Kernel::Project(tile), &table, &work, &buffers);
    }
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
    commands.launch(Kernel::ProjectReal(element), &table, &work, &buffers);
    Ok(())
}
