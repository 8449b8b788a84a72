//! Rows of a split, from a directory or the hub, checked to be those that were published.

use super::formats::Rows;
use crate::eval::results::DataFacts;
use crate::model::LoadError;
use crate::model::hub::{HubOptions, dataset_file};
use crate::types::hex;
use indicatif::MultiProgress;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Where the rows of tasks come from.
#[derive(Clone, Debug)]
pub struct Source {
    pub place: Place,
    /// Takes rows other than the published ones, too.
    pub unverified: bool,
    /// Progress of downloads.
    pub bars: MultiProgress,
}

#[derive(Clone, Debug)]
pub enum Place {
    /// `bbh/{bbh,cot-prompts}/…`, `mmlu/{dev,test}/…` and `gsm8k/…` as their repositories have them; or one of those
    /// three folders itself.
    Directory(PathBuf),
    /// Their Parquet files. The options' revision is that of the model and not looked at.
    Hub(HubOptions),
}

/// Every message names the split or file, what was expected, what was found, and what helps.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("--data-dir {0} is not a directory")]
    NoDirectory(PathBuf),
    #[error(
        "{split}: --data-dir {dir} has no {file} (nor {short}, if it is that data's own folder); the file comes from \
         {upstream}"
    )]
    Missing { split: String, dir: PathBuf, file: String, short: String, upstream: &'static str },
    #[error(
        "{split}: this is not on the hub; give a directory with {file} by --data-dir (the file comes from {upstream})"
    )]
    NotOnHub { split: String, file: String, upstream: &'static str },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
    #[error("{path}: row {row} (counted from 1): {problem}")]
    Row { path: PathBuf, row: usize, problem: String },
    #[error(
        "{split}: {path} has {found} rows, the published data {expected}; get it anew from {upstream}, or pass \
         --unverified if these rows are meant"
    )]
    Count { split: String, path: PathBuf, expected: usize, found: usize, upstream: &'static str },
    #[error(
        "{split}: the rows of {path} have SHA-256 {found}, the published data {expected}; get it anew from {upstream}, \
         or pass --unverified if these rows are meant"
    )]
    Sum { split: String, path: PathBuf, expected: &'static str, found: String, upstream: &'static str },
    #[error("{split}: {path} has no rows")]
    Empty { split: String, path: PathBuf },
    #[error("--shots {asked}: {task} takes {allowed} (`mmlu@5` gives one task its own number)")]
    Shots { task: String, asked: usize, allowed: String },
    #[error(transparent)]
    Hub(#[from] LoadError),
}

impl DataError {
    pub(super) fn file(path: &Path, problem: impl ToString) -> Self {
        Self::File { path: path.to_path_buf(), problem: problem.to_string() }
    }

    /// `index` counts from 0.
    pub(super) fn row(path: &Path, index: usize, problem: impl ToString) -> Self {
        Self::Row { path: path.to_path_buf(), row: index + 1, problem: problem.to_string() }
    }
}

/// Reads the rows of a file.
pub(super) type Parse<const N: usize> = fn(&Path) -> Result<Rows<N>, DataError>;

/// One split: its name, where its rows lie, and how they are read.
pub(super) struct Split<const N: usize> {
    /// As in `sums.txt`: `mmlu/anatomy/test`.
    pub name: String,
    /// Under the data directory.
    pub file: String,
    pub parse: Parse<N>,
    pub hub: Option<HubFile<N>>,
    /// Where the file is published.
    pub upstream: &'static str,
}

/// Reads the rows of a file of the hub, which may hold other splits too.
type ParseHub<const N: usize> = Box<dyn Fn(&Path) -> Result<Rows<N>, DataError>>;

/// A split on the hub.
pub(super) struct HubFile<const N: usize> {
    pub dataset: &'static str,
    pub file: String,
    pub parse: ParseHub<N>,
}

impl Source {
    /// The rows of a split and what is known about them.
    ///
    /// # Errors
    /// No such file, unreadable rows, or others than the published ones (unless `unverified`).
    pub(super) fn read<const N: usize>(&self, split: Split<N>) -> Result<(Rows<N>, DataFacts), DataError> {
        let (path, rows) = match &self.place {
            Place::Directory(dir) => {
                let path = find(dir, &split)?;
                let rows = (split.parse)(&path)?;
                (path, rows)
            }
            Place::Hub(options) => {
                let Some(hub) = &split.hub else {
                    return Err(DataError::NotOnHub { split: split.name, file: split.file, upstream: split.upstream });
                };
                let path = dataset_file(hub.dataset, &hub.file, options, &self.bars)?;
                let rows = (hub.parse)(&path)?;
                (path, rows)
            }
        };
        let sha256 = sum(&rows);
        let mut facts = DataFacts { name: split.name.clone(), rows: rows.len(), sha256, verified: Some(false) };
        match check(&split, path, &facts) {
            Ok(()) => facts.verified = Some(true),
            Err(error) if !self.unverified || matches!(error, DataError::Empty { .. }) => return Err(error),
            Err(_) => {}
        }
        Ok((rows, facts))
    }
}

/// The file of a split under `dir`, also if `dir` is the folder of this benchmark alone.
fn find<const N: usize>(dir: &Path, split: &Split<N>) -> Result<PathBuf, DataError> {
    if !dir.is_dir() {
        return Err(DataError::NoDirectory(dir.to_path_buf()));
    }
    let short = split.file.split_once('/').map_or(split.file.as_str(), |(_, rest)| rest);
    let paths = [dir.join(&split.file), dir.join(short)];
    paths.into_iter().find(|path| path.is_file()).ok_or_else(|| DataError::Missing {
        split: split.name.clone(),
        dir: dir.to_path_buf(),
        file: split.file.clone(),
        short: short.to_string(),
        upstream: split.upstream,
    })
}

/// Rows and SHA-256 of every published split: `name rows sum`.
const SUMS: &str = include_str!("sums.txt");

fn check<const N: usize>(split: &Split<N>, path: PathBuf, found: &DataFacts) -> Result<(), DataError> {
    let Split { name, upstream, .. } = split;
    if found.rows == 0 {
        return Err(DataError::Empty { split: name.clone(), path });
    }
    let (rows, sum) = published(name).unwrap_or((found.rows, "that is not in sums.txt"));
    if found.rows != rows {
        return Err(DataError::Count { split: name.clone(), path, expected: rows, found: found.rows, upstream });
    }
    if found.sha256 != sum {
        return Err(DataError::Sum { split: name.clone(), path, expected: sum, found: found.sha256.clone(), upstream });
    }
    Ok(())
}

/// Rows and sum of a split in the table.
pub(super) fn published(name: &str) -> Option<(usize, &'static str)> {
    SUMS.lines().find_map(|line| {
        let (rows, sum) = line.strip_prefix(name)?.strip_prefix(' ')?.split_once(' ')?;
        Some((rows.parse().ok()?, sum))
    })
}

/// SHA-256 over rows whatever file they came from: each field as its length in bytes, `:`, the field and `,`, and a
/// newline after each row.
fn sum<const N: usize>(rows: &[[String; N]]) -> String {
    let mut hash = Sha256::new();
    for row in rows {
        for field in row {
            hash.update(format!("{}:{field},", field.len()));
        }
        hash.update("\n");
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests;
