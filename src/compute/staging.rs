//! Memory that uploads, tables and downloads pass through, kept and used again: making it anew costs more than the copy.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use super::memory::{Held, Meter};
use super::wait;
use crate::{Error, Result};

/// Upload buffers that go round; bytes of one at most, and its part of the budget.
const UPLOADS: usize = 4;
const UPLOAD: u64 = 16 << 20;
const UPLOAD_PART: u64 = 64;
/// Bytes that one thread copies at a time; a multiple of what mapped ranges are aligned to.
const BLOCK: usize = 1 << 20;
/// Bytes of tables that are kept, and their part of the budget; bytes of one at least. A caller that submits without
/// waiting has hundreds on their way.
const TABLES: u64 = 64 << 20;
const TABLES_PART: u64 = 32;
const TABLE: u64 = 16 << 10;
/// Download buffers that are kept; bytes of one at most, and its part of the budget.
const DOWNLOADS: usize = 2;
const DOWNLOAD: u64 = 1 << 30;
const DOWNLOAD_PART: u64 = 32;

/// Upload buffers that go round: filled, copied from, mapped again.
pub(crate) struct Uploads {
    state: Mutex<Ring>,
    done: Sender<wgpu::Buffer>,
    meter: Arc<Meter>,
}

struct Ring {
    /// Mapped buffers come back here.
    mapped: Receiver<wgpu::Buffer>,
    made: usize,
    /// The copies of those that are on their way, the oldest first.
    copies: VecDeque<wgpu::SubmissionIndex>,
}

impl Uploads {
    pub fn new(meter: &Arc<Meter>) -> Self {
        let (done, mapped) = channel();
        let ring = Ring { mapped, made: 0, copies: VecDeque::new() };
        Self { state: Mutex::new(ring), done, meter: meter.clone() }
    }

    /// Bytes of one buffer.
    pub fn piece(&self) -> u64 {
        self.meter.share(UPLOAD_PART, UPLOAD)
    }

    /// Copies pieces of host bytes to their offsets, which ascend in multiples of 4, on all threads; what lies between
    /// them is left undefined. Submits.
    pub fn write(
        &self,
        device: &wgpu::Device,
        queue: &wgpu::Queue,
        target: &wgpu::Buffer,
        pieces: &[(usize, &[u8])],
    ) -> Result<()> {
        let Some((last, bytes)) = pieces.last() else { return Ok(()) };
        let end = (last + bytes.len()).next_multiple_of(4);
        let (step, first) = (self.piece() as usize, pieces[0].0);
        for start in (first..end).step_by(step) {
            let len = step.min(end - start);
            let buffer = self.next(device, queue)?;
            let blocks: Vec<usize> = (0..len).step_by(BLOCK).collect();
            blocks.into_par_iter().try_for_each(|block| {
                let range = block..(block + BLOCK).min(len).next_multiple_of(8);
                let refused = |e| Error::Device(format!("cannot map an upload buffer: {e}"));
                let mut view =
                    buffer.get_mapped_range_mut(range.start as u64..range.end as u64).map_err(refused)?;
                fill(&mut view, start + range.start, pieces);
                Ok(())
            })?;
            buffer.unmap();
            let mut encoder = device.create_command_encoder(&Default::default());
            encoder.copy_buffer_to_buffer(&buffer, 0, target, start as u64, len as u64);
            let copied = queue.submit([encoder.finish()]);
            let (done, again) = (self.done.clone(), buffer.clone());
            buffer.map_async(wgpu::MapMode::Write, .., move |result| {
                if result.is_ok() {
                    // Nobody waits for it if the device is gone.
                    let _ = done.send(again);
                }
            });
            let mut ring = self.ring();
            if ring.copies.len() == UPLOADS {
                // No more are on their way.
                ring.copies.pop_front();
            }
            ring.copies.push_back(copied);
        }
        Ok(())
    }

    /// A mapped buffer; waits for the one that comes back first if all are on their way.
    fn next(&self, device: &wgpu::Device, queue: &wgpu::Queue) -> Result<wgpu::Buffer> {
        loop {
            let mut ring = self.ring();
            if let Ok(buffer) = ring.mapped.try_recv() {
                return Ok(buffer);
            }
            // If no copy is on its way, others fill all of them, and may be waiting for this thread.
            if ring.made < UPLOADS || ring.copies.is_empty() {
                ring.made += 1;
                self.meter.take(self.piece());
                return Ok(device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("upload"),
                    size: self.piece(),
                    usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: true,
                }));
            }
            let until = wgpu::PollType::Wait { submission_index: ring.copies.pop_front(), timeout: None };
            drop(ring);
            wait::poll(device, queue, until)
                .map_err(|e| Error::Device(format!("an upload did not end: {e}")))?;
            std::thread::yield_now();
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fills a view that stands for the bytes from `start` on.
fn fill(view: &mut wgpu::BufferViewMut, start: usize, pieces: &[(usize, &[u8])]) {
    let end = start + view.len();
    let from = pieces.partition_point(|(at, bytes)| at + bytes.len() <= start);
    for (at, bytes) in pieces[from..].iter().take_while(|(at, _)| *at < end) {
        let (first, last) = ((*at).max(start), (at + bytes.len()).min(end));
        if first < last {
            view.slice(first - start..last - start).copy_from_slice(&bytes[first - at..last - at]);
        }
    }
}

/// A buffer of jobs and work that kernels read, and the one that the host writes them in.
pub(crate) struct Table {
    /// Mapped, until it is [sent](Tables::send).
    written: wgpu::Buffer,
    pub buffer: wgpu::Buffer,
    /// The bytes of both.
    _held: Held,
}

/// Tables that wait for the next launches.
pub(crate) struct Tables {
    mapped: Arc<Mutex<Vec<Table>>>,
    meter: Arc<Meter>,
}

impl Tables {
    pub fn new(meter: &Arc<Meter>) -> Self {
        Self { mapped: Arc::default(), meter: meter.clone() }
    }

