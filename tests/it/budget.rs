//! A budget kept by the engine that serves: it follows what the traffic really costs.

use crate::support::{bundled_files, repo};
use moe_serve::engine::api::Generate;
use moe_serve::engine::{Engine, EngineConfig, Found};
use moe_serve::model::hub::HubOptions;
use moe_serve::model::{LoadOptions, hash, load};
use moe_serve::moe::calibration::{Calibration, HeldOut, PolicyTable, Rung};
use moe_serve::moe::router::Rule;
use moe_serve::types::{DeviceChoice, GenerateRequest};
use std::path::Path;

/// A calibration of the bundled checkpoint whose policy says that two experts of two cost 0.75 of two.
fn write_policy(path: &Path) {
    let options = LoadOptions { device: DeviceChoice::Cpu, ..Default::default() };
    let files = bundled_files();
    let shape = load(&files, &options, |_, _| {}).unwrap().model.shape().moe.clone();
    let rung = |cost: f64, k: usize| Rung { cost, mean_k: k as f64, rules: vec![Rule::Static { k }; shape.layers] };
    let mut calibration = Calibration::uninformed(&shape, &hash(&files).unwrap());
    calibration.policy = Some(PolicyTable {
        scope: "experts".into(),
        target: 0.75,
        batch: None,
        lsq: false,
        rungs: vec![rung(0.5, 1), rung(0.75, 2), rung(1.0, 2)],
        held_out: HeldOut::default(),
    });
    std::fs::write(path, serde_json::to_string(&calibration).unwrap()).unwrap();
}

fn launch(router: &str, config: EngineConfig) -> Result<Engine, String> {
    let model = repo("models/stories").display().to_string();
    let found = Found::find(Some(&model), &HubOptions::default()).unwrap();
    let options = LoadOptions { device: DeviceChoice::Cpu, ..Default::default() };
    found.launch(&options, &router.parse().unwrap(), config).map(|l| l.engine).map_err(|e| e.to_string())
}

fn gauge(engine: &Engine, what: &str) -> f64 {
    let series = format!("moe_budget{{what=\"{what}\"}} ");
    let text = engine.metrics();
    let value = text.lines().find_map(|line| line.strip_prefix(&series));
    value.unwrap_or_else(|| panic!("no {series}")).parse().unwrap()
}

#[test]
fn a_policy_that_costs_more_than_it_said_gives_way_to_a_cheaper_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.json");
    write_policy(&path);
    let router = format!("budget:0.75,policy={}", path.display());
    let engine = launch(&router, EngineConfig { prefix_cache: false, ..Default::default() }).unwrap();
    let prompt: Vec<u32> = (1..700).collect();
    let mean_k = |budget_version: Option<u64>| {
        let request = GenerateRequest { budget_version, ..GenerateRequest::greedy(prompt.clone(), 2) };
        engine.submit(request).unwrap().wait().unwrap().2.work.experts_per_token()
    };
    let first = engine.budget().unwrap();
    assert_eq!((first.version, first.share, first.shed), (0, 0.75, false));
    assert!(first.router.to_string().ends_with("policy.json,at=0.7500"), "{}", first.router);
    for served in 0..5 {
        assert_eq!(mean_k(None), 2.0, "after {served} requests of 700 tokens");
    }
    // The sixth is the one after which 4,096 tokens have been served.
    assert_eq!(mean_k(None), 2.0);
    assert_eq!(mean_k(None), 1.0);
    let second = engine.budget().unwrap();
    assert_eq!((second.version, second.share), (1, 0.5));
    assert_eq!((gauge(&engine, "target"), gauge(&engine, "measured")), (0.75, 1.0));
    assert_eq!((gauge(&engine, "policy"), gauge(&engine, "version"), gauge(&engine, "shed")), (0.5, 1.0, 0.0));
    assert_eq!(mean_k(Some(0)), 2.0, "who began with the first version keeps it");
}

#[test]
fn load_is_shed_only_by_a_router_that_keeps_a_budget() {
    let shed = |router: &str| launch(router, EngineConfig { load_shed: Some(0.5), ..Default::default() });
    let error = shed("dynk:0.8").err().unwrap();
    assert!(error.contains("dynk:0.8") && error.contains("keeps no budget"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.json");
    write_policy(&path);
    let config = EngineConfig { load_shed: Some(0.5), max_num_seqs: 1, prefix_cache: false, ..Default::default() };
    let engine = launch(&format!("budget:1,policy={}", path.display()), config).unwrap();
    let request = |engine: &Engine| {
        let budget = engine.budget().unwrap();
        let budget_version = Some(budget.version);
        let request = GenerateRequest { budget_version, ignore_eos: true, ..GenerateRequest::greedy(vec![5; 8], 200) };
        (budget, engine.submit(request).unwrap())
    };
    let (runs, waits, sheds) = (request(&engine), request(&engine), request(&engine));
    assert_eq!([&runs, &waits, &sheds].map(|(budget, _)| budget.shed), [false, false, true]);
    let mean_k = [runs, waits, sheds].map(|(_, events)| events.wait().unwrap().2.work.experts_per_token());
    assert_eq!(mean_k, [2.0, 2.0, 1.0]);
}
