use std::sync::Arc;

use super::dtype_code;
use crate::compute::gpu::{Gpu, whole};
use crate::compute::shaders::{Declared, Kernel, job};
use crate::compute::{Batch, Device, Shape};
use crate::{Error, RawMatrix, Result};

/// Along which axis ranks lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// A: r × in, stacked below each other.
    Rows,
    /// B: out × r, side by side.
    Columns,
}

/// One factor of an adapter, and what to multiply it by.
#[derive(Clone, Copy, Debug)]
pub struct Factor<'a> {
    /// The factor.
    pub matrix: RawMatrix<'a>,
    /// The adapter's scale times the user's strength on B; 1 on A.
    pub scale: f32,
}

impl<'a> Factor<'a> {
    /// A factor as it is.
    pub fn new(matrix: RawMatrix<'a>) -> Self {
        Self { matrix, scale: 1.0 }
    }
}

/// Rank concatenation: the factors of several adapters in one matrix.
///
/// `A_cat = [A_1; …; A_K]` (R × in) with [`Axis::Rows`], `B_cat = [s_1·B_1 … s_K·B_K]` (out × R) with
/// [`Axis::Columns`], so that `B_cat·A_cat = Σ s_k·B_k·A_k` exactly. One result for each entry of `jobs`.
///
/// f16 and bf16 widen exactly; the product with a scale is rounded once, to f32 on a GPU.
///
/// # Errors
/// [`Error::Invalid`] if the factors of one job differ in their other dimension.
pub fn rank_concat(device: &Device, axis: Axis, jobs: &[&[Factor]]) -> Result<Batch> {
    let shapes = jobs.iter().map(|factors| joined_shape(axis, factors)).collect::<Result<Vec<_>>>()?;
    if !device.is_gpu() {
        return Batch::made_on_host(&shapes, |i, out| rank_concat_cpu(axis, jobs[i], shapes[i], out));
    }
    let joined = Batch::unwritten(device, device.factor(), &shapes)?;
    rank_concat_gpu(device.gpu()?, axis, jobs, &joined)?;
    Ok(joined)
}

fn joined_shape(axis: Axis, factors: &[Factor]) -> Result<Shape> {
    let mut shape = Shape::new(0, 0);
    for (i, factor) in factors.iter().enumerate() {
        let (rows, cols) = (factor.matrix.rows(), factor.matrix.cols());
        let (rank, other, known) = match axis {
            Axis::Rows => (&mut shape.rows, cols, &mut shape.cols),
            Axis::Columns => (&mut shape.cols, rows, &mut shape.rows),
        };
        if i > 0 && *known != other {
            return Err(Error::Invalid(format!("factors of widths {known} and {other} cannot be joined")));
        }
        *known = other;
        *rank = rank.saturating_add(if axis == Axis::Rows { rows } else { cols });
    }
    Ok(shape)
}

/// Where factor after factor starts, and the row stride, in elements of the joined matrix.
fn places<'a>(axis: Axis, factors: &'a [Factor], shape: Shape) -> impl Iterator<Item = usize> + 'a {
    let mut next = 0;
    factors.iter().map(move |factor| {
        let place = next;
        next += match axis {
            Axis::Rows => factor.matrix.rows() * shape.cols,
            Axis::Columns => factor.matrix.cols(),
        };
        place
    })
}

fn rank_concat_cpu(axis: Axis, factors: &[Factor], shape: Shape, out: &mut [f64]) {
    for (factor, place) in factors.iter().zip(places(axis, factors, shape)) {
        let mut row = vec![0.0; factor.matrix.cols()];
        for i in 0..factor.matrix.rows() {
            factor.matrix.row_range(i, i + 1).widen_into(&mut row);
            let start = place + i * shape.cols;
            for (o, v) in out[start..start + row.len()].iter_mut().zip(&row) {
                *o = v * f64::from(factor.scale);
            }
        }
    }
}

job! {
    struct Job {
        source: u32,
        dtype: u32,
        rows: u32,
        cols: u32,
        destination: u32,
        stride: u32,
        scale: f32,
    }
}

/// Elements that a workgroup copies.
const CHUNK: usize = 4096;

fn kernel() -> Kernel {
    Kernel::new("rank_concat")
}

pub(super) fn declared() -> Declared {
    Declared::new::<Job>([kernel()]).constant("CHUNK", CHUNK).dtypes()
}

fn rank_concat_gpu(gpu: &Arc<Gpu>, axis: Axis, jobs: &[&[Factor]], joined: &Batch) -> Result<()> {
    // Factors go up in groups that one binding holds.
    let limit = gpu.source_limit(64 << 20) as usize;
    let mut pieces: Vec<(usize, &[u8])> = Vec::new();
    let mut table: Vec<Job> = Vec::new();
    let mut bytes = 0;
    let flush = |bytes: usize, pieces: &mut Vec<(usize, &[u8])>, table: &mut Vec<Job>| -> Result<()> {
        if table.is_empty() {
            return Ok(());
        }
        let source = gpu.scratch(bytes as u64)?;
        gpu.write_pieces(&source, pieces)?;
        let work: Vec<_> = table
            .iter()
            .enumerate()
            .flat_map(|(i, job)| {
                let len = job.rows * job.cols;
                (0..len).step_by(CHUNK).map(move |first| [i as u32, first, 0, 0])
            })
            .collect();
        let mut commands = gpu.commands();
        commands.launch(kernel(), table, &work, &[whole(&source), joined.binding()?])?;
        commands.submit()?;
        pieces.clear();
        table.clear();
        Ok(())
    };
    for (i, factors) in jobs.iter().enumerate() {
        let shape = joined.shapes()[i];
        for (factor, place) in factors.iter().zip(places(axis, factors, shape)) {
            let rows_at_once = (limit / (factor.matrix.cols() * factor.matrix.dtype().size()).max(1)).max(1);
            for first in (0..factor.matrix.rows()).step_by(rows_at_once) {
                let last = (first + rows_at_once).min(factor.matrix.rows());
                let piece = factor.matrix.row_range(first, last);
                if bytes > 0 && bytes + piece.bytes().len() > limit {
                    flush(bytes, &mut pieces, &mut table)?;
                    bytes = 0;
                }
                table.push(Job {
                    source: (bytes / 4) as u32,
                    dtype: dtype_code(piece.dtype()),
                    rows: piece.rows() as u32,
                    cols: piece.cols() as u32,
                    destination: (joined.offset(i) + place + first * shape.cols) as u32,
                    stride: shape.cols as u32,
                    scale: factor.scale,
                });
                pieces.push((bytes, piece.bytes()));
                bytes += piece.bytes().len().next_multiple_of(4);
            }
        }
    }
    flush(bytes, &mut pieces, &mut table)
}
