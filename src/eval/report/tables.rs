//! The tables of a report.

use super::format::{self, MISSING};
use super::view::{self, TaskView};
use crate::eval::results::{Comparison, Metric, Results, Saved, TaskResult};
use crate::plot::table::{Cell, Column, Kind, Table, name, plain};

/// How much a summary shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Fits a terminal.
    Short,
    /// With intervals and macro averages.
    Full,
}

fn saving(saved: Option<&Saved>) -> Cell {
    let text = saved.map_or(MISSING.into(), format::saving);
    let kind = if text.starts_with('-') { Kind::Cost } else { Kind::Plain };
    Cell { text, kind }
}

/// One row per arm: quality, experts per token, savings, distance from native, time.
pub fn summary(task: &TaskView<'_>, detail: Detail) -> Table {
    let metrics = task.metrics();
    let has_macro = detail == Detail::Full && task.rows.iter().any(|r| r.result.macro_average.is_some());
    let mut table = Table::new(&[("arm", true)]);
    for metric in &metrics {
        table.column(format::metric_title(metric).replace(',', "\n"));
        if detail == Detail::Full {
            table.column("95 %\ninterval");
        }
    }
    if has_macro {
        table.column("macro\naverage");
    }
    for title in
        ["mean k", "expert\nFLOPs\nsaved", "forward\nFLOPs\nsaved", "expert\nbytes\nsaved", "KL\nnats", "time\ns"]
    {
        table.column(title);
    }
    for row in &task.rows {
        let mut cells = vec![name(&row.name)];
        for (i, metric) in metrics.iter().enumerate() {
            let own = row.result.metrics.iter().find(|m| m.name == metric.name);
            let mut text = own.map_or(MISSING.into(), format::metric_value);
            if let Some(own) = own.filter(|m| i == 0 && detail == Detail::Short && m.stderr.is_none()) {
                text += &format!(" {}", format::metric_interval(own));
            }
            cells.push(plain(text));
            if detail == Detail::Full {
                cells.push(plain(own.map_or(MISSING.into(), format::metric_interval)));
            }
        }
        if has_macro {
            let share = row.headline().is_some_and(|m| m.share);
            let average = row.result.macro_average.map(|v| format::in_unit(share, v));
            cells.push(plain(average.unwrap_or(MISSING.into())));
        }
        let routing = row.result.routing.as_ref();
        cells.push(plain(routing.map_or(MISSING.into(), |r| format::fixed(r.mean_k, 2))));
        cells.push(saving(routing.map(|r| &r.expert_flops)));
        cells.push(saving(routing.map(|r| &r.forward_flops)));
        cells.push(saving(row.result.expert_bytes.as_ref()));
        cells.push(plain(row.result.kl.as_ref().map_or(MISSING.into(), |kl| format::short(kl.mean))));
        cells.push(plain(format::seconds(row.result.seconds)));
        table.rows.push(cells);
    }
    table
}

/// One row per arm: what routed, and the counts behind the savings.
pub fn work(task: &TaskView<'_>) -> Table {
    let mut table = Table::new(&[("arm", true), ("what routed", true), ("samples", false), ("tokens", false)]);
    let pairs = ["expert FLOPs\nran / native", "forward FLOPs\nran / native", "expert bytes\nran / native"];
    for title in pairs.into_iter().chain(["KL, nats\n95 % interval", "KL\npositions"]) {
        table.column(title);
    }
    let pair = |saved: Option<&Saved>| {
        let text =
            saved.map(|s| format!("{} / {}", format::scaled(s.ran).trim_end(), format::scaled(s.native).trim_end()));
        plain(text.unwrap_or(MISSING.into()))
    };
    for row in &task.rows {
        let (routing, kl) = (row.result.routing.as_ref(), row.result.kl.as_ref());
        let interval = kl.map(|kl| format!("[{}, {}]", format::short(kl.low), format::short(kl.high)));
        table.rows.push(vec![
            name(&row.name),
            name(if row.result.routers.is_empty() { MISSING.into() } else { row.result.routers.join(", ") }),
            plain(format::count(row.result.samples as u64)),
            plain(routing.map_or(MISSING.into(), |r| format::count(r.tokens))),
            pair(routing.map(|r| &r.expert_flops)),
            pair(routing.map(|r| &r.forward_flops)),
            pair(row.result.expert_bytes.as_ref()),
            plain(interval.unwrap_or(MISSING.into())),
            plain(kl.map_or(MISSING.into(), |kl| format::count(kl.positions))),
        ]);
    }
    table
}

