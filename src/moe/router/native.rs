//! `native`: the checkpoint's own router, the baseline every rule must beat.
//!
//! Most checkpoints were trained with static top-k0. One that was trained with another rule says so in config.json
//! ([`MoeShape::router`]), and then that is what `native` means for it. What savings are counted against stays k0.

use super::topk::TopK;
use super::{GateView, Router, RouterEntry, Signals, SpecArgs, find};
use crate::moe::RoutingBuilder;
use crate::types::{MoeShape, RouterSpec, SpecError};

pub(super) const ENTRY: RouterEntry = RouterEntry {
    name: "native",
    usage: "native",
    summary: "the checkpoint's own (default): its top-k0, or the rule a checkpoint of this program was trained with",
    formula: "k = k0",
    example: "native",
    dynamic: false,
    list: false,
    parse: |args, shape| {
        args.no_args()?;
        match &shape.router {
            None => Ok(Box::new(TopK { k: shape.top_k })),
            Some(spec) => Ok(Box::new(Own { rule: own(spec, shape)?, spec: spec.clone() })),
        }
    },
};

/// The rule that a checkpoint says it was trained with.
struct Own {
    spec: RouterSpec,
    rule: Box<dyn Router>,
}

impl Router for Own {
    fn route(&self, gate: &GateView<'_>, out: &mut RoutingBuilder) {
        self.rule.route(gate, out);
    }

    fn batch_invariant(&self) -> bool {
        self.rule.batch_invariant()
    }

    fn signals(&self) -> Signals {
        self.rule.signals()
    }

    fn experts_max(&self) -> usize {
        self.rule.experts_max()
    }

    fn describe(&self, shape: &MoeShape) -> String {
        format!("{}, as trained: {}", self.spec, self.rule.describe(shape))
    }
}

/// Builds a checkpoint's own rule: any router but `native`, which is what it defines, within k0 experts and without
/// `weights`, which the checkpoint says by itself.
fn own(spec: &RouterSpec, shape: &MoeShape) -> Result<Box<dyn Router>, SpecError> {
    if spec.name == ENTRY.name {
        return Err(spec.error("is what this is to define; name the rule itself, for example topk:2"));
    }
    let entry = find(spec)?;
    let mut args = SpecArgs::new(spec, entry, None);
    let rule = (entry.parse)(&mut args, shape)?;
    args.finish()?;
    if rule.experts_max() > shape.top_k {
        let problem = format!(
            "can take {} experts per token, but the checkpoint's own number of experts, against which savings are \
             counted, is {}",
            rule.experts_max(),
            shape.top_k
        );
        return Err(spec.error(problem));
    }
    Ok(rule)
}
