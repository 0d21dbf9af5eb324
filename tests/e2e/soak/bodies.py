"""The request bodies: a fixed pool, each with one right answer."""

import random
from dataclasses import dataclass
from typing import Any

KINDS = ("plain", "plain", "chat", "n", "echo", "logprobs", "schema", "choice", "stop", "many", "tools")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS = [
    "def read_lines(path):\n",
    "import os\nimport sys\n\n\ndef main(argv=None):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "for name in sorted(os.listdir(path)):\n",
    "    try:\n        value = int(text)\n    except ValueError:\n",
    "# größer als 100 €: 日本語 \U0001f600\nnames = {",
    "from dataclasses import dataclass\n\n\n@dataclass\nclass Point:\n    x: float\n    y: float\n\n" * 6,
    "def test_addition():\n    assert add(1, 2) == 3\n\n\n" * 14,
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"enum": ["a.py", "b.py"]},
                    "line": {"type": "integer", "maximum": 9, "minimum": 1},
                },
                "required": ["path", "line"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("open_file", "close_file")
]
INVALID: list[tuple[str, dict[str, Any] | bytes, int]] = [
    (COMPLETIONS, {"prompt": 1.5}, 400),
    (COMPLETIONS, {"prompt": "x", "temperature": 9}, 400),
    (COMPLETIONS, {"prompt": "x", "unheard_of": 1}, 400),
    (COMPLETIONS, {"prompt": "x", "model": "unknown"}, 404),
    (COMPLETIONS, {"prompt": [10**6]}, 400),
    (COMPLETIONS, {"prompt": "x", "structured_outputs": {"regex": "("}}, 400),
    (COMPLETIONS, b'{"prompt": "x"', 400),
    (CHAT, {"messages": []}, 400),
    ("/v1/nowhere", {}, 404),
]


@dataclass(frozen=True)
class Body:
    name: str
    path: str
    fields: dict[str, Any]

    @property
    def is_greedy(self) -> bool:
        return self.fields["temperature"] == 0


def pool(size: int, seed: int) -> list[Body]:
    """Return `size` requests that exercise the API. The same seed gives the same requests."""
    random_number = random.Random(seed)
    return [_body(index, random_number) for index in range(size)]


def _body(index: int, noise: random.Random) -> Body:
    fields: dict[str, Any] = {
        "max_tokens": noise.choice((1, 12, 24, 48, 96)),
        "temperature": noise.choice((0, 0, 0.5, 1.0)),
        "seed": index,
        "return_token_ids": True,
        "speculative": {"policy": noise.choice(("goodput", "goodput", "paper", "fixed"))},
    }
    if fields["temperature"]:
        fields |= noise.choice(({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"frequency_penalty": 0.5}))
    prompt = noise.choice(PROMPTS)
    kind = KINDS[index % len(KINDS)]
    if kind == "chat":
        messages = [{"role": "user", "content": prompt}]
        return Body(kind, CHAT, fields | {"messages": messages, "logprobs": True, "top_logprobs": 2})
    if kind == "tools":  # enough tokens for a whole call: a cut one is content in one piece, but a call in a stream
        fields |= {"messages": [{"role": "user", "content": prompt}], "tools": TOOLS, "tool_choice": "required"}
        return Body(kind, CHAT, fields | {"parallel_tool_calls": False, "max_tokens": 160})
    fields["prompt"] = prompt
    if kind == "n":
        fields |= {"n": 3}
    elif kind == "echo":
        fields |= {"echo": True, "logprobs": 2}
    elif kind == "logprobs":
        fields |= {"logprobs": 4}
    elif kind == "schema":
        schema = {"name": "sizes", "schema": SCHEMA}
        fields |= {"response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 64}
    elif kind == "choice":
        fields |= {"structured_outputs": {"choice": ["return None", "return self", "raise ValueError"]}}
    elif kind == "stop":
        fields |= {"stop": ["\n\n", "return"]}
    elif kind == "many":
        fields |= {"prompt": [prompt, noise.choice(PROMPTS)]}
    return Body(kind, COMPLETIONS, fields)
