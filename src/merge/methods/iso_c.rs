//! Iso-C: give all directions of the sum the same strength.

use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::entry::{
    MethodEntry, MethodOption, Needs, OptionGroup, Options, Takes, Variant, over, tagged, take_own_rule, with,
};
use crate::compute::ops::Svd;
use crate::merge::algebra::{directions, outer, sum, svds};
use crate::merge::cores::{CoreMerge, CoreRule, MergeCores, Space};
use crate::merge::{Method, PlannedLayer};
use crate::{Calibration, Device, Matrix, Result};

pub(super) const ENTRY: MethodEntry = MethodEntry {
    name: "iso-c",
    summary: "Iso-C: give all directions of the sum the same strength, the mean of its singular values",
    notes: "\
Examples:
  loraweld merge iso-c cat.safetensors dog.safetensors -o both.safetensors",
    needs: Needs::Nothing,
    own_rank: false,
    options: &[OptionGroup {
        heading: None,
        options: &[MethodOption::new(
            "mean",
            Takes::Word("MEAN", &[("directions", ""), ("width", "")]),
            "Over what the singular values are averaged: the `directions` of the sum, or the `width` of the layer, min(in, \
             out), the paper's, which is much weaker [default: directions, so that the result is as strong as the sum]",
        )],
    }],
    build,
    variants: &[Variant {
        name: "iso-c-paper",
        aliases: &[],
        whose: Some("As in the authors' code"),
        build: |options, calibration| build(with(options, "mean", "width"), calibration),
    }],
};

fn build<'a>(mut options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    take_own_rule(&mut options, "iso")?;
    Ok(Box::new(CoreMerge::iso_c(over(&Iso::default(), options)?)))
}

/// Options of Iso.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Iso {
    /// Over what singular values are averaged.
    pub mean: IsoMean,
}

/// Over what Iso averages singular values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IsoMean {
    /// Those that are not negligible: the default, and that of Core Space. It keeps the strength of the sum.
    #[default]
    Directions,
    /// All that a layer has room for, min(in, out), most of them zero for LoRAs: the paper's. The result is the default's
    /// times the share of directions that are not zero, much weaker. The authors spread it over all of the others as well,
    /// which are arbitrary for a LoRA and left out.
    Width,
}

impl Iso {
    /// As the authors' code defines it.
    pub fn paper() -> Self {
        Self { mean: IsoMean::Width }
    }
}

impl CoreMerge {
    /// Iso-C.
    pub fn iso_c(options: Iso) -> Self {
        Self::new("iso-c", Space::Core, tagged("iso", &options), CoreRule::Cores(Arc::new(options)))
    }
}

impl MergeCores for Iso {
    /// `σ̄·U·Vᵀ` of `Σ M_k = U·Σ·Vᵀ`, with σ̄ a mean of its singular values.
    fn merged(
        &self,
        device: &Device,
        planned: &[&PlannedLayer],
        cores: &[Vec<Matrix>],
    ) -> Result<Vec<Matrix>> {
        let sums: Vec<Matrix> = cores.par_iter().map(|cores| sum(cores)).collect();
        let svds = svds(device, &sums, |k| planned[k].name.clone())?;
        let iso = |(svd, layer): (&Svd, &&PlannedLayer)| {
            let kept = directions(&svd.values);
            let over = match self.mean {
                IsoMean::Directions => kept,
                IsoMean::Width => layer.input.min(layer.output),
            };
            let mean = svd.values[..kept].iter().sum::<f64>() / over.max(1) as f64;
            outer(&svd.left, &svd.right, &vec![mean; kept])
        };
        Ok(svds.par_iter().zip(planned).map(iso).collect())
    }
}
