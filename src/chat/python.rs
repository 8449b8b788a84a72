//! Jinja as transformers has it: Python's way of printing values, its string methods, and the filters that differ.

use super::source::SLICE;
use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};
use std::fmt::Write as _;

/// Levels of lists and objects within each other that are written; JSON bodies are read up to 128.
const DEPTH_MAX: usize = 256;
/// Characters that lines are indented by at most.
const INDENT_MAX: i64 = 1024;

/// Sets an environment up like the one of transformers.
pub(super) fn setup(env: &mut Environment<'static>) {
    env.set_formatter(|out, _, value| {
        let written = match value.as_str() {
            Some(text) => out.write_str(text),
            None => out.write_str(&text(value)?),
        };
        written.map_err(|_| Error::from(ErrorKind::WriteFailure))
    });
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| text(value));
    env.add_filter("trim", |value: &Value, chars: Option<&str>| {
        Ok::<_, Error>(strip(&text(value)?, chars, true, true))
    });
    for name in ["length", "count"] {
        // An undefined value has no length in minijinja, and that of an empty one in jinja2.
        let unknown = |v: &Value| Error::new(ErrorKind::InvalidOperation, format!("{} has no length", v.kind()));
        env.add_filter(name, move |v: &Value| if v.is_undefined() { Ok(0) } else { v.len().ok_or_else(|| unknown(v)) });
    }
    for name in ["e", "escape"] {
        env.add_filter(name, |value: &Value| text(value).map(|t| escape_html(&t)));
    }
    env.add_filter("indent", indent);
    // These make as many lists as they are told, without a limit; prompts have no use for them.
    ["batch", "slice"].iter().for_each(|name| env.remove_filter(name));
    env.add_test("sequence", |v: &Value| v.as_str().is_some() || v.as_object().is_some() && v.len().is_some());
    env.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.to_vec()));
    env.add_function("joiner", minijinja_contrib::globals::joiner);
    env.add_function("strftime_now", |format: &str| {
        let broken = jiff::fmt::strtime::BrokenDownTime::from(&jiff::Zoned::now());
        broken.to_string(format).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))
    });
}

fn escape_html(text: &str) -> String {
    let escaped = |c: char| match c {
        '&' => "&amp;".into(),
        '<' => "&lt;".into(),
        '>' => "&gt;".into(),
        '"' => "&#34;".into(),
        '\'' => "&#39;".into(),
        _ => c.to_string(),
    };
    text.chars().map(escaped).collect()
}

/// How a value is written.
struct Style {
    /// json.dumps or repr.
    json: bool,
    ascii: bool,
    sort: bool,
    /// What a level is indented by; on one line without.
    indent: Option<String>,
    comma: String,
    colon: String,
}

