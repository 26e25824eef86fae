//! Branches: low-rank updates of the same features, of which each token keeps the one that changes it most.
//!
//! The kernels are, in their order, `shaders/branch/scores.wgsl`, where tokens decide by means `branch/finish.wgsl` and
//! `branch/means.wgsl`, then `branch/choose.wgsl` and `branch/apply.wgsl`. Matrix units have `branch/scores_matrix.wgsl` and
//! `branch/apply_matrix.wgsl`, for which [`Halves`] are made of a layer's factors; and for features of 16 bits
//! `branch/project_halves.wgsl`, `branch/scores_halves.wgsl` and `branch/apply_halves.wgsl`. Below stand the f64 twins.

mod halves;
mod project_halves;
mod tile;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use rayon::prelude::*;
use serde::Serialize;

pub(crate) use self::halves::Halves;
use self::halves::{SplitB, Tiles};
use self::tile::{APPLY_SUBGROUPS, Block, SCORES_CHANNELS, SCORES_SUBGROUPS, Tile};
use super::activations::Bound;
use super::project::{self, Arithmetic, ProjectJob, project_cpu};
use super::{Activations, DTYPES, ENOUGH_WORKGROUPS, gemm, view, view_mut};
use crate::compute::gpu::{BIND_ALIGN, GRID_WIDTH, Gpu, Phase, Pooled, Prepared, lock, whole};
use crate::compute::memory::Buffer;
use crate::compute::shaders::{Declared, Kernel, job};
use crate::compute::{Batch, Shape};
use crate::{Dtype, Error, RawMatrix, Result};

/// How much a branch changes a token's features, f0 to f.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// `KL(p0 ‖ p)`, p: softmax of the channels at a temperature.
    #[default]
    Kl,
    /// `1 − cos(f0, f)`; 0 if f0 and f are both zero, 1 if one is.
    Dot,
    /// `‖f − f0‖²`.
    Energy,
}

impl Score {
    /// All scores.
    pub const ALL: [Self; 3] = [Self::Kl, Self::Dot, Self::Energy];

    /// `kl`, `dot`, `energy`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kl => "kl",
            Self::Dot => "dot",
            Self::Energy => "energy",
        }
    }

    /// The number that shaders/branch/shared/job.wgsl gives it.
    pub(crate) const fn code(self) -> u32 {
        self as u32
    }
}

/// Most branches of a layer.
pub(crate) const MAX_BRANCHES: usize = 8;

/// How a token's weights come about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Rule {
    Hard,
    Soft,
    /// Weights of the branches.
    Fixed([f32; MAX_BRANCHES]),
}

/// One call: what is done to the features of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Call<'a> {
    pub tokens: usize,
    /// Channels of the features.
    pub width: usize,
    /// Rows of A_cat of each branch.
    pub blocks: &'a [Range<usize>],
    /// Adapter of each branch.
    pub adapters: &'a [usize],
    /// Factor of each branch, but for the adapter's strength.
    pub factors: &'a [f32],
    /// Halves of the layer's factors.
    pub halves: &'a Halves,
    pub score: Score,
    pub rule: Rule,
    /// Tokens that choose together; 0: each for itself.
    pub group: usize,
    pub normalise: bool,
    /// Keep f32's accuracy for features of 16 bits as well.
    pub exact: bool,
}

impl Call<'_> {
    fn rank(&self) -> usize {
        self.blocks.last().map_or(0, |block| block.end)
    }
}

job! {
    /// What a host changes between calls; as shaders/branch/shared/job.wgsl has it.
    pub(crate) struct Controls {
        pub inverse_temperature: f32,
        pub padding: [f32; 3],
        pub strengths: [f32; MAX_BRANCHES],
    }
}

/// Elements of a layer's running means: a mean for each branch, the number of tokens, padding.
pub(crate) const RUNNING: usize = 16;
const _: () = assert!(RUNNING > MAX_BRANCHES);
/// Tokens that a running mean reaches back.
const WINDOW: f64 = 1_048_576.0;

/// Words of a record of the log, of which the first hold the tokens that each branch won: it begins where a binding can.
pub(crate) const RECORD: usize = BIND_ALIGN / 4;

job! {
    #[derive(Default)]
    struct Job {
        tokens: u32,
        first: u32,
        count: u32,
        width: u32,
        f0: u32,
        b: u32,
        stride: u32,
        rank: u32,
        branches: u32,
        score: u32,
        parts: u32,
        part_width: u32,
        group: u32,
        means: u32,
        running: u32,
        flags: u32,
        starts: [u32; MAX_BRANCHES + 1],
        columns: u32,
        column_starts: [u32; MAX_BRANCHES + 1],
        adapters: [u32; MAX_BRANCHES],
        factors: [f32; MAX_BRANCHES],
        fixed: [f32; MAX_BRANCHES],
    }
}

