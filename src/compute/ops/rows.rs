use std::sync::Arc;

use rayon::prelude::*;

use super::dtype_code;
use crate::compute::gpu::{Gpu, Work, whole};
use crate::compute::shaders::{Declared, Kernel, job};
use crate::compute::{Batch, Device, Element, Shape};
use crate::power::{exponent_of, pow2};
use crate::{Dtype, Error, Matrix, RawMatrix, Result};

/// Factors as rows, each row scaled by a power of two to magnitude 1, which rounds nothing.
///
/// Row k of the matrix is `2^exponents[i][k]` times row k of `rows[i]`.
#[derive(Debug)]
pub struct ScaledRows {
    /// rank × width, of [`Device::factor`].
    pub rows: Batch,
    /// One for each row.
    pub exponents: Vec<Vec<i32>>,
}

/// Which way factors lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A: rank × in, rows as they are.
    Input,
    /// B: out × rank, whose columns become rows.
    Output,
}

/// The side of a tile, and how many of them a workgroup copies.
const TILE: usize = 32;
const TILES: usize = 4;

pub(super) fn kernel() -> Kernel {
    Kernel::new("rows")
}

pub(super) fn declared() -> Declared {
    Declared::new::<Job>([kernel()]).constant("TILE", TILE).constant("TILES", TILES).dtypes()
}

/// Bytes that are uploaded at once, at most.
const UPLOAD: u64 = 128 << 20;

