//! `loraweld extract`

use std::path::PathBuf;

use clap::Args;
use loraweld::adapter::{check_target, same_file};
use loraweld::{Adapter, Dtype, ExtractOptions, Family, SaveOptions, Truncation};
use serde_json::json;

use super::args::{OutputFormat, finite, model, share, spectrum};
use super::checkpoint::{open, write_report};
use super::output::{Output, count, size, some};
use super::usage;
use crate::io::atomic::len;

/// Make a LoRA of the difference of two checkpoints.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld extract tuned.safetensors base.safetensors -o tuned-lora.safetensors --rank 64
  loraweld extract tuned/ base/ -o tuned-lora.safetensors --sv-fro 0.95 --rank 128")]
pub struct Extract {
    /// The checkpoint that was trained or merged: a file, an index, or a folder.
    #[arg(value_name = "TUNED")]
    tuned: PathBuf,
    /// The checkpoint that it came from, in whatever spelling and types.
    #[arg(value_name = "BASE")]
    base: PathBuf,
    /// The LoRA to write.
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Keep at most this rank in each layer, by singular values.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rank: Option<u32>,
    /// Keep the singular values above the largest one divided by X, at least 1, and one more.
    #[arg(long, value_name = "X", value_parser = finite, allow_hyphen_values = true, group = "spectrum")]
    sv_ratio: Option<f64>,
    /// Keep the fewest singular values that hold this share of the difference's norm, and one more.
    #[arg(long, value_name = "SHARE", value_parser = share, allow_hyphen_values = true, group = "spectrum")]
    sv_fro: Option<f64>,
    /// Keep the fewest singular values that hold this share of their sum, and one more; needs all of them, and so takes
    /// long.
    #[arg(long, value_name = "SHARE", value_parser = share, allow_hyphen_values = true, group = "spectrum")]
    sv_cumulative: Option<f64>,
    /// Spelling of the keys: `peft` (or `diffusers`), `kohya`, `comfyui`, `bfl`, `xlabs` [default: what goes with TUNED's].
    #[arg(long, value_name = "FORMAT")]
    format: Option<OutputFormat>,
    /// Type of the tensors: `f16`, `bf16` or `f32`.
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    dtype: Dtype,
    /// The model of both, where they do not tell or tell something wrong.
    #[arg(long, value_name = "ID", value_parser = model)]
    model: Option<Family>,
    /// Write what was kept of each layer, and what could not be, to a JSON file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Overwrite existing outputs; never an input.
    #[arg(long)]
    force: bool,
}

impl Extract {
    pub fn run(self, out: &Output) -> anyhow::Result<()> {
        let truncation = self.truncation()?;
        let (tuned, base) = (open(&self.tuned, self.model, out)?, open(&self.base, self.model, out)?);
        let files = tuned.files().chain(base.files()).map(|path| path.to_owned());
        let protect: Vec<PathBuf> = files.chain([self.tuned.clone(), self.base.clone()]).collect();
        check_target(&self.output, self.force, &protect)?;
        if let Some(report) = &self.report {
            if same_file(report, &self.output) {
                return Err(usage(format!("--output and --report are both {}", report.display())));
            }
            check_target(report, self.force, &protect)?;
        }
        let extract = loraweld::Extract::new(&tuned, &base)?;
        let options = ExtractOptions { truncation, dtype: self.dtype };
        let extracted = out.long(|control| extract.run(&options, control))?;
        let (adapter, report): (Adapter, _) = (extracted.adapter, extracted.report);
        for (what, names) in [
            ("differ but are no matrix of a module, and are not in the LoRA", &report.changed),
            ("could not be compared", &report.left_out),
        ] {
            if !names.is_empty() {
                let names_shown = some(names.iter().map(|name| format!("`{name}`")), 5);
                out.warn(format_args!("{} {what}: {names_shown}", count(names.len(), "tensor")))?;
            }
        }
        let format = self.format.and_then(OutputFormat::format).unwrap_or(extract.format());
        let save = SaveOptions {
            dtype: Some(self.dtype),
            format: Some(format),
            overwrite: self.force,
            protect: protect.clone(),
            ..Default::default()
        };
        out.long(|control| adapter.save_with(&self.output, &save, *control))?;
        let bytes = len(&self.output);
        if let Some(path) = &self.report {
            write_report(
                path,
                self.force,
                &protect,
                &json!({ "report": report, "warnings": out.warnings() }),
            )?;
        }
        out.event(
            "result",
            &json!({
                "output": self.output,
                "format": format.name(),
                "dtype": self.dtype.name(),
                "bytes": bytes,
                "report": report,
                "warnings": out.warnings(),
            }),
        )?;
        out.info(format_args!("extracted  {report}"))?;
        out.info(format_args!(
            "wrote      {} ({}, {}, {format}, {:.1} s)",
            self.output.display(),
            size(bytes),
            self.dtype,
            report.seconds
        ))
    }

    fn truncation(&self) -> anyhow::Result<Truncation> {
        let spectrum = spectrum(self.sv_ratio, self.sv_fro, self.sv_cumulative);
        let truncation = Truncation { rank: self.rank.map(|rank| rank as usize), spectrum };
        if truncation.is_none() {
            return Err(usage("extract needs --rank N or one of --sv-ratio, --sv-fro and --sv-cumulative"));
        }
        Ok(truncation)
    }
}
