//! Numbers as checkpoints store them: f32, f16, bf16, and fp8 with or without a scale. Read exactly, rounded when written.

use std::borrow::Cow;
use std::path::Path;

use half::slice::HalfFloatSliceExt;
use sha2::{Digest, Sha256};

use crate::adapter::f8;
use crate::io::safetensors_file::{FileDtype, SafetensorsFile, TensorRef};
use crate::{Dtype, Error, RawMatrix, Result};

/// How a number that the stored type does not have becomes one that it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Round {
    /// To the nearest, ties to even.
    #[default]
    Nearest,
    /// To one of its two neighbours, at random: the nearer it is, the likelier, so that the expectation is the number
    /// itself. Which one depends on nothing but the tensor's name and the element's place in it.
    Stochastic,
}

/// The type of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    Plain(Dtype),
    E4m3,
    E5m2,
}

impl Stored {
    /// The supported types.
    pub fn of(dtype: FileDtype) -> Option<Self> {
        Some(match dtype {
            FileDtype::F32 => Self::Plain(Dtype::F32),
            FileDtype::F16 => Self::Plain(Dtype::F16),
            FileDtype::BF16 => Self::Plain(Dtype::Bf16),
            FileDtype::F8_E4M3 => Self::E4m3,
            FileDtype::F8_E5M2 => Self::E5m2,
            _ => return None,
        })
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain(dtype) => dtype.name(),
            Self::E4m3 => "fp8 e4m3",
            Self::E5m2 => "fp8 e5m2",
        }
    }

    pub const fn is_fp8(self) -> bool {
        !matches!(self, Self::Plain(_))
    }

    /// Bytes of one number.
    pub const fn size(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.size(),
            Self::E4m3 | Self::E5m2 => 1,
        }
    }

    /// The largest number.
    pub const fn max(self) -> f32 {
        match self {
            Self::Plain(Dtype::F32) => f32::MAX,
            Self::Plain(Dtype::F16) => 65504.0,
            // The largest f32 without the lower half of its bits.
            Self::Plain(Dtype::Bf16) => f32::from_bits(0x7f7f_0000),
            Self::E4m3 => 448.0,
            Self::E5m2 => 57344.0,
        }
    }

    /// Bits of the mantissa without the leading one, and the exponent of the smallest normal number; none where
    /// rounding takes bits alone.
    const fn grid(self) -> Option<(i32, i32)> {
        match self {
            Self::Plain(Dtype::F32 | Dtype::Bf16) => None,
            Self::Plain(Dtype::F16) => Some((10, -14)),
            Self::E4m3 => Some((3, -6)),
            Self::E5m2 => Some((2, -14)),
        }
    }

    /// Widens numbers, as many as `out` has.
    fn widen(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::Plain(dtype) => RawMatrix::within(dtype, 1, out.len(), bytes).widen_into(out),
            Self::E4m3 => {
                let all = table(FileDtype::F8_E4M3);
                out.iter_mut().zip(bytes).for_each(|(v, b)| *v = all[usize::from(*b)]);
            }
            Self::E5m2 => {
                let all = table(FileDtype::F8_E5M2);
                out.iter_mut().zip(bytes).for_each(|(v, b)| *v = all[usize::from(*b)]);
            }
        }
    }

    /// Replaces numbers by those that the type has. What is too large for it becomes larger than [`max`](Self::max).
    fn round(self, values: &mut [f32], noise: Option<Noise>) {
        match (self.grid(), noise) {
            (None, _) if self == Self::Plain(Dtype::F32) => {}
            (None, None) => values.iter_mut().for_each(|v| {
                let bits = v.to_bits();
                *v = f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000);
            }),
            (None, Some(noise)) => values.iter_mut().enumerate().for_each(|(i, v)| {
                let random = noise.bits(i) >> 16;
                *v = f32::from_bits(v.to_bits().wrapping_add(random) & 0xffff_0000);
            }),
            // The distance of neighbours is a power of two, and so numbers are scaled by it exactly.
            (Some((mantissa, least)), None) => values.iter_mut().for_each(|v| {
                // Adding this rounds numbers of few bits to whole ones, ties to even.
                const WHOLE: f32 = 12_582_912.0;
                let (step, inverse) = steps(*v, mantissa, least);
                *v = ((*v * inverse + WHOLE) - WHOLE) * step;
            }),
            (Some((mantissa, least)), Some(noise)) => values.iter_mut().enumerate().for_each(|(i, v)| {
                let random = (noise.bits(i) >> 8) as f32 / (1 << 24) as f32;
                let (step, inverse) = steps(*v, mantissa, least);
                let scaled = (*v * inverse).abs();
                // Bits beyond those of the sum would be rounded, not cut.
                let whole = scaled.floor();
                let up = if scaled - whole > random { 1.0 } else { 0.0 };
                *v = (whole + up) * step * v.signum();
            }),
        }
    }

    /// The bytes of numbers that the type has.
    fn narrow(self, values: &[f32], bytes: &mut [u8]) {
        match self {
            Self::Plain(Dtype::F32) => {
                bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, v)| *b = v.to_le_bytes());
            }
            Self::Plain(Dtype::Bf16) => {
                let halves = bytes.as_chunks_mut().0.iter_mut().zip(values);
                halves.for_each(|(b, v)| *b = ((v.to_bits() >> 16) as u16).to_le_bytes());
            }
            Self::Plain(Dtype::F16) => {
                let mut halves = [half::f16::ZERO; CHUNK];
                for (values, bytes) in values.chunks(CHUNK).zip(bytes.chunks_mut(2 * CHUNK)) {
                    let halves = &mut halves[..values.len()];
                    halves.convert_from_f32_slice(values);
                    let pairs = bytes.as_chunks_mut().0.iter_mut().zip(halves);
                    pairs.for_each(|(b, half)| *b = half.to_le_bytes());
                }
            }
            Self::E5m2 => bytes.iter_mut().zip(values).for_each(|(b, v)| {
                // The upper half of an f16.
                *b = (half::f16::from_f32(*v).to_bits() >> 8) as u8;
            }),
            Self::E4m3 => bytes.iter_mut().zip(values).for_each(|(b, v)| {
                let bits = v.to_bits();
                let (sign, exponent) = ((bits >> 24 & 0x80) as u8, (bits >> 23 & 0xff) as i32 - 127);
                let magnitude = match exponent {
                    // Eighths of the smallest normal number.
                    ..-6 => (v.abs() * 512.0) as u8,
                    _ => ((exponent + 7) as u8) << 3 | (bits >> 20 & 7) as u8,
                };
                *b = sign | magnitude;
            }),
        }
    }
}

