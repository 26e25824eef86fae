//! `loraweld resize`: `merge svd` of one adapter.

use clap::Args;
use loraweld::SvdMerge;

use super::{Common, Measure};
use crate::cli::args::{Global, LoraArg};
use crate::cli::host;
use crate::cli::output::Output;
use crate::cli::usage;

/// Lower the rank of an adapter, by the singular values of its updates.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld resize cat.safetensors --rank 16 -o cat-16.safetensors
  loraweld resize cat.safetensors --sv-fro 0.95 --rank 32 -o cat-small.safetensors
  loraweld resize cat.safetensors --budget-mib 20 --calibration pets.calibration.safetensors -o cat-20.safetensors

With a calibration, ranks are judged by what they do on the inputs that the adapter's layers were recorded to read,
instead of by their size.")]
pub struct Resize {
    /// The adapter: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(value_name = "IN", value_parser = LoraArg::parser())]
    input: LoraArg,
    #[command(flatten)]
    measure: Measure,
    #[command(flatten)]
    common: Common,
}

impl Resize {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let Self { input, measure, mut common } = self;
        if common.truncate.is_none() {
            return Err(usage(
                "resize needs --rank N, one of --sv-ratio, --sv-fro and --sv-cumulative, or a budget",
            ));
        }
        let file = measure.calibration.as_deref();
        common.truncate.check(file.is_some())?;
        let inputs = common.open(&[input], file.as_slice(), out)?;
        if common.dry_run {
            return common.dry_run(&inputs, out);
        }
        let calibration = file.map(host::calibration).transpose()?;
        if let Some(calibration) = &calibration {
            calibration.select(&inputs.adapters.iter().collect::<Vec<_>>())?;
        }
        let method = SvdMerge::new(common.truncate.take(calibration.is_some()));
        common.finish(global, &inputs, calibration.as_deref(), out, &method)
    }
}
