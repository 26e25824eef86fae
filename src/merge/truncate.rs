//! Truncating a merge to a rank.

use std::sync::atomic::{AtomicUsize, Ordering};

use faer::{Mat, MatRef};
use rayon::prelude::*;

use super::Merged;
use crate::{Adapter, Control, Error, Layer, Matrix, RawMatrix, Result};

impl Merged {
    /// Truncates every layer of a higher rank to `rank`, by the singular value decomposition of its update: nothing of
    /// that rank is nearer to it. `B = Q_b·R_b`, `Aᵀ = Q_a·R_a`, `R_b·R_aᵀ = U·S·Vᵀ`; then `B' = Q_b·U·√S` and
    /// `A' = √S·Vᵀ·Q_aᵀ` of the largest `rank` values, in f64 on the CPU, rounded to f32.
    ///
    /// The report tells what is cut off ([`LayerReport::cut`](super::LayerReport::cut)); its losses stay those of the
    /// merge before.
    ///
    /// # Errors
    /// [`Error::Invalid`] for rank 0; [`Error::Layer`] if a decomposition fails; [`Error::Cancelled`].
    pub fn truncated(self, rank: usize, control: &Control<'_>) -> Result<Self> {
        if rank == 0 {
            return Err(Error::Invalid("a rank is 1 or more".into()));
        }
        let Self { adapter, mut report } = self;
        let mut layers = adapter.layers().to_vec();
        let (mut cut, mut whole, mut worst, mut count) = (0.0, 0.0, (0.0, String::new()), 0);
        let total = layers.len();
        let done = AtomicUsize::new(0);
        let results: Vec<Truncated> = layers
            .par_iter()
            .map(|layer| {
                control.step("truncate", &layer.name(), done.fetch_add(1, Ordering::Relaxed), total)?;
                truncated(layer, rank)
            })
            .collect::<Result<_>>()?;
        for ((layer, report), result) in layers.iter_mut().zip(&mut report.layers).zip(results) {
            let Truncated { layer: smaller, cut: rest, whole: all } = result;
            whole += all;
            let Some(smaller) = smaller else { continue };
            *layer = smaller;
            report.rank = rank;
            let share = if all > 0.0 { (rest / all).sqrt() } else { 0.0 };
            report.cut = Some(share);
            cut += rest;
            count += 1;
            if share >= worst.0 {
                worst = (share, report.layer.clone());
            }
        }
        control.finish("truncate", total);
        if count > 0 {
            let share = if whole > 0.0 { 100.0 * f64::sqrt(cut / whole) } else { 0.0 };
            report.notes.push(format!(
                "{count} of {total} layers were truncated to rank {rank}, which cuts off {share:.1} % of the update, \
                 and {:.1} % of `{}`; losses are those before that",
                100.0 * worst.0,
                worst.1
            ));
        }
        let mut metadata = adapter.metadata().clone();
        metadata.insert("loraweld.rank".into(), rank.to_string());
        let adapter = Adapter::new(adapter.name(), adapter.format(), layers)?
            .spelled_like(&adapter)
            .with_metadata(metadata);
        Ok(Self { adapter, report })
    }
}

struct Truncated {
    /// `None` if its rank is low enough.
    layer: Option<Layer>,
    /// Squared norms of what is cut off, and of the whole update.
    cut: f64,
    whole: f64,
}

fn truncated(layer: &Layer, rank: usize) -> Result<Truncated> {
    let (a, b) = (wide(layer.a(), 1.0), wide(layer.b(), layer.scale.value));
    let (qr_a, qr_b) = (a.transpose().qr(), b.qr());
    let core = qr_b.thin_R() * qr_a.thin_R().transpose();
    let whole = core.squared_norm_l2();
    if layer.rank <= rank {
        return Ok(Truncated { layer: None, cut: 0.0, whole });
    }
    let svd = core
        .thin_svd()
        .map_err(|e| Error::layer(layer.name(), format!("its singular values cannot be computed: {e:?}")))?;
    let values = svd.S().column_vector();
    // A layer may have fewer inputs or outputs than that.
    let kept = rank.min(values.nrows());
    let root = |i: usize| if i < kept { values[i].sqrt() } else { 0.0 };
    let u = Mat::from_fn(core.nrows(), rank, |i, j| if j < kept { svd.U()[(i, j)] * root(j) } else { 0.0 });
    let v = Mat::from_fn(core.ncols(), rank, |i, j| if j < kept { svd.V()[(i, j)] * root(j) } else { 0.0 });
    let (b, a) = (qr_b.compute_thin_Q() * u, qr_a.compute_thin_Q() * v);
    let cut = (kept..values.nrows()).map(|i| values[i] * values[i]).sum();
    let layer = layer.replaced(narrow(a.transpose()), narrow(b.as_ref()))?;
    Ok(Truncated { layer: Some(layer), cut, whole })
}

fn wide(m: RawMatrix<'_>, scale: f64) -> Mat<f64> {
    let values: Vec<f64> = m.to_vec();
    Mat::from_fn(m.rows, m.cols, |i, j| scale * values[i * m.cols + j])
}

fn narrow(m: MatRef<'_, f64>) -> Matrix<f32> {
    Matrix::from_fn(m.nrows(), m.ncols(), |i, j| m[(i, j)] as f32)
}
