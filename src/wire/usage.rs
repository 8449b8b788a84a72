//! What a request used, and what its tokens did.

use crate::types::{BudgetState, RouterSpec, Usage};
use serde::{Deserialize, Serialize};

/// What a request used. `moe` is an addition to OpenAI's shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UsageBody {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
    pub moe: MoeUsage,
}

/// Of the prompt's tokens, those that the prefix cache had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    pub cached_tokens: usize,
}

/// What dynamic routing did: ratios against native routing of the same tokens, below zero when it cost more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoeUsage {
    pub router: String,
    /// Mean over tokens (of prompt and completion, as far as they were computed) and MoE layers.
    pub experts_per_token: f64,
    pub expert_flops_saved: f64,
    pub forward_flops_saved: f64,
    /// Where the server's router keeps a budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetUsage>,
}

/// What a budget decided for the request.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BudgetUsage {
    /// Raised with every change of policy.
    pub version: u64,
    /// Share of native routing's cost that the policy came to in calibration.
    pub share: f64,
    /// Whether it is below the budget, because the server is under load.
    pub shed: bool,
}

impl From<&BudgetState> for BudgetUsage {
    fn from(state: &BudgetState) -> Self {
        Self { version: state.version, share: state.share, shed: state.shed }
    }
}

/// What routes a request.
#[derive(Clone, Debug)]
pub struct Routed {
    pub router: RouterSpec,
    pub budget: Option<BudgetUsage>,
}

impl UsageBody {
    /// For work that was routed so.
    pub fn new(usage: &Usage, routed: &Routed) -> Self {
        let work = &usage.work;
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_tokens },
            moe: MoeUsage {
                router: routed.router.to_string(),
                experts_per_token: work.experts_per_token(),
                expert_flops_saved: work.experts.saved(),
                forward_flops_saved: work.forward.saved(),
                budget: routed.budget,
            },
        }
    }
}

/// Experts used per token and MoE layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoeTrace {
    /// By the passes over the prompt's tokens; null for those that were cached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<Vec<Option<Vec<u16>>>>,
    /// By the passes that drew the completion's tokens, each the pass over the token before.
    pub completion: Vec<Vec<u16>>,
}
