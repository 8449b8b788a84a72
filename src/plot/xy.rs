//! Points with intervals, and lines, over two axes.

use super::{Anchor, Axis, CHAR_WIDTH, Canvas, Mark, WIDTH, fit, text_width};

const HEIGHT: f64 = 330.0;
/// Edges of the plotting area.
const LEFT: f64 = 56.0;
const RIGHT: f64 = WIDTH - 14.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = HEIGHT - 46.0;
/// How far a point that belongs beside another stands to the right.
const BESIDE: f64 = 9.0;
/// Longest label in the plot, in units.
const LABEL_MAX: f64 = 22.0 * CHAR_WIDTH;

/// A plot of points and lines.
pub struct Plot {
    /// What it shows, for those who cannot see it.
    pub label: String,
    pub x: Axis,
    pub y: Axis,
    /// Values at which a dashed line crosses the plot.
    pub x_guide: Option<f64>,
    pub y_guide: Option<f64>,
    pub lines: Vec<Line>,
    pub points: Vec<Point>,
    /// What a pointer shows wherever it rests above an x: for lines of more points than could be pointed at.
    pub readings: Vec<Reading>,
}

/// What is to be read at `x`.
pub struct Reading {
    pub x: f64,
    pub tooltip: String,
}

/// A series of (x, y), joined in order.
pub struct Line {
    pub points: Vec<(f64, f64)>,
    pub mark: Mark,
    /// Thin and pale: stands behind what matters.
    pub faint: bool,
    pub tooltip: String,
}

/// A marked point.
pub struct Point {
    pub x: f64,
    pub y: f64,
    /// Interval of y.
    pub interval: Option<(f64, f64)>,
    pub mark: Mark,
    /// Another point that it belongs to: joined by a thin line, and this one is drawn a little to the right, so that
    /// neither hides the other where they have the same x.
    pub beside: Option<(f64, f64)>,
    /// Stands beside the point if there's room; may be empty.
    pub label: String,
    pub tooltip: String,
}

impl Plot {
    /// The drawing.
    pub fn svg(&self) -> String {
        let mut canvas = Canvas::new();
        self.frame(&mut canvas);
        for line in &self.lines {
            let points: Vec<(f64, f64)> = line
                .points
                .iter()
                .filter(|(x, y)| x.is_finite() && y.is_finite())
                .map(|p| self.place(p.0, p.1))
                .collect();
            let class = if line.faint { "series faint" } else { "series" };
            canvas.polyline(&format!("{class} {}", line.mark.class()), &points, &line.tooltip);
        }
        self.readings(&mut canvas);
        let points: Vec<&Point> = self.points.iter().filter(|p| p.x.is_finite() && p.y.is_finite()).collect();
        for point in &points {
            if let Some((x, y)) = point.beside.filter(|(x, y)| x.is_finite() && y.is_finite()) {
                canvas.line(&format!("thin {}", point.mark.class()), self.place(x, y), self.spot(point));
            }
            if let Some((low, high)) = self.interval(point) {
                let (x, class) = (self.spot(point).0, format!("whisker {}", point.mark.class()));
                canvas.line(&class, (x, low), (x, high));
                canvas.line(&class, (x - 3.0, low), (x + 3.0, low));
                canvas.line(&class, (x - 3.0, high), (x + 3.0, high));
            }
        }
        for point in &points {
            let (x, y) = self.spot(point);
            canvas.mark(point.mark, x, y, &point.tooltip);
        }
        self.labels(&mut canvas, &points);
        canvas.finish(&self.label, WIDTH, HEIGHT)
    }

    fn place(&self, x: f64, y: f64) -> (f64, f64) {
        (self.x.at(x, LEFT, RIGHT), self.y.at(y, BOTTOM, TOP))
    }

    /// Where a point's mark stands.
    fn spot(&self, point: &Point) -> (f64, f64) {
        let (x, y) = self.place(point.x, point.y);
        (x + if point.beside.is_some() { BESIDE } else { 0.0 }, y)
    }

    /// Lower and upper end of a point's interval, as drawn.
    fn interval(&self, point: &Point) -> Option<(f64, f64)> {
        let (low, high) = point.interval.filter(|(low, high)| low.is_finite() && high.is_finite())?;
        Some((self.place(0.0, low).1, self.place(0.0, high).1))
    }

    fn frame(&self, canvas: &mut Canvas) {
        for (value, label) in self.x.ticks(5) {
            let x = self.x.at(value, LEFT, RIGHT);
            canvas.line("grid", (x, TOP), (x, BOTTOM));
            // A label at the right end would leave the drawing.
            let within = x.min(WIDTH - text_width(&label) / 2.0 - 3.0);
            canvas.text("tick", (within, BOTTOM + 17.0), Anchor::Middle, &label);
        }
        for (value, label) in self.y.ticks(5) {
            let y = self.y.at(value, BOTTOM, TOP);
            canvas.line("grid", (LEFT, y), (RIGHT, y));
            canvas.text("tick", (LEFT - 6.0, y + 4.5), Anchor::End, &label);
        }
        if let Some(x) = self.x_guide.filter(|v| v.is_finite()) {
            let x = self.x.at(x, LEFT, RIGHT);
            canvas.line("guide", (x, TOP), (x, BOTTOM));
        }
        if let Some(y) = self.y_guide.filter(|v| v.is_finite()) {
            let y = self.y.at(y, BOTTOM, TOP);
            canvas.line("guide", (LEFT, y), (RIGHT, y));
        }
        canvas.line("axis", (LEFT, BOTTOM), (RIGHT, BOTTOM));
        let middle = (LEFT + RIGHT) / 2.0;
        canvas.text("axis-title", (middle, HEIGHT - 8.0), Anchor::Middle, &fit(&self.x.title, WIDTH));
        // Above the axis and level, because turned text is hard to read.
        canvas.text("axis-title", (4.0, 14.0), Anchor::Start, &fit(&self.y.title, WIDTH));
    }

