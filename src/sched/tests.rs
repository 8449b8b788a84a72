//! The scheduler against random worlds: no model needed.

use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

fn scheduler(blocks: usize, block_size: usize, max_num_seqs: usize, max_batched_tokens: usize) -> Scheduler {
    Scheduler::new(SchedConfig { blocks, block_size, max_num_seqs, max_batched_tokens })
}

fn new_seq(tokens: Vec<TokenId>) -> NewSeq {
    NewSeq { tokens, root: Some(BlockHash::root("native", "")), reuse_max: usize::MAX, chunk_max: usize::MAX }
}

/// Commits a plan whose sampling chunks all drew `token`.
fn commit(s: &mut Scheduler, plan: &Plan, token: TokenId) {
    let sampled: Vec<_> = plan.chunks.iter().filter(|c| c.samples).map(|c| (c.seq, token)).collect();
    s.commit(plan, &sampled);
}

fn lens(plan: &Plan) -> Vec<usize> {
    plan.chunks.iter().map(|c| c.tokens.len()).collect()
}

#[test]
fn a_long_prompt_is_chunked_and_decodes_go_first() {
    let mut s = scheduler(100, 4, 4, 8);
    s.add(SeqId(1), new_seq(vec![1; 3]));
    let plan = s.plan();
    assert_eq!((lens(&plan), plan.chunks[0].samples), (vec![3], true));
    commit(&mut s, &plan, 9);
    s.add(SeqId(2), new_seq((0..20).collect()));
    for (len, samples) in [(7, false), (7, false), (6, true)] {
        let plan = s.plan();
        assert_eq!((plan.chunks[0].seq, &plan.chunks[0].tokens[..]), (SeqId(1), &[9][..]));
        assert_eq!((plan.chunks[1].seq, plan.chunks[1].tokens.len(), plan.chunks[1].samples), (SeqId(2), len, samples));
        commit(&mut s, &plan, 9);
    }
    assert_eq!(lens(&s.plan()), [1, 1]);
}

#[test]
fn out_of_blocks_the_youngest_is_preempted_and_comes_back_first() {
    let mut s = scheduler(4, 2, 4, 16);
    s.add(SeqId(1), new_seq(vec![1; 3]));
    s.add(SeqId(2), new_seq(vec![2; 3]));
    s.add(SeqId(3), new_seq(vec![3]));
    let plan = s.plan();
    assert_eq!(plan.chunks.len(), 2, "two sequences of two blocks fill the cache");
    commit(&mut s, &plan, 9);
    let plan = s.plan();
    assert_eq!(plan.chunks.len(), 2, "position 3 fits the second block");
    commit(&mut s, &plan, 9);
    let plan = s.plan();
    assert_eq!((plan.chunks.len(), &plan.preempted[..]), (1, &[SeqId(2)][..]));
    commit(&mut s, &plan, 9);
    s.remove(SeqId(1));
    // One of its two full blocks was taken by the other sequence, the beginning is still there.
    let plan = s.plan();
    assert_eq!((plan.chunks[0].seq, plan.chunks[0].start, lens(&plan)[0]), (SeqId(2), 2, 3));
}

#[test]
fn a_prompt_takes_over_the_full_blocks_of_an_earlier_one_but_not_its_own_last_token() {
    let mut s = scheduler(16, 4, 4, 64);
    s.add(SeqId(1), new_seq((0..10).collect()));
    let plan = s.plan();
    commit(&mut s, &plan, 50);
    s.remove(SeqId(1));
    assert_eq!(s.blocks_used().0, 0, "cached blocks count as free");
    s.add(SeqId(2), new_seq((0..9).chain([77]).collect()));
    let plan = s.plan();
    assert_eq!((plan.admitted[0].cached, plan.chunks[0].start, lens(&plan)[0]), (8, 8, 2));
    commit(&mut s, &plan, 50);
    s.add(SeqId(3), new_seq((0..8).collect()));
    let plan = s.plan();
    let chunk = plan.chunks.iter().find(|c| c.seq == SeqId(3)).unwrap();
    assert_eq!((plan.admitted[0].cached, chunk.start, chunk.tokens.len()), (4, 4, 4), "the last token is computed");
}

