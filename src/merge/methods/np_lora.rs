//! NP-LoRA (arXiv 2511.11051): subjects are projected off the input directions of the style.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::entry::{
    MethodEntry, MethodOption, Needs, Number, OptionGroup, Options, Takes, Variant, json, over, with,
};
use crate::compute::Batch;
use crate::compute::ops::{self, Root, ScaledRows, Side, Stacks, Svd};
use crate::merge::algebra::{directions, gram_first, significant, svds, times};
use crate::merge::engine::driver::{self, Done, Job, Method, Run, Spec};
use crate::merge::factored::size;
use crate::merge::members::{joined_b, joined_layer};
use crate::merge::{Action, LayerReport, Merged, ProjectionReport, Report, SingularValues};
use crate::power::pow2;
use crate::{Calibration, Control, Device, Error, Layer, Matrix, RawMatrix, Result, Weighted};

pub(super) const ENTRY: MethodEntry = MethodEntry {
    name: "np-lora",
    summary: "NP-LoRA: keep a style whole, and project subjects off the directions that it reads",
    notes: "\
Examples:
  loraweld merge np-lora --style ink.safetensors --subject cat.safetensors -o ink-cat.safetensors
  loraweld merge np-lora --style ink.safetensors --subject cat.safetensors:0.9 --subject hat.safetensors \\
      --hard -o ink-cat-hat.safetensors
  loraweld merge np-lora --style ink.safetensors --subject cat.safetensors --mu 0.5 \\
      --mu-for 'single_transformer_blocks.*=0.2' -o ink-cat.safetensors",
    needs: Needs::Style,
    own_rank: false,
    options: &[OptionGroup {
        heading: Some("NP-LoRA options"),
        options: &[
            MethodOption::new(
                "mu",
                Takes::Number("MU", Number::NotNegative),
                "How far a subject gives way: it keeps 1/(1 + MU) of what it has in the style's directions. 0 is the plain \
                 sum",
            )
            .key("projection.soft")
            .default("0.5"),
            MethodOption::new("hard", Takes::Nothing("\"hard\""), "Give way wholly: MU is infinite")
                .key("projection")
                .conflicts("mu"),
            MethodOption::new(
                "mu-for",
                Takes::ByLayer {
                    name: "PATTERN=MU|hard",
                    key: "soft",
                    number: Number::NotNegative,
                    word: "hard",
                },
                "MU of the layers whose name matches; `*` stands for anything. Repeatable; the last match counts",
            )
            .key("by_layer"),
            MethodOption::new(
                "directions",
                Takes::Number("N", Number::Count),
                "Keep clear only the style's N strongest directions in each layer [default: all]",
            )
            .key("directions.count")
            .conflicts("energy"),
            MethodOption::new(
                "energy",
                Takes::Number("SHARE", Number::Share),
                "Keep clear as few of the style's directions as hold this share of its energy, above 0 and at most 1",
            )
            .key("directions.energy"),
        ],
    }],
    build,
    variants: &[Variant {
        name: "np-lora-hard",
        aliases: &[],
        whose: None,
        build: |options, calibration| build(with(options, "projection", "hard"), calibration),
    }],
};

fn build<'a>(options: Options, _: Option<&'a Calibration>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(NpLora::default().options(over(&NpLoraOptions::default(), options)?)))
}

/// Directions of what a hard projection left, which is f32, count as none below this share of what there was before.
const LEFT_OVER: f64 = 1e-6;

/// How far rounding may bend directions that Gram matrices tell: less than f32 does.
const MAX_BEND: f64 = 1e-8;

/// How much of the style's directions a subject gives up.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Projection {
    /// All: t = 1.
    Hard,
    /// t = μ/(1 + μ); μ = 0 is the plain sum.
    Soft(f64),
}

impl Projection {
    /// t of `A − t·(A·V)·Vᵀ`.
    pub fn share(self) -> f64 {
        match self {
            Self::Hard => 1.0,
            // μ/(1 + μ), and right for an infinite μ.
            Self::Soft(mu) => 1.0 / (1.0 + 1.0 / mu),
        }
    }
}

/// Which of the style's right singular vectors are kept clear of subjects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Directions {
    /// All whose singular value is not negligible.
    #[default]
    All,
    /// At most this many, the strongest.
    Count(usize),
    /// As few as hold this share of `‖ΔW_s‖²`, in (0, 1].
    Energy(f64),
}

