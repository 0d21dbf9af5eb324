"""Near-ties of a whole session: places where rounding swapped the two best tokens of greedy decoding.

Two float32 programs, or one program at two batch shapes, may round differently. A difference is allowed only if the
margin between the two tokens is at most 1e-4 logits, and at no more than one place in 100,000 compared tokens. A place
that several drafters meet counts once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MAX_MARGIN = 1e-4  # logits
TOKENS_PER_NEAR_TIE = 100_000


@dataclass
class NearTies:
    """Compare outputs and count near-ties. `close` checks the session's total."""

    num_compared: int = 0
    margins: dict[tuple[int, ...], float] = field(default_factory=dict)  # by all tokens before the place

    def compare(
        self,
        prompt: Sequence[int],
        found: Sequence[int],
        wanted: Sequence[int],
        margin_at: Callable[[Sequence[int], int, int], float],
    ) -> None:
        """Fail unless the outputs are equal, except for a near-tie.

        `margin_at(tokens, wanted, found)`: the margin in logits of the wanted next token after `tokens`.
        """
        assert len(found) == len(wanted)
        self.num_compared += len(wanted)
        if list(found) == list(wanted):
            return
        at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        place = (*prompt, *wanted[:at])
        margin = margin_at(place, wanted[at], found[at])
        print(f"near-tie at output token {at}: {found[at]} for {wanted[at]}, margin {margin:.2e}")
        assert abs(margin) <= MAX_MARGIN, f"a margin of {margin:.2e} logits is more than rounding"
        self.margins[place] = margin

    def close(self) -> None:
        """Fail if there were too many near-ties; report the compared tokens and each margin."""
        count = len(self.margins)
        margins = ", ".join(f"{margin:.2e}" for margin in self.margins.values())
        summary = f"{count} near-ties in {self.num_compared} compared tokens; margins: {margins or 'none'}"
        print(summary)
        assert count * TOKENS_PER_NEAR_TIE <= self.num_compared, summary
