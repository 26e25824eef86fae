//! `loraweld inspect`

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use clap::Args;
use loraweld::adapter::{check_target, write_atomic};
use loraweld::{Adapter, Checkpoint, Family, Layer, LayerKey, Loader, Scale, ScaleRule};
use serde_json::{Map, Value, json};

use super::args::{LoraArg, Reading, open_unweighted};
use super::checkpoint;
use super::layers::{group, pattern, range};
use super::output::{Output, Table, count, size, some};
use super::report::{Inspected, is_page};
use super::{overlap, usage};
use crate::io::atomic::len;

/// Show what LoRA files hold and, of several, what matches; or what a checkpoint is, and which of the files fit it.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld inspect cat.safetensors
  loraweld inspect cat.safetensors dog.safetensors     what a merge of the two would match
  loraweld inspect --overlap cat.safetensors dog.safetensors   how far they are in each other's way
  loraweld inspect --overlap cat.safetensors dog.safetensors --report overlap.html   the same, to look at
  loraweld inspect flux1-dev.safetensors cat.safetensors   whether the LoRA fits the checkpoint
  loraweld inspect --json cat.safetensors | jq .modules")]
pub struct Inspect {
    /// Files, or folders that PEFT saved; or checkpoints: files, indices, folders that diffusers saved.
    #[arg(required = true, value_name = "FILE", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    /// Compute the norm of each block's update, however long that takes [default: of files that are soon read].
    #[arg(long)]
    norms: bool,
    /// Show how far several files are in each other's way, by the angles between what they read and write.
    #[arg(long)]
    overlap: bool,
    /// Write what is told of LoRA files as a page to look at; FILE ends in `.html`.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Overwrite an existing report; never an input.
    #[arg(long, requires = "report")]
    force: bool,
    #[command(flatten)]
    reading: Reading,
}

/// Multiplications that norms may take without being asked for.
const SOON: f64 = 2e10;

/// Metadata that tells people what a file is.
const METADATA: &[(&str, &str)] = &[
    ("modelspec.title", "title"),
    ("ss_output_name", "name"),
    ("modelspec.architecture", "architecture"),
    ("ss_base_model_version", "base model"),
    ("ss_sd_model_name", "trained on"),
    ("modelspec.trigger_phrase", "trigger"),
    ("ss_network_module", "module"),
    ("ss_training_comment", "comment"),
    ("modelspec.license", "license"),
    ("modelspec.merged_from", "merged from"),
    ("loraweld.method", "method"),
];

impl Inspect {
    pub fn run(self, out: &Output) -> anyhow::Result<()> {
        let (checkpoints, loras): (Vec<_>, Vec<_>) =
            self.loras.iter().cloned().partition(|of| Checkpoint::is_at(&of.path));
        if let Some(path) = &self.report {
            if !is_page(path) {
                let shown = path.display();
                return Err(usage(format!("--report {shown} should end in `.html`; --json prints the rest")));
            }
            if loras.is_empty() {
                return Err(usage("--report tells of LoRA files, and none is given"));
            }
            check_target(path, self.force, &self.files())?;
        }
        let mut norms = Vec::new();
        let adapters = open_unweighted(&loras, &self.reading, "they only matter to a merge", out)?;
        for (i, adapter) in adapters.iter().enumerate() {
            if i > 0 {
                out.result("")?;
            }
            norms.push(one(adapter, self.norms, out)?);
        }
        for (i, path) in checkpoints.iter().enumerate() {
            if i > 0 || !adapters.is_empty() {
                out.result("")?;
            }
            checkpoint::show(&checkpoint::open(&path.path, self.reading.model(), out)?, &adapters, out)?;
        }
        if adapters.len() > 1 {
            out.result("")?;
            matches(&adapters, out)?;
        }
        if self.overlap {
            if adapters.len() < 2 {
                return Err(usage("--overlap compares two LoRA files or more"));
            }
            out.result("")?;
        }
        let overlap = if self.overlap { overlap::show(&adapters, out)? } else { None };
        if let Some(path) = &self.report {
            let inspected = Inspected {
                adapters: &adapters,
                norms,
                overlaps: overlap.as_ref().map(|(found, _)| found),
                disturbs: overlap.as_ref().map(|(_, sentence)| sentence.clone()),
                warnings: out.warnings(),
            };
            let text = inspected.page().text()?;
            write_atomic(path, self.force, &self.files(), |file| {
                std::io::Write::write_all(file, text.as_bytes())
            })?;
            out.info(format_args!("report     {}", path.display()))?;
        }
        Ok(())
    }

