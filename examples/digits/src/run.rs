//! Drawing samples, and the loss of denoising.

use anyhow::Result;
use burn::prelude::*;
use loraweld::fusion::{Objective, Refiner, RefinerOptions, ValuesMut};

use crate::classifier::{Classifier, CleanImage};
use crate::data::{Images, Noise, PIXELS};
use crate::model::{DigitDit, Fuse};
use crate::shared::{Shared, read};

/// Most images that go through the model at a time.
pub const BATCH: usize = 128;

/// A run of the sampler that is on its way: Euler's method from t = 1 to 0 in uniform steps, without guidance.
pub struct Run {
    /// The latents, [images, 1, 8, 8].
    pub x: Tensor<4>,
    classes: Tensor<1, Int>,
    /// The next step.
    pub step: usize,
    /// All steps.
    pub steps: usize,
}

impl Run {
    /// Starts from noise, [`PIXELS`] values for each label.
    pub fn new(model: &DigitDit, noise: &[f32], labels: &[usize], steps: usize) -> Self {
        Self { x: model.images(noise), classes: model.classes(labels), step: 0, steps }
    }

    /// The time that it has come to.
    pub fn t(&self) -> f32 {
        1.0 - self.step as f32 / self.steps as f32
    }

    /// Whether it is through.
    pub fn done(&self) -> bool {
        self.step >= self.steps
    }

    /// One step; gives the image that it would lead to if the velocity stayed the same.
    pub fn step(
        &mut self,
        model: &DigitDit,
        fuse: &mut dyn Fuse,
        refinement: Option<&mut Refinement<'_>>,
    ) -> Result<Tensor<4>> {
        let t = self.t();
        fuse.at(self.step, self.steps);
        let v = model.velocity(self.x.clone(), &[t], &self.classes, fuse)?;
        if let Some(refinement) = refinement {
            refinement.step(&self.x, &v, t)?;
        }
        let clean = self.x.clone() - v.clone() * t;
        self.step += 1;
        self.x = self.x.clone() + v * (self.t() - t);
        Ok(clean)
    }
}

/// Draws images, clamped to −1..1.
pub fn sample(
    model: &DigitDit,
    noise: &[f32],
    labels: &[usize],
    steps: usize,
    fuse: &mut dyn Fuse,
    mut refinement: Option<&mut Refinement<'_>>,
) -> Result<Tensor<4>> {
    let mut run = Run::new(model, noise, labels, steps);
    while !run.done() {
        run.step(model, fuse, refinement.as_deref_mut())?;
    }
    Ok(run.x.clamp(-1.0, 1.0))
}

/// Latent refinement: before each step the latents follow the gradient of how much the features of the image that
/// they lead to are like references.
pub struct Refinement<'a> {
    shared: Shared,
    classifier: &'a Classifier,
    refiner: Refiner,
}

impl<'a> Refinement<'a> {
    /// For so many latents, toward objectives of the style and of the subject.
    pub fn new(
        shared: &Shared,
        classifier: &'a Classifier,
        objectives: Vec<Objective>,
        samples: usize,
        options: RefinerOptions,
    ) -> Result<Self> {
        let refiner = Refiner::new(&shared.loraweld, objectives, samples, PIXELS, options)?;
        Ok(Self { shared: shared.clone(), classifier, refiner })
    }

    /// Moves the latents, in their own buffer.
    fn step(&mut self, x: &Tensor<4>, v: &Tensor<4>, t: f32) -> Result<()> {
        let mut encoder = CleanImage::new(self.classifier, x.clone(), v.clone(), t);
        let view = self.shared.view(x)?;
        self.shared.flush()?;
        self.refiner.step(&mut encoder, ValuesMut::Buffer(view.slice()), f64::from(1.0 - t))?;
        Ok(())
    }
}

/// Mean squared error of the velocity: each image at `times` times (i + ½) / times, with fixed noise.
pub fn loss(model: &DigitDit, images: &Images, times: usize, fuse: &mut dyn Fuse) -> Result<f64> {
    let mut noise = Noise::new(1234);
    let (mut sum, mut count) = (0.0, 0);
    for i in 0..times {
        let t = (i as f32 + 0.5) / times as f32;
        fuse.at(times - 1 - i, times);
        for first in (0..images.len()).step_by(BATCH) {
            let last = images.len().min(first + BATCH);
            let x0 = model.images(&images.pixels[first * PIXELS..last * PIXELS]);
            let eps = model.images(&noise.take((last - first) * PIXELS));
            let classes = model.classes(&images.labels[first..last]);
            let x = x0.clone() * (1.0 - t) + eps.clone() * t;
            let error = model.velocity(x, &[t], &classes, fuse)? - (eps - x0);
            sum += read(error.clone().mul(error).sum())?.iter().map(|&v| f64::from(v)).sum::<f64>();
            count += (last - first) * PIXELS;
        }
    }
    Ok(sum / count as f64)
}
