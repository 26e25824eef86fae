//! `loraweld merge METHOD`: a command for each entry of the library's table of methods, and its options as JSON.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser, ValueParser};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, Subcommand, value_parser};
use loraweld::Calibration;
use loraweld::merge::{
    METHODS, MethodEntry, MethodOption, Needs, Number, Only, OptionGroup, Options, Takes, method,
};
use serde_json::{Value, json};

use super::{Common, Inputs, Measure};
use crate::cli::args::{Global, LoraArg, finite, share, weight};
use crate::cli::host;
use crate::cli::output::{Output, count, some};
use crate::cli::report::is_page;
use crate::cli::usage;

/// A method, and what was given for it.
#[derive(Debug)]
pub struct Chosen {
    entry: &'static MethodEntry,
    common: Common,
    given: ArgMatches,
}

impl Subcommand for Chosen {
    fn augment_subcommands(command: Command) -> Command {
        METHODS.iter().map(of).fold(command, Command::subcommand).subcommand_required(true)
    }

    fn augment_subcommands_for_update(command: Command) -> Command {
        Self::augment_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        METHODS.iter().any(|entry| entry.name == name)
    }
}

impl FromArgMatches for Chosen {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = matches.subcommand().and_then(|(name, given)| {
            let entry = METHODS.iter().find(|entry| entry.name == name)?;
            Some((entry, given))
        });
        let (entry, given) =
            given.ok_or_else(|| clap::Error::new(clap::error::ErrorKind::MissingSubcommand))?;
        Ok(Self { entry, common: Common::from_arg_matches(given)?, given: given.clone() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The command of a method: adapters, its own options, what all methods take, its options under a heading.
fn of(entry: &'static MethodEntry) -> Command {
    let lora = |name| Arg::new(name).value_name("LORA").required(true).value_parser(LoraArg::parser());
    let mut command = Command::new(entry.name);
    command = match entry.needs {
        Needs::Style => command
            .arg(
                lora("style").long("style").help("The adapter that is kept whole: PATH, or PATH:STRENGTH"),
            )
            .arg(lora("subject").long("subject").action(ArgAction::Append).help(
                "An adapter that gives way: PATH, or PATH:STRENGTH. Repeated, each also gives way to those before it",
            )),
        _ => command.arg(
            lora("loras")
                .num_args(1..)
                .action(ArgAction::Append)
                .help("Adapters: PATH, or PATH:STRENGTH with any finite strength"),
        ),
    };
    let (headed, plain): (Vec<&OptionGroup>, Vec<_>) =
        entry.options.iter().partition(|group| group.heading.is_some());
    let add = |command, groups: Vec<&OptionGroup>| {
        let args = groups
            .into_iter()
            .flat_map(|group| group.options.iter().map(|option| arg(option).help_heading(group.heading)));
        args.fold(command, Command::arg)
    };
    let calibration = Arg::new("calibration")
        .long("calibration")
        .value_name("FILE|none")
        .required(true)
        .value_parser(value_parser!(PathBuf))
        .help(
            "What `loraweld calibrate` wrote for these adapters (and maybe others); or `none`, for a data-free proxy",
        );
    command = add(command, plain);
    command = match entry.needs {
        Needs::Calibration { .. } => command.arg(calibration),
        _ => Measure::augment_args(command),
    };
    // Last, since arguments that are added bring what they say of themselves.
    add(Common::augment_args(command), headed).about(entry.summary).after_help(entry.notes)
}

/// One option.
fn arg(option: &'static MethodOption) -> Arg {
    let MethodOption { name, takes, help, default, conflicts, .. } = *option;
    let arg = Arg::new(name).long(name).help(help);
    let arg = match takes {
        Takes::Nothing(_) => arg.action(ArgAction::SetTrue),
        Takes::Bool => arg
            .value_name("BOOL")
            .num_args(0..=1)
            .default_missing_value("true")
            .value_parser(value_parser!(bool)),
        Takes::Word(called, words) => {
            let word = |&(word, help): &(&'static str, &'static str)| {
                let value = PossibleValue::new(word);
                if help.is_empty() { value } else { value.help(help) }
            };
            arg.value_name(called).value_parser(PossibleValuesParser::new(words.iter().map(word)))
        }
        Takes::Number(called, number) => numbers(arg.value_name(called), number),
        Takes::NumberOr(called, number, word) => {
            let parse = move |text: &str| match text == word {
                true => Ok(json!(word)),
                false => parsed(text, number).map_err(|e| format!("{e}, or `{word}`")),
            };
            arg.value_name(called).allow_hyphen_values(true).value_parser(ValueParser::new(parse))
        }
        Takes::PerAdapter(called, number) => {
            numbers(arg.value_name(called), number).value_delimiter(',').action(ArgAction::Append)
        }
        Takes::ByLayer { name, key, number, word } => {
            let parse = move |text: &str| by_layer(text, name, key, number, word);
            arg.value_name(name).action(ArgAction::Append).value_parser(ValueParser::new(parse))
        }
    };
    let arg = default.into_iter().fold(arg, Arg::default_value);
    conflicts.into_iter().fold(arg, Arg::conflicts_with)
}

fn numbers(arg: Arg, number: Number) -> Arg {
    match number {
        Number::Whole => arg.value_parser(value_parser!(u64).map(Value::from)),
        Number::Count => arg.value_parser(value_parser!(u32).range(1..).map(Value::from)),
        _ => arg
            .allow_hyphen_values(true)
            .value_parser(ValueParser::new(move |text: &str| parsed(text, number))),
    }
}

fn parsed(text: &str, number: Number) -> Result<Value, String> {
    match number {
        Number::Finite => finite(text).map(Value::from),
        Number::NotNegative => weight(text).map(Value::from),
        Number::Share => share(text).map(Value::from),
        Number::Whole | Number::Count => {
            text.parse::<u64>().map(Value::from).map_err(|_| "expected a whole number".to_owned())
        }
    }
}

/// `PATTERN=X` or `PATTERN=WORD`.
fn by_layer(text: &str, name: &str, key: &str, number: Number, word: &str) -> Result<Value, String> {
    let Some((pattern, value)) = text.rsplit_once('=').filter(|(pattern, _)| !pattern.is_empty()) else {
        let form = name.split('|').next().unwrap_or(name);
        return Err(format!("expected {form}, such as 'single_transformer_blocks.*=0.3'"));
    };
    let value = if value == word { json!(word) } else { json!({ key: parsed(value, number)? }) };
    Ok(json!([pattern, value]))
}

impl Chosen {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let loras = self.loras();
        let mut options = self.options(loras.len())?;
        let Self { entry, mut common, given } = self;
        if entry.needs == Needs::Truncation {
            if common.truncate.is_none() {
                let name = entry.name;
                return Err(usage(format!(
                    "merge {name} needs --rank N, one of --sv-* or a budget; `merge linear` keeps every rank"
                )));
            }
            // The method truncates itself; a dry run says to what.
            let dry = common.dry_run;
            let measured = given.contains_id("calibration");
            let truncation = if dry { common.truncate.truncation() } else { common.truncate.take(measured) };
            options.extend(serde_json::from_value::<Options>(serde_json::to_value(truncation)?)?);
        } else if entry.own_rank {
            options.extend(common.truncate.rank.take().map(|rank| ("rank".to_owned(), rank.into())));
        }

        let mut name = entry.name;
        let mut file = given.get_one::<PathBuf>("calibration").map(PathBuf::as_path);
        if let (Needs::Calibration { or }, true) = (entry.needs, file == Some(Path::new("none"))) {
            (name, file) = (or, None);
        }
        common.truncate.check(file.is_some())?;
        let inputs = common.open(&loras, file.as_slice(), out)?;
        let calibration = file.map(host::calibration).transpose()?;
        let routes = matches!(entry.needs, Needs::Calibration { .. });
        match &calibration {
            Some(calibration) if routes => check(calibration, &inputs, out)?,
            Some(calibration) => {
                calibration.select(&inputs.adapters.iter().collect::<Vec<_>>())?;
            }
            None => {}
        }
        let method = method(name, options, calibration.as_deref()).map_err(|e| usage(e.to_string()))?;
        method.check(loras.len())?;
        if common.dry_run {
            let shared = inputs.plan.layers().iter().any(|layer| layer.members.len() > 1);
            if routes && calibration.is_none() && shared {
                // A merge says so itself.
                out.warn(
                    "no calibration: a data-free proxy, the adapters' own weights, stands for what their layers \
                     read; activations (`loraweld calibrate`) give a better merge",
                )?;
            }
            return common.dry_run(&inputs, out);
        }
        // What routes by a calibration measures what it solves; what is cut off then is not in it, nor is what each adapter
        // loses, which a page shows.
        let changes = !common.truncate.is_none() || common.calibrate_singular_values;
        let shows = common.report.as_deref().is_some_and(is_page);
        let measure = calibration.as_deref().filter(|_| !routes || changes || shows);
        common.finish(global, &inputs, measure, out, &*method)
    }

    /// The adapters, the style first.
    fn loras(&self) -> Vec<LoraArg> {
        let names = if self.entry.needs == Needs::Style { &["style", "subject"][..] } else { &["loras"] };
        names.iter().flat_map(|name| self.given.get_many::<LoraArg>(name)).flatten().cloned().collect()
    }

    /// What was given, by its places in the method's options; defaults are the library's.
    fn options(&self, adapters: usize) -> anyhow::Result<Options> {
        let mut options = Options::new();
        for option in self.entry.all_options().filter(|option| self.is_given(option.name)) {
            if let Some(only) = option.only {
                self.check(option, only)?;
            }
            let value = match option.takes {
                Takes::Nothing(json) => serde_json::from_str(json)?,
                Takes::Bool => self.given.get_one::<bool>(option.name).copied().into(),
                Takes::Word(..) => self.given.get_one::<String>(option.name).cloned().into(),
                Takes::Number(..) | Takes::NumberOr(..) => {
                    self.given.get_one::<Value>(option.name).cloned().into()
                }
                Takes::PerAdapter(..) => {
                    let values = self.values(option.name);
                    per_adapter(option.name, &values, adapters)?;
                    values.into()
                }
                Takes::ByLayer { .. } => self.values(option.name).into(),
            };
            match option.key.split_once('.') {
                Some((key, inner)) => options.insert(key.to_owned(), json!({ inner: value })),
                None => options.insert(option.key.to_owned(), value),
            };
        }
        Ok(options)
    }

    fn is_given(&self, name: &str) -> bool {
        self.given.value_source(name) == Some(ValueSource::CommandLine)
    }

    fn values(&self, name: &str) -> Vec<Value> {
        self.given.get_many::<Value>(name).into_iter().flatten().cloned().collect()
    }

    /// Refuses an option that means nothing with the value of another.
    fn check(&self, option: &MethodOption, only: Only) -> anyhow::Result<()> {
        let has = |name: &str| self.entry.all_options().any(|option| option.name == name);
        let value = match has(only.with) {
            true => self.given.get_one::<String>(only.with).map_or("", String::as_str),
            false => self.entry.name,
        };
        let or = only.or.filter(|name| has(name));
        if only.is.contains(&value) || or.is_some_and(|name| self.given.get_flag(name)) {
            return Ok(());
        }
        let with =
            |is: &&str| if has(only.with) { format!("`--{} {is}`", only.with) } else { is.to_string() };
        let all: Vec<_> = only.is.iter().map(with).chain(or.map(|name| format!("`--{name}`"))).collect();
        let (all, why) = (all.join(" or "), only.why);
        Err(usage(format!("--{} is for {all}, not for {value}: {why}", option.name)))
    }
}

/// Checks that there is a number for each adapter, of which one counts.
fn per_adapter(name: &str, values: &[Value], adapters: usize) -> anyhow::Result<()> {
    if values.len() != adapters {
        return Err(usage(format!(
            "--{name} has {} for {}; give one for each, in order",
            count(values.len(), "weight"),
            count(adapters, "adapter")
        )));
    }
    match values.iter().all(|value| value.as_f64() == Some(0.0)) {
        true => Err(usage(format!("--{name} are all 0; at least one should be more"))),
        false => Ok(()),
    }
}

/// Refuses a calibration of other adapters, and says where it knows nothing.
fn check(calibration: &Calibration, inputs: &Inputs, out: &Output) -> anyhow::Result<()> {
    let adapters: Vec<_> = inputs.adapters.iter().collect();
    let tasks = calibration.select(&adapters)?;
    let shared: BTreeSet<_> =
        inputs.plan.layers().iter().filter(|layer| layer.members.len() > 1).map(|layer| &layer.key).collect();
    let missing: Vec<_> = calibration.missing().into_iter().filter(|(key, _)| shared.contains(key)).collect();
    for (adapter, task) in adapters.iter().zip(tasks) {
        let layers: Vec<_> = missing.iter().filter(|m| m.1 == task).map(|m| &m.0).collect();
        if !layers.is_empty() {
            let what = count(layers.len(), "layer");
            let names = some(layers, 3);
            out.warn(format_args!("{}: {what} without activations: {names}", adapter.name()))?;
        }
    }
    Ok(())
}
