use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::{MAX_ITERATIONS, gemm, mismatch, same_count, view, view_mut};
use crate::compute::batch::{ANY, FACTOR, OnGpu, OnHost, Operands};
use crate::compute::gpu::{Gpu, Pooled, Work, whole};
use crate::compute::shaders::{Declared, Kernel, Layout, job};
use crate::compute::{Batch, Device, Element, Shape};
use crate::{Error, Matrix, Result};

/// One of several updates `s·B[:, columns]·A[rows, :]` whose entries are merged.
#[derive(Clone, Debug)]
pub struct EntryMember {
    /// Its first row of A.
    pub a: usize,
    /// Its first column of B.
    pub b: usize,
    /// How many of each are its.
    pub rank: usize,
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

    fn has_chance(&self, i: usize, j: usize, member: &EntryMember) -> bool {
        self.chance == u32::MAX || hash(i as u32, j as u32, member.key) <= self.chance
    }

    /// The merged entry of row i, column j, and the sign of the sum of what counts: 1, 0 or -1.
    pub fn decided(&self, i: usize, j: usize, values: impl Iterator<Item = f64>) -> (f64, i64) {
        let (mut plus, mut minus) = (Side::default(), Side::default());
        for (member, v) in self.members.iter().zip(values) {
            let near = v as f32;
            if near.abs() < member.threshold || !self.has_chance(i, j, member) {
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

/// Layers that are known by the factors of several updates each, whose entries are merged: what TIES and DARE make of them,
/// `M = rule(s_1·B_1·A_1, …, s_K·B_K·A_K)` of each layer, is made anew wherever it is wanted and never held.
///
/// Products and sums are of [`Device::product`]; an entry of M is rounded once more.
#[derive(Debug)]
pub struct EntryMerger {
    a: Batch,
    b: Batch,
    rules: Vec<EntryRule>,
}

/// What lies in M of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// ‖M‖².
    pub square: f64,
    /// How many sums of what counts, before weights, are above zero, less how many are below.
    pub signs: i64,
}

/// Which magnitudes, by their bits as f32, [`EntryMerger::magnitudes`] tells apart: the [`BUCKETS`]`·2^shift` from `base` on,
/// `2^shift` of which share a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The bits of the smallest.
    pub base: u32,
    /// How many of the last bits do not count.
    pub shift: u32,
}

/// How many magnitudes lie in each bucket of a window, and above it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// [`BUCKETS`] of them.
    pub buckets: Vec<u64>,
    /// How many are larger than what has a bucket.
    pub above: u64,
}

/// Buckets of a [`Window`].
pub const BUCKETS: usize = 1 << 16;

impl Window {
    /// All magnitudes, by their upper 16 bits.
    pub const ALL: Self = Self { base: 0, shift: 15 };

    /// The bucket of a magnitude with these bits; [`BUCKETS`] if it lies above, `None` below.
    pub fn bucket(self, bits: u32) -> Option<usize> {
        let above = bits.checked_sub(self.base)?;
        Some(BUCKETS.min((above >> self.shift) as usize))
    }
}

impl Counted {
    /// Of nothing.
    pub fn new() -> Self {
        Self { buckets: vec![0; BUCKETS], above: 0 }
    }

    /// Counts a value.
    pub fn count(&mut self, window: Window, value: f64) {
        match window.bucket((value as f32).to_bits() & 0x7fff_ffff) {
            None => {}
            Some(BUCKETS) => self.above += 1,
            Some(bucket) => self.buckets[bucket] += 1,
        }
    }

    /// Adds what was counted elsewhere.
    pub fn add(&mut self, other: &Self) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(to, from)| *to += from);
        self.above += other.above;
    }
}

impl Default for Counted {
    fn default() -> Self {
        Self::new()
    }
}

/// Asked between parts of long work, which ends with its error.
pub type Check<'a> = &'a (dyn Fn() -> Result<()> + Sync);

