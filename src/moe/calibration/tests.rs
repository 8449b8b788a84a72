use super::*;
use proptest::prelude::*;

fn shape() -> MoeShape {
    MoeShape { experts: 8, top_k: 2, expert_width: 8, shared_width: None, renormalise: true, layers: 3, router: None }
}

/// What is wrong with a calibration after `edit`.
fn refused(edit: impl FnOnce(&mut serde_json::Value)) -> String {
    let mut json = serde_json::to_value(Calibration::uninformed(&shape(), "0123456789abcdef")).unwrap();
    edit(&mut json);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.json");
    std::fs::write(&path, json.to_string()).unwrap();
    Calibration::read(&path, "0123456789abcdef", &shape()).err().unwrap_or_default()
}

#[test]
fn a_file_is_read_back_and_what_does_not_suit_the_model_is_refused_by_name() {
    assert_eq!(refused(|_| {}), "");
    for (edit, want) in [
        (("/format", "other".into()), "is no calibration"),
        (("/version", 2.into()), "is of version 2; this program reads version 1: run moe-calibrate again"),
        (
            ("/checkpoint", "ffffffffffffffff".into()),
            "another checkpoint (, ffffffffffff…) than this one (0123456789ab…)",
        ),
        (("/experts", 9.into()), "is of 3 layers of 9 experts with k0 = 2; the model has 3 of 8"),
        (("/layers", serde_json::json!([])), "is of 0 layers"),
        (("/layers/1/gamma_k", serde_json::json!([1.0])), "has no 2 numbers in layers[1].gamma_k"),
        (("/layers/2/quantiles/surprisal", serde_json::json!([])), "layers[2].quantiles.surprisal"),
        (("/made", 3.into()), "is not a whole calibration"),
    ] {
        let error = refused(|json| *json.pointer_mut(edit.0).unwrap() = edit.1.clone());
        assert!(error.contains(want), "{}: {error}", edit.0);
        assert!(error.contains("policy.json"), "{error}");
    }
}

#[test]
fn a_policy_must_have_a_valid_rule_for_every_layer() {
    let rung = |rules: serde_json::Value| serde_json::json!({"cost": 0.7, "mean_k": 1.4, "rules": rules});
    let policy = |rungs: Vec<serde_json::Value>| {
        serde_json::json!({"scope": "experts", "target": 0.7, "lsq": false, "rungs": rungs,
                           "held_out": HeldOut::default()})
    };
    let with = |rungs| refused(|json| json["policy"] = policy(rungs));
    let fixed = |k: usize| serde_json::json!({"signal": "static", "k": k});
    let score = serde_json::json!({"signal": "score", "tau": 0.8});
    assert_eq!(with(vec![rung(serde_json::json!([fixed(1), fixed(2), score]))]), "");
    for rungs in [
        vec![],
        vec![rung(serde_json::json!([fixed(1), fixed(2)]))],
        vec![rung(serde_json::json!([fixed(1), fixed(3), fixed(1)]))],
        vec![rung(serde_json::json!([fixed(1), fixed(0), fixed(1)]))],
    ] {
        let error = with(rungs);
        assert!(error.contains("policy.rungs"), "{error}");
    }
}

#[test]
fn the_rung_of_a_share_is_the_dearest_that_it_pays_for() {
    let rung = |cost: f64| Rung { cost, mean_k: 2.0 * cost, rules: Vec::new() };
    let table = PolicyTable {
        scope: "experts".into(),
        target: 0.7,
        batch: None,
        lsq: false,
        rungs: [0.5, 0.6, 0.7, 1.0].map(rung).to_vec(),
        held_out: HeldOut::default(),
    };
    for (share, cost) in [(0.1, 0.5), (0.5, 0.5), (0.69, 0.6), (0.7, 0.7), (0.99, 0.7), (1.0, 1.0)] {
        assert_eq!(table.rung(share).cost, cost, "{share}");
    }
}

#[test]
fn a_file_is_opened_once_and_the_hash_is_asked_for_only_then() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.json").display().to_string();
    let calibrations = Calibrations::new(|| Ok("hash".into()));
    assert!(calibrations.open(&path, &shape()).unwrap_err().contains("there is no file"));
    std::fs::write(&path, serde_json::to_string(&Calibration::uninformed(&shape(), "hash")).unwrap()).unwrap();
    let first = calibrations.open(&path, &shape()).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(Arc::ptr_eq(&first, &calibrations.open(&path, &shape()).unwrap()));
}

#[test]
fn parameters_are_interpolated_between_one_expert_and_all() {
    let curve: Vec<f32> = (0..=CURVE_STEPS).map(|i| i as f32).collect();
    assert_eq!(parameter_at(&curve, 1.0, 2), 0.0);
    assert_eq!(parameter_at(&curve, 2.0, 2), CURVE_STEPS as f32);
    assert_eq!(parameter_at(&curve, 1.5, 2), CURVE_STEPS as f32 / 2.0);
    assert_eq!(parameter_at(&curve, 4.5, 8), CURVE_STEPS as f32 / 2.0);
    assert_eq!(parameter_at(&curve, 1.0, 1), CURVE_STEPS as f32);
}

proptest! {
    #[test]
    fn quantiles_rank_a_measure_within_bounds_and_never_fall(
        mut values in proptest::collection::vec(-4i8..4, QUANTILE_STEPS + 1), a in -5.0f32..5.0, b in -5.0f32..5.0
    ) {
        values.sort_unstable();
        let quantiles: Vec<f32> = values.iter().map(|v| f32::from(*v)).collect();
        let (low, high) = (quantile_of(&quantiles, a.min(b)), quantile_of(&quantiles, a.max(b)));
        prop_assert!(0.0 <= low && low <= high && high <= 1.0, "{low} {high}");
        prop_assert_eq!(quantile_of(&quantiles, -10.0), 0.0);
        prop_assert_eq!(quantile_of(&quantiles, 10.0), 1.0);
        prop_assert_eq!(quantile_of(&quantiles, f32::NAN), 1.0);
    }
}
