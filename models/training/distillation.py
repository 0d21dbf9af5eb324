"""Train the drafter: distil the target's own continuations into it, in the form in which it drafts."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from models.training.blocks import BLOCK_SIZE
from models.training.checkpoint import Checkpoint
from models.training.drafter import ConditionedDrafter, DrafterRecipe, build_drafter
from models.training.examples import Example, examples
from models.training.hints import Lessons
from models.training.target import optimizers_of, rate_factor

SAVE_EVERY = 250  # steps


class DistillationLoss(torch.nn.Module):
    """The weighted cross entropy of the drafter's rows with the target's candidates, in nats."""

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
    """One run of the training loop, with its own state file."""

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
    """Train `drafter` in place, or continue. `work` holds the state and the log.

    `stop_at` ends this call after that step; a later call can continue.
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
    """Warm up on continuations of the target's small start, which are ready early, then train on the target's own."""
    drafter = build_drafter(start, recipe)
    distil(drafter, start_lessons, work, recipe, Phase("drafter-start", recipe.start_steps, 0.0, recipe.seed))
    distil(drafter, lessons, work, recipe, Phase("drafter", recipe.steps, recipe.decay_share, recipe.seed + 1))
    return drafter


def train_on(drafter: ConditionedDrafter, lessons: Lessons, work: Path, recipe: DrafterRecipe) -> ConditionedDrafter:
    """Continue training a finished drafter."""
    recipe = replace(recipe, muon_rate=recipe.more_muon_rate)
    distil(drafter, lessons, work, recipe, Phase("drafter-on", recipe.more_steps, recipe.decay_share, recipe.seed + 1))
    return drafter
