//! Curves over a run's steps: smoothed, thinned, and drawn with what a pointer reads off them.

use crate::plot::format::{count, real};
use crate::plot::{Axis, Line, Mark, Plot, Point, Reading, escape};

/// Points that a curve is drawn with at most.
pub const POINTS_MAX: usize = 400;
/// Places of a chart that a pointer can read.
const READINGS_MAX: usize = 80;
/// Markers on a curve of many points, so that curves are not told by colour alone.
const MARKERS: usize = 5;
/// Evaluations that are all marked.
const MARKED_MAX: usize = 40;

/// (step, value), steps ascending.
pub type Points = Vec<(f64, f64)>;

/// One curve.
pub struct Series {
    pub name: String,
    pub points: Points,
    pub mark: Mark,
    pub look: Look,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Faint, behind others.
    Raw,
    Line,
    /// With a marker now and then: one of many.
    OneOfMany,
    /// Every point is marked.
    Marked,
}

impl Series {
    /// Without points that are no numbers.
    pub fn new(name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>, mark: Mark, look: Look) -> Self {
        let points = points.into_iter().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
        Self { name: name.into(), points, mark, look }
    }

    /// The value that holds at `x`: the last one up to there, with its step.
    fn at(&self, x: f64) -> Option<(f64, f64)> {
        self.points[..self.points.partition_point(|p| p.0 <= x)].last().copied()
    }

    /// Indices of the points that have a marker, of `n`; `turn` of `of` curves, so that they do not hide each other.
    fn marked(&self, n: usize, turn: usize, of: usize) -> Vec<usize> {
        match self.look {
            _ if n == 1 => vec![0],
            Look::Marked if n <= MARKED_MAX => (0..n).collect(),
            Look::Marked | Look::OneOfMany => {
                let place = |i: usize| (i as f64 + (turn as f64 + 0.5) / of.max(1) as f64) / MARKERS as f64;
                (0..MARKERS).map(|i| ((place(i) * n as f64) as usize).min(n.saturating_sub(1))).collect()
            }
            Look::Raw | Look::Line => Vec::new(),
        }
    }
}

/// What is drawn, and how its axis is made.
pub struct Curves<'a> {
    /// Name of the values, with their unit.
    pub title: &'a str,
    /// Equal factors are equally long.
    pub log: bool,
    pub series: Vec<Series>,
}

impl Curves<'_> {
    /// Legend, where there are several, and drawing, as HTML. None where there is nothing to draw.
    pub fn html(mut self) -> Option<String> {
        self.series.retain(|s| !s.points.is_empty());
        let steps: Vec<f64> = {
            let longest = self.series.iter().max_by_key(|s| s.points.len())?;
            longest.points.iter().map(|p| p.0).collect()
        };
        let readings = spread(steps.len(), READINGS_MAX).into_iter().map(|i| self.reading(steps[i]));
        let readings: Vec<Reading> = readings.collect();
        let drawn: Vec<Points> = self.series.iter().map(|s| thin(&s.points, POINTS_MAX)).collect();
        let all = || drawn.iter().flatten().copied();
        let values = all().map(|p| p.1);
        let y = if self.log { Axis::log(self.title, values) } else { Axis::around(self.title, values) };
        let (first, last) = all().fold((f64::INFINITY, 0f64), |(low, high), p| (low.min(p.0), high.max(p.0)));
        let mut lines = Vec::new();
        let mut points = Vec::new();
        for (turn, (series, drawn)) in self.series.iter().zip(drawn).enumerate() {
            for i in series.marked(drawn.len(), turn, self.series.len()) {
                let (x, y) = drawn[i];
                let tooltip = format!("{} at step {}: {}", series.name, count(x as u64), real(y));
                points.push(Point {
                    x,
                    y,
                    interval: None,
                    mark: series.mark,
                    beside: None,
                    label: String::new(),
                    tooltip,
                });
            }
            let faint = series.look == Look::Raw;
            lines.push(Line { points: drawn, mark: series.mark, faint, tooltip: series.name.clone() });
        }
        let plot = Plot {
            label: format!("{} by step: {}", self.title, self.names().join(", ")),
            x: Axis::between("step", first, last),
            y,
            x_guide: None,
            y_guide: None,
            lines,
            points,
            readings,
        };
        Some(self.legend() + &plot.svg())
    }

    fn names(&self) -> Vec<&str> {
        self.series.iter().map(|s| s.name.as_str()).collect()
    }

    fn reading(&self, x: f64) -> Reading {
        let values = self.series.iter().filter_map(|series| {
            let (step, value) = series.at(x)?;
            let of = if step < x { format!(" (of step {})", count(step as u64)) } else { String::new() };
            Some(format!("{} {}{of}", series.name, real(value)))
        });
        let values: Vec<String> = values.collect();
        Reading { x, tooltip: format!("step {}: {}", count(x as u64), values.join(" · ")) }
    }

    fn legend(&self) -> String {
        if self.series.len() < 2 {
            return String::new();
        }
        let item = |s: &Series| {
            let key = match s.look {
                Look::Raw | Look::Line => s.mark.line_svg(s.look == Look::Raw),
                Look::OneOfMany | Look::Marked => s.mark.svg(),
            };
            format!("<li>{key}<span>{}</span></li>\n", escape(&s.name))
        };
        format!("<ul class=\"legend\">\n{}</ul>\n", self.series.iter().map(item).collect::<String>())
    }
}

