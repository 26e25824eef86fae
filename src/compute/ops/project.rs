use std::collections::BTreeMap;
use std::sync::Arc;

use bytemuck::NoUninit;
use rayon::prelude::*;

use super::{ENOUGH_WORKGROUPS, dtype_code, mismatch, view, view_mut};
use crate::compute::gpu::{Commands, Gpu, Pooled, Work, whole};
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
        if x.cols() != a.cols {
            return Err(mismatch("project", Shape::new(x.rows(), x.cols()), *a));
        }
    }
    let shapes: Vec<_> = x.iter().zip(a.shapes()).map(|(x, a)| Shape::new(x.rows(), a.rows)).collect();
    let mut z = Batch::unwritten(device, device.product(), &shapes)?;
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
            x: 0,
            x_word: words.len() / 4,
            tokens: x.rows(),
            dtype: x.dtype(),
            a: i,
            z: z.offset(i),
        });
        words.extend_from_slice(x.bytes());
        words.resize(words.len().next_multiple_of(X_ALIGN), 0);
    }
    let source = gpu.scratch(words.len() as u64)?;
    gpu.write(&source, 0, &words)?;
    let mut commands = gpu.commands();
    encode(&mut commands, gpu, &[whole(&source)], &jobs, a, whole(z.buffer()?), z.element())?;
    commands.submit()?;
    Ok(z)
}

/// The CPU twin for one matrix. `z`: tokens × rank, overwritten.
pub(super) fn project_cpu(x: RawMatrix, a: &[f64], z: &mut [f64]) {
    if z.is_empty() {
        return;
    }
    let rank = z.len() / x.rows();
    let wide: Vec<f64> = x.to_vec();
    faer::linalg::matmul::matmul(
        view_mut(z, Shape::new(x.rows(), rank)),
        faer::Accum::Replace,
        view(&wide, Shape::new(x.rows(), x.cols())),
        view(a, Shape::new(rank, x.cols())).transpose(),
        1.0,
        faer::Par::Seq,
    );
}

/// One product of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProjectJob {
    /// Which of the bindings of activations.
    pub x: usize,
    /// First word of X in it; matrix units need a multiple of 4.
    pub x_word: usize,
    pub tokens: usize,
    pub dtype: Dtype,
    /// Which matrix of the batch of A.
    pub a: usize,
    /// First element of Z in its buffer.
    pub z: usize,
}

/// Bytes that the start of each X should be a multiple of: vector loads of matrix units are aligned.
pub(super) const X_ALIGN: usize = 16;

/// The rows of a tile, and the parts that a width is split into at most.
const TILE_M: usize = 128;
const MAX_PARTS: usize = 8;
/// The shaders step along k by this much, or half of it.
const DEPTH: usize = 32;
/// A part of the width is not worth its sum if it is narrower.
const LEAST_PART: usize = 256;
/// A wider part of rows of X may have left the cache when it is read again, once its powers of two are found; f16 has
/// none to find.
const CACHED_PART: usize = 1536;

/// From so many on matrix units are used.
const ENOUGH_TOKENS: usize = 256;

/// How a product is cut: a kernel, its tile, and parts of the width.
#[derive(Clone, Copy, Debug)]
struct Cut {
    kernel: Kernel,
    /// Columns of a tile; its rows are TILE_M.
    columns: usize,
    parts: usize,
    part_width: usize,
    /// Elements of a row of a part, and of a whole part.
    stride: usize,
    part_len: usize,
}

impl Cut {
    /// A pure function of the problem and of what the GPU can do; `most`: parts at most.
    fn new(gpu: &Gpu, job: &ProjectJob, a: Shape, most: usize) -> Self {
        let whole_vectors = a.cols.is_multiple_of(8) && (job.x_word * 4).is_multiple_of(X_ALIGN);
        // For few tokens, splitting A would cost more than it saves, and memory that nobody reckoned with.
        let worth_it = job.tokens >= ENOUGH_TOKENS && a.rows >= 8 && a.cols > 0;
        let on_units = gpu.capabilities.matrix_units() && whole_vectors && worth_it;
        let columns = match a.rows {
            0..=32 => 32,
            65.. if !on_units => 128,
            _ => 64,
        };
        let tiles = job.tokens.div_ceil(TILE_M) * a.rows.div_ceil(columns);
        let cached = if on_units && job.dtype != Dtype::F16 { a.cols / CACHED_PART } else { 0 };
        let most = (a.cols / LEAST_PART).clamp(1, most);
        let parts = (ENOUGH_WORKGROUPS / tiles.max(1)).max(cached).clamp(1, most);
        let part_width = a.cols.div_ceil(parts).next_multiple_of(DEPTH).max(DEPTH);
        let parts = a.cols.div_ceil(part_width).max(1);
        // Units leave whole tiles behind; otherwise vectors of 4 are what is summed.
        let (kernel, rows, stride) = match on_units {
            true => (
                Kernel::ProjectMatrix(columns as u32, job.dtype),
                job.tokens.next_multiple_of(TILE_M),
                a.rows.next_multiple_of(columns),
            ),
            false => (
                Kernel::Project(columns as u32, job.dtype),
                job.tokens,
                if parts == 1 { a.rows } else { a.rows.next_multiple_of(4) },
            ),
        };
        Self { kernel, columns, parts, part_width, stride, part_len: rows * stride }
    }

