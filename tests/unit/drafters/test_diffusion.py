"""The diffusion drafter, compared with a plain reference: one uncached pass with an explicit mask."""

from pathlib import Path

import numpy as np
import pytest
import torch

from drafters.base import Tokens
from drafters.diffusion.drafter import DiffusionDrafter, DiffusionOptions
from drafters.diffusion.masked import MaskedRequest, split_rows
from tests.checkpoints import VOCABULARY_SIZE, write_block_drafter, write_checkpoint, write_full_drafter
from transformer.model import Transformer

WINDOW = 48


def reference_logits(model: torch.nn.Module, tokens: Tokens, length: int, masks: list[int], full: bool) -> torch.Tensor:
    """Return the logits of transformers' own layers for `tokens` and masks, with an explicit attention mask."""
    ids = torch.tensor([[*tokens.tolist(), *masks[: length - 1]]])
    clean, size = len(tokens), ids.shape[1]
    visible = torch.ones(size, size, dtype=torch.bool)
    if not full:
        visible = visible.tril()
        visible[clean:, clean:] = True
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=visible[None, None], use_cache=False).logits[0]
    return logits[clean - 1 : clean - 1 + length, :VOCABULARY_SIZE]


def random_tokens(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("block")
    reference = write_block_drafter(folder, layers=2)
    return Transformer.load(folder), reference


def test_block_drafts_equal_the_reference_with_and_without_a_cached_prefix(
    block: tuple[Transformer, torch.nn.Module],
) -> None:
    model, reference = block
    masks = list(model.config.mask_token_ids)
    drafter = DiffusionDrafter(model, num_slots=2, vocabulary_size=VOCABULARY_SIZE, options=DiffusionOptions(WINDOW))
    text = random_tokens(30)
    for length_so_far in (5, 6, 9, 9, 20, 30):  # grows by accepted tokens, or stays
        tokens = text[:length_so_far]
        logits = drafter.propose([MaskedRequest("a", tokens, 7)])
        expected = reference_logits(reference, tokens, 7, masks, full=False)
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_batch_of_unequal_requests_equals_one_by_one(block: tuple[Transformer, torch.nn.Module]) -> None:
    model, reference = block
    masks = list(model.config.mask_token_ids)
    drafter = DiffusionDrafter(model, num_slots=3, vocabulary_size=VOCABULARY_SIZE, options=DiffusionOptions(WINDOW))
    requests = [MaskedRequest(str(i), random_tokens(5 + 9 * i, seed=i), 1 + 4 * i) for i in range(3)]
    for _ in range(2):  # the second time from the cache
        logits = drafter.propose(requests)
        for request, rows in zip(requests, split_rows([r.length for r in requests]), strict=True):
            expected = reference_logits(reference, request.tokens, request.length, masks, full=False)
            assert torch.allclose(logits[rows], expected, atol=1e-4, rtol=1e-4)


def test_a_full_window_keeps_the_latest_half(block: tuple[Transformer, torch.nn.Module]) -> None:
    model, reference = block
    masks = list(model.config.mask_token_ids)
    drafter = DiffusionDrafter(model, num_slots=1, vocabulary_size=VOCABULARY_SIZE, options=DiffusionOptions(WINDOW))
    text = random_tokens(200)
    drafter.propose([MaskedRequest("a", text[:WINDOW], 4)])
    assert drafter.pending_rows("a", WINDOW) <= 1
    logits = drafter.propose([MaskedRequest("a", text[: WINDOW + 1], 4)])
    kept = text[WINDOW + 1 - WINDOW // 2 : WINDOW + 1]
    assert torch.allclose(logits, reference_logits(reference, kept, 4, masks, full=False), atol=1e-4, rtol=1e-4)


def test_a_drafter_that_needs_little_context_begins_a_new_window_rather_than_catch_up(
    block: tuple[Transformer, torch.nn.Module],
) -> None:
    model, reference = block
    masks = list(model.config.mask_token_ids)
    options = DiffusionOptions(WINDOW, first_tokens=8)
    drafter = DiffusionDrafter(model, num_slots=1, vocabulary_size=VOCABULARY_SIZE, options=options)
    text = random_tokens(200)
    # length of the text, clean rows that must be run, and tokens that the draft sees: from the start of its window
    lengths = [(5, 5, 5), (30, 8, 8), (33, 3, 11), (41, 8, 19), (50, 8, 8), (52, 2, 10), (90, 8, 8)]
    lengths += [(90 + 8 * i, 8, 8 + 8 * i) for i in range(1, 6)] + [(138, 8, 8)]  # the window is full then
    for length_so_far, pending, seen in lengths:
        assert drafter.pending_rows("a", length_so_far) == pending
        logits = drafter.propose([MaskedRequest("a", text[:length_so_far], 4)])
        context = text[length_so_far - seen : length_so_far]
        expected = reference_logits(reference, context, 4, masks, full=False)
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)


def test_only_an_exact_prefix_may_begin_anew_anywhere(tmp_path: Path) -> None:
    write_full_drafter(tmp_path)
    with pytest.raises(ValueError, match="exact"):
        DiffusionDrafter(Transformer.load(tmp_path), 1, VOCABULARY_SIZE, DiffusionOptions(WINDOW, first_tokens=8))


def test_full_attention_is_exact_without_reuse_and_close_in_shape_with_it(tmp_path: Path) -> None:
    reference = write_full_drafter(tmp_path, layers=2)
    model = Transformer.load(tmp_path)
    masks = list(model.config.mask_token_ids) * 8
    exact = DiffusionDrafter(model, 1, VOCABULARY_SIZE, DiffusionOptions(WINDOW, reuse_prefix=False))
    reusing = DiffusionDrafter(model, 1, VOCABULARY_SIZE, DiffusionOptions(WINDOW))
    text = random_tokens(30)
    for length_so_far in (10, 13, 30):
        request = MaskedRequest("a", text[:length_so_far], 5)
        expected = reference_logits(reference, request.tokens, 5, masks, full=True)
        expected[:, list(set(masks) & set(range(VOCABULARY_SIZE)))] = -torch.inf
        assert torch.allclose(exact.propose([request]), expected, atol=1e-4, rtol=1e-4)
        assert reusing.propose([request]).shape == expected.shape


def test_mask_tokens_are_never_proposed(block: tuple[Transformer, torch.nn.Module]) -> None:
    model, _ = block
    narrow = DiffusionDrafter(model, 1, model.config.vocabulary_size, DiffusionOptions(WINDOW))
    logits = narrow.propose([MaskedRequest("a", random_tokens(5), 6)])
    assert torch.isinf(logits[:, list(model.config.mask_token_ids)]).all()


def test_released_slots_are_used_again_and_running_out_is_an_error(block: tuple[Transformer, torch.nn.Module]) -> None:
    drafter = DiffusionDrafter(block[0], 2, VOCABULARY_SIZE, DiffusionOptions(WINDOW))
    for i in range(10):
        drafter.propose([MaskedRequest(str(i), random_tokens(5), 3)])
        drafter.release(str(i))
        drafter.release(str(i))  # twice is harmless
    drafter.propose([MaskedRequest("a", random_tokens(5), 3), MaskedRequest("b", random_tokens(5), 3)])
    with pytest.raises(RuntimeError, match="no free slot"):
        drafter.propose([MaskedRequest("c", random_tokens(5), 3)])


def test_a_causal_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2")
    with pytest.raises(ValueError, match="mask token"):
        DiffusionDrafter(Transformer.load(tmp_path), 1, VOCABULARY_SIZE)


def test_refinement_fills_in_the_surest_tokens_and_runs_again(block: tuple[Transformer, torch.nn.Module]) -> None:
    model, reference = block
    masks = list(model.config.mask_token_ids)
    options = DiffusionOptions(WINDOW, refinement_steps=2)
    drafter = DiffusionDrafter(model, 1, VOCABULARY_SIZE, options)
    tokens = random_tokens(12)
    first = reference_logits(reference, tokens, 6, masks, full=False)
    confidences, best = first.softmax(-1).max(-1)
    filled = confidences.topk(3).indices.tolist()
    block_tokens = masks[:5]
    for row in filled:
        if row < 5:  # the sixth token has no row of its own: logits are shifted
            block_tokens[row] = int(best[row])
    expected = reference_logits(reference, tokens, 6, block_tokens, full=False)
    expected[filled] = first[filled]
    for so_far in (12, 12):  # the second time from the cache
        logits = drafter.propose([MaskedRequest("a", tokens[:so_far], 6)])
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("confidence", [0.0, 1.1])
def test_a_draft_in_parts_goes_on_while_it_is_confident(
    block: tuple[Transformer, torch.nn.Module], confidence: float
) -> None:
    model, reference = block
    masks = list(model.config.mask_token_ids)
    options = DiffusionOptions(WINDOW, part_tokens=3, part_confidence=confidence)
    drafter = DiffusionDrafter(model, 2, VOCABULARY_SIZE, options)
    tokens, other = random_tokens(12), random_tokens(20, seed=4)
    logits = drafter.propose([MaskedRequest("a", tokens, 8), MaskedRequest("b", other, 2)])
    assert torch.allclose(logits[8:], reference_logits(reference, other, 2, masks, full=False), atol=1e-4)
    drafted = tokens
    for start, length in ((0, 3), (3, 3), (6, 2)):
        part = logits[start : start + length]
        if start and confidence > 1:
            assert part.isinf().all()
            continue
        expected = reference_logits(reference, drafted, length, masks, full=False)
        assert torch.allclose(part, expected, atol=1e-4)
        drafted = np.concatenate([drafted, expected.argmax(-1).numpy().astype(np.int32)])


def test_a_full_attention_prefix_is_exact_whenever_it_is_read_again(tmp_path: Path) -> None:
    reference = write_full_drafter(tmp_path, layers=2)
    model = Transformer.load(tmp_path)
    masks = list(model.config.mask_token_ids) * 8
    drafter = DiffusionDrafter(model, 1, VOCABULARY_SIZE, DiffusionOptions(WINDOW, refresh_interval=3))
    text = random_tokens(30)
    exact = []
    for step in range(9):
        tokens = text[: 10 + 2 * step]
        expected = reference_logits(reference, tokens, 4, masks, full=True)
        logits = drafter.propose([MaskedRequest("a", tokens, 4)])
        exact.append(torch.allclose(logits, expected, atol=1e-4, rtol=1e-4))
    assert exact == [True, False, False] * 3


@pytest.mark.parametrize(
    ("accepted", "read_anew"),
    [
        ([4, 4, 4, 0, 0, 0, 4, 4], [0, 5]),  # twice nothing after four each time: the last passes are exact again
        ([4, 4, 3, 4, 3, 4, 3, 4], [0]),
        ([0, 0, 0, 0, 0, 0, 0, 0], [0]),  # never right: a fresh prefix does not help
    ],
)
def test_a_stale_prefix_is_read_again_when_acceptance_falls(
    tmp_path: Path, accepted: list[int], read_anew: list[int]
) -> None:
    reference = write_full_drafter(tmp_path, layers=2)
    model = Transformer.load(tmp_path)
    masks = list(model.config.mask_token_ids) * 8
    drafter = DiffusionDrafter(model, 1, VOCABULARY_SIZE, DiffusionOptions(WINDOW, refresh_interval=0))
    text = random_tokens(40)
    exact = []
    for step, num_accepted in enumerate(accepted):
        tokens = text[: 10 + 2 * step]
        logits = drafter.propose([MaskedRequest("a", tokens, 4)])
        if torch.allclose(logits, reference_logits(reference, tokens, 4, masks, full=True), atol=1e-4, rtol=1e-4):
            exact.append(step)
        drafter.note("a", num_accepted)
    assert exact == read_anew
    drafter.note("unknown", 3)  # harmless
