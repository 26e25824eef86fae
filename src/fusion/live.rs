//! Merged factors that follow a slider.

use std::collections::BTreeMap;

use crate::compute::memory::Buffer;
use crate::compute::ops::{Blend, BlendJob, blend_cpu};
use crate::merge::Projection;
use crate::{Device, Error, Layer, LayerKey, Matrix, NpLora, Result, Weighted};

/// NP-LoRA of a style and a subject whose μ and strengths change while a host draws with it.
///
/// μ enters linearly: with t = μ/(1 + μ), `A = [w_s·A_s; w_c·(A_0 + t·(A_1 − A_0))]`, where A_0 are the subject's rows in
/// the plain sum and A_1 those of the hard projection, both computed once by [`NpLora`]; `B = [s_s·B_s | s_c·B_c]` never
/// changes. So a change is 16 bytes to the device and one pass over A. Factors are f32, A within 2e-7 of what
/// [`NpLora::merge`] gives.
#[derive(Debug)]
pub struct LiveNpLora {
    device: Device,
    arenas: Vec<Arena>,
    layers: BTreeMap<LayerKey, Place>,
    controls: Option<Buffer>,
    projection: Projection,
    strengths: [f64; 2],
}

/// Factors of several layers, within what one binding holds.
#[derive(Debug)]
struct Arena {
    jobs: Vec<BlendJob>,
    /// What is blended: on the CPU here, else in `buffers`.
    host: [Vec<f32>; 3],
    buffers: Option<[Buffer; 3]>,
}

const ENDS: usize = 0;
const A: usize = 1;
const B: usize = 2;

#[derive(Clone, Debug)]
struct Place {
    arena: usize,
    a: usize,
    b: usize,
    rank: usize,
    input: usize,
    output: usize,
}

/// A layer's factors in buffers of the device, f32, row-major: `ΔW = B·A`.
#[derive(Clone, Copy, Debug)]
pub struct Factors<'a> {
    /// Holds A, rank × input.
    pub a: &'a wgpu::Buffer,
    /// Its first byte.
    pub a_offset: u64,
    /// Holds B, output × rank.
    pub b: &'a wgpu::Buffer,
    /// Its first byte.
    pub b_offset: u64,
    /// Rows of A.
    pub rank: usize,
    /// Columns of A.
    pub input: usize,
    /// Rows of B.
    pub output: usize,
}

/// Bytes that an arena may have, below what the device can bind.
const ARENA: u64 = 256 << 20;

impl LiveNpLora {
    /// Merges twice, and keeps both on the device. Strengths are those of the arguments, μ is 0.5.
    ///
    /// # Errors
    /// As [`NpLora::merge`]; [`Error::Device`] if the factors do not fit in [`Device::memory`].
    pub fn new(device: &Device, style: Weighted<'_>, subject: Weighted<'_>) -> Result<Self> {
        let strengths = [style.strength, subject.strength];
        let (style, subject) = (style.adapter, subject.adapter);
        let merge = |merge: NpLora| merge.merge(device, style.at(1.0), &[subject.at(1.0)]);
        let (sum, hard) = (merge(NpLora::soft(0.0))?.adapter, merge(NpLora::hard())?.adapter);

        let limit = device.capabilities().map_or(ARENA, |c| ARENA.min(c.max_binding).min(c.max_buffer)) / 4;
        let (mut arenas, mut layers): (Vec<Arena>, BTreeMap<LayerKey, Place>) = (Vec::new(), BTreeMap::new());
        for layer in sum.layers() {
            let Some(hard) = hard.layer(&layer.key) else {
                return Err(Error::layer(layer.name(), "the hard projection lost it"));
            };
            let split = subject_rows(layer, style.layer(&layer.key), subject.layer(&layer.key));
            let a0: Vec<f32> = layer.a().to_vec();
            let a1: Vec<f32> = hard.a().row_range(split, layer.rank).to_vec();
            let b: Vec<f32> =
                layer.b().to_vec::<f64>().iter().map(|v| (v * layer.scale.value) as f32).collect();
            let fits = |arena: &&mut Arena| {
                (arena.host[ENDS].len() + a0.len() + a1.len()).max(arena.host[B].len() + b.len()) as u64
                    <= limit
            };
            if arenas.last_mut().filter(fits).is_none() {
                arenas.push(Arena { jobs: Vec::new(), host: Default::default(), buffers: None });
            }
            let index = arenas.len() - 1;
            let Arena { jobs, host, .. } = &mut arenas[index];
            let place = Place {
                arena: index,
                a: host[A].len(),
                b: host[B].len(),
                rank: layer.rank,
                input: layer.input,
                output: layer.output,
            };
            let start = host[ENDS].len();
            let (style_len, all) = (split * layer.input, a0.len());
            for (adapter, from, len, b) in
                [(0, 0, style_len, start), (1, style_len, all - style_len, start + all)]
            {
                if len > 0 {
                    let (a, out) = ((start + from) as u32, (place.a + from) as u32);
                    jobs.push(BlendJob { a, b: b as u32, out, len: len as u32, adapter });
                }
            }
            host[ENDS].extend(a0);
            host[ENDS].extend(a1);
            host[A].resize(place.a + all, 0.0);
            host[B].extend(b);
            layers.insert(layer.key.clone(), place);
        }
        let bytes: u64 = arenas.iter().flat_map(|arena| &arena.host).map(|part| part.len() as u64 * 4).sum();
        let mut controls = None;
        if device.is_gpu() {
            if bytes > device.memory() {
                return Err(Error::Device(format!(
                    "live factors take {} MiB of device memory, but {} may be used",
                    bytes >> 20,
                    device.memory() >> 20
                )));
            }
            let gpu = device.gpu()?;
            controls = Some(gpu.allocate("sliders", 16)?);
            for arena in &mut arenas {
                let mut upload = |part: usize, label: &str| {
                    let values = std::mem::take(&mut arena.host[part]);
                    let buffer = gpu.allocate(label, values.len() as u64 * 4)?;
                    if part != A {
                        gpu.write(&buffer, 0, bytemuck::cast_slice(&values))?;
                    }
                    Ok::<_, Error>(buffer)
                };
                arena.buffers =
                    Some([upload(ENDS, "ends of A")?, upload(A, "live A")?, upload(B, "live B")?]);
            }
        }
        let mut live = Self {
            device: device.clone(),
            arenas,
            layers,
            controls,
            projection: Projection::Soft(0.5),
            strengths,
        };
        live.update()?;
        Ok(live)
    }

