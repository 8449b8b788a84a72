"""A golden for a checkpoint that moe-train wrote: what Hugging Face computes with it.

    pip install transformers==5.17.0 torch==2.15.0 safetensors numpy
    moe-train --recipe tests/train/tiny.toml --variant mixtral --synthetic --out /tmp/exported
    python tests/golden/exported.py /tmp/exported/mixtral/model

Writes config.json, model.safetensors and golden.safetensors, as make.py describes them, to tests/golden/mixtral_exported.
"""

import shutil
import sys
from pathlib import Path

import torch
from make import HERE, LENGTH, MIN_EXPERT_GAP, MIN_LOGIT_GAP, PROMPT, continue_greedily, expert_gap, forward
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def load(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    source, target = Path(sys.argv[1]), HERE / "mixtral_exported"
    target.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, target / name)
    exact, rounded = load(target, torch.float32), load(target, torch.bfloat16)
    k = exact.config.num_experts_per_tok
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, exact.config.vocab_size, (LENGTH,), generator=generator)
        greedy, logit_gap = continue_greedily(exact, ids[:PROMPT])
        (logits, router), (logits_bf16, router_bf16) = forward(exact, ids[None]), forward(rounded, ids[None])
        gap = min(expert_gap(r, k).min().item() for r in (router, forward(exact, greedy[None])[1]))
        same = torch.equal(*(r.float().topk(k).indices.sort().values for r in (router, router_bf16)))
        if logit_gap > MIN_LOGIT_GAP and gap > MIN_EXPERT_GAP and same:
            break
    else:
        sys.exit("no seed will do")
    golden = {"input_ids": ids, "logits_f32": logits[0], "logits_bf16": logits_bf16[0].float(), "greedy_ids": greedy[PROMPT:]}
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, target / "golden.safetensors")
    print(f"seed {seed}: logit gap {logit_gap:.4f}, expert gap {gap:.5f}")


if __name__ == "__main__":
    main()
