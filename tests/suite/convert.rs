//! `loraweld convert` and `inspect` on families, and strengths by layer, as users meet them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use assert_cmd::cargo::cargo_bin;
use loraweld::Adapter;
use serde_json::Value;
use tempfile::TempDir;

use crate::common::files::{Raw, f32s, file_of, tensors};

struct Folder(TempDir);

impl Folder {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, metadata: &[(&str, &str)], tensors: &[Raw]) {
        fs::write(self.path(name), file_of(metadata, tensors)).unwrap();
    }

    /// The exit code, stdout and stderr.
    fn run(&self, args: &[&str]) -> (i32, String, String) {
        let mut command = Command::new(cargo_bin!("loraweld"));
        let output =
            command.current_dir(self.0.path()).args(args).args(["--device", "cpu"]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    }

    #[track_caller]
    fn succeeds(&self, args: &[&str]) -> (String, String) {
        let (code, stdout, stderr) = self.run(args);
        assert_eq!(code, 0, "{args:?}: {stdout}\n{stderr}");
        (stdout, stderr)
    }

    #[track_caller]
    fn fails(&self, code: i32, args: &[&str], culprits: &[&str]) {
        let (found, stdout, stderr) = self.run(args);
        assert_eq!(found, code, "{args:?}: {stdout}\n{stderr}");
        for culprit in culprits {
            assert!(stderr.contains(culprit), "{args:?}: `{culprit}` is not in: {stderr}");
        }
    }

    #[track_caller]
    fn event(&self, name: &str, args: &[&str]) -> Value {
        let (stdout, _) = self.succeeds(&[args, &["--json"]].concat());
        let events = stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events
            .into_iter()
            .find(|event| event["event"] == name)
            .unwrap_or_else(|| panic!("no {name} in {stdout}"))
    }
}

const QKV: &str = "lora_unet_double_blocks_0_img_attn_qkv";
const LINEAR2: &str = "lora_unet_single_blocks_0_linear2";

/// Files for FLUX: fused by kohya and split by diffusers; and one for Wan.
fn folder() -> Folder {
    let folder = Folder(TempDir::new().unwrap());
    let values = |n: usize| f32s(&(0..n).map(|i| 0.25 + i as f32).collect::<Vec<_>>());
    let key = |module: &str, part: &str| format!("{module}.{part}");
    let (qa, qb) = (key(QKV, "lora_down.weight"), key(QKV, "lora_up.weight"));
    let (la, lb) = (key(LINEAR2, "lora_down.weight"), key(LINEAR2, "lora_up.weight"));
    let (q_alpha, l_alpha) = (key(QKV, "alpha"), key(LINEAR2, "alpha"));
    folder.write(
        "fused.safetensors",
        &[("modelspec.trigger_phrase", "sks cat"), ("modelspec.architecture", "flux-1-dev/lora")],
        &[
            (&qa, "F32", &[2, 4], values(8)),
            (&qb, "F32", &[12, 2], values(24)),
            (&q_alpha, "F32", &[], f32s(&[1.0])),
            (&la, "F32", &[2, 20], values(40)),
            (&lb, "F32", &[4, 2], values(8)),
            (&l_alpha, "F32", &[], f32s(&[2.0])),
        ],
    );
    let at = "transformer.transformer_blocks.0.attn.to_q";
    let single = "transformer.single_transformer_blocks.0.proj_out";
    let (a, b) = (key(at, "lora_A.weight"), key(at, "lora_B.weight"));
    let (sa, sb) = (key(single, "lora_A.weight"), key(single, "lora_B.weight"));
    folder.write(
        "split.safetensors",
        &[("modelspec.architecture", "flux-1-dev/lora")],
        &[
            (&a, "F32", &[1, 4], values(4)),
            (&b, "F32", &[4, 1], values(4)),
            (&sa, "F32", &[1, 20], values(20)),
            (&sb, "F32", &[4, 1], values(4)),
        ],
    );
    let (wa, wb) =
        ("diffusion_model.blocks.0.ffn.0.lora_A.weight", "diffusion_model.blocks.0.ffn.0.lora_B.weight");
    folder.write(
        "wan.safetensors",
        &[],
        &[(wa, "F32", &[1, 4], values(4)), (wb, "F32", &[16, 1], values(16))],
    );
    let lokr = "lora_unet_double_blocks_0_img_mlp_0";
    let (w1, w2) = (key(lokr, "lokr_w1"), key(lokr, "lokr_w2"));
    let wave = |n: usize| f32s(&(0..n).map(|i| (i as f32).sin()).collect::<Vec<_>>());
    folder.write(
        "lokr.safetensors",
        &[("modelspec.architecture", "flux-1-dev/lora")],
        &[(&w1, "F32", &[4, 4], wave(16)), (&w2, "F32", &[4, 4], wave(16))],
    );
    folder
}

