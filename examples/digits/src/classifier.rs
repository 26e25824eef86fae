//! The judges: small convolutional networks on burn. One of them is the encoder of latent refinement too.

use anyhow::{Context, Result};
use burn::prelude::*;
use burn::tensor::activation::relu;
use burn::tensor::module::{conv2d, linear, max_pool2d};
use burn::tensor::ops::{ConvOptions, MaxPoolOptions};
use loraweld::Error;
use loraweld::fusion::{Encoder, Values, ValuesMut};

use crate::data::{Data, SIDE, Tensors};
use crate::shared::{Shared, read};

/// Length of the feature vector.
pub const FEATURES: usize = 128;
/// What `subject_style` calls a heart.
pub const HEART: usize = 10;
/// What it calls the shaded style.
pub const SHADE: usize = 2;

/// One of the two networks of `classifiers.safetensors`.
pub struct Classifier {
    shared: Shared,
    convolutions: Vec<(Tensor<4>, Tensor<1>)>,
    features: (Tensor<2>, Tensor<1>),
    heads: Vec<(Tensor<2>, Tensor<1>)>,
}

impl Classifier {
    /// `subject_style` with the heads `subject` and `style`, or `concept` with `subject`.
    pub fn load(shared: &Shared, data: &Data, network: &str, heads: &[&str]) -> Result<Self> {
        let file = data.file("classifiers")?;
        let dense = |name: &str| dense(shared, &file, &format!("{network}.{name}"));
        let convolution = |name: &str| {
            let (shape, weight) = file.get::<4>(&format!("{network}.{name}.weight"))?;
            let (count, bias) = file.get::<1>(&format!("{network}.{name}.bias"))?;
            Ok((shared.tensor(weight, shape), shared.tensor(bias, count)))
        };
        Ok(Self {
            shared: shared.clone(),
            convolutions: ["conv1", "conv2", "conv3"].into_iter().map(convolution).collect::<Result<_>>()?,
            features: dense("fc")?,
            heads: heads.iter().map(|head| dense(head)).collect::<Result<_>>()?,
        })
    }

    /// Images [n, 1, 8, 8] → n × [`FEATURES`].
    pub fn features(&self, images: Tensor<4>) -> Tensor<2> {
        let count = images.dims()[0];
        let mut x = images;
        for (i, (weight, bias)) in self.convolutions.iter().enumerate() {
            let options = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
            x = relu(conv2d(x, weight.clone(), Some(bias.clone()), options));
            if i == 1 {
                x = max_pool2d(x, MaxPoolOptions::new([2, 2]));
            }
        }
        let wide = x.dims()[1] * SIDE * SIDE / 4;
        let (weight, bias) = self.features.clone();
        relu(linear(x.reshape([count, wide]), weight, Some(bias)))
    }

    /// What a head makes of features: n × its classes.
    pub fn head(&self, head: usize, features: Tensor<2>) -> Tensor<2> {
        let (weight, bias) = self.heads[head].clone();
        linear(features, weight, Some(bias))
    }

    /// The most likely class of each image by each head.
    pub fn judge(&self, images: Tensor<4>) -> Result<Vec<Vec<usize>>> {
        let features = self.features(images);
        let class = |row: &[f32]| (0..row.len()).max_by(|&i, &j| row[i].total_cmp(&row[j])).unwrap_or(0);
        let judge = |head: usize| {
            let scores = self.head(head, features.clone());
            let classes = scores.dims()[1];
            Ok(read(scores)?.chunks_exact(classes).map(class).collect())
        };
        (0..self.heads.len()).map(judge).collect()
    }
}

fn dense(shared: &Shared, file: &Tensors, name: &str) -> Result<(Tensor<2>, Tensor<1>)> {
    let (shape, weight) = file.get::<2>(&format!("{name}.weight"))?;
    let (count, bias) = file.get::<1>(&format!("{name}.bias"))?;
    Ok((shared.tensor(weight, shape).transpose(), shared.tensor(bias, count)))
}

/// Features of the clean image that a latent leads to, `x_0 = x_t − t·v` with v held fixed, and the way back by burn's
/// autodiff.
pub struct CleanImage<'a> {
    classifier: &'a Classifier,
    /// The tensor in whose buffer the refiner works.
    latents: Tensor<4>,
    velocity: Tensor<4>,
    t: f32,
    /// Latents and features of the last forward pass.
    held: Option<(Tensor<4>, Tensor<2>)>,
}

impl<'a> CleanImage<'a> {
    /// Of latents at time t whose velocity is known.
    pub fn new(classifier: &'a Classifier, latents: Tensor<4>, velocity: Tensor<4>, t: f32) -> Self {
        Self { classifier, latents, velocity, t, held: None }
    }

    fn look(&mut self, features: ValuesMut<'_>) -> Result<()> {
        let ValuesMut::Buffer(features) = features else {
            anyhow::bail!("the refiner works on another device");
        };
        let shared = &self.classifier.shared;
        let x = self.latents.clone().autodiff().require_grad();
        let clean = x.clone() - self.velocity.clone().autodiff() * self.t;
        let seen = self.classifier.features(clean);
        shared.export(&seen.clone().inner(), features)?;
        self.held = Some((x, seen));
        Ok(())
    }

    fn trace(&mut self, gradient: Values<'_>, latents: ValuesMut<'_>) -> Result<()> {
        let (Values::Buffer(gradient), ValuesMut::Buffer(latents)) = (gradient, latents) else {
            anyhow::bail!("the refiner works on another device");
        };
        let shared = &self.classifier.shared;
        let (x, seen) = self.held.take().context("no features were asked for")?;
        let gradient: Tensor<2> = shared.import(gradient, seen.dims())?;
        let gradients = (seen * gradient.autodiff()).sum().backward();
        let gradient = x.grad(&gradients).context("the features do not depend on the latents")?;
        shared.export(&gradient, latents)
    }
}

impl Encoder for CleanImage<'_> {
    fn forward(&mut self, _: usize, _: Values<'_>, features: ValuesMut<'_>) -> loraweld::Result<()> {
        self.look(features).map_err(|e| Error::Device(format!("{e:#}")))
    }

    fn backward(&mut self, _: usize, gradient: Values<'_>, latents: ValuesMut<'_>) -> loraweld::Result<()> {
        self.trace(gradient, latents).map_err(|e| Error::Device(format!("{e:#}")))
    }
}
