//! SSR-Merge (arXiv 2606.10617): a router between B_cat and A_cat, solved from calibration statistics.

use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::entry::{
    MethodEntry, MethodOption, Needs, Number, Only, OptionGroup, Options, Takes, Variant, json, over, take,
    with,
};
use crate::calibration::LayerStatistics;
use crate::compute::ops::{self, Axis, Factor};
use crate::compute::{Batch, Shape};
use crate::merge::algebra::{add, dot, times};
use crate::merge::engine::driver::{self, Done, Method, Run, Spec};
use crate::merge::engine::measure::{Answers, Outputs, Squares, Statistics};
use crate::merge::frame::Frame;
use crate::merge::members::{blocks, joined, joined_a, joined_layer};
use crate::merge::{Action, LayerReport, Losses, Merged, PlannedLayer, Report};
use crate::power::{exponent, exponent_of, pow2};
use crate::words;
use crate::{Calibration, Control, Device, Error, Layer, Matrix, Result, Weighted};

pub(super) const ENTRY: MethodEntry = MethodEntry {
    name: "ssr",
    summary: "SSR-Merge: route each input to the adapters that know it, by a calibration",
    notes: "\
Examples:
  loraweld merge ssr cat.safetensors dog.safetensors:0.8 \\
      --calibration pets.calibration.safetensors -o pets.safetensors
  loraweld merge ssr cat.safetensors dog.safetensors --calibration none --dry-run
  loraweld merge ssr cat.safetensors dog.safetensors --calibration pets.calibration.safetensors \\
      --as-published -o as-published.safetensors",
    needs: Needs::Calibration { or: "ssr-data-free" },
    own_rank: false,
    options: &[OptionGroup {
        heading: Some("SSR options"),
        options: &[
            MethodOption::new(
                "ridge",
                Takes::Number("X", Number::NotNegative),
                "Ridge, added to the mean Gram matrix as it is (the paper's: 1e-4)",
            )
            .key("ridge.absolute"),
            MethodOption::new(
                "ridge-relative",
                Takes::Number("X", Number::NotNegative),
                "Ridge, as a multiple of the mean Gram matrix's diagonal [default: 1e-3]",
            )
            .key("ridge.relative")
            .conflicts("ridge"),
            MethodOption::new(
                "prior",
                Takes::Word("PRIOR", &[("adapters", ""), ("sum", ""), ("zero", ""), ("average", "")]),
                "What to assume of inputs that the calibration has not seen: what the adapters' own weights say, or that \
                 they should get the sum, nothing (the paper's), or the average of the adapters",
            )
            .default("adapters"),
            MethodOption::new(
                "prior-weight",
                Takes::Number("W", Number::NotNegative),
                "Weight of `--prior adapters` against the calibration [default: 0.03]",
            )
            .key("prior_weight")
            .only(Only { with: "prior", is: &["adapters"], or: None, why: "the ridge weighs the others" }),
            MethodOption::new(
                "coordinates",
                Takes::Word(
                    "COORDINATES",
                    &[
                        ("orthonormal", "those in which the rows of each adapter's A are orthonormal"),
                        ("files", "those of the files, as the authors' code has it"),
                    ],
                ),
                "Where ridge and prior are measured: `orthonormal` gives the same merge however a file splits its updates \
                 into A and B",
            )
            .default("orthonormal"),
            MethodOption::new(
                "isotropic",
                Takes::Number("C", Number::NotNegative),
                "Without a calibration: how much inputs from anywhere count beside those that an adapter's own A reads",
            )
            .default("0.3")
            .only(Only {
                with: "coordinates",
                is: &["orthonormal"],
                or: None,
                why: "the proxy of the files' own coordinates has none",
            }),
            MethodOption::new(
                "absent",
                Takes::Word("ABSENT", &[("count", ""), ("skip", "")]),
                "Inputs of an adapter on a layer that it lacks: `count` them, so that the merge does nothing on them there, or \
                 `skip` them (the authors' code)",
            )
            .default("count"),
            MethodOption::new(
                "as-published",
                Takes::Nothing("true"),
                "As the authors' code has it: `--ridge 1e-4 --prior zero --absent skip --coordinates files`, each of which can be \
                 given besides",
            )
            .key("as_published"),
            MethodOption::new(
                "task-weights",
                Takes::PerAdapter("W,W,...", Number::NotNegative),
                "How much each adapter's own inputs count, in the order of the adapters [default: 1 each]",
            )
            .key("task_weights"),
            MethodOption::new(
                "balance",
                Takes::NumberOr("P|fair", Number::NotNegative, "fair"),
                "Count adapters with a strong output less, by its energy to this power (0 is off); or `fair`, weigh all of \
                 them so that the one that loses most loses as little as can be",
            )
            .default("0"),
            MethodOption::new(
                "neutral-weight",
                Takes::Number("W", Number::NotNegative),
                "How much the calibration's neutral inputs count, on which the merge should do nothing",
            )
            .key("neutral_weight")
            .default("0"),
        ],
    }],
    build,
    variants: &[
        Variant { name: "ssr-data-free", aliases: &[], whose: None, build: data_free },
        Variant { name: "ssr-fair", aliases: &[], whose: None, build: fair },
    ],
};

