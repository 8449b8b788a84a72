//! The engine's thread, and the handle that the rest of the program holds.

use super::api::{Events, Generate, ModelInfo, SubmitError};
use super::budget::Budget;
use super::core::{BLOCK_SIZE, Core, EngineConfig, KvPlan, RequestRouters, StartError};
use super::events::Detokenizer;
use super::grammar::{Grammar, GrammarError, Grammars};
use super::lock;
use super::metrics::Metrics;
use super::sequence::{Accepted, Job, Sequence, Slot};
use super::text::Text;
use crate::model::Loaded;
use crate::moe::Policy;
use crate::moe::calibration::Calibrations;
use crate::ops::on_pool;
use crate::sched::BlockHash;
use crate::types::{BudgetState, GenerateRequest, GrammarSpec, Limits, MoeShape, SpecError, TokenId};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A running engine. Dropping it stops the thread once its requests are done.
pub struct Engine {
    info: ModelInfo,
    text: Text,
    eos: Vec<TokenId>,
    metrics: Metrics,
    moe: MoeShape,
    policy: Arc<Policy>,
    budget: Option<Arc<Budget>>,
    /// Sequences that run at the same time.
    seats: usize,
    prefix_cache: bool,
    request_routers: Option<RequestRouters>,
    /// That requests may name, if they may.
    files: Option<Calibrations>,
    grammars: Grammars,
    /// None once draining. Holds at most `info.unfinished_max` jobs: each has at least one of as many slots.
    jobs: Mutex<Option<Sender<Job>>>,
    unfinished: Arc<AtomicUsize>,
    kv_bytes: u64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Starts an engine for a loaded model; requests call it `name`, and `policy` routes them.
    ///
    /// # Errors
    /// A KV cache that is too small or cannot be allocated.
    pub fn start(
        name: String,
        loaded: Loaded,
        text: Text,
        policy: Policy,
        config: EngineConfig,
    ) -> Result<Self, StartError> {
        Self::with_budget(name, loaded, text, (policy, None), config)
    }

