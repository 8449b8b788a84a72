//! The harness in process and over HTTP, on the bundled checkpoint and sample sets of this repository's own.

use crate::support::{Server, ServerOptions, bundled_files, repo};
use moe_serve::engine::api::Generate;
use moe_serve::engine::{EngineConfig, RequestRouters, Text};
use moe_serve::eval::compare::{Arrangement, Plan, comparisons, evaluate};
use moe_serve::eval::results::{Arm, Role};
use moe_serve::eval::task::{Place, Source};
use moe_serve::eval::{
    Bootstrap, Chosen, Generated, How, Http, HttpOptions, InProcess, Lm, LmError, Log, Runner, Said, Scored,
    SuiteOptions, Task, TextOptions, findings, read,
};
use moe_serve::types::MoeShape;
use std::path::Path;
use std::sync::Mutex;

const BOOTSTRAP: Bootstrap = Bootstrap { resamples: 200, seed: 1234, kl_samples: 8 };

/// A run whose log lies in `folder`.
pub fn samples<'a>(lm: &'a dyn Lm, folder: &Path) -> Runner<'a> {
    let log = Log::open(&folder.join("samples.jsonl"), &Default::default()).unwrap();
    Runner { lm, log: Mutex::new(log), workers: 16 }
}

/// The model's own router, and nothing beside it.
pub fn own_router() -> Plan {
    Plan { routers: Vec::new(), compare_static: false, bootstrap: BOOTSTRAP, moe: None }
}

fn against_static(routers: &[&str], moe: MoeShape) -> Plan {
    let dynamic = |spec: &&str| Arrangement {
        spec: spec.parse().unwrap(),
        dynamic: spec.starts_with("dynk"),
        weights: Vec::new(),
    };
    let routers = routers.iter().map(dynamic).collect();
    Plan { routers, compare_static: true, moe: Some(moe), ..own_router() }
}

/// A server whose requests may choose any router.
fn server() -> Server {
    let request_routers = Some(RequestRouters { experts_max: Some(8), ..Default::default() });
    let config = EngineConfig { request_routers, ..ServerOptions::default().config };
    Server::start(ServerOptions { config, ..Default::default() })
}

fn in_process(server: &Server) -> (InProcess, MoeShape) {
    let shape = crate::support::try_load(&repo("models/stories"), Default::default()).unwrap();
    let shape = shape.model.shape().clone();
    let text = Text::read(&bundled_files().tokenizer, shape.vocab).unwrap();
    (InProcess::new(server.engine.clone(), text, &shape), shape.moe)
}

/// The sample sets of the repository, and windows of a text of its own.
fn suite(lm: &dyn Lm, names: &[&str]) -> Vec<Task> {
    let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
    let source = Source { place: Place::Directory(repo("eval/samples")), unverified: true, bars: Default::default() };
    let perplexity = TextOptions { text: repo("eval/samples/text.txt"), window: 48, tokens_max: Some(480) };
    let options = SuiteOptions { shots: None, limit: None, seed: 1234, max_gen_tokens: Some(24), perplexity };
    let material = read(&names, &source, &options).unwrap();
    material.into_iter().map(|m| m.encode(lm).unwrap()).collect()
}

const ALL: &[&str] =
    &["boolean_expressions", "snarks", "astronomy", "high_school_geography", "gsm8k", "gsm8k_cot", "perplexity"];

/// Everything that must not depend on when and where a run took place.
fn timeless(arms: &[Arm]) -> Vec<Arm> {
    let mut arms = arms.to_vec();
    for result in arms.iter_mut().flat_map(|arm| &mut arm.tasks) {
        result.seconds = 0.0;
        result.expert_bytes = None;
    }
    arms
}

