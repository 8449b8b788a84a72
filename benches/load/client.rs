//! Requests as a client sends them, and what every answer must look like.

use reqwest::{RequestBuilder, Response};
use serde_json::Value;
use std::fmt;
use std::time::{Duration, Instant};

/// Why there is no good answer.
#[derive(Clone, Debug)]
pub enum Failure {
    /// A 429; `hint` tells whether it said when to come back.
    Refused { hint: bool },
    /// Any other status than 200.
    Status { status: u16, body: String },
    /// The answer did not come, or not to its end.
    Lost(String),
    /// The answer came and is not what it must be.
    Corrupted(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { hint } => {
                write!(f, "refused with 429, {} Retry-After", if *hint { "with" } else { "without" })
            }
            Self::Status { status, body } => write!(f, "status {status}: {}", cut(body)),
            Self::Lost(why) => write!(f, "lost: {why}"),
            Self::Corrupted(why) => write!(f, "corrupted: {why}"),
        }
    }
}

fn cut(text: &str) -> String {
    text.chars().take(300).collect()
}

pub fn corrupted<T>(why: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Corrupted(why.into()))
}

/// One server, over connections that are kept.
pub struct Client {
    http: reqwest::Client,
    url: String,
    key: Option<String>,
}

impl Client {
    /// # Errors
    /// A machine on which no client can be made.
    pub fn new(url: &str, key: Option<&str>, connections: usize, timeout: Duration) -> Result<Self, String> {
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(timeout)
            .pool_max_idle_per_host(connections)
            // So that connections which nobody uses do not look like a leak of the server's.
            .pool_idle_timeout(Duration::from_secs(3))
            .build()
            .map_err(|e| e.to_string())?;
        Ok(Self { http, url: url.trim_end_matches('/').into(), key: key.map(str::to_string) })
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let request = match &self.key {
            Some(key) => request.header("authorization", format!("Bearer {key}")),
            None => request,
        };
        let response = request.send().await.map_err(|e| Failure::Lost(chain(&e)))?;
        match response.status().as_u16() {
            200 => Ok(response),
            429 => Err(Failure::Refused { hint: response.headers().contains_key("retry-after") }),
            status => {
                let body = response.text().await.map_err(|e| Failure::Lost(chain(&e)))?;
                Err(Failure::Status { status, body })
            }
        }
    }

    pub async fn get(&self, path: &str) -> Result<String, Failure> {
        let response = self.send(self.http.get(format!("{}{path}", self.url))).await?;
        response.text().await.map_err(|e| Failure::Lost(chain(&e)))
    }

    /// The name of the model that is served.
    pub async fn model(&self) -> Result<String, Failure> {
        let list = json(&self.get("/v1/models").await?)?;
        match list["data"][0]["id"].as_str() {
            Some(id) => Ok(id.to_string()),
            None => corrupted(format!("no model in {list}")),
        }
    }

    async fn post(&self, path: &str, body: &Value) -> Result<Response, Failure> {
        self.send(self.http.post(format!("{}{path}", self.url)).json(body)).await
    }

    /// Sends bytes that need not be JSON.
    pub async fn post_bytes(&self, path: &str, body: String) -> Result<String, Failure> {
        let request = self.http.post(format!("{}{path}", self.url)).header("content-type", "application/json");
        let response = self.send(request.body(body)).await?;
        response.text().await.map_err(|e| Failure::Lost(chain(&e)))
    }

    /// A whole answer.
    pub async fn whole(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let text = self.post(path, body).await?.text().await.map_err(|e| Failure::Lost(chain(&e)))?;
        json(&text)
    }

    /// A streamed answer, at its beginning.
    pub async fn open(&self, path: &str, body: &Value) -> Result<Events, Failure> {
        let response = self.post(path, body).await?;
        let kind = response.headers().get("content-type").and_then(|v| v.to_str().ok()).unwrap_or_default();
        if !kind.starts_with("text/event-stream") {
            return corrupted(format!("a stream of content-type {kind:?}"));
        }
        Ok(Events { response, buffer: Vec::new(), done: false })
    }

    /// A streamed answer, read to its end and checked for its format.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<Streamed, Failure> {
        let sent = Instant::now();
        let mut events = self.open(path, body).await?;
        let mut streamed = Streamed::default();
        let mut last = None;
        while let Some(chunk) = events.next().await? {
            let now = Instant::now();
            if streamed.add(&chunk)? {
                match last {
                    None => streamed.first = now - sent,
                    Some(last) => streamed.gaps.push(now - last),
                }
                last = Some(now);
            }
        }
        streamed.total = sent.elapsed();
        streamed.check_ends()?;
        Ok(streamed)
    }
}

