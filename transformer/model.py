"""A Llama-like transformer over a key-value cache: ragged rows in, hidden states out.

Written for small batches on a CPU, where a step costs the memory traffic of its weights plus the overhead of every
call. So projections of the same input are one matrix, norm weights are folded into the matrix that follows, and matrix
products add residuals themselves. Few rows of a small model go through all layers in one compiled call
(`transformer.compiled_layers`); prompts, large models and GPUs run layer by layer in torch.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import silu

from transformer.attention import Attention, RowBatch
from transformer.cache import KeyValueCache
from transformer.checkpoint import CheckpointError, load_weights
from transformer.compiled_layers import CompiledLayers
from transformer.config import TransformerConfig
from transformer.layer import Layer, folded_norm, take_layer
from transformer.matrix import Matrix
from transformer.rotary import rotary_table

__all__ = ["CheckpointError", "RowBatch", "Transformer"]


class Transformer:
    """Weights on one device, in one dtype. Stateless: the cache holds the sequences."""

    def __init__(self, config: TransformerConfig, weights: dict[str, Tensor], by_layer: bool = False) -> None:
        """Take over `weights` (named as `load_weights` returns them), and empty the dictionary.

        by_layer: never use the compiled call, for comparison.
        """
        self.config = config
        with torch.inference_mode():
            self._embedding = weights.pop("model.embed_tokens.weight")
            head = self._embedding if config.tie_word_embeddings else weights.pop("lm_head.weight")
            # On the CPU, a transposed copy of a tied head is worth its memory.
            self._head = Matrix(head.t().contiguous() if head.device.type == "cpu" else head.t())
            self._target_projection: Matrix | None = None
            if config.target_hidden_size:
                self._target_projection = Matrix(weights.pop("model.target_projection.weight").t().contiguous())
            self._hints: Tensor | None = None  # [2, vocabulary + 1, hidden] added for a hint; the last row is zero
            if config.takes_hints:
                gated = self._embedding * weights.pop("model.hint_gates").unsqueeze(1)
                self._hints = torch.nn.functional.pad(gated, (0, 0, 0, 1))
            self._final_norm = folded_norm(weights.pop("model.norm.weight")).to(self.dtype)
            self._layers = [take_layer(config, weights, f"model.layers.{i}") for i in range(config.num_layers)]
            possible = CompiledLayers.where_possible(config, self._layers, self._final_norm)
            self._compiled = None if by_layer else possible
            self._rotations = rotary_table(config, config.max_positions).to(self.device)
            self._epsilon = torch.tensor(math.sqrt(config.hidden_size * config.rms_norm_eps), device=self.device)

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: Callable[[float], None] | None = None,
    ) -> Self:
        """Load a Hugging Face folder or a GGUF file. `progress` gets the loaded fraction. Raises CheckpointError."""
        config = TransformerConfig.read(folder)
        return cls(config, load_weights(folder, config, device, dtype, progress))

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def is_compiled(self) -> bool:
        """True if passes with few rows are one compiled call."""
        return self._compiled is not None

    def new_cache(self, slots: int, length: int) -> KeyValueCache:
        """Return a cache for `slots` sequences of up to `length` tokens."""
        if length > len(self._rotations):
            self._rotations = rotary_table(self.config, length).to(self.device)
        sizes = self.config.num_layers, slots, self.config.num_key_value_heads, length, self.config.head_dim
        return KeyValueCache(*sizes, device=self.device, dtype=self.dtype)

    @torch.inference_mode()
    def forward(
        self,
        rows: RowBatch,
        cache: KeyValueCache,
        target_states: Tensor | None = None,
        hints: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Write all rows' keys and values into the cache; return [rows, hidden], the states after the final norm.

        target_states: [first rows, target hidden], at most as many as rows, added to the embeddings; zeros where they
        are unknown. hints: two tensors [rows], the free draft's tokens at each row's place and at the next; the
        vocabulary's size where there is none.
        """
        hidden = self._embedding.index_select(0, rows.tokens)
        if target_states is not None and self._target_projection is not None:
            known = hidden[: len(target_states)]
            known.copy_(self._target_projection.add_product(known, target_states))
        if hints is not None and self._hints is not None:
            hidden = hidden.add_(self._hints[0].index_select(0, hints[0])).add_(
                self._hints[1].index_select(0, hints[1])
            )
        if self._compiled is not None and self._compiled.takes(rows):
            return self._compiled.run(hidden, rows, cache, self._rotations)
        attention = Attention(rows, cache, self.config.num_heads // self.config.num_key_value_heads)
        rotations = self._rotations[attention.positions]
        for index, layer in enumerate(self._layers):
            hidden = self._attend(hidden, index, layer, attention, rotations)
            gate, up = layer.gate_up.multiply(self._normalized(hidden)).chunk(2, dim=-1)
            hidden = layer.down.add_product(hidden, silu(gate).mul_(up))
        return self._normalized(hidden) * self._final_norm

    @torch.inference_mode()
    def logits(self, hidden: Tensor, num_tokens: int | None = None) -> Tensor:
        """Return the logits of hidden states [n, hidden]: float32 [n, vocabulary], or of the first `num_tokens` ids."""
        width = self.config.vocabulary_size if num_tokens is None else num_tokens
        return self._head.multiply_first(hidden, width).float()

    def _attend(self, hidden: Tensor, index: int, layer: Layer, attention: Attention, rotations: Tensor) -> Tensor:
        normalized = self._normalized(hidden)
        qkv = layer.qkv.multiply(normalized, layer.qkv_bias)
        num_heads, num_shared = self.config.num_heads, self.config.num_key_value_heads
        heads = qkv.view(len(qkv), -1, self.config.head_dim)
        turned = heads[:, : num_heads + num_shared]
        if layer.query_key_norm is not None:
            turned.copy_(self._normalized_heads(turned) * layer.query_key_norm)
        rotate(turned, rotations)
        attention.write(index, heads[:, num_heads:])
        attended = attention.attend(index, heads[:, :num_heads])
        hidden = layer.output.add_product(hidden, attended)
        return hidden if layer.output_bias is None else hidden + layer.output_bias

    def _normalized(self, hidden: Tensor) -> Tensor:
        """Return `hidden` [rows, hidden] divided by its length. The next matrix holds the rest of the norm.

        hypot adds epsilon to the length, so the norm takes three calls. (On a CPU with one row, torch.rms_norm takes
        three times as long.)
        """
        length: Tensor = vector_norm(hidden, 2, -1, True, dtype=torch.float32).hypot_(self._epsilon)
        return (hidden / length).to(hidden.dtype)

    def _normalized_heads(self, heads: Tensor) -> Tensor:
        """Return `heads` [rows, heads, head_dim] divided by each head's root mean square."""
        return torch.rms_norm(heads, heads.shape[-1:], eps=self.config.rms_norm_eps)


def rotate(heads: Tensor, rotations: Tensor) -> None:
    """Turn `heads` [rows, heads, head_dim] in place by `rotations` complex64 [rows, 1, head_dim / 2]."""
    pairs = heads.view(*heads.shape[:-1], -1, 2)
    if heads.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(rotations)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * rotations))
