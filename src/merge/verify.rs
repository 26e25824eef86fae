//! A watch for what no test foresaw: some layers of a merge, computed again on the CPU in f64.

use std::collections::BTreeSet;

use faer::Mat;
use web_time::Instant;

use super::engine::driver::{Only, Run};
use super::{Method, Plan, Truncation};
use crate::io::resting_on;
use crate::{Adapter, Control, Device, Error, Layer, LayerKey, RawMatrix, Result, SaveOptions, Weighted};

/// The most that a merge may be off what the CPU finds in f64, relative in the Frobenius norm, beside the rounding of its
/// factors to the file's type, unless its method [has another bound](Method::bound).
pub const VERIFIED: f64 = 1e-4;

/// What [`verify`] found.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Verified {
    /// Layers that were computed again.
    pub layers: usize,
    /// The most that one was off, relative to the norm of its update.
    pub worst: f64,
    /// Which one.
    pub layer: String,
    /// Wall time.
    pub seconds: f64,
}

/// Computes so many layers of a merge again, on the CPU in f64, and compares. They are spread evenly over the merge.
///
/// `merged`: the result, in memory or opened from its file; `truncation` and `options`: those that it was merged and written
/// with. Of a truncation the singular values must agree; where the last of them are alike, another choice of directions for
/// them is as good, and may differ by as much as they are large.
///
/// # Errors
/// [`Error::Layer`] for a layer that is missing or further off than [`Method::bound`] and the rounding of its factors; as of the
/// method's `merge_with`.
pub fn verify(
    method: &dyn Method,
    adapters: &[Weighted<'_>],
    merged: &Adapter,
    truncation: Truncation,
    options: &SaveOptions,
    layers: usize,
    control: &Control<'_>,
) -> Result<Verified> {
    let verified = verified(method, adapters, merged, truncation, options, layers, control);
    resting_on(verified, || merged.check_file())
}

fn verified(
    method: &dyn Method,
    adapters: &[Weighted<'_>],
    merged: &Adapter,
    truncation: Truncation,
    options: &SaveOptions,
    layers: usize,
    control: &Control<'_>,
) -> Result<Verified> {
    let start = Instant::now();
    let plan = Plan::new(adapters)?;
    let all = plan.layers();
    let chosen = layers.min(all.len());
    let keys: BTreeSet<&LayerKey> = (0..chosen).map(|i| &all[i * all.len() / chosen].key).collect();
    let control = Control { cancel: control.cancel, progress: None };
    let cpu = Device::cpu();
    let only = Only { layers: &keys, options };
    let run = Run { only: Some(only), truncation: truncation.into(), ..Run::new(&cpu, adapters, control) };
    let again = method.run(&run)?.adapter;
    let mut verified = Verified { layers: 0, worst: 0.0, layer: String::new(), seconds: 0.0 };
    for want in again.layers().iter().filter(|layer| keys.contains(&layer.key)) {
        control.check()?;
        let Some(got) = merged.layer(&want.key) else {
            // A name that is not known may be read as another one.
            if !want.is_known() {
                continue;
            }
            let reason = format!("is missing in {}; {BUG}", merged.path().display());
            return Err(Error::layer(want.name(), reason));
        };
        let off = compare(&got.unread(), want, !truncation.is_none(), method.bound())?;
        if off > verified.worst || verified.layers == 0 {
            (verified.worst, verified.layer) = (off, want.name());
        }
        verified.layers += 1;
    }
    verified.seconds = start.elapsed().as_secs_f64();
    Ok(verified)
}

const BUG: &str = "this is an error of the program or of the GPU's driver: please report it, with what `loraweld devices` says";

/// How far one update is off the other, relative to the other's norm.
fn compare(got: &Layer, want: &Layer, truncated: bool, bound: f64) -> Result<f64> {
    let fail = |reason: String| Err(Error::layer(want.name(), reason));
    if (got.input, got.output) != (want.input, want.output) {
        return fail(format!(
            "is {} x {} in the merge, but should be {} x {}; {BUG}",
            got.output, got.input, want.output, want.input
        ));
    }
    let (mine, theirs) = (Core::new(&[(got, 1.0)]), Core::new(&[(want, 1.0)]));
    let difference = Core::new(&[(got, 1.0), (want, -1.0)]);
    let (norm, off) = (theirs.norm(), difference.norm());
    let relative = if off == 0.0 { 0.0 } else { off / norm.max(f64::MIN_POSITIVE) };
    let rounding = rounding(got);
    // NaN is not smaller.
    if off <= bound * norm + rounding {
        return Ok(relative);
    }
    // What is cut off where singular values are alike is a matter of chance.
    let (s, t) = (mine.singular_values(), theirs.singular_values());
    let (most, last) = (t.first().copied().unwrap_or(0.0), significant_last(&t));
    let apart = |i: usize| {
        let of = |values: &[f64]| values.get(i).copied().unwrap_or(0.0);
        (of(&s) - of(&t)).abs()
    };
    let places = 0..s.len().max(t.len());
    let alike = places.clone().all(|i| apart(i) <= bound * most + rounding);
    let largest = difference.singular_values().first().copied().unwrap_or(f64::NAN);
    let may_differ = truncated || got.rank < got.input.min(got.output);
    if may_differ && alike && largest <= 2.0 * last + bound * most + rounding {
        // Then singular values tell how far it is off.
        let worst = places.map(apart).fold(0.0, f64::max);
        return Ok(worst / most.max(f64::MIN_POSITIVE));
    }
    fail(format!(
        "the merge is {relative:.1e} off what the CPU finds in f64, relative to the update's norm of {norm:.3e}; at most \
         {bound:.0e} and a rounding of {:.1e} is promised; {BUG}",
        rounding / norm
    ))
}

/// The smallest of the descending singular values that is no rounding error of zero.
fn significant_last(values: &[f64]) -> f64 {
    let least = values.first().copied().unwrap_or(0.0) * 1e-6;
    values.iter().copied().rfind(|v| *v > least).unwrap_or(0.0)
}

/// What rounding the factors to their types may do to the update: `‖δB·A‖ + ‖B·δA‖`.
fn rounding(layer: &Layer) -> f64 {
    let norm = |m: RawMatrix<'_>| m.to_vec::<f64>().iter().map(|v| v * v).sum::<f64>().sqrt();
    let error = |m: RawMatrix<'_>, norm: f64| {
        let (relative, least) = match m.dtype() {
            crate::Dtype::F32 => (2f64.powi(-24), 2f64.powi(-150)),
            crate::Dtype::F16 => (2f64.powi(-11), 2f64.powi(-25)),
            crate::Dtype::Bf16 => (2f64.powi(-8), 2f64.powi(-134)),
        };
        relative * norm + least * ((m.rows() * m.cols()) as f64).sqrt()
    };
    let (a, b) = (norm(layer.a()), norm(layer.b()));
    layer.scale.value.abs() * (error(layer.b(), b) * a + b * error(layer.a(), a))
}

/// A sum of updates without what is orthogonal in it: `R_B · R_Aᵀ` of `[s·B …] = Q_B·R_B` and `[Aᵀ …] = Q_A·R_A`.
struct Core(Mat<f64>);

impl Core {
    fn new(terms: &[(&Layer, f64)]) -> Self {
        let rank: usize = terms.iter().map(|(layer, _)| layer.rank).sum();
        let (input, output) = (terms[0].0.input, terms[0].0.output);
        let (mut a, mut b) = (Mat::zeros(input, rank), Mat::zeros(output, rank));
        let mut start = 0;
        for (layer, sign) in terms {
            let (own_a, own_b): (Vec<f64>, Vec<f64>) = (layer.a().to_vec(), layer.b().to_vec());
            for k in 0..layer.rank {
                (0..input).for_each(|i| a[(i, start + k)] = own_a[k * input + i]);
                let of = |i: usize| sign * layer.scale.value * own_b[i * layer.rank + k];
                (0..output).for_each(|i| b[(i, start + k)] = of(i));
            }
            start += layer.rank;
        }
        let (a, b) = (a.qr(), b.qr());
        Self(b.thin_R() * a.thin_R().transpose())
    }

    fn norm(&self) -> f64 {
        self.0.norm_l2()
    }

    /// Descending; none if they cannot be found.
    fn singular_values(&self) -> Vec<f64> {
        self.0.singular_values().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Format, Linear, Matrix, SvdMerge};

    fn adapter(name: &str, seed: u32) -> Adapter {
        let mut state = seed;
        let mut matrix = |rows, cols| {
            Matrix::from_fn(rows, cols, |_, _| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
        };
        let mut layer = |name: &str| Layer::new(name, matrix(3, 10), matrix(12, 3)).unwrap();
        Adapter::new(name, Format::Peft, ["x.0", "x.1", "x.2"].map(&mut layer).to_vec()).unwrap()
    }

    fn checked(
        method: &dyn Method,
        merged: &Adapter,
        with: &[Weighted<'_>],
        layers: usize,
    ) -> Result<Verified> {
        let options = SaveOptions::default();
        verify(method, with, merged, Truncation::default(), &options, layers, &Control::default())
    }

    #[test]
    fn what_is_right_passes_and_what_is_wrong_does_not() {
        let (x, y) = (adapter("x", 1), adapter("y", 2));
        let with = [x.at(1.0), y.at(-0.5)];
        for method in [&Linear as &dyn Method, &SvdMerge::new(Truncation::rank(4))] {
            let merged = method.merge_any(&Device::cpu(), &with, Control::default()).unwrap().adapter;
            let verified = checked(method, &merged, &with, 2).unwrap();
            assert_eq!((verified.layers, verified.worst < 1e-6), (2, true), "{verified:?}");
            for (factor, layer) in [(1.001, 0), (f64::NAN, 1), (0.0, 2), (-1.0, 0), (1e20, 1)] {
                let mut layers = merged.layers().to_vec();
                layers[layer] = layers[layer].with_scale(layers[layer].scale().value * factor);
                let wrong = Adapter::new("wrong", Format::Peft, layers).unwrap();
                let error = checked(method, &wrong, &with, 3).unwrap_err().to_string();
                assert!(error.contains("off what the CPU finds"), "{factor}: {error}");
            }
            let fewer = Adapter::new("fewer", Format::Peft, merged.layers()[..2].to_vec()).unwrap();
            assert_eq!(
                checked(method, &fewer, &with, 3).map(|v| v.layers).ok(),
                Some(2),
                "its name is not known"
            );
        }
    }

    #[test]
    fn equal_singular_values_may_be_cut_either_way() {
        let eye = |from: usize| {
            let of = |n: usize, i: usize, k: usize| f32::from(u8::from(i < n && i == k + from));
            (Matrix::from_fn(2, 6, |k, i| of(6, i, k)), Matrix::from_fn(6, 2, |i, k| of(6, i, k)))
        };
        let layer = |from| Layer::new("x.0", eye(from).0, eye(from).1).unwrap();
        assert!(compare(&layer(0), &layer(2), true, VERIFIED).is_ok());
        assert!(compare(&layer(0).with_scale(1.1), &layer(2), true, VERIFIED).is_err());
    }
}
