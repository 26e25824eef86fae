//! Calibration: statistics against the references, additivity, slicing, files and their faults.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::common::fixtures::{POOL, Tensors, activations, adapter, calibrated, data, pool, stored};
use crate::common::{Case, devices, relative};
use loraweld::compute::ops::Activations;
use loraweld::{
    Adapter, Calibration, Control, Device, DeviceOptions, Dtype, Error, Matrix, Precision, RawMatrix, Select,
    Source,
};

/// Statistics in f64 or double-single, or f32.
fn tolerance(case: &Case, wide: f64, auto: f64) -> f64 {
    match case.device.is_gpu() && case.device.precision() == Precision::Auto {
        true => auto,
        false => wide,
    }
}

/// The largest relative difference of any Gram matrix; token counts must be equal.
fn difference(x: &Calibration, y: &Calibration) -> f64 {
    assert_eq!(x.layers().collect::<Vec<_>>(), y.layers().collect::<Vec<_>>());
    let mut worst = 0f64;
    for key in x.layers() {
        assert_eq!(x.ranks(key), y.ranks(key));
        for task in 0..x.pool().len() {
            assert_eq!(x.tokens(key, task), y.tokens(key, task));
            match (x.gram(key, task).unwrap(), y.gram(key, task).unwrap()) {
                (Some(x), Some(y)) => worst = worst.max(relative(&x, &y)),
                (x, y) => assert!(x.is_none() && y.is_none()),
            }
        }
        assert_eq!(x.neutral_tokens(key), y.neutral_tokens(key));
        if let (Some(x), Some(y)) = (x.neutral_gram(key).unwrap(), y.neutral_gram(key).unwrap()) {
            worst = worst.max(relative(&x, &y));
        }
    }
    worst
}

#[test]
fn statistics_are_those_of_the_reference() {
    let adapters = pool();
    for set in ["traj4", "step1"] {
        let reference = Tensors::open(data(&format!("reference/ssr_{set}_f64.safetensors")));
        for case in devices() {
            let calibration = calibrated(&case.device, &adapters, set, &POOL);
            let mut worst = 0f64;
            assert_eq!(calibration.layers().count(), 24);
            for layer in adapters[0].layers() {
                let ranks = calibration.ranks(layer.key());
                assert_eq!(ranks, [8, 16, 4, 8]);
                let (mut g, mut q) = (Matrix::zeros(36, 36), Matrix::zeros(36, 36));
                let (mut start, mut tokens) = (0, 0);
                for (task, rank) in ranks.iter().enumerate() {
                    let gram = calibration.gram(layer.key(), task).unwrap().unwrap();
                    tokens += calibration.tokens(layer.key(), task);
                    for i in 0..36 {
                        for j in 0..36 {
                            assert_eq!(gram[(i, j)], gram[(j, i)]);
                            g[(i, j)] += gram[(i, j)];
                            if (start..start + rank).contains(&i) {
                                q[(i, j)] = gram[(i, j)];
                            }
                        }
                    }
                    start += rank;
                }
                let get = |name: &str| reference.get(&format!("{}.{name}", layer.module()));
                assert_eq!(tokens as f64, get("count")[(0, 0)]);
                worst = worst.max(relative(&g, &get("G"))).max(relative(&q, &get("Q")));
            }
            println!("{set}, {}: {worst:.1e}", case.name);
            // f64 differs by the order of sums alone; f32 by a few roundings.
            assert!(worst <= tolerance(&case, 1e-9, 1e-5), "{set}, {}: {worst:e}", case.name);
        }
    }
}

/// Rows `rows` of every stored tensor of a task, with the layers that read it.
fn accumulate_rows(
    calibration: &mut Calibration,
    device: &Device,
    task: usize,
    rows: std::ops::Range<usize>,
) {
    let file = Tensors::open(activations("traj4", POOL[task]));
    for layer in pool()[0].layers() {
        let x = file.get(&stored(layer.module()));
        // bf16 widened to f32 is exact.
        let values: Vec<f32> = x.data().iter().map(|&v| v as f32).collect();
        let x = RawMatrix::from_f32(x.rows(), x.cols(), &values).unwrap().row_range(rows.start, rows.end);
        calibration.accumulate(device, task, layer.module(), x).unwrap();
    }
}

