use std::collections::BTreeMap;
use std::sync::Arc;

use super::{DTYPES, ENOUGH_WORKGROUPS, dtype_code, gemm, mismatch, view, view_mut};
use crate::compute::batch::{FACTOR, Operands, WIDE};
use crate::compute::gpu::{Commands, Gpu, Phase, Pooled, Work, whole};
use crate::compute::shaders::{Declared, Kernel, job, shared_tile};
use crate::compute::{Batch, Capabilities, Device, Element, Shape};
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
    let gpu = match Operands::of("project", device, [(a, FACTOR)])? {
        Operands::Gpu(gpu, _) => gpu,
        Operands::Host([a]) => {
            return Batch::made_on_host(&shapes, |i, z| project_cpu(x[i], a.values(i), z));
        }
    };
    let z = Batch::unwritten(device, device.product(), &shapes)?;
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
    encode(&mut commands, gpu, &[whole(&source)], &jobs, a, z.binding()?, z.element())?;
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
    gemm(
        view_mut(z, Shape::new(x.rows(), rank)),
        faer::Accum::Replace,
        1.0,
        view(&wide, Shape::new(x.rows(), x.cols())),
        view(a, Shape::new(rank, x.cols())).transpose(),
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

/// The rows of a tile without matrix units and on them, and the parts that a width is split into at most.
const TILE_M: usize = 128;
const MATRIX_TILE_M: usize = 64;
const MAX_PARTS: usize = 8;
/// The shader for matrix units steps along k by this much, the other one by half of it.
const STEP: usize = 32;
/// A part of the width is not worth its sum if it is narrower.
const LEAST_PART: usize = 256;
/// The side of a tile of `project_real.wgsl`.
const REAL_TILE: u32 = 32;

/// From so many on matrix units are used.
const ENOUGH_TOKENS: usize = 256;

/// How a product is cut: a kernel, its tile, and parts of the width.
#[derive(Clone, Copy, Debug)]
struct Cut {
    kernel: Kernel,
    /// Rows and columns of a tile.
    rows: usize,
    columns: usize,
    on_units: bool,
    parts: usize,
    part_width: usize,
    /// Elements of a row of a part, and of a whole part.
    stride: usize,
    part_len: usize,
}

impl Cut {
    /// A pure function of the problem and of what the GPU can do; `most`: parts at most.
    fn new(capabilities: &Capabilities, job: &ProjectJob, a: Shape, most: usize) -> Self {
        let whole_vectors = a.cols.is_multiple_of(8) && (job.x_word * 4).is_multiple_of(X_ALIGN);
        // For few tokens, splitting A would cost more than it saves, and memory that nobody reckoned with.
        let worth_it = job.tokens >= ENOUGH_TOKENS && a.rows >= 8 && a.cols > 0;
        let on_units = capabilities.matrix_units() && whole_vectors && worth_it;
        // On matrix units a wide tile pays from two of them on, if it is no emptier than narrow ones.
        let wide_is_full = a.rows.next_multiple_of(128) == a.rows.next_multiple_of(64);
        let columns = match a.rows {
            0..=32 => 32,
            65.. if !on_units => 128,
            129.. if wide_is_full => 128,
            _ => 64,
        };
        let rows = if on_units { MATRIX_TILE_M } else { TILE_M };
        let tiles = job.tokens.div_ceil(rows) * a.rows.div_ceil(columns);
        let most = (a.cols / LEAST_PART).clamp(1, most);
        let parts = (ENOUGH_WORKGROUPS / tiles.max(1)).clamp(1, most);
        let part_width = a.cols.div_ceil(parts).next_multiple_of(STEP).max(STEP);
        let parts = a.cols.div_ceil(part_width).max(1);
        // Units leave whole tiles behind; otherwise vectors of 4 are what is summed.
        let (kernel, part_rows, stride) = match on_units {
            true => (
                matrix_kernel(columns as u32, job.dtype),
                job.tokens.next_multiple_of(rows),
                a.rows.next_multiple_of(columns),
            ),
            false => (
                kernel(columns as u32, job.dtype),
                job.tokens,
                if parts == 1 { a.rows } else { a.rows.next_multiple_of(4) },
            ),
        };
        Self { kernel, rows, columns, on_units, parts, part_width, stride, part_len: part_rows * stride }
    }

    /// Whether Z comes out of `sum_parts.wgsl`.
    fn is_summed(&self) -> bool {
        self.parts > 1 || self.on_units
    }
}

/// Most bytes of scratch memory that [`project`] and `inner_as` take for `tokens` × `rank` sums in f32:
/// parts, and their scales.
pub(crate) fn product_bytes(tokens: usize, rank: usize) -> usize {
    (tokens.next_multiple_of(TILE_M) * (rank.next_multiple_of(64) + 1) * 4).saturating_mul(MAX_PARTS)
}

job! {
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
}

job! {
    struct MatrixJob {
        job: Job,
        a_width: u32,
        a_columns: u32,
        x_scales: u32,
        a_scales: u32,
    }
}

job! {
    struct SplitJob {
        a: u32,
        halves: u32,
        scales: u32,
        rows: u32,
        cols: u32,
        width: u32,
        matrices: u32,
    }
}

/// No scales, in the place of their first element.
const NONE: u32 = u32::MAX;

/// Rows that a workgroup of `split_rows.wgsl` splits, and vectors of 4 sums that one of `sum_parts.wgsl` makes.
const ROWS: usize = 8;
const CHUNK: usize = 256;

/// Buffers of parts that a launch of `sum_parts.wgsl` takes.
const SOURCES: usize = 4;

job! {
    struct SumJob {
        source: u32,
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
}

job! {
    struct RealJob {
        x: u32,
        a: u32,
        z: u32,
        tokens: u32,
        rank: u32,
        width: u32,
        dtype: u32,
    }
}

/// The kernel without matrix units, with the columns (rank) of its tile and the type of X.
fn kernel(columns: u32, dtype: Dtype) -> Kernel {
    let rows = TILE_M as u32;
    shared_tile(Kernel::new("project").dtype(dtype).number("TILE_M", rows).number("TILE_N", columns), columns)
}

/// The kernel on matrix units, with the columns (rank) of its tile and the type of X.
fn matrix_kernel(columns: u32, dtype: Dtype) -> Kernel {
    Kernel::new("project_matrix").dtype(dtype).number("TILE_N", columns)
}

fn split_kernel() -> Kernel {
    Kernel::new("split_rows")
}

fn sum_kernel() -> Kernel {
    Kernel::new("sum_parts")
}

pub(super) fn real_kernel(sums: Element) -> Kernel {
    Kernel::new("project_real").real(sums)
}

pub(super) fn declared() -> [Declared; 5] {
    let each = |columns: &'static [u32], kernel: fn(u32, Dtype) -> Kernel| {
        columns.iter().flat_map(move |&columns| DTYPES.map(|dtype| kernel(columns, dtype)))
    };
    [
        Declared::new::<Job>(each(&[32, 64, 128], kernel)).constant("DEPTH", STEP / 2),
        Declared::new::<MatrixJob>(each(&[32, 64, 128], matrix_kernel))
            .constant("TILE_M", MATRIX_TILE_M)
            .constant("DEPTH", STEP),
        Declared::new::<SplitJob>([split_kernel()]).constant("ROWS", ROWS),
        Declared::new::<SumJob>([sum_kernel()]).constant("NONE", NONE).constant("CHUNK", CHUNK),
        Declared::new::<RealJob>(WIDE.iter().map(|&sums| real_kernel(sums)))
            .constant("TILE", REAL_TILE)
            .dtypes(),
    ]
}

/// Records the products of activations that lie in some buffers.
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
        let cut = Cut::new(&gpu.capabilities, &job, a, 1);
        cut.on_units.then_some(cut.columns)
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
        let halves = |columns| a.rows.next_multiple_of(columns) * a.cols.next_multiple_of(STEP);
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
    /// The products of each binding of X.
    inputs: BTreeMap<usize, Products>,
}

