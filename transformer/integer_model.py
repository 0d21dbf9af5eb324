"""A quantised transformer on the CPU: the face of `transformer.model.Transformer`, with integer products throughout.

Every pass takes the same kernels, whatever its number of rows. So verification and prompts in any pieces give what
plain decoding gives, to the last bit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transformer.attention import RowBatch
from transformer.checkpoint import load_weights
from transformer.compiled_layers import common_arrays, joined, ragged_rows
from transformer.config import TransformerConfig
from transformer.integer_kernels import (
    STAGES,
    IntegerArrays,
    IntegerWorkspace,
    plan_attention,
    run_integer_layers,
    run_product,
)
from transformer.integer_product import BLOCK, LANES, RECORD, integer_kernels
from transformer.kernels import rows_fit
from transformer.layer import folded_norm
from transformer.panel_attention import PANELS_AT_ONCE, QUERIES_AT_ONCE
from transformer.panel_cache import PanelCache
from transformer.quantised import QuantisedMatrix, QuantisedWeight
from transformer.rotary import interleave, rotary_table
from transformer.sharing import Helpers
from transformer.weights import weight_shapes

Weight = Tensor | QuantisedWeight


class IntegerTransformer:
    """Quantised weights in memory, shared by all sequences. Stateless: the cache holds the sequences."""

    device = torch.device("cpu")
    dtype = torch.float32
    is_compiled = True

    def __init__(
        self,
        config: TransformerConfig,
        weights: dict[str, Weight],
        num_threads: int | None = None,
        variant: str | None = None,
    ) -> None:
        """Take over `weights` (named as `weight_shapes` names them), and empty the dictionary.

        Matrices that are not quantised are rounded to 8 bit. num_threads: by default, one per processor. variant: of
        `transformer.integer_dots`, by default the fastest. Raises ValueError if the kernels do not suit the model.
        """
        if not suits_integers(config):
            raise ValueError("The integer kernels do not suit the sizes of this model.")
        self.config = config
        self._kernels = integer_kernels(variant)
        self._helpers = Helpers(num_threads)
        with torch.inference_mode():
            embedding = quantised(weights.pop("model.embed_tokens.weight"))
            self._embedding = QuantisedMatrix(embedding, self._kernels)
            self._head = self._embedding
            if not config.tie_word_embeddings:
                self._head = QuantisedMatrix(quantised(weights.pop("lm_head.weight")), self._kernels)
            self._layers = [self._take_layer(weights, f"model.layers.{i}") for i in range(config.num_layers)]
            self._arrays = self._make_arrays(folded_norm(as_tensor(weights.pop("model.norm.weight"))))
            self._head_address = address(self._head)
            self._rotations = rotary_table(config, config.max_positions)

    @classmethod
    def load(
        cls, folder: Path, num_threads: int | None = None, progress: Callable[[float], None] | None = None
    ) -> Self:
        """Load a Hugging Face folder, and round its matrices to 8 bit. Raises CheckpointError or ValueError."""
        config = TransformerConfig.from_folder(folder)
        weights: dict[str, Weight] = {**load_weights(folder, config, "cpu", torch.float32, progress)}
        return cls(config, weights, num_threads)

    @property
    def num_bytes(self) -> int:
        """Memory of the matrices."""
        matrices = {id(m): m for layer in self._layers for m in layer.matrices}
        matrices |= {id(m): m for m in (self._embedding, self._head)}
        return sum(matrix.num_bytes for matrix in matrices.values())

    def new_cache(self, slots: int, length: int) -> PanelCache:
        """Return a cache for `slots` sequences of up to `length` tokens."""
        if length > len(self._rotations):
            self._rotations = rotary_table(self.config, length)
        sizes = self.config.num_layers, slots, self.config.num_key_value_heads, length, self.config.head_dim
        return PanelCache(*sizes)

    @torch.inference_mode()
    def forward(self, rows: RowBatch, cache: PanelCache) -> Tensor:
        """Write all rows' keys and values into the cache; return [rows, hidden], the states after the final norm.

        Raises IndexError if rows or cache do not fit.
        """
        config, num_rows = self.config, len(rows.tokens)
        hidden = self._embedding.lookup(rows.tokens.numpy())
        places = ragged_rows(rows)
        rotations = torch.view_as_real(self._rotations).view(len(self._rotations), -1).numpy()
        shape = config.num_layers, cache.num_slots, config.num_key_value_heads, cache.length, config.head_dim
        fitting = cache.values.shape == shape
        if not fitting or not rows_fit(places, num_rows, len(rotations), cache.num_slots, cache.length):
            raise IndexError(f"rows that do not fit the cache of {cache.num_slots} slots of {cache.length} positions")
        group = config.num_heads // config.num_key_value_heads
        items = plan_attention(places, max(1, 2 * QUERIES_AT_ONCE // group), config.num_key_value_heads)
        work = self._workspace(num_rows, int(places.limits.max()))
        stages = STAGES * config.num_layers + 1
        arguments = hidden, places, items, self._arrays, rotations, cache.keys, cache.values, work
        self._helpers.run(run_integer_layers, stages, *arguments)
        return torch.from_numpy(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, num_tokens: int | None = None) -> Tensor:
        """Return the logits of hidden states [n, hidden]: float32 [n, vocabulary], or of the first `num_tokens` ids."""
        width = self.config.vocabulary_size if num_tokens is None else num_tokens
        out = np.empty((len(hidden), -(-width // LANES) * LANES), np.float32)
        records = np.empty(len(hidden) * self._head.num_blocks * RECORD, np.int32)
        rows = hidden.contiguous().numpy()
        if len(rows):
            self._helpers.run(run_product, 2, rows, self._arrays.kernels, self._head_address, records, out)
        return torch.from_numpy(out)[:, :width].contiguous()

    def _workspace(self, num_rows: int, num_positions: int) -> IntegerWorkspace:
        config, threads = self.config, self._helpers.num_threads
        heads, head_dim = config.num_heads, config.head_dim
        widest = max(config.hidden_size, heads * head_dim, config.intermediate_size)
        at_once = LANES * PANELS_AT_ONCE
        padded = -(-num_positions // at_once) * at_once
        return IntegerWorkspace(
            np.empty(num_rows * widest // BLOCK * RECORD, np.int32),
            np.empty((num_rows, (heads + 2 * config.num_key_value_heads) * head_dim), np.float32),
            np.empty((num_rows, config.hidden_size), np.float32),
            np.empty((num_rows, heads * head_dim), np.float32),
            np.empty((num_rows, 2 * config.intermediate_size), np.float32),
            np.empty((num_rows, config.intermediate_size), np.float32),
            np.empty((threads, QUERIES_AT_ONCE, head_dim), np.float32),
            np.empty((threads, QUERIES_AT_ONCE, padded), np.float32),
            np.empty((threads, QUERIES_AT_ONCE), np.float32),
            np.empty((threads, QUERIES_AT_ONCE, head_dim), np.float32),
        )

    def _take_layer(self, weights: dict[str, Weight], name: str) -> "IntegerLayer":
        config = self.config

        def take(part: str) -> Weight:
            return weights.pop(f"{name}.{part}")

        def vector(part: str) -> Tensor:
            return as_tensor(take(part))

        def matrix(*parts: QuantisedWeight) -> QuantisedMatrix:
            return QuantisedMatrix(QuantisedWeight.joined(parts), self._kernels)

        def in_pairs(weight: QuantisedWeight) -> QuantisedWeight:
            order = torch.arange(weight.shape[0])
            return weight.reordered(interleave(order, config.head_dim).numpy())

        query, key, value = (quantised(take(f"self_attn.{part}_proj.weight")) for part in "qkv")
        bias = norm = None
        if config.attention_bias:
            query_bias, key_bias, value_bias = (vector(f"self_attn.{part}_proj.bias") for part in "qkv")
            parts = interleave(query_bias, config.head_dim), interleave(key_bias, config.head_dim), value_bias
            bias = torch.cat(parts)
        if config.query_key_norm:
            query_norm, key_norm = (interleave(vector(f"self_attn.{p}_norm.weight"), config.head_dim) for p in "qk")
            counts = config.num_heads, config.num_key_value_heads
            norm = torch.cat([w.expand(n, -1) for w, n in zip((query_norm, key_norm), counts, strict=True)])
        gate, up = (quantised(take(f"mlp.{part}_proj.weight")) for part in ("gate", "up"))
        return IntegerLayer(
            matrices=(
                matrix(in_pairs(query), in_pairs(key), value),
                matrix(quantised(take("self_attn.o_proj.weight"))),
                matrix(gate, up),
                matrix(quantised(take("mlp.down_proj.weight"))),
            ),
            norms=torch.stack(
                [folded_norm(vector("input_layernorm.weight")), folded_norm(vector("post_attention_layernorm.weight"))]
            ),
            qkv_bias=bias,
            query_key_norm=norm,
            output_bias=vector("self_attn.o_proj.bias") if config.output_bias else None,
        )

    def _make_arrays(self, final_norm: Tensor) -> IntegerArrays:
        config, layers = self.config, self._layers
        return IntegerArrays(
            kernels=np.array(self._kernels.addresses),
            panels=np.stack([np.stack([address(matrix) for matrix in layer.matrices]) for layer in layers]),
            norms=joined([layer.norms for layer in layers], 3),
            **common_arrays(config, layers, final_norm),
        )


class IntegerLayer(NamedTuple):
    """The weights of one layer."""

    matrices: tuple[QuantisedMatrix, QuantisedMatrix, QuantisedMatrix, QuantisedMatrix]  # q/k/v, output, gate/up, down
    norms: Tensor  # [2, hidden] before attention and before the gates
    qkv_bias: Tensor | None
    query_key_norm: Tensor | None  # [heads + kv_heads, head_dim]
    output_bias: Tensor | None


def suits_integers(config: TransformerConfig) -> bool:
    """Return whether the integer kernels can run the model: all sizes are multiples of their blocks."""
    inputs = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    is_plain = config.attention == "causal" and not config.target_hidden_size and not config.takes_hints
    return is_plain and config.head_dim % LANES == 0 and all(size % BLOCK == 0 for size in inputs)


def address(matrix: QuantisedMatrix) -> NDArray[np.int64]:
    """Return what kernels need of a matrix: the addresses of panels and scales, and the bits."""
    return np.array([matrix.panels.ctypes.data, matrix.scales.ctypes.data, matrix.bits], np.int64)


def quantised(weight: Weight) -> QuantisedWeight:
    """Return a matrix, rounded to 8 bit if need be."""
    return weight if isinstance(weight, QuantisedWeight) else QuantisedWeight.from_floats(weight.float().numpy())


def as_tensor(weight: Weight) -> Tensor:
    """Return a vector's values."""
    return torch.from_numpy(weight.floats()) if isinstance(weight, QuantisedWeight) else weight.float()


class StoredWeights(Protocol):
    """A file with quantised weights, by the hub's names."""

    def raw_blocks(self, name: str) -> tuple[str, NDArray[np.uint8]]:
        """Return the kind of a matrix, as GGUF calls it, and its rows as stored: [outputs, bytes of a row]."""

    def dequantize(self, name: str) -> NDArray[np.float32]:
        """Return the values of a weight."""


def quantised_weights(
    config: TransformerConfig, stored: StoredWeights, progress: Callable[[float], None] | None = None
) -> dict[str, Weight]:
    """Read every weight of `weight_shapes`: matrices as integers, in the file's own blocks where they are kept."""
    weights: dict[str, Weight] = {}
    names = weight_shapes(config)
    for name, shape in names.items():
        if len(shape) == 1:
            weights[name] = torch.from_numpy(np.array(stored.dequantize(name), np.float32))
        else:
            known = QuantisedWeight.from_blocks(*stored.raw_blocks(name))
            weights[name] = known or QuantisedWeight.from_floats(stored.dequantize(name))
        if progress is not None:
            progress(len(weights) / len(names))
    return weights
