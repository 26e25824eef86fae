//! Latent-level refinement (arXiv 2602.15539): latents follow the gradient of similarities to reference features.

use crate::compute::gpu::{Gpu, whole};
use crate::compute::memory::Buffer;
use crate::compute::ops::{CosineJob, GradientJob, cosine_cpu, gradient_step_cpu};
use crate::{Device, Error, Result};
use std::sync::Arc;

/// Values of f32 where the device has them.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// Of a refiner on the CPU.
    Host(&'a [f32]),
    /// Of a refiner on a GPU; may be part of a buffer.
    Buffer(wgpu::BufferSlice<'a>),
}

/// Values of f32 to be written where the device has them.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// Of a refiner on the CPU.
    Host(&'a mut [f32]),
    /// Of a refiner on a GPU; may be part of a buffer.
    Buffer(wgpu::BufferSlice<'a>),
}

/// An image encoder of the host: features of latents, and the way back.
///
/// Latents are samples × len, features samples × [`Objective::width`], row-major. A host that measures the predicted clean
/// image, as published, includes that prediction: `features = E(decode(x_t − t·v(x_t, t)))`, or with v held fixed.
/// On a GPU whatever a method reads is submitted before it is called, and what it writes must be submitted when it
/// returns; the buffers have usages `STORAGE`, `COPY_SRC` and `COPY_DST`.
pub trait Encoder {
    /// Writes the features of an objective.
    fn forward(&mut self, objective: usize, latents: Values<'_>, features: ValuesMut<'_>) -> Result<()>;

    /// Writes `∂L/∂latents`, given `∂L/∂features` of the features that [`forward`](Self::forward) wrote last for this
    /// objective.
    fn backward(&mut self, objective: usize, gradient: Values<'_>, latents: ValuesMut<'_>) -> Result<()>;
}

/// A cosine objective: `L = weight·(1 − cos(f, r))`, averaged over the references r.
#[derive(Clone, Debug, PartialEq)]
pub struct Objective {
    /// Mean of the references, each at length 1.
    direction: Vec<f32>,
    weight: f64,
}

impl Objective {
    /// Of reference features, all of one width; weight 1.
    ///
    /// # Errors
    /// [`Error::Invalid`] without references, if widths differ, or if one is zero or not finite.
    pub fn new<'a>(references: impl IntoIterator<Item = &'a [f32]>) -> Result<Self> {
        let mut sum: Vec<f64> = Vec::new();
        let mut count = 0.0;
        for reference in references {
            let norm = reference.iter().map(|r| f64::from(*r).powi(2)).sum::<f64>().sqrt();
            if !(norm > 0.0 && norm.is_finite()) {
                return Err(Error::Invalid(format!(
                    "reference features have length {norm}: they need a direction"
                )));
            }
            if count == 0.0 {
                sum = vec![0.0; reference.len()];
            }
            if reference.len() != sum.len() {
                return Err(Error::Invalid(format!(
                    "reference features have widths {} and {}; they must come from one encoder",
                    sum.len(),
                    reference.len()
                )));
            }
            count += 1.0;
            sum.iter_mut().zip(reference).for_each(|(s, r)| *s += f64::from(*r) / norm);
        }
        if count == 0.0 {
            return Err(Error::Invalid("an objective needs reference features".into()));
        }
        Ok(Self { direction: sum.iter().map(|s| (s / count) as f32).collect(), weight: 1.0 })
    }

    /// At another weight.
    pub fn at(self, weight: f64) -> Self {
        Self { weight, ..self }
    }

    /// The two of the paper: `m·L_style + (1 − m)·L_subject`.
    pub fn balanced(style: Self, subject: Self, m: f64) -> Vec<Self> {
        vec![style.at(m), subject.at(1.0 - m)]
    }

    /// Length of the features.
    pub fn width(&self) -> usize {
        self.direction.len()
    }

    /// L of one sample's features and `∂L/∂f`, in f64.
    pub fn evaluate(&self, features: &[f32]) -> Result<(f64, Vec<f32>)> {
        if features.len() != self.width() {
            let (got, want) = (features.len(), self.width());
            return Err(Error::Invalid(format!("features of width {got}, but the references have {want}")));
        }
        let mut gradient = vec![0.0; features.len()];
        Ok((cosine_cpu(self.weight, features, &self.direction, &mut gradient), gradient))
    }
}

/// How the step size changes over the run, t from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Ramp {
    /// Always the same.
    #[default]
    Constant,
    /// `1 − t`.
    Falling,
    /// `(1 + cos πt) / 2`.
    Cosine,
}

