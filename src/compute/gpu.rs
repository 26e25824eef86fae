//! A wgpu device with its pipelines, pooled buffers and command recording.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rayon::prelude::*;

use super::capabilities::{Capabilities, Disable};
use super::memory::{Buffer, Meter};
use super::pipeline_cache::PipelineCache;
use super::shaders::Kernel;
use super::staging::{Downloads, Staging, Uploads};
use crate::{Error, Result};

/// Workgroups in one row of a dispatch grid; WebGPU's default limit of a dimension.
pub(crate) const GRID_WIDTH: u32 = 65535;

/// Uploads from this size on pass through memory of our own.
const LARGE: u64 = 1 << 20;

/// Bytes of smaller ones that may be staged by wgpu before we wait for the queue, and their part of the budget.
const MAX_STAGED: u64 = 256 << 20;
const STAGED_PART: u64 = 32;

/// Bytes of factors that operations upload at once, beside their results: their part of the budget.
const SOURCE_PART: u64 = 32;

/// Buffers that wait for their next user, and their part of the budget.
const MAX_POOLED: usize = 256;
const POOL_PART: u64 = 4;

/// A pipeline with the layout of its bind group, since asking for that each time makes a new one.
#[derive(Clone)]
struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

pub(crate) struct Gpu {
    pub name: String,
    /// Of a device of our own.
    pub instance: Option<wgpu::Instance>,
    pub adapter: wgpu::Adapter,
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub capabilities: Capabilities,
    pub disable: Disable,
    params: wgpu::Buffer,
    /// Each is made by the first who needs it, while others are made beside it.
    pipelines: Mutex<HashMap<Kernel, Arc<OnceLock<Pipeline>>>>,
    cache: Option<PipelineCache>,
    pool: Mutex<Vec<Buffer>>,
    pub meter: Arc<Meter>,
    staged: AtomicU64,
    uploads: Uploads,
    downloads: Downloads,
    error: Arc<Mutex<Option<String>>>,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("name", &self.name).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each guarded value is valid after every statement, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// `memory`: bytes of buffers to stay within.
    pub fn new(
        adapter: &wgpu::Adapter,
        device: wgpu::Device,
        queue: wgpu::Queue,
        disable: Disable,
        memory: u64,
    ) -> Self {
        let info = adapter.get_info();
        let capabilities = Capabilities::read(adapter, device.features(), &device.limits(), disable);
        let params = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("params"),
            size: 16,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        // The first word is the zero that shaders hide sums behind: it must not be a compile-time constant.
        queue.write_buffer(&params, 0, bytemuck::cast_slice(&[0, GRID_WIDTH, 0, 0]));
        let meter = Arc::new(Meter::new(memory));
        meter.take(params.size());
        Self {
            name: format!("{} ({:?})", info.name, info.backend),
            instance: None,
            adapter: adapter.clone(),
            device,
            queue,
            capabilities,
            disable,
            params,
            pipelines: Mutex::default(),
            cache: None,
            pool: Mutex::default(),
            staged: AtomicU64::new(0),
            uploads: Uploads::new(&meter),
            downloads: Downloads::new(&meter),
            meter,
            error: Arc::default(),
        }
    }

    /// Makes pipelines with what a folder has of them.
    pub fn open_cache(&mut self, folder: Option<&Path>) {
        self.cache = folder.and_then(|folder| PipelineCache::open(&self.adapter, &self.device, folder));
    }