const FINISH: u32 = 1;
const SOFT: u32 = 2;
const NORMALISE: u32 = 4;
const FIXED: u32 = 8;
const UPDATE_RUNNING: u32 = 16;
const HAS_LOW: u32 = 32;

/// Tile of the kernels without matrix units.
const TILE_TOKENS: usize = 64;
const TILE_CHANNELS: usize = 128;
/// Tokens of a subgroup and channels of a tile on matrix units.
const UNIT_TOKENS: usize = 16;
const UNIT_CHANNELS: usize = 64;
/// Tokens and subgroups of the kernels for features of 16 bits.
const BLOCK_TOKENS: usize = 32;
const BLOCK_SUBGROUPS: usize = 4;
/// Workgroups that keep a large GPU busy with these, whose loads have little else to wait for.
const ENOUGH_BLOCKS: usize = 1152;
/// On matrix units, wider parts are split also where the GPU is full: fewer channels are not worth the start of a workgroup.
const UNIT_PART: usize = 1024;
/// Columns of halves, of which each branch has a multiple.
const COLUMN_STEP: usize = 16;
/// Channels of a workgroup of `branch/split_b.wgsl`, and its vectors of 4 columns.
const SPLIT_CHANNELS: usize = 32;
const SPLIT_QUADS: usize = 8;
/// What f16 does not hold of a mantissa in f32.
pub(crate) const LOW_BITS: u32 = 0x1fff;
/// Vectors of a partial score.
const STATE: usize = 2;
const STATE_BYTES: usize = STATE * 16;
/// Tokens of a workgroup of `branch/finish.wgsl` and of `branch/choose.wgsl`.
const FINISH_TOKENS: usize = 32;
const CHOOSE_TOKENS: usize = 16;
/// Features of 16 bits.
const OF_16_BITS: [Dtype; 2] = [Dtype::F16, Dtype::Bf16];
/// Most parts that the channels are split into.
const MAX_PARTS: usize = 8;

fn scored(kernel: Kernel, score: Score, dtype: Dtype) -> Kernel {
    let score = match score {
        Score::Kl => "KL",
        Score::Dot => "DOT",
        Score::Energy => "ENERGY",
    };
    kernel.dtype(dtype).named("SCORE", score)
}

/// The kernel of a score, for features of a type.
fn scores_kernel(score: Score, dtype: Dtype) -> Kernel {
    scored(Kernel::new("branch/scores"), score, dtype)
}

fn scores_matrix_kernel(score: Score, dtype: Dtype, tile: Tile) -> Kernel {
    let kernel = scored(Kernel::new("branch/scores_matrix"), score, dtype);
    tile.permutation(kernel, SCORES_SUBGROUPS, dtype)
}

fn finish_kernel() -> Kernel {
    Kernel::new("branch/finish")
}

fn means_kernel() -> Kernel {
    Kernel::new("branch/means")
}

fn choose_kernel() -> Kernel {
    Kernel::new("branch/choose").moving(7)
}

fn apply_kernel(dtype: Dtype) -> Kernel {
    Kernel::new("branch/apply").dtype(dtype)
}

fn apply_matrix_kernel(dtype: Dtype, tile: Tile) -> Kernel {
    tile.permutation(Kernel::new("branch/apply_matrix").dtype(dtype), APPLY_SUBGROUPS, dtype)
}

fn scores_halves_kernel(score: Score, dtype: Dtype, block: Block) -> Kernel {
    block.permutation(scored(Kernel::new("branch/scores_halves"), score, dtype), SCORES_CHANNELS)
}

fn apply_halves_kernel(dtype: Dtype, block: Block) -> Kernel {
    block.permutation(Kernel::new("branch/apply_halves").dtype(dtype), block.apply_channels())
}

