//! `loraweld merge`: what its methods share, from arguments to the report. [`methods`] makes the methods themselves.

mod compare;
mod methods;
mod resize;

pub use compare::Compare;
pub use resize::Resize;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use loraweld::adapter::{check_target, same_file, write_atomic};
use loraweld::merge::{Action, After, Losses, PlannedLayer, Report, TruncateBy, Verified};
use loraweld::{
    Adapter, Budget, Calibration, Control, Destination, Device, Dtype, Family, Method, OpenOptions, Plan,
    SaveOptions, Truncation, Unnamed, Weighted,
};
use serde_json::json;

use super::args::{
    ByLayer, Global, LoraArg, Memory, OutputFormat, Reading, finite, open_adapters, share, spectrum,
};
use super::layers::{group, pattern, range};
use super::output::{Output, Table, count, size, some};
use super::report::{Made, Norms, is_page};
use super::{chain, usage};
use crate::io::atomic::{AtomicFile, len, write_error};

/// Merge adapters into one.
#[derive(Args, Debug)]
pub struct Merge {
    #[command(subcommand)]
    method: methods::Chosen,
}

impl Merge {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        self.method.run(global, out)
    }
}

/// Options of every method.
#[derive(Args, Debug)]
struct Common {
    /// The merged adapter to write.
    #[arg(short, long, value_name = "OUT", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    #[command(flatten)]
    truncate: Truncate,
    /// Lower the singular values along which the merge is louder than the adapters are; helps sums, and makes SSR worse.
    #[arg(long)]
    calibrate_singular_values: bool,
    /// Type of the output's tensors: `f16`, `bf16` or `f32` [default: the widest input's].
    #[arg(long, value_name = "TYPE")]
    dtype: Option<Dtype>,
    /// Spelling of the output's keys: `same` (as the first input), `peft` (or `diffusers`), `kohya`, `comfyui`, `bfl` or
    /// `xlabs`.
    #[arg(long, value_name = "FORMAT", default_value = "same")]
    format: OutputFormat,
    /// Say what matches, its shapes, ranks and bytes, and write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Compute N layers again, on the CPU in f64, and fail, without a file, if one is further off than the bounds that the
    /// README promises [default without N: 8].
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "8")]
    verify: Option<usize>,
    /// Write what was done and lost: a page to look at if FILE ends in `.html`, and JSON otherwise.
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

/// How many ranks to keep.
#[derive(Args, Debug)]
struct Truncate {
    /// Keep at most this rank in each layer, by singular values [default: the sum of the ranks].
    #[arg(long, value_name = "N", value_parser = rank)]
    rank: Option<usize>,
    /// Keep the singular values above the largest one divided by X, at least 1, and one more, as kohya's resize script does.
    #[arg(long, value_name = "X", value_parser = ratio, allow_hyphen_values = true, group = "spectrum")]
    sv_ratio: Option<f64>,
    /// Keep the fewest singular values that hold this share of the update's norm, and one more, as kohya's resize script
    /// does.
    #[arg(long, value_name = "SHARE", value_parser = share, allow_hyphen_values = true, group = "spectrum")]
    sv_fro: Option<f64>,
    /// Keep the fewest singular values that hold this share of their sum, and one more, as kohya's resize script does.
    #[arg(long, value_name = "SHARE", value_parser = share, allow_hyphen_values = true, group = "spectrum")]
    sv_cumulative: Option<f64>,
    /// Keep so many ranks in the whole file, where they count most.
    #[arg(long, value_name = "N", value_parser = rank, group = "budget")]
    budget_rank: Option<usize>,
    /// Keep as many ranks as make a file of this size, where they count most.
    #[arg(long, value_name = "MIB", value_parser = mib, allow_hyphen_values = true, group = "budget")]
    budget_mib: Option<f64>,
    /// Keep as few ranks as add no more than X to the loss, as the root mean square over layers; needs a calibration.
    #[arg(long, value_name = "X", value_parser = loss, allow_hyphen_values = true, group = "budget")]
    loss: Option<f64>,
    /// Judge what is cut off by what it does on recorded inputs (`data`), or by its size (`norm`) [default: data, where a
    /// calibration is given].
    #[arg(long, value_name = "BY", value_parser = truncate_by())]
    truncate_by: Option<TruncateBy>,
}

