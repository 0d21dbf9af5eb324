"""Step records as lists and numbers, for the way from vLLM's worker process to the service's."""

from collections.abc import Iterable
from dataclasses import astuple
from typing import Any

from drafters.base import Draft, DraftingCost, Outcome, StepRecord

KEY = "diffuspec"  # of vLLM's additional_config, of a request's extra_args, and of what comes back with its tokens


def pack_record(record: StepRecord) -> list[Any]:
    """As lists and numbers, for the way between processes."""
    return [
        [_pack_outcome(outcome) for outcome in record.outcomes],
        record.num_rows,
        record.num_prefill_rows,
        list(astuple(record.drafting)),
        record.verify_seconds,
        record.commit_seconds,
        record.mean_context,
    ]


def _pack_outcome(outcome: Outcome) -> list[Any]:
    draft = outcome.draft
    return [
        outcome.request_id,
        list(draft.tokens),
        draft.source,
        draft.expected_accepted,
        draft.lattice_width,
        draft.path_gain,
        draft.bypass_reason,
        outcome.num_accepted,
        outcome.policy,
        outcome.num_cut,
    ]


def unpack_records(packed: Iterable[list[Any]]) -> list[StepRecord]:
    """The records of `pack_record`, without confidences."""
    return [
        StepRecord(
            outcomes=[_unpack_outcome(*outcome) for outcome in outcomes],
            num_rows=rows,
            num_prefill_rows=prefill,
            drafting=DraftingCost(*drafting),
            verify_seconds=verify,
            commit_seconds=commit,
            mean_context=context,
        )
        for outcomes, rows, prefill, drafting, verify, commit, context in packed
    ]


def _unpack_outcome(
    name: str,
    tokens: list[int],
    source: Any,
    expected: float,
    width: float,
    gain: float,
    reason: str,
    accepted: int,
    policy: Any,
    cut: int,
) -> Outcome:
    draft = Draft(
        tokens=tuple(tokens),
        source=source,
        expected_accepted=expected,
        lattice_width=width,
        path_gain=gain,
        bypass_reason=reason,
    )
    return Outcome(name, draft, accepted, policy, cut)
