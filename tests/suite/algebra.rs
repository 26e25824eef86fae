//! The factor-space algebra (SVD, QR, projections) against plain f64, on the CPU and in every tier of the GPU.

use crate::common::{Random, devices, product, relative};
use loraweld::compute::ops::{
    Root, ScaledRows, Side, Stacks, Svd, inner, jacobi_svd, project_off, qr, qr_l, rank_update,
};
use loraweld::compute::{Batch, Element};
use loraweld::{Device, Dtype, Matrix, RawMatrix};

/// What double-single loses against f64.
fn tolerance(device: &Device) -> f64 {
    if device.sum() == Element::DoubleSingle { 1e-11 } else { 1e-13 }
}

/// max |M·Mᵀ − I| over rows that are not zero.
fn skewness(rows: &Matrix) -> f64 {
    let g = product(rows, &rows.transposed());
    let mut worst = 0.0f64;
    for i in (0..g.rows()).filter(|&i| g[(i, i)] != 0.0) {
        for j in 0..g.cols() {
            worst = worst.max((g[(i, j)] - f64::from(u8::from(i == j))).abs());
        }
    }
    worst
}

fn rebuilt(svd: &Svd) -> Matrix {
    let n = svd.values.len();
    let scaled = Matrix::from_fn(n, n, |k, j| svd.values[k] * svd.right[(k, j)]);
    product(&svd.left.transposed(), &scaled)
}

fn orthogonal(random: &mut Random, n: usize) -> Matrix {
    let values: Vec<f32> = random.matrix(n, n, 1.0).data().iter().map(|&v| v as f32).collect();
    let cpu = Device::cpu();
    let stack = vec![RawMatrix::from_f32(n, n, &values).unwrap()];
    let rows = ScaledRows::new(&cpu, Side::Input, &[stack]).unwrap();
    qr(&cpu, &rows).unwrap().q.download(&cpu).unwrap().remove(0)
}

fn with_values(random: &mut Random, values: &[f64]) -> Matrix {
    let n = values.len();
    let (u, v) = (orthogonal(random, n), orthogonal(random, n));
    product(&u, &Matrix::from_fn(n, n, |i, j| values[i] * v[(i, j)]))
}

#[test]
fn svd_over_hard_spectra() {
    let mut random = Random(21);
    let mut spectra: Vec<Vec<f64>> = vec![
        vec![2.0],
        vec![0.0],
        vec![0.0; 7],
        vec![3.0; 5],
        vec![1.0; 33],
        vec![1.0, 1e-6],
        (0..16).map(|i| if i < 9 { 1.0 } else { 0.0 }).collect(),
        (0..20).map(|i| 10f64.powi(-i / 2)).collect(),
    ];
    for n in [2, 3, 8, 15, 16, 17, 32, 47, 64] {
        spectra.push((0..n).map(|i| 1e-6f64.powf(i as f64 / n as f64)).collect());
    }
    let mut matrices: Vec<Matrix> = spectra.iter().map(|values| with_values(&mut random, values)).collect();
    for scale in [1e-30, 1e30] {
        let values: Vec<f64> = (0..12).map(|i| scale * 0.5f64.powi(i)).collect();
        matrices.push(with_values(&mut random, &values));
        spectra.push(values);
    }
    for case in devices() {
        let (device, tolerance) = (&case.device, tolerance(&case.device));
        let all = jacobi_svd(device, &matrices).unwrap();
        for ((svd, a), want) in all.iter().zip(&matrices).zip(&spectra) {
            let what = format!("{}: order {}, {:?}", case.name, a.rows(), want.last());
            assert!(svd.converged, "{what}");
            let error = relative(&rebuilt(svd), a);
            assert!(error <= 10.0 * tolerance, "{what}: {error:.1e}");
            assert!(skewness(&svd.left) <= 10.0 * tolerance, "{what}: {:.1e}", skewness(&svd.left));
            assert!(svd.values.is_sorted_by(|x, y| x >= y), "{what}: {:?}", svd.values);
            for (got, want) in svd.values.iter().zip(want) {
                assert!(
                    (got - want).abs() <= 10.0 * tolerance * svd.values[0].max(1e-99),
                    "{what}: {got} {want}"
                );
            }
            for i in 0..a.rows() {
                let top =
                    svd.left.row(i).iter().fold(0.0f64, |top, &v| if v.abs() > top.abs() { v } else { top });
                assert!(top > 0.0, "{what}: the sign of vector {i}");
            }
        }
        assert_eq!(all, jacobi_svd(device, &matrices).unwrap(), "{}: two runs differ", case.name);
    }
}

