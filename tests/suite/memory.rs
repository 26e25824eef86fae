//! Merges and calibrations stay within the device memory that they are allowed, and the budget does not change what they give.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{Random, gpus};
use loraweld::calibration::Activations;
use loraweld::compute::{DeviceOptions, Disable, Precision, Select};
use loraweld::merge::Rule;
use loraweld::{
    Adapter, Calibration, Control, CoreMerge, Destination, Device, Dtype, EntryMerge, Format, Layer, Linear,
    Matrix, Merged, Method, NpLora, RawMatrix, Report, SaveOptions, Ssr, SvdMerge, Ties, Truncation, Tsv,
    Weighted, wgpu,
};

const MIB: u64 = 1 << 20;
/// What wgpu allocates for itself: half a MiB of zeros to copy from, and what aligning costs.
const OWN: u64 = MIB;
const WIDTH: usize = 2048;

/// f32 of them.
fn narrow(m: &Matrix) -> Matrix<f32> {
    m.map(|v| v as f32)
}

/// Layers of several shapes, of which a budget of 16 MiB holds one or two at a time.
fn adapter(seed: u64, rank: usize, layers: usize) -> Adapter {
    let mut random = Random(seed);
    let layers = (0..layers).map(|i| {
        let (input, output) = [(WIDTH, WIDTH), (WIDTH, 3 * WIDTH), (3 * WIDTH, WIDTH)][i % 3];
        let a = random.matrix(rank, input, (input as f64).powf(-0.5));
        let b = random.matrix(output, rank, 1.0);
        Layer::new(&format!("transformer.blocks.{i}.to_q"), narrow(&a), narrow(&b)).unwrap()
    });
    Adapter::new(format!("adapter {seed}"), Format::Peft, layers.collect()).unwrap()
}

fn open(memory: Option<u64>) -> Device {
    Device::open(&DeviceOptions { select: Select::Gpu, memory, ..Default::default() }).unwrap()
}

/// The same, but every row of A twice: its Gram matrices are singular.
fn singular(adapter: &Adapter) -> Adapter {
    let twice = |layer: &Layer| {
        let [a, b] = [layer.a(), layer.b()].map(|m| Matrix::new(m.rows(), m.cols(), m.to_vec()).unwrap());
        let a = Matrix::from_fn(a.rows(), a.cols(), |i, j| a[(i / 2, j)] as f32);
        layer.replaced(a, narrow(&b)).unwrap()
    };
    Adapter::new(adapter.name(), Format::Peft, adapter.layers().iter().map(twice).collect()).unwrap()
}

/// ‖(ΔW − ΔW')·X‖ / ‖ΔW·X‖ of a few random X, the worst of all layers.
fn difference(x: &Adapter, y: &Adapter) -> f64 {
    let mut random = Random(9);
    let delta = |layer: &Layer, v: &Matrix| {
        let wide = |m: RawMatrix<'_>| Matrix::new(m.rows(), m.cols(), m.to_vec()).unwrap();
        let mut out = crate::common::product(&wide(layer.b()), &crate::common::product(&wide(layer.a()), v));
        out.data_mut().iter_mut().for_each(|v| *v *= layer.scale().value);
        out
    };
    let one = |(x, y): (&Layer, &Layer)| {
        assert_eq!((x.name(), x.input(), x.output()), (y.name(), y.input(), y.output()));
        let v = random.matrix(x.input(), 3, 1.0);
        crate::common::relative(&delta(x, &v), &delta(y, &v))
    };
    assert_eq!(x.layers().len(), y.layers().len());
    x.layers().iter().zip(y.layers()).map(one).fold(0.0, f64::max)
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// What the device's allocator holds at most while `work` runs, as far as looking now and then shows.
fn watched<T>(device: &Device, work: impl FnOnce() -> T) -> (T, u64) {
    let wgpu: &wgpu::Device = device.wgpu().unwrap().0;
    let (stop, mut most) = (AtomicBool::new(false), 0);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Not every driver's allocator is wgpu's own.
                let report = wgpu.generate_allocator_report();
                most = most.max(report.map_or(0, |report| report.total_allocated_bytes));
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let result = work();
        stop.store(true, Ordering::Relaxed);
        result
    });
    (result, most)
}

