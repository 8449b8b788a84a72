//! Native routing of the calibration text, seen from inside.

use crate::model::{CausalLm, StepInput};
use crate::moe::router::{ESTIMATORS, Estimator, GateView, Probe, Rule, StepTokens, TokenGate};
use crate::moe::{MoeLayer, Policy, RouteCtx, RoutingBuilder};
use crate::ops::{KvCache, KvShape, Segment, StepLayout, on_pool, to_host};
use crate::types::{BlockId, RouterSpec, TokenId};
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// What was seen of one layer: of each token a few numbers, of the rest sums.
#[derive(Clone, Debug, Default)]
pub struct LayerTrace {
    pub top_k: usize,
    /// The k0 most probable experts, most probable first, `[T, k0]`.
    pub order_tk: Vec<u16>,
    /// Their probabilities, `[T, k0]`.
    pub probs_tk: Vec<f32>,
    /// Measures of the estimators of [`Trace::estimators`], `[T]` each; NaN where there is none.
    pub measures: Vec<Vec<f32>>,
    /// Σ‖y_e‖ over the tokens that were routed to e, and how many these were, `[E]`.
    pub norms_e: Vec<(f64, u64)>,
    /// Σ⟨y_k0, y_k⟩ and Σ‖y_k‖² for k = 1..=k0.
    pub products_k: Vec<(f64, f64)>,
}

/// What was seen of all.
#[derive(Debug)]
pub struct Trace {
    pub layers: Vec<LayerTrace>,
    /// Names of the estimators that were measured.
    pub estimators: Vec<&'static str>,
    /// Tokens of a window.
    pub window: usize,
    /// −log p of the token that follows, `[T]`; NaN for the last one of a window.
    pub losses_t: Vec<f32>,
}

impl LayerTrace {
    /// T.
    pub fn tokens(&self) -> usize {
        self.order_tk.len() / self.top_k
    }

    /// E‖y_e‖, `[E]`; of an expert that no token was routed to, the mean of the others.
    pub fn expert_norms(&self) -> Vec<f32> {
        let known = |(sum, count): &(f64, u64)| (*count > 0).then(|| sum / *count as f64);
        let seen: Vec<f64> = self.norms_e.iter().filter_map(known).collect();
        let mean = seen.iter().sum::<f64>() / seen.len().max(1) as f64;
        self.norms_e.iter().map(|norms| known(norms).unwrap_or(mean) as f32).collect()
    }

    /// The experts that `rule` gives token `t`.
    pub fn choose(&self, t: usize, rule: &Rule, norms_e: &[f32]) -> Vec<u16> {
        let span = t * self.top_k..(t + 1) * self.top_k;
        // Rules look at the k0 most probable experts alone, so these can be all there are, numbered by their rank.
        let order_k = &self.order_tk[span.clone()];
        let ranks: Vec<u16> = (0..self.top_k as u16).collect();
        let norms_k: Vec<f32> = order_k.iter().map(|e| norms_e[*e as usize]).collect();
        let chosen = rule.choose(&TokenGate::of(&self.probs_tk[span], &ranks), self.top_k, &norms_k);
        chosen.into_iter().map(|rank| order_k[rank as usize]).collect()
    }

    /// How many tokens `rule` gives to each expert, `[E]`.
    pub fn used(&self, rule: &Rule, norms_e: &[f32]) -> Vec<u64> {
        let mut used_e = vec![0; norms_e.len()];
        for t in 0..self.tokens() {
            self.choose(t, rule, norms_e).iter().for_each(|e| used_e[*e as usize] += 1);
        }
        used_e
    }
}

impl Trace {
    /// Runs `windows`, all of one length, through `model` with native routing. `on_window` is told of each one.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn take(model: &CausalLm, windows: &[Vec<TokenId>], mut on_window: impl FnMut()) -> Result<Self> {
        let shape = model.shape();
        let native = Policy::build(&RouterSpec::native(), &shape.moe).map_err(candle_core::Error::wrap)?;
        let policies = [Arc::new(native)];
        let window = windows.first().map_or(0, Vec::len);
        let mut passes = Passes::new(model, window)?;
        let mut watch = Watch::new(shape.moe.layers, shape.moe.experts, shape.moe.top_k);
        let mut losses_t = Vec::new();
        for tokens in windows {
            let surprisal_t = on_pool(|| passes.run(tokens, &policies, &mut watch))?;
            watch.surprisals(tokens, &surprisal_t);
            losses_t.extend_from_slice(&surprisal_t[1..]);
            losses_t.push(f32::NAN);
            on_window();
        }
        let estimators = watch.estimators.iter().map(|(name, _)| *name).collect();
        Ok(Self { layers: watch.layers, estimators, window, losses_t })
    }
}

