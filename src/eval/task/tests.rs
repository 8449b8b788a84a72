//! The tasks on the sample rows of eval/samples, written for this repository.

use super::formats::tests::write_parquet;
use super::formats::{Rows, csv, json_lines, json_list};
use super::*;
use crate::model::hub::HubOptions;
use indicatif::MultiProgress;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn samples_dir() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/eval/samples"))
}

fn source() -> Source {
    Source { place: Place::Directory(samples_dir()), unverified: true, bars: MultiProgress::new() }
}

fn options(shots: usize) -> LoadOptions {
    LoadOptions { shots, limit: None, fewshot_seed: 1234 }
}

fn chosen(name: &str) -> (&'static TaskEntry, Subtask) {
    let mut selected = select(&[name.to_string()]).unwrap().remove(0);
    (selected.task, selected.subtasks.remove(0))
}

fn load(name: &str, options: &LoadOptions) -> Result<Loaded, String> {
    let (task, subtask) = chosen(name);
    task.load(&source(), &subtask, options).map_err(|e| e.to_string())
}

/// All samples there are rows for.
const ALL: [&str; 6] = ["boolean_expressions", "snarks", "astronomy", "high_school_geography", "gsm8k", "gsm8k_cot"];

#[test]
fn names_are_unique_and_metrics_and_shots_make_sense() {
    let mut names: Vec<String> = TASKS.iter().flat_map(|task| (task.subtasks)()).map(|s| s.name).collect();
    assert_eq!(names.len(), 27 + 57 + 1 + 1);
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 86);
    for task in TASKS {
        assert!(!task.metrics.is_empty() && task.shots_allowed.contains(&task.shots), "{}", task.name);
        assert!(!task.summary.is_empty() && !task.version.is_empty());
    }
}

#[test]
fn bbh_prompts_are_description_shots_and_question() {
    let want = "Say whether each sentence of logic is True or False.\n\n\
        Q: True and not False is\nA: Let's think step by step.\n\
        We know that not False is True. True and True is True. So the answer is True.\n\n\
        Q: not True or True is\nA: Let's think step by step.\n";
    let loaded = load("boolean_expressions", &options(1)).unwrap();
    assert_eq!(loaded.samples[0].prompt, want);
    assert_eq!(loaded.samples[0].reference, "True");
    let until = ["</s>", "Q", "\n\n"].map(String::from).to_vec();
    assert_eq!(loaded.samples[0].ask, Ask::Generate { until, max_tokens: 1024 });
    let zero = &load("snarks", &options(0)).unwrap().samples[0].prompt;
    assert!(
        zero.starts_with("One of two lines means") && zero.contains("such things.\n\nQ: Which of the two"),
        "{zero}"
    );
    let three = &load("snarks", &options(3)).unwrap().samples[2].prompt;
    assert_eq!(three.matches("\nA: Let's think step by step.\n").count(), 4);
}

#[test]
fn mmlu_prompts_strip_the_question_and_nothing_else() {
    let want = "The following are multiple choice questions (with answers) about high school geography.\n\n\
        Where does a river end most often?\nA. On a hill\nB. In the sea\nC. In the sky\nD. In a tree\nAnswer: B\n\n\
        What is at the top of a very high mountain, often?\nA. Snow\nB. Palms\nC. A beach\nD. A port\nAnswer:";
    let loaded = load("high_school_geography", &options(1)).unwrap();
    assert_eq!(loaded.samples[0].prompt, want);
    let continuations = [" A", " B", " C", " D"].map(String::from).to_vec();
    assert_eq!(loaded.samples[2].ask, Ask::Choose { continuations, right: 3 });
    assert_eq!(loaded.samples[2].reference, "D");
    let prompt = &load("astronomy", &options(0)).unwrap().samples[2].prompt;
    let end = ".\n\nWhat causes day and night?\n\
        A. The Earth turns\nB. The Sun goes out\nC. The Moon hides\nD. Clouds come\nAnswer:";
    assert!(prompt.ends_with(end), "{prompt}");
}

