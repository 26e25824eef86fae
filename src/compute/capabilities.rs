//! What an adapter can do, read once, and which arithmetic follows from it.

use crate::{Error, Result};

/// Which arithmetic the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// f32 for statistics and products; f64 or double-single for long sums and factorisations.
    #[default]
    Auto,
    /// As `Auto`, but where the GPU has matrix units, statistics ([`accumulate`](super::ops::accumulate)) multiply values
    /// of 11 bits: activations of f32, and X·Aᵀ of ranks above 128, are rounded to f16, each row at a scale of its own; A is
    /// not. An entry of G is then off by less than 5e-4 of what it is made of; these errors have no common sign, and G is
    /// off by up to 1e-4 of its norm on average, rather than 1e-7.
    Fast,
    /// Native f64 throughout.
    F64,
    /// Pairs of f32 (about 47 bits) throughout.
    DoubleSingle,
}

impl Precision {
    /// Whether products are in f32.
    pub(crate) fn is_single(self) -> bool {
        matches!(self, Self::Auto | Self::Fast)
    }

    /// What this is but for statistics.
    pub(crate) fn of_others(self) -> Self {
        if self == Self::Fast { Self::Auto } else { self }
    }
}

/// Where, and in what, small matrices are summed and factored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Native f64 on the GPU.
    F64,
    /// Double-single on the GPU.
    DoubleSingle,
    /// f64 on the host: the CPU device, or a GPU that has neither of the above.
    Host,
}

/// Capabilities that are to be treated as absent: for tests, and for working around a driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disable {
    /// No native f64.
    pub f64: bool,
    /// No double-single, as if its self-test had failed.
    pub double_single: bool,
    /// No native f16.
    pub f16: bool,
    /// No subgroup operations.
    pub subgroups: bool,
    /// No matrix units.
    pub cooperative_matrix: bool,
    /// Where f16 and subgroups are there, the selection kernels for matrix units do without them: to test what is around.
    pub software_units: bool,
    /// No more than WebGPU's default limits.
    pub limits: bool,
}

/// What a GPU can do, after what was [disabled](Disable).
#[derive(Clone, Debug, PartialEq)]
pub struct Capabilities {
    /// Native f64 in shaders.
    pub f64: bool,
    /// Double-single arithmetic was tested on this adapter and is right. `None`: not needed, not tested.
    pub double_single: Option<bool>,
    /// Native f16 in shaders.
    pub f16: bool,
    /// Subgroup operations, and the smallest and largest subgroup.
    pub subgroups: Option<(u32, u32)>,
    /// Barriers among the invocations of a subgroup.
    pub subgroup_barrier: bool,
    /// The shapes and types of matrix units, as `16x16x16 F16 to F32`; empty if there are none.
    pub cooperative_matrix: Vec<String>,
    /// Timestamp queries at the ends of passes.
    pub timestamps: bool,
    /// Bytes of the largest storage buffer binding.
    pub max_binding: u64,
    /// Bytes of the largest buffer.
    pub max_buffer: u64,
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Invocations of the largest workgroup.
    pub workgroup_invocations: u32,
}

impl Capabilities {
    /// Reads what `features` and `limits`, of an adapter or of a device, grant.
    pub(crate) fn read(
        adapter: &wgpu::Adapter,
        features: wgpu::Features,
        limits: &wgpu::Limits,
        disable: Disable,
    ) -> Self {
        let info = adapter.get_info();
        let has = |feature| features.contains(feature);
        let cooperative = has(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) && !disable.cooperative_matrix;
        Self {
            f64: has(wgpu::Features::SHADER_F64) && !disable.f64,
            double_single: None,
            f16: has(wgpu::Features::SHADER_F16) && !disable.f16,
            subgroups: (has(wgpu::Features::SUBGROUP) && !disable.subgroups)
                .then_some((info.subgroup_min_size, info.subgroup_max_size)),
            subgroup_barrier: has(wgpu::Features::SUBGROUP_BARRIER) && !disable.subgroups,
            cooperative_matrix: match cooperative {
                false => Vec::new(),
                true => adapter
                    .cooperative_matrix_properties()
                    .iter()
                    .map(|p| {
                        format!("{}x{}x{} {:?} to {:?}", p.m_size, p.n_size, p.k_size, p.ab_type, p.cr_type)
                    })
                    .collect(),
            },
            timestamps: has(wgpu::Features::TIMESTAMP_QUERY),
            max_binding: limits.max_storage_buffer_binding_size,
            max_buffer: limits.max_buffer_size,
            workgroup_memory: limits.max_compute_workgroup_storage_size,
            workgroup_invocations: limits.max_compute_invocations_per_workgroup,
        }
    }

    /// Whether the kernels for matrix units run here: 16 × 16 × 16 from f16 to f32, in subgroups of 32.
    pub fn matrix_units(&self) -> bool {
        self.f16
            && self.subgroups == Some((32, 32))
            && self.cooperative_matrix.iter().any(|config| config == "16x16x16 F16 to F32")
            // The kernels' tiles.
            && self.workgroup_memory >= 48 << 10
    }

    /// The tier that `precision` gets here; an error names the missing capability.
    pub(crate) fn tier(&self, precision: Precision) -> Result<Tier> {
        let double_single = self.double_single == Some(true);
        match precision {
            Precision::Auto | Precision::Fast if self.f64 => Ok(Tier::F64),
            Precision::Auto | Precision::Fast if double_single => Ok(Tier::DoubleSingle),
            Precision::Auto | Precision::Fast => Ok(Tier::Host),
            Precision::F64 if self.f64 => Ok(Tier::F64),
            Precision::F64 => Err(Error::Device(
                "this adapter has no f64 in shaders; use precision `auto` or `double-single`, or the CPU"
                    .into(),
            )),
            Precision::DoubleSingle if double_single => Ok(Tier::DoubleSingle),
            Precision::DoubleSingle => Err(Error::Device(
                "double-single arithmetic fails its self-test on this adapter (its compiler rearranges \
                 sums); use precision `auto` or `f64`, or the CPU"
                    .into(),
            )),
        }
    }
}

/// The features that loraweld makes use of; none of them is needed. A host that creates the device
/// asks for those that its adapter has: `adapter.features() & loraweld::compute::wanted_features()`. Matrix
/// units are experimental in wgpu and need `ExperimentalFeatures::enabled()`; leave them out at will.
pub fn wanted_features() -> wgpu::Features {
    wgpu::Features::SHADER_F64
        | wgpu::Features::SHADER_F16
        | wgpu::Features::SUBGROUP
        | wgpu::Features::SUBGROUP_BARRIER
        | wgpu::Features::TIMESTAMP_QUERY
        | wgpu::Features::PIPELINE_CACHE
        | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
}

/// The features that a host's device must have: none.
pub fn required_features() -> wgpu::Features {
    wgpu::Features::empty()
}

/// The least limits that a host's device must have: WebGPU's defaults. More of
/// `max_storage_buffer_binding_size` and `max_buffer_size` lets larger layers go in one piece.
pub fn required_limits() -> wgpu::Limits {
    wgpu::Limits::default()
}
