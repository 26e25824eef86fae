//! What device memory is held, and how much was at most.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counts the bytes of every buffer of a device, staging included, until the GPU is done with them.
#[derive(Debug)]
pub(crate) struct Meter {
    /// Bytes to stay within.
    budget: u64,
    count: Mutex<Count>,
    /// What a test does at each allocation.
    #[cfg(test)]
    pub fault: fault::Fault,
}

#[derive(Debug, Default)]
struct Count {
    held: u64,
    peak: u64,
    /// Of `held`, what was dropped while the queue may still use it: all that ever was, and what of it is free by now.
    retired: u64,
    freed: u64,
}

impl Meter {
    pub fn new(budget: u64) -> Self {
        Self {
            budget,
            count: Mutex::default(),
            #[cfg(test)]
            fault: fault::Fault::default(),
        }
    }

    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// A part of the budget for what is staged, 16 KiB at least, but not more than is of use.
    pub fn share(&self, part: u64, most: u64) -> u64 {
        ((self.budget / part) & !255).clamp(16 << 10, most)
    }

    /// Counts bytes that are taken whatever the budget is.
    pub fn take(&self, bytes: u64) {
        #[cfg(test)]
        self.fault.allocation();
        let mut count = self.count();
        count.held += bytes;
        count.peak = count.peak.max(count.held);
    }

    /// Counts bytes if they fit into the budget; else tells by how many they do not.
    pub fn try_take(&self, bytes: u64) -> Result<(), u64> {
        let mut count = self.count();
        match (count.held + bytes).checked_sub(self.budget) {
            None | Some(0) => {
                count.held += bytes;
                count.peak = count.peak.max(count.held);
                Ok(())
            }
            Some(excess) => Err(excess),
        }
    }

    /// Counts bytes until what this gives is dropped.
    pub fn hold(self: &Arc<Self>, bytes: u64) -> Held {
        self.take(bytes);
        Held { meter: self.clone(), bytes }
    }

    /// These are free.
    pub fn free(&self, bytes: u64) {
        self.count().held -= bytes;
    }

    /// These are free as soon as the queue has done what was submitted.
    pub fn retire(&self, bytes: u64) {
        self.count().retired += bytes;
    }

    /// A point in time, to be asked for before a submission.
    pub fn retired(&self) -> u64 {
        self.count().retired
    }

    /// Bytes that wait for the queue.
    pub fn waiting(&self) -> u64 {
        let count = self.count();
        count.retired - count.freed
    }

    /// The queue has done what was submitted up to a point in time.
    pub fn settle(&self, retired: u64) {
        let mut count = self.count();
        let free = retired.saturating_sub(count.freed);
        count.freed += free;
        count.held -= free;
    }

    pub fn peak(&self) -> u64 {
        self.count().peak
    }

    pub fn reset_peak(&self) {
        let mut count = self.count();
        count.peak = count.held;
    }

    fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Allocations that fail when a test says so.
#[cfg(test)]
pub(crate) mod fault {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// What happens at one of the allocations of a device, and how many there were.
    #[derive(Default)]
    pub struct Fault {
        pub count: AtomicUsize,
        pub at: Mutex<Option<(usize, What)>>,
    }

    #[derive(Clone)]
    pub enum What {
        /// The device is destroyed before.
        Destroyed(wgpu::Device),
        /// The driver refuses it; not all of what is small is asked.
        Refused,
    }

    impl std::fmt::Debug for Fault {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Fault")
        }
    }

    impl Fault {
        /// Counts one; tells whether it is refused.
        pub fn allocation(&self) -> bool {
            let n = self.count.fetch_add(1, Ordering::SeqCst);
            match &*self.at.lock().unwrap() {
                Some((at, What::Destroyed(device))) if *at == n => {
                    device.destroy();
                    false
                }
                Some((at, What::Refused)) => *at == n,
                _ => false,
            }
        }
    }
}

/// Bytes that are counted until it is dropped.
pub(crate) struct Held {
    meter: Arc<Meter>,
    bytes: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.meter.free(self.bytes);
    }
}

/// A buffer whose bytes are counted until it is dropped, and the queue done with it.
pub(crate) struct Buffer {
    buffer: wgpu::Buffer,
    meter: Arc<Meter>,
}

impl Buffer {
    /// A buffer whose bytes have been counted.
    pub fn new(buffer: wgpu::Buffer, meter: &Arc<Meter>) -> Self {
        Self { buffer, meter: meter.clone() }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl Deref for Buffer {
    type Target = wgpu::Buffer;
    fn deref(&self) -> &wgpu::Buffer {
        &self.buffer
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.meter.retire(self.buffer.size());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_count_until_the_queue_is_done_with_them() {
        let meter = Meter::new(100);
        assert_eq!(meter.try_take(60), Ok(()));
        assert_eq!(meter.try_take(50), Err(10));
        meter.take(10);
        let before = meter.retired();
        meter.retire(60);
        assert_eq!((meter.waiting(), meter.try_take(50)), (60, Err(20)));
        // What was retired after the submission is still in use.
        meter.settle(before);
        assert_eq!(meter.waiting(), 60);
        let after = meter.retired();
        meter.settle(after);
        // A slower thread that waited for less changes nothing.
        meter.settle(before);
        meter.settle(after);
        assert_eq!((meter.waiting(), meter.try_take(90), meter.peak()), (0, Ok(()), 100));
        meter.free(90);
        meter.reset_peak();
        assert_eq!(meter.peak(), 10);
        let meter = Arc::new(meter);
        drop(meter.hold(5));
        assert_eq!((meter.peak(), meter.try_take(90)), (15, Ok(())));
    }

    #[test]
    fn shares_stay_between_what_works_and_what_is_of_use() {
        assert_eq!(Meter::new(0).share(32, 1 << 20), 16 << 10);
        assert_eq!(Meter::new(16 << 20).share(32, 1 << 20), 512 << 10);
        assert_eq!(Meter::new(1 << 30).share(32, 1 << 20), 1 << 20);
    }
}
