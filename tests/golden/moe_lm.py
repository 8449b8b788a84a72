"""Golden fixtures for the in-repo family `moe_lm`, which transformers does not have: the family written the plain way.

    pip install torch==2.15.0 safetensors numpy
    python tests/golden/moe_lm.py [case ...]

Writes the same folders and files as make.py, whose rules for taking a seed hold here too.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
PROMPT, LENGTH, CONTINUE = 16, 40, 64
MIN_LOGIT_GAP = 5e-3  # best against second-best token, along the greedy continuation
MIN_MARGIN = 1e-4  # of every choice of experts, as probability
MIN_CLEAR_MARGIN = 0.04  # the same; steers the choice of the input tokens, for the sake of bfloat16
MIN_DISTINCT = 8  # distinct tokens in the greedy continuation


def case(vocab, hidden, layers, heads, experts, **extra):
    """`heads` = (query, key-value, dimension), `experts` = (number, per token)."""
    config = {
        "model_type": "moe_lm",
        "architectures": ["MoeLmForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "position_embedding": "rope",
        "rope_theta": 10000.0,
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "hidden_act": "swiglu",
        "bias": False,
        "intermediate_size": 24,
        "dense_intermediate_size": 40,
        "num_experts": experts[0],
        "num_experts_per_tok": experts[1],
        "norm_topk_prob": True,
        "moe_layers": list(range(layers)),
        "shared_router": False,
        "bos_token_id": 0,
        "eos_token_id": vocab - 1,
        "torch_dtype": "bfloat16",
    } | extra
    if config["position_embedding"] == "learned":
        del config["rope_theta"]
    return config


CASES = {
    "moe_lm_gpt": case(96, 32, 4, (4, 4, 8), (4, 1), position_embedding="learned", norm="layernorm", hidden_act="gelu",
                       bias=True, norm_topk_prob=False, moe_layers=[0, 2], router="topk:1"),
    "moe_lm_llama": case(101, 48, 2, (4, 2, 12), (6, 2), tie_word_embeddings=False, shared_router=True,
                         rope_theta=5000.0),
    "moe_lm_relu": case(90, 32, 3, (4, 1, 8), (6, 6), norm="layernorm", hidden_act="relu", moe_layers=[1, 2],
                        router="dynk:0.7,mass=full"),
    "moe_lm_dense": case(88, 40, 2, (5, 5, 8), (1, 1), position_embedding="learned", hidden_act="silu", bias=True,
                         moe_layers=[]),
}


def shapes(c):
    """Name and shape of every tensor."""
    d, hd, out = c["hidden_size"], c["head_dim"], {}
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]

    def linear(name, outputs, inputs):
        out[f"{name}.weight"] = (outputs, inputs)
        if c["bias"]:
            out[f"{name}.bias"] = (outputs,)

    def norm(name):
        out[f"{name}.weight"] = (d,)
        if c["norm"] == "layernorm":
            out[f"{name}.bias"] = (d,)

    def ffn(name, width):
        for projection in ["gate_proj", "up_proj"] if c["hidden_act"] == "swiglu" else ["up_proj"]:
            linear(f"{name}.{projection}", width, d)
        linear(f"{name}.down_proj", d, width)

    out["model.embed_tokens.weight"] = (c["vocab_size"], d)
    if c["position_embedding"] == "learned":
        out["model.embed_positions.weight"] = (c["max_position_embeddings"], d)
    if c["shared_router"]:
        out["model.gate.weight"] = (c["num_experts"], d)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm")
        for name, width in [("q", heads), ("k", kv_heads), ("v", kv_heads)]:
            linear(f"{layer}.self_attn.{name}_proj", width * hd, d)
        linear(f"{layer}.self_attn.o_proj", d, heads * hd)
        norm(f"{layer}.post_attention_layernorm")
        if i not in c["moe_layers"]:
            ffn(f"{layer}.mlp", c["dense_intermediate_size"])
            continue
        if not c["shared_router"]:
            out[f"{layer}.block_sparse_moe.gate.weight"] = (c["num_experts"], d)
        for e in range(c["num_experts"]):
            ffn(f"{layer}.block_sparse_moe.experts.{e}", c["intermediate_size"])
    norm("model.norm")
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (c["vocab_size"], d)
    return out


def build(c, generator):
    """Decisive random weights, each exactly representable in bfloat16."""
    weights = {}
    for name, shape in shapes(c).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            value = 0.3 * noise
        elif "norm" in name:
            value = 1 + 0.1 * noise
        elif name.endswith("gate.weight"):
            value = 0.5 * noise
        elif "embed_positions" in name:
            value = 0.1 * noise
        else:
            value = 0.25 * noise
        weights[name] = value.bfloat16()
    return weights


class Model:
    """`weights` in one dtype, in which everything but norms, rotations, softmax and routing is computed."""

    def __init__(self, c, weights, dtype):
        self.c, self.w = c, {name: w.to(dtype) for name, w in weights.items()}

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name, x):
        c, wide = self.c, x.float()
        if c["norm"] == "layernorm":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + c["norm_eps"])
        wide = wide * self.w[f"{name}.weight"].float()
        if c["norm"] == "layernorm":
            wide = wide + self.w[f"{name}.bias"].float()
        return wide.to(x.dtype)

    def ffn(self, name, x):
        up = self.linear(f"{name}.up_proj", x)
        match self.c["hidden_act"]:
            case "swiglu":
                h = F.silu(self.linear(f"{name}.gate_proj", x)) * up
            case "gelu":
                h = F.gelu(up, approximate="tanh")
            case "relu":
                h = F.relu(up)
            case "silu":
                h = F.silu(up)
        return self.linear(f"{name}.down_proj", h)

    def rotate(self, x):
        """Half-split rotary embedding of `x [batch, heads, T, hd]`."""
        half = self.c["head_dim"] // 2
        freq = self.c["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * freq
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x[..., :half].float(), x[..., half:].float()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def attention(self, name, x):
        c, (batch, length, _) = self.c, x.shape

        def heads(projection, count):
            return self.linear(f"{name}.{projection}_proj", x).view(batch, length, count, c["head_dim"]).transpose(1, 2)

        q, k = heads("q", c["num_attention_heads"]), heads("k", c["num_key_value_heads"])
        v = heads("v", c["num_key_value_heads"])
        if c["position_embedding"] == "rope":
            q, k = self.rotate(q), self.rotate(k)
        group = c["num_attention_heads"] // c["num_key_value_heads"]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(c["head_dim"])
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        p = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(x.dtype)
        return self.linear(f"{name}.o_proj", (p @ v).transpose(1, 2).reshape(batch, length, -1))

    def choose(self, p):
        """Of sorted probabilities `[…, E]`: how many are taken, and by how much the choice is clear."""
        name, _, rest = self.c.get("router", f"topk:{self.c['num_experts_per_tok']}").partition(":")
        sums = p.double().cumsum(-1)
        if name == "topk":
            k = torch.full(p.shape[:-1], int(rest))
            clear = torch.ones(p.shape[:-1], dtype=torch.float64)
        else:
            tau = float(rest.removesuffix(",mass=full"))
            k = (sums < tau * sums[..., -1:]).sum(-1) + 1
            clear = (sums - tau).abs().amin(-1)
        padded = F.pad(p, (0, 1), value=-1.0)
        gap = padded.gather(-1, k[..., None] - 1) - padded.gather(-1, k[..., None])
        return k, torch.minimum(clear, gap[..., 0].double())

    def moe(self, layer, x):
        """The mixture, the experts taken `[batch, T, E]` and by how much each choice is clear."""
        c = self.c
        name = f"{layer}.block_sparse_moe"
        p = self.linear("model.gate" if c["shared_router"] else f"{name}.gate", x).float().softmax(-1)
        order = p.sort(-1, descending=True)
        k, margin = self.choose(order.values)
        taken = torch.zeros_like(p, dtype=torch.bool)
        taken.scatter_(-1, order.indices, torch.arange(c["num_experts"]) < k[..., None])
        weight = p * taken
        if c["norm_topk_prob"]:
            weight = weight / weight.sum(-1, keepdim=True)
        y = sum(weight[..., e, None].to(x.dtype) * self.ffn(f"{name}.experts.{e}", x) for e in range(c["num_experts"]))
        return y, taken, margin

    @torch.no_grad()
    def forward(self, ids):
        """Logits [batch, T, vocab], and per mixture the experts taken and the margins of the choice."""
        c = self.c
        x = self.w["model.embed_tokens.weight"][ids]
        if c["position_embedding"] == "learned":
            x = x + self.w["model.embed_positions.weight"][: ids.shape[1]]
        taken, margins = [], [torch.ones(ids.shape, dtype=torch.float64)]
        for i in range(c["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = x + self.attention(f"{layer}.self_attn", self.norm(f"{layer}.input_layernorm", x))
            normed = self.norm(f"{layer}.post_attention_layernorm", x)
            if i in c["moe_layers"]:
                y, chosen, margin = self.moe(layer, normed)
                taken.append(chosen)
                margins.append(margin)
            else:
                y = self.ffn(f"{layer}.mlp", normed)
            x = x + y
        head = "model.embed_tokens" if c["tie_word_embeddings"] else "lm_head"
        return F.linear(self.norm("model.norm", x), self.w[f"{head}.weight"]), taken, torch.stack(margins).amin(0)


def draw_ids(model, generator):
    """Random ids, each drawn so that the experts for it are clear."""
    ids = torch.empty(0, dtype=torch.long)
    for _ in range(LENGTH):
        candidates = torch.randperm(model.c["vocab_size"] - 4, generator=generator)[:16]
        batch = torch.cat([ids.expand(len(candidates), -1), candidates[:, None]], 1)
        margin = model.forward(batch)[2][:, -1]
        clear = (margin > MIN_CLEAR_MARGIN).nonzero()
        ids = batch[clear[0, 0] if len(clear) else margin.argmax()]
    return ids


def continue_greedily(model, ids):
    """The continuation and the smallest gap between its tokens and the runners-up."""
    smallest = float("inf")
    for _ in range(CONTINUE):
        best = model.forward(ids[None])[0][0, -1].topk(2)
        smallest = min(smallest, (best.values[0] - best.values[1]).item())
        ids = torch.cat([ids, best.indices[:1]])
    return ids, smallest


def attempt(folder, config, seed):
    """Writes the case from this seed and returns its figures, or says why not."""
    generator = torch.Generator().manual_seed(seed)
    weights = build(config, generator)
    model = Model(config, weights, torch.float32)
    ids = draw_ids(model, generator)
    greedy, logit_gap = continue_greedily(model, ids[:PROMPT])
    logits, taken, margins = model.forward(ids[None])
    margin = min(margins.min().item(), model.forward(greedy[None])[2].min().item())
    greedy = greedy[PROMPT:]
    distinct = len(greedy.unique())
    stops = (greedy == config["eos_token_id"]).any()
    if logit_gap <= MIN_LOGIT_GAP or margin <= MIN_MARGIN or distinct < MIN_DISTINCT or stops:
        return None, f"logit gap {logit_gap:.1e}, margin {margin:.1e}, {distinct} distinct{', stops' if stops else ''}"
    rounded, taken_rounded, _ = Model(config, weights, torch.bfloat16).forward(ids[None])
    if not all(torch.equal(a, b) for a, b in zip(taken, taken_rounded)):
        return None, "other experts in bfloat16"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    golden = {"input_ids": ids, "logits_f32": logits[0], "logits_bf16": rounded[0].float(), "greedy_ids": greedy}
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, folder / "golden.safetensors")
    mean_k = torch.stack(taken).sum(-1).float().mean() if taken else 0.0
    return (f"logit gap {logit_gap:.4f}, margin {margin:.5f}, {distinct} distinct, mean k {mean_k:.2f}, logits std "
            f"{logits.std():.2f}, bf16 off by {(golden['logits_bf16'] - logits[0]).abs().max():.3f}, "
            f"{(folder / 'model.safetensors').stat().st_size} bytes"), None


def main():
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        for seed in range(1000):
            figures, reason = attempt(HERE / name, CASES[name], seed)
            print(f"{name}: seed {seed}: {figures or 'rejected: ' + reason}", flush=True)
            if figures:
                break
        else:
            sys.exit(f"{name}: no seed will do")


if __name__ == "__main__":
    main()
