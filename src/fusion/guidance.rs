//! Classifier-free guidance of which only the conditional pass knows adapters (CRAFT-LoRA, arXiv 2602.18936).

use crate::compute::ops::{Activations, ExtrapolateJob, extrapolate_cpu};
use crate::{Device, Error, Result};

/// Records `ε_cond += ω·(ε_cond − ε_uncond)`, in place, so that ε_cond becomes `(1 + ω)·ε_cond − ω·ε_uncond`.
///
/// CRAFT-LoRA's asymmetric guidance: the host runs the conditional pass with adapters (by a
/// [`Schedule`](super::Schedule) of [`craft`](super::craft)), the unconditional one without any, and calls this.
/// Both of one shape and type (f32, f16 or bf16), in two buffers of the device with usage `STORAGE`; computed in f32.
///
/// # Errors
/// [`Error::Invalid`] if they differ, share a buffer, do not start at multiples of 4 bytes, or end, rounded up to one,
/// beyond their buffer ([`Activations::Buffer`]); [`Error::Device`] if they
/// are larger than the device can bind, or the device is the CPU, where [`guide_host`] does it.
pub fn guide(
    device: &Device,
    encoder: &mut wgpu::CommandEncoder,
    conditional: Activations<'_>,
    unconditional: Activations<'_>,
    omega: f64,
) -> Result<()> {
    let gpu = device.gpu()?;
    if conditional.shape() != unconditional.shape() || conditional.dtype() != unconditional.dtype() {
        return Err(Error::Invalid(format!(
            "the passes differ: {:?} of {}, {:?} of {}",
            conditional.shape(),
            conditional.dtype(),
            unconditional.shape(),
            unconditional.dtype()
        )));
    }
    check_omega(omega)?;
    let (shape, dtype) = (conditional.shape(), conditional.dtype());
    if shape.is_empty() {
        return Ok(());
    }
    let all = 0..shape.rows;
    let c = conditional.bind("the conditional pass", all.clone(), gpu.max_arena())?;
    let u = unconditional.bind("the unconditional pass", all, gpu.max_arena())?;
    if c.binding.buffer == u.binding.buffer {
        return Err(Error::Invalid(
            "the two passes share a buffer, of which one part cannot be read while another is written".into(),
        ));
    }
    let (len, scale) = (shape.len() as u32, omega as f32);
    let job = ExtrapolateJob { c: c.word as u32, u: u.word as u32, len, scale };
    let mut commands = gpu.commands();
    job.encode(&mut commands, dtype, [c.binding, u.binding])?;
    // It takes no scratch buffers.
    let (pass, _) = commands.prepare()?;
    pass.record(encoder, 0);
    Ok(())
}

/// [`guide`] on the host, in f64, rounded once.
///
/// # Errors
/// [`Error::Invalid`] if lengths differ or ω is not finite.
pub fn guide_host(conditional: &mut [f32], unconditional: &[f32], omega: f64) -> Result<()> {
    check_omega(omega)?;
    if conditional.len() != unconditional.len() {
        let (c, u) = (conditional.len(), unconditional.len());
        return Err(Error::Invalid(format!("the passes differ: {c} and {u} values")));
    }
    let mut c: Vec<f64> = conditional.iter().map(|v| f64::from(*v)).collect();
    let u: Vec<f64> = unconditional.iter().map(|v| f64::from(*v)).collect();
    extrapolate_cpu(omega, &mut c, &u);
    conditional.iter_mut().zip(c).for_each(|(out, v)| *out = v as f32);
    Ok(())
}

fn check_omega(omega: f64) -> Result<()> {
    match (omega as f32).is_finite() {
        true => Ok(()),
        false => Err(Error::Invalid(format!("omega is {omega}; it must be a finite number"))),
    }
}