impl Ramp {
    fn at(self, t: f64) -> f64 {
        match self {
            Self::Constant => 1.0,
            Self::Falling => 1.0 - t,
            Self::Cosine => (1.0 + (std::f64::consts::PI * t).cos()) / 2.0,
        }
    }
}

/// Options of a [`Refiner`]. The paper defines none of them: they are our choices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RefinerOptions {
    /// Step size η: with `normalise` the root mean square of a step, in units of the latents.
    pub rate: f64,
    /// How η changes over the run.
    pub ramp: Ramp,
    /// The part of the run, `from <= t < until`, that is refined.
    pub window: (f64, f64),
    /// Divide a sample's gradient by its root mean square, so that η does not depend on the encoder.
    pub normalise: bool,
    /// Most that a step changes an element.
    pub clamp: f64,
}

impl Default for RefinerOptions {
    fn default() -> Self {
        Self { rate: 0.05, ramp: Ramp::Constant, window: (0.0, 1.0), normalise: true, clamp: 0.25 }
    }
}

/// What the last step found, from [`Refiner::outcome`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// L of each objective on each sample, times its weight.
    pub losses: Vec<Vec<f64>>,
    /// Root mean square of each sample's gradient. −1 where the gradient was not finite: that sample was not changed,
    /// as one of gradient 0 is not.
    pub gradients: Vec<f64>,
}

/// Moves latents down the gradient of cosine objectives: `x ← x − clamp(η_t·g / rms(g), ±c)`, `g = ∂L/∂x`.
///
/// L is the sum of the objectives, `m·L_style + (1 − m)·L_subject` for the paper's two. The encoders' passes belong to
/// the host ([`Encoder`]); objective, gradient with respect to the features, norms and the update are kernels with f64
/// twins, and nothing is read back.
///
/// # Example
/// ```
/// use loraweld::fusion::{Encoder, Objective, Refiner, RefinerOptions, Values, ValuesMut};
/// # use loraweld::{Device, Result};
/// /// Takes the latents themselves for features.
/// struct Identity;
/// impl Encoder for Identity {
///     fn forward(&mut self, _: usize, latents: Values<'_>, features: ValuesMut<'_>) -> Result<()> {
///         if let (Values::Host(x), ValuesMut::Host(f)) = (latents, features) { f.copy_from_slice(x) }
///         Ok(())
///     }
///     fn backward(&mut self, _: usize, gradient: Values<'_>, latents: ValuesMut<'_>) -> Result<()> {
///         if let (Values::Host(g), ValuesMut::Host(x)) = (gradient, latents) { x.copy_from_slice(g) }
///         Ok(())
///     }
/// }
/// # fn main() -> Result<()> {
/// let objective = Objective::new([[1.0, 1.0].as_slice()])?;
/// let mut refiner = Refiner::new(&Device::cpu(), vec![objective], 1, 2, RefinerOptions::default())?;
/// let mut latents = [1.0, 0.0];
/// for step in 0..100 {
///     refiner.step(&mut Identity, ValuesMut::Host(&mut latents), f64::from(step) / 100.0)?;
/// }
/// assert!(refiner.outcome()?.losses[0][0] < 0.01);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Refiner {
    device: Device,
    objectives: Vec<Objective>,
    samples: usize,
    len: usize,
    options: RefinerOptions,
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Cpu(Outcome),
    Gpu(Box<Buffers>),
}

#[derive(Debug)]
struct Buffers {
    /// Of each objective: features, their gradient, the reference direction.
    features: Vec<[Buffer; 3]>,
    /// What a host writes, one objective's gradient of the latents.
    gradient: Buffer,
    /// All of them, objective by objective.
    gradients: Buffer,
    norms: Buffer,
    losses: Buffer,
    rms: Buffer,
}

impl Refiner {
    /// For latents of `samples` × `len`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for options out of range, or nothing to do; [`Error::Device`] if the latents are larger than
    /// the device can bind.
    pub fn new(
        device: &Device,
        objectives: Vec<Objective>,
        samples: usize,
        len: usize,
        options: RefinerOptions,
    ) -> Result<Self> {
        if objectives.is_empty() || samples == 0 || len == 0 {
            return Err(Error::Invalid("refinement needs an objective, a sample and latents".into()));
        }
        if objectives.iter().any(|objective| !objective.weight.is_finite()) {
            return Err(Error::Invalid("the weights of objectives must be finite".into()));
        }
        check(&options)?;
        // Every other product of these sizes is less.
        let count = samples.checked_mul(len).and_then(|count| count.checked_mul(4 * objectives.len()));
        if count.is_none() {
            return Err(Error::Invalid(format!("no memory holds {samples} x {len} latents")));
        }
        let backend = match device.is_gpu() {
            false => Backend::Cpu(Outcome::default()),
            true => Backend::Gpu(Box::new(Buffers::new(device.gpu()?, &objectives, samples, len)?)),
        };
        Ok(Self { device: device.clone(), objectives, samples, len, options, backend })
    }

