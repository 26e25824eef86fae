//! Jobs: lines of a file, and what their words read and write.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use clap::{ArgMatches, Command};
use serde::Deserialize;

use super::super::args::LoraArg;
use super::super::{in_one_line, usage};
use crate::io::disk;

/// A command to run.
#[derive(Debug)]
pub struct Job {
    /// The line that it stands on, from 1.
    pub line: usize,
    /// The words of the command line, without the program's name.
    pub words: Vec<String>,
    /// Files and folders that it reads.
    pub inputs: Vec<PathBuf>,
    /// Files and folders that it writes.
    pub outputs: Vec<PathBuf>,
    /// Whether `--force` means anything to it.
    pub takes_force: bool,
}

/// A line that is no job.
#[derive(Debug)]
pub struct BadLine {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// A line: the words alone, or with a grid of their own.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Words(Words),
    Job(WithGrid),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WithGrid {
    run: Words,
    #[serde(default)]
    grid: BTreeMap<String, Values>,
}

/// As a shell takes them, or one by one.
#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    Text(String),
    List(Vec<String>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Values {
    Text(String),
    List(Vec<f64>),
}

/// A name, and the numbers that take its place in turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    name: String,
    values: Vec<String>,
}

/// More points than this in one grid are likely a slip of the step.
const MOST_VALUES: usize = 10_000;
/// Jobs of a batch, and bytes of all their words: short lines may ask for any number, and all are held at once.
const MOST_JOBS: usize = 1 << 18;
const MOST_BYTES: usize = 1 << 28;

impl Axis {
    fn new(name: &str, values: &str) -> Result<Self, String> {
        let is_name = !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "_-.".contains(c));
        if !is_name {
            return Err(format!("`{name}` is no name of letters, digits, `_`, `-` and `.`"));
        }
        let number = |text: &str| super::super::args::finite(text).map_err(|e| format!("`{text}`: {e}"));
        let values = match values.split(':').collect::<Vec<_>>()[..] {
            [list] => {
                list.split(',').map(|v| number(v).map(|v| v.to_string())).collect::<Result<Vec<_>, _>>()?
            }
            [first, last, step] => {
                let (from, to, by) = (number(first)?, number(last)?, number(step)?);
                let count = (to - from) / by;
                if by == 0.0 || count < 0.0 {
                    return Err(format!("no step of {step} leads from {first} to {last}"));
                }
                // A little more than a half of the last digit of a decimal that no binary number is.
                let count = (count + 1e-9).floor() as usize + 1;
                if count > MOST_VALUES {
                    return Err(format!("are {count} values; at most {MOST_VALUES}"));
                }
                // .4 + .2 is to be called .6, and not .6000000000000001.
                let decimals =
                    [first, step].map(|text| text.trim().split_once('.').map_or(0, |(_, d)| d.len()));
                let decimals = decimals[0].max(decimals[1]);
                (0..count)
                    .map(|i| format!("{:.decimals$}", from + by * i as f64))
                    // The shortest spelling, and no -0.
                    .map(|text| text.parse::<f64>().map_or(text, |value| (value + 0.0).to_string()))
                    .collect()
            }
            _ => return Err("expected FROM:TO:STEP or V,V,...".into()),
        };
        Ok(Self { name: name.to_owned(), values })
    }
}

impl std::str::FromStr for Axis {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, values) = text.split_once('=').ok_or("expected NAME=FROM:TO:STEP or NAME=V,V,...")?;
        Self::new(name.trim(), values)
    }
}

