//! From samples (texts) to questions (token ids), with lm-eval's rules of encoding and truncation.

use super::lm::{Lm, LmError};
use super::task::{Ask, Sample};
use crate::types::TokenId;
use rayon::prelude::*;

/// One thing that a model is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// Index among its task's subtasks.
    pub subtask: usize,
    /// Row of the test split, or number of the window.
    pub row: usize,
    pub ask: TokenAsk,
    /// Leading tokens that all prompts of the subtask have alike.
    pub shared: usize,
    /// Whether the prompt was cut on the left to fit the model.
    pub cut: bool,
    /// What it was made of; none of a window.
    pub sample: Option<Sample>,
}

/// What is asked, in token ids.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenAsk {
    Choose {
        context: Vec<TokenId>,
        continuations: Vec<Vec<TokenId>>,
    },
    Generate {
        prompt: Vec<TokenId>,
        until: Vec<String>,
        max_tokens: usize,
    },
    /// All tokens but the first are scored; they are `bytes` of text.
    Window {
        tokens: Vec<TokenId>,
        bytes: usize,
    },
}

impl TokenAsk {
    /// What the model reads before it answers.
    pub fn prompt(&self) -> &[TokenId] {
        match self {
            Self::Choose { context, .. } => context,
            Self::Generate { prompt, .. } => prompt,
            Self::Window { tokens, .. } => tokens,
        }
    }
}

/// Encodes the samples of one subtask.
///
/// # Errors
/// Texts the tokenizer cannot take, and completions that leave no room for a prompt.
pub fn encode(lm: &dyn Lm, subtask: usize, samples: Vec<Sample>) -> Result<Vec<Question>, LmError> {
    let one = |sample: Sample| -> Result<Question, LmError> {
        let (ask, cut) = match &sample.ask {
            Ask::Choose { continuations, .. } => choose(lm, &sample.prompt, continuations)?,
            Ask::Generate { until, max_tokens } => generate(lm, &sample.prompt, until, *max_tokens)?,
        };
        // The text is in the tokens now; thousands of few-shot prompts would be kept twice.
        let sample = Sample { prompt: String::new(), ..sample };
        Ok(Question { subtask, row: sample.index, ask, shared: 0, cut, sample: Some(sample) })
    };
    let mut questions: Vec<Question> = samples.into_par_iter().map(one).collect::<Result<_, _>>()?;
    // A prompt that was cut begins where no other does.
    let shared = shared_prefix(&questions.iter().filter(|q| !q.cut).collect::<Vec<_>>());
    questions.iter_mut().filter(|q| !q.cut).for_each(|q| q.shared = shared);
    Ok(questions)
}

/// Tokens with which all prompts begin, less the last of a prompt: that one is always computed.
fn shared_prefix(questions: &[&Question]) -> usize {
    let [first, rest @ ..] = questions else { return 0 };
    if rest.is_empty() {
        return 0;
    }
    let first = first.ask.prompt();
    let common = |q: &&Question| first.iter().zip(q.ask.prompt()).take_while(|(a, b)| a == b).count();
    let shortest = questions.iter().map(|q| q.ask.prompt().len()).min().unwrap_or(0);
    rest.iter().map(common).min().unwrap_or(0).min(shortest.saturating_sub(1))
}

/// Spaces at the end of the context belong to the continuation, which is what the whole text's ids have beyond the
/// context's. Too long a context loses tokens on the left; the model never reads the continuation's last token.
fn choose(lm: &dyn Lm, prompt: &str, continuations: &[String]) -> Result<(TokenAsk, bool), LmError> {
    let context = lm.encode(prompt.trim_end())?;
    let mut encoded = Vec::with_capacity(continuations.len());
    for continuation in continuations {
        let whole = lm.encode(&format!("{prompt}{continuation}"))?;
        let ids = whole.get(context.len()..).filter(|ids| !ids.is_empty());
        let ids = ids.ok_or_else(|| LmError(format!("the continuation {continuation:?} has no token of its own")))?;
        encoded.push(ids.to_vec());
    }
    let longest = encoded.iter().map(Vec::len).max().unwrap_or(1);
    let room = (lm.max_length() + 1).saturating_sub(longest);
    if room == 0 {
        return Err(LmError(format!("a continuation has {longest} tokens, but the model takes {}", lm.max_length())));
    }
    let cut = context.len() > room;
    let context = context[context.len().saturating_sub(room)..].to_vec();
    Ok((TokenAsk::Choose { context, continuations: encoded }, cut))
}

/// Too long a prompt loses tokens on the left, so that `max_tokens` fit after it.
fn generate(lm: &dyn Lm, prompt: &str, until: &[String], max_tokens: usize) -> Result<(TokenAsk, bool), LmError> {
    let room = lm.max_length().saturating_sub(max_tokens);
    if room == 0 {
        return Err(LmError(format!(
            "completions of up to {max_tokens} tokens leave no room for a prompt in the model's context of {}; give \
             --max-gen-tokens less than that",
            lm.max_length()
        )));
    }
    let ids = lm.encode(prompt)?;
    let cut = ids.len() > room;
    let prompt = ids[ids.len().saturating_sub(room)..].to_vec();
    Ok((TokenAsk::Generate { prompt, until: until.to_vec(), max_tokens }, cut))
}
