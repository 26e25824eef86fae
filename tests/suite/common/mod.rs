//! What several test files share: the devices under test, and measures of error.

pub mod files;
pub mod fixtures;

use std::sync::LazyLock;

use loraweld::Matrix;
use loraweld::compute::{Device, DeviceOptions, Disable, Precision, Select};

/// Set to accept that there is no adapter, and so that no GPU path is tested.
pub const ALLOW_NO_GPU: &str = "LORAWELD_ALLOW_NO_GPU";

/// The command: the one that was built with the tests, or another one that `LORAWELD` names.
pub fn program() -> std::path::PathBuf {
    let other = std::env::var_os("LORAWELD").map(std::path::PathBuf::from);
    other.unwrap_or_else(|| assert_cmd::cargo::cargo_bin!("loraweld").into())
}

/// A device and the name of its tier.
#[derive(Clone)]
pub struct Case {
    pub name: &'static str,
    pub device: Device,
}

fn open(name: &'static str, precision: Precision, disable: Disable) -> Option<Case> {
    let options = DeviceOptions { select: Select::Gpu, precision, disable, ..Default::default() };
    match Device::open(&options) {
        Ok(device) => {
            assert!(device.is_gpu(), "{name}: a GPU was asked for, {} came", device.describe());
            Some(Case { name, device })
        }
        Err(error) if std::env::var_os(ALLOW_NO_GPU).is_some() => {
            eprintln!("skipped {name}: {error}");
            None
        }
        Err(error) => panic!("{name}: {error}; set {ALLOW_NO_GPU} to accept that no GPU is tested"),
    }
}

/// The tiers that a GPU can be forced into. All tests share them, since pipelines take longer to make than to run here.
static GPUS: LazyLock<Vec<Case>> = LazyLock::new(|| {
    let none = Disable::default();
    [
        open("f64", Precision::F64, none),
        open("double-single", Precision::DoubleSingle, none),
        open("auto, f64", Precision::Auto, none),
        open("auto, no matrix units", Precision::Auto, Disable { cooperative_matrix: true, ..none }),
        open("auto, double-single", Precision::Auto, Disable { f64: true, ..none }),
        open("auto, sums on the host", Precision::Auto, Disable { f64: true, double_single: true, ..none }),
        open(
            "auto, minimal",
            Precision::Auto,
            Disable { f64: true, f16: true, subgroups: true, limits: true, ..none },
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
});

/// The tiers that a GPU can be forced into.
pub fn gpus() -> Vec<Case> {
    GPUS.clone()
}

/// The GPU with selection kernels that are made for matrix units, which need none.
pub fn software_units() -> Option<Case> {
    static UNITS: LazyLock<Option<Case>> = LazyLock::new(|| {
        open("auto, software units", Precision::Auto, Disable { software_units: true, ..Default::default() })
    });
    UNITS.clone()
}

/// The CPU and all tiers of the GPU.
pub fn devices() -> Vec<Case> {
    let mut all = vec![Case { name: "CPU", device: Device::cpu() }];
    all.extend(gpus());
    all
}

/// ‖got − want‖ / ‖want‖ in the Frobenius norm; 0 if both are zero.
pub fn relative(got: &Matrix, want: &Matrix) -> f64 {
    assert_eq!((got.rows(), got.cols()), (want.rows(), want.cols()), "shapes differ");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let error = norm(&mut got.data().iter().zip(want.data()).map(|(g, w)| g - w));
    match norm(&mut want.data().iter().copied()) {
        0.0 => error,
        scale => error / scale,
    }
}

/// A·B in f64, plainly.
pub fn product(a: &Matrix, b: &Matrix) -> Matrix {
    assert_eq!(a.cols(), b.rows());
    let mut c = Matrix::zeros(a.rows(), b.cols());
    for i in 0..a.rows() {
        for k in 0..a.cols() {
            let v = a[(i, k)];
            for j in 0..b.cols() {
                c[(i, j)] += v * b[(k, j)];
            }
        }
    }
    c
}

/// Random numbers that are the same everywhere: SplitMix64 to a sum of uniform variates.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Nearly normal, variance 1.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    /// Nearly normal entries that an f32 holds.
    pub fn matrix(&mut self, rows: usize, cols: usize, scale: f64) -> Matrix {
        Matrix::from_fn(rows, cols, |_, _| f64::from((self.normal() * scale) as f32))
    }
}

/// Singular values, the largest first.
pub fn singular_values(m: &Matrix) -> Vec<f64> {
    let m = faer::Mat::from_fn(m.rows(), m.cols(), |i, j| m[(i, j)]);
    m.singular_values().unwrap()
}

/// Thin SVD, rows of both are vectors, without values that are zero but for rounding.
pub fn svd(m: &Matrix) -> (Matrix, Vec<f64>, Matrix) {
    let svd = faer::MatRef::from_row_major_slice(m.data(), m.rows(), m.cols()).thin_svd().unwrap();
    let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
    let n = (0..s.nrows()).take_while(|&k| s[k] > 1e-6 * s[0] && s[k] > 0.0).count();
    (
        Matrix::from_fn(n, m.rows(), |k, i| u[(i, k)]),
        (0..n).map(|k| s[k]).collect(),
        Matrix::from_fn(n, m.cols(), |k, i| v[(i, k)]),
    )
}

/// `Leftᵀ·diag(values)·Right`.
pub fn outer(left: &Matrix, values: &[f64], right: &Matrix) -> Matrix {
    let scaled = Matrix::from_fn(values.len(), right.cols(), |k, j| values[k] * right[(k, j)]);
    let left = Matrix::from_fn(left.cols(), values.len(), |i, k| left[(k, i)]);
    product(&left, &scaled)
}

/// Matrices of one width, one below the other.
pub fn stack(rows: &[Matrix]) -> Matrix {
    let data: Vec<f64> = rows.iter().flat_map(|m| m.data().to_vec()).collect();
    Matrix::new(data.len() / rows[0].cols(), rows[0].cols(), data).unwrap()
}