#[test]
fn every_router_runs_beside_native_and_its_static_control_at_the_same_mean_k() {
    let server = server();
    let (lm, moe) = in_process(&server);
    let tasks = suite(&lm, ALL);
    let plan = against_static(&["dynk:0.65", "dynk:0.9,mass=full", "topk:1"], moe);
    let folder = tempfile::tempdir().unwrap();
    let runner = samples(&lm, folder.path());
    let arms = evaluate(&runner, &tasks, &plan, |_, _| {}).unwrap();
    let labels: Vec<&str> = arms.iter().map(|a| a.label.as_str()).collect();
    assert_eq!(
        labels,
        [
            "native",
            "dynk:0.65",
            "static control of dynk:0.65",
            "dynk:0.9,mass=full",
            "static control of dynk:0.9,mass=full",
            "topk:1"
        ]
    );
    let arm = |label: &str| arms.iter().find(|a| a.label == label).unwrap();
    for (i, task) in tasks.iter().enumerate() {
        let routing = |label: &str| arm(label).tasks[i].routing.clone().unwrap();
        assert_eq!((routing("native").mean_k, routing("topk:1").mean_k), (2.0, 1.0), "{}", task.name);
        assert_eq!(routing("native").expert_flops.saved, 0.0);
        assert_eq!(routing("topk:1").expert_flops.saved, 0.5);
        assert!(routing("dynk:0.9,mass=full").expert_flops.saved < 0.0, "{}: a cost", task.name);
        for router in ["dynk:0.65", "dynk:0.9,mass=full"] {
            let (k, control) = (routing(router).mean_k, routing(&format!("static control of {router}")).mean_k);
            assert!((k - control).abs() < 0.06, "{}: {router} has mean k {k}, its control {control}", task.name);
            assert!(arm(router).tasks[i].kl.as_ref().unwrap().mean > 0.0);
        }
        let histogram = routing("dynk:0.65").k_histogram;
        assert_eq!(histogram.iter().sum::<u64>(), routing("dynk:0.65").tokens * 6, "{}", task.name);
        assert!(arm("native").tasks[i].expert_bytes.unwrap().saved.abs() < 1e-9);
        assert_eq!(arm("native").tasks[i].kl, None);
    }
    let found = comparisons(&runner.log(), &tasks, &arms, BOOTSTRAP);
    // Five arms beside native, two of them beside their controls too.
    assert_eq!(found.len(), tasks.len() * 7);
    assert!(found.iter().all(|c| c.low <= c.difference + 1e-9 && c.difference <= c.high + 1e-9 && c.p_holm >= c.p));
    let said = findings(&tasks[0].data, &arms, &found);
    assert!(said.iter().any(|s| s.contains("Not the published data")));
    assert!(
        said.iter()
            .any(|s| s.contains("`dynk:0.65`") && s.contains("its static control") && s.contains("the dynamic rule")),
        "{said:?}"
    );
}

#[test]
fn a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been() {
    let server = server();
    let (lm, moe) = in_process(&server);
    let tasks = suite(&lm, ALL);
    let plan = against_static(&["dynk:0.65"], moe);
    let whole = tempfile::tempdir().unwrap();
    let runner = samples(&lm, whole.path());
    let wanted = evaluate(&runner, &tasks, &plan, |_, _| {}).unwrap();
    let finished = comparisons(&runner.log(), &tasks, &wanted, BOOTSTRAP);
    let lines = std::fs::read_to_string(whole.path().join("samples.jsonl")).unwrap();
    // As a kill leaves it: so many lines, the last one not whole.
    for kept in [lines.len() / 5, lines.len() / 2, lines.len() - 30] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("samples.jsonl"), &lines[..kept]).unwrap();
        let runner = samples(&lm, folder.path());
        let before = runner.log().outcomes.len();
        assert!(before > 0);
        let arms = evaluate(&runner, &tasks, &plan, |_, _| {}).unwrap();
        assert_eq!(timeless(&arms), timeless(&wanted), "after {before} answers");
        let log = std::fs::read_to_string(folder.path().join("samples.jsonl")).unwrap();
        let asked = log.lines().filter(|line| line.starts_with("{\"outcome\"")).count();
        assert_eq!(asked, runner.log().outcomes.len(), "no sample was asked twice");
        assert_eq!(comparisons(&runner.log(), &tasks, &arms, BOOTSTRAP), finished);
    }
}

