//! Damaged, lying and odd checkpoints: every one is refused by name, none panics.

use crate::checkpoint::{Checkpoint, Stored, Tensors, quiet, raw_safetensors, safetensors, tokenizer_json};
use crate::support::{Runner, files, try_load};
use moe_serve::model::hub::{HubOptions, resolve};
use moe_serve::model::{LoadOptions, load};
use moe_serve::types::DtypeChoice;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// One small checkpoint of each family.
const ONE_EACH: [&str; 5] = ["mixtral_gqa", "olmoe_mha", "qwen2_shared", "qwen3_gqa", "moe_lm_gpt"];
const GATE: &str = "model.layers.1.block_sparse_moe.gate.weight";

fn mixtral() -> Checkpoint {
    Checkpoint::golden("mixtral_gqa")
}

#[track_caller]
fn assert_says(error: &str, wants: &[&str]) {
    for want in wants {
        assert!(error.contains(want), "{want:?} is not in {error:?}");
    }
}

/// What is said of a model.safetensors with these bytes beside a good config.json.
fn refusal_of_file(bytes: &[u8]) -> String {
    let dir = mixtral().write();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let error = try_load(dir.path(), DtypeChoice::F32).map(drop).expect_err("a file that must not load").to_string();
    assert_says(&error, &["model.safetensors"]);
    error
}

/// What `resolve` and `load` say of a folder.
fn open_folder(dir: &Path) -> Result<moe_serve::model::Loaded, String> {
    let files = resolve(dir.to_str().unwrap(), &HubOptions::default(), &quiet()).map_err(|e| e.to_string())?;
    load(&files, &LoadOptions { dtype: DtypeChoice::F32, ..Default::default() }, |_, _| {}).map_err(|e| e.to_string())
}

fn logits(loaded: &moe_serve::model::Loaded) -> Vec<Vec<f32>> {
    let prompt = [1, 5, 9, 44, 7, 7, 60, 2];
    Runner::new(&loaded.model, 1, 32, "native").step(&[(0, &prompt[..loaded.max_model_len.min(8)])])
}

#[test]
fn a_missing_tensor_is_named_with_the_shape_it_should_have() {
    for golden in ONE_EACH {
        let whole = Checkpoint::golden(golden);
        for name in whole.tensors.keys().step_by(3) {
            let mut damaged = whole.clone();
            let shape = damaged.tensors.remove(name).unwrap().shape;
            assert_says(&damaged.refusal(), &[&format!("`{name}` is missing"), &format!("{shape:?}")]);
        }
    }
}

#[test]
fn tensors_without_a_place_are_counted_and_named() {
    let mut damaged = mixtral();
    let spare = damaged.tensors[GATE].clone();
    for name in ["model.layers.2.x.weight", "zzz.bias"] {
        damaged.tensors.insert(name.into(), spare.clone());
    }
    assert_says(&damaged.refusal(), &["2 tensors", "model.layers.2.x.weight, zzz.bias"]);
    // A layer more in the file than config.json has.
    let shortened = mixtral().with("num_hidden_layers", json!(1)).refusal();
    assert_says(&shortened, &["no place", "model.layers.1.block_sparse_moe.experts.0.w1.weight"]);
}

#[test]
fn a_wrong_shape_is_told_with_both_shapes() {
    let mut damaged = mixtral();
    damaged.tensors.get_mut(GATE).unwrap().shape = vec![32, 4];
    assert_says(&damaged.refusal(), &[GATE, "[32, 4]", "[4, 32]"]);
    damaged.tensors.get_mut(GATE).unwrap().shape = vec![128];
    assert_says(&damaged.refusal(), &[GATE, "[128]"]);
}

#[test]
fn a_file_cut_anywhere_is_refused_by_name() {
    let dir = mixtral().write();
    let path = dir.path().join("model.safetensors");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let size = file.metadata().unwrap().len();
    let header = 8 + u64::from_le_bytes(std::fs::read(&path).unwrap()[..8].try_into().unwrap());
    let cuts = (header..size).rev().step_by(709).chain((9..header).rev().step_by(61)).chain((0..9).rev());
    for cut in [size - 1].into_iter().chain(cuts.filter(|c| *c < size - 1)) {
        file.set_len(cut).unwrap();
        let error = try_load(dir.path(), DtypeChoice::F32).map(drop).expect_err("cut").to_string();
        assert!(error.contains(path.to_str().unwrap()), "cut at {cut}: {error}");
        let truth = error.contains("truncated") || cut < 8 && error.contains(&format!("{cut} bytes"));
        assert!(truth, "cut at {cut}: {error}");
    }
}

