//! Routers: one file each, one line each in [`ROUTERS`].
//!
//! A router chooses experts per token from the gate's probabilities; what their outputs are multiplied by is
//! the [`Weights`] rule's business, so that every router works with every rule. A [`Policy`] is the two
//! together, checked against a model. [`RouteCtx`] applies the policies of one step.
//!
//! Legend: T tokens in the step, E experts, k0 the checkpoint's own experts per token (all E for a checkpoint whose own
//! rule is without bounds, so that `mass=native` and `mass=full` are the same for it), p(1) ≥ p(2) ≥ … the
//! softmax over all E gate logits, sorted.

mod args;
mod budget;
mod complexity;
mod context;
mod contrib;
mod dynk;
mod estimator;
mod gate;
mod layers;
mod native;
mod oea;
mod policy;
mod ratio;
mod rule;
mod signals;
mod skip;
mod threshold;
mod together;
mod topk;
mod uniform;
mod xbudget;

pub use args::SpecArgs;
pub use budget::{BudgetScope, BudgetSpec};
pub use complexity::Complexity;
pub use context::{Probe, RouteCtx, StepTokens, StepTrace};
pub use estimator::{ESTIMATORS, Estimator, EstimatorEntry, estimator};
pub use gate::{GateView, TokenGate};
pub use rule::Rule;
pub use signals::{GateInput, LENS_TOKENS, Signals};

use super::RoutingBuilder;
use super::calibration::{Calibration, Calibrations};
use crate::types::{MoeShape, RouterSpec, SpecError};
use std::sync::Arc;

/// A rule that chooses experts.
pub trait Router: Send + Sync {
    /// Chooses at least one expert, most probable first, for every token of `gate`.
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder);

    /// What it reads beside the gate's probabilities.
    fn signals(&self) -> Signals {
        Signals::default()
    }

    /// Whether a token's experts are the same whatever else is in the step.
    fn batch_invariant(&self) -> bool {
        true
    }

    /// The most experts that a token can get in any layer.
    fn experts_max(&self) -> usize;

    /// What the rule means for this model, in a few words: `k in 1..=2, …`.
    fn describe(&self, shape: &MoeShape) -> String;
}

/// One line of the router table.
pub struct RouterEntry {
    pub name: &'static str,
    /// Grammar, with defaults.
    pub usage: &'static str,
    /// One line, for `--help` and the README.
    pub summary: &'static str,
    /// The rule as a formula.
    pub formula: &'static str,
    /// An example that every model accepts, given the file that it names, if it names one.
    pub example: &'static str,
    /// Whether the number of experts depends on the token; not so where it depends on the batch and is one for all of it.
    pub dynamic: bool,
    /// Whether several arguments are one list; else a specification with several is a sweep.
    pub list: bool,
    parse: Parse,
}

/// Makes a router of its arguments for a model of the given shape.
type Parse = fn(&mut SpecArgs<'_>, &MoeShape) -> Result<Box<dyn Router>, SpecError>;

/// Every router there is.
pub static ROUTERS: &[RouterEntry] = &[
    native::ENTRY,
    topk::ENTRY,
    layers::ENTRY,
    dynk::ENTRY,
    ratio::ENTRY,
    threshold::ENTRY,
    skip::ENTRY,
    contrib::ENTRY,
    complexity::ENTRY,
    policy::ENTRY,
    budget::ENTRY,
    oea::ENTRY,
    xbudget::ENTRY,
    uniform::ENTRY,
];

/// The line of the table that `spec` names: what can be said of it before there is a model.
///
/// # Errors
/// A name that no router has.
pub fn find(spec: &RouterSpec) -> Result<&'static RouterEntry, SpecError> {
    ROUTERS.iter().find(|entry| entry.name == spec.name).ok_or_else(|| {
        let names: Vec<&str> = ROUTERS.iter().map(|entry| entry.name).collect();
        spec.error(format!("there is no such router; there are {}", names.join(", ")))
    })
}

/// What the router of `spec` reads beside the gate's probabilities: what can be said of it before there is a model.
pub fn signals(spec: &RouterSpec) -> Signals {
    let estimator = spec.args.first().filter(|_| spec.name == complexity::ENTRY.name).map(|name| estimator(name));
    estimator.and_then(Result::ok).map_or_else(Signals::default, |(estimator, _)| estimator.signals())
}

/// The specifications that `spec` stands for: one per argument, where a router takes one and several are given
/// (`dynk:0.5,0.8`), each with all options.
///
/// # Errors
/// A name that no router has.
pub fn sweep(spec: &RouterSpec) -> Result<Vec<RouterSpec>, SpecError> {
    if find(spec)?.list || spec.args.len() < 2 {
        return Ok(vec![spec.clone()]);
    }
    Ok(spec.args.iter().map(|arg| RouterSpec { args: vec![arg.clone()], ..spec.clone() }).collect())
}

/// What a chosen expert's output is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Weights {
    /// The family's own convention over the chosen set: renormalised or raw probabilities.
    #[default]
    Native,
    /// Probabilities of the chosen set, renormalised to sum to 1.
    Renorm,
    /// What native top-k0 routing would have given each survivor: dropping an expert rescales nothing.
    Keep,
    /// The family's own convention, times what brings the output closest to that of native top-k0 routing, in the mean
    /// over the calibration text, for this layer and this number of experts ([`Calibration`]'s `gamma_k`).
    Lsq,
}

impl Weights {
    const NAMES: &[(&str, Self)] =
        &[("native", Self::Native), ("renorm", Self::Renorm), ("keep", Self::Keep), ("lsq", Self::Lsq)];

