//! The page of one merge.

use std::collections::BTreeMap;
use std::path::Path;

use loraweld::merge::{
    Action, InputReport, LayerReport, Losses, ProjectionReport, Report, Routing, SingularValues, TaskLosses,
};
use loraweld::{Adapter, Family, Layer, OpenOptions, Weighted};
use rayon::prelude::*;

use super::html::{Cell, Column, Drawing, Grid, Number, Page, Section, Step, percent};
use super::maps::{block_of, maps};
use super::spectra::spectra;
use crate::cli::host;
use crate::cli::layers::range;
use crate::cli::output::{count, quoted, size};

/// A merge that was written.
pub struct Made<'a> {
    pub report: &'a Report,
    pub output: &'a Path,
    pub bytes: u64,
    pub dtype: &'a str,
    pub format: &'a str,
    pub warnings: Vec<String>,
    pub calibration: Option<&'a Path>,
    /// `None` if what was written cannot be read.
    pub norms: Option<Norms>,
}

/// Norms of updates, by the name of the layer.
pub struct Norms {
    /// Of each adapter at its strength.
    before: Vec<BTreeMap<String, f64>>,
    /// Of what was written.
    after: BTreeMap<String, f64>,
}

impl Norms {
    /// Reads what was written.
    pub fn of(adapters: &[Weighted<'_>], output: &Path) -> Option<Self> {
        let family = adapters.first()?.adapter.family();
        let options =
            OpenOptions { family: Some(family).filter(|f| *f != Family::UNKNOWN), ..Default::default() };
        let after = Adapter::open_with(output, &options).ok()?;
        let norms = |adapter: &Adapter, strength: f64| {
            let of = |layer: &Layer| (layer.name(), layer.norm() * strength.abs());
            adapter.layers().par_iter().map(of).collect()
        };
        let before = adapters.iter().map(|w| norms(w.adapter, w.strength)).collect();
        Some(Self { before, after: norms(&after, 1.0) })
    }
}

/// A merge is called close to each adapter alone, near it, or far from it, by its loss.
const CLOSE: f64 = 0.1;
const NEAR: f64 = 0.35;
const FAR: f64 = 0.7;

impl Made<'_> {
    /// The page.
    pub fn page(&self) -> Page {
        let report = self.report;
        let mut numbers = self.numbers();
        numbers.truncate(3);
        let mut sections = vec![inputs(report)];
        sections.extend(totals(report));
        sections.extend(tasks(report));
        sections.extend(report.routing.as_ref().map(|routing| who_feeds_whom(report, routing)));
        sections.extend(self.norms.as_ref().map(|norms| norms_of_blocks(report, norms)));
        sections.extend(self.maps());
        sections.extend(cut_spectra(report));
        sections.extend(style_spectra(report));
        sections.extend(projections(report));
        sections.push(layers(report));
        let method = &report.method;
        let title = match report.inputs.len() {
            1 => format!("{} by {method}", report.inputs[0].name),
            n => format!("{} merged by {method}", count(n, "adapter")),
        };
        Page {
            title,
            subject: format!("{} became {}.", listed(&names(report)), self.output.display()),
            verdict: self.verdict(),
            numbers,
            next: self.next(),
            sections,
            warnings: self.warnings.clone(),
            facts: self.facts(),
            command: command(),
        }
    }

