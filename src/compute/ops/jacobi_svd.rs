use bytemuck::NoUninit;
use rayon::prelude::*;

use super::{cut, mismatch, view};
use crate::compute::gpu::{Work, whole};
use crate::compute::shaders::Kernel;
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
/// run. On the CPU, faer's SVD, whose errors are relative to σ_1.
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
    let arena = (device.gpu()?.max_arena() / 16) as usize;
    let mut all = Vec::with_capacity(a.len());
    let mut rest = a;
    while !rest.is_empty() {
        let mut used = 0;
        let fits = rest.iter().take_while(|a| {
            used += a.data.len().next_multiple_of(4);
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

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Job {
    matrix: u32,
    order: u32,
    rounds: u32,
    floor: f32,
    tolerance: f32,
}

fn jacobi_svd_gpu(device: &Device, a: &[Matrix]) -> Result<Vec<Svd>> {
    let gpu = device.gpu()?;
    let element = device.sum();
    let (epsilon, floor) = match element {
        Element::DoubleSingle => (1e-13, 1e-20),
        _ => (f64::EPSILON, 1e-36),
    };
    let scales: Vec<i32> = a.iter().map(|a| TARGET - exponent_of(largest(a))).collect();
    let scaled: Vec<Matrix> = a.par_iter().zip(&scales).map(|(a, &e)| scaled(a, e)).collect();
    let identity: Vec<Matrix> =
        a.iter().map(|a| Matrix::from_fn(a.rows, a.rows, |i, j| f64::from(u8::from(i == j)))).collect();
    let rotated = Batch::upload(device, element, &scaled)?;
    let rotations = Batch::upload(device, element, &identity)?;
    let table: Vec<_> = a
        .iter()
        .enumerate()
        .map(|(i, a)| Job {
            matrix: rotated.offset(i) as u32,
            order: a.rows as u32,
            rounds: rounds(a.rows) as u32,
            floor,
            tolerance: (epsilon * (4.0 + (a.rows as f64).sqrt())) as f32,
        })
        .collect();
    let ranges: Vec<_> = a.iter().map(|a| cut(step_costs(a.rows))).collect();
    let bytes = a.len() as u64 * 8;
    let status = gpu.buffer("jacobi_svd status", bytes)?;
    let mut commands = gpu.commands();
    for launch in 0..ranges.iter().map(Vec::len).max().unwrap_or(0) {
        let work: Vec<Work> = (0..)
            .zip(&ranges)
            .filter_map(|(i, ranges)| ranges.get(launch).map(|range| [i, range.start, range.end, 0]))
            .collect();
        let buffers = [whole(rotated.buffer()?), whole(rotations.buffer()?), whole(&status)];
        commands.launch(Kernel::JacobiSvd(element), &table, &work, &buffers);
    }
    commands.submit()?;
    let status: Vec<[u32; 2]> = bytemuck::pod_collect_to_vec(&gpu.read(&status, bytes)?);
    let (rows, left) = (rotated.download(device)?, rotations.download(device)?);
    Ok((0..a.len())
        .into_par_iter()
        .map(|i| {
            let mut right = rows[i].clone();
            let n = right.rows;
            let values = (0..n)
                .map(|k| {
                    let row = &mut right.data[k * n..(k + 1) * n];
                    let square: f64 = row.iter().map(|v| v * v).sum();
                    // Not orthogonal to the others, so no singular vector.
                    if square <= f64::from(floor) {
                        row.fill(0.0);
                        return 0.0;
                    }
                    let norm = square.sqrt();
                    row.iter_mut().for_each(|v| *v /= norm);
                    scale(norm, -scales[i])
                })
                .collect();
            // A matrix of order 0 has no steps.
            sorted(left[i].clone(), values, right, n == 0 || status[i][0] == 1)
        })
        .collect())
}

/// Rounds of a sweep, as the shader wants them: at least 1.
fn rounds(order: usize) -> usize {
    (order.next_multiple_of(2)).max(2) - 1
}

/// Loop iterations of an invocation for each step of all sweeps, as the shader makes them.
fn step_costs(order: usize) -> impl Iterator<Item = usize> {
    let pairs = rounds(order).div_ceil(2).div_ceil(16);
    let steps = if order == 0 { 0 } else { rounds(order) * MAX_SWEEPS };
    std::iter::repeat_n(1 + pairs * (18 + 2 * order.div_ceil(16)), steps)
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
    Matrix { data: a.data.iter().map(|&v| scale(v, e)).collect(), ..*a }
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
    let Ok(svd) = view(&a.data, Shape::new(n, n)).svd() else { return failed() };
    let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
    let values = (0..n).map(|i| scale(s[i], e)).collect();
    let left = Matrix::from_fn(n, n, |i, k| u[(k, i)]);
    let right = Matrix::from_fn(n, n, |i, k| if s[i] == 0.0 { 0.0 } else { v[(k, i)] });
    sorted(left, values, right, true)
}

/// Puts singular values in order and fixes the signs.
fn sorted(left: Matrix, values: Vec<f64>, right: Matrix, converged: bool) -> Svd {
    let n = values.len();
    let mut order: Vec<usize> = (0..n).collect();
    // Stable, so that equal values keep one order.
    order.sort_by(|&i, &k| values[k].total_cmp(&values[i]));
    let mut svd = Svd {
        left: Matrix::zeros(n, n),
        values: order.iter().map(|&i| values[i]).collect(),
        right: Matrix::zeros(n, n),
        converged: converged && values.iter().all(|v| v.is_finite()),
    };
    for (to, &from) in order.iter().enumerate() {
        let row = left.row(from);
        let mut top = 0.0f64;
        for &v in row {
            if v.abs() > top.abs() {
                top = v;
            }
        }
        let sign = if top < 0.0 { -1.0 } else { 1.0 };
        for k in 0..n {
            svd.left[(to, k)] = sign * row[k];
            svd.right[(to, k)] = sign * right[(from, k)];
        }
    }
    svd
}
