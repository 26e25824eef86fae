//! From layers to a file.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Adapter, Format, Layer, TensorData, keys, write_atomic};
use crate::safetensors_file::{FileDtype, TensorOut, write_safetensors};
use crate::{Dtype, Error, RawMatrix, Result};

/// How an adapter is written.
#[derive(Clone, Debug, Default)]
pub struct SaveOptions {
    /// Type of the tensors; by default the adapter's own ([`Adapter::dtype`]).
    pub dtype: Option<Dtype>,
    /// Spelling of the keys; by default the adapter's own ([`Adapter::format`]).
    pub format: Option<Format>,
    /// Whether an existing file is replaced.
    pub overwrite: bool,
    /// Files (inputs) that are not overwritten even so, nor through another name for them.
    pub protect: Vec<PathBuf>,
    /// The header's metadata, beside what [`Adapter::with_metadata`] set. What says ranks, alphas or hashes is left
    /// out or set to what is right.
    pub metadata: BTreeMap<String, String>,
}

/// Elements converted at a time.
const CHUNK: usize = 1 << 14;

/// How a layer's scale is written.
struct Plan<'a> {
    layer: &'a Layer,
    /// Key of the module.
    name: String,
    /// What B is multiplied by.
    fold: f64,
    b_dtype: Dtype,
    /// What is left for alpha; the rank if everything is folded.
    alpha: f64,
}

pub(super) fn save(adapter: &Adapter, path: &Path, options: &SaveOptions) -> Result<()> {
    let dtype = options.dtype.unwrap_or(adapter.dtype());
    let format = options.format.unwrap_or(adapter.format());
    // Stable Diffusion 1 has one text encoder, and so kohya does not number it.
    let has = |of: &dyn Fn(&Layer) -> bool| adapter.layers().iter().any(of);
    let one_encoder = has(&is_unet) && !has(&|layer| layer.key.component() == "text_encoder_2");
    let usual = usual_prefixes(adapter, format);
    let plan = |layer| {
        let name = name(layer, format, usual.get(layer.key.component()).copied(), one_encoder)?;
        plan(layer, name, format, dtype, options)
    };
    let plans: Vec<Plan> = adapter.layers().par_iter().map(plan).collect::<Result<_>>()?;
    // What a file says may be wrong of what became of it; what was given in memory is meant to be written.
    let mut given = if adapter.0.file.is_none() { adapter.metadata().clone() } else { BTreeMap::new() };
    given.extend(options.metadata.clone());
    let metadata = metadata(&plans, format, &given);

    let mut protect: BTreeSet<PathBuf> = options.protect.iter().cloned().collect();
    for layer in adapter.layers() {
        for tensor in [&layer.a, &layer.b] {
            if let TensorData::File(file) = &tensor.data
                && file.is_on_disk()
            {
                protect.insert(file.path().to_owned());
            }
        }
    }
    let protect: Vec<PathBuf> = protect.into_iter().collect();
    write_atomic(path, options.overwrite, &protect, |out| {
        let tensors = plans.iter().flat_map(|plan| tensors(plan, format, dtype)).collect();
        write_safetensors(out, &metadata, tensors)
    })
}

fn plan<'a>(
    layer: &'a Layer,
    name: String,
    format: Format,
    dtype: Dtype,
    options: &SaveOptions,
) -> Result<Plan<'a>> {
    let rank = layer.rank as f64;
    let scale = layer.scale.value;
    if !scale.is_finite() {
        return Err(Error::layer(layer.name(), format!("its scale is {scale}; it should be finite")));
    }
    let plain = Plan { layer, name, fold: scale, b_dtype: dtype, alpha: rank };
    Ok(if scale == 1.0 || folds_exactly(layer.b(), scale, dtype) {
        plain
    } else if format != Format::Peft {
        // scale · rank may be off by a rounding.
        let alpha = layer.scale.alpha.filter(|alpha| alpha / rank == scale).unwrap_or(scale * rank);
        Plan { fold: 1.0, alpha, ..plain }
    } else if options.dtype.is_some() || scale == 0.0 {
        plain
    } else {
        // There is no place for an alpha: readers of this spelling take it to be the rank.
        Plan { b_dtype: Dtype::F32, ..plain }
    })
}

/// Whether multiplying by `scale` and rounding to `dtype` can be undone.
fn folds_exactly(b: RawMatrix<'_>, scale: f64, dtype: Dtype) -> bool {
    const MANTISSA: u64 = (1 << 52) - 1;
    let power_of_two = scale.is_normal() && scale.to_bits() & MANTISSA == 0;
    power_of_two && {
        let mut values = vec![0f32; CHUNK];
        b.bytes.chunks(CHUNK * b.dtype.size()).all(|chunk| {
            widen(b.dtype, chunk, &mut values).iter().all(|&v| {
                !v.is_finite() || round(f64::from(v) * scale, dtype) == round(v.into(), dtype) * scale
            })
        })
    }
}