    /// Turns wgpu's uncaptured errors, which would panic, into errors of the next download.
    /// For devices of our own: a host keeps its own handler.
    pub fn record_errors(&self) {
        let slot = self.error.clone();
        self.device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            lock(&slot).get_or_insert_with(|| error.to_string());
        }));
    }

    fn check(&self) -> Result<()> {
        match lock(&self.error).take() {
            None => Ok(()),
            Some(message) => Err(Error::Device(format!("{}: {message}", self.name))),
        }
    }

    /// Bytes that one binding, and so one arena, may have.
    pub fn max_arena(&self) -> u64 {
        let limit = self.capabilities.max_binding.min(self.capabilities.max_buffer);
        limit.min(u64::from(u32::MAX)) & !255
    }

    /// Bytes of factors that an operation should upload at once.
    pub fn source_limit(&self, most: u64) -> u64 {
        self.meter.share(SOURCE_PART, most).min(self.max_arena())
    }

    /// A buffer of its own, whose content is zero.
    pub fn allocate(&self, label: &str, bytes: u64) -> Result<Buffer> {
        if bytes > self.max_arena() {
            return Err(Error::Device(format!(
                "{label} of {bytes} bytes exceeds the {} bytes that {} can bind at once",
                self.max_arena(),
                self.name
            )));
        }
        let size = bytes.next_multiple_of(256).max(256);
        self.make_room(size)?;
        // An error that came later would leave a buffer that nobody can use in the pool.
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        if pollster::block_on(scope.pop()).is_some() {
            self.meter.free(size);
            return Err(Error::Device(format!(
                "{} has no memory for {label} of {bytes} bytes; other programs may hold it, or allow less (`memory`)",
                self.name
            )));
        }
        Ok(Buffer::new(buffer, &self.meter))
    }

    /// Counts bytes that are about to be allocated. Where the budget has no room for them, what the pool holds goes first,
    /// and what the queue still uses is waited for; what is in use stays, so that they may exceed it.
    fn make_room(&self, bytes: u64) -> Result<()> {
        let Err(excess) = self.meter.try_take(bytes) else { return Ok(()) };
        self.evict(0, excess.saturating_sub(self.meter.waiting()));
        if self.meter.waiting() > 0 {
            self.wait()?;
        }
        if self.meter.try_take(bytes).is_err() {
            self.meter.take(bytes);
        }
        Ok(())
    }

    /// A buffer of at least `bytes` whose content is whatever its last user left. It goes back to the pool when
    /// dropped; the queue's order keeps users apart, so what uses it must have been submitted by then.
    pub fn scratch(self: &Arc<Self>, bytes: u64) -> Result<Pooled> {
        let pooled = |buffer| Pooled { gpu: self.clone(), buffer: Some(buffer) };
        if let Some(buffer) = self.reuse(bytes) {
            return Ok(pooled(buffer));
        }
        // Sizes in steps of an eighth find their next user more easily.
        let step = (bytes.next_power_of_two() / 8).max(256);
        let size = bytes.next_multiple_of(step).min(self.max_arena()).max(bytes);
        self.evict(size, 0);
        Ok(pooled(self.allocate("pooled", size)?))
    }

    /// [`scratch`](Self::scratch), but all zeros.
    pub fn zeros(self: &Arc<Self>, bytes: u64) -> Result<Pooled> {
        let scratch = self.scratch(bytes)?;
        // wgpu leaves out what would clear a new buffer twice.
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.clear_buffer(&scratch, 0, None);
        self.queue.submit([encoder.finish()]);
        Ok(scratch)
    }

    /// Frees the oldest pooled buffers: `least` bytes of them, and until the pool and what is added stay within what the pool
    /// may hold.
    fn evict(&self, added: u64, least: u64) {
        let mut pool = lock(&self.pool);
        let most = self.meter.budget() / POOL_PART;
        let held = pool.iter().map(|buffer| buffer.size()).sum::<u64>();
        let (mut bytes, mut freed) = (0, Vec::new());
        while !pool.is_empty() && (bytes < least || added + held - bytes > most || pool.len() > MAX_POOLED) {
            let oldest = pool.remove(0);
            bytes += oldest.size();
            freed.push(oldest);
        }
        // The driver takes its time to free them: others need not wait for it.
        drop(pool);
        drop(freed);
    }

    fn reuse(&self, bytes: u64) -> Option<Buffer> {
        let mut pool = lock(&self.pool);
        let best = best(pool.iter().map(|buffer| buffer.size()), bytes, self.least_waste())?;
        Some(pool.swap_remove(best))
    }

    /// Bytes below which buffers may be far larger than was asked for.
    fn least_waste(&self) -> u64 {
        self.meter.share(2048, 1 << 20)
    }

    /// Copies host bytes (a multiple of 4) into a buffer.
    pub fn write(&self, buffer: &wgpu::Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        if len >= LARGE.min(self.uploads.piece()) {
            return self.write_pieces(buffer, &[(offset as usize, bytes)]);
        }
        if self.staged.fetch_add(len, Ordering::Relaxed) + len > self.meter.share(STAGED_PART, MAX_STAGED) {
            self.wait()?;
        }
        self.meter.take(len);
        self.queue.write_buffer(buffer, offset, bytes);
        self.meter.retire(len);
        Ok(())
    }

    /// Copies pieces of host bytes to their offsets, which ascend in multiples of 4, on all threads.
    pub fn write_pieces(&self, buffer: &wgpu::Buffer, pieces: &[(usize, &[u8])]) -> Result<()> {
        self.uploads.write(&self.device, &self.queue, buffer, pieces)
    }

    /// Waits until everything is done, uploads too, and frees staging memory.
    pub fn wait(&self) -> Result<()> {
        let retired = self.meter.retired();
        self.staged.store(0, Ordering::Relaxed);
        // An upload only starts with the next submission.
        self.queue.submit([]);
        self.poll(wgpu::PollType::wait_indefinitely(), retired)
    }

    /// Waits for a submission; `retired`: the point in time before it.
    fn poll(&self, until: wgpu::PollType, retired: u64) -> Result<()> {
        self.device.poll(until).map_err(|e| Error::Device(format!("{}: {e}", self.name)))?;
        self.meter.settle(retired);
        self.check()
    }

    /// Reads the first `bytes` of a buffer back.
    pub fn read(&self, buffer: &wgpu::Buffer, bytes: u64) -> Result<Vec<u8>> {
        self.read_with(buffer, bytes, <[u8]>::to_vec)
    }

    /// Lets `use_bytes` see the first `bytes` of a buffer.
    pub fn read_with<T>(
        &self,
        buffer: &wgpu::Buffer,
        bytes: u64,
        use_bytes: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        let piece = self.downloads.piece();
        match bytes {
            0 => self.check().map(|()| use_bytes(&[])),
            _ if bytes <= piece => self.read_piece(buffer, 0..bytes, use_bytes),
            _ => {
                let mut all = Vec::with_capacity(bytes as usize);
                for start in (0..bytes).step_by(piece as usize) {
                    let end = (start + piece).min(bytes);
                    self.read_piece(buffer, start..end, |piece| all.extend_from_slice(piece))?;
                }
                Ok(use_bytes(&all))
            }
        }
    }

    /// Lets `use_bytes` see some bytes of a buffer, from a multiple of 4 on and no more than a download holds.
    fn read_piece<T>(
        &self,
        buffer: &wgpu::Buffer,
        bytes: Range<u64>,
        use_bytes: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        self.start_read(buffer, bytes).finish(self, use_bytes)
    }

    /// Begins to read some bytes of a buffer, which launches that follow need not wait for; as
    /// [`read_piece`](Self::read_piece).
    pub fn start_read(&self, buffer: &wgpu::Buffer, bytes: Range<u64>) -> Download {
        let len = bytes.end - bytes.start;
        let size = len.next_multiple_of(4);
        let staging = self.downloads.take(&self.device, size);
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, bytes.start, &staging.buffer, 0, size);
        let retired = self.meter.retired();
        let copied = self.queue.submit([encoder.finish()]);
        let (send, mapped) = std::sync::mpsc::channel();
        staging.buffer.map_async(wgpu::MapMode::Read, ..size, move |result| drop(send.send(result)));
        Download { staging, len, copied, mapped, retired }
    }

    /// Makes the pipelines that will be needed, on all threads.
    pub fn prepare(&self, kernels: &[Kernel]) {
        kernels.par_iter().for_each(|&kernel| drop(self.pipeline(kernel)));
    }

    fn pipeline(&self, kernel: Kernel) -> Pipeline {
        let pipeline = lock(&self.pipelines).entry(kernel).or_default().clone();
        pipeline.get_or_init(|| self.make_pipeline(kernel)).clone()
    }

    fn make_pipeline(&self, kernel: Kernel) -> Pipeline {
        let start = std::time::Instant::now();
        let module = shader_module(&self.device, &kernel.label(), &kernel.source());
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&kernel.label()),
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                // Kernels write workgroup memory before they read it.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: self.cache.as_ref().map(PipelineCache::cache),
        });
        tracing::debug!(kernel = kernel.label(), seconds = start.elapsed().as_secs_f64(), "made a pipeline");
        Pipeline { layout: pipeline.get_bind_group_layout(0), pipeline }
    }

    /// Starts recording.
    pub fn commands(&self) -> Commands<'_> {
        Commands {
            gpu: self,
            launches: Vec::new(),
            phase: 0,
            tables: Vec::new(),
            kept: Vec::new(),
            scratch: Vec::new(),
            spare: Vec::new(),
        }
    }
}

