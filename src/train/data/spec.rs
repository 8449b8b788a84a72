//! `[data]` of a recipe.

use super::DataError;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where text comes from and how it becomes windows of tokens.
///
/// Relative paths are relative to the current directory. Of a folder, all files below it are read, in the order of
/// their paths, whose names fit [`DataSpec::format`]; names that begin with a dot, `README`, `LICENSE` or `SOURCE` are
/// left out. Of the One Billion Word benchmark's folder, `train` takes what is below
/// `training-monolingual.tokenized.shuffled`, `valid` what is below `heldout-monolingual.tokenized.shuffled`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSpec {
    pub train: Vec<PathBuf>,
    /// Without any: the held-out folder of the One Billion Word benchmark where `train` has one, otherwise the last
    /// [`DataSpec::valid_share`] of `train`. A file of the same contents as one of these is left out of `train`.
    #[serde(default)]
    pub valid: Vec<PathBuf>,
    /// Share of `train`'s documents that is split off for validation, in (0, 1). Where that is less than one document
    /// and windows are packed as a stream, it is the share of tokens instead.
    #[serde(default = "default_valid_share")]
    pub valid_share: f64,
    #[serde(default)]
    pub format: Format,
    /// Of [`Format::Jsonl`]: the field that holds a document's text.
    #[serde(default = "default_field")]
    pub field: String,
    /// Of [`Format::Text`]: what stands between documents, such as `<|endoftext|>`. White space beside it is no part of
    /// the documents. Without it a file is a document, as it is.
    #[serde(default)]
    pub separator: Option<String>,
    #[serde(default)]
    pub normalise: Normalise,
    #[serde(default)]
    pub packing: Packing,
    pub tokenizer: TokenizerSpec,
    /// The token that ends documents. Needed where a given tokenizer's is not one of the usual names.
    #[serde(default)]
    pub eos: Option<String>,
    /// A sentence that says where to get the data; shown where a path is missing.
    #[serde(default)]
    pub source_hint: String,
}

/// What documents are in files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Running text, split at the separator.
    #[default]
    Text,
    /// A JSON object a line.
    Jsonl,
    /// A sentence a line, as in the One Billion Word benchmark. Blank lines are none.
    Lines,
}

/// What is done to text before it is encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalise {
    #[default]
    None,
    /// Curly quotes, dashes, accents and the like become ASCII, carriage returns are dropped. Characters without an ASCII
    /// form stay.
    Ascii,
}

/// How documents become windows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Documents, each with its end token, one after the other, cut into windows.
    #[default]
    Stream,
    /// Each document, with its end token, is a window of its own: cut or padded. Padding is not scored.
    Padded,
}

/// `"char"`, `{ bpe = 4096 }` or `{ file = "tokenizer.json" }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerSpec {
    /// Every character of the training text is a token; others are `<unk>`.
    Char,
    /// Byte-level BPE of at most so many tokens, trained on the training text.
    Bpe(usize),
    /// A Hugging Face tokenizer.json.
    File(PathBuf),
}

fn default_valid_share() -> f64 {
    0.05
}

fn default_field() -> String {
    "text".to_string()
}

/// Longest separator, in bytes: less than the pieces that text is read in.
const SEPARATOR_MAX: usize = 1024;
/// The bytes' alphabet and the end token.
const BPE_MIN: usize = 257;
const BPE_MAX: usize = 1 << 20;

impl DataSpec {
    /// # Errors
    /// The first field whose value makes no sense.
    pub fn check(&self) -> Result<(), DataError> {
        let spec = |field, problem: String| Err(DataError::Spec { field, problem });
        if self.train.is_empty() {
            return spec("train", format!("at least one file or folder is needed. {}", self.hint()));
        }
        if !(self.valid_share > 0.0 && self.valid_share < 1.0) {
            return spec("valid_share", format!("{} is not between 0 and 1 (both excluded)", self.valid_share));
        }
        match &self.separator {
            Some(text) if text.is_empty() || text.len() > SEPARATOR_MAX => {
                return spec("separator", format!("it has {} bytes; 1 to {SEPARATOR_MAX} are allowed", text.len()));
            }
            Some(_) if self.format != Format::Text => {
                return spec("separator", "only format = \"text\" has one; remove it".to_string());
            }
            _ => {}
        }
        match self.tokenizer {
            TokenizerSpec::Bpe(vocab) if !(BPE_MIN..=BPE_MAX).contains(&vocab) => {
                return spec("tokenizer", format!("bpe = {vocab}; {BPE_MIN} to {BPE_MAX} tokens are possible"));
            }
            TokenizerSpec::File(_) => {}
            _ if self.eos.is_some() => {
                return spec("eos", "only a given tokenizer ({ file = … }) can have its own; remove it".to_string());
            }
            _ => {}
        }
        Ok(())
    }

    /// What to do when data is missing.
    pub(super) fn hint(&self) -> String {
        let hint = self.source_hint.trim().trim_end_matches('.');
        let from = if hint.is_empty() { String::new() } else { format!("Where to get it: {hint}. ") };
        format!("{from}`--data PATH` reads other data, `--synthetic` trains on generated text")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parsed(value: serde_json::Value) -> DataSpec {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_recipe_says_little_and_the_rest_has_defaults() {
        let spec = parsed(json!({"train": ["a.txt"], "tokenizer": "char"}));
        assert_eq!((spec.format, spec.packing, spec.normalise), (Format::Text, Packing::Stream, Normalise::None));
        assert_eq!(
            (spec.field.as_str(), spec.valid_share, spec.tokenizer.clone()),
            ("text", 0.05, TokenizerSpec::Char)
        );
        assert!(spec.check().is_ok());
        let bpe = parsed(json!({"train": ["a"], "tokenizer": {"bpe": 4096}, "packing": "padded", "format": "lines"}));
        assert_eq!(
            (bpe.tokenizer, bpe.packing, bpe.format),
            (TokenizerSpec::Bpe(4096), Packing::Padded, Format::Lines)
        );
        let file = parsed(json!({"train": ["a"], "tokenizer": {"file": "gpt2/tokenizer.json"}}));
        assert_eq!(file.tokenizer, TokenizerSpec::File("gpt2/tokenizer.json".into()));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let unknown = serde_json::from_value::<DataSpec>(json!({"train": [], "tokenizer": "char", "shuffel": true}));
        assert!(unknown.unwrap_err().to_string().contains("shuffel"));
        for (field, value) in [
            ("train", json!([])),
            ("valid_share", json!(1.0)),
            ("valid_share", json!(0.0)),
            ("separator", json!("")),
            ("tokenizer", json!({"bpe": 256})),
            ("eos", json!("</s>")),
        ] {
            let mut spec = json!({"train": ["a"], "tokenizer": "char"});
            spec[field] = value;
            let error = parsed(spec).check().unwrap_err().to_string();
            assert!(error.starts_with(&format!("data.{field}: ")), "{error}");
        }
    }

    #[test]
    fn the_hint_is_a_sentence_whether_or_not_it_ends_in_a_full_stop() {
        let mut spec = parsed(json!({"train": ["a"], "tokenizer": "char", "source_hint": "https://example.org."}));
        assert!(spec.hint().starts_with("Where to get it: https://example.org. `--data"));
        spec.source_hint.clear();
        assert!(spec.hint().starts_with("`--data"));
    }
}
