//! Fusing while a model generates: parity of every kernel with its f64 twin, the published rules, and real adapters.

use crate::common::{Case, Random, product, relative};
use loraweld::compute::Disable;
use loraweld::compute::ops::Activations;
use loraweld::fusion::{Choice, Scope, Score, Selection, Selector, SelectorOptions};
use loraweld::{
    Adapter, Device, DeviceOptions, Dtype, Error, Format, Layer, Matrix, RawMatrix, Select, wgpu,
};

const LAYER: &str = "transformer.blocks.0.proj";

/// Branches of a layer's features: adapters of these ranks, so that updates are of the features' size.
struct Problem {
    adapters: Vec<Adapter>,
    x: Matrix,
    f0: Matrix,
}

/// All tiers of the GPU, and selection's kernels for matrix units, which need none.
fn gpus() -> Vec<Case> {
    crate::common::gpus().into_iter().chain(crate::common::software_units()).collect()
}

fn devices() -> Vec<Case> {
    crate::common::devices().into_iter().chain(crate::common::software_units()).collect()
}

fn problem(tokens: usize, input: usize, output: usize, ranks: &[usize], size: f64, seed: u64) -> Problem {
    let mut random = Random(seed);
    let adapters = ranks
        .iter()
        .enumerate()
        .map(|(k, &rank)| {
            let a = narrow(&random.matrix(rank, input, 1.0 / (input as f64).sqrt()));
            let mut b = narrow(&random.matrix(output, rank, size / (rank as f64).sqrt()));
            // As files in bf16 have it: one half holds it.
            if seed % 2 == 1 {
                b.data_mut().iter_mut().for_each(|v| *v = half::bf16::from_f32(*v).to_f32());
            }
            let layer = Layer::new(LAYER, a, b).unwrap().with_scale(if k == 0 { 1.0 } else { 0.75 });
            Adapter::new(format!("adapter {k}"), Format::Peft, vec![layer]).unwrap()
        })
        .collect();
    // Values that f16 and bf16 hold.
    let coarse = |m: Matrix| m.map(|v| (v * 16.0).round() / 16.0);
    Problem {
        adapters,
        x: coarse(random.matrix(tokens, input, 1.0)),
        f0: coarse(random.matrix(tokens, output, 2.0)),
    }
}

fn narrow(m: &Matrix) -> Matrix<f32> {
    m.map(|v| v as f32)
}

impl Problem {
    fn selector(&self, device: &Device) -> Selector {
        self.selector_of(device, false)
    }

    /// `exact`: as [`SelectorOptions::exact`].
    fn selector_of(&self, device: &Device, exact: bool) -> Selector {
        let options =
            SelectorOptions { tokens: self.x.rows().max(1), records: 8, exact, ..Default::default() };
        let weighted: Vec<_> = self.adapters.iter().map(|adapter| adapter.at(1.0)).collect();
        Selector::new(device, &weighted, options).unwrap()
    }

    /// u_k of every adapter, plainly.
    fn updates(&self) -> Vec<Matrix> {
        let layers = self.adapters.iter().map(|adapter| &adapter.layers()[0]);
        layers.map(|layer| product(&self.x, &crate::common::fixtures::delta(layer).transposed())).collect()
    }
}

