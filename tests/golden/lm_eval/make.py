"""Golden files for moe-eval: what lm-eval's own tasks, filters, metrics and aggregation give.

    pip install lm_eval==0.4.13 transformers==5.17.0 torch==2.15.0 datasets==5.2.0 accelerate==1.15.0
    python tests/golden/lm_eval/make.py --data DIR --out FILE.jsonl [--checkpoint DIR]

--data is a folder with the public files: bbh/bbh/<task>.json, mmlu/{dev,test}/<subject>_{dev,test}.csv and
gsm8k/{train,test}.jsonl. Nothing is downloaded. Runs on the CPU in a few minutes. No text of a dataset gets into the
file: prompts appear as SHA-256 sums.

With --checkpoint a transformers model answers the first samples of every subtask (RUNS), which proves the path from
prompt to prediction. Without it ScriptedLM answers all samples (SCRIPTED_RUNS), which proves prompts, filters, metrics
and aggregation, with right and wrong answers of every form. The lines, one JSON object each:

settings     versions, the model, and what each run asked of lm-eval
choice       one sample: log-likelihoods of the continuations in order, the prediction, acc, and `gap`, the best
             log-likelihood less the second
generation   one sample: the response after the cut at the first stop string; per filter the prediction and exact_match;
             and `gap`, the smallest difference between the two best logits along the generated tokens
digest       one task as the script answered it: the number of samples, and SHA-256 sums of their prompt sums (hex) and,
             per filter, of their predictions, each in the order of the rows and ended by "\\n"
aggregate    one task or group: a metric's value and standard error as simple_evaluate reports them
"""

import argparse
import csv
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import lm_eval
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

RUNS = {
    "bbh": {"tasks": ["bbh"], "limit": 2, "gen_kwargs": {"max_gen_toks": 96}},
    "mmlu": {"tasks": ["mmlu"], "limit": 2},
    "mmlu@5": {"tasks": ["mmlu"], "limit": 1, "num_fewshot": 5},
    "gsm8k": {"tasks": ["gsm8k"], "limit": 6, "gen_kwargs": {"max_gen_toks": 96}},
    "gsm8k_cot": {"tasks": ["gsm8k_cot"], "limit": 6, "gen_kwargs": {"max_gen_toks": 96}},
}

SCRIPTED_RUNS = {
    "bbh": {"tasks": ["bbh"]},
    "mmlu": {"tasks": ["mmlu"]},
    "mmlu@5": {"tasks": ["mmlu"], "num_fewshot": 5},
    "gsm8k": {"tasks": ["gsm8k"]},
    "gsm8k_cot": {"tasks": ["gsm8k_cot"]},
}

# Forms of an answer, right and broken; {answer} is the right one.
PHRASES = [
    "So the answer is {answer}.",
    "So the answer is {answer}",
    " the answer is {answer}. And more.\nthe answer is 7.",
    "the answer is \nthe answer is {answer}.",
    "the answer is  {answer} .",
    "the answer is .",
    "So the answer is 7.",
    "The answer is {answer}.",
    " The answer is {answer}",
    "The answer is ${answer},000.50.",
    " {answer} apples, less 3, are {answer}.00.\n#### {answer}",
    " #### ${answer}",
    "#### {answer}.",
    "#### -{answer},5\n#### 7",
    "$, and {answer} of it, \u00e9t\u00e9 \u0663",
    "",
]


def bbh_rows(data, task):
    examples = json.loads((data / "bbh/bbh" / f"{task}.json").read_text())["examples"]
    return {"test": [{"input": e["input"], "target": e["target"]} for e in examples]}


def mmlu_rows(data, subject):
    splits = {}
    for split in ("dev", "test"):
        with open(data / "mmlu" / split / f"{subject}_{split}.csv", newline="") as file:
            splits[split] = [
                {"question": question, "subject": subject, "choices": choices, "answer": "ABCD".index(letter)}
                for question, *choices, letter in csv.reader(file)
            ]
    return splits


