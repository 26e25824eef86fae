//! Fused modules: q, k and v as one. They are read as several layers, exactly, so that merges never see the
//! difference; `write` puts them together again.

use std::ops::Range;
use std::sync::Arc;

use super::keys::LayerKey;
use super::{Layer, PartOf, Tensor, TensorData};
use crate::{Matrix, RawMatrix};

/// Cuts a fused layer into its parts: B into rows, with A shared. Where B is block-diagonal, as a converter leaves it
/// that stacked several A, each part gets its own columns, and what is zero altogether is no layer.
pub(super) fn split(
    layer: &Layer,
    rows: &[usize],
    parts: &[String],
    key: impl Fn(&str) -> LayerKey,
    part_of: impl Fn(usize) -> PartOf,
) -> Vec<Layer> {
    let mut start = 0;
    let places: Vec<Range<usize>> = rows
        .iter()
        .map(|n| {
            start += n;
            start - n..start
        })
        .collect();
    let columns = blocks(layer.b(), &places);
    let mut layers = Vec::new();
    for (index, (path, place)) in parts.iter().zip(&places).enumerate() {
        let b = layer.b.rows(place.clone());
        let (a, b) = match &columns {
            None => (layer.a.clone(), b),
            Some(columns) => match &columns[index] {
                columns if columns.is_empty() => continue,
                columns if columns.len() == layer.rank => (layer.a.clone(), b),
                columns => (layer.a.rows(columns.clone()), some_columns(&b, columns)),
            },
        };
        layers.push(Layer {
            key: key(path),
            module: path.clone(),
            rank: a.rows,
            output: b.rows,
            part: Some(part_of(index)),
            a,
            b,
            ..layer.clone()
        });
    }
    layers
}

/// The columns of each part, if B is zero everywhere else; all of them for those that share some, and none for a part
/// that is zero. `None` if every part has all.
fn blocks(b: RawMatrix<'_>, places: &[Range<usize>]) -> Option<Vec<Range<usize>>> {
    let size = b.dtype().size();
    // Bits, so that a negative zero is not lost.
    let is_set = |row: usize, col: usize| {
        let at = (row * b.cols() + col) * size;
        b.bytes()[at..at + size].iter().any(|&byte| byte != 0)
    };
    // A look at one row tells of almost every other adapter that it is none of these.
    if places.iter().all(|place| (0..b.cols()).all(|col| is_set(place.start, col))) {
        return None;
    }
    let used: Vec<Option<Range<usize>>> = places
        .iter()
        .map(|place| {
            let (mut first, mut last) = (b.cols(), None);
            for row in place.clone() {
                first = (0..first).find(|&col| is_set(row, col)).unwrap_or(first);
                let from = last.map_or(0, |last| last + 1);
                last = (from..b.cols()).rev().find(|&col| is_set(row, col)).or(last);
            }
            last.map(|last| first..last + 1)
        })
        .collect();
    let present = used.iter().flatten().count();
    if present == 0 {
        return None;
    }
    // Equal shares are likelier than those that zeros at a border suggest.
    let share = b.cols() / present;
    let mut end = 0;
    let mut i = 0;
    let equal: Vec<Range<usize>> = used
        .iter()
        .map(|of| {
            let start = i * share;
            i += usize::from(of.is_some());
            if of.is_some() { start..start + share } else { start..start }
        })
        .collect();
    let inside = |(of, share): (&Option<Range<usize>>, &Range<usize>)| {
        of.as_ref().is_none_or(|of| share.start <= of.start && of.end <= share.end)
    };
    if share * present == b.cols() && used.iter().zip(&equal).all(inside) {
        return Some(equal);
    }
    let whole = |of: &Option<Range<usize>>| if of.is_some() { 0..b.cols() } else { 0..0 };
    let shared = || (present < used.len()).then(|| used.iter().map(whole).collect());
    let mut blocks = Vec::with_capacity(used.len());
    let mut left = present;
    for of in &used {
        let Some(of) = of else {
            blocks.push(end..end);
            continue;
        };
        left -= 1;
        if of.start < end {
            return shared();
        }
        let stop = if left == 0 { b.cols() } else { of.end };
        blocks.push(end..stop);
        end = stop;
    }
    Some(blocks)
}

fn some_columns(b: &Tensor, columns: &Range<usize>) -> Tensor {
    let raw = b.raw();
    let (width, size) = (raw.cols() * raw.dtype().size(), raw.dtype().size());
    let cut = |row: &[u8]| row[columns.start * size..columns.end * size].to_vec();
    let bytes: Vec<u8> = raw.bytes().chunks_exact(width).flat_map(cut).collect();
    Tensor { cols: columns.len(), data: TensorData::Bytes(Arc::new(bytes)), ..b.clone() }
}

