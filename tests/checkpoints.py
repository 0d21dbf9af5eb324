"""Tiny random checkpoints: real Hugging Face folders, written in a moment, so that tests run the real code.

The weights are drawn wide (`WEIGHT_DEVIATION`), so that greedy outputs vary instead of repeating one token.
The tokenizer is byte-level: token id = byte value, then `<|endoftext|>` = 256.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Family = Literal["llama", "qwen2", "qwen3"]

END_OF_TEXT = "<|endoftext|>"
END_TOKEN = 256
TOKENIZER_LENGTH = 257
VOCABULARY_SIZE = 272  # wider than the tokenizer, as real checkpoints are
CONTEXT_LENGTH = 512
WEIGHT_DEVIATION = 0.3  # 15 times what real initialisation uses: the layers outweigh the embedding in the residual
NORM_DEVIATION = 0.1
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<{{ message['role'] }}>{{ message['content'] }}\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)

FAMILIES: dict[Family, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def byte_characters() -> list[str]:
    """The printable stand-in of every byte value, in order, as byte-level tokenizers spell them (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return [characters[byte] for byte in range(256)]


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of a tokenizer with one token per byte."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_model(family: Family, seed: int = 0, tied: bool = True, layers: int = 2, **overrides: Any) -> PreTrainedModel:
    """A tiny random causal model of `family` in float32, with grouped queries (4 heads over 2).

    `overrides` go into its configuration, e.g. `rope_parameters` or `vocab_size`. Biases and norms are random too.
    """
    config_class, model_class = FAMILIES[family]
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": tied,
        "bos_token_id": END_TOKEN,
        "eos_token_id": END_TOKEN,
        "pad_token_id": END_TOKEN,
    }
    model: PreTrainedModel = model_class(config_class(**(sizes | overrides))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight")
            parameter.copy_(1 + noise * NORM_DEVIATION if is_norm else noise * WEIGHT_DEVIATION)
            if "embed_tokens" in name or "lm_head" in name:
                # Rows that the tokenizer never writes score 0, far below the best of 257 random ones.
                parameter[TOKENIZER_LENGTH:VOCABULARY_SIZE] = 0
    return model


def write_checkpoint(
    folder: Path,
    family: Family = "llama",
    seed: int = 0,
    tied: bool = True,
    layers: int = 2,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> PreTrainedModel:
    """Write a tiny random model with tokenizer and generation_config.json into `folder`; returns the model."""
    model = build_model(family, seed, tied, layers, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    GenerationConfig(eos_token_id=END_TOKEN, bos_token_id=END_TOKEN, pad_token_id=END_TOKEN).save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_block_drafter(
    folder: Path, seed: int = 1, num_masks: int = 32, block_size: int = 32, layers: int = 1
) -> PreTrainedModel:
    """Write a tiny random block-diffusion drafter for the tiny targets: Qwen2 with mask tokens beyond the vocabulary.

    config.json carries what the bundled drafter's carries: mask_token_ids, logits_shifted, attention and block_size.
    """
    model = write_checkpoint(folder, "qwen2", seed, layers=layers, vocab_size=VOCABULARY_SIZE + num_masks)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["mask_token_ids"] = list(range(VOCABULARY_SIZE, VOCABULARY_SIZE + num_masks))
    config |= {"logits_shifted": True, "attention": "block", "block_size": block_size}
    path.write_text(json.dumps(config, indent=2) + "\n")
    return model


def write_full_drafter(folder: Path, seed: int = 1, layers: int = 1) -> PreTrainedModel:
    """Write a tiny random bidirectional drafter in the layout of hub checkpoints such as Dream: one mask token."""
    model = write_checkpoint(folder, "qwen2", seed, layers=layers, vocab_size=VOCABULARY_SIZE + 1)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"mask_token_ids": [VOCABULARY_SIZE], "logits_shifted": True, "attention": "full"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    return model