impl Truncate {
    fn truncation(&self) -> Truncation {
        Truncation { rank: self.rank, spectrum: spectrum(self.sv_ratio, self.sv_fro, self.sv_cumulative) }
    }

    /// Whether nothing is asked for.
    fn is_none(&self) -> bool {
        self.truncation().is_none() && self.budget().is_none()
    }

    fn budget(&self) -> Option<Budget> {
        let bytes = |mib: f64| (mib * f64::from(1 << 20)) as u64;
        let loss = self.loss.map(Budget::Loss);
        loss.or(self.budget_rank.map(Budget::Ranks)).or(self.budget_mib.map(|mib| Budget::Bytes(bytes(mib))))
    }

    /// What was asked for, for a method that sees to it itself; nothing if it takes a budget or a calibration to do so.
    fn take(&mut self, calibration: bool) -> Truncation {
        let by_data = calibration && self.truncate_by != Some(TruncateBy::Norm);
        if by_data || self.budget().is_some() {
            return Truncation::default();
        }
        let truncation = self.truncation();
        (self.rank, self.sv_ratio, self.sv_fro, self.sv_cumulative) = (None, None, None, None);
        truncation
    }

    /// Refuses what nothing can be judged by.
    fn check(&self, calibration: bool) -> anyhow::Result<()> {
        self.after(false).check(calibration).map_err(|e| usage(e.to_string()))
    }

    /// What is done with a merge in memory.
    fn after(&self, calibrate_singular_values: bool) -> After {
        After {
            calibrate_singular_values,
            truncate: self.truncation(),
            budget: self.budget(),
            truncate_by: self.truncate_by,
        }
    }
}

fn truncate_by() -> impl TypedValueParser<Value = TruncateBy> {
    PossibleValuesParser::new(["data", "norm"]).map(|by| match by.as_str() {
        "data" => TruncateBy::Data,
        _ => TruncateBy::Norm,
    })
}

fn mib(text: &str) -> Result<f64, String> {
    match finite(text)? {
        x if x > 0.0 => Ok(x),
        x => Err(format!("is {x}; expected a size above 0")),
    }
}

fn loss(text: &str) -> Result<f64, String> {
    match finite(text)? {
        x if x > 0.0 => Ok(x),
        x => Err(format!("is {x}; expected a loss above 0")),
    }
}

fn rank(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) => Err("is 0; a rank is 1 or more".into()),
        Ok(n) => Ok(n),
        Err(_) => Err("expected a whole number".into()),
    }
}

fn ratio(text: &str) -> Result<f64, String> {
    match finite(text)? {
        x if x >= 1.0 => Ok(x),
        x => Err(format!("is {x}; expected 1 or more")),
    }
}

/// What a merge is measured by.
#[derive(Args, Debug)]
struct Measure {
    /// Measure what the merge loses on a calibration that `loraweld calibrate` wrote for these adapters.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
}

/// What is merged, opened and checked.
pub struct Inputs {
    pub adapters: Vec<Adapter>,
    strengths: Vec<f64>,
    /// Strengths by layer, in words.
    by_layer: Option<String>,
    plan: Plan,
    /// Files that are never overwritten.
    files: Vec<PathBuf>,
}

impl Inputs {
    /// Opens and matches adapters; `files` are all that is read.
    pub fn open(
        loras: &[LoraArg],
        by_layer: &ByLayer,
        reading: &Reading,
        files: Vec<PathBuf>,
    ) -> anyhow::Result<Self> {
        let (adapters, by_layer) = by_layer.apply(open_adapters(loras, reading)?)?;
        let strengths: Vec<_> = loras.iter().map(|lora| lora.strength).collect();
        let weighted: Vec<_> = adapters.iter().zip(&strengths).map(|(a, &s)| a.at(s)).collect();
        let plan = Plan::new(&weighted)?;
        Ok(Self { adapters, strengths, by_layer, plan, files })
    }

