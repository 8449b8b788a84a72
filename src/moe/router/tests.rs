//! One sweep over the table, then the rules one by one.

mod together;

use super::*;
use crate::moe::Routing;
use crate::moe::calibration::{HeldOut, PolicyTable, Rung};
use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;

fn shape(experts: usize, top_k: usize, renormalise: bool) -> MoeShape {
    MoeShape { experts, top_k, expert_width: 8, shared_width: None, renormalise, layers: 3, router: None }
}

fn policy(spec: &str, shape: &MoeShape) -> Policy {
    Policy::build(&spec.parse().unwrap(), shape).unwrap()
}

/// A router's example; the file it names is a calibration that knows nothing, with a policy for a share 0.7.
fn example(entry: &RouterEntry, shape: &MoeShape) -> Policy {
    let dir = tempfile::tempdir().unwrap();
    let path = calibrated(dir.path(), shape);
    with_files(&entry.example.replace("policy.json", &path), shape)
}

/// A calibration's path in `folder`.
fn calibrated(folder: &Path, shape: &MoeShape) -> String {
    let path = folder.join("policy.json");
    let mut calibration = Calibration::uninformed(shape, "checkpoint");
    calibration.policy = Some(table(shape));
    calibration.layers.iter_mut().for_each(|layer| layer.gamma_k[0] = 3.0);
    std::fs::write(&path, serde_json::to_string(&calibration).unwrap()).unwrap();
    path.display().to_string()
}

fn with_files(spec: &str, shape: &MoeShape) -> Policy {
    let files = Calibrations::new(|| Ok("checkpoint".into()));
    Policy::build_with(&spec.parse().unwrap(), shape, &files).unwrap()
}

/// One rung, whose layers take the rules in turn.
fn table(shape: &MoeShape) -> PolicyTable {
    let rules = [Rule::Contribution { tau: 0.8 }, Rule::Score { tau: 0.8 }, Rule::Threshold { theta: 0.2 }];
    let rules = rules.into_iter().cycle().take(shape.layers).collect();
    PolicyTable {
        scope: "experts".into(),
        target: 0.7,
        batch: None,
        lsq: true,
        rungs: vec![Rung { cost: 0.7, mean_k: 0.7 * shape.top_k as f64, rules }],
        held_out: HeldOut::default(),
    }
}

/// Routes tokens of ids 0.. at positions 10.. through layer 1.
fn route(policies: &[Policy], policy_t: &[u16], shape: &MoeShape, logits_te: &[f32]) -> Routing {
    let tokens = logits_te.len() / shape.experts;
    let ids = (0..tokens as u32).collect::<Vec<_>>();
    route_tokens(policies, policy_t, shape, logits_te, &ids)
}

fn route_tokens(policies: &[Policy], policy_t: &[u16], shape: &MoeShape, logits_te: &[f32], ids: &[u32]) -> Routing {
    let policies: Vec<Arc<Policy>> =
        policies.iter().map(|p| Arc::new(Policy::build(p.spec(), shape).unwrap())).collect();
    route_by(&policies, policy_t, shape, logits_te, ids)
}

/// The tokens are one tenant's, in decoding.
fn route_by(policies: &[Arc<Policy>], policy_t: &[u16], shape: &MoeShape, logits_te: &[f32], ids: &[u32]) -> Routing {
    let step = StepTokens {
        token_t: ids.to_vec(),
        position_t: ids.iter().map(|id| id + 10).collect(),
        policy_t: policy_t.to_vec(),
        decodes_t: vec![true; ids.len()],
        ..Default::default()
    };
    RouteCtx::new(shape, policies, &step).route(1, GateInput::logits(logits_te)).unwrap()
}

/// Routes tokens of ids 0.. by `policy` alone.
fn route_one(policy: Policy, shape: &MoeShape, logits_te: &[f32]) -> Routing {
    let ids: Vec<u32> = (0..(logits_te.len() / shape.experts) as u32).collect();
    route_by(&[Arc::new(policy)], &vec![0; ids.len()], shape, logits_te, &ids)
}

