//! LoHa: `ΔW = (W1a·W1b) ∘ (W2a·W2b)`, of LyCORIS (Yeh et al. 2024, "Navigating Text-To-Image Customization").

use super::{Expanded, Found, product, tucker};
use crate::Matrix;

pub(super) struct LoHa {
    /// `B` and `A` of the two products.
    pairs: [(Matrix, Matrix); 2],
    /// What alpha is for.
    pub rank: usize,
    pub kernel: Option<Vec<usize>>,
}

impl LoHa {
    /// Of `w1_a, w1_b, w2_a, w2_b, t1, t2`. The error says what is wrong with their shapes.
    pub fn read(parts: [Found; 6]) -> Result<Self, String> {
        let [w1a, w1b, w2a, w2b, t1, t2] = parts;
        let (Some(w1a), Some(w1b), Some(w2a), Some(w2b)) = (w1a, w1b, w2a, w2b) else {
            let lacks = "is of a LoHa that lacks some of `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`";
            return Err(lacks.to_owned());
        };
        let rank = w1b.1.rows;
        let mut kernel = None;
        let mut pair = |a: Matrix, b: Matrix, t: Found| -> Option<(Matrix, Matrix)> {
            match t {
                None => (a.cols == b.rows).then_some((a, b)),
                Some(core) => {
                    let (up, down, dims) = tucker(&core, &a, &b)?;
                    kernel = Some(dims);
                    Some((up, down))
                }
            }
        };
        let shapes = format!("{:?}, {:?}, {:?}, {:?}", w1a.0, w1b.0, w2a.0, w2b.0);
        let pairs = (pair(w1a.1, w1b.1, t1), pair(w2a.1, w2b.1, t2));
        match pairs {
            (Some(x), Some(y)) if x.0.rows == y.0.rows && x.1.cols == y.1.cols => {
                Ok(Self { pairs: [x, y], rank, kernel })
            }
            _ => Err(format!("is of a LoHa whose shapes do not fit together: {shapes}")),
        }
    }

    /// Rows and columns of the update.
    pub fn size(&self) -> (usize, usize) {
        let [(b, a), _] = &self.pairs;
        (b.rows, a.cols)
    }

    pub fn exact_rank(&self) -> usize {
        self.pairs.iter().map(|(_, a)| a.rows).product()
    }

    /// `B[o, (i, j)] = B1[o, i]·B2[o, j]` and `A[(i, j), c] = A1[i, c]·A2[j, c]`: the products of rows and of columns.
    pub fn exact(&self) -> Expanded {
        let [(b1, a1), (b2, a2)] = &self.pairs;
        let n = a2.rows;
        let b = Matrix::from_fn(b1.rows, a1.rows * n, |o, k| b1[(o, k / n)] * b2[(o, k % n)]);
        let a = Matrix::from_fn(a1.rows * n, a1.cols, |k, c| a1[(k / n, c)] * a2[(k % n, c)]);
        Expanded { b, a, cut: 0.0, whole: 0.0 }
    }

    pub fn dense(&self) -> Matrix {
        let [(b1, a1), (b2, a2)] = &self.pairs;
        let (mut w, other) = (product(b1, a1), product(b2, a2));
        w.data.iter_mut().zip(&other.data).for_each(|(w, v)| *w *= v);
        w
    }
}
