"""The tokenizer's edges: folders that hold none, unknown decoders, names of tokens, chat templates."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from service.text.token_bytes import UnsupportedDecoderError
from service.text.tokenizer import ChatTemplateError, TextTokenizer, TokenizerError
from tests.checkpoints import END_TOKEN, write_tokenizer


def test_a_folder_without_a_tokenizer_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        TextTokenizer.from_folder(tmp_path, ())


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(TokenizerError, match="no usable tokenizer"):
        TextTokenizer.from_folder(tmp_path, ())


def test_decoders_without_bytes_are_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedDecoderError, match="ByteLevel"):
        TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), ())


def test_sentencepiece_tokens_have_bytes() -> None:
    vocabulary = {"▁the": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "x": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    text = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), ())
    assert text.decode([0, 1, 2, 3, 4], skip_special_tokens=True) == " the€x" == tokenizer.decode([0, 1, 2, 3, 4])


def test_names_tell_broken_bytes_apart(byte_tokenizer: TextTokenizer) -> None:
    assert byte_tokenizer.name_of(ord("a")) == "a"
    assert byte_tokenizer.name_of(0xE2) == "bytes:\\xe2"
    assert byte_tokenizer.name_of(END_TOKEN) == "<|endoftext|>"
    assert byte_tokenizer.bytes_of(271) == b""  # a padding row of the logits


def test_special_tokens_are_skipped_on_request(byte_tokenizer: TextTokenizer) -> None:
    tokens = [ord("a"), END_TOKEN, ord("b")]
    assert byte_tokenizer.decode(tokens, skip_special_tokens=True) == "ab"
    assert byte_tokenizer.decode(tokens, skip_special_tokens=False) == "a<|endoftext|>b"


def test_the_checkpoints_template_renders_chats(byte_tokenizer: TextTokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert byte_tokenizer.render_chat(messages) == "<user>hi<assistant>"
    assert byte_tokenizer.render_chat(messages, add_generation_prompt=False) == "<user>hi"


def write_template(folder: Path, template: str | None) -> TextTokenizer:
    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template")
    if template is not None:
        config["chat_template"] = template
    path.write_text(json.dumps(config))
    return TextTokenizer.from_folder(folder, ())


def test_without_a_template_chats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match="no chat template"):
        write_template(tmp_path, None).render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[0].content.__class__.__mro__ }}", "{{ 1 / 0 }}"],
)
def test_templates_that_refuse_or_reach_out_of_the_sandbox_are_errors(tmp_path: Path, template: str) -> None:
    with pytest.raises(ChatTemplateError):
        write_template(tmp_path, template).render_chat([{"role": "user", "content": "hi"}])