/// Options of [`NpLora`].
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct NpLoraOptions {
    /// How much subjects give up; `Soft(0.5)` by default, as published.
    pub projection: Projection,
    /// The same for layers whose name matches a pattern, in which `*` stands for anything and dots and underscores
    /// are alike; the last match counts.
    pub by_layer: Vec<(String, Projection)>,
    /// The style's directions.
    pub directions: Directions,
}

impl Default for NpLoraOptions {
    fn default() -> Self {
        Self { projection: Projection::Soft(0.5), by_layer: Vec::new(), directions: Directions::default() }
    }
}

/// NP-LoRA: the style is kept whole, subjects are projected off its input directions.
///
/// For each layer, with V (in × k) the right singular vectors of `ΔW_s = s_s·B_s·A_s`, the result is the ordinary LoRA of
/// rank r_s + r_c
///
/// ```text
/// A = [A_s; A_c − t·(A_c·V)·Vᵀ]     B = [s_s·B_s | s_c·B_c]     t = μ/(1 + μ), or 1 if hard
/// ```
///
/// whose ΔW is `ΔW_s + ΔW_c·(I − t·V·Vᵀ)`, where the second term is the closed form of
/// `min ‖X − ΔW_c‖² + μ·‖X·V‖²`. Of more subjects, each is projected off the span of the style and of all subjects before it
/// (our extension). ΔW is never formed: thin QR gives `A_s = L_A·Q_A` and `B_sᵀ = L_B·Q_B`, and the SVD of the r × r core
/// `L_Bᵀ·L_A` gives `Vᵀ = V_coreᵀ·Q_A`. So how an adapter splits ΔW into B and A does not matter.
///
/// Directions whose singular value is below 2.5e-7 of the largest count as none. All sums are f64 or double-single;
/// ‖VᵀV − I‖ ≤ 1e-6, and a hard projection leaves at most 1e-6 of ‖ΔW_c‖ in V, as f32 rounds it.
/// Layers of one adapter pass through unchanged. Beyond the paper: strengths, fewer directions, μ by layer.
///
/// # Example
/// ```no_run
/// use loraweld::{Adapter, Device, NpLora, SaveOptions};
/// # fn main() -> loraweld::Result<()> {
/// let device = Device::auto()?;
/// let (ink, cat) = (Adapter::open("ink.safetensors")?, Adapter::open("cat.safetensors")?);
/// let merged = NpLora::soft(0.5).merge(&device, ink.at(1.0), &[cat.at(0.9)])?;
/// merged.adapter.save("ink-cat.safetensors", &SaveOptions::default())?;
/// println!("{}", merged.report);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct NpLora {
    options: NpLoraOptions,
}

impl NpLora {
    /// With t = 1.
    pub fn hard() -> Self {
        Self::default().options(NpLoraOptions { projection: Projection::Hard, ..Default::default() })
    }

    /// With t = μ/(1 + μ).
    pub fn soft(mu: f64) -> Self {
        Self::default().options(NpLoraOptions { projection: Projection::Soft(mu), ..Default::default() })
    }

    /// Sets the options.
    pub fn options(self, options: NpLoraOptions) -> Self {
        Self { options }
    }

