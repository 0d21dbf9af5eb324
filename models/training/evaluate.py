"""Evaluate the pair with simple loops, apart from the serving engine.

A drafter is measured on fixed continuations of held-out prompts. Draft tokens count as accepted as long as they equal
the continuation: the rule of lossless verification, greedy or sampled.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from drafters.search.ngram import NgramModel
from models.training.blocks import BLOCK_SIZE, attach_blocks, hints_of
from models.training.continuations import Continuations, continue_prompts, random_prompts
from models.training.drafter import ConditionedDrafter
from models.training.hints import FreeDrafts

PROMPT_LENGTH = 192  # tokens
NEW_TOKENS = 128
CONTEXT = 24  # clean tokens that a draft sees; serving has between 12 and 32
MIN_LOOPING_SHARE = 0.2  # a continuation with at least this share of repeated 8-grams counts as looping


def held_out_continuations(
    target: LlamaForCausalLM, held_out: NDArray[np.int32], prompts: int, temperatures: Sequence[float], seed: int
) -> list[Continuations]:
    """Return the target's continuations of the same held-out prompts, once per temperature."""
    texts = random_prompts(held_out, PROMPT_LENGTH, prompts, np.random.default_rng(seed))
    return [
        continue_prompts(target, texts, PROMPT_LENGTH + NEW_TOKENS, np.full(prompts, temperature, np.float32), seed + 1)
        for temperature in temperatures
    ]


def repeated_share(tokens: NDArray[Any], length: int = 8) -> float:
    """Return the share of the `length`-grams of `tokens` that repeat an earlier one."""
    grams = [tuple(tokens[at : at + length]) for at in range(len(tokens) - length + 1)]
    return 1 - len(set(grams)) / len(grams)


@torch.inference_mode()
def drafts_at(
    drafter: ConditionedDrafter,
    tokens: torch.Tensor,
    features: torch.Tensor,
    anchors: torch.Tensor,
    length: int,
    drafts: NDArray[np.int16] | None = None,
    context: int | None = None,
) -> torch.Tensor:
    """Draft by raw argmax, `[sequences, anchors, length]`, at `anchors` `[anchors]` of `tokens` `[sequences, tokens]`.

    drafts: `[sequences, tokens, any]` free drafts at all places, given as hints; None: no hints. context: clean tokens
    that a draft sees; None: all.
    """
    vocabulary_size = drafter.config.vocab_size - BLOCK_SIZE
    sequences, clean = tokens.shape
    masks = length - 1
    shape = (sequences, len(anchors) * masks)
    batch = attach_blocks(
        tokens,
        anchors.repeat_interleave(masks).expand(shape),
        (torch.arange(masks) + 1).repeat(len(anchors)).expand(shape),
        torch.arange(len(anchors)).repeat_interleave(masks).expand(shape),
        torch.arange(vocabulary_size, drafter.config.vocab_size),
        None if context is None else torch.full((sequences, clean + shape[1]), context),
    )
    hints = torch.full((*shape, 2), -1)
    if drafts is not None:
        known = np.full(shape, drafts.shape[2])
        hints = torch.from_numpy(hints_of(drafts, batch.anchors.numpy(), batch.offsets.numpy(), known))
    hidden = drafter.rows(batch, features, hints)
    mask_rows = hidden[:, clean:].view(sequences, len(anchors), masks, hidden.shape[-1])
    rows = torch.cat([hidden[:, anchors, None], mask_rows], 2)
    logits: torch.Tensor = drafter.lm_head(rows)[..., :vocabulary_size]
    return logits.argmax(-1)


