//! The charts of a task.

use super::format;
use super::view::{Row, TaskView};
use crate::eval::results::{Comparison, Metric, Role, RoutingFacts, Saved};
use crate::plot::{Axis, Bar, Bars, Columns, ColumnsRow, Heatmap, Mark, Plot, Point};

/// Which FLOPs a chart is about.
#[derive(Clone, Copy)]
pub enum Scope {
    Experts,
    Forward,
}

impl Scope {
    pub fn name(self) -> &'static str {
        match self {
            Self::Experts => "experts",
            Self::Forward => "forward",
        }
    }

    fn of(self, routing: &RoutingFacts) -> Saved {
        match self {
            Self::Experts => routing.expert_flops,
            Self::Forward => routing.forward_flops,
        }
    }

    /// FLOPs that ran, in per cent of native.
    fn ran_percent(self, routing: &RoutingFacts) -> Option<f64> {
        let saved = self.of(routing);
        (saved.native > 0).then(|| 100.0 * saved.ran as f64 / saved.native as f64)
    }
}

/// Value and interval as drawn: shares in per cent.
fn drawn(metric: &Metric) -> (f64, f64, f64) {
    let unit = if metric.share { 100.0 } else { 1.0 };
    (unit * metric.value, unit * metric.low, unit * metric.high)
}

fn metric_tooltip(name: &str, metric: &Metric) -> String {
    let unit = if metric.share { " %" } else { "" };
    format!(
        "{name}: {} {}{unit}, 95 % interval {}",
        metric.name,
        format::metric_value(metric),
        format::metric_interval(metric)
    )
}

/// Headline metric against the FLOPs that ran; none where no arm knows both.
pub fn pareto(task: &TaskView<'_>, scope: Scope) -> Option<String> {
    let mut points: Vec<Point> = Vec::new();
    let mut title = String::new();
    let place = |row: &Row<'_>| {
        let (routing, metric) = (row.result.routing.as_ref()?, row.headline()?);
        Some((scope.ran_percent(routing)?, metric.clone()))
    };
    for row in &task.rows {
        let Some((x, metric)) = place(row) else { continue };
        let (y, low, high) = drawn(&metric);
        title = format::metric_title(&metric);
        let tooltip = format!("{}; ran {x:.1} % of native", metric_tooltip(&row.arm.label, &metric));
        // Controls are told by their hollow mark and the line to their router.
        let label = if matches!(row.arm.role, Role::Control { .. }) { String::new() } else { row.arm.label.clone() };
        let beside = match &row.arm.role {
            Role::Control { of } => task.rows.iter().find(|r| r.arm.label == *of).and_then(place),
            _ => None,
        };
        let beside = beside.map(|(x, metric)| (x, drawn(&metric).0));
        points.push(Point { x, y, interval: Some((low, high)), mark: row.mark, beside, label, tooltip });
    }
    if points.is_empty() {
        return None;
    }
    let native = task.rows.iter().find(|r| r.arm.role == Role::Native).and_then(place);
    let values = points.iter().flat_map(|p| [Some(p.y), p.interval.map(|i| i.0), p.interval.map(|i| i.1)]).flatten();
    let plot = Plot {
        label: format!("{}: {title} against FLOPs ran, scope {}, in per cent of native", task.name, scope.name()),
        x: Axis::around(format!("FLOPs ran, scope {}, % of native", scope.name()), points.iter().map(|p| p.x)),
        y: Axis::around(title, values),
        x_guide: native.as_ref().map(|n| n.0),
        y_guide: native.as_ref().map(|n| drawn(&n.1).0),
        lines: Vec::new(),
        points,
        readings: Vec::new(),
    };
    Some(plot.svg())
}

/// What every dynamic rule came to less its static control, which has the same mean k; none where no arm has one.
pub fn against_static(task: &TaskView<'_>, comparisons: &[Comparison]) -> Option<String> {
    let mut rows = Vec::new();
    let mut title = String::new();
    for row in &task.rows {
        let Role::Control { of } = &row.arm.role else { continue };
        let compared = comparisons.iter().find(|c| c.task == task.name && c.arm == *of && c.against == row.arm.label);
        let Some((ruled, compared)) = task.rows.iter().find(|r| r.arm.label == *of).zip(compared) else { continue };
        let headline = ruled.headline()?;
        let unit = if headline.share { 100.0 } else { 1.0 };
        title = format!("{} less that of static routing at the same mean k", headline.name);
        let mean_k = ruled.result.routing.as_ref().map_or(0.0, |routing| routing.mean_k);
        let verdict = if compared.significant { "" } else { " (not significant)" };
        rows.push(Bar {
            name: without_file(of),
            value: unit * compared.difference,
            interval: Some((unit * compared.low, unit * compared.high)),
            mark: Mark { filled: compared.significant, ..ruled.mark },
            text: format!("{} at k {mean_k:.2}", format::difference(compared, headline.share)),
            tooltip: format!("{of}: {}{verdict}", format::difference_interval(compared, headline.share)),
        });
    }
    let ends = rows.iter().flat_map(|r| [Some(r.value), r.interval.map(|i| i.0), r.interval.map(|i| i.1)]).flatten();
    let axis = Axis::from_zero(title.clone(), ends.collect::<Vec<f64>>());
    let label = format!("{}: {title}", task.name);
    (!rows.is_empty()).then(|| Bars { label, axis, rows, guide: None, small: false }.svg())
}