/// One row per group and subtask: the headline metric of every arm.
pub fn subtasks(task: &TaskView<'_>) -> Table {
    let mut table = Table::new(&[("subtask", true), ("group", true), ("samples", false)]);
    task.rows.iter().for_each(|row| table.column(&row.arm.label));
    for subtask in task.groups().into_iter().chain(task.subtasks()) {
        let own = |i: usize| {
            let TaskResult { groups, subtasks, .. } = task.rows[i].result;
            groups.iter().chain(subtasks).find(|s| s.name == subtask)
        };
        let first = (0..task.rows.len()).find_map(own);
        let group = first.and_then(|s| s.group.clone());
        let samples = first.map_or(0, |s| s.samples);
        let mut cells = vec![name(subtask), name(group.unwrap_or(MISSING.into())), plain(samples.to_string())];
        for i in 0..task.rows.len() {
            let metric = own(i).and_then(|s| s.metrics.first());
            cells.push(plain(metric.map_or(MISSING.into(), format::metric_value)));
        }
        table.rows.push(cells);
    }
    table
}

/// Comparisons that `keep` keeps, by task.
pub fn comparisons(results: &Results, detail: Detail, keep: impl Fn(&Comparison) -> bool) -> Table {
    let mut table = Table::new(&[("task", true)]);
    if detail == Detail::Full {
        table.columns.push(Column { title: "metric".into(), left: true });
    }
    table.columns.extend(["arm", "against"].map(|title| Column { title: title.into(), left: true }));
    table.column("difference");
    table.column("95 % interval");
    table.columns.push(Column { title: "verdict".into(), left: true });
    table.column("p (Holm)");
    if detail == Detail::Full {
        table.column("p");
        table.column("right in only\narm / against");
    }
    let mut kept: Vec<&Comparison> = results.comparisons.iter().filter(|c| keep(c)).collect();
    let tasks = view::tasks(results);
    kept.sort_by_key(|c| tasks.iter().position(|t| t.name == c.task));
    for comparison in kept {
        let metric = view::metric_of(results, comparison);
        let share = metric.is_some_and(|m| m.share);
        let mut cells = vec![name(&comparison.task)];
        if detail == Detail::Full {
            cells.push(name(&comparison.metric));
        }
        cells.push(name(&comparison.arm));
        cells.push(match view::is_control(results, comparison) {
            true => plain("its static control"),
            false => name(&comparison.against),
        });
        cells.push(plain(format::difference(comparison, share)));
        cells.push(plain(format::difference_interval(comparison, share)));
        cells.push(verdict(comparison, metric));
        cells.push(plain(format::p_value(comparison.p_holm)));
        if detail == Detail::Full {
            cells.push(plain(format::p_value(comparison.p)));
            let only = comparison.only_arm.zip(comparison.only_against);
            let only = only.map(|(arm, against)| format!("{} / {}", format::count(arm), format::count(against)));
            cells.push(plain(only.unwrap_or(MISSING.into())));
        }
        table.rows.push(cells);
    }
    table
}

fn verdict(comparison: &Comparison, metric: Option<&Metric>) -> Cell {
    let up = metric.is_none_or(|m| m.higher_is_better);
    match (comparison.significant, (comparison.difference > 0.0) == up) {
        (false, _) => plain("not significant"),
        (true, true) => Cell { text: "better".into(), kind: Kind::Better },
        (true, false) => Cell { text: "worse".into(), kind: Kind::Worse },
    }
}

/// The splits that were read.
pub fn data(results: &Results) -> Table {
    let mut table = Table::new(&[("split", true), ("rows", false), ("SHA-256 of the rows", true), ("verified", true)]);
    for data in &results.data {
        let verified = match data.verified {
            Some(true) => Cell { text: "yes".into(), kind: Kind::Better },
            Some(false) => Cell { text: "no: other rows than the published".into(), kind: Kind::Worse },
            None => plain(MISSING),
        };
        table.rows.push(vec![name(&data.name), plain(format::count(data.rows as u64)), name(&data.sha256), verified]);
    }
    table
}
