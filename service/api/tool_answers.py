"""Tool calls in the shapes that clients know."""

import uuid
from collections.abc import Sequence
from dataclasses import replace

from service.api.choice import Piece
from service.api.responses import ToolCallBody, ToolCallDelta
from service.text.tool_calls import CallPart, ToolCallParser, ToolText


def read_piece(parser: ToolCallParser, piece: Piece) -> tuple[Piece, ToolText]:
    """What the piece's text adds, and the piece with its reason to end: calls are one, if all are whole."""
    read = parser.push(piece.text)
    if piece.finish_reason is not None:
        last = parser.finish()
        read = ToolText(read.content + last.content, read.calls + last.calls)
        if parser.has_only_whole_calls and piece.finish_reason == "stop":
            piece = replace(piece, finish_reason="tool_calls")
    return piece, read


def whole_calls(parts: Sequence[CallPart]) -> list[ToolCallBody]:
    calls: list[ToolCallBody] = []
    for part in parts:
        if part.name is not None:
            calls.append({"id": _call_id(), "type": "function", "function": {"name": part.name, "arguments": ""}})
        calls[part.index]["function"]["arguments"] += part.arguments
    return calls


def call_deltas(parts: Sequence[CallPart]) -> list[ToolCallDelta]:
    """One entry per call: of its name, and of the arguments that came with it or after it."""
    deltas: dict[int, ToolCallDelta] = {}
    for part in parts:
        if part.name is not None:
            deltas[part.index] = {
                "index": part.index,
                "id": _call_id(),
                "type": "function",
                "function": {"name": part.name, "arguments": ""},
            }
        delta = deltas.setdefault(part.index, {"index": part.index, "function": {"arguments": ""}})
        delta["function"]["arguments"] += part.arguments
    return list(deltas.values())


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
