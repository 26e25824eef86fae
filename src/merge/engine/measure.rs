//! What a merge loses, from statistics alone.

use std::collections::BTreeMap;
use std::ops::Range;

use rayon::prelude::*;

use crate::merge::algebra::{add, dot, least_squares, times, wide};
use crate::merge::members::{blocks, members};
use crate::merge::{Action, LayerReport, Losses, Merged, Plan, PlannedLayer, Routing, TaskLosses};
use crate::words;
use crate::{Calibration, Control, Layer, Matrix, RawMatrix, Result, Weighted};

/// Squared reconstruction errors.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Squares {
    merged: f64,
    sum: f64,
    average: f64,
    /// Of merging nothing.
    nothing: f64,
}

/// Gram matrices of the outputs of a merge `B'·C·A_cat`.
pub(crate) struct Outputs<'a> {
    /// `B'ᵀ·B'`, of the merge.
    pub merged: &'a Matrix,
    /// `B'ᵀ·B_cat`.
    pub crossed: &'a Matrix,
    /// `B_catᵀ·B_cat`, with scales and strengths, R × R.
    pub members: &'a Matrix,
    /// C.
    pub router: &'a Matrix,
}

/// `Σ_k G_k` of a layer's tasks, and Q, the rows of each G_k that are its own.
pub(crate) struct Statistics {
    pub g: Matrix,
    pub q: Matrix,
}

impl Squares {
    /// `L = ⟨B'ᵀB', C·G·Cᵀ⟩ − 2⟨B'ᵀB, C·Qᵀ⟩ + Σ_k⟨B_kᵀB_k, Q_kk⟩` of the merge, and with B' = B for C = I, I/K and 0.
    /// `blocks`: the members' rows.
    ///
    /// The difference of large terms leaves an error of about 1e-7 · L(0) where statistics are f32.
    pub fn new(outputs: &Outputs<'_>, statistics: &Statistics, blocks: &[Range<usize>]) -> Self {
        let (Outputs { merged, crossed, members: bb, router }, Statistics { g, q }) = (outputs, statistics);
        let nothing: f64 = blocks
            .iter()
            .flat_map(|block| block.clone().flat_map(|i| block.clone().map(move |j| (i, j))))
            .map(|at| bb[at] * q[at])
            .sum();
        let scaled = |c: f64| {
            let mut total = 0.0;
            for i in 0..g.rows {
                for j in 0..g.cols {
                    total += bb[(i, j)] * (c * c * g[(i, j)] - 2.0 * c * q[(j, i)]);
                }
            }
            total
        };
        let kept = dot(merged, &times(&times(router, g), &router.transposed()));
        let matched = dot(crossed, &times(router, &q.transposed()));
        // Rounding may leave a small negative number of a perfect fit.
        let squared = |rest: f64| f64::max(rest + nothing, 0.0);
        Self {
            merged: squared(kept - 2.0 * matched),
            sum: squared(scaled(1.0)),
            average: squared(scaled(1.0 / blocks.len() as f64)),
            nothing,
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.merged += other.merged;
        self.sum += other.sum;
        self.average += other.average;
        self.nothing += other.nothing;
    }

    /// `sqrt(L(R)/L(0))`; `None` if there was nothing to lose.
    pub fn relative(&self) -> Option<Losses> {
        let of = |square: f64| (square / self.nothing).sqrt();
        let losses = Losses { merged: of(self.merged), sum: of(self.sum), average: of(self.average) };
        let finite = losses.merged.is_finite() && losses.sum.is_finite() && losses.average.is_finite();
        (self.nothing > 0.0 && finite).then_some(losses)
    }
}

/// What routers pass on, squared, by adapter: the sums of a [`Routing`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Answers {
    /// `‖B_i·R_ij·Z_j‖²` by (i, j).
    passed: BTreeMap<(usize, usize), f64>,
    /// `‖B_j·Z_j‖²`.
    alone: BTreeMap<usize, f64>,
}

impl Answers {
    /// Of one layer: `‖B_i·R_ij·Z_j‖² = tr(B_iᵀB_i·R_ij·G_jj·R_ijᵀ)`. `grams`: of each member its adapter, its rows, and its own
    /// G. `bb`: BᵀB, with scales.
    pub fn new(members: &[(usize, Range<usize>, &Matrix)], bb: &Matrix, router: &Matrix) -> Self {
        let block = |m: &Matrix, rows: &Range<usize>, cols: &Range<usize>| {
            Matrix::from_fn(rows.len(), cols.len(), |i, j| m[(rows.start + i, cols.start + j)])
        };
        let mut all = Self::default();
        for (j, cols, gram) in members {
            let inputs = block(gram, cols, cols);
            all.alone.insert(*j, dot(&block(bb, cols, cols), &inputs).max(0.0));
            for (i, rows, _) in members {
                let router = block(router, rows, cols);
                let passed = times(&times(&router, &inputs), &router.transposed());
                all.passed.insert((*i, *j), dot(&block(bb, rows, rows), &passed).max(0.0));
            }
        }
        all
    }

