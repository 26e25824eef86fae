//! `loraweld merge`: one file a method; here is what they share.

mod linear;
mod np_lora;
mod ssr;
mod svd;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand};
use loraweld::adapter::{check_target, same_file, write_atomic};
use loraweld::merge::{Action, Losses, PlannedLayer, Report};
use loraweld::{Adapter, Control, Device, Dtype, Merged, Plan, SaveOptions, Weighted};
use serde_json::json;

use super::args::{ByLayer, Global, LoraArg, Memory, OutputFormat, Reading, dtype, open_adapters};
use super::layers::{group, pattern, range};
use super::output::{Output, Table, count, size, some};
use super::usage;

/// Merge adapters into one.
#[derive(Args, Debug)]
pub struct Merge {
    #[command(subcommand)]
    method: Method,
}

#[derive(Subcommand, Debug)]
enum Method {
    Ssr(ssr::SsrMerge),
    NpLora(np_lora::NpLoraMerge),
    Linear(linear::LinearMerge),
    Svd(svd::SvdCommand),
}

impl Merge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        match self.method {
            Method::Ssr(method) => method.run(global, out),
            Method::NpLora(method) => method.run(global, out),
            Method::Linear(method) => method.run(global, out),
            Method::Svd(method) => method.run(global, out),
        }
    }
}

/// Options of every method.
#[derive(Args, Debug)]
struct Common {
    /// The merged adapter to write.
    #[arg(short, long, value_name = "OUT", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Truncate layers of a higher rank to this one, by their singular values [default: the sum of the ranks].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    rank: Option<u64>,
    /// Type of the output's tensors: `f16`, `bf16` or `f32` [default: the widest input's].
    #[arg(long, value_name = "TYPE", value_parser = dtype)]
    dtype: Option<Dtype>,
    /// Spelling of the output's keys: `same` (as the first input), `peft` (or `diffusers`), `kohya`, `comfyui`, `bfl` or
    /// `xlabs`.
    #[arg(long, value_name = "FORMAT", default_value = "same", value_parser = OutputFormat::parse)]
    format: OutputFormat,
    /// Say what matches, its shapes, ranks and bytes, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Write what was done and lost to a JSON file.
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

/// What is merged, opened and checked.
struct Inputs {
    adapters: Vec<Adapter>,
    strengths: Vec<f64>,
    /// Strengths by layer, in words.
    by_layer: Option<String>,
    plan: Plan,
    /// Files that are never overwritten.
    files: Vec<PathBuf>,
}

impl Inputs {
    fn weighted(&self) -> Vec<Weighted<'_>> {
        self.adapters.iter().zip(&self.strengths).map(|(adapter, &strength)| adapter.at(strength)).collect()
    }

    /// The type that holds the values of every input.
    fn dtype(&self) -> Dtype {
        self.adapters.iter().map(Adapter::dtype).reduce(Dtype::common).unwrap_or(Dtype::F32)
    }

    fn names(&self, members: &[usize]) -> String {
        some(members.iter().filter_map(|&i| self.adapters.get(i)).map(Adapter::name), 4)
    }
}

impl Common {
    /// Everything that can be found wrong before the long work. `others` are inputs that are no adapters.
    fn open(&self, loras: &[LoraArg], others: &[&Path], out: &Output) -> anyhow::Result<Inputs> {
        let mut files: Vec<_> = loras.iter().map(|lora| lora.path.clone()).collect();
        files.extend(others.iter().map(|path| path.to_path_buf()));
        self.check_targets(&files, out)?;
        let (adapters, by_layer) = self.by_layer.apply(open_adapters(loras, &self.reading)?)?;
        // A merge checks its inputs itself.
        for adapter in adapters.iter().filter(|_| self.dry_run) {
            adapter.check_finite()?;
        }
        let strengths: Vec<_> = loras.iter().map(|lora| lora.strength).collect();
        let weighted: Vec<_> = adapters.iter().zip(&strengths).map(|(a, &s)| a.at(s)).collect();
        let plan = Plan::new(&weighted)?;
        let inputs = Inputs { adapters, strengths, by_layer, plan, files };
        inputs.describe(out)?;
        Ok(inputs)
    }

