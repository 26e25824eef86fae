//! KnOTS: bring the updates into one basis of their outputs, and merge there by a rule.

use super::entry::{MethodEntry, Needs, Options, Variant, with};
use super::of_entries::OF_ENTRIES;
use super::rule::RULE;
use super::{Rule, Ties};
use crate::merge::Method;
use crate::merge::cores::{CoreMerge, Space};
use crate::{Calibration, Result};

pub(super) const ENTRY: MethodEntry = MethodEntry {
    name: "knots",
    summary: "KnOTS: bring the updates into one basis of their outputs, and merge there by a rule",
    notes: "\
Examples:
  loraweld merge knots cat.safetensors dog.safetensors --rule ties --density 0.5 -o both.safetensors
  loraweld merge knots cat.safetensors dog.safetensors --as paper -o both.safetensors

`--as paper` ranks the entries of all layers together, as the authors' code does.",
    needs: Needs::Nothing,
    own_rank: false,
    options: &[RULE, OF_ENTRIES],
    build,
    variants: &[Variant {
        name: "knots-paper",
        aliases: &[],
        whose: Some("As in the authors' code"),
        build: |options, calibration| build(with(options, "as", "paper"), calibration),
    }],
};

fn build<'a>(options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(CoreMerge::knots(Rule::parse(options, Ties::paper())?)))
}

impl CoreMerge {
    /// KnOTS with a rule.
    pub fn knots(rule: Rule) -> Self {
        Self::new("knots", Space::Left, rule.json(), rule.in_core())
    }
}