fn json(text: &str) -> Result<Value, Failure> {
    serde_json::from_str(text).map_err(|e| Failure::Corrupted(format!("{e} in {}", cut(text))))
}

/// An error with what caused it: reqwest's own message leaves that out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Server-sent events, one by one, as they come.
pub struct Events {
    response: Response,
    buffer: Vec<u8>,
    done: bool,
}

impl Events {
    /// The next chunk; `None` after `[DONE]`, which must be the last event.
    pub async fn next(&mut self) -> Result<Option<Value>, Failure> {
        loop {
            while let Some(data) = self.event()? {
                if self.done {
                    return corrupted(format!("after [DONE] came {data}"));
                }
                if data != "[DONE]" {
                    let chunk = json(&data)?;
                    return match chunk.get("error") {
                        Some(error) => Err(Failure::Lost(format!("the stream ended with the error {error}"))),
                        None => Ok(Some(chunk)),
                    };
                }
                self.done = true;
            }
            match self.response.chunk().await {
                Ok(Some(bytes)) => self.buffer.extend_from_slice(&bytes),
                Ok(None) if !self.buffer.is_empty() => return corrupted("the stream ended within an event"),
                Ok(None) if !self.done => return Err(Failure::Lost("the stream ended without [DONE]".into())),
                Ok(None) => return Ok(None),
                Err(e) => return Err(Failure::Lost(chain(&e))),
            }
        }
    }

    /// Takes one event's data from what has come: `data: …`, one line, and an empty line. Comments are passed over.
    fn event(&mut self) -> Result<Option<String>, Failure> {
        loop {
            let Some(end) = self.buffer.windows(2).position(|w| w == b"\n\n") else { return Ok(None) };
            let event: Vec<u8> = self.buffer.drain(..end + 2).take(end).collect();
            let Ok(event) = String::from_utf8(event) else { return corrupted("an event that is not UTF-8") };
            match event.strip_prefix("data: ") {
                Some(data) if !data.contains('\n') => return Ok(Some(data.to_string())),
                None if event.starts_with(':') => {}
                _ => return corrupted(format!("not an event: {:?}", cut(&event))),
            }
        }
    }
}

/// A streamed answer, put together.
#[derive(Default)]
pub struct Streamed {
    pub choices: Vec<StreamedChoice>,
    pub usage: Option<Value>,
    /// Until the first piece of text.
    pub first: Duration,
    /// Between pieces of text; a piece is a token, but for characters that take several.
    pub gaps: Vec<Duration>,
    pub total: Duration,
    id: Option<String>,
}

#[derive(Clone, Default)]
pub struct StreamedChoice {
    pub text: String,
    pub finish_reason: Option<String>,
}

impl Streamed {
    /// Adds a chunk of `/v1/completions` or of chat; whether it brought text.
    fn add(&mut self, chunk: &Value) -> Result<bool, Failure> {
        if self.usage.is_some() {
            return corrupted(format!("after the usage came {chunk}"));
        }
        let (Some(id), Some(choices)) = (chunk["id"].as_str(), chunk["choices"].as_array()) else {
            return corrupted(format!("no id or choices in {chunk}"));
        };
        if self.id.get_or_insert_with(|| id.to_string()) != id {
            return corrupted(format!("the id changed to {id}"));
        }
        self.usage = chunk.get("usage").filter(|u| !u.is_null()).cloned();
        if choices.is_empty() && self.usage.is_none() {
            return corrupted(format!("neither choices nor usage in {chunk}"));
        }
        let mut brought_text = false;
        for choice in choices {
            brought_text |= self.add_choice(choice)?;
        }
        Ok(brought_text)
    }

    fn add_choice(&mut self, choice: &Value) -> Result<bool, Failure> {
        let Some(index) = choice["index"].as_u64().filter(|i| *i < 4096) else {
            return corrupted(format!("no index in {choice}"));
        };
        let index = index as usize;
        if self.choices.len() <= index {
            self.choices.resize(index + 1, StreamedChoice::default());
        }
        let built = &mut self.choices[index];
        if built.finish_reason.is_some() {
            return corrupted(format!("after the end of choice {index} came {choice}"));
        }
        let text = choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default();
        if choice["text"].is_null() && !choice["delta"].is_object() {
            return corrupted(format!("neither text nor delta in {choice}"));
        }
        built.text.push_str(text);
        built.finish_reason = choice["finish_reason"].as_str().map(str::to_string);
        Ok(!text.is_empty())
    }

    fn check_ends(&self) -> Result<(), Failure> {
        match self.choices.iter().position(|c| c.finish_reason.is_none()) {
            Some(index) => corrupted(format!("choice {index} has no finish_reason")),
            None if self.choices.is_empty() => corrupted("a stream without choices"),
            None => Ok(()),
        }
    }
}
