"""Operations on tokens that all kernels share."""

from typing import Any

from transformer.compiled import compiled

NO_TOKEN = -1


@compiled
def contains(values: Any, count: int, value: int) -> bool:
    """Return whether `value` is among the first `count` values."""
    for index in range(count):  # noqa: SIM110
        if values[index] == value:
            return True
    return False


@compiled
def token_at(text: Any, path: Any, position: int) -> Any:
    """Return the token at `position` of `text` followed by `path`."""
    return text[position] if position < len(text) else path[position - len(text)]