pub(super) fn declared() -> Vec<Declared> {
    let scores = || Score::ALL.into_iter().flat_map(|score| DTYPES.map(|dtype| (score, dtype)));
    let tiles = || DTYPES.into_iter().flat_map(|dtype| Tile::all().map(move |tile| (dtype, tile)));
    let on_tiles = scores().flat_map(|(score, dtype)| Tile::all().map(move |tile| (score, dtype, tile)));
    let in_blocks = || OF_16_BITS.into_iter().flat_map(|dtype| Block::all().map(move |block| (dtype, block)));
    let scores_in_blocks =
        Score::ALL.into_iter().flat_map(|score| in_blocks().map(move |(dtype, block)| (score, dtype, block)));
    let of_blocks = |declared: Declared| {
        declared
            .constant("TOKENS", BLOCK_TOKENS)
            .constant("SUBGROUPS", BLOCK_SUBGROUPS)
            .constant("COLUMN_STEP", COLUMN_STEP)
            .constant("LOW_BITS", LOW_BITS)
    };
    vec![
        project_halves::declared(),
        of_blocks(declare(
            scores_in_blocks.map(|(score, dtype, block)| scores_halves_kernel(score, dtype, block)),
        ))
        .constant("STATE", STATE)
        .with_struct::<Controls>("controls"),
        of_blocks(declare(in_blocks().map(|(dtype, block)| apply_halves_kernel(dtype, block)))),
        declare(scores().map(|(score, dtype)| scores_kernel(score, dtype)))
            .constant("TOKENS", TILE_TOKENS)
            .constant("CHANNELS", TILE_CHANNELS)
            .constant("STATE", STATE)
            .with_struct::<Controls>("controls"),
        declare(on_tiles.map(|(score, dtype, tile)| scores_matrix_kernel(score, dtype, tile)))
            .constant("SUBGROUP_TOKENS", UNIT_TOKENS)
            .constant("CHANNELS", UNIT_CHANNELS)
            .constant("COLUMN_STEP", COLUMN_STEP)
            .constant("LOW_BITS", LOW_BITS)
            .constant("STATE", STATE)
            .with_struct::<Controls>("controls"),
        declare([halves::kernel()])
            .constant("TILE", UNIT_CHANNELS)
            .constant("CHANNELS", SPLIT_CHANNELS)
            .constant("QUADS", SPLIT_QUADS)
            .constant("COLUMN_STEP", COLUMN_STEP)
            .constant("LOW_BITS", LOW_BITS),
        declare([finish_kernel()]).constant("TOKENS", FINISH_TOKENS).constant("STATE", STATE),
        declare([means_kernel()]).float("WINDOW", WINDOW),
        declare([choose_kernel()])
            .constant("TOKENS", CHOOSE_TOKENS)
            .constant("STATE", STATE)
            .with_struct::<Controls>("controls"),
        declare(DTYPES.map(apply_kernel)).constant("TOKENS", TILE_TOKENS).constant("CHANNELS", TILE_CHANNELS),
        declare(tiles().map(|(dtype, tile)| apply_matrix_kernel(dtype, tile)))
            .constant("SUBGROUP_TOKENS", UNIT_TOKENS)
            .constant("CHANNELS", UNIT_CHANNELS)
            .constant("COLUMN_STEP", COLUMN_STEP)
            .constant("LOW_BITS", LOW_BITS),
    ]
}

/// Kernels with what shaders/branch/shared/job.wgsl gives all of them.
fn declare(kernels: impl IntoIterator<Item = Kernel>) -> Declared {
    Declared::new::<Job>(kernels)
        .constant("KL", Score::Kl.code())
        .constant("DOT", Score::Dot.code())
        .constant("ENERGY", Score::Energy.code())
        .constant("MAX_BRANCHES", MAX_BRANCHES)
        .constant("FINISH", FINISH)
        .constant("SOFT", SOFT)
        .constant("NORMALISE", NORMALISE)
        .constant("FIXED", FIXED)
        .constant("UPDATE_RUNNING", UPDATE_RUNNING)
        .constant("HAS_LOW", HAS_LOW)
}

/// The buffers that calls share.
#[derive(Debug)]
pub(crate) struct Buffers {
    z: Buffer,
    stats: Buffer,
    pub scores: Buffer,
    pub weights: Buffer,
    pub running: Buffer,
    pub log: Buffer,
    pub controls: Buffer,
    /// What the last call needed besides, for the next one.
    spare: Mutex<Vec<Arc<Pooled>>>,
    /// The last call of each layer, where calls are kept.
    calls: Option<Mutex<BTreeMap<usize, Recorded>>>,
}

/// A call as it was recorded, which serves the next one that is the same.
#[derive(Debug)]
struct Recorded {
    same: Same,
    pass: Arc<Prepared>,
}

/// What calls of a layer must have in common, that one's commands serve the other.
#[derive(Debug, PartialEq)]
struct Same {
    x: Place,
    f0: Place,
    score: Score,
    rule: Rule,
    group: usize,
    normalise: bool,
}

/// Where a host has activations.
#[derive(Debug, PartialEq)]
struct Place {
    buffer: wgpu::Buffer,
    offset: u64,
    dtype: Dtype,
    shape: Shape,
}

impl Place {
    fn of(activations: &Activations<'_>) -> Option<Self> {
        match *activations {
            Activations::Host(_) => None,
            Activations::Buffer { buffer, offset, dtype, .. } => {
                Some(Self { buffer: buffer.clone(), offset, dtype, shape: activations.shape() })
            }
        }
    }
}