    /// Merges.
    ///
    /// # Errors
    /// As [`merge_with`](Self::merge_with).
    pub fn merge(&self, device: &Device, style: Weighted<'_>, subjects: &[Weighted<'_>]) -> Result<Merged> {
        self.merge_with(device, style, subjects, Control::default())
    }

    /// Merges, with progress and cancellation.
    ///
    /// # Errors
    /// [`Error::Invalid`] without subjects and for options out of range; as [`Plan::new`](crate::Plan::new); [`Error::Tensor`] for NaN
    /// or infinity in an adapter; [`Error::Layer`] if a result overflows f32; [`Error::Device`]; [`Error::Cancelled`].
    pub fn merge_with(
        &self,
        device: &Device,
        style: Weighted<'_>,
        subjects: &[Weighted<'_>],
        control: Control<'_>,
    ) -> Result<Merged> {
        let adapters: Vec<Weighted<'_>> = std::iter::once(style).chain(subjects.iter().copied()).collect();
        self.run(&Run::new(device, &adapters, control))
    }

    /// By a layer's name in the spelling of any member's file, or of its model.
    fn projection(&self, members: &[(&Layer, f64)]) -> Projection {
        let mut by_layer = self.options.by_layer.iter().rev();
        let of = by_layer.find(|(pattern, _)| members.iter().any(|(layer, _)| layer.matches(pattern)));
        of.map_or(self.options.projection, |(_, projection)| *projection)
    }

    /// How many of the singular values of the style count.
    fn count(&self, values: &[f64]) -> usize {
        let all = directions(values);
        match self.options.directions {
            Directions::All => all,
            Directions::Count(n) => n.min(all),
            Directions::Energy(share) => {
                let total: f64 = values.iter().map(|v| (v / values[0]).powi(2)).sum();
                let mut held = 0.0;
                let enough = values.iter().take_while(|v| {
                    let short = held < share * total;
                    held += (**v / values[0]).powi(2);
                    short
                });
                enough.count().min(all)
            }
        }
    }

    /// Merges layers on a device that has room for them; each has two members at least.
    fn chunk(&self, device: &Device, jobs: &[Job<'_>]) -> Result<Vec<Done>> {
        gram_first(jobs, |jobs| self.by_grams(device, jobs), |jobs| self.by_bases(device, jobs))
    }

    /// Where a layer has one subject and A is far enough from singular, Gram matrices tell all: V is a small matrix times
    /// A_s, so that factors are read twice and nothing of their size is written but the result. `None` of the others.
    fn by_grams(&self, device: &Device, jobs: &[Job<'_>]) -> Result<Vec<Option<Done>>> {
        let mut done: Vec<Option<Done>> = jobs.iter().map(|_| None).collect();
        let places: Vec<usize> = (0..jobs.len()).filter(|&i| jobs[i].members.len() == 2).collect();
        if places.is_empty() {
            return Ok(done);
        }
        let pairs: Vec<&Job<'_>> = places.iter().map(|&i| &jobs[i]).collect();
        let a = pairs.iter().map(|job| job.members.iter().map(|(layer, _)| layer.a()).collect()).collect();
        let a = Stacks::new(device, Side::Input, a)?;
        let grams = a.grams(device)?;
        let roots: Vec<Option<[Root; 2]>> = (&pairs, &grams)
            .into_par_iter()
            .map(|(job, gram)| {
                let ranks = [0, job.members[0].0.rank, gram.rows];
                let root = |k: usize| {
                    let n = ranks[k + 1] - ranks[k];
                    let own = Matrix::from_fn(n, n, |i, j| gram[(ranks[k] + i, ranks[k] + j)]);
                    Root::new(device, &own).filter(|root| root.bend <= MAX_BEND)
                };
                Some([root(0)?, root(1)?])
            })
            .collect();
        // Of the pairs, those for which this will do.
        let good: Vec<usize> = (0..pairs.len()).filter(|&i| roots[i].is_some()).collect();
        let mut transforms: Vec<Matrix> = grams.iter().map(|gram| Matrix::zeros(0, gram.rows)).collect();
        let roots: Vec<[Root; 2]> = roots.into_iter().flatten().collect();
        let jobs: Vec<&Job<'_>> = good.iter().map(|&i| pairs[i]).collect();
        let b = jobs.iter().flat_map(|job| job.members.iter().map(|(layer, _)| layer.b()));
        let b = lefts(device, &b.collect::<Vec<_>>())?;

        let entries: Vec<(usize, usize)> = (0..b.len()).map(|i| (i / 2, i % 2)).collect();
        let members: Vec<Member> = entries
            .par_iter()
            .zip(&b)
            .map(|(&(i, k), b)| Member::new(b, jobs[i].members[k].1, &roots[i][k].left))
            .collect();
        let cores: Vec<Matrix> = members.iter().map(|member| member.core.clone()).collect();
        let svds = svds(device, &cores, |k| jobs[entries[k].0].planned.name.clone())?;
        // Vᵀ = T·A of each member.
        let count = |i: usize| match i % 2 {
            0 => self.count(&svds[i].values),
            _ => directions(&svds[i].values),
        };
        let counts: Vec<usize> = (0..svds.len()).map(count).collect();
        let bases: Vec<Matrix> = (0..svds.len())
            .into_par_iter()
            .map(|i| {
                let Matrix { cols, data, .. } = &svds[i].right;
                let kept = Matrix { rows: counts[i], cols: *cols, data: data[..counts[i] * cols].to_vec() };
                times(&kept, &roots[i / 2][i % 2].inverse)
            })
            .collect();
        let mut parts: Vec<Projected> = (0..jobs.len())
            .into_par_iter()
            .map(|i| {
                let share = self.projection(&jobs[i].members).share();
                Projected::new(&grams[good[i]], &bases[2 * i], &bases[2 * i + 1], share)
            })
            .collect();
        let cosines: Vec<Matrix> = parts.par_iter().map(|part| square(&part.cosines)).collect();
        let cosines = ops::jacobi_svd(device, &cosines)?;
        for (&i, part) in good.iter().zip(&mut parts) {
            transforms[i] = std::mem::take(&mut part.transform);
        }
        let subjects = a.combined(device, &transforms)?;
        let merged: Vec<Done> = (&jobs, parts, cosines, &good)
            .into_par_iter()
            .enumerate()
            .map(|(i, (job, part, cosines, &place))| {
                let angles = &cosines.values[..counts[2 * i].min(counts[2 * i + 1])];
                let [before, after] = [&part.before, &part.after].map(|m| members[2 * i + 1].share(m));
                let report = report(job, 1, part.share, counts[2 * i], angles, before, after);
                let style = SingularValues { values: svds[2 * i].values.clone(), kept: counts[2 * i] };
                self.done(job, &subjects[place].data, style, vec![report])
            })
            .collect::<Result<_>>()?;
        for (i, merged) in good.into_iter().zip(merged) {
            done[places[i]] = Some(merged);
        }
        Ok(done)
    }

    /// The layer of the style's A and the subjects'.
    fn done(
        &self,
        job: &Job<'_>,
        subjects: &[f32],
        style: SingularValues,
        projections: Vec<ProjectionReport>,
    ) -> Result<Done> {
        let (first, _) = job.members[0];
        let mut data = Vec::with_capacity(first.rank * first.input + subjects.len());
        first.a().append_to(&mut data);
        data.extend_from_slice(subjects);
        let a = Matrix { rows: job.planned.rank, cols: first.input, data };
        let layer = joined_layer(&job.members, a, joined_b(&job.members))?;
        Ok(Done::new(layer, LayerReport::new(job.planned, Action::Projected { style, projections })))
    }

    /// With bases of the size of factors, which more subjects and any A need.
    fn by_bases(&self, device: &Device, jobs: &[&Job<'_>]) -> Result<Vec<Done>> {
        // The factors of every member of every layer are entries of one batch.
        let mut entries = Vec::new();
        let mut first = Vec::new();
        for (i, job) in jobs.iter().enumerate() {
            first.push(entries.len());
            entries.extend((0..job.members.len()).map(|m| (i, m)));
        }
        let layer = |&(i, m): &(usize, usize)| jobs[i].members[m].0;
        let rows = |side: Side, factor: fn(&Layer) -> RawMatrix<'_>| {
            let stacks: Vec<Vec<RawMatrix<'_>>> =
                entries.iter().map(|entry| vec![factor(layer(entry))]).collect();
            ScaledRows::new(device, side, &stacks)
        };
        let (a, b) = (rows(Side::Input, Layer::a)?, rows(Side::Output, Layer::b)?);
        let b = ops::qr_l(device, &b)?;
        let factors = ops::qr(device, &a)?;
        let members: Vec<Member> = entries
            .par_iter()
            .zip(b)
            .zip(&factors.l)
            .map(|((&(i, m), b), l)| Member::new(&b, jobs[i].members[m].1, l))
            .collect();
        let cores: Vec<Matrix> = members.iter().map(|member| member.core.clone()).collect();
        let svds = svds(device, &cores, |k| jobs[entries[k].0].planned.name.clone())?;
        let counts: Vec<usize> = entries
            .iter()
            .zip(&svds)
            .map(|((_, m), svd)| match m {
                0 => self.count(&svd.values),
                _ => directions(&svd.values),
            })
            .collect();
        let v = spanned(device, &svds, &counts, &factors.q)?;
        drop(factors);

        let mut projected: Vec<Vec<Matrix<f32>>> = jobs.iter().map(|_| Vec::new()).collect();
        let mut reports: Vec<Vec<ProjectionReport>> = jobs.iter().map(|_| Vec::new()).collect();
        let mut basis = v.select(&first);
        let mut active: Vec<usize> = (0..jobs.len()).collect();
        for step in 1.. {
            let here: Vec<usize> = active.iter().map(|&i| first[i] + step).collect();
            let shares: Vec<f64> =
                active.iter().map(|&i| self.projection(&jobs[i].members).share()).collect();
            let rows = a.select(&here);
            let off = ops::project_off(device, &rows.rows, &basis, &shares)?;
            let after = ops::inner(device, &off.rows, &basis)?.download(device)?;
            let cosines = ops::inner(device, &v.select(&here), &basis)?.download(device)?;
            let bases = self.kept(device, &basis)?;
            let cosines: Vec<Matrix> = cosines.par_iter().map(square).collect();
            let cosines = ops::jacobi_svd(device, &cosines)?;
            let mut results = off.rows.download_f32(device)?;
            let of = |(k, result): (usize, &mut Matrix<f32>)| {
                for (row, &e) in result.data.chunks_exact_mut(result.cols.max(1)).zip(&rows.exponents[k]) {
                    let scale = pow2(e) as f32;
                    row.iter_mut().for_each(|v| *v *= scale);
                }
                let share = |m: &Matrix| members[here[k]].share(&rows.unscale(k, m.clone()));
                let angles = &cosines[k].values[..bases[k].min(counts[here[k]])];
                let (before, after) = (share(&off.coefficients[k]), share(&after[k]));
                report(jobs[active[k]], step, shares[k], bases[k], angles, before, after)
            };
            let found: Vec<ProjectionReport> = results.par_iter_mut().enumerate().map(of).collect();
            for ((&i, result), report) in active.iter().zip(results).zip(found) {
                projected[i].push(result);
                reports[i].push(report);
            }
            let places: Vec<usize> =
                (0..active.len()).filter(|&k| jobs[active[k]].members.len() > step + 1).collect();
            if places.is_empty() {
                break;
            }
            active = places.iter().map(|&k| active[k]).collect();
            let rows = rows.select(&places);
            let entries: Vec<&Member> = places.iter().map(|&k| &members[here[k]]).collect();
            basis = extended(device, &rows, &basis.select(&places), &entries)?;
        }

        (jobs, projected, reports, first)
            .into_par_iter()
            .map(|(job, projected, projections, first)| {
                let subjects: Vec<f32> = projected.into_iter().flat_map(|m| m.data).collect();
                let style = SingularValues { values: svds[first].values.clone(), kept: counts[first] };
                self.done(job, &subjects, style, projections)
            })
            .collect()
    }

    /// How many directions each basis has.
    fn kept(&self, device: &Device, basis: &Batch) -> Result<Vec<usize>> {
        let grams = ops::inner(device, basis, basis)?.download(device)?;
        Ok(grams.iter().map(|g| (0..g.rows).filter(|&i| g[(i, i)] > 0.5).count()).collect())
    }
}

/// The first adapter is the style.
impl Method for NpLora {
    fn check(&self, adapters: usize) -> Result<()> {
        if adapters < 2 {
            return Err(Error::Invalid("np-lora needs a subject beside the style".into()));
        }
        let NpLoraOptions { projection, by_layer, directions } = &self.options;
        for projection in std::iter::once(projection).chain(by_layer.iter().map(|(_, p)| p)) {
            if let Projection::Soft(mu) = projection
                && (mu.is_nan() || *mu < 0.0)
            {
                return Err(Error::Invalid(format!("mu: {mu}, but it must not be negative")));
            }
        }
        match directions {
            Directions::Energy(share) if !(*share > 0.0 && *share <= 1.0) => {
                Err(Error::Invalid(format!("energy: {share}, but it must be above 0 and at most 1")))
            }
            Directions::Count(0) => Err(Error::Invalid(
                "directions: 0 would be the plain sum; take 1 or more, or the method linear".into(),
            )),
            _ => Ok(()),
        }
    }

    fn run(&self, run: &Run<'_>) -> Result<Merged> {
        self.check(run.adapters.len())?;
        let unmatched = |_: &Report| {
            let layers: Vec<&Layer> = run.adapters.iter().flat_map(|w| w.adapter.layers()).collect();
            let patterns = self.options.by_layer.iter().map(|(pattern, _)| pattern);
            patterns
                .filter(|pattern| !layers.iter().any(|layer| layer.matches(pattern)))
                .map(|pattern| format!("no layer matches `{pattern}`"))
                .collect()
        };
        driver::run(
            run,
            &Spec {
                method: "np-lora",
                options: json(&self.options)?,
                size: &|layer| size(run.device, layer.rank, layer.input, layer.output),
                rank: &|layer| layer.rank,
                merge: &|on, jobs| self.chunk(on, jobs),
                alone: false,
                is_sum: false,
                notes: &unmatched,
            },
        )
    }
}

/// One adapter's update of one layer, in its own coordinates.
struct Member {
    /// `s·L_Bᵀ`: ‖s·B·M‖ = ‖left·M‖ for any M.
    left: Matrix,
    /// `s·L_Bᵀ·L_A`, with ΔW's singular values.
    core: Matrix,
    /// ‖ΔW‖.
    norm: f64,
}

impl Member {
    /// Of L with `L·Lᵀ = BᵀB` (or of A).
    fn new(b: &Matrix, scale: f64, a: &Matrix) -> Self {
        let mut left = b.transposed();
        left.data.iter_mut().for_each(|v| *v *= scale);
        let core = times(&left, a);
        Self { norm: norm(&core), left, core }
    }

    /// `‖s·B·M‖ / ‖ΔW‖`.
    fn share(&self, m: &Matrix) -> f64 {
        if self.norm > 0.0 { norm(&times(&self.left, m)) / self.norm } else { 0.0 }
    }
}

/// A subject's A, projected off `Vᵀ = T_s·A_s`, in small matrices.
struct Projected {
    share: f64,
    /// `A_c' = transform·[A_s; A_c]`.
    transform: Matrix,
    /// `A_c·V`.
    before: Matrix,
    /// `A_c'·V`.
    after: Matrix,
    /// `V_cᵀ·V`.
    cosines: Matrix,
}

impl Projected {
    /// `gram`: of `[A_s; A_c]`; `style` and `subject`: T of their directions.
    fn new(gram: &Matrix, style: &Matrix, subject: &Matrix, share: f64) -> Self {
        let (r_s, r_c) = (style.cols, subject.cols);
        let block =
            |row: usize, rows: usize, cols: usize| Matrix::from_fn(rows, cols, |i, j| gram[(row + i, j)]);
        let (own, crossed, turned) = (block(0, r_s, r_s), block(r_s, r_c, r_s), style.transposed());
        let before = times(&crossed, &turned);
        let taken = times(&before, style);
        let transform = Matrix::from_fn(r_c, r_s + r_c, |i, j| match j.checked_sub(r_s) {
            None => -share * taken[(i, j)],
            Some(j) => f64::from(u8::from(i == j)),
        });
        let inside = times(&times(&taken, &own), &turned);
        let after = Matrix::from_fn(r_c, style.rows, |i, k| before[(i, k)] - share * inside[(i, k)]);
        let cosines = times(&times(subject, &crossed), &turned);
        Self { share, transform, before, after, cosines }
    }
}

/// On the member in this place, of which a share is taken out of so many directions.
fn report(
    job: &Job<'_>,
    place: usize,
    share: f64,
    directions: usize,
    cosines: &[f64],
    before: f64,
    after: f64,
) -> ProjectionReport {
    ProjectionReport {
        adapter: job.planned.members[place],
        share,
        directions,
        angles: cosines.iter().map(|c| c.min(1.0).acos().to_degrees()).collect(),
        removed: share * (2.0 - share) * before * before,
        before,
        after,
    }
}

/// L of each B, `L·Lᵀ = BᵀB`.
fn lefts(device: &Device, b: &[RawMatrix<'_>]) -> Result<Vec<Matrix>> {
    gram_first(
        b,
        |b| {
            let grams =
                Stacks::new(device, Side::Output, b.iter().map(|&b| vec![b]).collect())?.grams(device)?;
            let left = |gram: &Matrix| {
                Root::new(device, gram).filter(|root| root.error <= MAX_BEND).map(|root| root.left)
            };
            Ok(grams.par_iter().map(left).collect())
        },
        |b| {
            let stacks: Vec<_> = b.iter().map(|&&b| vec![b]).collect();
            ops::qr_l(device, &ScaledRows::new(device, Side::Output, &stacks)?)
        },
    )
}

/// ‖M‖ in the Frobenius norm, for any scale.
fn norm(m: &Matrix) -> f64 {
    let largest = m.data.iter().fold(0.0, |max, v| v.abs().max(max));
    if largest == 0.0 {
        return 0.0;
    }
    largest * m.data.iter().map(|v| (v / largest).powi(2)).sum::<f64>().sqrt()
}

/// With zero rows or columns.
fn square(m: &Matrix) -> Matrix {
    let n = m.rows.max(m.cols);
    Matrix::from_fn(n, n, |i, j| if i < m.rows && j < m.cols { m[(i, j)] } else { 0.0 })
}

/// Vᵀ of each: the first right singular vectors of the core, in the coordinates that Q gives them; then zero rows.
fn spanned(device: &Device, svds: &[Svd], counts: &[usize], q: &Batch) -> Result<Batch> {
    let rows: Vec<Matrix> = svds
        .par_iter()
        .zip(counts)
        .map(|(svd, &count)| {
            let mut rows = svd.right.clone();
            rows.data[count * rows.cols..].fill(0.0);
            rows
        })
        .collect();
    ops::rank_update(device, None, &ops::small(device, &rows)?, q)
}

/// The basis and the directions of the subject's rows that it lacks.
fn extended(device: &Device, rows: &ScaledRows, basis: &Batch, members: &[&Member]) -> Result<Batch> {
    let off = ops::project_off(device, &rows.rows, basis, &vec![1.0; members.len()])?;
    // What is left may be small in some rows.
    let left = off.rows.download(device)?;
    let left = left.into_par_iter().enumerate().map(|(k, m)| rows.unscale(k, m)).collect();
    let left = ScaledRows::from_matrices(device, left)?;
    let factors = ops::qr(device, &left)?;
    let cores: Vec<Matrix> = members.par_iter().zip(&factors.l).map(|(m, l)| times(&m.left, l)).collect();
    let svds = ops::jacobi_svd(device, &cores)?;
    let counts: Vec<usize> =
        members.iter().zip(&svds).map(|(m, svd)| significant(&svd.values, LEFT_OVER * m.norm)).collect();
    let new = spanned(device, &svds, &counts, &factors.q)?.download(device)?;
    let old = basis.download(device)?;
    // New directions are orthogonal to old ones as far as f32 allowed for what was left: once more.
    let joined = old
        .par_iter()
        .zip(&new)
        .map(|(old, new)| {
            let rows = old.data.chunks_exact(old.cols).chain(new.data.chunks_exact(new.cols));
            let data: Vec<f64> =
                rows.filter(|row| row.iter().any(|v| *v != 0.0)).flatten().copied().collect();
            Matrix { rows: data.len() / old.cols, cols: old.cols, data }
        })
        .collect();
    Ok(ops::qr(device, &ScaledRows::from_matrices(device, joined)?)?.q)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_takes_as_few_directions_as_hold_it() {
        let of = |directions| NpLora::default().options(NpLoraOptions { directions, ..Default::default() });
        let values = [2.0, 1.0, 1.0, 1e-9];
        assert_eq!(of(Directions::All).count(&values), 3);
        assert_eq!(of(Directions::Count(2)).count(&values), 2);
        assert_eq!(of(Directions::Energy(0.5)).count(&values), 1);
        assert_eq!(of(Directions::Energy(0.7)).count(&values), 2);
        assert_eq!(of(Directions::Energy(1.0)).count(&values), 3);
        assert_eq!(of(Directions::Energy(0.5)).count(&[0.0; 3]), 0);
    }

    #[test]
    fn norms_of_any_scale() {
        let of = |v: f64| norm(&Matrix { rows: 1, cols: 2, data: vec![3.0 * v, 4.0 * v] });
        for e in [-600, 0, 600] {
            assert_eq!(of(pow2(e)), 5.0 * pow2(e));
        }
    }
}
