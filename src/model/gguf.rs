//! GGUF files, as llama.cpp writes them: under what names Hugging Face checkpoints have their tensors, and their values.
//! Quantised tensors are widened when they are taken, and packed like any others.

use super::LoadError;
use crate::ops::HostTensor;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device};
use std::fs::{self, File};
use std::io::BufReader;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// What is particular to a kind of GGUF files.
struct Architecture {
    /// `general.architecture`.
    name: &'static str,
    /// Name of the mixture within a layer.
    moe: &'static str,
    /// Names of an expert's gate, up and down projections.
    experts: [&'static str; 3],
    /// Whether the rows of q and k are stored neighbours in pairs, where Hugging Face pairs a head's halves.
    interleaved: bool,
}

const PROJ: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

static ARCHITECTURES: [Architecture; 4] = [
    Architecture { name: "llama", moe: "block_sparse_moe", experts: ["w1", "w3", "w2"], interleaved: true },
    Architecture { name: "olmoe", moe: "mlp", experts: PROJ, interleaved: false },
    Architecture { name: "qwen2moe", moe: "mlp", experts: PROJ, interleaved: false },
    Architecture { name: "qwen3moe", moe: "mlp", experts: PROJ, interleaved: false },
];

/// A tensor of a Hugging Face checkpoint as it lies in a GGUF file.
pub(super) struct Stored {
    pub name: String,
    pub shape: Vec<usize>,
    /// Of its first byte in the file.
    pub start: u64,
    pub bytes: usize,
    pub form: Form,
}

/// How to read it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    dtype: GgmlDType,
    /// Heads whose rows are to be put in order.
    interleaved_heads: Option<usize>,
}

/// What every file of a model has to know from its first.
pub(super) struct Header {
    architecture: &'static Architecture,
    heads: usize,
    kv_heads: usize,
}

impl Form {
    /// Which of the dtypes a model runs in is nearest.
    pub(super) fn dtype(self) -> DType {
        match self.dtype {
            GgmlDType::F32 => DType::F32,
            GgmlDType::F16 => DType::F16,
            _ => DType::BF16,
        }
    }

    /// The tensor of `shape` whose bytes were read.
    pub(super) fn widen(self, shape: Vec<usize>, bytes: Vec<u8>) -> candle_core::Result<HostTensor> {
        let tensor = match self.dtype {
            GgmlDType::F32 => HostTensor::new(DType::F32, shape, bytes),
            GgmlDType::F16 => HostTensor::new(DType::F16, shape, bytes),
            GgmlDType::BF16 => HostTensor::new(DType::BF16, shape, bytes),
            dtype => {
                let tensor = qtensor_from_ggml(dtype, &bytes, shape.clone(), &Device::Cpu)?;
                HostTensor::from_f32(&shape, &tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?)
            }
        };
        Ok(match self.interleaved_heads {
            Some(heads) => tensor.map_rows(|row, rows| {
                // Row (head, half, i) of the checkpoint is row (head, i, half) of the file.
                let head = rows / heads;
                let (half, i) = (row % head / (head / 2), row % (head / 2));
                row / head * head + 2 * i + half
            }),
            None => tensor,
        })
    }
}

