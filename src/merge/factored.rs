//! Updates in small cores between orthonormal bases of their factors.

use rayon::prelude::*;

use super::PlannedLayer;
use super::algebra::{self, svds, times};
use super::members::finite;
use crate::compute::ops::{self, Qr, ScaledRows, Side, Svd};
use crate::{Device, Layer, Matrix, RawMatrix, Result};

/// The updates of layers in orthonormal bases: `ΔW_k = Q_bᵀ·M_k·Q_a`.
pub(super) struct Factored {
    /// Of the stacked A: `[A_1; …; A_K] = L_a·Q_a`.
    pub a: Qr,
    /// Of the stacked B: `[B_1 … B_K]ᵀ = L_b·Q_b`.
    pub b: Qr,
    /// M_k of each member of each layer, R × R, with its factor.
    pub cores: Vec<Vec<Matrix>>,
}

/// A layer made from a core.
pub(super) struct Lifted {
    pub layer: Layer,
    /// All singular values, descending.
    pub values: Vec<f64>,
}

impl Factored {
    /// Of layers that are given as their members.
    pub fn new(device: &Device, layers: &[&[(&Layer, f64)]]) -> Result<Self> {
        let rows = |side: Side, factor: fn(&Layer) -> RawMatrix<'_>| {
            let stacks: Vec<Vec<RawMatrix<'_>>> = layers
                .iter()
                .map(|members| members.iter().map(|(layer, _)| factor(layer)).collect())
                .collect();
            ops::qr(device, &ScaledRows::new(device, side, &stacks)?)
        };
        let (a, b) = (rows(Side::Input, Layer::a)?, rows(Side::Output, Layer::b)?);
        let cores =
            layers.par_iter().zip(&a.l).zip(&b.l).map(|((members, a), b)| cores(members, a, b)).collect();
        Ok(Self { a, b, cores })
    }

    /// Uᵀ of each layer: the left singular vectors of `[M_1 … M_K]`.
    pub fn left(&self, device: &Device, planned: &[&PlannedLayer]) -> Result<Vec<Matrix>> {
        let stacks: Vec<Matrix> = self
            .cores
            .par_iter()
            .map(|cores| triangle(cores.iter().map(Matrix::transposed)).transposed())
            .collect();
        Ok(svds(device, &stacks, |k| planned[k].name.clone())?
            .into_iter()
            .map(|svd| directions(svd.left, &svd.values))
            .collect())
    }

    /// Vᵀ of each layer: the right singular vectors of `[M_1; …; M_K]`.
    pub fn right(&self, device: &Device, planned: &[&PlannedLayer]) -> Result<Vec<Matrix>> {
        let stacks: Vec<Matrix> =
            self.cores.par_iter().map(|cores| triangle(cores.iter().cloned())).collect();
        Ok(svds(device, &stacks, |k| planned[k].name.clone())?
            .into_iter()
            .map(|svd| directions(svd.right, &svd.values))
            .collect())
    }

    /// Uᵀ of each layer: the left singular vectors of `[s_1·B_1 … s_K·B_K]`, whose transpose is `diag(s)·L_b·Q_b`.
    pub fn left_of_factors(
        &self,
        device: &Device,
        planned: &[&PlannedLayer],
        members: &[&[(&Layer, f64)]],
    ) -> Result<Vec<Matrix>> {
        let scaled = |(l, members): (&Matrix, &&[(&Layer, f64)])| {
            let scales: Vec<f64> =
                members.iter().flat_map(|(layer, scale)| vec![*scale; layer.rank]).collect();
            Matrix::from_fn(l.rows, l.cols, |i, j| scales[i] * l[(i, j)])
        };
        let stacks: Vec<Matrix> = self.b.l.iter().zip(members).map(scaled).collect();
        Ok(svds(device, &stacks, |k| planned[k].name.clone())?
            .into_iter()
            .map(|svd| directions(svd.right, &svd.values))
            .collect())
    }

    /// Vᵀ of each layer: the right singular vectors of `[A_1; …; A_K] = L_a·Q_a`.
    pub fn right_of_factors(&self, device: &Device, planned: &[&PlannedLayer]) -> Result<Vec<Matrix>> {
        let svds = svds(device, &self.a.l, |k| planned[k].name.clone())?;
        Ok(svds.into_iter().map(|svd| directions(svd.right, &svd.values)).collect())
    }

    /// The layers whose cores these are, their singular values shared by both factors: `A = Σ^½·Vᵀ·Q_a`,
    /// `B = Q_bᵀ·U·Σ^½`, of as many singular values as `kept` says of
    /// the layer in this place.
    pub fn lifted(
        &self,
        device: &Device,
        templates: &[&Layer],
        cores: &[Matrix],
        kept: impl Fn(usize, &[f64]) -> usize + Sync,
    ) -> Result<Vec<Lifted>> {
        let svds = svds(device, cores, |k| templates[k].name())?;
        let half = |of: fn(&Svd) -> &Matrix| -> Vec<Matrix> {
            svds.par_iter()
                .enumerate()
                .map(|(k, svd)| {
                    let (vectors, kept) = (of(svd), kept(k, &svd.values));
                    Matrix::from_fn(kept, vectors.cols, |k, i| svd.values[k].sqrt() * vectors[(k, i)])
                })
                .collect()
        };
        let a = ops::rank_update(device, None, &ops::small(device, &half(|svd| &svd.right))?, &self.a.q)?
            .download_f32(device)?;
        let b = ops::rank_update(device, None, &ops::small(device, &half(|svd| &svd.left))?, &self.b.q)?
            .download_f32(device)?;
        templates
            .par_iter()
            .zip(svds)
            .zip(a.into_par_iter().zip(b))
            .map(|((template, svd), (a, b))| {
                Ok(Lifted { layer: finite(template, a, b.transposed())?, values: svd.values })
            })
            .collect()
    }
}

