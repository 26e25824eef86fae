//! `loraweld compare`

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use loraweld::adapter::{check_target, write_atomic};
use loraweld::merge::Report;
use loraweld::{
    Calibration, Control, CoreMerge, Dare, Device, EntryMerge, Linear, Merged, NpLora, Rule, Ssr, SvdMerge,
    Ties, Truncation, Weighted,
};
use serde_json::{Value, json};

use super::{Inputs, Truncate};
use crate::cli::args::{Global, LoraArg, Memory};
use crate::cli::layers::range;
use crate::cli::output::{Output, Table, size};

/// Merge by several methods, and show what each loses on the same calibration; writes no adapter.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld compare cat.safetensors dog.safetensors --calibration pets.calibration.safetensors
  loraweld compare cat.safetensors dog.safetensors --calibration pets.calibration.safetensors \\
      --methods ssr,linear,ties --rank 16 -o methods.json

The loss is the error of the merged adapter on each adapter's own inputs, relative to merging nothing: 0 is
perfect. Every method runs with its default options; np-lora takes the first adapter for the style.")]
pub struct Compare {
    /// Adapters: PATH, or PATH:STRENGTH with any finite strength.
    #[arg(required = true, num_args = 2.., value_name = "LORA", value_parser = LoraArg::parser())]
    loras: Vec<LoraArg>,
    /// What `loraweld calibrate` wrote for these adapters (and maybe others).
    #[arg(long, value_name = "FILE")]
    calibration: PathBuf,
    /// Methods, in the order of the table.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Method::ALL)]
    methods: Vec<Method>,
    #[command(flatten)]
    truncate: Truncate,
    /// Write the table, with every layer's losses, to a JSON file.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Overwrite an existing output; never an input.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    memory: Memory,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Method {
    Ssr,
    SsrDataFree,
    Linear,
    Average,
    Svd,
    NpLora,
    NpLoraHard,
    Ties,
    Dare,
    Knots,
    Core,
    Tsv,
    IsoC,
}

impl Method {
    const ALL: [Self; 13] = [
        Self::Ssr,
        Self::SsrDataFree,
        Self::Linear,
        Self::Average,
        Self::Svd,
        Self::NpLora,
        Self::NpLoraHard,
        Self::Ties,
        Self::Dare,
        Self::Knots,
        Self::Core,
        Self::Tsv,
        Self::IsoC,
    ];

