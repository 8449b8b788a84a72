"""Times the steps of moe-train beside the same model in eager PyTorch, on the same CPU.

    pip install torch==2.15.0
    cargo build --release --bin moe-train
    python benches/train/compare.py --recipe models/stories/recipe.toml [--variant NAME] [-- --data FILE]

What stands after `--` goes to moe-train; without it moe-train makes its data itself (--synthetic). PyTorch gets random
tokens of the same vocabulary: a step costs the same whatever its tokens are, but for how many experts the router takes,
which the table shows as k. Both sides run on all cores, each arm in a process of its own, in turns for --rounds rounds:
PyTorch and moe-train in f32, then PyTorch under bf16 autocast and moe-train with bf16 products.

The recipe is run as it is, but for the number of steps, the precision, evaluation (one window, after the last step),
samples (none) and packing: always a stream, so that every position is scored on both sides. A step is all from the
batch to the updated weights: accumulated forward and backward passes, clipping, AdamW. Of each run counts the median
step after the first 3, of an arm the median over rounds. `peak` is the most memory that the process ever held: with
PyTorch its libraries (torch_libraries_mib is what they hold before there is a model), with moe-train the preparation
of data and the checkpoint at the end. The last line is one JSON object.
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
import tomllib
from collections import defaultdict
from pathlib import Path

PRECISIONS = ("f32", "bf16")
WARM_UP_STEPS = 3
DEFAULTS = {
    "model": {
        "rope_theta": 10_000.0,
        "norm_eps": 1e-5,
        "bias": False,
        "tied": True,
        "dropout": 0.0,
        "moe_every": 1,
        "router": "native",
        "renormalise": True,
        "shared_router": False,
    },
    "loss": {"balance": 0.0, "z_loss": 0.0, "entropy_floor": 0.0, "dynk_entropy": 0.0},
    "optim": {
        "accumulate": 1,
        "lr_min_share": 0.1,
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "clip": 1.0,
    },
}


def merge(base: dict, over: dict) -> dict:
    """`base` with what `over` says in its place, table by table."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def resolve(path: Path, variant: str | None, steps: int) -> dict:
    """The recipe, or one of its variants, such that little but steps is done."""
    recipe = tomllib.loads(path.read_text())
    variants = recipe.pop("variant", {})
    if variant is not None:
        if variant not in variants:
            sys.exit(f"{path}: there is no variant {variant}; it has {', '.join(variants) or 'none'}")
        recipe = merge(recipe, variants[variant])
    changes = {
        "data": {"packing": "stream"},
        "optim": {"steps": steps},
        "eval": {"every": steps + 1, "windows": 1, "windows_last": 1},
        "sample": {"prompts": []},
    }
    return merge(recipe, changes)


def to_toml(value) -> str:
    """A value as TOML, tables inline. Scalars and strings are written as in JSON."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {to_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def write_recipe(recipe: dict, precision: str, path: Path) -> Path:
    recipe = merge(recipe, {"optim": {"precision": precision}})
    path.write_text("".join(f"{key} = {to_toml(value)}\n" for key, value in recipe.items()))
    return path


def run(command: list) -> tuple[str, int]:
    """Standard output, and the most memory that the process held, in bytes."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(words)} failed with {process.returncode}:\n{err.read()}")
        return out.read(), usage.ru_maxrss * 1024


def figures(seconds_s: list[float], tokens: int, peak: int, loss_s: list[float], k_s: list[float]) -> dict:
    """What counts of a run whose steps took `seconds_s`, with `tokens` tokens each."""
    step = statistics.median(seconds_s[WARM_UP_STEPS:])
    return {
        "step_ms": step * 1e3,
        "tokens_s": tokens / step,
        "peak_mib": peak / 2**20,
        "k": statistics.median(k_s[WARM_UP_STEPS:]),
        "first_loss": loss_s[0],
        "last_loss": loss_s[-1],
    }


def run_torch(recipe: dict, vocab: int, precision: str, folder: Path) -> tuple[dict, dict]:
    """Figures of a run, and facts about PyTorch."""
    path = write_recipe(recipe, precision, folder / f"{precision}.toml")
    output, peak = run([sys.executable, __file__, "--recipe", path, "--vocab", vocab, "--arm", precision])
    said = json.loads(output.splitlines()[-1])
    return figures(said["seconds"], said["tokens"], peak, said["loss"], said["k"]), said["facts"]


def run_moe_train(args, recipe: dict, precision: str, folder: Path) -> tuple[dict, int]:
    """Figures of a run, and the size of its vocabulary."""
    # As a variant, for the data that moe-train prepares lies beside the variants' folders and outlives them.
    path = write_recipe(recipe | {"variant": {"timed": {}}}, precision, folder / f"{precision}.toml")
    out = folder / "run"
    flags = ["--recipe", path, "--variant", "timed", "--out", out, "--overwrite", "--device", "cpu"]
    _, peak = run([args.moe_train, *flags, *args.data])
    lines = [json.loads(line) for line in (out / "timed/log.jsonl").read_text().splitlines()]
    log = [line for line in lines if line["kind"] == "step"]
    ends = [0.0, *(entry["seconds"] for entry in log)]
    optim = merge(DEFAULTS["optim"], recipe["optim"])
    found = figures(
        [end - start for start, end in zip(ends, ends[1:])],
        optim["batch"] * optim["seq"] * optim["accumulate"],
        peak,
        [entry["loss"] for entry in log],
        [entry["experts_per_token"] for entry in log],
    )
    return found, json.loads((out / "timed/model/config.json").read_text())["vocab_size"]


