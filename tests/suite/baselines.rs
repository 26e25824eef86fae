//! The baselines against references, the dense definitions and their invariants, on the CPU and in every tier of the GPU.

use crate::common::fixtures::{Tensors, adapter, at_one, calibrated, data, delta, pool, wide};
use crate::common::{Case, Random, devices, outer, product, relative, stack, svd};
use loraweld::{
    Adapter, Control, CoreMerge, Dare, Device, EntryMerge, Error, Format, Iso, Layer, Linear, Matrix, Merged,
    NpLora, Rule, Spectrum, Ssr, SvdMerge, Ties, Truncation, Tsv, Weighted,
};

fn made(name: &str, factors: &[(Matrix, Matrix)]) -> Adapter {
    let narrow = |m: &Matrix| Matrix::from_fn(m.rows(), m.cols(), |i, j| m[(i, j)] as f32);
    let layer = |(i, (a, b)): (usize, &(Matrix, Matrix))| {
        Layer::new(&format!("blocks.{i}"), narrow(a), narrow(b)).unwrap()
    };
    Adapter::new(name, Format::Peft, factors.iter().enumerate().map(layer).collect()).unwrap()
}

/// Adapters of these ranks on layers of these widths (in, out).
fn random(seed: u64, ranks: &[usize], widths: &[(usize, usize)], scale: f64) -> Vec<Adapter> {
    let mut random = Random(seed);
    let mut one = |rank: usize| {
        let layers: Vec<_> = widths
            .iter()
            .map(|&(input, output)| (random.matrix(rank, input, scale), random.matrix(output, rank, scale)))
            .collect();
        made(&format!("rank-{rank}"), &layers)
    };
    ranks.iter().map(|&rank| one(rank)).collect()
}

/// The first layers only, for devices that are software.
pub fn few(adapters: &[Adapter], count: usize) -> Vec<Adapter> {
    let few = |a: &Adapter| Adapter::new(a.name(), a.format(), a.layers()[..count].to_vec()).unwrap();
    adapters.iter().map(few).collect()
}

fn deltas(adapters: &[Weighted<'_>], layer: &str) -> Vec<Matrix> {
    let of = |w: &Weighted<'_>| {
        let mut dense = delta(w.adapter.find(layer).unwrap());
        dense.data_mut().iter_mut().for_each(|v| *v *= w.strength);
        dense
    };
    adapters.iter().map(of).collect()
}

/// The largest relative difference of ΔW over all layers.
fn worst(merged: &Merged, want: impl Fn(&str) -> Matrix) -> f64 {
    let layers = merged.adapter.layers();
    layers.iter().map(|layer| relative(&delta(layer), &want(layer.module()))).fold(0.0, f64::max)
}

fn sum(dense: &[Matrix], scale: f64) -> Matrix {
    Matrix::from_fn(dense[0].rows(), dense[0].cols(), |i, j| {
        scale * dense.iter().map(|m| m[(i, j)]).sum::<f64>()
    })
}

/// TIES of dense matrices, by the definition.
fn ties(dense: &[Matrix], density: f64) -> Matrix {
    let n = dense[0].data().len();
    let kept = ((density * n as f64) as usize).max(1);
    let trimmed: Vec<Vec<f64>> = dense
        .iter()
        .map(|m| {
            let mut sizes: Vec<f64> = m.data().iter().map(|v| v.abs()).collect();
            sizes.sort_by(|x, y| y.total_cmp(x));
            m.data().iter().map(|&v| if v.abs() >= sizes[kept - 1] { v } else { 0.0 }).collect()
        })
        .collect();
    let entry = |at: usize| {
        let total: f64 = trimmed.iter().map(|t| t[at]).sum();
        let sign = if total >= 0.0 { 1.0 } else { -1.0 };
        let agreeing: Vec<f64> = trimmed.iter().map(|t| t[at]).filter(|v| v * sign > 0.0).collect();
        agreeing.iter().sum::<f64>() / agreeing.len().max(1) as f64
    };
    Matrix::new(dense[0].rows(), dense[0].cols(), (0..n).map(entry).collect()).unwrap()
}

