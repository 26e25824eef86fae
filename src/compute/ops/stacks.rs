use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, MatRef, Par};
use rayon::prelude::*;

use super::rows::stacked_shape;
use super::{ScaledRows, Side, gemm, inner, rank_update, small, view, view_mut};
use crate::compute::{Device, Element, Shape};
use crate::power::{exponent_of, pow2};
use crate::{Matrix, RawMatrix, Result};

/// Stacked factors, `[A_1; …; A_K]` or `[B_1 … B_K]ᵀ`, R × width, of which only Gram matrices and combinations count.
///
/// On a GPU they are uploaded once. On the CPU they are read where they lie, in blocks that fit a cache, and never widened
/// as a whole.
#[derive(Debug)]
pub struct Stacks<'a> {
    side: Side,
    parts: Vec<Vec<RawMatrix<'a>>>,
    shapes: Vec<Shape>,
    rows: Option<ScaledRows>,
}

/// Columns of a stack that are widened at a time.
const BLOCK: usize = 1024;

impl<'a> Stacks<'a> {
    /// One stack of each list of factors.
    ///
    /// # Errors
    /// Those of [`ScaledRows::new`].
    pub fn new(device: &Device, side: Side, parts: Vec<Vec<RawMatrix<'a>>>) -> Result<Self> {
        let shapes = parts.iter().map(|parts| stacked_shape(side, parts)).collect::<Result<_>>()?;
        let rows = match device.sum() {
            Element::Host => None,
            _ => Some(ScaledRows::new(device, side, &parts)?),
        };
        Ok(Self { side, parts, shapes, rows })
    }

    /// `S·Sᵀ` of each stack, R × R, summed in the device's tier.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    pub fn grams(&self, device: &Device) -> Result<Vec<Matrix>> {
        let Some(ScaledRows { rows, exponents }) = &self.rows else {
            return Ok((0..self.parts.len()).into_par_iter().map(|i| self.gram_cpu(i)).collect());
        };
        let mut grams = inner(device, rows, rows)?.download(device)?;
        grams.par_iter_mut().zip(exponents).for_each(|(gram, e)| {
            let scales: Vec<f64> = e.iter().map(|&e| pow2(e)).collect();
            for (row, own) in gram.data.chunks_exact_mut(e.len().max(1)).zip(&scales) {
                row.iter_mut().zip(&scales).for_each(|(v, scale)| *v *= own * scale);
            }
        });
        Ok(grams)
    }

    /// `T·S` of each stack, rounded once to f32: k × width of A, and its transpose of B, as factors lie.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    pub fn combined(&self, device: &Device, transforms: &[Matrix]) -> Result<Vec<Matrix<f32>>> {
        let Some(ScaledRows { rows, exponents }) = &self.rows else {
            return Ok(transforms.par_iter().enumerate().map(|(i, t)| self.combined_cpu(i, t)).collect());
        };
        let scaled: Vec<Matrix> = transforms
            .par_iter()
            .zip(exponents)
            .map(|(t, e)| Matrix::from_fn(t.rows, t.cols, |i, j| t[(i, j)] * pow2(e[j])))
            .collect();
        let combined = rank_update(device, None, &small(device, &scaled)?, rows)?.download_f32(device)?;
        Ok(match self.side {
            Side::Input => combined,
            Side::Output => combined.into_par_iter().map(|m| m.transposed()).collect(),
        })
    }

    fn gram_cpu(&self, i: usize) -> Matrix {
        let rank = self.shapes[i].rows;
        let shape = Shape::new(rank, rank);
        let mut gram = Matrix::zeros(rank, rank);
        self.blocks(i, |_, block| {
            triangular::matmul(
                view_mut(&mut gram.data, shape),
                BlockStructure::TriangularLower,
                Accum::Add,
                block,
                BlockStructure::Rectangular,
                block.transpose(),
                BlockStructure::Rectangular,
                1.0,
                Par::Seq,
            );
        });
        Matrix::from_fn(rank, rank, |i, j| gram[(i.max(j), i.min(j))])
    }

    fn combined_cpu(&self, i: usize, t: &Matrix) -> Matrix<f32> {
        let (width, count) = (self.shapes[i].cols, t.rows);
        let t = view(&t.data, Shape::new(t.rows, t.cols));
        let mut sums = vec![0.0; count * BLOCK.min(width)];
        let mut out = match self.side {
            Side::Input => Matrix::zeros(count, width),
            Side::Output => Matrix::zeros(width, count),
        };
        self.blocks(i, |first, block| {
            let n = block.ncols();
            let sums = &mut sums[..count * n];
            let into = match self.side {
                Side::Input => view_mut(sums, Shape::new(count, n)),
                Side::Output => view_mut(sums, Shape::new(n, count)).transpose_mut(),
            };
            gemm(into, Accum::Replace, 1.0, t, block);
            let narrow = |(out, v): (&mut f32, &f64)| *out = *v as f32;
            match self.side {
                Side::Input => {
                    for (row, sums) in out.data.chunks_exact_mut(width).zip(sums.chunks_exact(n)) {
                        row[first..first + n].iter_mut().zip(sums).for_each(narrow);
                    }
                }
                Side::Output => {
                    out.data[first * count..][..n * count].iter_mut().zip(&*sums).for_each(narrow)
                }
            }
        });
        out
    }

    /// Calls `each` with the first column of a block and the block, widened: R × columns.
    fn blocks(&self, i: usize, mut each: impl FnMut(usize, MatRef<'_, f64>)) {
        let (parts, Shape { rows: rank, cols: width }) = (&self.parts[i], self.shapes[i]);
        let mut values = vec![0.0; rank * BLOCK.min(width)];
        for first in (0..width).step_by(BLOCK) {
            let n = BLOCK.min(width - first);
            let values = &mut values[..rank * n];
            match self.side {
                Side::Input => {
                    let rows =
                        parts.iter().flat_map(|part| (0..part.rows()).map(move |k| part.row_range(k, k + 1)));
                    for (row, out) in rows.zip(values.chunks_exact_mut(n)) {
                        row.columns(first, first + n).widen_into(out);
                    }
                    each(first, view(values, Shape::new(rank, n)));
                }
                Side::Output => {
                    match &parts[..] {
                        [part] => part.row_range(first, first + n).widen_into(values),
                        _ => {
                            for (k, out) in values.chunks_exact_mut(rank).enumerate() {
                                let mut start = 0;
                                for part in parts {
                                    let end = start + part.cols();
                                    part.row_range(first + k, first + k + 1).widen_into(&mut out[start..end]);
                                    start = end;
                                }
                            }
                        }
                    }
                    each(first, view(values, Shape::new(n, rank)).transpose());
                }
            }
        }
    }
}

