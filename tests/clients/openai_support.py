"""What the checks of openai_client.py share."""

import json
import time
import urllib.error
import urllib.request

import openai

PROMPT = "Once upon a time there was a little girl named"


def expect(condition, message):
    if not condition:
        raise AssertionError(message)


def refused(kind, ask):
    """The error that `ask` must raise."""
    try:
        answer = ask()
    except openai.APIError as error:
        expect(type(error) is kind, f"{kind.__name__} wanted, got {type(error).__name__}: {error}")
        return error
    raise AssertionError(f"{kind.__name__} wanted, got {str(answer)[:200]}")


class Server:
    def __init__(self, url, model, api_key):
        self.url, self.api_key = url.rstrip("/"), api_key
        # Errors must be seen, not tried again.
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key=api_key or "none", max_retries=0, timeout=120)
        self.model = model or self.client.models.list().data[0].id

    def complete(self, extra=None, **fields):
        ask = {"model": self.model, "prompt": PROMPT, "max_tokens": 16} | fields
        return self.client.completions.create(extra_body=extra or {}, **ask)

    def greedy(self, extra=None, **fields):
        """A completion that is the same every time, and as long as asked for."""
        return self.complete(extra={"ignore_eos": True} | (extra or {}), temperature=0, **fields)

    def chat(self, **fields):
        ask = {"model": self.model, "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0}
        return self.client.chat.completions.create(**(ask | {"max_completion_tokens": 24} | fields))

    def tokenize(self, text):
        return self.post("/tokenize", {"prompt": text, "add_special_tokens": True})["tokens"]

    def detokenize(self, ids):
        return self.post("/detokenize", {"tokens": ids})["prompt"]

    def headers(self):
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def post(self, path, body):
        headers = {"content-type": "application/json"} | self.headers()
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def get(self, path, key=True):
        """Status and text, whatever the status."""
        request = urllib.request.Request(self.url + path, headers=self.headers() if key else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_idle(self, seconds=20):
        """Nothing runs, waits, or holds key-value blocks."""
        names = ("moe_requests_running ", "moe_requests_waiting ", "moe_kv_cache_usage_ratio ")
        deadline = time.monotonic() + seconds
        while True:
            lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(names)]
            if len(lines) == len(names) and all(float(line.split()[-1]) == 0 for line in lines):
                return
            expect(time.monotonic() < deadline, f"not idle after {seconds} s: {lines}")
            time.sleep(0.05)
