//! Texts, and the windows of tokens that are drawn of them.

use super::{CalibrateError, Settings};
use crate::engine::Text;
use crate::types::{TokenId, hex, split_mix};
use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// A text and where it is from.
#[derive(Clone, Debug)]
pub struct Source {
    pub name: String,
    pub text: String,
}

/// Windows of one length; those of the two parts share no token.
#[derive(Clone, Debug, PartialEq)]
pub struct Windows {
    pub calibration: Vec<Vec<TokenId>>,
    /// None without a target, which is all they are for.
    pub held_out: Vec<Vec<TokenId>>,
    /// SHA-256 of all sources.
    pub sha256: String,
}

/// Shortest window: a token has to have something before it.
const WINDOW_MIN: usize = 8;

/// The sample text that comes with this program.
pub fn bundled() -> Source {
    Source { name: "eval/samples/text.txt".into(), text: include_str!("../../eval/samples/text.txt").into() }
}

/// Reads plain texts.
///
/// # Errors
/// A file that cannot be read or is not text.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Source>, CalibrateError> {
    let source = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).map_err(CalibrateError::file(path))?;
        Ok(Source { name: path.display().to_string(), text })
    };
    paths.iter().map(source).collect()
}

impl Windows {
    /// Draws windows by `settings.seed`, evenly from all `sources`: as many as are asked for, or all there are, shared in
    /// the same proportion. Each begins with the token that the tokenizer begins texts with, if it does.
    ///
    /// # Errors
    /// Windows that the model cannot take, or too little text for one window of each part.
    pub fn draw(sources: &[Source], text: &Text, context: usize, settings: &Settings) -> Result<Self, CalibrateError> {
        let window = settings.window;
        if !(WINDOW_MIN..=context).contains(&window) {
            return Err(CalibrateError::Asked(format!(
                "--window must be from {WINDOW_MIN} to {context} tokens (the model's context); got {window}"
            )));
        }
        let encode = |text_of: &str, special: bool| {
            text.encode(text_of, special).map_err(|e| CalibrateError::Asked(format!("--data cannot be encoded: {e}")))
        };
        let first: Vec<TokenId> = encode("", true)?.into_iter().take(1).collect();
        let mut sha = Sha256::new();
        let mut piles = Vec::new();
        let mut tokens = 0;
        for (i, source) in sources.iter().enumerate() {
            sha.update(format!("{}:", source.text.len()));
            sha.update(&source.text);
            let ids = encode(&source.text, false)?;
            tokens += ids.len();
            let cut = ids.chunks_exact(window - first.len()).map(|chunk| [&first, chunk].concat());
            piles.push(shuffled(cut.collect(), split_mix(settings.seed, i as u64)));
        }
        let drawn = in_turns(piles);
        if drawn.len() < 2 {
            return Err(CalibrateError::Asked(format!(
                "--data must hold two windows of text at least, {} tokens for --window {window}; got {tokens} tokens in {} \
                 files: give more text, or a smaller --window",
                2 * window,
                sources.len()
            )));
        }
        let (calibration, held_out) = shared_out(drawn, settings);
        Ok(Self { calibration, held_out, sha256: hex(&sha.finalize()) })
    }
}

/// Fisher and Yates' shuffle.
fn shuffled(mut windows: Vec<Vec<TokenId>>, seed: u64) -> Vec<Vec<TokenId>> {
    for i in (1..windows.len()).rev() {
        let other = (u128::from(split_mix(seed, i as u64)) * (i as u128 + 1)) >> 64;
        windows.swap(i, other as usize);
    }
    windows
}

/// One of each pile after the other, until all are empty.
fn in_turns(piles: Vec<Vec<Vec<TokenId>>>) -> Vec<Vec<TokenId>> {
    let most = piles.iter().map(Vec::len).max().unwrap_or(0);
    (0..most).flat_map(|i| piles.iter().filter_map(move |pile| pile.get(i).cloned())).collect()
}

type Part = Vec<Vec<TokenId>>;

/// The windows of calibration and of the held-out check.
fn shared_out(mut drawn: Part, settings: &Settings) -> (Part, Part) {
    let count = |tokens: usize| tokens.div_ceil(settings.window).max(1);
    let calibration = count(settings.tokens);
    let held_out = if settings.target.is_some() { count(settings.held_out_tokens) } else { 0 };
    let (all, there) = (calibration + held_out, drawn.len());
    let held_out = if there >= all || held_out == 0 { held_out } else { (held_out * there / all).max(1) };
    drawn.truncate(all);
    let rest = drawn.split_off(drawn.len() - held_out);
    (drawn, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(n: u32) -> Part {
        (0..n).map(|i| vec![i; 10]).collect()
    }

    #[test]
    fn parts_are_disjoint_and_a_short_text_is_shared_in_proportion() {
        let target = super::super::Target::experts(0.7);
        let settings = Settings { target: Some(target), tokens: 60, held_out_tokens: 20, window: 10, seed: 1 };
        for (there, want) in [(20, (6, 2)), (8, (6, 2)), (4, (3, 1)), (2, (1, 1))] {
            let (calibration, held_out) = shared_out(windows(there), &settings);
            assert_eq!((calibration.len(), held_out.len()), want, "of {there}");
            assert!(calibration.iter().all(|w| !held_out.contains(w)));
        }
        let alone = Settings { target: None, ..settings };
        assert_eq!(shared_out(windows(20), &alone).0.len(), 6);
    }

    #[test]
    fn the_seed_decides_the_order_and_files_take_turns() {
        let (a, b) = (shuffled(windows(30), 1), shuffled(windows(30), 2));
        assert_ne!(a, b);
        let mut sorted = a.clone();
        sorted.sort();
        assert_eq!(sorted, windows(30));
        let mixed = in_turns(vec![vec![vec![1], vec![2], vec![3]], vec![vec![9]]]);
        assert_eq!(mixed, [[1], [9], [2], [3]]);
    }
}
