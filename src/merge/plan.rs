//! Which layers, and which adapters on each.

use std::collections::BTreeMap;

use crate::adapter::dotted;
use crate::words::count;
use crate::{Error, Layer, LayerKey, Result, Weighted};

/// Which layers a merge has, and which adapters each comes from.
#[derive(Clone, Debug)]
pub struct Plan {
    layers: Vec<PlannedLayer>,
    notes: Vec<String>,
}

/// One layer of a [`Plan`].
#[derive(Clone, Debug)]
pub struct PlannedLayer {
    /// The name that it is matched by.
    pub key: LayerKey,
    /// Its [`Layer::name`], with dots if one of its adapters spells them.
    pub name: String,
    /// Which of the adapters take part in it, in order: those whose scale and strength are not zero there,
    /// unless all are (then the first).
    pub members: Vec<usize>,
    /// Adapters that have it but add nothing, since scale or strength is zero.
    pub silent: Vec<usize>,
    /// Sum of the members' ranks.
    pub rank: usize,
    /// Width that it reads.
    pub input: usize,
    /// Width that it writes.
    pub output: usize,
}

impl Plan {
    /// Matches layers by key over all adapters.
    ///
    /// # Errors
    /// [`Error::Invalid`] without adapters or if a strength is not finite; [`Error::Layer`] if a scale is not, or,
    /// naming both files and shapes, if adapters disagree on a layer's widths.
    pub fn new(adapters: &[Weighted<'_>]) -> Result<Self> {
        if adapters.is_empty() {
            return Err(Error::Invalid("a merge needs at least one adapter".into()));
        }
        let mut notes = Vec::new();
        let mut all: BTreeMap<&LayerKey, Vec<(usize, &Layer)>> = BTreeMap::new();
        for (i, Weighted { adapter, strength }) in adapters.iter().enumerate() {
            if !strength.is_finite() {
                return Err(Error::Invalid(format!(
                    "the strength of `{}` is {strength}; it must be a finite number",
                    adapter.name()
                )));
            }
            if *strength == 0.0 {
                notes.push(format!("`{}` adds nothing: its strength is 0", adapter.name()));
            }
            notes.extend_from_slice(adapter.notes());
            for layer in adapter.layers() {
                all.entry(&layer.key).or_default().push((i, layer));
            }
        }
        let layers =
            all.into_iter().map(|(key, of)| planned(key, &of, adapters)).collect::<Result<Vec<_>>>()?;
        for (i, Weighted { adapter, strength }) in adapters.iter().enumerate() {
            let silent = layers.iter().filter(|layer| layer.silent.contains(&i)).count();
            if silent > 0 && *strength != 0.0 {
                notes.push(format!(
                    "`{}` adds nothing on {silent} of its {}: alpha or strength is 0 there",
                    adapter.name(),
                    count(adapter.layers().len(), "layer")
                ));
            }
        }
        Ok(Self { layers, notes })
    }

    /// The layers, sorted by key.
    pub fn layers(&self) -> &[PlannedLayer] {
        &self.layers
    }

    /// What the user should know: adapters that add nothing.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

fn planned(key: &LayerKey, of: &[(usize, &Layer)], adapters: &[Weighted<'_>]) -> Result<PlannedLayer> {
    let (first, layer) = of[0];
    let name = dotted(of.iter().map(|(_, layer)| *layer)).unwrap_or(layer).name();
    for &(i, other) in of {
        if (other.input, other.output) != (layer.input, layer.output) {
            return Err(Error::layer(
                name,
                format!(
                    "{} changes {} inputs into {} outputs, but {} {} into {}; adapters must be for one base model",
                    adapters[first].adapter.path().display(),
                    layer.input,
                    layer.output,
                    adapters[i].adapter.path().display(),
                    other.input,
                    other.output
                ),
            ));
        }
        if !other.scale.value.is_finite() {
            let (path, scale) = (adapters[i].adapter.path().display(), other.scale.value);
            return Err(Error::layer(name, format!("its scale in {path} is {scale}; it must be finite")));
        }
    }
    let is_silent = |&&(i, layer): &&(usize, &Layer)| layer.scale.value == 0.0 || adapters[i].strength == 0.0;
    let mut silent: Vec<usize> = of.iter().filter(is_silent).map(|(i, _)| *i).collect();
    let mut members: Vec<usize> = of.iter().map(|(i, _)| *i).filter(|i| !silent.contains(i)).collect();
    if members.is_empty() {
        members.push(silent.remove(0));
    }
    let rank = of.iter().filter(|(i, _)| members.contains(i)).map(|(_, layer)| layer.rank).sum();
    Ok(PlannedLayer {
        key: key.clone(),
        name,
        members,
        silent,
        rank,
        input: layer.input,
        output: layer.output,
    })
}
