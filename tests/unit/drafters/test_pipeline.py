"""The pipeline over a real tiny diffusion drafter: lengths, sources, containment, learning."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from drafters.base import Backoff, Draft, DraftRequest, Outcome, PolicyName, StepRecord, Tokens
from drafters.diffusion.drafter import DiffusionDrafter
from drafters.pipeline import DraftPipeline
from drafters.policy import PolicyOptions
from drafters.search.causal_model import CausalModel
from drafters.search.path_search import PathSearch
from tests.checkpoints import VOCABULARY_SIZE
from tests.faulty import FaultyTransformer
from transformer.model import Transformer

CHEAP_ROWS = {1: 1e-3, 1024: 1.1e-3}
TICK = 1e-5  # seconds between two looks at the clock, whatever the machine is doing
DEAR_ROWS = {1: 1e-3, 1024: 1.0}
REAL_ROWS = {1: 1e-3, 64: 4e-3}


class Clock:
    """Shows the time that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def build(
    folder: Path | None,
    num_slots: int = 8,
    free_drafts: bool = True,
    model: Transformer | None = None,
    clock: Callable[[], float] | None = None,
    **options: object,
) -> DraftPipeline:
    causal = CausalModel(VOCABULARY_SIZE)
    model = Transformer.load(folder) if model is None and folder is not None else model
    diffusion = None if model is None else DiffusionDrafter(model, num_slots, VOCABULARY_SIZE)
    return DraftPipeline(
        causal,
        PathSearch(causal, use_proposals=free_drafts),
        diffusion,
        PolicyOptions(**options),  # type: ignore[arg-type]
        "tiny",
        clock=clock or itertools.count(step=TICK).__next__,
        free_drafts=free_drafts,
    )


