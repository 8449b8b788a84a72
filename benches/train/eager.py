"""The decoder that moe-train trains, as one would write it in eager PyTorch.

Legend: B sequences of S tokens, T = B·S, D model width, E experts, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02
ACTIVATIONS = {"gelu": lambda h: F.gelu(h, approximate="tanh"), "relu": F.relu, "silu": F.silu}


def learning_rate_share(spec: dict, step: int) -> float:
    """Linear warm-up, then a cosine, as a share of the recipe's rate; steps count from 0."""
    warm = spec["warmup_steps"]
    if step < warm:
        return (step + 1) / warm
    done = min((step - warm) / max(spec["steps"] - warm, 1), 1.0)
    low = spec["lr_min_share"]
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))


def optimizer(model: nn.Module, spec: dict) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and embeddings only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": spec["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=spec["lr"], betas=(spec["beta1"], spec["beta2"]), eps=spec["eps"], fused=True)


def norm(spec: dict) -> nn.Module:
    kinds = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
    return kinds[spec["norm"]](spec["hidden"], eps=spec["norm_eps"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `x [B, heads, S, head width]`, halves rotated."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, spec: dict):
        super().__init__()
        self.heads = spec["heads"]
        self.kv_heads = spec.get("kv_heads", self.heads)
        self.width = spec["hidden"] // self.heads
        self.qkv = nn.Linear(spec["hidden"], (self.heads + 2 * self.kv_heads) * self.width, bias=spec["bias"])
        self.down = nn.Linear(self.heads * self.width, spec["hidden"], bias=spec["bias"])

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, seq, _ = x.shape
        qkv = self.qkv(x).view(batch, seq, -1, self.width).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.down(seen.transpose(1, 2).reshape(batch, seq, -1))


class FeedForward(nn.Module):
    def __init__(self, spec: dict, width: int):
        super().__init__()
        self.activation = spec["activation"]
        wide = 2 * width if self.activation == "swiglu" else width
        self.up = nn.Linear(spec["hidden"], wide, bias=spec["bias"])
        self.down = nn.Linear(width, spec["hidden"], bias=spec["bias"])

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.activation == "swiglu":
            gate, up = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(ACTIVATIONS[self.activation](h))


class Router:
    """The recipe's routers that the benchmark knows: `topk:K`, `dynk:τ,mass=full` and `uniform:K`."""

    def __init__(self, text: str, experts: int):
        head, *options = text.split(",")
        self.name, _, argument = head.partition(":")
        if self.name == "native":
            self.name, argument = "topk", str(experts)
        if self.name not in ("topk", "dynk", "uniform") or any(option != "mass=full" for option in options):
            raise SystemExit(f"router {text}: the benchmark has topk:K, dynk:τ,mass=full and uniform:K only")
        self.argument = float(argument)

    def choose(self, p: Tensor) -> Tensor:
        """Which experts each token takes, `[T, E]`, from the gate's probabilities `p [T, E]`."""
        chosen = torch.zeros_like(p, dtype=torch.bool)
        if self.name == "dynk":
            ordered, expert = p.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered
            return chosen.scatter(1, expert, before < self.argument)
        scores = torch.rand_like(p) if self.name == "uniform" else p
        return chosen.scatter(1, scores.topk(int(self.argument), dim=-1).indices, True)


class Mixture(nn.Module):
    def __init__(self, spec: dict, loss: dict, gate: nn.Linear | None):
        super().__init__()
        self.spec, self.loss, self.gate = spec, loss, gate
        self.router = Router(spec["router"], spec["experts"])
        self.experts = nn.ModuleList(FeedForward(spec, spec["expert_width"]) for _ in range(spec["experts"]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Output for `x [T, D]`, the weighted auxiliary losses, and how many rows experts were chosen for."""
        # The gate is f32 in every precision; without one, all experts weigh the same.
        with torch.autocast("cpu", enabled=False):
            z = self.gate(x.float()) if self.gate is not None else x.new_zeros(len(x), len(self.experts))
            p = z.softmax(dim=-1)
        with torch.no_grad():
            chosen = self.router.choose(p)
        rows = int(chosen.sum())
        kept = chosen
        if "capacity" in self.spec:
            most = math.ceil(self.spec["capacity"] * rows / len(self.experts))
            kept = chosen & (chosen.cumsum(dim=0) <= most)
        weight = p * chosen
        if self.spec["renormalise"]:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = torch.where(kept[:, e])[0]
            y = expert(x.index_select(0, token)) * weight[token, e].unsqueeze(1)
            out.index_add_(0, token, y.to(out.dtype))
        return out, self.auxiliary(z, p, chosen), rows

    def auxiliary(self, z: Tensor, p: Tensor, chosen: Tensor) -> Tensor:
        """Load balance `E · Σ f_e P_e`, z-loss and entropy of the gate, weighted as the recipe says."""
        total = z.new_zeros(())
        if self.loss["balance"]:
            share = chosen.sum(dim=0) / chosen.sum()
            total = total + self.loss["balance"] * len(self.experts) * (share * p.mean(dim=0)).sum()
        if self.loss["z_loss"]:
            total = total + self.loss["z_loss"] * z.logsumexp(dim=-1).square().mean()
        entropy = self.loss["dynk_entropy"] - self.loss["entropy_floor"]
        if entropy:
            total = total - entropy * (p * z.log_softmax(dim=-1)).sum(dim=-1).mean()
        return total


class Block(nn.Module):
    def __init__(self, spec: dict, ffn: nn.Module):
        super().__init__()
        self.attention_norm, self.ffn_norm = norm(spec), norm(spec)
        self.attention, self.ffn = Attention(spec), ffn
        self.dropout = nn.Dropout(spec["dropout"])

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | float, int]:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope))
        normed, auxiliary, rows = self.ffn_norm(x), 0.0, 0
        if isinstance(self.ffn, Mixture):
            out, auxiliary, rows = self.ffn(normed.flatten(0, 1))
            out = out.view_as(x)
        else:
            out = self.ffn(normed)
        return x + self.dropout(out), auxiliary, rows


class Decoder(nn.Module):
    """Pre-norm residual blocks between the embedding and the head."""

    def __init__(self, spec: dict, loss: dict, vocab: int):
        super().__init__()
        hidden, layers = spec["hidden"], spec["layers"]
        is_moe = [spec["experts"] > 0 and (i + 1) % spec["moe_every"] == 0 for i in range(layers)]
        self.mixtures = sum(is_moe)
        self.embedding = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(spec["context"], hidden) if spec["position"] == "learned" else None
        self.dropout = nn.Dropout(spec["dropout"])
        self.blocks = nn.ModuleList(Block(spec, ffn) for ffn in feed_forwards(spec, loss, is_moe))
        self.norm = norm(spec)
        self.head = nn.Linear(hidden, vocab, bias=False)
        if spec["tied"]:
            self.head.weight = self.embedding.weight
        if spec["position"] == "rope":
            width = hidden // spec["heads"]
            frequency = spec["rope_theta"] ** (-torch.arange(0, width, 2) / width)
            angle = torch.outer(torch.arange(spec["context"]), frequency).repeat(1, 2)
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)
        self.initialise(layers)

    @torch.no_grad()
    def initialise(self, layers: int) -> None:
        """As GPT-2: what is added to the residual is drawn smaller."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith("down.weight")
                parameter.normal_(std=INIT_STD / math.sqrt(2 * layers) if residual else INIT_STD)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | float, int]:
        """Cross-entropy, the auxiliary losses' mean over mixtures, and the rows routed in all mixtures."""
        seq = tokens.shape[1]
        x, rope = self.embedding(tokens), None
        if self.positions is not None:
            x = x + self.positions.weight[:seq]
        else:
            rope = self.cos[:seq], self.sin[:seq]
        x = self.dropout(x)
        auxiliary, rows = 0.0, 0
        for block in self.blocks:
            x, added, routed = block(x, rope)
            auxiliary, rows = auxiliary + added, rows + routed
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, auxiliary / max(self.mixtures, 1), rows


def feed_forwards(spec: dict, loss: dict, is_moe: list[bool]) -> list[nn.Module]:
    """One per layer: a mixture, or a dense net."""

    def gate() -> nn.Linear | None:
        return None if spec["router"].startswith("uniform") else nn.Linear(spec["hidden"], spec["experts"], bias=False)

    shared = gate() if spec["shared_router"] and any(is_moe) else None
    dense = spec.get("dense_width", spec["expert_width"])
    return [Mixture(spec, loss, shared or gate()) if moe else FeedForward(spec, dense) for moe in is_moe]