    /// A table that begins with `bytes`, once what this records has run.
    pub fn write(
        &self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        bytes: &[u8],
    ) -> Result<Table> {
        let size = (bytes.len() as u64).next_multiple_of(wgpu::COPY_BUFFER_ALIGNMENT).max(4);
        let table = self.take(device, size);
        // Kernels would take what was not written for jobs of no size, and write nothing.
        let refused = |e| Error::Device(format!("cannot write {} bytes of jobs: {e}", bytes.len()));
        let mut view = table.written.get_mapped_range_mut(..size).map_err(refused)?;
        view.slice(..bytes.len()).copy_from_slice(bytes);
        drop(view);
        table.written.unmap();
        encoder.copy_buffer_to_buffer(&table.written, 0, &table.buffer, 0, size);
        Ok(table)
    }

    /// Takes a table back whose launches have been submitted; the queue keeps its users apart.
    pub fn put(&self, table: Table) {
        let (mapped, most) = (self.mapped.clone(), self.meter.share(TABLES_PART, TABLES));
        table.written.clone().map_async(wgpu::MapMode::Write, .., move |result| {
            let mut mapped = mapped.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes: u64 = mapped.iter().map(|table| 2 * table.buffer.size()).sum();
            if result.is_ok() && bytes + 2 * table.buffer.size() <= most {
                mapped.push(table);
            }
        });
    }

    /// The smallest that holds so many bytes, unless it is far too large, or a new one.
    fn take(&self, device: &wgpu::Device, bytes: u64) -> Table {
        let size = bytes.next_power_of_two().max(TABLE);
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |i: &usize| (size..=4 * size).contains(&mapped[*i].buffer.size());
        let best = (0..mapped.len()).filter(fits).min_by_key(|&i| mapped[i].buffer.size());
        if let Some(best) = best {
            return mapped.swap_remove(best);
        }
        drop(mapped);
        let buffer = |label, usage, mapped_at_creation| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage,
                mapped_at_creation,
            })
        };
        use wgpu::BufferUsages as Usage;
        Table {
            _held: self.meter.hold(2 * size),
            written: buffer("tables to be", Usage::MAP_WRITE | Usage::COPY_SRC, true),
            buffer: buffer("job and work tables", Usage::STORAGE | Usage::COPY_DST, false),
        }
    }
}

/// A download buffer, whose bytes are counted until it is dropped.
pub(crate) struct Staging {
    pub buffer: wgpu::Buffer,
    _held: Held,
}

/// Download buffers.
pub(crate) struct Downloads {
    kept: Mutex<Vec<Staging>>,
    meter: Arc<Meter>,
}

impl Downloads {
    pub fn new(meter: &Arc<Meter>) -> Self {
        Self { kept: Mutex::default(), meter: meter.clone() }
    }

    /// Bytes that a buffer may have.
    pub fn piece(&self) -> u64 {
        self.meter.share(DOWNLOAD_PART, DOWNLOAD)
    }

    /// An unmapped buffer of at least `bytes`, which are no more than a [`piece`](Self::piece).
    pub fn take(&self, device: &wgpu::Device, bytes: u64) -> Staging {
        let mut kept = self.kept();
        let size = |i: &usize| kept[*i].buffer.size();
        let fit = (0..kept.len()).filter(|i| size(i) >= bytes).min_by_key(size);
        if let Some(i) = fit {
            return kept.swap_remove(i);
        }
        let size = bytes.next_power_of_two().max(1 << 16).min((bytes + (16 << 20)).next_multiple_of(16));
        let size = size.min(self.piece());
        let _held = self.meter.hold(size);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("download"),
            size,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        Staging { buffer, _held }
    }

    /// Unmaps a buffer and keeps it.
    pub fn put(&self, staging: Staging) {
        staging.buffer.unmap();
        let mut kept = self.kept();
        kept.push(staging);
        if kept.len() > DOWNLOADS {
            // The smallest is the cheapest to make again.
            let least = (0..kept.len()).min_by_key(|&i| kept[i].buffer.size());
            least.map(|i| kept.swap_remove(i));
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Staging>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