fn build<'a>(options: Options, calibration: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(Ssr { calibration, options: SsrOptions::parse(options)? }))
}

fn fair<'a>(options: Options, calibration: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    build(with(options, "balance", "fair"), calibration)
}

fn data_free<'a>(options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    build(options, None)
}

/// How strongly the router is held to its prior R₀.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ridge {
    /// λ itself, added to G/N.
    Absolute(f64),
    /// λ as a multiple of `tr(G')/R`, and so free of the activations' scale.
    Relative(f64),
}

/// What is assumed about inputs that the calibration has not seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prior {
    /// What the adapters' own A say about their inputs; the ridge pulls toward the sum.
    Adapters,
    /// The ridge pulls toward the sum, R₀ = I.
    Sum,
    /// The ridge pulls toward nothing, R₀ = 0, as published.
    Zero,
    /// The ridge pulls toward the average, R₀ = I/K.
    Average,
}

/// What becomes of the inputs of an adapter on a layer that it lacks, where the calibration has some.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Absent {
    /// They count in G and N: the merge is to do nothing on them there, as the adapter itself does. The default.
    #[default]
    Count,
    /// They count nowhere, as in the authors' code, which records an adapter's inputs only where it has a layer.
    Skip,
}

impl Absent {
    fn is_count(&self) -> bool {
        *self == Self::Count
    }
}

/// The coordinates of a layer's ranks in which the router is solved for, and so what ridge and prior mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Coordinates {
    /// Those in which the rows of each A_k are orthonormal. The merge is the same for `(B·D, D⁻¹·A)` with any D. The default.
    #[default]
    Orthonormal,
    /// Those of the files' own A, as published.
    Files,
}

/// How the adapters' statistics are weighed against each other, beside [`SsrOptions::task_weights`].
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskBalance {
    /// So that the task that loses most, over the whole file, loses as little as can be: weights are multiplied by the losses
    /// until these are equal, or a task of the smallest weight still loses less. Each round solves all systems again.
    Fair,
    /// Those of task k count `e_k^-p`, with e_k its mean output energy; 0 is off.
    #[serde(untagged)]
    Power(f64),
}

/// Options of [`Ssr`].
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct SsrOptions {
    /// The ridge; `Relative(1e-3)` by default.
    pub ridge: Ridge,
    /// The prior; `Adapters` by default.
    pub prior: Prior,
    /// Weight w of the statistics of [`Prior::Adapters`] against the measured ones; 0.03 by default.
    pub prior_weight: f64,
    /// Weight of each adapter's statistics, in the order of the adapters; 1 by default.
    pub task_weights: Option<Vec<f64>>,
    /// The balance; `Power(0.0)` by default, which is off.
    pub balance: TaskBalance,
    /// Weight of the neutral inputs, on which the merge should do nothing; 0 by default.
    pub neutral_weight: f64,
    /// The coordinates; `Orthonormal` by default.
    pub coordinates: Coordinates,
    /// Without a calibration, the weight c of inputs from anywhere in the data-free proxy; 0.3 by default. The proxy of
    /// [`Coordinates::Files`] has none.
    pub isotropic: f64,
    /// Inputs of adapters that lack a layer; counted by default.
    #[serde(skip_serializing_if = "Absent::is_count")]
    pub absent: Absent,
}

impl Default for SsrOptions {
    fn default() -> Self {
        Self {
            ridge: Ridge::Relative(1e-3),
            prior: Prior::Adapters,
            prior_weight: 0.03,
            task_weights: None,
            balance: TaskBalance::Power(0.0),
            neutral_weight: 0.0,
            coordinates: Coordinates::default(),
            isotropic: 0.3,
            absent: Absent::default(),
        }
    }
}

impl SsrOptions {
    /// As the authors' code has it: an absolute ridge of 1e-4 toward zero in the files' own coordinates, and nothing of
    /// inputs on layers that their adapter lacks.
    pub fn published() -> Self {
        Self {
            ridge: Ridge::Absolute(1e-4),
            prior: Prior::Zero,
            coordinates: Coordinates::Files,
            absent: Absent::Skip,
            ..Self::default()
        }
    }

    fn parse(mut options: Options) -> Result<Self> {
        let as_published = take(&mut options, "as_published")?.unwrap_or(false);
        over(&if as_published { Self::published() } else { Self::default() }, options)
    }
}

