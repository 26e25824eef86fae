//! Selection inside a host's encoder, live factors and guidance, at the sizes of FLUX.1.
//!
//! `cargo bench --bench fusion -- selection` runs one group. Selection must read x and f0 and write the result: its share
//! of the memory limit says how near it comes to a copy. `benches/pytorch/fusion.py` times the base layers themselves.

mod common;

use std::hint::black_box;

use common::{
    Input, LayerShape, Rate, Target, Work, adapter, adapter_file, bench, bench_recorded, criterion,
    flux_layers, targets, timed, widths,
};
use criterion::{Criterion, criterion_group, criterion_main};
use loraweld::Dtype;
use loraweld::Projection;
use loraweld::fusion::{Choice, LiveNpLora, Scope, Score, Selection, Selector, SelectorOptions, guide};

/// Calls in one submission, so that the time is the device's.
const CALLS: usize = 16;

fn gpus() -> impl Iterator<Item = Target> {
    targets().into_iter().filter(|target| target.device.is_gpu())
}

/// A selector among two adapters in bf16, as they come. So weak that f0, which takes in every result, stays what it is.
fn selector(target: &Target, layers: &[LayerShape], rank: usize, options: SelectorOptions) -> Selector {
    let folder = tempfile::tempdir().expect("a folder");
    let adapters = [1, 5].map(|seed| adapter_file(folder.path(), layers, rank, seed));
    let weighted = [adapters[0].at(1e-4), adapters[1].at(1e-4)];
    Selector::new(&target.device, &weighted, options).expect("a selector")
}

fn bench_selection(c: &mut Criterion) {
    let mut group = c.benchmark_group("selection");
    let hard = |score| Selection { score, ..Default::default() };
    let soft = Selection { choice: Choice::Soft, normalise: true, ..Default::default() };
    let variants = [
        ("kl", hard(Score::Kl)),
        ("dot", hard(Score::Dot)),
        ("energy", hard(Score::Energy)),
        ("kl, by layer", Selection { scope: Scope::Layer, ..Default::default() }),
        ("kl, soft, normalised", soft),
        ("fixed", Selection { choice: Choice::Fixed(vec![1.0, 1.0]), ..Default::default() }),
    ];
    for target in gpus() {
        let (tokens, rank) = (target.sized(4608, 64), 32);
        let shapes: &[(usize, usize)] =
            target.sized(&[(3072, 3072), (3072, 12288), (12288, 3072)], &[(256, 256)]);
        for &(input, output) in shapes {
            let layer = [("layer".to_owned(), input, output)];
            let mut selector = selector(
                &target,
                &layer,
                rank,
                SelectorOptions { tokens, records: 64, exact: false, keep: false },
            );
            for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
                let many = |width| Input::many(&target, dtype, tokens, width);
                let (xs, f0s) = (many(input), many(output));
                for (label, how) in &variants {
                    let of = Work {
                        work: "selection",
                        shape: format!("{input} to {output} n{tokens} r{rank}"),
                        variant: format!("{dtype}, {label}"),
                        bytes: (tokens * (input + 2 * output) * dtype.size()) as f64,
                        flops: vec![(target.products(), (4 * tokens * rank * (input + output)) as f64)],
                        calls: CALLS,
                        error: None,
                        ..Default::default()
                    };
                    bench_recorded(&mut group, &target, &of, |encoder| {
                        for (x, f0) in xs.iter().cycle().zip(f0s.iter().cycle()).take(CALLS) {
                            selector.encode(encoder, "layer", x.view(), f0.view(), how).expect("selection");
                        }
                    });
                }
            }
        }
    }
    group.finish();
}

/// From a moved slider to new factors of a whole adapter on the device.
fn bench_slider(c: &mut Criterion) {
    let mut group = c.benchmark_group("slider");
    for target in targets() {
        let (layers, rank) = (flux_layers(&target), 32);
        let (subject, style) = (adapter("subject", &layers, rank, 1), adapter("style", &layers, rank, 5));
        let mut live = LiveNpLora::new(&target.device, style.at(1.0), subject.at(1.0)).expect("live factors");
        let mut mu = 0.0;
        // The style's A is read and written; of the subject's, both ends are read.
        let of = Work {
            work: "slider",
            shape: format!("{} layers r{rank}", layers.len()),
            variant: "np-lora".to_owned(),
            bytes: 5.0 * 4.0 * rank as f64 * widths(&layers).0,
            calls: 1,
            ..Default::default()
        };
        // The user waits for this one, not for many.
        bench(&mut group, &target, &of, |n| {
            timed(n, || {
                mu = (mu + 0.01) % 1.0;
                live.set(Projection::Soft(mu), 1.0, 0.8).expect("new factors");
                target.device.wait().expect("a working device");
            })
        });
    }
    group.finish();
}

/// The host's time to record a step's calls, one for each layer: made anew each time, or kept from the last step.
fn bench_encode(c: &mut Criterion) {
    let mut group = c.benchmark_group("encode");
    for target in gpus() {
        let layers = flux_layers(&target);
        let input = |width| Input::new(&target.device, Dtype::F16, 64, width, 1);
        let inputs: Vec<_> = layers.iter().map(|(_, i, o)| (input(*i), input(*o))).collect();
        let (gpu, _) = target.device.wgpu().expect("a GPU");
        for (variant, keep) in [("made", false), ("kept", true)] {
            let options = SelectorOptions { tokens: 64, records: 1024, keep, ..Default::default() };
            let mut selector = selector(&target, &layers, 4, options);
            let of = Work {
                work: "encode",
                shape: format!("{} layers", layers.len()),
                variant: variant.to_owned(),
                calls: 1,
                ..Default::default()
            };
            bench(&mut group, &target, &of, |n| {
                timed(n, || {
                    let mut encoder = gpu.create_command_encoder(&Default::default());
                    for ((layer, ..), (x, f0)) in layers.iter().zip(&inputs) {
                        let how = Selection::default();
                        selector.encode(&mut encoder, layer, x.view(), f0.view(), &how).expect("selection");
                    }
                    drop(black_box(encoder.finish()));
                })
            });
        }
    }
    group.finish();
}

fn bench_guidance(c: &mut Criterion) {
    let mut group = c.benchmark_group("guidance");
    for target in gpus() {
        let len = target.sized(4096 * 64, 4096);
        let [x, y] = [1, 2].map(|seed| Input::new(&target.device, Dtype::F16, 1, len, seed));
        let of = Work {
            work: "guidance",
            shape: format!("{len}"),
            variant: "f16".to_owned(),
            bytes: (3 * 2 * len) as f64,
            flops: vec![(Rate::F32, (3 * len) as f64)],
            calls: CALLS,
            ..Default::default()
        };
        bench_recorded(&mut group, &target, &of, |encoder| {
            for _ in 0..CALLS {
                guide(&target.device, encoder, x.view(), y.view(), 3.5).expect("guidance");
            }
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = criterion();
    targets = bench_selection, bench_slider, bench_encode, bench_guidance
}
criterion_main!(benches);