fn route_all(spec: &str, shape: &MoeShape, logits_te: &[f32]) -> Routing {
    let tokens = logits_te.len() / shape.experts;
    route(&[policy(spec, shape)], &vec![0; tokens], shape, logits_te)
}

/// (expert, weight) of token `t`, by expert.
fn chosen(routing: &Routing, t: usize) -> Vec<(usize, f32)> {
    let expert_of = |row: usize| (0..routing.experts()).find(|&e| routing.expert_rows(e).contains(&row)).unwrap();
    routing.token_rows(t).iter().map(|&r| (expert_of(r as usize), routing.weight_r()[r as usize])).collect()
}

#[test]
fn the_table_has_unique_names_full_docs_and_examples_that_build() {
    let mut names: Vec<&str> = ROUTERS.iter().map(|r| r.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), ROUTERS.len());
    for entry in ROUTERS {
        assert!(entry.usage.starts_with(entry.name) && entry.summary.len() > 10 && !entry.formula.is_empty());
        for shape in [shape(8, 2, true), shape(64, 8, false), shape(1, 1, true)] {
            let policy = example(entry, &shape);
            assert!(policy.describe().contains("k"), "{}", entry.name);
        }
    }
}

#[test]
fn routers_labelled_dynamic_take_more_experts_where_the_gate_is_flat_and_no_others_do() {
    let shape = shape(8, 4, true);
    let peaked = [9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let flat = [3.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0];
    let logits = [peaked, flat].concat();
    for entry in ROUTERS {
        let routing = route_one(example(entry, &shape), &shape, &logits);
        let differs = routing.token_rows(0).len() != routing.token_rows(1).len();
        assert_eq!(differs, entry.dynamic, "{}", entry.name);
    }
}

/// The first token whose routing in the step has other bits than alone.
fn first_that_differs(policy: Policy, shape: &MoeShape, logits_te: &[f32]) -> Option<usize> {
    let (tokens, policy) = (logits_te.len() / shape.experts, [Arc::new(policy)]);
    let ids: Vec<u32> = (0..tokens as u32).collect();
    let together = route_by(&policy, &vec![0; tokens], shape, logits_te, &ids);
    let bits = |routing: &Routing, t| chosen(routing, t).iter().map(|c| (c.0, c.1.to_bits())).collect::<Vec<_>>();
    (0..tokens).find(|&t| {
        let alone = route_by(&policy, &[0], shape, &logits_te[t * shape.experts..][..shape.experts], &ids[t..=t]);
        bits(&together, t) != bits(&alone, 0)
    })
}

#[test]
fn routers_labelled_batch_dependent_are_and_say_so() {
    let shape = shape(4, 2, true);
    let logits = [[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 3.0, 2.0]].concat();
    let mut found = Vec::new();
    for entry in ROUTERS {
        let policy = example(entry, &shape);
        let (invariant, told) = (policy.batch_invariant(), policy.describe());
        assert_eq!(told.contains("depends on the rest of the batch"), !invariant, "{told}");
        assert_eq!(first_that_differs(policy, &shape, &logits).is_some(), !invariant, "{}", entry.name);
        found.extend((!invariant).then_some(entry.name));
    }
    assert_eq!(found, ["oea", "xbudget"]);
}

#[test]
fn the_weights_of_a_router_are_another_ones_by_its_options() {
    let shape = shape(4, 2, true);
    let dir = tempfile::tempdir().unwrap();
    let path = calibrated(dir.path(), &shape);
    let options = |spec: &str| {
        let options = with_files(spec, &shape).weight_options();
        options.iter().map(|(name, value)| format!(",{name}={value}")).collect::<String>()
    };
    assert_eq!(options("dynk:0.5"), "");
    assert_eq!(options("dynk:0.5,weights=keep"), ",weights=keep");
    assert_eq!(options(&format!("contrib:0.5,cal={path}")), "");
    let scaled = format!(",weights=lsq,cal={path}");
    for spec in [format!("native{scaled}"), format!("policy:{path}"), format!("budget:0.7,policy={path}")] {
        assert_eq!(options(&spec), scaled);
    }
    let control = with_files(&format!("topk:1{scaled}"), &shape);
    let routing = route_by(&[Arc::new(control)], &[0], &shape, &[0.0, 1.0, 3.0, 2.0], &[1]);
    assert_eq!(routing.weight_r(), [3.0]);
}

#[test]
fn several_arguments_are_a_sweep_but_for_lists() {
    let swept =
        |spec: &str| sweep(&spec.parse().unwrap()).unwrap().iter().map(RouterSpec::to_string).collect::<Vec<_>>();
    assert_eq!(swept("dynk:0.5,0.8,mass=full"), ["dynk:0.5,mass=full", "dynk:0.8,mass=full"]);
    assert_eq!(swept("layers:2,1,2"), ["layers:2,1,2"]);
    assert_eq!(swept("native"), ["native"]);
    assert!(sweep(&"nothing:1,2".parse().unwrap()).is_err());
}

#[test]
fn values_out_of_range_are_refused_with_the_range_and_an_example() {
    let shape = shape(8, 2, true);
    for (spec, want) in [
        ("dynk:0", "(0, 1]; got 0"),
        ("dynk:1.5", "(0, 1]; got 1.5"),
        ("dynk:-0.1", "(0, 1]; got -0.1"),
        ("dynk:nan", "(0, 1]; got nan"),
        ("dynk:abc", "(0, 1]; got abc"),
        ("dynk", "τ is missing"),
        ("dynk:0.5,0.6", "takes one argument"),
        ("dynk:0.8,mass=half", "one of native, full; got half"),
        ("dynk:0.8,max=3", "from 1 to 2"),
        ("dynk:0.8,mass=full,max=9", "from 1 to 8"),
        ("dynk:0.8,min=0", "from 1 to 2"),
        ("dynk:0.8,mass=full,min=5,max=3", "min must not be above max"),
        ("dynk:0.8,tau=3", "unknown option `tau`; there are weights, mass, min, max"),
        ("topk:0", "from 1 to 8"),
        ("topk:9", "from 1 to 8 for this model; got 9"),
        ("topk", "K is missing"),
        ("topk:1,seed=3", "unknown option `seed`"),
        ("layers:1,2", "3 MoE layers, so give 3 numbers; got 2"),
        ("layers", "got 0"),
        ("layers:1,2,9", "from 1 to 8"),
        ("ratio:2", "(0, 1]"),
        ("threshold:0", "(0, 1]"),
        ("complexity:luck", "there is no estimator `luck`"),
        ("complexity:constant:2", "[0, 1]; got 2"),
        ("complexity:router-margin,min-ratio=1.5", "min-ratio must be a number in (0, 1]; got 1.5"),
        ("complexity:router-margin,max-ratio=0", "max-ratio must be a number in (0, 1]; got 0"),
        ("complexity:router-margin,min=2,max-ratio=0.5", "min must not be above max; got min=2, max=1"),
        ("complexity:router-margin,min=1,min-ratio=0.5", "the same bound as a number and as a ratio"),
        ("complexity:router-margin,cal=x.json", "names a file, which requests may not"),
        ("contrib:0.8", "contrib needs cal=FILE, which moe-calibrate makes"),
        ("contrib:0,cal=x.json", "(0, 1]; got 0"),
        ("skip:auto", "auto needs cal=FILE"),
        ("skip:2", "(0, 1]; got 2"),
        ("threshold:keep:0.7", "keep needs cal=FILE"),
        ("threshold:keep:7", "q must be a number in (0, 1]; got 7"),
        ("topk:1,weights=lsq", "weights=lsq needs cal=FILE"),
        ("policy:x.json", "names a file, which requests may not"),
        ("policy", "FILE is missing"),
        ("oea", "k' is missing"),
        ("oea:0", "from 1 to 2"),
        ("oea:3", "from 1 to 2"),
        ("oea:1,scope=prompt", "one of decode, all; got prompt"),
        ("xbudget:0", "from 1 to 8"),
        ("xbudget:9", "from 1 to 8"),
        ("xbudget:4,max=3", "unknown option `max`; there are weights, scope"),
        ("uniform:2,seed=x", "seed must be"),
        ("native:3", "takes no argument"),
        ("native,weights=big", "one of native, renorm, keep, lsq; got big"),
        (
            "router66:1",
            "there are native, topk, layers, dynk, ratio, threshold, skip, contrib, complexity, policy, budget, oea, xbudget, \
             uniform",
        ),
    ] {
        let error = Policy::build(&spec.parse().unwrap(), &shape).err().expect(spec).to_string();
        assert!(error.contains(want), "{spec}: {error}");
        assert!(error.contains(spec.split(':').next().unwrap()), "{error}");
        assert!(error.contains("for example") || spec.starts_with("router66"), "{error}");
    }
}

#[test]
fn the_rules_choose_what_a_hand_count_says() {
    // Probabilities .5 .25 .125 .0625 .0625: logits are their logarithms.
    let p = [0.0625f32, 0.5, 0.125, 0.25, 0.0625];
    let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
    let shape = shape(5, 2, true);
    let k = |spec: &str| route_all(spec, &shape, &logits).rows();
    assert_eq!(k("native"), 2);
    assert_eq!(k("topk:3"), 3);
    assert_eq!(k("layers:1,4,1"), 4);
    assert_eq!(k("dynk:0.6"), 1); // .5 of .75 is a share of .667
    assert_eq!(k("dynk:0.7"), 2);
    assert_eq!(k("dynk:0.6,min=2"), 2);
    assert_eq!(k("dynk:0.49,mass=full"), 1);
    assert_eq!(k("dynk:0.8,mass=full"), 3);
    assert_eq!(k("dynk:0.95,mass=full"), 5);
    assert_eq!(k("dynk:0.95,mass=full,max=3"), 3);
    assert_eq!(k("ratio:0.6"), 1);
    assert_eq!(k("ratio:0.1"), 2);
    assert_eq!(k("ratio:0.2,max=5"), 3);
    assert_eq!(k("threshold:0.6"), 1);
    assert_eq!(k("threshold:0.2"), 2);
    assert_eq!(k("threshold:0.1,max=5"), 3);
    assert_eq!(k("skip:0.6"), 1);
    assert_eq!(k("skip:0.1"), 2);
    assert_eq!(k("complexity:constant:0"), 1);
    assert_eq!(k("complexity:constant:0.5"), 2); // 1 + round(0.5): halves up
    assert_eq!(k("complexity:constant:0.49"), 1);
    assert_eq!(k("complexity:constant:0.5,max=5"), 3);
    assert_eq!(k("complexity:constant:1,max-ratio=0.5"), 1);
    assert_eq!(k("complexity:constant:0,min-ratio=1"), 2);
    assert_eq!(k("uniform:4"), 4);
    assert_eq!(chosen(&route_all("native", &shape, &logits), 0).iter().map(|c| c.0).collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn weight_rules_follow_the_family_or_what_was_asked() {
    let p = [0.0625f32, 0.5, 0.125, 0.25, 0.0625];
    let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
    let weights = |spec: &str, renormalise: bool| -> Vec<f32> {
        let shape = shape(5, 2, renormalise);
        chosen(&route_all(spec, &shape, &logits), 0).iter().map(|c| c.1).collect()
    };
    let close = |got: Vec<f32>, want: &[f32]| {
        assert_eq!(got.len(), want.len());
        got.iter().zip(want).for_each(|(g, w)| assert!((g - w).abs() < 1e-6, "{got:?} is not {want:?}"));
    };
    close(weights("native", true), &[2.0 / 3.0, 1.0 / 3.0]);
    close(weights("native", false), &[0.5, 0.25]);
    close(weights("topk:1", true), &[1.0]);
    close(weights("topk:1,weights=keep", true), &[2.0 / 3.0]);
    close(weights("topk:1,weights=keep", false), &[0.5]);
    close(weights("topk:2,weights=renorm", false), &[2.0 / 3.0, 1.0 / 3.0]);
}

#[test]
fn weights_that_underflow_do_not_divide_by_zero() {
    let shape = shape(3, 1, true);
    let mut far = false;
    for seed in 0..20 {
        let routing = route_all(&format!("uniform:1,seed={seed}"), &shape, &[0.0, -500.0, -500.0]);
        assert_eq!(routing.weight_r(), [1.0]);
        far |= routing.expert_rows(0).is_empty();
    }
    assert!(far, "no seed chose an expert of probability 0, so nothing was tested");
}

#[test]
fn uniform_depends_on_its_seed_and_uses_every_expert() {
    let shape = shape(8, 2, true);
    let logits = vec![0.0; 8 * 200];
    let (a, b) = (route_all("uniform:2,seed=1", &shape, &logits), route_all("uniform:2,seed=2", &shape, &logits));
    assert_ne!(a, b);
    for e in 0..8 {
        assert!((20..=80).contains(&a.expert_rows(e).len()), "expert {e}: {} of 400 rows", a.expert_rows(e).len());
    }
}

#[test]
fn native_is_a_checkpoints_own_rule_where_it_has_one() {
    let p = [0.0625f32, 0.5, 0.125, 0.25, 0.0625];
    let logits: Vec<f32> = p.iter().map(|p| p.ln()).collect();
    let own = |spec: &str| MoeShape { router: Some(spec.parse().unwrap()), ..shape(5, 5, true) };
    let trained = own("dynk:0.8,mass=full");
    assert_eq!(route_all("native", &trained, &logits), route_all("dynk:0.8", &shape(5, 5, true), &logits));
    assert_eq!(route_all("native", &trained, &logits).rows(), 3);
    // How the outputs are weighed is still for the asking.
    let kept = route_all("native,weights=keep", &trained, &logits);
    assert!(chosen(&kept, 0).iter().all(|(e, weight)| (weight - p[*e]).abs() < 1e-6));
    for spec in ["native", "dynk", "topk:6", "nothing:1", "topk:2,weights=renorm"] {
        assert!(Policy::build(&RouterSpec::native(), &own(spec)).is_err(), "{spec}");
    }
    let within = MoeShape { top_k: 2, ..own("topk:3") };
    let error = Policy::build(&RouterSpec::native(), &within).err().unwrap().to_string();
    assert!(error.contains("topk:3") && error.contains("can take 3") && error.contains("is 2"), "{error}");
}

#[test]
fn the_trace_counts_what_was_routed() {
    let shape = shape(4, 2, true);
    let policies = [Arc::new(policy("topk:1", &shape))];
    let step = StepTokens { token_t: vec![5, 6], position_t: vec![0, 1], policy_t: vec![0, 0], ..Default::default() };
    let mut ctx = RouteCtx::new(&shape, &policies, &step);
    ctx.route(0, GateInput::logits(&[9.0, 1.0, 0.0, 0.0, 9.0, 0.0, 1.0, 0.0])).unwrap();
    ctx.route(1, GateInput::logits(&[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 30.0])).unwrap();
    let trace = ctx.into_trace();
    assert_eq!(trace.k_tl, [1, 1, 0, 1, 1, 0]);
    assert_eq!(trace.k_histogram, [0, 4, 0, 0, 0]);
    assert_eq!(trace.expert_tokens, [2, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0]);
    assert_eq!(trace.unique_experts, 1 + 2);
    assert_eq!(trace.unique_experts_native, 3 + 3); // {0,1,2}, then {0,1} ∪ {3,0}
    assert!(trace.entropy_l[1] > 0.49 && trace.entropy_l[1] < 0.51, "{:?}", trace.entropy_l);
}

/// Logits as models make them, with ties, and sometimes what they must never make.
fn logits(tokens: usize, experts: usize) -> impl Strategy<Value = Vec<f32>> {
    let special = prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(1e30f32)];
    let logit = prop_oneof![20 => -8.0f32..8.0, 4 => Just(0.5f32), 1 => special];
    proptest::collection::vec(logit, tokens * experts)
}

proptest! {
    #[test]
    fn every_router_gives_every_token_an_expert_and_finite_weights(
        z in logits(5, 8), renormalise: bool, rule in prop_oneof![Just(Weights::Native), Just(Weights::Renorm), Just(Weights::Keep)]
    ) {
        let shape = shape(8, 3, renormalise);
        for entry in ROUTERS {
            // `finish` checks the CSR invariants; that it succeeds is the claim.
            let policy = Policy { weights: rule, ..example(entry, &shape) };
            let routing = route_one(policy, &shape, &z);
            prop_assert!((0..5).all(|t| !routing.token_rows(t).is_empty()));
            prop_assert!(routing.weight_r().iter().all(|w| w.is_finite() && *w >= 0.0));
        }
    }

    #[test]
    fn routers_labelled_batch_invariant_ignore_the_rest_of_the_step(z in logits(6, 8)) {
        let shape = shape(8, 2, true);
        for entry in ROUTERS {
            let policy = example(entry, &shape);
            if policy.batch_invariant() {
                prop_assert_eq!(first_that_differs(policy, &shape, &z), None, "{}", entry.name);
            }
        }
    }

    #[test]
    fn a_step_mixes_policies_token_by_token(z in logits(6, 8), picks in proptest::collection::vec(0u16..3, 6)) {
        let shape = shape(8, 2, false);
        let specs = ["native", "dynk:0.5,mass=full", "topk:5,weights=renorm"];
        let policies: Vec<Policy> = specs.iter().map(|s| policy(s, &shape)).collect();
        let mixed = route(&policies, &picks, &shape, &z);
        for t in 0..6 {
            let own = route_all(specs[picks[t] as usize], &shape, &z);
            prop_assert_eq!(chosen(&mixed, t), chosen(&own, t));
        }
    }

    #[test]
    fn dynk_takes_the_fewest_experts_that_reach_its_share(z in logits(1, 8), tau in 0.01f32..1.0, full: bool) {
        let shape = shape(8, 4, true);
        let spec = format!("dynk:{tau}{}", if full { ",mass=full" } else { "" });
        let k = route_all(&spec, &shape, &z).rows();
        let mut table = gate::GateTable::default();
        table.fill(&z, 8);
        let (p, order) = table.row(0);
        let experts = if full { 8 } else { 4 };
        let sum = |n: usize| order[..n].iter().map(|&e| f64::from(p[e as usize])).sum::<f64>();
        let goal = f64::from(tau) * sum(experts);
        prop_assert!(k <= experts && sum(k) >= goal, "k = {k} gathers {} of {goal}", sum(k));
        prop_assert!(k == 1 || sum(k - 1) < goal, "k = {k} is not the fewest");
    }

    #[test]
    fn dynk_never_takes_fewer_experts_for_a_larger_share(z in logits(4, 8), a in 0.01f32..=1.0, b in 0.01f32..=1.0) {
        let shape = shape(8, 4, true);
        let (low, high) = (a.min(b), a.max(b));
        for mass in ["native", "full"] {
            let (few, many) = (
                route_all(&format!("dynk:{low},mass={mass}"), &shape, &z),
                route_all(&format!("dynk:{high},mass={mass}"), &shape, &z),
            );
            prop_assert!((0..4).all(|t| few.token_rows(t).len() <= many.token_rows(t).len()));
        }
    }

    #[test]
    fn rules_that_coincide_give_the_same_bits(z in logits(4, 8), renormalise: bool) {
        let shape = shape(8, 3, renormalise);
        let native = route_all("native", &shape, &z);
        for spec in ["topk:3", "layers:3", "layers:1,3,1", "dynk:1.0", "dynk:1", "native,weights=keep"] {
            let routing = route_all(spec, &shape, &z);
            prop_assert_eq!(routing.token_r(), native.token_r(), "{}", spec);
            let bits = |r: &Routing| r.weight_r().iter().map(|w| w.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&routing), bits(&native), "{}", spec);
        }
        let all = route_all("topk:8", &shape, &z);
        prop_assert_eq!(route_all("dynk:1,mass=full", &shape, &z), all);
    }
}
