use bytemuck::NoUninit;
use rayon::prelude::*;

use super::cholesky::{self, PivotFailure};
use super::{cut, mismatch, same_count, view, view_mut};
use crate::compute::gpu::{Gpu, Work, whole};
use crate::compute::shaders::Kernel;
use crate::compute::{Batch, Device, Element, Shape};
use crate::{Error, Result};

/// Solves `X·UᵀU = Q` for X, in place of Q, with factors of [`cholesky`](super::cholesky).
///
/// `factors[i]`: order × order upper triangular, `q[i]`: rows × order, a right-hand side a row. Both of one
/// element type. Residual `‖X·A − Q‖ / (‖X‖·‖A‖ + ‖Q‖)` at most 1e-12 in f64 and 1e-10 in double-single.
///
/// # Errors
/// [`Error::Invalid`] if shapes or element types differ.
pub fn cholesky_solve(device: &Device, factors: &Batch, q: &mut Batch) -> Result<()> {
    check(factors, q)?;
    if q.element() == Element::Host {
        substitute(factors, q);
        return Ok(());
    }
    submit(device.gpu()?, factors, q)
}

/// Solves `X·A = Q` for X, in place of Q: [`cholesky`](super::cholesky) and [`cholesky_solve`], without a wait between
/// them.
///
/// `a[i]`: order × order, symmetric, which its factor takes the place of; `q[i]`: rows × order. The result has an entry for
/// each matrix, as that of [`cholesky`](super::cholesky); where it is an `Err`, X must not be used.
///
/// # Errors
/// [`Error::Invalid`] if a matrix is not square, or shapes or element types do not go together.
pub fn solve(
    device: &Device,
    a: &mut Batch,
    q: &mut Batch,
) -> Result<Vec<std::result::Result<(), PivotFailure>>> {
    cholesky::check(a)?;
    check(a, q)?;
    if q.element() == Element::Host {
        let status = cholesky::factorise(a);
        substitute(a, q);
        return Ok(status);
    }
    let gpu = device.gpu()?;
    let status = cholesky::submit(gpu, a)?;
    submit(gpu, a, q)?;
    status.finish(gpu)
}

fn check(factors: &Batch, q: &Batch) -> Result<()> {
    same_count("cholesky_solve", factors, q)?;
    if factors.element() != q.element() {
        return Err(Error::Invalid(format!(
            "cholesky_solve: factors of {:?} do not go with right-hand sides of {:?}",
            factors.element(),
            q.element()
        )));
    }
    for (factor, q) in factors.shapes().iter().zip(q.shapes()) {
        if factor.rows != factor.cols || factor.cols != q.cols {
            return Err(mismatch("cholesky_solve", *factor, *q));
        }
    }
    Ok(())
}

/// Batches of the host's.
fn substitute(factors: &Batch, q: &mut Batch) {
    let shapes = q.shapes().to_vec();
    let right = q.host_mut().unwrap_or_default();
    right.into_par_iter().zip(shapes).enumerate().for_each(|(i, (q, shape))| {
        cholesky_solve_cpu(factors.host(i).unwrap_or_default(), q, shape);
    });
}

/// Submits the solution of a batch on a GPU.
fn submit(gpu: &Gpu, factors: &Batch, q: &Batch) -> Result<()> {
    let shapes = q.shapes();
    let table: Vec<_> = (0..q.len())
        .map(|i| Job {
            factor: factors.offset(i) as u32,
            order: shapes[i].cols as u32,
            right: q.offset(i) as u32,
            rows: shapes[i].rows as u32,
        })
        .collect();
    let ranges: Vec<_> = shapes.iter().map(|shape| cut(step_costs(shape.cols))).collect();
    let mut commands = gpu.commands();
    for launch in 0..ranges.iter().map(Vec::len).max().unwrap_or(0) {
        let work: Vec<Work> = (0..)
            .zip(&ranges)
            .zip(&table)
            .filter_map(|((i, ranges), job)| {
                ranges.get(launch).map(|range| (i, range, job.rows.div_ceil(ROWS)))
            })
            .flat_map(|(i, range, blocks)| (0..blocks).map(move |block| [i, block, range.start, range.end]))
            .collect();
        let buffers = [whole(factors.buffer()?), whole(q.buffer()?)];
        commands.launch(Kernel::CholeskySolve(q.element()), &table, &work, &buffers);
    }
    commands.submit()
}

/// Right-hand sides of a workgroup, as in the shader.
const ROWS: u32 = 64;

/// Loop iterations of an invocation for each panel of 32 columns, forwards and then backwards, as the shader makes them.
fn step_costs(n: usize) -> impl Iterator<Item = usize> {
    // For each 16 solved columns 16 products; as much within the panel, which in two halves is substituted and stored.
    (0..2).flat_map(move |_| (0..n.div_ceil(32)).map(|solved| solved * 34 + 110))
}

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Job {
    factor: u32,
    order: u32,
    right: u32,
    rows: u32,
}

/// The CPU twin for one matrix.
fn cholesky_solve_cpu(factor: &[f64], q: &mut [f64], shape: Shape) {
    use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
    if shape.is_empty() {
        return;
    }
    let u = view(factor, Shape::new(shape.cols, shape.cols));
    // X·UᵀU = Q is UᵀU·Xᵀ = Qᵀ.
    let mut right = view_mut(q, shape).transpose_mut();
    solve_lower_triangular_in_place(u.transpose(), right.as_mut(), faer::Par::Seq);
    solve_upper_triangular_in_place(u, right, faer::Par::Seq);
}
