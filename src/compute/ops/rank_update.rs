use bytemuck::NoUninit;
use rayon::prelude::*;

use super::{host, mismatch, same_count, view, view_mut};
use crate::Result;
use crate::compute::gpu::{Work, whole};
use crate::compute::shaders::Kernel;
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
    let mut c = Batch::unwritten(device, device.factor(), &shapes)?;
    if let Some(outputs) = c.host_mut() {
        outputs.into_par_iter().enumerate().for_each(|(i, c)| {
            let (s_shape, m_shape) = (s.shapes()[i], m.shapes()[i]);
            if let Some(a) = a {
                c.copy_from_slice(a.host(i).unwrap_or_default());
            }
            faer::linalg::matmul::matmul(
                view_mut(c, shapes[i]),
                faer::Accum::Add,
                view(s.host(i).unwrap_or_default(), s_shape),
                view(m.host(i).unwrap_or_default(), m_shape),
                1.0,
                faer::Par::Seq,
            );
        });
        return Ok(c);
    }
    let table: Vec<_> = (0..c.len())
        .map(|i| Job {
            add: u32::from(a.is_some()),
            a: a.map_or(0, |a| a.offset(i)) as u32,
            s: s.offset(i) as u32,
            m: m.offset(i) as u32,
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
    let gpu = device.gpu()?;
    let buffers =
        [whole(a.unwrap_or(m).buffer()?), whole(s.buffer()?), whole(m.buffer()?), whole(c.buffer()?)];
    let mut commands = gpu.commands();
    commands.launch(Kernel::RankUpdate(s.element()), &table, &work, &buffers);
    commands.submit()?;
    Ok(c)
}

/// A tile of C: `ROWS` and `COLUMNS` of the shader.
const ROWS: u32 = 32;
const COLUMNS: u32 = 64;

#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
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
