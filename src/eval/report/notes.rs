//! What a report says in words about itself: the facts of the run, and how its figures are to be read.

use super::format;
use crate::eval::results::Results;

/// Facts of the run: name and value.
pub fn facts(results: &Results) -> Vec<(&'static str, String)> {
    let (model, settings) = (&results.model, &results.settings);
    let mut facts = vec![("model", model.name.clone())];
    facts.extend(model.hash.iter().map(|hash| ("SHA-256", hash.clone())));
    facts.push(("runs on", model.runs_on.clone()));
    facts.extend(model.parameters.map(|n| ("parameters", format::count(n))));
    facts.extend(model.moe.as_ref().map(|moe| {
        ("mixtures", format!("{} MoE layers of {} experts, {} per token", moe.layers, moe.experts, moe.top_k))
    }));
    facts.push(("tasks", settings.tasks.join(", ")));
    facts.push(("shots", settings.shots.map_or("as the task has them".into(), |n| n.to_string())));
    facts.push(("samples", settings.limit.map_or("all".into(), |n| format!("the first {n} of each subtask"))));
    facts.extend(settings.max_gen_tokens.map(|n| ("generated", format!("at most {n} tokens"))));
    facts.push(("max length", format!("{} tokens", format::count(settings.max_length as u64))));
    facts.push(("seed", settings.seed.to_string()));
    facts.push(("finished", results.finished.clone()));
    facts.push(("program", results.program.clone()));
    facts
}

/// Terms of the figures, and what they mean.
const TERMS: [(&str, &str); 9] = [
    (
        "mean k",
        "Experts per token and MoE layer. Counted are the tokens that belong to samples: those after a \
         subtask's shared few-shot prefix, and those generated.",
    ),
    (
        "scopes",
        "`experts` counts the matrix products of the routed experts; `forward` counts all matrix products: \
         attention at its true context length, gates, routed and shared experts, dense layers and the LM \
         head. A multiply-add is 2 FLOPs.",
    ),
    (
        "saved",
        "1 − ran / native, where native is what the checkpoint's own number of experts would have run on the same \
         tokens. Below zero it is a cost.",
    ),
    (
        "expert bytes",
        "Expert weights read from memory, each expert once per layer and step however many tokens share it. \
         They, not FLOPs, decide how fast small batches decode.",
    ),
    (
        "static control",
        "How many experts a token uses depends on the layer alone, so that mean k equals that of the router it \
         controls for: where it is no whole number, some layers use one more, and samples alternate between two \
         such mixes. What a router gains by choosing k per token shows against its control; against native it \
         mixes with the effect of using other numbers of experts.",
    ),
    (
        "comparisons",
        "Two arms on the same samples. Differences are paired, in percentage points (pp) where the metric is \
         a share of right answers. p is from McNemar's exact test where answers are right or wrong, from a \
         sign-flip permutation test otherwise, two-sided. Holm's correction covers all comparisons of this \
         document; a verdict is given where the corrected p is below 0.05.",
    ),
    (
        "averages",
        "A group's value is the mean over all its samples (micro average), as in lm-eval; the macro average \
         is the mean over its subtasks.",
    ),
    (
        "KL",
        "KL(native ‖ arm) of the distributions of the next token, in nats: after the prompts of samples spread over \
         the task, after the last 16 tokens of windows of text.",
    ),
    ("time", "Wall time of the samples in seconds, on the machine named above; other load is not excluded."),
];

/// How to read the figures: term and explanation.
pub fn how_to_read(results: &Results) -> Vec<(&'static str, String)> {
    let (resamples, seed) = (results.settings.bootstrap_resamples as u64, results.settings.seed);
    let intervals = format!(
        "± is the standard error as lm-eval 0.4.13 gives it: sample standard deviation / √n, pooled over the subtasks of \
         a group. Intervals are 95 % percentile bootstrap intervals over samples (perplexity: over windows) from {} \
         resamples with seed {seed}.",
        format::count(resamples)
    );
    let mut terms: Vec<_> = TERMS.iter().map(|(term, text)| (*term, (*text).to_string())).collect();
    terms.push(("± and intervals", intervals));
    terms
}
