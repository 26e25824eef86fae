//! Situations from public reports of people who merge, convert, resize and load LoRAs, rebuilt as small files in
//! `tests/data/field`: what has to come out of each, by a reader of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use assert_cmd::cargo::cargo_bin;
use loraweld::{Adapter, Family, Format, Matrix};
use safetensors::SafeTensors;
use tempfile::TempDir;

use crate::common::fixtures::{Tensors, data, delta};
use crate::common::product;

fn path(name: &str) -> PathBuf {
    data(&format!("field/{name}"))
}

/// Suffixes of A, and those of B.
const SUFFIXES: [(&str, &str); 5] = [
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".down.weight", ".up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
];

/// The updates of a file's modules as a plain loader applies them: alpha tensor / rank, else 1, times B · A.
fn updates(path: &PathBuf) -> BTreeMap<String, Matrix> {
    let file = Tensors::open(path);
    let names: BTreeSet<String> = file.names().into_iter().collect();
    let mut all = BTreeMap::new();
    for name in &names {
        let Some((module, up)) =
            SUFFIXES.iter().find_map(|(a, b)| Some((name.strip_suffix(a)?.to_owned(), *b)))
        else {
            continue;
        };
        let (a, b) = (file.get(name), file.get(&format!("{module}{up}")));
        let alpha = format!("{module}.alpha");
        let scale = if names.contains(&alpha) { file.get(&alpha).data()[0] / a.rows() as f64 } else { 1.0 };
        let b = Matrix::new(b.rows(), a.rows(), b.data().iter().map(|v| v * scale).collect()).unwrap();
        all.insert(module, product(&b, &a));
    }
    all
}

fn modules(path: &PathBuf) -> Vec<String> {
    updates(path).into_keys().collect()
}

/// The largest difference, relative to the norm of the second.
fn apart(x: &Matrix, y: &Matrix) -> f64 {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()));
    let square = |v: f64| v * v;
    let norm: f64 = y.data().iter().map(|v| square(*v)).sum();
    let off: f64 = x.data().iter().zip(y.data()).map(|(a, b)| square(a - b)).sum();
    if norm > 0.0 { (off / norm).sqrt() } else { off.sqrt() }
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs the program; its exit code and all that it says.
    fn run(&self, args: &[&str]) -> (i32, String) {
        let mut command = Command::new(cargo_bin!("loraweld"));
        let command = command.current_dir(self.0.path()).args(args).args(["--device", "cpu"]);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.code().unwrap(), text.into_owned())
    }

    /// A file converted, with its updates.
    #[track_caller]
    fn convert(&self, input: &str, format: &str, more: &[&str]) -> BTreeMap<String, Matrix> {
        let out = self.path("out.safetensors");
        let input = path(input);
        let args = [
            &["convert", input.to_str().unwrap(), "-o", "out.safetensors", "--force", "--format", format][..],
            more,
        ];
        let (code, text) = self.run(&args.concat());
        assert_eq!(code, 0, "{args:?}: {text}");
        updates(&out)
    }

    /// What is said when a file is refused.
    #[track_caller]
    fn refuses(&self, args: &[&str]) -> String {
        let (code, text) = self.run(args);
        assert_eq!(code, 1, "{args:?}: {text}");
        text
    }
}

fn family(name: &str) -> Option<&'static str> {
    Adapter::open(path(name)).unwrap().family().id()
}

/// Keys that a file has after a conversion, and updates that stay as they were.
#[track_caller]
fn becomes(input: &str, format: &str, expected: &[(&str, &str)]) {
    let folder = Folder::new();
    let (before, after) = (updates(&path(input)), folder.convert(input, format, &[]));
    for (old, new) in expected {
        let new_one = after
            .get(*new)
            .unwrap_or_else(|| panic!("{input} to {format}: `{new}` is not in {:?}", after.keys()));
        // Scales fold into factors in f32.
        assert!(apart(new_one, &before[*old]) < 1e-6, "{input} to {format}: {new}");
    }
    assert_eq!(after.len(), before.len(), "{input} to {format}: {:?}", after.keys());
}

