//! NP-LoRA and the sum against the f64 references and the formula over dense SVD.

use crate::common::fixtures::{Tensors, adapter, data, delta, wide};
use crate::common::{Random, devices, product, relative, singular_values};
use loraweld::{
    Action, Adapter, Directions, Error, Format, Layer, Linear, Matrix, Merged, NpLora, NpLoraOptions,
    Projection,
};

fn to_f32(m: &Matrix) -> Matrix<f32> {
    m.map(|v| v as f32)
}

fn layer(name: &str, a: &Matrix, b: &Matrix) -> Layer {
    Layer::new(name, to_f32(a), to_f32(b)).unwrap()
}

fn made(name: &str, layers: Vec<Layer>) -> Adapter {
    Adapter::new(name, Format::Peft, layers).unwrap()
}

fn norm(m: &Matrix) -> f64 {
    // Squares of 1e-30 and 1e30 are fine in f64.
    m.data().iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn minus(a: &Matrix, t: f64, b: &Matrix) -> Matrix {
    Matrix::from_fn(a.rows(), a.cols(), |i, j| a[(i, j)] - t * b[(i, j)])
}

fn plus(a: &Matrix, b: &Matrix) -> Matrix {
    minus(a, -1.0, b)
}

/// The right singular vectors of a dense matrix, as rows, of at most `most` singular values that are not negligible.
fn directions(dense: &Matrix, most: usize) -> Matrix {
    let svd =
        faer::MatRef::from_row_major_slice(dense.data(), dense.rows(), dense.cols()).thin_svd().unwrap();
    let (s, v) = (svd.S().column_vector(), svd.V());
    let k = (0..s.nrows()).filter(|&k| k < most && s[k] > 2.5e-7 * s[0] && s[k] > 0.0).count();
    Matrix::from_fn(k, dense.cols(), |k, i| v[(i, k)])
}

/// M − t·(M·V)·Vᵀ.
fn off(m: &Matrix, v: &Matrix, t: f64) -> Matrix {
    minus(m, t, &product(&product(m, &v.transposed()), v))
}

/// The largest relative difference of ΔW over all layers.
fn worst(merged: &Merged, want: impl Fn(&str) -> Matrix) -> f64 {
    let layers = merged.adapter.layers();
    layers.iter().map(|layer| relative(&delta(layer), &want(layer.module()))).fold(0.0, f64::max)
}

fn same(x: &Merged, y: &Merged) -> f64 {
    worst(x, |name| delta(y.adapter.find(name).unwrap()))
}

#[test]
fn merges_give_the_reference() {
    let reference = Tensors::open(data("reference/np_lora_content_factors_f64.safetensors"));
    let (style, subject) = (adapter("style_shade"), adapter("content_heart"));
    for case in devices() {
        for (name, method) in [("np_hard", NpLora::hard()), ("np_soft", NpLora::soft(0.5))] {
            let merged = method.merge(&case.device, style.at(1.0), &[subject.at(1.0)]).unwrap();
            let error = worst(&merged, |layer| {
                let (s, c) = (style.find(layer).unwrap(), subject.find(layer).unwrap());
                let a = reference.get(&format!("{name}/{layer}.lora_A.weight"));
                let mut projected = product(&wide(c.b()), &a);
                projected.data_mut().iter_mut().for_each(|v| *v *= c.scale().value);
                plus(&delta(s), &projected)
            });
            println!("{name}, {}: {error:.1e}", case.name);
            assert!(error <= 1e-5, "{name}, {}: {error:e}", case.name);
            for layer in &merged.report.layers {
                let p = &layer.projections()[0];
                assert_eq!((layer.rank, layer.action.kind(), p.directions), (16, "projected", 8));
                assert!(p.angles.is_sorted() && p.angles.len() == 8, "{:?}", p.angles);
                let t = p.share;
                assert!((p.after - (1.0 - t) * p.before).abs() <= 1e-6, "{}: {p:?}", case.name);
                assert!(name != "np_hard" || p.after <= 1e-6, "{}: {p:?}", case.name);
                assert!(p.removed > 0.0 && p.removed < 1.0, "{}: {p:?}", case.name);
            }
        }
    }
}

#[test]
fn the_report_has_the_spectrum_of_the_style() {
    let (style, heart, cat) =
        (adapter("style_shade"), adapter("content_heart"), adapter("concept_c3_mirror"));
    for directions in [Directions::All, Directions::Count(3)] {
        let method = NpLora::default().options(NpLoraOptions { directions, ..Default::default() });
        for case in devices() {
            // Two subjects take another way than one.
            for subjects in [&[heart.at(1.0)][..], &[heart.at(1.0), cat.at(0.5)]] {
                let merged = method.merge(&case.device, style.at(0.5), subjects).unwrap();
                for layer in &merged.report.layers {
                    let spectrum = layer.style().unwrap();
                    assert_eq!(spectrum.kept, layer.projections()[0].directions);
                    let want = singular_values(&delta(style.find(&layer.layer).unwrap()));
                    for (got, want) in spectrum.values.iter().zip(want) {
                        // Decompositions of f32 factors, relative to the largest.
                        let error = (got - 0.5 * want).abs() / spectrum.values[0];
                        assert!(error <= 1e-6, "{}, {}: {error:e}", case.name, layer.layer);
                    }
                }
            }
        }
    }
}

#[test]
fn merges_give_the_fingerprints() {
    let reference = Tensors::open(data("reference/fingerprints_f32.safetensors"));
    let subject = adapter("content_heart");
    let check = |what: &str, merged: Merged| {
        for layer in merged.adapter.layers() {
            let probe = reference.get(&format!("probe.in{}", layer.input()));
            let want = reference.get(&format!("{what}/{}", layer.module()));
            let error = relative(&product(&delta(layer), &probe), &want);
            assert!(error <= 1e-5, "{what}: {}: {error:e}", layer.module());
        }
    };
    for name in ["style_shade", "style_gradient"] {
        let style = adapter(name);
        let pair = format!("content_heart+{name}");
        let cpu = loraweld::Device::cpu();
        let hard = NpLora::hard().merge(&cpu, style.at(1.0), &[subject.at(1.0)]).unwrap();
        check(&format!("{pair}.np_hard"), hard);
        let soft = NpLora::soft(0.5).merge(&cpu, style.at(1.0), &[subject.at(1.0)]).unwrap();
        check(&format!("{pair}.np_soft"), soft);
        check(&format!("{pair}.sum"), Linear.merge(&[subject.at(1.0), style.at(1.0)]).unwrap());
        check(&format!("{pair}.average"), Linear.merge(&[subject.at(0.5), style.at(0.5)]).unwrap());
    }
}

/// Style and subject of hard layers: (name, A_s, B_s, A_c, B_c).
fn hard_layers() -> Vec<(&'static str, Matrix, Matrix, Matrix, Matrix)> {
    let mut random = Random(31);
    let mut ordinary = |rs: usize, rc: usize, input: usize, output: usize, scale: f64| {
        (
            random.matrix(rs, input, scale),
            random.matrix(output, rs, 0.1),
            random.matrix(rc, input, scale),
            random.matrix(output, rc, 0.1),
        )
    };
    let mut all = Vec::new();
    let mut push = |name, (a_s, b_s, a_c, b_c)| all.push((name, a_s, b_s, a_c, b_c));
    push("blocks.0.ordinary", ordinary(8, 6, 60, 40, 0.1));
    push("blocks.0.rank_one", ordinary(1, 1, 30, 20, 1.0));
    push("blocks.0.wide_rank", ordinary(12, 10, 7, 50, 1.0));
    push("blocks.0.few_outputs", ordinary(12, 10, 50, 5, 1.0));
    push("blocks.0.tiny", ordinary(4, 5, 33, 21, 1e-30));
    push("blocks.0.huge", ordinary(4, 5, 33, 21, 1e30));
    let mut deficient = ordinary(8, 6, 50, 40, 1.0);
    for i in 0..40 {
        deficient.1[(i, 3)] = -2.0 * deficient.1[(i, 1)];
        deficient.1[(i, 6)] = 0.0;
    }
    push("blocks.0.deficient_b", deficient);
    let mut duplicate = ordinary(8, 6, 50, 40, 1.0);
    for j in 0..50 {
        duplicate.0[(5, j)] = duplicate.0[(2, j)];
        duplicate.0[(7, j)] = 0.0;
        duplicate.2[(4, j)] = 2.0 * duplicate.2[(0, j)];
    }
    push("blocks.0.duplicate_rows", duplicate);
    let mut zero = ordinary(4, 4, 20, 20, 1.0);
    zero.1.data_mut().fill(0.0);
    push("blocks.0.zero_style", zero);
    let mut zero = ordinary(4, 4, 20, 20, 1.0);
    zero.3.data_mut().fill(0.0);
    push("blocks.0.zero_subject", zero);
    // Unit vectors: all singular values are equal, and the subspaces are orthogonal, or the same.
    let unit = |rows: usize, cols: usize, first: usize| {
        Matrix::from_fn(rows, cols, |i, j| f64::from(u8::from(i + first == j)))
    };
    let (_, b_s, _, b_c) = ordinary(4, 4, 24, 24, 1.0);
    push("blocks.0.equal", (unit(4, 24, 0), unit(4, 24, 3).transposed(), unit(4, 24, 2), b_c.clone()));
    push("blocks.0.orthogonal", (unit(4, 24, 0), b_s.clone(), unit(4, 24, 9), b_c));
    let (a, b, _, _) = ordinary(6, 6, 40, 30, 0.3);
    push("blocks.0.same", (a.clone(), b.clone(), a, b));
    all
}

#[test]
fn hard_inputs_give_the_formula_over_dense_svd() {
    let all = hard_layers();
    let style = made("style", all.iter().map(|(name, a, b, _, _)| layer(name, a, b)).collect());
    let subject = made("subject", all.iter().map(|(name, _, _, a, b)| layer(name, a, b)).collect());
    let (s, c) = (0.8, -1.5);
    for case in devices() {
        for (method, t, most) in [
            (NpLora::hard(), 1.0, usize::MAX),
            (NpLora::soft(0.5), 1.0 / 3.0, usize::MAX),
            (
                NpLora::default().options(NpLoraOptions {
                    projection: Projection::Hard,
                    directions: Directions::Count(1),
                    ..Default::default()
                }),
                1.0,
                1,
            ),
        ] {
            let merged = method.merge(&case.device, style.at(s), &[subject.at(c)]).unwrap();
            for (name, a_s, b_s, a_c, b_c) in &all {
                // Equal singular values have no first direction.
                if most == 1 && *name == "blocks.0.equal" {
                    continue;
                }
                let what = format!("{}: {name}, t = {t:.2}, most {most}", case.name);
                let layer = merged.adapter.find(name).unwrap();
                let v = directions(&product(b_s, a_s), most);
                let mut d_s = product(b_s, a_s);
                let mut d_c = product(b_c, a_c);
                d_s.data_mut().iter_mut().for_each(|v| *v *= s);
                d_c.data_mut().iter_mut().for_each(|v| *v *= c);
                let error = relative(&delta(layer), &plus(&d_s, &off(&d_c, &v, t)));
                assert!(error <= 1e-5, "{what}: {error:e}");
                // The projected part alone.
                let (a, b) = (wide(layer.a()), wide(layer.b()));
                let rank = a_s.rows();
                let a = Matrix::from_fn(a_c.rows(), a.cols(), |i, j| a[(rank + i, j)]);
                let b = Matrix::from_fn(b.rows(), a_c.rows(), |i, j| b[(i, rank + j)]);
                let left = norm(&product(&product(&b, &a), &v.transposed()));
                let before = norm(&product(&d_c, &v.transposed()));
                assert!(
                    left <= (1.0 - t) * before + 1e-6 * norm(&d_c),
                    "{what}: {left:e} of {:e}",
                    norm(&d_c)
                );
                let report =
                    &merged.report.layers.iter().find(|l| l.layer == *name).unwrap().projections()[0];
                assert_eq!(report.directions, v.rows(), "{what}");
                let share = if norm(&d_c) > 0.0 { before / norm(&d_c) } else { 0.0 };
                assert!((report.before - share).abs() <= 1e-5, "{what}: {} {share}", report.before);
                assert!(report.removed.is_finite() && report.angles.iter().all(|a| a.is_finite()), "{what}");
                match *name {
                    "blocks.0.same" if most > 1 && t == 1.0 => {
                        let error = relative(&delta(layer), &d_s);
                        assert!(error <= 1e-6, "{what}: the style alone: {error:e}");
                        assert!(report.angles.iter().all(|a| *a < 0.05), "{what}: {:?}", report.angles);
                    }
                    "blocks.0.orthogonal" => {
                        assert_eq!((report.removed, report.before), (0.0, 0.0), "{what}");
                        assert!(report.angles.iter().all(|a| (a - 90.0).abs() < 1e-3), "{what}");
                    }
                    _ => {}
                }
            }
        }
    }
}

#[test]
fn soft_goes_from_the_sum_to_hard() {
    let (style, subject) = (adapter("style_shade"), adapter("content_heart"));
    let sum = Linear.merge(&[style.at(0.7), subject.at(1.2)]).unwrap();
    assert!(sum.report.layers.iter().all(|layer| layer.action == Action::Concatenated));
    for case in devices() {
        let merge = |method: NpLora| method.merge(&case.device, style.at(0.7), &[subject.at(1.2)]).unwrap();
        let error = same(&merge(NpLora::soft(0.0)), &sum);
        assert!(error <= 1e-7, "{}: mu 0: {error:e}", case.name);
        let error = same(&merge(NpLora::soft(1e9)), &merge(NpLora::hard()));
        assert!(error <= 1e-6, "{}: mu 1e9: {error:e}", case.name);
        assert_eq!(same(&merge(NpLora::soft(f64::INFINITY)), &merge(NpLora::hard())), 0.0);
    }
}

#[test]
fn how_an_adapter_is_factored_does_not_matter() {
    let mut random = Random(32);
    let (a_s, b_s) = (random.matrix(8, 60, 0.1), random.matrix(50, 8, 0.1));
    let (a_c, b_c) = (random.matrix(6, 60, 0.1), random.matrix(50, 6, 0.1));
    let scaled = |a: &Matrix, b: &Matrix| {
        let d = |k: usize| 10f64.powi(3 * k as i32 - 9);
        let a = Matrix::from_fn(a.rows(), a.cols(), |k, j| a[(k, j)] / d(k));
        layer("x", &a, &Matrix::from_fn(b.rows(), b.cols(), |i, k| b[(i, k)] * d(k)))
    };
    let rotated = |a: &Matrix, b: &Matrix| {
        let n = a.rows();
        // I − 2·w·wᵀ / wᵀw, its own inverse
        let w: Vec<f64> = (0..n).map(|k| 1.0 + k as f64).collect();
        let ww: f64 = w.iter().map(|w| w * w).sum();
        let h = Matrix::from_fn(n, n, |i, j| f64::from(u8::from(i == j)) - 2.0 * w[i] * w[j] / ww);
        layer("x", &product(&h, a), &product(b, &h))
    };
    let plain = |a: &Matrix, b: &Matrix| layer("x", a, b);
    for case in devices() {
        for method in [NpLora::hard(), NpLora::soft(0.5)] {
            let merge = |style: Layer, subject: Layer| {
                let (style, subject) = (made("style", vec![style]), made("subject", vec![subject]));
                method.merge(&case.device, style.at(1.0), &[subject.at(1.0)]).unwrap()
            };
            let want = merge(plain(&a_s, &b_s), plain(&a_c, &b_c));
            for (what, got) in [
                ("scaled", merge(scaled(&a_s, &b_s), scaled(&a_c, &b_c))),
                ("rotated", merge(rotated(&a_s, &b_s), rotated(&a_c, &b_c))),
            ] {
                let error = same(&got, &want);
                assert!(error <= 1e-5, "{}: {what}: {error:e}", case.name);
            }
        }
    }
}

#[test]
fn later_subjects_give_way_to_all_before_them() {
    let mut random = Random(33);
    let names = ["x", "y"];
    let adapters: Vec<Adapter> = (0..4)
        .map(|k| {
            let layers = names
                .iter()
                .map(|name| layer(name, &random.matrix(3 + k, 40, 0.3), &random.matrix(30, 3 + k, 0.3)));
            // The last lacks a layer; the one before is nearly the second.
            made(["style", "one", "two", "three"][k], layers.take(if k == 3 { 1 } else { 2 }).collect())
        })
        .collect();
    for case in devices() {
        for (method, t) in [(NpLora::hard(), 1.0), (NpLora::soft(0.5), 1.0 / 3.0)] {
            let subjects: Vec<_> = adapters[1..].iter().map(|a| a.at(1.0)).collect();
            let merged = method.merge(&case.device, adapters[0].at(1.0), &subjects).unwrap();
            for layer in merged.adapter.layers() {
                let name = layer.module();
                let mut stack = Matrix::zeros(0, 40);
                let mut want = Matrix::zeros(30, 40);
                for adapter in &adapters {
                    let Some(layer) = adapter.find(name) else { continue };
                    let d = delta(layer);
                    let v =
                        if stack.rows() == 0 { Matrix::zeros(0, 40) } else { directions(&stack, usize::MAX) };
                    want = plus(&want, &off(&d, &v, t));
                    let rows = [stack.data(), d.data()].concat();
                    stack = Matrix::new(stack.rows() + d.rows(), 40, rows).unwrap();
                }
                let error = relative(&delta(layer), &want);
                assert!(error <= 1e-5, "{}: {name}, t = {t:.2}: {error:e}", case.name);
            }
            let directions = |name: &str| -> Vec<usize> {
                let layer = merged.report.layers.iter().find(|l| l.layer == name).unwrap();
                layer.projections().iter().map(|p| p.directions).collect()
            };
            assert_eq!((directions("x"), directions("y")), (vec![3, 7, 12], vec![3, 7]), "{}", case.name);
        }
        // A subject twice: nothing is left of it the second time.
        let twice = [adapters[1].at(1.0), adapters[1].at(1.0)];
        let once = NpLora::hard().merge(&case.device, adapters[0].at(1.0), &twice[..1]).unwrap();
        let twice = NpLora::hard().merge(&case.device, adapters[0].at(1.0), &twice).unwrap();
        let error = same(&twice, &once);
        assert!(error <= 1e-6, "{}: {error:e}", case.name);
    }
}

#[test]
fn layers_of_one_adapter_pass_through_and_patterns_choose_mu() {
    let (style, subject) = (adapter("style_shade"), adapter("content_heart"));
    let half = made("half", style.layers().iter().take(10).cloned().collect());
    let options = NpLoraOptions {
        by_layer: vec![
            ("transformer_blocks.*".into(), Projection::Soft(0.0)),
            ("transformer_blocks.0.*".into(), Projection::Hard),
            ("nothing.*".into(), Projection::Hard),
        ],
        ..Default::default()
    };
    for case in devices().into_iter().filter(|case| ["CPU", "auto, f64"].contains(&case.name)) {
        let method = NpLora::default().options(options.clone());
        let merged = method.merge(&case.device, half.at(1.0), &[subject.at(1.0)]).unwrap();
        let passed = merged.report.layers.iter().filter(|l| l.action == Action::PassedThrough).count();
        assert_eq!((passed, merged.report.layers.len()), (14, 24));
        for (layer, report) in merged.adapter.layers().iter().zip(&merged.report.layers) {
            if report.action == Action::PassedThrough {
                let alone = subject.find(layer.module()).unwrap();
                assert_eq!(layer.a().bytes(), alone.a().bytes());
                assert_eq!(layer.b().bytes(), alone.b().bytes());
                continue;
            }
            let share = if report.layer.starts_with("transformer_blocks.0.") { 1.0 } else { 0.0 };
            assert_eq!(report.projections()[0].share, share, "{}", report.layer);
        }
        assert!(merged.report.notes.iter().any(|note| note.contains("nothing.*")));
        assert!(merged.report.to_string().contains("10 layers projected, 14 passed through"));
    }
}

#[test]
fn runs_are_bit_identical() {
    let (style, subject) = (adapter("style_shade"), adapter("content_heart"));
    for case in devices() {
        let run = || {
            let merged = NpLora::soft(0.5).merge(&case.device, style.at(1.0), &[subject.at(1.0)]).unwrap();
            let bytes = |layer: &Layer| (layer.a().bytes().to_vec(), layer.b().bytes().to_vec());
            merged.adapter.layers().iter().map(bytes).collect::<Vec<_>>()
        };
        assert!(run() == run(), "{}", case.name);
    }
}

#[test]
fn options_out_of_range_are_refused() {
    let cpu = loraweld::Device::cpu();
    let (style, subject) = (adapter("style_shade"), adapter("content_heart"));
    let merge = |method: NpLora| method.merge(&cpu, style.at(1.0), &[subject.at(1.0)]);
    for mu in [-1.0, f64::NAN] {
        assert!(matches!(merge(NpLora::soft(mu)), Err(Error::Invalid(_))), "{mu}");
    }
    for directions in [Directions::Count(0), Directions::Energy(0.0), Directions::Energy(1.1)] {
        let options = NpLoraOptions { directions, ..Default::default() };
        assert!(
            matches!(merge(NpLora::default().options(options)), Err(Error::Invalid(_))),
            "{directions:?}"
        );
    }
    assert!(matches!(NpLora::hard().merge(&cpu, style.at(1.0), &[]), Err(Error::Invalid(_))));
}