/// Cores of factors that have more ranks than columns end in zeros.
#[test]
fn svd_of_what_ends_in_zeros() {
    let mut random = Random(24);
    for (rows, cols) in [(5, 3), (3, 5), (1, 1), (9, 2), (0, 0)] {
        let block = random.matrix(rows, cols, 1.0);
        let inside = |i: usize, j: usize| if i < rows && j < cols { block[(i, j)] } else { 0.0 };
        let a = Matrix::from_fn(9, 9, inside);
        for case in devices() {
            let what = format!("{}: {rows} x {cols}", case.name);
            let tolerance = 10.0 * tolerance(&case.device);
            let svd = jacobi_svd(&case.device, std::slice::from_ref(&a)).unwrap().remove(0);
            assert!(svd.converged && svd.values.is_sorted_by(|x, y| x >= y), "{what}");
            assert!(
                rebuilt(&svd).data().iter().zip(a.data()).all(|(x, y)| (x - y).abs() <= tolerance),
                "{what}"
            );
            assert!(skewness(&svd.left) <= tolerance && skewness(&svd.right) <= tolerance, "{what}");
            assert!((0..9).all(|i| svd.left.row(i).iter().any(|v| *v != 0.0)), "{what}");
            assert!(svd.values[rows.min(cols)..].iter().all(|v| *v <= tolerance), "{what}");
        }
    }
}

#[test]
fn small_singular_values_of_scaled_matrices_keep_their_digits() {
    // A = D·B with a graded D: Jacobi finds even the smallest to full relative accuracy.
    let mut random = Random(22);
    let n = 24;
    let b = random.matrix(n, n, 1.0);
    let mut graded = b.clone();
    for i in 0..n {
        for j in 0..n {
            graded[(i, j)] *= 10f64.powi(-(i as i32) / 2);
        }
    }
    // The determinant, and so the product of all values, is known by the ungraded matrix.
    let log = |svd: &Svd| svd.values.iter().map(|v| v.log10()).sum::<f64>();
    let grading: f64 = (0..n).map(|i| -((i / 2) as f64)).sum();
    for case in
        devices().into_iter().filter(|case| case.device.is_gpu() && case.device.sum() != Element::Host)
    {
        let all = jacobi_svd(&case.device, &[b.clone(), graded.clone()]).unwrap();
        let error = (log(&all[1]) - log(&all[0]) - grading).abs();
        assert!(error <= 1e-9, "{}: {error:.1e}", case.name);
    }
}

#[test]
fn what_is_not_finite_does_not_converge() {
    for case in devices() {
        let mut bad = Matrix::from_fn(5, 5, |i, j| (i + 2 * j) as f64);
        bad[(3, 1)] = f64::NAN;
        let good = Matrix::from_fn(3, 3, |i, j| f64::from(u8::from(i == j)));
        let all = jacobi_svd(&case.device, &[bad, good, Matrix::zeros(0, 0)]).unwrap();
        assert!(!all[0].converged, "{}", case.name);
        assert!(all[1].converged && all[2].converged, "{}", case.name);
        assert!(jacobi_svd(&case.device, &[Matrix::zeros(2, 3)]).is_err());
    }
}

#[test]
fn large_orders_take_several_launches() {
    // The largest order takes software adapters a while: one tier has to do.
    for (order, names) in [(200, &["CPU", "f64", "double-single"][..]), (512, &["CPU", "f64"])] {
        let mut random = Random(23);
        let values: Vec<f64> = (0..order).map(|i| 1e-6f64.powf(f64::from(i) / f64::from(order))).collect();
        let a = with_values(&mut random, &values);
        for case in devices().into_iter().filter(|case| names.contains(&case.name)) {
            let svd = &jacobi_svd(&case.device, std::slice::from_ref(&a)).unwrap()[0];
            assert!(svd.converged, "{}", case.name);
            let error = relative(&rebuilt(svd), &a);
            assert!(error <= 10.0 * tolerance(&case.device), "{}: order {order}: {error:.1e}", case.name);
            let pairs = svd.values.iter().zip(&values);
            let worst = pairs.map(|(got, want)| (got / want - 1.0).abs()).fold(0.0, f64::max);
            assert!(worst <= 1e-3, "{}: order {order}: small values: {worst:.1e}", case.name);
        }
    }
}

