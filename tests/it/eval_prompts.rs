//! Prompts and shots beside lm-eval's, on the published data that lies in ../shared or where MOE_SHARED_DIR says.

use crate::support::shared_data;
use indicatif::MultiProgress;
use moe_serve::eval::task::{Ask, LoadOptions, Loaded, Place, Source, select};
use moe_serve::types::hex;
use sha2::{Digest, Sha256};
use std::path::Path;

fn load(dir: &Path, subtask: &str, shots: usize) -> Loaded {
    let source = Source { place: Place::Directory(dir.into()), unverified: false, bars: MultiProgress::new() };
    let selected = select(&[subtask.to_string()]).unwrap().remove(0);
    let options = LoadOptions { shots, limit: None, fewshot_seed: 1234 };
    selected.task.load(&source, &selected.subtasks[0], &options).unwrap()
}

/// SHA-256 of texts joined by NULs.
fn digest<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    let joined = texts.collect::<Vec<_>>().join("\0");
    hex(&Sha256::digest(joined))
}

/// Lines of prompts.sha256: subtask, shots, samples, digest of the prompts and of the references that lm-eval 0.4.13
/// made of the same rows.
#[test]
fn every_prompt_and_reference_is_that_of_lm_eval() {
    let Some(dir) = shared_data("gsm8k/test.jsonl") else { return };
    let mut prompts = 0;
    for line in include_str!("../golden/eval/prompts.sha256").lines() {
        let [subtask, shots, ..] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let Loaded { samples, data } = load(&dir, subtask, shots.parse().unwrap());
        assert!(data.iter().all(|facts| facts.verified == Some(true)), "{subtask}");
        let prompt_sum = digest(samples.iter().map(|sample| sample.prompt.as_str()));
        let reference_sum = digest(samples.iter().map(|sample| sample.reference.as_str()));
        assert_eq!(format!("{subtask} {shots} {} {prompt_sum} {reference_sum}", samples.len()), line);
        for sample in &samples {
            if let Ask::Choose { continuations, right } = &sample.ask {
                assert_eq!(continuations[*right], format!(" {}", sample.reference));
            }
        }
        prompts += samples.len();
    }
    eprintln!("{prompts} prompts are those of lm-eval");
}

/// The rows that CPython's generator draws, all of them.
#[test]
fn shots_of_gsm8k_are_the_rows_that_cpython_draws() {
    let Some(dir) = shared_data("gsm8k/test.jsonl") else { return };
    let train: Vec<serde_json::Value> = std::fs::read_to_string(dir.join("gsm8k/train.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let drawn = std::fs::read_to_string(dir.join("gsm8k/fewshot5_train_indices_seed1234.csv")).unwrap();
    let samples = load(&dir, "gsm8k", 5).samples;
    assert_eq!(drawn.lines().count() - 1, samples.len());
    for (sample, line) in samples.iter().zip(drawn.lines().skip(1)) {
        let numbers: Vec<usize> = line.split(',').map(|n| n.parse().unwrap()).collect();
        assert_eq!(numbers[0], sample.index);
        let questions =
            numbers[1..].iter().map(|i| format!("Question: {}\nAnswer: ", train[*i]["question"].as_str().unwrap()));
        let mut rest = sample.prompt.as_str();
        for question in questions {
            rest = rest.strip_prefix(question.as_str()).and_then(|r| r.split_once("\n\nQuestion: ")).unwrap().1;
            rest = &sample.prompt[sample.prompt.len() - rest.len() - "Question: ".len()..];
        }
    }
}
