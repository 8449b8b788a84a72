//! The model that is trained: the decoder of the in-repo families over differentiable operations, routed by the same
//! routers that serve.
//!
//! Legend: B sequences of S tokens, T = B·S, D model width, E experts, F expert width, V vocabulary, R routed rows.

use super::recipe::{ModelSpec, Norm, Position};
use crate::moe::loss::AuxLosses;
use crate::moe::router::{GateInput, Signals, StepTokens};
use crate::moe::{Policy, RouteCtx, Routing, StepTrace};
use crate::ops::grad::{self, AttentionShape, Precision, RopeTable};
use crate::types::{Activation, MoeShape, RouterSpec, SpecError};
use candle_core::{Device, Result, Tensor, Var};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::sync::Arc;

/// A parameter and how the optimiser treats it.
#[derive(Debug)]
pub struct Param {
    /// Its name in checkpoints of a run.
    pub name: String,
    pub var: Var,
    /// Whether weight decay applies: to matrices and embeddings, not to biases and norms.
    pub decays: bool,
}

/// A decoder in training.
pub struct MoeLm {
    pub spec: ModelSpec,
    pub vocab: usize,
    pub precision: Precision,
    params: Vec<Param>,
    embedding: Tensor,
    positions: Option<Tensor>,
    layers: Vec<Layer>,
    norm: NormParams,
    head: Tensor,
    rope: Option<Arc<RopeTable>>,
    moe: MoeShape,
    policies: [Arc<Policy>; 1],
    device: Device,
}

struct Layer {
    attention_norm: NormParams,
    qkv: Projection,
    o: Projection,
    ffn_norm: NormParams,
    /// The gate of a mixture, `[E, D]`; none where the layer is dense.
    gate: Option<Tensor>,
    /// `[F', D]`, or `[E, F', D]` in a mixture; F' is 2F with SwiGLU: gate rows, then up rows.
    up: Projection,
    /// `[D, F]`, or `[E, D, F]`.
    down: Projection,
}

struct NormParams {
    weight: Tensor,
    bias: Option<Tensor>,
}

struct Projection {
    weight: Tensor,
    bias: Option<Tensor>,
}

/// Whether a pass is for training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// With dropout drawn from this seed, capacity, and gradients.
    Train { dropout_seed: u64 },
    /// As the model will be served: no dropout, no capacity.
    Eval,
}

/// What a forward pass gave.
pub struct Forward {
    /// Final hidden states, normalised, `[T, D]`.
    pub hidden: Tensor,
    /// Auxiliary losses per mixture.
    pub aux_l: Vec<AuxLosses>,
    /// Routing per mixture, before capacity.
    pub routing_l: Vec<Arc<Routing>>,
    pub trace: StepTrace,
    /// Rows that capacity dropped.
    pub rows_dropped: usize,
}

/// Standard deviation of initial weights, as GPT-2.
const INIT_STD: f32 = 0.02;

/// What the mixtures of a recipe are, for routers and costs. A model with no static k of its own (`dynk`, `ratio`, …)
/// has k0 = E.
pub fn moe_shape(spec: &ModelSpec) -> MoeShape {
    let static_k = match spec.router.name.as_str() {
        "topk" | "uniform" => spec.router.args.first().and_then(|k| k.parse().ok()),
        _ => None,
    };
    MoeShape {
        experts: spec.experts.max(1),
        top_k: static_k.unwrap_or(spec.experts).clamp(1, spec.experts.max(1)),
        expert_width: spec.expert_width,
        shared_width: None,
        renormalise: spec.renormalise,
        layers: spec.moe_layers().len(),
        router: None,
    }
}

/// Makes parameters; every one is drawn from a generator of its own name, so that adding one changes no other.
struct Init<'a> {
    params: Vec<Param>,
    seed: u64,
    device: &'a Device,
}

