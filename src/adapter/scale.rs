//! What a layer is multiplied by. Trainers record it in different places; the most specific one wins.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use regex_lite::{Regex, RegexBuilder};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::keys::{LayerKey, is_main_model};
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
    /// Nothing says so: alpha = rank.
    Default,
    /// Set by the program, not by a file.
    Given,
}

impl fmt::Display for ScaleRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Override => "alpha that was asked for",
            Self::AlphaTensor => "alpha tensor",
            Self::AdapterMetadata => "lora_adapter_metadata",
            Self::AdapterConfig => "adapter_config.json",
            Self::FlatMetadata => "alpha in the metadata",
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

/// The part of a PEFT configuration that bears on scales. `r` and `rank_pattern` count only for a LoKr of whole factors:
/// of all others, the tensors' shapes say the ranks themselves.
struct LoraConfig {
    component: String,
    alpha: Option<f64>,
    alpha_pattern: Vec<(Pattern, f64)>,
    rank: Option<f64>,
    rank_pattern: Vec<(Pattern, f64)>,
    rslora: bool,
}

/// A key of `alpha_pattern`: a module's whole name, or its end after a dot, as a regular expression.
struct Pattern {
    text: String,
    regex: Regex,
}

/// Patterns of a configuration, and how many of them may be held against how many modules; there are about as many as
/// modules at most.
const MAX_PATTERNS: usize = 1 << 13;
const MAX_MATCHES: usize = 1 << 22;
/// Bytes that a pattern may take when it is compiled.
const MAX_PATTERN: usize = 1 << 17;
/// Components that a configuration may tell apart, and its fields in all; PEFT has some 50 of each component.
const MAX_COMPONENTS: usize = 64;
const MAX_FIELDS: usize = 1 << 13;

impl Pattern {
    /// As PEFT has it: `^` in front asks for the whole name.
    fn new(text: &str) -> Result<Self, regex_lite::Error> {
        let mut regex = RegexBuilder::new(&format!("^(?:.*\\.)?(?:{text})$"));
        let regex = regex.size_limit(MAX_PATTERN).build()?;
        Ok(Self { text: text.trim_start_matches('^').trim_end_matches('$').replace("\\.", "."), regex })
    }
}

/// Everything in a file and beside it that says a scale, but for alpha tensors.
pub(super) struct Scales {
    metadata: Vec<LoraConfig>,
    config: Vec<LoraConfig>,
    flat: Option<f64>,
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
                // `auto` is the rank.
                None | Some("" | "None" | "null" | "Dynamic" | "auto") => Ok(None),
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
        Ok(Self { metadata: in_header, config, flat, told, dora })
    }

    /// Fails if there are more patterns than could be held against so many modules in reasonable time.
    pub fn check_work(&self, path: &Path, modules: usize) -> Result<()> {
        let patterns: usize = self
            .metadata
            .iter()
            .chain(&self.config)
            .map(|config| config.alpha_pattern.len() + config.rank_pattern.len())
            .sum();
        if patterns <= MAX_PATTERNS && patterns.saturating_mul(modules) <= MAX_MATCHES {
            return Ok(());
        }
        Err(Error::file(
            path,
            format!(
                "its configuration holds {patterns} patterns for {modules} modules; at most {MAX_PATTERNS} are allowed, \
                 and {MAX_MATCHES} times a pattern and a module"
            ),
        ))
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
        let configured = |(config, rule): (&LoraConfig, ScaleRule)| {
            Some(Scale::new(config.alpha(module)?, rank, rule, config.rslora))
        };
        if let Some(scale) = self.configs_of(key).find_map(configured) {
            return scale;
        }
        match self.flat {
            Some(alpha) => Scale::new(alpha, rank, ScaleRule::FlatMetadata, false),
            // `ss_network_alpha` is no scale: converters that fold alpha into the factors leave it in the header,
            // and no loader reads it.
            None => Scale { value: 1.0, alpha: None, rule: ScaleRule::Default, rank_stabilized: false },
        }
    }

    /// The scale of a LoKr of two whole factors, whose shapes tell no rank. LyCORIS and ComfyUI give it none, PEFT that
    /// of its configuration.
    pub fn of_config(&self, key: &LayerKey, module: &str) -> Scale {
        let scale = self.configs_of(key).find_map(|(config, rule)| {
            let (alpha, rank) = (config.alpha(module)?, config.rank(module)?);
            let divisor = if config.rslora { rank.sqrt() } else { rank };
            Some(Scale { value: alpha / divisor, alpha: Some(alpha), rule, rank_stabilized: config.rslora })
        });
        scale.unwrap_or(Scale { value: 1.0, alpha: None, rule: ScaleRule::Default, rank_stabilized: false })
    }

    /// The configurations of a layer's component, in order of precedence.
    fn configs_of(&self, key: &LayerKey) -> impl Iterator<Item = (&LoraConfig, ScaleRule)> {
        let configs =
            [(&self.metadata, ScaleRule::AdapterMetadata), (&self.config, ScaleRule::AdapterConfig)];
        configs.into_iter().filter_map(|(configs, rule)| {
            // The main model is called `transformer` or `unet`; a configuration without a name is for every layer.
            let of_component = configs.iter().find(|c| match key.component() {
                "" => !c.component.is_empty() && is_main_model(&c.component),
                component => c.component == component,
            });
            Some((of_component.or_else(|| configs.iter().find(|c| c.component.is_empty()))?, rule))
        })
    }
}

