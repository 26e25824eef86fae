//! How time grows with layers, tokens, width, rank, adapters and the order of systems, one after the other.
//!
//! `cargo bench --bench scaling -- accumulate` runs one operation. Hundreds of points are too many for criterion: each is
//! the median of seven timings of 20 ms or more, after a warm-up of .3 s, waited for once. `benches/plot_scaling.py` draws them
//! and fits the exponents. Where there is no hardware GPU, or without `--bench`, only a few small points run.

mod common;

use std::hint::black_box;
use std::time::Duration;

use common::{
    Accumulation, Input, LayerShape, Systems, Target, adapter, kept_busy, median, targets, timed, write,
};
use loraweld::{Adapter, Calibration, Dtype, NpLora, Ssr, Weighted};

const RANK: usize = 32;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let whole = arguments.iter().any(|argument| argument == "--bench");
    let wanted = arguments.iter().find(|argument| !argument.starts_with('-'));
    for target in targets() {
        let curves: [(&str, Curves); 4] =
            [("accumulate", accumulate), ("solve", solve), ("np-lora", np_lora), ("ssr", ssr)];
        for (operation, curve) in curves {
            if wanted.is_none_or(|wanted| operation.contains(wanted.as_str())) {
                curve(&Scale { target: &target, operation, full: whole && target.fast });
            }
        }
    }
}

type Curves = fn(&Scale<'_>);

/// One operation on one device.
struct Scale<'a> {
    target: &'a Target,
    operation: &'static str,
    /// Else a smoke test.
    full: bool,
}

impl Scale<'_> {
    /// `from`, twice as much, ... `to`; of a smoke test the first two.
    fn points(&self, from: usize, to: usize) -> Vec<usize> {
        let all = std::iter::successors(Some(from), |x| Some(2 * x)).take_while(|&x| x <= to);
        all.take(if self.full { usize::MAX } else { 2 }).collect()
    }

    fn sized(&self, full: usize, smoke: usize) -> usize {
        if self.full { full } else { smoke }
    }

    /// One point: `work` takes a number of repetitions and gives their time; `model` is what theory counts.
    fn point(&self, over: &str, fixed: &str, x: usize, model: f64, mut work: impl FnMut(u64) -> Duration) {
        let (warm_up, sample, samples) = if self.full { (0.3, 0.02, 7) } else { (0.0, 0.0, 1) };
        let mut once = work(1).as_secs_f64();
        let mut spent = once;
        while spent < warm_up {
            once = work(1).as_secs_f64();
            spent += once;
        }
        let times = ((sample / once).ceil() as u64).clamp(1, 1000);
        let mut seconds: Vec<f64> = (0..samples).map(|_| work(times).as_secs_f64() / times as f64).collect();
        let seconds = median(&mut seconds);
        let Self { target, operation, .. } = self;
        eprintln!("{}: {operation}, {over} {x} ({fixed}): {:.4} ms", target.name, seconds * 1e3);
        write(serde_json::json!({
            "side": "loraweld", "device": target.name, "work": "scaling", "operation": operation, "over": over,
            "fixed": fixed, "x": x, "seconds": seconds, "model": model,
        }));
    }
}

/// Operations of `layers` accumulations.
fn products(layers: usize, tokens: usize, width: usize, rank: usize) -> f64 {
    (layers * tokens * rank * (2 * width + rank + 1)) as f64
}

fn accumulate(scale: &Scale<'_>) {
    let (tokens, width, rank) = (scale.sized(4608, 64), scale.sized(3072, 128), scale.sized(128, 32));
    let point = |over: &str, fixed: &str, x, layers, tokens, width, rank| {
        let inputs = Input::many(scale.target, Dtype::Bf16, tokens, width);
        let mut work = Accumulation::new(scale.target, &inputs, layers, rank);
        let model = products(layers, tokens, width, rank);
        scale.point(over, fixed, x, model, |n| kept_busy(&scale.target.device, n, || work.run()));
    };
    for layers in scale.points(1, 256) {
        point(
            "layers",
            &format!("{width} wide, rank {rank}, {tokens} tokens"),
            layers,
            layers,
            tokens,
            width,
            rank,
        );
    }
    for tokens in scale.points(512, 262_144) {
        point("tokens", &format!("{width} wide, rank {rank}"), tokens, 1, tokens, width, rank);
    }
    for width in scale.points(384, 49152) {
        point("width", &format!("8 layers, rank {rank}, {tokens} tokens"), width, 8, tokens, width, rank);
    }
    for rank in scale.points(16, 512) {
        point("rank", &format!("8 layers, {width} wide, {tokens} tokens"), rank, 8, tokens, width, rank);
    }
    // Each adapter brings its own inputs, and its rows to the statistics of all.
    for adapters in scale.points(1, 16) {
        let fixed = format!("{width} wide, rank {RANK}, {tokens} tokens each");
        point("adapters", &fixed, adapters, adapters, tokens, width, RANK * adapters);
    }
}