#[test]
fn a_folded_alpha_is_not_applied_again() {
    // 01: converters fold alpha into the factors, and leave `ss_network_alpha` in the header.
    let folder = Folder::new();
    let musubi = updates(&path("01_musubi.safetensors"));
    for file in ["01_musubi.safetensors", "01_converted.safetensors"] {
        let after = folder.convert(file, "comfyui", &[]);
        for (old, new) in [
            ("lora_unet_blocks_0_cross_attn_k", "diffusion_model.blocks.0.cross_attn.k"),
            ("lora_unet_blocks_0_ffn_0", "diffusion_model.blocks.0.ffn.0"),
        ] {
            assert!(apart(&after[new], &musubi[old]) < 1e-6, "{file}: {new}");
        }
    }
}

#[test]
fn misplaced_dots_are_put_right() {
    becomes(
        "02_klein.safetensors",
        "comfyui",
        &[
            (
                "diffusion_model.double_blocks.0.img_attn_proj",
                "diffusion_model.double_blocks.0.img_attn.proj",
            ),
            ("diffusion_model.double_blocks.0.txt_attn_qkv", "diffusion_model.double_blocks.0.txt_attn.qkv"),
            ("diffusion_model.single_blocks.0.linear1", "diffusion_model.single_blocks.0.linear1"),
        ],
    );
    becomes(
        "06_mixed.safetensors",
        "comfyui",
        &[("lora_unet_blocks_0.self_attn.k", "diffusion_model.blocks.0.self_attn.k")],
    );
    becomes(
        "06_kohya.safetensors",
        "comfyui",
        &[("lora_unet_blocks_0_self_attn_k", "diffusion_model.blocks.0.self_attn.k")],
    );
    becomes(
        "06_other.safetensors",
        "kohya",
        &[("diffusion_model.blocks.6.self_attn.k", "lora_unet_blocks_6_self_attn_k")],
    );
}

#[test]
fn duplicates_count_once_and_contradictions_are_refused() {
    let folder = Folder::new();
    for name in ["04_both.safetensors", "04_qkv_only_dup.safetensors"] {
        let file = path(name);
        match Adapter::open(&file) {
            Ok(adapter) => {
                assert!(adapter.notes().iter().any(|note| note.contains("counts once")), "{name}");
                let out = folder.convert(name, "comfyui", &[]);
                assert!(out.len() < modules(&file).len(), "{name}: each layer once");
            }
            Err(e) => {
                let text = e.to_string();
                assert!(text.contains("qkv") || text.contains("to_"), "{name}: {text}");
                assert!(text.contains("same layer"), "{name}: {text}");
            }
        }
    }
}

#[test]
fn hidream_has_its_own_names() {
    becomes(
        "09_ot.safetensors",
        "comfyui",
        &[
            (
                "transformer.double_stream_blocks.14.block.attn1.to_v_t",
                "diffusion_model.double_stream_blocks.14.block.attn1.to_v_t",
            ),
            (
                "transformer.double_stream_blocks.14.block.ff_i.experts.0.w1",
                "diffusion_model.double_stream_blocks.14.block.ff_i.experts.0.w1",
            ),
        ],
    );
    let folder = Folder::new();
    let lokr = folder.convert("09_lokr.safetensors", "comfyui", &[]);
    assert!(
        lokr.contains_key("diffusion_model.double_stream_blocks.14.block.attn1.to_v_t"),
        "{:?}",
        lokr.keys()
    );
    let dora = path("09_dora.safetensors");
    let text =
        folder.refuses(&["convert", dora.to_str().unwrap(), "-o", "x.safetensors", "--format", "comfyui"]);
    assert!(text.contains("DoRA") && text.contains("--base"), "{text}");
}

/// `W′ − W` of DoRA on a whole update.
fn decomposed(base: &Matrix, update: &Matrix, norms: &Matrix) -> Matrix {
    let sum = Matrix::from_fn(base.rows(), base.cols(), |i, j| base[(i, j)] + update[(i, j)]);
    Matrix::from_fn(base.rows(), base.cols(), |i, j| {
        let norm: f64 = (0..base.cols()).map(|k| sum[(i, k)] * sum[(i, k)]).sum::<f64>().sqrt();
        norms.data()[i] * sum[(i, j)] / norm - base[(i, j)]
    })
}

