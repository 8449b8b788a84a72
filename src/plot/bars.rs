//! Horizontal bars with intervals, and rows of columns.

use super::{Anchor, Axis, Canvas, Mark, WIDTH, fit, text_width};

/// One horizontal bar per row.
pub struct Bars {
    /// What it shows, for those who cannot see it.
    pub label: String,
    /// Bars begin at its zero.
    pub axis: Axis,
    pub rows: Vec<Bar>,
    /// A value at which a dashed line crosses the bars.
    pub guide: Option<f64>,
    /// Without names and values, and narrow: one of many small ones.
    pub small: bool,
}

pub struct Bar {
    pub name: String,
    pub value: f64,
    pub interval: Option<(f64, f64)>,
    pub mark: Mark,
    /// Stands at the bar's right.
    pub text: String,
    pub tooltip: String,
}

/// Width of small drawings.
const SMALL_WIDTH: f64 = 180.0;
/// Width, in units, that names may take.
const NAMES_MAX: f64 = 220.0;

impl Bars {
    /// The drawing.
    pub fn svg(&self) -> String {
        let (width, ticks) = if self.small { (SMALL_WIDTH, 2) } else { (WIDTH, 5) };
        let pitch = if self.small { 9.0 } else { 24.0 };
        let (left, right) = if self.small {
            (8.0, width - 14.0)
        } else {
            let widest = |text: fn(&Bar) -> &str| self.rows.iter().map(|r| text_width(text(r))).fold(0.0, f64::max);
            (widest(|r| &r.name).min(NAMES_MAX) + 10.0, width - widest(|r| &r.text).min(NAMES_MAX) - 14.0)
        };
        let (top, bottom) = (4.0, 8.0 + pitch * self.rows.len() as f64);
        let mut canvas = Canvas::new();
        for (value, label) in self.axis.ticks(ticks) {
            let x = self.axis.at(value, left, right);
            canvas.line("grid", (x, top), (x, bottom));
            canvas.text("tick", (x, bottom + 15.0), Anchor::Middle, &label);
        }
        let zero = self.axis.at(0.0, left, right);
        for (i, row) in self.rows.iter().enumerate().filter(|(_, row)| row.value.is_finite()) {
            let middle = top + 2.0 + pitch * (i as f64 + 0.5);
            canvas.group("", &row.tooltip, |canvas| self.row(canvas, row, middle, (left, right), zero));
            if !self.small {
                canvas.text("row-name", (left - 6.0, middle + 4.5), Anchor::End, &fit(&row.name, NAMES_MAX));
                canvas.text("value", (width - 4.0, middle + 4.5), Anchor::End, &fit(&row.text, NAMES_MAX));
            }
        }
        canvas.line("axis", (zero, top), (zero, bottom));
        if let Some(x) = self.guide.filter(|v| v.is_finite()).map(|v| self.axis.at(v, left, right)) {
            canvas.line("guide", (x, top), (x, bottom));
        }
        let mut height = bottom + 20.0;
        if !self.axis.title.is_empty() {
            height += 18.0;
            canvas.text(
                "axis-title",
                ((left + right) / 2.0, height - 5.0),
                Anchor::Middle,
                &fit(&self.axis.title, width),
            );
        }
        canvas.finish(&self.label, width, height)
    }

    fn row(&self, canvas: &mut Canvas, row: &Bar, middle: f64, (left, right): (f64, f64), zero: f64) {
        let thick = if self.small { 6.0 } else { 14.0 };
        let end = self.axis.at(row.value, left, right);
        let (from, to) = (zero.min(end), zero.max(end));
        canvas.rect(&format!("bar {}", row.mark.class()), (from, middle - thick / 2.0), (to - from, thick), "", "");
        if let Some((low, high)) = row.interval.filter(|(low, high)| low.is_finite() && high.is_finite()) {
            let (low, high) = (self.axis.at(low, left, right), self.axis.at(high, left, right));
            canvas.line("error", (low, middle), (high, middle));
            if !self.small {
                canvas.line("error", (low, middle - 4.0), (low, middle + 4.0));
                canvas.line("error", (high, middle - 4.0), (high, middle + 4.0));
            }
        }
    }
}

/// Rows of vertical columns over one axis of whole numbers: a histogram per row, each as high as the row is.
pub struct Columns {
    /// What it shows, for those who cannot see it.
    pub label: String,
    pub x_title: String,
    /// What a column's height is, in words, for tooltips: `of tokens`.
    pub what: String,
    pub rows: Vec<ColumnsRow>,
}

pub struct ColumnsRow {
    pub name: String,
    /// Share of each whole number from 0.
    pub shares: Vec<f64>,
    pub mark: Mark,
}

/// Least share that has a place in the drawing.
const SHARE_MIN: f64 = 0.001;

impl Columns {
    /// The drawing. It shows the numbers from the least to the greatest that any row has for 0.1 % or more.
    pub fn svg(&self) -> String {
        let shares = self.rows.iter().flat_map(|r| r.shares.iter().enumerate());
        let used: Vec<usize> = shares.filter(|(_, share)| **share >= SHARE_MIN).map(|(k, _)| k).collect();
        let first = used.iter().min().copied().unwrap_or(0);
        let count = used.iter().max().copied().unwrap_or(0) - first + 1;
        let names = self.rows.iter().map(|r| text_width(&r.name)).fold(0.0, f64::max).min(NAMES_MAX);
        let (left, right, pitch) = (names + 12.0, WIDTH - 78.0, 36.0);
        let mut canvas = Canvas::new();
        for (i, row) in self.rows.iter().enumerate() {
            let base = pitch * (i as f64 + 1.0);
            canvas.text("row-name", (left - 8.0, base - 8.0), Anchor::End, &fit(&row.name, NAMES_MAX));
            self.row(&mut canvas, row, base, (left, right), (first, count));
            canvas.line("axis", (left, base), (right, base));
        }
        let bottom = pitch * self.rows.len() as f64;
        let (width, every) = ((right - left) / count as f64, count.div_ceil(8));
        for k in (first..first + count).filter(|k| (k - first).is_multiple_of(every)) {
            let x = left + ((k - first) as f64 + 0.5) * width;
            canvas.text("tick", (x, bottom + 16.0), Anchor::Middle, &k.to_string());
        }
        let middle = (left + right) / 2.0;
        canvas.text("axis-title", (middle, bottom + 36.0), Anchor::Middle, &fit(&self.x_title, WIDTH));
        canvas.finish(&self.label, WIDTH, bottom + 42.0)
    }

    /// One histogram of `count` columns from the number `first`, standing on `base`.
    fn row(
        &self,
        canvas: &mut Canvas,
        row: &ColumnsRow,
        base: f64,
        (left, right): (f64, f64),
        (first, count): (usize, usize),
    ) {
        let shown = || row.shares.iter().enumerate().filter(|(_, share)| share.is_finite() && **share >= SHARE_MIN);
        let Some(peak) = shown().map(|(_, share)| *share).max_by(f64::total_cmp) else { return };
        let width = (right - left) / count as f64;
        let gap = (0.15 * width).min(2.0);
        for (k, share) in shown() {
            let high = 28.0 * share / peak;
            let corner = (left + (k - first) as f64 * width + gap / 2.0, base - high);
            let tooltip = format!("{}: {k} for {:.1} % {}", row.name, 100.0 * share, self.what);
            canvas.rect(&format!("bar {}", row.mark.class()), corner, (width - gap, high), "", &tooltip);
        }
        let text = format!("peak {:.0} %", 100.0 * peak);
        canvas.text("tick", (WIDTH - 4.0, base - 8.0), Anchor::End, &text);
    }
}