#[test]
fn a_file_with_bytes_after_the_data_is_refused() {
    let mut bytes = safetensors(&mixtral().tensors);
    bytes.push(0);
    assert_says(&refusal_of_file(&bytes), &["trailing bytes"]);
}

#[test]
fn header_lengths_that_lie_are_refused_without_allocating_them() {
    let good = safetensors(&mixtral().tensors);
    for length in [0, 1, 7, good.len() as u64, 100_000_001, 1 << 40, u64::MAX - 8, u64::MAX] {
        let mut bytes = good.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        refusal_of_file(&bytes);
    }
}

#[test]
fn header_entries_that_lie_are_refused() {
    let entry = |dtype: &str, shape: Value, start: u64, end: u64| json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
    let huge = 1u64 << 62;
    for (what, header) in [
        ("no JSON", "{".into()),
        ("an array", "[1, 2]".into()),
        ("no tensors", json!({})),
        ("no tensors but metadata", json!({"__metadata__": {"format": "pt"}})),
        ("end past the file", json!({"a": entry("F32", json!([8]), 0, 32)})),
        ("start past the file", json!({"a": entry("F32", json!([4]), 1 << 40, (1 << 40) + 16)})),
        ("end before start", json!({"a": entry("F32", json!([4]), 16, 0)})),
        ("offsets that overflow", json!({"a": entry("F32", json!([4]), u64::MAX - 15, u64::MAX)})),
        ("a negative offset", json!({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}})),
        ("a hole", json!({"a": entry("F32", json!([2]), 8, 16)})),
        ("overlap", json!({"a": entry("F32", json!([4]), 0, 16), "b": entry("F32", json!([2]), 8, 16)})),
        ("the same bytes twice", json!({"a": entry("F32", json!([4]), 0, 16), "b": entry("F32", json!([4]), 0, 16)})),
        ("a dtype of another size", json!({"a": entry("F32", json!([8]), 0, 16)})),
        ("a dtype of half a byte", json!({"a": entry("F4", json!([3]), 0, 16)})),
        ("an unknown dtype", json!({"a": entry("Q7", json!([4]), 0, 16)})),
        ("a shape of no numbers", json!({"a": entry("F32", json!(["4"]), 0, 16)})),
        ("a negative shape", json!({"a": entry("F32", json!([-4]), 0, 16)})),
        ("a shape whose product overflows", json!({"a": entry("F32", json!([huge, huge]), 0, 16)})),
        ("a shape whose product wraps to its size", json!({"a": entry("F32", json!([huge, 4, 4, 4]), 0, 16)})),
        ("zero times too much", json!({"a": entry("F32", json!([0, huge, huge]), 0, 16)})),
        ("offsets missing", json!({"a": {"dtype": "F32", "shape": [4]}})),
    ] {
        let header: String = if let Value::String(text) = header { text } else { header.to_string() };
        let error = refusal_of_file(&raw_safetensors(header.as_bytes(), &[0; 16]));
        assert!(error.len() < 400, "{what}: {error}");
    }
    // Bytes that are no UTF-8, as a name and in place of everything.
    for header in
        [&b"{\"\xff\xfe\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}"[..], &[0xff; 40], b"PK\x03\x04"]
    {
        refusal_of_file(&raw_safetensors(header, &[0; 16]));
    }
    let deep = "[".repeat(100_000);
    refusal_of_file(&raw_safetensors(deep.as_bytes(), &[0; 16]));
}

#[test]
fn tensors_of_integers_are_refused_by_name() {
    let mut one = mixtral();
    let gate = one.tensors.get_mut(GATE).unwrap();
    gate.dtype = "I16".into();
    assert_says(&one.refusal(), &[GATE, "I16", "BF16"]);

    let mut all = mixtral();
    for stored in all.tensors.values_mut() {
        (stored.dtype, stored.shape) = ("U8".into(), vec![stored.bytes.len()]);
    }
    assert_says(&all.refusal(), &["U8", "lm_head.weight", "quantised"]);
}

