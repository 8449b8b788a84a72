//! The log of a run: JSON lines, one per optimiser step and per evaluation.

use serde::{Deserialize, Deserializer, Serialize};

/// One line of `log.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum LogLine {
    Step(StepLog),
    Eval(EvalLog),
}

/// What one optimiser step did. Numbers that are none are `null` in JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepLog {
    /// Steps begin at 1.
    pub step: u64,
    /// Tokens trained on so far.
    pub tokens: u64,
    /// Wall time of training so far, over all resumptions.
    pub seconds: f64,
    #[serde(deserialize_with = "number")]
    pub lr: f64,
    /// Mean cross-entropy of the step's tokens in nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    #[serde(deserialize_with = "number")]
    pub perplexity: f64,
    /// Auxiliary losses, before their weights.
    pub balance: Option<f64>,
    pub z_loss: Option<f64>,
    pub entropy_floor: Option<f64>,
    pub dynk_entropy: Option<f64>,
    /// Cross-entropy and the weighted auxiliary losses: what was minimised.
    #[serde(deserialize_with = "number")]
    pub total: f64,
    /// Before clipping.
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    pub clipped: bool,
    #[serde(deserialize_with = "number")]
    pub tokens_per_second: f64,
    /// Mean over tokens and mixtures.
    #[serde(deserialize_with = "number")]
    pub experts_per_token: f64,
    /// Share of the rows that were over an expert's capacity.
    #[serde(deserialize_with = "number")]
    pub dropped_share: f64,
    /// Mean of H(p)/log E per mixture.
    #[serde(deserialize_with = "numbers")]
    pub entropy_l: Vec<f64>,
    /// Standard deviation of the experts' shares of rows, per mixture.
    #[serde(deserialize_with = "numbers")]
    pub utilisation_std_l: Vec<f64>,
}

/// One evaluation on held-out windows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalLog {
    /// Steps before it.
    pub step: u64,
    pub tokens_scored: u64,
    /// Mean cross-entropy in nats.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    #[serde(deserialize_with = "number")]
    pub perplexity: f64,
    /// Share of tokens that were the likeliest, and among the three likeliest.
    #[serde(deserialize_with = "number")]
    pub top1: f64,
    #[serde(deserialize_with = "number")]
    pub top3: f64,
    #[serde(deserialize_with = "number")]
    pub experts_per_token: f64,
    #[serde(deserialize_with = "numbers")]
    pub entropy_l: Vec<f64>,
    #[serde(deserialize_with = "numbers")]
    pub utilisation_std_l: Vec<f64>,
}

/// JSON has no NaN: it is written as `null`, and read again as NaN.
pub(super) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

fn numbers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
    let values = Vec::<Option<f64>>::deserialize(deserializer)?;
    Ok(values.into_iter().map(|v| v.unwrap_or(f64::NAN)).collect())
}

/// All steps and evaluations of a run, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Log {
    pub steps: Vec<StepLog>,
    pub evals: Vec<EvalLog>,
}

/// A line that is none of a log.
#[derive(Debug, thiserror::Error)]
#[error("line {line} of the log is no step and no evaluation: {source}; remove the line or give the log of a run")]
pub struct LogError {
    pub line: usize,
    source: serde_json::Error,
}

impl Log {
    /// Reads a `log.jsonl`. What stands twice, since a run went back to its last checkpoint, counts as the later line
    /// has it. A last line without an end, which a crash left, is none.
    ///
    /// # Errors
    /// When another line is broken.
    pub fn parse(text: &str) -> Result<Self, LogError> {
        let mut log = Self::default();
        for (i, line) in text.split_inclusive('\n').enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            match serde_json::from_str(line) {
                Ok(LogLine::Step(step)) => {
                    log.forget_from(step.step);
                    log.steps.push(step);
                }
                Ok(LogLine::Eval(eval)) => {
                    log.evals.retain(|e| e.step < eval.step);
                    log.evals.push(eval);
                }
                Err(_) if !line.ends_with('\n') => {}
                Err(source) => return Err(LogError { line: i + 1, source }),
            }
        }
        Ok(log)
    }

    /// Forgets the steps from `step` on and the evaluations after them.
    fn forget_from(&mut self, step: u64) {
        self.steps.truncate(self.steps.partition_point(|s| s.step < step));
        self.evals.truncate(self.evals.partition_point(|e| e.step < step));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::report::tests::example;

    fn line(line: LogLine) -> String {
        serde_json::to_string(&line).unwrap() + "\n"
    }

    #[test]
    fn a_log_comes_back_as_it_was_written() {
        let (results, mut steps) = example::mixture(30);
        steps[3].loss = f64::NAN;
        steps[3].entropy_l[0] = f64::INFINITY;
        let mut text: String = steps.iter().cloned().map(|s| line(LogLine::Step(s))).collect();
        text.extend(results.evals.iter().cloned().map(|e| line(LogLine::Eval(e))));
        let log = Log::parse(&text).unwrap();
        assert!(log.steps[3].loss.is_nan() && log.steps[3].entropy_l[0].is_nan());
        assert_eq!((&log.steps[4..], &log.evals), (&steps[4..], &results.evals));
    }

    #[test]
    fn a_resumed_run_goes_on_from_its_checkpoint() {
        let (results, steps) = example::mixture(10);
        let step = |i: usize, loss: f64| line(LogLine::Step(StepLog { loss, ..steps[i].clone() }));
        let eval = |step: u64| line(LogLine::Eval(EvalLog { step, ..results.evals[0].clone() }));
        let text =
            [step(0, 9.0), eval(1), step(1, 8.0), step(2, 7.0), eval(3), step(1, 6.0), eval(2), eval(2)].concat();
        let log = Log::parse(&text).unwrap();
        assert_eq!(log.steps.iter().map(|s| (s.step, s.loss)).collect::<Vec<_>>(), [(1, 9.0), (2, 6.0)]);
        assert_eq!(log.evals.iter().map(|e| e.step).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn a_torn_last_line_is_left_out_and_a_broken_one_is_named() {
        let (_, steps) = example::mixture(3);
        let first = line(LogLine::Step(steps[0].clone()));
        assert_eq!(Log::parse(&format!("{first}{}", &first[..40])).unwrap().steps, steps[..1]);
        let error = Log::parse(&format!("{first}{{\"kind\":\"walk\"}}\n{first}")).unwrap_err();
        assert!(error.to_string().starts_with("line 2 of the log"), "{error}");
        assert_eq!(Log::parse("").unwrap(), Log::default());
    }
}
