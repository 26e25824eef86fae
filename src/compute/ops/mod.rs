//! The operations, each one a shader, its launcher and an f64 CPU twin, under one name.
//!
//! All work on batches of mixed shapes. The element type of a batch says where it lives and so which side
//! computes; see [`Device::product`](super::Device::product) and [`Device::sum`](super::Device::sum).

mod accumulate;
mod activations;
mod blend;
pub(crate) mod branches;
pub(crate) mod cholesky;
mod cholesky_solve;
mod cosine;
mod entries;
mod extrapolate;
mod gradient_step;
mod gram;
mod inner;
mod jacobi_svd;
mod matmul;
mod project;
mod project_off;
mod qr;
mod rank_concat;
mod rank_update;
mod rows;
mod stacks;

pub use accumulate::accumulate;
pub use activations::Activations;
pub(crate) use blend::{Blend, BlendJob, blend_cpu};
pub use branches::Score;
pub use cholesky::{PivotFailure, cholesky};
pub use cholesky_solve::{cholesky_solve, solve};
pub(crate) use cosine::{CosineJob, cosine_cpu};
pub(crate) use entries::identity;
pub use entries::{BUCKETS, Check, Counted, EntryMember, EntryMerger, EntryRule, Tally, Window};
pub(crate) use extrapolate::{ExtrapolateJob, extrapolate_cpu};
pub(crate) use gradient_step::{GradientJob, gradient_step_cpu};
pub use gram::gram;
pub(crate) use gram::gram_bytes;
pub use inner::{inner, inner_as};
pub use jacobi_svd::{Svd, jacobi_svd};
pub use matmul::matmul;
pub(crate) use project::product_bytes;
pub use project::project;
pub use project_off::{ProjectedOff, project_off};
pub use qr::{Qr, qr, qr_l};
pub use rank_concat::{Axis, Factor, rank_concat};
pub use rank_update::rank_update;
pub use rows::{ScaledRows, Side};
pub use stacks::{Root, Stacks};

use super::shaders::{Declared, Kernel};
use super::{Batch, Device, Element, Shape};
use crate::{Error, Matrix, Result};

/// The kernels of all operations.
pub(super) fn declared() -> Vec<Declared> {
    let mut all = vec![
        blend::declared(),
        cholesky::declared(),
        cholesky_solve::declared(),
        cosine::declared(),
        extrapolate::declared(),
        jacobi_svd::declared(),
        matmul::declared(),
        rank_concat::declared(),
        rank_update::declared(),
        rows::declared(),
    ];
    all.extend(branches::declared());
    all.extend(entries::declared());
    all.extend(gradient_step::declared());
    all.extend(gram::declared());
    all.extend(project::declared());
    all
}

/// The kernels of [`Stacks`], [`qr`] and [`jacobi_svd`] with sums of this type.
pub(super) fn algebra_kernels(sums: Element) -> [Kernel; 4] {
    [jacobi_svd::kernel(sums), project::real_kernel(sums), rank_update::kernel(sums), rows::kernel()]
}

/// The types that activations and factors come in.
const DTYPES: [crate::Dtype; 3] = [crate::Dtype::F32, crate::Dtype::F16, crate::Dtype::Bf16];

/// Workgroups that fill a large GPU; tiles are split until there are so many. More parts would only be more to
/// write and add.
const ENOUGH_WORKGROUPS: usize = 320;

/// Loop iterations that one invocation may make, all its loops together: lavapipe leaves every loop, without
/// a word, after 65,535 (Mesa 22.3, 25.0), and a driver's watchdog should stay calm. Longer work is cut into
/// several launches.
const MAX_ITERATIONS: usize = 32768;

/// Cuts `0..costs.len()` into ranges that cost at most [`MAX_ITERATIONS`] each, a single one aside.
fn cut(costs: impl IntoIterator<Item = usize>) -> Vec<std::ops::Range<u32>> {
    let mut ranges: Vec<std::ops::Range<u32>> = Vec::new();
    let mut spent = 0;
    for (i, cost) in (0..).zip(costs) {
        match ranges.last_mut() {
            Some(range) if spent + cost <= MAX_ITERATIONS => range.end = i + 1,
            _ => {
                ranges.push(i..i + 1);
                spent = 0;
            }
        }
        spent += cost;
    }
    ranges
}

/// The code that shaders/shared/words.wgsl gives a type.
pub(super) fn dtype_code(dtype: crate::Dtype) -> u32 {
    match dtype {
        crate::Dtype::F32 => 0,
        crate::Dtype::F16 => 1,
        crate::Dtype::Bf16 => 2,
    }
}

/// An error for shapes that do not fit, in the words of the operation.
fn mismatch(what: &str, a: Shape, b: Shape) -> Error {
    Error::Invalid(format!("{what}: {} x {} does not go with {} x {}", a.rows, a.cols, b.rows, b.cols))
}

/// Checks that two batches have as many matrices.
fn same_count(what: &str, a: &Batch, b: &Batch) -> Result<()> {
    match a.len() == b.len() {
        true => Ok(()),
        false => Err(Error::Invalid(format!("{what}: {} matrices do not go with {}", a.len(), b.len()))),
    }
}

/// A row-major slice as a faer view.
fn view(data: &[f64], shape: Shape) -> faer::MatRef<'_, f64> {
    faer::MatRef::from_row_major_slice(data, shape.rows, shape.cols)
}

/// A row-major slice as a faer view to write to.
fn view_mut(data: &mut [f64], shape: Shape) -> faer::MatMut<'_, f64> {
    faer::MatMut::from_row_major_slice_mut(data, shape.rows, shape.cols)
}

/// `C = scale·A·B`, or with [`Accum::Add`](faer::Accum) `C += scale·A·B`, on one thread: operations work on matrices side
/// by side.
fn gemm(
    c: faer::MatMut<'_, f64>,
    accum: faer::Accum,
    scale: f64,
    a: faer::MatRef<'_, f64>,
    b: faer::MatRef<'_, f64>,
) {
    faer::linalg::matmul::matmul(c, accum, a, b, scale, faer::Par::Seq);
}

/// A copy on the CPU of a batch of a device that has no tier of full precision, for the CPU to compute with.
fn host(device: &Device, batch: &Batch) -> Result<Batch> {
    Batch::upload(&Device::cpu(), Element::Host, &batch.download(device)?)
}

/// Small matrices in full precision, where it is to be had: on the device, else on the host.
pub(crate) fn small(device: &Device, matrices: &[Matrix]) -> Result<Batch> {
    match device.sum() {
        Element::Host => Batch::upload(&Device::cpu(), Element::Host, matrices),
        element => Batch::upload(device, element, matrices),
    }
}
