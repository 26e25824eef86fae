//! `loraweld strengths`

use std::path::PathBuf;

use clap::Args;
use loraweld::merge::{Strengths, strengths};

use super::args::{ByLayer, Global, LoraArg, Memory, Reading};
use super::host;
use super::merge::Inputs;
use super::output::{Output, Table, count, quoted};

/// Find the strengths at which the plain sum of adapters loses least.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld strengths cat.safetensors dog.safetensors --calibration pets.calibration.safetensors
  loraweld strengths cat.safetensors dog.safetensors --calibration pets.calibration.safetensors --per-block

The loss is the error of the sum on each adapter's own inputs, relative to merging nothing: 0 is perfect. A strength that
is given with a file says how strong that adapter is to be on its own inputs; the strength that is found replaces it.")]
pub struct StrengthsCommand {
    /// Adapters: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(required = true, num_args = 2.., value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    /// What `loraweld calibrate` wrote for these adapters (and maybe others).
    #[arg(long, value_name = "FILE")]
    calibration: PathBuf,
    /// Find strengths for each block of the model.
    #[arg(long)]
    per_block: bool,
    #[command(flatten)]
    memory: Memory,
    #[command(flatten)]
    by_layer: ByLayer,
    #[command(flatten)]
    reading: Reading,
}

impl StrengthsCommand {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let mut files: Vec<_> = self.loras.iter().map(|lora| lora.path.clone()).collect();
        files.push(self.calibration.clone());
        let inputs = Inputs::open(&self.loras, &self.by_layer, &self.reading, files)?;
        inputs.describe(out)?;
        let calibration = host::calibration(&self.calibration)?;
        let device = global.open_device(&self.memory, out)?;
        let weighted = inputs.weighted();
        let found =
            out.long(|control| strengths(&device, &calibration, &weighted, self.per_block, control))?;
        let Strengths { blocks, loss, given, average, layers, unknown } = &found;
        out.event("strengths", &found)?;
        if *layers == 0 {
            out.warn("no layer is shared and has recorded inputs of all its adapters: nothing is known")?;
            return Ok(());
        }
        if *unknown > 0 {
            out.warn(format_args!(
                "{} without recorded inputs, or of one adapter alone, had no say in this",
                count(*unknown, "layer")
            ))?;
        }
        let names: Vec<&str> = inputs.adapters.iter().map(|adapter| adapter.name()).collect();
        let heads: Vec<String> = names.iter().map(|name| format!(">{name}")).collect();
        let heads: Vec<&str> = std::iter::once("layers").chain(heads.iter().map(String::as_str)).collect();
        let mut table = Table::new(&heads);
        let number = |strength: &Option<f64>| strength.map_or_else(|| "-".into(), |v| format!("{v:.2}"));
        for block in blocks {
            table.row(std::iter::once(block.pattern.clone()).chain(block.strengths.iter().map(number)));
        }
        out.result(table)?;
        out.result(format_args!(
            "loss {loss:.3}, over {}; at the strengths given {given:.3}, averaged {average:.3}",
            count(*layers, "layer")
        ))?;
        match self.per_block && !self.by_layer.words().is_empty() {
            // Of several strengths for a layer the last one counts.
            true => out.warn(
                "these are factors on the strengths by layer that were given, which no command line can say of blocks; \
                 `loraweld convert` with those makes files that `strengths` can be asked about without them",
            )?,
            false => out.result(format_args!("\n{}", self.command(&found, &names)))?,
        }
        if let ([block], true) = (&blocks[..], self.by_layer.words().is_empty()) {
            let tags = names.iter().zip(&block.strengths);
            let tags: Vec<String> =
                tags.filter_map(|(name, v)| Some(format!("<lora:{name}:{:.2}>", (*v)?))).collect();
            out.result(format_args!("\nIn a prompt of ComfyUI or A1111:\n  {}", tags.join(" ")))?;
        }
        Ok(())
    }

    /// The merge at these strengths, to paste.
    fn command(&self, found: &Strengths, names: &[&str]) -> String {
        let mut words = vec!["loraweld merge linear".to_owned()];
        let whole = match &found.blocks[..] {
            [block] => Some(&block.strengths),
            _ => None,
        };
        for (i, lora) in self.loras.iter().enumerate() {
            let strength = match whole {
                Some(strengths) => strengths[i].map_or(lora.strength, |v| (1000.0 * v).round() / 1000.0),
                None => 1.0,
            };
            words.push(format!("{}:{strength}", quoted(&lora.path)));
        }
        if whole.is_none() {
            for block in &found.blocks {
                for (name, strength) in names.iter().zip(&block.strengths) {
                    let Some(strength) = strength else { continue };
                    words.push(format!("\\\n    --strength-for '{name}:{}={strength:.3}'", block.pattern));
                }
            }
        }
        // They were there when strengths were looked for.
        words.extend(self.by_layer.words());
        words.push("-o sum.safetensors".to_owned());
        words.join(" ")
    }
}
