//! `loraweld calibrate`

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use loraweld::adapter::{check_target, same_file};
use loraweld::calibration::{FileSummary, Source};
use loraweld::{Adapter, Calibration, Device};
use serde_json::json;

use super::args::{Global, LoraArg, Memory, Reading, open_unweighted};
use super::calibration::written;
use super::layers::range;
use super::output::{Output, count, some};
use super::usage;

/// Sum up what each adapter's layers read, once for every later merge of them. Of one adapter, `resize` takes it.
#[derive(Args, Debug)]
#[command(after_help = "\
Activations are safetensors files with one tensor [tokens, inputs] for each layer, recorded while the adapter
was active; metadata `alias` (JSON, layer to layer) names layers that read the same. They are not kept.

Examples:
  loraweld calibrate cat.safetensors dog.safetensors \\
      --activations cat-inputs.safetensors dog-inputs/ -o pets.calibration.safetensors
  loraweld calibrate *.safetensors --activations inputs/* --neutral plain/ -o all.calibration.safetensors")]
pub struct Calibrate {
    /// Files, or folders that PEFT saved.
    #[arg(required = true, value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    /// What each adapter's layers read, in the order of the adapters: a file, or a folder of shards.
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    activations: Vec<PathBuf>,
    /// What the base model's layers read on unrelated prompts, where a merge should change nothing.
    #[arg(long, value_name = "PATH")]
    neutral: Option<PathBuf>,
    /// The calibration to write.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Overwrite an existing output.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    memory: Memory,
    #[command(flatten)]
    reading: Reading,
}

impl Calibrate {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let (adapters, paths) = (self.loras.len(), self.activations.len());
        if adapters != paths {
            return Err(usage(format!(
                "{} but {} of activations; --activations takes one path for each adapter, in order",
                count(adapters, "adapter"),
                count(paths, "path")
            )));
        }
        let why = "a calibration does not depend on them";
        let adapters = open_unweighted(&self.loras, &self.reading, why, out)?;
        let mut inputs: Vec<_> = self.loras.iter().map(|lora| lora.path.clone()).collect();
        inputs.extend(self.activations.iter().chain(&self.neutral).cloned());
        for path in self.activations.iter().chain(&self.neutral) {
            std::fs::metadata(path).with_context(|| format!("{}: cannot open", path.display()))?;
        }
        check_target(&self.output, self.force, &inputs)?;
        for adapter in &adapters {
            adapter.check_finite()?;
        }
        let mut calibration = Calibration::new(&adapters)?;
        if calibration.layers().next().is_none() {
            bail!(
                "no layer is in more than one of the adapters, so there is nothing to calibrate: are they made for \
                 one base model? `loraweld inspect` shows their names"
            );
        }
        let twice =
            |i: usize| self.activations[..i].iter().any(|other| same_file(other, &self.activations[i]));
        for i in (0..paths).filter(|&i| twice(i)) {
            let (path, name) = (self.activations[i].display(), adapters[i].name());
            out.warn(format_args!("{path}: given again for {name}; are these the inputs of both adapters?"))?;
        }
        let device = global.open_device(&self.memory, out)?;
        let mut sources: Vec<_> =
            self.activations.iter().enumerate().map(|(i, path)| (Source::Task(i), path)).collect();
        sources.extend(self.neutral.iter().map(|path| (Source::Neutral, path)));
        for (source, path) in sources {
            accumulate(&mut calibration, &device, source, path, out)?;
        }
        warn_missing(&calibration, &adapters, out)?;
        calibration.save(&self.output, self.force)?;
        written(&calibration, &self.output, out)
    }
}

/// Reads the activations of one task, and says what they were.
pub fn accumulate(
    calibration: &mut Calibration,
    device: &Device,
    source: Source,
    path: &std::path::Path,
    out: &Output,
) -> anyhow::Result<()> {
    let summary = out.long(|control| calibration.accumulate_path(device, source, path, control))?;
    let task = match source {
        Source::Task(i) => calibration.pool()[i].name.clone(),
        Source::Neutral => "neutral".to_owned(),
    };
    let FileSummary { layers, tokens, unknown } = summary;
    let fields = json!({
        "task": task, "path": path, "layers": layers.len(), "tokens": tokens, "unknown": unknown,
    });
    out.event("activations", &fields)?;
    // Of layers that only one adapter has, nothing is kept.
    let shared = layers.iter().filter(|key| !calibration.ranks(key).is_empty());
    let each = range(shared.clone().map(|key| match source {
        Source::Task(i) => calibration.tokens(key, i) as usize,
        Source::Neutral => calibration.neutral_tokens(key) as usize,
    }));
    out.info(format_args!("calibrated {task}: {}, {each} tokens each", count(shared.count(), "layer")))?;
    if !unknown.is_empty() {
        let what = count(unknown.len(), "layer");
        let names = some(&unknown, 3);
        out.warn(format_args!("{}: {what} that no adapter has, ignored: {names}", path.display()))?;
    }
    Ok(())
}

/// Says which layers a merge will only be able to sum.
fn warn_missing(calibration: &Calibration, adapters: &[Adapter], out: &Output) -> anyhow::Result<()> {
    let missing = calibration.missing();
    for (i, adapter) in adapters.iter().enumerate() {
        let layers: Vec<_> = missing.iter().filter(|(_, task)| *task == i).map(|(key, _)| key).collect();
        if !layers.is_empty() {
            let what = count(layers.len(), "layer");
            out.warn(format_args!("{}: {what} without activations: {}", adapter.name(), some(layers, 3)))?;
        }
    }
    Ok(())
}
