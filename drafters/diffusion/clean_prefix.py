"""Where each request's clean tokens stand in the diffusion drafter's key-value cache, and how long they hold.

A request has one slot, and in it a window of its tokens: the latest ones, from an `offset` on. What of the cache is
exact depends on who sees whom (`transformer.families`):

- `block`: a clean token sees only what is before it, so that its keys and values never change.
- `block_causal`: those of a whole block of clean tokens never change; a block in the making is run again.
- `full`: clean tokens would also see what comes after them, so that cached ones are an approximation, which
  verification makes safe. They are read anew every `refresh_interval` passes, and when acceptance falls.
"""

from dataclasses import dataclass

MEAN_RATE = 0.3  # of the means of accepted tokens, with a fresh and with a stale prefix
FALLEN = 0.5  # a stale prefix is read anew once its mean is below this share of the fresh one's ...
WORTH_READING = 0.5  # ... if that is at least so many tokens: reading anew does not help a drafter that is always wrong


@dataclass(slots=True)
class CleanPrefix:
    """One request's clean tokens in the cache."""

    slot: int
    offset: int = 0  # the request's position that is the slot's position 0
    length: int = 0  # clean tokens whose keys and values are there, from `offset`
    num_stale: int = 0  # passes since the prefix was read as a whole
    fresh_mean: float | None = None  # accepted tokens of drafts with a fresh prefix, as a moving mean
    stale_mean: float = 0.0  # the same with a stale prefix; starts over from the fresh mean
    has_fallen: bool = False

    def note(self, num_accepted: int) -> None:
        """Learn how much of the last draft was accepted, and whether a stale prefix is to blame."""
        if self.num_stale <= 1:
            known = num_accepted if self.fresh_mean is None else self.fresh_mean
            self.fresh_mean = self.stale_mean = known + MEAN_RATE * (num_accepted - known)
            return
        fresh = self.fresh_mean or 0.0
        self.stale_mean += MEAN_RATE * (num_accepted - self.stale_mean)
        self.has_fallen = fresh >= WORTH_READING and self.stale_mean < FALLEN * fresh


class CleanPrefixes:
    """The prefixes of all requests: one slot each, windows that move, refreshes. Knows no model and no tensor."""

    def __init__(
        self,
        num_slots: int,
        window: int,
        grid: int,
        is_approximate: bool,
        refresh_interval: int,
        reuse: bool,
        first_tokens: int | None = None,
    ) -> None:
        """Start with `num_slots` free slots.

        window: most clean tokens that are read. grid: windows begin, and cached prefixes end, at its multiples (the
        length of a block that sees itself; else 1). is_approximate: attention is `full`. refresh_interval: passes
        until an approximate prefix is read anew; 0: never. reuse: False reads everything at every pass.
        first_tokens: that a window begins with, for a drafter that needs few: rather than catch up with more, it begins
        a new window. None: a first window begins with all that fit in, and half of them are left when it moves, so that
        it need not move again at once. Raises ValueError for `first_tokens` beside a grid or an approximation.
        """
        self.window, self.grid, self.is_approximate = window, grid, is_approximate
        if first_tokens is not None and (grid > 1 or is_approximate):
            raise ValueError("only a prefix that is exact token by token may begin anew anywhere")
        self._first = window  # tokens of a request's first window
        self._kept = max(window // 2, grid)  # those of one that moves
        if not reuse:
            self._kept = window
        elif first_tokens is not None:
            self._first = self._kept = min(first_tokens, window)
        self._catches_up = first_tokens is None
        self._refresh_interval, self._reuse = refresh_interval, reuse
        self._free = list(reversed(range(num_slots)))
        self._of_request: dict[str, CleanPrefix] = {}

    def __len__(self) -> int:
        """Requests that have a slot."""
        return len(self._of_request)

    def pending_rows(self, request_id: str, num_tokens: int) -> int:
        """Clean rows that a pass for this request, now of `num_tokens` tokens, would have to run before its masks."""
        prefix = self._of_request.get(request_id)
        if prefix is None:
            return num_tokens - self._offset(num_tokens, self._first)
        if self._must_move(prefix, num_tokens):
            return num_tokens - self._offset(num_tokens, self._kept)
        return num_tokens - prefix.offset - (0 if self._must_refresh(prefix) else prefix.length)

    def place(self, request_id: str, num_tokens: int) -> CleanPrefix:
        """The request's prefix, with room for `num_tokens` tokens. Raises RuntimeError without a free slot."""
        prefix = self._of_request.get(request_id)
        if prefix is None:
            if not self._free:
                raise RuntimeError("the drafter has no free slot")
            prefix = self._of_request[request_id] = CleanPrefix(self._free.pop())
            prefix.offset = self._offset(num_tokens, self._first)
        if self._must_move(prefix, num_tokens):
            prefix.offset = self._offset(num_tokens, self._kept)
            prefix.length = 0
        if self._must_refresh(prefix):
            prefix.length = 0
        if prefix.length == 0:
            prefix.num_stale, prefix.has_fallen = 0, False
        return prefix

    def note(self, request_id: str, num_accepted: int) -> None:
        """Learn how much of the request's last draft was accepted: a stale prefix may have to be read anew."""
        prefix = self._of_request.get(request_id)
        if prefix is not None and self.is_approximate:
            prefix.note(num_accepted)

    def keep(self, request_id: str, num_tokens: int) -> None:
        """Forget what is cached of a request beyond its first `num_tokens` tokens: the others have changed."""
        prefix = self._of_request.get(request_id)
        if prefix is None:
            return
        kept = num_tokens - prefix.offset
        if kept <= 0:
            prefix.offset = prefix.length = 0
        prefix.length = min(prefix.length, max(kept, 0)) // self.grid * self.grid

    def release(self, request_id: str) -> int | None:
        """Free the request's slot and return it; None if it has none."""
        prefix = self._of_request.pop(request_id, None)
        if prefix is None:
            return None
        self._free.append(prefix.slot)
        self._free.sort(reverse=True)  # low slots first keeps the batch's slots close together
        return prefix.slot

    def _must_move(self, prefix: CleanPrefix, num_tokens: int) -> bool:
        """Whether the window begins elsewhere for a context of `num_tokens`."""
        length = num_tokens - prefix.offset
        is_behind = not self._catches_up and length - prefix.length > self._kept
        return not self._reuse or length > self.window or is_behind

    def _must_refresh(self, prefix: CleanPrefix) -> bool:
        """Whether a prefix that is an approximation is to be read anew."""
        interval = self._refresh_interval
        return self.is_approximate and (prefix.has_fallen or 0 < interval <= prefix.num_stale)

    def _offset(self, num_tokens: int, kept: int) -> int:
        """Where a window of at most `kept` tokens begins: on the grid."""
        return -(-max(0, num_tokens - kept) // self.grid) * self.grid
