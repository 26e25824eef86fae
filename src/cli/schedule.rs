//! `loraweld schedule`

use std::path::PathBuf;

use clap::{Args, Subcommand};
use loraweld::adapter::check_target;
use loraweld::fusion::{Balance, EstOptions, KLoraOptions, Schedule, craft, est, k_lora};
use loraweld::{Adapter, Weighted};
use serde_json::json;

use super::args::{LoraArg, finite, weight};
use super::output::{Output, count};

/// Compute which adapter acts at which layer and step of a generation.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld schedule k-lora --subject cat.safetensors --style ink.safetensors -o schedule.json
  loraweld schedule k-lora --subject cat.safetensors --style ink.safetensors \\
      --balance ratios --wrap --beta 1.275 -o schedule.json
  loraweld schedule est --subject cat.safetensors --style ink.safetensors --delta 0.4 -o schedule.json

The file is JSON: for each layer, when each adapter acts, as shares of the run. Hosts read it with
`fusion::Schedule`.")]
pub struct ScheduleCommand {
    #[command(subcommand)]
    method: Method,
}

#[derive(Subcommand, Debug)]
enum Method {
    /// The subject acts while its largest entries outweigh the style's (K-LoRA).
    KLora {
        #[command(flatten)]
        common: Common,
        /// How fast the style's score grows over the run.
        #[arg(long, value_parser = weight, allow_hyphen_values = true, default_value = "1.5")]
        alpha: f64,
        /// The factor of the style's score at the start.
        #[arg(long, value_parser = finite, allow_hyphen_values = true, default_value = "0.5")]
        beta: f64,
        /// The factor that balances the two adapters [default: what --balance says].
        #[arg(long, value_parser = weight, allow_hyphen_values = true)]
        gamma: Option<f64>,
        /// How that factor is found: `sums`, of all entries of all layers, as in the paper, or `ratios`, the mean of the
        /// layers' own factors without outliers, as in the authors' code.
        #[arg(long, value_enum, default_value = "sums")]
        balance: BalanceArg,
        /// Let the factor of the style start again at zero once it reaches alpha, as the authors' code does unless told
        /// otherwise (its pattern `s*`, with --beta 1.275); the paper does not.
        #[arg(long)]
        wrap: bool,
    },
    /// The subject acts while its energy outweighs the style's (EST-LoRA).
    Est {
        #[command(flatten)]
        common: Common,
        /// How fast the style's energy counts more over the run.
        #[arg(long, value_parser = weight, allow_hyphen_values = true, default_value = "1.5")]
        alpha: f64,
        /// What is taken off the style's factor of 1 at the start.
        #[arg(long, value_parser = finite, allow_hyphen_values = true, default_value = "0.5")]
        delta: f64,
    },
    /// The subject acts early, the style late, in between both (CRAFT-LoRA).
    Craft {
        #[command(flatten)]
        common: Common,
        /// The share of the run after which the subject rests.
        #[arg(long, value_parser = weight, allow_hyphen_values = true, default_value = "0.7")]
        subject_until: f64,
        /// The share of the run before which the style rests.
        #[arg(long, value_parser = weight, allow_hyphen_values = true, default_value = "0.28")]
        style_from: f64,
    },
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum BalanceArg {
    Sums,
    Ratios,
}

#[derive(Args, Debug)]
struct Common {
    /// The subject: PATH, or PATH:STRENGTH.
    #[arg(long, value_name = "LORA", value_parser = LoraArg::parser())]
    subject: LoraArg,
    /// The style: PATH, or PATH:STRENGTH.
    #[arg(long, value_name = "LORA", value_parser = LoraArg::parser())]
    style: LoraArg,
    /// The schedule to write.
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Overwrite an existing output; never an input.
    #[arg(long)]
    force: bool,
}

impl ScheduleCommand {
    pub fn run(self, out: &Output) -> anyhow::Result<()> {
        match self.method {
            Method::KLora { common, alpha, beta, gamma, balance, wrap } => {
                common.run(out, |subject, style| {
                    let balance = match balance {
                        BalanceArg::Sums => Balance::Sums,
                        BalanceArg::Ratios => Balance::Ratios,
                    };
                    let options = KLoraOptions { alpha, beta, gamma, balance, wrap };
                    out.long(|control| k_lora(subject, style, &options, *control))
                })
            }
            Method::Est { common, alpha, delta } => {
                common.run(out, |subject, style| est(subject, style, &EstOptions { alpha, delta }))
            }
            Method::Craft { common, subject_until, style_from } => {
                common.run(out, |subject, style| craft(subject, style, subject_until, style_from))
            }
        }
    }
}

impl Common {
    fn run(
        &self,
        out: &Output,
        compute: impl FnOnce(Weighted<'_>, Weighted<'_>) -> loraweld::Result<Schedule>,
    ) -> anyhow::Result<()> {
        let files = [self.subject.path.clone(), self.style.path.clone()];
        check_target(&self.output, self.force, &files)?;
        let (subject, style) = (Adapter::open(&self.subject.path)?, Adapter::open(&self.style.path)?);
        let schedule = compute(subject.at(self.subject.strength), style.at(self.style.strength))?;
        schedule.save(&self.output, self.force, &files)?;
        // At the middle of the run, to give an idea.
        let acting = |adapter: usize| {
            let acts = |name: &&str| schedule.weights(name, 1, 2).is_some_and(|w| w[adapter] > 0.0);
            schedule.layers.values().map(|layer| layer.name.as_str()).filter(acts).count()
        };
        let (subjects, styles) = (acting(0), acting(1));
        out.event(
            "schedule",
            &json!({
                "output": self.output,
                "method": schedule.method,
                "options": schedule.options,
                "layers": schedule.layers.len(),
                "subject_at_half": subjects,
                "style_at_half": styles,
            }),
        )?;
        out.info(format_args!(
            "{} of {}: halfway through a run the subject acts on {subjects}, the style on {styles}",
            schedule.method,
            count(schedule.layers.len(), "layer")
        ))?;
        out.result(format_args!("wrote      {}", self.output.display()))
    }
}
