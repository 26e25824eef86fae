//! Selection inside a host's encoder, live factors and guidance, at the sizes of FLUX.1.
//!
//! `cargo bench --bench fusion` times each on every adapter present, and prints what share of the measured copy bandwidth
//! it reaches: bytes that must move (x and f0 read, the result written), over time, over the bandwidth of a copy of the
//! same size. A quarter is the aim.

mod common;

use std::hint::black_box;
use std::time::{Duration, Instant};

use common::{Input, devices, values};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use loraweld::fusion::{Choice, LiveNpLora, Scope, Score, Selection, Selector, SelectorOptions, guide};
use loraweld::{Activations, Adapter, Device, Dtype, Format, Layer, Matrix, Projection};

/// Calls in one submission, so that the time is the device's.
const CALLS: usize = 16;

fn matrix(rows: usize, cols: usize, seed: u64, scale: f32) -> Matrix<f32> {
    Matrix { rows, cols, data: values(rows * cols, seed).map(|v| v * scale).collect() }
}

fn adapter(name: &str, seed: u64, layers: &[(String, usize, usize)], rank: usize) -> Adapter {
    let layers = layers.iter().map(|(layer, input, output)| {
        Layer::new(layer, matrix(rank, *input, seed, 0.02), matrix(*output, rank, seed + 1, 0.02))
            .expect("a layer")
    });
    Adapter::new(name, Format::Peft, layers.collect()).expect("an adapter")
}

/// Submissions of recorded work, waited for once at the end.
fn submitted(
    device: &Device,
    iterations: u64,
    mut encode: impl FnMut(&mut wgpu::CommandEncoder),
) -> Duration {
    let (gpu, queue) = device.wgpu().expect("a GPU");
    device.wait().expect("a working device");
    let start = Instant::now();
    for _ in 0..iterations {
        let mut encoder = gpu.create_command_encoder(&Default::default());
        encode(&mut encoder);
        queue.submit([encoder.finish()]);
    }
    device.wait().expect("a working device");
    start.elapsed()
}

/// Bytes read and written in a second by copies as large as f0.
fn copy_bandwidth(device: &Device, bytes: u64) -> f64 {
    let (gpu, _) = device.wgpu().expect("a GPU");
    let [from, to] = [(); 2].map(|()| {
        gpu.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes,
            usage: wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    });
    let copy = |encoder: &mut wgpu::CommandEncoder| {
        for _ in 0..CALLS {
            encoder.copy_buffer_to_buffer(&from, 0, &to, 0, bytes);
        }
    };
    submitted(device, 3, copy);
    let rounds = 10;
    let seconds = submitted(device, rounds, copy).as_secs_f64();
    2.0 * bytes as f64 * (rounds as usize * CALLS) as f64 / seconds
}

fn bench_selection(c: &mut Criterion) {
    let mut group = c.benchmark_group("selection");
    for (name, device, fast) in devices().into_iter().filter(|(_, device, _)| device.is_gpu()) {
        let (tokens, shapes) = match fast {
            true => (4608, vec![(3072, 3072), (3072, 12288), (12288, 3072)]),
            false => (64, vec![(256, 256)]),
        };
        for (input, output) in shapes {
            let layer = [("layer".to_owned(), input, output)];
            let adapters = [adapter("subject", 1, &layer, 32), adapter("style", 5, &layer, 32)];
            let options = SelectorOptions { tokens, records: 64 };
            let weighted = [adapters[0].at(1.0), adapters[1].at(1.0)];
            let mut selector = Selector::new(&device, &weighted, options).expect("a selector");
            let hard = |score| Selection { score, ..Default::default() };
            let variants = [
                ("kl", hard(Score::Kl)),
                ("dot", hard(Score::Dot)),
                ("energy", hard(Score::Energy)),
                ("kl, by layer", Selection { scope: Scope::Layer, ..Default::default() }),
                (
                    "kl, soft, normalised",
                    Selection { choice: Choice::Soft, normalise: true, ..Default::default() },
                ),
                ("fixed", Selection { choice: Choice::Fixed(vec![1.0, 1.0]), ..Default::default() }),
            ];
            for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
                let (x, f0) =
                    (Input::new(&device, dtype, tokens, input), Input::new(&device, dtype, tokens, output));
                let moved = (tokens * (input + 2 * output) * dtype.size()) as u64;
                let bandwidth = copy_bandwidth(&device, (tokens * output * dtype.size()) as u64);
                for (label, how) in &variants {
                    let mut encode = |encoder: &mut wgpu::CommandEncoder| {
                        for _ in 0..CALLS {
                            let (x, f0) = (x.view(dtype, tokens, input), f0.view(dtype, tokens, output));
                            selector.encode(encoder, "layer", x, f0, how).expect("selection");
                        }
                    };
                    submitted(&device, 2, &mut encode);
                    let rounds = if fast { 20 } else { 1 };
                    let seconds = submitted(&device, rounds, &mut encode).as_secs_f64()
                        / (rounds as usize * CALLS) as f64;
                    eprintln!(
                        "{name}: {input} to {output}, {tokens} tokens, {dtype}, {label}: {:.4} ms, {:.2} of copy \
                         bandwidth ({:.0} GB/s)",
                        seconds * 1e3,
                        moved as f64 / seconds / bandwidth,
                        bandwidth / 1e9
                    );
                    group.throughput(Throughput::Bytes(moved * CALLS as u64));
                    let id = format!("{label}/{dtype}/{CALLS} x n{tokens}/{input} to {output}");
                    group.bench_function(BenchmarkId::new(&name, id), |b| {
                        b.iter_custom(|n| submitted(&device, n, &mut encode));
                    });
                }
            }
        }
    }
    group.finish();
}