/// Means of each point and those before it, `window` in all or as many as there are.
pub fn smooth(points: &[(f64, f64)], window: usize) -> Points {
    let window = window.max(1);
    let mut smoothed = Vec::with_capacity(points.len());
    let mut sum = 0.0;
    for (i, (x, y)) in points.iter().enumerate() {
        sum += y;
        if let Some(left) = i.checked_sub(window) {
            sum -= points[left].1;
        }
        smoothed.push((*x, sum / window.min(i + 1) as f64));
    }
    smoothed
}

/// At most `max` (≥ 4) of the points, in order: the first, the last, and of equal stretches between them the least and
/// the greatest, so that no spike is lost.
pub fn thin(points: &[(f64, f64)], max: usize) -> Points {
    let [first, between @ .., last] = points else { return points.to_vec() };
    if points.len() <= max {
        return points.to_vec();
    }
    let stretches = (max - 2) / 2;
    let mut kept = vec![*first];
    for i in 0..stretches {
        let from = between.len() * i / stretches;
        let stretch = &between[from..between.len() * (i + 1) / stretches];
        let place = |p: Option<(usize, &(f64, f64))>| p.map(|(at, _)| at);
        let least = place(stretch.iter().enumerate().min_by(|a, b| a.1.1.total_cmp(&b.1.1)));
        let greatest = place(stretch.iter().enumerate().max_by(|a, b| a.1.1.total_cmp(&b.1.1)));
        let mut found: Vec<usize> = least.into_iter().chain(greatest).collect();
        found.sort_unstable();
        found.dedup();
        kept.extend(found.into_iter().map(|at| stretch[at]));
    }
    kept.push(*last);
    kept
}

/// At most `max` (≥ 2) indices of `n`, evenly spread, first and last among them.
fn spread(n: usize, max: usize) -> Vec<usize> {
    if n <= max {
        return (0..n).collect();
    }
    (0..max).map(|i| i * (n - 1) / (max - 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn smoothing_takes_the_mean_of_what_went_before() {
        let points = [(1.0, 4.0), (2.0, 2.0), (3.0, 0.0), (4.0, 1.0)];
        assert_eq!(smooth(&points, 2), [(1.0, 4.0), (2.0, 3.0), (3.0, 1.0), (4.0, 0.5)]);
        assert_eq!(smooth(&points, 0), points);
        assert_eq!(smooth(&[], 5), []);
    }

    #[test]
    fn a_reading_gives_the_last_value_and_its_step() {
        let line = Series::new("training", [(1.0, 3.5), (2.0, f64::NAN), (3.0, 2.0)], Mark::of(0), Look::Line);
        let marked = Series::new("<held-out>", [(1.0, 3.25)], Mark::of(1), Look::Marked);
        let curves = Curves { title: "loss", log: false, series: vec![line, marked] };
        assert_eq!(curves.reading(3.0).tooltip, "step 3: training 2.000 · <held-out> 3.250 (of step 1)");
        let drawn = curves.html().unwrap();
        assert!(drawn.contains("&lt;held-out&gt; at step 1: 3.250</title>") && !drawn.contains("<held"));
        assert!(drawn.contains("<ul class=\"legend\">"));
        assert!(Curves { title: "", log: true, series: vec![] }.html().is_none());
        let nothing = Series::new("", [(1.0, f64::NAN)], Mark::of(0), Look::Line);
        assert!(Curves { title: "", log: true, series: vec![nothing] }.html().is_none());
    }

    proptest! {
        #[test]
        fn thinning_keeps_the_ends_the_order_and_the_extremes(
            values in proptest::collection::vec(-9.0f64..9.0, 0..300),
            max in 4usize..60,
        ) {
            let points: Points = values.iter().enumerate().map(|(i, v)| (i as f64, *v)).collect();
            let thinned = thin(&points, max);
            prop_assert!(thinned.len() <= max.max(2) && thinned.len() >= max.min(points.len()) / 3);
            prop_assert_eq!(thinned.first(), points.first());
            prop_assert_eq!(thinned.last(), points.last());
            prop_assert!(thinned.windows(2).all(|w| w[0].0 < w[1].0));
            let greatest = |p: &[(f64, f64)]| p.iter().map(|p| p.1).fold(-9.0, f64::max);
            prop_assert_eq!(greatest(&thinned), greatest(&points));
        }

        #[test]
        fn spread_indices_have_both_ends(n in 1usize..500, max in 2usize..90) {
            let found = spread(n, max);
            prop_assert!(found.len() == n.min(max) && found[0] == 0 && found[found.len() - 1] == n - 1);
            prop_assert!(found.windows(2).all(|w| w[0] < w[1]));
        }
    }
}
