//! The built `moe-bench`: what it prints, and what it refuses.

use crate::binary::Process;
use crate::support::repo;
use serde_json::Value;
use std::time::Duration;

/// A config.json of two layers with mixtures of 8 experts, 4 of them for a token.
const CONFIG: &str = "tests/golden/olmoe_mha/config.json";

/// Exit code, standard output, standard error.
fn run(args: &[&str]) -> (i32, String, String) {
    let mut process = Process::start_binary(env!("CARGO_BIN_EXE_moe-bench"), args, &[]);
    let stdout = process.stdout.iter().collect::<Vec<_>>().join("\n");
    let (status, stderr) = process.end(Duration::from_secs(120));
    (status.code().unwrap(), stdout, stderr)
}

/// The table and the JSON document of a run that must succeed.
fn measured(args: &[&str]) -> (String, Value) {
    let (code, stdout, stderr) = run(args);
    assert_eq!(code, 0, "{args:?}: {stderr}");
    let (table, json) = stdout.rsplit_once('\n').unwrap();
    (table.into(), serde_json::from_str(json).unwrap())
}

fn path(name: &str) -> String {
    repo(name).display().to_string()
}

#[test]
fn every_test_with_every_router_is_a_line_and_a_run() {
    let config = path(CONFIG);
    let args =
        ["--random-weights", &config, "--prompt", "8,20", "--generate", "3", "--batch", "1,4", "--context", "18"];
    let more = ["--router", "native,dynk:1,mass=full", "--router", "topk:1", "--repeat", "2", "--threads", "2"];
    let (table, json) = measured(&[&args[..], &more].concat());
    for text in ["olmoe_mha", "random weights", "tokens/s", "tg3@b4", "dynk:1,mass=full", "of roofline", "1.00×"] {
        assert!(table.contains(text), "{text:?} is not in\n{table}");
    }
    let facts = ["model", "random_weights", "layers", "dtype", "threads"].map(|field| json[field].clone());
    assert_eq!(Value::from(facts.to_vec()), serde_json::json!(["olmoe_mha", true, 2, "bf16", 2]));
    for field in ["load_s", "weight_bytes", "kv_bytes", "read_bytes_per_s", "peak_flops_per_s"] {
        assert!(json[field].as_f64().unwrap() > 0.0, "{field}: {json}");
    }
    let runs = json["runs"].as_array().unwrap();
    let named: Vec<[&str; 2]> = runs.iter().map(|r| [&r["test"], &r["router"]].map(|v| v.as_str().unwrap())).collect();
    let wanted = ["pp8", "pp20", "tg3@b1", "tg3@b4"]
        .map(|test| ["native", "dynk:1,mass=full", "topk:1"].map(|router| [test, router]))
        .concat();
    assert_eq!(named, wanted);
    for run in runs {
        assert_eq!(run["tokens_per_s_all"].as_array().unwrap().len(), 2, "{run}");
        let mean_k = match run["router"].as_str().unwrap() {
            "native" => 4.0,
            "topk:1" => 1.0,
            _ => run["mean_k"].as_f64().unwrap().max(7.0),
        };
        assert_eq!(run["mean_k"], mean_k, "{run}");
        let share = |name: &str| run[name].as_f64().unwrap();
        assert_eq!(share("roofline_share"), share("bandwidth_share").max(share("flops_share")), "{run}");
    }
    let of = |test: &str, router: &str, field: &str| {
        runs.iter().find(|r| r["test"] == test && r["router"] == router).unwrap()[field].as_u64().unwrap()
    };
    for field in ["bytes_moved", "flops"] {
        for test in ["pp20", "tg3@b1"] {
            assert!(of(test, "topk:1", field) < of(test, "native", field), "{test} {field}");
        }
        assert!(of("tg3@b1", "native", field) < of("tg3@b4", "native", field), "{field}");
    }
}

/// Pages that a run of `moe-bench` asked the system for.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn page_faults(args: &[&str]) -> i64 {
    use std::process::{Command, Stdio};
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-bench"));
    let mut child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    std::io::read_to_string(child.stdout.take().unwrap()).unwrap();
    // What has ended keeps its counts until it is waited for.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    assert!(child.wait().unwrap().success(), "{args:?}");
    // The name, in brackets, may hold spaces; faults are the eighth number behind it.
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(7).unwrap().parse().unwrap()
}

#[test]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn steps_take_no_memory_from_the_system_once_warm() {
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::read_to_string(repo("benches/side_by_side/olmoe-1b-7b.json")).unwrap();
    let mut config: Value = serde_json::from_str(&file).unwrap();
    let sizes = [("hidden_size", 1024), ("intermediate_size", 64), ("num_experts", 4), ("num_experts_per_tok", 2)];
    for (field, size) in sizes.into_iter().chain([("vocab_size", 512), ("eos_token_id", 0)]) {
        config[field] = size.into();
    }
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    // Prompts of two lengths, whose activations of up to 2 MiB are given back in turns.
    let shapes = ["--prompt", "128,512", "--generate", "8", "--batch", "1,16", "--context", "16", "--no-roofline"];
    let faults = |repeat: &str| {
        let model = ["--random-weights", path.to_str().unwrap(), "--layers", "1", "--threads", "2", "--repeat", repeat];
        page_faults(&[&model[..], &shapes[..]].concat())
    };
    // Ten times two prompts and sixteen steps that decode: 36,000 where memory goes back. How many a start has varies.
    let more = faults("11") - faults("1");
    assert!(more < 4000, "{more} pages were taken from the system");
}

