//! Which jobs are this process's share.

use std::fmt;
use std::str::FromStr;

use super::super::usage;

/// One of several processes that share a list of jobs, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 1 to `of`.
    pub number: u64,
    /// How many there are.
    pub of: u64,
}

impl Shard {
    /// Whether the job with this number, from 0, is one of its own. Jobs that stand beside each other often take as long
    /// as each other, and so they are dealt like cards.
    pub fn has(self, job: usize) -> bool {
        job as u64 % self.of == self.number - 1
    }

    /// From the command line, else from what Slurm or Kubernetes tells the processes of an array.
    pub fn find(
        given: Option<Self>,
        of: Option<u64>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        if let Some(shard) = given {
            return Ok(shard);
        }
        let number = |name: &str| match variable(name) {
            None => Ok(None),
            Some(text) => match text.trim().parse::<u64>() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(usage(format!("{name} is `{text}`; expected a number"))),
            },
        };
        let within = |name: &str, number: u64, of: u64| match number {
            1.. if number <= of => Ok(Self { number, of }),
            _ => Err(usage(format!(
                "{name} makes this shard {number} of {of}; `--shard I/N` says which it is"
            ))),
        };
        if let Some(task) = number("SLURM_ARRAY_TASK_ID")? {
            let (first, last) = (number("SLURM_ARRAY_TASK_MIN")?, number("SLURM_ARRAY_TASK_MAX")?);
            let step = number("SLURM_ARRAY_TASK_STEP")?.unwrap_or(1).max(1);
            let (Some(first), Some(last)) = (first, last) else {
                return Err(usage(
                    "SLURM_ARRAY_TASK_ID is set, but not SLURM_ARRAY_TASK_MIN and _MAX: `--shard I/N` says which shard \
                     this is",
                ));
            };
            let (number, count) =
                (task.saturating_sub(first) / step + 1, last.saturating_sub(first) / step + 1);
            if of.is_some_and(|of| of != count) {
                return Err(usage(format!(
                    "--shards is {}, but Slurm's array has {count} tasks",
                    of.unwrap_or(0)
                )));
            }
            return within("SLURM_ARRAY_TASK_ID", number, count);
        }
        if let Some(index) = number("JOB_COMPLETION_INDEX")? {
            // Kubernetes counts from 0, and does not tell how many there are.
            let Some(of) = of else {
                return Err(usage(
                    "JOB_COMPLETION_INDEX says which shard this is, but not of how many: add `--shards N`, the job's \
                     `completions`",
                ));
            };
            return within("JOB_COMPLETION_INDEX", index.saturating_add(1), of);
        }
        match of {
            None | Some(1) => Ok(Self { number: 1, of: 1 }),
            Some(of) => Err(usage(format!(
                "--shards is {of}, but nothing says which of them this is: `--shard I/{of}`, SLURM_ARRAY_TASK_ID or \
                 JOB_COMPLETION_INDEX do"
            ))),
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.of)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((number @ 1.., of)) if number <= of => Ok(Self { number, of }),
            _ => Err("expected I/N, such as 1/4 for the first of four".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(given: Option<&str>, of: Option<u64>, variables: &[(&str, &str)]) -> Result<String, String> {
        let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        let given = given.map(|text| text.parse().expect("a shard"));
        Shard::find(given, of, variable).map(|shard| shard.to_string()).map_err(|e| e.to_string())
    }

    #[test]
    fn shards_come_from_flags_slurm_or_kubernetes() {
        assert_eq!(find(None, None, &[]), Ok("1/1".into()));
        assert_eq!(find(Some("2/3"), None, &[("SLURM_ARRAY_TASK_ID", "9")]), Ok("2/3".into()));
        let slurm = |id, min, max, step| {
            find(
                None,
                None,
                &[
                    ("SLURM_ARRAY_TASK_ID", id),
                    ("SLURM_ARRAY_TASK_MIN", min),
                    ("SLURM_ARRAY_TASK_MAX", max),
                    ("SLURM_ARRAY_TASK_STEP", step),
                ],
            )
        };
        assert_eq!(slurm("0", "0", "3", "1"), Ok("1/4".into()));
        assert_eq!(slurm("4", "1", "4", "1"), Ok("4/4".into()));
        assert_eq!(slurm("5", "1", "7", "2"), Ok("3/4".into()));
        let kubernetes = [("JOB_COMPLETION_INDEX", "3")];
        assert_eq!(find(None, Some(4), &kubernetes), Ok("4/4".into()));
        assert!(find(None, None, &kubernetes).is_err_and(|e| e.contains("--shards N")));
        assert!(find(None, Some(3), &kubernetes).is_err_and(|e| e.contains("shard 4 of 3")));
        assert!(find(None, Some(3), &[]).is_err_and(|e| e.contains("which of them")));
        assert!(
            find(None, None, &[("SLURM_ARRAY_TASK_ID", "x")]).is_err_and(|e| e.contains("expected a number"))
        );
        for wrong in ["0/4", "5/4", "1", "1/0", "a/b", "-1/2"] {
            assert!(wrong.parse::<Shard>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_job_is_one_shards_own() {
        for of in 1..6 {
            for job in 0..20 {
                assert_eq!((1..=of).filter(|&number| Shard { number, of }.has(job)).count(), 1);
            }
        }
    }
}
