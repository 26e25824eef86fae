//! The merged updates of some layers, known by their factors and never held whole.

use rayon::prelude::*;

use super::rule::{EntryOptions, Voter};
use crate::compute::ops::{self, Axis, EntryMerger, Factor};
use crate::merge::PlannedLayer;
use crate::power::{exponent, exponent_of, pow2};
use crate::{Device, Result};

/// The merged update M of each of some layers, divided by `2^exponent`, as far as products with it show.
pub(super) struct Sketches {
    pub merger: EntryMerger,
    /// One for each layer.
    pub exponents: Vec<i32>,
}

/// The exponents of a voter's factors, and its factor on the update of factors of size 1.
pub(super) fn sized(voter: &Voter<'_>) -> (i32, i32, f64) {
    let [a, b] = [voter.layer.a(), voter.layer.b()].map(|m| exponent(m).unwrap_or(0));
    (a, b, voter.scale * pow2(a) * pow2(b))
}

impl Sketches {
    /// Of layers, each with its voters, with everything kept. `exponent`: that of the largest factor, by default of each
    /// layer's own.
    pub fn new(
        device: &Device,
        layers: &[&PlannedLayer],
        voters: &[Vec<Voter<'_>>],
        rule: &EntryOptions,
        exponent: Option<i32>,
    ) -> Result<Self> {
        // Factors are brought to size 1 by powers of two, and all updates of a layer by a common one.
        let sizes: Vec<Vec<_>> = voters.par_iter().map(|voters| voters.iter().map(sized).collect()).collect();
        let (mut a, mut b): (Vec<Vec<Factor<'_>>>, Vec<Vec<Factor<'_>>>) = (Vec::new(), Vec::new());
        let (mut rules, mut exponents) = (Vec::new(), Vec::new());
        for ((layer, voters), sizes) in layers.iter().zip(voters).zip(&sizes) {
            let factor = |matrix, size: i32| Factor { matrix, scale: pow2(-size) as f32 };
            let all = || voters.iter().zip(sizes);
            a.push(all().map(|(voter, (size, _, _))| factor(voter.layer.a(), *size)).collect());
            b.push(all().map(|(voter, (_, size, _))| factor(voter.layer.b(), *size)).collect());
            let own = || exponent_of(sizes.iter().fold(0.0, |max, (_, _, s)| s.abs().max(max)));
            let exponent = exponent.unwrap_or_else(own);
            let scales: Vec<f64> = sizes.iter().map(|(_, _, s)| s * pow2(-exponent)).collect();
            rules.push(rule.entries(&layer.key, voters, &scales));
            exponents.push(exponent);
        }
        let joined = |axis, factors: &[Vec<Factor<'_>>]| {
            ops::rank_concat(device, axis, &factors.iter().map(Vec::as_slice).collect::<Vec<_>>())
        };
        let merger = EntryMerger::new(joined(Axis::Rows, &a)?, joined(Axis::Columns, &b)?, rules)?;
        Ok(Self { merger, exponents })
    }
}
