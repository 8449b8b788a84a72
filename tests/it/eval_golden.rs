//! Answers and scores beside those of lm-eval 0.4.13 with transformers, on the checkpoints and data that lie in ../shared
//! or where MOE_SHARED_DIR says. `tests/golden/lm_eval/make.py` made the golden files.

use crate::eval::{own_router, samples};
use crate::support::{repo, shared_data, try_load};
use moe_serve::engine::{Engine, EngineConfig, Text};
use moe_serve::eval::compare::evaluate;
use moe_serve::eval::results::{Metric, TaskResult};
use moe_serve::eval::task::{Place, Source};
use moe_serve::eval::{
    Chosen, Generated, How, InProcess, Lm, LmError, Outcome, Question, Runner, Said, Scored, SuiteOptions, Task, read,
};
use moe_serve::moe::Policy;
use moe_serve::types::{DtypeChoice, hex};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Difference of log-likelihoods that rounding explains: single precision, sums in another order.
const NATS_MAX: f64 = 1e-4;

/// The checkpoint `dir`, in f32.
fn in_process(dir: &Path) -> InProcess {
    let loaded = try_load(dir, DtypeChoice::F32).unwrap();
    let shape = loaded.model.shape().clone();
    let text = Text::read(&dir.join("tokenizer.json"), shape.vocab).unwrap();
    let policy = Policy::build(&"native".parse().unwrap(), &shape.moe).unwrap();
    let engine = Engine::start("golden".into(), loaded, text.clone(), policy, EngineConfig::default()).unwrap();
    InProcess::new(Arc::new(engine), text, &shape)
}

/// A run of the golden file: its task, shots, samples per subtask, and tokens per completion.
fn options(settings: &Value) -> (Vec<String>, SuiteOptions) {
    let number = |value: &Value| value.as_u64().map(|n| n as usize);
    let tasks = settings["tasks"].as_array().unwrap().iter().map(|t| t.as_str().unwrap().to_string()).collect();
    let options = SuiteOptions {
        shots: number(&settings["num_fewshot"]),
        limit: number(&settings["limit"]),
        seed: 1234,
        max_gen_tokens: number(&settings["gen_kwargs"]["max_gen_toks"]),
        ..Default::default()
    };
    (tasks, options)
}

fn assert_same(outcome: &Outcome, golden: &Value) {
    let what = format!("{} {}", outcome.key.subtask, outcome.key.row);
    match &outcome.said {
        Said::LogLikelihoods(values) => {
            let golden_values = golden["loglikelihoods"].as_array().unwrap();
            assert_eq!(values.len(), golden_values.len(), "{what}");
            for (ours, theirs) in values.iter().zip(golden_values) {
                let theirs = theirs.as_f64().unwrap();
                assert!((ours - theirs).abs() < NATS_MAX, "{what}: {ours}, lm-eval {theirs}");
            }
            assert_eq!(outcome.judged[0].prediction, golden["prediction"].as_str().unwrap(), "{what}");
            assert_eq!(f64::from(outcome.judged[0].correct), golden["acc"].as_f64().unwrap(), "{what}");
        }
        Said::Text(text) => {
            assert_eq!(text, golden["response"].as_str().unwrap(), "{what}");
            let filters = golden["filters"].as_object().unwrap();
            assert_eq!(filters.len(), outcome.judged.len(), "{what}");
            for (judged, (filter, theirs)) in outcome.judged.iter().zip(filters) {
                assert_eq!(judged.prediction, theirs["prediction"].as_str().unwrap(), "{what}, {filter}");
                assert_eq!(f64::from(judged.correct), theirs["exact_match"].as_f64().unwrap(), "{what}, {filter}");
            }
        }
        Said::Window(_) => panic!("{what}: a window"),
    }
}

/// The metrics that lm-eval reports under `name`: the task's, a group's, a subtask's.
fn metrics<'a>(result: &'a TaskResult, name: &str) -> Option<&'a [Metric]> {
    let part = result.groups.iter().chain(&result.subtasks).find(|s| s.name == name).map(|s| &s.metrics[..]);
    part.or_else(|| (result.task == name).then_some(&result.metrics))
}