impl Init<'_> {
    /// Normally distributed with standard deviation `std`, or constant `value` where that is 0.
    fn param(&mut self, name: String, shape: &[usize], value: f32, std: f32, decays: bool) -> Result<Tensor> {
        let count = shape.iter().product();
        let values = if std == 0.0 { vec![value; count] } else { normal(&name, self.seed, count, std) };
        let var = Var::from_vec(values, shape, self.device)?;
        let tensor = var.as_tensor().clone();
        self.params.push(Param { name, var, decays });
        Ok(tensor)
    }

    fn matrix(&mut self, name: String, shape: &[usize], std: f32) -> Result<Tensor> {
        self.param(name, shape, 0.0, std, true)
    }

    fn norm(&mut self, name: &str, spec: &ModelSpec) -> Result<NormParams> {
        let weight = self.param(format!("{name}.weight"), &[spec.hidden], 1.0, 0.0, false)?;
        let bias = match spec.norm {
            Norm::LayerNorm => Some(self.param(format!("{name}.bias"), &[spec.hidden], 0.0, 0.0, false)?),
            Norm::RmsNorm => None,
        };
        Ok(NormParams { weight, bias })
    }

    /// `shape` is `[O, I]` or `[E, O, I]`; the bias has it without the last.
    fn projection(&mut self, name: &str, shape: &[usize], std: f32, bias: bool) -> Result<Projection> {
        let weight = self.matrix(format!("{name}.weight"), shape, std)?;
        let bias = match bias {
            true => Some(self.param(format!("{name}.bias"), &shape[..shape.len() - 1], 0.0, 0.0, false)?),
            false => None,
        };
        Ok(Projection { weight, bias })
    }
}

/// Box–Muller from a generator keyed by seed and name.
fn normal(name: &str, seed: u64, count: usize, std: f32) -> Vec<f32> {
    // FNV-1a of the name.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut rng = ChaCha12Rng::seed_from_u64(hash ^ seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let mut unit = || ((rng.next_u32() >> 8) as f32 + 0.5) / (1 << 24) as f32;
    let pair = |_| {
        let (radius, angle) = ((-2.0 * unit().ln()).sqrt() * std, std::f32::consts::TAU * unit());
        [radius * angle.cos(), radius * angle.sin()]
    };
    let mut values: Vec<f32> = (0..count.div_ceil(2)).flat_map(pair).collect();
    values.truncate(count);
    values
}

impl MoeLm {
    /// A new model of `spec` with weights drawn from `seed`.
    ///
    /// # Errors
    /// A router that does not suit the model, or a failure of the device.
    pub fn new(
        spec: &ModelSpec,
        vocab: usize,
        seed: u64,
        precision: Precision,
        device: &Device,
    ) -> std::result::Result<Self, BuildError> {
        let moe = moe_shape(spec);
        // A model without mixtures has a router by name only.
        let router = if spec.experts == 0 { &RouterSpec::native() } else { &spec.router };
        let policy = Policy::build(router, &moe)?;
        let given = Signals { hidden: true, gram: true, ..Default::default() };
        if let [name, ..] = policy.signals().missing(given)[..] {
            return Err(spec.router.error(format!("reads {name}, which is not there in training")).into());
        }
        if spec.router.options.iter().any(|(key, _)| key == "weights") {
            let problem =
                "training takes the family's own weights; write `renormalise` in the recipe's [model] instead";
            return Err(spec.router.error(problem).into());
        }
        let mut init = Init { params: Vec::new(), seed, device };
        let d = spec.hidden;
        let embedding = init.matrix("embedding".into(), &[vocab, d], INIT_STD)?;
        let positions = match spec.position {
            Position::Learned => Some(init.matrix("positions".into(), &[spec.context, d], INIT_STD)?),
            Position::Rope => None,
        };
        let shared_gate = match spec.shared_router && moe.layers > 0 {
            true => Some(gate(&mut init, "gate", spec)?),
            false => None,
        };
        let layers =
            (0..spec.layers).map(|i| layer(&mut init, i, spec, shared_gate.as_ref())).collect::<Result<Vec<_>>>()?;
        let norm = init.norm("norm", spec)?;
        let head = match spec.tied {
            true => embedding.clone(),
            false => init.matrix("head".into(), &[vocab, d], INIT_STD)?,
        };
        let rope = match spec.position {
            Position::Rope => Some(Arc::new(RopeTable::new(spec.context, spec.head_dim(), spec.rope_theta))),
            Position::Learned => None,
        };
        Ok(Self {
            spec: spec.clone(),
            vocab,
            precision,
            params: init.params,
            embedding,
            positions,
            layers,
            norm,
            head,
            rope,
            moe,
            policies: [Arc::new(policy)],
            device: device.clone(),
        })
    }

    /// All that is trained, in a fixed order.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The parameter called `name`.
    pub fn param(&self, name: &str) -> Option<&Tensor> {
        self.params.iter().find(|p| p.name == name).map(|p| p.var.as_tensor())
    }

