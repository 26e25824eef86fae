use super::project::{self, Arithmetic, ProjectJob};
use super::{gemm, host, mismatch, same_count, view_mut};
use crate::compute::batch::{FACTOR, Operands};
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
/// Those of [`inner`].
pub fn inner_as(device: &Device, x: &Batch, y: &Batch, element: Element) -> Result<Batch> {
    same_count("inner", x, y)?;
    for (x, y) in x.shapes().iter().zip(y.shapes()) {
        if x.cols != y.cols {
            return Err(mismatch("inner", *x, *y));
        }
    }
    let shapes: Vec<_> = x.shapes().iter().zip(y.shapes()).map(|(x, y)| Shape::new(x.rows, y.rows)).collect();
    let (gpu, [rows, _]) = match Operands::of("inner", device, [(x, FACTOR), (y, FACTOR)])? {
        Operands::Gpu(..) if element == Element::Host => {
            return inner(&Device::cpu(), &host(device, x)?, &host(device, y)?);
        }
        Operands::Gpu(gpu, operands) => (gpu, operands),
        Operands::Host([x, y]) => {
            return Batch::made_on_host(&shapes, |i, c| {
                let c = view_mut(c, shapes[i]);
                gemm(c, faer::Accum::Replace, 1.0, x.matrix(i), y.matrix(i).transpose());
            });
        }
    };
    let c = Batch::unwritten(device, element, &shapes)?;
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
    let mut commands = gpu.commands();
    let arithmetic = Arithmetic::of(c.element(), device.precision().of_others());
    project::encode(&mut commands, gpu, &[rows.binding()], &jobs, y, c.binding()?, arithmetic)?;
    commands.submit()?;
    Ok(c)
}
