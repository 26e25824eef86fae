//! Baking adapters into checkpoints, and getting them out again: every layout, type and way of fusing, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::files::{f32s, file_of, tensors};
use loraweld::checkpoint::{BakedLayer, Extracted};
use loraweld::{
    Adapter, Bake, BakeOptions, BakeReport, Checkpoint, Control, Extract, ExtractOptions, Format,
    OpenOptions, Progress, Result, Round, SaveOptions, Spectrum, SvdMerge, Truncation,
};
use tempfile::TempDir;

struct Random(u64);

impl Random {
    /// Between -1 and 1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn values(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.next() * size).collect()
    }
}

/// A tensor of a checkpoint: name and shape.
type Weight = (&'static str, &'static [usize]);

/// A layer of an adapter, where it has to arrive, and how: module, shape, kernel, tensor, first row, how.
type Layer = (&'static str, [usize; 2], &'static [usize], &'static str, usize, How);

#[derive(Clone, Copy, PartialEq)]
enum How {
    AsIs,
    Swapped,
    Transposed,
}
use How::{AsIs, Swapped, Transposed};

struct Model {
    name: &'static str,
    family: &'static str,
    weights: &'static [Weight],
    suffixes: [&'static str; 2],
    layers: &'static [Layer],
}

const PEFT: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];
const KOHYA: [&str; 2] = [".lora_down.weight", ".lora_up.weight"];
const RANK: usize = 4;

/// FLUX.1 at a 64th of its width.
const FLUX: &[Layer] = &[
    (
        "transformer.transformer_blocks.0.attn.to_q",
        [48, 48],
        &[],
        "double_blocks.0.img_attn.qkv.weight",
        0,
        AsIs,
    ),
    (
        "transformer.transformer_blocks.0.attn.to_v",
        [48, 48],
        &[],
        "double_blocks.0.img_attn.qkv.weight",
        96,
        AsIs,
    ),
    (
        "transformer.transformer_blocks.0.ff.net.0.proj",
        [192, 48],
        &[],
        "double_blocks.0.img_mlp.0.weight",
        0,
        AsIs,
    ),
    (
        "transformer.single_transformer_blocks.3.proj_mlp",
        [192, 48],
        &[],
        "single_blocks.3.linear1.weight",
        144,
        AsIs,
    ),
    ("transformer.norm_out.linear", [96, 48], &[], "final_layer.adaLN_modulation.1.weight", 0, Swapped),
];
const FLUX_NATIVE: Model = Model {
    name: "FLUX.1, native",
    family: "flux1",
    weights: &[
        ("double_blocks.0.img_attn.qkv.weight", &[144, 48]),
        ("double_blocks.0.img_attn.qkv.bias", &[144]),
        ("double_blocks.0.img_attn.norm.key_norm.scale", &[16]),
        ("double_blocks.0.img_mlp.0.weight", &[192, 48]),
        ("double_blocks.0.img_mod.lin.weight", &[288, 48]),
        ("double_blocks.0.txt_attn.qkv.weight", &[144, 48]),
        ("single_blocks.3.linear1.weight", &[336, 48]),
        ("single_blocks.3.linear2.weight", &[48, 240]),
        ("final_layer.adaLN_modulation.1.weight", &[96, 48]),
        ("txt_in.weight", &[48, 64]),
    ],
    suffixes: PEFT,
    layers: FLUX,
};
const MODELS: &[Model] = &[
    FLUX_NATIVE,
    Model {
        name: "FLUX.1, diffusers",
        family: "flux1",
        weights: &[
            ("transformer_blocks.0.attn.to_q.weight", &[48, 48]),
            ("transformer_blocks.0.attn.to_k.weight", &[48, 48]),
            ("transformer_blocks.0.attn.to_v.weight", &[48, 48]),
            ("transformer_blocks.0.attn.add_q_proj.weight", &[48, 48]),
            ("transformer_blocks.0.ff.net.0.proj.weight", &[192, 48]),
            ("single_transformer_blocks.3.proj_mlp.weight", &[192, 48]),
            ("single_transformer_blocks.3.proj_mlp.bias", &[192]),
            ("norm_out.linear.weight", &[96, 48]),
            ("context_embedder.weight", &[48, 64]),
            ("time_text_embed.text_embedder.linear_1.weight", &[48, 12]),
            ("time_text_embed.guidance_embedder.linear_1.weight", &[48, 4]),
        ],
        suffixes: KOHYA,
        layers: &[
            ("lora_unet_double_blocks_0_img_attn_qkv", [144, 48], &[], "*", 0, AsIs),
            (
                "lora_unet_double_blocks_0_img_mlp_0",
                [192, 48],
                &[],
                "transformer_blocks.0.ff.net.0.proj.weight",
                0,
                AsIs,
            ),
            ("lora_unet_final_layer_adaLN_modulation_1", [96, 48], &[], "norm_out.linear.weight", 0, Swapped),
        ],
    },
    Model {
        name: "SDXL, one file",
        family: "sdxl",
        weights: &[
            ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", &[32, 32, 3, 3]),
            ("model.diffusion_model.input_blocks.1.0.in_layers.2.bias", &[32]),
            ("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", &[64, 64]),
            ("model.diffusion_model.input_blocks.4.1.proj_in.weight", &[64, 64]),
            ("model.diffusion_model.label_emb.0.0.weight", &[128, 283]),
            (
                "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
                &[77, 77],
            ),
            ("conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight", &[50, 77]),
            ("conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight", &[384, 128]),
            ("conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_fc.weight", &[512, 128]),
            ("conditioner.embedders.1.model.text_projection", &[128, 96]),
            ("first_stage_model.decoder.conv_in.weight", &[16, 4, 3, 3]),
        ],
        suffixes: KOHYA,
        layers: &[
            (
                "lora_unet_input_blocks_1_0_in_layers_2",
                [32, 288],
                &[3, 3],
                "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
                0,
                AsIs,
            ),
            (
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
                [64, 64],
                &[],
                "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
                0,
                AsIs,
            ),
            (
                "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
                [77, 77],
                &[],
                "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
                0,
                AsIs,
            ),
            (
                "lora_te2_text_model_encoder_layers_2_self_attn_k_proj",
                [128, 128],
                &[],
                "conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight",
                128,
                AsIs,
            ),
            (
                "lora_te2_text_model_encoder_layers_2_mlp_fc1",
                [512, 128],
                &[],
                "conditioner.embedders.1.model.transformer.resblocks.2.mlp.c_fc.weight",
                0,
                AsIs,
            ),
            (
                "lora_te2_text_projection",
                [96, 128],
                &[],
                "conditioner.embedders.1.model.text_projection",
                0,
                Transposed,
            ),
        ],
    },
    Model {
        name: "SD 1.5",
        family: "sd1",
        weights: &[
            ("model.diffusion_model.input_blocks.1.1.proj_in.weight", &[80, 80, 1, 1]),
            ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", &[80, 192]),
            ("model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight", &[320, 320]),
            ("cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight", &[192, 768]),
            ("alphas_cumprod", &[1000]),
        ],
        suffixes: KOHYA,
        layers: &[
            (
                "lora_unet_down_blocks_0_attentions_0_proj_in",
                [80, 80],
                &[1, 1],
                "model.diffusion_model.input_blocks.1.1.proj_in.weight",
                0,
                AsIs,
            ),
            (
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
                [80, 192],
                &[],
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
                0,
                AsIs,
            ),
            (
                "lora_te_text_model_encoder_layers_11_mlp_fc2",
                [192, 768],
                &[],
                "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight",
                0,
                AsIs,
            ),
        ],
    },
    Model {
        name: "Wan",
        family: "wan",
        weights: &[
            ("blocks.0.self_attn.q.weight", &[48, 48]),
            ("blocks.0.cross_attn.k.weight", &[48, 48]),
            ("blocks.0.ffn.0.weight", &[280, 48]),
            ("blocks.0.modulation", &[1, 6, 48]),
            ("patch_embedding.weight", &[48, 16, 1, 2, 2]),
        ],
        suffixes: PEFT,
        layers: &[
            ("diffusion_model.blocks.0.self_attn.q", [48, 48], &[], "blocks.0.self_attn.q.weight", 0, AsIs),
            ("diffusion_model.blocks.0.ffn.0", [280, 48], &[], "blocks.0.ffn.0.weight", 0, AsIs),
        ],
    },
    Model {
        name: "Qwen-Image",
        family: "qwen_image",
        weights: &[
            ("model.diffusion_model.transformer_blocks.0.attn.to_q.weight", &[48, 48]),
            ("model.diffusion_model.transformer_blocks.0.attn.add_k_proj.weight", &[48, 48]),
            ("model.diffusion_model.transformer_blocks.0.img_mlp.net.2.weight", &[48, 192]),
            ("model.diffusion_model.transformer_blocks.0.img_mod.1.weight", &[288, 48]),
            ("model.diffusion_model.txt_norm.weight", &[48]),
            ("model.diffusion_model.txt_in.weight", &[48, 56]),
        ],
        suffixes: PEFT,
        layers: &[
            (
                "transformer.transformer_blocks.0.attn.to_q",
                [48, 48],
                &[],
                "model.diffusion_model.transformer_blocks.0.attn.to_q.weight",
                0,
                AsIs,
            ),
            (
                "transformer.transformer_blocks.0.img_mlp.net.2",
                [48, 192],
                &[],
                "model.diffusion_model.transformer_blocks.0.img_mlp.net.2.weight",
                0,
                AsIs,
            ),
        ],
    },
];

/// How a checkpoint's matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stored {
    F32,
    F16,
    Bf16,
    E4m3,
    E5m2,
    /// E4M3 and E5M2 with a scale of each weight, and one of each row.
    E4m3Scaled,
    E5m2Rows,
}

