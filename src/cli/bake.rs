//! `loraweld bake`

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use loraweld::adapter::{check_target, same_file};
use loraweld::{BakeOptions, Round};
use serde_json::json;

use super::args::{ByLayer, LoraArg, Reading, open_adapters_for};
use super::checkpoint::{open, write_report};
use super::output::{Output, count, size, some};
use super::usage;

/// Add LoRAs, or a merge of them, to a checkpoint.
#[derive(Args, Debug)]
#[command(after_help = "\
The checkpoint is a .safetensors file, the index of a sharded one, or a folder that diffusers saved; what is written is the
same, with the same types. f32, f16, bf16 and fp8 with or without scales are known; other quantisations are refused.

Examples:
  loraweld bake flux1-dev.safetensors cat.safetensors:0.8 -o flux1-cat.safetensors
  loraweld bake sdxl.safetensors pets.safetensors -o sdxl-pets.safetensors --report pets.json
  loraweld bake FLUX.1-dev/ cat.safetensors -o FLUX.1-cat/ --round stochastic")]
pub struct Bake {
    /// A file, an index (`*.safetensors.index.json`), or a folder.
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: PathBuf,
    /// Adapters: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(required = true, value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    /// The file to write; for a folder or an index, the folder.
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// How sums become numbers of the checkpoint's type. `stochastic` keeps small updates on average, at the price of noise;
    /// which way each goes depends on the tensor's name alone.
    #[arg(long, value_enum, default_value_t = Rounding::Nearest)]
    round: Rounding,
    /// Leave out layers that find no tensor in the checkpoint, and say which, instead of refusing.
    #[arg(long)]
    skip_unmatched: bool,
    /// Write how much of each layer's update survives the rounding to a JSON file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Overwrite an existing file; never an input, and never a folder.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    by_layer: ByLayer,
    #[command(flatten)]
    reading: Reading,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Rounding {
    Nearest,
    Stochastic,
}

impl Bake {
    pub fn run(self, out: &Output) -> anyhow::Result<()> {
        let checkpoint = open(&self.checkpoint, self.reading.model(), out)?;
        let adapters = open_adapters_for(checkpoint.family(), &self.loras, &self.reading)?;
        let (adapters, strengths) = self.by_layer.apply(adapters)?;
        for note in adapters.iter().flat_map(|adapter| adapter.notes()) {
            out.warn(note)?;
        }
        if let Some(report) = &self.report {
            if same_file(report, &self.output) {
                return Err(usage(format!("--output and --report are both {}", report.display())));
            }
            check_target(report, self.force, &self.inputs())?;
        }
        let weighted: Vec<_> =
            adapters.iter().zip(&self.loras).map(|(a, lora)| a.at(lora.strength)).collect();
        let round = match self.round {
            Rounding::Nearest => Round::Nearest,
            Rounding::Stochastic => Round::Stochastic,
        };
        let options = BakeOptions { round, skip_unmatched: self.skip_unmatched, overwrite: self.force };
        let bake = loraweld::Bake::new(&checkpoint, &weighted, &options)?;
        bake.check_output(&self.output)?;
        if let left @ [_, ..] = bake.left_out() {
            let names = some(left.iter().map(|name| format!("`{name}`")), 5);
            out.warn(format_args!(
                "{} found no tensor and will be left out: {names}",
                count(left.len(), "layer")
            ))?;
        }
        let report = out.long(|control| bake.save(&self.output, control))?;
        if let Some(path) = &self.report {
            let whole = json!({ "report": report, "strengths": strengths, "warnings": out.warnings() });
            write_report(path, self.force, &self.inputs(), &whole)?;
        }
        out.event("result", &json!({ "output": self.output, "report": report, "warnings": out.warnings() }))?;
        out.info(format_args!("baked      {report}"))?;
        out.info(format_args!(
            "wrote      {} ({}, {:.1} s)",
            self.output.display(),
            size(report.bytes),
            report.seconds
        ))
    }

    /// Files that are read.
    fn inputs(&self) -> Vec<PathBuf> {
        self.loras.iter().map(|lora| lora.path.clone()).chain([self.checkpoint.clone()]).collect()
    }
}