    /// Adds those of a layer, if there are any.
    pub fn extend(&mut self, other: Option<Self>) {
        let Self { passed, alone } = other.unwrap_or_default();
        passed.into_iter().for_each(|(at, square)| *self.passed.entry(at).or_default() += square);
        alone.into_iter().for_each(|(at, square)| *self.alone.entry(at).or_default() += square);
    }

    /// Roots of the shares; `None` of fewer than two adapters.
    pub fn routing(&self) -> Option<Routing> {
        let known = |(&i, &square): (&usize, &f64)| (square > 0.0 && square.is_finite()).then_some(i);
        let adapters: Vec<usize> = self.alone.iter().filter_map(known).collect();
        let answer = |i: &usize, j: &usize| {
            self.passed.get(&(*i, *j)).map_or(0.0, |passed| (passed / self.alone[j]).sqrt())
        };
        let answers = adapters.iter().map(|i| adapters.iter().map(|j| answer(i, j)).collect()).collect();
        (adapters.len() > 1).then_some(Routing { adapters, answers })
    }
}

/// Share of a layer's update that may read what the calibration has not recorded, before it is worth a word.
const UNSEEN: f64 = 1e-3;

impl Merged {
    /// Finds the losses of this merge on the tokens of a calibration, by the same measure for every method.
    ///
    /// For each layer that several adapters have, with `A' ≈ C·A_cat` by least squares, the loss is
    /// `Σ_k ‖B'·C·Z_k − s_k·B_k·A_k·X_k‖²` relative to merging nothing ([`Losses`]), in f64 on the CPU. The statistics know
    /// inputs only by what A_cat sees of them. Most merges stay in the span of its rows; of one that leaves it (`ties`,
    /// `dare`, and `knots` with a rule on entries), the share of the update that the loss does not know is noted.
    ///
    /// `adapters`: those of the merge, at the same strengths, of which the calibration must have been made.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) or [`Error::File`](crate::Error::File) if the calibration was made for other
    /// adapters; as [`Plan::new`]; [`Error::Layer`](crate::Error::Layer) if a sum of the calibration overflows;
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn measured(
        mut self,
        calibration: &Calibration,
        adapters: &[Weighted<'_>],
        control: &Control<'_>,
    ) -> Result<Self> {
        let plan = Plan::new(adapters)?;
        let selected: Vec<_> = adapters.iter().map(|weighted| weighted.adapter).collect();
        let pool = calibration.select(&selected)?;
        let active: Vec<usize> = (0..adapters.len()).filter(|&i| adapters[i].strength != 0.0).collect();
        let tasks: Vec<usize> = active.iter().map(|&i| pool[i]).collect();
        let one = |planned: &PlannedLayer, merged: &Layer| {
            let members = members(planned, adapters);
            if members.len() < 2 {
                return Ok(None);
            }
            let places: Vec<usize> = planned.members.iter().map(|&i| pool[i]).collect();
            let statistics = calibration.statistics(&planned.key, &tasks, &places)?;
            let tokens = statistics.tasks.iter().map(|(_, tokens)| tokens).sum();
            let member = |adapter: &usize| planned.members.iter().position(|i| i == adapter);
            let parts: Vec<_> = active
                .iter()
                .map(member)
                .zip(statistics.tasks.iter().map(|(gram, _)| gram.as_ref()))
                .collect();
            // Of a member without tokens nothing is known that the merge could lose.
            if parts.iter().any(|(member, gram)| member.is_some() && gram.is_none()) {
                return Ok(None);
            }
            let blocks = blocks(&members);
            Ok(Some(Measured { tokens, ..measure(merged, &members, &parts, &blocks) }))
        };
        // Reports, plan and layers are all sorted by key.
        let mut measured = Vec::new();
        let pairs: Vec<_> = plan.layers().iter().zip(self.adapter.layers()).collect();
        for pairs in pairs.chunks(16) {
            control.step("measure", &pairs[0].0.name, measured.len(), plan.layers().len())?;
            let found: Vec<Option<Measured>> =
                pairs.par_iter().map(|(planned, merged)| one(planned, merged)).collect::<Result<_>>()?;
            measured.extend(found);
        }
        control.finish("measure", measured.len());
        let (mut total, mut unseen, mut count) = (Squares::default(), 0.0f64, 0);
        let mut of_tasks = vec![Squares::default(); active.len()];
        for (report, measured) in self.report.layers.iter_mut().zip(measured) {
            report.losses = None;
            let Some(measured) = measured else { continue };
            total.add(&measured.squares);
            of_tasks.iter_mut().zip(&measured.tasks).for_each(|(all, task)| all.add(task));
            report.tokens = Some(measured.tokens);
            report.losses = measured.squares.relative();
            if measured.unseen > UNSEEN {
                count += 1;
                unseen = unseen.max(measured.unseen);
            }
        }
        if count > 0 {
            self.report.notes.push(format!(
                "the losses of {} leave out what the merge reads outside of the adapters' own directions, up to {:.0} % of \
                 an update",
                words::count(count, "layer"),
                100.0 * unseen
            ));
        }
        let lacking = |l: &&LayerReport| l.action != Action::PassedThrough && l.losses.is_none();
        let lacking = self.report.layers.iter().filter(lacking).count();
        if lacking > 0 {
            let layers = words::count(lacking, "shared layer");
            self.report.notes.push(format!("no loss is known of {layers} without calibration tokens"));
        }
        self.report.losses = total.relative();
        let of_task = |(&adapter, squares): (&usize, &Squares)| {
            Some(TaskLosses { adapter, losses: squares.relative()? })
        };
        self.report.tasks = active.iter().zip(&of_tasks).filter_map(of_task).collect();
        Ok(self)
    }
}

struct Measured {
    squares: Squares,
    /// Of each task, of which those are the sum.
    tasks: Vec<Squares>,
    tokens: u64,
    /// ‖B'·(A' − C·A_cat)‖ / ‖B'·A'‖.
    unseen: f64,
}

impl Statistics {
    /// Of tasks that are members (by their place) or none.
    pub fn new(tasks: &[(Option<usize>, Option<&Matrix>)], blocks: &[Range<usize>]) -> Self {
        let order = blocks.last().map_or(0, |block| block.end);
        let (mut g, mut q) = (Matrix::zeros(order, order), Matrix::zeros(order, order));
        for (member, gram) in tasks {
            let Some(gram) = gram else { continue };
            add(&mut g, gram, 1.0, 0..order);
            if let Some(member) = member {
                add(&mut q, gram, 1.0, blocks[*member].clone());
            }
        }
        Self { g, q }
    }
}

/// The losses of one merged layer. `tasks`: each one's place among the members, and its G_k.
fn measure(
    layer: &Layer,
    members: &[(&Layer, f64)],
    tasks: &[(Option<usize>, Option<&Matrix>)],
    blocks: &[Range<usize>],
) -> Measured {
    let (a, b) = (scaled_rows(layer.a(), 1.0), wide(layer.b()));
    let stack = |rows: Vec<Matrix>| {
        let cols = rows.first().map_or(0, |m| m.cols);
        let data: Vec<f64> = rows.into_iter().flat_map(|m| m.data).collect();
        Matrix { rows: data.len() / cols.max(1), cols, data }
    };
    let a_cat = stack(members.iter().map(|(layer, _)| wide(layer.a())).collect());
    let b_cat = stack(members.iter().map(|(layer, s)| scaled_rows(layer.b(), *s).transposed()).collect());
    let b = b.map(|v| v * layer.scale.value);
    let bt = b.transposed();
    let inner = |x: &Matrix, y: &Matrix| times(x, &y.transposed());

    let router = least_squares(&inner(&a_cat, &a_cat), &inner(&a, &a_cat));
    let rest = {
        let mut rest = times(&router, &a_cat);
        rest.data.iter_mut().zip(&a.data).for_each(|(r, a)| *r -= a);
        rest
    };
    let merged = inner(&bt, &bt);
    let norm = |rows: &Matrix| dot(&merged, &inner(rows, rows)).max(0.0).sqrt();
    let whole = norm(&a);
    let unseen = if whole > 0.0 { norm(&rest) / whole } else { 0.0 };
    let outputs = Outputs {
        merged: &merged,
        crossed: &inner(&bt, &b_cat),
        members: &inner(&b_cat, &b_cat),
        router: &router,
    };
    let of = |tasks: &[_]| Squares::new(&outputs, &Statistics::new(tasks, blocks), blocks);
    // A task that is no member has nothing of its own to lose, and counts by what the merge does to it.
    let each = tasks.iter().map(|task| of(std::slice::from_ref(task))).collect();
    Measured { squares: of(tasks), tasks: each, tokens: 0, unseen }
}

fn scaled_rows(m: RawMatrix<'_>, scale: f64) -> Matrix {
    let mut m = wide(m);
    m.data.iter_mut().for_each(|v| *v *= scale);
    m
}
