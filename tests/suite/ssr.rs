//! SSR against the f64 references, the authors' code, and the formula in plain f64.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use crate::baselines::{few, refactored};
use crate::common::fixtures::{
    Formula, POOL, Tensors, activations, adapter, at_one, calibrated, data, delta, plain, pool, stored, wide,
};
use crate::common::{Case, Random, devices, gpus, product, relative};
use loraweld::compute::{DeviceOptions, Select};
use loraweld::{
    Absent, Action, Adapter, Calibration, Control, Coordinates, Device, Error, Format, Layer, Matrix, Merged,
    Precision, Prior, Ridge, SaveOptions, Source, Ssr, SsrOptions, TaskBalance, Truncation, Weighted,
};

/// The wide tiers are held to what an f32 result carries, over a condition of 1e5; f32 statistics to `auto`.
fn tolerance(case: &Case, auto: f64) -> f64 {
    match case.device.is_gpu() && case.device.precision() == Precision::Auto {
        true => auto,
        false => 1e-5,
    }
}

/// The largest relative difference of ΔW over all layers.
fn worst(merged: &Merged, want: impl Fn(&str) -> Matrix) -> f64 {
    let layers = merged.adapter.layers();
    let errors = layers.iter().map(|layer| relative(&delta(layer), &want(layer.module())));
    errors.fold(0.0, f64::max)
}

fn published(device: &Device, set: &str) -> Merged {
    let adapters = pool();
    let calibration = calibrated(device, &adapters, set, &POOL);
    Ssr::new(&calibration).options(SsrOptions::published()).merge(device, &at_one(&adapters)).unwrap()
}

#[test]
fn published_options_give_the_reference() {
    let factors = Tensors::open(data("reference/ssr_traj4_f64.safetensors"));
    for set in ["traj4", "step1"] {
        let reference = Tensors::open(data(&format!("reference/ssr_{set}_f64.safetensors")));
        for case in devices() {
            let merged = published(&case.device, set);
            let error = worst(&merged, |layer| {
                let b = reference.get(&format!("{layer}.lora_B.weight"));
                product(&b, &factors.get(&format!("{layer}.lora_A.weight")))
            });
            println!("{set}, {}: {error:.1e}", case.name);
            // f32 statistics move ΔW by up to 2e-3 where G/N + λI has a condition of 3e5.
            assert!(error <= tolerance(&case, 5e-3), "{set}, {}: {error:e}", case.name);
        }
    }
}

#[test]
fn published_options_give_what_the_authors_code_gives() {
    let factors = Tensors::open(data("reference/ssr_traj4_f64.safetensors"));
    let official = Tensors::open(data("reference/ssr_traj4_official_f32.safetensors"));
    for case in devices() {
        let merged = published(&case.device, "traj4");
        let error = worst(&merged, |layer| {
            let b = official.get(&format!("{layer}.lora_B.weight"));
            product(&b, &factors.get(&format!("{layer}.lora_A.weight")))
        });
        println!("{}: {error:.1e}", case.name);
        // Theirs is itself 1.1e-3 off, for its f32 statistics.
        assert!(error <= 5e-3, "{}: {error:e}", case.name);
    }
}

