//! Truncation by recorded inputs, and budgets, against dense definitions in f64.

use crate::baselines::{few, refactored};
use crate::common::fixtures::{
    POOL, Plain, Tensors, activations, at_one, calibrated, delta, plain, plain_gram, pool, stored, trace,
};
use crate::common::{Case, devices, product, relative, singular_values};
use loraweld::{
    Adapter, Budget, Calibration, Control, Device, Linear, Matrix, Merged, NpLora, Precision, SaveOptions,
    Spectrum, Ssr, SvdMerge, Truncating, Truncation, Weighted,
};

/// The weight of inputs from anywhere, as the documentation of `Merged::truncated_by` has it.
const ANYWHERE: f64 = 0.03;

/// `Σ^½` of a layer's inputs (in × in), and the mean energy of what the adapters together do on their own inputs.
fn inputs(adapters: &[Weighted<'_>], set: &str, layer: &str) -> (Matrix, f64) {
    let plain = plain(adapters, set, &POOL, layer);
    let x: Vec<Matrix> =
        POOL.iter().map(|task| Tensors::open(activations(set, task)).get(&stored(layer))).collect();
    let tokens: f64 = plain.tokens.iter().sum();
    let n = plain.a.cols();
    let mut moment = Matrix::<f64>::zeros(n, n);
    for x in &x {
        let gram = product(&x.transposed(), x);
        moment.data_mut().iter_mut().zip(gram.data()).for_each(|(m, g)| *m += g / tokens);
    }
    let seen: f64 = plain.orthonormal(set, layer).grams.iter().map(trace).sum();
    let isotropic = ANYWHERE * seen / (tokens * plain.a.rows() as f64);
    (0..n).for_each(|i| moment[(i, i)] += isotropic);
    (root(&moment), nothing(&plain, tokens))
}

/// [`inputs`] of all layers of the adapters.
fn all_inputs(adapters: &[Weighted<'_>], set: &str) -> Vec<(Matrix, f64)> {
    adapters[0].adapter.layers().iter().map(|layer| inputs(adapters, set, layer.module())).collect()
}

fn nothing(plain: &Plain, tokens: f64) -> f64 {
    let bb = product(&plain.b.transposed(), &plain.b);
    let own = |(gram, block): (&Matrix, &std::ops::Range<usize>)| {
        let pairs = block.clone().flat_map(|i| block.clone().map(move |j| (i, j)));
        pairs.map(|at| bb[at] * gram[at]).sum::<f64>()
    };
    plain.grams.iter().zip(&plain.blocks).map(own).sum::<f64>() / tokens
}

/// The symmetric root of a positive matrix.
fn root(m: &Matrix) -> Matrix {
    let n = m.rows();
    let eigen =
        faer::MatRef::from_row_major_slice(m.data(), n, n).self_adjoint_eigen(faer::Side::Lower).unwrap();
    let (u, s) = (eigen.U(), eigen.S().column_vector());
    let half = Matrix::from_fn(n, n, |i, k| u[(i, k)] * s[k].max(0.0).sqrt());
    product(&half, &Matrix::from_fn(n, n, |k, j| u[(j, k)]))
}

/// The nearest update of a rank on these inputs, and the squares of all singular values.
fn dense(update: &Matrix, root: &Matrix, rank: usize) -> (Matrix, Vec<f64>) {
    let seen = product(update, root);
    let svd = faer::MatRef::from_row_major_slice(seen.data(), seen.rows(), seen.cols()).thin_svd().unwrap();
    let (u, s) = (svd.U(), svd.S().column_vector());
    let kept = Matrix::from_fn(u.nrows(), rank, |i, k| u[(i, k)]);
    (product(&kept, &product(&kept.transposed(), update)), (0..s.nrows()).map(|k| s[k] * s[k]).collect())
}

fn square(m: &Matrix) -> f64 {
    m.data().iter().map(|v| v * v).sum()
}

fn minus(x: &Matrix, y: &Matrix) -> Matrix {
    Matrix::from_fn(x.rows(), x.cols(), |i, j| x[(i, j)] - y[(i, j)])
}

fn by<'a>(
    calibration: &'a Calibration,
    adapters: &'a [Weighted<'a>],
    truncation: Truncation,
) -> Truncating<'a> {
    Truncating { truncation, budget: None, data: Some((calibration, adapters)) }
}

fn truncated(merged: &Merged, by: &Truncating<'_>, device: &Device) -> Merged {
    merged.clone().truncated_by(by, &SaveOptions::default(), device, &Control::default()).unwrap()
}

