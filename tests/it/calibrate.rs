//! Calibration from end to end, on the bundled checkpoint: through the library, and as the built `moe-calibrate`.

use crate::binary::Process;
use crate::support::{files, repo};
use moe_serve::calibrate::{CalibrateError, Outcome, Scope, Settings, Target, bundled, calibrate, correlations, read};
use moe_serve::calibrate::{Source, summary};
use moe_serve::engine::{EngineConfig, Found, Opened, RequestRouters, Text, calibrations};
use moe_serve::eval::{How, InProcess, Lm, Routed};
use moe_serve::model::hub::HubOptions;
use moe_serve::model::{LoadOptions, hash, load};
use moe_serve::moe::calibration::{CURVE_STEPS, Calibration, QUANTILE_STEPS};
use moe_serve::types::{DeviceChoice, DtypeChoice, RouterSpec};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MODEL: &str = "models/stories";
/// Text enough for the tests.
const DATA: &[&str] = &["eval/samples/text.txt", "README.md"];

fn options() -> LoadOptions {
    LoadOptions { dtype: DtypeChoice::Auto, device: DeviceChoice::Cpu, ..Default::default() }
}

fn found() -> Found {
    Found::find(repo(MODEL).to_str(), &HubOptions { offline: true, ..Default::default() }).unwrap()
}

fn sources() -> Vec<Source> {
    read(&DATA.iter().map(|path| repo(path)).collect::<Vec<_>>()).unwrap()
}

fn settings(target: Target) -> Settings {
    Settings { target: Some(target), tokens: 640, held_out_tokens: 320, window: 64, seed: 3 }
}

/// A golden checkpoint, with the bundled tokenizer.
fn golden(name: &str) -> Opened {
    let files = files(&repo("tests/golden").join(name));
    let loaded = load(&files, &options(), |_, _| {}).unwrap();
    Opened { name: name.into(), text: Text::read(&files.tokenizer, 4096).unwrap(), files, loaded }
}

fn calibrated(target: Target, out: &Path) -> Outcome {
    calibrate(found().load(&options()).unwrap(), &sources(), &settings(target), out).unwrap()
}

/// What `router` does to the sample text.
fn routed(router: &str) -> Routed {
    let spec: RouterSpec = router.parse().unwrap();
    let routers = RequestRouters { names: Vec::new(), experts_max: None, files: true };
    let config = EngineConfig { request_routers: Some(routers), ..Default::default() };
    let launched = found().launch(&options(), &spec, config).unwrap();
    let lm = InProcess::new(Arc::new(launched.engine), launched.text, &launched.shape);
    let ids = lm.encode(&bundled().text).unwrap();
    lm.score(&ids[..256], &How::default()).unwrap().routed.unwrap()
}

#[test]
fn a_calibrated_file_serves_its_checkpoint_at_about_its_budget() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("policy.json");
    let outcome = calibrated(Target::experts(0.7), &out);
    let launched = found().load(&options()).unwrap();
    let shape = launched.loaded.model.shape().moe.clone();
    let own = hash(&launched.files).unwrap();
    let read = Calibration::read(&out, &own, &shape).unwrap();
    assert_eq!(read, outcome.calibration);
    let error = Calibration::read(&out, &"0".repeat(64), &shape).unwrap_err();
    assert!(error.contains("another checkpoint (stories"), "{error}");

    for layer in &read.layers {
        assert!(layer.expert_norms_e.iter().all(|norm| *norm > 0.0));
        assert!((layer.gamma_k[1] - 1.0).abs() < 1e-6 && layer.gamma_k[0] > 0.3 && layer.gamma_k[0] < 1.2);
        assert!((0.0..=1.0).contains(&layer.ratio_median));
        assert!(layer.curves.score.is_sorted() && layer.curves.contribution.is_sorted());
        assert!(layer.curves.threshold.iter().rev().is_sorted());
        assert_eq!((layer.curves.score[CURVE_STEPS], layer.curves.threshold[CURVE_STEPS]), (1.0, 0.0));
        assert!(layer.quantiles.values().all(|q| q.len() == QUANTILE_STEPS + 1 && q.is_sorted()));
        for name in ["router-entropy", "hidden-norm", "gradient-norm", "gradient-variance", "surprisal", "logit-lens"] {
            assert!(layer.quantiles.contains_key(name), "{name}");
        }
    }
    let surprisal = outcome.correlations.estimators.iter().find(|one| one.name == "surprisal").unwrap();
    assert!(surprisal.mean.is_some() && surprisal.layers.len() == shape.layers);

    let policy = read.policy.as_ref().unwrap();
    let rung = policy.rung(policy.target);
    assert!(rung.cost <= 0.7 + 1e-6 && rung.cost > 0.6, "{}", rung.cost);
    assert!((rung.mean_k / 2.0 - rung.cost).abs() < 1e-9);
    assert_eq!((policy.rungs[0].cost, policy.rungs.last().unwrap().cost), (0.5, 1.0));
    let winner = if outcome.checked.as_ref().unwrap().dynamic_wins() { "dynamic" } else { "static" };
    assert_eq!(policy.held_out.winner, winner);
    let any_dynamic = policy.rungs.iter().any(|rung| rung.rules.iter().any(|rule| rule.dynamic()));
    assert_eq!(any_dynamic, winner == "dynamic");
    let held_out = &policy.held_out;
    assert!((held_out.dynamic.mean_k - held_out.fixed.mean_k).abs() < 0.1, "{held_out:?}");
    assert!(held_out.dynamic.kl > 0.0 && held_out.low <= held_out.difference && held_out.difference <= held_out.high);
    assert!(held_out.dynamic.expert_bytes > 0.0 && held_out.dynamic.forward_flops > held_out.dynamic.expert_flops);

    let file = out.display();
    let served = routed(&format!("policy:{file}"));
    assert!((served.mean_k() - rung.mean_k).abs() < 0.2, "{} is not about {}", served.mean_k(), rung.mean_k);
    assert_eq!(routed(&format!("policy:{file},at=1.0")).mean_k(), 2.0);
    assert_eq!(routed(&format!("policy:{file},at=0.5")).mean_k(), 1.0);
    let kept = routed(&format!("threshold:keep:0.7,cal={file}")).mean_k();
    assert!((kept - 1.4).abs() < 0.2, "{kept}");
    for router in ["contrib:0.8", "skip:auto", "complexity:router-entropy", "native,weights=lsq"] {
        routed(&format!("{router},cal={file}"));
    }
    let said = summary(&outcome, Some(MODEL), &out) + &correlations(&outcome.correlations);
    let serve = format!("moe-serve --model {MODEL} --router policy:{file}");
    for text in
        [serve.as_str(), "winner     ", "layer 3", "KL of dynamic less", "router-margin", "held out   320 tokens"]
    {
        assert!(said.contains(text), "{text:?} is not in\n{said}");
    }
}

