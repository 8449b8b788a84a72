//! Reports of [`Results`](super::results::Results): a table for the terminal, Markdown for a README or an issue, and
//! one self-contained HTML page with charts.
//!
//! ```text
//! results ─► view (arms by task, how each is drawn) ─► tables ─► terminal, markdown, html
//!                                                └───► charts ─► svg ─► html
//! ```
//! `svg` knows nothing of results: any report may draw with it.

mod charts;
mod format;
mod html;
mod markdown;
mod notes;
pub mod svg;
mod tables;
mod terminal;
mod view;

pub use html::html;
pub use markdown::markdown;
pub use terminal::terminal;

#[cfg(test)]
mod tests;
