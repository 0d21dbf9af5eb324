"""Prompts to continue: Python source that the bundled pair never saw, or the user's own prompts."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.training.corpus import standard_library

Encode = Callable[[str], list[int]]
MAX_FILE_BYTES = 1_000_000


class PromptError(Exception):
    """The requested prompts are not available; the message says why."""


@dataclass(frozen=True, slots=True)
class Prompt:
    name: str  # file and place, for people
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Text:
    name: str
    text: str


def held_out_texts() -> list[Text]:
    """Return files of this Python's standard library that the bundled pair's training never saw.

    Raises PromptError on an installation without the library's source.
    """
    texts = [Text(document.name, document.text) for document in standard_library() if document.held_out]
    if not texts:
        raise PromptError("this Python lacks the source of its standard library: give prompts with --prompts")
    return texts


def folder_texts(folder: Path) -> list[Text]:
    """Return every Python file below `folder`, sorted by name. Raises PromptError if there is none."""
    texts = []
    for path in sorted(folder.rglob("*.py")):
        if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
            texts.append(Text(path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    if not texts:
        raise PromptError(f"no Python file of at most {MAX_FILE_BYTES} bytes below {folder}")
    return texts


def file_texts(path: Path) -> list[Text]:
    """Read whole prompts: lines of `{"prompt": ...}` from a `.jsonl` file, else blocks between blank lines.

    Raises PromptError, naming the wrong line.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read prompts from {path}: {error}") from None
    blocks = _lines_of_json(path, content) if path.suffix == ".jsonl" else _blocks(content)
    texts = [Text(f"{path.name}:{number}", text) for number, text in blocks]
    if not texts:
        raise PromptError(f"{path} has no prompts")
    return texts


def cut_prompts(texts: Sequence[Text], count: int, length: int, encode: Encode, seed: int) -> list[Prompt]:
    """Cut `count` pieces of `length` tokens at random places. Every text is used once before any is used again.

    Raises PromptError if no text is that long.
    """
    generator = random.Random(seed)
    remaining: list[Text] = []
    encoded: dict[str, list[int]] = {}
    prompts: list[Prompt] = []
    while len(prompts) < count:
        if not remaining:
            if encoded and not any(len(tokens) >= length for tokens in encoded.values()):
                raise PromptError(f"no text has {length} tokens: ask for shorter prompts with --prompt-tokens")
            remaining = list(texts)
            generator.shuffle(remaining)
        text = remaining.pop()
        if text.name not in encoded:
            encoded[text.name] = encode(text.text)
        tokens = encoded[text.name]
        if len(tokens) >= length:
            start = generator.randrange(len(tokens) - length + 1)
            prompts.append(Prompt(f"{text.name}@{start}", tuple(tokens[start : start + length])))
    return prompts


def whole_prompts(texts: Sequence[Text], count: int, max_tokens: int, encode: Encode) -> list[Prompt]:
    """Return `count` prompts, repeated if there are fewer. Long ones are cut to their last `max_tokens` tokens."""
    prompts = [Prompt(text.name, tuple(encode(text.text)[-max_tokens:])) for text in texts[:count]]
    prompts = [prompt for prompt in prompts if prompt.tokens]
    if not prompts:
        raise PromptError("every prompt is empty")
    return [prompts[i % len(prompts)] for i in range(count)]


def batches(prompts: Sequence[Prompt], size: int) -> list[tuple[Prompt, ...]]:
    """Return consecutive groups of `size` prompts. A rest that fills no group is dropped."""
    return [tuple(prompts[at : at + size]) for at in range(0, len(prompts) - size + 1, size)]


def _lines_of_json(path: Path, content: str) -> Iterable[tuple[int, str]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise PromptError(f'{path}, line {number}: expected an object such as {{"prompt": "import os"}}')
        yield number, prompt


def _blocks(content: str) -> Iterable[tuple[int, str]]:
    """Yield the blocks between blank lines, numbered from 1."""
    number, lines = 0, list[str]()
    for line in [*content.splitlines(keepends=True), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            number += 1
            yield number, "".join(lines)
            lines = []
