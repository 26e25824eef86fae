//! Parity of every operation with plain f64, on the CPU and in every tier of the GPU.

use crate::common::{Case, Random, devices, gpus, product, relative};
use loraweld::compute::ops::{
    Activations, Axis, Factor, accumulate, cholesky, cholesky_solve, gram, matmul, project, rank_concat,
    solve,
};
use loraweld::compute::{Batch, Device, DeviceOptions, Element, Precision, Select, Shape};
use loraweld::{Dtype, Matrix, RawMatrix};

/// Relative error that a product may have: the kernel's f32 path is held to 2e-6 everywhere, the wide
/// tiers to what they carry.
fn product_tolerance(case: &Case) -> f64 {
    match case.device.product() {
        Element::F32 => 2e-6,
        // Double-single carries 47 bits; a sum of 1e4 terms loses a few.
        Element::DoubleSingle => 1e-11,
        Element::F64 | Element::Host => 1e-13,
    }
}

/// Values in a file's type.
struct Stored {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Stored {
    fn new(m: &Matrix, dtype: Dtype) -> Self {
        let bytes = m
            .data()
            .iter()
            .flat_map(|&v| match dtype {
                Dtype::F32 => (v as f32).to_le_bytes().to_vec(),
                Dtype::F16 => half::f16::from_f64(v).to_le_bytes().to_vec(),
                Dtype::Bf16 => half::bf16::from_f64(v).to_le_bytes().to_vec(),
            })
            .collect();
        Self { dtype, rows: m.rows(), cols: m.cols(), bytes }
    }

    fn raw(&self) -> RawMatrix<'_> {
        RawMatrix::new(self.dtype, self.rows, self.cols, &self.bytes).expect("a whole matrix")
    }

    /// The values after rounding to the type.
    fn exact(&self) -> Matrix {
        Matrix::new(self.rows, self.cols, self.raw().to_vec()).unwrap()
    }
}

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// tokens, rank, width: 1, primes, multiples of the tiles and one more or less, empty, rank over width.
const SHAPES: [(usize, usize, usize); 22] = [
    (1, 1, 1),
    (2, 1, 3),
    (7, 5, 13),
    (16, 16, 16),
    (17, 31, 15),
    (64, 32, 128),
    (127, 33, 64),
    (128, 64, 256),
    (129, 65, 257),
    (131, 97, 211),
    (200, 128, 300),
    (300, 130, 1023),
    (3, 40, 7),
    (0, 4, 8),
    (5, 0, 8),
    (33, 257, 48),
    // Enough tokens for matrix units, where there are any.
    (300, 40, 264),
    (257, 140, 136),
    (513, 12, 72),
    // Ranks that fill their wide tiles.
    (300, 200, 264),
    (257, 256, 136),
    (320, 250, 72),
];

#[test]
fn rank_concat_copies_exactly() {
    let mut random = Random(1);
    let ranks = [3, 1, 0, 8];
    // 4099 columns make a factor longer than one workgroup's chunk.
    let widths = [1, 13, 128, 4099];
    for case in devices() {
        for axis in [Axis::Rows, Axis::Columns] {
            let stored: Vec<Vec<Stored>> = widths
                .iter()
                .map(|&width| {
                    ranks
                        .iter()
                        .enumerate()
                        .map(|(i, &rank)| {
                            let m = match axis {
                                Axis::Rows => random.matrix(rank, width, 1.0),
                                Axis::Columns => random.matrix(width, rank, 1.0),
                            };
                            Stored::new(&m, DTYPES[i % 3])
                        })
                        .collect()
                })
                .collect();
            // Powers of two scale exactly.
            let scales = [1.0, -0.5, 3.0, 2.0];
            let factors: Vec<Vec<Factor>> = stored
                .iter()
                .map(|row| {
                    row.iter().zip(scales).map(|(s, scale)| Factor { matrix: s.raw(), scale }).collect()
                })
                .collect();
            let jobs: Vec<&[Factor]> = factors.iter().map(Vec::as_slice).collect();
            let joined = rank_concat(&case.device, axis, &jobs).unwrap();
            for ((row, got), width) in stored.iter().zip(joined.download(&case.device).unwrap()).zip(widths) {
                let mut first = 0;
                for (part, scale) in row.iter().zip(scales) {
                    let want = part.exact();
                    for i in 0..want.rows() {
                        for j in 0..want.cols() {
                            let place = if axis == Axis::Rows { (first + i, j) } else { (i, first + j) };
                            assert_eq!(got[place], want[(i, j)] * f64::from(scale), "{}: {width}", case.name);
                        }
                    }
                    first += if axis == Axis::Rows { part.rows } else { part.cols };
                }
                assert_eq!(first, if axis == Axis::Rows { got.rows() } else { got.cols() });
            }
        }
    }
}

