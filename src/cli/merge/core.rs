//! `loraweld merge knots`, `core`, `tsv` and `iso-c`

use clap::Args;
use loraweld::{Alone, Bases, CoreMerge, Dare, Elect, Iso, IsoMean, Keep, Rule, Scope, Ties, Tsv, ZeroSum};

use super::{Common, Measure};
use crate::cli::args::{Global, LoraArg, finite, share};
use crate::cli::output::Output;
use crate::cli::usage;

/// KnOTS: bring the updates into one basis of their outputs, and merge there by a rule.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge knots cat.safetensors dog.safetensors --rule ties --density 0.5 -o both.safetensors
  loraweld merge knots cat.safetensors dog.safetensors --as paper -o both.safetensors

`--as paper` ranks the entries of all layers together, as the authors' code does.")]
pub struct KnotsMerge {
    #[command(flatten)]
    ruled: Ruled,
}

/// Core Space: bring the updates into one small core, and merge there by a rule.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge core cat.safetensors dog.safetensors --rule tsv -o both.safetensors
  loraweld merge core cat.safetensors dog.safetensors --as paper -o both.safetensors

`--as paper` takes the bases of the factors, and trims layer by layer, as the authors' code does.")]
pub struct CoreSpaceMerge {
    /// Bases in which ties and dare look at entries: `updates`, the singular vectors of the stacked updates, or `factors`,
    /// those of the stacked A and of the stacked B, the paper's [default: updates, which do not depend on how an adapter
    /// splits its update into B and A].
    #[arg(long, value_enum)]
    bases: Option<BasesArg>,
    #[command(flatten)]
    ruled: Ruled,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum BasesArg {
    Updates,
    Factors,
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
    /// Singular values that each adapter keeps: `all`, or `share`, the sum of the ranks divided by the number of adapters,
    /// the paper's, which cuts adapters of a higher rank than others [default: all, since LoRAs leave room for them].
    #[arg(long, value_enum)]
    keep: Option<KeepArg>,
    #[command(flatten)]
    plain: Plain,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum KeepArg {
    All,
    Share,
}

/// Iso-C: give all directions of the sum the same strength, the mean of its singular values.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge iso-c cat.safetensors dog.safetensors -o both.safetensors")]
pub struct IsoCMerge {
    /// Over what the singular values are averaged: the `directions` of the sum, or the `width` of the layer, min(in, out),
    /// the paper's, which is much weaker [default: directions, so that the result is as strong as the sum].
    #[arg(long, value_enum)]
    mean: Option<MeanArg>,
    #[command(flatten)]
    plain: Plain,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum MeanArg {
    Directions,
    Width,
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
    /// Whose definition: `loraweld`, the `paper`'s, as in its authors' code, or `peft`'s. It sets the options below, each of
    /// which can be given besides.
    #[arg(long = "as", value_enum, value_name = "WHOSE", default_value = "loraweld")]
    whose: Whose,
    /// Where ties ranks entries: in each `layer`, as PEFT does, or in all layers of the `file` together, as the paper does
    /// [default: layer, so that no layer is trimmed away].
    #[arg(long, value_enum)]
    scope: Option<ScopeArg>,
    /// Ties keeps one entry more than the share, as the paper's code does; PEFT does not [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    one_more: Option<bool>,
    /// Signs are elected by entries `weighted` with the strengths, or `unweighted`, as by PEFT; the paper has no strengths
    /// [default: weighted, so that a strength says how much an adapter counts].
    #[arg(long, value_enum)]
    elect: Option<ElectArg>,
    /// What a sum of zero elects: `plus`, as in PEFT, or the sign of the `majority`, as in the paper [default: plus, which
    /// depends on no other entry].
    #[arg(long, value_enum)]
    zero_sum: Option<ZeroArg>,
    /// Layers of one adapter: `keep` them as they are, or `merge` them, which trims or drops entries there too, as the paper
    /// and PEFT do [default: keep, since there is nothing to settle].
    #[arg(long, value_enum)]
    alone: Option<AloneArg>,
}

/// Whose definition of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Whose {
    Loraweld,
    Paper,
    Peft,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum ScopeArg {
    Layer,
    File,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum ElectArg {
    Weighted,
    Unweighted,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum ZeroArg {
    Plus,
    Majority,
}

#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum AloneArg {
    Keep,
    Merge,
}

impl EntryOptions {
    /// TIES; `paper`: as its authors define it in the method that it is a rule of.
    pub fn ties(&self, paper: Ties) -> anyhow::Result<Ties> {
        if self.seed.is_some() {
            return Err(usage("--seed is for dare; ties leaves nothing to chance"));
        }
        let base = match self.whose {
            Whose::Loraweld => Ties::default(),
            Whose::Paper => paper,
            Whose::Peft => Ties::peft(),
        };
        Ok(Ties {
            density: self.density.unwrap_or(base.density),
            lambda: self.lambda.unwrap_or(base.lambda),
            scope: self.scope.map_or(base.scope, |scope| match scope {
                ScopeArg::Layer => Scope::Layer,
                ScopeArg::File => Scope::File,
            }),
            one_more: self.one_more.unwrap_or(base.one_more),
            elect: self.elect(base.elect),
            zero: self.zero(base.zero),
            alone: self.alone(base.alone),
        })
    }

    pub fn dare(&self, ties: bool) -> anyhow::Result<Dare> {
        if self.scope.is_some() || self.one_more.is_some() {
            return Err(usage("--scope and --one-more are for ties; dare leaves to chance what it keeps"));
        }
        let elects = self.lambda.is_some() || self.elect.is_some() || self.zero_sum.is_some();
        if elects && !ties {
            return Err(usage(
                "--lambda, --elect and --zero-sum are for signs that are elected; dare sums, and strengths scale a sum",
            ));
        }
        let base = match self.whose {
            Whose::Loraweld => Dare::default(),
            Whose::Paper => Dare::paper(),
            Whose::Peft => Dare::peft(),
        };
        Ok(Dare {
            density: self.density.unwrap_or(base.density),
            lambda: self.lambda.unwrap_or(base.lambda),
            seed: self.seed.unwrap_or(base.seed),
            ties,
            elect: self.elect(base.elect),
            zero: self.zero(base.zero),
            alone: self.alone(base.alone),
        })
    }

    fn elect(&self, base: Elect) -> Elect {
        self.elect.map_or(base, |elect| match elect {
            ElectArg::Weighted => Elect::Weighted,
            ElectArg::Unweighted => Elect::Unweighted,
        })
    }

    fn zero(&self, base: ZeroSum) -> ZeroSum {
        self.zero_sum.map_or(base, |zero| match zero {
            ZeroArg::Plus => ZeroSum::Plus,
            ZeroArg::Majority => ZeroSum::Majority,
        })
    }

    fn alone(&self, base: Alone) -> Alone {
        self.alone.map_or(base, |alone| match alone {
            AloneArg::Keep => Alone::Keep,
            AloneArg::Merge => Alone::Merge,
        })
    }

    /// Refuses what is given, but for whose definition it is to be.
    fn none(&self, rule: RuleArg) -> anyhow::Result<()> {
        let Self { density, lambda, seed, whose: _, scope, one_more, elect, zero_sum, alone } = self;
        let given = [
            ("--density", density.is_some()),
            ("--lambda", lambda.is_some()),
            ("--seed", seed.is_some()),
            ("--scope", scope.is_some()),
            ("--one-more", one_more.is_some()),
            ("--elect", elect.is_some()),
            ("--zero-sum", zero_sum.is_some()),
            ("--alone", alone.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((flag, _)) => {
                Err(usage(format!("{flag} is for the rules ties and dare, not for {}", rule.name())))
            }
        }
    }
}

impl RuleArg {
    fn name(self) -> String {
        use clap::ValueEnum;
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

impl Ruled {
    /// `paper`: TIES as the method's authors define it.
    fn rule(&self, paper: Ties) -> anyhow::Result<Rule> {
        let is_paper = match self.options.whose {
            Whose::Loraweld => false,
            Whose::Paper => true,
            Whose::Peft => {
                return Err(usage(
                    "--as peft: PEFT has neither KnOTS nor Core Space; its TIES is `merge ties`",
                ));
            }
        };
        let plain = match self.rule {
            RuleArg::Ties => return Ok(Rule::Ties(self.options.ties(paper)?)),
            RuleArg::Dare => return Ok(Rule::Dare(self.options.dare(false)?)),
            RuleArg::Sum => Rule::Sum,
            RuleArg::Mean => Rule::Mean,
            RuleArg::Tsv => Rule::Tsv(if is_paper { Tsv::paper() } else { Tsv::default() }),
            // Core Space averages over the core, as it is here.
            RuleArg::Iso => Rule::Iso(Iso::default()),
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
        let merge = CoreMerge::knots(self.ruled.rule(Ties::paper())?);
        self.ruled.plain.run(&merge, global, out)
    }
}

impl CoreSpaceMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let Self { bases, ruled } = self;
        let is_entrywise = matches!(ruled.rule, RuleArg::Ties | RuleArg::Dare);
        if bases.is_some() && !is_entrywise {
            let rule = ruled.rule.name();
            return Err(usage(format!("--bases is for the rules ties and dare; {rule} is the same in all")));
        }
        let bases = match bases {
            Some(BasesArg::Updates) => Bases::Updates,
            Some(BasesArg::Factors) => Bases::Factors,
            None if ruled.options.whose == Whose::Paper && is_entrywise => Bases::Factors,
            None => Bases::default(),
        };
        let rule = ruled.rule(Ties { scope: Scope::Layer, ..Ties::paper() })?;
        ruled.plain.run(&CoreMerge::core(rule).bases(bases), global, out)
    }
}

impl TsvMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let keep = match self.keep {
            Some(KeepArg::Share) => Keep::Share,
            Some(KeepArg::All) | None => Keep::All,
        };
        self.plain.run(&CoreMerge::tsv(Tsv { keep }), global, out)
    }
}

impl IsoCMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let mean = match self.mean {
            Some(MeanArg::Width) => IsoMean::Width,
            Some(MeanArg::Directions) | None => IsoMean::Directions,
        };
        self.plain.run(&CoreMerge::iso_c(Iso { mean }), global, out)
    }
}
