"""The bundled pair writes the tokens of plain decoding and of transformers' `generate`, whatever the drafts are.

Prompts are held-out files of the standard library. Where rounding flips a near-tie, `tests.near_ties` decides.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from service.bench.cells import CELLS, Cell, build
from service.bench.loading import Loaded, load
from service.bench.prompts import cut_prompts, held_out_texts
from service.engine.base import GenerationRequest, SpeculationOptions
from service.engine.scheduler import SchedulerLimits
from service.setting_groups import BUNDLED_MODELS
from service.settings import load_settings
from tests.near_ties import NearTies
from tests.unit.engine.driver import Driver
from verifiers.base import SamplingRules

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 50, 96, 200
MAX_DRAFT = 32

BY_NAME = {cell.name: cell for cell in CELLS}
ANY_LENGTH = {"policy": "fixed", "max_draft_tokens": MAX_DRAFT, "fixed_draft_tokens": MAX_DRAFT}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(load_settings(), CELLS, num_slots=16)


@pytest.fixture(scope="module")
def prompts(loaded: Loaded) -> list[tuple[int, ...]]:
    encode = partial(loaded.tokenizer.encode, add_special_tokens=False)
    return [p.tokens for p in cut_prompts(held_out_texts(), NUM_PROMPTS, PROMPT_TOKENS, encode, seed=11)]


@pytest.fixture(scope="module")
def reference(prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """Return the tokens that transformers' `generate` writes."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODELS / "target", dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None
        )
    return [row[PROMPT_TOKENS:].tolist() for row in written]


def write(
    loaded: Loaded,
    cell: Cell,
    requests: Sequence[GenerationRequest],
    batch: int = 16,
) -> list[list[int]]:
    """Run the requests through an engine loop with the cell's pipeline, at most `batch` at a time."""
    limits = SchedulerLimits(max_running=batch, max_waiting=len(requests))
    return Driver(loaded.verifier, build(cell, loaded.settings, loaded.models), limits).outputs(requests)


def greedy(prompts: Sequence[tuple[int, ...]], lengths: Sequence[int | None]) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            str(i),
            prompt,
            NEW_TOKENS,
            SamplingRules(seed=0, temperature=0.0),
            speculation=SpeculationOptions(True, length),
        )
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def check(
    written: list[list[int]],
    expected: list[list[int]],
    prompts: Sequence[tuple[int, ...]],
    near_ties: NearTies,
) -> None:
    """Fail unless all tokens are equal, except for near-ties."""
    for prompt, found, wanted in zip(prompts, written, expected, strict=True):
        near_ties.compare(prompt, found, wanted, logit_margin)


def logit_margin(tokens: Sequence[int], wanted: int, found: int) -> float:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODELS / "target", dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([list(tokens)])).logits[0, -1]
    return float(logits[wanted] - logits[found])


@pytest.mark.parametrize("name", [*BY_NAME])
def test_greedy_equals_transformers_with_every_drafter_and_policy(
    name: str,
    loaded: Loaded,
    prompts: list[tuple[int, ...]],
    reference: list[list[int]],
    near_ties: NearTies,
) -> None:
    check(write(loaded, BY_NAME[name], greedy(prompts, [None] * NUM_PROMPTS)), reference, prompts, near_ties)


@pytest.mark.parametrize("name", ["default", "cps-fixed", "garbage"])
def test_greedy_equals_transformers_at_every_draft_length(
    name: str,
    loaded: Loaded,
    prompts: list[tuple[int, ...]],
    reference: list[list[int]],
    near_ties: NearTies,
) -> None:
    """The requests of one batch draft 0 to 32 tokens each."""
    cell = replace(BY_NAME[name], overrides={**BY_NAME[name].overrides, **ANY_LENGTH})
    lengths = [i % (MAX_DRAFT + 1) for i in range(NUM_PROMPTS)]
    check(write(loaded, cell, greedy(prompts, lengths)), reference, prompts, near_ties)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_greedy_equals_transformers_in_small_batches(
    batch: int,
    loaded: Loaded,
    prompts: list[tuple[int, ...]],
    reference: list[list[int]],
    near_ties: NearTies,
) -> None:
    few = 8 * batch if batch < 5 else NUM_PROMPTS
    requests = greedy(prompts[:few], [None] * few)
    check(write(loaded, BY_NAME["default"], requests, batch), reference[:few], prompts[:few], near_ties)


SAMPLERS: list[dict[str, object]] = [
    {"temperature": temperature, **options}
    for temperature, options in itertools.product(
        (0.3, 0.7, 1.0, 1.5),
        (
            {},
            {"top_p": 0.8},
            {"top_k": 20},
            {"min_p": 0.05},
            {"presence_penalty": 0.8, "frequency_penalty": 0.4},
            {"repetition_penalty": 1.3},
            {"logit_bias": {17: 4.0, 200: -100.0}},
            {"top_p": 0.9, "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1},
        ),
    )
]


def sampled(
    prompts: Sequence[tuple[int, ...]], enabled: bool, lengths: Sequence[int | None]
) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            str(i),
            prompts[i % len(prompts)],
            64,
            SamplingRules(seed=1000 + i, **options),  # type: ignore[arg-type]
            speculation=SpeculationOptions(enabled, lengths[i]),
        )
        for i, options in enumerate(SAMPLERS)
    ]


@pytest.mark.parametrize("name", ["default", "cps-goodput", "garbage", "any-length"])
def test_seeded_sampling_is_the_same_with_speculation_on_and_off(
    name: str, loaded: Loaded, prompts: list[tuple[int, ...]]
) -> None:
    cell, lengths = BY_NAME.get(name, BY_NAME["default"]), [None] * len(SAMPLERS)
    if name == "any-length":
        cell = replace(cell, overrides={**cell.overrides, **ANY_LENGTH})
        lengths = np.random.default_rng(3).integers(0, MAX_DRAFT + 1, len(SAMPLERS)).tolist()
    plain = write(loaded, cell, sampled(prompts, False, lengths), batch=7)
    speculative = write(loaded, cell, sampled(prompts, True, lengths), batch=16)
    assert speculative == plain