/// Rows of all kinds: (name, rank, matrix).
fn row_sets() -> Vec<(&'static str, usize, Matrix)> {
    let mut random = Random(24);
    let mut sets = vec![
        ("one row", 1, random.matrix(1, 40, 1.0)),
        ("tall", 32, random.matrix(32, 300, 0.02)),
        ("more rows than columns", 7, random.matrix(12, 7, 1.0)),
        ("square", 16, random.matrix(16, 16, 1.0)),
        ("zero", 0, Matrix::zeros(6, 20)),
        ("tiny", 9, random.matrix(9, 33, 1e-30)),
        ("huge", 9, random.matrix(9, 33, 1e30)),
    ];
    let mut duplicate = random.matrix(10, 64, 1.0);
    for j in 0..64 {
        duplicate[(4, j)] = duplicate[(1, j)];
        duplicate[(7, j)] = 0.0;
        duplicate[(9, j)] = 4.0 * duplicate[(2, j)];
    }
    sets.push(("duplicate and zero rows", 7, duplicate));
    let mut scaled = random.matrix(12, 80, 1.0);
    for i in 0..12 {
        for j in 0..80 {
            scaled[(i, j)] *= 8f64.powi(i as i32 * 3 - 18);
        }
    }
    sets.push(("badly scaled rows", 12, scaled));
    // Nearly dependent: singular values down to about 1e-5 of the largest.
    let mut near = random.matrix(8, 90, 1.0);
    for j in 0..90 {
        near[(5, j)] = f64::from((near[(3, j)] * (1.0 + 1e-5 * near[(6, j)])) as f32);
    }
    sets.push(("nearly dependent", 8, near));
    sets
}

#[test]
fn qr_of_every_kind_of_rows() {
    let sets = row_sets();
    let stored: Vec<Vec<f32>> =
        sets.iter().map(|(_, _, m)| m.data().iter().map(|&v| v as f32).collect()).collect();
    let raw: Vec<RawMatrix> = sets
        .iter()
        .zip(&stored)
        .map(|((_, _, m), v)| RawMatrix::from_f32(m.rows(), m.cols(), v).unwrap())
        .collect();
    let stacks: Vec<Vec<RawMatrix>> = raw.iter().map(|&raw| vec![raw]).collect();
    for case in devices() {
        let device = &case.device;
        let rows = ScaledRows::new(device, Side::Input, &stacks).unwrap();
        for ((name, _, a), l) in sets.iter().zip(qr_l(device, &rows).unwrap()) {
            let (got, want) = (product(&l, &l.transposed()), product(a, &a.transposed()));
            // Entry by entry, to the size of the rows it belongs to.
            for i in 0..a.rows() {
                for j in 0..a.rows() {
                    let size = (want[(i, i)] * want[(j, j)]).sqrt();
                    let error = (got[(i, j)] - want[(i, j)]).abs();
                    assert!(error <= 1e-10 * size, "{}: {name}: L·Lᵀ at {i}, {j}: {error:e}", case.name);
                }
            }
        }
        let factors = qr(device, &rows).unwrap();
        let q = factors.q.download(device).unwrap();
        for (((name, rank, a), q), l) in sets.iter().zip(&q).zip(&factors.l) {
            let error = skewness(q);
            assert!(error <= 1e-6, "{}: {name}: QQᵀ − I: {error:.1e}", case.name);
            if device.is_gpu() && device.sum() != Element::Host {
                let kept: f64 = q.data().iter().map(|v| v * v).sum();
                assert!((kept - *rank as f64).abs() < 1e-3, "{}: {name}: rank {kept}", case.name);
            }
            // Each row to its own size.
            let got = product(l, q);
            for i in 0..a.rows() {
                let row = |m: &Matrix| Matrix::new(1, m.cols(), m.row(i).to_vec()).unwrap();
                let error = relative(&row(&got), &row(a));
                assert!(error <= 1e-6, "{}: {name}: row {i} of L·Q: {error:.1e}", case.name);
            }
        }
    }
}

