use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rayon::prelude::*;

use super::activations::Bound;
use super::gram::{self, GramJob, Pending, gram_cpu};
use super::project::{self, Arithmetic, ProjectJob, X_ALIGN, product_bytes, project_cpu};
use super::{Activations, mismatch, same_count};
use crate::compute::batch::{FACTOR, OnHost, Operands};
use crate::compute::gpu::{Commands, Gpu, Pooled, whole};
use crate::compute::{Batch, Device, Element, Shape};
use crate::{Error, Result};

/// `S += (X·Aᵀ)ᵀ(X·Aᵀ)`: `project` and `gram` in one, with Z never at full
/// length: activations go through in windows that fit the device.
///
/// `inputs`: activations (tokens × width) and the index of the A (rank × width) and S (rank × rank) that
/// they go with. Precision as of the two operations, or less by [`Precision::Fast`](crate::Precision::Fast); results do not depend on how inputs are grouped into
/// calls beyond rounding.
///
/// # Errors
/// [`Error::Invalid`] if shapes differ.
pub fn accumulate(
    device: &Device,
    inputs: &[(usize, Activations)],
    a: &Batch,
    sums: &mut Batch,
) -> Result<()> {
    same_count("accumulate", a, sums)?;
    for (i, x) in inputs {
        let Some(shape) = a.shapes().get(*i) else {
            return Err(Error::Invalid(format!("accumulate: there is no A number {i}")));
        };
        if x.shape().cols != shape.cols {
            return Err(mismatch("accumulate", x.shape(), *shape));
        }
        if sums.shapes()[*i] != Shape::new(shape.rows, shape.rows) {
            return Err(mismatch("accumulate", *shape, sums.shapes()[*i]));
        }
    }
    for (_, x) in inputs {
        x.check("an input")?;
    }
    match Operands::of("accumulate", device, [(a, FACTOR)])? {
        Operands::Gpu(..) => accumulate_gpu(device, inputs, a, sums),
        Operands::Host([a]) => accumulate_cpu(inputs, a, sums),
    }
}

/// Rows of a block on the CPU: large enough for fast products, small enough for the cache.
const CPU_ROWS: usize = 256;

fn accumulate_cpu<'a>(inputs: &[(usize, Activations<'a>)], a: OnHost<'_>, sums: &mut Batch) -> Result<()> {
    let on_host = |(i, x): &(usize, Activations<'a>)| match x {
        Activations::Host(x) => Ok((*i, *x)),
        Activations::Buffer { .. } => {
            Err(Error::Device("activations in a GPU's buffer were given to the CPU".into()))
        }
    };
    let inputs = inputs.iter().map(on_host).collect::<Result<Vec<_>>>()?;
    let shapes = sums.shapes().to_vec();
    let mut sums = sums.host_mut()?;
    for (i, x) in inputs {
        let (a, n, sum) = (a.values(i), shapes[i].rows, &mut sums[i]);
        if sum.is_empty() {
            continue;
        }
        // A fixed number of blocks at a time, added in their order: deterministic on any number of threads.
        let blocks: Vec<_> = (0..x.rows()).step_by(CPU_ROWS).collect();
        for group in blocks.chunks(16) {
            let partial: Vec<Vec<f64>> = group
                .par_iter()
                .map(|&first| {
                    let block = x.row_range(first, (first + CPU_ROWS).min(x.rows()));
                    let mut z = vec![0.0; block.rows() * n];
                    project_cpu(block, a, &mut z);
                    let mut g = vec![0.0; n * n];
                    gram_cpu(&z, Shape::new(block.rows(), n), &mut g);
                    g
                })
                .collect();
            for g in partial {
                sum.iter_mut().zip(g).for_each(|(s, g)| *s += g);
            }
        }
    }
    Ok(())
}

/// Tokens of one input that go through at a time.
struct Window<'a> {
    index: usize,
    input: Activations<'a>,
    first: usize,
    tokens: usize,
}

fn accumulate_gpu(
    device: &Device,
    inputs: &[(usize, Activations)],
    a: &Batch,
    sums: &mut Batch,
) -> Result<()> {
    // Inputs, products and partial sums take so much each.
    let limit = device.gpu()?.max_arena().min(device.memory() / 12);
    let mut windows = Vec::new();
    for &(index, input) in inputs {
        let shape = input.shape();
        let row = input.row_bytes() as u64;
        let z_row = (product_bytes(256, a.shapes()[index].rows) / 256) as u64;
        let rows = (limit / row.max(z_row).max(1)).clamp(1, 16384) as usize;
        // An even number of rows keeps windows of halves on whole words.
        let rows = if rows > 1 { rows & !1 } else { rows };
        for first in (0..shape.rows).step_by(rows) {
            windows.push(Window { index, input, first, tokens: rows.min(shape.rows - first) });
        }
    }
    // Windows share launches, and those of the host uploads, within what one binding holds of X, Z and partial sums. Each
    // group adds to a sum at most once, since its additions run at once.
    let mut groups: Vec<Vec<Window>> = Vec::new();
    let mut seen = HashSet::new();
    let mut spent = [0; 3];
    for window in windows {
        let on_host = matches!(window.input, Activations::Host(_));
        let rank = a.shapes()[window.index].rows;
        let x = if on_host { x_bytes(&window) } else { 0 };
        // Matrix units also want A in halves.
        let z = product_bytes(window.tokens, rank) + 4 * rank * window.input.shape().cols;
        let cost = [x, z, gram::partial_len(window.tokens, rank, 1) * 8].map(|bytes| bytes as u64);
        let alike = |group: &Vec<Window>| matches!(group[0].input, Activations::Host(_)) == on_host;
        let joins = groups.last().is_some_and(alike)
            && spent.iter().zip(cost).all(|(spent, cost)| spent + cost <= limit)
            && !seen.contains(&window.index);
        if !joins {
            groups.push(Vec::new());
            seen.clear();
            spent = [0; 3];
        }
        seen.insert(window.index);
        spent.iter_mut().zip(cost).for_each(|(spent, cost)| *spent += cost);
        if let Some(group) = groups.last_mut() {
            group.push(window);
        }
    }
    let gpu = device.gpu()?;
    let mut commands = gpu.commands();
    for group in &groups {
        let (upload, pending) = record(device, &mut commands, group, a, sums)?;
        // An upload is not ordered with launches that are only recorded, and scratch is kept until submission.
        if upload.is_some() || pending.is_some() || commands.kept_bytes() > limit {
            std::mem::replace(&mut commands, gpu.commands()).submit()?;
        }
        if let Some(pending) = pending {
            pending.finish(gpu, sums)?;
        }
    }
    commands.submit()
}

