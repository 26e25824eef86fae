//! Reading and writing of adapter files.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use loraweld::adapter::{
    Adapter, Format, Layer, LayerKey, OpenOptions, SaveOptions, ScaleRule, write_atomic,
};
use loraweld::{Dtype, Error, Matrix, Unnamed};
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::common::files::{Raw, f32s, file_of};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/loras").join(name)
}

/// A file with one layer of rank 2, 3 wide and 2 tall, under the given keys, and more.
fn one(a: &str, b: &str, metadata: &[(&str, &str)], more: &[Raw]) -> Vec<u8> {
    let mut tensors = vec![
        (a, "F32", &[2, 3][..], f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        (b, "F32", &[2, 2][..], f32s(&[1.0, -1.0, 0.5, 2.0])),
    ];
    tensors.extend(more.iter().cloned());
    file_of(metadata, &tensors)
}

const A: &str = "transformer.m.0.to_q.lora_A.weight";
const B: &str = "transformer.m.0.to_q.lora_B.weight";

fn error(bytes: Vec<u8>) -> String {
    let error = Adapter::from_bytes("bad.safetensors", bytes).expect_err("should be refused");
    let text = error.to_string();
    assert!(text.starts_with("bad.safetensors: "), "{text}");
    text
}

#[track_caller]
fn assert_contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// ΔW of a layer, in f64.
fn delta(layer: &Layer) -> Vec<f64> {
    let (a, b) = (layer.a().to_vec::<f64>(), layer.b().to_vec::<f64>());
    let mut out = vec![0.0; layer.output() * layer.input()];
    for i in 0..layer.output() {
        for j in 0..layer.input() {
            let dot: f64 =
                (0..layer.rank()).map(|r| b[i * layer.rank() + r] * a[r * layer.input() + j]).sum();
            out[i * layer.input() + j] = layer.scale().value * dot;
        }
    }
    out
}

#[track_caller]
fn assert_same_delta(x: &Adapter, y: &Adapter) {
    assert_eq!(x.layers().len(), y.layers().len());
    for (x, y) in x.layers().iter().zip(y.layers()) {
        assert_eq!(x.key(), y.key());
        assert_eq!(delta(x), delta(y), "{}", x.key());
    }
}

#[test]
fn fixtures_open() {
    use ScaleRule::*;
    for (name, rank, scale, rule, dtype, format) in [
        ("concept_c1_thick.safetensors", 4, 2.0, AdapterMetadata, Dtype::F16, Format::Peft),
        ("concept_c1_thick.kohya.safetensors", 4, 2.0, AlphaTensor, Dtype::F16, Format::Kohya),
        ("concept_c3_mirror.safetensors", 8, 1.0, AdapterMetadata, Dtype::Bf16, Format::Peft),
        ("concept_c4_invert.safetensors", 8, 1.0, AdapterMetadata, Dtype::Bf16, Format::Peft),
        ("concept_c7_rot90.safetensors", 16, 0.5, AdapterMetadata, Dtype::F32, Format::Peft),
        ("content_heart.safetensors", 8, 2.0, AdapterMetadata, Dtype::Bf16, Format::Peft),
        ("content_heart.peft", 8, 2.0, AdapterConfig, Dtype::Bf16, Format::Peft),
        ("content_heart.peft/adapter_model.safetensors", 8, 2.0, AdapterConfig, Dtype::Bf16, Format::Peft),
        ("style_shade.safetensors", 8, 0.5, AdapterMetadata, Dtype::F32, Format::Peft),
    ] {
        let adapter = Adapter::open(fixture(name)).unwrap();
        assert_eq!(adapter.layers().len(), 24, "{name}");
        assert_eq!((adapter.dtype(), adapter.format()), (dtype, format), "{name}");
        assert!(adapter.layers().is_sorted_by(|x, y| x.key() < y.key()));
        for layer in adapter.layers() {
            assert_eq!((layer.rank(), layer.a().rows(), layer.b().cols()), (rank, rank, rank));
            assert_eq!((layer.scale().value, layer.scale().rule), (scale, rule), "{name}");
            assert_eq!(layer.a().bytes().len(), layer.rank() * layer.input() * dtype.size());
        }
        adapter.check_finite().unwrap();
        assert_eq!(adapter.file_sha256().unwrap().len(), 64);
    }
    assert_eq!(Adapter::open(fixture("content_heart.peft/")).unwrap().name(), "content_heart.peft");
    assert_eq!(Adapter::open(fixture("style_shade.safetensors")).unwrap().name(), "style_shade");
}

#[test]
fn spellings_match() {
    for (x, y) in [
        ("concept_c1_thick.safetensors", "concept_c1_thick.kohya.safetensors"),
        ("content_heart.safetensors", "content_heart.peft"),
    ] {
        let (x, y) = (Adapter::open(fixture(x)).unwrap(), Adapter::open(fixture(y)).unwrap());
        assert_same_delta(&x, &y);
        assert_eq!(x.a_sha256(), y.a_sha256());
    }
    let c3 = Adapter::open(fixture("concept_c3_mirror.safetensors")).unwrap();
    let c4 = Adapter::open(fixture("concept_c4_invert.safetensors")).unwrap();
    assert_ne!(c3.a_sha256(), c4.a_sha256());
    for name in ["transformer_blocks.0.attn.to_q", "lora_transformer_blocks_0_attn_to_q"] {
        assert_eq!(c3.find(name).unwrap().module(), "transformer_blocks.0.attn.to_q");
    }
    assert!(c3.find("transformer_blocks.0.attn").is_none());
    let key = LayerKey::parse("transformer_blocks.0.attn.to_q");
    assert_eq!(c3.layer(&key).unwrap().key(), &key);
}

#[test]
fn saving_and_reading_back_changes_nothing() {
    let folder = TempDir::new().unwrap();
    for name in [
        "concept_c1_thick.safetensors",
        "concept_c1_thick.kohya.safetensors",
        "content_heart.peft",
        "style_shade.safetensors",
    ] {
        let adapter = Adapter::open(fixture(name)).unwrap();
        for format in [Format::Peft, Format::Kohya, Format::Comfyui] {
            for dtype in [None, Some(Dtype::F32)] {
                let path = folder.path().join("out.safetensors");
                let options =
                    // The digits' transformer is no model that is known.
                    SaveOptions {
                        format: Some(format),
                        dtype,
                        unnamed: Unnamed::Keep,
                        overwrite: true,
                        ..Default::default()
                    };
                adapter.save(&path, &options).unwrap();
                let bytes = fs::read(&path).unwrap();
                // The reference implementation reads it as well.
                let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                assert_eq!(read.len(), if format == Format::Kohya { 72 } else { 48 });
                let back = Adapter::open(&path).unwrap();
                assert_eq!((back.format(), back.dtype()), (format, dtype.unwrap_or(adapter.dtype())));
                assert_same_delta(&adapter, &back);
                assert_eq!(adapter.a_sha256(), back.a_sha256());
                // An alpha tensor stays as it is where the format has alphas; else the scale is folded.
                let kept =
                    adapter.layers()[0].scale().rule == ScaleRule::AlphaTensor && format == Format::Kohya;
                let scale = if kept { adapter.layers()[0].scale().value } else { 1.0 };
                assert!(back.layers().iter().all(|l| l.scale().value == scale));
                assert!(
                    kept || back
                        .layers()
                        .iter()
                        .all(|l| l.scale().alpha.is_none_or(|a| a == l.rank() as f64))
                );
                adapter.save(&path, &options).unwrap();
                assert_eq!(fs::read(&path).unwrap(), bytes, "the bytes should be the same every time");
                // Scale 1 now, so that the second time every tensor is copied.
                let again = folder.path().join("again.safetensors");
                let options =
                    SaveOptions { overwrite: true, metadata: back.metadata().clone(), ..Default::default() };
                back.save(&again, &options).unwrap();
                assert_eq!(fs::read(&again).unwrap(), bytes);
            }
        }
    }
    let entries = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(entries, 2, "no temporary file should be left");
}

#[test]
fn spellings_are_written() {
    let folder = TempDir::new().unwrap();
    let keys = |from: &str, format| {
        let path = folder.path().join("out.safetensors");
        let (format, unnamed) = (Some(format), Unnamed::Keep);
        let options = SaveOptions { format, unnamed, overwrite: true, ..Default::default() };
        Adapter::open(fixture(from)).unwrap().save(&path, &options).unwrap();
        let bytes = fs::read(&path).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        (header.tensors().into_keys().collect::<Vec<_>>(), header.metadata().clone().unwrap())
    };
    for (from, format, key) in [
        (
            "concept_c1_thick.kohya.safetensors",
            Format::Peft,
            "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight",
        ),
        ("content_heart.peft", Format::Peft, "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight"),
        (
            "content_heart.peft",
            Format::Comfyui,
            "diffusion_model.transformer_blocks.0.ff.net.0.proj.lora_A.weight",
        ),
        (
            "content_heart.peft",
            Format::Kohya,
            "lora_unet_transformer_blocks_0_ff_net_0_proj.lora_down.weight",
        ),
        ("concept_c1_thick.kohya.safetensors", Format::Kohya, "lora_transformer_blocks_0_ff_net_2.alpha"),
        (
            "concept_c1_thick.kohya.safetensors",
            Format::Comfyui,
            "diffusion_model.transformer_blocks.0.ff.net.2.lora_B.weight",
        ),
    ] {
        let (keys, metadata) = keys(from, format);
        assert!(keys.iter().any(|k| k == key), "{key} is not in {keys:?}");
        assert_eq!(metadata["format"], "pt");
        assert_eq!(metadata.contains_key("ss_network_dim"), format == Format::Kohya);
    }
}

#[test]
fn metadata_that_would_be_wrong_is_left_out() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("out.safetensors");
    let text = |pairs: &[(&str, &str)]| pairs.iter().map(|&(k, v)| (k.into(), v.into())).collect();
    let metadata = text(&[
        ("title", "x \"y\" ü"),
        ("lora_alpha", "3"),
        ("lora_adapter_metadata", "{}"),
        ("ss_network_dim", "77"),
        ("ss_v2", "True"),
    ]);
    let adapter = Adapter::open(fixture("style_shade.safetensors")).unwrap();
    let (format, unnamed) = (Some(Format::Kohya), Unnamed::Keep);
    let options = SaveOptions { format, unnamed, metadata, ..Default::default() };
    adapter.save(&path, &options).unwrap();
    let back = Adapter::open(&path).unwrap();
    let data = {
        let bytes = fs::read(&path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let hash = Sha256::digest(&bytes[8 + header..]);
        hash.iter().map(|b| format!("{b:02x}")).collect::<String>()
    };
    let expected = text(&[
        ("format", "pt"),
        ("ss_network_alpha", "8"),
        ("ss_network_dim", "8"),
        ("ss_network_module", "networks.lora"),
        ("ss_v2", "True"),
        // Of all bytes after the header.
        ("sshs_model_hash", &data),
        ("title", "x \"y\" ü"),
    ]);
    assert_eq!(back.metadata(), &expected);
}

#[test]
fn several_ranks_are_told_to_peft() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("out.safetensors");
    let of_rank = |name: &str, rank| {
        let a = Matrix::from_fn(rank, 4, |i, j| (i + j) as f32);
        Layer::new(name, a, Matrix::from_fn(3, rank, |i, j| (i * j) as f32)).unwrap()
    };
    let layers =
        [("transformer.a.x", 2), ("transformer.a.y", 2), ("transformer.b.x", 5), ("text_encoder.c", 1)];
    let layers = layers.map(|(name, rank)| of_rank(name, rank)).to_vec();
    let adapter = Adapter::new("m", Format::Peft, layers).unwrap();
    adapter.save(&path, &SaveOptions::default()).unwrap();
    let back = Adapter::open(&path).unwrap();
    assert_same_delta(&adapter, &back);
    let config: serde_json::Value = serde_json::from_str(&back.metadata()["lora_adapter_metadata"]).unwrap();
    let expected = serde_json::json!({
        "text_encoder.alpha_pattern": {}, "text_encoder.lora_alpha": 1, "text_encoder.r": 1,
        "text_encoder.rank_pattern": {}, "text_encoder.target_modules": ["c"],
        "transformer.alpha_pattern": {"^b.x": 5}, "transformer.lora_alpha": 2, "transformer.r": 2,
        "transformer.rank_pattern": {"^b.x": 5}, "transformer.target_modules": ["a.x", "a.y", "b.x"],
    });
    assert_eq!(config, expected);
    let (format, unnamed) = (Some(Format::Kohya), Unnamed::Keep);
    let options = SaveOptions { format, unnamed, overwrite: true, ..Default::default() };
    adapter.save(&path, &options).unwrap();
    let back = Adapter::open(&path).unwrap();
    assert_same_delta(&adapter, &back);
    assert_eq!(back.metadata()["ss_network_dim"], "Dynamic");
}