const TYPES: [Stored; 7] = [
    Stored::F32,
    Stored::F16,
    Stored::Bf16,
    Stored::E4m3,
    Stored::E5m2,
    Stored::E4m3Scaled,
    Stored::E5m2Rows,
];

impl Stored {
    fn dtype(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::E4m3 | Self::E4m3Scaled => "F8_E4M3",
            Self::E5m2 | Self::E5m2Rows => "F8_E5M2",
        }
    }
}

fn from_f8(bits: u8, dtype: &str) -> f32 {
    if dtype == "F8_E5M2" {
        return half::f16::from_bits(u16::from(bits) << 8).to_f32();
    }
    let (sign, e, m) = (if bits > 127 { -1.0 } else { 1.0 }, i32::from(bits >> 3 & 15), f32::from(bits & 7));
    match (e, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * m / 512.0,
        _ => sign * (1.0 + m / 8.0) * 2f32.powi(e - 7),
    }
}

/// The nearest number of 8 bits.
fn to_f8(value: f32, all: &[(f32, u8)]) -> u8 {
    let after = all.partition_point(|(v, _)| *v < value);
    let near = &all[after.saturating_sub(1)..(after + 1).min(all.len())];
    near.iter().min_by(|x, y| (x.0 - value).abs().total_cmp(&(y.0 - value).abs())).unwrap().1
}

fn encode(values: &[f32], dtype: &str) -> Vec<u8> {
    match dtype {
        "F32" => f32s(values),
        "F16" => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        "BF16" => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => {
            let mut all: Vec<(f32, u8)> = (0..=255).map(|bits| (from_f8(bits, dtype), bits)).collect();
            all.retain(|(v, _)| v.is_finite());
            all.sort_by(|x, y| x.0.total_cmp(&y.0));
            values.iter().map(|v| to_f8(*v, &all)).collect()
        }
    }
}