#[test]
fn blocks_are_shared_neither_across_policies_nor_salts_nor_beyond_what_may_be_reused() {
    let root = |policy: &str, salt: &str| Some(BlockHash::root(policy, salt));
    for (root, reuse_max, cached) in [
        (root("native", ""), usize::MAX, 8),
        (root("native", ""), 7, 4),
        (root("native", ""), 0, 0),
        (root("dynk:0.8", ""), usize::MAX, 0),
        (root("native", "tenant"), usize::MAX, 0),
        (root("", "native"), usize::MAX, 0),
        (None, usize::MAX, 0),
    ] {
        let mut s = scheduler(16, 4, 4, 64);
        s.add(SeqId(1), new_seq((0..10).collect()));
        let plan = s.plan();
        commit(&mut s, &plan, 50);
        s.add(SeqId(2), NewSeq { tokens: (0..10).collect(), root, reuse_max, chunk_max: usize::MAX });
        assert_eq!(s.plan().admitted, [Admitted { seq: SeqId(2), cached }]);
    }
}

#[test]
fn a_fork_shares_all_blocks_until_one_of_the_two_writes() {
    let mut s = scheduler(16, 4, 4, 64);
    s.add(SeqId(1), new_seq((0..6).collect()));
    let plan = s.plan();
    commit(&mut s, &plan, 50);
    s.fork(SeqId(1), SeqId(2), 51);
    assert_eq!(s.blocks_used().0, 2);
    let plan = s.plan();
    assert_eq!(plan.chunks.iter().map(|c| c.tokens[0]).collect::<Vec<_>>(), [50, 51]);
    let (a, b) = (&plan.chunks[0].blocks, &plan.chunks[1].blocks);
    assert_eq!(a[0], b[0], "the full block stays shared");
    assert_eq!(plan.copies, [(b[1], a[1])], "who writes first gets the copy, the other keeps the block");
    commit(&mut s, &plan, 52);
    assert!(s.plan().copies.is_empty());
    s.remove(SeqId(1));
    assert_eq!(s.blocks_used().0, 2);
    s.remove(SeqId(2));
    assert_eq!(s.blocks_used().0, 0);
}

#[test]
fn a_fork_beyond_the_sequences_that_may_run_waits_before_all_others() {
    let mut s = scheduler(16, 4, 1, 64);
    s.add(SeqId(1), new_seq((0..6).collect()));
    let plan = s.plan();
    commit(&mut s, &plan, 50);
    s.add(SeqId(2), new_seq(vec![1]));
    s.fork(SeqId(1), SeqId(3), 51);
    assert_eq!((s.running(), s.waiting()), (1, 2));
    s.remove(SeqId(1));
    let plan = s.plan();
    assert_eq!((plan.chunks[0].seq, plan.chunks[0].start, &plan.chunks[0].tokens[..]), (SeqId(3), 4, &[4, 5, 51][..]));
}

/// What a position's keys and values depend on, as one number: the chain's beginning and all tokens so far.
fn kv_of(root: u64, tokens: &[TokenId]) -> u64 {
    tokens.iter().fold(root, |h, t| {
        (h ^ u64::from(*t)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23) ^ 0xD1B5_4A32_D192_ED03
    })
}

/// The token that a model would draw after a position with these keys and values.
fn token_after(kv: u64) -> TokenId {
    (kv >> 7) as TokenId % 5
}

/// A sequence as the test knows it.
#[derive(Clone, Debug)]
struct Model {
    /// Prompt and what was drawn.
    tokens: Vec<TokenId>,
    prompt: usize,
    total: usize,
    computed: usize,
    root: u64,
    forks: usize,
}

/// Random worlds: what is in the cache is computed, as a model would, from what the blocks of a plan hold.
struct World {
    s: Scheduler,
    config: SchedConfig,
    random: u64,
    live: HashMap<SeqId, Model>,
    kv: HashMap<(BlockId, usize), u64>,
    next: u64,
    preemptions: usize,
    copies: usize,
    cached: usize,
    finished: usize,
}

impl World {
    fn new(seed: u64, config: SchedConfig) -> Self {
        let (s, live, kv) = (Scheduler::new(config), HashMap::new(), HashMap::new());
        Self { s, config, random: seed, live, kv, next: 0, preemptions: 0, copies: 0, cached: 0, finished: 0 }
    }

