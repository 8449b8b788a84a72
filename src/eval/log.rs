//! The log of a run, `samples.jsonl`: every answer as soon as it is there, so that a run that was stopped goes on.

use super::lm::{Reads, Routed};
use super::stats::Window;
use super::task::Judged;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// What the answers depend on, beside the routers: a run goes on only where this is the same.
    Settings(BTreeMap<String, Value>),
    Outcome(Outcome),
    Kl(KlLine),
    Stretch(Stretch),
}

/// Names a sample of a run: `arm`, `task`, `subtask` and `row` of its test split.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    pub arm: String,
    pub task: String,
    pub subtask: String,
    pub row: usize,
}

/// What the model said to one sample, and what that was worth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    #[serde(flatten)]
    pub key: Key,
    /// What routed; the model's own router without it.
    pub router: Option<String>,
    #[serde(flatten)]
    pub said: Said,
    /// One per metric of the task.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub judged: Vec<Judged>,
    pub routed: Option<Routed>,
    /// How often work on this arm and task had been stopped before.
    pub stretch: usize,
    /// Since this stretch of work began.
    pub seconds: f64,
}

/// The model's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// In nats, one per choice.
    LogLikelihoods(Vec<f64>),
    Text(String),
    Window(Window),
}

/// KL(native ‖ arm) of next-token distributions on one sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KlLine {
    #[serde(flatten)]
    pub key: Key,
    /// Sum over positions.
    pub nats: f64,
    pub positions: usize,
}

/// Expert weights read in work on one arm and task that was not stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stretch {
    pub arm: String,
    pub task: String,
    pub samples: usize,
    pub reads: Reads,
}

/// Why a log could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error("{0} is being written by another run; give another --output")]
    Locked(String),
    #[error("{path}, line {line}: {problem}; repair or remove the file, or give another --output")]
    Broken { path: String, line: usize, problem: String },
    #[error(
        "{path} is the log of a run with other settings ({differences}); give another --output, or --overwrite to begin anew"
    )]
    Other { path: String, differences: String },
}

/// An open log, and what it held.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
    pub outcomes: BTreeMap<Key, Outcome>,
    pub kl: BTreeMap<Key, KlLine>,
    pub stretches: Vec<Stretch>,
}

impl Log {
    /// Opens the log at `path` to go on with, or begins one. A last line that was cut off is dropped.
    ///
    /// # Errors
    /// A file that cannot be read or written, is no log, or is one of other settings.
    pub fn open(path: &Path, settings: &BTreeMap<String, Value>) -> Result<Self, LogError> {
        let io = |source| LogError::Io { path: path.display().to_string(), source };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        file.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => LogError::Locked(path.display().to_string()),
            TryLockError::Error(source) => io(source),
        })?;
        let mut log = Self {
            path: path.to_path_buf(),
            file,
            outcomes: BTreeMap::new(),
            kl: BTreeMap::new(),
            stretches: Vec::new(),
        };
        let kept = log.read(settings)?;
        log.file.set_len(kept).map_err(io)?;
        log.file.seek(SeekFrom::Start(kept)).map_err(io)?;
        if kept == 0 {
            log.write(Line::Settings(settings.clone()))?;
        }
        Ok(log)
    }

    /// Reads the whole lines and gives how many bytes they take.
    fn read(&mut self, settings: &BTreeMap<String, Value>) -> Result<u64, LogError> {
        let path = self.path.display().to_string();
        let io = |source| LogError::Io { path: path.clone(), source };
        let mut reader = BufReader::new(self.file.try_clone().map_err(io)?);
        let (mut kept, mut number, mut text) = (0, 0, Vec::new());
        loop {
            text.clear();
            let read = reader.read_until(b'\n', &mut text);
            let read = read.map_err(io)?;
            if !text.ends_with(b"\n") {
                return Ok(kept);
            }
            number += 1;
            let broken = |problem: String| LogError::Broken { path: path.clone(), line: number, problem };
            let line = serde_json::from_slice(&text).map_err(|e| broken(e.to_string()))?;
            match line {
                Line::Settings(found) if number == 1 => {
                    let differences = differences(&found, settings);
                    if !differences.is_empty() {
                        return Err(LogError::Other { path, differences });
                    }
                }
                _ if number == 1 => return Err(broken("the settings were expected here".into())),
                Line::Settings(_) => return Err(broken("settings stand in the first line alone".into())),
                line => self.keep(line),
            }
            kept += read as u64;
        }
    }

    /// Appends a line, and keeps what it says.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&mut self, line: Line) -> Result<(), LogError> {
        let io = |source| LogError::Io { path: self.path.display().to_string(), source };
        let mut text = serde_json::to_vec(&line).map_err(|e| io(e.into()))?;
        text.push(b'\n');
        // In one call, so that a run that is killed leaves at most its last line unfinished.
        self.file.write_all(&text).map_err(io)?;
        self.keep(line);
        Ok(())
    }

    fn keep(&mut self, line: Line) {
        match line {
            Line::Settings(_) => {}
            Line::Outcome(outcome) => drop(self.outcomes.insert(outcome.key.clone(), outcome)),
            Line::Kl(kl) => drop(self.kl.insert(kl.key.clone(), kl)),
            Line::Stretch(stretch) => self.stretches.push(stretch),
        }
    }
}

