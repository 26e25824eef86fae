//! The command line as users meet it: what it prints, where, with which exit code, and which files it leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use assert_cmd::cargo::cargo_bin;
use loraweld::{Adapter, Format, Layer, Matrix, SaveOptions};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const CONCEPTS: [&str; 4] =
    ["concept_c3_mirror", "concept_c7_rot90", "concept_c1_thick", "concept_c4_invert"];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn lora(name: &str) -> PathBuf {
    data("loras").join(format!("{name}.safetensors"))
}

fn activations(name: &str) -> PathBuf {
    data("activations/step1").join(format!("{name}.safetensors"))
}

fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().expect("paths in tests are UTF-8").to_owned()
}

fn command() -> Command {
    let mut command = Command::new(cargo_bin!("loraweld"));
    command.env_remove("RUST_LOG").env_remove("WGPU_ADAPTER_NAME").env_remove("WGPU_BACKEND");
    command
}

/// A folder to work in, and the runs in it.
struct Sandbox {
    dir: TempDir,
    device: &'static str,
}

impl Sandbox {
    fn new() -> Self {
        Self { dir: TempDir::new().expect("a temporary folder"), device: "cpu" }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let entries =
            fs::read_dir(self.dir.path()).expect("the folder").map(|entry| entry.expect("it").path());
        entries.map(|path| (path.clone(), fs::read(&path).unwrap_or_default())).collect()
    }

    fn run<A: AsRef<std::ffi::OsStr>>(&self, args: &[A]) -> Output {
        let mut command = command();
        let output = command.current_dir(self.dir.path()).args(args).args(["--device", self.device]).output();
        let output = output.expect("the program starts");
        for stream in [&output.stdout, &output.stderr] {
            assert!(!stream.contains(&0x1b), "colours, though this is no terminal");
        }
        output
    }

    /// Runs, and gives stdout and stderr.
    fn succeeds<A: AsRef<std::ffi::OsStr>>(&self, args: &[A]) -> (String, String) {
        let output = self.run(args);
        let (stdout, stderr) = streams(&output);
        let shown: Vec<_> = args.iter().map(AsRef::as_ref).collect();
        assert!(output.status.success(), "{shown:?}: {}\n{stdout}\n{stderr}", output.status);
        (stdout, stderr)
    }

    /// Runs with `--json`, and gives the events.
    fn events(&self, args: &[String]) -> Vec<Value> {
        let (stdout, _) = self.succeeds(&[args, &["--json".to_owned()]].concat());
        parse(&stdout)
    }

    /// Fails with this code, names every culprit, and leaves the folder as it was.
    fn fails(&self, code: i32, args: &[String], culprits: &[&str]) {
        let before = self.files();
        let output = self.run(&[args, &["--json".to_owned()]].concat());
        let (stdout, stderr) = streams(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}\n{stdout}\n{stderr}");
        assert!(stderr.contains("error: "), "{args:?}: {stderr}");
        for culprit in culprits {
            assert!(stderr.contains(culprit), "{args:?}: `{culprit}` is not in: {stderr}");
        }
        let events = parse(&stdout);
        let error = events.iter().find(|event| event["event"] == "error");
        let message = error.and_then(|e| e["message"].as_str()).expect("an error event");
        assert!(!message.is_empty());
        let names = |files: &BTreeMap<PathBuf, _>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&before), names(&self.files()), "{args:?} left files behind");
        assert!(before == self.files(), "{args:?} changed a file");
    }

    /// Writes an adapter or activations, made of another file's.
    fn edited(&self, name: &str, from: &Path, edit: impl FnOnce(&mut File)) -> String {
        let mut file = File::read(from);
        edit(&mut file);
        fs::write(self.path(name), file.bytes()).expect("the folder is writable");
        text(self.path(name))
    }

    /// A calibration of these adapters.
    fn calibrated(&self, name: &str, adapters: &[&str]) -> String {
        self.succeeds(&calibrate(adapters, "step1", &text(self.path(name))));
        text(self.path(name))
    }
}

fn streams(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("output is UTF-8");
    (text(&output.stdout), text(&output.stderr))
}

fn parse(stdout: &str) -> Vec<Value> {
    let events = stdout.lines().map(|line| serde_json::from_str::<Value>(line).expect(line));
    let events: Vec<_> = events.collect();
    assert!(events.iter().all(|event| event["event"].is_string()), "{stdout}");
    events
}

fn event<'a>(events: &'a [Value], name: &str) -> &'a Value {
    let found = events.iter().rfind(|event| event["event"] == name);
    found.unwrap_or_else(|| panic!("no `{name}` in {events:#?}"))
}

fn args(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

fn calibrate(adapters: &[&str], recorded: &str, output: &str) -> Vec<String> {
    let mut args = args(&["calibrate"]);
    args.extend(adapters.iter().map(|name| text(lora(name))));
    args.push("--activations".into());
    let folder = data("activations").join(recorded);
    args.extend(adapters.iter().map(|name| text(folder.join(format!("{name}.safetensors")))));
    args.extend(["-o".into(), output.into()]);
    args
}

fn merge(adapters: &[String], calibration: &str, more: &[&str]) -> Vec<String> {
    let mut all = args(&["merge", "ssr"]);
    all.extend(adapters.iter().cloned());
    all.extend(args(&["--calibration", calibration]));
    all.extend(args(more));
    all
}

fn loras(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| text(lora(name))).collect()
}

/// A safetensors file, taken apart.
struct File {
    metadata: Value,
    tensors: Vec<(String, String, Vec<usize>, Vec<u8>)>,
}

impl File {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let header: Map<String, Value> = serde_json::from_slice(&bytes[8..start]).expect("a JSON header");
        let mut file = Self { metadata: Value::Null, tensors: Vec::new() };
        for (name, info) in header {
            if name == "__metadata__" {
                file.metadata = info;
                continue;
            }
            let number = |v: &Value| v.as_u64().expect("a number") as usize;
            let numbers = |v: &Value| v.as_array().expect("a list").iter().map(number).collect::<Vec<_>>();
            let range = numbers(&info["data_offsets"]);
            let dtype = info["dtype"].as_str().expect("a type").to_owned();
            let data = bytes[start + range[0]..start + range[1]].to_vec();
            file.tensors.push((name, dtype, numbers(&info["shape"]), data));
        }
        file
    }

    fn bytes(&self) -> Vec<u8> {
        let mut header = Map::from_iter([("__metadata__".to_owned(), self.metadata.clone())]);
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in &self.tensors {
            let range = [data.len(), data.len() + bytes.len()];
            header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": range }));
            data.extend(bytes);
        }
        let header = serde_json::to_vec(&header).expect("JSON");
        [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
    }

    fn tensor(&mut self, end: &str) -> &mut (String, String, Vec<usize>, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0.ends_with(end)).unwrap_or_else(|| panic!("no tensor {end}"))
    }

    fn sizes(&self) -> BTreeSet<String> {
        self.tensors.iter().map(|t| t.1.clone()).collect()
    }
}

const TO_Q: &str = "transformer_blocks.0.attn.to_q";

