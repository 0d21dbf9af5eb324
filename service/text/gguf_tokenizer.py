"""Build the tokenizer that a GGUF file describes: vocabulary, merges, and the name of its way to split words.

Texts get the tokens that the model was trained on, which are those of its tokenizer on the hub. llama.cpp's differ in
one respect: it never normalises Qwen's text to NFC.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from transformer.folder import CheckpointError
from transformer.gguf_model import CONTROL, USER_DEFINED, GgufModel

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # the names in a file
NORMAL, UNKNOWN = 1, 2  # types of tokens, besides those of `transformer.gguf_model`
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Splitting:
    """A way to split text into the pieces that merges stay within."""

    pattern: str | None = None  # None: GPT-2's
    single_digits: bool = False  # split off every digit first
    whole_words: bool = False  # a piece that is a token needs no merges
    begins: bool = False  # the begin-of-text token is added unless the file says otherwise
    composes: bool = False  # normalise to NFC


SPLITTINGS = {
    "gpt-2": Splitting(),
    "smollm": Splitting(single_digits=True),
    "starcoder": Splitting(single_digits=True),
    "refact": Splitting(single_digits=True),
    "codeshell": Splitting(single_digits=True),
    "command-r": Splitting(single_digits=True),
    "llama3": Splitting(LLAMA3, whole_words=True, begins=True),
    "llama-v3": Splitting(LLAMA3, whole_words=True, begins=True),
    "llama-bpe": Splitting(LLAMA3, whole_words=True, begins=True),
    "falcon3": Splitting(LLAMA3, whole_words=True, begins=True),
    "smaug-bpe": Splitting(LLAMA3),
    "tekken": Splitting(TEKKEN, whole_words=True, begins=True),
    "qwen2": Splitting(QWEN2, composes=True),
    "deepseek-r1-qwen": Splitting(QWEN2, composes=True),
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A file's tokens by id, their types, and the metadata around them."""

    path: Path
    tokens: Sequence[str]
    types: Sequence[int]
    metadata: Mapping[str, Any]  # without the prefix `tokenizer.`

    @classmethod
    def of(cls, path: Path) -> "Vocabulary":
        """Read it from the header, and check that `build` will work. Raises CheckpointError."""
        model = GgufModel.open(path)
        metadata = {
            key.removeprefix("tokenizer."): value
            for key, value in model.file.metadata.items()
            if key.startswith("tokenizer.")
        }
        tokens = model.tokens()
        types = metadata.get("ggml.token_type", ())[: len(tokens)]
        vocabulary = cls(path, tokens, types or [NORMAL] * len(tokens), metadata)
        vocabulary.check()
        return vocabulary

    def check(self) -> None:
        """Raise CheckpointError unless it is of a supported kind and whole."""
        kind, splitting = self.metadata.get("ggml.model"), self.metadata.get("ggml.pre")
        if not self.tokens:
            raise CheckpointError(f"{self.path} has no tokenizer.")
        if kind not in (BYTE_LEVEL, SENTENCEPIECE):
            known = f"{BYTE_LEVEL} and {SENTENCEPIECE}"
            raise CheckpointError(f"{self.path}: the tokenizer {kind!r} is not supported; known are {known}.")
        if kind == BYTE_LEVEL and splitting not in SPLITTINGS:
            raise CheckpointError(
                f"{self.path}: the pre-tokenizer {splitting!r} is not supported; known are {', '.join(SPLITTINGS)}."
            )
        lists = {"tokens": self.tokens, "merges": self.metadata.get("ggml.merges", [])}
        for name, entries in lists.items():
            if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                raise CheckpointError(f"{self.path}: tokenizer.ggml.{name} is no list of strings.")
        scores = self.metadata.get("ggml.scores", ())
        is_whole = len(self.types) == len(self.tokens) and (kind == BYTE_LEVEL or len(scores) >= len(self.tokens))
        if not is_whole:
            raise CheckpointError(f"{self.path}: the tokenizer has fewer types or scores than tokens.")
        if kind == BYTE_LEVEL and not lists["merges"] and len(self.tokens) > 256 + len(self._of_type(CONTROL)):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.merges is missing.")

    def role(self, name: str) -> str | None:
        """Return the token of a role, such as `bos`; None if there is none."""
        index = self.metadata.get(f"ggml.{name}_token_id")
        is_known = isinstance(index, int) and 0 <= index < len(self.tokens)
        return self.tokens[index] if is_known and index is not None else None

    def chat_template(self) -> str | dict[str, str] | None:
        """Return the chat template, or several by name with the usual one as `default`."""
        usual, prefix = self.metadata.get("chat_template"), "chat_template."
        named = {key.removeprefix(prefix): text for key, text in self.metadata.items() if key.startswith(prefix)}
        if not named:
            return usual
        return named if usual is None else {"default": usual} | named

    def build(self) -> Tokenizer:
        """Build the tokenizer. Raises ValueError if its parts contradict each other."""
        is_byte_level = self.metadata["ggml.model"] == BYTE_LEVEL
        tokenizer = self._byte_level() if is_byte_level else self._sentencepiece()
        special = [CONTROL] if is_byte_level else [CONTROL, UNKNOWN]
        tokenizer.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in self._of_type(*special)]
        )
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self._of_type(USER_DEFINED)])
        self._add_ends(tokenizer, begins=not is_byte_level or SPLITTINGS[self.metadata["ggml.pre"]].begins)
        return tokenizer

    def _of_type(self, *types: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]

    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def _byte_level(self) -> Tokenizer:
        splitting = SPLITTINGS[self.metadata["ggml.pre"]]
        merges = [_halves(merge) for merge in self.metadata.get("ggml.merges", ())]
        tokenizer = Tokenizer(models.BPE(vocab=self._ids(), merges=merges, ignore_merges=splitting.whole_words))
        if splitting.composes:
            tokenizer.normalizer = normalizers.NFC()
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
        if splitting.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(splitting.pattern), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        unknown = next(iter(self._of_type(UNKNOWN)), None)
        model = models.BPE(
            vocab=self._ids(), merges=self._scored_merges(), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
        tokenizer = Tokenizer(model)
        spaces: list[Any] = [normalizers.Replace(" ", "▁")]
        back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.metadata.get("ggml.add_space_prefix", True):
            spaces.insert(0, normalizers.Prepend("▁"))
            back.append(decoders.Strip(" ", 1, 0))
        tokenizer.normalizer = normalizers.Sequence(spaces)
        tokenizer.decoder = decoders.Sequence(back)
        return tokenizer

    def _scored_merges(self) -> list[tuple[str, str]]:
        """Return the merges that give the tokens with the highest scores first, as sentencepiece does."""
        scores = self.metadata["ggml.scores"]
        known = {token for token, kind in zip(self.tokens, self.types, strict=True) if kind == NORMAL}
        merges = [
            (-scores[index], cut, token)
            for index, token in enumerate(self.tokens)
            if token in known
            for cut in range(1, len(token))
            if token[:cut] in known and token[cut:] in known
        ]
        return [(token[:cut], token[cut:]) for _, cut, token in sorted(merges)]

    def _add_ends(self, tokenizer: Tokenizer, begins: bool) -> None:
        """Let the tokenizer add the begin-of-text token or the end token, where the file asks for it."""
        begin, end = self.role("bos"), self.role("eos")
        before = [begin] if begin is not None and self.metadata.get("ggml.add_bos_token", begins) else []
        after = [end] if end is not None and self.metadata.get("ggml.add_eos_token", False) else []
        if before or after:
            pairs = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)]
            tokenizer.post_processor = processors.TemplateProcessing([*before, "$A", *after], special_tokens=pairs)


def _halves(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
