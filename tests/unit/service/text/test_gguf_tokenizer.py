"""Tokenizers of GGUF files give the tokens that the tokenizer they were made from gives, on awkward text."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from service.text.gguf_tokenizer import LLAMA3, QWEN2, Vocabulary
from service.text.tokenizer import TextTokenizer
from tests.checkpoints import CHAT_TEMPLATE
from tests.gguf_files import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, gguf_of
from transformer.config import CheckpointError

SPECIAL, ADDED = ("<|im_start|>", "<|im_end|>"), "<think>"
TEXTS = (
    "def f(x1234):\n\treturn  12 + 3.5  # half",
    "  leading and trailing  ",
    "\n\n\n   \r\n\t",
    "1,234,567.89 and 2026-11-28",
    "😀 👩‍👩‍👧‍👦 🇫🇷 ½ ①2③ ٣٤",
    "中文1和 日本語 नमस्ते Привет é e\u0301",
    "don't I'LL WE'VE o'clock",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|> <think> x</think> <|im_",
    "\x00\x01\x7f",
    "a" * 40 + " " * 17 + "x",
    "",
)
Change = Callable[[dict[str, Any]], None]


def corpus() -> list[str]:
    return [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))] + list(TEXTS)


def trained(steps: Sequence[Any], normalizer: Any = None) -> Tokenizer:
    """Train a small byte-level tokenizer that splits in these steps, with special tokens after the plain ones."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(ADDED, normalized=False)])
    return tokenizer


def write_byte_level(path: Path, tokenizer: Tokenizer, splitting: str, change: Change = lambda metadata: None) -> None:
    content, _ = gguf_of()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    types = [CONTROL if token in SPECIAL else USER_DEFINED if token == ADDED else NORMAL for token in tokens]
    content.metadata |= {
        "tokenizer.ggml.pre": splitting,
        "tokenizer.ggml.tokens": [*tokens, "[PAD]"],
        "tokenizer.ggml.token_type": [*types, UNUSED],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": tokens.index(SPECIAL[0]),
        "tokenizer.ggml.eos_token_id": tokens.index(SPECIAL[1]),
        "tokenizer.ggml.padding_token_id": tokens.index(SPECIAL[1]),
    }
    change(content.metadata)
    content.write(path)


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
ORIGINALS = {  # as in the tokenizer.json of models on the hub
    "gpt-2": ([GPT2], None),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), GPT2], None),
    "llama-bpe": ([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTE_LEVEL], None),
    "qwen2": ([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTE_LEVEL], normalizers.NFC()),
}


@pytest.mark.parametrize("splitting", ORIGINALS)
def test_byte_level_files_give_the_originals_tokens(tmp_path: Path, splitting: str) -> None:
    original = trained(*ORIGINALS[splitting])
    write_byte_level(tmp_path / "model.gguf", original, splitting)
    ours = TextTokenizer.read(tmp_path / "model.gguf", ())
    assert ours.size == original.get_vocab_size()  # without the unused one that fills up the end
    for text in [*TEXTS, *corpus()[:2]]:
        tokens = ours.encode(text, add_special_tokens=False)
        assert tokens == original.encode(text, add_special_tokens=False).ids
        kept = text if splitting != "qwen2" else normalizers.NFC().normalize_str(text)
        assert ours.decode(tokens, skip_special_tokens=False) == kept


def test_special_tokens_in_text_are_found_and_added_ones_are_text(tmp_path: Path) -> None:
    original = trained(*ORIGINALS["smollm"])
    write_byte_level(tmp_path / "model.gguf", original, "smollm")
    ours = TextTokenizer.read(tmp_path / "model.gguf", ())
    tokens = ours.encode("<|im_start|>a<think>b<|im_end|>", add_special_tokens=False)
    assert len(tokens) == 5
    assert ours.special_ids == {original.token_to_id(token) for token in SPECIAL}
    assert ours.decode(tokens, skip_special_tokens=True) == "a<think>b"


