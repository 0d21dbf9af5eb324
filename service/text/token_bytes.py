"""Finds the bytes of every token, so that text can be put together exactly, token by token."""

import json
from typing import Any

from tokenizers import Tokenizer


class UnsupportedDecoderError(Exception):
    """The tokenizer has a decoder whose tokens have no bytes of their own."""


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes by token id, for byte-level vocabularies (Llama 3, Qwen) and sentencepiece ones (Llama 2).

    Joined and decoded as UTF-8 with replacement, they give what the tokenizer's own decoder gives, except that a
    sentencepiece decoder also drops the space before the very first word. Raises UnsupportedDecoderError.
    """
    added = tokenizer.get_added_tokens_decoder()
    names = _decoder_names(json.loads(tokenizer.to_str())["decoder"])
    if "ByteLevel" in names:
        convert = _from_byte_level
    elif names & {"Metaspace", "ByteFallback", "Replace"}:
        convert = _from_sentencepiece
    else:
        raise UnsupportedDecoderError(f"its decoder {sorted(names) or 'is missing'}, ByteLevel or Metaspace is needed")
    table = []
    for index in range(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1):
        token = tokenizer.id_to_token(index)
        if token is None:  # a hole in the vocabulary
            table.append(b"")
        elif index in added and added[index].special:
            table.append(token.encode())
        else:
            table.append(convert(token))
    return table


def _decoder_names(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    names = {decoder["type"]}
    for inner in decoder.get("decoders", ()):
        names |= _decoder_names(inner)
    return names


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable character for each byte: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if chr(byte) not in alphabet)
    alphabet |= {chr(0x100 + offset): byte for offset, byte in enumerate(hidden)}
    return alphabet


_ALPHABET = _byte_alphabet()


def _from_byte_level(token: str) -> bytes:
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode()  # an added token, kept as it is written


def _from_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
