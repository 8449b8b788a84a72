//! The rules that route tokens by one another: `oea` and `xbudget`.

use super::*;

const SPECS: [&str; 6] = ["oea:1", "oea:2", "xbudget:1", "xbudget:2", "xbudget:5", "oea:1,weights=renorm"];

/// Routes one step whose tokens are `tenant_t`'s and are decoded as `decodes_t` says.
fn routed(spec: &str, shape: &MoeShape, logits_te: &[f32], tenant_t: &[u32], decodes_t: &[bool]) -> Routing {
    let tokens = logits_te.len() / shape.experts;
    let step = StepTokens {
        token_t: vec![7; tokens],
        position_t: vec![9; tokens],
        policy_t: vec![0; tokens],
        tenant_t: tenant_t.to_vec(),
        decodes_t: decodes_t.to_vec(),
        ..Default::default()
    };
    RouteCtx::new(shape, &[Arc::new(policy(spec, shape))], &step).route(1, GateInput::logits(logits_te)).unwrap()
}

/// The experts of every token, when all are one's and decoded.
fn experts(spec: &str, shape: &MoeShape, logits_te: &[f32]) -> Vec<Vec<usize>> {
    let routing = routed(spec, shape, logits_te, &[], &vec![true; logits_te.len() / shape.experts]);
    (0..routing.tokens()).map(|t| experts_of(&routing, t)).collect()
}

fn experts_of(routing: &Routing, t: usize) -> Vec<usize> {
    chosen(routing, t).iter().map(|c| c.0).collect()
}

/// Logits of tokens with these probabilities, in 32nds.
fn of_32(p_te: &[[u32; 5]]) -> Vec<f32> {
    p_te.iter().flatten().map(|p| (*p as f32 / 32.0).ln()).collect()
}

/// Top-2 of these: {0, 1}, {0, 2}, {3, 1}.
const THREE: [[u32; 5]; 3] = [[16, 8, 4, 3, 1], [12, 1, 10, 4, 5], [2, 10, 3, 16, 1]];

#[test]
fn oea_fills_up_from_what_others_opened() {
    let shape = shape(5, 2, true);
    let z = of_32(&THREE);
    // S = {0, 3}: the second token's 3 is fourth in its own order, the first one's too.
    assert_eq!(experts("oea:1", &shape, &z), [[0, 3], [0, 3], [0, 3]]);
    assert_eq!(experts("oea:2", &shape, &z), experts("native", &shape, &z));
    // Alone there is nothing to fill up from.
    assert_eq!(experts("oea:1", &shape, &z[..5]), [[0]]);
    // Tokens that agree leave no more than they opened.
    assert_eq!(experts("oea:1", &shape, &z[..10]), [[0], [0]]);
}

#[test]
fn xbudget_opens_the_experts_of_most_native_mass() {
    let shape = shape(5, 2, true);
    let z = of_32(&THREE);
    // Masses in 32nds: 28, 18, 10, 16, 0. That the first token has 3/32 on expert 3 counts for nothing.
    assert_eq!(experts("xbudget:1", &shape, &z), [[0], [0], [0]]);
    assert_eq!(experts("xbudget:2", &shape, &z), [[0, 1], [0, 1], [0, 1]]);
    assert_eq!(experts("xbudget:3", &shape, &z), [[0, 1], [0, 3], [1, 3]]);
    assert_eq!(experts("xbudget:4", &shape, &z), experts("native", &shape, &z));
    // Alone it is the smaller of k0 and N; of equal masses the lower index comes first.
    assert_eq!(experts("xbudget:1", &shape, &z[..5]), [[0]]);
    assert_eq!(experts("xbudget:5", &shape, &z[..5]), [[0, 1]]);
    assert_eq!(experts("xbudget:1", &shape, &of_32(&[[1, 1, 10, 10, 10], [1, 1, 10, 10, 10]])), [[2], [2]]);
}

#[test]
fn weights_are_over_the_experts_that_are_left() {
    let z = of_32(&THREE);
    let weights = |spec: &str, renormalise: bool| -> Vec<f32> {
        chosen(&routed(spec, &shape(5, 2, renormalise), &z, &[], &[true; 3]), 1).iter().map(|c| c.1).collect()
    };
    // The second token has expert 0 (12/32) and expert 3 (4/32); native gave it 0 and 2 (10/32).
    for (spec, renormalise, want) in [
        ("oea:1", true, [0.75, 0.25]),
        ("oea:1", false, [12.0 / 32.0, 4.0 / 32.0]),
        ("oea:1,weights=keep", true, [12.0 / 22.0, 4.0 / 22.0]),
        ("oea:1,weights=renorm", false, [0.75, 0.25]),
    ] {
        let got = weights(spec, renormalise);
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-6), "{spec}: {got:?} is not {want:?}");
    }
}

#[test]
fn policies_of_one_step_are_not_together() {
    let shape = shape(5, 2, true);
    let z = of_32(&THREE);
    let policies = [policy("oea:1", &shape), policy("oea:1,weights=keep", &shape), policy("native", &shape)];
    let mixed = route(&policies, &[0, 1, 2], &shape, &z);
    assert_eq!((0..3).map(|t| experts_of(&mixed, t)).collect::<Vec<_>>(), [vec![0], vec![0], vec![1, 3]]);
}