fn decode(bytes: &[u8], dtype: &str) -> Vec<f32> {
    match dtype {
        "F32" => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        "F16" => bytes.chunks(2).map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect(),
        "BF16" => {
            bytes.chunks(2).map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
        _ => bytes.iter().map(|b| from_f8(*b, dtype)).collect(),
    }
}

/// A checkpoint's file.
fn checkpoint(weights: &[Weight], stored: Stored) -> Vec<u8> {
    let mut random = Random(weights.len() as u64);
    let mut all: Vec<(String, &str, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, shape) in weights {
        let n: usize = shape.iter().product();
        let mut values = random.values(n, 0.5);
        if shape.len() < 2 || !name.ends_with("weight") {
            all.push(((*name).into(), "F32", shape.to_vec(), f32s(&values)));
            continue;
        }
        let module = name.trim_end_matches(".weight").trim_end_matches("_weight");
        match stored {
            Stored::E4m3Scaled => {
                let scale = 0.5 / 448.0;
                values.iter_mut().for_each(|v| *v /= scale);
                all.push((format!("{module}.scale_weight"), "F32", vec![], f32s(&[scale])));
                all.push((format!("{module}.scale_input"), "F32", vec![], f32s(&[1.0])));
            }
            Stored::E5m2Rows => {
                let scales: Vec<f32> =
                    (0..shape[0]).map(|i| 0.5 / 57344.0 * (1.0 + i as f32 / 7.0)).collect();
                for (row, scale) in values.chunks_mut(n / shape[0]).zip(&scales) {
                    row.iter_mut().for_each(|v| *v /= scale);
                }
                all.push((format!("{module}.weight_scale"), "F32", vec![shape[0], 1], f32s(&scales)));
            }
            _ => {}
        }
        all.push(((*name).into(), stored.dtype(), shape.to_vec(), encode(&values, stored.dtype())));
    }
    let raw: Vec<crate::common::files::Raw> = all
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, &shape[..], bytes.clone()))
        .collect();
    file_of(&[("modelspec.title", "a model"), ("modelspec.hash_sha256", "0x00")], &raw)
}

/// What is in a file, by name, with scales.
fn values(bytes: &[u8]) -> BTreeMap<String, Vec<f32>> {
    let all = tensors(bytes);
    let value = |(name, (dtype, shape, bytes)): (&String, &(String, Vec<usize>, Vec<u8>))| {
        let mut values = decode(bytes, dtype);
        let module = name.trim_end_matches(".weight").trim_end_matches("_weight");
        let scale = ["scale_weight", "weight_scale"].iter().find_map(|s| all.get(&format!("{module}.{s}")));
        if let Some((dtype, _, bytes)) = scale.filter(|_| shape.len() > 1) {
            let scales = decode(bytes, dtype);
            let width = values.len() / scales.len();
            values.chunks_mut(width).zip(scales).for_each(|(row, s)| row.iter_mut().for_each(|v| *v *= s));
        }
        (name.clone(), values)
    };
    all.iter().map(value).collect()
}

const STRENGTH: f64 = 0.75;

