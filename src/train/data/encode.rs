//! From files to a file of tokens.

use super::cache::{TokenFile, TokenWriter};
use super::files::Source;
use super::read::{Piece, pieces};
use super::tokenizer::Loaded;
use super::{DataError, DataSpec, Progress, Stage};
use rayon::prelude::*;
use std::path::Path;

/// Text that is encoded at once, on all threads.
const BATCH_BYTES: usize = 8 << 20;

/// The tokens of `sources`, out of the file `cached` or into it.
///
/// # Errors
/// Files that cannot be read or written; text that the tokenizer refuses.
pub(super) fn tokens(
    spec: &DataSpec,
    sources: &[Source],
    loaded: &Loaded,
    cached: &Path,
    on_progress: &(dyn Fn(Progress) + Sync),
) -> Result<TokenFile, DataError> {
    if let Some(file) = TokenFile::open(cached)? {
        return Ok(file);
    }
    let total = sources.iter().map(|source| source.bytes).sum();
    let mut writer = TokenWriter::new(cached, loaded.vocab)?;
    let (mut batch, mut bytes, mut done) = (Vec::new(), 0, 0);
    for source in sources {
        pieces(&source.path, spec, &mut |piece| {
            bytes += piece.text.len();
            batch.push(piece);
            if bytes >= BATCH_BYTES {
                write(&batch, loaded, &mut writer)?;
                done += bytes as u64;
                on_progress(Progress { stage: Stage::Encoding, done, total });
                batch.clear();
                bytes = 0;
            }
            Ok(())
        })?;
    }
    write(&batch, loaded, &mut writer)?;
    on_progress(Progress { stage: Stage::Encoding, done: total, total });
    writer.finish()?;
    TokenFile::open(cached)?.ok_or_else(|| {
        let problem = std::io::Error::other("what was just written here does not read back the same");
        DataError::Io { path: cached.to_path_buf(), source: problem }
    })
}

fn write(batch: &[Piece], loaded: &Loaded, writer: &mut TokenWriter) -> Result<(), DataError> {
    let encoded: Vec<Vec<u32>> = batch.par_iter().map(|piece| encode(piece, loaded)).collect::<Result<_, _>>()?;
    for (piece, ids) in batch.iter().zip(encoded) {
        let unknown = loaded.unknown.map_or(0, |unknown| ids.iter().filter(|id| **id == unknown).count());
        writer.push(&ids)?;
        writer.count(piece.text.len(), unknown);
        if piece.last {
            writer.end_document(loaded.eos)?;
        }
    }
    Ok(())
}

/// What the tokenizer puts before a text, such as `<s>`, is kept, so that documents begin as prompts do.
fn encode(piece: &Piece, loaded: &Loaded) -> Result<Vec<u32>, DataError> {
    if piece.text.is_empty() {
        return Ok(Vec::new());
    }
    let encoding = loaded.tokenizer.encode_fast(piece.text.as_str(), piece.first).map_err(|error| {
        let name = "data.tokenizer".to_string();
        DataError::Tokenizer { name, doing: "applied to the text", problem: error.to_string() }
    })?;
    let mut ids = encoding.get_ids().to_vec();
    // The document's end is written where it ends.
    if ids.last() == Some(&loaded.eos) {
        ids.pop();
    }
    Ok(ids)
}
