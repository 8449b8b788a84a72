//! Rewrites a template's source where jinja2 reads it otherwise than minijinja.

use super::template::ChatError;

/// The method that a slice becomes.
pub(super) const SLICE: &str = "__slice__";

/// Characters a tag may have outside of quotes. Chains of operators become as many levels of syntax tree, on which the
/// compiler recurses, and takes time that grows with their square.
const TAG_CHARS_MAX: usize = 4096;

/// Three differences are ironed out, and lines keep their numbers: line ends become `\n`; the tags `generation` and
/// `endgeneration`, by which transformers finds what the assistant said, become a `with` of nothing; and slices become
/// calls of [`SLICE`]. Those of minijinja 3.0.5 are lazy, so that slices of slices recurse, and go wrong with negative
/// steps: `[:0:-1]` is taken for `[::-1]`, and one through an empty list panics.
///
/// # Errors
/// A tag that is too long, with its line.
pub(super) fn rewrite(source: &str) -> Result<String, ChatError> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    let opens = |rest: &str, at: usize| rest[at + 1..].starts_with(['{', '%', '#']);
    while let Some((at, _)) = rest.match_indices('{').find(|(at, _)| opens(rest, *at)) {
        copy(&mut rest, at, &mut out);
        if rest.starts_with("{#") {
            let length = rest.find("#}").map_or(rest.len(), |end| end + 2);
            copy(&mut rest, length, &mut out);
            continue;
        }
        let start = out.len();
        let Some(length) = tag(rest, &mut out) else {
            let message = format!("a tag has more than {TAG_CHARS_MAX} characters outside of quotes");
            return Err(ChatError::Syntax { line: out[..start].matches('\n').count() + 1, message });
        };
        let inside = rest[..length].strip_prefix("{%").map(|t| t.trim_end_matches("%}"));
        rest = &rest[length..];
        match inside.map(|t| t.trim_matches(['-', '+']).trim()) {
            Some("generation" | "endgeneration") => {
                let tag = out.split_off(start);
                out.push_str(&tag.replacen("generation", "with", 1));
            }
            Some("raw") => {
                let ends = |at: usize| rest[at + 2..].trim_start_matches(['-', '+']).trim_start().starts_with("endraw");
                let end = rest.match_indices("{%").map(|(at, _)| at).find(|at| ends(*at)).unwrap_or(rest.len());
                copy(&mut rest, end, &mut out);
            }
            _ => {}
        }
    }
    Ok(out + rest)
}

fn copy(rest: &mut &str, length: usize, out: &mut String) {
    out.push_str(&rest[..length]);
    *rest = &rest[length..];
}

/// An open bracket within a tag, with where it stands in the output; of square ones, also where colons of theirs stand.
struct Open {
    square: bool,
    at: usize,
    colons: Vec<usize>,
}

/// Writes the tag that `text` begins with and gives its length in `text`, unless it is too long.
fn tag(text: &str, out: &mut String) -> Option<usize> {
    let end = if text.starts_with("{{") { "}}" } else { "%}" };
    let mut open: Vec<Open> = Vec::new();
    let mut chars = text.char_indices().skip(2);
    let mut outside = 0;
    out.push_str(&text[..2]);
    while let Some((at, c)) = chars.next() {
        // As in jinja2, brackets that are open keep `}}` from ending the tag.
        if open.is_empty() && text[at..].starts_with(end) {
            out.push_str(end);
            return Some(at + end.len());
        }
        outside += 1;
        if outside > TAG_CHARS_MAX {
            return None;
        }
        match c {
            '[' | '{' | '(' => open.push(Open { square: c == '[', at: out.len(), colons: Vec::new() }),
            ':' => open.last_mut().into_iter().for_each(|o| o.colons.push(out.len())),
            ']' | '}' | ')' => {
                if let Some(Open { square: true, at, colons }) = open.pop()
                    && let [first, ..] = colons[..]
                {
                    let second = colons.get(1).copied().unwrap_or(out.len());
                    let given = |range: std::ops::Range<usize>| Some(out[range].trim()).filter(|t| !t.is_empty());
                    let parts = [at + 1..first, first + 1..second, (second + 1).min(out.len())..out.len()];
                    let call = parts.map(|r| given(r).unwrap_or("none")).join(", ");
                    out.truncate(at);
                    out.push_str(&format!(".{SLICE}({call})"));
                    continue;
                }
            }
            '\'' | '"' => {
                out.push(c);
                // Up to the closing quote; a backslash takes the character after it along.
                while let Some((_, inner)) = chars.next() {
                    out.push(inner);
                    match inner {
                        '\\' => out.extend(chars.next().map(|(_, escaped)| escaped)),
                        _ if inner == c => break,
                        _ => {}
                    }
                }
                continue;
            }
            _ => {}
        }
        out.push(c);
    }
    Some(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(source: &str) -> String {
        rewrite(source).unwrap()
    }

    #[test]
    fn generation_tags_become_a_scope() {
        assert_eq!(
            rewritten("a{%- generation -%}\r\nb{% endgeneration %}\rc{%generation%}"),
            "a{%- with -%}\nb{% endwith %}\nc{%with%}"
        );
        for same in ["generation {{ generation }} {% set generation = 'endgeneration' %}", "{# {% generation %} #}"] {
            assert_eq!(rewritten(same), same);
        }
    }

    #[test]
    fn slices_become_calls() {
        assert_eq!(rewritten("{{ x[::-1] }}"), "{{ x.__slice__(none, none, -1) }}");
        assert_eq!(rewritten("{{ x[1:]+x[:][:2] }}"), {
            "{{ x.__slice__(1, none, none)+x.__slice__(none, none, none).__slice__(none, 2, none) }}"
        });
        assert_eq!(rewritten("{% for m in a[b[::2][0] : {'k': 1}['k'] :-1][::1] %}"), {
            "{% for m in a.__slice__(b.__slice__(none, none, 2)[0], {'k': 1}['k'], -1).__slice__(none, none, 1) %}"
        });
        for same in [
            "x[::-1] {{ x[1] }} {{ {'a': {'b': 1}}['a'] }} {{ 'q[::-1]' }} {{ \"\\\"[::-1]\" }} {# {{ x[::-1] }} #}",
            "{% raw %}{{ x[::-1] }}{%- endraw %}{{ [1, 2] }}{",
            "{{ x[::-1",
            "{{ ]})(",
            "{% raw %}{{ x[::-1] }}",
            "{{ 'a\\",
        ] {
            assert_eq!(rewritten(same), same);
        }
    }
}