fn kron(x: &Matrix, y: &Matrix) -> Matrix {
    Matrix::from_fn(x.rows() * y.rows(), x.cols() * y.cols(), |i, j| {
        x[(i / y.rows(), j / y.cols())] * y[(i % y.rows(), j % y.cols())]
    })
}

#[test]
fn dora_on_lokr_and_loha_is_not_dropped() {
    let folder = Folder::new();
    let file = path("10_dokr.safetensors");
    for name in ["10_dokr.safetensors", "10_doha.safetensors"] {
        let text = folder.refuses(&[
            "convert",
            path(name).to_str().unwrap(),
            "-o",
            "x.safetensors",
            "--format",
            "same",
        ]);
        assert!(text.contains("DoRA") && text.contains("--base"), "{name}: {text}");
    }
    let options = loraweld::OpenOptions { base: Some(path("10_base.safetensors")), ..Default::default() };
    let adapter = Adapter::open_with(&file, &options).unwrap();
    let (tensors, base) = (Tensors::open(&file), Tensors::open(path("10_base.safetensors")));
    for (module, weight) in [
        ("lycoris_transformer_blocks_0_attn_to_q", "transformer_blocks.0.attn.to_q.weight"),
        ("lycoris_transformer_blocks_0_ff_up", "transformer_blocks.0.ff.up.weight"),
    ] {
        let of = |suffix: &str| tensors.get(&format!("{module}.{suffix}"));
        let expected =
            decomposed(&base.get(weight), &kron(&of("lokr_w1"), &of("lokr_w2")), &of("dora_scale"));
        let layer = adapter.find(module).unwrap();
        // Factors are rounded once to f32.
        assert!(apart(&delta(layer), &expected) < 1e-6, "{module}");
    }
}

#[test]
fn krea_2_is_one_model_in_three_spellings() {
    let names = ["11_native.safetensors", "11_diffusers.safetensors", "11_kohya.safetensors"];
    let all: Vec<Adapter> = names.iter().map(|name| Adapter::open(path(name)).unwrap()).collect();
    for adapter in &all {
        assert_eq!(adapter.family().id(), Some("krea2"), "{}", adapter.name());
        let shared =
            adapter.layers().iter().filter(|layer| all.iter().all(|a| a.layer(layer.key()).is_some()));
        assert_eq!(shared.count(), adapter.layers().len(), "{}", adapter.name());
    }
    let folder = Folder::new();
    let out = folder.convert("11_kohya.safetensors", "comfyui", &[]);
    assert!(
        out.keys().any(|key| key.starts_with("diffusion_model.txtfusion.layerwise_blocks.0.")),
        "{:?}",
        out.keys()
    );
    let diffusers = modules(&path("11_diffusers.safetensors"));
    let back: Vec<String> = folder.convert("11_native.safetensors", "diffusers", &[]).into_keys().collect();
    assert_eq!(back, diffusers);
}

#[test]
fn a_lokr_of_flux_2_is_known_by_its_widths() {
    for name in ["12_lokr.safetensors", "12_lokr_meta.safetensors", "12_lora.safetensors"] {
        assert_eq!(family(name), Some("flux2"), "{name}");
    }
    let (lokr, lora) = (
        Adapter::open(path("12_lokr.safetensors")).unwrap(),
        Adapter::open(path("12_lora.safetensors")).unwrap(),
    );
    assert!(lora.layers().iter().all(|layer| lokr.layer(layer.key()).is_some()));
}

#[test]
fn chroma_keeps_its_guidance_layer() {
    becomes(
        "14_kohya.safetensors",
        "comfyui",
        &[
            (
                "lora_unet_distilled_guidance_layer_in_proj",
                "diffusion_model.distilled_guidance_layer.in_proj",
            ),
            (
                "lora_unet_distilled_guidance_layer_layers_0_in_layer",
                "diffusion_model.distilled_guidance_layer.layers.0.in_layer",
            ),
        ],
    );
    let (kohya, other) = (
        Adapter::open(path("14_kohya.safetensors")).unwrap(),
        Adapter::open(path("14_onetrainer.safetensors")).unwrap(),
    );
    assert_eq!((kohya.family().id(), other.family().id()), (Some("chroma"), Some("chroma")));
    assert!(kohya.layers().iter().any(|layer| other.layer(layer.key()).is_some()));
}