/// The formula of each layer, for all devices.
fn wants(adapters: &[Weighted<'_>], set: &str, tasks: &[&str], formula: &Formula) -> Vec<(String, Matrix)> {
    let first = adapters[0].adapter;
    let of = |layer: &Layer| {
        let want = plain(adapters, set, tasks, layer.module()).merged(set, layer.module(), formula);
        (layer.module().to_owned().clone(), want)
    };
    first.layers().iter().map(of).collect()
}

fn find(wants: &[(String, Matrix)], layer: &str) -> Matrix {
    wants.iter().find(|(name, _)| name == layer).unwrap_or_else(|| panic!("{layer}")).1.clone()
}

#[test]
fn the_default_is_the_formula() {
    let adapters = pool();
    for set in ["traj4", "step1"] {
        let wants = wants(&at_one(&adapters), set, &POOL, &Formula::default_of(4));
        for case in devices() {
            let calibration = calibrated(&case.device, &adapters, set, &POOL);
            let merged = Ssr::new(&calibration).merge(&case.device, &at_one(&adapters)).unwrap();
            let error = worst(&merged, |layer| find(&wants, layer));
            println!("{set}, {}: {error:.1e}", case.name);
            // The prior bounds the condition, and so what f32 statistics do.
            assert!(error <= tolerance(&case, 1e-4), "{set}, {}: {error:e}", case.name);
        }
    }
}

/// The CPU and one tier of a GPU: options change what the host assembles, not the kernels.
fn two_devices() -> Vec<Case> {
    devices().into_iter().filter(|case| ["CPU", "auto, f64"].contains(&case.name)).collect()
}

#[test]
fn options_do_what_the_formula_says() {
    let adapters = pool();
    let base = Formula::default_of(4);
    let options = SsrOptions::default();
    let cases = [
        (
            "task weights",
            SsrOptions { task_weights: Some(vec![1.0, 0.5, 2.0, 0.25]), ..options.clone() },
            Formula { weights: vec![1.0, 0.5, 2.0, 0.25], ..base.clone() },
        ),
        (
            "balance",
            SsrOptions { balance: TaskBalance::Power(0.5), ..options.clone() },
            Formula { balance: 0.5, ..base.clone() },
        ),
        (
            "neutral",
            SsrOptions { neutral_weight: 0.3, ..options.clone() },
            Formula { neutral: Some(("concept_c1_thick", 0.3)), ..base.clone() },
        ),
        (
            "average, relative",
            SsrOptions { prior: Prior::Average, ridge: Ridge::Relative(0.1), ..options.clone() },
            Formula { toward: 0.25, prior_weight: 0.0, relative: 0.1, ..base.clone() },
        ),
        (
            "sum, absolute",
            SsrOptions { prior: Prior::Sum, ridge: Ridge::Absolute(0.05), ..options.clone() },
            Formula { prior_weight: 0.0, absolute: Some(0.05), ..base.clone() },
        ),
        (
            "prior weight",
            SsrOptions { prior_weight: 1.0, ..options.clone() },
            Formula { prior_weight: 1.0, ..base.clone() },
        ),
        (
            "files' coordinates",
            SsrOptions { coordinates: Coordinates::Files, ..options.clone() },
            Formula { files: true, ..base.clone() },
        ),
    ];
    for (name, options, formula) in cases {
        let wants = wants(&at_one(&adapters), "step1", &POOL, &formula);
        for case in two_devices() {
            let mut calibration = calibrated(&case.device, &adapters, "step1", &POOL);
            let neutral = activations("step1", "concept_c1_thick");
            let control = Control::default();
            calibration.accumulate_file(&case.device, Source::Neutral, &neutral, &control).unwrap();
            let ssr = Ssr::new(&calibration).options(options.clone());
            let merged = ssr.merge(&case.device, &at_one(&adapters)).unwrap();
            let error = worst(&merged, |layer| find(&wants, layer));
            println!("{name}, {}: {error:.1e}", case.name);
            // As the default.
            assert!(error <= tolerance(&case, 1e-4), "{name}, {}: {error:e}", case.name);
        }
    }
}

#[test]
fn data_free_is_the_formula() {
    let adapters = pool();
    let base = Formula { data_free: true, ..Formula::default_of(4) };
    let options = SsrOptions::default();
    let cases = [
        (options.clone(), base.clone()),
        (SsrOptions { isotropic: 0.0, ..options.clone() }, Formula { isotropic: 0.0, ..base.clone() }),
        (
            SsrOptions { balance: TaskBalance::Power(0.5), ..options.clone() },
            Formula { balance: 0.5, ..base.clone() },
        ),
        (
            SsrOptions { coordinates: Coordinates::Files, ..options },
            Formula { files: true, isotropic: 0.0, ..base },
        ),
    ];
    for (options, formula) in cases {
        let wants = wants(&at_one(&adapters), "step1", &POOL, &formula);
        for case in devices() {
            let ssr = Ssr::data_free().options(options.clone());
            let merged = ssr.merge(&case.device, &at_one(&adapters)).unwrap();
            let error = worst(&merged, |layer| find(&wants, layer));
            println!("{options:?}, {}: {error:.1e}", case.name);
            // C·C squares the condition of A, which is mild.
            assert!(error <= tolerance(&case, 1e-4), "{options:?}, {}: {error:e}", case.name);
            assert!(merged.report.losses.is_none());
            let notes = &merged.report.notes;
            assert!(notes.iter().any(|note| note.contains("data-free proxy")), "{notes:?}");
        }
    }
}

#[test]
fn how_an_adapter_splits_its_update_changes_nothing() {
    let adapters = few(&pool(), 3);
    let others: Vec<_> = adapters.iter().enumerate().map(|(i, a)| refactored(a, i as u64)).collect();
    let priors = [Prior::Adapters, Prior::Sum, Prior::Zero, Prior::Average];
    let mut options: Vec<SsrOptions> =
        priors.map(|prior| SsrOptions { prior, ..SsrOptions::default() }).into();
    options.extend([
        SsrOptions { ridge: Ridge::Absolute(0.1), ..SsrOptions::default() },
        SsrOptions { ridge: Ridge::Relative(0.1), ..SsrOptions::default() },
        SsrOptions { balance: TaskBalance::Power(0.5), prior_weight: 1.0, ..SsrOptions::default() },
        SsrOptions { task_weights: Some(vec![1.0, 0.5, 2.0, 0.25]), ..SsrOptions::default() },
        SsrOptions { isotropic: 1.0, ..SsrOptions::default() },
    ]);
    for case in devices() {
        let [calibration, other] = [&adapters, &others].map(|a| calibrated(&case.device, a, "step1", &POOL));
        for options in &options {
            let pairs = [
                // Where nothing bounds the condition, f32 statistics move ΔW by up to 2e-3.
                (Ssr::new(&calibration), Ssr::new(&other), tolerance(&case, 5e-3)),
                // Nothing but A is in it, whose products are of the wide tier on every device.
                (Ssr::data_free(), Ssr::data_free(), 1e-5),
            ];
            for (x, y, tolerance) in pairs {
                let x = x.options(options.clone()).merge(&case.device, &at_one(&adapters)).unwrap();
                let y = y.options(options.clone()).merge(&case.device, &at_one(&others)).unwrap();
                let error = worst(&x, |layer| delta(y.adapter.find(layer).unwrap()));
                println!("{}, {options:?}, {}: {error:.1e}", case.name, x.report.method);
                // Factors are rounded to f32 anew, and statistics with them.
                assert!(error <= tolerance, "{}, {options:?}: {error:e}", case.name);
            }
        }
    }
    // The coordinates of the files do see it, as published.
    let device = Device::cpu();
    let [x, y] = [&adapters, &others].map(|adapters| {
        let options = SsrOptions { coordinates: Coordinates::Files, ..SsrOptions::default() };
        Ssr::data_free().options(options).merge(&device, &at_one(adapters)).unwrap()
    });
    assert!(worst(&x, |layer| delta(y.adapter.find(layer).unwrap())) > 0.1);
}

/// The largest difference of who feeds whom.
fn apart(x: &Merged, y: &Merged) -> f64 {
    let [x, y] = [x, y].map(|merged| merged.report.routing.as_ref().unwrap());
    assert_eq!(x.adapters, y.adapters);
    let pairs = x.answers.iter().flatten().zip(y.answers.iter().flatten());
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

#[test]
fn who_feeds_whom_does_not_depend_on_how_an_update_is_split() {
    let adapters = few(&pool(), 3);
    let scaled = |adapter: &Adapter| {
        let c = 4.0;
        let layers = adapter.layers().iter().map(|layer| {
            let a = wide(layer.a()).map(|v| (v / c) as f32);
            let b = wide(layer.b()).map(|v| (v * c) as f32);
            Layer::new(layer.module(), a, b).unwrap().with_scale(layer.scale().value)
        });
        Adapter::new(adapter.name(), adapter.format(), layers.collect()).unwrap()
    };
    let scaled: Vec<_> = adapters.iter().map(scaled).collect();
    let refactored: Vec<_> = adapters.iter().enumerate().map(|(i, a)| refactored(a, i as u64)).collect();
    for case in two_devices() {
        let [one, two, three] = [&adapters, &scaled, &refactored].map(|adapters| {
            let calibration = calibrated(&case.device, adapters, "step1", &POOL);
            Ssr::new(&calibration).merge(&case.device, &at_one(adapters)).unwrap()
        });
        // Factors are rounded to f32 anew, and statistics with them.
        assert!(apart(&one, &two) <= tolerance(&case, 1e-4), "{}: {}", case.name, apart(&one, &two));
        assert!(apart(&one, &three) <= tolerance(&case, 5e-3), "{}: {}", case.name, apart(&one, &three));
        assert!(Ssr::data_free().merge(&case.device, &at_one(&adapters)).unwrap().report.routing.is_none());

        let calibration = calibrated(&case.device, &adapters, "step1", &POOL);
        let to_sum = SsrOptions { prior: Prior::Sum, ridge: Ridge::Relative(1e9), ..SsrOptions::default() };
        let sum = Ssr::new(&calibration).options(to_sum).merge(&case.device, &at_one(&adapters)).unwrap();
        for (i, row) in sum.report.routing.unwrap().answers.into_iter().enumerate() {
            for (j, answer) in row.into_iter().enumerate() {
                // The ridge leaves 1e-9 of what is not the identity, times what blocks may have for a condition.
                assert!((answer - f64::from(u8::from(i == j))).abs() <= 1e-5, "{i} {j}: {answer}");
            }
        }
    }
}

#[test]
fn who_feeds_whom_is_what_comes_out_where() {
    // Each adapter writes to outputs of its own, so that the merged update shows what went through which.
    let (inputs, outputs, rank, tokens) = (11, [5, 7], 3, 40);
    let mut random = Random(5);
    let mut factors = |name: &str, which: usize| {
        let a = random.matrix(rank, inputs, 1.0);
        let rows = if which == 0 { 0..outputs[0] } else { outputs[0]..outputs[0] + outputs[1] };
        let b = random.matrix(outputs[0] + outputs[1], rank, 1.0);
        let b = Matrix::from_fn(b.rows(), rank, |i, k| if rows.contains(&i) { b[(i, k)] } else { 0.0 });
        let layer = Layer::new("layer", a.map(|v| v as f32), b.map(|v| v as f32)).unwrap();
        let layers = vec![layer];
        (Adapter::new(name, Format::Peft, layers).unwrap(), a, rows)
    };
    let made = [factors("one", 0), factors("two", 1)];
    let adapters: Vec<Adapter> = made.iter().map(|(adapter, ..)| adapter.clone()).collect();
    let weighted = [adapters[0].at(0.8), adapters[1].at(-1.5)];
    // Inputs that have a part in common.
    let x: Vec<Matrix> = (0..2).map(|_| random.matrix(tokens, inputs, 1.0).map(|v| v + 0.5)).collect();
    for case in two_devices() {
        let mut calibration = Calibration::new(&adapters).unwrap();
        for (task, x) in x.iter().enumerate() {
            let x = x.map(|v| v as f32);
            let x = loraweld::RawMatrix::from_f32(tokens, inputs, x.data()).unwrap();
            calibration.accumulate(&case.device, task, "layer", x).unwrap();
        }
        let merged = Ssr::new(&calibration).merge(&case.device, &weighted).unwrap();
        let routing = merged.report.routing.as_ref().unwrap();
        let b = wide(merged.adapter.layers()[0].b());
        for (j, (adapter, a, _)) in made.iter().enumerate() {
            let z = product(a, &x[j].map(|v| f64::from(v as f32)).transposed());
            let norm = |m: &Matrix, rows: std::ops::Range<usize>| {
                let squares = rows.flat_map(|i| (0..m.cols()).map(move |t| m[(i, t)].powi(2)));
                squares.sum::<f64>().sqrt()
            };
            let own = Matrix::from_fn(b.rows(), rank, |i, k| b[(i, j * rank + k)]);
            let out = product(&own, &z);
            let alone = product(&wide(adapter.layers()[0].b()), &z);
            let alone = norm(&alone, 0..b.rows()) * weighted[j].strength.abs();
            for (i, (.., rows)) in made.iter().enumerate() {
                let (want, got) = (norm(&out, rows.clone()) / alone, routing.answers[i][j]);
                assert!(want > 0.01, "{i} {j}: {want} tells little");
                // B is rounded to f32, and so are the statistics of `auto`.
                assert!(
                    (want - got).abs() <= tolerance(&case, 1e-4),
                    "{}, {i} {j}: {got}, {want}",
                    case.name
                );
            }
        }
    }
}

#[test]
fn quick_statistics_change_a_merge_little() {
    // Enough tokens and ranks for matrix units, and inputs that have much in common.
    let (width, rank, tokens) = (256, 80, 600);
    let mut random = Random(9);
    let layer = |random: &mut Random| {
        let (a, b) = (random.matrix(rank, width, 1.0), random.matrix(width, rank, 1.0));
        Layer::new("layer", a.map(|v| v as f32), b.map(|v| v as f32)).unwrap()
    };
    let adapters =
        ["one", "two"].map(|name| Adapter::new(name, Format::Peft, vec![layer(&mut random)]).unwrap());
    let weighted = [adapters[0].at(1.0), adapters[1].at(0.7)];
    let merged = |device: &Device, inputs: &[Vec<f32>]| {
        let mut calibration = Calibration::new(&adapters).unwrap();
        for (task, x) in inputs.iter().enumerate() {
            let x = loraweld::RawMatrix::from_f32(tokens, width, x).unwrap();
            calibration.accumulate(device, task, "layer", x).unwrap();
        }
        Ssr::new(&calibration).merge(device, &weighted).unwrap()
    };
    // README.md says these. One channel that outweighs the others takes the bits of what is small beside it.
    for (outlier, bound) in [(1.0, 1e-3), (100.0, 3e-3)] {
        let inputs: Vec<Vec<f32>> = (0..2)
            .map(|_| {
                let x = random.matrix(tokens, width, 1.0);
                let at = |i: usize| (x.data()[i] + 0.5) as f32 * if i % width == 7 { outlier } else { 1.0 };
                (0..tokens * width).map(at).collect()
            })
            .collect();
        let exact = delta(&merged(&Device::cpu(), &inputs).adapter.layers()[0]);
        for case in gpus().into_iter().filter(|case| case.name == "auto, f64") {
            let fast =
                DeviceOptions { select: Select::Gpu, precision: Precision::Fast, ..Default::default() };
            let [quick, auto] = [&Device::open(&fast).unwrap(), &case.device]
                .map(|device| worst(&merged(device, &inputs), |_| exact.clone()));
            println!("an outlier of {outlier}: {quick:.1e}; with `auto` {auto:.1e}");
            assert!(quick <= bound, "an outlier of {outlier}: {quick:.1e}");
        }
    }
}

#[test]
fn strengths_scale_updates_but_not_inputs() {
    let adapters = pool();
    let weighted = [adapters[0].at(0.8), adapters[1].at(-0.5), adapters[2].at(1.0), adapters[3].at(1.0)];
    let wants = wants(&weighted, "traj4", &POOL, &Formula::default_of(4));
    for case in two_devices() {
        let calibration = calibrated(&case.device, &adapters, "traj4", &POOL);
        let merged = Ssr::new(&calibration).merge(&case.device, &weighted).unwrap();
        let error = worst(&merged, |layer| find(&wants, layer));
        // As the default.
        assert!(error <= tolerance(&case, 1e-4), "{}: {error:e}", case.name);
    }
}

#[test]
fn an_adapter_at_strength_zero_is_as_if_it_were_not_there() {
    let adapters = pool();
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL);
    let three = Ssr::new(&calibration).merge(&device, &at_one(&adapters[..3])).unwrap();
    let mut weighted = at_one(&adapters);
    weighted[3].strength = 0.0;
    let zero = Ssr::new(&calibration).merge(&device, &weighted).unwrap();
    // The same numbers go in.
    assert_eq!(worst(&zero, |layer| delta(three.adapter.find(layer).unwrap())), 0.0);
    assert!(
        zero.report.notes.iter().any(|note| note.contains("concept_c4_invert")),
        "{:?}",
        zero.report.notes
    );
    assert!(zero.report.layers.iter().all(|layer| layer.adapters == [0, 1, 2] && layer.rank == 28));
}

#[test]
fn losses_are_those_of_the_tokens_themselves() {
    let adapters = pool();
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL);
    let merged = Ssr::new(&calibration).merge(&device, &at_one(&adapters)).unwrap();
    let (mut all, mut nothing) = ([0f64; 3], 0.0);
    // Of each task: the three losses, and nothing.
    let mut of_tasks = [[0f64; 4]; POOL.len()];
    for (layer, report) in merged.adapter.layers().iter().zip(&merged.report.layers) {
        let update = delta(layer);
        let singles: Vec<_> = adapters.iter().map(|a| delta(a.find(layer.module()).unwrap())).collect();
        let (mut loss, mut none) = ([0f64; 3], 0.0);
        for (k, task) in POOL.iter().enumerate() {
            let x = Tensors::open(activations("traj4", task)).get(&stored(layer.module()));
            let out = |dw: &Matrix| product(&x, &dw.transposed());
            let want = out(&singles[k]);
            let mut sum = Matrix::<f64>::zeros(want.rows(), want.cols());
            for single in &singles {
                sum.data_mut().iter_mut().zip(out(single).data()).for_each(|(s, v)| *s += v);
            }
            let got = out(&update);
            for (i, want) in want.data().iter().enumerate() {
                let sum = sum.data()[i];
                let errors = [got.data()[i] - want, sum - want, sum / 4.0 - want, *want];
                of_tasks[k].iter_mut().zip(errors).for_each(|(all, error)| *all += error * error);
                loss.iter_mut().zip(errors).for_each(|(all, error)| *all += error * error);
                none += want * want;
            }
        }
        let losses = report.losses.unwrap();
        let measured = [losses.merged, losses.sum, losses.average];
        for i in 0..3 {
            // The result is rounded to f32, the statistics are f64.
            assert!(
                ((loss[i] / none).sqrt() - measured[i]).abs() <= 1e-5 * measured[i],
                "{}",
                layer.module()
            );
            all[i] += loss[i];
        }
        nothing += none;
    }
    let total = merged.report.losses.unwrap();
    for (square, measured) in all.iter().zip([total.merged, total.sum, total.average]) {
        // As each layer's.
        assert!(((square / nothing).sqrt() - measured).abs() <= 1e-5 * measured);
    }
    let control = loraweld::Control::default();
    let measured = merged.clone().measured(&calibration, &at_one(&adapters), &control).unwrap();
    assert_eq!(measured.report.tasks.len(), POOL.len());
    for (task, of_task) in measured.report.tasks.iter().zip(of_tasks) {
        let losses = [task.losses.merged, task.losses.sum, task.losses.average];
        for (square, measured) in of_task.iter().zip(losses) {
            // As each layer's.
            assert!(((square / of_task[3]).sqrt() - measured).abs() <= 1e-5 * measured, "{}", task.adapter);
        }
    }
    assert!(total.merged < 0.5 * total.sum && total.merged < total.average, "{total:?}");
    println!("{}", merged.report);
    assert!(merged.report.to_string().contains("24 layers routed"));
    assert!(merged.report.to_string().contains("all routed layers"));
}