#[test]
fn a_file_is_respelled() {
    let folder = folder();
    let args = ["convert", "fused.safetensors", "-o", "peft.safetensors", "--format", "diffusers"];
    let result = folder.event("result", &args);
    assert_eq!(
        (&result["family"], &result["from"], &result["format"]),
        (&"FLUX.1".into(), &"kohya".into(), &"peft".into())
    );
    let file = tensors(&fs::read(folder.path("peft.safetensors")).unwrap());
    let names: Vec<_> =
        file.keys().filter(|name| name.ends_with("lora_B.weight")).map(String::as_str).collect();
    let expected = [
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_v",
    ]
    .map(|m| format!("transformer.{m}.lora_B.weight"));
    assert_eq!(names[0], "transformer.single_transformer_blocks.0.proj_out.lora_B.weight");
    assert_eq!(names[1..], expected);
    let adapter = Adapter::open(folder.path("peft.safetensors")).unwrap();
    assert_eq!(adapter.metadata()["modelspec.trigger_phrase"], "sks cat");
    assert_eq!(adapter.metadata()["loraweld.converted_from"], "kohya");

    let back =
        ["convert", "peft.safetensors", "-o", "back.safetensors", "--format", "kohya", "--dtype", "f16"];
    let (stdout, _) = folder.succeeds(&back);
    assert!(stdout.contains("FLUX.1") && stdout.contains("peft to kohya"), "{stdout}");
    let file = tensors(&fs::read(folder.path("back.safetensors")).unwrap());
    let b = &file[&format!("{QKV}.lora_up.weight")];
    assert_eq!((b.0.as_str(), &b.1[..]), ("F16", &[12, 2][..]));

    folder.fails(1, &args, &["peft.safetensors", "exists already"]);
    folder.fails(
        1,
        &["convert", "fused.safetensors", "-o", "fused.safetensors", "--format", "peft", "--force"],
        &["never"],
    );
    folder.fails(
        1,
        &["convert", "lokr.safetensors", "-o", "x", "--format", "xlabs"],
        &["no module of FLUX.1 that is known to have a name in xlabs"],
    );
    folder.fails(
        2,
        &["convert", "fused.safetensors:0.5", "-o", "x", "--format", "peft"],
        &["--strength-for"],
    );
    folder.fails(2, &["convert", "fused.safetensors", "-o", "x", "--format", "webui"], &["webui", "comfyui"]);
    assert!(!folder.path("x").exists());
}

#[test]
fn spellings_merge_with_strengths_by_layer() {
    let folder = folder();
    let merge = |output: &str, more: &[&str]| {
        let fixed = ["merge", "linear", "fused.safetensors", "split.safetensors:2", "-o", output];
        folder.succeeds(&[&fixed[..], more].concat())
    };
    merge("plain.safetensors", &[]);
    merge(
        "half.safetensors",
        &[
            "--strength-for",
            "fused:double_blocks.*=0.5",
            "--strength-for",
            "*=1",
            "--strength-for",
            "fused:double_blocks.*=0.5",
        ],
    );
    let open = |name: &str| Adapter::open(folder.path(name)).unwrap();
    let (plain, half) = (open("plain.safetensors"), open("half.safetensors"));
    assert_eq!((plain.layers().len(), plain.format().name()), (4, "kohya"));
    assert_eq!(half.metadata()["loraweld.strengths"].matches("double_blocks.*=0.5").count(), 2);
    let norm = |adapter: &Adapter, name: &str| adapter.find(name).unwrap().norm();
    for (name, factor) in
        [("transformer_blocks.0.attn.to_k", 0.5), ("single_transformer_blocks.0.proj_out", 1.0)]
    {
        assert!(
            (norm(&half, name) - factor * norm(&plain, name)).abs() <= 1e-6 * norm(&plain, name),
            "{name}"
        );
    }
    let (_, stderr) = merge("off.safetensors", &["--blocks", "fused:NONE"]);
    assert!(stderr.contains("strength or alpha 0"), "{stderr}");
    // All of the first file is off: q alone is left of the fused module, and what is zero is no layer.
    let off = open("off.safetensors");
    assert!(
        off.find("transformer_blocks.0.attn.to_k").is_none()
            && norm(&off, "transformer_blocks.0.attn.to_q") > 0.0
    );
    let fixed = ["merge", "linear", "fused.safetensors", "split.safetensors", "-o", "x"];
    folder.fails(2, &[&fixed[..], &["--strength-for", "nothing.*=1"]].concat(), &["nothing.*"]);
    folder.fails(2, &[&fixed[..], &["--strength-for", "a=nan"]].concat(), &["finite"]);
    folder.fails(2, &[&fixed[..], &["--blocks", "1,x"]].concat(), &["`x`"]);
    folder.fails(1, &[&fixed[..], &["--blocks", "1,1,1"]].concat(), &["3 block strengths", "61"]);
    folder.fails(1, &[&fixed[..], &["--blocks", "MOST"]].concat(), &["MOST", "FLUX.1"]);
}

