//! DoRA: `W' = m · (W0 + ΔW) / ‖W0 + ΔW‖`, with a norm for each output or, of LyCORIS, each input; its update is
//! `W' − W0` (Liu et al. 2024, equation 5).

use super::super::keys::{LayerKey, Part};
use super::super::read::{Group, Source};
use super::{Base, Update};
use crate::{Error, Matrix, Result};

/// The whole update of a module: `update` is what DoRA decomposes, a LoRA, LoHa or LoKr.
pub(super) fn update(
    source: &Source,
    base: &Base,
    key: &LayerKey,
    group: &Group,
    update: &Update,
) -> Result<Matrix> {
    let file = source.file;
    let find = |part| group.tensor(file, part);
    let scale = update.scale(source, key, group)?;
    let low = update.dense();
    let old = base.weight(source.family, key, low.cols)?;
    if (old.rows, old.cols) != (low.rows, low.cols) {
        let reason = format!(
            "its update is {} x {}, but the base model's weights are {} x {}; is it another model?",
            low.rows, low.cols, old.rows, old.cols
        );
        return Err(Error::layer(key.as_str(), reason));
    }
    let mut new = low;
    new.data.iter_mut().zip(&old.data).for_each(|(new, old)| *new = *new * scale + old);

    let (per_input, norms) = match (find(Part::Magnitude), find(Part::DoraScale)) {
        (Some(t), _) => (false, t),
        // [1, inputs, 1, 1] or [outputs, 1, 1, 1].
        (None, Some(t)) => (t.shape.first() == Some(&1) && t.shape.get(1).is_some_and(|&n| n > 1), t),
        (None, None) => return Err(Error::layer(key.as_str(), "its norms are missing")),
    };
    let flat = [norms.shape.iter().product::<usize>(), 1];
    let m = super::factor(file, &norms.reshaped(&flat), "norms")?;
    let m: Vec<f64> = m.raw().to_vec();
    let taps: usize = update.kernel().map_or(1, |kernel| kernel.iter().product());
    let groups = if per_input { new.cols / taps.max(1) } else { new.rows };
    if m.len() != groups {
        let reason = format!("has {} norms, but the module has {groups} of them", m.len());
        return Err(Error::tensor(file.path(), norms.name, reason));
    }
    let place = |i: usize, j: usize| if per_input { j / taps.max(1) } else { i };
    let mut squares = vec![0.0; groups];
    for i in 0..new.rows {
        for j in 0..new.cols {
            squares[place(i, j)] += new[(i, j)] * new[(i, j)];
        }
    }
    for i in 0..new.rows {
        for j in 0..new.cols {
            let k = place(i, j);
            let factor = if squares[k] > 0.0 { m[k] / squares[k].sqrt() } else { 0.0 };
            new[(i, j)] = new[(i, j)] * factor - old[(i, j)];
        }
    }
    Ok(new)
}
