use std::ops::Range;

use rayon::prelude::*;

use super::{gemm, mismatch, view_mut};
use crate::compute::batch::{ANY, FACTOR, OnHost, Operands};
use crate::compute::gpu::{Work, whole};
use crate::compute::shaders::{Declared, Kernel, job};
use crate::compute::{Batch, Device, Element, Shape};
use crate::{Error, Matrix, Result};

/// One of several updates `s·B[:, ranks]·A[ranks, :]` whose entries are merged.
#[derive(Clone, Debug)]
pub struct EntryMember {
    /// Its columns of B and rows of A.
    pub ranks: Range<usize>,
    /// s.
    pub scale: f64,
    /// Magnitude, as f32, that an entry must reach to count.
    pub threshold: f32,
    /// Key of its chance.
    pub key: [u32; 2],
    /// What its entries are multiplied by once signs are elected.
    pub weight: f64,
}

/// How the entries of several updates become one.
#[derive(Clone, Debug)]
pub struct EntryRule {
    /// The updates.
    pub members: Vec<EntryMember>,
    /// An entry counts if its hash is at most this.
    pub chance: u32,
    /// Average what counts over the members that have the sign of its sum, before weights; else sum it.
    pub elect: bool,
    /// The sign that a sum of zero elects is minus; else plus.
    pub zero_is_minus: bool,
    /// What the result is multiplied by.
    pub scale: f64,
}

impl EntryRule {
    /// The merged entry of row i, column j.
    pub fn merged(&self, i: usize, j: usize, values: impl Iterator<Item = f64>) -> f64 {
        self.decided(i, j, values).0
    }

    /// The merged entry of row i, column j, and the sign of the sum of what counts: 1, 0 or -1.
    pub fn decided(&self, i: usize, j: usize, values: impl Iterator<Item = f64>) -> (f64, i64) {
        let (mut plus, mut minus) = (Side::default(), Side::default());
        for (member, v) in self.members.iter().zip(values) {
            let near = v as f32;
            if near.abs() < member.threshold || hash(i as u32, j as u32, member.key) > self.chance {
                continue;
            }
            if near > 0.0 {
                plus.add(v, member.weight);
            } else if near < 0.0 {
                minus.add(v, member.weight);
            }
        }
        let sum = (plus.sum + minus.sum) as f32;
        let merged = match self.elect {
            false => plus.weighted + minus.weighted,
            true if sum > 0.0 || (sum == 0.0 && !self.zero_is_minus) => plus.mean(),
            true => minus.mean(),
        };
        (self.scale * merged, i64::from(sum > 0.0) - i64::from(sum < 0.0))
    }
}

/// The entries of one sign that count.
#[derive(Default)]
struct Side {
    sum: f64,
    weighted: f64,
    count: u32,
}

impl Side {
    fn add(&mut self, v: f64, weight: f64) {
        self.sum += v;
        self.weighted += weight * v;
        self.count += 1;
    }

    fn mean(&self) -> f64 {
        self.weighted / f64::from(self.count.max(1))
    }
}

/// Chance of an entry, uniform in 32 bits: pcg3d (Jarzynski and Olano, Hash Functions for GPU Rendering, JCGT 2020)
/// of row, column and key.
fn hash(row: u32, column: u32, key: [u32; 2]) -> u32 {
    let step = |v: u32| v.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    let (mut x, mut y, mut z) = (step(row ^ key[1]), step(column), step(key[0]));
    x = x.wrapping_add(y.wrapping_mul(z));
    y = y.wrapping_add(z.wrapping_mul(x));
    z = z.wrapping_add(x.wrapping_mul(y));
    (x, y, z) = (x ^ (x >> 16), y ^ (y >> 16), z ^ (z >> 16));
    x.wrapping_add(y.wrapping_mul(z))
}

/// Some rows of a merged update.
#[derive(Debug)]
pub struct Entries {
    /// One matrix, rows × in, of [`Device::factor`].
    pub values: Batch,
    /// ‖values‖².
    pub square: f64,
    /// How many sums of what counts, before weights, are above zero, less how many are below.
    pub signs: i64,
}

