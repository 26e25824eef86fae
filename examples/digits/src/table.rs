//! What is measured of each method, and how it is printed.

use std::fmt::Write as _;

use serde::Serialize;

use crate::data::CONCEPTS;

/// How much is measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Effort {
    /// Steps of the sampler.
    pub steps: usize,
    /// Samples of class 2, and of each of the nine others.
    pub samples: [usize; 2],
    /// Samples of each concept's class.
    pub concept_samples: usize,
    /// Real images of each class, and times of each, that losses are measured on.
    pub losses: [usize; 2],
}

impl Effort {
    /// What the README shows.
    pub const FULL: Self = Self { steps: 25, samples: [48, 5], concept_samples: 10, losses: [36, 16] };
    /// Enough to see that everything runs.
    pub const QUICK: Self = Self { steps: 4, samples: [2, 1], concept_samples: 1, losses: [2, 2] };
}

/// A method on the heart and the shaded style.
#[derive(Clone, Debug, Serialize)]
pub struct PairRow {
    /// Its name.
    pub method: String,
    /// Share of the samples of class 2 that are hearts.
    pub subject: f64,
    /// … in the shaded style.
    pub style: f64,
    /// … both.
    pub both: f64,
    /// Share of the samples of other classes in the shaded style.
    pub style_of_others: f64,
    /// … that are the digit that they should be.
    pub digits_kept: f64,
    /// How far the samples of class 2 are from references of the style and of the subject: `1 − cos` of their features,
    /// what refinement lowers.
    pub distances: [f64; 2],
    /// Denoising loss on shaded hearts.
    pub loss_subject: f64,
    /// … on other digits, shaded.
    pub loss_others: f64,
}

/// A method on the four concepts.
#[derive(Clone, Debug, Serialize)]
pub struct ConceptRow {
    /// Its name.
    pub method: String,
    /// Denoising loss on each concept's images.
    pub losses: Vec<f64>,
    /// Of what each adapter alone gains over the base, the share that is left.
    pub retention: Vec<f64>,
    /// Its mean.
    pub mean_retention: f64,
    /// Share of the samples that show their concept.
    pub shown: f64,
    /// Denoising loss on digits that no concept is about.
    pub loss_others: f64,
}

/// Rows of samples for a picture.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Of each column.
    pub columns: Vec<String>,
    /// A method's name, and its images.
    pub rows: Vec<(String, Vec<Vec<f32>>)>,
}

/// Everything that a run gives.
#[derive(Debug, Serialize)]
pub struct Results {
    /// Where it ran.
    pub device: String,
    /// How much was measured.
    pub effort: Effort,
    /// content_heart and style_shade.
    pub pair: Vec<PairRow>,
    /// The four concepts.
    pub concepts: Vec<ConceptRow>,
    /// Seconds that it took.
    pub seconds: f64,
    /// Samples of the pair and of the concepts.
    #[serde(skip)]
    pub pictures: [Rows; 2],
}

/// `(L_base − L) / (L_base − L_k)` of each concept k; the first row is the base, the next are the adapters alone.
pub fn retain(table: &mut [ConceptRow]) {
    let base: Vec<f64> = table[0].losses.clone();
    let alone: Vec<f64> = (0..CONCEPTS.len()).map(|k| table[1 + k].losses[k]).collect();
    for row in table {
        let of = |k: usize| (base[k] - row.losses[k]) / (base[k] - alone[k]);
        row.retention = (0..CONCEPTS.len()).map(of).collect();
        row.mean_retention = row.retention.iter().sum::<f64>() / row.retention.len() as f64;
    }
}

impl Results {
    /// The tables as Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::from(
            "| content_heart + style_shade | heart | shade | both | others: shade | others: digit kept | \
             distance to style / subject | loss, shaded hearts | loss, shaded others |\n\
             |---|---|---|---|---|---|---|---|---|\n",
        );
        for r in &self.pair {
            let shares = [r.subject, r.style, r.both, r.style_of_others, r.digits_kept];
            let shares = shares.map(|share| format!("{share:.2}")).join(" | ");
            let [style, subject] = r.distances;
            let _ = writeln!(
                text,
                "| {} | {shares} | {style:.3} / {subject:.3} | {:.3} | {:.3} |",
                r.method, r.loss_subject, r.loss_others
            );
        }
        text.push_str(
            "\n| four concepts | retention: mirror / rot90 / thick / invert | mean retention | concept shown | loss, \
             other digits |\n|---|---|---|---|---|\n",
        );
        for r in &self.concepts {
            let retention: Vec<String> = r.retention.iter().map(|share| format!("{share:+.2}")).collect();
            let (retention, mean) = (retention.join(" / "), r.mean_retention);
            let _ = writeln!(
                text,
                "| {} | {retention} | {mean:+.3} | {:.2} | {:.3} |",
                r.method, r.shown, r.loss_others
            );
        }
        text
    }
}