/// f32 statistics on the tier that has them; else what an f32 result carries.
fn tolerance(case: &Case) -> f64 {
    let single = case.device.is_gpu() && case.device.precision() == Precision::Auto;
    if single { 1e-4 } else { 1e-6 }
}

#[test]
fn by_data_it_is_the_weighted_decomposition() {
    let adapters = few(&pool(), 3);
    let weighted = at_one(&adapters);
    let cpu = Device::cpu();
    let from_cpu = calibrated(&cpu, &adapters, "traj4", &POOL);
    // A is the adapters' own of the first two; np-lora changes what it reads.
    let merges = [
        Linear.merge(&weighted).unwrap(),
        Ssr::new(&from_cpu).merge(&cpu, &weighted).unwrap(),
        NpLora::default().merge(&cpu, weighted[0], &weighted[1..]).unwrap(),
    ];
    let known = all_inputs(&weighted, "traj4");
    let wanted = |merged: &Merged, i: usize, rank: usize| {
        dense(&delta(&merged.adapter.layers()[i]), &known[i].0, rank)
    };
    let ranks = [1, 4, 8];
    let wants: Vec<Vec<Vec<_>>> = merges
        .iter()
        .map(|merged| ranks.map(|rank| (0..3).map(|i| wanted(merged, i, rank)).collect()).into())
        .collect();
    for case in devices() {
        let calibration = calibrated(&case.device, &adapters, "traj4", &POOL);
        for (merged, wants) in merges.iter().zip(&wants) {
            for (rank, wants) in ranks.into_iter().zip(wants) {
                let truncation = Truncation::rank(rank);
                let got = truncated(merged, &by(&calibration, &weighted, truncation), &case.device);
                let what = format!("{}, {} of rank {rank}", case.name, merged.report.method);
                for (i, (layer, report)) in got.adapter.layers().iter().zip(&got.report.layers).enumerate() {
                    let ((want, squares), nothing) = (&wants[i], known[i].1);
                    let error = relative(&delta(layer), want);
                    assert!(error <= tolerance(&case), "{what}, {}: {error:e}", layer.module());
                    assert_eq!((layer.rank(), report.rank), (rank, rank));
                    let off: f64 = squares[rank..].iter().sum();
                    let cut = (off / squares.iter().sum::<f64>()).sqrt();
                    let added = (off / nothing).sqrt();
                    // Both are found in f64, of which the CPU's statistics are.
                    let exact = if case.device.is_gpu() { 10.0 * tolerance(&case) } else { 1e-8 };
                    for (got, want) in [(report.cut, cut), (report.added, added)] {
                        let error = (got.unwrap() - want).abs() / want;
                        assert!(error <= exact, "{what}, {}: {error:e}", layer.module());
                    }
                }
            }
        }
    }
}

#[test]
fn what_it_adds_is_what_it_leaves_out_and_the_norm_adds_more() {
    let adapters = few(&pool(), 3);
    let weighted = at_one(&adapters);
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "step1", &POOL);
    let merged = Ssr::new(&calibration).merge(&device, &weighted).unwrap();
    let known = all_inputs(&weighted, "step1");
    for rank in 1..=8 {
        let truncation = Truncation::rank(rank);
        let data = truncated(&merged, &by(&calibration, &weighted, truncation), &device);
        let norm = truncated(&merged, &truncation.into(), &device);
        for (i, layer) in merged.adapter.layers().iter().enumerate() {
            let (root, nothing) = &known[i];
            let lost = |merged: &Merged| {
                let found = merged.adapter.find(layer.module()).unwrap();
                square(&product(&minus(&delta(found), &delta(layer)), root))
            };
            let (by_data, by_norm) = (lost(&data), lost(&norm));
            let added = data.report.layers[i].added.unwrap();
            // The factors are rounded to f32.
            let error = (by_data / nothing - added * added).abs() / (added * added);
            assert!(error <= 1e-5, "rank {rank}, {}: {error:e}", layer.module());
            assert!(by_data <= by_norm * (1.0 + 1e-9), "rank {rank}, {}", layer.module());
            assert!(norm.report.layers[i].added.is_none());
        }
    }
}

