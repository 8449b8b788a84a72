//! The tutorials, followed: every command that needs nothing but the source is run, in order, and prints what is shown.

use crate::binary::Process;
use crate::markdown::{Shown, arguments, blocks, check, commands, help, words};
use crate::support::{client, repo};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const FOLDER: &str = "docs/tutorials";

/// The binaries that tutorials run, and where they are.
fn binaries() -> [(&'static str, &'static str); 3] {
    [
        ("moe-serve", env!("CARGO_BIN_EXE_moe-serve")),
        ("moe-eval", env!("CARGO_BIN_EXE_moe-eval")),
        ("moe-calibrate", env!("CARGO_BIN_EXE_moe-calibrate")),
    ]
}

/// Cargo builds examples beside the tests.
fn example(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_moe-serve")).with_file_name("examples").join(name);
    assert!(path.is_file(), "{} is not built; plain `cargo test` builds it", path.display());
    path
}

/// Every Markdown file of the folder.
fn files() -> Vec<String> {
    let entries = std::fs::read_dir(repo(FOLDER)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<String> = names.map(|name| format!("{FOLDER}/{name}")).collect();
    files.sort();
    assert!(files.len() >= 5 && files.iter().all(|file| file.ends_with(".md")), "{files:?}");
    files
}

/// A line with every number as `#` and every run of spaces as one: what does not depend on the machine.
fn shape(line: &str) -> String {
    let mut shape = String::new();
    let mut number = false;
    for c in line.trim_end().chars() {
        let digit = c.is_ascii_digit() || (number && matches!(c, '.' | ','));
        match c {
            _ if digit && !number => {
                // A sign belongs to its number.
                let unsigned = shape.trim_end_matches(['+', '-', '−']).len();
                shape.truncate(unsigned);
                shape.push('#');
            }
            _ if digit => {}
            ' ' if shape.ends_with(' ') => {}
            _ => shape.push(c),
        }
        number = digit;
    }
    shape
}

/// Whether `line` is what is `shown`, in which … stands for anything.
fn fits(shown: &str, line: &str) -> bool {
    let (shown, line) = (shape(shown), shape(line));
    let mut rest = line.as_str();
    let parts: Vec<&str> = shown.split('…').collect();
    for (i, part) in parts.iter().enumerate() {
        let found = match i {
            0 => rest.starts_with(part).then_some(0),
            _ if i + 1 == parts.len() => rest.ends_with(part).then(|| rest.len() - part.len()),
            _ => rest.find(part),
        };
        let Some(at) = found else { return false };
        rest = &rest[at + part.len()..];
    }
    parts.len() > 1 || rest.is_empty()
}

/// Checks that the lines that are `shown` are printed, in this order; ⋮ stands for lines that are not shown.
fn assert_printed(shown: &Shown, printed: &str) {
    let mut lines = printed.lines();
    for wanted in shown.output.iter().filter(|line| !line.trim().is_empty() && line.trim() != "⋮") {
        let found = lines.any(|line| fits(wanted, line));
        assert!(found, "`{}` does not print, or not in this order:\n{wanted}\nbut\n{printed}", shown.command);
    }
}

/// A folder where the commands of a tutorial run, and the server that the last of them started.
struct Reader {
    folder: tempfile::TempDir,
    server: Option<(Process, String)>,
    ran: usize,
}

impl Reader {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["eval", "models"] {
            std::os::unix::fs::symlink(repo(name), folder.path().join(name)).unwrap();
        }
        Self { folder, server: None, ran: 0 }
    }

    fn run(&mut self, shown: &Shown, binary: &Path, words: &[String]) {
        let done = Command::new(binary).current_dir(self.folder.path()).args(words).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{}: {err}", shown.command);
        assert_printed(shown, &out);
        self.ran += 1;
    }

    /// Starts the server on a free port, with the files that earlier commands have made.
    fn serve(&mut self, shown: &Shown, words: &[String]) {
        let here =
            |word: &String| word.replace("policy.json", self.folder.path().join("policy.json").to_str().unwrap());
        let mut args: Vec<String> = words.iter().map(here).collect();
        args.extend(["--port".into(), "0".into(), "--kv-cache-gb".into(), "0.05".into()]);
        let process = Process::start(&args.iter().map(String::as_str).collect::<Vec<_>>());
        let mut printed = String::new();
        let url = loop {
            let line = process.stdout.recv_timeout(Duration::from_secs(60)).unwrap();
            printed.push_str(&format!("{line}\n"));
            if let Some(rest) = line.strip_prefix("address    ") {
                break rest.split_whitespace().next().unwrap().to_string();
            }
        };
        self.assert_said(shown, &printed);
        self.server = Some((process, url));
        self.ran += 1;
    }

    /// Sends to the server what `curl` would.
    async fn ask(&mut self, shown: &Shown) {
        let (_, url) = self.server.as_ref().unwrap_or_else(|| panic!("no server for {}", shown.command));
        let path = shown.command.split("localhost:8000").nth(1).unwrap().split(' ').next().unwrap();
        let request = match shown.command.split(" -d '").nth(1) {
            Some(body) => client().post(format!("{url}{path}")).body(body.split('\'').next().unwrap().to_string()),
            None => client().get(format!("{url}{path}")),
        };
        let answer = request.send().await.unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "{}: {text}", shown.command);
        self.assert_said(shown, &text);
        self.ran += 1;
    }

    /// As [`assert_printed`], with the names of files as the reader gave them.
    fn assert_said(&self, shown: &Shown, text: &str) {
        assert_printed(shown, &text.replace(&format!("{}/", self.folder.path().display()), ""));
    }

    async fn follow(&mut self, shown: &Shown) {
        let command = &shown.command;
        if command.starts_with("curl ") {
            return self.ask(shown).await;
        }
        if let Some(rest) = command.strip_prefix("cargo run --release --example ") {
            let mut words = words(rest).into_iter();
            let binary = example(&words.next().unwrap());
            let args: Vec<String> = words.skip_while(|word| word == "--").collect();
            // A third argument is a checkpoint of the hub.
            if args.len() < 3 {
                self.run(shown, &binary, &args);
            }
            return;
        }
        let found = binaries().into_iter().find_map(|(name, path)| Some((name, path, arguments(command, name)?)));
        let (name, binary, words) = found.unwrap_or_else(|| panic!("the tests know nothing of `{command}`"));
        let subcommand: &[&str] = if words.first().is_some_and(|word| word == "profile") { &["profile"] } else { &[] };
        check(&words, &help(binary, &[subcommand, &["--help"]].concat()));
        // Checkpoints and texts that do not come with the source.
        let foreign = |pair: &[String]| {
            ["--model", "--text", "--data", "--data-dir"].contains(&pair[0].as_str()) && !repo(&pair[1]).exists()
        };
        match words.windows(2).any(foreign) {
            true => {}
            false if name == "moe-serve" => self.serve(shown, &words),
            false => self.run(shown, Path::new(binary), &words),
        }
    }
}