impl Buffers {
    /// Buffers for calls of at most `tokens` on layers of at most these ranks and branches. `keep`: what calls were recorded
    /// with, for calls that are the same.
    pub fn new(
        gpu: &Arc<Gpu>,
        tokens: usize,
        rank: usize,
        branches: usize,
        layers: usize,
        records: usize,
        keep: bool,
    ) -> Result<Self> {
        // A grid's limit.
        let most = GRID_WIDTH as usize * CHOOSE_TOKENS;
        if tokens > most {
            return Err(Error::Invalid(format!(
                "a selector chooses for {most} tokens at once at most, not for {tokens} (SelectorOptions::tokens)"
            )));
        }
        let z = tokens.saturating_mul(rank).saturating_mul(4) as u64;
        let stats = (MAX_PARTS * branches * tokens * STATE_BYTES) as u64;
        let stats = if stats > gpu.max_arena() { (branches * tokens * STATE_BYTES) as u64 } else { stats };
        let buffer = |label: &str, elements: usize| gpu.allocate_values(label, elements, 4);
        Ok(Self {
            z: gpu.allocate("projected tokens", z)?,
            stats: gpu.allocate("partial scores", stats)?,
            // The second half: means of groups.
            scores: buffer("scores of branches", 2 * tokens * branches)?,
            weights: buffer("weights of branches", tokens * branches)?,
            running: buffer("running means of scores", layers.saturating_mul(RUNNING))?,
            log: buffer("log of decisions", records.saturating_mul(RECORD))?,
            controls: buffer("controls of branches", size_of::<Controls>() / 4)?,
            spare: Mutex::default(),
            calls: keep.then(Mutex::default),
        })
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        [&self.z, &self.stats, &self.scores, &self.weights, &self.running, &self.log, &self.controls]
            .iter()
            .map(|buffer| buffer.size())
            .chain(lock(&self.spare).iter().map(|buffer| buffer.size()))
            .sum()
    }
}

/// Into how many parts the channels are split so that the GPU is full.
fn parts(tokens: usize, tile: [usize; 2], width: usize) -> usize {
    let tiles = tokens.div_ceil(tile[0]).max(1);
    (ENOUGH_WORKGROUPS / tiles).clamp(1, width.div_ceil(tile[1]).max(1))
}

/// The tile of a workgroup of the kernels for features of 16 bits, of so many channels for a subgroup.
fn block_tile(channels: u32) -> [usize; 2] {
    [BLOCK_TOKENS, BLOCK_SUBGROUPS * channels as usize]
}

/// Into how many parts the channels are split for those, of `pairs` of branches.
fn block_parts(tokens: usize, pairs: usize) -> usize {
    ENOUGH_BLOCKS / (tokens.div_ceil(BLOCK_TOKENS) * pairs).max(1)
}

/// Whether rows begin where so many words can be read at a time.
fn aligned(windows: &[Window<'_>], words: usize) -> bool {
    windows.iter().all(|window| window.bound.word.is_multiple_of(words))
}

/// B's halves, if f0 lies so that kernels for matrix units can read 4 channels at a time.
fn units<'a>(call: &Call<'a>, dtype: Dtype, windows: &[Window<'_>]) -> Option<&'a SplitB> {
    let words = if dtype == Dtype::F32 { 4 } else { 2 };
    call.halves.b.as_ref().filter(|_| aligned(windows, words))
}

/// The blocks of kernels for features of 16 bits, if these are, and lie so that they can read 8 channels at a time.
fn blocks(call: &Call<'_>, units: &SplitB, dtype: Dtype, windows: &[Window<'_>]) -> Option<(Block, Block)> {
    let fits = aligned(windows, 4) && call.width.is_multiple_of(8) && dtype != Dtype::F32 && !call.exact;
    units.tiles.blocks.filter(|_| fits)
}

/// As many rows of a host's matrix as one binding holds.
struct Window<'a> {
    bound: Bound<'a>,
    first: usize,
    count: usize,
}

fn windows<'a>(what: &str, matrix: &Activations<'a>, limit: u64) -> Result<Vec<Window<'a>>> {
    let (row, tokens) = (matrix.row_bytes() as u64, matrix.shape().rows);
    let rows = (limit.saturating_sub(BIND_ALIGN as u64) / row.max(1)).min(tokens as u64) as usize;
    // An even number of rows keeps windows of halves on whole words.
    let rows = if rows < tokens { rows & !1 } else { rows };
    if rows == 0 {
        return Err(Error::Device(format!(
            "two rows of {row} bytes exceed the {limit} bytes that the device can bind at once"
        )));
    }
    let window = |first: usize| {
        let count = rows.min(tokens - first);
        Ok(Window { bound: matrix.bind(what, first..first + count, limit)?, first, count })
    };
    (0..tokens).step_by(rows).map(window).collect()
}

