"""Every hub family as drafter, and every relation of vocabularies: tokens stay those of plain decoding."""

import json
import logging
from pathlib import Path

import pytest

from service.settings import Settings, load_settings
from service.wiring import build_pipeline
from tests.checkpoints import HUB_DRAFTERS, OtherVocabulary, change_vocabulary, write_hub_drafter
from tests.integration.test_engine_lossless import (
    GREEDY,
    SAMPLED,
    Setting,
    assert_same,
    model,
    outputs_under,
    plain_greedy,
    plain_sampled,
    reference,
)
from transformer.model import Transformer

__all__ = ["model", "plain_greedy", "plain_sampled", "reference"]  # fixtures


def settings_of(target: Path, drafter: Path, **overrides: object) -> Settings:
    return load_settings(
        overrides={
            "model.target": target,
            "model.drafter": str(drafter),
            "speculation.free_drafts": False,
            "speculation.policy": "fixed",
            "speculation.window_tokens": 64,
        }
        | {f"speculation.{name}": value for name, value in overrides.items()}
    )


@pytest.mark.parametrize("name", HUB_DRAFTERS)
def test_no_family_changes_a_token(
    name: str,
    tmp_path: Path,
    tiny_target: Path,
    model,
    reference,
    near_ties,
    plain_greedy,
    plain_sampled,  # type: ignore[no-untyped-def]
) -> None:
    folder = tmp_path / HUB_DRAFTERS[name].folder
    write_hub_drafter(folder, name)
    pipeline = build_pipeline(settings_of(tiny_target, folder), model.config, Transformer.load(folder))
    assert "identical vocabulary" in pipeline.description
    assert_same(plain_greedy, outputs_under(Setting(5), model, GREEDY, pipeline), reference, near_ties)
    assert pipeline.drafter_up
    assert outputs_under(Setting(3), model, SAMPLED, pipeline) == plain_sampled
    assert pipeline.drafter_up


@pytest.mark.parametrize(
    "options",
    [{"refinement_steps": 3}, {"draft_part_tokens": 3, "draft_part_confidence": 0.1}, {"refresh_passes": 0}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("name", ["dream", "fast-dllm", "sdar"])
def test_no_way_of_drafting_changes_a_token(
    name: str,
    options: dict[str, object],
    tmp_path: Path,
    tiny_target: Path,
    model,
    reference,
    near_ties,
    plain_greedy,  # type: ignore[no-untyped-def]
) -> None:
    write_hub_drafter(tmp_path, name)
    settings = settings_of(tiny_target, tmp_path, **options)
    pipeline = build_pipeline(settings, model.config, Transformer.load(tmp_path))
    assert_same(plain_greedy, outputs_under(Setting(5), model, GREEDY, pipeline), reference, near_ties)
    assert pipeline.drafter_up


@pytest.mark.parametrize(
    ("kind", "relation"), [("rotated", "overlapping"), ("partial", "overlapping"), ("byte-names", "disjoint")]
)
@pytest.mark.parametrize("name", ["a2d-qwen3-mdlm", "fast-dllm"])
def test_no_vocabulary_changes_a_token(
    name: str,
    kind: OtherVocabulary,
    relation: str,
    tmp_path: Path,
    tiny_target: Path,
    model,  # type: ignore[no-untyped-def]
    reference,
    near_ties,
    plain_greedy,
    plain_sampled,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_hub_drafter(tmp_path, name)
    change_vocabulary(tmp_path, kind)
    with caplog.at_level(logging.INFO):
        pipeline = build_pipeline(settings_of(tiny_target, tmp_path), model.config, Transformer.load(tmp_path))
    assert f"{relation} vocabulary" in pipeline.description
    assert f"vocabularies of target and drafter: {relation}" in caplog.text
    assert_same(plain_greedy, outputs_under(Setting(5), model, GREEDY, pipeline), reference, near_ties)
    assert outputs_under(Setting(3), model, SAMPLED, pipeline) == plain_sampled
    assert pipeline.drafter_up  # no failure was hidden


def test_several_stop_tokens_end_a_drafted_text(tmp_path: Path, tiny_target: Path, model, plain_greedy) -> None:  # type: ignore[no-untyped-def]
    """Qwen's models end with one of two tokens. The target's count, whatever the drafter's own are."""
    from dataclasses import replace

    from verifiers.base import SamplingRules

    write_hub_drafter(tmp_path, "sdar")
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [256, 3]}))
    pipeline = build_pipeline(settings_of(tiny_target, tmp_path), model.config, Transformer.load(tmp_path))
    stops = (plain_greedy[0][9], plain_greedy[0][17])
    request = replace(GREEDY[0], rules=SamplingRules(seed=0, temperature=0, stop_token_ids=stops))
    first = min(plain_greedy[0].index(stop) for stop in stops)
    assert outputs_under(Setting(2), model, [request], pipeline)[0] == plain_greedy[0][:first]
