"""The place of each request's clean tokens in the diffusion drafter's key-value cache, and when to read them again.

A request has one slot, which holds a window of its latest tokens, from an `offset` on. The attention pattern decides
how long cached keys and values stay exact (`transformer.families`):

- `block`: a clean token sees only the tokens before it, so its keys and values never change.
- `block_causal`: the keys and values of a complete block never change; an incomplete block is run again.
- `full`: clean tokens also see later tokens, so cached ones are an approximation; verification keeps the output exact.
  They are read again every `refresh_interval` passes, and when acceptance falls.
"""

from dataclasses import dataclass

MEAN_RATE = 0.3  # rate of the moving means of accepted tokens
MIN_STALE_SHARE = 0.5  # a stale prefix is read again if its mean falls below this share of the fresh prefix's mean ...
MIN_FRESH_MEAN = 0.5  # ... and that mean is at least this many tokens: a drafter that is always wrong gains nothing


@dataclass(slots=True)
class CleanPrefix:
    """One request's clean tokens in the cache."""

    slot: int
    offset: int = 0  # the request's position that is the slot's position 0
    length: int = 0  # clean tokens from `offset` on whose keys and values are cached
    num_stale: int = 0  # passes since the prefix was read as a whole
    fresh_mean: float | None = None  # moving mean of accepted tokens, of drafts with a fresh prefix
    stale_mean: float = 0.0  # likewise with a stale prefix; starts from the fresh mean after each refresh
    has_fallen: bool = False

    def note(self, num_accepted: int) -> None:
        """Learn how much of the last draft was accepted, and notice if acceptance fell with a stale prefix."""
        if self.num_stale <= 1:
            known = num_accepted if self.fresh_mean is None else self.fresh_mean
            self.fresh_mean = self.stale_mean = known + MEAN_RATE * (num_accepted - known)
            return
        fresh = self.fresh_mean or 0.0
        self.stale_mean += MEAN_RATE * (num_accepted - self.stale_mean)
        self.has_fallen = fresh >= MIN_FRESH_MEAN and self.stale_mean < MIN_STALE_SHARE * fresh


class CleanPrefixes:
    """The prefixes of all requests: their slots, moving windows and refreshes. Knows no model and no tensor."""

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

        window: maximum number of clean tokens in a window. grid: windows begin, and cached prefixes end, at multiples
        of it: the block length for `block_causal`, else 1. is_approximate: attention is `full`. refresh_interval:
        passes until an approximate prefix is read again; 0: never. reuse: False reads everything in every pass.
        first_tokens: tokens that a new window begins with, for a drafter that needs few: if more than these are missing
        from the cache, it begins a new window instead. None: a first window begins with all tokens that fit; when it
        moves, it keeps half, so that it does not move again at once.
        Raises ValueError for `first_tokens` together with a grid or an approximation.
        """
        self.window, self.grid, self.is_approximate = window, grid, is_approximate
        if first_tokens is not None and (grid > 1 or is_approximate):
            raise ValueError("only a prefix that is exact token by token may begin anew anywhere")
        self._first = window  # tokens of a request's first window
        self._kept = max(window // 2, grid)  # tokens of a window that has moved
        if not reuse:
            self._kept = window
        elif first_tokens is not None:
            self._first = self._kept = min(first_tokens, window)
        self._catches_up = first_tokens is None
        self._refresh_interval, self._reuse = refresh_interval, reuse
        self._free = list(reversed(range(num_slots)))
        self._of_request: dict[str, CleanPrefix] = {}

    def __len__(self) -> int:
        """Return the number of requests that have a slot."""
        return len(self._of_request)

    def pending_rows(self, request_id: str, num_tokens: int) -> int:
        """Return the clean rows that a pass must run before the masks, for a request of now `num_tokens` tokens."""
        prefix = self._of_request.get(request_id)
        if prefix is None:
            return num_tokens - self._offset(num_tokens, self._first)
        if self._must_move(prefix, num_tokens):
            return num_tokens - self._offset(num_tokens, self._kept)
        return num_tokens - prefix.offset - (0 if self._must_refresh(prefix) else prefix.length)

    def place(self, request_id: str, num_tokens: int) -> CleanPrefix:
        """Return the request's prefix, with a window for `num_tokens` tokens.

        Raises RuntimeError if no slot is free.
        """
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
        """Learn how much of the request's last draft was accepted: a stale prefix may need to be read again."""
        prefix = self._of_request.get(request_id)
        if prefix is not None and self.is_approximate:
            prefix.note(num_accepted)

    def keep(self, request_id: str, num_tokens: int) -> None:
        """Drop cached tokens of a request after its first `num_tokens`: they have changed."""
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
        self._free.sort(reverse=True)  # taking low slots first keeps the batch's slots close together
        return prefix.slot

    def _must_move(self, prefix: CleanPrefix, num_tokens: int) -> bool:
        """Return whether the window must begin elsewhere for `num_tokens` tokens."""
        length = num_tokens - prefix.offset
        is_behind = not self._catches_up and length - prefix.length > self._kept
        return not self._reuse or length > self.window or is_behind

    def _must_refresh(self, prefix: CleanPrefix) -> bool:
        """Return whether an approximate prefix must be read again."""
        interval = self._refresh_interval
        return self.is_approximate and (prefix.has_fallen or 0 < interval <= prefix.num_stale)

    def _offset(self, num_tokens: int, kept: int) -> int:
        """Return the grid position where a window of at most `kept` tokens begins."""
        return -(-max(0, num_tokens - kept) // self.grid) * self.grid