/// A square root of a Gram matrix `A·Aᵀ`, which knows A but for a rotation.
#[derive(Debug)]
pub struct Root {
    /// L with `L·Lᵀ = A·Aᵀ`.
    pub left: Matrix,
    /// `L⁻¹`: the rows of `Q = L⁻¹·A` are orthonormal.
    pub inverse: Matrix,
    /// How far rounding of the Gram matrix may bend the rows of Q.
    pub bend: f64,
    /// What that makes of the singular values and vectors of A, relative to the largest.
    pub error: f64,
}

impl Root {
    /// The root by Cholesky of the matrix, scaled by powers of two to a diagonal of size 1; `None` if it is singular to
    /// working precision.
    pub fn new(device: &Device, gram: &Matrix) -> Option<Self> {
        let n = gram.rows;
        let e: Vec<i32> = (0..n).map(|k| exponent_of(gram[(k, k)].sqrt())).collect();
        let scaled = Matrix::from_fn(n, n, |i, j| gram[(i, j)] * pow2(-e[i]) * pow2(-e[j]));
        let shape = Shape::new(n, n);
        let llt = view(&scaled.data, shape).llt(faer::Side::Lower).ok()?;
        let l = llt.L();
        let mut inverse = faer::Mat::<f64>::zeros(n, n);
        faer::linalg::triangular_inverse::invert_lower_triangular(inverse.as_mut(), l, Par::Seq);
        let norm = |of: &dyn Fn(usize, usize) -> f64| {
            (0..n)
                .flat_map(|i| (0..n).map(move |j| (i, j)))
                .map(|(i, j)| of(i, j).powi(2))
                .sum::<f64>()
                .sqrt()
        };
        // ‖C‖·‖C⁻¹‖ bounds the ratio of the largest to the smallest eigenvalue.
        let whole = inverse.transpose() * &inverse;
        let condition = norm(&|i, j| scaled[(i, j)]) * norm(&|i, j| whole[(i, j)]);
        let epsilon = if device.sum() == Element::DoubleSingle { 1e-14 } else { f64::EPSILON };
        let epsilon = n.max(16) as f64 * epsilon;
        // Not a number is no condition either.
        (condition * epsilon < 0.1).then(|| Self {
            left: Matrix::from_fn(n, n, |i, k| if k <= i { l[(i, k)] * pow2(e[i]) } else { 0.0 }),
            inverse: Matrix::from_fn(n, n, |k, i| if i <= k { inverse[(k, i)] * pow2(-e[i]) } else { 0.0 }),
            bend: condition * epsilon,
            error: condition.sqrt() * epsilon,
        })
    }
}
