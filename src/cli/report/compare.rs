//! The page of methods side by side.

use std::path::Path;

use loraweld::merge::Report;

use super::html::{Cell, Column, Grid, Number, Page, Section, Step};
use super::maps::maps;
use super::merge::{bar, command, judged, listed, options, strong, worst};
use crate::cli::output::{count, quoted, size};

/// What methods lose on one calibration.
pub struct Comparison<'a> {
    pub entries: &'a [Entry],
    pub calibration: &'a Path,
    pub device: String,
    /// The rank that results were truncated to.
    pub rank: Option<usize>,
    pub warnings: Vec<String>,
}

/// One method.
pub struct Entry {
    pub method: &'static str,
    pub report: Report,
    /// Of the result, in words.
    pub rank: String,
    pub bytes: u64,
    pub seconds: f64,
}

impl Entry {
    fn loss(&self) -> Option<f64> {
        self.report.losses.map(|l| l.merged)
    }
}

impl Comparison<'_> {
    /// The page.
    pub fn page(&self) -> Page {
        let mut ranked: Vec<&Entry> = self.entries.iter().filter(|entry| entry.loss().is_some()).collect();
        ranked.sort_by(|x, y| x.loss().unwrap_or(f64::NAN).total_cmp(&y.loss().unwrap_or(f64::NAN)));
        let inputs = self.entries.first().map_or(&[][..], |entry| &entry.report.inputs);
        let names: Vec<_> = inputs.iter().map(|input| input.name.clone()).collect();
        let mut sections = vec![self.methods()];
        sections.extend(self.layers());
        sections.extend(ranked.first().and_then(|best| map(best)));
        sections.push(self.settings());
        Page {
            title: format!("{} compared", count(self.entries.len(), "method")),
            subject: format!(
                "{}, by what {} tells of their inputs.",
                listed(&names),
                self.calibration.display()
            ),
            verdict: verdict(&ranked),
            numbers: numbers(&ranked),
            next: self.next(&ranked),
            sections,
            warnings: self.warnings.clone(),
            facts: self.facts(),
            command: command(),
        }
    }

    fn next(&self, ranked: &[&Entry]) -> Vec<Step> {
        let mut steps = Vec::new();
        if let Some(best) = ranked.first() {
            let words: Vec<_> = best.report.inputs.iter().map(|i| strong(&i.path, i.strength)).collect();
            let mut adapters = match (best.method, words.as_slice()) {
                (name, [style, subjects @ ..]) if name.starts_with("np-lora") => {
                    let subjects = subjects.iter().map(|subject| format!(" --subject {subject}"));
                    let hard = if name == "np-lora-hard" { " --hard" } else { "" };
                    format!("np-lora --style {style}{}{hard}", subjects.collect::<String>())
                }
                (name, words) => {
                    let (name, option) = spelled(name);
                    format!("{name} {}{option}", words.join(" "))
                }
            };
            if let Some(rank) = self.rank.or_else(|| best.rank.parse().ok().filter(|_| best.method == "svd"))
            {
                adapters += &format!(" --rank {rank}");
            }
            if best.method != "ssr-data-free" {
                adapters += &format!(" --calibration {}", quoted(self.calibration));
            }
            steps.push(Step {
                text: format!(
                    "Merge by {}, which loses least, and look at what each layer does.",
                    best.method
                ),
                // The average is `linear` at strengths that the user sets.
                command: (best.method != "average")
                    .then(|| format!("loraweld merge {adapters} -o merged.safetensors --report merged.html")),
            });
        }
        if let [best, second, ..] = ranked
            && let (Some(x), Some(y)) = (best.loss(), second.loss())
            && y < 1.1 * x
        {
            steps.push(Step {
                text: format!(
                    "{} is within a tenth of it: make images with both before you choose.",
                    second.method
                ),
                command: None,
            });
        }
        steps.push(Step {
            text: "Look at images as well: the loss counts recorded inputs alone, each method ran with its default options, \
                   and a longer recording may change the order."
                .into(),
            command: None,
        });
        steps
    }

    fn methods(&self) -> Section {
        let totals = self.entries.iter().find_map(|entry| entry.report.losses);
        let losses = self.entries.iter().filter_map(Entry::loss);
        let most = losses.chain(totals.iter().flat_map(|l| [l.sum, l.average])).fold(0.0, f64::max);
        let least = self.entries.iter().filter_map(Entry::loss).fold(f64::INFINITY, f64::min);
        let row = |entry: &Entry| {
            let loss = entry.loss();
            let worst = worst(&entry.report);
            let cell = loss.map_or_else(Cell::default, Cell::loss);
            vec![
                Cell::text(entry.method),
                Cell { strong: loss == Some(least), ..cell },
                loss.map_or_else(Cell::default, |loss| bar(loss, most)),
                worst.map_or_else(Cell::default, |(_, loss)| Cell::loss(loss)),
                Cell::text(worst.map_or("", |(layer, _)| layer)),
                Cell::text(entry.rank.clone()),
                Cell::number(entry.bytes as f64, size(entry.bytes)),
                Cell::number(entry.seconds, format!("{:.2}", entry.seconds)),
            ]
        };
        let head = ["method", ">loss", "", ">worst layer", "where", ">rank", ">size", ">seconds"];
        let beside = totals.map_or_else(String::new, |l| {
            format!(
                " Beside them, the plain sum loses {:.3} and the average {:.3} on the layers that the first method \
                 measures.",
                l.sum, l.average
            )
        });
        Section {
            title: "Methods side by side".into(),
            text: format!("The line across the bars stands at 1, which is as bad as no adapter.{beside}"),
            grids: vec![Grid {
                columns: head.map(Column::new).into(),
                rows: self.entries.iter().map(row).collect(),
                ..Grid::default()
            }],
            ..Section::default()
        }
    }

    /// Layers × methods.
    fn layers(&self) -> Option<Section> {
        let first = &self.entries.first()?.report;
        let of = |entry: &Entry, layer: &str| {
            let layers = &entry.report.layers;
            let place = layers.binary_search_by(|l| l.layer.as_str().cmp(layer)).ok();
            // Layers are sorted by key, which names need not follow.
            let found = place.map(|i| &layers[i]).or_else(|| layers.iter().find(|l| l.layer == layer));
            found.and_then(|l| l.losses).map(|l| l.merged)
        };
        let row = |layer: &str| {
            let losses: Vec<_> = self.entries.iter().map(|entry| of(entry, layer)).collect();
            let least = losses.iter().flatten().copied().fold(f64::INFINITY, f64::min);
            let cell = |loss: Option<f64>| match loss {
                Some(loss) => Cell { strong: loss == least, ..Cell::loss(loss).heated(1.0) },
                None => Cell::default(),
            };
            std::iter::once(Cell::text(layer)).chain(losses.into_iter().map(cell)).collect::<Vec<_>>()
        };
        let columns = std::iter::once("layer".to_owned())
            .chain(self.entries.iter().map(|entry| format!(">{}", entry.method)));
        Some(Section {
            title: "Every layer by every method".into(),
            text: "Loss of each layer; the least of a row is bold. Stronger colour is more loss, and the strongest is 1 or \
                   more."
                .into(),
            grids: vec![Grid {
                columns: columns.map(|name| Column::new(&name)).collect(),
                rows: first.layers.iter().map(|l| row(&l.layer)).collect(),
                filter: true,
                upright: true,
                ..Grid::default()
            }],
            ..Section::default()
        })
    }

    /// What each method was told.
    fn settings(&self) -> Section {
        let row = |entry: &Entry| {
            let all = options(&entry.report.options).into_iter();
            let all = all.map(|(name, value)| format!("{} {value}", name.trim_start_matches("option ")));
            let notes = Cell::text(entry.report.notes.join("; "));
            vec![Cell::text(entry.method), Cell::text(all.collect::<Vec<_>>().join(", ")), notes]
        };
        Section {
            title: "Options of each method, and notes".into(),
            text: String::new(),
            grids: vec![Grid {
                columns: ["method", "options", "notes"].map(Column::new).into(),
                rows: self.entries.iter().map(row).collect(),
                ..Grid::default()
            }],
            ..Section::default()
        }
    }

    fn facts(&self) -> Vec<(String, String)> {
        let inputs = self.entries.first().map_or(&[][..], |entry| &entry.report.inputs);
        let hash = |hash: &Option<String>| hash.as_ref().map_or(String::new(), |h| format!(", SHA-256 {h}"));
        let mut facts: Vec<_> = inputs
            .iter()
            .map(|i| (i.name.clone(), format!("{} at {}{}", i.path.display(), i.strength, hash(&i.sha256))))
            .collect();
        facts.push(("calibration".into(), self.calibration.display().to_string()));
        facts.push(("device".into(), self.device.clone()));
        facts.push(("loraweld".into(), env!("CARGO_PKG_VERSION").into()));
        facts
    }
}

