//! The report of a run as one HTML page.

use super::log::{EvalLog, StepLog};
use super::routing;
use super::series::{Curves, Look, Points, Series, smooth};
use super::{RunResults, Sample};
use crate::plot::format::{clip, count, fixed, percent, real};
use crate::plot::page::{self, figure, lines};
use crate::plot::table::{Table, name, plain};
use crate::plot::{Mark, escape};
use serde_json::Value;

/// Rows of the table of data.
const DATA_ROWS_MAX: usize = 60;
/// Characters of a value in it.
const DATA_VALUE_MAX: usize = 120;

/// The whole report. `steps` is the run's log; what a run does not have is told in a sentence.
pub fn html(results: &RunResults, steps: &[StepLog]) -> String {
    let run = Run { results, steps, window: (steps.len() / 100).max(1) };
    let mut body = format!(
        "<header>\n<p class=\"kind\">moe-train report</p>\n<h1>{}</h1>\n{}</header>\n",
        escape(&results.title()),
        page::facts(&facts(results))
    );
    body += &held_out(results);
    body += &run.training();
    body += &run.routing();
    body += &samples(&results.samples);
    body += &format!(
        "<section id=\"recipe\"><h2>Recipe</h2>\n<pre class=\"command\"><code>{}</code></pre>\n</section>\n",
        lines(&results.recipe)
    );
    body += &data(&results.data);
    body += &page::notes(&notes(results, run.window));
    page::page(&format!("moe-train: {}", results.title()), &body)
}

/// Facts of the run: name and value.
fn facts(results: &RunResults) -> Vec<(&'static str, String)> {
    let mut facts = vec![("parameters", count(results.parameters))];
    if results.parameters_active != results.parameters {
        facts.push(("of them active per token", count(results.parameters_active)));
    }
    facts.extend([
        ("steps", count(results.steps)),
        ("tokens trained on", count(results.tokens)),
        ("time of training", duration(results.train_seconds)),
    ]);
    facts.extend(results.tokens_per_second().map(|n| ("tokens/s", count(n as u64))));
    facts.extend(
        results.peak_memory_bytes.map(|n| ("peak memory", format!("{:.2} GiB", n as f64 / f64::from(1 << 30)))),
    );
    facts.push(("runs on", results.device.clone()));
    facts.push(("precision", results.precision.clone()));
    facts.push(("seed", results.seed.to_string()));
    facts.push(("started", results.started.clone()));
    facts.push(("program", results.version.clone()));
    facts
}

/// `1 h 52 min`, `3 min 20 s`, `12.5 s`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match whole {
        _ if !seconds.is_finite() => crate::plot::format::MISSING.into(),
        0..100 => format!("{} s", fixed(seconds, 1)),
        100..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

fn sentence(text: &str) -> String {
    format!("<p class=\"none\">{}</p>\n", escape(text))
}

/// The final evaluation in figures.
fn held_out(results: &RunResults) -> String {
    let Some(eval) = &results.final_eval else {
        return format!("<section id=\"held-out\"><h2>Held-out text</h2>\n{}</section>\n", sentence(NO_EVALS));
    };
    let mut facts = vec![("cross-entropy, nats", fixed(eval.loss, 4)), ("perplexity", real(eval.perplexity))];
    facts.extend(results.perplexity_interval.map(|i| {
        let text = format!("{} [{}, {}]", real(i.mean), real(i.low), real(i.high));
        ("mean perplexity, 95 % interval", format!("{text} of {} evaluations", i.evaluations))
    }));
    facts.push(("right token likeliest", format!("{} %", percent(eval.top1))));
    facts.push(("among the three likeliest", format!("{} %", percent(eval.top3))));
    if !eval.entropy_l.is_empty() {
        facts.push(("experts per token", fixed(eval.experts_per_token, 2)));
    }
    facts.push(("tokens scored", count(eval.tokens_scored)));
    let heading = format!("<h2>Held-out text <span class=\"samples\">after step {}</span></h2>", count(eval.step));
    format!("<section id=\"held-out\">{heading}\n{}</section>\n", page::facts(&facts))
}

const NO_EVALS: &str = "No held-out text was evaluated.";

/// A run with its log.
struct Run<'a> {
    results: &'a RunResults,
    steps: &'a [StepLog],
    /// Steps that smoothed curves take the mean of.
    window: usize,
}

