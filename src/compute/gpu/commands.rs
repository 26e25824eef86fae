//! Launches that are recorded and then submitted as one compute pass.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::NoUninit;

use super::pipelines::Pipeline;
use super::pool::best;
use super::{Gpu, Pooled};
use crate::compute::shaders::{Kernel, Layout, is_declared};
use crate::compute::staging::Table;
use crate::compute::wait;
use crate::{Error, Result};

/// Workgroups in one row of a dispatch grid; WebGPU's default limit of a dimension.
pub(crate) const GRID_WIDTH: u32 = 65535;

/// Alignment of a bound range that every device accepts: the coarsest that WebGPU lets one ask for.
pub(crate) const BIND_ALIGN: usize = 256;

/// What one workgroup does, as a kernel's header comment says: usually job, tile row, tile column, part.
pub(crate) type Work = [u32; 4];

/// Launches run in the order of their phases, then in the order of recording: independent chains of launches that are
/// recorded one after the other run side by side, without a wait between each two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// A becomes halves; and whatever has no order of phases.
    #[default]
    Split,
    /// Products of activations and A, or parts of them.
    Project,
    /// The parts become one.
    SumParts,
    /// Rows of those products get the powers of two that matrix units want.
    ScaleRows,
    /// Partial Gram matrices of them.
    Gram,
    /// The partial ones are added to the sums.
    Reduce,
    /// Partial scores of the branches of a layer.
    Score,
    /// Scores of them.
    FinishScores,
    /// Means of scores.
    Means,
    /// Weights of the branches.
    Choose,
    /// The branches change the features.
    Apply,
}

/// Launches that are recorded and then submitted as one compute pass.
pub(crate) struct Commands<'a> {
    gpu: &'a Gpu,
    launches: Vec<Launch>,
    /// The phase of the next launch.
    phase: Phase,
    /// The job and work tables of all launches.
    tables: Vec<u8>,
    /// What launches use must not go to another user before they are submitted.
    kept: Vec<Arc<Pooled>>,
    /// Buffers of these commands alone.
    scratch: Vec<Arc<Pooled>>,
    /// Buffers of commands that run before these, which may become their own.
    spare: Vec<Arc<Pooled>>,
}

struct Launch {
    phase: Phase,
    kernel: Kernel,
    jobs: Range<usize>,
    /// What each workgroup does, for kernels that read a table of it.
    work: Option<Range<usize>>,
    grid: [u32; 3],
    buffers: Vec<OwnedBinding>,
}

/// A range of a buffer, bound once it is submitted.
struct OwnedBinding {
    buffer: wgpu::Buffer,
    offset: u64,
    size: Option<wgpu::BufferSize>,
}

/// Launches that only an encoder is missing for; they may be recorded again and again.
pub(crate) struct Prepared {
    launches: Vec<Ready>,
    /// What must live until all that was recorded has run.
    _held: (Table, Vec<Arc<Pooled>>),
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("launches", &self.launches.len()).finish_non_exhaustive()
    }
}

struct Ready {
    pipeline: wgpu::ComputePipeline,
    group: wgpu::BindGroup,
    grid: [u32; 3],
    /// Whether a binding has its offset from `record`.
    moving: bool,
}

impl Prepared {
    /// Records one pass into the encoder of a host, who may submit it at any time. `offset`: the first byte of the binding
    /// that a kernel has [`moving`](Kernel::moving), a multiple of [`BIND_ALIGN`].
    pub fn record(self: &Arc<Self>, encoder: &mut wgpu::CommandEncoder, offset: u32) {
        let held = self.clone();
        encoder.on_submitted_work_done(move || drop(held));
        record(&self.launches, encoder, offset);
    }
}

/// Records launches as one pass.
fn record(launches: &[Ready], encoder: &mut wgpu::CommandEncoder, offset: u32) {
    let mut pass = encoder.begin_compute_pass(&Default::default());
    for Ready { pipeline, group, grid: [x, y, z], moving } in launches {
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, group, if *moving { std::slice::from_ref(&offset) } else { &[] });
        pass.dispatch_workgroups(*x, *y, *z);
    }
}

impl Gpu {
    /// Starts recording.
    pub fn commands(&self) -> Commands<'_> {
        Commands {
            gpu: self,
            launches: Vec::new(),
            phase: Phase::default(),
            tables: Vec::new(),
            kept: Vec::new(),
            scratch: Vec::new(),
            spare: Vec::new(),
        }
    }
}

/// Rows of workgroups that together are at least so many: kernels find their number in them, and leave what is too many
/// alone.
fn fold(workgroups: u64) -> [u64; 3] {
    let width = u64::from(GRID_WIDTH);
    [workgroups.min(width), workgroups.div_ceil(width), 1]
}

