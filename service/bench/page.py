"""The report as a self-contained HTML page."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape

from service.bench.plots import Bar, Series, Stack, bars, lines, stacks
from service.bench.records import Phases, WorkloadRecord
from service.bench.report import Report
from service.bench.summary import POSITIONS_PER_POINT, Summary, summarize
from service.bench.table import COLUMNS, heading, mismatch_lines, used_columns

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bad: #c62828; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: .95rem; margin: 1rem 0 .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { opacity: .7; }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--soft); }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem 2rem; }
figure { margin: 0; }
svg { width: 100%; height: auto; }
svg text { fill: currentColor; font-size: 13px; }
svg text.small { font-size: 11px; opacity: .8; }
.grid { stroke: var(--line); }
.mark { stroke: currentColor; stroke-dasharray: 4 3; }
.range { stroke: currentColor; stroke-width: 1.5; fill: none; }
.legend { font-size: 12px; margin: .2rem 0; }
.legend span { margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px; }
.bad { color: var(--bad); font-weight: 600; white-space: pre-wrap; }
"""


def to_html(report: Report) -> str:
    """Render the report: the table and the plots of every workload."""
    facts = {"command": report.command, "started": f"{report.started}, took {report.elapsed_seconds:.0f} s"}
    facts |= {"machine": "; ".join(report.environment.lines)} | dict(report.facts)
    if report.stopped_early:
        facts["stopped early"] = report.stopped_early
    meanings = {column.title: column.meaning for column in COLUMNS if column.meaning}
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>diffuspec bench</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n"
        f"<h1>Plain and speculative decoding, side by side</h1>\n{_definitions(facts)}\n"
        + "\n".join(_section(record) for record in report.workloads)
        + f"\n<h2>Columns</h2>\n{_definitions(meanings)}\n</body></html>\n"
    )


def _definitions(entries: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"


def _section(record: WorkloadRecord) -> str:
    summaries = summarize(record)
    warning = "\n".join(mismatch_lines(record.mismatches)).strip()
    plots = "".join(
        f"<figure><h3>{escape(title)}</h3>{plot}</figure>"
        for title, plot in _plots(summaries).items()
        if plot is not None
    )
    return (
        f"<section><h2>{escape(heading(record))}</h2>"
        + (f'<p class="bad">{escape(warning)}</p>' if warning else "")
        + f'<div class="scroll">{_table(summaries)}</div><div class="plots">{plots}</div></section>'
    )


def _table(summaries: Sequence[Summary]) -> str:
    columns = used_columns(summaries)
    head = "".join(f'<th title="{escape(column.meaning)}">{escape(column.title)}</th>' for column in columns)
    rows = (
        "<tr>" + "".join(f"<td>{escape(column.text(summary))}</td>" for column in columns) + "</tr>"
        for summary in summaries
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _plots(summaries: Sequence[Summary]) -> dict[str, str | None]:
    """Return the plots by title; None where no contestant has such figures."""
    speed_ups = [
        Bar(s.contestant, s.speed_up.median, s.speed_up.lower, s.speed_up.upper)
        for s in summaries
        if s.speed_up is not None
    ]
    acceptance = [Series(s.contestant, _acceptance_points(s)) for s in summaries if s.drafted_by_position]
    lengths = [
        Series(s.contestant, [(i * POSITIONS_PER_POINT, y) for i, y in enumerate(s.draft_length_over_output)])
        for s in summaries
        if s.drafted_by_position
    ]
    names = [field.name for field in fields(Phases)]
    phases = [
        Stack(s.contestant, [1e3 * getattr(s.phases, name) / s.num_tokens for name in names])
        for s in summaries
        if s.phases is not None
    ]
    return {
        "Speed-up over plain decoding: median and quartiles": bars(speed_ups, "x", mark=1.0) if speed_ups else None,
        "Milliseconds per generated token, by phase": stacks(phases, names, " ms") if phases else None,
        "Acceptance by position: accepted share of the drafts that reach it": (
            lines(acceptance, "position in the draft", "accepted share", highest=1.0) if acceptance else None
        ),
        "Draft length over the output: mean tokens per step": (
            lines(lengths, "generated tokens", "draft tokens") if lengths else None
        ),
    }


def _acceptance_points(summary: Summary) -> list[tuple[float, float]]:
    counts = zip(summary.accepted_by_position, summary.drafted_by_position, strict=True)
    return [(i, accepted / drafted) for i, (accepted, drafted) in enumerate(counts, start=1)]
