"""What every kernel does with tokens."""

from typing import Any

from transformer.compiled import compiled

NO_TOKEN = -1


@compiled
def contains(values: Any, count: int, value: int) -> bool:
    """Whether `value` is among the first `count`."""
    for index in range(count):  # noqa: SIM110
        if values[index] == value:
            return True
    return False


@compiled
def token_at(text: Any, path: Any, position: int) -> Any:
    return text[position] if position < len(text) else path[position - len(text)]
