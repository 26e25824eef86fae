use super::{gemm, mismatch, same_count, view_mut};
use crate::Result;
use crate::compute::batch::{ANY, FACTOR, Operands};
use crate::compute::gpu::Work;
use crate::compute::shaders::{Declared, Kernel, job};
use crate::compute::{Batch, Device, Element, Shape};

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
    let (gpu, [b, r]) = match Operands::of("matmul", device, [(b, FACTOR), (r, ANY)])? {
        Operands::Gpu(gpu, operands) => (gpu, operands),
        Operands::Host([b, r]) => {
            return Batch::made_on_host(&shapes, |i, c| {
                gemm(view_mut(c, shapes[i]), faer::Accum::Replace, 1.0, b.matrix(i), r.matrix(i));
            });
        }
    };
    let c = Batch::unwritten(device, device.factor(), &shapes)?;
    let table: Vec<_> = (0..shapes.len())
        .map(|i| Job {
            b: b.offset(i),
            r: r.offset(i),
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
            (0..job.rows.div_ceil(ROWS))
                .flat_map(move |row| (0..job.cols.div_ceil(COLUMNS)).map(move |c| [i as u32, row, c, 0]))
        })
        .collect();
    let mut commands = gpu.commands();
    commands.launch(kernel(r.element()), &table, &work, &[b.binding(), r.binding(), c.binding()?])?;
    commands.submit()?;
    Ok(c)
}

/// A tile of C.
const ROWS: u32 = 64;
const COLUMNS: u32 = 64;

job! {
    struct Job {
        b: u32,
        r: u32,
        c: u32,
        rows: u32,
        inner: u32,
        cols: u32,
    }
}

fn kernel(sums: Element) -> Kernel {
    Kernel::new("matmul").real(sums)
}

pub(super) fn declared() -> Declared {
    Declared::new::<Job>(ANY.iter().map(|&sums| kernel(sums)))
        .constant("ROWS", ROWS)
        .constant("COLUMNS", COLUMNS)
}
