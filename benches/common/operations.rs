//! Operations that more than one bench times.

use loraweld::compute::ops::{accumulate, solve};
use loraweld::compute::{Batch, Element, Shape};
use loraweld::{Device, Dtype, Matrix};
use rayon::prelude::*;

use super::{Input, Rate, Target, Work, matrix, relative};

/// `G += (X·Aᵀ)ᵀ(X·Aᵀ)` of several layers in one call, as a calibration sends them.
pub struct Accumulation<'a> {
    target: &'a Target,
    inputs: &'a [Input],
    a: Batch,
    sums: Batch,
    /// The A of each layer.
    exact: Matrix,
    /// Layers that read one input.
    sharing: usize,
    /// The input of the first layer.
    first: usize,
}

impl<'a> Accumulation<'a> {
    /// Layers take turns at the inputs, from call to call; A is of f32.
    pub fn new(target: &'a Target, inputs: &'a [Input], layers: usize, rank: usize) -> Self {
        Self::of(target, inputs, layers, rank, 1, Dtype::F32)
    }

    /// `sharing` layers read each input, as q, k and v do, and A holds values of a type.
    pub fn of(
        target: &'a Target,
        inputs: &'a [Input],
        layers: usize,
        rank: usize,
        sharing: usize,
        dtype: Dtype,
    ) -> Self {
        let exact = Self::a(rank, inputs[0].width, dtype);
        let a = vec![exact.clone(); layers];
        let a = Batch::upload(&target.device, target.device.factor(), &a).expect("A");
        Self { target, inputs, sums: Self::sums(&target.device, layers, rank), a, exact, sharing, first: 0 }
    }

    fn a(rank: usize, width: usize, dtype: Dtype) -> Matrix {
        let a: Matrix = matrix(rank, width, 2, 1.0);
        match dtype {
            Dtype::F32 => a,
            Dtype::F16 => a.map(|v| half::f16::from_f64(v).to_f64()),
            Dtype::Bf16 => a.map(|v| half::bf16::from_f64(v).to_f64()),
        }
    }

    fn sums(device: &Device, layers: usize, rank: usize) -> Batch {
        Batch::zeros(device, device.sum(), &vec![Shape::new(rank, rank); layers]).expect("sums")
    }

    pub fn run(&mut self) {
        let turns = self.a.len().div_ceil(self.sharing);
        let views = self.inputs.iter().map(Input::view).cycle().skip(self.first).take(turns);
        let views = views.flat_map(|view| std::iter::repeat_n(view, self.sharing)).take(self.a.len());
        let views: Vec<_> = views.enumerate().collect();
        self.first = (self.first + turns) % self.inputs.len();
        // Layers that meet in a call must not read one input by chance: they would be computed as one.
        for some in views.chunks(self.inputs.len() * self.sharing) {
            accumulate(&self.target.device, some, &self.a, &mut self.sums).expect("accumulate");
        }
    }

    /// The relative error of the first layer's G against f64.
    pub fn error(&mut self) -> f64 {
        let rank = self.a.shapes()[0].rows;
        self.sums = Self::sums(&self.target.device, self.a.len(), rank);
        self.first = 0;
        self.run();
        let got = self.sums.download(&self.target.device).expect("sums");
        let (cpu, x) = (Device::cpu(), self.inputs[0].on_host());
        let a = Batch::upload(&cpu, Element::Host, std::slice::from_ref(&self.exact)).expect("A");
        let mut want = Self::sums(&cpu, 1, rank);
        accumulate(&cpu, &[(0, x.view())], &a, &mut want).expect("accumulate");
        relative(&got[0], &want.download(&cpu).expect("sums")[0])
    }

    /// One layer of it: X and A are read once; the second product is a triangle.
    pub fn work(&self) -> Work {
        let (x, rank) = (&self.inputs[0], self.a.shapes()[0].rows);
        let (tokens, width) = (x.tokens, x.width);
        let flops = tokens * rank * (2 * width + rank + 1);
        Work {
            work: "accumulate",
            shape: format!("d{width} r{rank} n{tokens}"),
            variant: x.dtype.to_string(),
            bytes: (x.byte_len() + 4 * width * rank + 8 * rank * rank) as f64,
            flops: vec![(self.target.products(), flops as f64)],
            calls: self.a.len(),
            ..Default::default()
        }
    }
}

/// Symmetric, positive definite systems `R·G = Q` of one order, each its own, on a device.
pub struct Systems<'a> {
    target: &'a Target,
    g: Batch,
    q: Batch,
    order: usize,
}

impl<'a> Systems<'a> {
    pub fn new(target: &'a Target, count: usize, order: usize) -> Self {
        let upload = |of: fn(usize, u64) -> Matrix| {
            let matrices: Vec<Matrix> = (0..count as u64).into_par_iter().map(|i| of(order, i)).collect();
            Batch::upload(&target.device, target.device.sum(), &matrices).expect("systems")
        };
        Self {
            target,
            g: upload(positive),
            q: upload(|order, i| matrix(order, order, 1_000 + i, 1.0)),
            order,
        }
    }

    /// R of all, in one factorisation and one solve; G and Q are copied first.
    pub fn solve(&self) -> Batch {
        let copy = |batch: &Batch| batch.duplicate(&self.target.device).expect("a copy");
        let (mut g, mut q) = (copy(&self.g), copy(&self.q));
        let pivots = solve(&self.target.device, &mut g, &mut q).expect("a solution");
        assert!(pivots.iter().all(Result::is_ok), "positive definite systems");
        q
    }

    /// The largest `‖R·G − Q‖ / (‖R‖·‖G‖ + ‖Q‖)` of a few of the systems.
    pub fn residual(&self) -> f64 {
        let download = |batch: &Batch| batch.download(&self.target.device).expect("matrices");
        let [g, q, r] = [&self.g, &self.q, &self.solve()].map(download);
        let few = (0..g.len()).step_by((g.len() / 4).max(1));
        few.map(|i| residual(&g[i], &q[i], &r[i])).fold(0.0, f64::max)
    }

    /// G and Q are read, R is written.
    pub fn work(&self) -> Work {
        let (count, n) = (self.g.len() as f64, self.order as f64);
        let (rate, variant) = match self.g.element() {
            Element::DoubleSingle => (Rate::F32, "double-single"),
            _ => (Rate::F64, "f64"),
        };
        Work {
            work: "solve",
            shape: format!("{count}x{n}"),
            variant: variant.to_owned(),
            bytes: count * 3.0 * 8.0 * n * n,
            flops: vec![(rate, count * n.powi(3) * (2.0 + 1.0 / 3.0))],
            calls: 1,
            ..Default::default()
        }
    }
}

fn positive(order: usize, seed: u64) -> Matrix {
    let mut m: Matrix = matrix(order, order, seed, 1.0);
    for i in 0..order {
        for j in 0..i {
            m[(i, j)] = m[(j, i)];
        }
        m[(i, i)] += order as f64;
    }
    m
}

fn residual(g: &Matrix, q: &Matrix, r: &Matrix) -> f64 {
    let norm = |m: &Matrix| m.data().iter().map(|v| v * v).sum::<f64>().sqrt();
    let mut rest = q.clone();
    rest.data_mut().par_chunks_mut(q.cols()).enumerate().for_each(|(i, row)| {
        for (k, v) in r.row(i).iter().enumerate() {
            row.iter_mut().zip(g.row(k)).for_each(|(rest, g)| *rest -= v * g);
        }
    });
    norm(&rest) / (norm(r) * norm(g) + norm(q))
}
