//! One step: plan, forward, sample, commit.

use super::budget::Budget;
use super::metrics::{ExpertSeries, Metrics};
use super::sequence::{Job, Sequence, Wanted};
use crate::model::{CausalLm, Loaded, StepInput};
use crate::moe::cost::{CostModel, ExpertReads};
use crate::moe::router::StepTokens;
use crate::moe::{Policy, RouteCtx, StepTrace};
use crate::ops::profile::{Part, Profiler, timed};
use crate::ops::{self, KvCache, KvShape, Segment, StepLayout};
use crate::sched::{Chunk, Plan, SchedConfig, Scheduler};
use crate::types::{FinishReason, SeqId, TokenId, Work};
use candle_core::Tensor;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// How the engine runs.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Sequences that run at the same time.
    pub max_num_seqs: usize,
    /// Tokens per step.
    pub max_batched_tokens: usize,
    /// Unfinished completions beyond those that run.
    pub max_queue: usize,
    /// Size of the KV cache; a share of the free memory without it.
    pub kv_size: Option<KvSize>,
    /// Whether prompts take over what earlier ones have computed.
    pub prefix_cache: bool,
    /// What routers requests may ask for; none without it.
    pub request_routers: Option<RequestRouters>,
    /// Whether a context that does not fit the KV cache is cut (else it is an error).
    pub cut_context: bool,
    /// Whether the parts of every step are timed, for the series `moe_step_part_seconds_total`.
    pub profile: bool,
    /// Share of native routing's cost down to which a budget goes while requests wait; without it, load changes nothing.
    pub load_shed: Option<f64>,
}

/// How large the KV cache is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvSize {
    Bytes(u64),
    /// Of 16 positions each.
    Blocks(usize),
}

/// Routers that a request may ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestRouters {
    /// Names of `ROUTERS`; empty for all.
    pub names: Vec<String>,
    /// Experts per token and layer; the checkpoint's own number without it.
    pub experts_max: Option<usize>,
    /// Whether they may name calibration files: of this machine, so for programs that run their own engine.
    pub files: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 64,
            max_batched_tokens: 2048,
            max_queue: 256,
            kv_size: None,
            prefix_cache: true,
            request_routers: None,
            cut_context: true,
            profile: false,
            load_shed: None,
        }
    }
}

