//! Which tokens of which sequences run next, and which KV blocks they hold: pure, synchronous, plain integers.
//!
//! A step is a budget of tokens. Sequences that decode come first, so that a long prompt never delays them by
//! more than a step; prompts fill what is left, in chunks. Out of blocks, the youngest sequence gives its own
//! back and is recomputed later.
//!
//! Full blocks stay findable by their contents until they are needed for others, so that a prompt takes over what
//! an earlier one has computed. Sequences with a common past share its blocks; who writes into a shared one gets a
//! copy first.

mod blocks;
mod prefix;

pub use prefix::BlockHash;

use crate::types::{BlockId, SeqId, TokenId};
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

/// A sequence that is to be computed.
#[derive(Clone, Debug)]
pub struct NewSeq {
    /// The prompt; not empty.
    pub tokens: Vec<TokenId>,
    /// Begins the hashes of its blocks; without it, they are neither looked up nor found.
    pub root: Option<BlockHash>,
    /// Leading tokens that may be taken over from the cache. At least the last token is always computed.
    pub reuse_max: usize,
    /// Most tokens of it in one step, at least 1.
    pub chunk_max: usize,
}

/// What one step computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Blocks to copy before anything is computed, in this order: (from, to).
    pub copies: Vec<(BlockId, BlockId)>,
    pub chunks: Vec<Chunk>,
    /// Sequences that left the queue.
    pub admitted: Vec<Admitted>,
    /// Sequences that lost their blocks; they wait again.
    pub preempted: Vec<SeqId>,
}

/// A sequence that left the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    pub seq: SeqId,
    /// Leading tokens that need no computing: their blocks were in the cache.
    pub cached: usize,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub seq: SeqId,
    /// Position of the first token.
    pub start: usize,
    pub tokens: Vec<TokenId>,
    /// Whether the chunk reaches the sequence's last known token, so that the next one can be sampled.
    pub samples: bool,
    /// Blocks of positions `0..start + tokens.len()`.
    pub blocks: Vec<BlockId>,
}

/// One sequence's progress.
#[derive(Clone, Debug)]
struct Seq {
    /// Prompt and generated tokens so far.
    tokens: Vec<TokenId>,
    /// Positions whose keys and values are in the cache.
    computed: usize,
    blocks: Vec<BlockId>,
    /// How many of `blocks` can be found by others.
    registered: usize,
    root: Option<BlockHash>,
    /// Of the first full blocks, as far as they were needed.
    hashes: Vec<BlockHash>,
    reuse_max: usize,
    chunk_max: usize,
}

