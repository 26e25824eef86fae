//! Files of every family and spelling, with the names and counts of real ones at small widths: they are recognised, come
//! out of a merge alone as they went in, and are converted to each other spelling and back without a change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use half::bf16;
use loraweld::adapter::{Adapter, BlockPreset, Family, Format, OpenOptions, SaveOptions, Strengths};
use loraweld::{Calibration, Control, Device, Layer, LayerKey, Linear, Matrix, RawMatrix, Source};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::common::files::{Raw, Tensors, f32s, file_of, tensors};

/// The width of everything.
const H: usize = 8;

/// A module: path, widths, kernel.
#[derive(Clone)]
struct Module {
    path: String,
    input: usize,
    output: usize,
    kernel: Vec<usize>,
}

fn linear(path: impl Into<String>, input: usize, output: usize) -> Module {
    Module { path: path.into(), input, output, kernel: Vec::new() }
}

fn conv(path: impl Into<String>, input: usize, output: usize, kernel: usize) -> Module {
    Module { kernel: vec![kernel; 2], ..linear(path, input, output) }
}

/// How keys are made of paths.
#[derive(Clone, Copy)]
struct Style {
    prefix: &'static str,
    flat: bool,
    a: &'static str,
    b: &'static str,
    /// Alpha for the rank, if there is one.
    alpha: Option<f32>,
}

const KOHYA: Style =
    Style { prefix: "lora_unet_", flat: true, a: "lora_down.weight", b: "lora_up.weight", alpha: Some(1.0) };
const PEFT: Style =
    Style { prefix: "transformer.", flat: false, a: "lora_A.weight", b: "lora_B.weight", alpha: None };
const COMFYUI: Style = Style { prefix: "diffusion_model.", ..PEFT };

/// A file of bf16 factors; ranks differ from module to module.
fn file(modules: &[(Style, Module)]) -> Vec<u8> {
    file_with(&[], modules)
}

/// A file whose metadata says which model it is for, as widths as small as here do not.
fn file_for(family: Family, modules: &[(Style, Module)]) -> Vec<u8> {
    file_with(&[(MODEL, family.id().unwrap())], modules)
}

const MODEL: &str = "ss_base_model_version";

fn file_with(metadata: &[(&str, &str)], modules: &[(Style, Module)]) -> Vec<u8> {
    let mut tensors: Vec<(String, &str, Vec<usize>, Vec<u8>)> = Vec::new();
    for (i, (style, module)) in modules.iter().enumerate() {
        let name = match style.flat {
            true => format!("{}{}", style.prefix, module.path.replace('.', "_")),
            false => format!("{}{}", style.prefix, module.path),
        };
        let rank = 2 + i % 3;
        let taps: usize = module.kernel.iter().product();
        let ones = vec![1; module.kernel.len()];
        let a = [&[rank, module.input][..], &module.kernel].concat();
        let b = [&[module.output, rank][..], &ones].concat();
        tensors.push((format!("{name}.{}", style.a), "BF16", a, values(i, rank * module.input * taps)));
        tensors.push((format!("{name}.{}", style.b), "BF16", b, values(i + 5000, module.output * rank)));
        if let Some(alpha) = style.alpha {
            let alpha = bf16::from_f32(alpha * rank as f32).to_le_bytes().to_vec();
            tensors.push((format!("{name}.alpha"), "BF16", vec![], alpha));
        }
    }
    let raw: Vec<Raw> =
        tensors.iter().map(|(n, t, s, b)| (n.as_str(), *t, s.as_slice(), b.clone())).collect();
    file_of(metadata, &raw)
}

/// Values that tell every place from every other, none of them zero.
fn values(seed: usize, n: usize) -> Vec<u8> {
    let value = |i: usize| {
        let x = (seed as u32).wrapping_mul(2_654_435_761).wrapping_add((i as u32).wrapping_mul(40_503)) >> 8;
        bf16::from_f32(((x % 2000) as f32 - 999.5) / 1000.0)
    };
    (0..n).flat_map(|i| value(i).to_le_bytes()).collect()
}

fn styled(style: Style, modules: Vec<Module>) -> Vec<(Style, Module)> {
    modules.into_iter().map(|module| (style, module)).collect()
}

fn flux_fused() -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..19 {
        for side in ["img", "txt"] {
            let at = |name: &str| format!("double_blocks.{i}.{side}_{name}");
            modules.push(linear(at("attn.qkv"), H, 3 * H));
            modules.push(linear(at("attn.proj"), H, H));
            modules.push(linear(at("mlp.0"), H, 4 * H));
            modules.push(linear(at("mlp.2"), 4 * H, H));
            modules.push(linear(at("mod.lin"), H, 6 * H));
        }
    }
    for i in 0..38 {
        modules.push(linear(format!("single_blocks.{i}.linear1"), H, 7 * H));
        modules.push(linear(format!("single_blocks.{i}.linear2"), 5 * H, H));
        modules.push(linear(format!("single_blocks.{i}.modulation.lin"), H, 3 * H));
    }
    modules
}

fn flux_split(double: usize, single: usize) -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..double {
        let at = |name: &str| format!("transformer_blocks.{i}.{name}");
        for name in
            ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]
        {
            modules.push(linear(at(&format!("attn.{name}")), H, H));
        }
        for ff in ["ff", "ff_context"] {
            modules.push(linear(at(&format!("{ff}.net.0.proj")), H, 4 * H));
            modules.push(linear(at(&format!("{ff}.net.2")), 4 * H, H));
        }
        modules.push(linear(at("norm1.linear"), H, 6 * H));
        modules.push(linear(at("norm1_context.linear"), H, 6 * H));
    }
    for i in 0..single {
        let at = |name: &str| format!("single_transformer_blocks.{i}.{name}");
        for name in ["attn.to_q", "attn.to_k", "attn.to_v"] {
            modules.push(linear(at(name), H, H));
        }
        modules.push(linear(at("proj_mlp"), H, 4 * H));
        modules.push(linear(at("proj_out"), 5 * H, H));
        modules.push(linear(at("norm.linear"), H, 3 * H));
    }
    modules
}

fn qwen() -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..60 {
        let at = |name: &str| format!("transformer_blocks.{i}.{name}");
        for name in
            ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"]
        {
            modules.push(linear(at(&format!("attn.{name}")), H, H));
        }
        for mlp in ["img_mlp", "txt_mlp"] {
            modules.push(linear(at(&format!("{mlp}.net.0.proj")), H, 4 * H));
            modules.push(linear(at(&format!("{mlp}.net.2")), 4 * H, H));
        }
    }
    modules
}

fn z_image() -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..30 {
        let at = |name: &str| format!("layers.{i}.{name}");
        for name in ["to_q", "to_k", "to_v", "to_out.0"] {
            modules.push(linear(at(&format!("attention.{name}")), H, H));
        }
        modules.push(linear(at("feed_forward.w1"), H, 3 * H));
        modules.push(linear(at("feed_forward.w2"), 3 * H, H));
        modules.push(linear(at("feed_forward.w3"), H, 3 * H));
        modules.push(linear(at("adaLN_modulation.0"), 4, 4 * H));
    }
    modules
}

fn wan() -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..40 {
        for attn in ["self_attn", "cross_attn"] {
            modules.extend(["q", "k", "v", "o"].map(|p| linear(format!("blocks.{i}.{attn}.{p}"), H, H)));
        }
        modules.push(linear(format!("blocks.{i}.ffn.0"), H, 4 * H));
        modules.push(linear(format!("blocks.{i}.ffn.2"), 4 * H, H));
    }
    modules
}

/// One transformer block of a UNet.
fn attention(modules: &mut Vec<Module>, at: &str) {
    for attn in ["attn1", "attn2"] {
        let width = if attn == "attn2" { 12 } else { H };
        modules.push(linear(format!("{at}.{attn}.to_q"), H, H));
        modules.push(linear(format!("{at}.{attn}.to_k"), width, H));
        modules.push(linear(format!("{at}.{attn}.to_v"), width, H));
        modules.push(linear(format!("{at}.{attn}.to_out.0"), H, H));
    }
    modules.push(linear(format!("{at}.ff.net.0.proj"), H, 8 * H));
    modules.push(linear(format!("{at}.ff.net.2"), 4 * H, H));
}

