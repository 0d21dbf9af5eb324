"""Output that keeps to a structure: JSON, a regular expression, a grammar or a choice. llguidance does the work.

A structure is compiled once and kept in a bounded cache. Bounds on the compiler's work, not on seconds, limit its time
and memory. Each sequence has a state of its own, which says which tokens may come next. The verifier asks it for every
row, so that the text is that of plain constrained decoding. The drafter asks it so that no draft is in vain.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

StructureKind = Literal["json_schema", "regex", "grammar", "choice"]

WHITESPACE = r"( |\n[ \t]{0,16})?"  # in JSON; without a bound, a weak model never stops indenting
LIMITS = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 500_000,  # some 10 ms
    "step_lexer_fuel": 100_000,  # some 7 ms
    "step_max_items": 20_000,
    "max_lexer_states": 50_000,  # 1 to 2 kB each
    "max_grammar_size": 100_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


class StructureError(Exception):
    """The structure cannot be used. The message says why, in words for the client."""


@dataclass(frozen=True, slots=True)
class StructureSpec:
    """A structure in the client's words."""

    kind: StructureKind
    definition: str  # a JSON schema, a regular expression, a Lark or GBNF grammar, or a JSON list of texts


class Structure:
    """A compiled structure; any number of sequences may start from it, in any thread."""

    def __init__(self, spec: StructureSpec, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self.spec = spec
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def start(self) -> "StructureState":
        """Return the state of an output that has not begun."""
        with self._lock:
            return StructureState(self._matcher.deep_copy(), self._tokenizer)


class StructureState:
    """Follows one output and says what may come next. For one thread at a time."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher = matcher
        self._end_tokens = frozenset(tokenizer.eos_tokens)
        self._num_tokens = tokenizer.vocab_size

    @property
    def error(self) -> str:
        """Reason that nothing may come next: a step took more work than the limits allow. Else empty."""
        return "The structure is too complex to be followed." if self._matcher.is_error() else ""

    def masks(self, draft: Sequence[int]) -> NDArray[np.bool_]:
        """Return `[len(draft) + 1, tokens]`: what may follow the output and the draft before each row.

        Rows after a draft token that is forbidden, or that ends the text, allow everything. Nothing comes of them: the
        forbidden token is rejected, and what follows the end is cut off.
        """
        bits = [self._bits()]
        num_consumed = 0
        for token in self._text_of(draft):
            if self._matcher.try_consume_tokens([token]) != 1:
                break
            num_consumed += 1
            bits.append(self._bits())
        self._matcher.rollback(num_consumed)
        known = np.unpackbits(np.array(bits), axis=1, bitorder="little").astype(bool)
        masks = np.ones((len(draft) + 1, known.shape[1]), dtype=bool)
        masks[: len(known)] = known
        return masks

    def next_allowed(self, draft: Sequence[int]) -> NDArray[np.bool_] | None:
        """Return `[tokens]`: what may follow the output and `draft`; None if that is forbidden or ends the text."""
        text = self._text_of(draft)
        if len(text) < len(draft):
            return None
        num_consumed = self._matcher.try_consume_tokens(text)
        bits = self._bits() if num_consumed == len(draft) else None
        self._matcher.rollback(num_consumed)
        return None if bits is None else np.unpackbits(bits, bitorder="little").astype(bool)

    def complete(self, draft: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Return the allowed beginning of a draft, and the tokens that the structure forces after it."""
        text = self._text_of(draft)
        num_consumed = self._matcher.try_consume_tokens(text)
        following: Sequence[int] = ()
        if num_consumed < len(text) or len(text) == len(draft):
            following = self._matcher.compute_ff_tokens()
        elif draft[len(text)] in self._end_tokens and self._matcher.is_accepting():
            following = [draft[len(text)]]
        self._matcher.rollback(num_consumed)
        return (*text[:num_consumed], *following)[:max_tokens]

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in committed tokens, without one that ends the text."""
        self._matcher.consume_tokens(list(tokens))

    def _text_of(self, draft: Sequence[int]) -> list[int]:
        """Return the tokens before the first that ends the text or that the tokenizer does not know."""
        is_text = [token < self._num_tokens and token not in self._end_tokens for token in draft]
        return list(draft[: is_text.index(False)]) if False in is_text else list(draft)

    def _bits(self) -> NDArray[np.uint8]:
        """Return the mask of the current state, one bit a token; nothing is allowed after an error."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.zeros_like(bits) if self._matcher.is_error() else bits


class StructureCompiler:
    """Compiles structures for one tokenizer, one at a time in a thread of its own, and keeps the latest."""

    def __init__(self, load_tokenizer: Callable[[], str], end_tokens: Sequence[int], cache_size: int) -> None:
        """load_tokenizer: returns the tokenizer.json, called for the first structure.

        end_tokens: end a text. Once the structure is complete, only these are allowed. cache_size: structures kept.
        """
        self._load_tokenizer = load_tokenizer
        self._end_tokens = tuple(end_tokens)
        self._cache_size = cache_size
        self._cache: OrderedDict[StructureSpec, Structure] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="structures")

    def find(self, spec: StructureSpec) -> Structure | None:
        """Return the structure if it was compiled before and is still kept."""
        with self._lock:
            known = self._cache.get(spec)
            if known is not None:
                self._cache.move_to_end(spec)
            return known

    def close(self) -> None:
        """Stop compiling."""
        self.executor.shutdown(wait=False, cancel_futures=True)

    def compile(self, spec: StructureSpec) -> Structure:
        """Compile, which blocks: mostly for milliseconds, at worst for seconds. Raises StructureError.

        The bounds count the work of lexer and parser. Schemas are unfolded before that: ten `anyOf`s under an `allOf`
        have 1,024 combinations and took 1.3 s.
        """
        known = self.find(spec)
        if known is not None:
            return known
        structure = Structure(spec, *self._matcher(spec))
        with self._lock:
            self._cache[spec] = structure
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return structure

    def _matcher(self, spec: StructureSpec) -> tuple[LLMatcher, LLTokenizer]:
        if not self._end_tokens:
            raise StructureError("this model has no token that ends a text, which structured output needs")
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(self._load_tokenizer(), eos_token=list(self._end_tokens))
        try:
            grammar = _grammar(spec)
        except ValueError as error:
            raise StructureError(_first_line(str(error))) from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))  # type: ignore[arg-type]
        matcher.compute_bitmask()  # so that the first step's work counts, too
        if matcher.is_error():
            raise StructureError(_first_line(matcher.get_error()))
        return matcher, self._tokenizer


def _grammar(spec: StructureSpec) -> str:
    """Raises ValueError."""
    if spec.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(spec.definition, overrides={"whitespace_pattern": WHITESPACE})
    if spec.kind == "choice":
        texts = json.loads(spec.definition)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in texts))
    return llguidance.grammar_from(spec.kind, spec.definition)


def _first_line(message: str) -> str:
    """Shorten an error of the library to its first line; the others quote the structure."""
    return " ".join(message.split("\n")[0].split())[:300].rstrip(" .:") or "it cannot be compiled"