#[test]
fn anima_finds_its_dots() {
    becomes(
        "15_anima.safetensors",
        "comfyui",
        &[
            ("lora_unet_blocks_0_self_attn_output_proj", "diffusion_model.blocks.0.self_attn.output_proj"),
            (
                "lora_unet_llm_adapter_blocks_0_self_attn_o_proj",
                "diffusion_model.llm_adapter.blocks.0.self_attn.o_proj",
            ),
            (
                "lora_unet_blocks_0_adaln_modulation_self_attn_1",
                "diffusion_model.blocks.0.adaln_modulation_self_attn.1",
            ),
            (
                "lora_te_layers_0_mlp_gate_proj",
                "text_encoders.qwen3_06b.transformer.model.layers.0.mlp.gate_proj",
            ),
        ],
    );
    let (kohya, comfy) = (
        Adapter::open(path("15_anima.safetensors")).unwrap(),
        Adapter::open(path("15_comfy.safetensors")).unwrap(),
    );
    assert!(comfy.layers().iter().all(|layer| kohya.layer(layer.key()).is_some()));
}

#[test]
fn what_stands_beside_the_model_keeps_its_prefix() {
    let folder = Folder::new();
    let before = modules(&path("17_official.safetensors"));
    let same: Vec<String> = folder.convert("17_official.safetensors", "same", &[]).into_keys().collect();
    assert_eq!(same, before);
    let input = path("17_official.safetensors");
    let text =
        folder.refuses(&["convert", input.to_str().unwrap(), "-o", "x.safetensors", "--format", "kohya"]);
    assert!(
        text.contains("text_embedding_projection.aggregate_embed") && text.contains("--skip-unnamed"),
        "{text}"
    );
    let left = folder.convert("17_official.safetensors", "diffusers", &["--skip-unnamed"]);
    assert_eq!(left.into_keys().collect::<Vec<_>>(), modules(&path("17_diffusers.safetensors")));
    // A merge keeps that name whole, and says so.
    let input = input.to_str().unwrap();
    let (code, text) =
        folder.run(&["merge", "linear", input, "--format", "kohya", "-o", "merged.safetensors"]);
    assert!(
        code == 0 && text.contains("`text_embedding_projection.aggregate_embed` keeps its name"),
        "{text}"
    );
    let beside = "text_embedding_projection.aggregate_embed".to_owned();
    assert!(modules(&folder.path("merged.safetensors")).contains(&beside));
    let kohya = folder.convert("17_official.safetensors", "kohya", &["--skip-unnamed"]);
    assert_eq!(kohya.into_keys().collect::<Vec<_>>(), modules(&path("17_kohya.safetensors")));
}

#[test]
fn auraflow_and_framepack_are_not_flux() {
    assert_eq!(family("18_aura.safetensors"), Some("auraflow"));
    let single = Adapter::open(path("18_aura_single_only.safetensors")).unwrap();
    assert!(single.family().id() != Some("flux1"), "{}", single.family());
    let folder = Folder::new();
    let input = path("18_aura_single_only.safetensors");
    let (code, text) =
        folder.run(&["convert", input.to_str().unwrap(), "-o", "out.safetensors", "--format", "comfyui"]);
    assert!(code == 1 && text.contains("--model"), "{text}");
    assert_eq!(family("28_few.safetensors"), Some("hunyuan_video"));
}

