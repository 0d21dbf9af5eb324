"""Masked blocks: the rows that each row sees; one pass over many blocks equals drafting one by one."""

import numpy as np
import torch
from transformers import LlamaForCausalLM

from models.training.blocks import BLOCK_SIZE, attach_blocks, draw_blocks, hints_of
from models.training.drafter import build_drafter
from tests.unit.models.conftest import RECIPE, VOCABULARY_SIZE

MASKS = torch.arange(VOCABULARY_SIZE, VOCABULARY_SIZE + BLOCK_SIZE)


def test_a_row_sees_the_same_rows_as_in_drafting() -> None:
    tokens = torch.arange(1, 7)[None]  # six clean rows
    anchors = torch.tensor([[3, 3, 1]])  # a block of two masks after position 3, one of one mask after position 1
    offsets = torch.tensor([[1, 2, 1]])
    blocks = torch.tensor([[0, 0, 1]])
    batch = attach_blocks(tokens, anchors, offsets, blocks, MASKS)
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5, 6, MASKS[0], MASKS[1], MASKS[0]]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 2]]
    visible = [set(np.flatnonzero(row)) for row in batch.visible[0, 0].numpy()]
    assert visible == [
        {0},
        {0, 1},
        {0, 1, 2},
        {0, 1, 2, 3},
        {0, 1, 2, 3, 4},
        {0, 1, 2, 3, 4, 5},
        {0, 1, 2, 3, 6, 7},
        {0, 1, 2, 3, 6, 7},
        {0, 1, 8},
    ]


def test_a_bounded_context_ends_at_the_row_or_at_its_anchor() -> None:
    tokens = torch.arange(1, 7)[None]
    anchors, offsets, blocks = torch.tensor([[3, 3, 5]]), torch.tensor([[1, 2, 1]]), torch.tensor([[0, 0, 1]])
    contexts = torch.tensor([[2, 2, 2, 2, 2, 2, 3, 3, 1]])
    batch = attach_blocks(tokens, anchors, offsets, blocks, MASKS, contexts)
    visible = [set(np.flatnonzero(row)) for row in batch.visible[0, 0].numpy()]
    assert visible == [{0}, {0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}, {1, 2, 3, 6, 7}, {1, 2, 3, 6, 7}, {5, 8}]


def test_drawn_blocks_are_complete_and_inside_the_continuation() -> None:
    prompt_lengths, length, rows = np.array([10, 60]), 100, 200
    anchors, offsets, blocks = draw_blocks(prompt_lengths, length, rows, 5.0, 0.1, np.random.default_rng(1))
    for sequence, prompt_length in enumerate(prompt_lengths):
        assert anchors[sequence].min() >= prompt_length - 1
        assert (anchors + offsets)[sequence].max() + 1 < length
        for block in range(blocks[sequence].max() + 1):
            own = blocks[sequence] == block
            assert len(set(anchors[sequence][own])) == 1
            assert offsets[sequence][own].tolist() == list(range(1, own.sum() + 1))
    assert len(set(anchors[0])) > 10


def test_one_pass_over_many_blocks_equals_one_pass_each(tiny_target: LlamaForCausalLM) -> None:
    drafter = build_drafter(tiny_target, RECIPE).eval()
    tokens = torch.randint(0, VOCABULARY_SIZE, (1, 40), generator=torch.Generator().manual_seed(0))
    anchors = torch.tensor([[20, 20, 20, 33, 33, 9]])
    offsets = torch.tensor([[1, 2, 3, 1, 2, 1]])
    blocks = torch.tensor([[0, 0, 0, 1, 1, 2]])
    with torch.inference_mode():
        batch = attach_blocks(tokens, anchors, offsets, blocks, MASKS)
        together = drafter.rows(batch, torch.zeros(1, 40, tiny_target.config.hidden_size), torch.full((1, 6, 2), -1))[
            0, 40:
        ]
        apart = []
        for anchor, count in ((20, 3), (33, 2), (9, 1)):
            ids = torch.cat([tokens[0, : anchor + 1], MASKS[:count]])[None]
            visible = torch.ones(len(ids[0]), len(ids[0]), dtype=torch.bool).tril()
            visible[anchor + 1 :, anchor + 1 :] = True
            hidden = drafter.model(input_ids=ids, attention_mask=visible[None, None]).last_hidden_state
            apart.append(hidden[0, anchor + 1 :])
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)


def test_anchors_are_drawn_by_weight() -> None:
    weights = np.zeros((2, 60))
    weights[0, 20], weights[1, [5, 30]] = 1.0, (3.0, 1.0)
    anchors, _, _ = draw_blocks(np.array([8, 10]), 60, 4000, 3.0, 0.0, np.random.default_rng(0), weights)
    assert (anchors[0] == 20).all()
    assert (anchors[1] == 30).all()  # 5 is in the prompt


def test_hints_are_the_free_drafts_tokens_at_a_masks_place_and_the_next() -> None:
    drafts = np.arange(2 * 5 * 3).reshape(2, 5, 3).astype(np.int16)
    drafts[1, 4, 1:] = -1
    anchors, offsets = np.array([[0, 0, 0], [4, 4, 4]]), np.array([[1, 2, 3], [1, 2, 3]])
    hints = hints_of(drafts, anchors, offsets, np.full((2, 3), 9))
    assert hints.tolist() == [[[0, 1], [1, 2], [2, -1]], [[27, -1], [-1, -1], [-1, -1]]]
    assert hints_of(drafts, anchors, offsets, np.full((2, 3), 1))[0].tolist() == [[0, -1], [-1, -1], [-1, -1]]
