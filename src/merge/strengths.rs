//! The strengths under which the plain sum of adapters loses least.

use std::collections::BTreeMap;
use std::ops::Range;

use faer::prelude::Solve;
use rayon::prelude::*;
use serde::Serialize;

use super::engine::measure::Statistics;
use super::members::{blocks, members};
use super::{Plan, PlannedLayer};
use crate::compute::ops::{Side, Stacks};
use crate::{Calibration, Control, Device, Layer, Matrix, Result, Weighted};

/// Strengths of adapters, of a whole file or block by block.
#[derive(Clone, Debug, Serialize)]
pub struct Strengths {
    /// One for the whole file, or one for each block in the order of names.
    pub blocks: Vec<BlockStrengths>,
    /// What the sum at these strengths loses, relative to merging nothing.
    pub loss: f64,
    /// What the sum loses at the strengths that were given.
    pub given: f64,
    /// What the average of these loses.
    pub average: f64,
    /// Layers that are shared and were recorded, from which the strengths come.
    pub layers: usize,
    /// Other layers of the adapters, of which nothing is known.
    pub unknown: usize,
}

/// Strengths on some layers.
#[derive(Clone, Debug, Serialize)]
pub struct BlockStrengths {
    /// A pattern that its layers' names match, `*` for the whole file.
    pub pattern: String,
    /// Of each adapter; none of one that has no layer there.
    pub strengths: Vec<Option<f64>>,
}

/// The squared loss of a sum at strengths c: `cᵀ·H·c − 2·hᵀ·c + nothing`.
#[derive(Clone)]
struct Square {
    /// K × K.
    h: Matrix,
    target: Vec<f64>,
    nothing: f64,
}

impl Square {
    fn new(adapters: usize) -> Self {
        Self { h: Matrix::zeros(adapters, adapters), target: vec![0.0; adapters], nothing: 0.0 }
    }

    fn add(&mut self, other: &Self) {
        self.h.data.iter_mut().zip(&other.h.data).for_each(|(s, v)| *s += v);
        self.target.iter_mut().zip(&other.target).for_each(|(s, v)| *s += v);
        self.nothing += other.nothing;
    }

    fn at(&self, c: &[f64]) -> f64 {
        let n = c.len();
        let kept: f64 =
            (0..n).flat_map(|i| (0..n).map(move |j| (i, j))).map(|at| c[at.0] * self.h[at] * c[at.1]).sum();
        let matched: f64 = c.iter().zip(&self.target).map(|(c, t)| c * t).sum();
        f64::max(kept - 2.0 * matched + self.nothing, 0.0)
    }

    /// Where it is least; 1 for adapters that do nothing here. Of strengths that come to the same, the smallest.
    fn least(&self) -> Vec<f64> {
        let having: Vec<usize> = (0..self.target.len()).filter(|&i| self.h[(i, i)] > 0.0).collect();
        let scale: Vec<f64> = having.iter().map(|&i| self.h[(i, i)].sqrt()).collect();
        let n = having.len();
        // At a diagonal of 1, with a ridge that only decides between what comes to the same.
        let matrix = faer::Mat::from_fn(n, n, |i, j| {
            self.h[(having[i], having[j])] / (scale[i] * scale[j]) + if i == j { 1e-10 } else { 0.0 }
        });
        let right = faer::Mat::from_fn(n, 1, |i, _| self.target[having[i]] / scale[i]);
        let found = matrix.full_piv_lu().solve(&right);
        let mut least = vec![1.0; self.target.len()];
        for (k, &i) in having.iter().enumerate() {
            least[i] = found[(k, 0)] / scale[k];
        }
        least
    }
}

/// The block that a layer belongs to: its name up to the first number, such as `transformer_blocks.3.*`.
fn block(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    match parts.iter().position(|part| part.parse::<u32>().is_ok()) {
        Some(i) if i + 1 < parts.len() => format!("{}.*", parts[..=i].join(".")),
        _ => name.to_owned(),
    }
}

