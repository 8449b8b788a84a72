//! What several test modules need.

use crate::checkpoint::quiet;
use moe_serve::chat::ChatTemplates;
use moe_serve::engine::{Engine, EngineConfig, KvSize, RequestRouters, Text};
use moe_serve::http::{Service, ServiceOptions, Transport, app, wrap};
use moe_serve::model::hub::{Files, HubOptions, resolve};
use moe_serve::model::{CausalLm, LoadError, LoadOptions, Loaded, StepInput, load};
use moe_serve::moe::router::StepTokens;
use moe_serve::moe::{Policy, RouteCtx, StepTrace};
use moe_serve::ops::{KvCache, KvShape, Segment, StepLayout, to_host};
use moe_serve::types::{BlockId, DeviceChoice, DtypeChoice, TokenId};
use moe_serve::wire::{Chunk, CompletionResponse};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A file or folder of this repository.
pub fn repo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// `data` of the folder `../shared` or where MOE_SHARED_DIR says, if its file `needed` is here; says loudly if not.
pub fn shared_data(needed: &str) -> Option<PathBuf> {
    let shared = std::env::var_os("MOE_SHARED_DIR").map_or_else(|| repo("../shared"), PathBuf::from);
    let data = shared.join("data");
    if !data.join(needed).is_file() {
        eprintln!("SKIPPED: ../shared/data is not here");
        return None;
    }
    Some(data)
}

/// The files of a checkpoint folder; one without a tokenizer gets the bundled model's.
pub fn files(dir: &Path) -> Files {
    let file = |name: &str| Some(dir.join(name)).filter(|p| p.is_file());
    Files {
        config: dir.join("config.json"),
        generation_config: file("generation_config.json"),
        tokenizer: file("tokenizer.json").unwrap_or_else(|| repo("models/stories/tokenizer.json")),
        tokenizer_config: file("tokenizer_config.json"),
        chat_template: file("chat_template.jinja"),
        weights: vec![dir.join("model.safetensors")],
    }
}

/// The files of the checkpoint that comes with the source.
pub fn bundled_files() -> Files {
    resolve(repo("models/stories").to_str().unwrap(), &HubOptions::default(), &quiet()).unwrap()
}

pub fn try_load(dir: &Path, dtype: DtypeChoice) -> Result<Loaded, LoadError> {
    try_load_on(dir, dtype, DeviceChoice::Cpu)
}

pub fn try_load_on(dir: &Path, dtype: DtypeChoice, device: DeviceChoice) -> Result<Loaded, LoadError> {
    load(&files(dir), &LoadOptions { dtype, device, ..Default::default() }, |_, _| {})
}

/// An engine for the checkpoint in `dir`, on the CPU.
pub fn engine(dir: &Path, dtype: DtypeChoice, router: &str, config: EngineConfig) -> Engine {
    let loaded = try_load(dir, dtype).unwrap();
    // The tiny golden models have smaller vocabularies than the tokenizer: their text is not looked at.
    let text = Text::read(&repo("models/stories/tokenizer.json"), 4096).unwrap();
    let policy = Policy::build(&router.parse().unwrap(), &loaded.model.shape().moe).unwrap();
    Engine::start("test".into(), loaded, text, policy, config).unwrap()
}

/// Sequences run by hand, without engine and scheduler: each has its own scattered KV blocks.
pub struct Runner<'a> {
    pub model: &'a CausalLm,
    kv: KvCache,
    block_size: usize,
    blocks: Vec<Vec<BlockId>>,
    lens: Vec<usize>,
    policies: Vec<Arc<Policy>>,
    pub last_trace: StepTrace,
}

impl<'a> Runner<'a> {
    /// Room for `sequences` sequences of `len_max` tokens, routed by `router`.
    pub fn new(model: &'a CausalLm, sequences: usize, len_max: usize, router: &str) -> Self {
        let (shape, block_size) = (model.shape(), 16);
        let each = len_max.div_ceil(block_size);
        let kv_shape = KvShape {
            layers: shape.layers.len(),
            blocks: each * sequences,
            block_size,
            kv_heads: shape.attention.kv_heads,
            head_dim: shape.attention.head_dim,
        };
        // Interleaved from the back, so that a wrong block table cannot look right.
        let block = |s: usize, b: usize| BlockId((each * sequences - 1 - (b * sequences + s)) as u32);
        Self {
            model,
            kv: KvCache::new(kv_shape, model.backend()).unwrap(),
            block_size,
            blocks: (0..sequences).map(|s| (0..each).map(|b| block(s, b)).collect()).collect(),
            lens: vec![0; sequences],
            policies: vec![Arc::new(Policy::build(&router.parse().unwrap(), &shape.moe).unwrap())],
            last_trace: StepTrace::default(),
        }
    }