#[test]
fn batches_in_any_order_add_up() {
    let adapters = pool();
    for case in devices() {
        let whole = calibrated(&case.device, &adapters, "traj4", &POOL);
        let (mut first, mut second) =
            (Calibration::new(&adapters).unwrap(), Calibration::new(&adapters).unwrap());
        for task in [2, 0, 3, 1] {
            accumulate_rows(&mut first, &case.device, task, 101..192);
            accumulate_rows(&mut first, &case.device, task, 0..64);
            accumulate_rows(&mut second, &case.device, task, 64..101);
        }
        first.add(&second).unwrap();
        let worst = difference(&first, &whole);
        println!("{}: {worst:.1e}", case.name);
        // f64 and double-single by the order of sums alone; f32 by a few roundings.
        assert!(worst <= tolerance(&case, 1e-10, 1e-6), "{}: {worst:e}", case.name);
    }
}

#[test]
fn layers_in_one_call_are_those_apart() {
    let adapters = pool();
    let file = Tensors::open(activations("step1", POOL[1]));
    let values: Vec<(String, Matrix<f32>)> = adapters[0]
        .layers()
        .iter()
        .map(|layer| {
            let x = file.get(&stored(layer.module()));
            (layer.module().to_owned(), Matrix::from_fn(x.rows(), x.cols(), |i, j| x[(i, j)] as f32))
        })
        .collect();
    let views: Vec<(&str, Activations<'_>)> = values
        .iter()
        .map(|(name, x)| (name.as_str(), RawMatrix::from_f32(x.rows(), x.cols(), x.data()).unwrap().into()))
        .collect();
    for case in devices() {
        let (mut together, mut apart) =
            (Calibration::new(&adapters).unwrap(), Calibration::new(&adapters).unwrap());
        together.accumulate_all(&case.device, Source::Task(1), &views).unwrap();
        for (name, x) in &views {
            apart.accumulate(&case.device, 1, name, *x).unwrap();
        }
        let worst = difference(&together, &apart);
        // f64 and double-single by the order of sums alone; f32 by a few roundings.
        assert!(worst <= tolerance(&case, 1e-10, 1e-6), "{}: {worst:e}", case.name);

        // One that is refused keeps the others out.
        let narrow = RawMatrix::from_f32(1, 1, &[1.0]).unwrap();
        let refused = [views[0], (views[1].0, narrow.into())];
        let error = together.accumulate_all(&case.device, Source::Task(1), &refused).unwrap_err();
        assert!(error.to_string().contains("width 1"), "{error}");
        if let Some((gpu, _)) = case.device.wgpu() {
            let buffer = gpu.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: 4096,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            });
            let (dtype, width) = (Dtype::F32, values[1].1.cols());
            let between = Activations::Buffer { buffer: &buffer, offset: 2, dtype, tokens: 1, width };
            let refused = [views[0], (views[1].0, between)];
            let error = together.accumulate_all(&case.device, Source::Task(1), &refused).unwrap_err();
            assert!(error.to_string().contains("multiple of 4"), "{error}");
        }
        let again = difference(&together, &apart);
        assert_eq!(worst, again, "{}: something was added", case.name);
    }
}

#[test]
fn calibrations_of_another_order_or_pool() {
    let device = Device::cpu();
    let adapters = pool();
    let whole = calibrated(&device, &adapters, "step1", &POOL);
    let turned: Vec<Adapter> = adapters.iter().rev().cloned().collect();
    let names: Vec<&str> = POOL.iter().rev().copied().collect();
    let mut sum = calibrated(&device, &adapters, "step1", &POOL[..1]);
    let mut rest = Calibration::new(&turned).unwrap();
    for (task, name) in names.iter().enumerate().take(3) {
        let path = activations("step1", name);
        rest.accumulate_file(&device, Source::Task(task), &path, &Control::default()).unwrap();
    }
    sum.add(&rest).unwrap();
    // The same products of the same rows; blocks lie elsewhere in the matrix.
    assert!(difference(&sum, &whole) <= 1e-12);
    let mut other = adapters.clone();
    other[1] = adapter("content_heart");
    let error = sum.add(&Calibration::new(&other).unwrap()).unwrap_err().to_string();
    assert!(error.contains("concept_c7_rot90"), "{error}");
    assert!(sum.add(&Calibration::new(&adapters[..2]).unwrap()).is_err());
}

