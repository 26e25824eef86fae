use faer::{Accum, MatRef};
use rayon::prelude::*;

use super::jacobi_svd::jacobi_svd_cpu;
use super::{ScaledRows, Svd, gemm, host, inner, jacobi_svd, rank_update, view};
use crate::compute::batch::{FACTOR, Operands};
use crate::compute::{Batch, Device, Element, Shape};
use crate::power::{exponent_of, pow2};
use crate::{Matrix, Result};

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
/// One or two passes of "Gram matrix, its eigenvectors, product" (SVQB: Stathopoulos and Wu 2002; CholeskyQR2 with an
/// eigendecomposition in place of Cholesky, so that rank deficiency is no special case):
///
/// ```text
/// A·Aᵀ = W·Λ·Wᵀ       Q₁ = Λ^-½·Wᵀ·A       Q₁·Q₁ᵀ = M       Q = M^-½·Q₁       L = W·Λ^½·M^½
/// ```
///
/// The second pass is left out where the first spectra are so flat that rounding cannot have bent Q₁ (M = I).
///
/// Gram matrices square the condition number: after rows are scaled, directions whose singular value is below about
/// `√(rank·ε)` of the largest (1e-7 in f64, 6e-7 in double-single, at rank 32) are taken for zero. What is kept has
/// ‖QQᵀ − I‖ ≤ 1e-6, as f32 rounds it, and each direction of A a relative error of about 1e-7 of its own size.
/// The CPU makes two passes in f64 where the first bends rows by 1e-8 at most, else faer's Householder QR, which drops
/// nothing.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
pub fn qr(device: &Device, a: &ScaledRows) -> Result<Qr> {
    let shapes = a.rows.shapes();
    if let Operands::Host([rows]) = Operands::of("qr", device, [(&a.rows, FACTOR)])? {
        let parts: Vec<(Matrix, Matrix)> = (0..a.rows.len())
            .into_par_iter()
            .map(|i| {
                let (q, l) = qr_cpu(rows.values(i), shapes[i]);
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
    let roots = roots(device, &a.rows)?;
    let transforms: Vec<Matrix> = roots.par_iter().map(|root| root.inverse.clone()).collect();
    let q = rank_update(device, None, &Batch::upload(device, device.sum(), &transforms)?, &a.rows)?;
    let lefts = roots.par_iter().map(|root| root.left.clone());
    if roots.iter().all(|root| root.bend <= MAX_BEND) {
        return Ok(Qr { q, l: lefts.enumerate().map(|(i, l)| a.unscale(i, l)).collect() });
    }

    // What was kept has norm 1 now; the rest is what rounding left of a zero.
    let grams = inner(device, &q, &q)?.download(device)?;
    let spectra = jacobi_svd(device, &grams)?;
    let (transforms, l): (Vec<_>, Vec<_>) = spectra
        .par_iter()
        .zip(lefts)
        .enumerate()
        .map(|(i, (spectrum, left))| {
            let power = |p: f64| {
                let mut powers = spectrum.left.clone();
                for (row, value) in powers.data.chunks_exact_mut(powers.cols.max(1)).zip(&spectrum.values) {
                    let power = if *value > 0.25 { value.powf(p) } else { 0.0 };
                    row.iter_mut().for_each(|v| *v *= power);
                }
                let shape = Shape::new(powers.rows, powers.cols);
                product(&spectrum.left.transposed(), view(&powers.data, shape))
            };
            let half = power(0.5);
            let l = product(&left, view(&half.data, Shape::new(half.rows, half.cols)));
            (power(-0.5), a.unscale(i, l))
        })
        .unzip();
    let transforms = Batch::upload(device, device.sum(), &transforms)?;
    Ok(Qr { q: rank_update(device, None, &transforms, &q)?, l })
}

/// How far rounding may have bent the rows of Q after one pass; f32 rounds them to 1e-7.
const MAX_BEND: f64 = 1e-8;

/// A square root of a Gram matrix `A·Aᵀ = W·Λ·Wᵀ`, without directions that rounding left of zero.
struct Root {
    /// `W·Λ^½`.
    left: Matrix,
    /// `Λ^-½·Wᵀ`.
    inverse: Matrix,
    /// What rounding of the Gram matrix does to the orthogonality of `Λ^-½·Wᵀ·A`.
    bend: f64,
    /// Whether no direction was left out.
    whole: bool,
}

fn roots(device: &Device, rows: &Batch) -> Result<Vec<Root>> {
    let epsilon = if device.sum() == Element::DoubleSingle { 1e-14 } else { f64::EPSILON };
    let mut grams = inner(device, rows, rows)?.download(device)?;
    let sizes: Vec<Vec<i32>> = grams.par_iter_mut().map(balance).collect();
    let spectra = jacobi_svd(device, &grams)?;
    let root = |(spectrum, sizes): (&Svd, &Vec<i32>)| Root::new(spectrum, epsilon).unbalanced(sizes);
    Ok(spectra.par_iter().zip(&sizes).map(root).collect())
}

/// Brings the rows whose Gram matrix this is to one size by powers of two, which rounds nothing; gives what was taken out.
fn balance(gram: &mut Matrix) -> Vec<i32> {
    let sizes: Vec<i32> = (0..gram.rows).map(|i| exponent_of(gram[(i, i)].sqrt())).collect();
    for (i, row) in gram.data.chunks_exact_mut(gram.cols.max(1)).enumerate() {
        row.iter_mut().zip(&sizes).for_each(|(v, e)| *v *= pow2(-e) * pow2(-sizes[i]));
    }
    sizes
}

impl Root {
    /// The root of the spectrum of a Gram matrix whose entries have an error of `epsilon`.
    fn new(spectrum: &Svd, epsilon: f64) -> Self {
        let n = spectrum.values.len();
        let largest = spectrum.values.first().copied().unwrap_or(0.0);
        let error = n.max(16) as f64 * epsilon * largest;
        let kept = spectrum.values.iter().take_while(|v| **v > error && **v > 0.0).count();
        let scaled = |scale: &dyn Fn(f64) -> f64| {
            let mut rows = spectrum.left.clone();
            for (k, row) in rows.data.chunks_exact_mut(n.max(1)).enumerate() {
                let scale = if k < kept { scale(spectrum.values[k]) } else { 0.0 };
                row.iter_mut().for_each(|v| *v *= scale);
            }
            rows
        };
        Self {
            left: scaled(&f64::sqrt).transposed(),
            inverse: scaled(&|v| 1.0 / v.sqrt()),
            bend: if kept > 0 { error / spectrum.values[kept - 1] } else { 0.0 },
            whole: kept == n,
        }
    }

    /// This, of rows of which `2^size` was taken out.
    fn unbalanced(mut self, sizes: &[i32]) -> Self {
        let n = sizes.len().max(1);
        let rows = self.left.data.chunks_exact_mut(n).zip(self.inverse.data.chunks_exact_mut(n));
        for ((left, inverse), &e) in rows.zip(sizes) {
            left.iter_mut().for_each(|v| *v *= pow2(e));
            inverse.iter_mut().zip(sizes).for_each(|(v, e)| *v *= pow2(-e));
        }
        self
    }

    /// Whether one pass is as good as any.
    fn is_exact(&self) -> bool {
        self.whole && self.bend <= MAX_BEND
    }
}

/// L with `L·Lᵀ = A·Aᵀ`, rank × rank: all that is to be known of A if only `X·A` counts, for any X.
///
/// A GPU makes it of the Gram matrix, so that directions below about 1e-7 of the largest (of scaled rows) are taken for
/// zero; the CPU does so only where that is exact, and else takes faer's Householder QR in f64.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device).
pub fn qr_l(device: &Device, a: &ScaledRows) -> Result<Vec<Matrix>> {
    if let Operands::Host([all]) = Operands::of("qr_l", device, [(&a.rows, FACTOR)])? {
        let l = |i: usize| {
            let rows = all.matrix(i);
            let root = exact_root(rows);
            a.unscale(i, root.map_or_else(|| l_cpu(rows), |root| root.left))
        };
        return Ok((0..a.rows.len()).into_par_iter().map(l).collect());
    }
    if device.sum() == Element::Host {
        let rows = ScaledRows { rows: host(device, &a.rows)?, exponents: a.exponents.clone() };
        return qr_l(&Device::cpu(), &rows);
    }
    let roots = roots(device, &a.rows)?;
    Ok(roots.into_par_iter().enumerate().map(|(i, root)| a.unscale(i, root.left)).collect())
}

/// Rᵀ of the QR decomposition of Aᵀ, padded to a square.
fn l_cpu(a: MatRef<'_, f64>) -> Matrix {
    let (rank, kept) = (a.nrows(), a.nrows().min(a.ncols()));
    let qr = a.transpose().qr();
    let r = qr.thin_R();
    Matrix::from_fn(rank, rank, |i, k| if k < kept && k <= i { r[(k, i)] } else { 0.0 })
}

fn root_cpu(a: MatRef<'_, f64>) -> Root {
    let mut gram = Matrix::zeros(a.nrows(), a.nrows());
    let shape = Shape::new(a.nrows(), a.nrows());
    let into = super::view_mut(&mut gram.data, shape);
    gemm(into, Accum::Replace, 1.0, a, a.transpose());
    Root::new(&jacobi_svd_cpu(&gram), f64::EPSILON)
}

/// The root of the Gram matrix where one pass is as good as any: never of more rows than columns, which depend on each other.
fn exact_root(a: MatRef<'_, f64>) -> Option<Root> {
    (a.nrows() <= a.ncols()).then(|| root_cpu(a)).filter(Root::is_exact)
}

/// The CPU twin for one matrix: Q and L.
fn qr_cpu(a: &[f64], shape: Shape) -> (Matrix, Matrix) {
    if let Some(root) = exact_root(view(a, shape)) {
        // Once more, since there are digits for it in f64.
        let q = product(&root.inverse, view(a, shape));
        let q = view(&q.data, shape);
        let second = root_cpu(q);
        let left = view(&second.left.data, Shape::new(shape.rows, shape.rows));
        return (product(&second.inverse, q), product(&root.left, left));
    }
    let qr = view(a, shape).transpose().qr();
    let (q, r) = (qr.compute_thin_Q(), qr.thin_R());
    // Of a wide factor with more rows than columns, only so many directions exist.
    let kept = shape.rows.min(shape.cols);
    let q = Matrix::from_fn(shape.rows, shape.cols, |k, i| if k < kept { q[(i, k)] } else { 0.0 });
    let l = Matrix::from_fn(shape.rows, shape.rows, |i, k| if k < kept { r[(k, i)] } else { 0.0 });
    (q, l)
}

/// A·B on one thread.
fn product(a: &Matrix, b: MatRef<'_, f64>) -> Matrix {
    let mut c = Matrix::zeros(a.rows, b.ncols());
    let into = super::view_mut(&mut c.data, Shape::new(a.rows, b.ncols()));
    gemm(into, Accum::Replace, 1.0, view(&a.data, Shape::new(a.rows, a.cols)), b);
    c
}
