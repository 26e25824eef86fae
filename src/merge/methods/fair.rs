//! The fair balance of SSR: weights of adapters by which the one that loses most loses as little as can be.

use rayon::prelude::*;

use super::ssr::{
    Coordinates, Job, Ssr, SsrOptions, StatisticsOf, TaskBalance, output_grams, sized_b, solve,
};
use crate::merge::algebra::{dot, times};
use crate::merge::engine::driver::{Method, Run};
use crate::merge::frame::Frame;
use crate::merge::members::members;
use crate::merge::{Merged, Plan, PlannedLayer};
use crate::{Device, Error, Layer, Matrix, Result};

/// How often the weights of a fair balance are changed at most.
const ROUNDS: usize = 60;

/// By how much the losses of a fair balance may differ, relative to the largest.
const EQUAL: f64 = 5e-4;

/// What does not depend on the weights of tasks.
struct Known {
    frame: Option<Frame>,
    /// BᵀB.
    bb: Matrix,
}

impl Ssr<'_> {
    /// Finds the weights of tasks by which the one that loses most loses least, and merges by them.
    pub(super) fn fair(
        &self,
        run: &Run<'_>,
        active: &[usize],
        statistics: &StatisticsOf<'_>,
    ) -> Result<Merged> {
        let Run { device, adapters, control, .. } = run;
        let plan = Plan::new(adapters)?;
        let members: Vec<(&PlannedLayer, Vec<(&Layer, f64)>)> = plan
            .layers()
            .iter()
            .filter(|planned| planned.members.len() > 1)
            .map(|planned| (planned, members(planned, adapters)))
            .collect();
        let mut jobs = Vec::new();
        for (planned, members) in &members {
            let job = Job::new(planned, members.clone(), adapters, active, statistics(planned)?);
            if job.lacking.is_none() {
                jobs.push(job);
            }
        }
        // What does not depend on the weights.
        let mut known: Vec<Known> = Vec::new();
        for chunk in jobs.chunks(16) {
            control.step("balance", &chunk[0].planned.name, known.len(), jobs.len())?;
            let chunk: Vec<&Job<'_>> = chunk.iter().collect();
            let mut frames = self.frames(device, &chunk)?.into_iter();
            let (b, scales) = sized_b(device, &chunk)?;
            let grams = output_grams(device, &b, &scales)?;
            known.extend(grams.into_iter().map(|bb| Known { frame: frames.next(), bb }));
        }
        control.finish("balance", jobs.len());
        let own = self.options.task_weights.clone().unwrap_or_else(|| vec![1.0; adapters.len()]);
        let mut weights = own.clone();
        // Of the weights so far, the fairest.
        let mut best: Option<(Vec<f64>, Vec<f64>)> = None;
        let mut first = Vec::new();
        for _ in 0..ROUNDS {
            control.check()?;
            let options = SsrOptions {
                task_weights: Some(weights.clone()),
                balance: TaskBalance::Power(0.0),
                ..self.options.clone()
            };
            let round = Ssr { options, ..*self };
            let losses = round.task_losses(device, &jobs, &known, active, adapters.len())?;
            let of = |losses: &[f64]| active.iter().map(|&i| losses[i]).fold(0.0, f64::max);
            if first.is_empty() {
                first.clone_from(&losses);
            }
            if best.as_ref().is_none_or(|(_, least)| of(&losses) < of(least)) {
                best = Some((weights.clone(), losses.clone()));
            }
            let counted: Vec<f64> =
                active.iter().filter(|&&i| own[i] > 0.0 && losses[i] > 0.0).map(|&i| losses[i]).collect();
            let (least, most) =
                counted.iter().fold((f64::INFINITY, 0.0), |(l, m), &v| (f64::min(l, v), f64::max(m, v)));
            if counted.len() < 2 || most - least <= EQUAL * most {
                break;
            }
            let mean = counted.iter().sum::<f64>() / counted.len() as f64;
            for &i in active {
                if own[i] > 0.0 && losses[i] > 0.0 {
                    weights[i] *= (losses[i] / mean).powi(2);
                }
            }
            let total: f64 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w *= adapters.len() as f64 / total);
        }
        let Some((weights, losses)) = best else {
            return Err(Error::Invalid("a fair balance needs an adapter".into()));
        };
        let options = SsrOptions {
            task_weights: Some(weights.clone()),
            balance: TaskBalance::Power(0.0),
            ..self.options.clone()
        };
        let mut merged = Ssr { options, ..*self }.run(run)?;
        let say = |values: &[f64]| {
            active.iter().map(|&i| format!("{:.3}", values[i])).collect::<Vec<_>>().join(", ")
        };
        merged.report.notes.push(format!(
            "the fair balance weighs the adapters {}, so that they lose {} each on their own inputs; at equal weights it \
             was {}",
            say(&weights),
            say(&losses),
            say(&first)
        ));
        Ok(merged)
    }

    /// What each adapter loses on its own inputs over all layers, relative to merging nothing; 0 of one that has none.
    fn task_losses(
        &self,
        device: &Device,
        jobs: &[Job<'_>],
        known: &[Known],
        active: &[usize],
        adapters: usize,
    ) -> Result<Vec<f64>> {
        let systems: Vec<_> = jobs
            .par_iter()
            .zip(known)
            .map(|(job, known)| self.system(job, known.frame.as_ref(), &known.bb))
            .collect();
        let solved = solve(device, &systems)?;
        let squares = |i: usize| {
            let (job, Known { frame, bb }) = (&jobs[i], &known[i]);
            let order = job.planned.rank;
            let router = match (&solved[i], frame) {
                (Ok(solved), Some(frame)) if self.options.coordinates == Coordinates::Orthonormal => {
                    frame.router(&solved.router)
                }
                (Ok(solved), _) => solved.router.clone(),
                // What cannot be routed is summed.
                (Err(_), _) => Matrix::from_fn(order, order, |i, j| f64::from(u8::from(i == j))),
            };
            let mut squares = vec![(0.0, 0.0); adapters];
            for task in &job.tasks {
                let Some(gram) = &task.gram else { continue };
                let square = |m: &Matrix| dot(bb, &times(&times(m, gram), &m.transposed())).max(0.0);
                let block = task.member.map_or(0..0, |member| job.blocks[member].clone());
                let is_own = |i: usize, j: usize| f64::from(u8::from(i == j && block.contains(&i)));
                let wanted = Matrix::from_fn(order, order, is_own);
                let off = Matrix::from_fn(order, order, |i, j| router[(i, j)] - wanted[(i, j)]);
                squares[task.adapter] = (square(&off), square(&wanted));
            }
            squares
        };
        let layers: Vec<Vec<(f64, f64)>> = (0..jobs.len()).into_par_iter().map(squares).collect();
        let total = |i: usize| {
            let sum = |of: fn(&(f64, f64)) -> f64| layers.iter().map(|layer| of(&layer[i])).sum::<f64>();
            let (lost, whole) = (sum(|s| s.0), sum(|s| s.1));
            if active.contains(&i) && whole > 0.0 { (lost / whole).sqrt() } else { 0.0 }
        };
        Ok((0..adapters).map(total).collect())
    }
}
