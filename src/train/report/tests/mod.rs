pub mod example;

use super::*;
use crate::plot::check::check_drawings;
use proptest::prelude::*;

fn checked(results: &RunResults, steps: &[StepLog]) -> String {
    let page = html(results, steps);
    check_drawings(&page).unwrap();
    page
}

#[test]
fn the_page_shows_all_of_a_mixtures_run_and_needs_nothing_else() {
    let (results, steps) = example::mixture(3000);
    let page = checked(&results, &steps);
    for outside in ["<script", "<link", "<img", "@import", "url(", "src="] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert_eq!(page.matches("http").count(), page.matches("http://www.w3.org/2000/svg").count());
    for shown in [
        "<b>Loss</b>",
        "<b>Perplexity</b>",
        "<b>Accuracy</b>",
        "<b>Learning rate</b>",
        "<b>load balance</b>",
        "<b>router z-loss</b>",
        "<b>dynamic-k entropy</b>",
        "<b>Routing entropy</b>",
        "<b>Spread of utilisation</b>",
        "<b>Over capacity</b>",
        "Expert by token class, layer 5",
        "layer 3, expert 2: ",
        "training, mean of 30 steps",
        "capitalised 5%",
        "digits &lt;1%",
        "tokenizer.vocabulary",
        "hidden_size = 512\nlayers = 6",
    ] {
        assert!(page.contains(shown), "{shown}");
    }
    assert!(!page.contains("entropy floor"), "a loss that the run did not have");
    assert!(!page.contains("class=\"none\""), "nothing is missing");
    assert!(page.len() < 700_000, "{} bytes", page.len());
}

#[test]
fn curves_of_long_logs_are_thinned_and_keep_both_ends() {
    let (results, steps) = example::mixture(20_000);
    let page = checked(&results, &steps);
    for points in page.split("<polyline class=\"series").skip(1).filter_map(|p| p.split("points=\"").nth(1)) {
        assert!(points.split('"').next().unwrap().split(' ').count() <= series::POINTS_MAX);
    }
    assert!(page.contains("<title>step 1: each step") && page.contains("<title>step 20,000: each step"));
}

#[test]
fn a_dense_model_has_no_routing_and_says_so() {
    let (results, steps) = example::dense(400);
    let page = checked(&results, &steps);
    assert!(page.contains("every layer of the model is dense") && page.contains("had no auxiliary losses"));
    for absent in ["<b>Experts per token</b>", "Routing entropy", "Utilisation:", "token classes", "experts per token"]
    {
        assert!(!page.contains(absent), "{absent}");
    }
    assert!(!summary(&results).contains("entropy"));
}

#[test]
fn what_a_run_does_not_have_is_told_in_a_sentence() {
    let (mut results, _) = example::mixture(50);
    results.samples.clear();
    let page = checked(&results, &[]);
    assert!(page.contains("No step was logged") && page.contains("No text was sampled"));
    assert!(page.contains("<b>Loss</b>") && page.contains("<b>Routing entropy</b>"), "of the evaluations");
    (results.evals, results.final_eval, results.perplexity_interval) = (Vec::new(), None, None);
    results.routing = Some(RoutingAnalysis { layers: Vec::new() });
    let page = checked(&results, &[]);
    assert!(page.contains("No held-out text was evaluated") && page.contains("was not analysed"));
    assert!(!page.contains("<svg"), "nothing to draw");
    results.routing = None;
    results.data = serde_json::Value::Null;
    let page = checked(&results, &[]);
    assert!(!page.contains("<h2>Data") && !page.contains("<svg"));
    assert!(summary(&results).contains("not evaluated"));
    assert!(compare_terminal(&[results]).contains('–'));
}

#[test]
fn a_run_of_one_step_has_points_to_see() {
    let (results, steps) = example::mixture(1);
    let page = checked(&results, &steps);
    assert!(page.contains("training at step 1: ") && page.contains("held-out at step 1: "));
}

#[test]
fn data_cannot_leave_its_place() {
    let (mut results, mut steps) = example::mixture(60);
    let hostile = "</title><script>alert(1)</script>\"'&\u{1b}[31m](x)|`*_\n# x";
    for text in
        [&mut results.name, &mut results.recipe, &mut results.device, &mut results.version, &mut results.started]
    {
        *text += hostile;
    }
    results.variant = Some(hostile.into());
    results.data = serde_json::json!({ hostile: [hostile, {"x": hostile}] });
    results.samples = vec![Sample { prompt: hostile.into(), text: hostile.into() }];
    results.routing.as_mut().unwrap().layers[0].classes[0].class = hostile.into();
    steps[7].loss = f64::NAN;
    (steps[8].grad_norm, steps[9].entropy_l[0]) = (f64::INFINITY, f64::NAN);
    let page = checked(&results, &steps);
    assert!(!page.contains("<script") && page.contains("&lt;script&gt;") && !page.contains('\u{1b}'));
    let twin = [results.clone(), example::dense(60).0];
    assert!(!summary(&results).contains('\u{1b}') && !compare_terminal(&twin).contains('\u{1b}'));
    let text = compare_markdown(&twin);
    assert!(!text.contains("\n# x") && !text.contains('\u{1b}'), "{text}");
    let columns = |line: &str| line.replace("\\|", "").matches('|').count();
    let table: Vec<usize> = text.lines().take_while(|l| l.starts_with('|')).map(columns).collect();
    assert_eq!(table, [17; 4], "{text}");
}

