//! What can be wrong with training data.

use std::io;
use std::path::{Path, PathBuf};

/// Why data could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("{path}: there is no such file or folder. {hint}")]
    Missing { path: PathBuf, hint: String },
    #[error("{path}: the folder holds no file to read as {format}: those are {names}. {hint}")]
    NoFiles { path: PathBuf, format: &'static str, names: &'static str, hint: String },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}, line {line}: {problem}")]
    Line { path: PathBuf, line: u64, problem: String },
    #[error("{path}: byte {at} is not UTF-8, which text must be (`iconv -f latin1 -t utf8` converts Latin-1)")]
    NotUtf8 { path: PathBuf, at: u64 },
    #[error("data.{field}: {problem}")]
    Spec { field: &'static str, problem: String },
    #[error("{name}: the tokenizer cannot be {doing}: {problem}")]
    Tokenizer { name: String, doing: &'static str, problem: String },
    #[error("the {split} data ({paths}) holds no text to learn from. {hint}")]
    Empty { split: &'static str, paths: String, hint: String },
    #[error(
        "data.valid_share {share} of {documents} documents leaves none for one of the splits; give more data, another \
         share, or data.valid"
    )]
    Split { share: f64, documents: u64 },
}

impl DataError {
    /// For `map_err`.
    pub(super) fn io(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}
