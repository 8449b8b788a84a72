//! Which tokens of which sequences run next, and which KV blocks they hold: pure, synchronous, plain integers.
//!
//! A step is a budget of tokens. Sequences that decode come first, so that a long prompt never delays them by
//! more than a step; prompts fill what is left, in chunks. Out of blocks, the youngest sequence gives its own
//! back and is recomputed later.

mod blocks;

use crate::types::{BlockId, SeqId};
use blocks::BlockPool;
use std::collections::{HashMap, VecDeque};

/// Sizes of the scheduler's world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedConfig {
    /// KV blocks there are.
    pub blocks: usize,
    /// Positions per block.
    pub block_size: usize,
    /// Sequences that run at the same time.
    pub max_num_seqs: usize,
    /// Tokens per step; at least `max_num_seqs`, so that every running sequence can decode in every step.
    pub max_batched_tokens: usize,
}

/// What one step computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub chunks: Vec<Chunk>,
    /// Sequences that lost their blocks; they wait again.
    pub preempted: Vec<SeqId>,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub seq: SeqId,
    /// First position.
    pub start: usize,
    pub len: usize,
    /// Whether the chunk reaches the sequence's last known token, so that the next one is sampled.
    pub samples: bool,
    /// Blocks of positions `0..start + len`.
    pub blocks: Vec<BlockId>,
}

/// One sequence's progress.
#[derive(Debug)]
struct Seq {
    /// Prompt and generated tokens so far.
    known: usize,
    /// Positions whose keys and values are in the cache.
    computed: usize,
    blocks: Vec<BlockId>,
}

impl Seq {
    fn left(&self) -> usize {
        self.known - self.computed
    }
}

/// Plans steps and keeps account of blocks.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedConfig,
    pool: BlockPool,
    seqs: HashMap<SeqId, Seq>,
    /// First come, first served; a preempted sequence goes to the front.
    waiting: VecDeque<SeqId>,
    /// In order of admission.
    running: Vec<SeqId>,
}

impl Scheduler {
    /// `max_batched_tokens` is raised to `max_num_seqs` where it is below.
    pub fn new(config: SchedConfig) -> Self {
        let max_batched_tokens = config.max_batched_tokens.max(config.max_num_seqs).max(1);
        let config = SchedConfig { max_batched_tokens, max_num_seqs: config.max_num_seqs.max(1), ..config };
        let pool = BlockPool::new(config.blocks);
        Self { config, pool, seqs: HashMap::new(), waiting: VecDeque::new(), running: Vec::new() }
    }

    /// Positions one sequence can have when it has the cache to itself.
    pub fn capacity(&self) -> usize {
        self.config.blocks * self.config.block_size
    }

    /// Adds a sequence of `prompt` tokens. The caller sees to it that prompt and completion fit [`Self::capacity`].
    pub fn add(&mut self, id: SeqId, prompt: usize) {
        debug_assert!(prompt > 0 && prompt <= self.capacity());
        let replaced = self.seqs.insert(id, Seq { known: prompt, computed: 0, blocks: Vec::new() });
        debug_assert!(replaced.is_none(), "{id:?} was added twice");
        self.waiting.push_back(id);
    }

    /// Removes a sequence wherever it is and frees its blocks.
    pub fn remove(&mut self, id: SeqId) {
        if let Some(seq) = self.seqs.remove(&id) {
            self.pool.free(seq.blocks);
            self.waiting.retain(|w| *w != id);
            self.running.retain(|r| *r != id);
        }
    }

