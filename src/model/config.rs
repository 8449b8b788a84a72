//! config.json, field by field: what is missing or out of range is an error that names it. What the families
//! share is read here; the rest in their own files.

use super::LoadError;
use super::rope::RopeConfig;
use crate::types::{Activation, AttentionShape, FfnShape, LayerShape, ModelShape, MoeShape};
use candle_core::DType;
use serde_json::{Map, Value};
use std::collections::HashSet;
use std::ops::RangeInclusive;

/// Fields that say nothing about inference, written by one version of transformers or another.
const IRRELEVANT: &[&str] = &[
    "_name_or_path",
    "_attn_implementation_autoset",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// The fields of one JSON file.
#[derive(Debug)]
pub(super) struct Config {
    file: String,
    fields: Map<String, Value>,
    read: HashSet<&'static str>,
}

impl Config {
    pub(super) fn new(file: impl Into<String>, fields: Map<String, Value>) -> Self {
        Self { file: file.into(), fields, read: HashSet::new() }
    }

    /// All fields, as JSON.
    pub(super) fn text(&self) -> String {
        Value::Object(self.fields.clone()).to_string()
    }

    pub(super) fn error(&self, field: &str, problem: impl ToString) -> LoadError {
        LoadError::Config { file: self.file.clone(), field: field.into(), problem: problem.to_string() }
    }

    /// The field's value, with null as absent.
    pub(super) fn get(&mut self, field: &'static str) -> Option<&Value> {
        self.read.insert(field);
        self.fields.get(field).filter(|v| !v.is_null())
    }

    /// An optional whole number within `range`.
    pub(super) fn opt_int(
        &mut self,
        field: &'static str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, LoadError> {
        let Some(value) = self.get(field).cloned() else { return Ok(None) };
        match value.as_u64().map(|n| n as usize) {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => {
                let (low, high) = range.into_inner();
                Err(self.error(field, format!("must be a whole number from {low} to {high}; got {value}")))
            }
        }
    }

    /// A whole number within `range`.
    pub(super) fn int(&mut self, field: &'static str, range: RangeInclusive<usize>) -> Result<usize, LoadError> {
        self.opt_int(field, range)?.ok_or_else(|| self.error(field, "is missing"))
    }

    /// An optional finite number above zero.
    pub(super) fn opt_positive(&mut self, field: &'static str) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.get(field).cloned() else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(Some(x)),
            _ => Err(self.error(field, format!("must be a number above 0; got {value}"))),
        }
    }

    /// A finite number above zero.
    pub(super) fn positive(&mut self, field: &'static str) -> Result<f64, LoadError> {
        self.opt_positive(field)?.ok_or_else(|| self.error(field, "is missing"))
    }

    /// An optional truth value.
    pub(super) fn opt_bool(&mut self, field: &'static str) -> Result<Option<bool>, LoadError> {
        match self.get(field).cloned() {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(b)),
            Some(value) => Err(self.error(field, format!("must be true or false; got {value}"))),
        }
    }

    /// A truth value.
    pub(super) fn bool(&mut self, field: &'static str) -> Result<bool, LoadError> {
        self.opt_bool(field)?.ok_or_else(|| self.error(field, "is missing"))
    }

    /// One of `names`.
    pub(super) fn one_of<T: Copy>(&mut self, field: &'static str, names: &[(&str, T)]) -> Result<T, LoadError> {
        let value = self.get(field).cloned().ok_or_else(|| self.error(field, "is missing"))?;
        let found = names.iter().find(|(name, _)| value == *name);
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let names: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
            self.error(field, format!("must be one of {}; got {value}", names.join(", ")))
        })
    }

    /// Refuses a field that is set to something this server does not do.
    pub(super) fn only(&mut self, field: &'static str, supported: &Value) -> Result<(), LoadError> {
        match self.get(field).cloned() {
            Some(value) if value != *supported => {
                Err(self.error(field, format!("{value} is not supported; only {supported} is")))
            }
            _ => Ok(()),
        }
    }

    /// Token ids of `eos_token_id`: absent, one, or a list.
    pub(super) fn eos_token_ids(&mut self) -> Result<Vec<u32>, LoadError> {
        let Some(value) = self.get("eos_token_id").cloned() else { return Ok(Vec::new()) };
        let list = match &value {
            Value::Array(list) => list.clone(),
            one => vec![one.clone()],
        };
        let ids: Option<Vec<u32>> = list.iter().map(|id| id.as_u64()?.try_into().ok()).collect();
        ids.ok_or_else(|| self.error("eos_token_id", format!("must be a token id or a list of them; got {value}")))
    }

    /// Fields no one has asked for and that are not known to be irrelevant: perhaps a variant we do not know.
    pub(super) fn unread(&self) -> Vec<&str> {
        let known = |f: &str| self.read.contains(f) || IRRELEVANT.contains(&f);
        self.fields.iter().filter(|(f, v)| !known(f) && !v.is_null()).map(|(f, _)| f.as_str()).collect()
    }
}

/// What every family has.
#[derive(Clone, Debug)]
pub(super) struct Base {
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub attention: AttentionShape,
    pub activation: Activation,
    pub norm: NormKind,
    pub eps: f64,
    pub max_positions: usize,
    pub tied: bool,
    pub position: PositionKind,
}

/// Which norm a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NormKind {
    Rms,
    Layer,
}

/// How a model's tokens know where they stand.
#[derive(Clone, Debug)]
pub(super) enum PositionKind {
    /// An embedding for each position.
    Learned,
    Rope(RopeConfig),
}

/// Bounds that keep a lying config.json from asking for absurd allocations before a tensor contradicts it.
const WIDTH_MAX: usize = 1 << 20;
const LAYERS_MAX: usize = 1 << 12;
pub(super) const EXPERTS_MAX: usize = 1 << 14;

