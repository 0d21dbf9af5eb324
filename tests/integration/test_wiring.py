"""What the settings make of the drafting pipeline."""

from pathlib import Path

import numpy as np
import pytest

from drafters.base import DraftRequest
from service.settings import load_settings
from service.wiring import build_pipeline
from transformer.config import TransformerConfig
from transformer.model import Transformer

BUNDLED = Path("models")


@pytest.mark.parametrize(
    ("scorer", "described"),
    [("mixed", "copy + n-grams"), ("text", "copy"), ("ngram", "n-grams"), ("uniform", "none")],
)
def test_a_scorer_drafts_from_what_it_knows(scorer: str, described: str) -> None:
    settings = load_settings(overrides={"speculation.scorer": scorer})
    pipeline = build_pipeline(settings, TransformerConfig.from_folder(settings.model.target), None)
    assert pipeline.description == described
    text = np.random.default_rng(0).integers(300, 2000, 24).astype(np.int32)
    (draft,) = pipeline.propose([DraftRequest("a", np.tile(text, 3), 8)])
    if scorer in ("mixed", "text"):
        assert draft.tokens[:2] == tuple(text[:2].tolist())
    if scorer == "uniform":
        assert draft.tokens == ()


def test_without_copying_the_scorer_judges_and_drafts_nothing() -> None:
    settings = load_settings(overrides={"speculation.copying": False, "speculation.policy": "fixed"})
    target = TransformerConfig.from_folder(settings.model.target)
    drafter = Transformer.load(BUNDLED / "drafter")
    text = np.tile(np.random.default_rng(0).integers(300, 2000, 24).astype(np.int32), 3)
    (draft,) = build_pipeline(settings, target, drafter).propose([DraftRequest("a", text, 8)])
    assert draft.source == "diffusion"
    (none,) = build_pipeline(settings, target, None).propose([DraftRequest("a", text, 8)])
    assert none.tokens == ()
