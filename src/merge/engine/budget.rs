//! One budget of ranks, bytes or loss for a whole file, spent where it counts most.

use serde::{Deserialize, Serialize};

use crate::words::count;
use crate::{Error, Result};

/// What all layers of a file may cost together, each of which keeps at least one rank.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Budget {
    /// As few ranks as lose no more than this by it: the root of the mean over layers of what is cut off, as a share of what
    /// merging nothing loses there.
    Loss(f64),
    /// So many ranks.
    Ranks(usize),
    /// So many bytes of factors.
    Bytes(u64),
}

/// What a layer may keep, and what each rank of it costs.
pub(super) struct Layer {
    /// The squares of its singular values, descending, as shares of what merging nothing loses; those beyond reach left out.
    pub shares: Vec<f64>,
    /// Bytes of a rank.
    pub bytes: u64,
}

impl Budget {
    pub(crate) fn check(&self) -> Result<()> {
        match *self {
            Self::Loss(x) if !(x > 0.0 && x.is_finite()) => {
                Err(Error::Invalid(format!("loss: {x}, but it must be above 0 and finite")))
            }
            _ => Ok(()),
        }
    }

    /// Of a rank of a layer.
    fn cost(&self, layer: &Layer) -> u64 {
        match self {
            Self::Ranks(_) => 1,
            Self::Loss(_) | Self::Bytes(_) => layer.bytes.max(1),
        }
    }

    /// How many ranks each layer keeps.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is less than one rank for each.
    pub(super) fn spent(&self, layers: &[Layer]) -> Result<Vec<usize>> {
        let cost = |layer: &Layer| self.cost(layer);
        let mut kept: Vec<usize> = layers.iter().map(|layer| layer.shares.len().min(1)).collect();
        let least: u64 = layers.iter().zip(&kept).map(|(layer, kept)| *kept as u64 * cost(layer)).sum();
        // Values descend within a layer and cost the same, so that what is worth most comes in order there.
        let mut worth: Vec<(f64, usize)> = layers
            .iter()
            .enumerate()
            .flat_map(|(i, layer)| {
                layer.shares.iter().skip(1).map(move |share| (share / cost(layer) as f64, i))
            })
            .collect();
        worth.sort_by(|x, y| y.0.total_cmp(&x.0));
        let room = match *self {
            Self::Loss(most) => {
                let most = most * most * layers.len() as f64;
                let mut lost = 0.0;
                let share = |&&(worth, i): &&(f64, usize)| {
                    lost += worth * cost(&layers[i]) as f64;
                    lost <= most
                };
                let dropped = worth.iter().rev().take_while(share).count();
                for (_, i) in &worth[..worth.len() - dropped] {
                    kept[*i] += 1;
                }
                return Ok(kept);
            }
            Self::Ranks(ranks) => ranks as u64,
            Self::Bytes(bytes) => bytes,
        };
        let Some(mut room) = room.checked_sub(least) else {
            let (what, of) = match self {
                Self::Ranks(_) => ("ranks", count(layers.len(), "layer")),
                _ => ("bytes", count(layers.len(), "layer")),
            };
            return Err(Error::Invalid(format!(
                "a budget of {room} {what} is too small: one rank for each of {of} takes {least}"
            )));
        };
        let mut full = vec![false; layers.len()];
        for (_, i) in worth {
            let cost = cost(&layers[i]);
            full[i] |= cost > room;
            if !full[i] {
                room -= cost;
                kept[i] += 1;
            }
        }
        Ok(kept)
    }

    /// What an even cut keeps that costs no more: of each layer the same rank.
    pub(super) fn even(&self, layers: &[Layer], kept: &[usize]) -> usize {
        let cost = |rank: usize| -> u64 {
            layers.iter().map(|layer| rank.min(layer.shares.len()) as u64 * self.cost(layer)).sum()
        };
        let spent: u64 = layers.iter().zip(kept).map(|(layer, kept)| *kept as u64 * self.cost(layer)).sum();
        let most = layers.iter().map(|layer| layer.shares.len()).max().unwrap_or(0);
        (1..=most).take_while(|&rank| cost(rank) <= spent).last().unwrap_or(1)
    }

    /// The root of the mean of what layers lose that keep so many ranks.
    pub(super) fn lost(layers: &[Layer], kept: impl Fn(usize) -> usize) -> f64 {
        let of = |(i, layer): (usize, &Layer)| layer.shares.iter().skip(kept(i)).sum::<f64>();
        (layers.iter().enumerate().map(of).sum::<f64>() / layers.len().max(1) as f64).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers() -> Vec<Layer> {
        vec![
            Layer { shares: vec![0.5, 0.25, 0.01], bytes: 10 },
            Layer { shares: vec![0.4, 0.04, 0.04], bytes: 30 },
            Layer { shares: vec![0.3], bytes: 10 },
        ]
    }

    #[test]
    fn a_budget_goes_where_it_counts_most() {
        let spent = |budget: Budget| budget.spent(&layers()).unwrap();
        assert_eq!(spent(Budget::Ranks(3)), [1, 1, 1]);
        assert_eq!(spent(Budget::Ranks(4)), [2, 1, 1]);
        assert_eq!(spent(Budget::Ranks(6)), [2, 3, 1]);
        assert_eq!(spent(Budget::Ranks(100)), [3, 3, 1]);
        // By worth per byte, the third rank of the first layer falls behind the second of the other.
        assert_eq!(spent(Budget::Bytes(60)), [2, 1, 1]);
        assert_eq!(spent(Budget::Bytes(90)), [2, 2, 1]);
        assert!(Budget::Ranks(2).spent(&layers()).unwrap_err().to_string().contains("takes 3"));
        assert!(Budget::Bytes(49).spent(&layers()).unwrap_err().to_string().contains("takes 50"));
    }

    #[test]
    fn as_few_ranks_as_lose_no_more() {
        for most in [0.05, 0.06, 0.12, 0.17, 0.2, 0.35, 1.0] {
            let kept = Budget::Loss(most).spent(&layers()).unwrap();
            let lost = |kept: &[usize]| Budget::lost(&layers(), |i| kept[i]);
            assert!(lost(&kept) <= most, "{most}: {kept:?}");
            // Whatever else is left out is too much.
            for i in (0..3).filter(|&i| kept[i] > 1) {
                let mut fewer = kept.clone();
                fewer[i] -= 1;
                let last = layers()[i].shares[kept[i] - 1];
                let cheapest = (0..3)
                    .filter(|&j| kept[j] > 1)
                    .map(|j| layers()[j].shares[kept[j] - 1] / layers()[j].bytes as f64);
                let is_next = last / layers()[i].bytes as f64 <= cheapest.fold(f64::INFINITY, f64::min);
                assert!(!is_next || lost(&fewer) > most, "{most}: {fewer:?}");
            }
        }
    }

    #[test]
    fn an_even_cut_costs_no_more() {
        let kept = [2, 3, 1];
        // 120 bytes are spent: rank 2 everywhere takes 90, rank 3 takes 130. Of ranks, six are; rank 3 takes seven.
        assert_eq!(
            (Budget::Bytes(0).even(&layers(), &kept), Budget::Ranks(0).even(&layers(), &kept)),
            (2, 2)
        );
        // What an even cut of rank 2 leaves out, of three layers.
        let lost: f64 = (0.01 + 0.04) / 3.0;
        assert!((Budget::lost(&layers(), |_| 2) - lost.sqrt()).abs() < 1e-15);
    }
}
