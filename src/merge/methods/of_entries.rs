//! The options that TIES and DARE share, as methods and as rules of others.

use serde::Deserialize;

use super::entry::{MethodOption, Number, Only, OptionGroup, Takes};

/// Whose definition of a method its options begin with: their option `as`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Whose {
    #[default]
    Loraweld,
    Paper,
    Peft,
}

/// For rules that look at entries.
const ENTRYWISE: Only = Only { with: "rule", is: &["ties", "dare"], or: None, why: "it looks at no entries" };

/// Where signs are elected.
const ELECTED: Only = Only {
    with: "rule",
    is: &["ties"],
    or: Some("ties"),
    why: "it is about signs that are elected; dare sums, and strengths scale a sum",
};

/// Where the largest entries are kept.
const TRIMMED: Only =
    Only { with: "rule", is: &["ties"], or: None, why: "dare leaves to chance what it keeps" };

pub(super) const OF_ENTRIES: OptionGroup = OptionGroup {
    heading: Some("Options of ties and dare"),
    options: &[
        MethodOption::new(
            "density",
            Takes::Number("SHARE", Number::Share),
            "Share of the entries that is kept [default: 0.2 with ties, 0.5 with dare]",
        )
        .only(ENTRYWISE),
        MethodOption::new(
            "lambda",
            Takes::Number("X", Number::Finite),
            "Factor on what agrees in sign, with ties [default: 1]",
        )
        .only(ELECTED),
        MethodOption::new(
            "seed",
            Takes::Number("N", Number::Whole),
            "Where the chance of dare begins [default: 0]",
        )
        .only(Only { with: "rule", is: &["dare"], or: None, why: "ties leaves nothing to chance" }),
        MethodOption::new(
            "as",
            Takes::Word("WHOSE", &[("loraweld", ""), ("paper", ""), ("peft", "")]),
            "Whose definition: `loraweld`, the `paper`'s, as in its authors' code, or `peft`'s. It sets the options below, \
             each of which can be given besides",
        )
        .default("loraweld"),
        MethodOption::new(
            "scope",
            Takes::Word("SCOPE", &[("layer", ""), ("file", "")]),
            "Where ties ranks entries: in each `layer`, as PEFT does, or in all layers of the `file` together, as the paper \
             does [default: layer, so that no layer is trimmed away]",
        )
        .only(TRIMMED),
        MethodOption::new(
            "one-more",
            Takes::Bool,
            "Ties keeps one entry more than the share, as the paper's code does; PEFT does not [default: false]",
        )
        .key("one_more")
        .only(TRIMMED),
        MethodOption::new(
            "elect",
            Takes::Word("ELECT", &[("weighted", ""), ("unweighted", "")]),
            "Signs are elected by entries `weighted` with the strengths, or `unweighted`, as by PEFT; the paper has no \
             strengths [default: weighted, so that a strength says how much an adapter counts]",
        )
        .only(ELECTED),
        MethodOption::new(
            "zero-sum",
            Takes::Word("ZERO_SUM", &[("plus", ""), ("majority", "")]),
            "What a sum of zero elects: `plus`, as in PEFT, or the sign of the `majority`, as in the paper [default: plus, \
             which depends on no other entry]",
        )
        .key("zero")
        .only(ELECTED),
        MethodOption::new(
            "alone",
            Takes::Word("ALONE", &[("keep", ""), ("merge", "")]),
            "Layers of one adapter: `keep` them as they are, or `merge` them, which trims or drops entries there too, as the \
             paper and PEFT do [default: keep, since there is nothing to settle]",
        )
        .only(ENTRYWISE),
    ],
};
