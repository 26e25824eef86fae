//! What is done with a string of random bytes: calls of the C interface, in any order, over handles that live and die in any
//! order. Handles are valid or NULL, as the header asks for; texts, numbers and files are anything.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use arbitrary::{Result, Unstructured};
use loraweld::{Adapter, Format, Layer, Matrix, SaveOptions};
use loraweld_c::*;

/// The layers and widths of the adapters.
const LAYERS: [(&str, usize, usize); 3] = [
    ("transformer_blocks.0.attn.to_q", 6, 4),
    ("transformer_blocks.0.attn.to_k", 6, 4),
    ("blocks.1.ff", 5, 7),
];

/// Miri knows no renaming that leaves alone what is there.
const OVERWRITES: bool = cfg!(miri);

/// A folder with files that calls may name.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER.get_or_init(make).path()
}

fn make() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let values = |rows, cols, seed: usize| {
        Matrix::from_fn(rows, cols, |i, j| ((seed + 7 * i + 3 * j) % 11) as f32 / 4.0 - 1.0)
    };
    for (seed, name) in ["a", "b", "c"].iter().enumerate() {
        // One of them lacks a layer, and ranks differ.
        let layers = LAYERS[seed % 2..].iter().map(|(module, input, output)| {
            let module = format!("transformer.{module}");
            Layer::new(&module, values(seed + 1, *input, seed), values(*output, seed + 1, seed + 5))
        });
        let layers = layers.collect::<loraweld::Result<_>>().expect("layers");
        let adapter = Adapter::new(*name, Format::Peft, layers).expect("an adapter");
        let options = SaveOptions { overwrite: OVERWRITES, ..Default::default() };
        adapter.save(folder.path().join(name), &options).expect("it is written");
    }
    let whole = std::fs::read(folder.path().join("a")).expect("it");
    std::fs::write(folder.path().join("torn"), &whole[..whole.len() / 2]).expect("a file");
    std::fs::write(folder.path().join("empty"), []).expect("a file");
    folder
}

/// Handles of one kind, which are freed at the end.
struct Handles<T>(Vec<*mut T>, unsafe extern "C" fn(*mut T));

impl<T> Handles<T> {
    fn new(free: unsafe extern "C" fn(*mut T)) -> Self {
        Self(Vec::new(), free)
    }

    /// One of them, or now and then NULL.
    fn any(&self, u: &mut Unstructured<'_>) -> Result<*mut T> {
        if self.0.is_empty() || u.ratio(1u8, 24)? {
            return Ok(null_mut());
        }
        Ok(*u.choose(&self.0)?)
    }

    /// Keeps what a call gave: a handle if it succeeded, and else NULL.
    fn keep(&mut self, status: LoraweldStatus, handle: *mut T) {
        assert_eq!(status == LoraweldStatus::Ok, !handle.is_null());
        self.0.extend((!handle.is_null()).then_some(handle));
    }

    /// Frees one of them.
    fn free(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        if !self.0.is_empty() {
            let handle = self.0.swap_remove(u.choose_index(self.0.len())?);
            // SAFETY: the library made it, and it is in the list no more.
            unsafe { (self.1)(handle) };
        }
        Ok(())
    }
}

impl<T> Drop for Handles<T> {
    fn drop(&mut self) {
        // SAFETY: the library made them, and none was freed.
        self.0.drain(..).for_each(|handle| unsafe { (self.1)(handle) });
    }
}

/// A text or NULL.
struct Text(Option<CString>);

impl Text {
    /// One of these, or now and then another one or NULL.
    fn of(u: &mut Unstructured<'_>, usual: &[&str]) -> Result<Self> {
        Ok(match u.int_in_range(0..=24u8)? {
            0 => Self(None),
            1 => {
                let bytes: Vec<u8> = u.arbitrary::<[u8; 12]>()?.into_iter().filter(|b| *b != 0).collect();
                Self(CString::new(bytes).ok())
            }
            _ => Self(CString::new(*u.choose(usual)?).ok()),
        })
    }

    /// The path of one of these files, or now and then NULL.
    fn path(u: &mut Unstructured<'_>, names: &[&str]) -> Result<Self> {
        let Some(name) =
            Self::of(u, names)?.0.filter(|name| names.iter().any(|n| n.as_bytes() == name.as_bytes()))
        else {
            return Ok(Self(None));
        };
        let mut path = folder().as_os_str().as_encoded_bytes().to_vec();
        path.push(b'/');
        path.extend(name.as_bytes());
        Ok(Self(CString::new(path).ok()))
    }

    fn pointer(&self) -> *const c_char {
        self.0.as_ref().map_or(null(), |text| text.as_ptr())
    }
}

