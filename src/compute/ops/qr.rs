use rayon::prelude::*;

use super::{host, inner, jacobi_svd, rank_update, view};
use crate::compute::{Batch, Device, Element, Shape};
use crate::power::{exponent_of, pow2};
use crate::{Matrix, RawMatrix, Result};

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

impl ScaledRows {
    /// Scales and uploads.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) if they are more than the device binds at once.
    pub fn new(device: &Device, factors: &[RawMatrix<'_>]) -> Result<Self> {
        let wide = |m: &RawMatrix<'_>| Matrix { rows: m.rows, cols: m.cols, data: m.to_vec() };
        Self::from_matrices(device, factors.par_iter().map(wide).collect())
    }

    /// The same for matrices in f64, which a GPU rounds to f32 once they are scaled.
    pub(crate) fn from_matrices(device: &Device, mut matrices: Vec<Matrix>) -> Result<Self> {
        let exponents = matrices
            .par_iter_mut()
            .map(|m| m.data.chunks_exact_mut(m.cols.max(1)).map(normalise).collect())
            .collect();
        Ok(Self { rows: Batch::upload(device, device.factor(), &matrices)?, exponents })
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

/// Thin QR factors of tall matrices that are given as rows: `A = L·Q`.
#[derive(Debug)]
pub struct Qr {
    /// Q: rank × width; its rows are orthonormal or zero.
    pub q: Batch,
    /// L: rank × rank, in general full; its columns are zero where rows of Q are.
    pub l: Vec<Matrix>,
}

/// Thin QR of tall matrices (Aᵀ = Qᵀ·Lᵀ), which are given and made as rows: `A = L·Q`, A: rank × width.
///
/// Two passes of "Gram matrix, its eigenvectors, product" (SVQB: Stathopoulos and Wu 2002; CholeskyQR2 with an
/// eigendecomposition in place of Cholesky, so that rank deficiency is no special case):
///
/// ```text
/// A·Aᵀ = W·Λ·Wᵀ       Q₁ = Λ^-½·Wᵀ·A       Q₁·Q₁ᵀ = M       Q = M^-½·Q₁       L = W·Λ^½·M^½
/// ```
///
/// Gram matrices square the condition number: after rows are scaled, directions whose singular value is below about
/// `√(rank·ε)` of the largest (1e-7 in f64, 6e-7 in double-single, at rank 32) are taken for zero. What is kept has
/// ‖QQᵀ − I‖ ≤ 1e-6, as f32 rounds it, and each direction of A a relative error of about 1e-7 of its own size.
/// On the CPU, faer's Householder QR in f64, which drops nothing.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
pub fn qr(device: &Device, a: &ScaledRows) -> Result<Qr> {
    let shapes = a.rows.shapes();
    if !device.is_gpu() {
        let parts: Vec<(Matrix, Matrix)> = (0..a.rows.len())
            .into_par_iter()
            .map(|i| {
                let (q, l) = qr_cpu(a.rows.host(i).unwrap_or_default(), shapes[i]);
                (q, a.unscale(i, l))
            })
            .collect();
        let (q, l): (Vec<_>, _) = parts.into_iter().unzip();
        return Ok(Qr { q: Batch::upload(device, Element::Host, &q)?, l });
    }
    if device.sum() == Element::Host {
        let rows = ScaledRows { rows: host(device, &a.rows)?, exponents: a.exponents.clone() };
        let Qr { q, l } = qr(&Device::cpu(), &rows)?;
        return Ok(Qr { q: Batch::upload(device, device.factor(), &q.download(device)?)?, l });
    }
    let epsilon = if device.sum() == Element::F64 { f64::EPSILON } else { 1e-14 };

    let grams = inner(device, &a.rows, &a.rows)?.download(device)?;
    let spectra = jacobi_svd(device, &grams)?;
    let (transforms, lefts): (Vec<_>, Vec<_>) = spectra
        .par_iter()
        .map(|spectrum| {
            let n = spectrum.values.len();
            let least = n.max(16) as f64 * epsilon * spectrum.values.first().unwrap_or(&0.0);
            let root = |k: usize| if spectrum.values[k] > least { spectrum.values[k].sqrt() } else { 0.0 };
            let inverse = |k: usize| if root(k) > 0.0 { 1.0 / root(k) } else { 0.0 };
            (
                Matrix::from_fn(n, n, |k, i| spectrum.left[(k, i)] * inverse(k)),
                Matrix::from_fn(n, n, |i, k| spectrum.left[(k, i)] * root(k)),
            )
        })
        .unzip();
    let transforms = Batch::upload(device, device.sum(), &transforms)?;
    let q = rank_update(device, None, &transforms, &a.rows)?;

    // What was kept has norm 1 now; the rest is what rounding left of a zero.
    let grams = inner(device, &q, &q)?.download(device)?;
    let spectra = jacobi_svd(device, &grams)?;
    let (transforms, l): (Vec<_>, Vec<_>) = spectra
        .par_iter()
        .zip(lefts)
        .enumerate()
        .map(|(i, (spectrum, left))| {
            let power = |p: f64| {
                let n = spectrum.values.len();
                let mut sum = Matrix::zeros(n, n);
                for (k, value) in spectrum.values.iter().enumerate().filter(|(_, value)| **value > 0.25) {
                    let (row, value) = (spectrum.left.row(k), value.powf(p));
                    for r in 0..n {
                        for c in 0..n {
                            sum[(r, c)] += row[r] * value * row[c];
                        }
                    }
                }
                sum
            };
            let l = product(&left, &power(0.5));
            (power(-0.5), a.unscale(i, l))
        })
        .unzip();
    let transforms = Batch::upload(device, device.sum(), &transforms)?;
    Ok(Qr { q: rank_update(device, None, &transforms, &q)?, l })
}

/// The CPU twin for one matrix: Q and L.
fn qr_cpu(a: &[f64], shape: Shape) -> (Matrix, Matrix) {
    let qr = view(a, shape).transpose().qr();
    let (q, r) = (qr.compute_thin_Q(), qr.thin_R());
    // Of a wide factor with more rows than columns, only so many directions exist.
    let kept = shape.rows.min(shape.cols);
    let q = Matrix::from_fn(shape.rows, shape.cols, |k, i| if k < kept { q[(i, k)] } else { 0.0 });
    let l = Matrix::from_fn(shape.rows, shape.rows, |i, k| if k < kept { r[(k, i)] } else { 0.0 });
    (q, l)
}

/// A·B of small matrices, on one thread.
fn product(a: &Matrix, b: &Matrix) -> Matrix {
    let mut c = Matrix::zeros(a.rows, b.cols);
    faer::linalg::matmul::matmul(
        super::view_mut(&mut c.data, Shape::new(a.rows, b.cols)),
        faer::Accum::Replace,
        view(&a.data, Shape::new(a.rows, a.cols)),
        view(&b.data, Shape::new(b.rows, b.cols)),
        1.0,
        faer::Par::Seq,
    );
    c
}
