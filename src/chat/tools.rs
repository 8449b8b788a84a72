//! The formats of tool calls that chat templates teach, and grammars that demand a call.

use serde_json::Value as Json;

/// How a model writes a tool call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>`, once per call: Hermes, Qwen.
    Hermes,
    /// `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`: Mistral.
    Mistral,
    /// `{"name": …, "parameters": {…}}` and nothing before it: Llama 3.1.
    Json,
}

/// Why no grammar can be made of a request's tools.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ToolError {
    #[error("tools[{0}] must be an object with `type` \"function\" and a `function` that has a `name`")]
    Malformed(usize),
    #[error("tool_choice names the function `{0}`, which is not among tools; name one that is")]
    Unknown(String),
    #[error("tool_choice asks for a tool call, but there are no tools; give some, or leave tool_choice out")]
    Empty,
}

/// The names of a request's tools.
///
/// # Errors
/// A tool that is not of OpenAI's form.
pub fn tool_names(tools: &[Json]) -> Result<Vec<String>, ToolError> {
    let name = |tool: &Json| tool["function"]["name"].as_str().map(str::to_string);
    tools.iter().enumerate().map(|(i, tool)| name(tool).ok_or(ToolError::Malformed(i))).collect()
}

impl ToolFormat {
    /// The format that a template shows to the model; none for one without tools, or with a format not known here.
    pub fn detect(source: &str) -> Option<Self> {
        // Quotes are escaped where the template has them in a string.
        let source = source.replace('\\', "");
        let has = |text: &str| source.contains(text);
        // The newer formats of Qwen3-Coder, GLM and Mistral share a marker with these, and hold something else.
        if has("<tool_call>") && has("\"arguments\"") && !has("<function=") && !has("<arg_key>") {
            Some(Self::Hermes)
        } else if has("[TOOL_CALLS]") && !has("[ARGS]") && !has("[CALL_ID]") {
            Some(Self::Mistral)
        } else if has("tools") && has("{\"name\": ") && has("\"parameters\": ") {
            Some(Self::Json)
        } else {
            None
        }
    }

    /// What a call begins with. Where it is a special token of the tokenizer, decoding must not skip it.
    pub fn marker(self) -> Option<&'static str> {
        match self {
            Self::Hermes => Some("<tool_call>"),
            Self::Mistral => Some("[TOOL_CALLS]"),
            Self::Json => None,
        }
    }

    /// A Lark grammar for llguidance that text obeys which is one call, or with `parallel` one or more: of the function
    /// `named`, or of any of `tools`. `marker` is the id of the format's marker where that is a special token.
    ///
    /// # Errors
    /// Tools that are malformed or missing.
    pub fn grammar(
        self,
        tools: &[Json],
        named: Option<&str>,
        parallel: bool,
        marker: Option<u32>,
    ) -> Result<String, ToolError> {
        let names = tool_names(tools)?;
        let wanted = |name: &String| named.is_none_or(|n| n == name);
        let chosen: Vec<_> = names.iter().zip(tools).filter(|(name, _)| wanted(name)).collect();
        if chosen.is_empty() {
            return Err(named.map_or(ToolError::Empty, |n| ToolError::Unknown(n.to_string())));
        }
        let marker = marker.map(|id| format!("<[{id}]>"));
        let (before, between, after) = match self {
            Self::Hermes => {
                let open = marker.map_or("\"<tool_call>\\n\"".into(), |m| format!("{m} \"\\n\""));
                (open.clone(), format!("\"\\n</tool_call>\\n\" {open}"), "\"\\n</tool_call>\"")
            }
            Self::Mistral => {
                (marker.map_or("\"[TOOL_CALLS] [\"".into(), |m| format!("{m} \" [\"")), "\", \"".into(), "\"]\"")
            }
            Self::Json => (String::new(), "\"; \"".into(), ""),
        };
        let more = if parallel && named.is_none() { format!("({between} call)*") } else { String::new() };
        let rules: Vec<String> = (0..chosen.len()).map(|i| format!("tool_{i}")).collect();
        let mut grammar = format!("start: {before} call {more} {after}\ncall: {}\n", rules.join(" | "));
        for (rule, (name, tool)) in rules.iter().zip(chosen) {
            grammar.push_str(&format!("{rule}: %json {}\n", self.schema(name, &tool["function"]["parameters"])));
        }
        Ok(grammar)
    }

    /// The JSON schema of a call, with the spaces of Python's json.dumps, in which models see calls written.
    fn schema(self, name: &str, parameters: &Json) -> Json {
        let key = if self == Self::Json { "parameters" } else { "arguments" };
        let mut parameters = match parameters {
            Json::Null => serde_json::json!({"type": "object", "properties": {}, "additionalProperties": false}),
            given => given.clone(),
        };
        let spaces = serde_json::json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
        let mut schema = serde_json::json!({
            "x-guidance": spaces, "type": "object", "properties": {"name": {"const": name}},
            "required": ["name", key], "additionalProperties": false,
        });
        // References are resolved from the root, which is no longer that of the parameters.
        move_references(&mut parameters, &format!("#/properties/{key}"));
        schema["properties"][key] = parameters;
        schema
    }
}