impl EntryMerger {
    /// `a`: R_a × in of each layer; `b`: out × R_b; both factors ([`Device::factor`]).
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are not as many of each, or a member has ranks beyond them.
    pub fn new(a: Batch, b: Batch, rules: Vec<EntryRule>) -> Result<Self> {
        same_count("entries", &a, &b)?;
        if a.len() != rules.len() {
            return Err(Error::Invalid(format!("entries: {} rules for {} layers", rules.len(), a.len())));
        }
        for ((a, b), rule) in a.shapes().iter().zip(b.shapes()).zip(&rules) {
            let within =
                |first: usize, rank: usize, all: usize| first.checked_add(rank).is_some_and(|end| end <= all);
            if !rule.members.iter().all(|m| within(m.a, m.rank, a.rows) && within(m.b, m.rank, b.cols)) {
                return Err(Error::Invalid(format!(
                    "entries: ranks beyond the {} rows of A or the {} columns of B",
                    a.rows, b.cols
                )));
            }
        }
        Ok(Self { a, b, rules })
    }

    /// The rules, whose thresholds and signs of zero are found out later.
    pub fn rules(&self) -> &[EntryRule] {
        &self.rules
    }

    /// To set thresholds and signs of zero.
    pub fn rules_mut(&mut self) -> impl Iterator<Item = &mut EntryRule> {
        self.rules.iter_mut()
    }

    /// out × in of a layer.
    pub(crate) fn shape(&self, i: usize) -> Shape {
        Shape::new(self.b.shapes()[i].rows, self.a.shapes()[i].cols)
    }

    fn side<'a>(&'a self, device: &'a Device) -> Result<Operands<'a, 2>> {
        Operands::of("entries", device, [(&self.a, FACTOR), (&self.b, FACTOR)])
    }

    /// Counts magnitudes `|s_k·B_k·A_k|`, of the member of each layer that has a window.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is not a place for each member; those of `check`.
    pub fn magnitudes(
        &self,
        device: &Device,
        windows: &[Vec<Option<Window>>],
        check: Check<'_>,
    ) -> Result<Vec<Vec<Option<Counted>>>> {
        self.magnitudes_of(device, windows, 1, check)
    }

    /// [`magnitudes`](Self::magnitudes) of one of so many tiles, in no order, for a guess.
    pub(crate) fn magnitudes_of(
        &self,
        device: &Device,
        windows: &[Vec<Option<Window>>],
        one_of: u32,
        check: Check<'_>,
    ) -> Result<Vec<Vec<Option<Counted>>>> {
        let fits = |(windows, rule): (&Vec<_>, &EntryRule)| windows.len() == rule.members.len();
        if windows.len() != self.rules.len() || !windows.iter().zip(&self.rules).all(fits) {
            return Err(Error::Invalid("magnitudes: every member needs a place for a window".into()));
        }
        match self.side(device)? {
            Operands::Gpu(gpu, factors) => {
                self.magnitudes_gpu(&OnDevice { gpu, device, factors, check }, windows, one_of)
            }
            Operands::Host([a, b]) => {
                let of = |i: usize| -> Result<Vec<Option<Counted>>> {
                    let factors = HostFactors { a: a.matrix(i), b: b.matrix(i) };
                    let of = |(member, window): (&EntryMember, &Option<Window>)| match window {
                        Some(window) => magnitudes_cpu(&factors, member, *window, check).map(Some),
                        None => Ok(None),
                    };
                    self.rules[i].members.iter().zip(&windows[i]).map(of).collect()
                };
                (0..self.rules.len()).map(of).collect()
            }
        }
    }