    fn merge(
        self,
        device: &Device,
        adapters: &[Weighted<'_>],
        calibration: &Calibration,
        control: Control<'_>,
    ) -> loraweld::Result<Merged> {
        let ties = Rule::Ties(Ties::default());
        let np = |method: NpLora| method.merge_with(device, adapters[0], &adapters[1..], control);
        match self {
            Self::Ssr => Ssr::new(calibration).merge_with(device, adapters, control),
            Self::SsrDataFree => Ssr::data_free().merge_with(device, adapters, control),
            Self::Linear => Linear.merge_with(adapters, control),
            Self::Average => {
                let share = 1.0 / adapters.len() as f64;
                let shares: Vec<_> = adapters.iter().map(|w| w.adapter.at(w.strength * share)).collect();
                Linear.merge_with(&shares, control)
            }
            Self::Svd => {
                let ranks = adapters.iter().flat_map(|w| w.adapter.layers()).map(|layer| layer.rank);
                let truncation = Truncation::rank(ranks.max().unwrap_or(1));
                SvdMerge::new(truncation).merge_with(device, adapters, control)
            }
            Self::NpLora => np(NpLora::default()),
            Self::NpLoraHard => np(NpLora::hard()),
            Self::Ties => EntryMerge::ties(Ties::default()).merge_with(device, adapters, control),
            Self::Dare => EntryMerge::dare(Dare::default()).merge_with(device, adapters, control),
            Self::Knots => CoreMerge::knots(ties).merge_with(device, adapters, control),
            Self::Core => CoreMerge::core(ties).merge_with(device, adapters, control),
            Self::Tsv => CoreMerge::tsv().merge_with(device, adapters, control),
            Self::IsoC => CoreMerge::iso_c().merge_with(device, adapters, control),
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

impl Compare {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let mut files: Vec<_> = self.loras.iter().map(|lora| lora.path.clone()).collect();
        files.push(self.calibration.clone());
        if let Some(path) = &self.output {
            check_target(path, self.force, &files)?;
        }
        let inputs = Inputs::open(&self.loras, files)?;
        inputs.describe(out)?;
        let calibration = Calibration::open(&self.calibration)?;
        calibration.select(&inputs.adapters.iter().collect::<Vec<_>>())?;
        let device = global.open_device(&self.memory, out)?;
        let truncation = self.truncate.truncation();

        let mut rows = Vec::new();
        let mut table = Table::new(&[
            "method",
            ">loss",
            ">worst layer",
            ">rank",
            ">size",
            ">seconds",
            "where it loses most",
        ]);
        for method in &self.methods {
            let weighted = inputs.weighted();
            let merged = out.long(|control| {
                let merged = method.merge(&device, &weighted, &calibration, *control)?;
                let merged = match truncation.is_none() {
                    true => merged,
                    false => merged.truncated(&device, &truncation, control)?,
                };
                let seconds = merged.report.seconds;
                Ok::<_, loraweld::Error>((merged.measured(&calibration, &weighted, control)?, seconds))
            });
            let (merged, seconds) = merged.map_err(|e| anyhow::Error::from(e).context(method.name()))?;
            let row = Row::new(method.name(), &merged, &inputs, seconds);
            for note in merged.report.notes.iter().filter(|note| !inputs.plan.notes().contains(note)) {
                out.info(format_args!("{:10} {note}", method.name()))?;
            }
            out.event("method", &row.json)?;
            table.row(row.cells);
            rows.push(row.json);
        }
        out.result(table)?;
        if let Some(path) = &self.output {
            let all = json!({
                "inputs": inputs.adapters.iter().zip(&inputs.strengths).map(|(adapter, strength)| {
                    json!({ "name": adapter.name(), "path": adapter.path(), "strength": strength })
                }).collect::<Vec<_>>(),
                "calibration": self.calibration,
                "truncation": truncation,
                "device": device.describe(),
                "version": env!("CARGO_PKG_VERSION"),
                "methods": rows,
            });
            let mut text = serde_json::to_string_pretty(&all)?;
            text.push('\n');
            write_atomic(path, self.force, &inputs.files, |file| {
                std::io::Write::write_all(file, text.as_bytes())
            })?;
            out.info(format_args!("wrote      {}", path.display()))?;
        }
        Ok(())
    }
}

/// One line of the table.
struct Row {
    cells: [String; 7],
    json: Value,
}

impl Row {
    fn new(method: String, merged: &Merged, inputs: &Inputs, seconds: f64) -> Self {
        let Merged { adapter, report } = merged;
        let layers = adapter.layers();
        let elements: usize = layers.iter().map(|layer| layer.rank * (layer.input + layer.output)).sum();
        let bytes = (elements * inputs.dtype().size()) as u64;
        let worst = report.layers.iter().filter_map(|l| Some((l, l.losses?.merged)));
        let worst = worst.max_by(|x, y| x.1.total_cmp(&y.1));
        let loss = |loss: Option<f64>| loss.map_or_else(|| "-".into(), |loss| format!("{loss:.3}"));
        let cells = [
            method.clone(),
            loss(report.losses.map(|l| l.merged)),
            loss(worst.map(|(_, loss)| loss)),
            range(layers.iter().map(|layer| layer.rank)),
            size(bytes),
            format!("{seconds:.2}"),
            worst.map_or_else(String::new, |(layer, _)| layer.layer.clone()),
        ];
        let Report { losses, options, notes, .. } = report;
        let json = json!({
            "method": method,
            "options": options,
            "loss": losses.map(|l| l.merged),
            "loss_of_sum": losses.map(|l| l.sum),
            "loss_of_average": losses.map(|l| l.average),
            "seconds": seconds,
            "bytes": bytes,
            "notes": notes,
            "layers": report.layers,
        });
        Self { cells, json }
    }
}