    pub fn moe_shape(&self) -> &MoeShape {
        &self.moe
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The matrix that gives logits, `[V, D]`.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// The gate of layer `i`, `[E, D]`.
    ///
    /// # Errors
    /// A layer that is no mixture.
    pub fn gate(&self, i: usize) -> Result<&Tensor> {
        match self.layers.get(i).and_then(|layer| layer.gate.as_ref()) {
            Some(gate) => Ok(gate),
            None => candle_core::bail!("layer {i} has no gate"),
        }
    }

    /// Elements of all parameters, and of those that a token passes that has `experts_per_token` experts.
    pub fn parameters(&self, experts_per_token: f64) -> (u64, u64) {
        let (mut all, mut active) = (0, 0.0);
        for p in &self.params {
            let count = p.var.elem_count() as u64;
            let routed = p.name.contains(".experts.");
            all += count;
            active += count as f64 * if routed { experts_per_token / self.moe.experts as f64 } else { 1.0 };
        }
        (all, active.round() as u64)
    }

    /// Runs `batch` sequences of `tokens.len() / batch` tokens.
    ///
    /// # Errors
    /// A failure of the device, or a router that breaks an invariant.
    pub fn forward(&self, tokens: &[u32], batch: usize, mode: Mode) -> Result<Forward> {
        let seq = tokens.len() / batch;
        if seq > self.spec.context || seq * batch != tokens.len() {
            candle_core::bail!("{} tokens are no {batch} sequences of at most {}", tokens.len(), self.spec.context);
        }
        let position_t: Vec<u32> = (0..batch).flat_map(|_| 0..seq as u32).collect();
        let policy_t = vec![0; tokens.len()];
        let step = StepTokens { token_t: tokens.to_vec(), policy_t, position_t, ..Default::default() };
        let mut pass = Pass {
            model: self,
            mode,
            site: 0,
            routes: RouteCtx::new(&self.moe, &self.policies, &step),
            out: Forward {
                hidden: self.embedding.clone(),
                aux_l: Vec::new(),
                routing_l: Vec::new(),
                trace: StepTrace::default(),
                rows_dropped: 0,
            },
        };
        let mut x = grad::embed(&self.embedding, tokens)?;
        if let Some(table) = &self.positions {
            x = (x + grad::embed(table, &step.position_t)?)?;
        }
        x = pass.dropout(x)?;
        let shape = AttentionShape {
            batch,
            seq,
            heads: self.spec.heads,
            kv_heads: self.spec.kv_heads(),
            head_dim: self.spec.head_dim(),
        };
        for layer in &self.layers {
            let normed = self.normed(&x, &layer.attention_norm)?;
            let qkv = self.project(&normed, &layer.qkv)?;
            let seen = grad::attention(&qkv, shape, self.rope.as_ref(), self.precision)?;
            x = (x + pass.dropout(self.project(&seen, &layer.o)?)?)?;
            let normed = self.normed(&x, &layer.ffn_norm)?;
            let out = match &layer.gate {
                Some(gate) => pass.mixture(&normed, layer, gate)?,
                None => {
                    let h = grad::activate(&self.project(&normed, &layer.up)?, self.spec.activation)?;
                    self.project(&h, &layer.down)?
                }
            };
            x = (x + pass.dropout(out)?)?;
        }
        let Pass { routes, mut out, .. } = pass;
        out.hidden = self.normed(&x, &self.norm)?;
        out.trace = routes.into_trace();
        Ok(out)
    }

    fn normed(&self, x: &Tensor, norm: &NormParams) -> Result<Tensor> {
        let eps = self.spec.norm_eps as f32;
        match &norm.bias {
            None => grad::rms_norm(x, &norm.weight, eps),
            Some(bias) => grad::layer_norm(x, &norm.weight, bias, eps),
        }
    }

    fn project(&self, x: &Tensor, p: &Projection) -> Result<Tensor> {
        grad::linear(x, &p.weight, p.bias.as_ref(), self.precision)
    }
}

/// Why a model cannot be made of a recipe.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("recipe field `model.router`: {0}")]
    Router(#[from] SpecError),
    #[error(transparent)]
    Device(#[from] candle_core::Error),
}

/// `[E, D]`. A gate whose experts are drawn at random stays 0: all experts weigh the same.
fn gate(init: &mut Init<'_>, name: &str, spec: &ModelSpec) -> Result<Tensor> {
    if spec.router.name == "uniform" {
        return Tensor::zeros((spec.experts, spec.hidden), candle_core::DType::F32, init.device);
    }
    init.matrix(format!("{name}.weight"), &[spec.experts, spec.hidden], INIT_STD)
}

fn layer(init: &mut Init<'_>, i: usize, spec: &ModelSpec, shared_gate: Option<&Tensor>) -> Result<Layer> {
    let (d, hd) = (spec.hidden, spec.head_dim());
    // What is added to the residual 2·layers times is drawn smaller by its root (GPT-2).
    let residual_std = INIT_STD / (2.0 * spec.layers as f32).sqrt();
    let moe = spec.is_moe(i);
    let gate = match (moe, shared_gate) {
        (false, _) => None,
        (true, Some(shared)) => Some(shared.clone()),
        (true, None) => Some(gate(init, &format!("layers.{i}.gate"), spec)?),
    };
    let f = if moe { spec.expert_width } else { spec.dense_width() };
    let wide = if spec.activation == Activation::Swiglu { 2 * f } else { f };
    let (up, down, ffn) = match moe {
        true => (vec![spec.experts, wide, d], vec![spec.experts, d, f], "experts"),
        false => (vec![wide, d], vec![d, f], "mlp"),
    };
    let qkv = (spec.heads + 2 * spec.kv_heads()) * hd;
    let name = |part: &str| format!("layers.{i}.{part}");
    Ok(Layer {
        attention_norm: init.norm(&name("attention_norm"), spec)?,
        qkv: init.projection(&name("qkv"), &[qkv, d], INIT_STD, spec.bias)?,
        o: init.projection(&name("o"), &[d, spec.heads * hd], residual_std, spec.bias)?,
        ffn_norm: init.norm(&name("ffn_norm"), spec)?,
        gate,
        up: init.projection(&name(&format!("{ffn}.up")), &up, INIT_STD, spec.bias)?,
        down: init.projection(&name(&format!("{ffn}.down")), &down, residual_std, spec.bias)?,
    })
}

/// The state of one forward pass.
struct Pass<'a> {
    model: &'a MoeLm,
    mode: Mode,
    /// Counts the places of dropout, so that each has masks of its own.
    site: u64,
    routes: RouteCtx<'a>,
    out: Forward,
}

impl Pass<'_> {
    fn dropout(&mut self, x: Tensor) -> Result<Tensor> {
        self.site += 1;
        match self.mode {
            Mode::Train { dropout_seed } if self.model.spec.dropout > 0.0 => {
                grad::dropout(&x, self.model.spec.dropout, dropout_seed.wrapping_add(self.site << 48))
            }
            _ => Ok(x),
        }
    }

