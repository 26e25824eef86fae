//! The members of a layer: who takes part, and their factors joined.

use std::ops::Range;

use super::PlannedLayer;
use crate::adapter::dotted;
use crate::{Error, Layer, Matrix, Result, Weighted};

/// The members' layers, in order, with the factor on each: scale times strength.
pub(super) fn members<'a>(planned: &PlannedLayer, adapters: &[Weighted<'a>]) -> Vec<(&'a Layer, f64)> {
    let of = |&i: &usize| {
        let layer = adapters[i].adapter.layer(&planned.key)?;
        Some((layer, layer.scale.value * adapters[i].strength))
    };
    planned.members.iter().filter_map(of).collect()
}

/// The only member, at its strength, its tensors unchanged.
pub(super) fn passed_through(planned: &PlannedLayer, adapters: &[Weighted<'_>]) -> Option<Layer> {
    let [(layer, scale)] = members(planned, adapters)[..] else { return None };
    // At strength 1 the layer's own alpha is kept.
    Some(if scale == layer.scale.value { layer.unread() } else { layer.unread().with_scale(scale) })
}

/// The members' rows of A_cat.
pub(super) fn blocks(members: &[(&Layer, f64)]) -> Vec<Range<usize>> {
    let mut end = 0;
    let block = |(layer, _): &(&Layer, f64)| {
        end += layer.rank;
        end - layer.rank..end
    };
    members.iter().map(block).collect()
}

/// `A_cat = [A_1; …; A_K]`, exactly.
pub(super) fn joined_a(members: &[(&Layer, f64)]) -> Matrix<f32> {
    let rows = members.iter().map(|(layer, _)| layer.rank).sum();
    let cols = members.first().map_or(0, |(layer, _)| layer.input);
    let mut data = Vec::with_capacity(rows * cols);
    members.iter().for_each(|(layer, _)| layer.a().append_to(&mut data));
    Matrix { rows, cols, data }
}

/// `B_cat = [s_1·B_1 … s_K·B_K]`, rounded once to f32.
pub(super) fn joined_b(members: &[(&Layer, f64)]) -> Matrix<f32> {
    let rows = members.first().map_or(0, |(layer, _)| layer.output);
    let cols = members.iter().map(|(layer, _)| layer.rank).sum();
    let parts: Vec<_> = members.iter().map(|(layer, scale)| (layer.b(), *scale)).collect();
    let mut data = Vec::with_capacity(rows * cols);
    for i in 0..rows {
        for (part, scale) in &parts {
            let start = data.len();
            part.row_range(i, i + 1).append_to(&mut data);
            if *scale != 1.0 {
                data[start..].iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
            }
        }
    }
    Matrix { rows, cols, data }
}

/// Looks at many values at a time, without an early way out.
fn all_finite(values: &[f32]) -> bool {
    values.chunks(1 << 12).all(|block| block.iter().fold(true, |good, v| good & v.is_finite()))
}

/// The member whose spelling the merged layer takes: the first with dots, if one has.
pub(super) fn template<'a>(members: &[(&'a Layer, f64)]) -> &'a Layer {
    // Where no inventory has the name, only a file tells where its dots are.
    let first = members[0].0;
    if first.is_known() { first } else { dotted(members.iter().map(|(layer, _)| *layer)).unwrap_or(first) }
}

/// The sum of the members, exact but for rounding B once to f32.
pub(super) fn joined(members: &[(&Layer, f64)]) -> Result<Layer> {
    joined_layer(members, joined_a(members), joined_b(members))
}

/// A layer of the merge, at scale 1.
pub(super) fn joined_layer(members: &[(&Layer, f64)], a: Matrix<f32>, b: Matrix<f32>) -> Result<Layer> {
    let template = template(members);
    if !all_finite(&b.data) {
        let reason = "the merged B overflows f32; are scales and strengths right?";
        return Err(Error::layer(template.name(), reason));
    }
    template.replaced(a, b)
}

/// The layer of `A` and `Bᵀ`, rounded to f32.
pub(super) fn rounded(template: &Layer, a: &Matrix, b: &Matrix) -> Result<Layer> {
    let narrow = |m: &Matrix| m.map(|v| v as f32);
    finite(template, narrow(a), narrow(&b.transposed()))
}

/// The layer of factors at scale 1.
///
/// # Errors
/// [`Error::Layer`] if they have overflowed f32.
pub(super) fn finite(template: &Layer, a: Matrix<f32>, b: Matrix<f32>) -> Result<Layer> {
    if !all_finite(&a.data) || !all_finite(&b.data) {
        let reason = "the merged factors overflow f32; are scales and strengths right?";
        return Err(Error::layer(template.name(), reason));
    }
    template.replaced(a, b)
}
