use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::{DTYPES, ENOUGH_WORKGROUPS, dtype_code, gemm, mismatch, view, view_mut};
use crate::compute::batch::{FACTOR, Operands, WIDE};
use crate::compute::gpu::{Commands, Gpu, Phase, Pooled, Work, whole};
use crate::compute::shaders::{Declared, Kernel, job, shared_tile};
use crate::compute::{Batch, Capabilities, Device, Element, Precision, Shape};
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
    let arithmetic = Arithmetic::of(z.element(), device.precision().of_others());
    encode(&mut commands, gpu, &[whole(&source)], &jobs, a, z.binding()?, arithmetic)?;
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

/// How a product is cut: tiles, and parts of the width.
#[derive(Clone, Copy, Debug)]
struct Cut {
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
        let (part_rows, stride) = match on_units {
            true => (job.tokens.next_multiple_of(rows), a.rows.next_multiple_of(columns)),
            false => (job.tokens, if parts == 1 { a.rows } else { a.rows.next_multiple_of(4) }),
        };
        Self { rows, columns, on_units, parts, part_width, stride, part_len: part_rows * stride }
    }

    /// Whether Z comes out of `sum_parts.wgsl`.
    fn is_summed(&self) -> bool {
        self.parts > 1 || self.on_units
    }

    /// Room for the parts after `len` elements; gives their first.
    fn take_parts(&self, len: &mut usize) -> u32 {
        let first = *len as u32;
        *len += self.parts * self.part_len;
        first
    }

    /// The product with an A of this shape, but for where A and the result are.
    fn job(&self, job: &ProjectJob, a: Shape) -> Job {
        Job {
            x: job.x_word as u32,
            a: NONE,
            z: NONE,
            tokens: job.tokens as u32,
            rank: a.rows as u32,
            width: a.cols as u32,
            stride: self.stride as u32,
            part_width: self.part_width as u32,
        }
    }

    /// The sum of its parts for an A of this shape, but for where they are.
    fn sum(&self, job: &ProjectJob, a: Shape) -> SumJob {
        SumJob {
            source: 0,
            parts: NONE,
            z: job.z as u32,
            tokens: job.tokens as u32,
            rank: a.rows as u32,
            stride: self.stride as u32,
            part_len: self.part_len as u32,
            count: self.parts as u32,
            x_scales: NONE,
            a_scales: NONE,
        }
    }

    /// The tiles of job number `index`.
    fn work(&self, index: usize, tokens: usize, a: Shape) -> impl Iterator<Item = Work> + use<> {
        let [rows, columns, parts] =
            [tokens.div_ceil(self.rows), a.rows.div_ceil(self.columns), self.parts].map(|n| n as u32);
        (0..parts).flat_map(move |part| {
            (0..rows).flat_map(move |row| (0..columns).map(move |column| [index as u32, row, column, part]))
        })
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

/// The side of a matrix of the units.
const SIDE: usize = 16;

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

/// The kernel on matrix units, with the columns (rank) of its tile and the type of X, which `fast` rounds to 11 bits.
fn matrix_kernel(columns: u32, dtype: Dtype, fast: bool) -> Kernel {
    Kernel::new("project_matrix").dtype(dtype).number("TILE_N", columns).flag("FAST", fast)
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
    let each = || [32, 64, 128].into_iter().flat_map(|columns| DTYPES.map(|dtype| (columns, dtype)));
    let on_units = || each().flat_map(|(columns, dtype)| [false, true].map(|fast| (columns, dtype, fast)));
    [
        Declared::new::<Job>(each().map(|(columns, dtype)| kernel(columns, dtype)))
            .constant("DEPTH", STEP / 2),
        Declared::new::<MatrixJob>(
            on_units().map(|(columns, dtype, fast)| matrix_kernel(columns, dtype, fast)),
        )
        .constant("TILE_M", MATRIX_TILE_M)
        .constant("DEPTH", STEP),
        Declared::new::<SplitJob>([split_kernel()]).constant("ROWS", ROWS),
        Declared::new::<SumJob>([sum_kernel()]).constant("NONE", NONE).constant("CHUNK", CHUNK),
        Declared::new::<RealJob>(WIDE.iter().map(|&sums| real_kernel(sums)))
            .constant("TILE", REAL_TILE)
            .dtypes(),
    ]
}

/// What products are computed in.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arithmetic<'a> {
    /// f32.
    F32,
    /// f32, where matrix units take the halves of the one A that all jobs multiply by.
    Halves(&'a SplitA),
    /// f32, where matrix units round X to 11 bits.
    Fast,
    /// A wider type.
    Real(Element),
}

impl Arithmetic<'_> {
    /// What gives products of this type.
    pub(super) fn of(element: Element, precision: Precision) -> Self {
        match (element, precision) {
            (Element::F32, Precision::Fast) => Self::Fast,
            (Element::F32, _) => Self::F32,
            _ => Self::Real(element),
        }
    }
}

