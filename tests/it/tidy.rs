//! The rules of the layout, as tests: arrows between modules, tables that are complete, files of a readable length.

use crate::support::repo;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Modules and what they may import; everyone may import `types`.
const ARROWS: &[(&str, &[&str])] = &[
    ("types", &[]),
    ("wire", &[]),
    ("sched", &[]),
    // The routing that grouped experts compute by is moe's: a value, the one arrow back.
    ("ops", &["moe"]),
    ("moe", &["ops"]),
    ("model", &["moe", "ops"]),
    ("engine", &["model", "moe", "ops", "sched"]),
    ("chat", &[]),
    ("telemetry", &[]),
    ("plot", &[]),
    ("eval", &["engine", "model", "moe", "ops", "plot"]),
    ("calibrate", &["engine", "eval", "model", "moe", "ops"]),
    ("bench", &["engine", "model", "moe", "ops", "plot"]),
    ("train", &["moe", "ops", "plot"]),
    ("http", &["chat", "engine", "telemetry", "wire"]),
];

/// Lines a file may have.
const LINES_MAX: usize = 600;
/// Longer files, and why.
const LONGER: &[(&str, &str)] = &[];

fn walk(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, out);
        } else {
            out.push(path);
        }
    }
}

/// Files of this repository under `dirs` with one of the extensions, with their text.
fn sources(dirs: &[&str], extensions: &[&str]) -> Vec<(String, String)> {
    let mut paths = Vec::new();
    dirs.iter().filter(|d| repo(d).is_dir()).for_each(|d| walk(&repo(d), &mut paths));
    paths.sort();
    let wanted = |p: &&PathBuf| p.extension().is_some_and(|e| extensions.iter().any(|x| e == *x));
    let name = |p: &PathBuf| p.strip_prefix(repo("")).unwrap().to_string_lossy().into_owned();
    paths.iter().filter(wanted).map(|p| (name(p), std::fs::read_to_string(p).unwrap())).collect()
}

/// Code without comments: what it says is prose.
fn code(text: &str) -> String {
    text.lines().map(|l| l.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Names after every `crate::` in a module's code, also of `crate::{a, b}`.
fn imports(text: &str) -> BTreeSet<String> {
    let code = code(text);
    let ident = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = BTreeSet::new();
    for after in code.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            None => names.insert(ident(after)),
            Some(list) => panic!(
                "write one `use crate::…` per module, so that arrows can be seen: {{{}",
                &list[..40.min(list.len())]
            ),
        };
    }
    names
}

#[test]
fn modules_import_only_along_the_arrows() {
    let modules: BTreeSet<&str> = ARROWS.iter().map(|(m, _)| *m).collect();
    for (module, allowed) in ARROWS {
        for (file, text) in sources(&[&format!("src/{module}")], &["rs"]) {
            for import in imports(&text).iter().filter(|i| modules.contains(i.as_str())) {
                let fine = import == module || import == "types" || allowed.contains(&import.as_str());
                assert!(fine, "{file} imports {import}; {module} may import types and {allowed:?}");
            }
        }
    }
    let listed: BTreeSet<String> = std::fs::read_dir(repo("src"))
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|n| n != "lib.rs" && n != "bin")
        .collect();
    assert_eq!(listed, modules.iter().map(|m| m.to_string()).collect(), "src/ and the list of arrows differ");
}

#[test]
fn ops_takes_nothing_of_moe_but_the_routing() {
    for (file, text) in sources(&["src/ops"], &["rs"]) {
        for line in code(&text).lines().filter(|l| l.contains("crate::moe")) {
            let names = line.rsplit("moe::").next().unwrap_or_default();
            let names = names.trim_matches(|c: char| "{};".contains(c) || c.is_whitespace());
            assert!(names.split(", ").all(|n| n.starts_with("Routing")), "{file}: {line}");
        }
    }
    for (file, text) in sources(&["src/http"], &["rs"]) {
        for line in code(&text).lines().filter(|l| l.contains("crate::engine")) {
            assert!(line.contains("engine::api"), "{file}: http sees the engine through its api alone: {line}");
        }
    }
}

#[test]
fn cuda_is_chosen_behind_the_seam_alone() {
    for (file, text) in sources(&["src", "benches"], &["rs"]) {
        let chosen = code(&text).contains("feature = \"cuda\"");
        let allowed = file.starts_with("src/ops/");
        assert!(!chosen || allowed, "{file} looks at the feature `cuda`");
    }
}

