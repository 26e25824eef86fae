//! A method's name and its options in JSON.

use loraweld::{
    Bases, Calibration, Control, CoreMerge, Device, EntryMerge, Linear, Merged, NpLora, NpLoraOptions, Rule,
    Ssr, SsrOptions, SvdMerge, Truncation, Weighted,
};
use serde_json::{Map, Value};

use crate::status::{Failure, Result};

/// How to merge, and to what to truncate the result.
pub(crate) struct Method {
    kind: Kind,
    truncate: Truncation,
}

enum Kind {
    Ssr { options: SsrOptions, data_free: bool },
    NpLora(NpLora),
    Linear,
    Svd(SvdMerge),
    Entries(EntryMerge),
    Core(CoreMerge),
}

const NAMES: &str = "ssr, ssr-data-free, np-lora, linear, svd, ties, dare, knots, core, tsv, iso-c";

type Options = Map<String, Value>;

impl Method {
    pub(crate) fn parse(name: &str, options: Option<&str>) -> Result<Self> {
        let bad = |e: serde_json::Error| Failure::invalid(format!("options of {name}: {e}"));
        let mut options: Options = serde_json::from_str(options.unwrap_or("{}")).map_err(bad)?;
        let truncate = options.remove("truncate").map(serde_json::from_value).transpose().map_err(bad)?;
        let ssr = |data_free| move |options| Kind::Ssr { options, data_free };
        let kind = match name {
            "ssr" | "ssr-data-free" => {
                serde_json::from_value(options.into()).map(ssr(name != "ssr")).map_err(bad)?
            }
            "np-lora" => {
                let options: NpLoraOptions = serde_json::from_value(options.into()).map_err(bad)?;
                Kind::NpLora(NpLora::default().options(options))
            }
            "linear" => {
                known(name, &options, &Options::new())?;
                Kind::Linear
            }
            "svd" => Kind::Svd(SvdMerge::new(serde_json::from_value(options.into()).map_err(bad)?)),
            "ties" | "dare" => {
                let rank: Option<usize> =
                    options.remove("rank").map(serde_json::from_value).transpose().map_err(bad)?.flatten();
                let merge = match rule(name, options, Some(name))? {
                    Rule::Ties(ties) => EntryMerge::ties(ties),
                    Rule::Dare(dare) => EntryMerge::dare(dare),
                    rule => return Err(Failure::internal(format!("{name} has become {rule:?}"))),
                };
                Kind::Entries(match rank {
                    Some(rank) => merge.rank(rank),
                    None => merge,
                })
            }
            "knots" => Kind::Core(CoreMerge::knots(rule(name, options, None)?)),
            "core" => {
                let bases: Option<Bases> =
                    options.remove("bases").map(serde_json::from_value).transpose().map_err(bad)?;
                let merge = CoreMerge::core(rule(name, options, None)?);
                Kind::Core(merge.bases(bases.unwrap_or_default()))
            }
            "tsv" => Kind::Core(match rule(name, options, Some("tsv"))? {
                Rule::Tsv(tsv) => CoreMerge::tsv(tsv),
                rule => return Err(Failure::internal(format!("{name} has become {rule:?}"))),
            }),
            "iso-c" => Kind::Core(match rule(name, options, Some("iso"))? {
                Rule::Iso(iso) => CoreMerge::iso_c(iso),
                rule => return Err(Failure::internal(format!("{name} has become {rule:?}"))),
            }),
            _ => return Err(Failure::invalid(format!("method: `{name}`, but it is one of {NAMES}"))),
        };
        Ok(Self { kind, truncate: truncate.unwrap_or_default() })
    }

    /// Merges, truncates, and measures by the calibration what the method did not.
    pub(crate) fn merge(
        &self,
        device: &Device,
        adapters: &[Weighted<'_>],
        calibration: Option<&Calibration>,
        control: Control<'_>,
    ) -> Result<Merged> {
        let mut merged = match &self.kind {
            Kind::Ssr { options, data_free: true } => {
                Ssr::data_free().options(options.clone()).merge_with(device, adapters, control)
            }
            Kind::Ssr { options, .. } => {
                let calibration = calibration.ok_or_else(|| {
                    Failure::invalid("`calibration` is NULL; ssr takes one (ssr-data-free goes without)")
                })?;
                Ssr::new(calibration).options(options.clone()).merge_with(device, adapters, control)
            }
            Kind::NpLora(method) => method.merge_with(device, adapters[0], &adapters[1..], control),
            Kind::Linear => Linear.merge_with(adapters, control),
            Kind::Svd(method) => method.merge_with(device, adapters, control),
            Kind::Entries(method) => method.merge_with(device, adapters, control),
            Kind::Core(method) => method.merge_with(device, adapters, control),
        }?;
        if !self.truncate.is_none() {
            merged = merged.truncated(device, &self.truncate, &control)?;
        }
        match calibration {
            Some(calibration) if merged.report.losses.is_none() => {
                Ok(merged.measured(calibration, adapters, &control)?)
            }
            _ => Ok(merged),
        }
    }
}

/// The rule of options that may name it: `fixed`, or any, TIES by default.
fn rule(method: &str, mut options: Options, fixed: Option<&str>) -> Result<Rule> {
    let name = options.entry("rule").or_insert_with(|| fixed.unwrap_or("ties").into());
    if let Some(fixed) = fixed
        && name != fixed
    {
        return Err(Failure::invalid(format!("options of {method}: its rule is \"{fixed}\", not {name}")));
    }
    let bad = |e| Failure::invalid(format!("options of {method}: {e}"));
    let rule: Rule = serde_json::from_value(options.clone().into()).map_err(bad)?;
    // Of a rule without options, serde lets any pass.
    if let Ok(Value::Object(takes)) = serde_json::to_value(&rule) {
        known(method, &options, &takes)?;
    }
    Ok(rule)
}

fn known(method: &str, options: &Options, takes: &Options) -> Result<()> {
    match options.keys().find(|key| !takes.contains_key(*key)) {
        Some(key) => Err(Failure::invalid(format!("options of {method}: it takes no `{key}`"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(name: &str, options: &str) -> String {
        Method::parse(name, Some(options)).err().map(|e| format!("{e:?}")).unwrap_or_default()
    }

    #[test]
    fn every_method_has_defaults() {
        for name in NAMES.split(", ") {
            assert!(Method::parse(name, None).is_ok(), "{name}");
            assert_eq!(message(name, r#"{"truncate": {"rank": 4, "spectrum": {"ratio": 50.0}}}"#), "");
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
