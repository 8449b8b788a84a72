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
mod complexity;
mod context;
mod dynk;
mod gate;
mod layers;
mod native;
mod ratio;
mod threshold;
mod topk;
mod uniform;

pub use args::SpecArgs;
pub use context::{RouteCtx, StepTokens, StepTrace};
pub use gate::{GateView, TokenGate};

use super::RoutingBuilder;
use crate::types::{MoeShape, RouterSpec, SpecError};

/// A rule that chooses experts.
pub trait Router: Send + Sync {
    /// Chooses at least one expert, most probable first, for every token of `gate`.
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder);

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
    /// An example that every model accepts.
    pub example: &'static str,
    /// Whether the number of experts depends on the token.
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
    complexity::ENTRY,
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
}

impl Weights {
    const NAMES: &[(&str, Self)] = &[("native", Self::Native), ("renorm", Self::Renorm), ("keep", Self::Keep)];

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
    shape: MoeShape,
}

impl Policy {
    /// Gives `spec` its meaning for a model of `shape`.
    ///
    /// # Errors
    /// Unknown router or option, or a value out of range; the message holds the range and an example.
    pub fn build(spec: &RouterSpec, shape: &MoeShape) -> Result<Self, SpecError> {
        let entry = find(spec)?;
        let mut args = SpecArgs::new(spec, entry);
        let weights = args.option_of("weights", Weights::NAMES)?.unwrap_or_default();
        let router = (entry.parse)(&mut args, shape)?;
        args.finish()?;
        Ok(Self { spec: spec.clone(), router, weights, shape: shape.clone() })
    }

    /// The specification it was built from.
    pub fn spec(&self) -> &RouterSpec {
        &self.spec
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
        };
        let batch = if self.batch_invariant() { "" } else { "; depends on the rest of the batch" };
        format!("{rule}; {weights}{batch}")
    }

    /// Routes the tokens of `gate`.
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        self.router.route(gate, out);
        for token in gate.tokens() {
            self.weights.apply(&token, &self.shape, out.weigh(token.row));
        }
    }
}

/// Takes the `k` most probable experts of a token.
fn choose_top(token: &TokenGate<'_>, k: usize, out: &mut RoutingBuilder) {
    out.choose(token.row, &token.order_e[..k]);
}

#[cfg(test)]
mod tests;
