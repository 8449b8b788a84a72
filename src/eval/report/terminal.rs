//! The report in a terminal: plain text, aligned.

use super::format::one_line;
use super::tables::{self, Detail};
use super::view;
use crate::eval::results::Results;

/// Tables of all tasks, the comparisons that matter, and the findings. At most 110 columns wide as long as names are
/// short and a task has at most two metrics.
pub fn terminal(results: &Results) -> String {
    let mut out = String::new();
    for task in view::tasks(results) {
        let title = format!("{} · {} · {}", task.name, results.model.name, task.size());
        out += &format!("{}\n{}\n", one_line(&title), tables::summary(&task, Detail::Short).aligned());
    }
    let comparisons = tables::comparisons(results, Detail::Short, |c| view::matters(results, c));
    if !comparisons.rows.is_empty() {
        out += &format!("comparisons on the same samples\n{}\n", comparisons.aligned());
    }
    for finding in &results.findings {
        out += &format!("- {}\n", one_line(finding));
    }
    out
}
