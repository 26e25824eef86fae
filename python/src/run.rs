//! Commands on a thread of their own, so that Python hears of progress and of Ctrl-C meanwhile.

use std::any::Any;
use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use loraweld::Control;
use loraweld::cli::{Failure, Host, Told, kept, run_for};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::adapter::Adapter;
use crate::calibration::Calibration;
use crate::error::Raised;

/// How often Python is asked whether a signal came.
const EVERY: Duration = Duration::from_millis(20);

/// How long a call that was ended waits for its thread; a layer may take longer.
const PATIENCE: Duration = Duration::from_millis(50);

/// How long the end of the program waits for threads that were ended.
const AT_EXIT: Duration = Duration::from_secs(10);

struct Work {
    thread: JoinHandle<()>,
    cancel: Arc<AtomicBool>,
}

/// Threads whose calls did not wait for them.
static LEFT: Mutex<Vec<Work>> = Mutex::new(Vec::new());

enum Message {
    Event(String),
    Text(String),
    Progress { stage: &'static str, item: String, done: u64, total: u64 },
    Done(Result<(), Ended>),
}

enum Ended {
    Failed(Failure),
    Panicked(String),
}

/// Runs a command with adapters and calibrations that stand for paths of it, and gives its events as JSON, and its words.
#[pyfunction]
pub fn run(
    py: Python<'_>,
    args: Vec<OsString>,
    adapters: Vec<(PathBuf, Py<Adapter>)>,
    calibrations: Vec<(PathBuf, Py<Calibration>)>,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Vec<String>, String)> {
    let cancel = Arc::new(AtomicBool::new(false));
    let (send, mut receive) = channel();
    let wants_progress = progress.is_some();
    let tell = send.clone();
    let host = Host {
        adapters: adapters.into_iter().map(|(path, adapter)| (path, adapter.get().lent())).collect(),
        calibrations: calibrations
            .into_iter()
            .map(|(path, calibration)| Ok((path, calibration.get().shared()?)))
            .collect::<PyResult<_>>()?,
        device: kept::open,
        tell: Box::new(move |told| {
            let message = match told {
                Told::Event(event) => Message::Event(event.to_string()),
                Told::Text(text) => Message::Text(text.to_owned()),
                Told::Progress(_) if !wants_progress => return,
                Told::Progress(p) => Message::Progress {
                    stage: p.stage,
                    item: p.item.to_owned(),
                    done: p.done,
                    total: p.total,
                },
            };
            // Nobody listens any more to a call that was ended.
            let _ = tell.send(message);
        }),
        cancel: cancel.clone(),
    };
    let thread = std::thread::Builder::new()
        .name("loraweld".into())
        .spawn(move || work(Arc::new(host), args, &send))
        .map_err(|e| PyRuntimeError::new_err(format!("cannot start a thread: {e}")))?;
    let work = Work { thread, cancel };
    let (mut events, mut text) = (Vec::new(), String::new());
    let listened = listen(py, &mut receive, &mut events, &mut text, progress.as_ref());
    match listened {
        Ok(result) => {
            // It has nothing left to do but to end.
            let _ = py.detach(|| work.thread.join());
            match result {
                Ok(()) => Ok((events, text)),
                Err(Ended::Failed(failure)) => Err(Raised::from(failure).into()),
                Err(Ended::Panicked(what)) => {
                    Err(PyRuntimeError::new_err(format!("internal error: {what}; please report it")))
                }
            }
        }
        Err(error) => {
            work.cancel.store(true, Ordering::Relaxed);
            py.detach(|| leave(work));
            Err(error)
        }
    }
}

fn work(host: Arc<Host>, args: Vec<OsString>, send: &Sender<Message>) {
    let args = [OsString::from("loraweld")].into_iter().chain(args);
    let result = catch_unwind(AssertUnwindSafe(|| run_for(&host, args)));
    // What it borrowed goes before the call returns.
    drop(host);
    let result = match result {
        Ok(result) => result.map_err(Ended::Failed),
        Err(panic) => Err(Ended::Panicked(text_of(&*panic))),
    };
    let _ = send.send(Message::Done(result));
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic").to_owned()
}

/// Hears what a command says until it is done, and lets Python do what it has to in between.
fn listen(
    py: Python<'_>,
    receive: &mut Receiver<Message>,
    events: &mut Vec<String>,
    text: &mut String,
    progress: Option<&Py<PyAny>>,
) -> PyResult<Result<(), Ended>> {
    let mut asked = Instant::now();
    loop {
        // A receiver may be lent to one thread at a time.
        let receive = &mut *receive;
        let message = py.detach(move || receive.recv_timeout(EVERY));
        if asked.elapsed() >= EVERY {
            py.check_signals()?;
            asked = Instant::now();
        }
        match message {
            Ok(Message::Event(event)) => events.push(event),
            Ok(Message::Text(line)) => text.push_str(&line),
            Ok(Message::Progress { stage, item, done, total }) => {
                if let Some(progress) = progress {
                    progress.call1(py, (stage, item, done, total))?;
                }
            }
            Ok(Message::Done(result)) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Ok(Err(Ended::Panicked("a thread ended without a word".into())));
            }
        }
    }
}

/// Waits a little for a thread that was told to end.
fn leave(work: Work) {
    let until = Instant::now() + PATIENCE;
    while !work.thread.is_finished() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    left.retain(|work| !work.thread.is_finished());
    if !work.thread.is_finished() {
        left.push(work);
    }
}

/// Runs a long call on a thread of its own, and ends it when Ctrl-C is pressed.
pub fn interruptible<T: Send>(py: Python<'_>, call: impl FnOnce(Control<'_>) -> T + Send) -> PyResult<T> {
    let cancel = AtomicBool::new(false);
    py.detach(|| {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| call(Control { progress: None, cancel: Some(&cancel) }));
            let mut signal = Ok(());
            let mut pause = Duration::from_millis(1);
            while !thread.is_finished() {
                std::thread::sleep(pause);
                pause = EVERY.min(2 * pause);
                if signal.is_ok() {
                    signal = Python::attach(|py| py.check_signals());
                    cancel.store(signal.is_err(), Ordering::Relaxed);
                }
            }
            let result = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            signal.map(|()| result)
        })
    })
}

/// At the end of the program: ends what still runs, removes its temporary files, and closes the device.
#[pyfunction]
pub fn shut_down(py: Python<'_>) {
    py.detach(|| {
        let left = std::mem::take(&mut *LEFT.lock().unwrap_or_else(PoisonError::into_inner));
        let until = Instant::now() + AT_EXIT;
        for work in left {
            work.cancel.store(true, Ordering::Relaxed);
            while !work.thread.is_finished() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        loraweld::adapter::remove_temporary_files();
        kept::close();
    });
}
