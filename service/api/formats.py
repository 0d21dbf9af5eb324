"""Log probabilities, traces and tool calls in the shapes that clients know."""

import uuid
from collections.abc import Sequence
from dataclasses import replace

from service.api.choice import Piece, TracedStep
from service.api.responses import (
    ChatLogprobs,
    ChoiceEnding,
    LegacyLogprobs,
    TokenKind,
    TokenLogprob,
    ToolCallBody,
    ToolCallDelta,
    TopLogprob,
    TracedToken,
    TraceStep,
)
from service.engine.base import StepTrace
from service.text.detokenizer import IncrementalDetokenizer
from service.text.tokenizer import TextTokenizer
from service.text.tool_calls import CallFragment, ToolCallParser, ToolText
from verifiers.base import TokenLogprobs

MIN_LOGPROB = -9999.0  # JSON has no infinity


def legacy_logprobs(
    tokenizer: TextTokenizer, entries: Sequence[TokenLogprobs], offsets: Sequence[int]
) -> LegacyLogprobs:
    """Return the completions format. `top_logprobs` always has the token itself, as OpenAI's had."""
    return {
        "tokens": [tokenizer.name_of(entry.token) for entry in entries],
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [_top(tokenizer, entry) for entry in entries],
        "text_offset": list(offsets),
    }


def prompt_logprobs(
    tokenizer: TextTokenizer, tokens: Sequence[int], entries: Sequence[TokenLogprobs], *, skip_special_tokens: bool
) -> LegacyLogprobs:
    """Return the same for an echoed prompt, whose first token nothing predicts."""
    offsets = prompt_offsets(tokenizer, tokens, skip_special_tokens=skip_special_tokens)
    rest = legacy_logprobs(tokenizer, entries, offsets[1:])
    return {
        "tokens": [tokenizer.name_of(tokens[0]), *rest["tokens"]],
        "token_logprobs": [None, *rest["token_logprobs"]],
        "top_logprobs": [None, *rest["top_logprobs"]],
        "text_offset": offsets,
    }


def prompt_offsets(tokenizer: TextTokenizer, tokens: Sequence[int], *, skip_special_tokens: bool) -> list[int]:
    """Count the characters of text before each token."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    offsets, position = [], 0
    for token in tokens:
        offsets.append(position)
        position += len(detokenizer.push(token))
    return offsets


def join_logprobs(first: LegacyLogprobs, second: LegacyLogprobs, shift: int) -> LegacyLogprobs:
    """Append `second` to `first`, its offsets moved by `shift` characters."""
    return {
        "tokens": first["tokens"] + second["tokens"],
        "token_logprobs": first["token_logprobs"] + second["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + second["top_logprobs"],
        "text_offset": first["text_offset"] + [offset + shift for offset in second["text_offset"]],
    }


def choice_ending(tokenizer: TextTokenizer, piece: Piece, *, with_ids: bool) -> ChoiceEnding:
    """Return the end of a choice, which is the same at both endpoints."""
    ending: ChoiceEnding = {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
    if with_ids:
        ending["token_ids"] = list(piece.tokens)
    if piece.steps:
        ending["trace"] = trace_steps(tokenizer, piece.steps)
    return ending


def chat_logprobs(tokenizer: TextTokenizer, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    return {"content": [_chat_entry(tokenizer, entry) for entry in entries], "refusal": None}


def trace_steps(tokenizer: TextTokenizer, steps: Sequence[TracedStep]) -> list[TraceStep]:
    """Say where each step's tokens came from, and which drafted tokens were rejected."""
    traces: list[TraceStep] = []
    for step in steps:
        tokens: list[TracedToken] = [
            {"token_id": token, "text": tokenizer.name_of(token), "kind": _kind(step.trace, position)}
            for position, token in enumerate(step.tokens)
        ]
        trace: TraceStep = {
            "source": step.trace.source,
            "tokens": tokens[: step.num_shown],
            "rejected": list(step.trace.drafted[step.trace.num_accepted :]),
        }
        if step.num_shown < len(tokens):
            trace["cut"] = tokens[step.num_shown :]
        traces.append(trace)
    return traces


def _kind(trace: StepTrace, position: int) -> TokenKind:
    if position < trace.num_accepted:
        return "drafted"
    if not trace.drafted:
        return "plain"
    return "recovered" if trace.num_accepted < len(trace.drafted) else "bonus"


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def _top(tokenizer: TextTokenizer, entry: TokenLogprobs) -> dict[str, float]:
    top: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        top.setdefault(tokenizer.name_of(token), _finite(logprob))  # of two tokens with one text the better counts
    return top


def _chat_token(tokenizer: TextTokenizer, token: int, logprob: float) -> TopLogprob:
    data = tokenizer.bytes_of(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _chat_entry(tokenizer: TextTokenizer, entry: TokenLogprobs) -> TokenLogprob:
    base = _chat_token(tokenizer, entry.token, entry.logprob)
    top = [_chat_token(tokenizer, token, logprob) for token, logprob in entry.top]
    return {"token": base["token"], "logprob": base["logprob"], "bytes": base["bytes"], "top_logprobs": top}


def read_calls(parser: ToolCallParser, piece: Piece) -> tuple[Piece, ToolText]:
    """Return the piece, and its text as content and calls.

    The piece ends with `tool_calls` if there are calls and all of them are whole.
    """
    read = parser.push(piece.text)
    if piece.finish_reason is not None:
        last = parser.finish()
        read = ToolText(read.content + last.content, read.calls + last.calls)
        if parser.has_only_whole_calls and piece.finish_reason == "stop":
            piece = replace(piece, finish_reason="tool_calls")
    return piece, read


def whole_calls(fragments: Sequence[CallFragment]) -> list[ToolCallBody]:
    """Join the fragments of all calls."""
    calls: list[ToolCallBody] = []
    for fragment in fragments:
        if fragment.name is not None:
            calls.append({"id": _call_id(), "type": "function", "function": {"name": fragment.name, "arguments": ""}})
        calls[fragment.index]["function"]["arguments"] += fragment.arguments
    return calls


def call_deltas(fragments: Sequence[CallFragment]) -> list[ToolCallDelta]:
    """Return one entry per call: its name, and the arguments that came with it or after it."""
    deltas: dict[int, ToolCallDelta] = {}
    for fragment in fragments:
        if fragment.name is not None:
            deltas[fragment.index] = {
                "index": fragment.index,
                "id": _call_id(),
                "type": "function",
                "function": {"name": fragment.name, "arguments": ""},
            }
        delta = deltas.setdefault(fragment.index, {"index": fragment.index, "function": {"arguments": ""}})
        delta["function"]["arguments"] += fragment.arguments
    return list(deltas.values())


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