#[test]
fn a_missing_or_unknown_model_type_is_answered_with_the_list() {
    for other in ["llama", "Mixtral", ""] {
        let error = mixtral().with("model_type", json!(other)).refusal();
        assert_says(&error, &[&format!("`{other}`"), "mixtral, olmoe, qwen2_moe, qwen3_moe, moe_lm"]);
    }
    assert_says(&mixtral().without("model_type").refusal(), &["config.json", "`model_type`", "missing"]);
    assert_says(&mixtral().with("model_type", json!(["mixtral"])).refusal(), &["`model_type`", "string"]);
}

#[test]
fn every_required_field_is_named_when_it_is_missing() {
    let common = [
        "max_position_embeddings",
        "hidden_size",
        "num_attention_heads",
        "vocab_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_theta",
        "num_experts_per_tok",
        "intermediate_size",
    ];
    let qwen = ["num_key_value_heads", "num_experts", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"];
    let own: [&[&str]; 4] = [
        &["num_key_value_heads", "num_local_experts"],
        &["num_experts", "norm_topk_prob"],
        &[&qwen[..], &["shared_expert_intermediate_size"]].concat(),
        &qwen,
    ];
    // What `moe_lm` needs is another list; see moe_lm.rs.
    for (golden, own) in ONE_EACH.into_iter().zip(own) {
        for field in common.iter().chain(own) {
            let whole = Checkpoint::golden(golden);
            for damaged in [whole.clone().without(field), whole.with(field, Value::Null)] {
                assert_says(&damaged.refusal(), &["config.json", &format!("`{field}`"), "missing"]);
            }
        }
    }
}

#[test]
fn values_that_make_no_sense_are_refused_with_field_and_value() {
    for (golden, field, value, want) in [
        ("mixtral_gqa", "num_attention_heads", json!(0), "got 0"),
        ("mixtral_gqa", "num_key_value_heads", json!(0), "got 0"),
        ("mixtral_gqa", "num_key_value_heads", json!(3), "does not divide"),
        ("mixtral_gqa", "num_key_value_heads", json!(8), "got 8"),
        ("mixtral_gqa", "num_local_experts", json!(1_000_000_000_000_u64), "1000000000000"),
        ("mixtral_gqa", "num_local_experts", json!(1e12), "whole number"),
        ("mixtral_gqa", "num_experts", json!(5), "`num_local_experts`"),
        ("mixtral_gqa", "num_experts_per_tok", json!(5), "from 1 to 4; got 5"),
        ("mixtral_gqa", "num_experts_per_tok", json!(0), "got 0"),
        ("mixtral_gqa", "head_dim", json!(7), "even"),
        ("mixtral_gqa", "num_attention_heads", json!(32), "head_dim"),
        ("mixtral_gqa", "hidden_size", json!(31), "31"),
        ("mixtral_gqa", "hidden_size", json!(-32), "got -32"),
        ("mixtral_gqa", "hidden_size", json!("32"), "got \"32\""),
        ("mixtral_gqa", "vocab_size", json!(u64::MAX), "vocab_size"),
        ("mixtral_gqa", "num_hidden_layers", json!(0), "got 0"),
        ("mixtral_gqa", "num_hidden_layers", json!(1_000_000), "1000000"),
        ("mixtral_gqa", "max_position_embeddings", json!(0), "got 0"),
        ("mixtral_gqa", "max_position_embeddings", json!(u64::MAX), "max_position_embeddings"),
        ("mixtral_gqa", "rms_norm_eps", json!(-1e-5), "above 0"),
        ("mixtral_gqa", "rms_norm_eps", json!(0), "above 0"),
        ("mixtral_gqa", "rms_norm_eps", json!("1e-5"), "above 0"),
        ("mixtral_gqa", "rope_theta", json!(0), "above 0"),
        ("mixtral_gqa", "sliding_window", json!(0), "got 0"),
        ("mixtral_gqa", "sliding_window", json!(-1), "got -1"),
        ("mixtral_gqa", "tie_word_embeddings", json!(1), "true or false"),
        ("mixtral_gqa", "hidden_act", json!("gelu"), "only \"silu\""),
        ("mixtral_gqa", "quantization_config", json!({"quant_method": "awq", "bits": 4}), "awq"),
        ("mixtral_gqa", "rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0}), "`dynamic` is not supported"),
        ("mixtral_gqa", "rope_scaling", json!({"rope_type": "longrope", "factor": 2.0}), "yarn"),
        ("mixtral_gqa", "rope_scaling", json!({"rope_type": 3, "factor": 2.0}), "rope_type"),
        ("mixtral_gqa", "rope_scaling", json!({"rope_type": "linear", "factor": 0}), "factor"),
        ("mixtral_gqa", "rope_scaling", json!({"rope_type": "linear", "factor": -2.0}), "factor"),
        ("mixtral_gqa", "rope_scaling", json!({"rope_type": "llama3", "factor": 2.0}), "low_freq_factor"),
        ("mixtral_gqa", "rope_scaling", json!("linear"), "object"),
        ("olmoe_mha", "clip_qkv", json!(-1), "above 0"),
        ("olmoe_mha", "norm_topk_prob", json!("false"), "true or false"),
        ("qwen2_shared", "decoder_sparse_step", json!(0), "got 0"),
        ("qwen2_shared", "decoder_sparse_step", json!(9), "nothing to route"),
        ("qwen2_shared", "mlp_only_layers", json!([0, 1]), "nothing to route"),
        ("qwen2_shared", "mlp_only_layers", json!("0"), "list"),
        ("qwen2_layers", "layer_types", json!(["full_attention"]), "4 layer types"),
        ("qwen3_gqa", "mlp_only_layers", json!([-1]), "list"),
    ] {
        let error = Checkpoint::golden(golden).with(field, value.clone()).refusal();
        assert!(error.contains("config.json") && error.contains(want), "{golden}, {field} = {value}: {error}");
    }
    // `type` is the old spelling; a null beside it must not hide it.
    let hidden = json!({"rope_type": null, "type": "dynamic", "factor": 2.0});
    assert_says(&mixtral().with("rope_scaling", hidden).refusal(), &["`dynamic` is not supported"]);
}

#[test]
fn any_value_in_any_field_is_loaded_and_run_or_refused() {
    let odd = [
        json!(0),
        json!(1),
        json!(3),
        json!(-1),
        json!(0.5),
        json!(1e300),
        json!(u64::MAX),
        json!(true),
        json!(""),
        json!([]),
        json!([[0]]),
        json!({}),
        json!({"rope_type": "yarn", "factor": 1e-300}),
        json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e300, "rope_theta": 1}),
    ];
    for golden in ["mixtral_window", "olmoe_clip", "qwen2_layers", "qwen3_sparse", "moe_lm_llama", "moe_lm_relu"] {
        let whole = Checkpoint::golden(golden);
        let dir = whole.write();
        for field in whole.config.keys() {
            for value in &odd {
                let changed = whole.clone().with(field, value.clone());
                std::fs::write(dir.path().join("config.json"), changed.config_json()).unwrap();
                let attempt = AssertUnwindSafe(|| try_load(dir.path(), DtypeChoice::F32).map(|l| drop(logits(&l))));
                let outcome = catch_unwind(attempt);
                assert!(outcome.is_ok(), "{golden}: {field} = {value} panics");
            }
        }
    }
}

