"""The checkpoint families that this transformer runs: a table from config.json to switches and weight names.

There is one transformer, not one model class per family. Families differ in the names of fields and weights, and in a
few facts about their training that config.json leaves to Python code, which is never run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformer.folder import CheckpointError, read_mask_token, read_vocabulary

Architecture = Literal["llama", "qwen2", "qwen3"]
AttentionPattern = Literal["causal", "block", "block_causal", "full"]
"""The tokens that each token sees. `causal`: itself and those before. `block`: causal over clean tokens; the block of
masks that follows sees them and itself. `block_causal`: blocks on a fixed grid from position 0; each sees itself and
all blocks before. `full`: all tokens."""

LLADA_FIELDS = (
    ("hidden_size", "d_model"),
    ("intermediate_size", "mlp_hidden_size"),
    ("num_hidden_layers", "n_layers"),
    ("num_attention_heads", "n_heads"),
    ("num_key_value_heads", "n_kv_heads"),
    ("max_position_embeddings", "max_sequence_length"),
    ("tie_word_embeddings", "weight_tying"),
    ("vocab_size", "embedding_size"),
)
LLADA_KEYS = (
    ("model.embed_tokens.", "model.transformer.wte."),
    ("model.norm.", "model.transformer.ln_f."),
    ("lm_head.", "model.transformer.ff_out."),
    ("model.layers.", "model.transformer.blocks."),
    ("self_attn.o_proj.", "attn_out."),
    ("self_attn.", ""),
    ("mlp.gate_proj.", "ff_proj."),
    ("mlp.up_proj.", "up_proj."),
    ("mlp.down_proj.", "ff_out."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ff_norm."),
)
LLADA_SWITCHES: tuple[tuple[str, Any], ...] = (  # values that this transformer needs, without a switch for them
    ("block_type", "llama"),
    ("layer_norm_type", "rms"),
    ("rope", True),
    ("alibi", False),
    ("activation_type", "silu"),
    ("attention_layer_norm", False),
    ("bias_for_layer_norm", False),
    ("layer_norm_with_affine", True),
    ("include_bias", False),
    ("include_qkv_bias", False),
    ("input_emb_norm", False),
    ("scale_logits", False),
    ("block_group_size", 1),
    ("multi_query_attention", False),
)


@dataclass(frozen=True, slots=True)
class Diffusion:
    """The way a family was trained to fill in masks."""

    attention: AttentionPattern
    logits_shifted: bool  # the row of position i predicts position i + 1
    mask_token_id: int | None  # if neither config.json nor the tokenizer names one
    block_size: int = 0  # tokens, if config.json has no block size
    block_field: str = "block_size"
    trained_positions: int = 0  # tokens, if config.json allows more positions than the training had; 0: it doesn't


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints with the same fields in config.json and the same names of weights."""

    name: str
    architecture: Architecture
    diffusion: Diffusion | None = None  # None: causal, unless config.json says more (see `read_diffusion`)
    fields: tuple[tuple[str, str], ...] = ()  # (our name, the family's name) in config.json
    keys: tuple[tuple[str, str], ...] = ()  # (ours, the family's), replaced in order in a weight's name
    switches: tuple[tuple[str, Any], ...] = ()  # fields of config.json that must have these values

    def stored_name(self, name: str) -> str:
        """Return the name in the family's files of a weight that Llama's layout calls `name`."""
        for ours, theirs in self.keys:
            name = name.replace(ours, theirs)
        return name


A2D = Diffusion("full", logits_shifted=False, mask_token_id=None)
SDAR = Diffusion("block_causal", logits_shifted=False, mask_token_id=151669, block_size=4)
FAST_DLLM = Diffusion("block_causal", True, mask_token_id=151665, block_size=32, block_field="bd_size")
FAMILIES: Mapping[str, Family] = {  # by the checkpoint's model_type
    "llama": Family("llama", "llama"),
    "qwen2": Family("qwen2", "qwen2"),
    "qwen3": Family("qwen3", "qwen3"),
    "Dream": Family("Dream", "qwen2", Diffusion("full", True, mask_token_id=151666, trained_positions=2048)),
    "Fast_dLLM_Qwen": Family("Fast-dLLM v2", "qwen2", FAST_DLLM),
    "sdar": Family("SDAR", "qwen3", SDAR),
    "a2d-qwen3": Family("A2D-Qwen3", "qwen3", A2D),
    "a2d-qwen2": Family("A2D-Qwen2", "qwen2", A2D),
    "a2d-llama": Family("A2D-Llama", "llama", A2D),
    "llada": Family(
        "LLaDA",
        "llama",
        Diffusion("full", False, mask_token_id=126336),
        fields=LLADA_FIELDS,
        keys=LLADA_KEYS,
        switches=LLADA_SWITCHES,
    ),
}
DIFFULLAMA = Family("DiffuLLaMA", "llama", Diffusion("full", True, mask_token_id=None, trained_positions=2048))


