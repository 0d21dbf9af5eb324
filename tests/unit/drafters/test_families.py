"""A tiny checkpoint of every hub family, compared with transformers' own layers and an explicit attention mask."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from drafters.base import Tokens
from drafters.diffusion.drafter import DiffusionDrafter, DiffusionOptions
from drafters.diffusion.masked import MaskedRequest, split_rows
from tests.checkpoints import (
    HUB_DRAFTERS,
    MASK_TOKEN,
    TOKENIZER_LENGTH,
    VOCABULARY_SIZE,
    HubDrafter,
    write_hub_drafter,
)
from transformer.config import TransformerConfig
from transformer.model import Transformer

LENGTHS_SO_FAR = (1, 5, 9, 9, 20, 31, 32, 33, 40, 64)  # grows by accepted tokens, onto block borders and across
TOLERANCE = 1e-4


def random_tokens(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


def reference_logits(model: PreTrainedModel, layout: HubDrafter, tokens: Tokens, length: int) -> torch.Tensor:
    """Return the logits of transformers' layers for `length` masked positions after `tokens`, by the target's ids.

    The last block is filled with masks, as in the families' own generation code.
    """
    clean, grid = len(tokens), layout.block_size or 1
    size = -(-(clean + length - layout.shifted) // grid) * grid
    ids = torch.tensor([[*tokens.tolist(), *[MASK_TOKEN] * (size - clean)]])
    block_of = torch.arange(size) // grid
    visible = torch.ones(size, size, dtype=torch.bool)
    if layout.attention == "block_causal":
        visible = block_of[None, :] <= block_of[:, None]
    mask = torch.zeros(size, size).masked_fill_(~visible, -torch.inf)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask[None, None], use_cache=False).logits[0]
    first = clean - layout.shifted
    logits = logits[first : first + length].clone()
    logits[:, TOKENIZER_LENGTH:] = -torch.inf  # the mask, and padding
    return logits


def make_drafter(folder: Path, name: str, num_slots: int = 1, **options: object) -> DiffusionDrafter:
    exact = HUB_DRAFTERS[name].attention == "block_causal"
    chosen = DiffusionOptions(96, reuse_prefix=exact, **options)  # type: ignore[arg-type]
    return DiffusionDrafter(Transformer.load(folder), num_slots, VOCABULARY_SIZE, chosen, TOKENIZER_LENGTH)


def write(tmp_path: Path, name: str, **arguments: object) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path / HUB_DRAFTERS[name].folder
    return folder, write_hub_drafter(folder, name, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HUB_DRAFTERS)
def test_drafts_equal_transformers_layers(tmp_path: Path, name: str) -> None:
    layout = HUB_DRAFTERS[name]
    folder, reference = write(tmp_path, name)
    drafter = make_drafter(folder, name)
    text = random_tokens(LENGTHS_SO_FAR[-1])
    for so_far in LENGTHS_SO_FAR:
        tokens, length = text[:so_far], min(7, drafter.max_tokens)
        expected = reference_logits(reference, layout, tokens, length)
        assert expected[:, :TOKENIZER_LENGTH].std() > 0.5  # otherwise agreement proves nothing
        logits = drafter.propose([MaskedRequest("a", tokens, length)])
        assert torch.equal(logits.isinf(), expected.isinf())
        finite = ~expected.isinf()
        assert float((logits - expected)[finite].abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", HUB_DRAFTERS)
def test_a_batch_of_unequal_requests_equals_one_by_one(tmp_path: Path, name: str) -> None:
    layout = HUB_DRAFTERS[name]
    folder, reference = write(tmp_path, name)
    drafter = make_drafter(folder, name, num_slots=3)
    requests = [MaskedRequest(str(i), random_tokens(5 + 14 * i, i), 1 + i) for i in range(3)]
    for _ in range(2):  # the second time from the cache
        logits = drafter.propose(requests)
        for request, rows in zip(requests, split_rows([r.length for r in requests]), strict=True):
            expected = reference_logits(reference, layout, request.tokens, request.length)
            assert torch.allclose(logits[rows], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", HUB_DRAFTERS)
def test_configuration_has_the_familys_switches(tmp_path: Path, name: str) -> None:
    layout = HUB_DRAFTERS[name]
    folder, _ = write(tmp_path, name)
    config = TransformerConfig.from_folder(folder)
    assert config.mask_token_ids == (MASK_TOKEN,)
    assert (config.attention, config.logits_shifted) == (layout.attention, layout.shifted)
    assert config.block_size == layout.block_size
    assert config.query_key_norm == (layout.family == "qwen3")
    assert config.attention_bias == (layout.family == "qwen2")
    assert config.tie_word_embeddings == layout.tied
    assert config.vocabulary_size == VOCABULARY_SIZE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dream", "sdar", "llada"])
def test_sharded_half_precision_checkpoints_load(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    layout = HUB_DRAFTERS[name]
    folder, reference = write(tmp_path, name, dtype=dtype, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    tokens = random_tokens(20)
    logits = make_drafter(folder, name).propose([MaskedRequest("a", tokens, 4)])
    assert torch.allclose(logits, reference_logits(reference, layout, tokens, 4), atol=TOLERANCE, rtol=0)
    model = Transformer.load(folder, dtype=dtype)
    assert model.dtype == dtype
    half = DiffusionDrafter(model, 1, VOCABULARY_SIZE, num_tokens=TOKENIZER_LENGTH)
    rough = half.propose([MaskedRequest("a", tokens, 4)])[:, :TOKENIZER_LENGTH]
    error = (rough - logits[:, :TOKENIZER_LENGTH]).abs().mean() / logits[:, :TOKENIZER_LENGTH].std()
    assert error < 0.1


def test_sdars_block_size_is_that_of_its_config(tmp_path: Path) -> None:
    import json

    folder, _ = write(tmp_path, "sdar")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_size": 16}))
    assert TransformerConfig.from_folder(folder).block_size == 16
    content = json.loads(path.read_text())
    del content["block_size"], content["mask_token_id"]  # as in the first published configurations
    path.write_text(json.dumps(content | {"vocab_size": 151936}))
    config = TransformerConfig.from_folder(folder)
    assert (config.block_size, config.mask_token_ids) == (4, (151669,))


def test_dreams_window_ends_where_its_training_did(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "dream", max_position_embeddings=131072, layers=1)
    model = Transformer.load(folder)
    assert model.config.max_trained_tokens == 2048
    drafter = DiffusionDrafter(model, 1, VOCABULARY_SIZE, DiffusionOptions(window=100_000))
    assert drafter.window + drafter.max_tokens <= 2048


def test_beyond_its_window_a_drafter_sees_the_latest_tokens_from_position_zero(tmp_path: Path) -> None:
    layout = HUB_DRAFTERS["sdar"]
    folder, reference = write(tmp_path, "sdar")
    drafter = make_drafter(folder, "sdar")
    text = random_tokens(150)
    logits = drafter.propose([MaskedRequest("a", text, 4)])
    offset = 56  # the first border of a block that leaves at most 96 tokens
    expected = reference_logits(reference, layout, text[offset:], 4)
    assert torch.allclose(logits, expected, atol=TOLERANCE, rtol=0)


def test_logits_are_as_wide_as_the_targets(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, "sdar")
    wide = DiffusionDrafter(Transformer.load(folder), 1, VOCABULARY_SIZE + 64)
    logits = wide.propose([MaskedRequest("a", random_tokens(9), 4)])
    assert logits.shape == (4, VOCABULARY_SIZE + 64)
    assert logits[:, VOCABULARY_SIZE:].isinf().all()
    assert not logits[:, :TOKENIZER_LENGTH].isinf().any()
