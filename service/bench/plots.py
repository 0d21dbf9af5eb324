"""Small plots as inline SVG, without scripts, fonts or network requests. Text takes the page's colour."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 720
ROW_HEIGHT, BAR_HEIGHT = 26, 16
LABEL_WIDTH, VALUE_WIDTH = 170, 110
# Distinguishable with every common kind of colour blindness (Okabe and Ito), on light and dark backgrounds.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#b3a800")


@dataclass(frozen=True, slots=True)
class Bar:
    """A value and its range."""

    label: str
    value: float
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class Series:
    """A line through `(x, y)` points."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Stack:
    """A bar of stacked values, in the order of the plot's names."""

    label: str
    values: Sequence[float]


def ticks(highest: float, count: int = 5) -> list[float]:
    """Return round numbers from 0 to at least `highest`: about `count` steps of 1, 2 or 5 times a power of ten."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def bars(bars: Sequence[Bar], unit: str, mark: float | None = None) -> str:
    """Draw horizontal bars with their ranges. `mark`: where to draw a dashed line to compare them with."""
    axis = ticks(max([bar.upper for bar in bars] + [mark or 0.0], default=1.0))
    scale = _Scale(0.0, axis[-1], LABEL_WIDTH, WIDTH - VALUE_WIDTH)
    height = ROW_HEIGHT * len(bars) + 24
    parts = _grid(axis, scale, height - 24, unit)
    for i, bar in enumerate(bars):
        top = ROW_HEIGHT * i + (ROW_HEIGHT - BAR_HEIGHT) / 2
        middle = top + BAR_HEIGHT / 2
        parts.append(_text(LABEL_WIDTH - 8, middle, bar.label, "end"))
        parts.append(
            _rectangle(scale(0), top, scale(bar.value) - scale(0), COLOURS[0], f"{bar.label}: {bar.value:.3g}{unit}")
        )
        low, high = scale(bar.lower), scale(bar.upper)
        parts.append(
            f'<path class="range" d="M{low:.1f} {middle:.1f}H{high:.1f}'
            f'M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8"/>'
        )
        parts.append(
            _text(
                WIDTH - VALUE_WIDTH + 8,
                middle,
                f"{bar.value:.2f}{unit} [{bar.lower:.2f}, {bar.upper:.2f}]",
                "start",
                "small",
            )
        )
    if mark is not None:
        parts.append(f'<path d="M{scale(mark):.1f} 0V{height - 24}" class="mark"/>')
    return _svg(parts, height)


def stacks(rows: Sequence[Stack], names: Sequence[str], unit: str) -> str:
    """Draw horizontal stacked bars, with a legend."""
    axis = ticks(max((sum(row.values) for row in rows), default=1.0))
    scale = _Scale(0.0, axis[-1], LABEL_WIDTH, WIDTH - VALUE_WIDTH)
    height = ROW_HEIGHT * len(rows) + 24
    parts = _grid(axis, scale, height - 24, unit)
    for i, row in enumerate(rows):
        top = ROW_HEIGHT * i + (ROW_HEIGHT - BAR_HEIGHT) / 2
        parts.append(_text(LABEL_WIDTH - 8, top + BAR_HEIGHT / 2, row.label, "end"))
        start = 0.0
        for colour, name, value in zip(COLOURS, names, row.values, strict=False):
            width = scale(start + value) - scale(start)
            parts.append(_rectangle(scale(start), top, width, colour, f"{row.label}, {name}: {value:.3g}{unit}"))
            start += value
        parts.append(_text(WIDTH - VALUE_WIDTH + 8, top + BAR_HEIGHT / 2, f"{start:.3g}{unit}", "start", "small"))
    return _svg(parts, height) + _legend(names)


def lines(series: Sequence[Series], x_label: str, y_label: str, highest: float | None = None) -> str:
    """Draw lines over a common axis, with a legend. The vertical axis ends at `highest` or the data's maximum."""
    points = [point for line in series for point in line.points]
    y_axis = ticks(highest if highest is not None else max((y for _, y in points), default=1.0))
    lowest_x, highest_x = min((x for x, _ in points), default=0.0), max((x for x, _ in points), default=1.0)
    height, bottom = 260, 216
    across = _Scale(lowest_x, max(highest_x, lowest_x + 1), 56, WIDTH - 16)
    down = _Scale(0.0, y_axis[-1], bottom, 12)
    parts = []
    for y in y_axis:
        parts.append(f'<path d="M56 {down(y):.1f}H{WIDTH - 16}" class="grid"/>')
        parts.append(_text(48, down(y), f"{y:g}", "end", "small"))
    for x in ticks(highest_x, 8):
        if lowest_x <= x <= highest_x:
            parts.append(_text(across(x), bottom + 14, f"{x:g}", "middle", "small"))
    parts.append(_text((WIDTH + 40) / 2, bottom + 34, x_label, "middle", "small"))
    parts.append(
        f'<text transform="translate(12 {bottom / 2}) rotate(-90)" text-anchor="middle" class="small">'
        f"{escape(y_label)}</text>"
    )
    for i, line in enumerate(series):
        colour, dash = COLOURS[i % len(COLOURS)], ' stroke-dasharray="5 3"' if i >= len(COLOURS) else ""
        path = "L".join(f"{across(x):.1f} {down(y):.1f}" for x, y in line.points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        for x, y in line.points:
            title = f"{line.label}: {y:.3g} at {x:g}"
            parts.append(
                f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.5" fill="{colour}">'
                f"<title>{escape(title)}</title></circle>"
            )
    return _svg(parts, height) + _legend([line.label for line in series])


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _svg(parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def _grid(axis: Sequence[float], scale: _Scale, height: float, unit: str) -> list[str]:
    return [
        f'<path d="M{scale(x):.1f} 0V{height:.1f}" class="grid"/>'
        + _text(scale(x), height + 12, f"{x:g}{unit}", "middle", "small")
        for x in axis
    ]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" dy="0.35em" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _rectangle(x: float, y: float, width: float, colour: str, title: str) -> str:
    size = f'width="{max(width, 0):.1f}" height="{BAR_HEIGHT}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{colour}"><title>{escape(title)}</title></rect>'


def _legend(names: Sequence[str]) -> str:
    entries = (
        f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{"".join(entries)}</p>'