    /// Appends tokens to sequences in one step and gives the logits of every new token, in order.
    pub fn step(&mut self, parts: &[(usize, &[u32])]) -> Vec<Vec<f32>> {
        let mut tokens = StepTokens::default();
        let mut segments = Vec::new();
        for &(s, ids) in parts {
            let start = self.lens[s];
            let blocks = self.blocks[s][..(start + ids.len()).div_ceil(self.block_size)].to_vec();
            segments.push(Segment { start, len: ids.len(), blocks });
            tokens.token_t.extend(ids);
            tokens.position_t.extend((start..start + ids.len()).map(|p| p as u32));
            tokens.policy_t.extend(ids.iter().map(|_| 0));
            self.lens[s] += ids.len();
        }
        let layout = StepLayout::new(segments, &self.kv, self.model.backend()).unwrap();
        let rows: Vec<u32> = (0..tokens.token_t.len() as u32).collect();
        let input = StepInput { tokens: &tokens.token_t, layout: &layout, logit_rows: &rows };
        let mut routes = RouteCtx::new(&self.model.shape().moe, &self.policies, &tokens);
        let hidden = self.model.forward(&input, &mut self.kv, &mut routes).unwrap().unwrap();
        let logits = self.model.logits(&hidden, 0, rows.len()).unwrap();
        self.last_trace = routes.into_trace();
        to_host(&logits).unwrap().chunks(self.model.shape().vocab).map(<[f32]>::to_vec).collect()
    }
}

/// The index of the largest value, the first of equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// How a [`Server`] is started.
#[derive(Clone)]
pub struct ServerOptions {
    pub router: &'static str,
    pub dtype: DtypeChoice,
    pub config: EngineConfig,
    pub service: ServiceOptions,
    /// Tokens that end a completion, instead of the checkpoint's.
    pub eos: Option<Vec<TokenId>>,
    /// The text of a chat template.
    pub chat: Option<String>,
    /// A tokenizer.json, instead of the checkpoint's.
    pub tokenizer: Option<PathBuf>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        // A cache of 16 Ki tokens in f32 is plenty, and quicker to clear than the default.
        let kv_size = Some(KvSize::Bytes(32 << 20));
        let config = EngineConfig { kv_size, request_routers: Some(RequestRouters::default()), ..Default::default() };
        let service = ServiceOptions { moe_trace: true };
        Self { router: "native", dtype: DtypeChoice::F32, config, service, chat: None, eos: None, tokenizer: None }
    }
}

/// The bundled checkpoint behind HTTP on a free port of this machine; gone when dropped, whatever is running.
pub struct Server {
    pub url: String,
    pub engine: Arc<Engine>,
    pub client: reqwest::Client,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// A streamed answer.
pub struct Streamed {
    /// The body as it came.
    pub raw: String,
    pub chunks: Vec<Chunk>,
}

impl Streamed {
    /// The text of choice `index`, put together.
    pub fn text(&self, index: usize) -> String {
        self.choices(index).map(|c| c.text.as_str()).collect()
    }

    /// The reasons given for choice `index`: one, where all is well.
    pub fn finish_reasons(&self, index: usize) -> Vec<String> {
        self.choices(index).filter_map(|c| c.finish_reason.clone()).collect()
    }

