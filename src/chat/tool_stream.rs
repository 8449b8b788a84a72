//! Tool calls in generated text, whole or as it comes.

use super::python::is_space;
use super::tools::ToolFormat;
use serde::Deserialize;
use serde_json::Value as Json;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::ops::ControlFlow;

/// A call as the model wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    pub name: String,
    /// A JSON object, in the model's own words.
    pub arguments: String,
}

/// A piece of streamed text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Text(String),
    /// A whole call, the `index`th of this text.
    Call {
        index: usize,
        call: ToolCall,
    },
}

impl ToolFormat {
    /// Takes a whole text apart, into what is said and what is called; `tools` are the names of the request's tools.
    pub fn parse(self, text: &str, tools: &[String]) -> (String, Vec<ToolCall>) {
        let mut stream = ToolStream::new(self, tools.to_vec());
        let (mut said, mut calls) = (String::new(), Vec::new());
        for piece in stream.push(text).into_iter().chain(stream.finish()) {
            match piece {
                Piece::Text(text) => said.push_str(&text),
                Piece::Call { call, .. } => calls.push(call),
            }
        }
        (said, calls)
    }

    /// Reads calls at the beginning of `text`, right after a marker.
    fn calls(self, text: &str, tools: &[String], json: &mut JsonEnd, end: bool) -> Found {
        let missing = if end { Found::No } else { Found::Pending };
        let body = text.trim_start_matches(is_space);
        let opening = if self == Self::Mistral { '[' } else { '{' };
        if body.is_empty() {
            return missing;
        }
        let Some(length) = body.starts_with(opening).then(|| json.find(body)) else { return Found::No };
        let Some(length) = length else { return missing };
        let (body, rest) = body.split_at(length);
        let calls = match self {
            Self::Mistral => serde_json::from_str::<Vec<Written<'_>>>(body),
            Self::Hermes | Self::Json => serde_json::from_str(body).map(|written| vec![written]),
        };
        let calls: Option<Vec<ToolCall>> =
            calls.ok().and_then(|calls| calls.into_iter().map(Written::into_call).collect());
        let known = |call: &ToolCall| self != Self::Json || tools.contains(&call.name);
        let Some(calls) = calls.filter(|calls| !calls.is_empty() && calls.iter().all(known)) else { return Found::No };
        if self != Self::Hermes {
            return Found::Calls(calls, text.len() - rest.len());
        }
        const CLOSING: &str = "</tool_call>";
        let closing = rest.trim_start_matches(is_space);
        match closing.strip_prefix(CLOSING) {
            Some(rest) => Found::Calls(calls, text.len() - rest.len()),
            // The end of the text closes a call that is whole otherwise.
            None if CLOSING.starts_with(closing) && end => Found::Calls(calls, text.len()),
            None if CLOSING.starts_with(closing) => Found::Pending,
            None => Found::No,
        }
    }
}

/// What stands after a marker.
enum Found {
    /// Calls, in so many bytes.
    Calls(Vec<ToolCall>, usize),
    No,
    /// More text has to tell.
    Pending,
}

/// A call's JSON.
#[derive(Deserialize)]
struct Written<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow, alias = "parameters")]
    arguments: Option<&'a RawValue>,
}

impl Written<'_> {
    /// Arguments are an object, or a string that holds one; none are an empty one.
    fn into_call(self) -> Option<ToolCall> {
        let raw = self.arguments.map_or("{}", RawValue::get);
        let arguments = match serde_json::from_str::<String>(raw) {
            Ok(text) => text,
            Err(_) => raw.to_string(),
        };
        let object = serde_json::from_str::<serde_json::Map<String, Json>>(&arguments).is_ok();
        object.then(|| ToolCall { name: self.name.into_owned(), arguments })
    }
}

/// Finds where a JSON array or object ends, reading no byte of a growing text twice.
#[derive(Default)]
struct JsonEnd {
    end: Option<usize>,
    read: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl JsonEnd {
    fn find(&mut self, text: &str) -> Option<usize> {
        if self.end.is_some() {
            return self.end;
        }
        for byte in &text.as_bytes()[self.read..] {
            self.read += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            if self.depth == 0 {
                self.end = Some(self.read);
                break;
            }
        }
        self.end
    }
}

/// Takes text apart as it comes: what can be no part of a call is released at once, a call when it is whole. White
/// space around calls belongs to them; what turns out not to be a call is text.
pub struct ToolStream {
    format: ToolFormat,
    tools: Vec<String>,
    held: String,
    json: JsonEnd,
    calls: usize,
    /// White space before the last calls.
    gap: String,
    /// A call has just ended: white space that follows belongs to it.
    after_call: bool,
    /// A bare call can only stand at the beginning, or after another.
    may_call: bool,
}

impl ToolStream {
    /// For a text of `format`; `tools` are the names that bare JSON is a call of.
    pub fn new(format: ToolFormat, tools: Vec<String>) -> Self {
        let (held, gap, json) = (String::new(), String::new(), JsonEnd::default());
        Self { format, tools, held, json, calls: 0, gap, after_call: false, may_call: true }
    }