    /// `W·Mᵀ` of each layer, directions × out, of W, directions × in; and what lies in M.
    ///
    /// # Errors
    /// [`Error::Invalid`] if widths differ; those of `check`.
    pub fn applied(&self, device: &Device, w: &Batch, check: Check<'_>) -> Result<(Batch, Vec<Tally>)> {
        let shapes = self.product_shapes(w, |shape| (shape.cols, shape.rows))?;
        match self.side(device)? {
            Operands::Gpu(gpu, factors) => {
                let on = OnDevice { gpu, device, factors, check };
                let (products, tallies) = self.products_gpu(&on, w, &shapes, false)?;
                Ok((products, tallies.read(gpu)?))
            }
            Operands::Host(factors) => {
                let w = w.host()?;
                let mut tallies = Vec::new();
                let mut products = Batch::zeros(&Device::cpu(), Element::Host, &shapes)?;
                for (i, product) in products.host_mut()?.into_iter().enumerate() {
                    let out = self.shape(i).rows;
                    tallies.push(self.panels(factors, i, check, |rows, panel| {
                        let part = applied_cpu(w.matrix(i), panel, rows.len());
                        for k in 0..shapes[i].rows {
                            let to = k * out + rows.start;
                            product[to..to + rows.len()].copy_from_slice(part.row(k));
                        }
                    })?);
                }
                Ok((products, tallies))
            }
        }
    }

    /// `W·Mᵀ·M` of each layer, of W's shape.
    ///
    /// # Errors
    /// Those of [`applied`](Self::applied).
    pub fn squared(&self, device: &Device, w: &Batch, check: Check<'_>) -> Result<Batch> {
        let shapes = self.product_shapes(w, |shape| (shape.cols, shape.rows))?;
        match self.side(device)? {
            Operands::Gpu(gpu, factors) => {
                let on = OnDevice { gpu, device, factors, check };
                let (products, _) = self.products_gpu(&on, w, &shapes, false)?;
                let shapes = w.shapes();
                Ok(self.products_gpu(&on, &products, shapes, true)?.0)
            }
            // On the CPU a panel of entries serves both products.
            Operands::Host(factors) => {
                let w = w.host()?;
                let mut sums = Batch::zeros(&Device::cpu(), Element::Host, &self.widths(w))?;
                let shapes = sums.shapes().to_vec();
                for (i, sum) in sums.host_mut()?.into_iter().enumerate() {
                    self.panels(factors, i, check, |rows, panel| {
                        let part = applied_cpu(w.matrix(i), panel, rows.len());
                        let sum = view_mut(sum, shapes[i]);
                        let part = view(&part.data, Shape::new(part.rows, part.cols));
                        gemm(sum, faer::Accum::Add, 1.0, part, panel_view(panel, rows.len()));
                    })?;
                }
                Ok(sums)
            }
        }
    }

    /// M itself, out × in of each layer, and what lies in it: for layers with few rows.
    ///
    /// # Errors
    /// Those of `check`; [`Error::Device`] if they are more than the device can hold.
    pub fn whole(&self, device: &Device, check: Check<'_>) -> Result<(Batch, Vec<Tally>)> {
        let shapes: Vec<Shape> = (0..self.rules.len()).map(|i| self.shape(i)).collect();
        match self.side(device)? {
            Operands::Gpu(gpu, factors) => {
                let on = OnDevice { gpu, device, factors, check };
                let ones: Vec<Matrix> = shapes.iter().map(|shape| identity(shape.rows)).collect();
                let ones = Batch::upload(device, device.factor(), &ones)?;
                let (whole, tallies) = self.products_gpu(&on, &ones, &shapes, true)?;
                Ok((whole, tallies.read(gpu)?))
            }
            Operands::Host(factors) => {
                let mut tallies = Vec::new();
                let mut whole = Batch::zeros(&Device::cpu(), Element::Host, &shapes)?;
                for (i, out) in whole.host_mut()?.into_iter().enumerate() {
                    let cols = shapes[i].cols;
                    tallies.push(self.panels(factors, i, check, |rows, panel| {
                        out[rows.start * cols..rows.end * cols].copy_from_slice(panel);
                    })?);
                }
                Ok((whole, tallies))
            }
        }
    }

