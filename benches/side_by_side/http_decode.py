#!/usr/bin/env python3
"""How fast a running server decodes, as its clients see it: beside moe-bench on the same checkpoint, what HTTP, scheduling,
sampling and text cost.

    python http_decode.py --url http://127.0.0.1:8000 --batch 16 --prompt 64 --generate 128 --repeat 3

Every round sends as many streaming completions at the same time as --batch says, and counts the tokens that arrive between
the moment when all of them have begun and the moment when the first one ends. Needs nothing but Python 3.10, and ignores end
tokens, as moe-bench does. Prints one line a round, and the median.
"""

import argparse
import http.client
import json
import random
import statistics
import sys
import threading
import time
from urllib.parse import urlsplit


def stream(url, body: dict, arrivals: list[float]) -> None:
    """Notes the time of every token of one completion."""
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        sys.exit(f"the server answered {answer.status}: {answer.read().decode()}")
    for line in answer:
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            # A token without text of its own, as within a character, is no event; its logprobs come with the next one.
            arrivals += [time.perf_counter()] * len((choice["logprobs"] or {"tokens": []})["tokens"])
    connection.close()


def one_round(args, url, seed: int) -> float:
    """Tokens per second while all decode."""
    drawn = random.Random(seed)
    arrivals = [[] for _ in range(args.batch)]
    threads = []
    for times in arrivals:
        body = {
            "prompt": [drawn.randrange(100, args.vocab) for _ in range(args.prompt)],
            "max_tokens": args.generate,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 0,
        }
        threads.append(threading.Thread(target=stream, args=(url, body, times)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(len(times) != args.generate for times in arrivals):
        sys.exit(f"of {args.generate} tokens each, {sorted(len(times) for times in arrivals)} came")
    first, last = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    tokens = sum(1 for times in arrivals for at in times if first < at <= last)
    return tokens / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of every prompt")
    parser.add_argument("--generate", type=int, default=128, help="tokens of every completion")
    parser.add_argument("--vocab", type=int, default=4000, help="prompts are drawn from token ids below this")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    rates = []
    for turn in range(args.repeat):
        rates.append(one_round(args, urlsplit(args.url), turn))
        print(f"round {turn + 1}: {rates[-1]:.1f} tokens/s", flush=True)
    print(f"median: {statistics.median(rates):.1f} tokens/s")


if __name__ == "__main__":
    main()