impl LoraConfig {
    /// Whether both say the same of every layer.
    fn says_what(&self, other: &Self) -> bool {
        fn texts(patterns: &[(Pattern, f64)]) -> Vec<(&str, f64)> {
            patterns.iter().map(|(pattern, value)| (pattern.text.as_str(), *value)).collect()
        }
        let numbers = |c: &Self| (c.alpha, c.rank, c.rslora);
        numbers(self) == numbers(other)
            && texts(&self.alpha_pattern) == texts(&other.alpha_pattern)
            && texts(&self.rank_pattern) == texts(&other.rank_pattern)
    }

    fn alpha(&self, module: &str) -> Option<f64> {
        matching(&self.alpha_pattern, module).or(self.alpha)
    }

    fn rank(&self, module: &str) -> Option<f64> {
        matching(&self.rank_pattern, module).or(self.rank).filter(|rank| *rank > 0.0)
    }
}

/// What a pattern says of a module: the one that is its whole name, or else the first that matches.
fn matching(patterns: &[(Pattern, f64)], module: &str) -> Option<f64> {
    let exact = patterns.iter().find(|(p, _)| p.text == module);
    exact.or_else(|| patterns.iter().find(|(p, _)| p.regex.is_match(module))).map(|(_, value)| *value)
}

/// Reads a PEFT configuration, or several in one object, told apart by `<component>.` before each field.
fn configs(
    path: &Path,
    what: &str,
    text: &str,
    dora: &mut Option<(PathBuf, String)>,
) -> Result<Vec<LoraConfig>> {
    let fail = |reason: String| Error::file(path, reason);
    let Fields::<MAX_FIELDS>(fields) = serde_json::from_str(text)
        .map_err(|e| fail(format!("{what} should hold a JSON object with PEFT's configuration: {e}")))?;
    let mut configs: Vec<LoraConfig> = Vec::new();
    for (key, value) in &fields {
        let (component, field) = key.rsplit_once('.').unwrap_or(("", key));
        let found = configs.iter().position(|c| c.component == component);
        if found.is_none() && configs.len() == MAX_COMPONENTS {
            return Err(fail(format!("{what} configures more than {MAX_COMPONENTS} components")));
        }
        let i = found.unwrap_or_else(|| {
            let component = component.to_owned();
            configs.push(LoraConfig {
                component,
                alpha: None,
                alpha_pattern: Vec::new(),
                rank: None,
                rank_pattern: Vec::new(),
                rslora: false,
            });
            configs.len() - 1
        });
        let value = value.get();
        let is_given = value != "null";
        let number = |of: &str| {
            let wrong = || fail(format!("{what}: `{key}` is {}, which makes no sense there", start(value)));
            serde_json::from_str::<f64>(of).map_err(|_| wrong())
        };
        let config = &mut configs[i];
        match field {
            // PEFT calls it `alpha` for LoHa and LoKr.
            "lora_alpha" | "alpha" if is_given => config.alpha = Some(number(value)?),
            "r" if is_given => config.rank = Some(number(value)?),
            "alpha_pattern" | "rank_pattern" if is_given => {
                let Fields::<MAX_PATTERNS>(all) = serde_json::from_str(value).map_err(|e| {
                    fail(format!("{what}: `{key}` should hold a number for each pattern: {e}"))
                })?;
                let mut patterns: Vec<(Pattern, f64)> = Vec::with_capacity(all.len());
                for (pattern, value) in &all {
                    let regex = Pattern::new(pattern).map_err(|e| {
                        fail(format!(
                            "{what}: `{key}` holds `{pattern}`, which is no regular expression: {e}"
                        ))
                    })?;
                    patterns.push((regex, number(value.get())?));
                }
                *if field == "alpha_pattern" {
                    &mut config.alpha_pattern
                } else {
                    &mut config.rank_pattern
                } = patterns;
            }
            "use_rslora" => config.rslora = truthy(value),
            "use_dora" if truthy(value) => *dora = Some((path.to_owned(), key.clone())),
            "peft_type" => {
                let kind = serde_json::from_str::<String>(value).unwrap_or_default();
                if value.starts_with('"') && !["LORA", "LOHA", "LOKR"].contains(&kind.as_str()) {
                    let kind = start(value);
                    return Err(fail(format!(
                        "{what}: `{key}` is {kind}; supported are LORA, LOHA and LOKR"
                    )));
                }
            }
            _ => {}
        }
    }
    // Layers of the main model have one name, whatever it is called in a file.
    let mut main = configs.iter().filter(|c| !c.component.is_empty() && is_main_model(&c.component));
    if let Some(first) = main.next()
        && let Some(other) = main.find(|other| !other.says_what(first))
    {
        let (first, other) = (&first.component, &other.component);
        return Err(fail(format!(
            "{what} configures the main model as `{first}` and, in another way, as `{other}`; a pipeline has one of them, \
             so keep that one alone"
        )));
    }
    Ok(configs)
}

