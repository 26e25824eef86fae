//! Schedules: which adapter acts at which layer and step, computed from the adapters alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Choice, Selection};
use crate::adapter::{dotted, write_atomic};
use crate::io::disk;
use crate::words::count;
use crate::{Adapter, Control, Error, Layer, LayerKey, Matrix, Result, Weighted};

const KIND: &str = "loraweld.schedule";
const VERSION: u32 = 1;

/// Which adapter acts at which layer and step.
///
/// Steps count from 0; step i of n is at `t = i/n`. An adapter acts on a layer while t is in one of its windows, and
/// windows do not depend on n, so that one schedule serves any number of steps. As a file it is JSON:
///
/// ```json
/// {
///   "kind": "loraweld.schedule",
///   "version": 1,
///   "method": "k-lora",
///   "options": { "alpha": 1.5, "beta": 0.5, "gamma": 0.93, "balance": "sums", "wrap": false },
///   "adapters": [
///     { "role": "subject", "name": "cat", "sha256": "of its A factors", "strength": 1.0 },
///     { "role": "style", "name": "ink", "sha256": "of its A factors", "strength": 1.0 }
///   ],
///   "layers": {
///     "transformer_blocks.0.attn.to_q": {
///       "scores": [812.4, 640.1],
///       "windows": [{ "adapter": 0, "from": 0.0, "until": 0.61 }, { "adapter": 1, "from": 0.61, "until": 1.0 }]
///     }
///   }
/// }
/// ```
///
/// `from` is inside a window, `until` is not. `scores` are what the method compared; [`craft`] compares nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// `k-lora`, `est` or `craft`.
    pub method: String,
    /// The method's options, and what it derived for the whole file.
    pub options: serde_json::Value,
    /// The adapters, in the order that windows number them.
    pub adapters: Vec<ScheduleAdapter>,
    /// The layers that any of them has.
    pub layers: BTreeMap<LayerKey, ScheduledLayer>,
}

/// An adapter of a [`Schedule`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleAdapter {
    /// `subject` or `style`.
    pub role: String,
    /// [`Adapter::name`].
    pub name: String,
    /// [`Adapter::a_sha256`].
    pub sha256: String,
    /// The strength that scores were computed with.
    pub strength: f64,
}

/// A layer of a [`Schedule`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduledLayer {
    /// Its name, with dots if an adapter spells them.
    #[serde(skip)]
    pub name: String,
    /// What was compared, for each adapter.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f64>,
    /// When adapters act.
    pub windows: Vec<Window>,
}

/// When an adapter acts: while `from <= t < until`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Place in [`Schedule::adapters`].
    pub adapter: usize,
    /// First t.
    pub from: f64,
    /// First t after it.
    pub until: f64,
}

#[derive(Serialize, Deserialize)]
struct File {
    kind: String,
    version: u32,
    method: String,
    options: serde_json::Value,
    adapters: Vec<ScheduleAdapter>,
    layers: BTreeMap<String, ScheduledLayer>,
}

impl Schedule {
    /// The weight of each adapter on a layer (any spelling) at a step: 1 while it acts, else 0. `None` if no adapter has
    /// the layer.
    pub fn weights(&self, layer: &str, step: usize, steps: usize) -> Option<Vec<f32>> {
        let (_, layer) = LayerKey::find(layer, &self.layers)?;
        let t = step as f64 / steps.max(1) as f64;
        let mut weights = vec![0.0; self.adapters.len()];
        for window in layer.windows.iter().filter(|w| w.from <= t && t < w.until) {
            weights[window.adapter] = 1.0;
        }
        Some(weights)
    }

    /// The same for [`Selector::encode`](super::Selector::encode), whose adapters are those of the schedule, in order.
    pub fn selection(&self, layer: &str, step: usize, steps: usize) -> Option<Selection> {
        let choice = Choice::Fixed(self.weights(layer, step, steps)?);
        Some(Selection { choice, ..Default::default() })
    }

