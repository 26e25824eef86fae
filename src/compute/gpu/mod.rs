//! A wgpu device with its pipelines, pooled buffers and command recording.

mod commands;
mod pipelines;
mod pool;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

pub(crate) use self::commands::{BIND_ALIGN, Commands, GRID_WIDTH, Phase, Prepared, Work, whole};
use self::pipelines::Pipelines;
pub(crate) use self::pool::Pooled;
use super::capabilities::{Capabilities, Disable};
use super::memory::{Buffer, Meter};
use super::pipeline_cache::PipelineCache;
use super::shaders::job;
use super::staging::{Downloads, Staging, Tables, Uploads};
use super::wait;
use crate::{Error, Result};

/// Uploads from this size on pass through memory of our own.
const LARGE: u64 = 1 << 20;

/// Bytes of smaller ones that may be staged by wgpu before we wait for the queue, and their part of the budget.
const MAX_STAGED: u64 = 256 << 20;
const STAGED_PART: u64 = 32;

/// Bytes of factors that operations upload at once, beside their results: their part of the budget.
const SOURCE_PART: u64 = 32;

job! {
    /// What every kernel with a table of work reads.
    pub(crate) struct Params {
        /// What shaders hide sums behind: it must not be a constant when they are compiled.
        zero: u32,
        grid_width: u32,
    }
}

pub(crate) struct Gpu {
    pub name: String,
    /// The instance that a device of our own was made from.
    pub instance: Option<wgpu::Instance>,
    pub adapter: wgpu::Adapter,
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub capabilities: Capabilities,
    pub disable: Disable,
    params: wgpu::Buffer,
    pipelines: Pipelines,
    cache: Option<PipelineCache>,
    pool: Mutex<Vec<Buffer>>,
    pub meter: Arc<Meter>,
    staged: AtomicU64,
    uploads: Uploads,
    tables: Tables,
    downloads: Downloads,
    /// How often something was read back.
    pub reads: AtomicU64,
    error: Arc<Mutex<Option<String>>>,
    /// Why the device is gone, if it is one of our own.
    lost: Arc<OnceLock<String>>,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("name", &self.name).finish_non_exhaustive()
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
        // Browsers do not tell names.
        let name = if info.name.is_empty() { "GPU" } else { &info.name };
        let capabilities = Capabilities::read(adapter, device.features(), &device.limits(), disable);
        let params = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("params"),
            size: 16,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        queue.write_buffer(&params, 0, bytemuck::bytes_of(&Params { zero: 0, grid_width: GRID_WIDTH }));
        let meter = Arc::new(Meter::new(memory));
        meter.take(params.size());
        Self {
            name: format!("{name} ({:?})", info.backend),
            instance: None,
            adapter: adapter.clone(),
            device,
            queue,
            capabilities,
            disable,
            params,
            pipelines: Pipelines::default(),
            cache: None,
            pool: Mutex::default(),
            staged: AtomicU64::new(0),
            uploads: Uploads::new(&meter),
            tables: Tables::new(&meter),
            downloads: Downloads::new(&meter),
            reads: AtomicU64::new(0),
            meter,
            error: Arc::default(),
            lost: Arc::default(),
        }
    }

    /// Makes pipelines with what a folder has of them.
    pub fn open_cache(&mut self, folder: Option<&Path>) {
        self.cache = folder.and_then(|folder| PipelineCache::open(&self.adapter, &self.device, folder));
    }

    /// Turns wgpu's uncaptured errors, which would panic, into errors of the next download, and remembers if the device is
    /// lost. For devices of our own: a host keeps its own handlers.
    pub fn record_errors(&self) {
        let lost = self.lost.clone();
        self.device.set_device_lost_callback(move |_, reason| {
            let reason = reason.trim_end_matches('.');
            let reason = if reason.is_empty() { "the driver gives no reason" } else { reason };
            let _ = lost.set(reason.to_owned());
        });
        let slot = self.error.clone();
        self.device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            lock(&slot).get_or_insert_with(|| error.to_string());
        }));
    }

    /// Fails if the device is gone. What fails then fails because of that, whatever it says itself.
    fn alive(&self) -> Result<()> {
        self.lost.get().map_or(Ok(()), |reason| Err(self.gone(reason)))
    }

    fn gone(&self, reason: &str) -> Error {
        let name = &self.name;
        Error::Device(format!(
            "{name}: the GPU was lost on the way ({reason}), and what it computed with it; try again, or compute on the CPU"
        ))
    }

    fn check(&self) -> Result<()> {
        self.alive()?;
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
        let written = self.uploads.write(&self.device, &self.queue, buffer, pieces);
        self.alive().and(written)
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
        let done = wait::poll(&self.device, &self.queue, until);
        self.alive()?;
        done.map_err(|e| Error::Device(format!("{}: {e}", self.name)))?;
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
        self.reads.fetch_add(1, Ordering::Relaxed);
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
        // What has been submitted since need not be waited for.
        let until = wgpu::PollType::Wait { submission_index: Some(self.copied), timeout: None };
        gpu.poll(until, self.retired)?;
        match wait::receive(&self.mapped) {
            Some(Ok(())) => {}
            Some(Err(e)) => return Err(Error::Device(format!("{}: cannot read back: {e}", gpu.name))),
            None => return Err(gpu.gone("nothing came back from it")),
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
