//! Each operation on every adapter present, at the shapes of a FLUX.1 adapter.
//!
//! `cargo bench --bench ops -- accumulate` runs one group. Software adapters and the CPU take only small
//! shapes. `benches/pytorch/ops.py` times the same work in PyTorch.

mod common;

use std::hint::black_box;
use std::time::{Duration, Instant};

use common::{Input, devices, values};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use loraweld::compute::ops::{Axis, Factor, accumulate, cholesky, cholesky_solve, matmul, rank_concat};
use loraweld::compute::{Batch, DeviceOptions, Disable, Precision, Select, Shape};
use loraweld::{Device, Dtype, Matrix, RawMatrix};

fn matrix(rows: usize, cols: usize, seed: u64) -> Matrix {
    Matrix { rows, cols, data: values(rows * cols, seed).map(f64::from).collect() }
}

/// Times `iterations` of work that is submitted without waiting, then waits once.
fn submitted(device: &Device, iterations: u64, mut work: impl FnMut()) -> Duration {
    device.wait().expect("a working device");
    let start = Instant::now();
    for _ in 0..iterations {
        work();
    }
    device.wait().expect("a working device");
    start.elapsed()
}

fn bench_accumulate(c: &mut Criterion) {
    let mut group = c.benchmark_group("accumulate");
    for (name, device, fast) in devices() {
        let (tokens, shapes) = match fast {
            true => (4608, vec![(3072, 32), (3072, 64), (3072, 128), (3072, 256), (3072, 512), (12288, 128)]),
            false => (512, vec![(3072, 64)]),
        };
        for (width, rank) in shapes {
            for dtype in [Dtype::Bf16, Dtype::F32] {
                let input = Input::new(&device, dtype, tokens, width);
                // Layers go to the device several at a time, as a calibration sends them.
                let layers = if fast { 8 } else { 1 };
                let a = vec![matrix(rank, width, 2); layers];
                let a = Batch::upload(&device, device.factor(), &a).expect("A");
                let shapes = vec![Shape::new(rank, rank); layers];
                let mut sums = Batch::zeros(&device, device.sum(), &shapes).expect("sums");
                // Operations of the two products, the second a triangle.
                let flop = layers * (2 * tokens * rank * width + tokens * rank * (rank + 1));
                group.throughput(Throughput::Elements(flop as u64));
                let id = BenchmarkId::new(&name, format!("{dtype}/{layers} x n{tokens}/d{width}/r{rank}"));
                group.bench_function(id, |b| {
                    b.iter_custom(|n| {
                        let x = input.view(dtype, tokens, width);
                        let inputs: Vec<_> = (0..layers).map(|layer| (layer, x)).collect();
                        submitted(&device, n, || {
                            accumulate(&device, &inputs, &a, &mut sums).expect("accumulate");
                        })
                    });
                });
            }
        }
    }
    group.finish();
}

/// Systems of one order, positive definite, a right-hand side for each row.
fn systems(count: usize, order: usize) -> Vec<Matrix> {
    let mut m = matrix(order, order, 3);
    for i in 0..order {
        for j in 0..i {
            m[(i, j)] = m[(j, i)];
        }
        m[(i, i)] += order as f64;
    }
    vec![m; count]
}

fn bench_solve(c: &mut Criterion) {
    let mut group = c.benchmark_group("solve");
    for (name, auto, fast) in devices() {
        let mut tiers = vec![("", auto)];
        if fast {
            let options = DeviceOptions {
                select: Select::Name(name.clone()),
                disable: Disable { f64: true, ..Default::default() },
                precision: Precision::Auto,
                ..Default::default()
            };
            tiers.extend(Device::open(&options).map(|device| ("/double-single", device)));
        }
        for (tier, device) in tiers {
            for order in [32, 64, 128, 256] {
                let count = if fast { 64 } else { 8 };
                let matrices = systems(count, order);
                group.throughput(Throughput::Elements(count as u64));
                // Copies stay on the device, so that it is kept busy and at its clocks.
                let a = Batch::upload(&device, device.sum(), &matrices).expect("A");
                let mut factored = a.duplicate(&device).expect("copy");
                black_box(cholesky(&device, &mut factored).expect("cholesky"));
                let id = |what| BenchmarkId::new(format!("{name}{tier}/{what}"), format!("{count}x{order}"));
                group.bench_function(id("factor"), |b| {
                    b.iter_custom(|n| {
                        submitted(&device, n, || {
                            let mut a = a.duplicate(&device).expect("copy");
                            black_box(cholesky(&device, &mut a).expect("cholesky"));
                        })
                    });
                });
                group.bench_function(id("solve"), |b| {
                    b.iter_custom(|n| {
                        submitted(&device, n, || {
                            let mut q = a.duplicate(&device).expect("copy");
                            cholesky_solve(&device, &factored, &mut q).expect("solve");
                        })
                    });
                });
            }
        }
    }
    group.finish();
}

fn bench_matmul(c: &mut Criterion) {
    let mut group = c.benchmark_group("matmul");
    for (name, device, fast) in devices() {
        let layers = if fast { 19 } else { 1 };
        for rank in [32, 128] {
            let b = vec![matrix(3072, rank, 4); layers];
            let r = vec![matrix(rank, rank, 5); layers];
            let b = Batch::upload(&device, device.factor(), &b).expect("B");
            let r = Batch::upload(&device, device.product(), &r).expect("R");
            group.throughput(Throughput::Elements((2 * layers * 3072 * rank * rank) as u64));
            group.bench_function(BenchmarkId::new(&name, format!("{layers}x3072x{rank}")), |bench| {
                bench.iter_custom(|n| {
                    submitted(&device, n, || {
                        black_box(matmul(&device, &b, &r).expect("matmul"));
                    })
                });
            });
        }
    }
    group.finish();
}

fn bench_rank_concat(c: &mut Criterion) {
    let mut group = c.benchmark_group("rank_concat");
    for (name, device, _) in devices() {
        let bytes: Vec<u8> = vec![0; 32 * 3072 * 2];
        let factor = Factor::new(RawMatrix::new(Dtype::Bf16, 32, 3072, &bytes).expect("a whole matrix"));
        let factors = [factor; 4];
        group.throughput(Throughput::Bytes(4 * bytes.len() as u64));
        group.bench_function(BenchmarkId::new(&name, "4x32x3072"), |b| {
            b.iter_custom(|n| {
                submitted(&device, n, || {
                    black_box(rank_concat(&device, Axis::Rows, &[&factors]).expect("rank_concat"));
                })
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = bench_accumulate, bench_solve, bench_matmul, bench_rank_concat
}
criterion_main!(benches);