def torch_arm(path: Path, vocab: int, precision: str) -> None:
    """Trains in this process; prints the seconds, losses and experts per token of each step as JSON."""
    import torch
    from eager import Decoder, learning_rate_share, optimizer

    libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.set_num_threads(os.cpu_count())
    recipe = merge(DEFAULTS, tomllib.loads(path.read_text()))
    torch.manual_seed(recipe.get("seed", 0))
    spec = recipe["optim"]
    model = Decoder(recipe["model"], recipe["loss"], vocab)
    adam = optimizer(model, spec)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: learning_rate_share(spec, step))
    shape = (spec["accumulate"], spec["batch"], spec["seq"] + 1)
    seconds_s, loss_s, k_s = [], [], []
    for step in range(spec["steps"]):
        data = torch.randint(vocab, shape)
        start = time.perf_counter()
        loss_sum, rows, visits = 0.0, 0, 0
        for window in data:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss, auxiliary, routed = model(window[:, :-1], window[:, 1:])
            ((loss + auxiliary) / spec["accumulate"]).backward()
            loss_sum += loss.item() / spec["accumulate"]
            rows += routed
            visits += model.mixtures * spec["batch"] * spec["seq"]
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        if missing:
            sys.exit(f"no gradient for {', '.join(missing)}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        adam.step()
        schedule.step()
        adam.zero_grad(set_to_none=True)
        seconds_s.append(time.perf_counter() - start)
        loss_s.append(loss_sum)
        k_s.append(rows / max(visits, 1))
    facts = {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_libraries_mib": round(libraries, 1),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    tokens = spec["accumulate"] * spec["batch"] * spec["seq"]
    print(json.dumps({"seconds": seconds_s, "tokens": tokens, "loss": loss_s, "k": k_s, "facts": facts}))


def machine() -> dict:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def compare(args, recipe: dict, folder: Path) -> tuple[list[dict], dict]:
    """Rows of the table, one per precision, and facts."""
    facts = {}
    vocab = args.vocab
    if args.only != "torch":
        facts["moe_train"] = run([args.moe_train, "--version"])[0].strip()
        if vocab is None:
            _, vocab = run_moe_train(args, recipe, "f32", folder)
    found = defaultdict(list)
    for turn in range(args.rounds):
        for precision in args.precision:
            runs = {}
            if args.only != "moe-train":
                runs["torch"], about = run_torch(recipe, vocab, precision, folder)
                facts |= about
            if args.only != "torch":
                runs["moe_train"], theirs = run_moe_train(args, recipe, precision, folder)
                if theirs != vocab:
                    sys.exit(f"moe-train has a vocabulary of {theirs}, PyTorch of {vocab}; leave --vocab out")
            for program, values in runs.items():
                shown = ", ".join(f"{what} {value:.5g}" for what, value in values.items())
                print(f"round {turn + 1}: {program} {precision}: {shown}", flush=True)
                for what, value in values.items():
                    found[precision, program, what].append(value)
    rows = []
    for precision in args.precision:
        row = {"precision": precision}
        for (of, program, what), values in found.items():
            if of == precision:
                row[f"{program}_{what}"] = float(f"{statistics.median(values):.5g}")
        if args.only is None:
            row["ratio_speed"] = round(row["moe_train_tokens_s"] / row["torch_tokens_s"], 2)
            row["ratio_peak"] = round(row["moe_train_peak_mib"] / row["torch_peak_mib"], 2)
        rows.append(row)
    return rows, facts | {"vocab": vocab}


def main() -> None:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--variant")
    parser.add_argument("--moe-train", type=Path, default=Path("target/release/moe-train"))
    parser.add_argument("--only", choices=("torch", "moe-train"), help="run one side alone; torch asks for --vocab")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--vocab", type=int, help="tokens of the vocabulary; without it, as many as moe-train has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--arm", choices=PRECISIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(words[:split])
    args.data = words[split + 1 :] or ["--synthetic"]
    if args.arm:
        torch_arm(args.recipe, args.vocab, args.arm)
        return
    if args.only == "torch" and args.vocab is None:
        parser.error("--only torch asks for --vocab")
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be above {WARM_UP_STEPS}, for those are not counted")
    args.moe_train = args.moe_train.resolve()

    facts = {"date": datetime.date.today().isoformat(), **machine()}
    recipe = resolve(args.recipe, args.variant, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        rows, more = compare(args, recipe, Path(folder))
    facts |= {"recipe": recipe["name"], "variant": args.variant, **more}
    columns = list(rows[0])
    table = [columns, *([str(row[column]) for column in columns] for row in rows)]
    for column in zip(*table):
        print(column[0].ljust(24), *(cell.rjust(10) for cell in column[1:]))
    print(json.dumps(facts | {"rounds": args.rounds, "steps": args.steps, "rows": rows}))


if __name__ == "__main__":
    main()