/// Finds the strengths c under which the plain sum `Σ c_j·ΔW_j` does on each adapter's recorded inputs most nearly what
/// that adapter does there alone: those of the least `Σ_k ‖Σ_j c_j·ΔW_j·X_k − ΔW_k·X_k‖²`, over all layers together or,
/// with `per_block`, over each block of the model for itself. One solve of K × K.
///
/// ΔW_k is at the strength that is given; the strengths that are found replace it. A layer counts if the calibration has
/// tokens of all adapters that have it.
///
/// # Errors
/// As [`Plan::new`] and [`Calibration::select`]; [`Error::Device`](crate::Error::Device);
/// [`Error::Cancelled`](crate::Error::Cancelled).
pub fn strengths(
    device: &Device,
    calibration: &Calibration,
    adapters: &[Weighted<'_>],
    per_block: bool,
    control: &Control<'_>,
) -> Result<Strengths> {
    let plan = Plan::new(adapters)?;
    let selected: Vec<_> = adapters.iter().map(|weighted| weighted.adapter).collect();
    let pool = calibration.select(&selected)?;
    let active: Vec<usize> = (0..adapters.len()).filter(|&i| adapters[i].strength != 0.0).collect();
    let tasks: Vec<usize> = active.iter().map(|&i| pool[i]).collect();
    let mut squares: BTreeMap<String, Square> = BTreeMap::new();
    let (mut counted, mut unknown) = (0, 0);
    for planned in plan.layers().chunks(16) {
        control.step("measure", &planned[0].name, counted + unknown, plan.layers().len())?;
        let layers: Vec<Vec<(&Layer, f64)>> =
            planned.iter().map(|planned| members(planned, adapters)).collect();
        let b = layers.iter().map(|members| members.iter().map(|(layer, _)| layer.b()).collect()).collect();
        let grams = Stacks::new(device, Side::Output, b)?.grams(device)?;
        let one = |i: usize| {
            let (planned, members, gram) = (&planned[i], &layers[i], &grams[i]);
            let places: Vec<usize> = planned.members.iter().map(|&i| pool[i]).collect();
            let statistics = calibration.statistics(&planned.key, &tasks, &places)?;
            let member = |adapter: &usize| planned.members.iter().position(|i| i == adapter);
            let parts: Vec<_> = active
                .iter()
                .map(member)
                .zip(statistics.tasks.iter().map(|(gram, _)| gram.as_ref()))
                .collect();
            if parts.iter().any(|(member, gram)| member.is_some() && gram.is_none()) {
                return Ok(None);
            }
            let blocks = blocks(members);
            Ok(Some(square(
                planned,
                members,
                gram,
                &Statistics::new(&parts, &blocks),
                &blocks,
                adapters.len(),
            )))
        };
        let found: Vec<Option<Square>> =
            (0..planned.len()).into_par_iter().map(one).collect::<Result<_>>()?;
        for (planned, found) in planned.iter().zip(found) {
            let Some(found) = found else {
                unknown += 1;
                continue;
            };
            counted += 1;
            let pattern = if per_block { block(&planned.name) } else { "*".to_owned() };
            squares.entry(pattern).or_insert_with(|| Square::new(adapters.len())).add(&found);
        }
    }
    control.finish("measure", plan.layers().len());
    let nothing: f64 = squares.values().map(|square| square.nothing).sum();
    let share = |of: &dyn Fn(&Square) -> f64| match nothing > 0.0 {
        true => (squares.values().map(of).sum::<f64>() / nothing).sqrt(),
        false => 0.0,
    };
    let ones = vec![1.0; adapters.len()];
    let even = vec![1.0 / active.len().max(1) as f64; adapters.len()];
    let result = Strengths {
        loss: share(&|square| square.at(&square.least())),
        given: share(&|square| square.at(&ones)),
        average: share(&|square| square.at(&even)),
        blocks: squares
            .iter()
            .map(|(pattern, square)| {
                let least = square.least();
                let of = |i: usize| (square.h[(i, i)] > 0.0).then(|| least[i] * adapters[i].strength);
                BlockStrengths { pattern: pattern.clone(), strengths: (0..adapters.len()).map(of).collect() }
            })
            .collect(),
        layers: counted,
        unknown,
    };
    Ok(result)
}

/// Of one layer. `gram`: BᵀB of the files.
fn square(
    planned: &PlannedLayer,
    members: &[(&Layer, f64)],
    gram: &Matrix,
    statistics: &Statistics,
    blocks: &[Range<usize>],
    adapters: usize,
) -> Square {
    let mut square = Square::new(adapters);
    let sum = |x: &Range<usize>, y: &Range<usize>, of: &Matrix| -> f64 {
        let pairs = x.clone().flat_map(|i| y.clone().map(move |j| (i, j)));
        pairs.map(|at| gram[at] * of[at]).sum()
    };
    let scales: Vec<f64> = members.iter().map(|(_, scale)| *scale).collect();
    for (k, x) in blocks.iter().enumerate() {
        let i = planned.members[k];
        for (l, y) in blocks.iter().enumerate() {
            let both = scales[k] * scales[l];
            square.h[(i, planned.members[l])] += both * sum(x, y, &statistics.g);
            // Rows of Q are those of the task whose own outputs are wanted.
            square.target[planned.members[l]] += both * sum(x, y, &statistics.q);
        }
        square.nothing += scales[k] * scales[k] * sum(x, x, &statistics.q);
    }
    square
}

#[cfg(test)]
mod tests {
    use super::block;

    #[test]
    fn blocks_are_named_by_patterns() {
        for (name, pattern) in [
            ("transformer_blocks.3.attn.to_q", "transformer_blocks.3.*"),
            ("down_blocks.1.attentions.0.proj_in", "down_blocks.1.*"),
            ("proj_out", "proj_out"),
            ("text.layers.11", "text.layers.11"),
        ] {
            assert_eq!(block(name), pattern);
        }
    }
}
