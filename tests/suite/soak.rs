//! What takes long to come about: programs that are killed at any moment, and merges of any shape on every device. A little
//! of it in every run; `scripts/soak.sh` goes on for as long as it is told, by `LORAWELD_SOAK_KILLS` and
//! `LORAWELD_SOAK_SECONDS`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use loraweld::merge::{METHODS, Needs, Options, VERIFIED, method, verify};
use loraweld::{
    Adapter, Calibration, Control, Destination, Device, Dtype, Format, Layer, Matrix, Method, RawMatrix,
    SaveOptions, Truncation, Unnamed,
};

use crate::common::{Random, gpus};

fn asked(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

const MODULES: [&str; 6] = [
    "transformer.transformer_blocks.0.attn.to_q",
    "transformer.transformer_blocks.0.attn.to_k",
    "transformer.transformer_blocks.1.attn.to_q",
    "transformer.transformer_blocks.1.attn.to_k",
    "transformer.transformer_blocks.2.attn.to_q",
    "transformer.transformer_blocks.2.attn.to_k",
];

fn narrow(m: Matrix) -> Matrix<f32> {
    m.map(|v| v as f32)
}

/// Inputs in a folder.
fn inputs(folder: &Path, width: usize) {
    fs::create_dir_all(folder.join("in/model")).unwrap();
    let mut random = Random(17);
    for name in ["a", "b"] {
        let layer = |module: &&str| {
            Layer::new(module, narrow(random.matrix(8, width, 1.0)), narrow(random.matrix(width, 8, 1.0)))
                .unwrap()
        };
        let adapter = Adapter::new(name, Format::Peft, MODULES.iter().map(layer).collect()).unwrap();
        adapter.save(folder.join(format!("in/{name}.safetensors")), &SaveOptions::default()).unwrap();
    }
    let mut file = |name: &str, suffix: &str, rows: usize, modules: &[&str]| {
        let values: Vec<Vec<u8>> = modules
            .iter()
            .map(|_| {
                narrow(random.matrix(rows, width, 1.0)).data().iter().flat_map(|v| v.to_le_bytes()).collect()
            })
            .collect();
        let view = |(module, bytes): (&&str, &'static [u8])| {
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![rows, width], bytes);
            (format!("{}{suffix}", module.strip_prefix("transformer.").unwrap()), view.unwrap())
        };
        // A test's inputs live as long as it does.
        let leaked = values.into_iter().map(|bytes| &*bytes.leak());
        let bytes = safetensors::serialize(modules.iter().zip(leaked).map(view), None).unwrap();
        fs::write(folder.join("in").join(name), bytes).unwrap();
    };
    file("tokens.safetensors", "", 16, &MODULES);
    file("base.safetensors", ".weight", width, &MODULES);
    file("tuned.safetensors", ".weight", width, &MODULES);
    file("model/x-00001-of-00002.safetensors", ".weight", width, &MODULES[..3]);
    file("model/x-00002-of-00002.safetensors", ".weight", width, &MODULES[3..]);
    let place = |(i, module): (usize, &&str)| {
        let name = format!("{}.weight", module.strip_prefix("transformer.").unwrap());
        (name, format!("x-0000{}-of-00002.safetensors", 1 + i / 3).into())
    };
    let map: serde_json::Map<_, _> = MODULES.iter().enumerate().map(place).collect();
    fs::write(
        folder.join("in/model/x.safetensors.index.json"),
        serde_json::json!({ "weight_map": map }).to_string(),
    )
    .unwrap();
}

/// Every command that writes.
const COMMANDS: [&str; 9] = [
    "merge linear in/a.safetensors in/b.safetensors -o out/x --dtype f16 --force",
    "merge ties in/a.safetensors in/b.safetensors --rank 8 -o out/x --force",
    "merge ssr in/a.safetensors in/b.safetensors --calibration none -o out/x --force",
    "resize in/a.safetensors --rank 4 -o out/x --force",
    "convert in/a.safetensors --format kohya --keep-unnamed -o out/x --force",
    "calibrate in/a.safetensors in/b.safetensors --activations in/tokens.safetensors in/tokens.safetensors -o out/x --force",
    "bake in/base.safetensors in/a.safetensors -o out/x --force",
    "bake in/model/x.safetensors.index.json in/a.safetensors -o out/x",
    "extract in/tuned.safetensors in/base.safetensors --rank 4 -o out/x --force",
];

