//! Does double-single arithmetic survive this adapter's shader compiler? Asked before the tier is used.

use super::gpu::{Gpu, whole};
use super::ops::cholesky;
use super::shaders::{Declared, Kernel, job};
use super::{Batch, Element};
use crate::{Matrix, Result};

job! {
    struct Job {
        pairs: u32,
    }
}

/// Results for each pair.
const RESULTS: usize = 6;
/// 2⁻²⁶, of which a pair's low parts are made.
const TINY: f32 = 1.490_116_1e-8;

fn kernel() -> Kernel {
    Kernel::new("self_test").real(Element::DoubleSingle)
}

pub(super) fn declared() -> Declared {
    Declared::new::<Job>([kernel()]).constant("RESULTS", RESULTS).float("TINY", TINY)
}

/// Runs sums, products, quotients and roots of hostile pairs and a small ill-conditioned Cholesky
/// factorisation in double-single, and compares with f64 on the host.
pub(crate) fn double_single(gpu: &Gpu) -> Result<bool> {
    Ok(arithmetic(gpu)? && factorisation(gpu)?)
}

fn arithmetic(gpu: &Gpu) -> Result<bool> {
    // Full mantissas at exponents that cancel, absorb and balance.
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        1.0 + (state >> 9) as f32 / 8_388_608.0
    };
    let pairs: Vec<[f32; 2]> = (0..256)
        .map(|i| {
            let scale = ((i % 49) as f32 - 24.0).exp2();
            let sign = if i % 3 == 0 { -1.0 } else { 1.0 };
            [sign * next(), next() * scale]
        })
        .collect();
    let input = gpu.allocate("self-test pairs", pairs.len() as u64 * 8)?;
    gpu.write(&input, 0, bytemuck::cast_slice(&pairs))?;
    let bytes = (pairs.len() * RESULTS * 8) as u64;
    let output = gpu.allocate("self-test results", bytes)?;
    let mut commands = gpu.commands();
    let jobs = [Job { pairs: pairs.len() as u32 }];
    commands.launch(kernel(), &jobs, &[[0; 4]], &[whole(&input), whole(&output)])?;
    commands.submit()?;
    let results: Vec<[[f32; 2]; RESULTS]> = bytemuck::pod_collect_to_vec(&gpu.read(&output, bytes)?);
    let wide = |v: f32| f64::from(v) + f64::from(v * TINY);
    Ok(pairs.iter().zip(results).all(|(&[a, b], got)| {
        let got = got.map(|[high, low]| f64::from(high) + f64::from(low));
        let near = |got: f64, want: f64, scale: f64| (got - want).abs() <= 1e-12 * scale.abs();
        // Exact: f64 holds the sum and the product of any of these pairs.
        got[0] == f64::from(a) + f64::from(b)
            && got[1] == f64::from(a) * f64::from(b)
            && near(got[2], wide(a) / wide(b), wide(a) / wide(b))
            && near(got[3], wide(b).sqrt(), wide(b).sqrt())
            && near(got[4], wide(a) + wide(b), wide(a).abs() + wide(b).abs())
            && near(got[5], wide(a) * wide(b), wide(a) * wide(b))
    }))
}

fn factorisation(gpu: &Gpu) -> Result<bool> {
    // The Hilbert matrix of order 6, with condition number 1.5e7, fails in plain f32 by 1e-1.
    const N: usize = 6;
    let hilbert = Matrix::from_fn(N, N, |i, j| 1.0 / (i + j + 1) as f64);
    let buffer = gpu.allocate("self-test matrix", (N * N * 8) as u64)?;
    let status = gpu.allocate("self-test status", 4)?;
    let mut bytes = [0; N * N * 8];
    Batch::encode(Element::DoubleSingle, &hilbert.data, &mut bytes);
    gpu.write(&buffer, 0, &bytes)?;
    let mut commands = gpu.commands();
    let jobs = [cholesky::Job { matrix: 0, order: N as u32 }];
    // All of the matrix is one panel.
    let work = [[0, 0, 1, 0]];
    let kernel = cholesky::kernel(Element::DoubleSingle);
    commands.launch(kernel, &jobs, &work, &[whole(&buffer), whole(&status)])?;
    commands.submit()?;
    let u = Batch::decode(Element::DoubleSingle, &gpu.read(&buffer, (N * N * 8) as u64)?);
    Ok((0..N * N).all(|e| {
        let (i, j) = (e / N, e % N);
        let product: f64 = (0..N).map(|k| u[k * N + i] * u[k * N + j]).sum();
        (product - hilbert.data[e]).abs() <= 1e-12
    }))
}
