//! The kinds of requests a soak mixes: what each sends and what it must get.

use crate::client::{Client, Failure};
use serde_json::{Value, json};

/// Numbers that are random enough, and the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    pub fn below(&mut self, n: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }

    pub fn percent(&mut self, share: usize) -> bool {
        self.below(100) < share
    }
}

/// The prompts of `eval/prompts.jsonl`.
pub fn prompts() -> Vec<String> {
    let lines = include_str!("../../eval/prompts.jsonl").lines().filter(|l| !l.is_empty());
    let prompt = |line: &str| {
        let value: Value = serde_json::from_str(line).expect("the repository's prompts are JSON");
        value["prompt"].as_str().expect("every line has a prompt").to_string()
    };
    lines.map(prompt).collect()
}

/// Something that not every server or start of a server has; a request that needs it is a 400 there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    Choices,
    BestOf,
    Logprobs,
    PromptLogprobs,
    Echo,
    LogitBias,
    CacheSalt,
    JsonSchema,
    Router,
    Trace,
    Chat,
}

impl Feature {
    const ALL: [Self; 11] = [
        Self::Choices,
        Self::BestOf,
        Self::Logprobs,
        Self::PromptLogprobs,
        Self::Echo,
        Self::LogitBias,
        Self::CacheSalt,
        Self::JsonSchema,
        Self::Router,
        Self::Trace,
        Self::Chat,
    ];

    /// The fields that ask for it.
    fn fields(self) -> Value {
        let schema = json!({"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}},
            "required": ["name"], "additionalProperties": false});
        match self {
            Self::Choices => json!({"n": 3, "temperature": 0.9}),
            Self::BestOf => json!({"n": 1, "best_of": 3, "temperature": 0.9, "stream": false}),
            Self::Logprobs => json!({"logprobs": 2}),
            Self::PromptLogprobs => json!({"prompt_logprobs": 1, "stream": false}),
            Self::Echo => json!({"echo": true}),
            Self::LogitBias => json!({"logit_bias": {"13": -100, "11": 2.5}}),
            Self::CacheSalt => json!({"cache_salt": "someone"}),
            Self::JsonSchema => json!({"response_format": {"type": "json_schema",
                "json_schema": {"name": "named", "schema": schema, "strict": true}}, "ignore_eos": false}),
            Self::Router => json!({"router": "topk:1"}),
            Self::Trace => json!({"moe_trace": true}),
            Self::Chat => json!({}),
        }
    }

