//! Calibration files: what `moe-calibrate` measured of one checkpoint, and the policy that it made of it.

use super::router::Rule;
use crate::types::MoeShape;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// What the field `format` says.
pub const FORMAT: &str = "moe-serve calibration";
/// Raised whenever the meaning of a field changes.
pub const VERSION: u32 = 1;
/// Steps of a table of quantiles: quantiles 0, 1/64, …, 1.
pub const QUANTILE_STEPS: usize = 64;
/// Steps of a [`Curves`] table: mean k from 1 to k0.
pub const CURVE_STEPS: usize = 32;

/// The contents of a calibration file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    pub format: String,
    pub version: u32,
    /// The checkpoint's hash ([`crate::types::hex`] of its SHA-256): the file is for no other.
    pub checkpoint: String,
    /// E.
    pub experts: usize,
    /// k0.
    pub top_k: usize,
    pub made: Provenance,
    /// One per MoE layer.
    pub layers: Vec<LayerStatistics>,
    pub policy: Option<PolicyTable>,
}

/// What it was made with.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// The model's name, for readers.
    pub model: String,
    /// Version of the program.
    pub program: String,
    /// SHA-256 of the text that statistics were taken of.
    pub text: String,
    /// Tokens of it.
    pub tokens: usize,
    pub seed: u64,
}

/// What was measured of one MoE layer under native routing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerStatistics {
    /// E‖y_e‖ over the tokens that were routed to expert e, `[E]`.
    pub expert_norms_e: Vec<f32>,
    /// E⟨y_k0, y_k⟩ / E‖y_k‖² for k = 1..=k0: what the output of the k most probable experts has to be multiplied by to
    /// come closest to that of all k0, `[k0]`.
    pub gamma_k: Vec<f32>,
    /// Median of p(2) / p(1).
    pub ratio_median: f32,
    pub curves: Curves,
    /// Quantiles of every estimator's measure, by its name, `[QUANTILE_STEPS + 1]` each.
    pub quantiles: BTreeMap<String, Vec<f32>>,
}

/// Parameters at which a rule takes a mean k of 1, …, k0 in evenly spaced steps, `[CURVE_STEPS + 1]` each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Curves {
    /// τ of [`Rule::Score`].
    pub score: Vec<f32>,
    /// τ of [`Rule::Contribution`].
    pub contribution: Vec<f32>,
    /// θ of [`Rule::Threshold`].
    pub threshold: Vec<f32>,
}

/// How a policy routes, for a ladder of budgets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyTable {
    /// What `target` is a share of, against native routing: `experts` or `forward` FLOPs, or `bytes` of distinct experts.
    pub scope: String,
    pub target: f64,
    /// Sequences that decode at the same time, for `bytes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Whether outputs are scaled by `gamma_k`.
    pub lsq: bool,
    /// From the cheapest up.
    pub rungs: Vec<Rung>,
    /// What the rung of `target` came to on text that it was not calibrated on, beside static routing at the same cost.
    pub held_out: HeldOut,
}

/// A policy for one budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rung {
    /// Share of native routing's cost, in the table's scope, that the calibration text came to.
    pub cost: f64,
    /// Experts per token and layer that it came to.
    pub mean_k: f64,
    /// One per MoE layer.
    pub rules: Vec<Rule>,
}

/// The two contenders on held-out text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldOut {
    pub tokens: usize,
    /// The dynamic policy that was found, whichever of the two is in force.
    pub dynamic: Contender,
    /// The best static allocation at the same cost.
    pub fixed: Contender,
    /// Mean of KL(dynamic) − KL(fixed) over windows, with its 95 % interval.
    pub difference: f64,
    pub low: f64,
    pub high: f64,
    /// `dynamic` or `static`: what `rungs` are.
    pub winner: String,
}

/// What a policy cost, and what it came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contender {
    pub mean_k: f64,
    /// Share of native routing's, in scope `experts`.
    pub expert_flops: f64,
    /// In scope `forward`.
    pub forward_flops: f64,
    /// Of distinct experts read per step, as the engine ran.
    pub expert_bytes: f64,
    /// KL divergence of the next token's distribution from native routing's, nats per token.
    pub kl: f64,
    pub perplexity: f64,
}