/// `rule(s_1·B_1·A_1, …, s_K·B_K·A_K)`, entry by entry, for some rows: what TIES and DARE make of updates, a panel at a
/// time.
///
/// `a`: one matrix, R × in; `b`: one matrix, out × R; both factors ([`Device::factor`]). Products and sums are of
/// [`Device::product`], the result is rounded once more.
///
/// # Errors
/// [`Error::Invalid`] if shapes or ranges do not fit.
pub fn entries(
    device: &Device,
    a: &Batch,
    b: &Batch,
    rule: &EntryRule,
    rows: Range<usize>,
) -> Result<Entries> {
    let shape = check(a, b, &rule.members, &rows)?;
    let panel = Shape::new(rows.len(), shape.cols);
    let (gpu, [a_on, b_on]) = match Operands::of("entries", device, [(a, FACTOR), (b, FACTOR)])? {
        Operands::Gpu(gpu, operands) => (gpu, operands),
        Operands::Host([a, b]) => {
            let mut values = Batch::zeros(&Device::cpu(), Element::Host, &[panel])?;
            let (mut square, mut signs) = (0.0, 0);
            for out in values.host_mut()? {
                let (more, other) = entries_cpu(a, b, rule, &rows, panel.cols, out);
                (square, signs) = (square + more, signs + other);
            }
            return Ok(Entries { values, square, signs });
        }
    };
    let values = Batch::zeros(device, device.factor(), &[panel])?;
    let job = Job {
        factors: factors(a, b, shape, &rows),
        members: rule.members.len() as u32,
        chance: rule.chance,
        elect: match (rule.elect, rule.zero_is_minus) {
            (false, _) => SUM,
            (true, false) => ELECT_PLUS,
            (true, true) => ELECT_MINUS,
        },
        scale: rule.scale as f32,
    };
    let tiles = (panel.rows.div_ceil(TILE) as u32, panel.cols.div_ceil(TILE) as u32);
    let work: Vec<Work> =
        (0..tiles.0).flat_map(|row| (0..tiles.1).map(move |c| [0, row, c, row * tiles.1 + c])).collect();
    // Each tile leaves its sum of squares and its signs, which f32 counts exactly.
    let bytes = work.len() as u64 * 8;
    let tallies = gpu.scratch(bytes)?;
    let members = gpu.scratch((rule.members.len() * size_of::<Member>()) as u64)?;
    gpu.write(&members, 0, bytemuck::cast_slice(&table(&rule.members, &[])))?;
    let mut commands = gpu.commands();
    let buffers = [a_on.binding(), b_on.binding(), whole(&members), values.binding()?, whole(&tallies)];
    commands.launch(kernel(device.product()), &[job], &work, &buffers)?;
    commands.submit()?;
    let tallies: Vec<[f32; 2]> = bytemuck::pod_collect_to_vec(&gpu.read(&tallies, bytes)?);
    let square = tallies.iter().map(|[square, _]| f64::from(*square)).sum();
    let signs = tallies.iter().map(|[_, signs]| *signs as i64).sum();
    Ok(Entries { values, square, signs })
}

/// The side of a tile of entries, of which a thread of the shaders makes one.
const TILE: usize = 16;

/// How a job makes one of what counts, and the sign that a sum of zero elects.
const SUM: u32 = 0;
const ELECT_PLUS: u32 = 1;
const ELECT_MINUS: u32 = 2;

fn kernel(sums: Element) -> Kernel {
    Kernel::new("entries").real(sums)
}

fn magnitudes_kernel(sums: Element) -> Kernel {
    Kernel::new("magnitudes").real(sums)
}

pub(super) fn declared() -> [Declared; 2] {
    let each = |kernel: fn(Element) -> Kernel| ANY.iter().map(move |&sums| kernel(sums));
    [
        Declared::new::<Job>(each(kernel))
            .constant("TILE", TILE)
            .constant("SUM", SUM)
            .constant("ELECT_PLUS", ELECT_PLUS)
            .constant("ELECT_MINUS", ELECT_MINUS)
            .with_struct::<Member>("members"),
        Declared::new::<MagnitudesJob>(each(magnitudes_kernel))
            .constant("TILE", TILE)
            .constant("BUCKETS", BUCKETS)
            .constant("LOWER_BITS", LOWER_BITS)
            .with_struct::<Member>("members"),
    ]
}

