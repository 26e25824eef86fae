//! A method's name and its options in JSON.

use loraweld::merge::{After, Options, method};
use loraweld::{Calibration, Control, Device, Merged, SaveOptions, Weighted};

use crate::status::{Failure, Result};

/// How to merge, what to do with the result, and by what to measure it.
pub(crate) struct Method<'a> {
    method: Box<dyn loraweld::Method + 'a>,
    after: After,
    calibration: Option<&'a Calibration>,
}

impl<'a> Method<'a> {
    pub(crate) fn parse(
        name: &str,
        options: Option<&str>,
        calibration: Option<&'a Calibration>,
    ) -> Result<Self> {
        let bad = |e: serde_json::Error| Failure::invalid(format!("options of {name}: {e}"));
        let mut options: Options = serde_json::from_str(options.unwrap_or("{}")).map_err(bad)?;
        let after = After::take(&mut options)?;
        after.check(calibration.is_some())?;
        let method = method(name, options, calibration)?;
        Ok(Self { method, after, calibration })
    }

    /// Merges, changes what is asked for, and measures by the calibration what the method did not.
    pub(crate) fn merge(
        &self,
        device: &Device,
        adapters: &[Weighted<'_>],
        control: Control<'_>,
    ) -> Result<Merged> {
        let merged = self.method.merge_any(device, adapters, control)?;
        let options = SaveOptions::default();
        let merged = self.after.apply(merged, device, adapters, self.calibration, &options, &control)?;
        match self.calibration {
            Some(calibration) if merged.report.losses.is_none() => {
                Ok(merged.measured(calibration, adapters, &control)?)
            }
            _ => Ok(merged),
        }
    }
}

#[cfg(test)]
mod tests {
    use loraweld::{Adapter, Format, Layer, METHODS, Matrix, NpLoraOptions, Rule, SsrOptions, Truncation};

    use super::*;

    fn message(name: &str, options: &str) -> String {
        let adapters = [Adapter::new("a", Format::Peft, vec![layer()]).unwrap()];
        let calibration = Calibration::new(&adapters).unwrap();
        let method = Method::parse(name, Some(options), Some(&calibration));
        method.err().map(|e| format!("{e:?}")).unwrap_or_default()
    }

    fn layer() -> Layer {
        Layer::new("a", Matrix::zeros(1, 1), Matrix::zeros(1, 1)).unwrap()
    }

    fn names() -> impl Iterator<Item = &'static str> {
        METHODS.iter().flat_map(|e| [e.name].into_iter().chain(e.variants.iter().map(|variant| variant.name)))
    }

    #[test]
    fn every_method_has_defaults() {
        for name in names() {
            assert_eq!(message(name, "{}"), "");
            assert_eq!(message(name, r#"{"truncate": {"rank": 4, "spectrum": {"ratio": 50.0}}}"#), "");
            let after =
                r#"{"budget": {"ranks": 9}, "truncate_by": "norm", "calibrate_singular_values": true}"#;
            assert_eq!(message(name, after), "");
            assert!(message(name, r#"{"truncate_by": "size"}"#).contains("data"));
            let wrong = message(name, r#"{"densty": 1}"#);
            assert!(wrong.contains("densty") && wrong.contains(name), "{name}: {wrong}");
        }
    }

    #[test]
    fn what_a_report_says_can_be_given_back() {
        for (name, options) in [
            ("ssr", serde_json::to_value(SsrOptions::published()).unwrap()),
            ("np-lora", serde_json::to_value(NpLoraOptions::default()).unwrap()),
            ("svd", serde_json::to_value(Truncation::rank(3)).unwrap()),
            ("ties", serde_json::json!({"rule": "ties", "density": 0.5, "lambda": 1.0, "rank": 8})),
            ("dare", serde_json::to_value(Rule::Dare(loraweld::Dare::default())).unwrap()),
            ("knots", serde_json::to_value(Rule::Mean).unwrap()),
            ("knots", serde_json::to_value(Rule::Ties(loraweld::Ties::paper())).unwrap()),
            ("core", serde_json::json!({"rule": "ties", "scope": "file", "bases": "factors"})),
            ("tsv", serde_json::to_value(Rule::Tsv(loraweld::Tsv::paper())).unwrap()),
            ("iso-c", serde_json::to_value(Rule::Iso(loraweld::Iso::paper())).unwrap()),
        ] {
            assert_eq!(message(name, &options.to_string()), "", "{name}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(message("mean", "{}").contains("one of ssr,"));
        assert!(message("ssr", "[1]").contains("options of ssr"));
        assert!(message("ssr", "{").contains("EOF"));
        assert!(message("tsv", r#"{"rule": "iso"}"#).contains("its rule is \\\"tsv\\\""));
        assert!(message("ties", r#"{"seed": 1}"#).contains("seed"));
    }
}
