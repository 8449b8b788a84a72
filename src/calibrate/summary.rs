//! What is said of a calibration.

use super::check::{Checked, Tried};
use super::correlation::Correlations;
use super::run::Outcome;
use crate::eval::stats::Estimate;
use crate::moe::calibration::PolicyTable;
use crate::moe::router::Rule;
use std::fmt::Write;
use std::path::Path;

/// The table of [`Correlations`].
pub fn correlations(found: &Correlations) -> String {
    let mut text = format!(
        "Estimators beside the true loss of the next token (Spearman, {} tokens in {} windows; mean over layers with its \
         95 % interval)\n",
        found.tokens, found.windows
    );
    for one in &found.estimators {
        let number = |value: Option<f64>| value.map_or_else(|| "     –".into(), |value| format!("{value:+.3}"));
        let layers = one.layers.iter().map(|value| number(*value)).collect::<Vec<_>>().join(" ");
        let mean = match (one.mean, one.low, one.high) {
            (Some(_), Some(low), Some(high)) => format!("{} [{low:+.3}, {high:+.3}]", number(one.mean)),
            _ => "not there".into(),
        };
        let _ = writeln!(text, "  {:<18} {mean:<26} layers {layers}", one.name);
    }
    text
}

/// What `outcome`, written to `out`, came to; `model` is what was given as the model.
pub fn summary(outcome: &Outcome, model: Option<&str>, out: &Path) -> String {
    let mut text = String::new();
    let made = &outcome.calibration.made;
    let _ = writeln!(text, "calibrated {} on {} tokens (seed {})", made.model, made.tokens, made.seed);
    if let (Some(table), Some(checked), Some(rung)) = (&outcome.calibration.policy, &outcome.checked, &outcome.rung) {
        policy(&mut text, table, checked);
        let _ = writeln!(
            text,
            "in force   {} rules: mean k {:.3} and {:.3} of native routing's {} on the calibration text{}",
            table.held_out.winner,
            rung.mean_k,
            rung.cost,
            scope(&table.scope),
            if table.lsq { ", outputs scaled (lsq)" } else { "" }
        );
        for (l, rule) in rung.rules.iter().enumerate() {
            let _ = writeln!(text, "  layer {l:<3} {}", describe(rule));
        }
    } else {
        text.push_str("statistics alone: routers take them as cal=FILE; a --target-flops makes a policy of them\n");
    }
    let _ = writeln!(text, "written    {}", out.display());
    if outcome.calibration.policy.is_some() {
        let model = model.map_or_else(String::new, |model| format!(" --model {model}"));
        let _ = writeln!(text, "serve it   moe-serve{model} --router policy:{}", out.display());
    }
    text
}

fn policy(text: &mut String, table: &PolicyTable, checked: &Checked) {
    let batch = table.batch.map_or_else(String::new, |batch| format!(" in decode steps of {batch} sequences"));
    let _ = writeln!(text, "target     {:.3} of native routing's {}{batch}", table.target, scope(&table.scope));
    let tokens = checked.tokens;
    let _ = writeln!(text, "held out   {tokens} tokens in {} windows", checked.windows);
    let _ = writeln!(
        text,
        "  {:<8} {:>6} {:>9} {:>9} {:>7}  {:<28} perplexity",
        "", "mean k", "experts", "forward", "bytes", "KL to native, nats per token"
    );
    let native = estimate(checked.native_perplexity, 3);
    let _ = writeln!(text, "  {:<8} {:>6} {:>9} {:>9} {:>7}  {:<28} {native}", "native", "", "1", "1", "1", "0");
    for (name, tried) in [("dynamic", &checked.dynamic), ("static", &checked.fixed)] {
        row(text, name, tried);
    }
    let difference = estimate(checked.difference, 6);
    let sure = if checked.difference.low > 0.0 || checked.difference.high < 0.0 {
        ""
    } else {
        "; the interval holds 0, so the two cannot be told apart on this text"
    };
    let _ = writeln!(text, "KL of dynamic less that of static at the same cost: {difference}{sure}");
    let _ = writeln!(
        text,
        "winner     {}",
        match checked.dynamic_wins() {
            true => "dynamic: it comes closer to native routing than static routing at the same cost",
            false => "static: the dynamic policy did not come closer to native routing, so the file holds static rules",
        }
    );
}

fn scope(scope: &str) -> &str {
    match scope {
        "experts" => "expert FLOPs",
        "forward" => "forward FLOPs",
        _ => "bytes of distinct experts",
    }
}

fn row(text: &mut String, name: &str, tried: &Tried) {
    let c = &tried.contender;
    let (kl, perplexity) = (estimate(tried.kl, 5), estimate(tried.perplexity, 3));
    let _ = writeln!(
        text,
        "  {name:<8} {:>6.3} {:>9.3} {:>9.3} {:>7.3}  {kl:<28} {perplexity}",
        c.mean_k, c.expert_flops, c.forward_flops, c.expert_bytes
    );
}

fn estimate(estimate: Estimate, digits: usize) -> String {
    let Estimate { value, low, high } = estimate;
    format!("{value:.digits$} [{low:.digits$}, {high:.digits$}]")
}

fn describe(rule: &Rule) -> String {
    match rule {
        Rule::Static { k } => format!("static k = {k}"),
        Rule::Score { tau } => format!("score, τ = {tau:.4}"),
        Rule::Contribution { tau } => format!("contribution, τ = {tau:.4}"),
        Rule::Threshold { theta } => format!("threshold, θ = {theta:.4}"),
    }
}