/// Bytes on their way to the host.
pub(crate) struct Download {
    staging: Staging,
    len: u64,
    copied: wgpu::SubmissionIndex,
    mapped: Receiver<std::result::Result<(), wgpu::BufferAsyncError>>,
    /// The point in time before it.
    retired: u64,
}

impl Download {
    /// Waits for them.
    pub fn finish<T>(self, gpu: &Gpu, use_bytes: impl FnOnce(&[u8]) -> T) -> Result<T> {
        // Not for what has been submitted since.
        let until = wgpu::PollType::Wait { submission_index: Some(self.copied), timeout: None };
        gpu.poll(until, self.retired)?;
        match self.mapped.recv() {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Err(Error::Device(format!("{}: cannot read back: {e}", gpu.name))),
            Err(_) => return Err(Error::Device(format!("{}: the device was lost", gpu.name))),
        }
        let view = self
            .staging
            .buffer
            .get_mapped_range(..self.len.next_multiple_of(4))
            .map_err(|e| Error::Device(format!("{}: cannot read back: {e}", gpu.name)))?;
        let result = use_bytes(&view[..self.len as usize]);
        drop(view);
        gpu.downloads.put(self.staging);
        Ok(result)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if let Some(cache) = &self.cache {
            cache.save();
        }
    }
}