    /// Changes the options, from the next step on.
    pub fn set_options(&mut self, options: RefinerOptions) -> Result<()> {
        check(&options)?;
        self.options = options;
        Ok(())
    }

    /// Changes the balance of two objectives to m and 1 − m, from the next step on.
    pub fn set_balance(&mut self, m: f64) -> Result<()> {
        match self.objectives.as_mut_slice() {
            [style, subject] if m.is_finite() => {
                (style.weight, subject.weight) = (m, 1.0 - m);
                Ok(())
            }
            _ => Err(Error::Invalid(format!("a balance needs two objectives and a finite number, not {m}"))),
        }
    }

    /// One step at `t` of the run, 0 at its start. Outside the window it does nothing, and gives false.
    ///
    /// `latents`: samples × len, f32, on a GPU in a buffer with usage `STORAGE`, changed in place by submissions to the
    /// device's queue. As part of a buffer they start at a multiple of the device's
    /// `min_storage_buffer_offset_alignment`, as frameworks that allocate from pools do anyway.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the latents are elsewhere than the refiner, too few or not aligned; whatever the encoder
    /// gives.
    pub fn step(&mut self, encoder: &mut dyn Encoder, latents: ValuesMut<'_>, t: f64) -> Result<bool> {
        let (from, until) = self.options.window;
        if !(from <= t && t < until) {
            return Ok(false);
        }
        let rate = self.options.rate * self.options.ramp.at(t);
        match (&self.backend, latents) {
            (Backend::Gpu(_), ValuesMut::Buffer(latents)) => self.step_gpu(encoder, latents, rate)?,
            (Backend::Cpu(_), ValuesMut::Host(x)) => self.step_cpu(encoder, x, rate)?,
            _ => return Err(Error::Invalid("latents must lie where the refiner's device is".into())),
        }
        Ok(true)
    }

    /// Reads what the last step found. Waits for the device.
    pub fn outcome(&self) -> Result<Outcome> {
        let buffers = match &self.backend {
            Backend::Cpu(outcome) => return Ok(outcome.clone()),
            Backend::Gpu(buffers) => buffers,
        };
        let read = |buffer, count: usize| {
            let bytes = self.device.gpu()?.read(buffer, count as u64 * 4)?;
            let values: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
            Ok::<_, Error>(values.into_iter().map(f64::from).collect::<Vec<_>>())
        };
        let losses = read(&buffers.losses, self.objectives.len() * self.samples)?;
        Ok(Outcome {
            losses: losses.chunks_exact(self.samples).map(<[f64]>::to_vec).collect(),
            gradients: read(&buffers.rms, self.samples)?,
        })
    }

    fn step_cpu(&mut self, encoder: &mut dyn Encoder, x: &mut [f32], rate: f64) -> Result<()> {
        if x.len() != self.samples * self.len {
            return Err(Error::Invalid(format!(
                "{} latents, but {} x {} were expected",
                x.len(),
                self.samples,
                self.len
            )));
        }
        let mut outcome = Outcome::default();
        let mut terms = Vec::new();
        for (i, objective) in self.objectives.iter().enumerate() {
            let width = objective.width();
            let mut features = vec![0.0; self.samples * width];
            encoder.forward(i, Values::Host(x), ValuesMut::Host(&mut features))?;
            let mut gradient = vec![0.0; features.len()];
            let losses = features
                .chunks_exact(width)
                .zip(gradient.chunks_exact_mut(width))
                .map(|(f, g)| cosine_cpu(objective.weight, f, &objective.direction, g));
            outcome.losses.push(losses.collect());
            let mut term = vec![0.0; x.len()];
            encoder.backward(i, Values::Host(&gradient), ValuesMut::Host(&mut term))?;
            terms.push(term);
        }
        for (i, x) in x.chunks_exact_mut(self.len).enumerate() {
            let range = i * self.len..(i + 1) * self.len;
            let terms: Vec<&[f32]> = terms.iter().map(|term| &term[range.clone()]).collect();
            let RefinerOptions { normalise, clamp, .. } = self.options;
            outcome.gradients.push(gradient_step_cpu(&terms, normalise, rate, clamp, x));
        }
        self.backend = Backend::Cpu(outcome);
        Ok(())
    }