impl Run<'_> {
    fn of_steps(&self, value: impl Fn(&StepLog) -> Option<f64>) -> Points {
        let points = self.steps.iter().filter_map(|s| Some((s.step as f64, value(s)?)));
        points.filter(|p| p.1.is_finite()).collect()
    }

    /// Every step, faint, and the mean of the last of them.
    fn training_series(&self, value: impl Fn(&StepLog) -> Option<f64>) -> Vec<Series> {
        let points = self.of_steps(value);
        let smoothed = smooth(&points, self.window);
        let mut series = Vec::new();
        if self.window > 1 {
            series.push(Series::new("each step", points, Mark::of(0), Look::Raw));
        }
        series.push(Series::new(self.smoothed_name(), smoothed, Mark::of(0), Look::Line));
        series
    }

    fn smoothed_name(&self) -> String {
        if self.window > 1 { format!("training, mean of {} steps", self.window) } else { "training".into() }
    }

    fn held_out_series(&self, name: &str, series: usize, value: impl Fn(&EvalLog) -> f64) -> Series {
        let points = self.results.evals.iter().map(|e| (e.step as f64, value(e)));
        Series::new(name, points, Mark::of(series), Look::Marked)
    }

    /// Curves of losses, and of what steers the steps.
    fn training(&self) -> String {
        let mut out = String::from("<section id=\"training\"><h2>Training</h2>\n");
        if self.steps.is_empty() {
            out += &sentence("No step was logged, so there are no curves of training.");
        }
        if self.results.evals.is_empty() {
            out += &sentence(NO_EVALS);
        }
        out += &charts(&[
            self.loss(),
            self.perplexity(),
            self.accuracy(),
            self.learning_rate(),
            self.grad_norm(),
            self.speed(),
        ]);
        if !self.steps.is_empty() {
            out += "<h3>Auxiliary losses, before their weights</h3>\n";
            let losses = self.auxiliary();
            out += &match losses.is_empty() {
                true => sentence("The run had no auxiliary losses."),
                false => charts(&losses),
            };
        }
        out + "</section>\n"
    }

    fn loss(&self) -> Option<String> {
        let mut series = self.training_series(|s| Some(s.loss));
        series.push(self.held_out_series("held-out", 1, |e| e.loss));
        let drawn = Curves { title: "cross-entropy, nats", log: false, series }.html()?;
        Some(figure("<b>Loss</b> of training and of held-out text", &drawn))
    }

    fn perplexity(&self) -> Option<String> {
        let smoothed = smooth(&self.of_steps(|s| Some(s.loss)), self.window);
        let points = smoothed.into_iter().map(|(step, loss)| (step, loss.exp()));
        let training = Series::new(self.smoothed_name(), points, Mark::of(0), Look::Line);
        let series = vec![training, self.held_out_series("held-out", 1, |e| e.perplexity)];
        let drawn = Curves { title: "perplexity", log: true, series }.html()?;
        Some(figure("<b>Perplexity</b>, on a logarithmic axis", &drawn))
    }

    fn accuracy(&self) -> Option<String> {
        let top1 = self.held_out_series("likeliest", 1, |e| 100.0 * e.top1);
        let top3 = self.held_out_series("among the three likeliest", 2, |e| 100.0 * e.top3);
        let drawn = Curves { title: "% of held-out tokens", log: false, series: vec![top1, top3] }.html()?;
        Some(figure("<b>Accuracy</b>: how often the right token was likeliest, or among three", &drawn))
    }

    fn grad_norm(&self) -> Option<String> {
        let series = self.training_series(|s| Some(s.grad_norm));
        let drawn = Curves { title: "norm of the gradient", log: true, series }.html()?;
        let clipped = self.steps.iter().filter(|s| s.clipped).count() as f64 / self.steps.len().max(1) as f64;
        let clipped = fixed(100.0 * clipped, 1);
        Some(figure(&format!("<b>Gradient</b> before clipping, which {clipped} % of steps needed"), &drawn))
    }

    fn learning_rate(&self) -> Option<String> {
        let series = vec![Series::new("learning rate", self.of_steps(|s| Some(s.lr)), Mark::of(0), Look::Line)];
        let drawn = Curves { title: "learning rate", log: false, series }.html()?;
        Some(figure("<b>Learning rate</b>", &drawn))
    }

    fn speed(&self) -> Option<String> {
        let series = self.training_series(|s| Some(s.tokens_per_second));
        Some(figure("<b>Speed</b> of training", &Curves { title: "tokens/s", log: false, series }.html()?))
    }

    fn auxiliary(&self) -> Vec<Option<String>> {
        type Loss = (&'static str, fn(&StepLog) -> Option<f64>);
        let losses: [Loss; 4] = [
            ("load balance", |s| s.balance),
            ("router z-loss", |s| s.z_loss),
            ("entropy floor", |s| s.entropy_floor),
            ("dynamic-k entropy", |s| s.dynk_entropy),
        ];
        let drawn = losses.into_iter().filter_map(|(title, value)| {
            let series = self.training_series(value);
            Some(figure(&format!("<b>{title}</b>"), &Curves { title, log: false, series }.html()?))
        });
        drawn.map(Some).collect()
    }

    /// Routing over the steps, and that of the final model.
    fn routing(&self) -> String {
        let mut out = String::from("<section id=\"routing\"><h2>Routing</h2>\n");
        let of_evals = || self.results.evals.iter().chain(&self.results.final_eval);
        let mixture = self.steps.iter().any(|s| !s.entropy_l.is_empty()) || of_evals().any(|e| !e.entropy_l.is_empty());
        if !mixture && self.results.routing.is_none() {
            return out + &sentence("Nothing routes: every layer of the model is dense.") + "</section>\n";
        }
        out += &charts(&[self.experts_per_token(), self.entropy(), self.utilisation_std(), self.dropped()]);
        if !self.steps.is_empty() && self.steps.iter().all(|s| s.dropped_share == 0.0) {
            out += &sentence("No row was over an expert's capacity.");
        }
        out += &match &self.results.routing {
            Some(found) if !found.layers.is_empty() => routing::section(found),
            _ => sentence("The routing of the final model was not analysed."),
        };
        out + "</section>\n"
    }

    fn experts_per_token(&self) -> Option<String> {
        let mut series = self.training_series(|s| Some(s.experts_per_token));
        series.push(self.held_out_series("held-out", 1, |e| e.experts_per_token));
        let drawn = Curves { title: "experts", log: false, series }.html()?;
        Some(figure("<b>Experts per token</b>, mean over tokens and layers", &drawn))
    }

    fn entropy(&self) -> Option<String> {
        let series = self.layers(|s| &s.entropy_l, |e| &e.entropy_l);
        let drawn = Curves { title: "H(p) / log E", log: false, series }.html()?;
        Some(figure(&format!("<b>Routing entropy</b> by layer{}", self.smoothing()), &drawn))
    }

    fn utilisation_std(&self) -> Option<String> {
        let series = self.layers(|s| &s.utilisation_std_l, |e| &e.utilisation_std_l);
        let drawn = Curves { title: "std of the experts' shares", log: false, series }.html()?;
        Some(figure(&format!("<b>Spread of utilisation</b> by layer{}", self.smoothing()), &drawn))
    }

    fn smoothing(&self) -> String {
        if self.window > 1 { format!(", mean of {} steps", self.window) } else { String::new() }
    }

    fn dropped(&self) -> Option<String> {
        if self.steps.iter().all(|s| s.dropped_share == 0.0) {
            return None;
        }
        let series = self.training_series(|s| Some(100.0 * s.dropped_share));
        let drawn = Curves { title: "% of rows", log: false, series }.html()?;
        Some(figure("<b>Over capacity</b>: rows that passed through the residual alone", &drawn))
    }

    /// A curve per mixture: of the steps, or of the evaluations where no step was logged.
    fn layers(&self, of_step: fn(&StepLog) -> &[f64], of_eval: fn(&EvalLog) -> &[f64]) -> Vec<Series> {
        let evals = &self.results.evals;
        let lengths = self.steps.iter().map(|s| of_step(s).len()).chain(evals.iter().map(|e| of_eval(e).len()));
        let mixtures = lengths.max().unwrap_or(0);
        let series = (0..mixtures).map(|l| {
            let mut points = smooth(&self.of_steps(|s| of_step(s).get(l).copied()), self.window);
            if points.is_empty() {
                points = evals.iter().filter_map(|e| Some((e.step as f64, *of_eval(e).get(l)?))).collect();
            }
            Series::new(self.layer_name(l, mixtures), points, Mark::of(l), Look::OneOfMany)
        });
        series.collect()
    }

    /// The layer's own index where the analysis tells it.
    fn layer_name(&self, l: usize, mixtures: usize) -> String {
        let known = self.results.routing.as_ref().filter(|r| r.layers.len() == mixtures);
        known.map_or_else(|| format!("mixture {l}"), |r| format!("layer {}", r.layers[l].layer))
    }
}

