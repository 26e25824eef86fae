//! The largest singular values of a large matrix, and their vectors.

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::SvdError;
use faer::{Accum, Mat, MatRef, Par};
use rayon::prelude::*;

use crate::{Matrix, Spectrum, Truncation};

/// Matrices with a smaller side are decomposed whole.
const WHOLE: usize = 256;
/// Columns of the sketch beyond those that are wanted, and one of so many wanted ones more.
const SPARE: usize = 16;
const SHARE: usize = 8;
/// Columns of the first sketch where the rank is not known.
const FIRST: usize = 64;
/// How often the sketch is multiplied by the matrix and its transpose.
const ROUNDS: usize = 3;
/// Rows, or columns, that a thread multiplies at a time.
const BLOCK: usize = 128;
/// A singular value below this share of the largest is what rounding left of zero.
const NEGLIGIBLE: f64 = 1e-7;

/// `D ≈ B · A`, `B = U·√S` of rows x rank, `A = √S·Vᵀ` of rank x columns.
pub(super) struct LowRank {
    pub b: Matrix<f32>,
    pub a: Matrix<f32>,
}

/// Singular values, largest first, and vectors; perhaps not all.
struct Singular {
    u: Mat<f64>,
    s: Vec<f64>,
    v: Mat<f64>,
}

/// What a truncation keeps of a matrix; `None` if it is zero, an error if its singular values cannot be found.
///
/// Small matrices, and those of which much is kept, are decomposed as a whole. Of others it takes an orthonormal basis Q of
/// `D·(DᵀD)^q·Ω` for a random Ω (Halko, Martinsson and Tropp 2011, algorithm 4.4), the same every time, and the
/// decomposition of `QᵀD`; where the truncation asks for a share of the whole, with as many columns as that takes.
pub(super) fn low_rank(d: &Matrix<f32>, truncation: &Truncation) -> Result<Option<LowRank>, SvdError> {
    let norm2 = squared(d);
    if norm2 == 0.0 {
        return Ok(None);
    }
    let least = d.rows.min(d.cols);
    let most = truncation.rank.unwrap_or(usize::MAX).min(least);
    // The columns that are wanted.
    let mut wanted = match truncation.spectrum {
        None => most,
        // The sum of all values is known only when they all are.
        Some(Spectrum::Cumulative(_)) => least,
        Some(_) => most.min(FIRST),
    };
    loop {
        let sketch = wanted + SPARE + wanted / SHARE;
        let whole = least <= WHOLE || sketch * 2 >= least;
        let Singular { u, s, v } = if whole { decomposed(d)? } else { sketched(d, sketch)? };
        // The last columns of a sketch are not as good as the others.
        let trusted = if whole { &s[..] } else { &s[..wanted.min(s.len())] };
        let rest = if whole { 0.0 } else { (norm2 - trusted.iter().map(|s| s * s).sum::<f64>()).max(0.0) };
        if let Some(kept) = kept(truncation, trusted, rest) {
            let b = Matrix::from_fn(d.rows, kept, |i, k| (u[(i, k)] * s[k].sqrt()) as f32);
            let a = Matrix::from_fn(kept, d.cols, |k, j| (v[(j, k)] * s[k].sqrt()) as f32);
            return Ok(Some(LowRank { b, a }));
        }
        wanted *= 2;
    }
}

/// How many values are kept; `None` if there may be more than these. `rest`: the sum of the squares of all others.
///
/// As [`Truncation`] has it for adapters: the fewest that a limit asks for and one more, and none that rounding left of zero.
fn kept(truncation: &Truncation, values: &[f64], rest: f64) -> Option<usize> {
    let largest = values.first().copied().unwrap_or(0.0);
    let all = values.iter().take_while(|v| **v > NEGLIGIBLE * largest).count().max(1);
    let most = truncation.rank.unwrap_or(usize::MAX);
    let open = rest > 0.0 && all == values.len();
    let share = |power: i32, share: f64, rest: f64| {
        let total = values[..all].iter().map(|v| v.powi(power)).sum::<f64>() + rest;
        let mut held = 0.0;
        values[..all]
            .iter()
            .take_while(|v| {
                let short = held < share * total;
                held += v.powi(power);
                short
            })
            .count()
    };
    let enough = match truncation.spectrum {
        None => return (!open || values.len() >= most).then(|| all.min(most)),
        Some(Spectrum::Ratio(x)) => values.iter().take_while(|v| **v > largest / x).count(),
        Some(Spectrum::Frobenius(x)) => share(2, x * x, rest),
        Some(Spectrum::Cumulative(x)) => share(1, x, 0.0),
    };
    let asked = (enough.max(1) + 1).min(if open { usize::MAX } else { all });
    let asked = asked.min(most);
    (asked <= all).then_some(asked)
}