#[test]
fn fewer_kl_samples_than_the_log_has_give_what_a_fresh_run_gives() {
    let server = server();
    let (lm, moe) = in_process(&server);
    let tasks = suite(&lm, &["gsm8k", "perplexity"]);
    let many = against_static(&["dynk:0.65"], moe);
    let few = Plan { bootstrap: Bootstrap { kl_samples: 2, ..BOOTSTRAP }, ..many.clone() };
    let (used, fresh) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    evaluate(&samples(&lm, used.path()), &tasks, &many, |_, _| {}).unwrap();
    let again = evaluate(&samples(&lm, used.path()), &tasks, &few, |_, _| {}).unwrap();
    let wanted = evaluate(&samples(&lm, fresh.path()), &tasks, &few, |_, _| {}).unwrap();
    assert_eq!(timeless(&again), timeless(&wanted));
    assert!(wanted[1].tasks.iter().all(|task| task.kl.is_some()));
}

#[test]
fn a_text_longer_than_any_prompt_is_cut_into_windows() {
    let server = server();
    let (lm, _) = in_process(&server);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.txt");
    let text = std::fs::read_to_string(repo("eval/samples/text.txt")).unwrap().repeat(12);
    std::fs::write(&path, &text).unwrap();
    assert!(server.engine.encode(&text, true).is_err(), "as a prompt it is too long");
    let source = Source { place: Place::Directory(repo("eval/samples")), unverified: true, bars: Default::default() };
    let perplexity = TextOptions { text: path, window: 1024, tokens_max: None };
    let options = SuiteOptions { limit: Some(2), perplexity, ..Default::default() };
    let material = read(&["perplexity".into()], &source, &options).unwrap();
    let tasks: Vec<Task> = material.into_iter().map(|m| m.encode(&lm).unwrap()).collect();
    assert_eq!(tasks[0].questions.len(), 2, "the limit counts windows");
    let folder = tempfile::tempdir().unwrap();
    let arms = evaluate(&samples(&lm, folder.path()), &tasks, &own_router(), |_, _| {}).unwrap();
    assert_eq!(arms[0].tasks[0].routing.as_ref().unwrap().tokens, 2048);
    assert_eq!(arms[0].tasks[0].metrics[0].name, "perplexity");
}

#[test]
fn a_task_takes_its_own_number_of_shots() {
    let server = server();
    let (lm, _) = in_process(&server);
    let tasks = suite(&lm, &["astronomy", "astronomy@2", "snarks@1", "gsm8k"]);
    let names: Vec<&str> = tasks.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["mmlu", "gsm8k", "mmlu@2", "bbh@1"]);
    let longest = |i: usize| tasks[i].questions.iter().map(|q| q.ask.prompt().len()).max().unwrap();
    assert!(longest(0) < longest(2));
    let source = Source { place: Place::Directory(repo("eval/samples")), unverified: true, bars: Default::default() };
    for (name, text) in [("mmlu@", "after the @"), ("mmlu@five", "after the @"), ("astronomy@9", "mmlu takes 0 to 5")] {
        let error = read(&[name.into()], &source, &SuiteOptions::default()).err().unwrap().to_string();
        assert!(error.contains(text), "{error}");
    }
}

/// A model that fails in every way it can.
struct Panics;

impl Lm for Panics {
    fn max_length(&self) -> usize {
        1024
    }
    fn encode(&self, text: &str) -> Result<Vec<u32>, LmError> {
        Ok(text.bytes().map(u32::from).collect())
    }
    fn text_bytes(&self, tokens: &[u32]) -> usize {
        tokens.len()
    }
    fn choose(&self, _: &[u32], _: &[Vec<u32>], _: &How<'_>) -> Result<Chosen, LmError> {
        panic!("on purpose")
    }
    fn generate(&self, _: &[u32], _: &[String], _: usize, _: &How<'_>) -> Result<Generated, LmError> {
        panic!("on purpose")
    }
    fn score(&self, _: &[u32], _: &How<'_>) -> Result<Scored, LmError> {
        panic!("on purpose")
    }
}

