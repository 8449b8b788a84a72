//! What reports are made of, whatever they report: charts, [tables](table), [pages](page), [Markdown](markdown) and
//! [numbers as people read them](format).
//!
//! Charts are SVG, written by hand: no script, no external resource; colours come from [`STYLE`], for light and dark.
//! All drawings are [`WIDTH`] units wide with 13-unit text, legible when shown 340 pixels wide and up. Coordinates and
//! values that are no finite numbers are left out, never written.

mod axis;
mod bars;
#[cfg(test)]
pub mod check;
pub mod format;
mod heatmap;
pub mod markdown;
pub mod page;
pub mod table;
#[cfg(test)]
mod tests;
mod xy;

pub use axis::Axis;
pub use bars::{Bar, Bars, Columns, ColumnsRow};
pub use heatmap::Heatmap;
pub use xy::{Line, Plot, Point, Reading};

use std::fmt::Write;

/// Style sheet for every page that holds these drawings.
pub const STYLE: &str = include_str!("style.css");

/// Width of a drawing in its own units.
pub const WIDTH: f64 = 440.0;

/// Colours that [`STYLE`] has for series; further series take them again, in another shape.
const COLOURS: usize = 7;

/// Width of an average character of 13-unit text.
const CHAR_WIDTH: f64 = 7.0;

/// How a series looks: colour, shape, and filled or hollow, so that none is told by colour alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// None: the neutral colour of text.
    pub series: Option<usize>,
    pub shape: Shape,
    pub filled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Circle,
    Square,
    Up,
    Down,
    Hexagon,
    Diamond,
}

impl Mark {
    /// The filled mark of the `series`-th series.
    pub fn of(series: usize) -> Self {
        let shapes = [Shape::Circle, Shape::Square, Shape::Up, Shape::Down, Shape::Hexagon];
        Self { series: Some(series), shape: shapes[series % shapes.len()], filled: true }
    }

    /// The mark alone, to stand in a legend.
    pub fn svg(self) -> String {
        let mut out = String::new();
        self.draw(&mut out, 9.0, 9.0, "");
        format!("<svg class=\"key\" viewBox=\"0 0 18 18\" width=\"18\" height=\"18\" aria-hidden=\"true\">{out}</svg>")
    }

    /// A piece of line as the series has, to stand in a legend.
    pub fn line_svg(self, faint: bool) -> String {
        let class = format!("series {}{}", if faint { "faint " } else { "" }, self.class());
        let line = format!("<polyline class=\"{class}\" points=\"0,9 24,9\"/>");
        format!("<svg class=\"key\" viewBox=\"0 0 24 18\" width=\"24\" height=\"18\" aria-hidden=\"true\">{line}</svg>")
    }

    /// Style classes of colour and filling.
    fn class(self) -> String {
        let colour = self.series.map_or("sn".into(), |i| format!("s{}", i % COLOURS));
        format!("{colour} {}", if self.filled { "full" } else { "hollow" })
    }

    fn draw(self, out: &mut String, x: f64, y: f64, tooltip: &str) {
        let (class, tooltip) = (self.class(), title(tooltip));
        let polygon = |corners: &[(f64, f64)]| {
            let points: Vec<String> = corners.iter().map(|(a, b)| format!("{},{}", n(x + a), n(y + b))).collect();
            format!("<polygon class=\"{class}\" points=\"{}\">{tooltip}</polygon>", points.join(" "))
        };
        *out += &match self.shape {
            Shape::Circle => {
                format!("<circle class=\"{class}\" cx=\"{}\" cy=\"{}\" r=\"5\">{tooltip}</circle>", n(x), n(y))
            }
            Shape::Square => polygon(&[(-4.6, -4.6), (4.6, -4.6), (4.6, 4.6), (-4.6, 4.6)]),
            Shape::Up => polygon(&[(0.0, -6.0), (5.6, 4.2), (-5.6, 4.2)]),
            Shape::Down => polygon(&[(0.0, 6.0), (5.6, -4.2), (-5.6, -4.2)]),
            Shape::Hexagon => polygon(&[(0.0, -5.8), (5.0, -2.9), (5.0, 2.9), (0.0, 5.8), (-5.0, 2.9), (-5.0, -2.9)]),
            Shape::Diamond => polygon(&[(0.0, -6.8), (6.2, 0.0), (0.0, 6.8), (-6.2, 0.0)]),
        };
    }
}