impl Seq {
    fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The hash of full block `index`; those before it were asked for already.
    fn hash(&mut self, index: usize, block_size: usize) -> Option<BlockHash> {
        if index == self.hashes.len() {
            let parent = self.hashes.last().copied().or(self.root)?;
            self.hashes.push(parent.next(&self.tokens[index * block_size..][..block_size]));
        }
        self.hashes.get(index).copied()
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

    /// Adds a sequence. The caller sees to it that prompt and completion fit [`Self::capacity`].
    pub fn add(&mut self, id: SeqId, new: NewSeq) {
        debug_assert!(!new.tokens.is_empty() && new.tokens.len() <= self.capacity());
        let NewSeq { tokens, root, reuse_max, chunk_max } = new;
        let (blocks, hashes) = (Vec::new(), Vec::new());
        let seq = Seq { tokens, computed: 0, blocks, registered: 0, root, hashes, reuse_max, chunk_max };
        let replaced = self.seqs.insert(id, seq);
        debug_assert!(replaced.is_none(), "{id:?} was added twice");
        self.waiting.push_back(id);
    }

    /// Adds `child`, which shares all that `parent` has computed and goes on with `token`. It runs at once if one more
    /// sequence may; else it waits before all others and is computed anew.
    pub fn fork(&mut self, parent: SeqId, child: SeqId, token: TokenId) {
        let Some(mut seq) = self.seqs.get(&parent).cloned() else { return };
        seq.tokens.truncate(seq.computed);
        seq.tokens.push(token);
        // What had to be computed was.
        seq.reuse_max = usize::MAX;
        if self.running.len() < self.config.max_num_seqs && seq.computed > 0 {
            self.pool.share(&seq.blocks);
            self.running.push(child);
        } else {
            (seq.computed, seq.registered) = (0, 0);
            seq.blocks.clear();
            self.waiting.push_front(child);
        }
        self.seqs.insert(child, seq);
    }

    /// Removes a sequence wherever it is and frees its blocks.
    pub fn remove(&mut self, id: SeqId) {
        if let Some(seq) = self.seqs.remove(&id) {
            self.pool.release(seq.blocks);
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
            while !self.reserve(id, 1, plan) {
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
            let want = self.seqs[&id].left().min(self.seqs[&id].chunk_max).min(*budget);
            while self.room(id) == 0 {
                let youngest = self.running[self.running.len() - 1];
                // A sequence of this step keeps its blocks; it frees them when it ends.
                if youngest == id || plan.chunks.iter().any(|c| c.seq == youngest) {
                    break;
                }
                self.preempt(youngest, plan);
            }
            let len = want.min(self.room(id));
            if len > 0 && self.reserve(id, len, plan) {
                self.schedule(id, len, plan, budget);
            }
        }
    }

    fn admit(&mut self, plan: &mut Plan, budget: &mut usize) {
        while *budget > 0 && self.running.len() < self.config.max_num_seqs {
            let Some(&id) = self.waiting.front() else { return };
            let found = self.find_prefix(id);
            // Room for all that is known and the next token: what is admitted should not be preempted at once.
            // Who waits first is admitted first, also when a shorter one would fit.
            let known = self.seqs[&id].tokens.len();
            let blocks = (known + 1).min(self.capacity()).div_ceil(self.config.block_size) - found.len();
            let idle = found.iter().filter(|b| self.pool.is_idle(**b)).count();
            if self.pool.available() - idle < blocks {
                return;
            }
            self.waiting.pop_front();
            self.running.push(id);
            let cached = self.take_over(id, found);
            plan.admitted.push(Admitted { seq: id, cached });
            let len = (known - cached).min(self.seqs[&id].chunk_max).min(*budget);
            let reserved = self.reserve(id, len, plan);
            debug_assert!(reserved, "blocks were counted just now");
            self.schedule(id, len, plan, budget);
        }
    }

    /// The cached blocks that `id` begins with; at least its last token is left to compute.
    fn find_prefix(&mut self, id: SeqId) -> Vec<BlockId> {
        let Some(seq) = self.seqs.get_mut(&id) else { return Vec::new() };
        let reuse = seq.reuse_max.min(seq.tokens.len() - 1);
        let blocks = (0..reuse / self.config.block_size).map_while(|index| {
            let hash = seq.hash(index, self.config.block_size)?;
            self.pool.find(&hash)
        });
        blocks.collect()
    }

    /// Gives `id`, which has nothing yet, the cached blocks `found`; tells how many tokens are in them.
    fn take_over(&mut self, id: SeqId, found: Vec<BlockId>) -> usize {
        let Some(seq) = self.seqs.get_mut(&id) else { return 0 };
        self.pool.share(&found);
        seq.registered = found.len();
        seq.computed = found.len() * self.config.block_size;
        seq.blocks = found;
        seq.computed
    }

    /// Whether `seq` writes next into a block that others hold too.
    fn must_copy(&self, seq: &Seq) -> bool {
        let tail = seq.blocks.get(seq.computed / self.config.block_size);
        tail.is_some_and(|block| self.pool.is_shared(*block))
    }

    /// Positions `id` can still compute with its own and all free blocks.
    fn room(&self, id: SeqId) -> usize {
        let seq = &self.seqs[&id];
        let blocks = (seq.blocks.len() + self.pool.available()).saturating_sub(usize::from(self.must_copy(seq)));
        (blocks * self.config.block_size).saturating_sub(seq.computed)
    }

    /// Gives `id` the blocks for `len` more positions, its own copy of a shared one among them, or nothing if there
    /// are too few.
    fn reserve(&mut self, id: SeqId, len: usize, plan: &mut Plan) -> bool {
        let copies = usize::from(self.must_copy(&self.seqs[&id]));
        let Some(seq) = self.seqs.get_mut(&id) else { return false };
        let need = (seq.computed + len).div_ceil(self.config.block_size).saturating_sub(seq.blocks.len());
        let mut fresh = Vec::with_capacity(need + copies);
        if !self.pool.take(need + copies, &mut fresh) {
            return false;
        }
        if copies == 1
            && let Some(own) = fresh.pop()
        {
            let tail = &mut seq.blocks[seq.computed / self.config.block_size];
            let shared = std::mem::replace(tail, own);
            plan.copies.push((shared, own));
            self.pool.release(vec![shared]);
        }
        seq.blocks.append(&mut fresh);
        true
    }

    fn schedule(&mut self, id: SeqId, len: usize, plan: &mut Plan, budget: &mut usize) {
        let seq = &self.seqs[&id];
        *budget -= len;
        plan.chunks.push(Chunk {
            seq: id,
            start: seq.computed,
            tokens: seq.tokens[seq.computed..][..len].to_vec(),
            samples: seq.left() == len,
            blocks: seq.blocks.clone(),
        });
    }

    fn preempt(&mut self, id: SeqId, plan: &mut Plan) {
        if let Some(seq) = self.seqs.get_mut(&id) {
            (seq.computed, seq.registered) = (0, 0);
            self.pool.release(std::mem::take(&mut seq.blocks));
        }
        self.running.retain(|r| *r != id);
        self.waiting.push_front(id);
        plan.preempted.push(id);
    }

    /// Books what a plan computed: its full blocks can be found from now on, and the sequences of `sampled` have one
    /// more token.
    pub fn commit(&mut self, plan: &Plan, sampled: &[(SeqId, TokenId)]) {
        let size = self.config.block_size;
        for chunk in &plan.chunks {
            let Some(seq) = self.seqs.get_mut(&chunk.seq) else { continue };
            seq.computed += chunk.tokens.len();
            while seq.registered < seq.computed / size
                && let Some(hash) = seq.hash(seq.registered, size)
            {
                self.pool.register(seq.blocks[seq.registered], hash);
                seq.registered += 1;
            }
        }
        for (id, token) in sampled {
            if let Some(seq) = self.seqs.get_mut(id) {
                seq.tokens.push(*token);
                seq.reuse_max = usize::MAX;
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

    /// Blocks that sequences hold, and blocks in all. Cached blocks that no one holds are free for the taking.
    pub fn blocks_used(&self) -> (usize, usize) {
        (self.config.blocks - self.pool.available(), self.config.blocks)
    }
}

#[cfg(test)]
mod tests;
