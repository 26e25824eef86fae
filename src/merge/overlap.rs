//! How far adapters are in each other's way, from their weights alone.

use rayon::prelude::*;
use serde::Serialize;

use super::frame::Frame;
use super::members::{blocks, members};
use super::{Plan, PlannedLayer, algebra};
use crate::compute::ops::Side;
use crate::{Control, Device, Layer, Matrix, Result, Weighted};

/// How far adapters overlap, layer by layer and in all.
#[derive(Clone, Debug, Serialize)]
pub struct Overlaps {
    /// In all, K × K: `[i][j]` tells of adapter i beside adapter j. None where they share no layer.
    pub all: Vec<Vec<Option<Overlap>>>,
    /// Layers that several adapters have, sorted by key.
    pub layers: Vec<LayerOverlap>,
}

/// How far the adapters of one layer overlap.
#[derive(Clone, Debug, Serialize)]
pub struct LayerOverlap {
    /// Its name.
    pub layer: String,
    /// Which adapters have it.
    pub adapters: Vec<usize>,
    /// Of each of these beside each.
    pub pairs: Vec<Vec<Overlap>>,
}

/// How far one adapter is in another's way.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Overlap {
    /// Share of the adapter's `‖ΔW‖²` that reads directions which the other reads, too: what a sum does twice on inputs of
    /// the other. 0: none; 1: all.
    pub disturbs: f64,
    /// What that would be of an adapter that reads random directions.
    pub by_chance: f64,
    /// Mean squared cosine of the principal angles between what both read, the rows of A.
    pub inputs: f64,
    /// … between what both write, the columns of B.
    pub outputs: f64,
    /// The smallest of the principal angles between what both read, in degrees.
    pub angle: f64,
}

/// Finds how far adapters overlap on the layers that they share.
///
/// With orthonormal bases Q_i of the rows of A_i and P_i of the columns of B_i, the principal angles are the arc cosines of
/// the singular values of `Q_i·Q_jᵀ` and `P_iᵀ·P_j`, and adapter i disturbs j by `‖ΔW_i·Q_jᵀ‖² / ‖ΔW_i‖²`. In all, layers
/// count by their `‖ΔW_i‖²`. Angles below 1e-5 degrees cannot be told from 0.
///
/// # Errors
/// As [`Plan::new`]; [`Error::Device`](crate::Error::Device); [`Error::Cancelled`](crate::Error::Cancelled).
pub fn overlaps(device: &Device, adapters: &[Weighted<'_>], control: &Control<'_>) -> Result<Overlaps> {
    let plan = Plan::new(adapters)?;
    let shared: Vec<&PlannedLayer> = plan.layers().iter().filter(|layer| layer.members.len() > 1).collect();
    let k = adapters.len();
    let mut sums = vec![vec![(Overlap::default(), 0.0, 0usize); k]; k];
    let mut layers = Vec::new();
    for chunk in shared.chunks(16) {
        control.step("overlap", &chunk[0].name, layers.len(), shared.len())?;
        let members: Vec<Vec<(&Layer, f64)>> =
            chunk.iter().map(|planned| members(planned, adapters)).collect();
        let slices: Vec<&[(&Layer, f64)]> = members.iter().map(Vec::as_slice).collect();
        let inputs = Frame::on(device, Side::Input, &slices)?;
        let outputs = Frame::on(device, Side::Output, &slices)?;
        let found: Vec<Vec<Vec<(Overlap, f64)>>> =
            (slices, &inputs, &outputs).into_par_iter().map(|(members, a, b)| pairs(members, a, b)).collect();
        for (planned, pairs) in chunk.iter().zip(found) {
            for (x, row) in pairs.iter().enumerate() {
                for (y, (pair, norm)) in row.iter().enumerate() {
                    let (sum, whole, count) = &mut sums[planned.members[x]][planned.members[y]];
                    sum.disturbs += norm * pair.disturbs;
                    sum.by_chance += norm * pair.by_chance;
                    sum.inputs += pair.inputs;
                    sum.outputs += pair.outputs;
                    sum.angle = if *count == 0 { pair.angle } else { sum.angle.min(pair.angle) };
                    *whole += norm;
                    *count += 1;
                }
            }
            layers.push(LayerOverlap {
                layer: planned.name.clone(),
                adapters: planned.members.clone(),
                pairs: pairs.into_iter().map(|row| row.into_iter().map(|(pair, _)| pair).collect()).collect(),
            });
        }
    }
    control.finish("overlap", shared.len());
    let mean = |(sum, whole, count): &(Overlap, f64, usize)| {
        let n = *count as f64;
        let share = |v: f64| if *whole > 0.0 { v / whole } else { 0.0 };
        (*count > 0).then(|| Overlap {
            disturbs: share(sum.disturbs),
            by_chance: share(sum.by_chance),
            inputs: sum.inputs / n,
            outputs: sum.outputs / n,
            angle: sum.angle,
        })
    };
    Ok(Overlaps { all: sums.iter().map(|row| row.iter().map(mean).collect()).collect(), layers })
}

/// Each member beside each, with `‖ΔW‖²` of the first. `a`, `b`: coordinates of what they read and write.
fn pairs(members: &[(&Layer, f64)], a: &Frame, b: &Frame) -> Vec<Vec<(Overlap, f64)>> {
    let blocks = blocks(members);
    let [read, written] = [a, b].map(|frame| frame.inputs(&frame.gram));
    let part = |m: &Matrix, x: usize, y: usize| {
        let (rows, cols) = (&blocks[x], &blocks[y]);
        Matrix::from_fn(rows.len(), cols.len(), |i, j| m[(rows.start + i, cols.start + j)])
    };
    let of = |x: usize, y: usize| {
        let (cosines, crossed) = (part(&read, x, y), part(&written, x, y));
        // ΔW_x·Q_yᵀ = P_x·L_b,xᵀ·L_a,x·(Q_x·Q_yᵀ), whose first factor changes no norm.
        let core = algebra::times(&b.left(x).transposed(), a.left(x));
        let square = |m: &Matrix| m.data.iter().map(|v| v * v).sum::<f64>();
        let (whole, within) = (square(&core), square(&algebra::times(&core, &cosines)));
        let mean = |m: &Matrix, ranks: [usize; 2]| {
            let least = ranks[0].min(ranks[1]);
            if least > 0 { square(m) / least as f64 } else { 0.0 }
        };
        let largest = largest(&cosines).min(1.0);
        let overlap = Overlap {
            disturbs: if whole > 0.0 { (within / whole).min(1.0) } else { 0.0 },
            by_chance: (a.rank_of(y) as f64 / members[y].0.input.max(1) as f64).min(1.0),
            inputs: mean(&cosines, [a.rank_of(x), a.rank_of(y)]).min(1.0),
            outputs: mean(&crossed, [b.rank_of(x), b.rank_of(y)]).min(1.0),
            angle: largest.acos().to_degrees(),
        };
        (overlap, members[x].1 * members[x].1 * whole)
    };
    (0..members.len()).map(|x| (0..members.len()).map(|y| of(x, y)).collect()).collect()
}

/// The largest singular value.
fn largest(m: &Matrix) -> f64 {
    let values = faer::MatRef::from_row_major_slice(&m.data, m.rows, m.cols).singular_values();
    values.ok().and_then(|values| values.first().copied()).unwrap_or(0.0)
}
