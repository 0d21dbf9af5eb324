import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.bench.environment import describe_environment
from service.bench.page import to_html
from service.bench.plots import Bar, Series, Stack, bars, lines, stacks, ticks
from service.bench.records import Mismatch
from service.bench.report import Report, to_json
from service.bench.table import MISMATCHES_SHOWN, mismatch_lines, render_table
from tests.unit.bench.recorded import record

MISMATCH = Mismatch("free", 0, "prompt-0", 3, 1, 2, 0.5)


@pytest.fixture
def report() -> Report:
    facts = {"target": "tiny & random"}
    return Report("diffuspec bench --all", "2026-01-01", 12.5, "", describe_environment(), facts, [record((MISMATCH,))])


def test_the_table_has_a_line_for_everyone() -> None:
    lines_ = render_table(record()).splitlines()
    assert lines_[0].startswith("greedy, concurrency 1: 4 prompts, 18 new tokens each; 50%")
    assert [line.split("  ")[0] for line in lines_[3:6]] == ["plain", "free", "fast <b>"]
    assert "2.00 [2.00, 2.00]" in lines_[4]
    assert lines_[4].endswith("yes")


def test_a_mismatch_cannot_be_overlooked() -> None:
    table = render_table(record((MISMATCH,)))
    assert "1 DIFFER" in table
    assert "NOT LOSSLESS: 1 continuations" in table
    assert "prompt-0, generated token 3: 2 instead of 1, margin 0.5 nats" in table


def test_many_mismatches_are_counted_but_not_all_listed() -> None:
    shown = mismatch_lines([MISMATCH] * 25)
    assert f"and {25 - MISMATCHES_SHOWN} more" in shown[-1]
    assert len(shown) == MISMATCHES_SHOWN + 3


def test_the_json_document_has_figures_and_raw_seconds(report: Report) -> None:
    document = json.loads(to_json(report))
    (workload,) = document["workloads"]
    assert workload["summaries"][1]["speed_up"]["median"] == 2.0
    assert workload["summaries"][1]["acceptance"]["acceptance_length"] > 1
    assert [entry["seconds"] for entry in workload["passes"] if entry["contestant"] == "plain"] == [2.0, 4.0, 6.0, 8.0]
    assert workload["mismatches"][0]["found"] == 2
    assert document["command"] == "diffuspec bench --all"
    assert document["environment"]["packages"]["torch"]


class _Balance(HTMLParser):
    """Checks that every tag is closed by its own end tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}, "the page must be self-contained"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(report: Report) -> None:
    page = to_html(report)
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    assert page.count("<svg") == 4
    assert "NOT LOSSLESS" in parser.text
    assert "tiny & random" in parser.text
    assert "fast <b>" in parser.text
    assert not re.search(r"https?://|@import|url\(", page)


@given(st.floats(1e-6, 1e9), st.integers(1, 12))
def test_ticks_start_at_zero_and_reach_the_highest_value(highest: float, count: int) -> None:
    values = ticks(highest, count)
    assert values[0] == 0
    assert values[-1] >= highest * (1 - 1e-6)
    assert 2 <= len(values) <= count + 2


def _elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg[: svg.index("</svg>") + 6]).findall(tag)


def test_bars_are_as_long_as_their_values() -> None:
    first, second = _elements(bars([Bar("a", 1.0, 0.5, 1.5), Bar("b <", 3.0, 3.0, 3.0)], "x", mark=1.0), "rect")
    assert float(second.attrib["width"]) == pytest.approx(3 * float(first.attrib["width"]), rel=1e-2)


def test_stacked_parts_follow_one_another() -> None:
    parts = _elements(stacks([Stack("a", [1.0, 2.0, 0.5])], ["x", "y", "z"], " ms"), "rect")
    for before, after in pairwise(parts):
        end = float(before.attrib["x"]) + float(before.attrib["width"])
        assert float(after.attrib["x"]) == pytest.approx(end, abs=0.2)


def test_lines_go_up_with_their_values() -> None:
    points = _elements(lines([Series("a", [(0, 0.0), (1, 0.5), (2, 1.0)])], "x", "y", highest=1.0), "circle")
    heights = [float(point.attrib["cy"]) for point in points]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