fn bytes(m: &Matrix, dtype: Dtype) -> Vec<u8> {
    let of = |v: &f64| match dtype {
        Dtype::F32 => (*v as f32).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f64(*v).to_le_bytes().to_vec(),
        Dtype::Bf16 => half::bf16::from_f64(*v).to_le_bytes().to_vec(),
    };
    m.data().iter().flat_map(of).collect()
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

/// Where matrices begin in buffers of the host's: on whole vectors, which matrix units want, and not.
const OFFSETS: [u64; 2] = [304, 300];

/// Runs a call in buffers of the host's; gives f0.
fn encode(
    device: &Device,
    selector: &mut Selector,
    p: &Problem,
    dtypes: [Dtype; 2],
    how: &Selection,
    offset: u64,
) -> Matrix {
    let [x, f0] =
        [(&p.x, dtypes[0]), (&p.f0, dtypes[1])].map(|(m, dtype)| upload(device, &bytes(m, dtype), offset));
    let rows = |buffer, m: &Matrix, dtype| Activations::Buffer {
        buffer,
        offset,
        dtype,
        tokens: m.rows(),
        width: m.cols(),
    };
    let (gpu, queue) = device.wgpu().unwrap();
    let mut encoder = gpu.create_command_encoder(&Default::default());
    selector
        .encode(&mut encoder, LAYER, rows(&x, &p.x, dtypes[0]), rows(&f0, &p.f0, dtypes[1]), how)
        .unwrap();
    queue.submit([encoder.finish()]);
    let content = read(device, &f0, offset, bytes(&p.f0, dtypes[1]).len());
    crate::common::fixtures::wide(RawMatrix::new(dtypes[1], p.f0.rows(), p.f0.cols(), &content).unwrap())
}

fn run(device: &Device, selector: &mut Selector, p: &Problem, how: &Selection) -> Matrix {
    assert!(!device.is_gpu() || selector.bytes() > 0);
    let (x, mut f0) = (narrow(&p.x), narrow(&p.f0).into_data());
    selector.run(LAYER, RawMatrix::from_f32(x.rows(), x.cols(), x.data()).unwrap(), &mut f0, how).unwrap();
    Matrix::new(p.f0.rows(), p.f0.cols(), f0.into_iter().map(f64::from).collect()).unwrap()
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

const SHAPES: [(usize, usize, usize, &[usize]); 19] = [
    (1, 1, 2, &[1, 1]),
    (3, 7, 6, &[2, 9]),
    (64, 128, 128, &[8, 8]),
    (65, 33, 130, &[5, 17, 1]),
    (67, 64, 512, &[16, 3]),
    (129, 30, 254, &[4, 4, 4, 4, 4, 4, 4, 4]),
    (31, 61, 122, &[40, 70]),
    (5, 16, 1030, &[33, 32]),
    (300, 12, 66, &[3, 2]),
    // For matrix units: every depth of a tile, and more columns than one has; more than one part.
    (33, 24, 100, &[40, 70]),
    (70, 20, 196, &[20, 30, 60]),
    (50, 16, 132, &[90, 60]),
    (40, 40, 2052, &[33, 12]),
    // Enough tokens for the projection there too.
    (300, 64, 132, &[16, 20]),
    // For features of 16 bits there: every depth of a block, an odd number of branches, a block that is half there, a part
    // without a block for each subgroup.
    (1, 8, 8, &[1, 2]),
    (33, 24, 104, &[40, 70]),
    (70, 20, 200, &[20, 30, 60]),
    (64, 16, 2056, &[33, 12]),
    (37, 16, 400, &[130, 60]),
];

#[test]
fn scores_are_those_of_the_definitions() {
    let cases = devices();
    for (i, (tokens, input, output, ranks)) in SHAPES.into_iter().enumerate() {
        let p = problem(tokens, input, output, ranks, 0.5, i as u64);
        let updates = p.updates();
        for Case { name, device } in &cases {
            let mut selector = p.selector(device);
            for score in Score::ALL {
                run(device, &mut selector, &p, &how(score, Choice::Hard));
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
    let cases = gpus();
    for (i, (tokens, input, output, ranks)) in SHAPES.into_iter().enumerate() {
        let p = problem(tokens, input, output, ranks, 0.5, 100 + i as u64);
        let mut fixed = vec![0.0; ranks.len()];
        (fixed[0], fixed[1]) = (0.25, -1.5);
        let choices = choices.iter().cloned().chain([how(Score::Kl, Choice::Fixed(fixed))]);
        for (c, choice) in choices.enumerate() {
            let mut twin = p.selector(&Device::cpu());
            let want = run(&Device::cpu(), &mut twin, &p, &choice);
            let decided = twin.tokens().unwrap();
            for case in cases.iter().skip((i + c) % 2).step_by(2) {
                let Case { name, device } = case;
                let [x, f0] = [
                    [Dtype::F32; 2],
                    [Dtype::F16; 2],
                    [Dtype::Bf16, Dtype::F32],
                    [Dtype::Bf16; 2],
                    [Dtype::F16, Dtype::Bf16],
                ][(i + c) % 5];
                let offset = OFFSETS[(i + c / 4) % 2];
                let exact = (i + c / 2) % 3 == 0;
                let mut selector = p.selector_of(device, exact);
                let is_quick = f0 != Dtype::F32 && !exact && on_units(case);
                let got = encode(device, &mut selector, &p, [x, f0], &choice, offset);
                let label = format!("{name} {choice:?} {x} {f0} {tokens}x{input}x{output} at {offset}");
                let tokens = selector.tokens().unwrap();
                // Rounded once to the type of f0.
                let tolerance = [2e-6, 5e-4, 4e-3][f0 as usize];
                let margin = if is_quick { QUICK } else { 1e-4 };
                same(&tokens, &decided, &choice, margin, &label, |same| {
                    let rows = |m: &Matrix| {
                        let data = same.iter().flat_map(|&token| m.row(token).to_vec()).collect();
                        Matrix::new(same.len(), m.cols(), data).unwrap()
                    };
                    let error = relative(&rows(&got), &rows(&want));
                    assert!(error <= tolerance, "{label}: {error:e}");
                });
                let wins: u32 = selector.decisions().unwrap()[0].wins.iter().sum();
                assert_eq!(wins as usize, p.x.rows(), "{label}");
            }
        }
    }
}

/// What scores of features of 16 bits keep on matrix units, in relation to themselves or, of what is tiny, apart.
const QUICK: f64 = 2e-3;
const QUICK_TINY: f64 = 1e-6;

/// Whether selection runs on matrix units, or as if there were some.
fn on_units(Case { name, device }: &Case) -> bool {
    device.capabilities().is_some_and(|caps| caps.matrix_units()) || name.contains("software units")
}

/// Compares weights; gives tokens whose decision is not a tie. The stated margin, of the larger score: 1e-4, or [`QUICK`].
fn same(
    got: &loraweld::fusion::Tokens,
    want: &loraweld::fusion::Tokens,
    selection: &Selection,
    margin: f64,
    label: &str,
    check: impl FnOnce(&[usize]),
) {
    let mut clear = Vec::new();
    for token in 0..want.scores.rows() {
        let mut scores = want.scores.row(token).to_vec();
        scores.sort_by(|x, y| y.total_cmp(x));
        let tie = selection.scope == Scope::Token
            && selection.choice == Choice::Hard
            && scores[0] - scores[1] <= margin * scores[0];
        if !tie {
            clear.push(token);
            for (got, want) in got.weights.row(token).iter().zip(want.weights.row(token)) {
                match selection.choice {
                    Choice::Soft => {
                        // Of two scores that are off by the margin each, a share is off by half of it.
                        let tolerance = if margin == QUICK { margin / 2.0 } else { 1e-5 };
                        assert!((got - want).abs() <= tolerance, "{label}: token {token}: {got} for {want}")
                    }
                    _ => assert_eq!(got, want, "{label}: token {token}"),
                }
            }
        }
    }
    assert!(clear.len() * 10 >= want.scores.rows() * 9, "{label}: too many ties to test anything");
    check(&clear);
}

/// What features of 16 bits are promised on matrix units, from tiny updates to logits of 80, and that it is finite beyond.
#[test]
fn features_of_16_bits_keep_what_they_are_promised() {
    let mut random = Random(6);
    let mut uniform = |width: usize, size: f64| -> Vec<f64> {
        // Values that bf16 holds, so that the twin sees the same features.
        let value = |v: f64| half::bf16::from_f64((v * 2.0 - 1.0) * size).to_f64();
        (0..width).map(|_| value(random.uniform())).collect()
    };
    let mut cases = Vec::new();
    for width in [8, 24, 64, 520, 3072] {
        for size in [1.0, 20.0, 80.0] {
            for step in [1e-4, 1e-2, 1.0, 20.0] {
                cases.push((uniform(width, size), uniform(width, step)));
            }
        }
        // A channel that outweighs all before it, and pulls the mean far away.
        let (mut f0, mut u) = (uniform(width, 1.0), uniform(width, 0.1));
        (f0[width - 3], u[width - 3]) = (30.0, 15.0);
        cases.push((f0, u));
        cases.push((uniform(width, 1e4), uniform(width, 1e4)));
    }
    for Case { name, device } in gpus() {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            for (f0, u) in &cases {
                let p = exact(f0.clone(), &[u.clone(), u.iter().map(|u| u * 0.5).collect()]);
                let mut selector = p.selector(&device);
                encode(&device, &mut selector, &p, [dtype; 2], &Selection::default(), OFFSETS[0]);
                let scores = selector.tokens().unwrap().scores;
                for (k, share) in [(0, 1.0), (1, 0.5)] {
                    let f: Vec<f64> = f0.iter().zip(u).map(|(f0, u)| f0 + u * share).collect();
                    let want = plain_kl(f0, &f);
                    let error = (scores[(0, k)] - want).abs();
                    assert!(
                        error <= QUICK * want + QUICK_TINY,
                        "{name} {dtype} of {} channels: {} for {want}",
                        f0.len(),
                        scores[(0, k)]
                    );
                }
            }
        }
    }
}

/// Updates that f32 holds exactly, whatever a device sums: A picks a channel of x, B has one column.
fn exact(f0: Vec<f64>, u: &[Vec<f64>]) -> Problem {
    let width = f0.len();
    let adapters = u
        .iter()
        .enumerate()
        .map(|(k, u)| {
            let a = Matrix::new(1, 1, vec![1.0]).unwrap();
            let b = Matrix::new(width, 1, u.iter().map(|v| *v as f32).collect()).unwrap();
            let layer = Layer::new(LAYER, a, b).unwrap();
            Adapter::new(format!("adapter {k}"), Format::Peft, vec![layer]).unwrap()
        })
        .collect();
    Problem { adapters, x: Matrix::new(1, 1, vec![1.0]).unwrap(), f0: Matrix::new(1, width, f0).unwrap() }
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
    let cases = devices();
    let mut random = Random(6);
    for size in [1e4, 1e8] {
        let of = |random: &mut Random| {
            (0..514).map(|_| f64::from(((random.uniform() * 2.0 - 1.0) * size) as f32)).collect()
        };
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
            for Case { name, device } in &cases {
                let mut selector = p.selector(device);
                for score in Score::ALL {
                    for choice in [Choice::Hard, Choice::Soft] {
                        let f = run(device, &mut selector, &p, &how(score, choice));
                        let tokens = selector.tokens().unwrap();
                        let all = tokens.scores.data().iter().chain(tokens.weights.data()).chain(f.data());
                        assert!(
                            all.into_iter().all(|v| v.is_finite()),
                            "{name} {score:?} {size:e}: {tokens:?}"
                        );
                        assert!(
                            tokens.scores.data().iter().all(|v| *v >= 0.0),
                            "{name} {score:?}: {tokens:?}"
                        );
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
        let [first, second] =
            [(); 2].map(|()| encode(&device, &mut selector, &p, [Dtype::F16; 2], &how, 304));
        assert_eq!(first, second, "{name}");

        // Written after encoding, before submission.
        let (x, f0) =
            (upload(&device, &bytes(&p.x, Dtype::F32), 0), upload(&device, &bytes(&p.f0, Dtype::F32), 0));
        let rows = |buffer, m: &Matrix| Activations::Buffer {
            buffer,
            offset: 0,
            dtype: Dtype::F32,
            tokens: m.rows(),
            width: m.cols(),
        };
        let (gpu, queue) = device.wgpu().unwrap();
        let mut encoder = gpu.create_command_encoder(&Default::default());
        let sum = Selection { choice: Choice::Fixed(vec![1.0, 1.0]), ..Default::default() };
        selector.encode(&mut encoder, LAYER, rows(&x, &p.x), rows(&f0, &p.f0), &sum).unwrap();
        selector.set_strength(1, -0.5).unwrap();
        queue.submit([encoder.finish()]);
        let got = read(&device, &f0, 0, p.f0.data().len() * 4);
        let got = crate::common::fixtures::wide(
            RawMatrix::new(Dtype::F32, p.f0.rows(), p.f0.cols(), &got).unwrap(),
        );
        let updates = p.updates();
        let mut want = p.f0.clone();
        for (i, w) in want.data_mut().iter_mut().enumerate() {
            *w += updates[0].data()[i] - 0.5 * updates[1].data()[i];
        }
        let error = relative(&got, &want);
        assert!(error <= 2e-6, "{name}: {error:e}");

        selector.set_temperature(2.5).unwrap();
        selector.set_strength(1, 0.8).unwrap();
        run(&device, &mut selector, &p, &Selection::default());
        let scores = selector.tokens().unwrap().scores;
        for token in 0..p.x.rows() {
            let a: Vec<f64> = p.f0.row(token).iter().map(|v| v / 2.5).collect();
            let f: Vec<f64> = a.iter().zip(updates[1].row(token)).map(|(a, u)| a + 0.8 * u / 2.5).collect();
            let want = plain_kl(&a, &f);
            assert!((scores[(token, 1)] - want).abs() <= 1e-5 * want + 1e-13, "{name}: token {token}");
        }
    }
}

/// What one call leaves in shared buffers does not come into the next, be it of more or fewer tokens or of infinity.
#[test]
fn calls_leave_nothing_behind() {
    // The same adapters: they are drawn first.
    let [many, few] = [300, 37].map(|tokens| problem(tokens, 48, 320, &[8, 16], 0.5, 9));
    let mut infinite = problem(300, 48, 320, &[8, 16], 0.5, 9);
    infinite.x.data_mut().fill(f64::INFINITY);
    let choices = [
        how(Score::Kl, Choice::Hard),
        how(Score::Dot, Choice::Soft),
        how(Score::Kl, Choice::Fixed(vec![0.5, 0.25])),
        Selection { scope: Scope::Group(16), ..Default::default() },
    ];
    for Case { name, device } in gpus() {
        for how in &choices {
            let call = |selector: &mut Selector, p: &Problem| {
                let f0 = encode(&device, selector, p, [Dtype::F16; 2], how, OFFSETS[0]);
                (f0, selector.tokens().unwrap())
            };
            let [want_many, want_few] = [&many, &few].map(|p| call(&mut p.selector(&device), p));
            let mut selector = many.selector(&device);
            for (p, want) in [(&many, &want_many), (&few, &want_few), (&many, &want_many)] {
                assert_eq!(call(&mut selector, p), *want, "{name} {how:?} {} tokens", p.x.rows());
                call(&mut selector, &infinite);
            }
        }
    }
}

/// Halves for matrix units are made once, and stay: of B that files have in 16 bits, one for each value, else two.
#[test]
fn memory_counts_what_is_kept_for_matrix_units() {
    let open = |software_units, memory| {
        let disable = Disable { software_units, cooperative_matrix: true, ..Default::default() };
        let options = DeviceOptions { select: Select::Gpu, disable, memory, ..Default::default() };
        Device::open(&options).ok()
    };
    let (Some(plain), Some(units)) = (open(false, None), open(true, None)) else { return };
    let caps = units.capabilities().unwrap();
    let subgroups = caps.subgroups.is_some_and(|(min, _)| min >= 8);
    if !caps.f16 || !subgroups || caps.workgroup_memory < 32 << 10 {
        return;
    }
    for (seed, bytes) in [(15, 2), (16, 4)] {
        let p = problem(1, 4, 8192, &[32, 32], 0.5, seed);
        let [without, with] = [&plain, &units].map(|device| p.selector(device).bytes());
        let halves = 8192 * 64 * bytes;
        assert_eq!(with, without + halves);
        let select = |memory| {
            let device = open(true, Some(memory)).unwrap();
            let weighted: Vec<_> = p.adapters.iter().map(|adapter| adapter.at(1.0)).collect();
            Selector::new(&device, &weighted, SelectorOptions { tokens: 1, records: 8, ..Default::default() })
        };
        assert!(select(with).is_ok());
        let error = select(without + halves / 2).unwrap_err().to_string();
        assert!(error.contains("MiB of device memory"), "{error}");
    }
}

/// Frameworks keep many tensors in one buffer.
#[test]
fn x_and_f0_may_share_a_buffer() {
    let p = problem(70, 40, 96, &[4, 6], 0.5, 10);
    for Case { name, device } in gpus() {
        let mut selector = p.selector(&device);
        let want = encode(&device, &mut selector, &p, [Dtype::F16; 2], &Selection::default(), 304);
        let (x, f0) = (bytes(&p.x, Dtype::F16), bytes(&p.f0, Dtype::F16));
        let f0_offset = x.len() as u64;
        let buffer = upload(&device, &[x, f0.clone()].concat(), 0);
        let rows = |offset, m: &Matrix| Activations::Buffer {
            buffer: &buffer,
            offset,
            dtype: Dtype::F16,
            tokens: m.rows(),
            width: m.cols(),
        };
        let (gpu, queue) = device.wgpu().unwrap();
        let mut encoder = gpu.create_command_encoder(&Default::default());
        let how = Selection::default();
        selector.encode(&mut encoder, LAYER, rows(0, &p.x), rows(f0_offset, &p.f0), &how).unwrap();
        queue.submit([encoder.finish()]);
        let got = read(&device, &buffer, f0_offset, f0.len());
        let got = crate::common::fixtures::wide(
            RawMatrix::new(Dtype::F16, p.f0.rows(), p.f0.cols(), &got).unwrap(),
        );
        assert_eq!(got, want, "{name}");
    }
}

/// A binding of WebGPU's default limits holds 128 MiB; these matrices take 144.
#[test]
fn features_larger_than_a_binding_go_through_in_windows() {
    let Some(Case { name, device }) = crate::common::gpus().pop() else { return };
    assert_eq!(device.capabilities().unwrap().max_binding, 128 << 20, "{name}");
    for (input, output) in [(4, 32768), (32768, 4)] {
        let p = problem(1100, input, output, &[1, 1], 0.5, 15);
        for how in [
            how(Score::Energy, Choice::Hard),
            Selection { scope: Scope::Layer, ..how(Score::Energy, Choice::Soft) },
        ] {
            let mut twin = p.selector(&Device::cpu());
            let want = run(&Device::cpu(), &mut twin, &p, &how);
            let mut selector = p.selector(&device);
            let got = encode(&device, &mut selector, &p, [Dtype::F32; 2], &how, OFFSETS[0]);
            let label = format!("{name} {input} to {output} {how:?}");
            same(&selector.tokens().unwrap(), &twin.tokens().unwrap(), &how, 1e-4, &label, |tokens| {
                for &token in tokens.iter().step_by(37) {
                    let row = |m: &Matrix| Matrix::new(1, m.cols(), m.row(token).to_vec()).unwrap();
                    let error = relative(&row(&got), &row(&want));
                    assert!(error <= 5e-6, "{label}: token {token}: {error:e}");
                }
            });
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
        let u = product(&p.x, &crate::common::fixtures::delta(layer).transposed());
        want.data_mut().iter_mut().zip(u.data()).for_each(|(w, u)| *w += u);
        let error = relative(&got, &want);
        assert!(error <= 2e-6, "{name}: {error:e}");
        assert_eq!(selector.tokens().unwrap().weights.row(3), [1.0, 0.0]);
    }
}

/// Activations in bf16 may be far from what halves hold, each token in its own way.
#[test]
fn features_of_16_bits_may_be_huge_and_tiny() {
    let (tokens, first) = (70, Selection { choice: Choice::Fixed(vec![1.0, 0.0]), ..Default::default() });
    for far in [0, 1] {
        let mut p = problem(tokens, 40, 24, &[5, 3], 0.5, 21);
        p.f0 = Matrix::zeros(tokens, 24);
        // Tokens of 32 share a workgroup: first there are some that all halves hold, then none.
        for (i, row) in p.x.data_mut().chunks_exact_mut(40).enumerate() {
            let size = [1.0, 2f64.powi(-100), 2f64.powi(90), 2f64.powi(-9), 2f64.powi(17)];
            row.iter_mut().for_each(|v| *v *= if i >= 32 || far == 1 { size[i % 5] } else { 1.0 });
        }
        let want = &p.updates()[0];
        for Case { name, device } in gpus() {
            for dtypes in [[Dtype::Bf16; 2], [Dtype::Bf16, Dtype::F32]] {
                let got = encode(&device, &mut p.selector(&device), &p, dtypes, &first, OFFSETS[0]);
                for token in 0..tokens {
                    let [got, want] =
                        [&got, want].map(|m| Matrix::new(1, 24, m.row(token).to_vec()).unwrap());
                    let error = relative(&got, &want);
                    // bf16 rounds the result to 2^-9, and X and B were rounded to 2^-11 or better.
                    assert!(error <= 4e-3, "{name}, {dtypes:?}: token {token}: {error:e}");
                }
            }
        }
    }
}

/// What a call was recorded with serves the next one in the same buffers, and no other.
#[test]
fn calls_that_are_kept_serve_the_same_again() {
    let p = problem(9, 16, 24, &[4, 3], 0.5, 33);
    let others = [
        how(Score::Kl, Choice::Hard),
        how(Score::Kl, Choice::Hard),
        how(Score::Energy, Choice::Hard),
        Selection { scope: Scope::Layer, normalise: true, ..Default::default() },
        Selection { scope: Scope::Layer, normalise: true, ..Default::default() },
        how(Score::Kl, Choice::Fixed(vec![0.5, 0.25])),
        how(Score::Kl, Choice::Fixed(vec![0.5, 0.5])),
    ];
    for Case { name, device } in gpus() {
        for dtype in [Dtype::F32, Dtype::F16] {
            let [kept, made] = [true, false].map(|keep| {
                let options = SelectorOptions { tokens: 9, records: 4, keep, ..Default::default() };
                let weighted: Vec<_> = p.adapters.iter().map(|adapter| adapter.at(1.0)).collect();
                let mut selector = Selector::new(&device, &weighted, options).unwrap();
                let upload = |m| upload(&device, &bytes(m, dtype), 304);
                let [x, f0, other] = [upload(&p.x), upload(&p.f0), upload(&p.f0)];
                let (gpu, queue) = device.wgpu().unwrap();
                let mut call = |f0: &wgpu::Buffer, tokens, how: &Selection| {
                    let mut encoder = gpu.create_command_encoder(&Default::default());
                    let [x, f0] = [(&x, 16), (f0, 24)].map(|(buffer, width)| Activations::Buffer {
                        buffer,
                        offset: 304,
                        dtype,
                        tokens,
                        width,
                    });
                    selector.encode(&mut encoder, LAYER, x, f0, how).unwrap();
                    queue.submit([encoder.finish()]);
                    // Also what is no part of a recorded call takes effect.
                    selector.set_strength(0, 1.0 + selector.decisions().unwrap().len() as f64).unwrap();
                };
                for how in &others {
                    call(&f0, 9, how);
                }
                call(&f0, 8, &others[6]);
                call(&other, 8, &others[6]);
                call(&other, 8, &others[6]);
                let results = [&f0, &other].map(|buffer| read(&device, buffer, 304, 9 * 24 * dtype.size()));
                (results, selector.decisions().unwrap(), selector.tokens().unwrap())
            });
            assert_eq!(kept, made, "{name} {dtype}");
        }
    }
}

#[test]
fn hosts_may_move_them_to_other_threads() {
    fn send<T: Send>() {}
    send::<Selector>();
    send::<loraweld::fusion::LiveNpLora>();
    send::<loraweld::fusion::Refiner>();
}

/// A selector of one adapter adds it: a merged one beside those that were merged, say.
#[test]
fn one_adapter_acts_alone() {
    let p = problem(5, 8, 6, &[2, 3], 0.5, 15);
    for Case { name, device } in devices() {
        let options = SelectorOptions { tokens: 5, records: 8, ..Default::default() };
        let x = narrow(&p.x);
        let mut results = Vec::new();
        for (choice, adapters) in [
            (Choice::Fixed(vec![0.0, 1.0]), vec![p.adapters[0].at(1.0), p.adapters[1].at(0.7)]),
            (Choice::Fixed(vec![1.0]), vec![p.adapters[1].at(0.7)]),
            (Choice::Hard, vec![p.adapters[1].at(0.7)]),
            (Choice::Soft, vec![p.adapters[1].at(0.7)]),
        ] {
            let mut selector = Selector::new(&device, &adapters, options).unwrap();
            let mut f0 = narrow(&p.f0).into_data();
            let rows = RawMatrix::from_f32(5, 8, x.data()).unwrap();
            selector.run(LAYER, rows, &mut f0, &how(Score::Kl, choice)).unwrap();
            results.push(Matrix::new(5, 6, f0.into_iter().map(f64::from).collect()).unwrap());
        }
        assert!(relative(&results[0], &p.f0) > 1e-3, "{name}: it changes nothing");
        for result in &results[1..] {
            // The same products in another order of sums.
            assert!(relative(result, &results[0]) <= 1e-6, "{name}");
        }
    }
}

/// A device that was opened here can be handed on, with the features that others want as well.
#[test]
fn others_may_share_a_device_of_our_own() {
    let features = wgpu::Features::all() - wgpu::Features::MAPPABLE_PRIMARY_BUFFERS;
    let options = DeviceOptions { select: Select::Gpu, features, ..Default::default() };
    if gpus().is_empty() {
        return;
    }
    let device = Device::open(&options).unwrap();
    let (gpu, queue) = device.wgpu().unwrap();
    let adapter = device.wgpu_adapter().unwrap();
    let want = (adapter.features() & features) - wgpu::Features::all_experimental_mask();
    assert!(gpu.features().contains(want), "{:?}", want - gpu.features());
    assert!(device.wgpu_instance().is_some());
    // As a host would, round again: an instance of its own it has not got.
    let shared = Device::from_wgpu(adapter, gpu.clone(), queue.clone()).unwrap();
    assert!(shared.wgpu_instance().is_none() && shared.wgpu().unwrap().0 == gpu);
    assert!(Device::cpu().wgpu_adapter().is_none() && Device::cpu().wgpu_instance().is_none());
}

#[test]
fn what_is_wrong_is_said() {
    let p = problem(4, 8, 6, &[2, 2], 0.5, 14);
    let message = |e: Error| e.to_string();
    for Case { device, .. } in devices() {
        let options = SelectorOptions { tokens: 4, records: 1, ..Default::default() };
        for count in [0, 9] {
            let adapters = vec![p.adapters[0].at(1.0); count];
            assert!(message(Selector::new(&device, &adapters, options).unwrap_err()).contains("1 to 8"));
        }
        let nan = Selector::new(&device, &[p.adapters[0].at(1.0), p.adapters[1].at(f64::NAN)], options);
        assert!(message(nan.unwrap_err()).contains("adapter 1"));
        if device.is_gpu() {
            let endless = SelectorOptions { tokens: 2_000_000, records: 1, ..Default::default() };
            let refused = Selector::new(&device, &[p.adapters[0].at(1.0)], endless);
            assert!(message(refused.unwrap_err()).contains("SelectorOptions::tokens"));
        }
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

/// Widened exactly.
fn values(m: &Matrix<f32>) -> Matrix {
    m.map(f64::from)
}

mod guidance {
    use super::*;
    use loraweld::fusion::{guide, guide_host};

    #[test]
    fn is_the_formula_in_every_type() {
        let mut random = Random(21);
        for len in [1, 2, 7, 255, 513, 4099] {
            let (c, u) = (random.matrix(1, len, 3.0), random.matrix(1, len, 3.0));
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                let round = |m: &Matrix| {
                    crate::common::fixtures::wide(RawMatrix::new(dtype, 1, len, &bytes(m, dtype)).unwrap())
                };
                let (c, u) = (round(&c), round(&u));
                let omega = 3.5;
                let want = Matrix::from_fn(1, len, |_, j| (1.0 + omega) * c[(0, j)] - omega * u[(0, j)]);
                for Case { name, device } in gpus() {
                    let [cb, ub] = [&c, &u].map(|m| upload(&device, &bytes(m, dtype), 12));
                    let rows =
                        |buffer| Activations::Buffer { buffer, offset: 12, dtype, tokens: 1, width: len };
                    let (gpu, queue) = device.wgpu().unwrap();
                    let mut encoder = gpu.create_command_encoder(&Default::default());
                    guide(&device, &mut encoder, rows(&cb), rows(&ub), omega).unwrap();
                    assert!(guide(&device, &mut encoder, rows(&cb), rows(&cb), omega).is_err());
                    queue.submit([encoder.finish()]);
                    let got = read(&device, &cb, 12, len * dtype.size());
                    let got = crate::common::fixtures::wide(RawMatrix::new(dtype, 1, len, &got).unwrap());
                    // Rounded once to the type; half an ulp of f16 is 4.9e-4, of bf16 3.9e-3.
                    for (got, want) in got.data().iter().zip(want.data()) {
                        let tolerance = [5e-7, 4.9e-4, 3.92e-3][dtype as usize] * want.abs() + 3e-6;
                        assert!((got - want).abs() <= tolerance, "{name} {dtype} {len}: {got} for {want}");
                    }
                }
                let mut host = narrow(&c).into_data();
                guide_host(&mut host, narrow(&u).data(), omega).unwrap();
                let error = relative(&values(&Matrix::new(1, len, host).unwrap()), &want);
                assert!(error <= 1e-7, "{error:e}");
            }
        }
        assert!(guide_host(&mut [0.0], &[0.0, 0.0], 1.0).is_err());
        assert!(guide_host(&mut [0.0], &[0.0], f64::NAN).is_err());
    }

    /// What is too large for f16 becomes infinite, as rounding has it, and NaN stays NaN.
    #[test]
    fn overflow_is_infinite() {
        for Case { name, device } in gpus() {
            for (dtype, c, want) in [
                (Dtype::F16, 40000.0, f64::INFINITY),
                (Dtype::F16, -40000.0, f64::NEG_INFINITY),
                (Dtype::F16, 16380.0, 65504.0),
                (Dtype::Bf16, 3e38, f64::INFINITY),
                (Dtype::F16, f64::NAN, f64::NAN),
                (Dtype::Bf16, f64::NAN, f64::NAN),
            ] {
                let one = |v: f64| Matrix::new(1, 2, vec![v, 1.0]).unwrap();
                let [cb, ub] = [one(c), one(0.0)].map(|m| upload(&device, &bytes(&m, dtype), 0));
                let rows = |buffer| Activations::Buffer { buffer, offset: 0, dtype, tokens: 1, width: 2 };
                let (gpu, queue) = device.wgpu().unwrap();
                let mut encoder = gpu.create_command_encoder(&Default::default());
                guide(&device, &mut encoder, rows(&cb), rows(&ub), 3.0).unwrap();
                queue.submit([encoder.finish()]);
                let got = read(&device, &cb, 0, 4);
                let got = crate::common::fixtures::wide(RawMatrix::new(dtype, 1, 2, &got).unwrap()).data()[0];
                let same =
                    got == want || (got.is_nan() && want.is_nan()) || (want == 65504.0 && got >= 65472.0);
                assert!(same, "{name} {dtype}: {got} for {want}");
            }
        }
    }
}

mod live {
    use super::*;
    use loraweld::fusion::LiveNpLora;
    use loraweld::{NpLora, Projection};

    #[test]
    fn sliders_give_what_a_merge_gives() {
        let (heart, shade) = (
            crate::common::fixtures::adapter("content_heart"),
            crate::common::fixtures::adapter("style_shade"),
        );
        let cases = devices();
        // Merging is the same on every tier; the kernel under test has one.
        for Case { name, device } in [&cases[0], &cases[3], &cases[cases.len() - 1]] {
            let mut live = LiveNpLora::new(device, shade.at(1.0), heart.at(1.0)).unwrap();
            for (projection, style, subject) in [
                (Projection::Soft(0.5), 1.0, 1.0),
                (Projection::Hard, 0.7, 1.3),
                (Projection::Soft(0.0), -1.0, 0.0),
            ] {
                live.set(projection, style, subject).unwrap();
                let merge = match projection {
                    Projection::Hard => NpLora::hard(),
                    Projection::Soft(mu) => NpLora::soft(mu),
                };
                // A strength of zero would leave an adapter out of a merge.
                let subject = if subject == 0.0 { 1e-30 } else { subject };
                let merged = merge.merge(device, shade.at(style), &[heart.at(subject)]).unwrap().adapter;
                assert_eq!(live.layers().count(), merged.layers().len());
                for layer in merged.layers().iter().step_by(7) {
                    let (a, b) = live.read(&layer.name()).unwrap();
                    let error =
                        relative(&product(&values(&b), &values(&a)), &crate::common::fixtures::delta(layer));
                    assert!(error <= 1e-6, "{name} {projection:?} {}: {error:e}", layer.name());
                    let factors = live.factors(&layer.name());
                    assert_eq!(factors.is_some(), device.is_gpu());
                    if let Some(factors) = factors {
                        let bytes =
                            read(device, factors.a, factors.a_offset, 4 * factors.rank * factors.input);
                        assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&bytes), a.data(), "{name}");
                    }
                }
            }
            assert!(live.set(Projection::Soft(-1.0), 1.0, 1.0).is_err());
            assert!(live.set(Projection::Hard, f64::NAN, 1.0).is_err());
            assert!(live.read("no.such.layer").is_err());
        }
    }

    #[test]
    fn layers_of_one_adapter_follow_its_own_slider() {
        let layer = |name: &str, seed| {
            let mut random = Random(seed);
            Layer::new(name, narrow(&random.matrix(2, 6, 1.0)), narrow(&random.matrix(5, 2, 1.0))).unwrap()
        };
        let adapter = |name: &str, layers| Adapter::new(name, Format::Peft, layers).unwrap();
        let style = adapter("style", vec![layer("b.0.p", 1), layer("b.1.p", 2), layer("b.3.p", 3)]);
        let subject =
            adapter("subject", vec![layer("b.0.p", 4), layer("b.2.p", 5), layer("b.3.p", 6).with_scale(0.0)]);
        for Case { name, device } in devices().into_iter().take(4) {
            let mut live = LiveNpLora::new(&device, style.at(1.0), subject.at(1.0)).unwrap();
            live.set(Projection::Hard, 2.0, 3.0).unwrap();
            for (key, of, strength) in
                [("b.1.p", &style, 2.0), ("b.2.p", &subject, 3.0), ("b.3.p", &style, 2.0)]
            {
                let (a, b) = live.read(key).unwrap();
                let mut want = crate::common::fixtures::delta(of.find(key).unwrap());
                want.data_mut().iter_mut().for_each(|v| *v *= strength);
                let error = relative(&product(&values(&b), &values(&a)), &want);
                assert!(error <= 1e-6, "{name} {key}: {error:e}");
            }
        }
    }
}

mod schedules {
    use super::*;
    use loraweld::Control;
    use loraweld::fusion::{Balance, EstOptions, KLoraOptions, Schedule, craft, est, k_lora};

    fn pair() -> (Adapter, Adapter) {
        (crate::common::fixtures::adapter("content_heart"), crate::common::fixtures::adapter("style_shade"))
    }

    #[test]
    fn k_lora_is_its_rule_at_every_step() {
        let (subject, style) = pair();
        let options = KLoraOptions::default();
        let schedule = k_lora(subject.at(1.0), style.at(0.8), &options, Control::default()).unwrap();
        // Plainly: all entries, sorted.
        let sums = |layer: &Layer, strength: f64, top: usize| {
            let mut entries: Vec<f64> =
                crate::common::fixtures::delta(layer).data().iter().map(|v| (v * strength).abs()).collect();
            entries.sort_by(|x, y| y.total_cmp(x));
            (entries[..top].iter().sum::<f64>(), entries.iter().sum::<f64>())
        };
        let plain: Vec<_> = subject
            .layers()
            .iter()
            .map(|c| {
                let s = style.layer(c.key()).unwrap();
                (c.key().clone(), sums(c, 1.0, c.rank() * s.rank()), sums(s, 0.8, c.rank() * s.rank()))
            })
            .collect();
        let gamma =
            plain.iter().map(|(_, c, _)| c.1).sum::<f64>() / plain.iter().map(|(_, _, s)| s.1).sum::<f64>();
        assert!((schedule.options["gamma"].as_f64().unwrap() / gamma - 1.0).abs() <= 1e-12);
        assert_eq!(schedule.layers.len(), 24);
        let mut flips = 0;
        for (key, (c, _), (s, _)) in plain {
            let layer = &schedule.layers[&key];
            // Sums of f64 in another order.
            assert!((layer.scores[0] / c - 1.0).abs() <= 1e-12 && (layer.scores[1] / s - 1.0).abs() <= 1e-12);
            for steps in [1, 4, 28, 50] {
                let mut last = true;
                for step in 0..steps {
                    let t = step as f64 / steps as f64;
                    let bound = gamma * s * (1.5 * t + 0.5);
                    let subject = c >= bound;
                    let weights = schedule.weights(&layer.name, step, steps).unwrap();
                    if (c / bound - 1.0).abs() > 1e-9 {
                        assert_eq!(
                            weights,
                            [f32::from(subject), f32::from(!subject)],
                            "{key} {step}/{steps}"
                        );
                    }
                    flips += usize::from(step > 0 && last != subject);
                    last = subject;
                }
            }
        }
        assert!(flips > 0, "a schedule that never changes tests little");
    }

    /// The authors' code: γ of each layer's own ratio, and a factor that starts again.
    #[test]
    fn k_lora_is_its_authors_rule_at_every_step() {
        let (subject, style) = pair();
        // One layer whose ratio is an outlier.
        let strong = |i: usize, layer: &Layer| {
            let scale = layer.scale().value;
            if i == 3 { layer.with_scale(50.0 * scale) } else { layer.clone() }
        };
        let layers = subject.layers().iter().enumerate().map(|(i, layer)| strong(i, layer)).collect();
        let subject = Adapter::new("subject", subject.format(), layers).unwrap();
        let plain: Vec<_> = subject
            .layers()
            .iter()
            .map(|c| {
                let s = style.layer(c.key()).unwrap();
                let sums = |layer: &Layer| {
                    let mut entries: Vec<f64> =
                        crate::common::fixtures::delta(layer).data().iter().map(|v| v.abs()).collect();
                    entries.sort_by(|x, y| y.total_cmp(x));
                    (entries[..c.rank() * s.rank()].iter().sum::<f64>(), entries.iter().sum::<f64>())
                };
                (c.key().clone(), sums(c), sums(s))
            })
            .collect();
        let ratios: Vec<f64> = plain.iter().map(|(_, c, s)| c.1 / s.1).collect();
        let limit = 3.0 * ratios.iter().sum::<f64>() / ratios.len() as f64;
        let kept: Vec<f64> = ratios.iter().copied().filter(|ratio| *ratio < limit).collect();
        assert_eq!(kept.len(), ratios.len() - 1);
        let gamma = kept.iter().sum::<f64>() / kept.len() as f64;
        // Their pattern `s*`, their other one, and a factor that wraps at two thirds.
        let authors = KLoraOptions::authors();
        for options in [
            authors,
            KLoraOptions { beta: 0.5, wrap: false, ..authors },
            KLoraOptions { beta: 0.5, ..authors },
            KLoraOptions { alpha: 0.7, beta: 2.0, ..authors },
        ] {
            let schedule = k_lora(subject.at(1.0), style.at(1.0), &options, Control::default()).unwrap();
            let found = schedule.options["gamma"].as_f64().unwrap();
            assert!((found / gamma - 1.0).abs() <= 1e-12, "{found} {gamma}");
            let (mut decisions, mut comebacks) = (0, 0);
            for (key, (c, _), (s, _)) in &plain {
                let mut last = true;
                for step in 0..28 {
                    let factor = options.alpha * f64::from(step) / 28.0 + options.beta;
                    let factor = if options.wrap { factor % options.alpha } else { factor };
                    // Where the factor is zero, so is what the style has to show.
                    let subject = c / gamma > s * factor;
                    if (c / gamma / (s * factor) - 1.0).abs() > 1e-9 {
                        let weights = schedule.weights(key.as_str(), step as usize, 28).unwrap();
                        assert_eq!(
                            weights,
                            [f32::from(subject), f32::from(!subject)],
                            "{options:?} {key} {step}"
                        );
                        decisions += 1;
                    }
                    comebacks += usize::from(subject && !last);
                    last = subject;
                }
            }
            assert!(
                decisions >= 670 && (comebacks > 0) == options.wrap,
                "{options:?}: {decisions} {comebacks}"
            );
        }
        let none = KLoraOptions { alpha: 0.0, ..authors };
        assert!(k_lora(subject.at(1.0), style.at(1.0), &none, Control::default()).is_err());
        let zero = KLoraOptions { balance: Balance::Ratios, ..Default::default() };
        let schedule = k_lora(subject.at(0.0), style.at(1.0), &zero, Control::default()).unwrap();
        assert_eq!(schedule.options["gamma"], 1.0);
    }

    #[test]
    fn est_is_its_rule_at_every_step() {
        let (subject, style) = pair();
        let options = EstOptions { alpha: 2.0, delta: 0.9 };
        let schedule = est(subject.at(1.0), style.at(1.5), &options).unwrap();
        for c in subject.layers() {
            let layer = &schedule.layers[c.key()];
            let energy = |layer: &Layer, s: f64| {
                crate::common::fixtures::delta(layer).data().iter().map(|v| (v * s).powi(2)).sum::<f64>()
            };
            let (e_c, e_s) = (energy(c, 1.0), energy(style.layer(c.key()).unwrap(), 1.5));
            assert!((layer.scores[0] / e_c - 1.0).abs() <= 1e-10, "{}", c.key());
            assert!((layer.scores[1] / e_s - 1.0).abs() <= 1e-10, "{}", c.key());
            for step in 0..30_u32 {
                let subject = e_c >= (2.0 * f64::from(step) / 30.0 + 1.0 - 0.9) * e_s;
                let weights = schedule.weights(&layer.name, step as usize, 30).unwrap();
                assert_eq!(weights, [f32::from(subject), f32::from(!subject)], "{} {step}", c.key());
            }
        }
    }

    #[test]
    fn craft_is_both_in_between() {
        let (subject, style) = pair();
        let schedule = craft(subject.at(1.0), style.at(1.0), 0.7, 0.28).unwrap();
        let acting = |step: usize| schedule.weights("transformer_blocks_0_attn_to_q", step - 1, 50).unwrap();
        for (step, want) in [
            (1, [1.0, 0.0]),
            (14, [1.0, 0.0]),
            (15, [1.0, 1.0]),
            (35, [1.0, 1.0]),
            (36, [0.0, 1.0]),
            (50, [0.0, 1.0]),
        ] {
            assert_eq!(acting(step), want, "step {step} of 50, counted from 1");
        }
        assert!(schedule.weights("no.such.layer", 0, 50).is_none());
        assert!(craft(subject.at(1.0), style.at(1.0), 1.5, 0.0).is_err());
    }

    #[test]
    fn a_file_gives_the_schedule_back_and_checks_its_adapters() {
        let (subject, style) = pair();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("schedule.json");
        let options = KLoraOptions::default();
        let schedule = k_lora(subject.at(1.0), style.at(1.0), &options, Control::default()).unwrap();
        schedule.save(&path, false, &[]).unwrap();
        assert!(schedule.save(&path, false, &[]).is_err());
        let again = Schedule::open(&path).unwrap();
        assert_eq!(again, schedule);
        again.check(&[&subject, &style]).unwrap();
        let error = again.check(&[&style, &subject]).unwrap_err().to_string();
        assert!(error.contains("content_heart") && error.contains("subject"), "{error}");
        let text = std::fs::read_to_string(&path).unwrap();
        for (from, to, expected) in [
            ("\"version\": 1", "\"version\": 2", "version 2"),
            ("\"adapter\": 1", "\"adapter\": 7", "windows"),
            ("\"kind\"", "\"sort\"", "no schedule"),
        ] {
            std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
            let error = Schedule::open(&path).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("schedule.json"), "{error}");
        }
    }

    /// The schedule drives a selector: what it names acts, the rest does not.
    #[test]
    fn a_selector_follows_it() {
        let (subject, style) = pair();
        let schedule = craft(subject.at(1.0), style.at(1.0), 0.5, 0.5).unwrap();
        let name = "transformer_blocks.1.ff.net.0.proj";
        let p = Problem {
            adapters: vec![subject.clone(), style.clone()],
            ..problem(16, 128, 512, &[1, 1], 1.0, 31)
        };
        for Case { device, name: tier } in devices() {
            let mut selector = p.selector(&device);
            for (step, acting) in [(0, &subject), (3, &style)] {
                let how = schedule.selection(name, step, 4).unwrap();
                let (x, mut f) = (narrow(&p.x), narrow(&p.f0).into_data());
                selector.run(name, RawMatrix::from_f32(16, 128, x.data()).unwrap(), &mut f, &how).unwrap();
                let mut want = p.f0.clone();
                let u =
                    product(&p.x, &crate::common::fixtures::delta(acting.find(name).unwrap()).transposed());
                want.data_mut().iter_mut().zip(u.data()).for_each(|(w, u)| *w += u);
                let error = relative(&values(&Matrix::new(16, 512, f).unwrap()), &want);
                assert!(error <= 2e-6, "{tier}: {error:e}");
            }
        }
    }

    #[test]
    fn layers_of_one_adapter_are_always_its_own() {
        let layer = |name: &str| {
            let mut random = Random(3);
            Layer::new(name, narrow(&random.matrix(2, 6, 1.0)), narrow(&random.matrix(5, 2, 1.0))).unwrap()
        };
        let adapter = |name: &str, layers| Adapter::new(name, Format::Peft, layers).unwrap();
        let subject = adapter("subject", vec![layer("b.0.p"), layer("b.1.p")]);
        let style = adapter("style", vec![layer("b.0.p").with_scale(0.0), layer("b.2.p")]);
        for schedule in [
            k_lora(subject.at(1.0), style.at(1.0), &KLoraOptions::default(), Control::default()).unwrap(),
            est(subject.at(1.0), style.at(1.0), &EstOptions::default()).unwrap(),
        ] {
            for step in [0, 9] {
                assert_eq!(
                    schedule.weights("b.0.p", step, 10).unwrap(),
                    [1.0, 0.0],
                    "a style of nothing never acts"
                );
                assert_eq!(schedule.weights("b.1.p", step, 10).unwrap(), [1.0, 0.0]);
                assert_eq!(schedule.weights("b.2.p", step, 10).unwrap(), [0.0, 1.0]);
            }
        }
        let wide =
            adapter("wide", vec![Layer::new("b.0.p", Matrix::zeros(2, 7), Matrix::zeros(5, 2)).unwrap()]);
        let error = est(subject.at(1.0), wide.at(1.0), &EstOptions::default()).unwrap_err().to_string();
        assert!(error.contains("b.0.p") && error.contains("the style 7 into 5"), "{error}");
        let options = KLoraOptions { alpha: -1.0, ..Default::default() };
        assert!(k_lora(subject.at(1.0), style.at(1.0), &options, Control::default()).is_err());
    }
}

mod refinement {
    use super::*;
    use loraweld::Result;
    use loraweld::fusion::{Encoder, Objective, Ramp, Refiner, RefinerOptions, Values, ValuesMut};

    /// tanh of a linear layer, on the host or through it, with its own backward pass.
    struct Layered {
        device: Device,
        weights: Vec<Matrix>,
        samples: usize,
        /// Features of the last forward pass of each objective.
        features: Vec<Matrix>,
    }

    impl Layered {
        fn get(&self, values: Values<'_>, cols: usize) -> Matrix {
            let data: Vec<f32> = match values {
                Values::Host(values) => values.to_vec(),
                Values::Buffer(x) => {
                    let (buffer, offset) = (x.buffer(), x.offset());
                    bytemuck::pod_collect_to_vec(&read(&self.device, buffer, offset, self.samples * cols * 4))
                }
            };
            values_of(data, self.samples, cols)
        }

        fn put(&self, m: &Matrix, values: ValuesMut<'_>) {
            let narrow = narrow(m).into_data();
            match values {
                ValuesMut::Host(out) => out.copy_from_slice(&narrow),
                ValuesMut::Buffer(out) => {
                    assert_eq!(out.size() as usize, narrow.len() * 4);
                    let queue = self.device.wgpu().unwrap().1;
                    queue.write_buffer(out.buffer(), out.offset(), bytemuck::cast_slice(&narrow));
                    self.device.wgpu().unwrap().1.submit([]);
                }
            }
        }
    }

    fn values_of(data: Vec<f32>, rows: usize, cols: usize) -> Matrix {
        Matrix::new(rows, cols, data.into_iter().map(f64::from).collect()).unwrap()
    }

    impl Encoder for Layered {
        fn forward(&mut self, objective: usize, latents: Values<'_>, features: ValuesMut<'_>) -> Result<()> {
            let w = &self.weights[objective];
            let x = self.get(latents, w.cols());
            let mut f = product(&x, &w.transposed());
            f.data_mut().iter_mut().for_each(|v| *v = v.tanh());
            self.put(&f, features);
            self.features[objective] = f;
            Ok(())
        }

        fn backward(&mut self, objective: usize, gradient: Values<'_>, latents: ValuesMut<'_>) -> Result<()> {
            let w = &self.weights[objective];
            let mut g = self.get(gradient, w.rows());
            g.data_mut().iter_mut().zip(self.features[objective].data()).for_each(|(g, f)| *g *= 1.0 - f * f);
            self.put(&product(&g, w), latents);
            Ok(())
        }
    }

    fn problem(device: &Device, samples: usize, len: usize) -> (Layered, Vec<Objective>, Vec<f32>) {
        let mut random = Random(41);
        let weights = vec![
            random.matrix(37, len, 1.0 / (len as f64).sqrt()),
            random.matrix(300, len, 1.0 / (len as f64).sqrt()),
        ];
        let references = |random: &mut Random, width| -> Vec<Vec<f32>> {
            (0..3).map(|_| narrow(&random.matrix(1, width, 2.0)).into_data()).collect()
        };
        let (style, subject) = (references(&mut random, 37), references(&mut random, 300));
        let of = |references: &[Vec<f32>]| Objective::new(references.iter().map(Vec::as_slice)).unwrap();
        let latents = narrow(&random.matrix(samples, len, 1.0)).into_data();
        let features = vec![Matrix::zeros(0, 0); 2];
        let encoder = Layered { device: device.clone(), weights, samples, features };
        (encoder, Objective::balanced(of(&style), of(&subject), 0.3), latents)
    }

    fn step(
        device: &Device,
        encoder: &mut Layered,
        refiner: &mut Refiner,
        latents: &[f32],
        t: f64,
    ) -> (bool, Vec<f32>) {
        let mut x = latents.to_vec();
        if !device.is_gpu() {
            let stepped = refiner.step(encoder, ValuesMut::Host(&mut x), t).unwrap();
            return (stepped, x);
        }
        // Amid a buffer, as of a host that allocates from pools.
        let around = [7.0; 256];
        let guarded = [around.as_slice(), latents, &around].concat();
        let buffer = upload(device, bytemuck::cast_slice(&guarded), 0);
        let latents = |first: u64| ValuesMut::Buffer(buffer.slice(first..first + x.len() as u64 * 4));
        let stepped = refiner.step(encoder, latents(1024), t).unwrap();
        let all: Vec<f32> = bytemuck::pod_collect_to_vec(&read(device, &buffer, 0, guarded.len() * 4));
        let (before, rest) = all.split_at(256);
        let (moved, after) = rest.split_at(x.len());
        assert!(before == around && after == around);
        (stepped, moved.to_vec())
    }

    /// The whole objective in f64.
    fn loss(encoder: &Layered, objectives: &[Objective], x: &Matrix) -> f64 {
        let of = |(w, objective): (&Matrix, &Objective)| {
            let f = product(x, &w.transposed());
            let evaluate = |row: &[f64]| {
                let f: Vec<f32> = row.iter().map(|v| v.tanh() as f32).collect();
                objective.evaluate(&f).unwrap().0
            };
            (0..x.rows()).map(|i| evaluate(f.row(i))).sum::<f64>()
        };
        encoder.weights.iter().zip(objectives).map(of).sum()
    }

    #[test]
    fn the_gradient_of_features_is_that_of_differences() {
        let mut random = Random(42);
        for width in [2, 3, 128, 511] {
            let references: Vec<Vec<f32>> =
                (0..4).map(|_| narrow(&random.matrix(1, width, 1.0)).into_data()).collect();
            let objective = Objective::new(references.iter().map(Vec::as_slice)).unwrap().at(0.7);
            let f = narrow(&random.matrix(1, width, 3.0)).into_data();
            let (got, gradient) = objective.evaluate(&f).unwrap();
            // By the definition: the mean of 1 − cos over the references.
            let plain = |f: &[f64]| {
                let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
                let one = |r: &Vec<f32>| {
                    let dot: f64 = f.iter().zip(r).map(|(f, r)| f * f64::from(*r)).sum();
                    1.0 - dot / norm(&mut f.iter().copied()) / norm(&mut r.iter().map(|r| f64::from(*r)))
                };
                0.7 * references.iter().map(one).sum::<f64>() / 4.0
            };
            let wide: Vec<f64> = f.iter().map(|v| f64::from(*v)).collect();
            assert!((got - plain(&wide)).abs() <= 1e-7, "{width}");
            let largest = gradient.iter().fold(0.0, |max: f64, g| max.max(f64::from(g.abs())));
            for i in (0..width).step_by(1 + width / 40) {
                let at = |h: f64| {
                    let mut moved = wide.clone();
                    moved[i] += h;
                    plain(&moved)
                };
                let difference = (at(1e-4) - at(-1e-4)) / 2e-4;
                let error = (difference - f64::from(gradient[i])).abs();
                assert!(error <= 1e-3 * largest, "{width} {i}: {} for {difference}", gradient[i]);
            }
        }
    }

    #[test]
    fn a_step_goes_down_the_gradient_of_differences() {
        // Neither normalised nor clamped, a step is η times the gradient.
        let options =
            RefinerOptions { rate: 0.5, normalise: false, clamp: f64::INFINITY, ..Default::default() };
        let (samples, len) = (3, 45);
        for Case { name, device } in devices() {
            let (mut encoder, objectives, x) = problem(&device, samples, len);
            let mut refiner = Refiner::new(&device, objectives.clone(), samples, len, options).unwrap();
            let (stepped, moved) = step(&device, &mut encoder, &mut refiner, &x, 0.5);
            assert!(stepped);
            let wide = values_of(x.clone(), samples, len);
            let mut largest: f64 = 0.0;
            let errors: Vec<f64> = (0..samples * len)
                .step_by(3)
                .map(|i| {
                    // Differences of features that are rounded to f32: of steps large enough for that.
                    let at = |h: f64| {
                        let mut moved = wide.clone();
                        moved.data_mut()[i] += h;
                        loss(&encoder, &objectives, &moved)
                    };
                    let difference = (at(1e-2) - at(-1e-2)) / 2e-2;
                    largest = largest.max(difference.abs());
                    (difference - f64::from(x[i] - moved[i]) / 0.5).abs()
                })
                .collect();
            let worst = errors.into_iter().fold(0.0, f64::max);
            assert!(worst <= 1e-3 * largest, "{name}: {worst:e} of {largest:e}");
        }
    }

    #[test]
    fn steps_are_those_of_the_twin() {
        for (samples, len) in [(1, 1), (2, 5), (3, 1025), (2, 9001)] {
            for options in [
                RefinerOptions::default(),
                RefinerOptions { rate: 0.3, clamp: 0.1, ramp: Ramp::Cosine, ..Default::default() },
                RefinerOptions { rate: 2.0, normalise: false, ramp: Ramp::Falling, ..Default::default() },
            ] {
                let cpu = Device::cpu();
                let (mut encoder, objectives, x) = problem(&cpu, samples, len);
                let mut twin = Refiner::new(&cpu, objectives, samples, len, options).unwrap();
                let (_, want) = step(&cpu, &mut encoder, &mut twin, &x, 0.25);
                let expected = twin.outcome().unwrap();
                let moved = want.iter().zip(&x).fold(0.0, |max: f32, (w, x)| max.max((w - x).abs()));
                assert!(f64::from(moved) <= options.clamp * 1.001 && moved > 0.0, "{moved}");
                for Case { name, device } in gpus().into_iter().step_by(2) {
                    let (mut encoder, objectives, x) = problem(&device, samples, len);
                    let mut refiner = Refiner::new(&device, objectives, samples, len, options).unwrap();
                    let (_, got) = step(&device, &mut encoder, &mut refiner, &x, 0.25);
                    let outcome = refiner.outcome().unwrap();
                    let label = format!("{name} {samples}x{len} {options:?}");
                    let (got, want) = (values_of(got, samples, len), values_of(want.clone(), samples, len));
                    // Gradients of features keep 1e-6 of their size, latents are f32.
                    let error = relative(&got, &want);
                    assert!(error <= 1e-5, "{label}: {error:e}");
                    let pairs = outcome.losses.iter().flatten().zip(expected.losses.iter().flatten());
                    let pairs = pairs.chain(outcome.gradients.iter().zip(&expected.gradients));
                    for (got, want) in pairs {
                        assert!((got - want).abs() <= 1e-5 * want.abs() + 1e-6, "{label}: {got} for {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn refining_lowers_the_loss_within_its_window() {
        let options = RefinerOptions { rate: 0.1, window: (0.2, 0.8), ..Default::default() };
        for Case { name, device } in devices().into_iter().step_by(3) {
            let (mut encoder, objectives, mut x) = problem(&device, 2, 64);
            let mut refiner = Refiner::new(&device, objectives.clone(), 2, 64, options).unwrap();
            let before = loss(&encoder, &objectives, &values_of(x.clone(), 2, 64));
            let mut steps = 0;
            for i in 0..20 {
                let (stepped, moved) = step(&device, &mut encoder, &mut refiner, &x, f64::from(i) / 20.0);
                assert!(stepped || moved == x);
                steps += usize::from(stepped);
                x = moved;
            }
            let after = loss(&encoder, &objectives, &values_of(x.clone(), 2, 64));
            assert_eq!(steps, 12);
            assert!(after < 0.9 * before, "{name}: {after} of {before}");
        }
    }

    /// Gradients that cannot be followed leave a sample as it is, and the outcome says so.
    #[test]
    fn bad_gradients_change_nothing() {
        struct Given(Vec<f32>, Device);
        impl Encoder for Given {
            fn forward(&mut self, _: usize, _: Values<'_>, features: ValuesMut<'_>) -> Result<()> {
                match features {
                    ValuesMut::Host(f) => f.fill(1.0),
                    ValuesMut::Buffer(b) => self.1.wgpu().unwrap().1.write_buffer(
                        b.buffer(),
                        b.offset(),
                        &1f32.to_le_bytes().repeat(6),
                    ),
                }
                Ok(())
            }
            fn backward(&mut self, _: usize, _: Values<'_>, latents: ValuesMut<'_>) -> Result<()> {
                match latents {
                    ValuesMut::Host(g) => g.copy_from_slice(&self.0),
                    ValuesMut::Buffer(b) => self.1.wgpu().unwrap().1.write_buffer(
                        b.buffer(),
                        b.offset(),
                        bytemuck::cast_slice(&self.0),
                    ),
                }
                Ok(())
            }
        }
        let gradient = vec![f32::NAN, 1.0, 0.0, 0.0, 1e-30, 0.0];
        for Case { name, device } in devices() {
            let objective = Objective::new([[1f32, 2.0].as_slice()]).unwrap();
            let mut refiner =
                Refiner::new(&device, vec![objective], 3, 2, RefinerOptions::default()).unwrap();
            let mut x = vec![1f32; 6];
            let mut host = Given(gradient.clone(), device.clone());
            if device.is_gpu() {
                let buffer = upload(&device, bytemuck::cast_slice(&x), 0);
                refiner.step(&mut host, ValuesMut::Buffer(buffer.slice(..)), 0.0).unwrap();
                x = bytemuck::pod_collect_to_vec(&read(&device, &buffer, 0, 24));
                assert!(refiner.step(&mut host, ValuesMut::Host(&mut x), 0.0).is_err());
                for part in [buffer.slice(4..), buffer.slice(..20)] {
                    assert!(refiner.step(&mut host, ValuesMut::Buffer(part), 0.0).is_err());
                }
            } else {
                refiner.step(&mut host, ValuesMut::Host(&mut x), 0.0).unwrap();
            }
            assert_eq!(x[..4], [1.0; 4], "{name}");
            // rms of (g, 0) is g / √2: the step is η·√2.
            assert!(
                (f64::from(1.0 - x[4]) - 0.05 * 2f64.sqrt()).abs() <= 1e-6 && x[5] == 1.0,
                "{name}: {x:?}"
            );
            let outcome = refiner.outcome().unwrap();
            assert_eq!(outcome.gradients[..2], [-1.0, 0.0], "{name}");
        }
        assert!(Objective::new([]).is_err() && Objective::new([[0f32].as_slice()]).is_err());
        assert!(Objective::new([[1f32].as_slice(), [1f32, 2.0].as_slice()]).is_err());
    }
}

/// Inputs of real layers, features of a real size: each adapter's calibration inputs mostly choose that adapter.
#[test]
fn real_adapters_choose_alike_on_every_device() {
    let adapters = crate::common::fixtures::pool();
    let layers = [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.2.ff.net.0.proj",
        "transformer_blocks.3.ff.net.2",
    ];
    for layer in layers {
        let x = crate::common::fixtures::Tensors::open(crate::common::fixtures::activations(
            "traj4",
            crate::common::fixtures::POOL[1],
        ))
        .get(layer);
        let output = adapters[0].find(layer).unwrap().output();
        // Outputs of a layer about as large as its inputs make them.
        let p = Problem { f0: Random(51).matrix(x.rows(), output, 1.0), x, adapters: adapters.clone() };
        let mut twin = p.selector(&Device::cpu());
        let run = |device: &Device, selector: &mut Selector, how: &Selection| {
            let _ = device;
            let (x, mut f) = (narrow(&p.x), narrow(&p.f0).into_data());
            let x = RawMatrix::from_f32(x.rows(), x.cols(), x.data()).unwrap();
            selector.run(layer, x, &mut f, how).unwrap();
            values(&Matrix::new(p.f0.rows(), output, f).unwrap())
        };
        for score in Score::ALL {
            let how = how(score, Choice::Hard);
            let want = run(&Device::cpu(), &mut twin, &how);
            let decided = twin.tokens().unwrap();
            for Case { name, device } in gpus().into_iter().step_by(3) {
                let mut selector = p.selector(&device);
                let got = run(&device, &mut selector, &how);
                let label = format!("{name} {layer} {score:?}");
                same(&selector.tokens().unwrap(), &decided, &how, 1e-4, &label, |same| {
                    let rows = |m: &Matrix| {
                        let data = same.iter().flat_map(|&token| m.row(token).to_vec()).collect();
                        Matrix::new(same.len(), m.cols(), data).unwrap()
                    };
                    let error = relative(&rows(&got), &rows(&want));
                    assert!(error <= 2e-6, "{label}: {error:e}");
                });
            }
        }
    }
}