const INPUTS: [&str; 8] = ["a", "b", "c", "torn", "empty", "out", "sum", "none"];
const METHODS: [&str; 12] = [
    "linear",
    "svd",
    "ties",
    "dare",
    "ssr",
    "ssr-data-free",
    "np-lora",
    "tsv",
    "iso-c",
    "knots",
    "core",
    "magic",
];
const OPTIONS: [&str; 10] = [
    "{}",
    "{\"rank\": 3}",
    "{\"rank\": 0}",
    "{\"density\": 0.5, \"rank\": 2}",
    "{\"density\": 1e300}",
    "{\"truncate\": {\"rank\": 2}}",
    "{\"budget\": {\"ranks\": 5}, \"truncate_by\": \"norm\"}",
    "{\"calibrate_singular_values\": true}",
    "[",
    "{\"truncate\": {\"spectrum\": {\"frobenius\": 0.5}}, \"truncate_by\": \"data\"}",
];

/// What a progress callback gets: how often it was called, and the token that it sets then.
struct Watch {
    calls: u64,
    at: u64,
    token: *const LoraweldCancel,
}

unsafe extern "C" fn watch(user: *mut c_void, progress: *const LoraweldProgress) {
    // SAFETY: `user` is the `Watch` of the call that is under way, and progress is valid during the callback.
    let (watch, progress) = unsafe { (&mut *user.cast::<Watch>(), &*progress) };
    assert!(progress.done <= progress.total);
    watch.calls += 1;
    if watch.calls == watch.at {
        // SAFETY: a token that lives, or NULL.
        unsafe { loraweld_cancel_set(watch.token) };
    }
}