    pub fn weighted(&self) -> Vec<Weighted<'_>> {
        self.adapters.iter().zip(&self.strengths).map(|(adapter, &strength)| adapter.at(strength)).collect()
    }

    /// The type that holds the values of every input.
    fn dtype(&self) -> Dtype {
        self.adapters.iter().map(Adapter::dtype).reduce(Dtype::common).unwrap_or(Dtype::F32)
    }

    /// What is read beside the adapters: a calibration.
    fn other(&self) -> Option<&Path> {
        self.files.get(self.adapters.len()).map(PathBuf::as_path)
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
        let inputs = Inputs::open(loras, &self.by_layer, &self.reading, files)?;
        // A merge checks its inputs itself.
        for adapter in inputs.adapters.iter().filter(|_| self.dry_run) {
            adapter.check_finite()?;
        }
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
                Err(e) if self.dry_run => {
                    out.warn(format_args!("this merge would be refused: {}", chain(&e.into())))?;
                }
                other => other?,
            }
        }
        if self.dry_run && self.report.is_some() {
            out.warn("a dry run writes no --report; --json prints it")?;
        }
        Ok(())
    }

    /// Says what a merge would do.
    fn dry_run(&self, inputs: &Inputs, out: &Output) -> anyhow::Result<()> {
        let dtype = self.dtype.unwrap_or(inputs.dtype());
        let layers = inputs.plan.layers();
        let most = self.truncate.rank.unwrap_or(usize::MAX);
        let rank = |layer: &PlannedLayer| layer.rank.min(most);
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

    /// Merges, measures the result by a calibration, if there is one, and writes and reports it.
    fn finish(
        &self,
        global: &Global,
        inputs: &Inputs,
        calibration: Option<&Calibration>,
        out: &Output,
        method: &dyn Method,
    ) -> anyhow::Result<()> {
        // clap asks for it.
        let output = self.output.as_ref().context("no output was named")?;
        let device = global.open_device(&self.memory, out)?;
        let dtype = self.dtype.unwrap_or(inputs.dtype());
        let strengths = inputs.by_layer.clone().map(|text| ("loraweld.strengths".to_owned(), text));
        let options = SaveOptions {
            dtype: Some(dtype),
            format: self.format.format(),
            unnamed: Unnamed::Keep,
            overwrite: self.force,
            protect: inputs.files.clone(),
            metadata: strengths.into_iter().collect(),
        };
        let to = Destination {
            path: output,
            sink: None,
            options: &options,
            truncation: self.truncate.truncation(),
        };
        // Tests of the program are tests of what it computes.
        let verify = self.verify.unwrap_or(if cfg!(debug_assertions) { 2 } else { 0 });
        let weighted = inputs.weighted();
        let (report, verified) = out.long(|control| {
            let after = self.truncate.after(self.calibrate_singular_values);
            match calibration.is_some() || after.budget.is_some() || after.calibrate_singular_values {
                true => {
                    merge_in_memory(method, &device, &weighted, calibration, &after, &to, verify, control)
                }
                false if verify > 0 => {
                    let model = self.reading.model();
                    merge_verified(method, &device, &weighted, &to, verify, model, control)
                        .map(|(report, verified)| (report, Some(verified)))
                }
                false => method.merge_into(&device, &weighted, &to, *control).map(|report| (report, None)),
            }
        })?;
        if let Some(verified) = verified.filter(|_| self.verify.is_some()) {
            out.event("verified", &verified)?;
            out.info(format_args!(
                "verified   {}: at most {:.1e} off what the CPU finds in f64 (`{}`)",
                count(verified.layers, "layer"),
                verified.worst,
                verified.layer
            ))?;
        }
        say_notes(&report, &inputs.plan, out)?;

        let format = options.format.unwrap_or(inputs.adapters[0].format());
        let bytes = len(output);
        let mut result = json!({
            "output": output, "bytes": bytes, "dtype": dtype.name(), "format": format.name(),
        });
        let mut full = serde_json::to_value(&report)?;
        for (key, value) in [("output", result.clone()), ("warnings", json!(out.warnings()))] {
            full[key] = value;
        }
        if let Some(path) = &self.report {
            let text = match is_page(path) {
                true => {
                    let made = Made {
                        report: &report,
                        output,
                        bytes,
                        dtype: dtype.name(),
                        format: format.name(),
                        warnings: out.warnings(),
                        calibration: inputs.other(),
                        norms: Norms::of(&weighted, output),
                    };
                    made.page().text()?
                }
                false => serde_json::to_string_pretty(&full)? + "\n",
            };
            let mut files = inputs.files.clone();
            files.push(output.clone());
            write_atomic(path, self.force, &files, |file| std::io::Write::write_all(file, text.as_bytes()))?;
        }
        result["report"] = full;
        out.event("result", &result)?;
        say_merged(&report, out)?;
        for table in [losses(&report), projections(&report), captured(&report)].into_iter().flatten() {
            out.info(table)?;
        }
        out.info(format_args!("wrote      {} ({}, {dtype}, {format})", output.display(), size(bytes)))?;
        if let Some(path) = &self.report {
            out.info(format_args!("report     {}", path.display()))?;
        }
        Ok(())
    }
}

