//! `loraweld merge knots`, `core`, `tsv` and `iso-c`

use clap::Args;
use loraweld::{CoreMerge, Dare, Rule, Ties};

use super::{Common, Measure};
use crate::cli::args::{Global, LoraArg, finite, share};
use crate::cli::output::Output;
use crate::cli::usage;

/// KnOTS: bring the updates into one basis of their outputs, and merge there by a rule.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge knots cat.safetensors dog.safetensors --rule ties --density 0.5 -o both.safetensors")]
pub struct KnotsMerge {
    #[command(flatten)]
    ruled: Ruled,
}

/// Core Space: bring the updates into one small core, and merge there by a rule.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge core cat.safetensors dog.safetensors --rule tsv -o both.safetensors")]
pub struct CoreSpaceMerge {
    #[command(flatten)]
    ruled: Ruled,
}

#[derive(Args, Debug)]
struct Ruled {
    #[command(flatten)]
    plain: Plain,
    /// How the cores are merged.
    #[arg(long, value_enum, default_value = "ties")]
    rule: RuleArg,
    #[command(flatten)]
    options: EntryOptions,
}

/// TSV-Merge: make the singular vectors of the adapters orthogonal to each other, and keep their singular values.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge tsv cat.safetensors dog.safetensors:0.8 -o both.safetensors")]
pub struct TsvMerge {
    #[command(flatten)]
    plain: Plain,
}

/// Iso-C: give all directions of the sum the same strength, the mean of its singular values.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge iso-c cat.safetensors dog.safetensors -o both.safetensors")]
pub struct IsoCMerge {
    #[command(flatten)]
    plain: Plain,
}

#[derive(Args, Debug)]
struct Plain {
    /// Adapters: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(required = true, value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    #[command(flatten)]
    measure: Measure,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum RuleArg {
    /// Their sum.
    Sum,
    /// Their average.
    Mean,
    /// Trim small entries, elect signs, average what agrees.
    Ties,
    /// Drop entries at random, scale the others up, sum.
    Dare,
    /// Orthogonal singular vectors.
    Tsv,
    /// Equal singular values.
    Iso,
}

/// Options of TIES and DARE.
#[derive(Args, Debug)]
#[command(next_help_heading = "Options of ties and dare")]
pub struct EntryOptions {
    /// Share of the entries that is kept [default: 0.2 with ties, 0.5 with dare].
    #[arg(long, value_name = "SHARE", value_parser = share, allow_hyphen_values = true)]
    density: Option<f64>,
    /// Factor on what agrees in sign, with ties [default: 1].
    #[arg(long, value_name = "X", value_parser = finite, allow_hyphen_values = true)]
    lambda: Option<f64>,
    /// Where the chance of dare begins [default: 0].
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

impl EntryOptions {
    pub fn ties(&self) -> anyhow::Result<Ties> {
        let default = Ties::default();
        if self.seed.is_some() {
            return Err(usage("--seed is for dare; ties leaves nothing to chance"));
        }
        Ok(Ties {
            density: self.density.unwrap_or(default.density),
            lambda: self.lambda.unwrap_or(default.lambda),
        })
    }

    pub fn dare(&self, ties: bool) -> anyhow::Result<Dare> {
        let default = Dare::default();
        if self.lambda.is_some() && !ties {
            return Err(usage("--lambda is for signs that are elected; strengths scale a sum"));
        }
        Ok(Dare {
            density: self.density.unwrap_or(default.density),
            lambda: self.lambda.unwrap_or(default.lambda),
            seed: self.seed.unwrap_or(default.seed),
            ties,
        })
    }

    fn none(&self, rule: RuleArg) -> anyhow::Result<()> {
        match self.density.is_some() || self.lambda.is_some() || self.seed.is_some() {
            false => Ok(()),
            true => Err(usage(format!(
                "--density, --lambda and --seed are for the rules ties and dare, not for {rule:?}"
            ))),
        }
    }
}

impl Ruled {
    fn rule(&self) -> anyhow::Result<Rule> {
        let plain = match self.rule {
            RuleArg::Ties => return Ok(Rule::Ties(self.options.ties()?)),
            RuleArg::Dare => return Ok(Rule::Dare(self.options.dare(false)?)),
            RuleArg::Sum => Rule::Sum,
            RuleArg::Mean => Rule::Mean,
            RuleArg::Tsv => Rule::Tsv,
            RuleArg::Iso => Rule::Iso,
        };
        self.options.none(self.rule)?;
        Ok(plain)
    }
}

impl Plain {
    fn run(self, merge: &CoreMerge, global: &Global, out: &Output) -> anyhow::Result<()> {
        let Self { loras, measure, common } = self;
        common.run(&loras, &measure, global, out, merge)
    }
}

impl KnotsMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let merge = CoreMerge::knots(self.ruled.rule()?);
        self.ruled.plain.run(&merge, global, out)
    }
}

impl CoreSpaceMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let merge = CoreMerge::core(self.ruled.rule()?);
        self.ruled.plain.run(&merge, global, out)
    }
}

impl TsvMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        self.plain.run(&CoreMerge::tsv(), global, out)
    }
}

impl IsoCMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        self.plain.run(&CoreMerge::iso_c(), global, out)
    }
}
