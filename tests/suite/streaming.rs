//! Merging into a file while it is computed: the file that saving writes, or none.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{devices, gpus};
use loraweld::compute::{DeviceOptions, Select};
use loraweld::merge::Rule;
use loraweld::{
    Adapter, Control, CoreMerge, Destination, Device, Dtype, EntryMerge, Error, Format, Layer, Linear,
    Matrix, Method, NpLora, Progress, Report, Result, SaveOptions, Spectrum, Ssr, SvdMerge, Ties, Truncation,
    Tsv, Unnamed, Weighted,
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

fn fixture(name: &str) -> Adapter {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/loras");
    Adapter::open(folder.join(format!("{name}.safetensors"))).unwrap()
}

fn methods() -> Vec<(&'static str, Box<dyn Method>)> {
    vec![
        ("linear", Box::new(Linear)),
        ("svd", Box::new(SvdMerge::new(Truncation::rank(7)))),
        ("np-lora", Box::new(NpLora::soft(0.5))),
        ("ssr", Box::new(Ssr::data_free())),
        ("knots", Box::new(CoreMerge::knots(Rule::Ties(Ties::default())))),
        ("tsv", Box::new(CoreMerge::tsv(Tsv::default()))),
        ("ties", Box::new(EntryMerge::ties(Ties::default()).rank(5))),
        ("ties of the paper", Box::new(EntryMerge::ties(Ties::paper()).rank(5))),
        ("knots of peft", Box::new(CoreMerge::knots(Rule::Ties(Ties::peft())))),
    ]
}

/// What becomes of it in memory, saved.
fn saved(
    method: &dyn Method,
    device: &Device,
    adapters: &[Weighted<'_>],
    to: &Destination<'_>,
) -> Result<Report> {
    let control = Control::default();
    let merged = method.merge_any(device, adapters, control)?;
    let merged = match to.truncation.is_none() {
        true => merged,
        false => merged.truncated_for(to.options, device, &to.truncation, &control)?,
    };
    merged.adapter.save(to.path, to.options)?;
    Ok(merged.report)
}

fn names(folder: &TempDir) -> Vec<PathBuf> {
    fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Both ways, in every variant of one method; the layers' ranks, cuts and actions are the same as well.
fn check(name: &str, method: &dyn Method, device: &Device, adapters: &[Weighted<'_>]) {
    let folder = TempDir::new().unwrap();
    let none = Truncation::default();
    let spectrum = Truncation::spectrum(Spectrum::Frobenius(0.9));
    for (truncation, format, dtype) in [
        (none, None, Dtype::F32),
        (none, Some(Format::Kohya), Dtype::Bf16),
        (none, Some(Format::Comfyui), Dtype::F16),
        (Truncation::rank(9), None, Dtype::Bf16),
        (spectrum, Some(Format::Kohya), Dtype::F32),
    ] {
        // Sums are not rounded before they are truncated here.
        if name == "linear" && !truncation.is_none() || name == "svd" && !truncation.is_none() {
            continue;
        }
        let metadata = [("note".to_owned(), "kept".to_owned())].into();
        let options = SaveOptions {
            dtype: Some(dtype),
            format,
            unnamed: Unnamed::Keep,
            overwrite: true,
            metadata,
            ..Default::default()
        };
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        let to = |path| Destination { path, sink: None, options: &options, truncation };
        let case = format!("{name}, {truncation:?}, {format:?}, {dtype}, {}", device.describe());
        let direct = method.merge_into(device, adapters, &to(&one), Control::default());
        match (direct, saved(method, device, adapters, &to(&other))) {
            (Ok(x), Ok(y)) => {
                assert!(fs::read(&one).unwrap() == fs::read(&other).unwrap(), "{case}: files differ");
                let of = |r: &Report| {
                    let layer = |l: &loraweld::LayerReport| {
                        format!("{} {} {:?} {:?}", l.layer, l.rank, l.cut, l.action)
                    };
                    // Only what is written to a file is known to keep names that have no other there.
                    let notes = r.notes.iter().filter(|note| !note.contains("keep their names"));
                    (
                        r.layers.iter().map(layer).collect::<Vec<_>>(),
                        notes.cloned().collect::<std::collections::BTreeSet<_>>(),
                    )
                };
                assert_eq!(of(&x), of(&y), "{case}");
                assert_eq!(names(&folder).len(), 2, "{case}");
            }
            (Err(x), Err(y)) => assert_eq!(x.to_string().replace("one", "other"), y.to_string(), "{case}"),
            (x, y) => panic!("{case}: {x:?} but {y:?}"),
        }
    }
}

#[test]
fn the_file_is_what_saving_writes() {
    let adapters = [fixture("concept_c3_mirror"), fixture("concept_c1_thick.kohya")];
    let weighted = [adapters[0].at(1.0), adapters[1].at(-0.7)];
    for (name, method) in methods() {
        check(name, &*method, &Device::cpu(), &weighted);
        // Its own metadata, and layers as they are.
        check(name, &*method, &Device::cpu(), &[adapters[1].at(0.5), adapters[1].at(0.0)]);
    }
}

#[test]
fn the_file_is_what_saving_writes_on_a_gpu() {
    let adapters = [fixture("concept_c3_mirror"), fixture("style_shade")];
    let weighted = [adapters[0].at(1.0), adapters[1].at(0.8)];
    for (tier, names) in
        [("auto, f64", &["svd", "np-lora", "ssr"][..]), ("auto, sums on the host", &["np-lora"])]
    {
        for case in gpus().into_iter().filter(|case| case.name == tier) {
            for (name, method) in methods().into_iter().filter(|(name, _)| names.contains(name)) {
                check(name, &*method, &case.device, &weighted);
            }
        }
    }
}

fn matrix(rows: usize, cols: usize, seed: u64) -> Matrix<f32> {
    let mut state = seed;
    Matrix::from_fn(rows, cols, |_, _| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    })
}

/// Layers of which some are singular, some of low rank, some alone: q, k and v are fused in the model's own spelling.
fn flux(seed: u64, alone: bool) -> Adapter {
    let mut layers = Vec::new();
    let module = |name: &str| format!("transformer.{name}");
    for block in 0..2 {
        for (i, part) in
            ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"].into_iter().enumerate()
        {
            let mut b = matrix(3072, 2, seed + i as u64);
            if part == "to_k" {
                // One column is enough.
                b.data_mut().chunks_exact_mut(2).for_each(|row| row[1] = 0.0);
            }
            let name = module(&format!("transformer_blocks.{block}.attn.{part}"));
            layers.push(Layer::new(&name, matrix(2, 3072, 7 * seed), b).unwrap());
        }
    }
    if alone {
        let name = module("single_transformer_blocks.0.proj_out");
        layers.push(Layer::new(&name, matrix(3, 15360, seed), matrix(3072, 3, seed)).unwrap());
    }
    Adapter::new("made", Format::Peft, layers).unwrap()
}

#[test]
fn fused_modules_and_lower_ranks_find_their_places() {
    let (x, y) = (flux(1, true), flux(2, false));
    for (name, method) in
        methods().into_iter().filter(|(name, _)| ["linear", "np-lora", "tsv"].contains(name))
    {
        check(name, &*method, &Device::cpu(), &[x.at(1.0), y.at(0.5)]);
        // The sum has only half of the rank that the plan allows it.
        check(name, &*method, &Device::cpu(), &[x.at(1.0), x.at(0.5)]);
    }
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("out");
    let options = SaveOptions::default();
    let to = Destination { path: &path, sink: None, options: &options, truncation: Truncation::rank(4) };
    let report = Linear
        .merge_into(&Device::cpu(), &[x.at(1.0), x.at(0.5), x.at(0.1)], &to, Control::default())
        .unwrap();
    let ranks: Vec<_> = report.layers.iter().map(|layer| layer.rank).collect();
    let merged = Adapter::open(&path).unwrap();
    assert_eq!(merged.layers().iter().map(|layer| layer.rank()).collect::<Vec<_>>(), ranks);
    assert!(ranks.contains(&1) && ranks.contains(&2) && ranks.contains(&3), "{ranks:?}");
}

#[test]
fn a_sum_is_truncated_as_svd_does_it() {
    let adapters = [fixture("concept_c3_mirror"), fixture("style_shade")];
    let weighted = [adapters[0].at(1.0), adapters[1].at(0.8)];
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("out");
    let truncation = Truncation::rank(6);
    for case in devices() {
        let options = SaveOptions { overwrite: true, ..Default::default() };
        let to = Destination { path: &path, sink: None, options: &options, truncation };
        let report = Linear.merge_into(&case.device, &weighted, &to, Control::default()).unwrap();
        let svd = SvdMerge::new(truncation).merge(&case.device, &weighted).unwrap();
        let merged = Adapter::open(&path).unwrap();
        for ((x, y), report) in merged.layers().iter().zip(svd.adapter.layers()).zip(&report.layers) {
            assert_eq!(
                (x.a().bytes(), x.b().bytes()),
                (y.a().bytes(), y.b().bytes()),
                "{}: {}",
                case.name,
                x.name()
            );
            assert!(report.rank <= 6 && report.cut.is_some_and(|cut| cut > 0.0 && cut < 1.0));
        }
        assert_eq!(merged.metadata()["loraweld.method"], "linear");
    }
}

#[test]
fn nothing_is_left_of_a_merge_that_ends_early() {
    let adapters = [fixture("concept_c3_mirror"), fixture("style_shade")];
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("out");
    fn merge(
        path: &Path,
        adapters: &[Weighted<'_>],
        options: &SaveOptions,
        control: Control<'_>,
    ) -> Result<Report> {
        let to = Destination { path, sink: None, options, truncation: Truncation::default() };
        NpLora::soft(0.5).merge_into(&Device::cpu(), adapters, &to, control)
    }
    let run = |adapters: &[Weighted<'_>], options| merge(&path, adapters, options, Control::default());
    let at = |strength| [adapters[0].at(1.0), adapters[1].at(strength)];
    for when in [0, 1, 12, 24] {
        let cancel = AtomicBool::new(false);
        let stop = |p: Progress<'_>| cancel.store(p.done >= when, Ordering::Relaxed);
        let control = Control { progress: Some(&stop), cancel: Some(&cancel) };
        let error = merge(&path, &at(1.0), &SaveOptions::default(), control).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{when}: {error}");
        assert!(names(&folder).is_empty(), "{when}: {:?}", names(&folder));
    }
    // Saving is cancelled as well.
    let cancel = AtomicBool::new(true);
    let control = Control { progress: None, cancel: Some(&cancel) };
    let error = adapters[0].save_with(&path, &SaveOptions::default(), control).unwrap_err();
    assert!(matches!(error, Error::Cancelled) && names(&folder).is_empty(), "{error}");

    let half = SaveOptions { dtype: Some(Dtype::F16), ..Default::default() };
    let error = run(&at(1e9), &half).unwrap_err().to_string();
    assert!(error.contains("too large for f16") && names(&folder).is_empty(), "{error}");
    fs::write(&path, "precious").unwrap();
    assert!(run(&at(1.0), &half).is_err());
    let force = SaveOptions { overwrite: true, ..half.clone() };
    assert!(run(&at(1e9), &force).is_err());
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    run(&at(1.0), &force).unwrap();
    assert_eq!(names(&folder), std::slice::from_ref(&path));
    assert!(Adapter::open(&path).is_ok());
}

/// The hash of a file of some size is found while it is written, in the order of the file; where a rank is lower than was
/// planned, the file is written again.
#[test]
fn the_hash_of_a_large_file_is_that_of_its_tensors() {
    let adapter = |seed: u64| {
        // As in the model: the later of two comes first in the order of names.
        let name = |i: usize| match i % 2 {
            0 => (format!("transformer.transformer_blocks.{}.attn.to_out.0", i / 2), 3072),
            _ => (format!("transformer.single_transformer_blocks.{}.proj_out", i / 2), 15360),
        };
        let layer = |i: usize| {
            let (seed, (name, width)) = (seed + i as u64, name(i));
            Layer::new(&name, matrix(4, width, seed), matrix(3072, 4, 100 + seed)).unwrap()
        };
        Adapter::new("made", Format::Peft, (0..24).map(layer).collect()).unwrap()
    };
    let (x, y) = (adapter(1), adapter(50));
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("out");
    let options = SaveOptions {
        format: Some(Format::Kohya),
        dtype: Some(Dtype::F32),
        overwrite: true,
        ..Default::default()
    };
    let half = Truncation::spectrum(Spectrum::Frobenius(0.999));
    for (rank, other, truncation) in [(8, &y, Truncation::default()), (4, &x, half)] {
        let to = Destination { path: &path, sink: None, options: &options, truncation };
        let adapters = [x.at(1.0), other.at(0.5)];
        let report = Linear.merge_into(&Device::cpu(), &adapters, &to, Control::default()).unwrap();
        assert!(report.layers.iter().all(|layer| layer.rank == rank), "{:?}", report.layers[0]);
        let file = fs::read(&path).unwrap();
        let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        assert!(file.len() - header > 4 << 20, "the hash of so few bytes is found at the end");
        let metadata: serde_json::Value = serde_json::from_slice(&file[8..header]).unwrap();
        let want: String = Sha256::digest(&file[header..]).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(metadata["__metadata__"]["sshs_model_hash"], want, "rank {rank}");
    }
}

#[test]
fn the_budget_changes_no_byte() {
    let adapters = [fixture("concept_c3_mirror"), fixture("style_shade")];
    let weighted = [adapters[0].at(1.0), adapters[1].at(0.8)];
    if gpus().is_empty() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let files: Vec<Vec<u8>> = [None, Some(1 << 20), Some(256 << 10)]
        .into_iter()
        .map(|memory| {
            let device =
                Device::open(&DeviceOptions { select: Select::Gpu, memory, ..Default::default() }).unwrap();
            let path = folder.path().join("out");
            let options = SaveOptions { overwrite: true, ..Default::default() };
            let to =
                Destination { path: &path, sink: None, options: &options, truncation: Truncation::rank(10) };
            NpLora::soft(0.5).merge_into(&device, &weighted, &to, Control::default()).unwrap();
            fs::read(&path).unwrap()
        })
        .collect();
    assert!(files.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn compiled_pipelines_are_kept() {
    if gpus().is_empty() {
        return;
    }
    let adapters = [fixture("concept_c3_mirror"), fixture("style_shade")];
    let folder = TempDir::new().unwrap();
    let caches = folder.path().join("caches");
    let merged = || {
        let select = Select::Gpu;
        let options = DeviceOptions { select, pipeline_cache: Some(caches.clone()), ..Default::default() };
        let device = Device::open(&options).unwrap();
        let merged = CoreMerge::tsv(Tsv::default())
            .merge(&device, &[adapters[0].at(1.0), adapters[1].at(1.0)])
            .unwrap();
        merged.adapter.layers().iter().map(|layer| layer.a().bytes().to_vec()).collect::<Vec<_>>()
    };
    let first = merged();
    let Some(file) = fs::read_dir(&caches).ok().and_then(|mut files| files.next()).map(|f| f.unwrap().path())
    else {
        // The driver has none.
        return;
    };
    let whole = fs::read(&file).unwrap();
    assert!(merged() == first);
    for damaged in
        [&whole[..whole.len() / 2], b"", b"no cache at all, but some text that is longer than a hash"]
    {
        fs::write(&file, damaged).unwrap();
        assert!(merged() == first);
        assert!(fs::read(&file).unwrap() != damaged, "a damaged cache is replaced");
    }
    assert_eq!(fs::read_dir(&caches).unwrap().count(), 1);
}

#[test]
fn svd_keeps_what_both_its_own_rank_and_the_files_allow() {
    let adapters = [fixture("concept_c3_mirror"), fixture("style_shade")];
    let weighted = [adapters[0].at(1.0), adapters[1].at(-0.7)];
    let folder = TempDir::new().unwrap();
    let options = SaveOptions { overwrite: true, ..Default::default() };
    let fro = |rank| Truncation { rank, spectrum: Some(Spectrum::Frobenius(0.9)) };
    for (own, asked, most) in [
        (Truncation::rank(4), Truncation::rank(9), 4),
        (Truncation::rank(9), Truncation::rank(4), 4),
        (Truncation::rank(3), fro(None), 3),
        (fro(None), Truncation::rank(3), 3),
        (fro(Some(5)), Truncation::spectrum(Spectrum::Ratio(1.5)), 5),
    ] {
        let svd = SvdMerge::new(own);
        let path = folder.path().join("out");
        let to = Destination { path: &path, sink: None, options: &options, truncation: asked };
        let direct = svd.merge_into(&Device::cpu(), &weighted, &to, Control::default()).unwrap();
        let merged = svd.merge(&Device::cpu(), &weighted).unwrap();
        let merged = merged.truncated(&Device::cpu(), &asked, &Control::default()).unwrap();
        let ranks = |report: &Report| report.layers.iter().map(|layer| layer.rank).collect::<Vec<_>>();
        assert_eq!(ranks(&direct), ranks(&merged.report), "{own:?}, {asked:?}");
        assert!(ranks(&direct).iter().all(|rank| *rank <= most), "{own:?}, {asked:?}: {:?}", ranks(&direct));
        // Nothing that either would cut off is left, and the file says so.
        let alone = ranks(&svd.merge(&Device::cpu(), &weighted).unwrap().report);
        assert!(ranks(&direct).iter().zip(&alone).all(|(both, own)| both <= own), "{own:?}, {asked:?}");
        let record =
            |metadata: &std::collections::BTreeMap<String, String>| metadata["loraweld.truncation"].clone();
        let read = Adapter::open(&path).unwrap();
        assert_eq!(record(read.metadata()), record(merged.adapter.metadata()));
        let rank = own.rank.into_iter().chain(asked.rank).min().map_or("null".to_owned(), |n| n.to_string());
        assert!(record(read.metadata()).starts_with(&format!("{{\"rank\":{rank},")), "{:?}", read.metadata());
    }
}
