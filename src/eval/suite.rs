//! The tasks of a run: their samples, read and encoded.

use super::lm::{Lm, LmError};
use super::log::Key;
use super::question::{Question, TokenAsk, encode};
use super::results::DataFacts;
use super::task::{
    Answer, Ask, DataError, Judged, LoadOptions, Sample, Selected, Source, Subtask, TaskEntry, UnknownTask, select,
};
use crate::types::hex;
use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// What is asked of each task.
#[derive(Clone, Debug, Default)]
pub struct SuiteOptions {
    /// Few-shot examples; the task's own number without it.
    pub shots: Option<usize>,
    /// Samples per subtask, windows of text, the first ones.
    pub limit: Option<usize>,
    /// Seed of few-shot examples that are drawn.
    pub seed: u64,
    /// Most tokens of a completion; the task's own number without it.
    pub max_gen_tokens: Option<usize>,
    pub perplexity: TextOptions,
}

/// What text perplexity is measured on, and how it is cut.
#[derive(Clone, Debug, Default)]
pub struct TextOptions {
    pub text: PathBuf,
    /// Tokens of a window; all but the first are scored.
    pub window: usize,
    /// Tokens of text, from its beginning; all without it.
    pub tokens_max: Option<usize>,
}

/// The task that is no benchmark: windows of any text.
pub const PERPLEXITY: &str = "perplexity";

/// One task of a run.
pub struct Task {
    pub name: String,
    /// None of perplexity.
    pub entry: Option<&'static TaskEntry>,
    pub subtasks: Vec<Subtask>,
    /// By subtask, then by row.
    pub questions: Vec<Question>,
    pub data: Vec<DataFacts>,
}

/// Why a task could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum SuiteError {
    #[error(transparent)]
    Unknown(#[from] UnknownTask),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error("task `{0}`: a number of shots was expected after the @, as in mmlu@5")]
    Shots(String),
    #[error("{task}: {problem}")]
    Lm { task: String, problem: LmError },
    #[error("--text {path}: {problem}")]
    Text { path: String, problem: String },
}

/// A task whose samples are read, before there is a model to encode them.
pub struct Material(Kind);

