"""Train the drafter: a two-layer block-diffusion model distilled on the target's own continuations.

It starts from the first and last layer of the small model that the target grew from, and is trained exactly as it
drafts (see `models.training.blocks`): each clean row also gets the target's final hidden state that its token was
predicted from, which the target has computed anyway when the token is committed (as in EAGLE, arXiv 2401.15077), and
each mask what the free draft proposes there (`models.training.hints`): the drafter improves on that draft.
Labels are the target's own distributions, sharpened; their most probable tokens are stored with each continuation.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from models.training.blocks import BLOCK_SIZE, BlockBatch, attach_blocks, draw_blocks, hints_of
from models.training.checkpoint import Checkpoint
from models.training.continuations import Continuations
from models.training.hints import LONGEST_HINT, Lessons
from models.training.target import optimizers_of, rate_factor

SAVE_EVERY = 250  # steps
FIRST_GATE = 0.3  # of hints: enough that they are noticed


@dataclass(frozen=True)
class DrafterRecipe:
    """Sizes and schedule."""

    intermediate_size: int = 208
    layers: tuple[int, ...] = (0, -1)  # of the small model, to start from
    start_steps: int = 750  # on the continuations of the small model that the target grew from
    steps: int = 6000
    more_steps: int = 7600  # of `train_on`
    more_muon_rate: float = 0.012
    sequences: int = 6  # per step
    mask_rows: int = 288  # per sequence
    mean_masks: float = 5.0  # per block
    long_share: float = 1 / 32  # of the blocks, with any number of masks
    offset_decay: float = 0.8  # weight of mask j is this to the power j; far masks are also fewer
    mask_weight: float = 3.0  # of all mask rows together, against all clean rows
    label_temperature: float = 0.5
    first_labelled: int = 96  # clean rows before it carry no loss, which saves their logits
    prompt_weight: float = 0.1  # of the other clean rows inside the prompt
    decay_share: float = 1.0
    unconditioned_share: float = 0.1  # of the sequences, whose hidden states are missing up to a random token, or all
    unhinted_share: float = 0.15  # of the blocks, which know nothing of the free draft; as many know a random beginning
    weak_share: float = 0.6  # of the blocks, which hang where the free draft is short of accepted tokens
    muon_rate: float = 0.015
    adam_rate: float = 2e-3
    start_corpus_share: float = 0.75  # of the rows, plain windows of the corpus; in the warm-up
    corpus_share: float = 0.15  # the same, afterwards
    compiled: bool = True
    seed: int = 0


class ConditionedDrafter(Qwen2ForCausalLM):
    """A Qwen2 whose clean rows may be joined by the target's hidden states, and whose masks by a free draft's tokens.

    `target_projection` maps the former; `hint_gates` scales, entry by entry, the embedding of the token that the free
    draft has in the mask's own place, and of the one behind it, which the mask's row predicts.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        self.model.target_projection = torch.nn.Linear(config.target_hidden_size, config.hidden_size, bias=False)
        torch.nn.init.zeros_(self.model.target_projection.weight)
        self.model.hint_gates = torch.nn.Parameter(torch.full((2, config.hidden_size), FIRST_GATE))

    def rows(self, batch: BlockBatch, features: torch.Tensor, hints: torch.Tensor) -> torch.Tensor:
        """Final hidden states of all rows, `[sequences, rows, hidden]`.

        `features` `[sequences, clean rows, target hidden]`: what each clean token was predicted from; zero if unknown.
        `hints` int64 `[sequences, mask rows, 2]`: the free draft's token in each mask's place and the next; -1: none.
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
    """A Qwen2-layout model from the target's embedding and some of its layers, and mask tokens after the vocabulary."""
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
    """A finished drafter, in float32. One from before there were hints gets gates as they begin."""
    drafter = ConditionedDrafter(Qwen2Config.from_pretrained(folder))
    drafter.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    drafter.tie_weights()
    drafter.float()
    return drafter


def _copy_layer(old: Any, new: Any) -> None:
    """Copy a layer; of its feed-forward neurons those with the largest product of weight norms, as many as fit."""
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


