"""The report of a benchmark run, and its JSON form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from service.bench.environment import Environment
from service.bench.records import Pass, WorkloadRecord
from service.bench.summary import Summary, is_looping, looping_share, summarize

FORMAT = 1  # of the JSON document


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of a run, and what a reader needs to judge them."""

    command: str
    started: str  # ISO 8601
    elapsed_seconds: float
    stopped_early: str  # the reason in words; empty if everything was measured
    environment: Environment
    facts: Mapping[str, str]  # what was measured: models, prompts, contestants
    workloads: Sequence[WorkloadRecord]


def to_json(report: Report) -> str:
    """Return the run as JSON: figures, and raw numbers of every pass, without the texts."""
    document = {
        "format": FORMAT,
        "command": report.command,
        "started": report.started,
        "elapsed_seconds": report.elapsed_seconds,
        "stopped_early": report.stopped_early,
        "environment": asdict(report.environment),
        "facts": dict(report.facts),
        "workloads": [_workload(record) for record in report.workloads],
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _workload(record: WorkloadRecord) -> dict[str, Any]:
    return {
        **asdict(record.workload),
        "reference": record.reference,
        "free": record.free,
        "num_pairs": record.num_pairs,
        "num_pairs_planned": record.num_pairs_planned,
        "looping_share": looping_share(record),
        "summaries": [_figures(summary) for summary in summarize(record)],
        "mismatches": [asdict(mismatch) for mismatch in record.mismatches],
        "passes": [_raw(entry) for entry in record.passes],
    }


def _figures(summary: Summary) -> dict[str, Any]:
    figures = asdict(summary) | {"tokens_per_second": summary.tokens_per_second}
    for name in ("acceptance", "looping_acceptance", "other_acceptance"):
        acceptance = getattr(summary, name)
        figures[name] |= {
            "acceptance_length": acceptance.length,
            "acceptance_length_when_drafted": acceptance.length_when_drafted,
            "acceptance_rate": acceptance.rate,
        }
    return figures


def _raw(entry: Pass) -> dict[str, Any]:
    return {
        "contestant": entry.contestant,
        "pair": entry.pair,
        "seconds": entry.seconds,
        "decode_seconds": entry.decode_seconds,
        "num_tokens": entry.num_tokens,
        "num_steps": sum(len(generation.steps) for generation in entry.generations),
        "prompts": [generation.prompt for generation in entry.generations],
        "looping": [is_looping(generation) for generation in entry.generations],
        "phases": None if entry.phases is None else asdict(entry.phases),
    }