#[test]
fn inspect_tells_what_a_file_is_and_why_files_do_not_match() {
    let folder = folder();
    let (stdout, _) = folder.succeeds(&["inspect", "fused.safetensors"]);
    for expected in ["FLUX.1", "sks cat", "norm of the update", "D00", "S00", "alpha 1, alpha tensor"] {
        assert!(stdout.contains(expected), "{expected}: {stdout}");
    }
    let adapter = folder.event("adapter", &["inspect", "fused.safetensors"]);
    assert_eq!((&adapter["family"], &adapter["layers"]), (&"FLUX.1".into(), &4.into()));
    let q = &adapter["modules"].as_array().unwrap()[1];
    assert_eq!(q["fused_in"], "double_blocks_0_img_attn_qkv");
    assert!(q["norm"].as_f64().is_some_and(|norm| norm > 0.0));
    let found = folder.event("match", &["inspect", "fused.safetensors", "split.safetensors"]);
    assert_eq!(found["in_all"], 2);
    let (stdout, _) = folder.succeeds(&["inspect", "fused.safetensors", "wan.safetensors"]);
    assert!(stdout.contains("it is for FLUX.1, and wan for Wan"), "{stdout}");
    let (stdout, _) = folder.succeeds(&["inspect", "fused.safetensors", "--alpha", "4"]);
    assert!(stdout.contains("2 (alpha 4, --alpha)"), "{stdout}");
}

#[test]
fn other_kinds_become_loras_if_that_is_allowed() {
    let folder = folder();
    let convert = ["convert", "lokr.safetensors", "-o", "lora.safetensors", "--format", "same", "--force"];
    let (_, stderr) = folder.succeeds(&convert);
    assert!(stderr.contains("1 layer of LoKr became LoRAs of rank 16 at most, exactly"), "{stderr}");
    let (_, stderr) = folder.succeeds(&[&convert[..], &["--allow-truncate", "3"]].concat());
    assert!(stderr.contains("LoKr") && stderr.contains("was cut off"), "{stderr}");
    let adapter = Adapter::open(folder.path("lora.safetensors")).unwrap();
    assert_eq!((adapter.layers()[0].rank(), adapter.format().name()), (3, "kohya"));
    let merge = ["merge", "linear", "lokr.safetensors", "-o", "m.safetensors", "--allow-truncate", "3"];
    let result = folder.event("result", &merge);
    let notes = result["report"]["notes"].as_array().unwrap();
    assert!(notes.iter().any(|note| note.as_str().unwrap().contains("was cut off")), "{notes:?}");
}

#[test]
fn what_nobody_could_cut_apart_again_is_not_fused() {
    let folder = Folder(TempDir::new().unwrap());
    let values = |n: usize| f32s(&(0..n).map(|i| 0.25 + i as f32).collect::<Vec<_>>());
    // A third of all rows for each would be wrong for the first, and is not to be had for the second.
    for rows in [[8, 6, 4], [7, 6, 6]] {
        let keys = ["q", "k", "v"].map(|part| {
            let at = format!("transformer.transformer_blocks.2.attn.to_{part}");
            [format!("{at}.lora_A.weight"), format!("{at}.lora_B.weight")]
        });
        let shapes = rows.map(|rows| [rows, 2]);
        let tensors: Vec<Raw> = keys
            .iter()
            .zip(&shapes)
            .flat_map(|([a, b], shape)| {
                [(&**a, "F32", &[2, 6][..], values(12)), (&**b, "F32", shape, values(2 * shape[0]))]
            })
            .collect();
        folder.write("split.safetensors", &[], &tensors);
        folder.succeeds(&["convert", "split.safetensors", "-o", "x", "--format", "diffusers", "--force"]);
        let convert = ["convert", "split.safetensors", "-o", "y", "--format", "bfl"];
        folder.fails(1, &convert, &["transformer_blocks.2.attn.to_q", "keeps them apart"]);
        assert!(!folder.path("y").exists());
    }
}