@dataclass(frozen=True)
class Example:
    """One step's input, and for every row from the first labelled one on its label distribution and its weight."""

    batch: BlockBatch
    features: torch.Tensor
    hints: torch.Tensor
    label_ids: torch.Tensor
    label_shares: torch.Tensor
    weights: torch.Tensor


def examples(
    lessons: Lessons,
    recipe: DrafterRecipe,
    mask_token_ids: torch.Tensor,
    first_step: int,
    seed: int,
) -> Iterator[Example]:
    """The steps' inputs from `first_step` on, for ever; each is a function of the seed and the step alone."""
    rows = len(lessons.data.tokens)
    per_epoch = rows // recipe.sequences
    step = first_step
    while True:
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        chosen = np.sort(order[at * recipe.sequences : (at + 1) * recipe.sequences])
        yield _example(lessons, chosen, recipe, mask_token_ids, np.random.default_rng([seed, 1, step]))
        step += 1


def _example(
    lessons: Lessons,
    chosen: np.ndarray,
    recipe: DrafterRecipe,
    mask_token_ids: torch.Tensor,
    random: np.random.Generator,
) -> Example:
    data, drafts = lessons.data, lessons.drafts
    length = data.tokens.shape[1]
    prompt_lengths = data.prompt_lengths[chosen].astype(np.int64)
    weakness = (1 - recipe.weak_share) + recipe.weak_share * 2 / (1.0 + drafts.accepted[chosen]) ** 2
    drawn = draw_blocks(
        prompt_lengths, length, recipe.mask_rows, recipe.mean_masks, recipe.long_share, random, weakness
    )
    hints = torch.from_numpy(hints_of(drafts.tokens[chosen], *drawn[:2], known_hints(drawn[2], recipe, random)))
    anchors, offsets, blocks = map(torch.from_numpy, drawn)
    tokens = torch.from_numpy(data.tokens[chosen].astype(np.int64))
    batch = attach_blocks(tokens, anchors, offsets, blocks, mask_token_ids)
    first = recipe.first_labelled
    labels = (batch.positions[:, first:] + 1).clamp(max=length - 1)[:, :, None].expand(-1, -1, data.candidates.shape[2])
    ids = torch.from_numpy(data.candidates[chosen].astype(np.int64)).gather(1, labels)
    logs = torch.from_numpy(data.log_probabilities[chosen].astype(np.float32)).gather(1, labels)
    clean = torch.arange(first, length - 1) + 1 >= torch.from_numpy(prompt_lengths)[:, None]
    clean_weights = torch.where(clean, 1.0, recipe.prompt_weight)
    mask_weights = recipe.offset_decay**offsets
    clean_weights = clean_weights / clean_weights.sum()
    mask_weights = mask_weights / mask_weights.sum() * recipe.mask_weight
    weights = torch.cat([clean_weights, torch.zeros(len(chosen), 1), mask_weights], 1)
    features = torch.from_numpy(data.features[chosen].astype(np.float32))
    missing = missing_features(len(chosen), length, recipe.unconditioned_share, random)
    features.masked_fill_(torch.from_numpy(missing)[:, :, None], 0.0)
    return Example(batch, features, hints, ids, (logs / recipe.label_temperature).softmax(-1), weights)


