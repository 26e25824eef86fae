//! `loraweld merge svd`

use clap::Args;
use loraweld::SvdMerge;

use super::Common;
use crate::cli::args::{Global, LoraArg};
use crate::cli::output::Output;
use crate::cli::usage;

/// The sum of adapters at their strengths, as well as an adapter of rank N can hold it.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge svd cat.safetensors dog.safetensors:0.8 --rank 16 -o both.safetensors")]
pub struct SvdCommand {
    /// Adapters: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(required = true, value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    #[command(flatten)]
    common: Common,
}

impl SvdCommand {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let Some(rank) = self.common.rank() else {
            return Err(usage("merge svd needs --rank N; `merge linear` keeps every rank"));
        };
        let inputs = self.common.open(&self.loras, &[], out)?;
        if self.common.dry_run {
            return self.common.dry_run(&inputs, out);
        }
        // The method truncates itself.
        let common = Common { rank: None, ..self.common };
        common.finish(global, &inputs, out, |_, weighted, control| {
            SvdMerge::new(rank).merge_with(weighted, control)
        })
    }
}