/// An adapter's file, and the updates that it is to make at [`STRENGTH`].
fn lora(model: &Model, size: f32) -> (Vec<u8>, Vec<Vec<f32>>) {
    let mut random = Random(77);
    let (mut raw, mut updates) = (Vec::new(), Vec::new());
    for (module, [rows, cols], kernel, ..) in model.layers {
        let (a, b) = (random.values(RANK * cols, size), random.values(rows * RANK, size));
        let k: usize = kernel.iter().product();
        let a_shape = [&[RANK, cols / k][..], kernel].concat();
        let b_shape = [&[*rows, RANK][..], &vec![1; kernel.len()]].concat();
        let update = (0..rows * cols).map(|at| {
            let (i, j) = (at / cols, at % cols);
            let sum: f64 = (0..RANK).map(|k| f64::from(b[i * RANK + k]) * f64::from(a[k * cols + j])).sum();
            (sum * STRENGTH * 0.5) as f32
        });
        updates.push(update.collect());
        raw.push((format!("{module}{}", model.suffixes[0]), a_shape, f32s(&a)));
        raw.push((format!("{module}{}", model.suffixes[1]), b_shape, f32s(&b)));
        raw.push((format!("{module}.alpha"), vec![], f32s(&[RANK as f32 / 2.0])));
    }
    let raw: Vec<crate::common::files::Raw> =
        raw.iter().map(|(name, shape, bytes)| (name.as_str(), "F32", &shape[..], bytes.clone())).collect();
    (file_of(&[], &raw), updates)
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn open_for(checkpoint: &Checkpoint, path: &Path) -> Adapter {
    let options = OpenOptions { family: Some(checkpoint.family()), ..Default::default() };
    Adapter::open_with(path, &options).unwrap()
}

fn bake(
    checkpoint: &Checkpoint,
    adapter: &Adapter,
    strength: f64,
    to: &Path,
    round: Round,
) -> Result<BakeReport> {
    let options = BakeOptions { round, ..Default::default() };
    Bake::new(checkpoint, &[adapter.at(strength)], &options)?.save(to, &Control::default())
}

/// A model, its adapter, and the two baked together.
struct Case {
    folder: Folder,
    base: Checkpoint,
    tuned: Checkpoint,
    report: BakeReport,
    updates: Vec<Vec<f32>>,
}

fn case(model: &Model, stored: Stored, size: f32) -> Case {
    let folder = Folder::new();
    let base =
        Checkpoint::open(folder.write("base.safetensors", &checkpoint(model.weights, stored))).unwrap();
    let (bytes, updates) = lora(model, size);
    let lora = folder.write("lora.safetensors", &bytes);
    let to = folder.path("tuned.safetensors");
    let report = bake(&base, &open_for(&base, &lora), STRENGTH, &to, Round::Nearest)
        .unwrap_or_else(|e| panic!("{}: {e}", model.name));
    let tuned = Checkpoint::open(&to).unwrap();
    Case { folder, base, tuned, report, updates }
}

/// The difference that a layer should make, by tensor, for f32.
fn expected(model: &Model, updates: &[Vec<f32>]) -> BTreeMap<String, Vec<f32>> {
    let mut all: BTreeMap<String, Vec<f32>> = model
        .weights
        .iter()
        .map(|(name, shape)| ((*name).into(), vec![0.0; shape.iter().product()]))
        .collect();
    for ((_, [rows, cols], _, tensor, first, how), update) in model.layers.iter().zip(updates) {
        if *tensor == "*" {
            for (i, name) in ["to_q", "to_k", "to_v"].into_iter().enumerate() {
                let part = update[i * 48 * 48..(i + 1) * 48 * 48].to_vec();
                all.insert(format!("transformer_blocks.0.attn.{name}.weight"), part);
            }
            continue;
        }
        let into = all.get_mut(*tensor).unwrap();
        for (at, v) in update.iter().enumerate() {
            let (i, j) = (at / cols, at % cols);
            let to = match how {
                AsIs => (first + i) * cols + j,
                Swapped => (i + rows / 2) % rows * cols + j,
                Transposed => j * rows + i,
            };
            into[to] += v;
        }
    }
    all
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn updates_arrive_in_the_right_rows_of_every_family() {
    for model in MODELS {
        let case = case(model, Stored::F32, 1.0);
        assert_eq!(case.base.family().id(), Some(model.family), "{}", model.name);
        let (before, after) = (fs::read(case.base.path()).unwrap(), fs::read(case.tuned.path()).unwrap());
        let (before, after) = (tensors(&before), tensors(&after));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        for (name, expected) in expected(model, &case.updates) {
            let (old, new) = (&before[&name], &after[&name]);
            assert_eq!((&old.0, &old.1), (&new.0, &new.1), "{} {name}", model.name);
            if expected.iter().all(|v| *v == 0.0) {
                assert_eq!(old.2, new.2, "{} {name} should not change", model.name);
                continue;
            }
            let (old, new) = (decode(&old.2, "F32"), decode(&new.2, "F32"));
            for (i, ((old, new), expected)) in old.iter().zip(&new).zip(&expected).enumerate() {
                let off = (new - old - expected).abs();
                assert!(off < 1e-6, "{} {name} {i}: {old} + {expected} = {new}", model.name);
                assert!(*expected != 0.0 || old == new, "{} {name} {i}", model.name);
            }
        }
        assert!(case.report.survival.correlation > 0.999_999, "{}", case.report);
        assert!(case.report.survival.error < 1e-6, "{}: {:?}", model.name, case.report.survival);
        assert_eq!(case.tuned.metadata()["loraweld.baked"], "lora:0.75");
        assert_eq!(case.tuned.metadata()["modelspec.title"], "a model");
        assert!(!case.tuned.metadata().contains_key("modelspec.hash_sha256"));
    }
}

fn extract(case: &Case, rank: usize) -> Extracted {
    let options = ExtractOptions { truncation: Truncation::rank(rank), ..Default::default() };
    Extract::new(&case.tuned, &case.base).unwrap().run(&options, &Control::default()).unwrap()
}

#[test]
fn what_was_baked_comes_out_again() {
    for model in MODELS {
        let case = case(model, Stored::F32, 1.0);
        // Two layers of one fused module have the sum of their ranks.
        let Extracted { adapter, report } = extract(&case, 2 * RANK);
        assert!(report.changed.is_empty() && report.left_out.is_empty(), "{}: {report:?}", model.name);
        assert!(report.error < 1e-6, "{}: {report}", model.name);
        let native = !model.weights[0].0.starts_with("transformer_blocks");
        let same = ["Qwen-Image"].contains(&model.name);
        let extract = Extract::new(&case.tuned, &case.base).unwrap();
        assert!(
            same || (extract.format() == Format::Comfyui) == native,
            "{}: {}",
            model.name,
            extract.format()
        );
        // In every spelling, it makes of the base what the first adapter did.
        for format in [Format::Peft, Format::Comfyui, Format::Kohya] {
            let path = case.folder.path(&format!("{format}.safetensors"));
            let options = SaveOptions { format: Some(format), ..Default::default() };
            adapter.save(&path, &options).unwrap_or_else(|e| panic!("{} {format}: {e}", model.name));
            let to = case.folder.path(&format!("again-{format}.safetensors"));
            bake(&case.base, &open_for(&case.base, &path), 1.0, &to, Round::Nearest)
                .unwrap_or_else(|e| panic!("{} {format}: {e}", model.name));
            let (again, tuned) =
                (values(&fs::read(&to).unwrap()), values(&fs::read(case.tuned.path()).unwrap()));
            for (name, tuned) in &tuned {
                let off = norm(again[name].iter().zip(tuned).map(|(x, y)| x - y));
                assert!(off <= 1e-6 * norm(tuned.iter().copied()), "{} {format} {name}: {off:e}", model.name);
            }
        }
    }
}

#[test]
fn every_type_keeps_what_the_report_says() {
    for model in [&FLUX_NATIVE, &MODELS[2]] {
        for stored in TYPES {
            let case = case(model, stored, 0.3);
            let (before, after) =
                (values(&fs::read(case.base.path()).unwrap()), values(&fs::read(case.tuned.path()).unwrap()));
            let expected = expected(model, &case.updates);
            // The report tells what is in the file.
            let (mut asked, mut arrived, mut off) = (0.0, 0.0, 0.0);
            for (name, update) in &expected {
                let change: Vec<f32> = after[name].iter().zip(&before[name]).map(|(x, y)| x - y).collect();
                let (a, c) = (norm(update.iter().copied()), norm(change.iter().copied()));
                asked += a * a;
                arrived += c * c;
                off += norm(change.iter().zip(update).map(|(x, y)| x - y)).powi(2);
                // What no layer adapts stays as it is, whatever becomes of a scale.
                for (i, (change, update)) in change.iter().zip(update).enumerate() {
                    assert!(*update != 0.0 || *change == 0.0, "{stored:?} {name} {i} changed by {change}");
                }
            }
            let error = (off / asked).sqrt();
            let survival = case.report.survival;
            assert!((survival.asked / f64::sqrt(asked) - 1.0).abs() < 1e-4, "{stored:?} {survival:?}");
            assert!((survival.arrived / f64::sqrt(arrived) - 1.0).abs() < 1e-4, "{stored:?} {survival:?}");
            assert!(
                (survival.error - error).abs() < 1e-3 * error + 1e-6,
                "{stored:?}: {survival:?}, but {error}"
            );
            // And that is all that comes out again: at full rank, the difference with its rounding.
            let Extracted { report, .. } = extract(&case, 400);
            assert!(report.error < 1e-6, "{stored:?} {report}");
            assert!((report.norm / f64::sqrt(arrived) - 1.0).abs() < 1e-4, "{stored:?} {report:?}");
            // At the rank of the adapter, noise is cut off.
            let low = extract(&case, 2 * RANK).report;
            assert!(
                low.error <= survival.error * f64::sqrt(asked / arrived) + 1e-6,
                "{stored:?}: {low} of {survival:?}"
            );
            println!("{} {stored:?}: correlation {:.5}, error {error:.2e}", model.name, survival.correlation);
        }
    }
}

#[test]
fn chance_keeps_small_updates_on_average() {
    // A hundredth of a step of bf16: rounding to the nearest loses it.
    let folder = Folder::new();
    let base = file_of(
        &[],
        &[("blocks.0.ffn.0.weight", "BF16", &[256, 512], encode(&vec![1.0; 256 * 512], "BF16"))],
    );
    let step = 2f32.powi(-7);
    let lora = file_of(
        &[],
        &[
            (
                "diffusion_model.blocks.0.ffn.0.lora_A.weight",
                "F32",
                &[1, 512],
                f32s(&vec![step / 100.0; 512]),
            ),
            ("diffusion_model.blocks.0.ffn.0.lora_B.weight", "F32", &[256, 1], f32s(&vec![1.0; 256])),
        ],
    );
    let base = Checkpoint::open(folder.write("base.safetensors", &base)).unwrap();
    let lora = open_for(&base, &folder.write("lora.safetensors", &lora));
    let run = |name: &str, round| {
        let path = folder.path(name);
        let report = bake(&base, &lora, 1.0, &path, round).unwrap();
        (fs::read(path).unwrap(), report)
    };
    let (_, nearest) = run("nearest.safetensors", Round::Nearest);
    assert_eq!((nearest.survival.arrived, nearest.survival.correlation), (0.0, 0.0));
    let (bytes, _) = run("chance.safetensors", Round::Stochastic);
    assert_eq!(bytes, run("again.safetensors", Round::Stochastic).0);
    let mean = values(&bytes)["blocks.0.ffn.0.weight"].iter().map(|v| f64::from(v - 1.0)).sum::<f64>()
        / (256.0 * 512.0);
    assert!((mean / f64::from(step / 100.0) - 1.0).abs() < 0.1, "{mean}");
}

/// The tensors of a file as shards with an index.
fn sharded(folder: &Folder, place: &str, bytes: &[u8]) -> usize {
    let all = tensors(bytes);
    let mut map = serde_json::Map::new();
    let half = all.len().div_ceil(2);
    let entries: Vec<_> = all.iter().collect();
    for (i, chunk) in entries.chunks(half).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", i + 1);
        let raw: Vec<crate::common::files::Raw> =
            chunk.iter().map(|(n, (d, s, b))| (n.as_str(), d.as_str(), &s[..], b.clone())).collect();
        folder.write(&format!("{place}/{name}"), &file_of(&[("format", "pt")], &raw));
        chunk.iter().for_each(|(n, _)| drop(map.insert((*n).clone(), name.clone().into())));
    }
    let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    folder.write(&format!("{place}/model.safetensors.index.json"), index.to_string().as_bytes());
    entries.len()
}

#[test]
fn shards_and_pipelines_give_what_one_file_gives() {
    let model = &MODELS[1];
    let whole = case(model, Stored::Bf16, 1.0);
    let expected = tensors(&fs::read(whole.tuned.path()).unwrap());
    let folder = &whole.folder;
    let bytes = fs::read(whole.base.path()).unwrap();
    sharded(folder, "shards", &bytes);
    sharded(folder, "pipeline/transformer", &bytes);
    folder.write("pipeline/transformer/config.json", b"{}");
    folder.write("pipeline/transformer/diffusion_pytorch_model.bin", b"old");
    folder.write("pipeline/vae/diffusion_pytorch_model.safetensors", b"not looked into");
    folder.write("pipeline/model_index.json", b"{}");
    let lora = folder.path("lora.safetensors");
    for (place, weights, others) in [
        ("shards", "", vec!["model.safetensors.index.json"]),
        ("shards/model.safetensors.index.json", "", vec!["model.safetensors.index.json"]),
        (
            "pipeline",
            "transformer/",
            vec![
                "transformer/model.safetensors.index.json",
                "transformer/config.json",
                "vae/diffusion_pytorch_model.safetensors",
                "model_index.json",
            ],
        ),
    ] {
        let from = folder.path(place);
        let base = Checkpoint::open(&from).unwrap();
        assert_eq!(base.family(), whole.base.family());
        let to = folder.path("out");
        bake(&base, &open_for(&base, &lora), STRENGTH, &to, Round::Nearest).unwrap();
        let mut found = BTreeMap::new();
        for i in 1..=2 {
            let path = to.join(format!("{weights}model-0000{i}-of-00002.safetensors"));
            found.extend(tensors(&fs::read(path).unwrap()));
        }
        assert_eq!(found, expected, "{place}");
        let root = if from.is_dir() { from.clone() } else { folder.path("shards") };
        for other in others {
            assert_eq!(fs::read(to.join(other)).unwrap(), fs::read(root.join(other)).unwrap());
        }
        assert!(!to.join("transformer/diffusion_pytorch_model.bin").exists());
        assert_eq!(base.notes().len(), usize::from(place == "pipeline"), "{:?}", base.notes());
        // It is a checkpoint again, and a difference may be of one file and of a folder.
        let tuned = Checkpoint::open(&to).unwrap();
        let options = ExtractOptions { truncation: Truncation::rank(RANK), ..Default::default() };
        let extracted =
            Extract::new(&tuned, &whole.base).unwrap().run(&options, &Control::default()).unwrap();
        assert_eq!(extracted.report.layers.len(), 5);
        // A folder is never replaced.
        let error =
            bake(&base, &open_for(&base, &lora), STRENGTH, &to, Round::Nearest).unwrap_err().to_string();
        assert!(error.contains("never replaced"), "{error}");
        let inside = if from.is_dir() { from.join("out") } else { folder.path("shards/out") };
        let error =
            bake(&base, &open_for(&base, &lora), STRENGTH, &inside, Round::Nearest).unwrap_err().to_string();
        assert!(error.contains("own folder"), "{error}");
        fs::remove_dir_all(&to).unwrap();
    }
}

#[test]
fn the_spelling_and_the_types_of_two_checkpoints_may_differ() {
    let native = case(&FLUX_NATIVE, Stored::F32, 1.0);
    // The base as diffusers has it, in bf16, made of the native one.
    let old = tensors(&fs::read(native.base.path()).unwrap());
    let rows = |tensor: &str, from: usize, n: usize| {
        let (_, shape, bytes) = &old[tensor];
        let width = 4 * shape[1];
        decode(&bytes[from * width..(from + n) * width], "F32")
    };
    let adaln = [
        rows("final_layer.adaLN_modulation.1.weight", 48, 48),
        rows("final_layer.adaLN_modulation.1.weight", 0, 48),
    ];
    let of =
        |name: &'static str, shape: &'static [usize], values: Vec<f32>| (name, "F32", shape, f32s(&values));
    let qkv = |i: usize| rows("double_blocks.0.img_attn.qkv.weight", 48 * i, 48);
    let raw: Vec<crate::common::files::Raw> = vec![
        of("transformer_blocks.0.attn.to_q.weight", &[48, 48], qkv(0)),
        of("transformer_blocks.0.attn.to_k.weight", &[48, 48], qkv(1)),
        of("transformer_blocks.0.attn.to_v.weight", &[48, 48], qkv(2)),
        of("norm_out.linear.weight", &[96, 48], adaln.concat()),
    ];
    let base = Checkpoint::open(native.folder.write("diffusers.safetensors", &file_of(&[], &raw))).unwrap();
    let extract = Extract::new(&native.tuned, &base).unwrap();
    let options = ExtractOptions { truncation: Truncation::rank(2 * RANK), ..Default::default() };
    let Extracted { adapter, report } = extract.run(&options, &Control::default()).unwrap();
    assert!(report.error < 1e-6, "{report}");
    let names: Vec<&str> = adapter.layers().iter().map(|layer| layer.key().as_str()).collect();
    assert_eq!(
        names,
        [
            "norm_out_linear",
            "transformer_blocks_0_attn_to_k",
            "transformer_blocks_0_attn_to_q",
            "transformer_blocks_0_attn_to_v"
        ]
    );
    assert!(report.left_out.iter().any(|name| name.contains("img_mlp")), "{:?}", report.left_out);
}

#[test]
fn ranks_follow_the_options_of_resize() {
    let case = case(&MODELS[4], Stored::F32, 1.0);
    let lora = open_for(&case.base, &case.folder.path("lora.safetensors"));
    for truncation in [
        Truncation::rank(2),
        Truncation::spectrum(Spectrum::Frobenius(0.8)),
        Truncation::spectrum(Spectrum::Ratio(1.3)),
        Truncation::spectrum(Spectrum::Cumulative(0.6)),
    ] {
        let device = loraweld::Device::cpu();
        let resized = loraweld::Method::merge_any(
            &SvdMerge::new(truncation),
            &device,
            &[lora.at(1.0)],
            Control::default(),
        )
        .unwrap();
        let options = ExtractOptions { truncation, ..Default::default() };
        let extracted =
            Extract::new(&case.tuned, &case.base).unwrap().run(&options, &Control::default()).unwrap();
        let ranks = |adapter: &Adapter| adapter.layers().iter().map(|l| l.rank()).collect::<Vec<_>>();
        assert_eq!(ranks(&extracted.adapter), ranks(&resized.adapter), "{truncation:?}");
    }
}

#[test]
fn what_no_adapter_holds_is_listed() {
    let case = case(&FLUX_NATIVE, Stored::F32, 1.0);
    let bytes = fs::read(case.tuned.path()).unwrap();
    let mut all = tensors(&bytes);
    all.get_mut("double_blocks.0.img_attn.qkv.bias").unwrap().2[0] ^= 1;
    all.get_mut("double_blocks.0.img_attn.norm.key_norm.scale").unwrap().2[0] ^= 1;
    let raw: Vec<crate::common::files::Raw> =
        all.iter().map(|(n, (d, s, b))| (n.as_str(), d.as_str(), &s[..], b.clone())).collect();
    let tuned = Checkpoint::open(case.folder.write("changed.safetensors", &file_of(&[], &raw))).unwrap();
    let options = ExtractOptions { truncation: Truncation::rank(4), ..Default::default() };
    let extracted = Extract::new(&tuned, &case.base).unwrap().run(&options, &Control::default()).unwrap();
    assert_eq!(
        extracted.report.changed,
        ["double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.qkv.bias"]
    );
    let same = Extract::new(&case.base, &case.base).unwrap().run(&options, &Control::default());
    assert!(same.err().unwrap().to_string().contains("are the same"));
}

/// What baking the FLUX adapter into a file fails with.
fn refused(bytes: &[u8]) -> String {
    let folder = Folder::new();
    let path = folder.write("base.safetensors", bytes);
    let lora = folder.write("lora.safetensors", &lora(&FLUX_NATIVE, 30.0).0);
    let run = || {
        let base = Checkpoint::open(&path)?;
        let options = OpenOptions { family: Some(base.family()), ..Default::default() };
        bake(
            &base,
            &Adapter::open_with(&lora, &options)?,
            1.0,
            &folder.path("out.safetensors"),
            Round::Nearest,
        )
    };
    let error = run().map(|report| report.to_string()).unwrap_err().to_string();
    assert_eq!(folder.names(), ["base.safetensors", "lora.safetensors"], "{error}");
    error
}

fn contains(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

/// The file of [`FLUX_NATIVE`] with some tensors in place of its own.
fn with(others: &[crate::common::files::Raw]) -> Vec<u8> {
    let mut all = tensors(&checkpoint(FLUX_NATIVE.weights, Stored::F32));
    for (name, dtype, shape, bytes) in others {
        all.insert((*name).into(), ((*dtype).into(), shape.to_vec(), bytes.clone()));
    }
    let raw: Vec<crate::common::files::Raw> =
        all.iter().map(|(n, (d, s, b))| (n.as_str(), d.as_str(), &s[..], b.clone())).collect();
    file_of(&[], &raw)
}

#[test]
fn what_cannot_be_baked_is_refused_by_name() {
    const MLP: &str = "double_blocks.0.img_mlp.0.weight";
    let good = checkpoint(FLUX_NATIVE.weights, Stored::F32);
    contains(&refused(&good[..good.len() - 5]), &["base.safetensors", "cut short"]);
    contains(&refused(b"GGUF\x03\0\0\0aaaaaaaaaaaaaaaa"), &["GGUF", ".safetensors"]);
    contains(
        &refused(&with(&[(MLP, "F32", &[384, 48], f32s(&vec![0.0; 384 * 48]))])),
        &["ff.net.0.proj", "192 x 48", "384 x 48", MLP],
    );
    contains(&refused(&with(&[(MLP, "I8", &[192, 48], vec![0; 192 * 48])])), &[MLP, "int8", "BF16"]);
    let packed = (MLP, "U8", &[192 * 24, 1][..], vec![0; 192 * 24]);
    let state = ("double_blocks.0.img_mlp.0.weight.quant_state.bitsandbytes__nf4", "U8", &[1][..], vec![0]);
    contains(&refused(&with(&[packed, state])), &[MLP, "nf4"]);
    let qkv = "double_blocks.0.img_attn.qkv.weight";
    let packed = (qkv, "U8", &[144 * 24, 1][..], vec![0; 144 * 24]);
    let absmax = ("double_blocks.0.img_attn.qkv.weight.absmax", "F32", &[1][..], f32s(&[1.0]));
    contains(&refused(&with(&[packed, absmax])), &[qkv, "4 bits"]);
    let mut values = vec![0.5; 192 * 48];
    values[48 * 7 + 3] = f32::NAN;
    contains(&refused(&with(&[(MLP, "F32", &[192, 48], f32s(&values))])), &[MLP, "row 7, column 3", "NaN"]);
    let large = encode(&vec![65504.0; 192 * 48], "F16");
    contains(&refused(&with(&[(MLP, "F16", &[192, 48], large)])), &["ff.net.0.proj", "too large for f16"]);
    let scale = ("double_blocks.0.img_mlp.0.scale_weight", "F32", &[6][..], f32s(&[1.0; 6]));
    let fp8 = (MLP, "F8_E4M3", &[192, 48][..], vec![0; 192 * 48]);
    contains(&refused(&with(&[fp8, scale])), &["scale_weight", "[6]", MLP]);
    let error = refused(&checkpoint(MODELS[4].weights, Stored::F32));
    contains(&error, &["5 of 5 layers", "which is Wan", "another model"]);
    // Without the single blocks, one layer finds nothing.
    let fewer: Vec<Weight> =
        FLUX_NATIVE.weights.iter().copied().filter(|(name, _)| !name.starts_with("single")).collect();
    let fewer = checkpoint(&fewer, Stored::F32);
    contains(
        &refused(&fewer),
        &["1 of 5 layers", "single_transformer_blocks.3.proj_mlp", "--skip-unmatched", "FLUX.1"],
    );
    let folder = Folder::new();
    let base = Checkpoint::open(folder.write("base.safetensors", &fewer)).unwrap();
    let lora = open_for(&base, &folder.write("lora.safetensors", &lora(&FLUX_NATIVE, 1.0).0));
    let options = BakeOptions { skip_unmatched: true, ..Default::default() };
    let bake = Bake::new(&base, &[lora.at(1.0)], &options).unwrap();
    let report = bake.save(folder.path("out.safetensors"), &Control::default()).unwrap();
    assert_eq!(
        (report.left_out, report.layers.len()),
        (vec!["single_transformer_blocks.3.proj_mlp".into()], 4)
    );
    // The output is there now; and an input is never overwritten.
    let error = bake.save(folder.path("out.safetensors"), &Control::default()).unwrap_err().to_string();
    contains(&error, &["exists already"]);
    for name in ["base.safetensors", "lora.safetensors"] {
        let options = BakeOptions { overwrite: true, ..options };
        let bake = Bake::new(&base, &[lora.at(1.0)], &options).unwrap();
        let error = bake.save(folder.path(name), &Control::default()).unwrap_err().to_string();
        contains(&error, &[name, "never overwritten"]);
    }
    let error = Bake::new(&base, &[lora.at(f64::NAN)], &options).err().unwrap().to_string();
    contains(&error, &["strength", "NaN"]);
}

#[test]
fn updates_that_are_not_finite_are_refused() {
    let folder = Folder::new();
    let base =
        Checkpoint::open(folder.write("base.safetensors", &checkpoint(FLUX_NATIVE.weights, Stored::F32)))
            .unwrap();
    let lora = |value: f32| {
        file_of(
            &[],
            &[
                (
                    "transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight",
                    "F32",
                    &[1, 48],
                    f32s(&[value; 48]),
                ),
                (
                    "transformer.transformer_blocks.0.ff.net.0.proj.lora_B.weight",
                    "F32",
                    &[192, 1],
                    f32s(&[1e30; 192]),
                ),
            ],
        )
    };
    let error = |value: f32| {
        let path = folder.write("lora.safetensors", &lora(value));
        let to = folder.path("out.safetensors");
        bake(&base, &open_for(&base, &path), 1.0, &to, Round::Nearest).unwrap_err().to_string()
    };
    contains(&error(f32::NAN), &["lora.safetensors", "lora_A", "NaN"]);
    contains(&error(1e30), &["ff.net.0.proj", "inf", "strength"]);
    assert_eq!(folder.names(), ["base.safetensors", "lora.safetensors"]);
}

#[test]
fn shards_have_to_be_what_the_index_says() {
    let folder = Folder::new();
    sharded(&folder, "model", &checkpoint(FLUX_NATIVE.weights, Stored::F32));
    let error = |what: &str| Checkpoint::open(folder.path(what)).map(|_| ()).unwrap_err().to_string();
    contains(&error("model/model-00001-of-00002.safetensors"), &["one shard of several", "index"]);
    let second = folder.path("model/model-00002-of-00002.safetensors");
    let bytes = fs::read(&second).unwrap();
    fs::write(&second, &bytes[..bytes.len() / 2]).unwrap();
    contains(&error("model"), &["model-00002-of-00002.safetensors", "cut short"]);
    fs::write(&second, file_of(&[], &[("other", "F32", &[1], f32s(&[1.0]))])).unwrap();
    contains(&error("model"), &["is not in this file", "index.json"]);
    fs::remove_file(&second).unwrap();
    contains(&error("model"), &["names the shard `model-00002-of-00002.safetensors`", "missing"]);
    fs::remove_file(folder.path("model/model.safetensors.index.json")).unwrap();
    contains(&error("model"), &["one shard of several"]);
    folder.write("two/a.safetensors", &checkpoint(FLUX_NATIVE.weights, Stored::F32));
    folder.write("two/b.safetensors", &checkpoint(FLUX_NATIVE.weights, Stored::F32));
    contains(&error("two"), &["several checkpoints", "`a.safetensors`", "`b.safetensors`"]);
    fs::create_dir(folder.path("empty")).unwrap();
    contains(&error("empty"), &["holds no checkpoint"]);
}

#[test]
fn what_is_cancelled_leaves_nothing() {
    let model = &MODELS[1];
    let folder = Folder::new();
    let bytes = checkpoint(model.weights, Stored::F32);
    sharded(&folder, "shards", &bytes);
    folder.write("base.safetensors", &bytes);
    let lora = folder.write("lora.safetensors", &lora(model, 1.0).0);
    let before = folder.names();
    for name in ["base.safetensors", "shards"] {
        let base = Checkpoint::open(folder.path(name)).unwrap();
        let adapter = open_for(&base, &lora);
        let stop = AtomicBool::new(false);
        // What a killed process would have left at this moment is there, and goes.
        let midway = AtomicBool::new(false);
        let show = |p: Progress<'_>| {
            if p.done == 2 {
                midway.store(folder.names().len() > before.len(), Ordering::Relaxed);
                stop.store(true, Ordering::Relaxed);
            }
        };
        let control = Control { progress: Some(&show), cancel: Some(&stop) };
        let bake = Bake::new(&base, &[adapter.at(1.0)], &BakeOptions::default()).unwrap();
        let result = bake.save(folder.path("out"), &control);
        assert!(matches!(result, Err(loraweld::Error::Cancelled)));
        assert!(midway.load(Ordering::Relaxed));
        assert_eq!(folder.names(), before);
        // And a folder that was left goes when the next one is written.
        fs::create_dir(folder.path(".out.loraweld-abcdef.tmp")).unwrap();
        bake.save(folder.path("out"), &Control::default()).unwrap();
        assert!(!folder.path(".out.loraweld-abcdef.tmp").exists());
        let out = folder.path("out");
        if out.is_dir() { fs::remove_dir_all(out).unwrap() } else { fs::remove_file(out).unwrap() }
    }
}

#[test]
fn survival_is_told_of_any_strength() {
    let case = case(&MODELS[4], Stored::F32, 1.0);
    let lora = open_for(&case.base, &case.folder.path("lora.safetensors"));
    for (strength, correlation) in [(1e25, 1.0), (-3.0, 1.0), (1e-25, 0.0), (0.0, 1.0)] {
        let to = case.folder.path(&format!("{strength}.safetensors"));
        let report = bake(&case.base, &lora, strength, &to, Round::Nearest).unwrap();
        let found = report.survival;
        assert!((found.correlation - correlation).abs() < 1e-6, "{strength}: {found:?}");
        let asked = case.report.survival.asked / STRENGTH * strength.abs();
        assert!((found.asked - asked).abs() <= 1e-5 * asked, "{strength}: {found:?}, not {asked}");
    }
}

#[test]
fn reports_name_the_layers() {
    let case = case(&FLUX_NATIVE, Stored::E4m3, 0.02);
    let names: Vec<&str> = case.report.layers.iter().map(|layer| layer.layer.as_str()).collect();
    assert!(
        names.contains(&"transformer_blocks.0.attn.to_q") && names.contains(&"norm_out.linear"),
        "{names:?}"
    );
    let BakedLayer { tensor, dtype, survival, .. } = &case.report.layers[0];
    assert_eq!((tensor.as_str(), *dtype), ("double_blocks.0.img_attn.qkv.weight", "fp8 e4m3"));
    assert!(survival.correlation < 0.9, "{survival:?}");
    let text = case.report.to_string();
    contains(&text, &["5 layers in 4 tensors", "least:"]);
    let json = serde_json::to_value(&case.report).unwrap();
    assert_eq!(json["layers"][0]["layer"], case.report.layers[0].layer);
    assert!(json["layers"][0]["correlation"].is_number() && json["correlation"].is_number());
}

/// Runs the program; what it printed, and whether it succeeded.
fn run(args: &[&str]) -> (String, bool) {
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin!("loraweld"));
    let out = command.env_remove("RUST_LOG").args(args).output().unwrap();
    let text = [out.stdout, out.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (text, out.status.success())
}

#[test]
fn the_commands_bake_extract_and_inspect() {
    let folder = Folder::new();
    let text = |name: &str| folder.path(name).to_str().unwrap().to_owned();
    folder.write("base.safetensors", &checkpoint(FLUX_NATIVE.weights, Stored::Bf16));
    folder.write("cat.safetensors", &lora(&FLUX_NATIVE, 1.0).0);
    let [base, cat, tuned, again] =
        ["base.safetensors", "cat.safetensors", "tuned.safetensors", "again.safetensors"].map(text);
    let report = text("report.json");
    let (said, good) = run(&["bake", &base, &format!("{cat}:0.75"), "-o", &tuned, "--report", &report]);
    assert!(good, "{said}");
    contains(&said, &["baked", "5 layers in 4 tensors (bf16)", "correlation", "wrote"]);
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert_eq!(json["report"]["layers"].as_array().unwrap().len(), 5);
    let (said, good) = run(&["bake", &base, &cat, "-o", &tuned]);
    assert!(!good);
    contains(&said, &["exists already", "--force"]);
    let (said, good) = run(&["extract", &tuned, &base, "-o", &again, "--rank", "8", "--dtype", "bf16"]);
    assert!(good, "{said}");
    contains(&said, &["extracted", "4 modules of FLUX.1, rank 8", "comfyui"]);
    let (said, good) = run(&["extract", &tuned, &base, "-o", &again]);
    assert!(!good);
    contains(&said, &["--rank N"]);
    let (said, good) = run(&["inspect", &base, &again]);
    assert!(good, "{said}");
    contains(&said, &["checkpoint", "FLUX.1", "BF16", "fits: all of its", "main model"]);
    folder.write("wan.safetensors", &checkpoint(MODELS[4].weights, Stored::Bf16));
    let (said, good) = run(&["bake", &text("wan.safetensors"), &cat, "-o", &text("x.safetensors")]);
    assert!(!good);
    contains(&said, &["cat.safetensors: is for ", "FLUX.1", "wan.safetensors is Wan", "--model"]);
    // What a conversion or a merge is given is no checkpoint.
    let (said, good) = run(&["convert", &base, "-o", &text("x.safetensors"), "--format", "peft"]);
    assert!(!good);
    contains(&said, &["is it a checkpoint of a whole model?"]);
}
