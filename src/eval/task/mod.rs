//! Benchmark tasks: prompts, answers and judgements as lm-eval 0.4.13 has them, word for word.
//!
//! A task is one file and one line in [`TASKS`]: where its rows lie, how they become prompts, and who judges an answer.
//! Rows come from a directory or the hub ([`Source`]) and are checked against the published ones.

mod bbh;
mod extract;
mod formats;
mod gsm8k;
mod mmlu;
mod python_random;
mod select;
mod source;

pub use select::{Selected, UnknownTask, select};
pub use source::{DataError, Place, Source};

use super::results::DataFacts;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// One row of a task's test split, ready to be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Row of the test split, from 0.
    pub index: usize,
    /// Everything before the answer: description, shots and question.
    pub prompt: String,
    pub ask: Ask,
    /// The right answer as the data has it.
    pub reference: String,
}

/// How a sample is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// The continuation of greatest log-likelihood, the first among equals, is the answer.
    Choose { continuations: Vec<String>, right: usize },
    /// The text that follows, greedily, without the first of the stop strings and what comes after it.
    Generate { until: Vec<String>, max_tokens: usize },
}

/// What the model said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Index of a continuation.
    Choice(usize),
    Text(String),
}

impl Answer {
    fn text(&self) -> &str {
        match self {
            Self::Choice(_) => "",
            Self::Text(text) => text,
        }
    }
}

/// One metric's view of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    /// What was taken out of the answer; `[invalid]` if nothing was found.
    pub prediction: String,
    pub correct: bool,
}

/// A part of a task that is reported on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subtask {
    /// As in lm-eval: `mmlu_anatomy`.
    pub name: String,
    /// What its data is called: `anatomy`.
    pub key: &'static str,
    /// `mmlu_stem` and the like.
    pub group: Option<&'static str>,
}

/// Which samples of a subtask, with which prompts.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub shots: usize,
    /// At most this many rows, the first ones.
    pub limit: Option<usize>,
    /// Seeds the draw of shots in tasks that draw them; lm-eval's is 1234.
    pub fewshot_seed: u64,
}

impl LoadOptions {
    fn rows(&self) -> usize {
        self.limit.unwrap_or(usize::MAX)
    }

    /// Checks that there are enough rows to take the shots from.
    fn check_shots(&self, task: &str, available: usize) -> Result<(), DataError> {
        check_shots(task, self.shots, &(0..=available))
    }
}

fn check_shots(task: &str, asked: usize, allowed: &RangeInclusive<usize>) -> Result<(), DataError> {
    if allowed.contains(&asked) {
        return Ok(());
    }
    Err(DataError::Shots { task: task.into(), asked, allowed: format!("{} to {}", allowed.start(), allowed.end()) })
}

/// The samples of a subtask, and what is known about the rows they were made of.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    pub samples: Vec<Sample>,
    pub data: Vec<DataFacts>,
}

/// One task.
pub struct TaskEntry {
    pub name: &'static str,
    /// One line for lists.
    pub summary: &'static str,
    /// lm-eval's version of the task.
    pub version: &'static str,
    /// Shots when nothing else is asked for.
    pub shots: usize,
    pub shots_allowed: RangeInclusive<usize>,
    /// lm-eval's names, the headline first; each a mean over samples.
    pub metrics: &'static [&'static str],
    pub subtasks: fn() -> Vec<Subtask>,
    read: fn(&Source, &Subtask, &LoadOptions) -> Result<Loaded, DataError>,
    /// One verdict per metric.
    pub judge: fn(&Sample, &Answer) -> Vec<Judged>,
}

impl TaskEntry {
    /// The samples of one of this task's subtasks.
    ///
    /// # Errors
    /// Shots that are not allowed; rows that are missing, unreadable or not the published ones.
    pub fn load(&self, source: &Source, subtask: &Subtask, options: &LoadOptions) -> Result<Loaded, DataError> {
        check_shots(self.name, options.shots, &self.shots_allowed)?;
        (self.read)(source, subtask, options)
    }
}

/// All tasks.
pub static TASKS: &[TaskEntry] = &[bbh::TASK, mmlu::TASK, gsm8k::TASK, gsm8k::TASK_COT];

#[cfg(test)]
mod tests;