fn two_tiers() -> impl Iterator<Item = Case> {
    devices().into_iter().filter(|case| ["CPU", "auto, f64", "auto, minimal"].contains(&case.name))
}

#[test]
fn ties_gives_the_reference() {
    let reference = Tensors::open(data("reference/fingerprints_f32.safetensors"));
    let pair = [adapter("content_heart"), adapter("style_shade")];
    for (name, adapters) in [("concept", pool()), ("content_heart+style_shade", pair.to_vec())] {
        for case in two_tiers() {
            let adapters = if case.device.is_gpu() { few(&adapters, 2) } else { adapters.clone() };
            let method = EntryMerge::ties(Ties { density: 0.5, ..Ties::default() }).rank(128);
            let merged = method.merge(&case.device, &at_one(&adapters)).unwrap();
            for (layer, report) in merged.adapter.layers().iter().zip(&merged.report.layers) {
                let probe = reference.get(&format!("probe.in{}", layer.input()));
                let want = reference.get(&format!("{name}.ties_dense/{}", layer.module()));
                let error = relative(&product(&delta(layer), &probe), &want);
                // f32 factors and an f32 reference; one entry on the other side of a threshold would cost 1e-3.
                assert!(error <= 1e-5, "{}, {}: {error:e}", case.name, layer.module());
                let captured = report.captured().unwrap();
                assert!(captured >= 1.0 - 1e-6, "{}, {}: {captured}", case.name, layer.module());
            }
        }
    }
}

#[test]
fn ties_is_the_dense_definition_at_full_rank() {
    let widths = [(1, 1), (7, 5), (16, 33), (40, 17), (3, 50)];
    for (ranks, scale) in [(&[1, 3][..], 1.0), (&[4, 2, 9], 1e-15), (&[2, 2, 2, 2], 1e15)] {
        let adapters = random(3, ranks, &widths, scale);
        let strengths = [1.0, -0.5, 2.0, 0.3];
        let weighted: Vec<_> = adapters.iter().zip(strengths).map(|(a, s)| a.at(s)).collect();
        for density in [0.2, 0.5, 1.0] {
            for case in devices() {
                let method = EntryMerge::ties(Ties { density, lambda: 1.5, ..Ties::default() }).rank(50);
                let merged = method.merge(&case.device, &weighted).unwrap();
                let error = worst(&merged, |name| {
                    let mut dense = ties(&deltas(&weighted, name), density);
                    dense.data_mut().iter_mut().for_each(|v| *v *= 1.5);
                    dense
                });
                // Products of two f32 factors, rounded to f32 on their way.
                assert!(error <= 1e-5, "{}: {ranks:?}, {density}: {error:e}", case.name);
            }
        }
    }
}

