//! moe-train as a person runs it, and the example beside it.

use crate::support::repo;
use std::path::Path;
use std::process::{Command, Output};

fn moe_train(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moe-train")).current_dir(repo("")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the tiny recipe for `steps` steps into `out`.
fn run(out: &Path, more: &[&str]) -> Output {
    let out = out.to_str().unwrap();
    let mut args =
        vec!["--recipe", "tests/train/tiny.toml", "--synthetic", "--steps", "6", "--out", out, "--device", "cpu"];
    args.extend(more);
    moe_train(&args)
}

#[test]
fn a_run_is_compared_and_asked_after_it_was_made() {
    let dir = tempfile::tempdir().unwrap();
    for (name, seed) in [("a", "1"), ("b", "2")] {
        let done = run(&dir.path().join(name), &["--seed", seed]);
        assert!(done.status.success(), "{}", text(&done.stderr));
        assert!(text(&done.stderr).contains("GENERATED"), "generated text is never taken silently");
        assert!(text(&done.stdout).contains("held-out"), "{}", text(&done.stdout));
    }
    let a = dir.path().join("a");
    for file in ["log.jsonl", "results.json", "report.html", "model/config.json", "model/tokenizer.json"] {
        assert!(a.join(file).is_file(), "{file}");
    }
    let table = dir.path().join("table.md");
    let done = moe_train(&["compare", dir.path().to_str().unwrap(), "--markdown", table.to_str().unwrap()]);
    assert!(done.status.success() && text(&done.stdout).matches("tiny").count() >= 2, "{}", text(&done.stdout));
    assert!(std::fs::read_to_string(table).unwrap().contains("| `tiny` |"));
    let model = a.join("model");
    let asked =
        ["sample", "--model", model.to_str().unwrap(), "--prompt", "The dog", "--tokens", "5", "--device", "cpu"];
    let done = moe_train(&asked);
    assert!(done.status.success() && text(&done.stdout).starts_with("The dog"), "{}", text(&done.stderr));
}

#[test]
fn what_cannot_be_run_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(dir.path(), &[]).status.success());
    for (args, wanted) in [
        (&["--recipe", "tests/train/none.toml"][..], &["none.toml", "No such file"][..]),
        (&["--recipe", "tests/train/tiny.toml", "--variant", "x"], &["no variant `x`", "it has mixtral"]),
        (&["--recipe", "models/dynk-gpt/recipe.toml"], &["training-monolingual", "One Billion Word"]),
        (&["--recipe", "models/dynk-gpt/recipe.toml", "--variant", "tau-9"], &["tau-9", "tau-0.5, tau-0.65"]),
        (&["compare", "tests/train"], &["no finished run"]),
        (&["sample", "--model", "models/stories", "--prompt", "a", "--router", "luck"], &["luck", "dynk"]),
    ] {
        let done = moe_train(args);
        let message = text(&done.stderr);
        assert!(!done.status.success(), "{args:?}");
        wanted.iter().for_each(|text| assert!(message.contains(text), "{args:?}: no {text:?} in {message}"));
    }
    let again = run(dir.path(), &[]);
    assert!(!again.status.success() && text(&again.stderr).contains("--resume"), "{}", text(&again.stderr));
    assert!(run(dir.path(), &["--overwrite"]).status.success());
}

#[test]
fn the_example_of_one_layer_learns() {
    // Cargo builds examples beside the tests.
    let binary = Path::new(env!("CARGO_BIN_EXE_moe-train")).with_file_name("examples").join("moe_layer");
    let done = Command::new(&binary)
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}; plain `cargo test` builds it", binary.display()));
    let out = text(&done.stdout);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let line = out.lines().rfind(|l| l.starts_with("step")).unwrap();
    let number = |after: &str| {
        let rest = line.split(after).nth(1).unwrap();
        rest.split([' ', ')']).next().unwrap().parse::<f64>().unwrap()
    };
    assert!(number("error ") < 0.7 * number("first "), "{out}");
    assert!(out.contains("dynk:0.9,mass=full") && out.contains("4.00 experts per token"), "{out}");
}