/// SSR-Merge: the sum of adapters with a router between their ranks.
///
/// For each layer that several adapters have, with `A_cat = [A_1; …; A_K]`, `B_cat = [s_1·B_1 … s_K·B_K]` (s: scale
/// times strength), R = Σ r_k, and calibration statistics G_k (R × R) over N_k tokens, the result is `A = A_cat`,
/// `B = B_cat·R*`, where
///
/// ```text
/// G  = Σ w_k·G_k + w_0·G_0          Q[block k, :] = w_k·G_k[block k, :]          N = Σ w_k·N_k
/// G' = G/N + w·tr(G/N)/tr(G_f)·G_f  Q' = Q/N + w·tr(G/N)/tr(G_f)·Q_f             (w = 0 unless Prior::Adapters)
/// R* = (Q' + λ·R₀)·(G' + λ·I)⁻¹
/// ```
///
/// G_k of an adapter that lacks the layer count, if it has tokens there: the merge is to do nothing on them (with
/// [`Absent::Skip`], its G_k and N_k are left out). G_f is what the adapters' own A say about their inputs: with
/// `C = A_cat·A_catᵀ`, `G_f,k = C[:, k]·C[k, :]` at trace 1, summed; Q_f its rows as above.
/// With R₀ = I, λ and w pull toward the plain sum.
///
/// All of this is meant in coordinates in which the rows of each A_k are orthonormal: with `C_kk = L_k·L_kᵀ` and
/// `L = blockdiag(L_1, …, L_K)`, G stands for `L⁻¹·G·L⁻ᵀ` (C and Q likewise), and the router between the files' own
/// factors is `L·R*·L⁻¹`. Directions that an A_k lacks are left out. As published ([`SsrOptions::published`]), L = I,
/// R₀ = 0, w = 0 and λ = 1e-4, and adapters that lack the layer are left out.
///
/// Without a calibration, `G' = Σ w_k·G_f,k` with `G_f,k = C[:, k]·C[k, :] + c·C`: an adapter's inputs lie where its own A
/// reads, or, with weight c, anywhere. With L = I, c is 0 and each G_f,k is at trace 1.
///
/// It minimises `Σ_k ‖B_cat·R·Z_k − s_k·B_k·A_k·X_k‖²`, regularised. Layers of one adapter pass through unchanged.
/// Statistics and products are of the device's precision, the solve f64 or double-single, the result f32.
///
/// # Example
/// ```no_run
/// use loraweld::{Adapter, Calibration, Device, SaveOptions, Ssr};
/// # fn main() -> loraweld::Result<()> {
/// let device = Device::auto()?;
/// let (cat, dog) = (Adapter::open("cat.safetensors")?, Adapter::open("dog.safetensors")?);
/// let calibration = Calibration::open("cat-and-dog.calibration.safetensors")?;
/// let merged = Ssr::new(&calibration).merge(&device, &[cat.at(1.0), dog.at(0.8)])?;
/// merged.adapter.save("merged.safetensors", &SaveOptions::default())?;
/// println!("{}", merged.report);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Ssr<'a> {
    pub(super) calibration: Option<&'a Calibration>,
    pub(super) options: SsrOptions,
}

impl<'a> Ssr<'a> {
    /// With measured statistics.
    pub fn new(calibration: &'a Calibration) -> Self {
        Self { calibration: Some(calibration), options: SsrOptions::default() }
    }

