//! The report as one HTML page that needs nothing else: no script, no font, no image from elsewhere.

use super::charts::{self, Scope};
use super::format::{self, code_spans};
use super::notes;
use super::svg::{self, escape};
use super::tables::{self, Cell, Detail, Kind, Table};
use super::view::{self, TaskView};
use crate::eval::results::Results;

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
        body +=
            &format!("<section id=\"comparisons\"><h2>Comparisons</h2>\n{}</section>\n", rows(&table, "Comparisons"));
    }
    if !results.data.is_empty() {
        let table = rows(&tables::data(results), "Data");
        body += &format!("<section id=\"data\"><h2>Data</h2>\n{table}</section>\n");
    }
    body += &how_to_read(results);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<title>{}</title>\n\
         <style>\n{}{}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(&title),
        svg::STYLE,
        include_str!("style.css"),
    )
}

fn header(results: &Results) -> String {
    let mut out =
        format!("<header>\n<p class=\"kind\">moe-eval report</p>\n<h1>{}</h1>\n", escape(&results.model.name));
    out += &format!("<pre class=\"command\"><code>$ {}</code></pre>\n<dl class=\"facts\">\n", escape(&results.command));
    for (name, value) in notes::facts(results).into_iter().filter(|(name, _)| *name != "model") {
        let class = if value.chars().count() > 40 { " class=\"wide\"" } else { "" };
        out += &format!("<div{class}><dt>{}</dt><dd>{}</dd></div>\n", escape(name), escape(&value));
    }
    out + "</dl>\n</header>\n"
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

fn how_to_read(results: &Results) -> String {
    let mut out = String::from("<section id=\"reading\"><h2>How to read this</h2>\n<dl class=\"notes\">\n");
    for (term, explanation) in notes::how_to_read(results) {
        out += &format!("<dt>{}</dt><dd>{}</dd>\n", escape(term), prose(&explanation));
    }
    out + "</dl>\n</section>\n"
}

/// `caption` is HTML.
fn figure(caption: &str, chart: &str) -> String {
    format!("<figure><figcaption>{caption}</figcaption>\n{chart}</figure>\n")
}

fn rows(table: &Table, label: &str) -> String {
    let class = |left: bool| if left { " class=\"left\"" } else { "" };
    let mut out = format!(
        "<div class=\"table\" role=\"region\" aria-label=\"{}\" tabindex=\"0\"><table>\n<thead><tr>",
        escape(label)
    );
    for column in &table.columns {
        let title = column.title.split('\n').map(escape).collect::<Vec<String>>().join("<br/>");
        out += &format!("<th scope=\"col\"{}>{title}</th>", class(column.left));
    }
    out += "</tr></thead>\n<tbody>\n";
    for row in &table.rows {
        out += "<tr>";
        for (i, (cell, column)) in row.iter().zip(&table.columns).enumerate() {
            let tag = if i == 0 { "th scope=\"row\"" } else { "td" };
            let end = if i == 0 { "th" } else { "td" };
            out += &format!("<{tag}{}>{}</{end}>", class(column.left), content(cell));
        }
        out += "</tr>\n";
    }
    out + "</tbody></table></div>\n"
}

fn content(cell: &Cell) -> String {
    let text = escape(&cell.text);
    match cell.kind {
        Kind::Plain => text,
        Kind::Name => format!("<span class=\"name\">{text}</span>"),
        Kind::Cost => format!("<span class=\"cost\">{text}</span>"),
        Kind::Better => format!("<b class=\"better\">{text}</b>"),
        Kind::Worse => format!("<b class=\"worse\">{text}</b>"),
    }
}

/// A sentence, in which `code` is code.
fn prose(text: &str) -> String {
    let part = |(is_code, part): (bool, &str)| {
        let part = escape(part);
        if is_code { format!("<code>{part}</code>") } else { part }
    };
    code_spans(text).into_iter().map(part).collect()
}
