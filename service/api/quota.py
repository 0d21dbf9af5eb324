"""How much a key may ask for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from service.errors import InvalidRequestError, TooManyRequestsError
from service.keys import Allowance, Key


def permitted_priority(key: Key | None, asked: int | None) -> int:
    """A request's priority: the best one its key has, if it asks for none. Raises InvalidRequestError."""
    best = None if key is None else key.best_priority
    if best is None:
        return asked or 0
    if asked is None:
        return max(best, 0)
    if asked < best:
        raise InvalidRequestError(
            f"priority: this key may not go below {best}, got {asked}.", param="priority", code="invalid_value"
        )
    return asked


@contextmanager
def admitted(key: Key | None, num_sequences: int, now: float) -> Iterator[None]:
    """Count sequences as the key's while they run or wait. Raises TooManyRequestsError. `now`: seconds of a clock."""
    if key is None:
        yield
        return
    if key.max_sequences is not None and num_sequences > key.max_sequences:
        raise InvalidRequestError(
            f"n: this key may have {key.max_sequences} sequences at the same time, got {num_sequences} in one request.",
            param="n",
            code="invalid_value",
        )
    if key.max_sequences is not None and key.num_sequences + num_sequences > key.max_sequences:
        raise TooManyRequestsError(
            f"This key may have {key.max_sequences} sequences at the same time; it has {key.num_sequences}, and "
            f"{num_sequences} more are asked for.",
            code="key_limit",
            headers={"Retry-After": "1"},
        )
    for allowance, what in ((key.requests, "requests"), (key.tokens, "tokens")):
        seconds = 0.0 if allowance is None else allowance.seconds_until_free(now)
        if allowance is not None and seconds > 0:
            raise TooManyRequestsError(
                f"This key may have {allowance.per_minute:g} {what} a minute.",
                code="key_limit",
                headers={"Retry-After": str(math.ceil(seconds))},
            )
    _spend(key.requests, 1)
    key.num_sequences += num_sequences
    try:
        yield
    finally:
        key.num_sequences -= num_sequences


def charge(key: Key | None, num_tokens: int) -> None:
    """Take tokens of prompts and outputs off the key's allowance."""
    if key is not None:
        _spend(key.tokens, num_tokens)


def _spend(allowance: Allowance | None, amount: int) -> None:
    if allowance is not None:
        allowance.spend(amount)
