//! What was measured: a line for people, and one of JSON in the file that `LORAWELD_BENCH_RESULTS` names.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use serde_json::{Value, json};

use super::{Roofline, Target};

/// Timed calls of a benchmark; the median counts.
const SAMPLES: usize = 10;

/// How long benchmarks run.
pub fn criterion() -> Criterion {
    Criterion::default()
        .without_plots()
        .nresamples(1000)
        .sample_size(SAMPLES)
        .warm_up_time(Duration::from_millis(300))
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
        if let Some(error) = self.error {
            line += &format!(", error {error:.1e}");
        }
        eprintln!("{}: {line}", target.name);
        write(json!({
            "side": "loraweld", "device": target.name, "work": self.work, "shape": self.shape, "variant": self.variant,
            "seconds": seconds, "bytes": self.bytes, "link_bytes": self.link, "flops": flops,
            "bound": bound, "floor_seconds": floor, "error": self.error,
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
    mut timed: impl FnMut(u64) -> Duration,
) {
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
    if !samples.is_empty() {
        let warm_up = samples.len().saturating_sub(SAMPLES);
        work.report(target, median(&mut samples[warm_up..]));
    }
}

pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
