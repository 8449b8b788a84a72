//! Every estimator in the engine that serves: what it makes of a token does not depend on how the token came.

use crate::support::{engine, repo};
use moe_serve::engine::api::{Event, Generate, TokenReport};
use moe_serve::engine::{Engine, EngineConfig, RequestRouters};
use moe_serve::moe::router::ESTIMATORS;
use moe_serve::types::{DtypeChoice, GenerateRequest, RouterSpec, Usage};

const PROMPT: &str = "Once upon a time there was a king who had three sons and a garden full of golden apples";

fn bundled(config: EngineConfig) -> Engine {
    let request_routers = Some(RequestRouters { experts_max: Some(8), ..Default::default() });
    engine(&repo("models/stories"), DtypeChoice::Auto, "native", EngineConfig { request_routers, ..config })
}

/// `complexity` by every estimator, with room to differ.
fn routers() -> Vec<RouterSpec> {
    let names = ESTIMATORS.iter().map(|entry| if entry.calibrates { entry.name } else { "constant:0.4" });
    names.chain(["gradient-norm:entropy"]).map(|name| format!("complexity:{name},max=8").parse().unwrap()).collect()
}

/// Experts per position and layer of prompt and completion (but for its last token), the tokens, and what it used.
fn traced(engine: &Engine, request: GenerateRequest) -> (Vec<Vec<u16>>, Vec<u32>, Usage) {
    let mut events = engine.submit(GenerateRequest { trace: true, ..request }).unwrap();
    let (mut experts, mut tokens): (Vec<Vec<u16>>, Vec<TokenReport>) = Default::default();
    loop {
        match events.blocking_next() {
            Some(Event::Prompt(told)) => experts = told.experts.into_iter().map(Option::unwrap).collect(),
            Some(Event::Text { tokens: more, .. }) => tokens.extend(more),
            Some(Event::Done { usage, .. }) => {
                // The pass that drew the first token is the one over the prompt's last.
                experts.extend(tokens.iter().skip(1).map(|token| token.experts.clone()));
                return (experts, tokens.iter().map(|token| token.id).collect(), usage);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_token_gets_the_same_experts_in_a_prompt_in_chunks_and_as_a_completion() {
    let whole = bundled(EngineConfig { prefix_cache: false, ..Default::default() });
    let chunked =
        bundled(EngineConfig { prefix_cache: false, max_batched_tokens: 7, max_num_seqs: 3, ..Default::default() });
    let prompt = whole.encode(PROMPT, true).unwrap();
    for router in routers() {
        let request = |prompt: &[u32], max_tokens| GenerateRequest {
            router: Some(router.clone()),
            ignore_eos: true,
            ..GenerateRequest::greedy(prompt.to_vec(), max_tokens)
        };
        let (generated, tokens, _) = traced(&whole, request(&prompt, 12));
        let all = [prompt.as_slice(), &tokens[..11]].concat();
        let (as_prompt, ..) = traced(&whole, request(&all, 0));
        assert_eq!(generated, as_prompt, "{router}");
        let (in_chunks, ..) = traced(&chunked, request(&all, 0));
        assert_eq!(in_chunks, as_prompt, "{router}");
        let counts: std::collections::BTreeSet<u16> = as_prompt.iter().flatten().copied().collect();
        assert_eq!(counts.len() > 1, !router.args[0].starts_with("constant"), "{router} takes {counts:?} experts");
    }
}

#[test]
fn tokens_of_different_estimators_share_a_step_and_get_what_they_get_alone() {
    let engine = bundled(EngineConfig { prefix_cache: false, ..Default::default() });
    let prompt = engine.encode(PROMPT, true).unwrap();
    let requests: Vec<GenerateRequest> = routers()
        .into_iter()
        .map(|router| GenerateRequest { router: Some(router), ..GenerateRequest::greedy(prompt.clone(), 8) })
        .collect();
    let alone: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap().wait().unwrap()).collect();
    let together: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
    let together: Vec<_> = together.into_iter().map(|events| events.wait().unwrap()).collect();
    assert_eq!(together, alone);
}

#[test]
fn what_a_router_computes_for_itself_is_a_cost_of_the_forward_pass() {
    let engine = bundled(EngineConfig { prefix_cache: false, ..Default::default() });
    let prompt = engine.encode(PROMPT, true).unwrap();
    let work = |router: &str| {
        let request =
            GenerateRequest { router: Some(router.parse().unwrap()), ..GenerateRequest::greedy(prompt.clone(), 1) };
        traced(&engine, request).2.work
    };
    // One expert of two either way, so that what differs is what the estimator costs.
    let plain = work("complexity:router-margin,max=1");
    assert_eq!(plain.forward.native - plain.forward.ran, plain.experts.native - plain.experts.ran);
    let extra = |name: &str| {
        let work = work(&format!("complexity:{name},max=1"));
        assert_eq!((work.experts, work.forward.native), (plain.experts, plain.forward.native), "{name}");
        work.forward.ran - plain.forward.ran
    };
    let tokens = prompt.len() as u64;
    let (layers, width, experts, vocab) = (6, 192, 8, 4096);
    assert_eq!(extra("gradient-norm"), tokens * layers * 2 * experts * experts);
    assert_eq!(extra("logit-lens"), tokens * layers * 2 * width * 32);
    // The last token's logits are wanted anyway.
    assert_eq!(extra("surprisal"), (tokens - 1) * 2 * width * vocab);
    assert_eq!(extra("hidden-norm"), 0);
}

#[test]
fn who_reads_surprisal_takes_nothing_over_from_the_prefix_cache() {
    let engine = bundled(EngineConfig::default());
    let prompt = engine.encode(&PROMPT.repeat(3), true).unwrap();
    for (router, cached) in [("complexity:surprisal", 0), ("complexity:router-entropy", (prompt.len() - 1) / 16 * 16)] {
        let request =
            || GenerateRequest { router: Some(router.parse().unwrap()), ..GenerateRequest::greedy(prompt.clone(), 2) };
        let first = engine.submit(request()).unwrap().wait().unwrap();
        let second = engine.submit(request()).unwrap().wait().unwrap();
        assert_eq!((second.2.cached_tokens, &second.0), (cached, &first.0), "{router}");
    }
}