/// Buckets of a histogram of [`magnitudes`].
pub const BUCKETS: usize = 1 << 16;
/// Bits that the second histogram counts by.
const LOWER_BITS: u32 = 15;

/// Adds to `counts`, of [`BUCKETS`] for each member, how often bits of the magnitudes `|s_k·B_k·A_k|` as f32 occur in some
/// rows: without `prefixes` the upper 16 bits; else the lower 15 of entries whose upper ones are the member's prefix.
///
/// Shapes and arithmetic as of [`entries`].
///
/// # Errors
/// [`Error::Invalid`] if shapes or ranges do not fit.
pub fn magnitudes(
    device: &Device,
    a: &Batch,
    b: &Batch,
    members: &[EntryMember],
    prefixes: Option<&[u32]>,
    rows: Range<usize>,
    counts: &mut [Vec<u64>],
) -> Result<()> {
    let shape = check(a, b, members, &rows)?;
    let per_member = |len: usize| len == members.len();
    if !per_member(counts.len())
        || counts.iter().any(|counts| counts.len() != BUCKETS)
        || !prefixes.is_none_or(|prefixes| per_member(prefixes.len()))
    {
        return Err(Error::Invalid(format!(
            "magnitudes: {} members need as many histograms of {BUCKETS}, and as many prefixes or none",
            members.len()
        )));
    }
    let (gpu, [a_on, b_on]) = match Operands::of("magnitudes", device, [(a, FACTOR), (b, FACTOR)])? {
        Operands::Gpu(gpu, operands) => (gpu, operands),
        Operands::Host([a, b]) => {
            magnitudes_cpu(a, b, members, prefixes, &rows, shape.cols, counts);
            return Ok(());
        }
    };
    let job = MagnitudesJob { factors: factors(a, b, shape, &rows), upper: u32::from(prefixes.is_none()) };
    let tiles = (rows.len().div_ceil(TILE) as u32, shape.cols.div_ceil(TILE) as u32);
    let tile = |k: u32| (0..tiles.0).flat_map(move |row| (0..tiles.1).map(move |c| [0, row, c, k]));
    let work: Vec<Work> = (0..members.len() as u32).flat_map(tile).collect();
    let bytes = (members.len() * BUCKETS * 4) as u64;
    let histogram = gpu.zeros(bytes)?;
    let entries = gpu.scratch((members.len() * size_of::<Member>()) as u64)?;
    gpu.write(&entries, 0, bytemuck::cast_slice(&table(members, prefixes.unwrap_or_default())))?;
    let mut commands = gpu.commands();
    let buffers = [a_on.binding(), b_on.binding(), whole(&entries), whole(&histogram)];
    commands.launch(magnitudes_kernel(device.product()), &[job], &work, &buffers)?;
    commands.submit()?;
    let found: Vec<u32> = bytemuck::pod_collect_to_vec(&gpu.read(&histogram, bytes)?);
    for (counts, found) in counts.iter_mut().zip(found.chunks_exact(BUCKETS)) {
        counts.iter_mut().zip(found).for_each(|(c, f)| *c += u64::from(*f));
    }
    Ok(())
}

fn check(a: &Batch, b: &Batch, members: &[EntryMember], rows: &Range<usize>) -> Result<Shape> {
    let ([a], [b]) = (a.shapes(), b.shapes()) else {
        return Err(Error::Invalid(format!("entries: {} and {} matrices; expected one", a.len(), b.len())));
    };
    if a.rows != b.cols {
        return Err(mismatch("entries", *b, *a));
    }
    let within = |range: &Range<usize>, len: usize| range.start <= range.end && range.end <= len;
    if !within(rows, b.rows) || !members.iter().all(|m| within(&m.ranks, a.rows)) {
        return Err(Error::Invalid(format!("entries: rows or ranks beyond {} x {}", b.rows, a.rows)));
    }
    Ok(Shape::new(b.rows, a.cols))
}

job! {
    struct FactorsJob {
        a: u32,
        b: u32,
        rows: u32,
        cols: u32,
        rank: u32,
        first_row: u32,
        last_row: u32,
    }
}