/// Forward passes over single windows.
struct Passes<'a> {
    model: &'a CausalLm,
    kv: KvCache,
    blocks: Vec<BlockId>,
}

/// Positions per KV block.
const BLOCK_SIZE: usize = 16;
/// Rows whose logits are on the host at the same time.
const ROWS: usize = 64;

impl<'a> Passes<'a> {
    fn new(model: &'a CausalLm, window: usize) -> Result<Self> {
        let (shape, blocks) = (model.shape(), window.div_ceil(BLOCK_SIZE));
        let kv_shape = KvShape {
            layers: shape.layers.len(),
            blocks,
            block_size: BLOCK_SIZE,
            kv_heads: shape.attention.kv_heads,
            head_dim: shape.attention.head_dim,
        };
        let kv = KvCache::new(kv_shape, model.backend())?;
        Ok(Self { model, kv, blocks: (0..blocks as u32).map(BlockId).collect() })
    }

    /// Runs `tokens` from an empty context and gives −log p of each after those before it, NaN for the first.
    fn run(&mut self, tokens: &[TokenId], policies: &[Arc<Policy>], watch: &mut Watch) -> Result<Vec<f32>> {
        let step = StepTokens {
            token_t: tokens.to_vec(),
            position_t: (0..tokens.len() as u32).collect(),
            policy_t: vec![0; tokens.len()],
            ..Default::default()
        };
        let segment = Segment { start: 0, len: tokens.len(), blocks: self.blocks.clone() };
        let layout = StepLayout::new(vec![segment], &self.kv, self.model.backend())?;
        let rows: Vec<u32> = (0..tokens.len() as u32 - 1).collect();
        let input = StepInput { tokens, layout: &layout, logit_rows: &rows };
        let mut routes = RouteCtx::new(&self.model.shape().moe, policies, &step).probed(watch);
        let Some(hidden) = self.model.forward(&input, &mut self.kv, &mut routes)? else {
            candle_core::bail!("a window of {} tokens has nothing to predict", tokens.len());
        };
        let mut surprisal_t = vec![f32::NAN];
        for start in (0..rows.len()).step_by(ROWS) {
            let len = ROWS.min(rows.len() - start);
            let logits = to_host(&self.model.logits(&hidden, start, len)?)?;
            let next = tokens[start + 1..].iter();
            surprisal_t
                .extend(logits.chunks_exact(self.model.shape().vocab).zip(next).map(|(z, id)| surprisal(z, *id)));
        }
        Ok(surprisal_t)
    }
}

/// −log softmax(z)[id].
fn surprisal(z: &[f32], id: TokenId) -> f32 {
    let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = z.iter().map(|z| f64::from(z - max).exp()).sum();
    (sum.ln() - f64::from(z[id as usize] - max)) as f32
}

