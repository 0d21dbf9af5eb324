"""The model in a GGUF file: config.json's fields from its metadata, and its weights in the order of the hub's.

llama.cpp reorders the rows of q and k of `llama` files, so that a rotation's two rows lie next to each other. Here they
are put back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from transformer.families import Architecture, Family
from transformer.folder import CheckpointError
from transformer.gguf import GgufFile

KEYS = (
    ("model.embed_tokens.", "token_embd."),
    ("model.norm.", "output_norm."),
    ("lm_head.", "output."),
    ("model.layers.", "blk."),
    ("self_attn.q_proj.", "attn_q."),
    ("self_attn.k_proj.", "attn_k."),
    ("self_attn.v_proj.", "attn_v."),
    ("self_attn.o_proj.", "attn_output."),
    ("self_attn.q_norm.", "attn_q_norm."),
    ("self_attn.k_norm.", "attn_k_norm."),
    ("mlp.gate_proj.", "ffn_gate."),
    ("mlp.up_proj.", "ffn_up."),
    ("mlp.down_proj.", "ffn_down."),
    ("input_layernorm.", "attn_norm."),
    ("post_attention_layernorm.", "ffn_norm."),
)
ARCHITECTURES: Mapping[str, Architecture] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
MODEL_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROTARY_FACTORS = "rope_freqs.weight"  # Llama 3.1's stretching, one factor for each rotation
ORIGINAL_POSITIONS = 8192  # Llama 3's, before the stretching; no file states it
CHANGING = {  # metadata that would change the result if it were ignored, after the architecture's name
    "expert_count": "mixtures of experts",
    "attention.sliding_window": "sliding-window attention",
    "attention.scale": "a scale of attention",
    "attention.clamp_kqv": "clamped queries and keys",
    "logit_scale": "a scale of logits",
    "residual_scale": "a scale of residuals",
    "embedding_scale": "a scale of embeddings",
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens
END_NAMES = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>")
)
"""Control tokens that end a turn. A file names one end token, and a chat may end with another."""


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A file whose architecture this transformer runs."""

    file: GgufFile
    architecture: Architecture

    @classmethod
    def open(cls, path: Path) -> "GgufModel":
        """Read the header. Raises CheckpointError if the file is damaged or its model is not supported."""
        file = GgufFile.open(path)
        kind = file.metadata.get("general.architecture")
        architecture = ARCHITECTURES.get(str(kind))
        if architecture is None:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"{path}: the architecture {kind!r} is not supported; known are {known}.")
        if file.metadata.get("general.type", "model") != "model":
            raise CheckpointError(f"{path} holds no model, but {file.metadata['general.type']!r}.")
        model = cls(file, architecture)
        for key, what in CHANGING.items():
            if model._get(key):
                raise CheckpointError(f"{path}: {what} ({architecture}.{key}) is not supported.")
        return model

    @property
    def family(self) -> Family:
        """The names of its weights."""
        return Family(self.architecture, self.architecture, keys=KEYS)

    def raw_blocks(self, name: str) -> tuple[str, npt.NDArray[np.uint8]]:
        """Return the type of the matrix `name` (the hub's) and its rows as stored: [rows, bytes of a row]."""
        stored = self.family.stored_name(name)
        blocks = self.file.raw_blocks(stored)
        order = self._row_order(stored)
        return self.file.tensors[stored].type.name, blocks if order is None else blocks[order]

    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """Return the values of the weight `name` (the hub's)."""
        stored = self.family.stored_name(name)
        values, order = self.file.dequantize(stored), self._row_order(stored)
        return values if order is None else values[order]

    def config_fields(self) -> dict[str, Any]:
        """Return the content of the model's config.json. Raises CheckpointError if metadata are missing or wrong."""
        path, tensors = self.file.path, self.file.tensors
        if "token_embd.weight" not in tensors:
            raise CheckpointError(f"{path}: the tensor token_embd.weight is missing.")
        hidden, heads = self._size("embedding_length"), self._size("attention.head_count")
        if not heads:
            raise CheckpointError(f"{path}: {self.architecture}.attention.head_count is 0.")
        layers = self._size("block_count")
        if layers and f"blk.{layers - 1}.attn_norm.weight" not in tensors:
            raise CheckpointError(
                f"{path}: of {layers} layers, the tensor blk.{layers - 1}.attn_norm.weight is missing."
            )
        head_dim = self._size("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._size(key, head_dim) != head_dim:
                length = f"{self.architecture}.{key} is {self._size(key)}, and heads are {head_dim} wide"
                raise CheckpointError(f"{path}: {length}; both must be the same.")
        theta = self._decimal("rope.freq_base", 10_000.0)
        fields: dict[str, Any] = {
            "architectures": [MODEL_CLASSES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self._decimal("attention.layer_norm_rms_epsilon", 1e-6),
            "max_position_embeddings": self._size("context_length"),
            "rope_theta": theta,
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "bos_token_id": self.file.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.end_token_ids(),
        }
        scaling = self._rotary_scaling(head_dim, theta)
        return fields if scaling is None else fields | {"rope_scaling": scaling}

    def end_token_ids(self) -> list[int]:
        """Return the ids that end a text: the end token first, then those that end a turn in a chat."""
        get = self.file.metadata.get
        named = (get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        types = get("tokenizer.ggml.token_type", ())
        looking_so = (
            index
            for index, (token, kind) in enumerate(zip(get("tokenizer.ggml.tokens", ()), types, strict=False))
            if kind == CONTROL and token in END_NAMES
        )
        return list(dict.fromkeys([index for index in named if index is not None] + list(looking_so)))

    def tokens(self) -> list[str]:
        """Return the tokenizer's tokens in order of their ids, without the unused ones that fill up the end."""
        tokens = list(self.file.metadata.get("tokenizer.ggml.tokens", ()))
        types = list(self.file.metadata.get("tokenizer.ggml.token_type", ()))
        if len(types) == len(tokens):
            while tokens and types[len(tokens) - 1] == UNUSED:
                tokens.pop()
        return tokens

    def _get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._get(key)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]  # one number for every layer
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            problem = "is missing" if value is None else f"is {value!r}, and one whole number is needed"
            raise CheckpointError(f"{self.file.path}: {self.architecture}.{key} {problem}.")
        return value

    def _decimal(self, key: str, default: float) -> float:
        """Return a number as it was before it became a float32: 1e-05, not 9.999999747378752e-06."""
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, int | float):
            raise CheckpointError(f"{self.file.path}: {self.architecture}.{key} is {value!r}, and a number is needed.")
        return float(str(np.float32(value)))

    def _rotary_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        kind = self._get("rope.scaling.type") or "none"
        if ROTARY_FACTORS in self.file.tensors:
            return self._llama3_scaling(head_dim, theta)
        if kind == "none" or (kind == "linear" and self._decimal("rope.scaling.factor", 1.0) in (0.0, 1.0)):
            return None
        return {"rope_type": kind, "factor": self._decimal("rope.scaling.factor", 1.0)}

    def _llama3_scaling(self, head_dim: int, theta: float) -> dict[str, Any]:
        """Return the scaling whose factors the file holds. Raises CheckpointError unless Llama 3's rule gives them."""
        stored = self.file.dequantize(ROTARY_FACTORS).ravel()
        factor = float(stored.max())
        frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        turns = ORIGINAL_POSITIONS * frequencies / (2 * np.pi)
        kept = np.clip((turns - 1) / 3, 0, 1)
        if stored.shape != kept.shape or not np.allclose(stored, 1 / (kept + (1 - kept) / factor), rtol=1e-3):
            raise CheckpointError(f"{self.file.path}: the factors in {ROTARY_FACTORS} are none of Llama 3's.")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_POSITIONS,
        }

    def _row_order(self, stored_name: str) -> npt.NDArray[np.int64] | None:
        """Return the file's row of every row in the hub's order; None if they are the same."""
        if self.architecture != "llama" or not any(part in stored_name for part in (".attn_q.", ".attn_k.")):
            return None
        heads = self._size("attention.head_count")
        head_dim = self._size("attention.key_length", self._size("embedding_length") // heads)
        rows = np.arange(self.file.tensors[stored_name].shape[0])
        return rows.reshape(-1, head_dim // 2, 2).swapaxes(1, 2).ravel()
