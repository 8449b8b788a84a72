//! A model's templates, out of the files that come with its tokenizer.

use super::template::{ChatError, ChatTemplate};
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// Special tokens by the names that templates know them by, such as `bos_token`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Specials(BTreeMap<String, String>);

/// The names that transformers hands to templates.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl Specials {
    /// Of a tokenizer_config.json: a token is a string there, or an object with its text as `content`.
    pub fn of(config: &Json) -> Self {
        let token = |name: &str| match config.get(name)? {
            Json::Object(token) => token.get("content")?.as_str().map(str::to_string),
            token => token.as_str().map(str::to_string),
        };
        Self(NAMES.iter().filter_map(|name| Some((name.to_string(), token(name)?))).collect())
    }

    /// Names and texts of those that there are.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, token)| (name.as_str(), token.as_str()))
    }
}

/// The template of a model, and the one for requests with tools if it has one of its own for them.
#[derive(Debug)]
pub struct ChatTemplates {
    default: ChatTemplate,
    tool_use: Option<ChatTemplate>,
}

impl ChatTemplates {
    /// Reads `tokenizer_config.json`, where `chat_template` is a text or a list of `{name, template}`; the text of a
    /// `chat_template.jinja` takes its place. Without a template there is none.
    ///
    /// # Errors
    /// A file that is no JSON, a list that has no template named `default`, or a template that is wrong.
    pub fn load(config: Option<&str>, jinja: Option<&str>) -> Result<Option<Self>, ChatError> {
        let config: Json = serde_json::from_str(config.unwrap_or("null"))
            .map_err(|e| ChatError::Config(format!("tokenizer_config.json: {e}")))?;
        let specials = Specials::of(&config);
        let compile = |source: &str| ChatTemplate::new(source, specials.clone());
        let field = config.get("chat_template").unwrap_or(&Json::Null);
        let (default, tool_use) = match (jinja, field) {
            (Some(source), _) => (source, None),
            (None, Json::Null) => return Ok(None),
            (None, Json::String(source)) => (source.as_str(), None),
            (None, list) => {
                let named = |name: &str| {
                    let entry = list.as_array()?.iter().find(|entry| entry["name"] == name)?;
                    entry.get("template")?.as_str()
                };
                let text = "tokenizer_config.json: chat_template must be a text or hold a template named `default`";
                (named("default").ok_or_else(|| ChatError::Config(text.into()))?, named("tool_use"))
            }
        };
        Ok(Some(Self { default: compile(default)?, tool_use: tool_use.map(compile).transpose()? }))
    }

    /// The template for a request with tools, or without.
    pub fn choose(&self, tools: bool) -> &ChatTemplate {
        self.tool_use.as_ref().filter(|_| tools).unwrap_or(&self.default)
    }
}

#[cfg(test)]
mod tests {
    use super::super::template::TemplateInput;
    use super::*;
    use serde_json::json;

    /// What the template of `config` and `jinja` makes of a message, with tools and without.
    fn rendered(config: Json, jinja: Option<&str>) -> [String; 2] {
        let templates = ChatTemplates::load(Some(&config.to_string()), jinja).unwrap().unwrap();
        let messages = [json!({"role": "user", "content": "hi"})];
        let input = TemplateInput { messages: &messages, ..Default::default() };
        [true, false].map(|tools| templates.choose(tools).render(&input).unwrap())
    }

    #[test]
    fn every_form_of_the_configuration_is_read() {
        let tokens = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null});
        let with = |template: Json| {
            let mut config = tokens.clone();
            config["chat_template"] = template;
            config
        };
        let source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token is defined }}";
        assert_eq!(rendered(with(json!(source)), None), ["<s>hi</s>False", "<s>hi</s>False"]);
        let list =
            json!([{"name": "tool_use", "template": "T{{ bos_token }}"}, {"name": "default", "template": source}]);
        assert_eq!(rendered(with(list.clone()), None), ["T<s>", "<s>hi</s>False"]);
        assert_eq!(rendered(with(list), Some("J{{ eos_token }}")), ["J</s>", "J</s>"]);
        assert_eq!(rendered(tokens.clone(), Some("J")), ["J", "J"]);
        assert!(ChatTemplates::load(Some(&tokens.to_string()), None).unwrap().is_none());
        assert!(ChatTemplates::load(None, None).unwrap().is_none());
    }

    #[test]
    fn a_configuration_that_is_wrong_is_an_error_that_tells() {
        for (config, text) in [
            ("{", "tokenizer_config.json: EOF"),
            (r#"{"chat_template": 3}"#, "named `default`"),
            (r#"{"chat_template": [{"name": "tool_use", "template": ""}]}"#, "named `default`"),
            (r#"{"chat_template": "a\n{% if %}"}"#, "error in line 2"),
        ] {
            let error = ChatTemplates::load(Some(config), None).unwrap_err().to_string();
            assert!(error.contains(text), "{config}: {error}");
        }
    }
}
