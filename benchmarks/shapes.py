"""Models with random weights in the shapes of real ones. The cost of a pass does not depend on the weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from transformer.config import TransformerConfig
from transformer.model import Transformer
from transformer.weights import weight_shapes

SCALE = 0.02  # standard deviation of the weights

_QWEN_7B = TransformerConfig(
    architecture="qwen2",
    vocabulary_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_layers=28,
    num_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    max_positions=32_768,
    tie_word_embeddings=False,
    attention_bias=True,
    query_key_norm=False,
    end_token_ids=(151_645,),
)
_QWEN_06B = replace(
    _QWEN_7B,
    architecture="qwen3",
    vocabulary_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_heads=16,
    num_key_value_heads=8,
    tie_word_embeddings=True,
    attention_bias=False,
    query_key_norm=True,
)
_TINY = replace(
    _QWEN_7B,
    vocabulary_size=4096,
    hidden_size=256,
    intermediate_size=640,
    num_layers=4,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
    end_token_ids=(0,),
)
_MEDIUM = replace(_TINY, hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12, num_key_value_heads=4)

SIZES: Mapping[str, TransformerConfig] = {
    "tiny": _TINY,
    "medium": _MEDIUM,
    "0.6b": _QWEN_06B,
    "1.5b": replace(_QWEN_7B, hidden_size=1536, intermediate_size=8960, num_heads=12, num_key_value_heads=2),
    "7b": _QWEN_7B,
    "14b": replace(
        _QWEN_7B, hidden_size=5120, intermediate_size=13_824, num_layers=48, num_heads=40, num_key_value_heads=8
    ),
}
KINDS: Mapping[str, dict[str, Any]] = {
    "dream": {"attention": "full", "logits_shifted": True, "trained_positions": 0},
    "fast-dllm": {"attention": "block_causal", "logits_shifted": True, "block_size": 32},
    "sdar": {"attention": "block_causal", "logits_shifted": False, "block_size": 4},
    "bd3lm": {"attention": "block_causal", "logits_shifted": False, "block_size": 32},
}


def target_config(size: str) -> TransformerConfig:
    """Return a causal model of that size. Raises KeyError for a size that is not in SIZES."""
    return SIZES[size]


def drafter_config(name: str) -> TransformerConfig:
    """Return a diffusion model by size and kind, such as `7b-dream`. Raises KeyError for an unknown one."""
    size, _, kind = name.partition("-")
    config = SIZES[size]
    return replace(config, mask_token_ids=(config.vocabulary_size - 1,), **KINDS[kind])


def random_model(config: TransformerConfig, device: str, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """Return a model with random weights, drawn on the device itself, one tensor at a time."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {
        name: torch.empty(shape, device=device, dtype=dtype).normal_(0.0, SCALE, generator=generator)
        for name, shape in weight_shapes(config).items()
    }
    for name, weight in weights.items():
        if "norm" in name:
            weight.fill_(1.0)
    return Transformer(config, weights)
