//! The bytes that each token stands for: what grammars are matched against, and what log probabilities show.

use crate::types::TokenId;
use tokenizers::{Decoder, DecoderWrapper, Tokenizer};

/// Text of every token of a vocabulary, as bytes: a token may end within a character.
pub struct TokenBytes {
    data: Vec<u8>,
    /// Where in `data` each token ends; the next one begins there.
    ends: Vec<u32>,
    /// Sorted.
    special: Vec<TokenId>,
}

impl TokenBytes {
    /// For ids below `vocab`, the length of the model's logits; ids that `tokenizer` does not know have no bytes.
    ///
    /// How a token is spelled is what the tokenizer's decoder says. What a decoder does at the edges of a text alone
    /// (Llama's drops one space at the beginning) is left undone.
    pub fn new(tokenizer: &Tokenizer, vocab: usize) -> Self {
        let mut stages = Vec::new();
        if let Some(decoder) = tokenizer.get_decoder() {
            flatten(decoder, &mut stages);
        }
        // What comes after a fuse sees the text as a whole.
        let fuse = stages.iter().position(|stage| matches!(stage, DecoderWrapper::Fuse(_)));
        stages.truncate(fuse.unwrap_or(stages.len()));
        let added = tokenizer.get_added_tokens_decoder();
        let mut this = Self { data: Vec::new(), ends: Vec::with_capacity(vocab), special: Vec::new() };
        for id in 0..vocab as TokenId {
            // An added token is found in the text as it is written, whatever the decoder makes of it.
            if let Some(token) = added.get(&id) {
                this.data.extend_from_slice(token.content.as_bytes());
                if token.special {
                    this.special.push(id);
                }
            } else if let Some(token) = tokenizer.id_to_token(id) {
                // Without a decoder, tokens are words, put together with spaces.
                let bytes = if stages.is_empty() { format!(" {token}").into_bytes() } else { spell(&stages, token) };
                this.data.extend(bytes);
            }
            this.ends.push(this.data.len() as u32);
        }
        this.data.shrink_to_fit();
        this
    }

    /// How many ids there are.
    pub(super) fn count(&self) -> usize {
        self.ends.len()
    }

    /// What the token stands for: text, or the name of a special token, such as `</s>`. Unknown ones have none.
    pub fn bytes(&self, id: TokenId) -> &[u8] {
        let at = id as usize;
        let Some(end) = self.ends.get(at) else { return &[] };
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.data[start as usize..*end as usize]
    }

    /// Whether the token is special: no text that is encoded holds it unless special tokens are asked for.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.special.binary_search(&id).is_ok()
    }
}

fn flatten<'a>(decoder: &'a DecoderWrapper, stages: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().for_each(|d| flatten(d, stages)),
        stage => stages.push(stage),
    }
}

/// What the decoder `stages` make of a token within a text.
fn spell(stages: &[&DecoderWrapper], mut token: String) -> Vec<u8> {
    for stage in stages {
        match stage {
            DecoderWrapper::ByteLevel(_) => {
                let bytes: Option<Vec<u8>> = token.chars().map(alphabet_byte).collect();
                return bytes.unwrap_or_else(|| token.into_bytes());
            }
            DecoderWrapper::ByteFallback(_) => {
                if let Some(byte) = fallback_byte(&token) {
                    return vec![byte];
                }
            }
            other => {
                // Between two others, since some decoders treat the first and the last of a text differently.
                let context = vec!["a".to_string(), token.clone(), "b".to_string()];
                if let Ok(mut tokens) = other.decode_chain(context)
                    && tokens.len() == 3
                {
                    token = tokens.swap_remove(1);
                }
            }
        }
    }
    token.into_bytes()
}

/// The byte a character stands for in GPT-2's alphabet: printable Latin-1 stands for itself, and the other 68 bytes, in
/// order, are U+0100 to U+0143.
fn alphabet_byte(character: char) -> Option<u8> {
    let byte = match u32::from(character) {
        own @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => own,
        low @ 0x100..=0x120 => low - 0x100,
        middle @ 0x121..=0x142 => middle - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The byte of a token such as `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn stories() -> Tokenizer {
        Tokenizer::from_file(concat!(env!("CARGO_MANIFEST_DIR"), "/models/stories/tokenizer.json")).unwrap()
    }

    fn made(decoder: Value, tokens: &[&str]) -> TokenBytes {
        let vocab: serde_json::Map<_, _> = tokens.iter().enumerate().map(|(i, t)| (t.to_string(), i.into())).collect();
        let json = json!({"version": "1.0", "added_tokens": [
                {"id": 0, "content": "</s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false},
                {"id": 1, "content": "▁é", "special": false, "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false}],
            "decoder": decoder, "model": {"type": "WordLevel", "unk_token": "</s>", "vocab": vocab}});
        TokenBytes::new(&json.to_string().parse().unwrap(), tokens.len() + 1)
    }

    fn spelled(decoder: Value, token: &str) -> Vec<u8> {
        made(decoder, &["</s>", "▁é", token]).bytes(2).to_vec()
    }

    #[test]
    fn a_token_is_spelled_as_the_decoder_declares() {
        let llama = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let word_piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": false});
        assert_eq!(spelled(llama.clone(), "▁the▁"), b" the ");
        assert_eq!(spelled(llama.clone(), "<0xE2>"), b"\xe2");
        assert_eq!(spelled(llama, "<0xE2"), b"<0xE2");
        assert_eq!(spelled(metaspace.clone(), "▁the"), b" the");
        assert_eq!(spelled(metaspace, "<0xE2>"), b"<0xE2>");
        assert_eq!(spelled(byte_level.clone(), "Ġé▁"), "Ġé▁".as_bytes(), "▁ is not of the alphabet");
        assert_eq!(spelled(byte_level, "ĠÃ©Ĭ"), b" \xc3\xa9\x8a");
        assert_eq!(spelled(word_piece.clone(), "##ing"), b"ing");
        assert_eq!(spelled(word_piece, "ring"), b" ring");
        assert_eq!(spelled(Value::Null, "word"), b" word");
    }

    #[test]
    fn special_tokens_go_by_their_name_and_unknown_ones_have_none() {
        let tokens = made(json!({"type": "ByteFallback"}), &["</s>", "▁é", "<0xE2>", "a"]);
        assert_eq!((tokens.bytes(0), tokens.is_special(0)), (&b"</s>"[..], true));
        assert_eq!((tokens.bytes(1), tokens.is_special(1)), ("▁é".as_bytes(), false));
        assert_eq!((tokens.bytes(4), tokens.bytes(5), tokens.bytes(TokenId::MAX)), (&b""[..], &b""[..], &b""[..]));
    }

    proptest! {
        #[test]
        fn bytes_of_a_text_s_tokens_are_the_text(text in "([a-z ]|\\PC|[\n\t]){0,60}") {
            let tokenizer = stories();
            let tokens = TokenBytes::new(&tokenizer, 4096);
            let ids = tokenizer.encode(text.as_str(), false).unwrap();
            let bytes: Vec<u8> = ids.get_ids().iter().flat_map(|id| tokens.bytes(*id)).copied().collect();
            prop_assert_eq!(bytes, text.as_bytes());
        }
    }
}
