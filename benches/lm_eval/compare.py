"""Times moe-eval beside lm-eval with transformers on the same samples, and checks that they predict the same.

    pip install lm_eval==0.4.13 transformers==5.17.0 torch==2.15.0 datasets==5.2.0 accelerate==1.15.0
    cargo build --release --bin moe-eval
    python benches/lm_eval/compare.py --data DIR --checkpoint DIR --moe-eval target/release/moe-eval

--data is laid out as tests/golden/lm_eval/make.py describes. Both sides run in float32 on all cores and read one
temporary copy of the checkpoint whose context is --context tokens (0 leaves it as it is), so that long few-shot prompts
are not cut. lm-eval gets the faster of the batch sizes 1 and 8, tried once per task (16 was slower than either).
Then the two take turns for --rounds rounds. Without --moe-eval only lm-eval is timed.

Of lm-eval, `model` is the time in the model's two calls (loglikelihood, generate_until) and `whole` that of
simple_evaluate; imports, reading the task list and loading the model do not count. Of moe-eval, `model` is what it
reports for its samples and `whole` the life of the process. `cpu` is the processor time within `whole`, the figure to
go by on a busy machine. The table shows medians; the last line is one JSON object.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/golden/lm_eval"))

from make import by_doc, choice, install, version  # sets the offline mode before lm_eval is imported

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

BATCH_SIZES = (1, 8)


class TimedLM(HFLM):
    """HFLM that adds up the time of its calls."""

    seconds = 0.0

    def timed(self, call, *args, **kwargs):
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start

    def loglikelihood(self, *args, **kwargs):
        return self.timed(super().loglikelihood, *args, **kwargs)

    def generate_until(self, *args, **kwargs):
        return self.timed(super().generate_until, *args, **kwargs)


def copy_checkpoint(checkpoint, folder, context):
    """Links to the checkpoint's files, but for a config.json with another context length.

    It also turns off `output_router_logits`, a leftover of training that costs transformers a loss per step and stops
    it from generating in padded batches.
    """
    for path in checkpoint.resolve().iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((checkpoint / "config.json").read_text())
    config["output_router_logits"] = False
    if context:
        config["max_position_embeddings"] = context
    (folder / "config.json").write_text(json.dumps(config))


def jobs(args):
    """Per task: what lm-eval and moe-eval are asked."""
    return {
        "mmlu": (
            {"tasks": ["mmlu"], "num_fewshot": 5, "limit": args.mmlu_limit},
            ["--tasks", "mmlu", "--shots", "5", "--limit", str(args.mmlu_limit)],
        ),
        "bbh": (
            {"tasks": ["bbh"], "limit": args.bbh_limit, "gen_kwargs": {"max_gen_toks": args.max_gen_tokens}},
            ["--tasks", "bbh", "--limit", str(args.bbh_limit), "--max-gen-tokens", str(args.max_gen_tokens)],
        ),
    }


def run_lm_eval(lm, tasks, asked, batch_size):
    """Times, and the predictions by task, row and metric."""
    lm.batch_size_per_gpu = batch_size
    lm.seconds = 0.0
    start, cpu = time.perf_counter(), time.process_time()
    results = lm_eval.simple_evaluate(model=lm, task_manager=tasks, log_samples=True, **asked)
    times = {"model": lm.seconds, "whole": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    predictions = {}
    for task, entries in results["samples"].items():
        for doc, entries in by_doc(entries):
            for entry in entries:
                if "acc" in entry:
                    predictions[task, doc, "acc"] = choice(entry)["prediction"]
                else:
                    predictions[task, doc, f"exact_match,{entry['filter']}"] = entry["filtered_resps"][0]
    return times, predictions


def children_cpu():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_moe_eval(program, model, data, flags):
    with tempfile.TemporaryDirectory() as output:
        command = [program, "--model", model, "--data-dir", data, "--dtype", "f32", "--output", output, "--offline", *flags]
        start, cpu = time.perf_counter(), children_cpu()
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        whole, cpu = time.perf_counter() - start, children_cpu() - cpu
        if done.returncode:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
        results = json.loads((Path(output) / "results.json").read_text())
        tasks = results["arms"][0]["tasks"]
        times = {"model": sum(task["seconds"] for task in tasks), "whole": whole, "cpu": cpu}
        metrics = {task["task"]: [metric["name"] for metric in task["metrics"]] for task in tasks}
        return times, moe_eval_predictions(Path(output) / "samples.jsonl", metrics)


def moe_eval_predictions(path, metrics):
    """The predictions by subtask, row and metric."""
    predictions = {}
    for line in path.read_text().splitlines():
        outcome = json.loads(line).get("outcome")
        if outcome:
            for metric, judged in zip(metrics[outcome["task"]], outcome["judged"], strict=True):
                predictions[outcome["subtask"], outcome["row"], metric] = judged["prediction"]
    return predictions


def fastest_batch_size(lm, tasks, task, asked):
    seconds = {}
    for batch_size in BATCH_SIZES:
        times, _ = run_lm_eval(lm, tasks, asked, batch_size)
        seconds[batch_size] = times["model"]
        shown = ", ".join(f"{what} {value:.2f} s" for what, value in times.items())
        print(f"{task}: lm-eval at batch size {batch_size}: {shown}", flush=True)
    return min(seconds, key=seconds.get)


def compare(args, lm, model, task, asked, flags, tasks):
    batch_size = fastest_batch_size(lm, tasks, task, asked)
    times, differences = defaultdict(list), 0
    for _ in range(args.rounds):
        theirs, expected = run_lm_eval(lm, tasks, asked, batch_size)
        for what, seconds in theirs.items():
            times["lm_eval", what].append(seconds)
        if args.moe_eval:
            ours, found = run_moe_eval(args.moe_eval.resolve(), model, args.data, flags)
            for what, seconds in ours.items():
                times["moe_eval", what].append(seconds)
            keys = expected.keys() | found.keys()
            differences = max(differences, sum(expected.get(key) != found.get(key) for key in keys))
    row = {"task": task, "batch_size": batch_size, "predictions": len(expected)}
    for (program, what), seconds in times.items():
        row[f"{program}_{what}_s"] = round(statistics.median(seconds), 3)
    if args.moe_eval:
        row["differences"] = differences
        for what in ("model", "whole", "cpu"):
            row[f"ratio_{what}"] = round(row[f"lm_eval_{what}_s"] / row[f"moe_eval_{what}_s"], 2)
    return row


def machine():
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--moe-eval", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--mmlu-limit", type=int, default=10)
    parser.add_argument("--bbh-limit", type=int, default=2)
    parser.add_argument("--max-gen-tokens", type=int, default=128)
    args = parser.parse_args()

    torch.set_num_threads(os.cpu_count())
    install(args.data)
    tasks = TaskManager()
    facts = {"date": datetime.date.today().isoformat(), "checkpoint": args.checkpoint.resolve().name, **machine()}
    with tempfile.TemporaryDirectory() as folder:
        copy_checkpoint(args.checkpoint, Path(folder), args.context)
        lm = TimedLM(pretrained=folder, dtype="float32", device="cpu")
        facts |= {
            "context": lm.max_length,
            "versions": {name: version(name) for name in ("lm_eval", "transformers", "torch")},
            "attention": lm.model.config._attn_implementation,
            "experts": lm.model.config._experts_implementation,
        }
        if args.moe_eval:
            program = subprocess.run([args.moe_eval.resolve(), "--version"], capture_output=True, text=True, check=True)
            facts["versions"]["moe_eval"] = program.stdout.strip()
        rows = [
            compare(args, lm, folder, task, asked, flags, tasks) for task, (asked, flags) in jobs(args).items()
        ]
    columns = list(rows[0])
    for cells in (columns, *([str(row[column]) for column in columns] for row in rows)):
        print(" ".join(cell.rjust(len(column)) for cell, column in zip(cells, columns, strict=True)))
    print(json.dumps(facts | {"rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
