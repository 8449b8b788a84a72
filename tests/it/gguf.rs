//! Checkpoints out of GGUF files compute what they compute out of safetensors.

use crate::checkpoint::{Checkpoint, Stored, quiet, tokenizer_json};
use crate::support::Runner;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::bf16;
use moe_serve::engine::default_name;
use moe_serve::model::hub::{HubOptions, resolve};
use moe_serve::model::{LoadOptions, Loaded, load};
use moe_serve::types::DtypeChoice;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use tempfile::TempDir;

/// Golden checkpoint, llama.cpp's architecture, whether its rotated projections are interleaved.
const FAMILIES: [(&str, &str, bool); 4] = [
    ("mixtral_gqa", "llama", true),
    ("olmoe_mha", "olmoe", false),
    ("qwen2_shared", "qwen2moe", false),
    ("qwen3_gqa", "qwen3moe", false),
];

fn values(stored: &Stored) -> Vec<f32> {
    stored.bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}

fn store(values: &[f32], shape: &[usize]) -> Stored {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Stored { dtype: "F32".into(), shape: shape.to_vec(), bytes }
}

/// What a tensor is called in a GGUF file, and which expert of a stack it is.
fn gguf_name(name: &str) -> (String, Option<usize>) {
    let Some(rest) = name.strip_prefix("model.layers.") else {
        let name = match name {
            "model.embed_tokens.weight" => "token_embd.weight",
            "model.norm.weight" => "output_norm.weight",
            "lm_head.weight" => "output.weight",
            _ => panic!("{name}"),
        };
        return (name.into(), None);
    };
    let (layer, rest) = rest.split_once('.').unwrap();
    let parts: Vec<&str> = rest.split('.').collect();
    let projection = |name: &str| match name {
        "w1" | "gate_proj" => "gate",
        "w2" | "down_proj" => "down",
        "w3" | "up_proj" => "up",
        _ => panic!("{name}"),
    };
    let (stem, expert) = match parts[..] {
        ["input_layernorm", _] => ("attn_norm".to_string(), None),
        ["post_attention_layernorm", _] => ("ffn_norm".into(), None),
        ["self_attn", "o_proj", _] => ("attn_output".into(), None),
        ["self_attn", name, _] => (format!("attn_{}", name.trim_end_matches("_proj")), None),
        [_, "gate", _] => ("ffn_gate_inp".into(), None),
        [_, "shared_expert_gate", _] => ("ffn_gate_inp_shexp".into(), None),
        [_, "shared_expert", name, _] => (format!("ffn_{}_shexp", projection(name)), None),
        [_, "experts", expert, name, _] => (format!("ffn_{}_exps", projection(name)), Some(expert.parse().unwrap())),
        _ => panic!("{rest}"),
    };
    (format!("blk.{layer}.{stem}.{}", parts[parts.len() - 1]), expert)
}

/// Rows of q and k as llama.cpp wants them of Mixtral: those of a head's halves taking turns.
fn interleave(values: &[f32], heads: usize, rows: usize) -> Vec<f32> {
    let (head, width) = (rows / heads, values.len() / rows);
    let row = |to: usize| to / head * head + to % head / 2 + to % 2 * (head / 2);
    (0..rows).flat_map(|to| values[row(to) * width..][..width].to_vec()).collect()
}

/// Shapes and values of the experts of a stack.
type Stack = BTreeMap<usize, (Vec<usize>, Vec<f32>)>;

/// The tensors of `checkpoint` under GGUF's names, experts stacked; of matrices those whose rows are whole blocks quantised.
fn tensors(checkpoint: &Checkpoint, interleaved: bool, dtype: GgmlDType) -> BTreeMap<String, QTensor> {
    let heads = |field: &str| checkpoint.config[field].as_u64().unwrap() as usize;
    let mut stacks = BTreeMap::<String, Stack>::new();
    for (name, stored) in &checkpoint.tensors {
        let mut values = values(stored);
        for (projection, field) in [("q_proj.weight", "num_attention_heads"), ("k_proj.weight", "num_key_value_heads")]
        {
            if interleaved && name.ends_with(projection) {
                values = interleave(&values, heads(field), stored.shape[0]);
            }
        }
        let (name, expert) = gguf_name(name);
        stacks.entry(name).or_default().insert(expert.unwrap_or(0), (stored.shape.clone(), values));
    }
    let tensor = |(name, stack): (String, Stack)| {
        let mut shape = stack[&0].0.clone();
        if name.contains("_exps.") {
            shape.insert(0, stack.len());
        }
        // llama.cpp has the gate of a shared expert as a vector.
        if name.contains("ffn_gate_inp_shexp") {
            shape.remove(0);
        }
        let values: Vec<f32> = stack.into_values().flat_map(|(_, values)| values).collect();
        let whole = shape.len() > 1 && shape[shape.len() - 1] % dtype.block_size() == 0;
        let dtype = if whole && !name.contains("gate_inp") { dtype } else { GgmlDType::F32 };
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        (name, QTensor::quantize(&tensor, dtype).unwrap())
    };
    stacks.into_iter().map(tensor).collect()
}

