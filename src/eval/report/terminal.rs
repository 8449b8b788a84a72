//! The report in a terminal: plain text, aligned.

use super::format::{clip, one_line};
use super::tables::{self, Detail, Table};
use super::view;
use crate::eval::results::Results;

/// Longest name in a table, in characters.
const NAME_MAX: usize = 34;

/// Tables of all tasks, the comparisons that matter, and the findings. At most 110 columns wide as long as names are
/// short and a task has at most two metrics.
pub fn terminal(results: &Results) -> String {
    let mut out = String::new();
    for task in view::tasks(results) {
        let title = format!("{} · {} · {}", task.name, results.model.name, task.size());
        out += &format!("{}\n{}\n", one_line(&title), aligned(&tables::summary(&task, Detail::Short)));
    }
    let comparisons = tables::comparisons(results, Detail::Short, |c| view::matters(results, c));
    if !comparisons.rows.is_empty() {
        out += &format!("comparisons on the same samples\n{}\n", aligned(&comparisons));
    }
    for finding in &results.findings {
        out += &format!("- {}\n", one_line(finding));
    }
    out
}

/// Columns of equal width, two spaces apart; a rule under the titles.
fn aligned(table: &Table) -> String {
    let head: Vec<Vec<&str>> = table.columns.iter().map(|c| c.title.split('\n').collect()).collect();
    let height = head.iter().map(Vec::len).max().unwrap_or(0);
    let rows: Vec<Vec<String>> =
        table.rows.iter().map(|row| row.iter().map(|c| clip(&one_line(&c.text), NAME_MAX)).collect()).collect();
    let titles = (0..height).map(|line| {
        let of = |lines: &Vec<&str>| (line + lines.len()).checked_sub(height).map_or("", |at| lines[at]).to_string();
        head.iter().map(|lines| clip(&one_line(&of(lines)), NAME_MAX)).collect()
    });
    let lines: Vec<Vec<String>> = titles.chain(rows).collect();
    let widths: Vec<usize> =
        (0..table.columns.len()).map(|i| lines.iter().map(|line| line[i].chars().count()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for (at, line) in lines.iter().enumerate() {
        if at == height {
            out += &format!("{}\n", "─".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1)));
        }
        let cells = line.iter().zip(&widths).zip(&table.columns).map(|((text, width), column)| {
            if column.left { format!("{text:<width$}") } else { format!("{text:>width$}") }
        });
        out += cells.collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
    }
    out
}
