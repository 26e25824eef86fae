//! What the commands say, and where: results on stdout, warnings and progress on stderr.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use loraweld::{Control, Progress};
use serde::Serialize;
use serde_json::{Value, json};

use super::host::{Host, Told};
pub(crate) use crate::words::count;

/// Set by Ctrl-C and SIGTERM: long calls then stop and remove their temporary file.
pub static CANCEL: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Whether something runs that looks at it.
pub static CANCELLABLE: AtomicBool = AtomicBool::new(false);

/// At most this often, progress is an event.
const EVENTS_EVERY: Duration = Duration::from_millis(100);

/// The streams of a command.
pub struct Output {
    json: bool,
    quiet: bool,
    /// Whoever read stdout is gone. The work goes on: a file may be all that was wanted.
    broken: AtomicBool,
    bar: Mutex<Option<ProgressBar>>,
    /// Said so far, for the report.
    warnings: Mutex<Vec<String>>,
    /// Who hears all this, instead of a terminal.
    host: Option<Arc<Host>>,
}

impl Output {
    pub fn new(json: bool, quiet: bool) -> Self {
        let (bar, warnings) = (Mutex::default(), Mutex::default());
        Self { json, quiet, broken: false.into(), bar, warnings, host: None }
    }

    /// Says everything to a host.
    pub fn hosted(host: Arc<Host>) -> Self {
        Self { host: Some(host), ..Self::new(false, false) }
    }

    /// What the command was asked for, in words.
    pub fn result(&self, text: impl Display) -> anyhow::Result<()> {
        if self.json { Ok(()) } else { self.stdout(&format!("{}\n", clean(text))) }
    }

    /// What is nice to know, in words.
    pub fn info(&self, text: impl Display) -> anyhow::Result<()> {
        if self.quiet { Ok(()) } else { self.result(text) }
    }

    /// A JSON line `{"event": name, ...fields}`.
    pub fn event(&self, name: &str, fields: &impl Serialize) -> anyhow::Result<()> {
        if !self.json && self.host.is_none() {
            return Ok(());
        }
        let mut line = json!({ "event": name });
        match (line.as_object_mut(), serde_json::to_value(fields)?) {
            (Some(line), Value::Object(fields)) => line.extend(fields),
            (Some(line), other) => drop(line.insert("value".into(), other)),
            (None, _) => {}
        }
        match &self.host {
            Some(host) => (host.tell)(Told::Event(&line)),
            None => self.stdout(&format!("{line}\n"))?,
        }
        Ok(())
    }

    /// Something that is no failure but may not be what the user wants.
    pub fn warn(&self, text: impl Display) -> anyhow::Result<()> {
        let text = clean(text);
        self.stderr(&format!("warning: {text}\n"));
        self.event("warning", &json!({ "message": text }))?;
        lock(&self.warnings).push(text);
        Ok(())
    }

    /// A part of the work that failed, while the rest goes on.
    pub fn complain(&self, text: impl Display) {
        self.stderr(&format!("error: {}\n", clean(text)));
    }

    /// Every warning so far.
    pub fn warnings(&self) -> Vec<String> {
        lock(&self.warnings).clone()
    }

    /// The last word of a command that failed.
    pub fn error(&self, message: &str, hint: &str) {
        self.stderr(&format!("error: {}\n{hint}", clean(message)));
        // Nothing is left to be done if stdout fails as well.
        let _ = self.event("error", &json!({ "message": message }));
    }

    /// Runs a long call with a progress bar (or events) and a cancellation token.
    pub fn long<T>(&self, call: impl FnOnce(&Control) -> T) -> T {
        if let Some(host) = &self.host {
            let progress = |p: Progress| (host.tell)(Told::Progress(p));
            return call(&Control { progress: Some(&progress), cancel: Some(&host.cancel) });
        }
        let bar = if self.quiet || self.json || !io::stderr().is_terminal() {
            ProgressBar::hidden()
        } else {
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())
        };
        let style = ProgressStyle::with_template("{prefix:9} [{bar:30}] {pos}/{len}  {wide_msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
        *lock(&self.bar) = Some(bar.clone());
        let last = Mutex::new(None::<Instant>);
        let progress = |p: Progress| {
            bar.set_prefix(p.stage);
            bar.set_length(p.total);
            bar.set_position(p.done);
            bar.set_message(p.item.to_owned());
            let mut last = lock(&last);
            if self.json && (p.done == p.total || last.is_none_or(|t| t.elapsed() >= EVENTS_EVERY)) {
                *last = Some(Instant::now());
                let Progress { stage, item, done, total } = p;
                // A broken stdout is reported by the next result.
                let fields = json!({ "stage": stage, "item": item, "done": done, "total": total });
                let _ = self.event("progress", &fields);
            }
        };
        CANCELLABLE.store(true, Ordering::Relaxed);
        let result = call(&Control { progress: Some(&progress), cancel: Some(&CANCEL) });
        CANCELLABLE.store(false, Ordering::Relaxed);
        bar.finish_and_clear();
        *lock(&self.bar) = None;
        result
    }

