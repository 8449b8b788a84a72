//! A table of numbers as shades.

use super::format::fixed;
use super::{Anchor, Canvas, WIDTH, fit, text_width};

/// Rows of cells, darker where the value is greater.
pub struct Heatmap {
    /// What it shows, for those who cannot see it.
    pub label: String,
    pub x_title: String,
    /// Name and cells of each row.
    pub rows: Vec<(String, Vec<f64>)>,
}

/// Width, in units, that names may take.
const NAMES_MAX: f64 = 150.0;
/// Narrowest cell that still shows its number.
const NUMBER_MIN: f64 = 30.0;

impl Heatmap {
    /// The drawing: shades from the least to the greatest value, and a key to them.
    pub fn svg(&self) -> String {
        let columns = self.rows.iter().map(|r| r.1.len()).max().unwrap_or(0).max(1);
        let names = self.rows.iter().map(|r| text_width(&r.0)).fold(0.0, f64::max).min(NAMES_MAX);
        let (left, right, pitch) = (names + 12.0, WIDTH - 8.0, 24.0);
        let width = (right - left) / columns as f64;
        let values = || self.rows.iter().flat_map(|r| &r.1).copied().filter(|v| v.is_finite());
        let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        // From 0.08, so that the least value is still a cell.
        let shade = |v: f64| if high > low { 0.08 + 0.92 * ((v - low) / (high - low)).clamp(0.0, 1.0) } else { 0.5 };

        let mut canvas = Canvas::new();
        for (i, (name, cells)) in self.rows.iter().enumerate() {
            let top = pitch * i as f64;
            canvas.text("row-name", (left - 8.0, top + 16.5), Anchor::End, &fit(name, NAMES_MAX));
            for (j, value) in cells.iter().enumerate().filter(|(_, v)| v.is_finite()) {
                let corner = (left + j as f64 * width, top + 1.0);
                let gap = (0.1 * width).min(1.5);
                let style = format!("fill-opacity:{:.3}", shade(*value));
                let tooltip = format!("{name}, {} {j}: {}", self.x_title, fixed(*value, 2));
                canvas.rect("cell", corner, (width - gap, pitch - 2.0), &style, &tooltip);
                if width >= NUMBER_MIN {
                    let class = if shade(*value) > 0.55 { "cell-number on-dark" } else { "cell-number" };
                    canvas.text(class, (corner.0 + (width - gap) / 2.0, top + 16.5), Anchor::Middle, &fixed(*value, 2));
                }
            }
        }
        let bottom = pitch * self.rows.len() as f64;
        let every = columns.div_ceil(10);
        for j in (0..columns).step_by(every) {
            let x = left + (j as f64 + 0.5) * width;
            canvas.text("tick", (x, bottom + 15.0), Anchor::Middle, &j.to_string());
        }
        canvas.text("axis-title", (left, bottom + 37.0), Anchor::Start, &fit(&self.x_title, WIDTH));
        if low <= high {
            key(&mut canvas, right, bottom + 27.0, low, high);
        }
        canvas.finish(&self.label, WIDTH, bottom + 46.0)
    }
}

/// The shades with their least and greatest value, ending at `right`.
fn key(canvas: &mut Canvas, right: f64, top: f64, low: f64, high: f64) {
    let (least, greatest) = (fixed(low, 2), fixed(high, 2));
    let end = right - text_width(&greatest) - 6.0;
    let (steps, width) = (10, 8.0);
    let start = end - f64::from(steps) * width;
    for i in 0..steps {
        let shade = 0.08 + 0.92 * f64::from(i) / f64::from(steps - 1);
        let corner = (start + f64::from(i) * width, top);
        canvas.rect("cell", corner, (width, 12.0), &format!("fill-opacity:{shade:.3}"), "");
    }
    canvas.text("tick", (start - 5.0, top + 10.5), Anchor::End, &least);
    canvas.text("tick", (right, top + 10.5), Anchor::End, &greatest);
}
