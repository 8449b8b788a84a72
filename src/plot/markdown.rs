//! Text and tables as Markdown (GitHub's) holds them.

use super::format::{self, one_line};
use super::table::{Cell, Kind, Table};

/// The table. Titles of several lines stand on one.
pub fn table(table: &Table) -> String {
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

/// A command line as a block of its own.
pub fn console(command: &str) -> String {
    let fence = "`".repeat(longest_run(command).max(2) + 1);
    format!("{fence}console\n$ {}\n{fence}\n", one_line(command))
}

fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

/// Text that means only itself. Brackets alone are no link.
pub fn text(text: &str) -> String {
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
pub fn prose(text: &str) -> String {
    let parts = format::code_spans(text);
    parts.into_iter().map(|(is_code, part)| if is_code { code(part) } else { self::text(part) }).collect()
}
