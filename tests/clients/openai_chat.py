"""The checks of openai_client.py that need a chat template."""

import json
from typing import Literal

import openai
from openai_support import Server, expect, refused
from pydantic import BaseModel, Field

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "enum": ["Berlin", "Paris", "Rome"]},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["place", "unit"],
            "additionalProperties": False,
        },
    },
}


class Kite(BaseModel):
    """Everything in it ends by itself, so that even a model that knows no JSON writes a whole one."""

    colour: Literal["red", "green", "blue"]
    flies: bool
    tails: list[Literal["long", "short"]] = Field(max_length=3)


def chat_checks(server: Server, wanted: bool):
    """The chat checks for a server with a chat template, else one that it says so."""
    try:
        server.chat(max_completion_tokens=1)
    except openai.BadRequestError as error:
        message = error.message

        def chat_without_a_template(_):
            expect(not wanted, f"--chat was given, and the server refuses: {message}")
            expect("template" in message, f"the refusal does not speak of the template: {message}")
            return f"refused: {message[:80]!r}"

        return [chat_without_a_template]
    except openai.OpenAIError:
        # The first check meets it again, and reports it.
        pass
    return [whole_chat, streamed_chat, chat_choices, chat_logprobs, json_answers, tools, streamed_tools, bad_chats]


def whole_chat(s: Server):
    answer = s.chat()
    choice, usage = answer.choices[0], answer.usage
    expect(answer.object == "chat.completion" and answer.id.startswith("chatcmpl-"), f"{answer}")
    expect(choice.message.role == "assistant" and isinstance(choice.message.content, str), f"{choice}")
    expect(choice.finish_reason in ("stop", "length") and not choice.message.tool_calls, f"{choice}")
    expect(usage.prompt_tokens + usage.completion_tokens == usage.total_tokens, f"{usage}")
    parts = s.chat(messages=[{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}])
    expect(parts.choices[0].message.content == choice.message.content, "text in parts gives another answer")
    system = {"role": "system", "content": "Be short."}
    s.chat(messages=[system, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, *HELLO])
    return f"{choice.message.content[:40]!r}"


def streamed_chat(s: Server):
    whole = s.chat().choices[0]
    chunks = list(s.chat(stream=True, stream_options={"include_usage": True}))
    deltas = [c for chunk in chunks for c in chunk.choices]
    expect(all(c.object == "chat.completion.chunk" for c in chunks), f"{chunks[0]}")
    expect([d.delta.role for d in deltas if d.delta.role] == ["assistant"], "the role comes once")
    expect(deltas[0].delta.role == "assistant", f"the first delta is {deltas[0]}")
    text = "".join(d.delta.content or "" for d in deltas)
    expect(text == whole.message.content, f"{text!r} instead of {whole.message.content!r}")
    reasons = [d.finish_reason for d in deltas if d.finish_reason]
    expect(reasons == [whole.finish_reason] and deltas[-1].finish_reason, f"finish reasons {reasons}")
    expect(chunks[-1].choices == [] and chunks[-1].usage.total_tokens > 0, f"last chunk {chunks[-1]}")
    return f"{len(chunks)} chunks"


def chat_choices(s: Server):
    ask = {"n": 3, "temperature": 1.2, "seed": 3}
    texts = [c.message.content for c in s.chat(**ask).choices]
    expect(len(texts) == 3, f"{texts}")
    options = {"model": s.model, "messages": [{"role": "user", "content": "Tell me a story."}]}
    with s.client.chat.completions.stream(max_completion_tokens=24, **options, **ask) as stream:
        stream.until_done()
        # The client's own way to put the pieces together; its get_final_completion() refuses what ended by length.
        final = stream.current_completion_snapshot
    expect([c.message.content for c in final.choices] == texts, f"streamed {final.choices} instead of {texts}")
    return f"{len(set(texts))} different texts of 3"


