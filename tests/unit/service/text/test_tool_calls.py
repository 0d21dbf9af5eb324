"""Tool calls are found however the text is cut; what is no call stays text; nothing makes the parser fail."""

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.text.tool_calls import MAX_FAILURES, ToolCallParser, ToolCallStyle, style_of_template
from tests.checkpoints import HERMES_TEMPLATE, LLAMA3_TEMPLATE
from tests.fuzz.tool_calls import NAMES, check_told, read
from tests.text_cuts import cut

CALL = '{"name": "get_weather", "arguments": {"city": "Köln", "tags": ["</tool_call>", "\\"{"]}}'
HERMES = f"<tool_call>\n{CALL}\n</tool_call>"
PARTS = [
    *("<tool_call>", "</tool_call>", "<tool", '{"name": "get", "arguments": ', '{"name":"get_weather", "parameters": '),
    *('{"arguments": {"a": 1}, "name": "get"}', '{"name": "get"}', '{"name": "drop", "arguments": {}}', "{", "}"),
    *('{"a": [1, {"b": "}"}]}', '{"a" 1}', '{"a": tru', "\\", "\n", " ", "; ", "<|python_tag|>", "text", "[", "]"),
    *(HERMES, CALL, "\x00", "é", ":", ",", '"', "1e999", "-0.10"),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join)
STYLES: st.SearchStrategy[ToolCallStyle] = st.sampled_from(["hermes", "llama3_json"])


@given(STYLES, TEXTS, st.lists(st.integers(0, 500), max_size=8), st.booleans(), st.sampled_from([None, 1]))
def test_calls_and_content_do_not_depend_on_how_the_text_is_cut(
    style: ToolCallStyle, text: str, places: list[int], eager: bool, most: int | None
) -> None:
    whole = read(style, [text], eager=eager, max_calls=most)
    assert read(style, cut(text, places), eager=eager, max_calls=most) == whole
    assert read(style, text, eager=eager, max_calls=most) == whole


@given(STYLES, TEXTS)
@example("hermes", HERMES * 2)
@example("hermes", '<tool_call>{"arguments":{"a":1e999},"name":"get"}</tool_call>')
def test_calls_that_are_told_as_a_whole_are_json_and_texts_without_calls_are_content(
    style: ToolCallStyle, text: str
) -> None:
    check_told(style, text)


@given(st.text(alphabet=st.characters(exclude_characters="<")), STYLES, st.dictionaries(st.text(), st.integers()))
def test_what_stands_before_a_call_is_content(text: str, style: ToolCallStyle, arguments: dict[str, int]) -> None:
    call = json.dumps({"name": "get", "arguments": arguments})
    content, calls, _ = read("hermes", [f"{text}\n<tool_call>\n{call}\n</tool_call>"])
    assert content == text.rstrip(" \t\r\n")
    assert [(name, json.loads(written)) for name, written in calls] == [("get", arguments)]


def test_arguments_come_while_they_are_written() -> None:
    parser = ToolCallParser("hermes", NAMES, eager=True)
    told = [parser.push(piece) for piece in ("Let me ", "see.\n<tool", '_call>{"name": "get', '", "arguments": {"a')]
    assert [part.content for part in told] == ["Let me", " see.", "", ""]
    assert [(call.name, call.arguments) for call in told[-1].calls] == [("get", ""), (None, '{"a')]
    assert [call.arguments for call in parser.push('": 1').calls] == ['": 1']
    assert [call.arguments for call in parser.push("}}</tool_call>").calls] == ["}"]
    assert parser.num_calls == 1


