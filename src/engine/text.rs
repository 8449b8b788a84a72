//! Text and tokens: encoding, and decoding token by token with stop strings.

use super::vocab::TokenBytes;
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
    bytes: Arc<TokenBytes>,
    token_bytes_max: usize,
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
        let vocabulary = tokenizer.get_vocab(true);
        let token_bytes_max = vocabulary.keys().map(String::len).max().unwrap_or(1);
        let last = vocabulary.into_values().max().unwrap_or(0);
        if last as usize >= vocab {
            return Err(error(&format!("holds token id {last}, but the model has a vocabulary of {vocab}")));
        }
        let bytes = Arc::new(TokenBytes::new(&tokenizer, vocab));
        Ok(Self { tokenizer: Arc::new(tokenizer), bytes, token_bytes_max })
    }

    /// Ids of `text`, with the special tokens of the tokenizer's post-processor where these are wanted.
    ///
    /// # Errors
    /// A text the tokenizer cannot take.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, TextError> {
        let encoding = self.tokenizer.encode_fast(text, add_special_tokens).map_err(|e| TextError(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The id of the special token `name`.
    pub(super) fn special_token(&self, name: &str) -> Option<TokenId> {
        self.tokenizer.token_to_id(name).filter(|id| self.bytes.is_special(*id))
    }

    /// The bytes that a token stands for, alone; of a special token, its name.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.bytes.bytes(id)
    }

    /// The bytes of every token.
    pub(super) fn bytes(&self) -> &Arc<TokenBytes> {
        &self.bytes
    }

    /// Bytes of the longest token: no text of n tokens is longer than n times this.
    pub(super) fn token_bytes_max(&self) -> usize {
        self.token_bytes_max
    }

    /// The text that each token adds to those before it.
    pub(super) fn pieces(&self, ids: &[TokenId], skip_special: bool) -> Vec<String> {
        let mut stream = TextStream::new(self.clone(), &[], skip_special, Vec::new());
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id, true).0).collect();
        if let Some(last) = pieces.last_mut() {
            last.push_str(&stream.finish().0);
        }
        pieces
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
/// What bytes that are no character decode to.
const REPLACEMENT: char = '\u{FFFD}';

/// Turns one completion's tokens into text that can be sent: whole characters, and nothing that may still turn out
/// to be the beginning of a stop string.
pub(super) struct TextStream {
    text: Text,
    skip_special: bool,
    stops: Vec<String>,
    /// Context and tokens not yet sent in full. Begins where text was sent up to, so that no character is cut.
    ids: Vec<TokenId>,
    /// How many of `ids` there were when text was last sent.
    sent: usize,
    /// What of `ids`' text is out.
    before: String,
    /// Where `ids` can be cut next: text was sent up to there.
    cut: usize,
    /// Text held back.
    held: String,
    /// Characters given out.
    given: usize,
}

impl TextStream {
    /// After `prompt`, whose last tokens are context.
    pub(super) fn new(text: Text, prompt: &[TokenId], skip_special: bool, stops: Vec<String>) -> Self {
        let suffix = |len: usize| &prompt[prompt.len().saturating_sub(len)..];
        let starts = |ids: &&[TokenId]| !text.decode(ids, skip_special).starts_with(REPLACEMENT);
        // A few tokens more if these begin within a character.
        let ids = (CONTEXT_TOKENS..CONTEXT_TOKENS + UNFINISHED_TOKENS_MAX).map(suffix).find(starts);
        let ids = ids.unwrap_or_else(|| suffix(CONTEXT_TOKENS)).to_vec();
        let before = text.decode(&ids, skip_special);
        Self { text, skip_special, stops, sent: ids.len(), before, cut: 0, ids, held: String::new(), given: 0 }
    }

    /// Adds a token. Gives the text that can be sent, and whether a stop string ended the completion; where it
    /// `may_stop` not, stop strings are text.
    pub(super) fn push(&mut self, id: TokenId, may_stop: bool) -> (String, bool) {
        self.ids.push(id);
        let fresh = self.fresh(false);
        self.held.push_str(&fresh);
        let early = if may_stop { String::new() } else { self.past_stops() };
        let (text, stopped) = self.release(false);
        self.give(early + &text, stopped)
    }

    /// Characters of the completion so far, also of those held back.
    pub(super) fn chars(&self) -> usize {
        self.given + self.held.chars().count()
    }

    fn give(&mut self, text: String, stopped: bool) -> (String, bool) {
        self.given += text.chars().count();
        (text, stopped)
    }

    /// Everything still held back; the completion ends here.
    pub(super) fn finish(&mut self) -> (String, bool) {
        let fresh = self.fresh(true);
        self.held.push_str(&fresh);
        let (text, stopped) = self.release(true);
        self.give(text, stopped)
    }

