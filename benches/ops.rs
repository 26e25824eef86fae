//! Each operation on a GPU, at the shapes of a FLUX.1 adapter, with its error.
//!
//! `cargo bench --bench ops -- accumulate` runs one group. Where there is no hardware GPU, the software adapter and the
//! CPU take small shapes. `benches/pytorch/ops.py` times the same work in PyTorch; BENCHMARKS.md compares.

mod common;

use std::hint::black_box;

use common::{
    Accumulation, Input, Rate, Systems, Target, Work, bench, criterion, kept_busy, matrix, targets,
};
use criterion::{Criterion, criterion_group, criterion_main};
use loraweld::compute::ops::{Axis, Factor, matmul, rank_concat};
use loraweld::compute::{Batch, Precision};
use loraweld::{Dtype, Matrix, RawMatrix};

/// A device as it is, and, if it has matrix units, with values of 11 bits and without these units.
fn unit_tiers(target: Target) -> Vec<(&'static str, Target)> {
    if target.products() != Rate::Matrix {
        return vec![("", target)];
    }
    let fast = target.with(|options| options.precision = Precision::Fast);
    let without = target.with(|options| options.disable.cooperative_matrix = true);
    let others = [(", fast", fast), (", no matrix units", without)];
    let others = others.into_iter().filter_map(|(tier, target)| Some((tier, target?)));
    [("", target)].into_iter().chain(others).collect()
}

/// What is accumulated in a tier: how many layers read each input, and the type of A, which most files have in 16 bits.
fn variants(tier: &str) -> &'static [(&'static str, usize, Dtype)] {
    match tier {
        "" => &[("", 1, Dtype::F32), (", A of bf16", 1, Dtype::Bf16), (", q, k and v", 3, Dtype::F32)],
        ", fast" => &[(", A of bf16", 1, Dtype::Bf16)],
        _ => &[("", 1, Dtype::F32)],
    }
}

fn bench_accumulate(c: &mut Criterion) {
    let mut group = c.benchmark_group("accumulate");
    for (tier, target) in targets().into_iter().flat_map(unit_tiers) {
        let (tokens, layers) = target.sized((4608, 8), (256, 1));
        let shapes: &[(usize, &[usize])] =
            target.sized(&[(3072, &[32, 64, 128, 256, 512]), (12288, &[128])], &[(384, &[32])]);
        for dtype in [Dtype::Bf16, Dtype::F32] {
            for (width, ranks) in shapes {
                let inputs = Input::many(&target, dtype, tokens, *width);
                for &rank in *ranks {
                    for &(variant, sharing, a) in variants(tier) {
                        let mut work = Accumulation::of(&target, &inputs, sharing * layers, rank, sharing, a);
                        let mut of = work.work();
                        of.variant += tier;
                        of.variant += variant;
                        of.error = Some(work.error());
                        bench(&mut group, &target, &of, |n| kept_busy(&target.device, n, || work.run()));
                    }
                }
            }
        }
    }
    group.finish();
}

/// A device as it is, and in double-single.
fn sum_tiers(target: Target) -> Vec<Target> {
    let double_single = target.device.is_gpu().then(|| target.with(|options| options.disable.f64 = true));
    [target].into_iter().chain(double_single.flatten()).collect()
}

fn bench_solve(c: &mut Criterion) {
    let mut group = c.benchmark_group("solve");
    for target in targets().into_iter().flat_map(sum_tiers) {
        for &order in target.sized::<&[usize]>(&[32, 64, 128, 256], &[32]) {
            let systems = Systems::new(&target, target.sized(304, 4), order);
            let of = Work { error: Some(systems.residual()), ..systems.work() };
            bench(&mut group, &target, &of, |n| {
                kept_busy(&target.device, n, || drop(black_box(systems.solve())))
            });
        }
    }
    group.finish();
}

fn bench_matmul(c: &mut Criterion) {
    let mut group = c.benchmark_group("matmul");
    for target in targets() {
        let (layers, device) = (target.sized(19, 1), &target.device);
        for rank in [32, 128] {
            let (b, r): (Matrix, Matrix) = (matrix(3072, rank, 4, 1.0), matrix(rank, rank, 5, 1.0));
            let b = Batch::upload(device, device.factor(), &vec![b; layers]).expect("B");
            let r = Batch::upload(device, device.product(), &vec![r; layers]).expect("R");
            let of = Work {
                work: "matmul",
                shape: format!("{layers}x3072x{rank}"),
                variant: "f32".to_owned(),
                bytes: (4 * layers * rank * (2 * 3072 + rank)) as f64,
                flops: vec![(Rate::F32, (2 * layers * 3072 * rank * rank) as f64)],
                calls: 1,
                ..Default::default()
            };
            bench(&mut group, &target, &of, |n| {
                kept_busy(device, n, || drop(black_box(matmul(device, &b, &r).expect("matmul"))))
            });
        }
    }
    group.finish();
}

fn bench_rank_concat(c: &mut Criterion) {
    let mut group = c.benchmark_group("rank_concat");
    for target in targets() {
        let bytes: Vec<u8> = vec![0; 32 * 3072 * 2];
        let factor = Factor::new(RawMatrix::new(Dtype::Bf16, 32, 3072, &bytes).expect("a whole matrix"));
        let of = Work {
            work: "rank_concat",
            shape: "4x32x3072".to_owned(),
            variant: "bf16".to_owned(),
            link: 4.0 * bytes.len() as f64,
            calls: 1,
            ..Default::default()
        };
        bench(&mut group, &target, &of, |n| {
            kept_busy(&target.device, n, || {
                let joined = rank_concat(&target.device, Axis::Rows, &[&[factor; 4]]);
                drop(black_box(joined.expect("rank_concat")));
            })
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = criterion();
    targets = bench_accumulate, bench_solve, bench_matmul, bench_rank_concat
}
criterion_main!(benches);
