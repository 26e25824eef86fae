use std::sync::Arc;

use rayon::prelude::*;

use super::{cut, mismatch, view_mut};
use crate::Result;
use crate::compute::batch::{OnGpu, Operands, WIDE};
use crate::compute::gpu::{Download, Gpu, Work, whole};
use crate::compute::shaders::{Declared, Kernel, job};
use crate::compute::{Batch, Device, Element, Shape};

/// A matrix that is not safely positive definite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PivotFailure {
    /// The first pivot that was not above `order · ε · A_kk`, or was NaN.
    pub index: usize,
}

/// Batched Cholesky factorisation `A = UᵀU`, in place; U is upper triangular with zeros below.
///
/// `a[i]`: order × order, symmetric; only the upper triangle is read. Computed in the batch's element
/// type (f64 or double-single), with a backward error of about order · ε.
///
/// The result has an entry for each matrix. `Err`: it is singular to working precision, indefinite or not
/// finite; its factor must not be used. The others are not affected.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) if a matrix is not square.
pub fn cholesky(device: &Device, a: &mut Batch) -> Result<Vec<std::result::Result<(), PivotFailure>>> {
    check(a)?;
    if let Operands::Gpu(gpu, [a]) = Operands::of("cholesky", device, [(a, WIDE)])? {
        return submit(gpu, a)?.finish(gpu);
    }
    factorise(a)
}

/// Refuses matrices that are not square.
pub(super) fn check(a: &Batch) -> Result<()> {
    match a.shapes().iter().find(|shape| shape.rows != shape.cols) {
        Some(shape) => Err(mismatch("cholesky", *shape, Shape::new(shape.rows, shape.rows))),
        None => Ok(()),
    }
}

/// Factorises a batch of the host's.
pub(super) fn factorise(a: &mut Batch) -> Result<Vec<std::result::Result<(), PivotFailure>>> {
    let orders: Vec<_> = a.shapes().iter().map(|s| s.rows).collect();
    Ok(a.host_mut()?.into_par_iter().zip(orders).map(|(a, n)| cholesky_cpu(a, n)).collect())
}

/// How each factorisation of a launch went, on its way to the host.
pub(super) struct Status(Option<Download>);

impl Status {
    /// Waits for it.
    pub fn finish(self, gpu: &Gpu) -> Result<Vec<std::result::Result<(), PivotFailure>>> {
        let Some(download) = self.0 else { return Ok(Vec::new()) };
        let codes: Vec<u32> = download.finish(gpu, bytemuck::pod_collect_to_vec)?;
        let of = |code: u32| match code.checked_sub(1) {
            None => Ok(()),
            Some(index) => Err(PivotFailure { index: index as usize }),
        };
        Ok(codes.into_iter().map(of).collect())
    }
}

/// Submits the factorisation of a batch on a GPU.
pub(super) fn submit(gpu: &Arc<Gpu>, a: OnGpu<'_>) -> Result<Status> {
    let orders: Vec<_> = a.shapes().iter().map(|s| s.rows).collect();
    let table: Vec<_> =
        orders.iter().enumerate().map(|(i, &n)| Job { matrix: a.offset(i), order: n as u32 }).collect();
    let ranges: Vec<_> = orders.iter().map(|&n| cut(panel_costs(n))).collect();
    let bytes = table.len() as u64 * 4;
    if table.is_empty() {
        return Ok(Status(None));
    }
    let codes = gpu.scratch(bytes)?;
    let mut commands = gpu.commands();
    for launch in 0..ranges.iter().map(Vec::len).max().unwrap_or(0) {
        let work: Vec<Work> = (0..)
            .zip(&ranges)
            .filter_map(|(i, ranges)| ranges.get(launch).map(|range| [i, range.start, range.end, 0]))
            .collect();
        commands.launch(kernel(a.element()), &table, &work, &[a.binding(), whole(&codes)])?;
    }
    commands.submit()?;
    Ok(Status(Some(gpu.start_read(&codes, 0..bytes))))
}

/// Columns that a workgroup makes at a time.
const THREADS: usize = 128;
/// Rows or columns of a panel, as shaders/shared/strip.wgsl has them.
pub(super) const PANEL: usize = 16;

/// Loop iterations of an invocation for each panel of rows, at most, as the shader makes them.
fn panel_costs(n: usize) -> impl Iterator<Item = usize> {
    // A matrix without rows has a panel too, so that its status is written.
    (0..n.div_ceil(PANEL).max(1)).map(move |panel| {
        let above = panel * PANEL;
        let tiles = n.saturating_sub(above).div_ceil(THREADS);
        // A thread makes so many elements of the block on the diagonal.
        let elements = (PANEL * PANEL).div_ceil(THREADS);
        // In each tile, finished rows to copy, block by block, and to subtract, by fours, and substitution; once the
        // block on the diagonal, and zeros left of it.
        tiles * (panel * elements + above * 4 / 3 + 30) + PANEL + elements * (PANEL + 1 + panel)
    })
}

job! {
    pub(crate) struct Job {
        pub matrix: u32,
        pub order: u32,
    }
}

pub(crate) fn kernel(element: Element) -> Kernel {
    Kernel::new("cholesky").real(element)
}

pub(super) fn declared() -> Declared {
    Declared::new::<Job>(WIDE.iter().map(|&element| kernel(element)))
        .constant("THREADS", THREADS)
        .constant("PANEL", PANEL)
}

/// The CPU twin for one matrix.
fn cholesky_cpu(a: &mut [f64], n: usize) -> std::result::Result<(), PivotFailure> {
    use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
    if n == 0 {
        return Ok(());
    }
    let diagonal: Vec<f64> = (0..n).map(|i| a[i * n + i]).collect();
    // Row-major upper is column-major lower: view the transpose, and UᵀU is its LLᵀ.
    let lower = view_mut(a, Shape::new(n, n)).transpose_mut();
    let par = faer::Par::Seq;
    let mut memory =
        faer::dyn_stack::MemBuffer::new(cholesky_in_place_scratch::<f64>(n, par, Default::default()));
    let stack = faer::dyn_stack::MemStack::new(&mut memory);
    let factored = cholesky_in_place(lower, Default::default(), par, stack, Default::default())
        .map_or_else(|LltError::NonPositivePivot { index }| index, |_| n);
    for i in 0..factored {
        let pivot = a[i * n + i] * a[i * n + i];
        let least = n as f64 * f64::EPSILON * diagonal[i];
        if pivot.is_nan() || pivot <= least {
            return Err(PivotFailure { index: i });
        }
        a[i * n..i * n + i].fill(0.0);
    }
    match factored == n {
        true => Ok(()),
        false => Err(PivotFailure { index: factored }),
    }
}
