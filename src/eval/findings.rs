//! What the figures say, in sentences.

use super::results::{Arm, Comparison, DataFacts, Kl, Metric, Role, TaskResult};

/// Sentences on the data, on every router beside native routing, and on every router beside its static control.
pub fn findings(data: &[DataFacts], arms: &[Arm], comparisons: &[Comparison]) -> Vec<String> {
    let mut said = Vec::new();
    let unverified: Vec<&str> = data.iter().filter(|d| d.verified == Some(false)).map(|d| d.name.as_str()).collect();
    if !unverified.is_empty() {
        let names = unverified.join(", ");
        said.push(format!("Not the published data (scores cannot be compared with published ones): {names}."));
    }
    for result in arms.first().iter().flat_map(|arm| &arm.tasks).filter(|r| r.cut > 0) {
        said.push(format!(
            "{}: {} of {} prompts were longer than the context and lost tokens on the left, as in lm-eval.",
            result.task, result.cut, result.samples
        ));
    }
    for arm in arms {
        let Role::Control { of } = &arm.role else { continue };
        let router = arms.iter().find(|a| a.label == *of);
        for (control, result) in arm.tasks.iter().zip(router.iter().flat_map(|a| &a.tasks)) {
            said.extend(mismatch(control, result, of));
        }
    }
    for comparison in comparisons {
        let arm = |label: &str| arms.iter().find(|a| a.label == label);
        let (Some(ours), Some(theirs)) = (arm(&comparison.arm), arm(&comparison.against)) else { continue };
        let result = |arm: &Arm| arm.tasks.iter().find(|t| t.task == comparison.task).cloned();
        let (Some(a), Some(b)) = (result(ours), result(theirs)) else { continue };
        // How controls fare beside native routing is for the table.
        if matches!(ours.role, Role::Router) {
            let control = matches!(theirs.role, Role::Control { .. });
            said.extend(sentence(comparison, &a, &b, control, comparisons.len()));
        }
    }
    said
}

/// Says where a control's mean k is more than a hundredth off that of its router.
fn mismatch(control: &TaskResult, router: &TaskResult, label: &str) -> Option<String> {
    let (k, wanted) = (control.routing.as_ref()?.mean_k, router.routing.as_ref()?.mean_k);
    let off = (k / wanted - 1.0).abs() > 0.01;
    off.then(|| {
        format!(
            "{}: the static control of `{label}` has a mean k of {k:.3}, not {wanted:.3}: too few samples.",
            control.task
        )
    })
}

fn sentence(c: &Comparison, a: &TaskResult, b: &TaskResult, control: bool, tests: usize) -> Option<String> {
    let metric = a.metrics.iter().find(|m| m.name == c.metric)?;
    let other = b.metrics.iter().find(|m| m.name == c.metric)?;
    let better = (c.difference > 0.0) == metric.higher_is_better && c.difference != 0.0;
    let verdict = match (c.significant, better) {
        (false, _) => "not significant",
        (true, true) => "significantly better",
        (true, false) => "significantly worse",
    };
    let test = format!("{verdict} ({} after Holm's correction for {tests} comparisons)", p_value(c.p_holm));
    let both = format!(
        "{}: `{}` reached {} {} {}, {} {} {}; difference {}, {test}",
        c.task,
        c.arm,
        c.metric,
        value(metric),
        experts(a),
        if control { "its static control" } else { c.against.as_str() },
        value(other),
        experts(b),
        difference(c, metric),
    );
    if !control {
        return Some(format!("{both}. {}", saved(a)));
    }
    let verdict = match (c.significant, better) {
        (true, true) => "the dynamic rule beat static routing",
        (true, false) => "static routing beat the dynamic rule",
        (false, _) => "the dynamic rule was not shown to beat static routing",
    };
    Some(format!("{both}: {verdict}.{}", kl(a, b)))
}

/// How far both are from native routing, where that was measured.
fn kl(a: &TaskResult, b: &TaskResult) -> String {
    let told = |kl: &Kl| format!("{:.4} nats (95 % {:.4} to {:.4})", kl.mean, kl.low, kl.high);
    match (&a.kl, &b.kl) {
        (Some(a), Some(b)) => format!(" KL to native: {} against {}.", told(a), told(b)),
        _ => String::new(),
    }
}

fn value(metric: &Metric) -> String {
    if metric.share { format!("{:.2} %", 100.0 * metric.value) } else { format!("{:.3}", metric.value) }
}

fn difference(c: &Comparison, metric: &Metric) -> String {
    let (scale, unit, digits) = if metric.share { (100.0, " points", 2) } else { (1.0, "", 3) };
    let [d, low, high] = [c.difference, c.low, c.high].map(|x| x * scale);
    format!("{d:+.digits$}{unit} (95 % {low:+.digits$} to {high:+.digits$})")
}

fn experts(result: &TaskResult) -> String {
    result.routing.as_ref().map_or_else(String::new, |r| format!("with {:.3} experts per token", r.mean_k))
}

fn saved(result: &TaskResult) -> String {
    let Some(routing) = &result.routing else { return String::new() };
    let told = |saved: f64, scope: &str| {
        let word = if saved < 0.0 { "more" } else { "fewer" };
        format!("{:.1} % {word} {scope} FLOPs", 100.0 * saved.abs())
    };
    format!(
        "It took {} and {}.",
        told(routing.expert_flops.saved, "expert"),
        told(routing.forward_flops.saved, "forward")
    )
}

fn p_value(p: f64) -> String {
    if p < 0.001 { "p < 0.001".into() } else { format!("p = {p:.3}") }
}