#[test]
fn lumina_2_is_one_model_in_three_spellings() {
    let all: Vec<Adapter> = ["21_native.safetensors", "21_diffusers.safetensors", "21_kohya.safetensors"]
        .iter()
        .map(|name| Adapter::open(path(name)).unwrap())
        .collect();
    for adapter in &all {
        assert_eq!(adapter.family().id(), Some("lumina2"), "{}", adapter.name());
    }
    let of = |i: usize| all[i].layers().iter().map(|layer| layer.key().as_str()).collect::<BTreeSet<_>>();
    assert_eq!(of(0), of(2));
    assert!(of(1).is_subset(&of(0)), "{:?}", of(1));
    let attention = Adapter::open(path("21_attn_only.safetensors")).unwrap().family();
    assert!(attention.and(Family::named("lumina2").unwrap()) != Family::UNKNOWN, "{attention}");
}

#[test]
fn comfyui_loads_the_text_encoders() {
    becomes(
        "25_flux.safetensors",
        "comfyui",
        &[
            (
                "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
                "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
            ),
            ("lora_te1_text_projection", "text_encoders.clip_l.transformer.text_projection"),
            ("lora_unet_double_blocks_0_img_attn_proj", "diffusion_model.double_blocks.0.img_attn.proj"),
        ],
    );
    becomes(
        "25_sd3.safetensors",
        "comfyui",
        &[
            (
                "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
                "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
            ),
            ("lora_te2_text_projection", "text_encoders.clip_g.transformer.text_projection"),
            (
                "lora_unet_joint_blocks_0_x_block_attn_proj",
                "diffusion_model.joint_blocks.0.x_block.attn.proj",
            ),
        ],
    );
}

#[test]
fn diffusers_gets_its_prefix() {
    for name in ["26_in.safetensors", "26_unet.safetensors"] {
        let out = Folder::new().convert(name, "diffusers", &[]);
        assert!(
            out.keys().all(|key| key.starts_with("unet.") && !key.contains("base_model")),
            "{:?}",
            out.keys()
        );
    }
    for name in ["32_flux_peft", "32_klein", "32_qwen", "32_qwen_peft", "32_wan_diffusers", "32_wan_native"] {
        let folder = Folder::new();
        let out = folder.convert(&format!("{name}.safetensors"), "diffusers", &[]);
        assert!(out.keys().all(|key| key.starts_with("transformer.")), "{name}: {:?}", out.keys());
        let bytes = fs::read(folder.path("out.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert!(
            file.names().iter().all(|key| key.ends_with("A.weight") || key.ends_with("B.weight")),
            "{name}"
        );
    }
    becomes(
        "32_wan_native.safetensors",
        "diffusers",
        &[("blocks.0.self_attn.q", "transformer.blocks.0.attn1.to_q")],
    );
}

#[test]
fn wrappers_are_no_part_of_a_name() {
    let plain = Adapter::open(path("27_net.safetensors")).unwrap();
    for name in ["27_dit", "27_model", "27_module", "27_orig_mod", "27_pipe_dit"] {
        let file = format!("{name}.safetensors");
        let adapter = Adapter::open(path(&file)).unwrap();
        assert!(adapter.layers().iter().all(|layer| plain.layer(layer.key()).is_some()), "{name}");
        let out = Folder::new().convert(&file, "diffusers", &[]);
        assert!(out.contains_key("transformer.blocks.0.attn1.to_q"), "{name}: {:?}", out.keys());
        let same: Vec<String> = Folder::new().convert(&file, "same", &[]).into_keys().collect();
        assert_eq!(same, modules(&path(&file)), "{name}");
    }
    for name in ["27_two.safetensors", "27_ai.safetensors"] {
        let same: Vec<String> = Folder::new().convert(name, "same", &[]).into_keys().collect();
        assert_eq!(same, modules(&path(name)), "{name}");
        let out = Folder::new().convert(name, "diffusers", &[]);
        for prefix in ["transformer.", "transformer_2."] {
            assert!(out.contains_key(&format!("{prefix}blocks.0.attn1.to_q")), "{name}: {:?}", out.keys());
        }
    }
}

#[test]
fn processors_of_single_blocks_are_q_k_and_v() {
    let folder = Folder::new();
    let before = updates(&path("29_uso.safetensors"));
    let out = folder.convert("29_uso.safetensors", "kohya", &[]);
    let (qkv, whole) =
        (&before["single_blocks.0.processor.qkv_lora"], &out["lora_unet_single_blocks_0_linear1"]);
    // q, k and v first, and no MLP.
    assert_eq!((qkv.rows(), whole.rows()), (48, 112));
    assert!(whole.data()[..qkv.data().len()].iter().zip(qkv.data()).all(|(x, y)| (x - y).abs() < 1e-6));
    assert!(whole.data()[qkv.data().len()..].iter().all(|v| *v == 0.0));
}

/// Ranks of a file's modules.
fn ranks(path: &PathBuf) -> BTreeMap<String, usize> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let rank = |name: &&str| {
        let module = SUFFIXES.iter().find_map(|(a, _)| name.strip_suffix(a))?;
        Some((module.to_owned(), file.tensor(name).unwrap().shape()[0]))
    };
    let names = file.names();
    names.iter().copied().filter_map(|name| rank(&name)).collect()
}