/// Figures side by side.
fn charts(figures: &[Option<String>]) -> String {
    let figures: String = figures.iter().flatten().map(String::as_str).collect();
    if figures.is_empty() { figures } else { format!("<div class=\"charts\">\n{figures}</div>\n") }
}

fn samples(samples: &[Sample]) -> String {
    let mut out = String::from("<section id=\"samples\"><h2>Samples</h2>\n");
    if samples.is_empty() {
        out += &sentence("No text was sampled.");
    }
    for sample in samples {
        // The prompt is followed at once by what the model wrote, so its last line must stay open.
        let (prompt, text) = (lines(&format!("{}|", sample.prompt)), lines(&sample.text));
        let prompt = prompt.strip_suffix('|').unwrap_or(&prompt);
        out += &format!("<pre class=\"command sample\"><b>{prompt}</b>{text}</pre>\n");
    }
    out + "</section>\n"
}

/// Facts of the data, nested ones by their path.
fn data(data: &Value) -> String {
    let mut found = Vec::new();
    flatten(String::new(), data, &mut found);
    if found.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&[("fact", true), ("value", true)]);
    let more = found.len().saturating_sub(DATA_ROWS_MAX);
    for (path, value) in found.into_iter().take(DATA_ROWS_MAX) {
        table.rows.push(vec![name(path), plain(clip(&value, DATA_VALUE_MAX))]);
    }
    let rest = if more > 0 { sentence(&format!("{more} more facts stand in results.json.")) } else { String::new() };
    format!("<section id=\"data\"><h2>Data</h2>\n{}{rest}</section>\n", page::table(&table, "Data"))
}

