"""Write the measured figures into the model cards, between their markers. The rest of a card is written by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

START, END = "<!-- figures: written by `python -m models.training cards` -->", "<!-- end of figures -->"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def replace_figures(card: str, figures: str) -> str:
    """Return the card with `figures` between its markers. Raises ValueError if it has no markers."""
    before, start, rest = card.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the card has no {START!r} ... {END!r}")
    return f"{before}{START}\n{figures}\n{END}{after}"


def write_cards(models: Path, figures: Mapping[str, Any]) -> None:
    """Update the cards of the target, the drafter and the n-gram model in `models`; create a missing card."""
    figures_of = {
        "target": _target(figures),
        "drafter": _drafter(figures),
        "ngram": table(
            ["temperature", "most probable token is the target's", "mean log-probability, nats"],
            [[row["temperature"], row["top_1"], row["log_probability"]] for row in figures["ngram"]],
        ),
    }
    for name, text in figures_of.items():
        card = models / name / "README.md"
        written = card.read_text() if card.exists() else f"# {name}\n\n{START}\n{END}\n"
        card.write_text(replace_figures(written, text))


def _target(figures: Mapping[str, Any]) -> str:
    measured = table(
        ["temperature", "share of repeated 8-grams", "continuations that loop"],
        [[row["temperature"], row["repeated_8_grams"], row["looping_continuations"]] for row in figures["drafter"]],
    )
    size, bits = figures["target_parameters"], figures["target_bits_per_byte"]
    return f"{size:,} parameters; {bits} bits per byte on held-out files.\n\n{measured}"


ACCEPTED = ("temperature", "accepted", "accepted_looping", "accepted_other", "accepted_with_hints")


def _drafter(figures: Mapping[str, Any]) -> str:
    rows = figures["drafter"]
    accepted = table(
        ["temperature", "accepted per step", "looping continuations", "other continuations", "with hints"],
        [[row[name] for name in ACCEPTED] for row in rows],
    )
    survival = table(
        ["temperature", *(f"at least {i + 1}" for i in range(len(rows[0]["survival"])))],
        [[row["temperature"], *row["survival"]] for row in rows],
    )
    share = figures["drafter_parameters"] / figures["target_parameters"]
    return f"{figures['drafter_parameters']:,} parameters, {share:.1%} of the target's.\n\n{accepted}\n\n{survival}"