fn squared(d: &Matrix<f32>) -> f64 {
    d.data
        .par_chunks(1 << 16)
        .map(|part| part.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>())
        .collect::<Vec<_>>()
        .iter()
        .sum()
}

/// ‖D − B·A‖ / ‖D‖ in the Frobenius norm, computed and not derived.
pub(super) fn error(d: &Matrix<f32>, LowRank { b, a }: &LowRank) -> f64 {
    let rank = a.rows;
    let blocks = d.data.par_chunks(BLOCK * d.cols.max(1)).zip(b.data.par_chunks(BLOCK * rank.max(1)));
    let of_block = |(d_rows, b_rows): (&[f32], &[f32])| {
        let rows = d_rows.len() / d.cols;
        let mut rest = Mat::<f32>::zeros(rows, d.cols);
        let (b, a) = (
            MatRef::from_row_major_slice(b_rows, rows, rank),
            MatRef::from_row_major_slice(&a.data, rank, d.cols),
        );
        matmul(rest.as_mut(), Accum::Replace, b, a, 1.0, Par::Seq);
        let at = |(i, v): (usize, &f32)| (f64::from(*v) - f64::from(rest[(i / d.cols, i % d.cols)])).powi(2);
        d_rows.iter().enumerate().map(at).sum::<f64>()
    };
    let off: f64 = blocks.map(of_block).collect::<Vec<_>>().iter().sum();
    let whole = squared(d);
    if whole > 0.0 { (off / whole).sqrt() } else { 0.0 }
}

fn decomposed(d: &Matrix<f32>) -> Result<Singular, SvdError> {
    of(Mat::from_fn(d.rows, d.cols, |i, j| f64::from(d[(i, j)])).as_ref(), None)
}

fn sketched(d: &Matrix<f32>, columns: usize) -> Result<Singular, SvdError> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0) as f32
    };
    let mut x = Mat::<f32>::zeros(d.cols, columns);
    (0..columns).for_each(|j| (0..d.cols).for_each(|i| x[(i, j)] = random()));
    let mut y = times(d, &x);
    for _ in 0..ROUNDS {
        x = transposed_times::<f32>(d, &basis(&y));
        y = times(d, &basis(&x));
    }
    let q = wide(&y).qr().compute_thin_Q();
    // Products with the basis make the values, and so they are f64.
    let qd = transposed_times::<f64>(d, &q);
    of(qd.transpose(), Some(&q))
}

fn basis(m: &Mat<f32>) -> Mat<f32> {
    m.qr().compute_thin_Q()
}

fn wide(m: &Mat<f32>) -> Mat<f64> {
    Mat::from_fn(m.nrows(), m.ncols(), |i, j| f64::from(m[(i, j)]))
}

fn of(m: MatRef<'_, f64>, basis: Option<&Mat<f64>>) -> Result<Singular, SvdError> {
    let svd = m.thin_svd()?;
    let s = svd.S().column_vector().iter().copied().collect();
    let u = basis.map_or_else(|| svd.U().to_owned(), |q| q * svd.U());
    Ok(Singular { u, s, v: svd.V().to_owned() })
}

/// `D · X`.
fn times(d: &Matrix<f32>, x: &Mat<f32>) -> Mat<f32> {
    let of_block = |rows: &[f32]| {
        let n = rows.len() / d.cols;
        let mut out = Mat::<f32>::zeros(n, x.ncols());
        let d = MatRef::from_row_major_slice(rows, n, d.cols);
        matmul(out.as_mut(), Accum::Replace, d, x.as_ref(), 1.0, Par::Seq);
        out
    };
    let blocks: Vec<Mat<f32>> = d.data.par_chunks(BLOCK * d.cols).map(of_block).collect();
    Mat::from_fn(d.rows, x.ncols(), |i, j| blocks[i / BLOCK][(i % BLOCK, j)])
}