    /// Adds text, and gives what is certain by now.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        self.advance(false)
    }

    /// Everything still held back; the text ends here.
    pub fn finish(&mut self) -> Vec<Piece> {
        self.advance(true)
    }

    fn advance(&mut self, end: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        while self.step(end, &mut pieces).is_continue() {}
        pieces
    }

    fn step(&mut self, end: bool, pieces: &mut Vec<Piece>) -> ControlFlow<()> {
        if self.after_call {
            let spaces = self.held.len() - self.held.trim_start_matches(is_space).len();
            self.held.drain(..spaces);
            self.after_call = self.held.is_empty();
        }
        let (start, body) = match self.opening() {
            Ok(opening) => opening,
            Err(keep) => {
                let length = self.held.len() - if end { 0 } else { keep };
                self.may_call &= length == 0;
                self.release(length, pieces);
                return ControlFlow::Break(());
            }
        };
        match self.format.calls(&self.held[body..], &self.tools, &mut self.json, end) {
            Found::Pending => {
                self.release(start, pieces);
                return ControlFlow::Break(());
            }
            Found::No => {
                self.may_call = false;
                self.release(body, pieces);
            }
            Found::Calls(calls, length) => {
                self.release(start, pieces);
                let call = self.held.drain(..body - start + length);
                if self.gap.is_empty() {
                    self.gap = call.as_str().chars().take_while(|c| is_space(*c)).collect();
                }
                drop(call);
                for call in calls {
                    pieces.push(Piece::Call { index: self.calls, call });
                    self.calls += 1;
                }
                self.after_call = true;
            }
        }
        self.json = JsonEnd::default();
        ControlFlow::Continue(())
    }

    /// Where the first marker, with white space before it, and what is marked begin in the text held; or how many
    /// bytes at its end may become a marker.
    fn opening(&self) -> Result<(usize, usize), usize> {
        let spaces_from = |at: usize| self.held[..at].trim_end_matches(is_space).len();
        let Some(marker) = self.format.marker() else { return self.bare_opening() };
        if let Some(at) = self.held.find(marker) {
            return Ok((spaces_from(at), at + marker.len()));
        }
        let begun = (1..marker.len()).rev().find(|&n| self.held.ends_with(&marker[..n])).unwrap_or(0);
        Err(self.held.len() - spaces_from(self.held.len() - begun))
    }

    /// The same where there is no marker.
    fn bare_opening(&self) -> Result<(usize, usize), usize> {
        const PYTHON_TAG: &str = "<|python_tag|>";
        let mut rest = self.held.trim_start_matches(is_space);
        if self.calls > 0 {
            rest = rest.strip_prefix(';').unwrap_or(rest).trim_start_matches(is_space);
        }
        rest = rest.strip_prefix(PYTHON_TAG).unwrap_or(rest).trim_start_matches(is_space);
        match self.may_call {
            true if rest.starts_with('{') => Ok((0, self.held.len() - rest.len())),
            true if PYTHON_TAG.starts_with(rest) => Err(self.held.len()),
            _ => Err(0),
        }
    }

