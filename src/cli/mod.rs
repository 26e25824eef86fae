//! The command line: one file a command, and what they share in [`args`] and [`output`].

mod args;
mod bake;
mod calibrate;
mod calibration;
mod check;
mod checkpoint;
mod convert;
mod demo;
mod devices;
mod extract;
mod inspect;
mod layers;
mod merge;
mod output;
mod overlap;
mod report;
mod schedule;
mod strengths;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::{Parser, Subcommand};
use loraweld::{Error, Remedy};
use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

use self::args::Global;
use self::output::{CANCEL, CANCELLABLE, Output};

/// Merge LoRA adapters of diffusion models without training, on any GPU.
#[derive(Parser, Debug)]
#[command(name = "loraweld", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  loraweld demo                                       see it work, with no files of your own
  loraweld inspect cat.safetensors dog.safetensors    what the files hold, and what of them matches
  loraweld calibrate cat.safetensors dog.safetensors \\
      --activations cat-inputs/ dog-inputs/ -o pets.calibration.safetensors
  loraweld merge ssr cat.safetensors dog.safetensors:0.8 \\
      --calibration pets.calibration.safetensors -o pets.safetensors

Exit code: 0 done, 1 failed, 2 wrong usage.";

#[derive(Subcommand, Debug)]
enum Command {
    Merge(merge::Merge),
    Compare(merge::Compare),
    Resize(merge::Resize),
    Strengths(strengths::StrengthsCommand),
    Bake(bake::Bake),
    Extract(extract::Extract),
    Calibrate(calibrate::Calibrate),
    Calibration(calibration::CalibrationCommand),
    Schedule(schedule::ScheduleCommand),
    Inspect(inspect::Inspect),
    Convert(convert::Convert),
    Check(check::Check),
    Devices(devices::Devices),
    Demo(demo::Demo),
}

/// The arguments do not fit together: exit code 2.
#[derive(Debug)]
struct Usage(String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// An [`anyhow::Error`] of wrong usage.
fn usage(message: impl Into<String>) -> anyhow::Error {
    Usage(message.into()).into()
}

/// Runs the program's arguments.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return refuse(&e),
    };
    let Global { json, quiet, verbose, .. } = cli.global;
    log(verbose);
    // Without a handler, Ctrl-C ends the program as ever; only a temporary file may stay.
    let _ = ctrlc::set_handler(|| {
        // Who is asked for the second time, or does nothing that can be cancelled, ends at once.
        if CANCEL.swap(true, Ordering::Relaxed) || !CANCELLABLE.load(Ordering::Relaxed) {
            loraweld::adapter::remove_temporary_files();
            std::process::exit(130);
        }
    });
    let out = Output::new(json, quiet);
    let Err(error) = run(cli, &out) else { return ExitCode::SUCCESS };
    let is_usage = error.is::<Usage>();
    out.error(&chain(&error), if is_usage { "\nFor more information, try '--help'.\n" } else { "" });
    ExitCode::from(if is_usage { 2 } else { 1 })
}

fn run(cli: Cli, out: &Output) -> anyhow::Result<()> {
    let Cli { global, command } = cli;
    match command {
        Command::Merge(command) => command.run(&global, out),
        Command::Compare(command) => command.run(&global, out),
        Command::Resize(command) => command.run(&global, out),
        Command::Strengths(command) => command.run(&global, out),
        Command::Bake(command) => command.run(out),
        Command::Extract(command) => command.run(out),
        Command::Calibrate(command) => command.run(&global, out),
        Command::Calibration(command) => command.run(out),
        Command::Schedule(command) => command.run(out),
        Command::Inspect(command) => command.run(out),
        Command::Convert(command) => command.run(out),
        Command::Check(command) => command.run(out),
        Command::Devices(command) => command.run(&global, out),
        Command::Demo(command) => command.run(&global, out),
    }
}

/// The error and its causes, but for those that the message before already tells, and which option helps.
fn chain(error: &anyhow::Error) -> String {
    let text = error.chain().skip(1).fold(error.to_string(), |text, cause| match cause.to_string() {
        cause if text.contains(&cause) => text,
        cause => format!("{text}: {cause}"),
    });
    match error.chain().find_map(|cause| cause.downcast_ref().and_then(remedy)) {
        Some(remedy) => format!("{text}; {remedy}"),
        None => text,
    }
}

/// The option that lets a command do what the library has refused.
fn remedy(error: &loraweld::Error) -> Option<&'static str> {
    Some(match error {
        Error::Exists { .. } => "`--force` overwrites it",
        Error::NotMergeable { remedy: Remedy::Skip, .. } => "`--skip-unsupported` leaves such tensors out",
        Error::NotMergeable { remedy: Remedy::Rank, .. } => {
            "`--allow-truncate RANK` reads it as a LoRA of that rank, and says what is lost"
        }
        Error::NotMergeable { remedy: Remedy::Base, .. } => {
            "`--base FILE` gives the weights, and `--allow-truncate RANK` the rank"
        }
        Error::Unnamed { .. } => {
            "`--skip-unnamed` leaves them out, `--keep-unnamed` keeps the names that the file has, `--model` says which \
             model it is"
        }
        _ => return None,
    })
}

/// Help and version go to stdout, wrong usage to stderr; a reader of JSON lines is told as well.
fn refuse(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if error.use_stderr() && std::env::args_os().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        // Usage and hints follow after an empty line.
        let lines: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        let message = lines.join(" ").trim_start_matches("error: ").to_owned();
        let _ = Output::new(true, true).event("error", &serde_json::json!({ "message": message }));
    }
    ExitCode::from(if error.use_stderr() { 2 } else { 0 })
}

/// Logs to stderr. `RUST_LOG` says what in more detail than `-v`: levels and `target=level`, with commas between them.
fn log(verbose: u8) {
    let levels = std::env::var("RUST_LOG").ok().and_then(|text| text.parse().ok());
    let filter = levels.unwrap_or_else(|| match verbose {
        0 => Targets::new(),
        1 => Targets::new().with_target("loraweld", Level::INFO),
        2 => Targets::new().with_target("loraweld", Level::DEBUG),
        _ => Targets::new().with_default(Level::TRACE),
    });
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(colours);
    tracing_subscriber::registry().with(lines.with_filter(filter)).init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
