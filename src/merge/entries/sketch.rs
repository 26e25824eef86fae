//! The merged update of one layer, made panel by panel from the factors and never held whole.

use std::ops::Range;

use super::rule::{EntryOptions, Voter};
use super::survey::Ranking;
use crate::compute::ops::{self, Axis, EntryRule, Factor};
use crate::compute::{Batch, Shape};
use crate::merge::PlannedLayer;
use crate::power::{exponent, exponent_of, pow2};
use crate::{Control, Device, Error, Matrix, Result};

/// Bytes of a panel on a GPU, at most, and its part of the budget; and on the CPU, where each thread has one.
const PANEL: u64 = 64 << 20;
const PANEL_PART: u64 = 16;
const CPU_PANEL: usize = 4 << 20;
/// A kernel's loops run through the rows of a panel.
const PANEL_ROWS: usize = 8192;

/// The merged update M of one layer, divided by `2^exponent`, as far as products with it show.
pub(super) struct Sketch<'a> {
    pub device: &'a Device,
    control: &'a Control<'a>,
    name: &'a str,
    a: Batch,
    b: Batch,
    pub rule: EntryRule,
    pub exponent: i32,
    pub shape: Shape,
}

/// The exponents of a voter's factors, and its factor on the update of factors of size 1.
pub(super) fn sized(voter: &Voter<'_>) -> (i32, i32, f64) {
    let [a, b] = [voter.layer.a(), voter.layer.b()].map(|m| exponent(m).unwrap_or(0));
    (a, b, voter.scale * pow2(a) * pow2(b))
}

impl<'a> Sketch<'a> {
    /// With everything kept. `exponent`: that of the largest factor, by default of this layer's.
    pub fn new(
        device: &'a Device,
        layer: &'a PlannedLayer,
        voters: &[Voter<'a>],
        rule: &EntryOptions,
        exponent: Option<i32>,
        control: &'a Control<'a>,
    ) -> Result<Self> {
        // Factors are brought to size 1 by powers of two, and all updates by a common one.
        let (mut a, mut b, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        for voter in voters {
            let (a_size, b_size, scale) = sized(voter);
            a.push(Factor { matrix: voter.layer.a(), scale: pow2(-a_size) as f32 });
            b.push(Factor { matrix: voter.layer.b(), scale: pow2(-b_size) as f32 });
            scales.push(scale);
        }
        let own = || exponent_of(scales.iter().fold(0.0, |max, s| s.abs().max(max)));
        let exponent = exponent.unwrap_or_else(own);
        scales.iter_mut().for_each(|s| *s *= pow2(-exponent));
        Ok(Self {
            device,
            control,
            name: &layer.name,
            a: ops::rank_concat(device, Axis::Rows, &[&a])?,
            b: ops::rank_concat(device, Axis::Columns, &[&b])?,
            rule: rule.entries(&layer.key, voters, &scales),
            exponent,
            shape: Shape::new(layer.output, layer.input),
        })
    }

    /// Calls `each` with panels of rows, one after the other.
    fn panels(&self, mut each: impl FnMut(Range<usize>) -> Result<()>) -> Result<()> {
        let rows = panel_rows(self.device, self.shape.cols);
        for first in (0..self.shape.rows).step_by(rows) {
            self.control.check()?;
            each(first..(first + rows).min(self.shape.rows))?;
        }
        Ok(())
    }

    /// Counts the magnitudes of each member, as far as the pass of the ranking asks for.
    pub fn rank(&self, ranking: &mut Ranking) -> Result<()> {
        let prefixes = ranking.prefixes().map(<[u32]>::to_vec);
        self.panels(|rows| {
            let (members, counts) = (&self.rule.members, ranking.counts());
            ops::magnitudes(self.device, &self.a, &self.b, members, prefixes.as_deref(), rows, counts)
        })
    }

    /// Sets the thresholds so that each member keeps its `count` largest entries, and what is as large as the last.
    pub fn trim(&mut self, count: usize) -> Result<()> {
        let mut ranking = Ranking::new(self.rule.members.len());
        self.rank(&mut ranking)?;
        ranking.narrow(count as u64);
        self.rank(&mut ranking)?;
        for (member, threshold) in self.rule.members.iter_mut().zip(ranking.thresholds()) {
            member.threshold = threshold;
        }
        Ok(())
    }

    /// How many sums of what counts are above zero, less how many are below.
    pub fn signs(&self) -> Result<i64> {
        let mut signs = 0;
        self.panels(|rows| {
            signs += ops::entries(self.device, &self.a, &self.b, &self.rule, rows)?.signs;
            Ok(())
        })?;
        Ok(signs)
    }

    /// `W·Mᵀ·M`, of W's shape.
    pub fn squared(&self, w: &Batch) -> Result<Matrix> {
        let mut sum: Option<Batch> = None;
        self.panels(|rows| {
            let panel = ops::entries(self.device, &self.a, &self.b, &self.rule, rows)?.values;
            let part = ops::inner_as(self.device, w, &panel, self.device.product())?;
            sum = Some(ops::rank_update(self.device, sum.as_ref(), &part, &panel)?);
            Ok(())
        })?;
        self.one(sum)
    }

    /// `W·Mᵀ`, directions × out, and ‖M‖².
    pub fn applied(&self, w: &Batch) -> Result<(Matrix, f64)> {
        let mut product = Matrix::zeros(w.shapes()[0].rows, self.shape.rows);
        let mut square = 0.0;
        self.panels(|rows| {
            let panel = ops::entries(self.device, &self.a, &self.b, &self.rule, rows.clone())?;
            square += panel.square;
            let part = ops::inner_as(self.device, w, &panel.values, self.device.product())?;
            let part = self.one(Some(part))?;
            for k in 0..product.rows {
                let to = k * product.cols + rows.start;
                product.data[to..to + rows.len()].copy_from_slice(part.row(k));
            }
            Ok(())
        })?;
        Ok((product, square))
    }

    /// M itself, and ‖M‖².
    pub fn whole(&self) -> Result<(Matrix, f64)> {
        let mut whole = Matrix { rows: self.shape.rows, cols: self.shape.cols, data: Vec::new() };
        let mut square = 0.0;
        self.panels(|rows| {
            let panel = ops::entries(self.device, &self.a, &self.b, &self.rule, rows)?;
            square += panel.square;
            whole.data.extend(self.one(Some(panel.values))?.data);
            Ok(())
        })?;
        Ok((whole, square))
    }

    fn one(&self, batch: Option<Batch>) -> Result<Matrix> {
        let matrix = batch.map(|batch| batch.download(self.device)).transpose()?;
        let empty = || Error::layer(self.name, "it has no rows");
        matrix.and_then(|mut all| all.pop()).ok_or_else(empty)
    }
}

/// Rows of a panel.
pub(super) fn panel_rows(device: &Device, width: usize) -> usize {
    let elements = match device.is_gpu() {
        true => PANEL.min(device.memory() / PANEL_PART) as usize / 4,
        false => CPU_PANEL / 8,
    };
    (elements / width.max(1)).clamp(1, PANEL_ROWS)
}
