"""Runs the tests once with transformers in bf16 on the CPU; compare.py starts it, and reads the JSON it prints last.

Every test is run with each implementation of the experts that transformers offers for this. Nothing is compiled
(torch.compile): the routed rows differ from call to call.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

IMPLEMENTATIONS = ("grouped_mm", "eager")
INIT_STD = 0.02
# Random values are drawn once and repeated; a prime number, so that no two rows of a matrix are alike.
TILE = 4_194_301


def counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def random_model(config: Path, layers: int | None) -> torch.nn.Module:
    """A model of the config's shapes. Its own initialisation would draw every value of its own, which takes minutes."""
    values = json.loads(config.read_text())
    if layers is not None:
        values["num_hidden_layers"] = layers
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.bfloat16)
    model.tie_weights()
    tile = (torch.randn(TILE) * INIT_STD).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                flat = parameter.view(-1)
                for start in range(0, len(flat), TILE):
                    part = flat[start : start + TILE]
                    part.copy_(tile[: len(part)])
    return model.eval()


def vocabulary(model: torch.nn.Module) -> int:
    return model.config.get_text_config().vocab_size


def prefill(model: torch.nn.Module, batch: int, length: int):
    """The outputs, with the cache, of random tokens; logits of the last position alone."""
    tokens = torch.randint(vocabulary(model), (batch, length))
    return model(input_ids=tokens, use_cache=True, logits_to_keep=1)


def generate(model: torch.nn.Module, outputs, steps: int):
    """`steps` greedy tokens for every sequence, end tokens ignored."""
    for _ in range(steps):
        tokens = outputs.logits[:, -1].argmax(dim=-1, keepdim=True)
        cache = outputs.past_key_values
        outputs = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return outputs


def tokens_per_second(call, tokens: int) -> float:
    start = time.perf_counter()
    call()
    return tokens / (time.perf_counter() - start)


def run_tests(model: torch.nn.Module, args) -> list[dict]:
    """One entry per test and implementation. What comes before a timed call warms up the same shapes."""
    found = []

    def note(test: str, implementation: str, speed: float) -> None:
        found.append({"test": test, "implementation": implementation, "tokens_per_s": speed})

    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        for length in args.prompt:
            prefill(model, 1, length)
            note(f"pp{length}", implementation, tokens_per_second(lambda: prefill(model, 1, length), length))
        for batch in args.batch:
            generate(model, prefill(model, batch, args.context), 2)
            outputs = prefill(model, batch, args.context)
            speed = tokens_per_second(lambda: generate(model, outputs, args.generate), batch * args.generate)
            note(f"tg{args.generate}@b{batch}", implementation, speed)
    return found


def peak_bytes() -> int:
    """The most memory this process ever held. Linux has it as VmHWM, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path)
    source.add_argument("--config", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--prompt", type=counts, required=True)
    parser.add_argument("--batch", type=counts, required=True)
    parser.add_argument("--generate", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    libraries = peak_bytes()
    start = time.perf_counter()
    if args.checkpoint:
        # In evaluation mode, as from_pretrained leaves it.
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16, local_files_only=True)
    else:
        model = random_model(args.config, args.layers)
    load = time.perf_counter() - start
    with torch.inference_mode():
        found = run_tests(model, args)
    facts = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "libraries_bytes": libraries,
    }
    print(json.dumps({"runs": found, "load_s": load, "peak_bytes": peak_bytes(), "facts": facts}))


if __name__ == "__main__":
    main()
