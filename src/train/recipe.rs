//! A recipe: everything a training run depends on, as TOML. Every field has one meaning and no field is ignored.

use super::data::DataSpec;
use crate::types::{Activation, RouterSpec};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// A resolved recipe: the file with the overrides of one variant applied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the model.
    pub name: String,
    /// Seed of initialisation, order of data and dropout.
    #[serde(default)]
    pub seed: u64,
    pub data: DataSpec,
    pub model: ModelSpec,
    #[serde(default)]
    pub loss: LossSpec,
    pub optim: OptimSpec,
    #[serde(default)]
    pub eval: EvalSpec,
    #[serde(default)]
    pub sample: SampleSpec,
}

/// How positions enter the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Position {
    /// A table that is added to the token embeddings (GPT-2).
    Learned,
    /// Rotations of queries and keys (Su et al., arXiv 2104.09864).
    Rope,
}

/// Normalisation before every block and before the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    LayerNorm,
    RmsNorm,
}

/// The layout a trained model is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Export {
    /// Hugging Face's Mixtral, which transformers loads; asks for rope, rmsnorm, swiglu, no biases, every layer a
    /// mixture and a `topk` router with renormalised weights.
    Mixtral,
    /// The project's own family, which can say all that a recipe can.
    MoeLm,
}

/// `[model]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// D
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    /// Heads of keys and values; without it, `heads`.
    pub kv_heads: Option<usize>,
    /// Longest sequence.
    pub context: usize,
    pub position: Position,
    #[serde(default = "rope_theta")]
    pub rope_theta: f64,
    pub norm: Norm,
    #[serde(default = "norm_eps")]
    pub norm_eps: f64,
    pub activation: Activation,
    /// Biases of projections and experts.
    #[serde(default)]
    pub bias: bool,
    /// Whether the head is the embedding's table.
    #[serde(default = "yes")]
    pub tied: bool,
    #[serde(default)]
    pub dropout: f32,
    /// E; 0 makes every layer dense.
    pub experts: usize,
    /// F, the width of one expert.
    pub expert_width: usize,
    /// Width of layers that are no mixtures; without it, `expert_width`.
    pub dense_width: Option<usize>,
    /// Every n-th layer is a mixture, the last of each n: with 2, layers 1, 3, 5, …
    #[serde(default = "one")]
    pub moe_every: usize,
    /// The router that chooses experts, in training and afterwards; of no meaning where `experts` is 0.
    #[serde(with = "spec")]
    pub router: RouterSpec,
    /// Whether the chosen experts' weights are made to sum to 1. With `topk:1` they would then always be 1, and the gate
    /// would learn nothing from the loss.
    #[serde(default = "yes")]
    pub renormalise: bool,
    /// One gate for all mixtures.
    #[serde(default)]
    pub shared_router: bool,
    /// Rows an expert takes in a batch, as a multiple of its even share; what is over passes by on the residual
    /// (Fedus et al., arXiv 2101.03961). Without it, experts take all that is routed to them.
    pub capacity: Option<f64>,
    #[serde(default = "moe_lm")]
    pub export: Export,
}

/// `[loss]`: weights of what is added to the cross-entropy, each the mean over mixtures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossSpec {
    /// Load balance, `E · Σ f_e P_e` (Fedus et al., arXiv 2101.03961, eq. 4).
    pub balance: f64,
    /// Router z-loss, `mean logsumexp(z)²` (Zoph et al., arXiv 2202.08906, eq. 5).
    pub z_loss: f64,
    /// Penalty on confident gates, `log E − H(p)`: keeps the choice open.
    pub entropy_floor: f64,
    /// Entropy `H(p)` of the gate, so that `dynk` needs fewer experts (Huang et al., arXiv 2403.07652, eq. 6).
    pub dynk_entropy: f64,
}

/// What factors of matrix products are rounded to while training. Weights, activations and sums are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrecisionChoice {
    /// bf16 where the device multiplies it faster (AMX, CUDA), else f32.
    #[default]
    Auto,
    F32,
    Bf16,
}

/// `[optim]`: AdamW (Loshchilov & Hutter, arXiv 1711.05101) with warm-up and cosine decay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimSpec {
    pub steps: u64,
    /// Sequences in a micro-batch.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Micro-batches whose gradients are summed for one step.
    #[serde(default = "one")]
    pub accumulate: usize,
    pub lr: f64,
    /// Where the cosine ends, as a share of `lr`.
    #[serde(default = "tenth")]
    pub lr_min_share: f64,
    #[serde(default)]
    pub warmup_steps: u64,
    /// Of matrices and embeddings; biases and norms have none.
    #[serde(default = "tenth")]
    pub weight_decay: f64,
    #[serde(default = "beta1")]
    pub beta1: f64,
    #[serde(default = "beta2")]
    pub beta2: f64,
    #[serde(default = "adam_eps")]
    pub eps: f64,
    /// Largest norm of all gradients together.
    #[serde(default = "clip")]
    pub clip: f64,
    #[serde(default)]
    pub precision: PrecisionChoice,
}