    fn check_targets(&self, files: &[PathBuf], out: &Output) -> anyhow::Result<()> {
        if let (Some(output), Some(report)) = (&self.output, &self.report)
            && same_file(output, report)
        {
            return Err(usage(format!("--output and --report are both {}", output.display())));
        }
        for path in self.output.iter().chain(&self.report) {
            match check_target(path, self.force, files) {
                // Nothing is going to be written: this is part of what there is to say.
                Err(e) if self.dry_run => out.warn(format_args!("this merge would be refused: {e}"))?,
                other => other?,
            }
        }
        if self.dry_run && self.report.is_some() {
            out.warn("a dry run writes no --report; --json prints it")?;
        }
        Ok(())
    }

    fn rank(&self) -> Option<usize> {
        self.rank.map(|rank| usize::try_from(rank).unwrap_or(usize::MAX))
    }

    /// Says what a merge would do.
    fn dry_run(&self, inputs: &Inputs, out: &Output) -> anyhow::Result<()> {
        let dtype = self.dtype.unwrap_or(inputs.dtype());
        let layers = inputs.plan.layers();
        let rank = |layer: &PlannedLayer| self.rank().map_or(layer.rank, |rank| rank.min(layer.rank));
        let bytes = |layer: &PlannedLayer| (rank(layer) * (layer.input + layer.output) * dtype.size()) as u64;
        let total: u64 = layers.iter().map(bytes).sum();
        let name = |i: &usize| inputs.adapters.get(*i).map(Adapter::name);
        out.event(
            "plan",
            &json!({
                "output": self.output,
                "dtype": dtype.name(),
                "bytes": total,
                "layers": layers.iter().map(|layer| json!({
                    "layer": layer.name,
                    "adapters": layer.members.iter().map(name).collect::<Vec<_>>(),
                    "in": layer.input,
                    "out": layer.output,
                    "rank": rank(layer),
                    "bytes": bytes(layer),
                })).collect::<Vec<_>>(),
            }),
        )?;
        let mut table = Table::new(&["layers", ">count", ">in", ">out", ">rank", ">bytes", "adapters"]);
        let key = |l: &PlannedLayer| (pattern(&l.name), l.members.clone(), l.input, l.output);
        for ((pattern, members, input, output), group) in group(layers.iter().map(|l| (key(l), l))) {
            table.row([
                pattern,
                group.len().to_string(),
                input.to_string(),
                output.to_string(),
                range(group.iter().map(|layer| rank(layer))),
                group.iter().map(|layer| bytes(layer)).sum::<u64>().to_string(),
                if members.len() == inputs.adapters.len() { "all".into() } else { inputs.names(&members) },
            ]);
        }
        out.result(table)?;
        out.result(format_args!(
            "{}, {} of {dtype}; nothing was written",
            count(layers.len(), "layer"),
            size(total)
        ))
    }

