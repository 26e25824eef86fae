use super::{gemm, host, mismatch, same_count, view_mut};
use crate::Result;
use crate::compute::batch::{ANY, FACTOR, Operands};
use crate::compute::gpu::Work;
use crate::compute::shaders::{Declared, Kernel, job};
use crate::compute::{Batch, Device, Element, Shape};

/// `C = A + S·M`, or `C = S·M` without A: combinations of the few long rows of M.
///
/// `a[i]`: rows × cols, `s[i]`: rows × inner, `m[i]`: inner × cols. A, M and C are factors
/// ([`Device::factor`]); sums are of S's element type, so C is rounded once.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) if shapes differ.
pub fn rank_update(device: &Device, a: Option<&Batch>, s: &Batch, m: &Batch) -> Result<Batch> {
    same_count("rank_update", s, m)?;
    for (s, m) in s.shapes().iter().zip(m.shapes()) {
        if s.cols != m.rows {
            return Err(mismatch("rank_update", *s, *m));
        }
    }
    let shapes: Vec<_> = s.shapes().iter().zip(m.shapes()).map(|(s, m)| Shape::new(s.rows, m.cols)).collect();
    if let Some(a) = a {
        same_count("rank_update", a, s)?;
        if let Some((a, c)) = a.shapes().iter().zip(&shapes).find(|(a, c)| a != c) {
            return Err(mismatch("rank_update", *a, *c));
        }
    }
    if device.is_gpu() && s.element() == Element::Host {
        let a = a.map(|a| host(device, a)).transpose()?;
        let c = rank_update(&Device::cpu(), a.as_ref(), s, &host(device, m)?)?;
        return Batch::upload(device, device.factor(), &c.download(device)?);
    }
    // Without A, M stands in its place, for a kernel that does not read it.
    let operands = Operands::of("rank_update", device, [(a.unwrap_or(m), FACTOR), (s, ANY), (m, FACTOR)])?;
    let add = a.is_some();
    let (gpu, [a, s, m]) = match operands {
        Operands::Gpu(gpu, operands) => (gpu, operands),
        Operands::Host([a, s, m]) => {
            return Batch::made_on_host(&shapes, |i, c| {
                if add {
                    c.copy_from_slice(a.values(i));
                }
                gemm(view_mut(c, shapes[i]), faer::Accum::Add, 1.0, s.matrix(i), m.matrix(i));
            });
        }
    };
    let c = Batch::unwritten(device, device.factor(), &shapes)?;
    let table: Vec<_> = (0..c.len())
        .map(|i| Job {
            add: u32::from(add),
            a: if add { a.offset(i) } else { 0 },
            s: s.offset(i),
            m: m.offset(i),
            c: c.offset(i) as u32,
            rows: shapes[i].rows as u32,
            inner: s.shapes()[i].cols as u32,
            cols: shapes[i].cols as u32,
        })
        .collect();
    let work: Vec<Work> = (0..)
        .zip(&table)
        .flat_map(|(i, job)| {
            (0..job.rows.div_ceil(ROWS))
                .flat_map(move |row| (0..job.cols.div_ceil(COLUMNS)).map(move |column| [i, row, column, 0]))
        })
        .collect();
    let buffers = [a.binding(), s.binding(), m.binding(), c.binding()?];
    let mut commands = gpu.commands();
    commands.launch(kernel(s.element()), &table, &work, &buffers)?;
    commands.submit()?;
    Ok(c)
}

/// A tile of C.
const ROWS: u32 = 32;
const COLUMNS: u32 = 64;

job! {
    struct Job {
        add: u32,
        a: u32,
        s: u32,
        m: u32,
        c: u32,
        rows: u32,
        inner: u32,
        cols: u32,
    }
}

pub(super) fn kernel(sums: Element) -> Kernel {
    Kernel::new("rank_update").real(sums)
}

pub(super) fn declared() -> Declared {
    Declared::new::<Job>(ANY.iter().map(|&sums| kernel(sums)))
        .constant("ROWS", ROWS)
        .constant("COLUMNS", COLUMNS)
}