def chat_logprobs(s: Server):
    choice = s.chat(logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    joined = b"".join(bytes(t.bytes) for t in content).decode(errors="replace")
    expect(joined.startswith(choice.message.content), f"{joined!r} is not {choice.message.content!r}")
    expect(all(t.logprob <= 0 and len(t.top_logprobs) == 2 for t in content), f"{content[:2]}")
    expect(all(t.logprob == t.top_logprobs[0].logprob for t in content), "a greedy token is not the first of the top")
    deltas = [c for chunk in s.chat(logprobs=True, top_logprobs=2, stream=True) for c in chunk.choices]
    streamed = [t.logprob for d in deltas if d.logprobs for t in d.logprobs.content]
    expect(streamed == [t.logprob for t in content], f"streamed {streamed}")
    bare = s.chat(logprobs=True).choices[0].logprobs.content
    expect(all(t.top_logprobs == [] for t in bare), "top_logprobs that were not asked for")
    error = refused(openai.BadRequestError, lambda: s.chat(top_logprobs=2))
    expect(error.param in ("top_logprobs", "logprobs"), f"param {error.param}")
    return f"{len(content)} tokens"


def json_answers(s: Server):
    ask = {"model": s.model, "messages": [{"role": "user", "content": "Describe a kite."}], "max_completion_tokens": 120}
    for seed in range(3):
        parsed = s.client.chat.completions.parse(response_format=Kite, seed=seed, **ask)
        expect(isinstance(parsed.choices[0].message.parsed, Kite), f"{parsed}")
        expect(parsed.choices[0].finish_reason == "stop", f"{parsed.choices[0]}")
    with s.client.chat.completions.stream(response_format=Kite, seed=1, **ask) as stream:
        kite = stream.get_final_completion().choices[0].message.parsed
    expect(isinstance(kite, Kite), f"{kite}")
    free = s.chat(response_format={"type": "json_object"}, max_completion_tokens=200).choices[0]
    if free.finish_reason == "stop":
        expect(isinstance(json.loads(free.message.content), dict), f"{free}")
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no-such-type"}}}
    error = refused(openai.BadRequestError, lambda: s.chat(response_format=bad))
    expect((error.param or "").startswith("response_format"), f"param {error.param}: {error.message}")
    return f"{kite}; json_object ended by {free.finish_reason}"


def check_call(call):
    expect(call.type == "function" and call.id and call.function.name == "get_weather", f"{call}")
    arguments = json.loads(call.function.arguments)
    wanted = WEATHER["function"]["parameters"]["properties"]
    expect(set(arguments) == set(wanted), f"{arguments}")
    expect(all(value in wanted[key]["enum"] for key, value in arguments.items()), f"{arguments}")
    return arguments


NAMED = {"type": "function", "function": {"name": "get_weather"}}


def tools(s: Server):
    ask = {"tools": [WEATHER], "max_completion_tokens": 200, "parallel_tool_calls": False}
    message = None
    for choice in ("required", NAMED):
        answer = s.chat(tool_choice=choice, **ask).choices[0]
        message = answer.message
        # OpenAI ends a call of a named function with "stop".
        expect(answer.finish_reason in ("tool_calls", "stop"), f"{answer.finish_reason}")
        expect(len(message.tool_calls) == 1, f"{message}")
        arguments = check_call(message.tool_calls[0])
    none = s.chat(tool_choice="none", **ask).choices[0].message
    expect(not none.tool_calls and isinstance(none.content, str), f"{none}")
    s.chat(tool_choice="auto", **ask)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "20 degrees"}
    back = s.chat(messages=[*HELLO, message.model_dump(exclude_none=True), result], tools=[WEATHER])
    expect(back.choices[0].finish_reason, f"{back}")
    unknown = {"type": "function", "function": {"name": "no_such_tool"}}
    error = refused(openai.BadRequestError, lambda: s.chat(tools=[WEATHER], tool_choice=unknown))
    expect((error.param or "").startswith("tool_choice"), f"param {error.param}")
    return f"called with {arguments}"


def streamed_tools(s: Server):
    # One call: a small model that may make more does not find an end.
    ask = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False, "max_completion_tokens": 200}
    with s.client.chat.completions.stream(model=s.model, messages=HELLO, temperature=0, **ask) as stream:
        final = stream.get_final_completion().choices[0]
    expect(final.finish_reason in ("tool_calls", "stop"), f"{final.finish_reason}")
    whole = s.chat(messages=HELLO, **ask).choices[0]
    calls = [[c.function.arguments for c in x.message.tool_calls] for x in (final, whole)]
    expect(calls[0] == calls[1], f"streamed {calls[0]} instead of {calls[1]}")
    for call in final.message.tool_calls:
        check_call(call)
    return f"{calls[0]}"


def bad_chats(s: Server):
    cases = {
        "messages": lambda: s.chat(messages=[]),
        "chat_template": lambda: s.chat(extra_body={"chat_template": "{{ messages }}"}),
        "top_logprobs": lambda: s.chat(logprobs=True, top_logprobs=1000),
        "no_such_field": lambda: s.chat(extra_body={"no_such_field": 1}),
    }
    for param, ask in cases.items():
        error = refused(openai.BadRequestError, ask)
        expect((error.param or "").startswith(param), f"param {error.param!r} instead of {param!r}: {error.message}")
    refused(openai.BadRequestError, lambda: s.chat(messages=[{"role": "nobody", "content": "Hi"}]))
    refused(openai.NotFoundError, lambda: s.chat(model="no-such-model"))
    return ", ".join(cases)