    fn files(&self) -> Vec<PathBuf> {
        self.loras.iter().map(|lora| lora.path.clone()).collect()
    }
}

/// Shows one file, and gives the norms of its layers if they were computed.
fn one(adapter: &Adapter, norms: bool, out: &Output) -> anyhow::Result<Vec<f64>> {
    let layers = adapter.layers();
    let bytes = len(adapter.path());
    let prefixes: BTreeSet<_> = layers.iter().map(|layer| layer.prefix()).collect();
    let tags = tags(adapter);
    let metadata = METADATA
        .iter()
        .filter_map(|&(key, label)| Some((key, label, adapter.metadata().get(key)?)))
        .collect::<Vec<_>>();

    let loaders = Loader::ALL.map(|loader| (loader, adapter.not_taken(loader)));
    let work: f64 =
        layers.iter().map(|l| (l.rank() * l.rank()) as f64 * (l.input() + l.output()) as f64).sum();
    let norms: Vec<f64> =
        if norms || work < SOON { layers.iter().map(Layer::norm).collect() } else { Vec::new() };
    let blocks = blocks(layers, &norms);
    out.event(
        "adapter",
        &json!({
            "file": adapter.path(),
            "name": adapter.name(),
            "bytes": bytes,
            "family": adapter.family().to_string(),
            "families": adapter.family().candidates().filter_map(Family::id).collect::<Vec<_>>(),
            "format": adapter.format().name(),
            "prefixes": prefixes,
            "dtype": adapter.dtype().name(),
            "layers": layers.len(),
            "rank_min": layers.iter().map(|l| l.rank()).min(),
            "rank_max": layers.iter().map(|l| l.rank()).max(),
            "metadata": metadata.iter().map(|(key, _, v)| ((*key).to_owned(), json!(v))).collect::<Map<_, _>>(),
            "tags": tags,
            "loaders": loaders.iter().map(|(loader, left)| (loader.name().to_owned(), json!({
                "whole": left.is_empty(),
                "not_taken": left.iter().map(|l| json!({ "module": l.module, "why": l.reason })).collect::<Vec<_>>(),
            }))).collect::<Map<_, _>>(),
            "blocks": blocks.iter().map(|b| json!({
                "block": b.name, "layers": b.layers, "norm": b.norm,
            })).collect::<Vec<_>>(),
            "modules": layers.iter().enumerate().map(|(i, l)| describe(l, norms.get(i))).collect::<Vec<_>>(),
        }),
    )?;

    out.result(adapter.path().display())?;
    let line = |label: &str, text: String| out.result(format_args!("  {label:<12} {text}"));
    let prefixes = some(prefixes.iter().map(|p| format!("`{p}`")), 4);
    line("model", adapter.family().to_string())?;
    line("keys", format!("{}, prefix {prefixes}", adapter.format()))?;
    line("size", format!("{}, {}", size(bytes), adapter.dtype()))?;
    line("layers", format!("{}, rank {}", layers.len(), range(layers.iter().map(|layer| layer.rank()))))?;
    for (loader, left) in &loaders {
        let text = match &left[..] {
            [] => "takes it whole".to_owned(),
            [first, ..] => {
                let modules: BTreeSet<_> =
                    layers.iter().map(|l| format!("{}{}", l.prefix(), l.module())).collect();
                let all = if left.len() >= modules.len() { ", all of them" } else { "" };
                format!(
                    "not known to take {}{all}: `{}`, {}",
                    count(left.len(), "module"),
                    first.module,
                    first.reason
                )
            }
        };
        line(loader.name(), text)?;
    }
    for (text, names) in group(layers.iter().map(|layer| (scale(layer), layer.name()))) {
        let whose = match names.len() {
            n if n == layers.len() => String::new(),
            n => format!(" on {}: {}", count(n, "layer"), some(&names, 3)),
        };
        line("scale", text + &whose)?;
    }
    for (_, label, value) in metadata {
        line(label, short(value))?;
    }
    if !tags.is_empty() {
        line("tags", some(&tags, 8))?;
    }
    let mut table = Table::new(&["  module", ">layers", ">rank", ">in", ">out", ">scale"]);
    let key = |layer: &Layer| (pattern(&layer.name()), layer.input(), layer.output());
    for ((pattern, input, output), group) in group(layers.iter().map(|layer| (key(layer), layer))) {
        let mut scales: Vec<_> = group.iter().map(|layer| layer.scale().value).collect();
        scales.sort_by(f64::total_cmp);
        table.row([
            format!("  {pattern}"),
            group.len().to_string(),
            range(group.iter().map(|layer| layer.rank())),
            input.to_string(),
            output.to_string(),
            match scales[..] {
                [min, .., max] if min != max => format!("{} to {}", decimal(min), decimal(max)),
                [scale, ..] => decimal(scale),
                [] => String::new(),
            },
        ]);
    }
    out.result(table)?;
    if norms.is_empty() {
        out.result("  norms of blocks take a while here: --norms computes them")?;
        return Ok(norms);
    }
    let mut table = Table::new(&["  block", ">layers", ">norm of the update"]);
    for block in blocks {
        let norm = block.norm.map_or_else(String::new, decimal);
        table.row([format!("  {}", block.name), block.layers.to_string(), norm]);
    }
    out.result(table)?;
    Ok(norms)
}