/// The one place where shader modules are made: checked in debug builds and tests, unchecked in release.
fn shader_module(device: &wgpu::Device, label: &str, source: &str) -> wgpu::ShaderModule {
    let descriptor =
        wgpu::ShaderModuleDescriptor { label: Some(label), source: wgpu::ShaderSource::Wgsl(source.into()) };
    if cfg!(debug_assertions) {
        device.create_shader_module(descriptor)
    } else {
        // SAFETY: only sources of this crate come here. Their loops end (each counts to a bound that
        // it does not change), they divide integers only by constants other than zero and by table
        // fields that launchers set to 1 or more, and every index is either checked against its job's
        // shape or derived from the shape that the launcher sized the buffer by. The parity tests run
        // the same sources with all checks on.
        unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
    }
}

/// The smallest of these sizes that holds `bytes`, unless it is far too large, which sizes up to `small` are not.
fn best(sizes: impl Iterator<Item = u64>, bytes: u64, small: u64) -> Option<usize> {
    let fits = |(_, size): &(usize, u64)| *size >= bytes && size / 5 <= bytes.max(small) / 4;
    sizes.enumerate().filter(fits).min_by_key(|(_, size)| *size).map(|(i, _)| i)
}

/// A buffer that goes back to the pool: making one costs more than most launches, and freeing it too.
pub(crate) struct Pooled {
    gpu: Arc<Gpu>,
    buffer: Option<Buffer>,
}

impl std::fmt::Debug for Pooled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pooled").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl std::ops::Deref for Pooled {
    type Target = wgpu::Buffer;
    fn deref(&self) -> &wgpu::Buffer {
        self.buffer.as_ref().expect("present until dropped")
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let Some(buffer) = self.buffer.take() else { return };
        lock(&self.gpu.pool).push(buffer);
        self.gpu.evict(0, 0);
    }
}

/// What one workgroup does, as a kernel's header comment says: usually job, tile row, tile column, part.
pub(crate) type Work = [u32; 4];

/// Launches that are recorded and then submitted as one compute pass.
pub(crate) struct Commands<'a> {
    gpu: &'a Gpu,
    launches: Vec<Launch>,
    /// The phase of the next launch.
    phase: u32,
    /// The job and work tables of all launches.
    tables: Vec<u8>,
    /// What launches use must not go to another user before they are submitted.
    kept: Vec<Arc<Pooled>>,
    /// Of these alone, and what may become so.
    scratch: Vec<Arc<Pooled>>,
    spare: Vec<Arc<Pooled>>,
}

struct Launch {
    phase: u32,
    kernel: Kernel,
    jobs: Range<usize>,
    work: Workgroups,
    buffers: Vec<OwnedBinding>,
}

enum Workgroups {
    /// One for each entry of a table.
    Table(Range<usize>),
    /// A grid, whose places the kernel reads for itself.
    Grid([u32; 3]),
}

/// A range of a buffer, bound once it is submitted.
struct OwnedBinding {
    buffer: wgpu::Buffer,
    offset: u64,
    size: Option<wgpu::BufferSize>,
}

/// Alignment of a bound range that every device accepts: the coarsest that WebGPU lets one ask for.
pub(crate) const BIND_ALIGN: usize = 256;

