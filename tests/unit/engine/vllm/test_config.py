"""vLLM's engine arguments and memory follow from the settings; nothing here needs vLLM."""

from pathlib import Path

import pytest

from service.engine.vllm import config as vllm_config
from service.engine.vllm.config import MemoryBudgetError, TargetFacts, plan_memory
from service.settings import Settings, SettingsError, load_settings
from transformer.config import CheckpointError

GIB = 1 << 30


def arguments(settings: Settings) -> dict[str, object]:
    facts = TargetFacts.from_folder(settings.model.target, settings.model.dtype)
    plan = vllm_config.budget(settings, facts, (16 * GIB, 16 * GIB))
    return vllm_config.engine_arguments(settings, facts, plan)


def test_the_bundled_target_is_known_without_loading_it() -> None:
    facts = TargetFacts.from_folder(load_settings().model.target, "float32")
    assert (facts.vocabulary_size, facts.max_positions) == (2048, 1024)
    assert facts.kv_bytes_per_token == 2 * 12 * 2 * 64 * 4
    assert 30e6 < facts.weight_bytes < 45e6


def test_our_method_is_a_custom_proposer_behind_our_worker_and_scheduler() -> None:
    given = arguments(load_settings(overrides={"speculation.max_draft_tokens": 7}))
    assert given["speculative_config"] == {
        "method": "custom_class",
        "model": vllm_config.PROPOSER,
        "num_speculative_tokens": 7,
    }
    assert (given["worker_cls"], given["scheduler_cls"]) == (vllm_config.WORKER, vllm_config.SCHEDULER)
    assert given["trust_remote_code"] is False


def test_keys_never_travel_to_the_worker() -> None:
    given = arguments(load_settings(overrides={"auth.api_keys": ["secret"]}))
    assert "secret" not in str(given)


@pytest.mark.parametrize(
    "overrides",
    [{"vllm.method": "none"}, {"model.drafter": "none"}, {"speculation.max_draft_tokens": 0}],
    ids=lambda overrides: next(iter(overrides)),
)
def test_without_a_drafter_there_is_no_speculation(overrides: dict[str, object]) -> None:
    given = arguments(load_settings(overrides=overrides))
    assert given["speculative_config"] is None
    assert "per_request_spec_decode_metrics" not in given


def test_vllms_own_methods_are_configured_by_settings() -> None:
    overrides = {
        "vllm.method": "eagle3",
        "vllm.method_model": "/models/eagle",
        "vllm.method_tokens": 3,
        "vllm.speculative_config": {"draft_tensor_parallel_size": 1},
    }
    given = arguments(load_settings(overrides=overrides))
    assert given["speculative_config"] == {
        "method": "eagle3",
        "model": "/models/eagle",
        "num_speculative_tokens": 3,
        "draft_tensor_parallel_size": 1,
    }
    assert "scheduler_cls" not in given


def test_every_draft_fits_into_a_step() -> None:
    settings = load_settings(overrides={"scheduler.max_running": 4, "speculation.max_draft_tokens": 10})
    assert vllm_config.batched_tokens(settings) == 256 + 4 * 11


def test_a_context_beyond_the_targets_is_refused() -> None:
    settings = load_settings(overrides={"model.context_length": 5000})
    facts = TargetFacts.from_folder(settings.model.target, "float32")
    with pytest.raises(CheckpointError, match="1024"):
        vllm_config.context_length(settings, facts)


def test_the_cache_gets_what_it_wants_or_what_is_left() -> None:
    given = {"device": 100, "available": 90, "target": 30, "drafter": 10, "activations": 5, "kv_least": 20}
    assert plan_memory(**given, kv_wanted=25).kv_cache == 25
    assert plan_memory(**given, kv_wanted=80).kv_cache == 45
    assert plan_memory(**given, kv_wanted=80).utilization == pytest.approx(0.9)
    with pytest.raises(MemoryBudgetError, match=r"target needs .*KV cache at least .*drafter"):
        plan_memory(**given | {"kv_least": 46}, kv_wanted=80)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2, "hidden_size": 8}')
    with pytest.raises(CheckpointError):
        TargetFacts.from_folder(tmp_path, "float32")


def test_a_pipeline_is_named_by_module_and_function() -> None:
    with pytest.raises(SettingsError, match=r"vllm\.pipeline"):
        load_settings(overrides={"vllm.pipeline": "rm -rf"})


def test_a_device_that_is_not_there_is_told_in_one_sentence() -> None:
    settings = load_settings(overrides={"model.device": "cuda:99"})
    facts = TargetFacts.from_folder(settings.model.target, "float32")
    with pytest.raises(CheckpointError, match=r"memory of cuda:99 cannot be asked for"):
        vllm_config.budget(settings, facts)
