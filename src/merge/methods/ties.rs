//! TIES: keep each adapter's largest entries, elect signs, average what agrees.

use serde::{Deserialize, Serialize};

use super::entry::{MethodEntry, Needs, Options, Variant, over, tagged, take, take_own_rule, with};
use super::of_entries::{OF_ENTRIES, Whose};
use crate::merge::Method;
use crate::merge::entries::{Alone, Elect, EntryMerge, EntryOptions, Scope, Trim, ZeroSum};
use crate::{Calibration, Result};

pub(super) const ENTRY: MethodEntry = MethodEntry {
    name: "ties",
    summary: "TIES: keep each adapter's largest entries, elect signs, average what agrees; on whole updates, not on A and B \
              apart",
    notes: "\
Examples:
  loraweld merge ties cat.safetensors dog.safetensors --density 0.5 -o both.safetensors
  loraweld merge ties cat.safetensors dog.safetensors --as paper -o both.safetensors

`--as paper` is the authors' code: `--scope file --one-more --zero-sum majority --alone merge`. `--as peft` is PEFT's
`ties_svd`: `--elect unweighted --alone merge`.",
    needs: Needs::Nothing,
    own_rank: true,
    options: &[OF_ENTRIES],
    build,
    variants: &[
        Variant {
            name: "ties-paper",
            aliases: &[],
            whose: Some("As in the authors' code"),
            build: |options, calibration| build(with(options, "as", "paper"), calibration),
        },
        Variant {
            name: "ties-peft",
            aliases: &[],
            whose: Some("As `ties_svd` of PEFT"),
            build: |options, calibration| build(with(options, "as", "peft"), calibration),
        },
    ],
};

fn build<'a>(mut options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    let rank: Option<usize> = take(&mut options, "rank")?;
    take_own_rule(&mut options, "ties")?;
    let base = match take(&mut options, "as")?.unwrap_or_default() {
        Whose::Loraweld => Ties::default(),
        Whose::Paper => Ties::paper(),
        Whose::Peft => Ties::peft(),
    };
    let merge = EntryMerge::ties(over(&base, options)?);
    Ok(Box::new(rank.into_iter().fold(merge, EntryMerge::rank)))
}

/// TIES (arXiv 2306.01708): of each matrix keep the share `density` of largest magnitude, elect for each entry the sign
/// of the sum, and average the kept values of that sign, times λ.
///
/// `⌊density·n⌋` of n entries are kept, at least one, and what is as large as the smallest of them; magnitudes are
/// compared as f32. What the authors' code and PEFT do otherwise are options:
///
/// | | here | [`paper`](Self::paper) | [`peft`](Self::peft) |
/// |---|---|---|---|
/// | [`scope`](Self::scope): entries are ranked | in each layer | in all layers together | in each layer |
/// | [`one_more`](Self::one_more): entries kept | ⌊density·n⌋ | ⌊density·n⌋ + 1 | ⌊density·n⌋ |
/// | [`elect`](Self::elect): strengths count | before signs are elected | before (there are none) | after |
/// | [`zero`](Self::zero): a sum of zero elects | plus | the majority's sign | plus |
/// | [`alone`](Self::alone): layers of one adapter | pass through | are trimmed | are trimmed |
///
/// The defaults let a strength say how much an adapter counts in an election, need no pass over the file beforehand, and
/// leave alone what no other adapter touches. The authors' code is that of `ties-merging`, and of KnOTS; PEFT's is
/// `add_weighted_adapter` with `ties_svd` (its `ties` works on A and B apart, which is something else).
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ties {
    /// Share of the entries that is kept, in (0, 1]; 0.2 by default, as in the paper.
    pub density: f64,
    /// λ; 1 by default.
    pub lambda: f64,
    /// Among which entries the share is kept.
    pub scope: Scope,
    /// Keep one entry more than `⌊density·n⌋`, as the authors' code does.
    pub one_more: bool,
    /// When strengths count.
    pub elect: Elect,
    /// What a sum of zero elects.
    pub zero: ZeroSum,
    /// What becomes of layers of one adapter.
    pub alone: Alone,
}

impl Default for Ties {
    fn default() -> Self {
        Self {
            density: 0.2,
            lambda: 1.0,
            scope: Scope::default(),
            one_more: false,
            elect: Elect::default(),
            zero: ZeroSum::default(),
            alone: Alone::default(),
        }
    }
}

impl Ties {
    /// As the authors' code defines it.
    pub fn paper() -> Self {
        Self {
            scope: Scope::File,
            one_more: true,
            zero: ZeroSum::Majority,
            alone: Alone::Merge,
            ..Self::default()
        }
    }

    /// As PEFT defines it.
    pub fn peft() -> Self {
        Self { elect: Elect::Unweighted, alone: Alone::Merge, ..Self::default() }
    }
}

impl From<Ties> for EntryOptions {
    fn from(ties: Ties) -> Self {
        let Ties { density, lambda, scope, one_more, elect, zero, alone } = ties;
        Self {
            density,
            lambda,
            trim: Some(Trim { scope, one_more }),
            chance: u32::MAX,
            seed: 0,
            elects: true,
            scale: lambda,
            unweighted: elect == Elect::Unweighted,
            majority: (zero == ZeroSum::Majority).then_some(scope),
            alone: alone == Alone::Merge,
        }
    }
}

impl EntryMerge {
    /// TIES.
    pub fn ties(options: Ties) -> Self {
        Self::new("ties", tagged("ties", &options), options.into())
    }
}