/// Numbers at a time, so that they stay in the first cache.
pub(super) const CHUNK: usize = 2048;

/// The distance of the numbers around `v` that have so many bits, and its inverse; powers of two.
fn steps(v: f32, mantissa: i32, least: i32) -> (f32, f32) {
    let exponent = ((v.to_bits() >> 23 & 0xff) as i32 - 127).max(least) - mantissa;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    (power(exponent), power(-exponent))
}

/// All numbers of 8 bits.
fn table(dtype: FileDtype) -> &'static [f32; 256] {
    use std::sync::LazyLock;
    static E4M3: LazyLock<[f32; 256]> =
        LazyLock::new(|| std::array::from_fn(|bits| f8(bits as u8, FileDtype::F8_E4M3).to_f32()));
    static E5M2: LazyLock<[f32; 256]> =
        LazyLock::new(|| std::array::from_fn(|bits| f8(bits as u8, FileDtype::F8_E5M2).to_f32()));
    if dtype == FileDtype::F8_E5M2 { &E5M2 } else { &E4M3 }
}

/// Random bits of each element of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Noise {
    seed: u64,
    /// Of the first element that is asked for.
    first: u64,
}

impl Noise {
    pub fn of(tensor: &str) -> Self {
        let digest = Sha256::digest(tensor.as_bytes());
        let seed = digest.iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte));
        Self { seed, first: 0 }
    }

    /// From this element on.
    fn from(self, first: usize) -> Self {
        Self { first: first as u64, ..self }
    }

    /// SplitMix64 (Steele, Lea and Flood 2014) of the element's number.
    fn bits(self, i: usize) -> u32 {
        let mut z = self.seed.wrapping_add((self.first + i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 32) as u32
    }
}

