//! Work done, in counts that add up; `moe::cost` makes them.

/// Work of some tokens. Adds up over tokens, steps and requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens that passed the model.
    pub tokens: u64,
    /// (token, MoE layer) pairs.
    pub moe_visits: u64,
    /// (token, MoE layer, expert) triples that ran: Σk.
    pub expert_rows: u64,
    /// Scope `experts`: the routed experts alone.
    pub experts: Flops,
    /// Scope `forward`: all matrix products.
    pub forward: Flops,
}

/// FLOPs that ran, beside those that native routing of the same tokens would have run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flops {
    pub ran: u64,
    pub native: u64,
}

impl Flops {
    /// `1 − ran / native`, below zero when the router cost more; 0 where nothing ran.
    pub fn saved(&self) -> f64 {
        if self.native == 0 {
            return 0.0;
        }
        1.0 - self.ran as f64 / self.native as f64
    }
}

impl Work {
    /// Mean over tokens and MoE layers; 0 where nothing ran.
    pub fn experts_per_token(&self) -> f64 {
        self.expert_rows as f64 / self.moe_visits.max(1) as f64
    }
}

impl std::ops::AddAssign for Flops {
    fn add_assign(&mut self, other: Self) {
        self.ran += other.ran;
        self.native += other.native;
    }
}

impl std::ops::Sub for Flops {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { ran: self.ran - other.ran, native: self.native - other.native }
    }
}

impl std::ops::Sub for Work {
    type Output = Self;

    /// What was added to `other` since.
    fn sub(self, other: Self) -> Self {
        Self {
            tokens: self.tokens - other.tokens,
            moe_visits: self.moe_visits - other.moe_visits,
            expert_rows: self.expert_rows - other.expert_rows,
            experts: self.experts - other.experts,
            forward: self.forward - other.forward,
        }
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.tokens += other.tokens;
        self.moe_visits += other.moe_visits;
        self.expert_rows += other.expert_rows;
        self.experts += other.experts;
        self.forward += other.forward;
    }
}
