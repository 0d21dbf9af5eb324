"""Messages between the service and vLLM's worker: a request's options one way, the records of its steps the other.

vLLM carries lists and numbers, no objects of ours.
"""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from drafters.base import Draft, DraftingCost, Outcome, PolicyName, SearchFacts, StepRecord

KEY = "diffuspec"  # our place in vLLM's additional_config, in a request's extra_args and beside its tokens
NO_DRAFTS_HERE = "nothing on this rank"  # the description of a rank whose drafts vLLM does not take

Trace = list[tuple[str, list[int], int]]
"""Each step of one request: the draft's source, the tokens that were verified, and how many were accepted."""


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """A request's wishes about its drafts; they travel in vLLM's `extra_args`."""

    name: str = ""  # the service's id of the request; vLLM adds a suffix to it
    enabled: bool = True
    max_draft_tokens: int | None = None  # None: the service's
    policy: PolicyName | None = None  # None: the service's
    trace: bool = False
    probe: int | None = None  # calibration only: draft exactly so many tokens, right or wrong

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RequestOptions":
        return cls(**{name: values[name] for name in cls.__slots__ if name in values})


def pack_record(record: StepRecord) -> list[Any]:
    """Return the record as lists and numbers, without confidences and lost free drafts, which only the worker reads."""
    return [
        [_pack_outcome(outcome) for outcome in record.outcomes],
        record.num_rows,
        record.num_prefill_rows,
        list(astuple(record.drafting)),
        record.verify_seconds,
        record.commit_seconds,
    ]


def unpack_records(packed: Iterable[list[Any]]) -> list[StepRecord]:
    """Return the records that `pack_record` was given."""
    return [
        StepRecord(
            outcomes=[_unpack_outcome(*outcome) for outcome in outcomes],
            num_rows=rows,
            num_prefill_rows=prefill_rows,
            drafting=DraftingCost(*drafting),
            verify_seconds=verify_seconds,
            commit_seconds=commit_seconds,
        )
        for outcomes, rows, prefill_rows, drafting, verify_seconds, commit_seconds in packed
    ]


def _pack_outcome(outcome: Outcome) -> list[Any]:
    draft = outcome.draft
    return [
        [
            list(draft.tokens),
            draft.source,
            draft.num_searched,
            list(draft.survival),
            draft.bypass_reason,
            None if draft.search is None else list(astuple(draft.search)),
        ],
        outcome.request_id,
        outcome.num_accepted,
        outcome.policy,
        outcome.num_cut,
        outcome.next_token,
    ]


def _unpack_outcome(
    draft: list[Any], request_id: str, num_accepted: int, policy: Any, num_cut: int, next_token: int | None
) -> Outcome:
    tokens, source, num_searched, survival, bypass_reason, search = draft
    unpacked = Draft(
        tokens=tuple(tokens),
        source=source,
        num_searched=num_searched,
        survival=tuple(survival),
        search=None if search is None else SearchFacts(*search),
        bypass_reason=bypass_reason,
    )
    return Outcome(request_id, unpacked, num_accepted, policy, num_cut, next_token)