    /// Two sentences.
    fn verdict(&self) -> [String; 2] {
        let report = self.report;
        if self.is_unchanged() {
            return [
                "Every layer fits what was asked for, so nothing was cut off.".into(),
                format!("{} does what the adapter does at its strength.", self.output.display()),
            ];
        }
        let unmeasured = "What the merge does to each adapter was not measured, as no calibration was given, so only \
                          images can tell.";
        let given = given_up(report);
        let style = report.inputs.first().map_or("", |input| &input.name);
        if let Some(losses) = report.losses {
            let second = match worst(report) {
                _ if losses.sum < losses.merged || losses.average < losses.merged => better(losses),
                Some((layer, loss)) => format!(
                    "The plain sum loses {:.3} and the average {:.3}; the layer that loses most here is {layer}, at {loss:.3}.",
                    losses.sum, losses.average
                ),
                None => {
                    format!("The plain sum loses {:.3} and the average {:.3}.", losses.sum, losses.average)
                }
            };
            return [judged(losses.merged, "The result"), second];
        }
        if let Some((layer, most, mean)) = given {
            let first = format!(
                "{style} is kept whole, and what gives way to it loses {} of its update's energy on average and {} at \
                 most, in {layer}.",
                percent(mean),
                percent(most.removed)
            );
            return [first, unmeasured.into()];
        }
        if let Some((layer, cut)) = most_cut(report) {
            let first = match cut {
                0.0 => "The rank was lowered, and nothing was cut off by that.".to_owned(),
                cut => format!(
                    "The rank was lowered, which cut off {} of the update's norm at most, in {layer}.",
                    percent(cut)
                ),
            };
            return [first, unmeasured.into()];
        }
        if let Some((layer, held)) = least_held(report) {
            let first = format!(
                "The result is an approximation that holds at least {} of the merged update's energy, least in {layer}.",
                percent(held)
            );
            return [first, unmeasured.into()];
        }
        let is_sum = |l: &LayerReport| matches!(l.action, Action::Concatenated | Action::PassedThrough);
        let first = match report.layers.iter().all(is_sum) {
            true => "The result is the exact sum that was asked for, and nothing was cut off.".to_owned(),
            false => {
                format!("{} were merged by {}.", count(report.layers.len(), "layer"), report.method)
            }
        };
        [first, unmeasured.into()]
    }

    /// Whether there was one adapter, and it went through as it is.
    fn is_unchanged(&self) -> bool {
        let passed =
            |l: &LayerReport| l.action == Action::PassedThrough && l.cut.is_none_or(|cut| cut == 0.0);
        self.report.inputs.len() == 1 && self.report.losses.is_none() && self.report.layers.iter().all(passed)
    }

    /// What tells most comes first.
    fn numbers(&self) -> Vec<Number> {
        let report = self.report;
        let mut numbers = Vec::new();
        if let Some(losses) = report.losses {
            let scale = "0 is perfect, 1 is no adapter at all";
            numbers.push(Number::new(format!("{:.3}", losses.merged), "loss of this merge", scale));
            numbers.push(Number::new(
                format!("{:.3}", losses.sum),
                "loss of the plain sum",
                format!("the average loses {:.3}", losses.average),
            ));
            if let Some((layer, loss)) = worst(report) {
                numbers.push(Number::new(format!("{loss:.3}"), "loss of the worst layer", layer));
            }
        }
        if let Some((layer, most, mean)) = given_up(report) {
            let note = format!("{} at most, in {layer}", percent(most.removed));
            numbers.push(Number::new(percent(mean), "taken out of subjects, on average", note));
            let mean = |of: fn(&ProjectionReport) -> f64| {
                let all: Vec<_> = report.layers.iter().flat_map(LayerReport::projections).map(of).collect();
                all.iter().sum::<f64>() / all.len().max(1) as f64
            };
            numbers.push(Number::new(
                format!("{:.3}", mean(|p| p.after)),
                "interference that is left",
                format!("it was {:.3}, means over layers", mean(|p| p.before)),
            ));
        }
        if let Some((layer, cut)) = most_cut(report) {
            numbers.push(Number::new(percent(cut), "largest cut of a layer's norm", layer));
        }
        if let Some((layer, held)) = least_held(report) {
            numbers.push(Number::new(percent(held), "energy held where it is least", layer));
        }
        let ranks = range(report.layers.iter().map(|layer| layer.rank));
        numbers.push(Number::new(size(self.bytes), "size of the file", self.dtype));
        numbers.push(Number::new(
            ranks,
            "rank of the result",
            format!("in {}", count(report.layers.len(), "layer")),
        ));
        numbers.push(Number::new(report.layers.len().to_string(), "layers", ""));
        numbers
    }

