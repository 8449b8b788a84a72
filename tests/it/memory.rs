//! Peak memory while loading: the weights once, in the dtype they are kept in, and little else.

use crate::checkpoint::tokenizer_json;
use serde_json::{Map, Value, json};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;

/// Peak over the weights' size that loading may take.
const RATIO_MAX: f64 = 1.15;

/// Widths of a Mixtral-style model.
struct Sizes {
    layers: usize,
    hidden: usize,
    experts: usize,
    ffn: usize,
}

/// About 100 million parameters; the largest tensor is 2 % of them.
const LARGE: Sizes = Sizes { layers: 4, hidden: 512, experts: 16, ffn: 1024 };
const SMALL: Sizes = Sizes { layers: 4, hidden: 64, experts: 2, ffn: 64 };
const VOCAB: usize = 4096;
const KV_HEADS: usize = 1;
const HEAD_DIM: usize = 32;

impl Sizes {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (d, heads) = (self.hidden, self.hidden / HEAD_DIM);
        let mut list = vec![("model.embed_tokens".to_string(), vec![VOCAB, d])];
        for layer in 0..self.layers {
            let mut put =
                |name: &str, shape: &[usize]| list.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            put("input_layernorm", &[d]);
            put("post_attention_layernorm", &[d]);
            put("self_attn.q_proj", &[heads * HEAD_DIM, d]);
            put("self_attn.k_proj", &[KV_HEADS * HEAD_DIM, d]);
            put("self_attn.v_proj", &[KV_HEADS * HEAD_DIM, d]);
            put("self_attn.o_proj", &[d, heads * HEAD_DIM]);
            put("block_sparse_moe.gate", &[self.experts, d]);
            for expert in 0..self.experts {
                put(&format!("block_sparse_moe.experts.{expert}.w1"), &[self.ffn, d]);
                put(&format!("block_sparse_moe.experts.{expert}.w2"), &[d, self.ffn]);
                put(&format!("block_sparse_moe.experts.{expert}.w3"), &[self.ffn, d]);
            }
        }
        list.push(("model.norm".into(), vec![d]));
        list.push(("lm_head".into(), vec![VOCAB, d]));
        list
    }

    fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }

    fn config(&self) -> Value {
        json!({
            "model_type": "mixtral", "hidden_act": "silu", "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "max_position_embeddings": 64, "num_attention_heads": self.hidden / HEAD_DIM, "head_dim": HEAD_DIM,
            "num_key_value_heads": KV_HEADS, "num_hidden_layers": self.layers, "num_local_experts": self.experts,
            "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": null,
            "tie_word_embeddings": false, "vocab_size": VOCAB, "eos_token_id": 0
        })
    }

    /// A folder with made-up BF16 weights, written piece by piece.
    fn write(&self) -> TempDir {
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("config.json"), self.config().to_string()).unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json()).unwrap();
        let (mut header, mut end) = (Map::new(), 0);
        for (name, shape) in self.tensors() {
            let start = end;
            end += shape.iter().product::<usize>() * 2;
            let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
            header.insert(format!("{name}.weight"), entry);
        }
        let header = Value::Object(header).to_string();
        let mut file = BufWriter::new(std::fs::File::create(dir.path().join("model.safetensors")).unwrap());
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(header.as_bytes()).unwrap();
        // Small numbers of both signs, none of them zero.
        let chunk: Vec<u8> =
            (0..1 << 16).flat_map(|i: u32| [(i * 37 % 251) as u8, 0x3c | (i % 2 * 0x80) as u8]).collect();
        while end > 0 {
            let piece = end.min(chunk.len());
            file.write_all(&chunk[..piece]).unwrap();
            end -= piece;
        }
        file.flush().unwrap();
        dir
    }
}

/// Kills the server when the test ends, however it ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Peak resident bytes of a server from its start until it listens.
fn peak_bytes(model: &Path, dtype: &str) -> u64 {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-serve"));
    command.arg("--model").arg(model).args(["--dtype", dtype, "--device", "cpu", "--port", "0"]);
    command.args(["--kv-cache-gb", "0.0005", "--max-num-seqs", "1", "--offline"]).env("RAYON_NUM_THREADS", "2");
    let mut server = Server(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let lines = BufReader::new(server.0.stdout.take().unwrap()).lines();
    let listens = lines.map_while(Result::ok).any(|line| line.starts_with("address"));
    assert!(listens, "the server ended before it listened");
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.0.id())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("VmHWM in /proc/PID/status");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
}

#[test]
fn loading_takes_the_weights_once_in_every_dtype() {
    if !Path::new("/proc/self/status").exists() {
        eprintln!("SKIPPED: peak memory is read from /proc, which is not here");
        return;
    }
    let (large, small) = (LARGE.write(), SMALL.write());
    for (dtype, bytes) in [("bf16", 2), ("f16", 2), ("f32", 4)] {
        let baseline = peak_bytes(small.path(), dtype);
        let peak = peak_bytes(large.path(), dtype);
        let weights = ((LARGE.parameters() - SMALL.parameters()) * bytes) as u64;
        let ratio = (peak - baseline) as f64 / weights as f64;
        eprintln!(
            "{dtype}: {} MiB of weights, peak {} MiB over a baseline of {} MiB: {ratio:.3}",
            weights >> 20,
            (peak - baseline) >> 20,
            baseline >> 20
        );
        assert!(ratio <= RATIO_MAX, "{dtype}: loading takes {ratio:.3} times the weights; at most {RATIO_MAX}");
    }
}