/// Records the products of activations that lie in some buffers.
pub(super) fn encode(
    commands: &mut Commands<'_>,
    gpu: &Arc<Gpu>,
    x: &[wgpu::BufferBinding<'_>],
    jobs: &[ProjectJob],
    a: &Batch,
    z: wgpu::BufferBinding<'_>,
    arithmetic: Arithmetic<'_>,
) -> Result<()> {
    let (ready, fast) = match arithmetic {
        Arithmetic::F32 => (None, false),
        Arithmetic::Halves(ready) => (Some(ready), false),
        Arithmetic::Fast => (None, true),
        Arithmetic::Real(element) => return encode_real(commands, x, jobs, a, z, element),
    };
    let of_one_x = of_one_x(jobs, a);
    let tables = |most_parts: usize| {
        let mut tables = Tables { ready: ready.map(|ready| ready.job), fast, ..Default::default() };
        of_one_x.iter().for_each(|jobs| tables.add(gpu, jobs, a, most_parts));
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

/// The products that there are, those of one X together.
fn of_one_x<'a>(jobs: &'a [ProjectJob], a: &Batch) -> Vec<Vec<&'a ProjectJob>> {
    let mut places = HashMap::new();
    let mut of_one_x: Vec<Vec<_>> = Vec::new();
    for job in jobs {
        let shape = a.shapes()[job.a];
        if job.tokens == 0 || shape.rows == 0 {
            continue;
        }
        let x = (job.x, job.x_word, job.tokens, shape.cols, job.dtype);
        let place = *places.entry(x).or_insert(of_one_x.len());
        if place == of_one_x.len() {
            of_one_x.push(Vec::new());
        }
        of_one_x[place].push(job);
    }
    of_one_x
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
        let job = tables.split(a, &Tall::new(a, [index].into_iter()), columns);
        let mut commands = gpu.commands();
        let buffers = tables.halves(&mut commands, gpu)?;
        tables.launch_splits(&mut commands, a, &buffers)?;
        commands.submit()?;
        Ok(Some(Self { job, buffers }))
    }

    /// Bytes that this takes for an A of this shape.
    pub(super) fn bytes_for(gpu: &Gpu, a: Shape) -> u64 {
        let halves = |columns| a.rows.next_multiple_of(columns) * a.cols.next_multiple_of(STEP);
        let scales = a.rows.next_multiple_of(SIDE);
        Self::columns(gpu, a).map_or(0, |columns| 4 * (halves(columns) + scales) as u64)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.buffers.iter().map(|buffer| buffer.size()).sum()
    }
}

/// Matrices of A that read one X, as one: each begins a whole matrix of the units further down.
struct Tall {
    /// Each matrix and its first row.
    members: Vec<(usize, usize)>,
    shape: Shape,
}

impl Tall {
    fn new(a: &Batch, indices: impl Iterator<Item = usize>) -> Self {
        let (mut members, mut shape) = (Vec::new(), Shape::new(0, 0));
        for index in indices {
            let first = shape.rows.next_multiple_of(SIDE);
            members.push((index, first));
            shape = Shape::new(first + a.shapes()[index].rows, a.shapes()[index].cols);
        }
        Self { members, shape }
    }
}

