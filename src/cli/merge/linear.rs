//! `loraweld merge linear`

use clap::Args;
use loraweld::Linear;

use super::{Common, Measure};
use crate::cli::args::{Global, LoraArg};
use crate::cli::output::Output;

/// The sum of adapters at their strengths (task arithmetic), exactly, by joining ranks.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge linear cat.safetensors:0.5 dog.safetensors:0.5 -o average.safetensors")]
pub struct LinearMerge {
    /// Adapters: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(required = true, value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    #[command(flatten)]
    measure: Measure,
    #[command(flatten)]
    common: Common,
}

impl LinearMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let Self { loras, measure, common } = self;
        common.run(&loras, &measure, global, out, &Linear)
    }
}
