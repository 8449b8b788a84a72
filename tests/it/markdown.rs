//! The commands of a Markdown file.

use crate::support::repo;
use moe_serve::moe::router::sweep;
use moe_serve::types::RouterSpec;
use std::process::Command;

/// A line after `$ ` in a console block, and the lines that follow it.
pub struct Shown {
    pub command: String,
    pub output: Vec<String>,
}

/// The commands of `file`, in order.
pub fn commands(file: &str) -> Vec<Shown> {
    let mut commands: Vec<Shown> = Vec::new();
    for block in blocks(file, "console") {
        for line in block.lines() {
            match (line.strip_prefix("$ "), commands.last_mut()) {
                (Some(command), _) => commands.push(Shown { command: command.into(), output: Vec::new() }),
                (None, Some(shown)) => shown.output.push(line.into()),
                (None, None) => panic!("{file}: output before a command: {line}"),
            }
        }
    }
    commands
}

/// The fenced blocks of `file` in `language`.
pub fn blocks(file: &str, language: &str) -> Vec<String> {
    let text = std::fs::read_to_string(repo(file)).unwrap();
    let fence = format!("```{language}\n");
    text.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_string()).collect()
}

/// The arguments that `command` gives to `binary`, by its name or through `cargo run`.
pub fn arguments(command: &str, binary: &str) -> Option<Vec<String>> {
    let cargo = match binary {
        "moe-serve" => "cargo run --release -- ".into(),
        _ => format!("cargo run --release --bin {binary} -- "),
    };
    let rest = [format!("{binary} "), cargo].iter().find_map(|prefix| command.strip_prefix(prefix.as_str()))?;
    Some(words(rest))
}

/// The arguments of every command of `file` that runs `binary`.
pub fn all_arguments(file: &str, binary: &str) -> Vec<Vec<String>> {
    commands(file).iter().filter_map(|shown| arguments(&shown.command, binary)).collect()
}

/// Words of a command line; quotes of either kind hold one together.
pub fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            Some(_) => word.get_or_insert_default().push(c),
            None if c == '\'' || c == '"' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            None => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// What `binary` prints for `args`.
pub fn help(binary: &str, args: &[&str]) -> String {
    String::from_utf8(Command::new(binary).args(args).output().unwrap().stdout).unwrap()
}

/// Checks flags against `help`, and routers against the grammar.
pub fn check(words: &[String], help: &str) {
    for flag in words.iter().filter(|w| w.starts_with("--")) {
        assert!(help.contains(&format!("{flag} ")) || help.contains(&format!("{flag}\n")), "{words:?}: {flag}");
    }
    for at in words.iter().enumerate().filter(|(_, w)| *w == "--router").map(|(at, _)| at) {
        let spec: RouterSpec = words[at + 1].parse().unwrap();
        assert!(sweep(&spec).is_ok(), "{spec}");
    }
}