def gsm8k_rows(data, _config):
    return {
        split: [json.loads(line) for line in (data / "gsm8k" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }


ROWS = {"SaylorTwift/bbh": bbh_rows, "cais/mmlu": mmlu_rows, "openai/gsm8k": gsm8k_rows}


def install(data):
    """Lets lm-eval's tasks read their rows from the folder `data` instead of the Hub."""

    def load_dataset(path, name=None, **_options):
        splits = ROWS[path](data, name)
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    datasets.load_dataset = load_dataset


class GapLM(HFLM):
    """HFLM at batch size 1 that also notes how clear each generation was."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gaps = {}

    def tok_batch_encode(self, strings, **kwargs):
        (self.prompt,) = strings
        return super().tok_batch_encode(strings, **kwargs)

    def _model_generate(self, context, **kwargs):
        ids = super()._model_generate(context, **kwargs)
        start = context.shape[1]
        with torch.no_grad():
            best = self.model(ids).logits[0, start - 1 : -1].topk(2)
        assert torch.equal(best.indices[:, 0], ids[0, start:]), "one pass over the tokens prefers others"
        self.gaps[self.prompt] = (best.values[:, 0] - best.values[:, 1]).min().item()
        return ids


class ScriptedLM(LM):
    """Answers by the bytes b of the prompt's SHA-256: continuation i scores -(b[i] % 8), ties included, and a
    generation is PHRASES[b[0] % 16] with the row's answer filled in (of GSM8K the number after "####")."""

    def loglikelihood(self, requests, **_options):
        scores = []
        for request in requests:
            prompt, continuation = request.args
            digest = hashlib.sha256(prompt.encode()).digest()
            scores.append((-float(digest["ABCD".index(continuation.strip())] % 8), False))
        return scores

    def generate_until(self, requests, **_options):
        responses = []
        for request in requests:
            phrase = PHRASES[hashlib.sha256(request.args[0].encode()).digest()[0] % 16]
            row = request.doc
            answer = row["target"] if "target" in row else row["answer"].split("####")[-1].strip()
            responses.append(phrase.replace("{answer}", answer))
        return responses

    def loglikelihood_rolling(self, requests, **_options):
        raise NotImplementedError("no task here asks for it")


def choice(sample):
    scores = [score for ((score, _greedy),) in sample["resps"]]
    best, second = sorted(scores, reverse=True)[:2]
    continuation = sample["arguments"][scores.index(best)][1]
    return {"loglikelihoods": scores, "prediction": continuation.strip(), "acc": sample["acc"], "gap": best - second}


def generation(entries, gaps):
    first = entries[0]
    filters = {
        entry["filter"]: {"prediction": entry["filtered_resps"][0], "exact_match": entry["exact_match"]}
        for entry in entries
    }
    return {"response": first["resps"][0][0], "filters": filters, "gap": gaps[first["arguments"][0][0]]}


def by_doc(entries):
    """lm-eval logs a sample once per filter; here they are together, in the order of the rows."""
    docs = {}
    for entry in entries:
        docs.setdefault(entry["doc_id"], []).append(entry)
    return sorted(docs.items())


def sample_lines(run, samples, gaps):
    for task, entries in samples.items():
        for doc, entries in by_doc(entries):
            is_choice = "acc" in entries[0]
            line = {"kind": "choice" if is_choice else "generation", "run": run, "task": task, "doc": doc}
            line["prompt_sha256"] = entries[0]["prompt_hash"]
            yield line | (choice(entries[0]) if is_choice else generation(entries, gaps))


def sha256(lines):
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def digest_lines(run, samples):
    for task, entries in samples.items():
        docs = [entries for _, entries in by_doc(entries)]
        predictions = {}
        for entry in (entry for entries in docs for entry in entries):
            prediction = choice(entry)["prediction"] if "acc" in entry else entry["filtered_resps"][0]
            predictions.setdefault(entry["filter"], []).append(prediction)
        yield {
            "kind": "digest",
            "run": run,
            "task": task,
            "samples": len(docs),
            "prompts_sha256": sha256(entries[0]["prompt_hash"] for entries in docs),
            "predictions_sha256": {filter_name: sha256(lines) for filter_name, lines in predictions.items()},
        }


def aggregate_lines(run, results):
    groups = results.get("groups", {})
    for name, figures in results["results"].items():
        for key, value in figures.items():
            metric, _, filter_name = key.partition(",")
            if filter_name and not metric.endswith("_stderr"):
                stderr = figures[f"{metric}_stderr,{filter_name}"]
                yield {"kind": "aggregate", "run": run, "name": name, "group": name in groups, "metric": key,
                       "value": value, "stderr": stderr}


def load(checkpoint, threads):
    torch.set_num_threads(threads)
    lm = GapLM(pretrained=str(checkpoint), dtype="float32", batch_size=1, device="cpu")
    return lm, {
        "checkpoint": checkpoint.resolve().name,
        "dtype": "float32",
        "batch_size": 1,
        "max_length": lm.max_length,
        "attention": lm.model.config._attn_implementation,
        "experts": lm.model.config._experts_implementation,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    install(args.data)
    tasks = TaskManager()
    if args.checkpoint:
        runs, (lm, model) = RUNS, load(args.checkpoint, args.threads)
    else:
        runs, lm, model = SCRIPTED_RUNS, ScriptedLM(), {"phrases": PHRASES}
    versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    with open(args.out, "w") as out:
        out.write(json.dumps({"kind": "settings", "versions": versions, **model, "runs": runs}) + "\n")
        for run, asked in runs.items():
            results = lm_eval.simple_evaluate(model=lm, task_manager=tasks, log_samples=True, **asked)
            samples = results["samples"]
            lines = [*(sample_lines(run, samples, lm.gaps) if args.checkpoint else digest_lines(run, samples)),
                     *aggregate_lines(run, results)]
            out.writelines(json.dumps(line) + "\n" for line in lines)
            print(f"{run}: {len(lines)} lines", flush=True)


if __name__ == "__main__":
    main()
