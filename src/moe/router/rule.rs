//! [`Rule`]: how one layer of a calibrated policy chooses among a token's k0 most probable experts.

use super::TokenGate;
use serde::{Deserialize, Serialize};

/// Costs at most k0 experts, and always takes one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "signal", rename_all = "lowercase", deny_unknown_fields)]
pub enum Rule {
    /// The k most probable.
    Static { k: usize },
    /// The fewest that gather a share τ of the k0's probability.
    Score { tau: f32 },
    /// The fewest that gather a share τ of the k0's contribution, c_e = p_e·E‖y_e‖, the largest first.
    Contribution { tau: f32 },
    /// Those of at least probability θ.
    Threshold { theta: f32 },
}

impl Rule {
    /// Whether the parameter is in range for a layer of this k0.
    pub fn valid(&self, top_k: usize) -> bool {
        match *self {
            Self::Static { k } => (1..=top_k).contains(&k),
            Self::Score { tau } | Self::Contribution { tau } => (0.0..=1.0).contains(&tau),
            Self::Threshold { theta } => (0.0..=1.0).contains(&theta),
        }
    }

    /// Whether k depends on the token.
    pub fn dynamic(&self) -> bool {
        !matches!(self, Self::Static { .. })
    }

    /// The experts of one token, most probable first. `norms_e` are E‖y_e‖.
    pub fn choose(&self, token: &TokenGate<'_>, top_k: usize, norms_e: &[f32]) -> Vec<u16> {
        let native = &token.order_e[..top_k];
        let p = |e: &u16| f64::from(token.probs_e[*e as usize]);
        match *self {
            Self::Static { k } => native[..k].to_vec(),
            Self::Score { tau } => native[..fewest(tau, native.iter().map(p))].to_vec(),
            Self::Threshold { theta } => native[..token.count_at_least(theta).clamp(1, top_k)].to_vec(),
            Self::Contribution { tau } => {
                let contribution = |rank: &usize| p(&native[*rank]) * f64::from(norms_e[native[*rank] as usize]);
                let mut ranks: Vec<usize> = (0..top_k).collect();
                ranks.sort_by(|a, b| contribution(b).total_cmp(&contribution(a)).then(a.cmp(b)));
                ranks.truncate(fewest(tau, ranks.iter().map(contribution)));
                // Equal sets are listed alike, whatever chose them.
                ranks.sort_unstable();
                ranks.into_iter().map(|rank| native[rank]).collect()
            }
        }
    }
}

/// How many of `shares`, from the front, it takes to gather a share τ of their sum: at least one.
pub(super) fn fewest(tau: f32, shares: impl ExactSizeIterator<Item = f64> + Clone) -> usize {
    // A softmax is positive everywhere, so the whole takes all, also where the last ones are too small to move a
    // floating-point sum.
    let all = shares.len();
    if tau == 1.0 {
        return all;
    }
    let goal = f64::from(tau) * shares.clone().sum::<f64>();
    let mut gathered = 0.0;
    for (rank, share) in shares.enumerate() {
        gathered += share;
        if gathered >= goal {
            return rank + 1;
        }
    }
    all
}