type Named = (&'static str, Box<dyn Estimator>);

/// What looks on.
struct Watch {
    layers: Vec<LayerTrace>,
    estimators: Vec<Named>,
}

impl Watch {
    fn new(layers: usize, experts: usize, top_k: usize) -> Self {
        let calibrated = ESTIMATORS.iter().filter(|entry| entry.calibrates);
        // Those that need an argument have no measure of their own.
        let estimators: Vec<Named> = calibrated.filter_map(|entry| Some((entry.name, entry.build().ok()?))).collect();
        let layer = LayerTrace {
            top_k,
            measures: vec![Vec::new(); estimators.len()],
            norms_e: vec![(0.0, 0); experts],
            products_k: vec![(0.0, 0.0); top_k],
            ..Default::default()
        };
        Self { layers: vec![layer; layers], estimators }
    }

    /// Fills in the measures that are known once a window has passed the whole model.
    fn surprisals(&mut self, tokens: &[TokenId], surprisal_t: &[f32]) {
        for (i, (_, estimator)) in self.estimators.iter().enumerate().filter(|(_, e)| e.1.signals().surprisal) {
            for layer in &mut self.layers {
                let measures_t = &mut layer.measures[i];
                let first = measures_t.len() - tokens.len();
                for (position, surprisal) in surprisal_t.iter().enumerate().skip(1) {
                    let (position, surprisal) = (position as u32, *surprisal);
                    let token = TokenGate { position, surprisal, ..TokenGate::of(&[], &[]) };
                    measures_t[first + position as usize] = estimator.measure(&token);
                }
            }
        }
    }
}

impl Probe for Watch {
    fn visit(&mut self, layer: &MoeLayer, x: &Tensor, gate: &GateView<'_>) -> Result<()> {
        let seen = &mut self.layers[gate.layer];
        let top_k = seen.top_k;
        let mut first = seen.order_tk.len();
        for token in gate.tokens() {
            let order_k = &token.order_e[..top_k];
            seen.order_tk.extend(order_k);
            seen.probs_tk.extend(order_k.iter().map(|e| token.probs_e[*e as usize]));
            for ((_, estimator), measures_t) in self.estimators.iter().zip(&mut seen.measures) {
                let there = estimator.signals().missing(gate.signals()).is_empty();
                measures_t.push(if there { estimator.measure(&token) } else { f32::NAN });
            }
        }
        let tokens = (seen.order_tk.len() - first) / top_k;
        // What each rank's expert makes of every token, unweighted.
        let mut outputs_k = Vec::with_capacity(top_k);
        for rank in 0..top_k {
            let mut builder = RoutingBuilder::new(tokens, gate.shape.experts);
            for t in 0..tokens {
                builder.choose(t, &[seen.order_tk[first + t * top_k + rank]]);
                builder.weigh(t).iter_mut().for_each(|(_, weight)| *weight = 1.0);
            }
            let routing = builder.finish(tokens).map_err(candle_core::Error::wrap)?;
            outputs_k.push(to_host(&layer.experts.forward(x, &routing)?)?);
        }
        let width = outputs_k[0].len() / tokens;
        for t in 0..tokens {
            let y_k: Vec<&[f32]> = outputs_k.iter().map(|y_td| &y_td[t * width..(t + 1) * width]).collect();
            let span = first..first + top_k;
            for (e, y) in seen.order_tk[span.clone()].iter().zip(&y_k) {
                let (sum, count) = &mut seen.norms_e[*e as usize];
                *sum += dot(y, y).sqrt();
                *count += 1;
            }
            add_products(&y_k, &seen.probs_tk[span], gate.shape.renormalise, &mut seen.products_k);
            first += top_k;
        }
        Ok(())
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Adds one token's ⟨y_k0, y_k⟩ and ‖y_k‖² for all k, where y_k is the weighted sum over the first k of `outputs_k`.
fn add_products(outputs_k: &[&[f32]], probs_k: &[f32], renormalise: bool, products_k: &mut [(f64, f64)]) {
    let width = outputs_k[0].len();
    let add = |sum: &mut Vec<f32>, rank: usize| {
        sum.iter_mut().zip(outputs_k[rank]).for_each(|(sum, y)| *sum += probs_k[rank] * y);
    };
    let scale = |k: usize| {
        let mass: f64 = probs_k[..k].iter().map(|p| f64::from(*p)).sum();
        // Where all underflow, nothing is known.
        if renormalise && mass > 0.0 { 1.0 / mass } else { 1.0 }
    };
    let top_k = outputs_k.len();
    let mut whole = vec![0.0; width];
    (0..top_k).for_each(|rank| add(&mut whole, rank));
    let mut part = vec![0.0; width];
    for k in 1..=top_k {
        add(&mut part, k - 1);
        products_k[k - 1].0 += dot(&whole, &part) * scale(top_k) * scale(k);
        products_k[k - 1].1 += dot(&part, &part) * scale(k) * scale(k);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_the_weighted_sums() {
        let mut products = vec![(0.0, 0.0); 2];
        // y_2 = (0.6, 0.2) / 0.8 · outputs = (0.75·2, 0.25·4) = (1.5, 1.0); y_1 = (2, 0).
        add_products(&[&[2.0, 0.0], &[0.0, 4.0]], &[0.6, 0.2], true, &mut products);
        let close = |got: (f64, f64), want: (f64, f64)| {
            assert!((got.0 - want.0).abs() < 1e-6 && (got.1 - want.1).abs() < 1e-6, "{got:?} is not {want:?}");
        };
        close(products[0], (3.0, 4.0));
        close(products[1], (3.25, 3.25));
        let mut raw = vec![(0.0, 0.0); 2];
        add_products(&[&[2.0, 0.0], &[0.0, 4.0]], &[0.6, 0.2], false, &mut raw);
        close(raw[0], (1.44, 1.44));
        close(raw[1], (1.44 + 0.64, 1.44 + 0.64));
    }

    #[test]
    fn an_expert_that_was_never_chosen_gets_the_mean() {
        let layer = LayerTrace { norms_e: vec![(6.0, 3), (0.0, 0), (4.0, 1)], ..Default::default() };
        assert_eq!(layer.expert_norms(), [2.0, 3.0, 4.0]);
    }

    #[test]
    fn surprisal_is_the_negative_log_softmax() {
        let want = (1.0f64 + 2.0f64.exp()).ln() - 2.0;
        assert!((f64::from(surprisal(&[0.0, 2.0], 1)) - want).abs() < 1e-6);
    }
}
