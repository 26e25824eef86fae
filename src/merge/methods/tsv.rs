//! TSV-Merge: make the singular vectors of the adapters orthogonal to each other.

use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::entry::{
    MethodEntry, MethodOption, Needs, OptionGroup, Options, Takes, Variant, over, tagged, take_own_rule, with,
};
use crate::merge::algebra::{directions, outer, significant, svds};
use crate::merge::cores::{CoreMerge, CoreRule, MergeCores, Space};
use crate::merge::{Method, PlannedLayer};
use crate::{Calibration, Device, Matrix, Result};

pub(super) const ENTRY: MethodEntry = MethodEntry {
    name: "tsv",
    summary: "TSV-Merge: make the singular vectors of the adapters orthogonal to each other, and keep their singular values",
    notes: "\
Examples:
  loraweld merge tsv cat.safetensors dog.safetensors:0.8 -o both.safetensors",
    needs: Needs::Nothing,
    own_rank: false,
    options: &[OptionGroup {
        heading: None,
        options: &[MethodOption::new(
            "keep",
            Takes::Word("KEEP", &[("all", ""), ("share", "")]),
            "Singular values that each adapter keeps: `all`, or `share`, the sum of the ranks divided by the number of \
             adapters, the paper's, which cuts adapters of a higher rank than others [default: all, since LoRAs leave room \
             for them]",
        )],
    }],
    build,
    variants: &[Variant {
        name: "tsv-paper",
        aliases: &[],
        whose: Some("As in the authors' code"),
        build: |options, calibration| build(with(options, "keep", "share"), calibration),
    }],
};

fn build<'a>(mut options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    take_own_rule(&mut options, "tsv")?;
    Ok(Box::new(CoreMerge::tsv(over(&Tsv::default(), options)?)))
}

/// Options of TSV.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tsv {
    /// How many singular values of each adapter are kept.
    pub keep: Keep,
}

/// How many singular values of each adapter TSV keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// All: the default, since LoRAs leave room for all of them.
    #[default]
    All,
    /// The ⌊R/K⌋ largest, where R is the sum of the K ranks, or the layer's smaller side: the paper's, in the core of
    /// LoRAs. It is all of equal ranks; of others it cuts the higher. The authors' code fills up the lower, and all in the
    /// full space, with directions of value zero. Those are what rounding makes of them, and they move the others: noise of
    /// 1e-15 in its input moves its result by as much as the result itself. Here they are left out.
    Share,
}

impl Tsv {
    /// As the authors' code defines it.
    pub fn paper() -> Self {
        Self { keep: Keep::Share }
    }
}

impl CoreMerge {
    /// TSV-Merge.
    pub fn tsv(options: Tsv) -> Self {
        Self::new("tsv", Space::Core, tagged("tsv", &options), CoreRule::Cores(Arc::new(options)))
    }
}

impl MergeCores for Tsv {
    /// With `M_k = U_k·Σ_k·V_kᵀ`, `P(U)·diag(Σ_1, …, Σ_K)·P(V)ᵀ`, where P(U) is the polar factor of `[U_1 … U_K]`.
    fn merged(
        &self,
        device: &Device,
        planned: &[&PlannedLayer],
        cores: &[Vec<Matrix>],
    ) -> Result<Vec<Matrix>> {
        let owners: Vec<usize> =
            cores.iter().enumerate().flat_map(|(i, cores)| vec![i; cores.len()]).collect();
        let flat: Vec<Matrix> = cores.iter().flatten().cloned().collect();
        let own = svds(device, &flat, |k| planned[owners[k]].name.clone())?;
        // Rows of both stacks are the singular vectors of all members; there are at most as many as the order.
        let (mut left, mut right, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (i, cores) in cores.iter().enumerate() {
            let order = cores[0].rows;
            let most = match self.keep {
                Keep::All => order,
                // The core is as large as the ranks together, or as the layer's smaller side.
                Keep::Share => order.min(planned[i].input).min(planned[i].output) / cores.len(),
            };
            let (mut u, mut v, mut s) =
                (Matrix::zeros(order, order), Matrix::zeros(order, order), Vec::new());
            for svd in owners.iter().zip(&own).filter(|(owner, _)| **owner == i).map(|(_, svd)| svd) {
                let kept = directions(&svd.values);
                for k in 0..kept.min(most).min(order - s.len()) {
                    let at = s.len() * order..(s.len() + 1) * order;
                    u.data[at.clone()].copy_from_slice(svd.left.row(k));
                    v.data[at].copy_from_slice(svd.right.row(k));
                    s.push(svd.values[k]);
                }
            }
            left.push(u);
            right.push(v);
            values.push(s);
        }
        let polar = |stacks: &[Matrix]| -> Result<Vec<Matrix>> {
            let svds = svds(device, stacks, |k| planned[k].name.clone())?;
            Ok(svds
                .par_iter()
                .map(|svd| {
                    outer(&svd.left, &svd.right, &vec![1.0; significant(&svd.values, 1e-6 * svd.values[0])])
                })
                .collect())
        };
        let (left, right) = (polar(&left)?, polar(&right)?);
        Ok((0..cores.len()).into_par_iter().map(|i| outer(&left[i], &right[i], &values[i])).collect())
    }
}