#[test]
fn each_component_has_its_own_configuration() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("out.safetensors");
    let of_rank = |name: &str, rank| {
        let a = Matrix::from_fn(rank, 4, |i, j| (1 + i + j) as f32);
        Layer::new(name, a, Matrix::from_fn(3, rank, |i, j| (1 + i * j) as f32)).unwrap()
    };
    // Before and after `transformer` in the alphabet, in which configurations are read.
    for other in [
        "connectors",
        "text_conditioner",
        "text_encoder",
        "text_encoder_2",
        "transformer_2",
        "unet",
        "transformer_1",
        "blocks",
    ] {
        let other = format!("{other}.b.z");
        let layers = [("transformer.a.x", 2), ("transformer.a.y", 3), ("transformer.b.x", 3), (&*other, 7)];
        let layers = layers.map(|(name, rank)| of_rank(name, rank)).to_vec();
        let Ok(adapter) = Adapter::new("m", Format::Peft, layers) else { panic!("{other}") };
        let options = SaveOptions { unnamed: Unnamed::Keep, overwrite: true, ..Default::default() };
        adapter.save(&path, &options).unwrap();
        assert_same_delta(&adapter, &Adapter::open(&path).unwrap());
    }
    let scale = |text: &str| {
        let adapter = Adapter::from_bytes("x", one(A, B, &[("lora_adapter_metadata", text)], &[]));
        adapter.map(|adapter| adapter.layers()[0].scale().value)
    };
    let two =
        r#"{"connectors.lora_alpha": 2, "text_conditioner.lora_alpha": 4, "transformer.lora_alpha": 6}"#;
    assert_eq!(scale(two).unwrap(), 3.0);
    assert_eq!(scale(r#"{"transformer.lora_alpha": 6, "unet.lora_alpha": 6}"#).unwrap(), 3.0);
    let error = scale(r#"{"transformer.lora_alpha": 6, "unet.lora_alpha": 2}"#).unwrap_err().to_string();
    assert!(error.contains("`transformer`") && error.contains("`unet`"), "{error}");
}

#[test]
fn scales_follow_the_precedence() {
    let scale = |metadata: &[(&str, &str)], more: &[Raw]| {
        Adapter::from_bytes("x", one(A, B, metadata, more)).unwrap().layers()[0].scale()
    };
    let alpha = |dtype, bytes: &[u8]| vec![("transformer.m.0.to_q.alpha", dtype, &[][..], bytes.to_vec())];
    fn peft(text: &str) -> (&str, &str) {
        ("lora_adapter_metadata", text)
    }

    let all = [peft(r#"{"transformer.lora_alpha": 6}"#), ("lora_alpha", "10"), ("ss_network_alpha", "12")];
    let s = scale(&all, &alpha("F32", &f32s(&[8.0])));
    assert_eq!((s.value, s.alpha, s.rule), (4.0, Some(8.0), ScaleRule::AlphaTensor));
    for (n, value, rule) in [
        (0, 3.0, ScaleRule::AdapterMetadata),
        (1, 5.0, ScaleRule::FlatMetadata),
        // Converters fold alpha and leave `ss_network_alpha` where it was.
        (2, 1.0, ScaleRule::Default),
        (3, 1.0, ScaleRule::Default),
    ] {
        let s = scale(&all[n..], &[]);
        assert_eq!((s.value, s.rule), (value, rule));
    }
    for key in ["network_alpha", "alpha"] {
        assert_eq!(scale(&[(key, "8.0")], &[]).value, 4.0);
    }
    assert_eq!(scale(&[("ss_network_alpha", "Dynamic")], &[]).rule, ScaleRule::Default);
    assert_eq!(
        scale(&[("ss_network_alpha", "4"), ("ss_network_args", r#"{"rs_lora": "True"}"#)], &[]).value,
        1.0
    );

    // An alpha tensor of any type and of one element.
    for (dtype, bytes) in [
        ("F64", 6f64.to_le_bytes().to_vec()),
        ("F16", f16::from_f32(6.0).to_le_bytes().to_vec()),
        ("BF16", bf16::from_f32(6.0).to_le_bytes().to_vec()),
        ("I64", 6i64.to_le_bytes().to_vec()),
        ("I32", 6i32.to_le_bytes().to_vec()),
        ("U16", 6u16.to_le_bytes().to_vec()),
        ("U8", vec![6]),
    ] {
        assert_eq!(scale(&[], &alpha(dtype, &bytes)).value, 3.0, "{dtype}");
        let shaped = [("transformer.m.0.to_q.lora_A.alpha", dtype, &[1][..], bytes)];
        assert_eq!(scale(&[], &shaped).value, 3.0, "{dtype}");
    }
    assert_eq!(scale(&[], &alpha("F32", &f32s(&[0.0]))).value, 0.0);

    // PEFT's patterns: the module's whole name, or its end after a dot.
    for (pattern, value) in [
        ("m.0.to_q", 3.5),
        ("to_q", 3.5),
        ("^m\\\\.0\\\\.to_q$", 3.5),
        ("m.*to_[qk]", 3.5),
        ("o_q", 1.0),
        ("^to_q", 1.0),
    ] {
        let text = format!(r#"{{"unet.lora_alpha": 2, "unet.alpha_pattern": {{"{pattern}": 7}}}}"#);
        assert_eq!(scale(&[peft(&text)], &[]).value, value, "{pattern}");
    }
    let s = scale(&[peft(r#"{"r": 2, "lora_alpha": 2, "use_rslora": true}"#)], &[]);
    assert_eq!((s.value, s.rank_stabilized), (2.0 / 2f64.sqrt(), true));

    // The text encoder has a configuration of its own.
    let two = [peft(r#"{"text_encoder.lora_alpha": 2, "transformer.lora_alpha": 8}"#)];
    let (a, b) = ("text_encoder.m.lora_A.weight", "text_encoder.m.lora_B.weight");
    let te = Adapter::from_bytes("x", one(a, b, &two, &[])).unwrap();
    assert_eq!((te.layers()[0].scale().value, te.layers()[0].key().component()), (1.0, "text_encoder"));
    assert_eq!(scale(&two, &[]).value, 4.0);
}

#[test]
fn suffixes_in_use_are_read() {
    for (a, b) in [
        ("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"),
        ("x.lora_A", "x.lora_B"),
        ("diffusion_model.x.lora_A.default.weight", "diffusion_model.x.lora_B.default.weight"),
        ("unet.x.lora.down.weight", "unet.x.lora.up.weight"),
    ] {
        let adapter = Adapter::from_bytes("x", one(a, b, &[], &[])).unwrap();
        let layer = adapter.find("x").unwrap();
        assert_eq!((layer.rank(), layer.input(), layer.output()), (2, 3, 2));
    }
}

#[test]
fn other_adapters_are_refused_by_name() {
    let extra = |suffix: &str, shape: &[usize]| {
        let bytes = vec![0; 4 * shape.iter().product::<usize>()];
        error(one(A, B, &[], &[(&format!("transformer.m.0.to_q.{suffix}"), "F32", shape, bytes)]))
    };
    for (suffix, kind, hint) in [
        ("dora_scale", "DoRA", "base model's weights"),
        ("lora_magnitude_vector.weight", "DoRA", "base model's weights"),
        ("hada_w1_a", "LoHa", "beside"),
        ("lokr_w1", "LoKr", "beside"),
        ("oft_blocks", "OFT", "left out"),
        ("diff", "norm", "left out"),
        ("diff_b", "bias", "left out"),
        ("w_norm", "norm", "left out"),
        ("lora_B.bias", "bias", "left out"),
    ] {
        let shape: &[usize] =
            if suffix.starts_with(['h', 'l']) && suffix.contains('w') { &[2, 1] } else { &[2] };
        // Beside another kind, the tensor of the LoRA is named.
        let named = if hint == "beside" { "lora_A" } else { suffix };
        assert_contains(&extra(suffix, shape), &[named, kind, hint]);
    }
    let dora = [("lora_adapter_metadata", r#"{"transformer.use_dora": true}"#)];
    assert_contains(
        &error(one(A, B, &dora, &[])),
        &["transformer.use_dora", "DoRA", "lora_magnitude_vector"],
    );
    let oft = [("lora_adapter_metadata", r#"{"peft_type": "OFT"}"#)];
    assert_contains(&error(one(A, B, &oft, &[])), &["OFT", "LORA, LOHA and LOKR"]);
}

#[test]
fn what_cannot_be_merged_is_left_out_if_that_is_asked_for() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("wan.safetensors");
    let bias = ("transformer.m.0.to_q.diff_b", "F32", &[2][..], f32s(&[1.0, 2.0]));
    let norm = ("transformer.m.0.norm.diff", "F32", &[3][..], f32s(&[1.0; 3]));
    fs::write(&path, one(A, B, &[], &[bias, norm])).unwrap();
    assert!(Adapter::open(&path).is_err());
    let options = OpenOptions { skip_unsupported: true, ..Default::default() };
    let adapter = Adapter::open_with(&path, &options).unwrap();
    assert_eq!(adapter.layers().len(), 1);
    assert_contains(&adapter.notes().join("; "), &["diff_b", "difference of a bias", "norm.diff"]);
}

#[test]
fn alpha_can_be_told() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("x.safetensors");
    let alpha = ("transformer.m.0.to_q.alpha", "F32", &[][..], f32s(&[8.0]));
    fs::write(&path, one(A, B, &[], &[alpha])).unwrap();
    let open = |alpha| {
        let adapter = Adapter::open_with(&path, &OpenOptions { alpha, ..Default::default() })?;
        Ok::<_, Error>(adapter.layers()[0].scale())
    };
    assert_eq!(open(None).unwrap().value, 4.0);
    let told = open(Some(1.0)).unwrap();
    assert_eq!((told.value, told.rule), (0.5, ScaleRule::Override));
    assert!(open(Some(f64::NAN)).is_err());
}

#[test]
fn broken_layers_are_refused() {
    let (a, b) = ((A, "F32", &[2, 3][..], f32s(&[0.0; 6])), (B, "F32", &[2, 2][..], f32s(&[0.0; 4])));
    let alpha = "transformer.m.0.to_q.alpha";
    let with_alpha =
        |dtype, shape: &'static [usize], bytes| error(one(A, B, &[], &[(alpha, dtype, shape, bytes)]));

    assert_contains(
        &error(file_of(&[], std::slice::from_ref(&a))),
        &[A, "B (`lora_B`, `lora_up`) is missing"],
    );
    assert_contains(
        &error(file_of(&[], std::slice::from_ref(&b))),
        &[B, "A (`lora_A`, `lora_down`) is missing"],
    );
    let lonely = ("transformer.y.alpha", "F32", &[][..], f32s(&[1.0]));
    assert_contains(&error(one(A, B, &[], &[lonely])), &["transformer.y.alpha", "without the A and B"]);
    let b3 = (B, "F32", &[2, 3][..], f32s(&[0.0; 6]));
    assert_contains(
        &error(file_of(&[], &[a.clone(), b3])),
        &[B, "has rank 3", A, "has rank 2", "should agree"],
    );
    let flat = (A, "F32", &[6][..], f32s(&[0.0; 6]));
    assert_contains(&error(file_of(&[], &[flat, b.clone()])), &[A, "shape [6]", "[rank, inputs] is needed"]);
    let bytes = (A, "I8", &[2, 3][..], vec![0; 6]);
    assert_contains(&error(file_of(&[], &[bytes, b.clone()])), &[A, "type I8", "F32, F16, BF16"]);
    let none = (A, "F32", &[0, 3][..], vec![]);
    assert_contains(&error(file_of(&[], &[none, b])), &[A, "[0, 3]", "may be zero"]);
    assert_contains(&with_alpha("F32", &[], f32s(&[f32::NAN])), &[alpha, "NaN", "finite"]);
    assert_contains(&with_alpha("F32", &[], f32s(&[f32::INFINITY])), &[alpha, "inf", "finite"]);
    assert_contains(&with_alpha("F32", &[2], f32s(&[1.0, 1.0])), &[alpha, "[2]", "one number"]);
    assert_contains(&with_alpha("BOOL", &[], vec![1]), &[alpha, "BOOL", "a float or an integer"]);

    let twin = ("lora_unet_m_0_to_q.lora_down.weight", "F32", &[2, 3][..], f32s(&[0.0; 6]));
    assert_contains(&error(one(A, B, &[], &[twin])), &["lora_unet_m_0_to_q.lora_down.weight", "is missing"]);
    let weight = ("img_in.weight", "F32", &[1][..], f32s(&[0.0]));
    assert_contains(
        &error(one(A, B, &[], std::slice::from_ref(&weight))),
        &["besides LoRA layers", "`img_in.weight`", ".lora_A.weight"],
    );
    let names: Vec<String> = (0..5).map(|i| format!("w{i}.weight")).collect();
    let model: Vec<Raw> = names.iter().map(|n| (n.as_str(), "F32", &[1][..], f32s(&[0.0]))).collect();
    assert_contains(&error(file_of(&[], &model)), &["holds no LoRA layers", "`w0.weight`", "and 2 more"]);
    assert_contains(&error(file_of(&[], &[])), &["holds no LoRA layers"]);

    for (key, value, reason) in [
        ("lora_alpha", "many", "not a number"),
        ("lora_adapter_metadata", "[", "JSON object"),
        ("lora_adapter_metadata", r#"{"lora_alpha": "x"}"#, "makes no sense"),
        (
            "lora_adapter_metadata",
            r#"{"alpha_pattern": {"(to_q": 3}}"#,
            "`(to_q`, which is no regular expression",
        ),
    ] {
        assert_contains(&error(one(A, B, &[(key, value)], &[])), &[key, reason]);
    }
}

#[test]
fn broken_files_are_refused() {
    let good = one(A, B, &[], &[]);
    assert_contains(&error(vec![]), &["the file is empty"]);
    assert_contains(&error(vec![1, 2, 3]), &["not a safetensors file"]);
    assert_contains(&error(b"PK\x03\x04 and so on".to_vec()), &["PyTorch checkpoint"]);
    // A header of 640 bytes starts like a pickle.
    let padded = (0..700)
        .map(|n| one(A, B, &[("x", &"y".repeat(n))], &[]))
        .find(|bytes| bytes.starts_with(b"\x80\x02"));
    assert!(Adapter::from_bytes("x", padded.unwrap()).is_ok());
    assert_contains(&error(b"Once upon a time there was a file".to_vec()), &["not a safetensors file"]);
    assert_contains(&error(good[..40].to_vec()), &["cut short", "header"]);
    assert_contains(&error(good[..good.len() - 1].to_vec()), &["cut short", B, "byte 40", "39"]);
    assert_contains(&error([&good[..], b"x"].concat()), &["describes 40 bytes", "41 are there"]);
    let header = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    assert_contains(&error(header("{\"a\": 3}")), &["damaged", "header"]);
    assert_contains(&error(header("{\"a\": ")), &["damaged", "header"]);
    let tensor = |shape: &str, offsets: &str| {
        error(header(&format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)))
    };
    assert_contains(&tensor("[4611686018427387904, 16]", "[0, 4]"), &["`a`", "makes no sense"]);
    assert_contains(&tensor("[2]", "[0, 4]"), &["`a`", "takes 8 bytes", "damaged"]);
    assert_contains(&tensor("[1]", "[4, 0]"), &["`a`", "takes 4 bytes"]);
    assert_contains(&tensor("[1]", "[4, 8]"), &["`a`", "starts at byte 4"]);
    assert_contains(&tensor("[576460752303423487]", "[0, 2305843009213693948]"), &["cut short"]);
    let twice = r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#;
    assert_contains(&error(header(twice)), &["`a`", "twice"]);

    let folder = TempDir::new().unwrap();
    let text = |path: &Path| Adapter::open(path).unwrap_err().to_string();
    assert_contains(&text(folder.path()), &["adapter_model.safetensors", "folder"]);
    assert_contains(&text(&folder.path().join("none.safetensors")), &["none.safetensors", "cannot open"]);
    fs::write(folder.path().join("empty.safetensors"), []).unwrap();
    assert_contains(
        &text(&folder.path().join("empty.safetensors")),
        &["empty.safetensors", "the file is empty"],
    );
    fs::write(folder.path().join("adapter_model.safetensors"), &good).unwrap();
    assert_contains(&text(folder.path()), &["adapter_config.json", "alpha"]);
    // The file itself is complete, as far as one can tell.
    let file = Adapter::open(folder.path().join("adapter_model.safetensors")).unwrap();
    assert_eq!(file.layers()[0].scale().rule, ScaleRule::Default);
    fs::write(folder.path().join("adapter_config.json"), r#"{"lora_alpha": 4}"#).unwrap();
    assert_eq!(Adapter::open(folder.path()).unwrap().layers()[0].scale().value, 2.0);
    fs::write(folder.path().join("adapter_config.json"), r#"{"lora_alpha": 4, "use_dora": true}"#).unwrap();
    assert_contains(&text(folder.path()), &["adapter_config.json", "use_dora", "DoRA"]);
}

#[test]
fn non_finite_values_are_found() {
    let bytes = file_of(
        &[],
        &[(A, "F32", &[2, 3], f32s(&[0.0; 6])), (B, "F32", &[2, 2], f32s(&[0.0, 1.0, f32::NAN, 0.0]))],
    );
    let adapter = Adapter::from_bytes("bad.safetensors", bytes).unwrap();
    let text = adapter.check_finite().unwrap_err().to_string();
    assert_contains(&text, &["bad.safetensors", B, "element 2 (row 1, column 0) is NaN"]);
}

fn layer(name: &str, value: f32) -> Layer {
    let a = Matrix::from_fn(3, 4, |i, j| (i * 4 + j) as f32);
    Layer::new(name, a, Matrix::from_fn(2, 3, |_, _| value)).unwrap()
}

#[test]
fn adapters_in_memory() {
    let adapter =
        Adapter::new("m", Format::Peft, vec![layer("transformer.b.x", 1.0), layer("lora_unet_a_x", 1.0)])
            .unwrap();
    assert_eq!(adapter.layers().iter().map(|l| l.key().as_str()).collect::<Vec<_>>(), ["a_x", "b_x"]);
    assert_eq!((adapter.dtype(), adapter.at(-0.5).strength), (Dtype::F32, -0.5));
    assert!(adapter.file_sha256().unwrap_err().to_string().contains("does not come from a file"));
    let twice =
        Adapter::new("m", Format::Peft, vec![layer("transformer.a.x", 1.0), layer("lora_unet_a_x", 1.0)]);
    assert_contains(&twice.unwrap_err().to_string(), &["a_x", "transformer.a.x", "lora_unet_a_x"]);
    assert!(Adapter::new("m", Format::Peft, vec![]).is_err());
    let ranks = Layer::new("a", Matrix::zeros(3, 4), Matrix::zeros(2, 2));
    assert_contains(&ranks.unwrap_err().to_string(), &["`a`", "3 x 4", "2 x 2", "ranks differ"]);
    assert!(Layer::new("a", Matrix::zeros(0, 4), Matrix::zeros(2, 0)).is_err());
    assert!(Matrix::<f32>::new(3, 4, vec![]).is_err());
    let replaced = layer("lora_te2_a_x", 1.0).replaced(Matrix::zeros(1, 9), Matrix::zeros(5, 1)).unwrap();
    assert_eq!((replaced.key().as_str(), replaced.prefix()), ("text_encoder_2.a_x", "lora_te2_"));
    assert_eq!((replaced.rank(), replaced.input(), replaced.output()), (1, 9, 5));
}

#[test]
fn scales_are_written_where_the_format_has_a_place() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("out.safetensors");
    let source = Adapter::open(fixture("concept_c3_mirror.safetensors")).unwrap();
    let save = |scale: f64, format, dtype| {
        let layers = source.layers().iter().map(|l| l.with_scale(scale)).collect();
        let adapter = Adapter::new("scaled", format, layers).unwrap();
        adapter
            .save(
                &path,
                &SaveOptions { dtype, unnamed: Unnamed::Keep, overwrite: true, ..Default::default() },
            )
            .map(|()| (adapter, Adapter::open(&path).unwrap()))
    };
    // Folded, as it is a power of two.
    for format in [Format::Peft, Format::Kohya] {
        let (adapter, back) = save(-0.25, format, None).unwrap();
        assert_same_delta(&adapter, &back);
        assert_eq!((back.dtype(), back.layers()[0].scale().value), (Dtype::Bf16, 1.0));
    }
    // Written as alpha; the tensors stay as they are.
    let (adapter, back) = save(0.3, Format::Kohya, None).unwrap();
    for (x, y) in adapter.layers().iter().zip(back.layers()) {
        assert_eq!((x.a().bytes(), x.b().bytes()), (y.a().bytes(), y.b().bytes()));
        assert!((y.scale().value - 0.3).abs() < 1e-7);
    }
    assert_eq!(back.metadata()["ss_network_alpha"].parse::<f64>().unwrap(), 0.3 * 8.0);
    let (_, back) = save(0.0, Format::Comfyui, None).unwrap();
    assert_eq!((back.layers()[0].scale().value, back.dtype()), (0.0, Dtype::Bf16));
    // PEFT has no place for alpha, so B is in f32; or rounded, if that is asked for.
    let (_, back) = save(0.3, Format::Peft, None).unwrap();
    let (x, y) = (&source.layers()[0], &back.layers()[0]);
    assert_eq!((y.a().dtype(), y.b().dtype(), y.scale().value), (Dtype::Bf16, Dtype::F32, 1.0));
    let expected: Vec<f32> = x.b().to_vec::<f64>().iter().map(|v| (v * 0.3) as f32).collect();
    assert_eq!(y.b().to_vec::<f32>(), expected);
    let (_, back) = save(0.3, Format::Peft, Some(Dtype::Bf16)).unwrap();
    assert_eq!(back.dtype(), Dtype::Bf16);
    let (_, back) = save(0.0, Format::Peft, None).unwrap();
    assert!(back.layers()[0].b().to_vec::<f32>().iter().all(|&v| v == 0.0));
    assert_eq!(back.dtype(), Dtype::Bf16);
    assert!(save(f64::NAN, Format::Peft, None).unwrap_err().to_string().contains("NaN"));
}

#[test]
fn overflow_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("out.safetensors");
    let adapter = Adapter::new("m", Format::Peft, vec![layer("a.x", 7e4)]).unwrap();
    let save = |dtype| adapter.save(&path, &SaveOptions { dtype: Some(dtype), ..Default::default() });
    assert_contains(&save(Dtype::F16).unwrap_err().to_string(), &["`a.x`", "7e4", "f16", "bf16 or f32"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing should be left");
    save(Dtype::Bf16).unwrap();
    assert_eq!(
        Adapter::open(&path).unwrap().layers()[0].b().to_vec::<f32>()[0],
        bf16::from_f32(7e4).to_f32()
    );
}

#[test]
fn targets_are_protected() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let text = |r: Result<(), Error>| r.unwrap_err().to_string();
    fs::copy(fixture("style_shade.safetensors"), at("in.safetensors")).unwrap();
    let before = fs::read(at("in.safetensors")).unwrap();
    let adapter = Adapter::open(at("in.safetensors")).unwrap();
    let force = SaveOptions { overwrite: true, ..Default::default() };

    adapter.save(at("out.safetensors"), &SaveOptions::default()).unwrap();
    let again = text(adapter.save(at("out.safetensors"), &SaveOptions::default()));
    assert_contains(&again, &["out.safetensors", "exists already", "overwriting"]);
    adapter.save(at("out.safetensors"), &force).unwrap();

    // The adapter's own file, by several names, and a file that the caller names.
    assert_contains(
        &text(adapter.save(at("in.safetensors"), &force)),
        &["in.safetensors", "never overwritten"],
    );
    assert_contains(
        &text(
            adapter.save(at("./../").join(folder.path().file_name().unwrap()).join("in.safetensors"), &force),
        ),
        &["never"],
    );
    let protect = vec![at("out.safetensors")];
    let options = SaveOptions { protect, ..force.clone() };
    assert_contains(&text(adapter.save(at("out.safetensors"), &options)), &["never overwritten"]);
    let options = SaveOptions { protect: vec![folder.path().to_owned()], ..force.clone() };
    assert_contains(&text(adapter.save(at("out.safetensors"), &options)), &["never overwritten"]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(at("in.safetensors"), at("soft.safetensors")).unwrap();
        fs::hard_link(at("in.safetensors"), at("hard.safetensors")).unwrap();
        for name in ["soft.safetensors", "hard.safetensors"] {
            assert_contains(&text(adapter.save(at(name), &force)), &[name, "never overwritten"]);
        }
        // Another link stays one.
        std::os::unix::fs::symlink("out.safetensors", at("link.safetensors")).unwrap();
        adapter.save(at("link.safetensors"), &force).unwrap();
        assert!(fs::symlink_metadata(at("link.safetensors")).unwrap().is_symlink());
    }
    assert_eq!(fs::read(at("in.safetensors")).unwrap(), before);

    assert_contains(&text(adapter.save(folder.path(), &force)), &["names a folder"]);
    assert_contains(&text(adapter.save(at("new/"), &force)), &["names a folder"]);
    assert_contains(&text(adapter.save(at("new/out.safetensors"), &force)), &["new", "does not exist"]);
}

#[test]
fn nothing_is_left_of_a_failed_or_killed_write() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let names = || {
        let mut names: Vec<String> = fs::read_dir(folder.path())
            .unwrap()
            .map(|f| f.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    fs::write(at("out"), "old").unwrap();
    let failed = write_atomic(&at("out"), true, &[], |_| Err(std::io::Error::other("no more paper")));
    assert_contains(&failed.unwrap_err().to_string(), &["out: cannot write: no more paper"]);
    assert_eq!((names(), fs::read_to_string(at("out")).unwrap()), (vec!["out".into()], "old".into()));

    // What a killed process left goes; what a living one is writing stays, and so do strangers.
    fs::write(at(".out.loraweld-aaaaaa.tmp"), "").unwrap();
    fs::write(at(".other.loraweld-bbbbbb.tmp"), "").unwrap();
    fs::write(at(".out.loraweld-notes.tmp"), "").unwrap();
    let living = fs::File::create(at(".out.loraweld-cccccc.tmp")).unwrap();
    living.lock().unwrap();
    write_atomic(&at("out"), true, &[], |out| std::io::Write::write_all(out, b"new")).unwrap();
    assert_eq!(fs::read_to_string(at("out")).unwrap(), "new");
    let left = [".other.loraweld-bbbbbb.tmp", ".out.loraweld-cccccc.tmp", ".out.loraweld-notes.tmp", "out"];
    assert_eq!(names(), left);
}

#[cfg(unix)]
#[test]
fn permissions_are_those_of_an_ordinary_file() {
    use std::os::unix::fs::PermissionsExt;
    let folder = TempDir::new().unwrap();
    let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
    fs::write(folder.path().join("plain"), "").unwrap();
    write_atomic(&folder.path().join("out"), false, &[], |_| Ok(())).unwrap();
    assert_eq!(mode("out"), mode("plain"));
    fs::set_permissions(folder.path().join("out"), fs::Permissions::from_mode(0o640)).unwrap();
    write_atomic(&folder.path().join("out"), true, &[], |_| Ok(())).unwrap();
    assert_eq!(mode("out") & 0o777, 0o640);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_device_is_reported() {
    let adapter = Adapter::open(fixture("style_shade.safetensors")).unwrap();
    let options = SaveOptions { overwrite: true, ..Default::default() };
    let error = adapter.save("/dev/full", &options).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if path == Path::new("/dev/full")), "{error}");
    assert!(fs::metadata("/dev/full").is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Adapter::from_bytes("x", bytes.clone());
        // Past the check of the length.
        let mut framed = (bytes.len() as u64 + 1).to_le_bytes().to_vec();
        framed.push(b'{');
        framed.extend(bytes);
        let _ = Adapter::from_bytes("x", framed);
    }

    #[test]
    fn mutated_files_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), do_cut: bool) {
        let mut bytes = one(A, B, &[("lora_alpha", "3")], &[("transformer.m.0.to_q.alpha", "F32", &[], f32s(&[2.0]))]);
        for (i, value) in edits {
            let i = i.index(bytes.len());
            bytes[i] = value;
        }
        if do_cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(adapter) = Adapter::from_bytes("x", bytes) {
            let _ = adapter.check_finite();
            let _ = adapter.a_sha256();
            prop_assert!(adapter.layers().iter().all(|l| l.a().bytes().len() == l.rank() * l.input() * l.a().dtype().size()));
        }
    }

    #[test]
    fn mutated_numbers_never_panic(numbers in prop::collection::vec(prop_oneof![0u64..64, Just(u64::MAX), Just(1 << 61), any::<u64>()], 8)) {
        let n = &numbers;
        let header = format!(
            r#"{{"{A}":{{"dtype":"F32","shape":[{},{}],"data_offsets":[{},{}]}},"{B}":{{"dtype":"F16","shape":[{},{}],"data_offsets":[{},{}]}}}}"#,
            n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]
        );
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 32]].concat();
        let _ = Adapter::from_bytes("x", bytes);
    }

    #[test]
    fn any_metadata_never_panics(
        field in prop::sample::select(vec![
            "lora_adapter_metadata", "lora_alpha", "ss_network_alpha", "ss_network_args", "ss_tag_frequency",
            "ss_base_model_version", "modelspec.architecture",
        ]),
        text in prop_oneof![
            ".{0,60}",
            "[\\[\\]{}\",:0-9a-z._ -]{0,60}",
            "\\{\"(transformer\\.)?(lora_alpha|alpha_pattern|use_rslora|use_dora|peft_type|r)\": (8|-1e300|true|null|\"LOHA\"|\\{\"[a-z.*(|^$]{0,8}\": 3\\})\\}",
        ],
    ) {
        if let Ok(adapter) = Adapter::from_bytes("x", one(A, B, &[(field, &text)], &[])) {
            prop_assert!(adapter.layers()[0].scale().value.is_finite());
            let _ = Adapter::common_metadata([&adapter, &adapter]);
        }
    }

    #[test]
    fn any_keys_never_panic(keys in prop::collection::btree_set(
        "(transformer\\.|lora_unet_|diffusion_model\\.|lora_te3_)?\
         (double_blocks[._]0[._]img_attn[._]qkv|layers\\.0\\.attention\\.qkv|input_blocks_[0-9]{1,2}_[0-2]_op|\
         single_blocks[._]9[._]linear1|encoder_block_0|x|final_layer\\.adaLN_modulation\\.1)\
         (\\.lora_(A|B)(\\.default)?\\.weight|\\.lora_(up|down|mid)\\.weight|\\.alpha|\\.hada_w[12]_[ab]|\\.lokr_w[12](_[ab])?|\
         \\.dora_scale|\\.diff|\\.scalar|\\.up|\\.down)",
        1..6,
    )) {
        let tensor = |key: &'_ String| -> (String, &'static [usize]) {
            let is_b = ["lora_B", "lora_up", ".up"].iter().any(|part| key.contains(part));
            let shape: &[usize] = match is_b {
                true if key.contains("qkv") => &[6, 2],
                true if key.contains("linear1") => &[14, 2],
                _ => &[2, 2],
            };
            (key.clone(), shape)
        };
        let tensors: Vec<_> = keys.iter().map(tensor).collect();
        let values = |shape: &[usize]| f32s(&vec![0.5; shape.iter().product()]);
        let tensors: Vec<Raw> = tensors.iter().map(|(k, shape)| (k.as_str(), "F32", *shape, values(shape))).collect();
        if let Ok(adapter) = Adapter::from_bytes("x", file_of(&[], &tensors)) {
            for layer in adapter.layers() {
                prop_assert_eq!(&LayerKey::parse(&layer.name()), layer.key());
                prop_assert!(layer.matches("*") && layer.norm().is_finite());
            }
        }
    }

    #[test]
    fn keys_are_stable(name in "(transformer\\.|unet\\.|lora_|lora_te2_|text_encoder\\.|base_model\\.model\\.|diffusion_model\\.|[a-z0-9_.]){0,12}") {
        let key = LayerKey::parse(&name);
        prop_assert_eq!(LayerKey::parse(key.as_str()), key.clone());
        // One prefix of the main model is as good as another.
        if let Some(path) = name.strip_prefix("transformer.").filter(|path| !path.is_empty()) {
            prop_assert_eq!(LayerKey::parse(&format!("base_model.model.{path}")), LayerKey::parse(path));
        }
    }
}

#[test]
fn halves_are_rounded_once_to_nearest() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("x.safetensors");
    // Ties of f16 and their neighbours are among them, as 2048 + 1 ± a little.
    let value = |i: usize| match i % 4 {
        0 => (2049 + 2 * (i % 900)) as f32,
        1 => f32::from_bits(2049f32.to_bits() + (i % 7) as u32 - 3),
        2 => f32::from_bits((i as u32).wrapping_mul(2_654_435_761) & 0x46ff_ffff),
        _ => -f32::from_bits(i as u32 * 4099),
    };
    let a = Matrix::from_fn(1, 4096, |_, i| value(i));
    let b = Matrix::from_fn(4096, 1, |i, _| value(i));
    let layer = Layer::new("x", a.clone(), b).unwrap().with_scale(1.0 + f64::EPSILON);
    let adapter = Adapter::new("x", Format::Peft, vec![layer]).unwrap();
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let options = SaveOptions { dtype: Some(dtype), overwrite: true, ..Default::default() };
        adapter.save(&path, &options).unwrap();
        let back = Adapter::open(&path).unwrap();
        let (back_a, back_b) = (back.layers()[0].a().to_vec::<f32>(), back.layers()[0].b().to_vec::<f32>());
        for (i, &v) in a.data().iter().enumerate() {
            let nearest =
                |v| if dtype == Dtype::F16 { f16::from_f32(v).to_f32() } else { bf16::from_f32(v).to_f32() };
            assert_eq!(back_a[i], nearest(v), "{v}");
            // The scale moves ties, and nothing else, away from zero.
            let beyond = nearest(f32::from_bits(v.to_bits() + 1));
            let exact = f64::from(v) * (1.0 + f64::EPSILON);
            let (x, y) = (f64::from(nearest(v)), f64::from(beyond));
            let expected = if (exact - y).abs() < (exact - x).abs() { y } else { x };
            assert_eq!(f64::from(back_b[i]), expected, "{v}");
        }
    }
}