/// The layers of FLUX.1 that adapters usually have.
fn flux(fast: bool) -> Vec<(String, usize, usize)> {
    let (double, single, width) = if fast { (19, 38, 3072) } else { (1, 1, 256) };
    let mut layers = Vec::new();
    for i in 0..double {
        for module in
            ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        {
            layers.push((format!("transformer_blocks.{i}.attn.{module}"), width, width));
        }
        for ff in ["ff", "ff_context"] {
            layers.push((format!("transformer_blocks.{i}.{ff}.net.0.proj"), width, 4 * width));
            layers.push((format!("transformer_blocks.{i}.{ff}.net.2"), 4 * width, width));
        }
    }
    for i in 0..single {
        for module in ["to_q", "to_k", "to_v"] {
            layers.push((format!("single_transformer_blocks.{i}.attn.{module}"), width, width));
        }
        layers.push((format!("single_transformer_blocks.{i}.proj_mlp"), width, 4 * width));
        layers.push((format!("single_transformer_blocks.{i}.proj_out"), 5 * width, width));
    }
    layers
}

/// From a moved slider to new factors of a whole adapter on the device.
fn bench_slider(c: &mut Criterion) {
    let mut group = c.benchmark_group("slider");
    for (name, device, fast) in devices() {
        let fast = fast && device.is_gpu();
        let layers = flux(fast);
        let (subject, style) = (adapter("subject", 1, &layers, 16), adapter("style", 5, &layers, 16));
        let mut live = LiveNpLora::new(&device, style.at(1.0), subject.at(1.0)).expect("live factors");
        let mut mu = 0.0;
        group.bench_function(BenchmarkId::new(&name, format!("np-lora, {} layers", layers.len())), |b| {
            b.iter(|| {
                mu = (mu + 0.01) % 1.0;
                live.set(Projection::Soft(mu), 1.0, 0.8).expect("new factors");
                // The user waits for this one, not for many.
                device.wait().expect("a working device");
            });
        });
        if device.is_gpu() {
            let options = SelectorOptions { tokens: 64, records: 1024 };
            let mut selector =
                Selector::new(&device, &[subject.at(1.0), style.at(1.0)], options).expect("a selector");
            group.bench_function(BenchmarkId::new(&name, "selection, strength"), |b| {
                b.iter(|| {
                    mu = (mu + 0.01) % 1.0;
                    selector.set_strength(1, mu).expect("a strength");
                    device.wait().expect("a working device");
                });
            });
        }
    }
    group.finish();
}

/// The host's time to record a step's calls, one for each layer.
fn bench_encode(c: &mut Criterion) {
    let mut group = c.benchmark_group("encode");
    for (name, device, fast) in devices().into_iter().filter(|(_, device, _)| device.is_gpu()) {
        let layers = flux(fast);
        let (subject, style) = (adapter("subject", 1, &layers, 4), adapter("style", 5, &layers, 4));
        let options = SelectorOptions { tokens: 64, records: 1024 };
        let mut selector =
            Selector::new(&device, &[subject.at(1.0), style.at(1.0)], options).expect("a selector");
        let largest = layers.iter().map(|(_, i, o)| *i.max(o)).max().unwrap_or(0);
        let (x, f0) =
            (Input::new(&device, Dtype::F16, 64, largest), Input::new(&device, Dtype::F16, 64, largest));
        let (gpu, _) = device.wgpu().expect("a GPU");
        group.bench_function(BenchmarkId::new(&name, format!("{} layers", layers.len())), |b| {
            b.iter(|| {
                let mut encoder = gpu.create_command_encoder(&Default::default());
                for (layer, input, output) in &layers {
                    let (x, f0): (Activations<'_>, Activations<'_>) =
                        (x.view(Dtype::F16, 64, *input), f0.view(Dtype::F16, 64, *output));
                    selector.encode(&mut encoder, layer, x, f0, &Selection::default()).expect("selection");
                }
                black_box(encoder.finish());
            });
        });
    }
    group.finish();
}

fn bench_guidance(c: &mut Criterion) {
    let mut group = c.benchmark_group("guidance");
    for (name, device, fast) in devices().into_iter().filter(|(_, device, _)| device.is_gpu()) {
        let len = if fast { 4096 * 64 } else { 4096 };
        let (x, y) = (Input::new(&device, Dtype::F16, 1, len), Input::new(&device, Dtype::F16, 1, len));
        group.throughput(Throughput::Bytes((3 * 2 * len * CALLS) as u64));
        group.bench_function(BenchmarkId::new(&name, format!("f16/{CALLS} x {len}")), |b| {
            b.iter_custom(|n| {
                submitted(&device, n, |encoder| {
                    for _ in 0..CALLS {
                        let (c, u) = (x.view(Dtype::F16, 1, len), y.view(Dtype::F16, 1, len));
                        guide(&device, encoder, c, u, 3.5).expect("guidance");
                    }
                })
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = bench_selection, bench_slider, bench_encode, bench_guidance
}
criterion_main!(benches);
