//! Every command that writes, with the n-th call to the file system failing, for every n: the right file or an error that
//! names one, never a panic, never anything half-written; inputs stay as they are.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::Call;
use super::faults::{Outcome, with};
use crate::cli::{Failure, Host, run_for};
use crate::io::safetensors_file::{FileDtype, TensorOut, write_safetensors};
use crate::io::write_atomic;
use crate::{Adapter, Device, Format, Layer, Matrix, SaveOptions};

/// With this in the environment, every call fails in every way.
const ALL: &str = "LORAWELD_TEST_ALL_CALLS";

const MODULES: [&str; 3] = ["x.blocks.0.to_q", "x.blocks.0.to_k", "x.blocks.1.to_q"];
const WIDTH: usize = 24;

struct Random(u32);

impl Random {
    fn values(&mut self, n: usize) -> Vec<f32> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (self.0 >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| next()).collect()
    }

    fn matrix(&mut self, rows: usize, cols: usize) -> Matrix<f32> {
        Matrix::new(rows, cols, self.values(rows * cols)).unwrap()
    }
}

/// A folder with inputs, and a place for outputs beside them.
struct World(tempfile::TempDir);

impl World {
    fn new() -> Self {
        let world = Self(tempfile::tempdir().unwrap());
        ["in", "in/model", "out"].iter().for_each(|name| fs::create_dir(world.path(name)).unwrap());
        for (name, seed, rank) in [("a", 1, 2), ("b", 2, 3)] {
            let mut random = Random(seed);
            let layer = |module: &str| {
                Layer::new(module, random.matrix(rank, WIDTH), random.matrix(WIDTH, rank)).unwrap()
            };
            let adapter = Adapter::new(name, Format::Peft, MODULES.map(layer).to_vec()).unwrap();
            adapter.save(world.path(&format!("in/{name}.safetensors")), &SaveOptions::default()).unwrap();
            let tokens = MODULES.map(|module| (module.to_owned(), vec![7, WIDTH]));
            world.tensors(&format!("in/{name}.tokens.safetensors"), &tokens, seed + 10);
        }
        let weight = |module: &str| (format!("{module}.weight"), vec![WIDTH, WIDTH]);
        let weights = MODULES.map(weight);
        world.tensors("in/base.safetensors", &weights, 21);
        world.tensors("in/tuned.safetensors", &weights, 22);
        world.tensors("in/model/x-00001-of-00002.safetensors", &weights[..2], 23);
        world.tensors("in/model/x-00002-of-00002.safetensors", &weights[2..], 24);
        let files = weights.iter().enumerate().map(|(i, (name, _))| {
            (name.clone(), format!("x-0000{}-of-00002.safetensors", if i < 2 { 1 } else { 2 }).into())
        });
        let index = serde_json::json!({ "weight_map": files.collect::<serde_json::Map<_, _>>() });
        fs::write(world.path("in/model/x.safetensors.index.json"), index.to_string()).unwrap();
        fs::write(world.path("in/model/config.json"), "{}").unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn tensors(&self, name: &str, tensors: &[(String, Vec<usize>)], seed: u32) {
        let mut random = Random(seed);
        let tensor = |(name, shape): &(String, Vec<usize>)| {
            let values = random.values(shape.iter().product());
            TensorOut {
                name: name.clone(),
                dtype: FileDtype::F32,
                shape: shape.clone(),
                write: Box::new(move |out| out.write_all(bytemuck::cast_slice(&values))),
            }
        };
        let tensors = tensors.iter().map(tensor).collect();
        write_atomic(&self.path(name), false, &[], |out| write_safetensors(out, &BTreeMap::new(), tensors))
            .unwrap();
    }

    /// Every file below a folder, with what is in it.
    fn files(&self, folder: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.path(folder)];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path.clone());
                    files.insert(path, Vec::new());
                } else {
                    files.insert(path.clone(), fs::read(path).unwrap());
                }
            }
        }
        files
    }

    fn clear(&self) {
        fs::remove_dir_all(self.path("out")).unwrap();
        fs::create_dir(self.path("out")).unwrap();
    }

    fn run(&self, command: &str) -> Result<(), Failure> {
        let host = Arc::new(Host {
            adapters: Vec::new(),
            calibrations: Vec::new(),
            device: |_| Ok(Device::cpu()),
            tell: Box::new(|_| ()),
            cancel: Arc::new(AtomicBool::new(false)),
        });
        let root = self.0.path().to_str().unwrap();
        let word =
            |word: &str| word.replace("in/", &format!("{root}/in/")).replace("out/", &format!("{root}/out/"));
        let args = std::iter::once("loraweld".to_owned()).chain(command.split(' ').map(word));
        run_for(&host, args)
    }
}