fn metadata(checkpoint: &Checkpoint, architecture: &str) -> BTreeMap<String, Value> {
    let number = |field: &str| Value::U32(checkpoint.config[field].as_u64().unwrap() as u32);
    BTreeMap::from([
        ("general.architecture".into(), Value::String(architecture.into())),
        (format!("{architecture}.attention.head_count"), number("num_attention_heads")),
        (format!("{architecture}.attention.head_count_kv"), number("num_key_value_heads")),
    ])
}

fn write(path: &Path, metadata: &BTreeMap<String, Value>, tensors: &BTreeMap<String, QTensor>) {
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(name, value)| (&**name, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (&**name, tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

/// A folder with config.json, tokenizer.json and `model.gguf`.
fn folder(checkpoint: &Checkpoint, architecture: &str, interleaved: bool, dtype: GgmlDType) -> TempDir {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("config.json"), checkpoint.config_json()).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json()).unwrap();
    let tensors = tensors(checkpoint, interleaved, dtype);
    write(&dir.path().join("model.gguf"), &metadata(checkpoint, architecture), &tensors);
    dir
}

fn open(model: &Path) -> Result<Loaded, String> {
    let files = resolve(model.to_str().unwrap(), &HubOptions::default(), &quiet()).map_err(|e| e.to_string())?;
    load(&files, &LoadOptions { dtype: DtypeChoice::F32, ..Default::default() }, |_, _| {}).map_err(|e| e.to_string())
}

fn logits(loaded: &Loaded) -> Vec<Vec<f32>> {
    Runner::new(&loaded.model, 1, 32, "native").step(&[(0, &[1, 5, 9, 44, 7, 7, 60, 2][..])])
}

#[test]
fn every_family_computes_the_same_from_both_formats() {
    for (golden, architecture, interleaved) in FAMILIES {
        let checkpoint = Checkpoint::golden(golden);
        let want = logits(&checkpoint.try_load().unwrap());
        for dtype in [GgmlDType::F32, GgmlDType::BF16] {
            let dir = folder(&checkpoint, architecture, interleaved, dtype);
            assert_eq!(logits(&open(dir.path()).unwrap()), want, "{golden} {dtype:?}");
            assert_eq!(logits(&open(&dir.path().join("model.gguf")).unwrap()), want, "{golden} {dtype:?}");
            assert_eq!(default_name(dir.path().join("model.gguf").to_str().unwrap()), "model");
        }
    }
}

#[test]
fn quantised_tensors_are_what_their_format_says() {
    for dtype in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q5_1] {
        let checkpoint = Checkpoint::golden("olmoe_mha");
        let dir = folder(&checkpoint, "olmoe", false, dtype);
        // The same checkpoint with every matrix there and back.
        let mut rounded = checkpoint.clone();
        for (name, stored) in &mut rounded.tensors {
            let whole = stored.shape.len() == 2 && stored.shape[1] % dtype.block_size() == 0;
            let kept = if whole && !name.contains("mlp.gate.") { dtype } else { GgmlDType::F32 };
            let tensor = Tensor::from_vec(values(stored), stored.shape.clone(), &Device::Cpu).unwrap();
            let tensor = QTensor::quantize(&tensor, kept).unwrap().dequantize(&Device::Cpu).unwrap();
            *stored = store(&tensor.flatten_all().unwrap().to_vec1().unwrap(), &stored.shape.clone());
        }
        let loaded = open(dir.path()).unwrap();
        assert_eq!(logits(&loaded), logits(&rounded.try_load().unwrap()), "{dtype:?}");
        assert_ne!(logits(&loaded), logits(&checkpoint.try_load().unwrap()), "{dtype:?}");
    }
}

