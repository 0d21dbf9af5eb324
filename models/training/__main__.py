"""Train the bundled pair: `python -m models.training all`, or one stage after another.

Every stage continues where it was stopped, and skips finished work. Delete its folder to repeat it.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from drafters.search.causal_model import CausalModel
from drafters.search.ngram import NgramModel
from models.training.cards import write_cards
from models.training.continuations import ContinuationRecipe, Continuations, corpus_rows, write_continuations
from models.training.data import Corpus
from models.training.distillation import train_drafter, train_on
from models.training.drafter import DrafterRecipe, facts_of, load_drafter, save_drafter
from models.training.evaluate import drafter_figures, held_out_continuations, ngram_accuracy
from models.training.hints import Lessons, free_drafts
from models.training.ngram import fit_ngram
from models.training.target import TargetRecipe, held_out_bits_per_byte, load_start, train_target

MODELS = Path(__file__).resolve().parent.parent
TEMPERATURES = (0.0, 0.5, 0.8)


@dataclass(frozen=True)
class Pair:
    """The folders and the recipes of a pair."""

    work: Path
    models: Path
    target_recipe: TargetRecipe = field(default_factory=TargetRecipe)
    start_continuation_recipe: ContinuationRecipe = field(default_factory=lambda: ContinuationRecipe(shards=12))
    continuation_recipe: ContinuationRecipe = field(default_factory=ContinuationRecipe)
    drafter_recipe: DrafterRecipe = field(default_factory=DrafterRecipe)
    train_on: bool = False
    evaluation_prompts: int = 64

    @cached_property
    def corpus(self) -> Corpus:
        self.work.mkdir(parents=True, exist_ok=True)
        return Corpus(self.work)

    @cached_property
    def target(self) -> LlamaForCausalLM:
        """The target as it is served: weights stored as bfloat16, computed in float32."""
        return LlamaForCausalLM.from_pretrained(self.models / "target", dtype=torch.float32).eval()

    @cached_property
    def start(self) -> LlamaForCausalLM:
        """The small model that the target was stacked from."""
        return load_start(self.corpus, self.work, self.target_recipe)

    @cached_property
    def ngram(self) -> NgramModel:
        return NgramModel.load(self.models / "ngram")

    @cached_property
    def continuations(self) -> Continuations:
        return Continuations.load(self.work / "continuations")

    def lessons(self, model: LlamaForCausalLM, continuations: Continuations, share: float) -> Lessons:
        """Join `model`'s continuations with windows of the corpus (`share` of all rows), and add free drafts."""
        rows = round(len(continuations.tokens) * share / (1 - share))
        data = continuations.joined(
            corpus_rows(model, self.corpus.train, rows, continuations.tokens.shape[1], self.drafter_recipe.seed)
        )
        return Lessons(data, free_drafts(self.causal, data))

    @property
    def causal(self) -> CausalModel:
        """The causal model at the start of serving."""
        return CausalModel(self.target.config.vocab_size, self.ngram, end_tokens=[self.target.config.eos_token_id])


def rehearsal(work: Path, models: Path) -> Pair:
    """Return a pair with a few steps of little data per stage: shows within minutes that all stages run here."""
    continuations = ContinuationRecipe(shards=1, rows=8)
    return Pair(
        work,
        models,
        target_recipe=TargetRecipe(start_steps=6, steps=4, batch_tokens=1024),
        start_continuation_recipe=continuations,
        continuation_recipe=continuations,
        drafter_recipe=DrafterRecipe(start_steps=4, steps=6, more_steps=4, compiled=False),
        evaluation_prompts=3,
    )


def run_target(pair: Pair) -> None:
    folder = pair.models / "target"
    if not (folder / "model.safetensors").exists():
        train_target(pair.corpus, pair.work, folder, pair.target_recipe)


def run_continuations(pair: Pair) -> None:
    texts = pair.corpus.train
    write_continuations(pair.start, texts, pair.work / "start-continuations", pair.start_continuation_recipe)
    write_continuations(pair.target, texts, pair.work / "continuations", pair.continuation_recipe)


def run_drafter(pair: Pair) -> None:
    folder = pair.models / "drafter"
    recipe = pair.drafter_recipe
    if (folder / "model.safetensors").exists() and not pair.train_on:
        return
    lessons = pair.lessons(pair.target, pair.continuations, recipe.corpus_share)
    if pair.train_on:
        drafter = train_on(load_drafter(folder), lessons, pair.work, recipe)
    else:
        started = Continuations.load(pair.work / "start-continuations")
        start_lessons = pair.lessons(pair.start, started, recipe.start_corpus_share)
        drafter = train_drafter(pair.start, start_lessons, lessons, pair.work, recipe)
    save_drafter(drafter, pair.models / "target", folder, recipe, facts_of(recipe, pair.continuations))


def run_ngram(pair: Pair) -> None:
    folder = pair.models / "ngram"
    if not (folder / "ngram.json").exists():
        texts = [pair.corpus.train, *(text.astype("int32") for text in pair.continuations.texts())]
        fit_ngram(texts, pair.target.config.vocab_size, folder)


def run_cards(pair: Pair) -> None:
    held_out = held_out_continuations(pair.target, pair.corpus.held_out, pair.evaluation_prompts, TEMPERATURES, seed=1)
    drafter = load_drafter(pair.models / "drafter").eval()
    figures: dict[str, Any] = {
        "target_bits_per_byte": round(held_out_bits_per_byte(pair.target, pair.corpus), 4),
        "target_parameters": pair.target.num_parameters(),
        "drafter_parameters": drafter.num_parameters(),
        "drafter": drafter_figures(drafter, held_out, [free_drafts(pair.causal, data) for data in held_out]),
        "ngram": ngram_accuracy(pair.ngram, held_out),
    }
    (pair.models / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_cards(pair.models, figures)


STAGES: dict[str, Callable[[Pair], None]] = {
    "target": run_target,
    "continuations": run_continuations,
    "ngram": run_ngram,
    "drafter": run_drafter,
    "cards": run_cards,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.training", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(__file__).parent / "runs",
        help="folder for data and unfinished state (%(default)s)",
    )
    parser.add_argument("--models", type=Path, default=MODELS, help="folder for the finished models (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument(
        "--train-on",
        action="store_true",
        help="stage 'drafter': continue training the finished drafter, and replace it",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run a few steps of each stage; needs its own --work and --models folders",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.rehearse and arguments.models == MODELS:
        parser.error("--rehearse would write over the bundled pair: name another folder with --models")
    pair = Pair(arguments.work, arguments.models, train_on=arguments.train_on)
    if arguments.rehearse:
        pair = replace(rehearsal(arguments.work, arguments.models), train_on=arguments.train_on)
    for name, run in STAGES.items():
        if arguments.stage in (name, "all"):
            print(f"stage {name}", flush=True)
            run(pair)


if __name__ == "__main__":
    main()