def accepted_at_every_anchor(
    drafter: ConditionedDrafter, data: Continuations, length: int, drafts: FreeDrafts | None = None
) -> NDArray[np.int64]:
    """Return the accepted tokens `[rows, anchors]` of drafts of `length` tokens, from the prompt's last token on.

    drafts: free drafts to give as hints. Drafts see CONTEXT clean tokens. All rows have the same prompt length. The
    anchors end where a whole draft still fits into the continuation.
    """
    start, end = int(data.prompt_lengths[0]) - 1, data.tokens.shape[1] - length
    tokens = torch.from_numpy(data.tokens.astype(np.int64))
    anchors = torch.arange(start, end)
    truth = tokens.unfold(1, length, 1)[:, anchors + 1]
    features = torch.from_numpy(data.features.astype(np.float32))
    free = np.full((*data.tokens.shape, 1), -1, np.int16) if drafts is None else drafts.tokens
    groups = zip(
        *(torch.split(all_rows, 4) for all_rows in (tokens, features, truth, torch.from_numpy(free))), strict=True
    )
    hits = [
        (drafts_at(drafter, rows, states, places, length, known.numpy(), CONTEXT) == true).cumprod(2).sum(2)
        for rows, states, trues, known in groups
        for places, true in zip(torch.split(anchors, 32), torch.split(trues, 32, 1), strict=True)
    ]
    per_rows = len(torch.split(anchors, 32))
    return torch.cat([torch.cat(hits[at : at + per_rows], 1) for at in range(0, len(hits), per_rows)]).numpy()


@dataclass(frozen=True)
class Acceptance:
    """Mean accepted tokens per step, and the shares of steps that accepted at least 1, 2, ... tokens."""

    accepted: float
    steps: int
    survival: tuple[float, ...]


def walk(accepted: NDArray[np.int64], length: int) -> Acceptance:
    """Decode speculatively along each row: after a step at anchor s, the next anchor is s + accepted + 1."""
    counts: list[int] = []
    for row in accepted:
        at = 0
        while at < len(row):
            counts.append(int(row[at]))
            at += counts[-1] + 1
    steps = np.array(counts)
    survival = tuple(round(float((steps >= i).mean()), 4) for i in range(1, length + 1))
    return Acceptance(round(float(steps.mean()), 4), len(steps), survival)


def drafter_figures(
    drafter: ConditionedDrafter, continuations: Sequence[Continuations], drafts: Sequence[FreeDrafts], length: int = 8
) -> list[dict[str, Any]]:
    """Measure the acceptance of raw argmax drafts, one entry per temperature; also apart for looping continuations.

    drafts: free drafts, given as hints for one figure of each entry.
    """
    figures = []
    for data, free in zip(continuations, drafts, strict=True):
        accepted = accepted_at_every_anchor(drafter, data, length)
        repeated = np.array([repeated_share(text) for text in data.texts()])
        loops = repeated >= MIN_LOOPING_SHARE
        figures.append(
            {
                "temperature": round(float(data.temperatures[0]), 2),
                "draft_length": length,
                "repeated_8_grams": round(float(repeated.mean()), 4),
                "looping_continuations": round(float(loops.mean()), 4),
                **asdict(walk(accepted, length)),
                "accepted_with_hints": walk(accepted_at_every_anchor(drafter, data, length, free), length).accepted,
                "accepted_looping": walk(accepted[loops], length).accepted if loops.any() else None,
                "accepted_other": walk(accepted[~loops], length).accepted if not loops.all() else None,
            }
        )
    return figures


def ngram_accuracy(model: NgramModel, continuations: Sequence[Continuations]) -> list[dict[str, float]]:
    """Measure the share of tokens that the model finds most probable, and their mean log-probability in nats."""
    figures = []
    for data in continuations:
        hits, logs = [], []
        for row, start in zip(data.tokens.astype(np.int32), data.prompt_lengths, strict=True):
            for at in range(int(start), len(row)):
                probabilities = model.distribution(row[max(0, at - model.order + 1) : at])
                hits.append(int(probabilities.argmax()) == row[at])
                logs.append(float(np.log(max(float(probabilities[row[at]]), 1e-9))))
        figures.append(
            {
                "temperature": round(float(data.temperatures[0]), 2),
                "top_1": round(float(np.mean(hits)), 4),
                "log_probability": round(float(np.mean(logs)), 4),
            }
        )
    return figures
