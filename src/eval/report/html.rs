//! The report as one HTML page.

use super::charts::{self, Scope};
use super::format;
use super::notes;
use super::tables::{self, Detail};
use super::view::{self, TaskView};
use crate::eval::results::Results;
use crate::plot::escape;
use crate::plot::page::{self, figure, prose, table as rows};

/// Most subtasks that are drawn one by one; the tables have all.
const SUBTASK_CHARTS_MAX: usize = 60;

/// The whole report.
pub fn html(results: &Results) -> String {
    let tasks = view::tasks(results);
    let title = format!("moe-eval: {}", results.model.name);
    let mut body = header(results);
    body += &findings(results);
    body += &contents(&tasks);
    for (i, task) in tasks.iter().enumerate() {
        body += &task_section(i, task);
    }
    if !results.comparisons.is_empty() {
        let table = tables::comparisons(results, Detail::Full, |_| true);
        let caption = |task: &TaskView<'_>| {
            format!(
                "<b>{}: dynamic rules beside static routing at the same mean k</b>, with 95 % intervals; hollow: not significant",
                escape(task.name)
            )
        };
        let drawn = |task: &TaskView<'_>| {
            charts::against_static(task, &results.comparisons).map(|chart| figure(&caption(task), &chart))
        };
        let plots: String = tasks.iter().filter_map(drawn).collect();
        let table = rows(&table, "Comparisons");
        body += &format!("<section id=\"comparisons\"><h2>Comparisons</h2>\n{plots}{table}</section>\n");
    }
    if !results.data.is_empty() {
        let table = rows(&tables::data(results), "Data");
        body += &format!("<section id=\"data\"><h2>Data</h2>\n{table}</section>\n");
    }
    body += &page::notes(&notes::how_to_read(results));
    page::page(&title, &body)
}

fn header(results: &Results) -> String {
    let mut out =
        format!("<header>\n<p class=\"kind\">moe-eval report</p>\n<h1>{}</h1>\n", escape(&results.model.name));
    out += &format!("<pre class=\"command\"><code>$ {}</code></pre>\n", escape(&results.command));
    let facts: Vec<_> = notes::facts(results).into_iter().filter(|(name, _)| *name != "model").collect();
    out + &page::facts(&facts) + "</header>\n"
}

fn findings(results: &Results) -> String {
    if results.findings.is_empty() {
        return String::new();
    }
    let items: String = results.findings.iter().map(|f| format!("<li>{}</li>\n", prose(f))).collect();
    format!("<section id=\"findings\"><h2>Findings</h2>\n<ul>\n{items}</ul>\n</section>\n")
}

/// Links to the tasks, where there are several.
fn contents(tasks: &[TaskView<'_>]) -> String {
    if tasks.len() < 2 {
        return String::new();
    }
    let link = |(i, task): (usize, &TaskView<'_>)| format!("<a href=\"#task-{i}\">{}</a>\n", escape(task.name));
    format!("<nav aria-label=\"Tasks\">\n{}</nav>\n", tasks.iter().enumerate().map(link).collect::<String>())
}

fn task_section(i: usize, task: &TaskView<'_>) -> String {
    let mut out = format!(
        "<section id=\"task-{i}\">\n<h2>{} <span class=\"samples\">{}</span></h2>\n{}",
        escape(task.name),
        task.size(),
        legend(task)
    );
    let scopes = [Scope::Experts, Scope::Forward];
    let up = task.metrics().first().is_none_or(|m| m.higher_is_better);
    let plots: String = scopes
        .into_iter()
        .filter_map(|scope| Some(figure(&pareto_caption(scope, up), &charts::pareto(task, scope)?)))
        .collect();
    if !plots.is_empty() {
        out += &format!("<div class=\"charts\">\n{plots}</div>\n");
    }
    out += &rows(&tables::summary(task, Detail::Full), &format!("Summary of {}", task.name));
    let mut plots: String = task
        .metrics()
        .into_iter()
        .map(|m| figure(&format!("<b>{}</b> with 95 % intervals", escape(&m.name)), &charts::metric_bars(task, m)))
        .collect();
    plots += &charts::layers(task).map(|c| figure("<b>Mean k by layer</b>", &c)).unwrap_or_default();
    plots += &charts::experts_per_token(task)
        .map(|c| {
            figure(
                "<b>Experts per token</b>: how often a token used so many in a layer; each row is scaled to its peak",
                &c,
            )
        })
        .unwrap_or_default();
    out += &format!("<div class=\"charts packed\">\n{plots}</div>\n");
    out += &subtasks(task);
    out += &format!(
        "<details><summary>All counts</summary>\n{}</details>\n",
        rows(&tables::work(task), &format!("Counts of {}", task.name))
    );
    out + "</section>\n"
}

fn pareto_caption(scope: Scope, up: bool) -> String {
    let (name, side) = (scope.name(), if up { "up" } else { "down" });
    format!(
        "<b>Quality against FLOPs, scope {name}</b>. Better is left and {side}. Whiskers are 95 % intervals, dashes mark \
         native; hollow: static controls, drawn a little to the right of where they are."
    )
}

/// Every arm with its mark; a control stands with its router.
fn legend(task: &TaskView<'_>) -> String {
    let mut out = String::from("<ul class=\"legend\">");
    for (i, row) in task.rows.iter().enumerate() {
        let with_router = row.name.strip_prefix("└ ");
        if i > 0 && with_router.is_none() {
            out += "</li>";
        }
        if i == 0 || with_router.is_none() {
            out += "
<li>";
        }
        out += &format!("{}<span>{}</span>", row.mark.svg(), escape(with_router.unwrap_or(&row.name)));
    }
    out + if task.rows.is_empty() {
        "</ul>
"
    } else {
        "</li>
</ul>
"
    }
}

/// Small charts of the subtasks, and their table.
fn subtasks(task: &TaskView<'_>) -> String {
    let names = task.subtasks();
    if names.is_empty() {
        return String::new();
    }
    let mut out = String::new();
    if names.len() <= SUBTASK_CHARTS_MAX {
        let prefix = common_prefix(&names);
        let headline = task.metrics().first().map_or(String::new(), |m| escape(&format::metric_title(m)));
        out += &format!(
            "<h3>Subtasks: {headline}, arms from top to bottom as in the legend</h3>\n<div class=\"small\">\n"
        );
        for (name, samples, chart) in charts::subtask_bars(task) {
            let short = name.get(prefix..).unwrap_or(&name).replace('_', " ");
            let (name, short) = (escape(&name), escape(&short));
            out += &format!(
                "<figure><figcaption title=\"{name}\">{short} <span>n = {samples}</span></figcaption>{chart}</figure>\n"
            );
        }
        out += "</div>\n";
    }
    let table = rows(&tables::subtasks(task), &format!("Subtasks of {}", task.name));
    out + &format!("<details><summary>Table of {} subtasks</summary>\n{table}</details>\n", names.len())
}

/// Length of what all names begin with, up to its last underscore.
fn common_prefix(names: &[&str]) -> usize {
    let Some(first) = names.first().filter(|_| names.len() > 1) else { return 0 };
    let shared = |name: &&str| first.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
    let length = names.iter().map(shared).min().unwrap_or(0);
    first.as_bytes()[..length].iter().rposition(|b| *b == b'_').map_or(0, |at| at + 1)
}
