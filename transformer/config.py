"""The configuration of a transformer, read from a Hugging Face folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from transformer.families import (
    Architecture,
    AttentionPattern,
    Family,
    as_ids,
    find_family,
    in_our_words,
    read_diffusion,
)
from transformer.folder import CheckpointError, read_json
from transformer.gguf_model import GgufModel

__all__ = ["CheckpointError", "RotaryScaling", "TransformerConfig", "read_json"]


@dataclass(frozen=True, slots=True)
class RotaryScaling:
    """Scaling of the rotary frequencies for contexts beyond the first training."""

    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0  # this and the next two: llama3 only
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Sizes and switches of a Llama-like transformer. The last group is for diffusion models only."""

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

    mask_token_ids: tuple[int, ...] = ()  # id of the j-th mask of a block, or one id for every mask
    logits_shifted: bool = False  # the row of position i predicts position i + 1, as in causal models
    attention: AttentionPattern = "causal"
    logits_temperature: float = 1.0  # temperature of the target's distribution that the logits were trained on
    target_hidden_size: int = 0  # width of the target's hidden states that are added to the embeddings; 0: none are
    takes_hints: bool = False  # masks also get the free draft's tokens at their own place and at the next
    block_size: int = 0  # tokens; "block" and "block_causal" only
    trained_positions: int = 0  # tokens that the model was trained on, if it accepts more; 0: max_positions
    family: Family | None = None  # None: weights have Llama's names

    @property
    def max_trained_tokens(self) -> int:
        """Length in tokens of the longest text that the model was trained on."""
        return min(self.trained_positions or self.max_positions, self.max_positions)

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Read the configuration of a folder or of a GGUF file. Raises CheckpointError."""
        return cls.from_gguf(checkpoint) if checkpoint.is_file() else cls.from_folder(checkpoint)

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json, and the end tokens from generation_config.json. Raises CheckpointError."""
        path = folder / "config.json"
        raw = read_json(path)
        family = find_family(path, raw)
        raw = in_our_words(path, raw, family)
        generation_path = folder / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else {}
        return cls._from_fields(path, raw, family, generation.get("eos_token_id", raw.get("eos_token_id")))

    @classmethod
    def from_gguf(cls, path: Path) -> Self:
        """Read the metadata of a GGUF file. Raises CheckpointError."""
        model = GgufModel.open(path)
        raw = model.config_fields()
        return cls._from_fields(path, raw, model.family, raw["eos_token_id"])

    @classmethod
    def _from_fields(cls, path: Path, raw: Mapping[str, Any], family: Family, end_tokens: Any) -> Self:
        """Build it from config.json's fields. `path` is the file that errors name."""
        refuse_unsupported(path, raw)
        architecture = family.architecture
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
                family=family,
                **read_diffusion(path, raw, family),
            )
        except KeyError as error:
            raise CheckpointError(f"{path}: the field {error} is missing.") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: a field has a value of the wrong kind ({error}).") from None
        config.check(path)
        return config

    def check(self, path: Path) -> None:
        """Raise CheckpointError if sizes cannot fit together."""
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
        if self.attention in ("block", "block_causal") and self.block_size < 1:
            raise CheckpointError(f"{path}: {self.attention} attention needs a block_size of at least 1.")


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
    """Return base and scaling of the rotary positions, in the format of transformers 5 or of older versions."""
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