#[test]
fn the_rank_asked_for_is_the_rank_in_the_file() {
    let folder = Folder::new();
    let input = path("35_r64.safetensors");
    let (before, size) = (updates(&input), fs::metadata(&input).unwrap().len());
    for rank in [64, 48, 8] {
        let out = folder.path("out.safetensors");
        let (code, text) = folder.run(&[
            "resize",
            input.to_str().unwrap(),
            "--rank",
            &rank.to_string(),
            "-o",
            "out.safetensors",
            "--force",
        ]);
        assert_eq!(code, 0, "{text}");
        for (module, found) in ranks(&out) {
            assert_eq!(found, rank, "{module}");
        }
        assert!(fs::metadata(&out).unwrap().len() <= size + 512, "rank {rank}");
        for (module, update) in updates(&out) {
            // The nearest of that rank, of the whole module: bf16 rounds factors by 2⁻⁹.
            let values = crate::common::singular_values(&before[&module]);
            let squares = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
            let best = (squares(&values[rank.min(values.len())..]) / squares(&values)).sqrt();
            let error = apart(&update, &before[&module]);
            assert!(error <= best + 8e-3, "{module} at rank {rank}: {error}, the best is {best}");
        }
    }
}

#[test]
fn a_peft_lokr_of_whole_factors_has_the_scale_of_its_configuration() {
    let adapter = Adapter::open(path("36_peft")).unwrap();
    let file = Tensors::open(path("36_peft/adapter_model.safetensors"));
    let q = "base_model.model.transformer_blocks.0.attn.to_q";
    let mut expected = kron(&file.get(&format!("{q}.lokr_w1")), &file.get(&format!("{q}.lokr_w2")));
    expected.data_mut().iter_mut().for_each(|v| *v *= 2.0);
    assert!(apart(&delta(adapter.find(q).unwrap()), &expected) < 1e-6);
    let k = "base_model.model.transformer_blocks.0.attn.to_k";
    let of = |suffix: &str| file.get(&format!("{k}.{suffix}"));
    let mut expected = kron(&of("lokr_w1"), &product(&of("lokr_w2_a"), &of("lokr_w2_b")));
    expected.data_mut().iter_mut().for_each(|v| *v *= 2.0);
    assert!(apart(&delta(adapter.find(k).unwrap()), &expected) < 1e-6);
}

#[test]
fn names_that_are_the_same_in_both_spellings_are_names() {
    becomes(
        "37_patch.safetensors",
        "diffusers",
        &[
            ("lora_unet_head_head", "transformer.proj_out"),
            ("lora_unet_patch_embedding", "transformer.patch_embedding"),
        ],
    );
    for name in ["41_musubi_comfy.safetensors", "41_aitk.safetensors", "41_native_dotted.safetensors"] {
        assert_eq!(family(name), Some("z_image"), "{name}");
        let folder = Folder::new();
        for format in ["comfyui", "kohya", "diffusers"] {
            let out = folder.convert(name, format, &[]);
            assert!(!out.is_empty(), "{name} to {format}");
        }
    }
    let (musubi, aitk) = (
        Adapter::open(path("41_musubi_comfy.safetensors")).unwrap(),
        Adapter::open(path("41_aitk.safetensors")).unwrap(),
    );
    assert!(aitk.layers().iter().any(|layer| musubi.layer(layer.key()).is_some()));
}