/// `M_k = s_k·L_b,kᵀ·L_a,k` of each member, whose rows of the roots of the stacked factors these are.
pub(super) fn cores(members: &[(&Layer, f64)], a: &Matrix, b: &Matrix) -> Vec<Matrix> {
    let mut end = 0;
    // Factors with more ranks than columns leave the last columns of L zero.
    let used = [a, b].map(Matrix::used_columns);
    let core = |&(layer, scale): &(&Layer, f64)| {
        let rows = end..end + layer.rank;
        end = rows.end;
        let block = |l: &Matrix, used: usize, scale: f64| {
            Matrix::from_fn(rows.len(), used, |r, c| scale * l[(rows.start + r, c)])
        };
        let core = times(&block(b, used[1], scale).transposed(), &block(a, used[0], 1.0));
        if (core.rows, core.cols) == (b.cols, a.cols) {
            return core;
        }
        let value = |i: usize, j: usize| if i < core.rows && j < core.cols { core[(i, j)] } else { 0.0 };
        Matrix::from_fn(b.cols, a.cols, value)
    };
    members.iter().map(core).collect()
}

/// Rows of singular vectors; zero where the value is negligible.
fn directions(mut rows: Matrix, values: &[f64]) -> Matrix {
    rows.data[algebra::directions(values) * rows.cols..].fill(0.0);
    rows
}

/// R of the QR decomposition of stacked square matrices: as many rows as columns, and the same Gram matrix.
fn triangle(blocks: impl Iterator<Item = Matrix>) -> Matrix {
    let mut data = Vec::new();
    let mut order = 0;
    for block in blocks {
        order = block.cols;
        data.extend(block.data);
    }
    let rows = data.len() / order.max(1);
    let stack = faer::MatRef::from_row_major_slice(&data, rows, order);
    let qr = stack.qr();
    let r = qr.thin_R();
    Matrix::from_fn(order, order, |i, j| if i <= j { r[(i, j)] } else { 0.0 })
}

/// (Bytes of the largest buffer, bytes in all) that a layer takes on the device.
pub(super) fn size(device: &Device, rank: usize, input: usize, output: usize) -> (u64, u64) {
    let element = if device.is_gpu() { 4 } else { 8 };
    // A, its two Q, V, the result and a spare; B, its two Q, and B as it comes.
    let all = element * rank * (6 * input + 4 * output) + 8 * 8 * rank * rank;
    ((element * rank * rank.max(input).max(output)) as u64, all as u64)
}
