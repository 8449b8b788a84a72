//! Budgets: shares of native routing's cost, and what they pay for.

use super::CalibrateError;
use crate::moe::cost::CostModel;
use crate::types::ModelShape;
use std::fmt;
use std::str::FromStr;

/// What a target is a share of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// FLOPs of the routed experts.
    Experts,
    /// FLOPs of all matrix products.
    Forward,
    /// Bytes of the distinct experts that a decode step reads.
    Bytes,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Experts => "experts",
            Self::Forward => "forward",
            Self::Bytes => "bytes",
        })
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "experts" => Ok(Self::Experts),
            "forward" => Ok(Self::Forward),
            other => Err(format!("must be experts or forward; got {other}")),
        }
    }
}

/// A budget: `share` of native routing's cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    pub scope: Scope,
    pub share: f64,
    /// Sequences that decode at the same time, for [`Scope::Bytes`].
    pub batch: Option<usize>,
}

impl Target {
    /// Of the routed experts' FLOPs.
    pub fn experts(share: f64) -> Self {
        Self { scope: Scope::Experts, share, batch: None }
    }

    /// What the flags ask for, if they ask for anything.
    ///
    /// # Errors
    /// A share outside (0, 1], or flags that do not go together.
    pub fn asked(
        flops: Option<f64>,
        bytes: Option<f64>,
        batch: Option<usize>,
        scope: Option<Scope>,
    ) -> Result<Option<Self>, CalibrateError> {
        let refuse = |problem: String| Err(CalibrateError::Asked(problem));
        let target = match (flops, bytes) {
            (Some(_), Some(_)) => {
                return refuse("--target-flops and --target-bytes are two budgets; give one of them".into());
            }
            (Some(share), None) => Self { scope: scope.unwrap_or(Scope::Experts), share, batch: None },
            (None, Some(share)) => Self { scope: Scope::Bytes, share, batch },
            (None, None) if scope.is_some() || batch.is_some() => {
                return refuse(
                    "--scope and --batch-size say what a target means; give --target-flops or --target-bytes too"
                        .into(),
                );
            }
            (None, None) => return Ok(None),
        };
        let flag = target.flag();
        if !(target.share > 0.0 && target.share <= 1.0) {
            return refuse(format!(
                "{flag} must be above 0 and at most 1, a share of native routing's cost; got {}",
                target.share
            ));
        }
        match (target.scope, target.batch, scope, batch) {
            (Scope::Bytes, _, Some(scope), _) => refuse(format!(
                "--scope is for --target-flops, bytes are of experts alone; got --scope {scope} with --target-bytes: leave \
                 it out"
            )),
            (Scope::Bytes, None, ..) => refuse(
                "--target-bytes needs --batch-size, the sequences that decode at the same time (at least 1): how many \
                 experts a step reads depends on it"
                    .into(),
            ),
            (Scope::Bytes, Some(0), ..) => refuse("--batch-size must be at least 1; got 0".into()),
            (Scope::Experts | Scope::Forward, .., Some(batch)) => {
                refuse(format!("--batch-size is for --target-bytes; got --batch-size {batch} with --target-flops"))
            }
            _ => Ok(Some(target)),
        }
    }

    /// The flag that asks for it.
    pub fn flag(&self) -> &'static str {
        if self.scope == Scope::Bytes { "--target-bytes" } else { "--target-flops" }
    }
}

/// What layers may cost together: in experts per token, or in distinct experts per step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Cost of native routing.
    pub native: f64,
    /// Cost of all that routing does not change, in the same unit.
    pub other: f64,
}

impl Budget {
    /// Of experts per token, for scope `experts` or `forward` over windows of `window` tokens.
    pub fn flops(shape: &ModelShape, scope: Scope, window: usize) -> Self {
        let native = (shape.moe.layers * shape.moe.top_k) as f64;
        let cost = CostModel::new(shape);
        let rows = (shape.moe.layers * shape.moe.top_k) as u64;
        // Every position of a window once: attention's cost grows with the context.
        let works = (1..=window as u64).map(|context| cost.token(context, rows, true));
        let (forward, experts) = works.fold((0.0, 0.0), |(forward, experts), work| {
            (forward + work.forward.native as f64, experts + work.experts.native as f64)
        });
        let other = if scope == Scope::Forward { native * (forward / experts - 1.0) } else { 0.0 };
        Self { native, other }
    }

