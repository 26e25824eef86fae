use rayon::prelude::*;

use super::{ENOUGH_WORKGROUPS, mismatch, same_count, view, view_mut};
use crate::compute::batch::{ANY, Operands, WIDE};
use crate::compute::gpu::{Commands, Gpu, Phase, Pooled, Work, whole};
use crate::compute::shaders::{Declared, Kernel, job, shared_tile};
use crate::compute::{Batch, Capabilities, Device, Element, Precision, Shape};
use crate::{Error, Result};

/// `S += ZᵀZ`: blocked Gram accumulation.
///
/// `z[i]`: tokens × rank, `sums[i]`: rank × rank, symmetric. Each tile of the lower triangle is summed over
/// parts of the tokens, in f32 or the device's tier; the parts are added to `sums` in a fixed order in
/// full precision and mirrored. So the error of a long sum is that of one part (relative 1e-7), however
/// many calls it takes.
///
/// # Errors
/// [`Error::Invalid`] if shapes differ.
pub fn gram(device: &Device, z: &Batch, sums: &mut Batch) -> Result<()> {
    same_count("gram", z, sums)?;
    for (z, sum) in z.shapes().iter().zip(sums.shapes()) {
        if *sum != Shape::new(z.cols, z.cols) {
            return Err(mismatch("gram", *z, *sum));
        }
    }
    let (gpu, [rows]) = match Operands::of("gram", device, [(z, ANY)])? {
        Operands::Gpu(gpu, operands) => (gpu, operands),
        Operands::Host([rows]) => {
            sums.host_mut()?.into_par_iter().enumerate().for_each(|(i, sum)| {
                gram_cpu(rows.values(i), z.shapes()[i], sum);
            });
            return Ok(());
        }
    };
    let jobs: Vec<_> = (0..z.len())
        .map(|i| GramJob { z: z.offset(i), tokens: z.shapes()[i].rows, rank: z.shapes()[i].cols, sum: i })
        .collect();
    let mut commands = gpu.commands();
    let precision = device.precision().of_others();
    let pending = encode(&mut commands, device, precision, rows.binding(), z.element(), &jobs, sums)?;
    commands.submit()?;
    match pending {
        Some(pending) => pending.finish(gpu, sums),
        None => Ok(()),
    }
}

/// The CPU twin for one matrix.
pub(super) fn gram_cpu(z: &[f64], shape: Shape, sum: &mut [f64]) {
    if shape.is_empty() {
        return;
    }
    use faer::linalg::matmul::triangular::{BlockStructure, matmul};
    let n = shape.cols;
    let z = view(z, shape);
    matmul(
        view_mut(sum, Shape::new(n, n)),
        BlockStructure::TriangularLower,
        faer::Accum::Add,
        z.transpose(),
        BlockStructure::Rectangular,
        z,
        BlockStructure::Rectangular,
        1.0,
        faer::Par::Seq,
    );
    for i in 0..n {
        for j in 0..i {
            sum[j * n + i] = sum[i * n + j];
        }
    }
}

/// One Gram matrix of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct GramJob {
    /// First element of Z in its buffer.
    pub z: usize,
    pub tokens: usize,
    pub rank: usize,
    /// Which matrix of the sums; no two jobs of a launch may share one.
    pub sum: usize,
}

job! {
    struct Job {
        z: u32,
        gram: u32,
        tokens: u32,
        rank: u32,
        part_tokens: u32,
    }
}

job! {
    struct MatrixJob {
        job: Job,
        scales: u32,
    }
}

job! {
    struct ScaleJob {
        matrix: u32,
        scales: u32,
        rows: u32,
        cols: u32,
    }
}

fn job(job: &GramJob, cut: &Cut, reduce: &ReduceJob) -> Job {
    Job {
        z: job.z as u32,
        gram: reduce.gram,
        tokens: job.tokens as u32,
        rank: reduce.rank,
        part_tokens: cut.part_tokens as u32,
    }
}

/// How a Gram matrix is cut.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// The side of a tile without matrix units.
    side: u32,
    on_units: bool,
    part_tokens: usize,
    parts: usize,
}

impl Cut {
    /// A pure function of the problem and of what the GPU can do. `beside`: Gram matrices that are made side by side.
    fn new(capabilities: &Capabilities, job: &GramJob, beside: usize) -> Self {
        let part_tokens = part_tokens(job.tokens, job.rank, beside);
        Self {
            side: tile(job.rank),
            // For a tile or less, finding scales costs more than matrix units save.
            on_units: capabilities.matrix_units()
                && job.rank > MATRIX_SIDE as usize
                && job.rank.is_multiple_of(4)
                && job.z.is_multiple_of(4),
            part_tokens,
            parts: job.tokens.div_ceil(part_tokens),
        }
    }
}

job! {
    struct ReduceJob {
        gram: u32,
        sums: u32,
        rank: u32,
        parts: u32,
    }
}

