//! The in-repo family: what its config.json may say, what `native` means for it, models without mixtures.

use crate::checkpoint::Checkpoint;
use crate::support::{Runner, engine, repo};
use moe_serve::engine::EngineConfig;
use moe_serve::engine::api::Generate;
use moe_serve::moe::Policy;
use moe_serve::types::{DtypeChoice, Flops, GenerateRequest};
use serde_json::{Value, json};

fn gpt() -> Checkpoint {
    Checkpoint::golden("moe_lm_gpt")
}

#[test]
fn every_required_field_is_named_when_it_is_missing() {
    for golden in ["moe_lm_gpt", "moe_lm_llama", "moe_lm_relu", "moe_lm_dense"] {
        let whole = Checkpoint::golden(golden);
        // A head dimension can be told from the width; the others are no part of the network.
        let optional = ["head_dim", "router", "architectures", "bos_token_id", "eos_token_id", "torch_dtype"];
        let unused = (golden == "moe_lm_llama").then_some("dense_intermediate_size");
        for field in whole.config.keys().filter(|f| !optional.contains(&f.as_str()) && unused != Some(f.as_str())) {
            let error = whole.clone().without(field).refusal();
            assert!(error.contains(&format!("`{field}`")) && error.contains("missing"), "{golden}: {field}: {error}");
        }
    }
}

#[test]
fn values_that_make_no_sense_are_refused_with_field_and_value() {
    for (field, value, want) in [
        ("position_embedding", json!("alibi"), "must be one of learned, rope; got \"alibi\""),
        ("norm", json!("batchnorm"), "must be one of layernorm, rmsnorm; got \"batchnorm\""),
        ("norm_eps", json!(0), "above 0; got 0"),
        ("hidden_act", json!("tanh"), "must be one of swiglu, gelu, relu, silu; got \"tanh\""),
        ("hidden_act", json!(1), "must be one of swiglu, gelu, relu, silu; got 1"),
        ("bias", json!("yes"), "true or false; got \"yes\""),
        ("head_dim", json!(7), "even; got 7"),
        ("num_experts", json!(0), "got 0"),
        ("num_experts_per_tok", json!(5), "from 1 to 4; got 5"),
        ("shared_router", json!(1), "true or false; got 1"),
        ("moe_layers", json!("all"), "numbers from 0 to 3; got \"all\""),
        ("moe_layers", json!([0, 4]), "numbers from 0 to 3; got [0,4]"),
        ("moe_layers", json!([0, -1]), "got [0,-1]"),
        ("moe_layers", json!([2, 2]), "each once"),
        ("dense_intermediate_size", json!(0), "got 0"),
        ("quantization_config", json!({"quant_method": "awq"}), "awq"),
        ("router", json!(0.8), "must be a router as a string; got 0.8"),
        ("router", json!("dynk:"), "an argument is empty"),
        ("router", json!("router66:1"), "there is no such router"),
        ("router", json!("topk:9"), "from 1 to 4 for this model; got 9"),
        ("router", json!("native"), "name the rule itself"),
        ("router", json!("topk:1,weights=renorm"), "`norm_topk_prob` says what they are"),
        ("router", json!("dynk:0.8,mass=full"), "can take 4 experts per token"),
        ("router", json!("topk:2"), "can take 2 experts per token"),
    ] {
        let error = gpt().with(field, value.clone()).refusal();
        let named = error.contains("config.json") && error.contains(&format!("`{field}`"));
        assert!(named && error.contains(want), "{field} = {value}: {error}");
    }
}

#[test]
fn tensors_must_be_those_that_config_json_asks_for() {
    for (field, value, want) in [
        ("hidden_act", json!("swiglu"), "gate_proj.weight` is missing"),
        ("shared_router", json!(true), "`model.gate.weight` is missing"),
        ("bias", json!(false), "has no place for: model.layers.0"),
        ("norm", json!("rmsnorm"), "has no place for: model.layers.0.input_layernorm.bias"),
        ("tie_word_embeddings", json!(false), "`lm_head.weight` is missing"),
        ("moe_layers", json!([0, 1, 2]), "`model.layers.1.block_sparse_moe.gate.weight` is missing"),
        ("max_position_embeddings", json!(64), "`model.embed_positions.weight` has shape [128, 32]"),
    ] {
        let error = gpt().with(field, value.clone()).refusal();
        assert!(error.contains(want), "{field} = {value}: {error}");
    }
}