#[test]
fn gsm8k_shots_are_drawn_anew_for_each_row_by_the_seed() {
    let five = load("gsm8k", &options(5)).unwrap().samples;
    assert!(five.iter().all(|sample| sample.prompt.matches("Question: ").count() == 6));
    let shots = |sample: &Sample| sample.prompt.rsplit_once("Question: ").unwrap().0.to_string();
    assert_ne!(shots(&five[0]), shots(&five[1]));
    let limited = load("gsm8k", &LoadOptions { limit: Some(2), ..options(5) }).unwrap().samples;
    assert_eq!(limited, five[..2], "fewer rows have the same shots");
    let reseeded = load("gsm8k", &LoadOptions { fewshot_seed: 1, ..options(5) }).unwrap().samples;
    assert_ne!(shots(&reseeded[0]), shots(&five[0]));
    let zero = &load("gsm8k", &options(0)).unwrap().samples[3];
    assert_eq!(zero.prompt, "Question: Jack has 8 cookies. He eats half of them. How many are left?\nAnswer:");
    assert!(zero.reference.starts_with("He eats 8/2") && zero.reference.ends_with("\n#### 4"));
}

#[test]
fn gsm8k_cot_asks_after_its_exemplars_and_keeps_the_number() {
    let sample = load("gsm8k_cot", &options(1)).unwrap().samples.remove(2);
    let want = "Q: Anna has 2 dolls. She gets 1 more. How many dolls does she have?\n\
        A: Anna had 2 dolls. She got 1 more. 2 + 1 = 3. The answer is 3.\n\n\
        Q: A boat costs $1,500. Grandpa pays $500 less. What does he pay?\nA:";
    assert_eq!(sample.prompt, want);
    assert_eq!(sample.reference, "1,000");
    let until = ["Q:", "</s>", "<|im_end|>"].map(String::from).to_vec();
    assert_eq!(sample.ask, Ask::Generate { until, max_tokens: 256 });
}

#[test]
fn limits_take_the_first_rows_and_facts_are_of_the_whole_split() {
    for name in ALL {
        let (task, _) = chosen(name);
        let all = load(name, &options(task.shots)).unwrap();
        let two = load(name, &LoadOptions { limit: Some(2), ..options(task.shots) }).unwrap();
        assert_eq!(two.samples, all.samples[..2], "{name}");
        assert_eq!(two.data, all.data, "{name}");
        assert_eq!(all.data[0].rows, all.samples.len(), "{name}");
        assert!(all.data.iter().all(|facts| facts.verified == Some(false)), "{name}");
        assert!(all.samples.iter().enumerate().all(|(i, sample)| sample.index == i), "{name}");
    }
}

/// Text columns of the data behind samples, in the hub's cache under `dir`.
fn put_in_cache(dir: &Path, dataset: &str, file: &str, columns: [&str; 2], rows: Vec<Vec<String>>) {
    let dataset = dir.join(format!("datasets--{}", dataset.replace('/', "--")));
    let path = dataset.join("snapshots/a0").join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::create_dir_all(dataset.join("refs")).unwrap();
    fs::write(dataset.join("refs/main"), "a0").unwrap();
    write_parquet(&path, columns, &rows);
}

