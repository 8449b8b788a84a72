//! Why a checkpoint could not be loaded.

use crate::ops::BackendError;
use std::path::{Path, PathBuf};

/// Every message names the file, tensor or field, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{file}: field `{field}`: {problem}")]
    Config { file: String, field: String, problem: String },
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error("model_type `{found}` is not supported; supported are {supported}")]
    Family { found: String, supported: String },
    #[error("tensor `{name}` is missing from the checkpoint (expected shape {expected:?})")]
    MissingTensor { name: String, expected: Vec<usize> },
    #[error("tensor `{name}` has shape {found:?}; config.json says {expected:?}")]
    TensorShape { name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("tensor `{name}` is stored as {found}; supported are BF16, F16 and F32 (no quantised checkpoints)")]
    TensorDtype { name: String, found: String },
    #[error("the checkpoint holds {count} tensors that config.json has no place for: {names}")]
    ExtraTensors { count: usize, names: String },
    #[error(
        "--max-model-len must be between 1 and {max_positions} (max_position_embeddings of the checkpoint); got {asked}"
    )]
    MaxModelLen { asked: usize, max_positions: usize },
    #[error("--layers must be between 1 and {layers} (num_hidden_layers of the config); got {asked}")]
    Layers { asked: usize, layers: usize },
    #[error("{0}")]
    Hub(String),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("while building the model: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl LoadError {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        |source| Self::Io { path: path.to_path_buf(), source }
    }

    pub(super) fn pack_cache(path: &Path, problem: String) -> Self {
        Self::file(path, format!("{problem}: remove this file, or leave out --pack-cache"))
    }

    pub(super) fn file(path: &Path, problem: impl ToString) -> Self {
        Self::File { path: path.to_path_buf(), problem: problem.to_string() }
    }
}
