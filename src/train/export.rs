//! Writes a model in Hugging Face layout: config.json, model.safetensors (bf16), tokenizer.json, generation_config.json.
//! `mixtral` is what transformers loads as MixtralForCausalLM; `moe_lm` is the project's own family.

use super::lm::{MoeLm, moe_shape};
use super::recipe::{Export, Norm, Position};
use crate::types::Activation;
use candle_core::{DType, Result, Tensor};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// What a checkpoint needs besides the model.
pub struct Texts<'a> {
    /// tokenizer.json
    pub tokenizer: &'a str,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
}

/// Why a checkpoint was not written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("{path} cannot be written: {source}")]
    Write { path: std::path::PathBuf, source: std::io::Error },
    #[error(transparent)]
    Device(#[from] candle_core::Error),
}

/// Writes `model` to the folder `dir`, which is made. Weights are stored as `dtype`.
///
/// # Errors
/// A file that cannot be written.
pub fn export(model: &MoeLm, texts: &Texts<'_>, dtype: DType, dir: &Path) -> std::result::Result<(), ExportError> {
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|source| ExportError::Write { path, source })
    };
    std::fs::create_dir_all(dir).map_err(|source| ExportError::Write { path: dir.into(), source })?;
    let tensors = tensors(model, dtype)?;
    let stored = if dtype == DType::BF16 { "bfloat16" } else { "float32" };
    let mut config = match model.spec.export {
        Export::Mixtral => mixtral_config(model),
        Export::MoeLm => moe_lm_config(model),
    };
    let ids = json!({"bos_token_id": texts.bos.or(texts.eos), "eos_token_id": texts.eos, "torch_dtype": stored});
    extend(&mut config, ids);
    write("config.json", &pretty(&config))?;
    write(
        "generation_config.json",
        &pretty(&json!({"bos_token_id": texts.bos.or(texts.eos), "eos_token_id": texts.eos})),
    )?;
    write("tokenizer_config.json", &pretty(&json!({"tokenizer_class": "PreTrainedTokenizerFast"})))?;
    write("tokenizer.json", texts.tokenizer)?;
    // transformers reads no file that does not say what wrote it.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(&tensors, Some(metadata), &dir.join("model.safetensors"))
        .map_err(candle_core::Error::wrap)?;
    Ok(())
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn extend(config: &mut Value, more: Value) {
    if let (Value::Object(config), Value::Object(more)) = (config, more) {
        config.extend(more.into_iter().filter(|(_, v)| !v.is_null()));
    }
}

fn common(model: &MoeLm) -> Value {
    let s = &model.spec;
    json!({
        "vocab_size": model.vocab,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads(),
        "head_dim": s.head_dim(),
        "max_position_embeddings": s.context,
        "tie_word_embeddings": s.tied,
        "intermediate_size": s.expert_width,
        "num_experts_per_tok": moe_shape(s).top_k,
    })
}

fn mixtral_config(model: &MoeLm) -> Value {
    let s = &model.spec;
    let mut config = json!({
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "num_local_experts": s.experts,
        "rms_norm_eps": s.norm_eps,
        "rope_theta": s.rope_theta,
        "sliding_window": null,
        "attention_dropout": 0.0,
        "output_router_logits": false,
        "router_aux_loss_coef": 0.01,
        "initializer_range": 0.02,
        "use_cache": true,
    });
    extend(&mut config, common(model));
    config
}

fn moe_lm_config(model: &MoeLm) -> Value {
    let s = &model.spec;
    let mut config = json!({
        "architectures": ["MoeLmForCausalLM"],
        "model_type": "moe_lm",
        "hidden_act": s.activation,
        "bias": s.bias,
        "dense_intermediate_size": s.dense_width(),
        "num_experts": moe_shape(s).experts,
        "norm_topk_prob": s.renormalise,
        "moe_layers": s.moe_layers(),
        "shared_router": s.shared_router,
        "position_embedding": s.position,
        "norm": s.norm,
        "norm_eps": s.norm_eps,
    });
    if s.position == Position::Rope {
        extend(&mut config, json!({"rope_theta": s.rope_theta}));
    }
    if !s.moe_layers().is_empty() && s.router.name != "native" {
        extend(&mut config, json!({"router": s.router.to_string()}));
    }
    extend(&mut config, common(model));
    config
}

/// Collects tensors under their names in the checkpoint.
struct Out {
    tensors: HashMap<String, Tensor>,
    dtype: DType,
}