    /// Merges, and writes and reports the result.
    fn finish(
        &self,
        global: &Global,
        inputs: &Inputs,
        out: &Output,
        merge: impl FnOnce(&Device, &[Weighted], Control) -> loraweld::Result<Merged>,
    ) -> anyhow::Result<()> {
        // clap asks for it.
        let output = self.output.as_ref().context("no output was named")?;
        let device = global.open_device(&self.memory, out)?;
        let Merged { adapter, report } = out.long(|control| {
            let merged = merge(&device, &inputs.weighted(), *control)?;
            match self.rank() {
                Some(rank) => merged.truncated(rank, control),
                None => Ok(merged),
            }
        })?;
        say_notes(&report, &inputs.plan, out)?;

        let dtype = self.dtype.unwrap_or(inputs.dtype());
        let mut metadata = adapter.metadata().clone();
        metadata.extend(inputs.by_layer.clone().map(|text| ("loraweld.strengths".to_owned(), text)));
        let options = SaveOptions {
            dtype: Some(dtype),
            format: self.format.format(),
            overwrite: self.force,
            protect: inputs.files.clone(),
            metadata,
        };
        adapter.save(output, &options)?;
        let format = options.format.unwrap_or(adapter.format());
        let bytes = std::fs::metadata(output).map(|meta| meta.len()).unwrap_or_default();
        let mut result = json!({
            "output": output, "bytes": bytes, "dtype": dtype.name(), "format": format.name(),
        });
        let mut full = serde_json::to_value(&report)?;
        for (key, value) in [("output", result.clone()), ("warnings", json!(out.warnings()))] {
            full[key] = value;
        }
        if let Some(path) = &self.report {
            let mut text = serde_json::to_string_pretty(&full)?;
            text.push('\n');
            let mut files = inputs.files.clone();
            files.push(output.clone());
            write_atomic(path, self.force, &files, |file| std::io::Write::write_all(file, text.as_bytes()))?;
        }
        result["report"] = full;
        out.event("result", &result)?;
        say_merged(&report, out)?;
        for table in [losses(&report), projections(&report)].into_iter().flatten() {
            out.info(table)?;
        }
        out.info(format_args!("wrote      {} ({}, {dtype}, {format})", output.display(), size(bytes)))?;
        if let Some(path) = &self.report {
            out.info(format_args!("report     {}", path.display()))?;
        }
        Ok(())
    }
}

impl Inputs {
    /// What goes in and what matches.
    fn describe(&self, out: &Output) -> anyhow::Result<()> {
        for (adapter, strength) in self.adapters.iter().zip(&self.strengths) {
            let layers = adapter.layers();
            out.event(
                "input",
                &json!({
                    "name": adapter.name(),
                    "path": adapter.path(),
                    "strength": strength,
                    "layers": layers.len(),
                }),
            )?;
            let rank = range(layers.iter().map(|layer| layer.rank));
            let layers = count(layers.len(), "layer");
            out.info(format_args!("input      {} at {strength}: {layers}, rank {rank}", adapter.name()))?;
            for note in adapter.notes() {
                out.warn(note)?;
            }
        }
        let layers = self.plan.layers();
        let n = self.adapters.len();
        let shared = |n| layers.iter().filter(|layer| layer.members.len() + layer.silent.len() == n).count();
        let some = layers.len() - shared(n) - if n > 1 { shared(1) } else { 0 };
        let mut parts = vec![format!("{} in all adapters", shared(n))];
        if some > 0 {
            parts.push(format!("{some} in some"));
        }
        if n > 1 && shared(1) > 0 {
            parts.push(format!("{} in one only", shared(1)));
        }
        let total = count(layers.len(), "layer");
        let fields = json!({ "layers": layers.len(), "in_all": shared(n), "in_one": shared(1) });
        out.event("matched", &fields)?;
        out.info(format_args!("matched    {total}: {}", parts.join(", ")))?;
        if n > 1 && shared(1) == layers.len() {
            out.warn(
                "no layer is in more than one adapter, so there is nothing to merge: are they made for one \
                 base model? `loraweld inspect` shows their names",
            )?;
        }
        for (i, adapter) in self.adapters.iter().enumerate() {
            if self.adapters[..i].iter().any(|other| same_file(other.path(), adapter.path())) {
                out.warn(format_args!("{}: given more than once", adapter.name()))?;
            }
            let off = adapter.layers().iter().filter(|layer| layer.scale.value == 0.0);
            let off: Vec<_> = off.map(|layer| &layer.key).collect();
            if !off.is_empty() {
                let what = count(off.len(), "layer");
                let names = self::some(&off, 3);
                out.warn(format_args!(
                    "{}: strength or alpha 0, adds nothing, on {what}: {names}",
                    adapter.name()
                ))?;
            }
            if self.strengths[i] == 0.0 {
                out.warn(format_args!("{}: strength 0, adds nothing", adapter.name()))?;
            }
        }
        Ok(())
    }
}

