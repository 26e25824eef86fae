//! Writes `capi/include/loraweld.h`; with `--check`, only says whether it is what the sources say.

use std::path::Path;
use std::process::ExitCode;

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let capi = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let config = cbindgen::Config::from_file(capi.join("cbindgen.toml"))?;
    let bindings =
        cbindgen::Builder::new().with_config(config).with_src(capi.join("src/lib.rs")).generate()?;
    let mut made = Vec::new();
    bindings.write(&mut made);
    let path = capi.join("include/loraweld.h");
    if !std::env::args().any(|argument| argument == "--check") {
        std::fs::write(path, made)?;
    } else if String::from_utf8(made)? != std::fs::read_to_string(path)?.replace("\r\n", "\n") {
        eprintln!(
            "capi/include/loraweld.h is not what its sources say: `cargo run` in capi/header writes it anew"
        );
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