#[test]
fn inner_update_and_projection_match_f64() {
    let mut random = Random(25);
    let shapes = [(1, 1, 1), (3, 2, 17), (16, 16, 64), (17, 33, 131), (8, 0, 20), (40, 12, 300)];
    let a: Vec<Matrix> = shapes.iter().map(|&(p, _, n)| random.matrix(p, n, 1.0)).collect();
    let m: Vec<Matrix> = shapes.iter().map(|&(_, q, n)| random.matrix(q, n, 1.0)).collect();
    for case in devices() {
        let device = &case.device;
        let a_batch = Batch::upload(device, device.factor(), &a).unwrap();
        let m_batch = Batch::upload(device, device.factor(), &m).unwrap();
        let c = inner(device, &a_batch, &m_batch).unwrap();
        let updated = rank_update(device, Some(&a_batch), &c, &m_batch).unwrap().download(device).unwrap();
        let alone = rank_update(device, None, &c, &m_batch).unwrap().download(device).unwrap();
        let t: Vec<f64> = (0..a.len()).map(|i| i as f64 / 4.0).collect();
        let off = project_off(device, &a_batch, &m_batch, &t).unwrap();
        let off_rows = off.rows.download(device).unwrap();
        for (i, c) in c.download(device).unwrap().iter().enumerate() {
            let want = product(&a[i], &m[i].transposed());
            let error = relative(c, &want);
            assert!(error <= tolerance(device), "{}: inner {:?}: {error:.1e}", case.name, shapes[i]);
            assert_eq!(&off.coefficients[i], c);
            let want = product(&want, &m[i]);
            let plus =
                |f: f64| Matrix::from_fn(a[i].rows(), a[i].cols(), |k, j| a[i][(k, j)] + f * want[(k, j)]);
            for (got, want) in [(&alone[i], &want), (&updated[i], &plus(1.0)), (&off_rows[i], &plus(-t[i]))] {
                let error = relative(got, want);
                assert!(error <= 2e-7, "{}: update {:?}: {error:.1e}", case.name, shapes[i]);
            }
        }
        assert!(inner(device, &a_batch, &Batch::upload(device, device.factor(), &a[..1]).unwrap()).is_err());
    }
}

#[test]
fn rows_of_every_type_are_scaled_and_stacked_exactly() {
    use half::{bf16, f16};
    let mut random = Random(41);
    // Rows of very different size, a zero row, subnormal values.
    let sizes = [1.0, 1e-4, 1e4, 0.0, 1e-7];
    for (rank, width) in [(1, 1), (4, 0), (5, 31), (33, 40), (40, 7), (64, 129), (3, 300), (300, 5)] {
        let values: Vec<f32> =
            (0..rank * width).map(|at| (random.normal() * sizes[at / width % 5]) as f32).collect();
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let parts = [(Dtype::F32, &f32s), (Dtype::F16, &f16s), (Dtype::Bf16, &bf16s)];
        for side in [Side::Input, Side::Output] {
            let raw = |(dtype, bytes): (Dtype, &Vec<u8>)| match side {
                Side::Input => (dtype, rank, width, bytes.clone()),
                Side::Output => {
                    let size = dtype.size();
                    let order = (0..rank * width).map(|at| (at % rank) * width + at / rank);
                    (dtype, width, rank, order.flat_map(|at| bytes[at * size..][..size].to_vec()).collect())
                }
            };
            let stored: Vec<_> = parts.iter().map(|&part| raw(part)).collect();
            let stack: Vec<RawMatrix> =
                stored.iter().map(|(d, r, c, bytes)| RawMatrix::new(*d, *r, *c, bytes).unwrap()).collect();
            let want: Vec<f64> = parts
                .iter()
                .flat_map(|(dtype, bytes)| {
                    RawMatrix::new(*dtype, rank, width, bytes).unwrap().to_vec::<f64>()
                })
                .collect();
            for case in devices() {
                let rows =
                    ScaledRows::new(&case.device, side, &[stack.clone(), stack[..1].to_vec()]).unwrap();
                let scaled = rows.rows.download(&case.device).unwrap();
                for (k, row) in (0..3 * rank).map(|k| (k, scaled[0].row(k))) {
                    let largest = row.iter().fold(0.0f64, |max, v| v.abs().max(max));
                    assert!(
                        largest == 0.0 || (1.0..2.0).contains(&largest),
                        "{}: row {k}: {largest}",
                        case.name
                    );
                }
                let got = rows.unscale(0, scaled[0].clone()).into_data();
                assert_eq!(got, want, "{}: {rank} x {width}, {side:?}", case.name);
                assert_eq!(rows.unscale(1, scaled[1].clone()).data(), &want[..rank * width]);
            }
        }
    }
    let values = [0f32; 6];
    let (two, three) =
        (RawMatrix::from_f32(3, 2, &values).unwrap(), RawMatrix::from_f32(2, 3, &values).unwrap());
    assert!(ScaledRows::new(&Device::cpu(), Side::Input, &[vec![two, three]]).is_err());
}