    /// Text of the tokens not sent, up to the last whole character (or all of it, if it must be had anyway).
    fn fresh(&mut self, anyway: bool) -> String {
        let after = self.text.decode(&self.ids, self.skip_special);
        let stuck = self.ids.len() - self.sent > UNFINISHED_TOKENS_MAX;
        let ready = if anyway || stuck { after.as_str() } else { after.trim_end_matches(REPLACEMENT) };
        let whole = ready.len() == after.len();
        let same = common(&self.before, ready);
        if same == ready.len() && !whole {
            return String::new();
        }
        let fresh = ready[same..].to_string();
        self.before = ready.to_string();
        if self.ids.len() - self.cut >= CONTEXT_TOKENS {
            self.ids.drain(..self.cut);
            self.cut = self.ids.len();
            self.before = self.text.decode(&self.ids, self.skip_special);
            if !whole {
                self.before.truncate(self.before.trim_end_matches(REPLACEMENT).len());
            }
        }
        self.sent = self.ids.len();
        fresh
    }

    /// What is held back, up to the end of the last whole stop string.
    fn past_stops(&mut self) -> String {
        let ends = self.stops.iter().filter_map(|stop| self.held.rfind(stop.as_str()).map(|at| at + stop.len()));
        let end = ends.max().unwrap_or(0);
        self.held.drain(..end).collect()
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

/// Bytes of the longest beginning that `a` and `b` share, in whole characters.
fn common(a: &str, b: &str) -> usize {
    let differs = a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y);
    differs.map_or(a.len().min(b.len()), |((at, _), _)| at)
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
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/stories/tokenizer.json");
        Text::read(Path::new(path), 4096).unwrap()
    }

    /// Streams `ids` after a prompt and gives the pieces until a stop string ends it.
    fn stream(text: &Text, ids: &[TokenId], stops: &[&str]) -> (Vec<String>, bool) {
        let prompt = text.encode("Once upon a time", false).unwrap();
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
        let ids = text.encode(original, false).unwrap();
        assert!(ids.len() > original.chars().count(), "the tokenizer knows these characters whole: nothing is tested");
        let (pieces, stopped) = stream(&text, &ids, &[]);
        assert_eq!((pieces.concat().as_str(), stopped), (original, false));
        assert!(pieces.iter().all(|p| !p.contains('\u{FFFD}')));
    }

    /// A tokenizer as Llama's and Mixtral's: characters it does not know are a token per byte, ids 0 to 255.
    fn byte_fallback() -> Text {
        let mut vocab: serde_json::Map<_, _> = (0..256).map(|b| (format!("<0x{b:02X}>"), b.into())).collect();
        vocab.insert("▁a".into(), 256.into());
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "vocab": vocab, "merges": []},
        });
        let tokenizer: Tokenizer = json.to_string().parse().unwrap();
        let bytes = Arc::new(TokenBytes::new(&tokenizer, 257));
        Text { tokenizer: Arc::new(tokenizer), bytes, token_bytes_max: 8 }
    }

    #[test]
    fn characters_of_byte_tokens_survive_in_long_runs_and_after_a_prompt_of_them() {
        let text = byte_fallback();
        let ids = |s: &str| -> Vec<TokenId> { s.bytes().map(TokenId::from).collect() };
        let original = "🦀🦀🦀é🦀日本🦀☃é🦀🦀";
        for prompt in [vec![256], ids("🦀🦀"), ids("é日"), ids("🦀日本"), [ids("🦀🦀🦀"), vec![256]].concat()]
        {
            let mut stream = TextStream::new(text.clone(), &prompt, true, Vec::new());
            let pieces: Vec<String> =
                ids(original).into_iter().chain([256]).map(|id| stream.push(id, true).0).collect();
            assert_eq!(pieces.concat(), format!("{original} a"), "after {prompt:?}: {pieces:?}");
        }
    }

    #[test]
    fn bytes_that_are_no_character_come_out_as_replacements_and_do_not_pile_up() {
        let text = text();
        let crab = text.encode("🦀", false).unwrap();
        let (pieces, _) = stream(&text, &crab[..1].repeat(12), &[]);
        assert!(pieces.concat().contains('\u{FFFD}'));
        assert!(pieces[..10].iter().any(|p| !p.is_empty()), "all was held back: {pieces:?}");
    }

    #[test]
    fn a_stop_string_across_tokens_ends_the_text_before_it_and_leaks_nothing() {
        let text = text();
        let ids = text.encode("The cat sat on the mat. END of the story.", false).unwrap();
        let (pieces, stopped) = stream(&text, &ids, &["mat. END", "story"]);
        assert!(stopped);
        assert_eq!(pieces.concat(), "The cat sat on the ");
        let (pieces, stopped) = stream(&text, &ids, &["END of everything"]);
        assert_eq!((pieces.concat().as_str(), stopped), ("The cat sat on the mat. END of the story.", false));
    }

    #[test]
    fn a_stop_string_before_the_least_length_is_text() {
        let text = text();
        let ids = text.encode("END and again END and more", false).unwrap();
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
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/stories/tokenizer.json");
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
            let ids = text.encode(&words.join(" "), false).unwrap();
            let (whole, _) = stream(&text, &ids, &[]);
            let whole = whole.concat();
            let (pieces, stopped) = stream(&text, &ids, &[&stop]);
            let want = whole.find(&stop).map_or(whole.as_str(), |at| &whole[..at]);
            prop_assert_eq!((pieces.concat(), stopped), (want.to_string(), whole.contains(&stop)));
        }
    }
}
