//! The command line of the example.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use loraweld::Select;
use loraweld_digits::bench::Bench;
use loraweld_digits::data::Data;
use loraweld_digits::model::DigitDit;
use loraweld_digits::picture::Picture;
use loraweld_digits::shared::Shared;
use loraweld_digits::table::Effort;

/// A diffusion model on burn whose LoRA adapters are fused by loraweld, on one wgpu device.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Where tables and pictures are written
    #[arg(long, default_value = "digits")]
    out: PathBuf,
    /// The device: `gpu` (hardware, else software), an index or a name, as `loraweld devices` lists them
    #[arg(long, default_value = "gpu")]
    device: Select,
    /// Few samples of few steps, to see that everything runs
    #[arg(long)]
    quick: bool,
    /// A checkout of loraweld, whose data is read; the one that this was compiled in, if not given
    #[arg(long)]
    data: Option<PathBuf>,
    /// Open a window with sliders
    #[cfg(feature = "window")]
    #[arg(long)]
    window: bool,
    /// Write what the window shows to a PNG file; without `--window`, on no display
    #[cfg(feature = "window")]
    #[arg(long, value_name = "FILE")]
    screenshot: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let data = Data::new(arguments.data.as_deref());
    let shared = Shared::open(arguments.device.clone())?;
    eprintln!("on {}", shared.loraweld.describe());
    let model = DigitDit::load(&shared, &data)?;
    #[cfg(feature = "window")]
    if arguments.window || arguments.screenshot.is_some() {
        let studio = loraweld_digits::window::Studio::new(shared, model, &data)?;
        return match (arguments.window, arguments.screenshot) {
            (false, Some(file)) => studio.screenshot(&file),
            (_, file) => studio.open(file),
        };
    }
    let effort = if arguments.quick { Effort::QUICK } else { Effort::FULL };
    let start = std::time::Instant::now();
    let progress = |what: &str| eprintln!("{:6.1} s  {what}", start.elapsed().as_secs_f64());
    let results = Bench::new(&shared, &model, &data, effort, &progress)?.run()?;

    let out = &arguments.out;
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let write = |name: &str, text: String| {
        std::fs::write(out.join(name), text)
            .with_context(|| format!("cannot write {name} in {}", out.display()))
    };
    print!("{}", results.markdown());
    write("table.md", results.markdown())?;
    write("table.json", serde_json::to_string_pretty(&results)?)?;
    for (name, rows) in ["pair.png", "concepts.png"].into_iter().zip(&results.pictures) {
        Picture::grid(rows).save(&out.join(name))?;
    }
    eprintln!("{:.0} s; tables and pictures are in {}", results.seconds, out.display());
    Ok(())
}