#[test]
fn pure_modules_know_neither_candle_nor_tokio() {
    for (dir, foreign) in [
        ("src/types", &["candle", "tokio", "axum"][..]),
        ("src/sched", &["candle", "tokio", "axum"]),
        ("src/wire", &["candle", "tokio", "axum"]),
        ("src/http", &["candle"]),
    ] {
        for (file, text) in sources(&[dir], &["rs"]) {
            for name in foreign {
                assert!(!code(&text).contains(name), "{file} knows {name}");
            }
        }
    }
}

/// Stems of the files of `dir` that are lines of a table, and the table's own names.
fn table(dir: &str, table: &str, constant: &str, marker: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut files = BTreeSet::new();
    let mut named = BTreeSet::new();
    for (file, text) in sources(&[dir], &["rs"]) {
        let stem = Path::new(&file).file_stem().unwrap().to_string_lossy().into_owned();
        if text.contains(marker) {
            files.insert(stem);
        }
        if let Some(after) = text.split(table).nth(1) {
            let list = after.split(';').next().unwrap_or_default();
            named.extend(list.match_indices(constant).map(|(at, _)| {
                let before = &list[..at];
                before.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_string()
            }));
        }
    }
    (files, named)
}

#[test]
fn every_router_and_family_file_stands_in_its_table() {
    let (files, named) = table("src/moe/router", "static ROUTERS:", "::ENTRY", "const ENTRY: RouterEntry");
    assert_eq!(files, named);
    assert_eq!(named.len(), moe_serve::moe::router::ROUTERS.len());
    let (files, named) = table("src/model", "static FAMILIES:", "::FAMILY", "const FAMILY: Family");
    assert_eq!(files, named);
    assert_eq!(named.len(), moe_serve::model::FAMILIES.len());
}

#[test]
fn the_readme_lists_every_router_with_its_formula() {
    let readme = std::fs::read_to_string(repo("README.md")).unwrap();
    for router in moe_serve::moe::router::ROUTERS {
        let row = readme.lines().find(|l| l.starts_with(&format!("| `{}", router.name)));
        let row = row.unwrap_or_else(|| panic!("README.md has no row for the router {}", router.name));
        assert!(row.contains(router.formula), "README.md's row of {} lacks `{}`", router.name, router.formula);
    }
    for family in moe_serve::model::FAMILIES {
        assert!(readme.contains(&format!("`{}`", family.model_type)), "README.md does not name {}", family.model_type);
    }
}

#[test]
fn the_readme_lists_every_estimator_with_its_formula() {
    let readme = std::fs::read_to_string(repo("README.md")).unwrap().replace("\\|", "|");
    for estimator in moe_serve::moe::router::ESTIMATORS {
        let row = readme.lines().find(|l| l.starts_with(&format!("| `{}`", estimator.usage)));
        let row = row.unwrap_or_else(|| panic!("README.md has no row for the estimator {}", estimator.usage));
        assert!(
            row.contains(estimator.formula),
            "README.md's row of {} lacks `{}`",
            estimator.usage,
            estimator.formula
        );
    }
}

#[test]
fn files_are_short_enough_to_read() {
    for (file, text) in sources(&["src", "tests", "benches", "examples", "build.rs"], &["rs", "cu", "py"]) {
        let lines = text.lines().count();
        let reason = LONGER.iter().find(|(name, _)| *name == file);
        assert!(lines <= LINES_MAX || reason.is_some(), "{file} has {lines} lines; {LINES_MAX} is the limit");
        assert!(lines > LINES_MAX || reason.is_none(), "{file} is short enough now: take it off the list");
    }
}

#[test]
fn nothing_is_left_undone_or_machine_bound() {
    let mut files = sources(
        &["src", "tests", "benches", "examples", "docs", "models", "eval", ".ci"],
        &["rs", "cu", "py", "md", "toml"],
    );
    for name in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "Cargo.toml", ".ci/run"] {
        files.push((name.into(), std::fs::read_to_string(repo(name)).unwrap()));
    }
    // Spelled apart, so that this file does not find itself.
    let banned = [
        "TO".to_string() + "DO",
        "FIX".to_string() + "ME",
        "todo".to_string() + "!(",
        "unimplemented".to_string() + "!(",
        "/wo".to_string() + "rk/",
    ];
    for (file, text) in files {
        for word in &banned {
            assert!(!text.contains(word.as_str()), "{file} holds {word}");
        }
    }
}