/// The settings that differ, with both values.
fn differences(found: &BTreeMap<String, Value>, wanted: &BTreeMap<String, Value>) -> String {
    let names: std::collections::BTreeSet<&String> = found.keys().chain(wanted.keys()).collect();
    let shown = |value: Option<&Value>| value.map_or_else(|| "nothing".into(), Value::to_string);
    let differing = names.into_iter().filter(|name| found.get(*name) != wanted.get(*name));
    let texts =
        differing.map(|name| format!("{name}: {} there, {} now", shown(found.get(name)), shown(wanted.get(name))));
    texts.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(limit: u64) -> BTreeMap<String, Value> {
        BTreeMap::from([("limit".to_string(), Value::from(limit))])
    }

    fn outcome(row: usize) -> Outcome {
        Outcome {
            key: Key { arm: "native".into(), task: "t".into(), subtask: "s".into(), row },
            router: None,
            said: Said::LogLikelihoods(vec![-0.1, -2.300000000000001]),
            judged: vec![Judged { prediction: "A".into(), correct: true }],
            routed: None,
            stretch: 0,
            seconds: 0.5,
        }
    }

    #[test]
    fn what_was_written_is_read_back_and_a_cut_off_line_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        let mut log = Log::open(&path, &settings(5)).unwrap();
        log.write(Line::Outcome(outcome(0))).unwrap();
        let stretch = Stretch { arm: "native".into(), task: "t".into(), samples: 1, reads: Reads::default() };
        log.write(Line::Stretch(stretch.clone())).unwrap();
        drop(log);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"{\"outcome\":{\"arm\":\"nat"].concat()).unwrap();
        let mut log = Log::open(&path, &settings(5)).unwrap();
        assert_eq!(log.outcomes.values().cloned().collect::<Vec<_>>(), [outcome(0)]);
        assert_eq!(log.stretches, [stretch]);
        log.write(Line::Outcome(outcome(1))).unwrap();
        drop(log);
        assert_eq!(Log::open(&path, &settings(5)).unwrap().outcomes.len(), 2);
    }

    #[test]
    fn a_log_of_other_settings_or_none_at_all_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.jsonl");
        drop(Log::open(&path, &settings(5)).unwrap());
        let held = Log::open(&path, &settings(5)).unwrap();
        assert!(Log::open(&path, &settings(5)).unwrap_err().to_string().contains("another run"));
        drop(held);
        let error = Log::open(&path, &settings(6)).unwrap_err().to_string();
        assert!(error.contains("limit: 5 there, 6 now") && error.contains("--overwrite"), "{error}");
        std::fs::write(&path, "hello\n").unwrap();
        let error = Log::open(&path, &settings(5)).unwrap_err().to_string();
        assert!(error.contains("line 1"), "{error}");
    }
}
