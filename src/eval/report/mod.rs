//! Reports of [`Results`](super::results::Results): a table for the terminal, Markdown for a README or an issue, and
//! one self-contained HTML page with charts.
//!
//! ```text
//! results ─► view (arms by task, how each is drawn) ─► tables ─► terminal, markdown, html
//!                                                └───► charts ───► html
//! ```
//! What tables, charts and pages look like is `plot`'s, which knows nothing of results.

mod charts;
mod format;
mod html;
mod markdown;
mod notes;
mod tables;
mod terminal;
mod view;

pub use html::html;
pub use markdown::markdown;
pub use terminal::terminal;

use super::results::Results;
use crate::plot::standalone;
/// Charts as files of their own, by name: of every task, quality against the experts' FLOPs that ran, and dynamic rules
/// beside static routing.
pub fn figures(results: &Results) -> Vec<(String, String)> {
    let safe = |c: char| if c.is_ascii_alphanumeric() || "@-_".contains(c) { c } else { '-' };
    let mut files = Vec::new();
    for task in view::tasks(results) {
        let name: String = task.name.chars().map(safe).collect();
        let charts = [
            ("experts", charts::pareto(&task, charts::Scope::Experts)),
            ("static", charts::against_static(&task, &results.comparisons)),
        ];
        let drawn = charts.into_iter().filter_map(|(what, chart)| Some((what, chart?)));
        files.extend(drawn.map(|(what, chart)| (format!("{name}-{what}.svg"), standalone(&chart))));
    }
    files
}

#[cfg(test)]
mod tests;
