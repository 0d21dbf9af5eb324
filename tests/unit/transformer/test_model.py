"""The forward pass, compared with transformers, and with itself in other batch shapes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.checkpoints import FAMILIES, TOKENIZER_LENGTH, Family, write_checkpoint
from transformer.model import RowBatch, Transformer

Load = Callable[..., tuple[PreTrainedModel, Transformer]]

LENGTH = 90
TOLERANCE = 1e-4

VARIANTS: list[tuple[Family, dict[str, object]]] = [
    *((family, {"tied": tied}) for family in FAMILIES for tied in (True, False)),
    ("llama", {"attention_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
]


def random_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(TOKENIZER_LENGTH, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["layer by layer", "compiled"])
def load(request: pytest.FixtureRequest) -> Load:
    """Write a checkpoint; load it with transformers and with this project. Sizes and threads decide how passes run."""
    is_compiled = request.param == "compiled"
    sizes: dict[str, object] = {"hidden_size": 64, "head_dim": 16} if is_compiled else {}

    def write_and_load(folder: Path, family: Family, **overrides: object) -> tuple[PreTrainedModel, Transformer]:
        reference = write_checkpoint(folder, family, **sizes | overrides)  # type: ignore[arg-type]
        model = Transformer.load(folder)
        assert model.is_compiled == is_compiled
        return reference, model

    return write_and_load


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return transformers' logits [rows, vocabulary]. `visible` bool [rows, rows] replaces the causal mask."""
    mask = None
    if visible is not None:
        mask = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))[None, None]
    return model(tokens[None], attention_mask=mask).logits[0]


def run_in_chunks(model: Transformer, tokens: Tensor, chunks: list[int]) -> Tensor:
    cache, start, parts = model.new_cache(2, LENGTH), 0, []
    for count in chunks:
        rows = RowBatch(tokens[start : start + count], [1], [start], [count])
        parts.append(model.logits(model.forward(rows, cache)))
        start += count
    return torch.cat(parts)


def largest_difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_logits_equal_those_of_transformers(
    tmp_path: Path, load: Load, family: Family, overrides: dict[str, object]
) -> None:
    reference, model = load(tmp_path, family, **overrides)
    tokens = random_tokens(LENGTH)
    expected = reference_logits(reference, tokens)
    assert expected.std() > 0.5  # otherwise agreement proves nothing
    assert largest_difference(run_in_chunks(model, tokens, [LENGTH]), expected) < TOLERANCE


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [70, 1, 1, 18], [1, 30, 5, 54], [33, 33, 24]])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_in_chunks_equals_prefill_in_one_go(
    tmp_path: Path, load: Load, family: Family, chunks: list[int]
) -> None:
    reference, model = load(tmp_path, family)
    tokens = random_tokens(LENGTH)
    assert largest_difference(run_in_chunks(model, tokens, chunks), reference_logits(reference, tokens)) < TOLERANCE


@pytest.mark.parametrize(
    ("slots", "starts", "counts"),
    [
        ([0, 1, 2], [10, 40, 25], [1, 1, 1]),
        ([0, 1, 2], [10, 10, 10], [4, 4, 4]),
        ([2, 0, 1], [10, 40, 25], [9, 1, 4]),
        ([5, 2], [3, 50], [2, 7]),  # a gap between neighbours
        ([0, 30, 11], [8, 60, 25], [1, 3, 9]),  # scattered
        ([3, 4, 5, 6], [0, 5, 40, 1], [80, 1, 5, 70]),  # long prefills beside short rows
        ([7, 1], [0, 3], [70, 70]),
        ([7, 1], [0, 3], [70, 80]),
    ],
)
@pytest.mark.parametrize("bounded", [False, True])
def test_ragged_batch_equals_one_by_one(
    tmp_path: Path, load: Load, slots: list[int], starts: list[int], counts: list[int], bounded: bool
) -> None:
    _, model = load(tmp_path, "llama")
    together, alone = model.new_cache(32, LENGTH), model.new_cache(32, LENGTH)
    sequences = [
        random_tokens(start + count, seed) for seed, (start, count) in enumerate(zip(starts, counts, strict=True))
    ]
    for cache in (together, alone):
        for slot, start, tokens in zip(slots, starts, sequences, strict=True):
            if start:
                model.forward(RowBatch(tokens[:start], [slot], [0], [start]), cache)
    new = [tokens[start:] for tokens, start in zip(sequences, starts, strict=True)]
    batched = model.forward(RowBatch(torch.cat(new), slots, starts, counts, bounds_padding=bounded), together)
    single = [
        model.forward(RowBatch(tokens, [slot], [start], [count]), alone)
        for tokens, slot, start, count in zip(new, slots, starts, counts, strict=True)
    ]
    assert largest_difference(batched, torch.cat(single)) < 1e-5
    assert largest_difference(together.entries, alone.entries) < 1e-5


