//! What a merge did and what it lost, for people and for programs.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

use super::PlannedLayer;
use crate::words::count;
use crate::{Adapter, Device, Weighted};

/// What a merge gives.
#[derive(Clone, Debug)]
pub struct Merged {
    /// The merged adapter. Its metadata is what is common to the inputs, and how it was made
    /// (`loraweld.method`, `loraweld.options`, `loraweld.inputs`, `loraweld.version`).
    pub adapter: Adapter,
    /// What was done, and what it lost.
    pub report: Report,
}

/// What a merge did.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The method: `ssr`, or `ssr-data-free` if the data-free proxy stood for a calibration.
    pub method: String,
    /// Where it ran, and in which arithmetic.
    pub device: String,
    /// The adapters, in order.
    pub inputs: Vec<InputReport>,
    /// The method's options.
    pub options: serde_json::Value,
    /// Every layer, sorted by key.
    pub layers: Vec<LayerReport>,
    /// Losses of all routed layers together; `None` where nothing was measured.
    pub losses: Option<Losses>,
    /// What each adapter's own inputs lose, where losses were [measured](super::Merged::measured); else empty.
    pub tasks: Vec<TaskLosses>,
    /// Who feeds whom, where routers were solved from a calibration.
    pub routing: Option<Routing>,
    /// What the user should know about the whole merge.
    pub notes: Vec<String>,
    /// How much memory of a GPU it took; `None` on the CPU.
    pub memory: Option<DeviceMemory>,
    /// How long it took.
    pub seconds: f64,
    /// Version of this crate.
    pub version: String,
}

/// Memory of a GPU, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    /// What was held at most ([`Device::memory_peak`]).
    pub peak: u64,
    /// What there was to stay within ([`Device::memory`]).
    pub budget: u64,
}

impl DeviceMemory {
    /// Since the device's peak was reset.
    pub(super) fn of(device: &Device) -> Option<Self> {
        device.is_gpu().then(|| Self { peak: device.memory_peak(), budget: device.memory() })
    }

    /// Says so if it was exceeded, by what else the device holds.
    pub(super) fn note(self) -> Option<String> {
        (self.peak > self.budget)
            .then(|| format!("more device memory was held than the merge should stay within: {self}"))
    }
}

impl fmt::Display for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(f, "{:.1} of {:.1} MiB at most", mib(self.peak), mib(self.budget))
    }
}

/// One adapter that went in.
#[derive(Clone, Debug, Serialize)]
pub struct InputReport {
    /// [`Adapter::name`].
    pub name: String,
    /// [`Adapter::path`].
    pub path: PathBuf,
    /// SHA-256 of the file; `None` for an adapter that was made in memory.
    pub sha256: Option<String>,
    /// The strength it was merged at.
    pub strength: f64,
    /// How many layers it has.
    pub layers: usize,
}

impl InputReport {
    /// Before its hash is known.
    pub(super) fn new(Weighted { adapter, strength }: &Weighted<'_>) -> Self {
        Self {
            name: adapter.name().to_owned(),
            path: adapter.path().to_owned(),
            sha256: None,
            strength: *strength,
            layers: adapter.layers().len(),
        }
    }
}

/// What was done to one layer.
#[derive(Clone, Debug)]
pub struct LayerReport {
    /// Its name, with dots where they are known.
    pub layer: String,
    /// How it was merged, with what that tells.
    pub action: Action,
    /// Which of [`Report::inputs`] it comes from.
    pub adapters: Vec<usize>,
    /// Rank of the result.
    pub rank: usize,
    /// Share of the update's norm that was cut off, if it was truncated ([`Merged::truncated`](super::Merged::truncated)).
    pub cut: Option<f64>,
    /// What that takes away on recorded inputs, relative to what merging nothing loses, if it was truncated by them
    /// ([`Merged::truncated_by`](super::Merged::truncated_by)).
    pub added: Option<f64>,
    /// Its singular values before it was truncated, and how many are left; `None` if it was not. Truncated by recorded inputs
    /// they are those of what it does on these; of a module that the file keeps fused, those of the whole.
    pub spectrum: Option<SingularValues>,
    /// Calibration tokens that its router was solved from, or its losses measured by; `None` without a calibration.
    pub tokens: Option<u64>,
    /// Its losses; `None` if they are not known.
    pub losses: Option<Losses>,
    /// What the user should know about it.
    pub notes: Vec<String>,
}