#[test]
fn dare_keeps_or_drops_whole_entries_the_same_everywhere() {
    let adapters = random(5, &[3, 2], &[(40, 31)], 1.0);
    let weighted = at_one(&adapters);
    let dense = deltas(&weighted, "blocks.0");
    let choices = |merged: &Merged, density: f64| -> Vec<usize> {
        let got = delta(&merged.adapter.layers()[0]);
        let tolerance = 1e-5 * dense[0].data().iter().fold(0.0f64, |max, v| v.abs().max(max)) / density;
        (0..got.data().len())
            .map(|at| {
                let (x, y) = (dense[0].data()[at] / density, dense[1].data()[at] / density);
                let fits = |v: &f64| (got.data()[at] - v).abs() <= tolerance;
                [0.0, x, y, x + y].iter().position(fits).expect("an entry is kept whole or dropped")
            })
            .collect()
    };
    for density in [0.2, 0.5] {
        let merge = |device: &Device, seed| {
            let dare = Dare { density, seed, ..Dare::default() };
            choices(&EntryMerge::dare(dare).rank(31).merge(device, &weighted).unwrap(), density)
        };
        let want = merge(&Device::cpu(), 1);
        let share = |k: usize| want.iter().filter(|c| **c & k != 0).count() as f64 / want.len() as f64;
        for k in [1, 2] {
            // Four standard deviations of 1,240 choices.
            assert!(
                (share(k) - density).abs() <= 4.0 * (density * (1.0 - density) / 1240.0).sqrt(),
                "{}",
                share(k)
            );
        }
        assert_ne!(want, merge(&Device::cpu(), 2));
        for case in devices() {
            assert_eq!(want, merge(&case.device, 1), "{}", case.name);
        }
    }
    // All kept: the sum, or the election alone.
    let all = Dare { density: 1.0, ..Dare::default() };
    let merged = EntryMerge::dare(all).merge(&Device::cpu(), &weighted).unwrap();
    assert!(worst(&merged, |_| sum(&dense, 1.0)) <= 1e-6);
    let merged =
        EntryMerge::dare(Dare { ties: true, ..all }).rank(31).merge(&Device::cpu(), &weighted).unwrap();
    assert!(worst(&merged, |_| ties(&dense, 1.0)) <= 1e-5);
}

#[test]
fn approximations_come_near_the_best_and_say_how_much_they_hold() {
    let adapters = pool();
    for case in two_tiers() {
        let adapters = if case.device.is_gpu() { few(&adapters, 2) } else { adapters.clone() };
        let merged = EntryMerge::ties(Ties::default()).merge(&case.device, &at_one(&adapters)).unwrap();
        for (layer, report) in merged.adapter.layers().iter().zip(&merged.report.layers) {
            let dense = ties(&deltas(&at_one(&adapters), layer.module()), 0.2);
            let (_, values, _) = svd(&dense);
            let energy = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
            let best = energy(&values[..36]) / energy(&values);
            let captured = report.captured().unwrap();
            let what = format!("{}: {}: {captured} of {best}", case.name, layer.module());
            assert_eq!((layer.rank(), report.action.kind()), (36, "combined"), "{what}");
            // Two steps of subspace iteration with 8 more directions than asked for.
            assert!(captured <= best + 1e-6 && captured >= 0.99 * best, "{what}");
            let error = relative(&delta(layer), &dense);
            assert!((error * error - (1.0 - captured)).abs() <= 1e-5, "{what}: {error}");
        }
    }
}

