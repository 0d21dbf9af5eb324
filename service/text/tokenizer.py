"""A checkpoint's tokenizer: text to ids, ids to bytes, and the chat template."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from service.text.token_bytes import UnsupportedDecoderError, token_bytes

ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # our name -> the name in a GGUF file


class TokenizerError(Exception):
    """The folder holds no usable tokenizer; the message is one clear sentence."""


class ChatTemplateError(Exception):
    """The checkpoint has no chat template, or it refuses these messages."""


class TextTokenizer:
    """Encodes, decodes and renders chats. Any thread may call it: nothing keeps state between calls."""

    def __init__(self, loaded: Any, end_token_ids: Sequence[int]) -> None:
        """Wrap a fast tokenizer of transformers; `end_token_ids` end a text. Raises UnsupportedDecoderError."""
        self._loaded = loaded
        self.end_token_ids = tuple(end_token_ids)
        self._backend: Tokenizer = loaded.backend_tokenizer
        self._bytes = token_bytes(self._backend)
        self.special_ids = frozenset(
            index for index, token in self._backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def read(cls, checkpoint: Path, end_token_ids: Sequence[int]) -> "TextTokenizer":
        """Read the tokenizer of a folder or of a GGUF file. Raises TokenizerError or CheckpointError."""
        read = cls.from_gguf if checkpoint.is_file() else cls.from_folder
        return read(checkpoint, end_token_ids)

    @classmethod
    def from_gguf(cls, path: Path, end_token_ids: Sequence[int]) -> "TextTokenizer":
        """Build the tokenizer that a GGUF file describes. Raises TokenizerError or CheckpointError."""
        from transformers import PreTrainedTokenizerFast

        from service.text.gguf_tokenizer import Vocabulary

        vocabulary = Vocabulary.of(path)
        roles = {f"{name}_token": vocabulary.role(short) for name, short in ROLES.items()}
        try:
            loaded = PreTrainedTokenizerFast(
                tokenizer_object=vocabulary.build(),
                chat_template=vocabulary.chat_template(),
                clean_up_tokenization_spaces=False,
                **{name: token for name, token in roles.items() if token is not None},
            )
        except Exception as error:  # tokenizers raises bare exceptions
            raise TokenizerError(f"no usable tokenizer in {path}: {error}") from None
        return cls(loaded, end_token_ids)

    @classmethod
    def from_folder(cls, folder: Path, end_token_ids: Sequence[int]) -> "TextTokenizer":
        """Read tokenizer.json as it is, never running code from the checkpoint. Raises TokenizerError."""
        # Not AutoTokenizer: it imports torch and every model's configuration, which takes seconds, to choose a class
        # that would read the same file. Imported here since even this takes a second.
        from transformers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").is_file():
            raise TokenizerError(f"{folder} holds no tokenizer.json")
        try:
            loaded = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
            return cls(loaded, end_token_ids)
        except UnsupportedDecoderError as error:
            raise TokenizerError(f"the tokenizer in {folder} is not supported: {error}") from None
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise TokenizerError(f"no usable tokenizer in {folder}: {error}") from None

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template, as transformers and vLLM read them."""
        self._loaded.save_pretrained(str(folder))
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # older versions' name
        path.write_text(json.dumps(config, indent=2) + "\n")

    def to_json(self) -> str:
        """Return the content of a tokenizer.json."""
        return self._backend.to_str()

    @property
    def size(self) -> int:
        """Number of ids the tokenizer knows; the target's logits may be wider."""
        return len(self._bytes)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of `text`; with `add_special_tokens` after the begin-of-text token, if there is one."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        pieces = (self.bytes_of(token) for token in tokens if not (skip_special_tokens and token in self.special_ids))
        return b"".join(pieces).decode("utf-8", "replace")

    def special_ids_of(self, texts: Collection[str]) -> frozenset[int]:
        """Return the special tokens whose texts are among `texts`."""
        return frozenset(token for token in self.special_ids if self.bytes_of(token).decode() in texts)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token adds to the text; none for ids that only pad the logits."""
        return self._bytes[token] if token < len(self._bytes) else b""

    def name_of(self, token: int) -> str:
        """Name a token in the legacy `logprobs`: by its text, or as `bytes:\\xe2\\x82` if it is no whole text."""
        data = self.bytes_of(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Write the prompt for the assistant's next turn, by the checkpoint's own template in transformers' sandbox.

        Raises ChatTemplateError.
        """
        if not self._loaded.chat_template:
            raise ChatTemplateError("this model has no chat template; use /v1/completions")
        try:
            text: str = self._loaded.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template may raise anything: it is a program of the checkpoint's author
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from None
        return text

    @property
    def kind(self) -> str:
        """The tokenizer's model, such as `BPE`."""
        return str(json.loads(self._backend.to_str())["model"].get("type", "unknown"))

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by role, such as `eos_token`."""
        return {role: str(token) for role, token in self._loaded.special_tokens_map.items()}

    @property
    def tool_template(self) -> str:
        """The chat template for conversations with tools; empty if there is none."""
        template = self._loaded.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default")
        return template or ""

    @property
    def chat_template(self) -> str | None:
        template = self._loaded.chat_template
        return template if isinstance(template, str) else None
