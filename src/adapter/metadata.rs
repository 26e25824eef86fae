//! The metadata of files: what a merge keeps of its inputs, and what has to be right of what is written.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use serde_json::{Map, Value};

use super::families::Family;
use super::keys::is_main_model;
use super::write::Module;
use super::{Adapter, Format};

type Metadata = BTreeMap<String, String>;

/// Said of the input's ranks, alphas and bytes, not of the output's.
const STALE: &[&str] = &[
    "lora_adapter_metadata",
    "lora_alpha",
    "network_alpha",
    "alpha",
    "ss_network_dim",
    "ss_network_alpha",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
];

/// Lists of words, which a merge joins.
const WORDS: &[&str] = &["modelspec.trigger_phrase", "modelspec.tags", "modelspec.usage_hint"];

/// Counts of the words of training captions.
const TAGS: &str = "ss_tag_frequency";

impl Adapter {
    /// The metadata of a merge of these adapters: what all agree on, tags and trigger words of each, and their titles
    /// (`modelspec.merged_from`).
    pub fn common_metadata<'a>(adapters: impl IntoIterator<Item = &'a Self>) -> Metadata {
        let adapters: Vec<&Self> = adapters.into_iter().collect();
        let Some((first, rest)) = adapters.split_first() else { return Metadata::new() };
        let mut common = first.metadata().clone();
        // Ranks and alphas of the inputs are not those of the result.
        common.retain(|key, value| {
            key != "lora_adapter_metadata"
                && !key.starts_with("loraweld.")
                && rest.iter().all(|other| other.metadata().get(key) == Some(value))
        });
        if rest.is_empty() {
            return common;
        }
        let of = |key: &'static str| adapters.iter().filter_map(move |adapter| adapter.metadata().get(key));
        for key in WORDS {
            let mut seen = BTreeSet::new();
            let words: Vec<_> = of(key)
                .flat_map(|text| text.split(','))
                .map(str::trim)
                .filter(|word| !word.is_empty() && seen.insert(*word))
                .collect();
            if !words.is_empty() {
                common.insert((*key).to_owned(), words.join(", "));
            }
        }
        if let Some(tags) = joined_tags(of(TAGS)) {
            common.insert(TAGS.to_owned(), tags);
        }
        // Files of Stability AI's specification name what they were made of.
        if adapters.iter().any(|adapter| adapter.metadata().keys().any(|key| key.starts_with("modelspec."))) {
            let titles: Vec<_> = adapters.iter().map(|adapter| adapter.title()).collect();
            common.insert("modelspec.merged_from".to_owned(), titles.join(", "));
            common.remove("modelspec.date");
        }
        common
    }

    /// The title that the file gives itself, or its name.
    pub fn title(&self) -> &str {
        let said = ["modelspec.title", "ss_output_name"].iter().filter_map(|key| self.metadata().get(*key));
        said.map(|title| title.trim())
            .find(|title| !title.is_empty() && *title != "None")
            .unwrap_or(self.name())
    }
}

/// Sums counts by folder and tag; `None` if no text is of that kind.
fn joined_tags<'a>(texts: impl Iterator<Item = &'a String>) -> Option<String> {
    let mut all = Map::new();
    for text in texts {
        let Ok(Value::Object(folders)) = serde_json::from_str(text) else { continue };
        for (folder, tags) in folders {
            let Value::Object(tags) = tags else { continue };
            let counts = all.entry(folder).or_insert_with(|| Value::Object(Map::new()));
            let Value::Object(counts) = counts else { continue };
            for (tag, n) in tags {
                let sum = counts
                    .get(&tag)
                    .and_then(Value::as_u64)
                    .unwrap_or(0)
                    .checked_add(n.as_u64().unwrap_or(0));
                counts.insert(tag, sum.unwrap_or(u64::MAX).into());
            }
        }
    }
    (!all.is_empty()).then(|| Value::Object(all).to_string())
}