#[test]
fn one_adapter_alone_stays_as_it_is() {
    for case in devices() {
        for name in ["concept_c1_thick", "concept_c7_rot90"] {
            let adapter = adapter(name);
            let calibration = calibrated(&case.device, std::slice::from_ref(&adapter), "traj4", &[name]);
            for ssr in [Ssr::new(&calibration), Ssr::data_free()] {
                let merged = ssr.merge(&case.device, &[adapter.at(1.0)]).unwrap();
                for (got, want) in merged.adapter.layers().iter().zip(adapter.layers()) {
                    assert_eq!(got.a().bytes(), want.a().bytes());
                    assert_eq!(got.b().bytes(), want.b().bytes());
                    assert_eq!(got.scale(), want.scale());
                }
                assert!(merged.report.layers.iter().all(|l| l.action == Action::PassedThrough));
            }
        }
    }
}

#[test]
fn spellings_mix() {
    let device = Device::cpu();
    let adapters = pool();
    let mut mixed = adapters.clone();
    mixed[2] = adapter("concept_c1_thick.kohya");
    assert_eq!(mixed[2].format(), Format::Kohya);
    let calibration = calibrated(&device, &adapters, "traj4", &POOL);
    let want = Ssr::new(&calibration).merge(&device, &at_one(&adapters)).unwrap();
    let got = Ssr::new(&calibration).merge(&device, &at_one(&mixed)).unwrap();
    // Bit-equal tensors under other names.
    assert_eq!(worst(&got, |layer| delta(want.adapter.find(layer).unwrap())), 0.0);
    mixed.rotate_left(2);
    let kohya_first = Ssr::new(&calibration).merge(&device, &at_one(&mixed)).unwrap();
    assert_eq!(kohya_first.adapter.format(), Format::Kohya);
    let name = &kohya_first.report.layers[0].layer;
    assert!(name.contains('.'), "`{name}`: dots are known from the others");
}