/// The grid, if a dispatch may be so large.
fn checked(kernel: Kernel, grid: [u64; 3]) -> Result<[u32; 3]> {
    match grid.iter().all(|&n| n <= u64::from(GRID_WIDTH)) {
        true => Ok(grid.map(|n| n as u32)),
        false => Err(Error::Device(format!(
            "{} would need {} x {} x {} workgroups, but a dispatch has {GRID_WIDTH} in each direction at most",
            kernel.label(),
            grid[0],
            grid[1],
            grid[2]
        ))),
    }
}

impl Commands<'_> {
    /// Dispatches one workgroup for each entry of `work`. Bindings are: 0 params, 1 `jobs`, 2 `work`,
    /// 3 and up `buffers`. A launch sees what those before it wrote.
    pub fn launch<J: NoUninit + Layout>(
        &mut self,
        kernel: Kernel,
        jobs: &[J],
        work: &[Work],
        buffers: &[wgpu::BufferBinding<'_>],
    ) -> Result<()> {
        if work.is_empty() {
            return Ok(());
        }
        let grid = checked(kernel, fold(work.len() as u64))?;
        let jobs = self.append(bytemuck::cast_slice(jobs));
        let work = Some(self.append(bytemuck::cast_slice(work)));
        self.push::<J>(kernel, jobs, work, grid, buffers);
        Ok(())
    }

    /// Dispatches a grid of workgroups on one job. Bindings are: 1 `jobs`, of one entry, 3 and up `buffers`.
    ///
    /// # Errors
    /// [`Error::Device`] if a direction of the grid is longer than a dispatch can have.
    pub fn launch_grid<J: NoUninit + Layout>(
        &mut self,
        kernel: Kernel,
        job: &J,
        grid: [usize; 3],
        buffers: &[wgpu::BufferBinding<'_>],
    ) -> Result<()> {
        let grid = checked(kernel, grid.map(|n| n as u64))?;
        if !grid.contains(&0) {
            let jobs = self.append(bytemuck::bytes_of(job));
            self.push::<J>(kernel, jobs, None, grid, buffers);
        }
        Ok(())
    }

    /// Dispatches workgroups on one job that are numbered through, by `workgroup_number` of `shaders/shared/line.wgsl`:
    /// there may be more of them than a row of a grid holds. Those past the last must do nothing. Bindings are those of
    /// [`launch_grid`](Self::launch_grid).
    pub fn launch_line<J: NoUninit + Layout>(
        &mut self,
        kernel: Kernel,
        job: &J,
        workgroups: usize,
        buffers: &[wgpu::BufferBinding<'_>],
    ) -> Result<()> {
        self.launch_grid(kernel, job, fold(workgroups as u64).map(|n| n as usize), buffers)
    }

    fn append(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.tables.len().next_multiple_of(BIND_ALIGN);
        self.tables.resize(start, 0);
        self.tables.extend_from_slice(bytes);
        start..self.tables.len()
    }

    fn push<J: Layout>(
        &mut self,
        kernel: Kernel,
        jobs: Range<usize>,
        work: Option<Range<usize>>,
        grid: [u32; 3],
        buffers: &[wgpu::BufferBinding<'_>],
    ) {
        debug_assert!(is_declared::<J>(kernel), "{} is not declared with these jobs", kernel.label());
        let buffers = buffers
            .iter()
            .map(|b| OwnedBinding { buffer: b.buffer.clone(), offset: b.offset, size: b.size })
            .collect();
        self.launches.push(Launch { phase: self.phase, kernel, jobs, work, grid, buffers });
    }

    /// Sets the phase of the launches that follow.
    pub fn phase(&mut self, phase: Phase) {
        self.phase = phase;
    }

    /// Keeps a pooled buffer from its next user until this is submitted.
    pub fn keep(&mut self, buffer: impl Into<Arc<Pooled>>) {
        self.kept.push(buffer.into());
    }

    /// A buffer of at least `bytes` for these commands alone, whatever is in it.
    pub fn scratch(&mut self, gpu: &Arc<Gpu>, bytes: u64) -> Result<Arc<Pooled>> {
        let spare = best(self.spare.iter().map(|buffer| buffer.size()), bytes, gpu.least_waste());
        let buffer = match spare {
            Some(i) => self.spare.swap_remove(i),
            None => Arc::new(gpu.scratch(bytes)?),
        };
        self.scratch.push(buffer.clone());
        Ok(buffer)
    }

    /// Scratch buffers of commands that run before these.
    pub fn reuse(&mut self, spare: Vec<Arc<Pooled>>) {
        self.spare = spare;
    }

    /// Bytes of the pooled buffers that are kept.
    pub fn kept_bytes(&self) -> u64 {
        self.kept.iter().chain(&self.scratch).map(|buffer| buffer.size()).sum()
    }

    /// Submits what was recorded. Its scratch goes to the next user at once, since the queue keeps users of a buffer apart.
    pub fn submit(mut self) -> Result<()> {
        let gpu = self.gpu;
        if !self.launches.is_empty() {
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            let (launches, table) = self.ready(&mut encoder)?;
            record(&launches, &mut encoder, 0);
            gpu.queue.submit([encoder.finish()]);
            gpu.tables.put(table);
        }
        gpu.check()
    }

    /// Makes what an encoder of a host, which submits it, can record. Gives the scratch buffers that were used too, for
    /// commands that run after these.
    ///
    /// # Errors
    /// [`Error::Device`] if wgpu refuses what is bound.
    pub fn prepare(mut self) -> Result<(Arc<Prepared>, Vec<Arc<Pooled>>)> {
        let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
        let (launches, table) = self.ready(&mut encoder)?;
        self.gpu.queue.submit([encoder.finish()]);
        self.kept.extend_from_slice(&self.scratch);
        Ok((Arc::new(Prepared { launches, _held: (table, self.kept) }), self.scratch))
    }

    /// The launches in their order, and their table, once what this records has run.
    fn ready(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<(Vec<Ready>, Table)> {
        self.launches.sort_by_key(|launch| launch.phase);
        let gpu = self.gpu;
        // Buffers of hosts may be of another device, or destroyed, which only wgpu knows. (Of another instance it does not: it
        // would take a buffer of its own with the same number, if that is as large.)
        let scope = gpu.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let ready = gpu.tables.write(&gpu.device, encoder, &self.tables).map(|table| {
            let launches = self.bind(&table.buffer);
            (launches, table)
        });
        let refused = wait::block_on(scope.pop());
        gpu.alive()?;
        match refused {
            Some(error) => Err(Error::Device(format!("{}: {error}", gpu.name))),
            None => ready,
        }
    }

    fn bind(&self, tables: &wgpu::Buffer) -> Vec<Ready> {
        let ready = |launch: &Launch| {
            let Pipeline { pipeline, layout } = self.gpu.pipeline(launch.kernel);
            let table = |binding, range: &Range<usize>| {
                entry(binding, tables, range.start as u64, wgpu::BufferSize::new(range.len() as u64))
            };
            let mut entries = vec![table(1, &launch.jobs)];
            if let Some(work) = &launch.work {
                entries.extend([entry(0, &self.gpu.params, 0, None), table(2, work)]);
            }
            entries.extend((3..).zip(&launch.buffers).map(|(i, b)| entry(i, &b.buffer, b.offset, b.size)));
            let moving = launch.kernel.moves().is_some();
            let group = self.gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &layout,
                entries: &entries,
            });
            Ready { pipeline, group, grid: launch.grid, moving }
        };
        self.launches.iter().map(ready).collect()
    }
}

fn entry(
    binding: u32,
    buffer: &wgpu::Buffer,
    offset: u64,
    size: Option<wgpu::BufferSize>,
) -> wgpu::BindGroupEntry<'_> {
    let resource = wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size });
    wgpu::BindGroupEntry { binding, resource }
}

/// The whole of a buffer.
pub(crate) fn whole(buffer: &wgpu::Buffer) -> wgpu::BufferBinding<'_> {
    buffer.as_entire_buffer_binding()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_fold_or_are_refused() {
        let width = u64::from(GRID_WIDTH);
        let kernel = Kernel::new("gradient_step");
        for workgroups in [1, 2, width - 1, width, width + 1, 68_360, 1 << 20, 1 << 30, width * width] {
            let [x, y, z] = checked(kernel, fold(workgroups)).unwrap().map(u64::from);
            // Every number is there, and less than a row is too many.
            assert!(z == 1 && x * y >= workgroups && x * y - workgroups < x, "{workgroups}: {x} x {y}");
            assert!(y == 1 || x == width, "{workgroups}: {x} x {y}");
            // A u32 holds the numbers of those that are too many as well.
            assert!(x * y <= 1 << 32, "{workgroups}: {x} x {y}");
        }
        assert_eq!(fold(0), [0, 0, 1]);
        let error = checked(kernel, fold(width * width + 1)).unwrap_err().to_string();
        assert!(error.contains("gradient_step") && error.contains("65536"), "{error}");
    }
}