fn assert_aggregate(result: &TaskResult, golden: &Value) {
    let name = golden["name"].as_str().unwrap();
    // lm-eval's `bbh` is a group of that one.
    let name = if name == "bbh_cot_fewshot" { "bbh" } else { name };
    let metrics = metrics(result, name).unwrap_or_else(|| panic!("no result of {name}"));
    // Metrics without a filter are called `acc,none` there.
    let wanted = golden["metric"].as_str().unwrap().trim_end_matches(",none");
    let metric = metrics.iter().find(|m| m.name == wanted).unwrap_or_else(|| panic!("{name} has no {wanted}"));
    assert!(
        (metric.value - golden["value"].as_f64().unwrap()).abs() < 1e-9,
        "{name}: {}, lm-eval {golden}",
        metric.value
    );
    match golden["stderr"].as_f64() {
        Some(stderr) => {
            let ours = metric.stderr.unwrap_or_else(|| panic!("{name} has no standard error; lm-eval {golden}"));
            assert!((ours - stderr).abs() < 1e-9, "{name}: ± {ours}, lm-eval {golden}");
        }
        None => assert_eq!(metric.stderr, None, "{name}: lm-eval gives no standard error"),
    }
}

fn golden(name: &str) {
    let Some(data) = shared_data("gsm8k/test.jsonl") else { return };
    let dir = data.join("checkpoints").join(name);
    let file = std::fs::read_to_string(repo(&format!("tests/golden/lm_eval/{name}.jsonl"))).unwrap();
    let lines: Vec<Value> = file.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let lm = in_process(&dir);
    assert_eq!(lm.max_length() as u64, lines[0]["max_length"].as_u64().unwrap());
    for (run, settings) in lines[0]["runs"].as_object().unwrap() {
        let (names, options) = options(settings);
        let source = Source { place: Place::Directory(data.clone()), unverified: false, bars: Default::default() };
        let material = read(&names, &source, &options).unwrap();
        let tasks: Vec<_> = material.into_iter().map(|m| m.encode(&lm).unwrap()).collect();
        let folder = tempfile::tempdir().unwrap();
        let runner = samples(&lm, folder.path());
        let arms = evaluate(&runner, &tasks, &own_router(), |_, _| {}).unwrap();
        let of_run = |kind: &str| lines.iter().filter(|l| l["kind"] == kind && l["run"] == *run).collect::<Vec<_>>();
        let goldens = [of_run("choice"), of_run("generation")].concat();
        let log = runner.log();
        assert_eq!(log.outcomes.len(), goldens.len(), "{run}");
        for golden in &goldens {
            let ours = log.outcomes.values().find(|o| golden["task"] == *o.key.subtask && golden["doc"] == o.key.row);
            assert_same(ours.unwrap_or_else(|| panic!("{run}: no answer to {golden}")), golden);
        }
        let aggregates = of_run("aggregate");
        aggregates.iter().for_each(|golden| assert_aggregate(&arms[0].tasks[0], golden));
        assert!(aggregates.len() > arms[0].tasks[0].subtasks.len(), "{run}: too few aggregates");
        eprintln!("{name}, {run}: {} answers, {} aggregates are lm-eval's", goldens.len(), aggregates.len());
    }
}

#[test]
fn answers_and_scores_of_stories_mixtral_are_those_of_lm_eval() {
    golden("stories-mixtral");
}

#[test]
fn answers_and_scores_of_stories_olmoe_are_those_of_lm_eval() {
    golden("stories-olmoe");
}

/// The model that made scripted.jsonl. Its tokens are the bytes of a text, so that it knows what it is asked.
struct Scripted {
    phrases: Vec<String>,
    /// The right answers to every prompt, in the order of rows: causal_judgement asks one question twice, and wants
    /// another answer the second time.
    answers: Mutex<HashMap<String, VecDeque<String>>>,
}

fn text(tokens: &[u32]) -> String {
    String::from_utf8(tokens.iter().map(|byte| *byte as u8).collect()).unwrap()
}

