//! BIG-Bench Hard with three chains of thought: lm-eval's group `bbh` (`bbh_cot_fewshot`).
//!
//! Suzgun et al., "Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve Them", 2022.

use super::extract::{bbh_answer, exact};
use super::formats::{Rows, json_list, parquet, read_text};
use super::source::{DataError, HubFile, Split};
use super::{Answer, Ask, Judged, LoadOptions, Loaded, Sample, Source, Subtask, TaskEntry};
use std::path::Path;

pub(super) const TASK: TaskEntry = TaskEntry {
    name: "bbh",
    summary: "BIG-Bench Hard: 27 kinds of reasoning, thought aloud and answered in words (6,511 samples)",
    version: "4.0",
    shots: 3,
    shots_allowed: 0..=3,
    metrics: &["exact_match,get-answer"],
    subtasks,
    read,
    judge,
};

const SUBTASKS: [&str; 27] = [
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
];

/// What every answer begins with.
const LEAD: &str = "A: Let's think step by step.";
const UPSTREAM: &str = "github.com/suzgunmirac/BIG-Bench-Hard";

fn subtasks() -> Vec<Subtask> {
    let subtask = |key: &&'static str| Subtask { name: format!("bbh_cot_fewshot_{key}"), key, group: None };
    SUBTASKS.iter().map(subtask).collect()
}

fn read(source: &Source, subtask: &Subtask, options: &LoadOptions) -> Result<Loaded, DataError> {
    let key = subtask.key;
    // Two copies on the hub: the one that lm-eval reads has the rows, another one the chains of thought.
    let (rows, test) = source.read(Split {
        name: format!("bbh/{key}/test"),
        file: format!("bbh/bbh/{key}.json"),
        parse: |path| json_list(path, Some("examples"), ["input", "target"]),
        hub: Some(HubFile {
            dataset: "SaylorTwift/bbh",
            file: format!("{key}/test-00000-of-00001.parquet"),
            parse: Box::new(|path| parquet(path, |row| Ok([row.text("input")?, row.text("target")?]))),
        }),
        upstream: UPSTREAM,
    })?;
    let (prompts, facts) = source.read(Split {
        name: format!("bbh/{key}/cot-prompt"),
        file: format!("bbh/cot-prompts/{key}.txt"),
        parse: read_prompt,
        hub: Some(HubFile {
            dataset: "Joschka/big_bench_hard",
            file: "few_shot_prompts/few_shot_prompts-00000-of-00001.parquet".into(),
            parse: Box::new(move |path| hub_prompt(path, key)),
        }),
        upstream: UPSTREAM,
    })?;
    let mut prefix = String::new();
    for [description, shots @ ..] in &prompts {
        prefix += &format!("{description}\n\n");
        for shot in shots.chunks_exact(2).take(options.shots) {
            prefix += &format!("{}{}\n\n", text(&shot[0]), shot[1]);
        }
    }
    let sample = |(index, [input, target]): (usize, [String; 2])| Sample {
        index,
        prompt: format!("{prefix}{}", text(&input)),
        ask: Ask::Generate { until: ["</s>", "Q", "\n\n"].map(String::from).to_vec(), max_tokens: 1024 },
        reference: target,
    };
    let samples = rows.into_iter().take(options.rows()).enumerate().map(sample).collect();
    Ok(Loaded { samples, data: vec![test, facts] })
}

fn text(input: &str) -> String {
    format!("Q: {input}\n{LEAD}\n")
}

/// A prompt file as one row: the description, then question and answer of each of the three shots.
fn read_prompt(path: &Path) -> Result<Rows<7>, DataError> {
    let file = read_text(path)?;
    let body = file.split_once("-----\n").map(|(_, body)| body);
    prompt(path, body.ok_or_else(|| DataError::file(path, "has no line `-----` before its prompt"))?)
}

/// The same out of the hub's table of all prompts.
fn hub_prompt(path: &Path, key: &str) -> Result<Rows<7>, DataError> {
    let rows = parquet(path, |row| Ok([row.text("dataset_name")?, row.text("chain_of_thought_prompt")?]))?;
    let found = rows.iter().find(|[name, _]| name == key);
    let [_, text] = found.ok_or_else(|| DataError::file(path, format!("has no prompt of {key}")))?;
    prompt(path, text)
}

fn prompt(path: &Path, body: &str) -> Result<Rows<7>, DataError> {
    let wrong = |problem: &str| DataError::file(path, problem);
    let mut parts = body.strip_suffix('\n').unwrap_or(body).split("\n\nQ: ");
    let mut row = vec![parts.next().unwrap_or_default().to_string()];
    for shot in parts {
        let lead = format!("\n{LEAD}");
        let (question, answer) =
            shot.split_once(&lead).ok_or_else(|| wrong(&format!("a shot has no line that begins `{LEAD}`")))?;
        // A newline follows; in sports_understanding a space, where lm-eval has a newline.
        let answer = answer.strip_prefix(['\n', ' ']).unwrap_or(answer);
        row.extend([question.to_string(), answer.to_string()]);
    }
    let found = row.len() / 2;
    Ok(vec![row.try_into().map_err(|_| wrong(&format!("has {found} shots (`Q: …`) instead of 3")))?])
}

fn judge(sample: &Sample, answer: &Answer) -> Vec<Judged> {
    vec![exact(bbh_answer(answer.text()), &sample.reference)]
}
