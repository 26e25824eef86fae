use super::{inner, rank_update, small};
use crate::compute::{Batch, Device};
use crate::{Error, Matrix, Result};

/// What [`project_off`] gives.
#[derive(Debug)]
pub struct ProjectedOff {
    /// `A − t·(A·V)·Vᵀ`, factors of A's shapes.
    pub rows: Batch,
    /// `A·V`: rank × directions.
    pub coefficients: Vec<Matrix>,
}

/// `A − t·(A·V)·Vᵀ`: rows of A projected off the directions V (t = 1), or part of the way.
///
/// `a[i]`: rank × width; `v[i]`: Vᵀ, directions × width, its rows orthonormal or zero; `t[i]`: the share to remove.
/// A and V are factors and are read twice each: once for A·V, once for the update, with sums in the device's
/// tier. The result is rounded once.
///
/// # Errors
/// [`Error::Invalid`] if shapes differ.
pub fn project_off(device: &Device, a: &Batch, v: &Batch, t: &[f64]) -> Result<ProjectedOff> {
    if t.len() != a.len() {
        return Err(Error::Invalid(format!("project_off: {} shares for {} matrices", t.len(), a.len())));
    }
    let coefficients = inner(device, a, v)?.download(device)?;
    let minus: Vec<Matrix> = coefficients.iter().zip(t).map(|(c, t)| c.map(|c| -t * c)).collect();
    let minus = small(device, &minus)?;
    Ok(ProjectedOff { rows: rank_update(device, Some(a), &minus, v)?, coefficients })
}