fn flatten(path: String, value: &Value, out: &mut Vec<(String, String)>) {
    let below = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    match value {
        Value::Null => {}
        Value::Object(fields) => fields.iter().for_each(|(key, value)| flatten(below(key), value, out)),
        Value::Array(values) if values.iter().any(|v| v.is_object() || v.is_array()) => {
            values.iter().enumerate().for_each(|(i, value)| flatten(below(&i.to_string()), value, out));
        }
        Value::Array(values) => {
            let values: Vec<String> = values.iter().map(scalar).collect();
            out.push((path, values.join(", ")));
        }
        value => out.push((path, scalar(value))),
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.as_u64().map_or_else(|| number.to_string(), count),
        value => value.to_string(),
    }
}

/// How to read the figures: term and explanation.
fn notes(results: &RunResults, window: usize) -> Vec<(&'static str, String)> {
    let mut notes = vec![
        (
            "loss",
            "Mean cross-entropy of the next token in nats, without auxiliary losses. Perplexity is its exponential: that of \
             training, of the smoothed loss. A training loss is of text that the step had not yet learned from, with the \
             parameters before it."
                .into(),
        ),
        (
            "curves",
            format!(
                "Smoothed curves are means of a step and those before it, {window} in all. Of long curves the first and \
                 last point and each stretch's least and greatest are drawn. A pointer that rests on a curve shows its \
                 values there."
            ),
        ),
    ];
    if let Some(interval) = results.perplexity_interval {
        notes.push((
            "interval",
            format!(
                "Mean ± t · s / √n over the last {} evaluations of this run, Student's t. It says how much the perplexity \
                 still moved between evaluations; it does not hold other seeds or other text.",
                interval.evaluations
            ),
        ));
    }
    if results.routing.is_some() {
        notes.extend(ROUTING_NOTES.map(|(term, text)| (term, text.to_string())));
    }
    notes
}

const ROUTING_NOTES: [(&str, &str); 3] = [
    (
        "entropy",
        "H(p) / log E of the router's probabilities over all E experts, mean over tokens: 0 where it is certain, 1 where all \
         experts are equal to it.",
    ),
    (
        "utilisation",
        "An expert's share of the rows that a layer computes; its standard deviation is over the layer's experts, 0 where \
         all are used alike.",
    ),
    (
        "token classes",
        "A token has the class of its first character, after leading white space: a small letter that begins a word or \
         goes on with one, a capital, a digit, a punctuation mark or symbol; white space alone; `other` are special \
         tokens and parts of characters.",
    ),
];