#[test]
fn layers_of_one_file_share_a_prefix() {
    let few = |layer: &Layer| layer.module().contains("blocks.0.") || layer.module().contains("blocks_0_");
    let mirror = adapter("concept_c3_mirror");
    let part = |adapter: &Adapter, keep: &dyn Fn(&Layer) -> bool| {
        let layers = adapter.layers().iter().filter(|layer| keep(layer)).cloned().collect();
        Adapter::new(adapter.name(), adapter.format(), layers).unwrap()
    };
    let heart = part(&Adapter::open(data("loras/content_heart.peft")).unwrap(), &few);
    let thick = adapter("concept_c1_thick.kohya");
    assert_ne!(heart.layers()[0].prefix(), mirror.layers()[0].prefix());
    let folder = tempfile::tempdir().unwrap();
    let less = |adapter: &Adapter| part(adapter, &|layer| !few(layer));
    for (i, adapters) in
        [[less(&mirror), heart.clone()], [heart, thick.clone()], [less(&thick), mirror]].iter().enumerate()
    {
        let merged = Ssr::data_free().merge(&Device::cpu(), &at_one(adapters)).unwrap();
        let path = folder.path().join(format!("{i}.safetensors"));
        merged.adapter.save(&path, &SaveOptions::default()).unwrap();
        let read = Adapter::open(&path).unwrap();
        let prefix = &read.layers()[0].prefix();
        assert_eq!(read.layers().len(), 24);
        assert!(read.layers().iter().all(|layer| layer.prefix() == *prefix), "{i}: not all have `{prefix}`");
    }
}

