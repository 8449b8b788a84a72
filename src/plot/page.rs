//! A report as one HTML page that needs nothing else: no script, no font, no image from elsewhere.

use super::escape;
use super::format::code_spans;
use super::table::{Cell, Kind, Table};

/// The page; `body` is HTML.
pub fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<title>{}</title>\n\
         <style>\n{}{}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(title),
        super::STYLE,
        include_str!("page.css"),
    )
}

/// Names and values, several in a row; long ones take more room.
pub fn facts<N: AsRef<str>>(facts: &[(N, String)]) -> String {
    let mut out = String::from("<dl class=\"facts\">\n");
    for (name, value) in facts {
        let class = if value.chars().count() > 40 { " class=\"wide\"" } else { "" };
        out += &format!("<div{class}><dt>{}</dt><dd>{}</dd></div>\n", escape(name.as_ref()), escape(value));
    }
    out + "</dl>\n"
}

/// How to read the figures: term and explanation.
pub fn notes<T: AsRef<str>>(notes: &[(&str, T)]) -> String {
    let mut out = String::from("<section id=\"reading\"><h2>How to read this</h2>\n<dl class=\"notes\">\n");
    for (term, explanation) in notes {
        out += &format!("<dt>{}</dt><dd>{}</dd>\n", escape(term), prose(explanation.as_ref()));
    }
    out + "</dl>\n</section>\n"
}

/// `caption` and `content` are HTML.
pub fn figure(caption: &str, content: &str) -> String {
    format!("<figure><figcaption>{caption}</figcaption>\n{content}</figure>\n")
}

/// The table, in a frame that scrolls; `label` names it to those who cannot see it.
pub fn table(table: &Table, label: &str) -> String {
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
pub fn prose(text: &str) -> String {
    let part = |(is_code, part): (bool, &str)| {
        let part = escape(part);
        if is_code { format!("<code>{part}</code>") } else { part }
    };
    code_spans(text).into_iter().map(part).collect()
}

/// Text whose lines stay lines, for `<pre>`.
pub fn lines(text: &str) -> String {
    let line = |line: &str| escape(&line.replace('\t', "    "));
    text.trim_end_matches(['\n', '\r']).lines().map(line).collect::<Vec<String>>().join("\n")
}