#[test]
fn end_tokens_come_from_generation_config_first() {
    for (config, generation, want) in [
        (json!(5), None, Ok(vec![5])),
        (json!([5, 7]), None, Ok(vec![5, 7])),
        (json!(null), None, Ok(vec![])),
        (json!(5), Some(json!({"eos_token_id": [3, 4]})), Ok(vec![3, 4])),
        (json!(5), Some(json!({"eos_token_id": 3})), Ok(vec![3])),
        (json!(5), Some(json!({"eos_token_id": null})), Ok(vec![5])),
        (json!(5), Some(json!({"eos_token_id": []})), Ok(vec![5])),
        (json!([5]), Some(json!({"temperature": 0.7})), Ok(vec![5])),
        (json!([5, 4000]), None, Err("is 4000, but the vocabulary has 128 tokens")),
        (json!("</s>"), None, Err("config.json: field `eos_token_id`")),
        (json!([5, -1]), None, Err("config.json: field `eos_token_id`")),
        (json!(5), Some(json!({"eos_token_id": 1.5})), Err("generation_config.json: field `eos_token_id`")),
    ] {
        let dir = mixtral().with("eos_token_id", config.clone()).write();
        if let Some(generation) = &generation {
            std::fs::write(dir.path().join("generation_config.json"), generation.to_string()).unwrap();
        }
        let got = try_load(dir.path(), DtypeChoice::F32).map(|l| l.eos).map_err(|e| e.to_string());
        match (got, want) {
            (Err(error), Err(want)) => assert_says(&error, &[want]),
            (got, want) => assert_eq!(got, want.map_err(String::from), "{config} {generation:?}"),
        }
    }
    assert!(mixtral().without("eos_token_id").try_load().unwrap().eos.is_empty());
}

