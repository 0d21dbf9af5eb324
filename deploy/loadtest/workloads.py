"""The requests of users: a mix of workloads, drawn from a seed so that runs can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

STREAM = {"stream": True, "return_token_ids": True}

WORKLOADS = ("completion", "chat", "sampled", "cancelled", "long")
CODE = (
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\n\n\ndef main():\n",
    "for name in sorted(os.listdir(path)):\n",
    "    try:\n        return self._cache[key]\n    except KeyError:\n",
    "class Reader:\n    def __init__(self, path):\n        self.path = path\n\n    def __iter__(self):\n",
)
QUESTIONS = (
    "Write a function that reads a file line by line.",
    "How do I sort the names in a folder?",
    "What does a context manager do?",
    "Write a class for a stack.",
)


@dataclass(frozen=True)
class Request:
    """One request of a workload."""

    workload: str
    path: str
    body: dict[str, Any]
    stop_after_tokens: int | None = None  # the user walks away after this many; None: never


@dataclass(frozen=True)
class Mix:
    """Relative weights of the workloads, and the sizes of their requests."""

    completion: float = 4
    chat: float = 2
    sampled: float = 2
    cancelled: float = 1
    long: float = 1
    max_tokens: int = 96
    long_prompt_lines: int = 48  # of code, about ten tokens each

    @classmethod
    def parse(cls, text: str, max_tokens: int) -> "Mix":
        """Parse weights such as `completion=3,cancelled=1`; others are 0. Empty: the default mix. Raises ValueError."""
        if not text:
            return cls(max_tokens=max_tokens)
        weights = dict.fromkeys(WORKLOADS, 0.0)
        for assignment in text.split(","):
            name, _, weight = assignment.partition("=")
            if name not in weights:
                raise ValueError(f"unknown workload {name!r}; choose from {', '.join(WORKLOADS)}")
            weights[name] = float(weight)
        completion, chat, sampled, cancelled, long = weights.values()
        return cls(completion, chat, sampled, cancelled, long, max_tokens)

    def draw(self, random: Random, model: str) -> Request:
        """Draw one request for `model`."""
        workload = random.choices(WORKLOADS, [getattr(self, name) for name in WORKLOADS])[0]
        body: dict[str, Any] = {"model": model, "max_tokens": random.randint(self.max_tokens // 3, self.max_tokens)}
        body |= {"temperature": 0.0, "seed": random.getrandbits(32), **STREAM}
        if workload == "chat":
            body["messages"] = [{"role": "user", "content": random.choice(QUESTIONS)}]
            return Request(workload, "/v1/chat/completions", body)
        body["prompt"] = random.choice(CODE)
        if workload == "sampled":
            body |= {"temperature": random.choice((0.5, 0.8, 1.0)), "top_p": 0.95}
        if workload == "long":
            body["prompt"] = long_prompt(random, self.long_prompt_lines)
        stop = random.randint(1, self.max_tokens // 4) if workload == "cancelled" else None
        return Request(workload, "/v1/completions", body, stop)


def long_prompt(random: Random, num_lines: int) -> str:
    """Return code that no two requests share, so that no prefix cache helps."""
    names: Sequence[str] = ("path", "line", "name", "item", "value", "key")
    lines = ["def generated():\n"]
    for index in range(num_lines):
        name = random.choice(names)
        lines.append(
            f"    {name}_{random.randint(0, 999)} = {random.choice(names)}[{index}] + {random.randint(0, 99)}\n"
        )
    return "".join(lines)
