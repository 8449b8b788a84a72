//! GSM8K, arithmetic in words: lm-eval's tasks `gsm8k` and `gsm8k_cot`.
//!
//! Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021; the chains of thought of `gsm8k_cot` are
//! those of Wei et al., "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models", 2022.

use super::extract::{exact_number, hashes_number, last_number, said_number, strip};
use super::formats::{json_lines, json_list, parquet};
use super::python_random::PythonRandom;
use super::source::{DataError, HubFile, Split};
use super::{Answer, Ask, Judged, LoadOptions, Loaded, Sample, Source, Subtask, TaskEntry};

pub(super) const TASK: TaskEntry = TaskEntry {
    name: "gsm8k",
    summary: "GSM8K: grade-school arithmetic in words, shots drawn anew for each question (1,319 samples)",
    version: "3.0",
    shots: 5,
    shots_allowed: 0..=7473,
    metrics: &["exact_match,strict-match", "exact_match,flexible-extract"],
    subtasks: || subtask("gsm8k"),
    read,
    judge: |sample, answer| judge(hashes_number, sample, answer),
};

pub(super) const TASK_COT: TaskEntry = TaskEntry {
    name: "gsm8k_cot",
    summary: "GSM8K with eight fixed chains of thought (1,319 samples)",
    version: "3.0",
    shots: 8,
    shots_allowed: 0..=8,
    metrics: &["exact_match,strict-match", "exact_match,flexible-extract"],
    subtasks: || subtask("gsm8k_cot"),
    read: read_cot,
    judge: |sample, answer| judge(said_number, sample, answer),
};

fn subtask(key: &'static str) -> Vec<Subtask> {
    vec![Subtask { name: key.into(), key, group: None }]
}

fn split(split: &str) -> Split<2> {
    Split {
        name: format!("gsm8k/{split}"),
        file: format!("gsm8k/{split}.jsonl"),
        parse: |path| json_lines(path, ["question", "answer"]),
        hub: Some(HubFile {
            dataset: "openai/gsm8k",
            file: format!("main/{split}-00000-of-00001.parquet"),
            parse: Box::new(|path| parquet(path, |row| Ok([row.text("question")?, row.text("answer")?]))),
        }),
        upstream: "github.com/openai/grade-school-math (grade_school_math/data)",
    }
}

/// Shots are drawn by one generator in the order of the test rows, so that fewer rows have the same shots.
fn read(source: &Source, subtask: &Subtask, options: &LoadOptions) -> Result<Loaded, DataError> {
    let text = |question: &str| format!("Question: {question}\nAnswer:");
    let (rows, test) = source.read(split("test"))?;
    let mut data = vec![test];
    let mut train = Vec::new();
    if options.shots > 0 {
        let facts;
        (train, facts) = source.read(split("train"))?;
        options.check_shots(&subtask.name, train.len())?;
        data.push(facts);
    }
    let mut random = PythonRandom::new(options.fewshot_seed);
    let sample = |(index, [question, answer]): (usize, [String; 2])| {
        let drawn = random.sample(train.len(), options.shots).unwrap_or_default();
        let shot = |i: usize| format!("{} {}\n\n", text(&train[i][0]), train[i][1]);
        let prompt = drawn.into_iter().map(shot).collect::<String>() + &text(&question);
        Sample { index, prompt, ask: ask("Question:"), reference: answer }
    };
    let samples = rows.into_iter().take(options.rows()).enumerate().map(sample).collect();
    Ok(Loaded { samples, data })
}

fn read_cot(source: &Source, subtask: &Subtask, options: &LoadOptions) -> Result<Loaded, DataError> {
    let text = |question: &str| format!("Q: {question}\nA:");
    let (rows, test) = source.read(split("test"))?;
    let mut data = vec![test];
    let mut prefix = String::new();
    if options.shots > 0 {
        let (shots, facts) = source.read(Split {
            name: "gsm8k/exemplars".into(),
            file: "gsm8k/cot_8shot_exemplars.json".into(),
            parse: |path| json_list(path, None, ["question", "target"]),
            hub: None,
            upstream: "the samples in lm-eval 0.4.13's gsm8k-cot.yaml, written as a JSON list",
        })?;
        options.check_shots(&subtask.name, shots.len())?;
        for [question, target] in &shots[..options.shots] {
            prefix += &format!("{} {target}\n\n", text(question));
        }
        data.push(facts);
    }
    let sample = |(index, [question, answer]): (usize, [String; 2])| {
        let reference = strip(answer.rsplit("####").next().unwrap_or_default()).to_string();
        Sample { index, prompt: format!("{prefix}{}", text(&question)), ask: ask("Q:"), reference }
    };
    let samples = rows.into_iter().take(options.rows()).enumerate().map(sample).collect();
    Ok(Loaded { samples, data })
}

fn ask(stop: &str) -> Ask {
    Ask::Generate { until: [stop, "</s>", "<|im_end|>"].map(String::from).to_vec(), max_tokens: 256 }
}

fn judge(strict: fn(&str) -> String, sample: &Sample, answer: &Answer) -> Vec<Judged> {
    [strict, last_number].map(|rule| exact_number(rule(answer.text()), &sample.reference)).into()
}