/// Parts of a fused module as layers of the whole: for each part, its members and the factor on each. Members that share
/// A and factor are one; the rows of the other parts are zero.
pub(crate) fn stack(parts: &[&[(&Layer, f64)]]) -> Vec<(Layer, f64)> {
    let heights: Vec<usize> = parts.iter().map(|members| members.first().map_or(0, |m| m.0.output)).collect();
    let rows: usize = heights.iter().sum();
    let mut stacked: Vec<(&Layer, f64, Matrix<f32>)> = Vec::new();
    let mut start = 0;
    for (members, height) in parts.iter().zip(&heights) {
        for &(layer, factor) in *members {
            let found = stacked.iter().position(|(other, f, _)| *f == factor && other.a.same(&layer.a));
            let i = found.unwrap_or_else(|| {
                let data = vec![0.0; rows * layer.rank];
                stacked.push((layer, factor, Matrix { rows, cols: layer.rank, data }));
                stacked.len() - 1
            });
            let b = &mut stacked[i].2.data[start * layer.rank..(start + height) * layer.rank];
            let own: Vec<f32> = layer.b().to_vec();
            // One adapter may have a part twice only if it adds up.
            b.iter_mut().zip(own).for_each(|(sum, v)| *sum += v);
        }
        start += height;
    }
    let layer = |(layer, factor, b): (&Layer, f64, Matrix<f32>)| {
        let b = Tensor::of(b, layer.b.key.to_string());
        (Layer { output: rows, b, part: None, ..layer.clone() }, factor)
    };
    stacked.into_iter().map(layer).collect()
}

/// The rank of what [`stack`] makes.
pub(crate) fn stacked_rank(parts: &[&[(&Layer, f64)]]) -> usize {
    let mut distinct: Vec<(&Layer, f64)> = Vec::new();
    for &(layer, factor) in parts.iter().copied().flatten() {
        if !distinct.iter().any(|(other, f)| *f == factor && other.a.same(&layer.a)) {
            distinct.push((layer, factor));
        }
    }
    distinct.iter().map(|(layer, _)| layer.rank).sum()
}

/// The parts of a layer that [`stack`] made, in the places of `templates`: they share its A.
pub(crate) fn unstack(whole: &Layer, templates: &[&Layer]) -> Vec<Layer> {
    let mut start = 0;
    let part = |template: &&Layer| {
        let b = whole.b.rows(start..start + template.output);
        start += template.output;
        Layer { rank: whole.rank, scale: whole.scale, a: whole.a.clone(), b, ..(*template).clone() }
    };
    templates.iter().map(part).collect()
}

/// The lower half of the rows, and then the upper one.
pub(super) fn swap_halves(b: &Tensor) -> Tensor {
    let raw = b.raw();
    let (upper, lower) = raw.bytes().split_at(raw.rows() / 2 * raw.cols() * raw.dtype().size());
    Tensor { data: TensorData::Bytes(Arc::new([lower, upper].concat())), ..b.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(rows: &[&[f32]], places: &[Range<usize>]) -> Option<Vec<Range<usize>>> {
        let values: Vec<f32> = rows.concat();
        blocks(RawMatrix::from_f32(rows.len(), rows[0].len(), &values).unwrap(), places)
    }

    #[test]
    fn blocks_are_found() {
        let three = [0..1, 1..2, 2..3];
        assert_eq!(found(&[&[1., 2.], &[3., 4.], &[5., 6.]], &three), None);
        assert_eq!(
            found(&[&[1., 0., 0.], &[0., 1., 0.], &[0., 0., 1.]], &three),
            Some(vec![0..1, 1..2, 2..3])
        );
        // A zero at the border of a share is the share's.
        let rows: &[&[f32]] =
            &[&[1., 0., 0., 0., 0., 0.], &[0., 0., 1., 1., 0., 0.], &[0., 0., 0., 0., 0., 1.]];
        assert_eq!(found(rows, &three), Some(vec![0..2, 2..4, 4..6]));
        // Unequal shares, and a part that is not adapted.
        assert_eq!(
            found(&[&[1., 1., 0.], &[0., 0., 0.], &[0., 0., 1.]], &three),
            Some(vec![0..2, 2..2, 2..3])
        );
        assert_eq!(found(&[&[1., 1.], &[0., 0.], &[0., 0.]], &three), Some(vec![0..2, 2..2, 2..2]));
        // Shared columns, with and without a part that is zero, and an untrained layer.
        assert_eq!(found(&[&[1., 1.], &[0., 0.], &[1., 1.]], &three), Some(vec![0..2, 0..0, 0..2]));
        assert_eq!(found(&[&[1., 1.], &[0., 1.], &[1., 0.]], &three), None);
        assert_eq!(found(&[&[0., 0.], &[0., 0.], &[0., 0.]], &three), None);
    }
}