    /// Refuses adapters other than those that the schedule was computed for, by their A factors.
    pub fn check(&self, adapters: &[&Adapter]) -> Result<()> {
        if adapters.len() != self.adapters.len() {
            return Err(Error::Invalid(format!(
                "the schedule is of {}, not of {}",
                count(self.adapters.len(), "adapter"),
                adapters.len()
            )));
        }
        for (own, given) in self.adapters.iter().zip(adapters) {
            if own.sha256 != given.a_sha256() {
                let path = given.path();
                let reason =
                    format!("is not `{}`, for which the schedule was computed as its {}", own.name, own.role);
                return Err(Error::file(path, reason));
            }
        }
        Ok(())
    }

    /// Reads a file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = disk::read_to_string(path).map_err(|e| Error::io(path, "read the schedule", e))?;
        let bad = |reason: String| Error::file(path, reason);
        let file: File = serde_json::from_str(&text).map_err(|e| bad(format!("is no schedule: {e}")))?;
        if file.kind != KIND || file.version != VERSION {
            return Err(bad(format!(
                "is `{}` version {}, but `{KIND}` version {VERSION} was expected",
                file.kind, file.version
            )));
        }
        let mut layers = BTreeMap::new();
        for (name, layer) in file.layers {
            for window in &layer.windows {
                if window.adapter >= file.adapters.len() || window.from > window.until {
                    return Err(bad(format!(
                        "layer `{name}`: its windows must name one of the adapters, and start before they end"
                    )));
                }
            }
            let key = LayerKey::parse(&name);
            if layers.insert(key, ScheduledLayer { name: name.clone(), ..layer }).is_some() {
                return Err(bad(format!("layer `{name}` comes twice, in two spellings")));
            }
        }
        Ok(Self { method: file.method, options: file.options, adapters: file.adapters, layers })
    }

    /// Writes a file, whole or not at all; an existing one only with `overwrite`, one of `protect` never.
    pub fn save(&self, path: impl AsRef<Path>, overwrite: bool, protect: &[PathBuf]) -> Result<()> {
        let file = File {
            kind: KIND.to_owned(),
            version: VERSION,
            method: self.method.clone(),
            options: self.options.clone(),
            adapters: self.adapters.clone(),
            layers: self.layers.values().map(|layer| (layer.name.clone(), layer.clone())).collect(),
        };
        write_atomic(path.as_ref(), overwrite, protect, |out| {
            serde_json::to_writer_pretty(&mut *out, &file)?;
            out.write_all(b"\n")
        })
    }
}

/// Options of [`k_lora`]; the defaults are the paper's. Those of the authors' code are [`authors`](Self::authors).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct KLoraOptions {
    /// How fast the style's score grows over the run.
    pub alpha: f64,
    /// The factor of the style's score at its start.
    pub beta: f64,
    /// The factor that balances the two; `None`: what [`balance`](Self::balance) says.
    pub gamma: Option<f64>,
    /// How γ is found.
    pub balance: Balance,
    /// The factor of the style's score is `(α·t + β) mod α`, as the authors' layers have it by default: once it reaches α
    /// it starts again at zero, and the subject with it. Off by default, as in the paper.
    pub wrap: bool,
}

/// How [`k_lora`] finds the factor γ that balances the two adapters, of the layers that both have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// `Σ|ΔW_c| / Σ|ΔW_s|` over all entries of all layers: the default, and the paper's. A layer counts by its size.
    #[default]
    Sums,
    /// The mean over layers of `Σ|ΔW_c| / Σ|ΔW_s|`, without those of three times the mean or more: the authors' code's.
    /// Layers whose style is zero are left out.
    Ratios,
}

impl Default for KLoraOptions {
    fn default() -> Self {
        Self { alpha: 1.5, beta: 0.5, gamma: None, balance: Balance::default(), wrap: false }
    }
}

