//! A split's tokens in a file that is mapped into memory: what encoding made once is there the next time.
//!
//! Layout, little-endian: [`HEADER`] bytes (magic, bytes per token, tokens, documents, bytes of text, unknown tokens, the
//! SHA-256 of all that follows), the tokens, zeros up to a multiple of 8, and per document where its tokens end (u64).

use super::DataError;
use memmap2::Mmap;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"moetok01";
const HEADER: usize = 80;
const SUM_AT: usize = 48;

/// Counts of an encoded split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub tokens: u64,
    pub documents: u64,
    /// Of the text.
    pub bytes: u64,
    /// Tokens that stand for something outside the vocabulary.
    pub unknown: u64,
}

/// Encoded documents, read-only.
pub(super) struct TokenFile {
    map: Mmap,
    /// Bytes per token: 2 or 4.
    width: usize,
    counts: Counts,
    index_at: usize,
}

impl TokenFile {
    /// None where there is no such file, or where it is damaged.
    ///
    /// # Errors
    /// A file that is there and cannot be read.
    pub(super) fn open(path: &Path) -> Result<Option<Self>, DataError> {
        let Ok(file) = File::open(path) else { return Ok(None) };
        // SAFETY: the file was renamed to this path when it was whole, and nobody writes to it after that: a new one
        // takes its place, and the map keeps the old one.
        let map = unsafe { Mmap::map(&file) }.map_err(DataError::io(path))?;
        Ok(Self::checked(map))
    }

    fn checked(map: Mmap) -> Option<Self> {
        let header = map.get(..HEADER)?;
        let number = |at: usize| Some(u64::from_le_bytes(header.get(at..at + 8)?.try_into().ok()?));
        let (width, tokens, documents) = (number(8)?, number(16)?, number(24)?);
        let counts = Counts { tokens, documents, bytes: number(32)?, unknown: number(40)? };
        let body = tokens.checked_mul(width)?.checked_next_multiple_of(8)?;
        let index_at = usize::try_from(body).ok()?.checked_add(HEADER)?;
        let length = usize::try_from(documents.checked_mul(8)?).ok()?.checked_add(index_at)?;
        let whole = header.starts_with(MAGIC) && matches!(width, 2 | 4) && map.len() == length;
        if !whole || Sha256::digest(&map[HEADER..]).as_slice() != &header[SUM_AT..] {
            return None;
        }
        let file = Self { map, width: width as usize, counts, index_at };
        let mut end = 0;
        let rising = (0..documents).all(|document| {
            let range = file.document(document);
            end = range.end;
            range.start <= range.end
        });
        (rising && end == tokens).then_some(file)
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// Where the tokens of `document` are.
    pub(super) fn document(&self, document: u64) -> Range<u64> {
        let end = |document: u64| {
            let at = self.index_at + 8 * document as usize;
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&self.map[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        document.checked_sub(1).map_or(0, end)..end(document)
    }

    pub(super) fn tokens(&self, range: Range<u64>) -> impl Iterator<Item = u32> {
        let at = |token: u64| HEADER + token as usize * self.width;
        let bytes = &self.map[at(range.start)..at(range.end)];
        bytes.chunks_exact(self.width).map(|token| match *token {
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("tokens have two or four bytes"),
        })
    }
}

/// A file that is removed unless it was renamed.
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        // After the renaming there is nothing left to remove.
        let _ = fs::remove_file(&self.0);
    }
}

/// Writes a [`TokenFile`], document by document.
pub(super) struct TokenWriter {
    path: PathBuf,
    part: Part,
    tokens: BufWriter<File>,
    /// The documents' ends, until the tokens are complete.
    index_part: Part,
    index: BufWriter<File>,
    hasher: Sha256,
    width: usize,
    counts: Counts,
    document_start: u64,
}

impl TokenWriter {
    /// For the file `path`, of tokens below `vocab`. The file is there after [`TokenWriter::finish`].
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub(super) fn new(path: &Path, vocab: usize) -> Result<Self, DataError> {
        let create = |extension: String| -> Result<(Part, BufWriter<File>), DataError> {
            let path = path.with_extension(extension);
            let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
            let file = file.map_err(DataError::io(&path))?;
            Ok((Part(path), BufWriter::with_capacity(1 << 18, file)))
        };
        let process = std::process::id();
        let (part, mut tokens) = create(format!("{process}.part"))?;
        let (index_part, index) = create(format!("{process}.index.part"))?;
        tokens.write_all(&[0; HEADER]).map_err(DataError::io(&part.0))?;
        let width = if vocab <= 1 << 16 { 2 } else { 4 };
        let (hasher, counts) = (Sha256::new(), Counts::default());
        Ok(Self { path: path.into(), part, tokens, index_part, index, hasher, width, counts, document_start: 0 })
    }

    /// Appends to the current document.
    pub(super) fn push(&mut self, ids: &[u32]) -> Result<(), DataError> {
        let mut bytes = Vec::with_capacity(ids.len() * self.width);
        ids.iter().for_each(|id| bytes.extend_from_slice(&id.to_le_bytes()[..self.width]));
        self.counts.tokens += ids.len() as u64;
        self.hasher.update(&bytes);
        self.tokens.write_all(&bytes).map_err(DataError::io(&self.part.0))
    }

    /// Notes text that was encoded.
    pub(super) fn count(&mut self, bytes: usize, unknown: usize) {
        self.counts.bytes += bytes as u64;
        self.counts.unknown += unknown as u64;
    }

    /// Ends the document with the token `eos`. One that has no tokens is none.
    pub(super) fn end_document(&mut self, eos: u32) -> Result<(), DataError> {
        if self.counts.tokens == self.document_start {
            return Ok(());
        }
        self.push(&[eos])?;
        self.document_start = self.counts.tokens;
        self.counts.documents += 1;
        self.index.write_all(&self.document_start.to_le_bytes()).map_err(DataError::io(&self.index_part.0))
    }

    /// Puts the file in its place.
    pub(super) fn finish(self) -> Result<(), DataError> {
        let path = self.path.clone();
        self.complete().map_err(DataError::io(&path))
    }

    fn complete(mut self) -> std::io::Result<()> {
        let length = self.counts.tokens as usize * self.width;
        let padding = vec![0; length.next_multiple_of(8) - length];
        self.hasher.update(&padding);
        self.tokens.write_all(&padding)?;

        self.index.flush()?;
        self.index.rewind()?;
        let mut index = BufReader::new(self.index.get_ref());
        let mut block = vec![0; 1 << 18];
        loop {
            match index.read(&mut block)? {
                0 => break,
                n => {
                    self.hasher.update(&block[..n]);
                    self.tokens.write_all(&block[..n])?;
                }
            }
        }

        let mut header = MAGIC.to_vec();
        let Counts { tokens, documents, bytes, unknown } = self.counts;
        for number in [self.width as u64, tokens, documents, bytes, unknown] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        header.extend_from_slice(&self.hasher.finalize());
        self.tokens.rewind()?;
        self.tokens.write_all(&header)?;
        self.tokens.flush()?;
        fs::rename(&self.part.0, &self.path)
    }
}
