//! `loraweld convert`

use std::path::PathBuf;

use clap::Args;
use loraweld::{Dtype, SaveOptions, Unnamed};
use serde_json::json;

use super::args::{ByLayer, LoraArg, OutputFormat, Reading, open_adapters};
use super::output::{Output, count, size};
use super::usage;
use crate::io::atomic::len;

/// Spell a LoRA as another tool does, or make one of a LoHa, LoKr or DoRA.
#[derive(Args, Debug)]
#[command(after_help = "\
What the conversion does not touch stays as it is, bit for bit. Fused modules (q, k and v as one) are cut and put
together exactly.

Examples:
  loraweld convert cat.safetensors -o cat-kohya.safetensors --format kohya
  loraweld convert cat-lokr.safetensors -o cat.safetensors --format same --allow-truncate 64
  loraweld convert cat-dora.safetensors -o cat.safetensors --format same --base flux1-dev.safetensors \\
      --allow-truncate 64")]
pub struct Convert {
    /// A file, or a folder that PEFT saved.
    #[arg(value_name = "LORA", value_parser = LoraArg::parser())]
    lora: LoraArg,
    /// The file to write.
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Spelling of the keys: `peft` (or `diffusers`), `kohya`, `comfyui`, `bfl`, `xlabs`, or `same`.
    #[arg(long, value_name = "FORMAT")]
    format: OutputFormat,
    /// Type of the tensors: `f16`, `bf16` or `f32` [default: the input's].
    #[arg(long, value_name = "TYPE")]
    dtype: Option<Dtype>,
    /// Leave out layers that have no known name in that spelling, and list them, instead of refusing the file.
    #[arg(long, conflicts_with = "keep_unnamed")]
    skip_unnamed: bool,
    /// Keep the file's names of layers that have no known name in that spelling, and list them.
    #[arg(long)]
    keep_unnamed: bool,
    /// Overwrite an existing output; never the input.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    reading: Reading,
    #[command(flatten)]
    by_layer: ByLayer,
}

impl Convert {
    pub fn run(self, out: &Output) -> anyhow::Result<()> {
        if self.lora.explicit {
            return Err(usage("a conversion takes no strength; `--strength-for '*=0.8'` scales every layer"));
        }
        let protect = vec![self.lora.path.clone()];
        loraweld::adapter::check_target(&self.output, self.force, &protect)?;
        let adapters = open_adapters(std::slice::from_ref(&self.lora), &self.reading)?;
        let (adapters, strengths) = self.by_layer.apply(adapters)?;
        let Some(adapter) = adapters.first() else { return Ok(()) };
        for note in adapter.notes() {
            out.warn(note)?;
        }
        adapter.check_finite()?;
        let mut metadata = adapter.metadata().clone();
        metadata.insert("loraweld.converted_from".into(), adapter.format().name().into());
        metadata.insert("loraweld.version".into(), env!("CARGO_PKG_VERSION").into());
        metadata.extend(strengths.map(|text| ("loraweld.strengths".to_owned(), text)));
        let dtype = self.dtype;
        let unnamed = match (self.skip_unnamed, self.keep_unnamed) {
            (true, _) => Unnamed::LeaveOut,
            (_, true) => Unnamed::Keep,
            _ => Unnamed::Refuse,
        };
        let format = self.format.format();
        let options = SaveOptions { dtype, format, unnamed, overwrite: self.force, protect, metadata };
        if unnamed != Unnamed::Refuse {
            let what = if unnamed == Unnamed::Keep { "keeps its name" } else { "is left out" };
            for (name, reason) in adapter.unnamed(&options) {
                out.warn(format_args!("`{name}` {what}: it {reason}"))?;
            }
        }
        out.long(|control| adapter.save_with(&self.output, &options, *control))?;
        let bytes = len(&self.output);
        let format = options.format.unwrap_or(adapter.format());
        let dtype = dtype.unwrap_or(adapter.dtype());
        out.event(
            "result",
            &json!({
                "input": adapter.path(),
                "output": self.output,
                "family": adapter.family().to_string(),
                "from": adapter.format().name(),
                "format": format.name(),
                "dtype": dtype.name(),
                "layers": adapter.layers().len(),
                "bytes": bytes,
                "warnings": out.warnings(),
            }),
        )?;
        let layers = count(adapter.layers().len(), "layer");
        out.info(format_args!(
            "converted  {layers} ({}) from {} to {format}",
            adapter.family(),
            adapter.format()
        ))?;
        out.info(format_args!("wrote      {} ({}, {dtype}, {format})", self.output.display(), size(bytes)))
    }
}