/// What the user should know about a merge, and has not heard yet.
fn say_notes(report: &Report, plan: &Plan, out: &Output) -> anyhow::Result<()> {
    let said = out.warnings();
    for note in report.notes.iter().filter(|note| !plan.notes().contains(note) && !said.contains(note)) {
        out.warn(note)?;
    }
    let names = |layers: &[&str]| some(layers, 3);
    let actions = report.layers.iter().filter_map(|layer| match &layer.action {
        Action::Routed | Action::Projected | Action::Concatenated => None,
        Action::PassedThrough => {
            let input = report.inputs.get(*layer.adapters.first()?)?;
            // Of one adapter alone there is nothing to say, and of strength 0 it was said.
            let silent = report.inputs.len() == 1 || input.strength == 0.0;
            (!silent).then(|| {
                (format!("passed through, as only {} adds to them", input.name), layer.layer.as_str())
            })
        }
        Action::Summed { why } => Some((format!("summed: {why}"), layer.layer.as_str())),
    });
    for (what, layers) in group(actions) {
        out.warn(format_args!("{} {what}: {}", count(layers.len(), "layer"), names(&layers)))?;
    }
    let notes = report.layers.iter().flat_map(|l| l.notes.iter().map(|n| (n.clone(), l.layer.as_str())));
    for (note, layers) in group(notes) {
        out.warn(format_args!("{note} ({}: {})", count(layers.len(), "layer"), names(&layers)))?;
    }
    Ok(())
}

/// How much was merged, and how fast.
pub fn say_merged(report: &Report, out: &Output) -> anyhow::Result<()> {
    let Report { method, layers, seconds, .. } = report;
    let layers = count(layers.len(), "layer");
    out.info(format_args!("merged     {layers} by {method} in {seconds:.2} s"))
}

/// Layers that a table shows.
const WORST: usize = 5;

/// What subjects gave up: where it is most.
fn projections(report: &Report) -> Option<Table> {
    let mut most: Vec<_> =
        report.layers.iter().flat_map(|l| l.projections.iter().map(|p| (&l.layer, p))).collect();
    most.sort_by(|x, y| y.1.removed.total_cmp(&x.1.removed));
    let mut table = Table::new(&["projected", "subject", ">directions", ">removed", ">before", ">after"]);
    for (layer, p) in most.iter().take(WORST) {
        table.row([
            layer.to_string(),
            report.inputs.get(p.adapter).map_or_else(String::new, |input| input.name.clone()),
            p.directions.to_string(),
            format!("{:.1}%", 100.0 * p.removed),
            format!("{:.3}", p.before),
            format!("{:.3}", p.after),
        ]);
    }
    (!most.is_empty()).then_some(table)
}

/// What the merge, the sum and the average lose: in all, and where it is worst.
pub fn losses(report: &Report) -> Option<Table> {
    let total = report.losses?;
    let mut table = Table::new(&["loss", &format!(">{}", report.method), ">sum", ">average"]);
    let mut row = |name: &str, losses: Losses| {
        let Losses { merged, sum, average } = losses;
        table.row([name.into(), format!("{merged:.3}"), format!("{sum:.3}"), format!("{average:.3}")]);
    };
    let mut layers: Vec<_> = report.layers.iter().filter_map(|l| Some((&l.layer, l.losses?))).collect();
    layers.sort_by(|x, y| y.1.merged.total_cmp(&x.1.merged));
    // Of layers that were passed through or summed, none is known.
    match layers.len() == report.layers.len() {
        true => row("total", total),
        false => row(&format!("total of {}", count(layers.len(), "layer")), total),
    }
    for (name, losses) in layers.iter().take(WORST) {
        row(name, *losses);
    }
    if let Some(rest @ 1..) = layers.len().checked_sub(WORST) {
        table.row([format!("{} that lose less", count(rest, "layer")), "".into(), "".into(), "".into()]);
    }
    Some(table)
}