impl LayerReport {
    /// Of a layer of which nothing is known but how it was merged.
    pub(super) fn new(planned: &PlannedLayer, action: Action) -> Self {
        Self {
            layer: planned.name.clone(),
            action,
            adapters: planned.members.clone(),
            rank: planned.rank,
            cut: None,
            added: None,
            spectrum: None,
            tokens: None,
            losses: None,
            notes: Vec::new(),
        }
    }
}

/// Singular values, of which only the largest count.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SingularValues {
    /// All of them, descending. JSON has six digits of each.
    #[serde(serialize_with = "six_digits")]
    pub values: Vec<f64>,
    /// How many of them count.
    pub kept: usize,
}

impl SingularValues {
    /// The share of `Σ σ²` that those hold which count; 1 of nothing.
    pub fn energy(&self) -> f64 {
        let largest = self.values.first().copied().unwrap_or(0.0);
        if largest == 0.0 {
            return 1.0;
        }
        // Relative to the largest, so that squares stay in range.
        let sum = |values: &[f64]| values.iter().map(|v| (v / largest).powi(2)).sum::<f64>();
        sum(&self.values[..self.kept.min(self.values.len())]) / sum(&self.values)
    }
}

fn six_digits<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
    let short = |v: &f64| format!("{v:.5e}").parse::<f64>().unwrap_or(*v);
    serializer.collect_seq(values.iter().map(short))
}

/// What projecting one adapter's `ΔW_c` off the directions V of those before it did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProjectionReport {
    /// Which of [`Report::inputs`] was projected.
    pub adapter: usize,
    /// t = μ/(1 + μ); 1 if hard.
    pub share: f64,
    /// Columns of V.
    pub directions: usize,
    /// Principal angles between the input subspace of ΔW_c and V, in degrees, ascending. Angles below 1e-3 degrees
    /// cannot be told from 0.
    pub angles: Vec<f64>,
    /// Share of `‖ΔW_c‖²` that was removed.
    pub removed: f64,
    /// Interference before: `‖ΔW_c·V‖ / ‖ΔW_c‖`.
    pub before: f64,
    /// Interference after: `‖ΔW_c'·V‖ / ‖ΔW_c‖`.
    pub after: f64,
}

/// How a layer was merged.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Through a router that was solved for.
    Routed {
        /// λ, the ridge that was used, in units of G/N.
        ridge: f64,
    },
    /// Subjects were projected off what comes before them.
    Projected {
        /// The singular values of the style's update. Those that count are the directions kept clear of the first subject.
        style: SingularValues,
        /// What each subject gave up, in order.
        projections: Vec<ProjectionReport>,
    },
    /// As the exact sum that was asked for.
    Concatenated,
    /// By the method's rule, in the core or entry by entry.
    Combined {
        /// Share of the squared norm of the merged update that its approximation holds, where the update itself has no low
        /// rank ([`EntryMerge`](super::EntryMerge)).
        captured: Option<f64>,
    },
    /// Only one adapter has it, or adds anything to it: its factors are unchanged.
    PassedThrough,
    /// Plain sum (identity router).
    Summed {
        /// Why it was not routed.
        why: String,
    },
}

impl Action {
    /// Its name in JSON: `routed`, `projected`, `concatenated`, `combined`, `passed-through`, `summed`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Routed { .. } => "routed",
            Self::Projected { .. } => "projected",
            Self::Concatenated => "concatenated",
            Self::Combined { .. } => "combined",
            Self::PassedThrough => "passed-through",
            Self::Summed { .. } => "summed",
        }
    }
}

impl LayerReport {
    /// What each subject gave up, in order, if it was projected.
    pub fn projections(&self) -> &[ProjectionReport] {
        match &self.action {
            Action::Projected { projections, .. } => projections,
            _ => &[],
        }
    }