impl Out {
    fn put(&mut self, name: String, tensor: &Tensor) -> Result<()> {
        let tensor = tensor.detach().to_dtype(self.dtype)?.contiguous()?.to_device(&candle_core::Device::Cpu)?;
        self.tensors.insert(name, tensor);
        Ok(())
    }
}

/// Names of gate, up and down matrices.
fn ffn_names(export: Export) -> [&'static str; 3] {
    match export {
        Export::Mixtral => ["w1", "w3", "w2"],
        Export::MoeLm => ["gate_proj", "up_proj", "down_proj"],
    }
}

fn tensors(model: &MoeLm, dtype: DType) -> Result<HashMap<String, Tensor>> {
    let s = &model.spec;
    let mut out = Out { tensors: HashMap::new(), dtype };
    let get = |name: &str| match model.param(name) {
        Some(tensor) => Ok(tensor),
        None => candle_core::bail!("the model has no parameter `{name}`"),
    };
    let norm = |out: &mut Out, from: &str, to: &str| -> Result<()> {
        out.put(format!("{to}.weight"), get(&format!("{from}.weight"))?)?;
        match s.norm {
            Norm::LayerNorm => out.put(format!("{to}.bias"), get(&format!("{from}.bias"))?),
            Norm::RmsNorm => Ok(()),
        }
    };
    out.put("model.embed_tokens.weight".into(), get("embedding")?)?;
    if s.position == Position::Learned {
        out.put("model.embed_positions.weight".into(), get("positions")?)?;
    }
    if !s.tied {
        out.put("lm_head.weight".into(), get("head")?)?;
    }
    norm(&mut out, "norm", "model.norm")?;
    if s.shared_router && !s.moe_layers().is_empty() {
        out.put("model.gate.weight".into(), model.gate(s.moe_layers()[0])?)?;
    }
    // Parts with and without bias: weights have an output dimension, biases are that dimension.
    let kinds: &[&str] = if s.bias { &["weight", "bias"] } else { &["weight"] };
    for i in 0..s.layers {
        let (from, to) = (format!("layers.{i}"), format!("model.layers.{i}"));
        norm(&mut out, &format!("{from}.attention_norm"), &format!("{to}.input_layernorm"))?;
        norm(&mut out, &format!("{from}.ffn_norm"), &format!("{to}.post_attention_layernorm"))?;
        let widths = [("q", s.heads), ("k", s.kv_heads()), ("v", s.kv_heads())];
        for kind in kinds {
            let fused = get(&format!("{from}.qkv.{kind}"))?;
            let mut start = 0;
            for (name, heads) in widths {
                let rows = heads * s.head_dim();
                out.put(format!("{to}.self_attn.{name}_proj.{kind}"), &fused.narrow(0, start, rows)?)?;
                start += rows;
            }
            out.put(format!("{to}.self_attn.o_proj.{kind}"), get(&format!("{from}.o.{kind}"))?)?;
            if s.is_moe(i) {
                let (up, down) =
                    (get(&format!("{from}.experts.up.{kind}"))?, get(&format!("{from}.experts.down.{kind}"))?);
                for e in 0..s.experts {
                    let to = format!("{to}.block_sparse_moe.experts.{e}");
                    ffn(&mut out, model, (&up.get(e)?, &down.get(e)?), s.expert_width, &to, kind)?;
                }
            } else {
                let (up, down) = (get(&format!("{from}.mlp.up.{kind}"))?, get(&format!("{from}.mlp.down.{kind}"))?);
                ffn(&mut out, model, (up, down), s.dense_width(), &format!("{to}.mlp"), kind)?;
            }
        }
        if s.is_moe(i) && !s.shared_router {
            out.put(format!("{to}.block_sparse_moe.gate.weight"), model.gate(i)?)?;
        }
    }
    Ok(out.tensors)
}

/// One net: `up` holds gate rows, then up rows where the net is gated.
fn ffn(out: &mut Out, model: &MoeLm, (up, down): (&Tensor, &Tensor), f: usize, to: &str, kind: &str) -> Result<()> {
    let [gate_name, up_name, down_name] = ffn_names(model.spec.export);
    if model.spec.activation == Activation::Swiglu {
        out.put(format!("{to}.{gate_name}.{kind}"), &up.narrow(0, 0, f)?)?;
        out.put(format!("{to}.{up_name}.{kind}"), &up.narrow(0, f, f)?)?;
    } else {
        out.put(format!("{to}.{up_name}.{kind}"), up)?;
    }
    out.put(format!("{to}.{down_name}.{kind}"), down)
}
