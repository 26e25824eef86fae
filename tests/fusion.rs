//! Fusing while a model generates: parity of every kernel with its f64 twin, the published rules, and real adapters.

mod common;
#[path = "common/fixtures.rs"]
mod fixtures;

use common::{Case, Random, devices, gpus, product, relative};
use loraweld::compute::ops::Activations;
use loraweld::fusion::{Choice, Scope, Score, Selection, Selector, SelectorOptions};
use loraweld::{Adapter, Device, Dtype, Error, Format, Layer, Matrix, RawMatrix, wgpu};

const LAYER: &str = "transformer.blocks.0.proj";

/// Branches of a layer's features: adapters of these ranks, so that updates are of the features' size.
struct Problem {
    adapters: Vec<Adapter>,
    x: Matrix,
    f0: Matrix,
}

fn problem(tokens: usize, input: usize, output: usize, ranks: &[usize], size: f64, seed: u64) -> Problem {
    let mut random = Random(seed);
    let adapters = ranks
        .iter()
        .enumerate()
        .map(|(k, &rank)| {
            let a = narrow(&random.matrix(rank, input, 1.0 / (input as f64).sqrt()));
            let b = narrow(&random.matrix(output, rank, size / (rank as f64).sqrt()));
            let layer = Layer::new(LAYER, a, b).unwrap().with_scale(if k == 0 { 1.0 } else { 0.75 });
            Adapter::new(format!("adapter {k}"), Format::Peft, vec![layer]).unwrap()
        })
        .collect();
    // Values that f16 and bf16 hold.
    let coarse = |m: Matrix| Matrix { data: m.data.iter().map(|v| (v * 16.0).round() / 16.0).collect(), ..m };
    Problem { adapters, x: coarse(random.matrix(tokens, input, 1.0)), f0: coarse(random.matrix(tokens, output, 2.0)) }
}

fn narrow(m: &Matrix) -> Matrix<f32> {
    Matrix { rows: m.rows, cols: m.cols, data: m.data.iter().map(|v| *v as f32).collect() }
}

impl Problem {
    fn selector(&self, device: &Device) -> Selector {
        let options = SelectorOptions { tokens: self.x.rows.max(1), records: 8 };
        let weighted: Vec<_> = self.adapters.iter().map(|adapter| adapter.at(1.0)).collect();
        Selector::new(device, &weighted, options).unwrap()
    }

    /// u_k of every adapter, plainly.
    fn updates(&self) -> Vec<Matrix> {
        let layers = self.adapters.iter().map(|adapter| &adapter.layers()[0]);
        layers.map(|layer| product(&self.x, &fixtures::delta(layer).transposed())).collect()
    }
}

fn bytes(m: &Matrix, dtype: Dtype) -> Vec<u8> {
    let of = |v: &f64| match dtype {
        Dtype::F32 => (*v as f32).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f64(*v).to_le_bytes().to_vec(),
        Dtype::Bf16 => half::bf16::from_f64(*v).to_le_bytes().to_vec(),
    };
    m.data.iter().flat_map(of).collect()
}

fn upload(device: &Device, content: &[u8], offset: u64) -> wgpu::Buffer {
    let (gpu, queue) = device.wgpu().unwrap();
    let buffer = gpu.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: (offset + content.len() as u64).next_multiple_of(4).max(4),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });
    let mut padded = content.to_vec();
    padded.resize(content.len().next_multiple_of(4), 0);
    queue.write_buffer(&buffer, offset, &padded);
    buffer
}

fn read(device: &Device, buffer: &wgpu::Buffer, offset: u64, len: usize) -> Vec<u8> {
    let (gpu, queue) = device.wgpu().unwrap();
    let size = (len as u64).next_multiple_of(4).max(4);
    let staging = gpu.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let mut encoder = gpu.create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(buffer, offset, &staging, 0, size.min(buffer.size() - offset));
    queue.submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |_| ());
    device.wait().unwrap();
    staging.get_mapped_range(..).unwrap()[..len].to_vec()
}