    fn step_gpu(&self, encoder: &mut dyn Encoder, x: wgpu::BufferSlice<'_>, rate: f64) -> Result<()> {
        let Backend::Gpu(buffers) = &self.backend else { return Ok(()) };
        let gpu = self.device.gpu()?;
        let bytes = (self.samples * self.len * 4) as u64;
        let alignment = gpu.device.limits().min_storage_buffer_offset_alignment;
        if x.size() < bytes
            || !x.buffer().usage().contains(wgpu::BufferUsages::STORAGE)
            || !x.offset().is_multiple_of(u64::from(alignment))
        {
            return Err(Error::Invalid(format!(
                "latents take {bytes} bytes from a multiple of {alignment} on, in a buffer with usage STORAGE; {} \
                 bytes from {} on were given",
                x.size(),
                x.offset()
            )));
        }
        let binding = wgpu::BufferBinding {
            buffer: x.buffer(),
            offset: x.offset(),
            size: std::num::NonZeroU64::new(bytes),
        };
        for (i, (objective, own)) in self.objectives.iter().zip(&buffers.features).enumerate() {
            let [features, gradient, direction] = own;
            let size = (self.samples * objective.width() * 4) as u64;
            encoder.forward(i, Values::Buffer(x), ValuesMut::Buffer(features.slice(..size)))?;
            let job = CosineJob {
                samples: self.samples as u32,
                width: objective.width() as u32,
                reference_stride: 0,
                weight: objective.weight as f32,
                losses: (i * self.samples) as u32,
            };
            let mut commands = gpu.commands();
            let bindings = [whole(features), whole(direction), whole(gradient), whole(&buffers.losses)];
            job.encode(&mut commands, bindings)?;
            commands.submit()?;
            let latents = buffers.gradient.slice(..bytes);
            encoder.backward(i, Values::Buffer(gradient.slice(..size)), ValuesMut::Buffer(latents))?;
            let mut copy = gpu.device.create_command_encoder(&Default::default());
            copy.copy_buffer_to_buffer(&buffers.gradient, 0, &buffers.gradients, i as u64 * bytes, bytes);
            gpu.queue.submit([copy.finish()]);
        }
        let RefinerOptions { normalise, clamp, .. } = self.options;
        let (rate, clamp) = (rate as f32, clamp.min(f64::from(f32::MAX)) as f32);
        let job = GradientJob::new(self.samples, self.len, self.objectives.len(), normalise, rate, clamp);
        let mut commands = gpu.commands();
        job.encode(
            &mut commands,
            [whole(&buffers.gradients), whole(&buffers.norms), binding, whole(&buffers.rms)],
        )?;
        commands.submit()
    }
}

impl Buffers {
    fn new(gpu: &Arc<Gpu>, objectives: &[Objective], samples: usize, len: usize) -> Result<Self> {
        let buffer = |label: &str, values: usize| gpu.allocate_values(label, values, 4);
        let features = objectives
            .iter()
            .map(|objective| {
                let width = objective.width();
                let direction = buffer("reference", width)?;
                gpu.write(&direction, 0, bytemuck::cast_slice(&objective.direction))?;
                let features = buffer("features", samples.saturating_mul(width))?;
                Ok([features, buffer("gradient of features", samples.saturating_mul(width))?, direction])
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            features,
            gradient: buffer("gradient of latents", samples * len)?,
            gradients: buffer("gradients of latents", objectives.len() * samples * len)?,
            norms: buffer("partial norms", 2 * samples * GradientJob::parts(len))?,
            losses: buffer("losses", objectives.len() * samples)?,
            rms: buffer("norms of gradients", samples)?,
        })
    }
}

fn check(options: &RefinerOptions) -> Result<()> {
    let RefinerOptions { rate, window: (from, until), clamp, .. } = *options;
    if !(rate as f32).is_finite() || clamp.is_nan() || clamp <= 0.0 || from.is_nan() || until.is_nan() {
        return Err(Error::Invalid(format!(
            "rate {rate}, clamp {clamp}, window {from} to {until}: the rate must be finite, the clamp above 0"
        )));
    }
    Ok(())
}