#[test]
fn rank_concat_refuses_different_widths() {
    let (a, b) = ([0.0f32; 6], [0.0f32; 8]);
    let factors = [
        Factor::new(RawMatrix::from_f32(2, 3, &a).unwrap()),
        Factor::new(RawMatrix::from_f32(2, 4, &b).unwrap()),
    ];
    for case in devices() {
        let error = rank_concat(&case.device, Axis::Rows, &[&factors]).unwrap_err().to_string();
        assert!(error.contains("3 and 4"), "{error}");
    }
}

#[test]
fn project_and_gram_match_f64_over_hard_shapes() {
    let mut random = Random(2);
    let stored: Vec<(Stored, Stored)> = SHAPES
        .iter()
        .enumerate()
        .map(|(i, &(tokens, rank, width))| {
            let x = Stored::new(&random.matrix(tokens, width, 3.0), DTYPES[i % 3]);
            (x, Stored::new(&random.matrix(rank, width, 0.1), Dtype::F32))
        })
        .collect();
    let x: Vec<RawMatrix> = stored.iter().map(|(x, _)| x.raw()).collect();
    let a_exact: Vec<Matrix> = stored.iter().map(|(_, a)| a.exact()).collect();
    let want: Vec<Matrix> =
        stored.iter().map(|(x, a)| product(&x.exact(), &a.exact().transposed())).collect();
    for case in devices() {
        let device = &case.device;
        let tolerance = product_tolerance(&case);
        let a = Batch::upload(device, device.factor(), &a_exact).unwrap();
        let z = project(device, &x, &a).unwrap();
        for ((got, want), shape) in z.download(device).unwrap().iter().zip(&want).zip(SHAPES) {
            let error = relative(got, want);
            assert!(error <= tolerance, "{}: project {shape:?}: {error:.1e}", case.name);
        }
        let shapes: Vec<_> = SHAPES.iter().map(|s| Shape::new(s.1, s.1)).collect();
        let mut sums = Batch::zeros(device, device.sum(), &shapes).unwrap();
        // Twice, so that a kernel that overwrites instead of adding is caught.
        gram(device, &z, &mut sums).unwrap();
        gram(device, &z, &mut sums).unwrap();
        for ((got, z), shape) in sums.download(device).unwrap().iter().zip(&want).zip(SHAPES) {
            let mut twice = product(&z.transposed(), z);
            twice.data_mut().iter_mut().for_each(|v| *v *= 2.0);
            let error = relative(got, &twice);
            assert!(error <= 2.0 * tolerance, "{}: gram {shape:?}: {error:.1e}", case.name);
            assert_eq!(got, &got.transposed(), "{}: gram {shape:?} is not symmetric", case.name);
        }
        // The fused form: the same sums from activations, in one call and one by one.
        let inputs: Vec<(usize, Activations)> =
            x.iter().enumerate().map(|(i, x)| (i, Activations::Host(*x))).collect();
        let mut sums = Batch::zeros(device, device.sum(), &shapes).unwrap();
        accumulate(device, &inputs, &a, &mut sums).unwrap();
        for input in inputs.iter().rev() {
            accumulate(device, &[*input], &a, &mut sums).unwrap();
        }
        for ((got, z), shape) in sums.download(device).unwrap().iter().zip(&want).zip(SHAPES) {
            let mut twice = product(&z.transposed(), z);
            twice.data_mut().iter_mut().for_each(|v| *v *= 2.0);
            let error = relative(got, &twice);
            assert!(error <= 2.0 * tolerance, "{}: accumulate {shape:?}: {error:.1e}", case.name);
        }
    }
}