impl ScaledRows {
    /// One matrix of each list of factors, stacked: `[A_1; …; A_K]`, or `[B_1 … B_K]ᵀ`.
    ///
    /// Factors are widened, transposed and scaled on the device; magnitudes are found on the host.
    ///
    /// # Errors
    /// [`Error::Invalid`] if stacked factors differ in width; [`Error::Device`] if a batch is more than the device
    /// binds at once.
    pub fn new(device: &Device, side: Side, stacks: &[Vec<RawMatrix<'_>>]) -> Result<Self> {
        let shapes = stacks.iter().map(|parts| stacked_shape(side, parts)).collect::<Result<Vec<_>>>()?;
        let mut rows = Batch::unwritten(device, device.factor(), &shapes)?;
        let exponents = match device.is_gpu() {
            true => rows_gpu(device.gpu()?, side, stacks, &rows)?,
            false => rows
                .host_mut()?
                .into_par_iter()
                .zip(stacks)
                .map(|(out, parts)| {
                    let exponents: Vec<i32> = parts.iter().flat_map(|part| exponents(side, *part)).collect();
                    rows_cpu(side, parts, &exponents, out);
                    exponents
                })
                .collect(),
        };
        Ok(Self { rows, exponents })
    }

    /// [`new`](Self::new) for matrices in f64, which a GPU rounds to f32 once they are scaled.
    pub(crate) fn from_matrices(device: &Device, mut matrices: Vec<Matrix>) -> Result<Self> {
        let exponents = matrices
            .par_iter_mut()
            .map(|m| m.data.chunks_exact_mut(m.cols.max(1)).map(normalise).collect())
            .collect();
        Ok(Self { rows: Batch::upload(device, device.factor(), &matrices)?, exponents })
    }

    /// Rows that were made in full size, which stay where they are on a GPU that factors small matrices itself: there
    /// [`qr`](super::qr) brings their Gram matrices to one size.
    pub(crate) fn of(device: &Device, rows: Batch) -> Result<Self> {
        if device.sum() == Element::Host {
            return Self::from_matrices(device, rows.download(device)?);
        }
        let exponents = rows.shapes().iter().map(|shape| vec![0; shape.rows]).collect();
        Ok(Self { rows, exponents })
    }

    /// Some of the matrices, in this order.
    pub fn select(&self, indices: &[usize]) -> Self {
        Self {
            rows: self.rows.select(indices),
            exponents: indices.iter().map(|&i| self.exponents[i].clone()).collect(),
        }
    }

    /// `m`, which stands for the scaled rows of matrix i, with their scales.
    pub fn unscale(&self, i: usize, mut m: Matrix) -> Matrix {
        for (row, &e) in m.data.chunks_exact_mut(m.cols.max(1)).zip(&self.exponents[i]) {
            row.iter_mut().for_each(|v| *v *= pow2(e));
        }
        m
    }
}

/// Scales a row so that its largest magnitude lies in [1, 2); gives the exponent that was taken out.
fn normalise(row: &mut [f64]) -> i32 {
    let e = exponent_of(row.iter().fold(0.0, |max, v| v.abs().max(max)));
    row.iter_mut().for_each(|v| *v *= pow2(-e));
    e
}

pub(super) fn stacked_shape(side: Side, parts: &[RawMatrix<'_>]) -> Result<Shape> {
    let mut shape = Shape::new(0, 0);
    for (i, part) in parts.iter().enumerate() {
        let (rank, width) = match side {
            Side::Input => (part.rows(), part.cols()),
            Side::Output => (part.cols(), part.rows()),
        };
        if i > 0 && shape.cols != width {
            return Err(Error::Invalid(format!(
                "factors of widths {} and {width} cannot be stacked",
                shape.cols
            )));
        }
        shape = Shape::new(shape.rows.saturating_add(rank), width);
    }
    Ok(shape)
}

/// The exponent of the largest magnitude of each rank, as far as its inverse is a normal f32.
fn exponents(side: Side, part: RawMatrix<'_>) -> Vec<i32> {
    // Without the sign, magnitudes are ordered as their bits are.
    let largest: Vec<f32> = match part.dtype() {
        Dtype::F32 => largest(side, part, u32::from_le_bytes, 0x7fff_ffff, f32::from_bits),
        Dtype::F16 => largest(side, part, u16::from_le_bytes, 0x7fff, |v| half::f16::from_bits(v).to_f32()),
        Dtype::Bf16 => largest(side, part, u16::from_le_bytes, 0x7fff, |v| half::bf16::from_bits(v).to_f32()),
    };
    largest.into_iter().map(|v| exponent_of(f64::from(v)).clamp(-126, 126)).collect()
}

fn largest<T, const N: usize>(
    side: Side,
    part: RawMatrix<'_>,
    read: impl Fn([u8; N]) -> T,
    mask: T,
    value: impl Fn(T) -> f32,
) -> Vec<f32>
where
    T: Copy + Ord + Default + std::ops::BitAnd<Output = T>,
{
    let (values, _) = part.bytes().as_chunks::<N>();
    let bits: Vec<T> = match side {
        Side::Input => {
            let row = |row: &[[u8; N]]| row.iter().fold(T::default(), |max, &v| max.max(read(v) & mask));
            (0..part.rows()).map(|k| row(&values[k * part.cols()..][..part.cols()])).collect()
        }
        Side::Output => {
            // Rows of a low rank are looked at some together, many values at a time.
            let cols = part.cols().max(1);
            let mut all = vec![T::default(); cols * 256usize.div_ceil(cols)];
            for rows in values.chunks(all.len()) {
                for (max, &v) in all.iter_mut().zip(rows) {
                    *max = (*max).max(read(v) & mask);
                }
            }
            let (first, rest) = all.split_at_mut(cols);
            for row in rest.chunks_exact(cols) {
                first.iter_mut().zip(row).for_each(|(max, v)| *max = (*max).max(*v));
            }
            all.truncate(part.cols());
            all
        }
    };
    bits.into_iter().map(value).collect()
}

/// The CPU twin for one stack.
fn rows_cpu(side: Side, parts: &[RawMatrix<'_>], exponents: &[i32], out: &mut [f64]) {
    let mut first = 0;
    for part in parts {
        let values: Vec<f64> = part.to_vec();
        let (rank, width) = match side {
            Side::Input => (part.rows(), part.cols()),
            Side::Output => (part.cols(), part.rows()),
        };
        let out = &mut out[first * width..(first + rank) * width];
        match side {
            Side::Input => out.copy_from_slice(&values),
            // Rows are turned in blocks that fit a cache.
            Side::Output => {
                for block in (0..width).step_by(64) {
                    for k in 0..rank {
                        for i in block..(block + 64).min(width) {
                            out[k * width + i] = values[i * rank + k];
                        }
                    }
                }
            }
        }
        for (row, e) in out.chunks_exact_mut(width.max(1)).zip(&exponents[first..]) {
            row.iter_mut().for_each(|v| *v *= pow2(-e));
        }
        first += rank;
    }
}

job! {
    struct Job {
        source: u32,
        dtype: u32,
        rows: u32,
        cols: u32,
        transposed: u32,
        destination: u32,
        scales: u32,
    }
}

/// Factors that go up together.
#[derive(Default)]
struct Upload<'a> {
    /// The factors, each with its place.
    pieces: Vec<(usize, RawMatrix<'a>)>,
    jobs: Vec<Job>,
    bytes: usize,
}

/// Widens, transposes and scales on the device; gives the exponents.
fn rows_gpu(
    gpu: &Arc<Gpu>,
    side: Side,
    stacks: &[Vec<RawMatrix<'_>>],
    rows: &Batch,
) -> Result<Vec<Vec<i32>>> {
    let ranks: usize = rows.shapes().iter().map(|shape| shape.rows).sum();
    let scale_buffer = gpu.scratch(ranks as u64 * 4)?;
    // The exponents of all rows so far.
    let mut all: Vec<i32> = Vec::with_capacity(ranks);
    // Factors go up in groups that one binding holds; one of B as a whole.
    let largest = stacks.iter().flatten().map(|part| part.bytes().len()).max().unwrap_or(0);
    let limit = match side {
        Side::Input => gpu.source_limit(UPLOAD) as usize,
        Side::Output => (gpu.source_limit(UPLOAD) as usize).max(largest).min(gpu.max_arena() as usize),
    };
    let mut upload = Upload::default();
    let mut flush = |upload: &mut Upload<'_>| -> Result<()> {
        let Upload { pieces, jobs, bytes } = std::mem::take(upload);
        if jobs.is_empty() {
            return Ok(());
        }
        let source = gpu.scratch(bytes as u64)?;
        let places: Vec<_> = pieces.iter().map(|(place, piece)| (*place, piece.bytes())).collect();
        // While one thread waits for the bus, the others find magnitudes.
        let (written, found) = rayon::join(
            || gpu.write_pieces(&source, &places),
            || pieces.par_iter().map(|(_, piece)| exponents(side, *piece)).collect::<Vec<_>>(),
        );
        written?;
        let start = all.len();
        all.extend(found.into_iter().flatten());
        let scales: Vec<f32> = all[start..].iter().map(|&e| pow2(-e) as f32).collect();
        gpu.write(&scale_buffer, start as u64 * 4, bytemuck::cast_slice(&scales))?;
        // Tiles follow each other along the rows of the target.
        let [along_rows, along_cols] =
            if side == Side::Output { [TILES * TILE, TILE] } else { [TILE, TILES * TILE] };
        let tiles = |(i, job): (u32, &Job)| {
            let columns = (0..job.cols).step_by(along_cols);
            let rows = (0..job.rows).step_by(along_rows);
            rows.flat_map(move |row| columns.clone().map(move |column| [i, row, column, 0]))
        };
        let work: Vec<Work> = (0..).zip(jobs.iter()).flat_map(tiles).collect();
        let mut commands = gpu.commands();
        let buffers = [whole(&source), whole(&scale_buffer), rows.binding()?];
        commands.launch(kernel(), &jobs, &work, &buffers)?;
        commands.submit()
    };
    let mut scale = 0;
    for (i, parts) in stacks.iter().enumerate() {
        let mut destination = rows.offset(i);
        for part in parts {
            // What one binding does not hold goes in pieces: rows of A, or of B with all of its columns.
            let at_once = (limit / (part.cols() * part.dtype().size()).max(1)).max(1);
            for first in (0..part.rows().max(1)).step_by(at_once) {
                let piece = part.row_range(first, (first + at_once).min(part.rows()));
                if upload.bytes > 0 && upload.bytes + piece.bytes().len() > limit {
                    flush(&mut upload)?;
                }
                if side == Side::Output && piece.rows() < part.rows() {
                    return Err(Error::Device(format!(
                        "a factor of {} x {} is more than {limit} bytes, which are uploaded at once",
                        part.rows(),
                        part.cols()
                    )));
                }
                upload.jobs.push(Job {
                    source: (upload.bytes / 4) as u32,
                    dtype: dtype_code(piece.dtype()),
                    rows: piece.rows() as u32,
                    cols: piece.cols() as u32,
                    transposed: u32::from(side == Side::Output),
                    destination: (destination + first * part.cols()) as u32,
                    scales: scale as u32,
                });
                scale += if side == Side::Input { piece.rows() } else { piece.cols() };
                upload.pieces.push((upload.bytes, piece));
                upload.bytes = (upload.bytes + piece.bytes().len()).next_multiple_of(4);
            }
            destination += part.rows() * part.cols();
        }
    }
    flush(&mut upload)?;
    let mut all = all.into_iter();
    Ok(rows.shapes().iter().map(|shape| all.by_ref().take(shape.rows).collect()).collect())
}