#[test]
fn other_scopes_have_budgets_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("policy.json");
    let forward = calibrated(Target { scope: Scope::Forward, share: 0.8, batch: None }, &out).calibration;
    let forward = forward.policy.unwrap();
    let rung = forward.rung(0.8);
    assert!(rung.cost <= 0.8 + 1e-6 && rung.cost > 0.77, "{}", rung.cost);
    assert!(rung.mean_k / 2.0 < rung.cost, "what routing does not change has to be paid for too");
    // The same windows: what was measured for the one target is there for the other.
    let started = Instant::now();
    let bytes = calibrated(Target { scope: Scope::Bytes, share: 0.8, batch: Some(4) }, &out).calibration;
    let bytes = bytes.policy.unwrap();
    assert_eq!((bytes.scope.as_str(), bytes.batch), ("bytes", Some(4)));
    assert!(bytes.rung(0.8).cost <= 0.8 + 1e-6, "{:?} after {:?}", bytes.rung(0.8), started.elapsed());
    assert!(bytes.rungs[0].cost > 0.5, "at a batch of 4 half of the experts is more than half of the reads");
}

#[test]
fn models_and_targets_that_cannot_be_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("policy.json");
    let refused = |opened: Opened, settings: &Settings, sources: &[Source], out: &Path| {
        let error = calibrate(opened, sources, settings, out).unwrap_err();
        assert!(matches!(error, CalibrateError::Asked(_)), "{error:?}");
        error.to_string()
    };
    let usual = settings(Target::experts(0.7));
    let own = || found().load(&options()).unwrap();
    for (error, wanted) in [
        (refused(golden("moe_lm_dense"), &usual, &sources(), &out), &["--model", "has none"][..]),
        (refused(golden("mixtral_top1"), &usual, &sources(), &out), &["--model", "takes 1"]),
        (refused(golden("moe_lm_relu"), &usual, &sources(), &out), &["--model", "dynk"]),
        (refused(own(), &Settings { window: 4, ..usual.clone() }, &sources(), &out), &["--window", "1024", "got 4"]),
        (refused(own(), &Settings { window: 1024, ..usual.clone() }, &[bundled()], &out), &["--data", "two windows"]),
        (refused(own(), &usual, &[], &out), &["--data", "got 0 tokens in 0 files"]),
        (
            refused(own(), &settings(Target::experts(0.3)), &sources(), &out),
            &["--target-flops 0.3", "0.5000", "give at least 0.5"],
        ),
        (
            refused(
                own(),
                &settings(Target { scope: Scope::Bytes, share: 0.2, batch: Some(2) }),
                &sources(),
                &dir.path().join("bytes.json"),
            ),
            &["--target-bytes 0.2", "cannot be attained"],
        ),
        (refused(own(), &usual, &sources(), Path::new("nowhere/policy.json")), &["--out", "nowhere/policy.json"]),
    ] {
        wanted.iter().for_each(|text| assert!(error.contains(text), "{text:?} is not in {error}"));
    }
    assert!(!out.exists());
}