/// `[eval]`
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSpec {
    /// Steps between evaluations on held-out windows and checkpoints.
    pub every: u64,
    /// Held-out windows of one evaluation in between.
    pub windows: usize,
    /// Held-out windows of the last one; without it, all.
    pub windows_last: Option<usize>,
    /// Evaluations that the interval of perplexity is taken over.
    pub interval_over: usize,
}

impl Default for EvalSpec {
    fn default() -> Self {
        Self { every: 200, windows: 64, windows_last: None, interval_over: 5 }
    }
}

/// `[sample]`: what the model is asked after each evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleSpec {
    pub prompts: Vec<String>,
    pub tokens: usize,
    pub temperature: f32,
    pub top_k: Option<usize>,
}

impl Default for SampleSpec {
    fn default() -> Self {
        Self { prompts: Vec::new(), tokens: 64, temperature: 0.8, top_k: None }
    }
}

fn yes() -> bool {
    true
}
fn one() -> usize {
    1
}
fn rope_theta() -> f64 {
    10_000.0
}
fn norm_eps() -> f64 {
    1e-5
}
fn tenth() -> f64 {
    0.1
}
fn beta1() -> f64 {
    0.9
}
fn beta2() -> f64 {
    0.95
}
fn adam_eps() -> f64 {
    1e-8
}
fn clip() -> f64 {
    1.0
}
fn moe_lm() -> Export {
    Export::MoeLm
}

/// A router as the text that users type.
mod spec {
    use crate::types::RouterSpec;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(spec: &RouterSpec, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(spec)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<RouterSpec, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

/// Why a recipe cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    #[error("recipe {path} cannot be read: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("recipe {path}: {problem}")]
    Parse { path: PathBuf, problem: String },
    #[error("recipe {path}: there is no variant `{asked}`; {known}")]
    Variant { path: PathBuf, asked: String, known: String },
    #[error("recipe field `{field}`: {problem}")]
    Field { field: &'static str, problem: String },
}

/// A recipe file: the recipe and its variants, tables `[variant.NAME]` that override fields.
#[derive(Clone, Debug)]
pub struct RecipeFile {
    path: PathBuf,
    base: Table,
    variants: Vec<(String, Table)>,
}

impl RecipeFile {
    /// Reads a file; variants keep its order.
    ///
    /// # Errors
    /// A file that cannot be read or is no TOML.
    pub fn read(path: &Path) -> Result<Self, RecipeError> {
        let text = std::fs::read_to_string(path).map_err(|source| RecipeError::Read { path: path.into(), source })?;
        let parse = |problem: String| RecipeError::Parse { path: path.into(), problem };
        let mut base: Table = text.parse().map_err(|e: toml::de::Error| parse(e.to_string()))?;
        let mut variants = Vec::new();
        match base.remove("variant") {
            None => {}
            Some(Value::Table(tables)) => {
                for (name, overrides) in tables {
                    match overrides {
                        Value::Table(overrides) => variants.push((name, overrides)),
                        other => return Err(parse(format!("variant.{name} must be a table; got {other}"))),
                    }
                }
            }
            Some(other) => return Err(parse(format!("`variant` must be tables [variant.NAME]; got {other}"))),
        }
        Ok(Self { path: path.into(), base, variants })
    }

    /// Names of the variants, in the file's order.
    pub fn variants(&self) -> impl Iterator<Item = &str> {
        self.variants.iter().map(|(name, _)| name.as_str())
    }

    /// The recipe itself, or one of its variants, checked.
    ///
    /// # Errors
    /// An unknown variant, an unknown field, a value out of range.
    pub fn resolve(&self, variant: Option<&str>) -> Result<Recipe, RecipeError> {
        let mut table = self.base.clone();
        if let Some(asked) = variant {
            let Some((_, overrides)) = self.variants.iter().find(|(name, _)| name == asked) else {
                let names: Vec<&str> = self.variants().collect();
                let known =
                    if names.is_empty() { "it has none".into() } else { format!("it has {}", names.join(", ")) };
                return Err(RecipeError::Variant { path: self.path.clone(), asked: asked.into(), known });
            };
            merge(&mut table, overrides);
        }
        let recipe: Recipe = table.try_into().map_err(|e: toml::de::Error| RecipeError::Parse {
            path: self.path.clone(),
            problem: e.to_string().trim_end().to_string(),
        })?;
        recipe.check()?;
        Ok(recipe)
    }
}

/// Puts what `over` says in the place of what `base` says, table by table.
fn merge(base: &mut Table, over: &Table) {
    for (key, value) in over {
        match (base.get_mut(key), value) {
            (Some(Value::Table(base)), Value::Table(over)) => merge(base, over),
            _ => {
                base.insert(key.clone(), value.clone());
            }
        }
    }
}

impl Recipe {
    /// As TOML, every field written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_else(|e| format!("# the recipe cannot be written as TOML: {e}"))
    }

    /// Checks what types cannot.
    ///
    /// # Errors
    /// The field that is out of range, with the range.
    pub fn check(&self) -> Result<(), RecipeError> {
        let (m, o) = (&self.model, &self.optim);
        let fail = |field, problem: String| Err(RecipeError::Field { field, problem });
        let counts = [
            ("model.hidden", m.hidden, 1 << 16),
            ("model.layers", m.layers, 1 << 10),
            ("model.heads", m.heads, 1 << 10),
            ("model.context", m.context, 1 << 20),
            ("model.expert_width", m.expert_width, 1 << 18),
            ("model.moe_every", m.moe_every, 1 << 10),
            ("optim.batch", o.batch, 1 << 20),
            ("optim.seq", o.seq, m.context.max(1)),
            ("optim.accumulate", o.accumulate, 1 << 16),
            ("eval.windows", self.eval.windows, usize::MAX),
            ("eval.interval_over", self.eval.interval_over, 1 << 16),
        ];
        for (field, value, max) in counts {
            if value == 0 || value > max {
                return fail(field, format!("must be from 1 to {max}; got {value}"));
            }
        }
        if !m.hidden.is_multiple_of(m.heads) || !(m.hidden / m.heads).is_multiple_of(2) {
            let problem = format!("must divide model.hidden = {} into an even head width; got {}", m.hidden, m.heads);
            return fail("model.heads", problem);
        }
        if m.kv_heads() == 0 || !m.heads.is_multiple_of(m.kv_heads()) {
            return fail("model.kv_heads", format!("must divide model.heads = {}; got {}", m.heads, m.kv_heads()));
        }
        if m.experts > 1 << 12 {
            return fail("model.experts", format!("must be at most {}; got {}", 1 << 12, m.experts));
        }
        if o.steps == 0 || self.eval.every == 0 {
            return fail(if o.steps == 0 { "optim.steps" } else { "eval.every" }, "must be at least 1; got 0".into());
        }
        let shares = [
            ("model.dropout", f64::from(m.dropout)),
            ("optim.beta1", o.beta1),
            ("optim.beta2", o.beta2),
            ("optim.weight_decay", o.weight_decay),
        ];
        for (field, value) in shares {
            if !(0.0..1.0).contains(&value) {
                return fail(field, format!("must be in [0, 1); got {value}"));
            }
        }
        let positive = [
            ("optim.lr", o.lr),
            ("optim.eps", o.eps),
            ("optim.clip", o.clip),
            ("model.norm_eps", m.norm_eps),
            ("model.rope_theta", m.rope_theta),
            ("model.capacity", m.capacity.unwrap_or(1.0)),
        ];
        for (field, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return fail(field, format!("must be a number above 0; got {value}"));
            }
        }
        if !(0.0..=1.0).contains(&o.lr_min_share) {
            return fail("optim.lr_min_share", format!("must be in [0, 1]; got {}", o.lr_min_share));
        }
        self.check_export()
    }