impl KLoraOptions {
    /// As the authors' scripts run by default, which is their pattern `s*`: β is 0.85·α, so that the factor starts again
    /// at 0.15 of the run. Their other pattern has the default's α and β, and does not wrap.
    pub fn authors() -> Self {
        let alpha = 1.5;
        Self { alpha, beta: 0.85 * alpha, gamma: None, balance: Balance::Ratios, wrap: true }
    }
}

/// Options of [`est`], as published.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct EstOptions {
    /// How fast the style's energy counts more over the run.
    pub alpha: f64,
    /// What is taken off its factor of 1 at the start; the paper measures it on probe images by a formula that is not
    /// public.
    pub delta: f64,
}

impl Default for EstOptions {
    fn default() -> Self {
        Self { alpha: 1.5, delta: 0.5 }
    }
}

/// K-LoRA (arXiv 2502.18461): the subject acts while its largest entries outweigh the style's.
///
/// On each layer `S = Σ top-K |ΔW|`, K = r_c·r_s, and the subject acts iff `S_c ≥ γ·S_s·(α·t + β)`: it gives way to the
/// style once at most, unless that factor [wraps](KLoraOptions::wrap). ΔW, with scale and strength, is made tile by tile
/// in f64, never as a whole. Layers of one adapter are that one's.
///
/// # Errors
/// [`Error::Invalid`] for options out of range, among them an α of 0 that is to wrap; [`Error::Layer`] if the adapters disagree on a layer's widths;
/// [`Error::Tensor`] for NaN or infinity; [`Error::Cancelled`].
pub fn k_lora(
    subject: Weighted<'_>,
    style: Weighted<'_>,
    options: &KLoraOptions,
    control: Control<'_>,
) -> Result<Schedule> {
    check_alpha(options.alpha, options.beta)?;
    if options.wrap && options.alpha == 0.0 {
        return Err(Error::Invalid("alpha is 0; it must be above 0 for the factor to wrap there".into()));
    }
    let layers = pairs(subject, style)?;
    let mut sums = Vec::with_capacity(layers.len());
    for (i, (key, pair)) in layers.iter().enumerate() {
        control.step("schedule", key.as_str(), i, layers.len())?;
        sums.push(match pair {
            [Some(c), Some(s)] => {
                let top = c.layer.rank * s.layer.rank;
                Some([magnitudes(c, top), magnitudes(s, top)])
            }
            _ => None,
        });
    }
    control.finish("schedule", layers.len());
    let all: Vec<[f64; 2]> = sums.iter().flatten().map(|pair| pair.map(|m: Magnitudes| m.all)).collect();
    let gamma = match options.gamma {
        Some(gamma) if gamma > 0.0 && gamma.is_finite() => gamma,
        Some(gamma) => {
            return Err(Error::Invalid(format!("gamma is {gamma}; it must be above 0 and finite")));
        }
        // Without entries on one side there is nothing to balance.
        None => options.balance.gamma(&all).filter(|gamma| *gamma > 0.0).unwrap_or(1.0),
    };
    let scores = sums.iter().map(|pair| pair.map(|[c, s]| [c.top, s.top]));
    let KLoraOptions { alpha, beta, wrap, .. } = *options;
    let scheduled = scheduled(&layers, scores.collect(), |[c, s]| match wrap {
        true => wrapped(c, gamma * s, alpha, beta),
        false => vec![(0.0, until(c, gamma * s, alpha, beta), 1.0)],
    });
    let options = KLoraOptions { gamma: Some(gamma), ..*options };
    schedule("k-lora", &options, subject, style, scheduled)
}