fn methods() -> Vec<(&'static str, Box<dyn Method>, Truncation)> {
    let none = Truncation::default();
    vec![
        ("linear", Box::new(Linear), none),
        ("linear --rank 12", Box::new(Linear), Truncation::rank(12)),
        ("svd", Box::new(SvdMerge::new(Truncation::rank(7))), none),
        ("np-lora", Box::new(NpLora::soft(0.5)), none),
        ("ssr, data-free", Box::new(Ssr::data_free()), none),
        ("tsv", Box::new(CoreMerge::tsv(Tsv::default())), none),
        ("knots", Box::new(CoreMerge::knots(Rule::Ties(Ties::default()))), none),
        ("knots of the paper", Box::new(CoreMerge::knots(Rule::Ties(Ties::paper()))), none),
    ]
}

fn merged_into(
    method: &dyn Method,
    device: &Device,
    adapters: &[Weighted<'_>],
    truncation: Truncation,
) -> Merged {
    let folder = tempfile::tempdir().unwrap();
    let (path, options) = (folder.path().join("out.safetensors"), SaveOptions::default());
    let to = Destination { path: &path, sink: None, options: &options, truncation };
    let report = method.merge_into(device, adapters, &to, Control::default()).unwrap();
    Merged { adapter: Adapter::from_bytes("merged", std::fs::read(&path).unwrap()).unwrap(), report }
}

fn on_cpu(report: &Report) -> usize {
    let too_large = |note: &String| note.starts_with("too large for the device");
    report.layers.iter().filter(|layer| layer.notes.iter().any(too_large)).count()
}

/// Merges within each budget; gives how many layers went to the CPU.
fn check(
    name: &str,
    device: &Device,
    want: &Merged,
    merge: impl FnOnce(&Device) -> Merged,
    tolerance: f64,
) -> usize {
    let (got, allocated) = watched(device, || merge(device));
    let (budget, error) = (device.memory(), difference(&got.adapter, &want.adapter));
    let peak = got.report.memory.map_or(0, |memory| {
        assert_eq!((memory.budget, memory.peak), (budget, device.memory_peak()), "{name}");
        memory.peak
    });
    println!(
        "{name:18} {:4} MiB: peak {:6.2}, allocated {:6.2} MiB, {} layers on the CPU, error {error:.1e}",
        budget / MIB,
        peak as f64 / MIB as f64,
        allocated as f64 / MIB as f64,
        on_cpu(&got.report),
    );
    assert!(peak <= budget, "{name}: {peak} of {budget} bytes");
    assert!(allocated <= device.memory_peak() + OWN, "{name}: {allocated} bytes, but {peak} were counted");
    assert!(error <= tolerance, "{name} within {budget} bytes: {error:e}");
    on_cpu(&got.report)
}

#[test]
fn merges_stay_within_the_budget() {
    if gpus().is_empty() {
        return;
    }
    let adapters = [adapter(1, 16, 7), adapter(2, 16, 7)];
    let weighted = [adapters[0].at(1.0), adapters[1].at(-0.8)];
    let much = open(None);
    let want: Vec<Merged> =
        methods().iter().map(|(_, method, cut)| merged_into(&**method, &much, &weighted, *cut)).collect();
    for memory in [16 * MIB, 64 * MIB] {
        let device = open(Some(memory));
        for ((name, method, cut), want) in methods().iter().zip(&want) {
            // The same sums, of f64 where it counts.
            let cpu =
                check(name, &device, want, |device| merged_into(&**method, device, &weighted, *cut), 1e-6);
            assert_eq!(cpu, 0, "{name}");
            assert_eq!(want.report.memory.is_some(), *name != "linear", "{name}");
        }
    }
}

#[test]
fn every_way_through_a_merge_stays_within_the_budget() {
    if gpus().is_empty() {
        return;
    }
    // More subjects than one and singular factors want bases of the size of factors.
    let adapters = [singular(&adapter(1, 8, 4)), adapter(2, 24, 4), adapter(3, 8, 4)];
    let weighted: Vec<_> = adapters.iter().map(|adapter| adapter.at(0.7)).collect();
    let of = ["linear --rank 12", "np-lora", "knots"];
    let methods: Vec<_> = methods().into_iter().filter(|(name, ..)| of.contains(name)).collect();
    let forced = |precision, f64, double_single| DeviceOptions {
        select: Select::Gpu,
        precision,
        disable: Disable { f64, double_single, ..Default::default() },
        ..Default::default()
    };
    for options in [forced(Precision::F64, false, false), forced(Precision::Auto, true, true)] {
        let much = Device::open(&options).unwrap();
        let little = Device::open(&DeviceOptions { memory: Some(16 * MIB), ..options }).unwrap();
        for (name, method, cut) in &methods {
            let want = merged_into(&**method, &much, &weighted, *cut);
            let merge = |device: &Device| merged_into(&**method, device, &weighted, *cut);
            // KnOTS elects signs of entries, of which rounding may change some.
            check(name, &little, &want, merge, if *name == "knots" { 1e-3 } else { 1e-6 });
        }
    }
}

#[test]
fn merges_of_entries_stay_within_the_budget() {
    if gpus().is_empty() {
        return;
    }
    // Every entry costs some on a software adapter.
    let adapters = [1, 2].map(|seed| {
        let mut random = Random(seed);
        let (a, b) = (random.matrix(4, 1024, 0.03), random.matrix(1024, 4, 1.0));
        Adapter::new("a", Format::Peft, vec![Layer::new("to_q", narrow(&a), narrow(&b)).unwrap()]).unwrap()
    });
    let weighted = [adapters[0].at(1.0), adapters[1].at(0.8)];
    let ties = EntryMerge::ties(Ties::default());
    let want = ties.merge(&open(None), &weighted).unwrap();
    for memory in [4 * MIB, 16 * MIB] {
        // The same sums, in other chunks.
        let merge = |device: &Device| ties.merge(device, &weighted).unwrap();
        assert_eq!(check("ties", &open(Some(memory)), &want, merge, 1e-4), 0);
    }
}

#[test]
fn calibrating_and_merging_stay_within_the_budget() {
    if gpus().is_empty() {
        return;
    }
    let adapters = [adapter(1, 16, 6), adapter(2, 24, 6)];
    let weighted = [adapters[0].at(1.0), adapters[1].at(0.8)];
    let layers = adapters[0].layers();
    let tokens = 600;
    let inputs: Vec<Vec<f32>> = [WIDTH, 3 * WIDTH]
        .map(|width| {
            Random(width as u64).matrix(tokens, width, 1.0).data().iter().map(|&v| v as f32).collect()
        })
        .into();
    let of = |layer: &Layer| &inputs[usize::from(layer.input() > WIDTH)];
    let calibrated = |device: &Device| {
        let wgpu = device.wgpu().unwrap();
        let buffer = wgpu.0.create_buffer(&wgpu::BufferDescriptor {
            label: Some("a host's"),
            size: (4 * tokens * WIDTH) as u64,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        wgpu.1.write_buffer(&buffer, 0, &bytes(&inputs[0]));
        device.wait().unwrap();
        device.reset_memory_peak();
        let mut calibration = Calibration::new(&adapters).unwrap();
        let add = || {
            for task in 0..2 {
                for layer in layers {
                    let host = RawMatrix::from_f32(tokens, layer.input(), of(layer)).unwrap();
                    let x = match task {
                        1 if layer.input() == WIDTH => Activations::Buffer {
                            buffer: &buffer,
                            offset: 0,
                            dtype: Dtype::F32,
                            tokens,
                            width: WIDTH,
                        },
                        // Other inputs of each task.
                        _ => Activations::Host(host.row_range(100 * task, tokens)),
                    };
                    calibration.accumulate(device, task, layer.module(), x).unwrap();
                }
            }
        };
        let ((), allocated) = watched(device, add);
        let (peak, budget, host) = (device.memory_peak(), device.memory(), buffer.size());
        println!("calibrate {:13} MiB: peak {:6.2} MiB", budget / MIB, peak as f64 / MIB as f64);
        assert!(peak <= budget, "calibrating: {peak} of {budget} bytes");
        assert!(allocated <= peak + host + OWN, "calibrating: {allocated} bytes, but {peak} were counted");
        calibration
    };
    let ssr = |device: &Device| Ssr::new(&calibrated(device)).merge(device, &weighted).unwrap();
    let much = open(None);
    let want = ssr(&much);
    for memory in [16 * MIB, 64 * MIB] {
        let device = open(Some(memory));
        let calibration = calibrated(&device);
        device.wait().unwrap();
        // Of statistics in f32.
        let merge = |device: &Device| Ssr::new(&calibration).merge(device, &weighted).unwrap();
        assert_eq!(check("ssr, calibrated", &device, &want, merge, 1e-4), 0);
    }
}

#[test]
fn layers_that_need_more_are_computed_on_the_cpu() {
    if gpus().is_empty() {
        return;
    }
    let adapters = [adapter(1, 16, 2), adapter(2, 16, 2)];
    let weighted = [adapters[0].at(1.0), adapters[1].at(0.8)];
    let (method, none) = (NpLora::hard(), Truncation::default());
    let want = merged_into(&method, &open(None), &weighted, none);
    let merge = |device: &Device| merged_into(&method, device, &weighted, none);
    assert_eq!(check("np-lora", &open(Some(MIB)), &want, merge, 1e-6), 2);
}