/// Reads every line, with the grids of the command line.
///
/// A line that is no job is one that fails, as a file that is missing would be. What can only be a slip of the whole is an
/// error: grids that nothing mentions, and jobs that write one file, or read what another is to write.
pub fn read(path: &Path, axes: &[Axis]) -> anyhow::Result<Vec<Result<Job, BadLine>>> {
    let text = disk::read_to_string(path).map_err(|e| loraweld::Error::io(path, "read", e))?;
    let (mut jobs, mut bytes) = (Vec::new(), 0usize);
    // Making it takes longer than most lines.
    let mut command = super::super::command();
    let mut mentioned = vec![false; axes.len()];
    for (line, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
        let check = |count: usize, bytes: usize, what: &dyn Fn() -> String| {
            let reason = match (count > MOST_JOBS, bytes > MOST_BYTES) {
                (true, _) => format!("would be more than {MOST_JOBS} jobs"),
                (_, true) => format!("would be jobs of more than {MOST_BYTES} bytes of words"),
                _ => return Ok(()),
            };
            let what = format!("line {line}: with {}, it {reason}, which is the most of one batch", what());
            Err(loraweld::Error::file(path, what))
        };
        check(jobs.len() + 1, bytes, &|| "this line".into())?;
        let bad = |e: anyhow::Error| BadLine { line, message: format!("{e:#}") };
        let (words, own) = match words(text) {
            Ok(parts) => parts,
            Err(e) => {
                jobs.push(Err(bad(e)));
                continue;
            }
        };
        let mut grid = Vec::new();
        for (axis, mentioned) in axes.iter().zip(&mut mentioned) {
            if mentions(&words, &axis.name) && own.iter().all(|own| own.name != axis.name) {
                *mentioned = true;
                grid.push(axis.clone());
            }
        }
        match own.iter().find(|axis| !mentions(&words, &axis.name)) {
            Some(axis) => {
                let message = format!("its words do not have the `{{{}}}` of its grid", axis.name);
                jobs.push(Err(BadLine { line, message }));
                continue;
            }
            None => grid.extend(own),
        }
        let points = grid.iter().fold(1usize, |points, axis| points.saturating_mul(axis.values.len()));
        bytes = bytes.saturating_add(longest(&words, &grid).saturating_mul(points));
        check(jobs.len().saturating_add(points), bytes, &|| {
            let sizes: Vec<_> =
                grid.iter().map(|axis| format!("{} of {}", axis.values.len(), axis.name)).collect();
            match sizes.is_empty() {
                true => "this line".into(),
                false => format!("all points of its grid, {}", sizes.join(" times ")),
            }
        })?;
        for words in expanded(words, &grid) {
            jobs.push(Job::new(&mut command, line, words).map_err(bad));
        }
    }
    if let Some((axis, _)) = axes.iter().zip(&mentioned).find(|(_, mentioned)| !**mentioned) {
        let name = &axis.name;
        return Err(usage(format!(
            "--grid {name}: no line has `{{{name}}}` where its values could go, such as \
             `merge linear {name}.safetensors:{{{name}}} -o out-{{{name}}}.safetensors`"
        )));
    }
    check_apart(&jobs)?;
    Ok(jobs)
}

/// The words of a line, and its grid.
fn words(text: &str) -> anyhow::Result<(Vec<String>, Vec<Axis>)> {
    let line: Line = serde_json::from_str(text).map_err(|e| {
        let why = if e.is_data() { String::new() } else { format!(" ({e})") };
        anyhow!(
            "is no job{why}; expected a string of words such as \"merge linear a.safetensors b.safetensors -o \
             ab.safetensors\", a list of them, or {{\"run\": WORDS, \"grid\": {{\"NAME\": \"FROM:TO:STEP\"}}}}"
        )
    })?;
    let WithGrid { run, grid } = match line {
        Line::Words(run) => WithGrid { run, grid: BTreeMap::new() },
        Line::Job(job) => job,
    };
    let mut words = match run {
        Words::List(words) => words,
        Words::Text(text) => shlex::split(&text).context("a quote is open at its end")?,
    };
    if words.first().is_some_and(|word| word == "loraweld") {
        words.remove(0);
    }
    let axis = |(name, values): (&String, &Values)| {
        let values = match values {
            Values::Text(text) => text.clone(),
            Values::List(values) => values.iter().map(f64::to_string).collect::<Vec<_>>().join(","),
        };
        Axis::new(name, &values).map_err(|e| anyhow!("grid `{name}`: {e}"))
    };
    Ok((words, grid.iter().map(axis).collect::<anyhow::Result<_>>()?))
}

fn mentions(words: &[String], name: &str) -> bool {
    words.iter().any(|word| word.contains(&format!("{{{name}}}")))
}

/// More bytes than the words have at any point of a grid, with what it takes to hold them.
fn longest(words: &[String], grid: &[Axis]) -> usize {
    let grown = |word: &String| {
        let by = |axis: &Axis| {
            let value = axis.values.iter().map(String::len).max().unwrap_or(0);
            word.matches(&format!("{{{}}}", axis.name)).count().saturating_mul(value)
        };
        size_of::<String>() + word.len() + grid.iter().map(by).sum::<usize>()
    };
    words.iter().map(grown).sum()
}

/// The words at every point of a grid, of which the last axis runs fastest.
fn expanded(words: Vec<String>, grid: &[Axis]) -> Vec<Vec<String>> {
    grid.iter().fold(vec![words], |all, axis| {
        let place = format!("{{{}}}", axis.name);
        let at =
            |words: &Vec<String>, value: &String| words.iter().map(|w| w.replace(&place, value)).collect();
        all.iter()
            .flat_map(|words| axis.values.iter().map(|value| at(words, value)).collect::<Vec<_>>())
            .collect()
    })
}

