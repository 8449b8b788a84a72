"""Writes a checkpoint, or random weights of a config's shapes, as a bf16 GGUF file without a vocabulary.

    python write_gguf.py (--checkpoint DIR | --config CONFIG.json [--layers N]) --out FILE

llama.cpp's own converter refuses tokenizers that it does not know, and its benchmarks feed token ids: a file without a
vocabulary is enough for them. As with that converter, norms and the routers' matrices are stored in f32. Tensors are
made and written one after the other, so that no more than one is in memory.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

INIT_STD = 0.02
# Hugging Face's model_type: llama.cpp's architecture, the block with the experts, names of an expert's matrices.
FAMILIES = {
    "mixtral": ("llama", "block_sparse_moe", {"gate": "w1", "down": "w2", "up": "w3"}),
    "olmoe": ("olmoe", "mlp", {"gate": "gate_proj", "down": "down_proj", "up": "up_proj"}),
}


class Shapes:
    """What the tensors' shapes follow from, read from config.json."""

    def __init__(self, config: dict):
        self.hidden = config["hidden_size"]
        self.width = config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or self.hidden // self.heads
        self.experts = config.get("num_local_experts") or config["num_experts"]
        self.vocab = config["vocab_size"]
        self.layers = config["num_hidden_layers"]
        self.tied = config.get("tie_word_embeddings", False)


def tensors(family: str, of: Shapes) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name in the GGUF file, name in the checkpoint, shape, and for rotated projections the number of heads, else 0.

    A name with {expert} stands for as many tensors as there are experts, stacked.
    """
    _, block, matrices = FAMILIES[family]
    q, kv = of.heads * of.head_dim, of.kv_heads * of.head_dim
    yield "token_embd", "model.embed_tokens", (of.vocab, of.hidden), 0
    for i in range(of.layers):
        ours, theirs = f"blk.{i}", f"model.layers.{i}"
        yield f"{ours}.attn_norm", f"{theirs}.input_layernorm", (of.hidden,), 0
        yield f"{ours}.attn_q", f"{theirs}.self_attn.q_proj", (q, of.hidden), of.heads
        yield f"{ours}.attn_k", f"{theirs}.self_attn.k_proj", (kv, of.hidden), of.kv_heads
        yield f"{ours}.attn_v", f"{theirs}.self_attn.v_proj", (kv, of.hidden), 0
        yield f"{ours}.attn_output", f"{theirs}.self_attn.o_proj", (of.hidden, q), 0
        if family == "olmoe":
            yield f"{ours}.attn_q_norm", f"{theirs}.self_attn.q_norm", (q,), 0
            yield f"{ours}.attn_k_norm", f"{theirs}.self_attn.k_norm", (kv,), 0
        yield f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm", (of.hidden,), 0
        yield f"{ours}.ffn_gate_inp", f"{theirs}.{block}.gate", (of.experts, of.hidden), 0
        for what, name in matrices.items():
            shape = (of.hidden, of.width) if what == "down" else (of.width, of.hidden)
            yield f"{ours}.ffn_{what}_exps", f"{theirs}.{block}.experts.{{expert}}.{name}", (of.experts, *shape), 0
    yield "output_norm", "model.norm", (of.hidden,), 0
    if not of.tied:
        yield "output", "lm_head", (of.vocab, of.hidden), 0


def stored_as(name: str, shape: tuple[int, ...]) -> Type:
    return Type.F32 if len(shape) == 1 or name.endswith("ffn_gate_inp") else Type.BF16


def to_bf16(values: np.ndarray) -> np.ndarray:
    """f32 values rounded to the nearest bf16, ties to even, as their 16 bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotated projection from the order that pairs a head's halves to the one that pairs neighbours."""
    rows, inputs = values.shape
    return values.reshape(heads, 2, rows // heads // 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


Source = Callable[[str, str, tuple[int, ...]], np.ndarray]


def random_source(seed: int = 0) -> Source:
    """Norms are 1, all else is drawn from N(0, 0.02²)."""
    generator = np.random.default_rng(seed)

    def tensor(name: str, _: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        if stored_as(name, shape) is Type.F32:
            return generator.standard_normal(shape, np.float32) * np.float32(INIT_STD)
        parts = np.empty((shape[0], *shape[1:]), np.uint16)
        # By parts: the f32 values of all experts would take twice the tensor's own memory.
        step = max(1, 2**22 // int(np.prod(shape[1:])))
        for start in range(0, shape[0], step):
            part = parts[start : start + step]
            part[...] = to_bf16(generator.standard_normal(part.shape, np.float32) * np.float32(INIT_STD))
        return parts

    return tensor


def checkpoint_source(folder: Path) -> Source:
    """Tensors of the safetensors files in `folder`."""
    import torch
    from safetensors import safe_open

    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    of = {name: file for file in files for name in file.keys()}

    def tensor(name: str, theirs: str, shape: tuple[int, ...]) -> np.ndarray:
        names = [theirs.format(expert=expert) for expert in range(shape[0])] if "{expert}" in theirs else [theirs]
        values = torch.stack([of[f"{one}.weight"].get_tensor(f"{one}.weight") for one in names]).reshape(shape)
        if stored_as(name, shape) is Type.F32:
            return values.float().numpy()
        return values.bfloat16().view(torch.uint16).numpy()

    return tensor


def describe(writer: gguf.GGUFWriter, config: dict, of: Shapes) -> None:
    writer.add_vocab_size(of.vocab)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(of.hidden)
    writer.add_block_count(of.layers)
    writer.add_feed_forward_length(of.width)
    writer.add_head_count(of.heads)
    writer.add_head_count_kv(of.kv_heads)
    writer.add_key_length(of.head_dim)
    writer.add_value_length(of.head_dim)
    writer.add_rope_dimension_count(of.head_dim)
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(of.experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")


def check(config: dict) -> None:
    """Refuses what llama.cpp would compute otherwise, or this file does not write."""
    family = config["model_type"]
    if family not in FAMILIES:
        sys.exit(f"model_type {family} is not written as GGUF here; these are: {', '.join(FAMILIES)}")
    if family == "olmoe" and (config.get("norm_topk_prob") or config.get("clip_qkv")):
        sys.exit("llama.cpp's olmoe neither renormalises the experts' weights (norm_topk_prob) nor clips (clip_qkv)")
    if config.get("sliding_window"):
        sys.exit(f"sliding_window {config['sliding_window']} is not written as GGUF here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path)
    source.add_argument("--config", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    config = json.loads((args.config or args.checkpoint / "config.json").read_text())
    if args.layers is not None:
        config["num_hidden_layers"] = args.layers
    check(config)
    of, family = Shapes(config), config["model_type"]
    listed = list(tensors(family, of))
    weights = checkpoint_source(args.checkpoint) if args.checkpoint else random_source()

    architecture = FAMILIES[family][0]
    writer = gguf.GGUFWriter(args.out, architecture)
    describe(writer, config, of)
    for name, _, shape, _ in listed:
        kind = stored_as(name, shape)
        item = 4 if kind is Type.F32 else 2
        # The NumPy type does not count beside raw_dtype: NumPy has no bf16.
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.uint16), int(np.prod(shape)) * item, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, theirs, shape, heads in listed:
        values = weights(name, theirs, shape)
        # llama.cpp rotates neighbours in its llama architecture, halves in olmoe, as Hugging Face does in both.
        if heads and architecture == "llama":
            values = interleave(values, heads)
        writer.write_tensor_data(np.ascontiguousarray(values))
    writer.close()


if __name__ == "__main__":
    main()