/// Positions the model is defined for.
pub(super) fn max_positions(config: &mut Config) -> Result<usize, LoadError> {
    config.int("max_position_embeddings", 1..=1 << 27)
}

/// A width of the model.
pub(super) fn width(config: &mut Config, field: &'static str) -> Result<usize, LoadError> {
    config.int(field, 1..=WIDTH_MAX)
}

/// Tokens of the vocabulary.
pub(super) fn vocab(config: &mut Config) -> Result<usize, LoadError> {
    config.int("vocab_size", 1..=1 << 24)
}

/// Layers of the model.
pub(super) fn layers(config: &mut Config) -> Result<usize, LoadError> {
    config.int("num_hidden_layers", 1..=LAYERS_MAX)
}

/// Keeps the first `count` layers, in every field that tells of each of them.
pub(super) fn cut_layers(config: &mut Config, count: usize) -> Result<(), LoadError> {
    let layers = layers(config)?;
    if count == 0 || count > layers {
        return Err(LoadError::Layers { asked: count, layers });
    }
    config.fields.insert("num_hidden_layers".into(), count.into());
    if let Some(Value::Array(types)) = config.fields.get_mut("layer_types") {
        types.truncate(count);
    }
    if let Some(Value::Array(numbers)) = config.fields.get_mut("moe_layers") {
        numbers.retain(|number| number.as_u64().is_none_or(|number| number < count as u64));
    }
    Ok(())
}

/// What the file says its weights are stored in; bf16, which new checkpoints are, where it says nothing.
pub(super) fn stored_dtype(config: &mut Config) -> Result<DType, LoadError> {
    let field = if config.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
    match config.get(field).cloned().as_ref().map(|value| value.as_str()) {
        None | Some(Some("bfloat16")) => Ok(DType::BF16),
        Some(Some("float16")) => Ok(DType::F16),
        Some(Some("float32")) => Ok(DType::F32),
        Some(_) => Err(config.error(field, "must be bfloat16, float16 or float32")),
    }
}

/// Experts per layer, under whichever of its names the file has.
pub(super) fn experts(config: &mut Config, names: [&'static str; 2]) -> Result<usize, LoadError> {
    let first = config.opt_int(names[0], 1..=EXPERTS_MAX)?;
    let second = config.opt_int(names[1], 1..=EXPERTS_MAX)?;
    match (first, second) {
        (Some(a), Some(b)) if a != b => Err(config.error(names[0], format!("is {a}, but `{}` is {b}", names[1]))),
        (Some(n), _) | (_, Some(n)) => Ok(n),
        _ => Err(config.error(names[0], "is missing")),
    }
}

/// Refuses quantised checkpoints.
pub(super) fn not_quantised(config: &mut Config) -> Result<(), LoadError> {
    let Some(value) = config.get("quantization_config").cloned() else { return Ok(()) };
    let method = value.get("quant_method").cloned().unwrap_or(value);
    Err(config
        .error("quantization_config", format!("quantised checkpoints ({method}) are not supported; use the BF16 one")))
}

/// Heads of a model of width `hidden`. `kv_heads` may be absent only where the family's own default says what it is
/// then.
pub(super) fn attention(
    config: &mut Config,
    hidden: usize,
    kv_heads_default_to_heads: bool,
) -> Result<AttentionShape, LoadError> {
    let heads = config.int("num_attention_heads", 1..=1 << 12)?;
    let kv_heads = match config.opt_int("num_key_value_heads", 1..=heads)? {
        Some(n) => n,
        None if kv_heads_default_to_heads => heads,
        None => return Err(config.error("num_key_value_heads", "is missing")),
    };
    if heads % kv_heads != 0 {
        return Err(
            config.error("num_key_value_heads", format!("{kv_heads} does not divide the {heads} attention heads"))
        );
    }
    let head_dim = match config.opt_int("head_dim", 1..=1 << 12)? {
        Some(n) => n,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(config.error(
                "hidden_size",
                format!("{hidden} is no multiple of the {heads} attention heads, and `head_dim` is absent"),
            ));
        }
    };
    if head_dim % 2 != 0 {
        return Err(config.error("head_dim", format!("must be even; got {head_dim}")));
    }
    Ok(AttentionShape { heads, kv_heads, head_dim })
}

impl Base {
    /// Of a family of transformers. `kv_heads` may be absent only where its own default says what it is then.
    pub(super) fn read(config: &mut Config, kv_heads_default_to_heads: bool) -> Result<Self, LoadError> {
        config.only("hidden_act", &Value::from("silu"))?;
        not_quantised(config)?;
        let hidden = width(config, "hidden_size")?;
        let attention = attention(config, hidden, kv_heads_default_to_heads)?;
        let max_positions = max_positions(config)?;
        Ok(Self {
            vocab: vocab(config)?,
            hidden,
            layers: layers(config)?,
            attention,
            activation: Activation::Swiglu,
            norm: NormKind::Rms,
            eps: config.positive("rms_norm_eps")?,
            max_positions,
            tied: config.bool("tie_word_embeddings")?,
            position: PositionKind::Rope(RopeConfig::read(config, attention.head_dim, max_positions)?),
        })
    }

    /// The model's shape, once the family has said what its layers are.
    pub(super) fn shape(&self, layers: Vec<LayerShape>, moe: MoeShape) -> ModelShape {
        let count = layers.iter().filter(|l| l.ffn == FfnShape::Moe).count();
        ModelShape {
            hidden: self.hidden,
            vocab: self.vocab,
            max_positions: self.max_positions,
            attention: self.attention,
            layers,
            activation: self.activation,
            moe: MoeShape { layers: count, ..moe },
            parameters: 0,
        }
    }
}