/// The tensors of one file, under the names of Hugging Face checkpoints; those that have none there keep theirs. `first` is
/// what the model's first file told.
pub(super) fn read(
    path: &Path,
    file: &File,
    first: Option<&Header>,
) -> Result<(Option<Header>, Vec<Stored>), LoadError> {
    // An alignment of 0 is a panic in candle 0.11.
    let content = catch_unwind(AssertUnwindSafe(|| Content::read(&mut BufReader::new(file))));
    let content = match content {
        Ok(Ok(content)) => content,
        Ok(Err(error)) => return Err(LoadError::file(path, format!("is no GGUF file that can be read: {error}"))),
        Err(_) => return Err(LoadError::file(path, "is no GGUF file that can be read: its header makes no sense")),
    };
    let own = if first.is_none() { Some(header(path, &content)?) } else { None };
    let Some(header) = first.or(own.as_ref()) else { unreachable!("one of both is there") };
    let size = file.metadata().map_err(LoadError::io(path))?.len();
    let mut all = Vec::new();
    for (name, info) in &content.tensor_infos {
        let dims = info.shape.dims();
        let (block, block_bytes) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
        let elements = dims.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        let whole = dims.last().is_some_and(|inputs| inputs % block == 0);
        let bytes = elements.filter(|_| whole).and_then(|n| (n / block).checked_mul(block_bytes));
        let start = content.tensor_data_offset.saturating_add(info.offset);
        let Some(bytes) = bytes.filter(|bytes| start.saturating_add(*bytes as u64) <= size) else {
            let problem = format!("is truncated: tensor `{name}` of shape {dims:?} is not within its {size} bytes");
            return Err(LoadError::file(path, problem));
        };
        let stored = Stored {
            name: name.clone(),
            shape: dims.to_vec(),
            start,
            bytes,
            form: Form { dtype: info.ggml_dtype, interleaved_heads: None },
        };
        header.rename(stored, &mut all);
    }
    for tensor in &all {
        let rows = tensor.shape.first().copied().unwrap_or(0);
        if tensor.form.interleaved_heads.is_some_and(|heads| heads == 0 || rows % (2 * heads) != 0) {
            let problem = format!("tensor `{}` of {rows} rows does not fit the heads its metadata tells", tensor.name);
            return Err(LoadError::file(path, problem));
        }
    }
    Ok((own, all))
}

fn header(path: &Path, content: &Content) -> Result<Header, LoadError> {
    let supported = || ARCHITECTURES.iter().map(|a| a.name).collect::<Vec<_>>().join(", ");
    let name = match content.metadata.get("general.architecture") {
        Some(Value::String(name)) => name,
        _ => return Err(LoadError::file(path, "has no `general.architecture`")),
    };
    let architecture = ARCHITECTURES.iter().find(|a| a.name == *name).ok_or_else(|| {
        LoadError::file(path, format!("`general.architecture` is {name}; supported are {}", supported()))
    })?;
    let number = |key: &str| {
        let value = content.metadata.get(&format!("{name}.attention.{key}"))?;
        value.to_u32().ok().map(|n| n as usize)
    };
    let heads = number("head_count")
        .ok_or_else(|| LoadError::file(path, format!("has no number `{name}.attention.head_count`")))?;
    Ok(Header { architecture, heads, kv_heads: number("head_count_kv").unwrap_or(heads) })
}

