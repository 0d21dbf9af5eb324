"""Structures compile within bounds, stay within bounds, and allow exactly the right tokens."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from service.structured import StructureCompiler, StructureError, StructureKind, StructureSpec
from service.text.tokenizer import TextTokenizer
from service.wiring import build_tokenizer

END = 256
DOUBLING = "start: a\n" + "\n".join(f"{a}: {b} {b} {b} | {b}" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
DOUBLING += '\ni: "x" | "y"'


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> TextTokenizer:
    return build_tokenizer(tiny_target)


def compiler(tokenizer: TextTokenizer, cache_size: int = 4) -> StructureCompiler:
    return StructureCompiler(tokenizer.to_json, tokenizer.end_token_ids, cache_size)


def allowed(mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> bytes:
    return bytes(token for token in np.flatnonzero(mask) if token < 256)


def test_masks_follow_the_output_and_the_draft(tokenizer: TextTokenizer) -> None:
    state = compiler(tokenizer).compile(StructureSpec("regex", "ab(c|d)e")).start()
    masks = state.masks(b"abd")
    assert [allowed(mask) for mask in masks] == [b"a", b"b", b"cd", b"e"]
    state.advance(b"ab")
    assert [allowed(mask) for mask in state.masks(b"c")] == [b"cd", b"e"]
    state.advance(b"ce")
    assert np.flatnonzero(state.masks(())[0]).tolist() == [END]


def test_rows_behind_a_refused_token_are_left_open(tokenizer: TextTokenizer) -> None:
    state = compiler(tokenizer).compile(StructureSpec("regex", "abc")).start()
    masks = state.masks(b"axc")
    assert allowed(masks[1]) == b"b"
    assert masks[2:].all()
    assert allowed(state.masks(())[0]) == b"a"  # the draft has left no trace in the state


def test_rows_behind_the_end_are_left_open_and_the_state_goes_on(tokenizer: TextTokenizer) -> None:
    state = compiler(tokenizer).compile(StructureSpec("regex", "a+")).start()
    masks = state.masks([97, END, 97])
    assert masks[1][END]
    assert masks[2:].all()
    state.advance(b"aa")
    assert sorted(np.flatnonzero(state.masks(())[0]).tolist()) == [97, END]


def test_drafts_are_cut_and_completed(tokenizer: TextTokenizer) -> None:
    state = compiler(tokenizer).compile(StructureSpec("regex", "(ab|ac)def")).start()
    assert bytes(state.complete(b"", 8)) == b"a"
    assert bytes(state.complete(b"abx", 8)) == b"abdef"
    assert bytes(state.complete(b"abx", 3)) == b"abd"
    assert state.complete(b"", 0) == ()
    assert state.complete([97, 98, 100, 101, 102, END], 8)[-1] == END
    assert state.complete([97, 98, 256, 100], 8) == tuple(b"abdef")[:2]
    assert state.complete([97, 98, 271, 100], 8) == tuple(b"ab")  # no token of the tokenizer's
    assert state.next_allowed([97, 271]) is None
    assert state.masks([97, 271, 98])[2:].all()
    assert state.next_allowed(b"ax") is None
    assert state.next_allowed([END]) is None
    mask = state.next_allowed(b"a")
    assert mask is not None
    assert allowed(mask) == b"bc"


@pytest.mark.parametrize(
    ("kind", "definition"),
    [
        ("regex", "(a"),
        ("regex", "(?=a)b"),
        ("regex", r"(a)\1"),
        ("grammar", "start: missing"),
        ("grammar", "x" * 50),
        ("json_schema", "{"),
        ("json_schema", '{"type": 5}'),
        ("json_schema", '{"$ref": "http://127.0.0.1:1/schema.json"}'),
        ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(
    kind: StructureKind, definition: str, tokenizer: TextTokenizer
) -> None:
    with pytest.raises(StructureError) as caught:
        compiler(tokenizer).compile(StructureSpec(kind, definition))
    assert "\n" not in str(caught.value)
    assert 0 < len(str(caught.value)) <= 300
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "definition"),
    [
        ("regex", "(((a{1,999}){1,999}){1,999}){1,999}"),
        ("regex", "(a?){2000}b{2000}|(x+x+)+y"),
        ("regex", "|".join(f"({i}.*){{3,50}}" for i in range(2000))),
        ("json_schema", json.dumps({"allOf": [{"enum": list(range(30000))}] * 4})),
        ("json_schema", '{"anyOf":[' * 400 + "{}" + "]}" * 400),
        ("grammar", DOUBLING),
    ],
)
def test_hostile_structures_end_within_bounds(kind: StructureKind, definition: str, tokenizer: TextTokenizer) -> None:
    """The bound limits work. Without a clock, this test only sees that it ends."""
    try:
        state = compiler(tokenizer).compile(StructureSpec(kind, definition)).start()
    except StructureError:
        return
    for _ in range(50):
        mask = state.masks(())[0]
        assert mask.any() or state.error
        if state.error or mask[END]:
            break
        state.advance([int(np.flatnonzero(mask)[-1])])


def test_the_cache_is_bounded_and_used(tokenizer: TextTokenizer) -> None:
    one = compiler(tokenizer, cache_size=2)
    specs = [StructureSpec("regex", letter) for letter in "abc"]
    first = one.compile(specs[0])
    assert one.compile(specs[0]) is first
    one.compile(specs[1])
    one.compile(specs[0])  # used again, so the other is now the oldest
    one.compile(specs[2])
    assert one.find(specs[1]) is None
    assert one.find(specs[0]) is first


def test_states_of_one_structure_do_not_know_each_other(tokenizer: TextTokenizer) -> None:
    structure = compiler(tokenizer).compile(StructureSpec("regex", "[ab]{200}"))
    outputs: list[int] = []

    def write() -> None:
        state = structure.start()
        for i in range(200):
            assert allowed(state.masks(b"ab")[0]) == b"ab"
            state.advance([97 + i % 2])
        outputs.append(int(np.flatnonzero(state.masks(())[0])[0]))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == [END] * 4


def test_a_model_without_an_end_has_no_structured_output(tokenizer: TextTokenizer) -> None:
    with pytest.raises(StructureError, match="ends a text"):
        StructureCompiler(tokenizer.to_json, (), 4).compile(StructureSpec("regex", "a"))
