//! What a layer is multiplied by. Trainers record it in different places; the most specific one wins.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use regex_lite::Regex;
use serde_json::{Map, Value};

use super::keys::LayerKey;
use crate::{Error, Result};

/// The factor in `ΔW = scale · B · A`, and where it came from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// The factor. Zero is legal: a layer that is switched off.
    pub value: f64,
    /// Alpha as the file gives it.
    pub alpha: Option<f64>,
    /// Where alpha was found.
    pub rule: ScaleRule,
    /// Whether alpha is divided by √rank (rsLoRA) instead of by the rank.
    pub rank_stabilized: bool,
}

/// Where a layer's scale was found, in order of precedence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScaleRule {
    /// Told when the file was opened ([`OpenOptions::alpha`](super::OpenOptions::alpha)).
    Override,
    /// An alpha tensor beside the layer's factors.
    AlphaTensor,
    /// `lora_adapter_metadata` in the file's header.
    AdapterMetadata,
    /// `adapter_config.json` beside the file.
    AdapterConfig,
    /// `lora_alpha`, `network_alpha` or `alpha` in the file's header.
    FlatMetadata,
    /// `ss_network_alpha` in the file's header.
    NetworkAlpha,
    /// Nothing says so: alpha = rank.
    Default,
    /// Set by the program, not by a file.
    Given,
}

impl fmt::Display for ScaleRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Override => "--alpha",
            Self::AlphaTensor => "alpha tensor",
            Self::AdapterMetadata => "lora_adapter_metadata",
            Self::AdapterConfig => "adapter_config.json",
            Self::FlatMetadata => "alpha in the metadata",
            Self::NetworkAlpha => "ss_network_alpha",
            Self::Default => "none given, alpha = rank",
            Self::Given => "computed",
        })
    }
}

impl Scale {
    /// A scale that no file gave.
    pub(super) fn given(value: f64) -> Self {
        Self { value, alpha: None, rule: ScaleRule::Given, rank_stabilized: false }
    }

    fn new(alpha: f64, rank: usize, rule: ScaleRule, rank_stabilized: bool) -> Self {
        let divisor = if rank_stabilized { (rank as f64).sqrt() } else { rank as f64 };
        Self { value: alpha / divisor, alpha: Some(alpha), rule, rank_stabilized }
    }
}

/// The part of a PEFT configuration that bears on scales. `r` and `rank_pattern` do not: the tensors' shapes
/// say the ranks themselves.
struct LoraConfig {
    component: String,
    alpha: Option<f64>,
    alpha_pattern: Vec<(Pattern, f64)>,
    rslora: bool,
}

/// A key of `alpha_pattern`: a module's whole name, or its end after a dot, as a regular expression.
struct Pattern {
    text: String,
    regex: Regex,
}

impl Pattern {
    /// As PEFT has it: `^` in front asks for the whole name.
    fn new(text: &str) -> Result<Self, regex_lite::Error> {
        let regex = Regex::new(&format!("^(?:.*\\.)?(?:{text})$"))?;
        Ok(Self { text: text.trim_start_matches('^').trim_end_matches('$').replace("\\.", "."), regex })
    }
}

/// Everything in a file and beside it that says a scale, but for alpha tensors.
pub(super) struct Scales {
    metadata: Vec<LoraConfig>,
    config: Vec<LoraConfig>,
    flat: Option<f64>,
    network: Option<(f64, bool)>,
    told: Option<f64>,
    /// The field that says that it is DoRA.
    pub dora: Option<(PathBuf, String)>,
}

impl Scales {
    /// `config` is the text of an `adapter_config.json` and its path.
    pub fn new(
        path: &Path,
        metadata: &BTreeMap<String, String>,
        config: Option<(&Path, &str)>,
        told: Option<f64>,
    ) -> Result<Self> {
        let mut dora = None;
        let in_header = match metadata.get("lora_adapter_metadata") {
            Some(text) => configs(path, "its `lora_adapter_metadata`", text, &mut dora)?,
            None => Vec::new(),
        };
        let config = match config {
            Some((path, text)) => configs(path, "the file", text, &mut dora)?,
            None => Vec::new(),
        };
        let number = |key: &str| -> Result<Option<f64>> {
            match metadata.get(key).map(|text| text.trim()) {
                None | Some("" | "None" | "null" | "Dynamic") => Ok(None),
                Some(text) => match text.parse::<f64>() {
                    Ok(alpha) if alpha.is_finite() => Ok(Some(alpha)),
                    _ => Err(Error::file(path, format!("`{key}` in its metadata is `{text}`, not a number"))),
                },
            }
        };
        let mut flat = None;
        for key in ["lora_alpha", "network_alpha", "alpha"] {
            flat = flat.or(number(key)?);
        }
        let rslora = metadata
            .get("ss_network_args")
            .and_then(|text| serde_json::from_str::<Map<String, Value>>(text).ok())
            .and_then(|args| args.get("rs_lora").map(truthy));
        let network = number("ss_network_alpha")?.map(|alpha| (alpha, rslora.unwrap_or(false)));
        Ok(Self { metadata: in_header, config, flat, network, told, dora })
    }