    fn random(&mut self, n: usize) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) as usize % n
    }

    fn id(&mut self) -> SeqId {
        self.next += 1;
        SeqId(self.next)
    }

    fn arrive(&mut self) {
        let total = 2 + self.random(self.config.blocks * self.config.block_size - 1);
        let prompt = 1 + self.random(total - 1);
        let root = self.random(3) as u64;
        // Few different beginnings, so that prompts meet.
        let variant = self.random(3);
        let tokens: Vec<TokenId> = (0..prompt).map(|i| if i < 9 { 0 } else { (i * variant) as TokenId % 5 }).collect();
        let reuse_max = if self.random(4) == 0 { self.random(prompt) } else { usize::MAX };
        let forks = if self.random(4) == 0 { self.random(4) } else { 0 };
        let id = self.id();
        // Root 2 never shares.
        let hash = (root < 2).then(|| BlockHash::root("policy", &root.to_string()));
        self.s.add(id, NewSeq { tokens: tokens.clone(), root: hash, reuse_max, chunk_max: usize::MAX });
        self.live.insert(id, Model { tokens, prompt, total, computed: 0, root, forks });
    }

    fn abort(&mut self) {
        let mut ids: Vec<SeqId> = self.live.keys().copied().collect();
        ids.sort_unstable();
        let id = ids[self.random(ids.len())];
        self.s.remove(id);
        self.live.remove(&id);
    }

    /// One step, computed and checked.
    fn step(&mut self) {
        let plan = self.s.plan();
        assert!(!plan.chunks.is_empty() || self.live.is_empty(), "nothing planned though {} wait", self.live.len());
        self.preemptions += plan.preempted.len();
        self.copies += plan.copies.len();
        plan.preempted.iter().for_each(|id| self.live.get_mut(id).unwrap().computed = 0);
        for admitted in &plan.admitted {
            self.live.get_mut(&admitted.seq).unwrap().computed = admitted.cached;
            self.cached += admitted.cached;
        }
        self.check(&plan);
        for (from, to) in &plan.copies {
            for offset in 0..self.config.block_size {
                match self.kv.get(&(*from, offset)).copied() {
                    Some(kv) => self.kv.insert((*to, offset), kv),
                    None => self.kv.remove(&(*to, offset)),
                };
            }
        }
        let drawn: Vec<(SeqId, TokenId)> = plan.chunks.iter().filter_map(|chunk| self.compute(chunk)).collect();
        self.s.commit(&plan, &drawn);
        for (id, token) in drawn {
            self.live.get_mut(&id).unwrap().tokens.push(token);
            self.fork(id, token);
            self.finish(id);
        }
    }

    /// Computes a chunk from what its blocks hold; gives the token drawn after it.
    fn compute(&mut self, chunk: &Chunk) -> Option<(SeqId, TokenId)> {
        let size = self.config.block_size;
        let slot = |p: usize| (chunk.blocks[p / size], p % size);
        let seq = self.live.get_mut(&chunk.seq).unwrap();
        let mut kv = match chunk.start {
            0 => seq.root,
            start => self.kv[&slot(start - 1)],
        };
        // Attention sees every earlier position, not the last alone.
        for p in 0..chunk.start {
            assert_eq!(self.kv[&slot(p)], kv_of(seq.root, &seq.tokens[..=p]), "position {p} of {:?}", chunk.seq);
        }
        for (i, token) in chunk.tokens.iter().enumerate() {
            kv = kv_of(kv, &[*token]);
            self.kv.insert(slot(chunk.start + i), kv);
        }
        seq.computed += chunk.tokens.len();
        chunk.samples.then(|| (chunk.seq, token_after(kv)))
    }

    /// Forks a sequence that has just drawn its first token, as a request for several completions does.
    fn fork(&mut self, parent: SeqId, token: TokenId) {
        let forks = std::mem::take(&mut self.live.get_mut(&parent).unwrap().forks);
        for i in 0..forks {
            let child = self.id();
            let other = (token + i as TokenId) % 5;
            self.s.fork(parent, child, other);
            let mut model = self.live[&parent].clone();
            *model.tokens.last_mut().unwrap() = other;
            model.prompt = model.tokens.len();
            self.live.insert(child, model);
            self.finish(child);
        }
    }

    fn finish(&mut self, id: SeqId) {
        let seq = &self.live[&id];
        if seq.tokens.len() < seq.total {
            return;
        }
        // What came out is what the sequence alone would have given.
        for n in seq.prompt..seq.total {
            assert_eq!(seq.tokens[n], token_after(kv_of(seq.root, &seq.tokens[..n])), "token {n} of {id:?}");
        }
        self.s.remove(id);
        self.live.remove(&id);
        self.finished += 1;
    }

    fn check(&self, plan: &Plan) {
        let config = &self.config;
        let mut planned = HashSet::new();
        let mut written = HashSet::new();
        let tokens: usize = plan.chunks.iter().map(|c| c.tokens.len()).sum();
        assert!(tokens <= config.max_batched_tokens.max(config.max_num_seqs));
        assert!(plan.chunks.len() <= config.max_num_seqs);
        for chunk in &plan.chunks {
            let (seq, len) = (&self.live[&chunk.seq], chunk.tokens.len());
            assert!(planned.insert(chunk.seq), "{:?} is planned twice", chunk.seq);
            if chunk.start != seq.computed {
                // A fork that had to wait was computed anew, from what the cache had.
                assert!(seq.computed == seq.tokens.len() - 1 || plan.admitted.iter().any(|a| a.seq == chunk.seq));
            }
            assert!(len > 0 && chunk.start + len <= seq.tokens.len());
            assert_eq!(chunk.tokens, seq.tokens[chunk.start..][..len]);
            assert_eq!(chunk.samples, chunk.start + len == seq.tokens.len());
            assert!(chunk.blocks.len() * config.block_size >= chunk.start + len);
            for p in chunk.start..chunk.start + len {
                let block = chunk.blocks[p / config.block_size];
                assert!((block.0 as usize) < config.blocks);
                assert!(written.insert((block, p % config.block_size)), "{block:?} is written twice");
            }
        }
    }

    /// Random arrivals and aborts for `steps` steps, then until all have ended.
    fn run(&mut self, steps: usize) {
        let mut step = 0;
        while step < steps || !self.live.is_empty() {
            step += 1;
            assert!(step < steps + 200_000, "{} sequences never end", self.live.len());
            if step < steps && self.random(3) == 0 && self.live.len() < 30 {
                self.arrive();
            }
            if step < steps && self.random(20) == 0 && !self.live.is_empty() {
                self.abort();
            }
            self.step();
        }
        assert_eq!(self.s.blocks_used().0, 0, "blocks leaked");
        assert_eq!((self.s.waiting(), self.s.running()), (0, 0));
        assert!(self.finished > 0 || self.next == 0);
    }
}