#[test]
fn every_file_comes_out_of_same_as_it_went_in() {
    let folder = Folder::new();
    for entry in fs::read_dir(path("")).unwrap() {
        let file = entry.unwrap().path();
        let Some(adapter) = Adapter::open(&file).ok().filter(|_| file.is_file()) else { continue };
        let names = modules(&file);
        // What is no LoRA becomes one, and duplicates count once.
        if names.is_empty() || adapter.notes().iter().any(|note| note.contains("counts once")) {
            continue;
        }
        let out = folder.path("same.safetensors");
        let options = loraweld::SaveOptions { overwrite: true, ..Default::default() };
        adapter.save(&out, &options).unwrap();
        let (before, after) = (fs::read(&file).unwrap(), fs::read(&out).unwrap());
        let (before, after) =
            (SafeTensors::deserialize(&before).unwrap(), SafeTensors::deserialize(&after).unwrap());
        let mut keys: [Vec<&str>; 2] = [before.names(), after.names()];
        keys.iter_mut().for_each(|keys| keys.sort_unstable());
        assert_eq!(keys[0], keys[1], "{}", file.display());
        for key in &keys[0] {
            let (x, y) = (before.tensor(key).unwrap(), after.tensor(key).unwrap());
            assert_eq!(
                (x.dtype(), x.shape(), x.data()),
                (y.dtype(), y.shape(), y.data()),
                "{}: {key}",
                file.display()
            );
        }
    }
}

#[test]
fn a_format_that_a_model_does_not_have_is_refused() {
    let folder = Folder::new();
    for name in ["06_other", "11_native", "15_comfy", "21_native", "26_unet"] {
        let input = path(&format!("{name}.safetensors"));
        let text =
            folder.refuses(&["convert", input.to_str().unwrap(), "-o", "x.safetensors", "--format", "bfl"]);
        assert!(text.contains("no names in bfl"), "{name}: {text}");
    }
    assert_eq!(Format::Bfl.name(), "bfl");
}

#[test]
fn a_dry_run_says_the_rank_that_will_be_written() {
    let folder = Folder::new();
    let input = path("35_r64.safetensors");
    let input = input.to_str().unwrap();
    for args in [vec!["resize", input], vec!["merge", "svd", input, input]] {
        let (code, text) = folder.run(&[&args[..], &["--rank", "5", "--dry-run", "--json"]].concat());
        assert_eq!(code, 0, "{text}");
        let plan = text.lines().find(|line| line.contains("\"plan\"")).unwrap();
        let plan: serde_json::Value = serde_json::from_str(plan).unwrap();
        let ranks = plan["layers"].as_array().unwrap().iter().map(|layer| layer["rank"].as_u64().unwrap());
        assert!(ranks.clone().count() > 0 && ranks.clone().all(|rank| rank == 5), "{args:?}: {text}");
    }
}

#[test]
fn check_says_what_a_loader_takes() {
    let folder = Folder::new();
    for (name, loader, code) in [
        ("02_klein", "comfyui", 1),
        ("17_kohya", "comfyui", 0),
        ("17_diffusers", "diffusers", 0),
        ("17_diffusers", "comfyui", 1),
        ("41_aitk", "comfyui", 0),
        ("41_aitk", "diffusers", 0),
        ("28_few", "kohya", 0),
        ("37_patch", "kohya", 0),
    ] {
        let input = path(&format!("{name}.safetensors"));
        let (found, text) = folder.run(&["check", input.to_str().unwrap(), "--loader", loader]);
        assert_eq!(found, code, "{name} in {loader}: {text}");
    }
    // Every file that is written for a loader is taken whole.
    for (name, loader, format) in [
        ("02_klein", "comfyui", "comfyui"),
        ("17_kohya", "diffusers", "peft"),
        ("11_native", "kohya", "kohya"),
    ] {
        folder.convert(&format!("{name}.safetensors"), format, &[]);
        let (found, text) = folder.run(&["check", "out.safetensors", "--loader", loader]);
        assert_eq!(found, 0, "{name} in {loader}: {text}");
    }
}