fn program(folder: &Path, line: &str) -> Command {
    let mut command = Command::new(crate::common::program());
    command.current_dir(folder).args(line.split(' ')).args(["--device", "cpu", "-q"]);
    command.env_remove("RUST_LOG").stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Files below a folder, hidden ones as well.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(self::files(&path)),
            false => drop(files.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    files
}

fn is_temporary(path: &Path) -> bool {
    path.iter().any(|part| part.to_string_lossy().starts_with(".x.loraweld-"))
}

/// However a command is stopped, its target is whole, or what it was before; inputs stay; and the next run cleans up.
#[cfg(unix)]
#[test]
fn killed_commands_leave_nothing_half_written() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    inputs(root, 96);
    let before = files(&root.join("in"));
    let out = root.join("out");
    let mut clean = Vec::new();
    for line in COMMANDS {
        fs::create_dir(&out).unwrap();
        let start = Instant::now();
        let output = program(root, line).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        clean.push((files(&out), start.elapsed()));
        fs::remove_dir_all(&out).unwrap();
    }
    let kills = asked("LORAWELD_SOAK_KILLS").unwrap_or(36);
    let mut random = Random(asked("LORAWELD_SOAK_SEED").unwrap_or(1));
    let (mut ended, mut left) = (0, 0);
    for kill in 0..kills {
        let which = kill as usize % COMMANDS.len();
        let (line, (right, time)) = (COMMANDS[which], &clean[which]);
        let signal = ["-KILL", "-INT", "-TERM"][(kill as usize / COMMANDS.len()) % 3];
        let _ = fs::create_dir(&out);
        // A folder is never replaced.
        let old = line.ends_with("--force") && random.uniform() < 0.5;
        let target = out.join("x");
        if target.is_dir() {
            fs::remove_dir_all(&target).unwrap();
        }
        let _ = fs::remove_file(&target);
        if old {
            fs::write(&target, "old").unwrap();
        }
        // What an earlier kill has left stays until a run gets as far as cleaning up.
        let older = files(&out);
        let mut child = program(root, line).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(time.mul_f64(random.uniform() * 1.1));
        let _ = Command::new("kill").args([signal, &child.id().to_string()]).stderr(Stdio::null()).status();
        let status = child.wait().unwrap();
        let case = format!("{line}, {signal}, kill {kill}, {status}");
        ended += u64::from(!status.success());
        let mut now = files(&out);
        let is_new = |path: &&PathBuf| is_temporary(path) && !older.contains_key(*path);
        let temporary = now.keys().filter(is_new).count();
        left += temporary;
        now.retain(|path, _| !is_temporary(path));
        let kept = if old { BTreeMap::from([(target.clone(), b"old".to_vec())]) } else { BTreeMap::new() };
        assert!(now == *right || (!status.success() && now == kept), "{case}: half a file, {:?}", now.keys());
        // It hears signals once it has begun to write, and takes its temporary file away itself.
        assert!(
            signal == "-KILL" || status.code().is_none() || temporary == 0,
            "{case}: left {temporary} files"
        );
        if kill % 10 == 9 || kill + 1 == kills {
            if target.is_dir() {
                fs::remove_dir_all(&target).unwrap();
            }
            let output = program(root, line).output().unwrap();
            assert!(output.status.success(), "{case}: {}", String::from_utf8_lossy(&output.stderr));
            assert!(files(&out) == *right, "{case}: what was left is not gone: {:?}", files(&out).keys());
        }
    }
    assert!(ended * 3 >= kills, "{ended} of {kills} were stopped");
    assert!(files(&root.join("in")) == before, "inputs were changed");
    eprintln!("{kills} kills: {ended} stopped a command, {left} temporary files were left and cleaned");
}

