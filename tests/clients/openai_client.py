"""OpenAI's own Python client against a running server: every kind of request, and every kind of error.

    python openai_client.py --url http://127.0.0.1:8000 [--model NAME] [--api-key KEY] [--chat] [--provoke-429 400]

Prints one line per check and exits 1 if any failed. Works with any model; chat is checked where the server has a chat
template (--chat says that it must), its refusal where it has none.
"""

import argparse
import asyncio
import sys
import traceback

import openai
from openai_chat import chat_checks
from openai_support import PROMPT, Server, expect, refused

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


@check
def models_are_listed(s: Server):
    listed = s.client.models.list().data
    expect(s.model in [m.id for m in listed], f"{s.model} is not among {listed}")
    one = s.client.models.retrieve(s.model)
    expect(one.id == s.model and one.object == "model" and one.owned_by, f"{one}")
    error = refused(openai.NotFoundError, lambda: s.client.models.retrieve("no-such-model"))
    return f"{len(listed)} model(s); an unknown one is a 404: {error.message[:60]!r}"


@check
def a_whole_completion(s: Server):
    answer = s.greedy(max_tokens=24)
    choice, usage = answer.choices[0], answer.usage
    expect(answer.object == "text_completion" and answer.model == s.model, f"{answer}")
    expect(choice.finish_reason == "length" and choice.index == 0 and choice.text, f"{choice}")
    expect(usage.completion_tokens == 24, f"24 tokens asked for: {usage}")
    expect(usage.prompt_tokens + usage.completion_tokens == usage.total_tokens, f"{usage}")
    expect(usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens, f"{usage}")
    expect("moe" in usage.model_extra, f"no usage.moe: {usage}")
    expect(answer._request_id, "no x-request-id")
    named = s.greedy(max_tokens=1, extra_headers={"x-request-id": "the-clients-own-1"})
    expect(named._request_id == "the-clients-own-1", f"x-request-id became {named._request_id}")
    return f"{choice.text[:40]!r}, moe {usage.model_extra['moe']}"


