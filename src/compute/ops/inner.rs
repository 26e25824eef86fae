use rayon::prelude::*;

use super::project::{self, ProjectJob};
use super::{host, mismatch, same_count, view, view_mut};
use crate::compute::gpu::whole;
use crate::compute::{Batch, Device, Element, Shape};
use crate::{Dtype, Result};

/// `C = X·Yᵀ`: inner products of rows, summed in the device's tier.
///
/// `x[i]`: p × width, `y[i]`: q × width, both factors ([`Device::factor`]); result `i`: p × q of [`Device::sum`].
/// Products of f32 are exact, so the relative error is that of a sum of `width` terms in f64 or double-single.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) if widths differ.
pub fn inner(device: &Device, x: &Batch, y: &Batch) -> Result<Batch> {
    inner_as(device, x, y, device.sum())
}

/// [`inner`] with sums of another type: [`Device::product`], for long products that need no more.
///
/// # Errors
/// As of [`inner`].
pub fn inner_as(device: &Device, x: &Batch, y: &Batch, element: Element) -> Result<Batch> {
    same_count("inner", x, y)?;
    for (x, y) in x.shapes().iter().zip(y.shapes()) {
        if x.cols != y.cols {
            return Err(mismatch("inner", *x, *y));
        }
    }
    if device.is_gpu() && element == Element::Host {
        return inner(&Device::cpu(), &host(device, x)?, &host(device, y)?);
    }
    let shapes: Vec<_> = x.shapes().iter().zip(y.shapes()).map(|(x, y)| Shape::new(x.rows, y.rows)).collect();
    let mut c = Batch::unwritten(device, element, &shapes)?;
    if let Some(outputs) = c.host_mut() {
        outputs.into_par_iter().enumerate().for_each(|(i, c)| {
            faer::linalg::matmul::matmul(
                view_mut(c, shapes[i]),
                faer::Accum::Replace,
                view(x.host(i).unwrap_or_default(), x.shapes()[i]),
                view(y.host(i).unwrap_or_default(), y.shapes()[i]).transpose(),
                1.0,
                faer::Par::Seq,
            );
        });
        return Ok(c);
    }
    let jobs: Vec<_> = (0..x.len())
        .map(|i| ProjectJob {
            x: 0,
            x_word: x.offset(i),
            tokens: x.shapes()[i].rows,
            dtype: Dtype::F32,
            a: i,
            z: c.offset(i),
        })
        .collect();
    let gpu = device.gpu()?;
    let mut commands = gpu.commands();
    project::encode(&mut commands, gpu, &[whole(x.buffer()?)], &jobs, y, whole(c.buffer()?), c.element())?;
    commands.submit()?;
    Ok(c)
}
