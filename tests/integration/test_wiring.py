"""What the settings make of the drafting pipeline."""

from typing import Any

import numpy as np
import pytest

from drafters.base import Draft, DraftRequest
from service.engine.vllm.config import max_draft_tokens
from service.setting_groups import BUNDLED_MODELS
from service.settings import Settings, load_settings
from service.wiring import build_pipeline
from transformer.config import TransformerConfig
from transformer.model import Transformer

TEXT = np.random.default_rng(0).integers(300, 2000, 24).astype(np.int32)  # nothing that n-grams would go on with
REPEATED = np.tile(TEXT, 3)


@pytest.fixture(scope="module")
def drafter() -> Transformer:
    return Transformer.load(BUNDLED_MODELS / "drafter")


def settings_with(**speculation: Any) -> Settings:
    return load_settings(overrides={f"speculation.{name}": value for name, value in speculation.items()})


def draft(settings: Settings, drafter: Transformer | None = None) -> Draft:
    pipeline = build_pipeline(settings, TransformerConfig.from_folder(settings.model.target), drafter)
    (made,) = pipeline.propose([DraftRequest("a", REPEATED, 8)])
    return made


@pytest.mark.parametrize(
    ("causal_model", "described"),
    [("mixed", "own text + n-grams"), ("text", "own text"), ("ngram", "n-grams"), ("uniform", "none")],
)
def test_a_causal_model_drafts_from_what_it_knows(causal_model: str, described: str) -> None:
    settings = settings_with(causal_model=causal_model, policy="fixed")
    target = TransformerConfig.from_folder(settings.model.target)
    assert build_pipeline(settings, target, None).description == described
    tokens = draft(settings).tokens
    if causal_model in ("mixed", "text"):
        assert tokens == tuple(TEXT[:8].tolist())
    else:
        assert bool(tokens) == (causal_model == "ngram")
        assert tokens[:2] != tuple(TEXT[:2].tolist())


def test_without_free_drafts_only_the_diffusion_model_drafts(drafter: Transformer) -> None:
    free = settings_with(free_drafts=False, policy="fixed")
    assert draft(free).tokens == ()
    joined, alone = draft(settings_with(policy="fixed"), drafter), draft(free, drafter)
    assert joined.source == alone.source == "diffusion"
    assert joined.tokens[:4] == tuple(TEXT[:4].tolist())  # the copied tokens have joined the lattice
    assert alone.tokens[0] != TEXT[0]


def test_without_free_drafts_the_causal_model_still_scores_paths(drafter: Transformer) -> None:
    paths = {
        known: draft(settings_with(free_drafts=False, policy="fixed", causal_model=known), drafter).tokens
        for known in ("mixed", "uniform")
    }
    assert paths["mixed"] != paths["uniform"]


@pytest.mark.parametrize("engine", ["embedded", "vllm"])
@pytest.mark.parametrize(
    ("change", "drafts"), [({}, True), ({"causal_model": "uniform"}, False), ({"free_drafts": False}, False)]
)
def test_where_nothing_can_draft_no_room_is_kept_for_drafts(engine: str, change: dict[str, Any], drafts: bool) -> None:
    settings = settings_with(diffusion=False, **change)
    if engine == "vllm":
        assert bool(max_draft_tokens(settings)) is drafts
    else:
        pipeline = build_pipeline(settings, TransformerConfig.from_folder(settings.model.target), None)
        assert bool(pipeline.max_draft_tokens) is drafts