/// Every command that writes, with outputs in `out/`.
const COMMANDS: [&str; 11] = [
    "merge linear in/a.safetensors in/b.safetensors:0.5 -o out/x.safetensors --dtype f16",
    "merge ties in/a.safetensors in/b.safetensors --rank 2 -o out/x.safetensors --verify 0",
    "merge svd in/a.safetensors in/b.safetensors --rank 8 --sv-fro 0.9 --verify 0 -o out/x.safetensors",
    "merge ssr in/a.safetensors in/b.safetensors --calibration none -o out/x.safetensors --verify 0",
    "resize in/a.safetensors --rank 1 -o out/x.safetensors --verify 0",
    "convert in/a.safetensors --format kohya --keep-unnamed -o out/x.safetensors",
    "calibrate in/a.safetensors in/b.safetensors --activations in/a.tokens.safetensors in/b.tokens.safetensors -o \
     out/x.safetensors",
    "bake in/base.safetensors in/a.safetensors -o out/x.safetensors",
    "bake in/model/x.safetensors.index.json in/a.safetensors -o out/x",
    "extract in/tuned.safetensors in/base.safetensors --rank 2 -o out/x.safetensors",
    "schedule k-lora --subject in/a.safetensors --style in/b.safetensors -o out/x.json",
];

type Plan = fn(usize, usize, Call) -> Outcome;

fn system(error: i32) -> Outcome {
    Outcome::Fails(io::Error::from_raw_os_error(error))
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EACCES: i32 = 13;

/// Ways to fail at the n-th call, and whether the result must be right all the same.
const FAULTS: [(&str, bool, Plan); 7] = [
    ("an error", false, |call, n, _| if call == n { system(EIO) } else { Outcome::Made }),
    ("errors from there on", false, |call, n, _| if call >= n { system(EIO) } else { Outcome::Made }),
    ("a full disk", false, |call, n, of| match of {
        Call::Write | Call::Size | Call::Create if call >= n => system(ENOSPC),
        _ => Outcome::Made,
    }),
    ("a folder that may not be changed", false, |call, n, of| match of {
        Call::Rename | Call::Remove | Call::Create if call >= n => system(EACCES),
        _ => Outcome::Made,
    }),
    ("no maps and an error", false, |call, n, of| match of {
        Call::Map => system(EIO),
        Call::Read if call >= n => system(EIO),
        _ => Outcome::Made,
    }),
    ("half of it", true, |call, n, of| match of {
        Call::Map => system(EIO),
        _ if call >= n => Outcome::Short,
        _ => Outcome::Made,
    }),
    ("an interruption", true, |call, n, of| match of {
        Call::Map => system(EIO),
        // Where the standard library does not see to it.
        Call::Read | Call::Write if call == n => Outcome::Fails(io::ErrorKind::Interrupted.into()),
        _ => Outcome::Made,
    }),
];

/// What a command leaves without a fault, and how many calls it makes with maps or without.
fn clean(world: &World, command: &str) -> (BTreeMap<PathBuf, Vec<u8>>, usize) {
    world.clear();
    let (result, mapped) = with(world.0.path(), |_, _, _| Outcome::Made, || world.run(command));
    result.unwrap_or_else(|e| panic!("{command}: {}", e.message));
    let files = world.files("out");
    assert!(!files.is_empty(), "{command}");
    world.clear();
    let no_maps = |_, of, _: &Path| if of == Call::Map { system(EIO) } else { Outcome::Made };
    let (result, read) = with(world.0.path(), no_maps, || world.run(command));
    result.unwrap_or_else(|e| panic!("{command}: {}", e.message));
    assert!(world.files("out") == files, "{command}: read and mapped, inputs give different results");
    (files, mapped.max(read))
}

/// Whether what a run left is right: the right files, or what was there before and an error that names a file. What could
/// not be removed may be left as well, if its name says that it is temporary.
fn judge(
    world: &World,
    case: &str,
    result: &Result<(), Failure>,
    right: &BTreeMap<PathBuf, Vec<u8>>,
    old: &BTreeMap<PathBuf, Vec<u8>>,
    may_leave: bool,
) {
    let mut out = world.files("out");
    let temporary = |path: &PathBuf| {
        path.ancestors().any(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(".x")))
    };
    if may_leave {
        out.retain(|path, _| !temporary(path));
    }
    match result {
        Ok(()) => assert!(&out == right, "{case}: a wrong file among {:?}", out.keys()),
        Err(e) => {
            let root = world.0.path().to_str().unwrap();
            assert!(e.message.contains(root), "{case}: names no file: {}", e.message);
            assert!(&out == old, "{case}: leaves {:?}; {}", out.keys(), e.message);
        }
    }
}

