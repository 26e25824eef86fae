//! LoKr: `ΔW = W1 ⊗ W2`, either of which may be a product, of LyCORIS (Yeh et al. 2024).

use super::{Expanded, Found, low_rank, product, squared, tucker};
use crate::Matrix;

pub(super) struct LoKr {
    /// `W1 = B·A` and `W2 = B·A`; the identity stands for what is not there.
    pairs: [(Matrix, Matrix); 2],
    /// What alpha is for; a LoKr of two whole factors has none of its own.
    pub alpha_rank: Option<usize>,
    pub kernel: Option<Vec<usize>>,
}

impl LoKr {
    /// Of `w1, w1_a, w1_b, w2, w2_a, w2_b, t2`. The error says what is wrong with their shapes.
    pub fn read(parts: [Found; 7]) -> Result<Self, String> {
        let [w1, w1a, w1b, w2, w2a, w2b, t2] = parts;
        let mut kernel = None;
        let mut alpha_rank = None;
        let first = match (w1, w1a, w1b) {
            (Some((_, w)), None, None) => whole(w),
            (None, Some((_, a)), Some((_, b))) if a.cols == b.rows => {
                alpha_rank = Some(b.rows);
                (a, b)
            }
            _ => {
                return Err(
                    "is of a LoKr whose first factor is not whole, or does not fit together".to_owned()
                );
            }
        };
        let second = match (w2, w2a, w2b, t2) {
            (Some((shape, w)), None, None, None) => {
                kernel = shape.get(2..).filter(|dims| !dims.is_empty()).map(<[usize]>::to_vec);
                whole(w)
            }
            (None, Some((_, a)), Some((_, b)), Some(core)) => {
                alpha_rank = Some(b.rows);
                let (up, down, dims) =
                    tucker(&core, &a, &b).ok_or("is of a LoKr whose core does not fit its factors")?;
                kernel = Some(dims);
                (up, down)
            }
            (None, Some((_, a)), Some((_, b)), None) if a.cols == b.rows => {
                alpha_rank = Some(b.rows);
                (a, b)
            }
            _ => {
                return Err(
                    "is of a LoKr whose second factor is not whole, or does not fit together".to_owned()
                );
            }
        };
        Ok(Self { pairs: [first, second], alpha_rank, kernel })
    }

    /// Rows and columns of the update.
    pub fn size(&self) -> (usize, usize) {
        let [(b1, a1), (b2, a2)] = &self.pairs;
        (b1.rows * b2.rows, a1.cols * a2.cols)
    }

    pub fn exact_rank(&self) -> usize {
        self.pairs.iter().map(|(_, a)| a.rows).product()
    }

    /// `(B1·A1) ⊗ (B2·A2) = (B1 ⊗ B2)·(A1 ⊗ A2)`.
    pub fn exact(&self) -> Expanded {
        let [(b1, a1), (b2, a2)] = &self.pairs;
        Expanded { b: kron(b1, b2), a: kron(a1, a2), cut: 0.0, whole: 0.0 }
    }

    /// The singular values of a Kronecker product are the products of its factors', so the largest are known.
    pub fn truncated(&self, rank: usize) -> Expanded {
        let [first, second] = [0, 1].map(|i| {
            let (b, a) = &self.pairs[i];
            low_rank::singular(&product(b, a), rank)
        });
        let mut pairs: Vec<(usize, usize)> =
            (0..first.s.len()).flat_map(|i| (0..second.s.len()).map(move |j| (i, j))).collect();
        let value = |&(i, j): &(usize, usize)| first.s[i] * second.s[j];
        pairs.sort_by(|x, y| value(y).total_cmp(&value(x)));
        pairs.truncate(rank);
        let (n, m) = (second.u.rows, second.v.rows);
        let side = |x: &Matrix, y: &Matrix, row: usize, n: usize, p: &(usize, usize)| {
            x[(row / n, p.0)] * y[(row % n, p.1)] * value(p).sqrt()
        };
        let b =
            Matrix::from_fn(first.u.rows * n, pairs.len(), |o, k| side(&first.u, &second.u, o, n, &pairs[k]));
        let a =
            Matrix::from_fn(pairs.len(), first.v.rows * m, |k, c| side(&first.v, &second.v, c, m, &pairs[k]));
        let whole = self.squared();
        let kept: f64 = pairs.iter().map(|p| value(p) * value(p)).sum();
        Expanded { b, a, cut: (whole - kept).max(0.0), whole }
    }

    fn squared(&self) -> f64 {
        self.pairs.iter().map(|(b, a)| squared(&product(b, a))).product()
    }
}

/// A matrix as a product with the smaller identity.
fn whole(w: Matrix) -> (Matrix, Matrix) {
    let identity = |n| Matrix::from_fn(n, n, |i, j| f64::from(u8::from(i == j)));
    if w.rows <= w.cols { (identity(w.rows), w) } else { (w.clone(), identity(w.cols)) }
}

fn kron(x: &Matrix, y: &Matrix) -> Matrix {
    Matrix::from_fn(x.rows * y.rows, x.cols * y.cols, |i, j| {
        x[(i / y.rows, j / y.cols)] * y[(i % y.rows, j % y.cols)]
    })
}