/// Makes calls until the bytes run out; gives how many succeeded.
pub fn calls(u: &mut Unstructured<'_>) -> Result<usize> {
    let mut devices = Handles::new(loraweld_device_free);
    let mut adapters = Handles::new(loraweld_adapter_free);
    let mut calibrations = Handles::new(loraweld_calibration_free);
    let mut tokens = Handles::new(loraweld_cancel_free);
    let mut merges = Handles::new(loraweld_merged_free);
    let mut done = 0;
    // What earlier calls wrote would make these depend on them.
    ["out", "sum"].iter().for_each(|name| drop(std::fs::remove_file(folder().join(name))));
    let (mut device, mut token) = (null_mut(), null_mut());
    // SAFETY: here and below, pointers are NULL or to what lives during the call; handles are those in the lists.
    unsafe {
        devices.keep(loraweld_device_open(c"cpu".as_ptr(), null(), 0, &mut device), device);
        tokens.keep(loraweld_cancel_new(&mut token), token);
    }
    for name in [c"a", c"b"].map(CStr::to_bytes) {
        let path = [folder().as_os_str().as_encoded_bytes(), b"/", name].concat();
        let path = CString::new(path).expect("a path");
        let mut adapter = null_mut();
        // SAFETY: as above.
        adapters.keep(unsafe { loraweld_adapter_open(path.as_ptr(), &mut adapter) }, adapter);
    }
    for _ in 0..24 {
        if u.is_empty() {
            break;
        }
        let mut pool = Vec::new();
        for _ in 0..u.int_in_range(0..=3usize)? {
            pool.push(adapters.any(u)?.cast_const());
        }
        let mut seen = Watch { calls: 0, at: u.int_in_range(0..=20)?, token: tokens.any(u)? };
        let control = LoraweldControl {
            progress: u.arbitrary::<bool>()?.then_some(watch as _),
            user: (&raw mut seen).cast(),
            cancel: seen.token,
        };
        let control = if u.arbitrary()? { &raw const control } else { null() };
        // SAFETY: as above.
        let status = unsafe {
            match u.int_in_range(0..=21u8)? {
                0 | 1 => {
                    let (path, mut adapter) = (Text::path(u, &INPUTS)?, null_mut());
                    let status = loraweld_adapter_open(path.pointer(), &mut adapter);
                    adapters.keep(status, adapter);
                    status
                }
                2 => {
                    let adapter = adapters.any(u)?;
                    let name = loraweld_adapter_name(adapter);
                    assert_eq!(name.is_null(), adapter.is_null());
                    let count = loraweld_adapter_layer_count(adapter);
                    let mut layer = std::mem::MaybeUninit::<LoraweldLayer>::uninit();
                    let index = u.int_in_range(0..=count)?;
                    let status = loraweld_adapter_layer(adapter, index, layer.as_mut_ptr());
                    assert_eq!(status == LoraweldStatus::Ok, index < count);
                    if status == LoraweldStatus::Ok {
                        let layer = layer.assume_init();
                        assert!(!CStr::from_ptr(layer.name).is_empty() && layer.rank > 0 && layer.input > 0);
                    }
                    status
                }
                3 => {
                    let (dtype, format) = (
                        Text::of(u, &["f32", "f16", "bf16"])?,
                        Text::of(u, &["peft", "kohya", "comfyui", "bfl", "xlabs"])?,
                    );
                    let overwrite = u.arbitrary()? || OVERWRITES;
                    let options =
                        LoraweldSaveOptions { dtype: dtype.pointer(), format: format.pointer(), overwrite };
                    let options = if u.arbitrary()? { &raw const options } else { null() };
                    let path = Text::path(u, &["out"])?;
                    loraweld_adapter_save(adapters.any(u)?, path.pointer(), options)
                }
                4 => {
                    let mut calibration = null_mut();
                    let status = loraweld_calibration_new(pool.as_ptr(), pool.len(), &mut calibration);
                    calibrations.keep(status, calibration);
                    status
                }
                5..=8 => {
                    let (name, width, _) = *u.choose(&LAYERS)?;
                    let width = if u.ratio(1u8, 8)? { u.int_in_range(0..=8)? } else { width };
                    let rows = u.int_in_range(0..=4usize)?;
                    let values = vec![u.arbitrary::<u8>()? & 0x3f; 4 * rows * width];
                    let (dtype, layer) = (Text::of(u, &["f32", "f16", "bf16"])?, Text::of(u, &[name])?);
                    let matrix = LoraweldMatrix {
                        dtype: dtype.pointer(),
                        rows,
                        cols: width,
                        values: values.as_ptr().cast(),
                    };
                    let task = *u.choose(&[0, 1, 2, usize::MAX])?;
                    let calibration = calibrations.any(u)?;
                    let device = devices.any(u)?;
                    loraweld_calibration_accumulate(calibration, device, task, layer.pointer(), &matrix)
                }
                9 => {
                    let path = Text::path(u, &INPUTS)?;
                    let (calibration, device) = (calibrations.any(u)?, devices.any(u)?);
                    let task = *u.choose(&[0, 1, 2, usize::MAX])?;
                    loraweld_calibration_accumulate_file(calibration, device, task, path.pointer(), control)
                }
                10 => {
                    let path = Text::path(u, &["sum"])?;
                    let overwrite = u.arbitrary()? || OVERWRITES;
                    loraweld_calibration_save(calibrations.any(u)?, path.pointer(), overwrite)
                }
                11 => {
                    let (path, mut calibration) = (Text::path(u, &INPUTS)?, null_mut());
                    let status = loraweld_calibration_open(path.pointer(), &mut calibration);
                    calibrations.keep(status, calibration);
                    status
                }
                12..=15 => {
                    let (method, options) = (Text::of(u, &METHODS)?, Text::of(u, &OPTIONS)?);
                    let strengths = [u.arbitrary::<f64>()?, 1.0, -0.5, 0.0];
                    let strengths = if u.arbitrary()? { strengths.as_ptr() } else { null() };
                    let calibration = if u.arbitrary()? { calibrations.any(u)? } else { null_mut() };
                    let mut merged = null_mut();
                    let status = loraweld_merge(
                        devices.any(u)?,
                        method.pointer(),
                        options.pointer(),
                        pool.as_ptr(),
                        strengths,
                        pool.len(),
                        calibration,
                        control,
                        &mut merged,
                    );
                    merges.keep(status, merged);
                    status
                }
                16 => {
                    let merged = merges.any(u)?;
                    let report = loraweld_merged_report(merged);
                    assert_eq!(report.is_null(), merged.is_null());
                    if !report.is_null() {
                        let json = CStr::from_ptr(report).to_str().expect("UTF-8");
                        serde_json::from_str::<serde_json::Value>(json).expect("JSON");
                    }
                    let mut adapter = null_mut();
                    let status = loraweld_merged_adapter(merged, &mut adapter);
                    adapters.keep(status, adapter);
                    status
                }
                17 => {
                    let token = tokens.any(u)?;
                    match u.arbitrary()? {
                        true => loraweld_cancel_set(token),
                        false => loraweld_cancel_reset(token),
                    }
                    LoraweldStatus::Ok
                }
                18 => {
                    let mut token = null_mut();
                    let status = loraweld_cancel_new(&mut token);
                    tokens.keep(status, token);
                    status
                }
                19 => {
                    let (select, precision) =
                        (Text::of(u, &["cpu"])?, Text::of(u, &["auto", "fast", "f64", "double-single"])?);
                    // What opens a GPU takes long, and is tested elsewhere.
                    let select = Text(select.0.filter(|text| text.as_bytes() == b"cpu"));
                    if select.0.is_none() {
                        continue;
                    }
                    let mut device = null_mut();
                    let memory = u.arbitrary()?;
                    let status =
                        loraweld_device_open(select.pointer(), precision.pointer(), memory, &mut device);
                    devices.keep(status, device);
                    status
                }
                20 => {
                    assert!(!CStr::from_ptr(loraweld_last_error()).to_bytes().contains(&b'\n'));
                    LoraweldStatus::Ok
                }
                _ => {
                    match u.int_in_range(0..=4u8)? {
                        0 => devices.free(u)?,
                        1 => adapters.free(u)?,
                        2 => calibrations.free(u)?,
                        3 => tokens.free(u)?,
                        _ => merges.free(u)?,
                    }
                    LoraweldStatus::Ok
                }
            }
        };
        done += usize::from(status == LoraweldStatus::Ok);
        if status != LoraweldStatus::Ok {
            // SAFETY: it belongs to the library, and is valid until the next failure.
            let message = unsafe { CStr::from_ptr(loraweld_last_error()) }.to_string_lossy();
            assert!(status != LoraweldStatus::Internal && !message.is_empty(), "{status:?}: {message}");
        }
    }
    Ok(done)
}