#[test]
fn the_nth_call_fails() {
    let world = World::new();
    let inputs = world.files("in");
    for command in COMMANDS {
        let (right, calls) = clean(&world, command);
        assert!((8..400).contains(&calls), "{command}: {calls} calls");
        for (fault, must_succeed, plan) in FAULTS {
            let mut failed = 0;
            // All numbers of a single error; of the others, which differ little, some, unless all are asked for.
            let step = if fault == "an error" || std::env::var_os(ALL).is_some() { 1 } else { 6 };
            for n in (0..calls + 2).step_by(step) {
                let case = format!("{command}: {fault} at call {n} of {calls}");
                world.clear();
                let force = n / step % 2 == 1 && !command.starts_with("bake in/model");
                let target = right.keys().next().unwrap();
                if force {
                    fs::write(target, "old").unwrap();
                }
                let old = world.files("out");
                let line = if force { format!("{command} --force") } else { command.to_owned() };
                let outcome = move |call, of, _: &Path| plan(call, n, of);
                let run = || std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run(&line)));
                let (result, _) = with(world.0.path(), outcome, run);
                let result = result.unwrap_or_else(|_| panic!("{case}: panicked"));
                // What cannot be removed stays.
                let may_leave = !must_succeed && fault != "a full disk" && fault != "no maps and an error";
                judge(&world, &case, &result, &right, &old, may_leave);
                failed += usize::from(result.is_err());
                assert!(!(must_succeed && result.is_err()), "{case}: failed");
            }
            assert!(must_succeed || failed > 0, "{command}: {fault}: nothing failed");
        }
        assert!(world.files("in") == inputs, "{command}: inputs were changed");
    }
}

/// Of a batch, what was done before an error stays, and the next run goes on from there.
#[test]
fn the_nth_call_of_a_batch_fails() {
    let world = World::new();
    let root = world.0.path().to_str().unwrap();
    let jobs = [
        format!(
            "merge linear {root}/in/a.safetensors {root}/in/b.safetensors:0.5 -o {root}/out/x.safetensors --verify 0"
        ),
        format!("resize {root}/in/a.safetensors --rank 1 -o {root}/out/y.safetensors --verify 0"),
    ];
    let lines = jobs.map(|job| serde_json::to_string(&job).unwrap());
    fs::write(world.path("in/jobs.jsonl"), lines.join("\n")).unwrap();
    let inputs = world.files("in");
    let line = "batch in/jobs.jsonl --results out/../results --device cpu";
    let forget = || {
        world.clear();
        drop(fs::remove_dir_all(world.path("results")));
    };
    forget();
    let no_maps = |_, of, _: &Path| if of == Call::Map { system(EIO) } else { Outcome::Made };
    let (result, calls) = with(world.0.path(), no_maps, || world.run(line));
    result.unwrap_or_else(|e| panic!("{}", e.message));
    let right = world.files("out");
    assert_eq!(right.len(), 2);
    for (fault, must_succeed, plan) in FAULTS {
        let mut failed = 0;
        let step = if fault == "an error" || std::env::var_os(ALL).is_some() { 1 } else { 6 };
        for n in (0..calls + 2).step_by(step) {
            let case = format!("{fault} at call {n} of {calls}");
            forget();
            let outcome = move |call, of, _: &Path| plan(call, n, of);
            let run = || std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run(line)));
            let (result, _) = with(world.0.path(), outcome, run);
            match result.unwrap_or_else(|_| panic!("{case}: panicked")) {
                Ok(()) => assert!(world.files("out") == right, "{case}: not what it should be"),
                Err(e) => {
                    failed += 1;
                    assert!(!must_succeed, "{case}: failed: {}", e.message);
                    assert!(e.message.contains(root), "{case}: names no file: {}", e.message);
                    let out = world.files("out");
                    let whole = |(path, bytes): (&PathBuf, &Vec<u8>)| {
                        let name = path.file_name().unwrap().to_string_lossy();
                        name.starts_with('.') || right.get(path) == Some(bytes)
                    };
                    assert!(out.iter().all(whole), "{case}: left {:?}", out.keys());
                }
            }
            // What could not be removed goes when its target is written again.
            world.run(line).unwrap_or_else(|e| panic!("{case}: again: {}", e.message));
            let mut out = world.files("out");
            out.retain(|path, _| !path.file_name().unwrap().to_string_lossy().starts_with('.'));
            assert!(out == right, "{case}: again, not what it should be");
        }
        assert!(must_succeed || failed > 0, "{fault}: nothing failed");
    }
    assert!(world.files("in") == inputs, "inputs were changed");
}

