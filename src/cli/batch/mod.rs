//! `loraweld batch`

mod job;
mod ledger;
mod shard;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use clap::Args;
use loraweld::compute::Precision;
use loraweld::{Control, Error, Progress};
use serde_json::{Value, json};
use web_time::Instant;

use self::job::{Axis, BadLine, Job};
use self::ledger::{Entry, Hashes, Ledger, Written};
use self::shard::Shard;
use super::args::Global;
use super::host::{self, Host, Told};
use super::kept;
use super::output::{CANCEL, Output, count, lock, quoted, some};
use super::run_for;

/// Run many commands, one a line of a file, on one machine or as a shard of many.
#[derive(Args, Debug)]
#[command(after_help = "\
A line is the words of a command as JSON: a string, which is split as a shell splits it, or a list of words; or an object
with such words in `run` and a grid in `grid`:

  \"merge linear cat.safetensors:0.7 dog.safetensors -o pets.safetensors\"
  [\"resize\", \"cat.safetensors\", \"--rank\", \"16\", \"-o\", \"cat-16.safetensors\"]
  {\"run\": \"merge ties cat.safetensors:{s} dog.safetensors -o ties-{s}.safetensors\", \"grid\": {\"s\": \".4:1:.2\"}}

Paths are seen from the folder that the batch is run in. What was done is written down in the folder of results, one JSON
line for each job. A job is done again only if its words changed, or the content of a file that it reads, or if its output
is gone; so a batch that was stopped, even by force, goes on where it was. A job that fails does not stop the others; they
are listed at the end, and the exit code is 1.

Examples:
  loraweld batch jobs.jsonl
  loraweld batch jobs.jsonl --grid cat=.4:1:.2 --grid dog=.4:1:.2      each pair, where jobs have {cat} and {dog}
  loraweld batch jobs.jsonl --shard 1/4                                the first of four processes
  sbatch --array=0-3 --wrap 'loraweld batch jobs.jsonl'                Slurm tells each task which it is")]
pub struct Batch {
    /// The file of jobs, one a line.
    #[arg(value_name = "JOBS.jsonl")]
    jobs: PathBuf,
    /// A name in braces in the jobs' words, and the numbers that it stands for: `cat=.4:1:.2` or `cat=.4,.7,1`. Repeatable,
    /// and then each takes all values of the others.
    #[arg(long, value_name = "NAME=FROM:TO:STEP", allow_hyphen_values = true)]
    grid: Vec<Axis>,
    /// Which share of the jobs is this process's, from 1/N to N/N [default: what SLURM_ARRAY_TASK_ID or
    /// JOB_COMPLETION_INDEX tells, else all].
    #[arg(long, value_name = "I/N", conflicts_with = "shards")]
    shard: Option<Shard>,
    /// How many shards there are, where the environment tells only which one this is.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    shards: Option<u64>,
    /// Where to write down what was done [default: beside the jobs, `.results` in place of `.jsonl`].
    #[arg(long, value_name = "FOLDER")]
    results: Option<PathBuf>,
    /// List the jobs, and whether each is done, and run none.
    #[arg(long)]
    dry_run: bool,
    /// Let jobs overwrite files that no job of this batch wrote; never their inputs.
    #[arg(long)]
    force: bool,
}

/// What became of the jobs of a shard.
#[derive(Default)]
struct Tally {
    done: usize,
    skipped: usize,
    /// Their lines.
    failed: Vec<usize>,
    /// Warnings that were said: most are the same for many jobs.
    warned: HashSet<String>,
}

impl Batch {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let shard = Shard::find(self.shard, self.shards, |name| std::env::var(name).ok())?;
        let jobs = job::read(&self.jobs, &self.grid)?;
        let total = jobs.len();
        let own: Vec<_> =
            jobs.into_iter().enumerate().filter(|(i, _)| shard.has(*i)).map(|(_, job)| job).collect();
        let results = self.results.clone().unwrap_or_else(|| self.jobs.with_extension("results"));
        let fields =
            json!({ "jobs": total, "shard": shard.to_string(), "own": own.len(), "results": results });
        out.event("batch", &fields)?;
        out.info(match shard.of {
            1 => format!("jobs       {total} in {}", self.jobs.display()),
            _ => format!("jobs       {} of {total} in {}, as shard {shard}", own.len(), self.jobs.display()),
        })?;
        if self.dry_run {
            return list(&own, &Ledger::read(&results)?, out);
        }
        let mut ledger = Ledger::open(&results, shard)?;
        let mut hashes = Hashes::default();
        let mut tally = Tally::default();
        out.long(|control| {
            for (i, job) in own.iter().enumerate() {
                let item = job.as_ref().map_or_else(|bad| format!("line {}", bad.line), Job::name);
                tell(control, &item, i, own.len());
                match job {
                    Err(bad) => tally.fails(bad.line, bad.message.clone(), out)?,
                    Ok(job) => self.one(job, global, control, &mut ledger, &mut hashes, &mut tally, out)?,
                }
                if control.check().is_err() {
                    return Err(Error::Cancelled.into());
                }
            }
            tell(control, "", own.len(), own.len());
            anyhow::Ok(())
        })?;
        let Tally { done, skipped, failed, .. } = tally;
        out.event("total", &json!({ "done": done, "skipped": skipped, "failed": failed }))?;
        out.info(format_args!("total      {done} done, {skipped} done before, {} failed", failed.len()))?;
        out.info(format_args!("results    {}", results.display()))?;
        if failed.is_empty() {
            return Ok(());
        }
        let which = some(failed.iter().map(|line| format!("line {line}")), 10);
        anyhow::bail!(
            "{}: {} of {} failed: {which}",
            self.jobs.display(),
            failed.len(),
            count(own.len(), "job")
        )
    }

    /// Runs a job, if it is not done. Fails only if nothing can be written down.
    #[expect(clippy::too_many_arguments, reason = "what a batch is made of")]
    fn one(
        &self,
        job: &Job,
        global: &Global,
        control: &Control<'_>,
        ledger: &mut Ledger,
        hashes: &mut Hashes,
        tally: &mut Tally,
        out: &Output,
    ) -> anyhow::Result<()> {
        let Job { line, words, .. } = job;
        let (line, run) = (*line, words.clone());
        let id = match hashes.job(job) {
            Ok(id) => id,
            Err(e) => return tally.fails(line, e.to_string(), out),
        };
        if ledger.is_done(&id, hashes) {
            tally.skipped += 1;
            return out.event("skipped", &json!({ "line": line, "run": run }));
        }
        let is_absent = |path: &&PathBuf| std::fs::symlink_metadata(path).is_err();
        let was_ours = |path: &PathBuf| ledger.began(&id).contains(path);
        let fresh: Vec<_> =
            job.outputs.iter().filter(|path| is_absent(path) || was_ours(path)).cloned().collect();
        // What an earlier run of this job left when it was stopped between its output and its record.
        let is_ours = !job.outputs.is_empty() && fresh.len() == job.outputs.len();
        let overwrite =
            job.takes_force && (self.force || is_ours && fresh.iter().any(|path| !is_absent(&path)));
        ledger.add(Entry::Started { job: id.clone(), line, run: run.clone(), fresh })?;
        let start = Instant::now();
        match said(job, global, overwrite, control) {
            Ok(Said { events, warnings }) => {
                let outputs = written(job, hashes)?;
                let seconds = start.elapsed().as_secs_f64();
                let fields = json!({
                    "line": line, "run": run, "seconds": seconds, "outputs": outputs, "warnings": warnings,
                });
                out.event("done", &fields)?;
                out.info(format_args!("done       line {line}: {} in {seconds:.2} s", job.name()))?;
                for warning in &warnings {
                    if tally.warned.insert(warning.clone()) {
                        out.warn(format_args!("line {line}: {warning}"))?;
                    }
                }
                tally.done += 1;
                Ok(ledger.add(Entry::Done { job: id, line, run, seconds, outputs, warnings, events })?)
            }
            // It is as if it had never begun.
            Err(_) if control.check().is_err() => Ok(()),
            Err(error) => {
                ledger.add(Entry::Failed { job: id, line, run, error: error.clone() })?;
                tally.fails(line, error, out)
            }
        }
    }
}

impl Tally {
    fn fails(&mut self, line: usize, error: String, out: &Output) -> anyhow::Result<()> {
        out.event("failed", &json!({ "line": line, "error": error }))?;
        out.complain(format_args!("line {line}: {error}"));
        self.failed.push(line);
        Ok(())
    }
}

fn tell(control: &Control<'_>, item: &str, done: usize, total: usize) {
    if let Some(progress) = control.progress {
        progress(Progress { stage: "batch", item, done: done as u64, total: total as u64 });
    }
}

/// What a job says.
#[derive(Default)]
struct Said {
    /// What `--json` would print, but for progress and warnings.
    events: Vec<Value>,
    warnings: Vec<String>,
}

/// Runs a job, and hears what it says.
fn said(job: &Job, global: &Global, overwrite: bool, control: &Control<'_>) -> Result<Said, String> {
    let heard = Arc::new(Mutex::new(Said::default()));
    let hears = heard.clone();
    let tell = move |told: Told<'_>| {
        let Told::Event(event) = told else { return };
        let mut heard = lock(&hears);
        match (event["event"].as_str(), event["message"].as_str()) {
            (Some("warning"), Some(message)) => heard.warnings.push(message.to_owned()),
            (Some("progress"), _) => {}
            _ => heard.events.push(event.clone()),
        }
    };
    let host = Host {
        adapters: Vec::new(),
        calibrations: Vec::new(),
        device: kept::open,
        tell: Box::new(tell),
        cancel: host::cancel().unwrap_or_else(|| CANCEL.clone()),
    };
    let mut words = vec!["loraweld".to_owned(), "--device".to_owned(), global.device.to_string()];
    if global.precision != Precision::Auto {
        words.extend(["--precision".to_owned(), global.precision.to_string()]);
    }
    words.extend(job.words.iter().cloned());
    if overwrite && !job.words.iter().any(|word| word == "--force") {
        // What follows two dashes is no option.
        let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
        words.insert(end, "--force".to_owned());
    }
    // A job that waits for nothing would not see that the batch was stopped.
    if control.check().is_err() {
        return Err(Error::Cancelled.to_string());
    }
    run_for(&Arc::new(host), words).map_err(|failure| failure.advice())?;
    Ok(std::mem::take(&mut *lock(&heard)))
}

/// The outputs, with their hashes.
fn written(job: &Job, hashes: &mut Hashes) -> loraweld::Result<Vec<Written>> {
    let mut written = Vec::new();
    for path in &job.outputs {
        // Some commands write nothing if there is nothing to write.
        if let Some(sha256) = hashes.content(path)? {
            written.push(Written { path: path.clone(), sha256 });
        }
    }
    Ok(written)
}

/// Lists the jobs.
fn list(jobs: &[Result<Job, BadLine>], ledger: &Ledger, out: &Output) -> anyhow::Result<()> {
    let mut hashes = Hashes::default();
    for job in jobs {
        let (line, what, words) = match job {
            Err(bad) => (bad.line, format!("wrong: {}", bad.message), Vec::new()),
            Ok(job) => {
                let is_done = ledger.is_done(&hashes.job(job)?, &mut hashes);
                (job.line, (if is_done { "done" } else { "to do" }).to_owned(), job.words.clone())
            }
        };
        out.event("job", &json!({ "line": line, "state": what, "run": words }))?;
        let words: Vec<_> = words.iter().map(|word| quoted(Path::new(word))).collect();
        out.result(format_args!("line {line:<5} {what:5}  {}", words.join(" ")))?;
    }
    Ok(())
}
