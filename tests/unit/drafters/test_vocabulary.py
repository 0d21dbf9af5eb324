"""Compare vocabularies by their tokens, and draft from one vocabulary for another."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from drafters.base import Tokens
from drafters.diffusion.drafter import DiffusionDrafter, DiffusionOptions
from drafters.diffusion.masked import MaskedRequest
from drafters.diffusion.vocabulary import MappedDrafter, RetokenizingDrafter
from drafters.diffusion.vocabulary_map import VocabularyMap, compare_vocabularies
from tests.checkpoints import TOKENIZER_LENGTH, VOCABULARY_SIZE, write_hub_drafter
from tests.faulty import FaultyTransformer
from transformer.model import Transformer

TARGET = {"a": 0, "b": 1, "c": 2, "<end>": 3}


@pytest.mark.parametrize(
    ("drafter", "relation", "num_shared"),
    [
        (TARGET | {"<mask>": 4}, "identical", 4),
        (TARGET, "identical", 4),
        (TARGET | {"a": 1, "b": 0}, "overlapping", 4),  # the same tokens, but not the same ids
        ({"a": 0, "b": 1, "<mask>": 3, "c": 2}, "overlapping", 3),  # one of the target's ids means another token
        ({"a": 0, "b": 1, "c": 2}, "overlapping", 3),  # the target has one more token
        ({"▁a": 0, "▁b": 1, "▁c": 2, "<end>": 3}, "disjoint", 1),
        ({"a": 7}, "overlapping", 1),  # all of a small vocabulary
        ({"x": 0}, "disjoint", 0),
    ],
)
def test_vocabularies_are_compared_by_token(drafter: dict[str, int], relation: str, num_shared: int) -> None:
    vocabularies = compare_vocabularies(TARGET, drafter)
    assert (vocabularies.relation, vocabularies.num_shared) == (relation, num_shared)
    assert vocabularies.overlap == num_shared / 4
    names = {index: token for token, index in TARGET.items()}
    for target_id, drafter_id in enumerate(vocabularies.to_drafter.tolist()):
        assert drafter.get(names[target_id], -1) == drafter_id
        assert drafter_id < 0 or vocabularies.to_target[drafter_id] == target_id


def test_sizes_say_nothing(tmp_path: Path) -> None:
    """Padding rows belong to no tokenizer: vocabularies of the same tokens are identical at any logits width."""
    assert compare_vocabularies(TARGET, dict(reversed(TARGET.items()))).relation == "identical"
    with pytest.raises(ValueError, match="without tokens"):
        compare_vocabularies(TARGET, {})


def random_tokens(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = tmp_path_factory.mktemp("sdar")
    write_hub_drafter(folder, "sdar")
    return Transformer.load(folder)


def drafter_of(model: Transformer, window: int = 96) -> DiffusionDrafter:
    options = DiffusionOptions(window, refresh_interval=1)
    return DiffusionDrafter(model, 2, VOCABULARY_SIZE, options, TOKENIZER_LENGTH)


def rotation(missing: Sequence[int] = ()) -> VocabularyMap:
    """Map target id t to drafter id t + 7, modulo 256; the drafter ids `missing` have no counterpart in the target."""
    drafter = {str(token): (token + 7) % 256 for token in range(256)}
    drafter = {f"?{token}" if index in missing else token: index for token, index in drafter.items()}
    return compare_vocabularies({str(token): token for token in range(256)}, drafter)


def test_a_mapped_draft_is_the_drafters_own_draft_in_the_targets_ids(model: Transformer) -> None:
    plain, mapped = drafter_of(model), MappedDrafter(drafter_of(model), rotation(), 300, lambda token: ())
    text = random_tokens(40)
    for so_far in (9, 12, 30, 40):
        expected = plain.propose([MaskedRequest("a", (text[:so_far] + 7) % 256, 4)])
        logits = mapped.propose([MaskedRequest("a", text[:so_far], 4)])
        assert logits.shape == (4, 300)
        ids = torch.arange(256)
        assert torch.equal(logits[:, ids], expected[:, (ids + 7) % 256])
        assert logits[:, 256:].isinf().all()
    mapped.release("a")
    assert mapped.pending_rows("a", 9) == 9


def test_a_mapped_draft_is_cut_at_the_first_token_without_an_image(model: Transformer) -> None:
    text = random_tokens(21)
    own = drafter_of(model).propose([MaskedRequest("a", (text + 7) % 256, 4)]).argmax(-1).tolist()
    assert own[2] not in own[:2]
    mapped = MappedDrafter(drafter_of(model), rotation(missing=[own[2]]), VOCABULARY_SIZE, lambda token: ())
    logits = mapped.propose([MaskedRequest("a", text, 4), MaskedRequest("b", text, 4)])
    finite = ~logits.isinf().all(-1)
    assert finite.tolist() == [True, True, False, False] * 2


def test_context_tokens_without_an_image_are_spelled_in_tokens_that_have_one(model: Transformer) -> None:
    missing = 50  # of the drafter's ids: target token 43
    text = np.array([1, 2, 43, 3, 43, 4, 5, 6], np.int32)
    mapped = MappedDrafter(drafter_of(model), rotation([missing]), VOCABULARY_SIZE, lambda token: (token, 9))
    spelled = np.array([8, 9, 43, 9, 10, 43, 9, 11, 12, 13], np.int32)
    expected = drafter_of(model).propose([MaskedRequest("a", spelled, 3)])
    for so_far in (3, 4, 8):
        logits = mapped.propose([MaskedRequest("a", text[:so_far], 3)])
    best = expected.argmax(-1)
    assert torch.equal((logits.argmax(-1) + 7) % 256, best)


@pytest.mark.parametrize("kind", ["mapped", "retokenizing"])
def test_nan_stays_nan_across_vocabularies(kind: str, tmp_path: Path) -> None:
    write_hub_drafter(tmp_path, "sdar")
    broken = FaultyTransformer.load(tmp_path)
    broken.plant("nan")
    inner = drafter_of(broken)
    drafter = (
        MappedDrafter(inner, rotation(missing=[0]), VOCABULARY_SIZE, lambda token: ())
        if kind == "mapped"
        else RetokenizingDrafter(inner, Letters(0), Letters(3), VOCABULARY_SIZE, {})
    )
    assert drafter.propose([MaskedRequest("a", random_tokens(20, seed=3) % 90 + 20, 4)]).isnan().all()


class Letters:
    """One token per character: target ids are code points, drafter ids are 3 lower; 0 is special."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def encode(self, text: str) -> list[int]:
        return [ord(character) - self.offset for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token + self.offset) for token in tokens if token)

    def bytes_of(self, token: int) -> bytes:
        return chr(token + self.offset).encode() if 0 < token + self.offset < 128 else b""


