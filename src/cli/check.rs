//! `loraweld check`

use clap::Args;
use loraweld::Loader;
use serde_json::json;

use super::args::{LoraArg, Reading, open_unweighted};
use super::output::{Output, count};

/// Tell whether a program would load LoRA files whole, as they are.
#[derive(Args, Debug)]
#[command(after_help = "\
Exit code 1 if the program is not known to take every layer; those are listed, with the names that it takes.

Examples:
  loraweld check cat.safetensors --loader comfyui
  loraweld check *.safetensors --loader diffusers")]
pub struct Check {
    /// Files, or folders that PEFT saved.
    #[arg(required = true, value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    /// The program: `diffusers`, `comfyui`, or `kohya` (sd-scripts and musubi-tuner).
    #[arg(long, value_name = "LOADER", value_parser = loader)]
    loader: Loader,
    #[command(flatten)]
    reading: Reading,
}

fn loader(text: &str) -> Result<Loader, String> {
    Loader::ALL.into_iter().find(|loader| loader.name() == text).ok_or_else(|| {
        let names = Loader::ALL.map(Loader::name).join(", ");
        format!("expected one of {names}")
    })
}

impl Check {
    pub fn run(self, out: &Output) -> anyhow::Result<()> {
        let adapters = open_unweighted(&self.loras, &self.reading, "they change no names", out)?;
        let loader = self.loader;
        let mut bad = 0;
        for adapter in &adapters {
            let left = adapter.not_taken(loader);
            bad += usize::from(!left.is_empty());
            out.event(
                "check",
                &json!({
                    "file": adapter.path(),
                    "family": adapter.family().to_string(),
                    "loader": loader.name(),
                    "layers": adapter.layers().len(),
                    "not_taken": left.iter().map(|l| json!({ "module": l.module, "why": l.reason })).collect::<Vec<_>>(),
                }),
            )?;
            let (path, family) = (adapter.path().display(), adapter.family());
            if left.is_empty() {
                let layers = count(adapter.layers().len(), "layer");
                out.result(format_args!("{path}: {loader} takes all {layers} ({family})"))?;
                continue;
            }
            let what = count(left.len(), "module");
            out.result(format_args!("{path}: {loader} is not known to take {what} ({family})"))?;
            for layer in &left {
                out.result(format_args!("  {}: {}", layer.module, layer.reason))?;
            }
        }
        match bad {
            0 => Ok(()),
            n => anyhow::bail!(
                "{} of {} may not be loaded whole; `loraweld convert --format {}` writes what is",
                n,
                count(adapters.len(), "file"),
                loader.format()
            ),
        }
    }
}