    /// Whether Z comes out of `sum_parts.wgsl`.
    fn is_summed(&self) -> bool {
        self.parts > 1 || self.uses_matrix_units()
    }

    fn uses_matrix_units(&self) -> bool {
        self.kernel.uses_matrix_units()
    }
}

/// Most bytes of parts, and of their scales, that a product of `tokens` × `rank` may take on its way.
pub(super) fn parts_bytes(tokens: usize, rank: usize) -> usize {
    (tokens.next_multiple_of(TILE_M) * (rank.next_multiple_of(64) + 1) * 4).saturating_mul(MAX_PARTS)
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
    stride: u32,
    part_width: u32,
}

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct MatrixJob {
    job: Job,
    a_stride: u32,
    x_scales: u32,
    a_scales: u32,
}

#[derive(Clone, Copy, Debug, NoUninit)]
#[repr(C)]
struct SplitJob {
    a: u32,
    halves: u32,
    scales: u32,
    rows: u32,
    cols: u32,
    stride: u32,
}

/// No scales, in the place of their first element.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct SumJob {
    parts: u32,
    z: u32,
    tokens: u32,
    rank: u32,
    stride: u32,
    part_len: u32,
    count: u32,
    x_scales: u32,
    a_scales: u32,
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

/// Records the products of activations that lie in some buffers, in phases 0 to 2.
pub(super) fn encode(
    commands: &mut Commands<'_>,
    gpu: &Arc<Gpu>,
    x: &[wgpu::BufferBinding<'_>],
    jobs: &[ProjectJob],
    a: &Batch,
    z: wgpu::BufferBinding<'_>,
    element: Element,
) -> Result<()> {
    match element {
        Element::F32 => encode_f32(commands, gpu, x, jobs, a, z, None),
        _ => encode_real(commands, x, jobs, a, z, element),
    }
}

/// A matrix of A as halves, made once for many products.
#[derive(Debug)]
pub(super) struct SplitA {
    job: SplitJob,
    /// High and low parts, and scales.
    buffers: [Arc<Pooled>; 3],
}

impl SplitA {
    /// The rows of a tile that matrix units have for this A, if they serve it where tokens are enough.
    fn columns(gpu: &Gpu, a: Shape) -> Option<usize> {
        let job = ProjectJob { x: 0, x_word: 0, tokens: ENOUGH_TOKENS, dtype: Dtype::F16, a: 0, z: 0 };
        let cut = Cut::new(gpu, &job, a, 1);
        cut.uses_matrix_units().then_some(cut.columns)
    }

    /// Splits matrix `index` of A, if matrix units serve it.
    pub(super) fn new(gpu: &Arc<Gpu>, a: &Batch, index: usize) -> Result<Option<Self>> {
        let Some(columns) = Self::columns(gpu, a.shapes()[index]) else { return Ok(None) };
        let mut tables = Tables::default();
        let job = tables.split(a, index, columns);
        let mut commands = gpu.commands();
        let buffers = tables.halves(&mut commands, gpu)?;
        tables.launch_splits(&mut commands, a, &buffers)?;
        commands.submit()?;
        Ok(Some(Self { job, buffers }))
    }

    /// Bytes that this takes for an A of this shape.
    pub(super) fn bytes_for(gpu: &Gpu, a: Shape) -> u64 {
        let halves = |columns| a.rows.next_multiple_of(columns) * a.cols.next_multiple_of(DEPTH);
        Self::columns(gpu, a).map_or(0, |columns| 4 * (halves(columns) + a.rows) as u64)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.buffers.iter().map(|buffer| buffer.size()).sum()
    }
}

/// The tables of the launches that one product takes part in.
#[derive(Default)]
struct Tables {
    /// Where A comes as halves already.
    ready: Option<SplitJob>,
    splits: Table<SplitJob>,
    /// Where each split matrix of A is in `splits`.
    split: BTreeMap<usize, usize>,
    /// Elements of high and of low halves of A so far, and of the scales of its rows.
    halves_len: usize,
    scales_len: usize,
    /// By binding of X.
    inputs: BTreeMap<usize, Products>,
}

/// Those of one binding of X. Its parts have a buffer of their own: launches that write to one buffer wait for each
/// other.
#[derive(Default)]
struct Products {
    /// One launch for each permutation that occurs, and whether it writes Z itself.
    plain: BTreeMap<(Kernel, bool), Table<Job>>,
    matrix: BTreeMap<Kernel, Table<MatrixJob>>,
    sums: Table<SumJob>,
    /// Elements of parts so far.
    parts_len: usize,
}

/// The jobs of a launch, and their work.
type Table<J> = (Vec<J>, Vec<Work>);

impl Tables {
    /// The job that splits matrix `index` of A in whole tiles of `columns` rows.
    fn split(&mut self, a: &Batch, index: usize, columns: usize) -> SplitJob {
        if let Some(&place) = self.split.get(&index) {
            return self.splits.0[place];
        }
        let shape = a.shapes()[index];
        let (rows, stride) = (shape.rows.next_multiple_of(columns), shape.cols.next_multiple_of(DEPTH));
        let job = SplitJob {
            a: a.offset(index) as u32,
            halves: self.halves_len as u32,
            scales: self.scales_len as u32,
            rows: shape.rows as u32,
            cols: shape.cols as u32,
            stride: stride as u32,
        };
        let place = self.splits.0.len();
        self.split.insert(index, place);
        self.splits.0.push(job);
        self.splits.1.extend((0..rows as u32).step_by(8).map(|row| [place as u32, row, 0, 0]));
        self.halves_len += rows * stride;
        self.scales_len += shape.rows;
        job
    }

    /// High and low parts of A, and scales, to be written.
    fn halves(&self, commands: &mut Commands<'_>, gpu: &Arc<Gpu>) -> Result<[Arc<Pooled>; 3]> {
        let mut scratch = |elements: usize, size| commands.scratch(gpu, (elements.max(1) * size) as u64);
        Ok([scratch(self.halves_len, 2)?, scratch(self.halves_len, 2)?, scratch(self.scales_len, 4)?])
    }

    fn launch_splits(
        &self,
        commands: &mut Commands<'_>,
        a: &Batch,
        buffers: &[Arc<Pooled>; 3],
    ) -> Result<()> {
        let (table, work) = &self.splits;
        let [high, low, scales] = buffers.each_ref().map(|buffer| whole(buffer));
        commands.launch(Kernel::SplitRows, table, work, &[whole(a.buffer()?), high, low, scales]);
        Ok(())
    }

    fn add(&mut self, gpu: &Gpu, job: &ProjectJob, a: &Batch, most_parts: usize) {
        let shape = a.shapes()[job.a];
        if job.tokens == 0 || shape.rows == 0 {
            return;
        }
        let cut = Cut::new(gpu, job, shape, most_parts);
        let mut entry = Job {
            x: job.x_word as u32,
            a: a.offset(job.a) as u32,
            z: job.z as u32,
            tokens: job.tokens as u32,
            rank: shape.rows as u32,
            width: shape.cols as u32,
            stride: cut.stride as u32,
            part_width: cut.part_width as u32,
        };
        let (mut x_scales, mut a_scales, mut a_stride) = (NONE, NONE, 0);
        if cut.uses_matrix_units() {
            let split = match self.ready {
                Some(ready) => ready,
                None => self.split(a, job.a, cut.columns),
            };
            (entry.a, a_scales, a_stride) = (split.halves, split.scales, split.stride);
        }
        let Products { plain, matrix, sums, parts_len } = self.inputs.entry(job.x).or_default();
        if cut.is_summed() {
            entry.z = *parts_len as u32;
            *parts_len += cut.parts * cut.part_len;
            // Values of f16 are in range.
            if cut.uses_matrix_units() && job.dtype != Dtype::F16 {
                x_scales = *parts_len as u32;
                *parts_len += (cut.parts * job.tokens).next_multiple_of(4);
            }
            let index = sums.0.len() as u32;
            sums.0.push(SumJob {
                parts: entry.z,
                z: job.z as u32,
                tokens: entry.tokens,
                rank: entry.rank,
                stride: entry.stride,
                part_len: cut.part_len as u32,
                count: cut.parts as u32,
                x_scales,
                a_scales,
            });
            let quads = entry.tokens * entry.rank.div_ceil(4);
            sums.1.extend((0..quads).step_by(256).map(|first| [index, first, 0, 0]));
        }
        let [rows, columns] =
            [job.tokens.div_ceil(TILE_M), shape.rows.div_ceil(cut.columns)].map(|n| n as u32);
        let tiles = |index: usize| {
            (0..cut.parts as u32).flat_map(move |part| {
                (0..rows)
                    .flat_map(move |row| (0..columns).map(move |column| [index as u32, row, column, part]))
            })
        };
        if cut.uses_matrix_units() {
            let (table, work) = matrix.entry(cut.kernel).or_default();
            work.extend(tiles(table.len()));
            table.push(MatrixJob { job: entry, a_stride, x_scales, a_scales });
        } else {
            let (table, work) = plain.entry((cut.kernel, !cut.is_summed())).or_default();
            work.extend(tiles(table.len()));
            table.push(entry);
        }
    }
}

/// [`encode`] in f32. `ready`: the matrix of A that all jobs multiply by.
pub(super) fn encode_f32(
    commands: &mut Commands<'_>,
    gpu: &Arc<Gpu>,
    x: &[wgpu::BufferBinding<'_>],
    jobs: &[ProjectJob],
    a: &Batch,
    z: wgpu::BufferBinding<'_>,
    ready: Option<&SplitA>,
) -> Result<()> {
    let tables = |most_parts: usize| {
        let mut tables = Tables { ready: ready.map(|ready| ready.job), ..Default::default() };
        jobs.iter().for_each(|job| tables.add(gpu, job, a, most_parts));
        tables
    };
    let mut all = tables(MAX_PARTS);
    // Parts of very many products may be more than one buffer holds.
    if all.inputs.values().any(|input| input.parts_len as u64 * 4 > gpu.max_arena()) {
        all = tables(1);
    }
    let factor = whole(a.buffer()?);
    let buffers = match ready {
        Some(ready) => {
            // Their owner may drop them before this is submitted.
            ready.buffers.iter().for_each(|buffer| commands.keep(buffer.clone()));
            ready.buffers.clone()
        }
        None => all.halves(commands, gpu)?,
    };
    let [high, low, scales] = &buffers;
    commands.phase(0);
    all.launch_splits(commands, a, &buffers)?;
    for (i, Products { plain, matrix, sums, parts_len }) in &all.inputs {
        let parts = commands.scratch(gpu, (*parts_len).max(1) as u64 * 4)?;
        commands.phase(1);
        for ((kernel, direct), (table, work)) in plain {
            let out = if *direct { z.clone() } else { whole(&parts) };
            commands.launch(*kernel, table, work, &[x[*i].clone(), factor.clone(), out]);
        }
        for (kernel, (table, work)) in matrix {
            let buffers = [x[*i].clone(), whole(high), whole(low), whole(&parts), whole(scales)];
            commands.launch(*kernel, table, work, &buffers);
        }
        commands.phase(2);
        commands.launch(Kernel::SumParts, &sums.0, &sums.1, &[whole(&parts), z.clone(), whole(scales)]);
    }
    Ok(())
}

fn encode_real(
    commands: &mut Commands<'_>,
    x: &[wgpu::BufferBinding<'_>],
    jobs: &[ProjectJob],
    a: &Batch,
    z: wgpu::BufferBinding<'_>,
    element: Element,
) -> Result<()> {
    commands.phase(1);
    for (i, x) in x.iter().enumerate() {
        let table: Vec<_> = jobs.iter().filter(|job| job.x == i).map(|job| real_job(job, a)).collect();
        let work: Vec<Work> = table
            .iter()
            .enumerate()
            .flat_map(|(i, job)| {
                (0..job.tokens.div_ceil(32))
                    .flat_map(move |row| (0..job.rank.div_ceil(32)).map(move |c| [i as u32, row, c, 0]))
            })
            .collect();
        let buffers = [x.clone(), whole(a.buffer()?), z.clone()];
        commands.launch(Kernel::ProjectReal(element), &table, &work, &buffers);
    }
    Ok(())
}

fn real_job(job: &ProjectJob, a: &Batch) -> RealJob {
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
}