/// Runs a call in buffers of the host's, both at odd offsets; gives f0.
fn encode(device: &Device, selector: &mut Selector, p: &Problem, dtypes: [Dtype; 2], how: &Selection) -> Matrix {
    const OFFSET: u64 = 300;
    let [x, f0] = [(&p.x, dtypes[0]), (&p.f0, dtypes[1])].map(|(m, dtype)| upload(device, &bytes(m, dtype), OFFSET));
    let rows = |buffer, m: &Matrix, dtype| {
        Activations::Buffer { buffer, offset: OFFSET, dtype, tokens: m.rows, width: m.cols }
    };
    let (gpu, queue) = device.wgpu().unwrap();
    let mut encoder = gpu.create_command_encoder(&Default::default());
    selector.encode(&mut encoder, LAYER, rows(&x, &p.x, dtypes[0]), rows(&f0, &p.f0, dtypes[1]), how).unwrap();
    queue.submit([encoder.finish()]);
    let content = read(device, &f0, OFFSET, bytes(&p.f0, dtypes[1]).len());
    fixtures::wide(RawMatrix::new(dtypes[1], p.f0.rows, p.f0.cols, &content).unwrap())
}

fn run(device: &Device, selector: &mut Selector, p: &Problem, how: &Selection) -> Matrix {
    assert!(!device.is_gpu() || selector.bytes() > 0);
    let (x, mut f0) = (narrow(&p.x), narrow(&p.f0).data);
    selector.run(LAYER, RawMatrix::from_f32(x.rows, x.cols, &x.data).unwrap(), &mut f0, how).unwrap();
    Matrix { rows: p.f0.rows, cols: p.f0.cols, data: f0.into_iter().map(f64::from).collect() }
}

/// KL of softmaxes by log-sum-exp in f64, each term apart.
fn plain_kl(a: &[f64], f: &[f64]) -> f64 {
    let log_sum = |v: &[f64]| {
        let max = v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        max + v.iter().map(|v| (v - max).exp()).sum::<f64>().ln()
    };
    let (la, lf) = (log_sum(a), log_sum(f));
    a.iter().zip(f).map(|(a, f)| (a - la).exp() * ((a - la) - (f - lf))).sum()
}

fn plain_score(score: Score, f0: &[f64], u: &[f64]) -> f64 {
    let f: Vec<f64> = f0.iter().zip(u).map(|(f0, u)| f0 + u).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    match score {
        Score::Kl => plain_kl(f0, &f),
        Score::Dot => 1.0 - dot(f0, &f) / (dot(f0, f0) * dot(&f, &f)).sqrt(),
        Score::Energy => dot(u, u),
    }
}

fn how(score: Score, choice: Choice) -> Selection {
    Selection { score, choice, ..Default::default() }
}

const SHAPES: [(usize, usize, usize, &[usize]); 9] = [
    (1, 1, 2, &[1, 1]),
    (3, 7, 6, &[2, 9]),
    (64, 128, 128, &[8, 8]),
    (65, 33, 130, &[5, 17, 1]),
    (67, 64, 512, &[16, 3]),
    (129, 30, 254, &[4, 4, 4, 4, 4, 4, 4, 4]),
    (31, 61, 122, &[40, 70]),
    (5, 16, 1030, &[33, 32]),
    (300, 12, 66, &[3, 2]),
];