/// Every command once, and whatever holds on every device.
fn every_command(device: &'static str) {
    let sandbox = Sandbox { device, ..Sandbox::new() };
    let path = |name| text(sandbox.path(name));

    for (output, recorded) in [("one", "step1"), ("again", "step1"), ("more", "traj4")] {
        let events = sandbox.events(&calibrate(&CONCEPTS, recorded, &path(output)));
        assert_eq!(event(&events, "result")["layers"], 24, "{events:#?}");
        let used = event(&events, "device")["device"].as_str().expect("a device").to_owned();
        assert_eq!(used.starts_with("CPU"), device == "cpu", "{used}");
    }
    let read = |name| fs::read(sandbox.path(name)).expect("it was written");
    assert!(read("one") == read("again"), "two calibrations differ");

    sandbox.succeeds(&["calibration", "add", "one", "more", "-o", "sum"]);
    let events = sandbox.events(&args(&["calibration", "show", "sum"]));
    let shown = event(&events, "calibration");
    assert_eq!(shown["adapters"].as_array().map(Vec::len), Some(4));
    assert_eq!(shown["adapters"][0]["name"], "concept_c3_mirror");
    assert_eq!(shown["layers"][0]["tokens"], json!([256, 256, 256, 256]), "64 and 192 tokens");
    let (stdout, _) = sandbox.succeeds(&["calibration", "show", "sum"]);
    assert!(stdout.contains("concept_c7_rot90") && stdout.contains("36"), "{stdout}");

    let four = loras(&CONCEPTS);
    for output in ["merged", "merged-again"] {
        let events =
            sandbox.events(&merge(&four, "more", &["-o", output, "--report", &format!("{output}.json")]));
        let result = event(&events, "result");
        assert_eq!(result["report"]["layers"].as_array().map(Vec::len), Some(24));
        let losses = &result["report"]["losses"];
        let loss = |name: &str| losses[name].as_f64().expect("a loss");
        assert!(loss("merged") < 0.6 && loss("merged") < loss("average"), "{losses}");
        assert!(loss("average") < loss("sum"), "{losses}");
    }
    assert!(read("merged") == read("merged-again"), "two merges differ");
    let report: Value = serde_json::from_slice(&read("merged.json")).expect("a JSON report");
    assert_eq!(report["inputs"].as_array().map(Vec::len), Some(4));
    assert_eq!(report["output"]["dtype"], "f32");

    let mixed = [four[0].clone(), format!("{}:-0.5", four[1]), text(lora("concept_c1_thick.kohya"))];
    let (stdout, _) =
        sandbox.succeeds(&merge(&mixed, "one", &["-o", "f16", "--dtype", "f16", "--format", "kohya"]));
    assert!(stdout.contains("loss") && stdout.contains("f16, kohya"), "{stdout}");
    let file = File::read(&sandbox.path("f16"));
    assert_eq!(file.sizes(), BTreeSet::from(["F16".to_owned()]));
    assert!(file.tensors.iter().all(|t| t.0.starts_with("lora_")), "kohya's spelling");

    let (_, stderr) = sandbox.succeeds(&merge(&four, "more", &["-o", "small", "--rank", "12"]));
    assert!(stderr.contains("truncated 24 of 24 layers"), "{stderr}");
    let small = event(&sandbox.events(&args(&["inspect", "small"])), "adapter").clone();
    assert_eq!((&small["rank_min"], &small["rank_max"]), (&json!(12), &json!(12)));

    let events = sandbox.events(&merge(&four, "more", &["-o", "published", "--as-published"]));
    let report = &event(&events, "result")["report"];
    let published = json!({
        "ridge": { "absolute": 1e-4 }, "prior": "zero", "absent": "skip", "coordinates": "files",
    });
    for (key, value) in published.as_object().unwrap() {
        assert_eq!(&report["options"][key], value, "{key}");
    }
    let (_, stderr) = sandbox.succeeds(&merge(&four, "none", &["-o", "free"]));
    assert!(stderr.contains("data-free proxy"), "{stderr}");
    let peft = text(data("loras/content_heart.peft"));
    sandbox.succeeds(&merge(std::slice::from_ref(&peft), "none", &["-o", "alone"]));

    let np_lora = |style: &str, subject: &str, more: &[&str]| {
        let fixed = ["merge", "np-lora", "--style", style, "--subject", subject];
        args(&[&fixed[..], more].concat())
    };
    let (style, subject) = (text(lora("style_shade")), text(lora("content_heart")));
    for output in ["styled", "styled-again"] {
        let hard = ["--hard", "--mu-for", "transformer_blocks.3.*=0.5", "-o", output];
        let events = sandbox.events(&np_lora(&style, &format!("{subject}:0.9"), &hard));
        let layers = &event(&events, "result")["report"]["layers"];
        let projection = |i: usize| &layers[i]["projections"][0];
        assert_eq!(projection(0)["directions"], 8, "{layers}");
        assert!(projection(0)["after"].as_f64().is_some_and(|v| v <= 1e-6), "{layers}");
        assert!(projection(23)["after"].as_f64().is_some_and(|v| v > 1e-3), "{layers}");
    }
    assert!(read("styled") == read("styled-again"), "two merges differ");
    let (stdout, _) = sandbox.succeeds(&np_lora(&style, &subject, &["--energy", "0.9", "-o", "some"]));
    assert!(stdout.contains("projected") && stdout.contains("content_heart"), "{stdout}");
    let (stdout, _) = sandbox.succeeds(&np_lora(&style, &subject, &["--dry-run"]));
    assert!(stdout.contains("24 layers"), "{stdout}");
    sandbox.succeeds(&["merge", "linear", &style, &format!("{subject}:0.5"), "-o", "sum-of-two"]);
    let svd = ["merge", "svd", &style, &subject, "--rank", "6", "-o", "svd"];
    let (_, stderr) = sandbox.succeeds(&svd);
    assert!(stderr.contains("truncated 24 of 24 layers"), "{stderr}");
    let events = sandbox.events(&np_lora(&style, &subject, &["--rank", "5", "-o", "small-styled"]));
    let layer = &event(&events, "result")["report"]["layers"][0];
    assert!(layer["rank"] == 5 && layer["cut"].as_f64().is_some_and(|e| e < 1.0), "{layer}");

    for (method, more) in [
        ("ties", &["--density", "0.5", "--lambda", "0.9", "--rank", "9"][..]),
        ("dare", &["--seed", "7", "--ties"]),
        ("knots", &["--rule", "dare", "--density", "0.3"]),
        ("core", &["--rule", "mean"]),
        ("tsv", &["--sv-fro", "0.9"]),
        ("iso-c", &["--sv-ratio", "2", "--rank", "12"]),
    ] {
        let output = format!("by-{method}");
        let fixed = ["merge", method, &four[0], &four[1], "--calibration", "more", "-o", &output];
        let events = sandbox.events(&args(&[&fixed[..], more].concat()));
        let report = &event(&events, "result")["report"];
        assert_eq!(report["method"], method);
        assert!(report["losses"]["merged"].as_f64().is_some_and(|loss| loss < 1.2), "{method}: {report}");
        assert_eq!(report["layers"][0]["captured"].is_f64(), ["ties", "dare"].contains(&method), "{method}");
    }
    // As others define them.
    for (method, more, options) in [
        ("ties", &["--as", "paper"][..], json!({ "scope": "file", "one_more": true, "zero": "majority" })),
        ("ties", &["--as", "peft", "--alone", "keep"], json!({ "elect": "unweighted", "alone": "keep" })),
        ("ties", &["--scope", "file"], json!({ "scope": "file", "one_more": false, "alone": "keep" })),
        ("ties", &["--as", "paper", "--one-more", "false"], json!({ "scope": "file", "one_more": false })),
        ("dare", &["--as", "peft", "--ties"], json!({ "elect": "unweighted", "alone": "merge" })),
        ("knots", &["--as", "paper"], json!({ "scope": "file", "one_more": true })),
        ("core", &["--as", "paper"], json!({ "scope": "layer", "one_more": true, "bases": "factors" })),
        ("core", &["--as", "paper", "--rule", "tsv"], json!({ "rule": "tsv", "keep": "share" })),
        ("core", &["--bases", "factors"], json!({ "bases": "factors", "one_more": false })),
        ("tsv", &["--keep", "share"], json!({ "keep": "share" })),
        ("iso-c", &["--mean", "width"], json!({ "mean": "width" })),
    ] {
        let fixed = ["merge", method, &four[0], &four[1], "--force", "-o", "as-others"];
        let events = sandbox.events(&args(&[&fixed[..], more].concat()));
        let report = &event(&events, "result")["report"];
        for (key, value) in options.as_object().expect("an object") {
            assert_eq!(&report["options"][key], value, "{method} {more:?}: {report}");
        }
    }
    let (stdout, _) = sandbox.succeeds(&["merge", "ties", &style, &subject, "-o", "tied"]);
    assert!(stdout.contains("energy held"), "{stdout}");
    let resized = ["resize", &subject, "--sv-cumulative", "0.8", "-o", "resized"];
    let events = sandbox.events(&args(&resized));
    let report = &event(&events, "result")["report"];
    assert_eq!(report["method"], "resize");
    assert!(report["layers"][0]["cut"].as_f64().is_some_and(|cut| cut > 0.0 && cut < 0.5), "{report}");

    let compare = ["compare", &four[0], &four[1], "--calibration", "more"];
    let methods = ["--methods", "ssr,linear,np-lora,tsv", "-o", "compared.json"];
    let (stdout, _) = sandbox.succeeds(&[&compare[..], &methods].concat());
    assert!(stdout.contains("where it loses most") && stdout.contains("np-lora"), "{stdout}");
    let compared: Value = serde_json::from_slice(&read("compared.json")).expect("JSON");
    let loss = |i: usize| compared["methods"][i]["loss"].as_f64().expect("a loss");
    assert!(loss(0) < loss(1) && compared["methods"].as_array().map(Vec::len) == Some(4), "{compared}");
    let sum = compared["methods"][0]["loss_of_sum"].as_f64().expect("a loss");
    assert!((loss(1) - sum).abs() < 1e-6, "{compared}");
    let events = sandbox.events(&args(&[&compare[..], &["--rank", "4"]].concat()));
    let names = |events: &[Value]| -> Vec<String> {
        let name = |e: &Value| e["method"].as_str().unwrap_or_default().to_owned();
        events.iter().filter(|e| e["event"] == "method").map(name).collect()
    };
    assert_eq!(names(&events).len(), 14);
    // What a list has does not depend on the device, and entries take a software adapter long.
    if device == "cpu" {
        let variants = ["--methods", "linear,ties,dare,knots,core,tsv,iso-c", "--variants", "--rank", "4"];
        let events = sandbox.events(&args(&[&compare[..], &variants].concat()));
        let want = "linear ties ties-paper ties-peft dare dare-paper knots knots-paper core core-paper tsv tsv-paper iso-c \
                    iso-c-paper";
        assert_eq!(names(&events), want.split(' ').collect::<Vec<_>>());
    }

    let events = sandbox.events(&args(&["inspect", "merged", "f16", "alone", "styled", "sum-of-two", &peft]));
    assert_eq!(event(&events, "match")["in_all"], 24);
    sandbox.succeeds(&["inspect", "merged", "f16"]);

    let events = sandbox.events(&args(&["devices"]));
    assert!(event(&events, "chosen")["name"].is_string());
    sandbox.succeeds(&["devices"]);
}

