//! The report in Markdown (GitHub's), for a README or an issue.

use super::notes;
use super::tables::{self, Detail};
use super::view;
use crate::eval::results::Results;
use crate::plot::markdown::{console, prose, table as rows, text};

/// The whole report but its charts.
pub fn markdown(results: &Results) -> String {
    let mut out = format!("# moe-eval: {}\n\n{}\n", text(&results.model.name), console(&results.command));
    out += "| | |\n|---|---|\n";
    for (name, value) in notes::facts(results) {
        out += &format!("| {name} | {} |\n", text(&value));
    }
    if !results.findings.is_empty() {
        out += "\n## Findings\n\n";
        results.findings.iter().for_each(|finding| out += &format!("- {}\n", prose(finding)));
    }
    for task in view::tasks(results) {
        out +=
            &format!("\n## {} ({})\n\n{}", text(task.name), task.size(), rows(&tables::summary(&task, Detail::Full)));
        if !task.subtasks().is_empty() {
            let table = rows(&tables::subtasks(&task));
            out += &format!("\n<details><summary>Subtasks</summary>\n\n{table}\n</details>\n");
        }
    }
    if !results.comparisons.is_empty() {
        out += &format!("\n## Comparisons\n\n{}", rows(&tables::comparisons(results, Detail::Full, |_| true)));
    }
    if !results.data.is_empty() {
        out += &format!("\n## Data\n\n{}", rows(&tables::data(results)));
    }
    out += "\n<details><summary>How to read this</summary>\n\n";
    for (term, explanation) in notes::how_to_read(results) {
        out += &format!("- **{term}**: {}\n", prose(&explanation));
    }
    out + "\n</details>\n"
}