/// Where a text stands relative to its point.
#[derive(Clone, Copy)]
enum Anchor {
    Start,
    Middle,
    End,
}

/// A drawing in the making.
struct Canvas {
    body: String,
}

impl Canvas {
    fn new() -> Self {
        Self { body: String::new() }
    }

    fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let (x1, y1, x2, y2) = (n(from.0), n(from.1), n(to.0), n(to.1));
        self.push(format_args!("<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>"));
    }

    fn polyline(&mut self, class: &str, points: &[(f64, f64)], tooltip: &str) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{},{}", n(*x), n(*y))).collect();
        let (points, tooltip) = (points.join(" "), title(tooltip));
        self.push(format_args!("<polyline class=\"{class}\" points=\"{points}\">{tooltip}</polyline>"));
    }

    /// `corner` is the upper left one; `style` may be empty.
    fn rect(&mut self, class: &str, corner: (f64, f64), size: (f64, f64), style: &str, tooltip: &str) {
        let (x, y, width, height) = (n(corner.0), n(corner.1), n(size.0.max(0.0)), n(size.1.max(0.0)));
        let style = if style.is_empty() { String::new() } else { format!(" style=\"{style}\"") };
        let tooltip = title(tooltip);
        self.push(format_args!(
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\"{style}>{tooltip}</rect>"
        ));
    }

    fn text(&mut self, class: &str, at: (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let (x, y, text) = (n(at.0), n(at.1), escape(text));
        self.push(format_args!("<text class=\"{class}\" x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{text}</text>"));
    }

    fn mark(&mut self, mark: Mark, x: f64, y: f64, tooltip: &str) {
        mark.draw(&mut self.body, x, y, tooltip);
    }

    /// A group whose parts share a tooltip; `class` may be empty.
    fn group(&mut self, class: &str, tooltip: &str, draw: impl FnOnce(&mut Self)) {
        let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
        self.push(format_args!("<g{class}>{}", title(tooltip)));
        draw(self);
        self.body += "</g>";
    }

    fn push(&mut self, text: std::fmt::Arguments<'_>) {
        let _infallible = self.body.write_fmt(text);
        self.body.push('\n');
    }

    /// The drawing; `label` says what it shows to those who cannot see it.
    fn finish(self, label: &str, width: f64, height: f64) -> String {
        let (width, height, label) = (n(width), n(height), escape(label));
        format!(
            "<svg class=\"chart\" xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
             aria-label=\"{label}\">\n{}</svg>\n",
            self.body
        )
    }
}

/// A chart as a file of its own, with its style inside.
pub fn standalone(chart: &str) -> String {
    let style =
        format!("<style>\n{}svg {{ background: var(--bg); }}\n</style>\n", escape(STYLE).replace("&quot;", "\""));
    let (open, rest) = chart.split_once('\n').unwrap_or((chart, ""));
    format!("{open}\n{style}{rest}")
}

/// Text as XML and HTML hold it, in content and in quoted attributes alike.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            '\t' | '\n' | '\r' => out.push(' '),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// What a pointer that rests on the element shows.
fn title(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("<title>{}</title>", escape(text)) }
}

/// A coordinate with at most two decimals.
fn n(value: f64) -> String {
    let value = if value.is_finite() { value.clamp(-1e5, 1e5) } else { 0.0 };
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

fn text_width(text: &str) -> f64 {
    text.chars().count() as f64 * CHAR_WIDTH
}

/// `text` cut to `width` units.
fn fit(text: &str, width: f64) -> String {
    format::clip(text, (width / CHAR_WIDTH).max(1.0) as usize)
}