    /// What lies in M of each layer.
    ///
    /// # Errors
    /// Those of `check`.
    pub fn tallies(&self, device: &Device, check: Check<'_>) -> Result<Vec<Tally>> {
        match self.side(device)? {
            Operands::Gpu(gpu, factors) => {
                let on = OnDevice { gpu, device, factors, check };
                let none = |shape: Shape| Shape::new(0, shape.cols);
                let none: Vec<Shape> = (0..self.rules.len()).map(|i| none(self.shape(i))).collect();
                let w = Batch::unwritten(device, device.factor(), &none)?;
                let shapes = self.product_shapes(&w, |shape| (shape.cols, shape.rows))?;
                self.products_gpu(&on, &w, &shapes, false)?.1.read(gpu)
            }
            Operands::Host(factors) => {
                (0..self.rules.len()).map(|i| self.panels(factors, i, check, |_, _| ())).collect()
            }
        }
    }

    /// The shapes of products with V; `of`: what width V must have, and what the products have.
    fn product_shapes(&self, v: &Batch, of: impl Fn(Shape) -> (usize, usize)) -> Result<Vec<Shape>> {
        same_count("entries", v, &self.a)?;
        let shape = |(i, v): (usize, &Shape)| {
            let (width, made) = of(self.shape(i));
            match v.cols == width {
                true => Ok(Shape::new(v.rows, made)),
                false => Err(mismatch("entries", *v, self.shape(i))),
            }
        };
        v.shapes().iter().enumerate().map(shape).collect()
    }
}

/// Entries of a launch have these tiles, and directions of V a thread has so many of.
const ROWS: usize = 64;
const COLUMNS: usize = 32;
const DEPTH: usize = 8;
const PER_THREAD: [u32; 3] = [1, 3, 5];
/// Directions that one of each thread is.
const LANES: usize = 16;
/// Columns that a workgroup of `magnitudes.wgsl` counts.
const SPAN: usize = 256;
/// Columns of V that `entries.wgsl` has in workgroup memory at a time.
const V_COLUMNS: usize = 8;

/// Workgroups of one submission: a driver's watchdog should stay calm.
const AT_ONCE: usize = 4096;

/// The matrix of ones.
pub(crate) fn identity(order: usize) -> Matrix {
    Matrix::from_fn(order, order, |i, j| f64::from(u8::from(i == j)))
}

/// The slot of a tally that is left out.
const NONE: u32 = u32::MAX;

/// How a job makes one of what counts, and the sign that a sum of zero elects.
const SUM: u32 = 0;
const ELECT_PLUS: u32 = 1;
const ELECT_MINUS: u32 = 2;

job! {
    struct FactorsJob {
        a: u32,
        b: u32,
        input: u32,
        output: u32,
        rank: u32,
    }
}

job! {
    struct Job {
        factors: FactorsJob,
        v: u32,
        z: u32,
        directions: u32,
        first_column: u32,
        last_column: u32,
        add: u32,
        first_member: u32,
        last_member: u32,
        chance: u32,
        elect: u32,
        scale: f32,
    }
}

job! {
    struct Member {
        a: u32,
        b: u32,
        rank: u32,
        scale: f32,
        threshold: f32,
        key_low: u32,
        key_high: u32,
        weight: f32,
        base: u32,
        shift: u32,
    }
}

fn kernel(sums: Element, transposed: bool, per_thread: u32) -> Kernel {
    Kernel::new("entries").real(sums).flag("TRANSPOSED", transposed).number("PER_THREAD", per_thread)
}

fn magnitudes_kernel(sums: Element) -> Kernel {
    Kernel::new("magnitudes").real(sums).flag("TRANSPOSED", false)
}

pub(super) fn declared() -> [Declared; 2] {
    let of = |sums: Element| {
        PER_THREAD.into_iter().flat_map(move |n| [false, true].map(|transposed| kernel(sums, transposed, n)))
    };
    let tiles = |declared: Declared| {
        declared
            .constant("ROWS", ROWS)
            .constant("COLUMNS", COLUMNS)
            .constant("DEPTH", DEPTH)
            .with_struct::<Member>("members")
    };
    [
        tiles(Declared::new::<Job>(ANY.iter().flat_map(|&sums| of(sums))))
            .constant("V_COLUMNS", V_COLUMNS)
            .constant("NONE", NONE)
            .constant("SUM", SUM)
            .constant("ELECT_PLUS", ELECT_PLUS)
            .constant("ELECT_MINUS", ELECT_MINUS),
        tiles(Declared::new::<FactorsJob>(ANY.iter().map(|&sums| magnitudes_kernel(sums))))
            .constant("BUCKETS", BUCKETS)
            .constant("SPAN", SPAN),
    ]
}

