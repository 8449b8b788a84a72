//! Chat templates against what Hugging Face transformers makes of them, and against what no template should do.

use crate::support::repo;
use moe_serve::chat::{ChatError, ChatTemplate, ChatTemplates, Specials, TemplateInput, ToolFormat};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::path::Path;

fn golden(name: &str) -> Map<String, Value> {
    let text = std::fs::read_to_string(repo("tests/golden/chat").join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn render(template: &ChatTemplate, case: &Value) -> Result<String, ChatError> {
    let flag = |name: &str| case[name].as_bool().unwrap_or(false);
    template.render(&TemplateInput {
        messages: case["messages"].as_array().unwrap(),
        tools: case.get("tools"),
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
        kwargs: case["kwargs"].as_object().cloned().unwrap_or_default(),
    })
}

/// The template in a .jinja file, or in the field of a .json one.
fn template(path: &Path, specials: &Value) -> ChatTemplate {
    let text = std::fs::read_to_string(path).unwrap();
    let mut config = specials.clone();
    let jinja = match path.extension().is_some_and(|e| e == "json") {
        true => {
            config["chat_template"] = serde_json::from_str::<Value>(&text).unwrap()["chat_template"].take();
            None
        }
        false => Some(text.as_str()),
    };
    let templates = ChatTemplates::load(Some(&config.to_string()), jinja).unwrap().unwrap();
    ChatTemplate::new(templates.choose(false).source(), Specials::of(specials)).unwrap()
}

/// Renders every conversation with the templates of a golden file; gives how many prompts were compared.
fn check(file: &str, folder: &Path) -> usize {
    let conversations = golden("conversations.json");
    let mut wrong = Vec::new();
    let mut checked = 0;
    for (name, expected) in golden(file) {
        let template = template(&folder.join(&name), &expected["specials"]);
        for (case, want) in expected["prompts"].as_object().unwrap() {
            let got = render(&template, &conversations[case]);
            let same = match (&got, want) {
                (Ok(prompt), Value::String(want)) => prompt == want,
                (Err(ChatError::Raised(message)), Value::Object(want)) => want["raised"] == **message,
                (Err(_), Value::Object(want)) => want.contains_key("error"),
                _ => false,
            };
            if !same {
                wrong.push(format!("{name}, {case}:\n  got  {got:?}\n  want {want:?}"));
            }
            checked += 1;
        }
    }
    assert!(wrong.is_empty(), "{} of {checked} differ:\n{}", wrong.len(), wrong.join("\n"));
    checked
}

#[test]
fn own_templates_render_as_in_transformers() {
    assert!(check("own.json", &repo("tests/golden/chat")) > 300);
}

#[test]
fn templates_of_models_render_as_in_transformers() {
    let beside = || repo("../shared");
    let shared = std::env::var_os("MOE_SHARED_DIR").map_or_else(beside, Into::into).join("data/tokenizers");
    if !shared.is_dir() {
        eprintln!("SKIPPED: ../shared/data/tokenizers is not here");
        return;
    }
    assert!(check("shared.json", &shared) > 400);
}

#[test]
fn what_a_template_takes_is_found_out() {
    for (name, format, parts) in [
        ("chatml.jinja", Some(ToolFormat::Hermes), true),
        ("inst.jinja", Some(ToolFormat::Mistral), false),
        ("bare.jinja", Some(ToolFormat::Json), false),
        ("roles.jinja", None, false),
    ] {
        let template =
            template(&repo("tests/golden/chat").join(name), &json!({"bos_token": "<s>", "eos_token": "</s>"}));
        assert_eq!((ToolFormat::detect(template.source()), template.takes_parts()), (format, parts), "{name}");
    }
}

fn try_render(source: &str) -> Result<String, ChatError> {
    let template = ChatTemplate::new(source, Specials::default())?;
    render(&template, &json!({"messages": [{"role": "user", "content": "hi"}]}))
}

#[test]
fn every_limit_is_an_error_that_names_it() {
    for (source, text) in [
        ("{% for i in range(100000) %}{% for j in range(100000) %}{{ j }}{% endfor %}{% endfor %}", "2000000 steps"),
        ("{% for i in range(10000) %}{{ 'long' * 1000 }}{% endfor %}", "longer than 8388608 bytes"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "more than 200 scopes"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "more than 200 scopes"),
        (&"x".repeat(300_000), "has 300000 bytes; at most 262144"),
        (&format!("\n\n{{{{ {}1 }}}}", "not ".repeat(1500)), "in line 3: a tag has more than 4096 characters"),
        (&"\n{% if true %}".repeat(10_000), "in line 151: template exceeds maximum recursion limits"),
        (&format!("{{{{ {}1{} }}}}", "[".repeat(1000), "]".repeat(1000)), "maximum recursion limits"),
        ("a\n{{ b", "error in line 2: unexpected end of input"),
        ("\n\n{% nope %}", "error in line 3: unknown statement nope"),
        ("{% set x = [] %}\n{{ 'a' + messages }}", "tried to use + operator on unsupported types string and sequence"),
    ] {
        let error = try_render(source).unwrap_err().to_string();
        assert!(error.contains(text), "{}…: {error}", &source[..source.len().min(60)]);
    }
}

#[test]
fn what_is_long_but_within_the_limits_is_compiled() {
    let elifs = format!("{{% if a %}}{}{{% endif %}}ok", "{%elif a%}".repeat(26_000));
    assert_eq!(try_render(&elifs).as_deref(), Ok("ok"));
    assert_eq!(try_render(&format!("{{{{ {}x or 'ok' }}}}", "x or ".repeat(800))).as_deref(), Ok("ok"));
}

#[test]
fn errors_of_requests_are_told_apart() {
    let raised = ChatError::Raised("no: \"hi\"".into());
    assert_eq!(
        try_render("{% if true %}{{ raise_exception('no: \"' + messages[0].content + '\"') }}{% endif %}"),
        Err(raised)
    );
    let template = ChatTemplate::new("{{ messages[0].content }}", Specials::default()).unwrap();
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (case, text) in [
        (json!({"messages": []}), "at least one message"),
        (json!({"messages": messages, "kwargs": {"tools": 1}}), "chat_template_kwargs must not set `tools`"),
        (
            json!({"messages": messages, "continue_final_message": true, "add_generation_prompt": true}),
            "cannot both be true",
        ),
        (json!({"messages": [{"role": "user"}], "continue_final_message": true}), "has no text to continue"),
    ] {
        let error = render(&template, &case).unwrap_err().to_string();
        assert!(error.contains(text), "{case}: {error}");
    }
}

#[test]
fn the_date_is_that_of_today() {
    let date = try_render("{{ strftime_now('%d %b %Y|%Y-%m-%d %H:%M:%S|%A, %B') }}").unwrap();
    let (day, rest) = date.split_once('|').unwrap();
    assert!(day.len() == 11 && day[7..].parse::<u32>().unwrap() >= 2025, "{date}");
    assert!(rest.starts_with(&day[7..]) && rest.len() > 28, "{date}");
    assert!(matches!(try_render("{{ strftime_now('%!') }}"), Err(ChatError::Render(_))));
}

/// What templates are made of, good and bad.
const FRAGMENTS: &[&str] = &[
    "{{ ",
    " }}",
    "{% ",
    " %}",
    "{%- ",
    " -%}",
    "for x in ",
    "endfor",
    "if ",
    "endif",
    "else",
    "set y = ",
    "macro m(x)",
    "endmacro",
    "generation",
    "endgeneration",
    "raw",
    "endraw",
    "messages",
    "x",
    "y",
    "m(",
    ")",
    "(",
    "[",
    "]",
    "{",
    "}",
    "::-1",
    "1:",
    ":",
    ",",
    ".content",
    ".items()",
    ".split(",
    "|tojson",
    "|tojson(indent=",
    "|length",
    "|trim",
    "|list",
    "|join(",
    "|dictsort",
    "|sort",
    "|map(attribute=",
    "'a'",
    "\"",
    "'",
    "\\",
    " + ",
    " ~ ",
    " * ",
    " - ",
    " // ",
    " ** ",
    " % ",
    "-",
    " is string",
    " in ",
    " and ",
    " or ",
    "not ",
    "loop.index",
    "namespace(a=1)",
    "none",
    "true",
    "1",
    "0",
    "3.5",
    "9223372036854775807",
    "range(",
    "\n",
    "  ",
    "{# ",
    " #}",
    "é",
    "break",
    "continue",
    "recursive",
    "caller()",
    "call m(1)",
    "endcall",
    "filter upper",
    "endfilter",
    "with",
    "endwith",
    "raise_exception(",
    "strftime_now(",
];

const VALUES: &[&str] = &[
    "messages",
    "messages[0]",
    "'aé b'",
    "''",
    "[]",
    "[1,'a',none]",
    "(1,2)",
    "{'a':1}",
    "none",
    "nope",
    "-3",
    "-1",
    "0",
    "1",
    "9",
    "2.5",
    "1e300",
    "true",
    "9223372036854775807",
    "-9223372036854775807",
];

/// What can be done to a value, with others in place of `@`.
const OPERATIONS: &[&str] = &[
    "[@:]",
    "[:@]",
    "[::@]",
    "[@:@:@]",
    "[@]",
    " + @",
    " - @",
    " * @",
    " / @",
    " % @",
    " ~ @",
    " < @",
    " // @",
    " ** @",
    " in @",
    " == @",
    "|tojson",
    "|string",
    "|trim",
    "|length",
    "|list",
    "|sort",
    "|reverse",
    "|first",
    "|last",
    "|join",
    "|upper",
    "|dictsort",
    "|items",
    "|unique",
    "|sum",
    "|int",
    "|float",
    "|abs",
    "|round",
    "|title",
    "|e",
    "|indent(@)",
    "|tojson(indent=@)",
    "|tojson(separators=@)",
    "|join(@)",
    "|default(@)",
    "|map(attribute=@)|list",
    "|replace(@,@)",
    ".split()",
    ".split(@)",
    ".split(@,@)",
    ".rsplit(@,@)",
    ".rsplit(none,@)",
    ".strip(@)",
    ".partition(@)",
    ".rpartition(@)",
    ".removeprefix(@)",
    ".title()",
    ".splitlines(@)",
    ".copy()",
    ".get(@,@)",
    ".items()",
    ".replace(@,@)",
    ".find(@)",
    ".count(@)",
    ".join(@)",
    ".startswith(@)",
];

proptest! {
    #[test]
    fn no_template_panics_or_goes_beyond_a_limit(
        parts in proptest::collection::vec(proptest::sample::select(FRAGMENTS), 0..30),
    ) {
        if let Ok(prompt) = try_render(&parts.concat()) {
            prop_assert!(prompt.len() <= 8 << 20);
        }
    }

    #[test]
    fn no_operation_on_any_values_panics(
        left in proptest::sample::select(VALUES),
        operation in proptest::sample::select(OPERATIONS),
        right in proptest::collection::vec(proptest::sample::select(VALUES), 3),
    ) {
        let mut expression = left.to_string() + operation;
        for right in right {
            expression = expression.replacen('@', right, 1);
        }
        if let Ok(prompt) = try_render(&format!("{{{{ {expression} }}}}")) {
            prop_assert!(prompt.len() <= 8 << 20, "{}", expression);
        }
    }

    /// Whatever is said, it comes out unchanged, and continuing it ends the prompt with it.
    #[test]
    fn contents_are_not_touched(content in "\\PC{0,40}", space in "[ \n\t]{0,3}") {
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}";
        let template = ChatTemplate::new(source, Specials::default()).unwrap();
        let text = content + &space;
        let mut case = json!({"messages": [{"role": "user", "content": text}]});
        prop_assert_eq!(render(&template, &case).unwrap(), format!("<user>{text}<end>\n"));
        case["continue_final_message"] = true.into();
        prop_assert_eq!(render(&template, &case).unwrap(), format!("<user>{text}"));
    }
}
