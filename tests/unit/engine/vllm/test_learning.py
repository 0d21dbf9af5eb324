"""The real pipeline behind vLLM's scheduler learns from the verified part of a draft, and from no probe."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from drafters.base import DraftRequest, PolicyName, Tokens
from drafters.pipeline import DraftPipeline
from drafters.policy import PolicyOptions
from drafters.search.causal_model import CausalModel
from service.engine.vllm.proposer import Row, VllmProposer
from service.engine.vllm.records import RequestOptions

VOCABULARY_SIZE = 300
CHEAP_ROWS = {1: 1e-3, 1024: 1.1e-3}
TEXT = np.tile(np.random.default_rng(0).integers(0, 256, 23).astype(np.int32), 60)  # a copy of it is always right
PROMPT = 69


def build(policy: PolicyName) -> tuple[DraftPipeline, VllmProposer]:
    clock = itertools.count(step=1e-5).__next__
    options = PolicyOptions(policy, max_draft_tokens=8)
    pipeline = DraftPipeline(CausalModel(VOCABULARY_SIZE), None, None, options, "own text", clock=clock)
    pipeline.calibrate(CHEAP_ROWS)
    return pipeline, VllmProposer(pipeline, VOCABULARY_SIZE, clock)


def row(tokens: Tokens, sampled: int, verified: int, probe: int | None = None) -> Row:
    return Row(
        request_id="a",
        tokens=tokens,
        num_sampled=sampled,
        num_verified=verified,
        num_rows=1 + verified,
        is_prefill=False,
        num_left=1000,
        temperature=0.0,
        options=RequestOptions("our-a", probe=probe),
    )


def expected(pipeline: DraftPipeline, names: Iterator[int]) -> list[float]:
    """Return the survival that the pipeline expects of each token of a fresh request's draft."""
    name = f"fresh-{next(names)}"
    (draft,) = pipeline.propose([DraftRequest(name, TEXT[:PROMPT], 8, "fixed")])
    pipeline.release(name)
    return list(draft.survival)


@pytest.mark.parametrize("policy", ["goodput", "fixed"])
def test_drafts_that_the_scheduler_cut_teach_no_false_rejections(policy: PolicyName) -> None:
    pipeline, proposer = build(policy)
    names = itertools.count()
    first = expected(pipeline, names)
    length, verified = PROMPT, 0
    lengths = []
    for _ in range(100):
        proposer.begin([], ["a"])
        (draft,) = proposer.propose([row(TEXT[:length], 1 + verified, verified)])
        lengths.append(len(draft))
        verified = min(2, len(draft))  # the scheduler leaves two of eight; both are right
        length += 1 + verified
    assert len(first) == 8
    assert all(later >= earlier for earlier, later in zip(first, expected(pipeline, names), strict=True))
    assert lengths.count(8) >= 95  # now and then, a step without drafts tells what plain decoding costs
    outcomes = [outcome for record in proposer.take_records() for outcome in record.outcomes]
    assert {len(outcome.draft.survival) for outcome in outcomes} == {0, 2}


def test_probes_teach_nothing_about_acceptance() -> None:
    pipeline, proposer = build("goodput")
    names = itertools.count()
    first = expected(pipeline, names)
    text = np.arange(100, dtype=np.int32)  # nothing repeats in it
    for drafted in (0, 7):
        for step in range(8):
            proposer.begin([], ["a"])
            proposer.propose([row(text[: PROMPT + step], 1, drafted, probe=drafted)])
    assert set(proposer.calibrate()) == {1, 8}
    assert expected(pipeline, names) == first
