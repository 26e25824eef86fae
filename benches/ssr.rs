//! SSR of a whole FLUX.1: 304 layers, four adapters of rank 32, 4608 tokens a task; and of the demo's small adapters.
//!
//! The activations lie in the device's memory already, as they do where a model has just run. They take turns in a few
//! buffers of each width (all of them would be 64 GB), more than any cache holds. What is timed:
//!
//! * `accumulate`: the statistics of all layers and tasks, eight layers a call, the adapters' A on the device;
//! * `solve and product`: the routers of all layers from statistics on the device, and B_cat times them, on the device;
//! * `whole`: from adapters in files to merged factors on the host, with hashes, losses and report.
//!
//! `cargo bench --bench ssr -- accumulate` runs one part. Where there is no hardware GPU, the software adapter and the CPU
//! take two small blocks. `benches/pytorch/ssr.py` times the authors' formula in PyTorch.

mod common;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::Path;

use common::{
    Input, LayerShape, Rate, Systems, Target, Work, adapter_file, bench, criterion, flux_layers, kept_busy,
    matrix, targets, timed, widths,
};
use criterion::{Criterion, criterion_group, criterion_main};
use loraweld::compute::Batch;
use loraweld::compute::ops::{Activations, matmul};
use loraweld::{Adapter, Calibration, Control, Device, Dtype, Matrix, Source, Ssr, Weighted};

const ADAPTERS: usize = 4;
const RANK: usize = 32;
const ORDER: usize = ADAPTERS * RANK;
/// Layers that come in one call: as many as a block has, whose inputs a model can keep.
const BLOCK: usize = 8;