/// A weight of a checkpoint: how its numbers are stored, and the factors that they are stored without.
pub(super) struct Values<'a> {
    /// All of them, as they are stored; empty until they are needed.
    pub bytes: Cow<'a, [u8]>,
    pub path: &'a Path,
    pub tensor: TensorRef<'a>,
    pub stored: Stored,
    pub cols: usize,
    pub scale: Option<Scale<'a>>,
}

/// What the numbers of a weight are multiplied by when it is read.
#[derive(Clone)]
pub(super) struct Scale<'a> {
    pub tensor: TensorRef<'a>,
    pub stored: Stored,
    /// One of all rows, or one of each.
    pub values: Vec<f32>,
}

impl Scale<'_> {
    pub fn of_row(&self, row: usize) -> f32 {
        self.values[if self.values.len() == 1 { 0 } else { row }]
    }
}

/// Tensors beside a weight of that name that multiply it.
const SCALES: [&str; 2] = ["scale_weight", "weight_scale"];

/// Tensors beside a weight that say how it is quantised, and what that is called.
const FOREIGN: &[(&str, &str)] = &[
    (".weight.quant_state.bitsandbytes__nf4", "nf4 of bitsandbytes"),
    (".weight.quant_state.bitsandbytes__fp4", "fp4 of bitsandbytes"),
    (".weight.absmax", "4 bits of bitsandbytes"),
    (".SCB", "int8 of bitsandbytes"),
    (".weight_scale_2", "nvfp4"),
    (".weight_scale_inv", "fp8 with a scale for each block"),
    (".smooth_factor", "SVDQuant"),
    (".qzeros", "GPTQ or AWQ"),
    (".qweight", "GPTQ or AWQ"),
];

/// The quantisation of a module's weight that is not supported, by the tensors beside it and by its type.
pub(super) fn foreign(file: &SafetensorsFile, module: &str, tensor: &TensorRef<'_>) -> Option<String> {
    let beside = |suffix: &str| file.tensor(&format!("{module}{suffix}"));
    if let Some((_, name)) = FOREIGN.iter().find(|(suffix, _)| beside(suffix).is_some()) {
        return Some((*name).to_owned());
    }
    // ComfyUI writes the name of the format as JSON.
    if let Some(said) = beside(".comfy_quant") {
        let said: serde_json::Value =
            serde_json::from_slice(&said.bytes().unwrap_or_default()).unwrap_or_default();
        let format = said.get("format").and_then(|format| format.as_str()).unwrap_or("unknown");
        if !["float8_e4m3fn", "float8_e5m2"].contains(&format) {
            return Some(format!("`{format}` of ComfyUI"));
        }
    }
    match (Stored::of(tensor.dtype), tensor.dtype) {
        (Some(_), _) => None,
        (None, FileDtype::I8) => Some("int8".to_owned()),
        (None, dtype) => Some(dtype.to_string()),
    }
}

/// What is supported, for errors.
pub(super) const SUPPORTED: &str =
    "supported are F32, F16, BF16, and F8_E4M3 and F8_E5M2 with one scale, one for each row, or none";