#[test]
fn every_command_on_the_cpu() {
    every_command("cpu");
}

#[test]
fn every_command_on_a_gpu() {
    if has_adapter() {
        every_command("gpu");
    }
}

/// Whether there is a GPU, software or not; to lack one must have been allowed.
fn has_adapter() -> bool {
    let output = command().args(["devices", "--json"]).output().expect("the program starts");
    assert!(output.status.success());
    if parse(&streams(&output).0).iter().any(|event| event["event"] == "adapter") {
        return true;
    }
    // Anything else would call a machine without a driver a success.
    assert_eq!(std::env::var("LORAWELD_ALLOW_NO_GPU").as_deref(), Ok("1"), "no GPU, not even a software one");
    eprintln!("skipped: no GPU, and LORAWELD_ALLOW_NO_GPU=1");
    false
}

#[test]
fn reports_tell_the_memory_of_a_gpu() {
    let sandbox = |device| Sandbox { device, ..Sandbox::new() };
    let [style, subject] = ["style_shade", "concept_c3_mirror"].map(|name| text(lora(name)));
    let words =
        ["merge", "np-lora", "--style", &style, "--subject", &subject, "-o", "both", "--memory", "16"];
    let (stdout, stderr) = sandbox("cpu").succeeds(&words);
    assert!(!stdout.contains("memory") && !stderr.contains("memory"), "{stdout}{stderr}");
    let events = sandbox("cpu").events(&args(&words));
    assert_eq!(event(&events, "result")["report"]["memory"], Value::Null);
    if !has_adapter() {
        return;
    }
    let (stdout, stderr) = sandbox("gpu").succeeds(&words);
    assert!([stdout, stderr].concat().contains(" of 16.0 MiB at most"));
    let events = sandbox("gpu").events(&args(&words));
    let memory = &event(&events, "result")["report"]["memory"];
    let peak = memory["peak"].as_u64().expect("a peak");
    assert!(peak > 0 && peak <= 16 << 20 && memory["budget"] == 16 << 20, "{memory}");
}

#[test]
fn devices_works_without_a_driver() {
    // No such backend on any machine.
    let output = command().arg("devices").env("WGPU_BACKEND", "none").output().expect("it starts");
    let (stdout, stderr) = streams(&output);
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("cpu"), "{stdout}");
}

#[test]
fn demo_needs_no_files_and_can_be_rerun() {
    let sandbox = Sandbox::new();
    let (stdout, _) = sandbox.succeeds(&["demo"]);
    for expected in ["CPU", "asked for", "loss", "average", "loraweld-demo/merged.safetensors", "merge ssr"] {
        assert!(stdout.contains(expected), "{expected}: {stdout}");
    }
    let merged = sandbox.path("loraweld-demo/merged.safetensors");
    let first = fs::read(&merged).expect("the merge");
    let events = sandbox.events(&args(&["demo"]));
    assert!(first == fs::read(&merged).expect("the merge"), "two demos differ");
    let commands = event(&events, "next")["commands"].as_array().expect("commands");
    #[cfg(unix)]
    for command in commands {
        let command = command.as_str().expect("text");
        let command = format!("{command} --device cpu");
        let output = Command::new("sh").args(["-c", &command]).current_dir(sandbox.dir.path()).output();
        let output = output.expect("a shell");
        let (stdout, stderr) = streams(&output);
        assert!(output.status.success(), "{command}: {stdout}{stderr}");
    }
    assert!(!commands.is_empty());

    fs::create_dir(sandbox.path("mine")).expect("a folder");
    fs::write(sandbox.path("mine/merged.safetensors"), "precious").expect("a file");
    sandbox.fails(1, &args(&["demo", "--out", "mine"]), &["mine", "not empty"]);
    assert_eq!(fs::read(sandbox.path("mine/merged.safetensors")).expect("still there"), b"precious");
}

