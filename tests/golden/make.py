"""Golden fixtures for the model code: tiny random checkpoints and what Hugging Face computes with them.

    pip install transformers==5.17.0 torch==2.15.0 safetensors numpy
    python tests/golden/make.py [case ...]

Runs on the CPU in a minute or two, is deterministic by seed, and writes one folder per case next to this file:

config.json          as real checkpoints have it; half of the cases in the style of transformers 4
model.safetensors    bfloat16 weights under the names of real checkpoints
golden.safetensors   input_ids    I64 [40]
                     logits_f32   F32 [40, vocab]  float32 forward, eager attention, eager experts
                     logits_bf16  F32 [40, vocab]  bfloat16 forward of the same
                     greedy_ids   I64 [64]         float32 greedy continuation of input_ids[:16], no cache, no stop

A seed is taken only if rounding cannot flip a decision: every greedy choice and every expert choice has a margin, the
bfloat16 forward picks the same experts as the float32 one, and no end-of-sequence token comes up.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
PROMPT, LENGTH, CONTINUE = 16, 40, 64
MIN_LOGIT_GAP = 5e-3  # best against second-best token, along the greedy continuation
MIN_EXPERT_GAP = 1e-4  # k-th against (k+1)-th expert, as probabilities
MIN_EXPERT_LOGIT_GAP = 0.25  # the same as logits; steers the choice of the input tokens, for the sake of bfloat16
MIN_DISTINCT = 8  # distinct tokens in the greedy continuation


def case(model_type, vocab, hidden, layers, heads, experts, old=None, **extra):
    """`heads` = (query, key-value), `experts` = (number, per token); `old` = keys of the transformers 4 config."""
    number = "num_local_experts" if model_type == "mixtral" else "num_experts"
    config = {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        number: experts[0],
        "num_experts_per_tok": experts[1],
        "max_position_embeddings": 256,
        "eos_token_id": vocab - 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return config | extra, old


def rope(rope_type, theta=10000.0, **parameters):
    return {"rope_type": rope_type, "rope_theta": theta, **parameters}


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

CASES = {
    "mixtral_gqa": case("mixtral", 128, 32, 2, (4, 2), (4, 2), {}, intermediate_size=40,
                        rope_parameters=rope("default", 1e6)),
    "mixtral_window": case("mixtral", 99, 40, 3, (3, 3), (6, 3), intermediate_size=24, head_dim=16,
                           sliding_window=8, tie_word_embeddings=True),
    "mixtral_top1": case("mixtral", 112, 40, 2, (5, 1), (5, 1), intermediate_size=32, eos_token_id=[110, 111]),
    "mixtral_llama3": case("mixtral", 97, 32, 2, (2, 1), (8, 2), {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
                           intermediate_size=24, rope_parameters=rope("llama3", **LLAMA3)),
    "olmoe_mha": case("olmoe", 120, 32, 2, (4, 4), (8, 4), {"rope_scaling": None}, intermediate_size=24),
    "olmoe_clip": case("olmoe", 96, 48, 2, (6, 3), (8, 2), intermediate_size=16, norm_topk_prob=True, clip_qkv=0.7,
                       attention_bias=True, tie_word_embeddings=True),
    "qwen3_gqa": case("qwen3_moe", 151, 48, 2, (4, 2), (16, 4),
                      {"rope_scaling": None, "sliding_window": None, "max_window_layers": 2},
                      intermediate_size=64, moe_intermediate_size=16, head_dim=16, norm_topk_prob=True,
                      rope_parameters=rope("default", 1e6)),
    "qwen3_sparse": case("qwen3_moe", 110, 32, 4, (4, 1), (8, 2), intermediate_size=40, moe_intermediate_size=16,
                         head_dim=12, decoder_sparse_step=2, mlp_only_layers=[3], tie_word_embeddings=True,
                         attention_bias=True, rope_parameters=rope("yarn", **YARN)),
    "qwen3_window": case("qwen3_moe", 130, 40, 3, (6, 2), (8, 3), intermediate_size=48, moe_intermediate_size=16,
                         head_dim=16, use_sliding_window=True, sliding_window=8, norm_topk_prob=True,
                         eos_token_id=[129, 127], rope_parameters=rope("linear", factor=2.0)),
    "qwen2_shared": case("qwen2_moe", 100, 32, 2, (4, 4), (8, 2), {"sliding_window": 8, "max_window_layers": 2},
                         intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=40,
                         max_window_layers=2, rope_parameters=rope("default", 1e6)),
    "qwen2_window": case("qwen2_moe", 105, 60, 3, (5, 1), (6, 2), {"rope_scaling": {"factor": 4.0, "type": "yarn"}},
                         intermediate_size=40, moe_intermediate_size=16, shared_expert_intermediate_size=24,
                         use_sliding_window=True, sliding_window=8, max_window_layers=1, decoder_sparse_step=2,
                         norm_topk_prob=True, max_position_embeddings=2048,
                         rope_parameters=rope("yarn", 1000.0, factor=4.0)),
    "qwen2_layers": case("qwen2_moe", 98, 32, 4, (4, 2), (4, 2), intermediate_size=40, moe_intermediate_size=16,
                         shared_expert_intermediate_size=24, use_sliding_window=True, sliding_window=8,
                         max_window_layers=4, qkv_bias=False, mlp_only_layers=[0], norm_topk_prob=True,
                         rope_parameters=rope("yarn", **YARN, beta_fast=4.0, beta_slow=0.5, truncate=False,
                                              mscale=1.0, mscale_all_dim=0.5)),
}


def build(config, generator):
    """A float32 model with decisive random weights, each exactly representable in bfloat16."""
    config = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.3 * noise
        elif "norm" in name:
            value = 1 + 0.1 * noise
        elif name.endswith("mlp.gate.weight"):
            value = 0.4 * noise
        else:
            value = 0.25 * noise
        parameter.data.copy_(value.bfloat16())
    return model.eval()


@torch.no_grad()
def forward(model, ids):
    """Logits [batch, length, vocab] and router logits [sparse layer, batch, length, expert]."""
    out = model(input_ids=ids, use_cache=False, output_router_logits=True)
    return out.logits, torch.stack([r.view(*ids.shape, -1) for r in out.router_logits])


def expert_gap(router, k, probability=True):
    """Smallest gap between the last expert taken and the first one left out, per batch entry and token."""
    scores = router.float().softmax(-1) if probability else router.float()
    top = scores.topk(k + 1).values
    return (top[..., k - 1] - top[..., k]).amin(0)


def draw_ids(model, config, generator):
    """Random ids, each drawn so that the experts for it are clear."""
    ids = torch.empty(0, dtype=torch.long)
    for _ in range(LENGTH):
        candidates = torch.randperm(config["vocab_size"] - 4, generator=generator)[:16]
        batch = torch.cat([ids.expand(len(candidates), -1), candidates[:, None]], 1)
        gap = expert_gap(forward(model, batch)[1][:, :, -1:], config["num_experts_per_tok"], probability=False)[:, 0]
        clear = (gap > MIN_EXPERT_LOGIT_GAP).nonzero()
        ids = batch[clear[0, 0] if len(clear) else gap.argmax()]
    return ids


def continue_greedily(model, ids):
    """The continuation and the smallest gap between its tokens and the runners-up."""
    smallest = float("inf")
    for _ in range(CONTINUE):
        best = forward(model, ids[None])[0][0, -1].topk(2)
        smallest = min(smallest, (best.values[0] - best.values[1]).item())
        ids = torch.cat([ids, best.indices[:1]])
    return ids, smallest


def save(model, folder, old):
    """What save_pretrained writes, less generation_config.json, with config.json put into the older style if asked."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if old is None:
        return
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.57.1"
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    for key in ("layer_types", "qkv_bias", "router_jitter_noise"):  # not in the files of that time; all at the default
        config.pop(key, None)
    config = {key: value for key, value in config.items() if value is not None or key in ("clip_qkv", "sliding_window")}
    path.write_text(json.dumps(config | old, indent=2, sort_keys=True) + "\n")


