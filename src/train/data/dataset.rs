//! Windows of tokens: which there are, and in which order training sees them.

use super::cache::{Counts, TokenFile};
use super::shuffle::{Permutation, mixed};
use super::{DataError, Packing};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// Target of a position that is not scored.
pub const NOT_SCORED: u32 = u32::MAX;

/// Windows for one step. Row `b` is `inputs[b * seq..][..seq]`, and each target is the token that follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// `[batch, seq]`.
    pub inputs: Vec<u32>,
    /// `[batch, seq]`; [`NOT_SCORED`] where there is padding.
    pub targets: Vec<u32>,
    pub batch: usize,
    pub seq: usize,
}

/// How far training has come. With the seed, all that going on needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    pub epoch: u64,
    /// Windows of the epoch that were seen.
    pub next: u64,
}

/// The tokens of a split. Cheap to clone.
#[derive(Clone)]
pub struct Dataset {
    file: Arc<TokenFile>,
    /// Those of `file` that are of this split.
    tokens: Range<u64>,
    documents: Range<u64>,
    packing: Packing,
    /// Input where there is padding.
    pad: u32,
}

/// Windows of one epoch, before they are shuffled.
struct Layout {
    /// Of a stream: tokens before the first window.
    offset: u64,
    windows: u64,
}

impl Dataset {
    pub(super) fn new(file: Arc<TokenFile>, packing: Packing, pad: u32) -> Self {
        let counts = file.counts();
        Self { file, tokens: 0..counts.tokens, documents: 0..counts.documents, packing, pad }
    }

    /// The first part, and the last `share` of the documents. Where that is less than one document, or all of them, a
    /// stream is split at a token instead.
    pub(super) fn split(self, share: f64) -> Result<(Self, Self), DataError> {
        let documents = self.documents.end;
        let held_out = (documents as f64 * share).round() as u64;
        let by_document = held_out >= 1 && held_out < documents;
        let (document, token) = if by_document {
            let document = documents - held_out;
            (document, self.file.document(document).start)
        } else {
            let tokens = self.tokens.end;
            (documents, tokens - ((tokens as f64 * share).round() as u64).clamp(0, tokens))
        };
        // A stream of fewer than two tokens has nothing to predict.
        let enough = token >= 2 && self.tokens.end - token >= 2;
        if !enough || (!by_document && self.packing == Packing::Padded) {
            return Err(DataError::Split { share, documents });
        }
        let first = Self { tokens: 0..token, documents: 0..document, ..self.clone() };
        Ok((first, Self { tokens: token..self.tokens.end, documents: document..documents, ..self }))
    }

    pub(super) fn counts(&self) -> Counts {
        self.file.counts()
    }

    /// How many tokens there are, documents' ends included.
    pub fn tokens(&self) -> u64 {
        self.tokens.end - self.tokens.start
    }

    /// How many windows of `seq` positions [`Dataset::in_order`] gives. An epoch of a stream has one or two fewer, as
    /// what is left over at its ends makes no window.
    pub fn windows(&self, seq: usize) -> u64 {
        match self.packing {
            Packing::Padded => self.documents.end - self.documents.start,
            Packing::Stream => (self.tokens() - 1).div_ceil(seq.max(1) as u64),
        }
    }

    /// How many targets of [`Dataset::in_order`] are scored: documents longer than a window lose what is beyond it when
    /// each has its own.
    pub fn scored(&self, seq: usize) -> u64 {
        match self.packing {
            Packing::Stream => self.tokens() - 1,
            Packing::Padded => self.documents.clone().map(|d| (self.document_len(d) - 1).min(seq as u64)).sum(),
        }
    }

    /// The next `batch` windows of `seq` positions, and moves `cursor` past them. Every epoch sees every window once, in
    /// an order of its own that depends on `seed`; a batch that an epoch does not fill goes on in the next. In a stream
    /// every epoch's first window begins elsewhere, so that windows do not always end at the same tokens.
    pub fn batch(&self, cursor: &mut Cursor, seed: u64, batch: usize, seq: usize) -> Batch {
        let mut out = Batch::with_capacity(batch, seq);
        while out.batch < batch && seq > 0 {
            let layout = self.layout(seed, cursor.epoch, seq as u64);
            if cursor.next >= layout.windows {
                *cursor = Cursor { epoch: cursor.epoch.wrapping_add(1), next: 0 };
                continue;
            }
            let order = Permutation::new(layout.windows, seed, cursor.epoch);
            while out.batch < batch && cursor.next < layout.windows {
                self.add(&mut out, layout.offset, order.at(cursor.next));
                cursor.next += 1;
            }
        }
        out
    }

    /// All windows of `seq` positions, in order, `batch` at a time; the last batch may have fewer. In a stream every
    /// token but the first is scored once.
    pub fn in_order(&self, batch: usize, seq: usize) -> impl Iterator<Item = Batch> {
        let (batch, seq) = (batch.max(1), seq.max(1));
        let windows = self.windows(seq);
        (0..windows).step_by(batch).map(move |start| {
            let end = windows.min(start + batch as u64);
            let mut out = Batch::with_capacity((end - start) as usize, seq);
            (start..end).for_each(|window| self.add(&mut out, 0, window));
            out
        })
    }

    fn document_len(&self, document: u64) -> u64 {
        let range = self.file.document(document);
        range.end - range.start
    }

    fn layout(&self, seed: u64, epoch: u64, seq: u64) -> Layout {
        let pairs = self.tokens() - 1;
        match self.packing {
            Packing::Padded => Layout { offset: 0, windows: self.documents.end - self.documents.start },
            // Too short for a whole window: one that is padded.
            Packing::Stream if pairs <= seq => Layout { offset: 0, windows: 1 },
            Packing::Stream => {
                let offset = mixed(!seed, epoch) % seq.min(pairs - seq + 1);
                Layout { offset, windows: (pairs - offset) / seq }
            }
        }
    }

    /// Appends a window to `out`.
    fn add(&self, out: &mut Batch, offset: u64, window: u64) {
        let seq = out.seq;
        let range = match self.packing {
            Packing::Padded => self.file.document(self.documents.start + window),
            Packing::Stream => self.tokens.start + offset + window * seq as u64..self.tokens.end,
        };
        let mut tokens = self.file.tokens(range.start..range.end.min(range.start + seq as u64 + 1));
        let mut input = tokens.next().unwrap_or(self.pad);
        for _ in 0..seq {
            let target = tokens.next();
            out.inputs.push(input);
            out.targets.push(target.unwrap_or(NOT_SCORED));
            input = target.unwrap_or(self.pad);
        }
        out.batch += 1;
    }
}

impl Batch {
    /// Keeps the first `batch` windows.
    pub fn truncate(&mut self, batch: usize) {
        self.batch = self.batch.min(batch);
        self.inputs.truncate(self.batch * self.seq);
        self.targets.truncate(self.batch * self.seq);
    }

    fn with_capacity(batch: usize, seq: usize) -> Self {
        let (inputs, targets) = (Vec::with_capacity(batch * seq), Vec::with_capacity(batch * seq));
        Self { inputs, targets, batch: 0, seq }
    }
}
