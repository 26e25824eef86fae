//! Norms of updates, without the updates.

use super::Layer;
use crate::RawMatrix;

impl Layer {
    /// Frobenius norm of ΔW: `‖s·B·A‖² = s²·⟨BᵀB, A·Aᵀ⟩`, in f64; NaN if a factor holds one.
    pub fn norm(&self) -> f64 {
        let layer = self.unread();
        let (aa, bb) = (gram(layer.a(), true), gram(layer.b(), false));
        let squared: f64 = aa.iter().zip(&bb).map(|(x, y)| x * y).sum();
        // `max` would make zero of NaN.
        let squared = if squared < 0.0 { 0.0 } else { squared };
        self.scale.value.abs() * squared.sqrt()
    }

    /// The block of the model that it is in: as lists of block strengths have it (`IN04`, `D03`), or the number of the
    /// block in its name; `text_encoder` and the like of text encoders.
    pub fn block(&self) -> String {
        if super::BlockPreset::of(self.family(), None).is_ok() {
            return super::blocks::block(self);
        }
        if !self.key.component().is_empty() {
            return self.key.component().to_owned();
        }
        let mut parts = self.key.flat().split('_').scan(false, |done, part| {
            let last = std::mem::replace(done, part.bytes().all(|b| b.is_ascii_digit()));
            (!last).then_some(part)
        });
        let name = parts.by_ref().collect::<Vec<_>>().join("_");
        if name.ends_with(|c: char| c.is_ascii_digit()) { name } else { "other".to_owned() }
    }
}

/// Products of rows, or of columns, with each other: rank x rank.
fn gram(m: RawMatrix<'_>, rows: bool) -> Vec<f64> {
    let values: Vec<f64> = m.to_vec();
    let n = if rows { m.rows() } else { m.cols() };
    let mut gram = vec![0.0; n * n];
    if rows {
        for i in 0..n {
            for j in 0..=i {
                let (x, y) = (&values[i * m.cols()..][..m.cols()], &values[j * m.cols()..][..m.cols()]);
                let dot = x.iter().zip(y).map(|(x, y)| x * y).sum();
                (gram[i * n + j], gram[j * n + i]) = (dot, dot);
            }
        }
    } else {
        for row in values.chunks_exact(n) {
            for (x, sums) in row.iter().zip(gram.chunks_exact_mut(n)) {
                sums.iter_mut().zip(row).for_each(|(sum, y)| *sum += x * y);
            }
        }
    }
    gram
}
