//! The state a run goes on from: parameters, moments, where the data stands, what was evaluated. Written beside the last
//! one and then put in its place, so that a run that dies while writing keeps the last good state.

use super::data::Cursor;
use super::lm::MoeLm;
use super::optim::AdamW;
use super::report::EvalLog;
use candle_core::{Device, Shape, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// What is no tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Resolved recipe as TOML: another one cannot go on from here.
    pub recipe: String,
    /// Steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// When the run began, RFC 3339.
    pub started: String,
    /// Time spent in steps.
    pub seconds: f64,
    pub cursor: Cursor,
    pub evals: Vec<EvalLog>,
}

/// Why a state cannot be written or taken up.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: {problem}; remove the folder to begin anew")]
    Damaged { path: PathBuf, problem: String },
    #[error(transparent)]
    Device(#[from] candle_core::Error),
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> StateError {
    let path = path.to_path_buf();
    move |source| StateError::Io { path, source }
}

const PARAMS: &str = "params.safetensors";
const MOMENTS: &str = "moments.safetensors";
const PROGRESS: &str = "progress.json";

/// The folder of a run's state.
pub struct StateDir {
    now: PathBuf,
    new: PathBuf,
    old: PathBuf,
}

impl StateDir {
    /// Under the run's folder `out`.
    pub fn new(out: &Path) -> Self {
        Self { now: out.join("state"), new: out.join("state.new"), old: out.join("state.old") }
    }

    /// Where a state is, if there is one: a writer that died between two renames left the old one.
    fn found(&self) -> Option<&Path> {
        [&self.now, &self.old].into_iter().find(|dir| dir.join(PROGRESS).is_file()).map(PathBuf::as_path)
    }

    /// Replaces the state by this one.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, model: &MoeLm, adam: &AdamW, progress: &Progress) -> Result<(), StateError> {
        remove(&self.new)?;
        std::fs::create_dir_all(&self.new).map_err(io(&self.new))?;
        let params: HashMap<String, Tensor> =
            model.params().iter().map(|p| (p.name.clone(), p.var.as_tensor().detach())).collect();
        candle_core::safetensors::save(&params, self.new.join(PARAMS))?;
        let moments = adam.moments(model.params())?;
        candle_core::safetensors::save(&moments.into_iter().collect::<HashMap<_, _>>(), self.new.join(MOMENTS))?;
        let path = self.new.join(PROGRESS);
        let text = serde_json::to_string_pretty(progress).map_err(|e| io(&path)(e.into()))?;
        std::fs::write(&path, text).map_err(io(&path))?;
        // Where there is none now, the old one is all there is until the new one is in place.
        if self.now.exists() {
            remove(&self.old)?;
            std::fs::rename(&self.now, &self.old).map_err(io(&self.now))?;
        }
        std::fs::rename(&self.new, &self.now).map_err(io(&self.new))?;
        remove(&self.old)
    }

    /// What is no tensor of the state, or nothing where there is none.
    ///
    /// # Errors
    /// A damaged state.
    pub fn progress(&self) -> Result<Option<Progress>, StateError> {
        let Some(dir) = self.found() else { return Ok(None) };
        let path = dir.join(PROGRESS);
        let text = std::fs::read_to_string(&path).map_err(io(&path))?;
        let progress = serde_json::from_str(&text)
            .map_err(|e| StateError::Damaged { path, problem: format!("is no state of a run: {e}") })?;
        Ok(Some(progress))
    }

    /// Gives `model` and `adam` the state's parameters and moments, after `steps` steps.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn restore(&self, model: &MoeLm, adam: &mut AdamW, steps: u64) -> Result<(), StateError> {
        let dir = self.found().unwrap_or(&self.now);
        let params = Tensors::open(dir.join(PARAMS), model.device())?;
        for p in model.params() {
            p.var.set(&params.take(&p.name, p.var.shape())?)?;
        }
        let moments = Tensors::open(dir.join(MOMENTS), model.device())?;
        adam.restore(model.params(), steps, |name, shape| moments.take(name, shape))
    }
}

fn remove(dir: &Path) -> Result<(), StateError> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io(dir)(e)),
        _ => Ok(()),
    }
}

struct Tensors {
    path: PathBuf,
    tensors: HashMap<String, Tensor>,
}

impl Tensors {
    fn open(path: PathBuf, device: &Device) -> Result<Self, StateError> {
        let tensors = candle_core::safetensors::load(&path, device)
            .map_err(|e| StateError::Damaged { path: path.clone(), problem: e.to_string() })?;
        Ok(Self { path, tensors })
    }

    fn take(&self, name: &str, shape: &Shape) -> Result<Tensor, StateError> {
        let damaged = |problem| Err(StateError::Damaged { path: self.path.clone(), problem });
        match self.tensors.get(name) {
            None => damaged(format!("tensor `{name}` is missing")),
            Some(t) if t.shape() != shape => {
                damaged(format!("tensor `{name}` has shape {:?}, the model {shape:?}", t.shape()))
            }
            Some(t) => Ok(t.clone()),
        }
    }
}
