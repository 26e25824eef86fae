//! Small dense algebra in f64 on the host that several methods need, and singular values of batches.

use std::ops::Range;

use faer::Mat;

use crate::compute::ops::{self, Svd};
use crate::power::{exponent_of, pow2};
use crate::{Device, Error, Matrix, RawMatrix, Result};

/// Singular values below this share of the largest are what rounding to f32 leaves of zero: they are no directions.
pub(super) const NEGLIGIBLE: f64 = 2.5e-7;

/// Eigenvalues of a Gram matrix, its rows brought to one size, below this share of the largest are what rounding factors to
/// f32 leaves of zero.
const NOTHING: f64 = 1e-12;

/// How many of the descending values are above `least` and not zero.
pub(super) fn significant(values: &[f64], least: f64) -> usize {
    values.iter().take_while(|v| **v > least && **v > 0.0).count()
}

/// How many of the descending values are no [negligible](NEGLIGIBLE) ones.
pub(super) fn directions(values: &[f64]) -> usize {
    significant(values, NEGLIGIBLE * values.first().unwrap_or(&0.0))
}

/// SVDs of square matrices; `name` tells the layer that the k-th is of.
///
/// # Errors
/// [`Error::Layer`] if one does not converge; [`Error::Device`].
pub(super) fn svds(device: &Device, matrices: &[Matrix], name: impl Fn(usize) -> String) -> Result<Vec<Svd>> {
    let svds = ops::jacobi_svd(device, matrices)?;
    match svds.iter().position(|svd| !svd.converged) {
        None => Ok(svds),
        Some(k) => Err(Error::layer(
            name(k),
            "its singular values could not be found; are its scale and strength right?",
        )),
    }
}

/// Computes what it can from Gram matrices, and the rest by QR, which also takes factors that are nearly singular.
///
/// `grams` gives `None` for what is too near to singular, `qr` a result for each of the others, in order.
pub(super) fn gram_first<T, R>(
    items: &[T],
    grams: impl FnOnce(&[T]) -> Result<Vec<Option<R>>>,
    qr: impl FnOnce(&[&T]) -> Result<Vec<R>>,
) -> Result<Vec<R>> {
    let found = grams(items)?;
    let singular: Vec<&T> = items.iter().zip(&found).filter(|(_, r)| r.is_none()).map(|(t, _)| t).collect();
    let mut rest = if singular.is_empty() { Vec::new() } else { qr(&singular)? }.into_iter();
    Ok(found.into_iter().filter_map(|result| result.or_else(|| rest.next())).collect())
}

/// In f64.
pub(super) fn wide(m: RawMatrix<'_>) -> Matrix {
    Matrix { rows: m.rows(), cols: m.cols(), data: m.to_vec() }
}

/// A·B on one thread.
pub(super) fn times(a: &Matrix, b: &Matrix) -> Matrix {
    let mut c = Matrix::zeros(a.rows, b.cols);
    faer::linalg::matmul::matmul(
        faer::MatMut::from_row_major_slice_mut(&mut c.data, a.rows, b.cols),
        faer::Accum::Replace,
        faer::MatRef::from_row_major_slice(&a.data, a.rows, a.cols),
        faer::MatRef::from_row_major_slice(&b.data, b.rows, b.cols),
        1.0,
        faer::Par::Seq,
    );
    c
}

/// `Σ M_k` of matrices of one shape, in order; empty of none.
pub(super) fn sum(matrices: &[Matrix]) -> Matrix {
    let mut matrices = matrices.iter();
    let mut sum = matrices.next().cloned().unwrap_or_default();
    for matrix in matrices {
        sum.data.iter_mut().zip(&matrix.data).for_each(|(s, v)| *s += v);
    }
    sum
}

/// `to[rows, :] += w · from[rows, :]`.
pub(super) fn add(to: &mut Matrix, from: &Matrix, w: f64, rows: Range<usize>) {
    let span = rows.start * to.cols..rows.end * to.cols;
    to.data[span.clone()].iter_mut().zip(&from.data[span]).for_each(|(t, f)| *t += w * f);
}

/// ⟨A, B⟩.
pub(super) fn dot(a: &Matrix, b: &Matrix) -> f64 {
    a.data.iter().zip(&b.data).map(|(a, b)| a * b).sum()
}

/// `Σ_k values[k]·left[k, :]ᵀ·right[k, :]` over as many rows as there are values.
pub(super) fn outer(left: &Matrix, right: &Matrix, values: &[f64]) -> Matrix {
    let scaled = Matrix::from_fn(values.len(), right.cols, |k, j| values[k] * right[(k, j)]);
    let left = Matrix::from_fn(left.cols, values.len(), |i, k| left[(k, i)]);
    times(&left, &scaled)
}

/// L, L⁺ and the rank of a Gram matrix that is nearly singular, by its eigenvectors.
pub(super) fn revealed(gram: &Matrix) -> (Matrix, Matrix, usize) {
    let n = gram.rows;
    // Rows of very different size are brought to size 1, so that none counts as nothing.
    let e: Vec<i32> = (0..n).map(|k| exponent_of(gram[(k, k)].sqrt())).collect();
    let scaled = Mat::from_fn(n, n, |i, j| gram[(i, j)] * pow2(-e[i]) * pow2(-e[j]));
    let nothing = || (Matrix::zeros(n, n), Matrix::zeros(n, n), 0);
    let Ok(spectrum) = scaled.self_adjoint_eigen(faer::Side::Lower) else { return nothing() };
    let (u, values) = (spectrum.U(), spectrum.S().column_vector());
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
    let Some(largest) = order.first().map(|&k| values[k]).filter(|v| *v > 0.0) else { return nothing() };
    let rank = order.iter().take_while(|&&k| values[k] > NOTHING * largest).count();
    let vector = |i: usize, k: usize| (u[(i, order[k])], values[order[k]].sqrt());
    let left = |i: usize, k: usize| match k < rank {
        true => vector(i, k).0 * vector(i, k).1 * pow2(e[i]),
        false => 0.0,
    };
    let inverse = |k: usize, i: usize| match k < rank {
        true => vector(i, k).0 / vector(i, k).1 * pow2(-e[i]),
        false => 0.0,
    };
    (Matrix::from_fn(n, n, left), Matrix::from_fn(n, n, inverse), rank)
}

/// C of the least squares `‖A' − C·A‖`, of least norm where rows of A depend on each other, from `A·Aᵀ` and `A'·Aᵀ`.
pub(super) fn least_squares(gram: &Matrix, mixed: &Matrix) -> Matrix {
    let (_, inverse, _) = revealed(gram);
    times(&times(mixed, &inverse.transposed()), &inverse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_grams_leave_goes_to_qr_in_order() {
        let even = |items: &[u32]| Ok(items.iter().map(|&i| (i % 2 == 0).then_some(10 * i)).collect());
        let odd = |items: &[&u32]| {
            assert_eq!(items, [&1, &3]);
            Ok(items.iter().map(|&i| 100 * i).collect())
        };
        assert_eq!(gram_first(&[1, 2, 3, 4], even, odd).unwrap(), [100, 20, 300, 40]);
        assert_eq!(gram_first(&[2, 4], even, |_| unreachable!()).unwrap(), [20, 40]);
    }
}