fn tensors<'a>(plan: &'a Plan<'_>, format: Format, dtype: Dtype) -> Vec<TensorOut<'a>> {
    let Plan { layer, name, fold, b_dtype, alpha } = plan;
    let (a, b) = if format == Format::Kohya { ("lora_down", "lora_up") } else { ("lora_A", "lora_B") };
    let factor = |part: &str, values: RawMatrix<'a>, fold: f64, dtype: Dtype| TensorOut {
        name: format!("{name}.{part}.weight"),
        dtype: file_dtype(dtype),
        shape: vec![values.rows, values.cols],
        write: Box::new(move |out| convert(values, fold, dtype, layer, out)),
    };
    let mut tensors = vec![factor(a, layer.a(), 1.0, dtype), factor(b, layer.b(), *fold, *b_dtype)];
    if format != Format::Peft {
        let dtype = if round(*alpha, dtype) == *alpha { dtype } else { Dtype::F32 };
        tensors.push(TensorOut {
            name: format!("{name}.alpha"),
            dtype: file_dtype(dtype),
            shape: Vec::new(),
            write: Box::new(move |out| put(&[*alpha], dtype, layer, &mut Vec::new(), out)),
        });
    }
    tensors
}

/// For the main model and each text encoder, the prefix of most layers that are in this spelling already. Layers of
/// a merge come from several files, and readers drop those with another prefix than the rest.
fn usual_prefixes(adapter: &Adapter, format: Format) -> BTreeMap<&str, &str> {
    let mut counts: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    for layer in adapter.layers().iter().filter(|layer| layer.format == Some(format)) {
        *counts.entry(layer.key.component()).or_default().entry(&layer.prefix).or_default() += 1;
    }
    let mut usual = BTreeMap::new();
    for (component, prefixes) in counts {
        usual.extend(prefixes.into_iter().max_by_key(|(_, n)| *n).map(|(prefix, _)| (component, prefix)));
    }
    usual
}

/// The module as the format spells it, after the `usual` prefix of its component, if there is one.
fn name(layer: &Layer, format: Format, usual: Option<&str>, one_encoder: bool) -> Result<String> {
    let prefix = match usual {
        Some(usual) => usual.to_owned(),
        None => default_prefix(layer, format, one_encoder)?,
    };
    let module = &layer.module;
    Ok(match format {
        _ if layer.format == Some(format) => prefix + module,
        Format::Kohya => prefix + &module.replace('.', "_"),
        // What was never flat needs no guessing.
        _ if module.contains('.') || matches!(layer.format, Some(Format::Peft | Format::Comfyui)) => {
            prefix + module
        }
        _ => prefix + &keys::unflatten(module),
    })
}

fn default_prefix(layer: &Layer, format: Format, one_encoder: bool) -> Result<String> {
    Ok(match (format, layer.key.component()) {
        (Format::Kohya, "") => "lora_unet_".to_owned(),
        (Format::Kohya, "text_encoder") if one_encoder => "lora_te_".to_owned(),
        (Format::Kohya, "text_encoder") => "lora_te1_".to_owned(),
        (Format::Kohya, "text_encoder_2") => "lora_te2_".to_owned(),
        (Format::Kohya, "text_encoder_3") => "lora_te3_".to_owned(),
        (Format::Kohya, component) => {
            let reason = format!("kohya's spelling has no prefix for `{component}`; choose another format");
            return Err(Error::layer(layer.name(), reason));
        }
        (Format::Peft, "") if is_unet(layer) => "unet.".to_owned(),
        (Format::Peft, "") => "transformer.".to_owned(),
        (Format::Comfyui, "") => "diffusion_model.".to_owned(),
        // ComfyUI knows the encoders by the names that diffusers gives them, too.
        (_, component) => format!("{component}."),
    })
}

/// Whether the layer is of a UNet, by the names that diffusers gives its blocks.
fn is_unet(layer: &Layer) -> bool {
    ["down_blocks_", "up_blocks_", "mid_block_"].iter().any(|part| layer.key.as_str().starts_with(part))
}

