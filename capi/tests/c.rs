//! C programs do through the header what Rust does.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use loraweld::{
    Adapter, Calibration, Control, Device, Dtype, Format, Layer, Matrix, SaveOptions, Source, Ssr, Unnamed,
};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn data(name: &str) -> PathBuf {
    Path::new(ROOT).join("tests/data").join(name)
}

/// A C compiler, and where what it makes goes; `None`, with a message, if there is none.
struct Cc {
    out: tempfile::TempDir,
}

impl Cc {
    fn find() -> Option<Self> {
        let works =
            |name: &str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
        if cfg!(windows) || !works("cc") {
            eprintln!("skipped: there is no C compiler `cc`");
            return None;
        }
        Some(Self { out: tempfile::tempdir().unwrap() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.out.path().join(name)
    }

    /// Compiles and links a program.
    fn build(&self, source: &str, dynamic: bool) -> PathBuf {
        let name = Path::new(source).file_stem().unwrap();
        let program = self.out.path().join(name);
        // Cargo puts the libraries beside this test.
        let test = std::env::current_exe().unwrap();
        let libraries = test.parent().unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-std=c11", "-D_POSIX_C_SOURCE=200809L", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror"])
            .arg(format!("-I{ROOT}/capi/include"))
            .arg(Path::new(ROOT).join(source))
            .arg("-o")
            .arg(&program);
        match dynamic {
            true => cc
                .arg(format!("-L{}", libraries.display()))
                .arg(format!("-Wl,-rpath,{}", libraries.display()))
                .args(["-lloraweld_c", "-lpthread"]),
            // What `rustc --print native-static-libs` says of Linux.
            false => cc.arg(libraries.join("libloraweld_c.a")).args([
                "-lgcc_s",
                "-lutil",
                "-lrt",
                "-lpthread",
                "-lm",
                "-ldl",
            ]),
        };
        run(&mut cc);
        program
    }
}

/// Runs a command that must succeed, and gives what it says.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} failed, {}\n{out}\n{err}", output.status);
    out.into_owned()
}

#[test]
fn the_example_writes_what_rust_writes() {
    let Some(cc) = Cc::find() else { return };
    let names = ["concept_c3_mirror", "concept_c7_rot90"];
    let adapters = names.map(|name| data(&format!("loras/{name}.safetensors")));
    let activations = names.map(|name| data(&format!("activations/step1/{name}.safetensors")));
    let (by_c, by_rust) = (cc.path("by_c.safetensors"), cc.path("by_rust.safetensors"));
    let program = cc.build("examples/c/merge.c", !cfg!(target_os = "linux"));
    let args: [&Path; 6] =
        [OsStr::new("cpu").as_ref(), &by_c, &adapters[0], &activations[0], &adapters[1], &activations[1]];
    let said = run(Command::new(&program).args(args));
    assert!(said.contains("merge 24/24") && said.contains("\"method\":\"ssr\""), "{said}");

    let device = Device::cpu();
    let adapters = adapters.each_ref().map(|path| Adapter::open(path).unwrap());
    let mut calibration = Calibration::new(&adapters).unwrap();
    for (task, path) in activations.iter().enumerate() {
        calibration.accumulate_path(&device, Source::Task(task), path, &Control::default()).unwrap();
    }
    let merged = Ssr::new(&calibration).merge(&device, &[adapters[0].at(1.0), adapters[1].at(1.0)]).unwrap();
    let options = SaveOptions {
        dtype: Some(Dtype::F16),
        format: Some(Format::Kohya),
        unnamed: Unnamed::Keep,
        ..SaveOptions::default()
    };
    merged.adapter.save(&by_rust, &options).unwrap();
    assert!(std::fs::read(&by_c).unwrap() == std::fs::read(&by_rust).unwrap(), "the files differ");
    // It does not replace what is there, and says so.
    let again = Command::new(&program).args(args).output().unwrap();
    let said = String::from_utf8(again.stderr).unwrap();
    assert!(!again.status.success() && said.contains("by_c.safetensors"), "{said}");
}

/// An adapter that takes a while to merge.
fn large(name: &str) -> Adapter {
    let mut state = name.bytes().map(u64::from).sum::<u64>();
    let mut value = |_: usize, _: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / 16_777_216.0 - 0.5
    };
    let (layers, width, rank) = (12, 2048, 48);
    let mut layer = |i| {
        let (a, b) = (Matrix::from_fn(rank, width, &mut value), Matrix::from_fn(width, rank, &mut value));
        Layer::new(&format!("blocks.{i}.to_q"), a, b).unwrap()
    };
    let layers = (0..layers).map(&mut layer).collect();
    Adapter::new(name, Format::Peft, layers).unwrap()
}

#[test]
fn what_a_host_in_c_relies_on() {
    let Some(cc) = Cc::find() else { return };
    let files = ["large_1", "large_2"].map(|name| {
        let path = cc.path(&format!("{name}.safetensors"));
        large(name).save(&path, &SaveOptions::default()).unwrap();
        path
    });
    let program = cc.build("capi/tests/check.c", true);
    let scratch = cc.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let said = run(Command::new(program).arg(data("")).arg(&scratch).args(&files));
    println!("{said}");
    assert!(said.ends_with("all checks passed\n"), "{said}");
}

#[test]
fn the_header_is_cpp_as_well() {
    let Some(cc) = Cc::find() else { return };
    let source = cc.path("host.cpp");
    let text = "#include <loraweld.h>\nint main() { return loraweld_version()[0] == 0; }\n";
    std::fs::write(&source, text).unwrap();
    if !Command::new("c++").arg("--version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: there is no C++ compiler `c++`");
        return;
    }
    run(Command::new("c++")
        .args(["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"])
        .arg(format!("-I{ROOT}/capi/include"))
        .arg(&source));
}
