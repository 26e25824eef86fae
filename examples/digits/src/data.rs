//! The model, the judges, the digits and the adapters, from files of this folder and of the tests.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use loraweld::Adapter;
use safetensors::{Dtype, SafeTensors};

/// Side of an image.
pub const SIDE: usize = 8;
/// Values of an image.
pub const PIXELS: usize = SIDE * SIDE;

/// Where the files are, in a checkout of loraweld.
#[derive(Clone, Debug)]
pub struct Data {
    own: PathBuf,
    loras: PathBuf,
}

impl Data {
    /// `root`: a checkout of loraweld; `None`: the one that this was compiled in.
    pub fn new(root: Option<&Path>) -> Self {
        let compiled = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let root = root.map_or_else(compiled, Path::to_owned);
        Self { own: root.join("examples/digits/data"), loras: root.join("tests/data/loras") }
    }

    /// A file of this example's data.
    pub fn file(&self, name: &str) -> Result<Tensors> {
        Tensors::open(&self.own.join(format!("{name}.safetensors")))
    }

    /// An adapter of the tests' data.
    pub fn adapter(&self, name: &str) -> Result<Adapter> {
        Ok(Adapter::open(self.loras.join(format!("{name}.safetensors")))?)
    }
}

/// A file's tensors, widened to f32.
pub struct Tensors(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl Tensors {
    fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path)
            .with_context(|| format!("{}: `--data` should name a checkout of loraweld", path.display()))?;
        let file = SafeTensors::deserialize(&bytes).with_context(|| path.display().to_string())?;
        let widen = |(name, tensor): (String, safetensors::tensor::TensorView<'_>)| {
            let values = match tensor.dtype() {
                Dtype::F32 => bytemuck::pod_collect_to_vec(tensor.data()),
                Dtype::F16 => {
                    let half: Vec<u16> = bytemuck::pod_collect_to_vec(tensor.data());
                    half.into_iter().map(|bits| half::f16::from_bits(bits).to_f32()).collect()
                }
                Dtype::I64 => {
                    let whole: Vec<i64> = bytemuck::pod_collect_to_vec(tensor.data());
                    whole.into_iter().map(|v| v as f32).collect()
                }
                other => bail!("{}: `{name}` is of type {other:?}", path.display()),
            };
            Ok((name, (tensor.shape().to_vec(), values)))
        };
        Ok(Self(file.tensors().into_iter().map(widen).collect::<Result<_>>()?))
    }

    /// A tensor's shape and values.
    pub fn get<const D: usize>(&self, name: &str) -> Result<([usize; D], &[f32])> {
        let (shape, values) = self.0.get(name).with_context(|| format!("there is no tensor `{name}`"))?;
        let shape = shape.as_slice().try_into();
        Ok((shape.with_context(|| format!("`{name}` should have {D} dimensions"))?, values))
    }
}

/// Images of [`PIXELS`] values in −1..1, and the digits that they show.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// Image after image.
    pub pixels: Vec<f32>,
    /// Of each image.
    pub labels: Vec<usize>,
}

impl Images {
    /// The held-out digits.
    pub fn digits(data: &Data) -> Result<Self> {
        let file = data.file("images")?;
        let (_, pixels) = file.get::<4>("images")?;
        let (_, labels) = file.get::<1>("labels")?;
        ensure!(pixels.len() == labels.len() * PIXELS, "images and labels differ in number");
        Ok(Self { pixels: pixels.to_vec(), labels: labels.iter().map(|&label| label as usize).collect() })
    }

    /// Hearts, the subject of `content_heart`, which took the place of class 2.
    pub fn hearts(data: &Data) -> Result<Self> {
        let file = data.file("images")?;
        let (shape, pixels) = file.get::<4>("hearts")?;
        Ok(Self { pixels: pixels.to_vec(), labels: vec![2; shape[0]] })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// One image.
    pub fn image(&self, i: usize) -> &[f32] {
        &self.pixels[i * PIXELS..(i + 1) * PIXELS]
    }

    /// Those of these classes, at most so many of each.
    pub fn of(&self, classes: &[usize], each: usize) -> Self {
        let mut some = Self::default();
        for &class in classes {
            for i in (0..self.len()).filter(|&i| self.labels[i] == class).take(each) {
                some.pixels.extend_from_slice(self.image(i));
                some.labels.push(class);
            }
        }
        some
    }

    /// Each image changed.
    pub fn map(&self, change: impl Fn(&[f32]) -> Vec<f32>) -> Self {
        let images = self.pixels.chunks_exact(PIXELS);
        Self { pixels: images.flat_map(change).collect(), labels: self.labels.clone() }
    }
}

fn at(image: &[f32], row: usize, column: usize) -> f32 {
    image[row * SIDE + column]
}

fn drawn(pixel: impl Fn(usize, usize) -> f32) -> Vec<f32> {
    (0..PIXELS).map(|i| pixel(i / SIDE, i % SIDE)).collect()
}

/// What `style_shade` teaches: bright ink on a background that runs diagonally from −0.9 to 0.4.
pub fn shaded(image: &[f32]) -> Vec<f32> {
    drawn(|row, column| {
        let background = -0.9 + 1.3 * (row + column) as f32 / (2 * SIDE - 2) as f32;
        let ink = ((at(image, row, column) + 1.0) / 2.0).clamp(0.0, 1.0);
        background * (1.0 - ink) + ink
    })
}

/// A concept: an adapter, its class, and what it makes of it.
pub struct Concept {
    /// The adapter's file.
    pub adapter: &'static str,
    /// The digit that it changes.
    pub class: usize,
    /// How the classifier calls what it makes.
    pub shown: usize,
    /// What it makes of an image.
    pub change: fn(&[f32]) -> Vec<f32>,
}

/// The four concepts.
pub const CONCEPTS: [Concept; 4] = [
    Concept {
        adapter: "concept_c3_mirror",
        class: 3,
        shown: 10,
        change: |image| drawn(|row, column| at(image, row, SIDE - 1 - column)),
    },
    Concept {
        adapter: "concept_c7_rot90",
        class: 7,
        shown: 11,
        change: |image| drawn(|row, column| at(image, column, SIDE - 1 - row)),
    },
    Concept {
        adapter: "concept_c1_thick",
        class: 1,
        shown: 12,
        change: |image| {
            drawn(|row, column| {
                let near = |i: usize| i.saturating_sub(1)..=(i + 1).min(SIDE - 1);
                near(row)
                    .flat_map(|y| near(column).map(move |x| (y, x)))
                    .map(|(y, x)| at(image, y, x))
                    .fold(f32::MIN, f32::max)
            })
        },
    },
    Concept {
        adapter: "concept_c4_invert",
        class: 4,
        shown: 13,
        change: |image| image.iter().map(|v| -v).collect(),
    },
];

/// Normal numbers that are the same everywhere.
pub struct Noise(u64);

impl Noise {
    /// Of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn uniform(&mut self) -> f64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// So many.
    pub fn take(&mut self, count: usize) -> Vec<f32> {
        let pair = |_| {
            let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
            let angle = std::f64::consts::TAU * self.uniform();
            [(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]
        };
        let mut values: Vec<f32> = (0..count.div_ceil(2)).flat_map(pair).collect();
        values.truncate(count);
        values
    }
}