    /// Decides the next step. Every plan must be followed by [`Self::commit`].
    pub fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        let mut budget = self.config.max_batched_tokens;
        self.plan_decodes(&mut plan, &mut budget);
        self.plan_prefills(&mut plan, &mut budget);
        if plan.preempted.is_empty() {
            self.admit(&mut plan, &mut budget);
        }
        plan
    }

    fn plan_decodes(&mut self, plan: &mut Plan, budget: &mut usize) {
        let mut i = 0;
        while i < self.running.len() && *budget > 0 {
            let id = self.running[i];
            if self.seqs[&id].left() != 1 {
                i += 1;
                continue;
            }
            // Those before i are planned already; the youngest is at the end.
            while !self.reserve(id, 1) {
                let victim = self.running[self.running.len() - 1];
                self.preempt(victim, plan);
                if victim == id {
                    return;
                }
            }
            self.schedule(id, 1, plan, budget);
            i += 1;
        }
    }

    fn plan_prefills(&mut self, plan: &mut Plan, budget: &mut usize) {
        let mut i = 0;
        while i < self.running.len() && *budget > 0 {
            let id = self.running[i];
            i += 1;
            if self.seqs[&id].left() <= 1 {
                continue;
            }
            let want = self.seqs[&id].left().min(*budget);
            while self.room(id) == 0 {
                let youngest = self.running[self.running.len() - 1];
                // A sequence of this step keeps its blocks; it frees them when it ends.
                if youngest == id || plan.chunks.iter().any(|c| c.seq == youngest) {
                    break;
                }
                self.preempt(youngest, plan);
            }
            let len = want.min(self.room(id));
            if len > 0 && self.reserve(id, len) {
                self.schedule(id, len, plan, budget);
            }
        }
    }

    fn admit(&mut self, plan: &mut Plan, budget: &mut usize) {
        while *budget > 0 && self.running.len() < self.config.max_num_seqs {
            let Some(&id) = self.waiting.front() else { return };
            // Room for all that is known and the next token: what is admitted should not be preempted at once.
            // Who waits first is admitted first, also when a shorter one would fit.
            let known = self.seqs[&id].known;
            if self.pool.available() < (known + 1).min(self.capacity()).div_ceil(self.config.block_size) {
                return;
            }
            self.waiting.pop_front();
            self.running.push(id);
            let len = known.min(*budget);
            let reserved = self.reserve(id, len);
            debug_assert!(reserved, "blocks were counted just now");
            self.schedule(id, len, plan, budget);
        }
    }

    /// Positions `id` can still compute with its own and all free blocks.
    fn room(&self, id: SeqId) -> usize {
        let seq = &self.seqs[&id];
        (seq.blocks.len() + self.pool.available()) * self.config.block_size - seq.computed
    }

    /// Gives `id` the blocks for `len` more positions, or nothing if there are too few.
    fn reserve(&mut self, id: SeqId, len: usize) -> bool {
        let Some(seq) = self.seqs.get_mut(&id) else { return false };
        let need = (seq.computed + len).div_ceil(self.config.block_size);
        self.pool.take(need.saturating_sub(seq.blocks.len()), &mut seq.blocks)
    }

    fn schedule(&mut self, id: SeqId, len: usize, plan: &mut Plan, budget: &mut usize) {
        let seq = &self.seqs[&id];
        *budget -= len;
        plan.chunks.push(Chunk {
            seq: id,
            start: seq.computed,
            len,
            samples: seq.left() == len,
            blocks: seq.blocks.clone(),
        });
    }

    fn preempt(&mut self, id: SeqId, plan: &mut Plan) {
        if let Some(seq) = self.seqs.get_mut(&id) {
            seq.computed = 0;
            self.pool.free(std::mem::take(&mut seq.blocks));
        }
        self.running.retain(|r| *r != id);
        self.waiting.push_front(id);
        plan.preempted.push(id);
    }

    /// Books what a plan computed: sequences whose chunk samples have one more token.
    pub fn commit(&mut self, plan: &Plan) {
        for chunk in &plan.chunks {
            if let Some(seq) = self.seqs.get_mut(&chunk.seq) {
                seq.computed += chunk.len;
                seq.known += usize::from(chunk.samples);
            }
        }
    }

    /// Sequences that wait for admission.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Blocks in use, and blocks in all.
    pub fn blocks_used(&self) -> (usize, usize) {
        (self.config.blocks - self.pool.available(), self.config.blocks)
    }
}

#[cfg(test)]
mod tests;
