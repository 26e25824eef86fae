//! `loraweld batch`: every output once, whatever happens to the processes that make them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;
use tempfile::TempDir;

/// A folder with two adapters.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(TempDir::new().expect("a temporary folder"));
        let loras = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/loras");
        for (from, to) in [("concept_c3_mirror", "cat"), ("concept_c7_rot90", "dog")] {
            let to = folder.path(&format!("{to}.safetensors"));
            fs::copy(loras.join(format!("{from}.safetensors")), to).expect("the fixture");
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn jobs(&self, lines: &[&str]) {
        fs::write(self.path("jobs.jsonl"), lines.join("\n")).expect("it can be written");
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(cargo_bin!("loraweld"));
        for name in ["SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "RUST_LOG"] {
            command.env_remove(name);
        }
        command.current_dir(self.0.path()).args(args).args(["--device", "cpu"]);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the program starts")
    }

    /// Runs the batch, and gives the lines that it says were done, skipped and failed.
    fn batch(&self, args: &[&str]) -> [Vec<u64>; 3] {
        let output = self.run(&[&["batch", "jobs.jsonl", "--json"], args].concat());
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let lines = |name: &str| {
            let named = events.iter().filter(|event| event["event"] == name);
            named.map(|event| event["line"].as_u64().expect("a line")).collect::<Vec<_>>()
        };
        let all = ["done", "skipped", "failed"].map(lines);
        assert_eq!(output.status.code(), Some(i32::from(!all[2].is_empty())), "{text}");
        all
    }

    /// The records of all shards.
    fn records(&self) -> Vec<Value> {
        let files = fs::read_dir(self.path("jobs.results")).expect("results");
        let text = files.map(|file| fs::read_to_string(file.expect("a file").path()).expect("text"));
        let text: String = text.collect();
        text.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_job_is_done_again_only_if_something_changed() {
    let folder = Folder::new();
    folder.jobs(&[
        r#""merge linear cat.safetensors:0.5 dog.safetensors -o half.safetensors""#,
        r#"["resize", "dog.safetensors", "--rank", "4", "-o", "low.safetensors"]"#,
        r#""inspect dog.safetensors""#,
    ]);
    assert_eq!(folder.batch(&[]), [vec![1, 2, 3], vec![], vec![]]);
    assert_eq!(folder.batch(&[]), [vec![], vec![1, 2, 3], vec![]]);
    // An output that is gone is made again.
    fs::remove_file(folder.path("low.safetensors")).expect("it is there");
    assert_eq!(folder.batch(&[]), [vec![2], vec![1, 3], vec![]]);
    // An output that somebody changed is theirs.
    let half = fs::read(folder.path("half.safetensors")).expect("it is there");
    fs::write(folder.path("half.safetensors"), "theirs").expect("it can be written");
    assert_eq!(folder.batch(&[]), [vec![], vec![2, 3], vec![1]]);
    assert_eq!(fs::read(folder.path("half.safetensors")).expect("it is there"), b"theirs");
    assert_eq!(folder.batch(&["--force"]), [vec![1], vec![2, 3], vec![]]);
    assert_eq!(fs::read(folder.path("half.safetensors")).expect("it is there"), half);
    // An input that changed makes another job, whose output is in the way of the old one.
    fs::copy(folder.path("cat.safetensors"), folder.path("dog.safetensors")).expect("it can be written");
    assert_eq!(folder.batch(&[]), [vec![3], vec![], vec![1, 2]]);
    assert_eq!(folder.batch(&["--force"]), [vec![1, 2], vec![3], vec![]]);
    let events =
        folder.records().into_iter().find(|r| r["event"] == "done").expect("a record")["events"].clone();
    assert!(events.as_array().expect("events").iter().any(|event| event["report"]["method"] == "linear"));
}

#[test]
fn one_bad_job_does_not_stop_the_rest() {
    let folder = Folder::new();
    folder.jobs(&[
        r#""merge linear cat.safetensors missing.safetensors -o x.safetensors""#,
        "no JSON",
        "",
        r#""merge svd cat.safetensors cat.safetensors -o y.safetensors""#,
        r#""resize dog.safetensors --rank 4 -o dog.safetensors --force""#,
        r#""resize cat.safetensors --rank 4 -o z.safetensors""#,
    ]);
    let output = folder.run(&["batch", "jobs.jsonl"]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for (line, words) in [
        (1, "missing.safetensors: cannot open"),
        (2, "is no job"),
        (4, "--rank"),
        (5, "dog.safetensors: is the input"),
    ] {
        let found = text.lines().find(|l| l.starts_with(&format!("error: line {line}: ")));
        assert!(found.is_some_and(|found| found.contains(words)), "line {line}: {text}");
    }
    assert!(
        text.ends_with("error: jobs.jsonl: 4 of 5 jobs failed: line 1, line 2, line 4, line 5\n"),
        "{text}"
    );
    assert!(folder.path("z.safetensors").exists());
    let failed: Vec<_> = folder.records().into_iter().filter(|r| r["event"] == "failed").collect();
    assert!(failed.iter().any(|r| r["error"].as_str().is_some_and(|e| e.contains("missing.safetensors"))));
}

#[test]
fn what_can_only_be_a_slip_is_refused_before_anything_runs() {
    let folder = Folder::new();
    let good = r#""resize cat.safetensors --rank 4 -o good.safetensors""#;
    folder.jobs(&[good, r#""resize cat.safetensors:{s} --rank 2 -o x.safetensors""#]);
    for (args, words) in [
        (&["--grid", "s=1,2"][..], "writes x.safetensors more than once"),
        (&["--grid", "t=1,2"][..], "no line has `{t}`"),
        (&["--grid", "s=1:2"][..], "expected FROM:TO:STEP"),
        (&["--shard", "3/2"][..], "expected I/N"),
        (&["--shards", "2"][..], "nothing says which of them this is"),
    ] {
        let output = folder.run(&[&["batch", "jobs.jsonl"], args].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(words), "{args:?}: {}", stderr(&output));
    }
    let output = folder.command(&["batch", "jobs.jsonl"]).env("JOB_COMPLETION_INDEX", "1").output();
    assert!(stderr(&output.expect("the program starts")).contains("add `--shards N`"));
    assert!(!folder.path("good.safetensors").exists() && !folder.path("jobs.results").exists());
}

/// Four processes share the jobs; one is killed again and again, and begun again.
#[test]
fn shards_that_are_killed_make_every_output_once() {
    let (shards, values) = (4, "0.1:1:0.05");
    let folder = Folder::new();
    folder.jobs(&[
        r#""merge linear cat.safetensors:{s} dog.safetensors -o linear-{s}.safetensors""#,
        r#""merge ties cat.safetensors:{s} dog.safetensors --rank 4 -o ties-{s}.safetensors""#,
    ]);
    let grid = format!("s={values}");
    let start = |shard: usize| -> Child {
        let mut command = folder.command(&["batch", "jobs.jsonl", "--quiet", "--grid", &grid]);
        // As Slurm would tell it.
        for (name, value) in [("ID", shard), ("MIN", 0), ("MAX", shards - 1)] {
            command.env(format!("SLURM_ARRAY_TASK_{name}"), value.to_string());
        }
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program starts")
    };
    let others: Vec<Child> = (1..shards).map(start).collect();
    for millis in [1, 5, 20, 40, 60, 80, 100, 150] {
        let mut killed = start(0);
        std::thread::sleep(Duration::from_millis(millis));
        killed.kill().expect("it can be killed, or has ended");
        killed.wait().expect("it has ended");
    }
    for mut shard in others.into_iter().chain([start(0)]) {
        assert!(shard.wait().expect("it has ended").success());
    }
    let outputs: Vec<_> = (2..=20).flat_map(|i| [("linear", i), ("ties", i)]).collect();
    for (method, i) in &outputs {
        let value = f64::from(*i) / 20.0;
        let made = fs::read(folder.path(&format!("{method}-{value}.safetensors"))).expect("an output");
        let cat = format!("cat.safetensors:{value}");
        let rank: &[&str] = if *method == "ties" { &["--rank", "4"] } else { &[] };
        let args = [&["merge", method, &cat, "dog.safetensors", "--force", "-o", "alone.safetensors"], rank]
            .concat();
        assert!(folder.run(&args).status.success());
        // Files of metadata, which name no output, and so are equal as well.
        assert_eq!(made, fs::read(folder.path("alone.safetensors")).expect("an output"), "{method} {value}");
    }
    let done = folder.records().into_iter().filter(|r| r["event"] == "done").count();
    assert_eq!(done, outputs.len());
    let left = fs::read_dir(folder.0.path()).expect("the folder").flatten().map(|f| f.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains(".tmp")).collect();
    // What a killed process leaves goes when its target is written again.
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn one_shard_is_one_process() {
    let folder = Folder::new();
    folder.jobs(&[r#""inspect cat.safetensors""#]);
    assert_eq!(folder.batch(&[]), [vec![1], vec![], vec![]]);
    let file = fs::File::open(folder.path("jobs.results/shard-1-of-1.jsonl")).expect("it is there");
    file.lock().expect("it can be locked");
    let output = folder.run(&["batch", "jobs.jsonl"]);
    assert!(stderr(&output).contains("another process is at work on shard 1/1"), "{}", stderr(&output));
    drop(file);
    // Half a record is what a process that was killed leaves; what is no record is not passed over.
    let path = folder.path("jobs.results/shard-1-of-1.jsonl");
    let whole = fs::read_to_string(&path).expect("it is there");
    fs::write(&path, format!("{whole}{{\"event\":\"sta")).expect("it can be written");
    assert_eq!(folder.batch(&[]), [vec![], vec![1], vec![]]);
    fs::write(&path, format!("nothing\n{whole}")).expect("it can be written");
    let output = folder.run(&["batch", "jobs.jsonl"]);
    assert!(stderr(&output).contains("line 1 is no record of a batch"), "{}", stderr(&output));
}
