//! The documents of a run, written into its folder.

use super::compare::{Plan, comparisons};
use super::findings::findings;
use super::log::Log;
use super::report::{figures, html, markdown};
use super::results::{Arm, DataFacts, ModelFacts, Results, SCHEMA, Settings};
use super::suite::Task;
use std::io;
use std::path::{Path, PathBuf};

/// What is known of a run beside its answers.
#[derive(Clone, Debug)]
pub struct RunFacts {
    /// The command line, as it was typed.
    pub command: String,
    /// RFC 3339.
    pub finished: String,
    pub model: ModelFacts,
    pub settings: Settings,
}

/// Everything that a run found.
pub fn results(facts: RunFacts, log: &Log, tasks: &[Task], arms: Vec<Arm>, plan: &Plan) -> Results {
    let comparisons = comparisons(log, tasks, &arms, plan.bootstrap);
    let mut data: Vec<DataFacts> = Vec::new();
    for facts in tasks.iter().flat_map(|task| &task.data) {
        if !data.contains(facts) {
            data.push(facts.clone());
        }
    }
    Results {
        schema: SCHEMA,
        program: format!("moe-eval {}", env!("CARGO_PKG_VERSION")),
        command: facts.command,
        finished: facts.finished,
        model: facts.model,
        settings: facts.settings,
        findings: findings(&data, &arms, &comparisons),
        data,
        arms,
        comparisons,
    }
}

/// Writes `results.json`, `report.md`, `report.html` and a figure of every task that has one into `dir`, and gives their
/// paths.
///
/// # Errors
/// A folder that cannot be written to.
pub fn write(dir: &Path, results: &Results) -> io::Result<Vec<PathBuf>> {
    let json = serde_json::to_string_pretty(results).map_err(io::Error::from)?;
    let texts = [("results.json", json + "\n"), ("report.md", markdown(results)), ("report.html", html(results))];
    let mut texts: Vec<(String, String)> = texts.map(|(name, text)| (name.to_string(), text)).into();
    texts.extend(figures(results));
    let paths: Vec<PathBuf> = texts.iter().map(|(name, _)| dir.join(name)).collect();
    for (path, (_, text)) in paths.iter().zip(&texts) {
        // Whole or not at all: a reader never finds half a document.
        let part = path.with_extension("part");
        std::fs::write(&part, text)?;
        std::fs::rename(&part, path)?;
    }
    Ok(paths)
}