/// A variant as the command line has it: a method and an option of it.
fn spelled(name: &str) -> (&str, String) {
    match name.rsplit_once('-') {
        Some((name, whose @ ("paper" | "peft"))) => (name, format!(" --as {whose}")),
        Some(("ssr", "fair")) => ("ssr", " --balance fair".into()),
        _ if name == "ssr-data-free" => ("ssr", " --calibration none".into()),
        _ => (name, String::new()),
    }
}

fn verdict(ranked: &[&Entry]) -> [String; 2] {
    let Some(best) = ranked.first() else {
        return ["No method's loss could be measured.".into(), "The warnings tell why.".into()];
    };
    let first = judged(best.loss().unwrap_or(f64::NAN), &format!("{} loses least and", best.method));
    let second = match ranked {
        [_, second, .., last] => format!(
            "{} follows with {:.3}, and {} loses most, with {:.3}.",
            second.method,
            second.loss().unwrap_or(f64::NAN),
            last.method,
            last.loss().unwrap_or(f64::NAN)
        ),
        [_, second] => format!("{} loses {:.3}.", second.method, second.loss().unwrap_or(f64::NAN)),
        _ => "No other method was measured.".into(),
    };
    [first, second]
}

fn numbers(ranked: &[&Entry]) -> Vec<Number> {
    let Some((best, losses)) = ranked.first().and_then(|best| Some((best, best.report.losses?))) else {
        return Vec::new();
    };
    let mut numbers = vec![
        Number::new(
            format!("{:.3}", losses.merged),
            format!("loss of {}", best.method),
            "0 is perfect, 1 is no adapter at all",
        ),
        Number::new(
            format!("{:.3}", losses.sum),
            "loss of the plain sum",
            format!("the average loses {:.3}", losses.average),
        ),
    ];
    if let Some((layer, loss)) = worst(&best.report) {
        numbers.push(Number::new(format!("{loss:.3}"), format!("worst layer of {}", best.method), layer));
    }
    numbers
}

/// Where the best method loses.
fn map(best: &Entry) -> Option<Section> {
    let losses: Vec<_> =
        best.report.layers.iter().filter_map(|l| Some((l.layer.as_str(), l.losses?.merged))).collect();
    (!losses.is_empty()).then(|| Section {
        title: format!("Where {} loses", best.method),
        text: "A row is a block, a column a module.".into(),
        grids: maps(&losses, |v| Cell { text: format!("{v:.2}"), ..Cell::loss(v).heated(1.0) }),
        ..Section::default()
    })
}