#[test]
fn accumulate_reads_every_type_at_every_alignment() {
    let mut random = Random(3);
    for case in devices() {
        let device = &case.device;
        for dtype in DTYPES {
            // Odd widths and odd token counts put rows and the end on half words.
            for (tokens, width) in [(1, 1), (3, 3), (5, 17), (2, 33), (7, 255)] {
                let x = Stored::new(&random.matrix(tokens, width, 1.0), dtype);
                let a_exact = random.matrix(3, width, 1.0);
                let a = Batch::upload(device, device.factor(), std::slice::from_ref(&a_exact)).unwrap();
                let mut sums = Batch::zeros(device, device.sum(), &[Shape::new(3, 3)]).unwrap();
                accumulate(device, &[(0, x.raw().into())], &a, &mut sums).unwrap();
                let z = product(&x.exact(), &a_exact.transposed());
                let want = product(&z.transposed(), &z);
                let error = relative(&sums.download(device).unwrap()[0], &want);
                let tolerance = 2.0 * product_tolerance(&case);
                assert!(error <= tolerance, "{}: {dtype} {tokens}x{width}: {error:.1e}", case.name);
            }
        }
    }
}

/// Sums of one X for several A, in one call, and the exact ones.
fn sums_of_one_input(device: &Device, x: &Stored, a_exact: &[Matrix]) -> Vec<(Matrix, Matrix)> {
    let a = Batch::upload(device, device.factor(), a_exact).unwrap();
    let shapes: Vec<_> = a_exact.iter().map(|a| Shape::new(a.rows(), a.rows())).collect();
    let mut sums = Batch::zeros(device, device.sum(), &shapes).unwrap();
    let inputs: Vec<(usize, Activations)> = (0..a_exact.len()).map(|i| (i, x.raw().into())).collect();
    accumulate(device, &inputs, &a, &mut sums).unwrap();
    let exact = a_exact.iter().map(|a| {
        let z = product(&x.exact(), &a.transposed());
        product(&z.transposed(), &z)
    });
    sums.download(device).unwrap().into_iter().zip(exact).collect()
}

#[test]
fn layers_that_read_one_input_keep_apart() {
    let mut random = Random(13);
    // On matrix units they are one tall A: ranks that end within a matrix and within a tile, and A of halves beside others.
    for (tokens, width, ranks) in [
        (300, 264, &[32, 5, 16, 1, 130][..]),
        (257, 136, &[4, 4, 4]),
        (320, 72, &[64, 64]),
        (31, 40, &[3, 7]),
    ] {
        for dtype in DTYPES {
            let x = Stored::new(&random.matrix(tokens, width, 3.0), dtype);
            let a_exact: Vec<Matrix> = ranks
                .iter()
                .enumerate()
                .map(|(i, &rank)| {
                    // Each of another magnitude.
                    let a = random.matrix(rank, width, 10f64.powi(3 * i as i32 - 6));
                    Stored::new(&a, if i % 2 == 0 { Dtype::F32 } else { Dtype::Bf16 }).exact()
                })
                .collect();
            for case in devices() {
                for (i, (got, want)) in sums_of_one_input(&case.device, &x, &a_exact).iter().enumerate() {
                    let error = relative(got, want);
                    let tolerance = 2.0 * product_tolerance(&case);
                    assert!(error <= tolerance, "{}: {dtype} {tokens}x{width}, {i}: {error:.1e}", case.name);
                }
            }
        }
    }
}