def missing_features(sequences: int, length: int, share: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """Which hidden states `[sequences, length]` are withheld: none, or those up to a random token, or all of them.

    While serving they are missing for a prefix that the verifier did not compute itself.
    """
    chosen = random.random(sequences) < share
    ends = np.where(random.random(sequences) < 0.5, length, random.integers(length, size=sequences))
    return np.arange(length) < np.where(chosen, ends, 0)[:, None]


def known_hints(blocks: NDArray[np.int64], recipe: DrafterRecipe, random: np.random.Generator) -> NDArray[np.int64]:
    """How many tokens of its free draft each row's block knows: none, a random number, or (mostly) all."""
    chance = random.random(blocks.shape)
    cut = random.integers(1, LONGEST_HINT + 1, blocks.shape)
    counts = np.where(chance < 2 * recipe.unhinted_share, cut, LONGEST_HINT)
    counts = np.where(chance < recipe.unhinted_share, 0, counts)
    return np.take_along_axis(counts, blocks, 1)


class DistillationLoss(torch.nn.Module):
    """Weighted cross entropy of the drafter's rows with the target's candidates, in nats."""

    def __init__(self, drafter: ConditionedDrafter) -> None:
        super().__init__()
        self.drafter = drafter

    def forward(self, example: Example) -> torch.Tensor:
        hidden = self.drafter.rows(example.batch, example.features, example.hints)[:, -example.weights.shape[1] :]
        logits = self.drafter.lm_head(hidden)
        chosen = logits.gather(2, example.label_ids)
        losses = logits.logsumexp(-1) - (chosen * example.label_shares).sum(-1)
        loss: torch.Tensor = (losses * example.weights).sum()
        return loss


@dataclass(frozen=True)
class Phase:
    """One run of the loop below, with a state file of its own."""

    name: str
    steps: int
    decay_share: float
    seed: int


def distil(
    drafter: ConditionedDrafter,
    lessons: Lessons,
    work: Path,
    recipe: DrafterRecipe,
    phase: Phase,
    stop_at: int | None = None,
) -> None:
    """Train `drafter` in place (or go on training); the state lies in `work`, the log beside it.

    `stop_at` ends this call after that step, to be gone on with later.
    """
    mask_token_ids = torch.arange(drafter.config.vocab_size - BLOCK_SIZE, drafter.config.vocab_size)
    optimizers = optimizers_of(drafter, recipe.muon_rate, recipe.adam_rate)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    checkpoint = Checkpoint(work / f"{phase.name}.pt", drafter, optimizers)
    step = first = checkpoint.load()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]  # loading replaced them
    loss_of = torch.compile(DistillationLoss(drafter)) if recipe.compiled else DistillationLoss(drafter)
    last = phase.steps if stop_at is None else min(phase.steps, stop_at)
    started = time.monotonic()
    stream = examples(lessons, recipe, mask_token_ids, step, phase.seed)
    with (work / f"{phase.name}.jsonl").open("a") as log:
        while step < last:
            for group, rate in zip(groups, base_rates, strict=True):
                group["lr"] = rate * rate_factor(step, phase.steps, phase.decay_share)
            loss = loss_of(next(stream))
            torch.autograd.backward(loss)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                seconds = (time.monotonic() - started) / (step - first)
                record = {"step": step, "loss": round(loss.item(), 4), "seconds_per_step": round(seconds, 4)}
                print(json.dumps(record), file=log, flush=True)
            if step % SAVE_EVERY == 0 or step == last:
                checkpoint.save(step)


def train_drafter(
    start: LlamaForCausalLM, start_lessons: Lessons, lessons: Lessons, work: Path, recipe: DrafterRecipe
) -> ConditionedDrafter:
    """Warm up on continuations by the target's small start (they need not wait for the target), then on its own."""
    drafter = build_drafter(start, recipe)
    distil(drafter, start_lessons, work, recipe, Phase("drafter-start", recipe.start_steps, 0.0, recipe.seed))
    distil(drafter, lessons, work, recipe, Phase("drafter", recipe.steps, recipe.decay_share, recipe.seed + 1))
    return drafter


def train_on(drafter: ConditionedDrafter, lessons: Lessons, work: Path, recipe: DrafterRecipe) -> ConditionedDrafter:
    """Train a finished drafter on."""
    recipe = replace(recipe, muon_rate=recipe.more_muon_rate)
    distil(drafter, lessons, work, recipe, Phase("drafter-on", recipe.more_steps, recipe.decay_share, recipe.seed + 1))
    return drafter


def save_drafter(
    drafter: ConditionedDrafter, target_folder: Path, folder: Path, recipe: DrafterRecipe, facts: dict[str, object]
) -> None:
    """Write the folder: weights as bfloat16, computed in float32; the target's tokenizer; masks in config.json."""
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