    /// The scale of one layer. An alpha tensor is always divided by the rank: LyCORIS, the one writer of both
    /// alpha tensors and rsLoRA, stores an alpha that makes up for it.
    pub fn of(&self, key: &LayerKey, module: &str, rank: usize, alpha_tensor: Option<f64>) -> Scale {
        if let Some(alpha) = self.told {
            return Scale::new(alpha, rank, ScaleRule::Override, false);
        }
        if let Some(alpha) = alpha_tensor {
            return Scale::new(alpha, rank, ScaleRule::AlphaTensor, false);
        }
        let configs =
            [(&self.metadata, ScaleRule::AdapterMetadata), (&self.config, ScaleRule::AdapterConfig)];
        for (configs, rule) in configs {
            if let Some((alpha, rslora)) = configured(configs, key, module) {
                return Scale::new(alpha, rank, rule, rslora);
            }
        }
        if let Some(alpha) = self.flat {
            return Scale::new(alpha, rank, ScaleRule::FlatMetadata, false);
        }
        match self.network {
            Some((alpha, rslora)) => Scale::new(alpha, rank, ScaleRule::NetworkAlpha, rslora),
            None => Scale { value: 1.0, alpha: None, rule: ScaleRule::Default, rank_stabilized: false },
        }
    }
}

/// Alpha of a layer by its component's configuration, and whether it is an rsLoRA.
fn configured(configs: &[LoraConfig], key: &LayerKey, module: &str) -> Option<(f64, bool)> {
    // The main model is called `transformer` or `unet`; a configuration without a name is for every layer.
    let config = configs
        .iter()
        .find(|c| match key.component() {
            "" => !c.component.is_empty() && !c.component.starts_with("text_encoder"),
            component => c.component == component,
        })
        .or_else(|| configs.iter().find(|c| c.component.is_empty()))?;
    let patterns = &config.alpha_pattern;
    let exact = patterns.iter().find(|(p, _)| p.text == module);
    let matching = || patterns.iter().find(|(p, _)| p.regex.is_match(module));
    let alpha = exact.or_else(matching).map(|(_, alpha)| *alpha).or(config.alpha)?;
    Some((alpha, config.rslora))
}

/// Reads a PEFT configuration, or several in one object, told apart by `<component>.` before each field.
fn configs(
    path: &Path,
    what: &str,
    text: &str,
    dora: &mut Option<(PathBuf, String)>,
) -> Result<Vec<LoraConfig>> {
    let fail = |reason: String| Error::file(path, reason);
    let fields: Map<String, Value> = serde_json::from_str(text)
        .map_err(|e| fail(format!("{what} should hold a JSON object with PEFT's configuration: {e}")))?;
    let mut configs: Vec<LoraConfig> = Vec::new();
    for (key, value) in &fields {
        let (component, field) = key.rsplit_once('.').unwrap_or(("", key));
        let i = configs.iter().position(|c| c.component == component).unwrap_or_else(|| {
            let component = component.to_owned();
            configs.push(LoraConfig { component, alpha: None, alpha_pattern: Vec::new(), rslora: false });
            configs.len() - 1
        });
        let wrong = || fail(format!("{what}: `{key}` is {value}, which makes no sense there"));
        let config = &mut configs[i];
        match field {
            // PEFT calls it `alpha` for LoHa and LoKr.
            "lora_alpha" | "alpha" if !value.is_null() => {
                config.alpha = Some(value.as_f64().ok_or_else(wrong)?)
            }
            "alpha_pattern" if !value.is_null() => {
                for (pattern, alpha) in value.as_object().ok_or_else(wrong)? {
                    let regex = Pattern::new(pattern).map_err(|e| {
                        fail(format!(
                            "{what}: `{key}` holds `{pattern}`, which is no regular expression: {e}"
                        ))
                    })?;
                    config.alpha_pattern.push((regex, alpha.as_f64().ok_or_else(wrong)?));
                }
            }
            "use_rslora" => config.rslora = truthy(value),
            "use_dora" if truthy(value) => *dora = Some((path.to_owned(), key.clone())),
            "peft_type" if value.as_str().is_some_and(|kind| !["LORA", "LOHA", "LOKR"].contains(&kind)) => {
                return Err(fail(format!("{what}: `{key}` is {value}; supported are LORA, LOHA and LOKR")));
            }
            _ => {}
        }
    }
    Ok(configs)
}

fn truthy(value: &Value) -> bool {
    value.as_bool().unwrap_or(false) || value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("true"))
}