#[test]
fn samples_keep_their_lines_and_follow_their_prompt() {
    let (results, steps) = example::mixture(5);
    let page = checked(&results, &steps);
    assert!(page.contains("<b>ROMEO:\n</b> Of all the world, and with the sword of the king\nThat hath"));
    assert!(page.contains("\n    What, is the duke?</pre>"), "a tab is four spaces");
}

#[test]
fn results_come_back_as_they_were_written_and_other_schemas_are_refused() {
    let (results, _) = example::mixture(40);
    let json = serde_json::to_string_pretty(&results).unwrap();
    assert_eq!(RunResults::parse(&json).unwrap(), results);
    let newer = json.replacen("\"schema\": 1", "\"schema\": 2", 1);
    assert!(RunResults::parse(&newer).unwrap_err().to_string().contains("its schema is 2"));
    assert!(RunResults::parse("{}").unwrap_err().to_string().contains("missing field `schema`"));
}

#[test]
fn runs_are_compared_in_aligned_columns_with_their_caveats() {
    let runs = [example::mixture(2000).0, example::dense(2000).0];
    let text = compare_terminal(&runs);
    assert!(text.lines().filter(|l| !l.starts_with("- ")).all(|l| l.chars().count() <= 150), "{text}");
    assert_eq!(text.lines().filter(|l| l.starts_with('─')).count(), 2);
    for report in [&text, &compare_markdown(&runs)] {
        for shown in ["shakespeare-switch", "dense", "38.12 M", "19.65 M", "Differences smaller than the intervals"] {
            assert!(report.contains(shown), "{shown}: {report}");
        }
        assert!(!report.contains("data differ"), "they are of the same data");
    }
    let mut other = example::dense(10).0;
    (other.data, other.device) = (serde_json::json!({"name": "Alice"}), "cuda".into());
    let text = compare_terminal(&[runs[0].clone(), other]);
    assert!(text.contains("data differ") && text.contains("devices differ"));
    assert!(compare_terminal(&[]).contains("quality") && compare_markdown(&[]).starts_with("| run |"));
}

#[test]
fn values_of_many_layers_are_summed_up() {
    let mut results = example::mixture(10).0;
    results.final_eval.as_mut().unwrap().entropy_l = vec![0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
    assert!(summary(&results).contains("0.75 (0.50…1.00) by layer"), "{}", summary(&results));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn no_numbers_break_a_report(
        numbers in proptest::collection::vec(any::<f64>(), 24),
        counts in proptest::collection::vec(any::<u64>(), 8),
    ) {
        let (mut results, mut steps) = example::mixture(12);
        for (i, step) in steps.iter_mut().enumerate() {
            (step.loss, step.lr, step.grad_norm) = (numbers[i], numbers[i + 1], numbers[i + 2]);
            (step.balance, step.experts_per_token) = (Some(numbers[i + 3]), numbers[i + 4]);
            (step.entropy_l[0], step.dropped_share) = (numbers[i + 5], numbers[i + 6]);
        }
        let eval = results.final_eval.as_mut().unwrap();
        (eval.loss, eval.perplexity, eval.top1, eval.entropy_l) = (numbers[0], numbers[1], numbers[2], numbers.clone());
        results.evals.push(eval.clone());
        (results.steps, results.tokens, results.parameters) = (counts[0], counts[1], counts[2]);
        (results.train_seconds, results.peak_memory_bytes) = (numbers[3], Some(counts[3]));
        let layer = &mut results.routing.as_mut().unwrap().layers[0];
        (layer.utilisation_e, layer.entropy) = (numbers.clone(), numbers[4]);
        layer.k_histogram = counts.iter().map(|n| n >> 8).collect();
        layer.classes[0].share_e = numbers.clone();
        let page = html(&results, &steps);
        prop_assert!(check_drawings(&page).is_ok(), "{:?}", check_drawings(&page));
        let all = summary(&results) + &compare_terminal(&[results.clone()]) + &compare_markdown(&[results]);
        prop_assert!(!all.contains("NaN") && !all.contains("inf"), "{all}");
    }
}