/// A router's name without the calibration it names, which all have in common.
fn without_file(label: &str) -> String {
    label.split(',').filter(|part| !part.starts_with("cal=")).collect::<Vec<&str>>().join(",")
}

/// Bars of one metric, an arm each.
pub fn metric_bars(task: &TaskView<'_>, metric: &Metric) -> String {
    let mut rows = Vec::new();
    for row in &task.rows {
        let Some(own) = row.result.metrics.iter().find(|m| m.name == metric.name) else { continue };
        let (value, low, high) = drawn(own);
        rows.push(Bar {
            name: row.name.clone(),
            value,
            interval: Some((low, high)),
            mark: row.mark,
            text: format::in_unit(own.share, own.value),
            tooltip: metric_tooltip(&row.arm.label, own),
        });
    }
    let title = format::metric_title(metric);
    let ends = rows.iter().flat_map(|r| [Some(r.value), r.interval.map(|i| i.1)]).flatten().collect::<Vec<f64>>();
    let axis = Axis::from_zero(title.clone(), ends);
    Bars { label: format!("{}: {title} of every arm", task.name), axis, rows, guide: None, small: false }.svg()
}

/// A small chart per subtask: its name, number of samples and bars of the headline metric, in the order of the arms.
pub fn subtask_bars(task: &TaskView<'_>) -> Vec<(String, usize, String)> {
    let own = |row: &Row<'_>, name: &str| {
        let subtask = row.result.subtasks.iter().find(|s| s.name == name)?.clone();
        Some((subtask.samples, subtask.metrics.into_iter().next()?))
    };
    let names = task.subtasks();
    let all = || names.iter().flat_map(|name| task.rows.iter().filter_map(|r| own(r, name)));
    let share = all().all(|(_, metric)| metric.share);
    let ends = all().flat_map(|(_, metric)| [drawn(&metric).0, drawn(&metric).2]).collect::<Vec<f64>>();
    let axis = if share { Axis::between("", 0.0, 100.0) } else { Axis::from_zero("", ends) };
    let chart = |name: &&str| {
        let mut samples = 0;
        let mut rows = Vec::new();
        for row in &task.rows {
            let Some((n, metric)) = own(row, name) else { continue };
            samples = samples.max(n);
            let (value, low, high) = drawn(&metric);
            let tooltip = metric_tooltip(&row.arm.label, &metric);
            let interval = Some((low, high));
            rows.push(Bar { name: String::new(), value, interval, mark: row.mark, text: String::new(), tooltip });
        }
        let label = format!("{name}: bars of every arm");
        ((*name).to_string(), samples, Bars { label, axis: axis.clone(), rows, guide: None, small: true }.svg())
    };
    names.iter().map(chart).collect()
}

/// How often each number of experts was used, per arm; none where no arm knows.
pub fn experts_per_token(task: &TaskView<'_>) -> Option<String> {
    let rows = task.rows.iter().filter_map(|row| {
        let histogram = Some(&row.result.routing.as_ref()?.k_histogram).filter(|h| !h.is_empty())?;
        let all = histogram.iter().map(|n| *n as f64).sum::<f64>().max(1.0);
        let shares = histogram.iter().map(|n| *n as f64 / all).collect();
        Some(ColumnsRow { name: row.name.clone(), shares, mark: row.mark })
    });
    let rows: Vec<ColumnsRow> = rows.collect();
    (!rows.is_empty()).then(|| {
        let columns = Columns {
            label: format!("{}: how often each number of experts was used, per arm", task.name),
            x_title: "experts used".into(),
            what: "of tokens and layers".into(),
            rows,
        };
        columns.svg()
    })
}

/// Mean k by layer and arm; none where no arm knows.
pub fn layers(task: &TaskView<'_>) -> Option<String> {
    let row = |row: &Row<'_>| Some((row.name.clone(), row.result.routing.as_ref()?.mean_k_l.clone()));
    let rows: Vec<(String, Vec<f64>)> = task.rows.iter().filter_map(row).filter(|r| !r.1.is_empty()).collect();
    (!rows.is_empty()).then(|| {
        let label = format!("{}: mean experts per token by layer and arm", task.name);
        Heatmap { label, x_title: "MoE layer".into(), rows }.svg()
    })
}