    fn mixture(&mut self, x: &Tensor, layer: &Layer, gate: &Tensor) -> Result<Tensor> {
        let model = self.model;
        // Gates are f32 in every precision: a choice of expert should not hang on rounding.
        let z = grad::linear(x, gate, None, Precision::F32)?;
        let logits_te = crate::ops::to_host(&z)?;
        let index = self.out.routing_l.len();
        let asked = self.routes.signals();
        let input = GateInput {
            hidden_td: &if asked.hidden { crate::ops::to_host(x)? } else { Vec::new() },
            gram_ee: &if asked.gram { crate::ops::to_host(&gate.matmul(&gate.t()?)?)? } else { Vec::new() },
            ..GateInput::logits(&logits_te)
        };
        let chosen = Arc::new(self.routes.route(index, input).map_err(candle_core::Error::wrap)?);
        let mut routing = chosen.clone();
        if let (Mode::Train { .. }, Some(factor)) = (self.mode, model.spec.capacity) {
            let even = chosen.rows() as f64 / model.moe.experts as f64;
            routing = Arc::new(chosen.capped((factor * even).ceil() as usize));
            self.out.rows_dropped += chosen.rows() - routing.rows();
        }
        if self.mode != Mode::Eval {
            self.out.aux_l.push(AuxLosses::of(&z, &chosen)?);
        }
        let weights = grad::route_weights(&z, &chosen, &routing, model.moe.renormalise)?;
        self.out.routing_l.push(chosen);
        let (up, down) = (&layer.up, &layer.down);
        let h = grad::expert_linear(x, &up.weight, up.bias.as_ref(), &routing, true, model.precision)?;
        let h = grad::activate(&h, model.spec.activation)?;
        let y = grad::expert_linear(&h, &down.weight, down.bias.as_ref(), &routing, false, model.precision)?;
        grad::combine(&y, &weights, &routing)
    }
}
