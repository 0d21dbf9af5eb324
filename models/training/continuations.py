"""The target's own continuations of training text, which the drafter and the n-gram model learn from.

All prompts of a batch have the same length, so the key-value cache has no padding. A batch is written as one file (a
shard); a stopped run continues with the next shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from verifiers.draws import draw

CANDIDATES = 8  # tokens of the target's distribution that are kept per position
ROWS_PER_PASS = 64  # rows of the corpus in one pass


@dataclass(frozen=True)
class ContinuationRecipe:
    """Sizes of the run. A row is a prompt from the corpus and the target's continuation, `length` tokens in all."""

    shards: int = 168
    rows: int = 128  # per shard
    length: int = 288
    min_prompt: int = 32  # tokens
    max_prompt: int = 160
    temperatures: tuple[float, ...] = (0.0, 0.5, 0.8)
    shares: tuple[float, ...] = (0.35, 0.35, 0.30)
    seed: int = 0


@dataclass(frozen=True)
class Continuations:
    """Rows of text, with the target's most probable tokens for each position, given the text before it.

    `tokens` int16 `[rows, length]`; `prompt_lengths` and `temperatures` `[rows]`; `candidates` int16 and
    `log_probabilities` float16 (nats, at temperature 1) `[rows, length, CANDIDATES]`; `features` float16
    `[rows, length, hidden]`, the target's final hidden state that a position was predicted from. The last three are
    zero at position 0. `seeds` uint64 `[rows]`: seed of the noise that a sampled row was drawn with, as in serving
    (`verifiers.draws`), so that drafts can use the same noise.
    """

    tokens: NDArray[np.int16]
    prompt_lengths: NDArray[np.int16]
    temperatures: NDArray[np.float32]
    candidates: NDArray[np.int16]
    log_probabilities: NDArray[np.float16]
    features: NDArray[np.float16]
    seeds: NDArray[np.uint64]

    def save(self, path: Path) -> None:
        new = path.with_suffix(".new.npz")
        np.savez(new, **vars(self))
        new.replace(path)

    @classmethod
    def load(cls, folder: Path) -> "Continuations":
        """Load all shards of `folder`, in order. Raises FileNotFoundError if there are none."""
        paths = sorted(folder.glob("[0-9]*[0-9].npz"))
        if not paths:
            raise FileNotFoundError(f"no continuations in {folder}: run the stage 'continuations' first")
        shards = [np.load(path) for path in paths]
        return cls(**{name: np.concatenate([shard[name] for shard in shards]) for name in cls.__dataclass_fields__})

    def joined(self, other: "Continuations") -> "Continuations":
        """Return the rows of both."""
        return Continuations(
            *(np.concatenate(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def num_generated(self) -> int:
        return int(self.tokens.size - self.prompt_lengths.sum(dtype=np.int64))

    def texts(self) -> Iterator[NDArray[np.int16]]:
        """Yield the generated part of each row."""
        for row, start in zip(self.tokens, self.prompt_lengths, strict=True):
            yield row[start:]


class BatchDecoder:
    """Decode many rows of equal length with a key-value cache, on the weights of a transformers Llama."""

    def __init__(self, model: LlamaForCausalLM, rows: int, length: int) -> None:
        config = model.config
        self._model, self._heads = model, (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self._keys, self._values = torch.empty(shape), torch.empty(shape)
        self._length = 0

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens` `[rows, count]`; return their final hidden states, after the norm.

        After the first call, `count` must be 1.
        """
        rows, count = tokens.shape
        start, end = self._length, self._length + count
        heads, key_value_heads, size = self._heads
        hidden = self._model.model.embed_tokens(tokens)
        cosines, sines = self._model.model.rotary_emb(hidden, torch.arange(start, end)[None])
        for index, layer in enumerate(self._model.model.layers):
            normed, attention = layer.input_layernorm(hidden), layer.self_attn
            queries = attention.q_proj(normed).view(rows, count, heads, size).transpose(1, 2)
            keys = attention.k_proj(normed).view(rows, count, key_value_heads, size).transpose(1, 2)
            values = attention.v_proj(normed).view(rows, count, key_value_heads, size).transpose(1, 2)
            queries, keys = apply_rotary_pos_emb(queries, keys, cosines, sines)
            self._keys[index, :, :, start:end] = keys
            self._values[index, :, :, start:end] = values
            if count > 1:
                context = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            else:  # query heads of a group become rows of their key-value head: no repetition, no mask
                context = F.scaled_dot_product_attention(
                    queries.reshape(rows, key_value_heads, -1, size),
                    self._keys[index, :, :, :end],
                    self._values[index, :, :, :end],
                ).reshape(rows, heads, 1, size)
            hidden = hidden + attention.o_proj(context.transpose(1, 2).reshape(rows, count, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self._length = end
        final: torch.Tensor = self._model.model.norm(hidden)
        return final


@torch.inference_mode()
def continue_prompts(
    model: LlamaForCausalLM, prompts: torch.Tensor, length: int, temperatures: NDArray[np.float32], seed: int
) -> Continuations:
    """Continue `prompts` `[rows, prompt length]` up to `length` tokens in all, each row at its own temperature."""
    rows, prompt_length = prompts.shape
    seeds = np.random.default_rng(seed).integers(2**63, size=rows, dtype=np.uint64)
    row_seeds, is_sampled = seeds.tolist(), torch.from_numpy(temperatures > 0.0)
    divisors = torch.from_numpy(np.maximum(temperatures, 1e-3))[:, None]
    decoder = BatchDecoder(model, rows, length)
    tokens = torch.empty((rows, length), dtype=torch.int64)
    candidates = torch.zeros((rows, length, CANDIDATES), dtype=torch.int16)
    log_probabilities = torch.zeros((rows, length, CANDIDATES), dtype=torch.float16)
    features = torch.zeros((rows, length, model.config.hidden_size), dtype=torch.float16)
    tokens[:, :prompt_length] = prompts
    start, end = 0, prompt_length
    while end < length:
        hidden = decoder.hidden(tokens[:, start:end])
        features[:, start + 1 : end + 1] = hidden.half()
        logits: torch.Tensor = model.lm_head(hidden)
        best, ids = logits.topk(CANDIDATES)
        candidates[:, start + 1 : end + 1] = ids.short()
        log_probabilities[:, start + 1 : end + 1] = (best - logits.logsumexp(-1, keepdim=True)).half()
        drawn = draw((logits[:, -1] / divisors).softmax(-1), row_seeds, [end] * rows)
        tokens[:, end] = torch.where(is_sampled, drawn, ids[:, -1, 0])
        start, end = end, end + 1
    return Continuations(
        tokens.short().numpy(),
        np.full(rows, prompt_length, dtype=np.int16),
        temperatures,
        candidates.numpy(),
        log_probabilities.numpy(),
        features.numpy(),
        seeds,
    )


def random_prompts(tokens: NDArray[np.int32], length: int, rows: int, random: np.random.Generator) -> torch.Tensor:
    """Return `[rows, length]` windows of `tokens` at random places."""
    starts = random.integers(len(tokens) - length, size=rows)
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))


def write_continuations(
    model: LlamaForCausalLM, corpus_tokens: NDArray[np.int32], folder: Path, recipe: ContinuationRecipe
) -> None:
    """Write the missing shards into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    for shard in range(recipe.shards):
        path = folder / f"{shard:04}.npz"
        if path.exists():
            continue
        random = np.random.default_rng([recipe.seed, shard])
        prompt_length = int(random.integers(recipe.min_prompt, recipe.max_prompt + 1))
        prompts = random_prompts(corpus_tokens, prompt_length, recipe.rows, random)
        temperatures = random.choice(recipe.temperatures, size=recipe.rows, p=recipe.shares).astype(np.float32)
        continue_prompts(model, prompts, recipe.length, temperatures, int(random.integers(2**31))).save(path)


@torch.inference_mode()
def corpus_rows(model: LlamaForCausalLM, tokens: NDArray[np.int32], rows: int, length: int, seed: int) -> Continuations:
    """Return windows of the corpus as rows: a prompt of one token, and each next token certain (temperature 1)."""
    windows = random_prompts(tokens, length, rows, np.random.default_rng(seed))
    features = torch.zeros((rows, length, model.config.hidden_size), dtype=torch.float16)
    for at in range(0, rows, ROWS_PER_PASS):
        read = windows[at : at + ROWS_PER_PASS, :-1]
        features[at : at + len(read), 1:] = BatchDecoder(model, len(read), length).hidden(read).half()
    words = windows.numpy().astype(np.int16)
    candidates = np.repeat(words[:, :, None], CANDIDATES, 2)
    return Continuations(
        words,
        np.ones(rows, np.int16),
        np.ones(rows, np.float32),
        candidates,
        np.zeros(candidates.shape, np.float16),
        features.numpy(),
        np.zeros(rows, np.uint64),
    )
