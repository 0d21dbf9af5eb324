"""One choice of one request: from the engine's token deltas to pieces that may be shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from service.engine.base import SpeculationStats, StepTrace, TokenDelta
from service.text.detokenizer import IncrementalDetokenizer, StopMatcher
from service.text.tokenizer import TextTokenizer
from verifiers.base import TokenLogprobs


@dataclass(frozen=True, slots=True)
class TextRules:
    """A request's wishes for its text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    kept_special_tokens: frozenset[int] = frozenset()  # they mark where a tool call begins and ends
    min_tokens: int = 0  # stop strings do not count in the text of so many first tokens


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One engine step as a client may see it."""

    tokens: tuple[int, ...]
    trace: StepTrace
    num_shown: int  # a stop string cut off the others


@dataclass(frozen=True, slots=True)
class Piece:
    """The addition of one delta to one choice."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    offsets: tuple[int, ...] = ()  # characters of output before each token
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop string, or the request's own stop token
    steps: tuple[TracedStep, ...] = ()  # only if a trace was asked for

    @classmethod
    def join(cls, pieces: Sequence[Self]) -> Self:
        """Join a choice's pieces, in order."""
        last = pieces[-1]
        return cls(
            text="".join(piece.text for piece in pieces),
            tokens=tuple(token for piece in pieces for token in piece.tokens),
            logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
            offsets=tuple(offset for piece in pieces for offset in piece.offsets),
            prompt_logprobs=tuple(entry for piece in pieces for entry in piece.prompt_logprobs),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            steps=tuple(step for piece in pieces for step in piece.steps),
        )


class Choice:
    """Puts one sequence's text together, and counts its tokens."""

    def __init__(self, tokenizer: TextTokenizer, rules: TextRules) -> None:
        self._end_token_ids = frozenset(tokenizer.end_token_ids)
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=rules.skip_special_tokens, kept=rules.kept_special_tokens
        )
        self._matcher = StopMatcher(rules.stops, include=rules.include_stop)
        self._rules = rules
        self._num_characters = 0  # detokenized so far, shown or held back
        self.num_tokens = 0
        self.num_cached_prompt_tokens = 0
        self.finish_reason: str | None = None
        self.stats = SpeculationStats()

    def push(self, delta: TokenDelta) -> Piece:
        """Take in a delta. After a piece with a finish reason no more may come."""
        if delta.stats is not None:
            self.stats = delta.stats
        self.num_cached_prompt_tokens = max(self.num_cached_prompt_tokens, delta.num_cached_prompt_tokens)
        texts: list[str] = []
        offsets: list[int] = []
        stop: str | None = None
        for position, token in enumerate(delta.tokens):
            offsets.append(self._num_characters)
            self.num_tokens += 1
            is_hidden = delta.stop_token == token and position == len(delta.tokens) - 1 and not self._rules.include_stop
            text, stop = self._show("" if is_hidden else self._detokenizer.push(token))
            texts.append(text)
            if stop is not None:
                break
        finish_reason: str | None = delta.finish_reason
        if stop is None and finish_reason is not None:
            rest, stop = self._show(self._detokenizer.finish())
            texts += (rest, self._matcher.release())
        if stop is not None:
            finish_reason = "stop"
        self.finish_reason = finish_reason
        return Piece(
            text="".join(texts),
            tokens=delta.tokens[: len(offsets)],
            logprobs=delta.logprobs[: len(offsets)],
            offsets=tuple(offsets),
            prompt_logprobs=delta.prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop if stop is not None else self._own_stop_token(delta),
            steps=() if delta.trace is None else (TracedStep(delta.tokens, delta.trace, len(offsets)),),
        )

    def _show(self, text: str) -> tuple[str, str | None]:
        """Take in text. Return what may be shown now, and the stop string that the text completed."""
        self._num_characters += len(text)
        if self.num_tokens <= self._rules.min_tokens:
            return self._matcher.release(text), None
        matched = self._matcher.push(text)
        return matched.text, matched.stop

    def _own_stop_token(self, delta: TokenDelta) -> int | None:
        return None if delta.stop_token in self._end_token_ids else delta.stop_token
