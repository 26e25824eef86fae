//! Strengths, overlaps, singular value calibration and the fair balance, against dense definitions in f64.

use crate::baselines::{few, refactored};
use crate::common::fixtures::{
    POOL, Tensors, activations, at_one, calibrated, delta, plain, pool, stored, wide,
};
use crate::common::{devices, outer, product, relative, svd};
use loraweld::merge::{overlaps, strengths};
use loraweld::{
    Adapter, Control, Device, Linear, Matrix, Merged, Ssr, SsrOptions, TaskBalance, Truncation, Weighted,
};

fn square(m: &Matrix) -> f64 {
    m.data().iter().map(|v| v * v).sum()
}

/// What updates of each layer lose on each task's inputs, and what merging nothing loses: squares over all layers.
fn lost(adapters: &[Adapter], set: &str, update: impl Fn(&str) -> Matrix) -> Vec<(f64, f64)> {
    let mut squares = vec![(0.0, 0.0); adapters.len()];
    for layer in adapters[0].layers() {
        let update = update(layer.module());
        for (k, square_of) in squares.iter_mut().enumerate() {
            let x = Tensors::open(activations(set, POOL[k])).get(&stored(layer.module()));
            let own = delta(adapters[k].find(layer.module()).unwrap());
            let off = Matrix::from_fn(own.rows(), own.cols(), |i, j| update[(i, j)] - own[(i, j)]);
            square_of.0 += square(&product(&x, &off.transposed()));
            square_of.1 += square(&product(&x, &own.transposed()));
        }
    }
    squares
}

fn total(squares: &[(f64, f64)]) -> f64 {
    let sum = |of: fn(&(f64, f64)) -> f64| squares.iter().map(of).sum::<f64>();
    (sum(|s| s.0) / sum(|s| s.1)).sqrt()
}

fn summed(adapters: &[Adapter], strengths: &[f64], layer: &str) -> Matrix {
    let deltas: Vec<Matrix> = adapters.iter().map(|a| delta(a.find(layer).unwrap())).collect();
    let at = |i, j| deltas.iter().zip(strengths).map(|(d, s)| s * d[(i, j)]).sum();
    Matrix::from_fn(deltas[0].rows(), deltas[0].cols(), at)
}

#[test]
fn strengths_are_the_best_on_a_grid() {
    let adapters = few(&pool()[..2], 3);
    let weighted = at_one(&adapters);
    for case in devices() {
        let calibration = calibrated(&case.device, &adapters, "step1", &POOL[..2]);
        let found = strengths(&case.device, &calibration, &weighted, false, &Control::default()).unwrap();
        let best: Vec<f64> = found.blocks[0].strengths.iter().map(|s| s.unwrap()).collect();
        let of = |s: &[f64]| total(&lost(&adapters, "step1", |layer| summed(&adapters, s, layer)));
        // f32 statistics on one tier.
        assert!((of(&best) - found.loss).abs() <= 1e-5, "{}: {} {}", case.name, of(&best), found.loss);
        assert!((of(&[1.0, 1.0]) - found.given).abs() <= 1e-5, "{}", case.name);
        assert!((of(&[0.5, 0.5]) - found.average).abs() <= 1e-5, "{}", case.name);
        if case.device.is_gpu() {
            continue;
        }
        for i in -4..=4 {
            for j in -4..=4 {
                let near = [best[0] + 0.05 * f64::from(i), best[1] + 0.05 * f64::from(j)];
                assert!(of(&near) >= found.loss - 1e-12, "{near:?}");
            }
        }
    }
}

