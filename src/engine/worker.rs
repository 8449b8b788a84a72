//! The engine's thread, and the handle that the rest of the program holds.

use super::api::{Events, Generate, ModelInfo, SubmitError};
use super::core::{BLOCK_SIZE, Core, EngineConfig, KvPlan, StartError};
use super::metrics::Metrics;
use super::sequence::{Job, Slot};
use super::text::Text;
use crate::model::Loaded;
use crate::moe::Policy;
use crate::types::{GenerateRequest, Limits, MoeShape, TokenId};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// A running engine. Dropping it stops the thread once its requests are done.
pub struct Engine {
    info: ModelInfo,
    text: Text,
    metrics: Metrics,
    moe: MoeShape,
    policy: Arc<Policy>,
    /// None once draining. Holds at most `info.unfinished_max` jobs: each has one of as many slots.
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
        let kv = KvPlan::new(&loaded, &config)?;
        let shape = loaded.model.shape();
        let metrics = Metrics::new(&name, shape, kv.shape.blocks, BLOCK_SIZE);
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let limits = Limits { vocab: shape.vocab, max_model_len: kv.max_model_len };
        let unfinished_max = config.max_num_seqs + config.max_queue;
        let router = format!("{}: {}", policy.spec(), policy.describe());
        let info = ModelInfo { name, router, limits, unfinished_max, created };
        let moe = shape.moe;
        let (sender, receiver) = channel();
        let core = Core::new(loaded, text.clone(), &config, &kv, metrics.clone())?;
        let thread = std::thread::Builder::new().name("engine".into()).spawn(move || run(core, &receiver))?;
        Ok(Self {
            info,
            text,
            metrics,
            moe,
            policy: Arc::new(policy),
            jobs: Mutex::new(Some(sender)),
            unfinished: Arc::default(),
            kv_bytes: kv.bytes,
            thread: Mutex::new(Some(thread)),
        })
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

    fn policy_of(&self, request: &GenerateRequest) -> Result<Arc<Policy>, SubmitError> {
        match &request.router {
            None => Ok(self.policy.clone()),
            Some(spec) => Ok(Arc::new(Policy::build(spec, &self.moe)?)),
        }
    }

    fn queue(&self, request: GenerateRequest) -> Result<Events, SubmitError> {
        request.check(&self.info.limits)?;
        let policy = self.policy_of(&request)?;
        let full = |unfinished| SubmitError::QueueFull { unfinished, limit: self.info.unfinished_max };
        let slot = Slot::take(&self.unfinished, self.info.unfinished_max).map_err(full)?;
        // A text per token, the held-back rest, and the end.
        let (events, receiver) = mpsc::channel(request.max_tokens + 2);
        let job = Job { request, policy, events, arrived: Instant::now(), slot };
        match &*lock(&self.jobs) {
            Some(jobs) if jobs.send(job).is_ok() => Ok(Events::new(receiver)),
            _ => Err(SubmitError::Stopping),
        }
    }
}

impl Generate for Engine {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn encode(&self, text: &str) -> Result<Vec<TokenId>, String> {
        let max = self.info.limits.max_model_len;
        if text.len() > max.saturating_mul(self.text.token_bytes_max()) {
            let bytes = text.len();
            return Err(format!("prompt has {bytes} bytes, but the context of this model is {max} tokens: shorten it"));
        }
        self.text.encode(text).map_err(|e| e.to_string())
    }

    fn submit(&self, request: GenerateRequest) -> Result<Events, SubmitError> {
        self.queue(request).inspect_err(|error| match error {
            SubmitError::Limit(_) | SubmitError::Router(_) => {}
            SubmitError::QueueFull { .. } => self.metrics.rejected("queue_full"),
            SubmitError::Stopping => self.metrics.rejected("stopping"),
        })
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

/// What these locks guard is never left half-changed, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        if catch_unwind(AssertUnwindSafe(|| core.step())).is_err() {
            tracing::error!("a step panicked: this is a bug; all running requests end with an error");
            core.reset();
        }
    }
}