/// The layers of a block.
struct Block {
    name: String,
    layers: usize,
    norm: Option<f64>,
}

fn blocks(layers: &[Layer], norms: &[f64]) -> Vec<Block> {
    let layers = layers.iter().enumerate().map(|(i, layer)| (layer.block(), norms.get(i)));
    let mut blocks: Vec<Block> = group(layers)
        .into_iter()
        .map(|(name, norms)| Block {
            name,
            layers: norms.len(),
            norm: norms.into_iter().try_fold(0.0, |sum, norm| Some(sum + norm? * norm?)).map(f64::sqrt),
        })
        .collect();
    // Keys are sorted as text, in which 10 is before 2.
    let number = |name: &str| {
        let start = name.trim_end_matches(|c: char| c.is_ascii_digit());
        (start.to_owned(), name[start.len()..].parse::<u64>().ok())
    };
    blocks.sort_by_key(|block| number(&block.name));
    blocks
}

/// Four decimals at most.
fn decimal(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn scale(layer: &Layer) -> String {
    let scale = layer.scale();
    let divisor = if scale.rank_stabilized { ", divided by the root of the rank" } else { "" };
    match scale.alpha {
        Some(0.0) => format!("0: alpha 0 ({}), adds nothing", said_by(&scale)),
        Some(alpha) => format!("{} (alpha {alpha}, {}{divisor})", scale.value, said_by(&scale)),
        None => format!("{} ({}{divisor})", scale.value, said_by(&scale)),
    }
}

/// Where a scale comes from, the command line's own option by its name.
fn said_by(scale: &Scale) -> String {
    match scale.rule {
        ScaleRule::Override => "--alpha".to_owned(),
        rule => rule.to_string(),
    }
}

fn describe(layer: &Layer, norm: Option<&f64>) -> Value {
    let scale = layer.scale();
    json!({
        "key": layer.key().as_str(),
        "module": format!("{}{}", layer.prefix(), layer.module()),
        "block": layer.block(),
        "rank": layer.rank(),
        "in": layer.input(),
        "out": layer.output(),
        "kernel": layer.kernel(),
        "fused_in": layer.fused_in(),
        "norm": norm,
        "dtype": layer.dtype().name(),
        "scale": scale.value,
        "alpha": scale.alpha,
        "scale_from": said_by(&scale),
        "rank_stabilized": scale.rank_stabilized,
    })
}

/// Tags of the training set, the most frequent first: trigger words are among them.
fn tags(adapter: &Adapter) -> Vec<String> {
    let text = adapter.metadata().get("ss_tag_frequency").map_or("", String::as_str);
    let Ok(folders) = serde_json::from_str::<BTreeMap<String, BTreeMap<String, f64>>>(text) else {
        return Vec::new();
    };
    let mut counts: BTreeMap<String, f64> = BTreeMap::new();
    for (tag, n) in folders.into_values().flatten() {
        *counts.entry(tag.trim().to_owned()).or_default() += n;
    }
    let mut tags: Vec<_> = counts.into_iter().filter(|(tag, _)| !tag.is_empty()).collect();
    tags.sort_by(|x, y| y.1.total_cmp(&x.1));
    tags.into_iter().take(20).map(|(tag, _)| tag).collect()
}

/// One line, cut where it is too long.
fn short(text: &str) -> String {
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(90) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

/// A layer's places: file and layer.
type Found<'a> = &'a [(usize, &'a Layer)];

/// What a merge of the files would match.
fn matches(adapters: &[Adapter], out: &Output) -> anyhow::Result<()> {
    let mut by_key: BTreeMap<&LayerKey, Vec<(usize, &Layer)>> = BTreeMap::new();
    for (i, adapter) in adapters.iter().enumerate() {
        for layer in adapter.layers() {
            by_key.entry(layer.key()).or_default().push((i, layer));
        }
    }
    let shape = |layer: &Layer| format!("{} to {}", layer.input(), layer.output());
    let disagree = |found: Found| found.iter().any(|(_, layer)| shape(layer) != shape(found[0].1));
    let keys = |wanted: &dyn Fn(Found) -> bool| {
        by_key.iter().filter(|(_, found)| wanted(found)).map(|(key, _)| *key).collect::<Vec<_>>()
    };
    let n = adapters.len();
    let all = keys(&|found| found.len() == n && !disagree(found));
    let part = keys(&|found| (2..n).contains(&found.len()) && !disagree(found));
    let alone = |i| keys(&|found| found.len() == 1 && found[0].0 == i);
    let conflicts: Vec<_> = by_key.iter().filter(|(_, found)| disagree(found)).collect();

    out.event(
        "match",
        &json!({
            "in_all": all.len(),
            "in_some": part.iter().map(|key| key.as_str()).collect::<Vec<_>>(),
            "in_one": (0..n).map(|i| json!({
                "file": adapters[i].path(),
                "layers": alone(i).iter().map(|key| key.as_str()).collect::<Vec<_>>(),
                "why": why_alone(adapters, i, &alone(i)),
            })).collect::<Vec<_>>(),
            "conflicts": conflicts.iter().map(|(key, found)| json!({
                "layer": key.as_str(),
                "shapes": found.iter().map(|&(i, layer)| json!({
                    "file": adapters[i].path(), "in": layer.input(), "out": layer.output(),
                })).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
        }),
    )?;

    let files = if n == 2 { "both files".to_owned() } else { format!("all {n} files") };
    out.result(format_args!("match: {} in {files}", count(all.len(), "layer")))?;
    if !part.is_empty() {
        out.result(format_args!("  in some of them: {}: {}", count(part.len(), "layer"), some(&part, 3)))?;
    }
    for (i, adapter) in adapters.iter().enumerate() {
        let alone = alone(i);
        if let Some(why) = why_alone(adapters, i, &alone) {
            let layers = count(alone.len(), "layer");
            out.result(format_args!("  only in {}: {layers}: {}", adapter.name(), some(&alone, 3)))?;
            out.result(format_args!("    {why}"))?;
        }
    }
    if !conflicts.is_empty() {
        let layers = count(conflicts.len(), "layer");
        out.result(format_args!("  widths disagree on {layers}, so these files cannot be merged:"))?;
        for (key, found) in conflicts.iter().take(3) {
            let shapes = found.iter().map(|&(i, layer)| format!("{} {}", adapters[i].name(), shape(layer)));
            out.result(format_args!("    {key}: {}", some(shapes, usize::MAX)))?;
        }
        out.result("    are they made for one base model?")?;
    }
    Ok(())
}

/// Why layers of one file have no partner; `None` if all have.
fn why_alone(adapters: &[Adapter], file: usize, alone: &[&LayerKey]) -> Option<String> {
    let first = alone.first()?;
    if alone.len() < adapters[file].layers().len() {
        let component = first.component();
        let others = adapters.iter().enumerate().filter(|(i, _)| *i != file);
        let has = others.flat_map(|(_, a)| a.layers()).any(|l| l.key().component() == component);
        return Some(match has {
            true => "no other file adapts them; a merge passes them through".into(),
            false => format!("no other file adapts a {component}; a merge passes them through"),
        });
    }
    let (_, other) = adapters.iter().enumerate().find(|(i, _)| *i != file)?;
    let (mine, theirs) = (adapters[file].family(), other.family());
    if mine.and(theirs) == Family::UNKNOWN && mine != Family::UNKNOWN && theirs != Family::UNKNOWN {
        return Some(format!(
            "nothing of this file matches: it is for {mine}, and {} for {theirs}",
            other.name()
        ));
    }
    let other = other.layers().first()?;
    Some(format!(
        "nothing of this file matches: its layers are named like `{}`, others like `{}`; \
         another base model, or another trainer's names for the same one?",
        pattern(first.as_str()),
        pattern(other.key().as_str())
    ))
}
