//! From the tensors of a file to layers.

use std::collections::BTreeMap;
use std::path::Path;

use super::keys::{self, LayerKey, Part, Split};
use super::scale::Scales;
use super::{Format, Layer, Tensor, TensorData};
use crate::safetensors_file::{FileDtype, SafetensorsFile, TensorRef};
use crate::{Dtype, Error, Result};

/// The tensors of one layer, by their keys.
#[derive(Default)]
struct Group<'a> {
    module: &'a str,
    a: Option<&'a str>,
    b: Option<&'a str>,
    alpha: Option<&'a str>,
}

/// The layers of a file, sorted. `config` is the `adapter_config.json` that belongs to it.
pub(super) fn read(file: &SafetensorsFile, config: Option<(&Path, &str)>) -> Result<Vec<Layer>> {
    let path = file.path();
    let scales = Scales::new(path, file.metadata(), config)?;

    let mut groups: BTreeMap<LayerKey, Group> = BTreeMap::new();
    let mut unknown = Vec::new();
    for tensor in file.tensors() {
        let key = tensor.name;
        let (module, part) = match keys::split(key) {
            Split::Lora(module, part) => (module, part),
            Split::Foreign(kind) => {
                return Err(Error::tensor(
                    path,
                    key,
                    format!("belongs to {kind}; only linear LoRA is supported so far"),
                ));
            }
            Split::Unknown => {
                unknown.push(key);
                continue;
            }
        };
        let group = groups.entry(LayerKey::parse(module)).or_default();
        group.module = module;
        let slot = match part {
            Part::A => &mut group.a,
            Part::B => &mut group.b,
            Part::Alpha => &mut group.alpha,
        };
        if let Some(other) = slot.replace(key) {
            return Err(Error::tensor(
                path,
                key,
                format!(
                    "names the same layer as `{other}`; a file may hold one adapter, with each layer once"
                ),
            ));
        }
    }
    if !unknown.is_empty() {
        let some = unknown.iter().take(3).map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        let more = unknown.len().saturating_sub(3);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let what = if groups.values().any(|g| g.a.is_some() || g.b.is_some()) {
            "besides LoRA layers it holds tensors that are none"
        } else {
            "it holds no LoRA layers; is it a checkpoint of a whole model?"
        };
        return Err(Error::file(
            path,
            format!(
                "{what}: {some}{more}; expected are keys that end in `.lora_A.weight` and \
                 `.lora_B.weight`, or `.lora_down.weight` and `.lora_up.weight`"
            ),
        ));
    }
    if groups.is_empty() {
        return Err(Error::file(path, "it holds no LoRA layers: there is no tensor in it"));
    }
    groups.into_iter().map(|(key, group)| layer(file, &scales, key, &group)).collect()
}

fn layer(file: &SafetensorsFile, scales: &Scales, key: LayerKey, group: &Group) -> Result<Layer> {
    let path = file.path();
    let find = |name: Option<&str>| name.and_then(|name| file.tensor(name));
    let (a, b) = match (find(group.a), find(group.b)) {
        (Some(a), Some(b)) => (a, b),
        (Some(a), None) => {
            return Err(alone(path, &a, "A (`lora_A`, `lora_down`)", "B (`lora_B`, `lora_up`)"));
        }
        (None, Some(b)) => {
            return Err(alone(path, &b, "B (`lora_B`, `lora_up`)", "A (`lora_A`, `lora_down`)"));
        }
        (None, None) => {
            let alpha = group.alpha.unwrap_or(group.module);
            return Err(Error::tensor(path, alpha, "is an alpha without the A and B of its layer"));
        }
    };
    let a = factor(file, &a, "[rank, inputs]")?;
    let b = factor(file, &b, "[outputs, rank]")?;
    if a.rows != b.cols {
        return Err(Error::tensor(
            path,
            &b.key,
            format!(
                "has rank {} by its shape [{}, {}], but `{}` has rank {} by its shape [{}, {}]; \
                 they should agree",
                b.cols, b.rows, b.cols, a.key, a.rows, a.rows, a.cols
            ),
        ));
    }
    let alpha = find(group.alpha).map(|t| alpha(path, &t)).transpose()?;
    let (_, len) = keys::prefix(group.module);
    let (prefix, module) = group.module.split_at(len);
    Ok(Layer {
        scale: scales.of(&key, module, a.rows, alpha),
        key,
        module: module.to_owned(),
        prefix: prefix.to_owned(),
        rank: a.rows,
        input: a.cols,
        output: b.rows,
        format: Some(Format::of(prefix, module)),
        a,
        b,
    })
}

fn alone(path: &Path, found: &TensorRef, part: &str, missing: &str) -> Error {
    Error::tensor(path, found.name, format!("is the factor {part} of a layer whose {missing} is missing"))
}

fn factor(file: &SafetensorsFile, t: &TensorRef, wanted: &str) -> Result<Tensor> {
    let fail = |reason: String| Err(Error::tensor(file.path(), t.name, reason));
    let &[rows, cols] = t.shape else {
        return fail(if (3..=5).contains(&t.shape.len()) {
            format!(
                "belongs to a LoRA of a convolution (shape {:?}); only linear LoRA is supported so far",
                t.shape
            )
        } else {
            format!("has the shape {:?}, but {wanted} is needed", t.shape)
        });
    };
    if rows == 0 || cols == 0 {
        return fail(format!("has the shape {:?}, but no dimension of {wanted} may be zero", t.shape));
    }
    let dtype = match t.dtype {
        FileDtype::F32 => Dtype::F32,
        FileDtype::F16 => Dtype::F16,
        FileDtype::BF16 => Dtype::Bf16,
        other => return fail(format!("is of type {other}; supported are F32, F16 and BF16")),
    };
    Ok(Tensor { dtype, rows, cols, key: t.name.into(), data: TensorData::File(file.clone()) })
}

/// Reads an alpha: one number of any type, in any shape.
fn alpha(path: &Path, t: &TensorRef) -> Result<f64> {
    let fail = |reason: String| Err(Error::tensor(path, t.name, reason));
    if t.shape.iter().product::<usize>() != 1 {
        return fail(format!("has the shape {:?}, but an alpha is one number", t.shape));
    }
    macro_rules! number {
        ($type:ty) => {
            t.bytes.try_into().map(<$type>::from_le_bytes).ok().map(|x| x as f64)
        };
    }
    let value = match t.dtype {
        FileDtype::F64 => number!(f64),
        FileDtype::F32 => number!(f32),
        FileDtype::F16 => t.bytes.try_into().map(|b| half::f16::from_le_bytes(b).to_f64()).ok(),
        FileDtype::BF16 => t.bytes.try_into().map(|b| half::bf16::from_le_bytes(b).to_f64()).ok(),
        FileDtype::I64 => number!(i64),
        FileDtype::U64 => number!(u64),
        FileDtype::I32 => number!(i32),
        FileDtype::U32 => number!(u32),
        FileDtype::I16 => number!(i16),
        FileDtype::U16 => number!(u16),
        FileDtype::I8 => number!(i8),
        FileDtype::U8 => number!(u8),
        _ => None,
    };
    match value {
        Some(value) if value.is_finite() => Ok(value),
        Some(value) => fail(format!("is {value}, but an alpha is a finite number")),
        None => fail(format!("is of type {}; an alpha is a float or an integer", t.dtype)),
    }
}