/// The tallies of workgroups, and of which layer each is.
struct Tallies {
    buffer: Pooled,
    layers: Vec<usize>,
    count: usize,
}

impl Tallies {
    fn read(&self, gpu: &Gpu) -> Result<Vec<Tally>> {
        let found: Vec<[f32; 2]> =
            bytemuck::pod_collect_to_vec(&gpu.read(&self.buffer, self.layers.len() as u64 * 8)?);
        let mut all = vec![Tally::default(); self.count];
        for (&layer, [square, signs]) in self.layers.iter().zip(found) {
            all[layer].square += f64::from(square);
            all[layer].signs += signs as i64;
        }
        Ok(all)
    }
}

/// Where entries are made.
struct OnDevice<'a> {
    gpu: &'a Arc<Gpu>,
    device: &'a Device,
    /// A and B.
    factors: [OnGpu<'a>; 2],
    check: Check<'a>,
}

/// Launches that go to the queue in parts, with a look between them at whether to go on.
struct Launches<'a> {
    gpu: &'a Gpu,
    buffers: &'a [wgpu::BufferBinding<'a>],
    check: Check<'a>,
}

impl Launches<'_> {
    /// The same kernel on all of this work, whose jobs it names by their place.
    fn run<J: bytemuck::NoUninit + Layout>(&self, kernel: Kernel, jobs: &[J], work: &[Work]) -> Result<()> {
        for work in work.chunks(AT_ONCE) {
            (self.check)()?;
            // Work is in the order of jobs, of which a part needs its own.
            let (first, last) = (work[0][0], work[work.len() - 1][0]);
            let own: Vec<Work> = work.iter().map(|&[job, y, z, w]| [job - first, y, z, w]).collect();
            let mut commands = self.gpu.commands();
            commands.launch(kernel, &jobs[first as usize..=last as usize], &own, self.buffers)?;
            commands.submit()?;
        }
        Ok(())
    }
}

