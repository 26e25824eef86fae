//! What a page holds, and its templates `page.html`, `grid.html` and `plot.html`.

use anyhow::Context;
use askama::Template;

/// A report: a first screen, and sections below it.
#[derive(Template)]
#[template(path = "page.html")]
pub struct Page {
    /// What was done, in a few words.
    pub title: String,
    /// To what.
    pub subject: String,
    /// What to think of it.
    pub verdict: [String; 2],
    pub numbers: Vec<Number>,
    pub next: Vec<Step>,
    pub sections: Vec<Section>,
    pub warnings: Vec<String>,
    /// How it was made, by name.
    pub facts: Vec<(String, String)>,
    pub command: String,
}

impl Page {
    /// The file.
    pub fn text(&self) -> anyhow::Result<String> {
        self.render().context("cannot write the page")
    }

    fn style(&self) -> &'static str {
        include_str!("style.css")
    }

    fn script(&self) -> &'static str {
        include_str!("script.js")
    }
}

/// A figure of the first screen.
pub struct Number {
    pub value: String,
    pub label: String,
    pub note: String,
}

impl Number {
    pub fn new(value: impl Into<String>, label: impl Into<String>, note: impl Into<String>) -> Self {
        Self { value: value.into(), label: label.into(), note: note.into() }
    }
}

/// What to try next.
pub struct Step {
    pub text: String,
    pub command: Option<String>,
}

/// Drawings and tables under one heading.
#[derive(Default)]
pub struct Section {
    pub title: String,
    /// How to read it.
    pub text: String,
    pub plots: Vec<Plot>,
    pub grids: Vec<Grid>,
}

/// A drawing.
#[derive(Template)]
#[template(path = "plot.html")]
pub struct Plot {
    pub caption: String,
    /// What it shows, in words.
    pub note: String,
    pub svg: String,
}

/// A table.
#[derive(Template, Default)]
#[template(path = "grid.html")]
pub struct Grid {
    pub caption: String,
    pub columns: Vec<Column>,
    pub rows: Vec<Vec<Cell>>,
    /// Whether rows can be searched.
    pub filter: bool,
    /// Whether this is a map of coloured numbers, with its headings upright.
    pub map: bool,
    /// Whether its headings stand upright.
    pub upright: bool,
}

/// A heading.
pub struct Column {
    pub name: String,
    pub number: bool,
}

impl Column {
    /// A heading that starts with `>` aligns its column right.
    pub fn new(name: &str) -> Self {
        Self { name: name.trim_start_matches('>').to_owned(), number: name.starts_with('>') }
    }
}

/// One cell.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    pub text: String,
    /// What it is sorted by, if not by its text.
    pub sort: Option<f64>,
    /// How strong its colour is, 0 to 1.
    pub heat: Option<f64>,
    pub strong: bool,
    pub drawing: Option<Drawing>,
}

/// What is drawn in a cell; lengths are percentages of its width.
#[derive(Clone, Debug)]
pub enum Drawing {
    /// A bar, and a line at 1.
    Bar { length: f64, one: f64 },
    /// A dot for the merge, a line for the sum, a ring for the average, and a line at 1.
    Losses { merged: f64, sum: f64, average: f64, one: f64 },
}

impl Cell {
    pub fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::default() }
    }

    pub fn number(value: f64, text: impl Into<String>) -> Self {
        Self { sort: value.is_finite().then_some(value), ..Self::text(text) }
    }

    pub fn count(value: usize) -> Self {
        Self::number(value as f64, value.to_string())
    }

    /// A loss, an interference or another number near 1.
    pub fn loss(value: f64) -> Self {
        Self::number(value, format!("{value:.3}"))
    }

    pub fn share(value: f64) -> Self {
        Self::number(value, percent(value))
    }

    /// Coloured by where it lies between 0 and `most`.
    pub fn heated(self, most: f64) -> Self {
        let heat = self.sort.filter(|_| most > 0.0).map(|value| (value / most).clamp(0.0, 1.0));
        Self { heat, ..self }
    }

    pub fn drawn(drawing: Drawing, sort: f64) -> Self {
        Self { drawing: Some(drawing), sort: Some(sort), ..Self::default() }
    }

    /// For the template: two decimals.
    fn heat_text(&self) -> Option<String> {
        self.heat.map(|heat| format!("{heat:.2}"))
    }

    fn svg(&self) -> String {
        match self.drawing {
            None => String::new(),
            Some(Drawing::Bar { length, one }) => format!(
                r#"<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect y="1" width="{length:.1}" height="8"/><path class="base" d="M{one:.1} 0V10"/></svg>"#
            ),
            Some(Drawing::Losses { merged, sum, average, one }) => format!(
                r#"<svg class="dots" viewBox="-4 0 108 12" aria-hidden="true"><path class="base" d="M0 6H100M{one:.1} 1V11"/><path class="sum" d="M{sum:.1} 1V11"/><circle class="average" cx="{average:.1}" cy="6" r="3"/><circle class="merged" cx="{merged:.1}" cy="6" r="3.4"/></svg>"#
            ),
        }
    }
}

/// `12.3%`.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}