#[test]
fn strengths_of_the_four_concepts() {
    let adapters = pool();
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL);
    let control = Control::default();
    let found = strengths(&device, &calibration, &at_one(&adapters), false, &control).unwrap();
    let of = |strengths: &[Option<f64>]| strengths.iter().map(|s| s.unwrap()).collect::<Vec<_>>();
    println!("{found:?}");
    assert_eq!((found.layers, found.unknown, found.blocks[0].pattern.as_str()), (24, 0, "*"));
    // Known from a dense computation in float64.
    for (got, want) in of(&found.blocks[0].strengths).iter().zip([0.27, 0.37, 0.45, 0.56]) {
        assert!((got - want).abs() < 0.005, "{:?}", found.blocks);
    }
    assert!((found.loss - 0.698).abs() < 5e-4 && (found.given - 1.121).abs() < 5e-4, "{found:?}");
    // Block by block it is better, and its losses are of the blocks together.
    let blocks = strengths(&device, &calibration, &at_one(&adapters), true, &control).unwrap();
    assert_eq!(blocks.blocks.len(), 4);
    assert!(blocks.loss < found.loss && blocks.given == found.given);
    let at = |layer: &str| {
        let block =
            blocks.blocks.iter().find(|b| layer.starts_with(b.pattern.trim_end_matches('*'))).unwrap();
        summed(&adapters, &of(&block.strengths), layer)
    };
    // f64 statistics.
    assert!((total(&lost(&adapters, "traj4", at)) - blocks.loss).abs() < 1e-9);
    // Given strengths say how strong each is to be: half of all is half of each.
    let half: Vec<Weighted<'_>> = adapters.iter().map(|a| a.at(0.5)).collect();
    let halved = strengths(&device, &calibration, &half, false, &control).unwrap();
    for (x, y) in of(&halved.blocks[0].strengths).iter().zip(of(&found.blocks[0].strengths)) {
        assert!((2.0 * x - y).abs() < 1e-9);
    }
    // How a file splits its updates has no say.
    let others: Vec<_> = adapters.iter().enumerate().map(|(i, a)| refactored(a, i as u64)).collect();
    let calibration = calibrated(&device, &others, "traj4", &POOL);
    let same = strengths(&device, &calibration, &at_one(&others), false, &control).unwrap();
    for (x, y) in of(&same.blocks[0].strengths).iter().zip(of(&found.blocks[0].strengths)) {
        assert!((x - y).abs() < 1e-5);
    }
}

/// Orthonormal rows that span those of A.
fn basis(a: &Matrix) -> Matrix {
    svd(a).2
}

#[test]
fn overlaps_are_the_angles_between_what_adapters_read_and_write() {
    let mut adapters = few(&pool()[..3], 3);
    // A rank that is there twice counts once, and how updates are split does not matter.
    adapters[1] = refactored(&adapters[1], 5);
    let weighted = at_one(&adapters);
    for case in devices() {
        let found = overlaps(&case.device, &weighted, &Control::default()).unwrap();
        assert_eq!(found.layers.len(), 3);
        let mut sums = [[(0.0, 0.0); 3]; 3];
        for overlap in &found.layers {
            let factors: Vec<(Matrix, Matrix, Matrix)> = adapters
                .iter()
                .map(|adapter| {
                    let layer = adapter.layers().iter().find(|l| l.name() == overlap.layer).unwrap();
                    (delta(layer), basis(&wide(layer.a())), basis(&wide(layer.b()).transposed()))
                })
                .collect();
            for (x, (update, rows, cols)) in factors.iter().enumerate() {
                for (y, (_, other_rows, other_cols)) in factors.iter().enumerate() {
                    let got = overlap.pairs[x][y];
                    let mean = |u: &Matrix, v: &Matrix| {
                        square(&product(u, &v.transposed())) / u.rows().min(v.rows()) as f64
                    };
                    let within = square(&product(update, &other_rows.transposed()));
                    let (_, cosines, _) = svd(&product(rows, &other_rows.transposed()));
                    let what = format!("{}, {}: {x} and {y}", case.name, overlap.layer);
                    for (got, want) in [
                        (got.disturbs, within / square(update)),
                        (got.inputs, mean(rows, other_rows)),
                        (got.outputs, mean(cols, other_cols)),
                        (got.by_chance, other_rows.rows() as f64 / update.cols() as f64),
                        (got.angle.to_radians().cos(), cosines[0].min(1.0)),
                    ] {
                        // Sums are of the wide tier, of factors in f32.
                        assert!((got - want).abs() <= 1e-9, "{what}: {got} instead of {want}");
                    }
                    sums[x][y].0 += within;
                    sums[x][y].1 += square(update);
                }
            }
        }
        for (x, row) in sums.iter().enumerate() {
            for (y, (within, whole)) in row.iter().enumerate() {
                let got = found.all[x][y].unwrap().disturbs;
                assert!((got - within / whole).abs() <= 1e-9, "{}: {x} and {y}", case.name);
            }
        }
    }
}

/// Singular value calibration as the paper has it.
fn calibrated_values(merged: &Matrix, updates: &[Matrix]) -> Matrix {
    let (left, values, right) = svd(merged);
    let loudness = |r: usize| {
        let u = Matrix::from_fn(1, left.cols(), |_, j| left[(r, j)]);
        let said = product(&u, merged);
        let of = |update: &Matrix| {
            let own = product(&u, update);
            let both: f64 = said.data().iter().zip(own.data()).map(|(s, o)| s * o).sum();
            f64::max(1.0, both / square(&own))
        };
        updates.iter().map(of).sum::<f64>() / updates.len() as f64
    };
    let values: Vec<f64> = values.iter().enumerate().map(|(r, v)| v / loudness(r)).collect();
    outer(&left, &values, &right)
}