fn start(args: &[&str]) -> Process {
    Process::start_binary(env!("CARGO_BIN_EXE_moe-calibrate"), args, &[])
}

/// Exit code, stdout and stderr of a run to its end.
fn run(args: &[&str]) -> (i32, String, String) {
    let mut process = start(args);
    let (status, stderr) = process.end(Duration::from_secs(180));
    let stdout: Vec<String> = process.stdout.iter().collect();
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    (status.code().unwrap_or(-1), stdout.join("\n"), stderr)
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (whole, killed) = (file("whole.json"), file("killed.json"));
    let args = |out: &str, target: &str| -> Vec<String> {
        let fixed =
            ["--offline", "--target-flops", target, "--out", out, "--tokens", "512", "--held-out-tokens", "256"];
        let data = ["--window", "64", "--data"];
        fixed.iter().chain(&data).chain(DATA).map(|arg| arg.to_string()).collect()
    };
    fn texts(args: &[String]) -> Vec<&str> {
        args.iter().map(String::as_str).collect()
    }
    let (code, stdout, stderr) = run(&texts(&args(&whole, "0.7")));
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("Spearman") && stdout.contains("serve it   moe-serve --router policy:"), "{stdout}");
    assert!(stderr.contains("512 tokens of text are little"), "{stderr}");

    let process = start(&texts(&args(&killed, "0.7")));
    let state = format!("{killed}.state");
    let lines = || std::fs::read_to_string(&state).map_or(0, |text| text.lines().count());
    let deadline = Instant::now() + Duration::from_secs(120);
    while lines() < 12 {
        assert!(Instant::now() < deadline, "no measurements in time");
        std::thread::sleep(Duration::from_millis(2));
    }
    // Dropping kills it, with no chance to put anything in order.
    drop(process);
    assert!(!Path::new(&killed).exists(), "it was killed too late to prove anything");
    let (code, _, stderr) = run(&texts(&args(&killed, "0.7")));
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("going on with"), "{stderr}");
    let bytes = |path: &str| std::fs::read(path).unwrap();
    assert!(bytes(&killed) == bytes(&whole), "a run that went on is one that was not stopped");
}

#[test]
fn without_a_target_there_are_statistics_alone() {
    let dir = tempfile::tempdir().unwrap();
    let [out, report] = ["stats.json", "report.json"].map(|name| dir.path().join(name).to_str().unwrap().to_string());
    let (code, stdout, stderr) = run(&["--offline", "--window", "64", "--out", &out, "--report", &report]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("statistics alone") && stderr.contains("little"), "{stdout}{stderr}");
    let read = |path: &str| -> serde_json::Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    assert!(read(&out)["policy"].is_null());
    assert!(read(&report)["estimators"].as_array().unwrap().len() >= 8);
    assert!(!Path::new(&format!("{out}.state")).exists(), "nothing was measured");
    // Such a file calibrates rules, and is no policy.
    let files = calibrations(&found().load(&options()).unwrap().files);
    let shape = found().load(&options()).unwrap().loaded.model.shape().moe.clone();
    let error = moe_serve::moe::Policy::build_with(&format!("policy:{out}").parse().unwrap(), &shape, &files);
    assert!(error.err().unwrap().to_string().contains("statistics alone"));
}

#[test]
fn flags_that_cannot_be_are_refused_with_what_helps() {
    let dir = tempfile::tempdir().unwrap();
    let out = ["--offline", "--out", &dir.path().join("policy.json").display().to_string()].map(String::from);
    let case = |args: &[&str], code: i32, wanted: &[&str]| {
        let all: Vec<&str> = args.iter().copied().chain(out.iter().map(String::as_str)).collect();
        let (found, _, stderr) = run(&all);
        assert_eq!(found, code, "{args:?}: {stderr}");
        wanted.iter().for_each(|text| assert!(stderr.contains(text), "{args:?}: {text:?} is not in {stderr}"));
    };
    case(&["--target-flops", "0"], 1, &["--target-flops", "above 0 and at most 1", "got 0"]);
    case(&["--target-bytes", "0.5"], 1, &["--target-bytes", "--batch-size"]);
    case(&["--target-flops", "0.7", "--scope", "bytes"], 2, &["experts or forward", "bytes"]);
    case(&["--data", "nowhere.txt"], 1, &["nowhere.txt"]);
    case(&["--tokens", "0"], 2, &["--tokens", "at least 1"]);
    case(&["--model", "nowhere/at-all"], 1, &["nowhere/at-all"]);
    let (code, _, stderr) = run(&["--target-flops", "0.7"]);
    assert!(code == 2 && stderr.contains("--out"), "{stderr}");
}