    /// The share of native routing's cost that `cost` is.
    pub fn share(&self, cost: f64) -> f64 {
        (self.other + cost) / (self.other + self.native)
    }

    /// The cost that `share` pays for.
    pub fn cost(&self, share: f64) -> f64 {
        share * (self.other + self.native) - self.other
    }

    /// Checks that `target` pays for the cheapest routing there is.
    ///
    /// # Errors
    /// A target below it.
    pub fn check(&self, target: &Target, cheapest: f64) -> Result<(), CalibrateError> {
        let least = self.share(cheapest);
        if target.share >= least - 1e-9 {
            return Ok(());
        }
        Err(CalibrateError::Asked(format!(
            "{} {} cannot be attained: one expert per token and layer, the least there is, costs a share of {least:.4} \
             (scope {}) of native routing; give at least {:.3}",
            target.flag(),
            target.share,
            target.scope,
            (least * 1000.0).ceil() / 1000.0
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Activation, AttentionShape, FfnShape, LayerShape, MoeShape};

    fn shape() -> ModelShape {
        let layer = LayerShape { sliding_window: None, ffn: FfnShape::Moe };
        ModelShape {
            hidden: 8,
            vocab: 10,
            max_positions: 64,
            attention: AttentionShape { heads: 2, kv_heads: 1, head_dim: 4 },
            layers: vec![layer; 3],
            activation: Activation::Swiglu,
            moe: MoeShape {
                experts: 4,
                top_k: 2,
                expert_width: 16,
                shared_width: None,
                renormalise: true,
                layers: 3,
                router: None,
            },
            parameters: 0,
        }
    }

    #[test]
    fn a_share_of_the_forward_pass_is_what_the_cost_model_counts() {
        let (shape, window) = (shape(), 5);
        let budget = Budget::flops(&shape, Scope::Forward, window);
        let cost = CostModel::new(&shape);
        let counted = |rows: u64| -> u64 { (1..=5).map(|c| cost.token(c, rows, true).forward.ran).sum() };
        let want = counted(4) as f64 / counted(6) as f64;
        assert!((budget.share(4.0) - want).abs() < 1e-12, "{} is not {want}", budget.share(4.0));
        assert!((budget.cost(want) - 4.0).abs() < 1e-9);
        assert_eq!(Budget::flops(&shape, Scope::Experts, window).share(3.0), 0.5);
    }

    #[test]
    fn what_does_not_go_together_or_is_out_of_range_is_refused_by_name() {
        let refused = |flops, bytes, batch, scope| Target::asked(flops, bytes, batch, scope).unwrap_err().to_string();
        for (error, want) in [
            (refused(Some(0.0), None, None, None), "--target-flops must be above 0 and at most 1"),
            (refused(Some(1.5), None, None, None), "got 1.5"),
            (refused(Some(f64::NAN), None, None, None), "got NaN"),
            (refused(None, Some(0.7), None, None), "--batch-size"),
            (refused(None, Some(0.7), Some(0), None), "at least 1; got 0"),
            (refused(None, Some(0.7), Some(8), Some(Scope::Experts)), "--scope experts"),
            (refused(Some(0.7), None, Some(8), None), "--batch-size 8"),
            (refused(Some(0.7), Some(0.7), None, None), "give one of them"),
            (refused(None, None, Some(8), None), "--target-bytes too"),
        ] {
            assert!(error.contains(want), "{want:?} is not in {error}");
        }
        assert!(Target::asked(None, None, None, None).unwrap().is_none());
        let target = Target::asked(Some(0.3), None, None, None).unwrap().unwrap();
        let error = Budget { native: 6.0, other: 0.0 }.check(&target, 3.0).unwrap_err().to_string();
        assert!(error.contains("0.5000") && error.contains("--target-flops 0.3"), "{error}");
    }
}
