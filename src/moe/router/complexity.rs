//! `complexity:ESTIMATOR`: as many experts as a token is hard, by an estimate that is there before the experts run.

use super::estimator::{Estimator, estimator};
use super::{GateView, Router, RouterEntry, Signals, choose_top};
use crate::moe::RoutingBuilder;
use crate::moe::calibration::quantile_of;
use crate::types::MoeShape;
use std::ops::RangeInclusive;

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "complexity",
    usage: "complexity:ESTIMATOR[,cal=FILE][,min=a][,max=b][,min-ratio=r][,max-ratio=r] (max k0 by default, up to E; \
            ratios are of k0)",
    summary: "dynamic: k grows with an estimate c of the token's difficulty, which is its rank among the calibration \
              text's tokens, or without calibration a fixed map of the estimator's measure",
    formula: "k = min + round((max − min)·c), halves up; c = F̂_l(s) with cal=FILE",
    example: "complexity:router-entropy",
    dynamic: true,
    list: false,
    parse: |args, shape| {
        let name = args.one_arg("ESTIMATOR")?;
        let (estimator, entry) = estimator(name).map_err(|problem| args.error(problem))?;
        let ratio = |share: f32| ((share * shape.top_k as f32).round() as usize).max(1);
        let (min_ratio, max_ratio) = (args.option_share("min-ratio")?, args.option_share("max-ratio")?);
        if (min_ratio.is_some() && args.has("min")) || (max_ratio.is_some() && args.has("max")) {
            return Err(args.error("gives the same bound as a number and as a ratio; leave one out"));
        }
        let k = args.bounds(shape.top_k, shape.experts)?;
        let k = min_ratio.map_or(*k.start(), ratio)..=max_ratio.map_or(*k.end(), ratio);
        if k.is_empty() {
            let (min, max) = (k.start(), k.end());
            return Err(args.error(format!("min must not be above max; got min={min}, max={max}")));
        }
        let complexity = Complexity::new(name, estimator, k);
        let Some(calibration) = args.option_calibration(shape)? else { return Ok(Box::new(complexity)) };
        let tables = calibration.layers.iter().map(|layer| layer.quantiles.get(name).cloned());
        match tables.collect::<Option<Vec<_>>>().filter(|_| entry.calibrates) {
            Some(tables) => Ok(Box::new(complexity.calibrated(tables))),
            None => Err(args.error(format!("the calibration has no quantiles of {name} for every layer"))),
        }
    },
};

/// k by an estimate of difficulty.
pub struct Complexity {
    name: String,
    estimator: Box<dyn Estimator>,
    k: RangeInclusive<usize>,
    /// Of the measure, per MoE layer.
    quantiles_l: Option<Vec<Vec<f32>>>,
}

impl Complexity {
    /// From `k.start()` experts for what is easy to `k.end()` for what is hard, by `estimator` and its fixed map.
    pub fn new(name: &str, estimator: Box<dyn Estimator>, k: RangeInclusive<usize>) -> Self {
        Self { name: name.into(), estimator, k, quantiles_l: None }
    }

    /// By the measure's rank among these quantiles of every MoE layer, evenly spaced and ascending, instead of the fixed
    /// map.
    pub fn calibrated(self, quantiles_l: Vec<Vec<f32>>) -> Self {
        Self { quantiles_l: Some(quantiles_l), ..self }
    }

    /// Of a measure in MoE layer `layer`. What is no number gets 1: of what cannot be judged nothing is saved.
    fn c(&self, layer: usize, measure: f32) -> f32 {
        let c = match &self.quantiles_l {
            Some(quantiles_l) => quantile_of(&quantiles_l[layer], measure),
            None => self.estimator.squash(measure),
        };
        if c.is_nan() { 1.0 } else { c.clamp(0.0, 1.0) }
    }
}

impl Router for Complexity {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        let (min, max) = (*self.k.start(), *self.k.end());
        for token in gate.tokens() {
            let c = self.c(gate.layer, self.estimator.measure(&token));
            let more = (max - min) as f32 * c + 0.5;
            choose_top(&token, min + more as usize, out);
        }
    }

    fn signals(&self) -> Signals {
        self.estimator.signals()
    }

    fn experts_max(&self) -> usize {
        *self.k.end()
    }

    fn describe(&self, _: &MoeShape) -> String {
        let how = if self.quantiles_l.is_some() { "its rank in the calibration text" } else { "a fixed map" };
        format!("k in {}..={}, by {} and {how}", self.k.start(), self.k.end(), self.name)
    }
}
