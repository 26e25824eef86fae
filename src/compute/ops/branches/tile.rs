//! The tiles of the kernels for matrix units: `shaders/branch/shared/tile_matrix.wgsl`, which keep f32's accuracy, and
//! `branch/shared/block.wgsl`, for features of 16 bits.

use crate::Dtype;
use crate::compute::shaders::Kernel;

/// Most subgroups of a workgroup: scores take many registers.
pub(super) const SCORES_SUBGROUPS: u32 = 2;
pub(super) const APPLY_SUBGROUPS: u32 = 4;

/// A tile, by what makes kernels for it a permutation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    /// Most columns of a product: 32, 64 or 128.
    pub depth: u32,
    /// Whether B has low parts.
    pub low: bool,
    /// Without matrix units, to test what is around them.
    pub software: bool,
}

impl Tile {
    /// The depths that tiles have.
    pub const DEPTHS: [u32; 3] = [32, 64, 128];

    /// All tiles that there is room for.
    pub fn all() -> impl Iterator<Item = Self> {
        let of = |depth| [(false, false), (true, false), (false, true), (true, true)].map(|of| (depth, of));
        let tiles = Self::DEPTHS.into_iter().flat_map(of);
        tiles.map(|(depth, (low, software))| Self { depth, low, software }).filter(|tile| tile.room() > 0)
    }

    /// Subgroups whose tiles fit the workgroup memory.
    pub fn room(self) -> u32 {
        // More than 48 KB lets NVIDIA's driver hang; software adapters have 32.
        let memory: u32 = if self.software { 32 << 10 } else { 48 << 10 };
        let row = 2 * (self.depth + 8);
        let b = 64 * row * (1 + u32::from(self.low));
        memory.saturating_sub(b) / (16 * (2 * row + 4 * 72))
    }

    /// Subgroups of a workgroup, `most` if their tiles fit; each has 16 tokens.
    pub fn subgroups(self, most: u32) -> u32 {
        1 << self.room().clamp(1, most).ilog2()
    }

    /// The permutation of a kernel for this, of at most so many subgroups, and features of a type.
    pub fn permutation(self, kernel: Kernel, most: u32, dtype: Dtype) -> Kernel {
        let multiply = match self.software {
            true => "branch/shared/multiply_software",
            false => "branch/shared/multiply_units",
        };
        let features = match dtype {
            Dtype::F32 => "branch/shared/features_f32",
            Dtype::F16 | Dtype::Bf16 => "branch/shared/features_halves",
        };
        let kernel = kernel.number("DEPTH", self.depth).flag("LOW", self.low);
        let kernel = kernel.number("SUBGROUPS", self.subgroups(most));
        kernel.import("multiply", multiply).import("features", features)
    }
}

/// Channels of a subgroup of `branch/scores_halves.wgsl`.
pub(super) const SCORES_CHANNELS: u32 = 16;

/// What the kernels for features of 16 bits have of Z at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// Most columns of it.
    pub depth: u32,
    /// Whether units hold all of them in registers; scores then have half of them for each of two branches.
    pub held: bool,
    /// Without matrix units, to test what is around them.
    pub software: bool,
}

impl Block {
    /// The depths that blocks have. Of the last, Z and sums take 28 KB of workgroup memory.
    const DEPTHS: [u32; 3] = [64, 128, 256];
    /// Columns that registers hold.
    const HELD: u32 = 64;

    /// For so many columns, of which a branch has `widest`, if there is one.
    pub fn of_two(columns: usize, widest: usize, software: bool) -> Option<Self> {
        let block = Self::of_all(columns, software)?;
        Some(Self { held: widest as u32 <= Self::HELD / 2, ..block })
    }

    /// For so many columns, if there is one.
    pub fn of_all(columns: usize, software: bool) -> Option<Self> {
        let depth = Self::DEPTHS.into_iter().find(|&depth| columns <= depth as usize)?;
        Some(Self { depth, held: depth == Self::HELD, software })
    }

    /// All blocks.
    pub fn all() -> impl Iterator<Item = Self> {
        let depths = Self::DEPTHS.into_iter().map(|depth| (depth, false)).chain([(Self::HELD, true)]);
        depths.flat_map(|(depth, held)| [false, true].map(|software| Self { depth, held, software }))
    }

    /// Channels of a subgroup of `branch/apply_halves.wgsl`. Longer runs of a row are faster, where there is room for them.
    pub fn apply_channels(self) -> u32 {
        if self.held { 32 } else { 16 }
    }

    /// The permutation of a kernel for this, with so many channels for a subgroup.
    pub fn permutation(self, kernel: Kernel, channels: u32) -> Kernel {
        let multiply = match self {
            Self { software: true, .. } => "branch/shared/block_software",
            Self { held: true, .. } => "branch/shared/block_held",
            Self { held: false, .. } => "branch/shared/block_units",
        };
        let kernel = kernel.number("CHANNELS", channels).number("DEPTH", self.depth);
        kernel.flag("HELD", self.held).import("multiply", multiply)
    }
}
