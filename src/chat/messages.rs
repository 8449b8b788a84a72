//! Messages as OpenAI's clients send them, made into what templates are written for.

use super::template::ChatTemplate;
use serde_json::Value as Json;

/// Three things differ. Content in parts becomes their text, in lines, unless `template` takes parts; missing content
/// becomes empty; and arguments of tool calls, which the API has as JSON in a string, become objects, as templates
/// write them out themselves. What is not of the API's shape is left as it is.
pub fn adapt(messages: &mut [Json], template: &ChatTemplate) {
    for message in messages.iter_mut().filter_map(Json::as_object_mut) {
        let content = message.entry("content").or_insert(Json::Null);
        match content {
            Json::Null => *content = Json::String(String::new()),
            Json::Array(parts) if !template.takes_parts() => {
                let texts: Option<Vec<&str>> = parts.iter().map(|part| part.get("text")?.as_str()).collect();
                if let Some(texts) = texts {
                    *content = Json::String(texts.join("\n"));
                }
            }
            _ => {}
        }
        for call in message.get_mut("tool_calls").and_then(Json::as_array_mut).into_iter().flatten() {
            let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
            let parsed = arguments.as_str().map(serde_json::from_str);
            if let Some(Ok(object @ Json::Object(_))) = parsed {
                *arguments = object;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::load::Specials;
    use super::*;
    use serde_json::json;

    fn adapted(source: &str, message: Json) -> Json {
        let mut messages = [message];
        adapt(&mut messages, &ChatTemplate::new(source, Specials::default()).unwrap());
        messages[0].take()
    }

    #[test]
    fn parts_become_text_where_the_template_does_not_take_them() {
        let message = || json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]});
        let strings = ["{{ messages[0].content }}", "{{ '<' + messages[0].content }}", "no content"];
        for source in strings {
            assert_eq!(adapted(source, message())["content"], "a\nb", "{source}");
        }
        let parts = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}";
        assert_eq!(adapted(parts, message()), message());
        let image = json!({"content": [{"type": "image_url"}]});
        assert_eq!(adapted(strings[0], image.clone()), image);
    }

    #[test]
    fn calls_get_arguments_as_objects_in_their_own_order_and_null_content_becomes_empty() {
        let call =
            |arguments: Json| json!({"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]});
        let mut want = call(json!({"b": 1, "a": 2.0}));
        want["content"] = json!("");
        let got = adapted("", call(json!("{\"b\": 1, \"a\": 2.0}")));
        assert_eq!(got, want);
        assert!(got.to_string().contains(r#"{"b":1,"a":2.0}"#), "{got}");
        for left in [json!("{"), json!("3"), json!({"a": 1})] {
            assert_eq!(adapted("", call(left.clone()))["tool_calls"][0]["function"]["arguments"], left);
        }
    }
}
