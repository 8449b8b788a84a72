//! A checkpoint's identity.

use super::LoadError;
use super::hub::Files;
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

fn sum(path: &Path) -> Result<String, LoadError> {
    let blob = path.canonicalize().ok().filter(|target| target.parent().is_some_and(|dir| dir.ends_with("blobs")));
    let name = blob.and_then(|target| Some(target.file_name()?.to_str()?.to_string()));
    let digits = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    if let Some(name) = name.filter(|name| name.len() == 64 && name.chars().all(digits)) {
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
