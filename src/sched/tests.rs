//! The scheduler against random worlds: no model needed.

use super::*;
use proptest::prelude::*;
use std::collections::HashSet;

fn scheduler(blocks: usize, block_size: usize, max_num_seqs: usize, max_batched_tokens: usize) -> Scheduler {
    Scheduler::new(SchedConfig { blocks, block_size, max_num_seqs, max_batched_tokens })
}

#[test]
fn a_long_prompt_is_chunked_and_decodes_go_first() {
    let mut s = scheduler(100, 4, 4, 8);
    s.add(SeqId(1), 3);
    let plan = s.plan();
    assert_eq!((plan.chunks[0].len, plan.chunks[0].samples), (3, true));
    s.commit(&plan);
    s.add(SeqId(2), 20);
    for (len, samples) in [(7, false), (7, false), (6, true)] {
        let plan = s.plan();
        assert_eq!((plan.chunks[0].seq, plan.chunks[0].len), (SeqId(1), 1));
        assert_eq!((plan.chunks[1].seq, plan.chunks[1].len, plan.chunks[1].samples), (SeqId(2), len, samples));
        s.commit(&plan);
    }
    assert_eq!(s.plan().chunks.iter().map(|c| c.len).collect::<Vec<_>>(), [1, 1]);
}

#[test]
fn out_of_blocks_the_youngest_is_preempted_and_comes_back_first() {
    let mut s = scheduler(4, 2, 4, 16);
    s.add(SeqId(1), 3);
    s.add(SeqId(2), 3);
    s.add(SeqId(3), 1);
    let plan = s.plan();
    assert_eq!(plan.chunks.len(), 2, "two sequences of two blocks fill the cache");
    s.commit(&plan);
    let plan = s.plan();
    assert_eq!(plan.chunks.len(), 2, "position 3 fits the second block");
    s.commit(&plan);
    let plan = s.plan();
    assert_eq!((plan.chunks.len(), &plan.preempted[..]), (1, &[SeqId(2)][..]));
    s.commit(&plan);
    s.remove(SeqId(1));
    let plan = s.plan();
    assert_eq!((plan.chunks[0].seq, plan.chunks[0].start, plan.chunks[0].len), (SeqId(2), 0, 5));
}

/// A sequence as the test knows it.
#[derive(Debug)]
struct Model {
    prompt: usize,
    total: usize,
    known: usize,
    computed: usize,
    age: usize,
}

/// Runs random arrivals and aborts for `steps` steps, checks every plan, then drains.
fn simulate(seed: u64, steps: usize, config: SchedConfig) -> usize {
    let mut state = seed;
    let mut random = move |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let mut s = Scheduler::new(config);
    let capacity = config.blocks * config.block_size;
    let mut live: HashMap<SeqId, Model> = HashMap::new();
    let (mut next, mut preemptions, mut finished) = (0, 0, 0);
    let mut step = 0;
    while step < steps || !live.is_empty() {
        step += 1;
        assert!(step < steps + 200_000, "{} sequences never end", live.len());
        if step < steps && random(3) == 0 && live.len() < 30 {
            let total = 2 + random(capacity - 1);
            let prompt = 1 + random(total - 1);
            s.add(SeqId(next), prompt);
            live.insert(SeqId(next), Model { prompt, total, known: prompt, computed: 0, age: step });
            next += 1;
        }
        if step < steps && random(20) == 0 && !live.is_empty() {
            let mut ids: Vec<SeqId> = live.keys().copied().collect();
            ids.sort_unstable();
            let id = ids[random(ids.len())];
            s.remove(id);
            live.remove(&id);
        }
        let plan = s.plan();
        preemptions += plan.preempted.len();
        for id in &plan.preempted {
            live.get_mut(id).unwrap().computed = 0;
        }
        check(&plan, &live, &config);
        assert!(!plan.chunks.is_empty() || live.is_empty(), "nothing planned though {} wait", live.len());
        s.commit(&plan);
        for chunk in &plan.chunks {
            let seq = live.get_mut(&chunk.seq).unwrap();
            seq.computed += chunk.len;
            seq.known += usize::from(chunk.samples);
            if seq.known == seq.total {
                s.remove(chunk.seq);
                live.remove(&chunk.seq);
                finished += 1;
            }
        }
    }
    assert_eq!(s.blocks_used().0, 0, "blocks leaked");
    assert_eq!((s.waiting(), s.running()), (0, 0));
    assert!(finished > 0 || next == 0);
    preemptions
}

fn check(plan: &Plan, live: &HashMap<SeqId, Model>, config: &SchedConfig) {
    let mut held = HashSet::new();
    let mut planned = HashSet::new();
    let tokens: usize = plan.chunks.iter().map(|c| c.len).sum();
    assert!(tokens <= config.max_batched_tokens.max(config.max_num_seqs));
    assert!(plan.chunks.len() <= config.max_num_seqs);
    for chunk in &plan.chunks {
        let seq = &live[&chunk.seq];
        assert!(planned.insert(chunk.seq), "{:?} is planned twice", chunk.seq);
        assert_eq!(chunk.start, seq.computed);
        assert!(chunk.len > 0 && chunk.start + chunk.len <= seq.known);
        assert_eq!(chunk.samples, chunk.start + chunk.len == seq.known);
        assert!(chunk.blocks.len() * config.block_size >= chunk.start + chunk.len);
        for block in &chunk.blocks {
            assert!((block.0 as usize) < config.blocks && held.insert(*block), "{block:?} is held twice");
        }
        assert!(seq.prompt <= seq.known && seq.age > 0);
    }
}

#[test]
fn a_hundred_thousand_steps_of_arrivals_aborts_and_preemptions_leak_nothing() {
    let config = SchedConfig { blocks: 24, block_size: 4, max_num_seqs: 6, max_batched_tokens: 16 };
    let preemptions = simulate(1, 100_000, config);
    assert!(preemptions > 1000, "only {preemptions} preemptions: the test proves little");
}

#[test]
fn the_oldest_waiting_sequence_is_never_overtaken_by_short_ones() {
    let mut s = scheduler(8, 4, 8, 32);
    s.add(SeqId(0), 8);
    let plan = s.plan();
    s.commit(&plan);
    s.add(SeqId(1), 30);
    for step in 0..200 {
        s.add(SeqId(2 + step), 1);
        let plan = s.plan();
        if plan.chunks.iter().any(|c| c.seq == SeqId(1)) {
            return;
        }
        s.commit(&plan);
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
        simulate(seed, 300, SchedConfig { blocks, block_size, max_num_seqs, max_batched_tokens });
    }
}
