//! What a merge loses, from statistics alone.

use super::Losses;
use crate::Matrix;

/// Squared reconstruction errors.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Squares {
    merged: f64,
    sum: f64,
    average: f64,
    /// Of merging nothing.
    nothing: f64,
}

impl Squares {
    /// `L(R) = ⟨BᵀB, R·G·Rᵀ⟩ − 2⟨BᵀB, R·Qᵀ⟩ + Σ_k⟨B_kᵀB_k, Q_kk⟩ = ⟨BᵀB, R·(G·Rᵀ − 2Qᵀ)⟩ + …` for R* and for
    /// R = I, I/K and 0. B is B_cat with scales and strengths; `blocks`: the members' rows; all R × R.
    ///
    /// The difference of large terms leaves an error of about 1e-7 · L(0) where statistics are f32.
    pub fn new(
        bb: &Matrix,
        g: &Matrix,
        q: &Matrix,
        router: &Matrix,
        blocks: &[std::ops::Range<usize>],
    ) -> Self {
        let nothing: f64 = blocks
            .iter()
            .flat_map(|block| block.clone().flat_map(|i| block.clone().map(move |j| (i, j))))
            .map(|at| bb[at] * q[at])
            .sum();
        let mut inner = times(g, &router.transposed());
        for i in 0..inner.rows {
            for j in 0..inner.cols {
                inner[(i, j)] -= 2.0 * q[(j, i)];
            }
        }
        let scaled = |c: f64| {
            let mut total = 0.0;
            for i in 0..g.rows {
                for j in 0..g.cols {
                    total += bb[(i, j)] * (c * c * g[(i, j)] - 2.0 * c * q[(j, i)]);
                }
            }
            total
        };
        // Rounding may leave a small negative number of a perfect fit.
        let squared = |rest: f64| f64::max(rest + nothing, 0.0);
        Self {
            merged: squared(dot(bb, &times(router, &inner))),
            sum: squared(scaled(1.0)),
            average: squared(scaled(1.0 / blocks.len() as f64)),
            nothing,
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.merged += other.merged;
        self.sum += other.sum;
        self.average += other.average;
        self.nothing += other.nothing;
    }

    /// `sqrt(L(R)/L(0))`; `None` if there was nothing to lose.
    pub fn relative(&self) -> Option<Losses> {
        let of = |square: f64| (square / self.nothing).sqrt();
        let losses = Losses { merged: of(self.merged), sum: of(self.sum), average: of(self.average) };
        let finite = losses.merged.is_finite() && losses.sum.is_finite() && losses.average.is_finite();
        (self.nothing > 0.0 && finite).then_some(losses)
    }
}

/// ⟨A, B⟩.
pub(super) fn dot(a: &Matrix, b: &Matrix) -> f64 {
    a.data.iter().zip(&b.data).map(|(a, b)| a * b).sum()
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
