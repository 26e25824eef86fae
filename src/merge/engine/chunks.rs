//! Cutting layers into chunks that the device has room for, and running those in turn.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::Duration;

use crate::calibration::arena;
use crate::{Control, Device, Result};

/// Chunks that a GPU has at once: while one is downloaded, converted and written, another is uploaded and computed.
pub(crate) const IN_FLIGHT: usize = 2;

/// Bytes of the factors, as f32, that one chunk leaves on the host before they are written; as many stay in memory as are in flight.
const HOST_CHUNK: u64 = 112 << 20;

/// Device memory for a layer that has the device to itself: a quarter is left for what uploads and downloads are staged in,
/// and buffers from the pool are up to a quarter larger than was asked for.
fn whole_room(device: &Device) -> u64 {
    device.memory() / 5 * 3
}

/// Device memory for one chunk of those [in flight](IN_FLIGHT).
pub(crate) fn room(device: &Device) -> u64 {
    whole_room(device) / IN_FLIGHT as u64
}

/// Layers in groups of which the device has room for [those in flight](IN_FLIGHT), and where each group is computed: on the CPU, what is
/// too large for the device. There, a group is of `at_once` layers.
///
/// `size`: bytes of a layer's largest buffer, and in all; `host`: bytes of its factors.
pub(crate) fn chunks<L: Copy>(
    device: &Device,
    layers: &[L],
    size: impl Fn(L) -> (u64, u64),
    host: impl Fn(L) -> u64,
    at_once: usize,
) -> Vec<(Vec<L>, Device)> {
    let arena = arena(device);
    let limit = room(device).min(arena);
    let most = if device.is_gpu() { usize::MAX } else { at_once };
    let mut chunks: Vec<(Vec<L>, Device)> = Vec::new();
    let (mut used, mut held) = (0, 0);
    for &layer in layers {
        let ((largest, size), host) = (size(layer), host(layer));
        let fits = !device.is_gpu() || (largest <= arena && size <= whole_room(device));
        match chunks.last_mut() {
            Some((chunk, on))
                if used + size <= limit
                    && held + host <= HOST_CHUNK
                    && chunk.len() < most
                    && fits
                    && on.is_gpu() == device.is_gpu() =>
            {
                chunk.push(layer);
                used += size;
                held += host;
            }
            _ => {
                chunks.push((vec![layer], if fits { device.clone() } else { Device::cpu() }));
                (used, held) = (size, host);
            }
        }
    }
    chunks
}

/// Runs tasks on the threads of rayon's pool, some at once and begun in order, and hands what they give to `done`, on the
/// calling thread. Ends with the first error.
pub(crate) fn in_turn<T: Send>(
    tasks: usize,
    at_once: usize,
    control: &Control<'_>,
    task: &(dyn Fn(usize) -> Result<T> + Sync),
    mut done: impl FnMut(usize, T) -> Result<()>,
) -> Result<()> {
    let turns = Turns { tasks, task, next: AtomicUsize::new(0), stop: AtomicBool::new(false) };
    let (send, receive) = channel();
    rayon::in_place_scope(|scope| {
        (0..at_once.min(tasks)).for_each(|_| turns.spawn(scope, send.clone()));
        drop(send);
        let mut all = || {
            while let Some((i, result)) = wait(&receive, control)? {
                done(i, result?)?;
            }
            Ok(())
        };
        let result = all();
        turns.stop.store(true, Ordering::Relaxed);
        result
    })
}

struct Turns<'a, T> {
    tasks: usize,
    task: &'a (dyn Fn(usize) -> Result<T> + Sync),
    next: AtomicUsize,
    stop: AtomicBool,
}

impl<T: Send> Turns<'_, T> {
    /// Has a thread run the next task, and then one run what follows. Each is a job of its own: a thread that waits for parts
    /// of one may take up another meanwhile, and must not be kept from its own until the last is done.
    fn spawn<'s>(&'s self, scope: &rayon::Scope<'s>, send: Sender<(usize, Result<T>)>)
    where
        T: 's,
    {
        scope.spawn(move |scope| {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            let goes_on = i < self.tasks && !self.stop.load(Ordering::Relaxed);
            if goes_on && send.send((i, (self.task)(i))).is_ok() {
                self.spawn(scope, send);
            }
        });
    }
}

/// What comes next; `None` when nothing more will. A thread of rayon's works meanwhile, for the tasks may need it.
fn wait<T>(receive: &Receiver<T>, control: &Control<'_>) -> Result<Option<T>> {
    loop {
        control.check()?;
        let result = match rayon::yield_now() {
            Some(rayon::Yield::Executed) => receive.try_recv().map_err(no_wait),
            Some(rayon::Yield::Idle) => within(receive, 1),
            None => within(receive, 50),
        };
        match result {
            Ok(value) => return Ok(Some(value)),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// What comes within so many milliseconds. Where there is one thread alone, nothing comes while it waits.
fn within<T>(receive: &Receiver<T>, milliseconds: u64) -> std::result::Result<T, RecvTimeoutError> {
    if cfg!(target_arch = "wasm32") {
        return receive.try_recv().map_err(no_wait);
    }
    receive.recv_timeout(Duration::from_millis(milliseconds))
}

fn no_wait(error: TryRecvError) -> RecvTimeoutError {
    match error {
        TryRecvError::Empty => RecvTimeoutError::Timeout,
        TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
    }
}