/// EST-LoRA (arXiv 2508.02165): the subject acts while its energy outweighs the style's.
///
/// On each layer `E = ‖ΔW‖_F² = Σ (BᵀB) ⊙ (A·Aᵀ)`, in factor space, and the subject acts while
/// `E_c ≥ (α·t + 1 − δ)·E_s`. Layers of one adapter are that one's.
///
/// # Errors
/// As [`k_lora`].
pub fn est(subject: Weighted<'_>, style: Weighted<'_>, options: &EstOptions) -> Result<Schedule> {
    check_alpha(options.alpha, 1.0 - options.delta)?;
    let layers = pairs(subject, style)?;
    let scores = layers
        .par_iter()
        .map(|(_, pair)| match pair {
            [Some(c), Some(s)] => Some([energy(c), energy(s)]),
            _ => None,
        })
        .collect();
    let scheduled = scheduled(&layers, scores, |[c, s]| {
        vec![(0.0, until(c, s, options.alpha, 1.0 - options.delta), 1.0)]
    });
    schedule("est", options, subject, style, scheduled)
}

/// CRAFT-LoRA (arXiv 2602.18936), its training-free part: the subject acts in the first `subject_until` of the run, the
/// style from `style_from` on, in between both; published as steps 1–35 and 15–50 of 50, 0.7 and 0.28.
///
/// # Errors
/// [`Error::Invalid`] if a share is not in [0, 1]; [`Error::Layer`] if the adapters disagree on a layer's widths.
pub fn craft(
    subject: Weighted<'_>,
    style: Weighted<'_>,
    subject_until: f64,
    style_from: f64,
) -> Result<Schedule> {
    for share in [subject_until, style_from] {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::Invalid(format!("a share of the run must be in 0 to 1, not {share}")));
        }
    }
    let window = |adapter, from, until| Window { adapter, from, until };
    let layers = pairs(subject, style)?
        .into_iter()
        .map(|(key, pair)| {
            let windows = [(&pair[0], window(0, 0.0, subject_until)), (&pair[1], window(1, style_from, 1.0))];
            let windows = windows.into_iter().filter(|(layer, _)| layer.is_some()).map(|(_, w)| w).collect();
            (key.clone(), ScheduledLayer { name: name(&pair), scores: Vec::new(), windows })
        })
        .collect();
    let options = serde_json::json!({ "subject_until": subject_until, "style_from": style_from });
    schedule("craft", &options, subject, style, layers)
}

/// A layer at its scale and strength.
#[derive(Clone, Copy)]
struct Scaled<'a> {
    layer: &'a Layer,
    scale: f64,
}

type Pair<'a> = [Option<Scaled<'a>>; 2];

fn pairs<'a>(subject: Weighted<'a>, style: Weighted<'a>) -> Result<Vec<(&'a LayerKey, Pair<'a>)>> {
    let mut layers: BTreeMap<&LayerKey, Pair<'_>> = BTreeMap::new();
    for (k, weighted) in [subject, style].into_iter().enumerate() {
        weighted.adapter.check_finite()?;
        for layer in weighted.adapter.layers() {
            let scale = layer.scale.value * weighted.strength;
            if !scale.is_finite() {
                return Err(Error::layer(layer.name(), format!("its scale is {scale}; it must be finite")));
            }
            layers.entry(&layer.key).or_default()[k] = Some(Scaled { layer, scale });
        }
    }
    for pair in layers.values() {
        if let [Some(c), Some(s)] = pair
            && (c.layer.input, c.layer.output) != (s.layer.input, s.layer.output)
        {
            return Err(Error::layer(
                c.layer.name(),
                format!(
                    "the subject changes {} inputs into {} outputs, but the style {} into {}; adapters must be for one \
                     base model",
                    c.layer.input, c.layer.output, s.layer.input, s.layer.output
                ),
            ));
        }
    }
    Ok(layers.into_iter().collect())
}

fn name(pair: &Pair<'_>) -> String {
    let layers = || pair.iter().flatten().map(|scaled| scaled.layer);
    dotted(layers()).or(layers().next()).map(Layer::name).unwrap_or_default()
}

