//! The README's commands, tried.

use crate::markdown::{Shown, all_arguments, check, commands, help};
use crate::support::{Server, ServerOptions, repo};
use moe_serve::types::DtypeChoice;
use std::process::Command;

const README: &str = "README.md";

#[test]
fn every_server_command_has_known_flags_and_a_router_that_parses() {
    let help = help(env!("CARGO_BIN_EXE_moe-serve"), &["--help"]);
    let found = all_arguments(README, "moe-serve");
    found.iter().for_each(|words| check(words, &help));
    assert!(found.len() >= 4);
    let cargo = std::fs::read_to_string(repo("Cargo.toml")).unwrap();
    assert!(cargo.contains("default-run = \"moe-serve\""), "`cargo run` must run the server");
    let ci = std::fs::read_to_string(repo(".ci/run")).unwrap();
    assert!(ci.contains("cargo test"), "CI must run the README's test command");
}

#[test]
fn every_evaluation_command_has_known_flags_and_those_without_downloads_run() {
    let binary = env!("CARGO_BIN_EXE_moe-eval");
    let (eval, profile) = (help(binary, &["--help"]), help(binary, &["profile", "--help"]));
    let found = all_arguments(README, "moe-eval");
    let mut ran = 0;
    for words in &found {
        check(words, if words[0] == "profile" { &profile } else { &eval });
        let own = |pair: &[String]| {
            ["--data-dir", "--input-file"].contains(&pair[0].as_str()) && pair[1].starts_with("eval/")
        };
        if words.windows(2).any(own) {
            let folder = tempfile::tempdir().unwrap();
            let mut command = Command::new(binary);
            command.current_dir(repo("")).args(words);
            if words[0] != "profile" {
                command.args(["--output", folder.path().to_str().unwrap()]);
            }
            let done = command.output().unwrap();
            assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
            ran += 1;
        }
    }
    assert!(found.len() >= 5 && ran >= 2, "{found:?}");
}

#[test]
fn every_calibration_command_has_known_flags_and_the_one_on_the_bundled_text_runs() {
    let binary = env!("CARGO_BIN_EXE_moe-calibrate");
    let found = all_arguments(README, "moe-calibrate");
    let help = help(binary, &["--help"]);
    let mut ran = 0;
    for words in &found {
        check(words, &help);
        // Without text of its own it needs no file but the checkpoint that comes with the source.
        if !words.iter().any(|word| word == "--data" || word == "--model") {
            let folder = tempfile::tempdir().unwrap();
            let model = repo("models/stories").display().to_string();
            let mut command = Command::new(binary);
            command.current_dir(folder.path()).args(words).args(["--model", &model, "--offline"]);
            let done = command.output().unwrap();
            assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
            assert!(folder.path().join("policy.json").is_file());
            ran += 1;
        }
    }
    assert!(found.len() >= 3 && ran == 1, "{found:?}");
}

#[test]
fn every_speed_command_has_known_flags_and_the_one_on_the_bundled_checkpoint_runs() {
    let binary = env!("CARGO_BIN_EXE_moe-bench");
    let found = all_arguments(README, "moe-bench");
    let help = help(binary, &["--help"]);
    let mut ran = 0;
    for words in &found {
        check(words, &help);
        if words.contains(&"models/stories".to_string()) {
            let mut command = Command::new(binary);
            command.current_dir(repo("")).args(words).args(["--repeat", "1", "--no-roofline"]);
            let done = command.output().unwrap();
            assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
            ran += 1;
        }
    }
    assert!(found.len() >= 3 && ran == 1, "{found:?}");
}

#[test]
fn every_training_command_has_known_flags_and_the_one_on_generated_text_runs() {
    let binary = env!("CARGO_BIN_EXE_moe-train");
    let found = all_arguments(README, "moe-train");
    let mut ran = 0;
    for words in &found {
        let known = match words[0].as_str() {
            "compare" | "sample" => help(binary, &[&words[0], "--help"]),
            _ => help(binary, &["--help"]),
        };
        check(words, &known);
        for recipe in words.windows(2).filter(|pair| pair[0] == "--recipe").map(|pair| &pair[1]) {
            assert!(repo(recipe).is_file(), "{recipe}");
        }
        if words.contains(&"--synthetic".to_string()) {
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().join("run");
            let mut command = Command::new(binary);
            command.current_dir(repo("")).args(words).args(["--out", out.to_str().unwrap()]);
            let done = command.output().unwrap();
            assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
            assert!(out.join("model/model.safetensors").is_file() && out.join("report.html").is_file());
            ran += 1;
        }
        if words[0] == "compare" && words[1].starts_with("models/") {
            let done = Command::new(binary).current_dir(repo("")).args(words).output().unwrap();
            let said = String::from_utf8_lossy(&done.stdout).into_owned();
            assert!(done.status.success() && said.contains("perplexity"), "{words:?}: {said}");
            ran += 1;
        }
    }
    assert!(found.len() >= 5 && ran >= 2, "{found:?}");
}

#[test]
fn every_file_of_the_file_map_exists() {
    let readme = std::fs::read_to_string(repo(README)).unwrap();
    let table = readme.split("## Files").nth(1).unwrap().split("## ").next().unwrap();
    let mut seen = 0;
    for row in table.lines().filter(|l| l.starts_with("| `")) {
        for path in row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2) {
            assert!(repo(path).exists(), "README.md names {path}");
            seen += 1;
        }
    }
    assert!(seen >= 12);
}

#[tokio::test]
async fn every_request_gets_the_kind_of_answer_that_is_shown() {
    let server = Server::start(ServerOptions { router: "dynk:0.8", dtype: DtypeChoice::Auto, ..Default::default() });
    let mut seen = 0;
    for Shown { command, output } in commands(README).into_iter().filter(|shown| shown.command.starts_with("curl")) {
        seen += 1;
        let path = command.split("localhost:8000").nth(1).unwrap().split(' ').next().unwrap();
        let answer = match command.split("-d '").nth(1) {
            Some(body) => server.post(&serde_json::from_str(body.split('\'').next().unwrap()).unwrap()).await,
            None => server.get(path).await,
        };
        let answer = answer.text().await.unwrap();
        if path == "/metrics" {
            // Values vary, names do not.
            let name = |line: &str| line.split(['{', ' ']).next().unwrap_or_default().to_string();
            output.iter().for_each(|l| assert!(answer.contains(&name(l)), "{l}"));
        } else if output[0].starts_with("data: ") {
            let last = answer.trim_end().lines().last().unwrap();
            assert_eq!(output.iter().rfind(|l| !l.is_empty()).unwrap(), last);
            assert_eq!(answer.matches("data: ").count(), 8, "five tokens, an end, the usage, [DONE]");
            assert!(answer.contains("\"moe\":{\"router\":\"dynk:0.8\",\"experts_per_token\":1."));
        } else {
            assert_eq!(answer, output[0]);
        }
    }
    assert!(seen >= 3);
}