#[test]
fn json_files_that_are_no_json_objects_are_named() {
    for file in ["config.json", "generation_config.json"] {
        for text in [&b"{"[..], b"", b"[]", b"null", b"\xff\xfe{}", b"{\"a\": NaN}"] {
            let dir = mixtral().write();
            std::fs::write(dir.path().join(file), text).unwrap();
            assert_says(&try_load(dir.path(), DtypeChoice::F32).map(drop).unwrap_err().to_string(), &[file]);
        }
    }
    let dir = mixtral().write();
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    assert_says(
        &try_load(dir.path(), DtypeChoice::F32).map(drop).unwrap_err().to_string(),
        &["config.json", "No such file"],
    );
}

#[test]
fn unknown_config_fields_are_reported_unless_null() {
    let odd = mixtral().with("attn_logit_cap", json!(30)).with("zeta", json!(null)).with("use_moonlight", json!(false));
    let loaded = odd.try_load().unwrap();
    assert_eq!(loaded.unread_config, ["attn_logit_cap", "use_moonlight"]);
}

#[test]
fn the_context_must_lie_within_the_positions_of_the_checkpoint() {
    let dir = mixtral().write();
    let with = |n| {
        let options = LoadOptions { dtype: DtypeChoice::F32, max_model_len: Some(n), ..Default::default() };
        load(&files(dir.path()), &options, |_, _| {})
    };
    for n in [0, 257, usize::MAX] {
        assert_says(
            &with(n).map(drop).unwrap_err().to_string(),
            &["between 1 and 256", "--max-model-len", &format!("got {n}")],
        );
    }
    for n in [1, 256] {
        assert_eq!(with(n).unwrap().max_model_len, n);
    }
}