#[test]
fn scores_are_those_of_the_definitions() {
    for (i, (tokens, input, output, ranks)) in SHAPES.into_iter().enumerate() {
        let p = problem(tokens, input, output, ranks, 0.5, i as u64);
        let updates = p.updates();
        for Case { name, device } in devices() {
            let mut selector = p.selector(&device);
            for score in Score::ALL {
                run(&device, &mut selector, &p, &how(score, Choice::Hard));
                let got = selector.tokens().unwrap().scores;
                for (k, u) in updates.iter().enumerate() {
                    let plain = |token| plain_score(score, p.f0.row(token), u.row(token));
                    let wanted: Vec<f64> = (0..tokens).map(plain).collect();
                    let largest = wanted.iter().fold(0.0, |max: f64, v| max.max(*v));
                    for (token, want) in wanted.into_iter().enumerate() {
                        // Scores are quadratic in u, of which f32 products keep 1e-6 of what they add up, not
                        // of what cancellation leaves; the definition itself cancels, in f64.
                        let tolerance = 1e-5 * want + 2e-6 * (want * largest).sqrt() + 1e-13;
                        let error = (got[(token, k)] - want).abs();
                        assert!(
                            error <= tolerance,
                            "{name} {score:?} {tokens}x{input}x{output}: token {token}, adapter {k}: {} for {want}",
                            got[(token, k)]
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn outputs_and_decisions_are_those_of_the_twin() {
    let choices = [
        how(Score::Kl, Choice::Hard),
        how(Score::Kl, Choice::Soft),
        how(Score::Dot, Choice::Hard),
        how(Score::Energy, Choice::Soft),
        Selection { scope: Scope::Layer, ..Default::default() },
        Selection { scope: Scope::Group(16), normalise: true, ..Default::default() },
        Selection { normalise: true, choice: Choice::Soft, ..Default::default() },
    ];
    for (i, (tokens, input, output, ranks)) in SHAPES.into_iter().enumerate() {
        let p = problem(tokens, input, output, ranks, 0.5, 100 + i as u64);
        let mut fixed = vec![0.0; ranks.len()];
        (fixed[0], fixed[1]) = (0.25, -1.5);
        let choices = choices.iter().cloned().chain([how(Score::Kl, Choice::Fixed(fixed))]);
        for (c, choice) in choices.enumerate() {
            let mut twin = p.selector(&Device::cpu());
            let want = run(&Device::cpu(), &mut twin, &p, &choice);
            let decided = twin.tokens().unwrap();
            for Case { name, device } in gpus().into_iter().skip(i % 2) {
                let mut selector = p.selector(&device);
                let [x, f0] = [[Dtype::F32; 2], [Dtype::F16; 2], [Dtype::Bf16, Dtype::F32], [Dtype::F16, Dtype::Bf16]]
                    [(i + c) % 4];
                let got = encode(&device, &mut selector, &p, [x, f0], &choice);
                let label = format!("{name} {choice:?} {x} {f0} {tokens}x{input}x{output}");
                let tokens = selector.tokens().unwrap();
                // Rounded once to the type of f0.
                let tolerance = [2e-6, 5e-4, 4e-3][f0 as usize];
                same(&tokens, &decided, &choice, &label, |same| {
                    let rows = |m: &Matrix| {
                        let data = same.iter().flat_map(|&token| m.row(token).to_vec()).collect();
                        Matrix { rows: same.len(), cols: m.cols, data }
                    };
                    let error = relative(&rows(&got), &rows(&want));
                    assert!(error <= tolerance, "{label}: {error:e}");
                });
                let wins: u32 = selector.decisions().unwrap()[0].wins.iter().sum();
                assert_eq!(wins as usize, p.x.rows, "{label}");
            }
        }
    }
}

/// Compares weights; gives tokens whose decision is not a tie. The stated margin: 1e-4 of the larger score.
fn same(
    got: &loraweld::fusion::Tokens,
    want: &loraweld::fusion::Tokens,
    selection: &Selection,
    label: &str,
    check: impl FnOnce(&[usize]),
) {
    let mut clear = Vec::new();
    for token in 0..want.scores.rows {
        let mut scores = want.scores.row(token).to_vec();
        scores.sort_by(|x, y| y.total_cmp(x));
        let tie = selection.scope == Scope::Token
            && selection.choice == Choice::Hard
            && scores[0] - scores[1] <= 1e-4 * scores[0];
        if !tie {
            clear.push(token);
            for (got, want) in got.weights.row(token).iter().zip(want.weights.row(token)) {
                match selection.choice {
                    Choice::Soft => assert!((got - want).abs() <= 1e-5, "{label}: token {token}: {got} for {want}"),
                    _ => assert_eq!(got, want, "{label}: token {token}"),
                }
            }
        }
    }
    assert!(clear.len() * 10 >= want.scores.rows * 9, "{label}: too many ties to test anything");
    check(&clear);
}

/// Updates that f32 holds exactly, whatever a device sums: A picks a channel of x, B has one column.
fn exact(f0: Vec<f64>, u: &[Vec<f64>]) -> Problem {
    let width = f0.len();
    let adapters = u
        .iter()
        .enumerate()
        .map(|(k, u)| {
            let a = Matrix { rows: 1, cols: 1, data: vec![1.0] };
            let b = Matrix { rows: width, cols: 1, data: u.iter().map(|v| *v as f32).collect() };
            let layer = Layer::new(LAYER, a, b).unwrap();
            Adapter::new(format!("adapter {k}"), Format::Peft, vec![layer]).unwrap()
        })
        .collect();
    Problem {
        adapters,
        x: Matrix { rows: 1, cols: 1, data: vec![1.0] },
        f0: Matrix { rows: 1, cols: width, data: f0 },
    }
}

#[test]
fn divergence_keeps_its_digits_from_tiny_updates_to_logits_of_80() {
    let mut random = Random(5);
    let mut uniform = |width: usize, size: f64, grain: f64| -> Vec<f64> {
        (0..width).map(|_| (((random.uniform() * 2.0 - 1.0) * size) * grain).round() / grain).collect()
    };
    let mut cases = Vec::new();
    for width in [2, 64, 514, 3072] {
        for size in [1.0, 20.0, 40.0, 80.0] {
            for step in [1e-4, 1e-2, 1.0, 20.0] {
                let f0 = uniform(width, size - f64::min(step, size / 2.0), 1024.0);
                cases.push((f0, uniform(width, step.min(size / 2.0), 1048576.0)));
            }
            // Every logit anew, on both sides.
            let (f0, f) = (uniform(width, size, 1024.0), uniform(width, size, 1024.0));
            let u = f.iter().zip(&f0).map(|(f, f0)| f - f0).collect();
            cases.push((f0, u));
        }
    }
    for Case { name, device } in devices() {
        for (f0, u) in &cases {
            let p = exact(f0.clone(), &[u.clone(), u.iter().map(|u| u * 0.5).collect()]);
            let mut selector = p.selector(&device);
            run(&device, &mut selector, &p, &Selection::default());
            let scores = selector.tokens().unwrap().scores;
            for (k, share) in [(0, 1.0), (1, 0.5)] {
                let f: Vec<f64> = f0.iter().zip(u).map(|(f0, u)| f0 + u * share).collect();
                let want = plain_kl(f0, &f);
                let error = (scores[(0, k)] - want).abs();
                let size = f0.iter().fold(0.0, |max: f64, v| max.max(v.abs()));
                // The plain sum cancels to 1e-14 of its terms, which are as large as logits.
                assert!(
                    error <= 1e-5 * want + 1e-14 * size,
                    "{name}: width {}, logits to {size}: {} for {want:e}: {:e}",
                    f0.len(),
                    scores[(0, k)],
                    error / want
                );
            }
        }
    }
}

#[test]
fn extreme_features_give_no_nan() {
    let mut random = Random(6);
    for size in [1e4, 1e8] {
        let of = |random: &mut Random| (0..514).map(|_| f64::from(((random.uniform() * 2.0 - 1.0) * size) as f32)).collect();
        let (f0, u, v): (Vec<f64>, Vec<f64>, Vec<f64>) = (of(&mut random), of(&mut random), of(&mut random));
        // Far ahead at one channel; a spike of the update where f0 has no weight; all alike.
        let mut spike = vec![0.0; 514];
        spike[37] = size;
        let flat = vec![size; 514];
        for (f0, u, v) in [
            (f0.clone(), u, v.clone()),
            (f0.clone(), spike.clone(), v.clone()),
            (spike.clone(), spike.iter().map(|s| -s).collect(), v),
            (flat.clone(), flat.clone(), spike),
            (flat.iter().map(|v| -v).collect(), flat.clone(), f0),
        ] {
            let p = exact(f0, &[u, v]);
            for Case { name, device } in devices() {
                let mut selector = p.selector(&device);
                for score in Score::ALL {
                    for choice in [Choice::Hard, Choice::Soft] {
                        let f = run(&device, &mut selector, &p, &how(score, choice));
                        let tokens = selector.tokens().unwrap();
                        let all = tokens.scores.data.iter().chain(&tokens.weights.data).chain(&f.data);
                        assert!(all.into_iter().all(|v| v.is_finite()), "{name} {score:?} {size:e}: {tokens:?}");
                        assert!(tokens.scores.data.iter().all(|v| *v >= 0.0), "{name} {score:?}: {tokens:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_call_is_deterministic_and_strengths_are_live() {
    let p = problem(200, 48, 320, &[8, 16], 0.5, 9);
    for Case { name, device } in gpus() {
        let mut selector = p.selector(&device);
        let how = Selection::default();
        let [first, second] = [(); 2].map(|()| encode(&device, &mut selector, &p, [Dtype::F16; 2], &how));
        assert_eq!(first, second, "{name}");

        // Written after encoding, before submission.
        let (x, f0) = (upload(&device, &bytes(&p.x, Dtype::F32), 0), upload(&device, &bytes(&p.f0, Dtype::F32), 0));
        let rows = |buffer, m: &Matrix| {
            Activations::Buffer { buffer, offset: 0, dtype: Dtype::F32, tokens: m.rows, width: m.cols }
        };
        let (gpu, queue) = device.wgpu().unwrap();
        let mut encoder = gpu.create_command_encoder(&Default::default());
        let sum = Selection { choice: Choice::Fixed(vec![1.0, 1.0]), ..Default::default() };
        selector.encode(&mut encoder, LAYER, rows(&x, &p.x), rows(&f0, &p.f0), &sum).unwrap();
        selector.set_strength(1, -0.5).unwrap();
        queue.submit([encoder.finish()]);
        let got = read(&device, &f0, 0, p.f0.data.len() * 4);
        let got = fixtures::wide(RawMatrix::new(Dtype::F32, p.f0.rows, p.f0.cols, &got).unwrap());
        let updates = p.updates();
        let mut want = p.f0.clone();
        for (i, w) in want.data.iter_mut().enumerate() {
            *w += updates[0].data[i] - 0.5 * updates[1].data[i];
        }
        let error = relative(&got, &want);
        assert!(error <= 2e-6, "{name}: {error:e}");

        selector.set_temperature(2.5).unwrap();
        selector.set_strength(1, 0.8).unwrap();
        run(&device, &mut selector, &p, &Selection::default());
        let scores = selector.tokens().unwrap().scores;
        for token in 0..p.x.rows {
            let a: Vec<f64> = p.f0.row(token).iter().map(|v| v / 2.5).collect();
            let f: Vec<f64> = a.iter().zip(updates[1].row(token)).map(|(a, u)| a + 0.8 * u / 2.5).collect();
            let want = plain_kl(&a, &f);
            assert!((scores[(token, 1)] - want).abs() <= 1e-5 * want + 1e-13, "{name}: token {token}");
        }
    }
}

#[test]
fn running_means_make_unlike_adapters_comparable() {
    // The second adapter's updates are ten times larger: without normalisation it wins everywhere.
    let mut p = problem(256, 32, 128, &[8, 8], 0.2, 11);
    let layer = p.adapters[1].layers()[0].with_scale(7.5);
    p.adapters[1] = Adapter::new("strong", Format::Peft, vec![layer]).unwrap();
    for Case { name, device } in devices() {
        let mut selector = p.selector(&device);
        let wins = |selector: &mut Selector, normalise: bool| {
            run(&device, selector, &p, &Selection { normalise, ..Default::default() });
            selector.decisions().unwrap().last().unwrap().wins.clone()
        };
        assert_eq!(wins(&mut selector, false), [0, 256], "{name}");
        for _ in 0..2 {
            let normalised = wins(&mut selector, true);
            assert!(normalised[0] > 64 && normalised[1] > 64, "{name}: {normalised:?}");
        }
        selector.reset().unwrap();
        let log = selector.decisions().unwrap();
        assert_eq!(log.iter().map(|d| d.call).collect::<Vec<_>>(), [0, 1, 2], "{name}");
    }
}

#[test]
fn the_log_keeps_the_last_calls() {
    let p = problem(5, 8, 16, &[2, 2], 0.5, 12);
    for Case { name, device } in devices() {
        let mut selector = p.selector(&device);
        for i in 0..11 {
            let weights = if i % 2 == 0 { vec![1.0, 0.0] } else { vec![0.0, 1.0] };
            run(&device, &mut selector, &p, &how(Score::Kl, Choice::Fixed(weights)));
        }
        let log = selector.decisions().unwrap();
        assert_eq!(log.len(), 8, "{name}");
        for (decision, call) in log.iter().zip(3..) {
            assert_eq!(decision.call, call, "{name}");
            assert_eq!(decision.layer, "blocks.0.proj");
            assert_eq!(decision.wins, if call % 2 == 0 { [5, 0] } else { [0, 5] }, "{name}");
        }
    }
}

#[test]
fn layers_of_one_adapter_are_its_own() {
    let mut p = problem(9, 8, 16, &[2, 2], 0.5, 13);
    let other = Layer::new("transformer.blocks.1.proj", Matrix::zeros(1, 8), Matrix::zeros(16, 1)).unwrap();
    p.adapters[1] = Adapter::new("elsewhere", Format::Peft, vec![other]).unwrap();
    for Case { name, device } in devices() {
        let mut selector = p.selector(&device);
        assert!(selector.has("blocks.1.proj") && !selector.has("blocks.2.proj"));
        let got = run(&device, &mut selector, &p, &Selection::default());
        let mut want = p.f0.clone();
        let layer = &p.adapters[0].layers()[0];
        let u = product(&p.x, &fixtures::delta(layer).transposed());
        want.data.iter_mut().zip(&u.data).for_each(|(w, u)| *w += u);
        let error = relative(&got, &want);
        assert!(error <= 2e-6, "{name}: {error:e}");
        assert_eq!(selector.tokens().unwrap().weights.row(3), [1.0, 0.0]);
    }
}

#[test]
fn what_is_wrong_is_said() {
    let p = problem(4, 8, 6, &[2, 2], 0.5, 14);
    let message = |e: Error| e.to_string();
    for Case { device, .. } in devices() {
        let options = SelectorOptions { tokens: 4, records: 1 };
        let one = Selector::new(&device, &[p.adapters[0].at(1.0)], options);
        assert!(message(one.unwrap_err()).contains("2 to 8"));
        let nan = Selector::new(&device, &[p.adapters[0].at(1.0), p.adapters[1].at(f64::NAN)], options);
        assert!(message(nan.unwrap_err()).contains("adapter 1"));
        let mut selector = p.selector(&device);
        let x = [0f32; 5 * 8];
        let mut f0 = [0f32; 5 * 6];
        let mut run = |rows, cols, len, layer, how: Selection| {
            let x = RawMatrix::from_f32(rows, cols, &x[..rows * cols]).unwrap();
            message(selector.run(layer, x, &mut f0[..len], &how).unwrap_err())
        };
        let default = Selection::default;
        assert!(run(5, 8, 30, LAYER, default()).contains("made for 4"));
        assert!(run(4, 7, 24, LAYER, default()).contains("4 x 7"));
        assert!(run(4, 8, 23, LAYER, default()).contains("23"));
        assert!(run(4, 8, 24, "blocks.7", default()).contains("none of the selector's adapters"));
        assert!(run(4, 8, 24, LAYER, how(Score::Kl, Choice::Fixed(vec![1.0]))).contains("2 finite numbers"));
        let zero = Selection { scope: Scope::Group(0), ..Default::default() };
        assert!(run(4, 8, 24, LAYER, zero).contains("1 token"));
        assert!(selector.set_temperature(0.0).is_err() && selector.set_strength(2, 1.0).is_err());
    }
}
