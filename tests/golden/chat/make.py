"""Golden renderings of chat templates: conversations, and the prompts that Hugging Face makes of them.

    pip install transformers==5.17.0 jinja2==3.1.6
    python tests/golden/chat/make.py TOKENIZERS

Is deterministic and writes, next to this file:

conversations.json  name -> arguments of apply_chat_template
own.json            template of this folder -> special tokens, and name -> what came of it
shared.json         the same for templates of others, read from the folder TOKENIZERS, which are not kept here

What comes of a conversation is its prompt, or {"raised": message} where the template called raise_exception, or
{"error": type} where it failed otherwise.
"""

import copy
import json
import sys
from pathlib import Path

from jinja2.exceptions import TemplateError, TemplateSyntaxError, UndefinedError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
MISTRAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
OLMOE = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
OWN = {"bare.jinja": {}, "chatml.jinja": QWEN, "inst.jinja": MISTRAL, "roles.jinja": OLMOE}
SHARED = {
    "mixtral-8x7b/mistral-instruct.chat_template.jinja": MISTRAL,
    "mixtral-8x7b/mistralrs-mistral.json": MISTRAL,
    "olmoe-1b-7b/tulu.chat_template.jinja": OLMOE,
    "qwen/qwen3.chat_template.jinja": QWEN,
    "qwen/qwen3.tokenizer_config.json": QWEN,
}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def function(name, description, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def call(name, arguments, id="abcdefghi"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = message("system", "You are a helpful assistant.")
HELLO, HI, HOW = message("user", "Hello!"), message("assistant", "Hi there."), message("user", "How are you?")
WEATHER = function(
    "get_weather",
    'The weather at a "place" — <b>now</b> & \\ later',
    city={"type": "string", "description": "Ort, e.g. Zürich or 東京\n"},
    unit={"type": "string", "enum": ["°C", "°F"], "default": None},
    step={"type": "number", "minimum": 1e-07, "maximum": 1e22, "default": 0.5, "examples": [1.0, -0.0, 10**17]},
    strict={"type": "boolean", "default": True},
)
# A parameter whose name is a method of Python's dict.
LIST = {"type": "array", "items": {"type": "string"}}
SEARCH = function("search", "Finds things", items=LIST, keys={}, nested={"a": [[], {}]})
NOW = {"type": "function", "function": {"name": "now"}}
ASK = message("user", "What is the weather in Paris and in Bonn?")
CALLS = [
    call("get_weather", {"city": "Paris", "unit": "°C", "days": [1, 2.5, None, True]}),
    call("get_weather", {"city": "B\"o'nn\n"}, id="123456789"),
]
THINK = "<think>\nThey greet.\nI greet back.\n</think>\n\nHi there."
NASTY = 'é"l\'lo\n\t\x01\x1f \u2028\u00a0 世界 🦀 e\u0301 <b>&amp;</b> {{ x }} {% if %} \\n [INST] <|im_end|>'


def data():
    """Variables for the template that goes through the language."""
    return {
        "d": {"b": 1, "a": [1, 2.0, 1e-07, 1e22, True, None, "x'y", 'a"b', "a'\"b\n"], "C": {}, "items": [3]},
        "l": [5, 3, 1], "s": "Hello World", "e": [], "z": {}, "f": 0.1, "neg": -3,
        "nested": [[1, [2]], {"k": {"v": []}}], "big": 12345678901234567890, "t": True, "nul": None,
        "words": ["b", "A", "c", "B"],
        "objs": [{"n": "x", "v": 2}, {"n": "y", "v": 1}, {"n": "z"}], "ws": " \u00a0\u3000a b \x1c\n",
    }  # fmt: skip


def conversations():
    """Those of `both` are rendered with and without a generation prompt."""
    user, assistant = (lambda text: message("user", text)), (lambda text, **more: message("assistant", text, **more))
    both = {
        "user": [HELLO],
        "system": [SYSTEM, HELLO],
        "developer": [message("developer", "Be brief."), HELLO],
        "turns": [SYSTEM, HELLO, HI, HOW],
        "turns without system": [HELLO, HI, HOW, HI, HELLO],
        "assistant last": [SYSTEM, HELLO, HI],
        "assistant first": [HI, HELLO],
        "users in a row": [HELLO, HOW],
        "system late": [HELLO, SYSTEM, HOW],
        "unknown role": [HELLO, message("narrator", "Meanwhile"), HOW],
        "empty contents": [message("system", ""), message("user", ""), message("assistant", ""), message("user", "")],
        "spaces": [message("system", " s \n"), user("  u\n\n"), assistant("\n a \t"), user("\u00a0u\x1f ")],
        "nasty": [message("system", NASTY), user(NASTY), assistant(NASTY), user(NASTY)],
        "line ends": [message("user", "a\r\nb\rc\n"), message("assistant", "\r\n"), message("user", "d")],
        "thinking": [HELLO, message("assistant", THINK), HOW],
        "thinking last": [HELLO, message("assistant", THINK)],
        "reasoning": [
            HELLO, assistant("\nHi.", reasoning_content="\nThey greet.\n"), HOW, assistant("Fine.", reasoning_content="Hm"),
        ],
        "null content": [HELLO, message("assistant", None), HOW],
        "null user": [message("user", None)],
        "no content": [HELLO, {"role": "assistant"}, HOW],
        "number": [message("user", 3)],
        "parts": [message("user", [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": "b"}])],
        "names": [message("user", "Hello!", name="Ann", extra={"a": [1]})],
    }  # fmt: skip
    cases = {}
    for name, messages in both.items():
        cases[name] = {"messages": messages, "add_generation_prompt": True}
        cases[name + ", closed"] = {"messages": messages, "add_generation_prompt": False}
    with_tools = {
        "tools": [ASK],
        "tools and system": [SYSTEM, ASK],
        "tools and calls": [SYSTEM, ASK, message("assistant", "", tool_calls=CALLS)],
        "tools and results": [
            ASK, message("assistant", "Let me see.", tool_calls=CALLS),
            message("tool", '{"temp": 20}', tool_call_id="abcdefghi"),
            message("tool", "<rain>", tool_call_id="123456789"),
            assistant("Sunny and rainy."), HOW, assistant("", tool_calls=CALLS[:1]), message("tool", "21"),
        ],
        "tools and null content": [ASK, message("assistant", None, tool_calls=CALLS[:1]), message("tool", "{}")],
        "arguments as text": [ASK, assistant("", tool_calls=[call("f", '{"a":  1}')]), message("tool", "{}")],
        "calls without function": [ASK, message("assistant", "", tool_calls=[{"name": "f", "arguments": {}}])],
        "wrong id": [ASK, message("assistant", "", tool_calls=[call("f", {}, id="1")])],
        "result as user": [ASK, message("user", "<tool_response>\n1\n</tool_response>"), HI],
        "thinking with tools": [
            ASK, assistant(THINK, tool_calls=CALLS[:1]), message("tool", "20"),
            assistant("", reasoning_content="x", tool_calls=CALLS[1:]), message("tool", "21"),
        ],
    }  # fmt: skip
    for name, messages in with_tools.items():
        cases[name] = {"messages": messages, "tools": [WEATHER, SEARCH], "add_generation_prompt": True}
    cases |= {
        "no tools": {"messages": [SYSTEM, HELLO], "tools": [], "add_generation_prompt": True},
        "bare tool": {"messages": [HELLO], "tools": [NOW], "add_generation_prompt": True},
        "no messages": {"messages": [], "add_generation_prompt": True},
        "variables": {"messages": [HELLO], "kwargs": {"bos_token": "<B>", "eos_token": "<E>", "date": [1.0, "x'"]}},
    }
    for thinking in [True, False, None]:
        kwargs = {"enable_thinking": thinking}
        cases[f"enable_thinking {thinking}"] = {"messages": [HELLO], "add_generation_prompt": True, "kwargs": kwargs}
    to_continue = {
        "": [HELLO, HI],
        " after spaces": [HELLO, message("assistant", "Once upon  \n ")],
        " before spaces": [HELLO, message("assistant", "\n  Once upon")],
        " an empty message": [HELLO, message("assistant", "")],
        " spaces": [HELLO, message("assistant", " \n")],
        " a repeated text": [message("user", "Hi there."), HI],
        " thinking": [HELLO, message("assistant", THINK)],
        " an open thought": [HELLO, message("assistant", "<think>\nThey")],
        " the user": [HELLO],
        " parts": [message("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}])],
        " no text": [message("user", [{"type": "image"}])],
        " no parts": [message("user", [])],
        " null": [HELLO, message("assistant", None)],
        " nothing": [HELLO, {"role": "assistant"}],
        " calls": [ASK, message("assistant", "I see", tool_calls=CALLS[:1])],
        " the tag": [HELLO, message("assistant", "CONTINUE_FINAL_MESSAGE_TAG x")],
        " nasty": [HELLO, message("assistant", NASTY)],
    }  # fmt: skip
    for name, messages in to_continue.items():
        cases["continue" + name] = {"messages": messages, "continue_final_message": True}
    both = {"continue_final_message": True, "add_generation_prompt": True}
    cases["continue and prompt"] = {"messages": [HELLO, HI], **both}
    return cases


def rendered(template, specials, case):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, "x")), **specials)
    case = copy.deepcopy(case)
    messages, kwargs = case.pop("messages"), case.pop("kwargs", {})
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **case, **kwargs)
    except TemplateSyntaxError:
        raise
    except UndefinedError as error:
        return {"error": type(error).__name__}
    except TemplateError as error:
        return {"raised": error.message}
    except Exception as error:
        return {"error": type(error).__name__}


def write(name, value):
    # A line per prompt, so that a change shows as what it is.
    text = json.dumps(value, ensure_ascii=False, indent=1)
    (HERE / name).write_text(text + "\n", encoding="utf-8")


def template(path):
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    return json.loads(text)["chat_template"] if path.suffix == ".json" else text


def main(tokenizers):
    logging.set_verbosity_error()
    cases = conversations()
    messages = [message("system", "You are  ", n=None), message("user", NASTY), message("assistant", None)]
    torture = {"torture": {"messages": messages, "kwargs": data()}}
    of = lambda text, specials, cases: {
        "specials": specials,
        "prompts": {name: rendered(text, specials, case) for name, case in cases.items()},
    }
    write("conversations.json", cases | torture)
    own = {name: of(template(HERE / name), specials, cases) for name, specials in OWN.items()}
    write("own.json", own | {"torture.jinja": of(template(HERE / "torture.jinja"), MISTRAL, torture)})
    write("shared.json", {name: of(template(tokenizers / name), specials, cases) for name, specials in SHARED.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
