//! Documents out of files, in pieces of bounded size: no file is held in memory as a whole, a line of it at most.

use super::fold::to_ascii;
use super::{DataError, DataSpec, Format, Normalise};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// A document longer than twice this is given in pieces of at most this many bytes.
const PIECE_BYTES: usize = 64 << 10;
const BLOCK_BYTES: u64 = 1 << 20;

/// A document's text, or a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub text: String,
    /// Whether the document begins here.
    pub first: bool,
    /// Whether it ends here.
    pub last: bool,
}

/// Gives `each` the documents of `file`, in order. Blank documents are left out.
///
/// Long documents are cut before a single space or line break that follows on text, where the tokenizers of GPT-2's
/// kind begin a token anyway.
///
/// # Errors
/// A file that cannot be read, is not UTF-8 or not of the format; what `each` returns.
pub(super) fn pieces(
    file: &Path,
    spec: &DataSpec,
    each: &mut dyn FnMut(Piece) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let fold = spec.normalise == Normalise::Ascii;
    let trim = spec.separator.is_some();
    let mut out = Pieces { fold, trim, open: false, each };
    match spec.format {
        Format::Text => text(file, spec.separator.as_deref(), &mut out),
        Format::Lines => lines(file, |_, line| out.document(line)),
        Format::Jsonl => lines(file, |number, line| {
            let found = field(line, &spec.field);
            let text = found.map_err(|problem| DataError::Line { path: file.to_path_buf(), line: number, problem })?;
            out.document(&text)
        }),
    }
}

struct Pieces<'a> {
    fold: bool,
    /// Whether white space around documents is no part of them.
    trim: bool,
    /// Whether something of the current document was given.
    open: bool,
    each: &'a mut dyn FnMut(Piece) -> Result<(), DataError>,
}

impl Pieces<'_> {
    /// Text that ends a document.
    fn document(&mut self, text: &str) -> Result<(), DataError> {
        let rest = self.part(text)?;
        self.give(rest, true)
    }

    /// Gives what is long enough of `text`, which does not end the document, and returns the rest.
    fn part<'t>(&mut self, mut text: &'t str) -> Result<&'t str, DataError> {
        while text.len() > 2 * PIECE_BYTES {
            let (piece, rest) = text.split_at(cut(text));
            self.give(piece, false)?;
            text = rest;
        }
        Ok(text)
    }

    fn give(&mut self, mut text: &str, last: bool) -> Result<(), DataError> {
        if !self.open && (self.trim || text.trim().is_empty()) {
            text = text.trim_start();
        }
        if last && self.trim {
            text = text.trim_end();
        }
        let first = !self.open;
        if first && text.is_empty() {
            return Ok(());
        }
        self.open = !last;
        let text = if self.fold { to_ascii(text) } else { text.to_string() };
        (self.each)(Piece { text, first, last })
    }
}

/// Where to cut a text of more than `PIECE_BYTES`.
fn cut(text: &str) -> usize {
    let bytes = text.as_bytes();
    let between = |at: &usize| {
        matches!(bytes[*at], b' ' | b'\n')
            && !bytes[at - 1].is_ascii_whitespace()
            && !bytes[at + 1].is_ascii_whitespace()
    };
    let anywhere = || (1..=PIECE_BYTES).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    (1..PIECE_BYTES).rev().find(between).unwrap_or_else(anywhere)
}

fn text(file: &Path, separator: Option<&str>, out: &mut Pieces<'_>) -> Result<(), DataError> {
    let mut source = File::open(file).map_err(DataError::io(file))?;
    let (mut bytes, mut pending) = (Vec::new(), String::new());
    let mut read = 0;
    loop {
        let before = bytes.len();
        source.by_ref().take(BLOCK_BYTES).read_to_end(&mut bytes).map_err(DataError::io(file))?;
        let ended = bytes.len() == before;
        let whole = whole_characters(&bytes, ended)
            .map_err(|at| DataError::NotUtf8 { path: file.to_path_buf(), at: read + at as u64 })?;
        let text = if read == 0 { whole.strip_prefix('\u{feff}').unwrap_or(whole) } else { whole };
        pending.push_str(text);
        let used = whole.len();
        read += used as u64;
        bytes.drain(..used);

        let mut rest = pending.as_str();
        while let Some((document, after)) = separator.and_then(|s| rest.split_once(s)) {
            out.document(document)?;
            rest = after;
        }
        if ended {
            return out.document(rest);
        }
        // What stays is longer than any separator of which only the beginning may have been read.
        let kept = out.part(rest)?.len();
        pending.drain(..pending.len() - kept);
    }
}

/// The characters that `bytes` hold wholly; where they go wrong.
fn whole_characters(bytes: &[u8], ended: bool) -> Result<&str, usize> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) => {
            let (valid, _) = bytes.split_at(error.valid_up_to());
            let whole = std::str::from_utf8(valid).map_err(|_| error.valid_up_to())?;
            if ended || error.error_len().is_some() { Err(error.valid_up_to()) } else { Ok(whole) }
        }
    }
}

/// Gives `each` the lines of `file` that are not blank, with their numbers from 1, without line ends.
fn lines(file: &Path, mut each: impl FnMut(u64, &str) -> Result<(), DataError>) -> Result<(), DataError> {
    let mut reader = BufReader::new(File::open(file).map_err(DataError::io(file))?);
    let mut bytes = Vec::new();
    for number in 1.. {
        bytes.clear();
        if reader.read_until(b'\n', &mut bytes).map_err(DataError::io(file))? == 0 {
            break;
        }
        let Ok(line) = std::str::from_utf8(&bytes) else {
            let problem = "the line is not UTF-8, which text must be".to_string();
            return Err(DataError::Line { path: file.to_path_buf(), line: number, problem });
        };
        let line = if number == 1 { line.strip_prefix('\u{feff}').unwrap_or(line) } else { line };
        let line = line.strip_suffix('\n').unwrap_or(line);
        let line = line.strip_suffix('\r').unwrap_or(line);
        if !line.trim().is_empty() {
            each(number, line)?;
        }
    }
    Ok(())
}

fn field(line: &str, name: &str) -> Result<String, String> {
    let mut object: Map<String, Value> =
        serde_json::from_str(line).map_err(|error| format!("this is no JSON object: {error}"))?;
    match object.remove(name) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("field `{name}` is not a string; data.field names the one that holds the text")),
        None => {
            let has: Vec<&str> = object.keys().take(8).map(String::as_str).collect();
            Err(format!("there is no field `{name}` (it has: {}); data.field names it", has.join(", ")))
        }
    }
}
