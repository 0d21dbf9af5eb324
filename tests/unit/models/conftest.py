"""A corpus, a target and continuations, small enough to train on in a test."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from drafters.search.causal_model import CausalModel
from models.training.continuations import ContinuationRecipe, Continuations, write_continuations
from models.training.drafter import DrafterRecipe
from models.training.hints import Lessons, free_drafts
from models.training.target import TargetRecipe, build_target

VOCABULARY_SIZE = 64
RECIPE = DrafterRecipe(
    intermediate_size=16,
    first_labelled=4,
    start_steps=2,
    steps=4,
    sequences=2,
    mask_rows=24,
    decay_share=0.5,
    compiled=False,
)
LENGTH = 80


@pytest.fixture(scope="session")
def tiny_target() -> LlamaForCausalLM:
    recipe = TargetRecipe(hidden_size=32, intermediate_size=48, heads=4, key_value_heads=2)
    return build_target(recipe, layers=3, vocabulary_size=VOCABULARY_SIZE, end_token=0).eval()


@pytest.fixture(scope="session")
def toy_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCABULARY_SIZE, 4000).astype(np.int32)


def lessons_of(data: Continuations) -> Lessons:
    """Add free drafts by copying alone."""
    return Lessons(data, free_drafts(CausalModel(VOCABULARY_SIZE), data))


@pytest.fixture(scope="session")
def toy_continuations(
    tiny_target: LlamaForCausalLM, toy_tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Continuations:
    folder: Path = tmp_path_factory.mktemp("continuations")
    recipe = ContinuationRecipe(shards=2, rows=6, length=LENGTH, min_prompt=8, max_prompt=30)
    torch.set_num_threads(1)
    write_continuations(tiny_target, toy_tokens, folder, recipe)
    return Continuations.load(folder)


@pytest.fixture(scope="session")
def toy_lessons(toy_continuations: Continuations) -> Lessons:
    return lessons_of(toy_continuations)