/// Programs that start at once share a folder of compiled pipelines, and one target.
#[test]
fn programs_side_by_side_do_not_disturb_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    inputs(root, 64);
    fs::create_dir(root.join("out")).unwrap();
    let device = if gpus().is_empty() { "cpu" } else { "gpu" };
    let start = |i: usize| {
        let mut command = Command::new(crate::common::program());
        let name = if i < 2 { "same".to_owned() } else { format!("own{i}") };
        let line = format!(
            "merge svd in/a.safetensors in/b.safetensors --rank 5 --force -q -o out/{name} --device {device}"
        );
        command.current_dir(root).args(line.split(' ')).env("LORAWELD_CACHE", root.join("cache"));
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..4).map(start).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let written = files(&root.join("out"));
    assert_eq!(written.len(), 3, "{:?}", written.keys());
    let first = written.values().next();
    assert!(written.values().all(|bytes| Some(bytes) == first), "the merges differ");
}

/// Devices that are open at once, each of which computes: drivers have limits that none of them tells.
#[test]
fn many_devices_at_once_are_right_or_refused() {
    if gpus().is_empty() {
        return;
    }
    let count = asked("LORAWELD_SOAK_DEVICES").unwrap_or(3);
    let mut random = Random(5);
    let adapters = adapters(&mut random);
    let weighted: Vec<_> = adapters.iter().map(|adapter| adapter.at(0.5)).collect();
    let method = method("svd", [("rank".to_owned(), 3.into())].into_iter().collect(), None).unwrap();
    let options = SaveOptions::default();
    let (mut devices, mut refused) = (Vec::new(), 0);
    for i in 0..count {
        let select = loraweld::Select::Gpu;
        let device = match Device::open(&loraweld::DeviceOptions { select, ..Default::default() }) {
            Ok(device) => device,
            Err(error) => {
                assert!(i > 0 && matches!(error, loraweld::Error::Device(_)), "device {i}: {error}");
                refused += 1;
                continue;
            }
        };
        match method.merge_any(&device, &weighted, Control::default()) {
            Ok(merged) => {
                let none = Truncation::default();
                verify(&*method, &weighted, &merged.adapter, none, &options, 6, &Control::default())
                    .unwrap_or_else(|e| panic!("device {i}: {e}"));
            }
            Err(error) => {
                assert!(i > 0 && matches!(error, loraweld::Error::Device(_)), "device {i}: {error}");
                refused += 1;
            }
        }
        devices.push(device);
    }
    eprintln!("{} devices were open at once, {refused} of {count} were refused or failed", devices.len());
}

/// A few adapters with layers in common, of any small shape, rank, scale and type.
fn adapters(random: &mut Random) -> Vec<Adapter> {
    let mut pick = |of: &[usize]| of[(random.uniform() * of.len() as f64) as usize % of.len()];
    const SIZES: [usize; 14] = [1, 2, 3, 7, 8, 16, 17, 31, 33, 64, 65, 97, 128, 130];
    let shapes: Vec<(usize, usize)> = MODULES.iter().map(|_| (pick(&SIZES), pick(&SIZES))).collect();
    let count = pick(&[2, 2, 2, 3, 4]);
    (0..count)
        .map(|i| {
            let mut layers = Vec::new();
            for (k, (module, (input, output))) in MODULES.iter().zip(&shapes).enumerate() {
                if k > 0 && pick(&[0, 1, 1, 1, 1]) == 0 {
                    continue;
                }
                let rank = pick(&[1, 2, 3, 4, 8, 16, 20]);
                let size = [1e-3, 1.0, 1.0, 30.0][pick(&[0, 1, 2, 3])];
                let mut values = Random(pick(&(1..1000).collect::<Vec<_>>()) as u64);
                let (a, b) = (values.matrix(rank, *input, size), values.matrix(*output, rank, 1.0));
                let scale = [1.0, 0.5, -2.0][pick(&[0, 1, 2])];
                layers.push(Layer::new(module, narrow(a), narrow(b)).unwrap().with_scale(scale));
            }
            Adapter::new(format!("adapter {i}"), Format::Peft, layers).unwrap()
        })
        .collect()
}

