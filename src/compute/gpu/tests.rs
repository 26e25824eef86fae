//! A device that is lost, or has no memory, at any allocation of a merge: an error that says so, or the right result; never
//! a panic, and never numbers that mean nothing.

use std::sync::atomic::Ordering;

use crate::compute::memory::fault::What;
use crate::merge::{VERIFIED, verify};
use crate::{
    Adapter, Control, Device, DeviceOptions, EntryMerge, Error, Format, Layer, Matrix, Method, NpLora,
    SaveOptions, Select, Ssr, SvdMerge, Ties, Truncation,
};

/// Every so many allocations; all of them with this in the environment.
const ALL: &str = "LORAWELD_TEST_ALL_ALLOCATIONS";

fn open(options: DeviceOptions) -> Option<Device> {
    match Device::open(&DeviceOptions { select: Select::Gpu, ..options }) {
        Ok(device) => Some(device),
        Err(_) if std::env::var_os("LORAWELD_ALLOW_NO_GPU").is_some() => None,
        Err(error) => panic!("{error}; set LORAWELD_ALLOW_NO_GPU to accept that no GPU is tested"),
    }
}

fn adapter(seed: u32) -> Adapter {
    let mut state = seed;
    let mut matrix = |rows, cols| {
        Matrix::from_fn(rows, cols, |_, _| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        })
    };
    let mut layer = |name: &str| Layer::new(name, matrix(4, 40), matrix(33, 4)).unwrap();
    Adapter::new(format!("{seed}"), Format::Peft, ["x.0", "x.1"].map(&mut layer).to_vec()).unwrap()
}

fn methods() -> Vec<Box<dyn Method>> {
    vec![
        Box::new(SvdMerge::new(Truncation::rank(5))),
        Box::new(NpLora::soft(0.5)),
        Box::new(Ssr::data_free()),
        Box::new(EntryMerge::ties(Ties::default()).rank(6)),
    ]
}

#[test]
fn an_allocation_fails_or_loses_the_device() {
    let cache = tempfile::tempdir().unwrap();
    let open = || {
        let pipeline_cache = Some(cache.path().to_owned());
        open(DeviceOptions { pipeline_cache, ..Default::default() })
    };
    let adapters = [adapter(1), adapter(2)];
    let with = [adapters[0].at(1.0), adapters[1].at(-0.6)];
    let every = if std::env::var_os(ALL).is_some() { 1 } else { 7 };
    for (number, method) in methods().iter().enumerate() {
        let Some(device) = open() else { return };
        let run = |device: &Device| {
            let merged = method.merge_any(device, &with, Control::default())?.adapter;
            // What comes out is right, or it does not come out.
            let options = SaveOptions::default();
            verify(&**method, &with, &merged, Truncation::default(), &options, 2, &Control::default())
        };
        let fault = |device: &Device| device.gpu().unwrap().meter.clone();
        // Buffers that the first run leaves are the second's.
        run(&device).unwrap();
        let meter = fault(&device);
        for at in 0.. {
            // A budget of nothing in the pool: everything is allocated again.
            device.gpu().unwrap().evict(0, u64::MAX);
            let first = meter.fault.count.load(Ordering::SeqCst);
            *meter.fault.at.lock().unwrap() = Some((first + at, What::Refused));
            let result = run(&device);
            *meter.fault.at.lock().unwrap() = None;
            let end = meter.fault.count.load(Ordering::SeqCst);
            match result {
                Ok(verified) => assert!(verified.worst <= VERIFIED, "method {number}, allocation {at}"),
                Err(Error::Device(text)) => assert!(text.contains("memory"), "{text}"),
                Err(error) => panic!("method {number}, allocation {at}: {error}"),
            }
            if first + at >= end {
                break;
            }
        }
        assert!(
            run(&device).is_ok(),
            "method {number}: a device that was refused memory is of no use any more"
        );

        let mut lost = 0;
        for at in (number % every..).step_by(every) {
            let Some(device) = open() else { return };
            let meter = fault(&device);
            let first = meter.fault.count.load(Ordering::SeqCst);
            let destroyed = What::Destroyed(device.wgpu().unwrap().0.clone());
            *meter.fault.at.lock().unwrap() = Some((first + at, destroyed));
            let result = run(&device);
            let was_lost = meter.fault.count.load(Ordering::SeqCst) > first + at;
            match result {
                Ok(_) => {}
                Err(Error::Device(_)) if was_lost => lost += 1,
                Err(error) => panic!("method {number}, allocation {at}: {error}"),
            }
            if !was_lost {
                break;
            }
        }
        assert!(lost > 0, "method {number}: the device was never lost");
    }
}

#[test]
fn the_pool_frees_what_waited_longest() {
    let options = DeviceOptions { memory: Some(256 << 20), ..Default::default() };
    let Some(device) = open(options) else { return };
    let gpu = device.gpu().unwrap();
    let sizes = || gpu.pool.lock().unwrap().iter().map(|buffer| buffer.size() >> 20).collect::<Vec<_>>();
    gpu.evict(u64::MAX / 2, 0);
    assert!(sizes().is_empty());
    // The pool has room for 64 MiB.
    let all = [6, 12, 24].map(|size| gpu.scratch(size << 20).unwrap());
    drop(all);
    assert_eq!(sizes(), [6, 12, 24]);
    drop(gpu.scratch(6 << 20).unwrap());
    assert_eq!(sizes(), [12, 24, 6], "what was used last is freed last");
    drop(gpu.scratch(32 << 20).unwrap());
    assert_eq!(sizes(), [24, 6, 32], "what waited longest made room");
}
