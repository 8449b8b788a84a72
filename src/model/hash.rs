//! A checkpoint's identity.

use super::LoadError;
use super::config::Config;
use super::hub::Files;
use super::load::Source;
use crate::types::hex;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// SHA-256, in hexadecimal digits, over the names and SHA-256 sums of the files that decide what a model computes:
/// config.json, generation_config.json, tokenizer.json and the weights. Blobs of the hub's cache carry their sum in their name; other files
/// are read.
///
/// # Errors
/// A file that cannot be read.
pub fn hash(files: &Files) -> Result<String, LoadError> {
    let mut paths = vec![&files.config, &files.tokenizer];
    paths.extend(&files.generation_config);
    paths.extend(&files.weights);
    let sums: Vec<String> = paths.par_iter().map(|path| sum(path)).collect::<Result<_, _>>()?;
    let mut hasher = Sha256::new();
    for (path, sum) in paths.iter().zip(sums) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        hasher.update(format!("{sum}  {name}\n"));
    }
    Ok(hex(&hasher.finalize()))
}

/// What tells a checkpoint's packed weights from others without reading it: SHA-256 over config.json, `form`, and of every
/// file of weights its blob's sum in the hub's cache, else its path, size and time of change; of random ones the seed.
///
/// # Errors
/// A file that is not there.
pub(super) fn stamp(source: Source<'_>, config: &Config, form: &str) -> Result<String, LoadError> {
    let mut hasher = Sha256::new();
    hasher.update(format!("{form}\n{}\n", config.text()));
    match source {
        Source::Files(files) => {
            for path in &files.weights {
                let line = match blob(path) {
                    Some(sum) => sum,
                    None => {
                        let path = path.canonicalize().map_err(LoadError::io(path))?;
                        let metadata = path.metadata().map_err(LoadError::io(&path))?;
                        format!("{} {} {:?}", path.display(), metadata.len(), metadata.modified().ok())
                    }
                };
                hasher.update(format!("{line}\n"));
            }
        }
        Source::Random { seed, .. } => hasher.update(format!("random {seed}\n")),
    }
    Ok(hex(&hasher.finalize()))
}

/// The sum of a file in the hub's cache, where it is its name.
fn blob(path: &Path) -> Option<String> {
    let target = path.canonicalize().ok().filter(|target| target.parent().is_some_and(|dir| dir.ends_with("blobs")))?;
    let name = target.file_name()?.to_str()?.to_string();
    let digits = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    (name.len() == 64 && name.chars().all(digits)).then_some(name)
}

fn sum(path: &Path) -> Result<String, LoadError> {
    if let Some(name) = blob(path) {
        return Ok(name);
    }
    let mut hasher = Sha256::new();
    let mut file = File::open(path).map_err(LoadError::io(path))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(LoadError::io(path))? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    Ok(hex(&hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn every_file_counts_and_so_does_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| -> PathBuf {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let files = Files {
            config: file("config.json", "{}"),
            generation_config: None,
            tokenizer: file("tokenizer.json", "{\"a\": 1}"),
            tokenizer_config: None,
            chat_template: None,
            weights: vec![file("model.safetensors", "weights")],
        };
        let first = hash(&files).unwrap();
        assert_eq!(first.len(), 64);
        assert_eq!(hash(&files).unwrap(), first);
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            let path = dir.path().join(name);
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, format!("{text} ")).unwrap();
            assert_ne!(hash(&files).unwrap(), first, "{name}");
            std::fs::write(&path, text).unwrap();
        }
        std::fs::remove_file(dir.path().join("config.json")).unwrap();
        assert!(hash(&files).unwrap_err().to_string().contains("config.json"));
    }
}