fn sdxl() -> Vec<Module> {
    let mut modules = Vec::new();
    let resnet = |modules: &mut Vec<Module>, at: String, skip: bool| {
        modules.push(conv(format!("{at}.in_layers.2"), H, H, 3));
        modules.push(linear(format!("{at}.emb_layers.1"), H, H));
        modules.push(conv(format!("{at}.out_layers.3"), H, H, 3));
        if skip {
            modules.push(conv(format!("{at}.skip_connection"), H, H, 1));
        }
    };
    let transformer = |modules: &mut Vec<Module>, at: String, depth: usize| {
        modules.push(linear(format!("{at}.proj_in"), H, H));
        modules.push(linear(format!("{at}.proj_out"), H, H));
        (0..depth).for_each(|i| attention(modules, &format!("{at}.transformer_blocks.{i}")));
    };
    for (i, depth) in [(1, 0), (2, 0), (4, 2), (5, 2), (7, 10), (8, 10)] {
        resnet(&mut modules, format!("input_blocks.{i}.0"), i == 4 || i == 7);
        if depth > 0 {
            transformer(&mut modules, format!("input_blocks.{i}.1"), depth);
        }
    }
    modules.extend([3, 6].map(|i| conv(format!("input_blocks.{i}.0.op"), H, H, 3)));
    resnet(&mut modules, "middle_block.0".into(), false);
    transformer(&mut modules, "middle_block.1".into(), 10);
    resnet(&mut modules, "middle_block.2".into(), false);
    for i in 0..9 {
        resnet(&mut modules, format!("output_blocks.{i}.0"), true);
        let depth = [10, 2, 0][i / 3];
        if depth > 0 {
            transformer(&mut modules, format!("output_blocks.{i}.1"), depth);
        }
    }
    modules.extend([2, 5].map(|i| conv(format!("output_blocks.{i}.2.conv"), H, H, 3)));
    modules
}

fn clip(layers: usize) -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..layers {
        let at = |name: &str| format!("text_model.encoder.layers.{i}.{name}");
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            modules.push(linear(at(&format!("self_attn.{name}")), H, H));
        }
        modules.push(linear(at("mlp.fc1"), H, 4 * H));
        modules.push(linear(at("mlp.fc2"), 4 * H, H));
    }
    modules
}

fn sdxl_kohya() -> Vec<(Style, Module)> {
    let mut modules = styled(KOHYA, sdxl());
    modules.extend(styled(Style { prefix: "lora_te1_", ..KOHYA }, clip(12)));
    modules.extend(styled(Style { prefix: "lora_te2_", ..KOHYA }, clip(32)));
    modules.push((Style { prefix: "lora_te2_", ..KOHYA }, linear("text_projection", H, H)));
    modules
}

fn sd1_kohya() -> Vec<(Style, Module)> {
    let mut modules = Vec::new();
    let mut transformer = |at: String| {
        modules.push(conv(format!("{at}.proj_in"), H, H, 1));
        modules.push(conv(format!("{at}.proj_out"), H, H, 1));
        attention(&mut modules, &format!("{at}.transformer_blocks.0"));
    };
    for (block, layer) in (0..3).flat_map(|block| [(block, 0), (block, 1)]) {
        transformer(format!("down_blocks.{block}.attentions.{layer}"));
    }
    transformer("mid_block.attentions.0".into());
    for (block, layer) in (1..4).flat_map(|block| (0..3).map(move |layer| (block, layer))) {
        transformer(format!("up_blocks.{block}.attentions.{layer}"));
    }
    modules.push(conv("down_blocks.0.resnets.0.conv1", H, H, 3));
    modules.push(conv("up_blocks.0.upsamplers.0.conv", H, H, 3));
    modules.push(conv("down_blocks.2.downsamplers.0.conv", H, H, 3));
    let mut modules = styled(KOHYA, modules);
    modules.extend(styled(Style { prefix: "lora_te_", ..KOHYA }, clip(12)));
    modules
}

fn sd3() -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..24 {
        for side in ["x_block", "context_block"] {
            let at = |name: &str| format!("joint_blocks.{i}.{side}.{name}");
            modules.push(linear(at("attn.qkv"), H, 3 * H));
            // The last block has no context after its attention, and another norm.
            let last = i == 23 && side == "context_block";
            modules.push(linear(at("adaLN_modulation.1"), H, if last { 2 * H } else { 6 * H }));
            if !last {
                modules.push(linear(at("attn.proj"), H, H));
                modules.push(linear(at("mlp.fc1"), H, 4 * H));
                modules.push(linear(at("mlp.fc2"), 4 * H, H));
            }
        }
    }
    modules
}

fn flux2() -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..8 {
        for side in ["img", "txt"] {
            let at = |name: &str| format!("double_blocks.{i}.{side}_{name}");
            modules.push(linear(at("attn.qkv"), H, 3 * H));
            modules.push(linear(at("attn.proj"), H, H));
            modules.push(linear(at("mlp.0"), H, 6 * H));
            modules.push(linear(at("mlp.2"), 3 * H, H));
        }
    }
    for i in 0..48 {
        modules.push(linear(format!("single_blocks.{i}.linear1"), H, 9 * H));
        modules.push(linear(format!("single_blocks.{i}.linear2"), 4 * H, H));
    }
    modules.push(linear("double_stream_modulation_img.lin", H, 6 * H));
    modules.push(linear("final_layer.adaLN_modulation.1", H, 2 * H));
    modules
}

fn hunyuan_video() -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..20 {
        for side in ["img", "txt"] {
            let at = |name: &str| format!("double_blocks.{i}.{side}_{name}");
            modules.push(linear(at("attn_qkv"), H, 3 * H));
            modules.push(linear(at("attn_proj"), H, H));
            modules.push(linear(at("mlp.fc1"), H, 4 * H));
            modules.push(linear(at("mlp.fc2"), 4 * H, H));
            modules.push(linear(at("mod.linear"), H, 6 * H));
        }
    }
    for i in 0..40 {
        modules.push(linear(format!("single_blocks.{i}.linear1"), H, 7 * H));
        modules.push(linear(format!("single_blocks.{i}.linear2"), 5 * H, H));
        modules.push(linear(format!("single_blocks.{i}.modulation.linear"), H, 3 * H));
    }
    for i in 0..2 {
        let at = |name: &str| format!("txt_in.individual_token_refiner.blocks.{i}.{name}");
        modules.push(linear(at("self_attn_qkv"), H, 3 * H));
        modules.push(linear(at("self_attn_proj"), H, H));
        modules.push(linear(at("mlp.fc1"), H, 4 * H));
    }
    modules
}

fn krea() -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..28 {
        let at = |name: &str| format!("blocks.{i}.{name}");
        for (name, output) in [("wq", H), ("wk", H / 4), ("wv", H / 4), ("wo", H), ("gate", H)] {
            modules.push(linear(at(&format!("attn.{name}")), H, output));
        }
        modules.push(linear(at("mlp.gate"), H, 3 * H));
        modules.push(linear(at("mlp.up"), H, 3 * H));
        modules.push(linear(at("mlp.down"), 3 * H, H));
    }
    modules.push(linear("txtfusion.projector", 12, 1));
    modules
}

fn xlabs() -> Vec<Module> {
    let mut modules = Vec::new();
    for i in 0..19 {
        for n in [1, 2] {
            modules.push(linear(format!("double_blocks.{i}.processor.qkv_lora{n}"), H, 3 * H));
            modules.push(linear(format!("double_blocks.{i}.processor.proj_lora{n}"), H, H));
        }
    }
    modules
}

/// A file as a test has it.
/// The family of an id.
fn model(id: &str) -> Family {
    Family::named(id).unwrap()
}

struct Case {
    name: &'static str,
    family: Family,
    format: Format,
    /// Tensors of the file, and layers that it is read as.
    keys: usize,
    layers: usize,
    bytes: Vec<u8>,
    /// What it is converted to and back.
    through: &'static [Format],
}

