//! What was measured, line by line as it came, so that a run that was stopped goes on.

use super::CalibrateError;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The measurements of one checkpoint on one set of windows.
pub(super) struct State {
    path: PathBuf,
    file: File,
    known: HashMap<(String, usize), f64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    /// Hash of all that measurements depend on but the policy.
    key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    policy: String,
    window: usize,
    /// KL to native routing, nats per token.
    kl: f64,
}

/// The file that stands beside `out`.
pub(super) fn path(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_os_string();
    name.push(".state");
    name.into()
}

impl State {
    /// Opens the file at `path`. What it holds is taken over if its key is `key`; else it begins anew.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub(super) fn open(path: &Path, key: &str) -> Result<Self, CalibrateError> {
        let error = || CalibrateError::file(path);
        let text = match std::fs::read(path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(error()(e)),
        };
        let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let head = lines.next().filter(|line| serde_json::from_str::<Head>(line).is_ok_and(|head| head.key == key));
        let mut known = HashMap::new();
        let mut whole = 0;
        if let Some(head) = head {
            whole = head.len();
            // A line that was cut off ends what is known.
            for (line, read) in lines.map_while(|line| Some((line, serde_json::from_str::<Line>(line).ok()?))) {
                known.insert((read.policy, read.window), read.kl);
                whole += line.len();
            }
        } else if !text.is_empty() {
            tracing::warn!("{} is of other settings, text or checkpoint: it begins anew", path.display());
        }
        // What is kept is cut off below, not at opening.
        let options = OpenOptions::new().create(true).truncate(false).write(true).open(path);
        let file = options.map_err(error())?;
        file.set_len(whole as u64).map_err(error())?;
        drop(file);
        let file = OpenOptions::new().append(true).open(path).map_err(error())?;
        let mut state = Self { path: path.to_path_buf(), file, known };
        if whole == 0 {
            state.line(&Head { key: key.into() })?;
        }
        Ok(state)
    }

    /// Measurements that are there.
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    pub(super) fn get(&self, policy: &str, window: usize) -> Option<f64> {
        self.known.get(&(policy.to_string(), window)).copied()
    }

    pub(super) fn put(&mut self, policy: &str, window: usize, kl: f64) -> Result<(), CalibrateError> {
        self.line(&Line { policy: policy.into(), window, kl })?;
        self.known.insert((policy.into(), window), kl);
        Ok(())
    }

    fn line(&mut self, line: &impl Serialize) -> Result<(), CalibrateError> {
        let written = serde_json::to_string(line).map_err(io::Error::from);
        let written = written.and_then(|text| self.file.write_all((text + "\n").as_bytes()));
        written.map_err(CalibrateError::file(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_known_again_but_for_a_line_that_was_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(&dir.path().join("policy.json"));
        let mut state = State::open(&path, "key").unwrap();
        state.put("a", 0, 0.1 + 0.2).unwrap();
        state.put("a", 1, 1e-9).unwrap();
        drop(state);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"policy\":\"b\",\"wind").unwrap();
        let mut state = State::open(&path, "key").unwrap();
        assert_eq!((state.len(), state.get("a", 0), state.get("a", 1)), (2, Some(0.1 + 0.2), Some(1e-9)));
        state.put("b", 0, 2.0).unwrap();
        assert_eq!(State::open(&path, "key").unwrap().len(), 3);
        assert_eq!(State::open(&path, "another").unwrap().len(), 0);
        assert_eq!(State::open(&path, "key").unwrap().len(), 0, "it had begun anew");
    }
}
