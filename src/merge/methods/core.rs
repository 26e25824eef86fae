//! Core Space: bring the updates into one small core, and merge there by a rule.

use super::entry::{
    MethodEntry, MethodOption, Needs, Only, OptionGroup, Options, Takes, Variant, take, with,
};
use super::of_entries::OF_ENTRIES;
use super::rule::RULE;
use super::{Rule, Ties};
use crate::merge::Method;
use crate::merge::cores::{Bases, CoreMerge, Space};
use crate::merge::entries::Scope;
use crate::{Calibration, Result};

pub(super) const ENTRY: MethodEntry = MethodEntry {
    name: "core",
    summary: "Core Space: bring the updates into one small core, and merge there by a rule",
    notes: "\
Examples:
  loraweld merge core cat.safetensors dog.safetensors --rule tsv -o both.safetensors
  loraweld merge core cat.safetensors dog.safetensors --as paper -o both.safetensors

`--as paper` takes the bases of the factors, and trims layer by layer, as the authors' code does.",
    needs: Needs::Nothing,
    own_rank: false,
    options: &[
        OptionGroup {
            heading: None,
            options: &[MethodOption::new(
                "bases",
                Takes::Word("BASES", &[("updates", ""), ("factors", "")]),
                "Bases in which ties and dare look at entries: `updates`, the singular vectors of the stacked updates, or \
                 `factors`, those of the stacked A and of the stacked B, the paper's [default: updates, which do not depend \
                 on how an adapter splits its update into B and A]",
            )
            .only(Only { with: "rule", is: &["ties", "dare"], or: None, why: "it is the same in all" })],
        },
        RULE,
        OF_ENTRIES,
    ],
    build,
    variants: &[Variant {
        name: "core-paper",
        aliases: &[],
        whose: Some("As in the authors' code"),
        build: |options, calibration| build(with(options, "as", "paper"), calibration),
    }],
};

fn build<'a>(mut options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    let is_paper = options.get("as").is_some_and(|whose| whose == "paper");
    let bases: Option<Bases> = take(&mut options, "bases")?;
    let rule = Rule::parse(options, paper())?;
    let default = if is_paper && rule.is_entrywise() { Bases::Factors } else { Bases::default() };
    Ok(Box::new(CoreMerge::core(rule).bases(bases.unwrap_or(default))))
}

/// TIES as the authors of Core Space define it.
fn paper() -> Ties {
    Ties { scope: Scope::Layer, ..Ties::paper() }
}

impl CoreMerge {
    /// Core Space with a rule.
    pub fn core(rule: Rule) -> Self {
        Self::new("core", Space::Core, rule.json(), rule.in_core())
    }

    /// Core Space with TIES as its authors define it: in their bases, layer by layer, one entry more than the share.
    pub fn core_paper() -> Self {
        Self::core(Rule::Ties(paper())).bases(Bases::Factors)
    }
}