    /// With the data-free proxy alone: each adapter's A stands for its inputs. It is worth clearly less than a calibration.
    pub fn data_free() -> Ssr<'static> {
        Ssr { calibration: None, options: SsrOptions::default() }
    }

    /// Sets the options.
    pub fn options(self, options: SsrOptions) -> Self {
        Self { options, ..self }
    }

    /// Merges.
    ///
    /// # Errors
    /// As [`merge_with`](Self::merge_with).
    pub fn merge(&self, device: &Device, adapters: &[Weighted<'_>]) -> Result<Merged> {
        self.merge_with(device, adapters, Control::default())
    }

    /// Merges, with progress and cancellation.
    ///
    /// A layer without calibration tokens of one of its adapters, or whose statistics are zero or cannot be solved
    /// at any ridge, is summed; a singular one gets a larger ridge. The report says so.
    ///
    /// # Errors
    /// [`Error::Invalid`] for options out of range and for adapters that the calibration was not made for; as
    /// [`Plan::new`](crate::Plan::new); [`Error::Tensor`] for NaN or infinity in an adapter; [`Error::Layer`] if a result or a sum of
    /// the calibration overflows; [`Error::Device`]; [`Error::Cancelled`].
    pub fn merge_with(
        &self,
        device: &Device,
        adapters: &[Weighted<'_>],
        control: Control<'_>,
    ) -> Result<Merged> {
        self.run(&Run::new(device, adapters, control))
    }

    /// Checks the options for a merge of so many adapters, which [`merge`](Self::merge) does as well.
    ///
    /// # Errors
    /// [`Error::Invalid`] for values out of range, another number of task weights, or a neutral weight without a
    /// calibration; [`Error::File`] if the calibration has no neutral inputs.
    pub fn check(&self, adapters: usize) -> Result<()> {
        let SsrOptions { ridge, prior_weight, task_weights, balance, neutral_weight, isotropic, .. } =
            &self.options;
        let (Ridge::Absolute(ridge) | Ridge::Relative(ridge)) = *ridge;
        let named = [
            ("ridge", ridge),
            ("prior weight", *prior_weight),
            ("neutral weight", *neutral_weight),
            ("isotropic", *isotropic),
        ];
        let weights = task_weights.iter().flatten().map(|&w| ("task weights", w));
        for (name, value) in named.into_iter().chain(weights) {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::Invalid(format!(
                    "{name}: {value}, but it must be finite and not negative"
                )));
            }
        }
        if let TaskBalance::Power(power) = balance
            && !power.is_finite()
        {
            return Err(Error::Invalid(format!("balance: {power}, but it must be finite")));
        }
        if *balance == TaskBalance::Fair && self.calibration.is_none() {
            return Err(Error::Invalid(
                "a fair balance needs a calibration, which measures the losses".into(),
            ));
        }
        if let Some(weights) = task_weights
            && weights.len() != adapters
        {
            return Err(Error::Invalid(format!(
                "task weights: {} for {}; give one for each",
                weights.len(),
                words::count(adapters, "adapter")
            )));
        }
        match self.calibration {
            Some(c) if *neutral_weight > 0.0 && !c.layers().any(|key| c.neutral_tokens(key) > 0) => {
                Err(c.error("has no neutral inputs, which a neutral weight needs"))
            }
            None if *neutral_weight > 0.0 => {
                Err(Error::Invalid("a neutral weight needs a calibration with neutral inputs".into()))
            }
            _ => Ok(()),
        }
    }

    /// Merges layers on a device that has room for them.
    fn chunk(&self, device: &Device, jobs: &[Job<'_>]) -> Result<Vec<Done>> {
        let ready: Vec<&Job<'_>> = jobs.iter().filter(|job| job.lacking.is_none()).collect();
        let mut routed = self.route(device, &ready)?.into_iter();
        jobs.iter()
            .map(|job| match &job.lacking {
                Some(why) => self.summed(job, why.clone()),
                None => {
                    routed.next().ok_or_else(|| Error::layer(job.planned.name.as_str(), "was not merged"))
                }
            })
            .collect()
    }

    /// Solves for the routers of layers that have statistics, and applies them.
    fn route(&self, device: &Device, jobs: &[&Job<'_>]) -> Result<Vec<Done>> {
        if jobs.is_empty() {
            return Ok(Vec::new());
        }
        let frames = self.frames(device, jobs)?;
        let (b, scales) = sized_b(device, jobs)?;
        let bb = output_grams(device, &b, &scales)?;
        let systems: Vec<_> =
            (0..jobs.len()).into_par_iter().map(|i| self.system(jobs[i], frames.get(i), &bb[i])).collect();
        let mut solved = solve(device, &systems)?;
        if self.options.coordinates == Coordinates::Orthonormal {
            solved.par_iter_mut().zip(&frames).for_each(|(solved, frame)| {
                if let Ok(solved) = solved {
                    solved.router = frame.router(&solved.router);
                }
            });
        }

        // B_cat is held without scales, which are exact in the router's rows.
        let routers: Vec<Matrix> = solved
            .iter()
            .zip(&scales)
            .map(|(solved, scales)| {
                let n = scales.len();
                match solved {
                    Err(_) => Matrix::zeros(n, n),
                    Ok(solved) => Matrix::from_fn(n, n, |i, j| scales[i] * solved.router[(i, j)]),
                }
            })
            .collect();
        let routers = Batch::upload(device, device.product(), &routers)?;
        let merged = ops::matmul(device, &b, &routers)?.download_f32(device)?;

        let all = jobs.par_iter().zip(merged).zip(solved.par_iter().zip(&bb));
        all.map(|((job, b), (solved, bb))| match solved {
            Ok(solved) => self.routed(job, b, bb, solved),
            Err(why) => self.summed(job, why.clone()),
        })
        .collect()
    }

    /// A layer whose B is `b`, the routed B_cat. `bb`: BᵀB.
    fn routed(&self, job: &Job<'_>, b: Matrix<f32>, bb: &Matrix, solved: &Solved) -> Result<Done> {
        let mut notes = Vec::new();
        if solved.raised {
            notes.push("its statistics are singular at the ridge asked for, which was raised".to_owned());
        }
        if self.options.neutral_weight > 0.0 && job.neutral.is_none() {
            notes.push("no neutral inputs came for it".to_owned());
        }
        let action = Action::Routed { ridge: solved.ridge };
        Ok(Done {
            layer: joined_layer(&job.members, joined_a(&job.members), b)?,
            report: LayerReport { tokens: self.tokens(job), notes, ..LayerReport::new(job.planned, action) },
            squares: self.calibration.map(|_| job.squares(bb, &solved.router)),
            answers: self.calibration.map(|_| job.answers(bb, &solved.router)),
        })
    }

    /// A layer that cannot be routed.
    fn summed(&self, job: &Job<'_>, why: String) -> Result<Done> {
        let action = Action::Summed { why };
        let report = LayerReport { tokens: self.tokens(job), ..LayerReport::new(job.planned, action) };
        Ok(Done::new(joined(&job.members)?, report))
    }

    /// Calibration tokens of a layer.
    fn tokens(&self, job: &Job<'_>) -> Option<u64> {
        self.calibration.map(|_| job.tasks.iter().map(|task| task.tokens).sum())
    }

    /// The coordinates of each layer, where the options ask for them or for what the adapters' own A say.
    pub(super) fn frames(&self, device: &Device, jobs: &[&Job<'_>]) -> Result<Vec<Frame>> {
        if self.options.coordinates == Coordinates::Files && self.calibration.is_some() && !self.has_prior() {
            return Ok(Vec::new());
        }
        let members: Vec<&[(&Layer, f64)]> = jobs.iter().map(|job| job.members.as_slice()).collect();
        Frame::new(device, &members)
    }

    /// Whether what the adapters' own A say counts beside a calibration.
    fn has_prior(&self) -> bool {
        self.options.prior == Prior::Adapters && self.options.prior_weight > 0.0
    }

    /// The data-free statistics G_f,k of each member of a layer. `c`: `A_cat·A_catᵀ`, in the coordinates of the solve.
    fn proxies(&self, c: &Matrix, blocks: &[Range<usize>]) -> Vec<Matrix> {
        let isotropic = match (self.calibration, self.options.coordinates) {
            (None, Coordinates::Orthonormal) => Some(self.options.isotropic),
            _ => None,
        };
        blocks.iter().map(|block| proxy(c, block, isotropic)).collect()
    }

    /// G' and Q' of one layer in the coordinates of the solve, or why there are none. `bb`: BᵀB, of the files.
    pub(super) fn system(
        &self,
        job: &Job<'_>,
        frame: Option<&Frame>,
        bb: &Matrix,
    ) -> std::result::Result<System, String> {
        let options = &self.options;
        let order = job.planned.rank;
        let orthonormal = frame.filter(|_| options.coordinates == Coordinates::Orthonormal);
        let wanted = self.calibration.is_none() || self.has_prior();
        let proxies = frame.filter(|_| wanted).map(|frame| match orthonormal {
            Some(frame) => self.proxies(&frame.inputs(&frame.gram), &job.blocks),
            None => self.proxies(&frame.gram, &job.blocks),
        });
        let proxies = proxies.as_deref();
        // Statistics of a calibration are of the files' own A, as bb is; proxies are of the coordinates of the solve.
        let outputs = orthonormal.filter(|_| self.calibration.is_none()).map(|frame| frame.outputs(bb));
        let bb = outputs.as_ref().unwrap_or(bb);
        // (member, statistics, tokens, adapter) of each task; the proxy counts as statistics over one token.
        let tasks: Vec<(Option<usize>, &Matrix, f64, usize)> = match (self.calibration, proxies) {
            (None, Some(proxies)) => {
                let members = job.planned.members.iter().enumerate();
                members.map(|(k, &i)| (Some(k), &proxies[k], 1.0, i)).collect()
            }
            _ => {
                let of = |t: &'_ TaskStatistics| {
                    t.gram.is_some().then_some((t.member, t.tokens as f64, t.adapter))
                };
                let counts = |t: &&TaskStatistics| t.member.is_some() || options.absent == Absent::Count;
                job.tasks
                    .iter()
                    .filter(counts)
                    .filter_map(|t| of(t).and_then(|(k, n, i)| Some((k, t.gram.as_ref()?, n, i))))
                    .collect()
            }
        };
        let energy = |&(member, gram, tokens, _): &(Option<usize>, &Matrix, f64, usize)| {
            let block = job.blocks.get(member?)?.clone();
            let sum: f64 =
                block.clone().flat_map(|i| block.clone().map(move |j| bb[(i, j)] * gram[(i, j)])).sum();
            (sum > 0.0 && sum.is_finite()).then_some(sum / tokens)
        };
        let power = if let TaskBalance::Power(power) = options.balance { power } else { 0.0 };
        // A task without output has no energy to be balanced by.
        let balances: Vec<Option<f64>> = tasks.iter().map(|t| Some(energy(t)?.powf(-power))).collect();
        let known: Vec<f64> = balances.iter().flatten().copied().collect();
        let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
        let weight = |i: usize, balance: Option<f64>| {
            let own = options.task_weights.as_ref().map_or(1.0, |weights| weights[i]);
            own * balance.map_or(1.0, |balance| balance / mean)
        };

        let (mut g, mut q, mut tokens) = (Matrix::zeros(order, order), Matrix::zeros(order, order), 0.0);
        for (&(member, gram, n, adapter), balance) in tasks.iter().zip(balances) {
            let w = weight(adapter, balance);
            add(&mut g, gram, w, 0..order);
            if let Some(member) = member {
                add(&mut q, gram, w, job.blocks[member].clone());
            }
            tokens += w * n;
        }
        if tokens == 0.0 {
            return Err("all weights of its tasks are zero".to_owned());
        }
        if let Some(neutral) = &job.neutral {
            add(&mut g, neutral, options.neutral_weight, 0..order);
        }
        if self.calibration.is_some() {
            for m in [&mut g, &mut q] {
                m.data.iter_mut().for_each(|v| *v /= tokens);
            }
        }
        if let (Some(frame), Some(_)) = (orthonormal, self.calibration) {
            (g, q) = (frame.inputs(&g), frame.inputs(&q));
        }
        let energy = trace(&g);
        if let (Some(_), Some(proxies)) = (self.calibration, proxies) {
            let total: f64 = proxies.iter().map(trace).sum();
            let w = options.prior_weight * energy / total;
            if w > 0.0 && w.is_finite() {
                for (proxy, block) in proxies.iter().zip(&job.blocks) {
                    add(&mut g, proxy, w, 0..order);
                    add(&mut q, proxy, w, block.clone());
                }
            }
        }
        let mean = trace(&g) / orthonormal.map_or(order, Frame::rank).max(1) as f64;
        if g.data.iter().chain(&q.data).any(|v| !v.is_finite()) || !mean.is_finite() {
            return Err("its statistics are not finite".to_owned());
        }
        if mean == 0.0 {
            return Err("its statistics are zero: nothing is known about its inputs".to_owned());
        }
        // What an adapter lacks is no input of its router, and so must not be singular.
        for i in orthonormal.iter().flat_map(|frame| frame.lacking()) {
            g[(i, i)] = mean;
        }
        let toward = match options.prior {
            Prior::Adapters | Prior::Sum => 1.0,
            Prior::Zero => 0.0,
            Prior::Average => 1.0 / job.members.len() as f64,
        };
        let ridge = match options.ridge {
            Ridge::Absolute(ridge) => ridge,
            Ridge::Relative(ridge) => ridge * mean,
        };
        Ok(System { g, q, mean, ridge, toward })
    }
}

impl Method for Ssr<'_> {
    /// A ridge that does not grow with the activations may leave systems of condition 1e5, as published.
    fn bound(&self) -> f64 {
        if matches!(self.options.ridge, Ridge::Absolute(_)) { 5e-3 } else { crate::merge::VERIFIED }
    }

    fn check(&self, adapters: usize) -> Result<()> {
        Ssr::check(self, adapters)
    }

    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        let adapters = run.adapters;
        self.check(adapters.len())?;
        // What is at strength 0 takes no part, with its tokens neither.
        let active: Vec<usize> = (0..adapters.len()).filter(|&i| adapters[i].strength != 0.0).collect();
        let pool = match self.calibration {
            None => Vec::new(),
            Some(calibration) => {
                let selected: Vec<_> = adapters.iter().map(|weighted| weighted.adapter).collect();
                calibration.leave(run.device)?;
                calibration.select(&selected)?
            }
        };
        let statistics = |planned: &PlannedLayer| {
            let of = |adapters: &[usize]| adapters.iter().map(|&i| pool[i]).collect::<Vec<_>>();
            let statistics =
                |c: &Calibration| c.statistics(&planned.key, &of(&active), &of(&planned.members));
            self.calibration.map(statistics).transpose()
        };
        if self.options.balance == TaskBalance::Fair {
            return self.fair(run, &active, &statistics);
        }
        let merge = |on: &Device, jobs: &[driver::Job<'_>]| {
            let ours: Vec<Job<'_>> = jobs
                .par_iter()
                .map(|driver::Job { planned, members }| {
                    Ok(Job::new(planned, members.clone(), adapters, &active, statistics(planned)?))
                })
                .collect::<Result<_>>()?;
            self.chunk(on, &ours)
        };
        let spec = Spec {
            method: if self.calibration.is_some() { "ssr" } else { "ssr-data-free" },
            options: json(&self.options)?,
            size: &size,
            rank: &|layer| layer.rank,
            merge: &merge,
            alone: false,
            is_sum: false,
            notes: &|report| self.notes(report),
        };
        driver::run(run, &spec)
    }
}