#[test]
fn a_subset_is_a_calibration_without_the_others() {
    let device = Device::cpu();
    let adapters = pool();
    let whole = calibrated(&device, &adapters, "traj4", &POOL);
    let subset = whole.subset(&[3, 0, 1]).unwrap();
    let fewer = [adapters[3].clone(), adapters[0].clone(), adapters[1].clone()];
    let direct = calibrated(&device, &fewer, "traj4", &[POOL[3], POOL[0], POOL[1]]);
    assert_eq!(subset.pool(), direct.pool());
    // The same products, blocked in another way.
    assert!(difference(&subset, &direct) <= 1e-9);
    assert!(whole.subset(&[]).is_err() && whole.subset(&[4]).is_err());
    let two = whole.select(&[&adapters[2], &adapters[0]]).unwrap();
    assert_eq!(two, [2, 0]);
}

#[test]
fn sums_that_do_not_fit_are_moved_to_the_host() {
    let adapters = pool();
    for case in devices() {
        // Room for one layer or two at a time.
        let memory = Some(800_000);
        let (precision, select) =
            (case.device.precision(), if case.device.is_gpu() { Select::Gpu } else { Select::Cpu });
        if case.name != "CPU" && case.name != "auto, f64" {
            continue;
        }
        let little =
            Device::open(&DeviceOptions { select, precision, memory, ..Default::default() }).unwrap();
        let (x, y) = (
            calibrated(&little, &adapters, "traj4", &POOL),
            calibrated(&case.device, &adapters, "traj4", &POOL),
        );
        // Windows of other lengths round f32 in other places.
        let worst = difference(&x, &y);
        assert!(worst <= tolerance(&case, 1e-12, 1e-6), "{}: {worst:e}", case.name);
    }
}

#[test]
fn devices_can_change_between_batches() {
    let adapters = pool();
    let whole = calibrated(&Device::cpu(), &adapters, "traj4", &POOL);
    let mut mixed = Calibration::new(&adapters).unwrap();
    let cases = devices();
    for (i, rows) in [0..64, 64..128, 128..192].into_iter().enumerate() {
        for task in 0..4 {
            accumulate_rows(&mut mixed, &cases[i % cases.len()].device, task, rows.clone());
        }
    }
    // Some of it was f32 if a GPU took part.
    assert!(difference(&mixed, &whole) <= 1e-5);
}

#[test]
fn files_keep_everything() {
    let device = Device::cpu();
    let adapters = pool();
    let mut calibration = calibrated(&device, &adapters, "traj4", &POOL[..3]);
    let neutral = activations("step1", POOL[1]);
    calibration.accumulate_file(&device, Source::Neutral, &neutral, &Control::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pool.safetensors");
    calibration.save(&path, false).unwrap();
    assert!(calibration.save(&path, false).unwrap_err().to_string().contains("exists"));
    let mut read = Calibration::open(&path).unwrap();
    assert_eq!(read.pool(), calibration.pool());
    assert_eq!(difference(&read, &calibration), 0.0);
    assert_eq!(read.missing().len(), 24);
    let again = folder.path().join("again.safetensors");
    read.save(&again, false).unwrap();
    assert!(std::fs::read(&path).unwrap() == std::fs::read(&again).unwrap());

    let x = [0f32; 128];
    let x = RawMatrix::from_f32(1, 128, &x).unwrap();
    let error = read.accumulate(&device, 0, "transformer_blocks.0.attn.to_q", x).unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error}");
    // But adding goes on.
    read.add(&calibrated(&device, &adapters, "traj4", &POOL[..3])).unwrap();
    assert_eq!(read.tokens(read.layers().next().unwrap(), 0), 384);
    // An input is not overwritten, even by force.
    let copy = folder.path().join("lora.safetensors");
    std::fs::copy(data("loras/concept_c3_mirror.safetensors"), &copy).unwrap();
    let calibration = Calibration::new(&[Adapter::open(&copy).unwrap(), adapters[1].clone()]).unwrap();
    assert!(calibration.save(&copy, true).is_err());
}

