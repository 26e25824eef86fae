//! Scaling by powers of two, which rounds nothing.

use crate::RawMatrix;

/// 2^n for |n| ≤ 1022.
pub(crate) fn pow2(n: i32) -> f64 {
    f64::from_bits(((1023 + n.clamp(-1022, 1023)) as u64) << 52)
}

/// e for which `2^-e · max|v|` lies in [1, 2), as far as 2^-e is a normal f32; 0 if all values are zero, `None`
/// if one is not finite.
pub(crate) fn exponent(matrix: RawMatrix<'_>) -> Option<i32> {
    let values: Vec<f32> = matrix.to_vec();
    // `max` passes over NaN.
    let finite = values.iter().all(|v| v.is_finite());
    let max = values.iter().fold(0f32, |max, v| max.max(v.abs()));
    finite.then(|| exponent_of(f64::from(max)).clamp(-126, 126))
}

/// e for which `2^-e · v` lies in [1, 2); 0 for zero.
pub(crate) fn exponent_of(v: f64) -> i32 {
    match v == 0.0 || !v.is_finite() {
        true => 0,
        false => (((v.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(-1022),
    }
}
