use rayon::prelude::*;

use super::{cut, mismatch, view};
use crate::compute::batch::WIDE;
use crate::compute::gpu::Work;
use crate::compute::shaders::{Declared, Kernel, job};
use crate::compute::{Batch, Device, Element, Shape};
use crate::power::{exponent_of, pow2};
use crate::{Matrix, Result};

/// A singular value decomposition `A = U·diag(σ)·Vᵀ` of a square matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Svd {
    /// Uᵀ: row i is the left singular vector u_i. Its entry of largest magnitude (the first of equals) is positive.
    /// All rows are orthonormal.
    pub left: Matrix,
    /// Singular values, descending.
    pub values: Vec<f64>,
    /// Vᵀ: row i is the right singular vector v_i; zero where σ_i is 0.
    pub right: Matrix,
    /// Whether all rows became orthogonal. If not, or if a value is not finite, the rest must not be used.
    pub converged: bool,
}

/// Batched one-sided Jacobi SVD of small square matrices.
///
/// `a[i]`: order × order, of any finite scale: each is first scaled by a power of two. Computed in the device's tier,
/// f64 or double-single. Rows of J·A are made orthogonal to `ε·(4 + √order)`, ε = 2.2e-16 or 1e-13, so singular values
/// have about this error relative to σ_1 and, where A = D·B with D diagonal and B well-conditioned, to themselves.
/// What is below 1e-27·σ_1 (double-single: 1e-19·σ_1) is zero.
///
/// Vectors of equal singular values, and so of zero, are some basis of their space. Results are the same bits in every
/// run. On the CPU, faer's SVD by divide and conquer, whose errors are relative to σ_1; rows and columns of zeros at the end
/// add nothing to its work.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) if a matrix is not square; [`Error::Device`](crate::Error::Device).
pub fn jacobi_svd(device: &Device, a: &[Matrix]) -> Result<Vec<Svd>> {
    if let Some(a) = a.iter().find(|a| a.rows != a.cols) {
        return Err(mismatch("jacobi_svd", Shape::new(a.rows, a.cols), Shape::new(a.rows, a.rows)));
    }
    if device.sum() == Element::Host {
        return Ok(a.par_iter().map(jacobi_svd_cpu).collect());
    }
    // A group fills one arena at most.
    let arena = (device.gpu()?.max_arena() / 8) as usize;
    let mut all = Vec::with_capacity(a.len());
    let mut rest = a;
    while !rest.is_empty() {
        let mut used = 0;
        let fits = rest.iter().take_while(|a| {
            used += beside(a.rows).len().next_multiple_of(4);
            used <= arena
        });
        let (group, tail) = rest.split_at(fits.count().max(1));
        all.extend(jacobi_svd_gpu(device, group)?);
        rest = tail;
    }
    Ok(all)
}

/// Random matrices take 6 to 12 sweeps.
const MAX_SWEEPS: usize = 40;
/// Largest magnitudes are brought here, so that squares of small ones do not underflow in f32 pairs.
const TARGET: i32 = 30;

/// Pairs of rows that a workgroup turns at a time, and its threads for each of them.
const PAIRS: usize = 32;
const LANES: usize = 8;

job! {
    struct Job {
        rows: u32,
        order: u32,
        rounds: u32,
        floor: f32,
        tolerance: f32,
    }
}

pub(super) fn kernel(element: Element) -> Kernel {
    Kernel::new("jacobi_svd").real(element)
}

pub(super) fn declared() -> Declared {
    Declared::new::<Job>(WIDE.iter().map(|&element| kernel(element)))
        .constant("PAIRS", PAIRS)
        .constant("LANES", LANES)
}

fn jacobi_svd_gpu(device: &Device, a: &[Matrix]) -> Result<Vec<Svd>> {
    let gpu = device.gpu()?;
    let element = device.sum();
    let (epsilon, floor) = match element {
        Element::DoubleSingle => (1e-13, 1e-20),
        _ => (f64::EPSILON, 1e-36),
    };
    let scales: Vec<i32> = a.par_iter().map(|a| TARGET - exponent_of(largest(a))).collect();
    let rows: Vec<Matrix> = a.par_iter().zip(&scales).map(|(a, &e)| with_rotations(&scaled(a, e))).collect();
    let rows = Batch::upload(device, element, &rows)?;
    let table: Vec<_> = a
        .iter()
        .enumerate()
        .map(|(i, a)| Job {
            rows: rows.offset(i) as u32,
            order: a.rows as u32,
            rounds: rounds(a.rows) as u32,
            floor,
            tolerance: (epsilon * (4.0 + (a.rows as f64).sqrt())) as f32,
        })
        .collect();
    let ranges: Vec<_> = a.par_iter().map(|a| cut(step_costs(a.rows))).collect();
    let mut commands = gpu.commands();
    for launch in 0..ranges.iter().map(Vec::len).max().unwrap_or(0) {
        let work: Vec<Work> = (0..)
            .zip(&ranges)
            .filter_map(|(i, ranges)| ranges.get(launch).map(|range| [i, range.start, range.end, 0]))
            .collect();
        commands.launch(kernel(element), &table, &work, &[rows.binding()?])?;
    }
    commands.submit()?;
    let rows = rows.download(device)?;
    Ok(rows.into_par_iter().zip(scales).map(|(rows, e)| found(rows, e, f64::from(floor))).collect())
}