    /// Changes μ and the strengths of style and subject, and submits the new factors.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one is out of range.
    pub fn set(&mut self, projection: Projection, style: f64, subject: f64) -> Result<()> {
        let t = projection.share();
        if !(0.0..=1.0).contains(&t) || !(style as f32).is_finite() || !(subject as f32).is_finite() {
            return Err(Error::Invalid(format!(
                "{projection:?}, strengths {style} and {subject}: mu must not be negative, and all must be finite"
            )));
        }
        (self.projection, self.strengths) = (projection, [style, subject]);
        self.update()
    }

    fn update(&mut self) -> Result<()> {
        let t = self.projection.share();
        let [style, subject] = self.strengths;
        let Some(controls) = &self.controls else {
            for Arena { jobs, host, .. } in &mut self.arenas {
                let [ends, out, _] = host;
                for job in jobs {
                    let (t, strength) = if job.adapter == 0 { (0.0, style) } else { (t, subject) };
                    for i in 0..job.len as usize {
                        let (a, b) = (ends[job.a as usize + i], ends[job.b as usize + i]);
                        out[job.out as usize + i] = blend_cpu(t, strength, a, b);
                    }
                }
            }
            return Ok(());
        };
        let gpu = self.device.gpu()?;
        gpu.write(controls, 0, bytemuck::cast_slice(&[0.0, style as f32, t as f32, subject as f32]))?;
        let mut commands = gpu.commands();
        for arena in &self.arenas {
            if let Some([ends, out, _]) = &arena.buffers {
                Blend { ends, out, controls }.encode(&mut commands, &arena.jobs)?;
            }
        }
        commands.submit()
    }

    /// The layers' keys.
    pub fn layers(&self) -> impl Iterator<Item = &LayerKey> {
        self.layers.keys()
    }

    /// A layer's factors where they are on the device; they follow every [`set`](Self::set). `None` on the CPU, and for a
    /// layer that neither adapter has.
    pub fn factors(&self, layer: &str) -> Option<Factors<'_>> {
        let (_, place) = LayerKey::find(layer, &self.layers)?;
        let [_, a, b] = self.arenas.get(place.arena)?.buffers.as_ref()?;
        Some(Factors {
            a,
            a_offset: place.a as u64 * 4,
            b,
            b_offset: place.b as u64 * 4,
            rank: place.rank,
            input: place.input,
            output: place.output,
        })
    }

    /// Reads a layer's A and B. Waits for the device.
    pub fn read(&self, layer: &str) -> Result<(Matrix<f32>, Matrix<f32>)> {
        let place = LayerKey::find(layer, &self.layers).map(|(_, place)| place);
        let place = place.ok_or_else(|| Error::layer(layer, "neither adapter has it"))?;
        let arena = &self.arenas[place.arena];
        let part = |part: usize, first: usize, rows: usize, cols: usize| {
            let range = first..first + rows * cols;
            let data = match &arena.buffers {
                None => arena.host[part][range].to_vec(),
                Some(buffers) => {
                    let bytes = self.device.gpu()?.read(&buffers[part], range.end as u64 * 4)?;
                    bytemuck::pod_collect_to_vec(&bytes[range.start * 4..])
                }
            };
            Ok::<_, Error>(Matrix { rows, cols, data })
        };
        Ok((part(A, place.a, place.rank, place.input)?, part(B, place.b, place.output, place.rank)?))
    }
}

/// The first of the merged layer's rows that is the subject's.
fn subject_rows(merged: &Layer, style: Option<&Layer>, subject: Option<&Layer>) -> usize {
    match (style, subject) {
        (Some(style), Some(subject)) if style.rank + subject.rank == merged.rank => style.rank,
        // One of them adds nothing here, and was left out.
        (Some(style), Some(subject)) if subject.scale.value == 0.0 || style.scale.value != 0.0 => style.rank,
        (Some(style), None) => style.rank,
        _ => 0,
    }
}
