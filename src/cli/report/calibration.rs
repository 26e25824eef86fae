//! The page of a calibration.

use std::path::Path;

use loraweld::{Calibration, LayerKey, Matrix};
use rayon::prelude::*;

use super::html::{Cell, Column, Grid, Number, Page, Section, Step};
use super::maps::maps;
use super::merge::{command, listed};
use crate::cli::layers::range;
use crate::cli::output::{count, quoted, size};

/// A calibration, and the file that it is from.
pub struct Recorded<'a> {
    pub calibration: &'a Calibration,
    pub file: &'a Path,
    pub bytes: u64,
    pub warnings: Vec<String>,
}

impl Recorded<'_> {
    /// The page.
    pub fn page(&self) -> anyhow::Result<Page> {
        let names: Vec<String> = self.calibration.pool().iter().map(|task| task.name.clone()).collect();
        let mut sections = vec![self.adapters()];
        sections.extend(self.alike(&names)?);
        sections.push(self.tokens(&names));
        let hash = |task: &loraweld::Task| (task.name.clone(), format!("SHA-256 of A {}", task.a_sha256));
        let mut facts = vec![("loraweld".to_owned(), env!("CARGO_PKG_VERSION").to_owned())];
        facts.extend(self.calibration.pool().iter().map(hash));
        Ok(Page {
            title: format!("What {} read", count(names.len(), "adapter")),
            subject: format!("{} was recorded of {}.", self.file.display(), listed(&names)),
            verdict: self.verdict(),
            numbers: self.numbers(),
            next: self.next(),
            sections,
            warnings: self.warnings.clone(),
            facts,
            command: command(),
        })
    }

    fn layers(&self) -> Vec<&LayerKey> {
        self.calibration.layers().collect()
    }

    /// Whether an adapter of the pool has a layer.
    fn has(&self, key: &LayerKey, task: usize) -> bool {
        self.calibration.ranks(key).get(task).is_some_and(|rank| *rank > 0)
    }

    /// Tokens of the adapters that have a layer, where it was recorded least.
    fn least(&self, key: &LayerKey) -> u64 {
        let tasks = (0..self.calibration.pool().len()).filter(|&task| self.has(key, task));
        tasks.map(|task| self.calibration.tokens(key, task)).min().unwrap_or(0)
    }

    /// Layers of which fewer tokens were recorded than the adapters have ranks.
    fn short(&self) -> usize {
        let total = |key: &LayerKey| self.calibration.ranks(key).iter().sum::<usize>() as u64;
        self.layers().iter().filter(|key| self.least(key) < total(key)).count()
    }

    fn verdict(&self) -> [String; 2] {
        let (missing, short) = (self.calibration.missing().len(), self.short());
        let first = match missing {
            0 => "Every layer was recorded while each adapter that has it was active.".to_owned(),
            n => format!(
                "Nothing was recorded of {} while an adapter that has it was active; ssr adds such layers up as they are.",
                count(n, "layer")
            ),
        };
        let second = match short {
            0 => "Each has more tokens than the adapters have ranks together, which is what a router wants."
                .to_owned(),
            n => format!(
                "{} fewer tokens than the adapters have ranks together: more prompts or steps would make merges better.",
                if n == 1 { "1 layer has".to_owned() } else { format!("{n} layers have") }
            ),
        };
        [first, second]
    }

    fn numbers(&self) -> Vec<Number> {
        let layers = self.layers();
        let neutral: u64 = layers.iter().map(|key| self.calibration.neutral_tokens(key)).sum();
        let note = match neutral {
            0 => "no neutral inputs".to_owned(),
            n => format!("and {} of neutral inputs", count(n as usize, "token")),
        };
        vec![
            Number::new(
                range(layers.iter().map(|key| self.least(key) as usize)),
                "tokens per layer and adapter",
                note,
            ),
            Number::new(
                layers.len().to_string(),
                "layers",
                format!("of {}", count(self.calibration.pool().len(), "adapter")),
            ),
            Number::new(size(self.bytes), "size", ""),
        ]
    }

    fn next(&self) -> Vec<Step> {
        let names = self.calibration.pool().iter().map(|task| format!("{}.safetensors", task.name));
        let words = names.map(|name| quoted(Path::new(&name))).collect::<Vec<_>>().join(" ");
        let file = quoted(self.file);
        let step = |text: &str, command: String| Step { text: text.into(), command: Some(command) };
        vec![
            step(
                "Merge by what was recorded.",
                format!(
                    "loraweld merge ssr {words} --calibration {file} -o merged.safetensors --report merged.html"
                ),
            ),
            step(
                "See which method loses least on it.",
                format!("loraweld compare {words} --calibration {file} --report methods.html"),
            ),
            step(
                "Find the strengths at which the plain sum loses least.",
                format!("loraweld strengths {words} --calibration {file}"),
            ),
        ]
    }

    fn adapters(&self) -> Section {
        let layers = self.layers();
        let row = |(i, task): (usize, &loraweld::Task)| {
            let own: Vec<_> = layers.iter().filter(|key| self.has(key, i)).collect();
            let tokens = own.iter().map(|key| self.calibration.tokens(key, i) as usize);
            let lacking = tokens.clone().filter(|tokens| *tokens == 0).count();
            vec![
                Cell::text(task.name.clone()),
                Cell::count(own.len()),
                Cell::text(range(own.iter().map(|key| self.calibration.ranks(key)[i]))),
                Cell::text(range(tokens)),
                Cell::count(lacking),
            ]
        };
        let head = ["adapter", ">layers", ">rank", ">tokens per layer", ">layers without any"];
        Section {
            title: "Adapters".into(),
            text: String::new(),
            grids: vec![Grid {
                columns: head.map(Column::new).into(),
                rows: self.calibration.pool().iter().enumerate().map(row).collect(),
                ..Grid::default()
            }],
            ..Section::default()
        }
    }

    /// How alike the inputs of two adapters are: the mean cosine of their Gram matrices.
    fn alike(&self, names: &[String]) -> anyhow::Result<Option<Section>> {
        let tasks = names.len();
        let of_layer = |key: &&LayerKey| -> loraweld::Result<Vec<Option<f64>>> {
            let grams: Vec<Option<Matrix>> =
                (0..tasks).map(|task| self.calibration.gram(key, task)).collect::<loraweld::Result<_>>()?;
            let dot = |x: &Matrix, y: &Matrix| x.data().iter().zip(y.data()).map(|(x, y)| x * y).sum::<f64>();
            let pair = |i: usize, j: usize| {
                let (x, y) = (grams[i].as_ref()?, grams[j].as_ref()?);
                let norms = (dot(x, x) * dot(y, y)).sqrt();
                (norms > 0.0 && norms.is_finite()).then(|| dot(x, y) / norms)
            };
            Ok((0..tasks * tasks).map(|at| pair(at / tasks, at % tasks)).collect())
        };
        let layers: Vec<Vec<Option<f64>>> =
            self.layers().par_iter().map(of_layer).collect::<loraweld::Result<_>>()?;
        let mean = |at: usize| {
            let known: Vec<f64> = layers.iter().filter_map(|pairs| pairs[at]).collect();
            (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
        };
        if tasks < 2 || (0..tasks * tasks).all(|at| mean(at).is_none()) {
            return Ok(None);
        }
        let cell = |i: usize, j: usize| match mean(i * tasks + j).filter(|_| i != j) {
            Some(cosine) => Cell::loss(cosine).heated(1.0),
            None => Cell::default(),
        };
        let row = |i: usize| {
            std::iter::once(Cell::text(names[i].clone())).chain((0..tasks).map(|j| cell(i, j))).collect()
        };
        let head = std::iter::once("inputs of".to_owned()).chain(names.iter().map(|name| format!(">{name}")));
        Ok(Some(Section {
            title: "How alike their inputs are".into(),
            text: "At 1 two adapters read the same, and no merge can tell them apart by it; near 0 each is met by inputs of its \
                   own. It is the cosine of the two Gram matrices, as the adapters see inputs, on average over layers."
                .into(),
            grids: vec![Grid {
                columns: head.map(|name| Column::new(&name)).collect(),
                rows: (0..tasks).map(row).collect(),
                map: true,
                ..Grid::default()
            }],
            ..Section::default()
        }))
    }

    fn tokens(&self, names: &[String]) -> Section {
        let layers = self.layers();
        let all = |task: usize| layers.iter().map(move |key| self.calibration.tokens(key, task));
        let most = (0..names.len()).flat_map(all).max().unwrap_or(0) as f64;
        let map = |(task, name): (usize, &String)| {
            let own = layers.iter().filter(|key| self.has(key, task));
            let values: Vec<(&str, f64)> =
                own.map(|key| (key.as_str(), self.calibration.tokens(key, task) as f64)).collect();
            let mut grids = maps(&values, |tokens| Cell::count(tokens as usize).heated(most));
            grids.iter_mut().for_each(|grid| grid.caption = format!("{name}: {}", grid.caption));
            grids
        };
        Section {
            title: "Tokens of every layer".into(),
            text: "A row is a block, a column a module. What is pale was recorded little.".into(),
            grids: names.iter().enumerate().flat_map(map).collect(),
            ..Section::default()
        }
    }
}