@pytest.mark.parametrize("prefix", [0, 17])
@pytest.mark.parametrize("block", [8, 32])
def test_block_limits_equal_a_four_dimensional_mask(tmp_path: Path, load: Load, prefix: int, block: int) -> None:
    reference, model = load(tmp_path, "qwen2", tied=True)
    tokens = random_tokens(prefix + block)
    positions = torch.arange(prefix + block)
    limits = torch.where(positions < prefix, positions + 1, prefix + block)
    expected = reference_logits(reference, tokens, positions[None, :] < limits[:, None])
    cache = model.new_cache(1, LENGTH)
    if prefix:
        model.forward(RowBatch(tokens[:prefix], [0], [0], [prefix]), cache)
    in_block = model.forward(RowBatch(tokens[prefix:], [0], [prefix], [block], limits[prefix:]), cache)
    assert largest_difference(model.logits(in_block), expected[prefix:]) < TOLERANCE
    at_once = model.forward(RowBatch(tokens, [0], [0], [len(tokens)], limits), model.new_cache(1, LENGTH))
    assert largest_difference(model.logits(at_once), expected) < TOLERANCE


def test_full_attention_equals_a_four_dimensional_mask(tmp_path: Path, load: Load) -> None:
    reference, model = load(tmp_path, "qwen3")
    tokens = random_tokens(40)
    expected = reference_logits(reference, tokens, torch.ones(40, 40, dtype=torch.bool))
    limits = torch.full((40,), 40)
    hidden = model.forward(RowBatch(tokens, [0], [0], [40], limits), model.new_cache(1, LENGTH))
    assert largest_difference(model.logits(hidden), expected) < TOLERANCE


def test_limits_of_a_ragged_batch_hold_per_sequence(tmp_path: Path, load: Load) -> None:
    _, model = load(tmp_path, "qwen2")
    sequences = [random_tokens(12, 1), random_tokens(30, 2)]
    limits = [torch.full((len(tokens),), len(tokens)) for tokens in sequences]
    together = RowBatch(torch.cat(sequences), [1, 0], [0, 0], [12, 30], torch.cat(limits))
    single = [
        model.forward(RowBatch(tokens, [0], [0], [len(tokens)], limit), model.new_cache(1, LENGTH))
        for tokens, limit in zip(sequences, limits, strict=True)
    ]
    assert largest_difference(model.forward(together, model.new_cache(2, LENGTH)), torch.cat(single)) < 1e-5


def test_rows_beyond_the_trained_positions_can_be_run(tmp_path: Path, load: Load) -> None:
    _, model = load(tmp_path, "llama", max_position_embeddings=16)
    assert run_in_chunks(model, random_tokens(LENGTH), [60, 30]).isfinite().all()


def test_bfloat16_stays_near_float32(tmp_path: Path, load: Load) -> None:
    reference, _ = load(tmp_path, "qwen3")
    tokens = random_tokens(LENGTH)
    expected = reference_logits(reference, tokens)
    logits = run_in_chunks(Transformer.load(tmp_path, dtype=torch.bfloat16), tokens, [50, 40])
    theirs = reference_logits(reference.to(torch.bfloat16), tokens).float()
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() < 1.5 * (theirs - expected).abs().mean()


def test_copied_slot_continues_like_its_source(tmp_path: Path, load: Load) -> None:
    _, model = load(tmp_path, "llama")
    cache, tokens = model.new_cache(3, LENGTH), random_tokens(30)
    model.forward(RowBatch(tokens[:29], [0], [0], [29]), cache)
    cache.copy_slot(0, 2, 29)
    source = model.forward(RowBatch(tokens[29:], [0], [29], [1]), cache)
    assert torch.equal(model.forward(RowBatch(tokens[29:], [2], [29], [1]), cache), source)
    cache.clear_slot(2, 5)
    assert cache.entries[:, 2, :, :5].any()
    assert not cache.entries[:, 2, :, 5:].any()
