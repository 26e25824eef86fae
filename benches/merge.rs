//! Whole merges in factor space of two adapters of FLUX.1's shapes (304 layers, rank 32, bf16), from memory-mapped files to
//! factors on the host; and NP-LoRA's projectors alone, from host factors and from factors on the device. Where there is
//! no hardware GPU, the software adapter and the CPU merge two small blocks.
//!
//! `cargo bench --bench merge -- np-lora` runs one method. `benches/pytorch/merge.py` times PyTorch on the same shapes.

mod common;

use std::hint::black_box;

use common::{
    LayerShape, Rate, Target, Work, adapter_file, bench, criterion, flux_layers, targets, timed, widths,
};
use criterion::{Criterion, criterion_group, criterion_main};
use loraweld::compute::Batch;
use loraweld::compute::ops::{self, ScaledRows, Side};
use loraweld::{
    Adapter, CoreMerge, Dare, Device, EntryMerge, Layer, Linear, Matrix, NpLora, RawMatrix, Rule, SvdMerge,
    Ties, Truncation, Tsv, Weighted,
};
use rayon::prelude::*;

const RANK: usize = 32;

/// A and B of every layer, on the device.
fn upload(device: &Device, layers: &[Layer]) -> [ScaledRows; 2] {
    let rows = |side: Side, factor: fn(&Layer) -> RawMatrix<'_>| {
        let stacks: Vec<Vec<RawMatrix<'_>>> = layers.iter().map(|layer| vec![factor(layer)]).collect();
        ScaledRows::new(device, side, &stacks).expect("rows")
    };
    [rows(Side::Input, Layer::a), rows(Side::Output, Layer::b)]
}

/// L_Bᵀ·L_A, row by row.
fn core(b: &Matrix, a: &Matrix) -> Matrix {
    let mut core = Matrix::zeros(b.cols(), a.cols());
    for k in 0..b.rows() {
        for (row, b) in core.data_mut().chunks_exact_mut(a.cols()).zip(b.row(k)) {
            row.iter_mut().zip(a.row(k)).for_each(|(sum, a)| *sum += b * a);
        }
    }
    core
}

/// V of every layer, as np-lora finds it; it stays on the device.
fn projectors(device: &Device, [a, b]: &[ScaledRows; 2]) {
    let (b, a) = (ops::qr_l(device, b).expect("a QR"), ops::qr(device, a).expect("a QR"));
    let cores: Vec<Matrix> = b.par_iter().zip(&a.l).map(|(b, a)| core(b, a)).collect();
    let svds = ops::jacobi_svd(device, &cores).expect("an SVD");
    let right: Vec<Matrix> = svds.into_iter().map(|svd| svd.right).collect();
    let right = Batch::upload(device, device.sum(), &right).expect("an upload");
    black_box(ops::rank_update(device, None, &right, &a.q).expect("a product"));
    device.wait().expect("a device");
}

fn bench_projectors(c: &mut Criterion) {
    let mut group = c.benchmark_group("projectors");
    for target in targets() {
        let (shapes, folder) = (flux_layers(&target), tempfile::tempdir().expect("a folder"));
        let style = adapter_file(folder.path(), &shapes, RANK, 1);
        let (device, (inputs, outputs)) = (&target.device, widths(&shapes));
        let rank = RANK as f64;
        let products = rank * ((rank + 1.0) * (inputs + outputs) + 4.0 * rank * inputs);
        let resident = Work {
            work: "projectors",
            shape: format!("{} layers r{RANK}", shapes.len()),
            variant: "factors on the device".to_owned(),
            // A and B are read, V is written.
            bytes: 4.0 * rank * (2.0 * inputs + outputs),
            flops: vec![(Rate::F32, products)],
            calls: 1,
            ..Default::default()
        };
        let factors = upload(device, style.layers());
        bench(&mut group, &target, &resident, |n| timed(n, || projectors(device, &factors)));
        drop(factors);
        let uploaded = Work {
            variant: "factors on the host".to_owned(),
            link: 2.0 * rank * (inputs + outputs),
            ..resident
        };
        bench(&mut group, &target, &uploaded, |n| {
            timed(n, || projectors(device, &upload(device, style.layers())))
        });
    }
    group.finish();
}

/// Two adapters go up in bf16, and the factors of the result come back in f32.
fn whole(layers: &[LayerShape], method: &str) -> Work {
    let (inputs, outputs) = widths(layers);
    Work {
        work: "merge",
        shape: format!("{} layers r{RANK}", layers.len()),
        variant: method.to_owned(),
        link: 2.0 * RANK as f64 * (2.0 + 4.0) * (inputs + outputs),
        calls: 1,
        ..Default::default()
    }
}

fn bench_merges(c: &mut Criterion) {
    let mut group = c.benchmark_group("merge");
    for target in targets() {
        let (shapes, folder) = (flux_layers(&target), tempfile::tempdir().expect("a folder"));
        let adapters: Vec<Adapter> =
            (1..=2).map(|seed| adapter_file(folder.path(), &shapes, RANK, seed)).collect();
        let pair: Vec<Weighted<'_>> = adapters.iter().map(|adapter| adapter.at(1.0)).collect();
        let Target { device, .. } = &target;
        let mut bench = |method: &str, merge: &dyn Fn()| {
            bench(&mut group, &target, &whole(&shapes, method), |n| timed(n, merge));
        };
        bench("np-lora", &|| {
            drop(black_box(NpLora::hard().merge(device, pair[0], &pair[1..]).expect("a merge")))
        });
        bench("linear", &|| drop(black_box(Linear.merge(&pair).expect("a merge"))));
        bench("svd", &|| {
            let svd = SvdMerge::new(Truncation::rank(RANK));
            drop(black_box(svd.merge(device, &pair).expect("a merge")));
        });
        bench("tsv", &|| {
            drop(black_box(CoreMerge::tsv(Tsv::default()).merge(device, &pair).expect("a merge")))
        });
        bench("knots", &|| {
            let knots = CoreMerge::knots(Rule::Ties(Ties::default()));
            drop(black_box(knots.merge(device, &pair).expect("a merge")));
        });
        if !target.fast {
            // Entry by entry, whole updates take minutes here.
            continue;
        }
        let (ties, dare) = (EntryMerge::ties(Ties::default()), EntryMerge::dare(Dare::default()));
        bench("ties", &|| drop(black_box(ties.merge(device, &pair).expect("a merge"))));
        bench("dare", &|| drop(black_box(dare.merge(device, &pair).expect("a merge"))));
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = criterion();
    targets = bench_projectors, bench_merges
}
criterion_main!(benches);
