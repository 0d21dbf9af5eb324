"""The weights of one layer, in the form that passes use."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transformer.config import TransformerConfig
from transformer.matrix import Matrix
from transformer.rotary import interleave


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer. Matrices are [in, out]; the two norms are folded into `qkv` and `gate_up`."""

    qkv: Matrix  # [hidden, (heads + 2 * kv_heads) * head_dim]
    qkv_bias: Tensor | None
    query_key_norm: Tensor | None  # [heads + kv_heads, head_dim]
    output: Matrix  # [heads * head_dim, hidden]
    output_bias: Tensor | None
    gate_up: Matrix  # [hidden, 2 * intermediate]
    down: Matrix  # [intermediate, hidden]

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        return self.qkv, self.output, self.gate_up, self.down


def folded_norm(weight: Tensor) -> Tensor:
    """Return the factor of a norm that is left after dividing by the length: weight * sqrt(width), float32."""
    return weight.float() * math.sqrt(len(weight))


def take_layer(config: TransformerConfig, weights: dict[str, Tensor], name: str) -> Layer:
    """Move one layer's weights out of `weights`, fused and transposed."""

    def take(part: str) -> Tensor:
        return weights.pop(f"{name}.{part}")

    def fused(norm: str, *matrices: Tensor) -> Matrix:
        folded = torch.cat(matrices).float() * folded_norm(take(f"{norm}.weight"))
        return Matrix(folded.t().to(matrices[0].dtype).contiguous())

    head_dim = config.head_dim
    query, key, value = (take(f"self_attn.{part}_proj.weight") for part in "qkv")
    bias = norm = None
    if config.attention_bias:
        query_bias, key_bias, value_bias = (take(f"self_attn.{part}_proj.bias") for part in "qkv")
        bias = torch.cat([interleave(query_bias, head_dim), interleave(key_bias, head_dim), value_bias])
    if config.query_key_norm:
        query_norm, key_norm = (interleave(take(f"self_attn.{part}_norm.weight"), head_dim) for part in "qk")
        counts = config.num_heads, config.num_key_value_heads
        norm = torch.cat([w.expand(n, -1) for w, n in zip((query_norm, key_norm), counts, strict=True)])
    return Layer(
        qkv=fused("input_layernorm", interleave(query, head_dim), interleave(key, head_dim), value),
        qkv_bias=bias,
        query_key_norm=norm,
        output=Matrix(take("self_attn.o_proj.weight").t().contiguous()),
        output_bias=take("self_attn.o_proj.bias") if config.output_bias else None,
        gate_up=fused("post_attention_layernorm", take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")),
        down=Matrix(take("mlp.down_proj.weight").t().contiguous()),
    )