#[test]
fn what_is_left_out_is_not_measured() {
    let config = path("models/stories");
    let args = ["--random-weights", &config, "--layers", "1", "--prompt", "0", "--generate", "2", "--batch", "2"];
    let (table, json) = measured(&[&args[..], &["--repeat", "1", "--no-roofline", "--dtype", "f32"]].concat());
    assert!(!table.contains("machine"), "{table}");
    assert_eq!((json["layers"].as_u64(), json["dtype"].as_str()), (Some(1), Some("f32")), "{json}");
    assert_eq!((&json["read_bytes_per_s"], &json["runs"][0]["roofline_share"]), (&Value::Null, &Value::Null));
    assert_eq!(json["runs"].as_array().unwrap().len(), 1);
}

#[test]
fn a_checkpoint_runs_on_its_own_weights_cut_or_whole() {
    let model = path("models/stories");
    let args = ["--model", &model, "--prompt", "16", "--generate", "0", "--repeat", "1", "--no-roofline"];
    let (table, whole) = measured(&args);
    assert!(table.contains("its own weights"), "{table}");
    let (_, cut) = measured(&[&args[..], &["--layers", "2"]].concat());
    assert_eq!((whole["layers"].as_u64(), cut["layers"].as_u64()), (Some(6), Some(2)));
    assert!(cut["weight_bytes"].as_u64() < whole["weight_bytes"].as_u64());
    assert!(cut["runs"][0]["flops"].as_u64() < whole["runs"][0]["flops"].as_u64());
}

#[test]
fn every_family_can_be_made_up() {
    for name in ["mixtral_window", "qwen2_shared", "qwen2_window", "qwen3_sparse", "moe_lm_gpt", "moe_lm_llama"] {
        let config = path(&format!("tests/golden/{name}"));
        let args = ["--random-weights", &config, "--prompt", "9", "--generate", "2", "--batch", "2", "--context", "3"];
        let (_, json) = measured(&[&args[..], &["--repeat", "1", "--no-roofline"]].concat());
        assert_eq!(json["runs"].as_array().unwrap().len(), 2, "{name}: {json}");
    }
}

#[test]
fn what_cannot_be_run_is_refused_with_what_helps() {
    let config = path("models/stories");
    let case = |args: &[&str], code: i32, texts: &[&str]| {
        let (status, _, stderr) = run(args);
        assert_eq!(status, code, "{args:?}: {stderr}");
        texts.iter().for_each(|text| assert!(stderr.contains(text), "{args:?}: {text:?} is not in {stderr}"));
    };
    case(&[], 2, &["--model", "--random-weights"]);
    case(&["--model", "x", "--random-weights", "y"], 2, &["--model", "--random-weights", "cannot be used with"]);
    case(&["--random-weights", "nowhere/at/all", "--offline"], 1, &["--random-weights nowhere/at/all", "hub id"]);
    case(&["--random-weights", &path("Cargo.toml")], 1, &["Cargo.toml", "JSON"]);
    let with = |more: &[&'static str], code: i32, texts: &[&str]| {
        case(&[&["--random-weights", &config][..], more].concat(), code, texts);
    };
    with(&["--threads", "0"], 2, &["--threads", "from 1 to 4096"]);
    with(&["--prompt="], 2, &["--prompt", "whole number"]);
    with(&["--batch", "1,0"], 2, &["--batch", "from 1"]);
    with(&["--repeat", "0"], 2, &["--repeat", "from 1"]);
    with(&["--router="], 1, &["no router name"]);
    with(&["--router", "native,best:3"], 1, &["`best:3`", "there is no such router"]);
    with(&["--prompt", "8", "--router", "topk:9"], 1, &["`topk:9`", "8"]);
    with(&["--prompt", "8", "--router", "complexity:surprisal"], 1, &["complexity:surprisal", "leave it out"]);
    with(&["--prompt", "8", "--router", "policy:Cargo.toml"], 1, &["policy:Cargo.toml"]);
    with(&["--prompt", "0", "--generate", "0"], 1, &["nothing to measure", "--prompt", "--generate"]);
    with(&["--prompt", "8,2000"], 1, &["--prompt 2000", "1024 positions"]);
    with(&["--prompt", "8", "--context", "1000", "--generate", "32"], 1, &["1032 positions", "1024"]);
    with(&["--prompt", "8", "--layers", "7"], 1, &["--layers", "between 1 and 6", "got 7"]);
    with(&["--prompt", "8", "--batch", "10000000"], 1, &["KV cache", "MiB", "--batch"]);
}