#[test]
fn experts_one_by_one_and_parts_of_a_split_file_are_read() {
    let checkpoint = Checkpoint::golden("mixtral_gqa");
    let want = logits(&checkpoint.try_load().unwrap());
    let dir = folder(&checkpoint, "llama", true, GgmlDType::F32);
    let mut all = tensors(&checkpoint, true, GgmlDType::F32);
    let stacks: Vec<String> = all.keys().filter(|name| name.contains("_exps.")).cloned().collect();
    for name in stacks {
        let stack = all.remove(&name).unwrap().dequantize(&Device::Cpu).unwrap();
        for expert in 0..stack.dim(0).unwrap() {
            let one = stack.get(expert).unwrap();
            // Not a view into the stack, whose storage would be written whole.
            let values: Vec<f32> = one.flatten_all().unwrap().to_vec1().unwrap();
            let one = Tensor::from_vec(values, one.shape(), &Device::Cpu).unwrap();
            let one = QTensor::quantize(&one, GgmlDType::F32).unwrap();
            all.insert(name.replace("_exps.", &format!(".{expert}.")), one);
        }
    }
    std::fs::remove_file(dir.path().join("model.gguf")).unwrap();
    let half: Vec<String> = all.keys().step_by(2).cloned().collect();
    let first: BTreeMap<String, QTensor> =
        half.into_iter().map(|name| (name.clone(), all.remove(&name).unwrap())).collect();
    let part = |number: usize| dir.path().join(format!("m-{number:05}-of-00002.gguf"));
    write(&part(1), &metadata(&checkpoint, "llama"), &first);
    write(&part(2), &BTreeMap::new(), &all);
    assert_eq!(logits(&open(dir.path()).unwrap()), want);
    assert_eq!(logits(&open(&part(1)).unwrap()), want);
    let error = open(&part(2)).map(drop).unwrap_err();
    assert!(error.contains("not the first"), "{error}");
    std::fs::remove_file(part(2)).unwrap();
    let error = open(dir.path()).map(drop).unwrap_err();
    assert!(error.contains("m-00002-of-00002.gguf") && error.contains("missing"), "{error}");
}

#[test]
fn files_that_cannot_be_read_are_refused_by_name_with_the_reason() {
    let checkpoint = Checkpoint::golden("olmoe_mha");
    let says = |dir: &TempDir, wants: &[&str]| {
        let error = open(dir.path()).map(drop).unwrap_err();
        for want in wants {
            assert!(error.contains(want), "{want:?} is not in {error:?}");
        }
    };
    let path = |dir: &TempDir| dir.path().join("model.gguf");
    let good = || folder(&checkpoint, "olmoe", false, GgmlDType::F32);

    says(&folder(&checkpoint, "gemma", false, GgmlDType::F32), &["model.gguf", "gemma", "llama, olmoe, qwen2moe"]);
    let dir = good();
    write(&path(&dir), &BTreeMap::new(), &tensors(&checkpoint, false, GgmlDType::F32));
    says(&dir, &["model.gguf", "general.architecture"]);
    let named = BTreeMap::from([("general.architecture".to_string(), Value::String("olmoe".into()))]);
    write(&path(&dir), &named, &tensors(&checkpoint, false, GgmlDType::F32));
    says(&dir, &["olmoe.attention.head_count"]);
    let mut unaligned = metadata(&checkpoint, "olmoe");
    unaligned.insert("general.alignment".into(), Value::U32(0));
    write(&path(&dir), &unaligned, &tensors(&checkpoint, false, GgmlDType::F32));
    says(&dir, &["model.gguf", "header"]);
    std::fs::write(path(&dir), "no file of weights").unwrap();
    says(&dir, &["model.gguf", "no GGUF file"]);

    let mut more = tensors(&checkpoint, false, GgmlDType::F32);
    let spare = || QTensor::quantize(&Tensor::zeros(4, candle_core::DType::F32, &Device::Cpu).unwrap(), GgmlDType::F32);
    more.insert("rope_freqs.weight".into(), spare().unwrap());
    write(&path(&dir), &metadata(&checkpoint, "olmoe"), &more);
    says(&dir, &["rope_freqs.weight"]);
    more.remove("rope_freqs.weight");
    more.remove("blk.1.ffn_up_exps.weight");
    write(&path(&dir), &metadata(&checkpoint, "olmoe"), &more);
    says(&dir, &["`model.layers.1.mlp.experts.0.up_proj.weight` is missing"]);

    let dir = good();
    std::fs::copy(path(&dir), dir.path().join("other.gguf")).unwrap();
    says(&dir, &["several GGUF files", "model.gguf, other.gguf"]);
    let revision = HubOptions { revision: Some("main".into()), ..HubOptions::default() };
    let error = resolve(path(&good()).to_str().unwrap(), &revision, &quiet()).unwrap_err().to_string();
    assert!(error.contains("--revision"), "{error}");
    let dir = good();
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    says(&dir, &["tokenizer.json"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damage_anywhere_is_an_error_or_harmless_and_never_a_panic(at in 0usize..4000, byte in any::<u8>(), cut in 0usize..4000) {
        let checkpoint = Checkpoint::golden("mixtral_gqa");
        let dir = folder(&checkpoint, "llama", true, GgmlDType::Q8_0);
        let path = dir.path().join("model.gguf");
        let good = std::fs::read(&path).unwrap();
        let mut bytes = good.clone();
        bytes[at] ^= byte;
        std::fs::write(&path, &bytes).unwrap();
        let _ = open(dir.path());
        std::fs::write(&path, &good[..cut]).unwrap();
        prop_assert!(open(dir.path()).is_err());
    }
}
