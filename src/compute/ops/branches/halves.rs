//! A layer's factors as halves, which matrix units multiply: made once, as factors do not change.
//!
//! The kernels are `shaders/branch/split_b.wgsl` for B_cat and `split_rows.wgsl` for A_cat.

use std::ops::Range;
use std::sync::Arc;

use super::project::SplitA;
use super::project_halves::FragmentsA;
use super::tile::{Block, Tile};
use super::{COLUMN_STEP, HAS_LOW, Job, MAX_BRANCHES, SPLIT_CHANNELS, SPLIT_QUADS, UNIT_CHANNELS, starts};
use crate::Result;
use crate::compute::gpu::{Gpu, Pooled, whole};
use crate::compute::shaders::Kernel;
use crate::compute::{Batch, Shape};

/// The halves of a layer's factors, of those that matrix units serve.
#[derive(Debug, Default)]
pub(crate) struct Halves {
    pub(super) a: Option<SplitA>,
    pub(super) b: Option<SplitB>,
    /// A_cat once more, for activations of 16 bits.
    pub(super) fragments: Option<FragmentsA>,
}

/// The halves of B_cat: whole tiles of channels × columns.
#[derive(Debug)]
pub(super) struct SplitB {
    pub tiles: Tiles,
    pub buffer: Arc<Pooled>,
}

pub(super) fn kernel() -> Kernel {
    Kernel::new("branch/split_b")
}

/// How a layer is cut on matrix units.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    pub scores: Tile,
    /// `None` if all columns together are too many.
    pub apply: Option<Tile>,
    /// The blocks of two branches and of all, for features of 16 bits; `None` if their columns are too many.
    pub blocks: Option<(Block, Block)>,
    /// Columns of the halves, where each branch has its own.
    pub columns: usize,
    pub column_starts: [u32; MAX_BRANCHES + 1],
}

impl Tiles {
    /// The tiles of a layer, if they fit. Kernels read 4 channels at a time.
    fn new(gpu: &Gpu, width: usize, ranks: impl Iterator<Item = usize>, low: bool) -> Option<Self> {
        let caps = &gpu.capabilities;
        let software = gpu.disable.software_units
            && caps.f16
            && caps.subgroups.is_some_and(|(min, _)| min >= 8)
            && caps.workgroup_memory >= 32 << 10;
        let tile = |columns: usize| {
            let depth = Tile::DEPTHS.into_iter().find(|&depth| columns <= depth as usize)?;
            Some(Tile { depth, low, software }).filter(|tile| tile.room() > 0)
        };
        let (mut columns, mut widest, mut column_starts) = (0, 0, [0; MAX_BRANCHES + 1]);
        for (end, rank) in column_starts[1..].iter_mut().zip(ranks) {
            let own = rank.next_multiple_of(COLUMN_STEP);
            columns += own;
            widest = widest.max(own);
            *end = columns as u32;
        }
        let usable = (software || caps.matrix_units()) && width.is_multiple_of(4) && columns > 0;
        let scores = usable.then(|| tile(widest)).flatten()?;
        let of_two = column_starts
            .windows(3)
            .step_by(2)
            .map(|starts| starts[1].max(starts[2]).saturating_sub(starts[0]));
        let blocks = of_two.max().and_then(|of_two| {
            let of_two = Block::of_two(of_two as usize, widest, software);
            let blocks = of_two.zip(Block::of_all(columns, software));
            blocks.filter(|_| software || caps.subgroup_barrier)
        });
        Some(Self { scores, apply: tile(columns), blocks, columns, column_starts })
    }

    /// Bytes of B_cat's halves. Without low parts there is no room for them.
    fn bytes(&self, width: usize) -> u64 {
        let parts = 1 + u64::from(self.scores.low);
        (width.next_multiple_of(UNIT_CHANNELS) * self.columns * 2) as u64 * parts
    }
}

impl Halves {
    /// The halves of A_cat (rank × in) and B_catᵀ (rank × width, its columns padded to a multiple of 4), which have been
    /// written; `a`: A_cat; `low`: whether B_cat has more bits than one half holds.
    pub fn new(
        gpu: &Arc<Gpu>,
        layer: &Batch,
        a: &[f32],
        width: usize,
        blocks: &[Range<usize>],
        low: bool,
    ) -> Result<Self> {
        let ranks = blocks.iter().map(ExactSizeIterator::len);
        let split = SplitA::new(gpu, layer, 0)?;
        let Some(tiles) = Tiles::new(gpu, width, ranks, low) else {
            return Ok(Self { a: split, ..Self::default() });
        };
        let fragments = match tiles.blocks {
            Some((block, _)) => FragmentsA::new(gpu, a, layer.shapes()[0], block.software)?,
            None => None,
        };
        let mut commands = gpu.commands();
        let buffer = commands.scratch(gpu, tiles.bytes(width))?;
        let job = Job {
            width: width as u32,
            flags: if low { HAS_LOW } else { 0 },
            starts: starts(blocks),
            columns: tiles.columns as u32,
            column_starts: tiles.column_starts,
            ..Job::of(layer)
        };
        let rows = width.next_multiple_of(UNIT_CHANNELS);
        let grid = [rows / SPLIT_CHANNELS, tiles.columns.div_ceil(4 * SPLIT_QUADS), 1];
        commands.launch_grid(kernel(), &job, grid, &[layer.binding()?, whole(&buffer)])?;
        commands.submit()?;
        Ok(Self { a: split, b: Some(SplitB { tiles, buffer }), fragments })
    }

    /// Bytes that the halves of an A_cat of this shape, and of a B_cat of this width and of branches of these ranks, take.
    pub fn bytes_for(
        gpu: &Gpu,
        a: Shape,
        width: usize,
        ranks: impl Iterator<Item = usize>,
        low: bool,
    ) -> u64 {
        let of = |tiles: Tiles| tiles.bytes(width) + tiles.blocks.map_or(0, |_| FragmentsA::bytes_for(a));
        SplitA::bytes_for(gpu, a) + Tiles::new(gpu, width, ranks, low).map_or(0, of)
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> u64 {
        let a = self.a.as_ref().map_or(0, SplitA::bytes);
        let fragments = self.fragments.as_ref().map_or(0, FragmentsA::bytes);
        a + fragments + self.b.as_ref().map_or(0, |b| b.buffer.size())
    }
}