#[test]
fn help_and_version() {
    let run = |args: &[&str]| command().args(args).output().expect("the program starts");
    for args in [
        &["--help"][..],
        &["--version"],
        &["merge", "--help"],
        &["merge", "ssr", "--help"],
        &["merge", "np-lora", "--help"],
        &["merge", "linear", "--help"],
        &["merge", "svd", "--help"],
        &["merge", "ties", "--help"],
        &["merge", "dare", "--help"],
        &["merge", "knots", "--help"],
        &["merge", "core", "--help"],
        &["merge", "tsv", "--help"],
        &["merge", "iso-c", "--help"],
        &["compare", "--help"],
        &["resize", "--help"],
        &["calibrate", "--help"],
        &["calibration", "add", "--help"],
        &["calibration", "show", "--help"],
        &["inspect", "--help"],
        &["convert", "--help"],
        &["devices", "--help"],
        &["demo", "--help"],
    ] {
        let output = run(args);
        let (stdout, stderr) = streams(&output);
        assert_eq!((output.status.code(), stderr.as_str()), (Some(0), ""), "{args:?}");
        assert!(
            stdout.contains("Example") || args == ["--version"] || args == ["merge", "--help"],
            "{stdout}"
        );
    }
    let version = streams(&run(&["--version"])).0;
    assert_eq!(version.trim(), format!("loraweld {}", env!("CARGO_PKG_VERSION")));
    assert_eq!(run(&[]).status.code(), Some(2));
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let sandbox = Sandbox::new();
    let two = loras(&CONCEPTS[..2]);
    let merge = |more: &[&str]| merge(&two, "none", &[more, &["-o", "out"]].concat());
    for (options, culprits) in [
        (&["--ridge", "-1"][..], &["--ridge", "0 or more"][..]),
        (&["--ridge", "1e-4", "--ridge-relative", "1e-3"], &["--ridge", "--ridge-relative"]),
        (&["--ridge-relative", "nan"], &["--ridge-relative", "finite"]),
        (&["--prior-weight", "inf"], &["--prior-weight", "finite"]),
        (&["--prior-weight", "1", "--prior", "zero"], &["--prior-weight", "--prior adapters"]),
        (&["--prior", "most"], &["--prior", "average"]),
        (&["--balance", "-0.5"], &["--balance", "0 or more"]),
        (&["--neutral-weight", "x"], &["--neutral-weight", "number"]),
        (&["--task-weights", "1,2,3"], &["--task-weights", "3 weights", "2 adapters"]),
        (&["--task-weights", "1"], &["--task-weights", "1 weight ", "2 adapters"]),
        (&["--task-weights", "-1,2"], &["--task-weights", "0 or more"]),
        (&["--task-weights", "0,0"], &["--task-weights", "all 0"]),
        (&["--dtype", "f64"], &["--dtype", "bf16"]),
        (&["--format", "safetensors"], &["--format", "kohya"]),
        (&["--memory", "0"], &["--memory", "1.."]),
        (&["--rank", "0"], &["--rank", "1 or more"]),
        (&["--report", "./out"], &["--report", "out"]),
        (&["--precision", "f32"], &["--precision", "double-single"]),
        (&["-q", "-v"], &["--quiet", "--verbose"]),
        (&["--frobnicate"], &["--frobnicate"]),
    ] {
        sandbox.fails(2, &merge(options), culprits);
    }
    for (words, culprits) in [
        (&["merge", "ties", "--density", "0"][..], &["--density", "above 0"][..]),
        (&["merge", "ties", "--seed", "1"], &["--seed", "dare"]),
        (&["merge", "dare", "--lambda", "2"], &["--lambda", "signs"]),
        (&["merge", "core", "--rule", "mean", "--density", "0.5"], &["--density", "ties"]),
        (&["merge", "knots", "--rule", "median"], &["--rule", "mean"]),
        (&["merge", "knots", "--as", "peft"], &["PEFT has neither", "merge ties"]),
        (&["merge", "core", "--rule", "mean", "--alone", "merge"], &["--alone", "not for mean"]),
        (&["merge", "core", "--rule", "iso", "--bases", "factors"], &["--bases", "iso"]),
        (&["merge", "dare", "--scope", "file"], &["--scope", "ties"]),
        (&["merge", "dare", "--elect", "unweighted"], &["--elect", "elected"]),
        (&["merge", "ties", "--as", "mergekit"], &["--as", "peft"]),
        (&["merge", "svd", "--sv-ratio", "0.5"], &["--sv-ratio", "1 or more"]),
        (&["merge", "svd", "--sv-fro", "0.5", "--sv-ratio", "2"], &["--sv-fro", "--sv-ratio"]),
        (&["merge", "linear", "--sv-cumulative", "1.5"], &["--sv-cumulative", "at most 1"]),
    ] {
        sandbox.fails(2, &args(&[words, &[&two[0], &two[1], "-o", "out"]].concat()), culprits);
    }
    sandbox.fails(2, &args(&["resize", &two[0], "-o", "out"]), &["--rank", "--sv-fro"]);
    sandbox.fails(2, &args(&["compare", &two[0], &two[1]]), &["--calibration"]);
    sandbox.fails(1, &args(&["compare", &two[0], &two[1], "--calibration", "gone"]), &["gone"]);
    let strength = |strength: &str| {
        self::merge(&[two[0].clone(), format!("{}:{strength}", two[1])], "none", &["-o", "out"])
    };
    sandbox.fails(2, &strength("nan"), &["strength", "finite"]);
    sandbox.fails(2, &strength("-inf"), &["strength", "finite"]);
    sandbox.fails(2, &strength("half"), &["`half`", "not a number"]);
    sandbox.fails(2, &self::merge(&two, "none", &[]), &["--output"]);
    sandbox.fails(2, &self::merge(&[], "none", &["-o", "out"]), &["LORA"]);
    sandbox.fails(2, &args(&["merge", "ssr", &two[0], "-o", "out"]), &["--calibration"]);

    let np_lora = |more: &[&str]| {
        args(
            &[&["merge", "np-lora", "--style", &two[0], "--subject", &two[1], "-o", "out"][..], more]
                .concat(),
        )
    };
    for (options, culprits) in [
        (&["--mu", "-1"][..], &["--mu", "0 or more"][..]),
        (&["--mu", "0.5", "--hard"], &["--mu", "--hard"]),
        (&["--mu-for", "0.5"], &["--mu-for", "PATTERN=MU"]),
        (&["--mu-for", "single.*=x"], &["--mu-for", "number"]),
        (&["--directions", "0"], &["--directions", "1.."]),
        (&["--energy", "1.5"], &["--energy", "at most 1"]),
        (&["--energy", "0.5", "--directions", "2"], &["--energy", "--directions"]),
    ] {
        sandbox.fails(2, &np_lora(options), culprits);
    }
    sandbox.fails(2, &args(&["merge", "np-lora", "--style", &two[0], "-o", "out"]), &["--subject"]);

    sandbox.fails(2, &args(&["merge", "svd", &two[0], "-o", "out"]), &["--rank"]);

    let mut lopsided = calibrate(&CONCEPTS[..2], "step1", "out");
    lopsided.retain(|arg| arg != &two[1]);
    sandbox.fails(2, &lopsided, &["1 adapter", "2 paths"]);
    sandbox.fails(2, &args(&["calibrate", &two[0], "-o", "out"]), &["--activations"]);
    for (options, culprits) in [
        (&["--loss", "0.1"][..], &["loss", "calibration"][..]),
        (&["--truncate-by", "data", "--rank", "4"], &["by data", "calibration"]),
        (&["--budget-rank", "4", "--budget-mib", "1"], &["--budget-rank", "--budget-mib"]),
        (&["--budget-rank", "0"], &["--budget-rank", "1 or more"]),
        (&["--budget-mib", "-1"], &["--budget-mib", "above 0"]),
        (&["--truncate-by", "size"], &["--truncate-by", "norm"]),
    ] {
        sandbox.fails(
            2,
            &[&args(&["merge", "linear", &two[0], "-o", "out"])[..], &args(options)].concat(),
            culprits,
        );
    }
    sandbox.fails(2, &args(&["frobnicate"]), &["frobnicate"]);
}

