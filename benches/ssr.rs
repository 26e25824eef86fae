//! A whole SSR merge, calibration from activations included, on every adapter present: layers as FLUX.1 has
//! them, and the small trained adapters of the demo.
//!
//! `cargo bench --bench ssr -- merge` runs one part. Software adapters and the CPU take fewer and smaller layers.
//! On a GPU the activations lie in its memory already, as they do where a model has just run.

mod common;

use std::hint::black_box;
use std::path::Path;
use std::time::Duration;

use common::{Input, devices, values};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use loraweld::{Adapter, Calibration, Control, Device, Dtype, Format, Layer, Matrix, Source, Ssr, Weighted};

/// Adapters of synthetic layers, and how many tokens each layer gets from each.
struct Setting {
    name: String,
    adapters: Vec<Adapter>,
    widths: Vec<(String, usize)>,
    tokens: usize,
}

impl Setting {
    fn new(blocks: usize, width: usize, adapters: usize, rank: usize, tokens: usize) -> Self {
        let shapes = [
            ("attn.to_q", width, width),
            ("ff.net.0.proj", width, 4 * width),
            ("ff.net.2", 4 * width, width),
        ];
        let layers: Vec<_> = (0..blocks)
            .flat_map(|i| {
                shapes.map(|(m, input, output)| (format!("transformer_blocks.{i}.{m}"), input, output))
            })
            .collect();
        let matrix = |rows: usize, cols: usize, seed: usize| {
            let scale = 1.0 / (cols as f32).sqrt();
            Matrix { rows, cols, data: values(rows * cols, seed as u64).map(|v| v * scale).collect() }
        };
        let made = |k: usize| {
            let layers = layers.iter().enumerate().map(|(i, (name, input, output))| {
                let seed = 2 * (k * layers.len() + i);
                Layer::new(name, matrix(rank, *input, seed), matrix(*output, rank, seed + 1))
                    .expect("a layer")
            });
            Adapter::new(format!("adapter {k}"), Format::Peft, layers.collect()).expect("an adapter")
        };
        Self {
            name: format!("{blocks}x{width}/k{adapters}/r{rank}/n{tokens}"),
            adapters: (0..adapters).map(made).collect(),
            widths: layers.into_iter().map(|(name, input, _)| (name, input)).collect(),
            tokens,
        }
    }

    /// Activations of each width that occurs, which all layers share: the work does not depend on the values.
    fn inputs(&self, device: &Device) -> Vec<(usize, Input)> {
        let mut widths: Vec<usize> = self.widths.iter().map(|(_, width)| *width).collect();
        widths.sort_unstable();
        widths.dedup();
        let input = |width| (width, Input::new(device, Dtype::Bf16, self.tokens, width));
        widths.into_iter().map(input).collect()
    }

    fn calibrate(&self, device: &Device, inputs: &[(usize, Input)]) -> Calibration {
        let mut calibration = Calibration::new(&self.adapters).expect("adapters of one model");
        for task in 0..self.adapters.len() {
            for (layer, width) in &self.widths {
                let (_, input) = inputs.iter().find(|(w, _)| w == width).expect("inputs of every width");
                let x = input.view(Dtype::Bf16, self.tokens, *width);
                calibration.accumulate(device, task, layer, x).expect("accumulate");
            }
        }
        calibration.flush().expect("finite sums");
        calibration
    }
}

fn merge(device: &Device, calibration: &Calibration, adapters: &[Adapter]) {
    let weighted: Vec<Weighted<'_>> = adapters.iter().map(|adapter| adapter.at(1.0)).collect();
    black_box(Ssr::new(calibration).merge(device, &weighted).expect("a merge"));
}

fn bench_flux(c: &mut Criterion) {
    let mut group = c.benchmark_group("ssr");
    for (name, device, fast) in devices() {
        let setting = match fast {
            true => Setting::new(19, 3072, 4, 32, 512),
            false => Setting::new(2, 768, 4, 32, 128),
        };
        let inputs = setting.inputs(&device);
        let id = |what: &str| BenchmarkId::new(format!("{name}/{what}"), &setting.name);
        group.bench_function(id("calibrate"), |b| b.iter(|| black_box(setting.calibrate(&device, &inputs))));
        let calibration = setting.calibrate(&device, &inputs);
        group.bench_function(id("merge"), |b| b.iter(|| merge(&device, &calibration, &setting.adapters)));
        group.bench_function(id("calibrate and merge"), |b| {
            b.iter(|| merge(&device, &setting.calibrate(&device, &inputs), &setting.adapters));
        });
    }
    group.finish();
}

/// From files, as the command line does it.
fn bench_demo(c: &mut Criterion) {
    const CONCEPTS: [&str; 4] =
        ["concept_c3_mirror", "concept_c7_rot90", "concept_c1_thick", "concept_c4_invert"];
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let file = |folder: &str, name: &str| data.join(folder).join(format!("{name}.safetensors"));
    let adapters = CONCEPTS.map(|name| Adapter::open(file("loras", name)).expect("a fixture"));
    let mut group = c.benchmark_group("demo");
    for (name, device, _) in devices() {
        group.bench_function(BenchmarkId::new(&name, "calibrate and merge"), |b| {
            b.iter(|| {
                let mut calibration = Calibration::new(&adapters).expect("adapters of one model");
                for (task, concept) in CONCEPTS.iter().enumerate() {
                    let (path, control) = (file("activations/traj4", concept), Control::default());
                    let source = Source::Task(task);
                    calibration.accumulate_file(&device, source, &path, &control).expect("a fixture");
                }
                merge(&device, &calibration, &adapters);
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(5));
    targets = bench_flux, bench_demo
}
criterion_main!(benches);