impl EntryMerger {
    fn factors_job(&self, [a, b]: [OnGpu<'_>; 2], i: usize) -> FactorsJob {
        let Shape { rows, cols } = self.shape(i);
        FactorsJob {
            a: a.offset(i),
            b: b.offset(i),
            input: cols as u32,
            output: rows as u32,
            rank: b.shapes()[i].cols as u32,
        }
    }

    /// The members of a layer, without a window.
    fn members_of(&self, layer: usize) -> impl Iterator<Item = Member> {
        self.rules[layer].members.iter().map(|m| Member {
            a: m.a as u32,
            b: m.b as u32,
            rank: m.rank as u32,
            scale: m.scale as f32,
            threshold: m.threshold,
            key_low: m.key[0],
            key_high: m.key[1],
            weight: m.weight as f32,
            base: 0,
            shift: 0,
        })
    }

    fn magnitudes_gpu(
        &self,
        on: &OnDevice<'_>,
        windows: &[Vec<Option<Window>>],
        one_of: u32,
    ) -> Result<Vec<Vec<Option<Counted>>>> {
        let &OnDevice { gpu, device, factors, check } = on;
        let mut counted: Vec<Vec<Option<Counted>>> = windows.iter().map(|of| vec![None; of.len()]).collect();
        let (mut members, mut work) = (Vec::new(), Vec::<Work>::new());
        for (i, windows) in windows.iter().enumerate() {
            let Shape { rows, cols } = self.shape(i);
            let tiles = || {
                (0..rows)
                    .step_by(ROWS)
                    .flat_map(move |row| (0..cols).step_by(SPAN).map(move |c| [row as u32, c as u32]))
            };
            for (member, window) in self.members_of(i).zip(windows) {
                let &Some(Window { base, shift }) = window else { continue };
                let taken = tiles().filter(|&[row, column]| is_taken(row, column, one_of));
                work.extend(taken.map(|[row, column]| [i as u32, row, column, members.len() as u32]));
                members.push(Member { base, shift, ..member });
            }
        }
        let len = BUCKETS + 1;
        let bytes = (members.len() * len * 4) as u64;
        let counts = gpu.zeros(bytes.max(4))?;
        let table = uploaded(gpu, &members)?;
        let jobs: Vec<FactorsJob> = (0..self.rules.len()).map(|i| self.factors_job(factors, i)).collect();
        let buffers = [factors[0].binding(), factors[1].binding(), whole(&table), whole(&counts)];
        Launches { gpu, buffers: &buffers, check }.run(magnitudes_kernel(device.product()), &jobs, &work)?;
        let mut found = gpu
            .read_with(&counts, bytes, |bytes| {
                let of = |bytes: &[u8]| {
                    let counts: Vec<u32> = bytemuck::pod_collect_to_vec(bytes);
                    let buckets = counts[..BUCKETS].iter().map(|&n| u64::from(n)).collect();
                    Counted { buckets, above: u64::from(counts[BUCKETS]) }
                };
                bytes.par_chunks_exact(4 * len).map(of).collect::<Vec<_>>()
            })?
            .into_iter();
        for (counted, window) in counted.iter_mut().flatten().zip(windows.iter().flatten()) {
            *counted = window.and_then(|_| found.next());
        }
        Ok(counted)
    }

    /// `V·Mᵀ`, or `V·M` of the `transposed`.
    fn products_gpu(
        &self,
        on: &OnDevice<'_>,
        v: &Batch,
        shapes: &[Shape],
        transposed: bool,
    ) -> Result<(Batch, Tallies)> {
        let &OnDevice { gpu, device, factors, check } = on;
        let Operands::Gpu(_, [v]) = Operands::of("entries", device, [(v, FACTOR)])? else {
            return Err(Error::Device("entries: a batch on the CPU goes with none on a GPU".into()));
        };
        // What has no columns is a sum of nothing.
        let z = match v.shapes().iter().any(|v| v.cols == 0) {
            true => Batch::zeros(device, device.factor(), shapes)?,
            false => Batch::unwritten(device, device.factor(), shapes)?,
        };
        let members: Vec<Member> = (0..self.rules.len()).flat_map(|i| self.members_of(i)).collect();
        let members = uploaded(gpu, &members)?;
        // For each round of columns, and each kernel, jobs and their work.
        let mut rounds: Vec<[(Vec<Job>, Vec<Work>); PER_THREAD.len()]> = Vec::new();
        let (mut first_member, mut layers) = (0, Vec::new());
        for (i, rule) in self.rules.iter().enumerate() {
            let (directions, columns, rows) = (v.shapes()[i].rows, v.shapes()[i].cols, shapes[i].cols);
            let last_member = first_member + rule.members.len() as u32;
            let (place, block) = blocks(directions);
            let span = columns_at_once(rule, PER_THREAD[place]);
            for (round, first) in (0..columns).step_by(span).enumerate() {
                if round == rounds.len() {
                    rounds.push(Default::default());
                }
                let (jobs, work) = &mut rounds[round][place];
                for tile in (0..rows).step_by(ROWS) {
                    for direction in (0..directions.max(1)).step_by(block) {
                        // Each entry counts once.
                        let slot = if direction == 0 { layers.len() as u32 } else { NONE };
                        if direction == 0 {
                            layers.push(i);
                        }
                        work.push([jobs.len() as u32, tile as u32, direction as u32, slot]);
                    }
                }
                jobs.push(Job {
                    factors: self.factors_job(factors, i),
                    v: v.offset(i),
                    z: z.offset(i) as u32,
                    directions: directions as u32,
                    first_column: first as u32,
                    last_column: (first + span).min(columns) as u32,
                    add: u32::from(round > 0),
                    first_member,
                    last_member,
                    chance: rule.chance,
                    elect: match (rule.elect, rule.zero_is_minus) {
                        (false, _) => SUM,
                        (true, false) => ELECT_PLUS,
                        (true, true) => ELECT_MINUS,
                    },
                    scale: rule.scale as f32,
                });
            }
            first_member = last_member;
        }
        let buffer = gpu.scratch((layers.len() as u64 * 8).max(8))?;
        let [a, b] = factors;
        let buffers = [a.binding(), b.binding(), whole(&members), v.binding(), z.binding()?, whole(&buffer)];
        let launches = Launches { gpu, buffers: &buffers, check };
        for round in &rounds {
            for ((jobs, work), per_thread) in round.iter().zip(PER_THREAD) {
                launches.run(kernel(device.product(), transposed, per_thread), jobs, work)?;
            }
        }
        Ok((z, Tallies { buffer, layers, count: self.rules.len() }))
    }
}

fn uploaded(gpu: &Arc<Gpu>, members: &[Member]) -> Result<Pooled> {
    let table = gpu.scratch(size_of_val(members).max(size_of::<Member>()) as u64)?;
    gpu.write(&table, 0, bytemuck::cast_slice(members))?;
    Ok(table)
}

/// Whether a tile is among those that one of so many is taken of, at random.
fn is_taken(row: u32, column: u32, one_of: u32) -> bool {
    hash(row, column, [0; 2]).is_multiple_of(one_of)
}

/// How many directions a workgroup takes on, for as few as there are to do: the place of its number in [`PER_THREAD`], and
/// the directions.
fn blocks(directions: usize) -> (usize, usize) {
    let most = PER_THREAD.map(|n| n as usize * LANES);
    let least = directions.div_ceil(directions.div_ceil(most[most.len() - 1]).max(1));
    let place = most.iter().position(|&most| most >= least).unwrap_or(most.len() - 1);
    (place, most[place])
}

/// Columns that an invocation may go through.
fn columns_at_once(rule: &EntryRule, per_thread: u32) -> usize {
    let member = |m: &EntryMember| 2 + m.rank.div_ceil(DEPTH) * (1 + DEPTH);
    let loads = (V_COLUMNS * LANES * per_thread as usize).div_ceil(256);
    let tile =
        1 + rule.members.iter().map(member).sum::<usize>() + COLUMNS / V_COLUMNS * (1 + loads + V_COLUMNS);
    (MAX_ITERATIONS / tile).max(1) * COLUMNS
}

/// Bytes of a panel on the CPU, where each thread has one, and its rows at most.
const PANEL: usize = 4 << 20;
const PANEL_ROWS: usize = 8192;

/// Rows of a panel.
fn panel_rows(width: usize) -> usize {
    (PANEL / 8 / width.max(1)).clamp(1, PANEL_ROWS)
}

/// The panels of so many rows, one after the other.
fn panels(shape: Shape) -> impl Iterator<Item = Range<usize>> {
    let at_once = panel_rows(shape.cols);
    (0..shape.rows).step_by(at_once).map(move |first| first..(first + at_once).min(shape.rows))
}

/// Rows that the CPU twins work on at once.
const AT_A_TIME: usize = 16;

/// A and B of a layer on the host.
#[derive(Clone, Copy)]
struct HostFactors<'a> {
    a: faer::MatRef<'a, f64>,
    b: faer::MatRef<'a, f64>,
}