impl<'a> Values<'a> {
    /// Reads the scale of a module's weight, if it has one. `rows`: those of the tensor as a matrix.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a quantisation that is not supported, or a scale that makes no sense.
    pub fn open(file: &'a SafetensorsFile, module: &str, tensor: TensorRef<'a>) -> Result<Self> {
        let fail = |name: &str, reason: String| Err(Error::tensor(file.path(), name, reason));
        if let Some(kind) = foreign(file, module, &tensor) {
            return fail(
                tensor.name,
                format!("is quantised as {kind}, which cannot be changed; {SUPPORTED}"),
            );
        }
        let Some(stored) = Stored::of(tensor.dtype) else {
            return fail(tensor.name, format!("is of type {}; {SUPPORTED}", tensor.dtype));
        };
        let rows = tensor.shape.first().copied().unwrap_or(0);
        let cols = tensor.shape.iter().skip(1).product();
        let mut scale = None;
        for name in SCALES {
            let Some(found) = file.tensor(&format!("{module}.{name}")) else { continue };
            let count = found.shape.iter().product::<usize>();
            let fits = count == 1 || (count == rows && found.shape.first() == Some(&rows));
            let Some(of_scale) = Stored::of(found.dtype).filter(|s| !s.is_fp8() && fits) else {
                let reason = format!(
                    "is a scale of type {} and shape {:?} for `{}` of {:?}; {SUPPORTED}",
                    found.dtype, found.shape, tensor.name, tensor.shape
                );
                return fail(found.name, reason);
            };
            let mut values = vec![0.0; count];
            of_scale.widen(&found.bytes()?, &mut values);
            if let Some(bad) = values.iter().find(|v| !(v.is_finite() && **v > 0.0)) {
                return fail(found.name, format!("holds {bad}, but a scale is finite and above 0"));
            }
            if scale.replace(Scale { tensor: found, stored: of_scale, values }).is_some() {
                return fail(found.name, format!("is a second scale of `{}`", tensor.name));
            }
        }
        Ok(Self { path: file.path(), tensor, stored, cols, scale, bytes: Cow::Borrowed(&[]) })
    }

    /// All numbers of a tensor without a scale, of these bytes; `None` for types that are not supported.
    pub fn plain(tensor: TensorRef<'_>, bytes: &[u8]) -> Option<Vec<f32>> {
        let stored = Stored::of(tensor.dtype)?;
        let mut out = vec![0.0; tensor.shape.iter().product()];
        stored.widen(bytes, &mut out);
        Some(out)
    }

    /// The numbers of a piece of a row, `out.len()` of them, in f32.
    pub fn read(&self, row: usize, col: usize, out: &mut [f32]) {
        let (size, start) = (self.stored.size(), row * self.cols + col);
        self.stored.widen(&self.bytes[start * size..(start + out.len()) * size], out);
        if let Some(scale) = &self.scale {
            let scale = scale.of_row(row);
            out.iter_mut().for_each(|v| *v *= scale);
        }
    }

    /// Rounds numbers of a piece of a row, and writes them with this scale: `values` becomes what a reader gets.
    pub fn write(
        &self,
        row: usize,
        col: usize,
        scale: Option<f32>,
        noise: Option<Noise>,
        values: &mut [f32],
        bytes: &mut [u8],
    ) {
        if let Some(scale) = scale {
            values.iter_mut().for_each(|v| *v /= scale);
        }
        self.stored.round(values, noise.map(|noise| noise.from(row * self.cols + col)));
        self.stored.narrow(values, bytes);
        if let Some(scale) = scale {
            values.iter_mut().for_each(|v| *v *= scale);
        }
    }
}

/// The old scale times the least power of two with which `largest` fits: numbers that do not change are then still there
/// to the bit, but for some that are next to zero.
pub(super) fn fresh_scale(old: f32, largest: f32, stored: Stored) -> f32 {
    let mut scale = old;
    while largest / scale > stored.max() && scale.is_finite() {
        scale *= 2.0;
    }
    scale
}

