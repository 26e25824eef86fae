//! What may be done with a merge once it is made, whichever method made it.

use serde::{Deserialize, Serialize};

use super::{Budget, Merged, Options, Truncating, Truncation};
use crate::{Calibration, Control, Device, Error, Result, SaveOptions, Weighted};

/// Options that every method has: what is done with its result.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct After {
    /// [`Merged::singular_values_calibrated`].
    pub calibrate_singular_values: bool,
    /// The most that each layer keeps.
    pub truncate: Truncation,
    /// What all layers may cost together.
    pub budget: Option<Budget>,
    /// What judges what is cut off; by default data, where there is a calibration.
    pub truncate_by: Option<TruncateBy>,
}

/// What judges what a truncation cuts off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TruncateBy {
    /// What it does on recorded inputs.
    Data,
    /// Its size.
    Norm,
}

impl After {
    /// Takes these options out of those of a method.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a value that makes no sense.
    pub fn take(options: &mut Options) -> Result<Self> {
        let keys = ["calibrate_singular_values", "truncate", "budget", "truncate_by"];
        let taken = keys.iter().filter_map(|&key| Some((key.to_owned(), options.remove(key)?)));
        let taken = serde_json::Value::Object(taken.collect());
        serde_json::from_value(taken).map_err(|e| Error::Invalid(format!("the options of every method: {e}")))
    }

    /// Whether the result stays as it is.
    pub fn is_none(&self) -> bool {
        !self.calibrate_singular_values && self.truncate.is_none() && self.budget.is_none()
    }

    /// Refuses what cannot be judged, with a calibration or without one.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check(&self, calibration: bool) -> Result<()> {
        let by_norm = self.truncate_by == Some(TruncateBy::Norm);
        match (self.truncate_by, self.budget) {
            (Some(TruncateBy::Data), _) if !calibration => {
                Err(Error::Invalid("truncating by data needs a calibration of these adapters".into()))
            }
            (_, Some(Budget::Loss(_))) if !calibration || by_norm => Err(Error::Invalid(
                "a budget of loss needs a calibration of these adapters, and to truncate by data".into(),
            )),
            _ => Ok(()),
        }
    }

    /// Does it. `adapters`: those of the merge, at the same strengths; `options`: of the file to be.
    ///
    /// # Errors
    /// As of [`check`](Self::check), [`Merged::singular_values_calibrated`] and [`Merged::truncated_by`].
    pub fn apply(
        &self,
        merged: Merged,
        device: &Device,
        adapters: &[Weighted<'_>],
        calibration: Option<&Calibration>,
        options: &SaveOptions,
        control: &Control<'_>,
    ) -> Result<Merged> {
        self.check(calibration.is_some())?;
        let merged = match self.calibrate_singular_values {
            true => merged.singular_values_calibrated(device, adapters, control)?,
            false => merged,
        };
        let calibration = calibration.filter(|_| self.truncate_by != Some(TruncateBy::Norm));
        let by = Truncating {
            truncation: self.truncate,
            budget: self.budget,
            data: calibration.map(|calibration| (calibration, adapters)),
        };
        if by.is_none() { Ok(merged) } else { merged.truncated_by(&by, options, device, control) }
    }
}
