//! `loraweld compare`

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser};
use loraweld::adapter::{check_target, same_file, write_atomic};
use loraweld::merge::{METHODS, MethodEntry, Needs, Options, Report, Variant, method};
use loraweld::{Calibration, Control, Device, Merged, SaveOptions, Weighted};
use serde_json::{Value, json};

use super::{Inputs, Truncate};
use crate::cli::args::{ByLayer, Global, LoraArg, Memory, Reading};
use crate::cli::host;
use crate::cli::layers::range;
use crate::cli::output::{Output, Table, size};
use crate::cli::report::{Comparison, Entry, is_page};
use crate::cli::usage;

/// Merge by several methods, and show what each loses on the same calibration; writes no adapter.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld compare cat.safetensors dog.safetensors --calibration pets.calibration.safetensors
  loraweld compare cat.safetensors dog.safetensors --calibration pets.calibration.safetensors \\
      --methods ssr,linear,ties --rank 16 -o methods.json --report methods.html
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
    #[arg(long, value_delimiter = ',', value_parser = Named::parser(), default_values = Named::usual())]
    methods: Vec<String>,
    /// List beside each method what its paper's authors and PEFT make of it, where that is something else.
    #[arg(long)]
    variants: bool,
    #[command(flatten)]
    truncate: Truncate,
    /// Write the table, with every layer's losses, to a JSON file.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write the same as a page to look at if FILE ends in `.html`, and as JSON otherwise.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Overwrite existing outputs; never an input.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    memory: Memory,
    #[command(flatten)]
    by_layer: ByLayer,
    #[command(flatten)]
    reading: Reading,
}

/// A method, or a variant of one.
#[derive(Clone, Copy)]
struct Named {
    entry: &'static MethodEntry,
    variant: Option<&'static Variant>,
}

impl Named {
    /// All there are: each method, and then its variants.
    fn all() -> impl Iterator<Item = Self> {
        let of = |entry: &'static MethodEntry| {
            let variants = entry.variants.iter().map(Some);
            std::iter::once(None).chain(variants).map(move |variant| Self { entry, variant })
        };
        METHODS.iter().flat_map(of)
    }

    fn parser() -> PossibleValuesParser {
        let value = |named: Self| {
            let value = PossibleValue::new(named.name());
            let Some(variant) = named.variant else { return value };
            let value = value.aliases(variant.aliases);
            variant.whose.into_iter().fold(value, PossibleValue::help)
        };
        PossibleValuesParser::new(Self::all().map(value))
    }

    /// Those that are compared unless others are asked for: ours.
    fn usual() -> impl Iterator<Item = &'static str> {
        Self::all().filter(|named| !named.is_of_others()).map(Self::name)
    }

    fn of(name: &str) -> Option<Self> {
        let is = |named: &Self| {
            named.name() == name || named.variant.is_some_and(|variant| variant.aliases.contains(&name))
        };
        Self::all().find(is)
    }

    fn name(self) -> &'static str {
        self.variant.map_or(self.entry.name, |variant| variant.name)
    }

    fn is_of_others(&self) -> bool {
        self.variant.is_some_and(|variant| variant.whose.is_some())
    }

    /// The method, and what it is as others define it.
    fn with_others(self) -> impl Iterator<Item = Self> {
        let is_method = self.variant.is_none();
        let of = move |other: &Self| is_method && other.entry.name == self.entry.name && other.is_of_others();
        std::iter::once(self).chain(Self::all().filter(of))
    }

    fn merge(
        self,
        device: &Device,
        adapters: &[Weighted<'_>],
        calibration: &Calibration,
        control: Control<'_>,
    ) -> loraweld::Result<Merged> {
        let mut options = Options::new();
        if self.entry.needs == Needs::Truncation {
            let ranks = adapters.iter().flat_map(|w| w.adapter.layers()).map(|layer| layer.rank());
            options.insert("rank".into(), ranks.max().unwrap_or(1).into());
        }
        method(self.name(), options, Some(calibration))?.merge_any(device, adapters, control)
    }
}