def find_family(path: Path, raw: Mapping[str, Any]) -> Family:
    """Return the family of a config.json at `path`. Raises CheckpointError with the reason if no family fits."""
    kind = str(raw.get("model_type"))
    if raw.get("dflash_config"):
        raise CheckpointError(
            f"{path}: DFlash drafters read hidden states of several of the target's layers, which the embedded engine "
            "does not hand out; the vLLM engine runs them with vLLM's own method 'dflash'."
        )
    if kind == "gpt2":
        raise CheckpointError(
            f"{path}: model_type 'gpt2' is not supported: DiffuGPT and its kin have learned positions, LayerNorm and "
            "GELU, and this transformer has rotary positions, RMSNorm and SiLU."
        )
    family = FAMILIES.get(kind)
    if family is None:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{path}: model_type {raw.get('model_type')!r} is not supported; known are {known}.")
    if kind == "Dream" and raw.get("block_size"):
        raise CheckpointError(
            f"{path}: a Dream model with a block_size is of a later kind than Dream-v0, and is not supported."
        )
    experts = next((name for name in ("num_experts", "n_routed_experts") if raw.get(name)), None)
    if experts is not None:
        raise CheckpointError(f"{path}: mixtures of experts ({experts}: {raw[experts]}) are not supported.")
    if kind == "llama" and "mask_token_id" not in raw and "mask_token_ids" not in raw:
        return DIFFULLAMA if read_mask_token(path.parent) is not None else family
    return family


def in_our_words(path: Path, raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return config.json with Llama's field names. Raises CheckpointError if this transformer cannot run the model."""
    for name, needed in family.switches:
        if raw.get(name) is not None and raw[name] != needed:
            raise CheckpointError(f"{path}: {name} {raw[name]!r} is not supported, only {needed!r}.")
    return dict(raw) | {ours: raw[theirs] for ours, theirs in family.fields if raw.get(theirs) is not None}


def read_diffusion(path: Path, raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the fields of TransformerConfig that describe a diffusion model; empty for a plain causal model.

    Fields in config.json (`mask_token_id` or `mask_token_ids`, `attention`, `logits_shifted`, and the block size)
    override the family's defaults. A2D checkpoints trained block by block (BD3LM) and those trained on whole sequences
    (MDLM) have the same config.json: only their folder's name, or a `block_size` added by hand, tells them apart.

    Raises ValueError for values of the wrong kind.
    """
    known = family.diffusion
    masks = as_ids(raw.get("mask_token_ids", raw.get("mask_token_id")))
    if not masks and known is not None:
        masks = as_ids(read_mask_token(path.parent)) or as_ids(known.mask_token_id)
    if not masks and known is A2D:  # as their own loader does: a new token after the last one
        masks = tuple(1 + max(vocabulary.values()) for vocabulary in (read_vocabulary(path.parent),) if vocabulary)
    if not masks:
        return {}
    known = known or Diffusion("full", logits_shifted=False, mask_token_id=None)
    block_size = int(raw.get(known.block_field) or known.block_size)
    pattern = raw.get("attention", known.attention)
    if known is A2D and "attention" not in raw:
        block_size = block_size or (32 if "bd3lm" in str(path.parent.absolute()).lower() else 0)
        pattern = "block_causal" if block_size else "full"
    if pattern not in ("causal", "block", "block_causal", "full"):
        raise ValueError(f"attention {pattern!r} is none of causal, block, block_causal, full")
    return {
        "mask_token_ids": masks,
        "logits_shifted": bool(raw.get("logits_shifted", known.logits_shifted)),
        "attention": pattern,
        "block_size": block_size,
        "trained_positions": known.trained_positions,
        "logits_temperature": float(raw.get("logits_temperature", 1.0)),
        "target_hidden_size": int(raw.get("target_hidden_size", 0)),
        "takes_hints": bool(raw.get("takes_hints", False)),
    }


def as_ids(value: Any) -> tuple[int, ...]:
    """Return token ids from a JSON value: null, one id or a list."""
    if value is None:
        return ()
    return tuple(int(token) for token in value) if isinstance(value, list) else (int(value),)
