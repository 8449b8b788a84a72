//! Results by task: which arms ran it, and how each arm is drawn and named wherever it appears.

use super::format;
use crate::eval::results::{Arm, Comparison, Metric, Results, Role, SubtaskResult, TaskResult};
use crate::plot::{Mark, Shape};

/// One task with the arms that ran it.
pub struct TaskView<'a> {
    pub name: &'a str,
    pub rows: Vec<Row<'a>>,
}

/// One arm on the task.
pub struct Row<'a> {
    pub arm: &'a Arm,
    pub result: &'a TaskResult,
    /// Short where the row before tells the rest.
    pub name: String,
    pub mark: Mark,
}

impl Row<'_> {
    /// The metric that decides.
    pub fn headline(&self) -> Option<&Metric> {
        self.result.metrics.first()
    }
}

impl TaskView<'_> {
    /// Names of all metrics, headline first.
    pub fn metrics(&self) -> Vec<&Metric> {
        let mut found: Vec<&Metric> = Vec::new();
        for metric in self.rows.iter().flat_map(|r| &r.result.metrics) {
            if !found.iter().any(|m| m.name == metric.name) {
                found.push(metric);
            }
        }
        found
    }

    /// Names of all subtasks, in order.
    pub fn subtasks(&self) -> Vec<&str> {
        names(self.rows.iter().flat_map(|r| &r.result.subtasks))
    }

    /// Names of all groups of subtasks, in order.
    pub fn groups(&self) -> Vec<&str> {
        names(self.rows.iter().flat_map(|r| &r.result.groups))
    }

    /// Greatest number of samples that an arm had: `4,110 samples`, of text `16 windows`.
    pub fn size(&self) -> String {
        let samples = self.rows.iter().map(|r| r.result.samples).max().unwrap_or(0);
        let of_text = self.rows.iter().any(|r| r.result.metrics.first().is_some_and(|m| m.name == "perplexity"));
        format!("{} {}", format::count(samples as u64), if of_text { "windows" } else { "samples" })
    }
}

fn names<'a>(results: impl Iterator<Item = &'a SubtaskResult>) -> Vec<&'a str> {
    let mut found: Vec<&str> = Vec::new();
    for result in results {
        if !found.contains(&result.name.as_str()) {
            found.push(&result.name);
        }
    }
    found
}

/// All tasks, in the order in which arms name them.
pub fn tasks(results: &Results) -> Vec<TaskView<'_>> {
    let mut tasks: Vec<TaskView<'_>> = Vec::new();
    for arm in &results.arms {
        for result in &arm.tasks {
            let at = tasks.iter().position(|t| t.name == result.task).unwrap_or_else(|| {
                tasks.push(TaskView { name: &result.task, rows: Vec::new() });
                tasks.len() - 1
            });
            let name = match (&arm.role, tasks[at].rows.last()) {
                (Role::Control { of }, Some(before)) if before.arm.label == *of => "└ static control".into(),
                _ => arm.label.clone(),
            };
            tasks[at].rows.push(Row { arm, result, name, mark: mark(results, arm) });
        }
    }
    tasks
}

/// A router has a colour and a shape of its own; its control has the same, hollow.
pub fn mark(results: &Results, arm: &Arm) -> Mark {
    let routers = results.arms.iter().filter(|a| a.role == Role::Router);
    let index = |label: &str| routers.clone().position(|a| a.label == label);
    match &arm.role {
        Role::Native => Mark { series: None, shape: Shape::Diamond, filled: true },
        Role::Router => Mark::of(index(&arm.label).unwrap_or(0)),
        Role::Control { of } => Mark { filled: false, ..Mark::of(index(of).unwrap_or(0)) },
    }
}

/// The metric that a comparison is about.
pub fn metric_of<'a>(results: &'a Results, comparison: &Comparison) -> Option<&'a Metric> {
    let tasks = results.arms.iter().flat_map(|a| &a.tasks).filter(|t| t.task == comparison.task);
    tasks.flat_map(|t| &t.metrics).find(|m| m.name == comparison.metric)
}

/// Whether it compares a router with native or with its own control, by the headline metric.
pub fn matters(results: &Results, comparison: &Comparison) -> bool {
    let tasks = results.arms.iter().flat_map(|a| &a.tasks).filter(|t| t.task == comparison.task);
    let headline = tasks.filter_map(|t| t.metrics.first()).any(|m| m.name == comparison.metric);
    let native = role(results, &comparison.against) == Some(&Role::Native);
    headline && role(results, &comparison.arm) == Some(&Role::Router) && (native || is_control(results, comparison))
}

/// Whether `against` is the control of `arm`.
pub fn is_control(results: &Results, comparison: &Comparison) -> bool {
    matches!(role(results, &comparison.against), Some(Role::Control { of }) if *of == comparison.arm)
}

fn role<'a>(results: &'a Results, label: &str) -> Option<&'a Role> {
    results.arms.iter().find(|a| a.label == label).map(|a| &a.role)
}