/// The first t at which `subject ≥ style·(α·t + β)` no longer holds, for α ≥ 0; 1 if it always does.
fn until(subject: f64, style: f64, alpha: f64, beta: f64) -> f64 {
    if subject >= style * (alpha + beta) {
        return 1.0;
    }
    if subject < style * beta {
        return 0.0;
    }
    // The bound itself is still the subject's.
    ((subject / style - beta) / alpha).next_up().clamp(0.0, 1.0)
}

impl Balance {
    /// γ of the sums over both adapters of each layer; `None` if there is nothing to divide by.
    fn gamma(self, sums: &[[f64; 2]]) -> Option<f64> {
        let mean = |of: &[f64]| (!of.is_empty()).then(|| of.iter().sum::<f64>() / of.len() as f64);
        match self {
            Self::Sums => {
                let total = |k: usize| sums.iter().map(|pair| pair[k]).sum::<f64>();
                (total(1) > 0.0).then(|| total(0) / total(1))
            }
            Self::Ratios => {
                let ratios: Vec<f64> = sums.iter().filter(|[_, s]| *s > 0.0).map(|[c, s]| c / s).collect();
                let limit = 3.0 * mean(&ratios)?;
                // Where all ratios are zero, so is the limit, and none is below it.
                mean(&ratios.into_iter().filter(|ratio| *ratio < limit).collect::<Vec<_>>())
            }
        }
    }
}

/// Where the factor `(α·t + β) mod α` starts again, the run is cut: of each part its start, the first t at which
/// `subject ≥ style·factor` no longer holds, and its end.
fn wrapped(subject: f64, style: f64, alpha: f64, beta: f64) -> Vec<(f64, f64, f64)> {
    let first = (beta / alpha).floor();
    let start = |k: f64| ((k * alpha - beta) / alpha).clamp(0.0, 1.0);
    let part = |k: f64| {
        let (from, end) = (start(k), start(k + 1.0));
        (from, until(subject, style, alpha, beta - k * alpha).clamp(from, end), end)
    };
    // α·t + β grows by α over the run, so it passes a multiple of α once.
    [first, first + 1.0].map(part).into_iter().filter(|(from, _, end)| from < end).collect()
}

fn check_alpha(alpha: f64, start: f64) -> Result<()> {
    match alpha >= 0.0 && (alpha + start).is_finite() {
        true => Ok(()),
        false => Err(Error::Invalid(format!(
            "alpha is {alpha} and the factor at the start {start}: alpha must not be negative, and both must be finite"
        ))),
    }
}