impl Commands<'_> {
    /// Dispatches one workgroup for each entry of `work`. Bindings are: 0 params, 1 `jobs`, 2 `work`,
    /// 3 and up `buffers`. A launch sees what those before it wrote.
    pub fn launch<J: bytemuck::NoUninit>(
        &mut self,
        kernel: Kernel,
        jobs: &[J],
        work: &[Work],
        buffers: &[wgpu::BufferBinding<'_>],
    ) {
        if work.is_empty() {
            return;
        }
        let jobs = self.append(bytemuck::cast_slice(jobs));
        let work = Workgroups::Table(self.append(bytemuck::cast_slice(work)));
        self.push(kernel, jobs, work, buffers);
    }

    /// Dispatches a grid of workgroups on one job. Bindings are: 1 `jobs`, of one entry, 3 and up `buffers`.
    pub fn launch_grid<J: bytemuck::NoUninit>(
        &mut self,
        kernel: Kernel,
        job: &J,
        grid: [u32; 3],
        buffers: &[wgpu::BufferBinding<'_>],
    ) {
        if grid.contains(&0) {
            return;
        }
        let jobs = self.append(bytemuck::bytes_of(job));
        self.push(kernel, jobs, Workgroups::Grid(grid), buffers);
    }

    fn append(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.tables.len().next_multiple_of(BIND_ALIGN);
        self.tables.resize(start, 0);
        self.tables.extend_from_slice(bytes);
        start..self.tables.len()
    }

    fn push(
        &mut self,
        kernel: Kernel,
        jobs: Range<usize>,
        work: Workgroups,
        buffers: &[wgpu::BufferBinding<'_>],
    ) {
        let buffers = buffers
            .iter()
            .map(|b| OwnedBinding { buffer: b.buffer.clone(), offset: b.offset, size: b.size })
            .collect();
        self.launches.push(Launch { phase: self.phase, kernel, jobs, work, buffers });
    }

    /// Sets the phase of the launches that follow. Launches run in the order of their phases, then in the
    /// order of recording: independent chains of launches that are recorded one after the other run side by
    /// side, without a wait between each two.
    pub fn phase(&mut self, phase: u32) {
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

    /// Submits what was recorded.
    pub fn submit(mut self) -> Result<()> {
        let mut encoder = self.gpu.device.create_command_encoder(&Default::default());
        if !self.launches.is_empty() {
            self.record(&mut encoder);
            self.gpu.queue.submit([encoder.finish()]);
        }
        self.gpu.check()
    }

    /// Records into an encoder of the host, which submits it. Gives the scratch buffers that were used, for commands that
    /// run after these.
    pub fn encode(mut self, encoder: &mut wgpu::CommandEncoder) -> Vec<Arc<Pooled>> {
        if !self.launches.is_empty() {
            self.record(encoder);
            let held = (self.kept, self.scratch.clone());
            encoder.on_submitted_work_done(move || drop(held));
        }
        self.scratch
    }

    fn record(&mut self, encoder: &mut wgpu::CommandEncoder) {
        let Self { gpu, launches, tables: bytes, .. } = self;
        launches.sort_by_key(|launch| launch.phase);
        // Themselves, and what wgpu stages them in.
        let held = gpu.meter.hold(2 * bytes.len() as u64);
        encoder.on_submitted_work_done(move || drop(held));
        let tables = gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("job and work tables"),
            size: bytes.len().next_multiple_of(4) as u64,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: true,
        });
        if let Ok(mut view) = tables.get_mapped_range_mut(..) {
            view.slice(..bytes.len()).copy_from_slice(bytes);
        }
        tables.unmap();
        let mut pass = encoder.begin_compute_pass(&Default::default());
        for launch in launches {
            let Pipeline { pipeline, layout } = gpu.pipeline(launch.kernel);
            let entry = |binding, buffer, offset, size| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size }),
            };
            let table = |binding, range: &Range<usize>| {
                entry(binding, &tables, range.start as u64, wgpu::BufferSize::new(range.len() as u64))
            };
            let mut entries = vec![table(1, &launch.jobs)];
            if let Workgroups::Table(work) = &launch.work {
                entries.extend([entry(0, &gpu.params, 0, None), table(2, work)]);
            }
            entries.extend((3..).zip(&launch.buffers).map(|(i, b)| entry(i, &b.buffer, b.offset, b.size)));
            let group = gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &layout,
                entries: &entries,
            });
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[]);
            let [x, y, z] = match &launch.work {
                Workgroups::Grid(grid) => *grid,
                Workgroups::Table(work) => {
                    let count = (work.len() / size_of::<Work>()) as u32;
                    [count.min(GRID_WIDTH), count.div_ceil(GRID_WIDTH), 1]
                }
            };
            pass.dispatch_workgroups(x, y, z);
        }
    }
}

/// The whole of a buffer.
pub(crate) fn whole(buffer: &wgpu::Buffer) -> wgpu::BufferBinding<'_> {
    buffer.as_entire_buffer_binding()
}
