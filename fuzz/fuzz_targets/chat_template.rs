//! Chat templates: any text compiles or not, and what compiles renders within its limits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_serve::chat::{ChatTemplates, TemplateInput, ToolFormat, ToolStream};
use serde_json::json;

fuzz_target!(|source: &str| {
    let Ok(Some(templates)) = ChatTemplates::load(None, Some(source)) else { return };
    let messages = [
        json!({"role": "system", "content": "s"}),
        json!({"role": "user", "content": source}),
        json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, null]}}}]}),
    ];
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let template = templates.choose(true);
    for add_generation_prompt in [false, true] {
        let input = TemplateInput { messages: &messages, tools: Some(&tools), add_generation_prompt, ..Default::default() };
        let _ = template.render(&input);
    }
    if let Some(format) = ToolFormat::detect(source) {
        let mut stream = ToolStream::new(format, vec!["f".into()]);
        let _ = stream.push(source);
        let _ = stream.finish();
    }
});