impl Compare {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let mut files: Vec<_> = self.loras.iter().map(|lora| lora.path.clone()).collect();
        files.push(self.calibration.clone());
        if let (Some(output), Some(report)) = (&self.output, &self.report)
            && same_file(output, report)
        {
            return Err(usage(format!("--output and --report are both {}", output.display())));
        }
        for path in self.output.iter().chain(&self.report) {
            check_target(path, self.force, &files)?;
        }
        let inputs = Inputs::open(&self.loras, &self.by_layer, &self.reading, files)?;
        inputs.describe(out)?;
        let calibration = host::calibration(&self.calibration)?;
        calibration.select(&inputs.adapters.iter().collect::<Vec<_>>())?;
        let device = global.open_device(&self.memory, out)?;
        let truncation = self.truncate.truncation();
        self.truncate.check(true)?;

        let (mut rows, mut entries) = (Vec::new(), Vec::new());
        let mut table = Table::new(&[
            "method",
            ">loss",
            ">worst layer",
            ">rank",
            ">size",
            ">seconds",
            "where it loses most",
        ]);
        let methods = self.methods.iter().filter_map(|name| Named::of(name));
        let methods: Vec<Named> = match self.variants {
            true => methods.flat_map(Named::with_others).collect(),
            false => methods.collect(),
        };
        for method in &methods {
            let weighted = inputs.weighted();
            let merged = out.long(|control| {
                let merged = method.merge(&device, &weighted, &calibration, *control)?;
                let (after, options) = (self.truncate.after(false), SaveOptions::default());
                let merged =
                    after.apply(merged, &device, &weighted, Some(&calibration), &options, control)?;
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
            entries.push(Entry {
                method: method.name(),
                report: merged.report,
                rank: row.rank,
                bytes: row.bytes,
                seconds,
            });
        }
        out.result(table)?;
        let all = || {
            let inputs = inputs.adapters.iter().zip(&inputs.strengths).map(|(adapter, strength)| {
                json!({ "name": adapter.name(), "path": adapter.path(), "strength": strength })
            });
            json!({
                "inputs": inputs.collect::<Vec<_>>(),
                "calibration": self.calibration,
                "truncation": truncation,
                "device": device.describe(),
                "version": env!("CARGO_PKG_VERSION"),
                "methods": rows,
            })
        };
        let page = || Comparison {
            entries: &entries,
            calibration: &self.calibration,
            device: device.describe(),
            rank: truncation.rank,
            warnings: out.warnings(),
        };
        let mut files = inputs.files.clone();
        for (path, may_be_page) in [(&self.output, false), (&self.report, true)] {
            let Some(path) = path else { continue };
            let text = match may_be_page && is_page(path) {
                true => page().page().text()?,
                false => serde_json::to_string_pretty(&all())? + "\n",
            };
            write_atomic(path, self.force, &files, |file| std::io::Write::write_all(file, text.as_bytes()))?;
            files.push(path.clone());
            out.info(format_args!("wrote      {}", path.display()))?;
        }
        Ok(())
    }
}

/// One line of the table.
struct Row {
    cells: [String; 7],
    rank: String,
    bytes: u64,
    json: Value,
}

impl Row {
    fn new(method: &str, merged: &Merged, inputs: &Inputs, seconds: f64) -> Self {
        let Merged { adapter, report } = merged;
        let layers = adapter.layers();
        let elements: usize =
            layers.iter().map(|layer| layer.rank() * (layer.input() + layer.output())).sum();
        let bytes = (elements * inputs.dtype().size()) as u64;
        let worst = report.layers.iter().filter_map(|l| Some((l, l.losses?.merged)));
        let worst = worst.max_by(|x, y| x.1.total_cmp(&y.1));
        let loss = |loss: Option<f64>| loss.map_or_else(|| "-".into(), |loss| format!("{loss:.3}"));
        let rank = range(layers.iter().map(|layer| layer.rank()));
        let cells = [
            method.to_owned(),
            loss(report.losses.map(|l| l.merged)),
            loss(worst.map(|(_, loss)| loss)),
            rank.clone(),
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
        Self { cells, rank, bytes, json }
    }
}
