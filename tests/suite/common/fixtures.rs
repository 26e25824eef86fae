//! The DigitDiT fixtures in `tests/data`, and SSR in plain f64 to compare with.

use std::path::{Path, PathBuf};

use loraweld::{Adapter, Calibration, Control, Device, Layer, Matrix, RawMatrix, Source, Weighted};
use safetensors::SafeTensors;

use crate::common::product;

/// The adapters of the references, in their order.
pub const POOL: [&str; 4] =
    ["concept_c3_mirror", "concept_c7_rot90", "concept_c1_thick", "concept_c4_invert"];

pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

pub fn adapter(name: &str) -> Adapter {
    let path = data(&format!("loras/{name}.safetensors"));
    Adapter::open(path).unwrap()
}

pub fn pool() -> Vec<Adapter> {
    POOL.iter().map(|name| adapter(name)).collect()
}

pub fn at_one(adapters: &[Adapter]) -> Vec<Weighted<'_>> {
    adapters.iter().map(|adapter| adapter.at(1.0)).collect()
}

pub fn activations(set: &str, task: &str) -> PathBuf {
    data(&format!("activations/{set}/{task}.safetensors"))
}

/// A calibration of these adapters by the activations of these names.
pub fn calibrated(device: &Device, adapters: &[Adapter], set: &str, tasks: &[&str]) -> Calibration {
    let mut calibration = Calibration::new(adapters).unwrap();
    for (i, task) in tasks.iter().enumerate() {
        let path = activations(set, task);
        calibration.accumulate_path(device, Source::Task(i), &path, &Control::default()).unwrap();
    }
    calibration
}

/// A safetensors file in memory.
pub struct Tensors(Vec<u8>);

impl Tensors {
    pub fn open(path: impl AsRef<Path>) -> Self {
        Self(std::fs::read(path).unwrap())
    }

    /// A matrix of any float type, or a scalar as 1 x 1.
    pub fn get(&self, key: &str) -> Matrix {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(key).unwrap_or_else(|e| panic!("{key}: {e}"));
        let f32_of = |bits: u32| f64::from(f32::from_bits(bits));
        let bytes = tensor.data();
        let values: Vec<f64> = match tensor.dtype() {
            safetensors::Dtype::F64 => {
                bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
            }
            safetensors::Dtype::I64 => {
                bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect()
            }
            safetensors::Dtype::F32 => {
                bytes.chunks_exact(4).map(|b| f32_of(u32::from_le_bytes(b.try_into().unwrap()))).collect()
            }
            safetensors::Dtype::BF16 => bytes
                .chunks_exact(2)
                .map(|b| f32_of(u32::from(u16::from_le_bytes(b.try_into().unwrap())) << 16))
                .collect(),
            other => panic!("{key}: {other:?}"),
        };
        let shape = tensor.shape();
        let rows = shape.first().copied().unwrap_or(1);
        Matrix::new(rows, values.len() / rows, values).unwrap()
    }

    pub fn names(&self) -> Vec<String> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        file.names().into_iter().map(|name| name.to_owned()).collect()
    }
}

pub fn wide(m: RawMatrix<'_>) -> Matrix {
    Matrix::new(m.rows(), m.cols(), m.to_vec()).unwrap()
}

/// scale · B · A.
pub fn delta(layer: &Layer) -> Matrix {
    let mut delta = product(&wide(layer.b()), &wide(layer.a()));
    delta.data_mut().iter_mut().for_each(|v| *v *= layer.scale().value);
    delta
}

