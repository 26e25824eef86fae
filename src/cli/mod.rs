//! The command line: one file a command, and what they share in `args` and `output`.
//!
//! It is a part of the library so that other programs can run it in their own process: [`main_with`] does as the program
//! does, [`run_for`] does without its terminal. It is no promise to anybody but this repository's own bindings.

mod args;
mod bake;
mod batch;
mod calibrate;
mod calibration;
mod check;
mod checkpoint;
mod completions;
mod convert;
mod demo;
mod devices;
mod extract;
mod host;
mod inspect;
pub mod kept;
mod layers;
mod man;
mod merge;
mod output;
mod overlap;
mod report;
mod schedule;
mod strengths;

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser, Subcommand};
use loraweld::{Error, Remedy};
use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

use self::args::Global;
pub use self::args::cache_folder;
pub use self::host::{Failure, Host, Lent, Told};
use self::output::Output;

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
    Batch(batch::Batch),
    Calibrate(calibrate::Calibrate),
    Calibration(calibration::CalibrationCommand),
    Schedule(schedule::ScheduleCommand),
    Inspect(inspect::Inspect),
    Convert(convert::Convert),
    Check(check::Check),
    Devices(devices::Devices),
    Demo(demo::Demo),
    Completions(completions::Completions),
    Man(man::Man),
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
    ExitCode::from(main_with(std::env::args_os()))
}

/// Runs these arguments as the program does, the first of which is its name, and gives its exit code.
pub fn main_with(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args: Vec<OsString> = args.into_iter().collect();
    host::said(&args);
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(e) => return refuse(&e, args.iter().any(|arg| arg == "--json")),
    };
    let Global { json, quiet, verbose, .. } = cli.global;
    log(verbose);
    stop_on_ctrl_c();
    #[cfg(unix)]
    crate::io::disk::mapped::end_when_cut();
    let out = Output::new(json, quiet);
    let Err(error) = run(cli, &out) else { return 0 };
    let is_usage = error.is::<Usage>();
    out.error(&chain(&error), if is_usage { "\nFor more information, try '--help'.\n" } else { "" });
    if is_usage { 2 } else { 1 }
}

/// Has Ctrl-C and SIGTERM end long calls.
#[cfg(not(target_arch = "wasm32"))]
fn stop_on_ctrl_c() {
    use self::output::{CANCEL, CANCELLABLE};
    use std::sync::atomic::Ordering;

    // Without a handler, Ctrl-C ends the program as ever; only a temporary file may stay.
    let _ = ctrlc::set_handler(|| {
        // Who is asked for the second time, or does nothing that can be cancelled, ends at once.
        if CANCEL.swap(true, Ordering::Relaxed) || !CANCELLABLE.load(Ordering::Relaxed) {
            loraweld::adapter::remove_temporary_files();
            std::process::exit(130);
        }
    });
}

/// A browser has no signals.
#[cfg(target_arch = "wasm32")]
fn stop_on_ctrl_c() {}

/// Runs these arguments for a host, the first of which is the program's name. Nothing is printed, and no handler of
/// signals is set.
pub fn run_for(
    host: &Arc<Host>,
    args: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<(), Failure> {
    let words: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let cli = Cli::try_parse_from(&words).map_err(|e| Failure::usage(in_one_line(&e)))?;
    let out = Output::hosted(host.clone());
    let failure = |error: anyhow::Error| Failure::new(text(&error), error.is::<Usage>(), error);
    host::with(host, words, || run(cli, &out)).map_err(failure)
}

/// Whether an argument of a command is an adapter, with or without a strength.
pub fn is_adapter(arg: &clap::Arg) -> bool {
    arg.get_value_parser().type_id() == std::any::TypeId::of::<args::LoraArg>()
}

/// The commands and their arguments.
pub fn command() -> clap::Command {
    Cli::command()
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
        Command::Batch(command) => command.run(&global, out),
        Command::Calibrate(command) => command.run(&global, out),
        Command::Calibration(command) => command.run(out),
        Command::Schedule(command) => command.run(out),
        Command::Inspect(command) => command.run(out),
        Command::Convert(command) => command.run(out),
        Command::Check(command) => command.run(out),
        Command::Devices(command) => command.run(&global, out),
        Command::Demo(command) => command.run(&global, out),
        Command::Completions(command) => command.run(out),
        Command::Man(command) => command.run(out),
    }
}

/// The error and its causes, but for those that the message before already tells.
fn text(error: &anyhow::Error) -> String {
    error.chain().skip(1).fold(error.to_string(), |text, cause| match cause.to_string() {
        cause if text.contains(&cause) => text,
        cause => format!("{text}: {cause}"),
    })
}

/// The error and its causes, and which option helps.
fn chain(error: &anyhow::Error) -> String {
    let text = text(error);
    match error.chain().find_map(|cause| cause.downcast_ref().and_then(remedy)) {
        Some(remedy) => format!("{text}; {remedy}"),
        None => text,
    }
}

/// The option that lets a command do what the library has refused.
pub fn remedy(error: &loraweld::Error) -> Option<&'static str> {
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
fn refuse(error: &clap::Error, json: bool) -> u8 {
    let _ = error.print();
    if error.use_stderr() && json {
        let message = in_one_line(error);
        let _ = Output::new(true, true).event("error", &serde_json::json!({ "message": message }));
    }
    if error.use_stderr() { 2 } else { 0 }
}

/// What clap says is wrong, without usage and hints, which follow after an empty line.
fn in_one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
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
    #[test]
    fn arguments_are_consistent() {
        super::command().debug_assert();
    }
}