/// A safetensors file of f32 tensors.
fn write(path: &Path, metadata: &[(&str, &str)], tensors: &[(&str, Vec<usize>, Vec<f32>)]) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(.., values)| values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        let dtype = safetensors::Dtype::F32;
        (*name, safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
    });
    let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    // The crate spoils the header of a file with metadata and no tensors.
    let metadata = Some(metadata).filter(|_| !tensors.is_empty());
    std::fs::write(path, safetensors::serialize(views, metadata).unwrap()).unwrap();
}

/// What accumulating these tensors as activations of task 0 says.
fn accumulated(metadata: &[(&str, &str)], tensors: &[(&str, Vec<usize>, Vec<f32>)]) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shard.safetensors");
    write(&path, metadata, tensors);
    let mut calibration = Calibration::new(&pool()).unwrap();
    let result = calibration.accumulate_path(&Device::cpu(), Source::Task(0), &path, &Control::default());
    result.map(drop).map_err(|error| error.to_string())
}

#[test]
fn faulty_activations_are_refused() {
    let q = "transformer_blocks.0.attn.to_q";
    let good = vec![0.5f32; 256];
    assert_eq!(accumulated(&[], &[(q, vec![2, 128], good.clone())]), Ok(()));
    assert_eq!(
        accumulated(&[], &[("lora_unet_transformer_blocks_0_attn_to_q", vec![2, 128], good.clone())]),
        Ok(())
    );
    let mut holes = good.clone();
    holes[130] = f32::NAN;
    for (metadata, tensors, words) in [
        (vec![], vec![(q, vec![4, 64], good.clone())], ["64", "128"]),
        (vec![], vec![(q, vec![2, 2, 64], good.clone())], ["[2, 2, 64]", "tokens"]),
        (vec![], vec![(q, vec![0, 128], vec![])], ["no tokens", "[0, 128]"]),
        (vec![], vec![(q, vec![2, 128], holes)], ["row 1, column 2", "NaN"]),
        (vec![], vec![("transformer_blocks.0.attn.to_z", vec![2, 128], good.clone())], ["to_z", "attn_to_q"]),
        (vec![], vec![], ["no activations", "shard"]),
        (vec![("alias", "[1]")], vec![(q, vec![2, 128], good.clone())], ["alias", "JSON"]),
        (
            vec![("alias", r#"{"transformer_blocks.0.attn.to_q": "transformer_blocks.0.attn.to_k"}"#)],
            vec![(q, vec![2, 128], good.clone())],
            ["alias", "to_k"],
        ),
    ] {
        let error = accumulated(&metadata, &tensors).unwrap_err();
        assert!(error.contains("shard.safetensors"), "{error}");
        for word in words {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
    }
}

#[test]
fn faulty_batches_are_refused() {
    let device = Device::cpu();
    let mut calibration = Calibration::new(&pool()).unwrap();
    let values = vec![0.5f32; 256];
    let x = |rows, cols| RawMatrix::from_f32(rows, cols, &values[..rows * cols]).unwrap();
    let q = "transformer_blocks.0.attn.to_q";
    for (result, word) in [
        (calibration.accumulate(&device, 0, "transformer_blocks.0.attn.to_y", x(2, 128)), "attn_to_q"),
        (calibration.accumulate(&device, 0, q, x(2, 64)), "64"),
        (calibration.accumulate(&device, 0, q, x(0, 128)), "tokens"),
        (calibration.accumulate(&device, 4, q, x(2, 128)), "no task 4"),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
    assert!(Calibration::new([]).is_err());
}

#[test]
fn sums_that_overflow_are_reported() {
    let adapters = pool();
    let huge = vec![3e38f32; 128];
    for case in devices() {
        let mut calibration = Calibration::new(&adapters).unwrap();
        let x = RawMatrix::from_f32(1, 128, &huge).unwrap();
        calibration.accumulate(&case.device, 0, "transformer_blocks.0.attn.to_q", x).unwrap();
        match calibration.flush() {
            // f64 holds their squares.
            Ok(()) => {
                assert!(!case.device.is_gpu() || case.device.precision() == Precision::F64, "{}", case.name)
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("overflow") && text.contains("concept_c3_mirror"), "{text}");
                assert!(calibration.flush().is_err(), "a later reader has to learn it as well");
            }
        }
    }
}

#[test]
fn folders_of_shards_are_read_in_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (q, o) = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0");
    let rows = |n: usize| (0..n * 128).map(|i| (i % 7) as f32 - 3.0).collect::<Vec<_>>();
    let alias = r#"{"transformer_blocks.0.attn.to_k": "transformer_blocks.0.attn.to_q"}"#;
    write(&folder.path().join("1.safetensors"), &[("alias", alias)], &[(q, vec![3, 128], rows(3))]);
    write(
        &folder.path().join("2.safetensors"),
        &[],
        &[(o, vec![2, 128], rows(2)), ("x.y", vec![1, 1], vec![0.0])],
    );
    std::fs::write(folder.path().join("notes.txt"), "not a shard").unwrap();
    let mut calibration = Calibration::new(&pool()).unwrap();
    let device = Device::cpu();
    let control = Control::default();
    let summary = calibration.accumulate_path(&device, Source::Task(1), folder.path(), &control).unwrap();
    assert_eq!((summary.layers.len(), summary.tokens, summary.unknown), (3, 5, vec!["x.y".to_owned()]));
    let tokens: BTreeMap<&str, u64> = calibration
        .layers()
        .map(|key| (key.as_str(), calibration.tokens(key, 1)))
        .filter(|(_, n)| *n > 0)
        .collect();
    let want = [("attn_to_k", 3), ("attn_to_out_0", 2), ("attn_to_q", 3)];
    assert!(
        tokens.iter().zip(want).all(|((key, n), (end, want))| key.ends_with(end) && *n == want),
        "{tokens:?}"
    );
    let empty = tempfile::tempdir().unwrap();
    let error = calibration.accumulate_path(&device, Source::Neutral, empty.path(), &control).unwrap_err();
    assert!(error.to_string().contains("*.safetensors"), "{error}");
}

/// A saved calibration with something replaced in its header, byte for byte as long.
fn damaged(from: &str, to: &str) -> String {
    assert_eq!(from.len(), to.len());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.safetensors");
    let calibration = calibrated(&Device::cpu(), &pool()[..2], "step1", &POOL[..2]);
    calibration.save(&path, false).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).expect(from);
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    std::fs::write(&path, bytes).unwrap();
    Calibration::open(&path).unwrap_err().to_string()
}

#[test]
fn damaged_files_are_refused() {
    for (from, to, word) in [
        (r#""loraweld.kind":"calibration""#, r#""loraweld.kind":"calibrations"#, "safetensors"),
        (r#""loraweld.kind":"calibration""#, r#""loraweld.kind":"conjugation""#, "not a calibration"),
        (r#""loraweld.version":"1""#, r#""loraweld.version":"2""#, "version"),
        (r#"\"a_sha256\""#, r#"\"b_sha256\""#, "a_sha256"),
        (r#"\"tokens\":64"#, r#"\"tokens\":0 "#, "no tokens"),
        (r#"\"rows\":[8,24]"#, r#"\"rows\":[9,24]"#, "row"),
        (r#""shape":[24,24]"#, r#""shape":[12,48]"#, "[12, 48]"),
        (r#"to_q.gram.0""#, r#"to_q.gram.9""#, "to_q.gram"),
    ] {
        let error = damaged(from, to);
        assert!(error.contains("damaged.safetensors") && error.contains(word), "{from}: {error}");
    }
    // Numbers.
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("numbers.safetensors");
    calibrated(&Device::cpu(), &pool()[..2], "step1", &POOL[..2]).save(&path, false).unwrap();
    let good = std::fs::read(&path).unwrap();
    for (value, word) in [(f64::NAN, "NaN"), (1e30, "symmetric")] {
        let mut bytes = good.clone();
        // The last row's first number.
        let at = bytes.len() - 24 * 8;
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let error = Calibration::open(&path).unwrap_err().to_string();
        assert!(error.contains("gram.") && error.contains(word), "{error}");
    }
}