/// Partial Gram matrices that the host has to add, where the GPU has no tier of full precision.
pub(super) struct Pending {
    partial: Pooled,
    bytes: u64,
    /// What to add, and to which sum.
    jobs: Vec<(ReduceJob, usize)>,
}

/// Sides of tiles: of `gram.wgsl`, each a permutation, of `shared/gram_tile.wgsl` and of `gram_real.wgsl`.
const SIDES: [u32; 3] = [32, 64, 128];
const MATRIX_SIDE: u32 = 128;
const REAL_SIDE: u32 = 16;

/// Elements that a workgroup of `gram_reduce.wgsl` adds up, and rows that one of `row_scale.wgsl` scales.
const CHUNK: usize = 256;
const ROWS: usize = 8;

fn kernel(side: u32) -> Kernel {
    shared_tile(Kernel::new("gram").number("TILE", side), side)
}

/// The kernel on matrix units, with values of 22 bits or of 11.
fn matrix_kernel(fast: bool) -> Kernel {
    Kernel::new(if fast { "gram_halves" } else { "gram_matrix" })
}

fn scale_kernel() -> Kernel {
    Kernel::new("row_scale")
}

/// The kernel for Z of `part` and sums of `sums`.
fn real_kernel(part: Element, sums: Element) -> Kernel {
    of_parts(Kernel::new("gram_real"), part, sums)
}

/// The kernel that adds partial matrices of `part` to sums of `sums`.
fn reduce_kernel(part: Element, sums: Element) -> Kernel {
    of_parts(Kernel::new("gram_reduce"), part, sums)
}

fn of_parts(kernel: Kernel, part: Element, sums: Element) -> Kernel {
    let file = if part == Element::F32 { "shared/part_f32" } else { "shared/part_real" };
    kernel.real(sums).import("part", file)
}

pub(super) fn declared() -> [Declared; 5] {
    let pairs = || WIDE.iter().flat_map(|&sums| [(Element::F32, sums), (sums, sums)]);
    [
        Declared::new::<Job>(SIDES.map(kernel)),
        Declared::new::<MatrixJob>([false, true].map(matrix_kernel)).constant("TILE", MATRIX_SIDE),
        Declared::new::<ScaleJob>([scale_kernel()]).constant("ROWS", ROWS),
        Declared::new::<Job>(pairs().map(|(part, sums)| real_kernel(part, sums))).constant("TILE", REAL_SIDE),
        Declared::new::<ReduceJob>(pairs().map(|(part, sums)| reduce_kernel(part, sums)))
            .constant("CHUNK", CHUNK),
    ]
}

fn tile(rank: usize) -> u32 {
    match rank {
        0..=32 => 32,
        33..=192 => 64,
        _ => 128,
    }
}

/// Most bytes that the partial matrices of one Gram matrix take.
const MAX_PARTIAL: usize = 32 << 20;

/// Tokens summed in f32 before full precision takes over: few enough for an error near one rounding,
/// and enough parts to fill the GPU, as far as memory goes.
/// `jobs`: Gram matrices that are made side by side.
fn part_tokens(tokens: usize, rank: usize, jobs: usize) -> usize {
    let tiles = rank.div_ceil(tile(rank) as usize).max(1);
    let triangle = tiles * (tiles + 1) / 2;
    let wanted = tokens.div_ceil((ENOUGH_WORKGROUPS / (triangle * jobs.max(1))).max(1)).clamp(64, 512);
    let most_parts = (MAX_PARTIAL / (rank * rank * 8).max(1)).max(1);
    wanted.max(tokens.div_ceil(most_parts)).next_multiple_of(16)
}

/// Most bytes of scratch memory that [`gram`] takes.
pub(crate) fn gram_bytes(tokens: usize, rank: usize) -> usize {
    8 * partial_len(tokens, rank, 1)
}

/// Elements of the partial matrices of one Gram matrix; alone they are most.
pub(super) fn partial_len(tokens: usize, rank: usize, jobs: usize) -> usize {
    tokens.div_ceil(part_tokens(tokens, rank, jobs)) * rank * rank
}