#[test]
fn damaged_adapters_are_refused() {
    let sandbox = Sandbox::new();
    let good = lora("concept_c1_thick");
    let kohya = lora("concept_c1_thick.kohya");
    let bytes = fs::read(&good).expect("the fixture");
    let write = |name: &str, bytes: &[u8]| {
        fs::write(sandbox.path(name), bytes).expect("the folder is writable");
        text(sandbox.path(name))
    };
    let edit = |name: &str, edit: &dyn Fn(&mut File)| sandbox.edited(name, &good, edit);
    let a = format!("{TO_Q}.lora_A.weight");
    let b = format!("{TO_Q}.lora_B.weight");
    let alpha = "lora_transformer_blocks_0_attn_to_q.alpha";
    let long = [&1_000_000u64.to_le_bytes()[..], &bytes[8..]].concat();

    let cases: Vec<(String, Vec<&str>)> = vec![
        (write("cut", &bytes[..bytes.len() - 1000]), vec!["cut short"]),
        (write("cut-in-header", &bytes[..100]), vec!["cut short"]),
        (write("long-header", &long), vec!["header", "1000000"]),
        (write("text", b"this is a text, and no adapter at all"), vec!["not a safetensors file"]),
        (write("pickle", b"PK\x03\x04 and so on, as PyTorch writes it"), vec!["PyTorch"]),
        (write("empty", b""), vec!["empty"]),
        (edit("no-b", &|f| f.tensors.retain(|t| !t.0.ends_with(&b))), vec![&a, "lora_B"]),
        (edit("no-a", &|f| f.tensors.retain(|t| !t.0.ends_with(&a))), vec![&b, "lora_A"]),
        (edit("ranks", &|f| f.tensor(&b).2 = vec![256, 2]), vec![&a, &b, "rank"]),
        (edit("nan", &|f| f.tensor(&b).3[..2].copy_from_slice(&[0x00, 0x7e])), vec![&b, "NaN"]),
        (edit("inf", &|f| f.tensor(&a).3[6..8].copy_from_slice(&[0x00, 0xfc])), vec![&a, "inf", "element 3"]),
        (sandbox.edited("nan-alpha", &kohya, |f| f.tensor(alpha).3 = vec![0x00, 0x7e]), vec![alpha, "NaN"]),
        (edit("foreign", &|f| f.tensor(&a).0 = "m.dora_scale".into()), vec!["DoRA", "m.dora_scale"]),
        (text(sandbox.path("absent")), vec!["cannot open"]),
        (text(data("activations")), vec!["adapter_model.safetensors"]),
    ];
    for (bad, mut culprits) in cases {
        culprits.push(&bad);
        let pair = [text(lora("concept_c3_mirror")), bad.clone()];
        sandbox.fails(1, &merge(&pair, "none", &["-o", "out", "--report", "report"]), &culprits);
        let mut calibrate = calibrate(&["concept_c3_mirror", "concept_c1_thick"], "step1", "out");
        calibrate[2].clone_from(&bad);
        sandbox.fails(1, &calibrate, &culprits);
    }
}

#[test]
fn shapes_that_disagree_name_both_files() {
    let sandbox = Sandbox::new();
    let narrow = sandbox.edited("narrow", &lora("concept_c3_mirror"), |file| {
        file.tensor(&format!("{TO_Q}.lora_A.weight")).2 = vec![16, 64];
        let b = file.tensor(&format!("{TO_Q}.lora_B.weight"));
        b.2 = vec![64, 16];
    });
    let pair = [text(lora("concept_c1_thick")), narrow.clone()];
    sandbox.fails(
        1,
        &merge(&pair, "none", &["-o", "out"]),
        &["narrow", "concept_c1_thick", TO_Q, "64", "128"],
    );
    let (stdout, _) = sandbox.succeeds(&["inspect", &pair[0], &pair[1]]);
    assert!(stdout.contains("widths disagree on 1 layer"), "{stdout}");
}

#[test]
fn calibrations_of_other_adapters_are_refused() {
    let sandbox = Sandbox::new();
    let calibration = sandbox.calibrated("pair", &CONCEPTS[..2]);
    let wrong = loras(&["concept_c3_mirror", "content_heart"]);
    let culprits = [&calibration, "content_heart", "concept_c3_mirror", "concept_c7_rot90"];
    sandbox.fails(1, &merge(&wrong, &calibration, &["-o", "out"]), &culprits);
    sandbox.fails(1, &merge(&wrong, &calibration, &["--dry-run"]), &culprits);

    let other = sandbox.calibrated("other", &["concept_c1_thick", "concept_c4_invert"]);
    sandbox.fails(
        1,
        &args(&["calibration", "add", &calibration, &other, "-o", "out"]),
        &["other", "concept_c3_mirror"],
    );
    let pair = loras(&CONCEPTS[..2]);
    let neutral = merge(&pair, &calibration, &["-o", "out", "--neutral-weight", "1"]);
    sandbox.fails(1, &neutral, &[&calibration, "neutral"]);
    // Adapters and activations are no calibrations.
    let lora = text(lora("concept_c3_mirror"));
    sandbox.fails(1, &args(&["calibration", "show", &lora]), &[&lora, "calibration"]);
    sandbox.fails(1, &merge(&wrong, &lora, &["-o", "out"]), &[&lora, "calibration"]);
}

