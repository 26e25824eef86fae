//! `loraweld resize`: `merge svd` of one adapter.

use clap::Args;
use loraweld::SvdMerge;

use super::Common;
use crate::cli::args::{Global, LoraArg};
use crate::cli::output::Output;
use crate::cli::usage;

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

impl Resize {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let Self { input, mut common } = self;
        if common.truncate.truncation().is_none() {
            return Err(usage("resize needs --rank N or one of --sv-ratio, --sv-fro and --sv-cumulative"));
        }
        let inputs = common.open(&[input], &[], out)?;
        if common.dry_run {
            return common.dry_run(&inputs, out);
        }
        let method = SvdMerge::new(common.truncate.take());
        common.finish(global, &inputs, None, out, &method)
    }
}