/// An adapter of some of the layers, with A and B multiplied.
fn changed(adapter: &Adapter, keep: impl Fn(&Layer) -> bool, by_a: f32, by_b: f32) -> Adapter {
    let times = |m: Matrix, by: f64| m.map(|v| (v * by) as f32);
    let layers = adapter.layers().iter().filter(|layer| keep(layer)).map(|layer| {
        let a = times(wide(layer.a()), by_a.into());
        let b = times(wide(layer.b()), f64::from(by_b) * layer.scale().value);
        Layer::new(&format!("transformer.{}", layer.module()), a, b).unwrap()
    });
    Adapter::new(adapter.name(), Format::Peft, layers.collect()).unwrap()
}

#[test]
fn layers_may_be_missing() {
    let mut adapters = pool();
    // Two share block 0, only the first has `to_out` of it, and the third lacks it.
    adapters.truncate(3);
    let block = |layer: &Layer| layer.module().starts_with("transformer_blocks.0");
    adapters[1] = changed(&adapters[1], |l| block(l) && !l.module().contains("to_out"), 1.0, 1.0);
    adapters[2] = changed(&adapters[2], |l| !block(l), 1.0, 1.0);
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL[..3]);
    let merged = Ssr::new(&calibration).merge(&device, &at_one(&adapters)).unwrap();
    for (layer, report) in merged.adapter.layers().iter().zip(&merged.report.layers) {
        let members: Vec<usize> = (0..3).filter(|&i| adapters[i].find(layer.module()).is_some()).collect();
        assert_eq!(report.adapters, members);
        let alone = members.len() == 1;
        assert_eq!(
            report.action.kind(),
            if alone { "passed-through" } else { "routed" },
            "{}",
            layer.module()
        );
        // All three tasks' tokens count, also those of the one that lacks the layer.
        assert_eq!(report.tokens, if alone { None } else { Some(3 * 192) });
    }
    // What an adapter that lacks the layer sees is as neutral inputs of weight 1, but for the token count.
    let layer = "transformer_blocks.0.ff.net.2";
    let formula = Formula { neutral: Some((POOL[2], 1.0)), ..Formula::default_of(2) };
    let want = plain(&at_one(&adapters[..2]), "traj4", &POOL[..2], layer).merged("traj4", layer, &formula);
    let error = relative(&delta(merged.adapter.find(layer).unwrap()), &want);
    // f64 rounded to f32.
    assert!(error <= 1e-6, "{error:e}");
}

