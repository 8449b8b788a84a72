//! One step: plan, forward, sample, commit.

use super::metrics::{ExpertSeries, Metrics};
use super::sequence::{Job, Sequence};
use super::text::Text;
use crate::model::{CausalLm, Loaded, StepInput};
use crate::moe::cost::{CostModel, ExpertReads};
use crate::moe::router::StepTokens;
use crate::moe::{Policy, RouteCtx, StepTrace};
use crate::ops::{self, KvCache, KvShape, Segment, StepLayout};
use crate::sched::{Plan, SchedConfig, Scheduler};
use crate::types::{SeqId, TokenId, Work};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// How the engine runs.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Sequences that run at the same time.
    pub max_num_seqs: usize,
    /// Tokens per step.
    pub max_batched_tokens: usize,
    /// Unfinished requests beyond those that run.
    pub max_queue: usize,
    /// Bytes for the KV cache; a share of the free memory without it.
    pub kv_bytes: Option<u64>,
    /// Whether a context that does not fit the KV cache is cut (else it is an error).
    pub cut_context: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self { max_num_seqs: 64, max_batched_tokens: 2048, max_queue: 256, kv_bytes: None, cut_context: true }
    }
}

/// Why the engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "the KV cache of {kv_mib} MiB holds {held} tokens, but the context is {wanted}: give --kv-cache-gb at least \
         {needed_gb:.2} or --max-model-len at most {held}"
    )]
    KvTooSmall { kv_mib: u64, held: usize, wanted: usize, needed_gb: f64 },
    #[error(
        "--kv-cache-gb asks for {asked_gb:.2} GiB of KV cache, but {free_gb:.2} GiB of memory are free beside the model"
    )]
    KvTooLarge { asked_gb: f64, free_gb: f64 },
    #[error("allocating the KV cache: {0}")]
    Kv(#[from] candle_core::Error),
    #[error("starting the engine thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Positions per KV block.
pub(super) const BLOCK_SIZE: usize = 16;
/// KV cache when nothing is said: this share of the free memory, and at most this much.
const KV_SHARE: u64 = 4;
const KV_BYTES_MAX: u64 = 4 << 30;

/// The engine's state; the thread in `worker` turns the crank.
pub(super) struct Core {
    model: CausalLm,
    text: Text,
    eos: Vec<TokenId>,
    sched: Scheduler,
    sched_config: SchedConfig,
    kv: KvCache,
    seqs: BTreeMap<SeqId, Sequence>,
    next_id: u64,
    cost: CostModel,
    metrics: Metrics,
    expert_series: ExpertSeries,
}

/// The KV cache's size and the context it allows.
pub(super) struct KvPlan {
    pub shape: KvShape,
    pub bytes: u64,
    pub max_model_len: usize,
}

impl KvPlan {
    pub(super) fn new(loaded: &Loaded, config: &EngineConfig) -> Result<Self, StartError> {
        let model = loaded.model.shape();
        let backend = loaded.model.backend();
        let (kv_heads, head_dim) = (model.attention.kv_heads, model.attention.head_dim);
        let one = KvShape { layers: model.layers.len(), blocks: 1, block_size: BLOCK_SIZE, kv_heads, head_dim };
        let block_bytes = one.block_bytes(backend.dtype()) as u64;
        let free = backend.free_memory().unwrap_or(u64::MAX);
        let bytes = config.kv_bytes.unwrap_or((free / KV_SHARE).min(KV_BYTES_MAX));
        let each = loaded.max_model_len.div_ceil(BLOCK_SIZE);
        let blocks = ((bytes / block_bytes) as usize).min(each * config.max_num_seqs);
        let held = blocks * BLOCK_SIZE;
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        if held < 2 || (held < loaded.max_model_len && !config.cut_context) {
            return Err(StartError::KvTooSmall {
                kv_mib: bytes >> 20,
                held,
                wanted: loaded.max_model_len,
                needed_gb: gib(each as u64 * block_bytes),
            });
        }
        let taken = blocks as u64 * block_bytes;
        if taken > free {
            return Err(StartError::KvTooLarge { asked_gb: gib(taken), free_gb: gib(free) });
        }
        let shape = KvShape { blocks, ..one };
        Ok(Self { shape, bytes: taken, max_model_len: loaded.max_model_len.min(held) })
    }
}

impl Core {
    pub(super) fn new(
        loaded: Loaded,
        text: Text,
        config: &EngineConfig,
        kv: &KvPlan,
        metrics: Metrics,
    ) -> Result<Self, StartError> {
        let sched_config = SchedConfig {
            blocks: kv.shape.blocks,
            block_size: kv.shape.block_size,
            max_num_seqs: config.max_num_seqs,
            max_batched_tokens: config.max_batched_tokens,
        };
        let kv = KvCache::new(kv.shape, loaded.model.backend())?;
        // Streams belong to threads: what this one cleared must be done before the engine's writes to it.
        loaded.model.backend().device().synchronize()?;
        Ok(Self {
            kv,
            cost: CostModel::new(loaded.model.shape()),
            expert_series: metrics.expert_series(loaded.model.shape()),
            model: loaded.model,
            text,
            eos: loaded.eos,
            sched: Scheduler::new(sched_config),
            sched_config,
            seqs: BTreeMap::new(),
            next_id: 0,
            metrics,
        })
    }

    /// Whether there is nothing to do.
    pub(super) fn idle(&self) -> bool {
        self.seqs.is_empty()
    }

    pub(super) fn add(&mut self, job: Job) {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        self.sched.add(id, job.request.prompt.len());
        self.seqs.insert(id, Sequence::new(job, self.text.clone(), &self.eos));
    }

    /// Runs one step. Errors of the forward pass end the requests that were in it, and nothing else.
    pub(super) fn step(&mut self) {
        let started = Instant::now();
        self.drop_departed();
        let plan = self.sched.plan();
        self.metrics.preempted(plan.preempted.len());
        if !plan.chunks.is_empty() {
            match self.forward(&plan) {
                Ok((trace, logits)) => {
                    self.account(&plan, &trace);
                    self.commit(&plan, logits);
                    self.metrics.step(started.elapsed());
                }
                Err(error) => {
                    tracing::error!(%error, "a step failed; its requests end with an error");
                    self.fail(plan.chunks.iter().map(|c| c.seq).collect());
                }
            }
        }
        self.show_load();
    }

    fn drop_departed(&mut self) {
        let gone: Vec<SeqId> = self.seqs.iter().filter(|(_, s)| s.departed()).map(|(id, _)| *id).collect();
        for id in gone {
            self.metrics.ended("abort");
            self.remove(id);
        }
    }

    fn remove(&mut self, id: SeqId) {
        self.sched.remove(id);
        self.seqs.remove(&id);
    }

    fn fail(&mut self, ids: Vec<SeqId>) {
        for id in ids {
            if let Some(seq) = self.seqs.get_mut(&id) {
                seq.fail("the engine failed while computing this request; see the server's log", &self.metrics);
            }
            self.remove(id);
        }
    }

    /// Ends everything after a panic, whose state is not to be trusted.
    pub(super) fn reset(&mut self) {
        self.fail(self.seqs.keys().copied().collect());
        self.sched = Scheduler::new(self.sched_config);
        self.show_load();
    }

    fn show_load(&self) {
        self.metrics.load(self.sched.waiting(), self.sched.running(), self.sched.blocks_used());
    }

    /// Gives the routing's trace and the logits of the chunks that sample, in order.
    fn forward(&mut self, plan: &Plan) -> candle_core::Result<(StepTrace, Vec<f32>)> {
        let mut tokens = StepTokens::default();
        let mut policies: Vec<Arc<Policy>> = Vec::new();
        let mut segments = Vec::with_capacity(plan.chunks.len());
        let mut logit_rows = Vec::new();
        for chunk in &plan.chunks {
            let Some(seq) = self.seqs.get_mut(&chunk.seq) else {
                candle_core::bail!("the plan holds an unknown sequence");
            };
            seq.runs(&self.metrics);
            let known = policies.iter().position(|p| p.spec() == seq.policy.spec());
            let policy = known.unwrap_or_else(|| {
                policies.push(seq.policy.clone());
                policies.len() - 1
            });
            let span = chunk.start..chunk.start + chunk.len;
            tokens.token_t.extend(&seq.tokens[span.clone()]);
            tokens.position_t.extend(span.map(|p| p as u32));
            tokens.policy_t.extend(std::iter::repeat_n(policy as u16, chunk.len));
            if chunk.samples {
                logit_rows.push(tokens.token_t.len() as u32 - 1);
            }
            segments.push(Segment { start: chunk.start, len: chunk.len, blocks: chunk.blocks.clone() });
        }
        let layout = StepLayout::new(segments, &self.kv, self.model.backend())?;
        let input = StepInput { tokens: &tokens.token_t, layout: &layout, logit_rows: &logit_rows };
        let mut routes = RouteCtx::new(self.model.shape().moe, &policies, &tokens);
        let logits = self.model.forward(&input, &mut self.kv, &mut routes)?;
        let logits = logits.map(|l| ops::to_host(&l)).transpose()?.unwrap_or_default();
        Ok((routes.into_trace(), logits))
    }

    /// Books the work of every token, to its request and to the metrics: before any request can end, so that who
    /// has read its answer finds its work counted.
    fn account(&mut self, plan: &Plan, trace: &StepTrace) {
        let mut step_work = Work::default();
        let mut rows = trace.experts_t.iter();
        for chunk in &plan.chunks {
            let Some(seq) = self.seqs.get_mut(&chunk.seq) else { continue };
            for (i, expert_rows) in rows.by_ref().take(chunk.len).enumerate() {
                let context = (chunk.start + i + 1) as u64;
                let lm_head = chunk.samples && i + 1 == chunk.len;
                let work = self.cost.token(context, u64::from(*expert_rows), lm_head);
                seq.work += work;
                step_work += work;
            }
        }
        let reads = ExpertReads::of(trace, self.model.expert_bytes() as u64);
        self.metrics.routed(trace, &step_work, &reads, &self.expert_series);
    }

    /// Samples a token for every chunk that reaches its sequence's end, and removes what is over.
    fn commit(&mut self, plan: &Plan, mut logits: Vec<f32>) {
        let mut logits = logits.chunks_exact_mut(self.model.shape().vocab);
        let mut over = Vec::new();
        for chunk in plan.chunks.iter().filter(|c| c.samples) {
            if let (Some(seq), Some(logits)) = (self.seqs.get_mut(&chunk.seq), logits.next())
                && seq.advance(logits, &self.metrics)
            {
                over.push(chunk.seq);
            }
        }
        self.sched.commit(plan);
        over.into_iter().for_each(|id| self.remove(id));
    }
}
