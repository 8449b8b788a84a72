//! The built `moe-eval`: what its flags do, what it refuses, and that a killed run goes on.

use crate::binary::Process;
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// Flags of a run over the repository's own samples.
const SAMPLES: &[&str] =
    &["--data-dir", "eval/samples", "--unverified", "--max-gen-tokens", "24", "--offline", "--resamples", "200"];

fn start(args: &[&str]) -> Process {
    Process::start_binary(env!("CARGO_BIN_EXE_moe-eval"), args, &[])
}

/// Exit code, stdout and stderr of a run to its end.
fn run(args: &[&str]) -> (i32, String, String) {
    let mut process = start(args);
    let (status, stderr) = process.end(Duration::from_secs(180));
    let stdout: Vec<String> = process.stdout.iter().collect();
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    (status.code().unwrap_or(-1), stdout.join("\n"), stderr)
}

/// What a run says that must fail with `code`.
#[track_caller]
fn refusal(args: &[&str], code: i32) -> String {
    let (found, _, stderr) = run(args);
    assert_eq!(found, code, "{args:?}: {stderr}");
    stderr
}

fn results(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("results.json")).unwrap()).unwrap()
}

#[test]
fn a_sweep_writes_the_table_and_every_document() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().to_str().unwrap();
    let args =
        ["--tasks", "mmlu_astronomy,snarks,gsm8k,perplexity", "--text", "eval/samples/text.txt", "--window", "64"];
    let more = ["--router", "dynk:0.5,0.8", "--compare-static", "--output", out];
    let (code, stdout, stderr) = run(&[&args[..], &more, SAMPLES].concat());
    assert_eq!(code, 0, "{stderr}");
    for text in ["dynk:0.5", "dynk:0.8", "static control", "perplexity", "was not shown to beat", "report.html"] {
        assert!(stdout.contains(text), "{text:?} is not in\n{stdout}");
    }
    let results = results(dir.path());
    assert_eq!(results["schema"], 1);
    assert_eq!(results["model"]["hash"].as_str().unwrap().len(), 64);
    assert_eq!(results["arms"].as_array().unwrap().len(), 5);
    assert!(results["command"].as_str().unwrap().contains("dynk:0.5,0.8"));
    assert!(results["data"].as_array().unwrap().iter().any(|d| d["verified"] == false));
    let html = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
    assert!(html.contains("<svg") && !html.contains("<script") && !html.contains("src=\"http"), "self-contained");
    let markdown = std::fs::read_to_string(dir.path().join("report.md")).unwrap();
    assert!(markdown.contains("| arm"), "{markdown}");
}

#[test]
fn a_killed_run_goes_on_with_the_same_command_and_another_one_is_refused() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let args = |out: &Path, seed: &str| -> Vec<String> {
        let fixed = [
            "--tasks",
            "gsm8k,gsm8k_cot,boolean_expressions",
            "--router",
            "dynk:0.7",
            "--compare-static",
            "--workers",
            "2",
        ];
        let own = ["--output", out.to_str().unwrap(), "--seed", seed];
        fixed.iter().chain(&own).chain(SAMPLES).map(|a| a.to_string()).collect()
    };
    fn texts(args: &[String]) -> Vec<&str> {
        args.iter().map(String::as_str).collect()
    }
    assert_eq!(run(&texts(&args(whole.path(), "7"))).0, 0);
    let process = start(&texts(&args(killed.path(), "7")));
    let log = killed.path().join("samples.jsonl");
    let lines = || std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
    let deadline = Instant::now() + Duration::from_secs(120);
    while lines() < 4 {
        assert!(Instant::now() < deadline, "no answers in time");
        std::thread::sleep(Duration::from_millis(2));
    }
    // Dropping kills it, with no chance to put anything in order.
    drop(process);
    let answered = lines();
    assert!(!killed.path().join("results.json").exists(), "it was killed too late to prove anything");
    let error = refusal(&texts(&args(killed.path(), "8")), 1);
    assert!(error.contains("seed: 7 there, 8 now") && error.contains("--overwrite"), "{error}");
    let (code, _, stderr) = run(&texts(&args(killed.path(), "7")));
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("going on with"), "{answered} lines, {stderr}");
    let timeless = |folder: &Path| {
        let mut results = results(folder);
        for arm in results["arms"].as_array_mut().unwrap() {
            for task in arm["tasks"].as_array_mut().unwrap() {
                task["seconds"] = Value::Null;
                task["expert_bytes"] = Value::Null;
            }
        }
        [results["arms"].clone(), results["comparisons"].clone(), results["findings"].clone()]
    };
    assert_eq!(timeless(killed.path()), timeless(whole.path()));
}