    /// The singular values of the style, if subjects were projected off it.
    pub fn style(&self) -> Option<&SingularValues> {
        match &self.action {
            Action::Projected { style, .. } => Some(style),
            _ => None,
        }
    }

    /// Share of the squared norm of the merged update that its approximation holds, if it is one.
    pub fn captured(&self) -> Option<f64> {
        match self.action {
            Action::Combined { captured } => captured,
            _ => None,
        }
    }
}

/// In JSON, what an action tells stands beside it: only of `summed`, `why` is within.
impl Serialize for LayerReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Kind<'a> {
            kind: &'static str,
            #[serde(skip_serializing_if = "Option::is_none")]
            why: Option<&'a str>,
        }
        #[derive(Serialize)]
        struct Flat<'a> {
            layer: &'a str,
            action: Kind<'a>,
            adapters: &'a [usize],
            rank: usize,
            cut: Option<f64>,
            #[serde(skip_serializing_if = "Option::is_none")]
            added: Option<f64>,
            #[serde(skip_serializing_if = "Option::is_none")]
            spectrum: Option<&'a SingularValues>,
            #[serde(skip_serializing_if = "Option::is_none")]
            style: Option<&'a SingularValues>,
            #[serde(skip_serializing_if = "Option::is_none")]
            captured: Option<f64>,
            #[serde(skip_serializing_if = "Option::is_none")]
            tokens: Option<u64>,
            #[serde(skip_serializing_if = "Option::is_none")]
            ridge: Option<f64>,
            losses: Option<Losses>,
            #[serde(skip_serializing_if = "<[_]>::is_empty")]
            projections: &'a [ProjectionReport],
            notes: &'a [String],
        }
        let (why, ridge) = match &self.action {
            Action::Summed { why } => (Some(why.as_str()), None),
            Action::Routed { ridge } => (None, Some(*ridge)),
            _ => (None, None),
        };
        let flat = Flat {
            layer: &self.layer,
            action: Kind { kind: self.action.kind(), why },
            adapters: &self.adapters,
            rank: self.rank,
            cut: self.cut,
            added: self.added,
            spectrum: self.spectrum.as_ref(),
            style: self.style(),
            captured: self.captured(),
            tokens: self.tokens,
            ridge,
            losses: self.losses,
            projections: self.projections(),
            notes: &self.notes,
        };
        flat.serialize(serializer)
    }
}

/// Relative reconstruction errors `sqrt(L(R) / L(0))` on the calibration tokens: 0 reproduces every adapter on
/// its own inputs, 1 is as bad as merging nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Losses {
    /// Of this merge.
    pub merged: f64,
    /// Of the plain sum (R = I).
    pub sum: f64,
    /// Of the average (R = I/K).
    pub average: f64,
}

/// What a merge loses on the inputs of one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TaskLosses {
    /// Which of [`Report::inputs`] it is.
    pub adapter: usize,
    /// Its losses, relative to what it loses if nothing is merged.
    #[serde(flatten)]
    pub losses: Losses,
}

/// Who feeds whom: how strongly a router answers, through each adapter, to what each adapter reads of its own inputs.
///
/// Summed over all layers that were routed, row i, column j is `sqrt(Σ ‖B_i·R_ij·Z_j‖² / Σ ‖B_j·Z_j‖²)`, with R_ij the block of
/// the router between the ranks of i and j, and `Z_j = A_j·X_j` of the calibration's tokens. It does not depend on how a file
/// splits an update into B and A. The plain sum has 1 on the diagonal, and 0 elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Routing {
    /// Which of [`Report::inputs`] rows and columns stand for: those with tokens on which they do anything.
    pub adapters: Vec<usize>,
    /// By row, whose B writes; by column, whose inputs its own A reads. It is the router's, before anything was cut off.
    pub answers: Vec<Vec<f64>>,
}

/// Layers that the table shows.
const SHOWN: usize = 10;

