//! What was measured: a line for people, and one of JSON in the file that `LORAWELD_BENCH_RESULTS` names.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::Write;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use loraweld::Device;
use serde_json::{Value, json};

use super::{Roofline, Target, submitted};

/// Timed calls of a benchmark; the median counts.
const SAMPLES: usize = 10;

/// How long benchmarks run.
pub fn criterion() -> Criterion {
    Criterion::default()
        .without_plots()
        .nresamples(1000)
        .sample_size(SAMPLES)
        // Less leaves clocks low, and the first rows of a run several times too high.
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(1))
}

/// Which arithmetic operations are of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    F32,
    F64,
    /// Matrix units.
    Matrix,
}

/// A piece of work, by the names that reports compare it under with other programs, and what it takes at least.
#[derive(Clone, Debug, Default)]
pub struct Work {
    pub work: &'static str,
    pub shape: String,
    /// Type, tier or kind: what tells apart measurements of one piece of work on one device.
    pub variant: String,
    /// Bytes of device memory that must be read or written.
    pub bytes: f64,
    /// Bytes that must pass between host and device.
    pub link: f64,
    /// Operations that must be done, by what they are limited by.
    pub flops: Vec<(Rate, f64)>,
    /// How often one timed call does it.
    pub calls: usize,
    /// The relative error or residual of the result.
    pub error: Option<f64>,
    /// The device's own seconds, and the host's to record the work, where they were told apart.
    pub apart: Option<Apart>,
}

/// What recorded work takes on either side.
#[derive(Clone, Copy, Debug)]
pub struct Apart {
    /// By the device's timestamps.
    pub device: Option<f64>,
    /// To record it, and to finish what was recorded.
    pub host: f64,
}

impl Work {
    /// The least seconds that the device allows, and what it is then limited by.
    fn floor(&self, roofline: &Roofline) -> (f64, &'static str) {
        let rate = |rate| match rate {
            Rate::F32 => Some(roofline.f32),
            Rate::F64 => roofline.f64,
            Rate::Matrix => roofline.matrix,
        };
        let arithmetic = self.flops.iter().map(|&(kind, n)| n / rate(kind).unwrap_or(roofline.f32)).sum();
        let limits = [
            (self.bytes / roofline.memory(), "memory"),
            (self.link / roofline.link, "host link"),
            (arithmetic, "arithmetic"),
        ];
        limits.into_iter().fold((0.0, "nothing"), |most, limit| if limit.0 > most.0 { limit } else { most })
    }

    /// Prints and writes what was measured; `seconds` of one.
    pub fn report(&self, target: &Target, seconds: f64) {
        let flops: f64 = self.flops.iter().map(|(_, n)| n).sum();
        let mut line = format!("{} {} [{}]: {:.4} ms", self.work, self.shape, self.variant, seconds * 1e3);
        for (amount, unit) in [(self.bytes.max(self.link), "GB/s"), (flops, "Gflop/s")] {
            if amount > 0.0 {
                line += &format!(", {:.0} {unit}", amount / seconds / 1e9);
            }
        }
        let (floor, bound) = match &target.roofline {
            Some(roofline) => self.floor(roofline),
            None => (0.0, "nothing"),
        };
        if floor > 0.0 {
            line += &format!(", {:.1} % of the {bound} limit", 100.0 * floor / seconds);
        }
        if let Some(Apart { device, host }) = self.apart {
            if let Some(device) = device {
                line += &format!(", {:.4} ms on the device", device * 1e3);
            }
            line += &format!(", {:.4} ms to record", host * 1e3);
        }
        if let Some(error) = self.error {
            line += &format!(", error {error:.1e}");
        }
        eprintln!("{}: {line}", target.name);
        write(json!({
            "side": "loraweld", "device": target.name, "work": self.work, "shape": self.shape, "variant": self.variant,
            "seconds": seconds, "bytes": self.bytes, "link_bytes": self.link, "flops": flops,
            "bound": bound, "floor_seconds": floor, "error": self.error,
            "device_seconds": self.apart.and_then(|apart| apart.device), "host_seconds": self.apart.map(|apart| apart.host),
        }));
    }
}

/// Appends a line to the results.
pub fn write(value: Value) {
    let Some(path) = std::env::var_os("LORAWELD_BENCH_RESULTS") else { return };
    let file = OpenOptions::new().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| writeln!(file, "{value}"));
    written.unwrap_or_else(|e| panic!("LORAWELD_BENCH_RESULTS: cannot write to {}: {e}", path.display()));
}

