//! The metric of the data: how much each direction of an update does on what the layers were recorded to read.

use rayon::prelude::*;

use crate::compute::ops::{Root, Side, Stacks};
use crate::merge::algebra::{add, dot, least_squares, revealed, times};
use crate::merge::frame::Frame;
use crate::merge::members::{blocks, members};
use crate::merge::{Plan, PlannedLayer};
use crate::{Calibration, Device, Layer, LayerKey, Matrix, RawMatrix, Result, Weighted};

/// What recordings say about inputs of the layers of a merge.
pub(crate) struct Data<'a> {
    calibration: &'a Calibration,
    adapters: &'a [Weighted<'a>],
    plan: Plan,
    /// Places in the calibration of all adapters.
    pool: Vec<usize>,
    /// Places in the calibration of adapters that take part.
    tasks: Vec<usize>,
}

/// Of a layer `B'·A'`: how large `‖B'·M·A'·x‖²` is on the mean over its inputs, for any M.
pub(crate) struct Metric {
    /// `A'·Σ·A'ᵀ` with Σ, the second moment of inputs: those recorded, and with a small weight those from anywhere.
    moment: Matrix,
    /// `A'·A'ᵀ`.
    pub gram: Matrix,
    /// The mean of `‖s_k·B_k·A_k·x‖²` over recorded inputs, which is what merging nothing loses.
    pub nothing: f64,
}

/// Weight of inputs from anywhere, against the mean energy of the recorded ones in a direction that adapters read. Without
/// it, what no recording shows would be cut off first; calibrations are short.
const ANYWHERE: f64 = 0.03;

impl<'a> Data<'a> {
    /// Of the adapters of a merge, at its strengths.
    ///
    /// # Errors
    /// As [`Plan::new`] and [`Calibration::select`].
    pub fn new(calibration: &'a Calibration, adapters: &'a [Weighted<'a>]) -> Result<Self> {
        let plan = Plan::new(adapters)?;
        let selected: Vec<_> = adapters.iter().map(|weighted| weighted.adapter).collect();
        let pool = calibration.select(&selected)?;
        let active = (0..adapters.len()).filter(|&i| adapters[i].strength != 0.0);
        let tasks = active.map(|i| pool[i]).collect();
        Ok(Self { calibration, adapters, plan, pool, tasks })
    }

    /// The metrics of merged layers; `None` of those that have no recorded inputs of one of their adapters.
    pub fn metrics(&self, device: &Device, merged: &[&Layer]) -> Result<Vec<Option<Metric>>> {
        let known: Vec<Option<Known<'_>>> =
            merged.par_iter().map(|layer| self.known(layer)).collect::<Result<_>>()?;
        let all: Vec<&Known<'_>> = known.iter().flatten().collect();
        let a = all.iter().map(|known| known.inputs()).collect();
        let a = Stacks::new(device, Side::Input, a)?.grams(device)?;
        let b = all.iter().map(|known| known.members.iter().map(|(layer, _)| layer.b()).collect()).collect();
        let b = Stacks::new(device, Side::Output, b)?.grams(device)?;
        let metrics: Vec<Metric> =
            (all, a, b).into_par_iter().map(|(known, a, b)| known.metric(device, &a, &b)).collect();
        let mut metrics = metrics.into_iter();
        Ok(known.iter().map(|known| known.as_ref().and_then(|_| metrics.next())).collect())
    }

    fn planned(&self, key: &LayerKey) -> Option<&PlannedLayer> {
        let layers = self.plan.layers();
        layers.binary_search_by(|planned| planned.key.cmp(key)).ok().map(|i| &layers[i])
    }

    fn known<'l>(&'l self, merged: &'l Layer) -> Result<Option<Known<'l>>> {
        let Some(planned) = self.planned(&merged.key) else { return Ok(None) };
        let places: Vec<usize> = planned.members.iter().map(|&i| self.pool[i]).collect();
        let statistics = self.calibration.statistics(&planned.key, &self.tasks, &places)?;
        let of = |place: &usize| {
            let task = self.tasks.iter().position(|task| task == place)?;
            statistics.tasks[task].0.as_ref()
        };
        let Some(own) = places.iter().map(of).collect::<Option<Vec<&Matrix>>>() else { return Ok(None) };
        let members = members(planned, self.adapters);
        let own: Vec<Matrix> = own.into_iter().cloned().collect();
        let order = members.iter().map(|(layer, _)| layer.rank).sum();
        let mut gram = Matrix::zeros(order, order);
        let mut tokens = 0.0;
        for (task, n) in &statistics.tasks {
            let Some(task) = task else { continue };
            add(&mut gram, task, 1.0, 0..order);
            tokens += *n as f64;
        }
        Ok(Some(Known { merged, is_joined: is_joined(merged, &members), members, gram, own, tokens }))
    }
}

/// Whether a merged layer's A is that of its members, one below the other.
fn is_joined(merged: &Layer, members: &[(&Layer, f64)]) -> bool {
    let rows = |layer: &'_ Layer| {
        (0..layer.rank).map(|k| layer.a().row_range(k, k + 1).to_vec::<f32>()).collect::<Vec<_>>()
    };
    merged.rank == members.iter().map(|(layer, _)| layer.rank).sum::<usize>()
        && rows(merged).into_iter().eq(members.iter().flat_map(|(layer, _)| rows(layer)))
}

