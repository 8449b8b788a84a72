//! What of a schema or grammar is refused before the compiler sees it, since the compiler's own limits do not cover it.

use super::grammar::GrammarError;
use crate::types::GrammarSpec;
use llguidance::JsonCompileOptions;
use llguidance::api::TopLevelGrammar;
use serde_json::{Map, Value};
use std::collections::HashSet;

/// Longest schema or grammar, in bytes.
const GRAMMAR_BYTES_MAX: usize = 64 << 10;
/// Deepest nesting of brackets: the compiler recurses into them.
const NESTING_MAX: usize = 64;
/// The compiler needs a state per remainder.
const MULTIPLE_OF_MAX: f64 = 10_000.0;
/// What all of these must hold of one value takes the compiler the product of their branches: 2 to the power of this.
const COMBINED_BITS_MAX: f64 = 16.0;
/// Optional properties of an object, any of which may come next: the parser's rows hold about 4 times as many items.
const OPTIONAL_MAX: usize = 500;
/// White space allowed between the parts of a JSON text, once each: one space, or a line break and indentation. Models
/// that are free to write any amount may never stop.
const WHITESPACE: &str = r"\x20|\n[\x20\t]{0,40}";

/// Before a JSON schema in a Lark grammar, which goes on to the end of the line.
const LARK_JSON: &str = "%json ";

pub(super) fn source(spec: &GrammarSpec) -> Result<TopLevelGrammar, GrammarError> {
    match spec {
        GrammarSpec::JsonObject => Ok(TopLevelGrammar::from_json_schema(json_schema(r#"{"type": "object"}"#)?)),
        GrammarSpec::JsonSchema(schema) => Ok(TopLevelGrammar::from_json_schema(json_schema(schema)?)),
        GrammarSpec::Lark(grammar) => {
            check_size(grammar)?;
            let (mut depth, mut deepest) = (0usize, 0);
            for byte in grammar.bytes() {
                match byte {
                    b'(' | b'[' | b'{' => depth += 1,
                    b')' | b']' | b'}' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                deepest = deepest.max(depth);
            }
            check_nesting(deepest)?;
            let schemas = grammar.lines().filter_map(|line| line.split_once(LARK_JSON));
            schemas.map(|(_, schema)| schema).try_for_each(|schema| checked(schema).map(drop))?;
            Ok(TopLevelGrammar::from_lark(grammar.to_string()))
        }
    }
}

/// The schema as the compiler takes it, with this server's options in the place of its own.
fn json_schema(text: &str) -> Result<Value, GrammarError> {
    let mut schema = checked(text)?;
    let options = JsonCompileOptions {
        whitespace_pattern: Some(WHITESPACE.into()),
        // A grammar can enforce at-least-one-of, but exactly-one-of only if constants tell the choices apart.
        coerce_one_of: true,
        ..Default::default()
    };
    options.apply_to(&mut schema);
    Ok(schema)
}

/// A schema that the compiler can be given.
fn checked(text: &str) -> Result<Value, GrammarError> {
    check_size(text)?;
    let schema: Value =
        serde_json::from_str(text).map_err(|e| GrammarError::Invalid(format!("it is not valid JSON: {e}")))?;
    check_nesting(depth(&schema))?;
    if !schema.is_object() {
        return Err(GrammarError::Invalid("it is not a JSON object".into()));
    }
    let mut work = Work::default();
    work.add(&schema)?;
    if work.combined && work.bits > COMBINED_BITS_MAX {
        return invalid(
            "it has too many or too complicated patterns (pattern, format, patternProperties, multipleOf) to combine them \
             by allOf, or by $ref, anyOf or oneOf beside other keywords: use fewer or simpler ones, or do not combine",
        );
    }
    Ok(schema)
}

fn invalid<T>(message: impl Into<String>) -> Result<T, GrammarError> {
    Err(GrammarError::Invalid(message.into()))
}

fn check_size(text: &str) -> Result<(), GrammarError> {
    if text.len() > GRAMMAR_BYTES_MAX {
        return invalid(format!("it has {} bytes, but at most {GRAMMAR_BYTES_MAX} are taken: shorten it", text.len()));
    }
    Ok(())
}

fn check_nesting(depth: usize) -> Result<(), GrammarError> {
    if depth > NESTING_MAX {
        return invalid(format!("it is nested {depth} deep, but at most {NESTING_MAX} is taken: flatten it"));
    }
    Ok(())
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// How hard the patterns of a schema would be to intersect, if all were to hold of one value.
#[derive(Default)]
struct Work {
    bits: f64,
    /// Whether any may have to: which ones do only the compiler finds out, when it is too late.
    combined: bool,
}

impl Work {
    fn add(&mut self, value: &Value) -> Result<(), GrammarError> {
        match value {
            Value::Array(items) => items.iter().try_for_each(|item| self.add(item)),
            Value::Object(fields) => {
                self.add_keywords(fields)?;
                fields.values().try_for_each(|field| self.add(field))
            }
            _ => Ok(()),
        }
    }

    fn add_keywords(&mut self, fields: &Map<String, Value>) -> Result<(), GrammarError> {
        let has = |keywords: &[&str]| keywords.iter().filter(|keyword| fields.contains_key(**keyword)).count();
        let applied = has(&["$ref", "anyOf", "oneOf"]);
        let beside =
            ["pattern", "format", "multipleOf", "properties", "patternProperties", "additionalProperties", "items"];
        self.combined |= has(&["allOf"]) > 0 || applied > 1 || (applied == 1 && has(&beside) > 0);
        if let Some(pattern) = fields.get("pattern").and_then(Value::as_str) {
            self.bits += branch_bits(pattern);
        }
        if let Some(patterns) = fields.get("patternProperties").and_then(Value::as_object) {
            self.combined |= patterns.len() > 1;
            self.bits += patterns.keys().map(|pattern| branch_bits(pattern)).sum::<f64>();
        }
        let required: HashSet<&str> =
            fields.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        let properties = fields.get("properties").and_then(Value::as_object).into_iter().flat_map(Map::keys);
        let optional = properties.filter(|name| !required.contains(name.as_str())).count();
        if optional > OPTIONAL_MAX {
            return invalid(format!(
                "an object has {optional} optional properties, but at most {OPTIONAL_MAX} are taken"
            ));
        }
        if fields.get("format").is_some_and(Value::is_string) {
            self.bits += 4.0;
        }
        if let Some(step) = fields.get("multipleOf").and_then(Value::as_f64) {
            // 0.25 takes as many states as 25.
            let scale = (0..20).find(|digits| (step * 10f64.powi(*digits)).fract() == 0.0).unwrap_or(20);
            let whole = (step * 10f64.powi(scale)).abs();
            if whole > MULTIPLE_OF_MAX {
                return invalid(format!("multipleOf is {step}, but has at most the digits of {MULTIPLE_OF_MAX}"));
            }
            self.bits += whole.max(1.0).log2();
        }
        Ok(())
    }
}

/// Base-2 logarithm of how many ways a pattern may go on at a time, about: one more at each choice and repetition.
fn branch_bits(pattern: &str) -> f64 {
    (2.0 + pattern.bytes().filter(|byte| b"|*+?{".contains(byte)).count() as f64).log2()
}