/// The fields of an object, at most so many, with their values as they are written: most of them are not looked at. Of
/// fields of one name the last one counts, in the first one's place.
struct Fields<'a, const MOST: usize>(Vec<(String, &'a RawValue)>);

impl<'de, const MOST: usize> Deserialize<'de> for Fields<'de, MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor<const MOST: usize>;
        impl<'de, const MOST: usize> Visitor<'de> for FieldsVisitor<MOST> {
            type Value = Fields<'de, MOST>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut places: BTreeMap<String, usize> = BTreeMap::new();
                let mut fields: Vec<(String, &RawValue)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, _>()? {
                    match places.get(&name) {
                        Some(&place) => fields[place].1 = value,
                        None if fields.len() == MOST => {
                            return Err(A::Error::custom(format!("it may hold at most {MOST} fields")));
                        }
                        None => {
                            places.insert(name.clone(), fields.len());
                            fields.push((name, value));
                        }
                    }
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(FieldsVisitor)
    }
}

/// A value as a message shows it.
fn start(value: &str) -> String {
    let start: String = value.chars().take(80).collect();
    if start.len() < value.len() { start + "..." } else { start }
}

/// Whether a value, as it is written, is `true`, or a text of that in any case.
fn truthy(value: &str) -> bool {
    value.trim_matches('"').eq_ignore_ascii_case("true")
}