/// A merged layer of which recordings know something.
struct Known<'a> {
    merged: &'a Layer,
    members: Vec<(&'a Layer, f64)>,
    is_joined: bool,
    /// Σ G_k of all tasks.
    gram: Matrix,
    /// G_k of the members.
    own: Vec<Matrix>,
    tokens: f64,
}

impl<'a> Known<'a> {
    /// A_cat and, where it is something else, A'.
    fn inputs(&self) -> Vec<RawMatrix<'a>> {
        let own = (!self.is_joined).then(|| self.merged.a());
        self.members.iter().map(|(layer, _)| layer.a()).chain(own).collect()
    }

    /// `a`: the Gram matrix of [`inputs`](Self::inputs); `b`: `[B_1 … B_K]ᵀ·[B_1 … B_K]`.
    fn metric(&self, device: &Device, a: &Matrix, b: &Matrix) -> Metric {
        let order = self.gram.rows;
        let part = |row: usize, rows: usize, col: usize, cols: usize| {
            Matrix::from_fn(rows, cols, |i, j| a[(row + i, col + j)])
        };
        let joined = part(0, order, 0, order);
        let blocks = blocks(&self.members);
        let frame = Frame::of(device, joined.clone(), &blocks);
        let seen = frame.inputs(&self.gram);
        let trace: f64 = (0..order).map(|i| seen[(i, i)]).sum();
        let energy = trace / (self.tokens * frame.rank().max(1) as f64);
        let (moment, gram) = match self.is_joined {
            true => (self.gram.clone(), joined),
            false => {
                let rank = self.merged.rank;
                // A' = C·A_cat and a rest, of which nothing was recorded.
                let c = least_squares(&joined, &part(order, rank, 0, order));
                (times(&times(&c, &self.gram), &c.transposed()), part(order, rank, order, rank))
            }
        };
        let moment = Matrix::from_fn(gram.rows, gram.cols, |i, j| {
            let recorded = 0.5 * (moment[(i, j)] + moment[(j, i)]) / self.tokens;
            recorded + ANYWHERE * energy * gram[(i, j)]
        });
        let nothing = |((block, own), (_, scale)): ((&std::ops::Range<usize>, &Matrix), &(&Layer, f64))| {
            let square = |m: &Matrix| {
                Matrix::from_fn(block.len(), block.len(), |i, j| m[(block.start + i, block.start + j)])
            };
            scale * scale * dot(&square(b), &square(own))
        };
        let nothing: f64 = blocks.iter().zip(&self.own).zip(&self.members).map(nothing).sum();
        Metric { moment, gram, nothing: nothing / self.tokens }
    }
}

impl Metric {
    /// L with `L·Lᵀ = A'·Σ·A'ᵀ`.
    pub fn root(&self, device: &Device) -> Matrix {
        Root::new(device, &self.moment).map_or_else(|| revealed(&self.moment).0, |root| root.left)
    }
}