/// Checks what a call gets; before anything is recorded.
pub(crate) fn check(call: &Call<'_>, width_in: usize, x: Shape, f0: Shape, f0_dtype: Dtype) -> Result<()> {
    let shape = |s: Shape| format!("{} x {}", s.rows, s.cols);
    if x.cols != width_in || f0.cols != call.width || x.rows != f0.rows {
        return Err(Error::Invalid(format!(
            "x is {} and f0 is {}, but the layer takes tokens x {width_in} to tokens x {}",
            shape(x),
            shape(f0),
            call.width
        )));
    }
    if f0_dtype != Dtype::F32 && !call.width.is_multiple_of(2) {
        return Err(Error::Invalid(format!(
            "f0 of {f0_dtype} has an odd width of {}; rows of halves must end on whole words: use f32",
            call.width
        )));
    }
    Ok(())
}

/// Records a call into the host's encoder. `layer`: A_cat (rank × in) and B_catᵀ (rank × width, its columns padded to a
/// multiple of 4). `running`: which layer's means; `record`: which record of the log.
#[expect(clippy::too_many_arguments, reason = "the pieces of one call, each named")]
pub(crate) fn encode(
    gpu: &Arc<Gpu>,
    encoder: &mut wgpu::CommandEncoder,
    buffers: &Buffers,
    layer: &Batch,
    call: &Call<'_>,
    x: Activations<'_>,
    f0: Activations<'_>,
    running: usize,
    record: usize,
) -> Result<()> {
    let (tokens, rank, branches) = (call.tokens, call.rank(), call.blocks.len());
    if (tokens * rank * 4) as u64 > buffers.z.size() || (tokens * branches * 32) as u64 > buffers.stats.size()
    {
        return Err(Error::Invalid(format!("{tokens} tokens are more than the buffers were made for")));
    }
    // The kernels add to the record.
    let start = (record * RECORD * 4) as u64;
    let mut record = |pass: &Arc<Prepared>| {
        encoder.clear_buffer(&buffers.log, start, Some((RECORD * 4) as u64));
        pass.record(encoder, start as u32);
    };
    let same = Place::of(&x).zip(Place::of(&f0)).filter(|_| buffers.calls.is_some()).map(|(x, f0)| Same {
        x,
        f0,
        score: call.score,
        rule: call.rule,
        group: call.group,
        normalise: call.normalise,
    });
    if let (Some(same), Some(calls)) = (&same, &buffers.calls)
        && let Some(recorded) = lock(calls).get(&running).filter(|recorded| recorded.same == *same)
    {
        record(&recorded.pass);
        return Ok(());
    }
    let limit = gpu.max_arena();
    let (x_windows, f0_windows) = (windows("x", &x, limit)?, windows("f0", &f0, limit)?);
    let mut commands = gpu.commands();
    commands.reuse(std::mem::take(&mut *lock(&buffers.spare)));
    // The host may drop the selector before it submits.
    let factors = layer.binding()?;
    if let Some(layer) = layer.on_gpu() {
        commands.keep(layer.buffer.clone());
    }

    let units = units(call, f0.dtype(), &f0_windows);
    let of_blocks = units.and_then(|units| blocks(call, units, f0.dtype(), &f0_windows));
    let quick = call.halves.fragments.as_ref().filter(|_| of_blocks.is_some());
    let quick = quick.filter(|fragments| fragments.reads(x.dtype(), &x_windows));
    if let Some(fragments) = quick {
        fragments.encode(&mut commands, x.dtype(), &x_windows, &whole(&buffers.z))?;
    }
    for window in x_windows.iter().filter(|_| quick.is_none()) {
        let job = ProjectJob {
            x: 0,
            x_word: window.bound.word,
            tokens: window.count,
            dtype: x.dtype(),
            a: 0,
            z: window.first * rank,
        };
        let z = whole(&buffers.z);
        let x = std::slice::from_ref(&window.bound.binding);
        let arithmetic = call.halves.a.as_ref().map_or(Arithmetic::F32, Arithmetic::Halves);
        project::encode(&mut commands, gpu, x, &[job], layer, z, arithmetic)?;
    }

    let mut job = job(call, layer, units, running);
    let (z, stats, scores) = (whole(&buffers.z), whole(&buffers.stats), whole(&buffers.scores));
    let (weights, means) = (whole(&buffers.weights), whole(&buffers.running));
    let (controls, log) = (whole(&buffers.controls), whole(&buffers.log));
    let for_window = |job: &Job, window: &Window<'_>| Job {
        first: window.first as u32,
        count: window.count as u32,
        f0: window.bound.word as u32,
        ..*job
    };
    if let Some(units) = units {
        commands.keep(units.buffer.clone());
    }

    if !matches!(call.rule, Rule::Fixed(_)) {
        commands.phase(Phase::Score);
        // Kernels, the tile of a workgroup, the branches that it takes at once, and parts of the channels.
        let (kernel, tile, at_once, wanted) = match (units, of_blocks) {
            (_, Some((of_two, _))) => {
                let kernel = scores_halves_kernel(call.score, f0.dtype(), of_two);
                (kernel, block_tile(SCORES_CHANNELS), 2, block_parts(tokens, branches.div_ceil(2)))
            }
            (Some(SplitB { tiles: Tiles { scores: tile, .. }, .. }), None) => {
                let kernel = scores_matrix_kernel(call.score, f0.dtype(), *tile);
                let tile = [tile.subgroups(SCORES_SUBGROUPS) as usize * UNIT_TOKENS, UNIT_CHANNELS];
                (kernel, tile, 1, parts(tokens * branches, tile, call.width))
            }
            (None, None) => {
                let tile = [TILE_TOKENS, TILE_CHANNELS];
                (scores_kernel(call.score, f0.dtype()), tile, 1, parts(tokens * branches, tile, call.width))
            }
        };
        let b = units.map_or_else(|| factors.clone(), |units| whole(&units.buffer));
        let wanted = if units.is_some() { wanted.max(call.width / UNIT_PART) } else { wanted };
        let most = buffers.stats.size() as usize / (branches * tokens * STATE_BYTES);
        (job.parts, job.part_width) = split(call.width, tile[1], wanted.min(most).min(MAX_PARTS));
        for window in &f0_windows {
            let grid = [window.count.div_ceil(tile[0]), branches.div_ceil(at_once), job.parts as usize];
            let f0 = window.bound.binding.clone();
            let bindings = [b.clone(), z.clone(), f0, controls.clone(), stats.clone()];
            commands.launch_grid(kernel, &for_window(&job, window), grid, &bindings)?;
        }
        if call.normalise || call.group > 0 {
            commands.phase(Phase::FinishScores);
            let grid = [tokens.div_ceil(FINISH_TOKENS), 1, 1];
            commands.launch_grid(finish_kernel(), &job, grid, &[stats.clone(), scores.clone()])?;
            commands.phase(Phase::Means);
            let bindings = [scores.clone(), means.clone()];
            if call.normalise {
                let job = Job { flags: UPDATE_RUNNING, ..job };
                commands.launch_line(means_kernel(), &job, 1, &bindings)?;
            }
            if call.group > 0 {
                commands.launch_line(means_kernel(), &job, tokens.div_ceil(call.group), &bindings)?;
            }
        } else {
            job.flags |= FINISH;
        }
    }
    commands.phase(Phase::Choose);
    let grid = [tokens.div_ceil(CHOOSE_TOKENS), 1, 1];
    let log = wgpu::BufferBinding { size: wgpu::BufferSize::new((RECORD * 4) as u64), ..log };
    let bindings = [stats, scores, weights, means, log, z.clone(), controls];
    commands.launch_grid(choose_kernel(), &job, grid, &bindings)?;
    commands.phase(Phase::Apply);
    // Kernels for matrix units have the tokens in the first direction of the grid.
    let (kernel, tile, b, tokens_first) = match (units, of_blocks) {
        (Some(units), Some((_, of_all))) => {
            let wanted = block_parts(tokens, 1).max(call.width / UNIT_PART);
            (job.parts, job.part_width) = split(call.width, block_tile(of_all.apply_channels())[1], wanted);
            (apply_halves_kernel(f0.dtype(), of_all), BLOCK_TOKENS, whole(&units.buffer), true)
        }
        (Some(SplitB { tiles: Tiles { apply: Some(tile), .. }, buffer }), None) => {
            let tokens_of_tile = tile.subgroups(APPLY_SUBGROUPS) as usize * UNIT_TOKENS;
            let wanted =
                parts(tokens, [tokens_of_tile, UNIT_CHANNELS], call.width).max(call.width / UNIT_PART);
            (job.parts, job.part_width) = split(call.width, UNIT_CHANNELS, wanted);
            (apply_matrix_kernel(f0.dtype(), *tile), tokens_of_tile, whole(buffer), true)
        }
        _ => {
            (job.parts, job.part_width) = split(call.width, TILE_CHANNELS, usize::MAX);
            (apply_kernel(f0.dtype()), TILE_TOKENS, factors, false)
        }
    };
    for window in &f0_windows {
        let tiles = window.count.div_ceil(tile);
        let grid = if tokens_first { [tiles, job.parts as usize, 1] } else { [job.parts as usize, tiles, 1] };
        let bindings = [b.clone(), z.clone(), window.bound.binding.clone()];
        commands.launch_grid(kernel, &for_window(&job, window), grid, &bindings)?;
    }
    let (pass, scratch) = commands.prepare()?;
    *lock(&buffers.spare) = scratch;
    record(&pass);
    if let (Some(same), Some(calls)) = (same, &buffers.calls) {
        lock(calls).insert(running, Recorded { same, pass });
    }
    Ok(())
}

