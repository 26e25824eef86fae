//! Memory that uploads and downloads pass through, kept and used again: making it anew costs more than the copy.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use crate::{Error, Result};

/// Bytes of one upload buffer, and how many of them go round.
const UPLOAD: (u64, usize) = (16 << 20, 4);
/// Bytes that one thread copies at a time; a multiple of what mapped ranges are aligned to.
const BLOCK: usize = 1 << 20;
/// Download buffers that are kept.
const DOWNLOADS: usize = 4;

/// Upload buffers that go round: filled, copied from, mapped again.
pub(crate) struct Uploads {
    state: Mutex<Ring>,
    done: Sender<wgpu::Buffer>,
}

struct Ring {
    /// Mapped buffers come back here.
    mapped: Receiver<wgpu::Buffer>,
    made: usize,
    /// The copies of those that are on their way, the oldest first.
    copies: VecDeque<wgpu::SubmissionIndex>,
}

impl Default for Uploads {
    fn default() -> Self {
        let (done, mapped) = channel();
        Self { state: Mutex::new(Ring { mapped, made: 0, copies: VecDeque::new() }), done }
    }
}

impl Uploads {
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
        let (step, first) = (UPLOAD.0 as usize, pieces[0].0);
        for start in (first..end).step_by(step) {
            let len = step.min(end - start);
            let buffer = self.next(device)?;
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
            if ring.copies.len() == UPLOAD.1 {
                // No more are on their way.
                ring.copies.pop_front();
            }
            ring.copies.push_back(copied);
        }
        Ok(())
    }

    /// A mapped buffer; waits for the one that comes back first if all are on their way.
    fn next(&self, device: &wgpu::Device) -> Result<wgpu::Buffer> {
        loop {
            let mut ring = self.ring();
            if let Ok(buffer) = ring.mapped.try_recv() {
                return Ok(buffer);
            }
            // If no copy is on its way, others fill all of them, and may be waiting for this thread.
            if ring.made < UPLOAD.1 || ring.copies.is_empty() {
                ring.made += 1;
                return Ok(device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("upload"),
                    size: UPLOAD.0,
                    usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
                    mapped_at_creation: true,
                }));
            }
            let until = wgpu::PollType::Wait { submission_index: ring.copies.pop_front(), timeout: None };
            drop(ring);
            device.poll(until).map_err(|e| Error::Device(format!("an upload did not end: {e}")))?;
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

/// Download buffers.
#[derive(Default)]
pub(crate) struct Downloads(Mutex<Vec<wgpu::Buffer>>);

impl Downloads {
    /// An unmapped buffer of at least `bytes`.
    pub fn take(&self, device: &wgpu::Device, bytes: u64) -> wgpu::Buffer {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fit = (0..kept.len()).filter(|&i| kept[i].size() >= bytes).min_by_key(|&i| kept[i].size());
        match fit {
            Some(i) => kept.swap_remove(i),
            None => device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("download"),
                size: bytes.next_power_of_two().max(1 << 16).min((bytes + (16 << 20)).next_multiple_of(16)),
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            }),
        }
    }

    /// Unmaps a buffer and keeps it.
    pub fn put(&self, buffer: wgpu::Buffer) {
        buffer.unmap();
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(buffer);
        if kept.len() > DOWNLOADS {
            // The smallest is the cheapest to make again.
            let least = (0..kept.len()).min_by_key(|&i| kept[i].size());
            least.map(|i| kept.swap_remove(i));
        }
    }
}
