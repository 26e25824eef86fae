//! The page of adapters as they are.

use loraweld::Adapter;
use loraweld::merge::{Overlap, Overlaps};

use super::html::{Cell, Column, Grid, Number, Page, Section, Step, percent};
use super::maps::maps;
use super::merge::{command, listed, strong};
use crate::cli::layers::range;
use crate::cli::output::{count, size};
use crate::io::atomic::len;

/// What adapters hold, and how far they are in each other's way.
pub struct Inspected<'a> {
    pub adapters: &'a [Adapter],
    /// Of each adapter, the norms of its layers; none where they were not computed.
    pub norms: Vec<Vec<f64>>,
    pub overlaps: Option<&'a Overlaps>,
    /// Who disturbs whom, in a sentence or two.
    pub disturbs: Option<String>,
    pub warnings: Vec<String>,
}

impl Inspected<'_> {
    /// The page.
    pub fn page(&self) -> Page {
        let names: Vec<_> = self.adapters.iter().map(|adapter| adapter.name().to_owned()).collect();
        let mut sections = vec![self.files()];
        sections.extend(self.overlaps.into_iter().flat_map(|found| self.overlap(found)));
        sections.extend(self.norms());
        let mut facts = vec![("loraweld".to_owned(), env!("CARGO_PKG_VERSION").to_owned())];
        let hash = |a: &Adapter| Some((a.name().to_owned(), format!("SHA-256 {}", a.file_sha256().ok()?)));
        facts.extend(self.adapters.iter().filter_map(hash));
        Page {
            title: match self.adapters {
                [one] => one.name().to_owned(),
                all => count(all.len(), "adapter"),
            },
            subject: match self.adapters {
                [one] => format!("This is what {} holds.", one.path().display()),
                _ => format!("This is what {} hold.", listed(&names)),
            },
            verdict: self.verdict(),
            numbers: self.numbers(),
            next: self.next(),
            sections,
            warnings: self.warnings.clone(),
            facts,
            command: command(),
        }
    }

    /// Layers that every adapter has.
    fn shared(&self) -> usize {
        let Some((first, others)) = self.adapters.split_first() else { return 0 };
        let has = |a: &Adapter, key| a.layers().iter().any(|layer| layer.key() == key);
        first.layers().iter().filter(|layer| others.iter().all(|a| has(a, layer.key()))).count()
    }

    fn verdict(&self) -> [String; 2] {
        if let [one] = self.adapters {
            let layers = one.layers();
            let rank = range(layers.iter().map(|layer| layer.rank()));
            let first = format!(
                "This LoRA changes {} of {} at rank {rank}, in {}.",
                count(layers.len(), "layer"),
                one.family(),
                one.dtype()
            );
            let norms = self.norms.first().map_or(&[][..], Vec::as_slice);
            let most = layers.iter().zip(norms).max_by(|x, y| x.1.total_cmp(y.1));
            let second = match most {
                Some((layer, norm)) => {
                    format!("Its update is largest in {}, whose norm is {norm:.3}.", layer.name())
                }
                None => "How large its updates are was not computed; --norms does that.".to_owned(),
            };
            return [first, second];
        }
        let first = match self.shared() {
            0 => "No layer is in every file.".to_owned(),
            n => format!("{} in every file, and a merge would join what they do there.", is_or_are(n)),
        };
        match self.disturbs.as_deref().map(|text| text.split_once(". ").unwrap_or((text, ""))) {
            Some((one, "")) => [first, one.to_owned()],
            Some((one, two)) => [format!("{one}."), two.to_owned()],
            None => {
                [first, "How far they are in each other's way was not computed; --overlap does that.".into()]
            }
        }
    }

    /// Of two adapters beside each other, in all.
    fn pairs(found: &Overlaps) -> impl Iterator<Item = (usize, usize, Overlap)> {
        let row = |(i, row): (usize, &Vec<Option<Overlap>>)| {
            let pairs = row.iter().enumerate().filter(|(j, _)| *j != i);
            pairs.filter_map(|(j, pair)| Some((i, j, (*pair)?))).collect::<Vec<_>>()
        };
        found.all.iter().enumerate().flat_map(row)
    }

    fn numbers(&self) -> Vec<Number> {
        let layers = || self.adapters.iter().flat_map(Adapter::layers);
        let mut numbers = Vec::new();
        if self.adapters.len() > 1 {
            numbers.push(Number::new(
                self.shared().to_string(),
                "layers in every file",
                format!("{} in all files together", layers().count()),
            ));
        }
        let pairs = || self.overlaps.into_iter().flat_map(Self::pairs);
        if let Some((i, j, pair)) = pairs().max_by(|x, y| x.2.disturbs.total_cmp(&y.2.disturbs)) {
            let name = |i: usize| self.adapters[i].name();
            let note = format!("{} on {}; {} by chance", name(i), name(j), percent(pair.by_chance));
            numbers.push(Number::new(percent(pair.disturbs), "largest overlap", note));
            let least = pairs().map(|(.., pair)| pair.angle).fold(90.0, f64::min);
            numbers.push(Number::new(
                format!("{least:.0}°"),
                "smallest angle",
                "0° is a direction that two adapters read",
            ));
        }
        let bytes = self.adapters.iter().map(|a| len(a.path()));
        numbers.push(Number::new(range(layers().map(|layer| layer.rank())), "rank", ""));
        numbers.push(Number::new(size(bytes.sum()), "size", ""));
        numbers.push(Number::new(layers().count().to_string(), "layers", ""));
        numbers.truncate(3);
        numbers
    }

    fn next(&self) -> Vec<Step> {
        let words: Vec<_> = self.adapters.iter().map(|a| strong(a.path(), 1.0)).collect();
        let words = words.join(" ");
        let step = |text: &str, command: String| Step { text: text.into(), command: Some(command) };
        if self.adapters.len() < 2 {
            return vec![step(
                "See how it and another adapter are in each other's way.",
                format!("loraweld inspect {words} OTHER.safetensors --overlap --report overlap.html"),
            )];
        }
        let mut steps = Vec::new();
        if self.overlaps.is_none() {
            steps.push(step(
                "See how far they are in each other's way.",
                format!("loraweld inspect {words} --overlap --report overlap.html"),
            ));
        }
        steps.push(step(
            "Add them up, which does well where overlaps are about what chance gives.",
            format!("loraweld merge linear {words} -o sum.safetensors --report sum.html"),
        ));
        steps.push(step(
            "Where they overlap, record what the layers read while each adapter is active, and merge by SSR.",
            format!("loraweld calibrate {words} --activations FOLDER … -o mine.calibration.safetensors"),
        ));
        steps
    }

    fn files(&self) -> Section {
        let row = |(adapter, norms): (&Adapter, &Vec<f64>)| {
            let bytes = len(adapter.path());
            let norm = norms.iter().map(|norm| norm * norm).sum::<f64>().sqrt();
            vec![
                Cell::text(adapter.name()),
                Cell::count(adapter.layers().len()),
                Cell::text(range(adapter.layers().iter().map(|layer| layer.rank()))),
                Cell::number(bytes as f64, size(bytes)),
                if norms.is_empty() { Cell::default() } else { Cell::loss(norm) },
                Cell::text(adapter.family().to_string()),
                Cell::text(format!("{}, {}", adapter.format(), adapter.dtype())),
                Cell::text(adapter.path().display().to_string()),
            ]
        };
        let head = ["adapter", ">layers", ">rank", ">size", ">norm", "model", "written as", "file"];
        Section {
            title: "Files".into(),
            text: String::new(),
            grids: vec![Grid {
                columns: head.map(Column::new).into(),
                rows: self.adapters.iter().zip(&self.norms).map(row).collect(),
                ..Grid::default()
            }],
            ..Section::default()
        }
    }

    fn norms(&self) -> Option<Section> {
        let all = self.norms.iter().flatten();
        let most = all.copied().reduce(f64::max)?;
        let grids = self.adapters.iter().zip(&self.norms).flat_map(|(adapter, norms)| {
            let names: Vec<String> = adapter.layers().iter().map(|layer| layer.name()).collect();
            let values: Vec<_> = names.iter().map(String::as_str).zip(norms.iter().copied()).collect();
            let mut grids = maps(&values, |norm| Cell::loss(norm).heated(most));
            for grid in &mut grids {
                grid.caption = format!("{}: {}", adapter.name(), grid.caption);
            }
            grids
        });
        Some(Section {
            title: "Norms of the updates".into(),
            text:
                "A row is a block, a column a module. The strongest colour is the largest norm of all files."
                    .into(),
            grids: grids.collect(),
            ..Section::default()
        })
    }

    fn overlap(&self, found: &Overlaps) -> [Section; 2] {
        let matrix = |caption: &str, cell: fn(&Overlap) -> Cell| {
            let head = std::iter::once("update of".to_owned())
                .chain(self.adapters.iter().map(|adapter| format!(">{}", adapter.name())));
            let row = |(i, row): (usize, &Vec<Option<Overlap>>)| {
                let cells = row.iter().enumerate().map(|(j, pair)| match pair {
                    Some(pair) if i != j => cell(pair),
                    _ => Cell::default(),
                });
                std::iter::once(Cell::text(self.adapters[i].name())).chain(cells).collect()
            };
            Grid {
                caption: caption.into(),
                columns: head.map(|name| Column::new(&name)).collect(),
                rows: found.all.iter().enumerate().map(row).collect(),
                map: true,
                ..Grid::default()
            }
        };
        let near = |angle: f64| Cell { heat: Some((1.0 - angle / 90.0).clamp(0.0, 1.0)), ..degrees(angle) };
        let whole = Section {
            title: "How far they are in each other's way".into(),
            text: "A row is the adapter whose update is measured, a column the one whose inputs it would disturb.".into(),
            grids: vec![
                matrix("Share of the update that also reads what … reads", |p| Cell::share(p.disturbs).heated(1.0)),
                matrix("What that would be by chance", |p| Cell::share(p.by_chance).heated(1.0)),
                matrix("Smallest angle between what both read", |p| {
                    Cell { heat: Some((1.0 - p.angle / 90.0).clamp(0.0, 1.0)), ..degrees(p.angle) }
                }),
                matrix("Mean squared cosine between what both write", |p| Cell::loss(p.outputs).heated(1.0)),
            ],
            ..Section::default()
        };
        let row = |layer: &loraweld::merge::LayerOverlap| {
            let pairs = layer.pairs.iter().enumerate().flat_map(|(x, row)| {
                row.iter().enumerate().filter(move |(y, _)| *y != x).map(move |(y, pair)| (x, y, pair))
            });
            let (x, y, pair) = pairs.max_by(|a, b| a.2.disturbs.total_cmp(&b.2.disturbs))?;
            let name = |of: usize| Cell::text(self.adapters[layer.adapters[of]].name());
            Some(vec![
                Cell::text(layer.layer.clone()),
                Cell::share(pair.disturbs).heated(1.0),
                Cell::share(pair.by_chance),
                near(pair.angle),
                Cell::loss(pair.inputs),
                Cell::loss(pair.outputs),
                name(x),
                name(y),
            ])
        };
        let head = [
            "layer",
            ">share",
            ">by chance",
            ">smallest angle",
            ">cos² of inputs",
            ">cos² of outputs",
            "update of",
            "on inputs of",
        ];
        let layers = Section {
            title: "Overlap of every layer".into(),
            text: "Of each layer, the two adapters that overlap most.".into(),
            grids: vec![Grid {
                columns: head.map(Column::new).into(),
                rows: found.layers.iter().filter_map(row).collect(),
                filter: true,
                ..Grid::default()
            }],
            ..Section::default()
        };
        [whole, layers]
    }
}

fn degrees(angle: f64) -> Cell {
    Cell::number(angle, format!("{angle:.1}°"))
}

fn is_or_are(layers: usize) -> String {
    format!("{} {}", count(layers, "layer"), if layers == 1 { "is" } else { "are" })
}
