//! Lists the records of model families, `src/adapter/families/*.names`, and the shaders, `shaders/**/*.wgsl`, so that adding
//! one is adding a file.

use std::fmt::Write;
use std::path::{Path, PathBuf};

fn main() {
    for (folder, extension, out) in
        [("src/adapter/families", "names", "families.rs"), ("shaders", "wgsl", "shaders.rs")]
    {
        let out = Path::new(&var("OUT_DIR")).join(out);
        std::fs::write(out, list(folder, extension)).expect("OUT_DIR should be writable");
    }
}

/// A slice of the files of a folder, sorted: the path within it, without the extension, and the text.
fn list(folder: &str, extension: &str) -> String {
    let folder = Path::new(&var("CARGO_MANIFEST_DIR")).join(folder);
    let mut files = Vec::new();
    find(&folder, extension, &mut files);
    let name = |file: &PathBuf| {
        let name = file.strip_prefix(&folder).expect("it was found there").with_extension("");
        name.to_string_lossy().replace('\\', "/")
    };
    let mut named: Vec<(String, PathBuf)> = files.into_iter().map(|file| (name(&file), file)).collect();
    named.sort();
    let mut list = String::from("&[\n");
    for (name, file) in named {
        writeln!(list, "    ({name:?}, include_str!({:?})),", file.display().to_string())
            .expect("a string takes all text");
    }
    list.push(']');
    list
}

fn find(folder: &Path, extension: &str, files: &mut Vec<PathBuf>) {
    println!("cargo::rerun-if-changed={}", folder.display());
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    for path in entries.map(|entry| entry.expect("its entries should be readable").path()) {
        if path.is_dir() {
            find(&path, extension, files);
        } else if path.extension().is_some_and(|e| e == extension) {
            println!("cargo::rerun-if-changed={}", path.display());
            files.push(path);
        }
    }
}

fn var(name: &str) -> String {
    std::env::var(name).expect("cargo sets it for build scripts")
}
