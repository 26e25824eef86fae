//! Lists the records of model families, `src/adapter/families/*.names`, so that adding one is adding a file.

use std::fmt::Write;
use std::path::{Path, PathBuf};

fn main() {
    let folder = Path::new(&var("CARGO_MANIFEST_DIR")).join("src/adapter/families");
    println!("cargo::rerun-if-changed={}", folder.display());
    let entries = std::fs::read_dir(&folder).expect("src/adapter/families should be a folder");
    let paths = entries.map(|entry| entry.expect("its entries should be readable").path());
    let mut files: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|e| e == "names")).collect();
    files.sort();
    let mut list = String::from("&[\n");
    for file in files {
        println!("cargo::rerun-if-changed={}", file.display());
        let id = file.file_stem().expect("a file has a name").to_string_lossy();
        writeln!(list, "    ({id:?}, include_str!({:?})),", file.display().to_string())
            .expect("a string takes all text");
    }
    list.push(']');
    std::fs::write(Path::new(&var("OUT_DIR")).join("families.rs"), list).expect("OUT_DIR should be writable");
}

fn var(name: &str) -> String {
    std::env::var(name).expect("cargo sets it for build scripts")
}
