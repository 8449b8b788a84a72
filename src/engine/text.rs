//! Text and tokens: encoding, and decoding token by token with stop strings.

use crate::types::TokenId;
use std::path::Path;
use std::sync::Arc;
use tokenizers::Tokenizer;

/// Why a tokenizer could not be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TextError(String);

/// A checkpoint's tokenizer.
#[derive(Clone)]
pub struct Text {
    tokenizer: Arc<Tokenizer>,
}

impl Text {
    /// Reads a tokenizer.json. Truncation and padding that it may ask for are switched off.
    ///
    /// # Errors
    /// A file that is missing or invalid, or whose ids do not fit a vocabulary of `vocab`.
    pub fn read(path: &Path, vocab: usize) -> Result<Self, TextError> {
        let error = |e: &dyn std::fmt::Display| TextError(format!("{}: {e}", path.display()));
        let mut tokenizer = Tokenizer::from_file(path).map_err(|e| error(&e))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| error(&e))?;
        let last = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        if last as usize >= vocab {
            return Err(error(&format!("holds token id {last}, but the model has a vocabulary of {vocab}")));
        }
        Ok(Self { tokenizer: Arc::new(tokenizer) })
    }

    /// Ids of `text`, special tokens added as the tokenizer's post-processor has it.
    ///
    /// # Errors
    /// A text the tokenizer cannot take.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, TextError> {
        let encoding = self.tokenizer.encode_fast(text, true).map_err(|e| TextError(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        // Ids come from the model's own vocabulary; one that the tokenizer does not know decodes to nothing.
        self.tokenizer.decode(ids, skip_special).unwrap_or_default()
    }
}

/// Tokens of context a decoder needs to get spaces right: enough for every decoder in use.
const CONTEXT_TOKENS: usize = 6;
/// Tokens after which an unfinished character is taken for invalid bytes: UTF-8 has at most 4 bytes.
const UNFINISHED_TOKENS_MAX: usize = 4;

/// Turns one completion's tokens into text that can be sent: whole characters, and nothing that may still turn out
/// to be the beginning of a stop string.
pub(super) struct TextStream {
    text: Text,
    skip_special: bool,
    stops: Vec<String>,
    /// Context and tokens not yet sent in full.
    ids: Vec<TokenId>,
    /// `ids[..sent]` is context: its text is out.
    sent: usize,
    /// Text held back.
    held: String,
}

