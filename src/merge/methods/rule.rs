//! The rules by which Core Space and KnOTS merge.

use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::entry::{MethodOption, OptionGroup, Options, Takes, no_more, over, take};
use super::of_entries::Whose;
use super::{Dare, Iso, Ties, Tsv};
use crate::merge::PlannedLayer;
use crate::merge::algebra::sum;
use crate::merge::cores::{CoreRule, MergeCores};
use crate::{Device, Error, Matrix, Result};

/// How matrices M_1 … M_K of one shape become one.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(tag = "rule", rename_all = "kebab-case")]
pub enum Rule {
    /// `Σ M_k`.
    Sum,
    /// `1/K · Σ M_k`.
    Mean,
    /// TIES, entry by entry.
    Ties(Ties),
    /// DARE, entry by entry.
    Dare(Dare),
    /// TSV: with `M_k = U_k·Σ_k·V_kᵀ`, `P(U)·diag(Σ_1, …, Σ_K)·P(V)ᵀ`, where P(U) is the polar factor of
    /// `[U_1 … U_K]`, the nearest matrix with orthonormal columns. Directions that several share count once.
    Tsv(Tsv),
    /// Iso: `σ̄·U·Vᵀ` of `Σ M_k = U·Σ·Vᵀ`, with σ̄ a mean of its singular values.
    Iso(Iso),
}

/// The option that names the rule.
pub(super) const RULE: OptionGroup = OptionGroup {
    heading: None,
    options: &[MethodOption::new(
        "rule",
        Takes::Word(
            "RULE",
            &[
                ("sum", "Their sum"),
                ("mean", "Their average"),
                ("ties", "Trim small entries, elect signs, average what agrees"),
                ("dare", "Drop entries at random, scale the others up, sum"),
                ("tsv", "Orthogonal singular vectors"),
                ("iso", "Equal singular values"),
            ],
        ),
        "How the cores are merged",
    )
    .default("ties")],
};

impl Rule {
    /// Of options that name it, TIES if they do not. `paper`: TIES as the authors of the method define it.
    pub(super) fn parse(mut options: Options, paper: Ties) -> Result<Self> {
        let whose: Option<Whose> = take(&mut options, "as")?;
        if whose == Some(Whose::Peft) {
            return Err(Error::Invalid(
                "PEFT has neither KnOTS nor Core Space; to merge ties as PEFT does, take the method ties"
                    .into(),
            ));
        }
        let is_paper = whose == Some(Whose::Paper);
        let name: Option<String> = take(&mut options, "rule")?;
        match name.as_deref().unwrap_or("ties") {
            "sum" => no_more(&options).map(|()| Self::Sum),
            "mean" => no_more(&options).map(|()| Self::Mean),
            "ties" => over(&if is_paper { paper } else { Ties::default() }, options).map(Self::Ties),
            "dare" => over(&if is_paper { Dare::paper() } else { Dare::default() }, options).map(Self::Dare),
            "tsv" => over(&if is_paper { Tsv::paper() } else { Tsv::default() }, options).map(Self::Tsv),
            // Core Space averages over the core, as it is here.
            "iso" => over(&Iso::default(), options).map(Self::Iso),
            other => Err(Error::Invalid(format!(
                "its rule is `{other}`, but it is one of sum, mean, ties, dare, tsv, iso"
            ))),
        }
    }

    /// Whether it looks at entries one by one, so that the bases they are in count.
    pub(super) fn is_entrywise(&self) -> bool {
        matches!(self, Self::Ties(_) | Self::Dare(_))
    }

    /// As a report has it among the options.
    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// What it does to cores.
    pub(super) fn in_core(self) -> CoreRule {
        match self {
            Self::Ties(ties) => CoreRule::Entries(ties.into()),
            Self::Dare(dare) => CoreRule::Entries(dare.into()),
            Self::Sum => CoreRule::Cores(Arc::new(Sum)),
            Self::Mean => CoreRule::Cores(Arc::new(Mean)),
            Self::Tsv(tsv) => CoreRule::Cores(Arc::new(tsv)),
            Self::Iso(iso) => CoreRule::Cores(Arc::new(iso)),
        }
    }
}

/// `Σ M_k`.
#[derive(Debug)]
struct Sum;

impl MergeCores for Sum {
    fn merged(&self, _: &Device, _: &[&PlannedLayer], cores: &[Vec<Matrix>]) -> Result<Vec<Matrix>> {
        Ok(cores.par_iter().map(|cores| sum(cores)).collect())
    }
}

/// `1/K · Σ M_k`.
#[derive(Debug)]
struct Mean;

impl MergeCores for Mean {
    fn merged(&self, _: &Device, _: &[&PlannedLayer], cores: &[Vec<Matrix>]) -> Result<Vec<Matrix>> {
        let mean = |cores: &Vec<Matrix>| {
            let (share, mut mean) = (1.0 / cores.len() as f64, sum(cores));
            mean.data.iter_mut().for_each(|v| *v *= share);
            mean
        };
        Ok(cores.par_iter().map(mean).collect())
    }
}