    /// Sets the weights of one token's chosen experts.
    fn apply(self, gate: &TokenGate<'_>, shape: &MoeShape, chosen: &mut [(u16, f32)]) {
        let p = |e: u16| gate.probs_e[e as usize];
        let renormalise = shape.renormalise || self == Self::Renorm;
        // Sums run from the most probable expert down in every rule, so equal sets give equal bits.
        let denominator = match (renormalise, self) {
            (false, _) => 1.0,
            (true, Self::Keep) => gate.order_e[..shape.top_k].iter().map(|&e| p(e)).sum(),
            (true, _) => chosen.iter().map(|c| p(c.0)).sum::<f32>(),
        };
        let equal = 1.0 / chosen.len() as f32;
        for (e, weight) in chosen {
            // All chosen probabilities underflowed: nothing tells the experts apart.
            *weight = if denominator > 0.0 { p(*e) / denominator } else { equal };
        }
    }
}

/// A router with its weight rule, checked against a model.
pub struct Policy {
    spec: RouterSpec,
    router: Box<dyn Router>,
    weights: Weights,
    /// What [`Weights::Lsq`] multiplies by, and the file it is from.
    scale: Option<(String, Arc<Calibration>)>,
    shape: MoeShape,
}

impl Policy {
    /// Gives `spec`, which names no file, its meaning for a model of `shape`.
    ///
    /// # Errors
    /// Unknown router or option, or a value out of range; the message holds the range and an example.
    pub fn build(spec: &RouterSpec, shape: &MoeShape) -> Result<Self, SpecError> {
        Self::parse(spec, shape, None)
    }

    /// Gives `spec`, which may name `files`, its meaning for a model of `shape`.
    ///
    /// # Errors
    /// As [`Self::build`], or a file that is not for this model.
    pub fn build_with(spec: &RouterSpec, shape: &MoeShape, files: &Calibrations) -> Result<Self, SpecError> {
        Self::parse(spec, shape, Some(files))
    }

    fn parse(spec: &RouterSpec, shape: &MoeShape, files: Option<&Calibrations>) -> Result<Self, SpecError> {
        let entry = find(spec)?;
        let mut args = SpecArgs::new(spec, entry, files);
        let asked = args.option_of("weights", Weights::NAMES)?;
        let router = (entry.parse)(&mut args, shape)?;
        let weights = asked.unwrap_or(args.weights);
        let scale = (weights == Weights::Lsq).then(|| args.calibration_file("weights=lsq", shape)).transpose()?;
        args.finish()?;
        Ok(Self { spec: spec.clone(), router, weights, scale, shape: shape.clone() })
    }

    /// A policy of a rule that is in no table, with the family's own weights; `name` is what it is known by, to the
    /// prefix cache too.
    pub fn of(name: &str, router: Box<dyn Router>, shape: &MoeShape) -> Self {
        let spec = RouterSpec { name: name.into(), args: Vec::new(), options: Vec::new() };
        Self { spec, router, weights: Weights::Native, scale: None, shape: shape.clone() }
    }

    /// The specification it was built from.
    pub fn spec(&self) -> &RouterSpec {
        &self.spec
    }

    /// The options that give another router the same weights.
    pub fn weight_options(&self) -> Vec<(String, String)> {
        let name = Weights::NAMES.iter().find(|(_, weights)| *weights == self.weights).map(|(name, _)| *name);
        let weights = name.filter(|_| self.weights != Weights::Native).map(|name| ("weights".into(), name.into()));
        let file = self.scale.as_ref().map(|(path, _)| ("cal".into(), path.clone()));
        weights.into_iter().chain(file).collect()
    }

    /// See [`Router::signals`].
    pub fn signals(&self) -> Signals {
        self.router.signals()
    }

    /// See [`Router::batch_invariant`].
    pub fn batch_invariant(&self) -> bool {
        self.router.batch_invariant()
    }

    /// The most experts that a token can get in any layer.
    pub fn experts_max(&self) -> usize {
        self.router.experts_max()
    }

    /// What the policy means for its model, in words.
    pub fn describe(&self) -> String {
        if self.shape.layers == 0 {
            return "the model has no mixtures: nothing is routed, whatever k".into();
        }
        let rule = self.router.describe(&self.shape);
        let weights = match (self.weights, self.shape.renormalise) {
            (Weights::Renorm, _) | (Weights::Native, true) => "weights renormalised to sum 1",
            (Weights::Keep, true) => "weights kept from the native top-k0",
            (Weights::Native | Weights::Keep, false) => "weights are the raw probabilities",
            (Weights::Lsq, _) => "weights scaled by calibration",
        };
        let batch = if self.batch_invariant() { "" } else { "; depends on the rest of the batch" };
        format!("{rule}; {weights}{batch}")
    }

    /// Routes the tokens of `gate`.
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        self.router.route(gate, out);
        for token in gate.tokens() {
            let chosen = out.weigh(token.row);
            self.weights.apply(&token, &self.shape, chosen);
            // More than k0 experts were never compared with k0.
            let gamma = self.scale.as_ref().and_then(|(_, c)| c.layers[gate.layer].gamma_k.get(chosen.len() - 1));
            if let Some(gamma) = gamma {
                chosen.iter_mut().for_each(|(_, weight)| *weight *= gamma);
            }
        }
    }
}

/// Takes the `k` most probable experts of a token.
fn choose_top(token: &TokenGate<'_>, k: usize, out: &mut RoutingBuilder) {
    out.choose(token.row, &token.order_e[..k]);
}

#[cfg(test)]
mod tests;