impl Calibration {
    /// One that knows nothing: all experts alike, no scaling, every measure spread evenly over 0..=1.
    pub fn uninformed(shape: &MoeShape, checkpoint: &str) -> Self {
        let ramp = |steps: usize| (0..=steps).map(|i| i as f32 / steps as f32).collect::<Vec<_>>();
        let down = || ramp(CURVE_STEPS).into_iter().rev().collect();
        let curves = Curves { score: ramp(CURVE_STEPS), contribution: ramp(CURVE_STEPS), threshold: down() };
        let calibrated = super::router::ESTIMATORS.iter().filter(|entry| entry.calibrates);
        let layer = LayerStatistics {
            expert_norms_e: vec![1.0; shape.experts],
            gamma_k: vec![1.0; shape.top_k],
            ratio_median: 0.5,
            curves,
            quantiles: calibrated.map(|entry| (entry.name.to_string(), ramp(QUANTILE_STEPS))).collect(),
        };
        Self {
            format: FORMAT.into(),
            version: VERSION,
            checkpoint: checkpoint.into(),
            experts: shape.experts,
            top_k: shape.top_k,
            made: Provenance::default(),
            layers: vec![layer; shape.layers],
            policy: None,
        }
    }

    /// Reads a file that must be for the checkpoint of this hash and shape.
    ///
    /// # Errors
    /// A file that cannot be read, is no calibration or of another version, is another checkpoint's, or is incomplete.
    pub fn read(path: &Path, checkpoint: &str, shape: &MoeShape) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let about = |problem: String| format!("{} {problem}", path.display());
        let head: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| about(format!("is not JSON, as moe-calibrate writes it: {e}")))?;
        if head["format"] != FORMAT {
            return Err(about(format!("is no calibration: its field `format` is not \"{FORMAT}\"")));
        }
        if head["version"] != VERSION {
            let version = &head["version"];
            return Err(about(format!(
                "is of version {version}; this program reads version {VERSION}: run moe-calibrate again"
            )));
        }
        let read: Self = serde_json::from_str(&text).map_err(|e| about(format!("is not a whole calibration: {e}")))?;
        if read.checkpoint != checkpoint {
            return Err(about(format!(
                "was made for another checkpoint ({}, {}…) than this one ({}…): run moe-calibrate for it",
                read.made.model,
                read.checkpoint.get(..12).unwrap_or(&read.checkpoint),
                checkpoint.get(..12).unwrap_or(checkpoint)
            )));
        }
        read.check(shape).map_err(about)?;
        Ok(read)
    }

    /// Whether everything is there that a model of `shape` needs.
    fn check(&self, shape: &MoeShape) -> Result<(), String> {
        if (self.experts, self.top_k, self.layers.len()) != (shape.experts, shape.top_k, shape.layers) {
            return Err(format!(
                "is of {} layers of {} experts with k0 = {}; the model has {} of {} with k0 = {}",
                self.layers.len(),
                self.experts,
                self.top_k,
                shape.layers,
                shape.experts,
                shape.top_k
            ));
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let Curves { score, contribution, threshold } = &layer.curves;
            let tables = [
                ("expert_norms_e", &layer.expert_norms_e, shape.experts),
                ("gamma_k", &layer.gamma_k, shape.top_k),
                ("curves.score", score, CURVE_STEPS + 1),
                ("curves.contribution", contribution, CURVE_STEPS + 1),
                ("curves.threshold", threshold, CURVE_STEPS + 1),
            ];
            let named = tables.into_iter().map(|(name, values, len)| (name.to_string(), values, len));
            let quantiles =
                layer.quantiles.iter().map(|(name, q)| (format!("quantiles.{name}"), q, QUANTILE_STEPS + 1));
            for (name, values, len) in named.chain(quantiles) {
                if values.len() != len || values.iter().any(|x| x.is_nan()) {
                    return Err(format!("has no {len} numbers in layers[{i}].{name}"));
                }
            }
            if !layer.ratio_median.is_finite() {
                return Err(format!("has no number in layers[{i}].ratio_median"));
            }
        }
        let Some(policy) = &self.policy else { return Ok(()) };
        for (i, rung) in policy.rungs.iter().enumerate() {
            if rung.rules.len() != shape.layers || !rung.rules.iter().all(|rule| rule.valid(shape.top_k)) {
                return Err(format!("has in policy.rungs[{i}] no {} rules within k0 = {}", shape.layers, shape.top_k));
            }
        }
        let ascending = policy.rungs.windows(2).all(|pair| pair[0].cost <= pair[1].cost);
        if policy.rungs.is_empty() || !ascending {
            return Err("has no policy.rungs from the cheapest up".into());
        }
        Ok(())
    }
}