@check
def a_stream_is_the_whole_in_pieces(s: Server):
    whole = s.greedy(max_tokens=40)
    chunks = list(s.greedy(max_tokens=40, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.text for chunk in chunks for c in chunk.choices)
    reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    expect(text == whole.choices[0].text, f"{text!r} instead of {whole.choices[0].text!r}")
    expect(reasons == ["length"], f"finish reasons {reasons}")
    expect(chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40, f"last chunk {chunks[-1]}")
    expect(all(c.usage is None for c in chunks[:-1]), "usage before the last chunk")
    expect({c.id for c in chunks} == {chunks[0].id}, "the id changes")
    plain = list(s.greedy(max_tokens=3, stream=True))
    expect(all(c.usage is None and c.choices for c in plain), "usage that was not asked for")
    return f"{len(chunks)} chunks"


@check
def several_choices(s: Server):
    ask = {"n": 3, "temperature": 1.2, "seed": 5, "max_tokens": 24}
    first, again = s.complete(**ask), s.complete(**ask)
    texts = [c.text for c in first.choices]
    expect([c.index for c in first.choices] == [0, 1, 2], f"{first.choices}")
    expect(len(set(texts)) > 1, f"all choices are the same: {texts}")
    expect(texts == [c.text for c in again.choices], "the same seed gave other choices")
    pieces = ["", "", ""]
    for chunk in s.complete(stream=True, **ask):
        for c in chunk.choices:
            pieces[c.index] += c.text
    expect(pieces == texts, f"streamed {pieces} instead of {texts}")
    best = s.complete(n=2, best_of=4, temperature=1.0, seed=5, max_tokens=8)
    expect([c.index for c in best.choices] == [0, 1], f"{best.choices}")
    error = refused(openai.BadRequestError, lambda: s.complete(n=3, best_of=2))
    expect(error.param == "best_of", f"param {error.param}: {error.message}")
    return "n, streamed n, best_of"


@check
def echo_and_logprobs(s: Server):
    answer = s.greedy(max_tokens=8, echo=True, logprobs=2).choices[0]
    expect(answer.text.startswith(PROMPT), f"{answer.text!r}")
    lp = answer.logprobs
    expect(lp.token_logprobs[0] is None and lp.top_logprobs[0] is None, "the first token has nothing before it")
    expect("".join(lp.tokens) == answer.text, f"{lp.tokens} is not {answer.text!r}")
    expect(lp.text_offset == offsets(lp.tokens), f"text_offset {lp.text_offset} of {lp.tokens}")
    for token, own, top in list(zip(lp.tokens, lp.token_logprobs, lp.top_logprobs))[1:]:
        expect(own <= 0 and 2 <= len(top) <= 3 and top.get(token) == own, f"{token!r} {own} {top}")
    for own, top in list(zip(lp.token_logprobs, lp.top_logprobs))[-8:]:
        expect(own == max(top.values()), f"a greedy token is not the most probable: {own} {top}")
    only = s.greedy(max_tokens=0, echo=True, logprobs=0).choices[0]
    expect(only.text == PROMPT, f"{only.text!r} instead of the prompt")
    prompt_only = len(only.logprobs.tokens)
    expect(lp.token_logprobs[1:prompt_only] == only.logprobs.token_logprobs[1:], "max_tokens 0 and 8 differ")
    expect(all(len(t) == 1 for t in only.logprobs.top_logprobs[1:]), f"logprobs 0: {only.logprobs.top_logprobs}")
    streamed = [c for chunk in s.greedy(max_tokens=8, logprobs=2, stream=True) for c in chunk.choices]
    values = [x for c in streamed if c.logprobs for x in c.logprobs.token_logprobs]
    expect(values == lp.token_logprobs[prompt_only:], f"streamed {values}")
    error = refused(openai.BadRequestError, lambda: s.complete(max_tokens=0))
    expect(error.param == "max_tokens", f"param {error.param}: {error.message}")
    return f"{prompt_only} prompt tokens, 8 new ones"


def offsets(tokens):
    at, result = 0, []
    for token in tokens:
        result.append(at)
        at += len(token)
    return result


@check
def seeds(s: Server):
    def ask(seed):
        return s.complete(max_tokens=24, temperature=1.0, seed=seed).choices[0].text

    texts = [ask(seed) for seed in range(4)]
    expect(texts == [ask(seed) for seed in range(4)], "the same seeds gave other texts")
    expect(len(set(texts)) > 1, f"all seeds give {texts[0]!r}")
    return f"{len(set(texts))} texts of 4 seeds"


@check
def stop_strings(s: Server):
    whole = s.greedy(max_tokens=40).choices[0].text
    stop = whole[10:14]
    wanted = whole[: whole.find(stop)]
    for stops in (stop, [stop], ["\u2603", stop, "\u2604"]):
        choice = s.greedy(max_tokens=40, stop=stops).choices[0]
        expect(choice.text == wanted and choice.finish_reason == "stop", f"stop {stops!r} gave {choice}")
    streamed = "".join(c.text for chunk in s.greedy(max_tokens=40, stop=stop, stream=True) for c in chunk.choices)
    expect(streamed == wanted, f"streamed {streamed!r} instead of {wanted!r}")
    expect(s.greedy(max_tokens=40, stop=[]).choices[0].text == whole, "an empty list of stops must change nothing")
    return f"{stop!r} ends the text"


@check
def logit_bias(s: Server):
    def ids(**fields):
        choice = s.greedy(max_tokens=4, logprobs=0, extra={"return_tokens_as_token_ids": True}, **fields).choices[0]
        return [int(t.removeprefix("token_id:")) for t in choice.logprobs.tokens]

    first = ids()[0]
    expect(first not in ids(logit_bias={str(first): -100}), "a token with bias -100 was chosen")
    other = s.tokenize(PROMPT)[0]
    expect(ids(logit_bias={str(other): 100}) == [other] * 4, "a token with bias 100 was not chosen")
    error = refused(openai.BadRequestError, lambda: s.greedy(logit_bias={"0": 500}))
    expect(error.param == "logit_bias", f"param {error.param}: {error.message}")
    return f"token {first} avoided, token {other} forced"


@check
def arrays_of_prompts(s: Server):
    prompts = [PROMPT, "The sun", "One day"]
    alone = [s.greedy(prompt=p, max_tokens=12).choices[0].text for p in prompts]
    answer = s.greedy(prompt=prompts, max_tokens=12)
    expect([c.text for c in answer.choices] == alone, f"{answer.choices} instead of {alone}")
    expect(answer.usage.completion_tokens == 36, f"{answer.usage}")
    ids = [s.tokenize(p) for p in prompts]
    by_id = s.greedy(prompt=ids, max_tokens=12)
    expect([c.text for c in by_id.choices] == alone, "token ids give another text")
    expect(s.greedy(prompt=ids[0], max_tokens=12).choices[0].text == alone[0], "one array of ids gives another text")
    expect(s.detokenize(ids[0]) == PROMPT, "detokenize(tokenize(x)) is not x")
    return f"{len(prompts)} prompts, as text and as ids"


@check
def bad_requests_name_their_field(s: Server):
    cases = {
        "temperature": lambda: s.complete(temperature=9),
        "max_tokens": lambda: s.complete(max_tokens=10**8),
        "top_p": lambda: s.complete(top_p=0),
        "n": lambda: s.complete(n=0),
        "stop": lambda: s.complete(stop=[1]),
        "suffix": lambda: s.complete(suffix="end"),
        "no_such_field": lambda: s.complete(extra={"no_such_field": 1}),
        "router": lambda: s.complete(extra={"router": "no-such-router"}),
        "prompt": lambda: s.complete(prompt=[10**9]),
    }
    for param, ask in cases.items():
        error = refused(openai.BadRequestError, ask)
        expect(error.param == param, f"param {error.param!r} instead of {param!r}: {error.message}")
        expect(error.type == "invalid_request_error", f"type {error.type}")
    error = refused(openai.NotFoundError, lambda: s.complete(model="no-such-model"))
    expect(error.code == "model_not_found" and error.param == "model", f"{error.code} {error.param}")
    return ", ".join(cases)


@check
def keys(s: Server):
    if not s.api_key:
        return "not looked at: no --api-key"
    for key in ("wrong", s.api_key + "x"):
        client = s.client.with_options(api_key=key, max_retries=0)
        error = refused(openai.AuthenticationError, lambda client=client: client.models.list())
        expect(s.api_key not in error.message, "the error tells the key")
    expect(s.get("/health", key=False)[0] == 200, "/health needs no key")
    expect(s.get("/metrics", key=False)[0] == 401, "/metrics needs the key")
    return "a wrong key is a 401"


@check
def a_client_that_does_not_wait(s: Server):
    hasty = s.client.with_options(timeout=0.05, max_retries=0)
    body = {"ignore_eos": True}
    ask = {"model": s.model, "prompt": PROMPT, "max_tokens": 500}
    refused(openai.APITimeoutError, lambda: hasty.completions.create(extra_body=body, **ask))
    with s.client.completions.create(stream=True, extra_body=body, **ask) as stream:
        for _ in range(3):
            next(stream)
    s.wait_idle()
    expect(s.greedy(max_tokens=1).choices[0].text is not None, "no answer afterwards")
    return "a timeout and a closed stream both end the request"


@check
def many_at_once(s: Server):
    async def all_of_them():
        client = openai.AsyncOpenAI(base_url=s.url + "/v1", api_key=s.api_key or "none", max_retries=0)

        async def one(i):
            ask = {"model": s.model, "prompt": PROMPT, "max_tokens": 8 + i % 3, "temperature": 0, "stream": True}
            stream = await client.completions.create(extra_body={"ignore_eos": True}, **ask)
            return "".join([c.text async for chunk in stream for c in chunk.choices])

        return await asyncio.gather(*(one(i) for i in range(24)))

    alone = [s.greedy(max_tokens=8 + i).choices[0].text for i in range(3)]
    texts = asyncio.run(all_of_them())
    expect(all(t == alone[i % 3] for i, t in enumerate(texts)), "a text differs from the one got alone")
    return "24 streams"


def too_many(s: Server, count: int):
    """More requests than the server queues."""

    async def all_of_them():
        client = openai.AsyncOpenAI(base_url=s.url + "/v1", api_key=s.api_key or "none", max_retries=0)
        ask = {"model": s.model, "prompt": PROMPT, "max_tokens": 64, "extra_body": {"ignore_eos": True}}
        asked = (client.completions.create(**ask) for _ in range(count))
        return await asyncio.gather(*asked, return_exceptions=True)

    results = asyncio.run(all_of_them())
    limited = [r for r in results if isinstance(r, openai.RateLimitError)]
    others = [r for r in results if isinstance(r, BaseException) and not isinstance(r, openai.RateLimitError)]
    expect(not others, f"{len(others)} other errors, the first {others[:1]}")
    expect(limited, f"all of {count} requests were taken")
    expect("retry-after" in limited[0].response.headers, "a 429 without Retry-After")
    s.wait_idle()
    return f"{len(limited)} of {count} refused with 429"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", help="default: the first that is listed")
    parser.add_argument("--api-key")
    parser.add_argument("--chat", action="store_true", help="the server must have a chat template")
    parser.add_argument("--provoke-429", type=int, metavar="N", help="send N requests at once and want a 429")
    args = parser.parse_args()
    server = Server(args.url, args.model, args.api_key)
    checks = CHECKS + chat_checks(server, args.chat)
    if args.provoke_429:
        checks.append(lambda s: too_many(s, args.provoke_429))
        checks[-1].__name__ = "more_than_the_queue_holds"
    failures = 0
    for function in checks:
        name = function.__name__.replace("_", " ")
        try:
            print(f"ok      {name}: {function(server)}", flush=True)
        except Exception as error:  # Whatever goes wrong in one check, the others still tell something.
            failures += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc()
    print(f"openai-python {openai.__version__}: {len(checks)} checks, {failures} failed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