#[test]
fn how_an_adapter_splits_its_update_changes_nothing() {
    let adapters = few(&pool(), 3);
    let others: Vec<_> = adapters.iter().enumerate().map(|(i, a)| refactored(a, i as u64)).collect();
    let device = Device::cpu();
    let [x, y] = [&adapters, &others].map(|adapters| {
        let weighted = at_one(adapters);
        let calibration = calibrated(&device, adapters, "step1", &POOL);
        let merged = Ssr::new(&calibration).merge(&device, &weighted).unwrap();
        truncated(&merged, &by(&calibration, &weighted, Truncation::rank(5)), &device)
    });
    for layer in x.adapter.layers() {
        let error = relative(&delta(layer), &delta(y.adapter.find(layer.module()).unwrap()));
        // Factors are rounded to f32 anew, and the gap after the fifth value is not large.
        assert!(error <= 1e-5, "{}: {error:e}", layer.module());
    }
}

#[test]
fn spectra_are_those_of_what_was_cut() {
    let adapters = few(&pool(), 3);
    let weighted = at_one(&adapters);
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL);
    let whole = Linear.merge(&weighted).unwrap();
    let streamed = SvdMerge::new(Truncation::rank(5)).merge(&device, &weighted).unwrap();
    let by_norm = truncated(&whole, &Truncation::rank(5).into(), &device);
    let by_data = truncated(&whole, &by(&calibration, &weighted, Truncation::rank(5)), &device);
    let inputs = all_inputs(&weighted, "traj4");
    for (i, layer) in whole.adapter.layers().iter().enumerate() {
        assert!(whole.report.layers[i].spectrum.is_none());
        let dense = delta(layer);
        for (merged, update) in
            [(&streamed, dense.clone()), (&by_norm, dense.clone()), (&by_data, product(&dense, &inputs[i].0))]
        {
            let report = &merged.report.layers[i];
            let spectrum = report.spectrum.as_ref().unwrap();
            let want = singular_values(&update);
            assert_eq!(spectrum.kept, 5);
            for (got, want) in spectrum.values.iter().zip(&want) {
                // Factors are f32, and Gram matrices of them tell small values less well.
                assert!((got - want).abs() <= 1e-6 * want.max(spectrum.values[0]), "{got} {want}");
            }
            let cut = report.cut.unwrap();
            assert!((1.0 - spectrum.energy() - cut * cut).abs() <= 1e-12, "{cut} {}", spectrum.energy());
        }
    }
}

#[test]
fn budgets_are_kept_and_spent_better_than_evenly() {
    let adapters = pool();
    let weighted = at_one(&adapters);
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL);
    let merged = Ssr::new(&calibration).merge(&device, &weighted).unwrap();
    let ranks =
        |merged: &Merged| merged.adapter.layers().iter().map(|layer| layer.rank()).collect::<Vec<_>>();
    let lost = |merged: &Merged| {
        let added: f64 = merged.report.layers.iter().map(|l| l.added.unwrap_or(0.0).powi(2)).sum();
        (added / merged.report.layers.len() as f64).sqrt()
    };
    let with =
        |budget| Truncating { budget: Some(budget), ..by(&calibration, &weighted, Truncation::default()) };
    let shared = truncated(&merged, &with(Budget::Ranks(24 * 6)), &device);
    assert_eq!(ranks(&shared).iter().sum::<usize>(), 24 * 6);
    let even = truncated(&merged, &by(&calibration, &weighted, Truncation::rank(6)), &device);
    assert!(lost(&shared) < 0.9 * lost(&even), "{} {}", lost(&shared), lost(&even));
    let note = |merged: &Merged| merged.report.notes.iter().find(|n| n.contains("budget")).unwrap().clone();
    assert!(
        note(&shared).contains(&format!("an even cut to rank 6 would cost {:.3}", lost(&even))),
        "{}",
        note(&shared)
    );

    for most in [0.02, 0.1, 0.4] {
        let found = truncated(&merged, &with(Budget::Loss(most)), &device);
        assert!(lost(&found) <= most, "{most}: {}", lost(&found));
        // One rank fewer everywhere would be too much.
        let fewer: usize = ranks(&found).iter().sum::<usize>() - 24;
        let too_few = truncated(&merged, &with(Budget::Ranks(fewer)), &device);
        assert!(lost(&too_few) > most, "{most}");
    }

    let bytes = |merged: &Merged| -> usize {
        merged.adapter.layers().iter().map(|l| 2 * l.rank() * (l.input() + l.output())).sum()
    };
    let options = SaveOptions { dtype: Some(loraweld::Dtype::F16), ..Default::default() };
    let room = bytes(&merged) / 3;
    let budget = with(Budget::Bytes(room as u64));
    let small = merged.clone().truncated_by(&budget, &options, &device, &Control::default()).unwrap();
    assert!(bytes(&small) <= room && bytes(&small) > room - 2 * 1024, "{} of {room}", bytes(&small));
    assert_eq!(small.adapter.metadata()["loraweld.budget"], format!(r#"{{"bytes":{room}}}"#));

    // Beside a budget, a rank limits each layer; without recordings, the norm judges.
    let limited = Truncating { truncation: Truncation::rank(5), ..with(Budget::Ranks(1000)) };
    assert!(ranks(&truncated(&merged, &limited, &device)).iter().all(|rank| *rank == 5));
    let by_norm = Truncating { budget: Some(Budget::Ranks(100)), ..Default::default() };
    let by_norm = truncated(&merged, &by_norm, &device);
    assert_eq!(ranks(&by_norm).iter().sum::<usize>(), 100);
    assert!(note(&by_norm).contains("of the norm"), "{}", note(&by_norm));

    let refused = |by: &Truncating<'_>| {
        let merged = merged.clone().truncated_by(by, &SaveOptions::default(), &device, &Control::default());
        merged.unwrap_err().to_string()
    };
    assert!(refused(&with(Budget::Ranks(23))).contains("takes 24"));
    assert!(refused(&with(Budget::Loss(f64::NAN))).contains("above 0"));
    let without = Truncating { budget: Some(Budget::Loss(0.1)), ..Default::default() };
    assert!(refused(&without).contains("calibration"));
}

