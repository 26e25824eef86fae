//! Whole merges in factor space of two adapters shaped like FLUX.1's (304 layers, rank 32, bf16), from memory-mapped files
//! to factors on the host, on every adapter present. Software adapters and the CPU take a tenth of the blocks.
//!
//! `cargo bench --bench merge -- np-lora` runs one method. `benches/pytorch/merge.py` times PyTorch on the same shapes.

mod common;

use std::hint::black_box;
use std::time::Duration;

use common::{devices, flux};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use loraweld::compute::Batch;
use loraweld::compute::ops::{self, ScaledRows, Side};
use loraweld::{
    Adapter, CoreMerge, Dare, Device, EntryMerge, Layer, Linear, Matrix, NpLora, RawMatrix, Rule, SvdMerge,
    Ties, Truncation, Weighted,
};

/// V of every layer, as np-lora finds it, from host factors; it stays on the device.
fn projectors(device: &Device, layers: &[Layer]) {
    let rows = |side: Side, factor: fn(&Layer) -> RawMatrix<'_>| {
        let stacks: Vec<Vec<RawMatrix<'_>>> = layers.iter().map(|layer| vec![factor(layer)]).collect();
        ScaledRows::new(device, side, &stacks).expect("rows")
    };
    let b = ops::qr_l(device, &rows(Side::Output, Layer::b)).expect("a QR");
    let a = ops::qr(device, &rows(Side::Input, Layer::a)).expect("a QR");
    let core = |(b, a): (&Matrix, &Matrix)| {
        Matrix::from_fn(b.cols, a.cols, |i, j| (0..b.rows).map(|k| b[(k, i)] * a[(k, j)]).sum())
    };
    let cores: Vec<Matrix> = b.iter().zip(&a.l).map(core).collect();
    let svds = ops::jacobi_svd(device, &cores).expect("an SVD");
    let right: Vec<Matrix> = svds.into_iter().map(|svd| svd.right).collect();
    let right = Batch::upload(device, device.sum(), &right).expect("an upload");
    black_box(ops::rank_update(device, None, &right, &a.q).expect("a product"));
    device.wait().expect("a device");
}

fn bench_flux(c: &mut Criterion) {
    let mut group = c.benchmark_group("flux");
    for (name, device, fast) in devices() {
        let share = if fast { 1.0 } else { 0.1 };
        let folder = tempfile::tempdir().expect("a folder");
        let adapters: Vec<Adapter> =
            (0..2).map(|k| flux(&folder.path().join(format!("{k}.safetensors")), 32, share, k)).collect();
        let pair: Vec<Weighted<'_>> = adapters.iter().map(|adapter| adapter.at(1.0)).collect();
        let layers = adapters[0].layers();
        let mut bench = |method: &str, merge: &dyn Fn()| {
            let id = BenchmarkId::new(format!("{name}/{method}"), format!("{} layers", layers.len()));
            group.bench_function(id, |b| b.iter(merge));
        };
        bench("projectors", &|| projectors(&device, layers));
        bench("np-lora", &|| {
            drop(black_box(NpLora::hard().merge(&device, pair[0], &pair[1..]).expect("a merge")))
        });
        bench("linear", &|| drop(black_box(Linear.merge(&pair).expect("a merge"))));
        bench("svd", &|| {
            let svd = SvdMerge::new(Truncation::rank(32));
            drop(black_box(svd.merge(&device, &pair).expect("a merge")));
        });
        bench("tsv", &|| drop(black_box(CoreMerge::tsv().merge(&device, &pair).expect("a merge"))));
        bench("knots", &|| {
            let knots = CoreMerge::knots(Rule::Ties(Ties::default()));
            drop(black_box(knots.merge(&device, &pair).expect("a merge")));
        });
        if fast {
            let (ties, dare) = (EntryMerge::ties(Ties::default()), EntryMerge::dare(Dare::default()));
            bench("ties", &|| drop(black_box(ties.merge(&device, &pair).expect("a merge"))));
            bench("dare", &|| drop(black_box(dare.merge(&device, &pair).expect("a merge"))));
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    targets = bench_flux
}
criterion_main!(benches);