/// The shape of `[A | J]` and of the row below it that tells how far it is.
fn beside(order: usize) -> Shape {
    Shape::new(order + 1, 2 * order)
}

fn with_rotations(a: &Matrix) -> Matrix {
    let Shape { rows, cols } = beside(a.rows);
    let mut both = Matrix::zeros(rows, cols);
    for i in 0..a.rows {
        let (left, right) = both.data[i * cols..(i + 1) * cols].split_at_mut(a.rows);
        left.copy_from_slice(a.row(i));
        right[i] = 1.0;
    }
    both
}

/// What the shader found of a matrix times 2^e.
fn found(mut rows: Matrix, e: i32, floor: f64) -> Svd {
    let n = rows.cols / 2;
    let (matrix, status) = rows.data.split_at_mut(2 * n * n);
    let normalised = |row: &mut [f64]| {
        let square: f64 = row[..n].iter().map(|v| v * v).sum();
        // Such a row need not be orthogonal to the others, so it is no singular vector.
        if square <= floor {
            row[..n].fill(0.0);
            return 0.0;
        }
        let norm = square.sqrt();
        row[..n].iter_mut().for_each(|v| *v /= norm);
        scale(norm, -e)
    };
    let values = matrix.chunks_exact_mut((2 * n).max(1)).map(normalised).collect();
    // A matrix of order 0 has no steps.
    let converged = status.first().is_none_or(|converged| *converged == 1.0);
    sorted(values, converged, |i| {
        let (right, left) = matrix[2 * n * i..2 * n * (i + 1)].split_at(n);
        (left, right)
    })
}

/// Rounds of a sweep, as the shader wants them: at least 1.
fn rounds(order: usize) -> usize {
    (order.next_multiple_of(2)).max(2) - 1
}

/// Loop iterations of an invocation for each step of all sweeps, as the shader makes them.
fn step_costs(order: usize) -> impl Iterator<Item = usize> {
    let groups = rounds(order).div_ceil(2).div_ceil(PAIRS);
    let steps = if order == 0 { 0 } else { rounds(order) * MAX_SWEEPS };
    std::iter::repeat_n(1 + groups * (10 + order.div_ceil(LANES) + (2 * order).div_ceil(4 * LANES)), steps)
}

fn largest(a: &Matrix) -> f64 {
    a.data.iter().fold(0.0, |max, v| v.abs().max(max))
}

/// v · 2^e for any e; exact unless the result is subnormal.
fn scale(v: f64, e: i32) -> f64 {
    let half = e / 2;
    v * pow2(half) * pow2(e - half)
}

fn scaled(a: &Matrix, e: i32) -> Matrix {
    a.map(|v| scale(v, e))
}

/// The CPU twin for one matrix.
pub(super) fn jacobi_svd_cpu(a: &Matrix) -> Svd {
    let n = a.rows;
    let e = exponent_of(largest(a));
    let a = scaled(a, -e);
    let failed =
        || Svd { left: a.clone(), values: vec![f64::NAN; n], right: Matrix::zeros(n, n), converged: false };
    if a.data.iter().any(|v| !v.is_finite()) {
        return failed();
    }
    let rows = (0..n).rposition(|i| a.row(i).iter().any(|v| *v != 0.0)).map_or(0, |last| last + 1);
    let used = rows.max(a.used_columns());
    let Ok(svd) = view(&a.data, Shape::new(n, n)).submatrix(0, 0, used, used).svd() else { return failed() };
    let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
    let is_zero = |i: usize| i >= used || s[i] == 0.0;
    let values = (0..n).map(|i| if is_zero(i) { 0.0 } else { scale(s[i], e) }).collect();
    // Beyond what is used, the basis goes on with axes.
    let left = Matrix::from_fn(n, n, |i, k| match i < used && k < used {
        true => u[(k, i)],
        false => f64::from(u8::from(i == k)),
    });
    let right = Matrix::from_fn(n, n, |i, k| if is_zero(i) || k >= used { 0.0 } else { v[(k, i)] });
    sorted(values, true, |i| (left.row(i), right.row(i)))
}

/// Puts singular values in order, with what `vectors` gives as the left and right one of each, and fixes the signs.
fn sorted<'a>(values: Vec<f64>, converged: bool, vectors: impl Fn(usize) -> (&'a [f64], &'a [f64])) -> Svd {
    let n = values.len();
    let mut order: Vec<usize> = (0..n).collect();
    // Stable, so that equal values keep one order.
    order.sort_by(|&i, &k| values[k].total_cmp(&values[i]));
    let (mut u, mut v) = (Vec::with_capacity(n * n), Vec::with_capacity(n * n));
    for &i in &order {
        let (left, right) = vectors(i);
        let top = left.iter().fold(0.0f64, |top, &v| if v.abs() > top.abs() { v } else { top });
        let sign = if top < 0.0 { -1.0 } else { 1.0 };
        u.extend(left.iter().map(|v| sign * v));
        v.extend(right.iter().map(|v| sign * v));
    }
    Svd {
        left: Matrix { rows: n, cols: n, data: u },
        converged: converged && values.iter().all(|v| v.is_finite()),
        values: order.into_iter().map(|i| values[i]).collect(),
        right: Matrix { rows: n, cols: n, data: v },
    }
}
