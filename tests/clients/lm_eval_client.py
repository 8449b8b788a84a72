"""lm-eval's `local-completions` against a running server, compared sample by sample with transformers on the same weights.

    python lm_eval_client.py --url http://127.0.0.1:8000 --checkpoint models/stories [--model NAME]

The server must serve that checkpoint with `--dtype f32` and its native router. Log-likelihoods must agree within 1e-3,
"is this greedy?" and generated texts exactly. Exits 1 if anything differs.
"""

import argparse
import json
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

TASKS = Path(__file__).parent / "lm_eval_tasks"
# Nats; the server's f32 sums are in another order than transformers'.
TOLERANCE = 1e-3


def read_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--checkpoint", required=True, help="folder with the weights and the tokenizer that are served")
    parser.add_argument("--model", help="default: the first that is listed")
    parser.add_argument("--api-key")
    return parser.parse_args()


args = read_args()
# Nothing of this may come from the network, or stay in the home folder.
scratch = tempfile.TemporaryDirectory(prefix="lm-eval-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": scratch.name}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
os.environ["OPENAI_API_KEY"] = args.api_key or ""

import lm_eval  # noqa: E402 (reads the environment when imported)
import yaml  # noqa: E402


def tasks():
    """The tasks of the folder, with the paths of their data made absolute."""
    found = []
    for path in sorted(TASKS.glob("*.yaml")):
        task = yaml.safe_load(path.read_text())
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"]["data_files"] = {split: str(TASKS / name) for split, name in files.items()}
        found.append(task)
    return found


def samples(model, model_args, batch_size=1):
    """What a model answered: {(task, document): [answers]}."""
    result = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=tasks(),
        batch_size=batch_size,
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return {
        (task, sample["doc_id"]): [answer for answers in sample["resps"] for answer in answers]
        for task, found in result["samples"].items()
        for sample in found
    }


def difference(own, other):
    """How far two answers are apart in nats; None where they are of another kind or text."""
    match own, other:
        case (str(), str()):
            return 0.0 if own == other else None
        case (float(), float()):
            return abs(own - other)
        case ([float(), bool()] | (float(), bool()), [float(), bool()] | (float(), bool())):
            return abs(own[0] - other[0]) if own[1] == other[1] else None
    return None


def compare(name, served, reference):
    """The number of answers that are not the reference's."""
    if served.keys() != reference.keys():
        print(f"FAILED  {name}: other samples than the reference's")
        return 1
    largest, count, wrong = 0.0, 0, 0
    for key, answers in served.items():
        for i, (own, other) in enumerate(zip(answers, reference[key], strict=True)):
            apart = difference(own, other)
            count += 1
            if apart is None or not apart <= TOLERANCE:
                wrong += 1
                print(f"FAILED  {name}: {key} answer {i}: {own} instead of {other}")
            else:
                largest = max(largest, apart)
    print(f"{'FAILED ' if wrong else 'ok     '} {name}: {count} answers, at most {largest:.1e} apart, {wrong} wrong", flush=True)
    return wrong


def models():
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    request = urllib.request.Request(args.url.rstrip("/") + "/v1/models", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        return [model["id"] for model in json.load(response)["data"]]


def main():
    reference = samples("hf", {"pretrained": args.checkpoint, "dtype": "float32", "device": "cpu", "max_length": 1024})
    print(f"reference: {len(reference)} samples, {sum(map(len, reference.values()))} answers of transformers in f32")
    served = {
        "base_url": args.url.rstrip("/") + "/v1/completions",
        "model": args.model or models()[0],
        "tokenizer": args.checkpoint,
        "tokenizer_backend": "huggingface",
        "max_length": 1024,
        "max_retries": 1,
    }
    ways = {
        "token ids, one at a time": {},
        "token ids, batches of 4": {"batch_size": 4},
        "token ids, 4 at the same time": {"num_concurrent": 4},
        "text, one at a time": {"tokenized_requests": False},
        "text, batches of 4": {"tokenized_requests": False, "batch_size": 4},
    }
    wrong = 0
    for name, way in ways.items():
        batch_size = way.pop("batch_size", 1)
        wrong += compare(name, samples("local-completions", served | way, batch_size), reference)
    print(f"lm-eval {lm_eval.__version__}: {wrong} answers wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
