//! The `loraweld` command.

mod cli;
mod words;

fn main() -> std::process::ExitCode {
    cli::main()
}