impl Header {
    /// Adds `tensor` under its name in a checkpoint, or the experts it holds.
    fn rename(&self, mut tensor: Stored, to: &mut Vec<Stored>) {
        let Some(layer) = tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else {
            let known = match &*tensor.name {
                "token_embd.weight" => Some("model.embed_tokens.weight"),
                "output_norm.weight" => Some("model.norm.weight"),
                "output.weight" => Some("lm_head.weight"),
                _ => None,
            };
            tensor.name = known.map_or(tensor.name, String::from);
            return to.push(tensor);
        };
        let (layer, name) = (layer.0.to_string(), layer.1.to_string());
        let Some((stem, kind)) = name.rsplit_once('.') else { return to.push(tensor) };
        let prefix = format!("model.layers.{layer}");
        let moe = format!("{prefix}.{}", self.architecture.moe);
        let full = |part: String| format!("{part}.{kind}");
        let renamed = match stem {
            "attn_norm" => Some(format!("{prefix}.input_layernorm")),
            "ffn_norm" => Some(format!("{prefix}.post_attention_layernorm")),
            "attn_q" | "attn_k" | "attn_v" => Some(format!("{prefix}.self_attn.{}_proj", &stem[5..])),
            "attn_output" => Some(format!("{prefix}.self_attn.o_proj")),
            "attn_q_norm" | "attn_k_norm" => Some(format!("{prefix}.self_attn.{}", &stem[5..])),
            "ffn_gate_inp" => Some(format!("{moe}.gate")),
            "ffn_gate_inp_shexp" => {
                if let [inputs] = tensor.shape[..] {
                    tensor.shape = vec![1, inputs];
                }
                Some(format!("{moe}.shared_expert_gate"))
            }
            "ffn_gate" | "ffn_up" | "ffn_down" => Some(format!("{prefix}.mlp.{}_proj", &stem[4..])),
            "ffn_gate_shexp" | "ffn_up_shexp" | "ffn_down_shexp" => {
                Some(format!("{moe}.shared_expert.{}_proj", stem[4..].trim_end_matches("_shexp")))
            }
            _ => None,
        };
        if self.architecture.interleaved {
            tensor.form.interleaved_heads = match stem {
                "attn_q" => Some(self.heads),
                "attn_k" => Some(self.kv_heads),
                _ => None,
            };
        }
        if let Some(part) = renamed {
            tensor.name = full(part);
            return to.push(tensor);
        }
        let projection = |part: &str| {
            let which = ["ffn_gate", "ffn_up", "ffn_down"].iter().position(|name| *name == part)?;
            Some(self.architecture.experts[which])
        };
        let stacked = stem.strip_suffix("_exps").and_then(projection);
        // Files from before experts were stacked.
        let single = stem.split_once('.').and_then(|(part, expert)| Some((projection(part)?, expert)));
        match (stacked, single, &tensor.shape[..]) {
            (Some(projection), _, [experts, shape @ ..]) if *experts > 0 => {
                let bytes = tensor.bytes / experts;
                to.extend((0..*experts).map(|expert| Stored {
                    name: full(format!("{moe}.experts.{expert}.{projection}")),
                    shape: shape.to_vec(),
                    start: tensor.start + (expert * bytes) as u64,
                    bytes,
                    form: tensor.form,
                }));
            }
            (_, Some((projection, expert)), _) => {
                tensor.name = full(format!("{moe}.experts.{expert}.{projection}"));
                to.push(tensor);
            }
            _ => to.push(tensor),
        }
    }
}

/// Whether `path` is called like a GGUF file.
pub(super) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf")
}

/// The GGUF file in `dir`, or all parts of one that is split; none where there is none.
///
/// # Errors
/// Several files to choose from.
pub(super) fn find(dir: &Path) -> Result<Option<Vec<PathBuf>>, LoadError> {
    let entries = fs::read_dir(dir).map_err(LoadError::io(dir))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|p| is_gguf(p)).collect();
    files.sort();
    let Some(first) = files.first() else { return Ok(None) };
    let all = parts(first)?;
    if all.len() < files.len() {
        let names: Vec<_> = files.iter().filter_map(|path| path.file_name()?.to_str()).collect();
        let problem = format!("holds several GGUF files; name one of them: {}", names.join(", "));
        return Err(LoadError::file(dir, problem));
    }
    Ok(Some(all))
}

/// `path`, or if it is the first of several parts (`NAME-00001-of-00003.gguf`) all of them.
///
/// # Errors
/// A part that is missing, or one that is not the first.
pub(super) fn parts(path: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let split = stem.rsplit_once("-of-").and_then(|(front, count)| {
        let (name, number) = front.rsplit_once('-')?;
        let digits = |s: &str| (s.len() == 5).then(|| s.parse::<usize>().ok()).flatten();
        Some((name, digits(number)?, digits(count)?))
    });
    let Some((name, number, count)) = split else { return Ok(vec![path.into()]) };
    if number != 1 {
        return Err(LoadError::file(path, "is a part of a split GGUF file, but not the first, which is to be named"));
    }
    let all: Vec<PathBuf> =
        (1..=count).map(|part| path.with_file_name(format!("{name}-{part:05}-of-{count:05}.gguf"))).collect();
    match all.iter().find(|part| !part.is_file()) {
        Some(missing) => Err(LoadError::file(missing, "is missing: all parts of a split GGUF file are needed")),
        None => Ok(all),
    }
}
