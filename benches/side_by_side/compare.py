"""Times moe-bench beside transformers and llama.cpp: same machine, same shapes, same work, in turns.

    benches/side_by_side/setup.sh DIR
    cargo build --release --bin moe-bench
    python benches/side_by_side/compare.py --scratch DIR --checkpoint models/stories --out results.json
    python benches/side_by_side/compare.py --scratch DIR --config benches/side_by_side/olmoe-1b-7b.json --layers 4

README.md beside this file says what is measured and what the columns mean. The table goes to standard output as
Markdown, progress to standard error, and all samples and facts to --out as one JSON document. What stands after `--`
goes to moe-bench.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS = "moe-serve"
PEERS = ("transformers", "llama.cpp")
GIB = 2**30
# Bytes of a quantized file for one of the bf16 file's, a little above what they are.
QUANTIZED_SHARE = {"q8_0": 0.55, "q4_0": 0.35}
# llama.cpp keeps a sequence's cache in cells of this many.
LLAMA_CELLS = 256
# Runs of it until every result has come through.
LLAMA_TRIES = 10


class Failed(Exception):
    """A program that did not do its work, with the end of what it said."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(command: list, threads: int | None = None) -> tuple[str, str, int]:
    """Standard output, standard error, and the most memory that the process held, in bytes."""
    words = [str(word) for word in command]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            process = subprocess.Popen(words, stdout=out, stderr=err, env=env)
        except OSError as error:
            raise Failed(f"{words[0]}: {error.strerror}") from None
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        output, errors = out.read(), err.read()
    if process.returncode:
        said = "\n".join((errors or output).splitlines()[-12:])
        raise Failed(f"{' '.join(words)} ended with {process.returncode}:\n{said}")
    return output, errors, usage.ru_maxrss * 1024