/// Benchmarks a piece of work: `timed` does it so many times and tells how long it took.
pub fn bench(
    group: &mut BenchmarkGroup<'_, WallTime>,
    target: &Target,
    work: &Work,
    timed: impl FnMut(u64) -> Duration,
) {
    let seconds = measure(group, target, work, timed);
    if seconds > 0.0 {
        work.report(target, seconds);
    }
}

/// Lets criterion time it, and gives the median; 0 if it was not asked for.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    target: &Target,
    work: &Work,
    mut timed: impl FnMut(u64) -> Duration,
) -> f64 {
    // Criterion warms up first, and then asks for its samples; the same number of iterations in each.
    let samples = RefCell::new(Vec::new());
    let calls = work.calls.max(1);
    let amount = if work.bytes > 0.0 { work.bytes } else { work.link };
    group.sampling_mode(SamplingMode::Flat).throughput(Throughput::Bytes((amount * calls as f64) as u64));
    let id = BenchmarkId::new(format!("{}/{}", target.name, work.variant), &work.shape);
    group.bench_function(id, |b| {
        b.iter_custom(|n| {
            let elapsed = timed(n);
            samples.borrow_mut().push(elapsed.as_secs_f64() / (n as usize * calls) as f64);
            elapsed
        });
    });
    let mut samples = samples.into_inner();
    let warm_up = samples.len().saturating_sub(SAMPLES);
    if samples.is_empty() { 0.0 } else { median(&mut samples[warm_up..]) }
}

/// [`bench`] of work that is recorded, and then submitted; with what each side takes apart.
pub fn bench_recorded(
    group: &mut BenchmarkGroup<'_, WallTime>,
    target: &Target,
    work: &Work,
    mut encode: impl FnMut(&mut wgpu::CommandEncoder),
) {
    let calls = work.calls.max(1) as f64;
    let seconds = measure(group, target, work, |n| submitted(&target.device, n, &mut encode));
    if seconds > 0.0 {
        let mut samples: Vec<_> = (0..SAMPLES).map(|_| apart(&target.device, &mut encode)).collect();
        let host = median(&mut samples.iter().map(|apart| apart.host / calls).collect::<Vec<_>>());
        let device = samples.iter_mut().map(|apart| apart.device.map(|device| device / calls)).collect();
        let device = Option::<Vec<_>>::map(device, |mut device| median(&mut device));
        Work { apart: Some(Apart { device, host }), ..work.clone() }.report(target, seconds);
    }
}

/// One submission between two timestamps.
fn apart(device: &Device, encode: &mut impl FnMut(&mut wgpu::CommandEncoder)) -> Apart {
    let (gpu, queue) = device.wgpu().expect("a GPU");
    let start = Instant::now();
    let mut encoder = gpu.create_command_encoder(&Default::default());
    encode(&mut encoder);
    let work = encoder.finish();
    let host = start.elapsed().as_secs_f64();
    if !gpu.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
        queue.submit([work]);
        return Apart { device: None, host };
    }
    let buffer = |usage| {
        gpu.create_buffer(&wgpu::BufferDescriptor { label: None, size: 16, usage, mapped_at_creation: false })
    };
    let times = gpu.create_query_set(&wgpu::QuerySetDescriptor {
        label: None,
        ty: wgpu::QueryType::Timestamp,
        count: 2,
    });
    let resolved = buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC);
    let read = buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
    let mut encoders = [(); 2].map(|()| gpu.create_command_encoder(&Default::default()));
    for (i, encoder) in (0..).zip(&mut encoders) {
        let timestamp_writes = Some(wgpu::ComputePassTimestampWrites {
            query_set: &times,
            beginning_of_pass_write_index: Some(i),
            end_of_pass_write_index: None,
        });
        drop(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes }));
    }
    let [before, mut after] = encoders;
    after.resolve_query_set(&times, 0..2, &resolved, 0);
    after.copy_buffer_to_buffer(&resolved, 0, &read, 0, 16);
    device.wait().expect("a working device");
    queue.submit([before.finish(), work, after.finish()]);
    read.map_async(wgpu::MapMode::Read, .., |_| ());
    device.wait().expect("a working device");
    let ticks = read.get_mapped_range(..).expect("mapped memory");
    let [start, end] = [0, 8].map(|at| u64::from_le_bytes(ticks[at..at + 8].try_into().expect("8 bytes")));
    let seconds = end.saturating_sub(start) as f64 * f64::from(queue.get_timestamp_period()) * 1e-9;
    Apart { device: Some(seconds), host }
}

pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