    /// Gives the first `length` bytes out as text.
    fn release(&mut self, length: usize, pieces: &mut Vec<Piece>) {
        if length == 0 {
            return;
        }
        let text = std::mem::take(&mut self.gap) + &self.held[..length];
        self.held.drain(..length);
        match pieces.last_mut() {
            Some(Piece::Text(before)) => before.push_str(&text),
            _ => pieces.push(Piece::Text(text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names() -> Vec<String> {
        vec!["f".into(), "g".into()]
    }

    fn parse(format: ToolFormat, text: &str) -> (String, Vec<(String, String)>) {
        let (said, calls) = format.parse(text, &names());
        (said, calls.into_iter().map(|call| (call.name, call.arguments)).collect())
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.into(), arguments.into())
    }

    #[test]
    fn calls_are_taken_out_with_their_arguments_as_written() {
        use ToolFormat::{Hermes, Json, Mistral};
        let one = vec![call("f", "{\"b\":1.0,  \"a\": \"é}\"}")];
        let both = vec![one[0].clone(), call("g", "{}")];
        for (format, text, said, calls) in [
            (
                Hermes,
                "Sure.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\":1.0,  \"a\": \"é}\"}}\n</tool_call>",
                "Sure.",
                &one,
            ),
            (
                Hermes,
                "<tool_call>{\"arguments\": {\"b\":1.0,  \"a\": \"é}\"}, \"name\": \"f\"}</tool_call>\n\
                 <tool_call>\n{\"name\": \"g\"}\n</tool_call>\n\nDone",
                "Done",
                &both,
            ),
            (Hermes, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\":1.0,  \"a\": \"é}\"}}\n</tool", "", &one),
            (
                Mistral,
                "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"b\":1.0,  \"a\": \"é}\"}, \"id\": \"x\"}, \
                 {\"name\": \"g\", \"arguments\": null}]",
                "",
                &both,
            ),
            (Mistral, "a [TOOL_CALLS][{\"name\":\"f\",\"arguments\":{\"b\":1.0,  \"a\": \"é}\"}}] b", "a b", &one),
            (
                Json,
                "\n{\"name\": \"f\", \"parameters\": {\"b\":1.0,  \"a\": \"é}\"}}; {\"name\": \"g\", \"parameters\": {}}",
                "",
                &both,
            ),
            (
                Json,
                "<|python_tag|>{\"name\": \"f\", \"arguments\": \"{\\\"b\\\":1.0,  \\\"a\\\": \\\"é}\\\"}\"}",
                "",
                &one,
            ),
        ] {
            assert_eq!(parse(format, text), (said.to_string(), calls.clone()), "{format:?}: {text}");
        }
    }

    #[test]
    fn what_is_no_call_is_text() {
        for (format, texts) in [
            (
                ToolFormat::Hermes,
                &[
                    "<tool_call>\n{\"name\": \"f\", \"arguments\": {}\n</tool_call> ",
                    "<tool_call>f</tool_call>",
                    "a <tool_call>{\"name\": \"f\"} b",
                    "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>",
                    "<tool_call>{\"name\": 3}</tool_call>",
                    " <tool_",
                    " \n",
                ][..],
            ),
            (
                ToolFormat::Mistral,
                &["[TOOL_CALLS]", "[TOOL_CALLS] []x", "[TOOL_CALLS] [{\"name\": \"f\"", " [TOOL_CALL"],
            ),
            (
                ToolFormat::Json,
                &[
                    "{\"name\": \"unknown\", \"parameters\": {}}",
                    "a {\"name\": \"f\", \"parameters\": {}}",
                    "{\"a\": 1}",
                    "{",
                    "<|python_tag|>print(1)",
                ],
            ),
        ] {
            for text in texts {
                assert_eq!(parse(format, text), (text.to_string(), vec![]), "{format:?}");
            }
        }
        let after = "{\"name\": \"f\"}; and {\"name\": \"f\"}";
        assert_eq!(parse(ToolFormat::Json, after), ("; and {\"name\": \"f\"}".into(), vec![call("f", "{}")]));
    }

    #[test]
    fn text_is_released_at_once_and_a_call_when_it_is_whole() {
        let mut stream = ToolStream::new(ToolFormat::Hermes, vec![]);
        let text = |t: &str| vec![Piece::Text(t.into())];
        assert_eq!(stream.push("Hi"), text("Hi"));
        assert_eq!(stream.push(" <to"), vec![]);
        assert_eq!(stream.push("ast>\n"), text(" <toast>"));
        assert_eq!(stream.push("<tool_call>{\"name\": \"f\"}</tool_call"), vec![]);
        let call = ToolCall { name: "f".into(), arguments: "{}".into() };
        assert_eq!(stream.push(">"), vec![Piece::Call { index: 0, call }]);
        assert_eq!(stream.push("  <tool_call>x"), text("\n<tool_call>x"));
        assert_eq!(stream.finish(), vec![]);
    }

    const FRAGMENTS: &[&str] = &[
        "<tool_call>",
        "</tool_call>",
        "\n",
        " ",
        "{\"name\": \"f\", \"arguments\": {\"a\": [\"}\\\"é\"]}}",
        "<",
        "{",
        "}",
        "[TOOL_CALLS]",
        "[",
        "]",
        "{\"name\": \"g\", \"parameters\": {}}",
        "; ",
        "é",
        "text",
        "<|python_tag|>",
        "\"",
        "\\",
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>",
        "[TOOL_CALLS] [{\"name\": \"g\"}]",
    ];

    proptest! {
        /// Fragments of calls in any order, cut anywhere: the stream says and calls what the whole text does, and where
        /// nothing is called, says all of it.
        #[test]
        fn a_stream_in_any_split_is_the_whole(
            parts in proptest::collection::vec(proptest::sample::select(FRAGMENTS), 0..12),
            cuts in proptest::collection::vec(0usize..400, 0..30),
            format in proptest::sample::select(vec![ToolFormat::Hermes, ToolFormat::Mistral, ToolFormat::Json]),
        ) {
            let text = parts.concat();
            let mut stream = ToolStream::new(format, names());
            let mut pieces = Vec::new();
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|at| text.is_char_boundary(*at)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            for pair in cuts.windows(2) {
                pieces.extend(stream.push(&text[pair[0]..pair[1]]));
            }
            pieces.extend(stream.finish());
            let (mut said, mut calls) = (String::new(), Vec::new());
            for piece in pieces {
                match piece {
                    Piece::Text(text) => said.push_str(&text),
                    Piece::Call { index, call } => {
                        prop_assert_eq!(index, calls.len());
                        calls.push(call);
                    }
                }
            }
            let whole = format.parse(&text, &names());
            prop_assert!(!whole.1.is_empty() || whole.0 == text);
            prop_assert_eq!((said, calls), whole);
        }
    }
}
