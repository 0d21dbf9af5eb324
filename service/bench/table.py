"""The figures as a plain-text table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.bench.records import Mismatch, WorkloadRecord
from service.bench.summary import Spread, Summary, looping_share, summarize

MISMATCHES_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of every contestant."""

    title: str
    meaning: str
    text: Callable[[Summary], str]


def _number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _share(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def _spread(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f} [{spread.lower:.2f}, {spread.upper:.2f}]"


def _median(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return _number(None if seconds is None else 1e3 * seconds, 1)


def _sources(summary: Summary) -> str:
    if not summary.sources:
        return "-"
    return "/".join(f"{100 * summary.sources.get(source, 0.0):.0f}" for source in ("none", "free", "diffusion"))


def _lossless(summary: Summary) -> str:
    if summary.num_mismatches:
        return f"{summary.num_mismatches} DIFFER"
    return f"{summary.num_near_ties} near ties" if summary.num_near_ties else "yes"


COLUMNS = (
    Column("contestant", "", lambda s: s.contestant),
    Column("speed-up", "plain's seconds / its own: median over pairs, quartiles", lambda s: _spread(s.speed_up)),
    Column("total", "plain's seconds / its own, over all pairs together", lambda s: _number(s.total_speed_up)),
    Column("decode", "median speed-up after the first tokens", lambda s: _median(s.decode_speed_up)),
    Column("vs free", "median speed-up over the fastest without a model", lambda s: _median(s.free_speed_up)),
    Column("tokens/s", "generated tokens per second", lambda s: _number(s.tokens_per_second, 0)),
    Column("length", "acceptance length: tokens per step, with the extra one", lambda s: _number(s.acceptance.length)),
    Column("drafted", "acceptance length of drafted steps", lambda s: _number(s.acceptance.length_when_drafted)),
    Column("rate", "accepted share of the drafted tokens", lambda s: _share(s.acceptance.rate)),
    Column("none/free/diff", "percent of the steps by draft source", _sources),
    Column("search", "path search's share of the steps with a diffusion pass", lambda s: _share(s.search_share, 1)),
    Column("loops", "speed-up where the continuation loops (concurrency 1)", lambda s: _median(s.looping_speed_up)),
    Column("others", "speed-up where it does not loop", lambda s: _median(s.other_speed_up)),
    Column("ttft ms", "median time to the first token", lambda s: _milliseconds(s.first_token_seconds)),
    Column("tpot ms", "median time per token after the first", lambda s: _milliseconds(s.token_seconds)),
    Column("gap ms", "median over requests of the longest wait", lambda s: _milliseconds(s.longest_gap_seconds)),
    Column("lossless", "whether every continuation equals plain's", _lossless),
)  # fmt: skip


def used_columns(summaries: Sequence[Summary]) -> list[Column]:
    """Return the columns that have a figure for at least one contestant."""
    return [column for column in COLUMNS if any(column.text(summary) != "-" for summary in summaries)]


def heading(record: WorkloadRecord) -> str:
    """Summarise the workload and the number of pairs in one line."""
    workload = record.workload
    done = (
        f"{record.num_pairs}"
        if record.num_pairs == record.num_pairs_planned
        else f"{record.num_pairs} of {record.num_pairs_planned}"
    )
    batch = "prompts" if workload.concurrency == 1 else f"batches of {workload.concurrency} prompts"
    return (
        f"{workload.title}: {done} {batch}, {workload.max_tokens} new tokens each; "
        f"{100 * looping_share(record):.0f}% of the continuations loop"
    )


def render_table(record: WorkloadRecord) -> str:
    """Render one workload: heading, figures, and every continuation that differs from plain decoding."""
    summaries = summarize(record)
    columns = used_columns(summaries)
    rows = [[column.title for column in columns]] + [
        [column.text(summary) for column in columns] for summary in summaries
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [heading(record), ""]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines + mismatch_lines(record.mismatches)) + "\n"


def mismatch_lines(mismatches: Sequence[Mismatch]) -> list[str]:
    """List the first few mismatches under a line that can't be overlooked; near ties come separately."""
    near_ties = [entry for entry in mismatches if entry.is_near_tie]
    failures = [entry for entry in mismatches if not entry.is_near_tie]
    lines = []
    if failures:
        lines += ["", f"NOT LOSSLESS: {len(failures)} continuations differ from plain decoding's", *_listed(failures)]
    if near_ties:
        lines += ["", f"{len(near_ties)} continuations differ at a near tie, which rounding explains"]
        lines += _listed(near_ties)
    return lines


def _listed(mismatches: Sequence[Mismatch]) -> list[str]:
    lines = []
    for entry in mismatches[:MISMATCHES_SHOWN]:
        margin = "" if entry.margin is None else f", margin {entry.margin:.2g} nats"
        lines.append(
            f"  {entry.contestant}, prompt {entry.prompt}, generated token {entry.position}: "
            f"{entry.found} instead of {entry.expected}{margin}"
        )
    if len(mismatches) > MISMATCHES_SHOWN:
        lines.append(f"  and {len(mismatches) - MISMATCHES_SHOWN} more (all are in the JSON file)")
    return lines


def legend() -> str:
    """Explain the columns, one line each."""
    width = max(len(column.title) for column in COLUMNS)
    return "\n".join(f"  {column.title.ljust(width)}  {column.meaning}" for column in COLUMNS if column.meaning) + "\n"