    /// Strips as high as the plot, each reaching half-way to its neighbours; the one under the pointer shows its x.
    fn readings(&self, canvas: &mut Canvas) {
        let mut readings: Vec<&Reading> = self.readings.iter().filter(|r| r.x.is_finite()).collect();
        readings.sort_by(|a, b| a.x.total_cmp(&b.x));
        let at: Vec<f64> = readings.iter().map(|r| self.x.at(r.x, LEFT, RIGHT)).collect();
        for (i, reading) in readings.iter().enumerate() {
            let half_way = |other: usize, edge: f64| at.get(other).map_or(edge, |x| (x + at[i]) / 2.0);
            let (from, to) = (half_way(i.wrapping_sub(1), LEFT), half_way(i + 1, RIGHT));
            canvas.group("reading", &reading.tooltip, |canvas| {
                canvas.rect("strip", (from, TOP), (to - from, BOTTOM - TOP), "", "");
                canvas.line("here", (at[i], TOP), (at[i], BOTTOM));
            });
        }
    }

    /// Sets each label where it covers least of what is there already.
    fn labels(&self, canvas: &mut Canvas, points: &[&Point]) {
        let mut taken: Vec<Area> = Vec::new();
        if let Some(y) = self.y_guide.filter(|v| v.is_finite()).map(|v| self.y.at(v, BOTTOM, TOP)) {
            taken.push(Area { left: LEFT, top: y - 0.5, right: RIGHT, bottom: y + 0.5 });
        }
        if let Some(x) = self.x_guide.filter(|v| v.is_finite()).map(|v| self.x.at(v, LEFT, RIGHT)) {
            taken.push(Area { left: x - 0.5, top: TOP, right: x + 0.5, bottom: BOTTOM });
        }
        for point in points {
            let (x, y) = self.spot(point);
            taken.push(Area { left: x - 7.0, top: y - 7.0, right: x + 7.0, bottom: y + 7.0 });
            if let Some((low, high)) = self.interval(point) {
                taken.push(Area { left: x - 3.0, top: high, right: x + 3.0, bottom: low });
            }
        }
        for point in points.iter().filter(|p| !p.label.is_empty()) {
            let at = self.spot(point);
            let text = fit(&point.label, LABEL_MAX);
            let spots = spots(at, text_width(&text));
            let cost = |area: &Area| taken.iter().map(|t| t.overlap(area)).sum::<f64>() + area.outside();
            let Some((best, far)) = spots.into_iter().min_by(|a, b| {
                // A far spot has to be clearly better than a near one.
                let weighed = |(area, far): &(Area, bool)| cost(area) + if *far { 8.0 } else { 0.0 };
                weighed(a).total_cmp(&weighed(b))
            }) else {
                continue;
            };
            if far {
                let end = (at.0.clamp(best.left, best.right), at.1.clamp(best.top + 2.0, best.bottom - 2.0));
                canvas.line("leader", at, end);
            }
            let class = format!("label {}", point.mark.class());
            canvas.text(&class, (best.left, best.bottom - 3.5), Anchor::Start, &text);
            taken.push(best);
        }
    }
}

/// A rectangle of the drawing.
#[derive(Clone, Copy)]
struct Area {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

impl Area {
    fn overlap(&self, other: &Self) -> f64 {
        let width = self.right.min(other.right) - self.left.max(other.left);
        let height = self.bottom.min(other.bottom) - self.top.max(other.top);
        width.max(0.0) * height.max(0.0)
    }

    /// Weight of what lies beyond the drawing's edges.
    fn outside(&self) -> f64 {
        let beyond = [LEFT - self.left, self.right - (WIDTH - 2.0), TOP - 6.0 - self.top, self.bottom - BOTTOM];
        beyond.into_iter().map(|b| b.max(0.0) * 60.0).sum()
    }
}

/// Where a label of a point could stand: around it, then farther off. The flag tells the far ones.
fn spots((x, y): (f64, f64), width: f64) -> Vec<(Area, bool)> {
    let mut spots = Vec::new();
    for (gap, far) in [(9.0, false), (24.0, true), (42.0, true), (60.0, true)] {
        for (dx, dy) in [(1, 0), (-1, 0), (1, -1), (-1, -1), (1, 1), (-1, 1), (0, -1), (0, 1)] {
            let across = match dx {
                1 => x + gap,
                -1 => x - gap - width,
                _ => x - width / 2.0,
            };
            let middle = y + f64::from(dy) * if dx == 0 { gap + 7.0 } else { gap };
            let area = Area { left: across, top: middle - 7.5, right: across + width, bottom: middle + 7.5 };
            spots.push((area, far));
        }
    }
    spots
}