@pytest.mark.parametrize(("splitting", "flag", "begins"), [
    ("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False),
])  # fmt: skip
def test_the_begin_of_text_is_added_as_the_file_says(
    tmp_path: Path, splitting: str, flag: bool | None, begins: bool
) -> None:
    def change(metadata: dict[str, Any]) -> None:
        del metadata["tokenizer.ggml.add_bos_token"]
        if flag is not None:
            metadata["tokenizer.ggml.add_bos_token"] = flag

    original = trained(*ORIGINALS[splitting])
    write_byte_level(tmp_path / "model.gguf", original, splitting, change)
    ours = TextTokenizer.read(tmp_path / "model.gguf", ())
    plain, whole = (ours.encode("hi", add_special_tokens=added) for added in (False, True))
    assert whole == ([original.token_to_id(SPECIAL[0])] if begins else []) + plain


def test_a_saved_tokenizer_is_the_same_for_transformers(tmp_path: Path) -> None:
    original = trained(*ORIGINALS["qwen2"])
    write_byte_level(tmp_path / "model.gguf", original, "qwen2")
    ours = TextTokenizer.read(tmp_path / "model.gguf", ())
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode(text, add_special_tokens=True)
    assert (theirs.bos_token, theirs.eos_token, theirs.chat_template) == (*SPECIAL, CHAT_TEMPLATE)
    again = TextTokenizer.from_folder(tmp_path, ())
    assert again.special_ids == ours.special_ids


def test_several_chat_templates_are_kept_by_name(tmp_path: Path) -> None:
    content, _ = gguf_of()
    content.metadata["tokenizer.chat_template.tool_use"] = "tools"
    content.write(tmp_path / "model.gguf")
    tokenizer = TextTokenizer.read(tmp_path / "model.gguf", ())
    assert tokenizer.tool_template == "tools"
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "<user>hi\n<assistant>".replace("\n", "")


PIECES = ("▁", "a", "b", "c", "ab", "▁a", "bc", "abc", "▁ab", "ca", "▁▁", "é", "▁abc")
SCORES = (0.0, -9.0, -8.0, -7.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.5, -9.5, -0.5)


def write_sentencepiece(path: Path, **metadata: Any) -> list[str]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    content, _ = gguf_of()
    content.metadata = {key: value for key, value in content.metadata.items() if not key.startswith("tokenizer.")}
    content.metadata |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(SCORES),
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(PIECES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    content.write(path)
    return tokens


def merged_by_score(text: str) -> list[str]:
    """Tokenize as sentencepiece does: join the two neighbours whose token has the highest score, until none is left."""
    scores, parts = dict(zip(PIECES, SCORES, strict=True)), list(text)
    while True:
        joins = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not joins:
            break
        _, place = min(joins)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [byte for part in parts for byte in ([part] if part in scores else spelled(part))]


def spelled(character: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in character.encode()]


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("abc  é😀\n"), min_size=1, max_size=24))
def test_sentencepiece_files_merge_by_score(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "sentencepiece.gguf"
    if not path.exists():
        write_sentencepiece(path)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    ours = TextTokenizer.read(path, ())
    found = ours.encode(text, add_special_tokens=True)
    assert [tokens[index] for index in found] == ["<s>", *merged_by_score("▁" + text.replace(" ", "▁"))]
    assert ours.decode(found, skip_special_tokens=True) == " " + text


def test_a_sentencepiece_file_may_add_no_space(tmp_path: Path) -> None:
    tokens = write_sentencepiece(tmp_path / "model.gguf", add_space_prefix=False, add_bos_token=False)
    ours = TextTokenizer.read(tmp_path / "model.gguf", ())
    assert ours.encode("ab", add_special_tokens=True) == [tokens.index("ab")]
    assert ours.encode("a</s>b", add_special_tokens=True) == [tokens.index("a"), 2, tokens.index("b")]


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "t5"}, "the tokenizer 't5' is not supported; known are gpt2 and llama"),
    "splitting": ({"pre": "viking"}, "the pre-tokenizer 'viking' is not supported; known are gpt-2"),
    "types": ({"token_type": [1, 1]}, "fewer types or scores than tokens"),
    "scores": ({"model": "llama"}, "fewer types or scores than tokens"),
    "tokens": ({"tokens": [1, 2], "token_type": [1, 1]}, "tokenizer.ggml.tokens is no list of strings"),
}


@pytest.mark.parametrize(("changes", "sentence"), UNFIT.values(), ids=UNFIT.keys())
def test_unfit_tokenizers_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    content, _ = gguf_of()
    content.metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    content.write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=sentence):
        Vocabulary.of(tmp_path / "model.gguf")


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    content, _ = gguf_of()
    content.metadata = {key: value for key, value in content.metadata.items() if not key.startswith("tokenizer.")}
    content.write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Vocabulary.of(tmp_path / "model.gguf")
