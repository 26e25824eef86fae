//! Truncating a merge to a rank.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Merged;
use super::core::{Factored, NEGLIGIBLE, significant, size};
use super::driver::TOO_LARGE;
use crate::{Adapter, Control, Device, Error, Layer, Matrix, Result};

/// How many singular values of an update to keep: the fewest that a limit allows, and at least one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Truncation {
    /// At most this many.
    pub rank: Option<usize>,
    /// As many as this asks for.
    pub spectrum: Option<Spectrum>,
}

/// How many singular values `σ_1 ≥ σ_2 ≥ …` to keep, by their size; as the dynamic methods of kohya's resize script.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spectrum {
    /// Those above `σ_1 / X`, X ≥ 1.
    Ratio(f64),
    /// As few as hold `Σ σ² ≥ X²·‖ΔW‖²`, X in (0, 1].
    Frobenius(f64),
    /// As few as hold `Σ σ ≥ X·Σ_all σ`, X in (0, 1].
    Cumulative(f64),
}

impl Truncation {
    /// To at most a rank.
    pub fn rank(rank: usize) -> Self {
        Self { rank: Some(rank), spectrum: None }
    }

    /// By the size of singular values.
    pub fn spectrum(spectrum: Spectrum) -> Self {
        Self { rank: None, spectrum: Some(spectrum) }
    }

    /// Whether everything is kept.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn check(&self) -> Result<()> {
        let share = |name: &str, x: f64| match x > 0.0 && x <= 1.0 {
            true => Ok(()),
            false => Err(Error::Invalid(format!("sv-{name}: {x}, but it must be above 0 and at most 1"))),
        };
        if self.rank == Some(0) {
            return Err(Error::Invalid("rank: 0, but it must be 1 or more".into()));
        }
        match self.spectrum {
            None => Ok(()),
            Some(Spectrum::Ratio(x)) if x >= 1.0 => Ok(()),
            Some(Spectrum::Ratio(x)) => {
                Err(Error::Invalid(format!("sv-ratio: {x}, but it must be 1 or more")))
            }
            Some(Spectrum::Frobenius(x)) => share("fro", x),
            Some(Spectrum::Cumulative(x)) => share("cumulative", x),
        }
    }

    /// How many of the descending values are kept; those that rounding left of zero are not.
    pub(super) fn kept(&self, values: &[f64]) -> usize {
        let largest = values.first().copied().unwrap_or(0.0);
        let all = significant(values, NEGLIGIBLE * largest);
        // Relative to the largest, so that squares stay in range.
        let enough = |power: i32, share: f64| {
            let of = |v: &f64| (v / largest).powi(power);
            let total: f64 = values[..all].iter().map(of).sum();
            let mut held = 0.0;
            let short = |v: &&f64| {
                let short = held < share * total;
                held += of(v);
                short
            };
            values[..all].iter().take_while(short).count()
        };
        let asked = match self.spectrum {
            None => all,
            Some(Spectrum::Ratio(x)) => significant(values, largest / x).min(all),
            Some(Spectrum::Frobenius(x)) => enough(2, x * x),
            Some(Spectrum::Cumulative(x)) => enough(1, x),
        };
        asked.min(self.rank.unwrap_or(usize::MAX)).max(1)
    }
}