    /// Starts one whose `policy` may be kept to a budget.
    pub(super) fn with_budget(
        name: String,
        loaded: Loaded,
        text: Text,
        (policy, budget): (Policy, Option<Budget>),
        config: EngineConfig,
    ) -> Result<Self, StartError> {
        let budget = budget.map(Arc::new);
        let kv = KvPlan::new(&loaded, &config)?;
        let shape = loaded.model.shape();
        let metrics = Metrics::new(&name, shape, kv.shape.blocks, BLOCK_SIZE);
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let limits = Limits { vocab: shape.vocab, max_model_len: kv.max_model_len };
        let unfinished_max = config.max_num_seqs + config.max_queue;
        let (router, router_means) = (policy.spec().clone(), policy.describe());
        let info = ModelInfo { name, router, router_means, limits, unfinished_max, created };
        let moe = shape.moe.clone();
        let grammars = Grammars::new(text.bytes().clone(), &loaded.eos);
        let (sender, receiver) = channel();
        let eos = loaded.eos.clone();
        let core = Core::new(loaded, &config, &kv, (metrics.clone(), budget.clone()))?;
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || run(core, &receiver))?;
        Ok(Self {
            info,
            text,
            eos,
            metrics,
            moe,
            policy: Arc::new(policy),
            budget,
            seats: config.max_num_seqs,
            prefix_cache: config.prefix_cache,
            request_routers: config.request_routers,
            files: None,
            grammars,
            jobs: Mutex::new(Some(sender)),
            unfinished: Arc::default(),
            kv_bytes: kv.bytes,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Lets requests name `files`, where [`RequestRouters::files`] allows it.
    pub fn with_files(mut self, files: Calibrations) -> Self {
        let allowed = self.request_routers.as_ref().is_some_and(|routers| routers.files);
        self.files = allowed.then_some(files);
        self
    }

    /// The calibrations that requests may name, if they may.
    pub fn files(&self) -> Option<&Calibrations> {
        self.files.as_ref()
    }

    /// Bytes of the KV cache.
    pub fn kv_bytes(&self) -> u64 {
        self.kv_bytes
    }

    /// Accepts nothing more; what was accepted is finished.
    pub fn drain(&self) {
        lock(&self.jobs).take();
    }

    /// Drains and waits for the thread to end.
    pub fn stop(&self) {
        self.drain();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread {
            // The thread catches panics of steps; if it died all the same there is nothing left to save.
            let _ = thread.join();
        }
    }

    /// The policy of a request, which must be within what the operator allows.
    fn policy_of(&self, request: &GenerateRequest) -> Result<Arc<Policy>, SpecError> {
        let Some(spec) = request.router.as_ref().filter(|spec| **spec != self.info.router) else {
            let budget = self.budget.as_ref().map(|budget| budget.policy(request.budget_version));
            return Ok(budget.unwrap_or_else(|| self.policy.clone()));
        };
        let Some(allowed) = &self.request_routers else {
            return Err(spec.error(
                "this server takes no router from requests; leave it out, or start the server with --allow-request-router",
            ));
        };
        if !allowed.names.is_empty() && !allowed.names.contains(&spec.name) {
            let names = allowed.names.join(", ");
            return Err(spec.error(format!("this server lets requests choose among {names} alone")));
        }
        let policy = match &self.files {
            Some(files) => Policy::build_with(spec, &self.moe, files)?,
            None => Policy::build(spec, &self.moe)?,
        };
        let (k, k_max) = (policy.experts_max(), allowed.experts_max.unwrap_or(self.moe.top_k));
        if k > k_max {
            let problem = format!(
                "can use {k} experts per token, but this server allows requests {k_max} (--request-experts-max); lower \
                 its k, or give it a max of at most {k_max} where it takes one"
            );
            return Err(spec.error(problem));
        }
        Ok(Arc::new(policy))
    }

    fn grammar_of(&self, request: &GenerateRequest) -> Result<Option<Grammar>, SubmitError> {
        let compile = |spec: &GrammarSpec| {
            self.grammars.compile(spec).map_err(|error| match error {
                GrammarError::Busy => SubmitError::Busy(error.to_string()),
                GrammarError::Invalid(_) | GrammarError::Stuck(_) => {
                    let tools = matches!(spec, GrammarSpec::Lark(_));
                    SubmitError::Grammar { tools, message: error.to_string() }
                }
            })
        };
        request.grammar.as_ref().map(compile).transpose()
    }

    fn queue(&self, request: GenerateRequest) -> Result<Events, SubmitError> {
        request.check(&self.info.limits)?;
        let policy = self.policy_of(&request)?;
        let grammar = self.grammar_of(&request)?;
        let full = |unfinished| SubmitError::QueueFull { unfinished, limit: self.info.unfinished_max };
        let slots = Slot::take(&self.unfinished, request.n, self.info.unfinished_max).map_err(full)?;
        let texts = (0..request.n).map(|choice| Detokenizer::new(choice, &self.text, &request)).collect();
        let (here, there) = if request.stop.is_empty() { (Vec::new(), texts) } else { (texts, Vec::new()) };
        // The prompt; and of every completion a text per token, the held-back rest, and the end.
        let (sender, events) = Events::with_text(1 + request.n * (request.max_tokens + 2), there);
        // Who is routed by what else is in the batch computes nothing that others could use; and who reads the surprisal
        // of a token needs the pass over the one before.
        let shares = self.prefix_cache && policy.batch_invariant() && !policy.signals().surprisal;
        let root = shares.then(|| BlockHash::root(&policy.spec().to_string(), &request.cache_salt));
        let arrived = Instant::now();
        let accepted = Accepted { request, policy, root, grammar, events: sender, detokenizers: here, arrived, slots };
        let job = Sequence::job(accepted, &self.eos);
        match &*lock(&self.jobs) {
            Some(jobs) if jobs.send(job).is_ok() => Ok(events),
            _ => Err(SubmitError::Stopping),
        }
    }
}

impl Generate for Engine {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<TokenId>, String> {
        let max = self.info.limits.max_model_len;
        if text.len() > max.saturating_mul(self.text.token_bytes_max()) {
            let bytes = text.len();
            return Err(format!("prompt has {bytes} bytes, but the context of this model is {max} tokens: shorten it"));
        }
        self.text.encode(text, add_special_tokens).map_err(|e| e.to_string())
    }

    fn pieces(&self, ids: &[TokenId], skip_special_tokens: bool) -> Vec<String> {
        self.text.pieces(ids, skip_special_tokens)
    }

    fn special_token(&self, name: &str) -> Option<TokenId> {
        self.text.special_token(name)
    }

    fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        self.text.bytes().bytes(id).to_vec()
    }

    fn submit(&self, request: GenerateRequest) -> Result<Events, SubmitError> {
        self.queue(request).inspect_err(|error| match error {
            SubmitError::Limit(_) | SubmitError::Router(_) | SubmitError::Grammar { .. } => {}
            SubmitError::QueueFull { .. } => self.metrics.rejected("queue_full"),
            SubmitError::Busy(_) => self.metrics.rejected("grammar_busy"),
            SubmitError::Stopping => self.metrics.rejected("stopping"),
        })
    }

    fn budget(&self) -> Option<BudgetState> {
        let waiting = self.unfinished.load(Ordering::Acquire).saturating_sub(self.seats);
        Some(self.budget.as_ref()?.now(waiting, self.seats))
    }

    fn ready(&self) -> bool {
        let running = lock(&self.thread).as_ref().is_some_and(|t| !t.is_finished());
        running && lock(&self.jobs).is_some()
    }

    fn metrics(&self) -> String {
        self.metrics.render()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Steps while there is work, sleeps while there is none, ends when no one can send any more.
fn run(mut core: Core, jobs: &Receiver<Job>) {
    loop {
        if core.idle() {
            match jobs.recv() {
                Ok(job) => core.add(job),
                Err(_) => return,
            }
        }
        while let Ok(job) = jobs.try_recv() {
            core.add(job);
        }
        // On a thread of the pool: from outside, every parallel region of a step would cost two changes of threads.
        if catch_unwind(AssertUnwindSafe(|| on_pool(|| core.step()))).is_err() {
            tracing::error!("a step panicked: this is a bug; all running requests end with an error");
            core.reset();
        }
    }
}
