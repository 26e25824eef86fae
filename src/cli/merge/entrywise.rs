//! `loraweld merge ties` and `dare`

use clap::Args;
use loraweld::{EntryMerge, Ties};

use super::core::EntryOptions;
use super::{Common, Measure};
use crate::cli::args::{Global, LoraArg};
use crate::cli::output::Output;

/// TIES: keep each adapter's largest entries, elect signs, average what agrees; on whole updates, not on A and B apart.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge ties cat.safetensors dog.safetensors --density 0.5 -o both.safetensors
  loraweld merge ties cat.safetensors dog.safetensors --as paper -o both.safetensors

`--as paper` is the authors' code: `--scope file --one-more --zero-sum majority --alone merge`. `--as peft` is PEFT's
`ties_svd`: `--elect unweighted --alone merge`.")]
pub struct TiesMerge {
    #[command(flatten)]
    shared: Shared,
}

/// DARE: drop entries of each adapter's update at random, scale the others up, and sum.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge dare cat.safetensors dog.safetensors --density 0.5 --seed 7 -o both.safetensors

`--as paper` is the authors' code: `--alone merge`, and with `--ties` also `--zero-sum majority`. `--as peft` is PEFT's
`dare_linear_svd`: `--alone merge`, and with `--ties` its `dare_ties_svd`: also `--elect unweighted`.")]
pub struct DareMerge {
    /// Elect signs as ties does, and average what agrees, instead of the sum.
    #[arg(long)]
    ties: bool,
    #[command(flatten)]
    shared: Shared,
}

#[derive(Args, Debug)]
struct Shared {
    /// Adapters: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(required = true, value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    #[command(flatten)]
    options: EntryOptions,
    #[command(flatten)]
    measure: Measure,
    #[command(flatten)]
    common: Common,
}

impl Shared {
    fn run(self, merge: EntryMerge, global: &Global, out: &Output) -> anyhow::Result<()> {
        let Self { loras, measure, mut common, .. } = self;
        // The approximation is made at the rank that is asked for.
        let merge = match common.truncate.rank.take() {
            Some(rank) => merge.rank(rank),
            None => merge,
        };
        common.run(&loras, &measure, global, out, &merge)
    }
}

impl TiesMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let merge = EntryMerge::ties(self.shared.options.ties(Ties::paper())?);
        self.shared.run(merge, global, out)
    }
}

impl DareMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let merge = EntryMerge::dare(self.shared.options.dare(self.ties)?);
        self.shared.run(merge, global, out)
    }
}