impl fmt::Display for Report {
    /// A table for people: counts, the layers that lose most, the totals, the notes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} on {}: {} in {:.1} s",
            self.method,
            self.device,
            count(self.layers.len(), "layer"),
            self.seconds
        )?;
        if let Some(memory) = self.memory {
            writeln!(f, "  device memory: {memory}")?;
        }
        for input in &self.inputs {
            writeln!(f, "  {} at {}, {}", input.name, input.strength, count(input.layers, "layer"))?;
        }
        let number = |kind: &str| self.layers.iter().filter(|layer| layer.action.kind() == kind).count();
        let passed = number("passed-through");
        let mut parts: Vec<String> = ["routed", "projected", "concatenated", "combined", "summed"]
            .into_iter()
            .map(|kind| (number(kind), kind))
            .filter(|(n, _)| *n > 0)
            .map(|(n, kind)| format!("{} {kind}", count(n, "layer")))
            .collect();
        parts.push(format!("{passed} passed through (one adapter)"));
        writeln!(f, "{}", parts.join(", "))?;
        self.fmt_losses(f)?;
        self.fmt_projections(f)?;
        let mut why: BTreeMap<&str, usize> = BTreeMap::new();
        for layer in &self.layers {
            if let Action::Summed { why: reason } = &layer.action {
                *why.entry(reason).or_default() += 1;
            }
            for note in &layer.notes {
                *why.entry(note).or_default() += 1;
            }
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        for (note, layers) in why {
            writeln!(f, "note: {}: {note}", count(layers, "layer"))?;
        }
        Ok(())
    }
}

impl Report {
    /// What was removed of each subject, where it is most.
    fn fmt_projections(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut most: Vec<_> =
            self.layers.iter().flat_map(|l| l.projections().iter().map(|p| (&l.layer, p))).collect();
        if most.is_empty() {
            return Ok(());
        }
        most.sort_by(|x, y| y.1.removed.total_cmp(&x.1.removed));
        let rest = most.len().saturating_sub(SHOWN);
        most.truncate(SHOWN);
        let width = most.iter().map(|(layer, _)| layer.chars().count()).max().unwrap_or(0).max(22);
        let head = "layers that lose most";
        writeln!(f, "  {head:width$}  directions  energy removed  interference before  after")?;
        for (layer, p) in most {
            writeln!(
                f,
                "  {layer:width$}  {:>10}  {:>13.1}%  {:>19.3}  {:>5.3}",
                p.directions,
                100.0 * p.removed,
                p.before,
                p.after
            )?;
        }
        if rest > 0 {
            writeln!(f, "  ... and {rest} more")?;
        }
        Ok(())
    }

    fn fmt_losses(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(total) = self.losses else { return Ok(()) };
        let mut worst: Vec<_> = self.layers.iter().filter_map(|l| Some((l, l.losses?))).collect();
        worst.sort_by(|x, y| y.1.merged.total_cmp(&x.1.merged));
        let rest = worst.len().saturating_sub(SHOWN);
        worst.truncate(SHOWN);
        let first = if rest > 0 { "layers that lose most" } else { "layer" };
        let width = worst.iter().map(|(layer, _)| layer.layer.chars().count()).max().unwrap_or(0).max(22);
        let mut row = |name: &str, rank: &str, tokens: &str, losses: [String; 3]| {
            let [merged, sum, average] = losses;
            let line =
                format!("  {name:width$}  {rank:>5}  {tokens:>8}  {merged:>7}  {sum:>7}  {average:>7}");
            writeln!(f, "{}", line.trim_end())
        };
        let numbers = |l: Losses| [l.merged, l.sum, l.average].map(|v| format!("{v:.3}"));
        row("relative loss", "", "", Default::default())?;
        row(first, "rank", "tokens", ["merged", "sum", "average"].map(str::to_owned))?;
        for (layer, losses) in &worst {
            row(
                &layer.layer,
                &layer.rank.to_string(),
                &layer.tokens.unwrap_or(0).to_string(),
                numbers(*losses),
            )?;
        }
        if rest > 0 {
            row(&format!("... and {rest} more"), "", "", Default::default())?;
        }
        row("all routed layers", "", "", numbers(total))
    }
}