#[test]
fn a_model_that_panics_ends_the_run_and_leaves_no_one_waiting() {
    let tasks = suite(&Panics, &["astronomy"]);
    assert!(tasks[0].questions.len() > 1 && tasks[0].questions[0].shared > 16, "others wait for the first one");
    let folder = tempfile::tempdir().unwrap();
    let error = evaluate(&samples(&Panics, folder.path()), &tasks, &own_router(), |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("mmlu") && error.contains("panicked"), "{error}");
}

#[test]
fn answers_over_http_are_those_in_process() {
    let server = server();
    let (lm, _) = in_process(&server);
    let options = HttpOptions {
        base_url: server.url.clone(),
        model: "stories".into(),
        api_key: None,
        // What HTTP takes for itself, so that nothing is cut here and not there.
        max_length: 1024,
    };
    let text = Text::read(&bundled_files().tokenizer, 4096).unwrap();
    let http = Http::connect(options, text).unwrap();
    for router in [None, Some("dynk:0.65")] {
        let routers = router
            .iter()
            .map(|r| Arrangement { spec: r.parse().unwrap(), dynamic: true, weights: Vec::new() })
            .collect();
        let plan = Plan { routers, ..own_router() };
        let run = |lm: &dyn Lm| {
            let folder = tempfile::tempdir().unwrap();
            let runner = samples(lm, folder.path());
            evaluate(&runner, &suite(lm, ALL), &plan, |_, _| {}).unwrap();
            let log = runner.log();
            log.outcomes.values().cloned().collect::<Vec<_>>()
        };
        let (near, far) = (run(&lm), run(&http));
        assert_eq!(near.len(), far.len());
        for (near, far) in near.iter().zip(&far) {
            assert_eq!((&near.key, &near.judged), (&far.key, &far.judged));
            match (&near.said, &far.said) {
                (Said::LogLikelihoods(a), Said::LogLikelihoods(b)) => {
                    assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} and {b:?}");
                }
                (Said::Window(a), Said::Window(b)) => assert!((a.nats - b.nats).abs() < 1e-3, "{a:?} and {b:?}"),
                (a, b) => assert_eq!(a, b),
            }
        }
    }
}

#[test]
fn a_server_that_fails_ends_the_run_and_is_no_wrong_answer() {
    let server = server();
    let text = || Text::read(&bundled_files().tokenizer, 4096).unwrap();
    let options = |base_url: &str, model: &str| HttpOptions {
        base_url: base_url.into(),
        model: model.into(),
        api_key: None,
        max_length: 1024,
    };
    let http = Http::connect(options(&format!("{}/v1/", server.url), "stories"), text()).unwrap();
    let tasks = suite(&http, &["astronomy"]);
    // A router that the server refuses, before and after others that it takes.
    let refused = Arrangement { spec: "nonsense".parse().unwrap(), dynamic: false, weights: Vec::new() };
    let folder = tempfile::tempdir().unwrap();
    let runner = samples(&http, folder.path());
    let plan = Plan { routers: vec![refused], ..own_router() };
    let error = evaluate(&runner, &tasks, &plan, |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("400") && error.contains("nonsense") && error.contains("goes on from there"), "{error}");
    assert!(runner.log().outcomes.is_empty(), "no answer was made up");
    let error = Http::connect(options(&server.url, "other"), text()).err().unwrap().to_string();
    assert!(error.contains("\"other\"") && error.contains("stories"), "{error}");
    let url = server.url.clone();
    drop(server);
    let error = Http::connect(options(&url, "stories"), text()).err().unwrap().to_string();
    assert!(error.contains(&url), "{error}");
}

#[test]
fn a_static_router_has_no_control_and_native_is_not_run_twice() {
    let server = server();
    let (lm, moe) = in_process(&server);
    let tasks = suite(&lm, &["astronomy"]);
    let folder = tempfile::tempdir().unwrap();
    let arms = evaluate(
        &samples(&lm, folder.path()),
        &tasks,
        &against_static(&["native", "layers:2,1,1,2,1,2"], moe),
        |_, _| {},
    );
    let roles: Vec<(String, Role)> = arms.unwrap().into_iter().map(|a| (a.label, a.role)).collect();
    assert_eq!(roles, [("native".into(), Role::Native), ("layers:2,1,1,2,1,2".into(), Role::Router)]);
}