/// The same merges on every device: right in all tiers, or refused in the same words.
#[test]
fn merges_of_any_shape_are_right_on_every_device() {
    let end = Instant::now() + Duration::from_secs(asked("LORAWELD_SOAK_SECONDS").unwrap_or(0));
    let mut seed = asked("LORAWELD_SOAK_SEED").unwrap_or(1);
    let devices = crate::common::devices();
    let folder = tempfile::tempdir().unwrap();
    let (mut done, mut refused, mut worst) = (0, 0, (0.0, String::new()));
    // Each seed has one method; a few rounds of all in every run.
    let least = seed + METHODS.len() as u64;
    while seed < least || Instant::now() < end {
        let entry = &METHODS[seed as usize % METHODS.len()];
        let mut random = Random(seed);
        let adapters = adapters(&mut random);
        let strengths: Vec<f64> = adapters.iter().map(|_| 4.0 * random.uniform() - 2.0).collect();
        let weighted: Vec<_> = adapters.iter().zip(&strengths).map(|(a, s)| a.at(*s)).collect();
        let calibration =
            matches!(entry.needs, Needs::Calibration { .. }).then(|| calibrated(&adapters, &mut random));
        let rank = [None, Some(1), Some(3), Some(6)][(random.uniform() * 4.0) as usize % 4];
        let truncation = rank.map_or(Truncation::default(), Truncation::rank);
        let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16][(random.uniform() * 3.0) as usize % 3];
        let options =
            SaveOptions { dtype: Some(dtype), unnamed: Unnamed::Keep, overwrite: true, ..Default::default() };
        let mut given = Options::new();
        if entry.needs == Needs::Truncation {
            given.insert("rank".into(), rank.unwrap_or(4).into());
        }
        let method: Box<dyn Method + '_> = match method(entry.name, given, calibration.as_ref()) {
            Ok(method) => method,
            Err(error) => panic!("{}: {error}", entry.name),
        };
        let path = folder.path().join("merged");
        let mut said = Vec::new();
        for case in &devices {
            let name = format!("seed {seed}, {}, {}, {truncation:?}, {dtype}", entry.name, case.name);
            let to = Destination { path: &path, sink: None, options: &options, truncation };
            match method.merge_into(&case.device, &weighted, &to, Control::default()) {
                Ok(_) => {
                    let written = Adapter::open(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
                    let verified =
                        verify(&*method, &weighted, &written, truncation, &options, 6, &Control::default())
                            .unwrap_or_else(|e| panic!("{name}: {e}"));
                    if dtype == Dtype::F32 && verified.worst > worst.0 {
                        worst = (verified.worst, name);
                    }
                    done += 1;
                    said.push(String::new());
                }
                Err(error) => {
                    refused += 1;
                    said.push(error.to_string());
                }
            }
        }
        assert!(
            said.iter().all(|text| text.is_empty() == said[0].is_empty()),
            "seed {seed}, {}: {said:?}",
            entry.name
        );
        seed += 1;
    }
    eprintln!(
        "{done} merges were right and {refused} refused; at most {:.1e} off in f32, bound {VERIFIED:.0e}: {}",
        worst.0, worst.1
    );
    assert!(done > 0);
}

fn calibrated(adapters: &[Adapter], random: &mut Random) -> Calibration {
    let mut calibration = Calibration::new(adapters).unwrap();
    for (task, adapter) in adapters.iter().enumerate() {
        for layer in adapter.layers() {
            let tokens = 1 + (random.uniform() * 40.0) as usize;
            let x = narrow(random.matrix(tokens, layer.input(), 1.0));
            let x = RawMatrix::from_f32(tokens, layer.input(), x.data()).unwrap();
            calibration.accumulate(&Device::cpu(), task, layer.key().as_str(), x).unwrap();
        }
    }
    calibration
}