#[test]
fn singular_statistics_are_reported() {
    let one = adapter("concept_c3_mirror");
    let adapters = [one.clone(), one.clone()];
    let names = [POOL[0], POOL[0]];
    for case in devices() {
        let calibration = calibrated(&case.device, &adapters, "traj4", &names);
        for prior in [Prior::Sum, Prior::Zero, Prior::Adapters, Prior::Average] {
            let options = SsrOptions { ridge: Ridge::Relative(0.0), prior, ..SsrOptions::default() };
            let ssr = Ssr::new(&calibration).options(options);
            let merged = ssr.merge(&case.device, &at_one(&adapters)).unwrap();
            merged.adapter.check_finite().unwrap();
            for layer in &merged.report.layers {
                let ridge = matches!(layer.action, Action::Routed { ridge } if ridge > 0.0);
                assert!(!layer.notes.is_empty() && ridge, "{}, {prior:?}: {layer:?}", case.name);
            }
        }
    }
}

#[test]
fn statistics_of_nothing_are_summed() {
    let device = Device::cpu();
    let adapters = pool();
    let mut calibration = Calibration::new(&adapters).unwrap();
    let zeros = vec![0f32; 4 * 512];
    for layer in adapters[0].layers() {
        for task in 0..4 {
            let x = loraweld::RawMatrix::from_f32(4, layer.input(), &zeros[..4 * layer.input()]).unwrap();
            calibration.accumulate(&device, task, layer.module(), x).unwrap();
        }
    }
    let merged = Ssr::new(&calibration).merge(&device, &at_one(&adapters)).unwrap();
    assert_summed(&merged, &adapters);
}

#[test]
fn without_activations_a_layer_is_summed_aloud() {
    let device = Device::cpu();
    let adapters = pool();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL[..3]);
    assert_eq!(calibration.missing().len(), 24);
    let merged = Ssr::new(&calibration).merge(&device, &at_one(&adapters)).unwrap();
    assert_summed(&merged, &adapters);
    let text = merged.report.to_string();
    assert!(text.contains("could not be routed") && text.contains("concept_c4_invert"), "{text}");
}

fn assert_summed(merged: &Merged, adapters: &[Adapter]) {
    for (layer, report) in merged.adapter.layers().iter().zip(&merged.report.layers) {
        assert!(matches!(&report.action, Action::Summed { why } if !why.is_empty()), "{report:?}");
        let mut want = Matrix::zeros(layer.output(), layer.input());
        for adapter in adapters {
            let single = delta(adapter.find(layer.module()).unwrap());
            want.data_mut().iter_mut().zip(single.data()).for_each(|(w, s)| *w += s);
        }
        // B is exact up to one rounding to f32.
        assert!(relative(&delta(layer), &want) <= 1e-7);
    }
}

#[test]
fn a_calibration_of_other_adapters_is_refused() {
    let device = Device::cpu();
    let adapters = pool();
    let calibration = calibrated(&device, &adapters, "step1", &POOL);
    let other = [adapters[0].clone(), adapter("content_heart")];
    let error = Ssr::new(&calibration).merge(&device, &at_one(&other)).unwrap_err().to_string();
    assert!(error.contains("content_heart") && error.contains("concept_c3_mirror"), "{error}");
}

#[test]
fn subsets_and_orders_of_the_pool_merge() {
    let device = Device::cpu();
    let adapters = pool();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL);
    let some = [adapters[3].clone(), adapters[0].clone()];
    let merged = Ssr::new(&calibration).merge(&device, &at_one(&some)).unwrap();
    let wants = wants(&at_one(&some), "traj4", &[POOL[3], POOL[0]], &Formula::default_of(2));
    // f64 rounded to f32.
    assert!(worst(&merged, |layer| find(&wants, layer)) <= 1e-6);
}

