//! The data that a language model is trained on: text from files, encoded once, cut into windows.
//!
//! ```text
//! files ─► documents, in pieces ─► tokenizer ─► token file (mapped) ─► windows in a seeded order ─► batches
//! ```
//!
//! Memory does not grow with the data: of text there is a batch of pieces at a time (and, while BPE is trained, a sample),
//! tokens are mapped.

mod cache;
mod dataset;
mod encode;
mod error;
mod files;
mod fold;
mod read;
mod shuffle;
mod spec;
mod synthetic;
#[cfg(test)]
mod tests;
mod tokenizer;

pub use dataset::{Batch, Cursor, Dataset, NOT_SCORED};
pub use error::DataError;
pub use spec::{DataSpec, Format, Normalise, Packing, TokenizerSpec};
pub use synthetic::synthetic;

use crate::types::hex;
use files::{Source, Sources};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use tokenizers::Tokenizer;

/// Part of the names of cached files: a change of what is in them, or of how text is read, makes a new one.
const CACHE_VERSION: u32 = 1;

/// What [`prepare`] is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading the files for their checksums.
    Checksum,
    /// Reading the training text for the tokenizer.
    Vocabulary,
    Encoding,
}

/// How far it is, in bytes of text; both are about right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub stage: Stage,
    pub done: u64,
    pub total: u64,
}

/// What was read, for logs, reports and model cards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFacts {
    pub files: usize,
    /// Of text, after normalisation.
    pub bytes: u64,
    pub documents: u64,
    /// Documents' ends included.
    pub train_tokens: u64,
    pub valid_tokens: u64,
    /// Tokens that stand for something outside the vocabulary.
    pub unknown_tokens: u64,
    pub vocab: usize,
    /// Over the SHA-256 sums of the files, in order.
    pub sha256: String,
}

/// Data that is ready for training.
pub struct Prepared {
    pub train: Dataset,
    pub valid: Dataset,
    pub tokenizer: Tokenizer,
    /// tokenizer.json, for the checkpoint.
    pub tokenizer_json: String,
    /// One more than the largest id.
    pub vocab: usize,
    /// Ends every document.
    pub eos: u32,
    /// The tokenizer's own where it has one, otherwise `eos`: a document begins after another's end.
    pub bos: u32,
    pub facts: DataFacts,
}

/// Finds, checks and encodes the data of `spec`. Token files and tokenizers that are made are kept in `cache_dir`, under
/// names that depend on all that they are made from, and used again; damaged ones are made anew.
///
/// The vocabulary is that of all of `train`'s text, also of what is split off it for validation.
///
/// # Errors
/// See [`DataError`].
pub fn prepare(
    spec: &DataSpec,
    cache_dir: &Path,
    on_progress: &(dyn Fn(Progress) + Sync),
) -> Result<Prepared, DataError> {
    spec.check()?;
    let sources = Sources::find(spec, on_progress)?;
    fs::create_dir_all(cache_dir).map_err(DataError::io(cache_dir))?;
    let tokenizer_key = key("", &sources.train, spec);
    let cached = cache_dir.join(format!("tokenizer-{tokenizer_key}.json"));
    let loaded = tokenizer::load(spec, &sources.train, &cached, on_progress)?;

    let dataset = |split: &'static str, sources: &[Source]| -> Result<Dataset, DataError> {
        let cached = cache_dir.join(format!("{split}-{}.tokens", key(&loaded.json, sources, spec)));
        let file = encode::tokens(spec, sources, &loaded, &cached, on_progress)?;
        if file.counts().documents == 0 {
            let paths: Vec<String> = sources.iter().take(3).map(|source| source.path.display().to_string()).collect();
            return Err(DataError::Empty { split, paths: paths.join(", "), hint: spec.hint() });
        }
        Ok(Dataset::new(Arc::new(file), spec.packing, loaded.eos))
    };
    let train = dataset("train", &sources.train)?;
    let mut counts = vec![train.counts()];
    let (train, valid) = if sources.valid.is_empty() {
        train.split(spec.valid_share)?
    } else {
        let valid = dataset("valid", &sources.valid)?;
        counts.push(valid.counts());
        (train, valid)
    };
    let facts = DataFacts {
        files: sources.all().count(),
        bytes: counts.iter().map(|c| c.bytes).sum(),
        documents: counts.iter().map(|c| c.documents).sum(),
        train_tokens: train.tokens(),
        valid_tokens: valid.tokens(),
        unknown_tokens: counts.iter().map(|c| c.unknown).sum(),
        vocab: loaded.vocab,
        sha256: sum(sources.all().map(|source| source.sha256.as_str())),
    };
    let tokenizer::Loaded { tokenizer, json, vocab, eos, bos, .. } = loaded;
    Ok(Prepared { train, valid, tokenizer, tokenizer_json: json, vocab, eos, bos, facts })
}

/// Of all that what is made from `sources` depends on, in hexadecimal digits.
fn key(tokenizer: &str, sources: &[Source], spec: &DataSpec) -> String {
    let read = json!([spec.format, spec.field, spec.separator, spec.normalise, spec.tokenizer, spec.eos]);
    let head = json!([CACHE_VERSION, read, tokenizer]).to_string();
    let key = sum(std::iter::once(head.as_str()).chain(sources.iter().map(|source| source.sha256.as_str())));
    key[..32].to_string()
}

fn sum<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    let mut hasher = Sha256::new();
    for text in texts {
        hasher.update(text);
        hasher.update("\n");
    }
    hex(&hasher.finalize())
}
