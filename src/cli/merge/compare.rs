//! `loraweld compare`

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use loraweld::adapter::{check_target, write_atomic};
use loraweld::merge::Report;
use loraweld::{
    Calibration, Control, CoreMerge, Dare, Device, EntryMerge, Iso, Linear, Merged, NpLora, Rule, Ssr,
    SvdMerge, Ties, Truncation, Tsv, Weighted,
};
use serde_json::{Value, json};

use super::{Inputs, Truncate};
use crate::cli::args::{ByLayer, Global, LoraArg, Memory, Reading};
use crate::cli::layers::range;
use crate::cli::output::{Output, Table, size};

/// Merge by several methods, and show what each loses on the same calibration; writes no adapter.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld compare cat.safetensors dog.safetensors --calibration pets.calibration.safetensors
  loraweld compare cat.safetensors dog.safetensors --calibration pets.calibration.safetensors \\
      --methods ssr,linear,ties --rank 16 -o methods.json
  loraweld compare cat.safetensors dog.safetensors --calibration pets.calibration.safetensors \\
      --methods ties,dare,tsv --variants

The loss is the error of the merged adapter on each adapter's own inputs, relative to merging nothing: 0 is
perfect. Every method runs with its default options; np-lora takes the first adapter for the style. A method
whose authors or PEFT define it otherwise has variants named after them, such as ties-paper and ties-peft.")]
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
    /// List beside each method what its paper's authors and PEFT make of it, where that is something else.
    #[arg(long)]
    variants: bool,
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
    #[command(flatten)]
    by_layer: ByLayer,
    #[command(flatten)]
    reading: Reading,
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
    /// As in the authors' code.
    TiesPaper,
    /// As `ties_svd` of PEFT.
    TiesPeft,
    Dare,
    /// As in the authors' code, and as `dare_linear_svd` of PEFT.
    #[value(alias = "dare-peft")]
    DarePaper,
    Knots,
    /// As in the authors' code.
    KnotsPaper,
    Core,
    /// As in the authors' code.
    CorePaper,
    Tsv,
    /// As in the authors' code.
    TsvPaper,
    IsoC,
    /// As in the authors' code.
    IsoCPaper,
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

    /// The method, and what it is as others define it.
    fn variants(self) -> Vec<Self> {
        match self {
            Self::Ties => vec![self, Self::TiesPaper, Self::TiesPeft],
            Self::Dare => vec![self, Self::DarePaper],
            Self::Knots => vec![self, Self::KnotsPaper],
            Self::Core => vec![self, Self::CorePaper],
            Self::Tsv => vec![self, Self::TsvPaper],
            Self::IsoC => vec![self, Self::IsoCPaper],
            _ => vec![self],
        }
    }

    fn merge(
        self,
        device: &Device,
        adapters: &[Weighted<'_>],
        calibration: &Calibration,
        control: Control<'_>,
    ) -> loraweld::Result<Merged> {
        let entries = |method: EntryMerge| method.merge_with(device, adapters, control);
        let core = |method: CoreMerge| method.merge_with(device, adapters, control);
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
                let ranks = adapters.iter().flat_map(|w| w.adapter.layers()).map(|layer| layer.rank());
                let truncation = Truncation::rank(ranks.max().unwrap_or(1));
                SvdMerge::new(truncation).merge_with(device, adapters, control)
            }
            Self::NpLora => np(NpLora::default()),
            Self::NpLoraHard => np(NpLora::hard()),
            Self::Ties => entries(EntryMerge::ties(Ties::default())),
            Self::TiesPaper => entries(EntryMerge::ties(Ties::paper())),
            Self::TiesPeft => entries(EntryMerge::ties(Ties::peft())),
            Self::Dare => entries(EntryMerge::dare(Dare::default())),
            Self::DarePaper => entries(EntryMerge::dare(Dare::paper())),
            Self::Knots => core(CoreMerge::knots(Rule::Ties(Ties::default()))),
            Self::KnotsPaper => core(CoreMerge::knots(Rule::Ties(Ties::paper()))),
            Self::Core => core(CoreMerge::core(Rule::Ties(Ties::default()))),
            Self::CorePaper => core(CoreMerge::core_paper()),
            Self::Tsv => core(CoreMerge::tsv(Tsv::default())),
            Self::TsvPaper => core(CoreMerge::tsv(Tsv::paper())),
            Self::IsoC => core(CoreMerge::iso_c(Iso::default())),
            Self::IsoCPaper => core(CoreMerge::iso_c(Iso::paper())),
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
        let inputs = Inputs::open(&self.loras, &self.by_layer, &self.reading, files)?;
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
        let methods: Vec<Method> = match self.variants {
            true => self.methods.iter().flat_map(|method| method.variants()).collect(),
            false => self.methods,
        };
        for method in &methods {
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
        let elements: usize =
            layers.iter().map(|layer| layer.rank() * (layer.input() + layer.output())).sum();
        let bytes = (elements * inputs.dtype().size()) as u64;
        let worst = report.layers.iter().filter_map(|l| Some((l, l.losses?.merged)));
        let worst = worst.max_by(|x, y| x.1.total_cmp(&y.1));
        let loss = |loss: Option<f64>| loss.map_or_else(|| "-".into(), |loss| format!("{loss:.3}"));
        let cells = [
            method.clone(),
            loss(report.losses.map(|l| l.merged)),
            loss(worst.map(|(_, loss)| loss)),
            range(layers.iter().map(|layer| layer.rank())),
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