    fn stdout(&self, text: &str) -> anyhow::Result<()> {
        if let Some(host) = &self.host {
            (host.tell)(Told::Text(text));
            return Ok(());
        }
        if self.broken.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut write = || -> io::Result<()> {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes())?;
            stdout.flush()
        };
        match self.suspended(&mut write) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => self.broken.store(true, Ordering::Relaxed),
            other => other.context("cannot write to stdout")?,
        }
        Ok(())
    }

    fn stderr(&self, text: &str) {
        if self.host.is_some() {
            // Of what goes to stderr, a host hears the event.
            return;
        }
        // Not `eprint!`, which panics if stderr is closed.
        self.suspended(&mut || drop(io::stderr().write_all(text.as_bytes())));
    }

    /// Writes without a progress bar in between.
    fn suspended<T>(&self, write: &mut dyn FnMut() -> T) -> T {
        match &*lock(&self.bar) {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

/// Names and metadata of files may hold anything, but must not steer the terminal.
fn clean(text: impl Display) -> String {
    text.to_string().replace(|c: char| c.is_control() && c != '\n', " ")
}

/// Locks it, also if a thread panicked with it.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A table of text: the first column is aligned left, the others as they are told.
pub struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A heading that starts with `>` aligns its column right.
    pub fn new(headings: &[&str]) -> Self {
        let right = headings.iter().map(|h| h.starts_with('>')).collect();
        let row = headings.iter().map(|h| h.trim_start_matches('>').to_owned()).collect();
        Self { right, rows: vec![row] }
    }

    /// Names of any length may be in a file; no more of a cell is shown than fits on a screen.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(shortened).collect());
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = |i: usize| {
            self.rows.iter().filter_map(|row| row.get(i)).map(|c| c.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.right.len()).map(width).collect();
        for (i, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for ((cell, &width), &right) in row.iter().zip(&widths).zip(&self.right) {
                line += &if right { format!("{cell:>width$}  ") } else { format!("{cell:<width$}  ") };
            }
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// The start and the end of what is very long.
fn shortened(text: String) -> String {
    const MOST: usize = 200;
    let count = text.chars().count();
    if count <= MOST {
        return text;
    }
    let start: String = text.chars().take(MOST / 2).collect();
    let end: String = text.chars().skip(count - MOST / 2 + 1).collect();
    format!("{start}…{end}")
}

/// Bytes, for people.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        _ if bytes < 1 << 20 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ if bytes < 1 << 30 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

/// The first few of a list, and how many more there are.
pub fn some<T: Display>(items: impl IntoIterator<Item = T>, limit: usize) -> String {
    let mut items = items.into_iter();
    let mut text = items.by_ref().take(limit).map(|item| item.to_string()).collect::<Vec<_>>().join(", ");
    match items.count() {
        0 => {}
        more => text += &format!(" and {more} more"),
    }
    text
}

/// As a shell takes it for one word.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/\\._-:+@".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text
    } else if cfg!(windows) {
        format!("\"{text}\"")
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let mut table = Table::new(&["name", ">n"]);
        table.row(["a".into(), "10".into()]);
        table.row(["long".into(), "5".into()]);
        assert_eq!(table.to_string(), "name   n\na     10\nlong   5");
    }

    #[test]
    fn lists_and_sizes() {
        assert_eq!(some(["a", "b", "c"], 2), "a, b and 1 more");
        assert_eq!(some(["a", "b"], 2), "a, b");
        assert_eq!(
            (size(12), size(1536), size(3 << 30)),
            ("12 B".into(), "1.5 KiB".into(), "3.0 GiB".into())
        );
    }

    #[test]
    fn names_of_any_length_fit_into_a_table() {
        let mut table = Table::new(&["module", ">rank"]);
        table.row(["x".repeat(1 << 17) + "é.7", "8".to_owned()].map(String::from));
        let text = table.to_string();
        assert!(
            text.contains("xxx…xxx") && text.contains("é.7") && text.ends_with(" 8") && text.len() < 1000,
            "{text}"
        );
    }
}