#[test]
fn the_scope_is_decoding_unless_it_is_all() {
    let shape = shape(5, 2, true);
    let z = of_32(&THREE);
    for spec in ["oea:1", "xbudget:1"] {
        // No decoding at all: native, as where nothing is said of the step.
        assert_eq!(
            routed(spec, &shape, &z, &[], &[false; 3]).token_r(),
            routed("native", &shape, &z, &[], &[]).token_r()
        );
        let all = routed(&format!("{spec},scope=all"), &shape, &z, &[], &[]);
        assert_eq!((0..3).map(|t| experts_of(&all, t)).collect::<Vec<_>>(), experts(spec, &shape, &z));
    }
    let routing = routed("oea:1", &shape, &z, &[], &[true, false, true]);
    assert_eq!((0..3).map(|t| experts_of(&routing, t)).collect::<Vec<_>>(), [[0, 3], [0, 2], [0, 3]]);
}

proptest! {
    #[test]
    fn tokens_keep_their_own_and_fill_up_to_k0(z in logits(6, 8), own in 1usize..=3) {
        let shape = shape(8, 3, true);
        let got = experts(&format!("oea:{own}"), &shape, &z);
        let native = experts("native", &shape, &z);
        let kept = experts(&format!("topk:{own}"), &shape, &z);
        let mut open: Vec<usize> = kept.concat();
        open.sort_unstable();
        open.dedup();
        for t in 0..6 {
            prop_assert!(kept[t].iter().all(|e| got[t].contains(e)));
            prop_assert!(got[t].iter().all(|e| open.contains(e)));
            prop_assert_eq!(got[t].len(), open.len().min(3));
        }
        prop_assert!(own < 3 || got == native);
    }

    #[test]
    fn a_budget_of_experts_is_kept_and_none_holds_more_mass(z in logits(6, 6), n in 1usize..=6) {
        let shape = shape(6, 2, true);
        let got = experts(&format!("xbudget:{n}"), &shape, &z);
        prop_assert!(got.iter().all(|experts| experts.len() == n.min(2)));
        let mut used: Vec<usize> = got.concat();
        used.sort_unstable();
        used.dedup();
        prop_assert!(used.len() <= n, "{} experts", used.len());
        // Every set of n experts, by the objective as it is written.
        let mut table = gate::GateTable::default();
        table.fill(&z, 6);
        let mass = |open: &dyn Fn(usize) -> bool| -> f64 {
            let tokens = (0..6).map(|t| table.row(t));
            let token = |(p, order): (&[f32], &[u16])| -> f64 {
                order[..2].iter().filter(|&&e| open(e as usize)).map(|&e| f64::from(p[e as usize])).sum()
            };
            tokens.map(token).sum()
        };
        let best = (0u32..64).filter(|set| set.count_ones() as usize == n)
            .map(|set| mass(&|e| set >> e & 1 == 1)).fold(0.0, f64::max);
        // Native experts of S that a token passes over were outranked by others of S, which are native too.
        let held = mass(&|e| used.contains(&e));
        prop_assert!(held >= best - 1e-9, "{held} of {best}");
    }

    #[test]
    fn tenants_do_not_see_one_another(z in logits(6, 8), tenants in proptest::collection::vec(0u32..3, 6)) {
        let shape = shape(8, 3, false);
        for spec in SPECS {
            let together = routed(spec, &shape, &z, &tenants, &[true; 6]);
            for tenant in 0..3 {
                let own: Vec<usize> = (0..6).filter(|&t| tenants[t] == tenant).collect();
                let logits: Vec<f32> = own.iter().flat_map(|t| &z[t * 8..][..8]).copied().collect();
                if own.is_empty() {
                    continue;
                }
                let alone = routed(spec, &shape, &logits, &[], &vec![true; own.len()]);
                for (i, t) in own.iter().enumerate() {
                    prop_assert_eq!(chosen(&together, *t), chosen(&alone, i), "{}", spec);
                }
            }
        }
    }

    #[test]
    fn prompts_are_native_and_no_part_of_what_is_decoded(z in logits(6, 8), decodes in proptest::collection::vec(any::<bool>(), 6)) {
        let shape = shape(8, 3, true);
        let native = routed("native", &shape, &z, &[], &[]);
        let decoded: Vec<usize> = (0..6).filter(|t| decodes[*t]).collect();
        let logits: Vec<f32> = decoded.iter().flat_map(|t| &z[t * 8..][..8]).copied().collect();
        for spec in ["oea:1", "xbudget:2"] {
            let mixed = routed(spec, &shape, &z, &[], &decodes);
            for t in (0..6).filter(|t| !decodes[*t]) {
                prop_assert_eq!(chosen(&mixed, t), chosen(&native, t), "{}", spec);
            }
            if !decoded.is_empty() {
                let alone = routed(spec, &shape, &logits, &[], &vec![true; decoded.len()]);
                for (i, t) in decoded.iter().enumerate() {
                    prop_assert_eq!(chosen(&mixed, *t), chosen(&alone, i), "{}", spec);
                }
            }
        }
    }

    #[test]
    fn all_of_a_tokens_own_experts_are_native_to_the_bit(z in logits(5, 8), renormalise: bool) {
        let shape = shape(8, 3, renormalise);
        let native = routed("native", &shape, &z, &[], &[]);
        for spec in ["oea:3", "oea:3,scope=all", "xbudget:8", "oea:1", "xbudget:1"] {
            let decodes = !["oea:1", "xbudget:1"].contains(&spec);
            prop_assert_eq!(routed(spec, &shape, &z, &[], &[decodes; 5]), native.clone(), "{}", spec);
        }
    }
}
