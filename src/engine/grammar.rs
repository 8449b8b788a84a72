//! Constrained decoding: which tokens may come next if the completion is to be JSON, or fit a schema or a grammar.

use super::lock;
use super::schema;
use super::vocab::TokenBytes;
use crate::types::{GrammarSpec, TokenId};
use llguidance::api::ParserLimits;
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, panic_utils};
use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// How long one compilation may take.
const COMPILE_TIME_MAX: Duration = Duration::from_secs(5);
/// How many compilations run at a time, those that took too long included until they end.
const COMPILES_MAX: usize = 2;
/// Enough for the longest chain of references that fits a schema, each of which recurses. Pages not used cost nothing.
const COMPILE_STACK_BYTES: usize = 256 << 20;
/// Compiled grammars kept.
const CACHED_MAX: usize = 64;
/// Bytes of their specifications together. Compiled, a hostile one takes up to 200 times as much.
const CACHED_BYTES_MAX: usize = 512 << 10;
/// Longer tokens (runs of spaces) are never used: the trie of tokens has a greatest depth.
const TOKEN_BYTES_MAX: usize = 512;
/// Longest message about an invalid schema or grammar, which may quote it.
const MESSAGE_CHARS_MAX: usize = 400;

/// Compiling: a fifth of the default. Decoding, per token: about 5 ms at worst where common schemas take 0.1 ms.
const LIMITS: ParserLimits = ParserLimits {
    initial_lexer_fuel: 200_000,
    max_grammar_size: 100_000,
    step_lexer_fuel: 40_000,
    step_max_items: 20_000,
    max_items_in_row: 2_000,
    max_lexer_states: 20_000,
    precompute_large_lexemes: true,
    verbose_errors: false,
};

/// Why a completion cannot be constrained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The schema or grammar is wrong, not supported, or too large.
    #[error("{0}")]
    Invalid(String),
    /// Other compilations take too long, or there is no thread to be had.
    #[error("{COMPILES_MAX} other schemas or grammars are being compiled: try again later")]
    Busy,
    /// No token can follow, or finding out takes too long.
    #[error("the completion cannot go on within its schema or grammar: {0}")]
    Stuck(String),
}

/// Compiles grammars for one vocabulary.
pub struct Grammars {
    tokens: Arc<TokenBytes>,
    eos: Vec<TokenId>,
    /// Made by the first request that needs it: it takes time and memory.
    factory: OnceLock<Result<Arc<ParserFactory>, GrammarError>>,
    /// The latest used last.
    compiled: Mutex<VecDeque<(GrammarSpec, Grammar)>>,
    compiling: Arc<Compiling>,
}

#[derive(Default)]
struct Compiling {
    count: Mutex<usize>,
    ended: Condvar,
}

/// One of the places for compilations; free again when dropped.
struct Place(Arc<Compiling>);