    fn next(&self) -> Vec<Step> {
        let report = self.report;
        let words: Vec<String> = report.inputs.iter().map(|i| strong(&i.path, i.strength)).collect();
        let mut steps = Vec::new();
        let mut step = |text: String, command: Option<String>| steps.push(Step { text, command });
        let plain = |losses: Losses| losses.sum < losses.merged;
        if report.losses.is_some_and(plain) && report.inputs.len() > 1 {
            step(
                "Try the plain sum, which loses less here.".into(),
                Some(format!("loraweld merge linear {} -o sum.safetensors", words.join(" "))),
            );
        }
        match self.calibration {
            Some(file) if report.inputs.len() > 1 => step(
                "See what every method loses on the same calibration.".into(),
                Some(format!(
                    "loraweld compare {} --calibration {} --report compare.html",
                    words.join(" "),
                    quoted(file)
                )),
            ),
            Some(_) => {}
            None if self.is_unchanged() => {}
            None => step(
                "Record what the layers read while each adapter is active, make a calibration of that, and run the same \
                 command with --calibration: then this page tells what is lost."
                    .into(),
                Some(format!(
                    "loraweld calibrate {} --activations FOLDER … -o mine.calibration.safetensors",
                    report.inputs.iter().map(|i| quoted(&i.path)).collect::<Vec<_>>().join(" ")
                )),
            ),
        }
        let projections = || report.layers.iter().flat_map(LayerReport::projections);
        if projections().next().is_some() {
            match projections().all(|p| p.share >= 1.0) {
                true => step("If a subject fades, let it keep more of itself: --mu 0.5 in place of --hard.".into(), None),
                false => step(
                    "If the style fades, let the subject give way more: a larger --mu, or --hard. If the subject fades, \
                     take a smaller --mu."
                        .into(),
                    None,
                ),
            }
        }
        if most_cut(report).is_some_and(|(_, cut)| cut > 0.1) {
            step(
                "Much was cut off in some layer: raise the rank, or let --budget-rank spend ranks where they count.".into(),
                None,
            );
        }
        if let (Some((layer, loss)), Some(total)) = (worst(report), report.losses)
            && loss > 2.0 * total.merged
            && loss > NEAR
        {
            step(
                format!("{layer} loses far more than the rest: look at it in the table of layers below."),
                None,
            );
        }
        step(
            format!(
                "Load {} alone, at strength 1, and look at images: figures count recorded inputs, not pictures.",
                self.output.display()
            ),
            None,
        );
        steps
    }

    /// Whatever is known of layers, block by block.
    fn maps(&self) -> Vec<Section> {
        let report = self.report;
        let of = |value: fn(&LayerReport) -> Option<f64>| -> Vec<(&str, f64)> {
            report.layers.iter().filter_map(|l| Some((l.layer.as_str(), value(l)?))).collect()
        };
        let section = |title: &str, text: &str, grids: Vec<Grid>| Section {
            title: title.into(),
            text: text.into(),
            grids,
            ..Section::default()
        };
        let mut sections = Vec::new();
        let losses = of(|l| l.losses.map(|l| l.merged));
        if !losses.is_empty() {
            sections.push(section(
                "Where it is lost",
                "Loss of each layer: a row is a block, a column a module. Stronger colour is more loss, and the strongest \
                 is 1 or more.",
                maps(&losses, |v| Cell { text: format!("{v:.2}"), ..Cell::loss(v).heated(1.0) }),
            ));
        }
        let removed = of(|l| l.projections().iter().map(|p| p.removed).reduce(f64::max));
        if !removed.is_empty() {
            let most = removed.iter().map(|(_, v)| *v).fold(0.0, f64::max);
            sections.push(section(
                "Where subjects give way",
                "Share of a subject's energy that was taken out, in percent; of several subjects, the largest. \
                 The strongest colour is the largest of these.",
                maps(&removed, |v| Cell { text: format!("{:.1}", 100.0 * v), ..Cell::share(v).heated(most) }),
            ));
        }
        let cut = of(|l| l.cut);
        if cut.iter().any(|(_, cut)| *cut > 0.0) {
            let most = cut.iter().map(|(_, v)| *v).fold(0.0, f64::max);
            sections.push(section(
                "Where ranks were cut",
                "Share of each layer's norm that was cut off, in percent. The strongest colour is the largest of these.",
                maps(&cut, |v| Cell { text: format!("{:.1}", 100.0 * v), ..Cell::share(v).heated(most) }),
            ));
        }
        let held = of(LayerReport::captured);
        if !held.is_empty() {
            let most = held.iter().map(|(_, v)| 1.0 - *v).fold(0.0, f64::max);
            sections.push(section(
                "Where the approximation is coarse",
                "Share of each layer's merged energy that its ranks hold, in percent. Stronger colour is less of it, and \
                 the strongest is the least of these.",
                maps(&held, |v| Cell {
                    text: format!("{:.1}", 100.0 * v),
                    ..Cell::number(1.0 - v, "").heated(most)
                }),
            ));
        }
        let ranks = of(|l| Some(l.rank as f64));
        let most = ranks.iter().map(|(_, v)| *v).fold(0.0, f64::max);
        if ranks.iter().any(|(_, rank)| *rank != most) {
            sections.push(section(
                "Ranks",
                "Rank of each layer. The strongest colour is the largest of these.",
                maps(&ranks, |v| Cell::count(v as usize).heated(most)),
            ));
        }
        sections
    }