/// Why the engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "the KV cache of {kv_mib} MiB holds {held} tokens, but the context is {wanted}: give --kv-cache-gb at least \
         {needed_gb:.2} ({needed_blocks} blocks) or --max-model-len at most {held}"
    )]
    KvTooSmall { kv_mib: u64, held: usize, wanted: usize, needed_gb: f64, needed_blocks: usize },
    #[error(
        "--kv-cache-gb or --num-blocks asks for {asked_gb:.2} GiB of KV cache, but {free_gb:.2} GiB of memory are free beside the model"
    )]
    KvTooLarge { asked_gb: f64, free_gb: f64 },
    #[error("allocating the KV cache: {0}")]
    Kv(#[from] candle_core::Error),
    #[error("starting the engine thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Positions per KV block.
pub(super) const BLOCK_SIZE: usize = 16;
/// Bytes of logits that are on the host at the same time.
const LOGITS_BYTES_MAX: usize = 64 << 20;
/// KV cache when nothing is said: this share of the free memory, and at most this much.
const KV_SHARE: u64 = 4;
const KV_BYTES_MAX: u64 = 4 << 30;

/// The engine's state; the thread in `worker` turns the crank.
pub(super) struct Core {
    model: CausalLm,
    sched: Scheduler,
    sched_config: SchedConfig,
    kv: KvCache,
    seqs: BTreeMap<SeqId, Sequence>,
    next_id: u64,
    cost: CostModel,
    metrics: Metrics,
    budget: Option<Arc<Budget>>,
    expert_series: ExpertSeries,
    profile: bool,
}

/// A row of a step whose logits are wanted.
struct LogitRow {
    seq: SeqId,
    /// Row of the step.
    row: u32,
    /// What it is to tell of the prompt.
    score: Option<Wanted>,
    /// Whether the next token is drawn from it.
    samples: bool,
    /// Whether routing reads the surprisal of the next token.
    keeps: bool,
}

/// What the forward pass of a step gave.
struct Forwarded {
    trace: StepTrace,
    rows: Vec<LogitRow>,
    /// Final hidden states of `rows`.
    hidden: Option<Tensor>,
}

/// What became of the sequences that have reached their end in a step.
#[derive(Default)]
struct Drawn {
    /// Their next tokens.
    sampled: Vec<(SeqId, TokenId)>,
    /// Other completions of a prompt, with their first tokens.
    forks: Vec<(SeqId, Sequence, TokenId)>,
    /// Those that are over.
    over: Vec<SeqId>,
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
        let each = loaded.max_model_len.div_ceil(BLOCK_SIZE);
        let most = each * config.max_num_seqs;
        let bytes = match config.kv_size {
            Some(KvSize::Blocks(blocks)) => blocks as u64 * block_bytes,
            Some(KvSize::Bytes(bytes)) => bytes,
            // More than all sequences together can fill is worth it only where it is asked for: as prefix cache.
            None => (free / KV_SHARE).min(KV_BYTES_MAX).min(most as u64 * block_bytes),
        };
        let blocks = usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX).min(u32::MAX as usize);
        let held = blocks.saturating_mul(BLOCK_SIZE);
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        if held < 2 || (held < loaded.max_model_len && !config.cut_context) {
            return Err(StartError::KvTooSmall {
                kv_mib: bytes >> 20,
                held,
                wanted: loaded.max_model_len,
                needed_gb: gib(each as u64 * block_bytes),
                needed_blocks: each,
            });
        }
        let taken = (blocks as u64).saturating_mul(block_bytes);
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
        config: &EngineConfig,
        kv: &KvPlan,
        (metrics, budget): (Metrics, Option<Arc<Budget>>),
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
            sched: Scheduler::new(sched_config),
            sched_config,
            seqs: BTreeMap::new(),
            next_id: 0,
            metrics,
            budget,
            profile: config.profile,
        })
    }

    /// Whether there is nothing to do.
    pub(super) fn idle(&self) -> bool {
        self.seqs.is_empty()
    }

    pub(super) fn add(&mut self, job: Job) {
        let id = self.id();
        self.sched.add(id, job.new);
        self.seqs.insert(id, job.first);
    }

    fn id(&mut self) -> SeqId {
        self.next_id += 1;
        SeqId(self.next_id)
    }

    /// Runs one step. Errors of the forward pass end the requests that were in it, and nothing else.
    pub(super) fn step(&mut self) {
        let started = Instant::now();
        self.drop_departed();
        let plan = self.sched.plan();
        self.metrics.preempted(plan.preempted.len());
        for admitted in &plan.admitted {
            if let Some(seq) = self.seqs.get_mut(&admitted.seq) {
                seq.admitted(admitted, &self.metrics);
            }
        }
        if !plan.chunks.is_empty() {
            let profiler = match self.profile {
                true => Profiler::start(Some(self.model.backend().device())),
                false => Profiler::off(),
            };
            let computed = self.compute(&plan);
            self.metrics.profiled(&profiler.finish());
            match computed {
                Ok(()) => self.metrics.step(started.elapsed()),
                Err(error) => {
                    tracing::error!(%error, "a step failed; its requests end with an error");
                    self.fail(plan.chunks.iter().map(|c| c.seq).collect());
                }
            }
        }
        self.show_load();
    }

    fn compute(&mut self, plan: &Plan) -> candle_core::Result<()> {
        self.kv.copy_blocks(&plan.copies)?;
        let done = self.forward(plan)?;
        self.account(plan, &done);
        self.commit(plan, &done)
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
        self.sched = Scheduler::new(self.sched_config);
        self.fail(self.seqs.keys().copied().collect());
        self.show_load();
    }

    fn show_load(&self) {
        if let Some(budget) = &self.budget {
            self.metrics.budget(&budget.report());
        }
        self.metrics.load(self.sched.waiting(), self.sched.running(), self.sched.blocks_used());
    }

    fn forward(&mut self, plan: &Plan) -> candle_core::Result<Forwarded> {
        let mut tokens = StepTokens::default();
        let mut policies: Vec<Arc<Policy>> = Vec::new();
        let mut segments = Vec::with_capacity(plan.chunks.len());
        let mut rows = Vec::new();
        for chunk in &plan.chunks {
            let Some(seq) = self.seqs.get(&chunk.seq) else {
                candle_core::bail!("the plan holds an unknown sequence");
            };
            let known = policies.iter().position(|p| p.spec() == seq.policy.spec());
            let policy = known.unwrap_or_else(|| {
                policies.push(seq.policy.clone());
                policies.len() - 1
            });
            wanted_rows(chunk, seq, tokens.token_t.len(), &mut rows);
            let len = chunk.tokens.len();
            if seq.policy.signals().surprisal {
                tokens.surprisal_t.resize(tokens.token_t.len(), f32::NAN);
                let surprisal = chunk.tokens.first().map(|token| seq.surprisal(chunk.start, *token));
                tokens.surprisal_t.extend(surprisal);
            }
            tokens.token_t.extend(&chunk.tokens);
            tokens.position_t.extend((chunk.start..chunk.start + len).map(|p| p as u32));
            tokens.policy_t.extend(std::iter::repeat_n(policy as u16, len));
            segments.push(Segment { start: chunk.start, len, blocks: chunk.blocks.clone() });
        }
        if !tokens.surprisal_t.is_empty() {
            tokens.surprisal_t.resize(tokens.token_t.len(), f32::NAN);
        }
        if policies.iter().any(|p| !p.batch_invariant()) {
            (tokens.tenant_t, tokens.decodes_t) = self.company(plan);
        }
        let layout = StepLayout::new(segments, &self.kv, self.model.backend())?;
        let logit_rows: Vec<u32> = rows.iter().map(|r| r.row).collect();
        let input = StepInput { tokens: &tokens.token_t, layout: &layout, logit_rows: &logit_rows };
        let mut routes = RouteCtx::new(&self.model.shape().moe, &policies, &tokens);
        let hidden = self.model.forward(&input, &mut self.kv, &mut routes)?;
        Ok(Forwarded { trace: routes.into_trace(), rows, hidden })
    }

    /// Whose every row of the step is, numbered as the tenants come, and whether it is decoded.
    fn company(&self, plan: &Plan) -> (Vec<u32>, Vec<bool>) {
        let (mut tenant_t, mut decodes_t) = (Vec::new(), Vec::new());
        let mut tenants: BTreeMap<&str, u32> = BTreeMap::new();
        for (chunk, seq) in plan.chunks.iter().filter_map(|chunk| Some((chunk, self.seqs.get(&chunk.seq)?))) {
            let next = tenants.len() as u32;
            let tenant = *tenants.entry(&seq.tenant).or_insert(next);
            tenant_t.extend(std::iter::repeat_n(tenant, chunk.tokens.len()));
            decodes_t.extend(std::iter::repeat_n(seq.decodes(chunk), chunk.tokens.len()));
        }
        (tenant_t, decodes_t)
    }

    /// Books the work of every token, to its request and to the metrics: before any request can end, so that who
    /// has read its answer finds its work counted.
    fn account(&mut self, plan: &Plan, done: &Forwarded) {
        let mut step_work = Work::default();
        // None at all in a model without mixtures.
        let layers = self.model.shape().moe.layers;
        let mut logit_rows = done.rows.iter().peekable();
        let mut row = 0;
        for chunk in &plan.chunks {
            let Some(seq) = self.seqs.get_mut(&chunk.seq) else { continue };
            let before = seq.work;
            for position in chunk.start..chunk.start + chunk.tokens.len() {
                let k_l = &done.trace.k_tl[row as usize * layers..][..layers];
                let logits = logit_rows.next_if(|logits| logits.row == row);
                let lm_head = logits.is_some_and(|logits| logits.samples || logits.score.is_some());
                row += 1;
                let expert_rows = k_l.iter().map(|k| u64::from(*k)).sum();
                let mut work = self.cost.token(position as u64 + 1, expert_rows, lm_head);
                work.forward.ran += self.cost.signals(seq.policy.signals(), lm_head);
                seq.work += work;
                step_work += work;
                seq.routed(position, k_l);
            }
            if let Some(budget) = &self.budget {
                budget.served(&seq.policy, seq.work - before);
            }
        }
        let reads = ExpertReads::of(&done.trace, self.model.expert_bytes() as u64);
        self.metrics.routed(&done.trace, &step_work, &reads, &self.expert_series);
    }

    /// Scores prompt tokens, draws a token for every sequence that has reached its end, and removes what is over.
    fn commit(&mut self, plan: &Plan, done: &Forwarded) -> candle_core::Result<()> {
        let mut drawn = Drawn::default();
        let vocab = self.model.shape().vocab;
        let rows_max = (LOGITS_BYTES_MAX / (vocab * size_of::<f32>())).max(1);
        for (part, rows) in done.rows.chunks(rows_max).enumerate() {
            let Some(hidden) = &done.hidden else { break };
            let logits = self.model.logits(hidden, part * rows_max, rows.len())?;
            timed(Part::Sampling, 0, || {
                ops::on_host(&logits, |logits| {
                    self.score(rows, logits);
                    for (row, logits) in rows.iter().zip(logits.chunks_exact(vocab)).filter(|(row, _)| row.keeps) {
                        if let Some(seq) = self.seqs.get_mut(&row.seq) {
                            seq.keep(logits);
                        }
                    }
                    self.draw(rows, logits, &mut drawn);
                })
            })?;
        }
        // Prompts that nothing is to follow end here.
        for chunk in plan.chunks.iter().filter(|c| c.samples) {
            if let Some(seq) = self.seqs.get_mut(&chunk.seq).filter(|s| !s.generates()) {
                let siblings = seq.prompt_done();
                seq.finish(FinishReason::Length, &self.metrics);
                siblings.into_iter().for_each(|mut s| s.finish(FinishReason::Length, &self.metrics));
                drawn.over.push(chunk.seq);
            }
        }
        self.sched.commit(plan, &drawn.sampled);
        for (parent, sibling, token) in drawn.forks {
            let id = self.id();
            self.sched.fork(parent, id, token);
            self.seqs.insert(id, sibling);
        }
        drawn.over.into_iter().for_each(|id| self.remove(id));
        Ok(())
    }

    /// Draws a token for every sequence that has reached its end and sends it, all of them side by side.
    fn draw(&mut self, rows: &[LogitRow], logits: &[f32], drawn: &mut Drawn) {
        let (vocab, metrics) = (self.model.shape().vocab, &self.metrics);
        let sampled = rows.iter().zip(logits.chunks_exact(vocab)).filter(|(row, _)| row.samples);
        let logits_of: BTreeMap<SeqId, &[f32]> = sampled.map(|(row, logits)| (row.seq, logits)).collect();
        let mut seqs: Vec<_> =
            self.seqs.iter_mut().filter_map(|(id, seq)| Some((*id, seq, *logits_of.get(id)?))).collect();
        let mut siblings = Vec::new();
        for (id, seq, logits) in &mut seqs {
            siblings.extend(seq.prompt_done().into_iter().map(|sibling| (*id, sibling, *logits)));
        }
        let advance = |(parent, mut sibling, logits): (SeqId, Sequence, &[f32])| {
            sibling.advance(logits, metrics).map(|token| (parent, sibling, token))
        };
        drawn.forks.par_extend(siblings.into_par_iter().filter_map(advance));
        let tokens: Vec<_> = seqs.into_par_iter().map(|(id, seq, logits)| (id, seq.advance(logits, metrics))).collect();
        for (id, token) in tokens {
            match token {
                Some(token) => drawn.sampled.push((id, token)),
                None => drawn.over.push(id),
            }
        }
    }

    fn score(&mut self, rows: &[LogitRow], logits: &[f32]) {
        let vocab = self.model.shape().vocab;
        let score = |(row, logits): (&LogitRow, &[f32])| Some((row.seq, row.score?.of(logits)));
        let told: Vec<_> = rows.par_iter().zip(logits.par_chunks_exact(vocab)).filter_map(score).collect();
        for (id, told) in told {
            if let Some(seq) = self.seqs.get_mut(&id) {
                seq.scored(told);
            }
        }
    }
}

/// Adds the rows of `chunk`, which begins at row `first` of the step, whose logits are wanted.
fn wanted_rows(chunk: &Chunk, seq: &Sequence, first: usize, rows: &mut Vec<LogitRow>) {
    let last = chunk.tokens.len() - 1;
    for i in 0..=last {
        let score = seq.scores_next(chunk.start + i);
        let samples = chunk.samples && i == last && seq.generates();
        let keeps = seq.policy.signals().surprisal;
        if score.is_some() || samples || keeps {
            rows.push(LogitRow { seq: chunk.seq, row: (first + i) as u32, score, samples, keeps });
        }
    }
}