/// The tables of the launches that one product takes part in.
#[derive(Default)]
struct Tables {
    /// Where A comes as halves already.
    ready: Option<SplitJob>,
    /// Whether X may be rounded.
    fast: bool,
    splits: Table<SplitJob>,
    /// Where the first of matrices of A that are split as one is in `splits`.
    split: BTreeMap<Vec<usize>, usize>,
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
    /// The job that splits the first rows of A in whole tiles of `columns` rows; jobs for the others follow.
    fn split(&mut self, a: &Batch, tall: &Tall, columns: usize) -> SplitJob {
        let key = tall.members.iter().map(|(index, _)| *index).collect();
        let place = *self.split.entry(key).or_insert(self.splits.0.len());
        if let Some(split) = self.splits.0.get(place) {
            return *split;
        }
        let Shape { rows, cols } = tall.shape;
        let (rows, width) = (rows.next_multiple_of(columns), cols.next_multiple_of(STEP));
        let ends = tall.members.iter().skip(1).map(|(_, first)| *first).chain([rows]);
        for ((index, first), end) in tall.members.iter().zip(ends) {
            let job = self.splits.0.len() as u32;
            self.splits.0.push(SplitJob {
                a: a.offset(*index) as u32,
                halves: (self.halves_len + first * SIDE) as u32,
                scales: (self.scales_len + first) as u32,
                rows: a.shapes()[*index].rows as u32,
                cols: cols as u32,
                width: width as u32,
                matrices: (rows / SIDE) as u32,
            });
            self.splits.1.extend((0..(end - first) as u32).step_by(ROWS).map(|row| [job, row, 0, 0]));
        }
        self.halves_len += rows * width;
        self.scales_len += tall.shape.rows.next_multiple_of(SIDE);
        self.splits.0[place]
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

    /// Adds products of one X.
    fn add(&mut self, gpu: &Gpu, jobs: &[&ProjectJob], a: &Batch, most_parts: usize) {
        let tall = Tall::new(a, jobs.iter().map(|job| job.a));
        let cut = Cut::new(&gpu.capabilities, jobs[0], tall.shape, most_parts);
        if cut.on_units {
            return self.add_on_units(jobs, a, &tall, &cut);
        }
        for job in jobs {
            let shape = a.shapes()[job.a];
            self.add_plain(job, a, shape, &Cut::new(&gpu.capabilities, job, shape, most_parts));
        }
    }

    /// Adds products of one X as one, which passes over X once.
    fn add_on_units(&mut self, jobs: &[&ProjectJob], a: &Batch, tall: &Tall, cut: &Cut) {
        let split = match self.ready {
            Some(ready) => ready,
            None => self.split(a, tall, cut.columns),
        };
        let first = jobs[0];
        let Products { matrix, sums, parts_len, .. } = self.inputs.entry(first.x).or_default();
        let parts = cut.take_parts(parts_len);
        // Values of f16 are in range.
        let mut x_scales = NONE;
        if first.dtype != Dtype::F16 {
            x_scales = *parts_len as u32;
            *parts_len += (cut.parts * first.tokens).next_multiple_of(4);
        }
        for (job, (index, row)) in jobs.iter().zip(&tall.members) {
            let sum =
                SumJob { x_scales, a_scales: split.scales + *row as u32, ..cut.sum(job, a.shapes()[*index]) };
            add_sum(sums, SumJob { parts: parts + *row as u32, ..sum });
        }
        let (table, work) =
            matrix.entry(matrix_kernel(cut.columns as u32, first.dtype, self.fast)).or_default();
        work.extend(cut.work(table.len(), first.tokens, tall.shape));
        let job = Job { a: split.halves, z: parts, ..cut.job(first, tall.shape) };
        table.push(MatrixJob {
            job,
            a_width: split.width,
            a_columns: split.matrices,
            x_scales,
            a_scales: split.scales,
        });
    }

    /// Adds a product without matrix units.
    fn add_plain(&mut self, job: &ProjectJob, a: &Batch, shape: Shape, cut: &Cut) {
        let Products { plain, sums, parts_len, .. } = self.inputs.entry(job.x).or_default();
        let mut z = job.z as u32;
        if cut.is_summed() {
            z = cut.take_parts(parts_len);
            add_sum(sums, SumJob { parts: z, ..cut.sum(job, shape) });
        }
        let kernel = kernel(cut.columns as u32, job.dtype);
        let (table, work) = plain.entry((kernel, !cut.is_summed())).or_default();
        work.extend(cut.work(table.len(), job.tokens, shape));
        table.push(Job { a: a.offset(job.a) as u32, z, ..cut.job(job, shape) });
    }
}

fn add_sum((table, work): &mut Table<SumJob>, job: SumJob) {
    let (index, quads) = (table.len() as u32, job.tokens * job.rank.div_ceil(4));
    work.extend((0..quads).step_by(CHUNK).map(|first| [index, first, 0, 0]));
    table.push(job);
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
