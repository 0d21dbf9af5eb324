"""What a Hugging Face folder says about its transformer, in this project's words."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

Architecture = Literal["llama", "qwen2", "qwen3"]
AttentionPattern = Literal["causal", "block", "full"]

ARCHITECTURES: Mapping[str, Architecture] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "Dream": "qwen2"}
"""Architectures by the checkpoint's `model_type`."""


class CheckpointError(Exception):
    """A model folder that cannot be used; the message says what is wrong with which file."""


@dataclass(frozen=True, slots=True)
class RotaryScaling:
    """How rotary frequencies are stretched beyond the context of the first training."""

    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0  # llama3 only, like the two below
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Sizes and switches of a Llama-like transformer; the last group is for diffusion models only."""

    architecture: Architecture
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_positions: int
    tie_word_embeddings: bool
    attention_bias: bool  # of q, k and v
    query_key_norm: bool
    end_token_ids: tuple[int, ...]
    output_bias: bool = False  # of the attention's output
    rotary_scaling: RotaryScaling = RotaryScaling()

    mask_token_ids: tuple[int, ...] = ()  # the j-th mask of a block; a single id is used for every mask
    logits_shifted: bool = False  # the row of position i predicts position i + 1, as in causal models
    attention: AttentionPattern = "causal"
    block_size: int = 0  # tokens; "block" only
    logits_temperature: float = 1.0  # of the target's distribution that the logits were trained to give
    target_hidden_size: int = 0  # width of the target's hidden states that join the embeddings; 0: none do

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json, and the end tokens from generation_config.json. Raises CheckpointError."""
        path = folder / "config.json"
        raw = read_json(path)
        architecture = ARCHITECTURES.get(str(raw.get("model_type")))
        if architecture is None:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"{path}: model_type {raw.get('model_type')!r} is not supported; known are {known}.")
        refuse_unsupported(path, raw)
        generation_path = folder / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else {}
        end_tokens = generation.get("eos_token_id", raw.get("eos_token_id"))
        bias = bool(raw.get("attention_bias", False))
        theta, scaling = read_rotary(path, raw)
        try:
            num_heads, hidden_size = int(raw["num_attention_heads"]), int(raw["hidden_size"])
            config = cls(
                architecture=architecture,
                vocabulary_size=int(raw["vocab_size"]),
                hidden_size=hidden_size,
                intermediate_size=int(raw["intermediate_size"]),
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=num_heads,
                num_key_value_heads=int(raw.get("num_key_value_heads") or num_heads),
                head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
                rope_theta=theta,
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                max_positions=int(raw["max_position_embeddings"]),
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                attention_bias=architecture == "qwen2" or bias,
                query_key_norm=architecture == "qwen3",
                end_token_ids=as_ids(end_tokens),
                output_bias=architecture != "qwen2" and bias,
                rotary_scaling=scaling,
                **read_diffusion(raw),
            )
        except KeyError as error:
            raise CheckpointError(f"{path}: the field {error} is missing.") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: a field has a value of the wrong kind ({error}).") from None
        config.check(path)
        return config

    def check(self, path: Path) -> None:
        """Raise CheckpointError where sizes cannot fit together."""
        sizes = ("vocabulary_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "head_dim")
        for name in (*sizes, "num_key_value_heads", "max_positions"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{path}: {name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_key_value_heads:
            heads = f"{self.num_heads} attention heads and {self.num_key_value_heads} key-value heads"
            raise CheckpointError(f"{path}: {heads} cannot be grouped evenly.")
        if self.head_dim % 2:
            raise CheckpointError(f"{path}: head_dim is {self.head_dim}; rotary positions need an even one.")
        if any(not 0 <= token < self.vocabulary_size for token in self.mask_token_ids):
            raise CheckpointError(f"{path}: mask_token_ids must lie within the vocabulary of {self.vocabulary_size}.")
        if self.attention == "block" and self.block_size < 1:
            raise CheckpointError(f"{path}: block attention needs a block_size of at least 1.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError if it is missing or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content


def refuse_unsupported(path: Path, raw: Mapping[str, Any]) -> None:
    """Raise CheckpointError for features that would change the result if they were ignored."""
    if raw.get("quantization_config"):
        raise CheckpointError(f"{path}: quantized checkpoints are not supported; use the float or bfloat16 one.")
    if raw.get("mlp_bias"):
        raise CheckpointError(f"{path}: mlp_bias is not supported.")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'.")
    windowed = any(kind != "full_attention" for kind in raw.get("layer_types") or ())
    if raw.get("use_sliding_window") or windowed:
        raise CheckpointError(f"{path}: sliding-window attention is not supported.")


def read_rotary(path: Path, raw: Mapping[str, Any]) -> tuple[float, RotaryScaling]:
    """Base and scaling of the rotary positions, as transformers 5 or older versions write them."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    if float(parameters.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError(f"{path}: partial rotary positions are not supported.")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, RotaryScaling()
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"{path}: rope type {kind!r} is not supported; known are default, linear and llama3.")
    try:
        factor = float(parameters["factor"])
        if kind == "linear":
            return theta, RotaryScaling("linear", factor)
        scaling = RotaryScaling(
            "llama3",
            factor,
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: rope type {kind!r} needs the field {error}.") from None
    return theta, scaling


def read_diffusion(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of diffusion models; empty for a plain causal model.

    Dream's own configuration names one mask token and implies the rest.
    """
    masks = as_ids(raw.get("mask_token_ids", raw.get("mask_token_id")))
    if not masks:
        return {}
    pattern = raw.get("attention", "full")
    if pattern not in ("causal", "block", "full"):
        raise ValueError(f"attention {pattern!r} is none of causal, block, full")
    return {
        "mask_token_ids": masks,
        "logits_shifted": bool(raw.get("logits_shifted", raw["model_type"] == "Dream")),
        "attention": cast(AttentionPattern, pattern),
        "block_size": int(raw.get("block_size", 0)),
        "logits_temperature": float(raw.get("logits_temperature", 1.0)),
        "target_hidden_size": int(raw.get("target_hidden_size", 0)),
    }


def as_ids(value: Any) -> tuple[int, ...]:
    """Token ids from what JSON holds: nothing, one id or a list."""
    if value is None:
        return ()
    return tuple(int(token) for token in value) if isinstance(value, list) else (int(value),)