/// A machine that loses its power after a rename has the whole file, or all files of the folder.
#[test]
fn outputs_are_on_disk_before_they_have_their_names() {
    let world = World::new();
    for command in COMMANDS {
        world.clear();
        let calls = Arc::new(Mutex::new(Vec::new()));
        let record = calls.clone();
        let outcome = move |_, of, path: &Path| {
            record.lock().unwrap().push((of, path.to_owned()));
            Outcome::Made
        };
        let (result, _) = with(world.0.path(), outcome, || world.run(command));
        result.unwrap_or_else(|e| panic!("{command}: {}", e.message));
        let (calls, out) = (calls.lock().unwrap(), world.path("out"));
        let named = calls.iter().rposition(|(of, _)| *of == Call::Rename).unwrap();
        let (before, after) = calls.split_at(named);
        let changes = |(of, path): &(Call, PathBuf)| {
            matches!(of, Call::Write | Call::Create) && path.starts_with(&out) && *path != out
        };
        let is_folder = calls[named].1.is_dir();
        let mut left: BTreeMap<&Path, usize> = BTreeMap::new();
        for (i, (_, path)) in before.iter().enumerate().filter(|(_, call)| changes(call)) {
            left.insert(path, i);
        }
        // A file may have been written twice, and then it is the second that counts.
        let last = left.values().copied().max().unwrap();
        left.retain(|_, i| is_folder || *i == last);
        assert!(left.len() > usize::from(is_folder), "{command}: {left:?}");
        let is_synced = |calls: &[(Call, PathBuf)], at: &Path| {
            calls.iter().any(|(of, path)| *of == Call::Sync && path == at)
        };
        for (path, i) in &left {
            assert!(is_synced(&before[*i..], path), "{command}: {} is not on disk", path.display());
            let folder = path.parent().unwrap();
            let is_inside = is_folder && folder != out;
            assert!(!is_inside || is_synced(&before[*i..], folder), "{command}: {}", folder.display());
        }
        assert!(is_synced(after, &out), "{command}: the name is not on disk");
    }
}

#[test]
fn an_input_that_changes_is_an_error() {
    let world = World::new();
    for command in COMMANDS {
        let (right, calls) = clean(&world, command);
        let changed = if command.starts_with("bake in/model") {
            "in/model/x-00001-of-00002.safetensors"
        } else if command.starts_with("bake") {
            "in/base.safetensors"
        } else if command.starts_with("extract") {
            "in/tuned.safetensors"
        } else {
            "in/a.safetensors"
        };
        let (path, whole) = (world.path(changed), fs::read(world.path(changed)).unwrap());
        for cut in [false, true] {
            let mut failed = 0;
            for n in (0..calls).step_by(if std::env::var_os(ALL).is_some() { 1 } else { 3 }) {
                world.clear();
                // What was there a while ago, so that being written to shows.
                let file = fs::File::options().write(true).open(&path).unwrap();
                fs::write(&path, &whole).unwrap();
                file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
                let (at, bytes) = (path.clone(), whole.clone());
                let done = AtomicUsize::new(0);
                let outcome = move |call, of, _: &Path| {
                    if call == n && done.fetch_add(1, Ordering::SeqCst) == 0 {
                        let len = bytes.len();
                        let new = if cut {
                            bytes[..len - 100].to_vec()
                        } else {
                            [&bytes[..len - 100], &[0x3f; 100]].concat()
                        };
                        fs::write(&at, new).unwrap();
                    }
                    // A map that is cut ends the process.
                    if of == Call::Map { system(EIO) } else { Outcome::Made }
                };
                let (result, _) = with(world.0.path(), outcome, || world.run(command));
                let out = world.files("out");
                match result {
                    // It changed before it was opened, or when it was not needed any more.
                    Ok(()) => {
                        let early = || {
                            world.clear();
                            world.run(command).unwrap();
                            world.files("out")
                        };
                        assert!(out == right || out == early(), "{command}: {n}, {cut}: a mixture");
                    }
                    Err(e) => {
                        failed += 1;
                        assert!(e.message.contains(path.to_str().unwrap()), "{command}: {n}: {}", e.message);
                        assert!(out.is_empty(), "{command}: {n}: left {:?}", out.keys());
                    }
                }
            }
            assert!(failed > 0, "{command}: nothing failed");
        }
        fs::write(&path, &whole).unwrap();
    }
}