/// How many parts that makes, and the channels of each: whole tiles.
fn split(width: usize, tile: usize, parts: usize) -> (u32, u32) {
    let part = width.div_ceil(tile).div_ceil(parts.max(1)).max(1) * tile;
    (width.div_ceil(part) as u32, part as u32)
}

/// Where the branches begin, and the end.
fn starts(blocks: &[Range<usize>]) -> [u32; MAX_BRANCHES + 1] {
    let mut starts = [0; MAX_BRANCHES + 1];
    starts[1..].iter_mut().zip(blocks).for_each(|(start, block)| *start = block.end as u32);
    starts
}

impl Job {
    /// A job on a layer's factors.
    fn of(layer: &Batch) -> Self {
        let stride = layer.shapes()[1].cols / 4;
        Self { b: (layer.offset(1) / 4) as u32, stride: stride as u32, ..Self::default() }
    }
}

fn job(call: &Call<'_>, layer: &Batch, units: Option<&SplitB>, running: usize) -> Job {
    let mut job = Job {
        tokens: call.tokens as u32,
        count: call.tokens as u32,
        width: call.width as u32,
        rank: call.rank() as u32,
        branches: call.blocks.len() as u32,
        score: call.score.code(),
        parts: 1,
        group: call.group as u32,
        means: (call.tokens * call.blocks.len()) as u32,
        running: (running * RUNNING) as u32,
        flags: if call.normalise { NORMALISE } else { 0 },
        starts: starts(call.blocks),
        ..Job::of(layer)
    };
    if let Some(units) = units {
        job.columns = units.tiles.columns as u32;
        job.column_starts = units.tiles.column_starts;
    }
    for (k, adapter) in call.adapters.iter().enumerate() {
        job.adapters[k] = *adapter as u32;
        job.factors[k] = call.factors[k];
    }
    match call.rule {
        Rule::Hard => {}
        Rule::Soft => job.flags |= SOFT,
        Rule::Fixed(weights) => {
            job.flags = FIXED;
            job.fixed = weights;
        }
    }
    job
}

