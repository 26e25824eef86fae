//! loraweld in a browser: the command line, run by the page's worker on files that the page lends.
//!
//! The page says everything as arguments, and hears everything as events and text, so that a merge in a browser is the
//! command line's, in its words. `docs/web.md` tells how near its numbers are.
#![cfg(target_arch = "wasm32")]
#![expect(deprecated, reason = "JSPI is experimental, and there is no other way to wait in a browser")]

mod files;

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use js_sys::Function;
use loraweld::cli::{self, Failure, Host, Told, run_for};
use loraweld::compute::{Device, DeviceOptions, shaders};
use loraweld::merge::METHODS;
use serde_json::{Value, json};
use wasm_bindgen::prelude::*;

pub use files::{forget, give_room, lend, take};

thread_local! {
    /// Hears what a command says: what kind of message it is, and the message.
    static TELL: RefCell<Option<Function>> = const { RefCell::new(None) };
    /// The device that was opened last, and how: opening one takes seconds.
    static DEVICE: RefCell<Option<(DeviceOptions, Device)>> = const { RefCell::new(None) };
}

fn tell(kind: &str, message: &str) {
    let listener = TELL.with_borrow(Clone::clone);
    if let Some(listener) = listener {
        // A listener that fails has nobody to say so to.
        let _ = listener.call2(&JsValue::NULL, &kind.into(), &message.into());
    }
}

/// Sets who hears what commands say. A panic is told too, before it ends the program.
#[wasm_bindgen]
pub fn listen(listener: Function) {
    TELL.set(Some(listener));
    std::panic::set_hook(Box::new(|panic| tell("panic", &panic.to_string())));
}

/// Runs a command, whose name is the first argument, and tells what became of it.
///
/// On a GPU, it is suspended whenever it waits for one; on the CPU, it never is.
#[wasm_bindgen(jspi)]
pub fn run(args: Vec<String>) {
    let host = Host {
        adapters: Vec::new(),
        calibrations: Vec::new(),
        device: open_device,
        tell: Box::new(|told| match told {
            Told::Event(event) => tell("event", &event.to_string()),
            Told::Text(text) => tell("text", text),
            Told::Progress(p) => {
                let place = json!({ "stage": p.stage, "item": p.item, "done": p.done, "total": p.total });
                tell("progress", &place.to_string());
            }
        }),
        cancel: Arc::new(AtomicBool::new(false)),
    };
    let args = std::iter::once("loraweld".to_owned()).chain(args);
    match run_for(&Arc::new(host), args) {
        Ok(()) => tell("done", ""),
        Err(failure) => {
            // The device may be what failed.
            DEVICE.set(None);
            tell("failed", &text(&failure));
        }
    }
}

/// The message, and the option that helps, as the command line has them.
fn text(failure: &Failure) -> String {
    match failure.cause::<loraweld::Error>().and_then(cli::remedy) {
        Some(remedy) => format!("{}; {remedy}", failure.message),
        None => failure.message.clone(),
    }
}

fn open_device(options: &DeviceOptions) -> loraweld::Result<Device> {
    let same = |(of, device): &(DeviceOptions, Device)| {
        let fits =
            (&of.select, of.precision, of.memory) == (&options.select, options.precision, options.memory);
        fits.then(|| device.clone())
    };
    if let Some(device) = DEVICE.with_borrow(|kept| kept.as_ref().and_then(same)) {
        return Ok(device);
    }
    let device = Device::open(options)?;
    DEVICE.set(Some((options.clone(), device.clone())));
    Ok(device)
}

/// The methods, as JSON: the name of each, what it does, and whether it needs a calibration or a style.
#[wasm_bindgen]
pub fn methods() -> String {
    let commands = cli::command();
    let merge = commands.find_subcommand("merge");
    let takes = |name: &str, option: &str| {
        let command = merge.and_then(|merge| merge.find_subcommand(name));
        command.and_then(|command| command.get_arguments().find(|arg| arg.get_id() == option)).cloned()
    };
    let method = |name: &str, summary: &str| {
        let calibration = takes(name, "calibration").is_some_and(|arg| arg.is_required_set());
        let style = takes(name, "style").is_some();
        json!({ "name": name, "summary": summary, "calibration": calibration, "style": style })
    };
    METHODS.iter().map(|entry| method(entry.name, entry.summary)).collect::<Value>().to_string()
}

/// Every kernel, as JSON: its name and its source.
#[wasm_bindgen]
pub fn kernels() -> String {
    let kernels = shaders::declared().into_iter().flat_map(|declared| declared.kernels);
    kernels.map(|k| json!({ "name": k.label(), "source": k.source() })).collect::<Value>().to_string()
}

/// The version of the crate.
#[wasm_bindgen]
pub fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}