#[test]
fn tiny_and_huge_factors_merge() {
    let adapters = pool();
    // The same updates with A scaled by a power of two.
    let scaled = |e: i32| -> Vec<Adapter> {
        adapters.iter().map(|a| changed(a, |_| true, 2f32.powi(e), 2f32.powi(-e))).collect()
    };
    let options = SsrOptions { prior: Prior::Zero, ridge: Ridge::Relative(1e-3), ..SsrOptions::default() };
    for case in devices() {
        let merge = |adapters: &[Adapter]| {
            let calibration = calibrated(&case.device, adapters, "traj4", &POOL);
            Ssr::new(&calibration).options(options.clone()).merge(&case.device, &at_one(adapters)).unwrap()
        };
        let want = merge(&adapters);
        for e in [-90, 90] {
            let got = merge(&scaled(e));
            let error = worst(&got, |layer| delta(want.adapter.find(layer).unwrap()));
            // The same arithmetic, but for scales that are folded elsewhere.
            assert!(error <= tolerance(&case, 1e-4), "{}, 2^{e}: {error:e}", case.name);
        }
    }
}

#[test]
fn two_runs_write_the_same_bytes() {
    let adapters = pool();
    let folder = tempfile::tempdir().unwrap();
    for (i, case) in devices().iter().enumerate() {
        let file = |run: usize| {
            let calibration = calibrated(&case.device, &adapters, "step1", &POOL);
            let merged = Ssr::new(&calibration).merge(&case.device, &at_one(&adapters)).unwrap();
            let path = folder.path().join(format!("{i}-{run}.safetensors"));
            merged.adapter.save(&path, &SaveOptions::default()).unwrap();
            let calibration_path = folder.path().join(format!("{i}-{run}.calibration"));
            calibration.save(&calibration_path, false).unwrap();
            (std::fs::read(path).unwrap(), std::fs::read(calibration_path).unwrap())
        };
        assert!(file(0) == file(1), "{}", case.name);
    }
    let saved = Adapter::open(folder.path().join("0-0.safetensors")).unwrap();
    let metadata = saved.metadata();
    assert_eq!(metadata["loraweld.method"], "ssr");
    assert!(metadata["loraweld.inputs"].contains("concept_c7_rot90"), "{metadata:?}");
    assert!(metadata["loraweld.options"].contains("prior"), "{metadata:?}");
    assert!(!metadata.contains_key("lora_adapter_metadata"));
    assert!(saved.layers().iter().all(|layer| layer.scale().value == 1.0 && layer.rank() == 36));
}

#[test]
fn little_memory_gives_the_same() {
    let adapters = pool();
    let options = loraweld::DeviceOptions {
        select: loraweld::Select::Cpu,
        memory: Some(600_000),
        ..Default::default()
    };
    let (little, much) = (Device::open(&options).unwrap(), Device::cpu());
    let merge = |device: &Device| {
        let calibration = calibrated(device, &adapters, "traj4", &POOL);
        Ssr::new(&calibration).merge(device, &at_one(&adapters)).unwrap()
    };
    let (got, want) = (merge(&little), merge(&much));
    // Sums may be rounded in another order.
    assert!(worst(&got, |layer| delta(want.adapter.find(layer).unwrap())) <= 1e-6);
}

#[test]
fn options_out_of_range_are_refused() {
    let adapters = pool();
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "step1", &POOL);
    let default = SsrOptions::default();
    for (options, word) in [
        (SsrOptions { ridge: Ridge::Absolute(-1.0), ..default.clone() }, "ridge"),
        (SsrOptions { prior_weight: f64::NAN, ..default.clone() }, "prior weight"),
        (SsrOptions { task_weights: Some(vec![1.0]), ..default.clone() }, "task weights"),
        (SsrOptions { neutral_weight: 0.1, ..default.clone() }, "neutral"),
        (SsrOptions { balance: TaskBalance::Power(f64::INFINITY), ..default.clone() }, "balance"),
    ] {
        let error = Ssr::new(&calibration).options(options).merge(&device, &at_one(&adapters)).unwrap_err();
        assert!(matches!(&error, Error::Invalid(text) if text.contains(word)), "{error}");
    }
    let error = Ssr::new(&calibration).merge(&device, &[adapters[0].at(f64::NAN)]).unwrap_err().to_string();
    assert!(error.contains("concept_c3_mirror") && error.contains("NaN"), "{error}");
    assert!(Ssr::new(&calibration).merge(&device, &[]).is_err());
}

#[test]
fn adapters_of_other_models_are_refused() {
    let good = adapter("concept_c3_mirror");
    let layer = &good.layers()[0];
    let other = Layer::new(layer.module(), Matrix::zeros(2, 7), Matrix::zeros(layer.output(), 2)).unwrap();
    let other = Adapter::new("other", Format::Peft, vec![other]).unwrap();
    for error in [
        loraweld::Plan::new(&[good.at(1.0), other.at(1.0)]).unwrap_err(),
        Calibration::new([&good, &other]).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(text.contains("other") && text.contains("concept_c3_mirror") && text.contains('7'), "{text}");
        assert!(text.contains(&format!("`{}`", layer.module())), "the dotted name: {text}");
    }
}

