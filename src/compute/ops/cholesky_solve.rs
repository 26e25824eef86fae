use rayon::prelude::*;

use super::cholesky::{self, PANEL, PivotFailure};
use super::{cut, mismatch, same_count, view_mut};
use crate::compute::batch::{OnGpu, Operands, WIDE};
use crate::compute::gpu::{Gpu, Work};
use crate::compute::shaders::{Declared, Kernel, job};
use crate::compute::{Batch, Device, Element, Shape};
use crate::{Error, Result};

/// Solves `X·UᵀU = Q` for X, in place of Q, with factors of `cholesky`.
///
/// `factors[i]`: order × order upper triangular, `q[i]`: rows × order, a right-hand side a row. Both of one
/// element type. Residual `‖X·A − Q‖ / (‖X‖·‖A‖ + ‖Q‖)` at most 1e-12 in f64 and 1e-10 in double-single.
///
/// # Errors
/// [`Error::Invalid`] if shapes or element types differ.
pub fn cholesky_solve(device: &Device, factors: &Batch, q: &mut Batch) -> Result<()> {
    check(factors, q)?;
    match Operands::of("cholesky_solve", device, [(factors, WIDE), (q, WIDE)])? {
        Operands::Gpu(gpu, [factors, q]) => submit(gpu, factors, q),
        Operands::Host(_) => substitute(factors, q),
    }
}

/// Solves `X·A = Q` for X, in place of Q: `cholesky` and [`cholesky_solve`], without a wait between
/// them.
///
/// `a[i]`: order × order, symmetric, which its factor takes the place of; `q[i]`: rows × order. The result has an entry for
/// each matrix, as that of `cholesky`; where it is an `Err`, X must not be used.
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
    if let Operands::Gpu(gpu, [a, q]) = Operands::of("solve", device, [(a, WIDE), (q, WIDE)])? {
        let status = cholesky::submit(gpu, a)?;
        submit(gpu, a, q)?;
        return status.finish(gpu);
    }
    let status = cholesky::factorise(a)?;
    substitute(a, q)?;
    Ok(status)
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

/// Solves with batches of the host's.
fn substitute(factors: &Batch, q: &mut Batch) -> Result<()> {
    let shapes = q.shapes().to_vec();
    let factors = factors.host()?;
    q.host_mut()?.into_par_iter().zip(shapes).enumerate().for_each(|(i, (q, shape))| {
        cholesky_solve_cpu(factors.matrix(i), q, shape);
    });
    Ok(())
}

/// Submits the solution of a batch on a GPU.
fn submit(gpu: &Gpu, factors: OnGpu<'_>, q: OnGpu<'_>) -> Result<()> {
    let shapes = q.shapes();
    let table: Vec<_> = (0..shapes.len())
        .map(|i| Job {
            factor: factors.offset(i),
            order: shapes[i].cols as u32,
            right: q.offset(i),
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
        commands.launch(kernel(q.element()), &table, &work, &[factors.binding(), q.binding()])?;
    }
    commands.submit()
}

/// Right-hand sides of a workgroup.
const ROWS: u32 = 64;

fn kernel(element: Element) -> Kernel {
    Kernel::new("cholesky_solve").real(element)
}

pub(super) fn declared() -> Declared {
    Declared::new::<Job>(WIDE.iter().map(|&element| kernel(element)))
        .constant("ROWS", ROWS)
        .constant("PANEL", PANEL)
}

/// Loop iterations of an invocation for each panel of two strips, forwards and then backwards, as the shader makes them.
fn step_costs(n: usize) -> impl Iterator<Item = usize> {
    // For each 16 solved columns 16 products; as much within the panel, which in two halves is substituted and stored.
    (0..2).flat_map(move |_| (0..n.div_ceil(2 * PANEL)).map(|solved| solved * 34 + 110))
}

job! {
    struct Job {
        factor: u32,
        order: u32,
        right: u32,
        rows: u32,
    }
}

/// The CPU twin for one matrix.
fn cholesky_solve_cpu(u: faer::MatRef<'_, f64>, q: &mut [f64], shape: Shape) {
    use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
    if shape.is_empty() {
        return;
    }
    // X·UᵀU = Q is UᵀU·Xᵀ = Qᵀ.
    let mut right = view_mut(q, shape).transpose_mut();
    solve_lower_triangular_in_place(u.transpose(), right.as_mut(), faer::Par::Seq);
    solve_upper_triangular_in_place(u, right, faer::Par::Seq);
}