impl HostFactors<'_> {
    /// `s·B[rows, columns]·A[rows, :]` of one member.
    fn update(&self, member: &EntryMember, rows: Range<usize>) -> Matrix {
        let &EntryMember { a, b, rank, scale, .. } = member;
        let mut out = Matrix::zeros(rows.len(), self.a.ncols());
        gemm(
            view_mut(&mut out.data, Shape::new(rows.len(), self.a.ncols())),
            faer::Accum::Replace,
            scale,
            self.b.submatrix(rows.start, b, rows.len(), rank),
            self.a.submatrix(a, 0, rank, self.a.ncols()),
        );
        out
    }
}

impl EntryMerger {
    /// Makes the entries of a layer, panel by panel, each of which goes to `each` with its rows.
    fn panels(
        &self,
        [a, b]: [OnHost<'_>; 2],
        layer: usize,
        check: Check<'_>,
        mut each: impl FnMut(Range<usize>, &[f64]),
    ) -> Result<Tally> {
        let (rule, shape) = (&self.rules[layer], self.shape(layer));
        let factors = HostFactors { a: a.matrix(layer), b: b.matrix(layer) };
        let mut all = Tally::default();
        let mut panel = vec![0.0; panel_rows(shape.cols).min(shape.rows) * shape.cols];
        for rows in panels(shape) {
            check()?;
            let panel = &mut panel[..rows.len() * shape.cols];
            let Tally { square, signs } = entries_cpu(&factors, rule, &rows, shape.cols, panel);
            all = Tally { square: all.square + square, signs: all.signs + signs };
            each(rows, panel);
        }
        Ok(all)
    }

    /// The shapes of W.
    fn widths(&self, w: OnHost<'_>) -> Vec<Shape> {
        (0..self.rules.len()).map(|i| Shape::new(w.matrix(i).nrows(), self.shape(i).cols)).collect()
    }
}

/// `W·panelᵀ`.
fn applied_cpu(w: faer::MatRef<'_, f64>, panel: &[f64], rows: usize) -> Matrix {
    let mut product = Matrix::zeros(w.nrows(), rows);
    let into = view_mut(&mut product.data, Shape::new(w.nrows(), rows));
    gemm(into, faer::Accum::Replace, 1.0, w, panel_view(panel, rows).transpose());
    product
}

fn panel_view(panel: &[f64], rows: usize) -> faer::MatRef<'_, f64> {
    view(panel, Shape::new(rows, panel.len() / rows.max(1)))
}

