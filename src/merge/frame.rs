//! Coordinates of a layer's ranks that do not depend on how its files split their updates.

use std::ops::Range;

use rayon::prelude::*;

use super::algebra::{revealed, times};
use super::members::blocks;
use crate::compute::ops::{Root, Side, Stacks};
use crate::{Device, Layer, Matrix, RawMatrix, Result};

/// `A_cat = L·Ā` with `L = blockdiag(L_1, …, L_K)`, such that the rows of each Ā_k are orthonormal.
///
/// An adapter may be written as `(B·D, D⁻¹·A)` for any D without doing anything else than before. Ā knows nothing of D,
/// but for a rotation of each block.
pub(super) struct Frame {
    /// `C = A_cat·A_catᵀ`, R × R, as the files have it.
    pub gram: Matrix,
    blocks: Vec<Block>,
}

struct Block {
    /// The adapter's rows of A_cat.
    rows: Range<usize>,
    /// L_k, r × r. The columns of directions that A_k lacks are zero.
    left: Matrix,
    /// L_k⁺. The rows of directions that A_k lacks are zero.
    inverse: Matrix,
    /// How many directions A_k has; they come first.
    rank: usize,
}

impl Frame {
    /// Of each layer, which is given as its members.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    pub fn new(device: &Device, layers: &[&[(&Layer, f64)]]) -> Result<Vec<Self>> {
        Self::on(device, Side::Input, layers)
    }

    /// Of what the members of each layer read, or with [`Side::Output`] write: the transpose of B in place of A.
    pub fn on(device: &Device, side: Side, layers: &[&[(&Layer, f64)]]) -> Result<Vec<Self>> {
        let factor: fn(&Layer) -> RawMatrix<'_> = match side {
            Side::Input => Layer::a,
            Side::Output => Layer::b,
        };
        let factors: Vec<Vec<RawMatrix<'_>>> =
            layers.iter().map(|members| members.iter().map(|(layer, _)| factor(layer)).collect()).collect();
        let grams = Stacks::new(device, side, factors)?.grams(device)?;
        let one = |(gram, members): (Matrix, &&[(&Layer, f64)])| Self::of(device, gram, &blocks(members));
        Ok(grams.into_par_iter().zip(layers).map(one).collect())
    }

    /// Of a layer whose `A_cat·A_catᵀ` this is, and these the rows of each A_k.
    pub fn of(device: &Device, gram: Matrix, rows: &[Range<usize>]) -> Self {
        let blocks = rows.iter().map(|rows| Block::new(device, &gram, rows.clone())).collect();
        Self { gram, blocks }
    }

    /// Statistics of `A_cat·x`, as those of `Ā·x`: `L⁺·M·L⁺ᵀ`.
    pub fn inputs(&self, m: &Matrix) -> Matrix {
        self.on_rows(&self.on_rows(m, |b| b.inverse.clone()).transposed(), |b| b.inverse.clone()).transposed()
    }

    /// `B_catᵀ·B_cat`, as that of `B_cat·L`: `Lᵀ·M·L`.
    pub fn outputs(&self, m: &Matrix) -> Matrix {
        let left = |b: &Block| b.left.transposed();
        self.on_rows(&self.on_rows(m, left).transposed(), left).transposed()
    }

    /// A router between `B_cat·L` and Ā, as one between B_cat and A_cat: `L·M·L⁺`.
    pub fn router(&self, m: &Matrix) -> Matrix {
        let left = self.on_rows(m, |b| b.left.clone());
        self.on_rows(&left.transposed(), |b| b.inverse.transposed()).transposed()
    }

    /// L_k.
    pub fn left(&self, member: usize) -> &Matrix {
        &self.blocks[member].left
    }

    /// How many directions one adapter has.
    pub fn rank_of(&self, member: usize) -> usize {
        self.blocks[member].rank
    }

    /// How many directions the adapters have, each counted for itself.
    pub fn rank(&self) -> usize {
        self.blocks.iter().map(|block| block.rank).sum()
    }

    /// The places in Ā of directions that an adapter lacks.
    pub fn lacking(&self) -> impl Iterator<Item = usize> {
        self.blocks.iter().flat_map(|block| block.rows.start + block.rank..block.rows.end)
    }

    /// `blockdiag(T_1, …, T_K)·M`.
    fn on_rows(&self, m: &Matrix, t: impl Fn(&Block) -> Matrix) -> Matrix {
        let part = |rows: &Range<usize>| Matrix {
            rows: rows.len(),
            cols: m.cols,
            data: m.data[rows.start * m.cols..rows.end * m.cols].to_vec(),
        };
        let data = self.blocks.iter().flat_map(|block| times(&t(block), &part(&block.rows)).data).collect();
        Matrix { rows: m.rows, cols: m.cols, data }
    }
}

impl Block {
    fn new(device: &Device, gram: &Matrix, rows: Range<usize>) -> Self {
        let n = rows.len();
        let own = Matrix::from_fn(n, n, |i, j| gram[(rows.start + i, rows.start + j)]);
        if let Some(Root { left, inverse, .. }) = Root::new(device, &own) {
            return Self { rows, left, inverse, rank: n };
        }
        let (left, inverse, rank) = revealed(&own);
        Self { rows, left, inverse, rank }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of very different size, of which the last is the sum of the others.
    fn dependent() -> Layer {
        let a = Matrix::new(
            3,
            4,
            vec![1024.0f32, 0.0, 512.0, 0.0, 0.0, 0.5, 0.0, -0.25, 1024.0, 0.5, 512.0, -0.25],
        );
        let b = Matrix::new(2, 3, vec![1.0f32; 6]);
        Layer::new("layer", a.unwrap(), b.unwrap()).unwrap()
    }

    #[test]
    fn rows_become_orthonormal_whatever_their_size() {
        let (first, second) = (dependent(), dependent());
        let frames = Frame::new(&Device::cpu(), &[&[(&first, 1.0), (&second, 2.0)]]).unwrap();
        let frame = &frames[0];
        assert_eq!((frame.rank(), frame.lacking().collect::<Vec<_>>()), (4, vec![2, 5]));
        let own = frame.inputs(&frame.gram);
        for i in 0..6 {
            for j in 0..6 {
                // Both adapters are the same, so that their directions are, too.
                let want = f64::from(u8::from(i % 3 == j % 3 && i % 3 < 2));
                // Sums of few terms in f64, over a condition of 1e6 that scaling takes away.
                assert!((own[(i, j)] - want).abs() < 1e-9, "{i} {j}: {}", own[(i, j)]);
            }
        }
        // What a router does to A_cat stays what it is: L·L⁺·A = A.
        let identity = Matrix::from_fn(6, 6, |i, j| f64::from(u8::from(i == j)));
        let (through, c) = (frame.router(&identity), &frame.gram);
        let back = times(&through, c);
        let error = back.data.iter().zip(&c.data).map(|(b, c)| (b - c).abs()).fold(0.0, f64::max);
        // As above, in units of the largest entry.
        assert!(error < 1e-9 * c[(0, 0)], "{error}");
    }
}