    /// Those the server has: each is asked for once.
    ///
    /// # Errors
    /// An answer that is neither good nor a 400 (for chat, a 404).
    pub async fn probe(client: &Client) -> Result<Vec<Self>, Failure> {
        let mut found = Vec::new();
        for feature in Self::ALL {
            let mut body = json!({"prompt": "One day", "max_tokens": 4});
            if feature == Self::Chat {
                body = json!({"messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 4});
            }
            join(&mut body, feature.fields());
            match client.whole(feature.path(), &body).await {
                Ok(_) => found.push(feature),
                Err(Failure::Status { status: 400, .. }) => {}
                Err(Failure::Status { status: 404, .. }) if feature == Self::Chat => {}
                Err(failure) => return Err(failure),
            }
        }
        Ok(found)
    }

    fn path(self) -> &'static str {
        if self == Self::Chat { "/v1/chat/completions" } else { "/v1/completions" }
    }
}

fn join(body: &mut Value, fields: Value) {
    if let Value::Object(fields) = fields {
        fields.into_iter().for_each(|(field, value)| body[field] = value);
    }
}

/// One request, and what must come back.
pub struct Request {
    pub kind: &'static str,
    pub path: &'static str,
    pub body: Value,
    pub stream: bool,
    /// Choices of a good answer.
    pub choices: usize,
    /// What the router makes of every token; `None` where that is not known.
    pub experts_per_token: Option<f64>,
    pub stops: Vec<&'static str>,
}

/// A valid request of a random kind.
pub fn valid(random: &mut Random, prompts: &[String], features: &[Feature]) -> Request {
    let feature = features.get(random.below(features.len() + 4)).copied();
    let stream = random.percent(60);
    let tokens_max = [8, 40, 160][random.below(3)];
    let mut body = json!({"max_tokens": 1 + random.below(tokens_max), "stream": stream});
    if feature == Some(Feature::Chat) {
        body["messages"] = json!([{"role": "user", "content": prompt(random, prompts)}]);
    } else {
        body["prompt"] = prompt(random, prompts).into();
    }
    if stream && random.percent(50) {
        body["stream_options"] = json!({"include_usage": true});
    }
    let stops = sampling(random, &mut body);
    let mut kind = ["whole", "stream"][usize::from(stream)];
    if let Some(feature) = feature {
        join(&mut body, feature.fields());
        kind = name(feature);
    }
    if body["stream"] == false {
        join(&mut body, json!({"stream_options": null}));
    }
    let several = kind == "whole" && random.percent(25);
    if several {
        body["prompt"] = json!([prompt(random, prompts), prompt(random, prompts)]);
        kind = "two prompts";
    }
    let n = body["n"].as_u64().unwrap_or(1) as usize;
    Request {
        kind,
        path: feature.map_or("/v1/completions", Feature::path),
        stream: body["stream"] == true,
        choices: n * (1 + usize::from(several)),
        experts_per_token: (feature == Some(Feature::Router)).then_some(1.0),
        stops,
        body,
    }
}

fn name(feature: Feature) -> &'static str {
    match feature {
        Feature::Choices => "n",
        Feature::BestOf => "best_of",
        Feature::Logprobs => "logprobs",
        Feature::PromptLogprobs => "prompt_logprobs",
        Feature::Echo => "echo",
        Feature::LogitBias => "logit_bias",
        Feature::CacheSalt => "cache_salt",
        Feature::JsonSchema => "json_schema",
        Feature::Router => "router",
        Feature::Trace => "moe_trace",
        Feature::Chat => "chat",
    }
}

/// A few words, or a long text that shares its beginning with others.
fn prompt(random: &mut Random, prompts: &[String]) -> String {
    let at = random.below(prompts.len());
    if random.percent(60) {
        return prompts[at].clone();
    }
    let shared = prompts.iter().cycle().take(4 + random.below(20)).cloned().collect::<Vec<_>>();
    format!("{} {}", shared.join(" "), prompts[at])
}

/// Greedy, seeded or free, with or without penalties and stop strings, which it gives.
fn sampling(random: &mut Random, body: &mut Value) -> Vec<&'static str> {
    match random.below(4) {
        0 => body["temperature"] = 0.into(),
        1 => join(body, json!({"temperature": 0.8, "seed": random.below(1000), "top_p": 0.9})),
        2 => join(body, json!({"temperature": 1.2, "top_k": 40, "min_p": 0.02})),
        _ => join(body, json!({"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1})),
    }
    body["ignore_eos"] = random.percent(50).into();
    if random.percent(20) {
        let stops = vec![".", " the", "\n"];
        body["stop"] = json!(stops);
        return stops;
    }
    Vec::new()
}

/// Bodies that must be refused, with the status.
pub const INVALID: &[(&str, u16)] = &[
    ("", 400),
    ("{\"prompt\": \"a\"", 400),
    ("[1, 2]", 400),
    ("{}", 400),
    ("{\"prompt\": 3}", 400),
    ("{\"prompt\": \"\"}", 400),
    ("{\"prompt\": [4096000]}", 400),
    ("{\"prompt\": \"a\", \"max_tokens\": -1}", 400),
    ("{\"prompt\": \"a\", \"max_tokens\": 100000000}", 400),
    ("{\"prompt\": \"a\", \"temperature\": 9}", 400),
    ("{\"prompt\": \"a\", \"top_p\": 0}", 400),
    ("{\"prompt\": \"a\", \"n\": 0}", 400),
    ("{\"prompt\": \"a\", \"n\": 100000}", 400),
    ("{\"prompt\": \"a\", \"stop\": [1]}", 400),
    ("{\"prompt\": \"a\", \"no_such_field\": 1}", 400),
    ("{\"prompt\": \"a\", \"router\": \"topk:1000\"}", 400),
    ("{\"prompt\": \"a\", \"model\": \"no-such-model\"}", 404),
];
