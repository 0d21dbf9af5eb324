"""Write tiny random checkpoints: real Hugging Face folders, so that tests run the real code.

The weights have a large deviation (`WEIGHT_DEVIATION`), so that greedy outputs vary instead of repeating one token.
The tokenizer is byte-level: the token id is the byte value; `<|endoftext|>` is 256.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
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
WEIGHT_DEVIATION = 0.3  # 15 times that of real initialisation: the layers outweigh the embedding in the residual
NORM_DEVIATION = 0.1
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<{{ message['role'] }}>{{ message['content'] }}\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)
# The parts of Qwen2.5's and Llama 3.1's templates about tools. Text that programs read is as in the originals.
HERMES_TEMPLATE = """{%- if tools %}<system># Tools
<tools>{%- for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{%- endfor %}
{{ "\\n" }}</tools>
For each call return <tool_call>
{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}
</tool_call>
{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" and message.tool_calls %}<assistant>{{ message.content or "" }}
{%- for tool_call in message.tool_calls %}{{ "\\n" }}<tool_call>
{"name": "{{ tool_call.function.name }}", "arguments": {{ tool_call.function.arguments | tojson }}}
</tool_call>{%- endfor %}
{% elif message.role == "tool" %}<user><tool_response>{{ message.content }}</tool_response>
{% else %}<{{ message.role }}>
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
LLAMA3_TEMPLATE = """{%- if tools %}Given the following functions, please respond with a JSON for a function call.
Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.
{% for t in tools %}{{ t | tojson(indent=4) }}
{% endfor %}{% endif %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""

FAMILIES: dict[Family, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def byte_characters() -> list[str]:
    """Return the printable character of every byte value, in order, by the table of byte-level tokenizers (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return [characters[byte] for byte in range(256)]


def write_tokenizer(folder: Path, chat_template: str = CHAT_TEMPLATE) -> None:
    """Write tokenizer.json and tokenizer_config.json for a tokenizer with one token per byte."""
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
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_model(family: Family, seed: int = 0, tied: bool = True, layers: int = 2, **overrides: Any) -> PreTrainedModel:
    """Build a tiny random causal model of `family` in float32, with grouped queries (4 heads over 2).

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
                # Rows that the tokenizer never writes score 0, far below the best of 257 random rows.
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
    """Write a tiny random model with tokenizer and generation_config.json into `folder`; return the model."""
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
    """Write a tiny random bidirectional drafter in the layout of hub checkpoints such as Dream, with one mask token."""
    model = write_checkpoint(folder, "qwen2", seed, layers=layers, vocab_size=VOCABULARY_SIZE + 1)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"mask_token_ids": [VOCABULARY_SIZE], "logits_shifted": True, "attention": "full"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    return model


MASK_TOKEN = 258  # of the tiny hub drafters, after `<|beginoftext|>` = 257, as in Dream

LLADA_NAMES = {  # written out, not taken from the code under test
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
    "model.layers.N.input_layernorm.weight": "model.transformer.blocks.N.attn_norm.weight",
    "model.layers.N.post_attention_layernorm.weight": "model.transformer.blocks.N.ff_norm.weight",
    "model.layers.N.self_attn.q_proj.weight": "model.transformer.blocks.N.q_proj.weight",
    "model.layers.N.self_attn.k_proj.weight": "model.transformer.blocks.N.k_proj.weight",
    "model.layers.N.self_attn.v_proj.weight": "model.transformer.blocks.N.v_proj.weight",
    "model.layers.N.self_attn.o_proj.weight": "model.transformer.blocks.N.attn_out.weight",
    "model.layers.N.mlp.gate_proj.weight": "model.transformer.blocks.N.ff_proj.weight",
    "model.layers.N.mlp.up_proj.weight": "model.transformer.blocks.N.up_proj.weight",
    "model.layers.N.mlp.down_proj.weight": "model.transformer.blocks.N.ff_out.weight",
}
LLADA_FIELDS = {
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "tie_word_embeddings": "weight_tying",
}
LLADA_CONFIG = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "mask_token_id": MASK_TOKEN,
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_size": VOCABULARY_SIZE,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "rope": True,
    "scale_logits": False,
}


@dataclass(frozen=True)
class HubDrafter:
    """The layout of one hub family's diffusion models, at a tiny size."""

    family: Family
    config: dict[str, Any]  # fields of its config.json, in addition to or instead of those of `family`
    attention: Literal["full", "block_causal"]
    shifted: bool
    block_size: int = 0
    names: dict[str, str] = field(
        default_factory=dict
    )  # names of weights, with N for the layer; empty: those of `family`
    fields: dict[str, str] = field(default_factory=dict)  # renamed fields of config.json
    mask_from_tokenizer: bool = False  # config.json names no mask token
    has_tokenizer_json: bool = True  # False: vocab.json and added_tokens.json, as for a tokenizer in Python
    tied: bool = False
    folder: str = "drafter"


HUB_DRAFTERS: dict[str, HubDrafter] = {
    "dream": HubDrafter(
        "qwen2",
        {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": MASK_TOKEN},
        "full",
        shifted=True,
        has_tokenizer_json=False,
    ),
    "fast-dllm": HubDrafter(
        "qwen2",
        {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 32},
        "block_causal",
        shifted=True,
        block_size=32,
        mask_from_tokenizer=True,
    ),
    "sdar": HubDrafter(
        "qwen3",
        {
            "model_type": "sdar",
            "architectures": ["SDARForCausalLM"],
            "block_size": 4,
            "mask_token_id": MASK_TOKEN,
            "fuse_cross_entropy": True,
        },
        "block_causal",
        shifted=False,
        block_size=4,
    ),
    "a2d-qwen3-mdlm": HubDrafter(
        "qwen3", {"model_type": "a2d-qwen3"}, "full", shifted=False, mask_from_tokenizer=True, tied=True
    ),
    "a2d-qwen3-bd3lm": HubDrafter(
        "qwen3",
        {"model_type": "a2d-qwen3"},
        "block_causal",
        shifted=False,
        block_size=32,
        mask_from_tokenizer=True,
        tied=True,
        folder="Qwen3-0.6B-diffusion-bd3lm-v0.1",
    ),
    "a2d-qwen2": HubDrafter(
        "qwen2", {"model_type": "a2d-qwen2"}, "full", shifted=False, mask_from_tokenizer=True, tied=True
    ),
    "llada": HubDrafter("llama", LLADA_CONFIG, "full", shifted=False, names=LLADA_NAMES, fields=LLADA_FIELDS),
    "diffullama": HubDrafter("llama", {}, "full", shifted=True, mask_from_tokenizer=True),
}


def write_hub_drafter(
    folder: Path,
    name: str,
    seed: int = 1,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> PreTrainedModel:
    """Write a tiny random drafter with the config, keys and tokenizer of `name` (a key of HUB_DRAFTERS).

    Returns transformers' own model of the same weights. `overrides` go into its configuration.
    """
    layout = HUB_DRAFTERS[name]
    model = build_model(layout.family, seed, layout.tied, layers, **overrides)
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    with torch.no_grad():
        for parameter in model.parameters():  # not the whole model: its rotary frequencies stay as they are
            parameter.copy_(parameter.to(dtype))
    GenerationConfig(eos_token_id=END_TOKEN, bos_token_id=END_TOKEN, pad_token_id=END_TOKEN).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        save_file({_renamed(key, layout.names): tensor for key, tensor in load_file(path).items()}, path)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {_renamed(key, layout.names): file for key, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))
    path = folder / "config.json"
    config = {layout.fields.get(key, key): value for key, value in json.loads(path.read_text()).items()}
    if layout.names:  # a family with its own fields has none of Llama's
        config = {key: value for key, value in config.items() if key not in ("hidden_act", "attention_bias")}
    path.write_text(json.dumps(config | layout.config, indent=2) + "\n")
    write_tokenizer(folder)
    _add_mask_token(folder, layout)
    return model


def _renamed(key: str, names: dict[str, str]) -> str:
    parts = key.split(".")
    layer = parts[2] if len(parts) > 2 and parts[2].isdigit() else ""
    return names[key.replace(f".{layer}.", ".N.")].replace(".N.", f".{layer}.") if names else key


def _add_mask_token(folder: Path, layout: HubDrafter) -> None:
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<|beginoftext|>", "<|mask|>"])
    tokenizer.save(str(path))
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    if layout.mask_from_tokenizer:
        config["mask_token"] = "<|mask|>"
    if not layout.has_tokenizer_json:
        content = json.loads(path.read_text())
        (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        (folder / "added_tokens.json").write_text(
            json.dumps({token["content"]: token["id"] for token in content["added_tokens"]})
        )
        config |= {"tokenizer_class": "DreamTokenizer"}
        path.unlink()
    config_path.write_text(json.dumps(config, indent=2) + "\n")


OtherVocabulary = Literal["rotated", "partial", "byte-names"]


def change_vocabulary(folder: Path, kind: OtherVocabulary) -> None:
    """Give a drafter's folder another tokenizer with the same number of tokens.

    `rotated`: the target's tokens under other ids. `partial`: a third of them is missing, too. `byte-names`: none of
    the target's tokens, but sentencepiece's names of the 256 bytes.
    """
    path = folder / "tokenizer.json"
    special = [token["content"] for token in json.loads(path.read_text())["added_tokens"]]
    if kind == "byte-names":
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        vocabulary = {character: (byte + 7) % 256 for byte, character in enumerate(byte_characters())}
        if kind == "partial":
            missing = [character for character, index in vocabulary.items() if index % 3 == 0]
            vocabulary |= {f"{character}{character}": vocabulary.pop(character) for character in missing}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))