fn solve(scale: &Scale<'_>) {
    let point = |over: &str, fixed: &str, x, count: usize, order: usize| {
        let systems = Systems::new(scale.target, count, order);
        let model = (count * order.pow(3)) as f64;
        scale.point(over, fixed, x, model, |n| {
            kept_busy(&scale.target.device, n, || drop(black_box(systems.solve())))
        });
    };
    let (count, order) = (scale.sized(128, 2), scale.sized(128, 16));
    for layers in scale.points(8, 8192) {
        point("layers", &format!("order {order}"), layers, layers, order);
    }
    for order in scale.points(16, 512) {
        point("order", &format!("{count} systems"), order, count, order);
    }
}

/// Square layers of one width.
fn layers(count: usize, width: usize) -> Vec<LayerShape> {
    (0..count).map(|i| (format!("bench.{i}.layer"), width, width)).collect()
}

fn adapters(count: usize, shapes: &[LayerShape], rank: usize) -> Vec<Adapter> {
    (0..count as u64).map(|seed| adapter(&format!("adapter {seed}"), shapes, rank, 1 + seed)).collect()
}

fn at_one(adapters: &[Adapter]) -> Vec<Weighted<'_>> {
    adapters.iter().map(|adapter| adapter.at(1.0)).collect()
}

/// Whole merges, from factors on the host to factors on the host.
fn np_lora(scale: &Scale<'_>) {
    let (count, width, rank) = (scale.sized(64, 2), scale.sized(3072, 64), scale.sized(RANK, 4));
    let point = |over: &str, fixed: &str, x, count, width, rank| {
        let pair = adapters(2, &layers(count, width), rank);
        let pair = at_one(&pair);
        let model = (count * width * rank * rank) as f64;
        scale.point(over, fixed, x, model, |n| {
            timed(n, || {
                let merged = NpLora::hard().merge(&scale.target.device, pair[0], &pair[1..]);
                drop(black_box(merged.expect("a merge")));
            })
        });
    };
    for count in scale.points(4, 1024) {
        point("layers", &format!("{width} wide, rank {rank}"), count, count, width, rank);
    }
    for width in scale.points(384, 24576) {
        point("width", &format!("{count} layers, rank {rank}"), width, count, width, rank);
    }
    for rank in scale.points(4, 64) {
        point("rank", &format!("{count} layers, {width} wide"), rank, count, width, rank);
    }
}

/// Whole merges from statistics, as [`np_lora`].
fn ssr(scale: &Scale<'_>) {
    let (count, width, rank) = (scale.sized(64, 2), scale.sized(3072, 64), scale.sized(RANK, 4));
    let point = |over: &str, fixed: &str, x, count, width, rank, members: usize| {
        let shapes = layers(count, width);
        let adapters = adapters(members, &shapes, rank);
        let input = Input::new(&scale.target.device, Dtype::Bf16, 256, width, 1);
        let mut calibration = Calibration::new(&adapters).expect("adapters of one model");
        for task in 0..members {
            for (layer, ..) in &shapes {
                calibration.accumulate(&scale.target.device, task, layer, input.view()).expect("accumulate");
            }
        }
        calibration.flush().expect("finite sums");
        let model = (count * width * (members * rank).pow(2)) as f64;
        scale.point(over, fixed, x, model, |n| {
            timed(n, || {
                let merged = Ssr::new(&calibration).merge(&scale.target.device, &at_one(&adapters));
                drop(black_box(merged.expect("a merge")));
            })
        });
    };
    for count in scale.points(4, 1024) {
        point("layers", &format!("2 adapters, {width} wide, rank {rank}"), count, count, width, rank, 2);
    }
    for width in scale.points(384, 24576) {
        point("width", &format!("{count} layers, 2 adapters, rank {rank}"), width, count, width, rank, 2);
    }
    // Statistics are of each adapter, and as large as all ranks together.
    let count = scale.sized(16, 2);
    for members in scale.points(2, 16) {
        let fixed = format!("{count} layers, {width} wide, rank {rank}");
        point("adapters", &fixed, members, count, width, rank, members);
    }
}
