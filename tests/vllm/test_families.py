"""Every hub family as drafter inside vLLM's worker: greedy tokens stay those of plain decoding."""

from pathlib import Path

import pytest

from tests.checkpoints import HUB_DRAFTERS, change_vocabulary, write_hub_drafter
from tests.vllm.conftest import InProcess
from tests.vllm.test_greedy import drafted, params

PROMPTS = [list(range(40, 100)), [7, 8, 9] * 12, [5], [200, 201, 17] * 30]
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def expected(tiny: InProcess) -> list[tuple[int, ...]]:
    return [run.tokens for run in tiny.run(PROMPTS, params(NUM_TOKENS, enabled=False))]


def assert_same(tiny: InProcess, folder: Path, relation: str, expected: list[tuple[int, ...]]) -> None:
    """Draft with the checkpoint in `folder`, alone and in a batch with sampled neighbours."""
    from service.settings import load_settings
    from service.wiring import build_pipeline, warm_up
    from transformer.config import TransformerConfig
    from transformer.model import Transformer

    target = tiny.settings.model.target
    settings = load_settings(
        overrides={
            "model.target": target,
            "model.drafter": str(folder),
            "speculation.free_drafts": False,
            "speculation.policy": "fixed",
            "speculation.fixed_draft_tokens": 4,
            "speculation.window_tokens": 64,
            "speculation.max_draft_tokens": 4,
        }
    )
    pipeline = build_pipeline(settings, TransformerConfig.from_folder(target), Transformer.load(folder))
    assert f"{relation} vocabulary" in pipeline.description
    warm_up(pipeline)
    tiny.use(pipeline)
    mixed = [prompt for prompt in PROMPTS for _ in range(2)]
    wanted = [params(NUM_TOKENS), params(NUM_TOKENS, temperature=1.0)] * len(PROMPTS)
    runs = tiny.run(mixed, wanted)[::2]
    assert [run.tokens for run in runs] == expected
    assert tiny.run(PROMPTS[:1], params(NUM_TOKENS))[0].tokens == expected[0]
    assert drafted(runs)[0] > 0
    assert pipeline.num_failures == 0
    assert tiny.guard.num_failures == 0


@pytest.mark.parametrize("name", HUB_DRAFTERS)
def test_no_family_changes_a_token(name: str, tiny: InProcess, tmp_path: Path, expected: list[tuple[int, ...]]) -> None:
    folder = tmp_path / HUB_DRAFTERS[name].folder
    write_hub_drafter(folder, name)
    assert_same(tiny, folder, "identical", expected)


@pytest.mark.parametrize(("kind", "relation"), [("partial", "overlapping"), ("byte-names", "disjoint")])
def test_no_vocabulary_changes_a_token(
    kind: str, relation: str, tiny: InProcess, tmp_path: Path, expected: list[tuple[int, ...]]
) -> None:
    write_hub_drafter(tmp_path, "fast-dllm")
    change_vocabulary(tmp_path, kind)  # type: ignore[arg-type]
    assert_same(tiny, tmp_path, relation, expected)