/// Does what a tutorial says, from its first command to its last; says how many were run.
async fn follow(name: &str) -> usize {
    let mut reader = Reader::new();
    for shown in commands(&format!("{FOLDER}/{name}")) {
        reader.follow(&shown).await;
    }
    reader.ran
}

#[tokio::test]
async fn understanding_dynamic_routing_runs_as_it_is_written() {
    assert!(follow("1-understanding-dynamic-routing.md").await >= 6);
}

#[tokio::test]
async fn retrofitting_a_checkpoint_runs_as_it_is_written() {
    assert!(follow("2-retrofitting-a-checkpoint.md").await >= 4);
}

#[tokio::test]
async fn your_own_estimator_and_router_runs_as_it_is_written() {
    assert!(follow("3-your-own-estimator-and-router.md").await >= 1);
}

#[tokio::test]
async fn calibrating_to_a_budget_runs_as_it_is_written() {
    assert!(follow("4-calibrating-to-a-budget.md").await >= 5);
}

#[test]
fn the_code_of_the_tutorials_is_that_of_the_source() {
    let mut sources = Vec::new();
    for folder in ["examples", "src/moe/router", "src/moe/router/estimator"] {
        for entry in std::fs::read_dir(repo(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "rs") {
                sources.push(trimmed(&std::fs::read_to_string(path).unwrap()));
            }
        }
    }
    let mut seen = 0;
    for file in files() {
        for block in blocks(&file, "rust") {
            let wanted = trimmed(&block);
            assert!(sources.iter().any(|source| source.contains(&wanted)), "{file}: no source has the lines\n{block}");
            seen += 1;
        }
    }
    assert!(seen >= 4);
}

/// Lines without what indents them.
fn trimmed(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", line.trim())).collect()
}

#[test]
fn every_link_of_the_tutorials_leads_somewhere() {
    for file in files() {
        let text = std::fs::read_to_string(repo(&file)).unwrap();
        for target in text.split("](").skip(1).map(|rest| rest.split([')', '#']).next().unwrap()) {
            let known = target.is_empty() || target.starts_with("http") || repo(FOLDER).join(target).exists();
            assert!(known, "{file} links to {target}");
        }
    }
    let index = std::fs::read_to_string(repo(FOLDER).join("README.md")).unwrap();
    for file in files().iter().filter(|file| !file.ends_with("README.md")) {
        assert!(index.contains(&file[FOLDER.len() + 1..]), "the index does not name {file}");
    }
}

#[test]
fn an_example_retrofits_a_checkpoint() {
    let done = Command::new(example("retrofit")).args(["topk:1"]).output().unwrap();
    let out = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    for line in [
        "native: Once upon a time",
        "  2.000 experts per token; FLOPs saved: +0.0 % of the experts', +0.0 % of the whole",
        "topk:1: Once upon a time",
        "  1.000 experts per token; FLOPs saved: +50.0 % of the experts', +",
    ] {
        assert!(out.lines().any(|printed| printed.starts_with(line)), "{line:?} is not in\n{out}");
    }
}

#[test]
fn an_example_has_an_estimator_and_a_router_of_its_own() {
    let done = Command::new(example("own_router")).output().unwrap();
    let out = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let k: Vec<f64> =
        out.lines().filter_map(|line| line.trim().split_once(" experts per token")?.0.parse().ok()).collect();
    assert_eq!(k.len(), 5, "{out}");
    // Native, then each rule and static routing at its mean k.
    assert_eq!(k[0], 2.0);
    for pair in [&k[1..3], &k[3..5]] {
        assert!(pair[0] > 1.0 && pair[0] < 2.0 && (pair[0] - pair[1]).abs() <= 0.5 / 6.0 + 1e-3, "{out}");
    }
    for name in ["early-or-unsure: k in 1..=2, by early-or-unsure", "tapered: k in 1..=2, share 0.9 falling to 0.6"] {
        assert!(out.contains(name), "{name:?} is not in\n{out}");
    }
}

#[test]
fn shown_lines_fit_what_differs_in_numbers_alone() {
    assert!(fits("  1.408  experts, -3.1 %", "  11.5 experts, +0.25 %"));
    assert!(fits("{\"id\":\"…\",\"k\":[1,2]…}", "{\"id\":\"cmpl-66f-0\",\"k\":[1,2],\"n\":3}"));
    assert!(!fits("mean k 1.4", "mean l 1.4") && !fits("mean k 1.4", "mean k 1.4 of 2") && !fits("a … b", "a c"));
}