/// Bytes that a window of the host's takes in an upload.
fn x_bytes(window: &Window) -> usize {
    (window.tokens * window.input.row_bytes()).next_multiple_of(X_ALIGN)
}

/// Records one group; also gives what it uploaded and what the host has to add after submission.
fn record(
    device: &Device,
    commands: &mut Commands<'_>,
    group: &[Window],
    a: &Batch,
    sums: &Batch,
) -> Result<(Option<Pooled>, Option<Pending>)> {
    let gpu = device.gpu()?;
    let element = match device.product() {
        Element::Host => Element::F32,
        element => element,
    };
    let mut inputs = Inputs::default();
    let (mut project_jobs, mut gram_jobs) = (Vec::new(), Vec::new());
    let mut z_len = 0;
    for window in group {
        let shape = a.shapes()[window.index];
        let (x, x_word) = inputs.place(gpu, window)?;
        project_jobs.push(ProjectJob {
            x,
            x_word,
            tokens: window.tokens,
            dtype: window.input.dtype(),
            a: window.index,
            z: z_len,
        });
        gram_jobs.push(GramJob { z: z_len, tokens: window.tokens, rank: shape.rows, sum: window.index });
        // Vectors of 4 are loaded from it.
        z_len += (window.tokens * shape.rows).next_multiple_of(4);
    }
    let z = gpu.scratch(z_len as u64 * element.bytes())?;
    let upload = inputs.upload(gpu)?;
    let x = match &upload {
        Some(upload) => vec![whole(upload)],
        None => inputs.buffers,
    };
    let arithmetic = Arithmetic::of(element, device.precision());
    project::encode(commands, gpu, &x, &project_jobs, a, whole(&z), arithmetic)?;
    let pending = gram::encode(commands, device, device.precision(), whole(&z), element, &gram_jobs, sums)?;
    commands.keep(z);
    Ok((upload, pending))
}

/// What a group reads: windows of the host in one upload, or ranges of buffers. Layers that read the same input (q, k, v)
/// share it.
#[derive(Default)]
struct Inputs<'a> {
    buffers: Vec<wgpu::BufferBinding<'a>>,
    /// Windows of the host, by address and length, with their byte in the upload.
    host: HashMap<(*const u8, usize), usize>,
    pieces: Vec<(usize, &'a [u8])>,
    bytes: usize,
}

impl<'a> Inputs<'a> {
    /// The binding of a window, and its first word there.
    fn place(&mut self, gpu: &Gpu, window: &Window<'a>) -> Result<(usize, usize)> {
        let rows = window.first..window.first + window.tokens;
        if let Activations::Host(matrix) = window.input {
            let bytes = matrix.row_range(rows.start, rows.end).bytes();
            let next = self.bytes;
            let place = *self.host.entry((bytes.as_ptr(), bytes.len())).or_insert(next);
            if place == next {
                self.pieces.push((place, bytes));
                self.bytes += x_bytes(window);
            }
            return Ok((0, place / 4));
        }
        let Bound { binding, word } = window.input.bind("an input", rows, gpu.max_arena())?;
        let same = |known: &wgpu::BufferBinding<'_>| {
            (known.buffer, known.offset, known.size) == (binding.buffer, binding.offset, binding.size)
        };
        let known = self.buffers.iter().position(same);
        let x = known.unwrap_or_else(|| {
            self.buffers.push(binding);
            self.buffers.len() - 1
        });
        Ok((x, word))
    }

    /// Uploads the windows of the host.
    fn upload(&self, gpu: &Arc<Gpu>) -> Result<Option<Pooled>> {
        if self.pieces.is_empty() {
            return Ok(None);
        }
        let upload = gpu.scratch(self.bytes as u64)?;
        for &(place, bytes) in &self.pieces {
            let whole_words = bytes.len() & !3;
            gpu.write(&upload, place as u64, &bytes[..whole_words])?;
            if whole_words < bytes.len() {
                let last = [bytes[whole_words], bytes[whole_words + 1], 0, 0];
                gpu.write(&upload, (place + whole_words) as u64, &last)?;
            }
        }
        Ok(Some(upload))
    }
}