#[test]
fn the_hub_gives_the_samples_that_a_directory_gives() {
    let cache = TempDir::new().unwrap();
    for split in ["dev", "test"] {
        let rows: Rows<6> = csv(&samples_dir().join(format!("mmlu/{split}/astronomy_{split}.csv"))).unwrap();
        let rows = rows.into_iter().map(Vec::from).collect();
        let file = format!("astronomy/{split}-00000-of-00001.parquet");
        put_in_cache(cache.path(), "cais/mmlu", &file, ["question", "subject"], rows);
    }
    for split in ["train", "test"] {
        let path = samples_dir().join(format!("gsm8k/{split}.jsonl"));
        let rows = json_lines(&path, ["question", "answer"]).unwrap().into_iter().map(Vec::from).collect();
        let file = format!("main/{split}-00000-of-00001.parquet");
        put_in_cache(cache.path(), "openai/gsm8k", &file, ["question", "answer"], rows);
    }
    let rows = json_list(&samples_dir().join("bbh/bbh/snarks.json"), Some("examples"), ["input", "target"]).unwrap();
    let rows = rows.into_iter().map(Vec::from).collect();
    put_in_cache(cache.path(), "SaylorTwift/bbh", "snarks/test-00000-of-00001.parquet", ["input", "target"], rows);
    let prompt = |key: &str| {
        let text = fs::read_to_string(samples_dir().join(format!("bbh/cot-prompts/{key}.txt"))).unwrap();
        vec![key.to_string(), text.split_once("-----\n").unwrap().1.to_string()]
    };
    put_in_cache(
        cache.path(),
        "Joschka/big_bench_hard",
        "few_shot_prompts/few_shot_prompts-00000-of-00001.parquet",
        ["dataset_name", "chain_of_thought_prompt"],
        vec![prompt("boolean_expressions"), prompt("snarks")],
    );
    let hub = HubOptions { offline: true, cache: Some(cache.path().into()), ..Default::default() };
    let source = Source { place: Place::Hub(hub), ..source() };
    for (name, shots) in [("astronomy", 5), ("gsm8k", 5), ("snarks", 3)] {
        let (task, subtask) = chosen(name);
        let hub = task.load(&source, &subtask, &options(shots)).unwrap();
        let directory = load(name, &options(shots)).unwrap();
        assert_eq!(hub.samples, directory.samples, "{name}");
        assert_eq!(hub.data, directory.data, "{name}");
    }
}

#[test]
fn own_rows_are_refused_unless_asked_for() {
    for name in ALL {
        let (task, subtask) = chosen(name);
        let source = Source { unverified: false, ..source() };
        let error = task.load(&source, &subtask, &options(task.shots)).unwrap_err().to_string();
        assert!(error.contains("the published data") && error.contains("--unverified"), "{name}: {error}");
    }
}

#[test]
fn more_shots_than_allowed_or_there_are_refused() {
    for (name, shots, want) in [
        ("snarks", 4, "--shots 4: bbh takes 0 to 3"),
        ("astronomy", 6, "--shots 6: mmlu takes 0 to 5"),
        ("gsm8k_cot", 9, "--shots 9: gsm8k_cot takes 0 to 8"),
        ("gsm8k", 7474, "--shots 7474: gsm8k takes 0 to 7473"),
        ("gsm8k", 9, "--shots 9: gsm8k takes 0 to 8"),
    ] {
        assert!(load(name, &options(shots)).unwrap_err().starts_with(want));
    }
}

#[test]
fn answers_are_judged_by_every_metric() {
    for (name, row, answer, want) in [
        ("snarks", 0, "(A) is. So the answer is (A).", &[("(A)", true)][..]),
        ("snarks", 0, "So the answer is (A)", &[("(A", false)]),
        ("gsm8k", 2, "1500-500=1000.\n#### 1000", &[("1000", true), ("1000", true)]),
        ("gsm8k", 2, "It is $1,000.", &[("[invalid]", false), ("$1,000.", true)]),
        ("gsm8k_cot", 2, "The answer is 1000.", &[("1000", true), ("1000.", true)]),
        ("gsm8k_cot", 2, "The answer is 1000", &[("100", false), ("1000", true)]),
        ("gsm8k_cot", 2, "", &[("[invalid]", false), ("[invalid]", false)]),
    ] {
        let (task, _) = chosen(name);
        let sample = &load(name, &options(0)).unwrap().samples[row];
        let judged = (task.judge)(sample, &Answer::Text(answer.into()));
        let judged: Vec<_> = judged.iter().map(|j| (j.prediction.as_str(), j.correct)).collect();
        assert_eq!(judged, want, "{name}: {answer}");
        assert_eq!(judged.len(), task.metrics.len());
    }
}

#[test]
fn a_choice_is_right_if_it_is_the_answer() {
    let sample = &load("astronomy", &options(0)).unwrap().samples[1];
    let judge = |answer| (chosen("astronomy").0.judge)(sample, &answer).remove(0);
    assert_eq!(judge(Answer::Choice(2)), Judged { prediction: "C".into(), correct: true });
    assert_eq!(judge(Answer::Choice(0)), Judged { prediction: "A".into(), correct: false });
    assert!(!judge(Answer::Choice(9)).correct);
}