/// `str(value)`; nothing for an undefined value.
fn text(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String | ValueKind::Undefined | ValueKind::Plain => Ok(value.to_string()),
        _ => {
            let (comma, colon) = (", ".into(), ": ".into());
            written(value, &Style { json: false, ascii: false, sort: false, indent: None, comma, colon })
        }
    }
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`, where transformers has ensure_ascii off.
fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ascii, indent, separators, sort] = arguments(names, &args, &kwargs)?;
    let indent =
        Some(indent).filter(|indent| !indent.is_undefined() && !indent.is_none()).map(indentation).transpose()?;
    let comma = if indent.is_some() { "," } else { ", " };
    let mut style = Style {
        json: true,
        ascii: ascii.is_true(),
        sort: sort.is_true(),
        indent,
        comma: comma.into(),
        colon: ": ".into(),
    };
    if separators.is_true() {
        let pair: Vec<Value> = separators.try_iter()?.collect();
        let [comma, colon] = &pair[..] else {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson takes two separators"));
        };
        (style.comma, style.colon) = (comma.to_string(), colon.to_string());
    }
    written(value, &style)
}

/// What lines are indented by: so many spaces, or a text.
fn indentation(width: Value) -> Result<String, Error> {
    match (width.as_str(), width.as_i64()) {
        (Some(text), _) => Ok(text.to_string()),
        (None, Some(n)) if n <= INDENT_MAX => Ok(" ".repeat(n.max(0) as usize)),
        _ => Err(Error::new(ErrorKind::InvalidOperation, format!("indentation must be at most {INDENT_MAX}"))),
    }
}

/// `s | indent(width=4, first=False, blank=False)`
fn indent(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let [width, first, blank] = arguments(["width", "first", "blank"], &args, &kwargs)?;
    let by = if width.is_undefined() { " ".repeat(4) } else { indentation(width)? };
    let text = text(value)? + "\n";
    let mut out = String::new();
    for (i, line) in lines(&text).enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first.is_true() } else { blank.is_true() || !line.0.is_empty() } {
            out.push_str(&by);
        }
        out.push_str(line.0);
    }
    Ok(out)
}

/// Lines as `str.splitlines` has them, without and with their ends.
fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    const ENDS: [char; 10] = ['\n', '\r', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\u{85}', '\u{2028}', '\u{2029}'];
    let mut rest = text;
    std::iter::from_fn(move || {
        let at = rest.find(ENDS).unwrap_or(rest.len());
        let end = match rest[at..].chars().next() {
            Some('\r') if rest[at..].starts_with("\r\n") => at + 2,
            end => at + end.map_or(0, char::len_utf8),
        };
        let line = (!rest.is_empty()).then(|| (&rest[..at], &rest[..end]));
        rest = &rest[end..];
        line
    })
}

/// Arguments of a filter, by position or by name; undefined where not given.
fn arguments<const N: usize>(names: [&str; N], args: &[Value], kwargs: &Kwargs) -> Result<[Value; N], Error> {
    let mut given = [const { Value::UNDEFINED }; N];
    for (at, slot) in given.iter_mut().enumerate() {
        *slot = match args.get(at) {
            Some(value) => value.clone(),
            None => kwargs.get::<Option<Value>>(names[at])?.unwrap_or_default(),
        };
    }
    kwargs.assert_all_used()?;
    match args.get(N) {
        Some(_) => Err(Error::from(ErrorKind::TooManyArguments)),
        None => Ok(given),
    }
}

fn written(value: &Value, style: &Style) -> Result<String, Error> {
    let mut out = String::new();
    write(&mut out, value, style, 0)?;
    Ok(out)
}

fn write(out: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    if depth > DEPTH_MAX {
        let message = format!("a value is nested more than {DEPTH_MAX} levels deep");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    match value.kind() {
        ValueKind::None => out.push_str(if style.json { "null" } else { "None" }),
        ValueKind::Bool if style.json => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if !value.is_integer() => float(out, f64::try_from(value.clone())?, style.json),
        ValueKind::Bool | ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => quote(out, value.as_str().unwrap_or_default(), style),
        ValueKind::Map => {
            let mut pairs = Vec::new();
            for key in value.try_iter()? {
                pairs.push((value.get_item(&key)?, key));
            }
            if style.sort {
                pairs.sort_by(|a, b| a.1.cmp(&b.1));
            }
            let items = pairs.into_iter().map(|(value, key)| (Some(key), value));
            return items_in(out, ('{', '}'), items, style, depth);
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let round = value.is_tuple() && !style.json;
            let brackets = if round { ('(', ')') } else { ('[', ']') };
            items_in(out, brackets, value.try_iter()?.map(|item| (None, item)), style, depth)?;
            if round && value.len() == Some(1) {
                out.insert(out.len() - 1, ',');
            }
        }
        ValueKind::Undefined if !style.json => out.push_str("Undefined"),
        kind if style.json => {
            return Err(Error::new(ErrorKind::BadSerialization, format!("{kind} cannot be written as JSON")));
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

fn items_in(
    out: &mut String,
    brackets: (char, char),
    items: impl Iterator<Item = (Option<Value>, Value)>,
    style: &Style,
    depth: usize,
) -> Result<(), Error> {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    };
    out.push(brackets.0);
    let mut first = true;
    for (key, value) in items {
        if !std::mem::take(&mut first) {
            out.push_str(&style.comma);
        }
        line(out, depth + 1);
        if let Some(key) = key {
            match key.as_str() {
                None if style.json => quote(out, &written(&key, style)?, style),
                _ => write(out, &key, style, depth + 1)?,
            }
            out.push_str(&style.colon);
        }
        write(out, &value, style, depth + 1)?;
    }
    if !first {
        line(out, depth);
    }
    out.push(brackets.1);
    Ok(())
}

/// A float as Python writes it: with an exponent below 1e-4 and from 1e16 on.
fn float(out: &mut String, x: f64, json: bool) {
    let scientific = format!("{x:e}");
    match scientific.split_once('e').and_then(|(digits, e)| Some((digits, e.parse::<i32>().ok()?))) {
        Some((digits, e)) if !(-4..16).contains(&e) => {
            let _ = write!(out, "{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs());
        }
        Some(_) => {
            let _ = write!(out, "{x:?}");
        }
        None => {
            let sign = if x < 0.0 { "-" } else { "" };
            let name = match (x.is_nan(), json) {
                (true, true) => "NaN",
                (true, false) => "nan",
                (false, true) => "Infinity",
                (false, false) => "inf",
            };
            out.push_str(sign);
            out.push_str(name);
        }
    }
}

/// A string in quotes: double ones in JSON; in a repr single ones, unless it holds single ones and no double ones.
fn quote(out: &mut String, text: &str, style: &Style) {
    let quote = if style.json || text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        let code = u32::from(c);
        let _ = match c {
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            '\\' => write!(out, "\\\\"),
            _ if c == quote => write!(out, "\\{c}"),
            '\u{8}' if style.json => write!(out, "\\b"),
            '\u{c}' if style.json => write!(out, "\\f"),
            _ if style.json && (code < 32 || style.ascii && code > 126) => {
                c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"))
            }
            _ if style.json || printable(c) => write!(out, "{c}"),
            _ if code < 0x100 => write!(out, "\\x{code:02x}"),
            _ if code < 0x10000 => write!(out, "\\u{code:04x}"),
            _ => write!(out, "\\U{code:08x}"),
        };
    }
    out.push(quote);
}

/// `str.isprintable`: what Rust escapes in the middle of a string, but for quotes and backslashes.
fn printable(c: char) -> bool {
    c == '"' || c == '\'' || String::from_iter(['a', c]).escape_debug().count() == 2
}

/// White space to Python: Unicode's, and four separators among the control characters.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip(text: &str, chars: Option<&str>, start: bool, end: bool) -> String {
    let cut = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(cut) } else { text };
    (if end { text.trim_end_matches(cut) } else { text }).to_string()
}

/// Methods of strings, lists and objects: Python's where pycompat lacks or differs.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == SLICE {
        return slice(value, args);
    }
    let Some(text) = value.as_str() else {
        return match (value.kind(), name) {
            (ValueKind::Map | ValueKind::Seq, "copy") => from_args::<()>(args).map(|()| value.clone()),
            _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
        };
    };
    let chars = || from_args::<(Option<&str>,)>(args).map(|(chars,)| chars);
    let one = || from_args::<(&str,)>(args).map(|(one,)| one);
    let parts = |parts: [&str; 3]| Value::from(Tuple::from(parts.map(Value::from)));
    Ok(match name {
        "strip" => Value::from(strip(text, chars()?, true, true)),
        "lstrip" => Value::from(strip(text, chars()?, true, false)),
        "rstrip" => Value::from(strip(text, chars()?, false, true)),
        "split" | "rsplit" => split(text, args, name == "rsplit")?,
        "partition" => {
            let by = one()?;
            text.split_once(by).map_or_else(|| parts([text, "", ""]), |(a, b)| parts([a, by, b]))
        }
        "rpartition" => {
            let by = one()?;
            text.rsplit_once(by).map_or_else(|| parts(["", "", text]), |(a, b)| parts([a, by, b]))
        }
        "removeprefix" => Value::from(text.strip_prefix(one()?).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(one()?).unwrap_or(text)),
        "title" => Value::from(title(text)),
        "splitlines" => {
            let keep = from_args::<(Option<bool>,)>(args)?.0.unwrap_or(false);
            lines(text).map(|(line, whole)| Value::from(if keep { whole } else { line })).collect()
        }
        _ => return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    })
}

/// `str.title`: a capital after everything that is no letter.
fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match std::mem::replace(&mut inside, c.is_alphabetic()) {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
    }
    out
}

/// `str.split(sep=None, maxsplit=-1)` and `str.rsplit`.
fn split(text: &str, args: &[Value], right: bool) -> Result<Value, Error> {
    let (sep, max, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
    let sep = match sep {
        Some(sep) => Some(sep),
        None => kwargs.get::<Option<&str>>("sep")?,
    };
    let max = max.map_or_else(|| kwargs.get::<Option<i64>>("maxsplit"), |max| Ok(Some(max)))?;
    kwargs.assert_all_used()?;
    let max = max.and_then(|max| usize::try_from(max).ok()).unwrap_or(usize::MAX);
    let mut pieces: Vec<&str> = Vec::new();
    match (sep, right) {
        (Some(""), _) => return Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        (Some(sep), false) => pieces.extend(text.splitn(max.saturating_add(1), sep)),
        (Some(sep), true) => pieces.extend(text.rsplitn(max.saturating_add(1), sep)),
        (None, _) => {
            let trim =
                |t| if right { str::trim_end_matches(t, is_space) } else { str::trim_start_matches(t, is_space) };
            let mut rest = trim(text);
            while !rest.is_empty() {
                let found = if right { rest.rfind(is_space) } else { rest.find(is_space) };
                let (piece, after) = match found {
                    Some(at) if pieces.len() < max && right => {
                        let end = at + rest[at..].chars().next().map_or(0, char::len_utf8);
                        (&rest[end..], &rest[..at])
                    }
                    Some(at) if pieces.len() < max => rest.split_at(at),
                    _ => (rest, ""),
                };
                pieces.push(piece);
                rest = trim(after);
            }
        }
    }
    if right {
        pieces.reverse();
    }
    Ok(pieces.into_iter().map(Value::from).collect())
}

/// `value[start:stop:step]`
fn slice(value: &Value, args: &[Value]) -> Result<Value, Error> {
    let (start, stop, step): (Option<i64>, Option<i64>, Option<i64>) = from_args(args)?;
    let chars = value.as_str().map(|text| text.chars().map(String::from).map(Value::from).collect());
    let items: Vec<Value> = match (chars, value.kind()) {
        (Some(chars), _) => chars,
        (None, ValueKind::Seq | ValueKind::Iterable) => value.try_iter()?.collect(),
        (None, kind) => return Err(Error::new(ErrorKind::InvalidOperation, format!("{kind} cannot be sliced"))),
    };
    let step = step.unwrap_or(1);
    let last = items.len() as i64;
    if step == 0 {
        return Err(Error::new(ErrorKind::InvalidOperation, "slice step cannot be zero"));
    }
    // Where counting begins and ends, as `slice.indices` has it: -1 stands before the first item.
    let (low, high) = if step > 0 { (0, last) } else { (-1, last - 1) };
    let bound = |at: i64| (if at < 0 { at.saturating_add(last) } else { at }).clamp(low, high);
    let start = start.map_or(if step > 0 { low } else { high }, bound);
    let stop = stop.map_or(if step > 0 { high } else { low }, bound);
    let at = std::iter::successors(Some(start), |at| at.checked_add(step));
    let picked = at.take_while(|&at| if step > 0 { at < stop } else { at > stop }).map(|at| items[at as usize].clone());
    Ok(match (value.as_str(), value.is_tuple()) {
        (Some(_), _) => Value::from(picked.map(|c| c.to_string()).collect::<String>()),
        (None, true) => Value::from(Tuple::from(picked.collect::<Vec<_>>())),
        (None, false) => Value::from(picked.collect::<Vec<_>>()),
    })
}