/// The header's metadata: the caller's, without what would be wrong of these tensors, and what is right of them. `hash`:
/// SHA-256 (hex) of what follows the header.
pub(super) fn written(
    modules: &[Module<'_>],
    format: Format,
    family: Family,
    given: &Metadata,
    hash: impl FnOnce() -> io::Result<String>,
) -> io::Result<Metadata> {
    let mut metadata = given.clone();
    metadata.retain(|key, _| !STALE.contains(&key.as_str()));
    metadata.insert("format".into(), "pt".into());
    let of = |metadata: &mut Metadata, key: &str, value: &str| {
        metadata.entry(key.into()).or_insert_with(|| value.into());
    };
    if format == Format::Kohya {
        let common = |of: &dyn Fn(&Module) -> f64| match modules {
            [first, rest @ ..] if rest.iter().all(|m| of(m) == of(first)) => of(first).to_string(),
            _ => "Dynamic".to_owned(),
        };
        let module = family.all_agree(|record| record.module).unwrap_or("networks.lora");
        metadata.insert("ss_network_module".into(), module.into());
        metadata.insert("ss_network_dim".into(), common(&|m| m.rank as f64));
        metadata.insert("ss_network_alpha".into(), common(&|m| m.alpha));
        of(&mut metadata, "ss_v2", if family.id() == Some("sd2") { "True" } else { "False" });
        if let Some(base) = family.all_agree(|record| record.base) {
            of(&mut metadata, "ss_base_model_version", base);
        }
    } else {
        metadata.remove("ss_network_args");
    }
    if format == Format::Peft
        && let Some(config) = mixed_ranks(modules)
    {
        metadata.insert("lora_adapter_metadata".into(), config);
    }
    // A file of kohya's is known by the hash of its tensors.
    let spec = given.keys().any(|key| key.starts_with("modelspec."));
    if format == Format::Kohya || spec || given.contains_key("sshs_model_hash") {
        let hash = hash()?;
        if spec {
            metadata.insert("modelspec.hash_sha256".into(), format!("0x{hash}"));
        }
        metadata.insert("sshs_model_hash".into(), hash);
    }
    Ok(metadata)
}

/// PEFT's configuration of a file with several ranks. Without one, diffusers takes alpha to be the rank, but
/// until 0.42 it took the first layer's rank for every layer. Its keys have the prefixes of the tensors, and none where
/// those have none. diffusers converts what is not spelled as it has it, but not the configuration beside it, and so such
/// files get none.
fn mixed_ranks(modules: &[Module<'_>]) -> Option<String> {
    let mut components: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    for Module { name, prefix, rank, .. } in modules {
        let component = name[..*prefix].trim_end_matches('.');
        let own = ["", "transformer", "transformer_2", "unet", "connectors", "text_conditioner"];
        if !own.contains(&component) && !component.starts_with("text_encoder") {
            return None;
        }
        components.entry(component).or_default().insert(&name[*prefix..], *rank);
    }
    if modules.iter().any(|module| !module.is_diffusers()) {
        return None;
    }
    // A reader takes one configuration for the main model, and a pipeline has it under one name.
    if components.keys().filter(|name| is_main_model(name)).count() > 1 {
        return None;
    }
    let is_mixed = |ranks: &BTreeMap<_, usize>| ranks.values().collect::<BTreeSet<_>>().len() > 1;
    if !components.values().any(is_mixed) {
        return None;
    }
    let mut config = Map::new();
    for (component, ranks) in components {
        let count = |rank: &usize| ranks.values().filter(|r| *r == rank).count();
        let usual = ranks.values().max_by_key(|rank| (count(rank), **rank));
        // PEFT takes a pattern for the end of a name too: `proj_out` is also that of every block, but `^proj_out` is not.
        let others = ranks.iter().filter(|(_, rank)| Some(*rank) != usual);
        let others: BTreeMap<String, _> = others.map(|(name, rank)| (format!("^{name}"), rank)).collect();
        let modules: Vec<_> = ranks.keys().collect();
        for (field, value) in [
            ("alpha_pattern", serde_json::json!(others)),
            ("lora_alpha", serde_json::json!(usual)),
            ("r", serde_json::json!(usual)),
            ("rank_pattern", serde_json::json!(others)),
            ("target_modules", serde_json::json!(modules)),
        ] {
            let dot = if component.is_empty() { "" } else { "." };
            config.insert(format!("{component}{dot}{field}"), value);
        }
    }
    Some(Value::Object(config).to_string())
}