impl Merged {
    /// Truncates every layer of a higher rank to what `truncation` keeps, by the singular value decomposition of its
    /// update: nothing of that rank is nearer to it (Eckart and Young).
    ///
    /// With thin QR `A = L_a·Q_a`, `Bᵀ = L_b·Q_b` and the SVD of the core `s·L_bᵀ·L_a = U·Σ·Vᵀ`, the result is
    /// `A' = Σ^½·Vᵀ·Q_a`, `B' = Q_bᵀ·U·Σ^½` of the largest values. Sums are f64 or double-single, the result is rounded once
    /// to f32. Layers that keep their rank stay as they are.
    ///
    /// The report tells what is cut off ([`LayerReport::cut`](super::LayerReport::cut)); its losses are dropped, since
    /// they were those of the merge before: [`measured`](Self::measured) finds the new ones.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a truncation out of range; [`Error::Layer`] if singular values cannot be found or a factor
    /// overflows f32; [`Error::Device`]; [`Error::Cancelled`].
    pub fn truncated(self, device: &Device, truncation: &Truncation, control: &Control<'_>) -> Result<Self> {
        let start = Instant::now();
        truncation.check()?;
        let Self { adapter, mut report } = self;
        let mut layers = adapter.layers().to_vec();
        // Whether a rank is low enough shows without its singular values; what a spectrum asks for does not.
        let places: Vec<usize> = (0..layers.len())
            .filter(|&i| truncation.spectrum.is_some() || truncation.rank.is_some_and(|n| n < layers[i].rank))
            .collect();
        let (mut cut, mut whole, mut worst, mut count) = (0.0, 0.0, (0.0, String::new()), 0);
        let mut done = 0;
        let room = |i: usize| size(device, layers[i].rank, layers[i].input, layers[i].output);
        for (chunk, on) in super::chunks(device, &places, room) {
            control.step("truncate", &layers[chunk[0]].name(), done, places.len())?;
            done += chunk.len();
            let tasks: Vec<&Layer> = chunk.iter().map(|&i| &layers[i]).collect();
            let results = truncated(&on, &tasks, truncation)?;
            for (i, Truncated { layer, cut: rest, whole: all }) in chunk.into_iter().zip(results) {
                whole += all;
                // Reports and layers are both sorted by key.
                let (Some(layer), Some(report)) = (layer, report.layers.get_mut(i)) else { continue };
                report.rank = layer.rank;
                if on.is_gpu() != device.is_gpu() {
                    report.notes.push(TOO_LARGE.into());
                }
                let share = if all > 0.0 { (rest / all).sqrt() } else { 0.0 };
                report.cut = Some(share);
                cut += rest;
                count += 1;
                if share >= worst.0 {
                    worst = (share, report.layer.clone());
                }
                layers[i] = layer;
            }
        }
        control.finish("truncate", places.len());
        if count > 0 {
            let share = if whole > 0.0 { 100.0 * f64::sqrt(cut / whole) } else { 0.0 };
            report.notes.push(format!(
                "{count} of {} layers were truncated, which cuts off {share:.1} % of their update, and {:.1} % of `{}`",
                layers.len(),
                100.0 * worst.0,
                worst.1
            ));
            report.losses = None;
            report.layers.iter_mut().for_each(|layer| layer.losses = None);
        }
        let mut metadata = adapter.metadata().clone();
        let json = serde_json::to_string(truncation).map_err(|e| Error::Invalid(e.to_string()))?;
        metadata.insert("loraweld.truncation".into(), json);
        let adapter = Adapter::new(adapter.name(), adapter.format(), layers)?
            .spelled_like(&adapter)
            .with_metadata(metadata);
        report.seconds += start.elapsed().as_secs_f64();
        Ok(Self { adapter, report })
    }
}

struct Truncated {
    /// `None` if it keeps its rank.
    layer: Option<Layer>,
    /// Squared norms of what is cut off, and of the whole update.
    cut: f64,
    whole: f64,
}

fn truncated(device: &Device, layers: &[&Layer], truncation: &Truncation) -> Result<Vec<Truncated>> {
    let members: Vec<[(&Layer, f64); 1]> = layers.iter().map(|layer| [(*layer, layer.scale.value)]).collect();
    let members: Vec<&[(&Layer, f64)]> = members.iter().map(|m| &m[..]).collect();
    let factored = Factored::new(device, &members)?;
    let cores: Vec<Matrix> = factored.cores.iter().flatten().cloned().collect();
    let lifted = factored.lifted(device, layers, &cores, truncation)?;
    Ok(layers
        .iter()
        .zip(lifted)
        .map(|(old, new)| {
            let squares = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
            let kept = truncation.kept(&new.values);
            let whole = squares(&new.values);
            match kept < old.rank {
                true => Truncated { layer: Some(new.layer), cut: squares(&new.values[kept..]), whole },
                false => Truncated { layer: None, cut: 0.0, whole },
            }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spectra_keep_the_fewest_that_do() {
        let values = [4.0, 2.0, 1.0, 1.0, 1e-9];
        let by = |spectrum| Truncation::spectrum(spectrum).kept(&values);
        assert_eq!(Truncation::default().kept(&values), 4);
        assert_eq!(Truncation::rank(2).kept(&values), 2);
        assert_eq!(
            (by(Spectrum::Ratio(1.0)), by(Spectrum::Ratio(2.5)), by(Spectrum::Ratio(1e12))),
            (1, 2, 4)
        );
        assert_eq!((by(Spectrum::Cumulative(0.5)), by(Spectrum::Cumulative(0.7))), (1, 2));
        assert_eq!((by(Spectrum::Frobenius(0.85)), by(Spectrum::Frobenius(0.95))), (1, 2));
        assert_eq!((by(Spectrum::Frobenius(1.0)), by(Spectrum::Cumulative(1.0))), (4, 4));
        let both = Truncation { rank: Some(1), spectrum: Some(Spectrum::Cumulative(1.0)) };
        assert_eq!((both.kept(&values), both.kept(&[0.0; 3]), both.kept(&[])), (1, 1, 1));
    }
}
