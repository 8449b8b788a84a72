//! What a server that keeps a budget has decided.

use super::RouterSpec;

/// The policy that a budget gives to requests, in one version.
#[derive(Clone, Debug, PartialEq)]
pub struct BudgetState {
    /// Raised with every change of policy. A request keeps the version that it started with.
    pub version: u64,
    pub router: RouterSpec,
    /// Share of native routing's cost that the policy came to in calibration.
    pub share: f64,
    /// Whether it is below what the budget allows, because requests wait.
    pub shed: bool,
}
