mod example;

use super::{charts, html, markdown, terminal, view};
use crate::eval::results::*;
use crate::plot::check::{check_drawings, check_markup};
use example::example;
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Fails on a page that is broken or draws a number that is none.
fn check_page(results: &Results) -> Result<String, String> {
    let page = html(results);
    check_drawings(&page)?;
    Ok(page)
}

#[test]
fn the_page_is_well_formed_and_needs_nothing_else() {
    let page = check_page(&example()).unwrap();
    for outside in ["<script", "<link", "<img", "@import", "url(", "src="] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert_eq!(page.matches("http").count(), page.matches("http://www.w3.org/2000/svg").count());
}

#[test]
fn every_report_names_every_arm_task_metric_and_finding() {
    let results = example();
    let reports = [terminal(&results), markdown(&results), html(&results)];
    for arm in results.arms.iter().filter(|a| !matches!(a.role, Role::Control { .. })) {
        assert!(reports.iter().all(|r| r.contains(&arm.label)), "{}", arm.label);
    }
    assert!(reports.iter().all(|r| r.matches("└ static control").count() >= 12), "four controls in three tasks");
    for name in ["mmlu", "gsm8k", "perplexity", "flexible-extract", "costs 92.2 % more expert FLOPs"] {
        assert!(reports.iter().all(|r| r.contains(name)), "{name}");
    }
    for name in [&results.command, results.model.hash.as_ref().unwrap(), &results.data[1].sha256, "own samples"] {
        assert!(reports[1..].iter().all(|r| r.contains(name)), "{name}");
    }
}

#[test]
fn a_cost_is_shown_with_its_minus() {
    let results = example();
    for report in [terminal(&results), markdown(&results), html(&results)] {
        assert!(report.contains("-92.2 %") || report.contains("-92.3 %"));
    }
    assert!(html(&results).contains("<span class=\"cost\">-92"));
}

#[test]
fn the_terminal_report_is_aligned_and_at_most_110_columns_wide() {
    let text = terminal(&example());
    let tables = text.lines().filter(|line| !line.starts_with("- "));
    assert!(tables.clone().all(|line| line.chars().count() <= 110), "{text}");
    let rules: Vec<&str> = tables.filter(|line| line.starts_with('─')).collect();
    assert_eq!(rules.len(), 4, "three tasks and the comparisons\n{text}");
}

#[test]
fn what_the_server_does_not_tell_is_a_dash() {
    let mut results = example();
    for task in results.arms.iter_mut().flat_map(|a| &mut a.tasks) {
        (task.routing, task.expert_bytes, task.kl) = (None, None, None);
    }
    results.model.moe = None;
    let page = check_page(&results).unwrap();
    assert!(!page.contains("FLOPs ran, % of native") && page.contains("<td>–</td>"));
    assert!(terminal(&results).contains('–') && markdown(&results).contains("| – |"));
}

#[test]
fn data_cannot_leave_its_place() {
    let mut results = example();
    let hostile = "</title><script>alert(1)</script>\"'&\u{1b}[31m](x)|`*_\n# x";
    results.model.name = hostile.into();
    results.command = hostile.into();
    results.findings = vec![hostile.into()];
    results.data[0].name = hostile.into();
    for arm in &mut results.arms {
        arm.label += hostile;
        for task in &mut arm.tasks {
            task.task += hostile;
            task.metrics.iter_mut().for_each(|m| m.name += hostile);
            task.subtasks.iter_mut().for_each(|s| s.name += hostile);
        }
    }
    let page = check_page(&results).unwrap();
    assert!(!page.contains("<script") && page.contains("&lt;script&gt;"));
    assert!(!terminal(&results).contains('\u{1b}'));
    let text = markdown(&results);
    assert!(text.lines().next().is_some_and(|title| title.contains("]\\(x)")), "{text}");
    assert!(!text.contains("\n# x") && !text.contains(" <script"), "{text}");
    let widths = |line: &str| line.replace("\\|", "").matches('|').count();
    let table: Vec<usize> =
        text.lines().skip_while(|l| !l.starts_with("| arm")).take_while(|l| l.starts_with('|')).map(widths).collect();
    assert!(table.len() == 11 && table.iter().all(|n| *n == table[0]), "{table:?}\n{text}");
}

#[test]
fn reports_of_nothing_and_of_one_arm_hold() {
    let mut results = example();
    results.arms.truncate(1);
    check_page(&results).unwrap();
    results.arms[0].tasks[0].metrics.clear();
    results.arms[0].tasks[1].samples = 0;
    check_page(&results).unwrap();
    results.arms.clear();
    (results.data, results.comparisons, results.findings) = (Vec::new(), Vec::new(), Vec::new());
    check_page(&results).unwrap();
    assert_eq!(terminal(&results), "");
    assert!(markdown(&results).contains("moe-eval"));
}