impl TextStream {
    /// After `prompt`, whose last tokens are context.
    pub(super) fn new(text: Text, prompt: &[TokenId], skip_special: bool, stops: Vec<String>) -> Self {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..].to_vec();
        Self { text, skip_special, stops, sent: ids.len(), ids, held: String::new() }
    }

    /// Adds a token. Gives the text that can be sent, and whether a stop string ended the completion; where it
    /// `may_stop` not yet, what was said so far is no part of any stop string.
    pub(super) fn push(&mut self, id: TokenId, may_stop: bool) -> (String, bool) {
        self.ids.push(id);
        let fresh = self.fresh(false);
        self.held.push_str(&fresh);
        if may_stop { self.release(false) } else { (std::mem::take(&mut self.held), false) }
    }

    /// Everything still held back; the completion ends here.
    pub(super) fn finish(&mut self) -> (String, bool) {
        let fresh = self.fresh(true);
        self.held.push_str(&fresh);
        self.release(true)
    }

    /// Text of the tokens not sent, if it ends with a whole character (or must be had anyway).
    fn fresh(&mut self, anyway: bool) -> String {
        let before = self.text.decode(&self.ids[..self.sent], self.skip_special);
        let after = self.text.decode(&self.ids, self.skip_special);
        let unfinished = after.ends_with('\u{FFFD}');
        if unfinished && !anyway && self.ids.len() - self.sent <= UNFINISHED_TOKENS_MAX {
            return String::new();
        }
        // A decoder that looks back further than the context would break this; then the whole text stands.
        let fresh = after.strip_prefix(&before).map_or_else(|| after.clone(), String::from);
        let keep = self.ids.len().saturating_sub(CONTEXT_TOKENS);
        self.ids.drain(..keep);
        self.sent = self.ids.len();
        fresh
    }

    fn release(&mut self, all: bool) -> (String, bool) {
        // The stop string that begins first ends the text; of those, the order of the request does not matter.
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = found {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let keep = if all { 0 } else { self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0) };
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

/// Bytes of the longest proper beginning of `stop` that `text` ends with.
fn overlap(text: &str, stop: &str) -> usize {
    let beginnings = stop.char_indices().map(|(at, _)| at).skip(1);
    beginnings.filter(|&at| text.ends_with(&stop[..at])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text() -> Text {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/stories-mixtral/tokenizer.json");
        Text::read(Path::new(path), 4096).unwrap()
    }

    /// Streams `ids` after a prompt and gives the pieces until a stop string ends it.
    fn stream(text: &Text, ids: &[TokenId], stops: &[&str]) -> (Vec<String>, bool) {
        let prompt = text.encode("Once upon a time").unwrap();
        let mut stream = TextStream::new(text.clone(), &prompt, true, stops.iter().map(|s| s.to_string()).collect());
        let mut pieces = Vec::new();
        for id in ids {
            let (piece, stopped) = stream.push(*id, true);
            pieces.push(piece);
            if stopped {
                return (pieces, true);
            }
        }
        let (piece, stopped) = stream.finish();
        pieces.push(piece);
        (pieces, stopped)
    }

    #[test]
    fn characters_of_several_tokens_are_never_split() {
        let text = text();
        let original = "a ☃ and 日本語 and 🦀!";
        let ids = text.encode(original).unwrap();
        assert!(ids.len() > original.chars().count(), "the tokenizer knows these characters whole: nothing is tested");
        let (pieces, stopped) = stream(&text, &ids, &[]);
        assert_eq!((pieces.concat().as_str(), stopped), (original, false));
        assert!(pieces.iter().all(|p| !p.contains('\u{FFFD}')));
    }

    #[test]
    fn bytes_that_are_no_character_come_out_as_replacements_and_do_not_pile_up() {
        let text = text();
        let crab = text.encode("🦀").unwrap();
        let (pieces, _) = stream(&text, &crab[..1].repeat(12), &[]);
        assert!(pieces.concat().contains('\u{FFFD}'));
        assert!(pieces[..10].iter().any(|p| !p.is_empty()), "all was held back: {pieces:?}");
    }

    #[test]
    fn a_stop_string_across_tokens_ends_the_text_before_it_and_leaks_nothing() {
        let text = text();
        let ids = text.encode("The cat sat on the mat. END of the story.").unwrap();
        let (pieces, stopped) = stream(&text, &ids, &["mat. END", "story"]);
        assert!(stopped);
        assert_eq!(pieces.concat(), "The cat sat on the ");
        let (pieces, stopped) = stream(&text, &ids, &["END of everything"]);
        assert_eq!((pieces.concat().as_str(), stopped), ("The cat sat on the mat. END of the story.", false));
    }

    #[test]
    fn a_stop_string_before_the_least_length_is_text() {
        let text = text();
        let ids = text.encode("END and again END and more").unwrap();
        let mut stream = TextStream::new(text.clone(), &[0], true, vec!["END".into()]);
        let mut pieces = String::new();
        let mut stopped = false;
        for (i, id) in ids.iter().enumerate() {
            let (piece, stop) = stream.push(*id, i >= ids.len() / 2 - 1);
            pieces.push_str(&piece);
            stopped |= stop;
            if stopped {
                break;
            }
        }
        assert_eq!((pieces.as_str(), stopped), ("END and again ", true));
    }

    #[test]
    fn a_tokenizer_that_does_not_fit_the_model_is_refused() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/stories-mixtral/tokenizer.json");
        let error = Text::read(Path::new(path), 100).err().unwrap().to_string();
        assert!(error.contains("token id 4095") && error.contains("vocabulary of 100"), "{error}");
        assert!(Text::read(Path::new("/nowhere/tokenizer.json"), 100).is_err());
    }

    proptest! {
        #[test]
        fn streaming_gives_the_text_up_to_the_first_stop(
            words in proptest::collection::vec("[a-c ☃é]{1,6}", 1..12), stop in "[a-c]{1,3}"
        ) {
            let text = text();
            let ids = text.encode(&words.join(" ")).unwrap();
            let (whole, _) = stream(&text, &ids, &[]);
            let whole = whole.concat();
            let (pieces, stopped) = stream(&text, &ids, &[&stop]);
            let want = whole.find(&stop).map_or(whole.as_str(), |at| &whole[..at]);
            prop_assert_eq!((pieces.concat(), stopped), (want.to_string(), whole.contains(&stop)));
        }
    }
}