#[test]
fn what_cannot_be_run_is_refused_with_what_helps() {
    let dir = tempfile::tempdir().unwrap();
    let out = ["--output", dir.path().to_str().unwrap(), "--offline"];
    let case = |args: &[&str], code: i32, texts: &[&str]| {
        let error = refusal(&[args, &out].concat(), code);
        texts.iter().for_each(|text| assert!(error.contains(text), "{args:?}: {text:?} is not in {error}"));
    };
    case(&[], 2, &["--tasks"]);
    case(&["--tasks", "mmul"], 1, &["`mmul`", "did you mean `mmlu`", "moe-eval list"]);
    case(&["--tasks", "perplexity"], 2, &["--text"]);
    case(&["--tasks", "perplexity", "--text", "nowhere.txt"], 1, &["nowhere.txt"]);
    case(&["--tasks", "mmlu", "--data-dir", "nowhere"], 1, &["--data-dir nowhere", "not a directory"]);
    case(&["--tasks", "mmlu", "--data-dir", "eval"], 1, &["mmlu/", "eval"]);
    // The samples have fewer rows than the published data.
    case(&["--tasks", "mmlu_astronomy", "--data-dir", "eval/samples"], 1, &["152", "--unverified"]);
    case(&["--tasks", "mmlu"], 1, &["--offline"]);
    case(&["--tasks", "gsm8k", "--data-dir", "eval/samples", "--unverified", "--shots", "99"], 1, &["--shots 99"]);
    case(&["--tasks", "snarks", "--data-dir", "eval/samples", "--unverified"], 1, &["1024", "--max-gen-tokens"]);
    let data = ["--tasks", "gsm8k", "--data-dir", "eval/samples", "--unverified"];
    let with = |more: &[&'static str]| [&data[..], more].concat();
    case(&with(&["--router", "dynk:2"]), 1, &["dynk:2"]);
    case(&with(&["--router", "nonsense:1"]), 1, &["no such router"]);
    case(&with(&["--limit", "0"]), 2, &["--limit", "at least 1"]);
    case(&with(&["--model", "nowhere/at-all"]), 1, &["nowhere/at-all"]);
    let url = ["--base-url", "http://127.0.0.1:9"];
    let model = ["--model", "models/stories"];
    case(&with(&[url, model].concat()), 1, &["http://127.0.0.1:9"]);
    case(&with(&url), 1, &["--model"]);
    case(&[&with(&url)[..], &["--compare-static"]].concat(), 1, &["--compare-static"]);
}

#[test]
fn the_list_has_every_task_and_the_help_every_router() {
    let (code, list, _) = run(&["list"]);
    assert_eq!(code, 0);
    for name in ["bbh", "mmlu", "gsm8k", "gsm8k_cot", "perplexity", "mmlu_stem", "anatomy", "word_sorting"] {
        assert!(list.contains(name), "{name} is not in\n{list}");
    }
    let (_, help, _) = run(&["--help"]);
    for router in moe_serve::moe::router::ROUTERS {
        assert!(help.contains(router.usage), "{}", router.name);
    }
}

#[test]
fn a_profile_adds_up_and_tells_parts_and_layers() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("profile.json");
    let args = ["--input-file", "eval/prompts.jsonl", "--batch-size", "4", "--max-tokens", "8", "--router", "topk:1"];
    let (code, stdout, stderr) =
        run(&[&["profile", "--offline", "--output", file.to_str().unwrap()][..], &args].concat());
    assert_eq!(code, 0, "{stderr}");
    for text in ["GFLOP", "+50.0 % saved", "attention", "lm_head", "layer", "(layer, expert) pairs"] {
        assert!(stdout.contains(text), "{text:?} is not in\n{stdout}");
    }
    let report: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let sum = |scope: &str| -> u64 {
        report["layers"].as_array().unwrap().iter().map(|l| l["expert_flops"][scope].as_u64().unwrap()).sum()
    };
    assert_eq!(
        (sum("ran"), sum("native")),
        (report["expert_flops"]["ran"].as_u64().unwrap(), report["expert_flops"]["native"].as_u64().unwrap())
    );
    let parts: f64 = report["parts"].as_array().unwrap().iter().map(|p| p["seconds"].as_f64().unwrap()).sum();
    assert!(parts > 0.0 && parts <= report["step_seconds"].as_f64().unwrap());
    let error = refusal(&["profile", "--input-file", "Cargo.toml"], 1);
    assert!(error.contains("Cargo.toml") && error.contains("line 1"), "{error}");
}