impl Lm for Scripted {
    fn max_length(&self) -> usize {
        1 << 40
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, LmError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn text_bytes(&self, tokens: &[u32]) -> usize {
        tokens.len()
    }

    fn choose(&self, context: &[u32], continuations: &[Vec<u32>], _: &How<'_>) -> Result<Chosen, LmError> {
        let sum = Sha256::digest(text(context));
        let letters: Vec<String> = continuations.iter().map(|c| text(c)).collect();
        assert_eq!(letters, [" A", " B", " C", " D"]);
        let log_likelihoods = sum[..4].iter().map(|byte| -f64::from(byte % 8)).collect();
        Ok(Chosen { log_likelihoods, routed: None })
    }

    fn generate(&self, prompt: &[u32], until: &[String], _: usize, _: &How<'_>) -> Result<Generated, LmError> {
        let prompt = text(prompt);
        assert!(until.contains(&"</s>".to_string()));
        let phrase = &self.phrases[usize::from(Sha256::digest(&prompt)[0] % 16)];
        let answer = self.answers.lock().unwrap().get_mut(&prompt).unwrap().pop_front().unwrap();
        Ok(Generated { text: phrase.replace("{answer}", &answer), routed: None })
    }

    fn score(&self, _: &[u32], _: &How<'_>) -> Result<Scored, LmError> {
        unreachable!("no task asks for it")
    }
}

/// SHA-256 over lines.
fn lines_sum(lines: impl Iterator<Item = String>) -> String {
    hex(&Sha256::digest(lines.map(|line| line + "\n").collect::<String>()))
}

/// Every sample of every task, with answers of all forms, right and wrong: prompts, extraction, scores, averages and
/// standard errors.
#[test]
fn all_samples_are_judged_and_averaged_as_lm_eval_does() {
    let Some(data) = shared_data("gsm8k/test.jsonl") else { return };
    let lines: Vec<Value> =
        include_str!("../golden/lm_eval/scripted.jsonl").lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let phrases: Vec<String> = serde_json::from_value(lines[0]["phrases"].clone()).unwrap();
    for (run, settings) in lines[0]["runs"].as_object().unwrap() {
        let (names, options) = options(settings);
        let source = Source { place: Place::Directory(data.clone()), unverified: false, bars: Default::default() };
        let lm = Scripted { phrases: phrases.clone(), answers: Mutex::default() };
        let material = read(&names, &source, &options).unwrap();
        let tasks: Vec<Task> = material.into_iter().map(|m| m.encode(&lm).unwrap()).collect();
        let last = |reference: &str| reference.rsplit("####").next().unwrap().trim().to_string();
        for q in &tasks[0].questions {
            let mut answers = lm.answers.lock().unwrap();
            let right = last(&q.sample.as_ref().unwrap().reference);
            answers.entry(text(q.ask.prompt())).or_default().push_back(right);
        }
        let folder = tempfile::tempdir().unwrap();
        let runner = Runner { workers: 1, ..samples(&lm, folder.path()) };
        let arms = evaluate(&runner, &tasks, &own_router(), |_, _| {}).unwrap();
        let log = runner.log();
        let of_run = |kind: &str| lines.iter().filter(|l| l["kind"] == kind && l["run"] == *run).collect::<Vec<_>>();
        for digest in of_run("digest") {
            let name = digest["task"].as_str().unwrap();
            let subtask = tasks[0].subtasks.iter().position(|s| s.name == name).unwrap();
            let own: Vec<&Question> = tasks[0].questions.iter().filter(|q| q.subtask == subtask).collect();
            assert_eq!(digest["samples"], own.len(), "{name}");
            let prompts = own.iter().map(|q| hex(&Sha256::digest(text(q.ask.prompt()))));
            assert_eq!(digest["prompts_sha256"], lines_sum(prompts), "{run}, {name}: prompts");
            for (m, (filter, sum)) in digest["predictions_sha256"].as_object().unwrap().iter().enumerate() {
                let prediction = |q: &&Question| {
                    let outcome = &log.outcomes[&tasks[0].key(&arms[0].label, q)];
                    outcome.judged[m].prediction.clone()
                };
                assert_eq!(*sum, lines_sum(own.iter().map(prediction)), "{run}, {name}, {filter}");
            }
        }
        of_run("aggregate").iter().for_each(|golden| assert_aggregate(&arms[0].tasks[0], golden));
        eprintln!("{run}: {} samples are judged as lm-eval does", log.outcomes.len());
    }
}