#[test]
fn stacks_are_multiplied_where_they_lie() {
    let mut random = Random(43);
    // Blocks of columns end within them.
    for (rank, width) in [(1, 1), (3, 1025), (17, 2048), (32, 40), (7, 5)] {
        let sizes = [1.0, 1e-20, 1e15];
        let stored: Vec<Vec<f32>> = sizes
            .iter()
            .map(|size| (0..rank * width).map(|_| (random.normal() * size) as f32).collect())
            .collect();
        for side in [Side::Input, Side::Output] {
            let (rows, cols) = if side == Side::Input { (rank, width) } else { (width, rank) };
            let stack: Vec<RawMatrix> =
                stored.iter().map(|values| RawMatrix::from_f32(rows, cols, values).unwrap()).collect();
            let stacked: Vec<f64> = stack
                .iter()
                .flat_map(|part| {
                    let m = Matrix::new(rows, cols, part.to_vec::<f64>()).unwrap();
                    if side == Side::Input { m.into_data() } else { m.transposed().into_data() }
                })
                .collect();
            let stacked = Matrix::new(3 * rank, width, stacked).unwrap();
            let gram = product(&stacked, &stacked.transposed());
            // Members of different size keep their digits: what is compared is a block at a time.
            let block = |m: &Matrix, i: usize, k: usize| {
                Matrix::from_fn(rank, rank, |r, c| m[(i * rank + r, k * rank + c)])
            };
            let transform = random.matrix(2, 3 * rank, 1.0);
            let small = Matrix::from_fn(2, 3 * rank, |i, j| transform[(i, j)] / sizes[j / rank]);
            let want = product(&small, &stacked);
            for case in devices() {
                let device = &case.device;
                let at = format!("{}: {rank} x {width}, {side:?}", case.name);
                let stacks = Stacks::new(device, side, vec![stack.clone(), stack[..1].to_vec()]).unwrap();
                let grams = stacks.grams(device).unwrap();
                for (i, k) in [(0, 0), (0, 1), (1, 2), (2, 2)] {
                    // Sums of terms that cancel, relative to the size of the block.
                    let error = relative(&block(&grams[0], i, k), &block(&gram, i, k));
                    assert!(error <= 20.0 * tolerance(device), "{at}: block {i}, {k}: {error}");
                }
                assert!(relative(&grams[1], &block(&gram, 0, 0)) <= tolerance(device), "{at}");
                let none = Matrix::zeros(0, rank);
                let combined = stacks.combined(device, &[small.clone(), none]).unwrap();
                let got: Vec<f64> = combined[0].data().iter().map(|&v| v.into()).collect();
                let got = Matrix::new(combined[0].rows(), combined[0].cols(), got).unwrap();
                let got = if side == Side::Input { got } else { got.transposed() };
                // Rounded once to f32.
                assert!(relative(&got, &want) <= 1e-7, "{at}: {}", relative(&got, &want));
                assert!(combined[1].data().is_empty(), "{at}");
            }
        }
    }
}

#[test]
fn roots_of_gram_matrices_know_when_they_will_not_do() {
    let mut random = Random(47);
    let cpu = Device::cpu();
    for n in [1, 2, 7, 32, 65] {
        let mut rows = random.matrix(n, n + 20, 1.0);
        // Rows of very different size are no reason to fail.
        for (i, row) in rows.data_mut().chunks_exact_mut(n + 20).enumerate() {
            row.iter_mut().for_each(|v| *v *= 10f64.powi(i as i32 % 3 * 12 - 12));
        }
        let gram = product(&rows, &rows.transposed());
        let root = Root::new(&cpu, &gram).unwrap();
        let q = product(&root.inverse, &rows);
        assert!(skewness(&q) <= root.bend.max(1e-13), "{n}: {} but {}", skewness(&q), root.bend);
        assert!(root.bend <= 1e-8 && root.error <= root.bend, "{n}: {}", root.bend);
        for i in 0..n {
            let size = gram[(i, i)].sqrt();
            let row = product(&Matrix::new(1, n, root.left.row(i).to_vec()).unwrap(), &q);
            let error: f64 = row.data().iter().zip(rows.row(i)).map(|(x, y)| (x - y).powi(2)).sum();
            assert!(error.sqrt() <= 1e-11 * size, "{n}: row {i}");
        }
    }
    let singular = Matrix::new(2, 2, vec![1.0, 1.0, 1.0, 1.0]).unwrap();
    let nearly = Matrix::new(2, 2, vec![1.0, 1.0, 1.0, 1.0 + 1e-13]).unwrap();
    for bad in [singular, Matrix::zeros(3, 3), nearly, Matrix::new(1, 1, vec![f64::NAN]).unwrap()] {
        assert!(Root::new(&cpu, &bad).is_none(), "{bad:?}");
    }
}