enum Kind {
    Benchmark { name: String, entry: &'static TaskEntry, parts: Vec<(Subtask, Vec<Sample>)>, data: Vec<DataFacts> },
    Text { options: TextOptions, limit: Option<usize>, text: String },
}

/// Reads the tasks called `names`; perplexity comes last. `mmlu@5` is MMLU with five shots, whatever `options` say.
///
/// # Errors
/// Names that nothing has, data that is missing or not what was published.
pub fn read(names: &[String], source: &Source, options: &SuiteOptions) -> Result<Vec<Material>, SuiteError> {
    let mut by_shots: Vec<(Option<usize>, Vec<String>)> = Vec::new();
    for name in names.iter().filter(|name| *name != PERPLEXITY) {
        let (bare, shots) = match name.split_once('@') {
            Some((bare, shots)) => (bare, Some(shots.parse().map_err(|_| SuiteError::Shots(name.clone()))?)),
            None => (name.as_str(), None),
        };
        match by_shots.iter_mut().find(|(known, _)| *known == shots) {
            Some((_, names)) => names.push(bare.into()),
            None => by_shots.push((shots, vec![bare.into()])),
        }
    }
    let mut read = Vec::new();
    for (shots, names) in by_shots {
        for selected in select(&names)? {
            read.push(benchmark(selected, shots, source, options)?);
        }
    }
    if names.iter().any(|name| name == PERPLEXITY) {
        let (options, limit) = (options.perplexity.clone(), options.limit);
        let text = std::fs::read_to_string(&options.text).map_err(|e| options.error(e.to_string()))?;
        read.push(Material(Kind::Text { options, limit, text }));
    }
    Ok(read)
}

fn benchmark(
    selected: Selected,
    shots: Option<usize>,
    source: &Source,
    options: &SuiteOptions,
) -> Result<Material, SuiteError> {
    let entry = selected.task;
    let name = shots.map_or_else(|| entry.name.into(), |shots| format!("{}@{shots}", entry.name));
    let load = LoadOptions {
        shots: shots.or(options.shots).unwrap_or(entry.shots),
        limit: options.limit,
        fewshot_seed: options.seed,
    };
    let (mut parts, mut data) = (Vec::new(), Vec::new());
    for subtask in selected.subtasks {
        let mut loaded = entry.load(source, &subtask, &load)?;
        for sample in &mut loaded.samples {
            if let (Ask::Generate { max_tokens, .. }, Some(given)) = (&mut sample.ask, options.max_gen_tokens) {
                *max_tokens = given;
            }
        }
        parts.push((subtask, loaded.samples));
        data.extend(loaded.data);
    }
    Ok(Material(Kind::Benchmark { name, entry, parts, data }))
}

impl Material {
    /// Encodes the samples for `lm`.
    ///
    /// # Errors
    /// Texts that cannot be encoded, or that do not fit the model.
    pub fn encode(self, lm: &dyn Lm) -> Result<Task, SuiteError> {
        match self.0 {
            Kind::Benchmark { name, entry, parts, data } => {
                let (mut questions, mut subtasks) = (Vec::new(), Vec::new());
                for (i, (subtask, samples)) in parts.into_iter().enumerate() {
                    let lm_error = |problem| SuiteError::Lm { task: subtask.name.clone(), problem };
                    questions.extend(encode(lm, i, samples).map_err(lm_error)?);
                    subtasks.push(subtask);
                }
                Ok(Task { name, entry: Some(entry), subtasks, questions, data })
            }
            Kind::Text { options, limit, text } => windows(lm, &options, limit, &text),
        }
    }
}

/// Windows of a text that do not overlap, as published figures have them; what is left over at the end is not scored.
fn windows(lm: &dyn Lm, options: &TextOptions, limit: Option<usize>, text: &str) -> Result<Task, SuiteError> {
    let (window, longest) = (options.window, lm.max_length());
    if window < 2 || window > longest {
        return Err(options.error(format!(
            "--window must be between 2 (its first token is not scored) and {longest} (the model's context); got {window}"
        )));
    }
    let mut ids = lm.encode(text).map_err(|e| options.error(e.to_string()))?;
    ids.truncate(options.tokens_max.unwrap_or(usize::MAX));
    if ids.len() < window {
        let problem = format!("has {} tokens, less than one window of {window}; give --window", ids.len());
        return Err(options.error(problem));
    }
    let question = |(row, tokens): (usize, &[u32])| {
        let bytes = lm.text_bytes(&tokens[1..]);
        let ask = TokenAsk::Window { tokens: tokens.to_vec(), bytes };
        Question { subtask: 0, row, ask, shared: 0, cut: false, sample: None }
    };
    let windows = ids.chunks_exact(window).take(limit.unwrap_or(usize::MAX));
    let questions: Vec<Question> = windows.enumerate().map(question).collect();
    let sha256 = hex(&Sha256::digest(text.as_bytes()));
    let name = options.text.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let data = vec![DataFacts { name, rows: questions.len(), sha256, verified: None }];
    let subtasks = vec![Subtask { name: PERPLEXITY.into(), key: PERPLEXITY, group: None }];
    Ok(Task { name: PERPLEXITY.into(), entry: None, subtasks, questions, data })
}

impl TextOptions {
    fn error(&self, problem: String) -> SuiteError {
        SuiteError::Text { path: self.text.display().to_string(), problem }
    }
}

impl Task {
    /// Names the sample of `question` in the log.
    pub fn key(&self, arm: &str, question: &Question) -> Key {
        let subtask = self.subtasks[question.subtask].name.clone();
        Key { arm: arm.into(), task: self.name.clone(), subtask, row: question.row }
    }

    /// What an answer is worth, by every metric of the task.
    pub fn judge(&self, question: &Question, answer: &Answer) -> Vec<Judged> {
        match (self.entry, &question.sample) {
            (Some(entry), Some(sample)) => (entry.judge)(sample, answer),
            _ => Vec::new(),
        }
    }

    /// Samples whose prompt was cut on the left.
    pub fn cut(&self) -> usize {
        self.questions.iter().filter(|q| q.cut).count()
    }
}