impl Place {
    fn take(compiling: &Arc<Compiling>) -> Result<Self, GrammarError> {
        let full = |count: &mut usize| *count >= COMPILES_MAX;
        let waited = compiling.ended.wait_timeout_while(lock(&compiling.count), COMPILE_TIME_MAX, full);
        let (mut count, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return Err(GrammarError::Busy);
        }
        *count += 1;
        Ok(Self(compiling.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *lock(&self.0.count) -= 1;
        self.0.ended.notify_one();
    }
}

impl Grammars {
    /// For a vocabulary of `tokens`, of which `eos` may end a completion that is complete.
    pub fn new(tokens: Arc<TokenBytes>, eos: &[TokenId]) -> Self {
        let eos = eos.iter().copied().filter(|id| (*id as usize) < tokens.count()).collect();
        Self { tokens, eos, factory: OnceLock::new(), compiled: Mutex::default(), compiling: Arc::default() }
    }

    /// A grammar at its beginning. Takes up to some seconds, so not for the engine's thread.
    ///
    /// # Errors
    /// A specification that is invalid, unsupported or takes too much time or memory; too many compilations at once.
    pub fn compile(&self, spec: &GrammarSpec) -> Result<Grammar, GrammarError> {
        if let Some(grammar) = self.cached(spec) {
            return Ok(grammar);
        }
        let source = schema::source(spec)?;
        let factory = self.factory.get_or_init(|| factory(&self.tokens, &self.eos).map(Arc::new)).clone()?;
        let place = Place::take(&self.compiling)?;
        // Perhaps while waiting for the place another request brought the same.
        if let Some(grammar) = self.cached(spec) {
            return Ok(grammar);
        }
        let (sender, receiver) = channel();
        let compile = move || {
            let mut matcher = Matcher::new(factory.create_parser(source));
            // Finds grammars that no text matches; if there is an error, the matcher keeps it.
            let _ = matcher.compute_mask();
            // Nobody listens any more if this took too long.
            let _ = sender.send(matcher);
            drop(place);
        };
        let thread = std::thread::Builder::new().name("grammar".into()).stack_size(COMPILE_STACK_BYTES).spawn(compile);
        thread.map_err(|_| GrammarError::Busy)?;
        let matcher = receiver.recv_timeout(COMPILE_TIME_MAX).map_err(|e| match e {
            RecvTimeoutError::Timeout => {
                let seconds = COMPILE_TIME_MAX.as_secs();
                GrammarError::Invalid(format!("compiling it takes more than {seconds} seconds: simplify it"))
            }
            RecvTimeoutError::Disconnected => GrammarError::Invalid("the compiler failed".into()),
        })?;
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError::Invalid(plain(&error)));
        }
        let grammar = Grammar { matcher };
        let mut compiled = lock(&self.compiled);
        compiled.push_back((spec.clone(), grammar.clone()));
        let bytes = |compiled: &VecDeque<(GrammarSpec, Grammar)>| compiled.iter().map(|c| size(&c.0)).sum::<usize>();
        while compiled.len() > CACHED_MAX || bytes(&compiled) > CACHED_BYTES_MAX {
            compiled.pop_front();
        }
        Ok(grammar)
    }

    fn cached(&self, spec: &GrammarSpec) -> Option<Grammar> {
        let mut compiled = lock(&self.compiled);
        let at = compiled.iter().position(|(key, _)| key == spec)?;
        let entry = compiled.remove(at)?;
        let grammar = entry.1.clone();
        compiled.push_back(entry);
        Some(grammar)
    }
}

/// Where one completion stands in its grammar.
pub struct Grammar {
    matcher: Matcher,
}

impl Clone for Grammar {
    /// Shares nothing, so that one request's failure or memory is no other's.
    fn clone(&self) -> Self {
        Self { matcher: self.matcher.deep_clone() }
    }
}

