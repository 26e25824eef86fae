//! Commands within another program's process, such as Python's: what it lends them, and what it hears of them.

use std::cell::RefCell;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use loraweld::compute::{Device, DeviceOptions};
use loraweld::{Adapter, Calibration, OpenOptions, Progress};
use serde_json::Value;

/// What a program lends a command, in place of files and of a terminal.
pub struct Host {
    /// Adapters that are open already, by the paths that stand for them in the arguments.
    pub adapters: Vec<(PathBuf, Lent)>,
    /// Calibrations in memory, in the same way.
    pub calibrations: Vec<(PathBuf, Arc<Calibration>)>,
    /// Opens devices, which a program may keep for later calls.
    pub device: fn(&DeviceOptions) -> loraweld::Result<Device>,
    /// Hears what the command says.
    pub tell: Box<dyn Fn(Told<'_>) + Send + Sync>,
    /// Set to true, it ends long calls.
    pub cancel: Arc<AtomicBool>,
}

/// Gives an adapter, read with these options as far as those of its own leave them open.
pub type Lent = Box<dyn Fn(&OpenOptions) -> loraweld::Result<Adapter> + Send + Sync>;

/// What a command says.
pub enum Told<'a> {
    /// What it says with `--json`: an object with its name in `event`.
    Event(&'a Value),
    /// What it says without.
    Text(&'a str),
    /// How far a long call is.
    Progress(Progress<'a>),
}

/// Why a command failed.
#[derive(Debug)]
pub struct Failure {
    /// What was wrong, where, and what would be right.
    pub message: String,
    /// Whether the arguments do not fit together.
    pub usage: bool,
    error: Option<anyhow::Error>,
}

impl Failure {
    pub(super) fn new(message: String, usage: bool, error: anyhow::Error) -> Self {
        Self { message, usage, error: Some(error) }
    }

    pub(super) fn usage(message: String) -> Self {
        Self { message, usage: true, error: None }
    }

    /// What was wrong, and which option of the command line helps.
    pub(super) fn advice(&self) -> String {
        let remedy = self.cause().and_then(super::remedy);
        remedy.map_or_else(|| self.message.clone(), |remedy| format!("{}; {remedy}", self.message))
    }

    /// The cause of this type, if it has one.
    pub fn cause<E: std::error::Error + Send + Sync + 'static>(&self) -> Option<&E> {
        self.error.as_ref()?.chain().find_map(|cause| cause.downcast_ref())
    }
}

thread_local! {
    static HOST: RefCell<Option<Hosted>> = const { RefCell::new(None) };
}

/// A host, and the words of the command that runs for it.
type Hosted = (Arc<Host>, Vec<OsString>);

/// Runs a command of these words on this thread for a host.
pub(super) fn with<T>(host: &Arc<Host>, words: Vec<OsString>, run: impl FnOnce() -> T) -> T {
    struct Reset(Option<Hosted>);
    impl Drop for Reset {
        fn drop(&mut self) {
            HOST.set(self.0.take());
        }
    }
    let _reset = Reset(HOST.replace(Some((host.clone(), words))));
    run()
}

fn host() -> Option<Arc<Host>> {
    HOST.with_borrow(|hosted| hosted.as_ref().map(|(host, _)| host.clone()))
}

/// The words of the program, as those who run it say them. Run by an interpreter it has others.
static PROGRAM: OnceLock<Vec<OsString>> = OnceLock::new();

/// Takes down the words of the program.
pub(super) fn said(words: &[OsString]) {
    PROGRAM.get_or_init(|| words.to_vec());
}

/// The words of the command that runs, the program's name first.
pub(super) fn words() -> Vec<OsString> {
    let hosted = HOST.with_borrow(|hosted| hosted.as_ref().map(|(_, words)| words.clone()));
    hosted.or_else(|| PROGRAM.get().cloned()).unwrap_or_else(|| vec!["loraweld".into()])
}

/// Opens an adapter, or takes the host's.
pub(super) fn adapter(path: &Path, options: &OpenOptions) -> loraweld::Result<Adapter> {
    let host = host();
    let lent = host.iter().flat_map(|host| &host.adapters).find(|(name, _)| name == path);
    match lent {
        Some((_, open)) => open(options),
        None => Adapter::open_with(path, options),
    }
}

/// Opens a calibration, or takes the host's.
pub(super) fn calibration(path: impl AsRef<Path>) -> loraweld::Result<Arc<Calibration>> {
    let host = host();
    let lent = host.iter().flat_map(|host| &host.calibrations).find(|(name, _)| name == path.as_ref());
    match lent {
        Some((_, calibration)) => Ok(calibration.clone()),
        None => Calibration::open(path).map(Arc::new),
    }
}

/// What ends long calls of the host's.
pub(super) fn cancel() -> Option<Arc<AtomicBool>> {
    host().map(|host| host.cancel.clone())
}

/// Opens a device, or takes the host's.
pub(super) fn device(options: &DeviceOptions) -> loraweld::Result<Device> {
    host().map_or(Device::open as fn(&DeviceOptions) -> _, |host| host.device)(options)
}