/// The header's metadata: the caller's, without what would be wrong of these tensors.
fn metadata(
    plans: &[Plan<'_>],
    format: Format,
    given: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    const STALE: &[&str] = &[
        "lora_adapter_metadata",
        "lora_alpha",
        "network_alpha",
        "alpha",
        "ss_network_dim",
        "ss_network_alpha",
        "sshs_model_hash",
        "sshs_legacy_hash",
        "modelspec.hash_sha256",
    ];
    let mut metadata = given.clone();
    metadata.retain(|key, _| !STALE.contains(&key.as_str()));
    metadata.insert("format".into(), "pt".into());
    if format == Format::Kohya {
        let common = |of: &dyn Fn(&Plan) -> f64| match plans {
            [first, rest @ ..] if rest.iter().all(|p| of(p) == of(first)) => of(first).to_string(),
            _ => "Dynamic".to_owned(),
        };
        metadata.insert("ss_network_module".into(), "networks.lora".into());
        metadata.insert("ss_network_dim".into(), common(&|p| p.layer.rank as f64));
        metadata.insert("ss_network_alpha".into(), common(&|p| p.alpha));
        metadata.entry("ss_v2".into()).or_insert_with(|| "False".into());
    } else {
        metadata.remove("ss_network_args");
    }
    if format == Format::Peft
        && let Some(config) = mixed_ranks(plans)
    {
        metadata.insert("lora_adapter_metadata".into(), config);
    }
    metadata
}

/// PEFT's configuration of a file with several ranks. Without one, diffusers takes alpha to be the rank, but
/// until 0.42 it took the first layer's rank for every layer.
fn mixed_ranks(plans: &[Plan<'_>]) -> Option<String> {
    let mut components: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    for Plan { layer, name, .. } in plans {
        let component = match layer.key.component() {
            "" if is_unet(layer) => "unet",
            "" => "transformer",
            encoder => encoder,
        };
        let (_, len) = keys::prefix(name);
        components.entry(component).or_default().insert(&name[len..], layer.rank);
    }
    let is_mixed = |ranks: &BTreeMap<_, usize>| ranks.values().collect::<BTreeSet<_>>().len() > 1;
    if !components.values().any(is_mixed) {
        return None;
    }
    let mut config = serde_json::Map::new();
    for (component, ranks) in components {
        let count = |rank: &usize| ranks.values().filter(|r| *r == rank).count();
        let usual = ranks.values().max_by_key(|rank| (count(rank), **rank));
        let others: BTreeMap<_, _> = ranks.iter().filter(|(_, rank)| Some(*rank) != usual).collect();
        let modules: Vec<_> = ranks.keys().collect();
        for (field, value) in [
            ("alpha_pattern", serde_json::json!(others)),
            ("lora_alpha", serde_json::json!(usual)),
            ("r", serde_json::json!(usual)),
            ("rank_pattern", serde_json::json!(others)),
            ("target_modules", serde_json::json!(modules)),
        ] {
            config.insert(format!("{component}.{field}"), value);
        }
    }
    Some(serde_json::Value::Object(config).to_string())
}

/// Writes `values · scale`, rounded once, to `dtype`; unchanged bytes where nothing is to be done.
fn convert(
    values: RawMatrix<'_>,
    scale: f64,
    dtype: Dtype,
    layer: &Layer,
    out: &mut dyn Write,
) -> io::Result<()> {
    if values.dtype == dtype && scale == 1.0 {
        return out.write_all(values.bytes);
    }
    let (mut wide, mut bytes) = (vec![0f32; CHUNK], Vec::with_capacity(4 * CHUNK));
    for chunk in values.bytes.chunks(CHUNK * values.dtype.size()) {
        let scaled: Vec<f64> =
            widen(values.dtype, chunk, &mut wide).iter().map(|&v| f64::from(v) * scale).collect();
        put(&scaled, dtype, layer, &mut bytes, out)?;
    }
    Ok(())
}

/// Writes numbers, and refuses to make infinity of a finite one.
fn put(
    values: &[f64],
    dtype: Dtype,
    layer: &Layer,
    bytes: &mut Vec<u8>,
    out: &mut dyn Write,
) -> io::Result<()> {
    bytes.clear();
    for &value in values {
        let rounded = round_to_f32(value, dtype);
        if value.is_finite() && !rounded.is_finite() {
            let wider = if dtype == Dtype::F16 { "bf16 or f32" } else { "a smaller strength" };
            let reason = format!("the value {value:e} is too large for {dtype}; use {wider}");
            return Err(io::Error::other(Error::layer(layer.name(), reason)));
        }
        match dtype {
            Dtype::F32 => bytes.extend(rounded.to_le_bytes()),
            Dtype::F16 => bytes.extend(half::f16::from_f32(rounded).to_le_bytes()),
            Dtype::Bf16 => bytes.extend(half::bf16::from_f32(rounded).to_le_bytes()),
        }
    }
    out.write_all(bytes)
}

fn widen<'a>(dtype: Dtype, bytes: &[u8], out: &'a mut [f32]) -> &'a [f32] {
    let cols = bytes.len() / dtype.size();
    RawMatrix { dtype, rows: 1, cols, bytes }.widen_into(&mut out[..cols]);
    &out[..cols]
}

fn round(value: f64, dtype: Dtype) -> f64 {
    round_to_f32(value, dtype).into()
}

/// The number of type `dtype` that is nearest.
fn round_to_f32(value: f64, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => value as f32,
        Dtype::F16 => half::f16::from_f32(odd(value)).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(odd(value)).to_f32(),
    }
}

/// Rounds to odd, after which rounding on to a half type is as if it had been done at once.
fn odd(value: f64) -> f32 {
    let near = value as f32;
    let back = f64::from(near);
    if back == value || !value.is_finite() {
        return near;
    }
    let bits = near.to_bits();
    // The neighbour towards zero, if this one is beyond, and then the odd one of the two.
    f32::from_bits(if back.abs() > value.abs() { bits - 1 } else { bits } | 1)
}

fn file_dtype(dtype: Dtype) -> FileDtype {
    match dtype {
        Dtype::F32 => FileDtype::F32,
        Dtype::F16 => FileDtype::F16,
        Dtype::Bf16 => FileDtype::BF16,
    }
}