#[test]
fn bad_activations_are_refused() {
    let sandbox = Sandbox::new();
    let good = activations("concept_c3_mirror");
    let edit = |name: &str, edit: &dyn Fn(&mut File)| sandbox.edited(name, &good, edit);
    let rename = |f: &mut File| {
        for tensor in &mut f.tensors {
            tensor.0 = tensor.0.replace("transformer_blocks", "transfomer_blocks");
        }
        f.metadata = json!({});
    };
    let bytes = fs::read(&good).expect("the fixture");
    fs::write(sandbox.path("cut"), &bytes[..bytes.len() / 2]).expect("the folder is writable");
    fs::create_dir(sandbox.path("no-shards")).expect("a folder");
    let cases: Vec<(String, Vec<&str>)> = vec![
        (edit("narrow", &|f| f.tensor(TO_Q).2 = vec![128, 64]), vec![TO_Q, "64", "128", "concept_c3_mirror"]),
        (
            edit("twice", &|f| {
                let (_, dtype, shape, data) = f.tensor(TO_Q).clone();
                f.tensors.push((TO_Q.replace('.', "_"), dtype, shape, data));
            }),
            vec![TO_Q, "same layer"],
        ),
        (edit("unknown", &rename), vec!["transfomer_blocks", "transformer_blocks"]),
        (
            edit("no-tokens", &|f| {
                let tensor = f.tensor(TO_Q);
                (tensor.2, tensor.3) = (vec![0, 128], Vec::new());
            }),
            vec![TO_Q, "token"],
        ),
        (edit("nan", &|f| f.tensor(TO_Q).3[..2].copy_from_slice(&[0xc0, 0x7f])), vec![TO_Q, "NaN"]),
        (edit("inf", &|f| f.tensor(TO_Q).3[..2].copy_from_slice(&[0x80, 0x7f])), vec![TO_Q, "inf"]),
        (text(sandbox.path("cut")), vec!["cut short"]),
        (text(sandbox.path("no-shards")), vec![".safetensors"]),
        (text(sandbox.path("absent")), vec!["cannot open"]),
    ];
    for (bad, mut culprits) in cases {
        culprits.push(&bad);
        let adapter = text(lora("concept_c3_mirror"));
        let other = text(lora("concept_c1_thick"));
        let run = |first: &str, more: &[&str]| {
            let thick = text(activations("concept_c1_thick"));
            let base = ["calibrate", &adapter, &other, "--activations", first, &thick, "-o", "out"];
            args(&[&base[..], more].concat())
        };
        sandbox.fails(1, &run(&bad, &[]), &culprits);
        sandbox.fails(1, &run(&text(&good), &["--neutral", &bad]), &culprits);
    }
}

#[test]
fn outputs_are_refused_before_the_work() {
    let sandbox = Sandbox::new();
    let copy = |name: &str, from: &Path| {
        fs::copy(from, sandbox.path(name)).expect("the folder is writable");
        name.to_owned()
    };
    let pair = [copy("cat", &lora("concept_c3_mirror")), copy("dog", &lora("concept_c7_rot90"))];
    copy("cat-inputs", &activations("concept_c3_mirror"));
    copy("dog-inputs", &activations("concept_c7_rot90"));
    let calibrate = |output: &str| {
        let base = ["calibrate", "cat", "dog", "--activations", "cat-inputs", "dog-inputs"];
        args(&[&base[..], &["-o", output, "--force"]].concat())
    };
    sandbox.succeeds(&calibrate("calibration"));
    fs::write(sandbox.path("file"), "precious").expect("the folder is writable");
    let merge = |more: &[&str]| merge(&pair, "calibration", more);

    sandbox.fails(1, &merge(&["-o", "file"]), &["file", "exists", "--force"]);
    sandbox.fails(1, &merge(&["-o", "out", "--report", "file"]), &["file", "exists", "--force"]);
    sandbox.fails(1, &merge(&["-o", "absent/out"]), &["absent", "does not exist"]);
    // Even root cannot write below a file.
    sandbox.fails(1, &merge(&["-o", "file/out"]), &["file", "not a folder"]);
    sandbox.fails(1, &merge(&["-o", "out", "--report", "file/out"]), &["file", "not a folder"]);
    sandbox.fails(1, &merge(&["-o", "."]), &["folder"]);
    sandbox.fails(1, &merge(&["-o", "out/"]), &["folder"]);
    sandbox.fails(
        1,
        &args(&["calibration", "add", "calibration", "-o", "calibration", "--force"]),
        &["input"],
    );

    fs::hard_link(sandbox.path("dog"), sandbox.path("hard")).expect("a hard link");
    let mut names = vec!["cat", "./dog", "hard", "calibration"];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("cat", sandbox.path("soft")).expect("a link");
        names.push("soft");
    }
    for name in names {
        sandbox.fails(1, &merge(&["-o", name, "--force"]), &[name, "input", "never overwritten"]);
        sandbox.fails(1, &merge(&["-o", "out", "--report", name, "--force"]), &[name, "input"]);
    }
    for name in ["cat", "dog-inputs", "hard"] {
        sandbox.fails(1, &calibrate(name), &[name, "input", "never overwritten"]);
    }
    let peft = sandbox.path("peft");
    fs::create_dir(&peft).expect("a folder");
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        fs::copy(data("loras/content_heart.peft").join(name), peft.join(name)).expect("a copy");
        let inside = format!("peft/{name}");
        let run = self::merge(&args(&["cat", "peft"]), "none", &["-o", &inside, "--force"]);
        sandbox.fails(1, &run, &[name, "input"]);
    }

    // With --force, what is no input is replaced; the link stays a link.
    sandbox.succeeds(&merge(&["-o", "file", "--force"]));
    assert_ne!(fs::read(sandbox.path("file")).expect("it"), b"precious");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() {
    let sandbox = Sandbox::new();
    let pair = loras(&CONCEPTS[..2]);
    let full = ["-o", "/dev/full", "--force"];
    sandbox.fails(1, &merge(&pair, "none", &full), &["/dev/full", "No space left"]);
    let mut calibrate = calibrate(&CONCEPTS[..2], "step1", "/dev/full");
    calibrate.push("--force".into());
    sandbox.fails(1, &calibrate, &["/dev/full", "No space left"]);

    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    let mut inspect = command();
    inspect.arg("inspect").arg(&pair[0]).stdout(full);
    let output = inspect.output().expect("the program starts");
    assert_eq!(output.status.code(), Some(1), "stdout that cannot be written");
    assert!(streams(&output).1.contains("stdout"));
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    for args in [args(&["inspect", &text(lora("concept_c3_mirror"))]), args(&["devices", "--json"])] {
        let mut child = command();
        let child = child.args(&args).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().expect("the program starts");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends");
        let stderr = streams(&output).1;
        assert!(output.status.success() && !stderr.contains("panic"), "{args:?}: {stderr}");
    }
}

