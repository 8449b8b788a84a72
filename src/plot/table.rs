//! Tables, before anyone says how a table looks, and how they look in a terminal.

use super::format::{clip, one_line};

/// A table; every row has a cell per column.
pub struct Table {
    pub columns: Vec<Column>,
    pub rows: Vec<Vec<Cell>>,
}

pub struct Column {
    /// Lines are separated by `\n` where the table's form can show several.
    pub title: String,
    /// Names stand left, numbers right.
    pub left: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    pub text: String,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Plain,
    /// A name that a user may type again.
    Name,
    /// A saving below zero.
    Cost,
    Better,
    Worse,
}

/// Longest name in a terminal's table, in characters.
const NAME_MAX: usize = 34;

impl Table {
    /// A table of these titles, and whether each column stands left; without rows.
    pub fn new(columns: &[(&str, bool)]) -> Self {
        let columns = columns.iter().map(|(title, left)| Column { title: (*title).into(), left: *left });
        Self { columns: columns.collect(), rows: Vec::new() }
    }

    /// Adds a column of numbers.
    pub fn column(&mut self, title: impl Into<String>) {
        self.columns.push(Column { title: title.into(), left: false });
    }

    /// Columns of equal width, two spaces apart; a rule under the titles.
    pub fn aligned(&self) -> String {
        let head: Vec<Vec<&str>> = self.columns.iter().map(|c| c.title.split('\n').collect()).collect();
        let height = head.iter().map(Vec::len).max().unwrap_or(0);
        let shown = |text: &str| clip(&one_line(text), NAME_MAX);
        let titles = (0..height).map(|line| {
            let of =
                |lines: &Vec<&str>| (line + lines.len()).checked_sub(height).map_or("", |at| lines[at]).to_string();
            head.iter().map(|lines| shown(&of(lines))).collect()
        });
        let rows = self.rows.iter().map(|row| row.iter().map(|c| shown(&c.text)).collect());
        let lines: Vec<Vec<String>> = titles.chain(rows).collect();
        let width = |i: usize| lines.iter().map(|line| line[i].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut out = String::new();
        for (at, line) in lines.iter().enumerate() {
            if at == height {
                out += &format!("{}\n", "─".repeat(widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1)));
            }
            let cells = line.iter().zip(&widths).zip(&self.columns).map(|((text, width), column)| {
                if column.left { format!("{text:<width$}") } else { format!("{text:>width$}") }
            });
            out += cells.collect::<Vec<_>>().join("  ").trim_end();
            out.push('\n');
        }
        out
    }
}

/// A cell of a number or a word.
pub fn plain(text: impl Into<String>) -> Cell {
    Cell { text: text.into(), kind: Kind::Plain }
}

/// A cell of a name.
pub fn name(text: impl Into<String>) -> Cell {
    Cell { text: text.into(), kind: Kind::Name }
}