/// The statistics of a layer, sliced to the adapters of a merge; none without a calibration.
pub(super) type StatisticsOf<'s> = dyn Fn(&PlannedLayer) -> Result<Option<LayerStatistics>> + Sync + 's;

impl Ssr<'_> {
    /// What the user should know about a whole merge.
    fn notes(&self, report: &Report) -> Vec<String> {
        let count = |of: fn(&Action) -> bool| report.layers.iter().filter(|layer| of(&layer.action)).count();
        let summed = count(|action| matches!(action, Action::Summed { .. }));
        let shared = summed + count(|action| matches!(action, Action::Routed { .. }));
        let mut notes = Vec::new();
        if self.calibration.is_none() && shared > 0 {
            notes.push(
                "no calibration: the routers follow a data-free proxy, the adapters' own A; the losses are unknown"
                    .to_owned(),
            );
        }
        if summed > 0 {
            let total = words::count(shared, "shared layer");
            notes.push(format!("summed {summed} of {total}, which could not be routed"));
        }
        notes.extend(report.losses.and_then(worse));
        notes
    }
}

/// A layer that several adapters have, and its statistics.
pub(super) struct Job<'a> {
    pub(super) planned: &'a PlannedLayer,
    /// The members' layers, and the factor on each.
    pub(super) members: Vec<(&'a Layer, f64)>,
    /// The members' rows.
    pub(super) blocks: Vec<Range<usize>>,
    pub(super) tasks: Vec<TaskStatistics>,
    pub(super) neutral: Option<Matrix>,
    /// Why it cannot be routed.
    pub(super) lacking: Option<String>,
}