#[test]
fn a_hundred_thousand_steps_of_arrivals_aborts_forks_and_preemptions_leak_nothing_and_change_no_token() {
    let config = SchedConfig { blocks: 24, block_size: 4, max_num_seqs: 6, max_batched_tokens: 16 };
    let mut world = World::new(1, config);
    world.run(100_000);
    // Else the test would prove little.
    assert!(world.preemptions > 1000, "only {} preemptions", world.preemptions);
    assert!(world.copies > 500, "only {} copies", world.copies);
    assert!(world.cached > 50_000, "only {} tokens came from the cache", world.cached);
    assert!(world.finished > 5000, "only {} sequences", world.finished);
}

#[test]
fn the_oldest_waiting_sequence_is_never_overtaken_by_short_ones() {
    let mut s = scheduler(8, 4, 8, 32);
    s.add(SeqId(0), new_seq(vec![0; 8]));
    let plan = s.plan();
    commit(&mut s, &plan, 0);
    s.add(SeqId(1), new_seq(vec![1; 30]));
    for step in 0..200 {
        s.add(SeqId(2 + step), new_seq(vec![2]));
        let plan = s.plan();
        if plan.chunks.iter().any(|c| c.seq == SeqId(1)) {
            return;
        }
        commit(&mut s, &plan, 0);
        if step == 10 {
            s.remove(SeqId(0));
        }
    }
    panic!("a stream of short requests starved the long one");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn every_sequence_ends_in_every_world(
        seed: u64, blocks in 2usize..20, block_size in 1usize..6, max_num_seqs in 1usize..6, max_batched_tokens in 1usize..20
    ) {
        World::new(seed, SchedConfig { blocks, block_size, max_num_seqs, max_batched_tokens }).run(300);
    }
}