def text(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


def request(tokens: Tokens, cap: int = 32, name: str = "a", policy: PolicyName | None = None) -> DraftRequest:
    return DraftRequest(name, tokens, cap, policy)


def record(names: Sequence[str], drafts: Sequence[Draft], accepted: Sequence[int], seconds: float = 1e-3) -> StepRecord:
    outcomes = [Outcome(name, draft, count) for name, draft, count in zip(names, drafts, accepted, strict=True)]
    rows = len(names) + sum(len(draft.tokens) for draft in drafts)
    return StepRecord(outcomes, rows, 0, verify_seconds=seconds)


@pytest.mark.parametrize("policy", ["goodput", "paper", "fixed"])
@pytest.mark.parametrize("cap", [0, 1, 5, 32])
def test_drafts_respect_their_caps_and_the_vocabulary(tiny_drafter: Path, policy: PolicyName, cap: int) -> None:
    pipeline = build(tiny_drafter)
    pipeline.calibrate(CHEAP_ROWS)
    for step in range(5):
        requests = [request(text(4 + 7 * i + step, seed=i), cap, str(i), policy) for i in range(4)]
        drafts = pipeline.propose(requests)
        for draft in drafts:
            assert len(draft.tokens) <= cap
            assert all(0 <= token < VOCABULARY_SIZE for token in draft.tokens)
            assert len(draft.confidences) == len(draft.tokens)
            assert bool(draft.bypass_reason) != bool(draft.tokens)
        pipeline.observe(record([r.request_id for r in requests], drafts, [0] * 4))


def test_fixed_policy_drafts_its_length_by_diffusion(tiny_drafter: Path) -> None:
    pipeline = build(tiny_drafter, policy="fixed", fixed_length=6)
    draft = pipeline.propose([request(text(20))])[0]
    assert draft.source == "diffusion"
    assert len(draft.tokens) <= 6
    assert draft.search is not None
    assert draft.search.lattice_width >= 1.0
    assert draft.search.path_gain >= 0.0
    assert pipeline.last_cost.num_diffusion_rows == 20 + 6 - 1 + 1


def test_all_that_drafts_but_the_search_counts_as_drafting(tiny_drafter: Path) -> None:
    """The clock ticks when drafting begins, around the pass, behind the search, and at the end."""
    pipeline = build(tiny_drafter, policy="fixed", fixed_length=6)
    pipeline.propose([request(text(20))])
    assert pipeline.last_cost.search_seconds == pytest.approx(TICK)
    assert pipeline.last_cost.draft_seconds == pytest.approx(3 * TICK)
    assert pipeline.last_cost.pass_seconds == pytest.approx(TICK)
    assert pipeline.last_cost.num_searches == 1
    pipeline = build(None)
    pipeline.propose([request(np.tile(text(20), 6))])
    assert pipeline.last_cost.search_seconds == 0.0
    assert pipeline.last_cost.draft_seconds == pytest.approx(TICK)


def test_paper_policy_falls_to_its_shortest_length(tiny_drafter: Path) -> None:
    pipeline = build(tiny_drafter, policy="paper", free_drafts=False)
    first = pipeline.propose([request(text(20))])[0]
    assert len(first.tokens) == 30
    pipeline.observe(record(["a"], [first], [1]))
    assert len(pipeline.propose([request(text(22))])[0].tokens) == 20


def test_goodput_copies_repeated_text_without_a_diffusion_pass(tiny_drafter: Path) -> None:
    pipeline = build(tiny_drafter)
    pipeline.calibrate(CHEAP_ROWS)
    repeated = np.tile(text(20), 6)
    draft = pipeline.propose([request(repeated)])[0]
    assert draft.source == "free"
    assert draft.tokens[:5] == tuple(repeated[:5].tolist())
    assert draft.expected_accepted > 1.0


def test_goodput_ends_at_nothing_when_nothing_is_accepted(tiny_drafter: Path) -> None:
    """A useless drafter costs only its probes."""
    pipeline = build(tiny_drafter)
    pipeline.calibrate(DEAR_ROWS)
    drafted = []
    for _ in range(300):
        drafts = pipeline.propose([request(text(30))])
        drafted.append(len(drafts[0].tokens))
        pipeline.observe(record(["a"], drafts, [0]))
    assert np.mean(np.array(drafted[100:]) > 0) < 0.1


def test_goodput_comes_back_when_drafts_are_accepted_again(tiny_drafter: Path) -> None:
    pipeline = build(tiny_drafter)
    pipeline.calibrate(REAL_ROWS)
    repeated = np.tile(text(20), 6)
    lengths = []
    for _ in range(200):
        drafts = pipeline.propose([request(repeated)])
        lengths.append(len(drafts[0].tokens))
        pipeline.observe(record(["a"], drafts, [0]))
    assert np.mean(lengths[-50:]) < 2
    lengths.clear()
    for _ in range(600):
        drafts = pipeline.propose([request(repeated)])
        lengths.append(len(drafts[0].tokens))
        pipeline.observe(record(["a"], drafts, [len(drafts[0].tokens)]))
    assert np.mean(lengths[-50:]) > 4


def test_a_service_that_stopped_drafting_finds_out_when_drafts_are_right_again(tiny_drafter: Path) -> None:
    """Every request is a new one: what was learned is the service's, not the request's."""
    pipeline = build(tiny_drafter)
    pipeline.calibrate(REAL_ROWS)
    repeated = np.tile(text(20), 6)

    def serve(steps: int, is_right: bool) -> float:
        lengths = []
        for step in range(steps):
            name = str(step // 8)
            drafts = pipeline.propose([request(repeated, name=name)])
            lengths.append(len(drafts[0].tokens))
            pipeline.observe(record([name], drafts, [lengths[-1] if is_right else 0]))
            if step % 8 == 7:
                pipeline.release(name)
        return float(np.mean(lengths[-100:]))

    assert serve(1000, is_right=False) < 0.5
    assert serve(12_000, is_right=True) > 4


def test_a_failing_drafter_is_left_out_and_tried_again(tiny_drafter: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    pipeline = build(tiny_drafter, num_slots=1, policy="fixed", clock=clock)
    both = [request(text(20), name="a"), request(text(20, seed=1), name="b")]
    drafts = pipeline.propose(both)  # two requests, one slot: the drafter raises
    assert [draft.source for draft in drafts] != ["diffusion", "diffusion"]
    assert not pipeline.drafter_up
    assert "the diffusion drafter failed" in caplog.text
    pipeline.release("b")
    clock.now += Backoff.FIRST_SECONDS
    draft = pipeline.propose([both[0]])[0]
    assert pipeline.drafter_up
    assert draft.source == "diffusion"


def test_logits_that_are_not_numbers_are_a_failure_of_the_drafter(
    tiny_drafter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = FaultyTransformer.load(tiny_drafter)
    clock = Clock()
    pipeline = build(None, model=model, policy="fixed", clock=clock)
    one = request(text(20))
    model.plant("nan")
    assert pipeline.propose([one])[0].source != "diffusion"
    assert not pipeline.drafter_up
    assert pipeline.num_failures == 1
    assert "not numbers" in caplog.text
    model.plant("none")
    assert pipeline.propose([one])[0].source != "diffusion"
    clock.now += Backoff.FIRST_SECONDS
    draft = pipeline.propose([one])[0]
    assert draft.source == "diffusion"
    assert draft.tokens == build(tiny_drafter, policy="fixed").propose([one])[0].tokens
    assert pipeline.drafter_up
    assert pipeline.num_failures == 1


def test_release_forgets_everything(tiny_drafter: Path) -> None:
    pipeline = build(tiny_drafter, num_slots=2, policy="fixed")
    for i in range(20):  # more than there are slots
        assert pipeline.propose([request(text(20), name=str(i))])[0].source == "diffusion"
        pipeline.release(str(i))
    pipeline.release("never seen")


def test_without_any_source_nothing_is_drafted() -> None:
    pipeline = build(None, free_drafts=False)
    assert pipeline.propose([request(np.tile(text(20), 3))])[0].bypass_reason == "no_candidates"


def test_what_only_judges_learns_all_the_same_before_it_is_asked(tiny_drafter: Path) -> None:
    """How far to trust copies is learned from the text as it grows, whether or not they draft."""
    causal = CausalModel(VOCABULARY_SIZE)
    diffusion = DiffusionDrafter(Transformer.load(tiny_drafter), 1, VOCABULARY_SIZE)
    search = PathSearch(causal, use_proposals=False)
    pipeline = DraftPipeline(causal, search, diffusion, PolicyOptions(policy="fixed"), "judge", free_drafts=False)
    before = causal.copy_weights.copy()
    repeated = np.tile(text(20), 6)
    for length in range(40, 110, 10):
        pipeline.propose([request(repeated[:length], cap=0)])
    np.testing.assert_array_equal(causal.copy_weights, before)
    for length in range(40, 110, 10):
        assert pipeline.propose([request(repeated[:length])])[0].source == "diffusion"
    assert causal.copy_weights[-1] > before[-1]