#[test]
fn stored_rotary_frequencies_are_ignored() {
    let mut old = mixtral();
    let stored = Stored { dtype: "F32".into(), shape: vec![4], bytes: vec![0; 16] };
    for layer in 0..2 {
        old.tensors.insert(format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"), stored.clone());
    }
    assert_eq!(logits(&old.try_load().unwrap()), logits(&mixtral().try_load().unwrap()));
}

#[test]
fn a_tied_model_that_stores_its_lm_head_all_the_same_loads() {
    let tied = Checkpoint::golden("mixtral_window");
    let mut both = tied.clone();
    let table = both.tensors["model.embed_tokens.weight"].clone();
    assert!(both.tensors.insert("lm_head.weight".into(), table).is_none(), "the golden is not tied");
    assert_eq!(logits(&both.try_load().unwrap()), logits(&tied.try_load().unwrap()));
    assert_says(&tied.with("tie_word_embeddings", json!(false)).refusal(), &["`lm_head.weight` is missing"]);
}

#[test]
fn loading_reports_every_byte_once() {
    let dir = mixtral().write();
    let seen = std::sync::Arc::new(std::sync::Mutex::new((0, 0, 0)));
    let report = seen.clone();
    let on_progress = move |read, total| {
        let mut seen = report.lock().unwrap();
        assert!(read > seen.0, "progress went from {} to {read}", seen.0);
        *seen = (read, total, seen.2 + 1);
    };
    load(&files(dir.path()), &LoadOptions::default(), on_progress).unwrap();
    let bytes: usize = mixtral().tensors.values().map(|t| t.bytes.len()).sum();
    assert_eq!(*seen.lock().unwrap(), (bytes as u64, bytes as u64, mixtral().tensors.len()));
}

/// A folder with a tokenizer and these shards.
fn sharded(checkpoint: &Checkpoint) -> tempfile::TempDir {
    let dir = tempfile::TempDir::new().unwrap();
    std::fs::write(dir.path().join("config.json"), checkpoint.config_json()).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json()).unwrap();
    for (name, bytes) in checkpoint.shards() {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

#[test]
fn two_shards_give_the_logits_of_one_file_bit_for_bit() {
    for golden in ONE_EACH {
        let whole = Checkpoint::golden(golden);
        let got = logits(&open_folder(sharded(&whole).path()).unwrap());
        assert_eq!(got, logits(&whole.try_load().unwrap()), "{golden}");
    }
}

#[test]
fn an_index_that_lies_is_refused() {
    let dir = sharded(&mixtral());
    let index = dir.path().join("model.safetensors.index.json");
    let second = "model-00002-of-00002.safetensors";
    for (text, want) in [
        (json!({"weight_map": {"a": "../../etc/x.safetensors"}}).to_string(), "../../etc/x.safetensors"),
        (json!({"weight_map": {"a": "/etc/x.safetensors"}}).to_string(), "/etc/x.safetensors"),
        (json!({"weight_map": {"a": "sub\\x.safetensors"}}).to_string(), "`a`"),
        (json!({"weight_map": {"a": "pytorch_model.bin"}}).to_string(), "pytorch_model.bin"),
        (json!({"weight_map": {"a": 5}}).to_string(), "`a`"),
        (json!({"weight_map": {}}).to_string(), "empty"),
        (json!({"weight_map": []}).to_string(), "weight_map"),
        (json!({}).to_string(), "weight_map"),
        ("{".into(), "not JSON"),
        (
            json!({"weight_map": {"a": "model-00003-of-00003.safetensors"}}).to_string(),
            "model-00003-of-00003.safetensors",
        ),
        // A shard that is there but not listed is not read.
        (json!({"weight_map": {"a": second}}).to_string(), "is missing"),
    ] {
        std::fs::write(&index, &text).unwrap();
        let error = open_folder(dir.path()).map(drop).unwrap_err();
        assert!(error.contains(want), "{text}: {error}");
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused_with_both_files() {
    let whole = mixtral();
    let dir = sharded(&whole);
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    std::fs::write(dir.path().join(first), safetensors(&whole.tensors)).unwrap();
    assert_says(&open_folder(dir.path()).map(drop).unwrap_err(), &[first, second, "is in"]);
}

#[test]
fn a_folder_without_a_needed_file_is_refused_by_its_name() {
    for missing in ["config.json", "tokenizer.json", "model.safetensors"] {
        let dir = mixtral().write();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json()).unwrap();
        assert!(open_folder(dir.path()).is_ok());
        std::fs::remove_file(dir.path().join(missing)).unwrap();
        assert_says(&open_folder(dir.path()).map(drop).unwrap_err(), &[dir.path().to_str().unwrap(), missing]);
    }
    let revision = HubOptions { revision: Some("main".into()), ..Default::default() };
    let error = resolve(mixtral().write().path().to_str().unwrap(), &revision, &quiet()).unwrap_err();
    assert_says(&error.to_string(), &["--revision", "directory"]);
}

/// Replaces bytes of `bytes[from..]`.
fn flip(bytes: &mut [u8], from: usize, flips: &[(prop::sample::Index, u8)]) {
    let rest = &mut bytes[from..];
    for (at, value) in flips {
        rest[at.index(rest.len())] = *value;
    }
}

fn flips() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    let byte = prop_oneof![any::<u8>(), prop::sample::select(b"0123456789-.eE[]{},:\"".to_vec())];
    prop::collection::vec((any::<prop::sample::Index>(), byte), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn flipped_bytes_in_a_safetensors_header_never_panic(flips in flips(), in_length in any::<bool>()) {
        let one: Tensors = mixtral().tensors.into_iter().take(6).collect();
        let mut bytes = safetensors(&one);
        let header = bytes.len() - one.values().map(|t| t.bytes.len()).sum::<usize>();
        let from = if in_length { 0 } else { 8 };
        flip(&mut bytes[..header], from, &flips);
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, &bytes).unwrap();
        if let Err(error) = moe_serve::model::Weights::open(std::slice::from_ref(&path)) {
            prop_assert!(error.to_string().contains("model.safetensors") || error.to_string().contains("tensor `"));
        }
    }

    #[test]
    fn flipped_bytes_in_a_config_never_panic(flips in flips(), family in 0..ONE_EACH.len()) {
        let whole = Checkpoint::golden(ONE_EACH[family]);
        let dir = whole.write();
        let mut bytes = whole.config_json();
        flip(&mut bytes, 0, &flips);
        std::fs::write(dir.path().join("config.json"), &bytes).unwrap();
        if let Err(error) = try_load(dir.path(), DtypeChoice::F32) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
