//! The hash of a file, found while the file is written.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use sha2::{Digest, Sha256};

use super::draft::{COPY, lock};
use crate::{Control, WriteAt};

/// Bytes that are worth a thread.
const ENOUGH: u64 = 4 << 20;

/// Reads planned places of a file in their order, each once it is whole, and hashes them.
pub(super) struct Follower<'a> {
    file: &'a dyn WriteAt,
    /// In the order of the file, without those of no bytes.
    places: Vec<Range<u64>>,
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    whole: HashSet<Range<u64>>,
    /// Nothing more is written.
    ended: bool,
}

impl<'a> Follower<'a> {
    /// `places`: of all tensors, in the order of the file. `None` where it would not help: for a short file, and where there
    /// are no threads.
    pub fn new(file: &'a dyn WriteAt, places: &[Range<u64>]) -> Option<Self> {
        let bytes: u64 = places.iter().map(|place| place.end - place.start).sum();
        let places = places.iter().filter(|place| !place.is_empty()).cloned().collect();
        let (progress, changed) = Default::default();
        let helps = bytes >= ENOUGH && cfg!(not(target_arch = "wasm32"));
        helps.then_some(Self { file, places, progress, changed })
    }

    /// Tells that this place is whole.
    pub fn wrote(&self, place: Range<u64>) {
        lock(&self.progress).whole.insert(place);
        self.changed.notify_one();
    }

    /// Does work that writes to the file, and gives the SHA-256 of all places beside its result; `None` if not all of them
    /// became whole, or no thread was to be had.
    pub fn beside<T>(
        this: Option<&Self>,
        control: &Control<'_>,
        work: impl FnOnce() -> T,
    ) -> (T, io::Result<Option<Sha256>>) {
        let Some(this) = this else { return (work(), Ok(None)) };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("loraweld hash".into());
            let thread = thread.spawn_scoped(scope, || this.follow(control));
            let result = {
                // If the work panics, the thread must end as well.
                let _end = End(this);
                work()
            };
            let hash = match thread {
                Ok(thread) => {
                    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that hashes panicked")))
                }
                Err(_) => Ok(None),
            };
            (result, hash)
        })
    }

    fn follow(&self, control: &Control<'_>) -> io::Result<Option<Sha256>> {
        let mut sha = Sha256::new();
        let mut buffer = vec![0; COPY];
        for place in &self.places {
            if !self.becomes_whole(place) {
                return Ok(None);
            }
            for at in place.clone().step_by(COPY) {
                control.check().map_err(io::Error::other)?;
                let piece = &mut buffer[..(place.end - at).min(COPY as u64) as usize];
                self.file.read_at(piece, at)?;
                sha.update(piece);
            }
        }
        Ok(Some(sha))
    }

    /// Waits until it is, or never will be.
    fn becomes_whole(&self, place: &Range<u64>) -> bool {
        let waits = |progress: &mut Progress| !progress.ended && !progress.whole.contains(place);
        let progress =
            self.changed.wait_while(lock(&self.progress), waits).unwrap_or_else(PoisonError::into_inner);
        progress.whole.contains(place)
    }
}

/// Dropped, it tells that nothing more is written.
struct End<'a>(&'a Follower<'a>);

impl Drop for End<'_> {
    fn drop(&mut self) {
        lock(&self.0.progress).ended = true;
        self.0.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file in memory.
    #[derive(Default)]
    struct Memory(Mutex<Vec<u8>>);

    impl WriteAt for Memory {
        fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
            self.0.lock().unwrap()[at as usize..][..bytes.len()].copy_from_slice(bytes);
            Ok(())
        }
        fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
            bytes.copy_from_slice(&self.0.lock().unwrap()[at as usize..][..bytes.len()]);
            Ok(())
        }
        fn set_size(&self, bytes: u64) -> io::Result<()> {
            self.0.lock().unwrap().resize(bytes as usize, 0);
            Ok(())
        }
    }

    #[test]
    fn a_file_is_hashed_in_its_order_however_it_is_written() {
        let len = 3 * COPY as u64 + 5;
        let (start, end) = (100, 100 + 2 * len);
        let places = [start..start + len, start + len..start + len, start + len..end];
        let values: Vec<u8> = (0..2 * len).map(|i| (i * i % 251) as u8).collect();
        for order in [[0, 1, 2], [2, 1, 0]] {
            let file = Memory::default();
            file.set_size(end).unwrap();
            let follower = Follower::new(&file, &places).unwrap();
            let ((), hash) = Follower::beside(Some(&follower), &Control::default(), || {
                for i in order {
                    let place = places[i].clone();
                    let [from, to] = [place.start, place.end].map(|at| (at - start) as usize);
                    file.write_at(&values[from..to], place.start).unwrap();
                    follower.wrote(place);
                }
            });
            assert_eq!(hash.unwrap().unwrap().finalize(), Sha256::digest(&values), "{order:?}");
        }
    }

    #[test]
    fn what_is_not_as_planned_has_no_hash() {
        let file = Memory::default();
        file.set_size(2 * ENOUGH).unwrap();
        let places = [0..ENOUGH, ENOUGH..2 * ENOUGH];
        let follower = Follower::new(&file, &places).unwrap();
        let (result, hash) = Follower::beside(Some(&follower), &Control::default(), || {
            follower.wrote(0..ENOUGH);
            // A tensor that became shorter.
            follower.wrote(ENOUGH..2 * ENOUGH - 4);
            7
        });
        assert!(result == 7 && hash.unwrap().is_none());
        // A short file is hashed at the end.
        assert!(Follower::new(&file, std::slice::from_ref(&(0..1))).is_none());
    }

    #[test]
    fn work_that_panics_ends_the_thread() {
        let file = Memory::default();
        let follower = Follower::new(&file, std::slice::from_ref(&(0..ENOUGH))).unwrap();
        let work = || Follower::beside(Some(&follower), &Control::default(), || panic!("on purpose"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err());
    }
}