#[test]
fn rules_in_the_core_are_the_dense_formulas() {
    let adapters = random(7, &[3, 5, 2], &[(24, 31), (40, 12), (9, 8)], 1.0);
    let weighted: Vec<_> = adapters.iter().zip([1.0, 0.7, -1.2]).map(|(a, s)| a.at(s)).collect();
    let half = Rule::Ties(Ties { density: 0.5, ..Ties::default() });
    let polar = |rows: &Matrix| {
        let (u, s, v) = svd(rows);
        outer(&u, &vec![1.0; s.len()], &v)
    };
    type Formula<'a> = &'a dyn Fn(&[Matrix]) -> Matrix;
    let left_basis = |dense: &[Matrix]| {
        let transposed: Vec<_> = dense.iter().map(Matrix::transposed).collect();
        svd(&stack(&transposed)).2
    };
    let knots_ties = |dense: &[Matrix]| {
        let u = left_basis(dense);
        let parts: Vec<_> = dense.iter().map(|m| product(&u, m)).collect();
        // The rows beyond the number of directions are zero here, and count as entries.
        let rows = 10 - u.rows();
        let pad = |m: &Matrix| stack(&[m.clone(), Matrix::zeros(rows, m.cols())]);
        let merged = ties(&parts.iter().map(pad).collect::<Vec<_>>(), 0.5);
        let merged =
            Matrix::new(u.rows(), merged.cols(), merged.data()[..u.rows() * merged.cols()].to_vec()).unwrap();
        product(&u.transposed(), &merged)
    };
    let core_ties = |dense: &[Matrix]| {
        let (u, v) = (left_basis(dense), svd(&stack(dense)).2);
        let pad = |m: Matrix| {
            Matrix::from_fn(10, 10, |i, j| if i < m.rows() && j < m.cols() { m[(i, j)] } else { 0.0 })
        };
        let cores: Vec<_> = dense.iter().map(|m| pad(product(&product(&u, m), &v.transposed()))).collect();
        let merged = ties(&cores, 0.5);
        let merged = Matrix::from_fn(u.rows(), v.rows(), |i, j| merged[(i, j)]);
        product(&u.transposed(), &product(&merged, &v))
    };
    let tsv = |dense: &[Matrix]| {
        let parts: Vec<_> = dense.iter().map(svd).collect();
        let values: Vec<f64> = parts.iter().flat_map(|p| p.1.clone()).collect();
        let left = polar(&stack(&parts.iter().map(|p| p.0.clone()).collect::<Vec<_>>()));
        let right = polar(&stack(&parts.iter().map(|p| p.2.clone()).collect::<Vec<_>>()));
        outer(&left, &values, &right)
    };
    let iso = |dense: &[Matrix]| {
        let (u, s, v) = svd(&sum(dense, 1.0));
        outer(&u, &vec![s.iter().sum::<f64>() / s.len() as f64; s.len()], &v)
    };
    let cases: [(&str, CoreMerge, Formula<'_>); 9] = [
        ("core sum", CoreMerge::core(Rule::Sum), &|dense| sum(dense, 1.0)),
        ("core mean", CoreMerge::core(Rule::Mean), &|dense| sum(dense, 1.0 / 3.0)),
        ("knots mean", CoreMerge::knots(Rule::Mean), &|dense| sum(dense, 1.0 / 3.0)),
        ("knots ties", CoreMerge::knots(half.clone()), &knots_ties),
        ("core ties", CoreMerge::core(half.clone()), &core_ties),
        ("tsv", CoreMerge::tsv(Tsv::default()), &tsv),
        ("knots tsv", CoreMerge::knots(Rule::Tsv(Tsv::default())), &tsv),
        ("iso-c", CoreMerge::iso_c(Iso::default()), &iso),
        ("core iso", CoreMerge::core(Rule::Iso(Iso::default())), &iso),
    ];
    for case in devices() {
        for (name, method, formula) in &cases {
            let merged = method.merge(&case.device, &weighted).unwrap();
            let error = worst(&merged, |layer| formula(&deltas(&weighted, layer)));
            // f32 factors, and directions that f32 rounds.
            assert!(error <= 1e-5, "{name}, {}: {error:e}", case.name);
        }
    }
}

/// The same updates by other factors: rotated, and rescaled from rank to rank.
pub fn refactored(adapter: &Adapter, seed: u64) -> Adapter {
    let mut random = Random(seed);
    let layers: Vec<_> = adapter
        .layers()
        .iter()
        .map(|layer| {
            let (mut a, mut b) = (wide(layer.a()), wide(layer.b()));
            // A plane rotation of each two ranks.
            for k in (1..layer.rank()).step_by(2) {
                let (sin, cos) = random.normal().sin_cos();
                for j in 0..a.cols() {
                    let (x, y) = (a[(k - 1, j)], a[(k, j)]);
                    (a[(k - 1, j)], a[(k, j)]) = (cos * x + sin * y, cos * y - sin * x);
                }
                for i in 0..b.rows() {
                    let (x, y) = (b[(i, k - 1)], b[(i, k)]);
                    (b[(i, k - 1)], b[(i, k)]) = (cos * x + sin * y, cos * y - sin * x);
                }
            }
            // Last, so that rounding to f32 loses nothing of it.
            for k in 0..layer.rank() {
                let d = 2f64.powi((random.bits() % 17) as i32 - 8);
                (0..a.cols()).for_each(|j| a[(k, j)] /= d);
                (0..b.rows()).for_each(|i| b[(i, k)] *= d);
            }
            let narrow = |m: &Matrix| Matrix::from_fn(m.rows(), m.cols(), |i, j| m[(i, j)] as f32);
            Layer::new(layer.module(), narrow(&a), narrow(&b)).unwrap().with_scale(layer.scale().value)
        })
        .collect();
    Adapter::new(adapter.name(), adapter.format(), layers).unwrap()
}

type Method = Box<dyn Fn(&Device, &[Weighted<'_>]) -> loraweld::Result<Merged>>;

/// Every method of this file, with what it must be good to: an entry at a threshold may fall either way where rounding
/// differs, and so may a chosen direction.
fn methods() -> Vec<(&'static str, f64, Method)> {
    let half = || Rule::Ties(Ties { density: 0.5, ..Ties::default() });
    let core = |merge: CoreMerge| -> Method { Box::new(move |d, a| merge.merge(d, a)) };
    let entries = |merge: EntryMerge| -> Method { Box::new(move |d, a| merge.merge(d, a)) };
    vec![
        ("linear", 1e-5, Box::new(|_, a| Linear.merge(a))),
        ("svd", 1e-5, Box::new(|d, a| SvdMerge::new(Truncation::rank(16)).merge(d, a))),
        ("np-lora", 1e-5, Box::new(|d, a| NpLora::hard().merge(d, a[0], &a[1..]))),
        ("core mean", 1e-5, core(CoreMerge::core(Rule::Mean))),
        ("core ties", 1e-2, core(CoreMerge::core(half()))),
        ("knots ties", 1e-2, core(CoreMerge::knots(half()))),
        ("tsv", 1e-5, core(CoreMerge::tsv(Tsv::default()))),
        ("iso-c", 1e-5, core(CoreMerge::iso_c(Iso::default()))),
        ("ties", 1e-2, entries(EntryMerge::ties(Ties { density: 0.5, ..Ties::default() }).rank(128))),
        ("dare", 1e-5, entries(EntryMerge::dare(Dare::default()).rank(128))),
    ]
}

#[test]
fn how_an_adapter_splits_its_update_changes_nothing() {
    let adapters = few(&pool()[..2], 3);
    let others: Vec<_> = adapters.iter().enumerate().map(|(i, a)| refactored(a, i as u64)).collect();
    for case in two_tiers() {
        for (name, tolerance, method) in methods() {
            let (x, y) = (
                method(&case.device, &at_one(&adapters)).unwrap(),
                method(&case.device, &at_one(&others)).unwrap(),
            );
            let error = worst(&x, |layer| delta(y.adapter.find(layer).unwrap()));
            assert!(error <= tolerance, "{name}, {}: {error:e}", case.name);
        }
    }
}

#[test]
fn hard_inputs_stay_finite_and_right() {
    let mut random = Random(17);
    let zero = |r: usize, c: usize| Matrix::zeros(r, c);
    let (a, b) = (random.matrix(3, 20, 1.0), random.matrix(14, 3, 1.0));
    let mut double = stack(&[a.clone(), a.clone()]);
    double.data_mut()[..20].fill(0.0);
    // Equal to each other; a zero adapter; dependent rows; rank above both widths; one wide output.
    let pairs = [
        [made("x", &[(a.clone(), b.clone())]), made("y", &[(a.clone(), b.clone())])],
        [made("x", &[(a.clone(), b.clone())]), made("y", &[(zero(2, 20), zero(14, 2))])],
        [made("x", &[(double, random.matrix(14, 6, 1.0))]), made("y", &[(a.clone(), b.clone())])],
        [
            made("x", &[(random.matrix(9, 4, 1.0), random.matrix(5, 9, 1.0))]),
            made("y", &[(random.matrix(1, 4, 1.0), random.matrix(5, 1, 1.0))]),
        ],
        [
            made("x", &[(random.matrix(2, 6, 1e-15), random.matrix(1, 2, 1e-15))]),
            made("y", &[(random.matrix(2, 6, 1e15), random.matrix(1, 2, 1e15))]),
        ],
    ];
    for case in devices() {
        for (i, pair) in pairs.iter().enumerate() {
            let dense = deltas(&at_one(pair), "blocks.0");
            for (name, _, method) in methods() {
                let merged = method(&case.device, &at_one(pair)).unwrap();
                let got = delta(&merged.adapter.layers()[0]);
                assert!(got.data().iter().all(|v| v.is_finite()), "{name}, {}, pair {i}", case.name);
                if name == "svd" || name == "linear" {
                    let error = relative(&got, &sum(&dense, 1.0));
                    assert!(error <= 1e-5, "{name}, {}, pair {i}: {error:e}", case.name);
                }
            }
            // Two equal adapters: what TSV shares counts once, and Iso makes all directions alike.
            if i == 0 {
                let merged = CoreMerge::tsv(Tsv::default()).merge(&case.device, &at_one(pair)).unwrap();
                let error = worst(&merged, |_| dense[0].clone());
                assert!(error <= 1e-5, "{}: {error:e}", case.name);
            }
        }
    }
}

#[test]
fn truncation_is_the_best_approximation() {
    let pair = [adapter("style_shade"), adapter("content_heart")];
    for case in devices() {
        let pair = if case.device.is_gpu() { few(&pair, 4) } else { pair.to_vec() };
        let weighted = [pair[0].at(0.7), pair[1].at(1.2)];
        let whole = Linear.merge(&weighted).unwrap();
        for rank in [1, 5, 16] {
            let merged = SvdMerge::new(Truncation::rank(rank)).merge(&case.device, &weighted).unwrap();
            let layers =
                merged.adapter.layers().iter().zip(&merged.report.layers).zip(whole.adapter.layers());
            for ((layer, report), dense) in layers {
                let what = format!("{}: rank {rank}: {}", case.name, layer.module());
                let (u, values, v) = svd(&delta(dense));
                let rank = rank.min(values.len());
                assert_eq!((layer.rank(), report.rank), (rank, rank), "{what}");
                let error = relative(&delta(layer), &outer(&u, &values[..rank], &v));
                assert!(error <= 1e-5, "{what}: {error:e}");
                let energy = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
                let dropped = (energy(&values[rank..]) / energy(&values)).sqrt();
                let error = relative(&delta(layer), &delta(dense));
                assert!((error - dropped).abs() <= 1e-5, "{what}: {error} {dropped}");
                let said = report.cut.unwrap_or(0.0);
                assert!((said - dropped).abs() <= 1e-5, "{what}: {said} {dropped}");
            }
        }
    }
}

#[test]
fn small_singular_values_are_cut_as_what_they_are() {
    let mut random = Random(51);
    let (rank, input, output) = (8, 60, 40);
    // Orthonormal directions, by the SVD of something random.
    let left = svd(&random.matrix(output, rank, 1.0)).0;
    let right = svd(&random.matrix(input, rank, 1.0)).0;
    for share in [0.5, 1.0] {
        // 1 to 1e-6, which A has all of, or both factors a half.
        let value = |k: usize| 1e-6f64.powf(k as f64 / (rank - 1) as f64);
        let a = Matrix::from_fn(rank, input, |k, j| value(k).powf(share) * right[(k, j)]);
        let b = Matrix::from_fn(output, rank, |i, k| value(k).powf(1.0 - share) * left[(k, i)]);
        let adapter = made("graded", &[(a, b)]);
        let dense = delta(&adapter.layers()[0]);
        let decomposed = faer::MatRef::from_row_major_slice(dense.data(), output, input).thin_svd().unwrap();
        let values: Vec<f64> = (0..rank).map(|k| decomposed.S().column_vector()[k]).collect();
        let whole = values.iter().map(|v| v * v).sum::<f64>().sqrt();
        for case in devices() {
            for kept in [1, 4, rank - 1] {
                let truncation = Truncation::rank(kept);
                let merged = SvdMerge::new(truncation).merge(&case.device, &[adapter.at(1.0)]).unwrap();
                let cut = merged.report.layers[0].cut.unwrap();
                let want = values[kept..].iter().map(|v| v * v).sum::<f64>().sqrt() / whole;
                let error = (cut / want - 1.0).abs();
                assert!(error <= 1e-3, "{}: {share}, {kept}: {cut:e} for {want:e}", case.name);
            }
        }
    }
}

#[test]
fn spectra_choose_ranks_layer_by_layer() {
    let heart = adapter("content_heart");
    for (spectrum, hold) in
        [(Spectrum::Frobenius(0.9), 2), (Spectrum::Cumulative(0.8), 1), (Spectrum::Ratio(3.0), 0)]
    {
        let merged =
            SvdMerge::new(Truncation::spectrum(spectrum)).merge(&Device::cpu(), &[heart.at(1.0)]).unwrap();
        assert_eq!(merged.report.method, "resize");
        let mut ranks: Vec<usize> = Vec::new();
        for (layer, whole) in merged.adapter.layers().iter().zip(heart.layers()) {
            let (_, values, _) = svd(&delta(whole));
            let total: f64 = values.iter().map(|v| v.powi(hold)).sum();
            let held = |n: usize| values[..n].iter().map(|v| v.powi(hold)).sum::<f64>() / total;
            let n = layer.rank();
            // The fewest that do, and at least one; and the next, as in kohya's script, if there is one.
            let does = |n: usize| match spectrum {
                Spectrum::Ratio(x) => values.get(n).is_none_or(|v| *v <= values[0] / x),
                Spectrum::Frobenius(x) => held(n) >= x * x,
                Spectrum::Cumulative(x) => held(n) >= x,
            };
            let fewest = (1..=values.len()).find(|&n| does(n)).unwrap();
            assert_eq!(n, (fewest + 1).min(values.len()), "{spectrum:?}, {}", layer.module());
            ranks.push(n);
        }
        ranks.sort();
        ranks.dedup();
        assert!(ranks.len() > 1, "{spectrum:?}: {ranks:?}");
    }
    for bad in [Spectrum::Ratio(0.5), Spectrum::Frobenius(0.0), Spectrum::Cumulative(f64::NAN)] {
        let merge = SvdMerge::new(Truncation::spectrum(bad)).merge(&Device::cpu(), &[heart.at(1.0)]);
        assert!(matches!(merge, Err(Error::Invalid(_))), "{bad:?}");
    }
}

#[test]
fn svd_merges_give_the_fingerprints() {
    let reference = Tensors::open(data("reference/fingerprints_f32.safetensors"));
    let pair = [adapter("content_heart"), adapter("style_shade")];
    let merged = SvdMerge::new(Truncation::rank(8)).merge(&Device::cpu(), &at_one(&pair)).unwrap();
    for layer in merged.adapter.layers() {
        let probe = reference.get(&format!("probe.in{}", layer.input()));
        let want = reference.get(&format!("content_heart+style_shade.peft_svd/{}", layer.module()));
        let error = relative(&product(&delta(layer), &probe), &want);
        assert!(error <= 1e-5, "{}: {error:e}", layer.module());
    }
}

#[test]
fn every_method_is_measured_alike() {
    let cpu = Device::cpu();
    let adapters = pool();
    let calibration = calibrated(&cpu, &adapters, "traj4", &crate::common::fixtures::POOL);
    let weighted = at_one(&adapters);
    let control = Control::default();
    let ssr = Ssr::new(&calibration).merge(&cpu, &weighted).unwrap();
    let measured = |merged: Merged| merged.measured(&calibration, &weighted, &control).unwrap();
    let close = |x: f64, y: f64| (x - y).abs() <= 1e-6;

    let own = ssr.report.losses.unwrap();
    let again = measured(ssr.clone()).report;
    assert!(close(own.merged, again.losses.unwrap().merged), "{own:?} {:?}", again.losses);
    for (x, y) in ssr.report.layers.iter().zip(&again.layers) {
        assert_eq!((x.tokens, x.losses.is_some()), (y.tokens, true));
        assert!(close(x.losses.unwrap().merged, y.losses.unwrap().merged), "{}", x.layer);
    }
    let linear = measured(Linear.merge(&weighted).unwrap()).report.losses.unwrap();
    assert!(close(linear.merged, own.sum) && close(linear.sum, own.sum), "{linear:?} {own:?}");
    let quarter: Vec<_> = adapters.iter().map(|a| a.at(0.25)).collect();
    let average = measured(Linear.merge(&quarter).unwrap()).report.losses.unwrap();
    assert!(close(average.merged, own.average), "{average:?} {own:?}");

    // By the inputs themselves, of a merge that is truncated and so has other factors.
    let merged = ssr.truncated(&cpu, &Truncation::rank(9), &control).unwrap();
    assert!(merged.report.losses.is_none());
    let merged = measured(merged);
    for (layer, report) in merged.adapter.layers().iter().zip(&merged.report.layers).take(3) {
        let (mut lost, mut nothing) = (0.0, 0.0);
        for (adapter, task) in adapters.iter().zip(crate::common::fixtures::POOL) {
            let inputs = Tensors::open(crate::common::fixtures::activations("traj4", task));
            let Some(name) = inputs.names().into_iter().find(|name| *name == layer.module()) else {
                continue;
            };
            let x = inputs.get(&name).transposed();
            let (own, got) = (product(&delta(adapter.find(&name).unwrap()), &x), product(&delta(layer), &x));
            nothing += own.data().iter().map(|v| v * v).sum::<f64>();
            lost += own.data().iter().zip(got.data()).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
        }
        if nothing > 0.0 {
            let want = f64::sqrt(lost / nothing);
            let loss = report.losses.unwrap().merged;
            assert!(close(loss, want), "{}: {loss} {want}", layer.module());
        }
    }

    // What a merge of entries reads elsewhere is said.
    let merged = measured(EntryMerge::ties(Ties::default()).merge(&cpu, &weighted).unwrap());
    assert!(merged.report.notes.iter().any(|note| note.contains("outside")), "{:?}", merged.report.notes);
    let other = [adapter("style_shade")];
    let merged = Linear.merge(&at_one(&other)).unwrap();
    assert!(merged.measured(&calibration, &at_one(&other), &control).is_err());
}

#[test]
fn runs_are_bit_identical() {
    let adapters = few(&pool()[..2], 2);
    for case in two_tiers() {
        for (name, _, method) in methods() {
            let run = || {
                let merged = method(&case.device, &at_one(&adapters)).unwrap();
                let bytes = |layer: &Layer| (layer.a().bytes().to_vec(), layer.b().bytes().to_vec());
                merged.adapter.layers().iter().map(bytes).collect::<Vec<_>>()
            };
            assert!(run() == run(), "{name}, {}", case.name);
        }
    }
}

#[test]
fn options_out_of_range_are_refused() {
    let adapters = few(&pool()[..2], 1);
    let merge = |rule: Rule| CoreMerge::core(rule).merge(&Device::cpu(), &at_one(&adapters));
    for density in [0.0, -0.1, 1.5, f64::NAN] {
        let ties = Ties { density, ..Ties::default() };
        assert!(matches!(merge(Rule::Ties(ties)), Err(Error::Invalid(_))), "{density}");
        let dare = EntryMerge::dare(Dare { density, ..Dare::default() });
        assert!(
            matches!(dare.merge(&Device::cpu(), &at_one(&adapters)), Err(Error::Invalid(_))),
            "{density}"
        );
    }
    let ties = Ties { lambda: f64::INFINITY, ..Ties::default() };
    assert!(matches!(merge(Rule::Ties(ties)), Err(Error::Invalid(_))));
    let ties = EntryMerge::ties(Ties::default()).rank(0);
    assert!(matches!(ties.merge(&Device::cpu(), &at_one(&adapters)), Err(Error::Invalid(_))));
}
