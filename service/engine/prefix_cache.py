"""The slots of the verifier's key-value cache: which request runs in which, and what finished requests left behind."""

from collections.abc import Callable, Sequence

import numpy as np

from drafters.base import Tokens, num_common
from service.engine.sequence import Decoding

MIN_COPY = 16  # tokens; reading fewer is as cheap as copying them


class PrefixCache:
    """Places requests in slots, so that a known beginning of a prompt is not computed again.

    A finished request's keys and values stay in its slot until the slot is taken. A new prompt reuses the longest
    prefix that it shares with any slot of the same tenant, including running requests: in place if that slot is free
    and well placed, else by a copy. The prompt's last token is never reused, because the first output token is drawn
    from its row. Tenants share nothing: otherwise the time a prompt takes would reveal what others have sent.

    Running requests stay in slots close together, because a verifier reads neighbouring slots as one view. Of the free
    slots, those that widen the occupied range least are candidates; the least recently used of them is taken. Nothing
    is moved when a request ends: its slot is the first to be filled.
    """

    def __init__(self, num_slots: int, copy_slot: Callable[[int, int, int], None], reuses: bool = True) -> None:
        """`copy_slot(source, target, length)` copies keys and values between slots. reuses: False turns reuse off."""
        self._copy_slot = copy_slot
        self._reuses = reuses
        self._owners: list[Decoding | None] = [None] * num_slots
        self._kept: list[Tokens] = [np.empty(0, dtype=np.int32)] * num_slots  # cached tokens of free slots
        self._tenants = [""] * num_slots  # whose tokens each slot holds
        self._last_used = [0] * num_slots
        self._uses = 0

    @property
    def num_slots(self) -> int:
        return len(self._owners)

    @property
    def num_free(self) -> int:
        return self._owners.count(None)

    def place(self, decoding: Decoding) -> bool:
        """Give the request a slot and the longest known prefix of its prompt.

        Returns False, and gives no slot, if none is free, or if a running request is about to have read more of the
        same prompt: waiting for it is cheaper than reading the same tokens twice.
        """
        candidates = self._well_placed()
        if not candidates:
            return False
        wanted = decoding.prompt[:-1] if self._reuses and decoding.may_reuse_prefix else decoding.prompt[:0]
        tenant = decoding.request.tenant
        lengths = [
            num_common(self._held(slot), wanted) if self._tenants[slot] == tenant else 0
            for slot in range(self.num_slots)
        ]
        source = max(range(self.num_slots), key=lambda slot: (lengths[slot], slot in candidates))
        if self._is_being_read(wanted, lengths[source] + MIN_COPY, tenant):
            return False
        if source in candidates and lengths[source] > 0:
            target = source
        else:
            target = min(candidates, key=lambda slot: self._last_used[slot])
        num_reused = lengths[source]
        if source != target:
            if num_reused < MIN_COPY:
                num_reused = 0
            else:
                self._copy_slot(source, target, num_reused)
                self._touch(source)
        self._owners[target] = decoding
        self._tenants[target] = tenant
        self._touch(target)
        decoding.slot = target
        decoding.num_cached = decoding.num_reused = num_reused
        return True

    def vacate(self, decoding: Decoding, is_intact: bool = True) -> None:
        """Take the request out of its slot. If it is intact, its keys and values stay there for others."""
        slot = decoding.slot
        assert self._owners[slot] is decoding
        self._kept[slot] = decoding.cached_tokens.copy() if is_intact else np.empty(0, dtype=np.int32)
        self._owners[slot] = None
        self._touch(slot)
        decoding.slot = -1

    def _held(self, slot: int) -> Tokens:
        owner = self._owners[slot]
        return self._kept[slot] if owner is None else owner.cached_tokens

    def _touch(self, slot: int) -> None:
        self._uses += 1
        self._last_used[slot] = self._uses

    def _is_being_read(self, wanted: Tokens, length: int, tenant: str) -> bool:
        """Return whether a running request still reads a prompt that shares `length` or more tokens with `wanted`."""
        if len(wanted) < length:
            return False
        return any(
            owner is not None
            and owner.is_reading
            and owner.request.tenant == tenant
            and num_common(owner.prompt, wanted) >= length
            for owner in self._owners
        )

    def _well_placed(self) -> Sequence[int]:
        """Return the free slots that widen the range of occupied slots least."""
        free = [slot for slot, owner in enumerate(self._owners) if owner is None]
        if not free or len(free) == self.num_slots:
            return free
        occupied = [slot for slot, owner in enumerate(self._owners) if owner is not None]
        first, last = occupied[0], occupied[-1]
        widths = [max(last, slot) - min(first, slot) for slot in free]
        narrowest = min(widths)
        return [slot for slot, width in zip(free, widths, strict=True) if width == narrowest]
