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
use view::TaskView;

/// Charts as files of their own, by name: of every task, quality against the experts' FLOPs that ran.
pub fn figures(results: &Results) -> Vec<(String, String)> {
    let chart = |task: &TaskView<'_>| Some((task.name.to_string(), charts::pareto(task, charts::Scope::Experts)?));
    let named = view::tasks(results).iter().filter_map(chart).collect::<Vec<_>>();
    let safe = |c: char| if c.is_ascii_alphanumeric() || "@-_".contains(c) { c } else { '-' };
    let file = |(name, svg): (String, String)| {
        (format!("{}-experts.svg", name.chars().map(safe).collect::<String>()), standalone(&svg))
    };
    named.into_iter().map(file).collect()
}

#[cfg(test)]
mod tests;