def reload(model, folder, dtype):
    """The model as read back from the folder, its config checked against the original."""
    again = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    want, got = model.config.to_dict(), again.config.to_dict()
    got["rope_parameters"].pop("type", None)
    for key in want.keys() - {"architectures", "dtype", "_name_or_path"}:
        assert want[key] == got[key], (folder.name, key, want[key], got[key])
    assert again.model.rotary_emb.inv_freq.dtype == torch.float32
    return again


def attempt(folder, config, old, seed):
    """Writes the case from this seed and returns its figures, or says why not."""
    generator = torch.Generator().manual_seed(seed)
    k = config["num_experts_per_tok"]
    model = build(config, generator)
    ids = draw_ids(model, config, generator)
    greedy, logit_gap = continue_greedily(model, ids[:PROMPT])
    logits, router = forward(model, ids[None])
    gap = min(expert_gap(r, k).min().item() for r in (router, forward(model, greedy[None])[1]))
    greedy = greedy[PROMPT:]
    distinct = len(greedy.unique())
    stops = torch.isin(greedy, torch.tensor(config["eos_token_id"])).any()
    if logit_gap <= MIN_LOGIT_GAP or gap <= MIN_EXPERT_GAP or distinct < MIN_DISTINCT or stops:
        return None, f"logit gap {logit_gap:.1e}, expert gap {gap:.1e}, {distinct} distinct{', stops' if stops else ''}"
    save(model.bfloat16(), folder, old)
    assert torch.equal(forward(reload(model, folder, torch.float32), ids[None])[0], logits), folder.name
    rounded, rounded_router = forward(reload(model, folder, torch.bfloat16), ids[None])
    if not torch.equal(*(r.float().topk(k).indices.sort().values for r in (router, rounded_router))):
        return None, "other experts in bfloat16"
    golden = {"input_ids": ids, "logits_f32": logits[0], "logits_bf16": rounded[0].float(), "greedy_ids": greedy}
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, folder / "golden.safetensors")
    return (f"logit gap {logit_gap:.4f}, expert gap {gap:.5f}, {distinct} distinct, logits std {logits.std():.2f}, "
            f"bf16 off by {(golden['logits_bf16'] - logits[0]).abs().max():.3f}, "
            f"{(folder / 'model.safetensors').stat().st_size} bytes"), None


def main():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in sys.argv[1:] or CASES:
        for seed in range(1000):
            figures, reason = attempt(HERE / name, *CASES[name], seed)
            print(f"{name}: seed {seed}: {figures or 'rejected: ' + reason}", flush=True)
            if figures:
                break
        else:
            sys.exit(f"{name}: no seed will do")


if __name__ == "__main__":
    main()