/// `Dᵀ · Y`, in the precision of Y.
fn transposed_times<T: Number>(d: &Matrix<f32>, y: &Mat<T>) -> Mat<T> {
    let of_block = |first: usize| {
        let n = BLOCK.min(d.cols - first);
        let mut part = Mat::<T>::zeros(n, d.rows);
        for (i, row) in d.data.chunks_exact(d.cols).enumerate() {
            row[first..first + n].iter().enumerate().for_each(|(j, v)| part[(j, i)] = T::from(*v));
        }
        T::product(&part, y)
    };
    let starts: Vec<usize> = (0..d.cols).step_by(BLOCK).collect();
    let blocks: Vec<Mat<T>> = starts.into_par_iter().map(of_block).collect();
    Mat::from_fn(d.cols, y.ncols(), |i, j| blocks[i / BLOCK][(i % BLOCK, j)])
}

/// f32 and f64.
trait Number: faer::traits::ComplexField + Copy + From<f32> {
    fn product(x: &Mat<Self>, y: &Mat<Self>) -> Mat<Self>;
}

impl Number for f32 {
    fn product(x: &Mat<Self>, y: &Mat<Self>) -> Mat<Self> {
        let mut out = Mat::zeros(x.nrows(), y.ncols());
        matmul(out.as_mut(), Accum::Replace, x.as_ref(), y.as_ref(), 1.0, Par::Seq);
        out
    }
}

impl Number for f64 {
    fn product(x: &Mat<Self>, y: &Mat<Self>) -> Mat<Self> {
        let mut out = Mat::zeros(x.nrows(), y.ncols());
        matmul(out.as_mut(), Accum::Replace, x.as_ref(), y.as_ref(), 1.0, Par::Seq);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of these singular values, between random orthonormal vectors.
    fn matrix(rows: usize, cols: usize, values: &[f64]) -> Matrix<f32> {
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
        };
        let mut of = |n: usize| Mat::from_fn(n, values.len(), |_, _| random()).qr().compute_thin_Q();
        let (u, v) = (of(rows), of(cols));
        let scaled = Mat::from_fn(rows, values.len(), |i, k| u[(i, k)] * values[k]);
        let d = scaled * v.transpose();
        Matrix::from_fn(rows, cols, |i, j| d[(i, j)] as f32)
    }

    #[test]
    fn what_is_of_low_rank_is_found_exactly() {
        let values: Vec<f64> = (0..12).map(|k| 3.0 * 0.7f64.powi(k)).collect();
        for (rows, cols) in [(40, 30), (700, 500), (500, 900)] {
            let d = matrix(rows, cols, &values);
            for truncation in
                [Truncation::rank(12), Truncation::rank(32), Truncation::spectrum(Spectrum::Ratio(1e3))]
            {
                let found = low_rank(&d, &truncation).unwrap().unwrap();
                assert!(error(&d, &found) < 1e-6, "{rows} x {cols}: {}", error(&d, &found));
            }
            let found = low_rank(&d, &Truncation::rank(12)).unwrap().unwrap();
            assert_eq!((found.b.cols, found.a.rows), (12, 12));
        }
        assert!(low_rank(&Matrix::zeros(5, 5), &Truncation::rank(3)).unwrap().is_none());
    }

    #[test]
    fn the_error_is_that_of_the_best_of_its_rank() {
        // A spectrum that falls slowly is the worst case of a sketch.
        let values: Vec<f64> = (0..400).map(|k| 1.0 / f64::from(k + 1).sqrt()).collect();
        let d = matrix(600, 500, &values);
        let squares = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
        for rank in [4, 32, 100] {
            let found = low_rank(&d, &Truncation::rank(rank)).unwrap().unwrap();
            let best = (squares(&values[rank..]) / squares(&values)).sqrt();
            let off = error(&d, &found);
            assert!(off >= best * 0.9999 && off < best * 1.01, "rank {rank}: {off} of {best}");
        }
    }

    #[test]
    fn spectra_keep_what_a_whole_decomposition_keeps() {
        let values: Vec<f64> = (0..300).map(|k| 0.97f64.powi(k)).collect();
        let d = matrix(900, 700, &values);
        for spectrum in [
            Spectrum::Ratio(5.0),
            Spectrum::Ratio(30.0),
            Spectrum::Frobenius(0.9),
            Spectrum::Frobenius(0.999),
            Spectrum::Cumulative(0.5),
        ] {
            for rank in [None, Some(20)] {
                let truncation = Truncation { rank, spectrum: Some(spectrum) };
                let found = low_rank(&d, &truncation).unwrap().unwrap();
                assert_eq!(Some(found.a.rows), kept(&truncation, &values, 0.0), "{truncation:?}");
            }
        }
    }
}
