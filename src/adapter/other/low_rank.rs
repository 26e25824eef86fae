//! Singular values of a whole update, as many as are kept.

use std::sync::Mutex;

use faer::Mat;

use super::{Expanded, squared};
use crate::Matrix;

/// Smaller matrices are decomposed whole.
const WHOLE: usize = 256;
/// Columns of the sketch beyond the rank, and how often it is multiplied by the matrix.
const SPARE: usize = 16;
const ROUNDS: usize = 3;

/// `W ≈ U·diag(s)·Vᵀ`, U: rows x rank, V: columns x rank.
pub(super) struct Singular {
    pub u: Matrix,
    pub s: Vec<f64>,
    pub v: Matrix,
}

/// The update of this rank that is nearest to `w`, or almost: `B = U·√S`, `A = √S·Vᵀ`.
pub(super) fn truncate(w: &Matrix, rank: usize) -> Expanded {
    let Singular { u, s, v } = singular(w, rank);
    let b = Matrix::from_fn(u.rows, s.len(), |i, k| u[(i, k)] * s[k].sqrt());
    let a = Matrix::from_fn(s.len(), v.rows, |k, j| v[(j, k)] * s[k].sqrt());
    let whole = squared(w);
    let kept: f64 = s.iter().map(|s| s * s).sum();
    Expanded { b, a, cut: (whole - kept).max(0.0), whole }
}

/// The largest singular values and their vectors. Of a large matrix they are those of its product with an orthonormal
/// basis of what it makes of random vectors (Halko, Martinsson and Tropp 2011, algorithm 4.4), the same every time.
pub(super) fn singular(w: &Matrix, rank: usize) -> Singular {
    // Whole updates are large; one at a time is in memory.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    let m = Mat::from_fn(w.rows, w.cols, |i, j| w[(i, j)]);
    let least = w.rows.min(w.cols);
    let sketch = rank.saturating_add(SPARE);
    if least <= WHOLE || sketch * 2 >= least {
        return of(&m, None, rank);
    }
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    let mut x = Mat::zeros(w.cols, sketch);
    for j in 0..sketch {
        for i in 0..w.cols {
            x[(i, j)] = random();
        }
    }
    let mut q = (&m * &x).qr().compute_thin_Q();
    for _ in 0..ROUNDS {
        let back = (m.transpose() * &q).qr().compute_thin_Q();
        q = (&m * &back).qr().compute_thin_Q();
    }
    of(&(q.transpose() * &m), Some(&q), rank)
}

fn of(m: &Mat<f64>, basis: Option<&Mat<f64>>, rank: usize) -> Singular {
    let Ok(svd) = m.thin_svd() else {
        // NaN or infinity, which the layer's check names.
        let bad = |rows| Matrix::from_fn(rows, 1, |_, _| f64::NAN);
        return Singular { u: bad(basis.map_or(m.nrows(), Mat::nrows)), s: vec![1.0], v: bad(m.ncols()) };
    };
    let s: Vec<f64> = svd.S().column_vector().iter().copied().take(rank.max(1)).collect();
    let u = match basis {
        Some(q) => q * svd.U(),
        None => svd.U().to_owned(),
    };
    Singular {
        u: Matrix::from_fn(u.nrows(), s.len(), |i, j| u[(i, j)]),
        v: Matrix::from_fn(m.ncols(), s.len(), |i, j| svd.V()[(i, j)]),
        s,
    }
}

#[cfg(test)]
mod tests {
    use super::super::product;
    use super::*;

    #[test]
    fn large_and_small_are_truncated_alike() {
        for (rows, cols) in [(3, 5), (300, 40), (400, 310)] {
            let wave = |i: usize, j: usize| ((i * 31 + j * 17) as f64 * 0.37).sin();
            let (b, a) = (Matrix::from_fn(rows, 3, wave), Matrix::from_fn(3, cols, |i, j| wave(j, i + 7)));
            let w = product(&b, &a);
            let kept = truncate(&w, 3);
            let back = product(&kept.b, &kept.a);
            let error: f64 = back.data.iter().zip(&w.data).map(|(x, y)| (x - y) * (x - y)).sum();
            // Rank 3 is all there is; f64 throughout.
            assert!(error <= 1e-24 * kept.whole, "{error}");
            assert!(kept.cut <= 1e-12 * kept.whole);
            let one = truncate(&w, 1);
            let back = product(&one.b, &one.a);
            let cut: f64 = back.data.iter().zip(&w.data).map(|(x, y)| (x - y) * (x - y)).sum();
            assert!((cut - one.cut).abs() <= 1e-9 * one.whole, "{cut} {}", one.cut);
        }
    }
}
