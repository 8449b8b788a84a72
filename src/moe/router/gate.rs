//! The gate as routers see it: probabilities and order, computed once per layer for all of them.

use super::{GateInput, Signals, StepTokens};
use crate::types::{MoeShape, TokenId};

/// Softmax of the gate over all experts and its descending order, for every token of the step.
#[derive(Debug, Default)]
pub(super) struct GateTable {
    experts: usize,
    probs_te: Vec<f32>,
    order_te: Vec<u16>,
}

impl GateTable {
    /// From logits `[T, E]`. A NaN logit never wins a place over a number; infinite ones share all
    /// probability. Whatever comes in, probabilities are finite and some are positive.
    pub(super) fn fill(&mut self, logits_te: &[f32], experts: usize) {
        self.experts = experts;
        self.probs_te.clear();
        self.probs_te.extend_from_slice(logits_te);
        self.order_te.clear();
        for probs_e in self.probs_te.chunks_exact_mut(experts) {
            softmax(probs_e);
            let start = self.order_te.len();
            self.order_te.extend(0..experts as u16);
            // Equal probabilities: the lower index first. A total order, so the result is unique.
            self.order_te[start..]
                .sort_unstable_by(|&a, &b| probs_e[b as usize].total_cmp(&probs_e[a as usize]).then(a.cmp(&b)));
        }
    }

    pub(super) fn row(&self, t: usize) -> (&[f32], &[u16]) {
        let span = t * self.experts..(t + 1) * self.experts;
        (&self.probs_te[span.clone()], &self.order_te[span])
    }
}

fn softmax(z_e: &mut [f32]) {
    let max = z_e.iter().copied().filter(|z| !z.is_nan()).fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for z in z_e.iter_mut() {
        *z = match () {
            _ if z.is_nan() => 0.0,
            _ if *z == max => 1.0,
            _ if max.is_infinite() => 0.0,
            _ => (*z - max).exp(),
        };
        sum += *z;
    }
    if sum == 0.0 {
        // Every logit was NaN: nothing is known, so nothing is preferred.
        let equal = 1.0 / z_e.len() as f32;
        z_e.fill(equal);
        return;
    }
    for z in z_e.iter_mut() {
        *z /= sum;
    }
}

/// The gate of one layer for the tokens that one policy routes.
#[derive(Clone, Copy)]
pub struct GateView<'a> {
    /// Index among the model's MoE layers.
    pub layer: usize,
    pub shape: &'a MoeShape,
    pub(super) table: &'a GateTable,
    pub(super) input: GateInput<'a>,
    pub(super) step: &'a StepTokens,
    /// Rows of the step this policy routes.
    pub(super) rows: &'a [u32],
}

/// One token's gate, and the signals that the policy asks for.
pub struct TokenGate<'a> {
    /// Row of the token in the step.
    pub row: usize,
    /// Index among the model's MoE layers.
    pub layer: usize,
    /// Softmax over all experts, `[E]`.
    pub probs_e: &'a [f32],
    /// Experts, most probable first, `[E]`.
    pub order_e: &'a [u16],
    /// Position in its sequence.
    pub position: u32,
    pub token: TokenId,
    /// The gate's input, `[D]`, or nothing.
    pub hidden_d: &'a [f32],
    /// See [`GateInput::gram_ee`].
    pub gram_ee: &'a [f32],
    /// See [`GateInput::attention_entropy_t`]; NaN where it is not known.
    pub attention_entropy: f32,
    /// See [`GateInput::lens_entropy_t`]; NaN where it is not known.
    pub lens_entropy: f32,
    /// See [`StepTokens::surprisal_t`]; NaN where it is not known.
    pub surprisal: f32,
    /// See [`StepTokens::tenant_t`].
    pub tenant: u32,
    /// See [`StepTokens::decodes_t`].
    pub decodes: bool,
}

impl<'a> TokenGate<'a> {
    /// A token of which nothing is known but its gate.
    pub fn of(probs_e: &'a [f32], order_e: &'a [u16]) -> Self {
        TokenGate {
            row: 0,
            layer: 0,
            probs_e,
            order_e,
            position: 0,
            token: 0,
            hidden_d: &[],
            gram_ee: &[],
            attention_entropy: f32::NAN,
            lens_entropy: f32::NAN,
            surprisal: f32::NAN,
            tenant: 0,
            decodes: false,
        }
    }

    /// How many experts have at least probability `floor`.
    pub fn count_at_least(&self, floor: f32) -> usize {
        self.order_e.partition_point(|&e| self.probs_e[e as usize] >= floor)
    }
}

impl GateView<'_> {
    /// What is there of the tokens beside their gate.
    pub fn signals(&self) -> Signals {
        Signals { surprisal: !self.step.surprisal_t.is_empty(), ..self.input.signals() }
    }

    /// The tokens to route.
    pub fn tokens(&self) -> impl Iterator<Item = TokenGate<'_>> {
        // Divided here once, which takes longer than anything else that is done for a token.
        let width = self.input.hidden_td.len() / self.step.token_t.len().max(1);
        self.rows.iter().map(move |&row| self.token(row as usize, width))
    }

    /// The token at `row` of the step, by the width of hidden states.
    #[inline]
    fn token(&self, row: usize, width: usize) -> TokenGate<'_> {
        let (probs_e, order_e) = self.table.row(row);
        let known = |values_t: &[f32]| values_t.get(row).copied().unwrap_or(f32::NAN);
        TokenGate {
            row,
            layer: self.layer,
            probs_e,
            order_e,
            position: self.step.position_t[row],
            token: self.step.token_t[row],
            hidden_d: &self.input.hidden_td[row * width..][..width],
            gram_ee: self.input.gram_ee,
            attention_entropy: known(self.input.attention_entropy_t),
            lens_entropy: known(self.input.lens_entropy_t),
            surprisal: known(&self.step.surprisal_t),
            tenant: self.step.tenant_t.get(row).copied().unwrap_or(0),
            decodes: self.step.decodes_t.get(row).copied().unwrap_or(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_logits_give_finite_probabilities_and_a_total_order() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        for (logits, first) in [
            ([1.0, 3.0, 2.0, 3.0], 1),
            ([nan, 0.0, nan, -1.0], 1),
            ([nan, nan, nan, nan], 0),
            ([0.0, inf, 1.0, inf], 1),
            ([-inf, -inf, -inf, 0.0], 3),
            ([-inf, -inf, nan, -inf], 0),
            ([f32::MAX, f32::MIN, 0.0, 0.0], 0),
        ] {
            let mut table = GateTable::default();
            table.fill(&logits, 4);
            let (probs, order) = table.row(0);
            assert!(probs.iter().all(|p| p.is_finite() && *p >= 0.0), "{logits:?}: {probs:?}");
            assert!((probs.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{logits:?}: {probs:?}");
            assert_eq!(order[0], first, "{logits:?}: {probs:?}");
            let mut sorted = order.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3]);
        }
    }
}
