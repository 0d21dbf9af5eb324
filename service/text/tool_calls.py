"""Finds tool calls in a model's text as it comes, in the formats of two families of chat templates.

`hermes` (Qwen2.5, Qwen3, Hermes): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, text before and between.
`llama3_json` (Llama 3.1 and later): the whole text is `{"name": ..., "parameters": {...}}`, or several, `;` between.
Both formats take both names, `arguments` and `parameters`. All that is no call of a known tool stays text, unchanged.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from service.text.json_object import JsonObjectScanner, parse_object, written_values

ToolCallStyle = Literal["hermes", "llama3_json"]

HERMES_TAGS = ("<tool_call>", "</tool_call>")
PYTHON_TAG = "<|python_tag|>"  # Llama 3 may begin a call with it
BLANKS = " \t\r\n"
ARGUMENT_KEYS = ('"arguments"', '"parameters"')
MAX_GAP = 512  # characters of blanks and one word of a call's usual beginning; a call with more of them is unusual
MAX_FAILURES = 64  # blocks that look like calls and are none. After them all is text, so that the work stays linear


def style_of_template(template: str) -> ToolCallStyle | None:
    """Find the format in which a model with this chat template writes calls; None if it is neither of the two."""
    if "<tool_call>" in template and "arguments" in template:
        return None if re.search("<function=|<arg_key>", template) else "hermes"  # Qwen3-Coder's, GLM's
    return "llama3_json" if re.search(r'\{\\?"name\\?": function name, \\?"parameters\\?"', template) else None


@dataclass(frozen=True, slots=True)
class CallFragment:
    """A piece of one call: the first has its name, the others its arguments as JSON text."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class ToolText:
    """The content and the calls that a piece of text adds to the message."""

    content: str = ""
    calls: tuple[CallFragment, ...] = ()


class State(Enum):
    TEXT = auto()  # before, between and after calls
    HEAD = auto()  # from the beginning of a call to the beginning of its arguments
    WHOLE = auto()  # a call that does not begin as usual: parsed when it is complete
    ARGUMENTS = auto()
    AFTER = auto()  # from the end of the arguments to the end of the call
    REST = auto()  # no more calls can come