def commas(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def test_names(args) -> list[str]:
    return [f"pp{length}" for length in args.prompt] + [f"tg{args.generate}@b{batch}" for batch in args.batch]


def run_moe_bench(args) -> dict:
    if args.checkpoint:
        source = ["--model", args.checkpoint]
    else:
        source = ["--random-weights", args.config, *(["--layers", args.layers] if args.layers else [])]
    shape = ["--prompt", commas(args.prompt), "--batch", commas(args.batch), "--generate", args.generate]
    rest = ["--context", args.context, "--router", "native", "--threads", args.threads, "--repeat", 1]
    output, _, peak = run([args.moe_bench, *source, *shape, *rest, *args.more], args.threads)
    document = json.loads(output.splitlines()[-1])
    speeds = {}
    for entry in document["runs"]:
        prompt, generate = re.fullmatch(r"pp\d+", entry["test"]), re.fullmatch(r"(tg\d+)(@b\d+)?", entry["test"])
        if prompt:
            speeds[entry["test"], ""] = entry["tokens_per_s"]
        elif generate:
            speeds[f"{generate[1]}{generate[2] or '@b1'}", ""] = entry["tokens_per_s"]
    facts = {key: value for key, value in document.items() if key not in ("runs", "peak_rss_bytes", "load_s")}
    return {
        "speeds": speeds,
        "peak_bytes": document.get("peak_rss_bytes", peak),
        "load_s": document.get("load_s"),
        "facts": facts,
    }


def run_transformers(args) -> dict:
    if args.checkpoint:
        source = ["--checkpoint", args.checkpoint]
    else:
        source = ["--config", args.config, *(["--layers", args.layers] if args.layers else [])]
    shape = ["--prompt", commas(args.prompt), "--batch", commas(args.batch), "--generate", args.generate]
    rest = ["--context", args.context, "--threads", args.threads]
    output, _, _ = run([args.python, HERE / "transformers_arm.py", *source, *shape, *rest], args.threads)
    document = json.loads(output.splitlines()[-1])
    speeds = {(entry["test"], entry["implementation"]): entry["tokens_per_s"] for entry in document.pop("runs")}
    return {"speeds": speeds, **document}


def run_llama(args, model: Path) -> dict:
    """llama-bench for prompts, llama-batched-bench for decoding: each what llama.cpp has for it."""
    # Read into memory, not mapped: what llama.cpp repacks would else count twice in the peak.
    common = ["-m", model, "-t", args.threads, "--load-mode", "none"]
    speeds, peaks, facts = {}, [], {"file_bytes": model.stat().st_size}
    if args.prompt:
        flags = ["-p", commas(args.prompt), "-n", 0, "-r", 1, "-o", "json"]
        output, _, peak = run([args.llama / "llama-bench", *common, *flags], args.threads)
        for entry in json.loads(output):
            speeds[f"pp{entry['n_prompt']}", ""] = entry["avg_ts"]
            facts |= {key: entry[key] for key in ("model_type", "flash_attn", "n_ubatch", "type_k") if key in entry}
        peaks.append(peak)
    if args.batch:
        cells = -(-(args.context + args.generate) // LLAMA_CELLS) * LLAMA_CELLS
        flags = ["-tb", args.threads, "--output-format", "jsonl", "-npp", args.context, "-ntg", args.generate]
        missing = args.batch
        # Its log is written by a thread that may lose the last lines when the program ends at once.
        for _ in range(LLAMA_TRIES):
            shape = ["-npl", commas(missing), "-c", max(missing) * cells]
            output, errors, peak = run([args.llama / "llama-batched-bench", *common, *shape, *flags], args.threads)
            for line in (output + "\n" + errors).splitlines():
                if line.startswith("{"):
                    entry = json.loads(line)
                    speeds[f"tg{entry['tg']}@b{entry['pl']}", ""] = entry["speed_tg"]
            peaks.append(peak)
            missing = [batch for batch in missing if (f"tg{args.generate}@b{batch}", "") not in speeds]
            if not missing:
                break
    return {"speeds": speeds, "peak_bytes": max(peaks), "load_s": None, "facts": facts}


def needs_disk(args, bytes_wanted: float, what: str) -> None:
    free = shutil.disk_usage(args.scratch).free
    if free - bytes_wanted < args.keep_free * GIB:
        raise Failed(
            f"{what} takes {bytes_wanted / GIB:.1f} GiB; {args.scratch} has {free / GIB:.1f} GiB free, of which "
            f"--keep-free leaves {args.keep_free:g} GiB alone"
        )


def gguf_name(args) -> str:
    """The same for the same model alone: what was written once is used again."""
    if args.checkpoint:
        files = sorted(args.checkpoint.glob("*.safetensors"))
        # Their size and time stand for their contents.
        stated = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        config, name = args.checkpoint / "config.json", args.checkpoint.resolve().name
    else:
        stated, config, name = ["random", args.layers], args.config, args.config.stem
        if args.layers:
            name += f"-{args.layers}-layers"
    key = hashlib.sha256(json.dumps(stated).encode() + config.read_bytes()).hexdigest()[:8]
    return f"{name}-{key}"


def weights_bytes(args) -> int:
    """Of the GGUF in bf16, near enough: norms and biases are left out."""
    if args.checkpoint:
        return sum(path.stat().st_size for path in args.checkpoint.glob("*.safetensors"))
    config = json.loads(args.config.read_text())
    layers = args.layers or config["num_hidden_layers"]
    hidden, experts = config["hidden_size"], config.get("num_experts") or config.get("num_local_experts", 1)
    expert = 3 * hidden * config["intermediate_size"]
    return 2 * (2 * config["vocab_size"] * hidden + layers * (4 * hidden * hidden + experts * expert))


def written(path: Path, command: list) -> None:
    """Runs a command that writes a file; the file is there when it is whole."""
    partial = path.with_suffix(".partial")
    say(f"writing {path.name}")
    try:
        run([partial if word is path else word for word in command])
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def gguf_file(args, kind: str) -> Path:
    """The model as GGUF of a type, written if it is not there; quantized from bf16 by llama.cpp's own tool."""
    folder = args.scratch / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{gguf_name(args)}-{kind}.gguf"
    if path.exists():
        return path
    if kind == "bf16":
        needs_disk(args, weights_bytes(args), path.name)
        source = ["--checkpoint", args.checkpoint] if args.checkpoint else ["--config", args.config]
        layers = ["--layers", args.layers] if args.layers else []
        written(path, [args.python, HERE / "write_gguf.py", *source, *layers, "--out", path])
    else:
        full = gguf_file(args, "bf16")
        needs_disk(args, full.stat().st_size * QUANTIZED_SHARE[kind], path.name)
        written(path, [args.llama / "llama-quantize", full, path, kind.upper(), args.threads])
    return path


def participants(args, skipped: dict[str, str]) -> dict:
    """What to call for one round of each, in the order of the turns. What cannot take part is noted in `skipped`."""
    found = {OURS: lambda: run_moe_bench(args)}
    if "transformers" in args.peers:
        found["transformers"] = lambda: run_transformers(args)
    if "llama.cpp" in args.peers:
        for kind in args.llama_types:
            name = f"llama.cpp {kind}"
            try:
                model = gguf_file(args, kind)
                found[name] = lambda model=model: run_llama(args, model)
            except Failed as why:
                skip(skipped, name, why)
    return found


def skip(skipped: dict[str, str], name: str, why: Failed) -> None:
    say(f"{name} is left out: {why}")
    skipped[name] = str(why)


def take_turns(args, arms: dict, skipped: dict[str, str]) -> list[dict]:
    """All rounds of all that take part. A peer that fails is left out from then on; without moe-bench there is none."""
    rounds = []
    for turn in range(args.repeat):
        for name, call in arms.items():
            if name in skipped:
                continue
            load, start = os.getloadavg()[0], time.perf_counter()
            try:
                found = call()
            except Failed as why:
                if name == OURS:
                    raise
                skip(skipped, name, why)
                continue
            seconds = time.perf_counter() - start
            missing = set(test_names(args)) - {test for test, _ in found["speeds"]}
            if missing:
                sys.exit(f"{name} did not run {', '.join(sorted(missing))}")
            shown = ", ".join(f"{' '.join(key).strip()} {speed:.5g}" for key, speed in found["speeds"].items())
            say(f"round {turn + 1}, {name}: {shown}; peak {found['peak_bytes'] / 2**20:.0f} MiB, {seconds:.0f} s")
            rounds.append({"round": turn + 1, "name": name, "seconds": seconds, "load_before": load, **found})
    return rounds


def summarise(args, rounds: list[dict]) -> dict:
    """Per participant: each test's median and samples of its fastest implementation, and the median peak."""
    samples = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    peaks = defaultdict(list)
    for entry in rounds:
        peaks[entry["name"]].append(entry["peak_bytes"])
        for (test, implementation), speed in entry["speeds"].items():
            samples[entry["name"]][test][implementation].append(speed)
    summary = {}
    for name, tests in samples.items():
        chosen = {}
        for test in test_names(args):
            medians = {how: statistics.median(speeds) for how, speeds in tests[test].items()}
            best = max(medians, key=medians.get)
            figures = {"medians": medians, "samples": tests[test]}
            chosen[test] = {"tokens_per_s": medians[best], "implementation": best, **figures}
        summary[name] = {"tests": chosen, "peak_bytes": statistics.median(peaks[name])}
    for entry in summary.values():
        for test, figures in entry["tests"].items():
            figures["moe_serve_ratio"] = summary[OURS]["tests"][test]["tokens_per_s"] / figures["tokens_per_s"]
        entry["moe_serve_peak_ratio"] = entry["peak_bytes"] / summary[OURS]["peak_bytes"]
    return summary


def rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(args, summary: dict) -> str:
    """In brackets, how many times as good moe-serve is; with several implementations, the one that was fastest."""
    header = ["tokens/s", *summary]
    rows = []
    for test in test_names(args):
        cells = [test]
        for name, entry in summary.items():
            figures = entry["tests"][test]
            ratio = "" if name == OURS else f" ({figures['moe_serve_ratio']:.2f}×)"
            how = f", {figures['implementation']}" if figures["implementation"] else ""
            cells.append(rounded(figures["tokens_per_s"]) + ratio + how)
        rows.append(cells)
    cells = ["peak memory, MiB"]
    for name, entry in summary.items():
        ratio = "" if name == OURS else f" ({entry['moe_serve_peak_ratio']:.2f}×)"
        cells.append(f"{entry['peak_bytes'] / 2**20:,.0f}" + ratio)
    lines = [header, ["---"] * len(header), *rows, cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "extensions": sorted(flag for flag in flags if re.match("avx512|amx|avx2|avx_vnni", flag)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
    }


def counts(text: str) -> list[int]:
    words = [word for word in text.split(",") if word]
    if not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text}: whole numbers from 1 are wanted, with commas between")
    return [int(word) for word in words]


def words_of(*allowed: str):
    def parse(text: str) -> list[str]:
        words = [word for word in text.split(",") if word]
        unknown = [word for word in words if word not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(allowed)}")
        return words

    return parse


def arguments() -> argparse.Namespace:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="the folder that setup.sh filled")
    parser.add_argument("--moe-bench", type=Path, default=Path("target/release/moe-bench"))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="a checkpoint in Hugging Face layout")
    source.add_argument("--config", type=Path, help="a config.json, whose shapes get random weights")
    parser.add_argument("--layers", type=int, help="with --config: how many of its layers")
    parser.add_argument("--prompt", type=counts, default=[128, 512], help="tokens of the prompts (128,512)")
    parser.add_argument("--batch", type=counts, default=[1, 16], help="sequences that decode together (1,16)")
    parser.add_argument("--generate", type=int, default=32, help="decoding steps")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache before decoding")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3, help="rounds of turns")
    parser.add_argument("--peers", type=words_of(*PEERS), default=list(PEERS), help=f"({','.join(PEERS)})")
    kinds = ("bf16", *QUANTIZED_SHARE)
    parser.add_argument("--llama-types", type=words_of(*kinds), default=list(kinds), help=f"({','.join(kinds)})")
    parser.add_argument("--keep-free", type=float, default=4, metavar="GIB", help="disk that no GGUF file may take")
    parser.add_argument("--out", type=Path, help="where to write the JSON document")
    args = parser.parse_args(words[:split])
    args.more = words[split + 1 :]
    if args.layers and args.checkpoint:
        parser.error("--layers goes with --config alone")
    if not args.prompt and not args.batch:
        parser.error("neither --prompt nor --batch names a test")
    for what in ("generate", "context", "threads", "repeat"):
        if getattr(args, what) < 1:
            parser.error(f"--{what} must be at least 1")
    args.python = args.scratch / "venv/bin/python"
    args.llama = args.scratch / "llama.cpp/build/bin"
    return args


def main() -> None:
    args = arguments()
    skipped = {}
    facts = {"date": datetime.date.today().isoformat(), "machine": machine()}
    try:
        rounds = take_turns(args, participants(args, skipped), skipped)
    except Failed as why:
        sys.exit(str(why))
    summary = summarise(args, [entry for entry in rounds if entry["name"] not in skipped])
    print(table(args, summary))
    for name, why in skipped.items():
        print(f"\n{name} was left out: {why}")
    if args.out:
        asked = ("layers", "prompt", "batch", "generate", "context", "threads", "repeat", "more")
        model = args.checkpoint or args.config
        version = args.llama.parent / "version"
        facts |= {
            "model": model.resolve().stem if args.config else model.resolve().name,
            "asked": {name: getattr(args, name) for name in asked},
            "llama.cpp": version.read_text().strip() if version.exists() else None,
            "skipped": skipped,
            "summary": summary,
        }
        for entry in rounds:
            speeds = entry.pop("speeds").items()
            entry["runs"] = [{"test": test, "implementation": how, "tokens_per_s": it} for (test, how), it in speeds]
        args.out.write_text(json.dumps(facts | {"rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
