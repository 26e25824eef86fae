//! `loraweld calibration add` and `show`

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use loraweld::adapter::{check_target, write_atomic};
use loraweld::{Calibration, LayerKey};
use serde_json::json;

use super::layers::{group, pattern, range};
use super::output::{Output, Table, count, size, some};
use super::report::{Recorded, is_page};
use super::usage;
use crate::io::atomic::len;

/// Add up calibrations, or show one.
#[derive(Args, Debug)]
pub struct CalibrationCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    Add(Add),
    Show(Show),
}

/// Add up calibrations of the same adapters, such as of several machines or prompts.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  loraweld calibration add monday.safetensors tuesday.safetensors -o both.safetensors")]
struct Add {
    /// Calibrations of the same adapters, in any order of them.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The calibration to write.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Overwrite an existing output.
    #[arg(long)]
    force: bool,
}

/// Show which adapters a calibration is of, and how much it has seen.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  loraweld calibration show pets.calibration.safetensors --report pets.html")]
struct Show {
    /// The calibration.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Write a page to look at.
    #[arg(long, value_name = "PAGE.html")]
    report: Option<PathBuf>,
    /// Overwrite an existing report.
    #[arg(long, requires = "report")]
    force: bool,
}

impl CalibrationCommand {
    pub fn run(self, out: &Output) -> anyhow::Result<()> {
        match self.action {
            Action::Add(command) => command.run(out),
            Action::Show(command) => command.run(out),
        }
    }
}

impl Add {
    fn run(self, out: &Output) -> anyhow::Result<()> {
        check_target(&self.output, self.force, &self.files)?;
        let mut sum: Option<Calibration> = None;
        for file in &self.files {
            let calibration = Calibration::open(file)?;
            match &mut sum {
                None => sum = Some(calibration),
                Some(sum) => sum.add(&calibration)?,
            }
        }
        let Some(sum) = sum else { return Ok(()) };
        sum.save(&self.output, self.force)?;
        written(&sum, &self.output, out)
    }
}

/// The end of a command that wrote a calibration.
pub fn written(calibration: &Calibration, path: &Path, out: &Output) -> anyhow::Result<()> {
    let bytes = len(path);
    let tasks: Vec<_> = calibration.pool().iter().map(|task| task.name.as_str()).collect();
    let layers = calibration.layers().count();
    let fields = json!({ "output": path, "bytes": bytes, "layers": layers, "adapters": tasks });
    out.event("result", &fields)?;
    let adapters = count(tasks.len(), "adapter");
    let layers = count(layers, "layer");
    out.info(format_args!("wrote      {} ({}): {layers}, {adapters}", path.display(), size(bytes)))
}

impl Show {
    fn run(self, out: &Output) -> anyhow::Result<()> {
        let files = [self.file.clone()];
        if let Some(path) = &self.report {
            if !is_page(path) {
                return Err(usage(format!("--report is {}; a page ends in .html", path.display())));
            }
            check_target(path, self.force, &files)?;
        }
        let calibration = Calibration::open(&self.file)?;
        let bytes = len(&self.file);
        let layers: Vec<&LayerKey> = calibration.layers().collect();
        let missing = calibration.missing();
        let pool = calibration.pool();
        let tokens = |task: usize| layers.iter().map(|key| calibration.tokens(key, task)).sum::<u64>();
        let neutral: u64 = layers.iter().map(|key| calibration.neutral_tokens(key)).sum();

        let tasks = pool.iter().enumerate().map(|(i, task)| {
            json!({
                "name": task.name,
                "a_sha256": task.a_sha256,
                "tokens": tokens(i),
                "missing": missing.iter().filter(|m| m.1 == i).map(|m| m.0.as_str()).collect::<Vec<_>>(),
            })
        });
        let details = layers.iter().map(|key| {
            json!({
                "layer": key.as_str(),
                "ranks": calibration.ranks(key),
                "tokens": (0..pool.len()).map(|i| calibration.tokens(key, i)).collect::<Vec<_>>(),
                "neutral_tokens": calibration.neutral_tokens(key),
            })
        });
        out.event(
            "calibration",
            &json!({
                "file": self.file,
                "bytes": bytes,
                "adapters": tasks.collect::<Vec<_>>(),
                "layers": details.collect::<Vec<_>>(),
                "neutral_tokens": neutral,
            }),
        )?;

        out.result(format_args!("{} ({})", self.file.display(), size(bytes)))?;
        out.result("")?;
        let mut table = Table::new(&["adapter", "sha256 of A", ">layers", ">rank", ">tokens per layer"]);
        for (i, task) in pool.iter().enumerate() {
            let ranks = layers.iter().filter_map(|key| calibration.ranks(key).get(i).copied());
            let ranks: Vec<_> = ranks.filter(|rank| *rank > 0).collect();
            let has_ranks = |key: &&&LayerKey| calibration.ranks(key).get(i).is_some_and(|rank| *rank > 0);
            let own = layers.iter().filter(has_ranks).map(|key| calibration.tokens(key, i) as usize);
            table.row([
                task.name.clone(),
                task.a_sha256.chars().take(12).collect(),
                ranks.len().to_string(),
                range(ranks),
                range(own),
            ]);
        }
        out.result(table)?;
        out.result("")?;
        let mut table = Table::new(&["layers", ">count", ">rank"]);
        let key = |key: &LayerKey| (pattern(key.as_str()), calibration.ranks(key).iter().sum::<usize>());
        for ((pattern, rank), group) in group(layers.iter().map(|layer| (key(layer), ()))) {
            table.row([pattern, group.len().to_string(), rank.to_string()]);
        }
        out.result(table)?;
        out.result("")?;
        match neutral {
            0 => out.result("no neutral inputs")?,
            n => out.result(format_args!("neutral inputs: {} in all", count(n as usize, "token")))?,
        }
        for (i, task) in pool.iter().enumerate() {
            let keys: Vec<_> = missing.iter().filter(|m| m.1 == i).map(|m| &m.0).collect();
            if !keys.is_empty() {
                let what = count(keys.len(), "layer");
                out.result(format_args!("{}: {what} without activations: {}", task.name, some(keys, 3)))?;
            }
        }
        if let Some(path) = &self.report {
            let recorded =
                Recorded { calibration: &calibration, file: &self.file, bytes, warnings: out.warnings() };
            let text = recorded.page()?.text()?;
            write_atomic(path, self.force, &files, |file| file.write_all(text.as_bytes()))?;
            out.info(format_args!("report     {}", path.display()))?;
        }
        Ok(())
    }
}