    fn choices(&self, index: usize) -> impl Iterator<Item = &moe_serve::wire::ChunkChoice> {
        self.chunks.iter().flat_map(|c| &c.choices).filter(move |c| c.index == index)
    }
}

fn load_template(source: String) -> Option<ChatTemplates> {
    ChatTemplates::load(None, Some(&source)).unwrap()
}

impl Server {
    pub fn start(options: ServerOptions) -> Self {
        let files = bundled_files();
        let load_options = LoadOptions { dtype: options.dtype, device: DeviceChoice::Cpu, ..Default::default() };
        let mut loaded = load(&files, &load_options, |_, _| {}).unwrap();
        if let Some(eos) = options.eos {
            loaded.eos = eos;
        }
        let shape = loaded.model.shape();
        let text = Text::read(options.tokenizer.as_ref().unwrap_or(&files.tokenizer), shape.vocab).unwrap();
        let policy = Policy::build(&options.router.parse().unwrap(), &shape.moe).unwrap();
        let engine = Arc::new(Engine::start("stories".into(), loaded, text, policy, options.config).unwrap());
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (send_url, url) = std::sync::mpsc::channel();
        let service =
            Service { generate: engine.clone(), chat: options.chat.and_then(load_template), options: options.service };
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                send_url.send(format!("http://{}", listener.local_addr().unwrap())).unwrap();
                let routes = wrap(app(service), None, None);
                let serving = moe_serve::http::serve(listener, routes, Transport::default(), std::future::pending());
                tokio::select! {
                    () = serving => {}
                    _ = stopped => {}
                }
            });
        });
        let url = url.recv_timeout(Duration::from_secs(10)).unwrap();
        Self { url, engine, client: client(), stop: Some(stop), thread: Some(thread) }
    }

    /// A server with the checkpoint's own router.
    pub fn native() -> Self {
        Self::start(ServerOptions::default())
    }

    pub async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(format!("{}{path}", self.url)).send().await.unwrap()
    }

    pub async fn post(&self, body: &Value) -> reqwest::Response {
        self.client.post(format!("{}/v1/completions", self.url)).json(body).send().await.unwrap()
    }

    /// A whole answer.
    pub async fn complete(&self, body: Value) -> CompletionResponse {
        let response = self.post(&body).await;
        let (status, text) = (response.status(), response.text().await.unwrap());
        assert_eq!(status, 200, "{body} gave {text}");
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    /// A streamed answer, checked for its format: `data: {json}\n\n` … `data: [DONE]\n\n`, and nothing else.
    pub async fn stream(&self, mut body: Value) -> Streamed {
        body["stream"] = true.into();
        let response = self.post(&body).await;
        assert_eq!(response.status(), 200, "{body}");
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let raw = response.text().await.unwrap();
        let events = raw.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("no [DONE] at the end of {raw}"));
        let chunk = |event: &str| {
            let json = event.strip_prefix("data: ").and_then(|e| e.strip_suffix("\n\n"));
            let json = json.filter(|j| !j.contains('\n')).unwrap_or_else(|| panic!("not one event: {event:?}"));
            serde_json::from_str(json).unwrap_or_else(|e| panic!("{json}: {e}"))
        };
        let chunks = events.split_inclusive("\n\n").map(chunk).collect();
        Streamed { raw, chunks }
    }

    pub async fn series(&self) -> Series {
        Series::read(&self.get("/metrics").await.text().await.unwrap())
    }

    /// Reads the metrics until they are as `wanted`; gauges and step counters follow an answer by a step.
    pub async fn series_when(&self, what: &str, wanted: impl Fn(&Series) -> bool) -> Series {
        Series::when(Duration::from_secs(10), what, async || self.series().await, wanted).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        // The runtime ends with the thread, and with it all connections: nothing holds requests any more.
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the server's thread panicked");
        }
    }
}

/// A client that takes no proxy from the environment and never waits for ever.
pub fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(60)).build().unwrap()
}

/// Prometheus' text format, read.
#[derive(Clone, Debug)]
pub struct Series(Vec<(String, f64)>);

impl Series {
    pub fn read(text: &str) -> Self {
        let lines = text.lines().filter(|l| !l.starts_with('#') && !l.is_empty());
        let pair = |line: &str| {
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value in {line}"));
            (series.to_string(), value.parse().unwrap_or_else(|e| panic!("{line}: {e}")))
        };
        Self(lines.map(pair).collect())
    }

    /// Reads until the series are as `wanted`, for at most `patience`.
    pub async fn when(
        patience: Duration,
        what: &str,
        read: impl AsyncFn() -> Self,
        wanted: impl Fn(&Self) -> bool,
    ) -> Self {
        let deadline = Instant::now() + patience;
        loop {
            let series = read().await;
            if wanted(&series) {
                return series;
            }
            assert!(Instant::now() < deadline, "never {what}: {series:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The sum of all series called `name` that have every label of `labels`, each as `key="value"`.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        self.find(name, labels).map(|(_, value)| value).sum()
    }

    /// How many series are called `name`.
    pub fn count(&self, name: &str) -> usize {
        self.find(name, &[]).count()
    }

    pub fn labels(&self, name: &str) -> Vec<&str> {
        self.find(name, &[]).map(|(series, _)| &series[name.len()..]).collect()
    }

    fn find<'a>(&'a self, name: &str, labels: &[&str]) -> impl Iterator<Item = (&'a str, f64)> + use<'a> {
        let called = |series: &str| series.strip_prefix(name).is_some_and(|r| r.is_empty() || r.starts_with('{'));
        let fits = |series: &str| called(series) && labels.iter().all(|l| series.contains(l));
        let found: Vec<(&str, f64)> = self.0.iter().map(|(s, v)| (s.as_str(), *v)).filter(|(s, _)| fits(s)).collect();
        found.into_iter()
    }
}