/// Logits of every token of a prompt under `router`, and the experts used per token and layer.
fn run(checkpoint: &Checkpoint, router: &str) -> (Vec<Vec<f32>>, Vec<u16>) {
    let loaded = checkpoint.try_load().unwrap();
    let mut runner = Runner::new(&loaded.model, 1, 32, router);
    let ids: Vec<u32> = (0..24).map(|i| i * 7 % 80).collect();
    (runner.step(&[(0, &ids)]), std::mem::take(&mut runner.last_trace.k_tl))
}

#[test]
fn native_is_the_router_that_the_checkpoint_was_trained_with() {
    let relu = Checkpoint::golden("moe_lm_relu");
    let native = run(&relu, "native");
    assert_eq!(native, run(&relu, "dynk:0.7,mass=full"));
    assert_eq!(native, run(&relu, "dynk:0.7"), "the native mass is the whole, since k0 is E");
    assert!(native.1.contains(&1) && native.1.iter().any(|k| *k > 1), "{:?}", native.1);
    assert_ne!(native, run(&relu, "topk:6"));

    let random = relu.clone().with("router", json!("uniform:2,seed=7"));
    assert_eq!(run(&random, "native"), run(&relu, "uniform:2,seed=7"));
    assert_eq!(run(&relu.clone().without("router"), "native"), run(&relu, "topk:6"));
    assert_eq!(run(&relu.with("router", Value::Null), "native,weights=keep").1, [6; 48]);
}

#[test]
fn native_says_what_it_stands_for() {
    let means = |golden: &str, router: &str| {
        let loaded = Checkpoint::golden(golden).try_load().unwrap();
        Policy::build(&router.parse().unwrap(), &loaded.model.shape().moe).unwrap().describe()
    };
    assert!(means("moe_lm_relu", "native").starts_with("dynk:0.7,mass=full, as trained: k in 1..=6, share 0.7"));
    assert_eq!(
        means("moe_lm_llama", "native"),
        "k = 2 of 6 experts (the checkpoint's own); weights renormalised to sum 1"
    );
    assert!(means("moe_lm_dense", "dynk:0.5").contains("no mixtures"));
}

#[test]
fn what_a_trained_rule_saves_is_counted_against_all_of_its_experts() {
    let dir = repo("tests/golden/moe_lm_relu");
    let engine = engine(&dir, DtypeChoice::F32, "native", EngineConfig::default());
    let request = GenerateRequest { ignore_eos: true, ..GenerateRequest::greedy((0..9).collect(), 8) };
    let work = engine.submit(request).unwrap().wait().unwrap().2.work;
    // Two mixtures of six nets 24 wide, of two products each.
    let expert = 4 * 32 * 24;
    assert_eq!(work.experts.native, 16 * 2 * 6 * expert);
    assert_eq!(work.experts.ran, work.expert_rows * expert);
    assert!(work.experts.saved() > 0.3 && work.forward.saved() > 0.0);
}

#[test]
fn a_model_without_mixtures_is_served_and_counted_with_every_router() {
    let dir = repo("tests/golden/moe_lm_dense");
    for router in ["native", "dynk:0.8", "layers:1", "uniform:1"] {
        let engine = engine(&dir, DtypeChoice::Bf16, router, EngineConfig::default());
        let greedy = GenerateRequest::greedy((0..9).collect(), 8);
        let request = GenerateRequest { ignore_eos: true, trace: true, ..greedy };
        let (_, _, usage) = engine.submit(request).unwrap().wait().unwrap();
        assert_eq!((usage.completion_tokens, usage.work.tokens, usage.work.moe_visits), (8, 16, 0));
        assert_eq!((usage.work.experts, usage.work.experts_per_token()), (Flops::default(), 0.0));
        assert_eq!((usage.work.forward.saved(), usage.work.forward.ran > 0), (0.0, true));
        let metrics = engine.metrics();
        assert!(metrics.contains("moe_flops_saved_ratio{scope=\"experts\"} 0\n"), "{metrics}");
        assert!(!metrics.contains("NaN"), "{metrics}");
        assert!(engine.info().router_means.contains("no mixtures"));
    }
}

#[test]
fn learned_positions_bound_the_context() {
    let dir = gpt().write();
    let load = |n| {
        let options = moe_serve::model::LoadOptions { max_model_len: Some(n), ..Default::default() };
        moe_serve::model::load(&crate::support::files(dir.path()), &options, |_, _| {})
    };
    assert_eq!(load(128).unwrap().max_model_len, 128);
    assert!(load(129).unwrap_err().to_string().contains("between 1 and 128"));
}
