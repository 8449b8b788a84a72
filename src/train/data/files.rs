//! The files that hold the data: where they are and what they hash to.

use super::{DataError, DataSpec, Format, Progress, Stage};
use crate::types::hex;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Folders of the One Billion Word benchmark.
const TRAINING: &str = "training-monolingual.tokenized.shuffled";
const HELD_OUT: &str = "heldout-monolingual.tokenized.shuffled";
/// How the names of files begin that stand beside data and are none.
const ABOUT: [&str; 4] = [".", "README", "LICENSE", "SOURCE"];

/// A file and its contents' sum.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub path: PathBuf,
    pub bytes: u64,
    /// In hexadecimal digits.
    pub sha256: String,
}

/// Files of both splits; those of `valid` are none where it is split off `train`.
pub(super) struct Sources {
    pub train: Vec<Source>,
    pub valid: Vec<Source>,
}

impl Sources {
    /// Finds and hashes the files that `spec` names.
    ///
    /// # Errors
    /// A path that is missing or cannot be read, a folder without data.
    pub(super) fn find(spec: &DataSpec, on_progress: &(dyn Fn(Progress) + Sync)) -> Result<Self, DataError> {
        let train = files(&spec.train, TRAINING, spec)?;
        let held_out = if spec.valid.is_empty() { held_out_folders(spec)? } else { spec.valid.clone() };
        let valid = files(&held_out, HELD_OUT, spec)?;
        let mut all = hashed(train.iter().chain(&valid), on_progress)?;
        let valid = all.split_off(train.len());
        all.retain(|source| valid.iter().all(|other| other.sha256 != source.sha256));
        if all.is_empty() {
            let problem = "every file of it is in data.valid too".to_string();
            return Err(DataError::Spec { field: "train", problem });
        }
        Ok(Self { train: all, valid })
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Source> {
        self.train.iter().chain(&self.valid)
    }
}

/// Everything below a folder, itself included. Links to folders are not followed.
#[derive(Default)]
struct Tree {
    files: Vec<PathBuf>,
    folders: Vec<PathBuf>,
}

impl Tree {
    fn add(&mut self, folder: &Path) -> Result<(), DataError> {
        self.folders.push(folder.to_path_buf());
        for entry in fs::read_dir(folder).map_err(DataError::io(folder))? {
            let entry = entry.map_err(DataError::io(folder))?;
            let path = entry.path();
            if entry.file_type().map_err(DataError::io(&path))?.is_dir() {
                self.add(&path)?;
            } else if path.is_file() {
                self.files.push(path);
            }
        }
        Ok(())
    }

    fn of(folder: &Path) -> Result<Self, DataError> {
        let mut tree = Self::default();
        tree.add(folder)?;
        tree.files.sort();
        tree.folders.sort();
        Ok(tree)
    }

    fn folder(&self, name: &str) -> Option<&PathBuf> {
        self.folders.iter().find(|folder| folder.ends_with(name))
    }
}

/// The files that `paths` name; of a folder that has `part` below it, those of that part.
fn files(paths: &[PathBuf], part: &str, spec: &DataSpec) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    for path in paths {
        if !is_folder(path, spec)? {
            files.push(path.clone());
            continue;
        }
        let mut tree = Tree::of(path)?;
        if spec.format == Format::Lines
            && let Some(folder) = tree.folder(part).cloned()
        {
            tree.files.retain(|file| file.starts_with(&folder));
        }
        tree.files.retain(|file| is_data(file, spec.format));
        if tree.files.is_empty() {
            let (format, names) = names(spec.format);
            return Err(DataError::NoFiles { path: path.clone(), format, names, hint: spec.hint() });
        }
        files.append(&mut tree.files);
    }
    Ok(files)
}

/// Held-out folders of the One Billion Word benchmark below the folders of `train`.
fn held_out_folders(spec: &DataSpec) -> Result<Vec<PathBuf>, DataError> {
    let mut folders = Vec::new();
    for path in &spec.train {
        if spec.format == Format::Lines && is_folder(path, spec)? {
            folders.extend(Tree::of(path)?.folder(HELD_OUT).cloned());
        }
    }
    Ok(folders)
}

fn is_folder(path: &Path, spec: &DataSpec) -> Result<bool, DataError> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.is_dir()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(DataError::Missing { path: path.to_path_buf(), hint: spec.hint() })
        }
        Err(error) => Err(DataError::io(path)(error)),
    }
}

fn is_data(file: &Path, format: Format) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let fits = match format {
        Format::Text => name.ends_with(".txt"),
        Format::Jsonl => name.ends_with(".jsonl"),
        Format::Lines => name.starts_with("news.en") || name.ends_with(".txt") || name.ends_with(".tokens"),
    };
    fits && !ABOUT.iter().any(|about| name.starts_with(about))
}

fn names(format: Format) -> (&'static str, &'static str) {
    match format {
        Format::Text => ("text", "*.txt"),
        Format::Jsonl => ("jsonl", "*.jsonl"),
        Format::Lines => ("lines", "news.en*, *.txt, *.tokens"),
    }
}

fn hashed<'a>(
    paths: impl Iterator<Item = &'a PathBuf>,
    on_progress: &(dyn Fn(Progress) + Sync),
) -> Result<Vec<Source>, DataError> {
    let mut sized = Vec::new();
    for path in paths {
        sized.push((path, fs::metadata(path).map_err(DataError::io(path))?.len()));
    }
    let total = sized.iter().map(|(_, bytes)| bytes).sum();
    let done = AtomicU64::new(0);
    let source = |(path, _): &(&PathBuf, u64)| -> Result<Source, DataError> {
        let mut file = File::open(path).map_err(DataError::io(path))?;
        let (mut hasher, mut bytes) = (Sha256::new(), 0);
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = file.read(&mut buffer).map_err(DataError::io(path))?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
            bytes += n as u64;
            let done = done.fetch_add(n as u64, Ordering::Relaxed) + n as u64;
            on_progress(Progress { stage: Stage::Checksum, done, total });
        }
        Ok(Source { path: path.to_path_buf(), bytes, sha256: hex(&hasher.finalize()) })
    };
    sized.par_iter().map(source).collect()
}
