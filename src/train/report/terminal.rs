//! A run's summary, and runs side by side.

use super::RunResults;
use super::html::duration;
use crate::plot::format::{MISSING, count, fixed, one_line, percent, real, scaled};
use crate::plot::markdown;
use crate::plot::table::{Cell, Column, Table, name, plain};

/// Layers whose values stand one by one in a cell.
const LAYERS_SHOWN_MAX: usize = 5;

/// What a run found, in a few lines.
pub fn summary(results: &RunResults) -> String {
    let mut out = format!("{}\n", one_line(&results.title()));
    let mut line = |term: &str, text: String| out += &format!("  {term:<17} {}\n", one_line(&text));
    let active = if results.parameters_active == results.parameters {
        String::new()
    } else {
        format!(", {} active per token", count(results.parameters_active))
    };
    line("parameters", count(results.parameters) + &active);
    let speed = results.tokens_per_second().map_or(String::new(), |n| format!(" ({} tokens/s)", count(n as u64)));
    line(
        "trained",
        format!(
            "{} steps, {} tokens in {}{speed} on {}, {}",
            count(results.steps),
            count(results.tokens),
            duration(results.train_seconds),
            results.device,
            results.precision
        ),
    );
    let Some(eval) = &results.final_eval else {
        line("held-out", "not evaluated".into());
        return out;
    };
    let interval = results.perplexity_interval.map(|i| {
        let mean = real(i.mean);
        format!("; mean {mean} [{}, {}] over the last {} evaluations", real(i.low), real(i.high), i.evaluations)
    });
    line(
        "held-out",
        format!(
            "loss {} nats, perplexity {}{}",
            fixed(eval.loss, 4),
            real(eval.perplexity),
            interval.unwrap_or_default()
        ),
    );
    line(
        "accuracy",
        format!(
            "top-1 {} %, top-3 {} % of {} tokens",
            percent(eval.top1),
            percent(eval.top3),
            count(eval.tokens_scored)
        ),
    );
    if !eval.entropy_l.is_empty() {
        line("experts per token", fixed(eval.experts_per_token, 3));
        line("entropy", format!("{} by layer", by_layer(&eval.entropy_l, 2)));
        line("utilisation std", format!("{} by layer", by_layer(&eval.utilisation_std_l, 3)));
    }
    out
}

/// Values of few layers one by one, of many their mean and range.
fn by_layer(values: &[f64], decimals: usize) -> String {
    if values.is_empty() {
        return MISSING.into();
    }
    if values.len() <= LAYERS_SHOWN_MAX {
        return values.iter().map(|v| fixed(*v, decimals)).collect::<Vec<String>>().join(" ");
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    format!("{} ({}…{})", fixed(mean, decimals), fixed(low, decimals), fixed(high, decimals))
}

/// A column of the comparison: title, whether it stands left, and a run's cell.
type Comparing = (&'static str, bool, fn(&RunResults) -> Cell);

const NAMES: [Comparing; 2] =
    [("run", true, |r| name(&r.name)), ("variant", true, |r| name(r.variant.as_deref().unwrap_or(MISSING)))];

const QUALITY: [Comparing; 6] = [
    ("held-out\nloss ↓", false, |r| of_eval(r, |e| fixed(e.loss, 4))),
    ("\nperplexity ↓", false, |r| of_eval(r, |e| real(e.perplexity))),
    ("mean of the last\nevaluations, 95 %", false, |r| {
        let text = |i: super::Interval| format!("{} [{}, {}]", real(i.mean), real(i.low), real(i.high));
        plain(r.perplexity_interval.map_or(MISSING.into(), text))
    }),
    ("top-1\n%", false, |r| of_eval(r, |e| percent(e.top1))),
    ("top-3\n%", false, |r| of_eval(r, |e| percent(e.top3))),
    ("experts\nper token", false, |r| of_routing(r, |e| fixed(e.experts_per_token, 2))),
];

const COST: [Comparing; 8] = [
    ("entropy\nby layer", false, |r| of_routing(r, |e| by_layer(&e.entropy_l, 2))),
    ("utilisation std\nby layer", false, |r| of_routing(r, |e| by_layer(&e.utilisation_std_l, 3))),
    ("\nparameters", false, |r| plain(scaled(r.parameters).trim_end())),
    ("\nactive", false, |r| plain(scaled(r.parameters_active).trim_end())),
    ("\nsteps", false, |r| plain(count(r.steps))),
    ("\ntokens", false, |r| plain(scaled(r.tokens).trim_end())),
    ("time\ns", false, |r| plain(fixed(r.train_seconds, 0))),
    ("tokens\n/ s", false, |r| plain(r.tokens_per_second().map_or(MISSING.into(), |n| count(n as u64)))),
];

fn of_eval(results: &RunResults, text: fn(&super::EvalLog) -> String) -> Cell {
    plain(results.final_eval.as_ref().map_or(MISSING.into(), text))
}

/// As [`of_eval`], with nothing where the model is dense.
fn of_routing(results: &RunResults, text: fn(&super::EvalLog) -> String) -> Cell {
    plain(results.final_eval.as_ref().filter(|e| !e.entropy_l.is_empty()).map_or(MISSING.into(), text))
}

fn table(runs: &[RunResults], columns: &[&[Comparing]]) -> Table {
    let columns: Vec<Comparing> = columns.concat();
    let column = |(title, left, _): &Comparing| Column { title: (*title).into(), left: *left };
    Table {
        columns: columns.iter().map(column).collect(),
        rows: runs.iter().map(|run| columns.iter().map(|(_, _, cell)| cell(run)).collect()).collect(),
    }
}

/// What the figures do not say.
fn caveats(runs: &[RunResults]) -> Vec<String> {
    let mut caveats = vec![
        "Differences smaller than the intervals say nothing. Intervals are Student's t over a run's last evaluations: they \
         hold how much its perplexity still moved, not other seeds."
            .to_string(),
    ];
    if runs.windows(2).any(|pair| pair[0].data != pair[1].data) {
        caveats.push(
            "The runs' data differ: losses compare only where the held-out text and its tokens are the same.".into(),
        );
    }
    if runs.windows(2).any(|pair| pair[0].device != pair[1].device) {
        caveats.push("The runs' devices differ: so do their times.".into());
    }
    caveats
}

/// Runs side by side for a terminal: their quality, then their routing and cost.
pub fn compare_terminal(runs: &[RunResults]) -> String {
    let mut out = format!("quality\n{}\n", table(runs, &[&NAMES, &QUALITY]).aligned());
    out += &format!("routing and cost\n{}\n", table(runs, &[&NAMES, &COST]).aligned());
    caveats(runs).iter().for_each(|caveat| out += &format!("- {caveat}\n"));
    out
}

/// Runs side by side as Markdown, in one table.
pub fn compare_markdown(runs: &[RunResults]) -> String {
    let mut out = markdown::table(&table(runs, &[&NAMES, &QUALITY, &COST]));
    out.push('\n');
    caveats(runs).iter().for_each(|caveat| out += &format!("- {}\n", markdown::prose(caveat)));
    out
}