class Pairs(Letters):
    """Two characters per token where possible."""

    def encode(self, text: str) -> list[int]:
        return [sum(ord(c) << 8 * i for i, c in enumerate(text[at : at + 2])) for at in range(0, len(text), 2)]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.bytes_of(token).decode() for token in tokens)

    def bytes_of(self, token: int) -> bytes:
        return token.to_bytes(2, "little").rstrip(b"\0")


def test_a_retokenized_draft_has_the_text_that_the_drafter_wrote(model: Transformer) -> None:
    text = random_tokens(40, seed=3) % 90 + 20
    inner = drafter_of(model)
    drafter = RetokenizingDrafter(drafter_of(model), Letters(0), Letters(3), VOCABULARY_SIZE, {})
    for so_far in (12, 14, 30, 40):
        expected = inner.propose([MaskedRequest("a", text[:so_far] - 3, 4)])
        confidences, own = expected.softmax(-1).max(-1)
        logits = drafter.propose([MaskedRequest("a", text[:so_far], 4)])
        for row, (token, confidence) in enumerate(zip(own.tolist(), confidences.tolist(), strict=True)):
            if token + 3 >= 128:  # no letter: a special token, where the draft ends
                assert logits[row:].isinf().all()
                break
            assert int(logits[row].argmax()) == token + 3
            assert logits[row].softmax(-1).max() == pytest.approx(confidence, abs=0.01)


def test_tokens_of_several_letters_have_the_product_of_their_confidences(model: Transformer) -> None:
    drafter = RetokenizingDrafter(drafter_of(model), Pairs(0), Letters(0), 1 << 15, {})
    assert drafter._rewrite([97, 98, 99], [0.5, 0.5, 0.8]) == [(97 + (98 << 8), 0.25), (99, 0.8)]
    assert drafter._rewrite([97, 200, 99], [0.5, 0.5, 0.8]) == [(97, 0.5)]  # a special token ends the draft
    ending = RetokenizingDrafter(drafter_of(model), Pairs(0), Letters(0), 1 << 15, {200: 7})
    assert ending._rewrite([97, 200, 99], [0.5, 0.6, 0.8]) == [(97, 0.5), (7, 0.6)]
    assert ending._rewrite([], []) == []


def test_a_retokenized_context_beyond_the_window_moves_on(model: Transformer) -> None:
    drafter = RetokenizingDrafter(drafter_of(model, window=16), Letters(0), Letters(3), VOCABULARY_SIZE, {})
    text = random_tokens(200, seed=3) % 90 + 20
    for so_far in range(10, 200, 9):
        assert drafter.propose([MaskedRequest("a", text[:so_far], 4)]).shape == (4, VOCABULARY_SIZE)
    drafter.release("a")
    assert drafter.pending_rows("a", 5) == 5