    /// Mixtral's layout has no place for what Mixtral does not do.
    fn check_export(&self) -> Result<(), RecipeError> {
        let m = &self.model;
        if m.export != Export::Mixtral {
            return Ok(());
        }
        let wanted = [
            ("position = \"rope\"", m.position == Position::Rope),
            ("norm = \"rmsnorm\"", m.norm == Norm::RmsNorm),
            ("activation = \"swiglu\"", m.activation == Activation::Swiglu),
            ("bias = false", !m.bias),
            ("moe_every = 1", m.moe_every == 1),
            ("experts of at least 1", m.experts > 0),
            ("shared_router = false", !m.shared_router),
            ("renormalise = true", m.renormalise),
            ("router = \"topk:K\"", m.router.name == "topk" && m.router.options.is_empty()),
        ];
        match wanted.iter().find(|(_, holds)| !holds) {
            None => Ok(()),
            Some((what, _)) => Err(RecipeError::Field {
                field: "model.export",
                problem: format!("`mixtral` asks for {what}; change that or write export = \"moe_lm\""),
            }),
        }
    }
}

impl ModelSpec {
    pub fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    pub fn dense_width(&self) -> usize {
        self.dense_width.unwrap_or(self.expert_width)
    }

    /// Whether layer `i` is a mixture.
    pub fn is_moe(&self, i: usize) -> bool {
        self.experts > 0 && (i + 1).is_multiple_of(self.moe_every)
    }

    /// Indices of the layers that are mixtures.
    pub fn moe_layers(&self) -> Vec<usize> {
        (0..self.layers).filter(|&i| self.is_moe(i)).collect()
    }
}