/// The first signal ends a conversion, and what it leaves, even after the second, is nothing or the whole file.
#[cfg(unix)]
#[test]
fn a_stopped_conversion_leaves_nothing() {
    let sandbox = Sandbox::new();
    // Large enough to be met while it is written.
    let factor = || Matrix::from_fn(1024, 16 << 10, |i, j| (i + j) as f32);
    let (a, b) = (factor(), factor().transposed());
    let layer = Layer::new("transformer.transformer_blocks.0.attn.to_q", a, b).unwrap();
    let input = sandbox.path("in.safetensors");
    let adapter = Adapter::new("large", Format::Peft, vec![layer]).unwrap();
    adapter.save(&input, &SaveOptions::default()).unwrap();
    let run = ["convert", "in.safetensors", "-o", "out", "--dtype", "bf16", "--format", "same", "-q"];
    let start = std::time::Instant::now();
    sandbox.succeeds(&run);
    let (whole, time) = (fs::read(sandbox.path("out")).unwrap(), start.elapsed());
    let mut stopped = 0;
    for i in 0..8 {
        let _ = fs::remove_file(sandbox.path("out"));
        let mut child =
            command().args(run).current_dir(sandbox.dir.path()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(time * (i + 1) / 10);
        for _ in 0..1 + i % 2 {
            let _ =
                Command::new("kill").args(["-INT", &child.id().to_string()]).stderr(Stdio::null()).status();
        }
        let status = child.wait().unwrap();
        if status.success() {
            assert!(fs::read(sandbox.path("out")).unwrap() == whole, "half a file");
        } else {
            stopped += 1;
            let names: Vec<_> = sandbox.files().into_keys().filter(|path| *path != input).collect();
            assert!(names.is_empty(), "{status} left {names:?}");
        }
    }
    assert!(stopped >= 2, "{stopped} of 8 signals were heard");
}

/// However it is stopped, the target is not there or whole, and the next run cleans up.
#[cfg(unix)]
#[test]
fn a_killed_merge_leaves_no_half_file() {
    let sandbox = Sandbox::new();
    let pair = loras(&["concept_c7_rot90", "style_shade"]);
    let run = merge(&pair, "none", &["-o", "out", "--force", "--device", "cpu", "-q"]);
    let start = std::time::Instant::now();
    sandbox.succeeds(&run[..run.len() - 3]);
    let whole = fs::read(sandbox.path("out")).expect("the merge");
    let time = start.elapsed();
    fs::remove_file(sandbox.path("out")).expect("it is there");
    for (i, signal) in ["-KILL", "-INT", "-TERM"].into_iter().cycle().take(15).enumerate() {
        if signal != "-KILL" {
            for path in sandbox.files().keys() {
                fs::remove_file(path).expect("it is there");
            }
        }
        let mut child = command();
        let child = child.args(&run).current_dir(sandbox.dir.path()).stderr(Stdio::null());
        let mut child = child.spawn().expect("the program starts");
        std::thread::sleep(time * (i as u32 + 1) / 16);
        // It may have ended before.
        let id = child.id().to_string();
        let _ = Command::new("kill").args([signal, &id]).stderr(Stdio::null()).status();
        let status = child.wait().expect("it ends");
        if let Ok(bytes) = fs::read(sandbox.path("out")) {
            assert!(bytes == whole, "half a file after {signal}: {status}");
        }
        // Once it listens to signals, it takes its temporary file away itself.
        if signal != "-KILL" && status.code().is_some() {
            let names: Vec<_> = sandbox.files().into_keys().collect();
            assert!(names.iter().all(|path| path.ends_with("out")), "{signal} left {names:?}");
        }
    }
    sandbox.succeeds(&run[..run.len() - 3]);
    let files: Vec<_> = sandbox.files().into_iter().collect();
    assert!(files == [(sandbox.path("out"), whole)], "what is left is not the merge alone");
}

#[test]
fn oddities_are_said_and_not_refused() {
    let sandbox = Sandbox::new();
    let warns = |args: &[String], expected: &[&str]| {
        let (stdout, stderr) = sandbox.succeeds(&[args, &["--json".to_owned()]].concat());
        let events = parse(&stdout);
        let warnings: Vec<_> = events.iter().filter(|e| e["event"] == "warning").collect();
        for text in expected {
            assert!(stderr.contains("warning: ") && stderr.contains(text), "{text}: {stderr}");
            let said = |w: &&&Value| w["message"].as_str().is_some_and(|m| m.contains(text));
            assert!(warnings.iter().any(|w| said(&w)), "{text}: {warnings:#?}");
        }
        events
    };
    let mirror = text(lora("concept_c3_mirror"));
    let off = sandbox.edited("off", &lora("concept_c1_thick.kohya"), |file| {
        file.tensor("lora_transformer_blocks_0_attn_to_q.alpha").3 = vec![0, 0];
    });
    let pair = [mirror.clone(), off.clone()];
    warns(&merge(&pair, "none", &["-o", "zero"]), &["off", "alpha 0", "transformer_blocks_0_attn_to_q"]);

    // An extra layer, and one without activations (which no alias names).
    let odd = sandbox.edited("odd", &activations("concept_c3_mirror"), |file| {
        file.tensor("transformer_blocks.1.ff.net.2").0 = "transformer_blocks.9.ff.net.2".into();
    });
    let thick = text(lora("concept_c1_thick"));
    let thick_inputs = text(activations("concept_c1_thick"));
    let run = ["calibrate", &mirror, &thick, "--activations", &odd, &thick_inputs, "-o", "odd.calibration"];
    let extra = "transformer_blocks.9.ff.net.2";
    let missing = "transformer_blocks_1_ff_net_2";
    warns(&args(&run), &[extra, "no adapter has", missing, "without activations"]);
    let pair = [mirror.clone(), thick.clone()];
    let merge_odd = |more: &[&str]| merge(&pair, "odd.calibration", more);
    let events =
        warns(&merge_odd(&["-o", "summed", "--report", "report"]), &["without activations", "summed"]);
    let layers = event(&events, "result")["report"]["layers"].as_array().expect("layers");
    let summed: Vec<_> = layers.iter().filter(|l| l["action"]["kind"] == "summed").collect();
    assert_eq!(summed.len(), 1, "{summed:#?}");
    assert_eq!(summed[0]["layer"], "transformer_blocks.1.ff.net.2");
    let report = fs::read_to_string(sandbox.path("report")).expect("the report");
    assert!(report.contains("without activations"), "{report}");

    // The same file twice, a strength of 0, and weights that ask for a bad merge.
    let inputs = &thick_inputs;
    warns(
        &args(&["calibrate", &mirror, &thick, "--activations", inputs, inputs, "-o", "same.calibration"]),
        &["concept_c1_thick", "given again"],
    );
    warns(&merge(&[mirror.clone(), mirror.clone()], "none", &["-o", "twice"]), &["given more than once"]);
    let silent = [format!("{mirror}:0"), thick.clone()];
    warns(&merge(&silent, "none", &["-o", "silent"]), &["strength 0", "only concept_c1_thick adds to them"]);
    let lopsided = merge_odd(&["-o", "lopsided", "--task-weights", "1,0", "--prior-weight", "0"]);
    warns(&lopsided, &["more than the average"]);

    // A layer that only one adapter has, and adapters that share none.
    let less = sandbox.edited("less", &lora("concept_c1_thick"), |file| {
        file.tensors.retain(|t| !t.0.contains("transformer_blocks.3.ff"));
    });
    let pair = [mirror.clone(), less];
    warns(&merge(&pair, "none", &["-o", "passed"]), &["passed through", "concept_c3_mirror"]);
    let strange = sandbox.edited("strange", &lora("concept_c1_thick"), |file| {
        for tensor in &mut file.tensors {
            tensor.0 = tensor.0.replace("transformer_blocks", "double_blocks");
        }
    });
    let pair = [mirror.clone(), strange];
    warns(&merge(&pair, "none", &["--dry-run"]), &["no layer is in more than one adapter"]);
    let (stdout, _) = sandbox.succeeds(&["inspect", &pair[0], &pair[1]]);
    assert!(stdout.contains("0 layers in both") && stdout.contains("double_blocks_*"), "{stdout}");
}

#[test]
fn a_dry_run_writes_nothing() {
    let sandbox = Sandbox::new();
    let calibration = sandbox.calibrated("calibration", &CONCEPTS);
    fs::write(sandbox.path("out"), "precious").expect("the folder is writable");
    let before = sandbox.files();
    let four = loras(&CONCEPTS);
    let (stdout, _) = sandbox.succeeds(&merge(&four, &calibration, &["--dry-run"]));
    for expected in ["24 layers", "transformer_blocks.*.attn.to_q", "36", "nothing was written"] {
        assert!(stdout.contains(expected), "{expected}: {stdout}");
    }
    let run =
        merge(&four, &calibration, &["--dry-run", "-o", "out", "--report", "report", "--dtype", "bf16"]);
    let events = sandbox.events(&run);
    let plan = event(&events, "plan");
    let layers = plan["layers"].as_array().expect("layers");
    let is_to_q = |l: &&Value| l["layer"] == TO_Q;
    let to_q = layers.iter().find(is_to_q).expect("to_q");
    assert_eq!((&to_q["rank"], &to_q["bytes"]), (&json!(36), &json!(36 * 256 * 2)));
    let refused = event(&events, "warning");
    assert!(refused["message"].is_string());
    let events = sandbox.events(&merge(&four, &calibration, &["--dry-run", "--rank", "10"]));
    let ranks =
        event(&events, "plan")["layers"].as_array().expect("layers").iter().map(|l| l["rank"].clone());
    assert!(ranks.clone().all(|rank| rank == 10), "{:?}", ranks.collect::<Vec<_>>());
    // What a merge would refuse.
    let neutral = merge(&four, &calibration, &["--dry-run", "--neutral-weight", "1"]);
    sandbox.fails(1, &neutral, &[&calibration, "neutral"]);
    assert!(before == sandbox.files(), "a dry run wrote something");
}

#[test]
fn quiet_says_only_what_was_asked_for() {
    let sandbox = Sandbox::new();
    let pair = loras(&CONCEPTS[..2]);
    let calibration = sandbox.calibrated("calibration", &CONCEPTS[..2]);
    let (stdout, stderr) = sandbox.succeeds(&merge(&pair, &calibration, &["-o", "out", "-q"]));
    assert_eq!((stdout.as_str(), stderr.as_str()), ("", ""));
    let (stdout, _) = sandbox.succeeds(&["inspect", "out", "-q"]);
    assert!(stdout.contains("out"));
}

#[test]
fn verbose_logs_to_stderr() {
    let sandbox = Sandbox::new();
    let (stdout, stderr) = sandbox.succeeds(&["inspect", &text(lora("concept_c3_mirror")), "-v"]);
    assert!(stderr.contains("INFO") && stderr.contains("concept_c3_mirror"), "{stderr}");
    assert!(!stdout.contains("INFO"), "{stdout}");
}

#[test]
fn inspect_shows_what_a_file_says_of_itself() {
    let sandbox = Sandbox::new();
    let file = sandbox.edited("told", &lora("concept_c1_thick.kohya"), |file| {
        file.metadata["modelspec.trigger_phrase"] = "sks \u{1b}[31mthick".into();
        file.metadata["ss_tag_frequency"] = r#"{"1_img": {"one": 3, "digit": 9}}"#.into();
    });
    // `run` checks that no escape sequence gets through.
    let (stdout, _) = sandbox.succeeds(&["inspect", &file]);
    for expected in ["kohya", "trigger", "sks", "digit, one", "alpha 8, alpha tensor", "digitdit", "f16"] {
        assert!(stdout.contains(expected), "{expected}: {stdout}");
    }
    let events = sandbox.events(&args(&["inspect", &file]));
    let adapter = event(&events, "adapter");
    assert_eq!((&adapter["layers"], &adapter["tags"]), (&json!(24), &json!(["digit", "one"])));
    assert_eq!(adapter["modules"][0]["scale"], 2.0);
}

#[test]
fn paths_with_colons_are_paths() {
    let sandbox = Sandbox::new();
    if cfg!(windows) {
        return;
    }
    fs::copy(lora("concept_c3_mirror"), sandbox.path("a:0.5")).expect("a copy");
    let events = sandbox.events(&merge(&args(&["a:0.5", "a:0.5:-2"]), "none", &["--dry-run"]));
    let strengths: Vec<_> =
        events.iter().filter(|e| e["event"] == "input").map(|e| e["strength"].clone()).collect();
    assert_eq!(strengths, [json!(1.0), json!(-2.0)]);
}

#[test]
fn schedules_say_who_acts_when() {
    let sandbox = Sandbox::new();
    let (subject, style) = (text(lora("content_heart")), text(lora("style_shade")));
    let of = |method: &str, output: &str, more: &[&str]| {
        let fixed = ["schedule", method, "--subject", &subject, "--style", &style, "-o", output];
        args(&[&fixed[..], more].concat())
    };
    for method in ["k-lora", "est", "craft"] {
        let events = sandbox.events(&of(method, method, &[]));
        let event = event(&events, "schedule");
        assert_eq!((&event["method"], &event["layers"]), (&json!(method), &json!(24)));
        let file: Value =
            serde_json::from_slice(&fs::read(sandbox.path(method)).expect("a file")).expect("JSON");
        assert_eq!(
            (&file["kind"], &file["adapters"][1]["role"]),
            (&json!("loraweld.schedule"), &json!("style"))
        );
        let windows = &file["layers"]["transformer_blocks.2.attn.to_v"]["windows"];
        assert_eq!((&windows[0]["adapter"], &windows[0]["from"]), (&json!(0), &json!(0.0)), "{windows}");
    }
    let (stdout, _) =
        sandbox.succeeds(&of("k-lora", "k-lora", &["--force", "--gamma", "0.5", "--alpha", "0"]));
    assert!(stdout.contains("24 layers") && stdout.contains("wrote"), "{stdout}");
    let authors = ["--force", "--balance", "ratios", "--wrap", "--beta", "1.275"];
    let events = sandbox.events(&of("k-lora", "k-lora", &authors));
    let options = &event(&events, "schedule")["options"];
    assert_eq!((&options["balance"], &options["wrap"]), (&json!("ratios"), &json!(true)), "{options}");
    sandbox.fails(1, &of("k-lora", "new", &["--wrap", "--alpha", "0"]), &["alpha", "above 0"]);
    sandbox.fails(1, &of("est", "est", &[]), &["est", "--force"]);
    sandbox.fails(1, &of("est", &style, &["--force"]), &["style_shade"]);
    sandbox.fails(1, &of("craft", "new", &["--style-from", "2"]), &["0 to 1"]);
    sandbox.fails(1, &of("k-lora", "new", &["--gamma", "0"]), &["gamma"]);
    sandbox.fails(2, &of("k-lora", "new", &["--alpha", "-1"]), &["--alpha"]);
}

/// What `strengths` prints to paste is a merge, at the strengths by layer that were given as well.
#[test]
fn strengths_print_a_merge_that_can_be_pasted() {
    let sandbox = Sandbox::new();
    sandbox.succeeds(&["demo"]);
    let calibration = ["--calibration", "loraweld-demo/calibration.safetensors"];
    let loras = CONCEPTS.map(|name| format!("loraweld-demo/adapters/{name}.safetensors"));
    let by_layer = ["--strength-for", "concept_c7_rot90:transformer_blocks.0.*=0.5"];
    for by_layer in [&[][..], &by_layer] {
        let mut args = vec!["strengths"];
        args.extend(loras.iter().map(String::as_str));
        args.extend(calibration);
        args.extend(by_layer);
        let (stdout, _) = sandbox.succeeds(&args);
        let line = stdout.lines().find(|line| line.starts_with("loraweld merge linear")).expect("a command");
        let words = line.replace('\'', "");
        let words: Vec<&str> = words.split_whitespace().skip(1).collect();
        assert!(by_layer.iter().all(|word| words.contains(word)), "{line}");
        sandbox.succeeds(&[&words[..], &["--force"]].concat());
        // A tag in a prompt has no strengths by layer.
        assert_eq!(stdout.contains("<lora:"), by_layer.is_empty());
    }
    let args = ["strengths", &loras[0], &loras[1], "--per-block"];
    let (_, stderr) = sandbox.succeeds(&[&args, &calibration[..], &by_layer].concat());
    assert!(stderr.contains("no command line can say of blocks"), "{stderr}");
}