    fn facts(&self) -> Vec<(String, String)> {
        let report = self.report;
        let mut facts = vec![
            ("output", self.output.display().to_string()),
            ("written as", format!("{}, {}, {}", size(self.bytes), self.dtype, self.format)),
            ("method", report.method.clone()),
        ];
        let hash = |i: &InputReport| Some((i.name.clone(), format!("SHA-256 {}", i.sha256.as_ref()?)));
        facts.extend(self.calibration.map(|path| ("calibration", path.display().to_string())));
        facts.push(("device", report.device.clone()));
        facts.extend(report.memory.map(|memory| ("device memory", memory.to_string())));
        facts.push(("time", format!("{:.2} s", report.seconds)));
        facts.push(("loraweld", report.version.clone()));
        let mut facts: Vec<_> = facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        facts.extend(options(&report.options));
        facts.extend(report.inputs.iter().filter_map(hash));
        facts
    }
}

/// The method's options, by name.
pub fn options(options: &serde_json::Value) -> Vec<(String, String)> {
    let text = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let all = options.as_object().into_iter().flatten();
    all.map(|(name, value)| (format!("option {name}"), text(value))).collect()
}

/// The command line that is running.
pub fn command() -> String {
    let words: Vec<_> = host::words().iter().map(|word| quoted(Path::new(word))).collect();
    words.join(" ")
}

/// An adapter as an argument.
pub fn strong(path: &Path, strength: f64) -> String {
    match strength {
        1.0 => quoted(path),
        _ => quoted(Path::new(&format!("{}:{strength}", path.display()))),
    }
}

/// How good a loss is, in a sentence.
pub fn judged(loss: f64, what: &str) -> String {
    let does = match loss {
        _ if loss < CLOSE => "does almost exactly what each adapter does alone",
        _ if loss < NEAR => "does nearly what each adapter does alone",
        _ if loss < FAR => "does only in part what each adapter does alone",
        _ if loss < 1.0 => "does little of what each adapter does alone",
        _ => "does no better on the recorded inputs than leaving the adapters out",
    };
    format!("{what} {does}: its loss is {loss:.3}, where 0 is perfect and 1 is as bad as no adapter.")
}

fn better(losses: Losses) -> String {
    let Losses { merged, sum, average } = losses;
    let simpler = if sum < average { "sum" } else { "average" };
    format!(
        "The plain {simpler} would lose less: the sum loses {sum:.3} and the average {average:.3}, beside {merged:.3}."
    )
}

fn names(report: &Report) -> Vec<String> {
    let name = |i: &InputReport| match i.strength {
        1.0 => i.name.clone(),
        strength => format!("{} at {strength}", i.name),
    };
    report.inputs.iter().map(name).collect()
}

