//! What the weights of a checkpoint are to layers: which layer, or which of the layers that it fuses, each row is of.

use std::collections::BTreeMap;
use std::ops::Range;

use super::families::{self, Clue, Family, Names, Recognised, Widths};
use super::keys::{self, Bare, LayerKey};
use super::read::usual_names;
use super::scale::Scale;
use super::{Format, Kernel, Layer, Tensor};
use crate::Matrix;

/// A weight: the name of its module as the checkpoint has it, prefix and all, and the columns and rows of its matrix.
pub(crate) struct Weight {
    pub module: String,
    pub widths: Widths,
}

/// The rows of a weight that are a layer's.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub key: LayerKey,
    /// The dotted path of the layer's module, as diffusers has it if it has it.
    pub path: String,
    pub rows: Range<usize>,
    /// Whether the halves of the rows are the other way round than those of the layer.
    pub swapped: bool,
    /// Whether an inventory has the module.
    pub known: bool,
}

/// The names of a model's modules, as far as the checkpoint tells which model it is.
pub(crate) struct Inventory {
    family: Family,
    /// Whose names most modules have.
    usual: Option<Names>,
}

impl Inventory {
    /// Of a checkpoint's weights; `told` is what the caller knows of the model. With it, what the user should know.
    pub fn new(
        weights: &[Weight],
        metadata: &BTreeMap<String, String>,
        told: Option<Family>,
    ) -> (Self, Option<String>) {
        let bare: Vec<Bare> = weights.iter().map(|weight| Bare::parse(&weight.module)).collect();
        let clues: Vec<Clue> = weights
            .iter()
            .zip(&bare)
            .filter(|(weight, bare)| telling(&weight.module, bare))
            .map(|(Weight { module, widths }, bare)| Clue {
                component: &bare.component,
                prefix: &module[..keys::prefix(module).1],
                flat: &bare.flat,
                widths: *widths,
            })
            .collect();
        let recognised = || families::recognise(&clues, metadata);
        let Recognised { family, note } =
            told.map_or_else(recognised, |family| Recognised { family, note: None });
        (Self { family, usual: usual_names(family, &clues) }, note)
    }

    /// The model, as far as the checkpoint tells.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Whose rows a weight has.
    ///
    /// # Errors
    /// Why rows that are several layers' cannot be told apart, as a clause that follows the weight's name.
    pub fn parts(&self, weight: &Weight) -> Result<Vec<Part>, String> {
        let (input, output) = weight.widths;
        let bare = Bare::parse(&weight.module);
        let Bare { component, flat } = &bare;
        let own = || weight.module[keys::prefix(&weight.module).1..].to_owned();
        let Some(module) = self.family.module(component, flat, Some(weight.widths), self.usual) else {
            let part =
                |known| Part { key: bare.key(flat), path: own(), rows: 0..output, swapped: false, known };
            return Ok(vec![part(false)]);
        };
        let Some((fused, paths)) = module.fused else {
            let place = self.family.place(component, &module.key, Format::Peft, None, weight.widths);
            let path = place.map_or_else(|_| own(), |place| place.path);
            let (key, swapped) = (bare.key(&module.key), module.swap);
            return Ok(vec![Part { key, path, rows: 0..output, swapped, known: true }]);
        };
        let rows = fused.rows(input, output).ok_or_else(|| {
            format!(
                "fuses {} modules of {}, but {output} rows cannot be cut so for {input} inputs",
                paths.len(),
                self.family
            )
        })?;
        let mut start = 0;
        let part = |(path, rows): (String, usize)| {
            start += rows;
            let key = bare.key(&path.replace('.', "_"));
            Part { key, path, rows: start - rows..start, swapped: false, known: true }
        };
        Ok(paths.into_iter().zip(rows).map(part).collect())
    }

    /// The keys of all layers that a module may be, whatever its shape.
    pub fn keys(&self, module: &str) -> Vec<LayerKey> {
        let bare = Bare::parse(module);
        let mut keys = vec![bare.key(&bare.flat)];
        if let Some(module) = self.family.module(&bare.component, &bare.flat, None, self.usual) {
            keys.push(bare.key(&module.key));
            let parts = module.fused.into_iter().flat_map(|(_, paths)| paths);
            keys.extend(parts.map(|path| bare.key(&path.replace('.', "_"))));
        }
        keys.dedup();
        keys
    }
}

/// Whether a weight says something of the model: one of an autoencoder, or of a text encoder that is not known, does not.
fn telling(module: &str, bare: &Bare) -> bool {
    let beside = ["first_stage_model.", "vae.", "model_ema.", "cond_stage_model.", "conditioner."];
    let unknown = families::is_encoder(&bare.component) && !families::is_known(&bare.component, &bare.flat);
    !unknown && (families::is_encoder(&bare.component) || !beside.iter().any(|p| module.starts_with(p)))
}

/// The update `B · A` of a weight as the layers that it is of, which share A. `kernel`: that of a convolution.
pub(crate) fn layers_of_weight(
    family: Family,
    parts: &[Part],
    kernel: &[usize],
    a: Matrix<f32>,
    b: Matrix<f32>,
) -> Vec<Layer> {
    let kernel = (!kernel.is_empty()).then(|| Kernel { dims: kernel.to_vec(), ones: kernel.len() });
    let (rank, input) = (a.rows, a.cols);
    let a = Tensor::of(a, "lora_A.weight".into());
    let layer = |part: &Part| {
        let data = b.data[part.rows.start * rank..part.rows.end * rank].to_vec();
        let b = Matrix { rows: part.rows.len(), cols: rank, data };
        let name = |factor: &str| format!("{}.{factor}", part.path).into();
        let prefix = match part.key.component() {
            "" => String::new(),
            component => format!("{component}."),
        };
        Layer {
            key: part.key.clone(),
            module: part.path.clone(),
            prefix,
            rank,
            input,
            output: b.rows,
            scale: Scale::given(1.0),
            family,
            spelling: None,
            known: part.known,
            swapped: false,
            part: None,
            kernel: kernel.clone(),
            a: Tensor { key: name("lora_A.weight"), ..a.clone() },
            b: Tensor::of(b, format!("{}.lora_B.weight", part.path)),
        }
    };
    parts.iter().map(layer).collect()
}
