use bytemuck::NoUninit;
use rayon::prelude::*;

use super::{mismatch, same_count, view, view_mut};
use crate::Result;
use crate::compute::gpu::{Work, whole};
use crate::compute::shaders::Kernel;
use crate::compute::{Batch, Device, Shape};

/// `C = B·R`: the merged B from the concatenated B and the router.
///
/// `b[i]`: rows × inner, `r[i]`: inner × cols, result `i`: rows × cols. B and C are factors
/// ([`Device::factor`]); sums are of R's element type.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) if shapes differ.
pub fn matmul(device: &Device, b: &Batch, r: &Batch) -> Result<Batch> {
    same_count("matmul", b, r)?;
    for (b, r) in b.shapes().iter().zip(r.shapes()) {
        if b.cols != r.rows {
            return Err(mismatch("matmul", *b, *r));
        }
    }
    let shapes: Vec<_> = b.shapes().iter().zip(r.shapes()).map(|(b, r)| Shape::new(b.rows, r.cols)).collect();
    let mut c = Batch::unwritten(device, device.factor(), &shapes)?;
    if let Some(outputs) = c.host_mut() {
        outputs.into_par_iter().enumerate().for_each(|(i, c)| {
            matmul_cpu(
                b.host(i).unwrap_or_default(),
                r.host(i).unwrap_or_default(),
                c,
                b.shapes()[i],
                shapes[i],
            );
        });
        return Ok(c);
    }
    let gpu = device.gpu()?;
    let table: Vec<_> = (0..b.len())
        .map(|i| Job {
            b: b.offset(i) as u32,
            r: r.offset(i) as u32,
            c: c.offset(i) as u32,
            rows: shapes[i].rows as u32,
            inner: b.shapes()[i].cols as u32,
            cols: shapes[i].cols as u32,
        })
        .collect();
    let work: Vec<Work> = table
        .iter()
        .enumerate()
        .flat_map(|(i, job)| {
            (0..job.rows.div_ceil(TILE))
                .flat_map(move |row| (0..job.cols.div_ceil(TILE)).map(move |c| [i as u32, row, c, 0]))
        })
        .collect();
    let buffers = [whole(b.buffer()?), whole(r.buffer()?), whole(c.buffer()?)];
    let mut commands = gpu.commands();
    commands.launch(Kernel::Matmul(r.element()), &table, &work, &buffers);
    commands.submit()?;
    Ok(c)
}

/// Side of a tile, as in the shader.
const TILE: u32 = 64;

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct Job {
    b: u32,
    r: u32,
    c: u32,
    rows: u32,
    inner: u32,
    cols: u32,
}

/// The CPU twin for one matrix.
fn matmul_cpu(b: &[f64], r: &[f64], c: &mut [f64], b_shape: Shape, c_shape: Shape) {
    if c_shape.is_empty() {
        return;
    }
    faer::linalg::matmul::matmul(
        view_mut(c, c_shape),
        faer::Accum::Replace,
        view(b, b_shape),
        view(r, Shape::new(b_shape.cols, c_shape.cols)),
        1.0,
        faer::Par::Seq,
    );
}