impl Grammar {
    /// Sets the logits of tokens that may not come next to negative infinity. End-of-sequence tokens may where the
    /// text is complete, and only there.
    ///
    /// # Errors
    /// [`GrammarError::Stuck`].
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), GrammarError> {
        let allowed = self.matcher.compute_mask().map_err(stuck)?;
        let known = allowed.len().min(logits.len());
        let (logits, unknown) = logits.split_at_mut(known);
        unknown.fill(f32::NEG_INFINITY);
        for (logits, word) in logits.chunks_mut(32).zip(allowed.as_slice()) {
            if *word == 0 {
                logits.fill(f32::NEG_INFINITY);
            } else if *word != u32::MAX {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
        Ok(())
    }

    /// Goes on by a token. Gives true when the text is complete and nothing can follow, or `id` ended it.
    ///
    /// # Errors
    /// [`GrammarError::Stuck`], also for a token that the mask forbids.
    pub fn accept(&mut self, id: TokenId) -> Result<bool, GrammarError> {
        self.matcher.consume_token(id).map_err(stuck)?;
        Ok(self.matcher.is_stopped())
    }
}

fn factory(tokens: &TokenBytes, eos: &[TokenId]) -> Result<ParserFactory, GrammarError> {
    let build = AssertUnwindSafe(|| {
        let word = |id: TokenId| {
            let bytes = tokens.bytes(id);
            let special = tokens.is_special(id) || eos.contains(&id);
            if bytes.len() > TOKEN_BYTES_MAX {
                Vec::new()
            } else if special {
                // No text has this byte, so that a special token's name is not taken for text.
                [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
            } else {
                bytes.to_vec()
            }
        };
        let words: Vec<Vec<u8>> = (0..tokens.count() as TokenId).map(word).collect();
        let info = TokRxInfo::new(words.len() as u32, eos.first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &words);
        if !eos.is_empty() {
            trie = trie.with_eos_tokens(eos);
        }
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env)?;
        factory.quiet();
        *factory.limits_mut() = LIMITS;
        Ok(factory)
    });
    panic_utils::catch_unwind(build).map_err(|e| GrammarError::Invalid(plain(&e)))
}

/// Bytes of a specification.
fn size(spec: &GrammarSpec) -> usize {
    match spec {
        GrammarSpec::JsonObject => 0,
        GrammarSpec::JsonSchema(text) | GrammarSpec::Lark(text) => text.len(),
    }
}

fn stuck(error: impl ToString) -> GrammarError {
    GrammarError::Stuck(plain(&error))
}

/// The compiler's message without what it adds for its own developers.
fn plain(error: &impl ToString) -> String {
    let error = error.to_string();
    let message = error.split("\n<").next().unwrap_or_default();
    if message.starts_with("panic:") {
        return "the compiler fails on it: simplify it".into();
    }
    let message = message
        .replace("Unimplemented keys:", "keywords that are not supported:")
        .replace(
            "Only absolute $ref's (#/...) are supported without 'referencing' feature; ref",
            "only a $ref that begins with #/ is supported, not",
        )
        .replace("NoExtensionBias", "no token fits");
    message.chars().take(MESSAGE_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;
    use std::time::Instant;
    use tokenizers::Tokenizer;

    const VOCAB: usize = 4096;
    const EOS: [TokenId; 2] = [0, 4095];

    fn grammars() -> &'static Grammars {
        static GRAMMARS: OnceLock<Grammars> = OnceLock::new();
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/stories/tokenizer.json");
        let tokens = || Arc::new(TokenBytes::new(&Tokenizer::from_file(path).unwrap(), VOCAB));
        GRAMMARS.get_or_init(|| Grammars::new(tokens(), &EOS))
    }

    fn schema(schema: &str) -> Result<Grammar, GrammarError> {
        grammars().compile(&GrammarSpec::JsonSchema(schema.into()))
    }

    fn lark(grammar: &str) -> Grammar {
        grammars().compile(&GrammarSpec::Lark(grammar.into())).unwrap()
    }

    /// What a model writes that likes tokens of these bytes best, and after 300 tokens those that close something.
    fn complete(mut grammar: Grammar, seed: u64, likes: &[u8]) -> String {
        let (mut rng, mut text) = (seed, Vec::new());
        for step in 0..2000 {
            let likes = if step < 300 { likes } else { b"\"]}0" };
            let mut logits: Vec<f32> = (0..VOCAB as TokenId + 50)
                .map(|id| {
                    rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let bytes = grammars().tokens.bytes(id);
                    let liked = !bytes.is_empty() && bytes.iter().all(|byte| likes.contains(byte));
                    (rng >> 40) as f32 + if liked { 1e9 } else { 0.0 }
                })
                .collect();
            grammar.mask(&mut logits).unwrap();
            assert!(logits[VOCAB..].iter().all(|logit| *logit == f32::NEG_INFINITY), "an id without a token");
            let best = (0..VOCAB).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as TokenId;
            assert!(logits[best as usize].is_finite());
            if !EOS.contains(&best) {
                text.extend(grammars().tokens.bytes(best));
            }
            if grammar.accept(best).unwrap() {
                return String::from_utf8(text).unwrap();
            }
        }
        panic!("no end: {}", String::from_utf8_lossy(&text));
    }

    fn keys(value: &Value) -> Vec<&str> {
        value.as_object().unwrap().keys().map(String::as_str).collect()
    }

    #[test]
    fn completions_of_any_model_fit_the_schema() {
        type Fits = fn(&Value) -> bool;
        let cases: [(&str, Fits); 8] = [
            (r#"{"type": "object"}"#, Value::is_object),
            (
                r#"{"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {"type": "boolean"}},
                    "required": ["b"], "additionalProperties": false}, "c": {"type": "string"}},
                    "required": ["a", "c"], "additionalProperties": false}"#,
                |v| keys(v) == ["a", "c"] && keys(&v["a"]) == ["b"] && v["a"]["b"].is_boolean() && v["c"].is_string(),
            ),
            (r#"{"enum": ["red \"ish", 7, null, [1, {"a": 2}]]}"#, |v| {
                [r#""red \"ish""#, "7", "null", r#"[1,{"a":2}]"#].contains(&v.to_string().as_str())
            }),
            (
                r#"{"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 120}, "minItems": 2, "maxItems": 4}"#,
                |v| {
                    let items = v.as_array().unwrap();
                    (2..=4).contains(&items.len()) && items.iter().all(|i| (-3..=120).contains(&i.as_i64().unwrap()))
                },
            ),
            (r#"{"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}"#, |v| {
                let (letters, digits) = v.as_str().unwrap().split_once('-').unwrap();
                letters.len() == 2 && digits.len() == 3 && digits.bytes().all(|b| b.is_ascii_digit())
            }),
            (r#"{"type": "string", "minLength": 2, "maxLength": 5}"#, |v| {
                (2..=5).contains(&v.as_str().unwrap().chars().count())
            }),
            (
                r##"{"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2, "minItems": 1,
                    "$defs": {"point": {"type": "array", "prefixItems": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}],
                        "items": false, "minItems": 1}}}"##,
                |v| {
                    v.as_array()
                        .unwrap()
                        .iter()
                        .all(|p| (1e-300..=1.0).contains(&p[0].as_f64().unwrap()) && p[1].is_null())
                },
            ),
            (
                r#"{"anyOf": [{"type": "null"}, {"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"], "additionalProperties": false}]}"#,
                |v| ["null", r#"{"n":1}"#].contains(&v.to_string().as_str()),
            ),
        ];
        for (text, fits) in cases {
            for (seed, likes) in [(1, &b""[..]), (2, b""), (3, b""), (4, b" \n\t"), (5, b"\""), (6, b"[{\"\\")] {
                let completion = complete(schema(text).unwrap(), seed, likes);
                let value: Value = serde_json::from_str(&completion).unwrap_or_else(|e| panic!("{e}: {completion}"));
                assert!(fits(&value), "{completion} does not fit {text}");
            }
        }
        let object = complete(grammars().compile(&GrammarSpec::JsonObject).unwrap(), 7, b"{\"");
        assert!(serde_json::from_str::<Value>(&object).unwrap().is_object(), "{object}");
        let call = "start: \"<call>\" body \"</call>\"\nbody: %json {\"type\": \"null\"}".to_string();
        assert_eq!(complete(lark(&call), 8, b" "), "<call>null</call>");
    }

    #[test]
    fn a_completion_may_end_only_where_it_is_complete() {
        let mut grammar = lark("start: /a+/");
        let id = |byte: u8| (0..VOCAB as TokenId).find(|id| grammars().tokens.bytes(*id) == [byte]).unwrap();
        let mut logits = vec![0.0; VOCAB];
        grammar.mask(&mut logits).unwrap();
        assert!(EOS.iter().all(|eos| logits[*eos as usize] == f32::NEG_INFINITY) && logits[id(b'a') as usize] == 0.0);
        assert!(!grammar.accept(id(b'a')).unwrap());
        let mut other = grammar.clone();
        logits.fill(0.0);
        grammar.mask(&mut logits).unwrap();
        assert!(EOS.iter().all(|eos| logits[*eos as usize] == 0.0) && logits[id(b'b') as usize] == f32::NEG_INFINITY);
        assert!(grammar.accept(EOS[1]).unwrap());
        // A forbidden token is an error and stays one, but of this completion alone.
        assert!(matches!(other.accept(id(b'b')), Err(GrammarError::Stuck(_))));
        assert!(other.mask(&mut logits).is_err() && other.accept(TokenId::MAX).is_err());
        assert!(!lark("start: /a+/").accept(id(b'a')).unwrap());
        assert!(lark("start: \"a\"").accept(id(b'a')).unwrap(), "nothing can follow");
    }

    #[test]
    fn what_cannot_be_used_is_refused_in_time_and_says_why() {
        let list = |n: usize, item: &dyn Fn(usize) -> String| (0..n).map(item).collect::<Vec<_>>().join(",");
        let optional = list(2000, &|i| format!(r#""p{i}": {{}}"#));
        let patterns = list(30, &|i| format!(r#"{{"type": "string", "pattern": ".*a.{{{i}}}b.*"}}"#));
        let choices = list(10, &|i| format!(r#"{{"properties": {{"p": {{"minimum": {i}}}}}}}"#));
        let product = list(20, &|_| format!(r#"{{"anyOf": [{choices}]}}"#));
        let chain =
            list(1100, &|i| format!(r##""d{i}": {{"properties": {{"a": {{"$ref": "#/$defs/d{}"}}}}}}"##, i + 1));
        let cases = [
            ("nonsense", "not valid JSON"),
            ("[]", "not a JSON object"),
            (r#"{"type": "strin"}"#, "strin"),
            (r#"{"type": "integer", "minimum": 5, "maximum": 4}"#, "minimum (5)"),
            (r#"{"properties": {"a": {"not": {}, "uniqueItems": true}}}"#, r#"not supported: ["not", "uniqueItems"]"#),
            (r#"{"x-guidance": {"lenient": true}, "not": {}}"#, r#"not supported: ["not"]"#),
            (r#"{"$ref": "http://localhost/a"}"#, "begins with #/ is supported, not 'http://localhost/a'"),
            (r##"{"$ref": "#"}"##, "no token fits"),
            (r#"{"pattern": "(?=a)"}"#, "look-ahead"),
            (r#"{"multipleOf": 999983}"#, "multipleOf is 999983"),
            (&" ".repeat(70_000), "70000 bytes, but at most 65536"),
            (&format!("{}1{}", r#"{"a":["#.repeat(33), "]}".repeat(33)), "nested 66 deep, but at most 64"),
            (&format!(r#"{{"properties": {{{optional}}}}}"#), "2000 optional properties, but at most 500"),
            (&format!(r#"{{"allOf": [{patterns}]}}"#), "too complicated patterns"),
            (&format!(r#"{{"allOf": [{product}]}}"#), "too large"),
            (&format!(r##"{{"$ref": "#/$defs/d0", "$defs": {{{chain}}}}}"##), "d1100"),
        ];
        for (text, why) in cases {
            let start = Instant::now();
            let error = schema(text).err().unwrap_or_else(|| panic!("compiled: {text:.99}")).to_string();
            assert!(error.contains(why) && error.chars().count() <= MESSAGE_CHARS_MAX, "{error} for {text:.99}");
            assert!(start.elapsed() < COMPILE_TIME_MAX, "{:?} for {text:.99}", start.elapsed());
        }
        let nested = GrammarSpec::Lark(format!("start: {}", "(".repeat(9000)).into());
        assert!(grammars().compile(&nested).err().unwrap().to_string().contains("nested 9000 deep"));
    }

    #[test]
    fn no_more_are_kept_than_the_limit() {
        for n in 0..CACHED_MAX + 9 {
            lark(&format!("start: \"{n}\""));
        }
        assert!(lock(&grammars().compiled).len() <= CACHED_MAX);
        let padding = " ".repeat(60_000);
        for n in 0..10 {
            schema(&format!(r#"{{"const": {n}}}{padding}"#)).unwrap();
        }
        assert!(lock(&grammars().compiled).iter().map(|c| size(&c.0)).sum::<usize>() <= CACHED_BYTES_MAX);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn no_schema_panics(text in "(\\PC|[\\[\\]{}\":,0-9]){0,80}", key in "[$a-zA-Z]{0,12}|\\$ref|enum|items|type|pattern|required|format") {
            let quoted = serde_json::to_string(&text).unwrap();
            for value in [&text, &quoted, &format!("[{quoted}]"), &format!("{{{quoted}: {{}}}}"), "-1", "1e999", "[{}]"] {
                let _ = schema(&format!(r#"{{"{key}": {value}}}"#));
            }
            let _ = grammars().compile(&GrammarSpec::Lark(format!("start: {text}").into()));
        }
    }
}
