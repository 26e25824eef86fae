//! `loraweld man`

use std::path::PathBuf;

use clap::{Args, Command};
use loraweld::Error;
use loraweld::adapter::write_atomic;

use super::output::{Output, count};

/// Write the manual pages, one for each command and method.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld man --out ~/.local/share/man/man1 && man loraweld-merge-ssr")]
pub struct Man {
    /// The folder to write them in; it is created if it is not there.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Overwrite pages that are there already.
    #[arg(long)]
    force: bool,
}

impl Man {
    pub fn run(self, out: &Output) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.out).map_err(|e| Error::io(&self.out, "create", e))?;
        let pages = pages()?;
        for (name, text) in &pages {
            let path = self.out.join(name);
            write_atomic(&path, self.force, &[], |file| std::io::Write::write_all(file, text))?;
        }
        out.event("man", &serde_json::json!({ "folder": self.out, "pages": pages.len() }))?;
        out.info(format_args!("wrote      {} to {}", count(pages.len(), "page"), self.out.display()))
    }
}

/// Each page, by its file's name.
fn pages() -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let mut command = super::command().disable_help_subcommand(true);
    // Gives every command its full name, and the options that all take.
    command.build();
    let mut pages = Vec::new();
    add(&command, &mut pages)?;
    Ok(pages)
}

fn add(command: &Command, pages: &mut Vec<(String, Vec<u8>)>) -> anyhow::Result<()> {
    let page = clap_mangen::Man::new(command.clone());
    let mut text = Vec::new();
    page.render(&mut text)?;
    pages.push((page.get_filename(), text));
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        add(below, pages)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_command_and_method_has_a_page() {
        let pages = super::pages().expect("pages");
        let page = |name: &str| {
            let (_, text) = pages.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("no {name}"));
            String::from_utf8_lossy(text)
        };
        assert!(page("loraweld.1").contains("loraweld\\-merge(1)"));
        assert!(page("loraweld-merge-ssr.1").contains("ridge\\-relative"));
        assert!(page("loraweld-calibration-add.1").contains("loraweld calibration add"));
        for method in loraweld::merge::METHODS {
            assert!(page(&format!("loraweld-merge-{}.1", method.name)).contains(".TH"));
        }
    }
}