/// The windows of layers: of each part of the run, the subject acts from its first t to its second, the style to its
/// third.
fn scheduled(
    layers: &[(&LayerKey, Pair<'_>)],
    scores: Vec<Option<[f64; 2]>>,
    parts: impl Fn([f64; 2]) -> Vec<(f64, f64, f64)>,
) -> BTreeMap<LayerKey, ScheduledLayer> {
    let one = |((key, pair), scores): (&(&LayerKey, Pair<'_>), Option<[f64; 2]>)| {
        let parts = match scores {
            Some(scores) => parts(scores),
            None => vec![(0.0, f64::from(u8::from(pair[0].is_some())), 1.0)],
        };
        let mut windows: Vec<Window> = Vec::new();
        for (from, switch, until) in parts {
            for (adapter, from, until) in [(0, from, switch), (1, switch, until)] {
                match windows.last_mut() {
                    _ if from == until => {}
                    Some(last) if last.adapter == adapter => last.until = until,
                    _ => windows.push(Window { adapter, from, until }),
                }
            }
        }
        let scores = scores.map(Vec::from).unwrap_or_default();
        ((*key).clone(), ScheduledLayer { name: name(pair), scores, windows })
    };
    layers.iter().zip(scores).map(one).collect()
}

fn schedule(
    method: &str,
    options: &impl Serialize,
    subject: Weighted<'_>,
    style: Weighted<'_>,
    layers: BTreeMap<LayerKey, ScheduledLayer>,
) -> Result<Schedule> {
    let of = |(role, w): (&str, Weighted<'_>)| ScheduleAdapter {
        role: role.to_owned(),
        name: w.adapter.name().to_owned(),
        sha256: w.adapter.a_sha256(),
        strength: w.strength,
    };
    let adapters = [("subject", subject), ("style", style)].map(of).to_vec();
    [subject, style].iter().try_for_each(|weighted| weighted.adapter.check_file())?;
    Ok(Schedule {
        method: method.to_owned(),
        options: serde_json::to_value(options).map_err(|e| Error::Invalid(format!("the options: {e}")))?,
        adapters,
        layers,
    })
}

/// Sums over |ΔW|.
#[derive(Clone, Copy)]
struct Magnitudes {
    /// Of the largest entries.
    top: f64,
    /// Of all.
    all: f64,
}

/// Entries of ΔW that are held at a time by each thread.
const TILE: usize = 1 << 17;

fn magnitudes(scaled: &Scaled<'_>, top: usize) -> Magnitudes {
    let Scaled { layer, scale } = scaled;
    let a: Vec<f64> = layer.a().to_vec();
    let b: Vec<f64> = layer.b().to_vec();
    let (rank, input) = (layer.rank, layer.input);
    let largest = |values: &mut Vec<f64>| {
        if values.len() > top && top > 0 {
            values.select_nth_unstable_by(top - 1, |x, y| y.total_cmp(x));
        }
        values.truncate(top);
    };
    let tiles: Vec<(Vec<f64>, f64)> = b
        .par_chunks((TILE / input.max(1)).max(1) * rank)
        .map(|rows| {
            let count = rows.len() / rank;
            let mut tile = vec![0.0; count * input];
            faer::linalg::matmul::matmul(
                faer::MatMut::from_row_major_slice_mut(&mut tile, count, input),
                faer::Accum::Replace,
                faer::MatRef::from_row_major_slice(rows, count, rank),
                faer::MatRef::from_row_major_slice(&a, rank, input),
                *scale,
                faer::Par::Seq,
            );
            tile.iter_mut().for_each(|v| *v = v.abs());
            let sum = tile.iter().sum();
            largest(&mut tile);
            (tile, sum)
        })
        .collect();
    let all = tiles.iter().map(|(_, sum)| sum).sum();
    let mut values: Vec<f64> = tiles.into_iter().flat_map(|(tile, _)| tile).collect();
    largest(&mut values);
    // In a fixed order, whatever the selection left.
    values.sort_unstable_by(f64::total_cmp);
    Magnitudes { top: values.iter().sum(), all }
}

/// `‖s·B·A‖_F²` from Gram matrices.
fn energy(scaled: &Scaled<'_>) -> f64 {
    let gram = |rows: usize, cols: usize, data: Vec<f64>, by_rows: bool| {
        let matrix = faer::MatRef::from_row_major_slice(&data, rows, cols);
        let n = scaled.layer.rank;
        let mut gram = Matrix::zeros(n, n);
        let (left, right) = if by_rows { (matrix, matrix.transpose()) } else { (matrix.transpose(), matrix) };
        faer::linalg::matmul::matmul(
            faer::MatMut::from_row_major_slice_mut(&mut gram.data, n, n),
            faer::Accum::Replace,
            left,
            right,
            1.0,
            faer::Par::Seq,
        );
        gram
    };
    let Layer { rank, input, output, .. } = scaled.layer;
    let aa = gram(*rank, *input, scaled.layer.a().to_vec(), true);
    let bb = gram(*output, *rank, scaled.layer.b().to_vec(), false);
    scaled.scale.powi(2) * aa.data.iter().zip(&bb.data).map(|(a, b)| a * b).sum::<f64>()
}