impl Job {
    /// `command`: the whole command line.
    fn new(command: &mut Command, line: usize, words: Vec<String>) -> anyhow::Result<Self> {
        let all = std::iter::once("loraweld").chain(words.iter().map(String::as_str));
        let matches = command.try_get_matches_from_mut(all).map_err(|e| anyhow!(in_one_line(&e)))?;
        let (mut command, mut matches) = (&*command, &matches);
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        loop {
            files(command, matches, &mut inputs, &mut outputs);
            let Some((name, of)) = matches.subcommand() else { break };
            if name == "batch" {
                return Err(anyhow!("is a batch itself; its jobs can be lines of this file"));
            }
            matches = of;
            command = command.find_subcommand(name).context("the command is not known")?;
        }
        let takes_force = command.get_arguments().any(|arg| arg.get_id() == "force");
        Ok(Self { line, words, inputs, outputs, takes_force })
    }

    /// What to call it.
    pub fn name(&self) -> String {
        match self.outputs.first() {
            Some(path) => path.display().to_string(),
            None => self.words.join(" "),
        }
    }
}

/// The paths among the arguments of a command, not of those below it.
fn files(command: &Command, matches: &ArgMatches, inputs: &mut Vec<PathBuf>, outputs: &mut Vec<PathBuf>) {
    for arg in command.get_arguments() {
        let (id, of) = (arg.get_id().as_str(), arg.get_value_parser().type_id());
        let paths: Vec<PathBuf> = if of == std::any::TypeId::of::<PathBuf>() {
            let values = matches.try_get_many::<PathBuf>(id).ok().flatten();
            values.into_iter().flatten().cloned().collect()
        } else if of == std::any::TypeId::of::<LoraArg>() {
            let values = matches.try_get_many::<LoraArg>(id).ok().flatten();
            values.into_iter().flatten().map(|lora| lora.path.clone()).collect()
        } else {
            continue;
        };
        if ["output", "report", "out"].contains(&id) { outputs.extend(paths) } else { inputs.extend(paths) }
    }
}