/// What the CPU twin found: tokens × branches each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Decided {
    pub scores: Vec<f64>,
    pub weights: Vec<f64>,
}

/// The CPU twin. `a`: rank × in, `b`: for each branch its B (width × rank of the branch) times all its factors;
/// `f0` is changed in place; `running`: [`RUNNING`] elements.
pub(crate) fn branches_cpu(
    call: &Call<'_>,
    a: &[f64],
    b: &[Vec<f64>],
    inverse_temperature: f64,
    x: RawMatrix<'_>,
    f0: &mut [f64],
    running: &mut [f64],
) -> Decided {
    let (tokens, width, branches, rank) = (call.tokens, call.width, call.blocks.len(), call.rank());
    let mut decided = Decided { scores: vec![0.0; tokens * branches], weights: vec![0.0; tokens * branches] };
    if tokens == 0 || width == 0 {
        return decided;
    }
    let mut z = vec![0.0; tokens * rank];
    project_cpu(x, a, &mut z);
    // Rows of U_k of some tokens.
    let update = |k: usize, z: &[f64], u: &mut [f64]| {
        let block = call.blocks[k].clone();
        let columns: Vec<f64> = z.chunks_exact(rank).flat_map(|row| &row[block.clone()]).copied().collect();
        let count = z.len() / rank;
        gemm(
            view_mut(u, Shape::new(count, width)),
            faer::Accum::Replace,
            1.0,
            view(&columns, Shape::new(count, block.len())),
            view(&b[k], Shape::new(width, block.len())).transpose(),
        );
    };
    if !matches!(call.rule, Rule::Fixed(_)) {
        decided
            .scores
            .par_chunks_mut(TILE_TOKENS * branches)
            .zip(z.par_chunks(TILE_TOKENS * rank))
            .zip(f0.par_chunks(TILE_TOKENS * width))
            .for_each(|((scores, z), f0)| {
                let mut u = vec![0.0; f0.len()];
                for k in 0..branches {
                    update(k, z, &mut u);
                    for (i, (f0, u)) in f0.chunks_exact(width).zip(u.chunks_exact(width)).enumerate() {
                        scores[i * branches + k] = score_cpu(call.score, f0, u, inverse_temperature);
                    }
                }
            });
    }
    decide_cpu(call, &decided.scores, &mut decided.weights, running);
    f0.par_chunks_mut(TILE_TOKENS * width)
        .zip(z.par_chunks(TILE_TOKENS * rank))
        .zip(decided.weights.par_chunks(TILE_TOKENS * branches))
        .for_each(|((f0, z), weights)| {
            let mut u = vec![0.0; f0.len()];
            for k in 0..branches {
                update(k, z, &mut u);
                for (i, (f0, u)) in f0.chunks_exact_mut(width).zip(u.chunks_exact(width)).enumerate() {
                    let weight = weights[i * branches + k];
                    if weight != 0.0 {
                        f0.iter_mut().zip(u).for_each(|(f, u)| *f += weight * u);
                    }
                }
            }
        });
    decided
}

