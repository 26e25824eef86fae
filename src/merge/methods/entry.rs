//! How a method is entered in [`METHODS`]: as data, from which command lines and bindings make what they offer.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::METHODS;
use crate::merge::Method;
use crate::{Calibration, Error, Result};

/// Options of a method by their names, as in [`Report::options`](crate::Report::options); those left out have their
/// defaults.
pub type Options = Map<String, Value>;

/// Makes a method of its options and of the calibration that it may need.
pub type Build = for<'a> fn(Options, Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>>;

/// A method of merging.
#[derive(Debug)]
pub struct MethodEntry {
    /// Its name, such as `np-lora`.
    pub name: &'static str,
    /// What it does, in one sentence.
    pub summary: &'static str,
    /// What follows the options in its help: examples, and how options hang together.
    pub notes: &'static str,
    /// What it needs besides adapters.
    pub needs: Needs,
    /// Whether it makes its result at the rank that is asked for, its option `rank`, instead of truncating it to that.
    pub own_rank: bool,
    /// Its options.
    pub options: &'static [OptionGroup],
    /// Makes it; [`method`] does so by name.
    pub build: Build,
    /// The same method with options that have a name of their own.
    pub variants: &'static [Variant],
}

/// What a method needs besides adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// A calibration of the adapters.
    Calibration {
        /// The variant that goes without.
        or: &'static str,
    },
    /// That the first adapter is the style, and one or more subjects follow.
    Style,
    /// A truncation, which its options are.
    Truncation,
}

/// A method with certain options.
#[derive(Debug)]
pub struct Variant {
    /// Its name, such as `ties-paper`.
    pub name: &'static str,
    /// Other names of the same.
    pub aliases: &'static [&'static str],
    /// Whose definition it is, where it is not ours.
    pub whose: Option<&'static str>,
    /// Makes it; other options can be given besides.
    pub build: Build,
}

/// Options that belong together.
#[derive(Debug)]
pub struct OptionGroup {
    /// What they are the options of, if that is not the method as a whole.
    pub heading: Option<&'static str>,
    /// The options.
    pub options: &'static [MethodOption],
}

/// An option of a method, as a command line takes it.
#[derive(Clone, Copy, Debug)]
pub struct MethodOption {
    /// Its name, such as `ridge-relative`.
    pub name: &'static str,
    /// Where its value is in [`Options`]: a name, or two with a dot in between, such as `ridge.relative`.
    pub key: &'static str,
    /// What is given.
    pub takes: Takes,
    /// What it does.
    pub help: &'static str,
    /// The default, in words that it takes; else the help tells it.
    pub default: Option<&'static str>,
    /// Another option that cannot be given besides.
    pub conflicts: Option<&'static str>,
    /// With what else it means something.
    pub only: Option<Only>,
}

/// What an option takes.
#[derive(Clone, Copy, Debug)]
pub enum Takes {
    /// Nothing: that it is given stands for this value, in JSON.
    Nothing(&'static str),
    /// Whether it is so; given without a value it is.
    Bool,
    /// One of these words, with what each means where the help does not say so; and what the word is called.
    Word(&'static str, &'static [(&'static str, &'static str)]),
    /// A number, and what it is called.
    Number(&'static str, Number),
    /// A number, or this word; and what it is called, such as `P|fair`.
    NumberOr(&'static str, Number, &'static str),
    /// A number for each adapter.
    PerAdapter(&'static str, Number),
    /// `PATTERN=X` or `PATTERN=WORD`, any number of times, for layers whose name matches: `[PATTERN, {KEY: X}]` or
    /// `[PATTERN, WORD]`.
    ByLayer {
        /// What it is called, such as `PATTERN=MU|hard`.
        name: &'static str,
        /// KEY.
        key: &'static str,
        /// Which X.
        number: Number,
        /// WORD.
        word: &'static str,
    },
}

/// Which numbers an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// Any finite one.
    Finite,
    /// Finite ones of 0 or more.
    NotNegative,
    /// Those above 0 and at most 1.
    Share,
    /// Whole ones of 0 or more.
    Whole,
    /// Whole ones of 1 or more.
    Count,
}

/// An option means something only with certain values of another.
#[derive(Clone, Copy, Debug)]
pub struct Only {
    /// The other option. Where a method has none of this name, the method's own name is its value.
    pub with: &'static str,
    /// The values with which it means something.
    pub is: &'static [&'static str],
    /// An option that takes nothing, with which it always does.
    pub or: Option<&'static str>,
    /// Why not with other values.
    pub why: &'static str,
}

impl MethodOption {
    /// An option without a default, under the same name in [`Options`].
    pub(super) const fn new(name: &'static str, takes: Takes, help: &'static str) -> Self {
        Self { name, key: name, takes, help, default: None, conflicts: None, only: None }
    }

    pub(super) const fn key(self, key: &'static str) -> Self {
        Self { key, ..self }
    }

    pub(super) const fn default(self, default: &'static str) -> Self {
        Self { default: Some(default), ..self }
    }

    pub(super) const fn conflicts(self, other: &'static str) -> Self {
        Self { conflicts: Some(other), ..self }
    }

    pub(super) const fn only(self, only: Only) -> Self {
        Self { only: Some(only), ..self }
    }
}

impl MethodEntry {
    /// All options.
    pub fn all_options(&self) -> impl Iterator<Item = &'static MethodOption> {
        self.options.iter().flat_map(|group| group.options)
    }
}