impl LayerStatistics {
    /// F̂(measure) of the estimator `name`, in 0..=1: the share of calibration tokens that measured less, interpolated.
    /// NaN, which nothing is known of, is 1.
    pub fn quantile_of(&self, name: &str, measure: f32) -> Option<f32> {
        Some(quantile_of(self.quantiles.get(name)?, measure))
    }
}

/// See [`LayerStatistics::quantile_of`]; `quantiles` ascend.
pub fn quantile_of(quantiles: &[f32], measure: f32) -> f32 {
    if measure.is_nan() {
        return 1.0;
    }
    let steps = quantiles.len() - 1;
    // Among equal quantiles, the middle: a measure that most tokens share is an average one.
    let (below, not_above) =
        (quantiles.partition_point(|q| *q < measure), quantiles.partition_point(|q| *q <= measure));
    if below < not_above {
        return (below + not_above - 1) as f32 / 2.0 / steps as f32;
    }
    match below {
        0 => 0.0,
        n if n > steps => 1.0,
        n => {
            let (low, high) = (quantiles[n - 1], quantiles[n]);
            (n as f32 - 1.0 + ((measure - low) / (high - low)).clamp(0.0, 1.0)) / steps as f32
        }
    }
}

/// The parameter of `curve` for a mean k, interpolated.
pub fn parameter_at(curve: &[f32], mean_k: f64, top_k: usize) -> f32 {
    let steps = curve.len() - 1;
    let share = if top_k > 1 { (mean_k - 1.0) / (top_k - 1) as f64 } else { 1.0 };
    let place = share.clamp(0.0, 1.0) * steps as f64;
    let below = (place.floor() as usize).min(steps - 1);
    let weight = (place - below as f64) as f32;
    curve[below] * (1.0 - weight) + curve[below + 1] * weight
}

impl PolicyTable {
    /// The dearest rung that costs at most `share`, or else the cheapest, which is told by its cost.
    pub fn rung(&self, share: f64) -> &Rung {
        // Shares are written with four decimals.
        let affordable = self.rungs.partition_point(|rung| rung.cost <= share + 1e-4);
        &self.rungs[affordable.saturating_sub(1)]
    }
}

/// The calibration files of one checkpoint, each read once.
pub struct Calibrations {
    checkpoint: Box<dyn Fn() -> Result<String, String> + Send + Sync>,
    read: Mutex<HashMap<String, Arc<Calibration>>>,
}

impl Calibrations {
    /// For the checkpoint whose hash `checkpoint` computes, which is asked for when there is a file to compare it with.
    pub fn new(checkpoint: impl Fn() -> Result<String, String> + Send + Sync + 'static) -> Self {
        Self { checkpoint: Box::new(checkpoint), read: Mutex::default() }
    }

    /// Makes `calibration` known by `name`, as if it were a file of that name; another name for another one.
    pub fn insert(&self, name: &str, calibration: Calibration) {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.insert(name.into(), Arc::new(calibration));
    }

    /// See [`Calibration::read`].
    ///
    /// # Errors
    /// As there.
    pub fn open(&self, path: &str, shape: &MoeShape) -> Result<Arc<Calibration>, String> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = read.get(path) {
            return Ok(known.clone());
        }
        if !Path::new(path).is_file() {
            return Err(format!("there is no file {path}; moe-calibrate makes one"));
        }
        let calibration = Arc::new(Calibration::read(Path::new(path), &(self.checkpoint)()?, shape)?);
        read.insert(path.into(), calibration.clone());
        Ok(calibration)
    }
}

#[cfg(test)]
mod tests;