#[test]
fn quick_statistics_keep_their_bound() {
    let options = |precision| DeviceOptions { select: Select::Gpu, precision, ..Default::default() };
    let Some(Case { device: auto, .. }) = gpus().into_iter().find(|case| case.name == "auto, f64") else {
        return;
    };
    let fast = Device::open(&options(Precision::Fast)).unwrap();
    let mut random = Random(14);
    for (tokens, width, ranks) in
        [(300, 264, &[32, 5, 130][..]), (1024, 512, &[192]), (2048, 768, &[128, 128]), (33, 40, &[8])]
    {
        for dtype in DTYPES {
            let x = Stored::new(&random.matrix(tokens, width, 3.0), dtype);
            let a_exact: Vec<Matrix> = ranks.iter().map(|&rank| random.matrix(rank, width, 0.1)).collect();
            let exact = sums_of_one_input(&auto, &x, &a_exact);
            for ((got, want), (as_auto, _)) in sums_of_one_input(&fast, &x, &a_exact).iter().zip(&exact) {
                let error = relative(got, want);
                // Values of 11 bits are off by 2^-12 at most, two of them in each product, and sums are off by less, since
                // these errors have no common sign.
                let bound = 2.0 * 2f64.powi(-12);
                assert!(error <= bound, "{dtype} {tokens}x{width}, {}: {error:.1e}", got.rows());
                if !fast.capabilities().is_some_and(|c| c.matrix_units()) {
                    assert_eq!(got, as_auto, "without matrix units there is nothing to round");
                }
            }
        }
    }
}

#[test]
fn accumulate_takes_activations_from_a_buffer() {
    let mut random = Random(4);
    for case in gpus() {
        let device = &case.device;
        let (tokens, width, rank) = (300, 96, 20);
        let x = Stored::new(&random.matrix(tokens, width, 1.0), Dtype::Bf16);
        // The activations start in the middle of a larger buffer: a batch serves as one.
        let words: Vec<f64> = std::iter::repeat_n(7.0, 3)
            .chain(
                x.bytes
                    .chunks_exact(4)
                    .map(|b| f64::from(f32::from_bits(u32::from_le_bytes([b[0], b[1], b[2], b[3]])))),
            )
            .collect();
        let holder = Matrix::new(1, words.len(), words).unwrap();
        let holder = Batch::upload(device, Element::F32, &[holder]).unwrap();
        let a_exact = random.matrix(rank, width, 1.0);
        let a = Batch::upload(device, device.factor(), std::slice::from_ref(&a_exact)).unwrap();
        let mut sums = Batch::zeros(device, device.sum(), &[Shape::new(rank, rank)]).unwrap();
        let input = Activations::Buffer {
            buffer: holder.wgpu_buffer().expect("a batch of the GPU"),
            offset: 12,
            dtype: Dtype::Bf16,
            tokens,
            width,
        };
        accumulate(device, &[(0, input)], &a, &mut sums).unwrap();
        let z = product(&x.exact(), &a_exact.transposed());
        let error = relative(&sums.download(device).unwrap()[0], &product(&z.transposed(), &z));
        assert!(error <= 2.0 * product_tolerance(&case), "{}: {error:.1e}", case.name);
    }
}

#[test]
fn a_million_tokens_lose_nothing() {
    // 1,000 batches of 1,000 tokens; the same 8 batches in turn, so that the exact sum is known.
    let mut random = Random(5);
    let (tokens, width, rank) = (1000, 8, 3);
    let batches: Vec<Stored> =
        (0..8).map(|_| Stored::new(&random.matrix(tokens, width, 1.0), Dtype::Bf16)).collect();
    let a_exact = random.matrix(rank, width, 1.0);
    let mut want = Matrix::zeros(rank, rank);
    for batch in &batches {
        let z = product(&batch.exact(), &a_exact.transposed());
        let g = product(&z.transposed(), &z);
        want.data_mut().iter_mut().zip(g.data()).for_each(|(w, g)| *w += 125.0 * g);
    }
    for case in devices() {
        let device = &case.device;
        let a = Batch::upload(device, device.factor(), std::slice::from_ref(&a_exact)).unwrap();
        let mut sums = Batch::zeros(device, device.sum(), &[Shape::new(rank, rank)]).unwrap();
        for i in 0..1000 {
            accumulate(device, &[(0, batches[i % 8].raw().into())], &a, &mut sums).unwrap();
        }
        let error = relative(&sums.download(device).unwrap()[0], &want);
        // A running f32 sum would be at 1e-5 and worse.
        assert!(error <= 1e-6, "{}: {error:.1e}", case.name);
    }
}

