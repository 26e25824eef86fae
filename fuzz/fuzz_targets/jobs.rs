//! Any text for a file of jobs, and for the record of an earlier run: what `loraweld batch --dry-run` reads.
#![no_main]

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use loraweld::Device;
use loraweld::cli::{Host, Told, run_for};

/// A folder of its own, so that relative names lead to what is there.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().expect("a folder");
        std::env::set_current_dir(folder.path()).expect("it is there");
        std::fs::create_dir("results").expect("a folder");
        std::fs::write("a", "one").expect("a file");
        folder
    };
    FOLDER.get_or_init(make).path()
}

libfuzzer_sys::fuzz_target!(|input: (&str, Option<&str>, Option<&str>)| {
    let (jobs, record, grid) = input;
    // Names beyond the folder lead to what takes long to read, or never ends.
    if [jobs, record.unwrap_or_default()].iter().any(|text| text.contains(['/', '\\'])) {
        return;
    }
    let folder = folder();
    std::fs::write(folder.join("jobs.jsonl"), jobs).expect("a file");
    std::fs::write(folder.join("results/shard-1-of-1.jsonl"), record.unwrap_or_default()).expect("a file");
    let listed = Arc::new(Mutex::new(0));
    let lines = listed.clone();
    let host = Arc::new(Host {
        adapters: Vec::new(),
        calibrations: Vec::new(),
        device: |_| Ok(Device::cpu()),
        tell: Box::new(move |told| {
            if let Told::Event(event) = told {
                *lines.lock().expect("no panics") += usize::from(event["event"] == "job");
            }
        }),
        cancel: Arc::new(AtomicBool::new(false)),
    });
    let mut words = vec!["loraweld", "batch", "jobs.jsonl", "--dry-run", "--results", "results"];
    words.extend(grid.iter().flat_map(|grid| ["--grid", grid]));
    if run_for(&host, words).is_ok() {
        // A line is no less than one job.
        let least = jobs.lines().filter(|line| !line.trim().is_empty()).count();
        assert!(*listed.lock().expect("no panics") >= least);
    }
});
