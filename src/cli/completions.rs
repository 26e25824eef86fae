//! `loraweld completions`

use clap::Args;
use clap_complete::Shell;

use super::output::Output;

/// Print a script that lets a shell complete commands, methods and options.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld completions bash > ~/.local/share/bash-completion/completions/loraweld
  loraweld completions zsh > ~/.zfunc/_loraweld        a folder that `fpath` names
  loraweld completions fish > ~/.config/fish/completions/loraweld.fish
  loraweld completions powershell >> $PROFILE")]
pub struct Completions {
    /// The shell.
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

impl Completions {
    pub fn run(self, out: &Output) -> anyhow::Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::command(), "loraweld", &mut script);
        let script = String::from_utf8(script)?;
        out.event("completions", &serde_json::json!({ "shell": self.shell.to_string(), "script": script }))?;
        out.result(script.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    #[test]
    fn every_shell_knows_methods_and_options() {
        for shell in clap_complete::Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut super::super::command(), "loraweld", &mut script);
            let script = String::from_utf8(script).expect("text");
            for word in ["np-lora", "batch", "ridge-relative"] {
                assert!(script.contains(word), "{shell}: {word}");
            }
        }
    }
}