/// A symmetric positive definite matrix with condition number `condition`, from random reflections.
fn spd(random: &mut Random, n: usize, condition: f64) -> Matrix {
    let mut m =
        Matrix::from_fn(
            n,
            n,
            |i, j| {
                if i == j { condition.powf(-(i as f64) / (n.max(2) - 1) as f64) } else { 0.0 }
            },
        );
    for _ in 0..3 {
        let v: Vec<f64> = (0..n).map(|_| random.normal()).collect();
        let norm: f64 = v.iter().map(|x| x * x).sum();
        // H·M·H with H = I − 2vvᵀ/vᵀv
        let mv: Vec<f64> = (0..n).map(|i| m.row(i).iter().zip(&v).map(|(a, b)| a * b).sum()).collect();
        let vmv: f64 = mv.iter().zip(&v).map(|(a, b)| a * b).sum();
        for i in 0..n {
            for j in 0..n {
                m[(i, j)] +=
                    -2.0 / norm * (v[i] * mv[j] + mv[i] * v[j]) + 4.0 * vmv / (norm * norm) * v[i] * v[j];
            }
        }
    }
    Matrix::from_fn(n, n, |i, j| 0.5 * (m[(i, j)] + m[(j, i)]))
}

fn frobenius(m: &Matrix) -> f64 {
    m.data().iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// ‖X·A − Q‖ / (‖X‖·‖A‖ + ‖Q‖)
fn residual(x: &Matrix, a: &Matrix, q: &Matrix) -> f64 {
    let mut r = product(x, a);
    r.data_mut().iter_mut().zip(q.data()).for_each(|(r, q)| *r -= q);
    frobenius(&r) / (frobenius(x) * frobenius(a) + frobenius(q))
}

fn solve_tolerance(element: Element) -> f64 {
    match element {
        Element::DoubleSingle => 1e-10,
        _ => 1e-12,
    }
}

/// What a batch holds after rounding to its element type.
fn rounded(device: &loraweld::Device, matrices: &[Matrix]) -> Vec<Matrix> {
    Batch::upload(device, device.sum(), matrices).unwrap().download(device).unwrap()
}

#[test]
fn cholesky_and_solve_leave_small_residuals() {
    let mut random = Random(6);
    let mut systems: Vec<(Matrix, Matrix)> = Vec::new();
    for n in [1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 64, 65, 97, 128, 211, 256] {
        for condition in [1.0, 1e4, 1e10] {
            let rows = [1, 7, n, 65][systems.len() % 4];
            systems.push((spd(&mut random, n, condition), random.matrix(rows, n, 1.0)));
        }
    }
    // Tiny and huge: powers of ten that squares of f32 would lose.
    for scale in [1e-18, 1e18] {
        let (mut a, q) = (spd(&mut random, 20, 1e6), random.matrix(20, 20, 1.0));
        a.data_mut().iter_mut().for_each(|v| *v *= scale);
        systems.push((a, q));
    }
    // Hilbert matrices: what is left of the diagonal falls to 1e-13 within one block.
    for n in [6, 10] {
        systems.push((Matrix::from_fn(n, n, |i, j| 1.0 / (i + j + 1) as f64), random.matrix(130, n, 1.0)));
    }
    check_systems(&systems, devices());
}

#[test]
fn cholesky_and_solve_reach_order_1024() {
    let mut random = Random(7);
    let systems: Vec<_> = [(512, 1e10), (1024, 1e6)]
        .map(|(n, condition)| (spd(&mut random, n, condition), random.matrix(33, n, 1.0)))
        .into();
    // The other cases run the same kernels.
    let cases = devices().into_iter().filter(|c| matches!(c.name, "CPU" | "f64" | "double-single")).collect();
    check_systems(&systems, cases);
}

fn check_systems(systems: &[(Matrix, Matrix)], cases: Vec<Case>) {
    for case in cases {
        let device = &case.device;
        let element = device.sum();
        let (a, q): (Vec<_>, Vec<_>) = systems.iter().cloned().unzip();
        let (a, q) = (rounded(device, &a), rounded(device, &q));
        let mut factors = Batch::upload(device, element, &a).unwrap();
        let status = cholesky(device, &mut factors).unwrap();
        let mut x = Batch::upload(device, element, &q).unwrap();
        cholesky_solve(device, &factors, &mut x).unwrap();
        let (factors, x) = (factors.download(device).unwrap(), x.download(device).unwrap());
        let mut grams = Batch::upload(device, element, &a).unwrap();
        let mut at_once = Batch::upload(device, element, &q).unwrap();
        assert_eq!(solve(device, &mut grams, &mut at_once).unwrap(), status, "{}", case.name);
        assert!(at_once.download(device).unwrap() == x, "{}: without a wait it differs", case.name);
        for (i, x) in x.iter().enumerate() {
            let n = a[i].rows();
            assert_eq!(status[i], Ok(()), "{}: order {n}", case.name);
            let u = &factors[i];
            let below = (0..n).flat_map(|r| (0..r).map(move |c| (r, c))).find(|&place| u[place] != 0.0);
            assert_eq!(below.map(|place| (place, u[place])), None, "{}: U of order {n}", case.name);
            let error = relative(&product(&u.transposed(), u), &a[i]);
            assert!(error <= solve_tolerance(element), "{}: UᵀU, order {n}: {error:.1e}", case.name);
            let error = residual(x, &a[i], &q[i]);
            assert!(error <= solve_tolerance(element), "{}: order {n}: residual {error:.1e}", case.name);
        }
    }
}

#[test]
fn cholesky_reports_what_is_not_positive_definite() {
    let mut random = Random(8);
    let good = spd(&mut random, 40, 1e3);
    let mut indefinite = good.clone();
    indefinite[(23, 23)] = -1.0;
    let mut nan = good.clone();
    nan[(17, 17)] = f64::NAN;
    let mut infinite = good.clone();
    infinite[(3, 3)] = f64::INFINITY;
    // Rank 5 of 20: the sixth pivot vanishes but for rounding.
    let thin = random.matrix(5, 20, 1.0);
    let singular = product(&thin.transposed(), &thin);
    let zero = Matrix::zeros(9, 9);
    for case in devices() {
        let device = &case.device;
        let all = [&good, &indefinite, &nan, &infinite, &singular, &zero, &good].map(Clone::clone);
        let mut batch = Batch::upload(device, device.sum(), &all).unwrap();
        let status = cholesky(device, &mut batch).unwrap();
        let index = |i: usize| status[i].map_err(|e| e.index);
        assert_eq!(index(0), Ok(()), "{}", case.name);
        assert_eq!(index(1), Err(23), "{}", case.name);
        assert_eq!(index(2), Err(17), "{}", case.name);
        assert!(index(3).is_err(), "{}: infinite", case.name);
        assert_eq!(index(4), Err(5), "{}: singular", case.name);
        assert_eq!(index(5), Err(0), "{}: zero", case.name);
        assert_eq!(index(6), Ok(()), "{}: its neighbours must not matter", case.name);
        let factors = batch.download(device).unwrap();
        assert_eq!(factors[0], factors[6], "{}", case.name);

        let mut batch = Batch::upload(device, device.sum(), &all).unwrap();
        let right = all.each_ref().map(|a| Matrix::from_fn(3, a.cols(), |i, j| f64::from(u8::from(i == j))));
        let mut x = Batch::upload(device, device.sum(), &right).unwrap();
        assert_eq!(solve(device, &mut batch, &mut x).unwrap(), status, "{}", case.name);
        let x = x.download(device).unwrap();
        let error = residual(&x[0], &good, &right[0]);
        assert!(error <= solve_tolerance(device.sum()), "{}: beside failures: {error:.1e}", case.name);
        assert_eq!(x[0], x[6], "{}", case.name);
    }
}

#[test]
fn matmul_matches_f64_over_hard_shapes() {
    let mut random = Random(9);
    let b: Vec<Matrix> = SHAPES.iter().map(|&(m, k, _)| random.matrix(m, k, 1.0)).collect();
    let r: Vec<Matrix> = SHAPES.iter().map(|&(_, k, n)| random.matrix(k, n, 1.0)).collect();
    let want: Vec<Matrix> = b.iter().zip(&r).map(|(b, r)| product(b, r)).collect();
    for case in devices() {
        let device = &case.device;
        let b = Batch::upload(device, device.factor(), &b).unwrap();
        let r = Batch::upload(device, device.product(), &r).unwrap();
        let c = matmul(device, &b, &r).unwrap();
        for ((got, want), shape) in c.download(device).unwrap().iter().zip(&want).zip(SHAPES) {
            let error = relative(got, want);
            // The result is a factor, so f32 on every GPU.
            assert!(error <= 2e-6, "{}: matmul {shape:?}: {error:.1e}", case.name);
        }
    }
}

#[test]
fn huge_and_tiny_values_go_through() {
    let mut random = Random(10);
    for case in devices() {
        let device = &case.device;
        // Products of f32 may neither overflow nor underflow to pass: 1e±15 squares to 1e±30.
        for scale in [1e-15, 1e15] {
            let x = Stored::new(&random.matrix(50, 24, scale), Dtype::F32);
            let a_exact = random.matrix(6, 24, 1.0);
            let a = Batch::upload(device, device.factor(), std::slice::from_ref(&a_exact)).unwrap();
            let mut sums = Batch::zeros(device, device.sum(), &[Shape::new(6, 6)]).unwrap();
            accumulate(device, &[(0, x.raw().into())], &a, &mut sums).unwrap();
            let z = product(&x.exact(), &a_exact.transposed());
            let error = relative(&sums.download(device).unwrap()[0], &product(&z.transposed(), &z));
            // Double-single loses low parts under 1e-38, eight digits below the sums of 1e-30.
            let tolerance = if scale < 1.0 { 1e-7 } else { 0.0 } + 2.0 * product_tolerance(&case);
            assert!(error <= tolerance, "{}: scale {scale:e}: {error:.1e}", case.name);
        }
    }
}

#[test]
fn what_is_not_finite_shows() {
    for case in devices() {
        let device = &case.device;
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.0f32; 40 * 8];
            values[77] = bad;
            let x = RawMatrix::from_f32(40, 8, &values).unwrap();
            let ones = Matrix::from_fn(2, 8, |_, _| 1.0);
            let a = Batch::upload(device, device.factor(), &[ones]).unwrap();
            let mut sums = Batch::zeros(device, device.sum(), &[Shape::new(2, 2)]).unwrap();
            accumulate(device, &[(0, x.into())], &a, &mut sums).unwrap();
            let g = &sums.download(device).unwrap()[0];
            assert!(g.data().iter().all(|v| !v.is_finite()), "{}: {bad} gave {:?}", case.name, g.data());
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    for case in devices() {
        let device = &case.device;
        let a = Batch::zeros(device, device.factor(), &[Shape::new(2, 5)]).unwrap();
        let values = [0.0f32; 12];
        let x = RawMatrix::from_f32(3, 4, &values).unwrap();
        let error = project(device, &[x], &a).unwrap_err().to_string();
        assert!(error.contains("3 x 4") && error.contains("2 x 5"), "{error}");
        let mut sums = Batch::zeros(device, device.sum(), &[Shape::new(2, 2)]).unwrap();
        assert!(accumulate(device, &[(0, x.into())], &a, &mut sums).is_err());
        assert!(accumulate(device, &[(1, x.into())], &a, &mut sums).is_err());
        let mut wide = Batch::zeros(device, device.sum(), &[Shape::new(2, 3)]).unwrap();
        assert!(cholesky(device, &mut wide).is_err());
    }
}

#[test]
fn runs_are_bit_identical() {
    let mut random = Random(11);
    let x = Stored::new(&random.matrix(1500, 160, 1.0), Dtype::Bf16);
    let a_exact = random.matrix(48, 160, 1.0);
    for case in devices() {
        let device = &case.device;
        let run = || {
            let a = Batch::upload(device, device.factor(), std::slice::from_ref(&a_exact)).unwrap();
            let mut sums = Batch::zeros(device, device.sum(), &[Shape::new(48, 48)]).unwrap();
            accumulate(device, &[(0, x.raw().into())], &a, &mut sums).unwrap();
            sums.download(device).unwrap()
        };
        assert_eq!(run(), run(), "{}", case.name);
    }
}