/// Writes a scale's values in its type.
pub(super) fn scale_bytes(stored: Stored, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * stored.size()];
    stored.narrow(values, &mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Stored; 4] =
        [Stored::Plain(Dtype::F16), Stored::Plain(Dtype::Bf16), Stored::E4m3, Stored::E5m2];

    /// Every number that a type has, but NaN and infinity; under Miri, which is slow, a few of those of 16 bits.
    fn numbers(stored: Stored) -> Vec<(Vec<u8>, f32)> {
        let count = 1usize << (8 * stored.size());
        let step = if cfg!(miri) && !stored.is_fp8() { 997 } else { 1 };
        let all = (0..count).step_by(step).map(|bits| {
            let bytes = (bits as u16).to_le_bytes()[..stored.size()].to_vec();
            let mut value = [0.0];
            stored.widen(&bytes, &mut value);
            (bytes, value[0])
        });
        all.filter(|(_, v)| v.is_finite()).collect()
    }

    #[test]
    fn what_a_type_has_comes_back_to_the_bit() {
        for stored in ALL {
            for noise in [None, Some(Noise::of("weight"))] {
                for (bytes, value) in numbers(stored) {
                    let (mut rounded, mut written) = ([value], vec![0; stored.size()]);
                    stored.round(&mut rounded, noise);
                    stored.narrow(&rounded, &mut written);
                    assert_eq!(rounded[0], value, "{} {bytes:?}", stored.name());
                    assert!(
                        written == bytes || value == 0.0,
                        "{} {value}: {bytes:?} {written:?}",
                        stored.name()
                    );
                }
            }
        }
    }

    #[test]
    fn the_nearest_is_found_and_ties_go_to_even() {
        // It takes neighbours, which Miri has no time for where there are many.
        for stored in ALL.into_iter().filter(|stored| stored.is_fp8() || !cfg!(miri)) {
            let mut all: Vec<f32> =
                numbers(stored).into_iter().map(|(_, v)| v).filter(|v| *v >= 0.0).collect();
            all.sort_by(f32::total_cmp);
            all.dedup();
            assert_eq!(all.last(), Some(&stored.max()), "{}", stored.name());
            for (i, pair) in all.windows(2).enumerate() {
                let middle = (f64::from(pair[0]) + f64::from(pair[1])) / 2.0;
                let tie = middle as f32;
                let even = if i % 2 == 0 { pair[0] } else { pair[1] };
                // The smallest numbers of bf16 lie too close for a tie to be a normal f32.
                for (value, expected) in
                    [(tie, even), (tie.next_down(), pair[0]), (tie.next_up(), pair[1]), (-tie, -even)]
                {
                    let mut rounded = [value];
                    stored.round(&mut rounded, None);
                    assert_eq!(rounded[0], expected, "{} {value:e}", stored.name());
                }
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "it takes a million numbers")]
    fn chance_is_fair_and_depends_on_the_name_alone() {
        for stored in ALL {
            let low = 1.0f32;
            let step = match stored {
                Stored::Plain(Dtype::F16) => 2f32.powi(-10),
                Stored::Plain(_) => 2f32.powi(-7),
                Stored::E4m3 => 0.125,
                Stored::E5m2 => 0.25,
            };
            let value = low + 0.3 * step;
            let mut values = vec![-value; 100_000];
            let noise = Noise::of("a.weight");
            stored.round(&mut values, Some(noise));
            let mut again = vec![-value; 50_000];
            stored.round(&mut again, Some(noise.from(50_000)));
            assert_eq!(values[50_000..], again);
            assert!(values.iter().all(|v| *v == -low || *v == -(low + step)), "{}", stored.name());
            let up = values.iter().filter(|v| **v != -low).count() as f64 / 1e5;
            assert!((up - 0.3).abs() < 0.006, "{}: {up}", stored.name());
            let mut other = vec![-value; 100_000];
            stored.round(&mut other, Some(Noise::of("b.weight")));
            assert_ne!(values, other);
        }
    }

    #[test]
    fn scales_grow_by_powers_of_two() {
        assert_eq!(fresh_scale(0.3, 448.0 * 0.3, Stored::E4m3), 0.3);
        assert_eq!(fresh_scale(0.3, 449.0 * 0.3, Stored::E4m3), 0.6);
        assert_eq!(fresh_scale(1.0, 448.0 * 5.0, Stored::E4m3), 8.0);
    }
}
