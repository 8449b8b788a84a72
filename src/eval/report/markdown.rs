//! The report in Markdown (GitHub's), for a README or an issue.

use super::format::{self, one_line};
use super::notes;
use super::tables::{self, Cell, Detail, Kind, Table};
use super::view;
use crate::eval::results::Results;

/// The whole report but its charts.
pub fn markdown(results: &Results) -> String {
    let mut out = format!("# moe-eval: {}\n\n{}\n", text(&results.model.name), fenced(&results.command));
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

fn rows(table: &Table) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut out = line(table.columns.iter().map(|c| text(&c.title)).collect());
    out += &line(table.columns.iter().map(|c| if c.left { ":---" } else { "---:" }.into()).collect());
    for row in &table.rows {
        out += &line(row.iter().map(cell).collect());
    }
    out
}

fn cell(cell: &Cell) -> String {
    match cell.kind {
        Kind::Plain | Kind::Cost => text(&cell.text),
        Kind::Better | Kind::Worse => format!("**{}**", text(&cell.text)),
        Kind::Name if cell.text == format::MISSING => cell.text.clone(),
        Kind::Name => match cell.text.strip_prefix("└ ") {
            Some(rest) => format!("└ {}", text(rest)),
            None => code(&cell.text),
        },
    }
}

/// A code span, with a fence longer than any run of backticks within.
fn code(text: &str) -> String {
    let fence = "`".repeat(longest_run(text) + 1);
    let space = if text.starts_with('`') || text.ends_with('`') || text.is_empty() { " " } else { "" };
    format!("{fence}{space}{}{space}{fence}", one_line(text).replace('|', "\\|"))
}

fn fenced(text: &str) -> String {
    let fence = "`".repeat(longest_run(text).max(2) + 1);
    format!("{fence}console\n$ {}\n{fence}\n", one_line(text))
}

fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

/// Text that means only itself. Brackets alone are no link.
fn text(text: &str) -> String {
    let mut out = String::new();
    for c in one_line(text).chars() {
        let link = c == '(' && out.ends_with(']');
        if link || matches!(c, '\\' | '`' | '*' | '_' | '<' | '>' | '|' | '#' | '~' | '&' | '$') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A sentence, in which `code` stays code; no HTML.
fn prose(text: &str) -> String {
    let parts = format::code_spans(text);
    parts.into_iter().map(|(is_code, part)| if is_code { code(part) } else { self::text(part) }).collect()
}
