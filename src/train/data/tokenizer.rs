//! The tokenizer: one token per character, byte-level BPE trained on the data, or a given one.

use super::files::Source;
use super::read::pieces;
use super::{DataError, DataSpec, Progress, Stage, TokenizerSpec};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// Ends documents in the tokenizers that are made here; its id is 0.
const END_OF_TEXT: &str = "<|endoftext|>";
/// What a character that training did not see becomes in a character tokenizer; its id is 1. Plain text that reads so
/// is encoded character by character like any other.
const UNKNOWN: &str = "<unk>";
/// Names that given tokenizers have for the end and the beginning of a text.
const ENDS: [&str; 4] = [END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"];
const BEGINNINGS: [&str; 4] = ["<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"];
const UNKNOWNS: [&str; 2] = [UNKNOWN, "[UNK]"];
/// BPE is trained on at most about this much text: every n-th piece of it where there is more.
const SAMPLE_BYTES: u64 = 64 << 20;

/// A tokenizer and what training needs to know of it.
pub(super) struct Loaded {
    pub tokenizer: Tokenizer,
    /// tokenizer.json.
    pub json: String,
    /// One more than the largest id.
    pub vocab: usize,
    pub eos: u32,
    /// `eos` where there is none: a document begins after another's end.
    pub bos: u32,
    pub unknown: Option<u32>,
}

impl Loaded {
    /// The tokenizer of `json`, called `name` in errors.
    ///
    /// # Errors
    /// What is no tokenizer.json, and one without an end token.
    pub(super) fn new(json: String, name: &str, eos: Option<&str>) -> Result<Self, DataError> {
        let mut tokenizer = Tokenizer::from_bytes(&json).map_err(|error| wrong(name, "read", &error))?;
        // Some files say to cut texts, or to pad them, for the model that they were made for.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| wrong(name, "read", &error))?;
        let one_of = |names: &[&str]| names.iter().find_map(|name| tokenizer.token_to_id(name));
        let end = match eos {
            Some(token) => tokenizer.token_to_id(token).ok_or_else(|| format!("it has no token `{token}` (data.eos)")),
            None => one_of(&ENDS).ok_or_else(|| {
                format!("it has none of the end tokens {}; name its own with data.eos", ENDS.join(", "))
            }),
        };
        let eos = end.map_err(|problem| wrong(name, "used", &problem))?;
        let (bos, unknown) = (one_of(&BEGINNINGS).unwrap_or(eos), one_of(&UNKNOWNS));
        let vocab = tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self { tokenizer, json, vocab, eos, bos, unknown })
    }
}

/// The tokenizer that `spec` asks for. One that is made from `train` is kept in `cached`, and taken from there the next
/// time.
///
/// # Errors
/// Files that are missing or cannot be read; a tokenizer that cannot be used.
pub(super) fn load(
    spec: &DataSpec,
    train: &[Source],
    cached: &Path,
    on_progress: &(dyn Fn(Progress) + Sync),
) -> Result<Loaded, DataError> {
    if let TokenizerSpec::File(path) = &spec.tokenizer {
        let json = fs::read_to_string(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => DataError::Missing { path: path.clone(), hint: spec.hint() },
            _ => DataError::io(path)(error),
        })?;
        return Loaded::new(json, &path.to_string_lossy(), spec.eos.as_deref());
    }
    let name = cached.to_string_lossy();
    if let Ok(json) = fs::read_to_string(cached)
        && let Ok(loaded) = Loaded::new(json, &name, None)
    {
        return Ok(loaded);
    }
    let json = match spec.tokenizer {
        TokenizerSpec::Bpe(vocab) => trained(spec, train, vocab, on_progress)?,
        _ => of_characters(spec, train, on_progress)?,
    };
    // Whole or not at all.
    let part = cached.with_extension(format!("{}.part", std::process::id()));
    fs::write(&part, &json).map_err(DataError::io(&part))?;
    fs::rename(&part, cached).map_err(DataError::io(cached))?;
    Loaded::new(json, &name, None)
}

fn wrong(name: &str, doing: &'static str, problem: &dyn ToString) -> DataError {
    DataError::Tokenizer { name: name.to_string(), doing, problem: problem.to_string() }
}

/// Calls `each` with all text of `train`.
fn texts(
    spec: &DataSpec,
    train: &[Source],
    on_progress: &(dyn Fn(Progress) + Sync),
    mut each: impl FnMut(String),
) -> Result<(), DataError> {
    let total = train.iter().map(|source| source.bytes).sum();
    let (mut done, mut told) = (0, 0);
    for source in train {
        pieces(&source.path, spec, &mut |piece| {
            done += piece.text.len() as u64;
            if done - told > 1 << 20 {
                told = done;
                on_progress(Progress { stage: Stage::Vocabulary, done, total });
            }
            each(piece.text);
            Ok(())
        })?;
    }
    on_progress(Progress { stage: Stage::Vocabulary, done: total, total });
    Ok(())
}

/// A tokenizer whose tokens are the characters of `train`, in the order of their code points: BPE without merges.
fn of_characters(
    spec: &DataSpec,
    train: &[Source],
    on_progress: &(dyn Fn(Progress) + Sync),
) -> Result<String, DataError> {
    let mut ascii = [false; 128];
    let mut others = BTreeSet::new();
    texts(spec, train, on_progress, |text| {
        for character in text.chars() {
            match ascii.get_mut(character as usize) {
                Some(seen) => *seen = true,
                None => {
                    others.insert(character);
                }
            }
        }
    })?;
    let ascii = (0..128u8).zip(ascii).filter(|(_, seen)| *seen).map(|(byte, _)| byte as char);
    let tokens = [END_OF_TEXT, UNKNOWN].map(String::from).into_iter().chain(ascii.chain(others).map(String::from));
    let vocab: Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let end = json!({"id": 0, "content": END_OF_TEXT, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true});
    // Tokens are put together as they are: none is spelled as a byte, which is all that this decoder changes.
    let decoder = json!({"type": "ByteFallback"});
    let model = json!({"type": "BPE", "dropout": null, "unk_token": UNKNOWN, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocab, "merges": []});
    let json = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [end], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": decoder, "model": model});
    Ok(format!("{json:#}"))
}

/// Byte-level BPE as GPT-2's, of `vocab` tokens or as many as the text has merges for.
fn trained(
    spec: &DataSpec,
    train: &[Source],
    vocab: usize,
    on_progress: &(dyn Fn(Progress) + Sync),
) -> Result<String, DataError> {
    let total: u64 = train.iter().map(|source| source.bytes).sum();
    let every = total.div_ceil(SAMPLE_BYTES).max(1) as usize;
    let (mut sample, mut seen) = (Vec::new(), 0);
    texts(spec, train, on_progress, |text| {
        if seen % every == 0 {
            sample.push(text);
        }
        seen += 1;
    })?;
    let failed = |error: tokenizers::Error| wrong("data.tokenizer", "trained", &error);
    let mut tokenizer = Tokenizer::new(BPE::default());
    let byte_level = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab)
        .min_frequency(2)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect());
    tokenizer.train(&mut TrainerWrapper::from(trainer.build()), sample.iter()).map_err(failed)?;
    tokenizer.to_string(true).map_err(failed)
}
