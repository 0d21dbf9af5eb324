"""The drafter: a two-layer block-diffusion model that reads the target's hidden states and a free draft.

It starts from the first and last layer of the small model that the target was stacked from.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from models.training.blocks import BLOCK_SIZE, BlockBatch
from models.training.continuations import Continuations

FIRST_GATE = 0.3  # initial weight of hints; large enough to matter from the start


@dataclass(frozen=True)
class DrafterRecipe:
    """Sizes and schedule."""

    intermediate_size: int = 208
    layers: tuple[int, ...] = (0, -1)  # layers of the small model to start from
    start_steps: int = 750  # on continuations of the small model
    steps: int = 16_000
    more_steps: int = 12_000  # in `train_on`
    more_muon_rate: float = 0.012
    sequences: int = 6  # per step
    mask_rows: int = 288  # per sequence
    mean_masks: float = 5.0  # per block
    long_share: float = 1 / 32  # share of blocks with any number of masks
    offset_decay: float = 0.8  # mask j has this weight to the power j; far masks are also rarer
    mask_weight: float = 3.0  # of all mask rows together, relative to all clean rows
    label_temperature: float = 0.5
    first_labelled: int = 96  # earlier clean rows have no loss, which saves their logits
    prompt_weight: float = 0.1  # of the other clean rows in the prompt
    decay_share: float = 1.0
    unconditioned_share: float = 0.1  # share of sequences that lack hidden states, up to a random token or all
    unhinted_share: float = 0.15  # share of blocks without the free draft; as many get a random prefix of it
    weak_share: float = 0.8  # 0 to 1: preference of blocks for places where the free draft promises little
    contexts: tuple[int, int] = (8, 32)  # minimum and maximum of the clean tokens that a draft sees, as in serving
    whole_share: float = 0.1  # share of sequences whose drafts see the whole text
    muon_rate: float = 0.015
    adam_rate: float = 2e-3
    start_corpus_share: float = 0.75  # share of rows that are plain windows of the corpus, in the warm-up
    corpus_share: float = 0.15  # likewise, afterwards
    compiled: bool = True
    seed: int = 0


class ConditionedDrafter(Qwen2ForCausalLM):
    """A Qwen2 that adds the target's hidden states to its clean rows, and a free draft's tokens to its masks.

    `target_projection` maps the hidden states. `hint_gates` scales, entry by entry, the embeddings of two tokens of the
    free draft: the one at the mask's own place, and the next one, which the mask's row predicts.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model.target_projection = torch.nn.Linear(config.target_hidden_size, config.hidden_size, bias=False)
        torch.nn.init.zeros_(self.model.target_projection.weight)
        self.model.hint_gates = torch.nn.Parameter(torch.full((2, config.hidden_size), FIRST_GATE))

    def rows(self, batch: BlockBatch, features: torch.Tensor, hints: torch.Tensor) -> torch.Tensor:
        """Return the final hidden states of all rows, `[sequences, rows, hidden]`.

        `features` `[sequences, clean rows, target hidden]`: the states that clean tokens were predicted from; zero if
        unknown. `hints` int64 `[sequences, mask rows, 2]`: the free draft's tokens at each mask's place and the next;
        -1: none.
        """
        embedded = self.model.embed_tokens(batch.token_ids)
        hinted = self.model.embed_tokens(hints.clamp(min=0)) * (hints >= 0).unsqueeze(-1)
        joined = [self.model.target_projection(features), (hinted * self.model.hint_gates).sum(2)]
        output = self.model(
            inputs_embeds=embedded + torch.cat(joined, 1),
            attention_mask=batch.visible,
            position_ids=batch.positions,
            use_cache=False,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


def build_drafter(target: LlamaForCausalLM, recipe: DrafterRecipe) -> ConditionedDrafter:
    """Build a Qwen2 from the target's embedding and some of its layers, with mask tokens after the vocabulary."""
    torch.manual_seed(recipe.seed)
    source = target.config
    config = Qwen2Config(
        vocab_size=source.vocab_size + BLOCK_SIZE,
        hidden_size=source.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=len(recipe.layers),
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        tie_word_embeddings=True,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
        target_hidden_size=source.hidden_size,
    )
    drafter = ConditionedDrafter(config)
    with torch.no_grad():
        words, rows = target.model.embed_tokens.weight, drafter.model.embed_tokens.weight
        rows[: source.vocab_size] = words
        rows[source.vocab_size :] = words.mean(0) + 0.3 * words.std() * torch.randn(BLOCK_SIZE, source.hidden_size)
        drafter.model.norm.weight.copy_(target.model.norm.weight)
        for layer, index in zip(drafter.model.layers, recipe.layers, strict=True):
            _copy_layer(target.model.layers[index], layer)
    return drafter


def load_drafter(folder: Path) -> ConditionedDrafter:
    """Load a finished drafter in float32. A drafter from before there were hints gets initial gates."""
    drafter = ConditionedDrafter(Qwen2Config.from_pretrained(folder))
    drafter.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    drafter.tie_weights()
    drafter.float()
    return drafter


def _copy_layer(old: Any, new: Any) -> None:
    """Copy a layer. Of its feed-forward neurons, keep the ones with the largest product of weight norms that fit."""
    new.input_layernorm.weight.copy_(old.input_layernorm.weight)
    new.post_attention_layernorm.weight.copy_(old.post_attention_layernorm.weight)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        source, copy = getattr(old.self_attn, name), getattr(new.self_attn, name)
        copy.weight.copy_(source.weight)
        if copy.bias is not None:
            copy.bias.zero_() if source.bias is None else copy.bias.copy_(source.bias)
    gate, up, down = old.mlp.gate_proj.weight, old.mlp.up_proj.weight, old.mlp.down_proj.weight
    importance = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = importance.topk(len(new.mlp.gate_proj.weight)).indices.sort().values
    new.mlp.gate_proj.weight.copy_(gate[kept])
    new.mlp.up_proj.weight.copy_(up[kept])
    new.mlp.down_proj.weight.copy_(down[:, kept])


def save_drafter(
    drafter: ConditionedDrafter, target_folder: Path, folder: Path, recipe: DrafterRecipe, facts: dict[str, object]
) -> None:
    """Write the folder: bfloat16 weights to compute in float32, the target's tokenizer, and masks in config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    drafter.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    first_mask = drafter.config.vocab_size - BLOCK_SIZE
    config |= {
        "dtype": "float32",
        "mask_token_id": first_mask,
        "mask_token_ids": list(range(first_mask, drafter.config.vocab_size)),
        "logits_shifted": True,
        "attention": "block",
        "block_size": BLOCK_SIZE,
        "takes_hints": True,
        "logits_temperature": recipe.label_temperature,
        "architectures": ["Qwen2ForCausalLM"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text((target_folder / name).read_text())
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def facts_of(recipe: DrafterRecipe, data: Continuations) -> dict[str, object]:
    return {"recipe": asdict(recipe), "continuation_rows": len(data.tokens), "generated_tokens": data.num_generated}
