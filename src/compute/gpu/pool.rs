//! Buffers, new ones and those that wait for their next user.

use std::sync::Arc;

use super::{Gpu, lock};
use crate::compute::memory::Buffer;
use crate::compute::wait;
use crate::{Error, Result};

/// Buffers that wait for their next user, and their part of the budget.
const MAX_POOLED: usize = 256;
const POOL_PART: u64 = 4;

impl Gpu {
    /// A buffer of its own for so many values, whose content is zero.
    pub fn allocate_values(&self, label: &str, values: usize, size: usize) -> Result<Buffer> {
        self.allocate(label, values.saturating_mul(size) as u64)
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
        let refused = wait::block_on(scope.pop()).is_some();
        #[cfg(test)]
        let refused = refused | self.meter.fault.allocation();
        if refused {
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
    pub(super) fn evict(&self, added: u64, least: u64) {
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
        // What stays keeps its order: the oldest are freed first.
        Some(pool.remove(best))
    }

    /// Bytes below which buffers may be far larger than was asked for.
    pub(super) fn least_waste(&self) -> u64 {
        self.meter.share(2048, 1 << 20)
    }
}

/// The smallest of these sizes that holds `bytes`, unless it is far too large, which sizes up to `small` are not.
pub(super) fn best(sizes: impl Iterator<Item = u64>, bytes: u64, small: u64) -> Option<usize> {
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

impl Pooled {
    /// The device that it belongs to.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
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