/// Lets references to the root `#` mean what is at `root`.
fn move_references(schema: &mut Json, root: &str) {
    match schema {
        Json::Array(items) => items.iter_mut().for_each(|item| move_references(item, root)),
        Json::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Json::String(target) if key == "$ref" && target.starts_with('#') => {
                        *target = format!("{root}{}", &target[1..]);
                    }
                    other => move_references(other, root),
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llguidance::api::TopLevelGrammar;
    use llguidance::toktrie::ApproximateTokEnv;
    use llguidance::{Matcher, ParserFactory};
    use serde_json::json;

    #[test]
    fn formats_are_told_by_what_templates_show() {
        for (source, format) in [
            (r#"{{- "<tool_call>\n{\"name\": <function-name>, \"arguments\": <args>}" }}"#, Some(ToolFormat::Hermes)),
            (r#"'<tool_call>\n{"name": "' ... '", "arguments": '"#, Some(ToolFormat::Hermes)),
            (r#"<tool_call>\n<function=example>\n<parameter=a> "arguments""#, None),
            (r#"<tool_call>{function-name}<arg_key> "arguments""#, None),
            (r#"{{- "[TOOL_CALLS] [" }}"#, Some(ToolFormat::Mistral)),
            (r#"[TOOL_CALLS]name[ARGS]{}"#, None),
            (r#"tools ... {"name": function name, "parameters": dictionary}"#, Some(ToolFormat::Json)),
            ("{{ messages[0].content }}", None),
        ] {
            assert_eq!(ToolFormat::detect(source), format, "{source}");
        }
    }

    fn tools() -> Vec<Json> {
        let place = json!({
            "$defs": {"place": {"type": "string"}}, "type": "object", "required": ["city"],
            "properties": {"city": {"$ref": "#/$defs/place"}, "days": {"type": "integer"}},
            "additionalProperties": false,
        });
        vec![
            json!({"type": "function", "function": {"name": "weather", "parameters": place}}),
            json!({"type": "function", "function": {"name": "now"}}),
        ]
    }

    /// How much of `text` the grammar takes, and whether it can end there.
    fn taken(grammar: String, text: &str) -> (usize, bool) {
        let factory = ParserFactory::new_simple(&ApproximateTokEnv::single_byte_env()).unwrap();
        let mut matcher = Matcher::new(factory.create_parser(TopLevelGrammar::from_lark(grammar)));
        let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
        let taken = matcher.try_consume_tokens(&tokens).unwrap();
        (taken, matcher.is_accepting().unwrap())
    }

    #[test]
    fn grammars_take_calls_that_are_read_back_and_nothing_else() {
        let weather = |key: &str| format!("{{\"name\": \"weather\", \"{key}\": {{\"city\": \"Ulm\", \"days\": 2}}}}");
        let now = |key: &str| format!("{{\"name\": \"now\", \"{key}\": {{}}}}");
        let (args, params) = ("arguments", "parameters");
        for (format, one, two) in [
            (
                ToolFormat::Hermes,
                format!("<tool_call>\n{}\n</tool_call>", weather(args)),
                format!("<tool_call>\n{}\n</tool_call>\n<tool_call>\n{}\n</tool_call>", weather(args), now(args)),
            ),
            (
                ToolFormat::Mistral,
                format!("[TOOL_CALLS] [{}]", weather(args)),
                format!("[TOOL_CALLS] [{}, {}]", weather(args), now(args)),
            ),
            (ToolFormat::Json, weather(params), format!("{}; {}", weather(params), now(params))),
        ] {
            let grammar = |named, parallel| format.grammar(&tools(), named, parallel, None).unwrap();
            let names = tool_names(&tools()).unwrap();
            for (text, calls) in [(&one, 1), (&two, 2)] {
                assert_eq!(taken(grammar(None, true), text), (text.len(), true), "{format:?}: {text}");
                assert_eq!(format.parse(text, &names).1.len(), calls, "{text}");
            }
            assert_eq!(taken(grammar(Some("weather"), true), &one), (one.len(), true));
            for (named, parallel, text) in [
                (None, false, &two),
                (Some("weather"), true, &two),
                (Some("now"), true, &one),
                (None, true, &one.replace("2", "\"2\"")),
                (None, true, &one.replace("weather", "whether")),
                (None, true, &one.replace("city", "town")),
                (None, true, &"It is sunny.".to_string()),
            ] {
                assert!(taken(grammar(named, parallel), text).0 < text.len(), "{format:?}, {named:?}: {text}");
            }
        }
    }

    #[test]
    fn a_marker_that_is_a_special_token_stands_in_the_grammar_by_its_id() {
        let grammar = ToolFormat::Mistral.grammar(&tools(), None, true, Some(5)).unwrap();
        assert!(grammar.starts_with("start: <[5]> \" [\" call (\", \" call)* \"]\"\n"), "{grammar}");
        assert_eq!(taken(grammar, "[TOOL_CALLS]").0, 0);
    }

    #[test]
    fn tools_that_are_missing_or_malformed_are_errors() {
        let error = |tools: &[Json], named| ToolFormat::Hermes.grammar(tools, named, true, None).unwrap_err();
        assert_eq!(error(&[], None), ToolError::Empty);
        assert_eq!(error(&tools(), Some("x")), ToolError::Unknown("x".into()));
        assert_eq!(error(&[tools()[0].clone(), json!({"name": "f"})], None), ToolError::Malformed(1));
    }
}