/// Jobs run in any order and at once: what one writes is no other's.
fn check_apart(jobs: &[Result<Job, BadLine>]) -> anyhow::Result<()> {
    let at = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let jobs = || jobs.iter().flatten();
    let mut writers: BTreeMap<PathBuf, &Job> = BTreeMap::new();
    for job in jobs() {
        for path in &job.outputs {
            let Some(other) = writers.insert(at(path), job) else { continue };
            let path = path.display();
            return Err(usage(match other.line == job.line {
                true => format!(
                    "line {}: writes {path} more than once; each point of a grid needs a file of its own, such as \
                     out-{{NAME}}.safetensors",
                    job.line
                ),
                false => format!("lines {} and {} both write {path}", other.line, job.line),
            }));
        }
    }
    for job in jobs() {
        for path in &job.inputs {
            let Some(other) = writers.get(&at(path)).filter(|other| !std::ptr::eq(**other, job)) else {
                continue;
            };
            return Err(usage(format!(
                "line {} reads {}, which line {} writes; jobs run in any order, so this takes two batches",
                job.line,
                path.display(),
                other.line
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(text: &str) -> Vec<String> {
        text.parse::<Axis>().expect("an axis").values
    }

    fn read_text(text: &str, axes: &[&str]) -> anyhow::Result<Vec<Result<Job, BadLine>>> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), text).expect("it can be written");
        read(file.path(), &axes.iter().map(|text| text.parse().expect("an axis")).collect::<Vec<_>>())
    }

    fn refused(text: &str, axes: &[&str]) -> String {
        read_text(text, axes).expect_err("a slip").to_string()
    }

    fn bad(text: &str) -> String {
        let jobs = read_text(text, &[]).expect("jobs");
        jobs.into_iter().find_map(Result::err).expect("a bad line").message
    }

    #[test]
    fn values_are_spelled_as_people_do() {
        assert_eq!(axis("cat=.4:1:.2"), ["0.4", "0.6", "0.8", "1"]);
        assert_eq!(axis("cat=1:-1:-1"), ["1", "0", "-1"]);
        assert_eq!(axis("cat=0:0.3:0.1"), ["0", "0.1", "0.2", "0.3"]);
        assert_eq!(axis("cat=0.5"), ["0.5"]);
        assert_eq!(axis("cat=.25,1,-2"), ["0.25", "1", "-2"]);
        for wrong in
            ["cat", "=1", "a b=1", "cat=", "cat=1:2", "cat=1:2:0", "cat=2:1:1", "cat=0:1:1e-9", "cat=x"]
        {
            assert!(wrong.parse::<Axis>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn lines_are_words_in_any_of_three_forms() {
        let text = r#"
            "merge linear 'a b.safetensors:0.5' c.safetensors -o x.safetensors"
            ["loraweld", "inspect", "a b.safetensors"]
            {"run": "resize a.safetensors:{s} --rank 4 -o {s}.safetensors", "grid": {"s": [0.5, 1]}}
        "#;
        let jobs = read_text(text, &[]).expect("jobs");
        let jobs: Vec<Job> = jobs.into_iter().collect::<Result<_, _>>().expect("good lines");
        let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(jobs.iter().map(|job| job.line).collect::<Vec<_>>(), [2, 3, 4, 4]);
        assert_eq!(jobs[0].inputs, paths(&["a b.safetensors", "c.safetensors"]));
        assert_eq!(jobs[0].outputs, paths(&["x.safetensors"]));
        assert_eq!((&jobs[1].inputs, &jobs[1].outputs), (&paths(&["a b.safetensors"]), &paths(&[])));
        assert_eq!(jobs[3].words, ["resize", "a.safetensors:1", "--rank", "4", "-o", "1.safetensors"]);
        assert!(jobs[0].takes_force);
    }

    #[test]
    fn grids_of_the_command_line_take_every_pair() {
        let text = r#""merge linear cat.safetensors:{cat} dog.safetensors:{dog} -o {cat}-{dog}.safetensors""#;
        let jobs = read_text(text, &["cat=0:1:1", "dog=1,2"]).expect("jobs");
        let outputs: Vec<_> = jobs.iter().map(|job| job.as_ref().expect("a job").name()).collect();
        assert_eq!(outputs, ["0-1.safetensors", "0-2.safetensors", "1-1.safetensors", "1-2.safetensors"]);
    }

    #[test]
    fn slips_are_told() {
        assert!(bad("merge linear a b").contains("is no job"));
        assert!(bad(r#"{"runs": "inspect a"}"#).contains("is no job"));
        assert!(bad(r#""merge 'linear""#).contains("quote"));
        assert!(bad(r#""merg linear a b -o c""#).contains("unrecognized subcommand 'merg'"));
        assert!(bad(r#""batch other.jsonl""#).contains("is a batch itself"));
        assert!(bad(r#"{"run": "inspect a", "grid": {"s": "1"}}"#).contains("`{s}`"));
        assert!(refused(r#""inspect a""#, &["cat=1"]).contains("no line has `{cat}`"));
        let same = "\"convert a -o x --format same\"\n\"convert b -o ./x --format same\"";
        assert!(refused(same, &[]).contains("lines 1 and 2 both write"));
        let grid = r#"{"run": "resize a:{s} --rank 4 -o x", "grid": {"s": [1, 2]}}"#;
        assert!(refused(grid, &[]).contains("writes x more than once"));
        // 10^12 jobs of 100 bytes, and few of many.
        let axis = "\"0:9999:1\"";
        let many = format!(
            r#"{{"run": "resize a:{{s}} --rank {{r}} -o x-{{s}}-{{r}}-{{t}}", "grid": {{"s": {axis}, "r": {axis}, "t": {axis}}}}}"#
        );
        let text = refused(&format!("\"inspect a\"\n{many}"), &[]);
        assert!(text.contains("line 2: ") && text.contains("10000 of r times 10000 of s"), "{text}");
        assert!(text.contains("more than 262144 jobs"), "{text}");
        let long = format!(r#"{{"run": "inspect a{{s}}{}", "grid": {{"s": {axis}}}}}"#, "x".repeat(1 << 15));
        let text = refused(&long, &[]);
        assert!(text.contains("line 1: ") && text.contains("268435456 bytes"), "{text}");
        let lines = "\"inspect a\"\n".repeat(3) + &"1\n".repeat(MOST_JOBS - 2);
        let text = refused(&lines, &[]);
        assert!(text.contains("line 262145: with this line, it would be more than 262144 jobs"), "{text}");
        let chain = "\"convert a -o x --format same\"\n\"inspect x\"";
        assert!(refused(chain, &[]).contains("line 2 reads x, which line 1 writes"));
    }
}