/// The tables of one binding of X. Its parts have a buffer of their own: launches that write to one buffer wait for each
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
        let (rows, width) = (shape.rows.next_multiple_of(columns), shape.cols.next_multiple_of(STEP));
        let job = SplitJob {
            a: a.offset(index) as u32,
            halves: self.halves_len as u32,
            scales: self.scales_len as u32,
            rows: shape.rows as u32,
            cols: shape.cols as u32,
            width: width as u32,
            matrices: (rows / 16) as u32,
        };
        let place = self.splits.0.len();
        self.split.insert(index, place);
        self.splits.0.push(job);
        self.splits.1.extend((0..rows as u32).step_by(ROWS).map(|row| [place as u32, row, 0, 0]));
        self.halves_len += rows * width;
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
        commands.launch(split_kernel(), table, work, &[a.binding()?, high, low, scales])
    }

    fn add(&mut self, gpu: &Gpu, job: &ProjectJob, a: &Batch, most_parts: usize) {
        let shape = a.shapes()[job.a];
        if job.tokens == 0 || shape.rows == 0 {
            return;
        }
        let cut = Cut::new(&gpu.capabilities, job, shape, most_parts);
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
        let (mut x_scales, mut a_scales, mut a_width, mut a_columns) = (NONE, NONE, 0, 0);
        if cut.on_units {
            let split = match self.ready {
                Some(ready) => ready,
                None => self.split(a, job.a, cut.columns),
            };
            (entry.a, a_scales) = (split.halves, split.scales);
            (a_width, a_columns) = (split.width, split.matrices);
        }
        let Products { plain, matrix, sums, parts_len } = self.inputs.entry(job.x).or_default();
        if cut.is_summed() {
            entry.z = *parts_len as u32;
            *parts_len += cut.parts * cut.part_len;
            // Values of f16 are in range.
            if cut.on_units && job.dtype != Dtype::F16 {
                x_scales = *parts_len as u32;
                *parts_len += (cut.parts * job.tokens).next_multiple_of(4);
            }
            let index = sums.0.len() as u32;
            sums.0.push(SumJob {
                source: 0,
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
            sums.1.extend((0..quads).step_by(CHUNK).map(|first| [index, first, 0, 0]));
        }
        let [rows, columns] =
            [job.tokens.div_ceil(cut.rows), shape.rows.div_ceil(cut.columns)].map(|n| n as u32);
        let tiles = |index: usize| {
            (0..cut.parts as u32).flat_map(move |part| {
                (0..rows)
                    .flat_map(move |row| (0..columns).map(move |column| [index as u32, row, column, part]))
            })
        };
        if cut.on_units {
            let (table, work) = matrix.entry(cut.kernel).or_default();
            work.extend(tiles(table.len()));
            table.push(MatrixJob { job: entry, a_width, a_columns, x_scales, a_scales });
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
    let factor = a.binding()?;
    let buffers = match ready {
        Some(ready) => {
            // Their owner may drop them before this is submitted.
            ready.buffers.iter().for_each(|buffer| commands.keep(buffer.clone()));
            ready.buffers.clone()
        }
        None => all.halves(commands, gpu)?,
    };
    let [high, low, scales] = &buffers;
    commands.phase(Phase::Split);
    all.launch_splits(commands, a, &buffers)?;
    let mut left = Vec::new();
    for (i, Products { plain, matrix, sums, parts_len }) in &all.inputs {
        let parts = commands.scratch(gpu, (*parts_len).max(1) as u64 * 4)?;
        commands.phase(Phase::Project);
        for ((kernel, direct), (table, work)) in plain {
            let out = if *direct { z.clone() } else { whole(&parts) };
            commands.launch(*kernel, table, work, &[x[*i].clone(), factor.clone(), out])?;
        }
        for (kernel, (table, work)) in matrix {
            let buffers = [x[*i].clone(), whole(high), whole(low), whole(&parts), whole(scales)];
            commands.launch(*kernel, table, work, &buffers)?;
        }
        left.push((sums, parts));
    }
    commands.phase(Phase::SumParts);
    for some in left.chunks(SOURCES) {
        let (mut table, mut work) = (Vec::new(), Vec::<Work>::new());
        for (source, ((jobs, of), _)) in (0..).zip(some) {
            let first = table.len() as u32;
            table.extend(jobs.iter().map(|job| SumJob { source, ..*job }));
            work.extend(of.iter().map(|&[job, quad, ..]| [first + job, quad, 0, 0]));
        }
        // Bindings that nobody reads are bound all the same.
        let parts = some.iter().chain(std::iter::repeat(&some[0])).take(SOURCES);
        let mut buffers: Vec<_> = parts.map(|(_, parts)| whole(parts)).collect();
        buffers.extend([z.clone(), whole(scales)]);
        commands.launch(sum_kernel(), &table, &work, &buffers)?;
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
    commands.phase(Phase::Project);
    for (i, x) in x.iter().enumerate() {
        let table: Vec<_> = jobs.iter().filter(|job| job.x == i).map(|job| real_job(job, a)).collect();
        let work: Vec<Work> = table
            .iter()
            .enumerate()
            .flat_map(|(i, job)| {
                let columns =
                    move |row| (0..job.rank.div_ceil(REAL_TILE)).map(move |c| [i as u32, row, c, 0]);
                (0..job.tokens.div_ceil(REAL_TILE)).flat_map(columns)
            })
            .collect();
        let buffers = [x.clone(), a.binding()?, z.clone()];
        commands.launch(real_kernel(element), &table, &work, &buffers)?;
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