#[test]
fn singular_values_are_calibrated_as_the_paper_has_it() {
    let adapters = few(&pool(), 3);
    let weighted = [adapters[0].at(1.0), adapters[1].at(0.7), adapters[2].at(1.0), adapters[3].at(-1.0)];
    let control = Control::default();
    for case in devices() {
        let sum = Linear.merge(&weighted).unwrap();
        let small = sum.clone().truncated(&case.device, &Truncation::rank(6), &control).unwrap();
        for merged in [sum, small] {
            let got = merged.clone().singular_values_calibrated(&case.device, &weighted, &control).unwrap();
            for layer in got.adapter.layers() {
                let updates: Vec<Matrix> = weighted
                    .iter()
                    .map(|w| delta(w.adapter.find(layer.module()).unwrap()).map(|v| v * w.strength))
                    .collect();
                let before = merged.adapter.find(layer.module()).unwrap();
                let want = calibrated_values(&delta(before), &updates);
                let error = relative(&delta(layer), &want);
                // Factors are f32; vectors of near values mix, which rounding decides.
                assert!(error <= 1e-5, "{}, {}: {error:e}", case.name, layer.module());
                assert!(layer.rank() <= before.rank());
            }
            assert!(got.report.notes.iter().any(|note| note.contains("singular values")));
        }
    }
    // It makes a sum better.
    let adapters = pool();
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL);
    let weighted = at_one(&adapters);
    let loss = |merged: Merged| {
        merged.measured(&calibration, &weighted, &control).unwrap().report.losses.unwrap().merged
    };
    let sum = Linear.merge(&weighted).unwrap();
    let better = loss(sum.clone().singular_values_calibrated(&device, &weighted, &control).unwrap());
    // Known from a dense computation in float64: 1.121 and .663.
    assert!((loss(sum) - 1.121).abs() < 5e-4 && (better - 0.663).abs() < 5e-4, "{better}");
}

#[test]
fn a_fair_balance_makes_losses_equal() {
    let adapters = pool();
    let device = Device::cpu();
    let weighted = at_one(&adapters);
    let calibration = calibrated(&device, &adapters, "traj4", &POOL);
    let merged = |balance| {
        let options = SsrOptions { balance, ..SsrOptions::default() };
        Ssr::new(&calibration).options(options).merge(&device, &weighted).unwrap()
    };
    let losses = |merged: &Merged| -> Vec<f64> {
        let squares = lost(&adapters, "traj4", |layer| delta(merged.adapter.find(layer).unwrap()));
        squares.iter().map(|(lost, whole)| (lost / whole).sqrt()).collect()
    };
    let (plain, fair) = (merged(TaskBalance::Power(0.0)), merged(TaskBalance::Fair));
    let (before, after) = (losses(&plain), losses(&fair));
    let most = |of: &[f64]| of.iter().fold(0.0, |most, &v| f64::max(most, v));
    let least = |of: &[f64]| of.iter().fold(f64::INFINITY, |least, &v| f64::min(least, v));
    println!("{before:.3?} {after:.4?}");
    assert!(most(&after) < 0.75 * most(&before), "{before:?} {after:?}");
    assert!(most(&after) - least(&after) <= 1e-3, "{after:?}");
    let note = fair.report.notes.iter().find(|note| note.contains("fair balance")).unwrap();
    assert!(note.contains(&format!("{:.3}", before[0])), "{note}");
    // One that is not to count stays so.
    let options = SsrOptions {
        balance: TaskBalance::Fair,
        task_weights: Some(vec![1.0, 0.0, 1.0, 1.0]),
        ..SsrOptions::default()
    };
    let three = Ssr::new(&calibration).options(options).merge(&device, &weighted).unwrap();
    let after = losses(&three);
    let counted = [after[0], after[2], after[3]];
    assert!(most(&counted) - least(&counted) <= 1e-3 && after[1] > most(&counted), "{after:?}");
    assert!(
        Ssr::data_free()
            .options(SsrOptions { balance: TaskBalance::Fair, ..Default::default() })
            .check(4)
            .is_err()
    );
}

/// A plain layer's own statistics are what the fixtures say of it.
#[test]
fn fixtures_agree_with_the_tokens() {
    let adapters = pool();
    let layer = adapters[0].layers()[0].module().to_owned();
    let plain = plain(&at_one(&adapters), "traj4", &POOL, &layer);
    let turned = plain.orthonormal("traj4", &layer);
    let error = relative(&product(&turned.b, &turned.a), &product(&plain.b, &plain.a));
    // Two sums in f64.
    assert!(error < 1e-12, "{error:e}");
}
