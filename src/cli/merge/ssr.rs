//! `loraweld merge ssr`

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;
use loraweld::merge::{Prior, Ridge};
use loraweld::{Calibration, Ssr, SsrOptions};

use super::{Common, Inputs};
use crate::cli::args::{Global, LoraArg, weight};
use crate::cli::output::{Output, count, some};
use crate::cli::usage;

/// SSR-Merge: route each input to the adapters that know it, by a calibration.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge ssr cat.safetensors dog.safetensors:0.8 \\
      --calibration pets.calibration.safetensors -o pets.safetensors
  loraweld merge ssr cat.safetensors dog.safetensors --calibration none --dry-run
  loraweld merge ssr cat.safetensors dog.safetensors --calibration pets.calibration.safetensors \\
      --ridge 1e-4 --prior zero -o as-published.safetensors")]
pub struct SsrMerge {
    /// Adapters: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(required = true, value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    /// What `loraweld calibrate` wrote for these adapters (and maybe others); or `none`, for a data-free proxy.
    #[arg(long, value_name = "FILE|none")]
    calibration: PathBuf,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    options: Options,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "SSR options")]
struct Options {
    /// Ridge, added to the mean Gram matrix as it is (the paper's: 1e-4).
    #[arg(long, value_name = "X", value_parser = weight, allow_hyphen_values = true)]
    ridge: Option<f64>,
    /// Ridge, as a multiple of the mean Gram matrix's diagonal [default: 1e-3].
    #[arg(
        long,
        value_name = "X",
        value_parser = weight,
        allow_hyphen_values = true,
        conflicts_with = "ridge"
    )]
    ridge_relative: Option<f64>,
    /// What to assume of inputs that the calibration has not seen: what the adapters' own weights say, or
    /// that they should get the sum, nothing (the paper's), or the average of the adapters.
    #[arg(long, value_enum, default_value = "adapters")]
    prior: PriorArg,
    /// Weight of `--prior adapters` against the calibration [default: 0.03].
    #[arg(long, value_name = "W", value_parser = weight, allow_hyphen_values = true)]
    prior_weight: Option<f64>,
    /// How much each adapter's own inputs count, in the order of the adapters [default: 1 each].
    #[arg(
        long,
        value_name = "W,W,...",
        value_parser = weight,
        value_delimiter = ',',
        allow_hyphen_values = true
    )]
    task_weights: Option<Vec<f64>>,
    /// Count adapters with a strong output less, by its energy to this power; 0 is off.
    #[arg(long, value_name = "P", value_parser = weight, allow_hyphen_values = true, default_value = "0")]
    balance: f64,
    /// How much the calibration's neutral inputs count, on which the merge should do nothing.
    #[arg(long, value_name = "W", value_parser = weight, allow_hyphen_values = true, default_value = "0")]
    neutral_weight: f64,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum PriorArg {
    Adapters,
    Sum,
    Zero,
    Average,
}

impl Options {
    /// Checks what depends on other arguments, too.
    fn build(&self, adapters: usize) -> anyhow::Result<SsrOptions> {
        let default = SsrOptions::default();
        if let Some(weights) = &self.task_weights {
            if weights.len() != adapters {
                return Err(usage(format!(
                    "--task-weights has {} for {}; give one for each, in order",
                    count(weights.len(), "weight"),
                    count(adapters, "adapter")
                )));
            }
            if weights.iter().all(|w| *w == 0.0) {
                return Err(usage("--task-weights are all 0; at least one should be more"));
            }
        }
        let prior = match self.prior {
            PriorArg::Adapters => Prior::Adapters,
            PriorArg::Sum => Prior::Sum,
            PriorArg::Zero => Prior::Zero,
            PriorArg::Average => Prior::Average,
        };
        if self.prior_weight.is_some() && prior != Prior::Adapters {
            return Err(usage("--prior-weight is for `--prior adapters`; --ridge weighs the others"));
        }
        Ok(SsrOptions {
            ridge: match (self.ridge, self.ridge_relative) {
                (Some(x), _) => Ridge::Absolute(x),
                (None, Some(x)) => Ridge::Relative(x),
                (None, None) => default.ridge,
            },
            prior,
            prior_weight: self.prior_weight.unwrap_or(default.prior_weight),
            task_weights: self.task_weights.clone(),
            balance: self.balance,
            neutral_weight: self.neutral_weight,
        })
    }
}

impl SsrMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let options = self.options.build(self.loras.len())?;
        let file = Some(self.calibration.as_path()).filter(|path| *path != Path::new("none"));
        let inputs = self.common.open(&self.loras, file.as_slice(), out)?;
        let calibration = file.map(Calibration::open).transpose()?;
        if let Some(calibration) = &calibration {
            check(calibration, &inputs, out)?;
        }
        let ssr = calibration.as_ref().map_or(Ssr::data_free(), Ssr::new).options(options);
        ssr.check(self.loras.len())?;
        if self.common.dry_run {
            if calibration.is_none() && inputs.plan.layers().iter().any(|layer| layer.members.len() > 1) {
                // A merge says so itself.
                out.warn(
                    "no calibration: a data-free proxy, the adapters' own weights, stands for what their layers \
                     read; activations (`loraweld calibrate`) give a better merge",
                )?;
            }
            return self.common.dry_run(&inputs, out);
        }
        // It measures what it solves; what is cut off then is not in it.
        let measure = calibration.as_ref().filter(|_| !self.common.truncate.truncation().is_none());
        self.common.finish(global, &inputs, measure, out, &ssr)
    }
}

/// Refuses a calibration of other adapters, and says where it knows nothing.
fn check(calibration: &Calibration, inputs: &Inputs, out: &Output) -> anyhow::Result<()> {
    let adapters: Vec<_> = inputs.adapters.iter().collect();
    let tasks = calibration.select(&adapters)?;
    let shared: BTreeSet<_> =
        inputs.plan.layers().iter().filter(|layer| layer.members.len() > 1).map(|layer| &layer.key).collect();
    let missing: Vec<_> = calibration.missing().into_iter().filter(|(key, _)| shared.contains(key)).collect();
    for (adapter, task) in adapters.iter().zip(tasks) {
        let layers: Vec<_> = missing.iter().filter(|m| m.1 == task).map(|m| &m.0).collect();
        if !layers.is_empty() {
            let what = count(layers.len(), "layer");
            let names = some(layers, 3);
            out.warn(format_args!("{}: {what} without activations: {names}", adapter.name()))?;
        }
    }
    Ok(())
}
