//! What commands take, from the command line's own description.

use clap::{ArgAction, Command};
use loraweld::cli;
use loraweld::merge::{METHODS, Needs};
use pyo3::prelude::*;
use serde_json::{Value, json};

use crate::error::Raised;

/// The arguments of a command, such as `["merge", "ssr"]`, as a list in JSON; without a command's name, the commands.
#[pyfunction]
pub fn arguments(names: Vec<String>) -> PyResult<String> {
    let mut root = cli::command();
    // Hands the options of every command down.
    root.build();
    let mut command = &root;
    for name in &names {
        command = command.find_subcommand(name).ok_or_else(|| {
            let known: Vec<_> = commands(command).collect();
            Raised::invalid(format!("there is no `{name}`; expected one of {}", known.join(", ")))
        })?;
    }
    let list: Vec<Value> = command.get_arguments().filter(|arg| is_for_programs(arg)).map(argument).collect();
    let about = command.get_about().map(ToString::to_string);
    let all = json!({ "about": about, "commands": commands(command).collect::<Vec<_>>(), "arguments": list });
    Ok(all.to_string())
}

fn commands(command: &Command) -> impl Iterator<Item = &str> {
    command.get_subcommands().map(Command::get_name).filter(|name| *name != "help")
}

/// Not those that are about a terminal.
fn is_for_programs(arg: &clap::Arg) -> bool {
    !["help", "version", "json", "quiet", "verbose"].contains(&arg.get_id().as_str())
}

fn argument(arg: &clap::Arg) -> Value {
    let flag = matches!(arg.get_action(), ArgAction::SetTrue);
    let values = arg.get_possible_values();
    json!({
        "name": arg.get_long().unwrap_or(arg.get_id().as_str()),
        "positional": arg.is_positional(),
        "required": arg.is_required_set(),
        "flag": flag,
        "many": matches!(arg.get_action(), ArgAction::Append)
            || arg.get_num_args().is_some_and(|range| range.max_values() > 1),
        "adapter": cli::is_adapter(arg),
        "delimiter": arg.get_value_delimiter(),
        "value": arg.get_value_names().into_iter().flatten().map(ToString::to_string).next().filter(|_| !flag),
        "values": match flag {
            true => Vec::new(),
            false => values.iter().map(|value| value.get_name().to_owned()).collect::<Vec<_>>(),
        },
        "default": defaults(arg).filter(|_| !flag),
        "heading": arg.get_help_heading(),
        "help": arg.get_help().map(ToString::to_string),
    })
}

/// The default as one would give it: several values in one word, if that is how they are given.
fn defaults(arg: &clap::Arg) -> Option<String> {
    let values: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    let between = arg.get_value_delimiter().unwrap_or(' ');
    (!values.is_empty()).then(|| values.join(&between.to_string()))
}

/// The methods, as a list in JSON.
#[pyfunction]
pub fn methods() -> String {
    let method = |entry: &loraweld::MethodEntry| {
        let or = match entry.needs {
            Needs::Calibration { or } => Some(or),
            _ => None,
        };
        json!({
            "name": entry.name,
            "summary": entry.summary,
            "without_calibration": or,
            "style_first": entry.needs == Needs::Style,
            "options": entry.all_options().map(|option| option.name).collect::<Vec<_>>(),
        })
    };
    Value::from_iter(METHODS.iter().map(method)).to_string()
}

/// A sentence about options, with their names as Python's functions have them: `--sv-ratio` is `sv_ratio`.
pub fn in_python(text: &str) -> String {
    fn all(command: &Command, names: &mut Vec<String>) {
        names.extend(command.get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned)));
        command.get_subcommands().for_each(|command| all(command, names));
    }
    let mut names = Vec::new();
    all(&cli::command(), &mut names);
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("--") {
        let (before, option) = rest.split_at(at);
        let option = &option[2..];
        let end = option.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap_or(option.len());
        let (name, after) = option.split_at(end);
        out += before;
        let starts = before.chars().next_back().is_none_or(|c| c.is_whitespace() || "`'(".contains(c));
        let several = after.starts_with('*');
        let is_known = |known: &String| known == name || several && known.starts_with(name);
        if !(starts && names.iter().any(is_known)) {
            out += "--";
            out += name;
        } else {
            out += &name.replace('-', "_");
        }
        rest = after;
    }
    out + rest
}