/// The CPU twin of entries.wgsl: some rows of M.
fn entries_cpu(
    factors: &HostFactors<'_>,
    rule: &EntryRule,
    rows: &Range<usize>,
    cols: usize,
    out: &mut [f64],
) -> Tally {
    out.par_chunks_mut((AT_A_TIME * cols).max(1))
        .enumerate()
        .map(|(i, out)| {
            let first = rows.start + i * AT_A_TIME;
            let rows = first..first + out.len() / cols.max(1);
            let updates: Vec<Matrix> =
                rule.members.iter().map(|member| factors.update(member, rows.clone())).collect();
            let mut signs = 0;
            for (at, out) in out.iter_mut().enumerate() {
                let values = updates.iter().map(|u| u.data[at]);
                let (merged, sign) = rule.decided(first + at / cols, at % cols, values);
                *out = merged;
                signs += sign;
            }
            Tally { square: out.iter().map(|v| v * v).sum::<f64>(), signs }
        })
        .collect::<Vec<_>>()
        .into_iter()
        .fold(Tally::default(), |all, part| Tally {
            square: all.square + part.square,
            signs: all.signs + part.signs,
        })
}

/// The CPU twin of magnitudes.wgsl, for one member.
fn magnitudes_cpu(
    factors: &HostFactors<'_>,
    member: &EntryMember,
    window: Window,
    check: Check<'_>,
) -> Result<Counted> {
    let shape = Shape::new(factors.b.nrows(), factors.a.ncols());
    let mut blocks = Vec::new();
    if !shape.is_empty() {
        // Those of the twin of entries.wgsl: entries are rounded alike.
        for rows in panels(shape) {
            blocks.extend(
                rows.clone().step_by(AT_A_TIME).map(|first| first..(first + AT_A_TIME).min(rows.end)),
            );
        }
    }
    // Each thread has counts of its own.
    let share = blocks.len().div_ceil(rayon::current_num_threads()).max(1);
    let parts = blocks
        .par_chunks(share)
        .map(|blocks| {
            let mut counted = Counted::new();
            for rows in blocks {
                check()?;
                factors.update(member, rows.clone()).data.iter().for_each(|&v| counted.count(window, v));
            }
            Ok(counted)
        })
        .collect::<Result<Vec<Counted>>>()?;
    let mut all = Counted::new();
    parts.iter().for_each(|part| all.add(part));
    Ok(all)
}
