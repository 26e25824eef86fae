//! What threads share, used by several at once: one device with its pool and pipelines, adapters that are read when they are
//! needed, calibrations whose sums are on the device, and cancellation. A program of its own, so that ThreadSanitizer can
//! watch it (`scripts/sanitize.sh`); without, it shows that results do not depend on who else is at work.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::{io, thread};

use loraweld::merge::{Needs, Options, method};
use loraweld::{
    Adapter, Calibration, Control, Device, DeviceOptions, Error, Format, Layer, METHODS, Matrix, OpenOptions,
    RawMatrix, ReadAt, SaveOptions, Select, Unnamed,
};

const THREADS: usize = 4;
const WIDTH: usize = 40;

fn values(rows: usize, cols: usize, seed: usize) -> Matrix<f32> {
    Matrix::from_fn(rows, cols, |i, j| ((seed * 31 + i * cols + j) as f32 * 0.7).sin())
}

/// A file that is read, and not held.
struct Read(Vec<u8>);

impl ReadAt for Read {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        buffer.copy_from_slice(&self.0[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

fn saved(adapter: &Adapter) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("it");
    adapter.save(&path, &SaveOptions { unnamed: Unnamed::Keep, ..Default::default() }).unwrap();
    std::fs::read(path).unwrap()
}

fn adapters() -> [Adapter; 2] {
    [1, 2].map(|seed| {
        let layer = |i: usize| {
            let module = format!("transformer.transformer_blocks.{i}.attn.to_q");
            Layer::new(&module, values(4, WIDTH, seed + i), values(WIDTH, 4, seed + i + 5)).unwrap()
        };
        let adapter = Adapter::new(format!("{seed}"), Format::Peft, (0..4).map(layer).collect()).unwrap();
        let source = Arc::new(Read(saved(&adapter)));
        Adapter::from_source(format!("{seed}"), source, &OpenOptions::default()).unwrap()
    })
}

fn calibration(device: &Device, adapters: &[Adapter]) -> Calibration {
    let mut calibration = Calibration::new(adapters).unwrap();
    for (task, adapter) in adapters.iter().enumerate() {
        for layer in adapter.layers() {
            let x = values(24, WIDTH, task + 9);
            let x = RawMatrix::from_f32(24, WIDTH, x.data()).unwrap();
            calibration.accumulate(device, task, layer.key().as_str(), x).unwrap();
        }
    }
    calibration
}

fn devices() -> Vec<Device> {
    let gpu = Device::open(&DeviceOptions { select: Select::Gpu, ..Default::default() });
    [Device::cpu()].into_iter().chain(gpu.ok()).collect()
}

/// Runs on several threads that begin at once.
fn together<T: Send>(run: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let barrier = Barrier::new(THREADS);
    let one = |i: usize| {
        barrier.wait();
        run(i)
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|i| {
                scope.spawn({
                    let one = &one;
                    move || one(i)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn merges_at_once_give_what_each_gives_alone() {
    for device in devices() {
        let merged = |entry: &loraweld::MethodEntry, adapters: &[Adapter], calibration: &Calibration| {
            let mut options = Options::new();
            if entry.needs == Needs::Truncation {
                options.insert("rank".into(), 3.into());
            }
            let calibration = matches!(entry.needs, Needs::Calibration { .. }).then_some(calibration);
            let method = method(entry.name, options, calibration).unwrap();
            let weighted = [adapters[0].at(1.0), adapters[1].at(-0.5)];
            saved(&method.merge_any(&device, &weighted, Control::default()).unwrap().adapter)
        };
        let alone = adapters();
        let of_alone = calibration(&device, &alone);
        let want: Vec<Vec<u8>> = METHODS.iter().map(|entry| merged(entry, &alone, &of_alone)).collect();
        // Neither the factors nor the sums have been read yet.
        let shared = adapters();
        let of_shared = calibration(&device, &shared);
        let got = together(|i| {
            let turn = |k: usize| (i + k) % METHODS.len();
            let all = (0..METHODS.len()).map(|k| (turn(k), merged(&METHODS[turn(k)], &shared, &of_shared)));
            all.collect::<Vec<_>>()
        });
        for (k, bytes) in got.into_iter().flatten() {
            assert!(bytes == want[k], "{}: {} differs", device.describe(), METHODS[k].name);
        }
    }
}

#[test]
fn threads_ask_at_once_for_what_is_computed_once() {
    for device in devices() {
        let adapters = adapters();
        let calibration = calibration(&device, &adapters);
        let key = calibration.layers().next().unwrap().clone();
        let all = together(|i| {
            let gram = calibration.gram(&key, i % 2).unwrap().unwrap();
            (
                adapters[i % 2].a_sha256(),
                gram.data().to_vec(),
                adapters[i % 2].layers()[0].a().bytes().to_vec(),
            )
        });
        assert!(all[0] == all[2] && all[1] == all[3] && all[0].0 != all[1].0);
    }
}

#[test]
fn cancellation_comes_from_another_thread() {
    for device in devices() {
        let adapters = adapters();
        let weighted = [adapters[0].at(1.0), adapters[1].at(1.0)];
        let method = method("svd", [("rank".to_owned(), 3.into())].into_iter().collect(), None).unwrap();
        let (cancel, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                while rounds.load(Ordering::Relaxed) < 2 {
                    thread::yield_now();
                }
                cancel.store(true, Ordering::Relaxed);
            });
            let merging = |_| {
                loop {
                    let control = Control { cancel: Some(&cancel), progress: None };
                    match method.merge_any(&device, &weighted, control) {
                        Ok(_) => drop(rounds.fetch_add(1, Ordering::Relaxed)),
                        Err(Error::Cancelled) => return,
                        Err(error) => panic!("{error}"),
                    }
                }
            };
            together(merging);
        });
    }
}