/// How the plain SSR is to weigh things; the fields are those of the formula in methods.md.
#[derive(Clone)]
pub struct Formula {
    pub absolute: Option<f64>,
    pub relative: f64,
    pub prior_weight: f64,
    /// R₀ = toward · I.
    pub toward: f64,
    pub weights: Vec<f64>,
    pub balance: f64,
    pub neutral: Option<(&'static str, f64)>,
    pub data_free: bool,
    /// The weight of inputs from anywhere in the data-free statistics.
    pub isotropic: f64,
    /// The coordinates of the files' own A.
    pub files: bool,
}

impl Formula {
    /// The default of this crate for k adapters.
    pub fn default_of(k: usize) -> Self {
        Self {
            absolute: None,
            relative: 1e-3,
            prior_weight: 0.03,
            toward: 1.0,
            weights: vec![1.0; k],
            balance: 0.0,
            neutral: None,
            data_free: false,
            isotropic: 0.3,
            files: false,
        }
    }
}

/// One layer's statistics and factors in f64.
pub struct Plain {
    pub a: Matrix,
    pub b: Matrix,
    pub blocks: Vec<std::ops::Range<usize>>,
    pub grams: Vec<Matrix>,
    pub tokens: Vec<f64>,
    pub tasks: Vec<String>,
}

/// The stored layer whose inputs this one reads.
pub fn stored(layer: &str) -> String {
    layer.replace("to_k", "to_q").replace("to_v", "to_q")
}

pub fn plain_gram(a: &Matrix, set: &str, task: &str, layer: &str) -> (Matrix, f64) {
    let x = Tensors::open(activations(set, task)).get(&stored(layer));
    let z = product(&x, &a.transposed());
    (product(&z.transposed(), &z), x.rows() as f64)
}

pub fn plain(adapters: &[Weighted<'_>], set: &str, tasks: &[&str], layer: &str) -> Plain {
    let layers: Vec<_> = adapters.iter().map(|w| (w.adapter.find(layer).unwrap(), w.strength)).collect();
    let rank: usize = layers.iter().map(|(l, _)| l.rank()).sum();
    let (mut a, mut b) =
        (Matrix::zeros(rank, layers[0].0.input()), Matrix::zeros(layers[0].0.output(), rank));
    let (mut blocks, mut start) = (Vec::new(), 0);
    for (l, strength) in layers {
        let (la, lb) = (wide(l.a()), wide(l.b()));
        for k in 0..l.rank() {
            for j in 0..la.cols() {
                a[(start + k, j)] = la[(k, j)];
            }
            for i in 0..lb.rows() {
                b[(i, start + k)] = lb[(i, k)] * l.scale().value * strength;
            }
        }
        blocks.push(start..start + l.rank());
        start += l.rank();
    }
    let (grams, tokens) = tasks.iter().map(|task| plain_gram(&a, set, task, layer)).unzip();
    let tasks = tasks.iter().map(|task| (*task).to_owned()).collect();
    Plain { a, b, blocks, grams, tokens, tasks }
}

impl Plain {
    /// `B_cat·R*·A_cat`.
    pub fn merged(&self, set: &str, layer: &str, formula: &Formula) -> Matrix {
        if !formula.files {
            let files = Formula { files: true, ..formula.clone() };
            return self.orthonormal(set, layer).merged_here(set, layer, &files, formula.data_free);
        }
        self.merged_here(set, layer, formula, false)
    }

    fn merged_here(&self, set: &str, layer: &str, formula: &Formula, isotropic: bool) -> Matrix {
        product(&product(&self.b, &self.router(set, layer, formula, isotropic)), &self.a)
    }

    /// The same updates and inputs, by factors of which each A has orthonormal rows (Gram and Schmidt, twice).
    pub fn orthonormal(&self, set: &str, layer: &str) -> Self {
        let (mut a, mut b) = (self.a.clone(), self.b.clone());
        for block in &self.blocks {
            for _ in 0..2 {
                for i in block.clone() {
                    for j in block.start..i {
                        let along: f64 = (0..a.cols()).map(|c| a[(i, c)] * a[(j, c)]).sum();
                        (0..a.cols()).for_each(|c| a[(i, c)] -= along * a[(j, c)]);
                        (0..b.rows()).for_each(|r| b[(r, j)] += along * b[(r, i)]);
                    }
                    let norm = (0..a.cols()).map(|c| a[(i, c)].powi(2)).sum::<f64>().sqrt();
                    (0..a.cols()).for_each(|c| a[(i, c)] /= norm);
                    (0..b.rows()).for_each(|r| b[(r, i)] *= norm);
                }
            }
        }
        let grams = self.tasks.iter().map(|task| plain_gram(&a, set, task, layer).0).collect();
        Self {
            a,
            b,
            grams,
            blocks: self.blocks.clone(),
            tokens: self.tokens.clone(),
            tasks: self.tasks.clone(),
        }
    }

    fn router(&self, set: &str, layer: &str, formula: &Formula, isotropic: bool) -> Matrix {
        let n = self.a.rows();
        // The data-free statistics, each at trace 1 or with inputs from anywhere.
        let c = product(&self.a, &self.a.transposed());
        let free: Vec<Matrix> = self
            .blocks
            .iter()
            .map(|block| {
                let part = Matrix::from_fn(n, block.len(), |i, j| c[(i, block.start + j)]);
                let g = product(&part, &part.transposed());
                let t = trace(&g);
                match isotropic {
                    true => Matrix::from_fn(n, n, |i, j| g[(i, j)] + formula.isotropic * c[(i, j)]),
                    false => Matrix::from_fn(n, n, |i, j| g[(i, j)] / t),
                }
            })
            .collect();
        let mut w = formula.weights.clone();
        let grams = if formula.data_free { &free } else { &self.grams };
        if formula.balance != 0.0 {
            let bb = product(&self.b.transposed(), &self.b);
            let e: Vec<f64> = (0..w.len())
                .map(|k| {
                    let block = self.blocks[k].clone();
                    let pairs = block.clone().flat_map(|i| block.clone().map(move |j| (i, j)));
                    let energy: f64 = pairs.map(|at| bb[at] * grams[k][at]).sum();
                    (energy / if formula.data_free { 1.0 } else { self.tokens[k] }).powf(-formula.balance)
                })
                .collect();
            let mean = e.iter().sum::<f64>() / e.len() as f64;
            w.iter_mut().zip(e).for_each(|(w, e)| *w *= e / mean);
        }
        let sum = |grams: &[Matrix], w: &[f64]| {
            let (mut g, mut q) = (Matrix::zeros(n, n), Matrix::zeros(n, n));
            for ((gram, w), block) in grams.iter().zip(w).zip(&self.blocks) {
                for i in 0..n {
                    for j in 0..n {
                        g[(i, j)] += w * gram[(i, j)];
                        if block.contains(&i) {
                            q[(i, j)] = w * gram[(i, j)];
                        }
                    }
                }
            }
            (g, q)
        };
        let (mut g, mut q) = sum(grams, &w);
        if let Some((task, w)) = formula.neutral {
            let (neutral, _) = plain_gram(&self.a, set, task, layer);
            g.data_mut().iter_mut().zip(neutral.data()).for_each(|(g, n)| *g += w * n);
        }
        let tokens: f64 = w.iter().zip(&self.tokens).map(|(w, n)| w * n).sum();
        // As methods.md has it: everything over tr(G), which an absolute ridge has to follow.
        let unit = trace(&g);
        let (g_free, q_free) = sum(&free, &vec![1.0; free.len()]);
        let prior = if formula.data_free { 0.0 } else { formula.prior_weight / trace(&g_free) };
        let mix = |m: &mut Matrix, f: &Matrix| {
            m.data_mut().iter_mut().zip(f.data()).for_each(|(m, f)| *m = *m / unit + prior * f);
        };
        mix(&mut g, &g_free);
        mix(&mut q, &q_free);
        let ridge = match formula.absolute {
            Some(ridge) => ridge * tokens / unit,
            None => formula.relative * trace(&g) / n as f64,
        };
        for i in 0..n {
            g[(i, i)] += ridge;
            q[(i, i)] += ridge * formula.toward;
        }
        solve(g, q)
    }
}

pub fn trace(m: &Matrix) -> f64 {
    (0..m.rows()).map(|i| m[(i, i)]).sum()
}

/// R of R·M = Q for symmetric M, by elimination with pivots.
pub fn solve(mut m: Matrix, q: Matrix) -> Matrix {
    let mut x = q.transposed();
    let (n, width) = (m.rows(), x.cols());
    for k in 0..n {
        let pivot = (k..n).max_by(|&i, &j| m[(i, k)].abs().total_cmp(&m[(j, k)].abs())).unwrap();
        for j in 0..n {
            m.data_mut().swap(k * n + j, pivot * n + j);
        }
        for j in 0..width {
            x.data_mut().swap(k * width + j, pivot * width + j);
        }
        for i in k + 1..n {
            let f = m[(i, k)] / m[(k, k)];
            if f != 0.0 {
                for j in k..n {
                    m[(i, j)] -= f * m[(k, j)];
                }
                for j in 0..x.cols() {
                    x[(i, j)] -= f * x[(k, j)];
                }
            }
        }
    }
    for k in (0..n).rev() {
        for j in 0..x.cols() {
            let mut v = x[(k, j)];
            for i in k + 1..n {
                v -= m[(k, i)] * x[(i, j)];
            }
            x[(k, j)] = v / m[(k, k)];
        }
    }
    x.transposed()
}
