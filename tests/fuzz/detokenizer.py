"""Text pushed token by token equals the decoding of all tokens, in any deltas, with and without stop strings."""

import functools
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from service.api.choice import Choice, Piece, TextRules
from service.engine.base import TokenDelta
from service.text.detokenizer import IncrementalDetokenizer
from service.text.tokenizer import TextTokenizer
from tests.checkpoints import write_tokenizer
from tests.fuzz.reader import ByteReader

SEEDS = [
    bytes([0, 1, 0, 0, 0]) + "naïve 🙂 漢字".encode(),
    bytes([1, 0, 1, 3, 97, 98, 99, 2, 4]) + bytes([3, 200, 150, 4, 9, 97, 98, 99, 0, 1, 2]),
    bytes([2, 1, 0, 0, 3]) + bytes([0, 1, 240, 159, 153, 130, 255]),
]


@functools.cache
def tokenizers() -> tuple[TextTokenizer, ...]:
    """Return three tokenizers: one token per byte, byte-level BPE with merges across characters, byte fallback."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        plain = TextTokenizer.from_folder(Path(folder), (256,))
    alphabet = plain.to_json()
    merged = Tokenizer.from_str(alphabet)
    vocabulary = merged.get_vocab(with_added_tokens=False)
    names = sorted(vocabulary, key=lambda name: vocabulary[name])
    merges = [(names[first], names[second]) for first, second in ((0xC3, 0xA9), (0x61, 0xF0), (0x9F, 0x99), (97, 98))]
    vocabulary |= {first + second: 257 + index for index, (first, second) in enumerate(merges)}
    merged = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    merged.decoder = decoders.ByteLevel()
    merged.add_special_tokens(["<|endoftext|>"])
    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "é": 257, "▁": 258, "b▁c": 259}
    fallback = Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
    fallback.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback.add_special_tokens(["</s>"])
    return (
        plain,
        *(TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=one), (256,)) for one in (merged, fallback)),
    )


def check(data: bytes) -> None:
    reader = ByteReader(data)
    tokenizer, skip, has_stop = reader.pick(tokenizers()), reader.flag(), reader.flag()
    stops = tuple(reader.text(4) or "a" for _ in range(1 + reader.byte() % 3)) if has_stop else ()
    include, min_tokens = reader.flag(), reader.byte() % 8 if has_stop else 0
    sizes = reader.take(6)
    tokens = [token + 200 * (token > 250) - 190 * (token > 252) for token in reader.rest()[:100]]
    incremental = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    joined = "".join(map(incremental.push, tokens)) + incremental.finish()
    assert joined == tokenizer.decode(tokens, skip_special_tokens=skip)
    rules = TextRules(stops, include_stop=include, skip_special_tokens=skip, min_tokens=min_tokens)
    by_token = show(tokenizer, rules, tokens, [1] * len(tokens))
    assert show(tokenizer, rules, tokens, [size % 7 for size in sizes]) == by_token
    assert show(tokenizer, rules, tokens, []) == by_token
    if not stops:
        assert by_token.text == joined


def show(tokenizer: TextTokenizer, rules: TextRules, tokens: list[int], sizes: list[int]) -> Piece:
    """Return what a client sees if the tokens come in deltas of these sizes, and the rest in one."""
    choice, pieces, left = Choice(tokenizer, rules), [], tuple(tokens)
    for size in [*sizes, len(tokens)]:
        delta, left = left[:size], left[size:]
        pieces.append(choice.push(TokenDelta(tokens=delta, finish_reason=None if left else "length")))
        if choice.finish_reason is not None:
            break
    return Piece.join(pieces)