fn factors(a: &Batch, b: &Batch, shape: Shape, rows: &Range<usize>) -> FactorsJob {
    FactorsJob {
        a: a.offset(0) as u32,
        b: b.offset(0) as u32,
        rows: shape.rows as u32,
        cols: shape.cols as u32,
        rank: a.shapes()[0].rows as u32,
        first_row: rows.start as u32,
        last_row: rows.end as u32,
    }
}

job! {
    struct Job {
        factors: FactorsJob,
        members: u32,
        chance: u32,
        elect: u32,
        scale: f32,
    }
}

job! {
    struct MagnitudesJob {
        factors: FactorsJob,
        upper: u32,
    }
}

job! {
    struct Member {
        start: u32,
        end: u32,
        scale: f32,
        threshold: f32,
        key_low: u32,
        key_high: u32,
        prefix: u32,
        weight: f32,
    }
}

fn table(members: &[EntryMember], prefixes: &[u32]) -> Vec<Member> {
    let entry = |(k, m): (usize, &EntryMember)| Member {
        start: m.ranks.start as u32,
        end: m.ranks.end as u32,
        scale: m.scale as f32,
        threshold: m.threshold,
        key_low: m.key[0],
        key_high: m.key[1],
        prefix: prefixes.get(k).copied().unwrap_or(0),
        weight: m.weight as f32,
    };
    members.iter().enumerate().map(entry).collect()
}

/// Rows that the CPU twins work on at once.
const ROWS: usize = 16;

/// `s·B[rows, ranks]·A[ranks, :]` of one member.
fn update(a: OnHost<'_>, b: OnHost<'_>, member: &EntryMember, rows: Range<usize>) -> Matrix {
    let (a, b) = (a.matrix(0), b.matrix(0));
    let (start, rank) = (member.ranks.start, member.ranks.len());
    let mut out = Matrix::zeros(rows.len(), a.ncols());
    gemm(
        view_mut(&mut out.data, Shape::new(rows.len(), a.ncols())),
        faer::Accum::Replace,
        member.scale,
        b.submatrix(rows.start, start, rows.len(), rank),
        a.submatrix(start, 0, rank, a.ncols()),
    );
    out
}

/// The CPU twin of [`entries`]; gives the sum of squares, and of signs.
fn entries_cpu(
    a: OnHost<'_>,
    b: OnHost<'_>,
    rule: &EntryRule,
    rows: &Range<usize>,
    cols: usize,
    out: &mut [f64],
) -> (f64, i64) {
    out.par_chunks_mut((ROWS * cols).max(1))
        .enumerate()
        .map(|(i, out)| {
            let first = rows.start + i * ROWS;
            let rows = first..first + out.len() / cols.max(1);
            let updates: Vec<Matrix> =
                rule.members.iter().map(|member| update(a, b, member, rows.clone())).collect();
            let mut signs = 0;
            for (at, out) in out.iter_mut().enumerate() {
                let values = updates.iter().map(|u| u.data[at]);
                let (merged, sign) = rule.decided(first + at / cols, at % cols, values);
                *out = merged;
                signs += sign;
            }
            (out.iter().map(|v| v * v).sum::<f64>(), signs)
        })
        .collect::<Vec<_>>()
        .into_iter()
        .fold((0.0, 0), |all, part| (all.0 + part.0, all.1 + part.1))
}

/// The CPU twin of [`magnitudes`].
fn magnitudes_cpu(
    a: OnHost<'_>,
    b: OnHost<'_>,
    members: &[EntryMember],
    prefixes: Option<&[u32]>,
    rows: &Range<usize>,
    cols: usize,
    counts: &mut [Vec<u64>],
) {
    if cols == 0 {
        return;
    }
    counts.par_iter_mut().zip(members).enumerate().for_each(|(k, (counts, member))| {
        for first in rows.clone().step_by(ROWS) {
            let last = (first + ROWS).min(rows.end);
            for v in update(a, b, member, first..last).data {
                let bits = (v as f32).to_bits() & 0x7fff_ffff;
                match prefixes {
                    None => counts[(bits >> LOWER_BITS) as usize] += 1,
                    Some(prefixes) if bits >> LOWER_BITS == prefixes[k] => {
                        counts[(bits & ((1 << LOWER_BITS) - 1)) as usize] += 1;
                    }
                    Some(_) => {}
                }
            }
        }
    });
}