/// The twin of `branch/scores.wgsl`, for one token.
fn score_cpu(score: Score, f0: &[f64], u: &[f64], inverse_temperature: f64) -> f64 {
    match score {
        Score::Energy => u.iter().map(|u| u * u).sum(),
        Score::Dot => {
            let sum = |f: &dyn Fn(f64, f64) -> f64| f0.iter().zip(u).map(|(f0, u)| f(*f0, *u)).sum::<f64>();
            let (a, b, q) = (sum(&|f0, _| f0 * f0), sum(&|f0, u| f0 * u), sum(&|_, u| u * u));
            let f = (a + 2.0 * b + q).max(0.0);
            if a == 0.0 || f == 0.0 {
                return if q == 0.0 { 0.0 } else { 1.0 };
            }
            let (norms, dot) = (a.sqrt() * f.sqrt(), a + b);
            match dot < 0.0 {
                true => 1.0 - dot / norms,
                false => (a * q - b * b).max(0.0) / norms / (norms + dot),
            }
        }
        Score::Kl => {
            let t = inverse_temperature;
            let max = f0.iter().fold(f64::NEG_INFINITY, |max, f| max.max(f * t));
            let weights: Vec<f64> = f0.iter().map(|f| (f * t - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            let c = weights.iter().zip(u).map(|(w, u)| w * u * t).sum::<f64>() / total;
            let d = |u: f64| u * t - c;
            // Σ p·φ(d), φ(d) = e^d - 1 - d, apart from a factor of e^g.
            let g = f0.iter().zip(u).map(|(f, u)| f * t - max + d(*u)).fold(0.0, f64::max);
            let excess: f64 =
                weights.iter().zip(f0).zip(u).map(|((w, f), u)| excess(*w, f * t - max, d(*u), g)).sum();
            match g < 500.0 {
                true => (excess / total * g.exp()).ln_1p(),
                false => g + (excess / total).ln(),
            }
        }
    }
}

/// `w·e^-g·φ(d)`, where w = e^log_w.
fn excess(w: f64, log_w: f64, d: f64, g: f64) -> f64 {
    if d.abs() > 0.5 {
        return (log_w + d - g).exp() - (1.0 + d) * w * (-g).exp();
    }
    // The series to d^18 / 18!.
    let series = (2..=18).rev().fold(0.0, |sum, n| (1.0 + sum) * d / f64::from(n));
    w * (-g).exp() * series * d
}

/// The twin of `branch/means.wgsl` and of what `branch/choose.wgsl` decides.
fn decide_cpu(call: &Call<'_>, scores: &[f64], weights: &mut [f64], running: &mut [f64]) {
    let branches = call.blocks.len();
    let mean = |tokens: &[f64], k: usize| {
        tokens.iter().skip(k).step_by(branches).sum::<f64>() / (tokens.len() / branches) as f64
    };
    let fixed = matches!(call.rule, Rule::Fixed(_));
    if call.normalise && !fixed {
        let tokens = call.tokens as f64;
        let n = (running[MAX_BRANCHES] + tokens).min(WINDOW);
        for (k, running) in running.iter_mut().enumerate().take(branches) {
            let mean = mean(scores, k);
            if mean.is_finite() {
                *running += (mean - *running) * (tokens / n).min(1.0);
            }
        }
        running[MAX_BRANCHES] = n;
    }
    let groups = if call.group > 0 && !fixed { call.group } else { 1 };
    for (scores, weights) in scores.chunks(groups * branches).zip(weights.chunks_mut(groups * branches)) {
        let values: Vec<f64> = (0..branches)
            .map(|k| match call.rule {
                Rule::Fixed(weights) => f64::from(weights[k]),
                _ if !call.normalise => mean(scores, k),
                _ if running[k] > 0.0 => mean(scores, k) / running[k],
                _ => 0.0,
            })
            .collect();
        let sum: f64 = values.iter().sum();
        let mut best = 0;
        for k in 1..branches {
            if values[k] > values[best] {
                best = k;
            }
        }
        for row in weights.chunks_exact_mut(branches) {
            for (k, weight) in row.iter_mut().enumerate() {
                *weight = match call.rule {
                    Rule::Fixed(_) => values[k],
                    Rule::Hard => f64::from(u8::from(k == best)),
                    Rule::Soft if sum > 0.0 => values[k] / sum,
                    Rule::Soft => 1.0 / branches as f64,
                };
            }
        }
    }
}