/// Feeds a calibration with the activations of every task and layer.
fn accumulate(
    target: &Target,
    calibration: &mut Calibration,
    layers: &[LayerShape],
    inputs: &BTreeMap<usize, Vec<Input>>,
) {
    // Layers that meet in a call must not read one input by chance: they would be computed as one.
    let mut turns: BTreeMap<usize, _> =
        inputs.iter().map(|(width, inputs)| (*width, inputs.iter().cycle())).collect();
    let mut next =
        |width| turns.get_mut(width).and_then(Iterator::next).expect("inputs of every width").view();
    let views: Vec<(&str, Activations<'_>)> =
        layers.iter().map(|(layer, width, _)| (layer.as_str(), next(width))).collect();
    for task in 0..ADAPTERS {
        for block in views.chunks(BLOCK) {
            calibration.accumulate_all(&target.device, Source::Task(task), block).expect("accumulate");
        }
    }
}

fn merge(device: &Device, calibration: &Calibration, adapters: &[Adapter]) {
    let weighted: Vec<Weighted<'_>> = adapters.iter().map(|adapter| adapter.at(1.0)).collect();
    drop(black_box(Ssr::new(calibration).merge(device, &weighted).expect("a merge")));
}

/// B_cat of all layers in batches that any device binds.
fn outputs(target: &Target, layers: &[LayerShape]) -> Vec<Batch> {
    let device = &target.device;
    let upload = |chunk: &[LayerShape]| {
        let b: Vec<Matrix> = chunk.iter().map(|(_, _, output)| matrix(*output, ORDER, 7, 1.0)).collect();
        Batch::upload(device, device.factor(), &b).expect("B")
    };
    layers.chunks(16).map(upload).collect()
}

/// R of all layers, and `B_cat·R`.
fn solve_and_product(target: &Target, systems: &Systems<'_>, outputs: &[Batch]) {
    let device = &target.device;
    let routers = systems.solve().download(device).expect("routers");
    let mut rest = routers.as_slice();
    let products = outputs.iter().map(|b| {
        let (here, left) = rest.split_at(b.len());
        rest = left;
        let routers = Batch::upload(device, device.product(), here).expect("routers");
        matmul(device, b, &routers).expect("a product")
    });
    // All are kept: the merged factors.
    drop(black_box(products.collect::<Vec<_>>()));
}

fn bench_flux(c: &mut Criterion) {
    let mut group = c.benchmark_group("ssr");
    for target in targets() {
        let (layers, tokens) = (flux_layers(&target), target.sized(4608, 64));
        let folder = tempfile::tempdir().expect("a folder");
        let adapters: Vec<Adapter> =
            (1..=ADAPTERS as u64).map(|seed| adapter_file(folder.path(), &layers, RANK, seed)).collect();
        let mut inputs = BTreeMap::new();
        for (_, width, _) in &layers {
            inputs.entry(*width).or_insert_with(|| Input::many(&target, Dtype::Bf16, tokens, *width));
        }
        let count = layers.len() as f64;
        let (read, written) = widths(&layers);
        let (tokens, order) = (tokens as f64, ORDER as f64);
        let tasks = ADAPTERS as f64;
        let statistics = Work {
            work: "ssr",
            shape: format!("{} layers k{ADAPTERS} r{RANK} n{tokens}", layers.len()),
            variant: "accumulate".to_owned(),
            bytes: tasks * read * (2.0 * tokens + 4.0 * order),
            flops: vec![(target.products(), tasks * tokens * order * (2.0 * read + count * (order + 1.0)))],
            calls: 1,
            ..Default::default()
        };
        {
            let mut calibration = Calibration::new(&adapters).expect("adapters of one model");
            bench(&mut group, &target, &statistics, |n| {
                kept_busy(&target.device, n, || accumulate(&target, &mut calibration, &layers, &inputs))
            });
        }
        {
            let systems = Systems::new(&target, layers.len(), ORDER);
            let b = outputs(&target, &layers);
            let solve = systems.work();
            let router = Work {
                variant: "solve and product".to_owned(),
                bytes: solve.bytes + 8.0 * order * written,
                flops: [solve.flops, vec![(Rate::F32, 2.0 * order * order * written)]].concat(),
                error: Some(systems.residual()),
                ..statistics.clone()
            };
            bench(&mut group, &target, &router, |n| {
                kept_busy(&target.device, n, || solve_and_product(&target, &systems, &b))
            });
        }
        let whole = Work {
            variant: "whole".to_owned(),
            // A goes up for the statistics, A and B for the merge; B comes back.
            link: order * (2.0 * (2.0 * read + written) + 4.0 * written),
            ..statistics.clone()
        };
        bench(&mut group, &target, &whole, |n| {
            timed(n, || {
                // Anew each time: an open adapter keeps the hash of its A.
                let adapters: Vec<Adapter> =
                    adapters.iter().map(|adapter| Adapter::open(adapter.path()).expect("the file")).collect();
                let mut calibration = Calibration::new(&adapters).expect("adapters of one model");
                accumulate(&target, &mut calibration, &layers, &inputs);
                merge(&target.device, &calibration, &adapters);
            })
        });
    }
    group.finish();
}

/// From files, as the command line does it.
fn bench_demo(c: &mut Criterion) {
    const CONCEPTS: [&str; ADAPTERS] =
        ["concept_c3_mirror", "concept_c7_rot90", "concept_c1_thick", "concept_c4_invert"];
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let file = |folder: &str, name: &str| data.join(folder).join(format!("{name}.safetensors"));
    // A binary that was carried elsewhere has no fixtures.
    if !data.is_dir() {
        return eprintln!("skipped the demo: {} is not there", data.display());
    }
    let adapters = CONCEPTS.map(|name| Adapter::open(file("loras", name)).expect("a fixture"));
    let mut group = c.benchmark_group("demo");
    for target in targets() {
        let of = Work {
            work: "demo",
            shape: "24 layers k4".to_owned(),
            variant: "calibrate and merge".to_owned(),
            calls: 1,
            ..Default::default()
        };
        bench(&mut group, &target, &of, |n| {
            timed(n, || {
                let mut calibration = Calibration::new(&adapters).expect("adapters of one model");
                for (task, concept) in CONCEPTS.iter().enumerate() {
                    let (path, control) = (file("activations/traj4", concept), Control::default());
                    let source = Source::Task(task);
                    calibration.accumulate_file(&target.device, source, &path, &control).expect("a fixture");
                }
                merge(&target.device, &calibration, &adapters);
            })
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = criterion();
    targets = bench_flux, bench_demo
}
criterion_main!(benches);
