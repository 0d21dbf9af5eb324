"""Incremental text is the text of all tokens, and stop strings are found however the text is cut."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from service.text.detokenizer import IncrementalDetokenizer, StopMatcher
from service.text.tokenizer import TextTokenizer
from tests.fuzz.stops import expected
from tests.text_cuts import cut

SAMPLE = "Größe 漢字 🙂🙃 naïve café — def f(x):\n    return x\n" * 4


def trained_tokenizer() -> Tokenizer:
    """A byte-level BPE with merges inside and across multi-byte characters, and a special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    return tokenizer


TRAINED = trained_tokenizer()
TOKENIZER = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=TRAINED), (0,))
TOKENS = st.lists(st.integers(0, TRAINED.get_vocab_size() - 1), max_size=40)


def pieces_of(tokens: Sequence[int], *, skip_special_tokens: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special_tokens=skip_special_tokens)
    return [*map(detokenizer.push, tokens), detokenizer.finish()]


@given(TOKENS, st.booleans())
def test_pieces_join_to_the_tokenizers_own_text(tokens: list[int], skip: bool) -> None:
    joined = "".join(pieces_of(tokens, skip_special_tokens=skip))
    assert joined == TRAINED.decode(tokens, skip_special_tokens=skip)
    assert joined == TOKENIZER.decode(tokens, skip_special_tokens=skip)


@given(st.text(min_size=1, max_size=30))
def test_valid_text_never_shows_a_replacement_character_early(text: str) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    shown = ""
    for piece in pieces_of(tokens, skip_special_tokens=True):
        shown += piece
        assert text.startswith(shown)
    assert shown == text


def test_a_character_split_over_tokens_waits_for_its_last_byte() -> None:
    tokens = [TRAINED.token_to_id(character) for character in "ðŁĻĤ"]  # the four bytes of a smiley
    assert pieces_of(tokens, skip_special_tokens=True) == ["", "", "", "🙂", ""]
    assert pieces_of(tokens[:2], skip_special_tokens=True) == ["", "", "�"]


def run(stops: list[str], pieces: list[str], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include=include)
    shown = ""
    for piece in pieces:
        matched = matcher.push(piece)
        shown += matched.text
        if matched.stop is not None:
            return shown, matched.stop
    return shown + matcher.release(), None


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


@given(STOPS, st.text("abc", max_size=20), st.lists(st.integers(0, 50), max_size=8), st.booleans())
def test_stop_strings_are_found_however_the_text_is_cut(
    stops: list[str], text: str, places: list[int], include: bool
) -> None:
    assert run(stops, cut(text, places), include=include) == expected(stops, text, include=include)


@given(STOPS, st.text("abc", max_size=20))
def test_nothing_shown_is_ever_taken_back(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops, include=False)
    final, _ = expected(stops, text, include=False)
    shown = ""
    for character in text:
        matched = matcher.push(character)
        shown += matched.text
        assert final.startswith(shown)
        if matched.stop is not None:
            break


@pytest.mark.parametrize(("piece", "shown"), [("x", "x"), ("a", ""), ("xa", "x")])
def test_only_a_possible_beginning_is_held_back(piece: str, shown: str) -> None:
    assert StopMatcher(["abc"], include=False).push(piece).text == shown