/// Records Gram matrices of Z that lies in one buffer.
pub(super) fn encode(
    commands: &mut Commands<'_>,
    device: &Device,
    precision: Precision,
    z: wgpu::BufferBinding<'_>,
    z_element: Element,
    jobs: &[GramJob],
    sums: &Batch,
) -> Result<Option<Pending>> {
    let (gpu, wide) = (device.gpu()?, sums.element());
    // A forced precision also holds for products of f32 factors.
    let real = !precision.is_single() || z_element != Element::F32;
    let part_element = if real { wide } else { Element::F32 };
    if part_element == Element::Host {
        return Err(Error::Device("wide products cannot be summed on the host".into()));
    }
    if wide != Element::Host {
        Operands::of("gram", device, [(sums, WIDE)])?;
        if ![Element::F32, wide].contains(&z_element) {
            return Err(Error::Invalid(format!(
                "gram: products of {z_element:?} cannot be summed in {wide:?}"
            )));
        }
    }
    let mut len = 0;
    let cuts: Vec<_> = jobs.iter().map(|job| Cut::new(&gpu.capabilities, job, jobs.len())).collect();
    let reduce: Vec<_> = jobs
        .iter()
        .zip(&cuts)
        .map(|(job, cut)| {
            let gram = len as u32;
            len += cut.parts * job.rank * job.rank;
            ReduceJob {
                gram,
                sums: sums.offset(job.sum) as u32,
                rank: job.rank as u32,
                parts: cut.parts as u32,
            }
        })
        .collect();
    let bytes = len as u64 * part_element.bytes();
    let partial = gpu.scratch(bytes)?;
    let buffers = [z, whole(&partial)];
    let tiles = |side: u32, index: u32, job: &ReduceJob| {
        let (parts, n) = (job.parts, job.rank.div_ceil(side));
        (0..parts).flat_map(move |p| (0..n).flat_map(move |i| (0..=i).map(move |j| [index, i, j, p])))
    };
    let all = || jobs.iter().zip(&cuts).zip(&reduce);
    if real {
        commands.phase(Phase::Gram);
        let table: Vec<_> = all().map(|((job, cut), r)| self::job(job, cut, r)).collect();
        let work: Vec<Work> =
            reduce.iter().enumerate().flat_map(|(i, job)| tiles(REAL_SIDE, i as u32, job)).collect();
        commands.launch(real_kernel(z_element, wide), &table, &work, &buffers)?;
    } else {
        let (mut table, mut work) = (Vec::new(), Vec::<Work>::new());
        let (mut scales_len, mut scale_table, mut scale_work) = (0, Vec::new(), Vec::<Work>::new());
        for ((job, cut), r) in all().filter(|((_, cut), _)| cut.on_units) {
            work.extend(tiles(MATRIX_SIDE, table.len() as u32, r));
            scale_work
                .extend((0..job.tokens as u32).step_by(ROWS).map(|row| [table.len() as u32, row, 0, 0]));
            let matrix = MatrixJob { job: self::job(job, cut, r), scales: scales_len };
            let Job { z, tokens: rows, rank: cols, .. } = matrix.job;
            scale_table.push(ScaleJob { matrix: z, scales: scales_len, rows, cols });
            scales_len += rows;
            table.push(matrix);
        }
        commands.phase(Phase::ScaleRows);
        let scales = gpu.scratch(u64::from(scales_len).max(1) * 4)?;
        commands.launch(scale_kernel(), &scale_table, &scale_work, &[buffers[0].clone(), whole(&scales)])?;
        commands.phase(Phase::Gram);
        commands.launch(
            matrix_kernel(precision == Precision::Fast),
            &table,
            &work,
            &[buffers[0].clone(), buffers[1].clone(), whole(&scales)],
        )?;
        commands.keep(scales);
        for side in SIDES {
            let mut table = Vec::new();
            let mut work: Vec<Work> = Vec::new();
            for ((job, cut), r) in all().filter(|((_, cut), _)| !cut.on_units && cut.side == side) {
                work.extend(tiles(side, table.len() as u32, r));
                table.push(self::job(job, cut, r));
            }
            commands.launch(kernel(side), &table, &work, &buffers)?;
        }
    }
    if wide == Element::Host {
        let jobs = reduce.into_iter().zip(jobs.iter().map(|job| job.sum)).collect();
        return Ok(Some(Pending { partial, bytes, jobs }));
    }
    let work: Vec<Work> = reduce
        .iter()
        .enumerate()
        .flat_map(|(i, job)| (0..job.rank * job.rank).step_by(CHUNK).map(move |e| [i as u32, e, 0, 0]))
        .collect();
    let buffers = [whole(&partial), sums.binding()?];
    commands.phase(Phase::Reduce);
    commands.launch(reduce_kernel(part_element, wide), &reduce, &work, &buffers)?;
    commands.keep(partial);
    Ok(None)
}

impl Pending {
    /// After submission: adds on the host what the GPU could not.
    pub fn finish(self, gpu: &Gpu, sums: &mut Batch) -> Result<()> {
        let bytes = gpu.read(&self.partial, self.bytes)?;
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
        let mut sums = sums.host_mut()?;
        for (job, sum) in self.jobs {
            let n = job.rank as usize;
            for part in 0..job.parts as usize {
                let part = &values[job.gram as usize + part * n * n..][..n * n];
                for i in 0..n {
                    for j in 0..=i {
                        sums[sum][i * n + j] += f64::from(part[i * n + j]);
                        sums[sum][j * n + i] = sums[sum][i * n + j];
                    }
                }
            }
        }
        Ok(())
    }
}