/// The method or variant of this name in [`METHODS`], with options.
///
/// # Errors
/// [`Error::Invalid`] for a name that there is not, with those that there are; for options that the method does not take
/// or whose values make no sense; and without a calibration for a method that needs one.
pub fn method<'a>(
    name: &str,
    options: Options,
    calibration: Option<&'a Calibration>,
) -> Result<Box<dyn Method + 'a>> {
    let named = |entry: &'static MethodEntry| {
        let is = |variant: &&Variant| variant.name == name || variant.aliases.contains(&name);
        match entry.variants.iter().find(is) {
            _ if entry.name == name => Some((entry.needs, entry.build)),
            Some(variant) if entry.needs == (Needs::Calibration { or: variant.name }) => {
                Some((Needs::Nothing, variant.build))
            }
            variant => Some((entry.needs, variant?.build)),
        }
    };
    let Some((needs, build)) = METHODS.iter().find_map(named) else {
        let names: Vec<&str> = METHODS
            .iter()
            .flat_map(|e| [e.name].into_iter().chain(e.variants.iter().map(|v| v.name)))
            .collect();
        return Err(Error::Invalid(format!("method: `{name}`, but it is one of {}", names.join(", "))));
    };
    if let (Needs::Calibration { or }, None) = (needs, calibration) {
        return Err(Error::Invalid(format!(
            "no calibration was given; {name} takes one ({or} goes without)"
        )));
    }
    build(options, calibration).map_err(|e| match e {
        Error::Invalid(reason) => Error::Invalid(format!("options of {name}: {reason}")),
        e => e,
    })
}

/// Takes one option out of the others.
pub(super) fn take<T: DeserializeOwned>(options: &mut Options, key: &str) -> Result<Option<T>> {
    let value = options.remove(key).map(serde_json::from_value::<Option<T>>).transpose();
    value.map(Option::flatten).map_err(|e| Error::Invalid(format!("`{key}`: {e}")))
}

/// Options with one more, unless it is among them.
pub(super) fn with(mut options: Options, key: &str, value: impl Into<Value>) -> Options {
    options.entry(key).or_insert_with(|| value.into());
    options
}

/// Takes out the name of a rule, as reports have it among the options of a method that is one.
pub(super) fn take_own_rule(options: &mut Options, rule: &str) -> Result<()> {
    match options.remove("rule") {
        Some(other) if other != rule => Err(Error::Invalid(format!("its rule is \"{rule}\", not {other}"))),
        _ => Ok(()),
    }
}

/// Options over those of `base`.
pub(super) fn over<T: Serialize + DeserializeOwned>(base: &T, options: Options) -> Result<T> {
    let mut all = json(base)?;
    if let Value::Object(all) = &mut all {
        all.extend(options);
    }
    serde_json::from_value(all).map_err(|e| Error::Invalid(e.to_string()))
}

/// Refuses what is left of options.
pub(super) fn no_more(options: &Options) -> Result<()> {
    match options.keys().next() {
        Some(key) => Err(Error::Invalid(format!("there is no `{key}`"))),
        None => Ok(()),
    }
}

/// Options as a report has them.
pub(super) fn json(options: &impl Serialize) -> Result<Value> {
    serde_json::to_value(options).map_err(|e| Error::Invalid(format!("the options: {e}")))
}

/// Options of a method that is a rule, as a report has them: with the rule's name first.
pub(super) fn tagged(rule: &str, options: &impl Serialize) -> Value {
    let mut all = Options::from_iter([("rule".to_owned(), rule.into())]);
    if let Ok(Value::Object(options)) = serde_json::to_value(options) {
        all.extend(options);
    }
    all.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Adapter, Format, Layer, Matrix};

    #[test]
    fn every_method_can_be_made_by_its_name() {
        let layer = Layer::new("a", Matrix::zeros(1, 1), Matrix::zeros(1, 1)).unwrap();
        let calibration = Calibration::new(&[Adapter::new("a", Format::Peft, vec![layer]).unwrap()]).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for entry in METHODS {
            let variants = entry.variants.iter().flat_map(|v| std::iter::once(&v.name).chain(v.aliases));
            for name in std::iter::once(&entry.name).chain(variants) {
                assert!(seen.insert(*name), "{name} twice");
                let made = method(name, Options::new(), Some(&calibration)).unwrap();
                made.check(2).unwrap();
            }
            for option in entry.all_options() {
                assert!(!option.help.ends_with('.'), "{}", option.name);
                let named = |other| entry.all_options().any(|option| option.name == other);
                assert!(option.conflicts.is_none_or(named), "{}", option.name);
            }
            let (readme, name) = (include_str!("../../../README.md"), entry.name);
            assert!(
                readme.contains(&format!("`{name}`")) || readme.contains(&format!("`merge {name}")),
                "{name}"
            );
        }
        assert!(method("ssr", Options::new(), None).is_err());
        assert!(method("ssr-data-free", Options::new(), None).is_ok());
    }

    #[test]
    fn what_is_given_goes_over_what_a_variant_says() {
        let made =
            |name, options: &str| method(name, serde_json::from_str(options).unwrap(), None).map(|_| ());
        assert!(made("tsv-paper", r#"{"keep": "all"}"#).is_ok());
        let refused = |name, options| made(name, options).unwrap_err().to_string();
        assert!(refused("tsv", r#"{"kept": "all"}"#).contains("options of tsv: unknown field `kept`"));
        assert!(refused("core", r#"{"rule": "sum", "density": 0.5}"#).contains("there is no `density`"));
        assert!(refused("median", "{}").contains("one of ssr, ssr-data-free, ssr-fair, np-lora,"));
    }
}
