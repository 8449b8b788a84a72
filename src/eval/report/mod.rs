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

#[cfg(test)]
mod tests;