/// `a, b and c`.
pub fn listed(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

fn extreme(report: &Report, of: impl Fn(&LayerReport) -> Option<f64>) -> Option<(&str, f64)> {
    let all = report.layers.iter().filter_map(|l| Some((l.layer.as_str(), of(l)?)));
    all.max_by(|x, y| x.1.total_cmp(&y.1))
}

/// The layer that loses most.
pub fn worst(report: &Report) -> Option<(&str, f64)> {
    extreme(report, |l| l.losses.map(|l| l.merged))
}

fn most_cut(report: &Report) -> Option<(&str, f64)> {
    extreme(report, |l| l.cut)
}

fn least_held(report: &Report) -> Option<(&str, f64)> {
    extreme(report, |l| l.captured().map(|held| -held)).map(|(layer, held)| (layer, -held))
}

/// Where a subject gives up most, what, and the mean of all.
fn given_up(report: &Report) -> Option<(&str, &ProjectionReport, f64)> {
    let all = || report.layers.iter().flat_map(|l| l.projections().iter().map(|p| (l.layer.as_str(), p)));
    let (layer, most) = all().max_by(|x, y| x.1.removed.total_cmp(&y.1.removed))?;
    Some((layer, most, all().map(|(_, p)| p.removed).sum::<f64>() / all().count() as f64))
}

fn columns(names: &[&str]) -> Vec<Column> {
    names.iter().map(|name| Column::new(name)).collect()
}

fn inputs(report: &Report) -> Section {
    let row = |(i, input): (usize, &InputReport)| {
        vec![
            Cell::text(input.name.clone()),
            Cell::count(i + 1),
            Cell::number(input.strength, input.strength.to_string()),
            Cell::count(input.layers),
            Cell::text(input.path.display().to_string()),
        ]
    };
    Section {
        title: "What went in".into(),
        text: String::new(),
        grids: vec![Grid {
            columns: columns(&["adapter", ">no.", ">strength", ">layers", "file"]),
            rows: report.inputs.iter().enumerate().map(row).collect(),
            ..Grid::default()
        }],
        ..Section::default()
    }
}

/// A bar, beside others that are `most` at most.
pub fn bar(loss: f64, most: f64) -> Cell {
    let most = most.max(1.0);
    Cell::drawn(Drawing::Bar { length: 100.0 * (loss / most).clamp(0.0, 1.0), one: 100.0 / most }, loss)
}

fn totals(report: &Report) -> Option<Section> {
    let losses = report.losses?;
    let known = report.layers.iter().filter(|l| l.losses.is_some()).count();
    let most = losses.merged.max(losses.sum).max(losses.average);
    let row = |name: &str, loss: f64| vec![Cell::text(name), Cell::loss(loss), bar(loss, most)];
    let rows = vec![
        row(&format!("this merge ({})", report.method), losses.merged),
        row("plain sum", losses.sum),
        row("average", losses.average),
    ];
    Some(Section {
        title: "Loss beside the plain sum and the average".into(),
        text: format!(
            "This counts the {known} of {} whose loss is known. The line across the bars stands at 1, which is as bad as \
             no adapter.",
            count(report.layers.len(), "layer")
        ),
        grids: vec![Grid { columns: columns(&["", ">loss", ""]), rows, ..Grid::default() }],
        ..Section::default()
    })
}

/// Who pays for the merge.
fn tasks(report: &Report) -> Option<Section> {
    let losses = report.tasks.iter().map(|task| task.losses);
    let most = losses.map(|l| l.merged.max(l.sum)).reduce(f64::max)?;
    let row = |task: &TaskLosses| {
        let losses = task.losses;
        vec![
            Cell::text(report.inputs.get(task.adapter).map_or("", |input| &input.name)),
            Cell::loss(losses.merged),
            bar(losses.merged, most),
            Cell::loss(losses.sum),
            Cell::loss(losses.average),
        ]
    };
    Some(Section {
        title: "Who loses what".into(),
        text: "Each adapter's loss on its own inputs. A higher strength for one that loses much gives it more, and takes from \
               the others; with --balance fair, ssr looks for losses that are equal."
            .into(),
        grids: vec![Grid {
            columns: columns(&["inputs of", ">loss", "", ">of the sum", ">of the average"]),
            rows: report.tasks.iter().map(row).collect(),
            ..Grid::default()
        }],
        ..Section::default()
    })
}

/// Tasks × tasks, as the routers have them.
fn who_feeds_whom(report: &Report, routing: &Routing) -> Section {
    let name = |i: &usize| report.inputs.get(*i).map_or("", |input| &input.name);
    let most = routing.answers.iter().flatten().copied().fold(1.0, f64::max);
    let row = |(i, answers): (&usize, &Vec<f64>)| {
        let cells = answers.iter().map(|&answer| Cell::loss(answer).heated(most));
        std::iter::once(Cell::text(format!("through {}", name(i)))).chain(cells).collect()
    };
    let head = routing.adapters.iter().map(|i| format!(">inputs of {}", name(i)));
    Section {
        title: "Who feeds whom".into(),
        text: "A column is what one adapter reads of its own inputs, and its rows tell how strongly the merge answers that \
               through each adapter, relative to what the one does alone. The plain sum has 1 on the diagonal and 0 \
               elsewhere; here answers may make up for each other or cancel, and only the losses tell what is left."
            .into(),
        grids: vec![Grid {
            columns: std::iter::once("".to_owned()).chain(head).map(|name| Column::new(&name)).collect(),
            rows: routing.adapters.iter().zip(&routing.answers).map(row).collect(),
            map: true,
            ..Grid::default()
        }],
        ..Section::default()
    }
}

/// Spectra of layers that were truncated.
fn cut_spectra(report: &Report) -> Option<Section> {
    let by_data = report.layers.iter().any(|l| l.added.is_some());
    let of = if by_data { " of what a layer does on the recorded inputs" } else { "" };
    let text = format!(
        "Singular values{of} before the cut, each relative to the layer's largest: the line is the median of the layers, and \
         the band spans all of them. What is right of the dashed line was cut off; if layers differ, two lines show the \
         lowest and the highest rank. A curve that is still high where it is cut says that the rank is low for it."
    );
    drawn(report, "Spectra, and where they were cut", text, "keeps", |l| l.spectrum.as_ref())
}

/// Spectra of a style, and which of its directions are kept clear.
fn style_spectra(report: &Report) -> Option<Section> {
    let style = report.inputs.first().map_or("", |input| &input.name);
    let shares = || report.layers.iter().flat_map(LayerReport::projections).map(|p| p.share);
    let (low, high) = (shares().fold(1.0, f64::min), shares().fold(0.0, f64::max));
    let share = match (percent(low), percent(high)) {
        (low, high) if low == high => low,
        (low, high) => format!("{low} to {high}"),
    };
    let text = format!(
        "Singular values of {style}, each relative to the layer's largest: the line is the median of the layers, and the band \
         spans all of them. The directions left of the dashed line are kept clear: a subject gives up {share} of what it has \
         there. If layers differ, two lines show the fewest and the most."
    );
    drawn(
        report,
        "Spectrum of the style, and what of it is kept clear",
        text,
        "keeps clear",
        LayerReport::style,
    )
}

fn drawn(
    report: &Report,
    title: &str,
    text: String,
    does: &str,
    of: impl Fn(&LayerReport) -> Option<&SingularValues>,
) -> Option<Section> {
    let all: Vec<_> = report.layers.iter().filter_map(|l| Some((l.layer.as_str(), of(l)?))).collect();
    let plots = spectra(&all, does);
    (!plots.is_empty()).then(|| Section { title: title.into(), text, plots, ..Section::default() })
}

/// What each block had, and has.
fn norms_of_blocks(report: &Report, norms: &Norms) -> Section {
    let blocks = |norms: &BTreeMap<String, f64>| {
        let mut squares: BTreeMap<(String, Vec<u64>), f64> = BTreeMap::new();
        for (name, norm) in norms {
            let (kind, numbers) = block_of(name);
            // However a file spells it.
            let kind = kind.trim_end_matches(['*', '.', '_']).to_owned();
            *squares.entry((kind, numbers)).or_default() += norm * norm;
        }
        squares
    };
    let (before, after): (Vec<_>, _) = (norms.before.iter().map(blocks).collect(), blocks(&norms.after));
    let mut places: Vec<_> = before.iter().flat_map(BTreeMap::keys).chain(after.keys()).collect();
    places.sort();
    places.dedup();
    let most = before
        .iter()
        .flat_map(BTreeMap::values)
        .chain(after.values())
        .fold(0.0, |m: f64, v| m.max(*v))
        .sqrt();
    let row = |place: &(String, Vec<u64>)| {
        let cell = |squares: &BTreeMap<_, f64>| match squares.get(place) {
            Some(square) => Cell::loss(square.sqrt()).heated(most),
            None => Cell::default(),
        };
        let numbers: Vec<_> = place.1.iter().map(u64::to_string).collect();
        let name = match place.0.as_str() {
            "" => "outside blocks".to_owned(),
            kind => format!("{kind} {}", numbers.join(".")),
        };
        let cells = before.iter().map(cell).chain([cell(&after)]);
        std::iter::once(Cell::text(name)).chain(cells).collect()
    };
    let names = report.inputs.iter().map(|input| format!(">{}", input.name));
    let names = std::iter::once("block".to_owned()).chain(names).chain([">merged".to_owned()]);
    Section {
        title: "Norms of the updates, before and after".into(),
        text: "A row is a block. Adapters count at their strengths; updates that are unlike each other add up to less than \
               their norms do."
            .into(),
        grids: vec![Grid {
            columns: names.map(|name| Column::new(&name)).collect(),
            rows: places.into_iter().map(row).collect(),
            map: true,
            ..Grid::default()
        }],
        ..Section::default()
    }
}

fn projections(report: &Report) -> Option<Section> {
    let all = || report.layers.iter().flat_map(|l| l.projections().iter().map(move |p| (l, p)));
    let most = all().map(|(_, p)| p.removed).reduce(f64::max)?;
    let row = |(layer, p): (&LayerReport, &ProjectionReport)| {
        let subject = report.inputs.get(p.adapter).map_or("", |input| &input.name);
        let angle = p.angles.first().copied();
        vec![
            Cell::text(layer.layer.clone()),
            Cell::share(p.removed).heated(most),
            Cell::loss(p.before),
            Cell::loss(p.after),
            angle.map_or_else(Cell::default, |angle| Cell::number(angle, format!("{angle:.2}"))),
            Cell::count(p.directions),
            Cell::share(p.share),
            Cell::text(subject),
        ]
    };
    let head = [
        "layer",
        ">energy removed",
        ">interference before",
        ">after",
        ">smallest angle, °",
        ">directions",
        ">gives way",
        "subject",
    ];
    Some(Section {
        title: "How far subjects overlap with what is kept".into(),
        text: "An angle of 0° is a direction that both read; at 90° they are not in each other's way. Interference is the \
               share of a subject's norm that acts on kept directions."
            .into(),
        grids: vec![Grid { columns: columns(&head), rows: all().map(row).collect(), filter: true, ..Grid::default() }],
        ..Section::default()
    })
}

/// Every layer; columns of which nothing is known are left out.
fn layers(report: &Report) -> Section {
    let most = report.layers.iter().filter_map(|l| l.losses);
    let most = most.map(|l| l.merged.max(l.sum).max(l.average)).fold(1.0, f64::max);
    let drawn = |losses: Losses| {
        let place = |loss: f64| 100.0 * (loss / most).clamp(0.0, 1.0);
        let [merged, sum, average] = [losses.merged, losses.sum, losses.average].map(place);
        Cell::drawn(Drawing::Losses { merged, sum, average, one: 100.0 / most }, losses.merged)
    };
    let adapters = |l: &LayerReport| match l.adapters.len() == report.inputs.len() {
        true => "all".to_owned(),
        false => l.adapters.iter().map(|i| (i + 1).to_string()).collect::<Vec<_>>().join(", "),
    };
    let done = |l: &LayerReport| match &l.action {
        Action::Summed { why } => format!("summed: {why}"),
        action => action.kind().to_owned(),
    };
    type Of<'a> = Box<dyn Fn(&LayerReport) -> Option<Cell> + 'a>;
    let all: Vec<(&str, Of<'_>)> = vec![
        ("layer", Box::new(|l| Some(Cell::text(l.layer.clone())))),
        (">loss", Box::new(|l| Some(Cell::loss(l.losses?.merged).heated(1.0)))),
        (">of the sum", Box::new(|l| Some(Cell::loss(l.losses?.sum)))),
        (">of the average", Box::new(|l| Some(Cell::loss(l.losses?.average)))),
        ("these three", Box::new(|l| Some(drawn(l.losses?)))),
        (">rank", Box::new(|l| Some(Cell::count(l.rank)))),
        (">cut off", Box::new(|l| Some(Cell::share(l.cut?)))),
        (">added loss", Box::new(|l| Some(Cell::loss(l.added?)))),
        (">energy held", Box::new(|l| Some(Cell::share(l.captured()?)))),
        (">tokens", Box::new(|l| Some(Cell::count(l.tokens? as usize)))),
        (
            ">ridge",
            Box::new(|l| match l.action {
                Action::Routed { ridge } => Some(Cell::number(ridge, format!("{ridge:.1e}"))),
                _ => None,
            }),
        ),
        ("done", Box::new(|l| Some(Cell::text(done(l))))),
        ("adapters", Box::new(|l| Some(Cell::text(adapters(l))))),
        ("notes", Box::new(|l| (!l.notes.is_empty()).then(|| Cell::text(l.notes.join("; "))))),
    ];
    let known: Vec<_> =
        all.into_iter().filter(|(_, of)| report.layers.iter().any(|l| of(l).is_some())).collect();
    let row = |l: &LayerReport| known.iter().map(|(_, of)| of(l).unwrap_or_default()).collect();
    let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
    let text = match report.layers.iter().any(|l| l.losses.is_some()) {
        true => {
            "In the drawing, the dot is this merge, the upright line the plain sum and the ring the average; the faint line \
             stands at 1."
        }
        false => "",
    };
    Section {
        title: "Every layer".into(),
        text: text.into(),
        grids: vec![Grid {
            columns: columns(&names),
            rows: report.layers.iter().map(row).collect(),
            filter: true,
            ..Grid::default()
        }],
        ..Section::default()
    }
}