/// Merges, truncates, measures and then writes: losses are found, and budgets shared, of factors that are in memory.
#[allow(clippy::too_many_arguments, reason = "what a merge is made of and written with")]
fn merge_in_memory(
    method: &dyn Method,
    device: &Device,
    weighted: &[Weighted<'_>],
    calibration: Option<&Calibration>,
    after: &After,
    to: &Destination<'_>,
    verify: usize,
    control: &Control<'_>,
) -> loraweld::Result<(Report, Option<Verified>)> {
    let merged = method.merge_any(device, weighted, *control)?;
    let (none, options) = (Truncation::default(), to.options);
    let verified = match verify {
        0 => None,
        n => Some(loraweld::merge::verify(method, weighted, &merged.adapter, none, options, n, control)?),
    };
    let merged = after.apply(merged, device, weighted, calibration, to.options, control)?;
    let merged = match calibration {
        Some(calibration) => merged.measured(calibration, weighted, control)?,
        None => merged,
    };
    merged.adapter.save_with(to.path, to.options, *control)?;
    Ok((merged.report, verified))
}

/// Merges into a file, computes some of its layers again, and only then puts it in its place.
fn merge_verified(
    method: &dyn Method,
    device: &Device,
    weighted: &[Weighted<'_>],
    to: &Destination<'_>,
    layers: usize,
    model: Option<Family>,
    control: &Control<'_>,
) -> loraweld::Result<(Report, Verified)> {
    let file = AtomicFile::create(to.path, to.options.overwrite, &to.options.protect)?;
    let sink = Destination { sink: Some(file.file()), ..*to };
    let report = method.merge_into(device, weighted, &sink, *control)?;
    let written = file.file().try_clone().map_err(|e| write_error(to.path, e))?;
    let options = OpenOptions { family: model, ..Default::default() };
    let written = Adapter::from_source(to.path.display().to_string(), Arc::new(written), &options)?;
    let verified =
        loraweld::merge::verify(method, weighted, &written, to.truncation, to.options, layers, control)?;
    control.check()?;
    file.commit(to.path)?;
    Ok((report, verified))
}

impl Inputs {
    /// What goes in and what matches.
    pub fn describe(&self, out: &Output) -> anyhow::Result<()> {
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
            let rank = range(layers.iter().map(|layer| layer.rank()));
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
            let off = adapter.layers().iter().filter(|layer| layer.scale().value == 0.0);
            let off: Vec<_> = off.map(|layer| layer.key()).collect();
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
        Action::Routed { .. } | Action::Projected { .. } | Action::Concatenated | Action::Combined { .. } => {
            None
        }
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

/// How much was merged, how fast, and what memory of a GPU it took.
pub fn say_merged(report: &Report, out: &Output) -> anyhow::Result<()> {
    let Report { method, layers, seconds, memory, .. } = report;
    let layers = count(layers.len(), "layer");
    out.info(format_args!("merged     {layers} by {method} in {seconds:.2} s"))?;
    match memory {
        Some(memory) => out.info(format_args!("memory     {memory}")),
        None => Ok(()),
    }
}

/// Layers that a table shows.
const WORST: usize = 5;

/// What subjects gave up: where it is most.
fn projections(report: &Report) -> Option<Table> {
    let mut most: Vec<_> =
        report.layers.iter().flat_map(|l| l.projections().iter().map(|p| (&l.layer, p))).collect();
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

/// How much of a merge of entries its ranks hold: where it is least.
fn captured(report: &Report) -> Option<Table> {
    let mut least: Vec<_> = report.layers.iter().filter_map(|l| Some((l, l.captured()?))).collect();
    least.sort_by(|x, y| x.1.total_cmp(&y.1));
    let mut table = Table::new(&["approximated", ">rank", ">energy held"]);
    for (layer, share) in least.iter().take(WORST) {
        table.row([layer.layer.clone(), layer.rank.to_string(), format!("{:.1}%", 100.0 * share)]);
    }
    (!least.is_empty()).then_some(table)
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