class ToolCallParser:
    """Splits a text into content and tool calls, however it is cut into pieces.

    Joined, content and calls do not depend on the cuts. Blanks around calls are dropped, and so is all that follows
    the arguments in a call's block. A text without calls is its content, unchanged.
    """

    def __init__(
        self, style: ToolCallStyle, names: Collection[str], *, eager: bool, max_calls: int | None = None
    ) -> None:
        """names: of the tools that may be called. max_calls: further calls are dropped.

        eager: return arguments while they are written. If they turn out to be no JSON, the call stays, broken; without
        `eager` its text is content.
        """
        self._opening, self._closing = HERMES_TAGS if style == "hermes" else ("", "")
        self._names = frozenset(names)
        self._eager = eager
        self._max_calls = max_calls
        self._state = State.TEXT if style == "hermes" else State.HEAD
        # Text is kept in lists: joining it at every piece would take time that grows with the square of its length.
        self._held = ""  # text that may yet be content or a call
        self._blanks: list[str] = []  # belong to the content if more of it follows
        # Of the call that is being read:
        self._head: list[str] = []  # text before its object, or its arguments: content if it is no call
        self._object: list[str] = []  # text of its object, or its arguments, so far: read again if it is no call
        self._behind: list[str] = []  # text between its arguments and its end
        self._scanner = JsonObjectScanner()
        self._name = ""
        self._is_given = False  # its arguments are returned while they come
        self._may_have_tag = style == "llama3_json"
        self._may_have_brace = False  # the brace that ends the call
        self._num_started = 0
        self._num_failures = 0
        self._content: list[str] = []
        self._calls: list[CallFragment] = []
        self.num_calls = 0  # complete ones

    def push(self, piece: str) -> ToolText:
        """Take in a piece of text. Returns the content and the calls that it completes."""
        self._held += piece
        self._run(is_end=False)
        return self._take()

    def finish(self) -> ToolText:
        """End the text. Returns the rest; an unfinished call is content, unless some of it was returned already."""
        self._run(is_end=True)
        if not self._num_started:
            self._content += self._blanks
        return self._take()

    def _take(self) -> ToolText:
        taken = ToolText("".join(self._content), tuple(self._calls))
        self._content, self._calls = [], []
        return taken

    def _run(self, *, is_end: bool) -> None:
        steps = {
            State.TEXT: self._read_text,
            State.HEAD: self._read_head,
            State.WHOLE: self._read_whole,
            State.ARGUMENTS: self._read_arguments,
            State.AFTER: self._read_after,
            State.REST: self._read_rest,
        }
        while steps[self._state](is_end):
            pass

    def _say(self, text: str) -> None:
        shown = text.rstrip(BLANKS)
        if shown:
            self._content += [*self._blanks, shown]
            self._blanks = []
        self._blanks.append(text[len(shown) :])

    def _read_text(self, is_end: bool) -> bool:
        begin = self._held.find(self._opening)
        if begin >= 0:
            self._say(self._held[:begin])
            self._begin_call(self._opening, self._held[begin + len(self._opening) :])
            return True
        keep = 0 if is_end else _overlap(self._held, self._opening)
        self._say(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _begin_call(self, head: str, rest: str) -> None:
        self._head, self._object, self._held, self._state = [head], [], rest, State.HEAD
        self._may_have_tag = not self._opening

    def _read_head(self, is_end: bool) -> bool:
        is_object = self._reach_object()
        if is_object is None and not is_end:
            return False
        if not is_object:
            self._fail()
            return True
        found = _match_head(self._held, self._names)
        if found is None and not is_end:
            return False
        self._scanner = JsonObjectScanner()
        if not isinstance(found, tuple):
            self._state = State.WHOLE
            return True
        self._state = State.ARGUMENTS
        self._name, begin = found
        self._pass_over(begin)
        self._is_given = self._eager and (self._max_calls is None or self._num_started < self._max_calls)
        if self._is_given:
            self._start_call(self._name)
        return True

    def _reach_object(self) -> bool | None:
        """Pass over blanks and Llama's tag. Returns whether an object begins there; None if more text is needed."""
        self._pass_over(_num_blanks(self._held))
        if self._may_have_tag and self._held.startswith(PYTHON_TAG):
            self._may_have_tag = False
            self._pass_over(len(PYTHON_TAG))
            self._pass_over(_num_blanks(self._held))
        if not self._held or (self._may_have_tag and PYTHON_TAG.startswith(self._held)):
            return None
        return self._held.startswith("{")

    def _pass_over(self, length: int) -> None:
        self._head.append(self._held[:length])
        self._held = self._held[length:]

    def _read_whole(self, is_end: bool) -> bool:
        """Read a call that is returned as a whole or not at all."""
        has_ended, _ = self._read_object()
        if not has_ended and not self._scanner.is_broken and not is_end:
            return False
        call = _parse_call("".join(self._object), self._names) if has_ended else None
        if call is None:
            self._fail()
            return True
        name, arguments = call
        self._start_call(name)
        self._give(arguments)
        self._end_call()
        return True

    def _read_object(self) -> tuple[bool, str]:
        """Read on in the object. Returns whether it has ended, and its new text."""
        has_ended = self._scanner.scan(self._held, 0) >= 0
        piece = self._held[: self._scanner.position]
        self._scanner.position = 0
        self._object.append(piece)
        self._held = self._held[len(piece) :]
        return has_ended, piece

    def _fail(self) -> None:
        """Take back what looked like a call: it is content."""
        self._num_failures += 1
        self._say("".join(self._head))
        self._held = "".join([*self._object, self._held])
        self._state = State.TEXT if self._opening and self._num_failures < MAX_FAILURES else State.REST

    def _start_call(self, name: str) -> None:
        self._num_started += 1
        self._blanks = []
        if self._is_wanted:
            self._calls.append(CallFragment(self._num_started - 1, name))

    def _give(self, arguments: str) -> None:
        if arguments and self._is_wanted:
            self._calls.append(CallFragment(self._num_started - 1, None, arguments))

    @property
    def has_only_whole_calls(self) -> bool:
        """True if there are calls, and none of them is broken or cut."""
        num_told = self._num_started if self._max_calls is None else min(self._num_started, self._max_calls)
        return 0 < num_told == self.num_calls

    @property
    def _is_wanted(self) -> bool:
        """True if the latest call is returned, not dropped."""
        return self._max_calls is None or self._num_started <= self._max_calls

    def _read_arguments(self, is_end: bool) -> bool:
        has_ended, piece = self._read_object()
        if self._is_given:
            self._give(piece)
        if not has_ended and not self._scanner.is_broken and not is_end:
            return False
        arguments = "".join(self._object)
        is_complete = has_ended and parse_object(arguments) is not None
        if not self._is_given and not is_complete:
            self._fail()
            return True
        if not self._is_given:
            self._start_call(self._name)
            self._give(arguments)
        self._end_call(is_complete=is_complete)
        return True

    def _end_call(self, *, is_complete: bool = True) -> None:
        self.num_calls += is_complete and self._is_wanted
        self._behind, self._may_have_brace, self._state = [], True, State.AFTER

    def _read_after(self, is_end: bool) -> bool:
        return self._read_closing(is_end) if self._opening else self._read_separator(is_end)

    def _read_closing(self, is_end: bool) -> bool:
        """Drop the text between the arguments and the end tag; without an end tag it is content."""
        close, begin = self._held.find(self._closing), self._held.find(self._opening)
        if close >= 0 and (begin < 0 or close < begin):
            self._held, self._state = self._held[close + len(self._closing) :], State.TEXT
            return True
        if begin < 0:
            keep = 0 if is_end else max(_overlap(self._held, tag) for tag in HERMES_TAGS)
            begin = len(self._held) - keep
            self._behind.append(self._held[:begin])
            self._held = self._held[begin:]
            if not is_end:
                return False
            begin = 0
        between = "".join([*self._behind, self._held[:begin]])
        if between.strip(BLANKS) not in ("", "}"):
            self._say(between)
        self._held, self._state = self._held[begin:], State.TEXT
        return True

    def _read_separator(self, is_end: bool) -> bool:
        """Read the `}` that ends the call, then `;` if another call follows."""
        self._held = self._held.lstrip(BLANKS)
        if self._may_have_brace and self._held.startswith("}"):
            self._may_have_brace = False
            self._held = self._held[1:].lstrip(BLANKS)
        if not self._held and not is_end:
            return False
        if self._held.startswith(";"):
            self._begin_call(";", self._held[1:])
            return True
        self._state = State.REST
        return True

    def _read_rest(self, is_end: bool) -> bool:
        self._say(self._held)
        self._held = ""
        return False


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


def _num_blanks(text: str) -> int:
    """Count the blanks that the text begins with."""
    return len(text) - len(text.lstrip(BLANKS))


def _match_head(text: str, names: Collection[str]) -> tuple[str, int] | Literal[False] | None:
    """Find the tool's name and where its arguments begin, in a text that begins with `{`.

    Returns False if the text does not begin as usual, None if more of it is needed.
    """
    position, name = 1, ""
    quoted = [f'"{name}"' for name in names]
    for choices in (['"name"'], [":"], quoted, [","], ARGUMENT_KEYS, [":"], ["{"]):
        found = _follow(text, position, choices)
        if not isinstance(found, str):
            return found
        position = text.index(found, position) + len(found)
        if choices is quoted:
            name = found[1:-1]
    return name, position - 1


def _follow(text: str, position: int, choices: Sequence[str]) -> str | Literal[False] | None:
    """Return the choice that comes next, after blanks; False for none of them, None if more text is needed."""
    rest = text[position : position + MAX_GAP].lstrip(BLANKS)
    for choice in choices:
        if rest.startswith(choice):
            return choice
    may_follow = any(choice.startswith(rest) for choice in choices)
    return None if may_follow and len(text) < position + MAX_GAP else False


def _parse_call(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """Return name and arguments of a whole call, its keys in any order; the arguments as the model wrote them."""
    content = parse_object(text)
    name = None if content is None else content.get("name")
    if content is None or not isinstance(name, str) or name not in names:
        return None
    key = "arguments" if "arguments" in content else "parameters"
    arguments = content.get(key)
    if isinstance(arguments, str) and parse_object(arguments) is not None:  # some models write the JSON as a text
        return name, arguments
    if arguments is None:
        return name, "{}"
    return (name, written_values(text)[key]) if isinstance(arguments, dict) else None