pub(super) struct TaskStatistics {
    pub(super) adapter: usize,
    /// Its place among the members; an adapter that lacks the layer has none.
    pub(super) member: Option<usize>,
    pub(super) gram: Option<Matrix>,
    pub(super) tokens: u64,
}

impl<'a> Job<'a> {
    pub(super) fn new(
        planned: &'a PlannedLayer,
        members: Vec<(&'a Layer, f64)>,
        adapters: &[Weighted<'_>],
        active: &[usize],
        statistics: Option<LayerStatistics>,
    ) -> Self {
        let blocks = blocks(&members);
        let mut job = Self { planned, members, blocks, tasks: Vec::new(), neutral: None, lacking: None };
        let Some(statistics) = statistics else { return job };
        job.neutral = statistics.neutral;
        for (&adapter, (gram, tokens)) in active.iter().zip(statistics.tasks) {
            let member = planned.members.iter().position(|&i| i == adapter);
            job.tasks.push(TaskStatistics { adapter, member, gram, tokens });
        }
        let lacks = job.tasks.iter().filter(|task| task.member.is_some() && task.tokens == 0);
        let names: Vec<_> =
            lacks.map(|task| format!("`{}`", adapters[task.adapter].adapter.name())).collect();
        if !names.is_empty() {
            job.lacking = Some(format!("the calibration has no activations of {}", names.join(", ")));
        }
        job
    }

    /// Losses on the calibration tokens as they are, whatever the options weigh.
    fn squares(&self, bb: &Matrix, router: &Matrix) -> Squares {
        let tasks: Vec<_> = self.tasks.iter().map(|task| (task.member, task.gram.as_ref())).collect();
        let statistics = Statistics::new(&tasks, &self.blocks);
        Squares::new(&Outputs { merged: bb, crossed: bb, members: bb, router }, &statistics, &self.blocks)
    }

    /// Who feeds whom.
    fn answers(&self, bb: &Matrix, router: &Matrix) -> Answers {
        let members = self.tasks.iter().filter_map(|task| {
            let gram = task.gram.as_ref()?;
            Some((task.adapter, self.blocks[task.member?].clone(), gram))
        });
        Answers::new(&members.collect::<Vec<_>>(), bb, router)
    }
}

/// `(Q' + λ·R₀)·(G' + λ·I)⁻¹` to be solved.
pub(super) struct System {
    g: Matrix,
    q: Matrix,
    /// tr(G')/R.
    mean: f64,
    /// λ.
    ridge: f64,
    /// R₀ is this times I.
    toward: f64,
}

pub(super) struct Solved {
    pub(super) router: Matrix,
    pub(super) ridge: f64,
    /// Whether the ridge is larger than was asked for.
    pub(super) raised: bool,
}

/// Says so if the merge is clearly worse than doing without it.
fn worse(losses: Losses) -> Option<String> {
    let Losses { merged, sum, average } = losses;
    let (other, name) = if sum < average { (sum, "plain sum") } else { (average, "average") };
    (merged > 1.05 * other + 0.01).then(|| {
        format!(
            "on the calibration tokens the merge loses {merged:.3}, more than the {name} ({other:.3}): do the options \
             or weights ask for that?"
        )
    })
}

/// How often a ridge is raised, tenfold.
const TRIES: usize = 12;

/// Solves all systems at once; those that are not positive definite again with a larger ridge.
pub(super) fn solve(
    device: &Device,
    systems: &[std::result::Result<System, String>],
) -> Result<Vec<std::result::Result<Solved, String>>> {
    let mut out: Vec<std::result::Result<Solved, String>> = Vec::new();
    let mut open = Vec::new();
    for (i, system) in systems.iter().enumerate() {
        let fail = "its statistics are singular at any ridge".to_owned();
        match system {
            Ok(system) => {
                open.push((i, system, system.ridge));
                out.push(Err(fail));
            }
            Err(why) => out.push(Err(why.clone())),
        }
    }
    for attempt in 0..=TRIES {
        if open.is_empty() {
            break;
        }
        // Scaled to size 1 by a power of two, for the range of double-single.
        let shifted = |m: &Matrix, system: &System, diagonal: f64| {
            let scale = pow2(-exponent_of(system.mean));
            Matrix::from_fn(m.rows, m.cols, |i, j| (m[(i, j)] + if i == j { diagonal } else { 0.0 }) * scale)
        };
        let left: Vec<_> = open.par_iter().map(|(_, s, ridge)| shifted(&s.g, s, *ridge)).collect();
        let right: Vec<_> = open.par_iter().map(|(_, s, ridge)| shifted(&s.q, s, ridge * s.toward)).collect();
        let mut grams = Batch::upload(device, device.sum(), &left)?;
        let mut routers = Batch::upload(device, device.sum(), &right)?;
        let status = ops::solve(device, &mut grams, &mut routers)?;
        let mut failed = Vec::new();
        for (((i, system, ridge), status), router) in
            open.into_iter().zip(status).zip(routers.download(device)?)
        {
            if status.is_ok() && router.data.iter().all(|v| v.is_finite()) {
                out[i] = Ok(Solved { router, ridge, raised: attempt > 0 });
            } else {
                tracing::debug!(ridge, "a system is singular; its ridge is raised");
                failed.push((i, system, if ridge == 0.0 { 1e-12 * system.mean } else { 10.0 * ridge }));
            }
        }
        open = failed;
    }
    Ok(out)
}

/// B_cat of each layer, every block brought to size 1 by a power of two, so that f32 holds products of tiny and huge
/// factors, and the factor that each rank lacks then.
pub(super) fn sized_b(device: &Device, jobs: &[&Job<'_>]) -> Result<(Batch, Vec<Vec<f64>>)> {
    let (factors, scales): (Vec<Vec<Factor<'_>>>, Vec<Vec<f64>>) = jobs
        .par_iter()
        .map(|job| {
            let (mut factors, mut scales) = (Vec::new(), Vec::new());
            for (layer, scale) in &job.members {
                let e = exponent(layer.b()).unwrap_or(0);
                factors.push(Factor { matrix: layer.b(), scale: pow2(-e) as f32 });
                scales.extend(std::iter::repeat_n(scale * pow2(e), layer.rank));
            }
            (factors, scales)
        })
        .unzip();
    let factors: Vec<&[Factor<'_>]> = factors.iter().map(Vec::as_slice).collect();
    Ok((ops::rank_concat(device, Axis::Columns, &factors)?, scales))
}

/// BᵀB of each layer, with scales.
pub(super) fn output_grams(device: &Device, b: &Batch, scales: &[Vec<f64>]) -> Result<Vec<Matrix>> {
    let shapes: Vec<_> = b.shapes().iter().map(|shape| Shape::new(shape.cols, shape.cols)).collect();
    let mut sums = Batch::zeros(device, device.sum(), &shapes)?;
    ops::gram(device, b, &mut sums)?;
    let grams = sums.download(device)?;
    let scaled =
        |(m, s): (&Matrix, &Vec<f64>)| Matrix::from_fn(m.rows, m.cols, |i, j| m[(i, j)] * s[i] * s[j]);
    Ok(grams.iter().zip(scales).map(scaled).collect())
}

/// `C[:, block]·C[block, :] + c·C`; without c at trace 1, and zero if there is nothing.
fn proxy(c: &Matrix, block: &Range<usize>, isotropic: Option<f64>) -> Matrix {
    let part = Matrix::from_fn(c.rows, block.len(), |i, j| c[(i, block.start + j)]);
    let mut g = times(&part, &part.transposed());
    if let Some(isotropic) = isotropic {
        add(&mut g, c, isotropic, 0..c.rows);
        return g;
    }
    let scale = 1.0 / dot(&part, &part);
    if !scale.is_finite() {
        return Matrix::zeros(c.rows, c.rows);
    }
    g.data.iter_mut().for_each(|v| *v *= scale);
    g
}

fn trace(m: &Matrix) -> f64 {
    (0..m.rows).map(|i| m[(i, i)]).sum()
}

/// Bytes of the largest buffer that a layer takes, and in all.
fn size(layer: &PlannedLayer) -> (u64, u64) {
    let PlannedLayer { rank, input, output, .. } = layer;
    let (products, grams) = (ops::product_bytes(*rank, *rank), ops::gram_bytes(*output, *rank));
    let largest = (8 * rank * rank.max(input).max(output)).max(products).max(grams);
    // A, as it comes and in halves; B, as it comes and merged.
    let size = 4 * rank * (3 * input + 3 * output) + 8 * 6 * rank * rank + products + grams;
    (largest as u64, size as u64)
}
