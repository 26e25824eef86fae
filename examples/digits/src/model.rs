//! DigitDiT on burn: a diffusion transformer of 1.26 million parameters for digits of 8 × 8 pixels.
//!
//! Rectified flow: `x_t = (1 − t)·x_0 + t·ε`, and the model gives the velocity `v = ε − x_0`.

use anyhow::{Result, ensure};
use burn::prelude::*;
use burn::tensor::activation::{gelu_approximate, silu, softmax};
use burn::tensor::module::{layer_norm, linear};

use crate::data::{Data, PIXELS, SIDE, Tensors};
use crate::shared::Shared;

const WIDTH: usize = 128;
const BLOCKS: usize = 4;
const HEADS: usize = 4;
const PATCH: usize = 2;
const PATCHES: usize = SIDE / PATCH;

/// Tokens of an image.
pub const TOKENS: usize = PATCHES * PATCHES;
/// The class that says nothing.
pub const NO_CLASS: usize = 10;

/// What comes after linear layers that read the same inputs: adapters.
pub trait Fuse {
    /// Comes before each step of a run.
    fn at(&mut self, _step: usize, _steps: usize) {}

    /// `x`: tokens × in. `outputs`: layers' names and tokens × out, to be changed.
    fn fuse(&mut self, x: &Tensor<2>, outputs: &mut [(&str, Tensor<2>)]) -> Result<()>;
}

/// No adapter.
pub struct Plain;

impl Fuse for Plain {
    fn fuse(&mut self, _: &Tensor<2>, _: &mut [(&str, Tensor<2>)]) -> Result<()> {
        Ok(())
    }
}

/// A linear layer: `y = x·W + b`.
struct Linear {
    name: String,
    weight: Tensor<2>,
    bias: Tensor<1>,
}

impl Linear {
    fn load(shared: &Shared, file: &Tensors, name: &str) -> Result<Self> {
        let ([output, input], weight) = file.get::<2>(&format!("{name}.weight"))?;
        let (shape, bias) = file.get::<1>(&format!("{name}.bias"))?;
        let transposed: Vec<f32> =
            (0..input * output).map(|i| weight[i % output * input + i / output]).collect();
        Ok(Self {
            name: name.to_owned(),
            weight: shared.tensor(&transposed, [input, output]),
            bias: shared.tensor(bias, shape),
        })
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        linear(x, self.weight.clone(), Some(self.bias.clone()))
    }
}

struct Block {
    modulation: Linear,
    qkv: [Linear; 3],
    out: Linear,
    up: Linear,
    down: Linear,
}

/// The model. Its layers have the names that adapters know them by.
pub struct DigitDit {
    shared: Shared,
    patches: Linear,
    positions: Tensor<3>,
    time: [Linear; 2],
    classes: Tensor<2>,
    blocks: Vec<Block>,
    modulation: Linear,
    out: Linear,
    ones: Tensor<1>,
}

impl DigitDit {
    /// From `base.safetensors`, in f32.
    pub fn load(shared: &Shared, data: &Data) -> Result<Self> {
        let file = data.file("base")?;
        let layer = |name: &str| Linear::load(shared, &file, name);
        let block = |i: usize| {
            let layer = |name: &str| layer(&format!("transformer_blocks.{i}.{name}"));
            Ok(Block {
                modulation: layer("norm1.linear")?,
                qkv: [layer("attn.to_q")?, layer("attn.to_k")?, layer("attn.to_v")?],
                out: layer("attn.to_out.0")?,
                up: layer("ff.net.0.proj")?,
                down: layer("ff.net.2")?,
            })
        };
        let ([tokens, width], positions) = file.get::<2>("pos_embed")?;
        let (shape, classes) = file.get::<2>("class_embed.weight")?;
        Ok(Self {
            patches: layer("in_proj")?,
            positions: shared.tensor(positions, [1, tokens, width]),
            time: [layer("time_embed.linear_1")?, layer("time_embed.linear_2")?],
            classes: shared.tensor(classes, shape),
            blocks: (0..BLOCKS).map(block).collect::<Result<_>>()?,
            modulation: layer("norm_out.linear")?,
            out: layer("proj_out")?,
            ones: Tensor::ones([WIDTH], &shared.burn),
            shared: shared.clone(),
        })
    }

    /// Classes as [`velocity`](Self::velocity) takes them.
    pub fn classes(&self, labels: &[usize]) -> Tensor<1, Int> {
        let labels: Vec<i32> = labels.iter().map(|&label| label.min(NO_CLASS) as i32).collect();
        let count = labels.len();
        Tensor::from_data(TensorData::new(labels, [count]), &self.shared.burn)
    }

