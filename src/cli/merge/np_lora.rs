//! `loraweld merge np-lora`

use clap::Args;
use loraweld::{Directions, NpLora, NpLoraOptions, Projection};

use super::{Common, Measure};
use crate::cli::args::{Global, LoraArg, share, weight};
use crate::cli::output::Output;

/// NP-LoRA: keep a style whole, and project subjects off the directions that it reads.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld merge np-lora --style ink.safetensors --subject cat.safetensors -o ink-cat.safetensors
  loraweld merge np-lora --style ink.safetensors --subject cat.safetensors:0.9 --subject hat.safetensors \\
      --hard -o ink-cat-hat.safetensors
  loraweld merge np-lora --style ink.safetensors --subject cat.safetensors --mu 0.5 \\
      --mu-for 'single_transformer_blocks.*=0.2' -o ink-cat.safetensors")]
pub struct NpLoraMerge {
    /// The adapter that is kept whole: PATH, or PATH:STRENGTH.
    #[arg(long, value_name = "LORA", value_parser = LoraArg::parser())]
    style: LoraArg,
    /// An adapter that gives way: PATH, or PATH:STRENGTH. Repeated, each also gives way to those before it.
    #[arg(long, required = true, value_name = "LORA", value_parser = LoraArg::parser())]
    subject: Vec<LoraArg>,
    #[command(flatten)]
    measure: Measure,
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    options: Options,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "NP-LoRA options")]
struct Options {
    /// How far a subject gives way: it keeps 1/(1 + MU) of what it has in the style's directions. 0 is the plain sum.
    #[arg(long, value_name = "MU", value_parser = weight, allow_hyphen_values = true, default_value = "0.5")]
    mu: f64,
    /// Give way wholly: MU is infinite.
    #[arg(long, conflicts_with = "mu")]
    hard: bool,
    /// MU of the layers whose name matches; `*` stands for anything. Repeatable; the last match counts.
    #[arg(long, value_name = "PATTERN=MU|hard", value_parser = by_layer)]
    mu_for: Vec<(String, Projection)>,
    /// Keep clear only the style's N strongest directions in each layer [default: all].
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..),
        conflicts_with = "energy"
    )]
    directions: Option<u32>,
    /// Keep clear as few of the style's directions as hold this share of its energy, above 0 and at most 1.
    #[arg(long, value_name = "SHARE", value_parser = share, allow_hyphen_values = true)]
    energy: Option<f64>,
}

/// `PATTERN=MU` or `PATTERN=hard`.
fn by_layer(text: &str) -> Result<(String, Projection), String> {
    let Some((pattern, mu)) = text.rsplit_once('=').filter(|(pattern, _)| !pattern.is_empty()) else {
        return Err("expected PATTERN=MU, such as 'single_transformer_blocks.*=0.3'".into());
    };
    let projection = match mu {
        "hard" => Projection::Hard,
        _ => Projection::Soft(weight(mu)?),
    };
    Ok((pattern.to_owned(), projection))
}

impl Options {
    fn build(self) -> NpLoraOptions {
        NpLoraOptions {
            projection: if self.hard { Projection::Hard } else { Projection::Soft(self.mu) },
            by_layer: self.mu_for,
            directions: match (self.directions, self.energy) {
                (Some(n), _) => Directions::Count(n as usize),
                (None, Some(share)) => Directions::Energy(share),
                (None, None) => Directions::All,
            },
        }
    }
}

impl NpLoraMerge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let loras: Vec<LoraArg> = std::iter::once(self.style).chain(self.subject).collect();
        let merge = NpLora::default().options(self.options.build());
        self.common.run(&loras, &self.measure, global, out, &merge)
    }
}