/// Beginnings of errors for a file of bad content, instead of one of the samples.
#[test]
fn bad_files_are_named_with_the_row() {
    for (name, file, text, want) in [
        (
            "snarks",
            "bbh/bbh/snarks.json",
            "{\"examples\":[{\"input\":\"a\"}]}",
            "row 1 (counted from 1): has no text `target`",
        ),
        ("snarks", "bbh/cot-prompts/snarks.txt", "A description.\n\nQ: 1", "has no line `-----` before its prompt"),
        ("snarks", "bbh/cot-prompts/snarks.txt", "-----\nx\n\nQ: 1\nA: 2", "a shot has no line that begins `A: Let's"),
        (
            "snarks",
            "bbh/cot-prompts/snarks.txt",
            "-----\nx\n\nQ: 1\nA: Let's think step by step.\n2",
            "has 1 shots (`Q: …`) instead of 3",
        ),
        (
            "astronomy",
            "mmlu/dev/astronomy_dev.csv",
            "q,a,b,c,d,E\n",
            "row 1 (counted from 1): the answer is \"E\", not one of A, B, C and D",
        ),
        ("gsm8k", "gsm8k/train.jsonl", "{}\n", "row 1 (counted from 1): has no text `question`"),
        ("gsm8k_cot", "gsm8k/cot_8shot_exemplars.json", "{}", "is not a JSON list"),
    ] {
        let dir = TempDir::new().unwrap();
        for file in ["bbh/bbh/snarks.json", "mmlu/test/astronomy_test.csv", "gsm8k/test.jsonl"] {
            fs::create_dir_all(dir.path().join(file).parent().unwrap()).unwrap();
            fs::copy(samples_dir().join(file), dir.path().join(file)).unwrap();
        }
        fs::create_dir_all(dir.path().join(file).parent().unwrap()).unwrap();
        fs::write(dir.path().join(file), text).unwrap();
        let source = Source { place: Place::Directory(dir.path().into()), ..source() };
        let (task, subtask) = chosen(name);
        let error = task.load(&source, &subtask, &options(1)).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains(file), "{error}");
    }
}

#[test]
fn sports_understanding_gets_the_newline_that_lm_eval_has() {
    let dir = TempDir::new().unwrap();
    let shot = "Q: Is it so?\nA: Let's think step by step. It is so. So the answer is yes.";
    let (rows, prompts) = (dir.path().join("bbh"), dir.path().join("cot-prompts"));
    fs::create_dir_all(&rows).unwrap();
    fs::create_dir_all(&prompts).unwrap();
    fs::write(rows.join("sports_understanding.json"), "{\"examples\":[{\"input\":\"?\",\"target\":\"yes\"}]}").unwrap();
    fs::write(prompts.join("sports_understanding.txt"), format!("x\n-----\nD.\n\n{shot}\n\n{shot}\n\n{shot}\n"))
        .unwrap();
    let source = Source { place: Place::Directory(dir.path().into()), ..source() };
    let (task, subtask) = chosen("sports_understanding");
    let samples = task.load(&source, &subtask, &options(1)).unwrap().samples;
    let want = "D.\n\nQ: Is it so?\nA: Let's think step by step.\nIt is so. So the answer is yes.\n\n\
        Q: ?\nA: Let's think step by step.\n";
    assert_eq!(samples[0].prompt, want);
}

#[test]
fn every_split_of_every_task_is_in_the_table_of_sums() {
    for name in ALL {
        let (task, subtask) = chosen(name);
        for facts in task.load(&source(), &subtask, &options(1)).unwrap().data {
            assert!(source::published(&facts.name).is_some(), "{}", facts.name);
        }
    }
    for task in TASKS.iter().filter(|task| task.name != "gsm8k" && task.name != "gsm8k_cot") {
        for subtask in (task.subtasks)() {
            let parts = if task.name == "bbh" { ["test", "cot-prompt"] } else { ["test", "dev"] };
            for part in parts {
                let name = format!("{}/{}/{part}", task.name, subtask.key);
                assert!(source::published(&name).is_some(), "{name}");
            }
        }
    }
}
