//! DARE: drop entries at random, scale the others up, and sum them or elect signs.

use serde::{Deserialize, Serialize};

use super::entry::{
    MethodEntry, MethodOption, Needs, OptionGroup, Options, Takes, Variant, over, tagged, take,
    take_own_rule, with,
};
use super::of_entries::{OF_ENTRIES, Whose};
use crate::merge::Method;
use crate::merge::entries::{Alone, Elect, EntryMerge, EntryOptions, Scope, ZeroSum};
use crate::{Calibration, Result};

pub(super) const ENTRY: MethodEntry = MethodEntry {
    name: "dare",
    summary: "DARE: drop entries of each adapter's update at random, scale the others up, and sum",
    notes: "\
Examples:
  loraweld merge dare cat.safetensors dog.safetensors --density 0.5 --seed 7 -o both.safetensors

`--as paper` is the authors' code: `--alone merge`, and with `--ties` also `--zero-sum majority`. `--as peft` is PEFT's
`dare_linear_svd`: `--alone merge`, and with `--ties` its `dare_ties_svd`: also `--elect unweighted`.",
    needs: Needs::Nothing,
    own_rank: true,
    options: &[
        OptionGroup {
            heading: None,
            options: &[MethodOption::new(
                "ties",
                Takes::Nothing("true"),
                "Elect signs as ties does, and average what agrees, instead of the sum",
            )],
        },
        OF_ENTRIES,
    ],
    build,
    variants: &[Variant {
        name: "dare-paper",
        aliases: &["dare-peft"],
        whose: Some("As in the authors' code, and as `dare_linear_svd` of PEFT"),
        build: |options, calibration| build(with(options, "as", "paper"), calibration),
    }],
};

fn build<'a>(mut options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    let rank: Option<usize> = take(&mut options, "rank")?;
    take_own_rule(&mut options, "dare")?;
    let base = match take(&mut options, "as")?.unwrap_or_default() {
        Whose::Loraweld => Dare::default(),
        Whose::Paper => Dare::paper(),
        Whose::Peft => Dare::peft(),
    };
    let merge = EntryMerge::dare(over(&base, options)?);
    Ok(Box::new(rank.into_iter().fold(merge, EntryMerge::rank)))
}

/// DARE (arXiv 2311.03099): drop entries at random, scale the rest by 1/density, then sum them, or merge them by the
/// sign election of TIES.
///
/// Which entries are dropped follows from the seed, the layer's name, the adapter's place and the entry's, by a
/// counter-based hash: the same on every device and in every run. The authors' code and PEFT differ in what is not chance:
///
/// | | here | [`paper`](Self::paper) | [`peft`](Self::peft) |
/// |---|---|---|---|
/// | [`alone`](Self::alone): layers of one adapter | pass through | drop entries | drop entries |
/// | [`elect`](Self::elect), with `ties`: strengths count | before signs are elected | before (there are none) | after |
/// | [`zero`](Self::zero), with `ties`: a sum of zero elects | plus | the file's majority | plus |
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Dare {
    /// Share of the entries that is kept, 1 − p of the paper, in (0, 1]; 0.5 by default.
    pub density: f64,
    /// Elect signs as TIES does, without trimming; else sum.
    pub ties: bool,
    /// λ of the election; 1 by default.
    pub lambda: f64,
    /// Where chance begins; 0 by default.
    pub seed: u64,
    /// When strengths count in an election.
    pub elect: Elect,
    /// What a sum of zero elects.
    pub zero: ZeroSum,
    /// What becomes of layers of one adapter.
    pub alone: Alone,
}

impl Default for Dare {
    fn default() -> Self {
        Self {
            density: 0.5,
            ties: false,
            lambda: 1.0,
            seed: 0,
            elect: Elect::default(),
            zero: ZeroSum::default(),
            alone: Alone::default(),
        }
    }
}

impl Dare {
    /// As the authors' code defines it.
    pub fn paper() -> Self {
        Self { zero: ZeroSum::Majority, alone: Alone::Merge, ..Self::default() }
    }

    /// As PEFT defines it.
    pub fn peft() -> Self {
        Self { elect: Elect::Unweighted, alone: Alone::Merge, ..Self::default() }
    }
}

impl From<Dare> for EntryOptions {
    fn from(dare: Dare) -> Self {
        let Dare { density, ties, lambda, seed, elect, zero, alone } = dare;
        Self {
            density,
            lambda,
            trim: None,
            chance: (density * (1u64 << 32) as f64 - 1.0).round() as u32,
            seed,
            elects: ties,
            scale: if ties { lambda / density } else { 1.0 / density },
            unweighted: ties && elect == Elect::Unweighted,
            majority: (ties && zero == ZeroSum::Majority).then_some(Scope::File),
            alone: alone == Alone::Merge,
        }
    }
}

impl EntryMerge {
    /// DARE.
    pub fn dare(options: Dare) -> Self {
        Self::new("dare", tagged("dare", &options), options.into())
    }
}