#[test]
fn truncating_keeps_the_largest_singular_values() {
    let adapters = pool();
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "step1", &POOL);
    let merged = Ssr::new(&calibration).merge(&device, &at_one(&adapters)).unwrap();
    let control = Control::default();
    let same = merged.clone().truncated(&device, &Truncation::rank(36), &control).unwrap();
    assert_eq!(worst(&same, |layer| delta(merged.adapter.find(layer).unwrap())), 0.0);
    assert!(same.report.notes == merged.report.notes && same.report.layers[0].cut.is_none());
    assert!(merged.clone().truncated(&device, &Truncation::rank(0), &control).is_err());

    let small = merged.clone().truncated(&device, &Truncation::rank(8), &control).unwrap();
    assert!(
        small.report.notes.iter().any(|note| note.contains("truncated 24 of 24 layers")),
        "{:?}",
        small.report.notes
    );
    for (layer, report) in small.adapter.layers().iter().zip(&small.report.layers) {
        assert_eq!((layer.rank(), report.rank), (8, 8));
        let whole = delta(merged.adapter.layer(layer.key()).unwrap());
        let dense = faer::Mat::from_fn(whole.rows(), whole.cols(), |i, j| whole[(i, j)]);
        let values = dense.singular_values().unwrap();
        let norm = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>().sqrt();
        let want = norm(&values[8..]) / norm(&values);
        let error = relative(&delta(layer), &whole);
        // The factors are rounded to f32.
        assert!((error - want).abs() <= 1e-6, "{}: {error} is not {want}", report.layer);
        assert!((report.cut.unwrap() - want).abs() <= 1e-9, "{}", report.layer);
    }
}

#[test]
fn layers_of_text_encoders_are_told_apart() {
    let device = Device::cpu();
    let encoders = ["text_encoder", "text_encoder_2"];
    let layer = |encoder: &str, value: f32| {
        let fill = |rows, cols| Matrix::from_fn(rows, cols, |i, j| value + (i + 2 * j) as f32);
        Layer::new(&format!("{encoder}.text_model.final.fc1"), fill(1, 3), fill(2, 1)).unwrap()
    };
    let made = |name: &str, value| {
        Adapter::new(name, Format::Peft, encoders.map(|e| layer(e, value)).to_vec()).unwrap()
    };
    let (x, y) = (made("x", 1.0), made("y", -2.0));
    let merged = Ssr::data_free().merge(&device, &[x.at(1.0), y.at(1.0)]).unwrap();
    let names: Vec<_> = merged.report.layers.iter().map(|layer| layer.layer.as_str()).collect();
    assert_eq!(names, ["text_encoder.text_model.final.fc1", "text_encoder_2.text_model.final.fc1"]);
    assert!(names.iter().all(|name| merged.adapter.find(name).is_some()));
}

#[test]
fn progress_is_told_and_cancelling_stops() {
    let adapters = pool();
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "step1", &POOL);
    let seen = Mutex::new(Vec::new());
    let show = |p: loraweld::Progress<'_>| seen.lock().unwrap().push((p.stage, p.done, p.total));
    let cancel = AtomicBool::new(false);
    let control = Control { progress: Some(&show), cancel: Some(&cancel) };
    Ssr::new(&calibration).merge_with(&device, &at_one(&adapters), control).unwrap();
    let seen = seen.into_inner().unwrap();
    assert_eq!(seen.iter().filter(|(stage, ..)| *stage == "merge").count(), 25);
    assert!(seen.contains(&("merge", 0, 24)) && seen.contains(&("merge", 23, 24)), "{seen:?}");
    assert_eq!(seen.last(), Some(&("merge", 24, 24)), "{seen:?}");
    cancel.store(true, std::sync::atomic::Ordering::Relaxed);
    let control = Control { progress: None, cancel: Some(&cancel) };
    let result = Ssr::new(&calibration).merge_with(&device, &at_one(&adapters), control);
    assert!(matches!(result, Err(Error::Cancelled)));
}

#[test]
fn as_published_inputs_count_only_where_their_adapter_has_the_layer() {
    let mut adapters = pool();
    adapters.truncate(3);
    let block = |layer: &Layer| layer.module().starts_with("transformer_blocks.0");
    adapters[2] = changed(&adapters[2], |layer| !block(layer), 1.0, 1.0);
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL[..3]);
    let merged = |options: SsrOptions, adapters: &[Adapter]| {
        Ssr::new(&calibration).options(options).merge(&device, &at_one(adapters)).unwrap().adapter
    };
    let all = merged(SsrOptions::published(), &adapters);
    let pair = merged(SsrOptions::published(), &adapters[..2]);
    let counted = merged(SsrOptions { absent: Absent::Count, ..SsrOptions::published() }, &adapters);
    for layer in all.layers().iter().filter(|layer| block(layer)) {
        let b = |adapter: &Adapter| wide(adapter.find(layer.module()).unwrap().b());
        assert_eq!(wide(layer.b()), b(&pair), "{}", layer.module());
        assert_ne!(wide(layer.b()), b(&counted), "{}", layer.module());
    }
    // By name as well, and each can be given besides.
    let json = |options: &str| serde_json::from_str(options).unwrap();
    let named = |options: &str| {
        let method = loraweld::merge::method("ssr", json(options), Some(&calibration)).unwrap();
        method.merge_any(&device, &at_one(&adapters), Control::default()).unwrap().report.options
    };
    assert_eq!(named(r#"{"as_published": true}"#), serde_json::to_value(SsrOptions::published()).unwrap());
    let counts = named(r#"{"as_published": true, "absent": "count", "ridge": {"relative": 0.5}}"#);
    assert!(counts["absent"].is_null() && counts["ridge"]["relative"] == 0.5, "{counts}");
    assert_eq!(counts["prior"], "zero");
}