#[test]
fn large_models_and_many_subtasks_hold() {
    let mut results = example();
    for task in results.arms.iter_mut().flat_map(|a| &mut a.tasks).filter(|t| t.task == "mmlu") {
        let subtask = task.subtasks[0].clone();
        task.subtasks = (0..60).map(|i| SubtaskResult { name: format!("mmlu_{i}"), ..subtask.clone() }).collect();
        let routing = task.routing.as_mut().unwrap();
        routing.mean_k_l = (0..64).map(|l| l as f64 / 8.0).collect();
        routing.k_histogram = (0..=128).collect();
    }
    let page = check_page(&results).unwrap();
    assert_eq!(page.matches("bars of every arm").count(), 60);
    for task in results.arms.iter_mut().flat_map(|a| &mut a.tasks).filter(|t| t.task == "mmlu") {
        task.subtasks.push(SubtaskResult { name: "one too many".into(), ..task.subtasks[0].clone() });
    }
    let page = check_page(&results).unwrap();
    assert_eq!(page.matches("bars of every arm").count(), 0);
    assert!(page.contains("Table of 61 subtasks"));
}

#[test]
fn every_arm_is_a_point_and_controls_are_joined_to_their_router() {
    let results = example();
    let tasks = view::tasks(&results);
    for scope in [charts::Scope::Experts, charts::Scope::Forward] {
        let plot = charts::pareto(&tasks[0], scope).unwrap();
        check_markup(&plot).unwrap();
        assert_eq!(plot.matches("95 % interval").count(), results.arms.len());
        assert_eq!(plot.matches("class=\"thin").count(), 4);
    }
}

/// Draws results that no run would give.
struct Wild(ChaCha8Rng);

impl Wild {
    fn below(&mut self, n: u64) -> u64 {
        self.0.next_u64() % n
    }

    fn text(&mut self) -> String {
        let texts = [
            "native",
            "dynk:0.8",
            "",
            "<b>&\"'",
            "größe|`",
            "a\u{0}\n\u{1b}",
            "mmlu_",
            "mmlu_é",
            "static control of dynk:0.8",
        ];
        let text = texts[self.below(texts.len() as u64) as usize];
        if self.below(20) == 0 { text.repeat(60) } else { text.into() }
    }

    fn number(&mut self) -> f64 {
        let numbers =
            [0.0, -0.0, 1.0, 0.5, -3.25, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN, 1e-300, 1e15];
        let at = self.below(3 * numbers.len() as u64) as usize;
        numbers.get(at).copied().unwrap_or_else(|| self.below(1000) as f64 / 1000.0)
    }

    fn integer(&mut self) -> u64 {
        [0, 1, 7, 1 << 40, u64::MAX][self.below(5) as usize]
    }

    fn some<T>(&mut self, most: u64, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(most + 1)).map(|_| make(self)).collect()
    }

    fn maybe<T>(&mut self, make: impl FnMut(&mut Self) -> T) -> Option<T> {
        self.some(1, make).pop()
    }

    fn metric(&mut self) -> Metric {
        Metric {
            name: self.text(),
            value: self.number(),
            stderr: self.maybe(Self::number),
            low: self.number(),
            high: self.number(),
            higher_is_better: self.below(2) == 0,
            share: self.below(2) == 0,
        }
    }

    fn saved(&mut self) -> Saved {
        Saved { ran: self.integer(), native: self.integer(), saved: self.number() }
    }

    fn task(&mut self) -> TaskResult {
        TaskResult {
            task: self.text(),
            routers: self.some(2, Self::text),
            version: self.maybe(Self::text),
            samples: self.integer() as usize,
            cut: self.integer() as usize,
            metrics: self.some(3, Self::metric),
            macro_average: self.maybe(Self::number),
            groups: Vec::new(),
            subtasks: self.some(4, |w| SubtaskResult {
                name: w.text(),
                group: w.maybe(Self::text),
                samples: w.integer() as usize,
                metrics: w.some(2, Self::metric),
                mean_k: w.maybe(Self::number),
            }),
            routing: self.maybe(|w| RoutingFacts {
                tokens: w.integer(),
                mean_k: w.number(),
                mean_k_l: w.some(6, Self::number),
                k_histogram: w.some(9, Self::integer),
                expert_flops: w.saved(),
                forward_flops: w.saved(),
            }),
            expert_bytes: self.maybe(Self::saved),
            kl: self.maybe(|w| Kl { mean: w.number(), low: w.number(), high: w.number(), positions: w.integer() }),
            seconds: self.number(),
        }
    }

    fn results(&mut self) -> Results {
        let mut results = example();
        results.model.name = self.text();
        results.settings.tasks = self.some(2, Self::text);
        results.arms = self.some(6, |w| Arm {
            label: w.text(),
            role: match w.below(3) {
                0 => Role::Native,
                1 => Role::Router,
                _ => Role::Control { of: w.text() },
            },
            tasks: w.some(3, Self::task),
        });
        results.comparisons = self.some(5, |w| Comparison {
            task: w.text(),
            metric: w.text(),
            arm: w.text(),
            against: w.text(),
            difference: w.number(),
            low: w.number(),
            high: w.number(),
            p: w.number(),
            p_holm: w.number(),
            only_arm: w.maybe(Self::integer),
            only_against: w.maybe(Self::integer),
            significant: w.below(2) == 0,
        });
        results.findings = self.some(3, Self::text);
        results
    }
}

proptest! {
    #[test]
    fn no_results_break_a_report(seed: u64) {
        let results = Wild(ChaCha8Rng::seed_from_u64(seed)).results();
        let page = check_page(&results);
        prop_assert!(page.is_ok(), "{page:?}");
        let controls = |text: String| text.contains(['\u{0}', '\u{1b}']);
        prop_assert!(!controls(page.unwrap()) && !controls(terminal(&results)) && !controls(markdown(&results)));
    }
}