    /// The velocity at `x` [images, 1, 8, 8], times t (one, or one of each image) and classes.
    pub fn velocity(
        &self,
        x: Tensor<4>,
        t: &[f32],
        classes: &Tensor<1, Int>,
        fuse: &mut dyn Fuse,
    ) -> Result<Tensor<4>> {
        let images = x.dims()[0];
        ensure!(t.len() == 1 || t.len() == images, "{} times for {images} images", t.len());
        let rows = images * TOKENS;
        let patches = x
            .reshape([images, PATCHES, PATCH, PATCHES, PATCH])
            .permute([0, 1, 3, 2, 4])
            .reshape([rows, PATCH * PATCH]);
        let mut h = self.patches.forward(patches).reshape([images, TOKENS, WIDTH]) + self.positions.clone();
        let conditions = silu(self.conditions(t, classes));
        for block in &self.blocks {
            let [shift1, scale1, gate1, shift2, scale2, gate2] = modulation(&block.modulation, &conditions);
            let z = (self.norm(h.clone()) * (scale1 + 1.0) + shift1).reshape([rows, WIDTH]);
            h = h + gate1 * block.attention(z, fuse)?.reshape([images, TOKENS, WIDTH]);
            let z = (self.norm(h.clone()) * (scale2 + 1.0) + shift2).reshape([rows, WIDTH]);
            h = h + gate2 * block.feed_forward(z, fuse)?.reshape([images, TOKENS, WIDTH]);
        }
        let [scale, shift] = modulation(&self.modulation, &conditions);
        let z = (self.norm(h) * (scale + 1.0) + shift).reshape([rows, WIDTH]);
        Ok(self
            .out
            .forward(z)
            .reshape([images, PATCHES, PATCHES, PATCH, PATCH])
            .permute([0, 1, 3, 2, 4])
            .reshape([images, 1, SIDE, SIDE]))
    }

    fn norm(&self, h: Tensor<3>) -> Tensor<3> {
        layer_norm(h, self.ones.clone(), None, 1e-6)
    }

    /// Images × width, or 1 × width for one time and … classes.
    fn conditions(&self, t: &[f32], classes: &Tensor<1, Int>) -> Tensor<2> {
        let half = WIDTH / 2;
        let angle = |t: f32, i: usize| 1000.0 * t * (-(10000f32.ln()) * i as f32 / half as f32).exp();
        let sinusoid = |&t: &f32| {
            let cosines = (0..half).map(move |i| angle(t, i).cos());
            cosines.chain((0..half).map(move |i| angle(t, i).sin()))
        };
        let values: Vec<f32> = t.iter().flat_map(sinusoid).collect();
        let time = self.shared.tensor(&values, [t.len(), WIDTH]);
        let time = self.time[1].forward(silu(self.time[0].forward(time)));
        time + self.classes.clone().select(0, classes.clone())
    }

    /// Images as [`velocity`](Self::velocity) takes them.
    pub fn images(&self, pixels: &[f32]) -> Tensor<4> {
        self.shared.tensor(pixels, [pixels.len() / PIXELS, 1, SIDE, SIDE])
    }
}

/// What a block's conditions do to its tokens: N parts of images × 1 × width.
fn modulation<const N: usize>(layer: &Linear, conditions: &Tensor<2>) -> [Tensor<3>; N] {
    let images = conditions.dims()[0];
    let all = layer.forward(conditions.clone()).reshape([images, 1, N * WIDTH]);
    std::array::from_fn(|i| all.clone().narrow(2, i * WIDTH, WIDTH))
}

impl Block {
    fn attention(&self, z: Tensor<2>, fuse: &mut dyn Fuse) -> Result<Tensor<2>> {
        let rows = z.dims()[0];
        let [q, k, v] = &self.qkv;
        let mut outputs = [q, k, v].map(|layer| (layer.name.as_str(), layer.forward(z.clone())));
        fuse.fuse(&z, &mut outputs)?;
        let per_head = WIDTH / HEADS;
        let heads =
            |(_, x): (&str, Tensor<2>)| x.reshape([rows / TOKENS, TOKENS, HEADS, per_head]).swap_dims(1, 2);
        let [q, k, v] = outputs.map(heads);
        let scores = q.matmul(k.swap_dims(2, 3)) / (per_head as f32).sqrt();
        let o = softmax(scores, 3).matmul(v).swap_dims(1, 2).reshape([rows, WIDTH]);
        fused(&self.out, o, fuse)
    }

    fn feed_forward(&self, z: Tensor<2>, fuse: &mut dyn Fuse) -> Result<Tensor<2>> {
        let up = gelu_approximate(fused(&self.up, z, fuse)?);
        fused(&self.down, up, fuse)
    }
}

fn fused(layer: &Linear, x: Tensor<2>, fuse: &mut dyn Fuse) -> Result<Tensor<2>> {
    let mut output = [(layer.name.as_str(), layer.forward(x.clone()))];
    fuse.fuse(&x, &mut output)?;
    let [(_, y)] = output;
    Ok(y)
}
