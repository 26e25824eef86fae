//! `loraweld merge svd`, and `loraweld resize`, which is the same of one adapter.

use clap::Args;
use loraweld::SvdMerge;

use super::{Common, Measure};
use crate::cli::args::{Global, LoraArg};
use crate::cli::output::Output;
use crate::cli::usage;

/// The sum of adapters at their strengths, as well as an adapter of lower rank can hold it.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge svd cat.safetensors dog.safetensors:0.8 --rank 16 -o both.safetensors
  loraweld merge svd cat.safetensors dog.safetensors --sv-fro 0.95 -o both.safetensors")]
pub struct SvdCommand {
    /// Adapters: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(required = true, value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    #[command(flatten)]
    measure: Measure,
    #[command(flatten)]
    common: Common,
}

/// Lower the rank of an adapter, by the singular values of its updates.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld resize cat.safetensors --rank 16 -o cat-16.safetensors
  loraweld resize cat.safetensors --sv-fro 0.95 --rank 32 -o cat-small.safetensors")]
pub struct Resize {
    /// The adapter: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(value_name = "IN", value_parser = LoraArg::parser())]
    input: LoraArg,
    #[command(flatten)]
    common: Common,
}

impl SvdCommand {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let Self { loras, measure, common } = self;
        if common.truncate.truncation().is_none() {
            return Err(usage("merge svd needs --rank N or one of --sv-*; `merge linear` keeps every rank"));
        }
        svd(&loras, &measure, common, global, out)
    }
}

impl Resize {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        if self.common.truncate.truncation().is_none() {
            return Err(usage("resize needs --rank N or one of --sv-ratio, --sv-fro and --sv-cumulative"));
        }
        svd(&[self.input], &Measure::default(), self.common, global, out)
    }
}

fn svd(
    loras: &[LoraArg],
    measure: &Measure,
    mut common: Common,
    global: &Global,
    out: &Output,
) -> anyhow::Result<()> {
    // The method truncates itself; a dry run says to what.
    let dry = common.dry_run;
    let truncation = if dry { common.truncate.truncation() } else { common.truncate.take() };
    let merge = SvdMerge::new(truncation);
    common.run(loras, measure, global, out, &merge)
}