# style, text, its content (None: all of it), its calls
CASES: list[tuple[ToolCallStyle, str, str | None, list[tuple[str, str]]]] = [
    ("hermes", HERMES, "", [("get_weather", '{"city": "Köln", "tags": ["</tool_call>", "\\"{"]}')]),
    ("hermes", '<tool_call>{"name":"get","arguments":{}}', "", [("get", "{}")]),  # without its end
    ("hermes", '<tool_call>{"name":"get","arguments":{}</tool_call>', "", [("get", "{}")]),  # without a brace
    ("hermes", '<tool_call>{"name":"get","arguments":{}}</tool_call> Done. ', " Done.", [("get", "{}")]),
    ("hermes", '<tool_call>{"arguments":{"a":1},"name":"get"}</tool_call>', "", [("get", '{"a":1}')]),
    ("hermes", '<tool_call>{"name":"get","arguments":"{\\"a\\": 1}"}</tool_call>', "", [("get", '{"a": 1}')]),
    ("hermes", '<tool_call>{"arguments":{"a":1e999},"name":"get"}</tool_call>', "", [("get", '{"a":1e999}')]),
    (
        "hermes",
        '<tool_call>{ "arguments" : {"x": 0} , "n" : [1, {}],"arguments":{ "a" : 1.10,\t"b":12345678901234567890.10 } ,'
        ' "name":"get"} </tool_call>',
        "",
        [("get", '{ "a" : 1.10,\t"b":12345678901234567890.10 }')],
    ),
    ("hermes", '<tool_call>{"name":"get"}</tool_call>', "", [("get", "{}")]),
    ("hermes", '<tool_call>{"parameters":null,"name":"get"}</tool_call>', "", [("get", "{}")]),
    ("hermes", '<tool_call>{"name":["get"],"arguments":{}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name":"rm","arguments":{}}</tool_call>', None, []),  # no such tool
    ("hermes", '<tool_call>{"name":"get","arguments":{"a":True}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name":"get","arguments":{"a":1', None, []),
    ("hermes", '<tool_call>{"name":"get","arguments":[]}</tool_call>', None, []),
    ("hermes", "a < b <tool_call> \n", None, []),
    (
        "hermes",
        f"<tool_call>oops {HERMES}",
        "<tool_call>oops",
        [("get_weather", '{"city": "Köln", "tags": ["</tool_call>", "\\"{"]}')],
    ),
    ("llama3_json", '{"name": "get", "parameters": {"a": 1}}', "", [("get", '{"a": 1}')]),
    ("llama3_json", '<|python_tag|>{"name": "get", "parameters": {}}; {"name": "get"}', "", [("get", "{}")] * 2),
    ("llama3_json", 'Use {"name": "get", "parameters": {}}', None, []),
    ("llama3_json", '{"answer": 1}', None, []),
]


@pytest.mark.parametrize(("style", "text", "content", "calls"), CASES)
def test_what_is_a_call_and_what_is_not(
    style: ToolCallStyle, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    assert read(style, [text])[:2] == (text if content is None else content, calls)


def test_further_calls_than_asked_for_are_dropped() -> None:
    assert len(read("hermes", [HERMES * 3], max_calls=1)[1]) == 1


def test_behind_too_many_blocks_that_are_no_calls_nothing_is_looked_at_again() -> None:
    """Or a model could be made to write a text whose reading takes time that grows with its square."""
    block = "<tool_call>{"
    assert len(read("hermes", [block * (MAX_FAILURES - 1) + HERMES])[1]) == 1
    assert read("hermes", [block * MAX_FAILURES + HERMES]) == (block * MAX_FAILURES + HERMES, [], 0)


# style, what stands before a run of blanks, and after it
RUNS: list[tuple[ToolCallStyle, str, str]] = [
    ("hermes", "text", "text"),
    ("hermes", "<tool_call>", CALL),
    ("hermes", '<tool_call>{"name"', ': "get"}'),
    ("hermes", '<tool_call>{"name": "get", "arguments": {', "}}"),
    ("hermes", '<tool_call>{"name": "get", "arguments": {}', "}</tool_call>"),
    ("hermes", '<tool_call>{"arguments": {', '}, "name": "get"}'),
    ("llama3_json", "", '{"name": "get"}'),
    ("llama3_json", "<|python_tag|>", '{"name": "get"}'),
    ("llama3_json", '{"name": "get", "parameters": {}', "}"),
    ("llama3_json", '{"name": "get", "parameters": {}};', '{"name": "get"}'),
    ("llama3_json", "text", "text"),
]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("style", "before", "after"), RUNS)
def test_the_time_to_read_blanks_grows_with_their_number_not_with_its_square(
    style: ToolCallStyle, before: str, after: str, eager: bool
) -> None:
    def seconds(num_pieces: int) -> float:
        begin = time.process_time()
        read(style, [before, *["  \n "] * num_pieces, after], eager=eager)
        return time.process_time() - begin

    # the ratio of two sizes: 12 by rights, 144 if every blank is looked at again with every piece
    few = min(seconds(2_000) for _ in range(3))
    many = min(seconds(24_000) for _ in range(2))
    assert many < 4 * 12 * few


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("style", "before", "after"), RUNS)
@pytest.mark.parametrize("num_blanks", [1, 505, 506, 507, 510, 511, 512, 513, 5000])
def test_a_call_is_one_however_long_its_gaps_are(
    style: ToolCallStyle, before: str, after: str, eager: bool, num_blanks: int
) -> None:
    text = before + " " * num_blanks + after
    content, calls, num_complete = read(style, [text], eager=eager)
    near = read(style, [before + " " + after], eager=eager)
    assert ([name for name, _ in calls], num_complete) == ([name for name, _ in near[1]], near[2])
    assert read(style, text, eager=eager) == (content, calls, num_complete)


def test_the_format_is_known_by_the_template() -> None:
    assert style_of_template(HERMES_TEMPLATE) == "hermes"
    assert style_of_template(LLAMA3_TEMPLATE) == "llama3_json"
    assert style_of_template("{% for tool in tools %}<tool_call>\n<function=name>arguments") is None
    assert style_of_template("{{ messages }}") is None