fn cases() -> Vec<Case> {
    use Format::{Bfl, Comfyui, Kohya, Peft};
    const ALL: &[Format] = &[Peft, Kohya, Comfyui, Bfl];
    const MOST: &[Format] = &[Peft, Kohya, Comfyui];
    let case = |name, family: Family, format, keys, layers, modules: Vec<(Style, Module)>, through| Case {
        name,
        family,
        format,
        keys,
        layers,
        bytes: file_for(family, &modules),
        through,
    };
    let bare = Style { prefix: "", ..PEFT };
    let downs = Style { flat: false, prefix: "", ..KOHYA };
    let processors = Style { a: "down.weight", b: "up.weight", ..bare };
    vec![
        case("FLUX kohya", model("flux1"), Kohya, 912, 494, styled(KOHYA, flux_fused()), ALL),
        case("FLUX split", model("flux1"), Peft, 988, 494, styled(PEFT, flux_split(19, 38)), ALL),
        case("FLUX ComfyUI", model("flux1"), Comfyui, 608, 494, styled(COMFYUI, flux_fused()), ALL),
        case("FLUX BFL", model("flux1"), Bfl, 608, 494, styled(bare, flux_fused()), ALL),
        case(
            "FLUX XLabs",
            model("flux1"),
            Format::Xlabs,
            152,
            152,
            styled(processors, xlabs()),
            &[Format::Xlabs, Peft, Kohya],
        ),
        case(
            "FLUX Kontext",
            model("flux1"),
            Peft,
            608,
            494,
            styled(Style { prefix: "base_model.model.", ..PEFT }, flux_fused()),
            ALL,
        ),
        case("FLUX.2 kohya", model("flux2"), Kohya, 486, 194, styled(KOHYA, flux2()), ALL),
        case("HunyuanVideo", model("hunyuan_video"), Kohya, 978, 530, styled(KOHYA, hunyuan_video()), MOST),
        case(
            "Qwen-Image",
            model("qwen_image"),
            Peft,
            2160,
            720,
            styled(downs, qwen()),
            &[Peft, Kohya, Comfyui],
        ),
        case(
            "Z-Image",
            model("z_image"),
            Comfyui,
            480,
            240,
            styled(COMFYUI, z_image()),
            &[Peft, Kohya, Comfyui],
        ),
        case("Wan", model("wan"), Comfyui, 800, 400, styled(COMFYUI, wan()), MOST),
        case("Krea 2", model("krea2"), Comfyui, 450, 225, styled(COMFYUI, krea()), &[Peft, Kohya, Comfyui]),
        case("SD3 kohya", model("sd3"), Kohya, 711, 333, styled(KOHYA, sd3()), MOST),
        case("SDXL kohya", model("sdxl"), Kohya, 0, 0, sdxl_kohya(), MOST),
        case("SD1 kohya", model("sd1"), Kohya, 0, 0, sd1_kohya(), MOST),
    ]
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    fn open(&self, name: &str, bytes: &[u8]) -> Adapter {
        Adapter::open(self.write(name, bytes)).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Saves and reads back.
    fn save(&self, adapter: &Adapter, name: &str, format: Option<Format>) -> (PathBuf, Adapter) {
        let path = self.0.path().join(name);
        let metadata = adapter.metadata().iter().filter(|(key, _)| *key == MODEL);
        let metadata = metadata.map(|(key, value)| (key.clone(), value.clone())).collect();
        let options = SaveOptions { format, overwrite: true, metadata, ..Default::default() };
        adapter.save(&path, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
        let back = Adapter::open(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        (path, back)
    }
}

#[track_caller]
fn assert_same_tensors(found: &Tensors, expected: &Tensors, what: &str) {
    let names = |t: &Tensors| t.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{what}");
    for (name, tensor) in expected {
        assert!(&found[name] == tensor, "{what}: {name} differs");
    }
}

/// Bit by bit, all layers and their factors.
#[track_caller]
fn assert_same_layers(found: &Adapter, expected: &Adapter, what: &str) {
    let keys = |a: &Adapter| a.layers().iter().map(|l| l.key().clone()).collect::<Vec<_>>();
    assert_eq!(keys(found), keys(expected), "{what}");
    for (x, y) in found.layers().iter().zip(expected.layers()) {
        assert_eq!((x.a().bytes(), x.b().bytes()), (y.a().bytes(), y.b().bytes()), "{what}: {}", x.key());
        assert_eq!((x.scale().value, x.kernel()), (y.scale().value, y.kernel()), "{what}: {}", x.key());
    }
}

#[test]
fn files_are_recognised_and_come_out_as_they_went_in() {
    let folder = Folder::new();
    for case in cases() {
        let Case { name, family, format, keys, layers, bytes, .. } = &case;
        let before = tensors(bytes);
        let adapter = folder.open("in.safetensors", bytes);
        assert_eq!((adapter.family(), adapter.format()), (*family, *format), "{name}");
        if *keys > 0 {
            assert_eq!((before.len(), adapter.layers().len()), (*keys, *layers), "{name}");
        }
        let merged = Linear.merge(&[adapter.at(1.0)]).unwrap_or_else(|e| panic!("{name}: {e}"));
        let (path, back) = folder.save(&merged.adapter, "out.safetensors", None);
        assert_same_tensors(&tensors(&fs::read(path).unwrap()), &before, name);
        assert_same_layers(&back, &adapter, name);
        let blocks = BlockPreset::of(*family, None);
        assert!(blocks.is_ok(), "{name}");
    }
}

#[test]
fn conversions_lose_nothing() {
    let folder = Folder::new();
    for case in cases() {
        let adapter = folder.open("in.safetensors", &case.bytes);
        for &format in case.through {
            let what = format!("{} through {format}", case.name);
            let (path, other) = folder.save(&adapter, "other.safetensors", Some(format));
            assert_eq!((other.format(), other.family()), (format, case.family), "{what}");
            // Names of the format, in all keys.
            let (flat, prefix) = (
                format == Format::Kohya,
                match format {
                    Format::Kohya => "lora_",
                    Format::Comfyui => "diffusion_model.",
                    _ => "",
                },
            );
            for (key, _) in tensors(&fs::read(path).unwrap()) {
                let module = key.split(".lora_").next().unwrap();
                let of_encoder = key.starts_with("text_encoder");
                assert!(key.starts_with(prefix) || of_encoder, "{what}: {key}");
                assert!(!flat || !module.trim_end_matches(".alpha").contains('.'), "{what}: {key}");
                let native = ["double_blocks", "joint_blocks", "self_attn.q", "input_blocks"];
                let is_native = !of_encoder && native.iter().any(|part| key.contains(part));
                let kontext = key.starts_with("base_model.");
                assert!(format != Format::Peft || !is_native || kontext, "{what}: {key}");
            }
            assert_same_layers(&other, &adapter, &what);
            // And back, to the format that it came in.
            let (path, back) = folder.save(&other, "back.safetensors", Some(case.format));
            assert_same_layers(&back, &adapter, &what);
            // Tencent's names of HunyuanVideo, which musubi-tuner has, become those that ComfyUI loads.
            // diffusers looks in vain for the alphas of a UNet whose ranks differ, and so it gets none.
            let respelled = ["hunyuan_video", "sd1", "sdxl"].map(model).contains(&case.family);
            if case.format == Format::Kohya && !respelled {
                assert_same_tensors(&tensors(&fs::read(path).unwrap()), &tensors(&case.bytes), &what);
            }
        }
    }
}

#[test]
fn alphas_are_kept_where_there_is_a_place_for_them() {
    let folder = Folder::new();
    // No power of two, so that folding would round.
    let bytes = file(&styled(Style { alpha: Some(0.75), ..KOHYA }, flux_fused()));
    let adapter = folder.open("in.safetensors", &bytes);
    assert!(adapter.layers().iter().all(|layer| layer.scale().value == 0.75));
    let (_, other) = folder.save(&adapter, "other.safetensors", Some(Format::Comfyui));
    let (path, _) = folder.save(&other, "back.safetensors", Some(Format::Kohya));
    assert_same_tensors(&tensors(&fs::read(path).unwrap()), &tensors(&bytes), "kohya through comfyui");
}

fn delta(layer: &Layer) -> Matrix {
    let (a, b) = (layer.a().to_vec::<f64>(), layer.b().to_vec::<f64>());
    Matrix::from_fn(layer.output(), layer.input(), |i, j| {
        let sum: f64 = (0..layer.rank()).map(|r| b[i * layer.rank() + r] * a[r * layer.input() + j]).sum();
        sum * layer.scale().value
    })
}

/// ‖x − y‖ / ‖y‖.
fn error(x: &Matrix, y: &Matrix) -> f64 {
    assert_eq!((x.rows(), x.cols()), (y.rows(), y.cols()));
    let square = |of: &dyn Fn(usize) -> f64| (0..y.data().len()).map(|i| of(i) * of(i)).sum::<f64>();
    (square(&|i| x.data()[i] - y.data()[i]) / square(&|i| y.data()[i])).sqrt()
}

#[test]
fn spellings_of_a_family_merge_layer_by_layer() {
    let folder = Folder::new();
    let fused = folder.open("fused.safetensors", &file_for(model("flux1"), &styled(KOHYA, flux_fused())));
    let split =
        folder.open("split.safetensors", &file_for(model("flux1"), &styled(PEFT, flux_split(19, 38))));
    for (first, second) in [(&fused, &split), (&split, &fused)] {
        let merged = Linear.merge(&[first.at(0.5), second.at(-0.25)]).unwrap().adapter;
        assert_eq!((merged.layers().len(), merged.format()), (494, first.format()));
        for format in [None, Some(Format::Peft), Some(Format::Kohya), Some(Format::Comfyui)] {
            let (path, back) = folder.save(&merged, "out.safetensors", format);
            let keys = tensors(&fs::read(path).unwrap()).len();
            let expected = match format.unwrap_or(first.format()) {
                Format::Peft => 988,
                Format::Comfyui => 608,
                _ => 912,
            };
            assert_eq!(keys, expected, "{format:?}");
            for layer in back.layers() {
                let (x, y) =
                    (delta(fused.layer(layer.key()).unwrap()), delta(split.layer(layer.key()).unwrap()));
                let (x, y) = if first.format() == Format::Kohya { (x, y) } else { (y, x) };
                let sum = Matrix::from_fn(x.rows(), x.cols(), |i, j| 0.5 * x[(i, j)] - 0.25 * y[(i, j)]);
                // B is rounded once, to f32 or to bf16.
                let e = error(&delta(layer), &sum);
                assert!(e <= 1e-6, "{format:?} {}: {e}", layer.key());
            }
        }
    }
    // Two fused ones stay over one A.
    let twice = Linear.merge(&[fused.at(1.0), fused.at(0.5)]).unwrap().adapter;
    let (path, _) = folder.save(&twice, "twice.safetensors", None);
    let file = tensors(&fs::read(path).unwrap());
    let rank =
        tensors(&fs::read(fused.path()).unwrap())["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].1
            [1];
    assert_eq!(file["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].1, [3 * H, 2 * rank]);
}

#[test]
fn half_adapted_fused_modules_come_back() {
    let folder = Folder::new();
    let modules =
        flux_split(19, 38).into_iter().filter(|m| !m.path.ends_with("to_v") && !m.path.ends_with("proj_mlp"));
    let adapter = folder.open("in.safetensors", &file(&styled(PEFT, modules.collect())));
    let (path, other) = folder.save(&adapter, "kohya.safetensors", Some(Format::Kohya));
    let file = tensors(&fs::read(path).unwrap());
    assert_eq!(file["lora_unet_single_blocks_0_linear1.lora_up.weight"].1[0], 7 * H);
    assert_same_layers(&other, &adapter, "without v and the MLP");
}

#[test]
fn other_spellings_of_flux_are_read() {
    let folder = Folder::new();
    let split = folder.open("split.safetensors", &file(&styled(PEFT, flux_split(1, 1))));
    let keys: Vec<_> = split.layers().iter().map(|layer| layer.key().clone()).collect();
    let one_trainer = |path: &str| {
        let path = path.replace("single_transformer_blocks", "single_blocks");
        let path = path.replace("transformer_blocks", "double_blocks");
        ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"].iter().enumerate().fold(
            path,
            |path, (i, name)| match path.starts_with("single") {
                true => path.replace(name, &format!("linear1.{i}")),
                false => path.replace(name, &format!("img_attn.qkv.{i}")),
            },
        )
    };
    for (style, rename) in [
        (Style { prefix: "lora_transformer_", ..KOHYA }, None),
        (Style { prefix: "transformer.base_model.model.", ..PEFT }, None),
        (Style { prefix: "lycoris_", ..KOHYA }, None),
        (Style { a: "lora_A.default.weight", b: "lora_B.default.weight", ..PEFT }, None),
        (Style { a: "lora.down.weight", b: "lora.up.weight", ..PEFT }, None),
        (PEFT, Some(&one_trainer as &dyn Fn(&str) -> String)),
    ] {
        let mut modules = flux_split(1, 1);
        if let Some(rename) = rename {
            modules.retain(|m| ["to_q", "to_k", "to_v", "proj_mlp"].iter().any(|end| m.path.ends_with(end)));
            modules.iter_mut().for_each(|m| m.path = rename(&m.path));
        }
        let adapter = folder.open("other.safetensors", &file(&styled(style, modules.clone())));
        let found: Vec<_> = adapter.layers().iter().map(|layer| layer.key().clone()).collect();
        assert!(found.iter().all(|key| keys.contains(key)), "{}: {found:?}", style.prefix);
        assert_eq!(found.len(), modules.len());
        assert!(rename.is_some() || found == keys);
        assert_eq!(adapter.family().and(model("flux1")), model("flux1"));
        let (path, _) = folder.save(&adapter, "same.safetensors", None);
        assert_same_tensors(
            &tensors(&fs::read(path).unwrap()),
            &tensors(&fs::read(adapter.path()).unwrap()),
            style.a,
        );
    }
}

#[test]
fn attention_processors_of_2023_are_read() {
    let folder = Folder::new();
    let style = Style { prefix: "unet.", a: "down.weight", b: "up.weight", ..PEFT };
    let at = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor";
    let modules =
        ["to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora"].map(|m| linear(format!("{at}.{m}"), H, H));
    let mut modules = styled(style, modules.to_vec());
    let encoder = Style { prefix: "text_encoder.", ..style };
    modules.push((encoder, linear("text_model.encoder.layers.0.self_attn.to_q_lora", H, H)));
    let linear_layer =
        Style { a: "lora_linear_layer.down.weight", b: "lora_linear_layer.up.weight", ..encoder };
    modules.push((linear_layer, linear("text_model.encoder.layers.0.self_attn.out_proj", H, H)));
    let adapter = folder.open("old.safetensors", &file(&modules));
    let (path, back) = folder.save(&adapter, "new.safetensors", Some(Format::Peft));
    assert_same_layers(&back, &adapter, "old");
    let names: Vec<_> =
        tensors(&fs::read(path).unwrap()).into_keys().filter(|key| key.contains("lora_A")).collect();
    let at = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1";
    let te = "text_encoder.text_model.encoder.layers.0.self_attn";
    let mut expected =
        ["to_k", "to_out.0", "to_q", "to_v"].map(|m| format!("{at}.{m}.lora_A.weight")).to_vec();
    expected.splice(0..0, ["out_proj", "q_proj"].map(|m| format!("{te}.{m}.lora_A.weight")));
    assert_eq!(names, expected);
}

#[test]
fn t5_is_one_encoder_under_two_numbers() {
    let folder = Folder::new();
    let t5 = linear("encoder.block.0.layer.0.SelfAttention.q", H, H);
    let of = |prefix, style| {
        let mut modules = styled(KOHYA, flux_fused()[..10].to_vec());
        modules.push((Style { prefix, ..style }, t5.clone()));
        file(&modules)
    };
    let key = "text_encoder_3.encoder_block_0_layer_0_SelfAttention_q";
    for (prefix, style) in [("lora_te2_", KOHYA), ("lora_te3_", KOHYA), ("text_encoder_2.", PEFT)] {
        let adapter = folder.open("t5.safetensors", &of(prefix, style));
        assert!(adapter.layers().iter().any(|layer| layer.key().as_str() == key), "{prefix}");
        let (path, _) = folder.save(&adapter, "peft.safetensors", Some(Format::Peft));
        let file = tensors(&fs::read(path).unwrap());
        assert!(
            file.contains_key("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"),
            "{prefix}"
        );
    }
}

#[test]
fn names_that_there_are_not_are_refused() {
    let folder = Folder::new();
    let adapter = folder.open("flux.safetensors", &file_for(model("flux1"), &styled(KOHYA, flux_fused())));
    let save = |adapter: &Adapter, format| {
        let options = SaveOptions { format: Some(format), overwrite: true, ..Default::default() };
        adapter.save(folder.0.path().join("x.safetensors"), &options).unwrap_err().to_string()
    };
    // XLabs adapts attention alone.
    let text = save(&adapter, Format::Xlabs);
    assert!(text.contains("no module of FLUX.1 that is known to have a name in xlabs"), "{text}");
    let unknown = folder.open("unknown.safetensors", &file(&styled(PEFT, vec![linear("a.b", H, H)])));
    let text = save(&unknown, Format::Xlabs);
    assert!(text.contains("is of a model that is not known, and so is what it is called in xlabs"), "{text}");
    let mut modules = flux_fused()[..4].to_vec();
    modules.push(linear("something.new", H, H));
    let adapter = folder.open("new.safetensors", &file(&styled(COMFYUI, modules)));
    let text = save(&adapter, Format::Peft);
    assert!(text.contains("something.new") && text.contains("peft"), "{text}");
    let uncut = file(&styled(KOHYA, vec![linear("double_blocks.0.img_attn.qkv", H, 3 * H + 1)]));
    let text = Adapter::open(folder.write("uncut.safetensors", &uncut)).unwrap_err().to_string();
    assert!(text.contains("img_attn_qkv") && text.contains("cannot be cut"), "{text}");
    // The same layer, fused and split.
    let mut twice = styled(PEFT, vec![linear("transformer_blocks.0.attn.to_q", H, H)]);
    twice.extend(styled(KOHYA, flux_fused()));
    let text = Adapter::open(folder.write("twice.safetensors", &file(&twice))).unwrap_err().to_string();
    assert!(text.contains("names the same layer"), "{text}");
}

#[test]
fn recordings_of_fused_modules_serve_their_parts() {
    let folder = Folder::new();
    let fused = folder.open("fused.safetensors", &file_for(model("flux1"), &styled(KOHYA, flux_fused())));
    let split =
        folder.open("split.safetensors", &file_for(model("flux1"), &styled(PEFT, flux_split(19, 38))));
    let device = Device::cpu();
    let mut calibration = Calibration::new([&fused, &split]).unwrap();
    let inputs = wave(5, H, 1.0);
    let x = RawMatrix::from_f32(5, H, inputs.data()).unwrap();
    calibration.accumulate(&device, 0, "double_blocks.0.img_attn.qkv", x).unwrap();
    calibration.accumulate(&device, 0, "transformer_blocks.0.attn.to_q", x).unwrap();
    let recorded =
        folder.write("x.safetensors", &file_of(&[], &[raw("single_blocks.0.linear1", &inputs, &[5, H])]));
    let control = Control::default();
    let summary = calibration.accumulate_file(&device, Source::Task(1), &recorded, &control).unwrap();
    assert_eq!((summary.layers.len(), summary.tokens), (4, 5));
    let tokens = |name: &str, task| calibration.tokens(&LayerKey::parse(name), task);
    assert_eq!(tokens("transformer_blocks.0.attn.to_q", 0), 10);
    assert_eq!(tokens("transformer_blocks.0.attn.to_v", 0), 5);
    assert_eq!(tokens("single_transformer_blocks.0.proj_mlp", 1), 5);
    let narrow = RawMatrix::from_f32(1, 5, &inputs.data()[..5]).unwrap();
    let wrong = calibration.accumulate(&device, 0, "double_blocks.0.img_attn.qkv", narrow);
    assert!(wrong.unwrap_err().to_string().contains("width 5"));
}

/// A wave that no two tensors share.
fn wave(rows: usize, cols: usize, seed: f64) -> Matrix<f32> {
    Matrix::from_fn(rows, cols, |i, j| ((i * cols + j) as f64 * 0.61 + seed).sin() as f32)
}

fn raw<'a>(name: &'a str, m: &Matrix<f32>, shape: &'a [usize]) -> Raw<'a> {
    assert_eq!(m.data().len(), shape.iter().product::<usize>());
    (name, "F32", shape, f32s(m.data()))
}

fn wide(m: &Matrix<f32>) -> Matrix {
    m.map(|v| v.into())
}

fn product(x: &Matrix, y: &Matrix) -> Matrix {
    assert_eq!(x.cols(), y.rows());
    Matrix::from_fn(x.rows(), y.cols(), |i, j| (0..x.cols()).map(|k| x[(i, k)] * y[(k, j)]).sum())
}

#[test]
fn convolutions_of_any_dimension() {
    let folder = Folder::new();
    for kernel in [&[1, 1][..], &[3, 3], &[3], &[2, 3, 4], &[1, 1, 1]] {
        let taps: usize = kernel.iter().product();
        let (a, b) = (wave(2, 5 * taps, 1.0), wave(4, 2, 2.0));
        let (a_shape, b_shape) =
            ([&[2, 5][..], kernel].concat(), [&[4, 2][..], &vec![1; kernel.len()]].concat());
        let bytes = file_of(
            &[],
            &[
                raw("lora_unet_x.lora_down.weight", &a, &a_shape),
                raw("lora_unet_x.lora_up.weight", &b, &b_shape),
            ],
        );
        let adapter = folder.open("conv.safetensors", &bytes);
        let layer = adapter.find("x").unwrap();
        assert_eq!((layer.kernel(), layer.input(), layer.output()), (kernel, 5 * taps, 4));
        // W[o, i, k] = Σ_r up[o, r]·down[r, i, k], flat in the order of memory.
        assert!(error(&delta(layer), &product(&wide(&b), &wide(&a))) <= 1e-15);
        let merged = Linear.merge(&[adapter.at(0.5), adapter.at(0.25)]).unwrap().adapter;
        let (path, back) = folder.save(&merged, "out.safetensors", None);
        let file = tensors(&fs::read(path).unwrap());
        assert_eq!(file["lora_unet_x.lora_down.weight"].1[2..], *kernel);
        assert_eq!(file["lora_unet_x.lora_up.weight"].1[2..], vec![1; kernel.len()]);
        let expected = product(&wide(&b), &wide(&a));
        let expected = expected.map(|v| 0.75 * v);
        // Rounded to f32.
        assert!(error(&delta(&back.layers()[0]), &expected) <= 1e-7);
    }
}

/// W[o, i, k] = Σ up[o, m]·mid[m, n, k]·down[n, i], flat.
fn tucker(up: &Matrix, mid: &Matrix, down: &Matrix) -> Matrix {
    let taps = mid.cols() / down.rows();
    Matrix::from_fn(up.rows(), down.cols() * taps, |o, j| {
        let (i, k) = (j / taps, j % taps);
        (0..up.cols())
            .flat_map(|m| (0..down.rows()).map(move |n| (m, n)))
            .map(|(m, n)| up[(o, m)] * mid[(m, n * taps + k)] * down[(n, i)])
            .sum()
    })
}

#[test]
fn tucker_cores_go_into_a() {
    let (up, mid, down) = (wave(4, 2, 1.0), wave(2, 2 * 9, 2.0), wave(2, 5, 3.0));
    for ones in [&[][..], &[1, 1]] {
        let (up_shape, down_shape) = ([&[4, 2][..], ones].concat(), [&[2, 5][..], ones].concat());
        let bytes = file_of(
            &[],
            &[
                raw("lora_unet_x.lora_up.weight", &up, &up_shape),
                raw("lora_unet_x.lora_mid.weight", &mid, &[2, 2, 3, 3]),
                raw("lora_unet_x.lora_down.weight", &down, &down_shape),
            ],
        );
        let adapter = Adapter::from_bytes("x", bytes).unwrap();
        let layer = &adapter.layers()[0];
        assert_eq!((layer.kernel(), layer.rank()), (&[3, 3][..], 2));
        // A is rounded to f32.
        assert!(error(&delta(layer), &tucker(&wide(&up), &wide(&mid), &wide(&down))) <= 1e-7);
    }
    let bytes = file_of(
        &[],
        &[
            raw("x.lora_up.weight", &up, &[4, 2]),
            raw("x.lora_mid.weight", &wave(2, 27, 2.0), &[2, 3, 3, 3]),
            raw("x.lora_down.weight", &down, &[2, 5]),
        ],
    );
    let text = Adapter::from_bytes("x", bytes).unwrap_err().to_string();
    assert!(text.contains("x.lora_mid.weight") && text.contains("does not fit"), "{text}");
}

#[test]
fn numbers_of_8_bits_are_read() {
    // 1, -1.5, 448 and 0.25 in e4m3; 1, -2, 57344 and 0.25 in e5m2.
    let b = vec![0x38, 0xbc, 0x7e, 0x28];
    for (dtype, a, expected) in [
        ("F8_E4M3", &b, [1.0, -1.5, 448.0, 0.25]),
        ("F8_E5M2", &vec![0x3c, 0xc0, 0x7b, 0x34], [1.0, -2.0, 57344.0, 0.25]),
    ] {
        let tensors = [
            ("x.lora_A.weight", dtype, &[1, 4][..], a.clone()),
            ("x.lora_B.weight", "F8_E4M3", &[1, 1], vec![0x38]),
        ];
        let adapter = Adapter::from_bytes("x", file_of(&[], &tensors)).unwrap();
        assert_eq!(adapter.layers()[0].a().to_vec::<f64>(), expected);
    }
}

#[test]
fn loha_is_a_lora_of_the_product_of_the_ranks() {
    let m: Vec<_> = [(6, 3), (3, 5), (6, 2), (2, 5)]
        .iter()
        .enumerate()
        .map(|(i, &(r, c))| wave(r, c, i as f64))
        .collect();
    let bytes = file_of(
        &[],
        &[
            raw("lora_unet_x.hada_w1_a", &m[0], &[6, 3]),
            raw("lora_unet_x.hada_w1_b", &m[1], &[3, 5]),
            raw("lora_unet_x.hada_w2_a", &m[2], &[6, 2]),
            raw("lora_unet_x.hada_w2_b", &m[3], &[2, 5]),
            ("lora_unet_x.alpha", "F32", &[], f32s(&[1.5])),
        ],
    );
    let w: Vec<_> = m.iter().map(wide).collect();
    let (x, y) = (product(&w[0], &w[1]), product(&w[2], &w[3]));
    let expected = Matrix::from_fn(6, 5, |i, j| 0.5 * x[(i, j)] * y[(i, j)]);
    let adapter = Adapter::from_bytes("x", bytes.clone()).unwrap();
    // No matrix of 6 x 5 has a higher rank.
    assert_eq!(adapter.layers()[0].rank(), 5);
    // Products of f32, rounded to f32.
    assert!(error(&delta(&adapter.layers()[0]), &expected) <= 1e-6);
    assert!(adapter.notes()[0].contains("LoHa") && adapter.notes()[0].contains("exactly"));

    let folder = Folder::new();
    let options = OpenOptions { truncate: Some(2), ..Default::default() };
    let cut = Adapter::open_with(folder.write("loha.safetensors", &bytes), &options).unwrap();
    let e = error(&delta(&cut.layers()[0]), &expected);
    assert_eq!(cut.layers()[0].rank(), 2);
    let said = format!("{:.2}%", 100.0 * e);
    assert!(e > 0.01 && cut.notes()[0].contains(&said), "{said}: {:?}", cut.notes());
}

#[test]
fn lokr_is_a_lora() {
    let folder = Folder::new();
    let kron = |x: &Matrix, y: &Matrix| {
        Matrix::from_fn(x.rows() * y.rows(), x.cols() * y.cols(), |i, j| {
            x[(i / y.rows(), j / y.cols())] * y[(i % y.rows(), j % y.cols())]
        })
    };
    let (w1, w1a, w1b) = (wave(2, 3, 1.0), wave(2, 1, 2.0), wave(1, 3, 3.0));
    let (w2, w2a, w2b) = (wave(4, 5, 4.0), wave(4, 2, 5.0), wave(2, 5, 6.0));
    let alpha: Raw = ("lora_unet_x.alpha", "F32", &[], f32s(&[0.5]));
    let key = |name: &'static str| format!("lora_unet_x.lokr_{name}");
    let (k1, k1a, k1b) = (key("w1"), key("w1_a"), key("w1_b"));
    let (k2, k2a, k2b) = (key("w2"), key("w2_a"), key("w2_b"));
    let first = [
        (vec![raw(&k1, &w1, &[2, 3])], wide(&w1), 2, None),
        (
            vec![raw(&k1a, &w1a, &[2, 1]), raw(&k1b, &w1b, &[1, 3])],
            product(&wide(&w1a), &wide(&w1b)),
            1,
            Some(1.0),
        ),
    ];
    let second = [
        (vec![raw(&k2, &w2, &[4, 5])], wide(&w2), 4, None),
        (
            vec![raw(&k2a, &w2a, &[4, 2]), raw(&k2b, &w2b, &[2, 5])],
            product(&wide(&w2a), &wide(&w2b)),
            2,
            Some(2.0),
        ),
    ];
    for (x, w1, r1, d1) in &first {
        for (y, w2, r2, d2) in &second {
            let tensors = [&x[..], y, std::slice::from_ref(&alpha)].concat();
            // Alpha counts for what is decomposed alone.
            let scale = d2.or(*d1).map_or(1.0, |rank| 0.5 / rank);
            let expected = kron(w1, w2);
            let expected = expected.map(|v| v * scale);
            let path = folder.write("lokr.safetensors", &file_of(&[], &tensors));
            let adapter = Adapter::open(&path).unwrap();
            assert_eq!(adapter.layers()[0].rank(), r1 * r2);
            // Rounded to f32 once.
            assert!(error(&delta(&adapter.layers()[0]), &expected) <= 1e-6);
            let options = OpenOptions { truncate: Some(1), ..Default::default() };
            let cut = Adapter::open_with(&path, &options).unwrap();
            assert_eq!(cut.layers()[0].rank(), 1);
            let said = format!("{:.2}%", 100.0 * error(&delta(&cut.layers()[0]), &expected));
            assert!(r1 * r2 == 1 || cut.notes()[0].contains(&said), "{said}: {:?}", cut.notes());
        }
    }
    // Too high a rank is refused, with the way out.
    let (big1, big2) = (wave(20, 20, 1.0), wave(20, 20, 2.0));
    let tensors = [raw(&k1, &big1, &[20, 20]), raw(&k2, &big2, &[20, 20])];
    let text = Adapter::from_bytes("big", file_of(&[], &tensors)).unwrap_err().to_string();
    assert!(text.contains("LoKr") && text.contains("rank 400") && text.contains("rank to cut to"), "{text}");
}

#[test]
fn lokr_of_a_convolution_and_of_a_fused_module() {
    let (w1, w2) = (wave(2, 2, 1.0), wave(3, 4 * 9, 2.0));
    let tensors = [raw("lora_unet_x.lokr_w1", &w1, &[2, 2]), raw("lora_unet_x.lokr_w2", &w2, &[3, 4, 3, 3])];
    let adapter = Adapter::from_bytes("x", file_of(&[], &tensors)).unwrap();
    let layer = &adapter.layers()[0];
    assert_eq!((layer.kernel(), layer.input(), layer.output()), (&[3, 3][..], 72, 6));
    let d = delta(layer);
    for (o, i, k) in [(0, 0, 0), (5, 7, 8), (3, 2, 4)] {
        let expected = f64::from(w1[(o / 3, i / 4)]) * f64::from(w2[(o % 3, (i % 4) * 9 + k)]);
        assert!((d[(o, i * 9 + k)] - expected).abs() <= 1e-6);
    }
    let folder = Folder::new();
    let (w1, w2) = (wave(3, 1, 1.0), wave(H, H, 2.0));
    let name = |part: &str| format!("lora_unet_double_blocks_0_img_attn_qkv.lokr_{part}");
    let (n1, n2) = (name("w1"), name("w2"));
    let adapter =
        folder.open("fused.safetensors", &file_of(&[], &[raw(&n1, &w1, &[3, 1]), raw(&n2, &w2, &[H, H])]));
    assert_eq!(adapter.layers().len(), 3);
    let q = delta(adapter.find("transformer_blocks.0.attn.to_q").unwrap());
    let expected = Matrix::from_fn(H, H, |i, j| f64::from(w1[(0, 0)]) * f64::from(w2[(i, j)]));
    assert!(error(&q, &expected) <= 1e-6);
}

#[test]
fn dora_is_merged_with_the_base_weights() {
    let folder = Folder::new();
    let (a, b, base) = (wave(2, 5, 1.0), wave(4, 2, 2.0), wave(4, 5, 3.0));
    let (per_output, per_input) = (wave(4, 1, 4.0), wave(1, 5, 5.0));
    let keys =
        ("transformer_blocks.0.attn.to_q.lora_A.weight", "transformer_blocks.0.attn.to_q.lora_B.weight");
    let mut new = product(&wide(&b), &wide(&a));
    new.data_mut().iter_mut().zip(base.data()).for_each(|(n, w)| *n = *n * 0.5 + f64::from(*w));
    let norm = |of: &dyn Fn(usize) -> bool| {
        let picked = (0..20).filter(|&k| of(k)).map(|k| new.data()[k] * new.data()[k]);
        picked.sum::<f64>().sqrt()
    };
    for (suffix, m, shape, per_in) in [
        ("lora_magnitude_vector", &per_output, &[4][..], false),
        ("magnitude", &per_output, &[4], false),
        ("dora_scale", &per_output, &[4, 1], false),
        ("dora_scale", &per_input, &[1, 5], true),
    ] {
        let norms = format!("transformer_blocks.0.attn.to_q.{suffix}");
        let tensors = [raw(keys.0, &a, &[2, 5]), raw(keys.1, &b, &[4, 2]), raw(&norms, m, shape)];
        let path = folder.write("dora.safetensors", &file_of(&[("lora_alpha", "1")], &tensors));
        let expected = Matrix::from_fn(4, 5, |i, j| {
            let (k, n) = if per_in { (j, norm(&|k| k % 5 == j)) } else { (i, norm(&|k| k / 5 == i)) };
            f64::from(m.data()[k]) * new[(i, j)] / n - f64::from(base[(i, j)])
        });
        let text = Adapter::open(&path).unwrap_err().to_string();
        assert!(text.contains(suffix) && text.contains("base model's weights"), "{text}");
        let weights = [raw("model.diffusion_model.transformer_blocks.0.attn.to_q.weight", &base, &[4, 5])];
        let weights = folder.write("base.safetensors", &file_of(&[], &weights));
        let open = |rank| {
            let options =
                OpenOptions { base: Some(weights.clone()), truncate: Some(rank), ..Default::default() };
            Adapter::open_with(&path, &options).unwrap()
        };
        let whole = open(4);
        // All that there is of rank; rounded to f32.
        assert!(error(&delta(&whole.layers()[0]), &expected) <= 1e-6, "{suffix} {shape:?}");
        let cut = open(2);
        let said = format!("{:.2}%", 100.0 * error(&delta(&cut.layers()[0]), &expected));
        assert!(cut.notes()[0].contains(&said), "{said}: {:?}", cut.notes());
    }
}

#[test]
fn dora_finds_fused_and_split_weights() {
    let folder = Folder::new();
    let base = wave(3 * H, H, 3.0);
    let dora = |module: &str, output: usize| {
        let key = |suffix: &str| format!("{module}.{suffix}");
        let (a, b, m) = (wave(2, H, 1.0), wave(output, 2, 2.0), wave(output, 1, 4.0));
        let (ka, kb, km) = (key("lora_A.weight"), key("lora_B.weight"), key("lora_magnitude_vector"));
        file_of(&[], &[raw(&ka, &a, &[2, H]), raw(&kb, &b, &[output, 2]), raw(&km, &m, &[output])])
    };
    let open = |file: &[u8], weights: &[Raw]| {
        let base = Some(folder.write("base.safetensors", &file_of(&[], weights)));
        let options = OpenOptions { base, truncate: Some(H), ..Default::default() };
        Adapter::open_with(folder.write("dora.safetensors", file), &options)
    };
    let fused = [raw("double_blocks.0.img_attn.qkv.weight", &base, &[3 * H, H])];
    let rows = |i: usize| Matrix::new(H, H, base.data()[i * H * H..(i + 1) * H * H].to_vec()).unwrap();
    let parts = [rows(0), rows(1), rows(2)];
    let split = [
        raw("transformer_blocks.0.attn.to_q.weight", &parts[0], &[H, H]),
        raw("transformer_blocks.0.attn.to_k.weight", &parts[1], &[H, H]),
        raw("transformer_blocks.0.attn.to_v.weight", &parts[2], &[H, H]),
    ];
    let file = dora("diffusion_model.double_blocks.0.img_attn.qkv", 3 * H);
    assert_same_layers(&open(&file, &fused).unwrap(), &open(&file, &split).unwrap(), "a fused adapter");
    let mut file = vec![linear("single_transformer_blocks.0.proj_out", H, H)];
    file.push(linear("transformer_blocks.0.attn.to_k", H, H));
    let other = Adapter::from_bytes("x", self::file(&styled(PEFT, file))).unwrap();
    assert_eq!(other.family().and(model("flux1")), model("flux1"));
    let text = open(&dora("transformer.other", H), &split).unwrap_err().to_string();
    assert!(text.contains("base.safetensors") && text.contains("does not hold its weights"), "{text}");
}

#[test]
fn strengths_by_name_and_by_block() {
    let folder = Folder::new();
    let flux = folder.open("flux.safetensors", &file_for(model("flux1"), &styled(KOHYA, flux_fused())));
    let scales = |adapter: &Adapter, strengths: &Strengths| {
        let scaled = adapter.with_strengths(strengths).unwrap();
        scaled
            .layers()
            .iter()
            .map(|l| (l.key().as_str().to_owned(), l.scale().value))
            .collect::<BTreeMap<_, _>>()
    };
    let by_name = |rules: &[(&str, f64)]| Strengths {
        by_name: rules.iter().map(|(pattern, s)| ((*pattern).to_owned(), *s)).collect(),
        by_block: None,
    };
    // Native names, those of diffusers, and those of the file are all understood; the last match counts.
    let rules =
        [("double_blocks.*", 0.5), ("transformer_blocks.3.*", 0.25), ("lora_unet_single_blocks_7_*", 9.0)];
    assert!(
        flux.with_strengths(&by_name(&rules))
            .unwrap_err()
            .to_string()
            .contains("lora_unet_single_blocks_7_*")
    );
    let found = scales(&flux, &by_name(&[rules[0], rules[1], ("single_blocks_7_linear1", -1.0)]));
    assert_eq!(found["transformer_blocks_2_attn_to_q"], 0.5);
    assert_eq!(found["transformer_blocks_3_attn_to_q"], 0.25);
    assert_eq!(found["single_transformer_blocks_7_proj_mlp"], -1.0);
    assert_eq!(found["single_transformer_blocks_7_proj_out"], 1.0);

    let names = BlockPreset::of(model("flux1"), None).unwrap();
    let names = names.names();
    let list: Vec<f64> = (0..names.len()).map(|i| i as f64).collect();
    let blocks = |by_block: &[f64]| Strengths { by_name: Vec::new(), by_block: Some(by_block.to_vec()) };
    let found = scales(&flux, &blocks(&list));
    assert_eq!((names.len(), names[3].clone(), names[22].clone()), (61, "D00".to_owned(), "S00".to_owned()));
    assert_eq!(found["transformer_blocks_0_attn_to_q"], 3.0);
    assert_eq!(found["single_transformer_blocks_37_proj_mlp"], 59.0);
    let text = flux.with_strengths(&blocks(&[1.0; 5])).unwrap_err().to_string();
    assert!(text.contains("5 block strengths") && text.contains("61"), "{text}");

    let sdxl = folder.open("sdxl.safetensors", &file(&sdxl_kohya()));
    let list: Vec<f64> = (0..20).map(f64::from).collect();
    let found = scales(&sdxl, &blocks(&list));
    assert_eq!(found["down_blocks_1_attentions_0_proj_in"], 5.0, "IN04");
    assert_eq!(found["mid_block_attentions_0_proj_in"], 10.0, "M00");
    assert_eq!(found["up_blocks_1_upsamplers_0_conv"], 16.0, "OUT05");
    assert_eq!(found["text_encoder.text_model_encoder_layers_0_mlp_fc1"], 0.0, "BASE");
    // The 12 have no places for convolutions outside of attention.
    let few = sdxl.with_strengths(&blocks(&[0.5; 12])).unwrap();
    assert!(few.notes()[0].contains("in no block of the list"), "{:?}", few.notes());

    let sd1 = folder.open("sd1.safetensors", &file_for(model("sd1"), &sd1_kohya()));
    let list: Vec<f64> = (0..17).map(f64::from).collect();
    let found = scales(&sd1, &blocks(&list));
    assert_eq!(found["down_blocks_0_attentions_0_proj_in"], 1.0, "IN01");
    assert_eq!(found["up_blocks_1_attentions_0_proj_in"], 8.0, "OUT03");
    assert_eq!(found["up_blocks_3_attentions_2_proj_in"], 16.0, "OUT11");
    let on = |name: &str| BlockPreset::named(model("sd1"), name).unwrap();
    assert_eq!(on("INS"), [1., 1., 1., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0., 0.]);
    assert_eq!(on("MIDD"), [1., 0., 0., 0., 1., 1., 1., 1., 1., 1., 1., 1., 0., 0., 0., 0., 0.]);
    assert_eq!(on("OUTALL"), [1., 0., 0., 0., 0., 0., 0., 0., 1., 1., 1., 1., 1., 1., 1., 1., 1.]);
    assert!(BlockPreset::named(model("sd1"), "DOUBLE").is_err());
    assert!(BlockPreset::named(model("prx"), "SINGLE").is_err());

    // A merge takes them like any scale.
    let half = flux.with_strengths(&by_name(&[("*", 0.5)])).unwrap();
    let merged = Linear.merge(&[half.at(1.0), flux.at(0.5)]).unwrap().adapter;
    for (layer, one) in merged.layers().iter().zip(flux.layers()) {
        assert!(error(&delta(layer), &delta(one)) <= 1e-6);
    }
}

#[test]
fn norms_are_those_of_the_update() {
    let adapter = Adapter::from_bytes(
        "x",
        file_for(model("flux1"), &styled(Style { alpha: Some(-0.5), ..KOHYA }, flux_fused())),
    )
    .unwrap();
    for layer in adapter.layers().iter().take(20) {
        let norm = delta(layer).data().iter().map(|v| v * v).sum::<f64>().sqrt();
        assert!((layer.norm() - norm).abs() <= 1e-12 * norm);
    }
    assert_eq!(adapter.layers()[0].block(), "S00");
    let wan = Adapter::from_bytes("x", file(&styled(COMFYUI, wan()))).unwrap();
    assert_eq!(wan.layers()[0].block(), "B00");
}

#[test]
fn metadata_of_merges_names_what_went_in() {
    let folder = Folder::new();
    let tagged = |name: &str, metadata: &[(&str, &str)]| {
        let modules: Vec<Raw> = Vec::new();
        let (a, b) = (wave(1, 2, 1.0), wave(2, 1, 2.0));
        let tensors =
            [&modules[..], &[raw("x.lora_A.weight", &a, &[1, 2]), raw("x.lora_B.weight", &b, &[2, 1])]];
        folder.open(name, &file_of(metadata, &tensors.concat()))
    };
    let cat = tagged(
        "cat.safetensors",
        &[
            ("modelspec.title", "Cat"),
            ("modelspec.architecture", "flux-1-dev/lora"),
            ("modelspec.trigger_phrase", "sks cat, fur"),
            ("modelspec.hash_sha256", "0xdead"),
            ("sshs_model_hash", "dead"),
            ("ss_tag_frequency", r#"{"1_cat": {"cat": 3, "fur": 1}}"#),
            ("ss_output_name", "cat-v1"),
        ],
    );
    let dog = tagged(
        "dog.safetensors",
        &[
            ("modelspec.architecture", "flux-1-dev/lora"),
            ("modelspec.trigger_phrase", "fur, sks dog"),
            ("ss_tag_frequency", r#"{"1_cat": {"cat": 2}, "1_dog": {"dog": 5}}"#),
        ],
    );
    let merged = Linear.merge(&[cat.at(1.0), dog.at(1.0)]).unwrap().adapter;
    let path = folder.0.path().join("merged.safetensors");
    merged.save(&path, &SaveOptions::default()).unwrap();
    let back = Adapter::open(&path).unwrap();
    let said = |key: &str| back.metadata().get(key).map(String::as_str);
    assert_eq!(said("modelspec.merged_from"), Some("Cat, dog"));
    assert_eq!(said("modelspec.architecture"), Some("flux-1-dev/lora"));
    assert_eq!(said("modelspec.trigger_phrase"), Some("sks cat, fur, sks dog"));
    assert_eq!((said("modelspec.title"), said("ss_output_name")), (None, None));
    let tags: serde_json::Value = serde_json::from_str(said("ss_tag_frequency").unwrap()).unwrap();
    assert_eq!(tags, serde_json::json!({"1_cat": {"cat": 5, "fur": 1}, "1_dog": {"dog": 5}}));
    let hash = said("sshs_model_hash").unwrap();
    assert_eq!(said("modelspec.hash_sha256"), Some(format!("0x{hash}").as_str()));
    assert_eq!((hash.len(), hash == "dead"), (64, false));
    assert!(said("loraweld.inputs").unwrap().contains("cat"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    /// Any modules of any family, in any order of formats, come back.
    #[test]
    fn chains_of_conversions_lose_nothing(
        case in any::<prop::sample::Index>(),
        picked in prop::collection::vec(any::<prop::sample::Index>(), 1..12),
        chain in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
    ) {
        let folder = Folder::new();
        let cases = cases();
        let case = &cases[case.index(cases.len())];
        let all = Adapter::from_bytes("all", case.bytes.clone()).unwrap();
        let keep: BTreeSet<usize> = picked.iter().map(|i| i.index(all.layers().len())).collect();
        let layers: Vec<Layer> = keep.iter().map(|&i| all.layers()[i].clone()).collect();
        let first = Adapter::new("some", all.format(), layers).unwrap().spelled_like(&all);
        let mut adapter = first.clone();
        for (n, to) in chain.iter().enumerate() {
            // A few layers do not tell the family any more, but the metadata does.
            let format = case.through[to.index(case.through.len())];
            let metadata = [(MODEL.to_owned(), case.family.id().unwrap().to_owned())].into();
            let options = SaveOptions { format: Some(format), metadata, ..Default::default() };
            let path = folder.0.path().join(format!("{n}.safetensors"));
            if adapter.family() == Family::UNKNOWN {
                break;
            }
            adapter.save(&path, &options).unwrap_or_else(|e| panic!("{} to {format}: {e}", case.name));
            adapter = Adapter::open(&path).unwrap();
            assert_same_layers(&adapter, &first, case.name);
        }
    }
}