#[test]
fn what_recordings_do_not_tell_goes_by_the_norm_and_is_said() {
    let adapters = few(&pool(), 3);
    let weighted = at_one(&adapters);
    let device = Device::cpu();
    // Of the last adapter nothing was recorded.
    let mut calibration = Calibration::new(&adapters).unwrap();
    for (i, task) in POOL[..3].iter().enumerate() {
        let source = loraweld::Source::Task(i);
        calibration
            .accumulate_file(&device, source, &activations("step1", task), &Control::default())
            .unwrap();
    }
    let merged = Linear.merge(&weighted).unwrap();
    let truncation = Truncation::rank(4);
    let data = truncated(&merged, &by(&calibration, &weighted, truncation), &device);
    let norm = truncated(&merged, &truncation.into(), &device);
    for (x, y) in data.adapter.layers().iter().zip(norm.adapter.layers()) {
        assert_eq!(relative(&delta(x), &delta(y)), 0.0);
    }
    let notes = &data.report.notes;
    assert!(notes.iter().any(|note| note.starts_with("3 layers truncated by the norm")), "{notes:?}");
    // A spectrum goes by what recordings tell as well.
    let calibration = calibrated(&device, &adapters, "step1", &POOL);
    let spectrum = Truncation::spectrum(Spectrum::Frobenius(0.9));
    let data = truncated(&merged, &by(&calibration, &weighted, spectrum), &device);
    for report in &data.report.layers {
        // As few as hold this share, and one more.
        assert!(report.cut.unwrap() <= (1.0f64 - 0.81).sqrt(), "{report:?}");
    }
}

#[test]
fn one_adapter_has_a_calibration_of_its_own() {
    let adapters: Vec<Adapter> = few(&pool()[..1], 3);
    let device = Device::cpu();
    let calibration = calibrated(&device, &adapters, "traj4", &POOL[..1]);
    assert_eq!(calibration.layers().count(), 3);
    let weighted = at_one(&adapters);
    let merged = Linear.merge(&weighted).unwrap();
    let small = truncated(&merged, &by(&calibration, &weighted, Truncation::rank(2)), &device);
    for (layer, report) in small.adapter.layers().iter().zip(&small.report.layers) {
        let whole = delta(merged.adapter.find(layer.module()).unwrap());
        let a = plain(&weighted, "traj4", &POOL[..1], layer.module());
        let (gram, tokens) = plain_gram(&a.a, "traj4", POOL[0], layer.module());
        assert_eq!((gram.rows(), tokens), (layer_rank(&adapters[0], layer.module()), 192.0));
        // On its own inputs it loses less than the plain decomposition.
        let x = Tensors::open(activations("traj4", POOL[0])).get(&stored(layer.module()));
        let norm = truncated(&merged, &Truncation::rank(2).into(), &device);
        let lost = |merged: &Merged| {
            let update = delta(merged.adapter.find(layer.module()).unwrap());
            square(&product(&x, &minus(&update, &whole).transposed()))
        };
        assert!(lost(&small) < lost(&norm), "{}", layer.module());
        assert!(report.added.is_some());
    }
}

fn layer_rank(adapter: &Adapter, layer: &str) -> usize {
    adapter.find(layer).unwrap().rank()
}
