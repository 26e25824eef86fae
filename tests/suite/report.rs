//! Reports that people look at.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use assert_cmd::cargo::cargo_bin;
use loraweld::{Adapter, Format, Layer, Matrix, SaveOptions};
use serde_json::Value;
use tempfile::TempDir;

fn lora(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/loras");
    path.join(format!("{name}.safetensors")).display().to_string()
}

struct Sandbox(TempDir);

impl Sandbox {
    fn new() -> Self {
        Self(TempDir::new().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, args: &[&str]) -> String {
        let mut command = Command::new(cargo_bin!("loraweld"));
        let output = command.current_dir(self.0.path()).args(args).args(["--device", "cpu"]).output();
        let output = output.expect("the program starts");
        let [stdout, stderr] =
            [&output.stdout, &output.stderr].map(|s| String::from_utf8_lossy(s).into_owned());
        assert!(output.status.success(), "{args:?}: {stdout}{stderr}");
        stdout
    }

    /// A page, which loads nothing and is small.
    fn page(&self, name: &str) -> String {
        let page = fs::read_to_string(self.path(name)).expect("the page");
        for word in ["src=", "http://", "https://", "@import", "url(", "<link rel=\"stylesheet\""] {
            assert!(!page.contains(word), "{name} has {word}");
        }
        assert_eq!(page.matches("href=").count(), page.matches("href=\"data:,\"").count(), "{name}");
        assert_eq!((page.matches("<script>").count(), page.matches("</html>").count()), (1, 1), "{name}");
        assert!(page.contains("What to try next") && page.contains(env!("CARGO_PKG_VERSION")), "{name}");
        assert_eq!(page.matches("<strong>").count(), 3, "{name}: numbers of the first screen");
        assert!(page.len() < 2 << 20, "{name}: {} bytes", page.len());
        page
    }

    /// Runs a merge twice, and checks that the page has what the JSON tells of each layer.
    fn both(&self, args: &[&str]) -> String {
        let more = |report| [args, &["-o", "out.safetensors", "--force", "--report", report]].concat();
        self.run(&more("report.json"));
        self.run(&more("report.html"));
        let text = fs::read_to_string(self.path("report.json")).expect("the report");
        let json: Value = serde_json::from_str(&text).expect("JSON");
        let page = self.page("report.html");
        for input in json["inputs"].as_array().expect("inputs") {
            for field in ["name", "sha256"] {
                assert!(page.contains(input[field].as_str().expect("text")), "{field}");
            }
        }
        for layer in json["layers"].as_array().expect("layers") {
            let name = layer["layer"].as_str().expect("a name");
            let row = page.lines().rfind(|line| line.contains(&format!(">{name}<"))).expect(name);
            let losses = ["merged", "sum", "average"].map(|of| layer["losses"][of].as_f64());
            let losses = losses.into_iter().flatten().map(|loss| format!(">{loss:.3}<"));
            let cut = layer["cut"].as_f64().map(|cut| format!(">{:.1}%<", 100.0 * cut));
            let rank = format!(">{}<", layer["rank"]);
            for figure in losses.chain(cut).chain([rank]) {
                assert!(row.contains(&figure), "{figure} is not in {row}");
            }
            for task in json["tasks"].as_array().into_iter().flatten() {
                let loss = format!(">{:.3}<", task["merged"].as_f64().expect("a loss"));
                assert!(page.contains("Who loses what") && page.contains(&loss), "{task}");
            }
            for of in ["spectrum", "style"].iter().filter(|of| layer[**of].is_object()) {
                let (values, kept) = (&layer[of]["values"], layer[of]["kept"].as_u64().expect("a number"));
                let does = if *of == "style" { "keeps clear" } else { "keeps" };
                let shown = format!("{does} {kept} of {}", values.as_array().expect("values").len());
                let is_module = |line: &&str| line.contains("<b>") && line.contains(&shown);
                assert!(page.lines().any(|line| is_module(&line)), "{shown} of {name}");
            }
            for p in layer["projections"].as_array().into_iter().flatten() {
                let removed = format!(">{:.1}%<", 100.0 * p["removed"].as_f64().expect("a share"));
                let is_row = |line: &&str| line.contains(&format!(">{name}<")) && line.contains(&removed);
                assert!(page.lines().any(|line| is_row(&line)), "{removed} of {name}");
            }
        }
        let answers = json["routing"]["answers"].as_array().into_iter().flatten();
        for answer in answers.flat_map(|row| row.as_array().expect("a row")) {
            let answer = format!(">{:.3}<", answer.as_f64().expect("a number"));
            assert!(page.contains("Who feeds whom") && page.contains(&answer), "{answer}");
        }
        page
    }
}

#[test]
fn pages_tell_what_the_json_tells() {
    let sandbox = Sandbox::new();
    let shown = sandbox.run(&["demo"]);
    assert!(shown.contains("report.html"), "{shown}");
    let page = sandbox.page("loraweld-demo/report.html");
    assert!(page.contains("4 adapters merged by ssr") && page.contains("transformer_blocks.*"), "{page}");

    let [mirror, rot90] = ["concept_c3_mirror", "concept_c7_rot90"].map(lora);
    let calibration = ["--calibration", "loraweld-demo/calibration.safetensors"];
    let page = sandbox.both(&[&["merge", "ssr", &mirror, &rot90][..], &calibration].concat());
    assert!(page.contains("loss of the plain sum") && page.contains("loraweld compare"), "{page}");
    assert!(page.contains("Who loses what") && page.contains("before and after"), "{page}");
    assert!(page.contains("Who feeds whom") && !page.contains("Spectr"), "{page}");
    // A block's norm is that of its layers together, before and after.
    let norm = |path: &str| {
        let adapter = Adapter::open(path).expect("an adapter");
        let of_block =
            adapter.layers().iter().filter(|layer| layer.name().starts_with("transformer_blocks.0."));
        of_block.map(|layer| layer.norm().powi(2)).sum::<f64>().sqrt()
    };
    let merged = sandbox.path("out.safetensors").display().to_string();
    for path in [&mirror, &rot90, &merged] {
        assert!(page.contains(&format!(">{:.3}<", norm(path))), "the norm of {path}");
    }
    let [style, heart] = ["style_gradient", "content_heart"].map(lora);
    let page = sandbox.both(&["merge", "np-lora", "--style", &style, "--subject", &heart]);
    assert!(page.contains("style_gradient is kept whole") && page.contains("interference"), "{page}");
    assert!(page.contains("Spectrum of the style") && !page.contains("Who feeds whom"), "{page}");
    let page = sandbox.both(&["merge", "linear", &mirror, &rot90, "--rank", "4"]);
    assert!(page.contains("The rank was lowered") && page.contains("loraweld calibrate"), "{page}");
    assert!(page.contains("Spectra, and where they were cut"), "{page}");
    sandbox.both(&["resize", &mirror, "--rank", "2"]);
    let page = sandbox.both(&["resize", &mirror, "--rank", "64"]);
    assert!(page.contains("so nothing was cut off") && !page.contains("loraweld calibrate"), "{page}");

    let methods = ["--methods", "ssr,linear,ties", "-o", "methods.json", "--report", "methods.html"];
    sandbox.run(&[&["compare", &mirror, &rot90][..], &calibration, &methods].concat());
    let page = sandbox.page("methods.html");
    let text = fs::read_to_string(sandbox.path("methods.json")).expect("the table");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    for method in json["methods"].as_array().expect("methods") {
        assert!(page.contains(&format!(">{}<", method["method"].as_str().expect("a name"))));
        for layer in method["layers"].as_array().expect("layers") {
            let name = layer["layer"].as_str().expect("a name");
            let row =
                page.lines().rfind(|line| line.contains(&format!(r#"<th scope="row">{name}<"#))).expect(name);
            let loss = format!("{:.3}", layer["losses"]["merged"].as_f64().expect("a loss"));
            assert!(row.contains(&loss), "{loss} is not in {row}");
        }
    }
}

#[test]
fn calibrations_to_look_at() {
    let sandbox = Sandbox::new();
    sandbox.run(&["demo"]);
    let show = ["calibration", "show", "loraweld-demo/calibration.safetensors", "--report"];
    sandbox.run(&[&show[..], &["recorded.html"]].concat());
    let page = sandbox.page("recorded.html");
    for words in
        ["What 4 adapters read", ">192<", "Every layer was recorded", "How alike", "concept_c4_invert"]
    {
        assert!(page.contains(words), "{words}: {page}");
    }
    // The command of the page is the one that ran.
    assert!(
        page.contains("calibration show loraweld-demo/calibration.safetensors --report recorded.html"),
        "{page}"
    );
    let refused = Command::new(cargo_bin!("loraweld"))
        .current_dir(sandbox.path("."))
        .args(show)
        .arg("recorded.json")
        .output()
        .expect("the program starts");
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(2) && stderr.contains("a page ends in .html"), "{stderr}");
}

#[test]
fn adapters_beside_each_other() {
    let sandbox = Sandbox::new();
    let [mirror, rot90] = ["concept_c3_mirror", "concept_c7_rot90"].map(lora);
    sandbox.run(&["inspect", &mirror, &rot90, "--overlap", "--report", "overlap.html"]);
    let page = sandbox.page("overlap.html");
    let adapter = Adapter::open(&mirror).expect("an adapter");
    for layer in adapter.layers() {
        assert!(page.contains(&format!(">{}<", layer.name())), "{}", layer.name());
        assert!(page.contains(&format!(">{:.3}<", layer.norm())), "the norm of {}", layer.name());
    }
    assert!(
        page.contains("concept_c3_mirror disturbs concept_c7_rot90 most") && page.contains("largest overlap"),
        "{page}"
    );
    sandbox.run(&["inspect", &mirror, "--report", "one.html"]);
    assert!(sandbox.page("one.html").contains("This LoRA changes 24 layers"));
}

#[test]
#[cfg(unix)]
fn names_are_escaped() {
    let sandbox = Sandbox::new();
    let hostile = "x<script>alert(1)<b>&\"'.safetensors";
    fs::copy(lora("concept_c3_mirror"), sandbox.path(hostile)).expect("a copy");
    sandbox.run(&[
        "merge",
        "linear",
        hostile,
        &lora("concept_c7_rot90"),
        "-o",
        "out",
        "--report",
        "out.HTML",
    ]);
    let page = sandbox.page("out.HTML");
    assert!(!page.contains("<script>alert") && !page.contains("<b>&"), "{page}");
    assert!(page.contains("alert(1)"), "{page}");
}

#[test]
fn a_page_of_many_layers_is_small() {
    let sandbox = Sandbox::new();
    let adapter = |name: &str, seed: usize| {
        let value = |i: usize, j: usize| ((i * 31 + j * 17 + seed * 7) % 13) as f32 / 13.0 - 0.5;
        let modules = [
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "ff.net.0.proj",
            "ff.net.2",
            "norm.linear",
            "proj",
        ];
        let layers =
            (0..38).flat_map(|block| modules.map(|m| format!("transformer.transformer_blocks.{block}.{m}")));
        let layers = layers.enumerate().map(|(i, key)| {
            let [a, b] = [
                Matrix::from_fn(2, 8, |r, c| value(r, c + i)),
                Matrix::from_fn(8, 2, |r, c| value(r + i, c)),
            ];
            Layer::new(&key, a, b).expect("a layer")
        });
        let adapter = Adapter::new(name, Format::Peft, layers.collect()).expect("an adapter");
        adapter.save(sandbox.path(name), &SaveOptions::default()).expect("it is written");
    };
    adapter("style.safetensors", 1);
    adapter("subject.safetensors", 2);
    let page = sandbox.both(&[
        "merge",
        "np-lora",
        "--style",
        "style.safetensors",
        "--subject",
        "subject.safetensors",
    ]);
    assert!(page.contains(">304<"), "{page}");
    println!("{} bytes for 304 layers", page.len());
}
